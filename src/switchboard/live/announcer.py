"""Telling every process what was committed, through Redis, behind the callers' backs."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self

import structlog
from redis.asyncio import Redis

from switchboard import metrics
from switchboard.events import Event
from switchboard.leaving import LAST_WORDS, Leaving
from switchboard.live.channel import Channel
from switchboard.live.messages import Frame, pack
from switchboard.tasks import end

log = structlog.stdlib.get_logger(__name__)

_MAX_WAITING = 10_000
"""Events; more than that are left to the readers' look into PostgreSQL."""

_MAX_MESSAGE = 500
"""Events in one message."""


class Announcer:
    """Publishes committed events in the background, so that a slow or absent Redis delays no answer.

    This process's own hub is handed them at once. What cannot be published is dropped: PostgreSQL has it, and readers
    notice the gap in the ids. `on_failure` is called then, so that this process's own readers need not wait for their
    next look.
    """

    def __init__(
        self,
        redis: Redis,
        channel: Channel,
        on_failure: Callable[[], None],
        leaving: Leaving,
        hand_over: Callable[[Sequence[Frame]], None] = lambda _: None,
    ) -> None:
        self._redis = redis
        self._channel = channel
        self._on_failure = on_failure
        self._leaving = leaving
        self._hand_over = hand_over
        self._waiting: deque[Frame] = deque(maxlen=_MAX_WAITING)
        self._news = asyncio.Event()
        self._healthy = True
        self._stopping = False

    def announce(self, events: Sequence[Event]) -> None:
        """Queues events for publication; returns at once. Call it after the commit, never before."""
        if events:
            # A moment later: first those are answered who brought the news, and whatever goes wrong is not their fault.
            asyncio.get_running_loop().call_soon(self._tell, events)

    def _tell(self, events: Sequence[Event]) -> None:
        frames = [Frame.of(event) for event in events]
        self._waiting.extend(frames)
        self._news.set()
        self._hand_over(frames)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Publishes until the block ends, then sends what is left."""
        task = asyncio.create_task(self._publish_until_stopped())
        try:
            yield self
        finally:
            self._stopping = True
            self._news.set()
            self._leaving.begin()
            await asyncio.wait({task}, timeout=self._leaving.left(LAST_WORDS))
            await end(task)

    async def _publish_until_stopped(self) -> None:
        while not self._stopping:
            await self._news.wait()
            self._news.clear()
            while self._waiting and (self._healthy or not self._stopping):
                await self._publish()

    async def _publish(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MAX_MESSAGE))]
        try:
            await self._redis.publish(await self._channel.name(), pack(batch))
        except Exception as error:  # noqa: BLE001  # nobody waits for this task; it must outlive what goes wrong
            if self._healthy:
                log.warning("events are not announced; streams read from PostgreSQL", error=error)
            self._healthy = False
            metrics.ANNOUNCEMENTS.labels("failed").inc()
            self._on_failure()
        else:
            self._healthy = True
            metrics.ANNOUNCEMENTS.labels("published").inc()
