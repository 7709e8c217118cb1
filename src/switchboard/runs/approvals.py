"""What runs ask to have approved: written down, decided once, withdrawn when there is nothing to decide any more.

All of it happens in the turns of the one writer, so that nobody decides at the same time as somebody else.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from pydantic_core import to_json
from sqlalchemy import ARRAY, Row, Select, String, Uuid, any_, func, insert, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.events import NewEvent
from switchboard.executions import requires_comment
from switchboard.jobs import DECIDE, Job
from switchboard.runs.sorting import Decided, Decision, Request, Undecided
from switchboard.sight import Sight
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
    if await _is_over(conn, approval.run_id):
        await withdraw_for(conn, [approval.run_id])
        verdicts.execution_ids.add(decision.execution_id)
        return Undecided.NOTHING_PENDING
    if approval.require_comment and not (decision.comment or "").strip():
        return Undecided.NEEDS_COMMENT
    await conn.execute(
        update(approvals)
        .where(approvals.c.id == approval.id, _is_pending)
        .values(
            status=decision.verdict,
            comment=decision.comment,
            decided_by=decision.key_id,
            decided_at=func.clock_timestamp(),
        )
    )
    data = {"approval_id": str(approval.id), "comment": decision.comment}
    verdicts.events.append(NewEvent(approval.run_id, decision.verdict, data))
    verdicts.jobs.append(Job(DECIDE, str(approval.id)))
    verdicts.execution_ids.add(decision.execution_id)
    if decision.verdict is ApprovalStatus.REJECTED:
        await _withdraw(conn, approvals.c.execution_id == decision.execution_id)
    return Decided(approval.id)


async def _meant(conn: AsyncConnection, decision: Decision) -> Row[Any] | None:
    """The request that a decision is about."""
    found = await conn.execute(
        select(approvals).where(approvals.c.execution_id == decision.execution_id).order_by(approvals.c.number)
    )
    requests = found.all()
    if decision.approval_id is not None:
        return next((each for each in requests if each.id == decision.approval_id), None)
    decided = [each for each in requests if each.status in _DECIDED]
    pending = next((each for each in requests if each.status == ApprovalStatus.PENDING), None)
    last = max(decided, key=lambda each: (each.decided_at, each.number), default=None)
    if pending is None:
        return last
    # Who repeats a decision, because its answer was lost, must not decide the next question, which they have not seen.
    repeated = last is not None and last.status == decision.verdict and pending.shown_at is None
    return last if repeated else pending


_DECIDED = frozenset({ApprovalStatus.APPROVED, ApprovalStatus.REJECTED})


async def _is_over(conn: AsyncConnection, run_id: str) -> bool:
    """Whether nobody waits for a decision any more; a run that only we hold for dead may."""
    over = select(agent_runs.c.status.in_(FINAL) & ~agent_runs.c.timed_out).where(agent_runs.c.run_id == run_id)
    return bool(await conn.scalar(over))


async def show(conn: AsyncConnection, execution_id: UUID) -> Row[Any] | None:
    """What an execution waits for, the oldest first: from now on a decision without a name is about that."""
    query = select(approvals).where(approvals.c.execution_id == execution_id, _is_pending)
    found: Row[Any] | None = (await conn.execute(query.order_by(approvals.c.number).limit(1))).one_or_none()
    if found is not None and found.shown_at is None:
        await conn.execute(update(approvals).where(approvals.c.id == found.id).values(shown_at=func.now()))
    return found


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which requests somebody wants to see; None narrows nothing."""

    status: ApprovalStatus
    context_id: str | None = None


_REQUESTS: Select[Any] = select(approvals, executions.c.context_id, executions.c.workflow_id).join(
    executions, executions.c.id == approvals.c.execution_id
)


def _seen(sight: Sight) -> Select[Any]:
    return sight.narrow(_REQUESTS, executions.c.context_id, executions.c.workflow_id)


