"""What every request and every answer has in common."""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI, Request
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse

from switchboard import edge, errors, logs
from switchboard.direct import Application, DirectRoute
from switchboard.errors import Conflict, PostgresAway
from switchboard.logs.bound import current
from switchboard.settings import Settings
from tests.conftest import Servers, Service, new_key, running_service, serving, settings_for

LISTED = "https://app.example"
PRODUCTION: dict[str, Any] = {"environment": "production", "app_url": "https://calls.example"}

ALWAYS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@contextlib.contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """What our modules log in the block, in whichever way."""
    lines: list[dict[str, Any]] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert isinstance(record.msg, dict)
            lines.append({**record.msg, "log_level": record.levelname.lower()})

    logger, keeper = logging.getLogger("switchboard"), Keeper()
    level = logger.level
    logger.addHandler(keeper)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(keeper)
        logger.setLevel(level)


def application(**settings: Any) -> FastAPI:
    """Nothing but the edge, and behind it everything that can happen."""
    app = FastAPI()
    errors.install(app)
    edge.install(app, Settings(**{"cors_origins": LISTED} | settings))

    @app.get("/api/things/{thing}")
    async def thing(request: Request) -> dict[str, Any]:
        assert request.client is not None
        return {"client": request.client.host, "scheme": request.url.scheme, "bound": dict(current())}

    @app.get("/api/broken/{what}")
    async def broken() -> None:
        raise RuntimeError("what nobody should read")

    @app.get("/api/refused")
    async def refused() -> None:
        raise ProgrammingError("SELECT", None, Exception("what nobody should read"))

    @app.get("/api/halfway")
    async def halfway() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first"
            raise RuntimeError("what nobody should read")

        return StreamingResponse(parts())

    return app


