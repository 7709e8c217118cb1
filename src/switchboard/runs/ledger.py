"""Where executions are written down that are to be started now: those that come while others are written, together.

Each is committed before its call is placed, and many may wait for that at once. Nobody waits for company, as in the
intake, beside which it stands: executions need not take turns with what happens to runs. Those with an
`Idempotency-Key` are not for here: whoever waits to see what another request with the same key does must wait alone.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Self
from uuid import UUID

import structlog
from pydantic_core import to_json
from sqlalchemy.exc import SQLAlchemyError

from switchboard import tracing
from switchboard.database import Line
from switchboard.errors import StatementFailed, Unavailable
from switchboard.settings import Settings
from switchboard.tasks import end

log = structlog.stdlib.get_logger(__name__)

MAX_WAITING, MAX_WAITING_BYTES = 1_000, 64_000_000
"""Executions that may wait, and what they may weigh; beyond it a caller is told to come back."""

MAX_BATCH, MAX_BATCH_BYTES = 100, 8_000_000
"""Executions in one statement, and what they may weigh."""

_MARGIN = 60.0
"""Seconds beyond the trigger's own time limits after which its process counts as gone."""

_PATIENCE = 1.0
"""Seconds that a statement which is under way gets when the service stops."""

_ENTER = """
INSERT INTO executions (id, workflow_id, context_id, name, description, input, owner, answer_by)
SELECT id, workflow_id, context_id, name, description, input::jsonb, owner, now() + $8
FROM unnest($1::uuid[], $2::varchar[], $3::varchar[], $4::varchar[], $5::text[], $6::text[], $7::varchar[])
    AS entry (id, workflow_id, context_id, name, description, input, owner)
"""

# Taken back whole: it does not count for its key either.
_FORGET = """
WITH gone AS (
    DELETE FROM executions WHERE id = ANY ($1::uuid[]) AND status = 'pending' RETURNING key_id, created_at
), counted AS (
    SELECT key_id, date_trunc('month', created_at AT TIME ZONE 'UTC')::date AS month, count(*) AS executions
    FROM gone WHERE key_id IS NOT NULL GROUP BY 1, 2
)
UPDATE api_key_usage SET executions = api_key_usage.executions - counted.executions
FROM counted WHERE api_key_usage.key_id = counted.key_id AND api_key_usage.month = counted.month
"""

_AGAIN_AFTER = 1.0
"""Seconds between attempts to take something back while PostgreSQL is away."""

_MOST_UNPLACED = 10_000
"""Executions that wait for that; what is beyond is settled by the sweep."""


@dataclass(frozen=True, slots=True)
class NewExecution:
    """A request to start a workflow."""

    id: UUID
    workflow_id: str
    context_id: str
    name: str | None
    description: str | None
    body: dict[str, Any]
    idempotency_key: str | None
    at_once: bool = True
    """Whether its call is placed by whoever stores it, and now."""


def longest_answer(settings: Settings) -> timedelta:
    """After how long whoever begins to place a call knows what became of it, or is gone."""
    return timedelta(seconds=2 * settings.happyrobot_trigger_timeout + _MARGIN)


class _Entry(NamedTuple):
    execution: NewExecution
    owner: str
    body: bytes
    entered: asyncio.Future[bool]

    def answer(self, entered: bool) -> None:
        if not self.entered.done():
            self.entered.set_result(entered)

    def fail(self, error: Exception) -> None:
        if not self.entered.done():
            self.entered.set_exception(error)


