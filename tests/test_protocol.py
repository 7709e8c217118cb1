"""What a connection may send, and in what time, before and behind the requests that the application sees."""

import asyncio
import contextlib
import gc
import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from switchboard import bodies, edge, errors, protocol
from switchboard.leaving import Leaving
from switchboard.protocol import BoundedProtocol
from switchboard.settings import Settings
from tests.conftest import HOOK_KEY, Servers, Service, running_service, serving, settings_for, until

HEAD, BODY = 2_000, 3_000
QUICK = 0.25
URL = "/api/webhooks/happyrobot"
LARGE = 32_000_000
"""More than the buffers between two sockets hold."""
GET = b"GET /quick HTTP/1.1\r\nHost: h\r\n\r\n"
WAITS = b"GET /waits HTTP/1.1\r\nHost: h\r\n\r\n"
CHUNKED = b"POST /body HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"


class Raw(Response):
    """An answer whose headers nobody looks at before the server does."""

    def __init__(self, body: bytes, *headers: tuple[bytes, bytes], status: int = 200) -> None:
        super().__init__(body, status)
        self.raw_headers = [*headers]


class Passed(Response):
    """A stream that goes on past everything around it, until its client reads no more; then it says so."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # as Starlette calls it
        state = scope["state"]
        cycle: Any = state["cycle"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first;", "more_body": True})
        assert cycle.pass_on_now(b"")
        while cycle.pass_on_now(b"x" * 100_000):
            pass
        state["seen"].append("refused")
        await cycle.pass_on(b";last")
        if cycle.disconnected:
            state["seen"].append(cycle.pass_on_now(b";to nobody"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


ANSWERS: dict[str, Callable[[], Response]] = {
    "usual": lambda: Response("whole"),
    "error": lambda: Response("whole", 418),
    "without a length": lambda: Raw(b"whole"),
    "too short": lambda: Raw(b"whole", (b"content-length", b"6")),
    "too long": lambda: Raw(b"whole", (b"content-length", b"4")),
    "two lengths": lambda: Raw(b"whole", (b"content-length", b"5"), (b"content-length", b"6")),
    "two lengths, the other way round": lambda: Raw(b"whole", (b"content-length", b"6"), (b"content-length", b"5")),
    "closing": lambda: Response("whole", headers={"Connection": "close"}),
    "nothing": lambda: Response(status_code=204),
    "a line of its own": lambda: Raw(b"whole", (b"content-length", b"5"), (b"x", b"1\r\nx-more: 2")),
    "a name of its own": lambda: Raw(b"whole", (b"content-length", b"5"), (b"x: 1\r\nx-more", b"2")),
    "no body": lambda: Raw(b"", (b"content-length", b"0")),
    "a part": lambda: StreamingResponse(iter([b"who", b"le"]), headers={"Content-Length": "5"}),
}
"""What an application may answer, well or badly."""


def application(settings: Settings) -> FastAPI:  # noqa: C901  # one endpoint after the other
    """What a client can meet: an answer at once, in parts, or late; a body that is read, with a limit or not."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        yield {"settings": settings, "leaving": Leaving(), "go_on": asyncio.Event(), "seen": []}

    app = FastAPI(lifespan=lifespan)
    errors.install(app)
    edge.install(app, settings)

    @app.get("/quick")
    async def quick(request: Request, size: int = 0) -> dict[str, Any]:
        request.state.seen.append(request.headers.raw)
        return {"headers": len(request.headers.raw), "last": request.headers.get("last"), "filling": "x" * size}

    @app.get("/parts")
    async def parts(request: Request) -> StreamingResponse:
        async def wait() -> AsyncIterator[bytes]:
            yield b"first;"
            await request.state.go_on.wait()
            yield b"last;"

        return StreamingResponse(wait())

    @app.get("/waits")
    async def waits(request: Request) -> str:
        await request.state.go_on.wait()
        return "waited"

    @app.get("/nothing")
    async def nothing() -> StreamingResponse:
        async def fails() -> AsyncIterator[bytes]:
            raise RuntimeError
            yield b""

        return StreamingResponse(fails())

    @app.get("/answers/{what}")
    async def answers(what: str) -> Response:
        return ANSWERS[what]()

    @app.get("/passed")
    async def passed() -> Response:
        return Passed()

    @app.post("/body")
    async def body(request: Request) -> dict[str, Any]:
        size = len(await bodies.read(request))
        return {"size": size, "sneaked": request.headers.get("x-forwarded-for")}

    @app.post("/unread")
    async def unread() -> str:
        return "not read"

    @app.post("/sink")
    async def sink(request: Request) -> None:
        async for _ in request.stream():
            pass

    return app


