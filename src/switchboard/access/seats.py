"""Open streams: how many there may be, and for how long."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Annotated, Self, TypeVar
from uuid import UUID

import structlog
from fastapi import Depends
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import HTTPConnection

from switchboard.access import keys
from switchboard.access.callers import Caller
from switchboard.errors import TooMany
from switchboard.settings import Settings
from switchboard.tasks import end

log = structlog.stdlib.get_logger(__name__)

_LOOK_EVERY = 5.0
"""Seconds within which the streams of a key that was revoked end."""

_ROOM_AGAIN = 10.0
"""Seconds after which somebody for whom there was no room may try again."""


_Name = TypeVar("_Name")


@dataclass(frozen=True, slots=True, eq=False)
class _Seat:
    key_id: UUID | None
    address: str
    leave: Callable[[], None]


class Seats:
    """The open streams of this process."""

    def __init__(self, db: AsyncEngine, settings: Settings) -> None:
        self._db = db
        self._per_key = settings.streams_per_key
        self._per_address = settings.streams_per_address
        self._taken: set[_Seat] = set()
        self._of_key: Counter[UUID | None] = Counter()
        self._at_address: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Sees to it, until the block ends, that nobody keeps a seat whose key was revoked."""
        looking = asyncio.create_task(self._look())
        try:
            yield self
        finally:
            await end(looking)

    @contextlib.contextmanager
    def taken(self, caller: Caller, address: str, leave: Callable[[], None]) -> Iterator[None]:
        """Takes a seat; calls `leave` once the caller's time is over, or its key is good for nothing any more.

        Raises TooMany where there is none.
        """
        if caller.key is not None and self._of_key[caller.key.id] >= self._per_key:
            raise TooMany("Too many open streams of this API key", retry_after=_ROOM_AGAIN)
        if not _is_here(address) and self._at_address[address] >= self._per_address:
            raise TooMany("Too many open streams to this address", retry_after=_ROOM_AGAIN)
        seat = _Seat(None if caller.key is None else caller.key.id, address, leave)
        self._taken.add(seat)
        self._of_key[seat.key_id] += 1
        self._at_address[address] += 1
        timer = None
        if caller.expires_at is not None:
            left = (caller.expires_at - datetime.now(UTC)).total_seconds()
            timer = asyncio.get_running_loop().call_later(max(left, 0), leave)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            self._taken.discard(seat)
            _count_down(self._of_key, seat.key_id)
            _count_down(self._at_address, address)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            if not (held := {seat.key_id for seat in self._taken if seat.key_id is not None}):
                continue
            try:
                async with self._db.connect() as conn:
                    revoked = await keys.no_good(conn, held)
            except (SQLAlchemyError, OSError) as error:
                # Whoever has a seat keeps it meanwhile: nothing can be read from PostgreSQL anyway.
                log.warning("open streams are not checked: PostgreSQL is away", error=type(error).__name__)
                continue
            for seat in [seat for seat in self._taken if seat.key_id in revoked]:
                seat.leave()


def _count_down(counter: Counter[_Name], name: _Name) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]


def _is_here(address: str) -> bool:
    """Whether it is this machine's own: who is here already has no need to exhaust it from outside."""
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


async def _seats(connection: HTTPConnection) -> Seats:
    seats: Seats = connection.state.seats
    return seats


CurrentSeats = Annotated[Seats, Depends(_seats)]
