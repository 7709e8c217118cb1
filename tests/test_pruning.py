"""What has been over for longer than `RETENTION_DAYS` is deleted, and nothing else."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.models import CronExpressionEntrypoint
from pgqueuer.types import CronEntrypoint, CronExpression
from sqlalchemy import Table, delete, event, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine
from structlog.testing import capture_logs

from switchboard import database, jobs
from switchboard.deliveries.log import send_again
from switchboard.events import NewEvent
from switchboard.happyrobot.records import Message, RunRecord, Session
from switchboard.jobs import DECIDE, RECONCILE, Job
from switchboard.runs import ingest, pruning
from switchboard.runs.archive import keep
from switchboard.runs.pruning import Pruned, prune
from switchboard.runs.sorting import Held
from switchboard.tables import (
    agent_runs,
    api_keys,
    approvals,
    deliveries,
    delivery_attempts,
    executions,
    run_events,
    run_records,
)
from switchboard.worker import PRUNE_EVERY
from tests.conftest import Servers, Upstream, new_key, rows_of, running_service, settings_for, until

DAYS = 30


@pytest.fixture
async def own_db(own_database: str) -> AsyncIterator[AsyncEngine]:
    engine = database.connect(own_database)
    yield engine
    await engine.dispose()


@dataclass
class Old:
    """An execution with all that can belong to one."""

    execution_id: UUID
    run_ids: list[str]
    approval_id: UUID
    delivery_id: UUID


def ago(days: float) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)


async def insert_old(db: AsyncEngine, *, days: float = DAYS + 1, runs: int = 1, events: int = 2) -> Old:
    """An execution that was over so many days ago, and began the day before."""
    old = Old(uuid4(), [f"run_{uuid4().hex}" for _ in range(runs)], uuid4(), uuid4())
    key_id, _ = await new_key(db)
    times = {"created_at": ago(days + 1), "updated_at": ago(days), "completed_at": ago(days)}
    execution = {"id": old.execution_id, "workflow_id": "default", "context_id": "c", "input": {}, **times}
    approval = {"id": old.approval_id, "execution_id": old.execution_id, "run_id": old.run_ids[0]}
    delivery = {"id": old.delivery_id, "key_id": key_id, "execution_id": old.execution_id, "body": b"{}"}
    attempt = {"delivery_id": old.delivery_id, "number": 1, "started_at": ago(days), "duration_ms": 1}
    async with db.begin() as conn:
        await conn.execute(insert(executions).values(status="completed", **execution))
        await conn.execute(insert(approvals).values(status="approved", fingerprint=uuid4(), **approval))
        await conn.execute(insert(deliveries).values(status="failed", event="execution.completed", **delivery))
        await conn.execute(insert(delivery_attempts).values(attempt))
        for run_id in old.run_ids:
            run = {"run_id": run_id, "context_id": "c", "execution_id": old.execution_id, **times}
            of_run = {"run_id": run_id, "context_id": "c", "event_type": "log", "status": "RUNNING"}
            await conn.execute(insert(agent_runs).values(status="COMPLETED", **run))
            await conn.execute(insert(run_events), [of_run] * events)
            await conn.execute(insert(run_records).values(run_id=run_id, record={}))
    return old


async def change(db: AsyncEngine, table: Table, **values: Any) -> None:
    """Changes all rows of a table."""
    async with db.begin() as conn:
        await conn.execute(update(table).values(values))


_ABOUT_RUNS = (executions, agent_runs, run_events, run_records, approvals, deliveries, delivery_attempts)


async def counts(db: AsyncEngine) -> list[int]:
    """How many rows each of the tables has."""
    async with db.connect() as conn:
        return [await conn.scalar(select(func.count()).select_from(table)) or 0 for table in _ABOUT_RUNS]


async def pruned(db: AsyncEngine, days: int = DAYS) -> Pruned:
    return await prune(db, days, asyncio.Event())


async def test_what_was_over_for_long_goes_with_all_that_belongs_to_it(own_db: AsyncEngine):
    await insert_old(own_db, runs=2)
    await insert_old(own_db, days=DAYS - 1)
    with capture_logs() as logged:
        assert await pruned(own_db) == Pruned(executions=1, runs=2, events=4)
    assert await counts(own_db) == [1, 1, 2, 1, 1, 1, 1]
    said = {"event": "old runs deleted", "log_level": "info", "executions": 1, "runs": 2, "events": 4}
    assert logged == [said], "one line"
    async with own_db.connect() as conn:
        assert await conn.scalar(select(func.count()).select_from(api_keys)) == 2, "keys are nobody's past"


async def test_nothing_is_said_about_nothing(own_db: AsyncEngine):
    with capture_logs() as logged:
        assert await pruned(own_db) == Pruned()
    assert logged == []


# What is kept


@pytest.mark.parametrize(
    ("table", "values"),
    [
        (agent_runs, {"status": "RUNNING"}),
        (agent_runs, {"status": "PENDING", "completed_at": None}),
        (agent_runs, {"completed_at": ago(1)}),
        (agent_runs, {"completed_at": None, "updated_at": ago(1)}),
        (executions, {"status": "running"}),
        (executions, {"status": "pending", "completed_at": None}),
        (executions, {"status": "pending_approval"}),
        (executions, {"status": "submission_unknown", "completed_at": None}),
        (executions, {"completed_at": ago(1)}),
        (deliveries, {"status": "pending"}),
    ],
    # Their times are those of the process that collects them.
    ids=lambda value: str(value) if isinstance(value, Table) else "-".join(value),
)
async def test_what_is_not_over_for_long_keeps_all_that_belongs_to_it(
    own_db: AsyncEngine, table: Table, values: dict[str, Any]
):
    await insert_old(own_db)
    before = await counts(own_db)
    await change(own_db, table, **values)
    assert await pruned(own_db) == Pruned()
    assert await counts(own_db) == before


async def test_an_execution_is_kept_with_all_its_runs_while_one_of_them_is(own_db: AsyncEngine):
    """What became of it is read from its runs: with some of them gone, it would be something else."""
    old = await insert_old(own_db, runs=2)
    async with own_db.begin() as conn:
        youngest = update(agent_runs).where(agent_runs.c.run_id == old.run_ids[1])
        await conn.execute(youngest.values(completed_at=ago(1)))
    assert await pruned(own_db) == Pruned()
    assert await rows_of(own_db, run_events, old.run_ids[0]) == 2


async def test_a_run_that_only_we_hold_for_dead_is_kept_while_happyrobot_is_asked(own_db: AsyncEngine):
    await insert_old(own_db)
    guess = {"status": "FAILED", "timed_out": True}
    await change(own_db, agent_runs, **guess, updated_at=ago(0.9))
    assert await pruned(own_db) == Pruned()
    await change(own_db, agent_runs, **guess, updated_at=ago(1.1))
    assert (await pruned(own_db)).runs == 1


async def test_what_nobody_decided_about_a_run_that_only_we_hold_for_dead_goes_with_it(own_db: AsyncEngine):
    await insert_old(own_db)
    await change(own_db, agent_runs, status="FAILED", timed_out=True, updated_at=ago(1.1))
    await change(own_db, approvals, status="pending")
    assert (await pruned(own_db)).executions == 1


async def test_no_record_is_kept_of_a_run_that_is_gone(own_db: AsyncEngine):
    old = await insert_old(own_db)
    assert (await pruned(own_db)).runs == 1
    record = RunRecord(status="completed", sessions=[Session(messages=[Message(content="Hello")])])
    assert await keep(own_db, old.run_ids[0], record) == record
    assert await rows_of(own_db, run_records, old.run_ids[0]) == 0


async def test_a_record_that_is_being_kept_goes_with_its_run(own_db: AsyncEngine):
    old = await insert_old(own_db)
    locked = select(agent_runs.c.id).where(agent_runs.c.run_id == old.run_ids[0])
    async with own_db.connect() as looking, own_db.connect() as keeping:
        await keeping.execute(delete(run_records))
        await keeping.commit()
        await keeping.execute(locked.with_for_update(read=True, key_share=True))
        pruning = asyncio.create_task(pruned(own_db))
        waiting = text("SELECT count(*) > 0 FROM pg_locks WHERE NOT granted")

        async def waits() -> bool:
            found = bool(await looking.scalar(waiting))
            await looking.rollback()
            return found

        await until(waits)
        await keeping.execute(insert(run_records).values(run_id=old.run_ids[0], record={}))
        await keeping.commit()
        assert (await pruning).runs == 1
    assert await rows_of(own_db, run_records, old.run_ids[0]) == 0


async def test_a_run_with_a_job_that_asks_about_it_is_kept(own_db: AsyncEngine):
    old = await insert_old(own_db)
    async with own_db.begin() as conn:
        await jobs.enqueue(conn, [Job(RECONCILE, old.run_ids[0], 300)])
    assert await pruned(own_db) == Pruned()
    async with own_db.begin() as conn:
        await jobs.drop(conn, RECONCILE, old.run_ids[0])
    assert (await pruned(own_db)).runs == 1


async def test_a_decision_that_happyrobot_is_still_told_is_kept(own_db: AsyncEngine):
    old = await insert_old(own_db)
    async with own_db.begin() as conn:
        await jobs.enqueue(conn, [Job(DECIDE, str(old.approval_id))])
    assert await pruned(own_db) == Pruned()


# What goes alone


async def test_a_run_that_others_inserted_goes_by_its_last_change(own_db: AsyncEngine):
    old = await insert_old(own_db)
    await change(own_db, agent_runs, execution_id=None, completed_at=None)
    await change(own_db, executions, status="running")
    assert await pruned(own_db) == Pruned(runs=1, events=2)
    assert await rows_of(own_db, run_records, old.run_ids[0]) == 0


@pytest.mark.parametrize("status", ["failed", "submission_unknown"])
async def test_an_execution_that_had_no_runs_goes_alone(own_db: AsyncEngine, status: str):
    await insert_old(own_db, runs=1)
    async with own_db.begin() as conn:
        await conn.execute(text("DELETE FROM agent_runs"))
    await change(own_db, executions, status=status)
    assert await pruned(own_db) == Pruned(executions=1)


# Batches


async def test_it_stops_between_batches(own_db: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pruning, "_AT_ONCE", 2)
    for _ in range(5):
        await insert_old(own_db)
    stopping = asyncio.Event()

    @event.listens_for(own_db.sync_engine, "before_cursor_execute")
    def stop(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("DELETE FROM executions"):
            stopping.set()

    assert (await prune(own_db, DAYS, stopping)).executions == 2
    assert (await counts(own_db))[:3] == [3, 3, 6]
    event.remove(own_db.sync_engine, "before_cursor_execute", stop)
    assert (await pruned(own_db)).executions == 3
    assert await counts(own_db) == [0] * len(_ABOUT_RUNS)


async def test_what_is_kept_does_not_hide_what_comes_after_it(own_db: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pruning, "_AT_ONCE", 2)
    for days in (DAYS + 3, DAYS + 2):
        await insert_old(own_db, days=days)
    await change(own_db, deliveries, status="pending")
    await insert_old(own_db)
    assert (await pruned(own_db)).executions == 1
    assert (await counts(own_db))[0] == 2


async def test_a_run_with_many_events_goes_in_several_turns(own_db: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pruning, "_EVENTS_AT_ONCE", 3)
    await insert_old(own_db, events=10)
    turns: list[str] = []

    @event.listens_for(own_db.sync_engine, "before_cursor_execute")
    def note(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "pg_advisory_xact_lock" in statement:
            turns.append(statement)

    assert await pruned(own_db) == Pruned(executions=1, runs=1, events=10)
    assert len(turns) == 4
    assert await counts(own_db) == [0] * len(_ABOUT_RUNS)


async def pruning_that_waits(db: AsyncEngine) -> asyncio.Task[Pruned]:
    """Begins to prune; returns once it waits for a lock that somebody has, or is done without."""
    task = asyncio.create_task(pruned(db))
    here = "datname = current_database() AND wait_event_type = 'Lock'"

    async def waits() -> bool:
        async with db.connect() as conn:
            return task.done() or bool(await conn.scalar(text(f"SELECT count(*) FROM pg_stat_activity WHERE {here}")))

    await until(waits)
    return task


async def test_a_callback_that_comes_at_the_same_time_leaves_no_orphans(own_db: AsyncEngine):
    old = await insert_old(own_db)
    late = NewEvent(old.run_ids[0], "log", {"message": "late"})
    async with own_db.begin() as conn:
        await ingest.write(conn, [late])
        task = await pruning_that_waits(own_db)
    assert await task == Pruned(executions=1, runs=1, events=3)
    assert await rows_of(own_db, run_events, old.run_ids[0]) == 0
    async with own_db.begin() as conn:
        assert (await ingest.write(conn, [late])).outcomes == [Held()], "as of any run that is not known"


async def test_a_webhook_that_is_sent_again_at_the_same_time_is_kept(own_db: AsyncEngine):
    old = await insert_old(own_db)
    before = await counts(own_db)
    async with own_db.begin() as conn:
        await send_again(conn, old.delivery_id)
        task = await pruning_that_waits(own_db)
    assert await task == Pruned()
    assert await counts(own_db) == before


async def test_a_turn_that_does_not_come_is_waited_for_the_next_time(
    own_db: AsyncEngine, monkeypatch: pytest.MonkeyPatch
):
    await insert_old(own_db)
    impatient = text(ingest.TURN.text.replace("'3s'", "'20ms'"))
    monkeypatch.setattr(pruning, "TURN", impatient)
    async with own_db.begin() as conn:
        await conn.execute(ingest.TURN)
        with capture_logs() as logged:
            assert await pruned(own_db) == Pruned()
    assert [line["event"] for line in logged] == ["pruning pauses"]
    assert (await pruned(own_db)).runs == 1


# As it runs


async def test_a_worker_prunes_and_the_idempotency_key_is_free_again(
    own_database: str, own_db: AsyncEngine, servers: Servers, upstream: Upstream, context_id: str
):
    settings = settings_for(own_database, servers.redis_url, upstream.url)
    headers = {"Idempotency-Key": "once"}
    body = {"context_id": context_id}

    async def over() -> bool:
        async with own_db.connect() as conn:
            return await conn.scalar(select(executions.c.status)) == "completed"

    async with running_service(settings) as service:
        first = (await service.http.post("/api/happyrobot/trigger", json=body, headers=headers)).json()
        await until(over)
    async with own_db.begin() as conn:
        long_ago = {"created_at": ago(40), "completed_at": ago(40)}
        await conn.execute(update(agent_runs).values(long_ago))
        await conn.execute(update(executions).values(long_ago))
        await conn.execute(text("DELETE FROM switchboard_pgqueuer"))
    await make_due(own_database)

    async def gone() -> bool:
        return (await counts(own_db))[:4] == [0] * 4

    async with running_service(settings.model_copy(update={"retention_days": DAYS}), worker=True) as service:
        await until(gone)
        again = (await service.http.post("/api/happyrobot/trigger", json=body, headers=headers)).json()
    assert again["execution_id"] != first["execution_id"]


async def make_due(url: str) -> None:
    """Has the next worker prune at once."""
    connection = await asyncpg.connect(database.dsn(url))
    try:
        schedule = CronExpressionEntrypoint(CronEntrypoint("prune"), CronExpression(PRUNE_EVERY))
        await jobs.queries(AsyncpgDriver(connection)).insert_schedule({schedule: timedelta(0)})
    finally:
        await connection.close()