class Client:
    """A connection of which every byte is ours."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def pour(self, parts: Iterable[bytes]) -> None:
        """Sends until the other side has had enough."""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                await self.send(part)
                await asyncio.sleep(0)

    async def drip(self) -> None:
        """Never stops sending, and never gets anywhere."""
        with contextlib.suppress(ConnectionError):
            while True:
                await self.send(b"x")
                await asyncio.sleep(0.01)

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        """One answer: its status, its headers, its body."""
        async with asyncio.timeout(10):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers, json.loads(body)

    async def ended(self) -> bytes:
        """What is left to read until the connection ends."""
        async with asyncio.timeout(10):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@dataclass
class Server:
    """The application above, with its limits."""

    url: str
    server: uvicorn.Server

    @property
    def state(self) -> Any:
        return self.server.lifespan.state

    @property
    def connections(self) -> set[Any]:
        return self.server.server_state.connections

    def client(self) -> contextlib.AbstractAsyncContextManager[Client]:
        return connected(self.url)


@contextlib.asynccontextmanager
async def listening(**more: Any) -> AsyncIterator[Server]:
    settings = Settings(**{"max_header_size": HEAD, "max_body_size": BODY, "request_timeout": 60} | more)
    async with serving(lambda _: application(settings), http=BoundedProtocol) as (url, server):
        yield Server(url, server)


@pytest.fixture(scope="module")
async def servers_of_both_kinds() -> AsyncIterator[tuple[Server, Server]]:
    async with listening() as patient, listening(request_timeout=QUICK) as hasty:
        yield patient, hasty


async def _as_new(server: Server) -> AsyncIterator[Server]:
    server.state["seen"].clear()
    server.state["go_on"].clear()
    yield server
    server.state["go_on"].set()
    await until(lambda: not server.connections)


@pytest.fixture
async def patient(servers_of_both_kinds: tuple[Server, Server]) -> AsyncIterator[Server]:
    """Takes its time."""
    async for server in _as_new(servers_of_both_kinds[0]):
        yield server


@pytest.fixture
async def hasty(servers_of_both_kinds: tuple[Server, Server]) -> AsyncIterator[Server]:
    """Does not."""
    async for server in _as_new(servers_of_both_kinds[1]):
        yield server


def from_uvicorn(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    """What uvicorn has logged."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.partition(".")[0] == "uvicorn" and record.levelno >= level
    ]


def endless(start: bytes, part: bytes) -> Iterable[bytes]:
    yield start
    for _ in range(20_000):
        yield part


# Size.


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (b"GET /", b"x" * 500),
        (b"GET / HTTP/1.1\r\nX: ", b"x" * 500),
        (b"GET / HTTP/1.1\r\nX", b"x" * 500),
        (b"GET / HTTP/1.1\r\n", b"X: y\r\n" * 50),
        (b"GET / HTTP/1.1\r\n", b"X: " + b"y" * 100_000 + b"\r\n"),
        (b"\r\n", b"\r\n" * 200),
        (GET + b"GET / HTTP/1.1\r\nX: ", b"x" * 500),
    ],
)
async def test_a_head_without_an_end_is_refused(patient: Server, start: bytes, part: bytes):
    async with patient.client() as client:
        pouring = asyncio.create_task(client.pour(endless(start, part)))
        if start.startswith(GET):
            assert (await client.answer())[0] == 200
        status, headers, body = await client.answer()
        assert (status, body) == (431, {"error": "The request's line and headers are too large"})
        assert headers["connection"] == "close"
        assert headers["content-type"] == "application/json"
        assert await client.ended() == b""
        pouring.cancel()
    await until(lambda: not patient.connections)
    assert len(patient.state["seen"]) == start.count(GET)


