"""The truth converges: runs that HappyRobot stops talking about."""

import asyncio
import time
from collections import Counter
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import pytest
import respx
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import jobs
from switchboard.events import NewEvent
from switchboard.happyrobot.client import Effort, NoTurn
from switchboard.happyrobot.simulator import Simulator
from switchboard.runs.reconcile import LONGEST_PAUSE, Patience, Reconciler, Watch, jittered
from switchboard.runs.status import Standing
from switchboard.runs.sweep import sweep
from switchboard.tables import RunStatus, agent_runs, run_events, run_records
from tests.conftest import (
    API_KEY,
    HOOK_KEY,
    Servers,
    Service,
    insert_run,
    rows_of,
    running_service,
    serving,
    settings_for,
    until,
)

RUNNING, GUESS = Standing(RunStatus.RUNNING), Standing(RunStatus.FAILED, timed_out=True)
COMPLETED = Standing(RunStatus.COMPLETED)
DAY = 86_400.0
patience = Patience(15, 1800)


def watch(
    standing: Standing = RUNNING, silent: float = 0, unheard: float | None = None, *, kept: bool = False
) -> Watch:
    return Watch(standing, silent, silent if unheard is None else unheard, 0, kept)


# When a run is asked about


def test_a_silent_run_is_asked_about_ever_less_often():
    asked_at, now = [], 0.0
    for _ in range(9):
        pause = patience.pause(watch(silent=now, unheard=0))
        assert pause is not None
        now += pause
        asked_at.append(now)
    assert asked_at == [15, 30, 60, 120, 240, 480, 780, 1080, 1380]


def test_a_sign_of_life_starts_it_anew():
    assert patience.pause(watch(silent=5)) == 10


@pytest.mark.parametrize(
    ("seen", "pause"),
    [
        (watch(silent=1700), 100),
        (watch(silent=1700, unheard=60), 300),
        (watch(silent=5000), 300),
        (watch(COMPLETED, silent=3), 15),
        (watch(COMPLETED, silent=600), 600),
        (watch(COMPLETED, silent=40_000), 3600),
        (watch(COMPLETED, silent=3, kept=True), None),
        (watch(COMPLETED, silent=DAY + 1), None),
        (watch(GUESS, silent=30), 30),
        (watch(GUESS, silent=30, kept=True), 30),
        (watch(GUESS, silent=DAY + 1), None),
    ],
)
def test_when_the_next_question_comes(seen: Watch, pause: float | None):
    assert patience.pause(seen) == pause


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.sampled_from([RUNNING, GUESS, COMPLETED]), st.booleans())
def test_nothing_that_is_under_way_is_ever_forgotten(silent: float, unheard: float, standing: Standing, kept: bool):
    pause = patience.pause(watch(standing, silent, min(silent, unheard), kept=kept))
    if not standing.over:
        assert pause is not None
        assert 0 < pause <= LONGEST_PAUSE
    assert pause is None or 0.8 * pause <= jittered(pause) <= pause


def test_only_a_run_that_nobody_has_heard_of_is_stale():
    assert not patience.is_stale(watch(silent=4000, unheard=1799))
    assert patience.is_stale(watch(silent=4000, unheard=1800))


# What becomes of it


def asked(
    router: respx.MockRouter, database_url: str, servers: Servers, **more: Any
) -> AbstractAsyncContextManager[Service]:
    settings = settings_for(database_url, servers.redis_url, None, **more)
    return running_service(settings, httpx.MockTransport(router.async_handler))


def reconciler_of(service: Service) -> Reconciler:
    state = service.state
    return Reconciler(state["settings"], state["db"], state["happyrobot"], state["lookups"], state["intake"])


def platform(router: respx.MockRouter, run_id: str) -> respx.Route:
    return router.get(f"/api/v1/runs/{run_id}")


def says(status: str, *lines: str) -> httpx.Response:
    messages = [{"role": "assistant", "content": line} for line in lines]
    return httpx.Response(
        200, json={"run": {"id": "r", "status": status}, "sessions": [{"id": "s", "messages": messages}]}
    )


