"""What goes wrong: each fault begins, lasts for a while, and ends."""

import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.faults.parts import Part
from tests.faults.scene import Scene
from tests.wires import Wire

Deed = Callable[[Scene], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    name: str
    on: str
    """The part that it is about: two faults of the same part do not happen at once."""
    begin: Deed
    end: Deed
    possible: Callable[[Scene], bool] = lambda _: True


async def _nothing(_: Scene) -> None:
    pass


def _of_a_part(name: str, find: Callable[[Scene], Part]) -> list[Fault]:
    """What can happen to any program."""

    async def kill(scene: Scene) -> None:
        await find(scene).kill()

    async def pause(scene: Scene) -> None:
        find(scene).send(signal.SIGSTOP)

    async def go_on(scene: Scene) -> None:
        find(scene).send(signal.SIGCONT)

    async def stop(scene: Scene) -> None:
        # PostgreSQL takes this for "fast"; to all others it is one way to ask.
        await find(scene).end(signal.SIGINT)

    async def start(scene: Scene) -> None:
        find(scene).want()
        await find(scene).until_ready()

    async def ready(scene: Scene) -> None:
        await find(scene).until_ready()

    return [
        Fault(f"{name} is killed", name, kill, ready),
        Fault(f"{name} hangs", name, pause, go_on),
        Fault(f"{name} is stopped", name, stop, start),
    ]


def _of_a_wire(name: str, find: Callable[[Scene], Wire]) -> list[Fault]:
    """What can happen on the way to a part."""

    async def restore(scene: Scene) -> None:
        await find(scene).restore()

    def fault(what: str, deed: Callable[[Wire, random.Random], None]) -> Fault:
        async def begin(scene: Scene) -> None:
            deed(find(scene), scene.chance)

        return Fault(f"the way to {name} {what}", name, begin, restore)

    return [fault(what, deed) for what, deed in _TO_A_WIRE.items()]


def _cut(wire: Wire, _: random.Random) -> None:
    wire.refuse()
    wire.cut()


def _break_late(wire: Wire, chance: random.Random) -> None:
    wire.cut()
    wire.left = chance.randrange(1, 3000)


def _mute(wire: Wire, _: random.Random) -> None:
    wire.mute = True
    wire.cut()


def _delay(wire: Wire, chance: random.Random) -> None:
    wire.delay = chance.uniform(0.002, 0.02)


def _throttle(wire: Wire, chance: random.Random) -> None:
    wire.rate = chance.uniform(20_000, 200_000)


_TO_A_WIRE: dict[str, Callable[[Wire, random.Random], None]] = {
    "is cut": _cut,
    "breaks for a moment": lambda wire, _: wire.cut(),
    "breaks half-way": _break_late,
    "loses answers": _mute,
    "is held up": lambda wire, _: wire.hold(),
    "swallows everything": lambda wire, _: wire.lose(),
    "is slow": _delay,
    "is narrow": _throttle,
    "is half-closed": lambda wire, chance: wire.half_close(chance),
}


async def _crash(scene: Scene) -> None:
    """All its processes at once, in the middle of whatever they do."""
    scene.postgres.send(signal.SIGQUIT)
    await scene.postgres.kill()


async def _kill_a_session(scene: Scene) -> None:
    """PostgreSQL then ends all others, and recovers by itself."""
    await scene.postgres.kill_a_child(scene.chance)


async def _postgres_ready(scene: Scene) -> None:
    await scene.postgres.until_ready()


async def _fill(scene: Scene) -> None:
    await scene.disk.fill()


async def _free(scene: Scene) -> None:
    scene.disk.free()
    await scene.postgres.until_ready()


async def _flush(scene: Scene) -> None:
    await scene.flush_valkey()


async def _no_service(scene: Scene) -> None:
    for part in scene.serving:
        await part.kill()


async def _no_worker(scene: Scene) -> None:
    for part in scene.working:
        await part.kill()


async def _all_ready(scene: Scene) -> None:
    for part in scene.processes.values():
        await part.until_ready()


def _clock(hours: float) -> Deed:
    async def set_it(scene: Scene) -> None:
        scene.set_clock(hours * 3600 * scene.chance.uniform(0.5, 1.5))

    return set_it


async def _clock_right(scene: Scene) -> None:
    scene.set_clock(0.0)


def _moods(*moods: str) -> Deed:
    async def take(scene: Scene) -> None:
        for customer, mood in zip(scene.customers, moods, strict=True):
            customer.mood = mood

    return take


FAULTS: tuple[Fault, ...] = (
    *_of_a_part("one", lambda scene: scene.processes["one"]),
    *_of_a_part("other", lambda scene: scene.processes["other"]),
    *_of_a_part("worker", lambda scene: scene.processes["worker"]),
    *_of_a_part("other worker", lambda scene: scene.processes["other worker"]),
    Fault("all that serve are killed", "one", _no_service, _all_ready),
    Fault("all workers are killed", "worker", _no_worker, _all_ready),
    *_of_a_part("PostgreSQL", lambda scene: scene.postgres),
    Fault("PostgreSQL crashes", "PostgreSQL", _crash, _postgres_ready),
    Fault("a session of PostgreSQL is killed", "PostgreSQL", _kill_a_session, _postgres_ready),
    Fault("the disk of PostgreSQL is full", "PostgreSQL", _fill, _free, lambda scene: scene.disk.mounted),
    *_of_a_wire("PostgreSQL", lambda scene: scene.to_postgres),
    *_of_a_part("Valkey", lambda scene: scene.valkey),
    Fault("Valkey is flushed", "Valkey", _flush, _nothing),
    *_of_a_wire("Valkey", lambda scene: scene.to_valkey),
    *_of_a_wire("HappyRobot", lambda scene: scene.to_happyrobot),
    *_of_a_wire("the front", lambda scene: scene.front),
    Fault("the clock is ahead", "the clock", _clock(1), _clock_right),
    Fault("the clock is behind", "the clock", _clock(-1), _clock_right),
    Fault("customers do not answer", "customers", _moods("never", "never", "never"), _moods("well", "badly", "late")),
    Fault("customers answer badly", "customers", _moods("badly", "badly", "badly"), _moods("well", "badly", "late")),
)


def named(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)
