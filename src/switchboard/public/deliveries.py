"""`/api/v1/public/deliveries`: which webhooks were sent, and sending one again."""

from typing import Annotated, Literal
from urllib.parse import quote, urlencode
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import Field

from switchboard.access.callers import Customer
from switchboard.database import Db
from switchboard.deliveries import log
from switchboard.errors import PUBLIC, Conflict, NotFound
from switchboard.events import Timestamp
from switchboard.public.shapes import Camel, refusals
from switchboard.tables import DeliveryStatus, WebhookEvent

router = APIRouter(prefix=PUBLIC)


class AttemptOut(Camel):
    """One attempt to send a webhook."""

    number: int
    started_at: Timestamp
    duration_ms: int = Field(description="Milliseconds.")
    status_code: int | None = Field(description="Of the answer, if there was one.")
    response: str | None = Field(description="The first 1,000 bytes of it.")
    error: str | None = Field(description="Why it failed; null where it was delivered.")


class DeliveryOut(Camel):
    """A webhook, and what became of it."""

    id: UUID = Field(description="The `webhook-id` of each attempt.")
    event: WebhookEvent
    execution_id: UUID
    status: DeliveryStatus
    created_at: Timestamp
    next_attempt_at: Timestamp | None
    attempts: list[AttemptOut] = Field(description=f"The last {log.SHOWN}, the newest one last.")


class SentAgainOut(Camel):
    """It is sent again."""

    delivery_id: UUID
    status: Literal["pending"]
    message: str


@router.get("/deliveries", summary="List webhooks, newest first", responses=refusals(400))
async def deliveries(
    request: Request,
    response: Response,
    db: Db,
    caller: Customer,
    status: Annotated[DeliveryStatus | None, Query(description="Only those that stand so.")] = None,
    execution_id: Annotated[
        UUID | None, Query(alias="executionId", description="Only those about this execution.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[
        int | None, Query(ge=1, lt=2**63, description='From the `Link` header with `rel="next"`.')
    ] = None,
) -> list[DeliveryOut]:
    """What was sent for your executions, with each attempt. `Link` leads to older ones, if there are any."""
    wanted = log.Wanted(caller.key_id, status, execution_id)
    async with db.connect() as conn:
        found = await log.listed(conn, wanted, limit=limit + 1, before=before)
    page = found[:limit]
    if len(found) > limit:
        query = urlencode({**request.query_params, "before": page[-1].number})
        response.headers["Link"] = f'<{quote(request.scope["raw_path"], safe="/%")}?{query}>; rel="next"'
    return [_delivery_out(delivery) for delivery in page]


def _delivery_out(delivery: log.Delivery) -> DeliveryOut:
    return DeliveryOut(
        id=delivery.id,
        event=delivery.event,
        execution_id=delivery.execution_id,
        status=delivery.status,
        created_at=delivery.created_at,
        next_attempt_at=delivery.due_at,
        attempts=[AttemptOut.model_validate(attempt, from_attributes=True) for attempt in delivery.attempts],
    )


@router.post(
    "/deliveries/{id}/redeliver", summary="Send a webhook again", status_code=202, responses=refusals(404, 409)
)
async def redeliver(db: Db, caller: Customer, delivery_id: Annotated[str, Path(alias="id")]) -> SentAgainOut:
    """Sends the same bytes under the same id once more, and tries as often as for a new one."""
    try:
        which = UUID(delivery_id)
    except ValueError:
        raise NotFound("Delivery not found") from None
    async with db.begin() as conn:
        before = await log.send_again(conn, which, key_id=caller.key_id)
    if before is None:
        raise NotFound("Delivery not found")
    if before is DeliveryStatus.PENDING:
        raise Conflict("Delivery is already on its way")
    return SentAgainOut(delivery_id=which, status="pending", message="Delivery will be sent again")
