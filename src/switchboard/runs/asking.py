"""What HappyRobot says when it is asked, taken in as any other news."""

from sqlalchemy import func, or_, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.events import NewEvent
from switchboard.happyrobot.client import Effort
from switchboard.happyrobot.lookups import Answer, Lookups
from switchboard.runs.archive import keep
from switchboard.runs.intake import Intake
from switchboard.runs.status import Standing, advance
from switchboard.tables import agent_runs

_OFTEN_ENOUGH = text("interval '10 seconds'")
"""Between two notes that HappyRobot knows a run: browsers ask about it every few seconds."""


async def ask(
    db: AsyncEngine,
    lookups: Lookups,
    intake: Intake,
    run_id: str,
    standing: Standing,
    effort: Effort,
    *,
    anew: bool = False,
) -> Answer:
    """Asks HappyRobot about a run that stands so; moves it as the answer says, and keeps the record of its end."""
    answer = await lookups.ask(run_id, effort, anew=anew)
    if answer.mine and answer.heard:
        await _heard(db, run_id)
    if answer.status is None:
        return answer
    if advance(standing, answer.status) != standing:
        # Others may ask at the same moment; the writer sees to it that one of them is recorded.
        word = answer.status.lower()
        await intake.take(NewEvent(run_id, "status", {"status": word}, answer.status, only_if_it_moves=True))
    if answer.record is not None and answer.record.over:
        await keep(db, run_id, answer.record)
    return answer


async def _heard(db: AsyncEngine, run_id: str) -> None:
    """Notes that HappyRobot still knows where the run stands: it is not lost, however silent."""
    long_ago = or_(agent_runs.c.heard_at.is_(None), agent_runs.c.heard_at < func.now() - _OFTEN_ENOUGH)
    async with db.begin() as conn:
        await conn.execute(
            update(agent_runs).where(agent_runs.c.run_id == run_id, long_ago).values(heard_at=func.now())
        )
