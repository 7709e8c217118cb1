"""A customer's server: it takes webhooks, writes down what came over the wire, and answers as a test says."""

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json


@dataclass(frozen=True)
class Request:
    """A webhook as it came."""

    at: float
    """When it had arrived, in seconds since 1970."""
    line: str
    headers: dict[str, str]
    """Under their names as they were written."""
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> str:
        return self.headers["X-Webhook-Event"]

    @property
    def json(self) -> Any:
        return from_json(self.body)


Answer = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


async def reply(
    writer: asyncio.StreamWriter, status: int = 200, body: bytes = b"OK", headers: dict[str, str] | None = None
) -> None:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *(f"{n}: {v}" for n, v in (headers or {}).items())]
    writer.write("\r\n".join([*lines, "\r\n"]).encode() + body)
    await writer.drain()


async def ok(_: Request, writer: asyncio.StreamWriter) -> None:
    await reply(writer)


def statuses(*wanted: int) -> Answer:
    """Answers with these, one after the other, and then with the last one."""
    left = list(wanted)

    async def answer(_: Request, writer: asyncio.StreamWriter) -> None:
        await reply(writer, left.pop(0) if len(left) > 1 else left[0])

    return answer


async def never(_: Request, writer: asyncio.StreamWriter) -> None:
    """Does not answer; returns when the other side has gone."""
    await asyncio.Event().wait()


@dataclass
class Receiver:
    """A server on loopback."""

    answer: Answer = ok
    requests: list[Request] = field(default_factory=list)
    """What has come in full, in this order."""
    connections: int = 0
    """Those that were made."""
    open: int = 0
    """Those that are there now."""
    most: int = 0
    """The most that were there at once."""
    url: str = ""
    port: int = 0
    _seen: bytearray = field(default_factory=bytearray)
    _came: asyncio.Condition = field(default_factory=asyncio.Condition)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def seen(self) -> bytes:
        """All that has come, whatever it is."""
        return bytes(self._seen)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        task.add_done_callback(lambda _: writer.close())  # even if it never began
        self._tasks.add(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            request = await self._read(reader)
            if request is None:
                return
            async with self._came:
                self.requests.append(request)
                self._came.notify_all()
            answering = asyncio.ensure_future(self.answer(request, writer))
            # Whoever sends a webhook says nothing after it, until it goes.
            left = asyncio.ensure_future(reader.read())
            try:
                await asyncio.wait({answering, left}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _cancel(answering, left)
        except (ConnectionError, EOFError):
            pass  # it may well be cut, also in the middle of a request
        finally:
            self.open -= 1

    async def end(self) -> None:
        await _cancel(*self._tasks)
        for task in self._tasks:
            assert task.cancelled() or task.exception() is None, task

    async def _read(self, reader: asyncio.StreamReader) -> Request | None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            came = await reader.readline()
            self._seen += came
            if not came:
                return None
            head += came
        line, *rest = head.decode("latin-1").strip().split("\r\n")
        headers = dict(each.split(": ", 1) for each in rest)
        assert len(headers) == len(rest), "a header came twice"
        body = await reader.readexactly(int(headers["Content-Length"]))
        self._seen += body
        return Request(time.time(), line, headers, body)

    async def took(self, number: int, *, within: float = 60) -> list[Request]:
        """Waits for so many webhooks; returns all that have come by then."""
        async with asyncio.timeout(within), self._came:
            await self._came.wait_for(lambda: len(self.requests) >= number)
        return list(self.requests)


@contextlib.asynccontextmanager
async def receiving(
    answer: Answer = ok, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Receiver]:
    """A receiver at a free port."""
    receiver = Receiver(answer)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = await asyncio.start_server(receiver.accept, host, 0, family=family, backlog=2048, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    receiver.url = f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{receiver.port}/hooks?of=mine"
    try:
        yield receiver
    finally:
        server.close()
        await receiver.end()


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
