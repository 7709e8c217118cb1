"""Starting workflows, where HappyRobot answers at once."""

from benchmarks import load
from benchmarks.callbacks import stores
from benchmarks.figures import Results
from benchmarks.rig import Rig
from benchmarks.titles import TRIGGERS

_MANY = 32


def measure(rig: Rig, results: Results) -> None:
    with stores(rig) as found:
        for _ in rig.rounds(rig.options.size.rounds):
            for backend in found:
                load.measure(rig, results, backend, TRIGGERS, "triggers.lua", _MANY, CONTEXT=rig.names.fresh())
        # That it is not the hook which is measured.
        with rig.turn():
            hook = load.wrk(rig.hook_url, "triggers.lua", _MANY, 1, CONTEXT=rig.names.fresh())
    results.notes.append(f"The hook that answers triggers takes {hook.rate:,.0f} requests a second by itself.")
