"""Where the news of this process queue up to be written together."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextvars import Context
from typing import Annotated, Self

from fastapi import Depends
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import HTTPConnection

from switchboard.errors import Unavailable, postgres_is_away
from switchboard.events import NewEvent
from switchboard.leaving import LAST_NEWS, LAST_WORDS, Leaving
from switchboard.live.announcer import Announcer
from switchboard.runs.ingest import write
from switchboard.runs.sorting import News, Outcome
from switchboard.tasks import end

MAX_WAITING = 2_000
"""News that may wait; beyond it a caller is told to come back."""

MAX_BATCH = 200
"""News in one transaction."""

_Waiting = tuple[News, asyncio.Future[Outcome]]


class Intake:
    """Writes news in the order in which they come, as many at once as came during the last write.

    Nobody waits for company: with one caller, each is a transaction of its own. Writers take turns in the
    database anyway, so more than one at a time in a process would only wait for each other.
    """

    def __init__(self, db: AsyncEngine, announcer: Announcer, leaving: Leaving, *, reconcile_after: float = 15) -> None:
        self._db = db
        self._announcer = announcer
        self._leaving = leaving
        self._reconcile_after = reconcile_after
        self._waiting: deque[_Waiting] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._expected: set[object] = set()
        self._nothing_expected = asyncio.Event()
        self._nothing_expected.set()

    async def take(self, news: News) -> Outcome:
        """Writes news and returns what became of them, once that is committed.

        Raises Unavailable when too many wait already, and whatever goes wrong in the database.
        """
        # What became of a trigger is never sent away: its call is placed.
        if len(self._waiting) >= MAX_WAITING and isinstance(news, NewEvent):
            raise Unavailable("Too many callbacks at once")
        written: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append((news, written))
        if self._writing is None:
            # In nobody's context: what it logs and traces is not about the one who came first.
            self._writing = asyncio.create_task(self._write_all(), context=Context())
        return await written

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Keeps the intake open for news that come by the end of the block, also while the service stops."""
        news = object()
        self._expected.add(news)
        self._nothing_expected.clear()
        try:
            yield
        finally:
            self._expected.discard(news)
            if not self._expected:
                self._nothing_expected.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Takes news until the block ends, then what is expected, and finishes what waits."""
        try:
            yield self
        finally:
            self._leaving.begin()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nothing_expected.wait(), self._leaving.left(LAST_NEWS))
            if (writing := self._writing) is not None:
                # What a database that does not answer keeps from being written was not answered 200.
                await asyncio.wait({writing}, timeout=self._leaving.left(LAST_WORDS))
                await end(writing)

    async def _write_all(self) -> None:
        batch: list[_Waiting] = []
        try:
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
                await self._write(batch)
        finally:
            self._writing = None
            # Stopped in the middle: nobody is to wait for ever. Those who have their answer keep it.
            for _, written in (*batch, *self._waiting):
                written.cancel()
            self._waiting.clear()

    async def _write(self, batch: Sequence[_Waiting]) -> None:
        try:
            async with self._db.begin() as conn:
                result = await write(conn, [news for news, _ in batch], reconcile_after=self._reconcile_after)
        except Exception as error:  # noqa: BLE001  # every caller waits for an answer, whatever went wrong
            if len(batch) > 1 and isinstance(error, SQLAlchemyError) and not postgres_is_away(error):
                # Whoever is to blame fails alone.
                for one in batch:
                    await self._write([one])
                return
            for _, written in batch:
                if not written.done():
                    written.set_exception(error)
            return
        for (_, written), outcome in zip(batch, result.outcomes, strict=True):
            # A caller that hung up is not there to be answered; its news are written all the same.
            if not written.done():
                written.set_result(outcome)
        self._announcer.announce(result.events)


async def _intake(connection: HTTPConnection) -> Intake:
    intake: Intake = connection.state.intake
    return intake


CurrentIntake = Annotated[Intake, Depends(_intake)]
