"""An OpenTelemetry collector: it takes traces over OTLP/HTTP, and keeps them as they came."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """A span as it was sent."""

    name: str
    kind: str
    trace_id: str
    id: str
    parent_id: str
    failed: bool
    about: dict[str, Any]
    """Its attributes."""
    resource: dict[str, Any]
    """What is said of the process that sent it."""
    began: int
    """Nanoseconds since 1970."""
    ended: int


@dataclass
class Collector:
    """A server on loopback."""

    address: str = ""
    raw: bytes = b""
    """All that has come."""
    headers: list[dict[str, str]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    deaf: bool = False
    """Whether it leaves what comes unanswered."""
    asked: threading.Event = field(default_factory=threading.Event)
    """Set once something has come."""
    left: threading.Event = field(default_factory=threading.Event)
    """Set once somebody who got no answer has hung up."""

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> Span:
        [span] = self.named(name)
        return span

    def below(self, span: Span) -> list[Span]:
        """The children of a span, in the order in which they began."""
        children = [each for each in self.spans if each.parent_id == span.id]
        return sorted(children, key=lambda each: each.began)

    def _take(self, body: bytes) -> None:
        self.raw += body
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = _values(group.resource.attributes)
            self.spans += [_span(span, resource) for scope in group.scope_spans for span in scope.spans]


def _span(span: Any, resource: dict[str, Any]) -> Span:
    assert not span.status.message, "what an exception says is nobody's business"
    assert not span.events
    assert not span.trace_state
    kind = type(span).SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower()
    return Span(
        span.name,
        kind,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.status.code == type(span.status).STATUS_CODE_ERROR,
        _values(span.attributes),
        resource,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens until the block ends."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.headers.append({name.lower(): value for name, value in self.headers.items()})
            collector.asked.set()
            if collector.deaf:
                self.rfile.read(1)
                collector.left.set()
                return
            assert self.path == "/v1/traces"
            collector._take(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        collector.address = f"http://127.0.0.1:{server.server_address[1]}"
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            yield collector
        finally:
            server.shutdown()
            serving.join()
