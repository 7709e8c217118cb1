"""What a machine without any set-up needs: free ports, embedded servers, the simulator, child processes."""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from switchboard.settings import Settings

LOOPBACK = "127.0.0.1"

SECRET_FILE = "app-secret"  # noqa: S105  # its name
"""Of the data folder: the secret that is used in development where none is set."""

_BACKLOG = 2048


class PortTaken(Exception):
    """Somebody else listens there."""


class SecretNotKept(Exception):
    """The data folder takes none."""


class NoFolder(Exception):
    """This machine has none that can be written."""


class ChildFailed(Exception):
    """A process that was started beside this one left at once."""


Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """As `asyncio.run`, which leaves half an event loop behind where a signal ends the command as it is made.

    For the main thread, where signals arrive.
    """
    with contextlib.closing(main), _runner() as runner:
        return runner.run(main)


@contextlib.contextmanager
def _runner() -> Iterator[asyncio.Runner]:
    with contextlib.ExitStack() as stack:
        with _undisturbed():
            runner = stack.enter_context(asyncio.Runner())
        yield runner


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that come meanwhile are dealt with afterwards."""
    came: list[int] = []

    def remember(signum: int, _: FrameType | None) -> None:
        came.append(signum)

    before = {signum: signal.signal(signum, remember) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    for number in came:
        signal.raise_signal(number)


@contextlib.contextmanager
def listening(host: str, port: int, *, or_any: bool = False) -> Iterator[socket.socket]:
    """A socket that listens; port 0 takes a free one.

    Raises PortTaken, or takes a free one if `or_any`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            if not or_any:
                raise PortTaken(f"cannot listen on {host} port {port}: {error.strerror}") from error
            listener.bind((host, 0))
        # From here on nobody is refused: who comes before the server is ready waits in the backlog.
        listener.listen(_BACKLOG)
        # Inherited by the processes of `serve --workers`.
        listener.set_inheritable(True)
        yield listener


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Sets environment variables for this process and its children, and puts the old ones back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def metrics_together() -> Iterator[None]:
    """Lets the processes that are started from here keep their metrics in one folder, where each finds all of them."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="switchboard-metrics-")
    except OSError as error:
        raise NoFolder("several processes need a temporary folder for their metrics; set TMPDIR to one") from error
    with folder as name, environment(PROMETHEUS_MULTIPROC_DIR=name):
        yield


@contextlib.contextmanager
def servers(settings: "Settings") -> Iterator[None]:
    """Starts the servers that the settings do not name, and names them in the environment."""
    if settings.database_url is not None and settings.redis_url is not None:
        yield
        return
    from switchboard import embedded  # noqa: PLC0415  # a deployment names its servers

    with embedded.running(Path(settings.switchboard_data_dir)) as started:
        found = {}
        if settings.database_url is None:
            found["DATABASE_URL"] = started.database_url
        if settings.redis_url is None:
            found["REDIS_URL"] = started.redis_url
        with environment(**found):
            yield


@contextlib.contextmanager
def app_secret(settings: "Settings") -> Iterator[None]:
    """Names a secret in the environment, in development, where none is set: a random one, kept in the data folder."""
    if settings.app_secret is not None or settings.environment == "production":
        yield
        return
    with environment(APP_SECRET=_kept_secret(Path(settings.switchboard_data_dir))):
        yield


def _kept_secret(data_dir: Path) -> str:
    kept = data_dir / SECRET_FILE
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            # Written whole before it gets its name, and the first of several processes to name its own wins.
            with tempfile.NamedTemporaryFile("w", dir=data_dir, prefix="app-secret-") as fresh:
                fresh.write(secrets.token_hex(32))
                fresh.flush()
                with contextlib.suppress(FileExistsError):
                    kept.hardlink_to(fresh.name)
        return kept.read_text().strip()
    except OSError as error:
        raise SecretNotKept(f"cannot keep a secret in {data_dir}: {error.strerror}; set APP_SECRET") from error


@contextlib.contextmanager
def upstream(settings: "Settings", *, pace: float = 0.4) -> Iterator[str | None]:
    """Starts the simulator if the settings name no hook, and names it in the environment; yields its address."""
    if settings.happyrobot_webhook_url is not None:
        yield None
        return
    names = ("HAPPYROBOT_X_API_KEY", "HAPPYROBOT_CALLBACK_KEY", "HAPPYROBOT_API_KEY")
    keys = {name: secrets.token_hex(16) for name in names}
    with environment(**keys), child("simulate", "--port", "0", "--pace", str(pace)) as address:
        hook, api = f"{address}/hooks/demo", f"{address}/api/v1"
        with environment(HAPPYROBOT_WEBHOOK_URL=hook, HAPPYROBOT_API_URL=api):
            yield address


@contextlib.contextmanager
def child(*command: str) -> Iterator[str]:
    """Runs a `switchboard` command beside this one; yields the address on which it says that it listens.

    It leaves with this process, however that ends: it reads a pipe that the kernel then closes.
    """
    arguments = [sys.executable, "-m", "switchboard", *command, "--leave-with-stdin"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None  # noqa: S101  # for the type checker; it was asked for
            words = process.stdout.readline().split()
            if not words:
                raise ChildFailed(f"`switchboard {' '.join(command)}` did not start")
            yield words[-1]
        finally:
            process.terminate()
            process.wait()


def leave_with_stdin() -> None:
    """Asks this process to stop once its standard input ends."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
