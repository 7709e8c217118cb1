"""`POST /api/webhooks/happyrobot`: what HappyRobot tells us."""

import hmac
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from switchboard import bodies, metrics, tracing
from switchboard.access.limits import Failures, address_of
from switchboard.direct import direct
from switchboard.errors import NotFound, Unauthorized, described
from switchboard.happyrobot.payloads import CLOUD_EVENT, CallbackIn, read_callback
from switchboard.runs.intake import Intake
from switchboard.runs.sorting import Duplicate, Held, Outcome
from switchboard.settings import Settings

router = APIRouter(tags=["callbacks"])


class CallbackOut(BaseModel):
    """The callback is committed."""

    success: Literal[True]
    duplicate: bool = Field(False, description="A copy of it had been taken before; absent otherwise.")


async def _check_key(request: Request) -> None:
    settings: Settings = request.state.settings
    expected = settings.callback_key
    if expected is None:
        return
    given = request.headers.get("x-api-key", "")
    # Bytes, because compare_digest refuses text beyond ASCII.
    if not hmac.compare_digest(given.encode(), expected.get_secret_value().encode()):
        if given:
            failures: Failures = request.state.failures
            await failures.count(address_of(request))
        raise Unauthorized("Unauthorized")


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": description}


# Most of all requests are callbacks.
@direct(
    router,
    "POST",
    "/api/webhooks/happyrobot",
    summary="Take a callback of HappyRobot",
    response_model=CallbackOut,
    responses=described(400, 401, 404, 408, 413, 429),
    openapi_extra={
        "parameters": [
            _header("X-API-KEY", "`HAPPYROBOT_CALLBACK_KEY`, if one is set."),
            _header("X-Webhook-Id", "The same for every copy of a callback."),
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": bodies.shown(CallbackIn),
                "application/cloudevents+json": {
                    "schema": {"type": "object", "required": ["specversion", "id", "type", "data"]},
                    "example": CLOUD_EVENT,
                },
            },
        },
    },
)
async def receive(request: Request) -> Response:
    """Appends the event to its run's timeline and moves the run. Answered once that is committed.

    A callback of a run that is not known yet is answered 404 and kept: it is applied when the run becomes known.
    """
    intake: Intake = request.state.intake
    kind, becomes = metrics.OTHER, "refused"
    try:
        # The key is checked before a byte of the body is read.
        await _check_key(request)
        raw = await bodies.read(request)
        event = read_callback(bodies.parse(raw), raw, request.headers.get("x-webhook-id"))
        kind, becomes = event.event_type, "failed"
        outcome = await intake.take(event, len(raw))
        becomes = _in_a_word(outcome)
    finally:
        metrics.count_callback(kind, becomes)
    if isinstance(outcome, Held):
        raise NotFound("Run not found")
    tracing.about(run_id=event.run_id)
    return _DUPLICATE if isinstance(outcome, Duplicate) else _TAKEN


_TAKEN = JSONResponse({"success": True})
_DUPLICATE = JSONResponse({"success": True, "duplicate": True})


def _in_a_word(outcome: Outcome) -> str:
    match outcome:
        case Held():
            return "held"
        case Duplicate():
            return "duplicate"
        case _:
            return "recorded"
