"""The background jobs: any number of workers, in the service's processes or in their own."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import asyncpg
import structlog
from pgqueuer import Job as Picked
from pgqueuer import PgQueuer, RetryRequested
from pgqueuer.adapters.drivers.asyncpg import AsyncpgPoolDriver, Relay
from pgqueuer.models import Schedule
from sqlalchemy.exc import SQLAlchemyError

from switchboard import jobs, tracing
from switchboard.database import AWAY, blames_the_statement, open_connection, singly
from switchboard.deliveries.delivering import Deliverer
from switchboard.errors import PostgresAway, postgres_is_away, will_pass
from switchboard.leaving import LAST_NEWS, SIGNALS, UNDER_WAY, Leaving
from switchboard.runs.decisions import Decider
from switchboard.runs.pruning import prune
from switchboard.runs.queued import Launcher
from switchboard.runs.reconcile import Reconciler
from switchboard.runs.sweep import sweep
from switchboard.settings import Settings
from switchboard.tasks import end
from switchboard.wiring import State, addresses, connected

log = structlog.stdlib.get_logger(__name__)

_LOOK_EVERY = timedelta(seconds=2)
"""Between looks for jobs that no notification announced: behind a pooler there may be none."""

_GONE_AFTER = timedelta(seconds=10)
"""Of a job without a sign of life: then others may take it."""

_NEWS_EVERY = 0.2
"""Seconds between two pieces of news that there are other jobs than before."""

_CHANGED = "table_changed_event"
"""What PgQueuer calls that. It tells itself other things over the same channel."""

_BATCH, _CALLS_AT_ONCE, _WEBHOOKS_AT_ONCE = 10, 40, 200
"""Jobs that a worker picks in one go, and those that it has under way: for HappyRobot, and for customers."""

_SAID_ONCE = frozenset({jobs.START, jobs.DECIDE, jobs.DELIVER})
"""Jobs that tell somebody something, who should be heard out."""

_AFTER_TROUBLE = 10.0
"""Seconds until a job that failed is tried again."""

_AFTER_ABSENCE = 2.0
"""The same for one that failed because PostgreSQL was away, from when it is back."""

_RESTART_AFTER = 2.0
"""Seconds until a worker that could not begin, or go on, begins again."""

_SWEEPS_AFTER = (0.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each attempt at the sweep of the start: those who write may be what it waits for."""

_ASK_AGAIN_AFTER = 0.5
"""Seconds until the queue asks PostgreSQL again for what it was not given."""

PRUNE_EVERY = "*/10 * * * *"
"""When what is not to be kept any longer is deleted, by one worker of all."""

Work = Callable[[str, int], Awaitable[float | None]]
"""Does a job, given its subject and how often it was tried; returns the seconds until it is to be done again."""


@contextlib.asynccontextmanager
async def working(state: State) -> AsyncIterator[None]:
    """Does background jobs until it is time to leave; those that are under way then are left to others."""
    leaving = state["leaving"]
    task = asyncio.create_task(_Worker(state).run())
    try:
        yield
    finally:
        leaving.begin()
        # A database that does not answer does not keep it.
        await asyncio.wait({task}, timeout=leaving.left(LAST_NEWS))
        await end(task)


async def work(settings: Settings) -> None:
    """Does background jobs until the process is told to leave."""
    async with connected(settings) as state, working(state):
        leaving = state["leaving"]
        for signum in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(signum, leaving.begin_for_good)
        await leaving.told()


Result = TypeVar("Result")


