"""Followers: who is shown what, in which order, and how often somebody is asked about it."""

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.types import Message

from switchboard import events
from switchboard.events import Event, NewEvent, Page, Scope
from switchboard.leaving import Leaving
from switchboard.live import followers as following
from switchboard.live import hub as hubs
from switchboard.live.announcer import Announcer
from switchboard.live.channel import Channel
from switchboard.live.followers import PATIENCE, Follower, Followers
from switchboard.live.hub import Hub
from switchboard.live.messages import Frame, pack
from switchboard.live.stream import EventStream
from switchboard.runs.ingest import write
from switchboard.sight import EVERYTHING, Sight
from switchboard.tables import RunStatus
from tests.conftest import Service, until

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def frame(number: int, run_id: str = "r", context_id: str = "c", workflow_id: str = "w") -> Frame:
    return Frame.of(
        Event(
            id=number,
            run_id=run_id,
            context_id=context_id,
            workflow_id=workflow_id,
            event_type="log",
            status=RunStatus.RUNNING,
            timestamp=NOW,
            data=None,
        )
    )


async def ids(follower: Follower) -> list[int]:
    """Of what a follower was handed so far."""
    follower.remind()
    return [each.event.id for each in await follower.read() or ()]


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[None]:
    """Grows with every call of a function."""
    genuine, calls = getattr(owner, name), list[None]()

    def count(*arguments: Any) -> Any:
        calls.append(None)
        return genuine(*arguments)

    monkeypatch.setattr(owner, name, count)
    return calls


def some(*names: str) -> Iterable[frozenset[str] | None]:
    return (None, frozenset(), *(frozenset(each) for each in itertools.combinations(names, 1)), frozenset(names))


SIGHTS = [Sight(contexts, workflows) for contexts in some("a", "b") for workflows in some("v", "w")]
# A run and a context may well have the same name.
SCOPES = [
    Scope(sight, context_id, run_id)
    for sight in SIGHTS
    for context_id in (None, "a", "b")
    for run_id in (None, "a", "r")
]
FRAMES = [
    frame(number, run_id, context_id, workflow_id)
    for number, (run_id, context_id, workflow_id) in enumerate(itertools.product("abr", "abc", "vwx"), 1)
]


@pytest.mark.parametrize("at_once", [1, 4, len(FRAMES)])
@pytest.mark.parametrize("gone", [0, 2])
async def test_everybody_is_shown_what_is_in_their_scope_and_nothing_else(gone: int, at_once: int):
    everybody = Followers()
    readers = [everybody.join(scope, 0) for scope in SCOPES for _ in range(3)]
    for left in readers[:gone] + readers[3:6]:
        everybody.leave(left)
        readers.remove(left)
    assert len(everybody) == len(list(everybody)) == len(readers)
    for start in range(0, len(FRAMES), at_once):
        everybody.show(FRAMES[start : start + at_once])
    for reader in readers:
        assert await ids(reader) == [each.event.id for each in FRAMES if each.event in reader.scope]


async def test_when_everybody_has_left_nothing_is_kept():
    everybody = Followers()
    readers = [everybody.join(scope, 0) for scope in SCOPES for _ in range(2)]
    for reader in readers:
        everybody.leave(reader)
    assert not len(everybody)
    assert not list(everybody)
    assert not everybody._by_scope
    assert not everybody._scopes


async def test_an_event_costs_those_nothing_who_cannot_want_it(monkeypatch: pytest.MonkeyPatch):
    everybody = Followers()
    mine = [everybody.join(Scope(EVERYTHING, "c"), 0) for _ in range(50)]
    for number in range(100):
        everybody.join(Scope(EVERYTHING, f"other {number}"), 0)
        everybody.join(Scope(EVERYTHING, run_id=f"other {number}"), 0)
        everybody.join(Scope(Sight(frozenset({f"other {number}"}))), 0)
    asked = counted(monkeypatch, Scope, "__contains__")
    everybody.show([frame(1)])
    assert [await ids(each) for each in mine] == [[1]] * 50
    assert len(asked) == 1  # once for all who want the same


