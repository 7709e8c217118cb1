"""Starting a workflow: write it down, call HappyRobot once, record its runs."""

import asyncio
import contextlib
from dataclasses import replace
from typing import Annotated, Any, Literal
from uuid import UUID, uuid4

import structlog
from fastapi import Header
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from sqlalchemy import Row, and_, func, literal, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from switchboard import tracing
from switchboard.access.callers import Caller
from switchboard.access.quotas import count_one, require_room
from switchboard.bodies import Id, ShortText, Text
from switchboard.errors import (
    BadRequest,
    Conflict,
    ErrorOut,
    Forbidden,
    NotConfigured,
    NotFound,
    TriggerFailed,
    Unprocessable,
    complaint,
)
from switchboard.events import IdOfExecution
from switchboard.executions import COLUMNS
from switchboard.happyrobot.client import HappyRobot, HappyRobotError, PutOff, Unknown
from switchboard.runs.ingest import DEFAULT_NAME
from switchboard.runs.intake import Intake
from switchboard.runs.ledger import Ledger, NewExecution, longest_answer
from switchboard.runs.sorting import NewRuns, Noted, Unconfirmed
from switchboard.sealing import SealBroken, SecretMissing
from switchboard.settings import Settings
from switchboard.tables import ExecutionStatus, agent_runs, executions
from switchboard.workflows import DEFAULT_WORKFLOW, Workflow, default, find

log = structlog.stdlib.get_logger(__name__)

_PATIENCE = 5.0
"""Seconds for which somebody who waits for an answer can wait for runs to be recorded."""

STOPPED = "The service stopped before HappyRobot's answer was known"


