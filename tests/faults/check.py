"""Compares what was acknowledged with what is there: in the database, at the browsers, at HappyRobot, at customers."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

import asyncpg
from pydantic_core import from_json

from switchboard.happyrobot.simulator import Call, Run
from tests.faults.actors import Cast, View
from tests.faults.customers import Customer, Notice, Told
from tests.faults.ledger import FINAL, Book, Seen
from tests.faults.scene import Name, Said, Scene, to_the_millisecond

_IS = {"completed": "COMPLETED", "failed": "FAILED", "canceled": "CANCELED"}
"""HappyRobot's words for how a run ended, and ours."""


@dataclass
class Findings:
    wrong: list[str] = field(default_factory=list)
    """What will not become right any more."""
    open: list[str] = field(default_factory=list)
    """What is not there yet."""
    unseen: list[str] = field(default_factory=list)
    """What browsers are still to be sent."""
    uncalled: int = 0
    """Calls that were accepted and not placed, as something had failed."""


@dataclass
class _Facts:
    """A round as PostgreSQL and HappyRobot have it."""

    events: list[asyncpg.Record]
    runs: dict[str, asyncpg.Record]
    executions: dict[str, asyncpg.Record]
    deliveries: list[asyncpg.Record]
    calls: list[Call]
    stories: dict[str, Run]
    stopped: set[str]
    """Runs that HappyRobot had been asked to stop before PostgreSQL was looked at."""

    @cached_property
    def runs_of(self) -> Mapping[str, list[asyncpg.Record]]:
        """By execution."""
        runs: defaultdict[str, list[asyncpg.Record]] = defaultdict(list)
        for run in self.runs.values():
            runs[str(run["execution_id"])].append(run)
        return runs


async def examine(cast: Cast) -> Findings:
    """What is wrong, and what is still to come, of a round."""
    # First what was acknowledged and seen by now: what is in the database may be more.
    scene, book = cast.scene, cast.book.copy()
    acknowledged = set(scene.said.acknowledged)
    views = [browser.view() for browser in cast.browsers]
    told = [customer.told_by_now() for customer in scene.customers]
    found = Findings(wrong=list(book.complaints))
    facts = await _facts(scene, book.contexts)
    _callbacks(scene.said, book, acknowledged, facts, found)
    _calls(book, facts, found)
    _nobody_is_forgotten(book, facts, found)
    _answers(book, facts, found)
    _cancellations(book, facts, found)
    _decisions(scene, book, facts, found)
    _timelines(book, facts, found)
    _ends(facts, found)
    _results(acknowledged, facts, found)
    for view in views:
        await _stream(scene, view, facts, found)
    for customer, earlier in zip(scene.customers, told, strict=True):
        _webhooks(_Mail.of(customer, earlier, book, facts), facts, found)
        found.wrong += customer.forgeries
    return found


async def _facts(scene: Scene, contexts: Sequence[str]) -> _Facts:
    stopped = set(scene.stopped)
    # All of one moment.
    async with scene.connected() as connection, connection.transaction(isolation="repeatable_read"):
        rows = {
            table: await connection.fetch(f"SELECT * FROM {table} WHERE context_id = ANY ($1)", contexts)
            for table in ("run_events", "agent_runs", "executions")
        }
        mine = [row["id"] for row in rows["executions"]]
        deliveries = await connection.fetch(_DELIVERIES, mine)
    simulator = scene.simulator
    return _Facts(
        sorted(rows["run_events"], key=lambda row: row["id"]),
        {row["run_id"]: row for row in rows["agent_runs"]},
        {str(row["id"]): row for row in rows["executions"]},
        deliveries,
        [call for call in simulator.calls if call.payload and call.payload.get("context_id") in contexts],
        {run.id: run for run in simulator.runs.values() if run.payload.get("context_id") in contexts},
        stopped,
    )


_DELIVERIES = """
    SELECT *, (SELECT count(*) FROM delivery_attempts WHERE delivery_id = deliveries.id) AS attempts
    FROM deliveries WHERE execution_id = ANY ($1)
"""


