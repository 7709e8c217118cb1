"""HappyRobot's records of runs that are over, kept: HappyRobot itself forgets them after a while."""

from sqlalchemy import exists, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from switchboard.happyrobot.records import RunRecord
from switchboard.tables import run_records


async def keep(db: AsyncEngine, run_id: str, record: RunRecord) -> None:
    """Keeps a record; the first one stays. One whose content HappyRobot has deleted already is not worth it."""
    if record.hollow:
        return
    async with db.begin() as conn:
        await conn.execute(
            upsert(run_records)
            .values(run_id=run_id, record=record.model_dump(mode="json"))
            .on_conflict_do_nothing(index_elements=["run_id"])
        )


async def is_kept(conn: AsyncConnection, run_id: str) -> bool:
    return bool(await conn.scalar(select(exists().where(run_records.c.run_id == run_id))))


async def kept(conn: AsyncConnection, run_id: str) -> RunRecord | None:
    found = await conn.scalar(select(run_records.c.record).where(run_records.c.run_id == run_id))
    return None if found is None else RunRecord.model_validate(found)
