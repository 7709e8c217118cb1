"""HappyRobot's own record of a run: asked for while the run is under way, kept once it is over."""

import asyncio
from typing import Literal

from pydantic import Field
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.errors import NotConfigured, NotFound, Unavailable
from switchboard.happyrobot.client import POLL, READ, Effort, HappyRobot, NoAnswer, NoKey, NotKnown
from switchboard.happyrobot.records import Recording, RunRecord
from switchboard.runs import archive


class DetailsOut(RunRecord):
    """What HappyRobot knows about a run, in one shape whatever the version of its API."""

    run_id: str
    source: Literal["happyrobot", "database"] = Field(
        description="`database` once the run is over and its record is kept here."
    )
    recordings: list[Recording] | None = Field(
        description="Links that work for a day, made for this answer; null where HappyRobot could not be asked."
    )


async def details(db: AsyncEngine, happyrobot: HappyRobot, run_id: str) -> DetailsOut:
    """The kept record, or HappyRobot's, which is kept if it is of a run that is over.

    Raises NotFound, Unavailable or NotConfigured where there is neither.
    """
    async with db.connect() as conn:
        kept = await archive.kept(conn, run_id)
    if kept is not None:
        # What matters is here: nobody waits long for the rest.
        links = await _recordings_if_possible(happyrobot, run_id, POLL)
        return DetailsOut(**dict(kept), run_id=run_id, source="database", recordings=links)
    record, links = await asyncio.gather(_asked(happyrobot, run_id), _recordings_if_possible(happyrobot, run_id, READ))
    if isinstance(record, NoAnswer):
        raise _said(record)
    if record.over:
        await archive.keep(db, run_id, record)
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


async def _asked(happyrobot: HappyRobot, run_id: str) -> RunRecord | NoAnswer:
    # Returned and not raised: the one who also waits for recordings is not to be cancelled by it.
    try:
        return await happyrobot.record(run_id, READ)
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
