"""Following what is committed: one subscription a process, however many browsers, and none without any."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Self

import structlog
from fastapi import Depends
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import HTTPConnection

from switchboard.events import Scope, read_events
from switchboard.live.channel import Channel
from switchboard.live.followers import Follower, Followers
from switchboard.live.messages import Frame, head_of, unpack
from switchboard.sight import EVERYTHING
from switchboard.tables import run_events
from switchboard.tasks import end

log = structlog.stdlib.get_logger(__name__)

_LOOK_EVERY = 2.0
"""Seconds without news after which the hub looks into PostgreSQL itself. Pub/sub is fire and forget."""

_PAGE = 1000
"""Events read at once when catching up."""

_MAX_UNHEARD = 1000
"""Messages that may wait to be handed out."""

_QUIET = 5.0
"""Seconds without a message after which Redis is asked whether it is there."""

_LINGER = 10.0
"""Seconds for which a subscription outlasts its last reader: pages are loaded again."""

_RECONNECT_AFTER = 0.5
"""Seconds between attempts to subscribe."""

_PATIENCE = 0.03
"""Seconds in which events may still come that are missing between others: those of another process come by a longer
way than our own."""

_MAX_EARLY = 1000
"""Events that may wait for those before them."""


class Hub:
    """Hands committed events to this process's readers, each once, in the order of their ids.

    What this process commits comes at once, what others commit comes through Redis. Ids are handed out in the order of
    commits, so an event with the next id continues where the hub stands. One that is ahead of others waits for them a
    little; what is still missing then (a lost message, a rolled back transaction) sends the hub to PostgreSQL, which is
    right. So does silence.
    """

    def __init__(self, db: AsyncEngine, redis: Redis, channel: Channel) -> None:
        self._db = db
        self._redis = redis
        self._channel = channel
        self._followers = Followers()
        self._cursor: int | None = None
        """Everything up to this id has been handed out; None while nobody reads."""
        self._early: dict[int, Frame] = {}
        """By their ids, what waits for those before them."""
        self._gap: asyncio.TimerHandle | None = None
        """Runs while something waits."""
        self._inbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._closing = False
        self._followed = asyncio.Event()
        self._left_at = 0.0
        """When the last reader left, by the event loop's clock."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Follows until the block ends."""
        works = (self._listen(), self._hand_out(), self._followers.remind())
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield self
        finally:
            self.close()
            self._mind_the_gap(None)
            await end(*tasks)

    def close(self) -> None:
        """Says goodbye to every reader, and at once to those who still come."""
        self._closing = True
        for follower in self._followers:
            follower.close()

    def take(self, frames: Sequence[Frame]) -> None:
        """Takes events that were committed, in whatever order they come, and hands out those whose turn it is."""
        cursor = before = self._cursor
        if cursor is None:
            return
        ready: list[Frame] = []
        for frame in frames:
            if frame.event.id == cursor + 1:
                ready.append(frame)
                cursor += 1
            elif frame.event.id > cursor and len(self._early) < _MAX_EARLY:
                self._early[frame.event.id] = frame
        if self._early:
            ready += self._taken_early(cursor)
        self._show(ready)
        cursor = self._cursor
        if cursor != before or self._gap is None:
            self._mind_the_gap(_PATIENCE if self._early else None)

    def hear(self, message: bytes) -> None:
        """Takes a message of an announcer's, in whatever order they come."""
        # What does not fit while PostgreSQL keeps us waiting leaves a gap, and gaps are noticed.
        if self._inbox.qsize() < _MAX_UNHEARD:
            self._inbox.put_nowait(message)

    def look(self) -> None:
        """Makes the hub look into PostgreSQL now."""
        self.hear(b"")

    @contextlib.asynccontextmanager
    async def following(self, scope: Scope) -> AsyncIterator[Follower]:
        """Registers a reader for the events of a scope that are committed from now on."""
        if self._cursor is None:
            newest = await self.newest()
            # Others may have joined, and the hub moved on, while we asked.
            if self._cursor is None:
                self._cursor = newest
                # What was committed meanwhile has been shown to nobody.
                self.look()
        follower = self._followers.join(scope, self._cursor)
        self._followed.set()
        if self._closing:
            follower.close()
        try:
            yield follower
        finally:
            self._followers.leave(follower)
            if not self._followers:
                self._cursor = None
                self._early.clear()
                self._mind_the_gap(None)
                self._followed.clear()
                self._left_at = asyncio.get_running_loop().time()

    async def newest(self) -> int:
        """The newest event's id; 0 when there is none."""
        async with self._db.connect() as conn:
            return await conn.scalar(select(func.max(run_events.c.id))) or 0

    async def highest(self) -> int:
        """The highest id that an event has had, also one that is not kept any more."""
        async with self._db.connect() as conn:
            return await conn.scalar(text("SELECT last_value FROM run_events_id_seq")) or 0

    async def _listen(self) -> None:
        while True:
            # What nobody reads needs not be sent here: under load that would be a good part of a process's work.
            await self._followed.wait()
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(await self._channel.name())
                    await self._receive(pubsub)
            except Exception as error:  # noqa: BLE001  # nobody waits for this task; it must outlive what goes wrong
                log.debug("no subscription", error=error)
                await asyncio.sleep(_RECONNECT_AFTER)

    async def _receive(self, pubsub: PubSub) -> None:
        """Receives until nobody has followed anything for a while."""
        time = asyncio.get_running_loop().time
        asked = False
        while self._followers or time() - self._left_at < _LINGER:
            message = await pubsub.get_message(timeout=_QUIET)
            if message is None:
                if asked:
                    raise RedisConnectionError("no answer to a ping")
                # Nothing else would notice a connection that was cut without a word.
                await pubsub.ping()
                asked = True
                continue
            asked = False
            if message["type"] == "message":
                self.hear(message["data"])
            elif message["type"] == "subscribe":
                # What was published before this moment is only in PostgreSQL.
                self.look()

    async def _hand_out(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_LOOK_EVERY):
                    message = await self._inbox.get()
            except TimeoutError:
                message = b""
            messages = [message]
            while not self._inbox.empty():
                messages.append(self._inbox.get_nowait())
            if self._cursor is None:
                continue
            try:
                if not self._continue_with(messages):
                    await self._catch_up()
            except (SQLAlchemyError, OSError) as error:
                # Streams stay open meanwhile; the next look, or the next message, fills the gap.
                log.warning("streams wait for PostgreSQL", error=error)
            except Exception:
                # Nobody waits for this task, and every stream of the process waits for it.
                log.exception("streams are late")

    def _continue_with(self, messages: Sequence[bytes]) -> bool:
        """Takes the events of messages, all at once; False if one says nothing that can be read."""
        frames: list[Frame] = []
        try:
            for message in messages:
                last = head_of(message).last
                # Most are this process's own, which has them already.
                if last > (self._cursor or 0) and last not in self._early:
                    frames += unpack(message)[1]
        except ValueError:
            # A wish to look, not ours, or of a newer version during a deployment. PostgreSQL knows.
            return False
        self.take(frames)
        return True

    async def _catch_up(self) -> None:
        # It is all in there, what waits as well as what it waits for.
        self._early.clear()
        self._mind_the_gap(None)
        limit = _PAGE
        while (cursor := self._cursor) is not None:
            async with self._db.connect() as conn:
                page = await read_events(conn, Scope(EVERYTHING), after=cursor, limit=limit)
            # Meanwhile some may have come by themselves, or the last reader have left, and perhaps another come.
            if (cursor := self._cursor) is not None:
                self._show([Frame.of(event) for event in page.events if event.id > cursor])
            if not page.more:
                break
            limit = page.next_limit(_PAGE)
        self.take(())

    def _show(self, frames: Sequence[Frame]) -> None:
        if frames:
            self._followers.show(frames)
            self._cursor = frames[-1].event.id

    def _taken_early(self, cursor: int) -> list[Frame]:
        """What has waited for its turn, which is now; what has come in another way is forgotten."""
        ready: list[Frame] = []
        for number in sorted(self._early):
            if number > cursor + 1:
                break
            frame = self._early.pop(number)
            if number > cursor:
                ready.append(frame)
                cursor = number
        return ready

    def _mind_the_gap(self, seconds: float | None) -> None:
        """Makes the hub look into PostgreSQL when what is missing has not come by then."""
        if self._gap is not None:
            self._gap.cancel()
        self._gap = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._gap_has_lasted)

    def _gap_has_lasted(self) -> None:
        self._gap = None
        self.look()


async def _hub(connection: HTTPConnection) -> Hub:
    hub: Hub = connection.state.hub
    return hub


CurrentHub = Annotated[Hub, Depends(_hub)]
