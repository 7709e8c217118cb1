"""What the keeper does: run the servers until nobody uses them, and clear up after one that was killed."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from switchboard.embedded.folder import ANOTHER_KEEPS, KEEPER_LOCK, LOG, SERVERS_FILE, USERS_LOCK, acquire, poll
from switchboard.embedded.servers import (
    STOP,
    Account,
    EmbeddedUnavailable,
    Programs,
    Server,
    Servers,
    initdb,
    postgres,
    valkey,
)

LOOK_EVERY = 0.2

logger = logging.getLogger(__name__)


def keep(data_dir: Path) -> int:
    """Run the servers in the background until nobody uses them."""
    lock = (data_dir / KEEPER_LOCK).open("a")
    # More than one try, because a user who looks whether a keeper lives holds the lock for a moment.
    if not poll(lambda: acquire(lock, fcntl.LOCK_EX), within=0.5):
        lock.close()
        return ANOTHER_KEEPS
    (data_dir / SERVERS_FILE).unlink(missing_ok=True)  # left by a keeper that was killed
    os.truncate(data_dir / LOG, 0)
    programs = Programs.installed()

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
                while not terminated and _still_at(data_dir, lock) and not acquire(users, fcntl.LOCK_EX):
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
def _serving(data_dir: Path, programs: Programs) -> Iterator[list[Server]]:
    _stop_orphans(data_dir)
    account = Account.for_servers(data_dir)
    sockets = _fresh_sockets(data_dir)
    database, cache = data_dir / "postgres", data_dir / "valkey"
    cache.mkdir(mode=0o700, exist_ok=True)
    if account:
        account.receive(sockets)
        account.receive(cache)
        account.open_way_to(programs.postgres)
        account.open_way_to(programs.valkey)
    if not database.exists():
        initdb(database, programs, account)
    _drop_foreign_pid(database / "postmaster.pid")

    published = data_dir / SERVERS_FILE
    servers = [postgres(programs, account, database, sockets), valkey(programs, account, cache, sockets)]
    try:
        for server in servers:
            server.start()
        unfinished = published.with_suffix(".tmp")
        unfinished.write_text(json.dumps(asdict(Servers.at(sockets)), indent=2))
        unfinished.replace(published)
        yield servers
    finally:
        published.unlink(missing_ok=True)
        for server in servers:
            server.stop()
        shutil.rmtree(sockets, ignore_errors=True)


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
    if not poll(lambda: not _orphans(data_dir)):
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
