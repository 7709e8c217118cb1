"""`/api/happyrobot/runs*`: what a frontend reads of what is stored."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic_core import to_json
from sqlalchemy import Row

from switchboard.access.callers import Reader, caller_of, reader
from switchboard.bodies import Id, ShortText, check
from switchboard.database import Db, singly
from switchboard.direct import direct
from switchboard.errors import described
from switchboard.events import (
    EventOut,
    IdOfContext,
    IdOfExecution,
    IdOfRun,
    IdOfWorkflow,
    Scope,
    Timestamp,
    iso,
    read_events,
)
from switchboard.pages import link_next
from switchboard.runs.queries import Cursor, Filter, find_run, found, list_runs, metadata_of, platform_link
from switchboard.settings import CurrentSettings, Settings
from switchboard.tables import RunStatus

router = APIRouter(prefix="/api/happyrobot", tags=["runs"])

# The guide writes statuses in lower case, too.
_UPPER = BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value)

RunId = Annotated[Id, Path(description="HappyRobot's id of the run.")]


PlatformUrl = Annotated[
    str | None,
    Field(
        description="The run at HappyRobot; absent while that is not known.",
        examples=[
            "https://platform.happyrobot.ai/acme/workflow/carrier-check/runs?run_id=19184e4c-74ca-474a-8978-e77f5a661e4f"
        ],
    ),
]


class RunOut(BaseModel):
    """A run, in the guide's words."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        json_schema_extra={
            "examples": [
                {
                    "id": "42",
                    "runId": "19184e4c-74ca-474a-8978-e77f5a661e4f",
                    "contextId": "order_123",
                    "name": "Carrier check call",
                    "description": "Asks Blue Mesa Freight whether the pickup stands",
                    "status": "COMPLETED",
                    "createdAt": "2026-01-15T09:30:00.250Z",
                    "updatedAt": "2026-01-15T09:31:12.004Z",
                    "completedAt": "2026-01-15T09:31:12.004Z",
                    "metadata": {
                        "logs": [
                            {"message": "Blue Mesa Freight has answered", "timestamp": "2026-01-15T09:30:12.500Z"}
                        ],
                        "result": {"summary": "The pickup stands, at 10:00"},
                    },
                    "workflowId": "default",
                    "executionId": "5f0c8c1e-6a55-4a3e-9a53-0c8f5f3a6f10",
                }
            ]
        },
    )

    id: str = Field(examples=["42"])
    run_id: IdOfRun
    context_id: IdOfContext
    name: str | None = Field(examples=["Carrier check call"])
    description: str | None = Field(examples=["Asks Blue Mesa Freight whether the pickup stands"])
    status: RunStatus
    created_at: Timestamp
    updated_at: Timestamp = Field(description="The last sign of life.")
    completed_at: Timestamp | None
    metadata: dict[str, Any] = Field(
        description="`logs` in order, `result` of a completed run, `error` of a failed one. Of more than 1,000 logs, "
        "and in long lists of fewer, the newest are given: then `logs_truncated` is true, and `earlier_logs` the "
        "address of the events before them, the oldest first, page by page.",
        examples=[
            {
                "logs": [{"message": "Blue Mesa Freight has answered"}],
                "result": {"summary": "The pickup stands, at 10:00"},
            }
        ],
    )
    workflow_id: IdOfWorkflow
    execution_id: IdOfExecution | None
    platform_url: PlatformUrl = None


def _run_out(settings: Settings, run: Row[Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """A `RunOut` as it is sent: what comes from our own tables is not checked once more, of hundreds of runs."""
    # All at once, in their order: taken by name they take longer than all that is done with them.
    columns: Sequence[Any] = run
    number, run_id, context_id, name, description, status, _, created, updated, workflow_id, execution_id, completed = (
        columns[:12]
    )
    fields = {
        "id": str(number),
        "runId": run_id,
        "contextId": context_id,
        "name": name,
        "description": description,
        "status": status,
        "createdAt": iso(created),
        "updatedAt": iso(updated),
        "completedAt": completed and iso(completed),
        "metadata": metadata,
        "workflowId": workflow_id,
        "executionId": execution_id,
    }
    if url := platform_link(settings, run):
        fields["platformUrl"] = url
    return fields


def as_json(content: object) -> Response:
    return Response(to_json(content), media_type="application/json")


class _Asked(BaseModel):
    """Which runs are to be listed."""

    context_id: ShortText | None = Field(None, description="Only runs of this context.")
    status: Annotated[RunStatus | None, _UPPER] = Field(None, description="Only runs with this status.")
    workflow_id: ShortText | None = Field(None, description="Only runs of this workflow.")
    limit: int = Field(200, ge=1, le=1000, description="So many at most.")
    cursor: str | None = Field(None, description='From the `Link` header with `rel="next"`.')


async def _asked_for(caller: Reader, asked: Annotated[_Asked, Query()]) -> None:
    """What `runs` takes from the request by itself, for the document."""


# Every page that shows runs begins with it.
@direct(
    router,
    "GET",
    "/runs",
    summary="List runs, newest first",
    dependencies=[Depends(_asked_for)],
    response_model=list[RunOut],
    responses=described(400, 401, 403, 429),
)
async def runs(request: Request) -> Response:
    """A page of runs. `Link` leads to the next one, if there is one."""
    caller = await reader(await caller_of(request))
    asked = check(_Asked, dict(request.query_params))
    # A frontend that builds `?context_id=` from an empty field means no filter.
    wanted = Filter(asked.context_id or None, asked.status, asked.workflow_id or None)
    cursor = Cursor.decode(asked.cursor) if asked.cursor is not None else None
    settings: Settings = request.state.settings
    async with singly(request.state.db).connect() as conn:
        page = await list_runs(conn, wanted, caller.sight, limit=asked.limit, cursor=cursor)
        metadata = await metadata_of(conn, page.runs)
    response = as_json([_run_out(settings, run, metadata[run.run_id]) for run in page.runs])
    if page.more:
        last = page.runs[-1]
        link_next(request, response, cursor=Cursor(last.created_at, last.id).encode())
    return response


@router.get(
    "/runs/{run_id}",
    summary="Read one run",
    response_model=RunOut,
    responses=described(400, 401, 403, 404, 429),
)
async def run(db: Db, settings: CurrentSettings, caller: Reader, run_id: RunId) -> Response:
    """One run with its logs, result and error."""
    async with singly(db).connect() as conn:
        row = found(await find_run(conn, run_id, caller.sight))
        metadata = await metadata_of(conn, [row])
    return as_json(_run_out(settings, row, metadata[run_id]))


@router.get(
    "/runs/{run_id}/events",
    summary="Read a run's timeline",
    response_model=list[EventOut],
    responses=described(400, 401, 403, 404, 429),
)
async def timeline(
    request: Request,
    db: Db,
    caller: Reader,
    run_id: RunId,
    after: Annotated[int, Query(ge=0, lt=2**63, description="Only events after this id.")] = 0,
    up_to: Annotated[
        int | None, Query(ge=0, lt=2**63, description="Only events up to this id, itself included.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="So many at most.")] = 500,
) -> Response:
    """Everything that happened to a run, oldest first. `Link` leads to what follows, if there is more."""
    async with singly(db).connect() as conn:
        scope = Scope(caller.sight, run_id=run_id)
        page = await read_events(conn, scope, after=after, limit=limit, up_to=up_to)
        if not page.events:
            found(await find_run(conn, run_id, caller.sight))
    response = Response(b"[%b]" % b",".join(event.encode() for event in page.events), media_type="application/json")
    if page.more:
        link_next(request, response, after=page.events[-1].id)
    return response