@pytest.mark.parametrize("piece", [1, 700, 10_000])
async def test_a_head_may_be_as_large_as_the_limit_and_no_larger(patient: Server, piece: int):
    def head(size: int) -> bytes:
        frame = b"GET /quick HTTP/1.1\r\nHost: h\r\nLast: \r\n\r\n"
        return frame[:-4] + b"x" * (size - len(frame)) + frame[-4:]

    for size, expected in ((HEAD, 200), (HEAD + 100, 431)):
        async with patient.client() as client:
            whole = head(size)
            await client.pour(whole[start : start + piece] for start in range(0, size, piece))
            assert (await client.answer())[0] == expected


async def test_many_small_headers_count_together(patient: Server):
    async with patient.client() as client:
        await client.send(GET[:-2] + b"A: b\r\n" * 400 + b"\r\n")
        assert (await client.answer())[0] == 431


async def test_behind_another_request_a_head_has_the_same_limit(patient: Server):
    """Where it begins within what was received with the request before it."""
    async with patient.client() as client:
        await client.send(GET * 20 + GET[:-2] + b"A: " + b"b" * HEAD + b"\r\n\r\n" + GET)
        assert [(await client.answer())[0] for _ in range(21)] == [200] * 20 + [431]
        assert await client.ended() == b""
    assert len(patient.state["seen"]) == 20


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (b"1;", b"x" * 500),  # the extension of a chunk
        (b"1\r\nx\r\n0\r\nX: ", b"x" * 500),  # a trailer
        (b"1\r\nx\r\n0\r\n", b"X: y\r\n" * 50),  # trailers
    ],
)
async def test_what_surrounds_a_body_has_the_same_limit(patient: Server, start: bytes, part: bytes):
    async with patient.client() as client:
        pouring = asyncio.create_task(client.pour(endless(CHUNKED + start, part)))
        assert (await client.answer())[0] == 431
        assert await client.ended() == b""
        pouring.cancel()
    await until(lambda: not patient.connections)


async def test_chunks_of_one_byte_are_no_reason_to_refuse(patient: Server):
    async with patient.client() as client:
        await client.send(CHUNKED, b"1\r\nx\r\n" * 1_000 + b"0\r\n\r\n")
        assert (await client.answer())[2]["size"] == 1_000


async def test_trailers_are_no_headers(patient: Server):
    async with patient.client() as client:
        await client.send(CHUNKED + b"1\r\nx\r\n0\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n")
        assert (await client.answer())[2] == {"size": 1, "sneaked": None}


# Bodies.


@pytest.mark.parametrize("length", [b"Content-Length: 1000000000", b"Transfer-Encoding: chunked"])
async def test_a_body_that_is_too_large_is_refused_and_not_listened_to_for_long(patient: Server, length: bytes):
    async with patient.client() as client:
        head = b"POST /body HTTP/1.1\r\nHost: h\r\n" + length + b"\r\n\r\n"
        pouring = asyncio.create_task(client.pour(endless(head, b"3e8\r\n" + b"x" * 1_000 + b"\r\n")))
        status, _, body = await client.answer()
        assert (status, body) == (413, {"error": "The body must be smaller than 0.003 MB"})
        assert await client.ended() == b""
        await pouring
    await until(lambda: not patient.connections)


async def test_a_body_that_nobody_reads_ends_the_answer_that_has_begun(patient: Server):
    async with patient.client() as client:
        head = b"GET /parts HTTP/1.1\r\nHost: h\r\nContent-Length: 100000000\r\n\r\n"
        await client.pour(endless(head, b"x" * 1_000))
        assert b"last;" not in await client.ended()
    await until(lambda: not patient.connections)


async def test_a_body_that_is_read_without_a_limit_has_one_all_the_same(patient: Server):
    async with patient.client() as client:
        head = b"POST /sink HTTP/1.1\r\nHost: h\r\nContent-Length: 100000000\r\n\r\n"
        pouring = asyncio.create_task(client.pour(endless(head, b"x" * 1_000)))
        status, _, body = await client.answer()
        assert (status, body) == (413, {"error": "The body is too large"})
        assert await client.ended() == b""
        pouring.cancel()


