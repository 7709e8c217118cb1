"""Leaving in order: who is told when, and how long what is under way still has.

Everything is counted from the moment in which the process is told to leave, and what can go on side by side does: a
platform gives a process ten seconds or more, and then no more. See docs/decisions/0015-leaving-in-ten-seconds.md.
"""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType

import structlog

log = structlog.stdlib.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)

UNDER_WAY = 6.0
"""Seconds for requests that are being answered, and for calls, decisions and webhooks that are on their way."""

GOODBYE = 3.0
"""Seconds until connections are cut whose other end does not read what it is sent."""

LAST_NEWS = 6.5
"""Seconds until what is still expected counts as lost; a worker elsewhere finds out later."""

LAST_WORDS = 7.0
"""Seconds until what was written is announced, or left to PostgreSQL."""

GONE = 7.5
"""Seconds until connections are closed, or left to those at their other end."""

LAST_RESORT = 9.0
"""Seconds until the process ends, whatever still holds it."""


class Leaving:
    """When the process was told to leave, if it was."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._told = asyncio.Event()
        self._since: float | None = None
        self._listeners: set[Callable[[], None]] = set()
        self._last_resort: threading.Timer | None = None

    @property
    def begun(self) -> bool:
        return self._since is not None

    def begin(self) -> None:
        """Tells everybody; the time runs from the first time on."""
        if self._since is None:
            self._since = self._loop.time()
            self._told.set()
            for listener in list(self._listeners):
                listener()

    def begin_for_good(self) -> None:
        """Begins, and ends the process when it is not gone in time, whatever it waits for."""
        if self._last_resort is None:
            # Such as the look-up of a name, which nothing can interrupt.
            self._last_resort = threading.Timer(LAST_RESORT, _end_process)
            self._last_resort.daemon = True
            self._last_resort.start()
        self.begin()

    @contextlib.contextmanager
    def telling(self, listener: Callable[[], None]) -> Iterator[None]:
        """Calls a function when it is time, unless the block has ended by then."""
        self._listeners.add(listener)
        if self.begun:
            listener()
        try:
            yield
        finally:
            self._listeners.discard(listener)

    async def told(self) -> None:
        """Waits until it is time."""
        await self._told.wait()

    def left(self, of: float) -> float:
        """Seconds that are left of so many; all of them while nobody has been told."""
        return of if self._since is None else max(of - (self._loop.time() - self._since), 0.0)

    @contextlib.asynccontextmanager
    async def closing(self) -> AsyncIterator[contextlib.AsyncExitStack]:
        """A stack that is closed at the end, for as long as there is time."""
        stack = contextlib.AsyncExitStack()
        try:
            yield stack
        finally:
            self.begin()
            closed = asyncio.create_task(stack.aclose())
            await asyncio.wait({closed}, timeout=self.left(GONE))
            if closed.done():
                closed.result()
            else:
                log.warning("left with open connections; the other end says nothing")

    @contextlib.contextmanager
    def with_server(self) -> Iterator[None]:
        """Begins with the signal that stops the server, which itself waits for its connections first."""
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        # Where nobody handles it, the process is gone at once; only the main thread may.
        handled = callable(before[signal.SIGTERM]) and threading.current_thread() is threading.main_thread()

        def handle(signum: int, frame: FrameType | None) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self.begin_for_good)
            handler = before[signal.Signals(signum)]
            if callable(handler):
                handler(signum, frame)

        for signum in SIGNALS if handled else ():
            signal.signal(signum, handle)
        try:
            yield
        finally:
            for signum in SIGNALS if handled else ():
                # Not if the server, which was told twice, has put back what was there before it.
                if signal.getsignal(signum) is handle:
                    signal.signal(signum, before[signum])


def _end_process() -> None:
    log.warning("left in the middle of something that could not be interrupted")
    os._exit(0)
