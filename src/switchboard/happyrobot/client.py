"""Calls to HappyRobot: the only file that knows its headers, answers and refusals.

HappyRobotError
├── NotSent         the request never left: nothing was started
│   └── PutOff      nor was it when it left, and somebody else may send it again
├── Refused         HappyRobot answered that it did not
├── Unknown         it may have been started; nobody can say
└── NoAnswer        asked about a run, HappyRobot said nothing of use
    ├── NotKnown    it has no such run, or not yet
    ├── NoKey       we have no key to ask with
    ├── KeyRefused  it does not take our key
    ├── NoTurn      it was not asked: its pace is used up
    └── Unreadable  it knows the run, and says more than we can read
"""

import asyncio
import contextlib
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Annotated, Any, cast
from urllib.parse import quote
from urllib.request import getproxies

import httpx
import stamina
import structlog
from fastapi import Depends
from pydantic import SecretStr
from redis.asyncio import Redis
from stamina.instrumentation import RetryDetails, set_on_retry_hooks
from starlette.requests import HTTPConnection

from switchboard import metrics, tracing
from switchboard.clients import Client
from switchboard.happyrobot.addresses import api_root
from switchboard.happyrobot.connections import ConnectsAnew
from switchboard.happyrobot.pace import Pace
from switchboard.happyrobot.payloads import read_json, started_runs
from switchboard.happyrobot.records import (
    Message,
    Recording,
    RunRecord,
    Session,
    in_order,
    read_messages,
    read_recordings,
    read_run,
    read_sessions,
)
from switchboard.settings import Settings

log = structlog.stdlib.get_logger(__name__)

_USER_AGENT = "switchboard"
_CONNECTIONS = 100
_MAX_ANSWER = 10_000_000
_CONNECT_TIMEOUT = 5.0
"""Seconds to wait for a connection, a free one or a new one: until then nothing has been sent."""

_HOOK_HEADERS = {
    "User-Agent": _USER_AGENT,
    "Accept": "*/*",
    "Accept-Encoding": "gzip",
    "Connection": "close",
}
_HOOK_TIMEOUTS = {"timeout": httpx.Timeout(None, connect=_CONNECT_TIMEOUT, pool=_CONNECT_TIMEOUT).as_dict()}

_ATTEMPTS = 4
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
"""Of a trigger, and the seconds between them."""

_LONGEST_WISH = 20.0
"""Seconds of `Retry-After`; a hook that asks for more is not asked again, for the caller waits all the while."""

_WORTH_ANOTHER_TRY = frozenset({429, 502, 503, 504})
_NOT_STARTED = _WORTH_ANOTHER_TRY | frozenset(range(300, 500))
"""Statuses that say that nothing was started. Of any other that is not 2xx nobody can say."""

_NEVER_LEFT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL)
"""What goes wrong before a byte of a request is sent."""

_OF_OUR_OWN = (httpx.PoolTimeout, httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL)
"""What says nothing about HappyRobot."""

_PAGES = 20
"""Pages of a v2 list that are read, at most."""


class HappyRobotError(Exception):
    """HappyRobot did not do what it was asked for; the message says what happened, without secrets."""


class NotSent(HappyRobotError):
    pass


class PutOff(NotSent):
    pass


class Refused(HappyRobotError):
    def __init__(self, status: int, retry_after: float | None = None) -> None:
        super().__init__(f"HappyRobot answered {status}")
        self.status = status
        self.retry_after = retry_after


class Unknown(HappyRobotError):
    pass


class NoAnswer(HappyRobotError):
    pass


class NotKnown(NoAnswer):
    pass


class NoKey(NoAnswer):
    pass


class KeyRefused(NoAnswer):
    pass


class NoTurn(NoAnswer):
    pass


class Unreadable(NoAnswer):
    pass


@dataclass(frozen=True, slots=True)
class Hook:
    """What starts a workflow."""

    url: str
    key: SecretStr | None = None


@dataclass(frozen=True, slots=True)
class Effort:
    """How long somebody can wait, in seconds: for a turn in HappyRobot's pace, and for an answer, the turn included.

    In the background the turn is not included: a job has the time.
    """

    patience: float
    timeout: float


POLL = Effort(patience=1, timeout=2)
"""A browser that asks every few seconds: the database answers if HappyRobot does not."""

READ = Effort(patience=5, timeout=10)
"""Somebody who waits for what only HappyRobot knows."""

BACKGROUND = Effort(patience=30, timeout=10)

_LONGEST_RECORD = 120.0
"""Seconds that a job may take to read a record which comes in many pages, each in its turn."""


