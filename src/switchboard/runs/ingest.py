"""The one writer: everything that happens to a run is written here, in the order in which readers see it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Boolean,
    String,
    Text,
    Uuid,
    any_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    literal_column,
    null,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.events import Event, NewEvent
from switchboard.runs.status import Standing, advance, execution_status, timed_out
from switchboard.tables import ExecutionStatus, RunStatus, agent_runs, executions, held_callbacks, run_events

# Ids are handed out before commit, so a reader that resumes after N could miss an event that committed later under
# a smaller id. Writers therefore take turns, from before the first id until after the commit. What a turn costs is
# one commit, whatever the number of events in it. See docs/decisions/0002-events-in-commit-order.md.
_TURN = text("SELECT pg_advisory_xact_lock(7308060441651407467)")

_HELD_FOR = text("interval '1 day'")


@dataclass(frozen=True, slots=True)
class Recorded:
    """The event is in the timeline."""

    event: Event


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A copy of it was there already; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Held:
    """Its run is not known yet; it is kept until the run is."""


Outcome = Recorded | Duplicate | Held


@dataclass(frozen=True, slots=True)
class NewRuns:
    """Runs that HappyRobot named in its answer to a trigger."""

    execution_id: UUID
    workflow_id: str
    context_id: str
    name: str
    description: str | None
    run_ids: Sequence[str]


@dataclass(slots=True)
class _Run:
    """A run as the database has it, and as this turn leaves it."""

    run_id: str
    context_id: str
    execution_id: UUID | None
    before: Standing
    now: Standing
    known: set[str]
    """Which of `result` and `error` its metadata holds."""
    gained: dict[str, Any] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)

    @property
    def changed(self) -> bool:
        return self.now != self.before or bool(self.gained)

    def take(self, event: NewEvent) -> None:
        """Moves the run as the event says, and keeps a result or an error that comes with its end."""
        was = self.now
        self.now = timed_out(was) if event.guess else advance(was, event.status)
        if was.timed_out and not self.now.timed_out:
            self.known.discard("error")
            self.lost.add("error")
        if event.status is self.now.status and self.now.timed_out is event.guess:
            # Also after the end: a poll may have learnt of it before the callback brought the result.
            self._keep(_KEPT_AS.get(event.status), event.data)

    def _keep(self, name: str | None, data: Any) -> None:
        if name is not None and data is not None and name not in self.known:
            self.known.add(name)
            self.gained[name] = data


_KEPT_AS = {RunStatus.COMPLETED: "result", RunStatus.FAILED: "error"}


async def record(conn: AsyncConnection, news: Sequence[NewEvent]) -> list[Outcome]:
    """Appends events and moves their runs, in the caller's transaction.

    The caller announces the events once it has committed, and locks nothing before this call that another writer
    could wait for: turns come first.
    """
    await conn.execute(_TURN)
    runs = await _load_runs(conn, {event.run_id for event in news})
    seen = await _seen(conn, news)
    kinds: list[type[Recorded | Duplicate | Held]] = []
    fresh: list[NewEvent] = []
    early: list[NewEvent] = []
    for event in news:
        if event.run_id not in runs:
            early.append(event)
            kinds.append(Held)
        elif event.dedupe_key in seen:
            kinds.append(Duplicate)
        else:
            fresh.append(event)
            kinds.append(Recorded)
            if event.dedupe_key is not None:
                seen.add(event.dedupe_key)
    await _hold(conn, early)
    written = iter(await _append(conn, runs, fresh))
    return [Recorded(next(written)) if kind is Recorded else _NOT_WRITTEN[kind] for kind in kinds]


_NOT_WRITTEN: dict[type[Recorded | Duplicate | Held], Outcome] = {Duplicate: Duplicate(), Held: Held()}


async def register(conn: AsyncConnection, new: NewRuns) -> list[Event]:
    """Writes the rows of runs that were just started, and applies what was held for them.

    A run that is known already stays as it is. The caller announces the events once it has committed.
    """
    await conn.execute(_TURN)
    row = {
        "context_id": new.context_id,
        "name": new.name,
        "description": new.description,
        "workflow_id": new.workflow_id,
        "execution_id": new.execution_id,
        "status": RunStatus.RUNNING,
    }
    added = await conn.scalars(
        upsert(agent_runs).on_conflict_do_nothing(index_elements=["run_id"]).returning(agent_runs.c.run_id),
        [row | {"run_id": run_id} for run_id in new.run_ids],
    )
    run_ids = set(added)
    started = {"name": new.name, "workflow_id": new.workflow_id, "execution_id": str(new.execution_id)}
    beginnings = [NewEvent(run_id, "triggered", started) for run_id in new.run_ids if run_id in run_ids]
    runs = await _load_runs(conn, run_ids)
    events = await _append(conn, runs, beginnings + await _claim(conn, run_ids))
    await _move_executions(conn, {new.execution_id})
    return events


# A foreign INSERT may have stored any JSON.
_METADATA = case(
    (func.jsonb_typeof(agent_runs.c.metadata) == "object", agent_runs.c.metadata), else_=literal_column("'{}'::jsonb")
)

_LOAD_RUNS = select(
    agent_runs.c.run_id,
    agent_runs.c.context_id,
    agent_runs.c.execution_id,
    agent_runs.c.status,
    agent_runs.c.timed_out,
    type_coerce(_METADATA, JSONB).has_key("result").label("has_result"),
    type_coerce(_METADATA, JSONB).has_key("error").label("has_error"),
).where(agent_runs.c.run_id == any_(bindparam("run_ids", type_=ARRAY(String))))


async def _load_runs(conn: AsyncConnection, run_ids: Collection[str]) -> dict[str, _Run]:
    runs = {}
    for row in await conn.execute(_LOAD_RUNS, {"run_ids": list(run_ids)}):
        standing = Standing(RunStatus(row.status), row.timed_out)
        known = {name for name, there in (("result", row.has_result), ("error", row.has_error)) if there}
        runs[row.run_id] = _Run(row.run_id, row.context_id, row.execution_id, standing, standing, known)
    return runs


_SEEN = select(run_events.c.dedupe_key).where(run_events.c.dedupe_key == any_(bindparam("keys", type_=ARRAY(Uuid))))


async def _seen(conn: AsyncConnection, news: Sequence[NewEvent]) -> set[UUID]:
    """Which of these events' copies are in the timeline already."""
    keys = [event.dedupe_key for event in news if event.dedupe_key is not None]
    return set(await conn.scalars(_SEEN, {"keys": keys})) if keys else set()


