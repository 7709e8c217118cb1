"""`/api/happyrobot/stats`: how many runs there were, how they ended, and how long they took."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from sqlalchemy import ARRAY, ColumnElement, Float, Row, Select, cast, extract, func, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.access.callers import Reader
from switchboard.bodies import ShortText
from switchboard.database import Db
from switchboard.errors import described
from switchboard.events import IdOfWorkflow, Timestamp
from switchboard.runs.queries import Filter, seen, where
from switchboard.sight import Sight
from switchboard.tables import FINAL, RunStatus, agent_runs

router = APIRouter(prefix="/api/happyrobot", tags=["runs"])

_HOUR = timedelta(hours=1)

_MONTH = 720
"""Hours."""

Counts = dict[RunStatus, int]

_COUNTS: dict[str, JsonValue] = {"PENDING": 0, "RUNNING": 3, "COMPLETED": 118, "FAILED": 4, "CANCELED": 1}
"""An example of them."""


class Durations(BaseModel):
    """How long completed runs took, in seconds; null where there are none."""

    runs: int = Field(description="So many of them.", examples=[118])
    p50: float | None = Field(description="Half of them took no longer.", examples=[94.2])
    p95: float | None = Field(description="All but one in twenty took no longer.", examples=[301.7])


class HourOut(BaseModel):
    """The runs that began in one hour."""

    hour: Timestamp = Field(description="Its beginning.", examples=["2026-01-15T09:00:00.000Z"])
    total: int = Field(examples=[126])
    by_status: Counts = Field(examples=[_COUNTS])
    p50: float | None = Field(description="Of those that have completed, in seconds.", examples=[94.2])
    p95: float | None = Field(examples=[301.7])


class WorkflowCountsOut(BaseModel):
    """The runs of one workflow."""

    workflow_id: IdOfWorkflow
    total: int = Field(examples=[126])
    by_status: Counts = Field(examples=[_COUNTS])


class StatsOut(BaseModel):
    """What became of the runs that began between two moments."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "since": "2026-01-15T09:00:00.000Z",
                    "until": "2026-01-15T09:40:00.000Z",
                    "total": 126,
                    "under_way": 3,
                    "by_status": _COUNTS,
                    "durations": {"runs": 118, "p50": 94.2, "p95": 301.7},
                    "by_hour": [
                        {
                            "hour": "2026-01-15T09:00:00.000Z",
                            "total": 126,
                            "by_status": _COUNTS,
                            "p50": 94.2,
                            "p95": 301.7,
                        }
                    ],
                    "by_workflow": [{"workflow_id": "default", "total": 126, "by_status": _COUNTS}],
                }
            ]
        }
    )

    since: Timestamp
    until: Timestamp
    total: int = Field(examples=[126])
    under_way: int = Field(description="Runs that are not over, whenever they began.", examples=[3])
    by_status: Counts = Field(examples=[_COUNTS])
    durations: Durations
    by_hour: list[HourOut] = Field(description="Every hour of the time, also one without runs; the oldest first.")
    by_workflow: list[WorkflowCountsOut] = Field(description="The busiest first.")


@router.get("/stats", summary="Count runs", responses=described(400, 401, 403, 429))
async def read_stats(
    db: Db,
    caller: Reader,
    hours: Annotated[int, Query(ge=1, le=_MONTH, description="So many, the one that it is now included.")] = 24,
    context_id: Annotated[ShortText | None, Query(description="Only runs of this context.")] = None,
    workflow_id: Annotated[ShortText | None, Query(description="Only runs of this workflow.")] = None,
) -> StatsOut:
    """Runs by status, by hour and by workflow, and how long they took, of those that began in the last hours."""
    wanted = Filter(context_id or None, None, workflow_id or None)
    async with db.connect() as conn:
        # What is counted three times is counted at one moment, by the clock of those who wrote it.
        await conn.execution_options(isolation_level="REPEATABLE READ")
        now: datetime = (await conn.execute(select(func.now()))).scalar_one()
        this_hour = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        return await stats(conn, wanted, caller.sight, this_hour - (hours - 1) * _HOUR, now)


