"""`switchboard doctor`: what is wrong, in a line each, with what to do about it."""

import asyncio
import json
import os
import re
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from switchboard import database, embedded, jobs, workflows
from switchboard.commands import doctor
from switchboard.commands.doctor import Finding, Level
from switchboard.happyrobot import client
from switchboard.happyrobot.client import Hook
from switchboard.jobs import RECONCILE, Job
from switchboard.runs import ingest
from switchboard.settings import Settings
from switchboard.workflows import Workflow
from tests.conftest import (
    _FOLDER,
    API_KEY,
    APP_SECRET,
    HOOK_KEY,
    Said,
    Servers,
    Service,
    Upstream,
    new_database,
    running_service,
    serving,
    settings_for,
    until,
)
from tests.receiver import Receiver, receiving
from tests.test_sender import certificate

SECRETS = ("marked-password", "marked-key", "marked-callbacks", "marked-hook", "marked-secret-of-32-characters-or-more")

Examine = Callable[..., Awaitable[Said]]


@pytest.fixture
def environment(own_database: str, servers: Servers, upstream: Upstream) -> dict[str, str]:
    """With a database of its own: it looks at all workflows that are registered, also at those of other tests."""
    return environment_of(own_database, servers, upstream)


def environment_of(database_url: str, servers: Servers, upstream: Upstream) -> dict[str, str]:
    """All that there is to set, but for `APP_URL`."""
    return {
        "DATABASE_URL": database_url,
        "REDIS_URL": servers.redis_url,
        "APP_SECRET": APP_SECRET,
        "HAPPYROBOT_WEBHOOK_URL": f"{upstream.url}/hooks/marked-hook",
        "HAPPYROBOT_X_API_KEY": HOOK_KEY,
        "HAPPYROBOT_API_URL": f"{upstream.url}/api/v1",
        "HAPPYROBOT_API_KEY": API_KEY,
    }


@pytest.fixture
def examine(switchboard: Callable[..., Said], environment: dict[str, str]) -> Examine:
    """Runs the command beside what it looks at, and sees to it that it keeps secrets."""

    async def run(*arguments: str, without: str = "", **variables: str) -> Said:
        wanted = {name: value for name, value in (environment | variables).items() if name not in without.split()}
        said = await asyncio.to_thread(switchboard, "doctor", *arguments, **wanted)
        assert not [secret for secret in (*SECRETS, HOOK_KEY, API_KEY, APP_SECRET) if secret in said.out + said.err]
        assert "://" not in said.out.replace("public https:// address", "").replace("an http:// or https://", "")
        assert said.err == ""
        lines = said.out.splitlines()
        assert arguments or said.code == any(line.startswith("FAIL") for line in lines)
        return said

    return run


def line(said: Said, check: str) -> str:
    """The one line about something."""
    [found] = [each for each in said.out.splitlines() if each[6:].startswith(f"{check}: ")]
    return found


@pytest.fixture
async def own_db(own_database: str) -> AsyncIterator[AsyncEngine]:
    engine = database.connect(own_database)
    yield engine
    await engine.dispose()


async def store(db: AsyncEngine, workflow: Workflow, app_secret: str = APP_SECRET) -> None:
    async with db.begin() as conn:
        assert await workflows.add(conn, Settings(app_secret=SecretStr(app_secret)), workflow)


async def test_where_all_is_well_each_line_says_so(
    examine: Examine, own_database: str, own_db: AsyncEngine, servers: Servers, upstream: Upstream
):
    calls = len(upstream.simulator.calls)
    settings = settings_for(own_database, servers.redis_url, upstream.url)
    hook = Hook(f"{upstream.url}/hooks/marked-hook", SecretStr("marked-key"))
    await store(own_db, Workflow("collections", hook))

    async def worker_lives() -> bool:
        async with own_db.connect() as conn:
            return await jobs.overdue(conn, "sweep") is not None

    async with running_service(settings, worker=True) as service:
        await until(worker_lives)
        said = await examine(DATABASE_URL=own_database, APP_URL=service.url)
        as_json = await examine("--json", DATABASE_URL=own_database, APP_URL=service.url)
    assert re.sub(r"\d+ ms", "N ms", re.sub(r"PostgreSQL: \S+", "PostgreSQL: V", said.out)) == (
        "ok    settings: fit together (development)\n"
        "ok    PostgreSQL: V answers in N ms\n"
        f"ok    schema: is the newest, {await revision(own_db)}\n"
        "ok    writers: get their turn in N ms\n"
        "ok    workers: are alive\n"
        "ok    jobs: none is overdue\n"
        "ok    APP_SECRET: opens all 1 stored secrets\n"
        "ok    workflow collections: 127.0.0.1 can be reached\n"
        "ok    Redis: answers in N ms\n"
        "ok    news: arrive in N ms\n"
        "ok    Platform API: takes HAPPYROBOT_API_KEY, and answers in N ms\n"
        "ok    workflow default: 127.0.0.1 can be reached\n"
        "ok    APP_URL: 127.0.0.1 is alive\n"
        "ok    callbacks: reach a service that takes the key\n"
    )
    found = json.loads(as_json.out)
    assert (as_json.code, found["ok"]) == (0, True)
    assert found["checks"][0] == {
        "level": "ok",
        "check": "settings",
        "what": "fit together (development)",
        "advice": None,
    }
    assert len(upstream.simulator.calls) == calls, "nobody was called"


