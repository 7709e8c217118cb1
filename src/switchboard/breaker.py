"""Redis while it answers, and what a process can do alone while it does not."""

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

log = structlog.stdlib.get_logger(__name__)

_REST = 5.0
"""Seconds for which a Redis that failed is left alone, so that only one caller in a while waits for it in vain."""

Result = TypeVar("Result")


class Breaker:
    """Decides, call by call, whether Redis is asked."""

    def __init__(self) -> None:
        self._closed_again_at: float | None = None

    async def call(self, shared: Callable[[], Awaitable[Result]], alone: Callable[[], Awaitable[Result]]) -> Result:
        """What Redis says; what this process says by itself while Redis is away."""
        if self._closed_again_at is not None:
            if time.monotonic() < self._closed_again_at:
                return await alone()
            # This caller finds out whether it is back; the others do not wait for that.
            self._closed_again_at = time.monotonic() + _REST
        try:
            result = await shared()
        except Exception as error:  # noqa: BLE001  # a connection that is cut fails in many ways, also in those of uvloop
            self._closed_again_at = time.monotonic() + _REST
            log.warning("Redis is away; this process goes by itself", error=error)
            return await alone()
        self._closed_again_at = None
        return result
