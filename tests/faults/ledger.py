"""What was asked for and acknowledged in a round, as those know it who asked."""

import time
from collections import Counter
from dataclasses import dataclass, field, replace

import httpx

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
    verdict: str | None = None
    """What somebody wants to decide about it."""
    decision: str | None = None
    """The same once it was acknowledged."""


@dataclass(frozen=True)
class Seen:
    """An event as a browser was sent it."""

    id: int
    run_id: str
    context_id: str
    event_type: str
    status: str
    data: str
    """As JSON."""


@dataclass
class Book:
    """A round's."""

    number: int
    contexts: list[str]
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    faults: list[str] = field(default_factory=list)
    intents: list[Intent] = field(default_factory=list)
    sent: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Callbacks of our own, by what they carry: the runs that they are about, and their kinds."""
    acknowledged: set[str] = field(default_factory=set)
    """Those that were answered 200."""
    finals: dict[str, str] = field(default_factory=dict)
    """How runs ended, as browsers or pollers were told first."""
    complaints: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)

    def copy(self) -> "Book":
        """With what is acknowledged by now: what is later may not be in the database when that is looked at."""
        intents = [replace(intent) for intent in self.intents]
        return replace(self, intents=intents, acknowledged=set(self.acknowledged), finals=dict(self.finals))

    def complain(self, what: str) -> None:
        if len(self.complaints) < 50:
            self.complaints.append(what)

    def note(self, what: str, answer: httpx.Response) -> None:
        """Notes an answer; one that a careful client need not expect is a complaint by itself."""
        self.answers[f"{what} {answer.status_code}"] += 1
        if answer.status_code not in _EXPECTED[what]:
            self.complain(f"{what} was answered {answer.status_code}: {answer.text}")
        if answer.status_code == 503 and "retry-after" not in answer.headers:
            self.complain(f"{what}: 503 without Retry-After")

    def tell_status(self, run_id: str, status: str, known: str | None, where: str) -> None:
        """Somebody was told how a run stands who knew, when they asked, that it had ended so."""
        if known is not None and status != known:
            self.complain(f"run {run_id} was {known}, then {status} ({where})")
        if status in FINAL:
            self.finals.setdefault(run_id, status)
