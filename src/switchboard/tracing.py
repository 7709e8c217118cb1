"""Traces of requests, jobs and what they ask others for, sent where OpenTelemetry's environment variables say.

A span says no more than a line of the log might. So it is made here and not by a library: those for httpx, SQLAlchemy
and FastAPI put whole addresses and the messages of exceptions into theirs.
"""

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import structlog
from opentelemetry import trace
from opentelemetry.context import Context, attach, create_key, detach, get_value, set_value
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from switchboard import __version__
from switchboard.edge import REQUEST_ID
from switchboard.logs.redaction import redactor, secrets_of
from switchboard.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = structlog.stdlib.get_logger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

_PATIENCE = 2.0
"""Seconds that a process which stops waits for its last spans to be taken."""

_NOT_TRACED = frozenset({"/healthz", "/readyz", "/metrics", "/api/events"})
"""Paths that are asked all the time, and the stream, which lasts for hours."""

_LONGEST_STATEMENT = 2_000
"""Characters of SQL that a span carries: a statement that writes many rows names each of their columns."""

_CLIENT_ERROR, _SERVER_ERROR = 400, 500

_KEY = create_key("switchboard")


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator["Tracing | None"]:
    """Sends spans until the block ends, and then what is left of them; None where nobody has asked for them.

    Each process has its own: what sends them is a thread, which no fork would take along.
    """
    provider = _provider()
    if provider is None:
        yield None
        return
    try:
        yield Tracing(provider.get_tracer("switchboard", __version__), redactor(secrets_of(settings)))
    finally:
        with suppress(TimeoutError):
            await asyncio.wait_for(_beside(provider.shutdown), _PATIENCE)


async def _beside(work: Callable[[], None]) -> None:
    """Does something in a thread that dies with the process, and is not waited for when somebody leaves this."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        work()
        with suppress(RuntimeError):  # the loop is closed: nobody has waited
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, daemon=True).start()
    await done.wait()


def wanted(environ: Mapping[str, str]) -> frozenset[str]:
    """The exporters that the variables ask for. An empty variable counts as one that is not set."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return frozenset()
    usual = "otlp" if any(environ.get(name) for name in _ENDPOINTS) else "none"
    named = environ.get("OTEL_TRACES_EXPORTER") or usual
    return frozenset(each.strip().lower() for each in named.split(",")) - {"", "none"}


def unknown(exporters: frozenset[str], environ: Mapping[str, str]) -> str | None:
    """What is asked for and not had here, if anything."""
    if others := sorted(exporters - {"otlp", "console"}):
        return others[0]
    protocol = next(filter(None, map(environ.get, _PROTOCOLS)), "http/protobuf")
    return protocol if "otlp" in exporters and protocol != "http/protobuf" else None


def _provider() -> "TracerProvider | None":
    """What sends spans, as the variables want it. They are no reason not to start."""
    exporters = wanted(os.environ)
    if not exporters:
        return None
    if (missing := unknown(exporters, os.environ)) is not None:
        log.warning("no traces are sent; they leave by otlp over http/protobuf, or to the console", asked_for=missing)
        return None
    try:
        return _made(exporters)
    except ImportError:
        log.warning("no traces are sent; what sends them is an extra: pip install 'switchboard[otel]'")
    except (ValueError, RuntimeError) as error:
        log.warning("no traces are sent; a variable of OpenTelemetry's cannot be used", error=error)
    return None


