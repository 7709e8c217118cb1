"""HappyRobot's own record of a run: asked for each time, and kept once the run is over, for when it cannot be."""

import asyncio
from typing import Literal

from pydantic import Field
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.errors import NotConfigured, NotFound, Unavailable
from switchboard.happyrobot.client import POLL, READ, Effort, HappyRobot, NoAnswer, NoKey, NotKnown
from switchboard.happyrobot.records import Recording, RunRecord
from switchboard.runs import archive
from switchboard.runs.asking import take_in
from switchboard.runs.intake import Intake


class DetailsOut(RunRecord):
    """What HappyRobot knows about a run, in one shape whatever the version of its API."""

    run_id: str
    source: Literal["happyrobot", "database"] = Field(
        description="`database` where HappyRobot cannot be asked, or knows the run no longer."
    )
    recordings: list[Recording] | None = Field(
        description="Links that work for a day, made for this answer; null where HappyRobot could not be asked."
    )


async def details(db: AsyncEngine, happyrobot: HappyRobot, intake: Intake, run_id: str) -> DetailsOut:
    """HappyRobot's record, with what only the kept one still has; the kept one where HappyRobot gives none.

    Raises NotFound, Unavailable or NotConfigured where there is neither.
    """
    async with db.connect() as conn:
        kept = await archive.kept(conn, run_id)
    # Where the conversation is here already, nobody waits long for what may have been said of it since.
    effort = READ if kept is None else POLL
    record, links = await asyncio.gather(
        _asked(happyrobot, run_id, effort), _recordings_if_possible(happyrobot, run_id, effort)
    )
    if isinstance(record, NoAnswer):
        if kept is None:
            raise _said(record)
        return DetailsOut(**dict(kept), run_id=run_id, source="database", recordings=links)
    await take_in(db, intake, run_id, record)
    if record.over:
        record = await archive.keep(db, run_id, record)
    return DetailsOut(**dict(record), run_id=run_id, source="happyrobot", recordings=links)


async def recordings(happyrobot: HappyRobot, run_id: str) -> list[Recording]:
    """Links to a run's recordings. Raises NotFound, Unavailable or NotConfigured."""
    try:
        return await happyrobot.recordings(run_id, READ)
    except NoAnswer as error:
        raise _said(error) from error


async def _recordings_if_possible(happyrobot: HappyRobot, run_id: str, effort: Effort) -> list[Recording] | None:
    try:
        return await happyrobot.recordings(run_id, effort)
    except NoAnswer:
        return None


async def _asked(happyrobot: HappyRobot, run_id: str, effort: Effort) -> RunRecord | NoAnswer:
    # Returned and not raised: the one who also waits for recordings is not to be cancelled by it.
    try:
        return await happyrobot.record(run_id, effort)
    except NoAnswer as error:
        return error


def _said(error: NoAnswer) -> Exception:
    match error:
        case NotKnown():
            return NotFound(str(error))
        case NoKey():
            return NotConfigured(str(error))
        case _:
            return Unavailable(str(error))
