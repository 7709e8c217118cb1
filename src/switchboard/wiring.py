"""The parts that requests and background jobs share, connected to each other and to the outside."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypedDict

import httpx
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff, NoBackoff
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database, tracing
from switchboard.access.limits import Failures
from switchboard.access.operators import Operators
from switchboard.access.rates import Rates
from switchboard.access.seats import Seats
from switchboard.access.tokens import Signer
from switchboard.deliveries.sender import Sender
from switchboard.happyrobot.client import HappyRobot
from switchboard.happyrobot.lookups import Lookups
from switchboard.leaving import Leaving
from switchboard.live.announcer import Announcer
from switchboard.live.channel import Channel
from switchboard.live.hub import Hub
from switchboard.runs.asking import listener
from switchboard.runs.cancel import Canceler
from switchboard.runs.intake import Intake
from switchboard.runs.ledger import Ledger
from switchboard.settings import Settings
from switchboard.tracing import Tracing
from switchboard.watch import Watch


class State(TypedDict):
    """The parts, under the names that the requests' dependencies look for."""

    settings: Settings
    db: AsyncEngine
    watch: Watch
    signer: Signer | None
    failures: Failures
    operators: Operators
    seats: Seats
    happyrobot: HappyRobot
    lookups: Lookups
    canceler: Canceler
    hub: Hub
    intake: Intake
    ledger: Ledger
    sender: Sender
    rates: Rates
    redis: Redis
    probe: AsyncEngine
    tracing: Tracing | None
    leaving: Leaving


def addresses(settings: Settings) -> tuple[str, str]:
    """Those of PostgreSQL and Redis, which must be known by now."""
    if settings.database_url is None or settings.redis_url is None:
        raise ValueError("DATABASE_URL and REDIS_URL are needed; `switchboard serve` brings its own servers")
    return settings.database_url.get_secret_value(), settings.redis_url.get_secret_value()


@asynccontextmanager
async def connected(settings: Settings, upstream: httpx.AsyncBaseTransport | None = None) -> AsyncIterator[State]:
    """Opens the parts, and closes them in order; `upstream` takes the place of the network to HappyRobot."""
    database_url, redis_url = addresses(settings)
    leaving = Leaving()
    async with leaving.closing() as stack:
        traces = await stack.enter_async_context(tracing.running(settings))

        def redis(retry: Retry, timeout: float | None) -> Redis:
            client = Redis.from_url(redis_url, socket_timeout=timeout, socket_connect_timeout=timeout or 2, retry=retry)
            stack.push_async_callback(client.aclose)
            return client

        watch = await stack.enter_async_context(Watch(database.dsn(database_url)).running())
        db = database.connect(database_url, watch=watch)
        if traces is not None:
            tracing.watch(db)
        database.measure(db)
        stack.push_async_callback(db.dispose)
        # Whether the service can serve is answered also while requests use all connections.
        probe = database.connect(database_url, pool_size=1, statement_timeout=2, watch=watch)
        stack.push_async_callback(probe.dispose)
        # One retry: the pool may hold a connection that a restart of Redis has cut.
        once_more = Retry(ConstantBackoff(0.05), 1)
        # Requests wait for it, and can do without.
        shared = redis(once_more, timeout=0.5)
        happyrobot = HappyRobot(settings, shared, upstream)
        stack.push_async_callback(happyrobot.aclose)
        sender = Sender(settings)
        stack.push_async_callback(sender.aclose)
        seats = await stack.enter_async_context(Seats(db, settings).running())
        channel = Channel(db)
        # A subscription is silent for as long as nothing happens, so reading from it has no time limit.
        hub = await stack.enter_async_context(Hub(db, redis(Retry(NoBackoff(), 0), None), channel).running())
        stack.enter_context(leaving.telling(hub.close))
        announcer = await stack.enter_async_context(
            Announcer(redis(once_more, 2), channel, hub.look, leaving, hub.take).running()
        )
        line = database.Line(db)
        stack.push_async_callback(line.hang_up)
        intake = Intake(line, announcer, leaving, reconcile_after=settings.reconcile_after)
        await stack.enter_async_context(intake.running())
        line = database.Line(db)
        stack.push_async_callback(line.hang_up)
        ledger = await stack.enter_async_context(Ledger(line, settings).running())
        # Above what takes in their answers, so that they close first.
        take_in = listener(db, intake, keeps=not happyrobot.reads_v2)
        lookups = await stack.enter_async_context(Lookups(settings, happyrobot, shared, take_in).running())
        yield State(
            settings=settings,
            db=db,
            watch=watch,
            signer=Signer.of(settings),
            failures=Failures(shared, settings.failed_logins_per_minute),
            operators=Operators(),
            seats=seats,
            happyrobot=happyrobot,
            lookups=lookups,
            canceler=Canceler(db, happyrobot, lookups, intake),
            hub=hub,
            intake=intake,
            ledger=ledger,
            sender=sender,
            rates=Rates(shared),
            redis=shared,
            probe=probe,
            tracing=traces,
            leaving=leaving,
        )
