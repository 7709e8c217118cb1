"""The one writer: everything that happens to a run is written here, in the order in which readers see it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Boolean,
    ColumnElement,
    Interval,
    Row,
    String,
    Text,
    Uuid,
    and_,
    any_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.errors import PostgresAway
from switchboard.events import Event, NewEvent
from switchboard.executions import COLUMNS
from switchboard.jobs import CHECK, RECONCILE, Job, enqueue, hasten, is_asleep
from switchboard.runs import approvals, settling
from switchboard.runs.sorting import (
    TRIGGERED,
    Decision,
    GivenUp,
    NewRuns,
    News,
    Noted,
    Outcome,
    Recorded,
    Registered,
    Run,
    Sorting,
    Unconfirmed,
    Written,
)
from switchboard.runs.status import Standing
from switchboard.tables import (
    RUN_METADATA,
    ExecutionStatus,
    RunStatus,
    agent_runs,
    executions,
    held_callbacks,
    run_events,
)

# Ids are handed out before commit, so a reader that resumes after N could miss an event that committed later under
# a smaller id. Writers therefore take turns, from before the first id until after the commit. What a turn costs is
# one commit, whatever the number of events in it. See docs/decisions/0002-events-in-commit-order.md.
#
# Whoever vanishes in the middle of a turn (its network was cut) must not keep it, and a row that a foreign session has
# locked must not either. Set for the transaction alone, which works behind a pooler, too. Nor is a table read through:
# all that is looked for in a turn is found by an index, also by plans that were made while the tables were still small.
TURN = text(
    "SELECT set_config('lock_timeout', '3s', true), set_config('idle_in_transaction_session_timeout', '5s', true), "
    "set_config('enable_seqscan', 'off', true), pg_advisory_xact_lock(7308060441651407467)"
)

_HELD_FOR = text("interval '1 day'")

_SETTLES_IN = 2.0
"""Seconds after a run's end until HappyRobot's record of it is looked at."""

DEFAULT_NAME = "HappyRobot Run"
"""The guide's, for runs that were given none."""


async def write(conn: AsyncConnection, news: Sequence[News], *, reconcile_after: float = 15) -> Written:
    """Appends events, moves runs and writes the rows of new ones, in the caller's transaction.

    The caller announces the events once it has committed, and locks nothing before this call that another writer
    could wait for: turns come first. `reconcile_after` is in seconds.
    """
    await _take_turn(conn)
    verdicts = await approvals.decide(conn, [item for item in news if isinstance(item, Decision)])
    events = [item for item in news if isinstance(item, NewEvent)]
    soon = timedelta(seconds=reconcile_after)
    runs = await _load_runs(conn, {event.run_id for event in (*events, *verdicts.events)}, soon)
    await _load_newest_events(conn, [runs[event.run_id] for event in events if _depends(event, runs)])
    noted, failed = await _note(conn, [item for item in news if isinstance(item, Unconfirmed)])
    failed += await _give_up(conn, [item for item in news if isinstance(item, GivenUp)])
    starts = [
        *(item for item in news if isinstance(item, NewRuns)),
        *noted,
        # After it: an execution that is missing its runs since just now may be named by what came with it.
        *await _adopt(conn, [event for event in events if event.run_id not in runs]),
    ]
    beginnings = [event for start in starts for event in await _insert_runs(conn, start)]
    if starts:
        # Also the known ones: they may have got an execution.
        runs |= await _load_runs(conn, {run_id for start in starts for run_id in start.run_ids}, soon)
    claimed = await _claim(conn, [run.run_id for run in runs.values() if run.has_held])
    sorting = Sorting(runs, await _seen(conn, [*claimed, *events]))
    for event in (*beginnings, *claimed, *verdicts.events):
        sorting.sort(event)
    sorted_events = iter([sorting.sort(event) for event in events])
    await _hold(conn, sorting.early)
    written = await _append(conn, sorting.rows)
    moved = [run for run in runs.values() if run.changed]
    await _move_runs(conn, moved)
    asked = await approvals.record(conn, sorting.requests)
    settled = [run.run_id for run in moved if run.now.settled]
    # Not for one that only we hold for dead: somebody may be taking their time.
    await approvals.withdraw_for(conn, settled)
    touched = {
        *(run.execution_id for run in moved if run.execution_id is not None),
        *(start.execution_id for start in starts),
        *(approval.execution_id for approval in asked),
        *verdicts.execution_ids,
    }
    told = [*await settling.failed(conn, failed), *await settling.settle(conn, touched, asked)]
    spoke = {event.run_id for event in written}
    await hasten(
        conn,
        RECONCILE,
        [run.run_id for run in runs.values() if run.run_id in spoke and run.oversleeps],
        reconcile_after,
    )
    await enqueue(
        conn,
        [
            *(Job(RECONCILE, event.run_id, reconcile_after) for event in beginnings),
            *sorting.jobs,
            *(Job(CHECK, run_id, _SETTLES_IN) for run_id in settled),
            *verdicts.jobs,
            *told,
        ],
    )
    return Written(_outcomes(news, sorted_events, written, starts, iter(verdicts.outcomes)), written)


