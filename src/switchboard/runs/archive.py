"""HappyRobot's records of runs that are over, kept: HappyRobot itself forgets them after a while."""

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from switchboard.happyrobot.records import RunRecord
from switchboard.tables import run_records


async def keep(db: AsyncEngine, run_id: str, record: RunRecord) -> RunRecord:
    """Keeps a record, with what only an older one still has; returns what is kept.

    One whose content HappyRobot has deleted already is not worth it, if it is the first.
    """
    async with db.begin() as conn:
        older = await kept(conn, run_id, and_hold=True)
        if older is None and record.hollow:
            return record
        newest = record if older is None else record.over_older(older)
        if newest != older:
            stored = newest.model_dump(mode="json")
            await conn.execute(
                upsert(run_records)
                .values(run_id=run_id, record=stored)
                .on_conflict_do_update(index_elements=["run_id"], set_={"record": stored})
            )
    return newest


async def kept(conn: AsyncConnection, run_id: str, *, and_hold: bool = False) -> RunRecord | None:
    """The kept record; held against other writers until the end of the transaction, if wanted."""
    query = select(run_records.c.record).where(run_records.c.run_id == run_id)
    found = await conn.scalar(query.with_for_update() if and_hold else query)
    return None if found is None else RunRecord.model_validate(found)
