"""What was measured, and what follows from it; nothing here measures."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar


@dataclass(frozen=True, slots=True)
class Requests:
    """One load of requests."""

    answers: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int = 0
    """Answers that were not 2xx, or took a request for a copy, and connections that broke or took too long."""

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return max(self.answers - self.errors, 0) / self.seconds

    @property
    def sound(self) -> bool:
        return not self.errors


@dataclass(frozen=True, slots=True)
class Delivery:
    """One load of events, read by many streams."""

    delivered: int
    expected: int
    p50_ms: float
    p99_ms: float
    errors: int = 0
    """Callbacks that were not taken, and streams that were closed."""

    @property
    def sound(self) -> bool:
        """Whether every event has come: those that have not have no place in the percentiles."""
        return self.delivered == self.expected and not self.errors


@dataclass(frozen=True, slots=True)
class Kept:
    """Callbacks of one run, sent at the same time: how many were answered 200, and how many of those are there."""

    answered: int
    stored: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What a server's processes hold in memory, in bytes."""

    before: int
    after: int
    streams: int

    @property
    def per_stream(self) -> float:
        return (self.after - self.before) / self.streams


@dataclass(frozen=True, slots=True)
class Machine:
    """On what it was measured."""

    date: str
    commit: str
    processor: str
    memory: str
    system: str
    storage: str
    """The file system below PostgreSQL, which decides what a commit costs."""
    versions: dict[str, str]


Figure = TypeVar("Figure", Requests, Delivery)
Rounds = dict[str, list[Figure]]
"""By backend, a figure for each round."""


def _by_name() -> "defaultdict[str, Rounds[Requests]]":
    return defaultdict(lambda: defaultdict(list))


def _by_rate() -> "defaultdict[int, Rounds[Delivery]]":
    return defaultdict(lambda: defaultdict(list))


@dataclass(slots=True)
class Results:
    """Everything that a run has measured."""

    requests: defaultdict[str, Rounds[Requests]] = field(default_factory=_by_name)
    deliveries: defaultdict[int, Rounds[Delivery]] = field(default_factory=_by_rate)
    kept: dict[str, Kept] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was not measured, and why; what has to be known beside the figures."""


def middle(rounds: Sequence[Figure], value: Callable[[Figure], float]) -> float | None:
    """The median; None where there is nothing, or anything went wrong: such a figure is worth nothing."""
    if not rounds or not all(each.sound for each in rounds):
        return None
    return median(map(value, rounds))


def ratio(ours: Sequence[Figure], theirs: Sequence[Figure], value: Callable[[Figure], float]) -> float | None:
    """The median of the ratios of rounds, which were measured one after the other; None as for `middle`."""
    if middle(ours, value) is None or middle(theirs, value) is None:
        return None
    pairs = [(value(mine), value(other)) for mine, other in zip(ours, theirs, strict=True)]
    if not all(other for _, other in pairs):
        return None
    return median(mine / other for mine, other in pairs)
