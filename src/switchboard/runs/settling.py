"""What becomes of executions in a turn of the one writer, and who is told."""

from collections.abc import Collection, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, Row, Uuid, any_, case, func, literal, null, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.deliveries.outbox import Report, post
from switchboard.executions import COLUMNS
from switchboard.jobs import Job
from switchboard.runs import approvals
from switchboard.runs.status import execution_status
from switchboard.tables import ExecutionStatus, RunStatus, WebhookEvent, agent_runs, executions

_OVER = {
    ExecutionStatus.COMPLETED: WebhookEvent.COMPLETED,
    ExecutionStatus.FAILED: WebhookEvent.FAILED,
    ExecutionStatus.CANCELLED: WebhookEvent.CANCELLED,
}
"""The statuses of an execution that is over, and how that is told."""


async def settle(conn: AsyncConnection, execution_ids: Collection[UUID], asked: Sequence[Row[Any]] = ()) -> list[Job]:
    """Sets executions to what their runs and decisions make of them, and posts what their owners are to know.

    `asked` are their requests for approval that are new. Returns what is to be done for it.
    """
    if not execution_ids:
        return []
    rows = await conn.execute(
        select(
            executions.c.id,
            executions.c.status,
            executions.c.began_at,
            executions.c.approval_status,
            func.array_agg(agent_runs.c.status).label("statuses"),
        )
        .join(agent_runs, agent_runs.c.execution_id == executions.c.id)
        .where(executions.c.id == any_(literal(list(execution_ids), ARRAY(Uuid))))
        .group_by(executions.c.id)
    )
    decided = await approvals.statuses_of(conn, execution_ids)
    reports: list[Report] = []
    for row in rows:
        requests = [approval for approval in asked if approval.execution_id == row.id]
        approval = decided.get(row.id)
        status = execution_status(map(RunStatus, row.statuses), approval)
        began = row.began_at is None
        if (status, approval, began) == (row.status, row.approval_status, False) and not requests:
            continue
        changed = await conn.execute(
            update(executions)
            .where(executions.c.id == row.id)
            .values(
                status=status,
                approval_status=approval,
                error=null(),  # that HappyRobot did not answer is no longer so
                began_at=func.coalesce(executions.c.began_at, func.now()),
                updated_at=func.now(),
                # An execution that was over stays over since then.
                completed_at=case((executions.c.status == status, executions.c.completed_at), else_=func.now())
                if status in _OVER
                else null(),
            )
            .returning(*COLUMNS)
        )
        execution = changed.one()
        if began:
            reports.append(Report(execution, WebhookEvent.STARTED))
        reports += [Report(execution, WebhookEvent.PENDING_APPROVAL, approval) for approval in requests]
        if status in _OVER and status != row.status:
            reports.append(Report(execution, _OVER[status]))
    return await post(conn, reports)


async def failed(conn: AsyncConnection, ended: Sequence[Row[Any]]) -> list[Job]:
    """Posts that executions have failed which HappyRobot never began."""
    return await post(conn, [Report(execution, WebhookEvent.FAILED) for execution in ended])
