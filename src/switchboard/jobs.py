"""Background jobs: PgQueuer's tables under names of our own, and putting jobs into them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import asyncpg
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.adapters.persistence.qb import QueryBuilderEnvironment, QueryQueueBuilder, QuerySchedulerBuilder
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.domain.settings import DBSettings
from pgqueuer.models import Job as Picked
from pgqueuer.models import TracebackRecord
from pgqueuer.ports.driver import Driver
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Float,
    String,
    any_,
    case,
    column,
    delete,
    exists,
    extract,
    false,
    func,
    literal,
    literal_column,
    null,
    or_,
    select,
    table,
    text,
    update,
)
from sqlalchemy import cast as cast_to
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


class _Queries(Queries):
    """Puts a job off only while it is this worker's: by the time that this is written, somebody else may have it."""

    async def retry_job(self, job: Picked, delay: timedelta, traceback_record: TracebackRecord | None) -> None:
        statement = self.qbq.build_retry_job_query()
        mine = "WHERE id = $1::bigint AND status = 'picked' AND queue_manager_id = $4::uuid"
        assert statement.count(_BY_ID) == 1  # noqa: S101  # or PgQueuer writes it in another way now
        trace = traceback_record.model_dump_json() if traceback_record else None
        await self.driver.execute(statement.replace(_BY_ID, mine), job.id, delay, trace, job.queue_manager_id)


_BY_ID = "WHERE id = $1::bigint"


def queries(driver: Driver) -> Queries:
    """PgQueuer's statements, for our names."""
    return _Queries(driver, QueryBuilderEnvironment(NAMES), QueryQueueBuilder(NAMES), QuerySchedulerBuilder(NAMES))


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

START = "start"
"""Calls HappyRobot for an execution that was accepted; the subject is its id."""

DECIDE = "decide"
"""Tells HappyRobot what was decided; the subject is the id of the approval."""

DELIVER = "deliver"
"""Tells a customer; the subject is the id of the delivery."""

EVERY = (RECONCILE, CHECK, CANCEL, START, DECIDE, DELIVER)

_URGENT = frozenset({CHECK, CANCEL, START, DECIDE})
"""Jobs that go before all others when they come up for the first time."""

_FIRST = 1
_DAWN = 1_577_836_800
"""The beginning of 2020, so that a time in seconds fits into PgQueuer's priorities until 2088."""


def rank(after: float) -> int:
    """The priority of a job that is due in so many seconds: what is due first comes first.

    PgQueuer takes jobs by priority, then by age, and a job that puts itself off keeps its age. Of more jobs than there
    is time for, the oldest would come up again and again, and the newest never.
    """
    return _DAWN - round(time.time() + after)


@dataclass(frozen=True, slots=True)
class Job:
    """Something to do later, in any worker."""

    entrypoint: str
    subject: str
    """What it is about, such as a run's id: at most one job of an entrypoint is there for a subject and occasion."""
    after: float = 0.0
    """Seconds from now."""
    behind: float = 0.0
    """Seconds by which it lets others that are due go first."""
    occasion: str = ""
    """Keeps it apart from a job for the same subject that is about to end."""

    @property
    def key(self) -> str:
        return ":".join(filter(None, (self.entrypoint, self.subject, self.occasion)))


async def enqueue(conn: AsyncConnection, jobs: Sequence[Job]) -> None:
    """Puts jobs into the queue, in the caller's transaction; those that are there already stay as they are."""
    if not jobs:
        return
    await queries(cast("Driver", _Joined(conn))).enqueue(
        [job.entrypoint for job in jobs],
        [job.subject.encode() for job in jobs],
        [_FIRST if job.entrypoint in _URGENT else rank(job.after + job.behind) for job in jobs],
        [timedelta(seconds=job.after) for job in jobs],
        [job.key for job in jobs],
        on_conflict="skip",
    )


_queue = table(
    NAMES.queue_table,
    column("id"),
    column("entrypoint"),
    column("dedupe_key"),
    column("status"),
    column("priority"),
    column("execute_after"),
    column("queue_manager_id"),
)
_schedules = table(NAMES.schedules_table, column("entrypoint"), column("next_run"))
_log = table(NAMES.queue_table_log, column("created"), column("aggregated"))
_statistics = table(NAMES.statistics_table, column("created"))

# Literals, by which PostgreSQL sees that its partial indexes fit.
_waits: ColumnElement[bool] = literal_column("status = 'queued'")
_is_live: ColumnElement[bool] = literal_column("status IN ('queued', 'picked')")
_has_failed: ColumnElement[bool] = literal_column("status = 'failed'")

