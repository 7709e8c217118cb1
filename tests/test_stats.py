"""Counting runs: by status, by hour, by workflow, and how long they took."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database
from switchboard.runs.queries import Filter
from switchboard.runs.stats import StatsOut, stats
from switchboard.sight import EVERYTHING, Sight
from switchboard.tables import RunStatus, agent_runs
from tests.conftest import Service

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
NONE: dict[Any, int] = dict.fromkeys(RunStatus, 0)


@pytest.fixture
async def context(context_id: str, db: AsyncEngine) -> str:
    """A context with runs from 9:30 to 11:59."""
    await add(db, context_id, NOON - timedelta(minutes=150), "COMPLETED", took=1000)
    for took in (10, 20, 30, 40):
        await add(db, context_id, NOON - timedelta(minutes=90), "COMPLETED", took=took)
    await add(db, context_id, NOON - timedelta(minutes=60), "FAILED", took=5)
    await add(db, context_id, NOON - timedelta(minutes=1), "RUNNING", workflow_id="other")
    return context_id


async def add(
    db: AsyncEngine, context_id: str, began: datetime, status: str, *, took: float | None = None, **more: Any
) -> None:
    ended = None if took is None else began + timedelta(seconds=took)
    row = {"run_id": uuid4().hex, "context_id": context_id, "status": status, "created_at": began}
    async with db.begin() as conn:
        await conn.execute(insert(agent_runs).values(row | {"completed_at": ended} | more))


async def counted(
    db: AsyncEngine, context_id: str, *, hours: int = 3, workflow_id: str | None = None, sight: Sight = EVERYTHING
) -> StatsOut:
    since = NOON - timedelta(hours=hours - 1)
    async with db.connect() as conn:
        return await stats(conn, Filter(context_id, None, workflow_id), sight, since, NOON + timedelta(minutes=10))


async def test_runs_are_counted_by_status_by_hour_and_by_workflow(db: AsyncEngine, context: str):
    found = await counted(db, context)
    assert found.total == 6
    assert found.by_status == NONE | {"COMPLETED": 4, "FAILED": 1, "RUNNING": 1}
    assert [(hour.hour.hour, hour.total) for hour in found.by_hour] == [(10, 4), (11, 2), (12, 0)]
    assert found.by_hour[1].by_status == NONE | {"FAILED": 1, "RUNNING": 1}
    assert [(each.workflow_id, each.total, each.by_status[RunStatus.RUNNING]) for each in found.by_workflow] == [
        ("default", 5, 0),
        ("other", 1, 1),
    ]


async def test_durations_are_those_of_completed_runs(db: AsyncEngine, context: str):
    found = await counted(db, context)
    assert (found.durations.runs, found.durations.p50, found.durations.p95) == (4, 25.0, 38.5)
    assert [(hour.p50, hour.p95) for hour in found.by_hour] == [(25.0, 38.5), (None, None), (None, None)]
    longer = await counted(db, context, hours=4)
    assert longer.durations.runs == 5
    assert longer.by_hour[0].p50 == 1000


async def test_what_is_under_way_counts_whenever_it_began(db: AsyncEngine, context: str):
    await add(db, context, NOON - timedelta(days=3), "PENDING")
    found = await counted(db, context)
    assert (found.under_way, found.total) == (2, 6)


async def test_only_one_workflow_is_counted_if_that_is_wanted(db: AsyncEngine, context: str):
    found = await counted(db, context, workflow_id="other")
    assert (found.total, found.under_way, found.by_status[RunStatus.COMPLETED]) == (1, 1, 0)
    assert found.durations.p50 is None


@pytest.mark.parametrize(
    ("sight", "total"),
    [
        (Sight(workflows=frozenset({"other"})), 1),
        (Sight(contexts=frozenset({"another"})), 0),
        (Sight(workflows=frozenset()), 0),
    ],
)
async def test_what_is_not_to_be_seen_is_not_counted(db: AsyncEngine, context: str, sight: Sight, total: int):
    found = await counted(db, context, sight=sight)
    assert found.total == sum(hour.total for hour in found.by_hour) == sum(found.by_status.values()) == total


async def test_a_row_of_somebody_else_without_an_end_has_no_duration(db: AsyncEngine, context_id: str):
    await add(db, context_id, NOON, "COMPLETED")
    found = await counted(db, context_id)
    assert found.by_status[RunStatus.COMPLETED] == 1
    assert (found.durations.runs, found.durations.p50) == (0, None)


@pytest.mark.parametrize(("began", "took"), [(timedelta(hours=3), 5), (timedelta(0), -3600)])
async def test_clocks_that_disagree_make_no_odd_numbers(
    db: AsyncEngine, context_id: str, began: timedelta, took: float
):
    """Rows that somebody else has written may begin in the future, or end before they began."""
    await add(db, context_id, NOON + began, "COMPLETED", took=took)
    found = await counted(db, context_id)
    assert found.total == sum(hour.total for hour in found.by_hour) == (1 if took < 0 else 0)
    assert (found.durations.runs, found.durations.p50) == (0, None)


async def test_the_endpoint_counts_to_the_hour_that_it_is(service: Service, context_id: str, db: AsyncEngine):
    await add(db, context_id, datetime.now(UTC), "COMPLETED", took=61.5)
    await add(db, context_id, datetime.now(UTC) - timedelta(hours=25), "COMPLETED", took=1)
    found = (await service.http.get("/api/happyrobot/stats", params={"context_id": context_id})).json()
    assert found["total"] == 1
    assert len(found["by_hour"]) == 24
    assert found["since"] == found["by_hour"][0]["hour"]
    assert found["by_hour"][-1]["hour"][:13] == found["until"][:13]
    assert found["durations"] == {"runs": 1, "p50": 61.5, "p95": 61.5}
    assert found["by_status"] == {"PENDING": 0, "RUNNING": 0, "COMPLETED": 1, "FAILED": 0, "CANCELED": 0}
    longer = {"context_id": context_id, "hours": "48"}
    assert (await service.http.get("/api/happyrobot/stats", params=longer)).json()["total"] == 2


@pytest.mark.parametrize("hours", ["0", "721", "many"])
async def test_other_hours_are_refused(service: Service, hours: str):
    answer = await service.http.get("/api/happyrobot/stats", params={"hours": hours})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("hours: ")


@pytest.fixture
async def many(own_database: str) -> AsyncIterator[AsyncEngine]:
    engine = database.connect(own_database)
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO agent_runs (run_id, context_id, status, created_at, completed_at) "
                "SELECT 'r' || i, 'c' || i % 50, 'COMPLETED', began, began + interval '1 minute' "
                "FROM generate_series(1, 20000) i, "
                "LATERAL (SELECT CAST(:noon AS timestamptz) - i * interval '1 minute') "
                "AS moments (began)"
            ),
            {"noon": NOON},
        )
    async with engine.connect() as conn:
        await (await conn.execution_options(isolation_level="AUTOCOMMIT")).execute(text("VACUUM ANALYZE agent_runs"))
    yield engine
    await engine.dispose()


async def test_no_row_is_looked_at_to_count_the_last_hours(many: AsyncEngine):
    """Among millions of runs only an index is quick enough."""
    looked_at = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'agent_runs'"
    async with many.connect() as conn:
        await stats(conn, Filter(), EVERYTHING, NOON - timedelta(hours=23), NOON)
        assert await conn.scalar(text(looked_at)) == 0