def _callbacks(said: Said, book: Book, acknowledged: AbstractSet[Name], facts: _Facts, found: Findings) -> None:
    """Each that was acknowledged is there as it was sent, and none is there twice."""
    markers: Counter[str] = Counter()
    told: dict[Name, list[Any]] = defaultdict(list)
    for row in facts.events:
        marker = row["data"].get("marker") if isinstance(row["data"], dict) else None
        if isinstance(marker, str):
            markers[marker] += 1
            if book.sent.get(marker) != (row["run_id"], row["event_type"]):
                found.wrong.append(f"callback {marker} is in the timeline of {row['run_id']}, as {row['event_type']}")
        elif row["occurred_at"] is not None:
            told[row["run_id"], row["event_type"], to_the_millisecond(row["occurred_at"])].append(row["data"])
    _counted("callback", markers, set(book.sent), book.acknowledged, found)
    found.wrong += [
        f"callback {marker} was held, and is not there, though its run is known"
        for marker in book.held
        if book.sent[marker][0] in facts.runs and not markers[marker]
    ]
    sent = {name: data for name, data in said.sent.items() if name[0] in facts.stories}
    found.wrong += [f"callback {name} is there, and HappyRobot has not sent it" for name in told.keys() - sent.keys()]
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


_NEEDED = {"worker", "other worker", "PostgreSQL", "HappyRobot"}
"""Who places calls for customers, and what that needs: where one of them fails it may be that nobody is called."""
_SETTLED_BY = 15.0
"""Seconds after a round for which its last calls may still be under way."""


def _nobody_is_forgotten(book: Book, facts: _Facts, found: Findings) -> None:
    """Whoever was accepted is called, unless something failed that explains why not; then its execution says so."""
    tried = {call.payload["execution_id"] for call in facts.calls if call.payload is not None}
    for intent in book.intents:
        execution = facts.executions.get(intent.execution_id or "")
        if not intent.accepted or execution is None or intent.execution_id in tried:
            continue
        found.uncalled += 1
        if not book.outages.explain(_NEEDED, intent.began, book.ended + _SETTLED_BY):
            found.open.append(f"nobody was called for execution {intent.execution_id}, and nothing explains it")
        elif execution["status"] not in ("failed", "submission_unknown"):
            found.open.append(f"execution {intent.execution_id} is {execution['status']}, and nobody was called for it")


def _answers(book: Book, facts: _Facts, found: Findings) -> None:
    """What was named is there, under the ids that it was given."""
    for intent in book.intents:
        if intent.execution_id is not None and intent.execution_id not in facts.executions:
            found.wrong.append(f"execution {intent.execution_id} was named, and is not there")
        for run_id in intent.run_ids:
            run = facts.runs.get(run_id)
            if run is None or str(run["execution_id"]) != intent.execution_id:
                found.wrong.append(f"run {run_id} of execution {intent.execution_id} was named, and is not there")
        execution = facts.executions.get(intent.execution_id or "")
        if intent.decision == "reject" and execution is not None and execution["status"] != "cancelled":
            found.wrong.append(f"execution {intent.execution_id} was rejected, and is {execution['status']}")


def _cancellations(book: Book, facts: _Facts, found: Findings) -> None:
    """Each that was acknowledged is in the timeline of its run, once.

    HappyRobot is asked to stop nothing else, but for what was rejected.
    """
    wished = Counter(row["run_id"] for row in facts.events if row["event_type"] == "cancel_requested")
    found.wrong += [
        f"to cancel run {run_id} was acknowledged, and is there {wished[run_id]} times"
        for run_id in book.canceled
        if wished[run_id] != 1
    ]
    found.wrong += [
        f"run {run_id} is to be canceled, and nobody wants that" for run_id in wished.keys() - book.unwanted
    ]
    rejected = {name for name, row in facts.executions.items() if row["approval_status"] == "rejected"}
    found.wrong += [
        f"HappyRobot was asked to stop run {run_id}, and nobody wants that"
        for run_id in facts.stories.keys() & facts.stopped - wished.keys()
        if facts.stories[run_id].payload["execution_id"] not in rejected
    ]


_DECIDED = {"approve": "approved", "reject": "rejected"}