_KEPT_FOR = text("interval '1 day'")


def is_queued(entrypoint: str, subject: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether such a job waits or is under way."""
    return exists().where(_queue.c.dedupe_key == literal(f"{entrypoint}:") + subject, _is_live)


def is_asleep(entrypoint: str, subject: ColumnElement[str], after: ColumnElement[timedelta]) -> ColumnElement[bool]:
    """Whether such a job waits, and comes up later than after so long."""
    key = literal(f"{entrypoint}:") + subject
    # Not EXISTS, nor more conditions: PostgreSQL might answer it by reading all jobs there are, by a plan from the time
    # when there were few.
    found = select(_waits & (_queue.c.execute_after > func.now() + after)).where(_queue.c.dedupe_key == key, _is_live)
    return func.coalesce(found.scalar_subquery(), false())


async def hasten(conn: AsyncConnection, entrypoint: str, subjects: Sequence[str], after: float) -> None:
    """Lets jobs that wait come up after so many seconds, if they would come later."""
    if not subjects:
        return
    keys = [f"{entrypoint}:{subject}" for subject in subjects]
    sooner = func.now() + timedelta(seconds=after)
    await conn.execute(
        update(_queue)
        .where(
            _queue.c.dedupe_key == any_(literal(keys, ARRAY(String))),
            _is_live,
            # Written so that no other index than that of the keys comes into question.
            case((_waits, _queue.c.execute_after > sooner), else_=false()),
        )
        .values(execute_after=sooner, priority=rank(after))
    )


async def drop(conn: AsyncConnection, entrypoint: str, subject: str) -> None:
    """Takes a job that waits out of the queue."""
    await conn.execute(delete(_queue).where(_queue.c.dedupe_key == f"{entrypoint}:{subject}", _waits))


STATES = WAITING, DUE, RUNNING, FAILED = "waiting", "due", "running", "failed"
"""Of jobs: their time has not come, nobody has taken them yet, somebody does them, PgQueuer could not put them off."""


@dataclass(frozen=True, slots=True)
class Pile:
    """The jobs of one kind that are in one state."""

    job: str
    state: str
    number: int
    oldest: float
    """Seconds since the first of them was due."""


_STATE = case(
    (_has_failed, FAILED),
    (~_waits, RUNNING),
    (_queue.c.execute_after <= func.now(), DUE),
    else_=WAITING,
)


async def piles(conn: AsyncConnection) -> list[Pile]:
    """What is in the queue; of what is not, nothing."""
    age = cast_to(extract("epoch", func.now() - func.min(_queue.c.execute_after)), Float)
    query = (
        select(_queue.c.entrypoint, _STATE.label("state"), func.count(), func.greatest(age, 0))
        .where(or_(_is_live, _has_failed))
        .group_by(_queue.c.entrypoint, text("state"))
    )
    return [Pile(*row) for row in await conn.execute(query)]


async def overdue(conn: AsyncConnection, schedule: str) -> float | None:
    """Seconds for which no worker has kept a schedule, negative before its time; None if none has ever run."""
    late = cast_to(extract("epoch", func.now() - func.max(_schedules.c.next_run)), Float)
    return await conn.scalar(select(late).where(_schedules.c.entrypoint == schedule))


async def rank_behind(conn: AsyncConnection, job_id: int, after: float) -> None:
    """Gives a job that puts itself off its place among those that are due by then."""
    await conn.execute(update(_queue).where(_queue.c.id == job_id).values(priority=rank(after)))


async def revive(conn: AsyncConnection) -> None:
    """Lets jobs come up again that failed because PgQueuer could not write down when they were to come up again."""
    newer = _queue.alias()
    await conn.execute(
        delete(_queue).where(
            _has_failed, exists().where(newer.c.dedupe_key == _queue.c.dedupe_key, newer.c.id > _queue.c.id)
        )
    )
    await conn.execute(
        update(_queue)
        .where(_has_failed)
        .values(status=literal_column("'queued'"), execute_after=func.now(), queue_manager_id=null(), priority=rank(0))
    )


async def tidy(conn: AsyncConnection) -> None:
    """Drops what PgQueuer has noted about jobs of the past, which it would keep for ever."""
    await conn.execute(delete(_log).where(_log.c.created < func.now() - _KEPT_FOR, _log.c.aggregated))
    await conn.execute(delete(_statistics).where(_statistics.c.created < func.now() - _KEPT_FOR))
