"""What HappyRobot says when it is asked, taken in as any other news."""

from functools import partial

from sqlalchemy import func, or_, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.database import singly
from switchboard.events import NewEvent
from switchboard.happyrobot.lookups import TakeIn
from switchboard.happyrobot.records import RunRecord
from switchboard.runs.archive import keep
from switchboard.runs.intake import Intake
from switchboard.runs.status import Standing, advance
from switchboard.tables import RunStatus, agent_runs

_OFTEN_ENOUGH = text("interval '10 seconds'")
"""Between two notes that HappyRobot knows a run: browsers ask about it every few seconds."""


def listener(db: AsyncEngine, intake: Intake, *, keeps: bool) -> TakeIn:
    """Takes in what `Lookups` hear; keeps the records too, where a single answer has all of a run."""
    return partial(_heard, db, intake, keeps=keeps)


async def _heard(db: AsyncEngine, intake: Intake, run_id: str, record: RunRecord | None, *, keeps: bool) -> None:
    await _note(db, run_id)
    if record is not None:
        await take_in(db, intake, run_id, record)
        if keeps and record.over:
            await keep(db, run_id, record)


async def take_in(db: AsyncEngine, intake: Intake, run_id: str, record: RunRecord) -> None:
    """Moves a run as HappyRobot's record of it says."""
    word = record.run_status
    if word is None:
        return
    async with db.connect() as conn:
        row = (
            await conn.execute(select(agent_runs.c.status, agent_runs.c.timed_out).where(agent_runs.c.run_id == run_id))
        ).one_or_none()
    if row is None:
        return
    standing = Standing(RunStatus(row.status), row.timed_out)
    if advance(standing, word) != standing:
        # Something else may have moved it by now: the writer sees to it that it is news.
        await intake.take(NewEvent(run_id, "status", {"status": word.lower()}, word, only_if_it_moves=True))


async def _note(db: AsyncEngine, run_id: str) -> None:
    """Notes that HappyRobot still knows the run: it is not lost, however silent."""
    long_ago = or_(agent_runs.c.heard_at.is_(None), agent_runs.c.heard_at < func.now() - _OFTEN_ENOUGH)
    # A single statement: should the network go now, the row is not left locked.
    async with singly(db).connect() as conn:
        await conn.execute(
            update(agent_runs).where(agent_runs.c.run_id == run_id, long_ago).values(heard_at=func.now())
        )
