"""Traces: what they show, what they never hold, and that nothing waits for them."""

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from switchboard import __version__, database, jobs, local, logs, tracing
from switchboard.logs.redaction import REDACTED
from switchboard.runs.queued import Launcher
from switchboard.settings import Settings
from switchboard.tables import agent_runs
from tests.collector import Collector, collecting
from tests.conftest import (
    APP_SECRET,
    HOOK_KEY,
    Servers,
    Service,
    Upstream,
    insert_run,
    running_service,
    settings_for,
    until,
)
from tests.receiver import receiving, statuses

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRIGGER, RUNS = "/api/happyrobot/trigger", "/api/happyrobot/runs"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that the environment names."""
    with collecting() as collector:
        monkeypatch.setenv(ENDPOINT, collector.address)
        yield collector


@pytest.fixture
def settings(database_url: str, servers: Servers, upstream: Upstream) -> Settings:
    return settings_for(database_url, servers.redis_url, upstream.url)


# When there are any


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, set()),
        ({ENDPOINT: ""}, set()),
        ({ENDPOINT: "http://c"}, {"otlp"}),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"}, {"otlp"}),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c"}, set()),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, {"otlp"}),
        ({"OTEL_TRACES_EXPORTER": "otlp, Console"}, {"otlp", "console"}),
        ({"OTEL_TRACES_EXPORTER": "none", ENDPOINT: "http://c"}, set()),
        ({"OTEL_TRACES_EXPORTER": "", ENDPOINT: "http://c"}, {"otlp"}),
        ({"OTEL_SDK_DISABLED": "True", ENDPOINT: "http://c", "OTEL_TRACES_EXPORTER": "otlp"}, set()),
        ({"OTEL_SDK_DISABLED": "false", ENDPOINT: "http://c"}, {"otlp"}),
    ],
)
def test_opentelemetry_s_own_variables_ask_for_them(environ: Mapping[str, str], wanted: set[str]):
    assert tracing.wanted(environ) == wanted


@pytest.mark.parametrize(
    ("exporters", "environ", "unknown"),
    [
        ({"otlp", "console"}, {}, None),
        ({"otlp"}, {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, None),
        ({"otlp"}, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc"),
        (
            {"otlp"},
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
            None,
        ),
        ({"console"}, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, None),
        ({"otlp", "zipkin"}, {}, "zipkin"),
    ],
)
def test_what_is_not_had_here_is_known(exporters: set[str], environ: Mapping[str, str], unknown: str | None):
    assert tracing.unknown(frozenset(exporters), environ) == unknown


def said(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What was logged, but for what the simulator that all tests share has to say about calls of others."""
    return [record for record in caplog.records if not record.name.startswith("switchboard.happyrobot.simulator")]


async def started(settings: Settings) -> bool:
    """Whether anything is traced with these settings, and this environment."""
    async with tracing.running(settings) as found:
        return found is not None


@pytest.mark.parametrize("module", ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter"])
async def test_where_the_extra_is_missing_one_line_says_what_to_install(
    collector: Collector,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    module: str,
):
    monkeypatch.setitem(sys.modules, module, None)
    assert not await started(settings)
    [record] = said(caplog)
    assert "pip install 'switchboard[otel]'" in record.msg["event"]  # type: ignore[index]  # it is ours


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1000000"),
        ("OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER", "nobody"),
    ],
)
async def test_a_variable_that_cannot_be_used_is_a_warning_and_the_service_starts(
    collector: Collector,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    value: str,
):
    monkeypatch.setenv(variable, value)
    assert not await started(settings)
    [record] = said(caplog)
    assert record.levelname == "WARNING"


