"""What callers see when a part is away, or when there is too much to do."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any
from unittest.mock import Mock
from uuid import uuid4

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from structlog.testing import capture_logs

from switchboard import database
from switchboard.breaker import Breaker
from switchboard.database import Line
from switchboard.errors import PUBLIC, PostgresAway, Unavailable
from switchboard.events import Event, NewEvent
from switchboard.leaving import Leaving
from switchboard.live.announcer import Announcer
from switchboard.live.channel import Channel
from switchboard.live.messages import unpack
from switchboard.logs import bound
from switchboard.runs import intake
from switchboard.runs.intake import Intake
from switchboard.runs.sorting import Duplicate, Held, NewRuns, Recorded, Registered
from switchboard.tables import RunStatus, run_events
from switchboard.tasks import end
from tests.conftest import (
    Servers,
    Service,
    insert_run,
    new_database,
    rows_of,
    run_sql,
    running_service,
    settings_for,
    until,
    with_database,
)


@pytest.fixture(params=["no such folder", "no such database", "nobody listens"])
async def without_postgres(request: pytest.FixtureRequest, servers: Servers) -> AsyncIterator[Service]:
    url = {
        "no such folder": "postgresql://postgres@/switchboard?host=/no/such/folder",
        "no such database": with_database(servers.database_url, "no_such_database"),
        "nobody listens": "postgresql://postgres@127.0.0.1:1/switchboard",
    }[request.param]
    async with running_service(settings_for(url, servers.redis_url, None)) as service:
        yield service


async def test_without_postgresql_everything_says_to_come_back(without_postgres: Service):
    service = without_postgres
    answers = [
        await service.callback("r", "log"),
        await service.http.post("/api/happyrobot/trigger", json={"context_id": "c"}),
        await service.http.get("/api/happyrobot/runs"),
        await service.http.get("/api/happyrobot/runs/r"),
        await service.http.get("/api/happyrobot/runs/r/events"),
        await service.http.get("/api/happyrobot/status?run_id=r"),
        await service.http.get("/api/events?run_id=r"),
    ]
    for answer in answers:
        assert (answer.status_code, answer.json()) == (503, {"error": "Database unavailable"})
        assert answer.headers["retry-after"] == "1"
    assert (await service.http.get("/healthz")).status_code == 200


async def test_without_postgresql_the_public_api_says_so_in_its_own_shape(without_postgres: Service):
    url, headers = f"{PUBLIC}/executions/x/status", {"Authorization": f"Bearer {'0' * 64}"}
    answer = await without_postgres.http.get(url, headers=headers)
    assert (answer.status_code, answer.json()) == (
        503,
        {"message": "Database unavailable", "error": "Service Unavailable", "statusCode": 503, "retryAfter": 1},
    )
    assert {"x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset", "retry-after"} <= set(answer.headers)


async def test_while_one_finds_out_whether_redis_is_back_nobody_waits_for_that():
    breaker, asked, answers = Breaker(), 0, asyncio.Event()

    async def alone() -> str:
        return "alone"

    async def gone() -> str:
        raise RedisConnectionError("gone")

    async def slow() -> str:
        nonlocal asked
        asked += 1
        await answers.wait()
        return "shared"

    assert await breaker.call(gone, alone) == "alone"
    assert await breaker.call(slow, alone) == "alone"
    breaker._closed_again_at = 0.0  # its rest is over
    first = asyncio.create_task(breaker.call(slow, alone))
    await asyncio.sleep(0)
    assert {await breaker.call(slow, alone) for _ in range(10)} == {"alone"}
    answers.set()
    assert await first == "shared"
    assert await breaker.call(slow, alone) == "shared"
    assert asked == 2


async def test_connections_that_were_cut_are_replaced(service: Service, db: AsyncEngine, run_id: str):
    assert (await service.callback(run_id, "log", 1)).status_code == 200
    async with db.connect() as conn:
        await conn.execute(
            text(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    assert (await service.callback(run_id, "log", 2)).status_code == 200
    assert (await service.run(run_id))["metadata"]["logs"] == [1, 2]


async def test_an_error_of_our_own_says_nothing_about_our_insides(
    service: Service, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("switchboard.runs.reading._run_out", fail)
    answer = await service.http.get(f"/api/happyrobot/runs/{run_id}")
    assert (answer.status_code, answer.json()) == (500, {"error": "Internal server error"})


async def test_an_error_in_a_statement_is_ours(service: Service, run_id: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("switchboard.runs.reading.find_run", broken)
    answer = await service.http.get(f"/api/happyrobot/runs/{run_id}")
    assert (answer.status_code, answer.json()) == (500, {"error": "Internal server error"})


async def broken(conn: Any, _: str) -> None:
    await conn.execute(text("SELECT no_such_column"))


@pytest.mark.parametrize("said", ["at once", "asked", "never"])
async def test_connections_that_were_cut_in_the_pool_are_replaced(
    database_url: str, db: AsyncEngine, said: str, monkeypatch: pytest.MonkeyPatch
):
    """Whether the network says so, says so when it is asked, or does not answer at all."""
    engine, pid = database.connect(database_url), text("SELECT pg_backend_pid()")
    dialect = engine.sync_engine.dialect
    async with engine.connect() as one, engine.connect() as another:
        pids = [await one.scalar(pid), await another.scalar(pid)]
        drivers: list[Any] = [(await each.get_raw_connection()).driver_connection for each in (one, another)]
    if said == "at once":
        async with db.connect() as conn:
            cut = text("SELECT pg_terminate_backend(pid, 10000) FROM unnest(CAST(:pids AS int[])) AS pid")
            await conn.execute(cut, {"pids": pids})
        await until(lambda: all(driver.is_closed() for driver in drivers))
    else:
        error = TimeoutError() if said == "never" else dialect.loaded_dbapi.InterfaceError("cut")
        monkeypatch.setattr(database, "_SURELY_THERE", -1)
        monkeypatch.setattr(dialect, "do_ping", Mock(side_effect=error))
    async with engine.connect() as one, engine.connect() as another:
        assert not {await one.scalar(pid), await another.scalar(pid)} & set(pids)
    await engine.dispose()


class Silent(Announcer):
    """An announcer that remembers instead."""

    def __init__(self) -> None:
        self.announced: list[Any] = []

    def announce(self, events: Any) -> None:
        self.announced.append(list(events))


def log(run_id: str, data: Any = None, event_type: str = "log") -> NewEvent:
    return NewEvent(run_id, event_type, data)


def moving(run_id: str) -> NewEvent:
    return NewEvent(run_id, "completed", None, RunStatus.COMPLETED)


async def test_events_that_come_during_a_write_are_written_together(line: Line, run_id: str):
    announcer = Silent()
    queue = Intake(line, announcer, Leaving())
    outcomes = await asyncio.gather(*(queue.take(log(run_id, number)) for number in range(50)))
    assert all(isinstance(outcome, Recorded) for outcome in outcomes)
    # Nobody waits for company: all that were there at the start went together, in their order.
    assert [len(batch) for batch in announcer.announced] == [50]
    assert [event.data for event in announcer.announced[0]] == list(range(50))


async def test_an_intake_that_closes_waits_for_what_is_expected(line: Line, run_id: str):
    queue = Intake(line, Silent(), Leaving())
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def place_a_call() -> object:
        with queue.expecting():
            asked.set()
            await may_answer.wait()
            return await queue.take(log(run_id, "what became of it"))

    async with queue.running():
        call = asyncio.create_task(place_a_call())
        await asked.wait()
        asyncio.get_running_loop().call_later(0.05, may_answer.set)
    assert isinstance(call.result(), Recorded)


async def test_what_became_of_a_call_is_written_as_long_as_the_process_lives(
    line: Line, db: AsyncEngine, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    nowhere = database.connect("postgresql://127.0.0.1:1/none")
    runs = NewRuns(uuid4(), "default", context_id, "A call", None, (f"run_{context_id}",))
    monkeypatch.setattr(intake, "_PAUSES", (0.01,))
    monkeypatch.setattr(intake, "LAST_NEWS", 0.1)
    with capture_logs() as lines:
        async with Intake(Line(nowhere), Silent(), Leaving()).running() as queue:
            lost = queue.insist(runs)
        assert lost.cancelled()
    assert [said["execution_id"] for said in lines if said["event"] == "what became of a call is lost"] == [
        runs.execution_id
    ]
    async with Intake(line, Silent(), Leaving()).running() as queue:
        assert isinstance(await queue.insist(runs), Registered)
        await asyncio.sleep(0)
        assert not queue._insisted
    assert await rows_of(db, run_events, runs.run_ids[0]) == 1
    await nowhere.dispose()


async def test_each_of_a_batch_gets_its_own_answer(line: Line, run_id: str):
    key = uuid4()
    queue = Intake(line, Silent(), Leaving())
    outcomes = await asyncio.gather(
        queue.take(NewEvent(run_id, "log", 1, dedupe_key=key)),
        queue.take(NewEvent("nobody", "log", 2)),
        queue.take(NewEvent(run_id, "log", 3, dedupe_key=key)),
        queue.take(NewEvent(run_id, "log", 4)),
    )
    assert [type(outcome) for outcome in outcomes] == [Recorded, Held, Duplicate, Recorded]
    assert [outcome.event.data for outcome in outcomes if isinstance(outcome, Recorded)] == [1, 4]


async def test_one_bad_event_among_many_fails_alone(db: AsyncEngine, line: Line, run_id: str):
    queue = Intake(line, Silent(), Leaving())
    bad = log(run_id, event_type="x" * 256)  # no endpoint lets it through; the column does not either
    outcomes = await asyncio.gather(
        queue.take(log(run_id, 1)), queue.take(bad), queue.take(log(run_id, 2)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [Recorded, DBAPIError, Recorded]
    assert await rows_of(db, run_events, run_id) == 2
    assert isinstance(await queue.take(log(run_id, 3)), Recorded)


async def test_an_absent_postgresql_fails_all_at_once():
    away = database.connect("postgresql://nobody@/nothing?host=/no/such/folder")
    queue = Intake(Line(away), Silent(), Leaving())
    outcomes = await asyncio.gather(*(queue.take(log("r")) for _ in range(20)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {PostgresAway}


@pytest.mark.parametrize(("way", "new"), [("append", log), ("write", moving)])
async def test_an_error_that_nobody_foresaw_reaches_every_caller(
    line: Line, run_id: str, monkeypatch: pytest.MonkeyPatch, way: str, new: Callable[[str], NewEvent]
):
    async def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(intake, way, fail)
    queue = Intake(line, Silent(), Leaving())
    outcomes = await asyncio.gather(*(queue.take(new(run_id)) for _ in range(3)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ZeroDivisionError}
    monkeypatch.undo()
    assert isinstance(await queue.take(log(run_id)), Recorded)


async def test_beyond_the_bound_callers_are_told_to_come_back(line: Line, run_id: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(intake, "MAX_WAITING", 3)
    queue = Intake(line, Silent(), Leaving())
    outcomes = await asyncio.gather(*(queue.take(log(run_id)) for _ in range(5)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Recorded] * 3 + [Unavailable] * 2
    assert isinstance(await queue.take(log(run_id)), Recorded)


async def test_a_caller_that_hangs_up_takes_nothing_away(db: AsyncEngine, line: Line, run_id: str):
    queue = Intake(line, Silent(), Leaving())
    async with queue.running():
        impatient = asyncio.create_task(queue.take(log(run_id, 1)))
        patient = asyncio.create_task(queue.take(log(run_id, 2)))
        await asyncio.sleep(0)
        impatient.cancel()
        assert isinstance(await patient, Recorded)
    assert await rows_of(db, run_events, run_id) == 2


@pytest.mark.parametrize(("way", "new"), [("append", log), ("write", moving)])
async def test_what_is_written_together_is_written_in_nobody_s_name(
    line: Line, run_id: str, monkeypatch: pytest.MonkeyPatch, way: str, new: Callable[[str], NewEvent]
):
    names: list[object] = []
    genuine = getattr(intake, way)

    async def watched(*arguments: Any, **named: Any) -> Any:
        names.append(dict(bound.current()))
        return await genuine(*arguments, **named)

    monkeypatch.setattr(intake, way, watched)
    bound.begin(request_id="of the one who came first")
    await Intake(line, Silent(), Leaving()).take(new(run_id))
    bound.end()
    assert names == [{}]


async def test_who_waits_for_a_writer_that_is_stopped_is_told(line: Line, monkeypatch: pytest.MonkeyPatch):
    begun = asyncio.Event()

    async def never(*_: object, **__: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(intake, "append", never)
    queue = Intake(line, Silent(), Leaving())
    being_written = asyncio.create_task(queue.take(log("r")))
    await begun.wait()
    waits = asyncio.create_task(queue.take(log("r")))
    await asyncio.sleep(0)
    assert queue._writing is not None
    await end(queue._writing)
    async with asyncio.timeout(10):
        told = await asyncio.gather(being_written, waits, return_exceptions=True)
    assert [type(each) for each in told] == [asyncio.CancelledError] * 2


async def test_what_waits_is_written_before_the_service_leaves(line: Line, run_id: str):
    async with Intake(line, Silent(), Leaving()).running() as queue:
        waiting = [asyncio.create_task(queue.take(log(run_id, number))) for number in range(3)]
        await asyncio.sleep(0)
    async with asyncio.timeout(1):
        assert {type(outcome) for outcome in await asyncio.gather(*waiting)} == {Recorded}


async def test_what_fails_at_the_commit_is_neither_confirmed_nor_announced(
    servers: Servers, template: str, context_id: str
):
    """A constraint that PostgreSQL checks at the very end."""
    async with new_database(servers, template) as url:
        await run_sql(
            url,
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'refused at the commit'; END $$",
            "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON run_events DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW WHEN (NEW.event_type = 'refused') EXECUTE FUNCTION refuse()",
        )
        engine = database.connect(url)
        run_id = await insert_run(engine, context_id)
        async with (
            running_service(settings_for(url, servers.redis_url, None)) as service,
            service.stream(context_id=context_id) as stream,
        ):
            assert (await service.callback(run_id, "refused")).status_code == 500
            assert (await service.callback(run_id, "log", "kept")).status_code == 200
            async with asyncio.timeout(10):
                assert (await anext(stream))["data"] == "kept"
        assert await rows_of(engine, run_events, run_id) == 1
        await engine.dispose()


async def test_what_is_being_announced_when_the_service_stops_is_announced(db: AsyncEngine):
    begun, may_end = asyncio.Event(), asyncio.Event()
    sent: list[bytes] = []

    class Slow:
        async def publish(self, _: str, message: bytes) -> None:
            begun.set()
            await may_end.wait()
            sent.append(message)

    def event(number: int) -> Event:
        return Event(
            id=number,
            run_id="r",
            context_id="c",
            workflow_id="w",
            event_type="log",
            status=RunStatus.RUNNING,
            timestamp=now,
            data=None,
        )

    now = datetime.now(UTC)
    announcer = Announcer(Slow(), Channel(db), lambda: None, Leaving())  # type: ignore[arg-type]  # as much of Redis as it uses
    async with announcer.running():
        announcer.announce([event(1)])
        await begun.wait()
        announcer.announce([event(2)])
        asyncio.get_running_loop().call_soon(may_end.set)
    assert [frame.event.id for message in sent for frame in unpack(message)[1]] == [1, 2]
