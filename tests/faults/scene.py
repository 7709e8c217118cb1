"""Everything that takes part: servers, HappyRobot, Switchboard's processes, customers, and the wires between them."""

import asyncio
import base64
import contextlib
import hmac
import os
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from pydantic_core import from_json
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database, jobs
from switchboard.access import keys, webhooks
from switchboard.embedded.servers import PORT
from switchboard.errors import PUBLIC
from switchboard.happyrobot.simulator import Simulator
from switchboard.migrate import migrate
from switchboard.settings import Settings
from switchboard.tables import KeyScope, WebhookEvent
from tests.conftest import API_KEY, APP_SECRET, HOOK_KEY, serving
from tests.faults.parts import FullDisk, Part, postgres, switchboard, valkey
from tests.faults.process import CLOCK, HASTE, VARIANT
from tests.receiver import Receiver, Request, receiving, reply
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
class Customer:
    """Somebody with a key for the Public API, and a server that takes webhooks."""

    name: str
    key_id: Any
    headers: dict[str, str]
    receiver: Receiver
    mood: str = "well"
    """How its server answers: well, badly, late, never."""
    secret: str = ""
    """With which webhooks are signed."""
    forgeries: list[str] = field(default_factory=list)
    """Webhooks that were not signed with it, or do not say what they are about."""
    _told: defaultdict[tuple[str, str], dict[str, "Notice"]] = field(default_factory=lambda: defaultdict(dict))

    def note(self, request: Request, status: int | None) -> None:
        """Notes an attempt, and how it was answered."""
        body = request.json
        notice = self._told[body["executionId"], body["event"]].setdefault(request.id, Notice())
        notice.taken |= status == 200
        notice.texts.add(request.body)
        signed = self._signatures(request).items() <= request.headers.items()
        # What more may have happened in the same moment has a webhook of its own.
        status_told = body["event"].removeprefix("execution.").replace("started", "running")
        if not signed or request.event != body["event"] or body["data"]["status"] != status_told:
            self.forgeries.append(f"webhook {request.id} to {self.name} is not right: {request.headers}, {body}")

    def _signatures(self, request: Request) -> dict[str, str]:
        """What has to be in its headers: the Public API's signature, and the one of Standard Webhooks."""
        ours = hmac.new(self.secret.encode(), request.body, "sha256").hexdigest()
        content = f"{request.id}.{request.headers.get('webhook-timestamp')}.".encode() + request.body
        key = base64.b64decode(self.secret.removeprefix(webhooks.PREFIX))
        standard = base64.b64encode(hmac.digest(key, content, "sha256")).decode()
        return {"X-Webhook-Signature": f"sha256={ours}", "webhook-signature": f"v1,{standard}"}

    @property
    def heard(self) -> AbstractSet[tuple[str, str]]:
        """Of which executions it was told what, under whatever ids."""
        return self._told.keys()

    def told(self) -> "Told":
        """What it was told by now: by execution and event under which ids."""
        return {
            about: {name: Notice(notice.taken, set(notice.texts)) for name, notice in notices.items()}
            for about, notices in self._told.items()
        }


@dataclass
class Notice:
    """What a customer was told under one id."""

    taken: bool = False
    """Whether it was answered 200, at one attempt at least."""
    texts: set[bytes] = field(default_factory=set)
    """In which words."""