async def revision(db: AsyncEngine) -> str:
    async with db.connect() as conn:
        return str(await conn.scalar(text("SELECT version_num FROM alembic_version")))


# What is away


async def test_each_thing_that_is_away_is_named_with_what_to_do(examine: Examine):
    said = await examine(
        DATABASE_URL="postgresql://u:marked-password@127.0.0.1:1/x",
        REDIS_URL="redis://:marked-password@127.0.0.1:1/0",
        HAPPYROBOT_WEBHOOK_URL="http://127.0.0.1:1/hooks/marked-hook",
        HAPPYROBOT_API_URL="http://127.0.0.1:1/api/v1",
        HAPPYROBOT_API_KEY="marked-key",
        APP_URL="http://127.0.0.1:1",
    )
    assert said.code == 1
    for check, what in {
        "PostgreSQL": r"takes no connection \(ConnectionRefusedError\)\. .*DATABASE_URL",
        "Redis": r"does not do what it is asked \(ConnectionError\)\. .*REDIS_URL",
        "Platform API": r"did not answer \(ConnectError\)\. .*HAPPYROBOT_API_URL",
        "workflow default": r"127\.0\.0\.1: HappyRobot cannot be reached \(ConnectionRefusedError\)\. .*firewall",
        "APP_URL": r"127\.0\.0\.1 cannot be reached \(ConnectError\)\. Does the service run",
    }.items():
        assert re.match(rf"FAIL  {check}: .*{what}", line(said, check))
    found = json.loads((await examine("--json", DATABASE_URL="postgresql://127.0.0.1:1/x")).out)
    assert found["ok"] is False
    assert "FAIL" in {each["level"] for each in found["checks"]}


