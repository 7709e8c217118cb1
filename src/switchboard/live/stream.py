"""Server-sent events: replay from PostgreSQL, then follow, without a gap between the two."""

import asyncio
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing
from functools import partial
from typing import Annotated, Protocol

import structlog
from fastapi import APIRouter, Header, Query, Request
from pydantic_core import to_json
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.responses import Response
from starlette.types import Receive, Send
from starlette.types import Scope as ASGIScope

from switchboard import metrics
from switchboard.access.callers import Reader
from switchboard.access.limits import address_of
from switchboard.access.seats import CurrentSeats
from switchboard.bodies import Id
from switchboard.database import Db
from switchboard.errors import BadRequest, Forbidden, NotFound, described
from switchboard.events import Scope, read_events
from switchboard.live.followers import Follower
from switchboard.live.hub import CurrentHub, Hub
from switchboard.live.messages import Frame, joined
from switchboard.tables import FINAL, RunStatus, agent_runs

log = structlog.stdlib.get_logger(__name__)

router = APIRouter(tags=["events"])

_RETRY = (1_000, 4_000)
"""Milliseconds after which a browser reconnects, drawn for each: all of them come back after a restart."""

_STILL_HERE = b": still here\n"
"""No blank line, at which some readers would see an event without anything in it."""

_PAGE = 500
"""Events read at once for a replay."""

_RESUMED_AT = re.compile(r"(\d{1,18})(\.end)?")


_SERVER_SENT_EVENT = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "event": {"enum": ["end", "renew"]},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {
                "anyOf": [
                    {"$ref": "#/components/schemas/EventOut"},
                    {"type": "object", "required": ["run_id", "status"], "title": "End"},
                    {"type": "object", "required": ["error"], "title": "Renew"},
                ]
            },
        },
    },
}


@router.get(
    "/api/events",
    summary="Follow events live",
    response_class=EventSourceResponse,
    responses={
        200: {
            "description": "A stream of server-sent events without a name: `id:` is the event's, `data:` the event as "
            "`GET /api/happyrobot/runs/{run_id}/events` lists it. The stream of one run closes with an event named "
            "`end`, one whose token has expired with an event named `renew`.",
            "content": {"text/event-stream": {"schema": _SERVER_SENT_EVENT}},
        },
        204: {"description": "The run is over and the reader has seen its `end`: no need to come back."},
        **described(400, 401, 403, 404, 429),
    },
)
async def follow_events(
    request: Request,
    db: Db,
    hub: CurrentHub,
    seats: CurrentSeats,
    caller: Reader,
    context_id: Annotated[Id | None, Query(description="Only events of this context.")] = None,
    run_id: Annotated[Id | None, Query(description="Only events of this run; ends when the run is over.")] = None,
    last_event_id: Annotated[
        str | None, Query(description="Resume after this event; 0 replays everything. `Last-Event-ID` wins over it.")
    ] = None,
    resume_header: Annotated[
        str | None, Header(alias="Last-Event-ID", description="Sent by browsers that reconnect.")
    ] = None,
) -> Response:
    """Events of a context, of a run, or of everything that may be seen, as they are committed.

    A stream that is resumed misses nothing and repeats nothing. It ends with the token that opened it: get another one,
    and resume.
    """
    allowed = caller.sight.contexts
    if context_id is not None and allowed is not None and context_id not in allowed:
        raise Forbidden("Not allowed for this context")
    after, seen_end = _resumed_at(resume_header if resume_header is not None else last_event_id)
    wanted = Scope(caller.sight, context_id, run_id)
    if run_id is not None and await _status(db, wanted) in FINAL and seen_end:
        # The one answer that stops an EventSource from reconnecting.
        return Response(status_code=204)
    return EventStream(db, hub, wanted, after, partial(seats.taken, caller, address_of(request)))


def _resumed_at(text: str | None) -> tuple[int | None, bool]:
    """The id after which to resume, and whether the reader has been told that the run is over."""
    if text is None or text == "":
        return None, False
    match = _RESUMED_AT.fullmatch(text)
    if match is None:
        raise BadRequest("Last-Event-ID must be the id of an event")
    return int(match[1]), match[2] is not None


async def _status(db: AsyncEngine, scope: Scope) -> RunStatus:
    """Where the run of a scope stands. Raises NotFound, also for one that is not to be seen."""
    query = select(agent_runs.c.status).where(agent_runs.c.run_id == scope.run_id)
    async with db.connect() as conn:
        status = await conn.scalar(scope.sight.narrow(query, agent_runs.c.context_id, agent_runs.c.workflow_id))
    if status is None:
        raise NotFound("Run not found")
    return RunStatus(status)


PassOn = Callable[[bytes], Awaitable[None]]


class Cycle(Protocol):
    """Of a request that `serve` answers, what can send more of a stream that has begun."""

    async def pass_on(self, part: bytes) -> None: ...

    def pass_on_now(self, part: bytes) -> bool: ...


TakeSeat = Callable[[Callable[[], None]], AbstractContextManager[None]]
"""Lets the caller have a stream, and is told how to end it."""


