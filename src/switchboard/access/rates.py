"""How often an API key may ask, and what every answer says about it."""

import math
import time
from dataclasses import dataclass
from typing import Annotated, Self

from fastapi import Depends
from redis.asyncio import Redis
from starlette.requests import HTTPConnection
from throttled.asyncio import RateLimitResult, per_min

from switchboard.access.keys import ApiKey
from switchboard.throttling import Throttle

BURST, PER_MINUTE = 10, 60
"""The Public API's own: so many requests at once, and so many a minute, for keys that were given no others."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Where somebody stands with a limit, this request counted."""

    limit: int
    remaining: int
    reset_after: float
    """Seconds until all of it is there again."""
    retry_after: float
    """Seconds until there is room for one; 0 where there was."""

    @classmethod
    def of(cls, result: RateLimitResult) -> Self:
        state = result.state
        return cls(
            state.limit, max(0, state.remaining), state.reset_after, state.retry_after if result.limited else 0.0
        )

    @property
    def limited(self) -> bool:
        return self.retry_after > 0

    @property
    def headers(self) -> dict[str, str]:
        """`X-RateLimit-*` as the Public API has them; the time in milliseconds since 1970."""
        return {
            "X-RateLimit-Limit": str(self.limit),
            "X-RateLimit-Remaining": str(self.remaining),
            "X-RateLimit-Reset": str(math.ceil((time.time() + self.reset_after) * 1000)),
        }


class Rates:
    """The Public API's limits, which all processes share."""

    def __init__(self, redis: Redis) -> None:
        self._throttle = Throttle(redis, "rate")

    async def take(self, key: ApiKey) -> Rate:
        """Counts a request of a key."""
        quota = per_min(key.per_minute or PER_MINUTE, key.burst or BURST)
        return Rate.of(await self._throttle.limit(str(key.id), quota))


async def _rates(connection: HTTPConnection) -> Rates:
    rates: Rates = connection.state.rates
    return rates


CurrentRates = Annotated[Rates, Depends(_rates)]
