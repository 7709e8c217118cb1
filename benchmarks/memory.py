"""What a stream costs on which nothing happens."""

import time

from benchmarks import backends, load
from benchmarks.backends import Backend
from benchmarks.children import memory_of
from benchmarks.figures import Memory, Results
from benchmarks.rig import Rig

_FIRST = 100
"""Streams that are opened and closed before: what is made once is no part of a stream."""

_OPEN_FOR = 60.0
_LOOK_EVERY = 1.0
_STEADY = 0.005
"""Less than this share of change from one look to the next."""


def measure(rig: Rig, results: Results) -> None:
    with backends.switchboard(rig) as ours, backends.baseline(rig) as guide:
        for backend in (ours, guide):
            try:
                results.memory[backend.name] = found = _of_streams(rig, backend)
            except load.TooFewFiles as error:
                results.notes.append(f"Memory of idle streams was not measured: {error}")
                rig.say(str(error))
                return
            rig.say(f"{found.streams} idle streams: {backend.name} {found.per_stream / 1000:.1f} kB each")


def _of_streams(rig: Rig, backend: Backend) -> Memory:
    count = rig.options.size.idle_streams
    assert backend.pid is not None
    with rig.turn():
        with load.streams(rig.streams, backend, rig.names.context, _FIRST, _OPEN_FOR):
            pass
        before = _steady(backend.pid)
        with load.streams(rig.streams, backend, rig.names.context, count, _OPEN_FOR):
            after = _steady(backend.pid)
    return Memory(before, after, count)


def _steady(pid: int) -> int:
    """What a process holds once that no longer changes."""
    last, now = 0, memory_of(pid)
    until = time.monotonic() + _OPEN_FOR / 2
    while abs(now - last) > _STEADY * now and time.monotonic() < until:
        time.sleep(_LOOK_EVERY)
        last, now = now, memory_of(pid)
    return now
