"""Deleting what has been over for longer than it is to be kept."""

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import (
    ARRAY,
    CollectionAggregate,
    ColumnElement,
    Select,
    String,
    Uuid,
    and_,
    any_,
    cast,
    delete,
    func,
    literal,
    or_,
    select,
    true,
    tuple_,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from switchboard.errors import will_pass
from switchboard.jobs import DECIDE, RECONCILE, is_queued
from switchboard.runs.ingest import TURN
from switchboard.runs.reconcile import GIVE_UP_AFTER
from switchboard.tables import (
    FINAL,
    DeliveryStatus,
    ExecutionStatus,
    agent_runs,
    approvals,
    deliveries,
    executions,
    run_events,
    run_records,
)

log = structlog.stdlib.get_logger(__name__)

_AT_ONCE, _EVENTS_AT_ONCE = 50, 1_000
"""Executions or runs, and events, that go in one turn, which callbacks wait for: for about 15 ms on two cores, where
there are 200,000 runs and 2 million events."""

_OVER = (ExecutionStatus.COMPLETED, ExecutionStatus.FAILED, ExecutionStatus.CANCELLED)


@dataclass(slots=True)
class Pruned:
    """How much was deleted."""

    executions: int = 0
    runs: int = 0
    events: int = 0


@dataclass(slots=True)
class _Batch:
    """What may be deleted together: executions with all their runs, and runs without an execution."""

    executions: list[UUID] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)


async def prune(db: AsyncEngine, days: int, stopping: asyncio.Event) -> Pruned:
    """Deletes what has been over for more than so many days, batch by batch, until `stopping` is set.

    An execution goes with all its runs or stays with all of them: what becomes of it is read from them.
    """
    pruned = Pruned()
    try:
        await _prune(db, days, stopping, pruned)
    except (SQLAlchemyError, OSError) as error:
        if not will_pass(error):
            raise
        log.warning("pruning pauses", error=error)
    if pruned.executions or pruned.runs or pruned.events:
        log.info("old runs deleted", runs=pruned.runs, events=pruned.events, executions=pruned.executions)
    return pruned


async def _prune(db: AsyncEngine, days: int, stopping: asyncio.Event, pruned: Pruned) -> None:
    async for batch, limit in _candidates(db, days):
        done = False
        while not done:
            if stopping.is_set():
                return
            async with db.begin() as conn:
                # A writer's, so that no callback is taken for a run that is about to be gone.
                await conn.execute(TURN)
                done = await _delete(conn, batch, limit, pruned)


async def _candidates(db: AsyncEngine, days: int) -> AsyncIterator[tuple[_Batch, datetime]]:
    """What may be old enough, the oldest first, and since when it must have been over."""
    async with db.connect() as conn:
        limit: datetime = (await conn.execute(select(func.now() - timedelta(days=days)))).scalar_one()
    # By when they began, of which there are indexes; they were over later.
    for status in (*_OVER, ExecutionStatus.SUBMISSION_UNKNOWN):
        begun = select(executions.c.created_at, executions.c.id).where(
            executions.c.status == status, executions.c.created_at < limit, _was_over(limit)
        )
        async for page in _pages(db, begun):
            yield _Batch(executions=[row.id for row in page]), limit
    alone = select(agent_runs.c.created_at, agent_runs.c.id, agent_runs.c.run_id).where(
        agent_runs.c.created_at < limit, agent_runs.c.execution_id.is_(None), _is_ripe(limit)
    )
    async for page in _pages(db, alone):
        yield _Batch(runs=[row.run_id for row in page]), limit


async def _pages(db: AsyncEngine, query: Select[Any]) -> AsyncIterator[Sequence[Any]]:
    created_at, number = query.selected_columns[:2]
    wanted = query.order_by(created_at, number).limit(_AT_ONCE)
    page_query = wanted
    while True:
        async with db.connect() as conn:
            page = (await conn.execute(page_query)).all()
        if page:
            yield page
        if len(page) < _AT_ONCE:
            return
        page_query = wanted.where(tuple_(created_at, number) > tuple_(*page[-1][:2]))


def _was_over(limit: datetime) -> ColumnElement[bool]:
    """Whether an execution was over by then; one that HappyRobot never confirmed, if nobody waits any more."""
    return or_(
        and_(executions.c.status.in_(_OVER), func.coalesce(executions.c.completed_at, executions.c.updated_at) < limit),
        and_(executions.c.status == ExecutionStatus.SUBMISSION_UNKNOWN, executions.c.completed_at < limit),
    )


