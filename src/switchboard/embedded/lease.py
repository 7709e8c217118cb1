"""What a user does: hold the lock of the users, and find the servers or start a keeper."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from switchboard.embedded.folder import (
    ANOTHER_KEEPS,
    KEEPER_LOCK,
    LOG,
    PATIENCE,
    POLL_EVERY,
    SERVERS_FILE,
    USERS_LOCK,
    acquire,
    poll,
)
from switchboard.embedded.servers import PORT, EmbeddedUnavailable, Programs, Servers, answers


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
        if not poll(lambda: acquire(users, fcntl.LOCK_SH)):
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
        elif servers := found(data_dir):
            return servers
        else:
            time.sleep(POLL_EVERY)
    raise _failed(data_dir, f"The private servers were not ready in {PATIENCE:.0f} s")


def _start_keeper(data_dir: Path) -> bool:
    """Start a keeper and return whether it is the one: another may have been faster."""
    Programs.installed()  # told here, rather than by the end of a log
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
        return not acquire(lock, fcntl.LOCK_SH)


def found(data_dir: Path) -> Servers | None:
    """The servers of a data folder, if they run; starts nothing."""
    try:
        servers = Servers(**json.loads((data_dir / SERVERS_FILE).read_text()))
    except FileNotFoundError:
        return None
    valkey = Path(unquote(urlsplit(servers.redis_url).path))
    return servers if answers(valkey) and answers(valkey.with_name(f".s.PGSQL.{PORT}")) else None
