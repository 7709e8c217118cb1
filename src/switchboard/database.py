"""The connection to PostgreSQL."""

import select
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache, partial
from typing import Annotated, Any, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg
from fastapi import Depends
from pydantic_core import from_json, to_json
from sqlalchemy import ExceptionContext, QueuePool, event
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry
from starlette.requests import HTTPConnection

from switchboard import metrics
from switchboard.errors import PostgresAway, StatementFailed, passes
from switchboard.watch import Watch

# Parameters that libpq or Prisma know but asyncpg would send to the server as settings, which it refuses.
_FOREIGN_PARAMETERS = frozenset(
    {
        "channel_binding",
        "connect_timeout",
        "connection_limit",
        "gssencmode",
        "pgbouncer",
        "pool_timeout",
        "schema",
    }
)


_GOODBYE = 0.1
"""Seconds for PostgreSQL to close a connection; one that is merely dropped does no harm, and there may be many."""


def dsn(url: str) -> str:
    """A `DATABASE_URL` as libpq, Railway, Prisma or SQLAlchemy write it, in asyncpg's words.

    asyncpg itself reads `sslmode` and `host=` (a socket's folder) from the query.
    """
    parts = urlsplit(url)
    query = [pair for pair in parse_qsl(parts.query) if pair[0] not in _FOREIGN_PARAMETERS]
    return urlunsplit(parts._replace(scheme="postgresql", query=urlencode(query)))


def _dump(value: Any) -> str:
    return to_json(value).decode()


class _Connection(asyncpg.Connection):  # type: ignore[misc]  # it has no types
    """Hangs up on a server that does not say goodbye, which would otherwise have as long as for a statement."""

    async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109  # its signature is asyncpg's
        await super().close(timeout=min(timeout or _GOODBYE, _GOODBYE))


async def open_connection(url: str, *, statement_timeout: float | None = 10, watch: Watch | None = None) -> Any:
    """A connection of asyncpg's, which ends when the watch finds nobody at its other end. Raises PostgresAway."""
    dial = partial(
        asyncpg.connect, dsn(url), timeout=5, command_timeout=statement_timeout, connection_class=_Connection
    )
    try:
        return await (dial() if watch is None else watch.open(dial))
    except PostgresAway:
        raise
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        # Not there, starting up, too many connections, a wrong password: to those who ask it is all the same.
        raise PostgresAway(f"PostgreSQL takes no connection ({type(error).__name__})") from error


def connect(
    url: str, *, pool_size: int = 10, statement_timeout: float | None = 10, watch: Watch | None = None
) -> AsyncEngine:
    """An engine; nothing is connected until it is used.

    A statement that PostgreSQL does not answer within `statement_timeout` seconds raises TimeoutError, also when the
    network has swallowed it; with a watch, that is noticed sooner.
    """

    async def creator(**_: Any) -> Any:
        return await open_connection(url, statement_timeout=statement_timeout, watch=watch)

    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=creator,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=5,
        # An error of a statement must not carry what somebody sent into a log.
        hide_parameters=True,
        json_serializer=_dump,
        json_deserializer=from_json,
    )
    _see_whether_they_are_there(engine)
    return engine


_SURELY_THERE = 1.0
"""Seconds for which a connection that was just used is taken to be there still."""


def _see_whether_they_are_there(engine: AsyncEngine) -> None:
    """Replaces connections that were cut while they lay in the pool: PostgreSQL may have been restarted.

    Like SQLAlchemy's own `pool_pre_ping`, but for the question to PostgreSQL each time, which takes as long as a short
    statement.
    """
    pooled = engine.sync_engine

    @event.listens_for(pooled, "checkout")
    def is_there(connection: Any, record: ConnectionPoolEntry, _: object) -> None:
        if connection.driver_connection.is_closed():
            raise InvalidatePoolError
        if _is_doubtful(connection.driver_connection, record.info.get("used_at")):
            try:
                pooled.dialect.do_ping(connection)
            except (pooled.dialect.loaded_dbapi.Error, asyncpg.InternalClientError, OSError) as error:
                raise InvalidatePoolError from error

    @event.listens_for(pooled, "handle_error")
    def is_broken(trouble: ExceptionContext) -> None:
        # On a wire that has swallowed one statement the next one would be lost, too.
        if isinstance(trouble.original_exception, OSError):
            trouble.is_disconnect = True

    @event.listens_for(pooled, "checkin")
    def was_there(_: object, record: ConnectionPoolEntry) -> None:
        record.info["used_at"] = time.monotonic()


@lru_cache(maxsize=8)
def singly(db: AsyncEngine) -> AsyncEngine:
    """Its connections are for statements each of which stands for itself, and share the pool.

    A transaction around them would show them nothing else, and its begin and end take as long as a short statement.
    """
    return db.execution_options(isolation_level="AUTOCOMMIT")