_APPEND = insert(run_events).returning(run_events, sort_by_parameter_order=True)


async def _append(conn: AsyncConnection, runs: dict[str, _Run], news: Sequence[NewEvent]) -> list[Event]:
    if not news:
        return []
    rows = []
    for event in news:
        run = runs[event.run_id]
        run.take(event)
        rows.append(
            {
                "run_id": run.run_id,
                "context_id": run.context_id,
                "event_type": event.event_type,
                "status": run.now.status,
                "data": event.data,
                "occurred_at": event.occurred_at,
                "dedupe_key": event.dedupe_key,
            }
        )
    written = await conn.execute(_APPEND, rows)
    events = [Event.of(row) for row in written]
    await _move_runs(conn, [run for run in runs.values() if run.changed])
    return events


_MOVE_RUN = (
    update(agent_runs)
    .where(agent_runs.c.run_id == bindparam("moved_run"))
    .values(
        status=bindparam("new_status"),
        timed_out=bindparam("guessed"),
        metadata=_METADATA.op("-", return_type=JSONB())(bindparam("lost", type_=ARRAY(Text))).concat(
            bindparam("gained", type_=JSONB)
        ),
        completed_at=case((bindparam("over", type_=Boolean), func.coalesce(agent_runs.c.completed_at, func.now()))),
        updated_at=func.now(),
    )
)


async def _move_runs(conn: AsyncConnection, runs: Sequence[_Run]) -> None:
    if not runs:
        return
    await conn.execute(
        _MOVE_RUN,
        [
            {
                "moved_run": run.run_id,
                "new_status": run.now.status,
                "guessed": run.now.timed_out,
                "lost": list(run.lost),
                "gained": run.gained,
                "over": run.now.over,
            }
            for run in runs
        ],
    )
    await _move_executions(conn, {run.execution_id for run in runs if run.execution_id is not None})


async def _move_executions(conn: AsyncConnection, execution_ids: Collection[UUID]) -> None:
    """Sets executions to what their runs make of them."""
    if not execution_ids:
        return
    rows = await conn.execute(
        select(agent_runs.c.execution_id, func.array_agg(agent_runs.c.status).label("statuses"))
        .where(agent_runs.c.execution_id == any_(literal(list(execution_ids), ARRAY(Uuid))))
        .group_by(agent_runs.c.execution_id)
    )
    for row in rows:
        status = execution_status(map(RunStatus, row.statuses))
        await conn.execute(
            update(executions)
            .where(executions.c.id == row.execution_id, executions.c.status != status)
            .values(
                status=status,
                updated_at=func.now(),
                completed_at=null() if status is ExecutionStatus.RUNNING else func.now(),
            )
        )


async def _hold(conn: AsyncConnection, early: Sequence[NewEvent]) -> None:
    if not early:
        return
    await conn.execute(
        upsert(held_callbacks).on_conflict_do_nothing(index_elements=["dedupe_key"]),
        [
            {
                "run_id": event.run_id,
                "execution_id": event.execution_id,
                "event_type": event.event_type,
                "status": event.status,
                "data": event.data,
                "occurred_at": event.occurred_at,
                "dedupe_key": event.dedupe_key,
            }
            for event in early
        ],
    )
    # Here and not in a job of its own: the table only ever grows at this place.
    await conn.execute(delete(held_callbacks).where(held_callbacks.c.created_at < func.now() - _HELD_FOR))


async def _claim(conn: AsyncConnection, run_ids: Collection[str]) -> list[NewEvent]:
    """Takes the held events of runs that are known now, in the order in which they came."""
    rows = await conn.execute(
        delete(held_callbacks)
        .where(held_callbacks.c.run_id == any_(literal(list(run_ids), ARRAY(String))))
        .returning(held_callbacks)
    )
    return [
        NewEvent(
            row.run_id,
            row.event_type,
            row.data,
            RunStatus(row.status) if row.status else None,
            occurred_at=row.occurred_at or row.created_at,
            execution_id=row.execution_id,
            dedupe_key=row.dedupe_key,
        )
        for row in sorted(rows, key=lambda row: row.id)
    ]
