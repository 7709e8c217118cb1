"""HappyRobot's side, which answers at once: a new run to every POST, `running` to every GET.

    python -m benchmarks.hook PORT PREFIX

Not an application of a framework: it shares the machine with what is measured, and must cost next to nothing.
"""

import asyncio
import itertools
import sys
from typing import cast

import httptools
import uvloop

from benchmarks.children import LOOPBACK


class Hook(asyncio.Protocol):
    """One connection."""

    def __init__(self, prefix: str, numbers: "itertools.count[int]") -> None:
        self._prefix = prefix
        self._numbers = numbers
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none by its class.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._close()

    def on_message_complete(self) -> None:
        body = b'{"status": "running"}'
        if self._parser.get_method() == b"POST":
            body = f'{{"queued_run_ids": ["{self._prefix}{next(self._numbers)}"], "status": "queued"}}'.encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        if self._transport is not None:
            self._transport.write(head + body)
        if not self._parser.should_keep_alive():
            self._close()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def serve(port: int, prefix: str) -> None:
    numbers = itertools.count(1)
    server = await asyncio.get_running_loop().create_server(lambda: Hook(prefix, numbers), LOOPBACK, port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), sys.argv[2]))
