"""PostgreSQL is watched: what waits for one that is away is told soon, and what was is there again by itself."""

import asyncio
import gc
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database, jobs, metrics, watch, worker
from switchboard.database import dsn
from switchboard.errors import PostgresAway, passes
from switchboard.jobs import CHECK, Job
from switchboard.live import hub
from switchboard.runs.reconcile import Reconciler
from switchboard.tables import run_events
from switchboard.watch import Watch
from tests.conftest import (
    Servers,
    Service,
    insert_run,
    rows_of,
    running_service,
    settings_for,
    until,
    with_database,
)
from tests.receiver import receiving
from tests.wires import Wire, relayed

LONG_BEFORE = 8.0
"""Seconds after which a statement would still be waited for, were there no watch: its own limit is ten."""


AS_IT_IS = watch.LOOK_EVERY, watch.PATIENCE


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(watch, "PATIENCE", 0.3)


@pytest.fixture
async def wire(own_database: str) -> AsyncIterator[Wire]:
    async with relayed(own_database) as relay:
        yield relay


@pytest.fixture
async def service(wire: Wire, servers: Servers) -> AsyncIterator[Service]:
    """A service that has PostgreSQL at the other end of a wire."""
    async with running_service(settings_for(wire.url, servers.redis_url, None)) as service:
        yield service


@pytest.fixture
async def own_db(own_database: str) -> AsyncIterator[AsyncEngine]:
    """The database by another way."""
    engine = database.connect(own_database)
    yield engine
    await engine.dispose()


async def takes_callbacks(service: Service, run_id: str) -> bool:
    return (await service.callback(run_id, "log", "again")).status_code == 200


async def test_on_a_dead_wire_everybody_is_soon_told_to_come_back(service: Service, own_db: AsyncEngine, wire: Wire):
    run_id = await insert_run(own_db, "c")
    assert await takes_callbacks(service, run_id)
    wire.lose()
    asked: list[Awaitable[Any]] = [
        # More than there are connections, so that some wait for one.
        *(service.http.get("/api/happyrobot/runs") for _ in range(30)),
        *(service.callback(run_id, "log", number) for number in range(5)),
        service.callback(run_id, "completed"),
        service.http.post("/api/happyrobot/trigger", json={"context_id": "c"}),
        service.http.post("/api/happyrobot/trigger", json={"context_id": "c"}, headers={"Idempotency-Key": "k"}),
        service.http.get(f"/api/events?run_id={run_id}"),
    ]
    async with asyncio.timeout(LONG_BEFORE):
        answers = await asyncio.gather(*asked)
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in answers} == {(503, "1")}
    assert service.state["watch"].away
    await wire.restore()
    await until(lambda: takes_callbacks(service, run_id), within=30)
    assert not service.state["watch"].away


def test_within_two_seconds_it_is_known_that_it_is_away():
    assert sum(AS_IT_IS) < 1.5, "what is left of two seconds is for the answer"


async def test_while_it_is_away_nobody_tries_to_connect(service: Service, wire: Wire):
    await service.http.get("/api/happyrobot/runs")
    wire.lose()
    await until(lambda: service.state["watch"].away)
    # The watch itself does, one attempt at a time.
    tried = 0

    async def connect() -> None:
        nonlocal tried
        tried += 1

    with pytest.raises(PostgresAway):
        await service.state["watch"].open(connect)
    assert tried == 0
    answers = await asyncio.gather(*(service.http.get("/api/happyrobot/runs") for _ in range(5)))
    assert {answer.status_code for answer in answers} == {503}


async def test_an_attempt_that_is_under_way_is_given_up(wire: Wire):
    wire.lose()
    async with Watch(dsn(wire.url)).running() as watching, asyncio.timeout(LONG_BEFORE):
        with pytest.raises(PostgresAway):
            await database.open_connection(wire.url, watch=watching)


