"""Background jobs: PgQueuer's tables under names of our own, and putting jobs into them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import asyncpg
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.adapters.persistence.qb import QueryBuilderEnvironment, QueryQueueBuilder, QuerySchedulerBuilder
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.domain.settings import DBSettings
from pgqueuer.ports.driver import Driver
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource
from sqlalchemy import ColumnElement, Text, column, delete, exists, func, literal, table, text
from sqlalchemy import cast as type_cast
from sqlalchemy.ext.asyncio import AsyncConnection


class _Names(DBSettings):
    """Without a look into the environment: PgQueuer would take its tables' names from variables such as `CHANNEL`."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  # its signature is pydantic's
        init_settings: PydanticBaseSettingsSource,
        *_: Any,
        **__: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


PREFIX = "switchboard_pgqueuer"
"""How PgQueuer's tables begin: they are its own, and no part of our metadata."""

NAMES = _Names(prefix="switchboard_")


class _Joined:
    """As much of a driver as putting jobs in needs: it runs PgQueuer's statements in a transaction of ours."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def fetch(self, query: str, *args: object) -> list[dict[str, object]]:
        return [dict(row) for row in (await self._conn.exec_driver_sql(query, args)).mappings()]


def queries(driver: Driver) -> Queries:
    """PgQueuer's statements, for our names."""
    return Queries(driver, QueryBuilderEnvironment(NAMES), QueryQueueBuilder(NAMES), QuerySchedulerBuilder(NAMES))


def install_script() -> str:
    """What creates PgQueuer's tables."""
    return QueryBuilderEnvironment(NAMES).build_install_query()


def uninstall_script() -> str:
    return QueryBuilderEnvironment(NAMES).build_uninstall_query()


async def upgrade(connection: asyncpg.Connection) -> None:
    """Brings PgQueuer's tables to what its installed version expects."""
    await queries(AsyncpgDriver(connection)).upgrade()


RECONCILE = "reconcile"
"""Asks HappyRobot about a run for as long as it takes; the subject is the run's id."""

CHECK = "check"
"""Asks about a run now: it may be over, or is, and its record is wanted."""

CANCEL = "cancel"
"""Asks again for a run to be stopped."""


@dataclass(frozen=True, slots=True)
class Job:
    """Something to do later, in any worker."""

    entrypoint: str
    subject: str
    """What it is about, such as a run's id: at most one job of an entrypoint is there for a subject."""
    after: float = 0.0
    """Seconds from now."""


async def enqueue(conn: AsyncConnection, jobs: Sequence[Job]) -> None:
    """Puts jobs into the queue, in the caller's transaction; those that are there already stay as they are."""
    if not jobs:
        return
    await queries(cast("Driver", _Joined(conn))).enqueue(
        [job.entrypoint for job in jobs],
        [job.subject.encode() for job in jobs],
        [0] * len(jobs),
        [timedelta(seconds=job.after) for job in jobs],
        [f"{job.entrypoint}:{job.subject}" for job in jobs],
        on_conflict="skip",
    )


_queue = table(NAMES.queue_table, column("dedupe_key"), column("status"))
_log = table(NAMES.queue_table_log, column("created"), column("aggregated"))
_statistics = table(NAMES.statistics_table, column("created"))

_KEPT_FOR = text("interval '1 day'")


def is_queued(entrypoint: str, subject: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether such a job waits or is under way."""
    live = type_cast(_queue.c.status, Text).in_(("queued", "picked"))
    return exists().where(_queue.c.dedupe_key == literal(f"{entrypoint}:") + subject, live)


async def tidy(conn: AsyncConnection) -> None:
    """Drops what PgQueuer has noted about jobs of the past, which it would keep for ever."""
    await conn.execute(delete(_log).where(_log.c.created < func.now() - _KEPT_FOR, _log.c.aggregated))
    await conn.execute(delete(_statistics).where(_statistics.c.created < func.now() - _KEPT_FOR))
