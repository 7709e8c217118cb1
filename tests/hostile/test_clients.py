"""Clients that mean harm: others are served all the while, and when they are gone nothing is left of them."""

import asyncio
import gc
import gzip
import os
import resource
import socket
import struct
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import uvicorn

from switchboard.app import create_app
from switchboard.errors import PUBLIC
from switchboard.protocol import BoundedProtocol
from tests.conftest import HOOK_KEY, Servers, serving, settings_for, until
from tests.test_protocol import Client, connected

MANY = 20
"""Clients that do the same at once."""
TIMEOUT = 0.3
"""Seconds in which a head must have arrived, and again its body."""
RUNS = "/api/happyrobot/runs"
GET = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
POST = b"POST /api/webhooks/happyrobot HTTP/1.1\r\nHost: h\r\nX-API-KEY: %b\r\n" % HOOK_KEY.encode()
STREAM = b"GET /api/events HTTP/1.1\r\nHost: h\r\n\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass
class House:
    """A service, seen from inside."""

    url: str
    server: uvicorn.Server

    @property
    def left(self) -> dict[str, int]:
        """What there is of clients: their connections, as we and as the system know them, and what is done for them."""
        port = f":{urlsplit(self.url).port:04X}"
        sockets = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()]
        return {
            "connections": len(self.connections),
            # Of this end, those that belong to somebody still.
            "sockets": sum(found[1].endswith(port) and found[9] != "0" for found in sockets),
            "answers": len(self.server.server_state.tasks),
            "tasks": len(asyncio.all_tasks()),
        }

    @property
    def connections(self) -> set[Any]:
        return self.server.server_state.connections

    def client(self) -> AbstractAsyncContextManager[Client]:
        return connected(self.url)


@asynccontextmanager
async def house_with(database_url: str, servers: Servers, **more: Any) -> AsyncIterator[House]:
    # Other tests come from this address, too, with wrong credentials.
    settings = settings_for(database_url, servers.redis_url, None, **more)
    async with serving(lambda _: create_app(settings, worker=False), http=BoundedProtocol) as (url, server):
        house = House(url, server)
        async with house.client() as follower:
            # From now on what streams need is there, and so are the connections to PostgreSQL.
            await follower.send(STREAM.replace(b" HTTP", b"?context_id=nobody HTTP"))
            await follower.reader.readuntil(b"\n\n")
            await asyncio.gather(*(ask(house, RUNS) for _ in range(20)))
            await until(lambda: len(house.connections) == 1)
            yield house
            server.lifespan.state["leaving"].begin()


@pytest.fixture(scope="module")
async def house(database_url: str, servers: Servers) -> AsyncIterator[House]:
    async with house_with(database_url, servers, request_timeout=TIMEOUT) as house:
        yield house


async def ask(house: House, path: str) -> bytes:
    """What somebody is answered who means no harm."""
    async with house.client() as client:
        await client.send(getting(path))
        return await client.ended()


def getting(target: str) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n" % target.encode("latin-1")


@asynccontextmanager
async def as_before(house: House) -> AsyncIterator[None]:
    """Somebody else is served while this goes on; behind it nothing is left."""
    await until(lambda: len(house.connections) == 1)
    before = house.left
    over = asyncio.Event()

    async def somebody_else() -> int:
        served = 0
        while not over.is_set():
            answer = await ask(house, RUNS)
            assert answer.startswith(b"HTTP/1.1 200 "), answer
            served += 1
        return served

    other = asyncio.create_task(somebody_else())
    yield
    over.set()
    assert await other > 0
    await until(lambda: len(house.connections) == 1)
    await until(lambda: all(left <= before[what] for what, left in house.left.items()))


# What many do at once.

Attack = Callable[[Client], Awaitable[object]]


def saying(*parts: bytes) -> Attack:
    """Sends this, and waits for the end."""

    async def attack(client: Client) -> None:
        with suppress(ConnectionError):
            await client.send(*parts)
        await client.ended()

    return attack


def dripping(start: bytes) -> Attack:
    """Never comes to an end."""

    async def attack(client: Client) -> None:
        with suppress(ConnectionError):
            await client.send(start)
        drip = asyncio.create_task(client.drip())
        await client.ended()
        drip.cancel()

    return attack


