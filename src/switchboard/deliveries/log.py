"""What was sent to whom, and sending it again."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import ARRAY, Row, Select, Uuid, func, literal, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.jobs import DELIVER, Job, enqueue
from switchboard.sight import EVERYTHING, Sight
from switchboard.tables import DeliveryStatus, WebhookEvent, api_keys, deliveries, delivery_attempts, executions

SHOWN = 20
"""Attempts of a delivery that are listed, and kept: the last ones."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which deliveries somebody wants to see; None narrows nothing."""

    key_id: UUID | None = None
    status: DeliveryStatus | None = None
    execution_id: UUID | None = None
    sight: Sight = EVERYTHING


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery and the last attempts to send it, the newest one last."""

    id: UUID
    number: int
    key_id: UUID
    key_name: str
    execution_id: UUID
    event: WebhookEvent
    status: DeliveryStatus
    created_at: datetime
    next_attempt_at: datetime | None
    """When it is sent next; None for one that is done with."""
    attempts: Sequence[Row[Any]]


async def listed(conn: AsyncConnection, wanted: Wanted, *, limit: int, before: int | None = None) -> Sequence[Delivery]:
    """Deliveries, newest first; `before` is the number of the last one of the page before."""
    # Without the bodies, which may be large.
    query = (
        select(*(column for column in deliveries.c if column is not deliveries.c.body), api_keys.c.name)
        .join(api_keys, api_keys.c.id == deliveries.c.key_id)
        .order_by(deliveries.c.number.desc())
        .limit(limit)
    )
    for column, value in (
        (deliveries.c.key_id, wanted.key_id),
        (deliveries.c.status, wanted.status),
        (deliveries.c.execution_id, wanted.execution_id),
    ):
        if value is not None:
            query = query.where(column == value)
    if before is not None:
        query = query.where(deliveries.c.number < before)
    query = _seen(query, wanted.sight)
    rows = (await conn.execute(query)).all()
    attempts = await _attempts(conn, [row.id for row in rows])
    return [
        Delivery(
            row.id,
            row.number,
            row.key_id,
            row.name,
            row.execution_id,
            WebhookEvent(row.event),
            DeliveryStatus(row.status),
            row.created_at,
            row.due_at if row.status == DeliveryStatus.PENDING else None,
            attempts.get(row.id, []),
        )
        for row in rows
    ]


def _seen(query: Select[Any], sight: Sight) -> Select[Any]:
    """Leaves out deliveries about executions that are not to be seen."""
    if sight == EVERYTHING:
        return query
    query = query.join(executions, executions.c.id == deliveries.c.execution_id)
    return sight.narrow(query, executions.c.context_id, executions.c.workflow_id)


async def _attempts(conn: AsyncConnection, delivery_ids: Sequence[UUID]) -> dict[UUID, list[Row[Any]]]:
    wanted = func.unnest(literal(delivery_ids, ARRAY(Uuid))).table_valued("id").render_derived("wanted")
    last = (
        select(delivery_attempts)
        .where(delivery_attempts.c.delivery_id == wanted.c.id)
        .order_by(delivery_attempts.c.number.desc())
        .limit(SHOWN)
        .lateral("last")
    )
    query = select(last).select_from(wanted.join(last, true())).order_by(last.c.delivery_id, last.c.number)
    found: dict[UUID, list[Row[Any]]] = {}
    for row in await conn.execute(query):
        found.setdefault(row.delivery_id, []).append(row)
    return found


async def send_again(
    conn: AsyncConnection, delivery_id: UUID, sight: Sight = EVERYTHING, *, key_id: UUID | None = None
) -> DeliveryStatus | None:
    """Sends a delivery again, as often as a new one; returns where it stood before, None if there is none of this id.

    One that is still to be sent stays as it is. With `key_id`, another key's does not exist.
    """
    query = select(deliveries.c.status).where(deliveries.c.id == delivery_id).with_for_update(of=deliveries)
    query = _seen(query, sight)
    if key_id is not None:
        query = query.where(deliveries.c.key_id == key_id)
    before = await conn.scalar(query)
    if before is None:
        return None
    if before != DeliveryStatus.PENDING:
        await conn.execute(
            update(deliveries)
            .where(deliveries.c.id == delivery_id)
            .values(status=DeliveryStatus.PENDING, failures=0, due_at=func.now(), claimed_until=None, finished_at=None)
        )
        await enqueue(conn, [Job(DELIVER, str(delivery_id), occasion=uuid4().hex)])
    return DeliveryStatus(before)