class Sink:
    """A browser that takes what it is sent at once, or does not."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.reads = True

    def __call__(self, part: bytes) -> bool:
        if self.reads:
            self.sent.append(part)
        return self.reads


def waits(follower: Follower) -> "asyncio.Task[Any]":
    return asyncio.create_task(follower.read())


async def test_who_waits_is_sent_what_happens_at_once_and_in_one_piece():
    everybody, sink = Followers(), Sink()
    follower = everybody.join(Scope(EVERYTHING, "c"), 0)
    follower.sink = sink
    reading = waits(follower)
    await asyncio.sleep(0)
    frames = [frame(1), frame(2), frame(3, context_id="other"), frame(4)]
    everybody.show(frames)
    assert follower.sent == 4
    everybody.show(FRAMES[:1])  # of another context
    everybody.show([frame(5)])
    assert sink.sent == [frames[0].sse + frames[1].sse + frames[3].sse, frame(5).sse]
    assert follower.sent == 5
    assert not reading.done()
    follower.close()
    assert await reading is None


async def test_nothing_overtakes_what_is_still_to_be_read():
    everybody, sink = Followers(), Sink()
    follower = everybody.join(Scope(EVERYTHING), 0)
    follower.sink = sink
    everybody.show([frame(1)])  # nobody waits yet
    assert [each.event.id for each in await follower.read() or ()] == [1]
    reading = waits(follower)
    await asyncio.sleep(0)
    sink.reads = False
    everybody.show([frame(2)])
    sink.reads = True
    everybody.show([frame(3)])
    assert [each.event.id for each in await reading or ()] == [2, 3]
    follower.sent = 3
    reading = waits(follower)
    await asyncio.sleep(0)
    follower.remind()
    everybody.show([frame(4)])
    assert [each.event.id for each in await reading or ()] == [4]
    reading = waits(follower)
    await asyncio.sleep(0)
    follower.close()
    everybody.show([frame(5)])
    assert await reading is None
    gone = waits(everybody.join(Scope(EVERYTHING), 0))
    await asyncio.sleep(0)
    assert sink.sent == []
    gone.cancel()


async def test_who_has_seen_more_is_not_sent_it_again():
    everybody, sink = Followers(), Sink()
    follower = everybody.join(Scope(EVERYTHING), 0)
    follower.sink, follower.sent = sink, 7
    for number in (7, 8):
        reading = waits(follower)
        await asyncio.sleep(0)
        everybody.show([frame(number)])
    assert sink.sent == [frame(8).sse]
    reading.cancel()
    follower.sent = 9
    reading = waits(follower)
    await asyncio.sleep(0)
    everybody.show([frame(9), frame(10)])  # it is for the reader to see which of them is new
    assert [each.event.id for each in await asyncio.wait_for(reading, 20) or ()] == [9, 10]
    assert sink.sent == [frame(8).sse]


async def test_a_reader_that_has_ended_is_sent_nothing():
    everybody, sink = Followers(), Sink()
    follower = everybody.join(Scope(EVERYTHING), 0)
    follower.sink = sink
    reading = waits(follower)
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait({reading})
    everybody.show([frame(1)])
    assert sink.sent == []


async def test_what_is_large_comes_in_several_pieces(monkeypatch: pytest.MonkeyPatch):
    size = len(frame(1).sse)
    monkeypatch.setattr(following, "_PORTION", 2 * size)
    everybody, sink = Followers(), Sink()
    follower = everybody.join(Scope(EVERYTHING), 0)
    follower.sink = sink
    reading = waits(follower)
    await asyncio.sleep(0)
    large = Frame(frame(4).event, b"x" * 3 * size)
    everybody.show([frame(1), frame(2), frame(3), large, frame(5)])
    everybody.show([])
    assert sink.sent == [frame(1).sse + frame(2).sse, frame(3).sse, large.sse, frame(5).sse]
    reading.cancel()


async def test_an_event_is_encoded_once_however_many_follow_it(
    service: Service, run_id: str, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    encoded = counted(monkeypatch, Event, "encode")
    async with (
        service.stream(context_id=context_id) as one,
        service.stream(context_id=context_id) as another,
        service.stream(run_id=run_id) as third,
    ):
        await service.callback(run_id, "log", 1)
        async with asyncio.timeout(20):
            assert [(await anext(stream))["data"] for stream in (one, another, third)] == [1, 1, 1]
        assert len(encoded) == 1


# The order


@pytest.fixture
async def hub(db: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Follows nothing by itself."""
    monkeypatch.setattr(hubs, "_LOOK_EVERY", 3600)
    return Hub(db, cast("Redis", None), Channel(db))


async def test_what_comes_too_early_waits_for_what_comes_before_it(hub: Hub):
    async with hub.following(Scope(EVERYTHING)) as reader:
        first = reader.joined_after + 1
        frames = [frame(first + ahead) for ahead in range(5)]
        hub.take([frames[4], frames[2]])
        assert await ids(reader) == []
        hub.take([frames[0]])
        assert await ids(reader) == [first]
        hub.take(frames[1:2])
        assert await ids(reader) == [first + 1, first + 2]
        hub.take(frames[:4])  # again, for the most part
        assert await ids(reader) == [first + 3, first + 4]
        assert hub._gap is None
        assert not hub._early