async def test_what_is_left_of_a_body_may_come_and_the_connection_goes_on(patient: Server):
    async with patient.client() as client:
        await client.send(b"POST /unread HTTP/1.1\r\nHost: h\r\nContent-Length: 2000\r\n\r\n" + b"x" * 500)
        assert (await client.answer())[2] == "not read"
        [connection] = patient.connections
        assert connection._clock is not None
        await client.send(b"x" * 1_500)
        # From then on it is as idle as any other.
        await until(lambda: connection._clock is None and connection.timeout_keep_alive_task is not None)
        await client.send(GET)
        assert (await client.answer())[0] == 200
        await client.send(GET)
        assert (await client.answer())[0] == 200


async def test_what_is_left_of_a_body_has_to_come_in_time(hasty: Server):
    async with hasty.client() as client:
        await client.send(b"POST /unread HTTP/1.1\r\nHost: h\r\nContent-Length: 2000\r\n\r\n" + b"x" * 500)
        assert (await client.answer())[2] == "not read"
        assert await client.ended() == b""


async def test_a_body_that_nobody_asked_for_is_not_waited_for(patient: Server):
    async with patient.client() as client:
        await client.send(b"POST /body HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4000\r\n\r\n")
        assert (await client.answer())[0] == 413
        assert await client.ended() == b""


