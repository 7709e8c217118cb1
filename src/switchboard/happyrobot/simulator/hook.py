"""What arrives at a hook, what it asks for, and how it is answered."""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from switchboard.happyrobot.simulator.bodies import headers_of_interest, masked
from switchboard.happyrobot.simulator.faults import Faults
from switchboard.happyrobot.simulator.story import Approval, Outcome

HOOKS = {
    "/hooks/{slug}": "production",
    "/hooks/staging/{slug}": "staging",
    "/hooks/development/{slug}": "development",
    "/webhook/{slug}": "production",  # as older instructions write it
}
MOST_RUNS = 100


@dataclass(slots=True)
class Call:
    """One request to a hook, accepted or refused."""

    slug: str
    environment: str
    headers: dict[str, str]
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    payload: dict[str, Any] | None = None  # None: no JSON object, or not read because the key was wrong
    run_ids: list[str] = field(default_factory=list)
    status: int | None = None  # None: not answered, or not in full

    @classmethod
    def of(cls, request: Request, environment: str) -> "Call":
        return cls(request.path_params["slug"], environment, headers_of_interest(request))

    def shown(self) -> dict[str, Any]:
        return asdict(self) | {"at": self.at.isoformat(), "headers": masked(self.headers)}


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a payload's own `simulate` asks for; whatever it leaves out is as the simulator is set."""

    runs: int
    outcome: Outcome
    faults: Faults
    cloud_events: bool
    approval: Approval | None

    @classmethod
    def of(cls, payload: dict[str, Any], usual: Faults, cloud_events: bool, approval: bool) -> "Wishes":
        given = payload.get("simulate", {})
        if not isinstance(given, dict):
            raise HTTPException(400, "simulate must be an object")
        try:
            faults = Faults.read(given["faults"]) if "faults" in given else usual
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        runs = given.get("runs", 1)
        if type(runs) is not int or not 1 <= runs <= MOST_RUNS:
            raise HTTPException(400, f"simulate.runs must be a number from 1 to {MOST_RUNS}")
        outcome = given.get("outcome", "failed" if faults.fail else "completed")
        if outcome not in ("completed", "failed", "canceled"):
            raise HTTPException(400, "simulate.outcome must be completed, failed or canceled")
        cloud_events = given.get("cloud_events", cloud_events)
        if not isinstance(cloud_events, bool):
            raise HTTPException(400, "simulate.cloud_events must be true or false")
        return cls(runs, outcome, faults, cloud_events, _approval(given.get("approval", approval)))


def _approval(given: object) -> Approval | None:
    match given:
        case False:
            return None
        case True:
            return Approval()
        case {"require_comment": bool(required), **rest} if not rest:
            return Approval(require_comment=required)
        case _:
            raise HTTPException(400, "simulate.approval must be true, false or an object with require_comment")


def queued(faults: Faults, run_ids: list[str], afterwards: BackgroundTask) -> Response:
    """The answer to a trigger whose runs exist, well-formed or not."""
    if faults.answer == "garbage":
        return PlainTextResponse("<html>queued", background=afterwards)
    if faults.answer == "empty":
        return Response(background=afterwards)
    status = f"queued {len(run_ids)} parallel sequences, 0 failed"
    return JSONResponse({"queued_run_ids": run_ids, "status": status}, background=afterwards)


class Broken(Response):
    """An answer that begins, and whose connection then breaks."""

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"100")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        # A server closes the connection on this; a client wired straight to the app sees this very error.
        raise httpx.ReadError("the simulator broke the connection")
