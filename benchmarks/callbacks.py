"""Callbacks: spread over many runs, all for one run, and as runs live."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

import httpx

from benchmarks import backends, databases, load, pace
from benchmarks.backends import Backend
from benchmarks.figures import Kept, Results
from benchmarks.options import CONNECTIONS
from benchmarks.rig import Rig
from benchmarks.titles import LIVES, ONE_RUN, SPREAD_BESIDE, SWITCHBOARD, spread

_SCRIPT = "callbacks.lua"
_MANY = 32


@contextlib.contextmanager
def stores(rig: Rig) -> Iterator[Sequence[Backend]]:
    """Switchboard and those with its contract, each with the same runs in its database."""
    with backends.switchboard(rig) as ours, backends.baseline(rig) as guide, backends.peer(rig) as given:
        found = [ours, guide, *given]
        for backend in found:
            assert backend.database_url is not None
            with rig.turn():
                databases.add_runs(backend.database_url, rig.names, rig.options.size.runs)
        yield found


def measure_spread(rig: Rig, results: Results) -> None:
    """Logs of many runs, at several numbers of connections, beside a handler that does nothing."""
    with stores(rig) as found, backends.empty(rig) as empty:
        for connections in CONNECTIONS:
            for _ in rig.rounds(rig.options.size.rounds):
                for backend in (*found, empty):
                    _measure(rig, results, backend, spread(connections), connections)


def measure_one_run(rig: Rig, results: Results) -> None:
    """Logs of one run, a new one each time; then so many at once that are counted afterwards."""
    with stores(rig) as found:
        for number in rig.rounds(rig.options.size.rounds):
            one = {"RUN": rig.names.one_run, "RUNS": "1", "STEP": str(number + 1)}
            for backend in found:
                _measure(rig, results, backend, SPREAD_BESIDE, _MANY)
                _measure(rig, results, backend, ONE_RUN, _MANY, **one)
        for backend in found:
            results.kept[backend.name] = _burst(rig, backend)


def measure_lives(rig: Rig, results: Results) -> None:
    """Runs that begin, log six times and end, one after the other."""
    size = rig.options.size
    with stores(rig) as found:
        for number in rig.rounds(size.rounds):
            begin = number * size.runs // size.rounds
            for backend in found:
                _measure(rig, results, backend, LIVES, _MANY, LIVES=str(begin))


def _measure(rig: Rig, results: Results, backend: Backend, name: str, connections: int, **more: str) -> None:
    values = {"RUN": rig.names.run, "RUNS": str(rig.options.size.runs), "MARK": rig.names.fresh()} | more
    load.measure(rig, results, backend, name, _SCRIPT, connections, **values)


def _burst(rig: Rig, backend: Backend) -> Kept:
    """Sends callbacks of one run at the same time, and looks which of those that were answered 200 are there."""
    size, run_id = rig.options.size, f"{rig.names.one_run}{rig.names.ONE}"
    callbacks = [pace.callback(backend, run_id, rig.names.fresh(), seq) for seq in range(size.burst)]
    with rig.turn():
        good = asyncio.run(pace.at_once(backend.port, callbacks, _MANY))
    answered = {seq for seq, is_good in enumerate(good) if is_good}
    with httpx.Client(base_url=backend.url, timeout=30) as http:
        if backend.name == SWITCHBOARD:
            there = _in_timeline(http, run_id)
        else:
            there = _in_metadata(http, f"{rig.names.one_context}{rig.names.ONE}")
    kept = Kept(len(answered), len(answered & there))
    rig.say(f"{backend.name}: {kept.stored} of {kept.answered} callbacks of one run are there")
    return kept


def _in_timeline(http: httpx.Client, run_id: str) -> set[int]:
    """The numbers of a run's logs."""
    numbers: set[int] = set()
    address: str | None = f"/api/happyrobot/runs/{run_id}/events?limit=1000"
    while address is not None:
        page = http.get(address).raise_for_status()
        numbers |= {event["data"]["seq"] for event in page.json() if event["event_type"] == "log"}
        address = page.links.get("next", {}).get("url")
    return numbers


def _in_metadata(http: httpx.Client, context_id: str) -> set[int]:
    """The numbers of the logs of the one run in a context."""
    (run,) = http.get("/api/happyrobot/runs", params={"context_id": context_id}).raise_for_status().json()
    return {log["seq"] for log in run["metadata"].get("logs", [])}