async def test_the_rest_of_a_body_that_was_asked_for_may_come(patient: Server):
    async with patient.client() as client:
        await client.send(CHUNKED[:-2] + b"Expect: 100-continue\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"fa0\r\n" + b"x" * 4_000 + b"\r\n")
        assert (await client.answer())[0] == 413
        await client.send(b"0\r\n\r\n" + GET)
        assert (await client.answer())[0] == 200


async def test_what_is_wrong_behind_an_answer_is_not_answered_again(patient: Server):
    async with patient.client() as client:
        await client.send(CHUNKED.replace(b"/body", b"/unread"))
        assert (await client.answer())[2] == "not read"
        await client.send(b"zz\r\n")
        assert await client.ended() == b""


async def test_a_body_that_was_asked_for_is_read(patient: Server):
    async with patient.client() as client:
        await client.send(b"POST /body HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"body", GET)
        assert (await client.answer())[2]["size"] == 4
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize("sent", [b"", b"half"])
async def test_a_slow_body_is_given_up(hasty: Server, sent: bytes):
    async with hasty.client() as client:
        await client.send(b"POST /body HTTP/1.1\r\nHost: h\r\nContent-Length: 8\r\n\r\n" + sent)
        status, headers, body = await client.answer()
        assert (status, body) == (408, {"error": f"The body must arrive within {QUICK} seconds"})
        assert headers["connection"] == "close"
        assert headers["x-request-id"]
        assert await client.ended() == b""


async def test_a_body_that_drips_is_given_up(hasty: Server):
    async with hasty.client() as client:
        await client.send(b"POST /body HTTP/1.1\r\nHost: h\r\nContent-Length: 800\r\n\r\n")
        dripping = asyncio.create_task(client.drip())
        assert (await client.answer())[0] == 408
        dripping.cancel()


# Time.


@pytest.mark.parametrize("nothing", [b"", b"\r\n"])
async def test_a_silent_connection_is_closed_without_a_word(hasty: Server, nothing: bytes):
    async with hasty.client() as client:
        await client.send(nothing)
        assert await client.ended() == b""


async def test_a_line_too_many_behind_a_request_is_ignored(hasty: Server):
    async with hasty.client() as client:
        await client.send(GET)
        assert (await client.answer())[0] == 200
        await client.send(b"\r\n")
        await asyncio.sleep(QUICK * 1.5)
        await client.send(GET)
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize("part", [b"G", b"GET / HTTP/1.1\r\n", GET[:-2]])
async def test_half_a_head_is_answered_408(hasty: Server, part: bytes):
    async with hasty.client() as client:
        await client.send(part)
        status, headers, body = await client.answer()
        assert (status, body) == (408, {"error": "The request did not arrive in time"})
        assert headers["connection"] == "close"
        assert await client.ended() == b""
    await until(lambda: not hasty.connections)


async def test_a_head_that_drips_is_given_up(hasty: Server):
    async with hasty.client() as client:
        await client.send(b"GET / HTTP/1.1\r\nX: ")
        dripping = asyncio.create_task(client.drip())
        assert (await client.answer())[0] == 408
        dripping.cancel()


async def test_the_second_request_of_a_connection_has_its_own_time(hasty: Server):
    async with hasty.client() as client:
        await client.send(GET)
        assert (await client.answer())[0] == 200
        # Longer than a request may take: an idle connection is kept.
        await asyncio.sleep(QUICK * 1.5)
        await client.send(GET[:20], GET[20:])
        assert (await client.answer())[0] == 200
        await client.send(GET + GET[:20])
        assert [(await client.answer())[0] for _ in range(2)] == [200, 408]
        assert await client.ended() == b""


async def test_a_connection_is_idle_until_a_request_begins(patient: Server):
    async with patient.client() as client:
        await client.send(GET)
        assert (await client.answer())[0] == 200
        [connection] = patient.connections
        await until(lambda: connection.timeout_keep_alive_task is not None)
        await client.send(GET[:5])
        await until(lambda: connection._clock is not None)
        assert connection.timeout_keep_alive_task is None


async def test_an_answer_may_take_as_long_as_it_likes(hasty: Server):
    async with hasty.client() as client:
        await client.send(WAITS + GET[:20])
        await asyncio.sleep(QUICK * 2.5)
        hasty.state["go_on"].set()
        assert (await client.answer())[2] == "waited"
        await client.send(GET[20:])
        assert (await client.answer())[0] == 200


@contextlib.asynccontextmanager
async def not_reading(server: Server, asked: bytes) -> AsyncIterator[tuple[Any, socket.socket]]:
    """A client that has asked for something and leaves it where it is, next to the server's side of the connection."""
    with socket.socket() as client:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", int(server.url.rpartition(":")[2])))
        await until(lambda: len(server.connections) == 1)
        [connection] = server.connections
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        await loop.sock_sendall(client, asked)
        yield connection, client


@pytest.mark.parametrize("size", [60_000, LARGE])
@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
async def test_an_answer_that_is_not_read_is_given_up(hasty: Server, size: int, more: bytes):
    asked = b"GET /quick?size=%d HTTP/1.1\r\nHost: h\r\n%b\r\n" % (size, more)
    async with not_reading(hasty, asked):
        await until(lambda: not hasty.connections)
        assert not hasty.server.server_state.tasks


async def test_an_answer_may_be_read_slowly(patient: Server):
    asked = b"GET /quick?size=%d HTTP/1.1\r\nHost: h\r\n\r\n" % LARGE
    async with not_reading(patient, asked) as (connection, client):
        await until(lambda: connection._watch is not None)
        left, loop = connection._unread, asyncio.get_running_loop()
        # Most of it the kernel has taken, and asks for no more before a good part of that is read.
        assert left() > connection.transport.get_write_buffer_size()
        for _ in range(3):
            unread = left()
            while left() == unread:
                await loop.sock_recv(client, 1_000)
            # As when its time is over.
            connection._stop_watch()
            connection._has_it_read(unread)
            assert connection._watch is not None
            assert not connection.transport.is_closing()
        while connection.transport.get_write_buffer_size():
            await loop.sock_recv(client, 1_000_000)
        assert connection._watch is None


# What is no request.


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # somebody who speaks TLS
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST /body HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /body HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /body HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /body HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_cannot_be_parsed_is_answered_in_our_shape(
    patient: Server, garbage: bytes, caplog: pytest.LogCaptureFixture
):
    async with patient.client() as client:
        await client.send(garbage)
        status, headers, body = await client.answer()
        assert (status, body) == (400, {"error": "Bad request"})
        assert headers["content-type"] == "application/json"
        assert await client.ended() == b""
    await until(lambda: not patient.connections)
    assert from_uvicorn(caplog) == []


@pytest.mark.parametrize("environment", ["development", "production"])
async def test_a_refusal_looks_like_every_other_answer_and_leaves_a_line(environment: str):
    settings = Settings().model_copy(update={"environment": environment})
    async with serving(lambda _: application(settings), http=BoundedProtocol) as (url, _), connected(url) as client:
        await client.send(b"GET /quick HTTP/1.1\r\nX-Request-ID: theirs\r\n\r\n")
        ours = (await client.answer())[1]
        with capture_logs() as lines:
            await client.send(b"secret\r\n\r\n")
            status, headers, _ = await client.answer()
    assert status == 400
    usual = {name.lower(): value.lower() for name, value in edge.usual_headers(settings).items()}
    assert headers.items() >= usual.items()
    assert ours.items() >= usual.items()
    assert headers.keys() == ours.keys() | {"cache-control", "connection"}
    assert headers["cache-control"] == "no-store"
    request_id = headers["x-request-id"]
    assert len(request_id) == 32
    assert lines == [{"event": "refused", "log_level": "info", "status": 400, "request_id": request_id}]


async def test_nothing_is_written_into_an_answer_that_has_begun(patient: Server):
    async with patient.client() as client:
        await client.send(b"GET /parts HTTP/1.1\r\nHost: h\r\n\r\n")
        await client.reader.readuntil(b"first;\r\n")
        await client.send(b"\x00\x00\r\n\r\n")
        # The server has read that once it does not hear what follows.
        [connection] = patient.connections
        await until(lambda: connection._deaf)
        await client.send(GET)
        patient.state["go_on"].set()
        assert await client.reader.readuntil(b"0\r\n\r\n") == b"5\r\nlast;\r\n0\r\n\r\n"
        assert (await client.answer())[0] == 400
        assert await client.ended() == b""


async def test_a_refusal_is_not_taken_for_the_answer_to_the_request_before(patient: Server):
    async with patient.client() as client:
        await client.send(WAITS + GET + b"\x00\x00\r\n\r\n")
        await until(lambda: [connection._deaf for connection in patient.connections] == [True])
        patient.state["go_on"].set()
        assert [(await client.answer())[0] for _ in range(3)] == [200, 200, 400]
        assert await client.ended() == b""


@pytest.mark.parametrize("before", [[WAITS], [WAITS, GET]])
async def test_a_body_that_breaks_off_takes_no_other_answer_with_it(patient: Server, before: list[bytes]):
    async with patient.client() as client:
        await client.send(*before, CHUNKED + b"zz\r\n")
        await until(lambda: [connection._deaf for connection in patient.connections] == [True])
        patient.state["go_on"].set()
        assert [(await client.answer())[0] for _ in [*before, CHUNKED]] == [200 for _ in before] + [400]
        assert await client.ended() == b""


async def test_a_stream_hears_that_its_client_has_left_a_request_behind_it(patient: Server):
    async with patient.client() as client:
        await client.send(b"GET /parts HTTP/1.1\r\nHost: h\r\n\r\n" + GET)
        await client.reader.readuntil(b"first;\r\n")
    await until(lambda: not patient.server.server_state.tasks)
    assert patient.state["seen"] == []


async def test_a_body_that_breaks_off_ends_the_answer_that_has_begun(patient: Server):
    async with patient.client() as client:
        await client.send(b"GET /parts HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        await client.reader.readuntil(b"first;\r\n")
        await client.send(b"zz\r\n")
        assert await client.ended() == b""


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c"])
async def test_nothing_else_is_spoken_here(patient: Server, upgrade: bytes, caplog: pytest.LogCaptureFixture):
    asked = GET[:-2] + b"Connection: Upgrade\r\nUpgrade: " + upgrade + b"\r\n\r\n"
    async with patient.client() as client:
        # What follows would be the other protocol.
        await client.send(asked + GET)
        await client.send(GET)
        assert (await client.answer())[0] == 200
        assert await client.ended() == b""
    assert len(patient.state["seen"]) == 1
    assert from_uvicorn(caplog) == []


@pytest.mark.parametrize("piece", [1, 10_000])
@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 4\r\n\r\nbody",
        b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n",
    ],
)
async def test_a_body_may_come_with_the_wish_to_speak_something_else(patient: Server, body: bytes, piece: int):
    """As Java's client and curl send it, who would rather speak HTTP/2."""
    head = b"POST /body HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    asked = head + b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n" + body
    async with patient.client() as client:
        await client.send(GET)
        assert (await client.answer())[0] == 200
        await client.send(*(asked[start : start + piece] for start in range(0, len(asked), piece)))
        status, headers, answer = await client.answer()
        assert (status, answer) == (200, {"size": 4, "sneaked": None})
        assert headers["connection"] == "close"
        assert await client.ended() == b""


async def test_many_wishes_to_speak_something_else_are_one(patient: Server):
    wish = b"Connection: Upgrade\r\nUpgrade: x\r\n\r\n"
    async with patient.client() as client:
        await client.send(WAITS[:-2] + wish + (GET[:-2] + wish) * 10)
        await until(lambda: [connection._deaf for connection in patient.connections] == [True])
        assert not any(connection.pipeline for connection in patient.connections)
        patient.state["go_on"].set()
        assert (await client.answer())[2] == "waited"
        assert await client.ended() == b""


@pytest.mark.parametrize("asked", [b"GET http://h:99999/ HTTP/1.1\r\n", b"CONNECT h:443 HTTP/1.1\r\n"])
@pytest.mark.parametrize("more", [b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"])
async def test_an_address_that_cannot_be_here_is_refused(patient: Server, asked: bytes, more: bytes):
    async with patient.client() as client:
        await client.send(asked + more + b"\r\n")
        assert (await client.answer())[0] == 400
        assert await client.ended() == b""


# The end.


@pytest.mark.parametrize("begun", [[], [WAITS], [WAITS, GET]])
async def test_half_a_body_does_not_hold_up_the_end(begun: list[bytes], caplog: pytest.LogCaptureFixture):
    async with listening() as server, server.client() as client:
        await client.send(*begun, CHUNKED + b"1\r\nx\r\n")
        await until(lambda: [connection._body_size for connection in server.connections] == [1])
        await until(lambda: len(server.server.server_state.tasks) == 1)
        server.server.should_exit = True
        await until(lambda: not server.server.servers[0].is_serving())
        server.state["go_on"].set()
        assert [(await client.answer())[0] for _ in begun] == [200 for _ in begun]
        assert await client.ended() == b""
    assert from_uvicorn(caplog) == []


# What has to go on working.


async def test_pipelined_requests_are_answered_in_order(patient: Server):
    async with patient.client() as client:
        requests = [GET[:-2] + b"Last: %d\r\n\r\n" % number for number in range(100)]
        await client.send(b"".join(requests))
        assert [(await client.answer())[2]["last"] for _ in requests] == [str(number) for number in range(100)]


async def test_a_request_leaves_nothing_for_the_garbage_collector(patient: Server):
    def requests() -> int:
        return sum(isinstance(each, RequestResponseCycle) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    # Those of other tests that still wait.
    before = requests()
    try:
        async with patient.client() as client:
            for request in (GET, b"POST /body HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}") * 10:
                await client.send(request)
                assert (await client.answer())[0] == 200
            # A connection knows its last one.
            assert requests() <= before + 1
    finally:
        gc.enable()


async def test_a_request_may_come_byte_by_byte_and_the_connection_is_kept(patient: Server):
    async with patient.client() as client:
        for _ in range(2):
            await client.pour(GET[at : at + 1] for at in range(len(GET)))
            assert (await client.answer())[0] == 200
        assert len(patient.connections) == 1


async def test_the_service_is_bounded_by_its_settings(database_url: str, servers: Servers):
    limits: dict[str, Any] = {"max_header_size": HEAD, "max_body_size": BODY, "request_timeout": QUICK}
    async with running_service(settings_for(database_url, servers.redis_url, None, **limits)) as service:
        await _is_bounded(service)


async def _is_bounded(service: Service) -> None:
    key = {"X-API-KEY": HOOK_KEY}
    assert (await service.http.get("/healthz", headers={"X": "x" * HEAD})).status_code == 431
    large = await service.http.post(URL, content=b"x" * BODY, headers=key)
    assert (large.status_code, large.json()) == (413, {"error": "The body must be smaller than 0.003 MB"})
    async with connected(service.url) as client:
        await client.send(f"POST {URL} HTTP/1.1\r\nX-API-KEY: {HOOK_KEY}\r\nContent-Length: 9\r\n\r\n".encode())
        assert (await client.answer())[0] == 408


async def test_who_does_not_read_is_cut_off_when_the_server_stops(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol, "GOODBYE", 0.2)
    asked = b"GET /quick?size=%d HTTP/1.1\r\nHost: h\r\n\r\n" % LARGE
    async with listening() as server, server.client() as client, server.client() as other:
        await client.send(asked)
        await other.send(WAITS)
        connections = server.server.server_state.connections
        await until(lambda: any(each.transport.get_write_buffer_size() for each in connections))
        server.server.should_exit = True
        await until(lambda: len(connections) == 1)
        # Who reads is answered.
        server.server.lifespan.state["go_on"].set()
        assert b"200 OK" in await other.reader.read()


async def test_whatever_stops_the_server_tells_those_who_must_know():
    async with listening() as server, server.client() as client:
        await client.send(WAITS)
        leaving: Leaving = server.server.lifespan.state["leaving"]
        server.server.should_exit = True
        async with asyncio.timeout(10):
            await leaving.told()
        server.server.lifespan.state["go_on"].set()


# Answers in one piece.


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is given to the system to be sent, as it is given."""
    sent: list[bytes] = []

    class Watched:
        def __init__(self, transport: asyncio.Transport) -> None:
            self._transport = transport

        def __getattr__(self, name: str) -> Any:
            return getattr(self._transport, name)

        def write(self, data: bytes) -> None:
            sent.append(bytes(data))
            self._transport.write(data)

    made = BoundedProtocol.connection_made

    def connection_made(self: BoundedProtocol, transport: asyncio.Transport) -> None:
        made(self, Watched(transport))  # type: ignore[arg-type]

    monkeypatch.setattr(BoundedProtocol, "connection_made", connection_made)
    return sent


@pytest.mark.parametrize(("what", "status"), [("usual", 200), ("error", 418)])
async def test_an_answer_leaves_in_one_piece(patient: Server, pieces: list[bytes], what: str, status: int):
    async with patient.client() as client:
        for _ in range(2):
            await client.send(f"GET /answers/{what} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(f"HTTP/1.1 {status} ".encode())
            assert b"\r\ncontent-length: 5\r\n" in head
            assert await client.reader.readexactly(5) == b"whole"
    assert len(pieces) == 2


async def _exchange(url: str, request: str) -> bytes:
    async with connected(url) as client:
        await client.send(f"{request}\r\nHost: h\r\n\r\n".encode())
        await client.send(b"GET /answers/usual HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        return await client.ended()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("what", ANSWERS)
async def test_otherwise_it_is_what_uvicorn_makes_of_it(patient: Server, method: str, version: str, what: str):
    request = f"{method} /answers/{quote(what)} HTTP/{version}"
    ours = await _exchange(patient.url, request)
    settings = patient.state["settings"]
    async with serving(lambda _: application(settings)) as (url, _):
        theirs = await _exchange(url, request)

    def without_what_differs(answer: bytes) -> bytes:
        return re.sub(rb"(?m)^(x-request-id|date): [^\r]*\r\n", b"", answer)

    assert without_what_differs(ours) == without_what_differs(theirs)
    assert b"\r\nx-more: 2" not in ours


@pytest.mark.parametrize(("size", "status"), [(BODY - 1, 200), (BODY, 413)])
async def test_a_body_that_comes_with_its_head_is_bounded_like_any_other(patient: Server, size: int, status: int):
    async with patient.client() as client:
        await client.send(CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (size, b"x" * size))
        assert (await client.answer())[0] == status


async def test_who_does_not_read_is_passed_nothing_on_and_misses_nothing(patient: Server):
    async with patient.client() as client:
        await client.send(b"GET /passed HTTP/1.1\r\nHost: h\r\n\r\n")
        await until(lambda: "refused" in patient.state["seen"])
        await client.reader.readuntil(b"\r\n\r\n")
        parts = []
        while size := int(await client.reader.readline(), 16):
            parts.append((await client.reader.readexactly(size + 2))[:-2])
    first, *middle, last = parts
    assert (first, last) == (b"first;", b";last")
    assert set(middle) == {b"x" * 100_000}


async def test_who_has_left_is_passed_nothing_on(patient: Server, caplog: pytest.LogCaptureFixture):
    patient.state["seen"].clear()
    async with patient.client() as client:
        await client.send(b"GET /passed HTTP/1.1\r\nHost: h\r\n\r\n")
        await until(lambda: "refused" in patient.state["seen"])
    await until(lambda: patient.state["seen"] == ["refused", True])
    assert from_uvicorn(caplog) == []


async def test_an_answer_that_comes_to_nothing_before_its_body_is_an_error(patient: Server):
    async with patient.client() as client:
        await client.send(b"GET /nothing HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await client.reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 500 ")
        assert b"200" not in await client.ended()
