"""A connection for each request: what httpx sends with where no request may go onto one that was used before."""

import asyncio
import re
import ssl
from asyncio.staggered import staggered_race
from collections.abc import AsyncIterator, Sequence
from functools import lru_cache, partial
from ipaddress import ip_address
from socket import SOCK_STREAM, socket
from typing import Any

import httptools
import httpx

_NEXT_ADDRESS_AFTER = 0.25
"""Seconds that an address of a host has to itself; then the next one is tried beside it."""

_PART = 16_384
"""Bytes of an answer that are unpacked at once, to a thousand times as many at most."""

_PORTS = {"http": 80, "https": 443}

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
"""What is in no header, or would end it."""


class ConnectsAnew(httpx.AsyncBaseTransport):
    """HTTP/1.1, and nothing that a pool is for.

    What fails before a byte has left raises ConnectError, ConnectTimeout, PoolTimeout or UnsupportedProtocol, but for
    what can never be sent (LocalProtocolError), and whatever fails later something else. An answer is read to its
    end at once.
    """

    def __init__(self, certificates: ssl.SSLContext, *, at_once: int, largest: int) -> None:
        """`at_once` connections at most, and `largest` bytes of an answer."""
        self._certificates = certificates
        self._free = asyncio.Semaphore(at_once)
        self._largest = largest

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        message = _written(request, await request.aread())
        timeouts = request.extensions["timeout"]
        await self._place(request, timeouts["pool"])
        try:
            exchange = await self._connect(request, timeouts["connect"])
            try:
                return await exchange.ask(message, timeouts["read"])
            finally:
                exchange.hang_up()
        finally:
            self._free.release()

    async def _place(self, request: httpx.Request, patience: float) -> None:
        if not self._free.locked():
            await self._free.acquire()
            return
        try:
            async with asyncio.timeout(patience):
                await self._free.acquire()
        except TimeoutError as error:
            raise httpx.PoolTimeout("no connection is free", request=request) from error

    async def _connect(self, request: httpx.Request, patience: float) -> "_Exchange":
        loop = asyncio.get_running_loop()
        url = request.url
        if url.scheme not in _PORTS:
            raise httpx.UnsupportedProtocol("neither http nor https", request=request)
        host, port = url.raw_host.decode(), url.port or _PORTS[url.scheme]
        tls: dict[str, Any] = {}
        if url.scheme == "https":
            tls = {"ssl": self._certificates, "server_hostname": host}
        exchange = _Exchange(request, loop.create_future(), self._largest)
        try:
            async with asyncio.timeout(patience):
                if _is_address(host):
                    await loop.create_connection(lambda: exchange, host, port, **tls)
                else:
                    found = await loop.getaddrinfo(host, port, type=SOCK_STREAM)
                    nearest = await _nearest([(family, address) for family, _, _, _, address in found])
                    await loop.create_connection(lambda: exchange, sock=nearest, **tls)
        except TimeoutError as error:
            raise httpx.ConnectTimeout("no connection in time", request=request) from error
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(type(error).__name__, request=request) from error
        return exchange


def _written(request: httpx.Request, body: bytes) -> bytes:
    lines = [b"%s: %s" % header for header in request.headers.raw]
    if _CONTROL.search(b"".join(lines)) is not None:
        raise httpx.LocalProtocolError("a header cannot be sent", request=request)
    return b"\r\n".join([b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path), *lines, b"", body])


@lru_cache
def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


async def _nearest(addresses: Sequence[tuple[int, Any]]) -> socket:
    """A connection to that of a host's addresses which takes one first, in the order in which the system names them."""
    attempts = [partial(_reach, family, address) for family, address in addresses]
    nearest: socket | None
    nearest, _, errors = await staggered_race(attempts, _NEXT_ADDRESS_AFTER)
    if nearest is None:
        raise next(filter(None, errors), OSError("no address"))
    return nearest


async def _reach(family: int, address: Any) -> socket:
    reached = socket(family, SOCK_STREAM)
    try:
        reached.setblocking(False)
        await asyncio.get_running_loop().sock_connect(reached, address)
    except BaseException:
        reached.close()
        raise
    return reached


class _Parts(httpx.AsyncByteStream):
    """A body that is there, in parts so small that whoever unpacks it can stop in time."""

    def __init__(self, parts: Sequence[bytes]) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            for start in range(0, len(part), _PART):
                yield part[start : start + _PART]


class _Exchange(asyncio.Protocol):
    """One request and its answer."""

    def __init__(self, request: httpx.Request, answer: "asyncio.Future[httpx.Response]", largest: int) -> None:
        self._request = request
        self._answer = answer
        self._left = largest
        self._parser: Any = None
        self._transport: Any = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._in_body = False

    async def ask(self, message: bytes, patience: float | None) -> httpx.Response:
        # Not before whoever connects has heard of the connection: what came to nothing by then has not left.
        self._transport.write(message)
        try:
            async with asyncio.timeout(patience):
                return await self._answer
        except TimeoutError as error:
            raise httpx.ReadTimeout("no answer in time", request=self._request) from error

    def hang_up(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._fail(httpx.ReadError(type(exc).__name__, request=self._request))
        elif self._in_body and self._ends_with_the_connection():
            self._complete()
        else:
            self._fail(httpx.RemoteProtocolError("the connection has ended before the answer", request=self._request))
        # They know each other, and would stay until the garbage collector comes.
        self._parser = None

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            self._fail(httpx.ReadError("the answer is too large", request=self._request))
            self._transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(httpx.RemoteProtocolError(type(error).__name__, request=self._request))

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # what follows a body tells nothing
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._in_body = True

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        if httpx.codes.is_informational(self._parser.get_status_code()):
            # The answer is still to come.
            self._in_body = False
            self._headers.clear()
        else:
            self._complete()

    def _ends_with_the_connection(self) -> bool:
        return not any(name.lower() in {b"content-length", b"transfer-encoding"} for name, _ in self._headers)

    def _complete(self) -> None:
        if not self._answer.done():
            status = self._parser.get_status_code()
            self._answer.set_result(httpx.Response(status, headers=self._headers, stream=_Parts(self._body)))

    def _fail(self, error: httpx.TransportError) -> None:
        if not self._answer.done():
            self._answer.set_exception(error)
