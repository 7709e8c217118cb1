"""What customers are to be told, written with the change that it tells of: both are committed, or neither."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from pydantic_core import to_json
from sqlalchemy import (
    ARRAY,
    Interval,
    Row,
    Uuid,
    any_,
    bindparam,
    func,
    insert,
    literal,
    literal_column,
    select,
    true,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.access import webhooks
from switchboard.events import iso
from switchboard.executions import RunEnd, Told, approval_data, ends_of, lacks_something
from switchboard.jobs import DELIVER, Job, hasten
from switchboard.tables import DeliveryStatus, WebhookEvent, deliveries


@dataclass(frozen=True, slots=True)
class Report:
    """A change of an execution."""

    execution: Row[Any]
    """As it is now, with the columns of `executions.COLUMNS`."""
    event: WebhookEvent
    approval: Row[Any] | None = None
    """What it asks to have approved."""


async def post(conn: AsyncConnection, reports: Sequence[Report]) -> list[Job]:
    """Writes down what the owners of these executions want to know of them; returns the jobs that send it."""
    owned = [report for report in reports if report.execution.key_id is not None]
    events = await webhooks.wanted(conn, {report.execution.key_id for report in owned})
    wanted = [report for report in owned if report.event in events.get(report.execution.key_id, ())]
    ends = await ends_of(conn, {report.execution.id for report in wanted if report.event in _ENDS})
    backlog = await _backlog(conn, {report.execution.key_id for report in wanted})
    rows, jobs = [], []
    for report in wanted:
        runs = ends.get(report.execution.id, [])
        wait = _FOR_A_RESULT if report.event in _ENDS and lacks_something(runs) else 0.0
        row = {
            "id": uuid4(),
            "key_id": report.execution.key_id,
            "execution_id": report.execution.id,
            "event": report.event,
            "body": _body(report, runs),
            "wait": timedelta(seconds=wait),
        }
        rows.append(row)
        jobs.append(Job(DELIVER, str(row["id"]), wait, behind=_FOR_EACH * backlog[report.execution.key_id]))
    if rows:
        rows.sort(key=lambda row: row["key_id"])  # keys' rows are locked in one order
        due_at = func.now() + bindparam("wait", type_=Interval)
        await conn.execute(insert(deliveries).values(due_at=due_at), rows)
    return jobs


async def _backlog(conn: AsyncConnection, key_ids: Collection[UUID]) -> dict[UUID, int]:
    """How many of each key's deliveries are still to be sent: those that follow let other customers' go first."""
    if not key_ids:
        return {}
    key = func.unnest(literal(list(key_ids), ARRAY(Uuid))).table_valued("id").render_derived("key")
    pending = deliveries.c.status == literal_column(f"'{DeliveryStatus.PENDING}'")  # by which its index fits
    some = select(deliveries.c.id).where(deliveries.c.key_id == key.c.id, pending).limit(_MOST).lateral("some")
    query = (
        select(key.c.id, func.count(some.c.id).label("pending"))
        .select_from(key.outerjoin(some, true()))
        .group_by(key.c.id)
    )
    return {row.id: row.pending for row in await conn.execute(query)}


async def complete(conn: AsyncConnection, ended: Sequence[Row[Any]]) -> None:
    """Puts what is known by now into what waits for it; the executions, as they are, were over before."""
    owned = {execution.id: execution for execution in ended if execution.key_id is not None}
    if not owned:
        return
    waiting = await conn.execute(
        select(deliveries.c.id, deliveries.c.execution_id, deliveries.c.event)
        .where(
            deliveries.c.execution_id == any_(literal(list(owned), ARRAY(Uuid))),
            deliveries.c.event.in_(list(_ENDS)),
            deliveries.c.status == DeliveryStatus.PENDING,
            deliveries.c.failures == 0,
            deliveries.c.due_at > func.clock_timestamp(),
        )
        .with_for_update()
    )
    rows = waiting.all()
    ends = await ends_of(conn, {row.execution_id for row in rows})
    for row in rows:
        runs = ends.get(row.execution_id, [])
        if not lacks_something(runs):
            body = _body(Report(owned[row.execution_id], WebhookEvent(row.event)), runs)
            mine = update(deliveries).where(deliveries.c.id == row.id)
            await conn.execute(mine.values(body=body, due_at=func.now()))
            await hasten(conn, DELIVER, [str(row.id)], 0)


_ENDS = frozenset({WebhookEvent.COMPLETED, WebhookEvent.FAILED, WebhookEvent.CANCELLED})

_FOR_EACH, _MOST = 0.1, 1_000
"""Seconds by which a delivery lets others go first for each of its customer's that waits, and how many are counted."""

_FOR_A_RESULT = 5.0
"""Seconds for which the end of an execution is not told when its result is missing: HappyRobot was asked, and its
callback may be on its way."""


def _body(report: Report, runs: Sequence[RunEnd]) -> bytes:
    """The bytes that are sent, in the Public API's shape."""
    told = Told.of(report.execution, runs)
    data: dict[str, Any] = {
        "status": _STATUS.get(report.event, told.status),
        "startedAt": iso(told.started_at),
        "completedAt": None,
    }
    match report.event:
        case event if event in _ENDS:
            data["completedAt"] = None if told.completed_at is None else iso(told.completed_at)
            data["output"] = told.output
            if report.event is WebhookEvent.FAILED:
                data["error"] = told.error
        case WebhookEvent.PENDING_APPROVAL:
            assert report.approval is not None  # noqa: S101  # for the type checker
            data["approvalId"] = str(report.approval.id)
            data["approvalData"] = approval_data(report.approval.data)
    return to_json(
        {
            "event": report.event,
            "executionId": str(told.id),
            "workflowId": told.workflow_id,
            "timestamp": iso(report.execution.updated_at),
            "data": data,
        }
    )


# What more may have happened in the same moment has a report of its own.
_STATUS = {WebhookEvent.STARTED: "running", WebhookEvent.PENDING_APPROVAL: "pending_approval"}