Told = Mapping[tuple[str, str], Mapping[str, Notice]]


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

    def set_clock(self, ahead: float) -> None:
        fresh = self.clock.with_suffix(".new")
        fresh.write_text(str(ahead))
        fresh.replace(self.clock)

    async def connect(self) -> asyncpg.Connection:
        """A connection past all wires."""
        connection = await asyncpg.connect(host=str(self.disk.folder), port=PORT, user="postgres", database="postgres")
        for kind in ("json", "jsonb"):
            await connection.set_type_codec(kind, encoder=str, decoder=from_json, schema="pg_catalog")
        return connection

    async def events_between(self, after: int, up_to: int) -> list[asyncpg.Record]:
        connection = await self.connect()
        try:
            query = "SELECT * FROM run_events WHERE id > $1 AND id <= $2 ORDER BY id"
            rows: list[asyncpg.Record] = await connection.fetch(query, after, up_to)
        finally:
            await connection.close()
        return rows

    async def newest_event(self) -> int:
        connection = await self.connect()
        try:
            return await connection.fetchval("SELECT max(id) FROM run_events") or 0
        finally:
            await connection.close()

    async def until_overdue(self) -> None:
        """Waits until of every call that is not known to be placed it could be known that nobody places it any more."""
        query = "SELECT count(*) FROM executions WHERE status = 'pending' AND answer_by > now()"
        connection = await self.connect()
        try:
            while await connection.fetchval(query):  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.1)
        finally:
            await connection.close()

    async def was_given_up(self, execution_id: str | None) -> bool:
        """Whether nobody waits any more to hear if an execution's call was placed; false where that is not known."""
        try:
            connection = await self.connect()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        try:
            query = "SELECT status = 'submission_unknown' FROM executions WHERE id = $1"
            return bool(await connection.fetchval(query, execution_id))
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        finally:
            connection.terminate()

    async def leftovers(self) -> list[str]:
        """What is there though nobody has anything to do any more, and would be there for ever."""
        connection = await self.connect()
        try:
            queue = await connection.fetch(f"SELECT entrypoint, status::text, payload FROM {jobs.NAMES.queue_table}")
            held = await connection.fetch("SELECT run_id FROM held_callbacks JOIN agent_runs USING (run_id)")
            idle = await connection.fetch(
                "SELECT query FROM pg_stat_activity"
                " WHERE state LIKE 'idle in transaction%' AND xact_start < now() - interval '10 s'"
            )
        finally:
            await connection.close()
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

    async def until_well(self, within: float) -> float:
        """Waits until everything is served again; returns how many seconds that took.

        What was started again is given the time that it takes to start. Raises TimeoutError.
        """
        for part in (self.postgres, self.valkey, *self.processes.values()):
            try:
                await part.until_ready()
            except TimeoutError:
                raise TimeoutError(f"{part.name} does not start") from None
        began, ailments = time.monotonic(), dict.fromkeys([*self.processes, "webhooks"], "no answer")
        try:
            async with asyncio.timeout(within), asyncio.TaskGroup() as group:
                for part in self.serving:
                    group.create_task(self._until_it_serves(part, ailments))
                group.create_task(self._until_they_work(ailments))
        except TimeoutError:
            raise TimeoutError("; ".join(f"{name}: {what}" for name, what in ailments.items() if what)) from None
        return time.monotonic() - began

    async def _until_it_serves(self, part: Part, ailments: dict[str, str]) -> None:
        async with httpx.AsyncClient(base_url=part.address, timeout=5) as http:
            while ailment := await _ailment(http):
                ailments[part.name] = ailment
                await asyncio.sleep(0.05)  # nobody tells
        ailments[part.name] = ""

    async def _until_they_work(self, ailments: dict[str, str]) -> None:
        """Until every worker starts executions and tells of them, and all that were accepted here were told of."""
        customer, body, started = self.customers[0], {"input": _QUIET, "contextId": "probe"}, set[tuple[str, str]]()
        async with httpx.AsyncClient(base_url=self.front.url, timeout=5) as http:
            before: dict[str, Mapping[str, float]] = {}
            while any(ailments[part.name] for part in self.working):
                if len(started - customer.heard) < _PROBES:
                    with contextlib.suppress(httpx.TransportError, AttributeError):
                        answer = await http.post(_EXECUTE, json=body, headers=customer.headers)
                        ailments["webhooks"] = f"an execution was answered {answer.status_code}"
                        if answer.status_code == 202:
                            started.add((answer.json()["executionId"], "execution.started"))
                await asyncio.sleep(0.1)  # nobody tells who takes it
                for part in self.working:
                    try:
                        done = await _work_done(http, part)
                    except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
                        ailments[part.name] = type(error).__name__
                        continue
                    idle = [what for what in done if done[what] == before.setdefault(part.name, done)[what]]
                    ailments[part.name] = f"no {', no '.join(idle)} of {len(started)}" if idle else ""
            while untold := started - customer.heard:
                ailments["webhooks"] = f"{customer.name} was not told of {untold}"
                await asyncio.sleep(0.05)  # nobody tells
        ailments["webhooks"] = ""


_PROBES = 4
"""Executions that are under way at once to see whether workers work: more would be what keeps them busy."""

_EXECUTE = f"{PUBLIC}/agents/default/execute"
_QUIET = {"simulate": {"faults": "silent"}}


