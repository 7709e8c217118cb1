"""The service, put together."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypedDict

import httpx
from fastapi import FastAPI
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff, NoBackoff
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.middleware.cors import CORSMiddleware

from switchboard import __version__, callbacks, database, errors
from switchboard.happyrobot.client import HappyRobot
from switchboard.live import stream
from switchboard.live.announcer import Announcer
from switchboard.live.channel import Channel
from switchboard.live.hub import Hub
from switchboard.runs import routes
from switchboard.runs.intake import Intake
from switchboard.settings import Settings


class State(TypedDict):
    """What the requests share, under the names that the dependencies look for."""

    settings: Settings
    db: AsyncEngine
    happyrobot: HappyRobot
    hub: Hub
    intake: Intake


def create_app(settings: Settings | None = None, *, upstream: httpx.AsyncBaseTransport | None = None) -> FastAPI:
    """The service as an ASGI application. Reads the environment unless it is given its settings.

    `upstream` takes the place of the network on the way to HappyRobot.
    """
    settings = settings or Settings()
    if settings.database_url is None or settings.redis_url is None:
        raise ValueError("DATABASE_URL and REDIS_URL are needed; `switchboard serve` brings its own servers")
    database_url, redis_url = settings.database_url.get_secret_value(), settings.redis_url.get_secret_value()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        async with AsyncExitStack() as stack:
            db = database.connect(database_url)
            stack.push_async_callback(db.dispose)
            happyrobot = HappyRobot(settings, upstream)
            stack.push_async_callback(happyrobot.aclose)
            # One retry: the pool may hold a connection that a restart of Redis has cut.
            publisher = Redis.from_url(
                redis_url, socket_timeout=2, socket_connect_timeout=2, retry=Retry(ConstantBackoff(0.05), 1)
            )
            stack.push_async_callback(publisher.aclose)
            # A subscription is silent for as long as nothing happens, so reading from it has no time limit.
            subscriber = Redis.from_url(
                redis_url, socket_timeout=None, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
            )
            stack.push_async_callback(subscriber.aclose)
            channel = Channel(db)
            hub = await stack.enter_async_context(Hub(db, subscriber, channel).running())
            announcer = await stack.enter_async_context(Announcer(publisher, channel, hub.look).running())
            intake = await stack.enter_async_context(Intake(db, announcer).running())
            yield State(settings=settings, db=db, happyrobot=happyrobot, hub=hub, intake=intake)

    app = FastAPI(
        title="Switchboard",
        version=__version__,
        summary="The backend between an application and HappyRobot's voice agents.",
        lifespan=lifespan,
    )
    errors.install(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
            expose_headers=["Link", "Retry-After"],
        )
    app.include_router(routes.router)
    app.include_router(callbacks.router)
    app.include_router(stream.router)

    @app.get("/healthz", tags=["operations"], summary="Is the process alive?")
    async def healthz() -> dict[str, str]:
        """Answers as long as the process does; says nothing about what it depends on."""
        return {"status": "ok"}

    document = app.openapi

    def openapi() -> dict[str, Any]:
        return _without_validation_errors(document())

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change the document
    return app


def _without_validation_errors(document: dict[str, Any]) -> dict[str, Any]:
    """Drops the 422 that FastAPI adds to every endpoint: bad input is answered 400, in the endpoint's own shape."""
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for schema in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(schema, None)
    return document
