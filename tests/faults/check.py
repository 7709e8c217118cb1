"""Compares what was acknowledged with what is there: in the database, at the browsers, at HappyRobot, at customers."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import asyncpg

from switchboard.happyrobot.simulator import Call, Run
from tests.faults.actors import Browser, Cast
from tests.faults.ledger import FINAL, Book, Seen
from tests.faults.scene import Customer, Scene

_IS = {"completed": "COMPLETED", "failed": "FAILED", "canceled": "CANCELED"}
"""HappyRobot's words for how a run ended, and ours."""


_Name = tuple[str, str, str]
"""Of a callback of HappyRobot's: run, event type, timestamp to the millisecond, as `isoformat` writes it in UTC."""


@dataclass
class Findings:
    wrong: list[str] = field(default_factory=list)
    """What will not become right any more."""
    open: list[str] = field(default_factory=list)
    """What is not there yet."""


@dataclass
class _Facts:
    """A round as PostgreSQL and HappyRobot have it."""

    events: list[asyncpg.Record]
    runs: dict[str, asyncpg.Record]
    executions: dict[str, asyncpg.Record]
    calls: list[Call]
    stories: dict[str, Run]


async def examine(cast: Cast) -> Findings:
    """What is wrong, and what is still to come, of a round."""
    # First what was acknowledged and seen by now: what is in the database may be more.
    scene, book = cast.scene, cast.book.copy()
    acknowledged = set(scene.acknowledged)
    seen = [list(browser.seen) for browser in cast.browsers]
    found = Findings(wrong=list(book.complaints))
    facts = await _facts(scene, book.contexts)
    _callbacks(book, acknowledged, facts, found)
    _calls(book, facts, found)
    _answers(book, facts, found)
    _timelines(facts, found)
    _ends(facts, found)
    for browser, events in zip(cast.browsers, seen, strict=True):
        await _stream(scene, browser, events, facts, found)
    for customer in scene.customers:
        _webhooks(cast, customer, facts, found)
    return found


async def _facts(scene: Scene, contexts: Sequence[str]) -> _Facts:
    connection = await scene.connect()
    try:
        # All of one moment.
        async with connection.transaction(isolation="repeatable_read"):
            rows = {
                table: await connection.fetch(f"SELECT * FROM {table} WHERE context_id = ANY ($1)", contexts)
                for table in ("run_events", "agent_runs", "executions")
            }
    finally:
        await connection.close()
    simulator = scene.simulator
    return _Facts(
        sorted(rows["run_events"], key=lambda row: row["id"]),
        {row["run_id"]: row for row in rows["agent_runs"]},
        {str(row["id"]): row for row in rows["executions"]},
        [call for call in simulator.calls if call.payload and call.payload.get("context_id") in contexts],
        {run.id: run for run in simulator.runs.values() if run.payload.get("context_id") in contexts},
    )


def _callbacks(book: Book, acknowledged: AbstractSet[_Name], facts: _Facts, found: Findings) -> None:
    """Each that was acknowledged is there, and none is there twice."""
    markers: Counter[str] = Counter()
    told: Counter[_Name] = Counter()
    for row in facts.events:
        data = row["data"]
        if isinstance(data, dict) and isinstance(data.get("marker"), str):
            markers[data["marker"]] += 1
        elif row["occurred_at"] is not None:
            told[row["run_id"], row["event_type"], _to_the_millisecond(row["occurred_at"])] += 1
    _counted("callback", markers, set(book.sent), book.acknowledged, found)
    names = {
        (story.id, event["event_type"], _to_the_millisecond(datetime.fromisoformat(event["timestamp"])))
        for story in facts.stories.values()
        for event in story.events
    }
    _counted("HappyRobot's callback", told, names, acknowledged & names, found)


def _counted(
    what: str, there: Counter[Any], sent: AbstractSet[Any], acknowledged: AbstractSet[Any], found: Findings
) -> None:
    found.wrong += [f"{what} {name} is there {there[name]} times" for name in sent if there[name] > 1]
    found.wrong += [f"{what} {name} was acknowledged, and is not there" for name in acknowledged if not there[name]]


