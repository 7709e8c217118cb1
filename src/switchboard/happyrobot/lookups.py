"""Asking where a run stands: everybody who wants to know at the same time shares one request to HappyRobot."""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Self, cast

from redis.asyncio import Redis

from switchboard.breaker import Breaker
from switchboard.happyrobot.client import BACKGROUND, Effort, HappyRobot, NoAnswer, NoTurn, Unreadable
from switchboard.happyrobot.records import RunRecord
from switchboard.settings import Settings
from switchboard.tables import RunStatus
from switchboard.tasks import end

SHARED_FOR = 2.0
"""Seconds for which an answer serves all who ask about its run, counted from when it was asked for."""

LONGEST_ANSWER = 8.0
"""Seconds after which HappyRobot counts as silent. Who cannot wait so long goes away; the question goes on."""

_SHARED_AT_LEAST = 0.5
"""Seconds for which an answer that took longer than that serves all the same."""

_LOOK_EVERY = 0.05
"""Seconds between looks for an answer that another process is waiting for."""

_UNDER_WAY, _NOTHING, _UNCLEAR = b"?", b"-", b"!"
"""What stands in Redis in place of a status: an answer is awaited (by whom); there was none; its word is unknown."""

_GIVE_UP = "if redis.call('get', KEYS[1]) == ARGV[1] then redis.call('del', KEYS[1]) end"


@dataclass(frozen=True, slots=True)
class Answer:
    """What HappyRobot said, or that it said nothing."""

    status: RunStatus | None = None
    asked: bool = True
    """Whether HappyRobot was asked, and had the time to answer: it is not while its pace is used up."""
    heard: bool = False
    """Whether it spoke of the run, if only in a word that we do not know."""


_NOT_ASKED = Answer(asked=False)


@dataclass(frozen=True, slots=True)
class _Shared:
    answer: Answer
    until: float


TakeIn = Callable[[str, RunRecord | None], Awaitable[None]]
"""Is told what HappyRobot said about a run, None if only that it knows it, before those who asked are."""


