"""Asking where a run stands: everybody who wants to know at the same time shares one request to HappyRobot."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Annotated, Self

from fastapi import Depends
from redis.asyncio import Redis
from starlette.requests import HTTPConnection

from switchboard.breaker import Breaker
from switchboard.happyrobot.client import BACKGROUND, POLL, Effort, HappyRobot, NoAnswer, NoTurn
from switchboard.happyrobot.records import RunRecord
from switchboard.settings import Settings
from switchboard.tables import RunStatus

SHARED_FOR = 2.0
"""Seconds for which an answer serves all who ask about its run, counted from when it was asked for."""

_LOOK_EVERY = 0.05
"""Seconds between looks for an answer that another process is waiting for."""

_UNDER_WAY, _NOTHING, _UNCLEAR = b"?", b"-", b"!"
"""What stands in Redis in place of a status: an answer is awaited; there was none; it had a word that nobody knows."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What HappyRobot said, or that it said nothing."""

    status: RunStatus | None = None
    record: RunRecord | None = None
    """All of it, for the one who asked, where one request brings it all."""
    mine: bool = False
    """Whether this is the one who asked; the others share the answer."""
    asked: bool = True
    """Whether HappyRobot was asked at all: it is not while its pace is used up."""
    heard: bool = False
    """Whether it spoke of the run, if only in a word that we do not know."""


@dataclass(frozen=True, slots=True)
class _Shared:
    answer: Answer
    until: float


class Lookups:
    """One request per run and two seconds, for all browsers and workers of all processes."""

    def __init__(self, settings: Settings, happyrobot: HappyRobot, redis: Redis) -> None:
        self._happyrobot = happyrobot
        self._redis = redis
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
            asking = list(self._asking.values())
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def ask(self, run_id: str, effort: Effort, *, anew: bool = False) -> Answer:
        """What HappyRobot says about a run: a shared answer, or with `anew` one that it gives from now on."""
        if not anew and (recent := self._fresh(run_id)) is not None:
            return recent.answer
        asking = self._asking.get(run_id)
        if anew or asking is None:
            if asking is not None:
                await asyncio.wait([asking])
            asking = asyncio.create_task(self._ask(run_id, effort, anew=anew))
            self._asking[run_id] = asking
            asking.add_done_callback(lambda done: self._forget(run_id, done))
        # Shielded: a browser that hangs up takes nobody else's answer with it.
        return (await asyncio.shield(asking)).answer

    def _fresh(self, run_id: str) -> _Shared | None:
        recent = self._recent.get(run_id)
        return recent if recent is not None and recent.until > time.monotonic() else None

    def _forget(self, run_id: str, done: asyncio.Task[_Shared]) -> None:
        if self._asking.get(run_id) is done:
            del self._asking[run_id]
        if not done.cancelled():
            done.exception()  # whoever waits has it

    async def _ask(self, run_id: str, effort: Effort, *, anew: bool) -> _Shared:
        if anew:
            await self._outwait(run_id)
        if effort is BACKGROUND:
            # It may wait long for its turn, and holds up nobody who asks about the same run meanwhile.
            try:
                await self._happyrobot.turn(effort)
            except NoTurn:
                return _Shared(Answer(asked=False), 0)
        mine = await self._breaker.call(lambda: self._claim(run_id, effort), lambda: self._claim_alone(run_id))
        if not mine:
            return await self._breaker.call(lambda: self._theirs(run_id, effort), self._nothing)
        shared = await self._upstream(run_id, effort)
        self._remember(run_id, shared)
        await self._breaker.call(lambda: self._tell(run_id, shared), self._told_nobody)
        return shared

    async def _upstream(self, run_id: str, effort: Effort) -> _Shared:
        started = time.monotonic()
        try:
            if effort is not BACKGROUND:
                await self._happyrobot.turn(effort)
            asked_at = time.monotonic()
            left = Effort(0, effort.timeout - (asked_at - started))
            record = await self._happyrobot.run(run_id, left, turn_taken=True)
        except NoTurn:
            return _Shared(Answer(asked=False), started + SHARED_FOR)
        except NoAnswer:
            return _Shared(Answer(), started + SHARED_FOR)
        whole = None if self._happyrobot.reads_v2 else record
        return _Shared(Answer(record.run_status, whole, mine=True, heard=True), asked_at + SHARED_FOR)

    def _remember(self, run_id: str, shared: _Shared) -> None:
        now = time.monotonic()
        for stale in [known for known, answer in self._recent.items() if answer.until <= now]:
            del self._recent[stale]
        # Only the status is for others: whoever keeps records has been given this one.
        answer = replace(shared.answer, record=None, mine=False)
        self._recent[run_id] = _Shared(answer, shared.until)

    # What the processes tell each other, in Redis.

    async def _outwait(self, run_id: str) -> None:
        """Waits until an answer from before now serves nobody any more, or somebody has begun to ask for a new one."""
        deadline = time.monotonic() + SHARED_FOR + POLL.timeout
        while time.monotonic() < deadline:
            left = await self._breaker.call(lambda: self._left(run_id), lambda: self._left_alone(run_id))
            if left <= 0:
                return
            await asyncio.sleep(min(left, 5 * _LOOK_EVERY))

    async def _left(self, run_id: str) -> float:
        return float(await self._redis.pttl(self._prefix + run_id)) / 1000

    async def _left_alone(self, run_id: str) -> float:
        recent = self._fresh(run_id)
        return recent.until - time.monotonic() if recent is not None else 0

    async def _claim(self, run_id: str, effort: Effort) -> bool:
        # For as long as the request may take: should this process be killed, others go without an answer until then.
        longest = effort.timeout if effort is BACKGROUND else effort.patience + effort.timeout
        return bool(await self._redis.set(self._prefix + run_id, _UNDER_WAY, nx=True, px=round((longest + 1) * 1000)))

    async def _claim_alone(self, run_id: str) -> bool:
        return self._fresh(run_id) is None

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
            if said != _UNDER_WAY:
                status = None if said in (_NOTHING, _UNCLEAR) else RunStatus(said.decode())
                answer = Answer(status, heard=said != _NOTHING)
                shared = _Shared(answer, time.monotonic() + max(left, 0) / 1000)
                self._remember(run_id, shared)
                return shared
            await asyncio.sleep(_LOOK_EVERY)
        return await self._nothing()

    async def _nothing(self) -> _Shared:
        return _Shared(Answer(asked=False), 0)

    async def _tell(self, run_id: str, shared: _Shared) -> None:
        if not shared.answer.asked:
            await self._redis.delete(self._prefix + run_id)
            return
        left = max(1, round((shared.until - time.monotonic()) * 1000))
        await self._redis.set(self._prefix + run_id, _said(shared.answer), px=left)

    async def _told_nobody(self) -> None:
        pass


def _said(answer: Answer) -> bytes:
    if answer.status is not None:
        return answer.status.encode()
    return _UNCLEAR if answer.heard else _NOTHING


def _lookups(connection: HTTPConnection) -> Lookups:
    lookups: Lookups = connection.state.lookups
    return lookups


CurrentLookups = Annotated[Lookups, Depends(_lookups)]
