"""HappyRobot's own record of a run: asked for each time, and kept once the run is over, for when it cannot be."""

import asyncio
from typing import Literal

from pydantic import ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.errors import NotConfigured, NotFound, Unavailable
from switchboard.events import IdOfRun
from switchboard.happyrobot.client import POLL, READ, Effort, HappyRobot, NoAnswer, NoKey, NotKnown
from switchboard.happyrobot.records import Recording, RunRecord
from switchboard.runs import archive
from switchboard.runs.asking import take_in
from switchboard.runs.intake import Intake


class DetailsOut(RunRecord):
    """What HappyRobot knows about a run, in one shape whatever the version of its API."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "status": "completed",
                    "started_at": "2026-01-15T09:30:00.250Z",
                    "completed_at": "2026-01-15T09:31:12.004Z",
                    "annotation": "correct",
                    "sessions": [
                        {
                            "id": "session-1",
                            "status": "completed",
                            "type": "outbound",
                            "duration": 59.5,
                            "user_number": "+12025550142",
                            "timestamp": "2026-01-15T09:30:02.000Z",
                            "connected_at": "2026-01-15T09:30:12.500Z",
                            "messages": [
                                {
                                    "role": "assistant",
                                    "content": "Hi, this is Riley about order 123. Is this Blue Mesa Freight?",
                                },
                                {"role": "user", "content": "It is. The truck will be there at ten."},
                            ],
                        }
                    ],
                    "outputs": [
                        {
                            "session_id": "session-1",
                            "name": "Extract the answer",
                            "integration": "AI",
                            "event": "Extract",
                            "data": {"pickup_stands": True, "pickup_at": "10:00"},
                        }
                    ],
                    "issues": [],
                    "version": {"id": "version-7", "number": 7, "name": "Version 7", "is_live": True},
                    "run_id": "19184e4c-74ca-474a-8978-e77f5a661e4f",
                    "source": "happyrobot",
                    "recordings": [
                        {
                            "session_id": "session-1",
                            "url": "https://recordings.example.com/session-1.mp3?signature=c2ln",
                        }
                    ],
                }
            ]
        }
    )

    run_id: IdOfRun
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
