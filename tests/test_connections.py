"""The connections that hooks get: one for each request, and for certain nothing sent where that is said."""

import asyncio
import contextlib
import gc
import gzip
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx
import pytest

from switchboard.happyrobot import client, connections
from switchboard.happyrobot.client import _NEVER_LEFT
from switchboard.happyrobot.connections import ConnectsAnew, _nearest
from tests.conftest import until
from tests.receiver import receiving
from tests.test_sender import certificate

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"

T = TypeVar("T")
Speak = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """A server that has heard so much, and says what a test wants it to."""

    url: str = ""
    heard: list[bytes] = field(default_factory=list)
    """What came over each connection."""
    came: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether a request has come."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether somebody has hung up."""


@contextlib.asynccontextmanager
async def saying(speak: Speak, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server()
    writers: list[asyncio.StreamWriter] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            server.heard.append(head + await reader.readexactly(length))
            server.came.set()
            await speak(writer)
            await reader.read()
            server.gone.set()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls) as listening:
        server.url = f"http{'s' if tls else ''}://127.0.0.1:{listening.sockets[0].getsockname()[1]}/hooks/a%20b?c=d"
        try:
            yield server
        finally:
            for writer in writers:
                writer.transport.abort()


def says(*parts: bytes, hang_up: bool = False) -> Speak:
    async def speak(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
        if hang_up:
            writer.close()

    return speak


def transport(certificates: ssl.SSLContext | None = None, *, at_once: int = 10, largest: int = 10_000) -> ConnectsAnew:
    return ConnectsAnew(certificates or client._certificates(), at_once=at_once, largest=largest)


async def soon(awaitable: Awaitable[T]) -> T:
    async with asyncio.timeout(5):
        return await awaitable


async def ask(
    url: str, to: ConnectsAnew | None = None, *, patience: float = 5, headers: dict[str, str] | None = None
) -> httpx.Response:
    """What is answered, read to its end."""
    timeouts = {"connect": patience, "pool": patience, "read": patience, "write": patience}
    request = httpx.Request("POST", url, headers=headers, json={"n": 1}, extensions={"timeout": timeouts})
    response: httpx.Response = await (to or transport()).handle_async_request(request)
    await response.aread()
    return response


async def test_a_request_arrives_as_it_is_and_so_does_its_answer():
    async with saying(says(b"HTTP/1.1 429 No\r\nRetry-After: 7\r\nContent-Length: 4\r\n\r\nbusy")) as server:
        answer = await ask(server.url, headers={"X-API-KEY": "k"})
    host = server.url.split("/")[2].encode()
    assert server.heard == [
        b"POST /hooks/a%20b?c=d HTTP/1.1\r\nHost: " + host + b"\r\nX-API-KEY: k\r\nContent-Length: 7\r\n"
        b'Content-Type: application/json\r\n\r\n{"n":1}'
    ]
    assert (answer.status_code, answer.headers["retry-after"], answer.content) == (429, "7", b"busy")


async def test_each_request_has_a_connection_which_ends_with_its_answer():
    async with saying(says(OK)) as server:
        to = transport()
        for _ in range(3):
            server.gone.clear()
            await ask(server.url, to)
            await soon(server.gone.wait())
    assert len(server.heard) == 3


@pytest.mark.parametrize(
    ("said", "content"),
    [
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc", b"def"], b"abcdef"),
        ([b"HTTP/1.1 200 OK\r\nContent-", b"Length: 0\r\n\r\n"], b""),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"0\r\nX: y\r\n\r\n"], b"abc"),
        ([b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n", OK], b"OK"),
        ([b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK], b"OK"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], b""),
    ],
)
async def test_an_answer_is_read_to_its_end_however_it_ends(said: list[bytes], content: bytes):
    async with saying(says(*said)) as server:
        answer = await ask(server.url)
    assert answer.content == content
    assert answer.is_success
    assert not {"x", "link"} & set(answer.headers), "what belongs to another message"


async def test_an_answer_may_end_with_its_connection():
    async with saying(says(b"HTTP/1.0 200 OK\r\n\r\nall", b" of it", hang_up=True)) as server:
        assert (await ask(server.url)).content == b"all of it"


async def test_what_is_compressed_is_unpacked():
    packed = gzip.compress(b"much" * 100)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    async with saying(says(head + packed)) as server:
        assert (await ask(server.url)).content == b"much" * 100


@pytest.mark.parametrize(
    "speak",
    [
        says(hang_up=True),
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc", hang_up=True),
        says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", hang_up=True),
        says(b"HTTP/1.1 200 OK\r\nContent-", hang_up=True),
        says(b"HTTP/1.1 100 Continue\r\n\r\n", hang_up=True),
        says(b"SSH-2.0-OpenSSH\r\n"),
        says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: other\r\nConnection: upgrade\r\n\r\n"),
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n" + b"x" * 20_000),
        says(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 2_000),
    ],
    ids=["nothing", "cut", "cut chunks", "cut head", "to be continued", "no HTTP", "other", "large", "endless head"],
)
async def test_what_goes_wrong_once_the_request_has_left_never_says_that_it_has_not(speak: Speak):
    async with saying(speak) as server:
        with pytest.raises(httpx.TransportError) as told:
            await ask(server.url)
    assert len(server.heard) == 1
    assert not isinstance(told.value, _NEVER_LEFT)


async def test_a_connection_that_is_reset_says_nothing_about_the_request():
    async def reset(writer: asyncio.StreamWriter) -> None:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async with saying(reset) as server:
        with pytest.raises(httpx.ReadError, match="ConnectionResetError"):
            await ask(server.url)


