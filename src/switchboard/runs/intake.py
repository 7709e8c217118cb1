"""Where the news of this process queue up to be written together."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextvars import Context
from itertools import chain, repeat
from typing import Annotated, NamedTuple, Self

import structlog
from fastapi import Depends
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import HTTPConnection

from switchboard.database import Line
from switchboard.errors import StatementFailed, Unavailable, postgres_is_away, will_pass
from switchboard.events import NewEvent
from switchboard.leaving import LAST_NEWS, LAST_WORDS, Leaving
from switchboard.live.announcer import Announcer
from switchboard.runs.appending import append, plain
from switchboard.runs.beginning import begin, fresh
from switchboard.runs.ingest import write
from switchboard.runs.sorting import NewRuns, News, Outcome, Recorded, Registered, Unconfirmed
from switchboard.tasks import end

log = structlog.stdlib.get_logger(__name__)

MAX_WAITING = 2_000
"""News that may wait; beyond it a caller is told to come back."""

MAX_BATCH = 200
"""News in one transaction."""

_PAUSES = (0.2, 1.0, 3.0)
"""Seconds between attempts to write what must not get lost; the last ones as long as it takes."""

MAX_WAITING_BYTES, MAX_BATCH_BYTES = 64_000_000, 8_000_000
"""What they may weigh."""


class _Waiting(NamedTuple):
    news: News
    written: asyncio.Future[Outcome]
    size: int

    def answer(self, outcome: Outcome) -> None:
        # A caller that hung up is not there to be answered; its news are written all the same.
        if not self.written.done():
            self.written.set_result(outcome)

    def fail(self, error: Exception) -> None:
        if not self.written.done():
            self.written.set_exception(error)


class Intake:
    """Writes news in the order in which they come, as many at once as came during the last write.

    Nobody waits for company: with one caller, each is a transaction of its own. Writers take turns in the
    database anyway, so more than one at a time in a process would only wait for each other.
    """

    def __init__(self, line: Line, announcer: Announcer, leaving: Leaving, *, reconcile_after: float = 15) -> None:
        self._line = line
        self._announcer = announcer
        self._leaving = leaving
        self._reconcile_after = reconcile_after
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._writing: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._insisted: set[asyncio.Task[Outcome]] = set()
        self._expected: set[object] = set()
        self._nothing_expected = asyncio.Event()
        self._nothing_expected.set()

    async def take(self, news: News, size: int = 0) -> Outcome:
        """Writes news, which weigh so many bytes, and returns what became of them, once that is committed.

        Raises Unavailable when too many wait already, and whatever goes wrong in the database.
        """
        # What became of a trigger is never sent away: its call is placed.
        if isinstance(news, NewEvent) and (
            len(self._waiting) >= MAX_WAITING or (self._waiting and self._waiting_bytes + size > MAX_WAITING_BYTES)
        ):
            raise Unavailable("Too many callbacks at once")
        written: asyncio.Future[Outcome] = asyncio.Future(loop=self._loop)
        self._waiting.append(_Waiting(news, written, size))
        self._waiting_bytes += size
        if self._writing is None:
            # In nobody's context: what it logs and traces is not about the one who came first.
            self._writing = asyncio.create_task(self._write_all(), context=Context())
        return await written

    def insist(self, news: NewRuns | Unconfirmed) -> "asyncio.Task[Outcome]":
        """Writes what became of a call, behind whoever waits for it: however long PostgreSQL is away.

        Only those that were under way when it went are waiting then, as without it no more calls are placed.
        """
        task = asyncio.create_task(self._insist(news))
        self._insisted.add(task)
        task.add_done_callback(self._has_been_written)
        return task

    def _has_been_written(self, task: "asyncio.Task[Outcome]") -> None:
        self._insisted.discard(task)
        if not task.cancelled():
            task.exception()  # it is in the log; nobody may be there any more to be told

    async def _insist(self, news: NewRuns | Unconfirmed) -> Outcome:
        pauses = chain(_PAUSES, repeat(_PAUSES[-1]))
        with self.expecting():
            try:
                while True:
                    try:
                        return await self.take(news)
                    except (SQLAlchemyError, OSError) as error:
                        if not will_pass(error):
                            raise
                        log.warning("what became of a call waits", execution_id=news.execution_id, error=error)
                    await asyncio.sleep(next(pauses))
            except BaseException as error:
                lost = {"execution_id": news.execution_id, "run_ids": news.run_ids if isinstance(news, NewRuns) else ()}
                log.error("what became of a call is lost", **lost, error=error)  # noqa: TRY400  # its words are enough
                raise

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
            await end(*self._insisted)
            if (writing := self._writing) is not None:
                # What a database that does not answer keeps from being written was not answered 200.
                await asyncio.wait({writing}, timeout=self._leaving.left(LAST_WORDS))
                await end(writing)

    async def _write_all(self) -> None:
        batch: list[_Waiting] = []
        try:
            while self._waiting:
                batch = self._next_batch()
                await self._write(batch)
        finally:
            self._writing = None
            # Stopped in the middle: nobody is to wait for ever. Those who have their answer keep it.
            for one in (*batch, *self._waiting):
                one.written.cancel()
            self._waiting.clear()
            self._waiting_bytes = 0

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        while self._waiting and len(batch) < MAX_BATCH and size < MAX_BATCH_BYTES:
            batch.append(self._waiting.popleft())
            size += batch[-1].size
        self._waiting_bytes -= size
        return batch

    async def _write(self, batch: Sequence[_Waiting]) -> None:
        try:
            # Beginnings first: what came with them may be about their runs.
            if (rest := await self._begin(batch)) and (rest := await self._append(rest)):
                await self._write_in_turn(rest)
        except Exception as error:  # noqa: BLE001  # every caller waits for an answer, whatever went wrong
            for one in batch:
                one.fail(error)

    async def _begin(self, batch: Sequence[_Waiting]) -> Sequence[_Waiting]:
        """Writes the rows of runs of which nothing is known but their names, and returns what is left to be done."""
        new = fresh([one.news for one in batch])
        if not new:
            return batch
        try:
            begun = await begin(self._line, list(new.values()), reconcile_after=self._reconcile_after)
        except StatementFailed as error:
            log.warning("runs are written one by one", error=error)
            return batch
        done = {place: events for place, events in zip(new, begun, strict=True) if events is not None}
        for place in done:
            batch[place].answer(Registered())
        self._announcer.announce([event for events in done.values() for event in events])
        return [one for place, one in enumerate(batch) if place not in done]

    async def _append(self, batch: Sequence[_Waiting]) -> Sequence[_Waiting]:
        """Writes what only adds to timelines, and returns what is left to be done."""
        short = plain([one.news for one in batch])
        if not short:
            return batch
        try:
            outcomes = await append(self._line, list(short.values()), reconcile_after=self._reconcile_after)
        except StatementFailed as error:
            # One of them is to blame. The long way finds out which.
            log.warning("events are written one by one", error=error)
            return batch
        done = {place: outcome for place, outcome in zip(short, outcomes, strict=True) if outcome is not None}
        for place, outcome in done.items():
            batch[place].answer(outcome)
        self._announcer.announce([outcome.event for outcome in done.values() if isinstance(outcome, Recorded)])
        return [one for place, one in enumerate(batch) if place not in done]

    async def _write_in_turn(self, batch: Sequence[_Waiting]) -> None:
        try:
            async with self._line.begin() as conn:
                result = await write(conn, [one.news for one in batch], reconcile_after=self._reconcile_after)
        except SQLAlchemyError as error:
            if len(batch) == 1 or postgres_is_away(error):
                raise
            # Whoever is to blame fails alone.
            for one in batch:
                await self._write([one])
            return
        for one, outcome in zip(batch, result.outcomes, strict=True):
            one.answer(outcome)
        self._announcer.announce(result.events)


async def _intake(connection: HTTPConnection) -> Intake:
    intake: Intake = connection.state.intake
    return intake


CurrentIntake = Annotated[Intake, Depends(_intake)]
