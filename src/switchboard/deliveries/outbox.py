"""What customers are to be told, written with the change that it tells of: both are committed, or neither."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from pydantic_core import to_json
from sqlalchemy import Row, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.access import webhooks
from switchboard.events import iso
from switchboard.executions import RunEnd, Told, approval_data, ends_of
from switchboard.jobs import DELIVER, Job
from switchboard.tables import WebhookEvent, deliveries


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
    wanted = await webhooks.wanted(conn, {report.execution.key_id for report in owned})
    rows = [
        {
            "id": uuid4(),
            "key_id": report.execution.key_id,
            "execution_id": report.execution.id,
            "event": report.event,
            "body": _body(report, await ends_of(conn, report.execution.id)),
        }
        for report in owned
        if report.event in wanted.get(report.execution.key_id, ())
    ]
    if rows:
        await conn.execute(insert(deliveries), rows)
    return [Job(DELIVER, str(row["id"])) for row in rows]


def _body(report: Report, runs: Sequence[RunEnd]) -> bytes:
    """The bytes that are sent, in the Public API's shape."""
    told = Told.of(report.execution, runs)
    data: dict[str, Any] = {
        "status": _STATUS.get(report.event, told.status),
        "startedAt": iso(told.started_at),
        "completedAt": None,
    }
    match report.event:
        case WebhookEvent.COMPLETED | WebhookEvent.FAILED | WebhookEvent.CANCELLED:
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
