"""Whether what is stored slows down what comes: the same load on few events and on millions."""

from benchmarks import backends, databases, load
from benchmarks.backends import Backend
from benchmarks.figures import Results
from benchmarks.rig import Rig
from benchmarks.titles import GROWN, GROWN_CALLBACKS, GROWN_LIST, GROWN_NEWEST, GROWN_TIMELINE, GROWTH, SMALL

FEW_EVENTS = 5_000
EVENTS_OF_A_RUN = 5
_CONNECTIONS = 8
_IN_ONE_GO = 100_000
"""Runs that are written by one statement."""

# All but those that callbacks are sent for are over, as in any installation that has run for a while.
_RUNS = """
INSERT INTO agent_runs (run_id, context_id, name, status, metadata, created_at, updated_at, completed_at)
SELECT $1::text || i, $2::text || (i + 9) / 10, 'Carrier check call',
       CASE WHEN i % $3::int = 0 THEN 'RUNNING' ELSE 'COMPLETED' END,
       CASE WHEN i % $3::int = 0 THEN '{}'::jsonb ELSE '{"result": {"outcome": "booked"}}' END,
       began, began + interval '1 minute', CASE WHEN i % $3::int = 0 THEN NULL ELSE began + interval '1 minute' END
FROM generate_series($4::int, $5::int) i, LATERAL (SELECT now() - interval '1 second' * ($6::int - i) / 10 AS began) t
"""
# A thousand calls at a time: what a run says lies between what others say.
_EVENTS = """
INSERT INTO run_events (run_id, context_id, event_type, status, data, occurred_at, created_at, dedupe_key)
SELECT $1::text || i, $2::text || (i + 9) / 10, 'log', 'RUNNING',
       '{"message": "The agent has asked for the reference number", "level": "info"}', at, at, gen_random_uuid()
FROM generate_series($3::int, $4::int) i, generate_series(1, $6::int) number,
     LATERAL (SELECT now() - interval '1 second' * ($5::int - i) / 10 AS at) t
ORDER BY i / 1000, number, i
"""


def measure(rig: Rig, results: Results) -> None:
    events = rig.options.size.grown_events
    few, many = FEW_EVENTS // EVENTS_OF_A_RUN, events // EVENTS_OF_A_RUN
    with backends.switchboard(rig, SMALL) as small, backends.switchboard(rig, GROWN) as grown:
        for backend, runs in ((small, few), (grown, many)):
            _fill(rig, backend, runs, runs // few)
        for name in GROWTH:
            for _ in rig.rounds(rig.options.size.rounds):
                for backend, runs in ((small, few), (grown, many)):
                    _measure(rig, results, backend, name, few, runs // few)
    results.notes.append(
        f"What has grown has {events:,} events of {many:,} runs, what is small {FEW_EVENTS:,} events of {few:,} runs."
    )


def _measure(rig: Rig, results: Results, backend: Backend, name: str, runs: int, step: int) -> None:
    names = rig.names
    if name == GROWN_CALLBACKS:
        values = {"RUN": names.run, "RUNS": str(runs), "STEP": str(step), "MARK": names.fresh()}
        load.measure(rig, results, backend, name, "callbacks.lua", _CONNECTIONS, **values)
        return
    addresses = {
        GROWN_LIST: {"BEFORE": f"/api/happyrobot/runs?context_id={names.context}", "MANY": str(runs * step // 10)},
        GROWN_NEWEST: {"BEFORE": "/api/happyrobot/runs"},
        GROWN_TIMELINE: {
            "BEFORE": f"/api/happyrobot/runs/{names.run}",
            "AFTER": "/events?limit=100",
            "MANY": str(runs),
            "STEP": str(step),
        },
    }
    load.measure(rig, results, backend, name, "reads.lua", _CONNECTIONS, **addresses[name])


def _fill(rig: Rig, backend: Backend, runs: int, step: int) -> None:
    """Writes runs of five events each, by SQL; one in `step` is under way."""
    url, names = backend.database_url, rig.names
    assert url is not None
    for first in range(1, runs + 1, _IN_ONE_GO):
        last = min(first + _IN_ONE_GO - 1, runs)
        with rig.turn():
            databases.execute(url, _RUNS, names.run, names.context, step, first, last, runs)
            databases.execute(url, _EVENTS, names.run, names.context, first, last, runs, EVENTS_OF_A_RUN)
        rig.say(f"{backend.name}: {last:,} runs of {runs:,} written")
    with rig.turn():
        databases.execute(url, "VACUUM ANALYZE agent_runs")
    with rig.turn():
        databases.execute(url, "VACUUM ANALYZE run_events")
    databases.execute(url, "CHECKPOINT")
