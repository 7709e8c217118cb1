"""RESULTS.md from what was measured: ratios first, figures behind. Measures nothing and asks nobody."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.figures import Delivery, Figure, Machine, Requests, Results, Rounds, middle, ratio
from benchmarks.titles import (
    BASELINE,
    EMPTY,
    GROWN,
    GROWN_CALLBACKS,
    GROWN_LIST,
    GROWTH,
    NCHAN,
    ONE_RUN,
    PEER,
    SMALL,
    SPREAD_BESIDE,
    SWITCHBOARD,
    TRIGGERS,
    spread,
)

_NONE = "-"
_FAILED = "errors"
_KILOBYTE = 1000
_SOON = 500
_PRECISE = 10
"""Milliseconds."""
_FULL_STREAMS = 10_000


def rate(figure: Requests) -> float:
    return figure.rate


def p50(figure: Requests | Delivery) -> float:
    return figure.p50_ms


def p99(figure: Requests | Delivery) -> float:
    return figure.p99_ms


@dataclass(frozen=True, slots=True)
class Comparison:
    """A ratio, or why there is none."""

    ratio: float | None
    failed: bool = False
    """Something went wrong on either side."""

    def __str__(self) -> str:
        if self.ratio is None:
            return _FAILED if self.failed else _NONE
        return f"{self.ratio:.2f}x"


def compare(ours: Sequence[Figure], theirs: Sequence[Figure], value: Callable[[Figure], float]) -> Comparison:
    found = ratio(ours, theirs, value)
    return Comparison(found, failed=found is None and bool(ours and theirs))


@dataclass(frozen=True, slots=True)
class Goal:
    """What Switchboard is to reach."""

    what: str
    wanted: str
    measured: str
    met: bool | None
    """None where it was not measured, or anything went wrong in it."""


def goals(results: Results) -> list[Goal]:
    """Every goal, also those that this run has not measured."""

    def between(name: str, other: str, value: Callable[[Requests], float]) -> Comparison:
        rounds = results.requests.get(name, {})
        return compare(rounds.get(SWITCHBOARD, []), rounds.get(other, []), value)

    def grown(name: str) -> Comparison:
        rounds = results.requests.get(name, {})
        return compare(rounds.get(GROWN, []), rounds.get(SMALL, []), p50)

    one_run = compare(_of(results, ONE_RUN), _of(results, SPREAD_BESIDE), rate)
    return [
        _at_least("callbacks a second at 32 connections, to the peer's", 8, between(spread(32), PEER, rate)),
        _at_most("their p99, to the peer's", 0.25, between(spread(32), PEER, p99)),
        _at_least("callbacks a second at 32 connections, to an empty handler's", 0.6, between(spread(32), EMPTY, rate)),
        _at_most("one caller, one callback at a time: p50, to the peer's", 0.5, between(spread(1), PEER, p50)),
        _at_least("all callbacks for one run: a second, to those that are spread", 0.8, one_run),
        _none_lost(results),
        _at_least("triggers a second, to the peer's", 3, between(TRIGGERS, PEER, rate)),
        _at_most("streams at 30 events a second: p50, to nchan's", 2.5, _streamed(results, NCHAN)),
        _at_most("streams at 30 events a second: p50, to the peer's", 0.25, _streamed(results, PEER)),
        _all_delivered(results),
        _soon_delivered(results),
        _memory(results),
        _at_most("p50 of callbacks, grown to small", 1.3, grown(GROWN_CALLBACKS)),
        _at_most("p50 of a context's list, grown to small", 1.3, grown(GROWN_LIST)),
    ]


def _of(results: Results, name: str) -> list[Requests]:
    return results.requests.get(name, {}).get(SWITCHBOARD, [])


def _at_least(what: str, limit: float, found: Comparison) -> Goal:
    return Goal(what, f"{limit:g}x or more", str(found), None if found.ratio is None else found.ratio >= limit)


def _at_most(what: str, limit: float, found: Comparison) -> Goal:
    return Goal(what, f"{limit:g}x or less", str(found), None if found.ratio is None else found.ratio <= limit)


def _none_lost(results: Results) -> Goal:
    what = "callbacks for one run that were answered 200 and are not there"
    kept = results.kept.get(SWITCHBOARD)
    if kept is None:
        return Goal(what, "none", _NONE, None)
    return Goal(what, "none", f"{kept.answered - kept.stored} of {kept.answered}", kept.stored == kept.answered)


def _streamed(results: Results, other: str) -> Comparison:
    rounds = results.deliveries.get(30, {})
    return compare(rounds.get(SWITCHBOARD, []), rounds.get(other, []), p50)


def _all_delivered(results: Results) -> Goal:
    what = "streams at 150 events a second: delivered"
    rounds = results.deliveries.get(150, {}).get(SWITCHBOARD, [])
    if not rounds:
        return Goal(what, "every event", _NONE, None)
    return Goal(what, "every event", _delivered(rounds), all(each.sound for each in rounds))


def _soon_delivered(results: Results) -> Goal:
    rounds = results.deliveries.get(150, {}).get(SWITCHBOARD, [])
    found = middle(rounds, p99)
    met = None if found is None else found < _SOON
    return Goal("streams at 150 events a second: p99", f"less than {_SOON} ms", _in_the_middle(rounds, p99), met)


def _memory(results: Results) -> Goal:
    found = results.memory.get(SWITCHBOARD)
    count = _FULL_STREAMS if found is None else found.streams
    what, wanted = f"memory of an idle stream, of {count:,}", "40 kB or less"
    if found is None:
        return Goal(what, wanted, _NONE, None)
    return Goal(what, wanted, f"{found.per_stream / _KILOBYTE:.1f} kB", found.per_stream <= 40 * _KILOBYTE)


def render(results: Results, machine: Machine, *, quick: bool = False) -> str:
    """The whole report, in Markdown."""
    parts = [
        "# Results",
        "",
        "Written by `make bench`; [README.md](README.md) says how it is measured and what can be compared.",
        *(["", "**A quick run: it shows that all works, its figures are worth little.**"] if quick else []),
        *_section("Goals", _goals(results)),
        *_section("Switchboard to the others", _ratios(results)),
        *_section("The machine", _machine(machine)),
        *_section("Requests", _requests(results)),
        *_section("Callbacks for one run that were sent at the same time", _kept(results)),
        *_section("Streams", _streams(results)),
        *_section("Memory of idle streams", _memories(results)),
        *_section("What has grown", _growth(results)),
        *_section("Notes", [f"- {note}" for note in results.notes]),
    ]
    return "\n".join(parts) + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _goals(results: Results) -> list[str]:
    words = {True: "yes", False: "**no**", None: "not known"}
    rows = [(goal.what, goal.wanted, goal.measured, words[goal.met]) for goal in goals(results)]
    return _table(("what", "goal", "measured", "met"), rows)


def _machine(machine: Machine) -> list[str]:
    rows = [
        ("processors", machine.processor),
        ("memory", machine.memory),
        ("system", f"{machine.system}, data on {machine.storage}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        ("commit", machine.commit),
        ("date", machine.date),
    ]
    return _table(("", ""), rows)


def _compared(results: Results) -> Iterator[tuple[str, dict[str, list[Requests]]]]:
    """What was measured of Switchboard and others side by side."""
    for name, rounds in results.requests.items():
        if name not in GROWTH:
            yield name, rounds


def _ratios(results: Results) -> list[str]:
    """Medians of the ratios of rounds: requests a second, then p50, then p99."""
    others = (BASELINE, PEER, EMPTY, NCHAN)
    rows = [
        (name, *(_ratios_to(rounds, other, rate, p50, p99) for other in others)) for name, rounds in _compared(results)
    ]
    rows += [
        (f"streams, {each} events a second", *(_ratios_to(rounds, other, p50, p99) for other in others))
        for each, rounds in results.deliveries.items()
    ]
    table = _table(("", *others), rows)
    return [*table, "", "Of requests: how many a second / p50 / p99. Of streams: p50 / p99."] if table else []


def _ratios_to(rounds: Rounds[Figure], other: str, *values: Callable[[Figure], float]) -> str:
    found = [compare(rounds.get(SWITCHBOARD, []), rounds.get(other, []), value) for value in values]
    return " / ".join(map(str, found)) if all(each.ratio for each in found) else str(found[0])


def _requests(results: Results) -> list[str]:
    rows = [
        (name, backend, _rate(figures), _in_the_middle(figures, p50), _in_the_middle(figures, p99), _errors(figures))
        for name, rounds in _compared(results)
        for backend, figures in rounds.items()
    ]
    return _table(("", "", "a second", "p50", "p99", "errors"), rows)


def _kept(results: Results) -> list[str]:
    rows = [
        (backend, str(kept.answered), str(kept.stored), str(kept.answered - kept.stored))
        for backend, kept in results.kept.items()
    ]
    return _table(("", "answered 200", "there", "lost"), rows)


def _streams(results: Results) -> list[str]:
    rows = [
        (
            f"{each} a second",
            backend,
            _in_the_middle(figures, p50),
            _in_the_middle(figures, p99),
            _delivered(figures),
            _errors(figures),
        )
        for each, rounds in results.deliveries.items()
        for backend, figures in rounds.items()
    ]
    return _table(("events", "", "p50", "p99", "delivered", "errors"), rows)


def _memories(results: Results) -> list[str]:
    rows = [
        (
            backend,
            f"{found.streams:,}",
            f"{found.per_stream / _KILOBYTE:.1f} kB",
            f"{found.before / _KILOBYTE**2:.0f} MB",
            f"{found.after / _KILOBYTE**2:.0f} MB",
        )
        for backend, found in results.memory.items()
    ]
    return _table(("", "streams", "each", "process before", "process with them"), rows)


def _growth(results: Results) -> list[str]:
    rows = []
    for name in GROWTH:
        rounds = results.requests.get(name, {})
        small, grown = rounds.get(SMALL, []), rounds.get(GROWN, [])
        if small and grown:
            found = (str(compare(grown, small, value)) for value in (p50, p99))
            rows.append(
                (name, *found, *(_in_the_middle(each, value) for each in (small, grown) for value in (p50, p99)))
            )
    return _table(("", "p50, grown to small", "p99, grown to small", "small: p50", "p99", "grown: p50", "p99"), rows)


def _milliseconds(found: float) -> str:
    return f"{found:.2f} ms" if found < _PRECISE else f"{found:.0f} ms"


def _rate(figures: Sequence[Requests]) -> str:
    found = middle(figures, rate)
    return _FAILED if found is None else f"{found:,.0f}"


def _in_the_middle(figures: Sequence[Figure], value: Callable[[Figure], float]) -> str:
    found = middle(figures, value)
    if found is None:
        return _FAILED if figures else _NONE
    return _milliseconds(found)


def _errors(figures: Sequence[Requests] | Sequence[Delivery]) -> str:
    return str(sum(figure.errors for figure in figures))


def _delivered(figures: Sequence[Delivery]) -> str:
    return f"{sum(each.delivered for each in figures):,} of {sum(each.expected for each in figures):,}"
