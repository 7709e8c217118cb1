"""The registry of workflows, and the secrets in it."""

import asyncio
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import local, workflows
from switchboard.happyrobot.addresses import api_root, hook_for, platform_url
from switchboard.happyrobot.client import Hook
from switchboard.sealing import SealBroken, Sealer, SecretMissing
from switchboard.settings import Settings
from switchboard.workflows import Workflow
from tests.conftest import APP_SECRET, Said, Servers, Service, Upstream, running_service, settings_for

OLD = "an-older-app-secret-which-is-long-enough-too"


@pytest.fixture
def workflow_id() -> str:
    return f"workflow_{uuid4().hex}"


@pytest.fixture
def settings(database_url: str, servers: Servers) -> Settings:
    return settings_for(database_url, servers.redis_url, None)


async def store(db: AsyncEngine, settings: Settings, workflow: Workflow) -> None:
    async with db.begin() as conn:
        assert await workflows.add(conn, settings, workflow)


async def trigger(service: Service, context_id: str, workflow_id: str) -> Any:
    body = {"context_id": context_id, "workflow_id": workflow_id}
    return await service.http.post("/api/happyrobot/trigger", json=body)


async def test_a_workflow_is_started_by_its_own_hook_with_its_own_key(
    database_url: str, servers: Servers, upstream: Upstream, db: AsyncEngine, context_id: str, workflow_id: str
):
    settings = settings_for(database_url, servers.redis_url, upstream.url, happyrobot_x_api_key="of-default")
    hook = Hook(f"{upstream.url}/hooks/staging/collections", SecretStr("hook-key-of-the-tests"))
    linked = Workflow(workflow_id, hook, org_slug="acme ltd", platform_id="p/1")
    await store(db, settings, linked)
    async with running_service(settings) as service:
        answer = await trigger(service, context_id, workflow_id)
        assert answer.status_code == 200
        call = upstream.simulator.calls[-1]
        assert (call.slug, call.environment) == ("collections", "staging")
        assert call.headers["x-api-key"] == "hook-key-of-the-tests"
        [run_id] = answer.json()["run_ids"]
        run = await service.run(run_id)
        link = f"https://v2.platform.happyrobot.ai/acme%20ltd/workflow/p%2F1/runs?run_id={run_id}"
        assert (run["workflowId"], run["platformUrl"]) == (workflow_id, link)
        status = (await service.http.get("/api/happyrobot/status", params={"run_id": run_id})).json()
        assert status["platform_url"] == link
        listed = (await service.http.get("/api/happyrobot/runs", params={"workflow_id": workflow_id})).json()
        assert [each["platformUrl"] for each in listed] == [link]
        # The environment's own key is not good for this hook, and the other way round.
        assert (await trigger(service, context_id, "default")).json()["detail"] == "HappyRobot answered 401"


async def test_the_environments_organisation_is_everybodys_unless_they_have_their_own(
    database_url: str, servers: Servers, upstream: Upstream, db: AsyncEngine, context_id: str, workflow_id: str
):
    settings = settings_for(database_url, servers.redis_url, upstream.url, happyrobot_org_slug="acme")
    key = SecretStr("hook-key-of-the-tests")
    await store(db, settings, Workflow(workflow_id, Hook(f"{upstream.url}/hooks/x", key), platform_id="p1"))
    await store(db, settings, Workflow(f"{workflow_id}_2", Hook(f"{upstream.url}/hooks/y", key)))
    async with running_service(settings) as service:
        for this, link in ((workflow_id, "/acme/workflow/p1/"), (f"{workflow_id}_2", None)):
            run_id = (await trigger(service, context_id, this)).json()["run_ids"][0]
            run = await service.run(run_id)
            assert link in run["platformUrl"] if link else "platformUrl" not in run


async def test_a_disabled_workflow_is_not_started(
    service: Service, settings: Settings, db: AsyncEngine, context_id: str, workflow_id: str, upstream: Upstream
):
    await store(db, settings, Workflow(workflow_id, Hook(f"{upstream.url}/hooks/x"), active=False))
    calls = len(upstream.simulator.calls)
    answer = await trigger(service, context_id, workflow_id)
    assert (answer.status_code, answer.json()) == (403, {"error": "Workflow is inactive"})
    assert len(upstream.simulator.calls) == calls


async def test_a_key_that_cannot_be_opened_stops_the_trigger_and_says_why(
    service: Service, settings: Settings, db: AsyncEngine, context_id: str, workflow_id: str
):
    other = settings.model_copy(update={"app_secret": SecretStr(OLD)})
    await store(db, other, Workflow(workflow_id, Hook("http://127.0.0.1:1/hooks/x", SecretStr("very-secret"))))
    answer = await trigger(service, context_id, workflow_id)
    assert answer.status_code == 409
    assert answer.json()["error"] == "Workflow cannot be started"
    assert "APP_SECRET_PREVIOUS" in answer.json()["detail"]
    assert "very-secret" not in answer.text