async def test_a_hook_of_a_host_that_does_not_exist_is_named(examine: Examine, monkeypatch: pytest.MonkeyPatch):
    genuine = socket.getaddrinfo

    def looked_up(host: Any, *more: Any, **named: Any) -> Any:
        # A machine without a network takes long to say so.
        if host == "no-such-host.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "marked-password")
        return genuine(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    said = await examine(HAPPYROBOT_WEBHOOK_URL="https://no-such-host.invalid/hooks/marked-hook")
    assert "no-such-host.invalid: HappyRobot cannot be reached (gaierror). There is no such host" in line(
        said, "workflow default"
    )


async def test_nothing_is_started_to_be_looked_at(examine: Examine, tmp_path: Path):
    folder = tmp_path / "data"
    needed = "DATABASE_URL REDIS_URL HAPPYROBOT_WEBHOOK_URL HAPPYROBOT_API_KEY APP_SECRET"
    said = await examine(SWITCHBOARD_DATA_DIR=str(folder), without=needed)
    assert said.code == 0
    for check in ("PostgreSQL", "Redis"):
        assert line(said, check).startswith(f"ok    {check}: does not run; `switchboard serve` starts one")
    assert "calls go to the simulator" in line(said, "workflow default")
    assert line(said, "APP_URL").startswith("warn  APP_URL: is not set. HappyRobot cannot send callbacks")
    assert not folder.exists()


@pytest.fixture
def started() -> Iterator[Path]:
    """The folder of servers that run: the tests' own, unless they were given others."""
    folder = Path(os.environ[_FOLDER]) / "servers"
    with embedded.running(folder):
        yield folder


async def test_servers_that_run_in_the_data_folder_are_looked_at(examine: Examine, started: Path):
    said = await examine(SWITCHBOARD_DATA_DIR=str(started), without="DATABASE_URL REDIS_URL")
    assert line(said, "PostgreSQL").startswith("ok    PostgreSQL: 1")
    assert line(said, "Redis").startswith("ok    Redis: answers")


async def test_the_secret_of_the_data_folder_is_tried(
    examine: Examine, own_database: str, own_db: AsyncEngine, tmp_path: Path
):
    (tmp_path / "app-secret").write_text("marked-secret-of-32-characters-or-more")
    hook = Hook("http://127.0.0.1:1/hooks/marked-hook", SecretStr("marked-key"))
    await store(own_db, Workflow("collections", hook), "marked-secret-of-32-characters-or-more")
    said = await examine(DATABASE_URL=own_database, SWITCHBOARD_DATA_DIR=str(tmp_path), without="APP_SECRET")
    assert line(said, "APP_SECRET") == "ok    APP_SECRET: opens all 1 stored secrets"


# Settings


async def test_every_complaint_about_the_settings_is_said_and_the_rest_is_checked(examine: Examine):
    said = await examine(
        without="APP_SECRET", ENVIRONMENT="production", PORT="marked-key", HAPPYROBOT_API_KEY="marked key"
    )
    assert said.code == 1
    complaints = [each for each in said.out.splitlines() if " settings: " in each]
    assert [each.split()[2] for each in complaints] == [
        "HAPPYROBOT_API_KEY",
        "PORT",
        "APP_SECRET",
        "APP_URL",
    ]
    assert "FAIL  settings: HAPPYROBOT_API_KEY must be printable ASCII without spaces" in complaints
    assert line(said, "PostgreSQL").startswith("ok")
    assert line(said, "Redis").startswith("ok")
    assert line(said, "Platform API").startswith("warn  Platform API: HAPPYROBOT_API_KEY is not set")


async def test_in_production_nothing_is_expected_of_serve(examine: Examine, started: Path):
    needed = "DATABASE_URL REDIS_URL HAPPYROBOT_WEBHOOK_URL"
    said = await examine(ENVIRONMENT="production", SWITCHBOARD_DATA_DIR=str(started), without=needed)
    for check, variable in (
        ("PostgreSQL", "DATABASE_URL"),
        ("Redis", "REDIS_URL"),
        ("workflow default", "HAPPYROBOT_WEBHOOK_URL"),
    ):
        assert line(said, check) == f"FAIL  {check}: {variable} is not set"


# PostgreSQL


async def test_an_old_schema_is_named(examine: Examine, servers: Servers):
    async with new_database(servers) as url:
        said = await examine(DATABASE_URL=url)
    assert re.match(r"FAIL  schema: is at nothing, this version needs \d+.*`switchboard migrate`", line(said, "schema"))
    assert line(said, "writers").startswith("ok"), "as far as it goes"
    assert "workers: " not in said.out


async def test_a_schema_between_two_is_told_from_one_of_a_newer_version(
    examine: Examine, own_database: str, own_db: AsyncEngine
):
    for stored, said_so in (("0001", "FAIL  schema: is at 0001, this"), ("9999", "warn  schema: is at 9999, newer")):
        async with own_db.begin() as conn:
            await conn.execute(text("UPDATE alembic_version SET version_num = :it"), {"it": stored})
        assert line(await examine(DATABASE_URL=own_database), "schema").startswith(said_so)


async def test_a_turn_that_somebody_keeps_is_named(
    examine: Examine, own_database: str, own_db: AsyncEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(doctor, "TURN", text(ingest.TURN.text.replace("'3s'", "'20ms'")))
    async with own_db.begin() as conn:
        await conn.execute(ingest.TURN)
        said = await examine(DATABASE_URL=own_database)
    assert re.match(r"FAIL  writers: wait for their turn in vain.*pg_terminate_backend", line(said, "writers"))
    assert line(said, "jobs").startswith("ok"), "the rest is looked at"


async def test_workers_that_are_gone_are_missed(examine: Examine, own_database: str, own_db: AsyncEngine):
    said = await examine(DATABASE_URL=own_database)
    assert re.match(r"FAIL  workers: none has ever run\. .*`switchboard worker`", line(said, "workers"))
    async with own_db.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO switchboard_pgqueuer_schedules (expression, entrypoint, next_run) "
                "VALUES ('* * * * *', 'sweep', now() - interval '300 seconds')"
            )
        )
    said = await examine(DATABASE_URL=own_database)
    assert re.match(r"FAIL  workers: none has been alive for [3-9]\d\d s\. ", line(said, "workers"))