async def test_what_takes_long_on_a_postgresql_that_is_there_is_left_alone(
    service: Service, own_db: AsyncEngine, monkeypatch: pytest.MonkeyPatch
):
    run_id = await insert_run(own_db, "c")
    looks: list[float] = []
    genuine = Watch._ask

    async def ask(self: Watch) -> None:
        await genuine(self)
        looks.append(time.monotonic())

    monkeypatch.setattr(Watch, "_ask", ask)
    async with own_db.begin() as conn:
        await conn.execute(text("LOCK TABLE run_events IN ACCESS EXCLUSIVE MODE"))
        late = asyncio.create_task(service.callback(run_id, "log", "late"))
        slow = asyncio.create_task(slept(service.state["db"]))
        # For longer than a PostgreSQL that does not answer would be waited for.
        await until(lambda: len(looks) > 1 and looks[-1] - looks[0] > 2 * watch.PATIENCE)
        assert not late.done()
    assert (await late).status_code == 200
    await slow


async def slept(db: AsyncEngine) -> None:
    async with db.connect() as conn:
        await conn.execute(text("SELECT pg_sleep(:s)"), {"s": 2 * watch.PATIENCE})


async def test_a_process_that_was_stopped_does_not_take_postgresql_for_absent():
    """All its time is over when it wakes up, and the answer is on its way."""
    here, there = socket.socketpair()
    here.setblocking(False)
    loop = asyncio.get_running_loop()

    async def answer() -> None:
        await loop.sock_recv(here, 1)
        await asyncio.sleep(0.01)  # as long as another way there and back takes, for a new connection

    asking = asyncio.create_task(answer())

    def stop() -> None:
        there.send(b"!")
        time.sleep(2 * watch.PATIENCE)  # as SIGSTOP does it, or a busy event loop

    loop.call_later(0.01, stop)
    assert await watch._done_within(asking, watch.PATIENCE)
    here.close()
    there.close()


async def test_one_that_says_nothing_is_absent():
    nothing = asyncio.create_task(asyncio.Event().wait())
    assert not await watch._done_within(nothing, watch.PATIENCE)  # type: ignore[arg-type]
    nothing.cancel()


async def test_an_attempt_that_never_ends_is_given_up_and_one_that_is_slow_to_do_so_harms_nobody(wire: Wire):
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def dial() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()

    async with Watch(dsn(wire.url)).running() as watching:
        await until(lambda: watching._own is not None)
        opening = asyncio.create_task(watching.open(dial))
        await begun.wait()
        wire.lose()
        await until(lambda: watching.away)
        watching._has_gone(TimeoutError("still no answer"))
        may_end.set()
        with pytest.raises(TimeoutError):
            await opening
        await wire.restore()
        await until(lambda: not watching.away)


async def test_a_way_that_is_long_is_no_reason_to_take_nobody_for_there(own_database: str):
    """A connection takes several answers, and all of them together longer than one may."""
    async with relayed(own_database) as wire:
        wire.delay = 0.28 * watch.PATIENCE
        async with Watch(dsn(wire.url)).running() as watching:
            await until(lambda: watching._own is not None and not watching.away)


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (asyncpg.ConnectionDoesNotExistError(), True),
        (ConnectionRefusedError(), True),
        (TimeoutError(), True),
        (asyncpg.ProtocolViolationError("no more connections allowed"), False),  # as a pooler says it
        (asyncpg.TooManyConnectionsError(), False),
        (asyncpg.CannotConnectNowError(), False),
        (asyncpg.InvalidPasswordError(), False),
    ],
)
async def test_whoever_refuses_is_there(error: Exception, away: bool):
    watching = Watch("postgresql://127.0.0.1:1/x")
    watching._judge(error)
    assert watching.away is away
    watching._judge(None)
    assert not watching.away


