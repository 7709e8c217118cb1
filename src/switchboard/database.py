"""The connection to PostgreSQL."""

from typing import Annotated, Any, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg
from fastapi import Depends
from pydantic_core import from_json, to_json
from sqlalchemy import QueuePool, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from starlette.requests import HTTPConnection

from switchboard import metrics
from switchboard.errors import PostgresAway

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


def connect(url: str, *, pool_size: int = 10, statement_timeout: float | None = 10) -> AsyncEngine:
    """An engine; nothing is connected until it is used.

    A statement that PostgreSQL does not answer within `statement_timeout` seconds raises TimeoutError, also when the
    network has swallowed it.
    """
    address = dsn(url)

    async def open_connection(**_: Any) -> Any:
        try:
            return await asyncpg.connect(
                address, timeout=5, command_timeout=statement_timeout, connection_class=_Connection
            )
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            # Not there, starting up, too many connections, a wrong password: to those who ask it is all the same.
            raise PostgresAway(f"PostgreSQL takes no connection ({type(error).__name__})") from error

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=open_connection,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=5,
        # PostgreSQL may have been restarted while a connection lay in the pool.
        pool_pre_ping=True,
        # An error of a statement must not carry what somebody sent into a log.
        hide_parameters=True,
        json_serializer=_dump,
        json_deserializer=from_json,
    )


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


async def _db(connection: HTTPConnection) -> AsyncEngine:
    db: AsyncEngine = connection.state.db
    return db


# The engine and not a session: a session from a dependency would commit after the answer was sent.
Db = Annotated[AsyncEngine, Depends(_db)]
