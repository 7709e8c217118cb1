"""The load: requests by wrk, streams by streams.c, and callbacks at a steady pace."""

import asyncio
import contextlib
import json
import os
import selectors
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks import pace
from benchmarks.backends import Backend
from benchmarks.children import end
from benchmarks.figures import Delivery, Requests, Results
from benchmarks.rig import Rig

_TIMEOUT = 10
"""Seconds that one request may take."""

_SPARE = 30
"""Seconds that a program may take beyond what it was told."""

_OPENED_WITHIN = 120.0

_PATIENCE = 5.0
"""Seconds for events that are still on their way when the last callback was answered."""


class LoadFailed(Exception):
    """A program that makes load said something else than figures."""


def measure(
    rig: Rig, results: Results, backend: Backend, name: str, script: str, connections: int, **values: str
) -> None:
    """Sends requests over so many connections, each of which waits for its answer, for as long as a load lasts."""
    found = wrk(backend.url, script, connections, rig.options.size.seconds, KEY=backend.key, **values)
    results.requests[name][backend.name].append(found)
    errors = f", {found.errors} errors" if found.errors else ""
    rig.say(f"{name}: {backend.name} {found.rate:,.0f}/s, p50 {found.p50_ms:.2f} ms, p99 {found.p99_ms:.2f} ms{errors}")


def wrk(url: str, script: str, connections: int, seconds: int, **values: str) -> Requests:
    command = [
        *("wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"),
        *("--timeout", f"{_TIMEOUT}s", "--latency", "--script", str(Path(__file__).with_name(script)), url),
    ]
    surroundings = {"PATH": os.environ["PATH"], **values}
    done = subprocess.run(
        command, env=surroundings, capture_output=True, text=True, check=False, timeout=seconds + _TIMEOUT + _SPARE
    )
    try:
        seen = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise LoadFailed(f"wrk: {done.stdout}{done.stderr}") from None
    return seen_by_wrk(seen)


def seen_by_wrk(seen: dict[str, Any]) -> Requests:
    """What results.lua prints."""
    errors = seen["refused"] + seen["copies"] + seen["broken"] + seen["timeouts"]
    return Requests(seen["answers"], seen["seconds"], seen["p50_ms"], seen["p99_ms"], errors)


@dataclass(slots=True)
class Streams:
    """Open streams."""

    process: "subprocess.Popen[str]"

    def finish(self, events: int) -> dict[str, Any]:
        """Waits until each stream has got so many events, or seems not to get them; what came."""
        said, _ = self.process.communicate(f"{events}\n", timeout=_SPARE)
        seen: dict[str, Any] = json.loads(said)
        return seen


class TooFewFiles(LoadFailed):
    """The limit of open files is too low for so many streams."""


_TOO_FEW_FILES = 3


@contextlib.contextmanager
def streams(
    program: Path, backend: Backend, context_id: str, count: int, seconds: float, patience: float = _PATIENCE
) -> Iterator[Streams]:
    """Streams that follow a context, all of them answered, for so many seconds at most."""
    path = f"/api/events?context_id={context_id}"
    command = [str(program), str(backend.port), path, str(count), str(_OPENED_WITHIN + seconds), str(patience)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            if not _has_said(process.stdout, _OPENED_WITHIN) or not process.stdout.readline():
                raise _why(process)
            yield Streams(process)
        finally:
            end(process)


def _has_said(output: IO[str], within: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        return bool(selector.select(within))


def _why(process: "subprocess.Popen[str]") -> LoadFailed:
    end(process)
    said = process.stderr.read().strip() if process.stderr else ""
    return (TooFewFiles if process.returncode == _TOO_FEW_FILES else LoadFailed)(said)


def deliver(rig: Rig, backend: Backend, context_id: str, run: str, rate: int) -> Delivery:
    """Sends callbacks at a steady rate, whose events many streams follow."""
    size = rig.options.size
    events = rate * size.stream_seconds
    with streams(rig.streams, backend, context_id, size.streams, size.stream_seconds + _SPARE) as opened:
        callbacks = [
            pace.callback(backend, f"{run}{i % rig.names.FOLLOWED + 1}", rig.names.fresh()) for i in range(events)
        ]
        refused = asyncio.run(pace.steadily(backend.port, callbacks, rate))
        seen = opened.finish(events)
    errors = refused + seen["closed"] + seen["extra"]
    return Delivery(seen["delivered"], size.streams * events, seen["p50_ms"], seen["p99_ms"], errors)
