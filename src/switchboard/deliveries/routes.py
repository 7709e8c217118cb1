"""`/api/happyrobot/deliveries*`: webhooks to customers, for whoever looks after the installation."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.access.callers import Operator
from switchboard.database import Db
from switchboard.deliveries import log
from switchboard.errors import Conflict, NotFound, described
from switchboard.events import IdOfExecution, Timestamp
from switchboard.pages import link_next
from switchboard.sight import Sight
from switchboard.tables import DeliveryStatus, WebhookEvent

router = APIRouter(prefix="/api/happyrobot", tags=["deliveries"])


class LoggedAttempt(BaseModel):
    """One attempt to send a webhook."""

    model_config = ConfigDict(from_attributes=True)

    number: int = Field(description="The first is 1.", examples=[1])
    started_at: Timestamp
    duration_ms: int = Field(description="Milliseconds.", examples=[184])
    status_code: int | None = Field(description="Of the answer, if there was one.", examples=[500])
    response: str | None = Field(description="The first 1,000 bytes of it.", examples=["Internal Server Error"])
    error: str | None = Field(description="Why it failed; null where it was delivered.", examples=["answered 500"])


IdOfDelivery = Annotated[UUID, Field(examples=["0d5b4a52-2f9e-4c1f-9a63-7b7f0f6f3b21"])]


class LoggedDelivery(BaseModel):
    """A webhook, and what became of it."""

    model_config = ConfigDict(from_attributes=True)

    id: IdOfDelivery = Field(description="The `webhook-id` of each attempt.")
    event: WebhookEvent
    execution_id: IdOfExecution
    status: DeliveryStatus
    created_at: Timestamp
    next_attempt_at: Timestamp | None
    attempts: list[LoggedAttempt] = Field(description=f"The last {log.SHOWN}, the newest one last.")


class DeliveryToSomebody(LoggedDelivery):
    """A webhook, whom it tells, and what became of it."""

    key_id: UUID = Field(
        description="The API key whose owner is told.", examples=["c2a7d9e0-5b14-4f63-8e0a-1d9b7c3f4a25"]
    )
    key_name: str = Field(description="What that key is called.", examples=["Carrier portal"])


class RedeliveryOut(BaseModel):
    """It is sent again."""

    success: Literal[True]
    id: IdOfDelivery
    status: Literal["pending"]


Before = Annotated[int | None, Query(ge=1, lt=2**63, description='From the `Link` header with `rel="next"`.')]
Limit = Annotated[int, Query(ge=1, le=200, description="So many at most.")]
DeliveryId = Annotated[str, Path(alias="id", description="The webhook that is meant.")]


@router.get("/deliveries", summary="List webhooks to customers, newest first", responses=described(400, 401, 403, 429))
async def list_deliveries(
    request: Request,
    response: Response,
    db: Db,
    caller: Operator,
    status: Annotated[DeliveryStatus | None, Query(description="Only those that stand so.")] = None,
    execution_id: Annotated[UUID | None, Query(description="Only those about this execution.")] = None,
    key_id: Annotated[UUID | None, Query(description="Only those of this API key.")] = None,
    limit: Limit = 50,
    before: Before = None,
) -> list[DeliveryToSomebody]:
    """What was sent to whom, with each attempt, but for what it said. `Link` leads to older ones."""
    wanted = log.Wanted(key_id, status, execution_id, caller.sight)
    async with db.connect() as conn:
        found = await log.listed(conn, wanted, limit=limit + 1, before=before)
    if len(found) > limit:
        link_next(request, response, before=found[limit - 1].number)
    return [DeliveryToSomebody.model_validate(delivery) for delivery in found[:limit]]


@router.post(
    "/deliveries/{id}/redeliver",
    summary="Send a webhook again",
    status_code=202,
    responses=described(400, 401, 403, 404, 409, 429),
)
async def redeliver(db: Db, caller: Operator, delivery_id: DeliveryId) -> RedeliveryOut:
    """Sends the same bytes under the same id once more, and tries as often as for a new one."""
    async with db.begin() as conn:
        sent_again = await send_again(conn, delivery_id, caller.sight)
    return RedeliveryOut(success=True, id=sent_again, status="pending")


async def send_again(conn: AsyncConnection, delivery_id: str, sight: Sight, key_id: UUID | None = None) -> UUID:
    """Sends a delivery again. Raises NotFound, also for one that is not to be seen, and Conflict for one under way."""
    try:
        which = UUID(delivery_id)
    except ValueError:
        raise NotFound("Delivery not found") from None
    before = await log.send_again(conn, which, sight, key_id=key_id)
    if before is None:
        raise NotFound("Delivery not found")
    if before is DeliveryStatus.PENDING:
        raise Conflict("Delivery is already on its way")
    return which
