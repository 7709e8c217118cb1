"""Where the events of this process queue up to be written together."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Self

from fastapi import Depends
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import HTTPConnection

from switchboard.errors import Unavailable, postgres_is_away
from switchboard.events import NewEvent
from switchboard.live.announcer import Announcer
from switchboard.runs.ingest import Outcome, Recorded, record

MAX_WAITING = 2_000
"""Events that may wait; beyond it a caller is told to come back."""

MAX_BATCH = 200
"""Events in one transaction."""

_Waiting = tuple[NewEvent, asyncio.Future[Outcome]]


class Intake:
    """Writes events in the order in which they come, as many at once as came during the last write.

    Nobody waits for company: with one caller, each event is a transaction of its own. Writers take turns in the
    database anyway, so more than one at a time in a process would only wait for each other.
    """

    def __init__(self, db: AsyncEngine, announcer: Announcer) -> None:
        self._db = db
        self._announcer = announcer
        self._waiting: deque[_Waiting] = deque()
        self._writing: asyncio.Task[None] | None = None

    async def take(self, event: NewEvent) -> Outcome:
        """Writes an event and returns what became of it, once that is committed.

        Raises Unavailable when too many wait already, and whatever goes wrong in the database.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise Unavailable("Too many callbacks at once")
        written: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append((event, written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all())
        return await written

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Takes events until the block ends, then finishes what waits."""
        try:
            yield self
        finally:
            if self._writing is not None:
                await self._writing

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                await self._write([self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))])
        finally:
            self._writing = None

    async def _write(self, batch: Sequence[_Waiting]) -> None:
        try:
            async with self._db.begin() as conn:
                outcomes = await record(conn, [event for event, _ in batch])
        except (SQLAlchemyError, OSError) as error:
            if len(batch) > 1 and not postgres_is_away(error):
                # Whoever is to blame fails alone.
                for one in batch:
                    await self._write([one])
                return
            for _, written in batch:
                if not written.done():
                    written.set_exception(error)
            return
        for (_, written), outcome in zip(batch, outcomes, strict=True):
            # A caller that hung up is not there to be answered; its event is written all the same.
            if not written.done():
                written.set_result(outcome)
        self._announcer.announce([outcome.event for outcome in outcomes if isinstance(outcome, Recorded)])


def _intake(connection: HTTPConnection) -> Intake:
    intake: Intake = connection.state.intake
    return intake


CurrentIntake = Annotated[Intake, Depends(_intake)]
