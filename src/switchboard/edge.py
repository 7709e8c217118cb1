"""The edge of the service: what holds for every request and every answer, whatever becomes of it.

From the outside in: whose request it is, its id, its line in the log and the headers that every answer carries; then
who may read the answer from another origin; then what becomes of an error that nobody expected. All of it is outside
of the routes, so that a 404, a 405 or a preflight is no exception.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

import structlog
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from switchboard import errors, metrics
from switchboard.logs import bound, harmless
from switchboard.settings import Settings

log = structlog.stdlib.get_logger(__name__)
_requests = logging.getLogger(__name__)

REQUEST_ID = "X-Request-ID"
_REQUEST_ID = REQUEST_ID.lower().encode()

_NOTHING_ELSE = "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    f"{_NOTHING_ELSE}"
)
"""The `Content-Security-Policy` of a page, which sets it itself: nothing inline, nothing from other hosts."""

_USUAL = {
    "Content-Security-Policy": f"default-src 'none'; {_NOTHING_ELSE}",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_HTTPS_ONLY = {"Strict-Transport-Security": "max-age=31536000"}

_METHODS = ("GET", "POST", "DELETE")
_ACCEPTED = ("Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", REQUEST_ID)
_EXPOSED = ("Link", "Retry-After", REQUEST_ID, "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")

_GOOD_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

_ASKED_ALL_THE_TIME = frozenset({"/healthz", "/readyz", "/metrics"})
"""Routes whose requests are no news."""


_HEADERS = "answer_headers"


def add_headers(request: HTTPConnection, headers: dict[str, str]) -> None:
    """Puts headers onto the answer to a request, also if that is an error."""
    request.scope["state"].setdefault(_HEADERS, {}).update(headers)


def usual_headers(settings: Settings) -> dict[str, str]:
    """What every answer carries, unless it says otherwise itself."""
    return _USUAL | (_HTTPS_ONLY if settings.environment == "production" else {})


def install(app: FastAPI, settings: Settings) -> None:
    """Puts the edge around all that an application routes."""
    for layer in _layers(settings):
        app.add_middleware(layer.cls, *layer.args, **layer.kwargs)


def around(app: ASGIApp, settings: Settings) -> ASGIApp:
    """The same edge around something else."""
    for layer in _layers(settings):
        app = layer.cls(app, *layer.args, **layer.kwargs)
    return app


def _layers(settings: Settings) -> list[Middleware]:
    """Each goes around those before it."""
    layers = [Middleware(Unexpected)]
    if settings.cors_origins:
        layers.append(
            Middleware(
                CrossOrigin,
                allow_origins=settings.cors_origins,
                allow_methods=_METHODS,
                allow_headers=_ACCEPTED,
                expose_headers=_EXPOSED,
            )
        )
    layers.append(Middleware(Edge, headers=usual_headers(settings)))
    layers.append(Middleware(Forwarded, proxies=settings.trusted_proxies))
    return layers


_OF_PROXIES = frozenset({b"x-forwarded-for", b"x-forwarded-proto"})
"""What they say about a request, as uvicorn understands it."""


class Forwarded:
    """Makes `scope["client"]` the address that a request comes from, also behind trusted proxies."""

    def __init__(self, app: ASGIApp, proxies: tuple[str, ...]) -> None:
        self._app = app
        self._believing = ProxyHeadersMiddleware(self._checked, list(proxies))  # type: ignore[arg-type]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # An IPv4 peer of a socket that listens on IPv6 looks like ::ffff:10.0.0.1, which is in no IPv4 network.
        scope["client"] = scope["peer"] = _plain(scope["client"]) or scope["client"]
        if not _OF_PROXIES.isdisjoint([name for name, _ in scope["headers"]]):
            await self._believing(scope, receive, send)  # type: ignore[arg-type]
        else:
            await self._app(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Uvicorn takes whatever stands in the header for an address; what is none would count as one more caller. And
        # whoever asks from this machine does not come by way of another.
        client, peer = _plain(scope["client"]), scope["peer"]
        believed = client and (not is_here(client[0]) or (peer and is_here(peer[0])))
        scope["client"] = client if believed else peer
        await self._app(scope, receive, send)


def ip(host: str) -> IPv4Address | IPv6Address | None:
    """The address that this is, of IPv4 also where it is written as one of IPv6; nothing if it is none."""
    try:
        address = ip_address(host)
    except ValueError:
        return None
    if not isinstance(address, IPv6Address):
        return address
    # Without the zone behind it, which may be any text where somebody else has written it: each would be an address.
    return address.ipv4_mapped or IPv6Address(int(address))


@lru_cache(1000)
def is_here(host: str) -> bool:
    """Whether this is an address of this machine alone."""
    address = ip(host)
    return address is not None and address.is_loopback


def _plain(client: tuple[str, int] | None) -> tuple[str, int] | None:
    """The one way to write an address; nothing if it is none."""
    host = _host(client[0]) if client else None
    return (host, client[1]) if client and host else None


@lru_cache(1000)
def _host(host: str) -> str | None:
    address = ip(host)
    return None if address is None else str(address)


_STREAM = b"text/event-stream"


class Edge:
    """Gives a request its id, every answer its headers, and the log a line about it."""

    def __init__(self, app: ASGIApp, *, headers: dict[str, str]) -> None:
        self._app = app
        self._usual = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        # There are few kinds of answers.
        self._missing = lru_cache(100)(self._missing_beside)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        given = _given_id(scope)
        request_id = given or f"{random.getrandbits(128):032x}"  # it tells requests apart, and guards nothing
        status: int | None = None
        is_stream = False

        async def answer(message: Message) -> None:
            nonlocal status, is_stream
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.get("headers", ())
                is_stream = any(name == b"content-type" and value.startswith(_STREAM) for name, value in headers)
                # Not changed in place: an answer may be given more than once.
                message["headers"] = self._completed(headers, scope, request_id)
            await send(message)

        bound.begin(request_id=request_id)
        try:
            await self._app(scope, receive, answer)
        finally:
            took = time.perf_counter() - began
            route = _route(scope)
            metrics.count_request(scope["method"], route, status, None if is_stream else took)
            level = logging.DEBUG if route in _ASKED_ALL_THE_TIME else logging.INFO
            said = {"method": scope["method"], "route": route, "status": status, "ms": round(took * 1000, 1)}
            if given:
                # An id that somebody has sent may be anything, such as a phone number.
                log.log(level, "request", **said)
            else:
                harmless(_requests, level, "request", **said)
            bound.end()

    def _completed(
        self, headers: Iterable[tuple[bytes, bytes]], scope: Scope, request_id: str
    ) -> list[tuple[bytes, bytes]]:
        completed = list(headers)
        if added := scope.get("state", {}).get(_HEADERS):
            new = [(name.lower().encode(), value.encode()) for name, value in added.items()]
            replaced = {name for name, _ in new}
            completed = [pair for pair in completed if pair[0] not in replaced] + new
        there = tuple([name for name, _ in completed])
        return [
            *completed,
            *self._missing(there, scope["path"].startswith("/api/")),
            (_REQUEST_ID, request_id.encode()),
        ]

    def _missing_beside(self, there: tuple[bytes, ...], is_api: bool) -> list[tuple[bytes, bytes]]:
        usual = [*self._usual, (b"cache-control", b"no-store")] if is_api else self._usual
        return [pair for pair in usual if pair[0] not in there]


def _given_id(scope: Scope) -> str | None:
    """The id that a request brings along, if it can do no harm."""
    for name, value in scope["headers"]:
        if name == _REQUEST_ID:
            return value.decode() if _GOOD_ID.fullmatch(value) else None
    return None


def _route(scope: Scope) -> str:
    """The template of the path: a path itself, or a query, may hold phone numbers and secrets."""
    if scope["path"] == scope["app"].openapi_url:
        return str(scope["path"])  # FastAPI's own route, of which it does not say that it was the one
    return getattr(scope.get("route"), "path", None) or "unmatched"


class CrossOrigin(CORSMiddleware):
    """Tells an origin that is not listed nothing at all, where Starlette would tell it all but its own name."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is None or self.is_allowed_origin(origin):
            await super().__call__(scope, receive, send)
        else:
            # As one without an origin, which is told no more than that others may be answered differently.
            await self.simple_response(scope, receive, send, request_headers=Headers())


class Unexpected:
    """Answers 500 for an error that nobody expected, and 503 where the service stops in the middle.

    Starlette's own handler for these is outside of everything here: its answers would have no id and no headers, and
    no other origin could read them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except asyncio.CancelledError:
            if not scope["state"]["leaving"].begun:
                raise
            # The server has waited for as long as it could.
            log.warning("request was cut off", method=scope["method"], route=_route(scope))
            if not started:
                await errors.answer(scope["path"], 503, "The service is restarting")(scope, receive, send)
        except Exception:
            log.exception("unexpected error", method=scope["method"], route=_route(scope))
            # An answer that has started is not completed, upon which the server closes the connection. Raised, the
            # error would be logged once more.
            if not started:
                await errors.answer(scope["path"], 500, "Internal server error")(scope, receive, send)
