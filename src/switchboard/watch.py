"""Whether PostgreSQL is there: it is asked all the time, so that nobody waits for long for one that is not.

See docs/decisions/0022-postgresql-is-watched.md.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self, TypeVar
from weakref import WeakSet

import asyncpg
import structlog

from switchboard import metrics
from switchboard.errors import PostgresAway
from switchboard.tasks import end

log = structlog.stdlib.get_logger(__name__)

LOOK_EVERY = 0.4
"""Seconds from one question to the next."""

PATIENCE = 0.9
"""Seconds for an answer. With those above it leaves time to answer a request within two."""

CONNECTS_WITHIN = 3.0
"""Seconds for a new connection, which takes several answers, and on a long way more than the patience."""

_NO_CONNECTION = frozenset({"08000", "08001", "08003", "08006"})
"""What asyncpg says where there is no connection. Anything else was said by PostgreSQL, or by a pooler before it."""

_STEPS = 6
"""Parts of that time, each of which counts once, however late this process comes to its end."""

_GOODBYE = 0.1
"""Seconds for PostgreSQL to close our connection."""

Connection = TypeVar("Connection")


class Watch:
    """Asks PostgreSQL for a sign of life, on a connection of its own.

    Without one all connections of the process are ended, with what waits on them, and no others are tried until there
    is one again. A statement that takes long on a PostgreSQL that answers is left alone.
    """

    def __init__(self, address: str) -> None:
        """`address` is in asyncpg's words."""
        self._address = address
        self._own: Any = None
        self._others: WeakSet[Any] = WeakSet()
        self._under_way: set[asyncio.Timeout] = set()
        self.away = False

    async def open(self, connect: Callable[[], Awaitable[Connection]]) -> Connection:
        """A connection that lasts no longer than PostgreSQL does.

        Raises PostgresAway at once while it is known to be away, and whatever `connect` raises.
        """
        if self.away:
            raise PostgresAway("PostgreSQL is away")
        async with asyncio.timeout(None) as limit:
            self._under_way.add(limit)
            try:
                connection = await connect()
            finally:
                self._under_way.discard(limit)
        self._others.add(connection)
        return connection

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Asks until the block ends."""
        asking = asyncio.create_task(self._ask_again_and_again())
        try:
            yield self
        finally:
            await end(asking)
            if self._own is not None:
                with contextlib.suppress(Exception):
                    await self._own.close(timeout=_GOODBYE)

    async def _ask_again_and_again(self) -> None:
        while True:
            began = time.monotonic()
            try:
                await self._ask_patiently()
            except Exception:
                # Nobody waits for this task, and everybody for what it finds out.
                log.exception("the watch stumbles")
            await asyncio.sleep(max(began + LOOK_EVERY - time.monotonic(), 0))

    async def _ask_patiently(self) -> None:
        asking = asyncio.create_task(self._ask())
        try:
            if not await _done_within(asking, PATIENCE):
                self._has_gone(TimeoutError("no answer"))
                # A way that is long enough for that may have been taken for none. One attempt goes on.
                connects = self._own is None
                if not (connects and await _done_within(asking, CONNECTS_WITHIN - PATIENCE)):
                    return
            self._judge(asking.exception())
        finally:
            if not asking.done():
                # In this order: asyncpg would have a statement that is given up canceled, over another connection.
                self._hang_up()
            # Also where it is done: if this is canceled in that moment, nobody else asks what has come of it.
            await end(asking)

    def _judge(self, error: BaseException | None) -> None:
        if error is None:
            self._is_there(fine=True)
        elif isinstance(error, OSError) or getattr(error, "sqlstate", None) in _NO_CONNECTION:
            self._has_gone(error)
        else:
            # It says something, such as that it is starting up or has too many connections. So it tells others.
            log.debug("PostgreSQL takes no connection of the watch", error=error)
            self._is_there(fine=False)

    async def _ask(self) -> None:
        if self._own is not None and not self._own.is_closed():
            try:
                # Without parameters it is no prepared statement, which some poolers know nothing of.
                await self._own.execute("SELECT 1")
            except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
                # It was cut, which says nothing about others.
                log.debug("the watch has lost its connection", error=error)
                self._hang_up()
            else:
                return
        self._own = await asyncpg.connect(self._address, timeout=None, statement_cache_size=0)

    def _hang_up(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            own.terminate()

    def _has_gone(self, error: BaseException) -> None:
        if not self.away:
            log.warning("PostgreSQL is away", error=error)
        self.away = True
        metrics.POSTGRESQL_AWAY.set(1)
        now = asyncio.get_running_loop().time()
        while self._under_way:
            self._under_way.pop().reschedule(now)
        for connection in list(self._others):
            # As the network does it. asyncpg's own way takes the ground from under a statement that goes on just now.
            connection._transport.abort()  # noqa: SLF001
        self._others.clear()

    def _is_there(self, *, fine: bool) -> None:
        if self.away:
            log.info("PostgreSQL answers again", takes_connections=fine)
        self.away = False
        metrics.POSTGRESQL_AWAY.set(not fine)


async def _done_within(asking: "asyncio.Task[None]", seconds: float) -> bool:
    """Waits for an answer.

    A process that was busy, or was stopped, finds its time used up before it has looked whether there is an answer.
    So it is measured in steps, and one that took longer counts as one.
    """
    for _ in range(_STEPS):
        done, _ = await asyncio.wait({asking}, timeout=seconds / _STEPS)
        if done:
            return True
    return False
