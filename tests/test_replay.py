"""Readers see every event once and in order, in whatever order things happen to them and to two processes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database
from switchboard.events import Event, NewEvent, Scope
from switchboard.live import stream
from switchboard.live.channel import Channel
from switchboard.live.hub import Hub
from switchboard.live.messages import Frame, pack
from switchboard.runs.ingest import write
from switchboard.sight import EVERYTHING
from tests.conftest import Servers, insert_run, new_database


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # conditions on state that has no event
            await asyncio.sleep(0.001)


class Reader:
    """A browser: what it saw, and where it resumes."""

    def __init__(self, scope: Scope, resume: int | None, owed_after: int) -> None:
        self.scope = scope
        self.resume = resume
        self.owed_after = owed_after
        self.seen: list[int] = []
        self.task: asyncio.Task[None] | None = None

    async def join(self, db: AsyncEngine, hub: Hub) -> None:
        followers = len(hub._followers)
        self.task = asyncio.create_task(self._read(db, hub))
        # Owed from now on is what the hub hands out from now on.
        await until(lambda: len(hub._followers) > followers)

    async def leave(self) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _read(self, db: AsyncEngine, hub: Hub) -> None:
        async with hub.following(self.scope) as follower:
            async for chunk in stream.follow(db, hub, follower, self.resume):
                for line in chunk.decode().splitlines():
                    if line.startswith("id: "):
                        self.resume = int(line[4:])
                    elif line.startswith("data: "):
                        assert self.resume is not None, "an event has an id"
                        self.seen.append(self.resume)


class World:
    """Two contexts with a run each, two processes' hubs, and no Redis but the test itself."""

    def __init__(self, db: AsyncEngine, hubs: tuple[Hub, Hub], contexts: list[str], runs: list[str]) -> None:
        self.db = db
        self.hubs = hubs
        self.scopes = [Scope(EVERYTHING, contexts[0]), Scope(EVERYTHING, run_id=runs[1]), Scope(EVERYTHING)]
        self.runs = runs
        self.history: list[Event] = []
        self.messages: list[bytes] = []
        self.readers: list[Reader] = []
        self.origin = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def new(cls, db: AsyncEngine) -> AsyncIterator["World"]:
        contexts = [f"c_{uuid4().hex}" for _ in range(2)]
        runs = [await insert_run(db, context_id) for context_id in contexts]
        redis = Redis.from_url("unix:///no/such/redis.sock")
        channel = Channel(db)
        async with Hub(db, redis, channel).running() as one, Hub(db, redis, channel).running() as other:
            world = cls(db, (one, other), contexts, runs)
            world.origin = await one.newest()
            yield world
            await asyncio.gather(*(reader.leave() for reader in world.readers))
        await redis.aclose()

    async def commit(self, which: list[int]) -> None:
        async with self.db.begin() as conn:
            written = await write(conn, [NewEvent(self.runs[place], "log") for place in which])
        self.history += written.events
        self.messages.append(pack([Frame.of(event) for event in written.events]))

    async def roll_back(self, count: int) -> None:
        with contextlib.suppress(ZeroDivisionError):
            async with self.db.begin() as conn:
                await write(conn, [NewEvent(self.runs[0], "log")] * count)
                raise ZeroDivisionError

    async def hear(self, at: int, back: int, patient: bool) -> None:
        if self.messages:
            self.hubs[at].hear(self.messages[-1 - min(back, len(self.messages) - 1)])
        if patient:
            await self._rest(at)

    async def look(self, at: int, patient: bool) -> None:
        self.hubs[at].look()
        if patient:
            await self._rest(at)

    async def _rest(self, at: int) -> None:
        """Lets a hub work off what it heard, and its readers read it."""
        await until(self.hubs[at]._inbox.empty)
        async with self.db.connect() as conn:
            await conn.scalar(select(1))  # as long as it takes the hub itself
        await asyncio.sleep(0.001)

    async def join(self, at: int, scope: int, from_the_start: bool) -> None:
        newest = self.history[-1].id if self.history else self.origin
        resume, owed_after = (self.origin, self.origin) if from_the_start else (None, newest)
        reader = Reader(self.scopes[scope], resume, owed_after)
        await reader.join(self.db, self.hubs[at])
        self.readers.append(reader)

    async def cut(self, which: int, to: int) -> None:
        if not self.readers:
            return
        reader = self.readers[which % len(self.readers)]
        await reader.leave()
        if reader.resume is None:
            # It was not even told where it stands: a newcomer.
            reader.owed_after = self.history[-1].id if self.history else self.origin
        await reader.join(self.db, self.hubs[to])

    async def check(self) -> None:
        await self.commit([0, 1])
        for hub in self.hubs:
            hub.look()
        for reader in self.readers:
            ours = [event.id for event in self.history if event in reader.scope]
            await until(lambda reader=reader, ours=ours: reader.seen[-1:] == ours[-1:])  # type: ignore[misc]
            # A newcomer may be given more than it is owed, where the hub was behind; but without a hole.
            assert reader.seen == ours[-len(reader.seen) :]
            assert len(reader.seen) >= sum(event_id > reader.owed_after for event_id in ours)


places = st.integers(0, 1)
step = st.one_of(
    st.tuples(st.just("commit"), st.lists(places, min_size=1, max_size=3)),
    st.tuples(st.just("commit"), st.lists(places, min_size=1, max_size=3)),
    st.tuples(st.just("roll_back"), st.integers(1, 3)),
    st.tuples(st.just("hear"), places, st.integers(0, 3), st.booleans()),
    st.tuples(st.just("hear"), places, st.just(0), st.just(True)),
    st.tuples(st.just("look"), places, st.booleans()),
    st.tuples(st.just("join"), places, st.integers(0, 2), st.booleans()),
    st.tuples(st.just("cut"), st.integers(0, 5), places),
    st.tuples(st.just("cut"), st.integers(0, 5), places),
)


@pytest.fixture(scope="module")
async def own_db(servers: Servers, template: str) -> AsyncIterator[AsyncEngine]:
    async with new_database(servers, template) as url:
        engine = database.connect(url)
        yield engine
        await engine.dispose()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(step, min_size=15, max_size=40))
async def test_every_reader_sees_every_event_once_and_in_order(own_db: AsyncEngine, steps: list[tuple[Any, ...]]):
    async with World.new(own_db) as world:
        for at in (0, 1):
            await world.commit([0, 1])
            await world.join(at, 2, from_the_start=True)
        for what, *arguments in steps:
            await getattr(world, what)(*arguments)
        await world.check()
