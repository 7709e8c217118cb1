"""Everything that takes part: servers, HappyRobot, Switchboard's processes, customers, and the wires between them."""

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import httpx
from pydantic_core import from_json
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database, jobs
from switchboard.embedded.servers import PORT
from switchboard.happyrobot.simulator import Simulator
from switchboard.migrate import migrate
from tests.conftest import API_KEY, APP_SECRET, HOOK_KEY, serving
from tests.faults.customers import Customer, customer_of
from tests.faults.guard import guarded
from tests.faults.parts import FullDisk, Part, postgres, switchboard, valkey
from tests.faults.process import CLOCK, HASTE, VARIANT
from tests.wires import Wire, wired

WORKERS = ("worker", "other worker")

RECONCILE_AFTER = 1.0
TRIGGER_TIMEOUT = 2.0


Name = tuple[str, str, str]
"""Of a callback of HappyRobot's: run, type, and when it happened."""


def to_the_millisecond(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds")


@dataclass
class Said:
    """What HappyRobot has told us in callbacks, in the guide's form and as CloudEvents."""

    sent: dict[Name, Any] = field(default_factory=dict)
    """With their data, whether or not they have arrived."""
    acknowledged: set[Name] = field(default_factory=set)
    """Those that we have answered 200."""
    complaints: list[str] = field(default_factory=list)
    """About how they were answered."""


class _Noted(httpx.AsyncHTTPTransport):
    """HappyRobot's way to us, which notes what it has said, and what we have said to that."""

    def __init__(self, said: Said) -> None:
        super().__init__(limits=httpx.Limits(max_connections=64, max_keepalive_connections=16))
        self._said = said

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = from_json(request.content)
        if "specversion" in body:
            run_id, kind, at = body["data"]["run_id"], body["type"], body["time"]
        else:
            run_id, kind, at = body["run_id"], body["event_type"], body["timestamp"]
        name = (run_id, kind, to_the_millisecond(datetime.fromisoformat(at)))
        self._said.sent[name] = body["data"]
        answer = await super().handle_async_request(request)
        if answer.status_code == 200:
            self._said.acknowledged.add(name)
        elif answer.status_code not in (404, 503):
            self._said.complaints.append(f"HappyRobot's callback {body} was answered {answer.status_code}")
        return answer


@dataclass(eq=False)
class Scene:
    chance: random.Random
    folder: Path
    simulator: Simulator
    said: Said
    disk: FullDisk
    postgres: Part
    valkey: Part
    processes: dict[str, Part]
    to_postgres: Wire
    to_valkey: Wire
    to_happyrobot: Wire
    front: Wire
    """To any of the processes that serve."""
    clock: Path
    db: AsyncEngine
    """Past all wires."""
    customers: list[Customer] = field(default_factory=list)

    @property
    def serving(self) -> list[Part]:
        return [part for part in self.processes.values() if part.name not in WORKERS]

    @property
    def working(self) -> list[Part]:
        return [part for part in self.processes.values() if part.name in WORKERS]

    @property
    def stopped(self) -> list[str]:
        """The runs that HappyRobot was asked to stop, as often as it was."""
        return [it.run_id for it in self.simulator.requests if it.run_id is not None and it.method == "POST"]

    def set_clock(self, ahead: float) -> None:
        fresh = self.clock.with_suffix(".new")
        fresh.write_text(str(ahead))
        fresh.replace(self.clock)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection past all wires."""
        connection = await asyncpg.connect(host=str(self.disk.folder), port=PORT, user="postgres", database="postgres")
        try:
            for kind in ("json", "jsonb"):
                await connection.set_type_codec(kind, encoder=str, decoder=from_json, schema="pg_catalog")
            yield connection
        finally:
            connection.terminate()

    async def events_between(self, after: int, up_to: int) -> list[asyncpg.Record]:
        async with self.connected() as connection:
            query = "SELECT * FROM run_events WHERE id > $1 AND id <= $2 ORDER BY id"
            rows: list[asyncpg.Record] = await connection.fetch(query, after, up_to)
        return rows

    async def newest_event(self) -> int:
        async with self.connected() as connection:
            return await connection.fetchval("SELECT max(id) FROM run_events") or 0

    async def until_overdue(self) -> None:
        """Waits until of every call that is not known to be placed it could be known that nobody places it any more."""
        query = "SELECT count(*) FROM executions WHERE status = 'pending' AND answer_by > now()"
        async with self.connected() as connection:
            while await connection.fetchval(query):  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.1)

    async def was_given_up(self, execution_id: str | None) -> bool:
        """Whether nobody waits any more to hear if an execution's call was placed; false where that is not known."""
        query = "SELECT status = 'submission_unknown' FROM executions WHERE id = $1"
        try:
            async with self.connected() as connection:
                return bool(await connection.fetchval(query, execution_id))
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False

    async def leftovers(self) -> list[str]:
        """What is there though nobody has anything to do any more, and would be there for ever."""
        async with self.connected() as connection:
            queue = await connection.fetch(f"SELECT entrypoint, status::text, payload FROM {jobs.NAMES.queue_table}")
            held = await connection.fetch("SELECT run_id FROM held_callbacks JOIN agent_runs USING (run_id)")
            idle = await connection.fetch(
                "SELECT query FROM pg_stat_activity"
                " WHERE state LIKE 'idle in transaction%' AND xact_start < now() - interval '10 s'"
            )
        async with Redis.from_url(f"unix://{self.folder / 'valkey.sock'}") as redis:
            kept = [key async for key in redis.scan_iter() if await redis.ttl(key) == -1]
        # Of which HappyRobot's API would tell nothing: their records are asked for, for as long as that is worth while.
        untold = [run.id for run in self.simulator.runs.values() if run.faults.api_answer]
        asked_for = {(entrypoint, run_id) for entrypoint in (jobs.RECONCILE, jobs.CHECK) for run_id in untold}
        return [
            *(
                f"a job to {job['entrypoint']} {job['payload'].decode()} is {job['status']}"
                for job in queue
                if (job["entrypoint"], job["payload"].decode()) not in asked_for
            ),
            *(f"a callback of run {row['run_id']} is held, though that is known" for row in held),
            *(f"a transaction is open after {row['query']}" for row in idle),
            *(f"Valkey keeps {key} for ever" for key in kept),
        ]

    async def flush_valkey(self) -> None:
        """Makes it forget everything."""
        async with Redis.from_url(f"unix://{self.folder / 'valkey.sock'}") as redis:
            await redis.flushall()


@contextlib.asynccontextmanager
async def staged(
    chance: random.Random, folder: Path, *, durable: bool = False, variant: str = "", haste: bool = False
) -> AsyncIterator[Scene]:
    """A scene with all parts up."""
    async with contextlib.AsyncExitStack() as stack:
        small = folder / "disk"
        small.mkdir()
        stack.enter_context(guarded(folder))
        disk = FullDisk(small, 500)
        stack.callback(disk.unmount)
        its_postgres, postgres_path = await asyncio.to_thread(postgres, small, durable=durable)
        its_valkey, valkey_path = valkey(folder)
        await stack.enter_async_context(its_postgres)
        await stack.enter_async_context(its_valkey)
        to_postgres = await stack.enter_async_context(wired("PostgreSQL", postgres_path))
        to_valkey = await stack.enter_async_context(wired("Valkey", valkey_path))
        front = await stack.enter_async_context(wired("the front"))
        front.room = 32_768  # a browser that does not read is soon noticed by those who serve it
        url = f"postgresql://postgres@/postgres?host={small}"
        await migrate(url)
        db = database.connect(url)
        stack.push_async_callback(db.dispose)

        said = Said()
        simulator = Simulator(
            hook_key=HOOK_KEY,
            api_key=API_KEY,
            pace=0.01,
            # Beyond the longest fault: what HappyRobot never says must be what it was told not to say.
            backoff=(0.1, 0.4, 1.0, 3.0, 6.0, *([] if haste else [10.0] * 4)),
            transport=_Noted(said),
        )
        at, _ = await stack.enter_async_context(serving(lambda _: simulator.app))
        to_happyrobot = await stack.enter_async_context(wired("HappyRobot", ("127.0.0.1", int(at.rpartition(":")[2]))))

        clock = folder / "clock"
        clock.write_text("0")
        environment = {
            **_environment(to_postgres, to_valkey, to_happyrobot, front),
            CLOCK: str(clock),
            VARIANT: variant,
            HASTE: "1" if haste else "",
        }
        serve = ("serve", "--port", "0", "--no-migrate")
        processes = {
            "one": switchboard("one", folder, environment, *serve, "--no-worker"),
            "other": switchboard("other", folder, environment, *serve, "--no-worker"),
            **{name: switchboard(name, folder, environment, "worker", "--metrics-port", "0") for name in WORKERS},
        }
        scene = Scene(
            chance,
            folder,
            simulator,
            said,
            disk,
            its_postgres,
            its_valkey,
            processes,
            to_postgres,
            to_valkey,
            to_happyrobot,
            front,
            clock,
            db,
        )
        await asyncio.gather(*(stack.enter_async_context(part) for part in processes.values()))
        pointing = asyncio.create_task(_point(scene))
        stack.callback(pointing.cancel)
        for name, mood in (("ada", "well"), ("ben", "badly"), ("cleo", "late")):
            scene.customers.append(await stack.enter_async_context(customer_of(db, chance, name, mood)))
        yield scene


def _environment(to_postgres: Wire, to_valkey: Wire, to_happyrobot: Wire, front: Wire) -> dict[str, str]:
    """How Switchboard's processes are set up: everything that they know is at the end of a wire."""
    return {
        # Which of their lines run is looked at elsewhere: it would make them slow, and that would look like a fault.
        **{name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ},
        "DATABASE_URL": f"postgresql://postgres@127.0.0.1:{to_postgres.port}/postgres",
        "REDIS_URL": f"redis://127.0.0.1:{to_valkey.port}",
        "HAPPYROBOT_WEBHOOK_URL": f"{to_happyrobot.url}/hooks/test",
        "HAPPYROBOT_API_URL": f"{to_happyrobot.url}/api/v1",
        "HAPPYROBOT_X_API_KEY": HOOK_KEY,
        "HAPPYROBOT_API_KEY": API_KEY,
        "HAPPYROBOT_API_PACE": "200",
        "HAPPYROBOT_TRIGGER_TIMEOUT": str(TRIGGER_TIMEOUT),
        "HAPPYROBOT_RESUME_HOSTS": "127.0.0.1",
        "ALLOW_PRIVATE_WEBHOOKS": "true",
        "RECONCILE_AFTER": str(RECONCILE_AFTER),
        "APP_URL": front.url,
        "APP_SECRET": APP_SECRET,
        "LOG_LEVEL": "info",
    }


async def _point(scene: Scene) -> None:
    """Leads the front to where the processes answer: at another port whenever one was started again."""
    while True:
        addresses = [part.address for part in scene.serving if part.address]
        scene.front.targets = [("127.0.0.1", int(address.rpartition(":")[2])) for address in addresses]
        await asyncio.sleep(0.02)