async def test_jobs_that_are_overdue_are_counted(examine: Examine, own_database: str, own_db: AsyncEngine):
    async with own_db.begin() as conn:
        await jobs.enqueue(conn, [Job(RECONCILE, "one", -100), Job(RECONCILE, "other", -10), Job(RECONCILE, "new", 60)])
    said = await examine(DATABASE_URL=own_database)
    assert re.match(r"warn  jobs: 2 are due, one \(reconcile\) for 1\d\d s\. ", line(said, "jobs"))


async def test_secrets_that_cannot_be_opened_are_named(examine: Examine, own_database: str, own_db: AsyncEngine):
    hook = Hook("http://127.0.0.1:1/hooks/marked-hook", SecretStr("marked-key"))
    await store(own_db, Workflow("good", hook))
    await store(own_db, Workflow("sealed-before", hook), "marked-secret-of-32-characters-or-more")
    said = await examine(DATABASE_URL=own_database)
    assert line(said, "APP_SECRET").startswith(
        "FAIL  APP_SECRET: 1 of 2 stored secrets cannot be opened: workflows sealed-before (hook_key). Set APP_SECRET"
    )
    previous = {"APP_SECRET_PREVIOUS": "marked-secret-of-32-characters-or-more"}
    assert line(await examine(DATABASE_URL=own_database, **previous), "APP_SECRET").startswith("ok")
    without = await examine(DATABASE_URL=own_database, SWITCHBOARD_DATA_DIR="/dev/null/x", without="APP_SECRET")
    assert "2 of 2 stored secrets cannot be opened" in line(without, "APP_SECRET")


async def test_without_a_secret_nothing_can_be_sealed(examine: Examine, own_database: str):
    said = await examine(DATABASE_URL=own_database, SWITCHBOARD_DATA_DIR="/dev/null/x", without="APP_SECRET")
    assert line(said, "APP_SECRET").startswith("warn  APP_SECRET: is not set")


# Redis


async def test_redis_that_publishes_nothing_is_named(examine: Examine, servers: Servers):
    user = f"user_{uuid4().hex}"
    async with Redis.from_url(servers.redis_url) as redis:
        await redis.acl_setuser(user, enabled=True, passwords=["+marked-password"], commands=["+@all"])
        parts = urlsplit(servers.redis_url)
        address = parts._replace(netloc=f"{user}:{quote('marked-password')}@{parts.netloc.rpartition('@')[2]}")
        said = await examine(REDIS_URL=address.geturl())
        await redis.acl_deluser(user)
    first, second = [each for each in said.out.splitlines() if each[6:].startswith("Redis: ")]
    assert first.startswith("ok    Redis: answers")
    assert second.startswith("FAIL  Redis: does not do what it is asked (NoPermissionError)")


# HappyRobot


@pytest.mark.parametrize(
    ("variables", "said_so"),
    [
        (
            {"HAPPYROBOT_API_KEY": "marked-key"},
            "FAIL  Platform API: refuses HAPPYROBOT_API_KEY (HappyRobot answered 401). Is",
        ),
        ({"HAPPYROBOT_API_KEY": ""}, "warn  Platform API: HAPPYROBOT_API_KEY is not set"),
    ],
)
async def test_the_key_of_the_platform_api_is_tried(examine: Examine, variables: dict[str, str], said_so: str):
    said = await examine(**variables)
    assert line(said, "Platform API").startswith(said_so)
    assert ("region" in line(said, "Platform API")) == ("refuses" in said_so)


async def test_an_address_where_nothing_is_does_not_pass_for_happyrobot(examine: Examine, upstream: Upstream):
    said = await examine(HAPPYROBOT_API_URL=f"{upstream.url}/nowhere/api/v1")
    assert line(said, "Platform API").startswith("warn  Platform API: knows nothing, whatever the key. Is ")


