"""`/api/happyrobot/*`: what a frontend wants from HappyRobot."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, Field
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import HTTPConnection, Request

from switchboard.access.callers import Caller, Reader, Starter, caller_of, reader, starter
from switchboard.bodies import Id, body_of, check, parse, read
from switchboard.database import Db, singly
from switchboard.direct import direct
from switchboard.errors import described
from switchboard.events import IdOfRun, Timestamp, iso
from switchboard.happyrobot.client import POLL, CurrentHappyRobot
from switchboard.happyrobot.lookups import Lookups
from switchboard.happyrobot.records import Recording
from switchboard.runs.cancel import Canceler
from switchboard.runs.details import DetailsOut, details, recordings
from switchboard.runs.intake import CurrentIntake
from switchboard.runs.queries import find_run, found, platform_link
from switchboard.runs.reading import PlatformUrl, RunId, as_json
from switchboard.runs.status import Standing, advance
from switchboard.runs.trigger import IdempotencyKey, TriggerIn, TriggerOut, UnconfirmedOut, checked_key, start
from switchboard.settings import CurrentSettings
from switchboard.tables import RunStatus
from switchboard.workflows import default, listed

router = APIRouter(prefix="/api/happyrobot", tags=["calls"])


class StatusOut(BaseModel):
    """A run's status, in the guide's words."""

    run_id: IdOfRun
    status: Literal["pending", "running", "completed", "failed", "canceled"] = Field(examples=["running"])
    name: str | None = Field(examples=["Carrier check call"])
    created_at: Timestamp
    updated_at: Timestamp
    source: Literal["happyrobot", "database"] = Field(description="Who was asked last.")
    platform_url: PlatformUrl = None


class CancelOut(BaseModel):
    """Where a run stands that is to be stopped."""

    success: Literal[True]
    run_id: IdOfRun
    status: Literal["pending", "running", "completed", "failed", "canceled"] = Field(
        description="`canceled` once HappyRobot has confirmed it.", examples=["canceled"]
    )


class WorkflowOut(BaseModel):
    """A workflow that may be started."""

    id: str = Field(examples=["default"])
    name: str | None = Field(examples=["Carrier check calls"])
    active: bool = Field(description="Whether it can be started now.")


class RecordingsOut(BaseModel):
    """Recordings of a run's sessions."""

    recordings: list[Recording]


async def _canceler(connection: HTTPConnection) -> Canceler:
    canceler: Canceler = connection.state.canceler
    return canceler


async def _asked_for(
    caller: Starter,
    idempotency_key: IdempotencyKey = None,
) -> None:
    """What `trigger` takes from the request by itself, for the document."""


# Somebody waits for each of them, and for whoever comes after.
@direct(
    router,
    "POST",
    "/trigger",
    summary="Start a workflow",
    dependencies=[Depends(_asked_for)],
    response_model=TriggerOut,
    responses=described(400, 401, 403, 404, 408, 409, 413, 422, 429)
    | {
        502: {
            "model": UnconfirmedOut,
            "description": "HappyRobot did not confirm it; `status` says what that means.",
        }
    },
    openapi_extra=body_of(TriggerIn),
)
async def trigger(request: Request) -> Response:
    """Starts a workflow and tracks the runs that HappyRobot names.

    The request is stored before HappyRobot is called, and HappyRobot is called once. With an `Idempotency-Key`, sending
    the same request again answers what became of the first one: as above, 409 while its call is being placed, 422 if
    the body is another.
    """
    caller = await starter(await caller_of(request))
    body = parse(await read(request))
    key = checked_key(request.headers.get("idempotency-key"))
    state = request.state
    started = await start(
        state.db,
        state.happyrobot,
        state.intake,
        state.ledger,
        state.settings,
        caller,
        check(TriggerIn, body),
        body,
        key,
    )
    return Response(started.model_dump_json(), media_type="application/json")


@router.get("/workflows", summary="List what can be started", responses=described(400, 401, 403, 429))
async def list_workflows(db: Db, settings: CurrentSettings, caller: Starter) -> list[WorkflowOut]:
    """`default` first, where it is there, then the others by id; those that are disabled say so."""
    first = default(settings)
    async with db.connect() as conn:
        others = [workflow for workflow, _ in await listed(conn)]
    return [
        WorkflowOut(id=each.id, name=each.name, active=each.active)
        for each in ([first] if first else []) + others
        if caller.sight.workflows is None or each.id in caller.sight.workflows
    ]


