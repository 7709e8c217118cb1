"""Who uses Switchboard in a round: applications, HappyRobot's further callbacks, browsers, websites, pollers.

All of them come by the front, and do what a careful client does: repeat what was not answered where that is safe, and
nothing else.
"""

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, cycle, repeat
from socket import SO_RCVBUF, SOL_SOCKET
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, aconnect_sse

from switchboard.clients import Client
from switchboard.errors import PUBLIC
from switchboard.happyrobot.simulator import Run
from tests.conftest import HOOK_KEY
from tests.faults.customers import EXECUTE
from tests.faults.ledger import FINAL, Book, Intent, Seen
from tests.faults.scene import Scene

PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Everything here is plain HTTP; to read the usual certificates for each stream would take longer than all else."""

PATIENCE = 15.0
"""Seconds that a client waits for an answer."""

_BROWSERS = 8
"""In one round."""

_IN_VAIN = 10
"""Looks for a call that was given up and not placed, after which it will not be: it may have been on its way."""

_AT_ONCE = 60
"""Deeds of one round that may be under way: of more, this process would be the one that is slow."""

_RETRIES_FOR = 400.0
"""Seconds for which a client repeats what it may repeat."""

_ANSWERS_BADLY = {"hang", "disconnect", "answer"}
"""What HappyRobot may do instead of confirming a call."""
_CONFIRMS = {"one", "other", "HappyRobot", "PostgreSQL"}
"""Who else has to do with whether a call is confirmed."""

_CATCHES_UP = 5.0
"""Seconds after a fault in which all comes that has waited: HappyRobot may call back first, and confirm too late."""

_LARGE, _LARGE_AFTER = 200_000, 12
"""Bytes of a callback in so many: a browser that does not read is soon behind."""

_THINKS_BETTER_OF_IT = 0.25
"""How often somebody wants a call to be stopped that was just placed, or that waits for them to decide.

Until a cancellation of the round is acknowledged, they want it of each that was just placed.
"""
_ASK = {"one", "other", "HappyRobot"}
"""What is between a cancellation that is acknowledged and HappyRobot."""
_REMEMBERED_FOR = 10.0
"""Seconds after a fault for which it may be why HappyRobot is not reached: a dead connection is kept, and tried."""

_SILENT_FOR = 20.0
"""Seconds after which a browser takes a stream that says nothing for dead."""
_NOTICED_AFTER = 2.0
"""Seconds after which a browser knows that its stream has ended."""
_CUT_OFF = 5
"""Ends of one browser's streams that nothing explains and that are too many: now and then it is too slow itself."""

_STALLS_FOR = 5.0
"""Seconds for which it does not."""