class _Driver(AsyncpgPoolDriver):
    """The queue's way to PostgreSQL, for which its absence is a pause.

    PgQueuer itself would end, and wait for all jobs that are under way before it could begin again; or go on without
    ever hearing any news, for a connection that listens notices nothing by itself. What PostgreSQL did not answer is
    asked once more: PgQueuer's statements may be repeated, and jobs that it has given to nobody come up by themselves.
    """

    def __init__(self, pool: asyncpg.Pool, connect: Callable[[], Awaitable[Any]], leaving: Leaving) -> None:
        super().__init__(pool)
        self._connect = connect
        self._leaving = leaving
        self._listening: list[asyncio.Task[None]] = []

    async def fetch(self, query: str, *args: object) -> list[dict[str, object]]:
        return await self._answered(partial(super().fetch, query, *args))

    async def execute(self, query: str, *args: object) -> str:
        return await self._answered(partial(super().execute, query, *args))

    async def add_listener(self, channel: str, callback: Callable[[str | bytes | bytearray], None]) -> None:
        self._listening.append(asyncio.create_task(self._listen(channel, Relay(_calmed(callback)))))

    async def __aexit__(self, *_: object) -> None:
        # PgQueuer enters it twice.
        self._entered -= 1
        if not self._entered:
            await end(*self._listening)

    async def _answered(self, ask: Callable[[], Awaitable[Result]]) -> Result:
        while True:
            try:
                return await ask()
            except AWAY as error:
                if blames_the_statement(error) or self._leaving.begun:
                    raise
                if not isinstance(error, PostgresAway):  # that has been said
                    log.warning("the queue waits for PostgreSQL", error=error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.told(), _ASK_AGAIN_AFTER)

    async def _listen(self, channel: str, hear: Relay) -> None:
        while True:
            try:
                await self._listen_while_it_lasts(channel, hear)
            except AWAY as error:
                log.debug("no news of the queue", error=error)
            await asyncio.sleep(_ASK_AGAIN_AFTER)

    async def _listen_while_it_lasts(self, channel: str, hear: Relay) -> None:
        lost = asyncio.Event()
        connection = await self._connect()
        try:
            connection.add_termination_listener(lambda _: lost.set())
            await connection.add_listener(channel, hear)
            await lost.wait()
        finally:
            await connection.close()


def _calmed(callback: Callable[[Any], None]) -> Callable[[Any], None]:
    """Passes on one piece of news of the queue in a while: whoever hears of any looks into it several times.

    Each new run is news, though its job is not due for long, and each job that is done.
    """
    loop = asyncio.get_running_loop()
    quiet_until = 0.0
    kept: asyncio.TimerHandle | None = None

    def pass_on(payload: Any) -> None:
        nonlocal quiet_until, kept
        quiet_until, kept = loop.time() + _NEWS_EVERY, None
        callback(payload)

    def hear(payload: Any) -> None:
        nonlocal kept
        if _CHANGED not in payload:
            callback(payload)
        elif loop.time() >= quiet_until and kept is None:
            pass_on(payload)
        elif kept is None:
            kept = loop.call_at(quiet_until, pass_on, payload)

    return hear