async def test_the_previous_secret_still_opens_what_it_sealed(settings: Settings, db: AsyncEngine, workflow_id: str):
    before = settings.model_copy(update={"app_secret": SecretStr(OLD)})
    await store(db, before, Workflow(workflow_id, Hook("http://127.0.0.1:1/hooks/x", SecretStr("very-secret"))))
    rotated = settings.model_copy(update={"app_secret_previous": SecretStr(OLD)})
    async with db.connect() as conn:
        found = await workflows.find(conn, rotated, workflow_id)
        stored = await conn.scalar(select(text("workflows::text FROM workflows WHERE id = :id")), {"id": workflow_id})
    assert found is not None
    assert found.hook.key == SecretStr("very-secret")
    assert "very-secret" not in stored
    assert "very-secret" not in repr(found)


def test_what_is_sealed_is_another_text_each_time_and_opens_to_the_same():
    sealer = Sealer(SecretStr(APP_SECRET))
    one, other = sealer.seal("ä secret"), sealer.seal("ä secret")
    assert one != other
    assert sealer.open(one) == sealer.open(other) == SecretStr("ä secret")
    with pytest.raises(SealBroken):
        Sealer(SecretStr(OLD)).open(one)
    with pytest.raises(SealBroken):
        sealer.open("nonsense")
    assert Sealer(SecretStr(OLD), SecretStr(APP_SECRET)).open(one) == SecretStr("ä secret")


def test_without_a_secret_nothing_is_sealed():
    with pytest.raises(SecretMissing, match="APP_SECRET"):
        Sealer.of(Settings())


# Addresses


@pytest.mark.parametrize(
    ("url", "v1", "v2"),
    [
        ("https://platform.happyrobot.ai/api/v1", "https://platform.happyrobot.ai/api/v1", None),
        ("https://platform.eu.happyrobot.ai/api/v2", None, "https://platform.eu.happyrobot.ai/api/v2"),
        ("http://proxy.example/happyrobot", "http://proxy.example/happyrobot", "http://proxy.example/happyrobot"),
    ],
)
def test_both_versions_of_the_api_are_on_one_host(url: str, v1: str | None, v2: str | None):
    assert api_root(url, 1) == (v1 or url.replace("v2", "v1"))
    assert api_root(url, 2) == (v2 or url.replace("v1", "v2"))


@pytest.mark.parametrize(
    ("url", "wanted", "address", "environment"),
    [
        ("https://h/hooks/abc", None, "https://h/hooks/abc", "production"),
        ("https://h/hooks/abc?x=1", "staging", "https://h/hooks/staging/abc?x=1", "staging"),
        ("https://h/hooks/staging/abc", None, "https://h/hooks/staging/abc", "staging"),
        ("https://h/hooks/development/abc", "development", "https://h/hooks/development/abc", "development"),
        ("https://h/webhook/abc", None, "https://h/webhook/abc", "production"),
        ("https://h/webhook/abc", "production", "https://h/webhook/abc", "production"),
    ],
)
def test_a_hook_can_be_put_into_an_environment(url: str, wanted: str | None, address: str, environment: str):
    assert hook_for(url, wanted) == (address, environment)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("https://h/hooks/staging/abc", "production"),
        ("https://h/hooks/staging/abc", "development"),
        ("https://h/webhook/abc", "staging"),
    ],
)
def test_an_address_of_another_environment_is_refused(url: str, wanted: str):
    with pytest.raises(ValueError, match=r"address"):
        hook_for(url, wanted)


@pytest.mark.parametrize(("slug", "workflow"), [(None, "w"), ("s", None), ("", "w")])
def test_a_link_that_would_be_broken_is_none(slug: str | None, workflow: str | None):
    assert platform_url(slug, workflow, "r") is None


# Commands


async def test_a_workflow_from_its_registration_to_its_end(
    switchboard: Callable[..., Said], environment: dict[str, str], workflow_id: str
):
    def command(*arguments: str, stdin: str = "") -> Said:
        return switchboard("workflows", *arguments, stdin=stdin, **environment)

    add = ("add", workflow_id, "--hook-url", "https://h.example/hooks/abc", "--environment", "staging")
    done = command(*add, "--hook-key", "-", "--json", stdin="very-secret\n")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {
        "id": workflow_id,
        "name": None,
        "environment": "staging",
        "active": True,
        "hook_url": "https://h.example/hooks/staging/abc",
        "has_key": True,
        "approval_url": None,
        "org_slug": None,
        "platform_id": None,
    }
    taken = f"switchboard: there is a workflow {workflow_id} already; --replace takes its place\n"
    assert command(*add, "--name", "Again") == Said(1, "", taken)
    assert command("disable", workflow_id) == Said(0, f"Workflow {workflow_id} is disabled.\n", "")
    done = command(*add, "--name", "Again", "--approval-url", "https://h.example/approve", "--replace")
    assert done == Said(0, f"Workflow {workflow_id} is disabled.\n", "")
    found = {each["id"]: each for each in json.loads(command("list", "--json").out)}
    this = found[workflow_id]
    assert (this["name"], this["approval_url"]) == ("Again", "https://h.example/approve")
    assert (this["active"], this["has_key"]) == (False, True), "what was not given anew stays"
    assert found["default"]["hook_url"] == "https://h.example/hooks/default"
    assert json.loads(command("enable", workflow_id, "--json").out)["active"] is True
    assert "staging" in command("list").out
    elsewhere = ("add", workflow_id, "--hook-url", "https://other.example/hooks/abc", "--replace", "--json")
    assert json.loads(command(*elsewhere).out)["has_key"] is False, "a key is not sent to another host"