@pytest.mark.parametrize(
    ("sqlstate", "passing"),
    [
        ("53100", True),  # its disk is full
        ("57P03", True),
        ("08006", True),
        ("58030", True),
        ("25006", True),
        ("40P01", True),
        ("55P03", True),
        ("42P01", False),
        ("22001", False),
        ("25001", False),
        ("XX000", False),
        (None, False),
    ],
)
def test_what_passes_is_worth_another_try(sqlstate: str | None, passing: bool):
    assert passes(sqlstate) is passing


async def test_a_connection_of_its_own_that_was_cut_says_nothing_about_others(own_database: str, own_db: AsyncEngine):
    async with Watch(dsn(own_database)).running() as watching:
        await until(lambda: watching._own is not None)
        other = await database.open_connection(own_database, watch=watching)
        first = watching._own
        async with own_db.begin() as conn:
            await conn.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": first.get_server_pid()})
        await until(lambda: watching._own not in (None, first))
        assert await other.fetchval("SELECT 1") == 1
        await other.close()


class Cut:
    """As much of a connection as the watch uses; it is cut in the middle of the question."""

    ended = False

    def is_closed(self) -> bool:
        return self.ended

    async def execute(self, _: str) -> None:
        raise asyncpg.ConnectionDoesNotExistError

    def terminate(self) -> None:
        self.ended = True


async def test_nor_does_one_that_was_cut_in_the_middle_of_the_question(own_database: str):
    async with Watch(dsn(own_database)).running() as watching:
        await until(lambda: watching._own is not None)
        other = await database.open_connection(own_database, watch=watching)
        before, watching._own = watching._own, Cut()
        cut = watching._own
        await until(lambda: watching._own not in (None, cut))
        assert cut.ended
        assert await other.fetchval("SELECT 1") == 1
        for connection in (before, other):
            await connection.close()


async def test_a_postgresql_that_refuses_is_there_and_says_so_to_everybody(servers: Servers):
    url = with_database(servers.database_url, "no_such_database")
    async with Watch(dsn(url)).running() as watching:
        await until(lambda: b"switchboard_postgresql_away 1.0" in metrics.rendered())
        assert not watching.away
        with pytest.raises(PostgresAway, match="InvalidCatalogNameError"):
            await database.open_connection(url, watch=watching)


async def test_what_postgresql_says_in_the_moment_in_which_the_watch_ends_is_nobody_s_failure(
    monkeypatch: pytest.MonkeyPatch,
):
    async def refuses(*_: Any, **__: Any) -> None:
        watching.cancel()
        raise asyncpg.TooManyConnectionsError

    async def watch_for_ever() -> None:
        async with Watch("").running():
            await asyncio.Event().wait()

    monkeypatch.setattr(asyncpg, "connect", refuses)
    watching = asyncio.create_task(watch_for_ever())
    await asyncio.wait({watching})
    assert watching.cancelled()
    gc.collect()  # an error that nobody has looked at is complained of by now, and this test fails


async def test_connections_that_the_network_has_forgotten_are_replaced(
    service: Service, own_db: AsyncEngine, wire: Wire
):
    """New ones work, so nobody is away; the old ones say nothing for ever."""
    run_id = await insert_run(own_db, "c")
    assert await takes_callbacks(service, run_id)
    wire.forget()
    async with asyncio.timeout(LONG_BEFORE):
        await service.callback(run_id, "log", "lost")
        await until(lambda: takes_callbacks(service, run_id))


async def test_a_statement_that_was_cut_is_not_the_statement_s_fault(own_database: str, wire: Wire):
    async with Watch(dsn(wire.url)).running() as watching:
        line = database.Line(database.connect(wire.url, watch=watching))
        assert [tuple(row) for row in await line.fetch("SELECT 1")] == [(1,)]
        wire.lose()
        with pytest.raises(PostgresAway):
            await line.fetch("SELECT 1")
        await wire.restore()
        await until(lambda: not watching.away)
        assert [tuple(row) for row in await line.fetch("SELECT 1")] == [(1,)]
        wire.lose()
        with pytest.raises((DBAPIError, PostgresAway)):
            async with line.begin() as conn:
                await conn.execute(text("SELECT 1"))
        await line.hang_up()