def _to_the_millisecond(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds")


def _calls(book: Book, facts: _Facts, found: Findings) -> None:
    """Nobody is called twice for one execution, nor for one intent."""
    by_execution: Counter[str] = Counter()
    by_intent: Counter[str] = Counter()
    for call in facts.calls:
        assert call.payload is not None
        if call.run_ids:
            by_execution[call.payload["execution_id"]] += 1
            by_intent[call.payload["intent"]] += 1
    for what, calls in (("execution", by_execution), ("intent", by_intent)):
        found.wrong += [f"{what} {name} was called {times} times" for name, times in calls.items() if times > 1]
    for intent in book.intents:
        if intent.accepted and intent.customer is None and by_intent[intent.id] != 1:
            found.wrong.append(f"intent {intent.id} was answered 200, and called {by_intent[intent.id]} times")


def _answers(book: Book, facts: _Facts, found: Findings) -> None:
    """What was accepted is known, under the ids that were named."""
    for intent in book.intents:
        if not intent.accepted:
            continue
        if intent.execution_id not in facts.executions:
            found.wrong.append(f"execution {intent.execution_id} was accepted, and is not there")
        for run_id in intent.run_ids:
            run = facts.runs.get(run_id)
            if run is None or str(run["execution_id"]) != intent.execution_id:
                found.wrong.append(f"run {run_id} of execution {intent.execution_id} was named, and is not there")
        execution = facts.executions.get(intent.execution_id or "")
        if intent.decision == "reject" and execution is not None and execution["status"] != "cancelled":
            found.wrong.append(f"execution {intent.execution_id} was rejected, and is {execution['status']}")


def _timelines(facts: _Facts, found: Findings) -> None:
    """A run that is over stays as it is, in its timeline and in its row."""
    stands: dict[str, str] = {}
    for row in facts.events:
        before = stands.get(row["run_id"])
        if before in FINAL and row["status"] != before:
            found.wrong.append(f"run {row['run_id']} was {before}, then {row['status']} (event {row['id']})")
        stands[row["run_id"]] = row["status"]
        if row["event_type"] == "timeout":
            found.wrong.append(f"run {row['run_id']} was given up")
    for run_id, run in facts.runs.items():
        if stands.get(run_id) != run["status"]:
            found.wrong.append(f"run {run_id} is {run['status']}, and its timeline ends with {stands.get(run_id)}")


def _ends(facts: _Facts, found: Findings) -> None:
    """Runs end as HappyRobot says, and executions with them."""
    for story in facts.stories.values():
        run = facts.runs.get(story.id)
        status = "unknown" if run is None else run["status"]
        if not story.over:
            found.open.append(f"story {story.id} goes on")
        elif status in FINAL and status != _IS[story.status]:
            found.wrong.append(f"run {story.id} is {status}, and HappyRobot says {story.status}")
        elif status not in FINAL and not (run is None and _is_nobody_s(story, facts)):
            found.open.append(f"run {story.id} is {status}, and HappyRobot says {story.status}")
    by_execution: defaultdict[str, list[str]] = defaultdict(list)
    for run in facts.runs.values():
        by_execution[str(run["execution_id"])].append(run["status"])
    for execution_id, execution in facts.executions.items():
        statuses, status = by_execution[execution_id], execution["status"]
        if status in ("pending", "running", "pending_approval") or (status == "submission_unknown" and statuses):
            found.open.append(f"execution {execution_id} is {status}")
        elif statuses and execution["approval_status"] != "rejected" and status != _together(statuses):
            found.open.append(f"execution {execution_id} is {status}, and its runs are {statuses}")


def _is_nobody_s(story: Run, facts: _Facts) -> bool:
    """Whether a run may stay unknown: nobody was told of it but by an answer that did not arrive."""
    execution = facts.executions.get(story.payload["execution_id"])
    return story.faults.silent and execution is not None and execution["status"] == "submission_unknown"


def _together(statuses: Sequence[str]) -> str:
    if "FAILED" in statuses:
        return "failed"
    return "completed" if "COMPLETED" in statuses else "cancelled"


async def _stream(scene: Scene, browser: Browser, seen: Sequence[Seen], facts: _Facts, found: Findings) -> None:
    """A browser has been sent every event of its scope, once and in order, up to the last that it has seen."""
    last = seen[-1].id if seen else browser.after
    context_id, run_id = browser.params.get("context_id"), browser.params.get("run_id")
    rows = facts.events
    if context_id is None and run_id is None:
        rows = await scene.events_between(browser.after, last)
    wanted = [
        Seen(row["id"], row["run_id"], row["context_id"], row["event_type"], row["status"])
        for row in rows
        if row["id"] > browser.after and context_id in (None, row["context_id"]) and run_id in (None, row["run_id"])
    ]
    so_far = [event for event in wanted if event.id <= last]
    if so_far != seen:
        missing = [event.id for event in so_far if event not in set(seen)]
        surplus = [event.id for event in seen if event not in set(so_far)]
        found.wrong.append(f"a browser ({browser.params}, {browser.manner}) misses {missing}, has besides {surplus}")
    elif len(wanted) > len(so_far) and not browser.ended:
        found.open.append(
            f"a browser ({browser.params}, {browser.manner}) waits for {len(wanted) - len(so_far)} events"
        )


_TOLD_AT_THE_END = {
    "completed": "execution.completed",
    "failed": "execution.failed",
    "cancelled": "execution.cancelled",
}


def _webhooks(cast: Cast, customer: Customer, facts: _Facts, found: Findings) -> None:
    """A customer was told of what became of each execution, however often under one id."""
    mine = {execution_id for execution_id, row in facts.executions.items() if row["key_id"] == customer.key_id}
    told = customer.told()
    for (execution_id, event), ids in told.items():
        if execution_id in mine and len(ids) > 1:
            found.wrong.append(f"{customer.name} was told of {event} of execution {execution_id} under {len(ids)} ids")
    for execution_id in mine:
        row = facts.executions[execution_id]
        wanted = _worth_telling(row)
        for event in wanted:
            if (execution_id, event) not in told:
                found.open.append(f"{customer.name} was not told of {event} of execution {execution_id}")
        for over in set(_TOLD_AT_THE_END.values()) - wanted:
            if row["status"] in _TOLD_AT_THE_END and (execution_id, over) in told:
                found.wrong.append(f"{customer.name} was told of {over} of execution {execution_id}: {row['status']}")


def _worth_telling(execution: asyncpg.Record) -> set[str]:
    wanted = set()
    if execution["status"] in _TOLD_AT_THE_END:
        wanted.add(_TOLD_AT_THE_END[execution["status"]])
    if execution["began_at"] is not None:
        wanted.add("execution.started")
    if execution["approval_status"] is not None:
        wanted.add("execution.pending_approval")
    return wanted
