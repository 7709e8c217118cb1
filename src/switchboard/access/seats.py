"""Open streams: how many there may be, and for how long."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Self
from uuid import UUID

import structlog
from fastapi import Depends
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import HTTPConnection

from switchboard.access import keys
from switchboard.access.callers import Caller
from switchboard.access.keys import ApiKey
from switchboard.edge import is_here
from switchboard.errors import TooMany
from switchboard.settings import Settings
from switchboard.tasks import end

log = structlog.stdlib.get_logger(__name__)

_LOOK_EVERY = 5.0
"""Seconds within which the streams of a key that was revoked end."""

_ROOM_AGAIN = 10.0
"""Seconds after which somebody for whom there was no room may try again."""


@dataclass(frozen=True, slots=True, eq=False)
class _Seat:
    key: ApiKey | None
    leave: Callable[[], None]
    bell: asyncio.TimerHandle | None
    """Rings when the caller's time is over."""

    def is_good(self, good: AbstractSet[UUID | bytes]) -> bool:
        """Whether its key is among those, and still that which was brought for it."""
        return self.key is None or (self.key.id if self.key.digest is None else self.key.digest) in good


class Seats:
    """The open streams of this process."""

    def __init__(self, db: AsyncEngine, settings: Settings) -> None:
        self._db = db
        self._per_key = settings.streams_per_key
        self._per_address = settings.streams_per_address
        self._taken: set[_Seat] = set()
        self._counts: Counter[UUID | str] = Counter()
        """By key and by address."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Sees to it, until the block ends, that nobody keeps a seat whose key was revoked or replaced."""
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
        counted: list[UUID | str] = []
        if caller.key is not None:
            if self._counts[caller.key.id] >= self._per_key:
                raise TooMany("Too many open streams of this API key", retry_after=_ROOM_AGAIN)
            counted.append(caller.key.id)
        # Who is on this machine already has no need to exhaust it from outside.
        if not is_here(address):
            if self._counts[address] >= self._per_address:
                raise TooMany("Too many open streams to this address", retry_after=_ROOM_AGAIN)
            counted.append(address)
        seat = _Seat(caller.key, leave, self._bell(caller, leave))
        self._taken.add(seat)
        self._counts.update(counted)
        try:
            yield
        finally:
            self._give_back(seat, counted)

    def _bell(self, caller: Caller, leave: Callable[[], None]) -> asyncio.TimerHandle | None:
        if caller.expires_at is None:
            return None
        left = (caller.expires_at - datetime.now(UTC)).total_seconds()
        return asyncio.get_running_loop().call_later(max(left, 0), leave)

    def _give_back(self, seat: _Seat, counted: Iterable[UUID | str]) -> None:
        self._taken.discard(seat)
        if seat.bell is not None:
            seat.bell.cancel()
        for name in counted:
            self._counts[name] -= 1
            if not self._counts[name]:
                del self._counts[name]

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            try:
                await self._send_away()
            except (SQLAlchemyError, OSError) as error:
                # Whoever has a seat keeps it meanwhile.
                log.warning("open streams are not checked: PostgreSQL is away", error=error)
            except Exception:
                # Nobody waits for this task, and without it nobody would be sent away any more.
                log.exception("open streams are not checked")

    async def _send_away(self) -> None:
        seats = list(self._taken)
        if not (held := {seat.key.id for seat in seats if seat.key is not None}):
            return
        async with self._db.connect() as conn:
            good = await keys.good(conn, held)
        for seat in seats:
            if seat in self._taken and not seat.is_good(good):
                seat.leave()


async def _seats(connection: HTTPConnection) -> Seats:
    seats: Seats = connection.state.seats
    return seats


CurrentSeats = Annotated[Seats, Depends(_seats)]
