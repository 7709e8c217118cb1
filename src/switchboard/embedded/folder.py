"""What a user and a keeper have to agree on: the files of a data folder, their locks, and how long to wait."""

import fcntl
import os
import time
from collections.abc import Callable
from typing import IO, Any

USERS_LOCK = "users.lock"
KEEPER_LOCK = "keeper.lock"
SERVERS_FILE = "servers.json"
LOG = "keeper.log"

ANOTHER_KEEPS = os.EX_TEMPFAIL  # how a keeper exits that came second

PATIENCE = 60.0  # seconds; PostgreSQL that recovers from a crash on a busy machine takes a while
POLL_EVERY = 0.05


def acquire(file: IO[Any], kind: int) -> bool:
    """Take a lock if it is free."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def poll(condition: Callable[[], bool], within: float = PATIENCE) -> bool:
    """Wait for a condition; false if it has not come true in time."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_EVERY)
    return True
