"""Reading runs."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple, Self
from urllib.parse import quote

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Integer,
    Row,
    Select,
    String,
    Text,
    and_,
    any_,
    bindparam,
    cast,
    desc,
    func,
    literal_column,
    not_,
    or_,
    select,
    tuple_,
)
from sqlalchemy.dialects.postgresql import JSON
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.errors import BadRequest, NotFound
from switchboard.happyrobot.addresses import platform_url
from switchboard.portions import kept, until_heavy
from switchboard.settings import Settings
from switchboard.sight import Sight
from switchboard.tables import RunStatus, agent_runs, run_events, workflows
from switchboard.workflows import DEFAULT_WORKFLOW

MAX_LOGS = 1000
"""Logs of one run in its metadata: the newest. The rest is in its timeline."""

_LOGS_IN_A_LIST = 20_000
_LOG_BYTES = 16_000_000
"""Logs in one answer, all its runs together, and their size."""

_RESULT_BYTES = 16_000_000
"""What else is stored with the runs of one answer, after which it ends."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the list of runs, newest first: behind the run with this time and id."""

    created_at: datetime
    id: int

    def encode(self) -> str:
        return (
            base64.urlsafe_b64encode(f"{self.created_at.astimezone(UTC).isoformat()} {self.id}".encode())
            .decode()
            .rstrip("=")
        )

    @classmethod
    def decode(cls, text: str) -> Self:
        """Raises BadRequest for anything that `encode` did not write."""
        try:
            moment, number = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode().split(" ")
            cursor = cls(datetime.fromisoformat(moment), int(number))
            # Only UTC is written; other zones reach beyond the calendar at its ends.
            genuine = cursor.created_at.utcoffset() == timedelta(0) and 0 <= cursor.id < 2**63
        except ValueError:
            genuine = False
        if not genuine:
            raise BadRequest("cursor: not one that this list gave")
        return cursor


@dataclass(frozen=True, slots=True)
class Filter:
    """Which runs are wanted; None does not narrow."""

    context_id: str | None = None
    status: RunStatus | None = None
    workflow_id: str | None = None


# Logs are rows; a run's own row does not change when one is added. So its last sign of life is its newest event's.
_LAST_EVENT_AT = (
    select(run_events.c.created_at)
    .where(run_events.c.run_id == agent_runs.c.run_id)
    .order_by(desc(run_events.c.id))
    .limit(1)
    .scalar_subquery()
)

_RUNS: Select[Any] = select(
    agent_runs.c.id,
    agent_runs.c.run_id,
    agent_runs.c.context_id,
    agent_runs.c.name,
    agent_runs.c.description,
    agent_runs.c.status,
    agent_runs.c.metadata.label("stored"),  # a row has an attribute `metadata` of its own
    agent_runs.c.created_at,
    func.greatest(agent_runs.c.updated_at, _LAST_EVENT_AT).label("updated_at"),
    agent_runs.c.workflow_id,
    agent_runs.c.execution_id,
    agent_runs.c.completed_at,
    agent_runs.c.timed_out,
    workflows.c.org_slug,
    workflows.c.platform_id,
).select_from(agent_runs.outerjoin(workflows, workflows.c.id == agent_runs.c.workflow_id))


def platform_link(settings: Settings, run: Row[Any]) -> str | None:
    """The run's page at HappyRobot, if its organisation and workflow are known there by name."""
    if run.workflow_id == DEFAULT_WORKFLOW:
        return platform_url(settings.happyrobot_org_slug, settings.happyrobot_workflow_id, run.run_id)
    return platform_url(run.org_slug or settings.happyrobot_org_slug, run.platform_id, run.run_id)


_CONDITIONS = {
    "run_id": agent_runs.c.run_id == bindparam("run_id"),
    "context_id": agent_runs.c.context_id == bindparam("context_id"),
    "status": agent_runs.c.status == bindparam("status"),
    "workflow_id": agent_runs.c.workflow_id == bindparam("workflow_id"),
    "contexts": agent_runs.c.context_id == any_(bindparam("contexts", type_=ARRAY(String))),
    "workflows": agent_runs.c.workflow_id == any_(bindparam("workflows", type_=ARRAY(String))),
    "before": tuple_(agent_runs.c.created_at, agent_runs.c.id)
    < tuple_(bindparam("before", type_=agent_runs.c.created_at.type), bindparam("before_id", type_=BigInteger)),
}
"""Which runs; each has a parameter of its name."""


def where(query: Select[Any], *names: str) -> Select[Any]:
    """The runs of a query that meet these conditions."""
    return query.where(*(_CONDITIONS[name] for name in names))


_kept = lru_cache(maxsize=100)(where)
"""Of the queries below there are few, and to put one together anew takes longer than to run it."""


def seen(wanted: Filter, sight: Sight) -> dict[str, Any]:
    """The conditions of runs that are wanted, and may be seen, with their parameters."""
    asked = {
        "context_id": wanted.context_id,
        "status": wanted.status,
        "workflow_id": wanted.workflow_id,
        "contexts": None if sight.contexts is None else sorted(sight.contexts),
        "workflows": None if sight.workflows is None else sorted(sight.workflows),
    }
    return {name: value for name, value in asked.items() if value is not None}


