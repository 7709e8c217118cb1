"""Starting a workflow: write it down, call HappyRobot once, record its runs."""

import asyncio
import contextlib
import logging
from typing import Any
from uuid import UUID, uuid4

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import func, insert, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.bodies import Id, ShortText, Text
from switchboard.errors import NotFound, TriggerFailed
from switchboard.happyrobot.client import HappyRobot, HappyRobotError, Hook, Unknown
from switchboard.runs.intake import Intake
from switchboard.runs.sorting import NewRuns
from switchboard.settings import Settings
from switchboard.tables import ExecutionStatus, executions

log = logging.getLogger(__name__)

DEFAULT_WORKFLOW = "default"
_PAUSES = (0.2, 1.0, 3.0)
"""Seconds between attempts to record runs that HappyRobot has started."""

_DEFAULT_NAME = "HappyRobot Run"  # the guide's


class TriggerIn(BaseModel):
    """What starts a workflow. Every further field is passed on to it as it is."""

    model_config = ConfigDict(extra="allow", strict=True)

    context_id: Id = Field(description="Your own id for what the call is about.", examples=["order_123"])
    workflow_id: ShortText | None = Field(None, description=f"Which workflow; `{DEFAULT_WORKFLOW}` unless given.")
    name: ShortText | None = Field(None, description="Shown in lists.", examples=["Carrier check call"])
    description: Text | None = Field(None, description="What this run is doing.")


class TriggerOut(BaseModel):
    """The runs that were started."""

    success: bool
    run_ids: list[str] = Field(examples=[["19184e4c-74ca-474a-8978-e77f5a661e4f"]])
    execution_id: UUID


async def start(
    db: AsyncEngine,
    happyrobot: HappyRobot,
    intake: Intake,
    settings: Settings,
    request: TriggerIn,
    body: dict[str, Any],
) -> TriggerOut:
    """Starts a workflow and returns its runs.

    Raises NotFound for an unknown workflow, TriggerFailed when HappyRobot did not confirm; the execution says why.
    """
    workflow_id = request.workflow_id or DEFAULT_WORKFLOW
    hook = _hook(settings, workflow_id)
    execution_id = uuid4()
    async with db.begin() as conn:
        await conn.execute(
            insert(executions).values(
                id=execution_id,
                workflow_id=workflow_id,
                context_id=request.context_id,
                name=request.name,
                description=request.description,
                input=body,
            )
        )
    # Ours come last, so that nobody can send the callbacks elsewhere.
    payload = {**body, "callback_url": settings.callback_url, "execution_id": str(execution_id)}
    try:
        run_ids = await happyrobot.trigger(hook, payload)
    except HappyRobotError as error:
        status = ExecutionStatus.SUBMISSION_UNKNOWN if isinstance(error, Unknown) else ExecutionStatus.FAILED
        log.warning("execution %s is %s: %s", execution_id, status, error)
        # The caller learns of it even if it cannot be written down.
        with contextlib.suppress(SQLAlchemyError, OSError):
            await _note_failure(db, execution_id, status, str(error))
        raise _failed(execution_id, status, str(error)) from error
    name = request.name or _DEFAULT_NAME
    await _record(intake, NewRuns(execution_id, workflow_id, request.context_id, name, request.description, run_ids))
    return TriggerOut(success=True, run_ids=run_ids, execution_id=execution_id)


def _hook(settings: Settings, workflow_id: str) -> Hook:
    if workflow_id != DEFAULT_WORKFLOW or settings.happyrobot_webhook_url is None:
        raise NotFound("Workflow not found")
    return Hook(settings.happyrobot_webhook_url, settings.happyrobot_x_api_key)


async def _record(intake: Intake, runs: NewRuns) -> None:
    # The call is placed. Whatever happens now, nobody may be told to try again.
    for pause in (*_PAUSES, None):
        try:
            await intake.take(runs)
        except (SQLAlchemyError, OSError) as error:
            if pause is None:
                log.exception("execution %s started runs %s; they are not recorded", runs.execution_id, runs.run_ids)
                raise _failed(
                    runs.execution_id,
                    ExecutionStatus.SUBMISSION_UNKNOWN,
                    "HappyRobot started it, but its runs could not be recorded",
                    run_ids=list(runs.run_ids),
                ) from error
            await asyncio.sleep(pause)
        else:
            return


def _failed(execution_id: UUID, status: ExecutionStatus, detail: str, **more: Any) -> TriggerFailed:
    return TriggerFailed(
        "Failed to trigger workflow", execution_id=str(execution_id), status=status, detail=detail, **more
    )


async def _note_failure(db: AsyncEngine, execution_id: UUID, status: ExecutionStatus, error: str) -> None:
    async with db.begin() as conn:
        await conn.execute(
            update(executions)
            .where(executions.c.id == execution_id)
            .values(
                status=status,
                error=error,
                updated_at=func.now(),
                completed_at=func.now() if status is ExecutionStatus.FAILED else None,
            )
        )
