"""HappyRobot's records of runs that are over, kept: HappyRobot itself forgets them after a while."""

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from switchboard.happyrobot.records import RunRecord
from switchboard.tables import agent_runs, run_records


async def keep(db: AsyncEngine, run_id: str, record: RunRecord) -> RunRecord:
    """Keeps a record, with what only an older one still has; returns what is kept.

    One whose content HappyRobot has deleted already is not worth it, if it is the first.
    """
    async with db.begin() as conn:
        # One after the other, also while there is no row to lock: else the last one would be all that is kept.
        await conn.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"record {run_id}", 0))))
        # Not of a run that is deleted meanwhile: nothing would lead to its record any more.
        known = select(agent_runs.c.id).where(agent_runs.c.run_id == run_id).with_for_update(read=True, key_share=True)
        if await conn.scalar(known) is None:
            return record
        older = await kept(conn, run_id)
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


async def kept(conn: AsyncConnection, run_id: str) -> RunRecord | None:
    found = await conn.scalar(select(run_records.c.record).where(run_records.c.run_id == run_id))
    return None if found is None else RunRecord.model_validate(found)
