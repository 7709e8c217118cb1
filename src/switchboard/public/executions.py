"""`/api/v1/public`: starting workflows, and what became of them."""

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Path
from pydantic import ConfigDict, Field, JsonValue, field_validator
from pydantic_core import PydanticCustomError
from sqlalchemy import Row, Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.access.callers import Caller, Customer
from switchboard.bodies import Id, JsonBody, Text, body_of, check
from switchboard.database import Db
from switchboard.errors import PUBLIC, NotFound
from switchboard.events import Timestamp
from switchboard.executions import COLUMNS, Told, Word, ends_of
from switchboard.public.shapes import Camel, refusals
from switchboard.runs.queued import MOST_ROWS, accept, rows_cut
from switchboard.runs.trigger import IdempotencyKey
from switchboard.settings import CurrentSettings
from switchboard.tables import executions

router = APIRouter(prefix=PUBLIC)

ExecutionId = Annotated[str, Path(alias="id", description="From the answer to `execute`.")]


class ExecuteIn(Camel):
    """What a workflow is started with."""

    model_config = ConfigDict(extra="allow", strict=True)

    input: dict[str, JsonValue] = Field(
        description="What the workflow is given, each field as it is. Of `csvData`, a list of objects, the first "
        f"{MOST_ROWS} rows.",
        examples=[{"csvData": [{"customerId": "CUST001", "name": "John Doe", "phone": "+15550100"}]}],
    )
    description: Text | None = Field(None, description="Shown to who looks after the calls.")
    context_id: Id | None = Field(
        None, description="Your own id for what this is about; made from the execution's unless given."
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

    execution_id: UUID
    status: Literal["pending"]
    started_at: Timestamp
    message: Literal["Execution started successfully"]
    truncated_rows: int = Field(0, description="Rows of `csvData` that were cut off; absent if none were.")


class StatusOut(Camel):
    """Where an execution stands."""

    id: UUID
    status: Word
    started_at: Timestamp
    completed_at: Timestamp | None
    error: str | None = Field(description="Why it failed.")
    approval_status: Literal["pending", "approved", "rejected"] | None = Field(
        description="`pending` while something is to be approved, else what was decided last."
    )


class ResultsOut(Camel):
    """What came of an execution."""

    id: UUID
    status: Word
    output: Any = Field(
        description='What HappyRobot reported; of several runs `{"runs": [{"runId", "status", "result", "error"}]}`.'
    )
    error: str | None
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
    workflow_id: Annotated[Id, Path(alias="workflowId")],
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