def pouring(start: bytes, part: bytes) -> Attack:
    """Sends without an end, until it is not heard any more."""

    async def attack(client: Client) -> None:
        pour = asyncio.create_task(client.pour([start, *[part] * 2_000]))
        await client.ended()
        pour.cancel()

    return attack


def leaving(sent: bytes) -> Attack:
    """Sends this and says that nothing follows."""

    async def attack(client: Client) -> None:
        await client.send(sent)
        client.writer.write_eof()
        await client.ended()

    return attack


def breaking(sent: bytes) -> Attack:
    """Sends this and is gone without a word."""

    async def attack(client: Client) -> None:
        await client.send(sent)
        wire = client.writer.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.writer.transport.abort()

    return attack


async def flood(client: Client) -> None:
    """Asks a thousand times without waiting for an answer, and is answered as often."""
    answers = asyncio.create_task(client.ended())
    await client.send(GET * 1_000 + GET[:-2] + b"Connection: close\r\n\r\n")
    assert (await answers).count(b"HTTP/1.1 200 ") == 1_001


BOMB = gzip.compress(b'{"run_id": "r", "event_type": "log", "data": "' + b"x" * 50_000_000 + b'"}')


def packed(coding: bytes, body: bytes) -> bytes:
    return POST + b"Content-Encoding: %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (
        coding,
        len(body),
        body,
    )


ATTACKS: dict[str, Attack] = {
    "says nothing": saying(),
    "drips a head": dripping(b"GET /"),
    "drips a body": dripping(POST + b"Content-Length: 900000\r\n\r\n"),
    "half a head": saying(GET[:-2]),
    "half a body": saying(POST + b"Content-Length: 100\r\n\r\nhalf"),
    "waits to be asked": saying(POST + b"Expect: 100-continue\r\nContent-Length: 100\r\n\r\n"),
    "goes after half a head": leaving(GET[:-2]),
    "goes after half a body": leaving(POST + b"Content-Length: 100\r\n\r\nhalf"),
    "breaks off in a head": breaking(GET[:-2]),
    "breaks off in a body": breaking(POST + b"Content-Length: 100\r\n\r\nhalf"),
    "breaks off an answer": breaking(GET[:-2] + b"\r\n" + STREAM),
    "breaks off a stream": breaking(STREAM),
    "one large header": pouring(b"GET / HTTP/1.1\r\nX: ", b"x" * 10_000),
    "many headers": pouring(b"GET / HTTP/1.1\r\n", b"X: y\r\n" * 1_000),
    "extensions of chunks": pouring(CHUNKED + b"1;", b"x" * 10_000),
    "trailers": pouring(CHUNKED + b"0\r\n", b"X: y\r\n" * 1_000),
    "chunks of a byte": pouring(CHUNKED, b"1\r\nx\r\n" * 1_000),
    "a flood of requests": flood,
    "a flood of nonsense": pouring(b"", b"\x00" * 10_000),
    "a gzip bomb": saying(packed(b"gzip", BOMB)),
    "a bomb in a bomb": saying(packed(b"gzip, gzip", gzip.compress(BOMB))),
    "a deflate bomb": saying(packed(b"deflate", zlib.compress(b"\x00" * 50_000_000))),
}


async def attack(house: House, what: str) -> None:
    async def one() -> None:
        async with house.client() as client:
            await ATTACKS[what](client)

    await asyncio.gather(*(one() for _ in range(2 if "flood" in what else MANY)))


@pytest.mark.parametrize("what", ATTACKS)
async def test_others_are_served_and_nothing_is_left(house: House, what: str):
    async with as_before(house):
        await attack(house, what)


@asynccontextmanager
async def deaf_to(house: House, asked: bytes) -> AsyncIterator[Any]:
    """Asks for something and does not read it; the server's side of the connection."""
    with socket.socket() as client:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", urlsplit(house.url).port))
        here, connections = client.getsockname(), house.connections
        await until(lambda: any(each.client == here for each in connections))
        await loop.sock_sendall(client, asked)
        yield next(each for each in connections if each.client == here)


@pytest.mark.parametrize("asked", ["/runs?context_id={of}", "/runs/{of}/events", "/runs/{of}"])
async def test_who_does_not_read_lists_is_given_up(house: House, large_run: str, asked: str):
    request = f"GET /api/happyrobot{asked.format(of=large_run)} HTTP/1.1\r\nHost: h\r\n\r\n".encode()
    async with as_before(house):
        await _given_up(house, request)


