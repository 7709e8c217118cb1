"""Executions that are accepted first and started by a worker: the Public API's."""

import asyncio
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import structlog
from sqlalchemy import Float, Row, Select, and_, cast, extract, func, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from switchboard.access import keys
from switchboard.access.callers import Caller
from switchboard.errors import TriggerFailed, will_pass
from switchboard.executions import COLUMNS
from switchboard.happyrobot.client import HappyRobot, PutOff
from switchboard.jobs import START, Job, enqueue
from switchboard.runs.ingest import DEFAULT_NAME
from switchboard.runs.intake import Intake
from switchboard.runs.ledger import NewExecution
from switchboard.runs.sorting import NewRuns, Unconfirmed
from switchboard.runs.trigger import answer_by, place, store
from switchboard.sealing import SealBroken, SecretMissing
from switchboard.settings import Settings
from switchboard.tables import ExecutionStatus, executions
from switchboard.workflows import DEFAULT_WORKFLOW, Workflow, default, find

log = structlog.stdlib.get_logger(__name__)

MOST_ROWS = 100
"""Rows of `csvData` that a workflow is sent: the first ones."""

_LATE = 300.0
"""Seconds after which an execution may be too old to be started; `STALE_AFTER` if that is longer."""

_FOR_OTHERS = 2.0
"""Seconds for which an execution is left to other workers."""

_AGAIN_AFTER = 1.0
"""Seconds between attempts to give an execution back while PostgreSQL is away."""

_PATIENCE = 900.0
"""Seconds for which PostgreSQL may be away while runs are recorded: nobody waits for an answer here."""


def rows_cut(body: dict[str, Any]) -> int:
    """How many rows of a request are too many."""
    rows = body["input"].get("csvData")
    return max(0, len(rows) - MOST_ROWS) if isinstance(rows, list) else 0


def payload(body: dict[str, Any], context_id: str) -> dict[str, Any]:
    """What a workflow is sent for a request, beside what every call carries."""
    found: dict[str, Any] = {**body["input"], "context_id": context_id}
    if rows_cut(body):
        found["csvData"] = found["csvData"][:MOST_ROWS]
    if body.get("description") is not None:
        found["description"] = body["description"]
    return found


async def accept(
    conn: AsyncConnection,
    settings: Settings,
    caller: Caller,
    workflow_id: str,
    body: dict[str, Any],
    idempotency_key: str | None,
) -> Row[Any]:
    """Stores a request, to be started as soon as a worker is free, in the caller's transaction; returns its execution.

    With a key that was used before, that one. Raises as `store` does.
    """
    execution_id = uuid4()
    context_id = body.get("contextId") or f"execution:{execution_id}"
    execution = NewExecution(
        execution_id, workflow_id, context_id, None, body.get("description"), body, idempotency_key, at_once=False
    )
    stored = await store(conn, settings, caller, execution)
    if not isinstance(stored, Workflow):
        return stored
    await enqueue(conn, [Job(START, str(execution_id))])
    query: Select[Any] = select(*COLUMNS).where(executions.c.id == execution_id)
    accepted: Row[Any] = (await conn.execute(query)).one()
    return accepted


class _Begun(NamedTuple):
    """An execution that is this worker's."""

    execution: Row[Any]
    workflow: Workflow | str
    """What is to be started, or why it cannot be."""
    until: datetime | None
    """When it counts as this worker's no longer."""