async def stats(conn: AsyncConnection, wanted: Filter, sight: Sight, since: datetime, until: datetime) -> StatsOut:
    """Reads what an index has, so that it is quick among millions of runs; rows only where they are fresh."""

    parameters = seen(wanted, sight)

    async def read(query: Select[Any], *by: ColumnElement[Any]) -> Sequence[Row[Any]]:
        rows: Sequence[Row[Any]] = (await conn.execute(where(query, *parameters).group_by(*by), parameters)).all()
        return rows

    began = agent_runs.c.created_at.between(since, until)
    hour = func.date_bin(_HOUR, agent_runs.c.created_at, literal(since)).label("hour")
    status, workflow = agent_runs.c.status, agent_runs.c.workflow_id
    counted = select(hour, workflow, status, func.count().label("runs")).where(began)
    counts = await read(counted, hour, workflow, status)

    took = cast(extract("epoch", agent_runs.c.completed_at - agent_runs.c.created_at), Float)
    quantiles = func.percentile_cont(literal([0.5, 0.95], ARRAY(Float))).within_group(took).label("quantiles")
    completed = (began, status == RunStatus.COMPLETED, agent_runs.c.completed_at >= agent_runs.c.created_at)
    [in_all] = await read(select(func.count().label("runs"), quantiles).where(*completed))
    hourly = {row.hour: row.quantiles for row in await read(select(hour, quantiles).where(*completed), hour)}
    under_way = select(func.count().label("runs")).select_from(agent_runs)
    [now] = await read(under_way.where(status.in_([each for each in RunStatus if each not in FINAL])))
    p50, p95 = _rounded(in_all.quantiles)
    return StatsOut(
        since=since,
        until=until,
        total=_total(counts),
        under_way=now.runs,
        by_status=_by_status(counts),
        durations=Durations(runs=in_all.runs, p50=p50, p95=p95),
        by_hour=_by_hour(counts, hourly, since, until),
        by_workflow=_by_workflow(counts),
    )


def _rounded(quantiles: Sequence[float] | None) -> tuple[float | None, float | None]:
    """To the millisecond."""
    p50, p95 = quantiles or (None, None)
    return (None if p50 is None else round(p50, 3), None if p95 is None else round(p95, 3))


def _total(counts: Iterable[Row[Any]]) -> int:
    return sum(row.runs for row in counts)


def _by_status(counts: Iterable[Row[Any]]) -> Counts:
    found = dict.fromkeys(RunStatus, 0)
    for row in counts:
        found[RunStatus(row.status)] += row.runs
    return found


def _by_hour(
    counts: Sequence[Row[Any]], hourly: dict[datetime, Sequence[float]], since: datetime, until: datetime
) -> list[HourOut]:
    found: dict[datetime, list[Row[Any]]] = {}
    for row in counts:
        found.setdefault(row.hour, []).append(row)
    hours = []
    for number in range((until - since) // _HOUR + 1):
        hour = since + number * _HOUR
        rows = found.get(hour, [])
        p50, p95 = _rounded(hourly.get(hour))
        hours.append(HourOut(hour=hour, total=_total(rows), by_status=_by_status(rows), p50=p50, p95=p95))
    return hours


def _by_workflow(counts: Sequence[Row[Any]]) -> list[WorkflowCountsOut]:
    found: dict[str, list[Row[Any]]] = {}
    for row in counts:
        found.setdefault(row.workflow_id, []).append(row)
    each = [
        WorkflowCountsOut(workflow_id=name, total=_total(rows), by_status=_by_status(rows))
        for name, rows in found.items()
    ]
    return sorted(each, key=lambda workflow: (-workflow.total, workflow.workflow_id))