async def test_who_does_not_read_a_stream_is_given_up(house: House, large_run: str):
    async with as_before(house):
        await _given_up(house, STREAM.replace(b" HTTP", f"?run_id={large_run}&last_event_id=0 HTTP".encode()))


async def _given_up(house: House, request: bytes) -> None:
    async with AsyncExitStack() as stack:
        deaf = {await stack.enter_async_context(deaf_to(house, request)) for _ in range(5)}
        await until(lambda: deaf.isdisjoint(house.connections))


@pytest.fixture
async def large_run(house: House) -> str:
    """A run with more events than fit between two sockets; it is its own context."""
    run_id = uuid4().hex
    db = house.server.lifespan.state["db"]
    async with db.begin() as conn:
        await conn.exec_driver_sql(
            f"INSERT INTO agent_runs (run_id, context_id, status) VALUES ('{run_id}', '{run_id}', 'RUNNING')"
        )
        await conn.exec_driver_sql(
            "INSERT INTO run_events (run_id, context_id, event_type, status, data) SELECT "
            f"'{run_id}', '{run_id}', 'log', 'RUNNING', to_json(repeat('x', 800000)) FROM generate_series(1, 12)"
        )
    return run_id


def memory() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def test_memory_does_not_grow_with_attacks(house: House):
    worst = ("one large header", "extensions of chunks", "breaks off in a body", "a gzip bomb", "a flood of requests")
    for what in worst:
        await attack(house, what)
    before = memory()
    for _ in range(2):
        for what in worst:
            await attack(house, what)
    # Each round brings a hundred times as much.
    assert memory() - before < 20_000_000


# Requests that would be two for somebody else.

TWO_WAYS = [
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
    b"Transfer-Encoding: chunked, identity\r\n",
    b"Transfer-Encoding: xchunked\r\n",
    b"Transfer-Encoding : chunked\r\n",
    b"Transfer-Encoding:\x0bchunked\r\n",
    b"Transfer-Encoding: chunked\x00\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n",
    b"Content-Length: 5, 5\r\n",
    b"Content-Length: +5\r\n",
    b"Content-Length: -5\r\n",
    b"Content-Length: 0x5\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Content-Length : 5\r\n",
    b"Content-\x00Length: 5\r\n",
    b"X: y\r\n Transfer-Encoding: chunked\r\n",
    b"X: y\rTransfer-Encoding: chunked\r\n",
    b"X: y\nTransfer-Encoding: chunked\n",
    b"X: y\x00\r\n",
    b" X: y\r\n",
    b"X\r\n",
    b": y\r\n",
]
NO_REQUESTS = [
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET h:80 HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /\x1b HTTP/1.1\r\nHost: h\r\n\r\n",
    b"G\xc3\x84T / HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET http://[ HTTP/1.1\r\nHost: h\r\n\r\n",
]


async def all_answers(house: House, sent: list[bytes]) -> dict[bytes, bytes]:
    """What each is answered, each on a connection of its own."""

    async def one(each: bytes) -> bytes:
        async with house.client() as client:
            with suppress(ConnectionError):
                await client.send(each)
            return await client.ended()

    return dict(zip(sent, await asyncio.gather(*map(one, sent)), strict=True))


async def test_what_could_be_read_in_two_ways_is_read_in_none(house: House):
    async with as_before(house):
        answers = await all_answers(house, [POST + head + b"\r\n0\r\n\r\n" + GET for head in TWO_WAYS] + NO_REQUESTS)
    for sent, answer in answers.items():
        assert answer.startswith(b"HTTP/1.1 400 "), sent
        assert answer.count(b"HTTP/1.1 ") == 1, sent


async def test_what_is_refused_early_is_refused_in_the_shape_of_where_it_was_to_go(house: House):
    for path, shape in ((RUNS, {"error"}), (f"{PUBLIC}/deliveries", {"message", "error", "statusCode"})):
        for more, status in ((b"X: " + b"y" * 40_000 + b"\r\n\r\n", 431), (b"X\r\n\r\n", 400), (b"", 408)):
            async with house.client() as client:
                await client.send(b"GET %b HTTP/1.1\r\nHost: h\r\n%b" % (path.encode(), more))
                answered, _, body = await client.answer()
            assert (answered, set(body)) == (status, shape)


# Addresses.

