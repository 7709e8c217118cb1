"""What frontends ask for: a run's status, and lists of runs."""

from benchmarks import load
from benchmarks.callbacks import stores
from benchmarks.databases import RUNS_OF_A_CONTEXT
from benchmarks.figures import Results
from benchmarks.rig import Rig
from benchmarks.titles import LONG_LIST, NEWEST, PEER, SHORT_LIST, STATUS

_POLLED = 100
_LIST = "/api/happyrobot/runs"


def measure(rig: Rig, results: Results) -> None:
    names, contexts = rig.names, rig.options.size.runs // RUNS_OF_A_CONTEXT
    reads = {
        STATUS: (32, f"/api/happyrobot/status?run_id={names.run}", _POLLED),
        SHORT_LIST: (32, f"{_LIST}?context_id={names.context}", contexts),
        LONG_LIST: (8, f"{_LIST}?context_id={names.long_context}1", 0),
        NEWEST: (8, _LIST, 0),
    }
    with stores(rig) as found:
        for name, (connections, before, many) in reads.items():
            for _ in rig.rounds(rig.options.size.rounds):
                for backend in found:
                    if name == NEWEST and backend.name == PEER:
                        continue  # it need not have a limit: the guide sets none
                    load.measure(rig, results, backend, name, "reads.lua", connections, BEFORE=before, MANY=str(many))