class _StatusAsked(BaseModel):
    run_id: Id = Field(description="HappyRobot's id of the run.")


async def _status_asked_for(caller: Reader, asked: Annotated[_StatusAsked, Query()]) -> None:
    """What `status` takes from the request by itself, for the document."""


# Frontends ask again and again.
@direct(
    router,
    "GET",
    "/status",
    summary="Ask for a run's status",
    dependencies=[Depends(_status_asked_for)],
    response_model=StatusOut,
    responses=described(400, 401, 403, 404, 429),
)
async def status(request: Request) -> Response:
    """Asks HappyRobot about a run that is not over, and records what it says; the database answers otherwise.

    However many ask about a run, HappyRobot is asked once in two seconds. The database also answers when HappyRobot
    takes longer than that, fails, or has been asked enough for now.
    """
    caller = await reader(await caller_of(request))
    run_id = check(_StatusAsked, dict(request.query_params)).run_id
    db: AsyncEngine = request.state.db
    lookups: Lookups = request.state.lookups
    run = await _find(db, caller, run_id)
    source = "database"
    standing = Standing(RunStatus(run.status), run.timed_out)
    if not standing.settled:
        answer = await lookups.ask(run_id, POLL)
        if answer.status is not None:
            source = "happyrobot"
            if advance(standing, answer.status) != standing:
                run = await _find(db, caller, run_id)
    fields: dict[str, Any] = {
        "run_id": run.run_id,
        "status": run.status.lower(),
        "name": run.name,
        "created_at": iso(run.created_at),
        "updated_at": iso(run.updated_at),
        "source": source,
    }
    if url := platform_link(request.state.settings, run):
        fields["platform_url"] = url
    return as_json(fields)


@router.get(
    "/runs/{run_id}/details",
    summary="Read HappyRobot's record of a run",
    responses=described(400, 401, 403, 404, 409, 429),
)
async def read_details(
    db: Db, happyrobot: CurrentHappyRobot, intake: CurrentIntake, caller: Reader, run_id: RunId
) -> DetailsOut:
    """Sessions with their transcripts, outputs, issues, version and recordings, as HappyRobot has them.

    The record of a run that is over is kept, and outlives HappyRobot's; links to recordings are made for each answer.
    """
    await _find(db, caller, run_id)
    return await details(db, happyrobot, intake, run_id)


@router.get(
    "/runs/{run_id}/recordings",
    summary="Get links to a run's recordings",
    responses=described(400, 401, 403, 404, 409, 429),
)
async def read_recordings(db: Db, happyrobot: CurrentHappyRobot, caller: Reader, run_id: RunId) -> RecordingsOut:
    """Links that HappyRobot has signed for this answer. They expire, by default after a day."""
    await _find(db, caller, run_id)
    return RecordingsOut(recordings=await recordings(happyrobot, run_id))


@router.post(
    "/runs/{run_id}/cancel",
    summary="Stop a run",
    responses=described(400, 401, 403, 404, 409, 429, 502)
    | {
        202: {
            "model": CancelOut,
            "description": "The wish is recorded; HappyRobot has not confirmed it yet.",
            "content": {
                "application/json": {
                    "example": {
                        "success": True,
                        "run_id": "19184e4c-74ca-474a-8978-e77f5a661e4f",
                        "status": "running",
                    }
                }
            },
        }
    },
)
async def cancel(
    caller: Starter, run_id: RunId, response: Response, canceler: Annotated[Canceler, Depends(_canceler)]
) -> CancelOut:
    """Asks HappyRobot to stop a run. 200 once it has; 202 while it has not, and it is asked again in the background."""
    now = await canceler.cancel(run_id, caller.sight)
    if now is not RunStatus.CANCELED:
        response.status_code = 202
    return CancelOut.model_validate({"success": True, "run_id": run_id, "status": now.lower()})


async def _find(db: AsyncEngine, caller: Caller, run_id: str) -> Row[Any]:
    async with singly(db).connect() as conn:
        return found(await find_run(conn, run_id, caller.sight))
