"""Ways to break Switchboard that nobody would notice on a good day; a campaign has to notice each of them."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard import metrics, worker
from switchboard.access import webhooks
from switchboard.deliveries import signing
from switchboard.deliveries.outbox import Report, post
from switchboard.errors import PostgresAway
from switchboard.events import Event, NewEvent
from switchboard.executions import ends_of
from switchboard.happyrobot import client
from switchboard.live import followers
from switchboard.live.announcer import Announcer
from switchboard.live.followers import Follower
from switchboard.live.hub import Hub
from switchboard.live.messages import Frame
from switchboard.runs.appending import append, plain
from switchboard.runs.intake import Intake
from switchboard.runs.sorting import Recorded
from switchboard.runs.status import Standing
from switchboard.settings import Settings
from switchboard.tables import RunStatus, WebhookEvent
from switchboard.watch import Watch


def _put(module: str, name: str, make: Callable[[Any], Any]) -> None:
    """Puts what is made of a module's function in its place."""
    found = import_module(f"switchboard.{module}")
    setattr(found, name, make(getattr(found, name)))


def _copies_count() -> None:
    """Copies of a callback are no copies."""

    def without_a_key(genuine: Callable[..., NewEvent]) -> Callable[..., NewEvent]:
        return lambda *arguments: replace(genuine(*arguments), dedupe_key=None)

    _put("callbacks", "read_callback", without_a_key)


def _answers_first() -> None:
    """A callback is answered, and browsers are told, before its event is committed."""

    async def append_late(self: Intake, batch: Sequence[Any]) -> Sequence[Any]:
        short = plain([one.news for one in batch])
        if not short:
            return batch
        line = self._line
        await line._connect()
        try:
            await line._driver.execute("BEGIN")
            outcomes = await append(line, list(short.values()), reconcile_after=self._reconcile_after)
            done = {place: outcome for place, outcome in zip(short, outcomes, strict=True) if outcome is not None}
            for place, outcome in done.items():
                batch[place].answer(outcome)
            self._announcer.announce([outcome.event for outcome in done.values() if isinstance(outcome, Recorded)])
            await asyncio.sleep(0.02)
            await line._driver.execute("COMMIT")
        except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise PostgresAway(str(error)) from error
        return [one for place, one in enumerate(batch) if place not in done]

    Intake._append = append_late  # type: ignore[method-assign]


def _resumes_late() -> None:
    """A stream that is resumed leaves one event out."""

    def one_later(genuine: Callable[[str | None], tuple[int | None, bool]]) -> Any:
        def resumed_at(text: str | None) -> tuple[int | None, bool]:
            after, seen_end = genuine(text)
            return (after + 1 if after else after), seen_end

        return resumed_at

    _put("live.stream", "_resumed_at", one_later)


def _calls_again() -> None:
    """A trigger that was not answered is sent again."""
    genuine = client.HappyRobot._trigger

    async def trigger(self: client.HappyRobot, hook: Any, payload: dict[str, Any]) -> list[str]:
        try:
            return await genuine(self, hook, payload)
        except client.Unknown as error:
            raise client.NotSent(str(error)) from error

    client.HappyRobot._trigger = trigger  # type: ignore[method-assign]


def _remembers_webhooks() -> None:
    """What customers are to be told is kept in memory until it is told."""
    kept: set[asyncio.Task[None]] = set()
    body_of = import_module("switchboard.deliveries.outbox")._body

    async def send(endpoint: webhooks.Endpoint, report: Report, body: bytes) -> None:
        secrets = [secret.get_secret_value() for secret in endpoint.secrets]
        about: Any = {"event": report.event, "execution_id": report.execution.id, "delivery_id": uuid4()}
        headers = signing.headers(secrets, timestamp=int(time.time()), body=body, **about)
        async with httpx.AsyncClient() as http:
            for pause in (1, 5, 15):
                await asyncio.sleep(0.2)  # until it is committed
                try:
                    await http.post(endpoint.url, content=body, headers=headers)
                    metrics.DELIVERY_ATTEMPTS.labels("delivered").inc()
                except httpx.HTTPError:
                    await asyncio.sleep(pause)
                else:
                    return

    async def post(conn: AsyncConnection, reports: Sequence[Report]) -> list[Any]:
        owned = [report for report in reports if report.execution.key_id is not None]
        events = await webhooks.wanted(conn, {report.execution.key_id for report in owned})
        ends = await ends_of(conn, {report.execution.id for report in owned})
        for report in owned:
            endpoint = await webhooks.endpoint_of(conn, Settings(), report.execution.key_id)
            if endpoint is not None and report.event in events.get(report.execution.key_id, ()):
                body = body_of(report, ends.get(report.execution.id, []))
                task = asyncio.create_task(send(endpoint, report, body))
                kept.add(task)
                task.add_done_callback(kept.discard)
        return []

    _put("runs.settling", "post", lambda _: post)


def _goes_back() -> None:
    """What HappyRobot says last counts, also of a run that is over."""

    def advance(current: Standing, word: RunStatus | None) -> Standing:
        return current if word is None else Standing(word)

    _put("runs.sorting", "advance", lambda _: advance)


def _loses_contents() -> None:
    """What logs say is lost."""

    def emptied(genuine: Callable[..., NewEvent]) -> Callable[..., NewEvent]:
        def read_callback(*arguments: Any) -> NewEvent:
            event = genuine(*arguments)
            return replace(event, data={}) if event.event_type == "log" else event

        return read_callback

    _put("callbacks", "read_callback", emptied)