class EventStream(EventSourceResponse):
    """The response. It joins the hub before its headers are sent: whoever has seen them misses nothing.

    Two tasks and no timer, where sse-starlette's own way takes five tasks, and a timer for each chunk: what these are
    for, the hub does for all streams together. It says goodbye, it reminds them when they should say something, and it
    notices browsers that do not read.
    """

    def __init__(self, db: AsyncEngine, hub: Hub, wanted: Scope, after: int | None, take_seat: TakeSeat) -> None:
        self._db = db
        self._hub = hub
        self._wanted = wanted
        self._after = after
        self._take_seat = take_seat
        super().__init__(iter(()), headers={"Cache-Control": "no-cache, no-transform"})

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        # Where it is served by `serve`: what lies between has nothing to say about the parts of a stream.
        cycle: Cycle | None = scope.get("state", {}).get("cycle")
        try:
            async with self._hub.following(self._wanted) as follower:
                with self._take_seat(follower.dismiss), metrics.OPEN_STREAMS.track_inprogress():
                    async with asyncio.TaskGroup() as group:
                        # A task of its own: in this one, all that lies above would be woken with it for every event.
                        sending = group.create_task(self._send_to(follower, send, cycle))
                        follower.when_stuck = sending.cancel
                        await self._listen_for_disconnect(receive)
                        sending.cancel()
        except* SendTimeoutError:
            log.info("browser that did not read was sent away")

    async def _send_to(self, follower: Follower, send: Send, cycle: Cycle | None) -> None:
        async def send_part(part: bytes) -> None:
            await send({"type": "http.response.body", "body": part, "more_body": True})

        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(follow(self._db, self._hub, follower, self._after)) as chunks:
                send_on: PassOn = send_part
                async for chunk in chunks:
                    follower.unheard = 0
                    await send_on(chunk)
                    follower.unheard = None
                    if cycle is not None:  # the head has left with the first
                        send_on = cycle.pass_on
                        # The end of a run is the end of its stream, and more than one event.
                        follower.sink = cycle.pass_on_now if self._wanted.run_id is None else None
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if follower.stuck:
                raise SendTimeoutError from None
            raise


async def follow(db: AsyncEngine, hub: Hub, follower: Follower, after: int | None) -> AsyncGenerator[bytes, None]:
    """What a reader is sent: a replay of what came after `after`, if it is given, then what the follower gets."""
    yield _greeting(follower.joined_after if after is None else None)
    run_id, cut = follower.scope.run_id, False
    try:
        # Asked after joining: if the run ends from here on, its last event comes through the follower.
        status = await _status(db, follower.scope) if run_id is not None else None
        over = status in FINAL
        if after is not None or over:
            follower.sent = after = await _within_this_life(hub, follower, after)
            # The hub may lag behind a run that is over, and nobody will follow it.
            async for page in _replay(db, follower.scope, after, None if over else follower.joined_after):
                follower.sent = page[-1].event.id
                yield joined(page)
                if cut := follower.dismissed:
                    break  # it resumes there, and must not be sent what came later
        while not (over or cut) and (unread := await follower.read()) is not None:
            if page := _later(unread, follower.sent):
                follower.sent = page[-1].event.id
                status = page[-1].event.status
                over = run_id is not None and status in FINAL
                metrics.note_sent(page[0].written_at)
                yield joined(page)
            elif not unread:
                yield _STILL_HERE
    except (SQLAlchemyError, OSError) as error:
        # The browser reconnects and resumes; by then PostgreSQL may be back.
        log.warning("stream ended; PostgreSQL is away", error=error)
        return
    for word in _last_words(follower, status if over and not cut else None):
        yield word


def _greeting(here: int | None) -> bytes:
    retry = random.randint(*_RETRY)  # noqa: S311  # spreads load, guards nothing
    # A browser that has seen no event yet comes back to where it began, and not to where things stand by then.
    place = b"" if here is None else b"id: %d\n" % here
    return b": connected\nretry: %d\n%b\n" % (retry, place)


def _last_words(follower: Follower, outcome: RunStatus | None) -> Iterator[bytes]:
    """Why a stream ends: its run has, with this outcome, or its reader's time, or the service is about to."""
    if outcome is not None:
        end = to_json({"run_id": follower.scope.run_id, "status": outcome})
        yield b"id: %d.end\nevent: end\ndata: %b\n\n" % (follower.sent, end)
    elif follower.dismissed:
        yield b"id: %d\nevent: renew\ndata: %b\n\n" % (follower.sent, to_json({"error": "Access has ended"}))
    elif not follower.lagging:
        yield b": goodbye, resume elsewhere\n\n"


def _later(frames: Sequence[Frame], sent: int) -> Sequence[Frame]:
    """Those of events that were not sent yet. Most often all of them."""
    return frames if frames and frames[0].event.id > sent else [frame for frame in frames if frame.event.id > sent]


async def _within_this_life(hub: Hub, follower: Follower, after: int | None) -> int:
    """Where to resume: from the start if the id is of a database that is no more, and would mute the stream."""
    if after is None:
        return follower.joined_after
    if after <= follower.joined_after or after <= await hub.highest():
        return after
    return 0


async def _replay(db: AsyncEngine, scope: Scope, after: int, up_to: int | None) -> AsyncIterator[Sequence[Frame]]:
    limit = _PAGE
    while True:
        async with db.connect() as conn:
            page = await read_events(conn, scope, after=after, up_to=up_to, limit=limit)
        if page.events:
            after = page.events[-1].id
            yield [Frame.of(event) for event in page.events]
        if not page.more:
            return
        limit = page.next_limit(_PAGE)