_ADD = ("add", "x", "--hook-url")


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (("add", "default", "--hook-url", "https://h/x"), {}, "the workflow `default` comes from"),
        (("disable", "default"), {}, "the workflow `default` comes from"),
        (("disable", "no-such-workflow"), {}, "there is no workflow no-such-workflow"),
        (("add", "a b", "--hook-url", "https://h/x"), {}, "an id has 1 to 255"),
        ((*_ADD, "ftp://h/x"), {}, "--hook-url must be an http:// or https:// address"),
        ((*_ADD, "http://[bad"), {}, "--hook-url must be an http:// or https:// address"),
        ((*_ADD, "https://h:99999/x"), {}, "--hook-url must be an http:// or https:// address"),
        ((*_ADD, "https://h/x y"), {}, "--hook-url must not contain spaces"),
        ((*_ADD, "https://h/x\ny"), {}, "--hook-url must not contain spaces"),
        ((*_ADD, "https://u:very-secret@h/x"), {}, "--hook-url must not contain a user or a password"),
        ((*_ADD, "https://h/x", "--approval-url", "h/x"), {}, "--approval-url must be an http:// or https://"),
        ((*_ADD, "https://h/x", "--hook-key", "ä"), {}, "a hook's key must be printable ASCII"),
        ((*_ADD, "https://h/x", "--hook-key", "-"), {}, "a hook's key must be printable ASCII"),
        ((*_ADD, "https://h/x", "--name", "n" * 256), {}, "--name takes up to 255 printable characters"),
        ((*_ADD, "https://h/x", "--platform-id", "\x00"), {}, "--platform-id takes up to 255 printable characters"),
        ((*_ADD, "https://h/x", "--environment", "staging"), {}, "only addresses like"),
        ((*_ADD, "https://h/x"), {"APP_SECRET": "short"}, "must have 32 characters or more"),
        (
            (*_ADD, "http://h/x"),
            {"ENVIRONMENT": "production", "APP_URL": "https://a", "HAPPYROBOT_X_API_KEY": "k"},
            "--hook-url must be an https:// address",
        ),
    ],
)
async def test_what_cannot_be_done_is_said_in_a_line(
    switchboard: Callable[..., Said],
    environment: dict[str, str],
    arguments: tuple[str, ...],
    variables: dict[str, str],
    said: str,
):
    done = switchboard("workflows", *arguments, **environment | variables)
    assert (done.code, done.out) == (1, "")
    assert said in done.err
    assert "very-secret" not in done.err


async def test_an_old_schema_is_named(switchboard: Callable[..., Said], servers: Servers, environment: dict[str, str]):
    done = switchboard("workflows", "list", **environment | {"DATABASE_URL": servers.database_url})
    said = "switchboard: the database has not the newest schema; run `switchboard migrate` first\n"
    assert done == Said(1, "", said)


def test_a_secret_is_kept_in_the_data_folder_in_development(tmp_path: Path):
    settings = Settings(switchboard_data_dir=str(tmp_path / "data"))
    with local.app_secret(settings):
        first = os.environ["APP_SECRET"]
    assert "APP_SECRET" not in os.environ
    assert len(first) == 64
    kept = tmp_path / "data" / "app-secret"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    with local.app_secret(settings):
        assert os.environ["APP_SECRET"] == first
    assert [path.name for path in kept.parent.iterdir()] == ["app-secret"]
    with local.app_secret(settings.model_copy(update={"app_secret": SecretStr(OLD)})):
        assert "APP_SECRET" not in os.environ


async def test_processes_that_start_at_once_agree_on_a_secret(tmp_path: Path):
    script = (
        "import sys; from pathlib import Path; from switchboard.local import _kept_secret; "
        "print(_kept_secret(Path(sys.argv[1])))"
    )
    command_line = (sys.executable, "-c", script, str(tmp_path))
    starts = [asyncio.create_subprocess_exec(*command_line, stdout=subprocess.PIPE) for _ in range(4)]
    said = [await (await start).communicate() for start in starts]
    assert len({out for out, _ in said}) == 1


def test_a_folder_that_takes_no_secret_is_named():
    settings = Settings(switchboard_data_dir="/dev/null/x")
    with pytest.raises(local.SecretNotKept, match="cannot keep a secret in /dev/null/x"), local.app_secret(settings):
        pass
