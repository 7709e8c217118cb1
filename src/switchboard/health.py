"""What those ask who run the service: does the process live, can it serve, what has it measured?"""

import asyncio
from collections.abc import Iterable
from typing import Annotated, Literal

import structlog
from fastapi import APIRouter, Depends, Response
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field
from redis.asyncio import Redis
from sqlalchemy import column, select, table
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import HTTPConnection

from switchboard import jobs, metrics
from switchboard.access.operators import Scraper
from switchboard.errors import Forbidden, described
from switchboard.happyrobot.client import CurrentHappyRobot, HappyRobot
from switchboard.migrate import earlier_revisions
from switchboard.sight import EVERYTHING

log = structlog.stdlib.get_logger(__name__)

router = APIRouter(tags=["operations"])

_PATIENCE = 1.5
"""Seconds after which PostgreSQL or Redis counts as away for those who ask here, and have two."""


@router.get("/healthz", summary="Is the process alive?")
@router.head("/healthz", include_in_schema=False)
async def healthz() -> dict[str, str]:
    """Answers as long as the process does; says nothing about what it depends on."""
    return {"status": "ok"}


class Checks(BaseModel):
    """What the service depends on."""

    postgresql: Literal["ok", "away"]
    migrations: Literal["ok", "behind", "unknown"]
    redis: Literal["ok", "away"]
    happyrobot: Literal["ok", "away", "unknown"] = Field(
        description="As this process's last request to it went; `unknown` before the first."
    )


class Readiness(BaseModel):
    """Whether requests should be sent here."""

    status: Literal["ready", "degraded", "not ready"]
    checks: Checks


async def _redis(connection: HTTPConnection) -> Redis:
    redis: Redis = connection.state.redis
    return redis


async def _probe(connection: HTTPConnection) -> AsyncEngine:
    probe: AsyncEngine = connection.state.probe
    return probe


CurrentRedis = Annotated[Redis, Depends(_redis)]
Probe = Annotated[AsyncEngine, Depends(_probe)]
"""A connection beside those of requests, which may all be in use."""


@router.get(
    "/readyz",
    summary="Can the process serve?",
    responses={503: {"model": Readiness, "description": "PostgreSQL is away, or its schema is older than needed."}},
)
@router.head("/readyz", include_in_schema=False)
async def readyz(probe: Probe, redis: CurrentRedis, happyrobot: CurrentHappyRobot, response: Response) -> Readiness:
    """503 without PostgreSQL, or on a schema that is older than this version needs; answered within two seconds.

    Without Redis or HappyRobot it is `degraded`, and 200: callbacks are taken and streams keep up from PostgreSQL, and
    as all replicas miss the same one, a load balancer that believed otherwise would be left with none. HappyRobot is
    asked nothing for this: what is said is how the last request went that somebody needed. A schema newer than ours is
    `ok`: during a deployment the first of the new version brings it.
    """
    (postgresql, migrations), its_redis = await asyncio.gather(_look_at_postgresql(probe), _look_at_redis(redis))
    checks = Checks(postgresql=postgresql, migrations=migrations, redis=its_redis, happyrobot=_seen_of(happyrobot))
    if migrations != "ok":
        response.status_code = 503
        return Readiness(status="not ready", checks=checks)
    degraded = "away" in (checks.redis, checks.happyrobot)
    return Readiness(status="degraded" if degraded else "ready", checks=checks)


_alembic = table("alembic_version", column("version_num"))


async def _look_at_postgresql(db: AsyncEngine) -> tuple[Literal["ok", "away"], Literal["ok", "behind", "unknown"]]:
    """Whether it answers, and whether its schema is new enough."""
    try:
        async with asyncio.timeout(_PATIENCE):
            # Reads the migrations when it is asked for the first time.
            earlier = await asyncio.to_thread(earlier_revisions)
            async with db.connect() as conn:
                revision = await conn.scalar(select(_alembic.c.version_num))
    except ProgrammingError:
        return "ok", "behind"  # there is no such table
    except (SQLAlchemyError, OSError) as error:
        log.debug("not ready", error=error)
        return "away", "unknown"
    return "ok", "behind" if revision is None or revision in earlier else "ok"


async def _look_at_redis(redis: Redis) -> Literal["ok", "away"]:
    try:
        async with asyncio.timeout(_PATIENCE):
            await redis.ping()
    except Exception as error:  # noqa: BLE001  # as the breaker: one that is cut fails in many ways
        log.debug("without Redis", error=error)
        return "away"
    return "ok"


def _seen_of(happyrobot: HappyRobot) -> Literal["ok", "away", "unknown"]:
    if happyrobot.away is None:
        return "unknown"
    return "away" if happyrobot.away else "ok"


@router.get(
    "/metrics",
    summary="Read metrics",
    response_class=Response,
    responses={
        200: {
            "description": "In Prometheus's text format.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        **described(400, 401, 403, 429),
    },
)
async def read_metrics(probe: Probe, redis: CurrentRedis, caller: Scraper) -> Response:
    """What this process, or all of `serve --workers`, has measured; the job queue; who is away.

    For API keys of an operator, and for tokens with the right `operate`, that are not limited to some contexts or
    workflows. While PostgreSQL is away nobody can tell whose a key is, and the answer is 503, but for keys that the
    process has let in here within the last ten minutes.
    """
    if caller.sight != EVERYTHING:
        raise Forbidden("Metrics are of the whole installation")
    queue, its_redis = await asyncio.gather(_job_queue(probe), _look_at_redis(redis))
    body = metrics.rendered(*queue, _RedisAway(away=its_redis == "away"))
    return Response(body, media_type=metrics.CONTENT_TYPE)


async def _job_queue(db: AsyncEngine) -> list[Collector]:
    """The queue as everybody sees it, which is why no process keeps it; nothing while PostgreSQL does not answer."""
    try:
        async with asyncio.timeout(_PATIENCE), db.connect() as conn:
            return [_JobQueue(await jobs.piles(conn))]
    except (SQLAlchemyError, OSError) as error:
        log.warning("metrics lack the job queue", error=error)
        return []


class _RedisAway(Collector):
    def __init__(self, *, away: bool) -> None:
        self._away = away

    def collect(self) -> Iterable[Metric]:
        return [GaugeMetricFamily("switchboard_redis_away", "Whether Redis does not answer.", value=self._away)]


class _JobQueue(Collector):
    def __init__(self, piles: Iterable[jobs.Pile]) -> None:
        self._numbers = {(job, state): 0 for job in jobs.EVERY for state in jobs.STATES}
        self._oldest = dict.fromkeys(jobs.EVERY, 0.0)
        for pile in piles:
            self._numbers[pile.job, pile.state] = pile.number
            if pile.state == jobs.DUE:
                self._oldest[pile.job] = pile.oldest

    def collect(self) -> Iterable[Metric]:
        numbers = GaugeMetricFamily(
            "switchboard_jobs",
            "Jobs of all workers: waiting for their time, due, running, failed.",
            labels=["kind", "state"],
        )
        for labels, number in self._numbers.items():
            numbers.add_metric(labels, number)
        oldest = GaugeMetricFamily(
            "switchboard_oldest_due_job_seconds", "For how long the first of the jobs has been due.", labels=["kind"]
        )
        for job, seconds in self._oldest.items():
            oldest.add_metric([job], seconds)
        return [numbers, oldest]
