"""HTTP as `serve` speaks it: uvicorn's, with bounds on what a connection may send, and on how long it may take.

Uvicorn leaves these to a proxy: a connection may stay silent for ever, a header may grow for as long as there is
memory, and an answer may wait for ever to be read. What is refused here has not become a request, so that its headers
and its line in the log are given here, too.
"""

import asyncio
import contextlib
import fcntl
import struct
import termios
from functools import lru_cache
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from switchboard import edge, errors
from switchboard.leaving import GOODBYE, Leaving
from switchboard.settings import Settings

log = structlog.stdlib.get_logger(__name__)

_LINGER = 1.0
"""Seconds in which a client that is still sending may read why it was refused, before it sees a reset connection."""

_ON_ITS_WAY = 2**19
"""Bytes of a body that can arrive at once, before whoever should refuse it has been asked: a little more than is read
from a socket at a time, and kept until it is wanted."""


class TooLarge(Exception):
    """A part of a request takes more bytes than it may."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status)
        self.status = status


class _Cycle(RequestResponseCycle):
    """A request and its answer, which leaves in one piece if that is how it comes.

    Uvicorn writes the head by itself, which is one more packet and one more call of the system for each answer.
    """

    _head: Any = None

    async def run_asgi(self, app: Any) -> None:
        state: dict[str, Any] = self.scope["state"]
        state["cycle"] = self
        try:
            await super().run_asgi(app)
        finally:
            # Else it would refer to itself, and stay until the garbage collector comes, which stops everything.
            del state["cycle"]

    def has_arrived(self) -> bool:
        """Whether all of the body is there, for whoever asks for it first."""
        return not (self.more_body or self.disconnected or self.response_complete)

    async def pass_on(self, part: bytes) -> None:
        """Sends more of an answer that has begun without a length, past everything that has been put around `send`."""
        while self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if part and not self.disconnected:  # one without anything in it would be the last
            self.transport.write(_chunk(part))

    def pass_on_now(self, part: bytes) -> bool:
        """As `pass_on`, unless its client does not read: then nothing is sent, and False returned.

        What is sent to many is best sent to one after the other.
        """
        if self.disconnected or self.transport.is_closing():
            return True
        if self.flow.write_paused:
            return False
        if part:
            self.transport.write(_same_chunk(part))
        return True

    async def send(self, message: Any) -> None:
        if not self.response_started and message["type"] == "http.response.start":
            # One that has not left is replaced: what it was the head of came to nothing.
            self._head = message
            return
        head, self._head = self._head, None
        if head is not None:
            if self._is_plain(head, message) and self._send_whole(head, message.get("body", b"")):
                return
            await super().send(head)
        await super().send(message)

    def _is_plain(self, head: Any, message: Any) -> bool:
        return (
            message["type"] == "http.response.body"
            and not message.get("more_body", False)
            and self.keep_alive
            and not (self.flow.write_paused or self.disconnected)
            and self.scope["method"] in _WITH_BODIES
            and head["status"] in _STATUS_WITH_BODIES
        )

    def _send_whole(self, head: Any, body: bytes) -> bool:
        """Sends an answer to its end; False for one that uvicorn should rather look at."""
        headers = [*self.default_headers, *head["headers"]]
        by_name = dict(headers)
        if (
            by_name.get(b"content-length") != b"%d" % len(body)
            or len(by_name) != len(headers)
            or not _OF_THE_CONNECTION.isdisjoint(by_name)
        ):
            return False
        lines = b"\r\n".join([name + b": " + value for name, value in headers])
        if len(lines) - len(lines.translate(None, _CONTROL)) != 2 * (len(headers) - 1):
            # There are more breaks than those between the lines.
            return False
        self.response_started = True
        self.waiting_for_100_continue = False
        self.transport.write(b"".join([STATUS_LINE[head["status"]], lines, b"\r\n\r\n", body]))
        self.response_complete = True
        self.message_event.set()
        self.on_response()
        return True


def _chunk(part: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(part), part)


_same_chunk = lru_cache(maxsize=1)(_chunk)


_WITH_BODIES = frozenset({"GET", "POST", "DELETE"})
_STATUS_WITH_BODIES = frozenset(range(200, 600)) - {204, 304}
_OF_THE_CONNECTION = frozenset({b"connection", b"transfer-encoding"})
_CONTROL = bytes([*range(9), *range(10, 32), 127])
"""What is in no header, or would end it."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. The limits are those of the application's settings, which the lifespan has left in its state."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._settings: Settings = self.app_state["settings"]
        self._leaving: Leaving = self.app_state["leaving"]
        # What has to arrive in time, and what has to be read.
        self._clock: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._head_size = 0
        # Whether a message has begun to arrive, and whether it has come to its body.
        self._begun = self._in_body = False
        # Bytes since the last that were of use: since a head, a part of a body or a message was complete.
        self._pending = 0
        self._body_size = 0
        self._deaf = False
        # Whether a request has asked for another protocol, and is the last that is answered.
        self._last = False
        # The request that is being answered, or was last; uvicorn knows only the one that was parsed last.
        self._running: RequestResponseCycle | None = None
        # What a request was refused with that came while those before it were being answered.
        self._owed: HTTPStatus | None = None
        self._goodbye: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        # So that writing is paused whenever something is left unread, however little it is.
        transport.set_write_buffer_limits(high=0)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self._stop_watch()
        if self._goodbye is not None:
            self._goodbye.cancel()
        self._give_up()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Lets come to its end what has arrived, and does not wait for the rest of what has not."""
        # Whatever has stopped the server: not every end of one comes with a signal.
        self._leaving.begin()
        self._goodbye = self.loop.call_later(GOODBYE, self._cut_off_who_does_not_read)
        self._forget_what_is_broken()
        if self._in_body and self._answering and not self.cycle.response_started:
            self._give_up()
            self.transport.close()
        else:
            super().shutdown()

    def _cut_off_who_does_not_read(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    # Reading.

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, in pieces that are small enough to notice what grows too large; in place of uvicorn's."""
        for start in range(0, len(data), self._settings.max_header_size):
            if not self._deaf:
                self._feed(data[start : start + self._settings.max_header_size])

    def _feed(self, piece: bytes) -> None:
        self._pending += len(piece)
        rest = None
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            rest = piece[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause.status if isinstance(cause, TooLarge) else HTTPStatus.BAD_REQUEST)
        if rest is not None:
            self._feed_as_if_it_had_not_asked(rest)
        elif self._pending > self._settings.max_header_size and not self._deaf:
            # A line without an end, a trailer, the extension of a chunk: the parser would take them for ever.
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif self._begun and not (self._in_body or self._answering or self._deaf) and self._clock is None:
            # Half a head: most come whole, and are not waited for.
            self._start_clock()

    def _feed_as_if_it_had_not_asked(self, rest: bytes) -> None:
        """Makes a plain request of one that would rather speak another protocol: the parser has skipped its body."""
        method = self.scope["method"]
        if self._last:
            self._deaf = True
            return
        if method == "CONNECT":
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        self._last = True
        head = [f"{method} ".encode(), self.url, f" HTTP/{self.scope['http_version']}\r\n".encode()]
        for name, value in self.headers:
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        self._feed(b"".join(head) + b"\r\n")
        if not self._deaf:
            # What comes behind it may be meant as the other protocol.
            self.cycle.keep_alive = False
            self._feed(rest)

    def _should_upgrade(self) -> bool:
        # Upon which uvicorn does nothing about a request that asks for it.
        return True

    # What the parser finds.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True
        self._head_size = 0
        self._unset_keepalive_if_required()

    def on_header(self, name: bytes, value: bytes) -> None:
        # Not the trailers: uvicorn would add them to the headers of a request that is being answered, where they
        # could pass for those of a proxy.
        if not self._in_body:
            self._head_size += len(name) + len(value) + 4  # with its colon and line end
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        # Counted again, because a head may begin and end in the midst of pieces.
        if len(self.url) + self._head_size > self._settings.max_header_size:
            raise TooLarge(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        self._pending = self._body_size = 0
        self._stop_clock()
        super().on_headers_complete()
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        self._body_size += len(body)
        # Where it is read, it is bounded more closely. Whoever was refused may send as much again, to read why.
        if self._body_size > 2 * self._settings.max_body_size + _ON_ITS_WAY:
            raise TooLarge(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._begun = self._in_body = False
        self._pending = 0
        super().on_message_complete()
        if not self._answering:
            self._stop_clock()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    # Answering.

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        # Uvicorn has no place where one could say which class it is to be.
        cycle.__class__ = _Cycle
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._answering or self.transport.is_closing():
            return
        if self._owed is not None:
            self._refuse(self._owed)
        elif self._in_body and self.expect_100_continue and not self._body_size:
            # A body that may never come: the next request would be taken for it.
            self.transport.close()
        elif self._begun:
            # Half a request, or the rest of a body that nobody reads any more. Closed at once, a client that is
            # sending would see a reset connection in place of its answer; so it may come, within the usual bounds.
            self._unset_keepalive_if_required()
            self._start_clock()

    @property
    def _answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _give_up(self) -> None:
        """Tells whoever is answering that nobody will hear it."""
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def _forget_what_is_broken(self) -> None:
        """Drops a request that waits for its turn, and of whose body the rest will not come."""
        if self._in_body and self.pipeline:
            self.pipeline.popleft()
            # There is one before it, or its turn would have come.
            self.cycle = self.pipeline[0][0] if self.pipeline else self._running  # type: ignore[assignment]
            self._in_body = False
            self._deaf = True

    def _refuse(self, status: HTTPStatus) -> None:
        """Says why, behind the answers that are owed to the requests before, and closes the connection."""
        self._deaf = True
        self._stop_clock()
        if self.transport.is_closing():
            return
        self._forget_what_is_broken()
        if self._in_body and self.cycle.response_started:
            # Whether it is complete or not, it is the only answer that this request gets.
            self.transport.close()
            return
        if self._in_body:
            self._give_up()
        elif self._answering:
            self._owed = status
            return
        request_id = uuid4().hex
        headers = {edge.REQUEST_ID: request_id, "Cache-Control": "no-store", "Connection": "close"}
        # What is known by now of where it was to go; of a first line that makes no sense nothing.
        path = self.url.decode("latin-1") if self._begun else ""
        answer = errors.answer(path, status, _MESSAGES[status], edge.usual_headers(self._settings) | headers)
        lines = [b"HTTP/1.1 %d %b" % (status, status.phrase.encode())]
        lines += [b"%b: %b" % header for header in (*self.server_state.default_headers, *answer.raw_headers)]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
        log.info("refused", status=status.value, request_id=request_id)
        self.transport.write_eof()
        self.flow.resume_reading()
        self._clock = self.loop.call_later(_LINGER, self.transport.close)

    # Time.

    def _start_clock(self) -> None:
        self._stop_clock()
        self._clock = self.loop.call_later(self._settings.request_timeout, self._too_slow)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        if self._begun and not self._in_body:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(self._unread())

    def resume_writing(self) -> None:
        self._stop_watch()
        super().resume_writing()

    def _watch_reader(self, unread: int) -> None:
        self._watch = self.loop.call_later(self._settings.request_timeout, self._has_it_read, unread)

    def _has_it_read(self, unread: int) -> None:
        """Ends a connection whose client takes nothing any more; one that is slow has all the time that it needs."""
        left = self._unread()
        if left < unread:
            self._watch_reader(left)
        else:
            self.transport.abort()

    def _unread(self) -> int:
        """Bytes that the client has not taken, those included that the kernel keeps for it.

        It keeps megabytes, and wants no more from us until a good part of them is gone.
        """
        kept = self.transport.get_write_buffer_size()
        with contextlib.suppress(OSError):  # not every system says it
            socket = self.transport.get_extra_info("socket")
            (queued,) = struct.unpack("i", fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, bytes(4)))
            kept += queued
        return kept

    def _stop_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None


_MESSAGES = {
    HTTPStatus.BAD_REQUEST: "Bad request",
    HTTPStatus.REQUEST_TIMEOUT: "The request did not arrive in time",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is too large",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "The request's line and headers are too large",
}
