"""Compares what was acknowledged with what is there: in the database, at the browsers, at HappyRobot, at customers."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import asyncpg
from pydantic_core import to_json

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
    _decisions(scene, book, facts, found)
    _timelines(book, facts, found)
    _ends(facts, found)
    _results(acknowledged, facts, found)
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
    """Each that was acknowledged is there as it was sent, and none is there twice."""
    markers: Counter[str] = Counter()
    told: dict[_Name, list[Any]] = defaultdict(list)
    for row in facts.events:
        marker = row["data"].get("marker") if isinstance(row["data"], dict) else None
        if isinstance(marker, str):
            markers[marker] += 1
            if book.sent.get(marker) != (row["run_id"], row["event_type"]):
                found.wrong.append(f"callback {marker} is in the timeline of {row['run_id']}, as {row['event_type']}")
        elif row["occurred_at"] is not None:
            told[row["run_id"], row["event_type"], _to_the_millisecond(row["occurred_at"])].append(row["data"])
    _counted("callback", markers, set(book.sent), book.acknowledged, found)
    sent = {
        (story.id, event["event_type"], _to_the_millisecond(datetime.fromisoformat(event["timestamp"]))): event["data"]
        for story in facts.stories.values()
        for event in story.events
    }
    there = Counter({name: len(said) for name, said in told.items()})
    _counted("HappyRobot's callback", there, sent.keys(), acknowledged & sent.keys(), found)
    found.wrong += [
        f"HappyRobot's callback {name} is there as {told[name]}"
        for name in sent.keys() & told.keys()
        if any(said != sent[name] for said in told[name])
    ]


def _counted(
    what: str, there: Counter[Any], sent: AbstractSet[Any], acknowledged: AbstractSet[Any], found: Findings
) -> None:
    found.wrong += [f"{what} {name} is there {there[name]} times" for name in sent if there[name] > 1]
    found.wrong += [f"{what} {name} was acknowledged, and is not there" for name in acknowledged if not there[name]]


def _to_the_millisecond(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds")


_MAY_BE_REPEATED = (429, 502, 503, 504)


def _calls(book: Book, facts: _Facts, found: Findings) -> None:
    """Nobody is called twice for one execution, nor for one intent, and nothing is sent again that may have arrived."""
    sent: Counter[str] = Counter()
    called: Counter[str] = Counter()
    for call in facts.calls:
        assert call.payload is not None
        if call.status not in _MAY_BE_REPEATED:
            sent[f"execution {call.payload['execution_id']}"] += 1
        if call.run_ids:
            called[call.payload["intent"]] += 1
    found.wrong += [f"{what} was sent to HappyRobot {times} times" for what, times in sent.items() if times > 1]
    found.wrong += [f"intent {name} was called {times} times" for name, times in called.items() if times > 1]
    for intent in book.intents:
        if intent.accepted and intent.customer is None and called[intent.id] != 1:
            found.wrong.append(f"intent {intent.id} was answered 200, and called {called[intent.id]} times")
        if intent.failed and called[intent.id]:
            found.wrong.append(f"intent {intent.id} was answered that nobody was called, and somebody was")


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


_DECIDED = {"approve": "approved", "reject": "rejected"}


def _decisions(scene: Scene, book: Book, facts: _Facts, found: Findings) -> None:
    """HappyRobot is told what was decided, and nothing else; of a run that was stopped before, nothing."""
    of_it: defaultdict[str | None, list[Run]] = defaultdict(list)
    for story in facts.stories.values():
        of_it[story.payload["execution_id"]].append(story)
    wanted = {intent.execution_id: _DECIDED[intent.decision] for intent in book.intents if intent.decision}
    told: defaultdict[str, set[str]] = defaultdict(set)
    for decision in scene.simulator.decisions:
        if decision.run_id in facts.stories and decision.body is not None:
            told[facts.stories[decision.run_id].payload["execution_id"]].add(decision.body["decision"])
    for execution_id, verdict in wanted.items():
        if (said := told.get(execution_id or "", set())) - {verdict}:
            found.wrong.append(f"execution {execution_id} is {verdict}, and HappyRobot was told {said}")
        elif not said and any(not story.over for story in of_it[execution_id]):
            found.open.append(f"HappyRobot was not told that execution {execution_id} is {verdict}")


def _timelines(book: Book, facts: _Facts, found: Findings) -> None:
    """A run that is over stays as it is, in its timeline, in its row, and for everybody who was told."""
    stands: dict[str, str] = {}
    for row in facts.events:
        before = stands.get(row["run_id"])
        if before in FINAL and row["status"] != before:
            found.wrong.append(f"run {row['run_id']} was {before}, then {row['status']} (event {row['id']})")
        stands[row["run_id"]] = row["status"]
    for run_id, run in facts.runs.items():
        if stands.get(run_id) != run["status"]:
            found.wrong.append(f"run {run_id} is {run['status']}, and its timeline ends with {stands.get(run_id)}")
        if run["timed_out"]:
            found.wrong.append(f"run {run_id} was given up")
        if book.finals.get(run_id, run["status"]) != run["status"]:
            found.wrong.append(f"run {run_id} is {run['status']}, and somebody was told {book.finals[run_id]}")


def _results(acknowledged: AbstractSet[_Name], facts: _Facts, found: Findings) -> None:
    """What a call came to, if HappyRobot has told it, is what its run shows: the first that it has told."""
    first: dict[str, Any] = {}
    for row in facts.events:
        if row["event_type"] == "completed":
            first.setdefault(row["run_id"], row["data"])
    for story in facts.stories.values():
        last = story.events[-1] if story.events else None
        if last is None or story.status != "completed" or story.id not in facts.runs:
            continue
        name = (story.id, "completed", _to_the_millisecond(datetime.fromisoformat(last["timestamp"])))
        metadata = facts.runs[story.id]["metadata"]
        if name not in acknowledged:
            continue
        # Unless somebody was faster with a lie: that it was over was known by then, and how was not.
        came_to = first[story.id] if "marker" in first.get(story.id, {}) else story.ending
        if metadata.get("result") != came_to:
            found.wrong.append(f"run {story.id} came to {came_to}, and shows {metadata.get('result')}")


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
    if browser.after is None:
        found.open.append(f"a browser ({browser.params}) has not begun")
        return
    last = seen[-1].id if seen else browser.after
    context_id, run_id = browser.params.get("context_id"), browser.params.get("run_id")
    rows = facts.events
    if context_id is None and run_id is None:
        newest = max((row["id"] for row in facts.events), default=0)
        rows = await scene.events_between(browser.after, max(last, newest))
    wanted = [
        Seen(
            row["id"],
            row["run_id"],
            row["context_id"],
            row["event_type"],
            row["status"],
            to_json(row["data"]).decode(),
        )
        for row in rows
        if row["id"] > browser.after and context_id in (None, row["context_id"]) and run_id in (None, row["run_id"])
    ]
    so_far = [event for event in wanted if event.id <= last]
    who = f"a browser ({browser.params}, {browser.manner})"
    if so_far != seen:
        missing = [event.id for event in so_far if event not in set(seen)]
        surplus = [event.id for event in seen if event not in set(so_far)]
        found.wrong.append(f"{who} misses {missing}, has besides {surplus}")
    elif len(wanted) > len(so_far) and not browser.ended:
        found.open.append(f"{who} waits for {len(wanted) - len(so_far)} events")
    elif run_id is not None and not browser.ended:
        found.open.append(f"{who} was not told that its run is over")


_TOLD_AT_THE_END = {
    "completed": "execution.completed",
    "failed": "execution.failed",
    "cancelled": "execution.cancelled",
}


_ATTEMPTS = 4
"""At a webhook that is not taken."""


def _webhooks(cast: Cast, customer: Customer, facts: _Facts, found: Findings) -> None:
    """A customer was told of what became of each execution, however often under one id, and in the same words."""
    mine = {execution_id for execution_id, row in facts.executions.items() if row["key_id"] == customer.key_id}
    told = customer.told()
    # Of these one run may have ended before anybody had heard of another.
    stories = Counter(story.payload["execution_id"] for story in facts.stories.values())
    of_several = {execution_id for execution_id, runs in stories.items() if runs > 1}
    for (execution_id, event), notices in told.items():
        again = execution_id in of_several and event in _TOLD_AT_THE_END.values()
        if execution_id in mine and len(notices) > 1 and not again:
            found.wrong.append(
                f"{customer.name} was told of {event} of execution {execution_id} under {len(notices)} ids"
            )
    for execution_id in mine:
        row = facts.executions[execution_id]
        wanted = _worth_telling(row)
        for event in wanted:
            notices = told.get((execution_id, event), {})
            if not any(notice.taken or notice.attempts >= _ATTEMPTS for notice in notices.values()):
                found.open.append(f"{customer.name} was not told of {event} of execution {execution_id}")
            if any(notice.bodies != 1 for notice in notices.values()):
                found.wrong.append(f"{customer.name} was told of {event} of execution {execution_id} in several ways")
        for over in set(_TOLD_AT_THE_END.values()) - wanted:
            if row["status"] in _TOLD_AT_THE_END and (execution_id, over) in told and execution_id not in of_several:
                found.wrong.append(f"{customer.name} was told of {over} of execution {execution_id}: {row['status']}")
    found.wrong += customer.forgeries


def _worth_telling(execution: asyncpg.Record) -> set[str]:
    wanted = set()
    if execution["status"] in _TOLD_AT_THE_END:
        wanted.add(_TOLD_AT_THE_END[execution["status"]])
    if execution["began_at"] is not None:
        wanted.add("execution.started")
    if execution["approval_status"] is not None:
        wanted.add("execution.pending_approval")
    return wanted
