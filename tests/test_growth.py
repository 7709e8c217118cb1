"""What is done often costs no more among a million runs and five million events than among a few.

Looked at is not what PostgreSQL plans for statements that a test would have to know, but what it has done for those
that the service really sent, also in functions of its own: its statistics of tables and indexes.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import text

from switchboard import database
from switchboard.events import Scope, read_events
from switchboard.runs import reconcile
from switchboard.runs.pruning import prune
from switchboard.runs.queries import Cursor, Filter, list_runs, metadata_of
from switchboard.runs.sweep import sweep
from switchboard.sight import EVERYTHING, Sight
from switchboard.tables import RunStatus
from tests.conftest import HOOK_KEY, Servers, Service, Upstream, running_service, settings_for, until

RUNS = 1_000_000
UNDER_WAY = 200
LOGS = 10_000
"""Of one run; it is among those under way."""

LARGE = ("agent_runs", "run_events", "executions", "deliveries", "approvals")

# One run in five has an execution; each began five seconds after the one before it, so that there are 58 days of them.
_ROWS = f"""
CREATE TEMPORARY TABLE made AS
SELECT *, CASE WHEN status <> 'RUNNING' THEN began + interval '90 s' END AS ended
FROM (SELECT
    number,
    md5('run ' || number)::uuid::text AS run_id,
    'order_' || md5((number / 3)::text) AS context_id,
    CASE WHEN number % 5000 = 0 THEN 'rare' WHEN number % 10 = 3 THEN 'often' ELSE 'default' END AS workflow_id,
    CASE WHEN number % 5 = 0 THEN md5('execution ' || number)::uuid END AS execution_id,
    CASE
        WHEN number > {RUNS - UNDER_WAY} THEN 'RUNNING'
        WHEN number % 50 = 3 THEN 'FAILED'
        WHEN number % 1000 = 1 THEN 'CANCELED'
        ELSE 'COMPLETED'
    END AS status,
    now() - ({RUNS} - number) * interval '5 seconds' AS began
FROM generate_series(1, {RUNS}) AS number) AS each;

INSERT INTO executions (
    id, workflow_id, context_id, name, status, input, created_at, updated_at, completed_at, began_at
)
SELECT
    execution_id, workflow_id, context_id, 'Call',
    CASE status
        WHEN 'RUNNING' THEN 'running' WHEN 'FAILED' THEN 'failed' WHEN 'CANCELED' THEN 'cancelled' ELSE 'completed'
    END,
    '{{"load": 1}}', began, began + interval '90 s', ended, began
FROM made WHERE execution_id IS NOT NULL;

INSERT INTO agent_runs (
    run_id, context_id, name, status, metadata, created_at, updated_at, workflow_id, execution_id, completed_at,
    timed_out
)
SELECT
    run_id, context_id, 'Call', status,
    CASE status WHEN 'COMPLETED' THEN '{{"result": {{"rate": 1}}}}' ELSE '{{}}' END::jsonb,
    began, began + interval '90 s', workflow_id, execution_id, ended, status = 'FAILED' AND number % 100 = 3
FROM made;

INSERT INTO run_events (run_id, context_id, workflow_id, event_type, status, data, created_at, dedupe_key)
SELECT
    run_id, context_id, workflow_id, 'log', 'RUNNING', '{{"message": "Blue Mesa Freight has answered"}}',
    began + place * interval '15 s', md5('event ' || number || ' ' || place)::uuid
FROM made, generate_series(1, 5) AS place;

INSERT INTO api_keys (name, scopes) VALUES ('customer', ARRAY['public']);

INSERT INTO deliveries (key_id, execution_id, event, body, status, created_at, finished_at)
SELECT
    api_keys.id, execution_id, 'execution.completed', '{{}}',
    CASE WHEN number % 1000 = 0 THEN 'failed' ELSE 'delivered' END, began, began
FROM made, api_keys WHERE execution_id IS NOT NULL;

INSERT INTO approvals (execution_id, run_id, status, fingerprint, created_at)
SELECT
    execution_id, run_id, CASE WHEN number > {RUNS - 100} THEN 'pending' ELSE 'approved' END,
    execution_id, began
