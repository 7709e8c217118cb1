"""`/api/v1/public/deliveries`: which webhooks were sent, and sending one again."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from switchboard.access.callers import Customer
from switchboard.database import Db
from switchboard.deliveries import log
from switchboard.deliveries.routes import (
    Before,
    DeliveryId,
    IdOfDelivery,
    Limit,
    LoggedAttempt,
    LoggedDelivery,
    send_again,
)
from switchboard.errors import PUBLIC
from switchboard.pages import link_next
from switchboard.public.shapes import Camel, refusals
from switchboard.tables import DeliveryStatus

router = APIRouter(prefix=PUBLIC)


class AttemptOut(Camel, LoggedAttempt):
    """One attempt to send a webhook."""


class DeliveryOut(Camel, LoggedDelivery):
    """A webhook, and what became of it."""

    attempts: list[AttemptOut] = Field(description=f"The last {log.SHOWN}, the newest one last.")  # type: ignore[assignment]  # the same, in camelCase


class SentAgainOut(Camel):
    """It is sent again."""

    delivery_id: IdOfDelivery
    status: Literal["pending"]
    message: str = Field(examples=["Delivery will be sent again"])


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
    limit: Limit = 50,
    before: Before = None,
) -> list[DeliveryOut]:
    """What was sent for your executions, with each attempt. `Link` leads to older ones, if there are any."""
    wanted = log.Wanted(caller.key_id, status, execution_id)
    async with db.connect() as conn:
        found = await log.listed(conn, wanted, limit=limit + 1, before=before)
    if len(found) > limit:
        link_next(request, response, before=found[limit - 1].number)
    return [DeliveryOut.model_validate(delivery) for delivery in found[:limit]]


@router.post(
    "/deliveries/{id}/redeliver", summary="Send a webhook again", status_code=202, responses=refusals(404, 409)
)
async def redeliver(db: Db, caller: Customer, delivery_id: DeliveryId) -> SentAgainOut:
    """Sends the same bytes under the same id once more, and tries as often as for a new one."""
    async with db.begin() as conn:
        which = await send_again(conn, delivery_id, caller.sight, caller.key_id)
    return SentAgainOut(delivery_id=which, status="pending", message="Delivery will be sent again")
