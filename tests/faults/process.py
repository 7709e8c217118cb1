"""`python -m tests.faults.process …`: the `switchboard` command, in a process whose clock others can set.

`FAULTS_CLOCK` names a file with the seconds by which its clock is ahead, `FAULTS_VARIANT` a way in which the service is
broken on purpose (`variants.py`), and `FAULTS_HASTE` makes it wait less for what only time tells.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import time_machine

from switchboard import cli, local
from switchboard.live import followers
from switchboard.runs import ledger, sweep
from tests.faults import variants

CLOCK, VARIANT, HASTE = "FAULTS_CLOCK", "FAULTS_VARIANT", "FAULTS_HASTE"


def _keep_time(file: Path) -> None:
    """Sets this process's time of day whenever another one is written there; what it measures goes on evenly."""

    def watch() -> None:
        ahead = 0.0
        traveller: time_machine.travel | None = None
        while True:
            wanted = float(file.read_text() or ahead)
            if wanted != ahead:
                if traveller is not None:
                    traveller.stop()
                # By the clock that all processes share: the one that was just stopped has moved this one's.
                traveller = time_machine.travel(timedelta(seconds=wanted), tick=True)
                traveller.start()
                ahead = wanted
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()


_UNREAD, _UNSENT = 20, 32_768
"""Events that a browser may be behind, and bytes that the system keeps for it: rounds are too short for thousands."""


def _notice_who_does_not_read() -> None:
    followers.MAX_UNREAD = _UNREAD
    listening = local.listening

    @contextlib.contextmanager
    def with_little_room(*arguments: Any, **options: Any) -> Iterator[socket.socket]:
        with listening(*arguments, **options) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT)  # of all that it accepts
            yield listener

    local.listening = with_little_room


def _hasten() -> None:
    ledger._MARGIN = 1.0
    sweep._LOST = timedelta(seconds=2)


if __name__ == "__main__":
    local.leave_with_stdin()
    _notice_who_does_not_read()
    if clock := os.environ.get(CLOCK):
        _keep_time(Path(clock))
    if variant := os.environ.get(VARIANT):
        variants.VARIANTS[variant]()
    if os.environ.get(HASTE):
        _hasten()
    cli.main()