def measure(engine: AsyncEngine) -> None:
    """Notes how many connections of an engine are used whenever one is taken or brought back."""
    pool = cast("QueuePool", engine.sync_engine.pool)
    metrics.note_pool_size(2 * pool.size())

    @event.listens_for(engine.sync_engine, "checkout")
    def _(*_: object) -> None:
        metrics.note_pool(pool.checkedout(), pool.checkedin())

    @event.listens_for(engine.sync_engine, "checkin")
    def _(*_: object) -> None:
        # Just before it is back; what is more than the pool keeps is closed.
        metrics.note_pool(pool.checkedout() - 1, min(pool.checkedin() + 1, pool.size()))


def _is_doubtful(connection: Any, used_at: float | None) -> bool:
    """Whether a connection that is not used may have been cut: nobody has heard of it for long, or it says something.

    PostgreSQL says goodbye, and hardly anything else unasked; the event loop may not have come to it yet.
    """
    if used_at is not None and time.monotonic() - used_at > _SURELY_THERE:
        return True
    wire = connection._transport.get_extra_info("socket")  # noqa: SLF001  # asyncpg has no other way to it
    said = select.poll()
    said.register(wire.fileno(), select.POLLIN)
    return bool(said.poll(0))


_DRIVERS = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError)
"""What asyncpg raises, and the network."""

AWAY = (*_DRIVERS, asyncpg.InternalClientError)
"""The same, and what asyncpg raises where a connection ends in the middle of something."""


def blames_the_statement(error: BaseException) -> bool:
    """Whether an error of asyncpg's is the statement's own fault, and would be the same another time."""
    if isinstance(error, asyncpg.PostgresError):
        return not passes(error.sqlstate) and not isinstance(error, asyncpg.PostgresConnectionError)
    # An argument that asyncpg cannot send.
    return isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError)


class Line:
    """A connection that one user keeps, for one statement or transaction at a time.

    To take one from the pool, to ask whether it is still there and to bring it back cost more than a short statement.
    """

    def __init__(self, db: AsyncEngine) -> None:
        self._db = db
        self._conn: AsyncConnection | None = None
        self._driver: Any = None
        self._used_at = 0.0

    async def fetch(self, query: str, *arguments: object) -> Sequence[Any]:
        """Rows of a statement that is a transaction of its own; it is committed when they are there.

        Raises PostgresAway, and StatementFailed where it is the statement that cannot be done.
        """
        await self._connect()
        try:
            rows: Sequence[Any] = await self._driver.fetch(query, *arguments)
        except asyncpg.InternalClientError as error:
            await self.hang_up(broken=True)
            if not str(error).startswith("cannot switch to state"):
                raise PostgresAway("PostgreSQL is away (InternalClientError)") from error
            # Nothing has left: PostgreSQL had said goodbye, and had not gone yet.
            return await self.fetch(query, *arguments)
        except BaseException as error:
            await self.hang_up(broken=not blames_the_statement(error))
            if blames_the_statement(error):
                raise StatementFailed(type(error).__name__) from error
            if isinstance(error, _DRIVERS):
                raise PostgresAway(f"PostgreSQL does not do it now ({type(error).__name__})") from error
            raise
        self._used_at = time.monotonic()
        return rows

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """A transaction, committed at the end of the block unless it raises."""
        await self._connect()
        assert self._conn is not None  # noqa: S101  # for the type checker
        try:
            async with self._conn.begin():
                yield self._conn
        except BaseException as error:
            await self.hang_up(broken=not isinstance(error, DBAPIError))
            raise
        self._used_at = time.monotonic()

    async def hang_up(self, *, broken: bool = False) -> None:
        """Lets go of the connection, for others to use unless it is broken; the next statement takes another."""
        conn, self._conn, self._driver = self._conn, None, None
        if conn is not None:
            with suppress(Exception):
                if broken:
                    await conn.invalidate()
                await conn.close()

    async def _connect(self) -> None:
        if self._conn is not None and not await self._is_there():
            await self.hang_up(broken=True)
        if self._conn is None:
            self._conn = await self._db.connect()
            self._driver = (await self._conn.get_raw_connection()).driver_connection

    async def _is_there(self) -> bool:
        if self._driver.is_closed():
            return False
        if _is_doubtful(self._driver, self._used_at):
            try:
                await self._driver.fetchrow(";")
            except AWAY:
                return False
        return True


async def _db(connection: HTTPConnection) -> AsyncEngine:
    db: AsyncEngine = connection.state.db
    return db


# The engine and not a session: a session from a dependency would commit after the answer was sent.
Db = Annotated[AsyncEngine, Depends(_db)]