# What was written, and not confirmed


async def test_a_callback_whose_commit_was_not_heard_of_is_a_duplicate_when_it_is_repeated(
    service: Service, own_db: AsyncEngine, wire: Wire
):
    run_id = await insert_run(own_db, "c")
    assert await takes_callbacks(service, run_id)
    stamp = {"timestamp": "2026-01-01T00:00:00Z"}
    wire.silence()
    assert (await service.callback(run_id, "log", "once", **stamp)).status_code == 503
    await wire.restore()
    await until(lambda: not service.state["watch"].away)
    again = await service.callback(run_id, "log", "once", **stamp)
    assert (again.status_code, again.json()) == (200, {"success": True, "duplicate": True})
    assert await rows_of(own_db, run_events, run_id) == 2


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "k"}])
async def test_an_execution_of_which_nobody_knows_whether_it_is_stored_is_not_called(
    own_db: AsyncEngine, wire: Wire, servers: Servers, headers: dict[str, str]
):
    async with receiving() as hook:
        settings = settings_for(wire.url, servers.redis_url, None, happyrobot_webhook_url=hook.url)
        async with running_service(settings) as service:
            await service.http.get("/api/happyrobot/runs")
            wire.silence()
            body = {"context_id": "c"}
            answer = await service.http.post("/api/happyrobot/trigger", json=body, headers=headers)
            assert answer.status_code == 503
            await wire.restore()
            await until(lambda: not service.state["watch"].away)
            assert (await service.http.get("/api/happyrobot/runs")).json() == []
        assert hook.requests == []
    async with own_db.connect() as conn:
        states = list(await conn.scalars(text("SELECT status FROM executions")))
    assert states in ([], ["pending"])


# Streams


@pytest.mark.parametrize("gone", ["postgresql", "redis", "both"])
async def test_open_streams_stay_open_and_get_everything_afterwards(
    own_database: str, own_db: AsyncEngine, servers: Servers, gone: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub, "_LOOK_EVERY", 0.1)
    context_id = f"order_{uuid4().hex}"
    run_id = await insert_run(own_db, context_id)
    async with (
        relayed(own_database) as wire,
        relayed(servers.redis_url) as news,
        running_service(settings_for(wire.url, news.url, None)) as service,
        running_service(settings_for(own_database, servers.redis_url, None)) as elsewhere,
        service.stream(context_id=context_id) as stream,
    ):
        await elsewhere.callback(run_id, "log", "before")
        assert (await anext(stream))["data"] == "before"
        for name, relay in (("postgresql", wire), ("redis", news)):
            if gone in (name, "both"):
                relay.lose()
        for number in range(3):
            assert (await elsewhere.callback(run_id, "log", number)).status_code == 200
        if gone != "redis":
            await until(lambda: service.state["watch"].away)
            await wire.restore()
        # Also where the news still do not come.
        async with asyncio.timeout(10):
            assert [(await anext(stream))["data"] for _ in range(3)] == [0, 1, 2]
        await news.restore()
        await until(lambda: takes_callbacks(service, run_id))
        assert (await anext(stream))["data"] == "again"


# Background work


