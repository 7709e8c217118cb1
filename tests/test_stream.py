"""Streams: every event once, in order, without a gap, whatever is cut, lost or late."""

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import uuid4

import httpx
import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database, events
from switchboard.events import Event, NewEvent, Scope, read_events
from switchboard.live import followers, messages
from switchboard.live import hub as hubs
from switchboard.live import stream as streams
from switchboard.live.channel import Channel
from switchboard.live.followers import Follower
from switchboard.live.hub import Hub
from switchboard.live.messages import Frame
from switchboard.runs.ingest import write
from switchboard.sight import EVERYTHING
from switchboard.tables import RunStatus
from tests.conftest import (
    Servers,
    Service,
    Upstream,
    insert_run,
    new_database,
    running_service,
    settings_for,
    until,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NO_REDIS = "unix:///no/such/redis.sock"


async def take(stream: AsyncIterator[Any], count: int) -> list[Any]:
    """The next events of a stream; fails rather than waits for ever."""
    async with asyncio.timeout(20):
        return [await anext(stream) for _ in range(count)]


async def test_an_event_reaches_the_browser_as_the_guide_has_it(service: Service, run_id: str, context_id: str):
    async with service.stream(context_id=context_id) as stream:
        await service.callback(run_id, "log", {"message": "hello"}, timestamp="2026-01-01T00:00:00Z")
        [event] = await take(stream, 1)
    assert event == {
        "id": event["id"],
        "run_id": run_id,
        "context_id": context_id,
        "workflow_id": "default",
        "event_type": "log",
        "status": "RUNNING",
        "timestamp": "2026-01-01T00:00:00.000Z",
        "data": {"message": "hello"},
    }
    assert [event] == (await service.http.get(f"/api/happyrobot/runs/{run_id}/events")).json()


async def test_the_response_is_one_that_proxies_leave_alone(service: Service, context_id: str):
    async with service.http.stream("GET", "/api/events", params={"context_id": context_id}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers["x-accel-buffering"] == "no"
        first = await anext(answer.aiter_text())
        assert first.startswith(": connected\nretry: ")
        # Also where it stands, for a browser that is cut off before it has seen an event.
        found = re.fullmatch(r": connected\nretry: (\d+)\nid: \d+\n\n", first)
        assert found is not None
        assert 1_000 <= int(found[1]) <= 4_000


async def test_who_is_cut_off_before_the_first_event_misses_none(service: Service, context_id: str, run_id: str):
    async with service.http.stream("GET", "/api/events", params={"context_id": context_id}) as answer:
        first = await anext(answer.aiter_text())
    await service.callback(run_id, "log", "while nobody listened")
    [place] = re.findall(r"^id: (\d+)$", first, re.MULTILINE)
    async with service.stream(place, context_id=context_id) as stream:
        assert (await anext(stream))["data"] == "while nobody listened"


async def test_a_run_that_ends_while_its_reader_joins_is_told_to_its_end(
    db: AsyncEngine, servers: Servers, run_id: str
):
    redis = Redis.from_url(servers.redis_url)
    hub = Hub(db, redis, Channel(db))  # it does not run, and hears of nothing
    async with hub.following(Scope(EVERYTHING, run_id=run_id)) as follower:
        async with db.begin() as conn:
            await write(conn, [NewEvent(run_id, "completed", "booked", RunStatus.COMPLETED)])
        told = b"".join([chunk async for chunk in streams.follow(db, hub, follower, None)]).decode()
    await redis.aclose()
    assert told.count('"booked"') == 1
    assert "event: end\n" in told


async def test_who_resumes_behind_an_event_that_is_not_kept_any_more_is_told_nothing_twice(
    own_database: str, servers: Servers, context_id: str
):
    async with running_service(settings_for(own_database, servers.redis_url, None)) as service:
        db = service.state["db"]
        run_id = await insert_run(db, context_id)
        for number in range(3):
            await service.callback(run_id, "log", number)
        async with db.begin() as conn:
            last = "DELETE FROM run_events WHERE id = (SELECT max(id) FROM run_events) RETURNING id"
            newest = await conn.scalar(text(last))
        async with service.stream(newest, context_id=context_id) as stream:
            await service.callback(run_id, "log", "new")
            assert (await anext(stream))["data"] == "new"


async def test_who_has_seen_the_headers_misses_nothing(
    database_url: str, servers: Servers, run_id: str, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    """The hub takes its time to join; the browser's next request does not wait for it."""
    genuine = Hub.newest
    joined = 0

    async def slow(hub: Hub) -> int:
        nonlocal joined
        await asyncio.sleep(0.2)
        joined += 1
        return await genuine(hub)

    monkeypatch.setattr(Hub, "newest", slow)
    async with (
        running_service(settings_for(database_url, servers.redis_url, None)) as service,
        service.stream(context_id=context_id) as stream,
    ):
        assert joined == 1
        await service.callback(run_id, "log", "at once")
        assert [event["data"] for event in await take(stream, 1)] == ["at once"]


async def test_a_trigger_shows_in_the_stream_of_its_context(service: Service, upstream: Upstream, context_id: str):
    async with service.stream(context_id=context_id) as stream:
        body = {"context_id": context_id}
        [run_id] = (await service.http.post("/api/happyrobot/trigger", json=body)).json()["run_ids"]
        seen = []
        async with asyncio.timeout(20):
            async for event in stream:
                seen.append(event)
                if event["event_type"] == "completed":
                    break
    assert [event["event_type"] for event in seen[:3]] == ["triggered", "running", "log"]
    assert seen == (await service.http.get(f"/api/happyrobot/runs/{run_id}/events")).json()


async def test_each_scope_sees_what_it_asked_for(service: Service, db: AsyncEngine):
    contexts = [f"order_{uuid4().hex}" for _ in range(2)]
    runs = [await insert_run(db, context_id) for context_id in (contexts[0], contexts[0], contexts[1])]
    async with (
        service.stream(context_id=contexts[0]) as of_context,
        service.stream(run_id=runs[1]) as of_run,
        service.stream(run_id=runs[1], context_id=contexts[1]) as of_neither,
        service.stream() as of_all,
    ):
        for number, run_id in enumerate(runs):
            await service.callback(run_id, "log", number)
        await service.callback(runs[1], "completed", 3)
        assert [event["data"] for event in await take(of_context, 3)] == [0, 1, 3]
        assert [event if event == "end" else event["data"] for event in await take(of_run, 3)] == [1, 3, "end"]
        mine: list[Any] = []
        async with asyncio.timeout(20):
            while len(mine) < 4:
                event = await anext(of_all)
                if event["run_id"] in runs:
                    mine.append(event["data"])
        assert mine == [0, 1, 2, 3]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(of_neither)


async def test_without_an_id_a_stream_starts_now(service: Service, run_id: str, context_id: str):
    await service.callback(run_id, "log", "before")
    async with service.stream(context_id=context_id) as stream:
        await service.callback(run_id, "log", "after")
        [event] = await take(stream, 1)
    assert event["data"] == "after"


@pytest.mark.parametrize("how", ["header", "query", "both"])
async def test_a_stream_resumes_after_the_last_event_that_was_seen(
    service: Service, run_id: str, context_id: str, how: str
):
    for number in range(5):
        await service.callback(run_id, "log", number)
    ids = [event["id"] for event in (await service.http.get(f"/api/happyrobot/runs/{run_id}/events")).json()]
    # A browser that reconnects repeats its address, with the id that it began with, and adds the header.
    query = {"query": str(ids[2]), "both": str(ids[0])}.get(how)
    params = {"context_id": context_id} | ({"last_event_id": query} if query else {})
    async with service.stream(None if how == "query" else ids[2], **params) as stream:
        assert [event["data"] for event in await take(stream, 2)] == [3, 4]
        await service.callback(run_id, "log", 5)
        assert [event["data"] for event in await take(stream, 1)] == [5]


async def test_zero_replays_everything(service: Service, run_id: str, context_id: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "_PAGE", 2)
    for number in range(5):
        await service.callback(run_id, "log", number)
    async with service.stream(context_id=context_id, last_event_id="0") as stream:
        assert [event["data"] for event in await take(stream, 5)] == list(range(5))


async def test_what_is_heavy_is_replayed_in_portions(
    service: Service, run_id: str, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(events, "_HEAVY", 1_000)
    read: list[int] = []
    genuine = events.read_events

    async def counting(*arguments: Any, **named: Any) -> events.Page:
        page = await genuine(*arguments, **named)
        read.append(len(page.events))
        return page

    monkeypatch.setattr(streams, "read_events", counting)
    for _ in range(7):
        await service.callback(run_id, "log", "x" * 600)
    async with service.stream(context_id=context_id, last_event_id="0") as stream:
        assert len(await take(stream, 7)) == 7
    assert read == [2, 2, 2, 1]


async def test_the_stream_of_a_run_ends_with_it_and_tells_a_browser_to_stay_away(service: Service, run_id: str):
    url = "/api/events"
    await service.callback(run_id, "log", 1)
    await service.callback(run_id, "completed", 2)
    for _ in range(2):  # also when it is over already
        answer = await service.http.get(url, params={"run_id": run_id, "last_event_id": "0"})
        blocks = answer.text.strip().split("\n\n")
        assert [block.splitlines()[0][:3] for block in blocks] == [": c", "id:", "id:", "id:"]
        identity, name, data = blocks[-1].splitlines()
        assert name == "event: end"
        assert data == f'data: {{"run_id":"{run_id}","status":"COMPLETED"}}'
    told = await service.http.get(url, params={"run_id": run_id}, headers={"Last-Event-ID": identity[4:]})
    assert told.status_code == 204
    await service.callback(run_id, "recording_ready", 3)
    event_id = identity[4:].removesuffix(".end")
    late = await service.http.get(url, params={"run_id": run_id}, headers={"Last-Event-ID": event_id})
    assert "recording_ready" in late.text
    assert "event: end" in late.text


async def test_an_unknown_run_has_no_stream(service: Service):
    answer = await service.http.get("/api/events", params={"run_id": "nobody"})
    assert (answer.status_code, answer.json()) == (404, {"error": "Run not found"})


@pytest.mark.parametrize(
    ("params", "headers"),
    [
        ({"last_event_id": "x"}, {}),
        ({"last_event_id": "-1"}, {}),
        ({"last_event_id": "1.5"}, {}),
        ({"last_event_id": "9" * 19}, {}),
        ({}, {"Last-Event-ID": "x"}),
        ({"last_event_id": "1"}, {"Last-Event-ID": "x"}),
        ({"context_id": ""}, {}),
        ({"context_id": "\x00"}, {}),
        ({"context_id": "x" * 256}, {}),
        ({"run_id": "x" * 256}, {}),
    ],
)
async def test_bad_input_is_a_400(service: Service, params: dict[str, str], headers: dict[str, str]):
    answer = await service.http.get("/api/events", params=params, headers=headers)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]


async def test_an_id_of_a_database_that_is_no_more_does_not_mute_the_stream(
    service: Service, run_id: str, context_id: str
):
    await service.callback(run_id, "log", "old")
    async with service.stream(10**15, context_id=context_id) as stream:
        await service.callback(run_id, "log", "new")
        assert [event["data"] for event in await take(stream, 2)] == ["old", "new"]


async def test_a_quiet_stream_is_kept_alive(service: Service, context_id: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(followers, "HEARTBEAT", 0.02)
    async with service.http.stream("GET", "/api/events", params={"context_id": context_id}) as answer:
        text = ""
        async with asyncio.timeout(20):
            async for chunk in answer.aiter_text():
                text += chunk
                if text.count(": still here\n") >= 2:
                    break


async def test_a_stream_that_is_cut_twenty_times_misses_and_repeats_nothing(
    service: Service, database_url: str, servers: Servers, upstream: Upstream, db: AsyncEngine, context_id: str
):
    """Two services, four writers, 2,000 events, a reader that changes sides."""
    runs = [await insert_run(db, context_id) for _ in range(4)]
    settings = settings_for(database_url, servers.redis_url, upstream.url)
    async with running_service(settings) as other:

        async def write(run_id: str, to: Service) -> None:
            take_in = to.state["intake"].take
            for start in range(0, 500, 5):
                logs = (NewEvent(run_id, "log", number) for number in range(start, start + 5))
                await asyncio.gather(*map(take_in, logs))

        writers = [write(run_id, (service, other)[place % 2]) for place, run_id in enumerate(runs)]
        writing = asyncio.gather(*writers)
        seen: list[Any] = []
        async with asyncio.timeout(120):
            for cut in range(20):
                resume = seen[-1]["id"] if seen else 0
                async with (service, other)[cut % 2].stream(resume, context_id=context_id) as stream:
                    # More than a page of what is there, so that some cuts come while events are replayed.
                    seen += await take(stream, 95)
            await writing
            async with service.stream(seen[-1]["id"], context_id=context_id) as stream:
                seen += await take(stream, 2000 - len(seen))
        assert len({event["id"] for event in seen}) == 2000
        for run_id in runs:
            timeline: list[Any] = []
            for _ in range(2):
                after = timeline[-1]["id"] if timeline else 0
                answer = await service.http.get(f"/api/happyrobot/runs/{run_id}/events?after={after}")
                timeline += answer.json()
            assert [event for event in seen if event["run_id"] == run_id] == timeline[:500]


async def test_without_redis_streams_keep_up_from_postgresql(
    database_url: str, upstream: Upstream, run_id: str, context_id: str
):
    settings = settings_for(database_url, NO_REDIS, upstream.url)
    async with (
        running_service(settings) as one,
        running_service(settings) as other,
        one.stream(context_id=context_id) as near,
        other.stream(context_id=context_id) as far,
    ):
        for number in range(3):
            assert (await one.callback(run_id, "log", number)).status_code == 200
        assert [event["data"] for event in await take(near, 3)] == [0, 1, 2]
        assert [event["data"] for event in await take(far, 3)] == [0, 1, 2]


async def test_who_follows_a_context_is_written_to_where_an_event_is_shown(
    service: Service, run_id: str, context_id: str
):
    """And who follows a run is not: its end is more than one event."""
    hub: Hub = service.state["hub"]
    async with service.stream(context_id=context_id) as wide, service.stream(run_id=run_id) as narrow:
        for number in range(2):
            await service.callback(run_id, "log", number)
            assert [event["data"] for event in await take(wide, 1)] == [number]
            assert [event["data"] for event in await take(narrow, 1)] == [number]
        mine = [each for each in hub._followers if context_id == each.scope.context_id or run_id == each.scope.run_id]
        sinks = {each.scope.run_id: each.sink for each in mine}
    assert sinks[None] is not None
    assert sinks[run_id] is None


async def is_heard(redis: Redis, channel: str) -> bool:
    """Whether somebody listens to a channel."""
    [(_, count)] = await redis.pubsub_numsub(channel)
    return bool(count)


async def test_nonsense_on_the_channel_stops_nobody(
    service: Service, servers: Servers, db: AsyncEngine, run_id: str, context_id: str
):
    redis = Redis.from_url(servers.redis_url)
    channel = await Channel(db).name()
    async with service.stream(context_id=context_id) as stream:
        await until(lambda: is_heard(redis, channel))
        for nonsense in (b"hello", b"", b"1 2\n{}", b"\xff", b'5 5\n{"id": "x"}'):
            assert await redis.publish(channel, nonsense) >= 1
        await service.callback(run_id, "log", 1)
        assert [event["data"] for event in await take(stream, 1)] == [1]
    await redis.aclose()


async def test_two_databases_on_one_redis_keep_to_themselves(
    service: Service, servers: Servers, template: str, upstream: Upstream, db: AsyncEngine, context_id: str
):
    async with new_database(servers, template) as url:
        settings = settings_for(url, servers.redis_url, upstream.url)
        engine = database.connect(url)
        async with running_service(settings) as other, service.stream(context_id=context_id) as stream:
            theirs = await insert_run(engine, context_id)
            for number in range(3):
                await other.callback(theirs, "log", f"of the other {number}")
            ours = await insert_run(db, context_id)
            await service.callback(ours, "log", "ours")
            assert [event["data"] for event in await take(stream, 1)] == ["ours"]
        await engine.dispose()


async def test_a_failure_nobody_foresaw_does_not_end_the_following(
    service: Service, run_id: str, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    genuine = messages.head_of
    failures = 1

    def fail_once(message: bytes) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise ZeroDivisionError
        return genuine(message)

    async with service.stream(context_id=context_id) as stream:
        monkeypatch.setattr(hubs, "head_of", fail_once)
        await service.callback(run_id, "log", 1)
        await service.callback(run_id, "log", 2)
        assert [event["data"] for event in await take(stream, 2)] == [1, 2]
        await until(lambda: failures < 0)


async def test_a_subscription_that_went_deaf_is_replaced(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    """A proxy that swallows everything: connected, but silent, also to pings."""
    monkeypatch.setattr(hubs, "_QUIET", 0.05)
    monkeypatch.setattr(hubs, "_RECONNECT_AFTER", 0.01)
    connections = 0

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await reader.read(1000):
            writer.write(b"" if connections % 2 else b"-ERR no\r\n")
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    async with server:
        redis = Redis(port=server.sockets[0].getsockname()[1], socket_timeout=None, protocol=2, driver_info=None)
        hub = Hub(db, redis, Channel(db))
        async with hub.running(), hub.following(Scope(EVERYTHING)), asyncio.timeout(20):
            while connections < 3:  # noqa: ASYNC110  # it counts what comes from outside
                await asyncio.sleep(0.01)
        await redis.aclose()


async def test_what_nobody_reads_is_not_listened_to(
    db: AsyncEngine, servers: Servers, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hubs, "_QUIET", 0.3)
    monkeypatch.setattr(hubs, "_LOOK_EVERY", 3600)
    pings = subscriptions = 0
    ping, subscribe = PubSub.ping, PubSub.subscribe

    async def counted_ping(self: PubSub) -> Any:
        nonlocal pings
        pings += 1
        return await ping(self)

    async def counted_subscribe(self: PubSub, *names: Any) -> Any:
        nonlocal subscriptions
        subscriptions += 1
        return await subscribe(self, *names)

    monkeypatch.setattr(PubSub, "ping", counted_ping)
    monkeypatch.setattr(PubSub, "subscribe", counted_subscribe)
    redis = Redis.from_url(servers.redis_url)
    name = str(uuid4())
    channel = Channel(db)
    monkeypatch.setattr(channel, "_name", name)  # other services of this database may still listen to theirs

    async def is_quiet() -> bool:
        return not await is_heard(redis, name)

    hub = Hub(db, redis, channel)
    async with hub.running(), asyncio.timeout(20):
        for number in range(2):
            monkeypatch.setattr(hubs, "_LINGER", 3600)
            assert await is_quiet()
            async with hub.following(Scope(EVERYTHING, context_id)) as follower:
                # Whether it listens already or not, what another process writes is not missed.
                run_id = await insert_run(db, context_id)
                async with db.begin() as conn:
                    written = await write(conn, [NewEvent(run_id, "log", number)])
                await redis.publish(name, messages.pack([Frame.of(event) for event in written.events]))
                while not (heard := await follower.read()):  # it may only be reminded
                    assert heard == []
                assert [frame.event.data for frame in heard] == [number]
                await until(lambda: is_heard(redis, name))
            # A page that is loaded again finds it as it was.
            await until(partial(lambda enough: pings >= enough, pings + 3))
            assert await is_heard(redis, name)
            monkeypatch.setattr(hubs, "_LINGER", 0)
            await until(is_quiet)
            for _ in range(20):
                await redis.ping()
            assert subscriptions == number + 1
    await redis.aclose()


async def test_messages_that_pile_up_are_dropped_and_read_from_postgresql(
    db: AsyncEngine, servers: Servers, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hubs, "_MAX_UNHEARD", 2)
    run_id = await insert_run(db, context_id)
    redis = Redis.from_url(NO_REDIS)
    hub = Hub(db, redis, Channel(db))
    async with hub.running(), hub.following(Scope(EVERYTHING, context_id)) as follower:
        for number in range(5):
            async with db.begin() as conn:
                written = await write(conn, [NewEvent(run_id, "log", number)])
            for _ in range(100):
                hub.hear(messages.pack([Frame.of(event) for event in written.events]))
        assert hub._inbox.qsize() <= 2
        seen: list[Any] = []
        async with asyncio.timeout(20):
            while len(seen) < 5:
                seen += [frame.event.data for frame in await follower.read() or ()]
        assert seen == list(range(5))
    await redis.aclose()


async def test_a_look_that_outlives_the_last_reader_hands_out_nothing(db: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(db, Redis.from_url(NO_REDIS), Channel(db))
    genuine = AsyncEngine.connect

    def leave_meanwhile(engine: AsyncEngine) -> Any:
        hub._cursor = None
        return genuine(engine)

    monkeypatch.setattr(AsyncEngine, "connect", leave_meanwhile)
    hub._cursor = 0
    await hub._catch_up()
    assert hub._cursor is None


async def test_streams_say_goodbye_when_the_service_stops(
    database_url: str, servers: Servers, upstream: Upstream, context_id: str
):
    settings = settings_for(database_url, servers.redis_url, upstream.url)
    async with running_service(settings) as service:
        http = httpx.AsyncClient(base_url=service.url)
        async with http.stream("GET", "/api/events", params={"context_id": context_id}) as answer:
            chunks = answer.aiter_text()
            await anext(chunks)
            service.hub.close()
            said = "".join([chunk async for chunk in chunks])
            assert said.removeprefix(": still here\n") == ": goodbye, resume elsewhere\n\n"
        # Whoever comes now is sent on at once.
        late = await http.get("/api/events", params={"context_id": context_id})
        assert late.text.endswith(": goodbye, resume elsewhere\n\n")
        await http.aclose()


async def test_whoever_is_sent_away_in_the_middle_of_a_replay_resumes_there(
    service: Service, db: AsyncEngine, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    """Also of a run that is over: its stream has not come to the end."""
    run_id = await insert_run(db, context_id)
    for number in range(9):
        await service.callback(run_id, "log", number)
    await service.callback(run_id, "completed", {})
    monkeypatch.setattr(streams, "_PAGE", 4)
    scope = Scope(EVERYTHING, run_id=run_id)
    async with service.hub.following(scope) as follower:
        chunks = []
        async for chunk in streams.follow(db, service.hub, follower, 0):
            chunks.append(chunk)
            if len(chunks) == 2:  # the greeting, and a page
                follower.dismiss()
    said = b"".join(chunks).decode()
    assert said.count('data: {"id"') == 4
    assert "event: renew" in said
    assert "event: end" not in said
    last = said[: said.index("event: renew")].rstrip().rsplit("id: ", 1)[1]
    async with service.stream(last, run_id=run_id) as stream:
        rest = [event async for event in stream]
    assert [event["data"] for event in rest[:-1]] == [4, 5, 6, 7, 8, {}]
    assert rest[-1] == "end"


async def test_a_browser_that_does_not_read_is_sent_away():
    follower = Follower(Scope(EVERYTHING), 0)
    event = Event(
        id=1,
        run_id="r",
        context_id="c",
        workflow_id="w",
        event_type="log",
        status=RunStatus.RUNNING,
        timestamp=NOW,
        data=None,
    )
    frame = Frame(event, b"{}")
    follower.push([frame] * followers.MAX_UNREAD, b"")
    assert not follower.lagging
    follower.push([frame], b"")
    assert follower.lagging
    assert len(await follower.read()) == followers.MAX_UNREAD
    assert await follower.read() is None


async def test_a_stream_ends_when_postgresql_is_away(database_url: str, servers: Servers, db: AsyncEngine):
    """The browser comes back and resumes; an error in the middle of a stream cannot be told in any other way."""
    away = database.connect("postgresql://nobody@/nothing?host=/no/such/folder")
    redis = Redis.from_url(servers.redis_url)
    hub = Hub(db, redis, Channel(db))
    async with hub.following(Scope(EVERYTHING)) as follower:
        chunks = [chunk async for chunk in streams.follow(away, hub, follower, 0)]
    assert len(chunks) == 1  # the greeting
    await redis.aclose()


async def test_writers_take_turns_so_that_ids_become_visible_in_order(db: AsyncEngine, context_id: str):
    """While one has its ids and has not committed, no other commits greater ones."""
    runs = [await insert_run(db, context_id) for _ in range(2)]
    scope = Scope(EVERYTHING, context_id)

    async def visible() -> list[Event]:
        async with db.connect() as conn:
            return list((await read_events(conn, scope, after=0, limit=10)).events)

    async def write_one(run_id: str) -> None:
        async with db.begin() as conn:
            await write(conn, [NewEvent(run_id, "log")])

    async def waiting() -> int:
        async with db.connect() as conn:
            query = text(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "
                "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            return await conn.scalar(query) or 0

    async with db.begin() as conn:
        await write(conn, [NewEvent(runs[0], "log")])
        second = asyncio.create_task(write_one(runs[1]))
        async with asyncio.timeout(20):
            while not await waiting():
                assert not second.done(), "the second one did not wait"
        assert await visible() == []
    await second
    assert [event.run_id for event in await visible()] == runs
