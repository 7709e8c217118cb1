"""Wires between the parts: TCP, passed on both ways, that can be cut, delayed, throttled, half-closed and lost."""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit, urlunsplit

Target = tuple[str, int] | str
"""A host and port, or the path of a Unix socket."""

_CHUNK = 65_536


@dataclass(eq=False)
class _Connection:
    near: asyncio.StreamWriter
    """Towards whoever has connected."""
    far: asyncio.StreamWriter
    left: int | None = None
    """Bytes that are still passed on towards the far end before it breaks."""
    mute: bool = False
    """Whether it breaks as soon as the far end answers."""
    unheard: bool = False
    """Whether an answer was swallowed, without which no other makes sense."""
    lost: bool = False
    """Whether it swallows everything, and nobody is told."""

    def abort(self) -> None:
        """Breaks it: both ends are told at once."""
        for writer in (self.near, self.far):
            _reset(writer)

    def release(self) -> None:
        """Lets the far end know that nobody is there any more; the near one goes on waiting."""
        _reset(self.far)


@dataclass(eq=False)
class Wire:
    """A port on loopback that leads to a part."""

    name: str
    targets: list[Target] = field(default_factory=list)
    """Any of them; none is as if nobody listened."""
    port: int = 0
    url: str = ""
    """That of the part, by way of this."""
    delay: float = 0.0
    """Seconds that each piece takes longer, in each direction."""
    rate: float | None = None
    """Bytes a second."""
    left: int | None = None
    """Of new connections: after how many bytes of what is sent they break."""
    room: int | None = None
    """Bytes that the system lets wait at each end for who does not read; by itself, it takes what it thinks fit."""
    mute: bool = False
    """Whether new connections break as soon as they are answered."""
    _open: set[_Connection] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)
    _swallowing: bool = False
    _silent: bool = False
    _place: socket.socket | None = None
    _server: asyncio.Server | None = None

    async def open(self) -> None:
        # A socket that is bound and does not listen keeps the port for us while the wire is refused.
        self._place = _bound(0)
        self.port = self._place.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._flowing.set()
        await self.restore()

    async def close(self) -> None:
        self.refuse()
        self.cut()
        self._flowing.set()
        for task in set(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._place is not None:
            self._place.close()

    def cut(self) -> None:
        """Breaks every connection that there is, wherever it stands."""
        for connection in list(self._open):
            connection.abort()

    def refuse(self) -> None:
        """Nobody can connect any more; connections that there are go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def restore(self) -> None:
        """The opposite of whatever was done to it."""
        self.delay, self.rate, self.left, self.mute = 0.0, None, None, False
        self._flowing.set()
        self._swallowing = self._silent = False
        for connection in list(self._open):
            connection.left, connection.mute = None, False
            if connection.lost or connection.unheard:
                connection.lost = True
                connection.release()
        if self._server is None:
            assert self._place is not None
            listener = _bound(self.port)
            self._server = await asyncio.start_server(self._connected, sock=listener, backlog=2048)

    def hold(self) -> None:
        """What is sent waits on the way until the wire is restored, and then arrives."""
        self._flowing.clear()

    def lose(self) -> None:
        """What is sent is lost, also later on the connections of now: nobody is told, and nothing is answered."""
        self._swallowing = True
        self.forget()

    def forget(self) -> None:
        """As `lose`, for the connections of now alone."""
        for connection in self._open:
            connection.lost = True

    def silence(self) -> None:
        """What is sent arrives, and what is answered is lost; nobody is told."""
        self._silent = True

    def half_close(self, chance: random.Random) -> None:
        """Closes one direction of each connection."""
        for connection in list(self._open):
            writer = connection.far if chance.random() < 0.5 else connection.near
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, far = await self._reach()
        except OSError:
            _reset(writer)
            return
        if self.room is not None:
            _limit(writer, socket.SO_SNDBUF, self.room)
            _limit(far, socket.SO_RCVBUF, self.room)
        connection = _Connection(writer, far, self.left, self.mute, lost=self._swallowing)
        self._open.add(connection)
        pumps = [
            asyncio.create_task(self._pump(connection, reader, far, upwards=True)),
            asyncio.create_task(self._pump(connection, there, writer, upwards=False)),
        ]
        self._tasks.update(pumps)
        try:
            await asyncio.wait(pumps)
        finally:
            self._tasks.difference_update(pumps)
            self._open.discard(connection)
            connection.abort()

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for target in random.sample(self.targets, len(self.targets)):
            with contextlib.suppress(OSError):
                if isinstance(target, str):
                    return await asyncio.open_unix_connection(target)
                return await asyncio.open_connection(*target)
        raise ConnectionRefusedError

    async def _pump(
        self,
        connection: _Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        upwards: bool,
    ) -> None:
        try:
            while data := await reader.read(_CHUNK):
                await self._travel(len(data))
                connection.unheard |= self._silent and not upwards
                if connection.lost or (connection.unheard and not upwards):
                    continue
                if connection.mute and not upwards:
                    break
                if upwards and connection.left is not None:
                    data = data[: connection.left]  # no more than that gets through
                    connection.left -= len(data)
                writer.write(data)
                await writer.drain()
                if connection.left == 0:
                    break
            else:
                await self._travel(0)
                if not connection.lost and writer.can_write_eof() and not writer.is_closing():
                    writer.write_eof()
                return
        except (OSError, RuntimeError):
            if connection.lost and not upwards:
                return
        if connection.lost:
            return
        connection.abort()

    async def _travel(self, size: int) -> None:
        await self._flowing.wait()
        pause = self.delay + (size / self.rate if self.rate else 0.0)
        if pause:
            await asyncio.sleep(pause)


def _bound(port: int) -> socket.socket:
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    place.bind(("127.0.0.1", port))
    return place


def _limit(writer: asyncio.StreamWriter, option: int, size: int) -> None:
    wire = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        if wire is not None:  # as of one that was reset
            wire.setsockopt(socket.SOL_SOCKET, option, size)


def _reset(writer: asyncio.StreamWriter) -> None:
    wire = writer.get_extra_info("socket")
    with contextlib.suppress(OSError, ValueError):  # the latter of one that is closed
        if wire is not None and wire.family == socket.AF_INET:
            # Not a goodbye but a reset.
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.asynccontextmanager
async def wired(name: str, *targets: Target) -> AsyncIterator[Wire]:
    """A wire to a part."""
    wire = Wire(name, list(targets))
    await wire.open()
    try:
        yield wire
    finally:
        await wire.close()


@contextlib.asynccontextmanager
async def relayed(url: str) -> AsyncIterator[Wire]:
    """A wire to the PostgreSQL or Valkey of this address, which may be a socket's."""
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    target: Target = (parts.hostname or "", parts.port or 0)
    if parts.scheme == "unix":
        target = parts.path
    elif "host" in query:
        target = f"{query['host'][0]}/.s.PGSQL.{query.get('port', ['5432'])[0]}"
    async with wired(parts.scheme, target) as wire:
        user = parts.netloc.rpartition("@")[0]
        place = f"{user}@127.0.0.1:{wire.port}" if user else f"127.0.0.1:{wire.port}"
        scheme = "redis" if parts.scheme == "unix" else parts.scheme
        path = "" if parts.scheme == "unix" else parts.path
        wire.url = urlunsplit((scheme, place, path, "", ""))
        yield wire
