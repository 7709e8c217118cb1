"""What was asked for and acknowledged in a round, as those know it who asked."""

import math
import time
from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import httpx
from pydantic_core import to_json

from tests.faults.customers import Customer

FINAL = ("COMPLETED", "FAILED", "CANCELED")


_EXPECTED = {
    "a trigger": (200, 409, 502, 503),
    "an execution": (202, 503),
    "a question": (200, 409, 503),
    "a decision": (200, 503),
    "a status": (200, 503),
    "a run": (200, 503),
    "a list": (200, 503),
    "a timeline": (200, 503),
    "a callback": (200, 404, 503),
    "a cancellation": (200, 202, 409, 502, 503),
    "a stream": (200, 204, 503),
}
"""What requests are answered: in progress, nothing to decide, HappyRobot did not confirm, PostgreSQL is away."""


KEPT_FOR = 2.0
"""Seconds for which clients keep a connection, which may be one that a fault has left dead."""

_CARRIES = {"one", "other", "the front"}
"""What is between a client and its answer."""
_REFUSES = {"one", "other", "PostgreSQL"}
"""Where something fails that needs a 503: a process that was halted finds PostgreSQL away when it goes on."""


@dataclass(eq=False)
class Outage:
    """A part has failed: from when that began until everything was served again."""

    on: str
    began: float = field(default_factory=time.monotonic)
    over: float = math.inf


class Outages:
    """All that has failed so far. What is not asked of a part that fails is to be answered as on a good day."""

    def __init__(self, *, alone: bool) -> None:
        """`alone` where nobody else wants the processors: otherwise there is always a reason to be slow."""
        self._alone = alone
        self._all: list[Outage] = []

    def begin(self, on: str) -> None:
        self._all.append(Outage(on))

    def end(self) -> None:
        """Everything is served again."""
        for outage in self._all:
            outage.over = min(outage.over, time.monotonic())

    def excuse(self, parts: AbstractSet[str], since: float) -> bool:
        """Whether a request since then may have been answered badly, or not at all, for one of these parts."""
        return not self._alone or self.explain(parts, since)

    def explain(self, parts: AbstractSet[str], since: float, until: float = math.inf) -> bool:
        """Whether one of these parts had failed at any time since then."""
        return any(each.on in parts and each.over >= since and each.began <= until for each in self._all)


@dataclass(eq=False)
class Intent:
    """Somebody wants one call to be placed."""

    id: str
    context_id: str
    key: str | None
    """As `Idempotency-Key`, with which it is repeated until there is an answer."""
    customer: Customer | None = None
    """Who came by the Public API."""
    execution_id: str | None = None
    """Once it was named to us."""
    run_ids: list[str] = field(default_factory=list)
    """Those that an answer 200 has named."""
    accepted: bool = False
    """Whether it was answered 200, or 202 by the Public API."""
    failed: bool = False
    """Whether it was answered that nobody was called."""
    asked: bool = False
    """Whether somebody was shown what it asks to have approved."""
    verdict: str | None = None
    """What somebody wants to decide about it."""
    decision: str | None = None
    """The same once it was acknowledged."""
    unlucky: bool = False
    """Whether HappyRobot was told to answer it badly."""
    began: float = field(default_factory=time.monotonic)


_SHORT = 2_000
"""Bytes of an event that are remembered as they are."""


@dataclass(frozen=True)
class Seen:
    """An event as a browser was sent it."""

    id: int
    run_id: str
    context_id: str
    event_type: str
    status: str
    data: str
    """As JSON, or what it comes to where that is long."""

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> "Seen":
        """From a stream, or from a row."""
        data = to_json(event["data"])
        said = data.decode() if len(data) < _SHORT else sha256(data).hexdigest()
        return cls(event["id"], event["run_id"], event["context_id"], event["event_type"], event["status"], said)


@dataclass
class Book:
    """A round's."""

    number: int
    contexts: list[str]
    outages: Outages
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    faults: list[str] = field(default_factory=list)
    intents: list[Intent] = field(default_factory=list)
    sent: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Callbacks of our own, by what they carry: the runs that they are about, and their kinds."""
    acknowledged: set[str] = field(default_factory=set)
    """Those that were answered 200."""
    held: set[str] = field(default_factory=set)
    """Those that were answered that nobody knows their runs, and are not sent again."""
    finals: dict[str, str] = field(default_factory=dict)
    """How runs ended, as somebody was told first."""
    unwanted: set[str] = field(default_factory=set)
    """Runs that somebody wants to be stopped, whatever the answer was; noted before PostgreSQL can know of it."""
    canceled: set[str] = field(default_factory=set)
    """Those of which that was acknowledged."""
    complaints: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    refusals: list[float] = field(default_factory=list)
    """Seconds after which requests were answered 503, where nothing was between."""

    def copy(self) -> "Book":
        """With what is acknowledged by now: what is later may not be in the database when that is looked at."""
        intents = [replace(intent) for intent in self.intents]
        acknowledged, held, canceled = set(self.acknowledged), set(self.held), set(self.canceled)
        finals = dict(self.finals)
        return replace(self, intents=intents, acknowledged=acknowledged, held=held, canceled=canceled, finals=finals)

    @property
    def named(self) -> list[str]:
        """Runs that somebody was told of."""
        return [run_id for intent in self.intents for run_id in intent.run_ids]

    def complain(self, what: str) -> None:
        if len(self.complaints) < 50:
            self.complaints.append(what)

    def note(self, what: str, answer: httpx.Response | None, asked: float) -> None:
        """Notes an answer, or that there was none; one that a careful client need not expect is a complaint by itself.

        So is one that says that something is away where nothing is.
        """
        self.answers[f"{what} {'-' if answer is None else answer.status_code}"] += 1
        if answer is None:
            if not self.outages.excuse(_CARRIES | _REFUSES, asked - KEPT_FOR):
                self.complain(f"{what} had no answer, and nothing explains it")
            return
        if answer.status_code not in _EXPECTED[what]:
            self.complain(f"{what} was answered {answer.status_code}: {answer.text}")
        if answer.status_code == 503:
            if "retry-after" not in answer.headers:
                self.complain(f"{what}: 503 without Retry-After")
            if not self.outages.excuse(_REFUSES, asked):
                self.complain(f"{what} was answered 503, and nothing explains it: {answer.text}")
            if not self.outages.explain(_CARRIES, asked):
                self.refusals.append(time.monotonic() - asked)

    def miss_a_stream(self, since: float) -> bool:
        """Whether a stream that has ended since then, and was to go on, has done so though nothing explains it."""
        return not self.outages.excuse(_CARRIES | _REFUSES, since)

    def tell_status(self, run_id: str, status: str, known: str | None, where: str) -> None:
        """Somebody was told how a run stands who knew, when they asked, that it had ended so."""
        if known is not None and status != known:
            self.complain(f"run {run_id} was {known}, then {status} ({where})")
        if status in FINAL:
            self.finals.setdefault(run_id, status)