class TriggerIn(BaseModel):
    """What starts a workflow. Every further field is passed on to it as it is."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "context_id": "order_123",
                    "name": "Carrier check call",
                    "description": "Asks Blue Mesa Freight whether the pickup stands",
                    "carrier_name": "Blue Mesa Freight",
                    "phone": "+12025550142",
                }
            ]
        },
    )

    context_id: Id = Field(description="Your own id for what the call is about.", examples=["order_123"])
    workflow_id: ShortText | None = Field(
        None, description=f"Which workflow; `{DEFAULT_WORKFLOW}` unless given.", examples=[DEFAULT_WORKFLOW]
    )
    name: ShortText | None = Field(None, description="Shown in lists.", examples=["Carrier check call"])
    description: Text | None = Field(
        None, description="What this run is doing.", examples=["Asks Blue Mesa Freight whether the pickup stands"]
    )


class TriggerOut(BaseModel):
    """The runs that were started."""

    success: bool
    run_ids: list[str] = Field(examples=[["19184e4c-74ca-474a-8978-e77f5a661e4f"]])
    execution_id: IdOfExecution


class UnconfirmedOut(ErrorOut):
    """HappyRobot did not confirm that it started the workflow."""

    execution_id: IdOfExecution
    status: Literal["failed", "submission_unknown"] = Field(
        description="`failed`: nobody was called. `submission_unknown`: somebody may have been; do not send it again, "
        "the run is found when it calls back."
    )
    detail: str = Field(examples=["HappyRobot did not answer (ReadTimeout)"])
    run_ids: list[str] = Field([], description="Runs that are known all the same.")


IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+( +[\x21-\x7e]+)*$",
        description="Your own id for this intent: however often it is sent, somebody is called once.",
        examples=["order_123/confirm-pickup"],
    ),
]
_KEY: TypeAdapter[str | None] = TypeAdapter(IdempotencyKey)


def checked_key(given: str | None) -> str | None:
    """A key as it came with a request. Raises BadRequest for what is none."""
    if given is None:
        return None
    try:
        return _KEY.validate_python(given)
    except ValidationError as error:
        [first] = error.errors(include_url=False, include_input=False)
        raise BadRequest(complaint([first | {"loc": ("idempotency-key",)}])) from error


async def start(
    db: AsyncEngine,
    happyrobot: HappyRobot,
    intake: Intake,
    ledger: Ledger,
    settings: Settings,
    caller: Caller,
    request: TriggerIn,
    body: dict[str, Any],
    idempotency_key: str | None = None,
) -> TriggerOut:
    """Starts a workflow and returns its runs; with a key that was used before, what is known of that execution.

    Raises NotFound for an unknown workflow, Forbidden for a disabled one and for what the caller may not start,
    Unprocessable for a key that was used for something else, Conflict for one whose call is being placed, TriggerFailed
    when HappyRobot did not confirm.
    """
    workflow_id = request.workflow_id or DEFAULT_WORKFLOW
    if not caller.sight.covers(request.context_id, workflow_id):
        raise Forbidden("Not allowed for this context or workflow")
    execution = NewExecution(
        uuid4(), workflow_id, request.context_id, request.name, request.description, body, idempotency_key
    )
    workflow = await _entered(ledger, settings, caller, execution)
    if workflow is None:
        try:
            async with db.begin() as conn:
                stored = await store(conn, settings, caller, execution)
                if not isinstance(stored, Workflow):
                    return await _told_again(conn, stored)
        except (SQLAlchemyError, OSError):
            # It may be committed all the same.
            ledger.take_back(execution.id)
            raise
        workflow = stored
    runs = NewRuns(execution.id, workflow_id, request.context_id, request.name or DEFAULT_NAME, request.description, ())
    run_ids = await place(happyrobot, intake, settings, workflow, runs, body, patience=_PATIENCE)
    return TriggerOut(success=True, run_ids=run_ids, execution_id=execution.id)


async def _entered(ledger: Ledger, settings: Settings, caller: Caller, execution: NewExecution) -> Workflow | None:
    """Stores a request for which nothing has to be looked up: nobody's, without a key, for the settings' workflow.

    None where it is not stored.
    """
    if caller.key is not None or execution.idempotency_key is not None or execution.workflow_id != DEFAULT_WORKFLOW:
        return None
    workflow = default(settings)
    if workflow is None or not await ledger.enter(execution, caller.owner(execution.context_id)):
        return None
    tracing.about(execution_id=execution.id)
    return workflow


async def store(
    conn: AsyncConnection, settings: Settings, caller: Caller, execution: NewExecution
) -> Workflow | Row[Any]:
    """Stores a request, and counts it, in the caller's transaction; returns the workflow that it is to start.

    If its key was used before, nothing is stored, and the execution that it stands for is returned. Raises NotFound for
    an unknown workflow, Forbidden for a disabled one and for one execution too many, Unprocessable for a key that was
    used for something else.
    """
    owner = caller.owner(execution.context_id)
    if (known := await _known(conn, owner, execution)) is not None:
        return known
    workflow = await _workflow(conn, settings, execution.workflow_id)
    if caller.key is not None:
        await require_room(conn, caller.key)
    if not await _write_down(conn, settings, caller, execution):
        # Somebody with the same key was quicker, by less than a commit.
        known = await _known(conn, owner, execution)
        assert known is not None  # noqa: S101  # nothing else is unique, and the insert has waited for it
        return known
    tracing.about(execution_id=execution.id)
    if caller.key is not None:
        # Last: others of this key wait from here until the commit.
        await count_one(conn, caller.key)
    return workflow


async def place(
    happyrobot: HappyRobot,
    intake: Intake,
    settings: Settings,
    workflow: Workflow,
    runs: NewRuns,
    body: dict[str, Any],
    *,
    patience: float,
    can_wait: bool = False,
) -> list[str]:
    """Calls HappyRobot for an execution that is stored, and records the runs that it names; `runs` says whose.

    `patience` is in seconds: for how long the caller can wait for that while PostgreSQL is away; they are recorded all
    the same once it is back. Raises TriggerFailed when they are not yet, and when HappyRobot did not confirm; what is
    known then is written down. Raises PutOff, and writes nothing down, when the
    service stops between two attempts and somebody else `can_wait` for the next.
    """
    # Ours come last, so that nobody can send the callbacks elsewhere.
    payload = {**body, "callback_url": settings.callback_url, "execution_id": str(runs.execution_id)}
    with intake.expecting():
        try:
            run_ids = await happyrobot.trigger(workflow.hook, payload)
        except HappyRobotError as error:
            if can_wait and isinstance(error, PutOff):
                raise
            raise await _unconfirmed(intake, runs.execution_id, error) from error
        except asyncio.CancelledError as error:
            # The service stops, and has waited for as long as it could. The caller is still there to be told.
            raise await _unconfirmed(intake, runs.execution_id, Unknown(STOPPED)) from error
        await _record(intake, replace(runs, run_ids=run_ids), patience)
    return run_ids


async def _workflow(conn: AsyncConnection, settings: Settings, workflow_id: str) -> Workflow:
    try:
        workflow = await find(conn, settings, workflow_id)
    except (SealBroken, SecretMissing) as error:
        log.error("workflow cannot be started", workflow_id=workflow_id, error=error)  # noqa: TRY400  # in its own words
        raise NotConfigured("Workflow cannot be started", detail=str(error)) from error
    if workflow is None:
        raise NotFound("Workflow not found")
    if not workflow.active:
        raise Forbidden("Workflow is inactive")
    return workflow


def answer_by(settings: Settings) -> Any:
    """When whoever begins to place a call now knows what became of it, or is gone; as SQL."""
    return func.now() + longest_answer(settings)


async def _write_down(conn: AsyncConnection, settings: Settings, caller: Caller, execution: NewExecution) -> bool:
    """Stores the execution; False if its key is taken."""
    stored = await conn.execute(
        upsert(executions)
        .values(
            id=execution.id,
            workflow_id=execution.workflow_id,
            context_id=execution.context_id,
            name=execution.name,
            description=execution.description,
            input=execution.body,
            idempotency_key=execution.idempotency_key,
            owner=caller.owner(execution.context_id),
            key_id=caller.key_id,
            answer_by=answer_by(settings) if execution.at_once else None,
        )
        .on_conflict_do_nothing(index_elements=["owner", "idempotency_key"])
    )
    return stored.rowcount == 1


async def _known(conn: AsyncConnection, owner: str, execution: NewExecution) -> Row[Any] | None:
    """The execution that this one's key stands for already."""
    if execution.idempotency_key is None:
        return None
    same = and_(executions.c.input == literal(execution.body, JSONB), executions.c.workflow_id == execution.workflow_id)
    query = select(*COLUMNS, same.label("same")).where(
        executions.c.owner == owner, executions.c.idempotency_key == execution.idempotency_key
    )
    known: Row[Any] | None = (await conn.execute(query)).one_or_none()
    if known is not None and not known.same:
        raise Unprocessable("This Idempotency-Key was used with another body")
    return known


