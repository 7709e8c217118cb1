"""How Alembic reaches the database: `DATABASE_URL`, or the connection that the caller brings."""

import asyncio

from alembic import context
from sqlalchemy import Connection, text

from switchboard.database import connect
from switchboard.jobs import PREFIX
from switchboard.settings import Settings
from switchboard.tables import metadata

# Several replicas may start at once; one migrates, the others wait and find nothing to do.
_ONE_AT_A_TIME = text("SELECT pg_advisory_xact_lock(4848107521966110287)")


def ours(name: str | None, kind: str, _: object) -> bool:
    """Whether a table is for us to compare, and not PgQueuer's."""
    return kind != "table" or not (name or "").startswith(PREFIX)


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, include_name=ours)
    with context.begin_transaction():
        connection.execute(_ONE_AT_A_TIME)
        context.run_migrations()


async def run_alone() -> None:
    url = Settings().database_url
    if url is None:
        raise SystemExit("DATABASE_URL is not set; `switchboard migrate` reaches the embedded server")
    engine = connect(url.get_secret_value(), statement_timeout=None)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(run)
    finally:
        await engine.dispose()


if context.is_offline_mode():
    context.configure(dialect_name="postgresql", target_metadata=metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
elif (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    asyncio.run(run_alone())