async def find_run(conn: AsyncConnection, run_id: str, sight: Sight) -> Row[Any] | None:
    """One run's row, without its logs; None also where it is not to be seen."""
    parameters = {"run_id": run_id} | seen(Filter(), sight)
    run: Row[Any] | None = (await conn.execute(_kept(_RUNS, *parameters), parameters)).one_or_none()
    return run


def found(run: Row[Any] | None) -> Row[Any]:
    """The run, or the answer that there is none."""
    if run is None:
        raise NotFound("Run not found")
    return run


class Page(NamedTuple):
    """Some runs, newest first, without their logs."""

    runs: Sequence[Row[Any]]
    more: bool
    """Whether there are others behind them."""


_LIST = _RUNS.order_by(desc(agent_runs.c.created_at), desc(agent_runs.c.id)).limit(bindparam("one_more", type_=Integer))


_heavy = bindparam("heavy", type_=BigInteger)


@lru_cache(maxsize=100)
def _list(*names: str) -> Select[Any]:
    return until_heavy(where(_LIST, *names), "stored", _heavy, lambda c: (desc(c.created_at), desc(c.id)))


async def list_runs(conn: AsyncConnection, wanted: Filter, sight: Sight, *, limit: int, cursor: Cursor | None) -> Page:
    """Runs that are to be seen, after the cursor: so many at most, and fewer where their results are heavy."""
    parameters = seen(wanted, sight)
    if cursor is not None:
        parameters["before"] = cursor.created_at
    query = _list(*parameters)
    if cursor is not None:
        parameters["before_id"] = cursor.id
    rows = (await conn.execute(query, parameters | {"one_more": limit + 1, "heavy": _RESULT_BYTES})).all()
    return Page(*kept(rows, limit))


_wanted = func.unnest(bindparam("run_ids", type_=ARRAY(String))).table_valued("run_id").render_derived("wanted")
_newest = (
    select(
        run_events.c.id,
        func.coalesce(run_events.c.data, literal_column("'null'::json")).label("data"),
        func.row_number().over(order_by=desc(run_events.c.id)).label("number"),
        func.sum(func.coalesce(func.octet_length(cast(run_events.c.data, Text)), 4))
        .over(order_by=desc(run_events.c.id))
        .label("bytes"),
    )
    .where(run_events.c.run_id == _wanted.c.run_id, run_events.c.event_type == "log")
    .order_by(desc(run_events.c.id))
    .limit(bindparam("one_more", type_=Integer))
    .lateral("newest")
)
# The newest one is shown however large it is.
_fits = and_(
    _newest.c.number <= bindparam("most", type_=Integer),
    or_(_newest.c.number == 1, _newest.c.bytes <= bindparam("budget", type_=BigInteger)),
)
_LOGS = (
    select(
        _wanted.c.run_id,
        func.json_agg(literal_column("newest.data ORDER BY newest.id"), type_=JSON).filter(_fits).label("logs"),
        func.bool_or(not_(_fits)).label("truncated"),
        func.min(_newest.c.id).filter(_fits).label("oldest"),
    )
    .select_from(_wanted.join(_newest, literal_column("true")))
    .group_by(_wanted.c.run_id)
)


async def metadata_of(conn: AsyncConnection, runs: Sequence[Row[Any]]) -> dict[str, dict[str, Any]]:
    """Each run's metadata as the guide describes it: `logs` in order, `result`, `error`, and what else is stored.

    Of a run with very many logs, or in a long list, only the newest are given; `logs_truncated` says so, and
    `earlier_logs` where to read on.
    """
    if not runs:
        return {}
    most = max(1, min(MAX_LOGS, _LOGS_IN_A_LIST // len(runs)))
    rows = await conn.execute(
        _LOGS,
        {
            "run_ids": [run.run_id for run in runs],
            "most": most,
            "one_more": most + 1,
            "budget": _LOG_BYTES // len(runs),
        },
    )
    logs = {row.run_id: row for row in rows}
    return {run.run_id: _metadata(run, logs.get(run.run_id), most) for run in runs}


def _metadata(run: Row[Any], found: Any, most: int) -> dict[str, Any]:
    stored: dict[str, Any] = run.stored if isinstance(run.stored, dict) else {}
    logs: list[Any] = found.logs if found else []
    truncated = bool(found and found.truncated)
    # A foreign INSERT may have brought logs of its own; they are older.
    earlier = stored.get("logs")
    if isinstance(earlier, list) and not truncated:
        logs = [*earlier, *logs]
        truncated = len(logs) > most
        logs = logs[-most:]
    metadata = {**stored, "logs": logs}
    if truncated:
        metadata["logs_truncated"] = True
    if found and found.truncated:
        metadata["earlier_logs"] = f"/api/happyrobot/runs/{quote(run.run_id, safe='')}/events?up_to={found.oldest - 1}"
    return metadata
