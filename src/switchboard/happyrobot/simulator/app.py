"""The simulator itself: it takes triggers, tells stories and sends callbacks."""

import asyncio
import json
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from switchboard.clients import Client
from switchboard.happyrobot.simulator.api import ApiRequest, PlatformApi
from switchboard.happyrobot.simulator.bodies import is_key, json_object, refusal
from switchboard.happyrobot.simulator.decisions import Decision, Decisions
from switchboard.happyrobot.simulator.faults import Faults
from switchboard.happyrobot.simulator.hook import HOOKS, Broken, Call, Wishes, queued
from switchboard.happyrobot.simulator.records import Shape, session_changed
from switchboard.happyrobot.simulator.run import Run
from switchboard.happyrobot.simulator.story import PENDING_APPROVAL, tell

log = logging.getLogger(__name__)

MOST_AT_ONCE = 32  # callbacks


class Simulator:
    """HappyRobot, as far as a caller can tell. `app` is the ASGI app, the rest is for looking and meddling.

    `faults` may be replaced at any time; a run keeps those that stood when it was triggered.
    """

    def __init__(
        self,
        *,
        hook_key: str | None = None,
        callback_key: str | None = None,
        api_key: str | None = None,
        pace: float = 0.4,
        faults: Faults = Faults(),  # noqa: B008 -- frozen
        cloud_events: bool = False,
        approval: bool = False,
        shape: Shape = "nested",
        backoff: Sequence[float] = (0.05, 0.15, 0.45),
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.hook_key = hook_key
        self.callback_key = callback_key or hook_key
        self.pace = pace  # seconds before each step of a story
        self.faults = faults
        self.cloud_events = cloud_events  # tell of sessions in this form, too
        self.approval = approval  # ask for one half-way
        self.backoff = backoff  # seconds before each further attempt at a callback
        self.calls: list[Call] = []
        self.runs: dict[str, Run] = {}
        self._closing = asyncio.Event()
        self._api = PlatformApi(self.runs, api_key=api_key, shape=shape, closing=self._closing)
        self._decisions = Decisions(self.runs, key=hook_key)
        self._client = Client(
            transport=transport,
            timeout=10,
            limits=httpx.Limits(max_connections=MOST_AT_ONCE, max_keepalive_connections=MOST_AT_ONCE),
            trust_env=False,  # a proxy would not find localhost
        )
        # Hundreds of runs at once take turns here: httpx's own queue for connections gets slow when it is long.
        self._turns = asyncio.Semaphore(MOST_AT_ONCE)
        self._stories: set[asyncio.Task[None]] = set()
        self.app = Starlette(
            routes=[
                *(Route(path, partial(self._hook, stage), methods=["POST"]) for path, stage in HOOKS.items()),
                *self._api.routes,
                self._decisions.route,
                Route("/simulator/calls", self._show_calls),
                Route("/simulator/decisions", self._show_decisions),
                Route("/simulator/requests", self._show_requests),
                Route("/simulator/faults", self._set_faults, methods=["PUT"]),
                Route("/simulator/healthz", healthz),
            ],
            exception_handlers={HTTPException: refusal},
            lifespan=self._lifespan,
        )

    @property
    def requests(self) -> list[ApiRequest]:
        """Every request to the Platform API, in order."""
        return self._api.requests

    @property
    def decisions(self) -> list[Decision]:
        """Every request to an address that takes decisions, in order."""
        return self._decisions.received

    async def settled(self) -> None:
        """Waits until every story is over and its callbacks are answered or given up."""
        while self._stories:
            await asyncio.wait(self._stories)

    async def aclose(self) -> None:
        self._closing.set()
        for story in self._stories:
            story.cancel()
        await self.settled()
        await self._client.aclose()

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        await self.aclose()

    # Triggers

    async def _hook(self, environment: str, request: Request) -> Response:
        call = Call.of(request, environment)
        self.calls.append(call)
        try:
            return await self._trigger(call, request)
        except HTTPException as refused:
            call.status = refused.status_code
            raise

    async def _trigger(self, call: Call, request: Request) -> Response:
        if not is_key(request.headers.get("x-api-key"), self.hook_key):
            raise HTTPException(401, "invalid X-API-KEY")
        call.payload = await json_object(request)
        wishes = Wishes.of(call.payload, self.faults, self.cloud_events, self.approval)
        faults = wishes.faults
        if faults.answer is not None and faults.answer.isdecimal():
            raise HTTPException(int(faults.answer), "the simulator was told to answer so")
        if faults.answer == "no_runs":
            call.status = 200
            return JSONResponse({"status": f"queued 0 parallel sequences, {wishes.runs} failed"})

        runs = [
            Run(
                call.slug,
                call.environment,
                call.payload,
                wishes.outcome,
                faults,
                base_url=str(request.base_url).rstrip("/"),
                cloud_events=wishes.cloud_events,
                approval=wishes.approval,
            )
            for _ in range(wishes.runs)
        ]
        self.runs |= {run.id: run for run in runs}
        call.run_ids = [run.id for run in runs]
        if faults.call_back_first or faults.hang or faults.disconnect:
            await self._start(runs)
        if faults.call_back_first:
            for run in runs:
                await run.called_back.wait()
        if faults.hang:
            return await self._hold(request)
        if faults.disconnect:
            return Broken()
        call.status = 200
        # Unless they have already, the stories begin once the answer is out.
        return queued(faults, call.run_ids, BackgroundTask(self._start, runs))

    async def _hold(self, request: Request) -> Response:
        """Keeps the caller waiting until it hangs up or the simulator closes."""
        await first_of(self._closing.wait(), request.receive())
        return JSONResponse({"message": "the simulator is closing"}, 503)

    # Stories

    async def _start(self, runs: list[Run]) -> None:
        for run in runs:
            if not run.started:
                run.started = True
                story = asyncio.create_task(self._tell(run))
                self._stories.add(story)
                story.add_done_callback(self._stories.discard)

    async def _tell(self, run: Run) -> None:
        try:
            for step in tell(run.payload, run.outcome, run.approval):
                with suppress(TimeoutError):
                    await asyncio.wait_for(run.canceled.wait(), self.pace)
                if run.over:
                    break
                event = run.advance(step)
                if step.event_type == PENDING_APPROVAL:
                    await self._ask(run, event)
                    continue
                if run.cloud_events and step.event_type != "log":
                    await self._send(run, session_changed(run), "application/cloudevents+json")
                if not run.faults.reorder:
                    await self._call_back(run, event)
            if run.faults.reorder:
                for event in shuffled([event for event in run.events if event["event_type"] != PENDING_APPROVAL]):
                    await self._call_back(run, event)
            elif run.canceled.is_set():
                if run.cloud_events:
                    await self._send(run, session_changed(run), "application/cloudevents+json")
                await self._call_back(run, run.events[-1])
        finally:
            run.called_back.set()

    async def _ask(self, run: Run, event: dict[str, Any]) -> None:
        """Waits for a decision or the run's end; whoever is to decide hears of it at once, also with `reorder`."""
        await self._call_back(run, event)
        run.called_back.set()  # if none was tried by now, none will be before the decision
        await first_of(run.decided.wait(), run.canceled.wait())

    # Callbacks

    async def _call_back(self, run: Run, event: dict[str, Any]) -> None:
        final = run.over and event is run.events[-1]
        if not (final and run.faults.drop_final):
            await self._send(run, event, "application/json")

    async def _send(self, run: Run, event: dict[str, Any], content_type: str) -> None:
        if run.callback_url is None or run.faults.silent:
            return
        await asyncio.sleep(run.faults.delay)
        copies = 2 if run.faults.duplicate else 1
        await asyncio.gather(*(self._deliver(run, run.callback_url, event, content_type) for _ in range(copies)))

    async def _deliver(self, run: Run, url: str, event: dict[str, Any], content_type: str) -> None:
        """Tries again whatever went wrong.

        After a 404 too: the receiver may not have heard of the run yet. One that kept the event all the same
        gets the same body twice.
        """
        headers = {"content-type": content_type}
        if self.callback_key is not None:
            headers["x-api-key"] = self.callback_key
        for pause in (*self.backoff, None):
            try:
                async with self._turns:
                    response = await self._client.post(url, content=json.dumps(event), headers=headers)
                trouble = None if response.is_success else f"status {response.status_code}"
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                trouble = type(error).__name__
            run.called_back.set()
            if trouble is None:
                return
            if pause is not None:
                await asyncio.sleep(pause)
        kind = event.get("event_type") or event["type"]
        log.warning("gave up the callback %s of run %s: %s", kind, run.id, trouble)

    # For other processes

    async def _show_calls(self, _request: Request) -> Response:
        return JSONResponse([call.shown() for call in self.calls])

    async def _show_decisions(self, _request: Request) -> Response:
        return JSONResponse([decision.shown() for decision in self.decisions])

    async def _show_requests(self, _request: Request) -> Response:
        shown = {
            "total": len(self.requests),
            "by_path": Counter(request.path for request in self.requests),
            "by_run": Counter(request.run_id for request in self.requests if request.run_id is not None),
            "requests": [asdict(request) | {"at": request.at.isoformat()} for request in self.requests],
        }
        return JSONResponse(shown)

    async def _set_faults(self, request: Request) -> Response:
        body = await json_object(request)
        try:
            self.faults = Faults.read(body.get("faults", body))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return JSONResponse(asdict(self.faults))


async def healthz(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def create_app(**options: Any) -> Starlette:
    """The ASGI app of a new simulator; takes what `Simulator` takes."""
    return Simulator(**options).app


async def first_of(*awaitables: Awaitable[object]) -> None:
    """Waits until one of them has happened, and for the others no longer."""
    waits = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def shuffled(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In another order, the last one not last."""
    order = events.copy()
    secrets.SystemRandom().shuffle(order)
    if order[-1] is events[-1]:
        order[0], order[-1] = order[-1], order[0]
    return order