async def listed(
    conn: AsyncConnection, wanted: Wanted, sight: Sight, *, limit: int, after: int | None = None
) -> Sequence[Row[Any]]:
    """Requests that are to be seen: what waits, the oldest first; others, the newest first.

    `after` is the number of the last one of the page before.
    """
    query = _seen(sight).where(approvals.c.status == wanted.status).limit(limit)
    waits = wanted.status is ApprovalStatus.PENDING
    query = query.order_by(approvals.c.number if waits else approvals.c.number.desc())
    if wanted.context_id is not None:
        query = query.where(executions.c.context_id == wanted.context_id)
    if after is not None:
        query = query.where(approvals.c.number > after if waits else approvals.c.number < after)
    rows: Sequence[Row[Any]] = (await conn.execute(query)).all()
    return rows


async def find(conn: AsyncConnection, approval_id: str, sight: Sight) -> Row[Any] | None:
    """One request; None also where it is not to be seen."""
    try:
        query = _seen(sight).where(approvals.c.id == UUID(approval_id))
    except ValueError:
        return None
    found: Row[Any] | None = (await conn.execute(query)).one_or_none()
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
                require_comment=requires_comment(request.data),
                fingerprint=_fingerprint(request),
                resume_url=request.resume_url,
            )
            .returning(approvals)
        )
        new.append(added.one())
    return new


def _fingerprint(request: Request) -> UUID:
    digest = hashlib.blake2b(to_json([request.resume_url, request.data]), digest_size=16)
    return UUID(bytes=digest.digest())


async def _is_known(conn: AsyncConnection, request: Request) -> bool:
    """Whether this is a copy: one without a timestamp cannot be told from another event.

    Who says where the decision goes asks once at that address; others may ask the same again once it was decided.
    """
    query = select(approvals.c.id).where(
        approvals.c.run_id == request.run_id, approvals.c.fingerprint == _fingerprint(request)
    )
    if request.resume_url is None:
        query = query.where(_is_pending)
    return (await conn.execute(query.limit(1))).first() is not None


async def _is_rejected(conn: AsyncConnection, execution_id: UUID) -> bool:
    query = select(approvals.c.id).where(
        approvals.c.execution_id == execution_id, approvals.c.status == ApprovalStatus.REJECTED
    )
    return (await conn.execute(query.limit(1))).first() is not None


async def withdraw_for(conn: AsyncConnection, run_ids: Collection[str]) -> None:
    """Withdraws what runs have asked for that are over."""
    if run_ids:
        await _withdraw(conn, approvals.c.run_id == any_(literal(list(run_ids), ARRAY(String))))


async def _withdraw(conn: AsyncConnection, condition: Any) -> None:
    await conn.execute(
        update(approvals)
        .where(condition, _is_pending)
        .values(status=ApprovalStatus.WITHDRAWN, decided_at=func.clock_timestamp(), resume_url=None)
    )


async def statuses_of(conn: AsyncConnection, execution_ids: Collection[UUID]) -> dict[UUID, ApprovalStatus]:
    """Where executions stand with what they have asked for: rejected for good, else pending while anything is."""
    query = (
        select(approvals.c.execution_id, func.array_agg(approvals.c.status.distinct()).label("statuses"))
        .where(approvals.c.execution_id == any_(literal(list(execution_ids), ARRAY(Uuid))))
        .group_by(approvals.c.execution_id)
    )
    order = (ApprovalStatus.REJECTED, ApprovalStatus.PENDING, ApprovalStatus.APPROVED)
    found = {
        row.execution_id: next((each for each in order if each in row.statuses), None)
        for row in await conn.execute(query)
    }
    return {execution_id: status for execution_id, status in found.items() if status is not None}


async def rejected_runs(conn: AsyncConnection, execution_ids: Collection[UUID]) -> set[str]:
    """The runs whose own requests were rejected."""
    query = select(approvals.c.run_id).where(
        approvals.c.execution_id == any_(literal(list(execution_ids), ARRAY(Uuid))),
        approvals.c.status == ApprovalStatus.REJECTED,
    )
    return set(await conn.scalars(query))