class Launcher:
    """Places the calls of executions that were accepted, each of them once."""

    def __init__(self, settings: Settings, db: AsyncEngine, happyrobot: HappyRobot, intake: Intake) -> None:
        self._settings = settings
        self._db = db
        self._happyrobot = happyrobot
        self._intake = intake

    async def start(self, subject: str) -> float | None:
        """Starts an execution, unless somebody has begun to: then its call may be placed.

        Seconds until it is to be looked at again where it is not for this worker.
        """
        found = await self._begin(UUID(subject))
        if not isinstance(found, _Begun):
            return found
        execution, workflow = found.execution, found.workflow
        if not isinstance(workflow, Workflow):
            await self._intake.take(Unconfirmed(execution.id, ExecutionStatus.FAILED, workflow))
            return None
        name = workflow.name or DEFAULT_NAME
        runs = NewRuns(execution.id, workflow.id, execution.context_id, name, execution.description, ())
        body = payload(execution.input, execution.context_id)
        try:
            await place(
                self._happyrobot, self._intake, self._settings, workflow, runs, body, patience=_PATIENCE, can_wait=True
            )
        except TriggerFailed:
            pass  # it is written down, or is found by the sweep; whoever asks is told
        except PutOff as error:
            log.info("execution is left to another worker", execution_id=execution.id, error=error)
            await self._give_back(execution.id, found.until)
            return 0.0
        return None

    async def _begin(self, execution_id: UUID) -> "_Begun | float | None":
        """Makes an execution this worker's; or else when to come back, if at all."""
        until: datetime | None = None
        try:
            async with self._db.begin() as conn:
                execution = await _waiting(conn, execution_id)
                if execution is None:
                    return None
                if self._is_for_others(execution):
                    log.error("HAPPYROBOT_WEBHOOK_URL is not set for this worker", execution_id=execution.id)
                    return _FOR_OTHERS
                workflow = await self._workflow(conn, execution)
                if isinstance(workflow, Workflow):
                    claim = update(executions).where(executions.c.id == execution.id)
                    claim = claim.values(answer_by=answer_by(self._settings))
                    until = await conn.scalar(claim.returning(executions.c.answer_by))
        except (SQLAlchemyError, OSError):
            if until is not None:
                # It may be committed all the same, and nobody was called.
                await self._give_back(execution_id, until)
            raise
        return _Begun(execution, workflow, until)

    async def _give_back(self, execution_id: UUID, until: datetime | None) -> None:
        """Lets others begin with an execution whose call this worker has not placed; waits for PostgreSQL."""
        mine = and_(
            executions.c.id == execution_id,
            executions.c.status == ExecutionStatus.PENDING,
            executions.c.answer_by == until,
        )
        while True:
            try:
                async with self._db.begin() as conn:
                    await conn.execute(update(executions).where(mine).values(answer_by=None))
            except (SQLAlchemyError, OSError) as error:
                if not will_pass(error):
                    raise
                await asyncio.sleep(_AGAIN_AFTER)
            else:
                return

    def _is_for_others(self, execution: Row[Any]) -> bool:
        """Whether this worker was not told how to start what whoever accepted it could have started."""
        return (
            execution.workflow_id == DEFAULT_WORKFLOW
            and default(self._settings) is None
            and not self._is_late(execution)
        )

    def _is_late(self, execution: Row[Any]) -> bool:
        return bool(execution.waited > max(self._settings.stale_after, _LATE))

    async def _workflow(self, conn: AsyncConnection, execution: Row[Any]) -> Workflow | str:
        """What is to be started, or why it cannot be."""
        if self._is_late(execution):
            return "It could not be started in time"  # nobody wants to be called in the middle of the night
        key = None if execution.key_id is None else await keys.get(conn, execution.key_id)
        if key is not None and not key.active:
            return "The API key was revoked before it was started"
        try:
            workflow = await find(conn, self._settings, execution.workflow_id)
        except (SealBroken, SecretMissing) as error:
            log.error("workflow cannot be started", workflow_id=execution.workflow_id, error=error)  # noqa: TRY400
            workflow = None
        return workflow if workflow is not None and workflow.active else "The workflow cannot be started any more"


async def _waiting(conn: AsyncConnection, execution_id: UUID) -> Row[Any] | None:
    """An execution whose call nobody has begun to place; nobody else begins to until the transaction ends."""
    waited = cast(extract("epoch", func.now() - executions.c.created_at), Float).label("waited")
    query: Select[Any] = select(executions, waited).where(
        executions.c.id == execution_id,
        executions.c.status == ExecutionStatus.PENDING,
        executions.c.answer_by.is_(None),
    )
    found: Row[Any] | None = (await conn.execute(query.with_for_update())).one_or_none()
    return found