async def silence(db: AsyncEngine, run_id: str, seconds: float) -> None:
    """Lets a run have said nothing for so long."""
    async with db.begin() as conn:
        for statement in (
            "UPDATE agent_runs SET created_at = now() - :s, updated_at = now() - :s, heard_at = NULL WHERE run_id = :r",
            "UPDATE run_events SET created_at = now() - :s WHERE run_id = :r",
        ):
            await conn.execute(text(statement.replace(":s", f"interval '{seconds} seconds'")), {"r": run_id})


async def status_of(db: AsyncEngine, run_id: str) -> Any:
    async with db.connect() as conn:
        columns = (agent_runs.c.status, agent_runs.c.timed_out, agent_runs.c["metadata"].label("stored"))
        return (await conn.execute(select(*columns).where(agent_runs.c.run_id == run_id))).one()


async def test_a_run_that_happyrobot_says_is_over_is_over_and_its_transcript_kept(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    router = respx.MockRouter()
    answers = [says("running"), says("completed", "Hello", "Goodbye"), httpx.Response(404)]
    platform(router, run_id).mock(side_effect=answers)
    router.get(f"/api/v1/runs/{run_id}/recordings").respond(json={"recordings": []})
    async with asked(router, database_url, servers) as service:
        reconciler = reconciler_of(service)
        await silence(db, run_id, 20)
        pause = await reconciler.reconcile(run_id)
        assert pause is not None
        assert 15 <= pause <= 21
        assert (await status_of(db, run_id)).status == "RUNNING"
        await silence(db, run_id, 40)
        await asyncio.sleep(2)  # for which the first answer is shared
        assert await reconciler.reconcile(run_id) is None
        assert (await status_of(db, run_id)).status == "COMPLETED"
        details = (await service.http.get(f"/api/happyrobot/runs/{run_id}/details")).json()
    assert details["source"] == "database"
    assert [message["content"] for message in details["sessions"][0]["messages"]] == ["Hello", "Goodbye"]


async def test_a_run_that_spoke_a_moment_ago_is_not_asked_about(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    router = respx.MockRouter()
    async with asked(router, database_url, servers) as service:
        pause = await reconciler_of(service).reconcile(run_id)
    assert pause is not None
    assert 10 < pause <= 15
    assert not router.calls


@pytest.mark.parametrize("run_ids", ["gone"])
async def test_a_run_that_is_not_there_any_more_is_left(database_url: str, servers: Servers, run_ids: str):
    async with asked(respx.MockRouter(), database_url, servers) as service:
        assert await reconciler_of(service).reconcile(run_ids) is None
        assert await reconciler_of(service).check(run_ids) is None


async def test_a_run_that_happyrobot_does_not_know_yet_is_asked_about_again(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    router = respx.MockRouter()
    platform(router, run_id).respond(404, json={"message": "run not found"})
    async with asked(router, database_url, servers) as service:
        await silence(db, run_id, 20)
        assert await reconciler_of(service).reconcile(run_id) is not None
    assert (await status_of(db, run_id)).status == "RUNNING"
    assert await rows_of(db, run_events, run_id) == 0


@pytest.mark.parametrize("trouble", [httpx.Response(404), httpx.Response(503), httpx.ConnectError("away"), None])
async def test_silence_on_all_sides_is_a_timeout_that_keeps_what_is_known(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str, trouble: Any
):
    router = respx.MockRouter()
    platform(router, run_id).mock(side_effect=[trouble])
    key = API_KEY if trouble is not None else None
    async with asked(router, database_url, servers, happyrobot_api_key=key) as service:
        await service.callback(run_id, "log", {"message": "Hello"})
        await silence(db, run_id, 1700)
        pause = await reconciler_of(service).reconcile(run_id)
        assert pause is not None
        assert pause <= 100, "it is looked at again when its time is up"
        assert (await status_of(db, run_id)).status == "RUNNING"
        await silence(db, run_id, 1801)
        if trouble is not None:
            shared = service.state["lookups"]
            shared._recent.clear()
            await shared._redis.delete(shared._prefix + run_id)
            platform(router, run_id).mock(side_effect=[trouble])
        assert await reconciler_of(service).reconcile(run_id) is not None
        run = await service.run(run_id)
        timeline = (await service.http.get(f"/api/happyrobot/runs/{run_id}/events")).json()
        assert run["status"] == "FAILED"
        assert run["metadata"] == {"logs": [{"message": "Hello"}], "error": "Timed out"}
        assert timeline[-1]["event_type"] == "timed_out"
        # It was a guess.
        await service.callback(run_id, "completed", {"ok": True})
        run = await service.run(run_id)
        assert (run["status"], run["metadata"]["result"]) == ("COMPLETED", {"ok": True})
        assert "error" not in run["metadata"]


@pytest.mark.parametrize("word", ["running", "scheduled", "a word that we do not know"])
async def test_a_run_that_happyrobot_still_knows_is_never_timed_out(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str, word: str
):
    router = respx.MockRouter()
    platform(router, run_id).mock(return_value=says(word))
    async with asked(router, database_url, servers) as service:
        await silence(db, run_id, 100_000)
        pause = await reconciler_of(service).reconcile(run_id)
    assert pause is not None
    assert 200 < pause <= LONGEST_PAUSE
    assert (await status_of(db, run_id)).status == "RUNNING"


async def test_a_pace_that_is_used_up_is_not_happyrobots_silence(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    async def none_left(_: Effort) -> None:
        raise NoTurn

    async with asked(respx.MockRouter(), database_url, servers) as service:
        monkeypatch.setattr(service.state["happyrobot"], "turn", none_left)
        await silence(db, run_id, 100_000)
        assert await reconciler_of(service).reconcile(run_id) == 5
    assert (await status_of(db, run_id)).status == "RUNNING"


async def test_a_run_that_speaks_in_the_last_moment_is_not_timed_out(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    router = respx.MockRouter()
    async with asked(router, database_url, servers) as service:

        async def speak(_: httpx.Request) -> httpx.Response:
            await service.callback(run_id, "log", "still here")
            return httpx.Response(503)

        platform(router, run_id).mock(side_effect=speak)
        await silence(db, run_id, 5000)
        await reconciler_of(service).reconcile(run_id)
    assert (await status_of(db, run_id)).status == "RUNNING"


async def test_a_run_that_we_gave_up_is_put_right_by_happyrobot(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    router = respx.MockRouter()
    platform(router, run_id).mock(return_value=says("succeeded"))
    completed_at = select(agent_runs.c.completed_at).where(agent_runs.c.run_id == run_id)
    async with asked(router, database_url, servers) as service:
        guess = NewEvent(run_id, "timed_out", None, RunStatus.FAILED, "Timed out", guess=True)
        await service.state["intake"].take(guess)
        async with db.connect() as conn:
            guessed = await conn.scalar(completed_at)
        await silence(db, run_id, 60)
        await reconciler_of(service).reconcile(run_id)
    found = await status_of(db, run_id)
    assert (found.status, found.timed_out, found.stored) == ("COMPLETED", False, {})
    async with db.connect() as conn:
        # When we gave up was not its end, and would pass for how long it took.
        known = await conn.scalar(completed_at)
    assert guessed is not None
    assert known is not None
    assert known > guessed


async def test_the_record_of_a_run_that_ended_by_a_callback_is_fetched_when_happyrobot_is_done(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    router = respx.MockRouter()
    platform(router, run_id).mock(side_effect=[httpx.Response(404), says("running", "Hel"), says("completed", "Hello")])
    async with asked(router, database_url, servers) as service:
        await service.callback(run_id, "completed", {"ok": True})
        reconciler = reconciler_of(service)
        assert await reconciler.check(run_id) is not None
        assert await reconciler.check(run_id) is not None
        assert await rows_of(db, run_records, run_id) == 0
        assert await reconciler.check(run_id) is None
        assert await rows_of(db, run_records, run_id) == 1
        assert await reconciler.check(run_id) is None
    assert router.calls.call_count == 3


async def test_v2_is_read_in_as_many_requests_as_it_takes(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    router = respx.MockRouter()
    platform(router, run_id).respond(404)
    router.get(f"/api/v2/runs/{run_id}").respond(json={"id": run_id, "status": "succeeded"})
    router.get(f"/api/v2/runs/{run_id}/sessions", params={"page": 1}).respond(
        json={"data": [{"id": "a", "timestamp": "2026-01-01T00:00:00Z"}], "pagination": {"has_next_page": True}}
    )
    router.get(f"/api/v2/runs/{run_id}/sessions", params={"page": 2}).respond(
        json={"data": [{"id": "b", "timestamp": "2026-01-01T00:01:00Z"}], "pagination": {"has_next_page": False}}
    )
    for session in "ab":
        router.get(f"/api/v2/sessions/{session}/messages").respond(
            json={"data": [{"role": "user", "content": f"in {session}"}], "pagination": {}}
        )
    router.get(f"/api/v1/runs/{run_id}/recordings").respond(json={"recordings": []})
    more = {"happyrobot_api_url": "http://127.0.0.1:1/api/v2"}
    async with asked(router, database_url, servers, **more) as service:
        await silence(db, run_id, 20)
        assert await reconciler_of(service).reconcile(run_id) == 0, "at once, for its record"
        assert await reconciler_of(service).reconcile(run_id) is None
        details = (await service.http.get(f"/api/happyrobot/runs/{run_id}/details")).json()
    assert await rows_of(db, run_records, run_id) == 1
    said = [message["content"] for session in details["sessions"] for message in session["messages"]]
    assert said == ["in a", "in b"]


async def test_where_v2_is_asked_for_statuses_the_record_is_still_v1s_for_it_has_it_all(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    router = respx.MockRouter()
    v2 = router.get(f"/api/v2/runs/{run_id}").respond(json={"id": run_id, "status": "succeeded"})
    v1 = platform(router, run_id).mock(return_value=says("completed", "Hello"))
    async with asked(router, database_url, servers, happyrobot_api_url="http://127.0.0.1:1/api/v2") as service:
        await silence(db, run_id, 20)
        assert await reconciler_of(service).reconcile(run_id) == 0, "at once, for its record"
        assert await reconciler_of(service).reconcile(run_id) is None
    assert (v1.call_count, v2.call_count) == (1, 2)
    assert await rows_of(db, run_records, run_id) == 1


async def test_the_record_of_a_run_that_is_still_going_there_is_not_kept(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    """v2 says that it is over, and v1 lags behind."""
    router = respx.MockRouter()
    router.get(f"/api/v2/runs/{run_id}").respond(json={"id": run_id, "status": "succeeded"})
    platform(router, run_id).mock(side_effect=[says("running", "Hel"), says("completed", "Hello", "Bye")])
    async with asked(router, database_url, servers, happyrobot_api_url="http://127.0.0.1:1/api/v2") as service:
        await silence(db, run_id, 20)
        assert await reconciler_of(service).reconcile(run_id) == 0
        assert await reconciler_of(service).reconcile(run_id) is not None
        assert await rows_of(db, run_records, run_id) == 0
        assert await reconciler_of(service).reconcile(run_id) is None
    assert await rows_of(db, run_records, run_id) == 1


# Jobs


async def queued(db: AsyncEngine, entrypoint: str, subject: str) -> int:
    async with db.connect() as conn:
        query = text("SELECT count(*) FROM switchboard_pgqueuer WHERE dedupe_key = :key")
        return await conn.scalar(query, {"key": f"{entrypoint}:{subject}"}) or 0


async def test_every_run_is_watched_from_its_start(service: Service, db: AsyncEngine, context_id: str):
    answer = await service.http.post("/api/happyrobot/trigger", json={"context_id": context_id})
    assert await queued(db, jobs.RECONCILE, answer.json()["run_ids"][0]) == 1


async def test_runs_that_nobody_watches_are_found(service: Service, db: AsyncEngine, context_id: str):
    statuses = ("PENDING", "RUNNING", "COMPLETED", "FAILED", "FAILED", "FAILED")
    run_ids = [await insert_run(db, context_id, status) for status in statuses]
    async with db.begin() as conn:
        # Two of them only by our guess, and one of these long ago.
        given_up = "UPDATE agent_runs SET timed_out = true, updated_at = now() - interval '{}' WHERE run_id = :run_id"
        await conn.execute(text(given_up.format("1 hour")), {"run_id": run_ids[4]})
        await conn.execute(text(given_up.format("2 days")), {"run_id": run_ids[5]})
    for _ in range(2):
        await sweep(db, service.state["intake"], 15, 1800)
    assert [await queued(db, jobs.RECONCILE, run_id) for run_id in run_ids] == [1, 1, 0, 0, 1, 0]


async def test_the_end_of_a_session_is_a_reason_to_ask_at_once(service: Service, db: AsyncEngine, run_id: str):
    for current, asks in (("in-progress", 0), ("completed", 1), ("completed", 1)):
        event = {
            "specversion": "1.0",
            "id": f"{current} {asks}",
            "source": "https://platform.happyrobot.ai",
            "type": "session.status_changed",
            "data": {"run_id": run_id, "session_id": "s", "status": {"previous": "queued", "current": current}},
        }
        answer = await service.http.post("/api/webhooks/happyrobot", json=event, headers={"X-API-KEY": HOOK_KEY})
        assert answer.status_code == 200
        assert await queued(db, jobs.CHECK, run_id) == asks
    assert (await status_of(db, run_id)).status == "RUNNING", "the end of a session is not the end of its run"


async def test_the_end_of_a_session_is_a_reason_to_ask_about_a_run_that_we_gave_up(
    service: Service, db: AsyncEngine, run_id: str
):
    guess = NewEvent(run_id, "timed_out", None, RunStatus.FAILED, "Timed out", guess=True)
    await service.state["intake"].take(guess)
    await service.state["intake"].take(NewEvent(run_id, "session.status_changed", session_ended=True))
    assert await queued(db, jobs.CHECK, run_id) == 1


@pytest.mark.parametrize("standing", ["RUNNING", "gave up"])
async def test_a_run_that_speaks_after_a_long_silence_is_asked_about_as_any_that_has_spoken(
    service: Service, db: AsyncEngine, run_id: str, standing: str
):
    if standing == "gave up":
        guess = NewEvent(run_id, "timed_out", None, RunStatus.FAILED, "Timed out", guess=True)
        await service.state["intake"].take(guess)
    async with db.begin() as conn:
        await jobs.enqueue(conn, [jobs.Job(jobs.RECONCILE, run_id, 300)])

    async def due_in() -> float:
        async with db.connect() as conn:
            due = text(
                "SELECT extract(epoch FROM execute_after - now()) FROM switchboard_pgqueuer WHERE dedupe_key = :k"
            )
            return float(await conn.scalar(due, {"k": f"reconcile:{run_id}"}) or 0)

    assert await due_in() > 290
    await service.callback(run_id, "log", "still here")
    assert 13 < await due_in() <= 15
    # One that is over has nothing more to be asked about soon.
    async with db.begin() as conn:
        await conn.execute(text("UPDATE switchboard_pgqueuer SET execute_after = now() + interval '300 s'"))
    await service.callback(run_id, "completed")
    await service.callback(run_id, "log", "a summary")
    assert await due_in() > 290


async def test_what_pgqueuer_notes_about_the_past_is_dropped(service: Service, db: AsyncEngine):
    async with db.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO switchboard_pgqueuer_log (created, job_id, status, priority, entrypoint, aggregated) "
                "SELECT now() - age, 1, 'successful', 0, 'tidied', true "
                "FROM unnest(ARRAY[interval '2 days', interval '1 hour']) age"
            )
        )
    await sweep(db, service.state["intake"], 15, 1800)
    async with db.connect() as conn:
        left = text("SELECT count(*) FROM switchboard_pgqueuer_log WHERE entrypoint = 'tidied'")
        assert await conn.scalar(left) == 1


# Workers


async def test_200_runs_without_an_end_reach_it_within_the_pace_and_one_worker_asks_at_a_time(
    own_database: str, servers: Servers, context_id: str
):
    under_way: Counter[str] = Counter()
    overlaps: list[str] = []
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.001)

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        """The simulator, and who asks it about what at the same time."""
        run_id = scope["path"].split("/")[-1] if scope["type"] == "http" and "/runs/" in scope["path"] else ""
        under_way[run_id] += 1
        if run_id and under_way[run_id] > 1:
            overlaps.append(run_id)
        try:
            await simulator.app(scope, receive, send)
        finally:
            under_way[run_id] -= 1

    pace = 80
    async with serving(lambda _: watched) as (url, _):
        settings = settings_for(
            own_database,
            servers.redis_url,
            url,
            reconcile_after=0.5,
            happyrobot_api_pace=pace,
            happyrobot_org_id=context_id,
        )
        async with (
            running_service(settings, worker=True) as service,
            running_service(settings, worker=True),
        ):
            outcomes = ["completed", "failed", "canceled"]
            for number in range(40):
                # Callbacks that never come at all, or all but the last one.
                fault = "silent" if number % 8 else "drop_final"
                simulate = {"runs": 5, "outcome": outcomes[number % 3], "faults": fault}
                body = {"context_id": context_id, "simulate": simulate}
                assert (await service.http.post("/api/happyrobot/trigger", json=body)).status_code == 200

            async def all_over() -> bool:
                async with service.state["db"].connect() as conn:
                    open_runs = select(func.count()).where(agent_runs.c.status == "RUNNING")
                    records = select(func.count()).select_from(run_records)
                    return await conn.scalar(open_runs) == 0 and await conn.scalar(records) == 200

            await until(all_over)
            async with service.state["db"].connect() as conn:
                statuses = dict((await conn.execute(select(agent_runs.c.run_id, agent_runs.c.status))).all())
    assert statuses == {run.id: run.status.upper() for run in simulator.runs.values()}
    assert len(statuses) == 200
    assert set(statuses.values()) == {"COMPLETED", "FAILED", "CANCELED"}
    assert overlaps == []
    moments = sorted(request.at.timestamp() for request in simulator.requests)
    # Redis spaces them evenly; on their way to the simulator they may bunch up a little.
    assert all(later - earlier > 0.9 for earlier, later in zip(moments, moments[pace:], strict=False))


async def test_a_run_whose_session_has_ended_is_asked_about_at_once(
    own_database: str, servers: Servers, context_id: str
):
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.05)
    async with serving(lambda _: simulator.app) as (url, _):
        settings = settings_for(own_database, servers.redis_url, url, reconcile_after=600)
        async with running_service(settings, worker=True) as service:
            simulate = {"outcome": "failed", "faults": "drop_final", "cloud_events": True}
            body = {"context_id": context_id, "simulate": simulate}
            run_id = (await service.http.post("/api/happyrobot/trigger", json=body)).json()["run_ids"][0]

            async def over() -> bool:
                return bool((await status_of(service.state["db"], run_id)).status == "FAILED")

            await until(over, within=30)
            timeline = (await service.http.get(f"/api/happyrobot/runs/{run_id}/events")).json()
    kinds = [event["event_type"] for event in timeline]
    assert kinds.count("session.status_changed") == 2
    assert kinds[-2:] == ["session.status_changed", "status"]
    assert timeline[-2]["status"] == "RUNNING", "the end of a session is not the end of its run"


async def test_a_worker_survives_the_loss_of_its_connections(own_database: str, servers: Servers, context_id: str):
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.001)
    async with serving(lambda _: simulator.app) as (url, _):
        settings = settings_for(own_database, servers.redis_url, url, reconcile_after=0.5)
        async with running_service(settings, worker=True) as service:
            db = service.state["db"]
            async with db.connect() as conn:
                await conn.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                )
            body = {"context_id": context_id, "simulate": {"faults": "drop_final"}}
            run_ids: list[str] = []

            async def placed() -> bool:
                headers = {"Idempotency-Key": context_id}  # it may meet one of those connections
                answer = await service.http.post("/api/happyrobot/trigger", json=body, headers=headers)
                run_ids[:] = answer.json().get("run_ids", [])
                return answer.status_code == 200

            await until(placed, within=30)

            async def over() -> bool:
                return bool((await status_of(db, run_ids[0])).status == "COMPLETED")

            await until(over, within=30)


async def test_a_worker_that_is_told_to_stop_leaves_its_jobs_to_others(
    own_database: str, servers: Servers, context_id: str
):
    asked, hangs = asyncio.Event(), True

    async def answer(_: httpx.Request) -> httpx.Response:
        asked.set()
        if hangs:
            await asyncio.Event().wait()
        return says("completed", "Hello")

    router = respx.MockRouter()
    router.get(path__regex=r"/api/v1/runs/.+").mock(side_effect=answer)
    settings = settings_for(own_database, servers.redis_url, None, reconcile_after=0.5)
    transport = httpx.MockTransport(router.async_handler)
    async with running_service(settings, transport, worker=True) as service:
        run_id = await insert_run(service.state["db"], context_id)
        await sweep(service.state["db"], service.state["intake"], 0.1, 1800)
        await asked.wait()
        started = time.monotonic()
    assert time.monotonic() - started < 5, "it does not wait for HappyRobot"
    hangs = False
    async with running_service(settings, transport, worker=True) as service:
        db = service.state["db"]

        async def over() -> bool:
            return bool((await status_of(db, run_id)).status == "COMPLETED")

        await until(over, within=30)
