"""`/api/happyrobot/approvals*`: what runs ask to have approved, for whoever may decide."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from sqlalchemy import Row

from switchboard import bodies
from switchboard.access.callers import Caller, Decider, Reader
from switchboard.bodies import ShortText, Text, answered, body_of, check
from switchboard.database import Db
from switchboard.errors import BadRequest, Conflict, NotFound, described
from switchboard.events import IdOfApproval, IdOfContext, IdOfExecution, IdOfRun, IdOfWorkflow, Timestamp
from switchboard.executions import approval_data
from switchboard.pages import link_next
from switchboard.runs.approvals import Wanted, find, listed
from switchboard.runs.intake import CurrentIntake, Intake
from switchboard.runs.sorting import Decided, Decision, Undecided
from switchboard.tables import ApprovalStatus

router = APIRouter(prefix="/api/happyrobot", tags=["approvals"])

Verdict = Literal[ApprovalStatus.APPROVED, ApprovalStatus.REJECTED]

NOTHING_PENDING = "Execution is not waiting for approval"

_REFUSALS = {
    Undecided.NOTHING_PENDING: Conflict(NOTHING_PENDING),
    Undecided.OTHERWISE: Conflict("Execution was decided the other way"),
    Undecided.NEEDS_COMMENT: BadRequest("comment required"),
}


async def decide(intake: Intake, decision: Decision) -> Decided:
    """Takes a decision. Raises Conflict where there is nothing to decide, BadRequest where a comment is missing."""
    outcome = await intake.take(decision)
    if isinstance(outcome, Decided):
        return outcome
    assert isinstance(outcome, Undecided)  # noqa: S101  # nothing else comes of a decision
    raise _REFUSALS[outcome]


async def _decision_body(request: Request) -> Any:
    raw = await bodies.read(request)
    return bodies.parse(raw) if raw else {}


DecisionBody = Annotated[Any, Depends(_decision_body)]
"""The body of a decision, which may be missing: there need not be anything to say."""


_ASKED: dict[str, JsonValue] = {
    "rows": [{"carrier": "Blue Mesa Freight", "offered": 1850, "asked": 2000}],
    "metadata": {"title": "Agree to a higher rate", "requireComment": False},
    "displayFields": ["carrier", "offered", "asked"],
}

ApprovalData = Annotated[
    dict[str, Any],
    Field(description="As the workflow sent it: `rows`, `metadata`, `displayFields`.", examples=[_ASKED]),
]


class ApprovalOut(BaseModel):
    """Something that a run asks to have approved."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "b1f6a1a8-3a43-4f0b-8a0f-6c8c6f1f0c11",
                    "execution_id": "5f0c8c1e-6a55-4a3e-9a53-0c8f5f3a6f10",
                    "run_id": "19184e4c-74ca-474a-8978-e77f5a661e4f",
                    "context_id": "order_123",
                    "workflow_id": "default",
                    "status": "approved",
                    "approval_data": _ASKED,
                    "require_comment": False,
                    "comment": "As the shipper wishes",
                    "created_at": "2026-01-15T09:30:45.000Z",
                    "decided_at": "2026-01-15T09:30:58.000Z",
                }
            ]
        }
    )

    id: IdOfApproval
    execution_id: IdOfExecution
    run_id: IdOfRun
    context_id: IdOfContext
    workflow_id: IdOfWorkflow
    status: ApprovalStatus
    approval_data: ApprovalData
    require_comment: bool = Field(description="Whether a decision needs one.")
    comment: str | None = Field(description="What was said with the decision.", examples=["As the shipper wishes"])
    created_at: Timestamp
    decided_at: Timestamp | None


class VerdictIn(BaseModel):
    """What is said with a decision."""

    model_config = ConfigDict(
        extra="allow", strict=True, json_schema_extra={"examples": [{"comment": "As the shipper wishes"}]}
    )

    comment: Text | None = Field(
        None, description="Why; needed where the request says `require_comment`.", examples=["As the shipper wishes"]
    )


