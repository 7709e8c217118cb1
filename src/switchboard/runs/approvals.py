"""What runs ask to have approved: written down, decided once, withdrawn when there is nothing to decide any more.

All of it happens in the turns of the one writer, so that nobody decides at the same time as somebody else.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, Row, String, Uuid, any_, cast, func, insert, literal, select, update
from sqlalchemy.dialects.postgresql import JSONB, distinct_on
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.events import NewEvent
from switchboard.jobs import CANCEL, DECIDE, Job
from switchboard.runs.sorting import Decided, Decision, Request, Undecided
from switchboard.tables import FINAL, ApprovalStatus, agent_runs, approvals, executions

_is_pending = approvals.c.status == ApprovalStatus.PENDING


@dataclass(slots=True)
class Verdicts:
    """What came of decisions, and what comes of them."""

    outcomes: list[Decided | Undecided] = field(default_factory=list)
    """One for each, in their order."""
    events: list[NewEvent] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    execution_ids: set[UUID] = field(default_factory=set)
    """Those of which anything was decided just now."""


async def decide(conn: AsyncConnection, decisions: Sequence[Decision]) -> Verdicts:
    """Decides what is pending, each of it once: the first decision counts."""
    verdicts = Verdicts()
    for decision in decisions:
        verdicts.outcomes.append(await _decide(conn, decision, verdicts))
    return verdicts


async def _decide(conn: AsyncConnection, decision: Decision, verdicts: Verdicts) -> Decided | Undecided:
    approval = await _meant(conn, decision)
    if approval is None or approval.status == ApprovalStatus.WITHDRAWN:
        return Undecided.NOTHING_PENDING
    if approval.status != ApprovalStatus.PENDING:
        return Decided(approval.id) if approval.status == decision.verdict else Undecided.OTHERWISE
    if approval.require_comment and not (decision.comment or "").strip():
        return Undecided.NEEDS_COMMENT
    await conn.execute(
        update(approvals)
        .where(approvals.c.id == approval.id, _is_pending)
        .values(status=decision.verdict, comment=decision.comment, decided_by=decision.key_id, decided_at=func.now())
    )
    data = {"approval_id": str(approval.id), "comment": decision.comment}
    verdicts.events.append(NewEvent(approval.run_id, decision.verdict, data))
    verdicts.jobs.append(Job(DECIDE, str(approval.id)))
    verdicts.execution_ids.add(decision.execution_id)
    if decision.verdict is ApprovalStatus.REJECTED:
        await _withdraw(conn, approvals.c.execution_id == decision.execution_id)
        # The run that has asked is stopped once it was told: it may have something to put in order.
        others = (
            select(agent_runs.c.run_id)
            .where(agent_runs.c.execution_id == decision.execution_id, agent_runs.c.status.not_in(FINAL))
            .where(agent_runs.c.run_id != approval.run_id)
        )
        verdicts.jobs += [Job(CANCEL, run_id) for run_id in await conn.scalars(others)]
    return Decided(approval.id)


async def _meant(conn: AsyncConnection, decision: Decision) -> Row[Any] | None:
    """The request that a decision is about: the one that it names, the oldest that is pending, or the last decided."""
    query = select(approvals).where(approvals.c.execution_id == decision.execution_id)
    if decision.approval_id is not None:
        return (await conn.execute(query.where(approvals.c.id == decision.approval_id))).one_or_none()
    pending = await conn.execute(query.where(_is_pending).order_by(approvals.c.number).limit(1))
    if (oldest := pending.one_or_none()) is not None:
        return oldest
    decided = query.where(approvals.c.status != ApprovalStatus.WITHDRAWN).order_by(approvals.c.decided_at.desc())
    return (await conn.execute(decided.limit(1))).one_or_none()


async def pending_of(conn: AsyncConnection, execution_id: UUID) -> Row[Any] | None:
    """What an execution waits for: the request that a decision without a name is about."""
    query = select(approvals).where(approvals.c.execution_id == execution_id, _is_pending)
    found: Row[Any] | None = (await conn.execute(query.order_by(approvals.c.number).limit(1))).one_or_none()
    return found


async def record(conn: AsyncConnection, requests: Sequence[Request]) -> list[Row[Any]]:
    """Writes requests down; returns those that are new."""
    new = []
    for request in requests:
        if await _is_known(conn, request) or await _is_rejected(conn, request.execution_id):
            continue
        added = await conn.execute(
            insert(approvals)
            .values(
                execution_id=request.execution_id,
                run_id=request.run_id,
                data=request.data,
                require_comment=_requires_comment(request.data),
                resume_url=request.resume_url,
            )
            .returning(approvals)
        )
        new.append(added.one())
    return new


async def _is_known(conn: AsyncConnection, request: Request) -> bool:
    """Whether this very request is pending already: a copy without a timestamp cannot be told from another event."""
    query = select(approvals.c.id).where(
        approvals.c.run_id == request.run_id,
        _is_pending,
        approvals.c.resume_url.is_not_distinct_from(request.resume_url),
        cast(approvals.c.data, JSONB).is_not_distinct_from(literal(request.data, JSONB(none_as_null=True))),
    )
    return (await conn.execute(query.limit(1))).first() is not None


async def _is_rejected(conn: AsyncConnection, execution_id: UUID) -> bool:
    query = select(executions.c.approval_status).where(executions.c.id == execution_id)
    return await conn.scalar(query) == ApprovalStatus.REJECTED


def _requires_comment(data: Any) -> bool:
    metadata = data.get("metadata") if isinstance(data, dict) else None
    return isinstance(metadata, dict) and metadata.get("requireComment") is True


async def withdraw_for(conn: AsyncConnection, run_ids: Collection[str]) -> None:
    """Withdraws what runs have asked for that are over."""
    if run_ids:
        await _withdraw(conn, approvals.c.run_id == any_(literal(list(run_ids), ARRAY(String))))


async def _withdraw(conn: AsyncConnection, condition: Any) -> None:
    await conn.execute(
        update(approvals)
        .where(condition, _is_pending)
        .values(status=ApprovalStatus.WITHDRAWN, decided_at=func.now(), resume_url=None)
    )


async def statuses_of(conn: AsyncConnection, execution_ids: Collection[UUID]) -> dict[UUID, ApprovalStatus]:
    """Where executions stand with what they have asked for: pending while anything is, else as decided last."""
    query = (
        select(approvals.c.execution_id, approvals.c.status)
        .ext(distinct_on(approvals.c.execution_id))
        .where(approvals.c.execution_id == any_(literal(list(execution_ids), ARRAY(Uuid))))
        .where(approvals.c.status != ApprovalStatus.WITHDRAWN)
        .order_by(approvals.c.execution_id, _is_pending.desc(), approvals.c.decided_at.desc())
    )
    return {row.execution_id: ApprovalStatus(row.status) for row in await conn.execute(query)}
