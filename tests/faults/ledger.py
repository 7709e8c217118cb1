"""What was asked for and acknowledged in a round, as those know it who asked."""

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from tests.faults.scene import Customer

FINAL = ("COMPLETED", "FAILED", "CANCELED")


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
    answered: bool = False
    """Whether there was any answer that says what became of it."""
    decision: str | None = None
    """What was decided about it, if that was acknowledged."""


@dataclass(frozen=True)
class Seen:
    """An event as a browser was sent it."""

    id: int
    run_id: str
    context_id: str
    event_type: str
    status: str


@dataclass
class Book:
    """A round's."""

    number: int
    contexts: list[str]
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    faults: list[str] = field(default_factory=list)
    intents: list[Intent] = field(default_factory=list)
    sent: dict[str, str] = field(default_factory=dict)
    """Callbacks of our own, by what they carry: the runs that they are about."""
    acknowledged: set[str] = field(default_factory=set)
    """Those that were answered 200."""
    finals: dict[str, str] = field(default_factory=dict)
    """How runs ended, as browsers or pollers were told first."""
    complaints: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)

    def copy(self) -> "Book":
        """As it is now: what is acknowledged later may not be in the database yet when that is looked at."""
        return replace(self, intents=[replace(intent) for intent in self.intents], acknowledged=set(self.acknowledged))

    def complain(self, what: str) -> None:
        if len(self.complaints) < 50:
            self.complaints.append(what)

    def note(self, what: str, status: int, body: Any = None) -> None:
        """Notes an answer; one that says that it is our fault is a complaint by itself."""
        self.answers[f"{what} {status}"] += 1
        if status >= 500 and status not in (502, 503):
            self.complain(f"{what} was answered {status}: {body}")

    def tell_status(self, run_id: str, status: str, known: str | None, where: str) -> None:
        """Somebody was told how a run stands who knew, when they asked, that it had ended so."""
        if known is not None and status != known:
            self.complain(f"run {run_id} was {known}, then {status} ({where})")
        if status in FINAL:
            self.finals.setdefault(run_id, status)