def _decisions(scene: Scene, book: Book, facts: _Facts, found: Findings) -> None:
    """HappyRobot is told what was decided, and nothing else; of a run that was stopped before, nothing."""
    of_it: defaultdict[str | None, list[Run]] = defaultdict(list)
    for story in facts.stories.values():
        of_it[story.payload["execution_id"]].append(story)
    asked = {intent.execution_id: _DECIDED[intent.verdict] for intent in book.intents if intent.verdict}
    taken = {intent.execution_id for intent in book.intents if intent.decision}
    told: defaultdict[str, set[str]] = defaultdict(set)
    for decision in scene.simulator.decisions:
        if decision.run_id in facts.stories and decision.body is not None:
            told[facts.stories[decision.run_id].payload["execution_id"]].add(decision.body["decision"])
    for execution_id, said in told.items():
        if said != {asked.get(execution_id)}:
            found.wrong.append(f"of execution {execution_id} HappyRobot was told {said}: {asked.get(execution_id)}")
    found.open += [
        f"HappyRobot was not told that execution {execution_id} is {asked[execution_id]}"
        for execution_id in taken
        if execution_id not in told and any(not story.over for story in of_it[execution_id])
    ]


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


def _results(acknowledged: AbstractSet[Name], facts: _Facts, found: Findings) -> None:
    """What a call came to, if HappyRobot has told it, is what its run shows: the first that it has told."""
    first: dict[str, Any] = {}
    for row in facts.events:
        if row["event_type"] == "completed":
            first.setdefault(row["run_id"], row["data"])
    for story in facts.stories.values():
        last = story.events[-1] if story.events else None
        if last is None or story.status != "completed" or story.id not in facts.runs:
            continue
        name = (story.id, "completed", to_the_millisecond(datetime.fromisoformat(last["timestamp"])))
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
    for execution_id, execution in facts.executions.items():
        statuses, status = [run["status"] for run in facts.runs_of[execution_id]], execution["status"]
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


