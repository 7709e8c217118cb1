"""What is measured, for Prometheus: every metric that a process keeps, in a registry of our own.

Of several processes (`serve --workers`) each keeps its numbers in a file, in a folder that `PROMETHEUS_MULTIPROC_DIR`
names before this module is imported, and whichever is asked adds them up. No label is what a stranger chose: routes are
templates, and words that we do not know are `other`.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Metric,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

# A line more for every counter, which Prometheus itself makes nothing of.
disable_created_metrics()  # type: ignore[no-untyped-call]

REGISTRY = CollectorRegistry()

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

OTHER = "other"
"""Stands for every word that is not one of ours."""

_FOLDER = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
"""Where several processes keep their numbers; prometheus-client, too, looks only once."""

_FOR_ANSWERS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_FOR_NEWS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


def _counter(name: str, documentation: str, *labels: str) -> Counter:
    return Counter(name, documentation, labels, registry=REGISTRY)


def _histogram(name: str, documentation: str, *labels: str, buckets: tuple[float, ...] = _FOR_ANSWERS) -> Histogram:
    return Histogram(name, documentation, labels, registry=REGISTRY, buckets=buckets)


_requests = _counter(
    "switchboard_http_requests",
    "Requests that are over; `status` is none where nobody waited for the answer.",
    "method",
    "route",
    "status",
)
_request_seconds = _histogram(
    "switchboard_http_request_seconds", "How long requests took, but for streams.", "method", "route"
)
_callbacks = _counter(
    "switchboard_callbacks",
    "Callbacks: recorded, duplicate, held (their run is not known yet), refused (a wrong key or body), failed.",
    "type",
    "outcome",
)
_event_to_browser = _histogram(
    "switchboard_event_to_browser_seconds",
    "From when an event was written until it was sent: once for all streams that waited for it, and for each that was "
    "behind; of a batch the oldest, replays not counted.",
    buckets=_FOR_NEWS,
)
OPEN_STREAMS = Gauge(
    "switchboard_open_streams", "Browsers that follow events now.", registry=REGISTRY, multiprocess_mode="livesum"
)
ANNOUNCEMENTS = _counter(
    "switchboard_announcements",
    "Messages about events for all processes; of those that failed, streams learn from PostgreSQL.",
    "outcome",
)
DELIVERY_ATTEMPTS = _counter(
    "switchboard_delivery_attempts",
    "Attempts to send a webhook to a customer: delivered, failed (there is another one), given_up.",
    "outcome",
)
UPSTREAM_REQUESTS = _counter(
    "switchboard_upstream_requests", "Requests to HappyRobot, and what became of them.", "call", "outcome"
)
UPSTREAM_SECONDS = _histogram(
    "switchboard_upstream_request_seconds", "How long requests to HappyRobot took, whatever became of them.", "call"
)
UPSTREAM_TURNS = _counter(
    "switchboard_upstream_turns", "Turns in HappyRobot's pace: taken, or none in time.", "outcome"
)
UPSTREAM_TURN_WAIT = _histogram(
    "switchboard_upstream_turn_wait_seconds", "How long somebody waited for a turn, also in vain.", buckets=_FOR_NEWS
)
RECONCILIATIONS = _counter(
    "switchboard_reconciliations",
    "Looks at runs that fell silent: moved, unchanged, timed_out, no_answer, no_turn, no_key.",
    "outcome",
)
_pool_connections = Gauge(
    "switchboard_pool_connections",
    "Connections to PostgreSQL, used and idle.",
    ["state"],
    registry=REGISTRY,
    multiprocess_mode="livesum",
)
_pool_size = Gauge(
    "switchboard_pool_size",
    "Connections to PostgreSQL that may be used at once.",
    registry=REGISTRY,
    multiprocess_mode="livesum",
)

POSTGRESQL_AWAY = Gauge(
    "switchboard_postgresql_away",
    "Whether PostgreSQL does not answer, or takes no connection.",
    registry=REGISTRY,
    multiprocess_mode="livemax",
)

HAPPYROBOT_AWAY = Gauge(
    "switchboard_happyrobot_away",
    "Whether HappyRobot did not answer the last request to it, or with a 5xx.",
    registry=REGISTRY,
    multiprocess_mode="livemostrecent",
)

# What may happen is there from the start: what nobody has counted yet has no rate.
for _counted, _outcomes in (
    (ANNOUNCEMENTS, ("published", "failed")),
    (DELIVERY_ATTEMPTS, ("delivered", "failed", "given_up")),
    (UPSTREAM_TURNS, ("taken", "none")),
    (RECONCILIATIONS, ("moved", "unchanged", "timed_out", "no_answer", "no_turn", "no_key")),
):
    for _outcome in _outcomes:
        _counted.labels(_outcome)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"})

_CALLBACK_TYPES = frozenset(
    {
        "log",
        "running",
        "completed",
        "failed",
        "canceled",
        "cancelled",
        "pending_approval",
        "session.status_changed",
    }
)


def count_request(method: str, route: str, status: int | None, seconds: float | None) -> None:
    """Counts a request; `seconds` is None for one whose length says nothing."""
    method = method if method in _METHODS else OTHER
    _requests_of(method, route, status or "none").inc()
    if seconds is not None:
        _request_seconds_of(method, route).observe(seconds)


def count_callback(kind: str, outcome: str) -> None:
    _callbacks_of(kind if kind in _CALLBACK_TYPES else OTHER, outcome).inc()


# There are so many of them as there are words for their labels, and looking them up costs more than counting.
_requests_of = cache(_requests.labels)
_request_seconds_of = cache(_request_seconds.labels)
_callbacks_of = cache(_callbacks.labels)


def note_sent(written_at: float | None) -> None:
    """Notes that a stream sends now what was written then, if that is known."""
    if written_at is not None:
        # PostgreSQL's clock and ours differ a little.
        _event_to_browser.observe(max(time.time() - written_at, 0))


_used, _idle = _pool_connections.labels("used"), _pool_connections.labels("idle")


def note_pool(used: int, idle: int) -> None:
    _used.set(used)
    _idle.set(idle)


def note_pool_size(most: int) -> None:
    _pool_size.set(most)


class _Together(Collector):
    """All metrics of some collectors."""

    def __init__(self, *collectors: Collector) -> None:
        self._collectors = collectors

    def collect(self) -> Iterable[Metric]:
        for collector in self._collectors:
            yield from collector.collect()


def rendered(*more: Collector) -> bytes:
    """All metrics in Prometheus's text format: those of this process or, of several, their sums; then some more."""
    if _FOLDER is None:
        return generate_latest(_Together(REGISTRY, *more))
    for pid in _gone(Path(_FOLDER)):
        with suppress(FileNotFoundError):  # somebody else was asked at the same time
            mark_process_dead(pid, _FOLDER)  # type: ignore[no-untyped-call]
    everybody = MultiProcessCollector(None, _FOLDER)  # type: ignore[no-untyped-call]
    return generate_latest(_Together(everybody, *more))


def _gone(folder: Path) -> Iterator[int]:
    """The processes that are no more and have left numbers of things that were open."""
    for pid in {int(left.stem.rpartition("_")[2]) for left in folder.glob("gauge_live*.db")}:
        try:
            os.kill(pid, 0)
        except OSError:  # there is none, or by now it is somebody else's
            yield pid


if _FOLDER is None:
    # Of several processes nobody could say whose these are.
    ProcessCollector(registry=REGISTRY)
    GCCollector(registry=REGISTRY)