def _log_attempt(details: RetryDetails) -> None:
    log.warning("trigger is sent again", error=details.caused_by, after_seconds=round(details.wait_for, 1))


# In place of stamina's own, which would log the name of a block without one.
set_on_retry_hooks([_log_attempt])


@cache
def _certificates() -> ssl.SSLContext:
    """Whom we trust; reading them takes a while, so it is done once."""
    return httpx.create_ssl_context()


def _client(timeout: float | None, keep: int, transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    return Client(
        transport=transport,
        verify=_certificates(),
        timeout=httpx.Timeout(timeout, connect=_CONNECT_TIMEOUT, pool=_CONNECT_TIMEOUT),
        limits=httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=keep),
        headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "gzip"},
    )


def _new_connections() -> httpx.AsyncBaseTransport:
    """What calls hooks; where there is a proxy httpx's own pool, which knows how to ask one, and keeps nothing."""
    if getproxies().keys() & {"http", "https", "all"}:
        return _Pool(_client(None, keep=0))
    return ConnectsAnew(_certificates(), at_once=_CONNECTIONS, largest=_MAX_ANSWER)


class _Pool(httpx.AsyncBaseTransport):
    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._client.send(request, stream=True)

    async def aclose(self) -> None:
        await self._client.aclose()


@lru_cache
def _address(url: str) -> httpx.URL:
    """Of a hook, taken apart once."""
    return httpx.URL(url)


