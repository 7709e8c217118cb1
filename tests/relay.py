"""A wire between a service and one of its servers, which can go dead, and heal."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit, urlunsplit


@dataclass
class Relay:
    """Passes on what it is sent, both ways, until it swallows everything."""

    url: str = ""
    """That of the server, by way of this."""
    dead: bool = False
    mute: bool = False
    _connections: int = 0
    _forgotten: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def cut(self) -> None:
        """From now on nothing comes through, and nobody is told."""
        self.dead = True

    def silence(self) -> None:
        """From now on the server hears everything, and its answers are swallowed."""
        self.mute = True

    def forget(self) -> None:
        """What is connected now is dead for ever, and nobody is told; what connects from now on is not."""
        self._forgotten = self._connections

    def heal(self) -> None:
        """From now on everything comes through that is sent from now on; what was swallowed is lost."""
        self.dead = self.mute = False

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int, *, answers: bool
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                if not (self.dead or (answers and self.mute) or number <= self._forgotten):
                    writer.write(data)
                    await writer.drain()
        writer.close()

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        task = asyncio.create_task(self._pass_on(reader, writer, self._connections, answers=answers))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@contextlib.asynccontextmanager
async def relayed(url: str) -> AsyncIterator[Relay]:
    """A wire to the PostgreSQL or Valkey of this address, which may be a socket's."""
    relay = Relay()
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    socket = parts.path if parts.scheme == "unix" else None
    if "host" in query:
        socket = f"{query['host'][0]}/.s.PGSQL.{query.get('port', ['5432'])[0]}"

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if socket:
            there = await asyncio.open_unix_connection(socket)
        else:
            there = await asyncio.open_connection(parts.hostname, parts.port)
        relay._connections += 1
        relay._begin(reader, there[1], answers=False)
        relay._begin(there[0], writer, answers=True)

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        here = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        if parts.scheme == "unix":
            relay.url = f"redis://{here}"
        else:
            user = parts.netloc.rpartition("@")[0]
            relay.url = urlunsplit((parts.scheme, f"{user}@{here}" if user else here, parts.path, "", ""))
        yield relay
        for task in set(relay._tasks):
            task.cancel()
        await asyncio.gather(*relay._tasks, return_exceptions=True)