def _made(exporters: frozenset[str]) -> "TracerProvider":
    """Not made OpenTelemetry's global one, which libraries would use unasked."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    # That it tries again is no news, only that it has given up.
    logging.getLogger(OTLPSpanExporter.__module__).setLevel(logging.ERROR)
    ours = {"service.name": "switchboard", "service.version": __version__}
    # What is passed wins over the variables, so they are read beforehand.
    resource = Resource.create(ours | dict(OTELResourceDetector().detect().attributes))
    provider: TracerProvider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for each in sorted(exporters):
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter() if each == "otlp" else ConsoleSpanExporter()))
    return provider


class Tracing:
    """Makes spans. One that is made in the block of another is its child, also in tasks that are started there."""

    def __init__(self, tracer: Tracer, clean: Callable[[Any], Any]) -> None:
        self._tracer = tracer
        self._clean = clean

    @contextmanager
    def span(self, name: str, kind: SpanKind, parent: Context | None = None) -> Iterator[Span]:
        """The current span, for a block. Of an exception it keeps the class."""
        span = self._tracer.start_span(name, parent, kind)
        token = attach(set_value(_KEY, self, trace.set_span_in_context(span, parent)))
        try:
            yield span
        except BaseException as error:
            _fail(span, type(error).__qualname__)
            raise
        finally:
            detach(token)
            span.end()

    def start(self, name: str, kind: SpanKind) -> Span:
        """A span that others are not put into."""
        return self._tracer.start_span(name, kind=kind)

    def note(self, span: Span, **about: object) -> None:
        """Says what a span is about, by the names of the log and as carefully."""
        span.set_attributes({name: self._clean(str(value)) for name, value in about.items()})


def _current() -> Tracing | None:
    """What made the span around this, if there is one."""
    found = get_value(_KEY)
    return found if isinstance(found, Tracing) else None


def about(**ids: object) -> None:
    """Says what the span around this is about, if there is one."""
    if (tracing := _current()) is not None:
        tracing.note(trace.get_current_span(), **ids)


def failed(error: BaseException) -> None:
    """Marks the span around this for an error that goes no further."""
    _fail(trace.get_current_span(), type(error).__qualname__)


def _fail(span: Span, reason: str) -> None:
    span.set_attribute("error.type", reason)
    span.set_status(StatusCode.ERROR)


# Where spans begin.


class Traced:
    """Makes a span of each request, around everything else, so that its line in the log belongs to it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tracing: Tracing | None = scope.get("state", {}).get("tracing") if scope["type"] == "http" else None
        if tracing is None:
            await self._app(scope, receive, send)
        elif scope["path"] in _NOT_TRACED:
            # A request that waited behind another one begins in its context.
            token = attach(Context())
            try:
                await self._app(scope, receive, send)
            finally:
                detach(token)
        else:
            await self._traced(tracing, scope, receive, send)

    async def _traced(self, tracing: Tracing, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= _SERVER_ERROR:
                    _fail(span, str(message["status"]))
                tracing.note(span, request_id=Headers(scope=message).get(REQUEST_ID, ""))
            await send(message)

        with tracing.span(method, SpanKind.SERVER, _sent_with(scope)) as span:
            span.set_attribute("http.request.method", method)
            try:
                await self._app(scope, receive, answer)
            finally:
                # The template: a path itself may hold phone numbers and secrets.
                route = getattr(scope.get("route"), "path", None)
                if route is not None:
                    span.update_name(f"{method} {route}")
                    span.set_attribute("http.route", route)


def _sent_with(scope: Scope) -> Context:
    """The span that a request names as its parent. Nothing else is taken over: a `tracestate` may say anything."""
    named = Headers(scope=scope).get("traceparent")
    return TraceContextTextMapPropagator().extract({} if named is None else {"traceparent": named}, Context())


@contextmanager
def job(tracing: Tracing | None, name: str, subject: str) -> Iterator[None]:
    """The span of a background job."""
    if tracing is None:
        yield
        return
    with tracing.span(f"job {name}", SpanKind.CONSUMER, Context()) as span:
        tracing.note(span, job=name, subject=subject)
        yield


# What is asked of others, in the span of a request or a job. They are strangers, and are not told of the trace.


@contextmanager
def call(method: str, host: str) -> Iterator[Callable[[int], None]]:
    """The span of a call to another host; yields what takes the status of its answer."""
    tracing = _current()
    if tracing is None:
        yield lambda _: None
        return
    with tracing.span(f"{method} {host}", SpanKind.CLIENT) as span:
        span.set_attributes({"http.request.method": method, "server.address": host})

        def answered(status: int) -> None:
            span.set_attribute("http.response.status_code", status)
            if status >= _CLIENT_ERROR:
                _fail(span, str(status))

        yield answered


@contextmanager
def statement(query: str) -> Iterator[None]:
    """The span of waiting for a statement that is sent by no engine which is watched."""
    tracing = _current()
    if tracing is None or not trace.get_current_span().is_recording():
        yield
        return
    with tracing.span(query.split(None, 1)[0], SpanKind.CLIENT) as span:
        span.set_attributes({"db.system.name": "postgresql", "db.query.text": query[:_LONGEST_STATEMENT]})
        yield


def watch(db: AsyncEngine) -> None:
    """Makes a span of each statement: of its text, in which what it is about are only parameters."""
    engine = db.sync_engine

    @event.listens_for(engine, "before_cursor_execute", named=True)
    def began(statement: str, context: Any, **_: Any) -> None:
        tracing = _current()
        if tracing is None or not trace.get_current_span().is_recording():
            return
        context.span = span = tracing.start(statement.split(None, 1)[0], SpanKind.CLIENT)
        span.set_attributes({"db.system.name": "postgresql", "db.query.text": statement[:_LONGEST_STATEMENT]})

    @event.listens_for(engine, "after_cursor_execute", named=True)
    def ended(context: Any, **_: Any) -> None:
        if (span := getattr(context, "span", None)) is not None:
            span.end()
            del context.span

    @event.listens_for(engine, "handle_error")
    def broke(trouble: ExceptionContext) -> None:
        context: Any = trouble.execution_context
        if (span := getattr(context, "span", None)) is not None:
            error = trouble.original_exception
            _fail(span, getattr(error, "sqlstate", None) or type(error).__qualname__)
            span.end()
            del context.span
