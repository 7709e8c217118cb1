"""What HappyRobot answers: no more is unpacked of it than can be read."""

import asyncio
import gzip
import tracemalloc
from collections.abc import Awaitable, Callable
from functools import partial

import httpx
import pytest

from switchboard.happyrobot import client
from tests.receiver import Request, receiving, reply

Send = Callable[[httpx.Request], Awaitable[httpx.Response]]

ONE = gzip.compress(b"\x00" * 50_000_000)
TWO = gzip.compress(ONE)
"""Of less than a kilobyte."""


@pytest.mark.parametrize("to", ["a hook", "the Platform API"])
@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (ONE, "gzip"),
        (TWO, "gzip, gzip"),
        (TWO, "GZIP"),
        (ONE, "deflate"),
        (ONE, "br"),
        (b"x", "gzip"),
        (ONE[:-9], "gzip"),
    ],
)
async def test_a_bomb_stays_packed(body: bytes, coding: str, to: str):
    async def answer(_: Request, writer: asyncio.StreamWriter) -> None:
        await reply(writer, 200, body, {"Content-Encoding": coding})

    platform, hooks = client._client(10, keep=1), client._new_connections()
    send: Send = hooks.handle_async_request if to == "a hook" else partial(platform.send, stream=True)
    async with platform, receiving(answer) as happyrobot:
        request = httpx.Request("POST", happyrobot.url, json={}, headers=client._HOOK_HEADERS)
        request.extensions |= client._HOOK_TIMEOUTS
        tracemalloc.start()
        try:
            await client._send(send, request)
        except httpx.DecodingError:
            pass
        else:
            assert (body, coding) == (TWO, "GZIP"), "in one layer it is small"
        finally:
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        await hooks.aclose()
    assert most < 2.5 * client._MAX_ANSWER