@dataclass(eq=False)
class Cast:
    """All who act in a round."""

    scene: Scene
    book: Book
    app: httpx.AsyncClient
    website: httpx.AsyncClient
    happyrobot: httpx.AsyncClient
    poller: httpx.AsyncClient
    browsers: list["Browser"] = field(default_factory=list)
    waits_for: list[str] = field(default_factory=list)
    """What was not there yet when it was last looked at."""
    _views: Iterator[int] = field(default_factory=lambda: cycle(range(4)))
    """What is looked at next."""
    _stopped: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def begin(self, deed: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(self.guarded(deed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def guarded(self, deed: Callable[[], Awaitable[None]]) -> None:
        """Does something; that it fails is a finding, as nobody else would hear of it."""
        try:
            await deed()
        except Exception as error:  # noqa: BLE001  # whatever it is
            self.book.complain(f"an actor fails: {error!r}")

    def repeat(self, deed: Callable[[], Awaitable[None]], a_second: float) -> None:
        """Lets something be done so often, each time whether or not the one before is done, unless too many wait."""

        async def again() -> None:
            while not self._stopped.is_set():
                if len(self._tasks) < _AT_ONCE:
                    self.begin(deed)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), self.scene.chance.expovariate(a_second))

        self.begin(again)

    def stop(self) -> None:
        """Begins nothing new; what has begun goes on."""
        self._stopped.set()

    @property
    def done(self) -> bool:
        """Whether everybody has heard what they wanted to hear."""
        return not self._tasks

    async def leave(self) -> None:
        tasks = [*self._tasks, *(browser.task for browser in self.browsers if browser.task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in (self.app, self.website, self.happyrobot, self.poller):
            await client.aclose()

    # What they want

    def _wishes(self) -> dict[str, Any]:
        """What a call is to be like, and what HappyRobot does badly about it."""
        chance = self.scene.chance
        faults: dict[str, Any] = {}
        for name, odds in (("duplicate", 0.3), ("reorder", 0.15), ("drop_final", 0.15), ("call_back_first", 0.1)):
            if chance.random() < odds:
                faults[name] = True
        match chance.choices(["well", "hang", "disconnect", "answer", "silent"], [70, 6, 8, 12, 4])[0]:
            case "answer":
                faults["answer"] = chance.choice(["garbage", "empty", "no_runs", "503", "429", "502", "400", "500"])
            case "well":
                pass
            case fault:
                faults[fault] = True
        if chance.random() < 0.15:
            faults |= chance.choice([{"api_missing": 1.0}, {"api_delay": 0.5}, {"api_answer": "500"}])
        if faults.get("api_answer") and (faults.get("drop_final") or faults.get("silent")):
            del faults["api_answer"]  # nobody would ever tell how it ended
        outcome = chance.choices(["completed", "failed", "canceled"], [70, 20, 10])[0]
        wishes: dict[str, Any] = {"faults": faults, "outcome": outcome, "runs": 1 if chance.random() < 0.85 else 2}
        return wishes | {"cloud_events": chance.random() < 0.2}

    def _intent(self, *, keyed: bool, **more: Any) -> Intent:
        book = self.book
        number = f"{book.number}-{len(book.intents)}"
        intent = Intent(number, self.scene.chance.choice(book.contexts), f"key-{number}" if keyed else None, **more)
        book.intents.append(intent)
        return intent

    async def place_a_call(self) -> None:
        intent = self._intent(keyed=self.scene.chance.random() < 0.6)
        wishes = self._wishes()
        intent.unlucky = not _ANSWERS_BADLY.isdisjoint(wishes["faults"])
        body = {"context_id": intent.context_id, "intent": intent.id, "simulate": wishes}
        headers = {} if intent.key is None else {"Idempotency-Key": intent.key}
        async for answer in self._asking(
            self.app, "a trigger", "/api/happyrobot/trigger", body, headers, again=bool(intent.key)
        ):
            said = answer.json()
            intent.execution_id = said.get("execution_id", intent.execution_id)
            if answer.status_code == 200:
                intent.run_ids = said["run_ids"]
                intent.accepted = True
                if not self.book.canceled or self.scene.chance.random() < _THINKS_BETTER_OF_IT:
                    await self._stop(self.scene.chance.choice(intent.run_ids))
                return
            if answer.status_code == 502:
                intent.failed = said["status"] == "failed"
                if not (intent.unlucky or self.book.outages.excuse(_CONFIRMS, intent.began - _CATCHES_UP)):
                    self.book.complain(f"intent {intent.id} was answered {answer.text}, and nothing explains it")
                return

    async def execute_an_agent(self) -> None:
        chance = self.scene.chance
        first = not any(intent.customer for intent in self.book.intents)
        intent = self._intent(keyed=True, customer=chance.choice(self.scene.customers))
        assert intent.customer is not None
        approval = first or chance.random() < 0.4  # in every round somebody is asked
        wishes = self._wishes() | ({"approval": True, "runs": 1} if approval else {})
        if approval:
            wishes["faults"] = {name: on for name, on in wishes["faults"].items() if name == "duplicate"}
        body = {"input": {"intent": intent.id, "simulate": wishes}, "contextId": intent.context_id}
        headers = intent.customer.headers | {"Idempotency-Key": str(intent.key)}
        async for answer in self._asking(self.website, "an execution", EXECUTE, body, headers, again=True):
            if answer.status_code == 202:
                intent.execution_id = answer.json()["executionId"]
                intent.accepted = True
                break
        if approval and intent.accepted:
            await self._decide(intent)

    async def _decide(self, intent: Intent) -> None:
        assert intent.customer is not None
        path, headers = f"{PUBLIC}/executions/{intent.execution_id}", intent.customer.headers
        verdict, in_vain = self.scene.chance.choice(["approve", "reject"]), 0
        async for answer in self._asking(
            self.website, "a question", f"{path}/pending-approval", None, headers, again=True
        ):
            if answer.status_code == 200:
                break
            status = await self._get("a status", f"{path}/status", headers)
            if status is None or status.status_code != 200:
                continue
            if status.json()["status"] in ("completed", "failed", "cancelled"):
                return  # the call came to nothing before it had asked
            # While a fault lasts it may still be on its way.
            given_up = self._stopped.is_set() and await self.scene.was_given_up(intent.execution_id)
            in_vain = in_vain + 1 if given_up and not self._calls_of(intent) else 0
            if in_vain > _IN_VAIN:
                return  # nobody knows whether it was placed, and it was not
        else:
            return
        intent.asked = True
        if self.scene.chance.random() < _THINKS_BETTER_OF_IT:
            await self._stop_what_waits(intent)
            return
        intent.verdict = verdict
        async for _ in self._asking(self.website, "a decision", f"{path}/{verdict}", {}, headers, again=True):
            intent.decision = verdict
            return

    async def _stop_what_waits(self, intent: Intent) -> None:
        """Until it is heard: a call that waits does not end by itself."""
        run = next(run for run in self._calls_of(intent) if run.token is not None)
        async for _ in self._attempts(f"to cancel run {run.id}"):
            if await self._stop(run.id):
                return

    def _calls_of(self, intent: Intent) -> list[Run]:
        return [run for run in self.scene.simulator.runs.values() if run.payload.get("intent") == intent.id]

    async def _asking(
        self, http: httpx.AsyncClient, what: str, path: str, body: Any, headers: dict[str, str], *, again: bool
    ) -> AsyncIterator[httpx.Response]:
        """The answers to one request that is sent until somebody has heard enough; once, unless it may be repeated."""
        async for _ in self._attempts(f"{what}, {path}" if body is None else f"{what}, {path} with {body},"):
            answer = await self._once(http, what, "GET" if body is None else "POST", path, headers, json=body)
            if answer is not None and answer.status_code != 503:
                yield answer
            if not again:
                return

    async def _attempts(self, what: str) -> AsyncIterator[None]:
        """The moments at which a client asks again, until it has heard enough; that it never does is a finding."""
        deadline = time.monotonic() + _RETRIES_FOR
        while time.monotonic() < deadline:
            yield
            await asyncio.sleep(self.scene.chance.uniform(0.3, 1.0))
        self.book.complain(f"{what} came to nothing for {_RETRIES_FOR} s")

    async def _once(
        self, http: httpx.AsyncClient, what: str, method: str, path: str, headers: dict[str, str], **more: Any
    ) -> httpx.Response | None:
        """An answer; None where the connection broke before there was one."""
        asked, answer = time.monotonic(), None
        with contextlib.suppress(httpx.TransportError):
            answer = await http.request(method, path, headers=headers, **more)
        self.book.note(what, answer, asked)
        return answer

    async def _get(self, what: str, path: str, headers: dict[str, str] | None = None) -> httpx.Response | None:
        return await self._once(self.poller, what, "GET", path, headers or {})

    # What HappyRobot's workflows send beside the story of a call

    async def call_back(self) -> None:
        scene, book, chance = self.scene, self.book, self.scene.chance
        runs = [run for run in scene.simulator.runs.values() if run.payload.get("context_id") in book.contexts]
        if not runs:
            return
        run = chance.choice(runs)
        marker = f"m{book.number}-{len(book.sent)}"
        kind = "note"
        if run.id in book.finals and chance.random() < 0.3:
            kind = chance.choice(["running", "failed", "completed"])  # a lie: it is over, and everybody knows how
        book.sent[marker] = run.id, kind
        copies, insists = 1 if chance.random() < 0.7 else 2, chance.random() < 0.5
        await asyncio.gather(*(self._send(run.id, marker, kind, insists=insists) for _ in range(copies)))

    async def _send(self, run_id: str, marker: str, kind: str, *, insists: bool) -> None:
        """Sends a callback until it is acknowledged, or held where nobody insists."""
        headers, body = self._written(run_id, marker, kind)
        unknown, path = False, "/api/webhooks/happyrobot"
        for pause in chain((0.1, 0.2, 0.4, 0.8), repeat(1.5, 30)):
            named = run_id in self.book.named
            answer = await self._once(self.happyrobot, "a callback", "POST", path, headers, content=json.dumps(body))
            if answer is not None and answer.status_code == 200:
                self.book.acknowledged.add(marker)
                return
            if answer is not None and answer.status_code == 404:
                unknown = True  # nobody has named its run, and perhaps nobody will
                if named:
                    self.book.complain(f"callback {marker} was answered 404, though run {run_id} was named")
                if not insists:
                    self.book.held.add(marker)
                    return
            await asyncio.sleep(pause)
        if not unknown:
            self.book.complain(f"callback {marker} of run {run_id} was not taken for three quarters of a minute")

    def _written(self, run_id: str, marker: str, kind: str) -> tuple[dict[str, str], dict[str, Any]]:
        """A callback's headers and body, in one of the forms in which copies of it are known."""
        headers, data = {"X-API-KEY": HOOK_KEY}, {"marker": marker}
        body: dict[str, Any] = {"run_id": run_id, "event_type": kind, "data": data}
        number = int(marker.partition("-")[2])
        if kind == "note" and number % _LARGE_AFTER == 0:
            data["contents"] = "x" * _LARGE
        match number % 3:
            case 0:
                headers["X-Webhook-Id"] = marker
            case 1:
                body["timestamp"] = f"2026-01-01T00:00:00.{number % 1_000_000:06}Z"
            case _ if kind == "note":
                data["run_id"] = run_id
                body = {"specversion": "1.0", "id": marker, "source": "s", "type": "note", "data": data}
            case _:
                headers["X-Webhook-Id"] = marker
        return headers, body

    # Who looks

    async def look(self) -> None:
        chance, book = self.scene.chance, self.book
        if not (known := book.named):
            return
        run_id = chance.choice(known)
        match next(self._views):
            case 0:
                final = book.finals.get(run_id)
                answer = await self._get("a status", f"/api/happyrobot/status?run_id={run_id}")
                if answer is not None and answer.status_code == 200:
                    book.tell_status(run_id, answer.json()["status"].upper(), final, "status")
            case 1:
                final = book.finals.get(run_id)
                answer = await self._get("a run", f"/api/happyrobot/runs/{run_id}")
                if answer is not None and answer.status_code == 200:
                    book.tell_status(run_id, answer.json()["status"], final, "run")
            case 2:
                context_id, finals = chance.choice(book.contexts), dict(book.finals)
                answer = await self._get("a list", f"/api/happyrobot/runs?context_id={context_id}")
                if answer is not None and answer.status_code == 200:
                    for run in answer.json():
                        book.tell_status(run["runId"], run["status"], finals.get(run["runId"]), "list")
            case _:
                final = book.finals.get(run_id)
                answer = await self._get("a timeline", f"/api/happyrobot/runs/{run_id}/events")
                if answer is not None and answer.status_code == 200:
                    book.tell_status(run_id, answer.json()[-1]["status"], final, "timeline")

    async def follow_a_run(self) -> None:
        """Opens a run's own page, which shows all that has happened to it, and stays until its end."""
        if (known := self.book.named) and len(self.browsers) < _BROWSERS:
            Browser(self, {"run_id": self.scene.chance.choice(known)}, after=0).start()

    async def cancel(self) -> None:
        """Wants any run to be stopped, which most likely is over."""
        if known := self.book.named:
            await self._stop(self.scene.chance.choice(known))

    async def _stop(self, run_id: str) -> bool:
        """Whether that is heard, or the run is over."""
        book, simulator = self.book, self.scene.simulator
        final, path = book.finals.get(run_id), f"/api/happyrobot/runs/{run_id}/cancel"
        asked, faults, heard = time.monotonic(), simulator.runs[run_id].faults, self.scene.stopped.count(run_id)
        book.unwanted.add(run_id)
        answer = await self._once(self.app, "a cancellation", "POST", path, {}, json={})
        if answer is None:
            return False
        unlucky = faults.api_answer or faults.api_missing or book.outages.excuse(_CONFIRMS, asked)
        if answer.status_code == 502 and not unlucky:
            book.complain(f"to cancel run {run_id} was answered {answer.text}, and nothing explains it")
        if answer.status_code in (200, 202, 409):
            book.tell_status(run_id, answer.json()["status"].upper(), final, "cancellation")
        if answer.status_code in (200, 202):
            book.canceled.add(run_id)
            unheard = self.scene.stopped.count(run_id) == heard
            if unheard and not book.outages.excuse(_ASK, asked - _REMEMBERED_FOR):
                book.complain(f"to cancel run {run_id} was acknowledged, and HappyRobot was not asked to")
        return answer.status_code in (200, 202, 409)


@dataclass(frozen=True)
class View:
    """What a browser has seen by a moment."""

    params: dict[str, str]
    manner: str
    after: int | None
    seen: list[Seen]
    ended: bool
    end: str | None


@dataclass(eq=False)
class Browser:
    """Follows events, and comes back whenever its stream ends; what it has been sent must be all there is."""

    cast: Cast
    params: dict[str, str]
    after: int | None
    """Its first stream begins behind this event; None where it begins with whatever comes."""
    manner: str = "reads"
    """How it reads: at once, slowly, or not for a while; or it leaves now and then."""
    seen: list[Seen] = field(default_factory=list)
    streams: int = 0
    ended: bool = False
    """Whether it was told that its run is over."""
    end: str | None = None
    """How, if it was told in a stream."""
    place: str | None = None
    """What it comes back with."""
    task: asyncio.Task[None] | None = None
    _cut: int = 0
    """How often its stream has ended though nothing explains it."""
    _finals: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        self.place = None if self.after is None else str(self.after)
        self.cast.browsers.append(self)
        self.task = asyncio.create_task(self.cast.guarded(self._follow))

    def view(self) -> "View":
        return View(self.params, self.manner, self.after, list(self.seen), ended=self.ended, end=self.end)

    async def _follow(self) -> None:
        chance = self.cast.scene.chance
        while not self.ended:
            url, patience = self.cast.scene.front.url, httpx.Timeout(5, read=_SILENT_FOR)
            # What it has not read is not to wait on its own machine.
            little = httpx.AsyncHTTPTransport(verify=PLAIN, socket_options=[(SOL_SOCKET, SO_RCVBUF, 16_384)])
            noticed_after = _NOTICED_AFTER
            async with Client(base_url=url, timeout=patience, transport=little) as http:
                try:
                    await self._read(http)
                except httpx.ReadTimeout:
                    noticed_after += _SILENT_FOR
                except httpx.TransportError:
                    pass
            if self.manner == "reads":
                self._mind_that_it_ended(time.monotonic() - noticed_after)
            await asyncio.sleep(chance.uniform(0.05, 0.4))

    def _mind_that_it_ended(self, since: float) -> None:
        book = self.cast.book
        self._cut += not self.ended and book.miss_a_stream(since)
        if self._cut == _CUT_OFF:
            book.complain(f"a browser ({self.params}) was cut off {_CUT_OFF} times, and nothing explains it")

    async def _read(self, http: httpx.AsyncClient) -> None:
        chance, asked = self.cast.scene.chance, time.monotonic()
        # As a browser does it: with what `id:` said last, if it has said anything.
        headers = {} if self.place is None else {"Last-Event-ID": self.place}
        async with contextlib.AsyncExitStack() as stack:
            stream = aconnect_sse(http, "GET", "/api/events", params=self.params, headers=headers)
            source = await stack.enter_async_context(stream)
            if source.response.status_code != 200:
                await source.response.aread()
                self.cast.book.note("a stream", source.response, asked)
                self.ended = source.response.status_code == 204
                return
            self.streams += 1
            stalls = self.manner == "stalls"
            async for sse in source.aiter_sse():
                self._notice(sse)
                if self.ended:
                    return
                if self.manner == "slow":
                    await asyncio.sleep(0.05)
                if stalls and chance.random() < 0.05:
                    stalls = False
                    await asyncio.sleep(_STALLS_FOR)
                if self.manner == "leaves" and chance.random() < 0.03:
                    return

    def _notice(self, sse: ServerSentEvent) -> None:
        book = self.cast.book
        self.place = sse.id or self.place
        if sse.event == "end":
            self.ended, self.end = True, sse.json()["status"]
        elif sse.data:
            event = sse.json()
            if sse.id != str(event["id"]):
                book.complain(f"event {event['id']} has the id {sse.id!r}")
            self._take(event)
        elif self.after is None and sse.id:
            self.after = int(sse.id)  # where it has joined

    def _take(self, event: dict[str, Any]) -> None:
        seen = Seen.of(event)
        last = self.seen[-1].id if self.seen else self.after
        if last is None or seen.id <= last:
            self.cast.book.complain(f"a browser was sent event {seen.id} after {last}")
        self.seen.append(seen)
        if seen.context_id in self.cast.book.contexts:
            known = self._finals.get(seen.run_id)
            self.cast.book.tell_status(seen.run_id, seen.status, known, f"stream, event {seen.id}")
            if seen.status in FINAL:
                self._finals[seen.run_id] = seen.status
