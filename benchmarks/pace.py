"""Callbacks at a steady pace, whether or not those before them were answered; or as fast as they are answered."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Self, cast

import httptools

from benchmarks.backends import Backend
from benchmarks.children import LOOPBACK

_CONNECTIONS = 64
_ANSWERED_WITHIN = 30.0
_GOOD = range(200, 300)

Callback = Callable[[int], bytes]
"""Makes the request; is told when it was due, in microseconds."""


def callback(backend: Backend, run_id: str, webhook_id: str, seq: int = 0) -> Callback:
    head = (
        "POST /api/webhooks/happyrobot HTTP/1.1\r\n"
        f"Host: {LOOPBACK}:{backend.port}\r\nContent-Type: application/json\r\n"
        f"X-API-KEY: {backend.key}\r\nX-Webhook-Id: {webhook_id}\r\n"
    )

    def request(due_us: int) -> bytes:
        data = {"t_us": due_us, "seq": seq, "message": "The agent has asked for the reference number"}
        timestamp = datetime.fromtimestamp(due_us / 1e6, UTC).isoformat()
        body = json.dumps({"run_id": run_id, "event_type": "log", "timestamp": timestamp, "data": data})
        return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()

    return request


class Connection(asyncio.Protocol):
    """One that is kept, with one request on it at a time."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[int] | None = None

    @classmethod
    async def to(cls, port: int) -> Self:
        _, connection = await asyncio.get_running_loop().create_connection(cls, LOOPBACK, port)
        return connection

    async def ask(self, request: bytes) -> int:
        """The answer's status; 0 where there is none."""
        self._answer = asyncio.get_running_loop().create_future()
        if self._transport is None:
            return 0
        self._transport.write(request)
        try:
            return await asyncio.wait_for(self._answer, _ANSWERED_WITHIN)
        except TimeoutError:
            return 0

    @property
    def gone(self) -> bool:
        """Whether the other side has closed it."""
        return self._transport is None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none by its class.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._say(self._parser.get_status_code())

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        self._say(0)

    def _say(self, status: int) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(status)


async def steadily(port: int, callbacks: Sequence[Callback], rate: float) -> int:
    """Sends so many a second; how many were not answered 2xx."""
    free: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()  # few are idle for so long that they are closed
    for _ in range(_CONNECTIONS):
        free.put_nowait(await Connection.to(port))
    loop = asyncio.get_running_loop()
    began, began_us = loop.time(), time.time_ns() // 1000

    async def send(number: int, callback: Callback) -> int:
        after = number / rate
        await asyncio.sleep(began + after - loop.time())
        connection = await free.get()
        if connection.gone:
            connection = await Connection.to(port)
        try:
            return await connection.ask(callback(began_us + round(after * 1e6)))
        finally:
            free.put_nowait(connection)

    statuses = await asyncio.gather(*(send(*each) for each in enumerate(callbacks)))
    while not free.empty():
        free.get_nowait().close()
    return sum(status not in _GOOD for status in statuses)


async def at_once(port: int, callbacks: Sequence[Callback], connections: int) -> list[bool]:
    """Sends all over so many connections, each of which waits for its answer; which were answered 2xx."""
    waiting = deque(enumerate(callbacks))
    good = [False] * len(waiting)

    async def work() -> None:
        connection = await Connection.to(port)
        while waiting:
            number, callback = waiting.popleft()
            good[number] = await connection.ask(callback(time.time_ns() // 1000)) in _GOOD
        connection.close()

    await asyncio.gather(*(work() for _ in range(connections)))
    return good