async def _stream(scene: Scene, browser: View, facts: _Facts, found: Findings) -> None:
    """A browser has been sent every event of its scope, once and in order, up to the last that it has seen."""
    if browser.after is None:
        found.unseen.append(f"a browser ({browser.params}) has not begun")
        return
    seen = browser.seen
    last = seen[-1].id if seen else browser.after
    context_id, run_id = browser.params.get("context_id"), browser.params.get("run_id")
    rows = facts.events
    if context_id is None and run_id is None:
        newest = max((row["id"] for row in facts.events), default=0)
        rows = await scene.events_between(browser.after, max(last, newest))
    wanted = [
        Seen.of(row)
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
        found.unseen.append(f"{who} waits for {len(wanted) - len(so_far)} events")
    elif run_id is not None and not browser.ended:
        found.unseen.append(f"{who} was not told that its run is over")
    elif browser.ended:
        last_words = next((event.status for event in seen if event.status in FINAL), None)
        if last_words is None or browser.end not in (None, last_words):
            found.wrong.append(f"{who} was told {browser.end} at the end of its run, after {last_words}")


_TOLD_AT_THE_END = {
    "completed": "execution.completed",
    "failed": "execution.failed",
    "cancelled": "execution.cancelled",
}


_About = tuple[str, str]
"""An execution, and what happened to it."""


_TOLD_BY = 60.0
"""Seconds after a round by which its webhooks are delivered or given up, unless somebody is killed again and again."""


@dataclass
class _Mail:
    """A customer's webhooks, as it has got them and as they are kept."""

    name: str
    told: dict[_About, Mapping[str, Notice]]
    """Before it was looked at how they are kept."""
    by_now: Mapping[_About, Mapping[str, Notice]]
    """Afterwards."""
    kept: dict[_About, list[asyncpg.Record]]
    ends: dict[str, int]
    """How often executions may have ended: of several runs one may have before anybody had heard of another."""
    listens: bool
    """Whether its server has taken whatever came to it."""
    asked: set[str]
    """Executions whose question somebody was shown."""

    @classmethod
    def of(cls, customer: Customer, earlier: Told, book: Book, facts: _Facts) -> "_Mail":
        mine = {name for name, row in facts.executions.items() if row["key_id"] == customer.key_id}
        kept: defaultdict[_About, list[asyncpg.Record]] = defaultdict(list)
        for row in facts.deliveries:
            if row["key_id"] == customer.key_id:
                kept[str(row["execution_id"]), row["event"]].append(row)
        runs = Counter(story.payload["execution_id"] for story in facts.stories.values())
        ends = {name: max(1, runs[name] if facts.executions[name]["unconfirmed"] else 1) for name in mine}
        told = {about: notices for about, notices in earlier.items() if about[0] in mine}
        refused = book.outages.explain({"customers"}, book.began, book.ended + _TOLD_BY)
        listens = customer.mood != "badly" and not refused
        asked = {str(intent.execution_id) for intent in book.intents if intent.asked}
        return cls(customer.name, told, customer.told, kept, ends, listens, asked)


def _webhooks(mail: _Mail, facts: _Facts, found: Findings) -> None:
    """A customer was told of what became of each execution, however often under one id, and in the same words."""
    for execution_id in mail.ends:
        _is_told(mail, facts.executions[execution_id], facts, found)
    for (execution_id, event), notices in mail.told.items():
        what = f"{mail.name} was told of {event} of execution {execution_id}"
        if len(notices) > (mail.ends[execution_id] if event in _TOLD_AT_THE_END.values() else 1):
            found.wrong.append(f"{what} under {len(notices)} ids")
        if any(len(notice.texts) != 1 for notice in notices.values()):
            found.wrong.append(f"{what} in several ways")
        runs = facts.runs_of[execution_id]
        if event == "execution.completed" and len(runs) == 1:
            outputs = [from_json(text)["data"]["output"] for notice in notices.values() for text in notice.texts]
            # It may have come too late to be told.
            if any(output not in (None, runs[0]["metadata"].get("result")) for output in outputs):
                found.wrong.append(f"{what}, with {outputs}: {runs[0]['metadata']}")
    for about, deliveries in mail.kept.items():
        for delivery in deliveries:
            what = f"{mail.name}'s {' '.join(about)}"
            _is_kept(what, delivery, mail.by_now.get(about, {}), found, fails=not mail.listens)


def _is_told(mail: _Mail, execution: asyncpg.Record, facts: _Facts, found: Findings) -> None:
    execution_id, wanted = str(execution["id"]), set()
    if execution["status"] in _TOLD_AT_THE_END:
        wanted.add(_TOLD_AT_THE_END[execution["status"]])
    if facts.runs_of[execution_id]:
        wanted.add("execution.started")
    if execution["approval_status"] is not None or execution_id in mail.asked:
        wanted.add("execution.pending_approval")
    for event in wanted:
        about = execution_id, event
        taken = any(notice.taken for notice in mail.by_now.get(about, {}).values())
        if not taken and not any(delivery["status"] == "failed" for delivery in mail.kept.get(about, ())):
            found.open.append(f"{mail.name} was not told of {event} of execution {execution_id}")
    if execution["status"] in _TOLD_AT_THE_END and mail.ends[execution_id] == 1:
        found.wrong += [
            f"{mail.name} was told of {over} of execution {execution_id}: {execution['status']}"
            for over in set(_TOLD_AT_THE_END.values()) - wanted
            if (execution_id, over) in mail.told
        ]
    if (execution_id, "execution.started") in mail.told and "execution.started" not in wanted:
        found.wrong.append(f"{mail.name} was told that execution {execution_id} has started, and it has no run")
    waited = any(story.token for story in facts.stories.values() if story.payload["execution_id"] == execution_id)
    if (execution_id, "execution.pending_approval") in mail.told and not waited:
        found.wrong.append(f"{mail.name} was told that execution {execution_id} waits, and nobody was asked anything")


_ATTEMPTS = 4
"""At a webhook that is not taken."""


def _is_kept(
    what: str, delivery: asyncpg.Record, notices: Mapping[str, Notice], found: Findings, *, fails: bool
) -> None:
    """What is kept of a webhook is what became of it."""
    notice = notices.get(str(delivery["id"]))
    match delivery["status"]:
        case "pending":
            found.open.append(f"{what} is still to be sent")
        case "delivered" if notice is None or not notice.taken:
            found.wrong.append(f"{what} is kept as delivered, and was not")
        case "failed" if notice is None or not fails:
            found.wrong.append(f"{what} is kept as failed, and nobody has refused it")
        case "failed" if delivery["attempts"] != _ATTEMPTS:
            found.wrong.append(f"{what} is kept as failed, after {delivery['attempts']} attempts")