async def test_a_hook_that_is_called_by_way_of_a_proxy_is_not_tried_directly(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    said = await examine(HAPPYROBOT_WEBHOOK_URL="https://hooks.invalid/hooks/marked-hook")
    assert line(said, "workflow default").startswith(
        "warn  workflow default: hooks.invalid is reached by way of a proxy"
    )


async def told_by_the_only_visitor(receiver: Receiver) -> bytes:
    """What the one who came has said by the time they go, which a receiver notices in its own time."""
    await until(lambda: receiver.connections > 0 and receiver.open == 0)
    assert receiver.connections == 1
    return receiver.seen


async def test_a_hook_is_told_nothing(examine: Examine, own_database: str, own_db: AsyncEngine):
    async with receiving() as default, receiving() as other:
        await store(own_db, Workflow("collections", Hook(other.url, SecretStr("marked-key"))))
        said = await examine(DATABASE_URL=own_database, HAPPYROBOT_WEBHOOK_URL=default.url)
        for workflow, receiver in (("default", default), ("collections", other)):
            assert line(said, f"workflow {workflow}") == f"ok    workflow {workflow}: 127.0.0.1 can be reached"
            assert await told_by_the_only_visitor(receiver) == b""


async def test_an_encrypted_hook_must_show_that_it_is_the_one(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async with receiving(tls=certificate(tmp_path)) as receiver:
        url = receiver.url.replace("127.0.0.1", "localhost")
        said = await examine(HAPPYROBOT_WEBHOOK_URL=url)
        assert re.match(r"FAIL .*SSLCertVerificationError.*certificate is not trusted", line(said, "workflow default"))
        trusting = ssl.create_default_context(cafile=str(tmp_path / "pair.pem"))
        monkeypatch.setattr(client, "_certificates", lambda: trusting)
        said = await examine(HAPPYROBOT_WEBHOOK_URL=url)
        assert line(said, "workflow default") == "ok    workflow default: localhost can be reached"
        assert await told_by_the_only_visitor(receiver) == b""


async def test_a_disabled_workflow_that_cannot_be_reached_is_no_failure(
    examine: Examine, own_database: str, own_db: AsyncEngine
):
    await store(own_db, Workflow("old", Hook("http://127.0.0.1:1/hooks/marked-hook"), active=False))
    said = await examine(DATABASE_URL=own_database)
    assert line(said, "workflow old").startswith("warn  workflow old: 127.0.0.1: HappyRobot cannot be reached")


# This service


async def test_callbacks_that_would_be_refused_are_named(examine: Examine, service: Service):
    said = await examine(APP_URL=service.url, HAPPYROBOT_CALLBACK_KEY="marked-callbacks")
    assert line(said, "APP_URL").startswith("ok")
    assert line(said, "callbacks").startswith("FAIL  callbacks: are refused: the key at APP_URL is another one")


async def test_callbacks_without_a_key_are_warned_of(
    examine: Examine, database_url: str, servers: Servers, upstream: Upstream
):
    settings = settings_for(database_url, servers.redis_url, upstream.url, happyrobot_x_api_key=None)
    async with running_service(settings) as service:
        said = await examine(APP_URL=service.url, without="HAPPYROBOT_X_API_KEY")
    assert line(said, "callbacks").startswith("warn  callbacks: are taken from everybody. Set HAPPYROBOT_CALLBACK_KEY")


async def test_another_service_at_our_address_is_not_shown_the_key(examine: Examine):
    asked: list[str] = []

    async def other(request: Request) -> Response:
        asked.append(f"{request.method} {request.url.path}")
        return PlainTextResponse("Welcome")

    app = Starlette(routes=[Route("/{path:path}", other, methods=["GET", "POST"])])
    async with serving(lambda _: app) as (address, _):
        said = await examine(APP_URL=address, HAPPYROBOT_CALLBACK_KEY="marked-callbacks")
    assert asked == ["GET /healthz"]
    assert line(said, "APP_URL").startswith("FAIL  APP_URL: GET /healthz is answered 200, and not by Switchboard")
    assert "callbacks: " not in said.out


async def test_a_check_that_breaks_does_not_keep_the_others(examine: Examine, monkeypatch: pytest.MonkeyPatch):
    async def broken(*_: Any) -> Any:
        raise RuntimeError("marked-password")

    monkeypatch.setattr(doctor, "_news", broken)
    said = await examine()
    assert "FAIL  Redis: cannot be checked (RuntimeError)" in said.out
    assert line(said, "Platform API").startswith("ok")


async def test_a_check_that_takes_too_long_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    first = Finding(Level.OK, "Redis", "answers")

    async def endless() -> AsyncGenerator[Finding, None]:
        yield first
        await asyncio.Event().wait()

    monkeypatch.setattr(doctor, "_LONGEST", 0.01)
    assert await doctor._bounded("Redis", endless()) == [first, Finding(Level.FAIL, "Redis", "no answer in time")]
