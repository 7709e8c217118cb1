"""Ending what runs beside the requests."""

import asyncio
from typing import Any

_AGAIN_AFTER = 0.2


async def end(*tasks: "asyncio.Future[Any]") -> None:
    """Cancels tasks until they have ended, however they do.

    Once is not enough: Python 3.11's `asyncio.wait_for`, which redis-py uses, swallows a cancellation that comes in the
    moment in which it is done anyway, and a service that stops would wait for ever.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_AGAIN_AFTER)
    await asyncio.gather(*tasks, return_exceptions=True)