class HappyRobot:
    """Connections to HappyRobot's hooks and its Platform API."""

    def __init__(self, settings: Settings, redis: Redis, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._settings = settings
        key, organisation = settings.happyrobot_api_key, settings.happyrobot_org_id
        account = f"{settings.happyrobot_api_url} {organisation} {key.get_secret_value() if key else ''}"
        self._pace = Pace(redis, account, settings.happyrobot_api_pace)
        self._background = asyncio.Lock()
        # Who waits for a turn, and is waited for.
        self._waiting = 0
        self._key_refused = False
        self.away: bool | None = None
        """Whether the last of this process's requests had no answer, or a 5xx; None before the first."""

        # Apart, so that hooks which hang leave the Platform API its connections. A hook gets a new connection for each
        # trigger: one that was kept may break at the moment of sending, and nobody could say whether it was heard.
        self._hooks = transport or _new_connections()
        self._platform = _client(READ.timeout, keep=20, transport=transport)
        self._v1, self._v2 = (api_root(settings.happyrobot_api_url, version) for version in (1, 2))
        self.reads_v2 = settings.happyrobot_api_url == self._v2 != self._v1

    async def aclose(self) -> None:
        await self._hooks.aclose()
        await self._platform.aclose()

    async def trigger(self, hook: Hook, payload: dict[str, Any]) -> list[str]:
        """Starts a workflow and returns its runs' ids, at least one.

        Sent again only when it certainly started nothing: HappyRobot knows no idempotency key, so a second request may
        be a second phone call. Raises PutOff where it is cancelled between two attempts.
        """
        began = time.monotonic()
        # Outside of what repeats it: it is nearly always the last.
        try:
            return await self._trigger_once(hook, payload)
        except (NotSent, Refused) as error:
            first = error
        between: HappyRobotError | None = first
        try:
            async for attempt in stamina.retry_context(
                on=_certainly_not_started,
                attempts=_ATTEMPTS,
                timeout=max(0.0, self._settings.happyrobot_trigger_timeout - (time.monotonic() - began)),
                wait_initial=_FIRST_PAUSE,
                wait_max=_LONGEST_PAUSE,
                wait_jitter=_FIRST_PAUSE,
            ):
                with attempt:
                    if attempt.num == 1:
                        raise first
                    between = None
                    try:
                        return await self._trigger_once(hook, payload)
                    except (NotSent, Refused) as error:
                        between = error
                        raise
        except asyncio.CancelledError as stopped:
            if between is None:
                raise
            raise PutOff(f"{between}; the service stopped before it was sent again") from stopped
        raise AssertionError("stamina raises what the last attempt raised")

    async def _trigger_once(self, hook: Hook, payload: dict[str, Any]) -> list[str]:
        with _measured("trigger"):
            return await self._trigger(hook, payload)

    async def _trigger(self, hook: Hook, payload: dict[str, Any]) -> list[str]:
        try:
            response, body = await self._post(hook, payload)
        except _NEVER_LEFT as error:
            raise NotSent(f"HappyRobot cannot be reached ({type(error).__name__})") from error
        except (httpx.HTTPError, TimeoutError) as error:
            # Not sent again: HappyRobot may already have dialled.
            raise Unknown(f"HappyRobot did not answer ({type(error).__name__})") from error
        except Exception as error:
            log.exception("a hook was called in a way that nobody foresaw")
            raise Unknown(f"HappyRobot may not have been reached ({type(error).__name__})") from error
        status = response.status_code
        if status in _NOT_STARTED:
            raise Refused(status, _seconds(response.headers.get("retry-after")))
        if not response.is_success:
            raise Unknown(f"HappyRobot answered {status}")
        try:
            run_ids = started_runs(read_json(body))
        except ValueError as error:
            raise Unknown(f"HappyRobot answered {status} with something unreadable") from error
        if not run_ids:
            raise Unknown(f"HappyRobot answered {status} without naming a run")
        return run_ids

    async def _post(self, hook: Hook, body: dict[str, Any], **headers: str) -> tuple[httpx.Response, bytes]:
        """Tells a hook something, once."""
        if hook.key is not None:
            headers["X-API-KEY"] = hook.key.get_secret_value()
        # Made here and not by a client, which would look for cookies, credentials and redirects.
        request = httpx.Request(
            "POST", _address(hook.url), json=body, headers=_HOOK_HEADERS | headers, extensions=_HOOK_TIMEOUTS
        )
        sending = _send(self._hooks.handle_async_request, request)
        return await self._heard(sending, self._settings.happyrobot_trigger_timeout)

    async def _heard(
        self, sending: Awaitable[tuple[httpx.Response, bytes]], seconds: float
    ) -> tuple[httpx.Response, bytes]:
        """Waits for an answer while there is time, and notes whether there is one: it says that HappyRobot is there."""
        try:
            async with asyncio.timeout(seconds):
                response, body = await sending
        except _OF_OUR_OWN:
            raise
        except httpx.DecodingError:
            self._note(away=False)
            raise
        except BaseException:
            # Also where nobody can wait any longer, and it is given up from outside.
            self._note(away=True)
            raise
        self._note(away=response.is_server_error)
        return response, body

    def _note(self, *, away: bool) -> None:
        self.away = away
        metrics.HAPPYROBOT_AWAY.set(away)

    async def decide(self, hook: Hook, decision: dict[str, Any]) -> None:
        """Tells a workflow that waits what was decided. Raises Refused, and NoAnswer where it may not have heard."""
        with _measured("decide"):
            try:
                response, _ = await self._post(hook, decision, **{"Idempotency-Key": str(decision["approval_id"])})
            except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
                raise NoAnswer(f"HappyRobot did not answer ({type(error).__name__})") from error
            if not response.is_success:
                raise Refused(response.status_code)

    # The Platform API. Everything below raises NoAnswer, and takes its turns in HappyRobot's pace.

    @property
    def can_be_asked(self) -> bool:
        return self._settings.happyrobot_api_key is not None

    async def turn(self, effort: Effort) -> None:
        """Waits for a turn in the pace; raises NoTurn when there is none in time."""
        began = time.monotonic()
        found = await (self._turn_in_background(effort) if effort is BACKGROUND else self._turn_in_time(effort))
        metrics.UPSTREAM_TURN_WAIT.observe(time.monotonic() - began)
        metrics.UPSTREAM_TURNS.labels("taken" if found else "none").inc()
        if not found:
            raise NoTurn("HappyRobot's pace is used up")

    async def _turn_in_time(self, effort: Effort) -> bool:
        # Who would wait in vain need not wait: those before take all the turns that come by then.
        if self._waiting >= self._settings.happyrobot_api_pace * effort.patience:
            return False
        self._waiting += 1
        try:
            return await self._pace.turn(effort.patience)
        finally:
            self._waiting -= 1

    async def _turn_in_background(self, effort: Effort) -> bool:
        # One at a time, so that browsers compete with one waiter of each process and not with all of its jobs.
        started = time.monotonic()
        try:
            async with asyncio.timeout(effort.patience), self._background:
                return await self._pace.turn(effort.patience - (time.monotonic() - started))
        except TimeoutError:
            return False

    async def run(self, run_id: str, effort: Effort, *, turn_taken: bool = False) -> RunRecord:
        """What HappyRobot knows about a run. In v2 that is without its sessions; `record` has them."""
        async with _within(effort):
            if not turn_taken:
                await self.turn(effort)
            return await self._run("run", run_id, effort, self._v2 if self.reads_v2 else self._v1)

    async def _run(self, call: str, run_id: str, effort: Effort, root: str) -> RunRecord:
        record = read_run(await self._ask(call, "GET", f"{root}/runs/{_quoted(run_id)}", effort))
        if record is None:
            raise NoAnswer("HappyRobot answered with something unreadable")
        return record

    async def record(self, run_id: str, effort: Effort) -> RunRecord:
        """All that HappyRobot knows about a run.

        From v1, which has it all in one answer, also where v2 is asked for statuses; v2 itself needs a request for each
        page of sessions and messages, and knows of no outputs.
        """
        async with _within(effort, _LONGEST_RECORD):
            await self.turn(effort)
            try:
                return await self._run("record", run_id, effort, self._v1)
            except NoAnswer:
                if not self.reads_v2:
                    raise
            await self.turn(effort)
            record = await self._run("record", run_id, effort, self._v2)
            sessions = [
                session.model_copy(update={"messages": await self._messages(session.id, effort)})
                if session.id
                else session
                for session in await self._sessions(run_id, effort)
            ]
            return record.model_copy(update={"sessions": sessions})

    async def _sessions(self, run_id: str, effort: Effort) -> list[Session]:
        found: list[Session] = []
        for page in range(1, _PAGES + 1):
            await self.turn(effort)
            url = f"{self._v2}/runs/{_quoted(run_id)}/sessions"
            sessions, more = read_sessions(await self._ask("sessions", "GET", url, effort, page=page, sort="asc"))
            found += sessions
            if not more:
                break
        return in_order(found)

    async def _messages(self, session_id: str, effort: Effort) -> list[Message]:
        found: list[Message] = []
        for page in range(1, _PAGES + 1):
            await self.turn(effort)
            url = f"{self._v2}/sessions/{_quoted(session_id)}/messages"
            answer = await self._ask("messages", "GET", url, effort, page=page, page_size=100, sort="asc")
            messages, more = read_messages(answer)
            found += messages
            if not more:
                break
        return in_order(found)

    async def recordings(self, run_id: str, effort: Effort) -> list[Recording]:
        """Links to a run's recordings, which HappyRobot signs anew for each request."""
        async with _within(effort):
            await self.turn(effort)
            url = f"{self._v1}/runs/{_quoted(run_id)}/recordings"
            return read_recordings(await self._ask("recordings", "GET", url, effort))

    async def cancel(self, run_id: str, effort: Effort) -> str | None:
        """Asks HappyRobot to stop a run; returns its word for where the run stands now, if it gives one.

        Raises Refused where HappyRobot says no.
        """
        async with _within(effort):
            await self.turn(effort)
            answer = await self._ask("cancel", "POST", f"{self._v2}/runs/{_quoted(run_id)}/cancel", effort)
        word = answer.get("status") if isinstance(answer, dict) else None
        return word if isinstance(word, str) else None

    async def _ask(self, call: str, method: str, url: str, effort: Effort, **query: str | int) -> Any:
        key = self._settings.happyrobot_api_key
        if key is None:
            raise NoKey("HAPPYROBOT_API_KEY is not set")
        with _measured(call):
            return await self._ask_with(key, method, url, effort, query)

    async def _ask_with(
        self, key: SecretStr, method: str, url: str, effort: Effort, query: Mapping[str, str | int]
    ) -> Any:
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"}
        if self._settings.happyrobot_org_id:
            headers["x-organization-id"] = self._settings.happyrobot_org_id
        # An object even where there is nothing to say: an empty body has been answered 400.
        body: dict[str, Any] | None = {} if method == "POST" else None
        try:
            request = self._platform.build_request(method, url, params=query or None, json=body, headers=headers)
            response, content = await self._heard(
                _send(partial(self._platform.send, stream=True), request), effort.timeout
            )
        except _TooMuch as error:
            raise Unreadable("HappyRobot answered with more than can be read") from error
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            raise NoAnswer(f"HappyRobot did not answer ({type(error).__name__})") from error
        status = response.status_code
        if status == httpx.codes.NOT_FOUND:
            raise NotKnown("HappyRobot has no record of this run")
        refused = status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
        if refused and not self._key_refused:
            log.error("HappyRobot refuses HAPPYROBOT_API_KEY; is it of this region and organisation?", status=status)
        self._key_refused = refused  # said once, until it is good again
        if refused:
            raise KeyRefused(f"HappyRobot answered {status}")
        if method == "POST" and response.is_client_error and status not in _WORTH_ANOTHER_TRY:
            raise Refused(status)
        if not response.is_success:
            raise NoAnswer(f"HappyRobot answered {status}")
        try:
            return read_json(content)
        except ValueError as error:
            raise NoAnswer(f"HappyRobot answered {status} with something unreadable") from error


def _certainly_not_started(error: Exception) -> bool | float:
    """Whether a trigger may be sent again; a number is the pause that HappyRobot asks for."""
    if isinstance(error, NotSent):
        return True
    if not isinstance(error, Refused) or error.status not in _WORTH_ANOTHER_TRY:
        return False
    if error.retry_after is None:
        return True
    return error.retry_after <= _LONGEST_WISH and max(error.retry_after, _FIRST_PAUSE)


def _seconds(retry_after: str | None) -> float | None:
    """A `Retry-After` in seconds. One that names a date is as good as none: clocks differ."""
    return float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdecimal() else None


def _quoted(part: str) -> str:
    return quote(part, safe="")


@contextlib.asynccontextmanager
async def _within(effort: Effort, in_background: float | None = None) -> AsyncIterator[None]:
    """Raises NoAnswer when everything together takes longer than somebody can wait, or a job may."""
    try:
        async with asyncio.timeout(in_background if effort is BACKGROUND else effort.timeout):
            yield
    except TimeoutError as error:
        raise NoAnswer("HappyRobot takes too long to answer") from error


_OUTCOMES: dict[type[Exception], str] = {
    NotSent: "not_sent",
    Refused: "refused",
    Unknown: "unknown",
    NotKnown: "not_known",
    KeyRefused: "key_refused",
    Unreadable: "unreadable",
}


@contextlib.contextmanager
def _measured(call: str) -> Iterator[None]:
    """Counts a request to HappyRobot, and what became of it."""
    began = time.monotonic()
    outcome = "no_answer"  # also where nobody can wait for it any longer
    try:
        yield
        outcome = "answered"
    except HappyRobotError as error:
        outcome = _OUTCOMES.get(type(error), outcome)
        raise
    finally:
        metrics.UPSTREAM_SECONDS.labels(call).observe(time.monotonic() - began)
        metrics.UPSTREAM_REQUESTS.labels(call, outcome).inc()


class _TooMuch(httpx.DecodingError):
    """An answer that is larger than anything of use."""


async def _send(
    send: Callable[[httpx.Request], Awaitable[httpx.Response]], request: httpx.Request
) -> tuple[httpx.Response, bytes]:
    with tracing.call(request.method, request.url.host) as answered:
        response = await send(request)
        answered(response.status_code)
        try:
            body = bytearray()
            async for chunk in cast("httpx.AsyncByteStream", response.stream):  # as it came
                body += chunk
                if len(body) > _MAX_ANSWER:
                    raise _TooMuch("the answer is too large", request=request)
            return response, _unpacked(bytes(body), response.headers.get("content-encoding"), request)
        finally:
            await response.aclose()


def _unpacked(body: bytes, coding: str | None, request: httpx.Request) -> bytes:
    """What a body holds, up to what may be read. Httpx would unpack all: gigabytes, of 500 bytes in two layers."""
    coding = (coding or "").strip().lower()
    if coding in ("", "identity") or not body:
        return body
    if coding != "gzip":
        raise httpx.DecodingError("the answer is packed in a way that was not asked for", request=request)
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        unpacked = unpacker.decompress(body, _MAX_ANSWER + 1)
    except zlib.error as error:
        raise httpx.DecodingError("the answer cannot be unpacked", request=request) from error
    if len(unpacked) > _MAX_ANSWER:
        raise _TooMuch("the answer is too large", request=request)
    if not unpacker.eof:
        raise httpx.DecodingError("the answer is cut off", request=request)
    return unpacked


async def reach(hook: Hook) -> None:
    """Connects to a hook's host, encrypted if its address is, and says nothing: a request would be a phone call.

    Raises NotSent.
    """
    url = httpx.URL(hook.url)
    encrypted = url.scheme == "https"
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT):
            context = _certificates() if encrypted else None
            _, writer = await asyncio.open_connection(url.host, url.port or (443 if encrypted else 80), ssl=context)
    except (OSError, UnicodeError) as error:
        raise NotSent(f"HappyRobot cannot be reached ({type(error).__name__})") from error
    writer.transport.abort()


async def _happyrobot(connection: HTTPConnection) -> HappyRobot:
    happyrobot: HappyRobot = connection.state.happyrobot
    return happyrobot


CurrentHappyRobot = Annotated[HappyRobot, Depends(_happyrobot)]
