"""The short form of the campaigns, and what they are worth: each way to break the service has to be noticed."""

import asyncio
import contextlib
import fcntl
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from tests.faults.campaign import Broken, Campaign
from tests.faults.harm import Fault, named
from tests.faults.parts import FullDisk
from tests.faults.scene import Scene, staged
from tests.faults.variants import VARIANTS

Plan = Sequence[tuple[float, str, float]]
"""Which faults begin after how many seconds, and how many they last."""

SHORT: Sequence[Plan] = (
    [
        (0.5, "one is killed", 0.3),
        (0.7, "the way to Valkey swallows everything", 1.5),
        (0.6, "customers do not answer", 1.0),
    ],
    [(0.5, "PostgreSQL crashes", 0.2), (0.8, "the way to the front breaks half-way", 0.5)],
    [(0.4, "the way to PostgreSQL swallows everything", 2.0), (0.6, "worker is killed", 0.2)],
    [(0.4, "the disk of PostgreSQL is full", 1.0), (0.5, "the clock is ahead", 1.0), (0.8, "Valkey is killed", 0.5)],
    [(0.3, "the way to HappyRobot loses answers", 2.0)],
)

UNEXPLAINED = "a callback was answered 503, and nothing explains it"

CAUGHT: dict[str, tuple[Plan, str]] = {
    "copies count": ([(0.3, "the way to the front loses answers", 0.5)], "times"),
    "answers first": (
        [(0.5 + 0.4 * number, "the way to PostgreSQL breaks for a moment", 0.0) for number in range(5)],
        "acknowledged, and is not there|has besides",
    ),
    "resumes late": ([(0.5, "the way to the front breaks for a moment", 1.0)], "misses"),
    "calls again": ([(0.5, "the way to HappyRobot loses answers", 1.0)], "was called 2 times"),
    "remembers webhooks": ([(1.0, "all that serve are killed", 0.1), (1.5, "worker is killed", 0.1)], "was not told"),
    "goes back": ([(2.0, "Valkey is flushed", 0.1)], "was [A-Z]+, then"),
    "loses contents": ([(0.5, "Valkey is flushed", 0.1)], "is there as"),
    "names wrongly": ([(0.5, "Valkey is flushed", 0.1)], "has the id"),
    "goes on behind gaps": ([(0.3, "the way to Valkey swallows everything", 2.0)], "misses"),
    "signs wrongly": ([(0.5, "Valkey is flushed", 0.1)], "is not right"),
    "turns decisions": ([(2.0, "Valkey is flushed", 0.1)], "HappyRobot was told"),
    "forgets what is held": ([(2.0, "Valkey is flushed", 0.1)], "was held, and is not there"),
    "stops nobody": ([(2.0, "Valkey is flushed", 0.1)], "goes on"),
    "stops others": ([(2.0, "Valkey is flushed", 0.1)], "and nobody wants that"),
    "tells of calls that were not placed": (
        [(0.5, "the way to HappyRobot is cut", 4.0)],
        "has started, and it has no run",
    ),
    "ends without PostgreSQL": ([(0.5, "the way to PostgreSQL is cut", 1.5)], "ended by itself"),
    "works no more": ([(0.5, "the way to PostgreSQL is cut", 1.5)], "not back within"),
    "forgets who is behind": ([(4.0, "Valkey is flushed", 0.1)], "misses"),
    "needs Redis": ([(0.5, "the way to Valkey is cut", 2.0)], UNEXPLAINED),
    "grows": ([(2.0, "Valkey is flushed", 0.1)], "has grown"),
}
"""What each variant has to be caught by, and in which words."""

_IN_COMPANY: dict[str, Any] = {"back_within": 45, "closes_within": 60, "alone": False}
"""What is asked of campaigns beside another one: rounds that are not right by then are taken for wrong."""

_SURELY = 10
"""Rounds in which a promise that is broken is put to the test: what callers ask for, and when, is up to chance."""


@pytest.fixture
async def scene(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Scene]:
    variant = getattr(request, "param", "")
    # One at a time, for all workers: beside others it would be slow without a fault.
    with (tmp_path.parent / "scene").open("w") as turn:
        await asyncio.to_thread(fcntl.flock, turn, fcntl.LOCK_EX)
        async with staged(random.Random(1), tmp_path, variant=variant, haste=True) as scene:
            yield scene


def drawn_up(scene: Scene, plan: Plan) -> list[tuple[float, Fault, float]]:
    """Without what this user may not do."""
    return [(after, named(name), lasts) for after, name, lasts in plan if named(name).possible(scene)]


async def test_nothing_is_lost_whatever_fails(scene: Scene):
    # Other tests want the processors, too: how soon everything is back is measured by `make faults`. With all of the
    # load calls would go on for longer, and be asked about while they do, which makes them longer still.
    async with Campaign(scene, say=print, back_within=60, goes_on_after=0, alone=False, load=0.5) as campaign:
        for plan in SHORT:
            await campaign.round(drawn_up(scene, plan))
        # A worker settles what those have left that were killed when it starts, and not a minute later.
        await scene.until_overdue()
        worker = scene.processes["worker"]
        await worker.end(signal.SIGTERM)
        worker.want()
        tally = await campaign.finish()
    assert tally.faults.total() == sum(len(drawn_up(scene, plan)) for plan in SHORT)
    assert tally.calls
    assert tally.callbacks


@pytest.mark.parametrize("killed", [True, False])
def test_whoever_is_killed_leaves_nothing_running(tmp_path: Path, *, killed: bool):
    program = "import sys; from pathlib import Path; from tests.faults.guard import guarded\n"
    program += "with guarded(Path(sys.argv[1])): print(flush=True); input()"
    inside = tmp_path / "inside"
    inside.mkdir()
    with contextlib.ExitStack() as stack:
        disk = FullDisk(inside, 1)
        stack.callback(disk.unmount)
        server = stack.enter_context(subprocess.Popen(["sleep", "600"], cwd=inside))
        stack.callback(server.kill)
        suite = stack.enter_context(
            subprocess.Popen([sys.executable, "-c", program, tmp_path], stdin=PIPE, stdout=PIPE)
        )
        stack.callback(suite.kill)
        assert suite.stdout is not None
        assert suite.stdout.readline()
        guard = psutil.Process(suite.pid).children()[0]
        if killed:
            suite.kill()
        else:
            suite.communicate(b"\n")
        guard.wait(30)
        assert (server.poll() is None) is not killed
        assert inside.is_mount() is (disk.mounted and not killed)


@pytest.mark.large
async def test_it_is_not_the_faults_that_are_caught(scene: Scene):
    plans = {tuple(plan): plan for plan, _ in CAUGHT.values()}
    async with Campaign(scene, say=print, **_IN_COMPANY | {"closes_within": 120}, goes_on_after=0) as campaign:
        for plan in plans.values():
            await campaign.round(drawn_up(scene, plan))
        tally = await campaign.finish()
    assert tally.rounds == len(plans) > 5


@pytest.mark.large
@pytest.mark.parametrize("scene", sorted(VARIANTS), indirect=True)
async def test_a_service_that_breaks_a_promise_is_caught(scene: Scene, request: pytest.FixtureRequest):
    plan, words = CAUGHT[request.node.callspec.params["scene"]]

    async def rounds() -> None:
        async with Campaign(scene, say=print, **_IN_COMPANY | {"alone": words == UNEXPLAINED}) as campaign:
            for _ in range(_SURELY):
                await campaign.round(drawn_up(scene, plan))
            await campaign.finish()

    with pytest.raises(Broken, match=words):
        await rounds()