async def _work_done(http: httpx.AsyncClient, worker: Part) -> dict[str, float]:
    """How many calls and webhooks a worker has sent since it was started, whatever became of them."""
    families = text_string_to_metric_families((await http.get(f"{worker.address}/metrics")).text)
    samples = [sample for family in families for sample in family.samples]
    calls = [sample.value for sample in samples if sample.name == _CALLS and sample.labels["call"] == "trigger"]
    webhooks = [sample.value for sample in samples if sample.name == _WEBHOOKS]
    return {"calls": sum(calls), "webhooks": sum(webhooks)}


_CALLS, _WEBHOOKS = "switchboard_upstream_requests_total", "switchboard_delivery_attempts_total"


async def _ailment(http: httpx.AsyncClient) -> str:
    """What keeps a process from doing all that it has to do; nothing where it does."""
    try:
        ready = await http.get("/readyz")
        if ready.status_code != 200 or ready.json()["checks"]["redis"] != "ok":
            return ready.text
        placed = await http.post("/api/happyrobot/trigger", json={"context_id": "probe"} | _QUIET)
        if placed.status_code != 200:
            return f"a trigger was answered {placed.text}"
        [run_id] = placed.json()["run_ids"]
        body, headers = {"run_id": run_id, "event_type": "log"}, {"X-API-KEY": HOOK_KEY}
        async with http.stream("GET", f"/api/events?run_id={run_id}&last_event_id=0") as stream:
            taken = await http.post("/api/webhooks/happyrobot", json=body, headers=headers)
            if (taken.status_code, stream.status_code) != (200, 200):
                return f"a callback was answered {taken.text}, a stream {stream.status_code}"
            async for line in stream.aiter_lines():
                if line.startswith("data:") and '"log"' in line:
                    break
    except (httpx.TransportError, AttributeError) as error:
        return type(error).__name__
    return ""


@contextlib.asynccontextmanager
async def staged(
    chance: random.Random, folder: Path, *, durable: bool = False, variant: str = "", haste: bool = False
) -> AsyncIterator[Scene]:
    """A scene with all parts up."""
    async with contextlib.AsyncExitStack() as stack:
        small = folder / "disk"
        small.mkdir()
        disk = FullDisk(small, 500)
        stack.callback(disk.unmount)
        its_postgres, postgres_path = await asyncio.to_thread(postgres, small, durable=durable)
        its_valkey, valkey_path = valkey(folder)
        await stack.enter_async_context(its_postgres)
        await stack.enter_async_context(its_valkey)
        to_postgres = await stack.enter_async_context(wired("PostgreSQL", postgres_path))
        to_valkey = await stack.enter_async_context(wired("Valkey", valkey_path))
        front = await stack.enter_async_context(wired("the front"))
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
            **{
                name: os.environ[name]
                for name in ("PATH", "HOME", "PYTHONPATH", "COVERAGE_PROCESS_CONFIG")
                if name in os.environ
            },
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
            scene.customers.append(await stack.enter_async_context(_customer(scene, name, mood)))
        await scene.until_well(60)
        yield scene


async def _point(scene: Scene) -> None:
    """Leads the front to where the processes answer: at another port whenever one was started again."""
    while True:
        addresses = [part.address for part in scene.serving if part.address]
        scene.front.targets = [("127.0.0.1", int(address.rpartition(":")[2])) for address in addresses]
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def _customer(scene: Scene, name: str, mood: str) -> AsyncIterator[Customer]:
    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        status: int | None = None
        try:
            if customer.mood == "never":
                await asyncio.Event().wait()
            if customer.mood == "late":
                await asyncio.sleep(scene.chance.uniform(0.2, 1.5))
            status = 500 if customer.mood == "badly" and scene.chance.random() < 0.3 else 200
            await reply(writer, status)
        finally:
            customer.note(request, status)

    async with receiving(answer) as receiver:
        settings = Settings(_env_file=None, app_secret=SecretStr(APP_SECRET), allow_private_webhooks=True)
        async with scene.db.begin() as conn:
            made, secret = await keys.create(conn, name, [KeyScope.PUBLIC], burst=1_000_000)
            signing = await webhooks.point(conn, settings, made.id, receiver.url, tuple(WebhookEvent))
        assert signing is not None
        headers = {"Authorization": f"Bearer {secret.get_secret_value()}"}
        customer = Customer(name, made.id, headers, receiver, mood, signing.get_secret_value())
        yield customer
