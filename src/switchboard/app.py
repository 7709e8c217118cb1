"""The service, put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import httpx
from fastapi import FastAPI

from switchboard import __version__, callbacks, console, edge, errors, garbage, health, logs, reference, tracing
from switchboard.access import routes as access
from switchboard.deliveries import routes as deliveries
from switchboard.direct import Application
from switchboard.live import stream
from switchboard.public import routes as public
from switchboard.public.shapes import RATE_HEADERS
from switchboard.runs import calling, deciding, reading, stats
from switchboard.settings import Settings
from switchboard.wiring import State, addresses, connected
from switchboard.worker import working

_ROUTERS = (
    calling.router,
    reading.router,
    stats.router,
    deciding.router,
    deliveries.router,
    callbacks.router,
    stream.router,
    access.router,
    public.router,
    reference.router,
    console.router,
    health.router,
)


def create_app(
    settings: Settings | None = None, *, upstream: httpx.AsyncBaseTransport | None = None, worker: bool = True
) -> FastAPI:
    """The service as an ASGI application. Reads the environment unless it is given its settings.

    `upstream` takes the place of the network on the way to HappyRobot; without `worker`, background jobs are left
    to others.
    """
    settings = settings or Settings()
    logs.configure(settings)
    addresses(settings)  # complains now, and not when the first request comes

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        async with connected(settings, upstream) as state, working(state) if worker else nullcontext():
            with state["leaving"].with_server():
                yield state

    app = Application(
        settings,
        title="Switchboard",
        version=__version__,
        summary="The backend between an application and HappyRobot's voice agents.",
        lifespan=lifespan,
        docs_url=None,  # both would be pages that load their scripts from another host
        redoc_url=None,
        # FastAPI's own spans, which it would make for anybody's provider, hold paths and queries.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    errors.install(app)
    edge.install(app, settings)
    app.add_middleware(tracing.Traced)
    for router in _ROUTERS:
        # As they are: `include_router` here would make each of them again, for the first request, to add nothing.
        app.router.routes.extend(router.routes)
    app.add_direct(*callbacks.router.routes, *calling.router.routes, *reading.router.routes)

    document = app.openapi

    def openapi() -> dict[str, Any]:
        return _corrected(document(), anonymous=settings.anonymous_allowed)

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change the document
    return app


def alone() -> FastAPI:
    """The service of a process in which nothing else runs."""
    return _for_long(create_app())


def alone_without_worker() -> FastAPI:
    """As `alone`, where background jobs are left to dedicated workers."""
    return _for_long(create_app(worker=False))


def _for_long(app: FastAPI) -> FastAPI:
    garbage.search_rarely()
    garbage.spare_what_is_there()
    return app


def _corrected(document: dict[str, Any], *, anonymous: bool) -> dict[str, Any]:
    """What FastAPI says about every endpoint alike, as it is."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            # Bad input is answered 400, in the endpoint's own shape.
            if operation["responses"].get("422", {}).get("description") == "Validation Error":
                del operation["responses"]["422"]
            if operation.get("tags") == public.router.tags:
                for response in operation["responses"].values():
                    response["headers"] = RATE_HEADERS
            if "security" in operation:
                ways = [way for way in operation["security"] if way and (method == "get" or "access_token" not in way)]
                if not path.startswith("/api/"):
                    ways = [way for way in ways if "cookie" not in way]  # it is not sent there
                if operation["tags"] == public.router.tags or (
                    operation["tags"] == access.router.tags and method != "get"
                ):
                    ways = [way for way in ways if "bearer" in way]  # nothing that a browser sends by itself
                everybody = anonymous and operation["tags"] != public.router.tags
                operation["security"] = [{}, *ways] if everybody else ways
    for schema in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(schema, None)
    return document
