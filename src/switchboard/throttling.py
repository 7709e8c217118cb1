"""Limits on how often something may happen, which all processes share."""

from typing import Any

from redis.asyncio import Redis
from throttled.asyncio import Quota, RateLimiterType, RateLimitResult, Throttled, store

from switchboard.breaker import Breaker

_MOST_ALONE = 100_000
"""Keys that are counted in one process at a time."""


class _Backend(store.RedisStoreBackend):
    """Our connection in place of one that the library would open."""

    def __init__(self, redis: Redis) -> None:
        super().__init__()
        self._redis = redis

    def get_client(self) -> Any:
        return self._redis


class _Store(store.RedisStore):
    def __init__(self, redis: Redis) -> None:
        super().__init__()
        self._backend = _Backend(redis)


class Throttle:
    """Counts in Redis for everybody; in this process alone, to the same measure, while Redis is away.

    By GCRA, which is a bucket of `quota.burst` tokens that is filled evenly; the library's own token bucket knows whole
    seconds only.
    """

    def __init__(self, redis: Redis, name: str) -> None:
        self._breaker = Breaker()
        self._prefix = f"switchboard:{name}"
        self._stores = _Store(redis), store.MemoryStore(options={"MAX_SIZE": _MOST_ALONE})
        self._throttled: dict[tuple[float, int], tuple[Throttled, Throttled]] = {}

    async def limit(self, key: str, quota: Quota) -> RateLimitResult:
        """Counts one more; the result says whether that was one too many, and when there is room again."""
        size = (quota.emission_interval, quota.burst)
        if size not in self._throttled:
            shared, alone = (
                Throttled(using=RateLimiterType.GCRA.value, quota=quota, store=place, key_prefix=self._prefix)
                for place in self._stores
            )
            self._throttled[size] = shared, alone
        shared, alone = self._throttled[size]
        return await self._breaker.call(lambda: shared.limit(key), lambda: alone.limit(key))
