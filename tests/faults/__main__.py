"""`make faults`: campaigns for so many minutes, each with a seed of its own."""

import argparse
import asyncio
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

import uvloop

from switchboard.settings import Settings
from tests.faults.campaign import Broken, Campaign, Tally, drawn
from tests.faults.harm import FAULTS
from tests.faults.scene import staged
from tests.faults.variants import VARIANTS


async def _campaign(seed: int, minutes: float, variant: str, folder: Path) -> Tally:
    # Told to stop, it clears up as it does when it is interrupted.
    whole = asyncio.current_task()
    assert whole is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, whole.cancel)
    # What goes wrong is drawn apart, so that a seed names it, whatever everybody else makes of it.
    plans = random.Random(seed)
    async with (
        staged(random.Random(seed), folder, durable=True, variant=variant) as scene,
        Campaign(scene, say=_say) as campaign,
    ):
        if impossible := [fault.name for fault in FAULTS if not fault.possible(scene)]:
            _say(f"left out, as only root may: {', '.join(impossible)}")
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            await campaign.round(drawn(scene, plans))
        return await campaign.finish()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _report(seed: int, tally: Tally) -> None:
    _say(f"seed {seed}: nothing lost in {tally.rounds} rounds with {tally.faults.total()} faults")
    _say(f"  acknowledged: {tally.callbacks} callbacks, {tally.calls} calls; {tally.events} events at browsers")
    _say(f"  in {tally.streams} streams, {tally.webhooks} webhooks; back after {tally.slowest:.1f} s at most")
    _say(f"  {tally.uncalled} calls were given up, and said so")
    if refusals := sorted(tally.refusals):
        usually, seldom = (refusals[int(share * len(refusals))] for share in (0.5, 0.99))
        _say(f"  503 after {usually:.2f} s, of a hundred one after {seldom:.2f} s, {refusals[-1]:.2f} s at most")
    for name, times in sorted(tally.faults.items()):
        _say(f"  {times:4} {name}")
    for name, times in sorted(tally.answers.items()):
        _say(f"  {times:6} {name}")
    for name, sizes in tally.sizes.items():
        lives = [list(life) for _, life in groupby(sizes, key=lambda size: size.pid)]
        longest = max(lives, key=len)
        grown = max(life[-1].memory - life[0].memory for life in lives)
        some = [longest[place] for place in (0, len(longest) // 2, -1)]
        _say(
            f"  {name}: {len(lives)} processes, one for {len(longest)} rounds:"
            f" {', then '.join(f'{size.memory >> 20} MB and {size.files} files' for size in some)};"
            f" none grew by more than {grown >> 20} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--seeds", type=int, default=1, help="How many, where none is given.")
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="")
    given = parser.parse_args()
    for name in list(os.environ):
        if name.lower() in Settings.model_fields:
            del os.environ[name]
    logging.getLogger("uvicorn.error").disabled = True  # of the simulator, which is told to fail
    seeds = given.seed or [random.SystemRandom().randrange(1_000_000) for _ in range(given.seeds)]
    for seed in seeds:
        folder = Path(tempfile.mkdtemp(prefix="switchboard-faults-"))
        folder.chmod(0o755)
        _say(f"seed {seed}, {given.minutes:g} minutes, in {folder}")
        try:
            tally = uvloop.run(_campaign(seed, given.minutes, given.variant, folder))
        except Broken as broken:
            sys.exit(f"seed {seed}: {broken}\n(logs are in {folder})")
        except (KeyboardInterrupt, asyncio.CancelledError):
            shutil.rmtree(folder)
            sys.exit(f"seed {seed}: interrupted")
        except Exception:
            _say(f"seed {seed}: the suite itself failed (logs are in {folder})")
            raise
        _report(seed, tally)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