async def test_what_is_missing_for_too_long_is_read_from_postgresql(
    hub: Hub, db: AsyncEngine, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    """Also where nothing is missing but a number, of a transaction that was rolled back."""
    monkeypatch.setattr(hubs, "_PATIENCE", 0.001)
    handing_out = asyncio.create_task(hub._hand_out())
    async with hub.following(Scope(EVERYTHING, run_id=run_id)) as reader, asyncio.timeout(20):
        await until(hub._inbox.empty)
        events: list[Event] = []
        for data in range(3):
            async with db.connect() as lost:
                await write(lost, [NewEvent(run_id, "log")])
            async with db.begin() as conn:
                events += (await write(conn, [NewEvent(run_id, "log", data)])).events
        hub.take([Frame.of(events[-1])])
        seen: list[Any] = []
        while len(seen) < 3:
            seen += [each.event.data for each in await reader.read() or ()]
        assert seen == [0, 1, 2]
    handing_out.cancel()


async def test_what_comes_while_postgresql_is_read_is_not_told_twice(
    hub: Hub, db: AsyncEngine, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    genuine = events.read_events

    async def meanwhile(*arguments: Any, **named: Any) -> Page:
        page = await genuine(*arguments, **named)
        hub.take([Frame.of(page.events[0])])
        hub.take([Frame.of(page.events[2])])  # before the second
        return page

    monkeypatch.setattr(hubs, "read_events", meanwhile)
    async with hub.following(Scope(EVERYTHING, run_id=run_id)) as reader:
        async with db.begin() as conn:
            written = await write(conn, [NewEvent(run_id, "log")] * 4)
        await hub._catch_up()
        assert await ids(reader) == [event.id for event in written.events]
        assert not hub._early


async def test_what_waits_for_events_that_never_come_is_looked_up_once(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    """As another database's would be, with which ours has been replaced."""
    monkeypatch.setattr(hubs, "_PATIENCE", 0.001)
    async with hub.following(Scope(EVERYTHING)) as reader:
        hub.take([frame(reader.joined_after + 10**9)])
        await until(lambda: hub._gap is None)
        await hub._catch_up()
        assert hub._gap is None
        assert not hub._early


async def test_no_more_than_so_many_events_wait(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hubs, "_MAX_EARLY", 3)
    async with hub.following(Scope(EVERYTHING)) as reader:
        hub.take([frame(reader.joined_after + ahead) for ahead in range(2, 9)])
        assert len(hub._early) == 3
        assert hub._gap is not None


async def test_what_is_committed_while_the_first_reader_joins_is_told_at_once(
    hub: Hub, db: AsyncEngine, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    genuine = Hub.newest

    async def just_before(asked: Hub) -> int:
        newest = await genuine(asked)
        async with db.begin() as conn:
            written = await write(conn, [NewEvent(run_id, "log")])
        hub.take([Frame.of(event) for event in written.events])
        return newest

    monkeypatch.setattr(Hub, "newest", just_before)
    handing_out = asyncio.create_task(hub._hand_out())
    async with hub.following(Scope(EVERYTHING, run_id=run_id)) as reader, asyncio.timeout(5):
        assert len(await reader.read() or ()) == 1
    handing_out.cancel()


# What this process has committed itself


async def test_the_echo_of_our_own_events_is_not_even_read(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    read = counted(monkeypatch, hubs, "unpack")
    async with hub.following(Scope(EVERYTHING)) as reader:
        first = reader.joined_after + 1
        frames = [frame(first + ahead) for ahead in range(4)]
        hub.take(frames[:2])
        assert hub._continue_with([pack(frames[:2])])
        hub.take(frames[3:])
        assert hub._continue_with([pack(frames[3:])])  # while they wait for the third
        assert not read
        assert hub._continue_with([pack(frames[2:3])])  # another's
        assert len(read) == 1
        assert await ids(reader) == [each.event.id for each in frames]


class Deaf:
    """As much of Redis as the announcer uses, and it never answers."""

    async def publish(self, *_: Any) -> None:
        await asyncio.Event().wait()


async def test_our_own_events_do_not_wait_for_redis(hub: Hub, db: AsyncEngine):
    leaving = Leaving()
    redis = cast("Redis", Deaf())
    async with hub.following(Scope(EVERYTHING)) as reader, asyncio.timeout(20):
        announcer = Announcer(redis, Channel(db), hub.look, leaving, hub.take)
        publishing = asyncio.create_task(announcer._publish_until_stopped())
        for ahead in (1, 2):
            announcer.announce([frame(reader.joined_after + ahead).event])
            assert [each.event.id for each in await reader.read() or ()] == [reader.joined_after + ahead]
        publishing.cancel()


async def test_what_has_piled_up_is_sent_in_one_piece(hub: Hub):
    async with hub.following(Scope(EVERYTHING)) as reader, asyncio.timeout(20):
        sink = Sink()
        reader.sink = sink
        reading = waits(reader)
        await asyncio.sleep(0)
        first = reader.joined_after + 1
        hub._inbox.get_nowait()  # the wish to look that comes with the first reader
        for number in range(first, first + 50):
            hub.hear(pack([frame(number)]))
        handing_out = asyncio.create_task(hub._hand_out())
        await until(lambda: reader.sent == first + 49)
        assert sink.sent == [b"".join(frame(number).sse for number in range(first, first + 50))]
        for task in (handing_out, reading):
            task.cancel()


# Those who are quiet


async def test_everybody_is_reminded_in_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(following, "HEARTBEAT", 0.01)
    everybody = Followers()
    readers = [everybody.join(Scope(EVERYTHING, str(number)), 0) for number in range(100)]
    slices = [len(each) for each in everybody._slices]
    assert max(slices) - min(slices) <= 1
    reminding = asyncio.create_task(everybody.remind())
    async with asyncio.timeout(20):
        for _ in range(2):
            assert await asyncio.gather(*(reader.read() for reader in readers)) == [[]] * 100
    reminding.cancel()


def stream(hub: Hub, db: AsyncEngine) -> EventStream:
    return EventStream(db, hub, Scope(EVERYTHING), None, lambda _: nullcontext())


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_browser_that_takes_nothing_is_sent_away_and_its_place_given_back(hub: Hub, db: AsyncEngine):
    stuck = asyncio.Event()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            stuck.set()
            await asyncio.Event().wait()

    answering = asyncio.create_task(stream(hub, db)({}, never, send))
    async with asyncio.timeout(20):
        await stuck.wait()
        [reader] = hub._followers
        for _ in range(PATIENCE):
            reader.remind()
        await asyncio.sleep(0)
        assert not reader.stuck
        reader.remind()
        await answering
    assert not len(hub._followers)


async def test_a_browser_that_takes_what_it_is_sent_may_be_slow_for_ever(hub: Hub, db: AsyncEngine):
    sent: list[bytes] = []
    taken: list[Callable[[], None]] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            done = asyncio.get_running_loop().create_future()
            taken.append(lambda: done.set_result(None))
            sent.append(message["body"])
            await done

    answering = asyncio.create_task(stream(hub, db)({}, never, send))
    for chunks in range(1, 5):
        await until(lambda chunks=chunks: len(sent) == chunks)  # type: ignore[misc]
        [reader] = hub._followers
        for _ in range(PATIENCE):
            reader.remind()
        taken.pop()()
    await until(lambda: len(sent) == 5)
    taken.pop()()
    await until(lambda: reader.unheard is None, within=5)
    for _ in range(2 * PATIENCE):
        reader.remind()  # while nothing is on its way
    assert not reader.stuck
    assert sent[1:] == [b": still here\n"] * 4
    answering.cancel()
    await asyncio.gather(answering, return_exceptions=True)
    assert not len(hub._followers)


async def test_whoever_hangs_up_leaves_nothing_behind(hub: Hub, db: AsyncEngine):
    messages: list[Sequence[Any]] = []
    gone = asyncio.Event()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        messages.append(list(message))

    answering = asyncio.create_task(stream(hub, db)({}, receive, send))
    async with asyncio.timeout(20):
        await until(lambda: len(messages) == 2)
        gone.set()
        await answering
    assert not len(hub._followers)


async def test_what_goes_wrong_in_a_stream_is_not_kept_quiet(hub: Hub, db: AsyncEngine):
    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as raised:
        await stream(hub, db)({}, never, send)
    assert raised.group_contains(ZeroDivisionError)
    assert not len(hub._followers)


async def test_a_stream_that_lags_leaves_its_connection_in_order(service: Service, context_id: str):
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(service.url).port)
    writer.write(f"GET /api/events?context_id={context_id} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    async with asyncio.timeout(10):
        await reader.readuntil(b"\n\n\r\n")
        [follower] = [each for each in service.hub._followers if each.scope.context_id == context_id]
        follower.lagging = True
        follower.close()
        assert await reader.readuntil(b"0\r\n\r\n") == b"0\r\n\r\n"
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    await writer.wait_closed()