class Checks:
    """In place of looks at runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str] = []
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.fail: Callable[[str], None] = lambda _: None

        async def check(_: Reconciler, run_id: str) -> None:
            self.begun.append(run_id)
            await self.may_end.wait()
            self.fail(run_id)

        monkeypatch.setattr(Reconciler, "check", check)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    return Checks(monkeypatch)


async def enqueue(db: AsyncEngine, subject: str) -> None:
    async with db.begin() as conn:
        await jobs.enqueue(conn, [Job(CHECK, subject)])


async def listeners(db: AsyncEngine) -> set[int]:
    """The connections that wait for news."""
    query = text("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'")
    async with db.connect() as conn:
        return set(await conn.scalars(query))


async def left(db: AsyncEngine) -> int:
    async with db.connect() as conn:
        return await conn.scalar(text("SELECT count(*) FROM switchboard_pgqueuer")) or 0


async def both_listen(db: AsyncEngine, before: set[int]) -> bool:
    return len(await listeners(db) - before) == 2


@pytest.mark.parametrize("how", ["cut", "forgotten", "restarted"])
async def test_a_worker_that_lost_postgresql_goes_on_and_hears_of_new_jobs(
    own_db: AsyncEngine,
    wire: Wire,
    servers: Servers,
    checks: Checks,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
):
    """Without looking by itself: nothing but news could make it."""
    monkeypatch.setattr(worker, "_LOOK_EVERY", timedelta(hours=1))
    async with running_service(settings_for(wire.url, servers.redis_url, None), worker=True) as service:
        await until(lambda: both_listen(own_db, set()))
        await enqueue(own_db, "before")
        await until(lambda: checks.begun == ["before"])
        before = await listeners(own_db)
        # A job that is under way is not waited for.
        checks.may_end.clear()
        await enqueue(own_db, "during")
        await until(lambda: checks.begun == ["before", "during"])
        if how == "cut":
            wire.lose()
            await until(lambda: service.state["watch"].away)
            await wire.restore()
        elif how == "forgotten":
            wire.forget()
        else:
            async with own_db.begin() as conn:
                cut = text(
                    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
                await conn.execute(cut)
        await until(lambda: both_listen(own_db, before))
        await enqueue(own_db, "after")
        await until(lambda: checks.begun == ["before", "during", "after"])
        checks.may_end.set()
        await until(lambda: nothing_left(own_db))
    assert checks.begun == ["before", "during", "after"]


async def nothing_left(db: AsyncEngine) -> bool:
    return await left(db) == 0


async def test_a_job_that_ends_or_fails_while_postgresql_is_away_is_put_in_order_when_it_is_back(
    own_db: AsyncEngine, wire: Wire, servers: Servers, checks: Checks, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker, "_AFTER_ABSENCE", 0.0)
    monkeypatch.setattr(worker, "_AFTER_TROUBLE", 3600.0)
    failed = False

    def fail_once(run_id: str) -> None:
        nonlocal failed
        if run_id == "fails" and not failed:
            failed = True
            raise PostgresAway

    async with running_service(settings_for(wire.url, servers.redis_url, None), worker=True) as service:
        checks.may_end.clear()
        await enqueue(own_db, "ends")
        await enqueue(own_db, "fails")
        await until(lambda: len(checks.begun) == 2)
        wire.lose()
        await until(lambda: service.state["watch"].away)
        checks.fail = fail_once
        checks.may_end.set()
        await until(lambda: failed)
        await wire.restore()
        await until(lambda: nothing_left(own_db))
    assert sorted(checks.begun) == ["ends", "fails", "fails"]


async def test_a_worker_begins_as_soon_as_there_is_a_postgresql(
    own_db: AsyncEngine, wire: Wire, servers: Servers, checks: Checks, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker, "_RESTART_AFTER", 0.1)
    wire.lose()
    await enqueue(own_db, "r")
    async with running_service(settings_for(wire.url, servers.redis_url, None), worker=True) as service:
        await until(lambda: service.state["watch"].away)
        await wire.restore()
        await until(lambda: checks.begun == ["r"])


async def test_a_connection_of_the_worker_s_is_ended_with_the_others(own_database: str, wire: Wire):
    async with Watch(dsn(wire.url)).running() as watching:
        connection = await database.open_connection(wire.url, watch=watching)
        ended = asyncio.Event()
        connection.add_termination_listener(lambda _: ended.set())
        await connection.add_listener("news", lambda *_: None)
        wire.lose()
        async with asyncio.timeout(LONG_BEFORE):
            await ended.wait()
        with pytest.raises(asyncpg.InterfaceError):
            await connection.fetch("SELECT 1")
