"""What is measured: each number moves with what it stands for, and none says who or what it was about."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
import respx
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from pydantic_core import from_json
from redis.asyncio import Redis
from sqlalchemy import Row, insert, text
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import jobs, local, metrics, watch
from switchboard.access import keys, operators
from switchboard.access.callers import ANYBODY
from switchboard.access.operators import Operators
from switchboard.access.webhooks import point
from switchboard.deliveries import delivering
from switchboard.deliveries.delivering import Deliverer
from switchboard.events import Event, EventOut, Scope
from switchboard.happyrobot.client import BACKGROUND, READ, Effort, HappyRobot, HappyRobotError, Hook, NoTurn
from switchboard.jobs import CHECK, DELIVER, RECONCILE, START, Job
from switchboard.leaving import Leaving
from switchboard.live.announcer import Announcer
from switchboard.live.channel import Channel
from switchboard.live.hub import Hub
from switchboard.live.messages import Frame, pack, unpack
from switchboard.live.stream import follow
from switchboard.runs.reconcile import Reconciler, outcome
from switchboard.runs.status import Standing
from switchboard.sight import EVERYTHING
from switchboard.tables import KeyScope, RunStatus, WebhookEvent, deliveries, executions
from tests.conftest import (
    API_KEY,
    APP_SECRET,
    HOOK_KEY,
    Said,
    Servers,
    Service,
    Upstream,
    bearer,
    insert_run,
    new_key,
    run_sql,
    running_service,
    settings_for,
    until,
)
from tests.receiver import Receiver, receiving, statuses
from tests.wires import Wire, relayed

NOBODY = "127.0.0.1:1"
Numbers = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(page: str) -> Numbers:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def here() -> Numbers:
    """What this process has measured so far, as its page would say."""
    return read(metrics.rendered().decode())


async def scraped(http: httpx.AsyncClient) -> Numbers:
    answer = await http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return read(answer.text)


def total(numbers: Numbers, name: str, **labels: str) -> float:
    """The sum of all that have these labels."""
    return sum(value for (found, own), value in numbers.items() if found == name and own >= labels.items())


def labels_of(numbers: Numbers, name: str) -> set[frozenset[tuple[str, str]]]:
    return {labels for found, labels in numbers if found == name}


@dataclass
class Change:
    """What has come to the numbers of this process since the test began."""

    before: Numbers

    def __call__(self, name: str, **labels: str) -> float:
        name = f"switchboard_{name}"
        return total(here(), name, **labels) - total(self.before, name, **labels)


@pytest.fixture
def change() -> Change:
    return Change(here())


# Requests


async def test_a_request_is_counted_by_its_route_and_its_answer(service: Service, run_id: str, change: Change):
    for path in (run_id, run_id, "unknown"):
        await service.http.get(f"/api/happyrobot/runs/{path}")
    labels = {"method": "GET", "route": "/api/happyrobot/runs/{run_id}"}
    assert change("http_requests_total", status="200", **labels) == 2
    assert change("http_requests_total", status="404", **labels) == 1
    assert change("http_request_seconds_count", **labels) == 3
    assert change("http_request_seconds_sum", **labels) > 0


async def test_what_strangers_make_up_is_no_label(service: Service):
    await service.http.request("PROPFIND", "/not-there")
    await service.callback("r", "made-up")
    before = await scraped(service.http)
    for number in range(20):
        await service.http.get(f"/made-up-{number}")
        await service.http.request("MKCOL", f"/made-up-{number}", params={"made-up": number})
        await service.callback(f"made-up-{number}", f"made-up-{number}\n")
    after = await scraped(service.http)
    assert before.keys() - after.keys() == set()
    new = {labels for _, labels in after.keys() - before.keys()}
    assert {dict(labels).get("route") for labels in new} <= {"unmatched", "/metrics"}
    assert not any("made-up" in value for _, labels in after for _, value in labels)
    moved = total(after, "switchboard_http_requests_total", method="other", route="unmatched", status="404")
    assert moved - total(before, "switchboard_http_requests_total", method="other", route="unmatched") == 20


# Callbacks


async def test_callbacks_are_counted_by_what_became_of_them(service: Service, run_id: str, change: Change):
    stamp = {"timestamp": "2026-01-01T00:00:00Z"}
    for _ in range(2):
        await service.callback(run_id, "completed", **stamp)
    await service.callback("unknown", "running")
    await service.callback(run_id, "the author's own word")
    await service.http.post("/api/webhooks/happyrobot", json={"run_id": run_id}, headers={"X-API-KEY": HOOK_KEY})
    await service.http.post("/api/webhooks/happyrobot", json={}, headers={"X-API-KEY": "wrong"})
    await service.http.post("/api/webhooks/happyrobot", json={})
    assert change("callbacks_total", type="completed", outcome="recorded") == 1
    assert change("callbacks_total", type="completed", outcome="duplicate") == 1
    assert change("callbacks_total", type="running", outcome="held") == 1
    assert change("callbacks_total", type="other", outcome="recorded") == 1
    assert change("callbacks_total", type="other", outcome="refused") == 3
    assert change("callbacks_total") == 7


async def test_a_cloud_event_goes_by_its_type(service: Service, run_id: str, change: Change):
    body = {"specversion": "1.0", "id": str(uuid4()), "type": "session.status_changed", "data": {"run_id": run_id}}
    answer = await service.http.post("/api/webhooks/happyrobot", json=body, headers={"X-API-KEY": HOOK_KEY})
    assert answer.status_code == 200
    assert change("callbacks_total", type="session.status_changed", outcome="recorded") == 1


async def test_without_postgresql_callbacks_fail_and_metrics_are_there_but_for_the_queue(
    servers: Servers, change: Change
):
    async with running_service(settings_for(f"postgresql://x@{NOBODY}/x", servers.redis_url, None)) as service:
        assert (await service.callback("r", "log")).status_code == 503
        numbers = await scraped(service.http)
    assert change("callbacks_total", type="log", outcome="failed") == 1
    assert total(numbers, "switchboard_callbacks_total", type="log", outcome="failed") >= 1
    assert not labels_of(numbers, "switchboard_jobs")


# Streams


async def test_a_stream_is_open_while_it_is_and_its_length_is_no_request_s(
    service: Service, run_id: str, context_id: str, change: Change
):
    async with service.stream(context_id=context_id) as stream:
        await service.callback(run_id, "log", 1)
        await anext(stream)
        assert change("open_streams") == 1
        assert total(await scraped(service.http), "switchboard_open_streams") >= 1
        assert change("announcements_total", outcome="published") == 1
    await until(lambda: settled(change))
    assert change("http_requests_total", route="/api/events", status="200") == 1
    assert change("http_request_seconds_count", route="/api/events") == 0


async def settled(change: Change) -> bool:
    return change("open_streams") == 0 and change("http_requests_total", route="/api/events") == 1


async def test_how_old_events_are_when_a_stream_sends_them_is_measured_and_replays_are_not(
    service: Service, run_id: str, context_id: str, change: Change
):
    await service.callback(run_id, "log", "before")
    async with service.stream("0", context_id=context_id) as stream:
        assert (await anext(stream))["data"] == "before"
        assert change("event_to_browser_seconds_count") == 0
        await service.callback(run_id, "log", "now")
        assert (await anext(stream))["data"] == "now"
        assert change("event_to_browser_seconds_count") == 1
        assert 0 <= change("event_to_browser_seconds_sum") < 60


async def test_an_event_that_was_not_announced_is_as_old_as_its_row(
    service: Service, db: AsyncEngine, run_id: str, context_id: str, change: Change
):
    async with service.stream(context_id=context_id) as stream:
        async with db.begin() as conn:
            await conn.execute(
                text(
                    "INSERT INTO run_events (run_id, context_id, event_type, status, occurred_at, created_at) "
                    "VALUES (:run_id, :context_id, 'log', 'RUNNING', now(), now() - interval '1 hour')"
                ),
                {"run_id": run_id, "context_id": context_id},
            )
        service.hub.look()
        await anext(stream)
    assert change("event_to_browser_seconds_count") == 1
    assert change("event_to_browser_seconds_sum") == pytest.approx(3600, abs=60)


def event(number: int, written_at: float) -> Event:
    """As it comes from its row, which was written then."""
    row = SimpleNamespace(
        id=number,
        run_id="r",
        context_id="c",
        workflow_id="w",
        event_type="log",
        status="RUNNING",
        occurred_at=None,
        created_at=datetime.fromtimestamp(written_at, UTC),
        data={"n": number},
    )
    return Event.of(cast("Row[Any]", row))


def packed(*events: Event) -> bytes:
    return pack([Frame.of(event) for event in events])


def test_a_message_says_when_the_first_of_its_events_was_written():
    _, frames = unpack(packed(event(1, 1000.25), event(2, 1001.5)))
    assert [(frame.event.id, frame.written_at) for frame in frames] == [(1, 1000.25), (2, 1000.25)]


def test_what_is_streamed_does_not_say_it():
    assert b"written" not in event(1, 1000.25).encode()
    assert from_json(event(1, 1000.25).encode()).keys() == EventOut.model_fields.keys()


def test_a_message_of_an_older_version_is_read_and_one_of_a_newer_is_left_to_postgresql():
    head, _, lines = packed(event(1, 1000.25)).partition(b"\n")
    assert head == b"1 1 1000250000"
    ids, (frame,) = unpack(b"1 1\n" + lines)
    assert (ids, frame.event.data, frame.written_at) == ((1, 1), {"n": 1}, None)
    with pytest.raises(ValueError, match="newer"):
        unpack(head + b" 5\n" + lines)


async def test_a_batch_is_one_observation_of_its_oldest_event(db: AsyncEngine, change: Change):
    hub = Hub(db, cast("Redis", None), Channel(db))
    async with hub.following(Scope(EVERYTHING, "c")) as follower:
        first, now = follower.joined_after + 1, time.time()
        assert hub._continue_with([packed(event(first, now - 3600), event(first + 1, now))])
        assert hub._continue_with([packed(event(first + 2, now))])
        stream = follow(db, hub, follower, None)
        assert (await anext(stream)).startswith(b": connected")
        assert (await anext(stream)).count(b"data:") == 3
        await stream.aclose()
    assert change("event_to_browser_seconds_count") == 1
    assert change("event_to_browser_seconds_sum") == pytest.approx(3600, abs=60)


# Redis


async def test_announcements_that_fail_are_counted(db: AsyncEngine, change: Change):
    redis, failed = Redis.from_url(f"redis://{NOBODY}"), asyncio.Event()
    async with Announcer(redis, Channel(db), failed.set, Leaving()).running() as announcer:
        announcer.announce([event(1, 0)])
        await failed.wait()
    await redis.aclose()
    assert change("announcements_total", outcome="failed") == 1
    assert change("announcements_total", outcome="published") == 0


@pytest.mark.parametrize("away", [False, True])
async def test_whether_redis_is_away_is_found_out_when_somebody_asks(database_url: str, servers: Servers, away: bool):
    redis_url = f"redis://{NOBODY}" if away else servers.redis_url
    async with running_service(settings_for(database_url, redis_url, None)) as service:
        assert total(await scraped(service.http), "switchboard_redis_away") == away


# PostgreSQL


async def test_whether_postgresql_is_away_is_known_all_the_time(own_database: str, servers: Servers):
    async with (
        relayed(own_database) as wire,
        running_service(settings_for(wire.url, servers.redis_url, None)) as service,
    ):
        for away in (False, True, False):
            if away:
                wire.lose()
            else:
                await wire.restore()
            await until(lambda away=away: says(service.http, "switchboard_postgresql_away", away))  # type: ignore[misc]


@pytest.fixture
async def scraping(
    own_database: str, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Service, Wire]]:
    """A service that wants credentials, and the wire to its PostgreSQL."""
    monkeypatch.setattr(watch, "PATIENCE", 0.3)
    async with relayed(own_database) as wire:
        settings = settings_for(wire.url, servers.redis_url, None, allow_anonymous=False)
        async with running_service(settings) as service:
            yield service, wire


async def statuses_of(service: Service, *credentials: dict[str, str]) -> list[int]:
    return [(await service.http.get("/metrics", headers=each)).status_code for each in credentials]


async def lost(service: Service, wire: Wire) -> None:
    wire.lose()
    await until(lambda: service.state["watch"].away)


async def test_an_operator_who_was_let_in_is_let_in_while_postgresql_is_away(scraping: tuple[Service, Wire]):
    service, wire = scraping
    db = service.state["db"]
    (_, seen), (_, unseen), (_, app) = [
        await new_key(db, scope) for scope in (KeyScope.ADMIN, KeyScope.ADMIN, KeyScope.APP)
    ]
    wrong = bearer("0" * 64)
    assert await statuses_of(service, seen, app, wrong) == [200, 403, 401]
    await lost(service, wire)
    assert await statuses_of(service, seen, unseen, app, wrong, {}) == [200, 503, 503, 503, 401]

    async def it_says_so() -> bool:
        page = (await service.http.get("/metrics", headers=seen)).text
        return total(read(page), "switchboard_postgresql_away") == 1

    await until(it_says_so)  # of the process, in which other tests' services run, too
    # And nowhere else.
    for path in ("/api/happyrobot/runs", "/api/happyrobot/deliveries"):
        assert (await service.http.get(path, headers=seen)).status_code == 503
    await wire.restore()
    await until(lambda: recognised(service, unseen))


async def recognised(service: Service, credential: dict[str, str]) -> bool:
    return await statuses_of(service, credential) == [200]


async def test_not_for_longer_than_ten_minutes_and_not_beyond_the_end_of_its_key(
    scraping: tuple[Service, Wire], monkeypatch: pytest.MonkeyPatch
):
    service, wire = scraping
    _, lasting = await new_key(service.state["db"], KeyScope.ADMIN)
    _, ending = await new_key(service.state["db"], KeyScope.ADMIN, lifetime=timedelta(hours=1))
    assert await statuses_of(service, lasting, ending) == [200, 200]
    await lost(service, wire)
    assert await statuses_of(service, lasting, ending) == [200, 200]

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(hours=2)

    monkeypatch.setattr(operators, "datetime", Later)
    assert await statuses_of(service, lasting, ending) == [200, 503]
    assert operators._REMEMBERED == 600
    monkeypatch.setattr(operators, "_REMEMBERED", -1)
    assert await statuses_of(service, lasting) == [503]


async def test_a_key_that_was_revoked_is_forgotten_when_it_comes_again(scraping: tuple[Service, Wire]):
    service, wire = scraping
    key_id, credential = await new_key(service.state["db"], KeyScope.ADMIN)
    assert await statuses_of(service, credential) == [200]
    async with service.state["db"].begin() as conn:
        await keys.revoke(conn, key_id)
    assert await statuses_of(service, credential) == [403]
    await lost(service, wire)
    assert await statuses_of(service, credential) == [503]


def test_who_is_recalled_is_not_remembered_for_longer(monkeypatch: pytest.MonkeyPatch):
    known, now = operators.Operators(), time.monotonic()
    known.remember("key", ANYBODY)
    for seconds, there in ((400, ANYBODY), (599, ANYBODY), (601, None)):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
        assert known.recall("key") is there


def test_of_an_operator_no_more_is_kept_than_a_digest_and_of_very_many_only_the_last():
    known = Operators()
    for number in range(operators._MOST + 1):
        known.remember(f"{number:064x}", ANYBODY)
    assert len(known._known) == operators._MOST
    assert known.recall(f"{0:064x}") is None
    assert known.recall(f"{1:064x}") == known.recall(f"{operators._MOST:064x}") == ANYBODY
    assert not any(b"0" * 60 in digest or len(digest) != 32 for digest in known._known)


# HappyRobot


@contextlib.asynccontextmanager
async def asking(servers: Servers, **more: Any) -> AsyncIterator[tuple[HappyRobot, respx.MockRouter]]:
    """A client of HappyRobot, and what answers it."""
    router, redis = respx.MockRouter(), Redis.from_url(servers.redis_url)
    client = HappyRobot(
        settings_for("postgresql://x", "redis://x", None, **more), redis, httpx.MockTransport(router.async_handler)
    )
    try:
        yield client, router
    finally:
        await client.aclose()
        await redis.aclose()


@pytest.fixture
async def happyrobot(servers: Servers) -> AsyncIterator[tuple[HappyRobot, respx.MockRouter]]:
    async with asking(servers) as found:
        yield found


HOOK = Hook(f"http://{NOBODY}/hooks/x")


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (httpx.Response(200, json={"run_id": "r"}), "answered"),
        (httpx.Response(400), "refused"),
        (httpx.Response(500), "unknown"),
        (httpx.ReadTimeout("late"), "unknown"),
    ],
)
async def test_triggers_are_counted_by_what_became_of_them(
    happyrobot: tuple[HappyRobot, respx.MockRouter], change: Change, answer: Any, outcome: str
):
    client, router = happyrobot
    router.post(HOOK.url).mock(side_effect=[answer])
    await attempted(client.trigger(HOOK, {}))
    assert change("upstream_requests_total", call="trigger", outcome=outcome) == 1
    assert change("upstream_requests_total") == change("upstream_request_seconds_count", call="trigger") == 1


async def test_each_request_of_a_trigger_counts(happyrobot: tuple[HappyRobot, respx.MockRouter], change: Change):
    client, router = happyrobot
    router.post(HOOK.url).mock(side_effect=[httpx.ConnectError("no"), httpx.Response(200, json={"run_id": "r"})])
    await attempted(client.trigger(HOOK, {}))
    assert change("upstream_requests_total", call="trigger", outcome="not_sent") == 1
    assert change("upstream_requests_total", call="trigger", outcome="answered") == 1


@pytest.mark.parametrize(
    ("answer", "away"),
    [
        (httpx.Response(200, json={"run_id": "r"}), False),
        (httpx.Response(200, text="unreadable"), False),
        (httpx.Response(400), False),
        (httpx.Response(503), True),
        (httpx.ConnectError("no"), True),
        (httpx.ReadTimeout("late"), True),
        (httpx.RemoteProtocolError("hung up"), True),
        # These say nothing about it.
        (httpx.PoolTimeout("all in use"), None),
        (httpx.LocalProtocolError("cannot be sent"), None),
    ],
)
async def test_whether_happyrobot_is_away_is_as_the_last_request_went(servers: Servers, answer: Any, away: bool | None):
    async with asking(servers, happyrobot_trigger_timeout=0.05) as (client, router):
        assert client.away is None
        hook, run = router.post(HOOK.url), router.get(path__regex="/runs/")
        for before in (True, False):
            for call in (client.trigger(HOOK, {}), client.decide(HOOK, {"approval_id": "a"}), client.run("r", READ)):
                client._note(away=before)
                for route in (hook, run):
                    route.mock(side_effect=lambda _: raised(answer))
                await attempted(call)
                assert client.away == (before if away is None else away)
                assert total(here(), "switchboard_happyrobot_away") == client.away


async def test_a_happyrobot_that_takes_too_long_is_away(servers: Servers):
    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with asking(servers, happyrobot_trigger_timeout=0.05) as (client, router):
        for route in (router.post(HOOK.url), router.get(path__regex="/runs/")):
            route.mock(side_effect=never)
        for call in (client.trigger(HOOK, {}), client.run("r", Effort(patience=0.05, timeout=0.05))):
            client._note(away=False)
            await attempted(call)
            assert client.away


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (httpx.Response(200, json={}), "answered"),
        (httpx.Response(404), "not_known"),
        (httpx.Response(401), "key_refused"),
        (httpx.Response(503), "no_answer"),
        (httpx.ReadTimeout("late"), "no_answer"),
        (httpx.Response(200, content=b"x" * 10_000_001), "unreadable"),
    ],
)
async def test_so_are_questions(
    happyrobot: tuple[HappyRobot, respx.MockRouter], change: Change, answer: Any, outcome: str
):
    client, router = happyrobot
    router.get(path__regex="/runs/").mock(side_effect=lambda _: raised(answer))
    for call in (client.run, client.record, client.recordings):
        await attempted(call("r", READ))
    for name in ("run", "record", "recordings"):
        assert change("upstream_requests_total", call=name, outcome=outcome) == 1
    assert change("upstream_requests_total") == 3
    assert change("upstream_turns_total", outcome="taken") == change("upstream_turn_wait_seconds_count") == 3


async def test_so_are_cancellations_and_decisions(happyrobot: tuple[HappyRobot, respx.MockRouter], change: Change):
    client, router = happyrobot
    router.post(path__regex="/cancel").respond(409)
    router.post(HOOK.url).respond(403)
    await attempted(client.cancel("r", READ))
    await attempted(client.decide(HOOK, {"approval_id": "a"}))
    for name in ("cancel", "decide"):
        assert change("upstream_requests_total", call=name, outcome="refused") == 1


async def test_who_gets_no_turn_asks_nobody(servers: Servers, context_id: str, change: Change):
    async with asking(servers, happyrobot_api_key=context_id, happyrobot_api_pace=0.1) as (client, _):
        await client.turn(BACKGROUND)
        assert await attempted(client.run("r", Effort(patience=0, timeout=10))) == "NoTurn"
    assert change("upstream_turns_total", outcome="taken") == 1
    assert change("upstream_turns_total", outcome="none") == 1
    assert change("upstream_turn_wait_seconds_count") == 2
    assert change("upstream_requests_total") == 0


async def test_without_a_key_nobody_is_asked(servers: Servers, change: Change):
    async with asking(servers, happyrobot_api_key=None) as (client, _):
        assert await attempted(client.run("r", READ)) == "NoKey"
    assert change("upstream_requests_total") == 0


def raised(answer: Any) -> httpx.Response:
    if isinstance(answer, Exception):
        raise answer
    return httpx.Response(answer.status_code, content=answer.content)


async def attempted(call: Any) -> str | None:
    try:
        await call
    except HappyRobotError as error:
        return type(error).__name__
    return None


# Runs that fell silent

RUNNING, COMPLETED = Standing(RunStatus.RUNNING), Standing(RunStatus.COMPLETED)
TIMED_OUT = Standing(RunStatus.FAILED, timed_out=True)


@pytest.mark.parametrize(
    ("before", "after", "asked", "heard", "word"),
    [
        (RUNNING, COMPLETED, True, True, "moved"),
        (TIMED_OUT, COMPLETED, True, True, "moved"),
        (RUNNING, RUNNING, True, True, "unchanged"),
        (RUNNING, TIMED_OUT, True, False, "timed_out"),
        (RUNNING, TIMED_OUT, False, False, "timed_out"),
        (TIMED_OUT, TIMED_OUT, True, False, "no_answer"),
        (RUNNING, RUNNING, True, False, "no_answer"),
        (RUNNING, RUNNING, False, False, "no_key"),
    ],
)
def test_what_a_look_has_brought(before: Standing, after: Standing, asked: bool, heard: bool, word: str):
    assert outcome(before, after, asked=asked, heard=heard) == word


async def test_looks_at_silent_runs_are_counted(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str, change: Change
):
    done, lost = await insert_run(db, context_id), await insert_run(db, context_id)
    async with db.begin() as conn:
        aged = "UPDATE agent_runs SET created_at = now() - interval '1 hour', updated_at = now() - interval '1 hour'"
        await conn.execute(text(f"{aged} WHERE context_id = :context_id"), {"context_id": context_id})
    router = respx.MockRouter()
    router.get(f"/api/v1/runs/{done}").respond(json={"run": {"id": done, "status": "completed"}})
    router.get(f"/api/v1/runs/{lost}").respond(503)
    router.get(path__regex="/recordings").respond(json={"recordings": []})
    settings = settings_for(database_url, servers.redis_url, None)
    async with running_service(settings, httpx.MockTransport(router.async_handler)) as service:
        state = service.state
        reconciler = Reconciler(state["settings"], state["db"], state["happyrobot"], state["lookups"], state["intake"])
        for run_id in (done, lost):
            await reconciler.reconcile(run_id)
    assert change("reconciliations_total", outcome="moved") == 1
    assert change("reconciliations_total", outcome="timed_out") == 1
    assert change("reconciliations_total") == 2


async def test_a_look_for_which_there_is_no_turn_is_one_too(
    service: Service, db: AsyncEngine, run_id: str, change: Change, monkeypatch: pytest.MonkeyPatch
):
    async def none_left(_: Effort) -> None:
        raise NoTurn

    state = service.state
    monkeypatch.setattr(state["happyrobot"], "turn", none_left)
    reconciler = Reconciler(state["settings"], state["db"], state["happyrobot"], state["lookups"], state["intake"])
    await reconciler.check(run_id)
    assert change("reconciliations_total", outcome="no_turn") == change("reconciliations_total") == 1


# Webhooks to customers


async def test_attempts_to_deliver_are_counted(
    own_database: str, servers: Servers, change: Change, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(delivering, "PAUSES", (0.0,))
    settings = settings_for(own_database, servers.redis_url, None, allow_private_webhooks=True, log_level="error")
    async with receiving() as receiver, running_service(settings) as service:
        state = service.state
        deliverer = Deliverer(state["settings"], state["db"], state["sender"])
        for answers, counted in (
            ([200], {"delivered": 1}),
            ([500, 200], {"delivered": 2, "failed": 1}),
            ([500], {"delivered": 2, "failed": 2, "given_up": 1}),
        ):
            receiver.answer = statuses(*answers)
            subject = await posted(service, receiver)
            for _ in range(2):
                await deliverer.deliver(subject)
            found = {word: change("delivery_attempts_total", outcome=word) for word in counted}
            assert found == counted


async def posted(service: Service, receiver: Receiver) -> str:
    """A webhook in the outbox of a customer of its own."""
    delivery_id, execution_id = uuid4(), uuid4()
    async with service.state["db"].begin() as conn:
        key, _ = await keys.create(conn, "a customer", [KeyScope.PUBLIC])
        await point(conn, service.state["settings"], key.id, receiver.url, None, SecretStr("s" * 32))
        await conn.execute(
            insert(executions).values(
                id=execution_id, workflow_id="default", context_id="c", input={}, key_id=key.id, status="completed"
            )
        )
        await conn.execute(
            insert(deliveries).values(
                id=delivery_id,
                key_id=key.id,
                execution_id=execution_id,
                event=WebhookEvent.COMPLETED,
                body=b"{}",
            )
        )
    return str(delivery_id)


# The queue, and the connections


async def test_the_queue_is_counted_for_all_workers(own_database: str, servers: Servers):
    async with running_service(settings_for(own_database, servers.redis_url, None)) as service:
        assert total(await scraped(service.http), "switchboard_jobs") == 0
        async with service.state["db"].begin() as conn:
            wanted = [
                *(Job(RECONCILE, str(number), after=100) for number in range(3)),
                *(Job(CHECK, str(number)) for number in range(2)),
                Job(START, "1"),
                Job(DELIVER, "1"),
            ]
            await jobs.enqueue(conn, wanted)
        await run_sql(
            own_database,
            "UPDATE switchboard_pgqueuer SET execute_after = now() - interval '90 s' WHERE dedupe_key = 'check:1'",
            "UPDATE switchboard_pgqueuer SET status = 'picked' WHERE entrypoint = 'start'",
            "UPDATE switchboard_pgqueuer SET status = 'failed' WHERE entrypoint = 'deliver'",
        )
        numbers = await scraped(service.http)
    found = {
        (job, state): total(numbers, "switchboard_jobs", kind=job, state=state)
        for job in jobs.EVERY
        for state in jobs.STATES
    }
    assert {place: number for place, number in found.items() if number} == {
        (RECONCILE, "waiting"): 3,
        (CHECK, "due"): 2,
        (START, "running"): 1,
        (DELIVER, "failed"): 1,
    }
    assert len(labels_of(numbers, "switchboard_jobs")) == len(found), "those of which there are none, too"
    oldest = {job: total(numbers, "switchboard_oldest_due_job_seconds", kind=job) for job in jobs.EVERY}
    assert 90 <= oldest.pop(CHECK) < 150
    assert set(oldest.values()) == {0}


async def test_used_connections_are_counted_until_they_are_back(own_database: str, servers: Servers):
    async with running_service(settings_for(own_database, servers.redis_url, None)) as service:
        pool = "switchboard_pool_connections"
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(12):
                await stack.enter_async_context(service.state["db"].connect())
            assert total(here(), pool, state="used") == 12
        # Those over the pool's size were closed.
        assert total(here(), pool, state="used") == 0
        assert total(here(), pool, state="idle") == 10
        assert total(here(), "switchboard_pool_size") == 20


# Who may read it, and what it does not say


async def test_only_operators_may_read_it(database_url: str, servers: Servers, db: AsyncEngine):
    settings = settings_for(database_url, servers.redis_url, None, allow_anonymous=False)
    async with running_service(settings) as service:
        for scope, status in ((KeyScope.ADMIN, 200), (KeyScope.APP, 403), (KeyScope.PUBLIC, 403)):
            _, credential = await new_key(db, scope)
            assert (await service.http.get("/metrics", headers=credential)).status_code == status
        assert (await service.http.get("/metrics")).status_code == 401


async def test_nothing_of_a_call_is_in_it(
    database_url: str, servers: Servers, upstream: Upstream, db: AsyncEngine, context_id: str
):
    marks = {name: f"{name}-{uuid4().hex}" for name in ("context", "word", "path", "query", "key", "transcript")}
    async with running_service(settings_for(database_url, servers.redis_url, upstream.url), worker=True) as service:
        _, credential = await new_key(db, KeyScope.ADMIN)
        body = {"context_id": marks["context"], "to": "+15550001234", "note": marks["transcript"]}
        trigger = await service.http.post("/api/happyrobot/trigger", json=body, headers=credential)
        (run_id,) = trigger.json()["run_ids"]
        for step in (
            service.callback(run_id, marks["word"], {"say": marks["transcript"]}),
            service.callback(marks["context"], "log"),
            service.http.get(f"/api/happyrobot/runs/{run_id}/details"),
            service.http.get(f"/{marks['path']}", params={"token": marks["query"]}),
            service.http.get(f"/api/happyrobot/runs/{marks['path']}", headers={"Authorization": f"Bearer {'5' * 64}"}),
            service.http.post("/api/webhooks/happyrobot", json={}, headers={"X-API-KEY": marks["key"]}),
        ):
            await step
        page = (await service.http.get("/metrics", headers=credential)).text
    secrets = [*marks.values(), run_id, "+15550001234", HOOK_KEY, API_KEY, APP_SECRET, credential["Authorization"][7:]]
    assert [secret for secret in secrets if secret in page] == []
    assert "5" * 64 not in page
    # Nothing that looks like an id, an address or a key, whatever it is.
    assert re.findall(r"[0-9a-f]{8}-[0-9a-f]{4}|[0-9a-f]{32}|://|@", page) == []


# Several processes


def deployed(database_url: str, servers: Servers) -> contextlib.AbstractContextManager[None]:
    return local.environment(
        DATABASE_URL=database_url,
        REDIS_URL=servers.redis_url,
        HAPPYROBOT_WEBHOOK_URL=f"http://{NOBODY}/hooks/none",
        HAPPYROBOT_X_API_KEY=HOOK_KEY,
        APP_URL=f"http://{NOBODY}",
        APP_SECRET=APP_SECRET,
        LOG_LEVEL="error",
    )


async def test_the_processes_of_a_service_are_added_up(own_database: str, servers: Servers, tmp_path: Path):
    with (
        deployed(own_database, servers),
        local.environment(TMPDIR=str(tmp_path)),
        local.child("serve", "--port", "0", "--workers", "2", "--no-worker") as address,
    ):
        # A connection of its own for each, of which the kernel gives either process some.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=address, timeout=20, limits=limits) as http:
            await until(lambda: says(http, "switchboard_pool_size", 40))
            async with contextlib.AsyncExitStack() as stack:
                for number in range(16):
                    await stack.enter_async_context(http.stream("GET", "/api/events", params={"context_id": number}))
                for _ in range(30):
                    await http.get("/healthz")
                numbers = await scraped(http)
                assert total(numbers, "switchboard_open_streams") == 16
                assert total(numbers, "switchboard_http_requests_total", route="/healthz") == 30
                assert total(numbers, "process_resident_memory_bytes") == 0, "of both it cannot be said"
                (folder,) = folders_in(tmp_path)
                opened = {pid: streams_of(folder, pid) for pid in pids_in(folder)}
                assert len(opened) == 2
                busiest = max(opened, key=lambda pid: opened[pid])
                os.kill(busiest, signal.SIGKILL)
                # What it had open is not, and what it has counted stays.
                await until(lambda: says(http, "switchboard_open_streams", 16 - opened[busiest]))
                numbers = await scraped(http)
                assert total(numbers, "switchboard_http_requests_total", route="/healthz") == 30
    assert not folders_in(tmp_path), "their folder goes with them"


async def says(http: httpx.AsyncClient, name: str, number: float) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return total(await scraped(http), name) == number
    return False


def folders_in(folder: Path) -> list[Path]:
    return list(folder.glob("switchboard-metrics-*"))


def pids_in(folder: Path) -> set[int]:
    return {int(each.stem.rpartition("_")[2]) for each in folder.glob("gauge_livesum_*.db")}


def streams_of(folder: Path, pid: int) -> float:
    families = MultiProcessCollector.merge([str(folder / f"gauge_livesum_{pid}.db")])
    numbers = {sample.name: sample.value for family in families for sample in family.samples}
    return float(numbers["switchboard_open_streams"])


async def test_a_worker_of_its_own_is_read_on_a_port_of_its_own(own_database: str, servers: Servers):
    with deployed(own_database, servers):
        worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "switchboard",
            "worker",
            "--metrics-port",
            "0",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    try:
        assert worker.stdout is not None
        said, _, port = (await worker.stdout.readline()).decode().rpartition(" ")
        assert said == "Metrics are on port"
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port.strip()}", timeout=20) as http:
            numbers = await scraped(http)
    finally:
        worker.send_signal(signal.SIGTERM)
        _, err = await worker.communicate()
    assert (worker.returncode, err) == (0, b"")
    assert ("switchboard_delivery_attempts_total", frozenset({("outcome", "delivered")})) in numbers
    assert total(numbers, "process_resident_memory_bytes") > 0


def test_a_port_that_is_taken_is_named(switchboard: Callable[..., Said], environment: dict[str, str]):
    with local.listening(local.LOOPBACK, 0) as taken:
        port = taken.getsockname()[1]
        done = switchboard("worker", "--metrics-port", str(port), **environment)
    assert (done.code, done.err) == (
        1,
        f"switchboard: cannot listen on 127.0.0.1 port {port}: Address already in use\n",
    )