async def _take_turn(conn: AsyncConnection) -> None:
    try:
        await conn.execute(TURN)
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == _NOT_IN_TIME:
            # For all who came together: one by one, each would wait as long again.
            raise PostgresAway("writers wait for their turn in vain") from error
        raise


_NOT_IN_TIME = "55P03"


def _outcomes(
    news: Sequence[News],
    sorted_events: Iterator[Outcome | int],
    written: Sequence[Event],
    starts: Sequence[NewRuns],
    verdicts: Iterator[Outcome],
) -> list[Outcome]:
    """What came of each of the news, in their order."""
    outcomes: list[Outcome] = []
    for item in news:
        match item:
            case NewRuns():
                outcomes.append(Registered())
            case Unconfirmed() | GivenUp():
                named = (start.run_ids for start in starts if start.execution_id == item.execution_id)
                outcomes.append(Noted(list(dict.fromkeys(run_id for run_ids in named for run_id in run_ids))))
            case Decision():
                outcomes.append(next(verdicts))
            case NewEvent():
                place = next(sorted_events)
                outcomes.append(Recorded(written[place]) if isinstance(place, int) else place)
    return outcomes


def _depends(event: NewEvent, runs: Mapping[str, Run]) -> bool:
    return event.only_after is not None and event.run_id in runs


async def _load_newest_events(conn: AsyncConnection, runs: Sequence[Run]) -> None:
    for run in runs:
        newest = select(func.max(run_events.c.id)).where(run_events.c.run_id == run.run_id)
        run.newest_event = await conn.scalar(newest) or 0


def _not_known_better(end: Unconfirmed) -> list[ColumnElement[bool]]:
    pending = executions.c.status == ExecutionStatus.PENDING
    # Nobody knew, says the sweep; whoever placed the call does, and could not write it down for long.
    unknown = and_(executions.c.status == ExecutionStatus.SUBMISSION_UNKNOWN, executions.c.began_at.is_(None))
    return [pending, unknown] if end.status is ExecutionStatus.FAILED else [pending]


async def _note(conn: AsyncConnection, ends: Sequence[Unconfirmed]) -> tuple[list[NewRuns], list[Row[Any]]]:
    """Writes down how triggers ended that brought no runs.

    Returns the runs whose callbacks are held for them, and the executions that have failed.
    """
    starts, failed = [], []
    for end in ends:
        # Not if its runs are known after all: somebody else may have been quicker.
        noted = await conn.execute(
            update(executions)
            .where(executions.c.id == end.execution_id, or_(*_not_known_better(end)))
            .values(
                status=end.status,
                error=end.error,
                unconfirmed=True,
                updated_at=func.now(),
                completed_at=func.now() if end.status is ExecutionStatus.FAILED else None,
            )
            .returning(*COLUMNS, executions.c.context_id, executions.c.name, executions.c.description)
        )
        if (execution := noted.one_or_none()) is None:
            continue
        held = select(held_callbacks.c.run_id).where(held_callbacks.c.execution_id == str(execution.id)).distinct()
        if run_ids := list(await conn.scalars(held)):
            starts.append(_adopted(execution, run_ids))
        elif end.status is ExecutionStatus.FAILED:
            failed.append(execution)
    return starts, failed


