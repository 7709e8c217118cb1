"""Putting in order what was left behind: by processes that were killed, and by jobs that were lost."""

import logging

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import jobs
from switchboard.runs.intake import Intake
from switchboard.runs.sorting import Unconfirmed
from switchboard.tables import FINAL, ExecutionStatus, RunStatus, agent_runs, executions

log = logging.getLogger(__name__)

_AT_ONCE = 1000
"""Runs or executions in one sweep; the next one goes on."""


async def sweep(db: AsyncEngine, intake: Intake, reconcile_after: float) -> None:
    """Settles executions whose process is gone, watches runs that nobody watches, and tidies the queue's log."""
    await _settle(db, intake)
    await _watch(db, reconcile_after)
    async with db.begin() as conn:
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
        log.warning("execution %s is submission_unknown: the process that placed its call is gone", execution_id)
        # Never sent again: the call may have been placed.
        error = "The service stopped before HappyRobot's answer was known"
        await intake.take(Unconfirmed(execution_id, ExecutionStatus.SUBMISSION_UNKNOWN, error))


async def _watch(db: AsyncEngine, reconcile_after: float) -> None:
    """Sees to it that every run under way is asked about, also those that somebody else inserted."""
    under_way = [status for status in RunStatus if status not in FINAL]
    query = (
        select(agent_runs.c.run_id)
        .where(agent_runs.c.status.in_(under_way), ~jobs.is_queued(jobs.RECONCILE, agent_runs.c.run_id))
        .limit(_AT_ONCE)
    )
    async with db.begin() as conn:
        unwatched = list(await conn.scalars(query))
        await jobs.enqueue(conn, [jobs.Job(jobs.RECONCILE, run_id, reconcile_after) for run_id in unwatched])
