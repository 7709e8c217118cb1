"""`/api/v1/public`: starting workflows, and what became of them."""

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Path
from pydantic import ConfigDict, Field, JsonValue, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError
from sqlalchemy import Row, Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.access.callers import Caller, Customer
from switchboard.bodies import Id, JsonBody, Text, body_of, check
from switchboard.database import Db
from switchboard.errors import PUBLIC, NotFound
from switchboard.events import IdOfExecution, Timestamp
from switchboard.executions import COLUMNS, Told, Word, ends_of
from switchboard.public.shapes import Camel, refusals
from switchboard.runs.queued import MOST_ROWS, accept, rows_cut
from switchboard.runs.trigger import IdempotencyKey
from switchboard.settings import CurrentSettings
from switchboard.tables import executions

router = APIRouter(prefix=PUBLIC)

ExecutionId = Annotated[str, Path(alias="id", description="From the answer to `execute`.")]


_ROWS: list[JsonValue] = [{"customerId": "C-1", "name": "Blue Mesa Freight", "phone": "+12025550142"}]
"""An example of them."""


class ExecuteIn(Camel):
    """What a workflow is started with."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "input": {"csvData": _ROWS},
                    "description": "Asks Blue Mesa Freight whether the pickup stands",
                    "contextId": "order_123",
                }
            ]
        },
    )

    input: dict[str, Annotated[JsonValue, WithJsonSchema({})]] = Field(
        description="What the workflow is given, each field as it is. Of `csvData`, a list of objects, the first "
        f"{MOST_ROWS} rows.",
        examples=[{"csvData": _ROWS}],
    )
    description: Text | None = Field(
        None,
        description="Shown to who looks after the calls.",
        examples=["Asks Blue Mesa Freight whether the pickup stands"],
    )
    context_id: Id | None = Field(
        None,
        description="Your own id for what this is about; made from the execution's unless given.",
        examples=["order_123"],
    )

    @field_validator("input")
    @classmethod
    def _require_rows(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        rows = value.get("csvData", [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise PydanticCustomError("csv_data", "csvData must be a list of objects")
        return value


class ExecuteOut(Camel):
    """It is accepted, and will be started."""

    execution_id: IdOfExecution
    status: Literal["pending"]
    started_at: Timestamp
    message: Literal["Execution started successfully"]
    truncated_rows: int = Field(0, description="Rows of `csvData` that were cut off; absent if none were.")


class StatusOut(Camel):
    """Where an execution stands."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "5f0c8c1e-6a55-4a3e-9a53-0c8f5f3a6f10",
                    "status": "failed",
                    "startedAt": "2026-01-15T09:30:00.250Z",
                    "completedAt": "2026-01-15T09:31:12.004Z",
                    "error": "Nobody answered",
                    "approvalStatus": "approved",
                }
            ]
        }
    )

    id: IdOfExecution
    status: Word
    started_at: Timestamp
    completed_at: Timestamp | None
    error: str | None = Field(description="Why it failed.", examples=["Nobody answered"])
    approval_status: Literal["pending", "approved", "rejected"] | None = Field(
        description="`pending` while something is to be approved, else what was decided last."
    )


class ResultsOut(Camel):
    """What came of an execution."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "5f0c8c1e-6a55-4a3e-9a53-0c8f5f3a6f10",
                    "status": "failed",
                    # FastAPI leaves what is null out of examples.
                    "output": {
                        "runs": [
                            {
                                "runId": "19184e4c-74ca-474a-8978-e77f5a661e4f",
                                "status": "completed",
                                "result": {"summary": "The pickup stands, at 10:00"},
                            },
                            {
                                "runId": "b51b5f7e-6c0e-4c0a-9d2e-3f5d8a1c7e90",
                                "status": "failed",
                                "error": "Nobody answered",
                            },
                        ]
                    },
                    "error": "Nobody answered",
                    "startedAt": "2026-01-15T09:30:00.250Z",
                    "completedAt": "2026-01-15T09:31:12.004Z",
                }
            ]
        }
    )

    id: IdOfExecution
    status: Word
    output: Any = Field(
        description='What HappyRobot reported; of several runs `{"runs": [{"runId", "status", "result", "error"}]}`.',
        examples=[{"summary": "The pickup stands, at 10:00"}],
    )
    error: str | None = Field(description="Why it failed.", examples=["Nobody answered"])
    started_at: Timestamp
    completed_at: Timestamp | None


@router.post(
    "/agents/{workflowId}/execute",
    summary="Execute an agent",
    status_code=202,
    responses=refusals(400, 404, 408, 409, 413, 422),
    response_model_exclude_unset=True,
    openapi_extra=body_of(ExecuteIn),
)
async def execute(
    db: Db,
    settings: CurrentSettings,
    caller: Customer,
    workflow_id: Annotated[Id, Path(alias="workflowId", description="Which workflow.")],
    body: JsonBody,
    idempotency_key: IdempotencyKey = None,
) -> ExecuteOut:
    """Accepts an execution and starts it in the background, once.

    With an `Idempotency-Key`, the same request again is answered as the first one, and starts nothing; 422 if the body
    is another.
    """
    check(ExecuteIn, body)
    if not caller.sight.covers("", workflow_id):
        raise NotFound("Workflow not found")
    async with db.begin() as conn:
        execution = await accept(conn, settings, caller, workflow_id, body, idempotency_key)
    cut = rows_cut(body)
    return ExecuteOut(
        execution_id=execution.id,
        status="pending",
        started_at=execution.created_at,
        message="Execution started successfully",
        **({"truncated_rows": cut} if cut else {}),
    )


@router.get("/executions/{id}/status", summary="Get an execution's status", responses=refusals(404))
async def status(db: Db, caller: Customer, execution_id: ExecutionId) -> StatusOut:
    """Where an execution stands. Webhooks say so without being asked."""
    told = await _told(db, caller, execution_id)
    return StatusOut.model_validate(told, from_attributes=True)


@router.get("/executions/{id}/results", summary="Get an execution's results", responses=refusals(404))
async def results(db: Db, caller: Customer, execution_id: ExecutionId) -> ResultsOut:
    """What came of an execution; `output` is null until HappyRobot has reported something."""
    told = await _told(db, caller, execution_id)
    return ResultsOut.model_validate(told, from_attributes=True)


async def _told(db: Db, caller: Caller, execution_id: str) -> Told:
    async with db.connect() as conn:
        execution = await find(conn, caller, execution_id)
        ends = await ends_of(conn, [execution.id])
        return Told.of(execution, ends.get(execution.id, []))


async def find(conn: AsyncConnection, caller: Caller, execution_id: str) -> Row[Any]:
    """An execution of the caller's key; raises NotFound for all others, whether there are any or not."""
    try:
        of_this_id = executions.c.id == UUID(execution_id)
    except ValueError:
        raise NotFound("Execution not found") from None
    query: Select[Any] = select(*COLUMNS).where(of_this_id, executions.c.key_id == caller.key_id)
    found: Row[Any] | None = (await conn.execute(query)).one_or_none()
    if found is None:
        raise NotFound("Execution not found")
    return found
