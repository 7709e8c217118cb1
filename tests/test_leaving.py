"""What a process does that is told to leave: nothing that was confirmed is lost, and it does not take long."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database
from switchboard.clients import Client
from switchboard.tables import ExecutionStatus, executions, run_events
from tests.conftest import APP_SECRET, HOOK_KEY, Servers, insert_run, until
from tests.receiver import never, receiving
from tests.wires import relayed

IN_TIME = 10
"""Seconds after which a platform kills what has not left."""


@dataclass
class Process:
    """A process that serves, and where."""

    running: asyncio.subprocess.Process
    address: str

    async def leaves(self) -> float:
        """Tells it to leave; returns how long that took, in seconds."""
        told = time.monotonic()
        self.running.send_signal(signal.SIGTERM)
        async with asyncio.timeout(4 * IN_TIME):
            assert await self.running.wait() == 0
        return time.monotonic() - told


@contextlib.asynccontextmanager
async def served(database_url: str, redis_url: str, *arguments: str, **variables: str) -> AsyncIterator[Process]:
    """`switchboard serve` at a free port, on a database at the newest schema."""
    environment = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "HAPPYROBOT_WEBHOOK_URL": "http://127.0.0.1:1/hooks/none",
        "APP_URL": "http://127.0.0.1:1",
        "HAPPYROBOT_X_API_KEY": HOOK_KEY,
        "APP_SECRET": APP_SECRET,
        "LOG_LEVEL": "error",
        "PATH": "",
    }
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "switchboard", "serve", "--port", "0", "--no-migrate", *arguments),
        env=environment | variables,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert running.stdout is not None
    try:
        yield Process(running, (await running.stdout.readline()).decode().split()[-1])
    finally:
        # With the processes that it has started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        await running.wait()


@dataclass
class Watcher:
    """A browser that follows a context, wherever it is served."""

    context_id: str
    following: asyncio.Event = field(default_factory=asyncio.Event)
    seen: list[tuple[int, Any]] = field(default_factory=list)
    """The ids of what it was sent, and what that said."""
    last_line: str = ""

    async def follow(self, http: httpx.AsyncClient) -> None:
        """Follows until the stream ends, from behind what it has seen."""
        headers = {"Last-Event-ID": str(self.seen[-1][0] if self.seen else 0)}
        params = {"context_id": self.context_id}
        async with http.stream("GET", "/api/events", params=params, headers=headers) as answer:
            self.following.set()
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    event = json.loads(line[6:])
                    self.seen.append((event["id"], event["data"]))
                self.last_line = line or self.last_line


async def send(http: httpx.AsyncClient, run_ids: list[str], numbers: Iterator[int], kept: set[int]) -> None:
    """Sends callbacks until nobody takes them any more; notes which were confirmed."""
    for number in numbers:
        body = {"run_id": run_ids[number % len(run_ids)], "event_type": "log", "data": number}
        try:
            answer = await http.post("/api/webhooks/happyrobot", json=body, headers={"X-API-KEY": HOOK_KEY})
        except httpx.TransportError:
            return
        if answer.status_code == 200:
            kept.add(number)


@pytest.mark.parametrize("workers", [1, 2])
async def test_under_load_nothing_confirmed_is_lost_and_every_stream_goes_on_elsewhere(
    servers: Servers, database_url: str, db: AsyncEngine, workers: int
):
    contexts = [f"order_{uuid4().hex}" for _ in range(20)]
    run_ids = [await insert_run(db, context_id) for context_id in contexts]
    watchers = [Watcher(context_id) for context_id in contexts]
    kept: set[int] = set()
    limits = httpx.Limits(max_connections=100)
    async with (
        served(database_url, servers.redis_url, "--workers", str(workers)) as one,
        served(database_url, servers.redis_url) as other,
        Client(base_url=one.address, timeout=30, limits=limits) as here,
        Client(base_url=other.address, timeout=30, limits=limits) as there,
    ):
        following = [asyncio.create_task(watcher.follow(here)) for watcher in watchers]
        await asyncio.gather(*(watcher.following.wait() for watcher in watchers))
        numbers = itertools.count()
        sending = [asyncio.create_task(send(here, run_ids, numbers, kept)) for _ in range(16)]
        await until(lambda: len(kept) >= 300)
        took = await one.leaves()
        await asyncio.gather(*sending)
        await asyncio.gather(*following)
        assert {watcher.last_line for watcher in watchers} == {": goodbye, resume elsewhere"}

        async with db.connect() as conn:
            rows = await conn.execute(
                select(run_events.c.context_id, run_events.c.data)
                .where(run_events.c.run_id.in_(run_ids))
                .order_by(run_events.c.id)
            )
            stored: dict[str, list[Any]] = {context_id: [] for context_id in contexts}
            for context_id, data in rows:
                stored[context_id].append(data)
        written = [data for each in stored.values() for data in each]
        assert len(written) == len(set(written))
        assert kept <= set(written)

        again = [asyncio.create_task(watcher.follow(there)) for watcher in watchers]
        await until(lambda: all(len(watcher.seen) >= len(stored[watcher.context_id]) for watcher in watchers))
        for task in again:
            task.cancel()
        await asyncio.gather(*again, return_exceptions=True)
    assert {watcher.context_id: [data for _, data in watcher.seen] for watcher in watchers} == stored
    assert took < IN_TIME


async def test_a_call_that_is_being_placed_is_heard_out_for_as_long_as_there_is(
    servers: Servers, database_url: str, context_id: str
):
    async with (
        receiving(never) as hook,
        served(database_url, servers.redis_url, HAPPYROBOT_WEBHOOK_URL=hook.url) as process,
        httpx.AsyncClient(base_url=process.address, timeout=30) as http,
    ):
        call = asyncio.create_task(http.post("/api/happyrobot/trigger", json={"context_id": context_id}))
        await hook.took(1)
        took = await process.leaves()
        answer = await call
    assert (answer.status_code, answer.json()["status"]) == (502, "submission_unknown")
    engine = database.connect(database_url)
    async with engine.connect() as conn:
        query = select(executions.c.status).where(executions.c.context_id == context_id)
        assert await conn.scalar(query) == ExecutionStatus.SUBMISSION_UNKNOWN
    await engine.dispose()
    assert took < IN_TIME


async def under_way(address: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which the answer to a callback is still to come, which the service has begun with for certain.

    It has come together with a request that is answered by now.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(address).port)
    first = "GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
    second = "POST /api/webhooks/happyrobot HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    writer.write(f"{first}{second}X-API-KEY: {HOOK_KEY}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None
    await reader.readexactly(int(length[1]))
    return reader, writer


@pytest.mark.parametrize("gone", ["postgresql", "redis", "both"])
async def test_servers_that_say_nothing_any_more_keep_nobody(
    servers: Servers, own_database: str, context_id: str, gone: str
):
    async with (
        relayed(own_database) as postgresql,
        relayed(servers.redis_url) as redis,
        served(postgresql.url, redis.url) as process,
        httpx.AsyncClient(base_url=process.address, timeout=30) as http,
    ):
        engine = database.connect(own_database)
        run_id = await insert_run(engine, context_id)
        await engine.dispose()
        watcher = Watcher(context_id)
        following = asyncio.create_task(watcher.follow(http))
        await watcher.following.wait()
        body = {"run_id": run_id, "event_type": "log", "data": 1}
        headers = {"X-API-KEY": HOOK_KEY}
        assert (await http.post("/api/webhooks/happyrobot", json=body, headers=headers)).status_code == 200
        for name, relay in (("postgresql", postgresql), ("redis", redis)):
            if gone in (name, "both"):
                relay.lose()
        reader, writer = await under_way(process.address, json.dumps(body).encode())
        took = await process.leaves()
        await following
        status = (await reader.readline()).split()[1]
        writer.close()
    # Not written for certain: it will be sent again.
    assert status == (b"200" if gone == "redis" else b"503")
    assert took < IN_TIME


async def test_told_twice_it_leaves_as_well(servers: Servers, own_database: str, context_id: str):
    """While PostgreSQL says nothing, and calls and callbacks wait for it."""
    async with (
        receiving(never) as hook,
        relayed(own_database) as postgresql,
        served(postgresql.url, servers.redis_url, HAPPYROBOT_WEBHOOK_URL=hook.url) as process,
        httpx.AsyncClient(base_url=process.address, timeout=30) as http,
    ):
        call = asyncio.create_task(http.post("/api/happyrobot/trigger", json={"context_id": context_id}))
        await hook.took(1)
        postgresql.lose()
        body = {"run_id": "r", "event_type": "log", "data": 1}
        late = asyncio.create_task(http.post("/api/webhooks/happyrobot", json=body, headers={"X-API-KEY": HOOK_KEY}))
        process.running.send_signal(signal.SIGINT)
        await asyncio.sleep(0.3)  # as a person presses it again
        process.running.send_signal(signal.SIGINT)
        async with asyncio.timeout(4 * IN_TIME):
            await process.running.wait()
        await asyncio.gather(call, late, return_exceptions=True)


HELD = """
import asyncio, time
from switchboard import leaving

leaving.LAST_RESORT = 0.2

async def main():
    loop = asyncio.get_running_loop()
    loop.run_in_executor(None, time.sleep, 3600)  # such as the look-up of a name
    leaving.Leaving().begin_for_good()

asyncio.run(main())
"""


async def test_what_cannot_be_interrupted_keeps_nobody():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", HELD)
    try:
        async with asyncio.timeout(60):
            assert await process.wait() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