async def _give_up(conn: AsyncConnection, lost: Sequence[GivenUp]) -> list[Row[Any]]:
    """Writes down that nobody waits for these executions any more; a run that names one is still its run."""
    if not lost:
        return []
    given_up = await conn.execute(
        update(executions)
        .where(
            executions.c.id == any_(literal([each.execution_id for each in lost], ARRAY(Uuid))),
            executions.c.status == ExecutionStatus.SUBMISSION_UNKNOWN,
            executions.c.completed_at.is_(None),
        )
        .values(completed_at=func.now(), updated_at=func.now())
        .returning(*COLUMNS)
    )
    return list(given_up)


async def _adopt(conn: AsyncConnection, strays: Sequence[NewEvent]) -> list[NewRuns]:
    """The runs, not known so far, that name an execution of ours which is missing its runs."""
    named: dict[UUID, list[str]] = {}
    for stray in strays:
        if (execution_id := _uuid(stray.execution_id)) is not None:
            named.setdefault(execution_id, []).append(stray.run_id)
    if not named:
        return []
    rows = await conn.execute(
        select(executions).where(executions.c.id == any_(literal(list(named), ARRAY(Uuid))), executions.c.unconfirmed)
    )
    return [_adopted(execution, list(dict.fromkeys(named[execution.id]))) for execution in rows]


def _adopted(execution: Row[Any], run_ids: Sequence[str]) -> NewRuns:
    return NewRuns(
        execution.id,
        execution.workflow_id,
        execution.context_id,
        execution.name or DEFAULT_NAME,
        execution.description,
        run_ids,
        adopted=True,
    )


def _uuid(text: str | None) -> UUID | None:
    try:
        return UUID(text) if text else None
    except ValueError:
        return None


async def _insert_runs(conn: AsyncConnection, start: NewRuns) -> list[NewEvent]:
    """Writes the rows of runs that are not known yet; returns their first events.

    A run that is known stays as it is, but for the execution that it lacked.
    """
    row = {
        "context_id": start.context_id,
        "name": start.name,
        "description": start.description,
        "workflow_id": start.workflow_id,
        "execution_id": start.execution_id,
        "status": RunStatus.RUNNING,
    }
    added = set(
        await conn.scalars(
            upsert(agent_runs).on_conflict_do_nothing(index_elements=["run_id"]).returning(agent_runs.c.run_id),
            [row | {"run_id": run_id} for run_id in start.run_ids],
        )
    )
    if known := [run_id for run_id in start.run_ids if run_id not in added]:
        await conn.execute(
            update(agent_runs)
            .where(agent_runs.c.run_id.in_(known), agent_runs.c.execution_id.is_(None))
            .values(execution_id=start.execution_id)
        )
    return [NewEvent(run_id, TRIGGERED, start.data) for run_id in start.run_ids if run_id in added]


_LOAD_RUNS = select(
    agent_runs.c.run_id,
    agent_runs.c.context_id,
    agent_runs.c.workflow_id,
    agent_runs.c.execution_id,
    agent_runs.c.status,
    agent_runs.c.timed_out,
    RUN_METADATA.has_key("result").label("has_result"),
    RUN_METADATA.has_key("error").label("has_error"),
    # Where somebody else than us wrote the row, nobody has claimed them yet.
    exists().where(held_callbacks.c.run_id == agent_runs.c.run_id).label("has_held"),
    # It had been silent for long, so that its next question is far off.
    is_asleep(RECONCILE, agent_runs.c.run_id, bindparam("soon", type_=Interval)).label("asleep"),
).where(agent_runs.c.run_id == any_(bindparam("run_ids", type_=ARRAY(String))))


