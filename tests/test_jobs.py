"""The job queue: what comes first, what comes sooner, and that no job is lost."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
import respx
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.ports.repository import EntrypointExecutionParameter
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database, jobs, worker
from switchboard.errors import PostgresAway
from switchboard.jobs import CHECK, RECONCILE, Job
from switchboard.leaving import LAST_NEWS
from switchboard.runs.sweep import sweep
from switchboard.tables import agent_runs
from tests.conftest import Servers, Service, insert_run, running_service, settings_for, until


@pytest.fixture
async def own_db(own_database: str) -> AsyncIterator[AsyncEngine]:
    engine = database.connect(own_database)
    yield engine
    await engine.dispose()


async def enqueue(db: AsyncEngine, *wanted: Job) -> None:
    async with db.begin() as conn:
        await jobs.enqueue(conn, wanted)


async def let_time_pass(db: AsyncEngine, seconds: float) -> None:
    async with db.begin() as conn:
        await conn.execute(
            text("UPDATE switchboard_pgqueuer SET execute_after = execute_after - make_interval(secs => :s)"),
            {"s": seconds},
        )


async def waiting(db: AsyncEngine, subject: str) -> Any:
    """The one job about a subject: its status and the seconds until it is due."""
    query = text(
        "SELECT id, status::text, extract(epoch FROM execute_after - now())::float AS due "
        "FROM switchboard_pgqueuer WHERE convert_from(payload, 'utf8') = :subject"
    )
    async with db.connect() as conn:
        return (await conn.execute(query, {"subject": subject})).one()


async def picked(url: str, number: int = 10) -> Sequence[Any]:
    """The jobs that PgQueuer gives a worker now, in its order."""
    connection = await asyncpg.connect(database.dsn(url))
    try:
        anything = EntrypointExecutionParameter(concurrency_limit=0)
        return await jobs.queries(AsyncpgDriver(connection)).dequeue(
            number,
            dict.fromkeys((RECONCILE, CHECK), anything),  # type: ignore[arg-type]  # its names are a NewType
            uuid4(),  # type: ignore[arg-type]
            None,
            timedelta(seconds=30),
        )
    finally:
        await connection.close()


async def test_what_is_due_first_comes_first_and_the_urgent_before_it(own_database: str, own_db: AsyncEngine):
    await enqueue(own_db, Job(RECONCILE, "late", 300), Job(RECONCILE, "early", 15), Job(RECONCILE, "later", 600))
    await enqueue(own_db, Job(CHECK, "urgent"))
    await let_time_pass(own_db, 1000)
    assert [job.payload for job in await picked(own_database)] == [b"urgent", b"early", b"late", b"later"]


async def test_a_job_that_puts_itself_off_is_no_longer_the_oldest(own_database: str, own_db: AsyncEngine):
    """Else the oldest runs would be asked about for ever, and the newest never."""
    await enqueue(own_db, Job(RECONCILE, "old", 15))
    await enqueue(own_db, Job(RECONCILE, "new", 60))
    async with own_db.begin() as conn:
        await jobs.rank_behind(conn, (await waiting(own_db, "old")).id, 300)
    await let_time_pass(own_db, 1000)
    assert [job.payload for job in await picked(own_database)] == [b"new", b"old"]


async def test_a_job_that_waits_is_brought_forward_and_never_put_off(own_db: AsyncEngine):
    await enqueue(own_db, Job(RECONCILE, "run", 300))
    async with own_db.begin() as conn:
        await jobs.hasten(conn, RECONCILE, ["run"], 15)
    assert 5 < (await waiting(own_db, "run")).due <= 15
    async with own_db.begin() as conn:
        await jobs.hasten(conn, RECONCILE, ["run"], 100)
    assert (await waiting(own_db, "run")).due <= 15


async def test_a_job_that_is_there_already_stays_as_it_is(own_db: AsyncEngine):
    await enqueue(own_db, Job(RECONCILE, "run", 15))
    await enqueue(own_db, Job(RECONCILE, "run", 300))
    assert (await waiting(own_db, "run")).due <= 15


async def fail(db: AsyncEngine, subject: str) -> None:
    async with db.begin() as conn:
        await conn.execute(
            text("UPDATE switchboard_pgqueuer SET status = 'failed' WHERE convert_from(payload, 'utf8') = :subject"),
            {"subject": subject},
        )


async def test_a_job_that_failed_comes_up_again_once(service: Service, own_database: str, own_db: AsyncEngine):
    # Failed, failed again after a new one took its place, and failed while a new one waits.
    await enqueue(own_db, Job(RECONCILE, "once"))
    for _ in range(2):
        await enqueue(own_db, Job(RECONCILE, "twice"))
        await fail(own_db, "twice")
    await enqueue(own_db, Job(RECONCILE, "replaced"))
    await fail(own_db, "replaced")
    await enqueue(own_db, Job(RECONCILE, "replaced"))
    await fail(own_db, "once")
    await sweep(own_db, service.state["intake"], 15, 1800)
    assert sorted(job.payload for job in await picked(own_database)) == [b"once", b"replaced", b"twice"]


async def test_a_job_that_could_not_be_put_off_is_not_lost(
    own_database: str, servers: Servers, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    """PostgreSQL went away between the question and the note of when to ask again."""
    failed = asyncio.Event()
    genuine = jobs._Queries.retry_job

    async def once_in_vain(self: jobs._Queries, *arguments: Any) -> None:
        if not failed.is_set():
            failed.set()
            raise OSError("PostgreSQL is away")
        await genuine(self, *arguments)

    monkeypatch.setattr(jobs._Queries, "retry_job", once_in_vain)
    router = respx.MockRouter()
    answers = iter(["running"])
    router.get(path__regex=r"/api/v1/runs/.+").mock(
        side_effect=lambda _: httpx.Response(200, json={"run": {"status": next(answers, "completed")}})
    )
    settings = settings_for(own_database, servers.redis_url, None, reconcile_after=0.2)
    transport = httpx.MockTransport(router.async_handler)
    async with running_service(settings, transport, worker=True) as service:
        db = service.state["db"]
        run_id = await insert_run(db, context_id)
        await sweep(db, service.state["intake"], 0.1, 1800)
        async with asyncio.timeout(60):
            await failed.wait()

        async def held() -> bool:
            return bool((await waiting(db, run_id)).status == "failed")

        await until(held)
        await sweep(db, service.state["intake"], 0.1, 1800)

        async def over() -> bool:
            async with db.connect() as conn:
                return await conn.scalar(select(agent_runs.c.status)) == "COMPLETED"

        await until(over)


async def test_a_worker_works_while_what_was_left_behind_cannot_be_put_in_order(
    own_database: str, servers: Servers, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    tried, allowed, done = 0, asyncio.Event(), asyncio.Event()

    async def sweep_at_last(*arguments: Any) -> None:
        nonlocal tried
        tried += 1
        if not allowed.is_set():
            raise PostgresAway("writers wait for their turn in vain")
        await sweep(*arguments)
        done.set()

    monkeypatch.setattr(worker, "sweep", sweep_at_last)
    monkeypatch.setattr(worker, "_SWEEPS_AFTER", [0.05] * 1000)
    router = respx.MockRouter()
    completed = httpx.Response(200, json={"run": {"status": "completed"}})
    asked = router.get(path__regex=r"/api/v1/runs/.+").mock(return_value=completed)
    settings = settings_for(own_database, servers.redis_url, None)
    transport = httpx.MockTransport(router.async_handler)
    async with running_service(settings, transport, worker=True) as service:
        await until(lambda: tried > 2)
        await enqueue(service.state["db"], Job(RECONCILE, await insert_run(service.state["db"], context_id)))
        await until(lambda: asked.called)
        allowed.set()
        async with asyncio.timeout(30):
            await done.wait()


async def test_a_worker_that_has_to_leave_does_not_wait_for_what_was_left_behind(
    own_database: str, servers: Servers, monkeypatch: pytest.MonkeyPatch
):
    begun = asyncio.Event()
    left: list[float] = []

    async def sweep_for_ever(*_: Any) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.append(service.state["leaving"].left(LAST_NEWS))

    monkeypatch.setattr(worker, "sweep", sweep_for_ever)
    async with running_service(settings_for(own_database, servers.redis_url, None), worker=True) as service:
        await begun.wait()
    assert left[0] > 0, "it is not the last resort that ends it"


async def test_much_news_of_the_queue_is_one_and_none_is_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker, "_NEWS_EVERY", 0.02)
    heard: list[str] = []
    hear = worker._calmed(heard.append)
    changes = [f'{{"type": "table_changed_event", "number": {number}}}' for number in range(4)]
    for change in changes[:3]:
        hear(change)
    hear('{"type": "health_check_event"}')
    assert heard == [changes[0], '{"type": "health_check_event"}'], (
        "whoever is asked whether they listen says so at once"
    )
    await until(lambda: len(heard) == 3, within=5)
    hear(changes[3])
    assert heard[2:] == [changes[1]], "that there is news, of which the last may have come just before"
    await until(lambda: len(heard) == 4, within=5)


async def test_workers_look_for_jobs_now_and_then_however_much_news_there_is(
    own_database: str, servers: Servers, own_db: AsyncEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker, "_NEWS_EVERY", 60)
    monkeypatch.setattr(worker, "_LOOK_EVERY", timedelta(seconds=0.5))
    looks: list[int] = []
    genuine = Queries.dequeue

    async def dequeue(self: Queries, **named: Any) -> Any:
        looks.append(id(self))
        return await genuine(self, **named)

    monkeypatch.setattr(Queries, "dequeue", dequeue)
    async with running_service(settings_for(own_database, servers.redis_url, None), worker=True):
        await until(lambda: len(set(looks)) == 2)
        for number in range(50):
            await enqueue(own_db, Job(RECONCILE, f"run {number}", 300))
        # What both queues do of their own accord: by then they have heard of all the others.
        before = len(looks)
        await until(lambda: all(looks[before:].count(each) for each in set(looks)))
    assert len(looks) < 20


async def test_a_job_that_somebody_else_has_by_now_is_not_put_off(own_database: str):
    connection = await asyncpg.connect(database.dsn(own_database))
    queries = jobs.queries(AsyncpgDriver(connection))
    await queries.enqueue([RECONCILE], [b"a run"], [1])

    async def picked(*, silent_for: float) -> Any:
        execution = {RECONCILE: EntrypointExecutionParameter(0)}
        [job] = await queries.dequeue(1, execution, uuid4(), None, timedelta(seconds=silent_for))  # type: ignore[arg-type]
        return job

    first = await picked(silent_for=60)
    second = await picked(silent_for=0)  # its worker has said nothing for too long
    assert second.id == first.id
    await queries.retry_job(first, timedelta(hours=1), None)
    row = f"SELECT status, attempts, queue_manager_id FROM {jobs.NAMES.queue_table}"
    assert tuple(await connection.fetchrow(row)) == ("picked", 0, second.queue_manager_id)
    await queries.retry_job(second, timedelta(hours=1), None)
    assert tuple(await connection.fetchrow(row)) == ("queued", 1, None)
    await connection.close()
