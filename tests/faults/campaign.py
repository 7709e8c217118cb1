"""Rounds: parts fail at random while everybody is at work, then everything has to be as it was acknowledged."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import httpx

from switchboard.clients import Client
from tests.faults.actors import PATIENCE, PLAIN, Browser, Cast
from tests.faults.check import examine
from tests.faults.harm import FAULTS, Fault
from tests.faults.ledger import KEPT_FOR, Book, Outages
from tests.faults.parts import Size
from tests.faults.recovery import until_well
from tests.faults.scene import Scene

_ROOM, _FILES = 50_000_000, 60
"""Bytes (and a fifth) and open files that a process may have more of than after its first round: pools and caches fill
up, and browsers whose round is open stay."""


_BEGINS_WITHIN = 60.0
"""Seconds; no more than a bound on a hang."""


@dataclass
class Tally:
    """What a campaign has done."""

    rounds: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    callbacks: int = 0
    """Acknowledged, HappyRobot's and our own."""
    calls: int = 0
    """Triggers and executions that were accepted."""
    uncalled: int = 0
    """Of these, executions whose calls were given up and said so."""
    refusals: list[float] = field(default_factory=list)
    """Seconds after which requests were answered 503."""
    events: int = 0
    """At browsers."""
    streams: int = 0
    webhooks: int = 0
    slowest: float = 0.0
    """Seconds until everything served again, at most."""
    sizes: dict[str, list[Size]] = field(default_factory=dict)
    """Of each process after each round."""


_ANSWERED = {
    **dict.fromkeys(("a trigger", "a decision", "a status", "a run", "a list", "a timeline", "a callback"), 200),
    "an execution": 202,
    "a cancellation": 200,
}
"""Requests of which each campaign must have seen one that was answered so."""


class Broken(Exception):
    """A promise was not kept."""

    def __init__(self, what: str, findings: Iterable[str] = ()) -> None:
        super().__init__("\n  ".join([what, *findings]))