def test_where_nobody_asks_nothing_of_it_is_imported():
    code = f"""
import asyncio, os, sys
from switchboard import app, tracing
from switchboard.settings import Settings

async def imported():
    async with tracing.running(Settings()):
        return "opentelemetry.exporter" in sys.modules

print(asyncio.run(imported()))
os.environ["{ENDPOINT}"] = "http://127.0.0.1:1"
print(asyncio.run(imported()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


# What they show


async def test_a_request_is_a_span_with_what_it_asked_others_for_below(
    collector: Collector, settings: Settings, context_id: str
):
    async with running_service(settings) as service:
        answer = await service.http.post(TRIGGER, json={"context_id": context_id}, headers={"X-Request-ID": "r-1"})
        assert answer.status_code == 200
    request = collector.one(f"POST {TRIGGER}")
    assert (request.kind, request.parent_id, request.failed) == ("server", "", False)
    assert request.about == {
        "http.request.method": "POST",
        "http.route": TRIGGER,
        "http.response.status_code": 200,
        "request_id": "r-1",
        "execution_id": answer.json()["execution_id"],
    }
    below = collector.below(request)
    assert {span.kind for span in below} == {"client"}
    assert {span.trace_id for span in below} == {request.trace_id}
    called = collector.one("POST 127.0.0.1")
    assert called in below
    assert called.about == {
        "http.request.method": "POST",
        "server.address": "127.0.0.1",
        "http.response.status_code": 200,
    }
    stored = next(span for span in below if "INTO executions" in span.about.get("db.query.text", ""))
    assert stored.name in ("INSERT", "WITH")
    assert stored.about["db.system.name"] == "postgresql"
    assert request.began <= stored.began < stored.ended <= called.began < called.ended <= request.ended


async def test_a_callback_is_named_by_its_run(collector: Collector, settings: Settings, context_id: str):
    async with running_service(settings) as service:
        run_id = await insert_run(service.state["db"], context_id)
        await service.callback(run_id, "log", {"x": 1})
    assert collector.one("POST /api/webhooks/happyrobot").about["run_id"] == run_id


async def test_a_request_goes_on_with_the_trace_of_whoever_sends_it(collector: Collector, settings: Settings):
    async with running_service(settings) as service:
        for headers in (
            {"traceparent": PARENT, "tracestate": "vendor=anything", "baggage": "a=anything"},
            {"traceparent": f"{PARENT}-nonsense"},
            {},
        ):
            await service.http.get(RUNS, headers=headers)
    known, *own = sorted(collector.named(f"GET {RUNS}"), key=lambda span: span.began)
    assert (known.trace_id, known.parent_id) == tuple(PARENT.split("-")[1:3])
    assert b"anything" not in collector.raw
    assert [span.parent_id for span in own] == ["", ""]
    assert len({span.trace_id for span in (known, *own)}) == 3


async def test_what_went_wrong_is_told_by_its_class_alone(collector: Collector, settings: Settings, context_id: str):
    def answer(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("a secret in a message")

    async with running_service(settings, httpx.MockTransport(answer)) as service:
        answered = await service.http.post(TRIGGER, json={"context_id": context_id})
        assert answered.status_code == 502
    request = collector.one(f"POST {TRIGGER}")
    assert (request.failed, request.about["error.type"]) == (True, "502")
    called = collector.one("POST 127.0.0.1")
    assert (called.failed, called.about["error.type"]) == (True, "ReadTimeout")
    assert b"a secret" not in collector.raw


async def test_a_statement_that_fails_is_told_by_its_sqlstate_alone(
    collector: Collector, settings: Settings, context_id: str
):
    async with running_service(settings) as service:
        db, traces = service.state["db"], service.state["tracing"]
        run_id = await insert_run(db, context_id)
        with tracing.job(traces, "twice", "x"), pytest.raises(IntegrityError):
            await insert(db, run_id)
        with tracing.job(traces, "once", "x"):
            await insert(db, f"run_{uuid4().hex}")
    failed, good = (collector.below(collector.one(f"job {name}")) for name in ("twice", "once"))
    assert [(span.name, span.failed, span.about.get("error.type")) for span in failed] == [("INSERT", True, "23505")]
    assert [(span.name, span.failed, span.about.get("error.type")) for span in good] == [("INSERT", False, None)]
    assert run_id.encode() not in collector.raw


async def insert(db: Any, run_id: str) -> None:
    async with db.begin() as conn:
        await conn.execute(agent_runs.insert().values(run_id=run_id, context_id="c", name="n", status="RUNNING"))


async def test_a_long_statement_is_cut(collector: Collector, settings: Settings):
    async with running_service(settings) as service:
        with tracing.job(service.state["tracing"], "long", "x"):
            async with service.state["db"].connect() as conn:
                await conn.execute(text(f"SELECT 1 /* {'x' * 5_000} */"))
    [statement] = collector.below(collector.one("job long"))
    assert len(statement.about["db.query.text"]) == 2_000


async def test_a_job_is_a_span_with_what_it_asked_others_for_below(
    collector: Collector, own_database: str, servers: Servers, upstream: Upstream, context_id: str
):
    settings = settings_for(own_database, servers.redis_url, upstream.url, reconcile_after=0.05, stale_after=60)
    async with running_service(settings, worker=True) as service:
        answer = await service.http.post(TRIGGER, json={"context_id": context_id, "simulate": {"faults": "silent"}})
        [run_id] = answer.json()["run_ids"]
        await until(lambda: asked_about(service, run_id))
    job = next(span for span in collector.named("job reconcile") if collector.below(span))
    assert (job.kind, job.parent_id, job.failed) == ("consumer", "", False)
    assert job.about == {"job": "reconcile", "subject": run_id}
    assert {"GET 127.0.0.1", "SELECT"} <= {
        span.name for each in collector.named("job reconcile") for span in collector.below(each)
    }


async def asked_about(service: Service, run_id: str) -> bool:
    query = text("SELECT heard_at IS NOT NULL FROM agent_runs WHERE run_id = :run_id")
    async with service.state["db"].connect() as conn:
        return bool(await conn.scalar(query, {"run_id": run_id}))


async def test_a_job_that_fails_is_marked(
    collector: Collector, own_database: str, servers: Servers, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Launcher, "start", broken)
    settings = settings_for(own_database, servers.redis_url, None)
    async with running_service(settings, worker=True) as service:
        async with service.state["db"].begin() as conn:
            await jobs.enqueue(conn, [jobs.Job(jobs.START, str(uuid4()))])
        await until(lambda: tried(service))
    assert [(span.failed, span.about["error.type"]) for span in collector.named("job start")] == [(True, "ValueError")]
    assert b"a secret" not in collector.raw


async def broken(*_: object) -> None:
    raise ValueError("a secret in a message")


async def tried(service: Service) -> bool:
    query = text("SELECT attempts > 0 AND status = 'queued' FROM switchboard_pgqueuer WHERE entrypoint = 'start'")
    async with service.state["db"].connect() as conn:
        return bool(await conn.scalar(query))


async def test_a_line_of_the_log_names_its_trace(
    collector: Collector, settings: Settings, capsys: pytest.CaptureFixture[str]
):
    chosen = settings.model_copy(update={"log_level": "info"})
    async with running_service(chosen) as service:
        await service.http.get(RUNS)
        await service.http.get("/api/events?run_id=none")
    logs.configure(settings)
    lines = capsys.readouterr().err.splitlines()
    traced, untraced = (next(line for line in lines if f"route={route}" in line) for route in (RUNS, "/api/events"))
    assert f"trace_id={collector.one(f'GET {RUNS}').trace_id}" in traced
    assert "trace_id" not in untraced


# What they do not


async def test_what_is_asked_all_the_time_and_streams_are_not_traced(collector: Collector, settings: Settings):
    async with running_service(settings) as service:
        await service.http.get("/healthz")
        for path in ("/readyz", "/metrics"):
            await service.http.get(path)
        async with service.stream(context_id="none"):
            pass
        await service.http.get(RUNS)
    assert {span.name for span in collector.spans if not span.parent_id} == {f"GET {RUNS}"}


async def test_a_stream_that_waited_behind_a_request_is_not_part_of_its_trace(
    collector: Collector, settings: Settings, capsys: pytest.CaptureFixture[str]
):
    chosen = settings.model_copy(update={"log_level": "info"})
    async with running_service(chosen) as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(service.url.rpartition(":")[2]))
        heads = [f"GET {path} HTTP/1.1\r\nHost: x\r\n" for path in (RUNS, "/api/events?run_id=none")]
        writer.write(f"{heads[0]}\r\n{heads[1]}Connection: close\r\n\r\n".encode())
        answers = await reader.read()
        writer.close()
    logs.configure(settings)
    assert b"404 Not Found" in answers
    lines = capsys.readouterr().err.splitlines()
    assert ["trace_id" in line for line in lines if f"route={RUNS}" in line] == [True]
    assert ["trace_id" in line for line in lines if "route=/api/events" in line] == [False]


async def test_strangers_are_not_told_of_a_trace(collector: Collector, settings: Settings, context_id: str):
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={"queued_run_ids": [f"run_{uuid4().hex}"]})

    chosen = settings.model_copy(update={"allow_private_webhooks": True})
    async with running_service(chosen, httpx.MockTransport(answer)) as service, receiving() as customer:
        told = {"traceparent": PARENT}
        assert (await service.http.post(TRIGGER, json={"context_id": context_id}, headers=told)).status_code == 200
        with tracing.job(service.state["tracing"], "deliver", "x"):
            await service.state["sender"].send(customer.url, {}, b"{}")
        [webhook] = await customer.took(1)
    [request] = asked
    assert not {"traceparent", "tracestate", "baggage"} & ({*request.headers} | {*map(str.lower, webhook.headers)})


async def test_of_a_webhook_s_address_only_the_host_is_said(collector: Collector, settings: Settings):
    chosen = settings.model_copy(update={"allow_private_webhooks": True})
    async with receiving(statuses(503)) as customer, running_service(chosen) as service:
        with tracing.job(service.state["tracing"], "deliver", "x"):
            await service.state["sender"].send(customer.url.replace("127.0.0.1", "localhost"), {}, b"{}")
    [sent] = [span for span in collector.below(collector.one("job deliver")) if span.kind == "client"]
    assert (sent.name, sent.failed) == ("POST localhost", True)
    assert sent.about == {
        "http.request.method": "POST",
        "server.address": "localhost",
        "http.response.status_code": 503,
        "error.type": "503",
    }
    assert b"of=mine" not in collector.raw


async def test_ids_are_looked_through_as_in_the_log(collector: Collector, settings: Settings):
    async with running_service(settings) as service:
        for given in ("5550109999", HOOK_KEY, "a" * 64):
            await service.http.get(RUNS, headers={"X-Request-ID": given})
    assert {span.about["request_id"] for span in collector.named(f"GET {RUNS}")} == {REDACTED}


async def test_a_path_that_leads_nowhere_and_one_with_ids_are_not_repeated(collector: Collector, settings: Settings):
    async with running_service(settings) as service:
        for path in ("/marked-path", "/api/happyrobot/runs/marked-path", f"{RUNS}?context_id=marked-query"):
            await service.http.get(path)
    requests = sorted((span for span in collector.spans if span.kind == "server"), key=lambda span: span.began)
    assert [span.name for span in requests] == ["GET", f"GET {RUNS}/{{run_id}}", f"GET {RUNS}"]
    assert b"marked" not in collector.raw


async def test_fastapi_makes_no_spans_of_its_own(
    collector: Collector, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    """Its spans hold paths and queries."""
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    async with running_service(settings) as service:
        await service.http.get(f"{RUNS}?context_id=marked-query")
    assert len(collector.named(f"GET {RUNS}")) == 1
    assert b"marked" not in collector.raw


# How they are sent


async def test_opentelemetry_s_variables_say_who_sends_them_and_how_many(
    collector: Collector, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    async def send() -> None:
        async with tracing.running(settings) as traces:
            with tracing.job(traces, "one", "x"):
                pass

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=us")
    await send()
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=calls,deployment.environment.name=test")
    await send()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "other")
    await send()
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    await send()
    assert [headers["x-tenant"] for headers in collector.headers] == ["us"] * 3
    assert [span.resource["service.name"] for span in collector.spans] == ["switchboard", "calls", "other"]
    assert collector.spans[1].resource["deployment.environment.name"] == "test"
    assert {span.resource["service.version"] for span in collector.spans} == {__version__}


async def test_no_process_waits_long_for_a_collector_that_does_not_answer(
    collector: Collector, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracing, "_PATIENCE", 0.1)
    collector.deaf = True
    async with tracing.running(settings) as traces:
        with tracing.job(traces, "one", "x"):
            pass
    assert collector.asked.is_set()
    assert not collector.left.is_set(), "it was waited for until the sender gave up"


async def test_a_service_of_several_processes_sends_what_is_left_when_it_is_told_to_leave(
    collector: Collector, own_database: str, servers: Servers, upstream: Upstream
):
    with (
        deployed(own_database, servers, upstream),
        local.child("serve", "--port", "0", "--no-migrate", "--workers", "2") as address,
    ):
        async with httpx.AsyncClient(base_url=address, timeout=20) as http:
            for number in range(3):
                answer = await http.post(TRIGGER, json={"context_id": f"order_{number}"})
                assert answer.status_code == 200
    requests = collector.named(f"POST {TRIGGER}")
    assert len(requests) == 3
    assert {"POST 127.0.0.1", "INSERT"} <= {span.name for each in requests for span in collector.below(each)}


async def test_so_does_a_worker(collector: Collector, own_database: str, servers: Servers, upstream: Upstream):
    db = database.connect(own_database)
    async with db.begin() as conn:
        await jobs.enqueue(conn, [jobs.Job(jobs.CHECK, "run_1")])

    async def done() -> bool:
        async with db.connect() as conn:
            return not await conn.scalar(text("SELECT count(*) FROM switchboard_pgqueuer WHERE entrypoint = 'check'"))

    with deployed(own_database, servers, upstream):
        worker = await asyncio.create_subprocess_exec(sys.executable, "-m", "switchboard", "worker")
    try:
        await until(done)
    finally:
        worker.terminate()
        code = await worker.wait()
        await db.dispose()
    assert code == 0
    assert collector.one("job check").about["subject"] == "run_1"


def deployed(database_url: str, servers: Servers, upstream: Upstream) -> contextlib.AbstractContextManager[None]:
    """What a deployment's environment says."""
    return local.environment(
        DATABASE_URL=database_url,
        REDIS_URL=servers.redis_url,
        HAPPYROBOT_WEBHOOK_URL=f"{upstream.url}/hooks/test",
        HAPPYROBOT_X_API_KEY=HOOK_KEY,
        HAPPYROBOT_API_URL=f"{upstream.url}/api/v1",
        APP_URL="http://127.0.0.1:1",
        APP_SECRET=APP_SECRET,
        LOG_LEVEL="warning",
    )
