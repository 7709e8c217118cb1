"""The schema: migrations agree with the tables, go up and down, and leave room for the guide's own code."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database
from switchboard.jobs import PREFIX
from switchboard.migrate import config, migrate
from switchboard.tables import agent_runs, metadata
from tests.conftest import Servers, new_database, until

ROOT = Path(__file__).parents[1]

GUIDES_INSERT = text(
    "INSERT INTO agent_runs (run_id, context_id, name, description, status, metadata, created_at, updated_at) "
    "VALUES ('r', 'c', 'n', 'd', 'COMPLETED', '{\"result\": 1}', now(), now())"
)


AN_EVENT = text("INSERT INTO run_events (run_id, context_id, event_type, status) VALUES ('r', 'c', 'log', 'RUNNING')")


@pytest.fixture
async def empty_url(servers: Servers) -> AsyncIterator[str]:
    async with new_database(servers) as url:
        yield url


async def downgrade(url: str, to: str = "base") -> None:
    engine = database.connect(url)
    alembic = config()

    def down(connection: Connection) -> None:
        alembic.attributes["connection"] = connection
        command.downgrade(alembic, to)

    async with engine.begin() as conn:
        await conn.run_sync(down)
    await engine.dispose()


async def tables_in(url: str) -> set[str]:
    connection = await asyncpg.connect(database.dsn(url))
    rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    await connection.close()
    return {row["tablename"] for row in rows if not row["tablename"].startswith(PREFIX)}


async def test_the_migrations_build_what_the_tables_say(db: AsyncEngine):
    def differences(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": True,
                "target_metadata": metadata,
                "include_name": lambda name, kind, _: kind != "table" or not name.startswith(PREFIX),
            },
        )
        return list(compare_metadata(context, metadata))

    async with db.connect() as conn:
        assert await conn.run_sync(differences) == []


async def test_whoever_reads_for_long_holds_up_the_migration_and_nobody_else(empty_url: str):
    await migrate(empty_url)
    await downgrade(empty_url, "0005")
    reader, writer = [await asyncpg.connect(database.dsn(empty_url)) for _ in range(2)]
    async with reader.transaction():
        await reader.execute("SELECT FROM run_events")
        migrating = asyncio.create_task(migrate(empty_url))
        tries = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%DO $$%LOOP%'"
        await until(lambda: writer.fetchval(f"{tries} AND wait_event = 'PgSleep'"))
        async with asyncio.timeout(5):
            await writer.execute(AN_EVENT.text)
        assert not migrating.done()
    await migrating
    assert await writer.fetchval("SELECT count(*) FROM run_events") == 1
    await reader.close()
    await writer.close()


@pytest.mark.parametrize(
    ("what", "whose", "name"),
    [
        ("pg_get_constraintdef(oid)", "pg_constraint WHERE contype = 'c'", "conrelid::regclass::text"),
        ("pg_get_indexdef(indexrelid)", "pg_index WHERE true", "indrelid::regclass::text"),
        ("unnest(reloptions)", "pg_class WHERE true", "oid::regclass::text"),
    ],
    ids=["check constraints", "indexes", "storage"],
)
async def test_what_alembic_does_not_compare_agrees_too(
    db: AsyncEngine, servers: Servers, what: str, whose: str, name: str
):
    query = f"SELECT {name}, {what} FROM {whose} AND {name} = ANY (ARRAY{list(metadata.tables)}) ORDER BY 1, 2"
    async with db.connect() as conn:
        migrated = (await conn.execute(text(query))).all()
    async with new_database(servers) as url:
        engine = database.connect(url)
        async with engine.begin() as conn:
            await conn.run_sync(metadata.create_all)
            created = (await conn.execute(text(query))).all()
        await engine.dispose()
    assert migrated == created
    assert migrated


async def test_up_and_down_on_an_empty_database(empty_url: str):
    await migrate(empty_url)
    assert await tables_in(empty_url) == {*metadata.tables, "alembic_version"}
    await migrate(empty_url)
    await downgrade(empty_url)
    assert await tables_in(empty_url) == {"alembic_version"}
    await migrate(empty_url)


async def test_down_and_up_on_a_filled_database(empty_url: str):
    await migrate(empty_url)
    engine = database.connect(empty_url)
    async with engine.begin() as conn:
        await conn.execute(GUIDES_INSERT)
        for table, values in {
            "executions": "(id, workflow_id, context_id, input) VALUES (gen_random_uuid(), 'w', 'c', '{}')",
            "run_events": "(run_id, context_id, event_type, status) VALUES ('r', 'c', 'log', 'RUNNING')",
            "held_callbacks": "(run_id, event_type) VALUES ('q', 'log')",
        }.items():
            await conn.execute(text(f"INSERT INTO {table} {values}"))
    await engine.dispose()
    await downgrade(empty_url)
    assert await tables_in(empty_url) == {"alembic_version"}
    await migrate(empty_url)


async def test_what_was_stored_before_there_were_keys_keeps_its_place(empty_url: str):
    await migrate(empty_url)
    await downgrade(empty_url, "0002")
    engine = database.connect(empty_url)
    async with engine.begin() as conn:
        for workflow in ("default", "another"):
            for statement in (
                "INSERT INTO agent_runs (run_id, context_id, workflow_id) VALUES (:workflow, 'c', :workflow)",
                "INSERT INTO run_events (run_id, context_id, event_type, status) VALUES (:workflow, '', '', 'RUNNING')",
            ):
                await conn.execute(text(statement), {"workflow": workflow})
    await migrate(empty_url)
    async with engine.begin() as conn:
        events = (await conn.execute(text("SELECT run_id, workflow_id FROM run_events ORDER BY id"))).all()
        assert events == [("default", "default"), ("another", "another")]
        # Two owners may use the same key.
        for owner in ("", "one"):
            statement = (
                "INSERT INTO executions (id, workflow_id, context_id, input, owner, idempotency_key) "
                "VALUES (gen_random_uuid(), 'w', 'c', '{}', :owner, 'k')"
            )
            await conn.execute(text(statement), {"owner": owner})
    await downgrade(empty_url, "0002")
    async with engine.connect() as conn:
        keys = await conn.scalars(text("SELECT idempotency_key FROM executions ORDER BY 1"))
        assert keys.all() == ["k", None], "one of them keeps it"
    await engine.dispose()


async def test_several_processes_may_migrate_at_once(empty_url: str):
    environment = os.environ | {"DATABASE_URL": empty_url, "REDIS_URL": "redis://unused"}
    command_line = (sys.executable, "-m", "switchboard", "migrate")
    processes = [await asyncio.create_subprocess_exec(*command_line, env=environment) for _ in range(3)]
    assert await asyncio.gather(*(process.wait() for process in processes)) == [0, 0, 0]
    assert await tables_in(empty_url) == {*metadata.tables, "alembic_version"}


async def test_an_insert_of_the_guides_columns_alone_works(empty_url: str):
    await migrate(empty_url)
    engine = database.connect(empty_url)
    async with engine.begin() as conn:
        await conn.execute(GUIDES_INSERT)
        await conn.execute(text("INSERT INTO agent_runs (run_id, context_id) VALUES ('least', 'c')"))
        rows = (await conn.execute(select(agent_runs).order_by(agent_runs.c.id))).all()
    await engine.dispose()
    assert [(row.status, row.workflow_id, row.timed_out) for row in rows] == [
        ("COMPLETED", "default", False),
        ("PENDING", "default", False),
    ]


async def test_the_guides_table_is_there_under_the_guides_names(db: AsyncEngine):
    async with db.connect() as conn:
        columns = await conn.execute(
            text(
                "SELECT column_name, data_type, character_maximum_length FROM information_schema.columns "
                "WHERE table_name = 'agent_runs'"
            )
        )
        found = {row[0]: (row[1], row[2]) for row in columns}
        indexes = set(await conn.scalars(text("SELECT indexdef FROM pg_indexes WHERE tablename = 'agent_runs'")))
    expected = {
        "id": ("bigint", None),
        "run_id": ("character varying", 255),
        "context_id": ("character varying", 255),
        "name": ("character varying", 255),
        "description": ("text", None),
        "status": ("character varying", 50),
        "metadata": ("jsonb", None),
        "created_at": ("timestamp with time zone", None),
        "updated_at": ("timestamp with time zone", None),
    }
    assert found.items() >= expected.items()
    # They know the order of lists, too.
    for name, column in (("idx_agent_runs_context", "context_id"), ("idx_agent_runs_status", "status")):
        assert f"CREATE INDEX {name} ON public.agent_runs USING btree ({column}, created_at, id)" in indexes


async def test_a_status_that_nobody_knows_cannot_be_stored(db: AsyncEngine):
    with pytest.raises(Exception, match="agent_runs_status_known"):
        async with db.begin() as conn:
            await conn.execute(text("INSERT INTO agent_runs (run_id, context_id, status) VALUES ('x', 'c', 'done')"))


async def test_no_copy_of_an_event_can_be_stored(db: AsyncEngine):
    insert = text(
        "INSERT INTO run_events (run_id, context_id, event_type, status, dedupe_key) "
        "VALUES (:run_id, 'c', 'log', 'RUNNING', :key)"
    )
    event = {"run_id": f"run_{uuid4().hex}", "key": uuid4()}
    async with db.begin() as conn:
        await conn.execute(insert, [event, event | {"key": None}, event | {"key": None}])
    with pytest.raises(IntegrityError):
        async with db.begin() as conn:
            await conn.execute(insert, event)


@pytest.fixture
async def before_local_indexes(empty_url: str) -> AsyncIterator[AsyncEngine]:
    """A database with an event, just before indexes are built beside the traffic."""
    await migrate(empty_url)
    await downgrade(empty_url, "0005")
    engine = database.connect(empty_url)
    async with engine.begin() as conn:
        await conn.execute(GUIDES_INSERT)
        await conn.execute(AN_EVENT)
    yield engine
    await engine.dispose()


async def test_callbacks_are_taken_while_indexes_are_built(before_local_indexes: AsyncEngine, empty_url: str):
    waits = text(
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND query LIKE 'CREATE%INDEX%' AND wait_event_type = 'Lock'"
    )
    async with before_local_indexes.connect() as conn, before_local_indexes.connect() as other:
        # Who has begun to write is waited for.
        await conn.execute(AN_EVENT)
        migration = asyncio.create_task(migrate(empty_url))
        while not await other.scalar(waits):
            await other.rollback()
            assert not migration.done()
        await other.execute(text("SET LOCAL lock_timeout = '1s'"))
        await other.execute(AN_EVENT)
        await other.commit()
        await conn.commit()
        await migration
        assert await other.scalar(text("SELECT count(*) FROM run_events")) == 3


async def test_a_migration_that_was_interrupted_goes_on(before_local_indexes: AsyncEngine, empty_url: str):
    """What it leaves half done has the name of what is to be there."""
    names = "('idx_run_events_dedupe', 'idx_agent_runs_status')"
    async with before_local_indexes.begin() as conn:
        await conn.execute(text("CREATE INDEX idx_run_events_dedupe ON run_events (run_id)"))
        await conn.execute(text("CREATE INDEX idx_agent_runs_status_newest ON agent_runs (status)"))
        await conn.execute(text("DROP INDEX idx_agent_runs_status"))
    await migrate(empty_url)
    async with before_local_indexes.connect() as conn:
        found = sorted(await conn.scalars(text(f"SELECT indexdef FROM pg_indexes WHERE indexname IN {names}")))
    assert [definition[definition.index("(") :] for definition in found] == [
        "(status, created_at, id)",
        "(run_id, dedupe_key) WHERE (dedupe_key IS NOT NULL)",
    ]


async def test_alembic_itself_finds_its_way(empty_url: str, monkeypatch: pytest.MonkeyPatch):
    """`alembic upgrade head` and `downgrade base`, as its own documentation says."""
    for direction in (["upgrade", "head"], ["downgrade", "base"]):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "alembic", *direction, cwd=ROOT, env=os.environ | {"DATABASE_URL": empty_url}
        )
        assert await process.wait() == 0
    assert await tables_in(empty_url) == {"alembic_version"}


def test_there_is_one_newest_revision():
    assert len(ScriptDirectory.from_config(config()).get_heads()) == 1