def _names_wrongly() -> None:
    """A browser that comes back resumes with the id of another event."""
    genuine = Frame.__init__

    def init(self: Frame, event: Event, line: bytes, written_at: float | None = None) -> None:
        genuine(self, event, line, written_at)
        self.sse = b"id: %d\ndata: %b\n\n" % (event.id + 1, line)

    Frame.__init__ = init  # type: ignore[method-assign]


def _goes_on_behind_gaps() -> None:
    """What another process has written, and Redis has lost, is left out of the streams."""

    async def skip(self: Hub) -> None:
        frames = [self._early[number] for number in sorted(self._early) if number > (self._cursor or 0)]
        self._early.clear()
        self._mind_the_gap(None)
        self._show(frames)

    Hub._catch_up = skip  # type: ignore[method-assign]


def _signs_wrongly() -> None:
    """Webhooks are signed with something else."""

    def signed(genuine: Callable[..., dict[str, str]]) -> Any:
        return lambda secrets, **more: genuine([f"not {secret}" for secret in secrets], **more)

    _put("deliveries.delivering", "headers", signed)


def _turns_decisions() -> None:
    """Whoever approves has rejected."""
    _put("runs.decisions", "_body", lambda genuine: lambda approval: genuine(approval) | {"decision": "rejected"})


def _forgets_what_is_held() -> None:
    """What came too early is answered as if it was held, and is not."""

    async def hold(*_: object) -> None:
        pass

    _put("runs.ingest", "_hold", lambda _: hold)


def _stops_nobody() -> None:
    """Whoever wants a call to be stopped is answered as if HappyRobot had been asked to."""

    async def cancel(*_: object) -> None:
        pass

    client.HappyRobot.cancel = cancel  # type: ignore[method-assign,assignment]


def _stops_others() -> None:
    """Whoever only asks how a call stands stops it."""
    genuine = client.HappyRobot._run

    async def run(self: client.HappyRobot, call: str, run_id: str, effort: client.Effort, root: str) -> Any:
        with contextlib.suppress(client.NoAnswer, client.Refused):
            await self.cancel(run_id, client.READ)
        return await genuine(self, call, run_id, effort, root)

    client.HappyRobot._run = run  # type: ignore[method-assign]


def _tells_of_calls_that_were_not_placed() -> None:
    """Customers are told that executions have begun that have failed before."""

    def untrue(genuine: Callable[..., Any]) -> Any:
        async def failed(conn: AsyncConnection, ended: Sequence[Any]) -> list[Any]:
            begun = await post(conn, [Report(each, WebhookEvent.STARTED) for each in ended])
            return [*begun, *await genuine(conn, ended)]

        return failed

    _put("runs.settling", "failed", untrue)


def _ends_without_postgresql() -> None:
    """A process ends where PostgreSQL is away; somebody will start it again."""
    Watch._has_gone = lambda *_: os._exit(3)  # type: ignore[method-assign]


def _works_no_more() -> None:
    """A worker that PostgreSQL has left stays idle."""
    has_gone, answered = Watch._has_gone, worker._Driver._answered
    left = asyncio.Event()

    def noticed(self: Watch, error: BaseException) -> None:
        left.set()
        has_gone(self, error)

    async def idle(self: Any, ask: Any) -> Any:
        while left.is_set():  # noqa: ASYNC110  # for ever
            await asyncio.sleep(1)
        return await answered(self, ask)

    Watch._has_gone = noticed  # type: ignore[method-assign]
    worker._Driver._answered = idle  # type: ignore[method-assign]


def _forgets_who_is_behind() -> None:
    """What a browser that is far behind is to be sent besides is left out."""

    genuine = Follower.push

    def push(self: Follower, frames: Sequence[Frame], part: bytes) -> bool:
        has_room = len(self._unread) + len(frames) <= followers.MAX_UNREAD
        return has_room and genuine(self, frames, part)

    Follower.push = push  # type: ignore[method-assign]


def _needs_redis() -> None:
    """Whoever calls back is told to come again once news could not be published."""
    publish, away = Announcer._publish, asyncio.Event()

    async def published(self: Announcer) -> None:
        await publish(self)
        (away.clear if self._healthy else away.set)()

    def read(genuine: Callable[..., NewEvent]) -> Callable[..., NewEvent]:
        def read_it(*arguments: Any) -> NewEvent:
            if away.is_set():
                raise PostgresAway("not now")
            return genuine(*arguments)

        return read_it

    Announcer._publish = published  # type: ignore[method-assign]
    _put("callbacks", "read_callback", read)


def _grows() -> None:
    """Something of each callback stays."""
    kept = []

    def read(genuine: Callable[..., NewEvent]) -> Callable[..., NewEvent]:
        def read_it(*arguments: Any) -> NewEvent:
            kept.append(b"x" * 2_000_000)
            return genuine(*arguments)

        return read_it

    _put("callbacks", "read_callback", read)


VARIANTS: dict[str, Callable[[], None]] = {
    "copies count": _copies_count,
    "answers first": _answers_first,
    "resumes late": _resumes_late,
    "calls again": _calls_again,
    "remembers webhooks": _remembers_webhooks,
    "goes back": _goes_back,
    "loses contents": _loses_contents,
    "names wrongly": _names_wrongly,
    "goes on behind gaps": _goes_on_behind_gaps,
    "signs wrongly": _signs_wrongly,
    "turns decisions": _turns_decisions,
    "forgets what is held": _forgets_what_is_held,
    "stops nobody": _stops_nobody,
    "stops others": _stops_others,
    "tells of calls that were not placed": _tells_of_calls_that_were_not_placed,
    "ends without PostgreSQL": _ends_without_postgresql,
    "works no more": _works_no_more,
    "forgets who is behind": _forgets_who_is_behind,
    "needs Redis": _needs_redis,
    "grows": _grows,
}
