"""`/api/happyrobot/runs*`: what a frontend reads of what is stored."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel
from sqlalchemy import Row

from switchboard.access.callers import Reader
from switchboard.bodies import Id, ShortText
from switchboard.database import Db
from switchboard.errors import described
from switchboard.events import Event, IdOfContext, IdOfExecution, IdOfRun, IdOfWorkflow, Scope, Timestamp, read_events
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
        description="`logs` in order, `result` of a completed run, `error` of a failed one.",
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


def _run_out(settings: Settings, run: Row[Any], metadata: dict[str, Any]) -> RunOut:
    fields = {
        "id": str(run.id),
        "run_id": run.run_id,
        "context_id": run.context_id,
        "name": run.name,
        "description": run.description,
        "status": RunStatus(run.status),
        "created_at": run.created_at,
        "updated_at": run.updated_at,
        "completed_at": run.completed_at,
        "metadata": metadata,
        "workflow_id": run.workflow_id,
        "execution_id": run.execution_id,
    }
    if url := platform_link(settings, run):
        fields["platform_url"] = url
    return RunOut.model_validate(fields)


@router.get(
    "/runs",
    summary="List runs, newest first",
    responses=described(400, 401, 403, 429),
    response_model_exclude_unset=True,
)
async def runs(
    request: Request,
    response: Response,
    db: Db,
    settings: CurrentSettings,
    caller: Reader,
    context_id: Annotated[ShortText | None, Query(description="Only runs of this context.")] = None,
    status: Annotated[RunStatus | None, _UPPER, Query(description="Only runs with this status.")] = None,
    workflow_id: Annotated[ShortText | None, Query(description="Only runs of this workflow.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="So many at most.")] = 200,
    cursor: Annotated[str | None, Query(description='From the `Link` header with `rel="next"`.')] = None,
) -> list[RunOut]:
    """A page of runs. `Link` leads to the next one, if there is one."""
    # A frontend that builds `?context_id=` from an empty field means no filter.
    wanted = Filter(context_id or None, status, workflow_id or None)
    async with db.connect() as conn:
        rows = await list_runs(
            conn, wanted, caller.sight, limit=limit + 1, cursor=Cursor.decode(cursor) if cursor is not None else None
        )
        page = rows[:limit]
        metadata = await metadata_of(conn, page)
    if len(rows) > limit:
        link_next(request, response, cursor=Cursor(page[-1].created_at, page[-1].id).encode())
    return [_run_out(settings, run, metadata[run.run_id]) for run in page]


@router.get(
    "/runs/{run_id}",
    summary="Read one run",
    responses=described(400, 401, 403, 404, 429),
    response_model_exclude_unset=True,
)
async def run(db: Db, settings: CurrentSettings, caller: Reader, run_id: RunId) -> RunOut:
    """One run with its logs, result and error."""
    async with db.connect() as conn:
        row = found(await find_run(conn, run_id, caller.sight))
        metadata = await metadata_of(conn, [row])
    return _run_out(settings, row, metadata[run_id])


@router.get("/runs/{run_id}/events", summary="Read a run's timeline", responses=described(400, 401, 403, 404, 429))
async def timeline(
    request: Request,
    response: Response,
    db: Db,
    caller: Reader,
    run_id: RunId,
    after: Annotated[int, Query(ge=0, lt=2**63, description="Only events after this id.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="So many at most.")] = 500,
) -> list[Event]:
    """Everything that happened to a run, oldest first. `Link` leads to what follows, if there is more."""
    async with db.connect() as conn:
        events = await read_events(conn, Scope(caller.sight, run_id=run_id), after=after, limit=limit + 1)
        if not events:
            found(await find_run(conn, run_id, caller.sight))
    if len(events) > limit:
        link_next(request, response, after=events[limit - 1].id)
    return list(events[:limit])
