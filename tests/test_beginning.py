"""The short way of new runs, which must come out where the long one does."""

import asyncio
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.access import webhooks
from switchboard.database import Line
from switchboard.errors import StatementFailed
from switchboard.events import Event, NewEvent
from switchboard.jobs import RECONCILE
from switchboard.leaving import Leaving
from switchboard.runs import ingest, intake
from switchboard.runs.beginning import begin, fresh
from switchboard.runs.intake import Intake
from switchboard.runs.sorting import NewRuns, News, Recorded, Registered
from switchboard.settings import Settings
from switchboard.tables import agent_runs, deliveries, executions, held_callbacks, run_events
from tests.conftest import APP_SECRET, new_key, rows_of, until
from tests.test_degraded import Silent


async def stored(db: AsyncEngine, context_id: str, *, runs: int = 1, **more: Any) -> NewRuns:
    """An execution whose call is placed, and the runs that HappyRobot names for it."""
    execution_id = uuid4()
    values = {"id": execution_id, "workflow_id": "default", "context_id": context_id, "input": {}} | more
    async with db.begin() as conn:
        await conn.execute(insert(executions).values(values))
    run_ids = [f"run_{uuid4().hex}" for _ in range(runs)]
    return NewRuns(execution_id, "default", context_id, "A call", more.get("description"), run_ids)


async def short(line: Line, *starts: NewRuns) -> list[list[Event] | None]:
    return await begin(line, starts, reconcile_after=15)


async def execution(db: AsyncEngine, start: NewRuns) -> Any:
    async with db.connect() as conn:
        return (await conn.execute(select(executions).where(executions.c.id == start.execution_id))).one()


async def left_behind(db: AsyncEngine, start: NewRuns) -> list[Any]:
    """All that can be told of an execution and its runs, but for ids and times."""
    names = list(start.run_ids)
    run, event = agent_runs.c, run_events.c
    jobs = text(
        "SELECT entrypoint, status::text, convert_from(payload, 'utf8'), dedupe_key, headers, attempts, "
        "round(extract(epoch FROM execute_after - created) / 5) FROM switchboard_pgqueuer "
        "WHERE convert_from(payload, 'utf8') = ANY(:names) ORDER BY id"
    )
    logged = text(
        "SELECT log.status::text, log.entrypoint FROM switchboard_pgqueuer_log AS log "
        "JOIN switchboard_pgqueuer AS job ON job.id = log.job_id "
        "WHERE convert_from(job.payload, 'utf8') = ANY(:names) ORDER BY log.id"
    )
    rows = select(
        run.run_id, run.context_id, run.name, run.description, run.status, run.metadata, run.workflow_id, run.timed_out,
        run.execution_id == start.execution_id, run.completed_at, run.heard_at,
    ).where(run.run_id.in_(names)).order_by(run.id)  # fmt: skip
    timeline = select(
        event.run_id, event.context_id, event.event_type, event.status, event.data,
        event.dedupe_key, event.workflow_id,
    ).where(event.run_id.in_(names)).order_by(event.id)  # fmt: skip
    own = await execution(db, start)
    async with db.connect() as conn:
        found = [
            [tuple(row) for row in await conn.execute(query, *given)]
            for query, *given in ((rows,), (timeline,), (jobs, {"names": names}), (logged, {"names": names}))
        ]
    told = [own.status, own.error, own.began_at is not None, own.completed_at, own.unconfirmed]
    place = {name: number for number, name in enumerate([str(start.execution_id), *names])}
    return [told, *(_numbered(each, place) for each in found)]


def _numbered(value: Any, place: dict[str, int]) -> Any:
    """The same, with numbers in place of what was drawn for this test."""
    match value:
        case list() | tuple():
            return [_numbered(each, place) for each in value]
        case dict():
            return {name: _numbered(each, place) for name, each in value.items()}
        case str():
            return place.get(value.removeprefix(f"{RECONCILE}:"), value)
        case _:
            return value


async def test_what_happyrobot_names_first_is_one_statement(db: AsyncEngine, line: Line, context_id: str):
    start = await stored(db, context_id, runs=2, description="What it is about")
    [events] = await short(line, start)
    assert events is not None
    assert [(event.run_id, event.event_type, event.status) for event in events] == [
        (run_id, "triggered", "RUNNING") for run_id in start.run_ids
    ]
    async with db.connect() as conn:
        rows = (await conn.execute(select(run_events).where(run_events.c.context_id == context_id))).all()
        runs = (await conn.execute(select(agent_runs).where(agent_runs.c.context_id == context_id))).all()
    assert [Event.of(row) for row in rows] == events
    assert {(run.name, run.description) for run in runs} == {("A call", "What it is about")}
    own = await execution(db, start)
    assert {run.created_at for run in runs} == {own.began_at} == {own.updated_at}
    assert own.began_at > own.created_at


@pytest.mark.parametrize(
    "why", ["not there", "unconfirmed", "is over", "begun", "a run is known", "a run has something held"]
)
async def test_only_the_database_knows_of_some(db: AsyncEngine, line: Line, context_id: str, why: str):
    start, other = await stored(db, context_id, runs=2), await stored(db, context_id)
    mine = update(executions).where(executions.c.id == start.execution_id)
    async with db.begin() as conn:
        match why:
            case "not there":
                start = replace(start, execution_id=uuid4())
            case "unconfirmed":
                await conn.execute(mine.values(status="submission_unknown", unconfirmed=True))
            case "is over":
                await conn.execute(mine.values(status="failed"))
            case "begun":
                await conn.execute(mine.values(began_at=func.now()))
            case "a run is known":
                await conn.execute(insert(agent_runs).values(run_id=start.run_ids[1], context_id=context_id))
            case _:
                await conn.execute(insert(held_callbacks).values(run_id=start.run_ids[1], event_type="log"))
    first, second = await short(line, start, other)
    assert first is None
    assert second is not None
    assert [event.run_id for event in second] == other.run_ids
    assert [await rows_of(db, run_events, run_id) for run_id in start.run_ids] == [0, 0], "nothing of it is done"


