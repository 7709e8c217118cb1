"""`POST /api/webhooks/happyrobot`: what HappyRobot tells us."""

import contextlib
import hmac
from collections.abc import Iterator
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Request
from pydantic import BaseModel, Field

from switchboard import bodies, metrics, tracing
from switchboard.access.limits import CurrentFailures, address_of
from switchboard.errors import NotFound, Unauthorized, described
from switchboard.happyrobot.payloads import CLOUD_EVENT, CallbackIn, read_callback
from switchboard.runs.intake import CurrentIntake
from switchboard.runs.sorting import Duplicate, Held, Outcome
from switchboard.settings import CurrentSettings

router = APIRouter(tags=["callbacks"])


class CallbackOut(BaseModel):
    """The callback is committed."""

    success: Literal[True]
    duplicate: bool = Field(False, description="A copy of it had been taken before; absent otherwise.")


@contextlib.contextmanager
def _not_taken(outcome: str, kind: str = metrics.OTHER) -> Iterator[None]:
    """Counts a callback that fails within the block."""
    try:
        yield
    except Exception:
        metrics.count_callback(kind, outcome)
        raise


async def _from_happyrobot(
    request: Request,
    settings: CurrentSettings,
    failures: CurrentFailures,
    x_api_key: Annotated[str, Header(description="`HAPPYROBOT_CALLBACK_KEY`, if one is set.")] = "",
) -> None:
    expected = settings.callback_key
    if expected is None:
        return
    # Bytes, because compare_digest refuses text beyond ASCII.
    if not hmac.compare_digest(x_api_key.encode(), expected.get_secret_value().encode()):
        with _not_taken("refused"):
            if x_api_key:
                await failures.count(address_of(request))
            raise Unauthorized("Unauthorized")


@router.post(
    "/api/webhooks/happyrobot",
    summary="Take a callback of HappyRobot",
    responses=described(400, 401, 404, 408, 413, 429),
    response_model_exclude_unset=True,
    # The key is checked before a byte of the body is read.
    dependencies=[Depends(_from_happyrobot)],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": bodies.shown(CallbackIn),
                "application/cloudevents+json": {
                    "schema": {"type": "object", "required": ["specversion", "id", "type", "data"]},
                    "example": CLOUD_EVENT,
                },
            },
        }
    },
)
async def receive(
    request: Request,
    intake: CurrentIntake,
    x_webhook_id: Annotated[str | None, Header(description="The same for every copy of a callback.")] = None,
) -> CallbackOut:
    """Appends the event to its run's timeline and moves the run. Answered once that is committed.

    A callback of a run that is not known yet is answered 404 and kept: it is applied when the run becomes known.
    """
    with _not_taken("refused"):
        raw = await bodies.read(request)
        event = read_callback(bodies.parse(raw), raw, x_webhook_id)
    with _not_taken("failed", event.event_type):
        outcome = await intake.take(event)
    metrics.count_callback(event.event_type, _in_a_word(outcome))
    if isinstance(outcome, Held):
        raise NotFound("Run not found")
    tracing.about(run_id=event.run_id)
    if isinstance(outcome, Duplicate):
        return CallbackOut(success=True, duplicate=True)
    return CallbackOut(success=True)


def _in_a_word(outcome: Outcome) -> str:
    match outcome:
        case Held():
            return "held"
        case Duplicate():
            return "duplicate"
        case _:
            return "recorded"