async def _told_again(conn: AsyncConnection, execution: Row[Any]) -> TriggerOut:
    if execution.status == ExecutionStatus.PENDING:
        raise Conflict(
            "A request with this Idempotency-Key is in progress",
            execution_id=str(execution.id),
            status=ExecutionStatus.PENDING,
        )
    query = select(agent_runs.c.run_id).where(agent_runs.c.execution_id == execution.id).order_by(agent_runs.c.id)
    if run_ids := list(await conn.scalars(query)):
        return TriggerOut(success=True, run_ids=run_ids, execution_id=execution.id)
    raise _failed(execution.id, ExecutionStatus(execution.status), execution.error or "")


async def _record(intake: Intake, runs: NewRuns, patience: float) -> None:
    # The call is placed. Whatever happens now, nobody may be told to try again.
    recording = intake.insist(runs)
    try:
        async with asyncio.timeout(patience):
            await asyncio.shield(recording)
    except (SQLAlchemyError, OSError, asyncio.CancelledError) as error:
        detail = "HappyRobot started it, but its runs could not be recorded"
        unknown = ExecutionStatus.SUBMISSION_UNKNOWN
        raise _failed(runs.execution_id, unknown, detail, run_ids=list(runs.run_ids)) from error


async def _unconfirmed(intake: Intake, execution_id: UUID, error: HappyRobotError) -> TriggerFailed:
    """Writes down that HappyRobot named no runs, and what the caller is told."""
    status = ExecutionStatus.SUBMISSION_UNKNOWN if isinstance(error, Unknown) else ExecutionStatus.FAILED
    log.warning("execution unconfirmed", execution_id=execution_id, status=status, error=error)
    found: dict[str, Any] = {}
    # The caller learns of it even if it cannot be written down now.
    noting = intake.insist(Unconfirmed(execution_id, status, str(error)))
    with contextlib.suppress(SQLAlchemyError, OSError, asyncio.CancelledError):
        async with asyncio.timeout(_PATIENCE):
            noted = await asyncio.shield(noting)
        if isinstance(noted, Noted) and noted.run_ids:
            found["run_ids"] = list(noted.run_ids)
    return _failed(execution_id, status, str(error), **found)


def _failed(execution_id: UUID, status: ExecutionStatus, detail: str, **more: Any) -> TriggerFailed:
    return TriggerFailed(
        "Failed to trigger workflow", execution_id=str(execution_id), status=status, detail=detail, **more
    )
