"""What all measurements stand on: a folder, the servers, HappyRobot's side, the tools, and whose turn it is."""

import contextlib
import fcntl
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import children, hook
from benchmarks.children import LOOPBACK
from benchmarks.names import Names
from benchmarks.options import Options, Peer, Unusable
from switchboard import embedded
from switchboard.embedded.folder import KEEPER_LOCK, acquire, poll

_PACKAGES = {"wrk": "wrk", "cc": "gcc libc6-dev"}
"""Debian's, by the programs that are needed."""


@dataclass(frozen=True, slots=True)
class Rig:
    options: Options
    folder: Path
    """For logs, data and what is compiled; gone at the end."""
    database_url: str
    redis_url: str
    names: Names
    hook_url: str
    """Where HappyRobot's side answers."""
    streams: Path
    """The program that opens streams."""

    @property
    def peer(self) -> Peer | None:
        return self.options.peer

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A time in which others who measure on this machine leave it to us."""
        if self.options.lock is None:
            yield
            return
        with self.options.lock.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def rounds(self, count: int) -> Iterator[int]:
        """Their numbers. In each, all who are compared are measured one after the other."""
        for number in range(count):
            with self.turn():
                yield number

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def require_tools() -> None:
    """Raises Unusable where programs are missing, before anything is started."""
    missing = [packages for program, packages in _PACKAGES.items() if shutil.which(program) is None]
    if sys.platform != "linux":
        raise Unusable("memory and streams are measured on Linux alone")
    if missing:
        raise Unusable(f"wrk and a C compiler are needed; on Debian: apt-get install {' '.join(missing)}")


def allow_files() -> None:
    """As many open files as may be, for this process and all that it starts."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def leave_in_order() -> None:
    """Lets SIGTERM and Ctrl-C unwind this process, so that what it has started is ended first."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        # Said for Ctrl-C, too: whoever is started in a shell's background is told to ignore it.
        signal.signal(signum, lambda number, _: sys.exit(128 + number))


@contextlib.contextmanager
def standing(options: Options) -> Iterator[Rig]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder())
        streams = compiled(folder)
        names = Names()
        database_url, redis_url = stack.enter_context(_servers(options, folder))
        port = options.peer.hook_port if options.peer else children.free_port()
        stack.enter_context(_hook(folder, port, names))
        yield Rig(options, folder, database_url, redis_url, names, f"http://{LOOPBACK}:{port}", streams)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="switchboard-benchmarks-"))
    try:
        yield folder
    finally:
        # Embedded servers stop by themselves once nobody needs them, and may be writing till then.
        poll(lambda: all(map(_is_free, folder.rglob(KEEPER_LOCK))))
        shutil.rmtree(folder)


def _is_free(lock: Path) -> bool:
    with lock.open("a") as file:
        return acquire(file, fcntl.LOCK_SH)


def compiled(folder: Path) -> Path:
    """The program that opens streams."""
    program = folder / "streams"
    source = Path(__file__).with_name("streams.c")
    subprocess.run(["cc", "-O2", "-o", program, source], check=True)
    return program


@contextlib.contextmanager
def _servers(options: Options, folder: Path) -> Iterator[tuple[str, str]]:
    """Those that are given, and embedded ones for the others, which keep PostgreSQL's durable settings."""
    if options.database_url and options.redis_url:
        yield options.database_url, options.redis_url
        return
    with embedded.running(folder / "servers") as started:
        yield options.database_url or started.database_url, options.redis_url or started.redis_url


@contextlib.contextmanager
def _hook(folder: Path, port: int, names: Names) -> Iterator[None]:
    if children.listens(port):
        raise Unusable(f"something listens on port {port} already, where the peer is to find HappyRobot's side")
    command = [sys.executable, "-m", hook.__name__, str(port), names.started_run]
    with children.running("hook", command, folder, children.environment(), lambda: children.answers(port)):
        yield
