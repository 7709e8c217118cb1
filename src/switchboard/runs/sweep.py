"""Putting in order what was left behind: by processes that were killed, and by jobs that were lost."""

from datetime import timedelta

import structlog
from sqlalchemy import and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import jobs
from switchboard.runs.intake import Intake
from switchboard.runs.reconcile import GIVE_UP_AFTER
from switchboard.runs.sorting import Unconfirmed
from switchboard.runs.trigger import STOPPED
from switchboard.tables import FINAL, ExecutionStatus, RunStatus, agent_runs, executions

log = structlog.stdlib.get_logger(__name__)

_AT_ONCE = 1000
"""Runs or executions in one sweep; the next one goes on."""


async def sweep(db: AsyncEngine, intake: Intake, reconcile_after: float) -> None:
    """Settles executions whose process is gone, watches runs that nobody watches, and puts the queue in order."""
    await _settle(db, intake)
    await _watch(db, reconcile_after)
    async with db.begin() as conn:
        await jobs.revive(conn)
        await jobs.tidy(conn)


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
        # Never sent again: the call may have been placed.
        await intake.take(Unconfirmed(execution_id, ExecutionStatus.SUBMISSION_UNKNOWN, STOPPED))


async def _watch(db: AsyncEngine, reconcile_after: float) -> None:
    """Sees to it that every run is asked about of which we do not know the end, also those that others inserted."""
    under_way = agent_runs.c.status.in_([status for status in RunStatus if status not in FINAL])
    given_up = and_(agent_runs.c.timed_out, agent_runs.c.updated_at > func.now() - timedelta(seconds=GIVE_UP_AFTER))
    unwatched = ~jobs.is_queued(jobs.RECONCILE, agent_runs.c.run_id)
    query = select(agent_runs.c.run_id).where(or_(under_way, given_up), unwatched).limit(_AT_ONCE)
    async with db.begin() as conn:
        found = list(await conn.scalars(query))
        await jobs.enqueue(conn, [jobs.Job(jobs.RECONCILE, run_id, reconcile_after) for run_id in found])