class VerdictOut(BaseModel):
    """It is decided."""

    success: Literal[True]
    id: IdOfApproval
    execution_id: IdOfExecution
    run_id: IdOfRun
    status: Verdict


def _approval_out(row: Row[Any]) -> ApprovalOut:
    return ApprovalOut(
        id=row.id,
        execution_id=row.execution_id,
        run_id=row.run_id,
        context_id=row.context_id,
        workflow_id=row.workflow_id,
        status=row.status,
        approval_data=approval_data(row.data),
        require_comment=row.require_comment,
        comment=row.comment,
        created_at=row.created_at,
        decided_at=row.decided_at,
    )


@router.get("/approvals", summary="List what runs ask to have approved", responses=described(400, 401, 403, 429))
async def list_approvals(
    request: Request,
    response: Response,
    db: Db,
    caller: Reader,
    status: Annotated[ApprovalStatus, Query(description="Only those that stand so.")] = ApprovalStatus.PENDING,
    context_id: Annotated[ShortText | None, Query(description="Only those of this context.")] = None,
    limit: Annotated[int, Query(ge=1, le=500, description="So many at most.")] = 100,
    after: Annotated[int | None, Query(ge=1, lt=2**63, description='From the `Link` header with `rel="next"`.')] = None,
) -> list[ApprovalOut]:
    """What waits, the oldest first; of what does not any more, the newest first. `Link` leads to the next page."""
    async with db.connect() as conn:
        rows = await listed(conn, Wanted(status, context_id or None), caller.sight, limit=limit + 1, after=after)
    if len(rows) > limit:
        link_next(request, response, after=rows[limit - 1].number)
    return [_approval_out(row) for row in rows[:limit]]


ApprovalId = Annotated[str, Path(alias="id", description="The request that is meant.")]

_REJECTED: dict[str, JsonValue] = {
    "success": True,
    "id": "b1f6a1a8-3a43-4f0b-8a0f-6c8c6f1f0c11",
    "execution_id": "5f0c8c1e-6a55-4a3e-9a53-0c8f5f3a6f10",
    "run_id": "19184e4c-74ca-474a-8978-e77f5a661e4f",
    "status": "rejected",
}
"""An example of an answer."""

_REFUSED = described(400, 401, 403, 404, 408, 409, 413, 429)


@router.post(
    "/approvals/{id}/approve",
    summary="Approve, and let it continue",
    responses=_REFUSED,
    openapi_extra=body_of(VerdictIn, required=False),
)
async def approve(
    db: Db, intake: CurrentIntake, caller: Decider, approval_id: ApprovalId, body: DecisionBody
) -> VerdictOut:
    """Lets the run continue. The first decision counts: the same again is answered alike, the opposite 409."""
    return await _decide(db, intake, caller, approval_id, body, ApprovalStatus.APPROVED)


@router.post(
    "/approvals/{id}/reject",
    summary="Reject, and stop it",
    responses=_REFUSED | answered(_REJECTED),
    openapi_extra=body_of(VerdictIn, required=False),
)
async def reject(
    db: Db, intake: CurrentIntake, caller: Decider, approval_id: ApprovalId, body: DecisionBody
) -> VerdictOut:
    """Stops the execution, and all of its calls that are under way. The first decision counts."""
    return await _decide(db, intake, caller, approval_id, body, ApprovalStatus.REJECTED)


async def _decide(db: Db, intake: Intake, caller: Caller, approval_id: str, body: Any, verdict: Verdict) -> VerdictOut:
    wanted = check(VerdictIn, body)
    async with db.connect() as conn:
        approval = await find(conn, approval_id, caller.sight)
    if approval is None:
        raise NotFound("Approval not found")
    await decide(intake, Decision(approval.execution_id, verdict, wanted.comment, approval.id, caller.key_id))
    return VerdictOut(
        success=True,
        id=approval.id,
        execution_id=approval.execution_id,
        run_id=approval.run_id,
        status=verdict,
    )
