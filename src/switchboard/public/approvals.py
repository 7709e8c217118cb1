"""`/api/v1/public/executions/{id}`: what is to be approved, and deciding it."""

from typing import Any, Literal
from uuid import UUID

from fastapi import APIRouter
from pydantic import ConfigDict, Field, JsonValue

from switchboard.access.callers import Customer
from switchboard.bodies import Text, answered, body_of, check
from switchboard.database import Db
from switchboard.errors import PUBLIC, Conflict
from switchboard.events import IdOfApproval, IdOfExecution, IdOfWorkflow, Timestamp
from switchboard.executions import approval_data
from switchboard.public.executions import ExecutionId, find
from switchboard.public.shapes import Camel, refusals
from switchboard.runs.approvals import show
from switchboard.runs.deciding import NOTHING_PENDING, ApprovalData, DecisionBody, Verdict, decide
from switchboard.runs.intake import CurrentIntake, Intake
from switchboard.runs.sorting import Decision
from switchboard.tables import ApprovalStatus

router = APIRouter(prefix=PUBLIC)


class PendingOut(Camel):
    """What is to be decided about."""

    id: IdOfExecution
    workflow_id: IdOfWorkflow
    status: Literal["pending_approval"]
    approval_data: ApprovalData
    started_at: Timestamp
    approval_id: IdOfApproval = Field(
        description="Which request this is: send it with the decision to decide no other."
    )


class DecisionIn(Camel):
    """A decision."""

    # Without an `approvalId`: nobody's request has that of an example.
    model_config = ConfigDict(
        extra="allow", strict=True, json_schema_extra={"examples": [{"comment": "As the shipper wishes"}]}
    )

    comment: Text | None = Field(
        None,
        description="Why; required where the request's `requireComment` is true.",
        examples=["As the shipper wishes"],
    )
    approval_id: Text | None = Field(
        None,
        description="The request that is meant; the one that is pending unless given.",
        examples=["b1f6a1a8-3a43-4f0b-8a0f-6c8c6f1f0c11"],
    )


class DecisionOut(Camel):
    """It is decided."""

    execution_id: IdOfExecution
    status: Literal["approved", "rejected"]
    message: str = Field(examples=["Execution approved and will continue"])
    approval_id: IdOfApproval = Field(description="The request that this is about.")


@router.get("/executions/{id}/pending-approval", summary="Get what is to be approved", responses=refusals(404, 409))
async def pending_approval(db: Db, caller: Customer, execution_id: ExecutionId) -> PendingOut:
    """What an execution waits for. 409 if there is nothing to decide."""
    async with db.begin() as conn:
        execution = await find(conn, caller, execution_id)
        approval = await show(conn, execution.id)
    if approval is None:
        raise Conflict(NOTHING_PENDING)
    return PendingOut(
        id=execution.id,
        workflow_id=execution.workflow_id,
        status="pending_approval",
        approval_data=approval_data(approval.data),
        started_at=execution.created_at,
        approval_id=approval.id,
    )


@router.post(
    "/executions/{id}/approve",
    summary="Approve, and let it continue",
    responses=refusals(400, 404, 408, 409, 413),
    openapi_extra=body_of(DecisionIn, required=False),
)
async def approve(
    db: Db,
    intake: CurrentIntake,
    caller: Customer,
    execution_id: ExecutionId,
    body: DecisionBody,
) -> DecisionOut:
    """Lets an execution continue. The first decision counts: the same again is answered alike, the opposite 409."""
    return await _decide(db, intake, caller, execution_id, body, ApprovalStatus.APPROVED)


_REJECTED: dict[str, JsonValue] = {
    "executionId": "5f0c8c1e-6a55-4a3e-9a53-0c8f5f3a6f10",
    "status": "rejected",
    "message": "Execution rejected and stopped",
    "approvalId": "b1f6a1a8-3a43-4f0b-8a0f-6c8c6f1f0c11",
}
"""An example of an answer."""


@router.post(
    "/executions/{id}/reject",
    summary="Reject, and stop it",
    responses=refusals(400, 404, 408, 409, 413) | answered(_REJECTED),
    openapi_extra=body_of(DecisionIn, required=False),
)
async def reject(
    db: Db,
    intake: CurrentIntake,
    caller: Customer,
    execution_id: ExecutionId,
    body: DecisionBody,
) -> DecisionOut:
    """Stops an execution, and all of its calls that are under way. The first decision counts."""
    return await _decide(db, intake, caller, execution_id, body, ApprovalStatus.REJECTED)


_MESSAGES = {
    ApprovalStatus.APPROVED: "Execution approved and will continue",
    ApprovalStatus.REJECTED: "Execution rejected and stopped",
}


async def _decide(
    db: Db,
    intake: Intake,
    caller: Customer,
    execution_id: str,
    body: Any,
    verdict: Verdict,
) -> DecisionOut:
    decision = check(DecisionIn, body)
    async with db.connect() as conn:
        execution = await find(conn, caller, execution_id)
    decided = await decide(
        intake, Decision(execution.id, verdict, decision.comment, _uuid(decision.approval_id), caller.key_id)
    )
    return DecisionOut(
        execution_id=execution.id,
        status=verdict.value,
        message=_MESSAGES[verdict],
        approval_id=decided.approval_id,
    )


def _uuid(text: str | None) -> UUID | None:
    try:
        return None if text is None else UUID(text)
    except ValueError:
        raise Conflict(NOTHING_PENDING) from None