class Campaign:
    """Rounds on one scene. Raises Broken as soon as something is wrong, or stays open for too long."""

    def __init__(
        self,
        scene: Scene,
        *,
        say: Callable[[str], None] = lambda _: None,
        back_within: float = 10,
        goes_on_after: float = 12,
        closes_within: float = 400,
        alone: bool = True,
        load: float = 1.0,
    ) -> None:
        """All in seconds; `alone` where nothing else runs on this machine that could be why something is slow.

        `back_within` so many after the faults' end everything has to serve again. `goes_on_after` so many the next
        round begins, and what is open is looked at again; `closes_within` so many it must have come out right: somebody
        who was killed counts as gone after two minutes, and later where nobody can be asked just then. `load` is how
        much is asked for in a second, as a share of the usual.
        """
        self.scene = scene
        self.tally = Tally()
        self._say = say
        self._back_within, self._goes_on_after, self._closes_within = back_within, goes_on_after, closes_within
        self._outages = Outages(alone=alone)
        self._load = load
        self._open: list[Cast] = []
        self._closed: list[Cast] = []

    async def __aenter__(self) -> Self:
        await until_well(self.scene, _BEGINS_WITHIN)
        return self

    async def __aexit__(self, _: object, error: object, __: object) -> None:
        for cast in self._open:
            await cast.leave()
        if isinstance(error, Broken):
            for part in self.scene.processes.values():
                self._say(f"{part.name} logged at last:\n{part.last_words()}")

    async def round(self, plan: Sequence[tuple[float, Fault, float]]) -> None:
        """One round: each fault begins after so many seconds and lasts for so many."""
        scene, number = self.scene, self.tally.rounds
        self.tally.rounds += 1
        book = Book(number, [f"context-{number}-{letter}" for letter in "abcd"], self._outages)
        cast = Cast(scene, book, self._client(), self._client(), self._client(), self._client())
        self._open.append(cast)
        newest = await scene.newest_event()
        for context_id, manner in zip(book.contexts, ("reads", "slow", "stalls", "leaves"), strict=True):
            Browser(cast, {"context_id": context_id}, None if manner == "leaves" else newest, manner).start()
        for manner in ("leaves", "stalls"):
            Browser(cast, {}, newest, manner).start()
        for deed, a_second in (
            (cast.place_a_call, 3),
            (cast.execute_an_agent, 1.5),
            (cast.call_back, 12),
            (cast.look, 5),
            (cast.follow_a_run, 0.5),
            (cast.cancel, 0.2),
        ):
            cast.repeat(deed, self._load * a_second)
        async with asyncio.TaskGroup() as group:
            for each in plan:
                group.create_task(self._harm(book, *each))
        ended = time.monotonic()
        try:
            recovery = await until_well(scene, self._back_within)
        except TimeoutError as error:
            raise Broken(f"{_about(book)}: not back within {self._back_within} s: {error}") from None
        self._outages.end()
        self.tally.slowest = max(self.tally.slowest, recovery.took)
        await asyncio.sleep(scene.chance.uniform(0.3, 1.0))  # at work as before
        cast.stop()
        book.ended = time.monotonic()
        self._say(
            f"round {number}: {'; '.join(book.faults)} ({ended - book.began:.1f} s, back after {recovery.took:.1f} s), "
            f"{len(book.intents)} calls, {len(book.acknowledged)} callbacks acknowledged"
        )
        if recovery.took > self._back_within / 3:
            self._say(f"  at last {recovery.slowest}")
        await self._close(book.ended + self._goes_on_after)
        self._mind_surprises()
        self._measure()

    def _client(self) -> httpx.AsyncClient:
        # httpx looks through all connections at each request.
        limits = httpx.Limits(max_connections=40, keepalive_expiry=KEPT_FOR)
        return Client(base_url=self.scene.front.url, timeout=PATIENCE, limits=limits, verify=PLAIN)

    async def finish(self) -> Tally:
        """Waits until every round has come out right."""
        while self._open:
            await self._close(max(cast.book.ended for cast in self._open) + self._closes_within)
        await self._settle()
        # Nothing that came later may have changed what was right: somebody who woke up, or took over.
        for cast in self._closed:
            found = await examine(cast)
            if findings := found.wrong + found.open:
                raise Broken(f"{_about(cast.book)}, afterwards:", findings)
            self.tally.uncalled += found.uncalled
        self._mind_surprises()
        if unanswered := [what for what in _ANSWERED if not self.tally.answers[f"{what} {_ANSWERED[what]}"]]:
            raise Broken(f"nobody was ever answered {', '.join(unanswered)}")
        self.tally.callbacks += len(self.scene.said.acknowledged)
        self.tally.webhooks = sum(len(customer.receiver.requests) for customer in self.scene.customers)
        return self.tally

    async def _harm(self, book: Book, after: float, fault: Fault, lasts: float) -> None:
        await asyncio.sleep(after)
        book.faults.append(fault.name)
        self.tally.faults[fault.name] += 1
        self._outages.begin(fault.on)
        until = time.monotonic() + lasts
        await fault.begin(self.scene)
        await asyncio.sleep(until - time.monotonic())
        await fault.end(self.scene)

    async def _close(self, deadline: float) -> None:
        """Looks at the rounds that are open until they are right, or it is time to go on."""
        while True:
            for cast in list(self._open):
                await self._look(cast)
            if not self._open:
                return
            if time.monotonic() > deadline:
                for cast in self._open:
                    self._say(f"  round {cast.book.number} is open: {'; '.join(cast.waits_for[:3])}")
                return
            await asyncio.sleep(0.3)

    async def _look(self, cast: Cast) -> None:
        book, done = cast.book, cast.done
        found = await examine(cast)
        if found.wrong:
            raise Broken(f"{_about(book)}:", found.wrong)
        cast.waits_for = [*found.open, *found.unseen, *([] if done else ["a client waits"])]
        if not cast.waits_for:
            self._open.remove(cast)
            self._closed.append(cast)
            await cast.leave()
            self._count(cast)
        elif time.monotonic() > book.ended + self._closes_within:
            raise Broken(f"{_about(book)} is open after {self._closes_within} s:", cast.waits_for)

    def _mind_surprises(self) -> None:
        """Raises Broken for what belongs to no round: a process that ended by itself, an answer to HappyRobot."""
        scene = self.scene
        if surprises := [*scene.said.complaints, *(it for part in scene.processes.values() for it in part.surprises)]:
            raise Broken(f"by round {self.tally.rounds - 1}:", surprises)

    async def _settle(self) -> None:
        """Waits until everything is done. Raises Broken where something is left for ever."""
        deadline = time.monotonic() + self._closes_within
        while left := await self.scene.leftovers():
            if time.monotonic() > deadline:
                raise Broken(f"{self._closes_within} s after all that was asked for:", left[:20])
            await asyncio.sleep(0.3)

    def _measure(self) -> None:
        """Notes how large the processes are. Raises Broken for one that has grown since it was started."""
        for name, part in self.scene.processes.items():
            size = part.size()
            sizes = self.tally.sizes.setdefault(name, [])
            sizes.append(size)
            first = next(each for each in sizes if each.pid == size.pid)
            if size.memory > 1.2 * first.memory + _ROOM or size.files > first.files + _FILES * (1 + len(self._open)):
                raise Broken(f"after round {self.tally.rounds - 1} {name} has grown from {first} to {size}")

    def _count(self, cast: Cast) -> None:
        book, tally = cast.book, self.tally
        if not (book.acknowledged and any(intent.accepted for intent in book.intents)):
            raise Broken(f"{_about(book)}: nothing was accepted")
        tally.answers += book.answers
        tally.callbacks += len(book.acknowledged)
        tally.calls += sum(intent.accepted for intent in book.intents)
        tally.events += sum(len(browser.seen) for browser in cast.browsers)
        tally.streams += sum(browser.streams for browser in cast.browsers)
        tally.refusals += book.refusals


def _about(book: Book) -> str:
    return f"round {book.number} ({'; '.join(book.faults)})"


def drawn(scene: Scene, chance: random.Random) -> list[tuple[float, Fault, float]]:
    """One to three faults of different parts, at random times."""
    plan: list[tuple[float, Fault, float]] = []
    possible = [fault for fault in FAULTS if fault.possible(scene)]
    for _ in range(chance.choices([1, 2, 3], [4, 4, 2])[0]):
        taken = {fault.on for _, fault, _ in plan}
        fault = chance.choice([fault for fault in possible if fault.on not in taken])
        plan.append((chance.uniform(0.3, 2.5), fault, chance.choices(*_LASTS)[0] * chance.uniform(0.5, 1.5)))
    return plan


_LASTS = (0.2, 1.0, 2.0, 4.0, 16.0), (4, 4, 4, 3, 1)
"""Seconds, more or less, and how often: some are so long that others take over what somebody was doing."""
