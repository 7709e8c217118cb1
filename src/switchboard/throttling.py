"""Limits on how often something may happen, which all processes share."""

from typing import Any

from redis.asyncio import Redis
from throttled.asyncio import Quota, RateLimiterType, RateLimitResult, Throttled, store

from switchboard.breaker import Breaker


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
    """Counts in Redis for everybody; in this process alone, to the same measure, while Redis is away."""

    def __init__(self, redis: Redis, name: str, quota: Quota, using: RateLimiterType) -> None:
        self._breaker = Breaker()
        self._shared, self._alone = (
            Throttled(using=using.value, quota=quota, store=place, key_prefix=f"switchboard:{name}")
            for place in (_Store(redis), store.MemoryStore())
        )

    async def limit(self, key: str) -> RateLimitResult:
        """Counts one more; the result says whether that was one too many, and when there is room again."""
        return await self._breaker.call(lambda: self._shared.limit(key), lambda: self._alone.limit(key))