FROM made WHERE number % 25 = 0;
"""

_MANY_LOGS = """
INSERT INTO run_events (run_id, context_id, event_type, status, data)
SELECT $1, 'c', 'log', 'RUNNING', '{"message": "Blue Mesa Freight has answered"}' FROM generate_series(1, $2::int)
"""


async def fill(conn: asyncpg.Connection) -> None:
    """Makes the rows, and the indexes after them, which is quicker by far."""
    await conn.execute("SET synchronous_commit = off; SET maintenance_work_mem = '256MB'; SET work_mem = '64MB'")
    constraints = await conn.fetch(
        "SELECT conrelid::regclass AS of, conname AS name, pg_get_constraintdef(oid) AS definition FROM pg_constraint "
        "WHERE conrelid::regclass::text = ANY ($1) AND contype IN ('p', 'u') AND NOT EXISTS "
        "(SELECT FROM pg_constraint AS other WHERE other.confrelid = pg_constraint.conrelid)",
        LARGE,
    )
    indexes = await conn.fetch(
        "SELECT indexname AS name, indexdef AS definition FROM pg_indexes "
        "WHERE tablename = ANY ($1) AND NOT EXISTS (SELECT FROM pg_constraint WHERE conname = indexname)",
        LARGE,
    )
    for index in indexes:
        await conn.execute(f"DROP INDEX {index['name']}")
    for constraint in constraints:
        await conn.execute(f"ALTER TABLE {constraint['of']} DROP CONSTRAINT {constraint['name']}")
    # By hand, at the end: whatever comes by itself is counted with what is looked at.
    for table in LARGE:
        await conn.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
    await conn.execute(_ROWS)
    for constraint in constraints:
        await conn.execute(
            f"ALTER TABLE {constraint['of']} ADD CONSTRAINT {constraint['name']} {constraint['definition']}"
        )
    for index in indexes:
        await conn.execute(index["definition"])


@dataclass(frozen=True)
class Ids:
    """What the rows are about."""

    run_id: str
    """Under way."""
    busy: str
    """Under way, with very many logs."""
    other: list[str]
    """More that are under way."""
    over: str
    """Over, half as old as the oldest."""
    context_id: str
    contexts: frozenset[str]
    cursor: str
    newest_event: int


@dataclass
class Large:
    """A database in which everything is there, and nothing happens but what is looked at."""

    url: str
    conn: asyncpg.Connection
    ids: Ids
    settings: Any

    async def touched_by(self, action: Callable[[Service], Awaitable[object]]) -> tuple[int, list[str]]:
        """How many blocks it has touched, of tables and indexes, and which large tables it has read from end to end."""
        before = await self._counted()
        async with running_service(self.settings) as service:
            await action(service)
        after = await self._counted()
        blocks = sum(after[table]["blocks"] - before[table]["blocks"] for table in after)
        return blocks, [table for table in LARGE if after[table]["scans"] > before[table]["scans"]]

    async def _counted(self) -> dict[str, asyncpg.Record]:
        # Each connection tells what it has done when it is closed.
        async def alone() -> bool:
            query = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type LIKE 'c%'"
            )
            return bool(await self.conn.fetchval(query) == 1)

        await until(alone)
        await self.conn.execute("SELECT pg_stat_clear_snapshot()")
        rows = await self.conn.fetch(
            "SELECT relname, seq_scan AS scans, heap_blks_read + heap_blks_hit "
            "+ coalesce(idx_blks_read, 0) + coalesce(idx_blks_hit, 0) AS blocks "
            "FROM pg_stat_user_tables JOIN pg_statio_user_tables USING (relid, relname)"
        )
        return {row["relname"]: row for row in rows}


@pytest.fixture
async def large(own_database: str, servers: Servers, upstream: Upstream) -> AsyncIterator[Large]:
    conn = await asyncpg.connect(database.dsn(own_database))
    await fill(conn)
    run_ids = [
        row["run_id"] for row in await conn.fetch("SELECT run_id FROM agent_runs WHERE status = 'RUNNING' ORDER BY id")
    ]
    await conn.execute(_MANY_LOGS, run_ids[1], LOGS)
    await conn.execute("VACUUM ANALYZE")
    over = await conn.fetchrow(f"SELECT * FROM agent_runs WHERE id = {RUNS // 2}")
    contexts = [row["context_id"] for row in await conn.fetch(f"SELECT * FROM agent_runs WHERE id % {RUNS // 20} = 7")]
    ids = Ids(
        run_id=run_ids[0],
        busy=run_ids[1],
        other=run_ids[2:],
        over=over["run_id"],
        context_id=over["context_id"],
        contexts=frozenset(contexts),
        cursor=Cursor(over["created_at"], over["id"]).encode(),
        newest_event=await conn.fetchval("SELECT max(id) FROM run_events"),
    )
    # What was done here is not counted with what is looked at.
    await conn.execute("SELECT pg_stat_force_next_flush()")
    yield Large(own_database, conn, ids, settings_for(own_database, servers.redis_url, upstream.url))
    await conn.close()


def get(path: str, **params: Any) -> Callable[[Service], Awaitable[object]]:
    async def asked(service: Service) -> None:
        answer = await service.http.get(f"/api/happyrobot/{path}", params=params)
        answer.raise_for_status()
        assert answer.json()

    return asked


def called_back(*run_ids: str, event_type: str = "log", copies: int = 1, known: bool = True) -> Any:
    """As many callbacks at the same moment."""

    async def sent(service: Service) -> None:
        headers = {"X-API-KEY": HOOK_KEY, "X-Webhook-Id": uuid4().hex}
        for _ in range(copies):
            bodies = [{"run_id": run_id, "event_type": event_type, "data": {"message": "hello"}} for run_id in run_ids]
            posts = [service.http.post("/api/webhooks/happyrobot", json=body, headers=headers) for body in bodies]
            answers = await asyncio.gather(*posts)
            assert {answer.status_code for answer in answers} == {200 if known else 404}

    return sent


def replayed(after: int, *, sight: Sight = EVERYTHING, **scope: str) -> Any:
    async def read(service: Service) -> None:
        async with service.state["db"].connect() as conn:
            assert (await read_events(conn, Scope(sight, **scope), after=after, limit=500)).events

    return read


def listed(sight: Sight, **wanted: Any) -> Any:
    async def read(service: Service) -> None:
        async with service.state["db"].connect() as conn:
            rows = (await list_runs(conn, Filter(**wanted), sight, limit=200, cursor=None)).runs
            assert await metadata_of(conn, rows)

    return read


async def started(service: Service) -> None:
    body = {"context_id": f"order_{uuid4().hex}", "simulate": {"faults": "silent"}}
    answer = await service.http.post("/api/happyrobot/trigger", json=body)
    answer.raise_for_status()


async def swept(service: Service) -> None:
    await sweep(service.state["db"], service.state["intake"], 15, 1800)


async def pruned(service: Service) -> None:
    """All runs of an hour or two, the oldest."""
    async with service.state["db"].connect() as conn:
        age = await conn.scalar(text("SELECT extract(epoch FROM now() - min(created_at)) FROM agent_runs"))
    gone = await prune(service.state["db"], float(age) / 86_400 - 0.05, asyncio.Event())  # type: ignore[arg-type]
    assert gone.executions > 100
    assert gone.runs >= gone.events / 5 > 500


def frequent(ids: Ids) -> dict[str, tuple[int, Any]]:
    """What is done often, and how many blocks it may touch: about twice as many as it does."""
    return {
        "a callback": (150, called_back(ids.run_id)),
        "callbacks of twenty runs": (1_000, called_back(*ids.other[:20])),
        "a callback and its copy": (150, called_back(ids.run_id, copies=2)),
        "one of a run with very many logs": (150, called_back(ids.busy)),
        "a last callback": (350, called_back(ids.other[-1], event_type="completed")),
        "an early callback": (150, called_back("unknown", known=False)),
        "a trigger": (350, started),
        "the list": (4_500, get("runs")),
        "the list, further on": (4_500, get("runs", cursor=ids.cursor)),
        "of a context": (100, get("runs", context_id=ids.context_id)),
        "of a context with a status": (100, listed(EVERYTHING, context_id=ids.context_id, status=RunStatus.COMPLETED)),
        **{
            f"of those {status}": (4_500, get("runs", status=status))
            for status in (RunStatus.RUNNING, RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELED)
        },
        "of the canceled, further on": (4_500, get("runs", status=RunStatus.CANCELED, cursor=ids.cursor)),
        "of a workflow": (4_500, get("runs", workflow_id="often")),
        "of a rare workflow": (4_500, get("runs", workflow_id="rare")),
        "of a rare workflow with a status": (4_500, get("runs", workflow_id="rare", status=RunStatus.COMPLETED)),
        "for who sees some contexts": (1_500, listed(Sight(ids.contexts))),
        "for who sees one context": (100, listed(Sight(frozenset({ids.context_id})))),
        "for who sees a workflow": (4_500, listed(Sight(None, frozenset({"rare"})))),
        "for who sees some workflows": (4_500, listed(Sight(None, frozenset({"rare", "often"})))),
        "one run": (60, get(f"runs/{ids.over}")),
        "a run with very many logs": (130, get(f"runs/{ids.busy}")),
        "its status": (50, get("status", run_id=ids.over)),
        "its timeline": (30, get(f"runs/{ids.over}/events")),
        "the timeline of very many logs": (40, get(f"runs/{ids.busy}/events", limit=100)),
        "its end": (40, get(f"runs/{ids.busy}/events", limit=100, after=ids.newest_event - 50)),
        "a replay of a run": (30, replayed(0, run_id=ids.over)),
        "a replay of a context": (30, replayed(0, context_id=ids.context_id)),
        "a replay for who sees some contexts": (250, replayed(0, sight=Sight(ids.contexts))),
        "a replay of everything": (60, replayed(ids.newest_event - 1000)),
        "statistics of a day": (1_000, get("stats")),
        "statistics of a context": (100, get("stats", context_id=ids.context_id)),
        "statistics of a workflow": (150, get("stats", workflow_id="rare")),
        "what waits to be approved": (100, get("approvals")),
        "what was approved": (1_000, get("approvals", status="approved")),
        "deliveries": (50, get("deliveries")),
        "those that failed": (150, get("deliveries", status="failed")),
        "a look at a run": (70, lambda service: reconcile._watch(service.state["db"], ids.run_id)),
        "a sweep that finds runs nobody asks about": (12_000, swept),
        "a sweep": (700, swept),
        "deleting what is old": (80_000, pruned),
    }


@pytest.mark.large
async def test_what_is_done_often_touches_little_of_a_large_database(large: Large):
    found = []
    for what, (bound, action) in frequent(large.ids).items():
        blocks, read_through = await large.touched_by(action)
        if blocks > bound or read_through:
            found.append(f"{what}: {blocks} blocks for {bound}, and all of {read_through}")
    assert not found, "\n".join(found)
