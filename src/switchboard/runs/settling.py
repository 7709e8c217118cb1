"""What becomes of executions in a turn of the one writer, and who is told."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, Row, Select, String, Text, Uuid, any_, case, cast, func, literal, null, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.deliveries.outbox import Report, complete, post
from switchboard.executions import COLUMNS
from switchboard.jobs import CANCEL, Job
from switchboard.runs import approvals
from switchboard.runs.status import Standing, execution_status
from switchboard.tables import ApprovalStatus, ExecutionStatus, RunStatus, WebhookEvent, agent_runs, executions

_OVER = {
    ExecutionStatus.COMPLETED: WebhookEvent.COMPLETED,
    ExecutionStatus.FAILED: WebhookEvent.FAILED,
    ExecutionStatus.CANCELLED: WebhookEvent.CANCELLED,
}
"""The statuses of an execution that is over, and how that is told."""

_NOT_BEGUN = frozenset({ExecutionStatus.PENDING, ExecutionStatus.SUBMISSION_UNKNOWN, ExecutionStatus.FAILED})
"""Those that an execution can have of which HappyRobot has named no run."""

_TO_STOP = 5.0
"""Seconds that a run gets which is told of a rejection before it is stopped: it may have something to put in order."""


@dataclass(slots=True)
class _Execution:
    """An execution as the database has it, and what its runs make of it."""

    row: Row[Any]
    approval: ApprovalStatus | None
    runs: dict[str, Standing] = field(default_factory=dict)

    @property
    def status(self) -> ExecutionStatus:
        return execution_status((run.status for run in self.runs.values()), self.approval)

    @property
    def begins(self) -> bool:
        return self.row.began_at is None and self.row.status in _NOT_BEGUN

    @property
    def changed(self) -> bool:
        return self.begins or (self.status, self.approval) != (self.row.status, self.row.approval_status)


async def settle(conn: AsyncConnection, execution_ids: Collection[UUID], asked: Sequence[Row[Any]] = ()) -> list[Job]:
    """Sets executions to what their runs and decisions make of them, and posts what their owners are to know.

    `asked` are their requests for approval that are new. Returns what is to be done for it.
    """
    if not execution_ids:
        return []
    found = await _load(conn, execution_ids)
    asking = {approval.execution_id for approval in asked}
    changed = [each for each in found if each.changed or each.row.id in asking]
    rows = await _change(conn, changed)
    reports: list[Report] = []
    for each in changed:
        now, status = rows[each.row.id], each.status
        if each.begins:
            reports.append(Report(now, WebhookEvent.STARTED))
        reports += [Report(now, WebhookEvent.PENDING_APPROVAL, it) for it in asked if it.execution_id == now.id]
        if status in _OVER and status != each.row.status:
            reports.append(Report(now, _OVER[status]))
    # What was reported without its result may have got it.
    await complete(conn, [each.row for each in found if each.status in _OVER and each.status == each.row.status])
    return [*await post(conn, reports), *await _stop_rejected(conn, found)]


async def failed(conn: AsyncConnection, ended: Sequence[Row[Any]]) -> list[Job]:
    """Posts that executions have failed which HappyRobot never began."""
    return await post(conn, [Report(execution, WebhookEvent.FAILED) for execution in ended])


async def _load(conn: AsyncConnection, execution_ids: Collection[UUID]) -> list[_Execution]:
    ids = literal(list(execution_ids), ARRAY(Uuid))
    decided = await approvals.statuses_of(conn, execution_ids)
    query: Select[Any] = select(*COLUMNS, executions.c.began_at).where(executions.c.id == any_(ids))
    rows = await conn.execute(query)
    found = {row.id: _Execution(row, decided.get(row.id)) for row in rows}
    runs = select(agent_runs.c.execution_id, agent_runs.c.run_id, agent_runs.c.status, agent_runs.c.timed_out)
    for run in await conn.execute(runs.where(agent_runs.c.execution_id == any_(ids))):
        if run.execution_id in found:
            found[run.execution_id].runs[run.run_id] = Standing(RunStatus(run.status), run.timed_out)
    return [each for each in found.values() if each.runs]


async def _change(conn: AsyncConnection, changed: Sequence[_Execution]) -> Mapping[UUID, Row[Any]]:
    if not changed:
        return {}
    new = (
        func.unnest(
            literal([each.row.id for each in changed], ARRAY(Uuid)),
            literal([str(each.status) for each in changed], ARRAY(String)),
            literal([each.approval for each in changed], ARRAY(String)),
        )
        .table_valued("id", "status", "approval_status")
        .render_derived("new")
    )
    now = func.statement_timestamp()  # the same wherever it stands, and after those of the turns before
    over = cast(new.c.status, Text).in_(list(_OVER))
    same = executions.c.status == new.c.status
    rows = await conn.execute(
        update(executions)
        .where(executions.c.id == new.c.id)
        .values(
            status=new.c.status,
            approval_status=new.c.approval_status,
            error=null(),  # that HappyRobot did not answer is no longer so
            began_at=func.coalesce(executions.c.began_at, now),
            updated_at=now,
            # An execution that was over is so since then.
            completed_at=case((over & same, executions.c.completed_at), (over, now)),
        )
        .returning(*COLUMNS)
    )
    return {row.id: row for row in rows}


async def _stop_rejected(conn: AsyncConnection, found: Sequence[_Execution]) -> list[Job]:
    """Stops the runs of what was rejected, also those that join it later or that only we hold for dead."""
    rejected = [each for each in found if each.approval is ApprovalStatus.REJECTED]
    if not rejected:
        return []
    told = await approvals.rejected_runs(conn, [each.row.id for each in rejected])
    return [
        Job(CANCEL, run_id, _TO_STOP if run_id in told else 0.0)
        for each in rejected
        for run_id, run in each.runs.items()
        if not run.settled
    ]