class _Worker:
    def __init__(self, state: State) -> None:
        self._state = state
        self._leaving = state["leaving"]
        reconciler = Reconciler(state["settings"], state["db"], state["happyrobot"], state["lookups"], state["intake"])
        # Many may be put off at once, and requests need connections, too.
        self._ranking = asyncio.Semaphore(2)
        settings, db, happyrobot, intake = state["settings"], state["db"], state["happyrobot"], state["intake"]
        launcher = Launcher(settings, db, happyrobot, intake)
        deliverer = Deliverer(settings, db, state["sender"])
        self._calls: dict[str, Work] = {
            jobs.RECONCILE: lambda run_id, _: reconciler.reconcile(run_id),
            jobs.CHECK: lambda run_id, _: reconciler.check(run_id),
            jobs.CANCEL: state["canceler"].again,
            jobs.START: lambda execution_id, _: launcher.start(execution_id),
            jobs.DECIDE: Decider(settings, db, happyrobot).tell,
        }
        self._webhooks: dict[str, Work] = {jobs.DELIVER: lambda delivery_id, _: deliverer.deliver(delivery_id)}

    async def run(self) -> None:
        """Works until it is told to stop, whatever becomes of PostgreSQL in the meantime."""
        while not self._leaving.begun:
            try:
                await self._serve_queue()
            except Exception as error:  # noqa: BLE001  # nobody waits for this task; it must outlive what goes wrong
                log.warning("background work pauses", error=error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.told(), _RESTART_AFTER)

    async def _connect(self, *_: Any, **__: Any) -> Any:
        database_url, _redis_url = addresses(self._state["settings"])
        return await open_connection(database_url, watch=self._state["watch"])

    async def _serve_queue(self) -> None:
        # None is kept for its own sake: the pool would complain loudly while it cannot have one.
        async with asyncpg.create_pool(connect=self._connect, min_size=0, max_size=4) as pool:
            # Apart, so that customers' endpoints which do not answer leave calls their places.
            calls = self._queue(pool, self._calls)
            calls.schedule("sweep", "* * * * *", accepts_context=False)(self._sweep)
            if (days := self._state["settings"].retention_days) is not None:
                calls.schedule("prune", PRUNE_EVERY, accepts_context=False)(self._pruning(days, calls.shutdown))
            webhooks = self._queue(pool, self._webhooks)
            running = [
                asyncio.create_task(
                    queue.run(
                        dequeue_timeout=_LOOK_EVERY,
                        batch_size=_BATCH,
                        max_concurrent_tasks=at_once,
                        heartbeat_timeout=_GONE_AFTER,
                    )
                )
                for queue, at_once in ((calls, _CALLS_AT_ONCE), (webhooks, _WEBHOOKS_AT_ONCE))
            ]
            tidying = asyncio.create_task(self._put_in_order())
            stopped = asyncio.create_task(self._leaving.told())
            try:
                await asyncio.wait({*running, stopped}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for queue in (calls, webhooks):
                    queue.shutdown.set()
                await end(tidying, stopped)
            ends = await asyncio.gather(*running, return_exceptions=True)
            for error in filter(None, ends):
                raise error

    def _queue(self, pool: asyncpg.Pool, works: Mapping[str, Work]) -> PgQueuer:
        driver = _Driver(pool, self._connect, self._leaving)
        queue = PgQueuer(driver, jobs.NAMES.channel, queries=jobs.queries(driver))
        for entrypoint, work in works.items():
            # Held, should PgQueuer fail to put it off because PostgreSQL is away: the sweep brings it back.
            queue.entrypoint(entrypoint, accepts_context=False, on_failure="hold")(self._handler(work))
        return queue

    async def _put_in_order(self) -> None:
        """Sees at the start to what a process that was killed has left behind; nobody's work waits for that."""
        for pause in _SWEEPS_AFTER:
            await asyncio.sleep(pause)
            with contextlib.suppress(Exception):  # it has said what is wrong; in the end the schedule goes on
                await self._sweep()
                return

    async def _sweep(self, _: Schedule | None = None) -> None:
        state = self._state
        settings = state["settings"]
        await sweep(state["db"], state["intake"], settings.reconcile_after, settings.stale_after)

    def _pruning(self, days: int, stopping: asyncio.Event) -> Callable[[Schedule], Awaitable[None]]:
        async def pruning(_: Schedule) -> None:
            await prune(self._state["db"], days, stopping)

        return pruning

    def _handler(self, work: Work) -> Callable[[Picked], Awaitable[None]]:
        async def handle(job: Picked) -> None:
            with tracing.job(self._state["tracing"], job.entrypoint, _subject(job)):
                again = await self._unless_stopped(job, work)
            if again is None:
                return
            with contextlib.suppress(SQLAlchemyError, OSError):  # then it comes up a little too early or too late
                async with self._ranking, singly(self._state["db"]).connect() as conn:
                    await jobs.rank_behind(conn, job.id, again)
            raise RetryRequested(timedelta(seconds=again))

        return handle

    async def _unless_stopped(self, job: Picked, work: Work) -> float | None:
        if self._leaving.begun:
            return 0.0
        subject = _subject(job)
        doing = asyncio.ensure_future(work(subject, job.attempts))
        stopped = asyncio.create_task(self._leaving.told())
        await asyncio.wait({doing, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not doing.done() and job.entrypoint in _SAID_ONCE:
            # What they are about is on its way: cut off, nobody would know what became of it.
            await asyncio.wait({doing}, timeout=self._leaving.left(UNDER_WAY))
            if not doing.done():
                # Once, and with time to write down what is known.
                doing.cancel()
                await asyncio.wait({doing}, timeout=self._leaving.left(LAST_NEWS))
        if doing.cancelled() or not doing.done():
            # Not cancelled by the queue, which would drop the job: the next worker takes it.
            await end(doing)
            return 0.0
        try:
            return doing.result()
        except Exception as error:  # whatever it was, the job stays
            tracing.failed(error)
            if will_pass(error):
                log.warning("job waits", job=job.entrypoint, subject=subject, error=error)
            else:
                log.exception("job failed", job=job.entrypoint, subject=subject)
            return _AFTER_ABSENCE if postgres_is_away(error) else _AFTER_TROUBLE


def _subject(job: Picked) -> str:
    return (job.payload or b"").decode()
