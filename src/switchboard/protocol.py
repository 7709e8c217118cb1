"""HTTP as `serve` speaks it: uvicorn's, with bounds on what a connection may send before there is a request to answer.

Uvicorn leaves these to a proxy: a connection may stay silent for ever, and a header may grow for as long as there is
memory. What is refused here has not become a request, so nothing behind it, the log included, hears of it.
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from switchboard.settings import Settings

_LINGER = 1.0
"""Seconds in which a client that is still sending may read why it was refused, before it sees a reset connection."""


class HeadTooLarge(Exception):
    """The request's line and headers take more bytes than they may."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. The limits are those of the application's settings, which the lifespan has left in its state."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        settings: Settings = self.app_state["settings"]
        self._largest_head = settings.max_header_size
        self._largest_body = settings.max_body_size
        self._patience = settings.request_timeout
        self._clock: asyncio.TimerHandle | None = None
        self._in_head = True
        # Bytes since the last that were of use: since a head, a part of a body or a message was complete.
        self._pending = 0
        # Bytes of a body that came after its request had been answered.
        self._unread = 0
        self._deaf = False
        # What a request was refused with that came while those before it were being answered.
        self._owed: HTTPStatus | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, in pieces that are small enough to notice what grows too large; in place of uvicorn's."""
        if self._deaf:
            return
        self._unset_keepalive_if_required()
        for start in range(0, len(data), self._largest_head):
            piece = data[start : start + self._largest_head]
            self._pending += len(piece)
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade:
                # Answered as the plain request that it also is. What comes behind it may be another protocol, or the
                # body that the parser does not see in it, and is no request of ours.
                self._deaf = True
                self.cycle.keep_alive = False
                return
            except httptools.HttpParserError as error:
                if isinstance(error.__context__, HeadTooLarge):
                    self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
                else:
                    self._refuse(HTTPStatus.BAD_REQUEST)
                return
            # A line without an end, a trailer, the extension of a chunk: the parser would take them for ever.
            if self._pending > self._largest_head:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
                return
        if not self._answering and self._clock is None:
            self._start_clock()

    # What the parser finds.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._pending = self._pending or 1  # somewhere in this piece, behind the end of the message before

    def on_header(self, name: bytes, value: bytes) -> None:
        # Not the trailers: uvicorn would add them to the headers of a request that is being answered, where they
        # could pass for those of a proxy.
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        # Counted again, because a head may begin and end in the midst of pieces; each with its colon and line end.
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self._largest_head:
            raise HeadTooLarge
        self._in_head = False
        self._pending = self._unread = 0
        self._stop_clock()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        super().on_body(body)
        if self.cycle.response_complete:
            self._unread += len(body)
            if self._unread > self._largest_body:
                self.transport.close()

    def on_message_complete(self) -> None:
        self._in_head = True
        self._pending = 0
        super().on_message_complete()
        if self.cycle.response_complete:
            self._stop_clock()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._answering or self.transport.is_closing():
            return
        if self._owed is not None:
            self._refuse(self._owed)
        elif not self._in_head and self.expect_100_continue:
            # A body that may never come, as nobody asked for it: the next request would be taken for it.
            self.transport.close()
        elif not self._in_head or self._pending:
            # Half a request, or the rest of a body that nobody reads any more. Closed at once, a client that is
            # sending would see a reset connection in place of its answer; so it may come, within the usual bounds.
            self._unset_keepalive_if_required()
            self._start_clock()

    # Time.

    @property
    def _answering(self) -> bool:
        return not getattr(self.cycle, "response_complete", True)  # there is no cycle before the first request

    def _start_clock(self) -> None:
        self._stop_clock()
        self._clock = self.loop.call_later(self._patience, self._too_slow)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        if self._answering:
            # The next request waits behind an answer, and reading may have been paused for it: not the client's fault.
            self._start_clock()
        elif self._in_head and self._pending:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.transport.close()

    def _refuse(self, status: HTTPStatus) -> None:
        """Says why, behind the answers that are owed to the requests before, and closes the connection."""
        self._deaf = True
        self._stop_clock()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        if self._answering and self._in_head:
            self._owed = status
            return
        if self._answering:
            # It is the body of a request that is being answered, and whoever reads it hears that it ends here.
            if self.pipeline or self.cycle.response_started:
                self.transport.close()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps({"error": _MESSAGES[status]}).encode()
        lines = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "x-content-type-options: nosniff",
            "cache-control: no-store",
            "connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.write_eof()
        self.flow.resume_reading()
        self._clock = self.loop.call_later(_LINGER, self.transport.close)


_MESSAGES = {
    HTTPStatus.BAD_REQUEST: "Bad request",
    HTTPStatus.REQUEST_TIMEOUT: "The request did not arrive in time",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "The request's line and headers are too large",
}