TRICKS = [
    *("//", "//evil.example/..", "/./healthz", "/../healthz", "/..%2f..%2fetc%2fpasswd", "/%2e%2e/healthz", "/%00"),
    *("/%", "/%zz", "/%c0%af", "/%c0%ae%c0%ae/", "/%ff", "/healthz;x=y", "/healthz/", "/HEALTHZ", "/healthz%20"),
    *("/healthz%2f", "/console/..%2fapp.py", "/console/%2e%2e%2fapp.py", "/console/../app.py", "/console/%00init.js"),
    *("/console/", "/docs/..%2f..%2fsettings.py", "/docs/%2fetc%2fpasswd", "/docs/.%00", "/openapi.json%00", "/.env"),
    *("/.git/config", f"{RUNS}/..%2f..%2ftokens", f"{RUNS}/%00", f"{RUNS}/a%00b", f"{RUNS}/%0d%0aSet-Cookie:%20x=y"),
    *(f"{RUNS}/;/events", f"{RUNS}/{'x' * 30_000}", f"{RUNS}/%F0%9F%98%80", f"{RUNS}/\xff", f"{RUNS}//events"),
    *(f"{RUNS}/{'%2e' * 5_000}", f"{PUBLIC}//deliveries", f"{PUBLIC}/..%2f..%2f..%2fhealthz", f"{PUBLIC}%2f"),
    *(f"{PUBLIC}/executions/%00/status", f"{PUBLIC}/executions/{'0' * 5_000}/status"),
]
QUERIES = [
    *("limit=0", "limit=" + "9" * 5_000, "limit=1&limit=2000", "limit=1e3", "limit=-1", "limit=%EF%BC%91", "limit="),
    *("cursor=%00", "cursor=" + "A" * 10_000, "cursor=MjAyNg", "cursor=%ff", "cursor=&cursor=x", "cursor[]=1"),
    *("context_id=%00", "context_id=" + "x" * 256, "context_id=%ff", "context_id=%0d%0a", "status=%F0%9F%98%80"),
    *("&".join(f"a{number}=b" for number in range(4_000)), "&" * 30_000, "=" * 30_000, "%" * 3_000, "?" * 3_000),
    *("+", ";", "access_token=" + "x." * 5_000, "access_token=eyJhbGciOiJub25lIn0.e30.", "hours=1e9", "status=0"),
    *("after=9999999999999999999", "up_to=" + "9" * 19, "run_id=%00", "run_id="),
]
LISTS = [RUNS, "/api/happyrobot/approvals", f"{RUNS}/x/events"]


async def test_no_path_leads_anywhere_else(house: House):
    async with as_before(house):
        answers = await all_answers(house, list(map(getting, TRICKS)))
    for sent, answer in answers.items():
        head, _, _ = answer.partition(b"\r\n\r\n")
        assert head.split()[1] in (b"307", b"400", b"401", b"404"), (sent, head)
        assert b"\r\nset-cookie" not in head.lower()
        # Without the slash behind it.
        assert head.split()[1] != b"307" or b"\r\nlocation: http://h/" in head, (sent, head)


async def test_no_query_is_too_much(house: House):
    async with as_before(house):
        answers = await all_answers(house, [getting(f"{path}?{query}") for path in LISTS for query in QUERIES])
    for sent, answer in answers.items():
        assert answer.split()[1] in (b"200", b"400", b"401", b"404"), (sent, answer)


# Ten thousand.

CROWD = """
import socket, sys
port, many, started = int(sys.argv[1]), int(sys.argv[2]), b"GET /healthz HTTP/1.1\\r\\nHost: h\\r\\nX: "
crowd = []
for number in range(many):
    one = socket.create_connection(("127.0.0.1", port))
    if number % 2:
        one.sendall(started)
    crowd.append(one)
print("here", flush=True)
sys.stdin.read()
"""


@pytest.mark.large
async def test_ten_thousand_connections_keep_nobody_from_being_served(database_url: str, servers: Servers):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    many = min(10_000, before[1] - 500)
    try:
        async with house_with(database_url, servers, request_timeout=600) as house, as_before(house):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", CROWD, str(urlsplit(house.url).port), str(many)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert process.stdout is not None
            assert await process.stdout.readline() == b"here\n"
            await until(lambda: len(house.connections) >= many)
            assert (await ask(house, RUNS)).startswith(b"HTTP/1.1 200 ")
            await process.communicate(b"")  # upon which they all go
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
