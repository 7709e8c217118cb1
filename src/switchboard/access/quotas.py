"""How many executions an API key may have in a month."""

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.access.keys import ApiKey, get, this_month
from switchboard.errors import Forbidden
from switchboard.tables import api_key_usage

_EXCEEDED = "API key usage limit exceeded"


async def require_room(conn: AsyncConnection, key: ApiKey) -> None:
    """Raises Forbidden where a key has had all executions of this month, without waiting for anybody.

    Whoever it lets through may still be one too many.
    """
    if key.monthly_limit is None:
        return
    query = select(api_key_usage.c.executions).where(
        api_key_usage.c.key_id == key.id, api_key_usage.c.month == this_month()
    )
    if (await conn.scalar(query) or 0) >= key.monthly_limit:
        raise Forbidden(_EXCEEDED)


async def count_one(conn: AsyncConnection, key: ApiKey) -> None:
    """Counts an execution of a key in the caller's transaction: it counts if the execution is stored.

    Raises Forbidden where it would be one too many, and for a key that has been revoked since the request began. Those
    who come at the same instant wait for each other's commit.
    """
    current = await get(conn, key.id)
    if current is None or not current.good:
        raise Forbidden("API key is inactive")
    so_far = api_key_usage.c.executions
    counted = await conn.execute(
        upsert(api_key_usage)
        .values(key_id=key.id, month=this_month(), executions=1)
        .on_conflict_do_update(
            index_elements=["key_id", "month"],
            set_={"executions": so_far + 1},
            where=None if key.monthly_limit is None else so_far < key.monthly_limit,
        )
    )
    if counted.rowcount == 0:
        raise Forbidden(_EXCEEDED)
