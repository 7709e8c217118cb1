"""Executions as the Public API tells of them: to those who ask, and in webhooks."""

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Self
from uuid import UUID

from pydantic_core import from_json, to_json
from sqlalchemy import ARRAY, ColumnElement, Row, Uuid, any_, literal, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.tables import RUN_METADATA, ApprovalStatus, ExecutionStatus, RunStatus, agent_runs, executions

Word = Literal["pending", "running", "completed", "failed", "cancelled", "pending_approval"]
"""Where an execution stands, in the Public API's words."""

_WORDS: dict[ExecutionStatus, Word] = {
    ExecutionStatus.PENDING: "pending",
    ExecutionStatus.RUNNING: "running",
    ExecutionStatus.PENDING_APPROVAL: "pending_approval",
    ExecutionStatus.COMPLETED: "completed",
    ExecutionStatus.FAILED: "failed",
    ExecutionStatus.CANCELLED: "cancelled",
}

_RUN_WORDS: dict[RunStatus, Word] = {
    RunStatus.PENDING: "pending",
    RunStatus.RUNNING: "running",
    RunStatus.COMPLETED: "completed",
    RunStatus.FAILED: "failed",
    RunStatus.CANCELED: "cancelled",
}


@dataclass(frozen=True, slots=True)
class RunEnd:
    """What became of one run of an execution."""

    run_id: str
    status: RunStatus
    result: Any
    error: Any


@dataclass(frozen=True, slots=True)
class Told:
    """An execution, as whoever asked for it is told."""

    id: UUID
    workflow_id: str
    status: Word
    started_at: datetime
    completed_at: datetime | None
    approval_status: Literal["pending", "approved", "rejected"] | None
    output: Any
    error: str | None

    @classmethod
    def of(cls, execution: Row[Any], runs: Sequence[RunEnd]) -> Self:
        """From a row with the columns of `COLUMNS`, and what became of its runs."""
        status = word(ExecutionStatus(execution.status), given_up=execution.completed_at is not None)
        return cls(
            id=execution.id,
            workflow_id=execution.workflow_id,
            status=status,
            started_at=execution.created_at,
            completed_at=execution.completed_at,
            approval_status=None if execution.approval_status is None else ApprovalStatus(execution.approval_status),  # type: ignore[arg-type]  # never withdrawn
            output=output(runs),
            error=error(execution.error, runs) if status == "failed" else None,
        )


COLUMNS = (
    executions.c.id,
    executions.c.workflow_id,
    executions.c.key_id,
    executions.c.status,
    executions.c.created_at,
    executions.c.updated_at,
    executions.c.completed_at,
    executions.c.approval_status,
    executions.c.error,
)
"""What `Told.of` needs of an execution."""


def word(status: ExecutionStatus, *, given_up: bool) -> Word:
    """Where an execution stands; `given_up` says of one that HappyRobot never confirmed that nobody waits any more."""
    if status is ExecutionStatus.SUBMISSION_UNKNOWN:
        return "failed" if given_up else "pending"
    return _WORDS[status]


def output(runs: Sequence[RunEnd]) -> Any:
    """What HappyRobot reported: the result of the one run, or a list where there are more."""
    if len(runs) == 1:
        return runs[0].result
    if not runs:
        return None
    return {
        "runs": [
            {"runId": run.run_id, "status": _RUN_WORDS[run.status], "result": run.result, "error": _text(run.error)}
            for run in runs
        ]
    }


def lacks_something(runs: Sequence[RunEnd]) -> bool:
    """Whether HappyRobot may have more to say about a run that is over: its result, or why it failed."""
    return any(
        (run.status is RunStatus.COMPLETED and run.result is None)
        or (run.status is RunStatus.FAILED and run.error is None)
        for run in runs
    )


def error(own: str | None, runs: Sequence[RunEnd]) -> str:
    """Why an execution failed, in a sentence."""
    failed = next((run for run in runs if run.status is RunStatus.FAILED), None)
    return own or (failed and _text(failed.error)) or "The call failed"


def _text(error: Any) -> str | None:
    """What stands in a run's error, which is anything that a workflow's author has thought of."""
    if error is None or isinstance(error, str):
        return error
    if isinstance(error, dict):
        for name in ("error", "message", "reason"):
            if isinstance(error.get(name), str):
                return str(error[name])
    return to_json(error).decode()


_APPROVAL_SHAPE: dict[str, type] = {"rows": list, "metadata": dict, "displayFields": list}


def approval_data(data: Any) -> dict[str, Any]:
    """What is to be decided about, with all that a page which shows it relies on, whatever the workflow has sent."""
    if isinstance(data, str):
        with contextlib.suppress(ValueError):
            data = from_json(data)
    found: dict[str, Any] = dict(data) if isinstance(data, dict) else {"rows": data}
    for name, shape in _APPROVAL_SHAPE.items():
        if not isinstance(found.get(name), shape):
            found[name] = shape()
    return found


def requires_comment(data: Any) -> bool:
    """Whether a decision needs a comment; authors write it as a boolean, or as a text that their tool makes of one."""
    return approval_data(data)["metadata"].get("requireComment") in (True, 1, "true", "True", "1")


async def ends_of(conn: AsyncConnection, execution_ids: Collection[UUID]) -> dict[UUID, list[RunEnd]]:
    """What became of the runs of executions, in HappyRobot's order."""
    if not execution_ids:
        return {}
    query = (
        select(
            agent_runs.c.execution_id,
            agent_runs.c.run_id,
            agent_runs.c.status,
            _metadata("result"),
            _metadata("error"),
        )
        .where(agent_runs.c.execution_id == any_(literal(list(execution_ids), ARRAY(Uuid))))
        .order_by(agent_runs.c.id)
    )
    found: dict[UUID, list[RunEnd]] = {}
    for row in await conn.execute(query):
        end = RunEnd(row.run_id, RunStatus(row.status), row.result, row.error)
        found.setdefault(row.execution_id, []).append(end)
    return found


def _metadata(name: str) -> ColumnElement[Any]:
    return RUN_METADATA.op("->", return_type=JSONB())(name).label(name)