def client(app: FastAPI, peer: str = "127.0.0.1") -> httpx.AsyncClient:
    """Errors that the application lets through are raised here."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(peer, 1)), base_url="http://here")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/nowhere", 404),
        ("GET", "/api/happyrobot/runs", 200),
        ("GET", "/api/happyrobot/runs?limit=none", 400),
        ("DELETE", "/api/happyrobot/runs", 405),
        ("OPTIONS", "/api/happyrobot/runs", 405),
        ("POST", "/api/webhooks/happyrobot", 401),
        ("GET", "/healthz/", 307),
    ],
)
async def test_every_answer_has_the_same_headers(service: Service, method: str, path: str, status: int):
    answer = await service.http.request(method, path)
    assert answer.status_code == status
    assert answer.headers.items() >= ALWAYS.items()
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.headers.get("cache-control") == ("no-store" if path.startswith("/api/") else None)
    assert "strict-transport-security" not in answer.headers


async def test_a_stream_has_them_too_and_says_itself_how_it_is_cached(service: Service, context_id: str):
    async with service.http.stream("GET", f"/api/events?context_id={context_id}") as answer:
        assert answer.headers.items() >= ALWAYS.items()
        assert answer.headers["x-request-id"]
        assert answer.headers["cache-control"] == "no-cache, no-transform"


async def test_browsers_are_told_to_come_by_https_only_in_production(database_url: str, servers: Servers):
    settings = settings_for(database_url, servers.redis_url, None, **PRODUCTION)
    async with running_service(settings) as service:
        for path in ("/healthz", "/nowhere", "/api/happyrobot/runs"):
            answer = await service.http.get(path)
            assert answer.headers["strict-transport-security"] == "max-age=31536000"


# Request ids.


@pytest.mark.parametrize("given", ["a", "Trace-1.b_C", "x" * 128])
async def test_a_request_id_is_taken(given: str):
    async with client(application()) as http:
        answer = await http.get("/api/things/1", headers={"X-Request-ID": given})
    assert answer.headers["x-request-id"] == given
    assert answer.json()["bound"] == {"request_id": given}


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"a\r\nX-Evil: 1", b"a\n", b"a b", "ä".encode(), b"a;b", b"\xff"])
async def test_one_that_could_do_harm_is_replaced(given: bytes):
    async with client(application()) as http:
        answer = await http.get("/api/things/1", headers=[(b"X-Request-ID", given)])
    made = answer.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert answer.json()["bound"] == {"request_id": made}
    assert "x-evil" not in answer.headers


async def test_two_requests_have_two_ids_and_leave_none_behind():
    async with client(application()) as http:
        made = {(await http.get("/api/things/1")).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert dict(current()) == {}


# Errors that nobody expected.


@pytest.mark.parametrize("path", ["/api/broken/1", "/api/refused"])
async def test_an_unexpected_error_is_answered_and_logged_once(path: str):
    async with client(application()) as http:
        with logged() as lines:
            answer = await http.get(path, headers={"Origin": LISTED})
    assert (answer.status_code, answer.json()) == (500, {"error": "Internal server error"})
    assert answer.headers.items() >= ALWAYS.items()
    assert answer.headers["access-control-allow-origin"] == LISTED
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-request-id"]
    error, request = lines
    assert (error["log_level"], error["exc_info"]) == ("error", True)
    assert (request["event"], request["status"]) == ("request", 500)


async def test_an_answer_that_breaks_off_is_logged_and_not_completed():
    sent: list[Any] = []

    async def remember(message: Any) -> None:
        sent.append(message)

    async def nothing() -> Any:
        await asyncio.get_running_loop().create_future()

    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": "/api/halfway",
        "headers": [],
        "client": None,
        "query_string": b"",
    }
    with logged() as lines:
        await application()(scope, nothing, remember)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[-1]["more_body"]
    assert [line["event"] for line in lines] == ["unexpected error", "request"]


async def test_what_is_said_behind_a_request_is_not_said_in_the_name_of_another(caplog: pytest.LogCaptureFixture):
    """What breaks off is told of by uvicorn, outside of everything here."""
    said: list[dict[str, Any]] = []

    class Listening(logging.Handler):
        def emit(self, _: logging.LogRecord) -> None:
            said.append(dict(current()))

    listening = Listening()
    logging.getLogger("uvicorn.error").addHandler(listening)
    try:
        async with serving(lambda _: application()) as (url, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
            requests = ("things/1 HTTP/1.1\r\nX-Request-ID: the-first", "halfway HTTP/1.1")
            writer.write("".join([f"GET /api/{request}\r\nHost: x\r\n\r\n" for request in requests]).encode())
            assert b"the-first" in await reader.read()
            writer.close()
            await writer.wait_closed()
    finally:
        logging.getLogger("uvicorn.error").removeHandler(listening)
    assert "ASGI callable returned without completing response." in caplog.text
    assert said == [{}]


async def test_what_is_for_the_api_alone_is_on_none_of_its_neighbours():
    app = application()

    @app.get("/things/{thing}")
    async def thing() -> dict[str, str]:
        return {}

    async with client(app) as http:
        for _ in range(2):
            assert (await http.get("/api/things/1")).headers["cache-control"] == "no-store"
            assert "cache-control" not in (await http.get("/things/1")).headers


async def test_an_answer_that_breaks_off_ends_its_connection():
    async with serving(lambda _: application()) as (url, _), httpx.AsyncClient(base_url=url) as http:
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete"):
            await http.get("/api/halfway")


# The log.


async def test_a_request_that_waits_behind_another_is_not_taken_for_its(
    database_url: str, servers: Servers, db: AsyncEngine, capsys: pytest.CaptureFixture[str]
):
    key_id, key = await new_key(db)
    async with running_service(settings_for(database_url, servers.redis_url, None, log_level="info")) as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(service.url).port)
        first = "GET /docs/nothing HTTP/1.1\r\nHost: x\r\n\r\nGET /api/happyrobot/runs?limit=1 HTTP/1.1\r\nHost: x\r\n"
        second = "GET /docs/init.js HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        writer.write(f"{first}Authorization: {key['Authorization']}\r\n\r\n{second}".encode())
        await reader.read()
        writer.close()
        await writer.wait_closed()
    lines = [line for line in capsys.readouterr().err.splitlines() if "status" in line]
    assert [str(key_id) in line for line in lines if "/api/happyrobot/runs" in line] == [True]
    assert [str(key_id) in line for line in lines if "/docs/{name}" in line] == [False, False]


@pytest.mark.parametrize(
    ("path", "route", "status"),
    [
        ("/api/things/+15551234567?token=secret", "/api/things/{thing}", 200),
        ("/api/broken/secret", "/api/broken/{what}", 500),
        ("/secret?secret", "unmatched", 404),
        ("/openapi.json?secret", "/openapi.json", 200),
        ("/api/things/secret/", "unmatched", 307),
    ],
)
async def test_a_request_is_a_line_without_its_path(path: str, route: str, status: int):
    async with client(application()) as http:
        with logged() as lines:
            await http.get(path)
    line = lines[-1]
    assert line.pop("ms") >= 0
    assert line == {"event": "request", "log_level": "info", "method": "GET", "route": route, "status": status}
    assert "secret" not in str(lines)


async def test_routes_of_the_service_are_logged_by_their_templates(service: Service, run_id: str, context_id: str):
    with logged() as lines:
        await service.http.get(f"/api/happyrobot/runs/{run_id}")
        await service.http.delete(f"/api/happyrobot/runs/{run_id}")
        await service.http.get("/api/nowhere")
        await service.http.get("/healthz")
        async with service.stream(context_id=context_id) as stream:
            await service.callback(run_id, "log", 1)
            await anext(stream)
        while "/api/events" not in {line.get("route") for line in lines}:  # noqa: ASYNC110  # once its browser is missed
            await asyncio.sleep(0.01)
    seen = [(line["log_level"], line["method"], line["route"], line["status"]) for line in lines if "route" in line]
    assert seen == [
        ("info", "GET", "/api/happyrobot/runs/{run_id}", 200),
        ("info", "DELETE", "/api/happyrobot/runs/{run_id}", 405),
        ("info", "GET", "unmatched", 404),
        ("debug", "GET", "/healthz", 200),
        ("info", "POST", "/api/webhooks/happyrobot", 200),
        ("info", "GET", "/api/events", 200),
    ]


@pytest.mark.parametrize("given", ["15551234567", "a-b"])
async def test_an_id_that_somebody_has_sent_is_searched_like_anything_else(
    given: str, capsys: pytest.CaptureFixture[str]
):
    logs.configure(Settings(log_level="info"))
    async with client(application()) as http:
        await http.get("/api/things/1", headers={"X-Request-ID": given})
        await http.get("/api/things/1")
    await asyncio.sleep(0)  # when it is written
    lines = [line for line in capsys.readouterr().err.splitlines() if "status" in line]
    assert len(lines) == 2
    assert (given in lines[0]) == (given == "a-b")


# Direct routes.


def direct(*, listed: bool) -> Application:
    app = Application(settings := Settings(cors_origins=LISTED))
    errors.install(app)
    edge.install(app, settings)

    async def answer(request: Request) -> Response:
        match request.headers.get("do"):
            case "refuse":
                raise Conflict("not now", about="it")
            case "break":
                raise RuntimeError("what nobody should read")
            case "wait":
                raise PostgresAway("away")
            case "hang up":
                raise ClientDisconnect
            case _:
                return JSONResponse({"path": request.url.path, "bound": sorted(dict(current()))})

    route = DirectRoute("/api/direct", answer, methods=["POST"])
    app.router.routes.append(route)
    if listed:
        app.add_direct(route)
    return app


@pytest.mark.parametrize("method", ["POST", "GET", "OPTIONS", "HEAD"])
@pytest.mark.parametrize("do", ["answer", "refuse", "break", "wait", "hang up"])
async def test_a_direct_route_answers_as_it_would_by_the_router(method: str, do: str):
    answers = []
    for listed in (True, False):
        async with client(direct(listed=listed)) as http:
            with logged() as lines:
                answer = await http.request(method, "/api/direct", headers={"do": do, "Origin": LISTED})
        headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
        last = {name: value for name, value in lines[-1].items() if name != "ms"}
        answers.append((answer.status_code, headers, answer.content, len(lines), last))
    assert answers[0] == answers[1]


async def test_it_is_found_at_once(monkeypatch: pytest.MonkeyPatch):
    app = direct(listed=True)
    monkeypatch.setattr(app, "router", None)
    async with client(app) as http:
        assert (await http.post("/api/direct")).status_code == 200


# Other origins.

PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-request-id"}


def told(answer: httpx.Response) -> set[str]:
    return {name for name in answer.headers if name.startswith("access-control-")}


async def test_a_listed_origin_may_read():
    async with client(application()) as http:
        answer = await http.get("/api/things/1", headers={"Origin": LISTED})
    assert answer.headers["access-control-allow-origin"] == LISTED
    assert set(answer.headers["access-control-expose-headers"].split(", ")) == {
        "Link",
        "Retry-After",
        "X-Request-ID",
        "X-RateLimit-Limit",
        "X-RateLimit-Remaining",
        "X-RateLimit-Reset",
    }
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["vary"] == "Origin"


async def test_a_listed_origin_may_ask_beforehand():
    async with client(application()) as http:
        answer = await http.options("/api/things/1", headers=PREFLIGHT | {"Origin": LISTED})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == LISTED
    assert set(answer.headers["access-control-allow-methods"].split(", ")) == {"GET", "POST", "DELETE"}
    assert set(answer.headers["access-control-allow-headers"].split(", ")) >= {
        "Authorization",
        "Content-Type",
        "Idempotency-Key",
        "Last-Event-ID",
        "X-Request-ID",
    }
    assert "Origin" in answer.headers["vary"]
    assert answer.headers.items() >= ALWAYS.items()
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "asked",
    [
        {"Access-Control-Request-Method": "PUT"},
        {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "x-api-key"},
    ],
)
async def test_a_listed_origin_may_not_do_everything(asked: dict[str, str]):
    async with client(application()) as http:
        answer = await http.options("/api/things/1", headers=asked | {"Origin": LISTED})
    assert answer.status_code == 400


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://app.example", f"{LISTED}:444", f"{LISTED}.evil.example", "*"]
)
@pytest.mark.parametrize("path", ["/api/things/1", "/api/broken/1", "/nowhere"])
async def test_an_origin_that_is_not_listed_is_told_nothing(origin: str, path: str):
    async with client(application()) as http:
        answer = await http.get(path, headers={"Origin": origin})
        asked = await http.options(path, headers=PREFLIGHT | {"Origin": origin})
    assert told(answer) == told(asked) == set()
    assert answer.headers["vary"] == asked.headers["vary"] == "Origin", "or a cache gives it to those that are listed"
    assert asked.status_code in (404, 405)


async def test_nobody_is_told_anything_where_no_origin_is_listed(service: Service):
    answer = await service.http.get("/healthz", headers={"Origin": LISTED})
    assert told(answer) == set()
    assert "vary" not in answer.headers


async def test_without_an_origin_caches_still_learn_that_it_matters():
    async with client(application()) as http:
        answer = await http.get("/api/things/1")
    assert told(answer) == set()
    assert answer.headers["vary"] == "Origin"


# Proxies.


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),  # not a proxy of ours
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1:4711"], "198.51.100.1"),
        ("10.0.0.1", ["192.0.2.66, 198.51.100.1"], "198.51.100.1"),  # the first is what the client claims
        ("10.0.0.1", ["192.0.2.66", "198.51.100.1, 10.0.0.7"], "198.51.100.1"),  # several hops and lines
        ("10.0.0.1", ["10.0.0.9, 10.0.0.7"], "10.0.0.9"),
        ("10.0.0.1", ["2001:DB8:0::1"], "2001:db8::1"),
        ("10.0.0.1", ["[2001:db8::1]:443"], "2001:db8::1"),
        ("10.0.0.1", ["fe80::1%any text, of which each would be an address of its own"], "10.0.0.1"),
        ("10.0.0.1", ["fe80::1%another"], "fe80::1"),
        ("10.0.0.1", ["::ffff:198.51.100.1"], "198.51.100.1"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),  # a socket that listens on IPv6
        ("::ffff:203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", [","], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, <script>"], "10.0.0.1"),
        ("10.0.0.1", ["x" * 10_000], "10.0.0.1"),
        ("10.0.0.1", ["127.0.0.1"], "10.0.0.1"),  # nobody comes from this machine by way of another
        ("10.0.0.1", ["::1"], "10.0.0.1"),
    ],
)
async def test_the_client_is_the_one_whom_the_last_trusted_proxy_saw(peer: str, forwarded: list[str], expected: str):
    async with client(application(trusted_proxies="10.0.0.0/8"), peer) as http:
        answer = await http.get("/api/things/1", headers=[("X-Forwarded-For", value) for value in forwarded])
    assert answer.json()["client"] == expected


@pytest.mark.parametrize(
    ("peer", "said", "expected"),
    [("10.0.0.1", "https", "https"), ("203.0.113.9", "https", "http"), ("10.0.0.1", "gopher", "http")],
)
async def test_only_a_trusted_proxy_says_how_it_was_reached(peer: str, said: str, expected: str):
    async with client(application(trusted_proxies="10.0.0.0/8"), peer) as http:
        answer = await http.get("/api/things/1", headers={"X-Forwarded-Proto": said})
    assert answer.json()["scheme"] == expected


async def test_without_trusted_proxies_nobody_is_believed():
    async with client(application(trusted_proxies=())) as http:
        answer = await http.get("/api/things/1", headers={"X-Forwarded-For": "198.51.100.1"})
    assert answer.json()["client"] == "127.0.0.1"
