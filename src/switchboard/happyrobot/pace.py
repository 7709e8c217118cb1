"""HappyRobot's pace: how many requests a second the Platform API gets from all processes together."""

import asyncio
import hashlib
import random
import time
from datetime import timedelta
from fractions import Fraction

from redis.asyncio import Redis
from throttled.asyncio import Quota, per_duration

from switchboard.throttling import Throttle

_LONGEST_NAP = 1.0
"""Seconds after which somebody who waits for a turn looks again, at the latest."""


def _quota(pace: float) -> Quota:
    """One request at a time: no burst, so that no second sees more than the pace."""
    ratio = Fraction(pace).limit_denominator(60)
    if ratio == 0:
        ratio = Fraction(1, 60)
    return per_duration(timedelta(seconds=ratio.denominator), ratio.numerator, burst=1)


class Pace:
    """Hands out turns, evenly spaced; in Redis for everybody, in this process alone while Redis is away."""

    def __init__(self, redis: Redis, account: str, pace: float) -> None:
        """`account` is what HappyRobot counts by; only a digest of it leaves this process."""
        self._key = hashlib.blake2b(account.encode(), digest_size=12).hexdigest()
        self._throttle, self._quota = Throttle(redis, "pace"), _quota(pace)

    async def turn(self, patience: float) -> bool:
        """Waits for a turn, for `patience` seconds at most; whether there was one."""
        deadline = time.monotonic() + patience
        while True:
            result = await self._throttle.limit(self._key, self._quota)
            if not result.limited:
                return True
            # Spread, so that those who wait do not all come back in the same moment.
            nap = min(result.state.retry_after, _LONGEST_NAP) + random.uniform(0, 0.02)  # noqa: S311
            if time.monotonic() + nap > deadline:
                return False
            await asyncio.sleep(nap)