@pytest.mark.parametrize("wants", [True, False])
async def test_whoever_wants_to_be_told_is_told(db: AsyncEngine, line: Line, context_id: str, wants: bool):
    key_id, _ = await new_key(db)
    if wants:
        async with db.begin() as conn:
            own = Settings(database_url="postgresql://", redis_url="redis://", app_secret=APP_SECRET)
            await webhooks.point(conn, own, key_id, "https://customer.example/", None)
    start = await stored(db, context_id, key_id=key_id)
    assert ((await short(line, start)) == [None]) == wants
    assert await Intake(line, Silent(), Leaving()).take(start) == Registered()
    async with db.connect() as conn:
        told = list(
            await conn.scalars(select(deliveries.c.event).where(deliveries.c.execution_id == start.execution_id))
        )
    assert told == (["execution.started"] if wants else [])


async def test_what_is_named_twice_is_left_to_the_long_way():
    first, second = (NewRuns(uuid4(), "default", "a", "A call", None, [f"run_{n}"]) for n in range(2))
    again, shared = replace(first, run_ids=["run_9"]), replace(first, execution_id=uuid4())
    twice, adopted = replace(second, run_ids=["run_2", "run_2"]), replace(second, adopted=True)
    log = NewEvent("run_0", "log")
    assert fresh([log, first, again, shared, twice, adopted, second]) == {1: first, 6: second}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.lists(
        st.tuples(
            st.integers(1, 3),
            st.sampled_from(["pending", "pending", "running", "submission_unknown", "failed"]),
            st.sampled_from(["new", "new", "known", "held"]),
        ),
        min_size=1,
        max_size=4,
    )
)
async def test_both_ways_lead_to_the_same_end(
    db: AsyncEngine, line: Line, context_id: str, batch: list[tuple[int, str, str]]
):
    async def prepared() -> list[NewRuns]:
        starts = []
        for runs, status, kind in batch:
            unconfirmed = status in ("submission_unknown", "failed")
            start = await stored(db, context_id, runs=runs, status=status, unconfirmed=unconfirmed)
            async with db.begin() as conn:
                if kind == "known":
                    await conn.execute(insert(agent_runs).values(run_id=start.run_ids[0], context_id=context_id))
                elif kind == "held":
                    await conn.execute(insert(held_callbacks).values(run_id=start.run_ids[0], event_type="log"))
            starts.append(start)
        return starts

    here, there = await prepared(), await prepared()
    queue = Intake(line, Silent(), Leaving())
    assert set(await asyncio.gather(*map(queue.take, here))) == {Registered()}
    async with db.begin() as conn:
        await ingest.write(conn, there)
    for mine, theirs in zip(here, there, strict=True):
        assert await left_behind(db, mine) == await left_behind(db, theirs)


async def test_what_comes_with_a_run_is_about_a_run_that_is_known(db: AsyncEngine, line: Line, context_id: str):
    start, other = await stored(db, context_id), await stored(db, context_id)
    announcer = Silent()
    queue = Intake(line, announcer, Leaving())
    news: list[News] = [NewEvent(start.run_ids[0], "log"), start, NewEvent(other.run_ids[0], "completed"), other]
    outcomes = await asyncio.gather(*(queue.take(each) for each in news))
    assert [type(outcome) for outcome in outcomes] == [Recorded, Registered, Recorded, Registered]
    told = [event for events in announcer.announced for event in events]
    assert [event.id for event in told] == sorted(event.id for event in told)
    assert [event.event_type for event in told] == ["triggered", "triggered", "log", "completed"]


async def test_what_cannot_be_done_in_one_statement_is_done_in_many(
    db: AsyncEngine, line: Line, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    async def refused(*_: Any, **__: Any) -> Any:
        raise StatementFailed("DataError")

    monkeypatch.setattr(intake, "begin", refused)
    start = await stored(db, context_id)
    assert await Intake(line, Silent(), Leaving()).take(start) == Registered()
    assert (await execution(db, start)).status == "running"


async def test_who_is_in_the_middle_of_a_turn_is_waited_for(db: AsyncEngine, line: Line, context_id: str):
    start = await stored(db, context_id)
    async with db.begin() as conn:
        await conn.execute(ingest.TURN)
        beginning = asyncio.create_task(short(line, start))
        waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        async with db.connect() as other:
            await until(lambda: other.scalar(waiting))
        assert not beginning.done()
        # What is committed before its turn is seen in it, although it was asked before that.
        await conn.execute(insert(held_callbacks).values(run_id=start.run_ids[0], event_type="log"))
    assert await beginning == [None]


async def test_nobody_waits_for_a_turn_for_ever(db: AsyncEngine):
    declared = text("SELECT proconfig FROM pg_proc WHERE proname = 'switchboard_begin'")
    async with db.connect() as conn:
        assert "lock_timeout=3s" in (await conn.scalar(declared) or [])
