"""Whether everything is served again: each process places a call, takes a callback and shows it; each worker works."""

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from switchboard.clients import Client
from tests.conftest import HOOK_KEY
from tests.faults.customers import EXECUTE
from tests.faults.parts import Part
from tests.faults.scene import Scene

_PROBES = 4
"""Executions that are under way at once to see whether workers work: more would be what keeps them busy."""

_QUIET = {"simulate": {"faults": "silent"}}
_CALLS, _WEBHOOKS = "switchboard_upstream_requests_total", "switchboard_delivery_attempts_total"


@dataclass
class Recovery:
    """What still keeps which part from doing what it has to do."""

    ailments: dict[str, str] = field(default_factory=dict)
    took: float = 0.0
    """Seconds, from when every program ran."""
    slowest: str = ""
    """What was the last to be well again, and what was wrong with it before."""

    def note(self, name: str, ailment: str) -> None:
        if before := self.ailments[name]:
            self.slowest = f"{name}: {before}"
        self.ailments[name] = ailment

    def __str__(self) -> str:
        return "; ".join(f"{name}: {what}" for name, what in self.ailments.items() if what)


async def until_well(scene: Scene, within: float) -> Recovery:
    """Waits until everything is served again, for so many seconds at most.

    What was started again is given the time that it takes to start. Raises TimeoutError, which says what is not well.
    """
    for part in (scene.postgres, scene.valkey, *scene.processes.values()):
        try:
            await part.until_ready()
        except TimeoutError:
            raise TimeoutError(f"{part.name} does not start") from None
    began, recovery = time.monotonic(), Recovery(dict.fromkeys([*scene.processes, "webhooks"], "no answer"))
    try:
        async with asyncio.timeout(within), asyncio.TaskGroup() as group:
            for part in scene.serving:
                group.create_task(_until_it_serves(part, recovery))
            group.create_task(_until_they_work(scene, recovery))
    except TimeoutError:
        raise TimeoutError(str(recovery)) from None
    recovery.took = time.monotonic() - began
    return recovery


async def _until_it_serves(part: Part, recovery: Recovery) -> None:
    async with Client(base_url=part.address, timeout=5) as http:
        while ailment := await _ailment(http):
            recovery.note(part.name, ailment)
            await asyncio.sleep(0.05)  # nobody tells
    recovery.note(part.name, "")


async def _ailment(http: httpx.AsyncClient) -> str:
    """What keeps a process from doing all that it has to do; nothing where it does."""
    step = "readiness"
    try:
        ready = await http.get("/readyz")
        if ready.status_code != 200 or ready.json()["checks"]["redis"] != "ok":
            return ready.text
        step = "a trigger"
        placed = await http.post("/api/happyrobot/trigger", json={"context_id": "probe"} | _QUIET)
        if placed.status_code != 200:
            return f"a trigger was answered {placed.text}"
        [run_id] = placed.json()["run_ids"]
        body, headers = {"run_id": run_id, "event_type": "log"}, {"X-API-KEY": HOOK_KEY}
        step = "a stream"
        async with http.stream("GET", f"/api/events?run_id={run_id}&last_event_id=0") as stream:
            step = "a callback"
            taken = await http.post("/api/webhooks/happyrobot", json=body, headers=headers)
            if (taken.status_code, stream.status_code) != (200, 200):
                return f"a callback was answered {taken.text}, a stream {stream.status_code}"
            step = "an event"
            async for line in stream.aiter_lines():
                if line.startswith("data:") and '"log"' in line:
                    return ""
    except httpx.TransportError as error:
        return f"{step}: {type(error).__name__}"
    return "a stream ended"


async def _until_they_work(scene: Scene, recovery: Recovery) -> None:
    """Until every worker starts executions and tells of them, and all that were accepted here were told of."""
    customer, body, started = scene.customers[0], {"input": _QUIET, "contextId": "probe"}, set[tuple[str, str]]()
    before: dict[str, Mapping[str, float]] = {}
    async with Client(base_url=scene.front.url, timeout=5) as http:
        while any(recovery.ailments[part.name] for part in scene.working):
            if len(started - customer.told.keys()) < _PROBES:
                with contextlib.suppress(httpx.TransportError):
                    answer = await http.post(EXECUTE, json=body, headers=customer.headers)
                    recovery.note("webhooks", f"an execution was answered {answer.status_code}")
                    if answer.status_code == 202:
                        started.add((answer.json()["executionId"], "execution.started"))
            await asyncio.sleep(0.1)  # nobody tells who takes it
            for part in scene.working:
                try:
                    done = await _work_done(http, part)
                except httpx.TransportError as error:
                    recovery.note(part.name, type(error).__name__)
                    continue
                idle = [what for what in done if done[what] == before.setdefault(part.name, done)[what]]
                recovery.note(part.name, f"no {', no '.join(idle)} of {len(started)}" if idle else "")
    while untold := started - customer.told.keys():
        recovery.note("webhooks", f"{customer.name} was not told of {untold}")
        await asyncio.sleep(0.05)  # nobody tells
    recovery.note("webhooks", "")


async def _work_done(http: httpx.AsyncClient, worker: Part) -> dict[str, float]:
    """How many calls and webhooks a worker has sent since it was started, whatever became of them."""
    families = text_string_to_metric_families((await http.get(f"{worker.address}/metrics")).text)
    samples = [sample for family in families for sample in family.samples]
    calls = [sample.value for sample in samples if sample.name == _CALLS and sample.labels["call"] == "trigger"]
    webhooks = [sample.value for sample in samples if sample.name == _WEBHOOKS]
    return {"calls": sum(calls), "webhooks": sum(webhooks)}
