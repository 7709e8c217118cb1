"""The short way into the timeline, which must come out where the long one does."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Table, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database
from switchboard.database import Line
from switchboard.errors import PostgresAway, StatementFailed, Unavailable
from switchboard.events import APPROVAL_REQUESTED, NewEvent
from switchboard.jobs import RECONCILE, Job, enqueue
from switchboard.leaving import Leaving
from switchboard.runs import ingest, intake
from switchboard.runs.appending import append, plain
from switchboard.runs.intake import Intake
from switchboard.runs.sorting import Duplicate, News, Outcome, Recorded, Unconfirmed
from switchboard.tables import ExecutionStatus, RunStatus, agent_runs, held_callbacks, run_events
from tests.conftest import insert_run, rows_of, run_sql, until
from tests.test_degraded import Silent


async def short(line: Line, *events: NewEvent) -> list[Recorded | Duplicate | None]:
    return await append(line, events, reconcile_after=15)


# What goes the short way.


@pytest.mark.parametrize(
    ("status", "event"),
    [
        ("RUNNING", NewEvent("", "log", {"message": "hello"})),
        ("RUNNING", NewEvent("", "pickup_confirmed")),
        ("RUNNING", NewEvent("", "running", None, RunStatus.RUNNING)),
        ("PENDING", NewEvent("", "log")),
        ("COMPLETED", NewEvent("", "log", "late")),
    ],
)
async def test_what_changes_nothing_but_the_timeline_is_one_statement(
    db: AsyncEngine, line: Line, context_id: str, status: str, event: NewEvent
):
    event = replace(event, run_id=await insert_run(db, context_id, status))
    [outcome] = await short(line, event)
    assert isinstance(outcome, Recorded)
    async with db.connect() as conn:
        row = (await conn.execute(select(run_events).where(run_events.c.run_id == event.run_id))).one()
    assert (row.id, row.context_id, row.workflow_id) == (outcome.event.id, context_id, "default")
    assert (row.event_type, row.status, row.data) == (event.event_type, status, event.data)
    told = outcome.event
    assert (told.run_id, told.context_id, told.workflow_id) == (event.run_id, context_id, "default")
    assert (told.event_type, told.status, told.data, told.timestamp) == (
        event.event_type,
        status,
        event.data,
        row.created_at,
    )


@pytest.mark.parametrize(
    ("status", "event"),
    [
        ("RUNNING", NewEvent("", "completed", None, RunStatus.COMPLETED)),
        ("RUNNING", NewEvent("", APPROVAL_REQUESTED, None, RunStatus.RUNNING)),
        ("RUNNING", NewEvent("", "session.status_changed", session_ended=True)),
        ("RUNNING", NewEvent("", "status", only_if_it_moves=True)),
        ("RUNNING", NewEvent("", "timed_out", guess=True)),
        ("RUNNING", NewEvent("", "log", only_after=1)),
        ("RUNNING", NewEvent("", "log", then=Job(RECONCILE, "x"))),
    ],
)
async def test_what_may_change_more_is_not_tried(db: AsyncEngine, context_id: str, status: str, event: NewEvent):
    event = replace(event, run_id=await insert_run(db, context_id, status))
    log = NewEvent(event.run_id, "log")
    assert plain([log, event]) == {}, "nor is what must not overtake it"
    assert plain([event, NewEvent("another", "log")]) == {1: NewEvent("another", "log")}


@pytest.mark.parametrize("why", ["not known", "waits", "timed out", "something is held"])
async def test_only_the_database_knows_of_some(db: AsyncEngine, line: Line, context_id: str, why: str):
    run_id = (
        "nobody" if why == "not known" else await insert_run(db, context_id, "PENDING" if why == "waits" else "RUNNING")
    )
    async with db.begin() as conn:
        if why == "timed out":
            timed_out = update(agent_runs).where(agent_runs.c.run_id == run_id)
            await conn.execute(timed_out.values(status="FAILED", timed_out=True))
        elif why == "something is held":
            await conn.execute(insert(held_callbacks).values(run_id=run_id, event_type="log"))
    other = await insert_run(db, context_id)
    events = NewEvent(run_id, "running", None, RunStatus.RUNNING), NewEvent(run_id, "log"), NewEvent(other, "log")
    first, second, third = await short(line, *events)
    assert (first, second) == (None, None), "also the log, which would otherwise overtake"
    assert isinstance(third, Recorded)
    assert await rows_of(db, run_events, run_id) == 0


async def test_copies_count_once_whenever_they_come(db: AsyncEngine, line: Line, run_id: str):
    event = NewEvent(run_id, "log", 1, dedupe_key=uuid4())
    assert plain([event, replace(event, data=2)]) == {0: event}
    first, second = await short(line, event, NewEvent(run_id, "log"))
    again, other = await short(line, event, NewEvent(run_id, "log", dedupe_key=uuid4()))
    assert [type(each) for each in (first, second, again, other)] == [Recorded, Recorded, Duplicate, Recorded]
    assert await rows_of(db, run_events, run_id) == 3


async def test_ids_follow_each_other_without_a_gap(db: AsyncEngine, line: Line, run_id: str):
    known = NewEvent(run_id, "log", dedupe_key=uuid4())
    [first] = await short(line, known)
    outcomes = await short(line, NewEvent("nobody", "log"), known, *(NewEvent(run_id, "log", n) for n in range(3)))
    events = [outcome.event for outcome in (first, *outcomes) if isinstance(outcome, Recorded)]
    assert [event.id - events[0].id for event in events] == [0, 1, 2, 3], "or streams would look for what is missing"
    assert [event.data for event in events[1:]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("status", "timed_out", "sooner"),
    [("RUNNING", False, True), ("FAILED", True, True), ("FAILED", False, False), ("COMPLETED", False, False)],
)
async def test_a_run_that_speaks_after_a_long_silence_is_asked_about_sooner(
    db: AsyncEngine, line: Line, context_id: str, status: str, timed_out: bool, sooner: bool
):
    run_id = await insert_run(db, context_id, status)
    async with db.begin() as conn:
        await conn.execute(update(agent_runs).where(agent_runs.c.run_id == run_id).values(timed_out=timed_out))
        await enqueue(conn, [Job(RECONCILE, run_id, 300)])
    await short(line, NewEvent(run_id, "log"))
    wait = text(
        "SELECT extract(epoch FROM execute_after - now()) FROM switchboard_pgqueuer WHERE dedupe_key = :key"
    ).bindparams(key=f"{RECONCILE}:{run_id}")
    async with db.connect() as conn:
        assert ((await conn.scalar(wait)) < 16) == sooner


async def test_a_job_that_somebody_has_locked_holds_nobody_up(db: AsyncEngine, line: Line, run_id: str):
    async with db.begin() as conn:
        await enqueue(conn, [Job(RECONCILE, run_id, 300)])
    async with db.begin() as conn:
        job = text("SELECT id FROM switchboard_pgqueuer WHERE dedupe_key = :key FOR UPDATE")
        await conn.execute(job, {"key": f"{RECONCILE}:{run_id}"})
        [outcome] = await short(line, NewEvent(run_id, "log"))
    assert isinstance(outcome, Recorded)


async def test_who_misses_a_turn_misses_it_together(
    db: AsyncEngine, line: Line, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ingest, "TURN", text(ingest.TURN.text.replace("'3s'", "'20ms'")))
    turns = 0
    genuine = ingest.write

    async def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal turns
        turns += 1
        return await genuine(*arguments, **named)

    monkeypatch.setattr(intake, "write", counted)
    queue = Intake(line, Silent(), Leaving())
    async with db.begin() as conn:
        await conn.execute(text("SELECT pg_advisory_xact_lock(7308060441651407467)"))
        news = [queue.take(NewEvent(run_id, "completed", number, RunStatus.COMPLETED)) for number in range(5)]
        outcomes = await asyncio.gather(*news, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {PostgresAway}
    assert turns == 1


async def test_who_is_in_the_middle_of_a_turn_is_waited_for(db: AsyncEngine, line: Line, run_id: str):
    async with db.begin() as conn:
        await conn.execute(ingest.TURN)
        appending = asyncio.create_task(short(line, NewEvent(run_id, "log")))
        waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        async with db.connect() as other:
            await until(lambda: other.scalar(waiting))
        assert not appending.done()
        # What is committed before its turn is seen in it, although it was asked before that.
        moved = update(agent_runs).where(agent_runs.c.run_id == run_id).values(status="COMPLETED")
        await conn.execute(moved)
    [outcome] = await appending
    assert isinstance(outcome, Recorded)
    assert outcome.event.status == "COMPLETED"


async def test_in_a_turn_no_table_is_read_through_whatever_a_plan_was_made_for(db: AsyncEngine):
    async with db.connect() as conn:
        async with conn.begin():
            await conn.execute(ingest.TURN)
            assert await conn.scalar(text("SHOW enable_seqscan")) == "off"
        assert await conn.scalar(text("SHOW enable_seqscan")) == "on"


async def test_nobody_waits_for_a_turn_for_ever(db: AsyncEngine):
    declared = text("SELECT proconfig FROM pg_proc WHERE proname = 'switchboard_append'")
    async with db.connect() as conn:
        assert "lock_timeout=3s" in (await conn.scalar(declared) or [])


# That it comes out where the long way does.

_KINDS: dict[str, dict[str, Any]] = {
    "log": {},
    "running": {"status": RunStatus.RUNNING},
    "completed": {"status": RunStatus.COMPLETED},
    "failed": {"status": RunStatus.FAILED},
    "status": {"status": RunStatus.RUNNING, "only_if_it_moves": True},
    "timed_out": {"status": RunStatus.FAILED, "guess": True, "only_if_it_moves": True},
    "session.status_changed": {"session_ended": True},
}
_STATUSES = ("RUNNING", "PENDING", "COMPLETED", None)
_step = st.tuples(st.integers(0, len(_STATUSES) - 1), st.sampled_from(list(_KINDS)), st.none() | st.integers(0, 2))


async def _runs(db: AsyncEngine, context_id: str) -> list[str]:
    return [
        f"unknown_{uuid4()}" if status is None else await insert_run(db, context_id, status) for status in _STATUSES
    ]


def _news(runs: Sequence[str], batch: Sequence[tuple[int, str, int | None]], number: int) -> list[NewEvent]:
    return [
        NewEvent(
            runs[run],
            kind,
            {"number": number + place},
            outcome={"number": number + place},
            dedupe_key=None if copy is None else UUID(int=hash((runs[run], copy)) & (2**128 - 1)),
            **_KINDS[kind],
        )
        for place, (run, kind, copy) in enumerate(batch)
    ]


async def _left_behind(db: AsyncEngine, runs: Sequence[str]) -> list[list[Any]]:
    """All that can be told of these runs, but for ids and times."""

    async def rows(table: Table, *columns: str) -> list[Any]:
        wanted = select(table.c.run_id, *(table.c[name] for name in columns)).where(table.c.run_id.in_(runs))
        async with db.connect() as conn:
            found = (await conn.execute(wanted.order_by(table.c.id))).all()
        return [(runs.index(row.run_id), *row[1:]) for row in found]

    return [
        await rows(run_events, "event_type", "status", "data"),
        await rows(agent_runs, "status", "timed_out", "metadata"),
        await rows(held_callbacks, "event_type", "data"),
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(_step, min_size=1, max_size=6), max_size=5))
async def test_both_ways_lead_to_the_same_end(
    db: AsyncEngine, line: Line, context_id: str, batches: list[list[tuple[int, str, int | None]]]
):
    queue = Intake(line, Silent(), Leaving())
    here, there = await _runs(db, context_id), await _runs(db, context_id)
    for number, batch in enumerate(batches):
        news = _news(here, batch, 10 * number)
        taken = await asyncio.gather(*(queue.take(each) for each in news))
        async with db.begin() as conn:
            written = await ingest.write(conn, _news(there, batch, 10 * number))
        assert [type(outcome) for outcome in taken] == [type(outcome) for outcome in written.outcomes]
    # In what order events of different runs follow each other is nobody's business.
    (events, *mine), (expected, *theirs) = await _left_behind(db, here), await _left_behind(db, there)
    assert sorted(events, key=lambda event: event[0]) == sorted(expected, key=lambda event: event[0])
    assert mine == theirs


# What else the intake does with it.


async def test_a_batch_goes_both_ways_and_each_gets_its_own_answer(db: AsyncEngine, line: Line, context_id: str):
    first, second = await insert_run(db, context_id), await insert_run(db, context_id)
    announcer = Silent()
    queue = Intake(line, announcer, Leaving())
    news = [
        NewEvent(first, "log", 1),
        NewEvent(second, "log", 2),
        NewEvent(second, "completed", 3, RunStatus.COMPLETED),
        NewEvent(second, "log", 4),
    ]
    outcomes = await asyncio.gather(*(queue.take(each) for each in news))
    assert [outcome.event.data for outcome in outcomes if isinstance(outcome, Recorded)] == [1, 2, 3, 4]
    assert [[event.data for event in events] for events in announcer.announced] == [[1], [2, 3, 4]]


async def test_the_same_news_are_taken_as_often_as_they_come(line: Line, db: AsyncEngine, run_id: str):
    queue, event = Intake(line, Silent(), Leaving()), NewEvent(run_id, "log")
    first, second = await asyncio.gather(queue.take(event), queue.take(event))
    assert isinstance(first, Recorded)
    assert isinstance(second, Recorded)
    assert first.event.id != second.event.id
    assert await rows_of(db, run_events, run_id) == 2


async def test_what_waits_is_bounded_by_its_size(line: Line, run_id: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(intake, "MAX_WAITING_BYTES", 100)
    queue = Intake(line, Silent(), Leaving())

    async def take(*sizes: int) -> list[type[Any]]:
        news = [queue.take(NewEvent(run_id, "log"), size) for size in sizes]
        return [type(outcome) for outcome in await asyncio.gather(*news, return_exceptions=True)]

    assert await take(60, 40, 1) == [Recorded, Recorded, Unavailable]
    assert await take(101, 1) == [Recorded, Unavailable], "one that is alone has all the room there is"
    assert await take(60, 40) == [Recorded, Recorded], "what is written makes room"


async def test_what_is_being_written_waits_no_more(line: Line, run_id: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(intake, "MAX_WAITING_BYTES", 100)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(*arguments: Any, **named: Any) -> Any:
        begun.set()
        await go_on.wait()
        return await append(*arguments, **named)

    monkeypatch.setattr(intake, "append", slow)
    queue = Intake(line, Silent(), Leaving())
    first = asyncio.create_task(queue.take(NewEvent(run_id, "log"), 60))
    await begun.wait()
    others = [asyncio.create_task(queue.take(NewEvent(run_id, "log"), size)) for size in (30, 60, 60)]
    await asyncio.sleep(0)
    go_on.set()
    outcomes = await asyncio.gather(first, *others, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Recorded, Recorded, Recorded, Unavailable]


async def test_what_is_never_sent_away_comes_on_top(line: Line, run_id: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(intake, "MAX_WAITING_BYTES", 10)
    monkeypatch.setattr(intake, "write", lambda *_, **__: asyncio.sleep(0, Written))
    news: list[News] = [NewEvent(run_id, "log"), Unconfirmed(uuid4(), ExecutionStatus.FAILED, "why")]
    queue = Intake(line, Silent(), Leaving())
    outcomes = await asyncio.gather(*(queue.take(each, 10) for each in news))
    assert [type(outcome) for outcome in outcomes] == [Recorded, str]


class Written:
    outcomes: Sequence[Outcome | str] = ("noted",)
    events: Sequence[Any] = ()


async def test_a_batch_is_not_larger_than_postgresql_likes(line: Line, run_id: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(intake, "MAX_BATCH_BYTES", 100)
    announcer = Silent()
    queue = Intake(line, announcer, Leaving())
    await asyncio.gather(*(queue.take(NewEvent(run_id, "log"), 60) for _ in range(5)))
    assert [len(batch) for batch in announcer.announced] == [2, 2, 1]


# The connection that it keeps.


async def test_a_connection_is_kept_from_statement_to_statement(line: Line):
    pids = [(await line.fetch("SELECT pg_backend_pid()"))[0][0] for _ in range(3)]
    async with line.begin() as conn:
        pids.append(await conn.scalar(text("SELECT pg_backend_pid()")))
    assert len(set(pids)) == 1


async def _pid(line: Line) -> int:
    return int((await line.fetch("SELECT pg_backend_pid()"))[0][0])


async def _is_active(db: AsyncEngine, pid: int) -> bool:
    """Whether a backend executes something; in a transaction of its own, within which that would never change."""
    active = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid AND state = 'active'")
    async with db.connect() as conn:
        return bool(await conn.scalar(active, {"pid": pid}))


@pytest.mark.parametrize("way", ["fetch", "begin"])
@pytest.mark.parametrize("noticed", [True, False])
async def test_one_that_was_cut_is_replaced_before_anybody_notices(
    db: AsyncEngine, line: Line, way: str, noticed: bool, monkeypatch: pytest.MonkeyPatch
):
    pid = await _pid(line)
    if not noticed:
        # As after some time in which the network has not said that it is gone.
        monkeypatch.setattr(database, "_SURELY_THERE", -1)
        monkeypatch.setattr(line._driver, "is_closed", lambda: False)
    async with db.connect() as conn:
        await conn.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    await until(lambda: not line._driver._protocol.is_connected())
    if way == "fetch":
        assert await _pid(line) != pid
    else:
        async with line.begin() as conn:
            assert await conn.scalar(text("SELECT 1")) == 1


async def test_one_that_does_not_answer_is_given_to_nobody(database_url: str, monkeypatch: pytest.MonkeyPatch):
    engine = database.connect(database_url, pool_size=1)
    line = Line(engine)
    pid = await _pid(line)
    driver: Any = line._driver
    monkeypatch.setattr(database, "_is_doubtful", lambda connection, _: connection is driver)
    monkeypatch.setattr(driver, "fetchrow", AsyncMock(side_effect=TimeoutError))
    monkeypatch.setattr(engine.sync_engine.dialect, "do_ping", lambda _: True)
    assert await _pid(line) != pid
    await line.hang_up()
    await engine.dispose()


async def test_one_that_is_cut_in_the_middle_says_that_postgresql_is_away(db: AsyncEngine, line: Line):
    pid = await _pid(line)
    waiting = asyncio.create_task(line.fetch("SELECT pg_sleep(30)"))
    await until(lambda: _is_active(db, pid))
    async with db.connect() as conn:
        await conn.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    with pytest.raises(PostgresAway):
        await waiting
    assert await _pid(line) != pid


async def test_a_statement_that_fails_fails_alone(line: Line):
    for statement, arguments in (("SELECT 1 / 0", ()), ("SELECT $1::int", ("no number",))):
        with pytest.raises(StatementFailed):
            await line.fetch(statement, *arguments)
        assert (await line.fetch("SELECT 1"))[0][0] == 1


@pytest.mark.parametrize("error", [asyncpg.InternalClientError("odd"), TimeoutError(), ConnectionResetError()])
async def test_whatever_else_goes_wrong_is_postgresql_s_absence(
    line: Line, error: Exception, monkeypatch: pytest.MonkeyPatch
):
    pid = await _pid(line)
    monkeypatch.setattr(line._driver, "fetch", AsyncMock(side_effect=error))
    with pytest.raises(PostgresAway):
        await line.fetch("SELECT 1")
    assert await _pid(line) != pid, "nobody gets a connection that may be dead"


async def test_one_that_would_succeed_later_says_so(db: AsyncEngine, line: Line, run_id: str, database_url: str):
    name = f"impatient_{uuid4().hex}"
    await run_sql(
        database_url,
        f"CREATE FUNCTION {name}() RETURNS void LANGUAGE sql SET lock_timeout = '20ms' "
        "AS $$ SELECT pg_advisory_xact_lock(7308060441651407467) $$",
    )
    async with db.begin() as conn:
        await conn.execute(ingest.TURN)
        with pytest.raises(PostgresAway, match="LockNotAvailable"):
            await line.fetch(f"SELECT {name}()")


async def test_whoever_gives_up_leaves_a_good_connection_behind(db: AsyncEngine, line: Line):
    pid = await _pid(line)
    waiting = asyncio.create_task(line.fetch("SELECT pg_sleep(30)"))
    await until(lambda: _is_active(db, pid))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(5):
        assert await _pid(line) != pid


async def test_what_a_wire_has_swallowed_is_the_last_thing_it_gets(database_url: str):
    engine, pid = database.connect(database_url, statement_timeout=0.2), text("SELECT pg_backend_pid()")
    async with engine.connect() as conn:
        before = await conn.scalar(pid)
        with pytest.raises(TimeoutError):
            await conn.execute(text("SELECT pg_sleep(5)"))
    async with engine.connect() as conn:
        assert await conn.scalar(pid) != before
    await engine.dispose()