async def test_an_answer_is_waited_for_no_longer_than_was_asked():
    async with saying(says()) as server:
        with pytest.raises(httpx.ReadTimeout):
            await ask(server.url, patience=0.05)
        await soon(server.gone.wait())


async def test_a_connection_leaves_nothing_for_the_garbage_collector():
    def exchanges() -> int:
        return sum(isinstance(each, connections._Exchange) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        async with saying(says(OK)) as server:
            for _ in range(10):
                server.gone.clear()
                assert (await ask(server.url)).content == b"OK"
                await soon(server.gone.wait())
            await until(lambda: exchanges() == 0)
        with listener() as silent:
            port = silent.getsockname()[1]
        with pytest.raises(httpx.ConnectError):
            await ask(f"http://127.0.0.1:{port}/")
        await until(lambda: exchanges() == 0)
    finally:
        gc.enable()


async def test_whoever_stops_waiting_hangs_up():
    async with saying(says()) as server:
        to = transport(at_once=1)
        asking = asyncio.create_task(ask(server.url, to))
        await soon(server.came.wait())
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await soon(server.gone.wait())
        assert not to._free.locked(), "its place is free again"


def listener(backlog: int = 10) -> socket.socket:
    listening = socket.create_server(("127.0.0.1", 0), backlog=backlog)
    listening.setblocking(False)
    return listening


async def test_nobody_there_is_told_from_somebody_who_does_not_answer():
    with listener() as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(httpx.ConnectError):
        await ask(f"http://127.0.0.1:{port}/")
    with pytest.raises(httpx.ConnectError):
        await ask(f"http://localhost:{port}/")
    with pytest.raises(httpx.ConnectError):
        await ask(f"http://no-such-host.invalid:{port}/", patience=60)


async def test_before_there_is_a_connection_nothing_is_sent():
    """Somebody takes it, and says nothing in reply to the beginning of an encrypted one."""
    with listener() as silent:
        port = silent.getsockname()[1]
        with pytest.raises(httpx.ConnectTimeout):
            await ask(f"https://127.0.0.1:{port}/", patience=0.05)
        taken, _ = await asyncio.get_running_loop().sock_accept(silent)
        with taken:
            heard = b""
            while came := await asyncio.get_running_loop().sock_recv(taken, 10_000):
                heard += came
    assert heard.startswith(b"\x16\x03"), "a greeting of TLS, and nothing else"
    assert b"POST" not in heard


async def test_who_finds_no_connection_free_has_sent_nothing():
    async with saying(says()) as server:
        to = transport(at_once=1)
        first = asyncio.create_task(ask(server.url, to))
        await soon(server.came.wait())
        with pytest.raises(httpx.PoolTimeout):
            await ask(server.url, to, patience=0.01)
        first.cancel()
        await asyncio.wait({first})
    assert len(server.heard) == 1


@pytest.mark.parametrize("value", ["a\r\nX-Other: b", "a\nb", "a\x00b"])
async def test_a_header_cannot_smuggle_in_another(value: str):
    async with saying(says(OK)) as server:
        with pytest.raises(httpx.LocalProtocolError):
            await ask(server.url, headers={"X-API-KEY": value})
    assert server.heard == []


async def test_only_http_is_spoken():
    with pytest.raises(httpx.UnsupportedProtocol):
        await ask("ftp://127.0.0.1/")


async def test_an_encrypted_server_must_show_that_it_is_the_one(tmp_path: Path):
    async with saying(says(OK), tls=certificate(tmp_path)) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        with pytest.raises(httpx.ConnectError):
            await ask(url)
        trusting = ssl.create_default_context(cafile=str(tmp_path / "pair.pem"))
        with pytest.raises(httpx.ConnectError):
            await ask(server.url, transport(trusting))
        assert server.heard == []
        assert (await ask(url, transport(trusting))).content == b"OK"


async def test_an_address_that_does_not_answer_does_not_keep_the_others_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "_NEXT_ADDRESS_AFTER", 0.01)
    loop = asyncio.get_running_loop()
    with listener() as good, listener(0) as full, contextlib.ExitStack() as waiting:
        for _ in range(2):  # what it takes to fill it
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(full.getsockname())
        with listener() as nobody:
            closed = nobody.getsockname()
        addresses = [(socket.AF_INET, each) for each in (full.getsockname(), closed, good.getsockname())]
        with await soon(_nearest(addresses)) as found:
            assert found.getpeername() == good.getsockname()
        with pytest.raises(ConnectionRefusedError):
            await _nearest([(socket.AF_INET, closed)])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await _nearest([(socket.AF_INET, full.getsockname())])
        taken, _ = await loop.sock_accept(good)
        taken.close()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "all_proxy"])
async def test_a_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch, name: str):
    async with receiving() as proxy:
        monkeypatch.setenv(name, proxy.url.removesuffix("/hooks?of=mine"))
        to = client._new_connections()
        request = httpx.Request("POST", "http://hooks.example/a", json={}, extensions=client._HOOK_TIMEOUTS)
        response = await to.handle_async_request(request)
        assert await response.aread() == b"OK"
        await response.aclose()
        await to.aclose()
        assert proxy.requests[0].line == "POST http://hooks.example/a HTTP/1.1"


async def test_what_is_to_be_unpacked_comes_in_small_parts():
    packed = gzip.compress(bytes(range(256)) * 4_000, compresslevel=0)
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n".encode()
    async with saying(says(head + packed)) as server:
        timeouts = {"connect": 5, "pool": 5, "read": 5, "write": 5}
        request = httpx.Request("POST", server.url, json={}, extensions={"timeout": timeouts})
        response = await soon(transport(largest=2_000_000).handle_async_request(request))
        parts = [len(part) async for part in response.aiter_raw()]
    assert sum(parts) == len(packed)
    assert max(parts) <= 16_384
