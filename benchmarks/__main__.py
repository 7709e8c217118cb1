"""Measures Switchboard beside others and writes RESULTS.md. README.md says what can be asked of it."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks import callbacks, fanout, growth, machine, memory, reads, report, triggers
from benchmarks.children import ChildFailed
from benchmarks.figures import Results
from benchmarks.load import LoadFailed
from benchmarks.options import QUICK, Options, Unusable
from benchmarks.rig import allow_files, leave_in_order, require_tools, standing
from switchboard.embedded import EmbeddedUnavailable

MEASURES = {
    "callbacks": callbacks.measure_spread,
    "one_run": callbacks.measure_one_run,
    "lives": callbacks.measure_lives,
    "triggers": triggers.measure,
    "reads": reads.measure,
    "fanout": fanout.measure,
    "memory": memory.measure,
    "growth": growth.measure,
}
"""By the groups that can be asked for."""


def main() -> int:
    leave_in_order()
    try:
        options = Options.read(os.environ, Path(__file__).with_name("RESULTS.md"))
        require_tools()
        allow_files()
        written = _measured(options)
    except Unusable as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except (ChildFailed, LoadFailed, EmbeddedUnavailable, subprocess.SubprocessError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    if options.report is None:
        print(written)
    else:
        options.report.write_text(written)
        print(f"written to {options.report}")
    return 0


def _measured(options: Options) -> str:
    results = Results()
    with standing(options) as rig:
        here = machine.here(rig.folder, rig.database_url, is_ours=options.database_url is None)
        for group in options.groups:
            rig.say(f"── {group}")
            MEASURES[group](rig, results)
    return report.render(results, here, quick=options.size is QUICK)


if __name__ == "__main__":
    sys.exit(main())