def _is_ripe(limit: datetime) -> ColumnElement[bool]:
    """Whether a run was over by then, and HappyRobot is not asked about it any more."""
    given_up = func.now() - timedelta(seconds=GIVE_UP_AFTER)
    return and_(
        agent_runs.c.status.in_(FINAL),
        func.coalesce(agent_runs.c.completed_at, agent_runs.c.updated_at) < limit,
        or_(~agent_runs.c.timed_out, agent_runs.c.updated_at < given_up),
        ~is_queued(RECONCILE, agent_runs.c.run_id),
    )


async def _delete(conn: AsyncConnection, batch: _Batch, limit: datetime, pruned: Pruned) -> bool:
    """Deletes of a batch what is ripe as things stand in this turn; False if there was more than fits into one."""
    ripe = await _ripe_executions(conn, batch.executions, limit)
    run_ids = await _ripe_runs(conn, ripe, batch.runs, limit)
    events = await _delete_events(conn, run_ids)
    pruned.events += events
    if events == _EVENTS_AT_ONCE:
        return False  # the events first: nothing would lead to those of a run that is gone
    gone = await conn.execute(delete(agent_runs).where(agent_runs.c.run_id == _any_run(run_ids)))
    pruned.runs += gone.rowcount
    # After the runs: whoever keeps a record has locked its run, and has written it by now.
    await conn.execute(delete(run_records).where(run_records.c.run_id == _any_run(run_ids)))
    await conn.execute(delete(approvals).where(approvals.c.execution_id == _any_execution(ripe)))
    await conn.execute(delete(deliveries).where(deliveries.c.execution_id == _any_execution(ripe)))
    gone = await conn.execute(delete(executions).where(executions.c.id == _any_execution(ripe)))
    pruned.executions += gone.rowcount
    return True


async def _ripe_executions(conn: AsyncConnection, ids: Collection[UUID], limit: datetime) -> set[UUID]:
    """Those of which everything is over, their runs and all that somebody is told of them."""
    if not ids:
        return set()
    over = select(executions.c.id).where(executions.c.id == _any_execution(ids), _was_over(limit))
    runs = select(agent_runs.c.execution_id).where(agent_runs.c.execution_id == _any_execution(ids), ~_is_ripe(limit))
    # HappyRobot is still being told. What nobody has decided is of no use to runs that are over, be it by our guess.
    is_told = is_queued(DECIDE, cast(approvals.c.id, String))
    asked = select(approvals.c.execution_id).where(approvals.c.execution_id == _any_execution(ids), is_told)
    # Locked, so that none is sent again while it is deleted.
    posted = (
        select(deliveries.c.execution_id, deliveries.c.status)
        .where(deliveries.c.execution_id == _any_execution(ids))
        .with_for_update()
    )
    told = {row.execution_id for row in await conn.execute(posted) if row.status == DeliveryStatus.PENDING}
    return {*await conn.scalars(over)} - {*await conn.scalars(runs), *await conn.scalars(asked)} - told


async def _ripe_runs(
    conn: AsyncConnection, execution_ids: Collection[UUID], run_ids: Collection[str], limit: datetime
) -> list[str]:
    """The runs of executions that are ripe, and which of those without an execution are."""
    theirs = select(agent_runs.c.run_id).where(agent_runs.c.execution_id == _any_execution(execution_ids))
    alone = select(agent_runs.c.run_id).where(
        agent_runs.c.run_id == _any_run(run_ids), agent_runs.c.execution_id.is_(None), _is_ripe(limit)
    )
    return [*await conn.scalars(theirs), *await conn.scalars(alone)]


async def _delete_events(conn: AsyncConnection, run_ids: Collection[str]) -> int:
    """Deletes events of runs, so many at most; returns how many there were."""
    run = func.unnest(literal(list(run_ids), ARRAY(String))).table_valued("id").render_derived("run")
    # Run by run: asked for all of them at once, PostgreSQL may prefer to read the whole table.
    found = (
        select(run_events.c.id).where(run_events.c.run_id == run.c.id).order_by(run_events.c.id).limit(_EVENTS_AT_ONCE)
    ).lateral("found")
    ids = select(found.c.id).select_from(run.join(found, true())).limit(_EVENTS_AT_ONCE)
    return (await conn.execute(delete(run_events).where(run_events.c.id.in_(ids)))).rowcount


def _any_execution(ids: Collection[UUID]) -> CollectionAggregate[Any]:
    return any_(literal(list(ids), ARRAY(Uuid)))


def _any_run(run_ids: Collection[str]) -> CollectionAggregate[Any]:
    return any_(literal(list(run_ids), ARRAY(String)))
