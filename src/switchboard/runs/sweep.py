"""Putting in order what was left behind: by processes that were killed, and by jobs that were lost."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial

import structlog
from sqlalchemy import String, and_, cast, func, or_, select
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import jobs
from switchboard.runs.intake import Intake
from switchboard.runs.reconcile import GIVE_UP_AFTER
from switchboard.runs.sorting import GivenUp, Unconfirmed
from switchboard.runs.trigger import STOPPED
from switchboard.tables import FINAL, ExecutionStatus, RunStatus, agent_runs, deliveries, executions

log = structlog.stdlib.get_logger(__name__)

_AT_ONCE = 1000
"""Runs or executions in one sweep; the next one goes on."""


_LOST = timedelta(minutes=1)
"""How long something waits that has a job, at least before it is taken to have lost it."""


async def sweep(db: AsyncEngine, intake: Intake, reconcile_after: float, stale_after: float) -> None:
    """Settles executions whose process is gone, does what nobody does, and puts the queue in order.

    What cannot be done now keeps nothing else from being done; then what was raised first is raised in the end.
    """
    parts: Mapping[str, Callable[[], Awaitable[None]]] = {
        "executions whose process is gone": partial(_settle, db, intake),
        "executions that nobody confirmed": partial(_give_up, db, intake, stale_after),
        "runs that nobody watches": partial(_watch, db, reconcile_after),
        "jobs that were lost": partial(_find_lost, db),
        "the queue": partial(_tidy, db),
    }
    failures: list[Exception] = []
    for what, part in parts.items():
        try:
            await part()
        except Exception as error:  # noqa: BLE001  # raised below
            log.warning("what was left behind waits", what=what, error=error)
            failures.append(error)
    if failures:
        raise failures[0]


async def _settle(db: AsyncEngine, intake: Intake) -> None:
    query = (
        select(executions.c.id)
        .where(executions.c.status == ExecutionStatus.PENDING, executions.c.answer_by < func.now())
        .limit(_AT_ONCE)
    )
    async with db.connect() as conn:
        lost = list(await conn.scalars(query))
    for execution_id in lost:
        log.warning("execution unconfirmed; the process that placed its call is gone", execution_id=execution_id)
    # Never sent again: their calls may have been placed.
    await _take_all(intake, [Unconfirmed(each, ExecutionStatus.SUBMISSION_UNKNOWN, STOPPED) for each in lost])


async def _give_up(db: AsyncEngine, intake: Intake, stale_after: float) -> None:
    """Waits no more for executions that HappyRobot never confirmed; a callback that names one still finds it."""
    query = (
        select(executions.c.id)
        .where(
            executions.c.status == ExecutionStatus.SUBMISSION_UNKNOWN,
            executions.c.completed_at.is_(None),
            executions.c.updated_at < func.now() - timedelta(seconds=stale_after),
        )
        .limit(_AT_ONCE)
    )
    async with db.connect() as conn:
        lost = list(await conn.scalars(query))
    await _take_all(intake, [GivenUp(each) for each in lost])


async def _take_all(intake: Intake, news: Sequence[Unconfirmed | GivenUp]) -> None:
    """Writes what it can, together; raises what was raised first."""
    for outcome in await asyncio.gather(*map(intake.take, news), return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def _find_lost(db: AsyncEngine) -> None:
    """Sees to it that what is accepted is started, and what is posted is sent."""
    long_ago = func.now() - _LOST
    for job, table, waits in (
        (jobs.START, executions, executions.c.answer_by.is_(None) & (executions.c.created_at < long_ago)),
        (jobs.DELIVER, deliveries, deliveries.c.due_at < long_ago),
    ):
        is_pending = table.c.status == "pending"  # of both
        subject = cast(table.c.id, String)
        query = select(subject).where(is_pending, waits, ~jobs.is_queued(job, subject)).limit(_AT_ONCE)
        async with db.begin() as conn:
            found = list(await conn.scalars(query))
            await jobs.enqueue(conn, [jobs.Job(job, each) for each in found])


async def _watch(db: AsyncEngine, reconcile_after: float) -> None:
    """Sees to it that every run is asked about of which we do not know the end, also those that others inserted."""
    under_way = agent_runs.c.status.in_([status for status in RunStatus if status not in FINAL])
    given_up = and_(agent_runs.c.timed_out, agent_runs.c.updated_at > func.now() - timedelta(seconds=GIVE_UP_AFTER))
    unwatched = ~jobs.is_queued(jobs.RECONCILE, agent_runs.c.run_id)
    query = select(agent_runs.c.run_id).where(or_(under_way, given_up), unwatched).limit(_AT_ONCE)
    async with db.begin() as conn:
        found = list(await conn.scalars(query))
        await jobs.enqueue(conn, [jobs.Job(jobs.RECONCILE, run_id, reconcile_after) for run_id in found])


async def _tidy(db: AsyncEngine) -> None:
    async with db.begin() as conn:
        await jobs.revive(conn)
        await jobs.tidy(conn)
