"""Programs that run beside this one, each ended by its own process id, whatever happens."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
ROOT = Path(__file__).parent.parent

_READY_WITHIN = 60.0
_GONE_WITHIN = 20.0
_LOOK_EVERY = 0.05
_LAST_WORDS = 20


class ChildFailed(Exception):
    """A program did not do what it was started for; with the end of what it said."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        return port


def environment(*without: str, **more: str) -> dict[str, str]:
    """This process's, in which the modules here are found."""
    kept = {name: value for name, value in os.environ.items() if name not in without}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)} | more


@contextlib.contextmanager
def running(
    name: str, command: Sequence[str], folder: Path, surroundings: Mapping[str, str], ready: Callable[[], bool]
) -> Iterator[int]:
    """Runs a program until the block ends; yields its process id once it is ready. What it says goes to a file.

    Raises ChildFailed if it does not become ready.
    """
    log = folder / f"{name}.log"
    with log.open("wb") as said:
        # In a group of its own: Ctrl-C reaches this process, which ends the others in order.
        process = subprocess.Popen(
            command, cwd=folder, env=surroundings, stdin=subprocess.DEVNULL, stdout=said, stderr=said, process_group=0
        )
        try:
            _wait(name, process, log, ready)
            yield process.pid
        finally:
            end(process)


def _wait(name: str, process: "subprocess.Popen[bytes]", log: Path, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _READY_WITHIN
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            last = log.read_text(errors="replace").splitlines()[-_LAST_WORDS:]
            raise ChildFailed("\n".join([f"{name} did not start:", *last]))
        time.sleep(_LOOK_EVERY)


def end(process: "subprocess.Popen[Any]") -> None:
    """Asks a process to leave, and sees to it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_GONE_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def listens(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex((LOOPBACK, port)) == 0


def answers(port: int) -> bool:
    """Whether requests are answered, however: a port can listen long before."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=2)
    try:
        connection.request("GET", "/")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def memory_of(pid: int) -> int:
    """Bytes that a process and its children hold in memory (RSS)."""
    own = Path(f"/proc/{pid}")
    children = (own / "task" / str(pid) / "children").read_text().split()
    line = next(line for line in (own / "status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024 + sum(memory_of(int(child)) for child in children)
