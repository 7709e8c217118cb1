"""Starting a workflow: write it down, call HappyRobot once, record its runs."""

import logging
from typing import Any
from uuid import UUID, uuid4

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import func, insert, update
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.bodies import Id, ShortText, Text
from switchboard.errors import NotFound, TriggerFailed
from switchboard.happyrobot.client import HappyRobot, HappyRobotError, Hook, Unknown
from switchboard.live.announcer import Announcer
from switchboard.runs.ingest import NewRuns, register
from switchboard.settings import Settings
from switchboard.tables import ExecutionStatus, executions

log = logging.getLogger(__name__)

DEFAULT_WORKFLOW = "default"
_DEFAULT_NAME = "HappyRobot Run"  # the guide's


class TriggerIn(BaseModel):
    """What starts a workflow. Every further field is passed on to it as it is."""

    model_config = ConfigDict(extra="allow", strict=True)

    context_id: Id = Field(description="Your own id for what the call is about.", examples=["order_123"])
    workflow_id: Id | None = Field(None, description=f"Which workflow; `{DEFAULT_WORKFLOW}` unless given.")
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
    announcer: Announcer,
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
        status = await _note_failure(db, execution_id, error)
        raise TriggerFailed(
            "Failed to trigger workflow", execution_id=str(execution_id), status=status, detail=str(error)
        ) from error
    async with db.begin() as conn:
        events = await register(
            conn,
            NewRuns(
                execution_id,
                workflow_id,
                request.context_id,
                request.name or _DEFAULT_NAME,
                request.description,
                run_ids,
            ),
        )
    announcer.announce(events)
    return TriggerOut(success=True, run_ids=run_ids, execution_id=execution_id)


def _hook(settings: Settings, workflow_id: str) -> Hook:
    if workflow_id != DEFAULT_WORKFLOW or settings.happyrobot_webhook_url is None:
        raise NotFound("Workflow not found")
    return Hook(settings.happyrobot_webhook_url, settings.happyrobot_x_api_key)


async def _note_failure(db: AsyncEngine, execution_id: UUID, error: HappyRobotError) -> ExecutionStatus:
    status = ExecutionStatus.SUBMISSION_UNKNOWN if isinstance(error, Unknown) else ExecutionStatus.FAILED
    log.warning("execution %s is %s: %s", execution_id, status, error)
    async with db.begin() as conn:
        await conn.execute(
            update(executions)
            .where(executions.c.id == execution_id)
            .values(
                status=status,
                error=str(error),
                updated_at=func.now(),
                completed_at=func.now() if status is ExecutionStatus.FAILED else None,
            )
        )
    return status
