"""How many executions an API key may have in a month."""

from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.access.keys import ApiKey, get, this_month
from switchboard.errors import Forbidden
from switchboard.tables import api_key_usage


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
        raise Forbidden("API key usage limit exceeded")