async def _load_runs(conn: AsyncConnection, run_ids: Collection[str], soon: timedelta) -> dict[str, Run]:
    runs = {}
    for row in await conn.execute(_LOAD_RUNS, {"run_ids": list(run_ids), "soon": soon}):
        standing = Standing(RunStatus(row.status), row.timed_out)
        runs[row.run_id] = Run(
            row.run_id,
            row.context_id,
            row.workflow_id,
            row.execution_id,
            standing,
            standing,
            known={name for name, there in (("result", row.has_result), ("error", row.has_error)) if there},
            has_held=row.has_held,
            asleep=row.asleep,
        )
    return runs


_copy = (
    func.unnest(bindparam("run_ids", type_=ARRAY(String)), bindparam("keys", type_=ARRAY(Uuid)))
    .table_valued("run_id", "dedupe_key")
    .render_derived("copy")
)
# By their runs, too: what is looked for lies where these runs' other events are, and not anywhere in a large index.
_SEEN = select(run_events.c.dedupe_key).where(
    run_events.c.run_id == _copy.c.run_id, run_events.c.dedupe_key == _copy.c.dedupe_key
)


async def _seen(conn: AsyncConnection, news: Sequence[NewEvent]) -> set[UUID]:
    """Which of these events' copies are in the timeline already."""
    named = [(event.run_id, event.dedupe_key) for event in news if event.dedupe_key is not None]
    if not named:
        return set()
    run_ids, keys = zip(*named, strict=True)
    return set(await conn.scalars(_SEEN, {"run_ids": run_ids, "keys": keys}))


_APPEND = insert(run_events).returning(run_events, sort_by_parameter_order=True)


async def _append(conn: AsyncConnection, rows: Sequence[dict[str, Any]]) -> list[Event]:
    return [Event.of(row) for row in await conn.execute(_APPEND, rows)] if rows else []


_MOVE_RUN = (
    update(agent_runs)
    .where(agent_runs.c.run_id == bindparam("moved_run"))
    .values(
        status=bindparam("new_status"),
        timed_out=bindparam("guessed"),
        metadata=RUN_METADATA.op("-", return_type=JSONB())(bindparam("lost", type_=ARRAY(Text))).concat(
            bindparam("gained", type_=JSONB)
        ),
        # That of our own guess is no end once HappyRobot has said what became of it.
        completed_at=case(
            (
                bindparam("over", type_=Boolean) & ~agent_runs.c.timed_out,
                func.coalesce(agent_runs.c.completed_at, func.now()),
            ),
            (bindparam("over", type_=Boolean), func.now()),
        ),
        updated_at=func.now(),
    )
)


async def _move_runs(conn: AsyncConnection, runs: Sequence[Run]) -> None:
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
                "session_ended": event.session_ended,
                "resume_url": event.resume_url,
            }
            for event in early
        ],
    )
    # Here and not in a job of its own: the table only ever grows at this place.
    await conn.execute(delete(held_callbacks).where(held_callbacks.c.created_at < func.now() - _HELD_FOR))


async def _claim(conn: AsyncConnection, run_ids: Collection[str]) -> list[NewEvent]:
    """Takes the held events of runs that are known now, in the order in which they came."""
    if not run_ids:
        return []
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
            outcome=row.data,
            occurred_at=row.occurred_at or row.created_at,
            execution_id=row.execution_id,
            dedupe_key=row.dedupe_key,
            session_ended=row.session_ended,
            resume_url=row.resume_url,
        )
        for row in sorted(rows, key=lambda row: row.id)
    ]