class Lookups:
    """One request per run and two seconds, for all browsers and workers of all processes."""

    def __init__(self, settings: Settings, happyrobot: HappyRobot, redis: Redis, take_in: TakeIn) -> None:
        self._happyrobot = happyrobot
        self._redis = redis
        self._take_in = take_in
        self._breaker = Breaker()
        # Runs have their ids from HappyRobot: whoever asks the same one asks the same question.
        host = hashlib.blake2b(settings.happyrobot_api_url.encode(), digest_size=8).hexdigest()
        self._prefix = f"switchboard:status:{host}:"
        self._asking: dict[str, asyncio.Task[_Shared]] = {}
        self._recent: dict[str, _Shared] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Answers until the block ends; whoever waits then is told nothing more."""
        try:
            yield self
        finally:
            await end(*self._asking.values())

    async def ask(self, run_id: str, effort: Effort, *, anew: bool = False) -> Answer:
        """What HappyRobot says about a run: a shared answer, or with `anew` one that it gives from now on.

        What it says is taken in by then. Who waits in vain, for as long as its effort allows, leaves the question under
        way: the answer is taken in all the same.
        """
        if anew:
            await self._outwait(run_id, effort)
        if effort is BACKGROUND:
            # Last, so that turns are not saved up; but before anybody else could come to wait for this question.
            try:
                await self._happyrobot.turn(effort)
            except NoTurn:
                return _NOT_ASKED
        recent = self._fresh(run_id)
        if recent is not None and (recent.answer.asked or effort is not BACKGROUND):
            return recent.answer
        asking = self._asking.get(run_id)
        if asking is None:
            asking = asyncio.create_task(self._ask(run_id, effort))
            self._asking[run_id] = asking
            asking.add_done_callback(lambda done: self._forget(run_id, done))
        done, _ = await asyncio.wait([asking], timeout=effort.timeout)
        return asking.result().answer if done else _NOT_ASKED

    def _fresh(self, run_id: str) -> _Shared | None:
        recent = self._recent.get(run_id)
        return recent if recent is not None and recent.until > time.monotonic() else None

    def _forget(self, run_id: str, done: asyncio.Task[_Shared]) -> None:
        del self._asking[run_id]
        if not done.cancelled():
            done.exception()  # whoever waits has it

    async def _ask(self, run_id: str, effort: Effort) -> _Shared:
        claim = _UNDER_WAY + secrets.token_bytes(8)
        mine = await self._breaker.call(lambda: self._claim(run_id, claim, effort), self._claim_alone)
        if not mine:
            return await self._breaker.call(lambda: self._theirs(run_id, effort), self._nothing)
        shared = _Shared(_NOT_ASKED, time.monotonic() + SHARED_FOR)
        try:
            shared = await self._upstream(run_id, effort)
        finally:
            # Also where it could not be taken in: the next one who asks need not wait until the claim is over.
            self._remember(run_id, shared)
            await self._breaker.call(lambda: self._tell(run_id, claim, shared), self._told_nobody)
        return shared

    async def _upstream(self, run_id: str, effort: Effort) -> _Shared:
        started = time.monotonic()
        try:
            if effort is not BACKGROUND:
                await self._happyrobot.turn(effort)
                started = time.monotonic()
            record = await self._happyrobot.run(run_id, Effort(0, LONGEST_ANSWER), turn_taken=True)
        except NoTurn:
            return _Shared(_NOT_ASKED, started + SHARED_FOR)
        except Unreadable:
            record = None
        except NoAnswer:
            return _Shared(Answer(), _until(started))
        await self._take_in(run_id, record)
        return _Shared(Answer(record.run_status if record else None, heard=True), _until(started))

    def _remember(self, run_id: str, shared: _Shared) -> None:
        now = time.monotonic()
        for stale in [known for known, answer in self._recent.items() if answer.until <= now]:
            del self._recent[stale]
        self._recent[run_id] = shared

    # What the processes tell each other, in Redis.

    async def _outwait(self, run_id: str, effort: Effort) -> None:
        """Waits until neither an answer nor a question from before now is there to be shared."""
        deadline = time.monotonic() + SHARED_FOR + effort.timeout
        while time.monotonic() < deadline:
            left = max(self._left_here(run_id), await self._breaker.call(lambda: self._left(run_id), self._none_left))
            if left <= 0 and run_id not in self._asking:
                return
            await asyncio.sleep(min(max(left, _LOOK_EVERY), 5 * _LOOK_EVERY))

    async def _left(self, run_id: str) -> float:
        milliseconds = int(await self._redis.pttl(self._prefix + run_id))
        # In its last millisecond it has none left, and is still there.
        return max(milliseconds, 1) / 1000 if milliseconds >= 0 else 0

    async def _none_left(self) -> float:
        return 0

    def _left_here(self, run_id: str) -> float:
        recent = self._fresh(run_id)
        return recent.until - time.monotonic() if recent is not None else 0

    async def _claim(self, run_id: str, claim: bytes, effort: Effort) -> bool:
        # For as long as the question may take: should this process be killed, others go without an answer until then.
        longest = LONGEST_ANSWER + (0 if effort is BACKGROUND else effort.patience) + 1
        if await self._redis.set(self._prefix + run_id, claim, nx=True, px=round(longest * 1000)):
            return True
        # Where the answer got lost, it was sent again, and refused because of itself.
        return bool(await self._redis.get(self._prefix + run_id) == claim)

    async def _claim_alone(self) -> bool:
        return True

    async def _theirs(self, run_id: str, effort: Effort) -> _Shared:
        """The answer that another process has, or waits for."""
        deadline = time.monotonic() + effort.timeout
        while time.monotonic() < deadline:
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.get(self._prefix + run_id)
            pipeline.pttl(self._prefix + run_id)
            said, left = await pipeline.execute()
            if said is None:
                break
            if not said.startswith(_UNDER_WAY):
                status = None if said in (_NOTHING, _UNCLEAR) else RunStatus(said.decode())
                answer = Answer(status, heard=said != _NOTHING)
                shared = _Shared(answer, time.monotonic() + max(left, 0) / 1000)
                self._remember(run_id, shared)
                return shared
            await asyncio.sleep(_LOOK_EVERY)
        return await self._nothing()

    async def _nothing(self) -> _Shared:
        return _Shared(_NOT_ASKED, 0)

    async def _tell(self, run_id: str, claim: bytes, shared: _Shared) -> None:
        if not shared.answer.asked:
            await cast("Awaitable[None]", self._redis.eval(_GIVE_UP, 1, self._prefix + run_id, claim))
            return
        left = max(1, round((shared.until - time.monotonic()) * 1000))
        await self._redis.set(self._prefix + run_id, _said(shared.answer), px=left)

    async def _told_nobody(self) -> None:
        pass


def _until(asked_at: float) -> float:
    return max(asked_at + SHARED_FOR, time.monotonic() + _SHARED_AT_LEAST)


def _said(answer: Answer) -> bytes:
    if answer.status is not None:
        return answer.status.encode()
    return _UNCLEAR if answer.heard else _NOTHING