class Ledger:
    """Writes executions down in the order in which they come."""

    def __init__(self, line: Line, settings: Settings) -> None:
        self._line = line
        self._longest_answer = longest_answer(settings)
        self._waiting: deque[_Entry] = deque()
        self._waiting_bytes = 0
        self._closed = False
        self._writing: asyncio.Task[None] | None = None
        self._line_is_free = asyncio.Lock()
        self._unplaced: set[UUID] = set()
        self._taking_back: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def enter(self, execution: NewExecution, owner: str) -> bool:
        """Writes an execution without a key down; whether it is there, and committed.

        Where it is not, there is something in it that PostgreSQL does not take.
        """
        if self._closed:
            raise Unavailable("The service is restarting")
        body = to_json(execution.body)
        if len(self._waiting) >= MAX_WAITING or (self._waiting and self._waiting_bytes + len(body) > MAX_WAITING_BYTES):
            raise Unavailable("Too many triggers at once")
        entered: asyncio.Future[bool] = self._loop.create_future()
        self._waiting.append(_Entry(execution, owner, body, entered))
        self._waiting_bytes += len(body)
        if self._writing is None:
            # In nobody's context, as what the intake writes.
            self._writing = asyncio.create_task(self._write_all(), context=Context())
        with tracing.statement(_ENTER):
            return await entered

    def take_back(self, *execution_ids: UUID) -> None:
        """Forgets executions, as soon as PostgreSQL is there, that may have been stored, and whose calls nobody places.

        Left there, somebody might have been called for all one knows, and nobody is when they are asked for again.
        """
        if len(self._unplaced) < _MOST_UNPLACED:
            self._unplaced.update(execution_ids)
        if self._taking_back is None and not self._closed:
            self._taking_back = asyncio.create_task(self._take_back(), context=Context())

    async def _take_back(self) -> None:
        try:
            while self._unplaced:
                unplaced = list(self._unplaced)
                try:
                    async with self._line_is_free:
                        await self._line.fetch(_FORGET, unplaced)
                except StatementFailed:
                    raise
                except (SQLAlchemyError, OSError) as error:
                    log.debug("executions are not taken back yet", error=error)
                    await asyncio.sleep(_AGAIN_AFTER)
                else:
                    self._unplaced.difference_update(unplaced)
        except StatementFailed as error:
            log.error("executions are not taken back", error=error)  # noqa: TRY400  # its words are enough
            self._unplaced.clear()
        finally:
            self._taking_back = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Writes until the block ends."""
        try:
            yield self
        finally:
            self._closed = True
            if under_way := set(filter(None, (self._writing, self._taking_back))):
                await asyncio.wait(under_way, timeout=_PATIENCE)
                await end(*under_way)
            # Also where it had not begun.
            self._give_up(list(self._waiting))

    async def _write_all(self) -> None:
        batch: list[_Entry] = []
        try:
            while batch := self._next_batch():
                await self._write(batch)
        finally:
            self._writing = None
            # Stopped in the middle: nobody is to wait for ever. Those who have their answer keep it.
            self._give_up((*batch, *self._waiting))

    def _give_up(self, entries: Iterable[_Entry]) -> None:
        for one in entries:
            one.entered.cancel()
        self._waiting.clear()
        self._waiting_bytes = 0

    def _next_batch(self) -> list[_Entry]:
        batch: list[_Entry] = []
        size = 0
        while self._waiting and len(batch) < MAX_BATCH and size < MAX_BATCH_BYTES:
            entry = self._waiting.popleft()
            self._waiting_bytes -= len(entry.body)
            if not entry.entered.cancelled():  # nobody would place its call
                batch.append(entry)
                size += len(entry.body)
        return batch

    async def _write(self, batch: Sequence[_Entry]) -> None:
        try:
            async with self._line_is_free:
                await self._line.fetch(_ENTER, *self._columns(batch), self._longest_answer)
        except StatementFailed as error:
            # Who is to blame finds out on the long way; the others have done nothing wrong.
            if len(batch) == 1:
                log.warning("execution is written the long way", error=error)
                batch[0].answer(entered=False)
            else:
                for one in batch:
                    await self._write([one])
        except Exception as error:  # noqa: BLE001  # every caller waits for an answer, whatever went wrong
            for one in batch:
                one.fail(error)
            self.take_back(*(one.execution.id for one in batch))
        else:
            for one in batch:
                one.answer(entered=True)
            if hung_up := [one.execution.id for one in batch if one.entered.cancelled()]:
                self.take_back(*hung_up)

    def _columns(self, batch: Sequence[_Entry]) -> Sequence[Sequence[object]]:
        rows = (
            (
                one.execution.id,
                one.execution.workflow_id,
                one.execution.context_id,
                one.execution.name,
                one.execution.description,
                one.body.decode(),
                one.owner,
            )
            for one in batch
        )
        return list(zip(*rows, strict=True))
