"""Following what is committed: one subscription a process, however many browsers."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
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
from switchboard.live.messages import Frame, unpack
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

_RECONNECT_AFTER = 0.5
"""Seconds between attempts to subscribe."""

MAX_UNREAD = 1000
MAX_UNREAD_BYTES = 8_000_000
"""Events, and their size, that a reader may lag behind before it is sent away. It resumes from PostgreSQL."""


class Follower:
    """One reader's place in the hub: the events of its scope that it has not read yet."""

    def __init__(self, scope: Scope, joined_after: int) -> None:
        self.scope = scope
        self.joined_after = joined_after
        """Every event up to this id was committed before this follower joined; later ones are handed to it."""
        self.lagging = False
        self.dismissed = False
        self._unread: deque[Frame] = deque()
        self._unread_bytes = 0
        self._wake = asyncio.Event()
        self._closed = False

    def push(self, frame: Frame) -> None:
        if len(self._unread) >= MAX_UNREAD or self._unread_bytes >= MAX_UNREAD_BYTES:
            self.lagging = True
            self.close()
        if not self._closed:
            self._unread.append(frame)
            self._unread_bytes += len(frame.line)
            self._wake.set()

    def close(self) -> None:
        """Ends the reader's waiting: it gets what it has not read, then nothing more."""
        self._closed = True
        self._wake.set()

    def dismiss(self) -> None:
        """Sends the reader away, whose time is over."""
        self.dismissed = True
        self.close()

    async def read(self) -> list[Frame]:
        """All that is unread, as soon as there is something; empty once the follower is closed."""
        await self._wake.wait()
        if not self._closed:
            self._wake.clear()
        frames = list(self._unread)
        self._unread.clear()
        self._unread_bytes = 0
        return frames


class Hub:
    """Hands committed events to this process's readers, each once, in the order of their ids.

    Redis brings the news. Ids are handed out in the order of commits, so a message whose first id is the next one
    continues where the hub stands; anything else (a lost message, one that overtook another, a rolled back
    transaction) sends the hub to PostgreSQL, which is right. So does silence.
    """

    def __init__(self, db: AsyncEngine, redis: Redis, channel: Channel) -> None:
        self._db = db
        self._redis = redis
        self._channel = channel
        self._followers: set[Follower] = set()
        self._cursor: int | None = None
        """Everything up to this id has been handed out; None while nobody reads."""
        self._inbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._closing = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Follows until the block ends."""
        tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._hand_out())]
        try:
            yield self
        finally:
            self.close()
            await end(*tasks)

    def close(self) -> None:
        """Says goodbye to every reader, and at once to those who still come."""
        self._closing = True
        for follower in self._followers:
            follower.close()

    def hear(self, message: bytes) -> None:
        """Takes a message of the announcer's, in whatever order they come."""
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
        follower = Follower(scope, self._cursor)
        self._followers.add(follower)
        if self._closing:
            follower.close()
        try:
            yield follower
        finally:
            self._followers.discard(follower)
            if not self._followers:
                self._cursor = None

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
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(await self._channel.name())
                    await self._receive(pubsub)
            except Exception as error:  # noqa: BLE001  # nobody waits for this task; it must outlive what goes wrong
                log.debug("no subscription", error=error)
            await asyncio.sleep(_RECONNECT_AFTER)

    async def _receive(self, pubsub: PubSub) -> None:
        asked = False
        while True:
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
            if self._cursor is None:
                continue
            try:
                if not (message and self._continue_with(message)):
                    await self._catch_up()
            except (SQLAlchemyError, OSError) as error:
                # Streams stay open meanwhile; the next look, or the next message, fills the gap.
                log.warning("streams wait for PostgreSQL", error=error)
            except Exception:
                # Nobody waits for this task, and every stream of the process waits for it.
                log.exception("streams are late")

    def _continue_with(self, message: bytes) -> bool:
        """Hands out a message's events if they follow on what was handed out; False if something is missing."""
        try:
            (first, last), frames = unpack(message)
        except ValueError:
            # Not ours, or of a newer version during a deployment. PostgreSQL knows.
            return False
        cursor = self._cursor or 0
        if last <= cursor:
            return True
        if first != cursor + 1 or last - first + 1 != len(frames):
            return False
        for frame in frames:
            self._push(frame)
        return True

    async def _catch_up(self) -> None:
        while (cursor := self._cursor) is not None:
            async with self._db.connect() as conn:
                events = await read_events(conn, Scope(EVERYTHING), after=cursor, limit=_PAGE)
            if self._cursor != cursor:
                continue  # the last reader has left meanwhile, and perhaps another come, who begins elsewhere
            for event in events:
                self._push(Frame.of(event))
            if len(events) < _PAGE:
                return

    def _push(self, frame: Frame) -> None:
        for follower in self._followers:
            if frame.event in follower.scope:
                follower.push(frame)
        self._cursor = frame.event.id


async def _hub(connection: HTTPConnection) -> Hub:
    hub: Hub = connection.state.hub
    return hub


CurrentHub = Annotated[Hub, Depends(_hub)]
