"""How Alembic reaches the database: `DATABASE_URL`, or the connection that the caller brings."""

import asyncio

from alembic import context
from sqlalchemy import Connection, text

from switchboard.database import connect
from switchboard.jobs import PREFIX
from switchboard.settings import Settings
from switchboard.tables import metadata

# Several replicas may start at once; one migrates, the others wait and find nothing to do. They ask again and again: an
# index that is built beside the traffic waits for every transaction that is older, and would for ever for one that
# waits itself.
_ONE_AT_A_TIME = text("SELECT pg_try_advisory_xact_lock(4848107521966110288)")
# Said after it: until the next statement PostgreSQL keeps what that one has seen, and such a transaction is waited for.
_WHILE_IT_LASTS = text("SET LOCAL idle_in_transaction_session_timeout = 0")
_PAUSE = text("SELECT pg_sleep(0.1)")
# Of one who was killed PostgreSQL goes on building the index.
_STILL_BUILDING = text("SELECT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE datname = current_database())")


def ours(name: str | None, kind: str, _: object) -> bool:
    """Whether a table is for us to compare, and not PgQueuer's."""
    return kind != "table" or not (name or "").startswith(PREFIX)


def run(connection: Connection) -> None:
    # The lock is another connection's, for migrations may commit on their way.
    with connection.engine.connect() as lock:
        while not lock.scalar(_ONE_AT_A_TIME) or lock.scalar(_STILL_BUILDING):
            lock.rollback()
            lock.execute(_PAUSE)
            lock.rollback()
        lock.execute(_WHILE_IT_LASTS)
        context.configure(connection=connection, target_metadata=metadata, include_name=ours)
        with context.begin_transaction():
            context.run_migrations()


async def run_alone() -> None:
    url = Settings().database_url
    if url is None:
        raise SystemExit("DATABASE_URL is not set; `switchboard migrate` reaches the embedded server")
    engine = connect(url.get_secret_value(), statement_timeout=None)
    try:
        async with engine.connect() as connection:
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
