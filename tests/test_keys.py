"""The commands that look after API keys and stored secrets."""

import asyncio
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database, workflows
from switchboard.happyrobot.client import Hook
from switchboard.sealing import Sealer
from switchboard.tables import SEALED, api_key_digests, metadata
from switchboard.tables import workflows as workflow_rows
from switchboard.workflows import Workflow
from tests.conftest import APP_SECRET, Said, Service, settings_for
from tests.test_tokens import RUNS, bearer

Command = Callable[..., Said]


@pytest.fixture
def command(switchboard: Callable[..., Said], environment: dict[str, str]) -> Command:
    def run(*arguments: str, **variables: str) -> Said:
        return switchboard(*arguments, **environment | variables)

    return run


@pytest.fixture
def name() -> str:
    return f"key {uuid4().hex}"


def said(done: Said) -> Any:
    assert done.code == 0, done.err
    return json.loads(done.out)


async def status(service: Service, key: str) -> int:
    return (await service.http.get(RUNS, params={"limit": "1"}, headers=bearer(key))).status_code


async def test_a_key_is_shown_once_and_only_its_digest_is_kept(command: Command, db: AsyncEngine, name: str):
    done = command("keys", "create", "--name", name, "--scope", "app")
    assert re.fullmatch(r"[0-9a-f]{64}\n", done.out), "alone, so that it can be piped"
    assert "It is not shown again." in done.err
    key = done.out.strip()
    assert key not in done.err
    assert key not in command("keys", "list", "--json").out
    async with db.connect() as conn:
        for table in metadata.sorted_tables:
            rows = (await conn.execute(text(f'SELECT "{table.name}"::text FROM "{table.name}"'))).scalars()
            assert not any(key in row for row in rows), table.name
        digests = (await conn.scalars(select(api_key_digests.c.digest))).all()
    assert {len(digest) for digest in digests} == {32}


async def test_everything_about_a_key_is_listed_but_the_key(command: Command, name: str):
    arguments = ("--scope", "app", "--scope", "public", "--workflow", "default", "--expires-in", "30d")
    made = said(command("keys", "create", "--name", name, *arguments, "--monthly-limit", "7", "--json"))
    assert re.fullmatch(r"[0-9a-f]{64}", made.pop("key"))
    ends = datetime.fromisoformat(made["expires_at"])
    assert abs(ends - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=5)
    assert made == {
        "id": made["id"],
        "name": name,
        "scopes": ["app", "public"],
        "workflows": ["default"],
        "state": "active",
        "active": True,
        "expires_at": made["expires_at"],
        "monthly_limit": 7,
        "last_used_at": None,
        "created_at": made["created_at"],
    }
    listed = {each["id"]: each for each in said(command("keys", "list", "--json"))}
    assert listed[made["id"]] == made | {"used_this_month": 0}
    assert made["id"] in command("keys", "list").out


@pytest.mark.parametrize(("scope", "limit"), [("app", None), ("admin", None), ("public", 1000)])
async def test_a_customers_key_has_a_limit_unless_it_is_given_another(
    command: Command, name: str, scope: str, limit: int | None
):
    made = said(command("keys", "create", "--name", name, "--scope", scope, "--json"))
    assert made["monthly_limit"] == limit


async def test_a_key_from_its_making_to_its_end(command: Command, service: Service, name: str):
    made = said(command("keys", "create", "--name", name, "--scope", "app", "--json"))
    assert await status(service, made["key"]) == 200
    rotated = said(command("keys", "rotate", made["id"], "--json"))
    until = datetime.fromisoformat(rotated["previous_until"])
    assert abs(until - datetime.now(UTC) - timedelta(hours=24)) < timedelta(minutes=5)
    assert rotated["key"] != made["key"]
    assert rotated["id"] == made["id"]
    assert await status(service, made["key"]) == 200
    assert await status(service, rotated["key"]) == 200
    # By its name, which no other has. The first one's grace does not grow.
    newest = command("keys", "rotate", name, "--grace", "0s")
    assert "The one before it works until" in newest.err
    assert [await status(service, key) for key in (made["key"], rotated["key"])] == [403, 403]
    assert await status(service, newest.out.strip()) == 200
    assert command("keys", "revoke", name).out == f"The key {name} opens nothing any more.\n"
    assert await status(service, newest.out.strip()) == 403
    assert said(command("keys", "revoke", made["id"], "--json"))["state"] == "revoked"


async def test_a_key_that_ends_says_so(command: Command, service: Service, name: str):
    made = said(command("keys", "create", "--name", name, "--scope", "app", "--expires-in", "1s", "--json"))
    answer = await service.http.get(RUNS, headers=bearer(made["key"]))
    while answer.status_code == 200:
        await asyncio.sleep(0.05)
        answer = await service.http.get(RUNS, headers=bearer(made["key"]))
    assert (answer.status_code, answer.json()) == (403, {"error": "API key has expired"})
    listed = {each["id"]: each for each in said(command("keys", "list", "--json"))}
    assert listed[made["id"]]["state"] == "expired"


CREATE = ("create", "--scope", "app", "--name")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((*CREATE, ""), "--name takes 1 to 255 printable characters"),
        ((*CREATE, " "), "--name takes 1 to 255 printable characters"),
        ((*CREATE, "a\nb"), "--name takes 1 to 255 printable characters"),
        ((*CREATE, "n" * 256), "--name takes 1 to 255 printable characters"),
        ((*CREATE, "x", "--workflow", "unknown"), "there is no workflow unknown"),
        ((*CREATE, "x", "--expires-in", "soon"), "--expires-in is a number with a unit"),
        ((*CREATE, "x", "--expires-in", "0d"), "--expires-in is at least 1 s"),
        ((*CREATE, "x", "--expires-in", "9999999w"), "--expires-in is at least 1 s, and at most 100 years"),
        (("revoke", "nobody"), "there is no key nobody"),
        (("rotate", str(uuid4())), "there is no key"),
        (("rotate", "nobody", "--grace", "-1h"), "--grace is a number with a unit"),
    ],
)
async def test_what_cannot_be_done_is_said_in_a_line(command: Command, arguments: tuple[str, ...], complaint: str):
    done = command("keys", *arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"switchboard: {complaint}")


@pytest.mark.parametrize("arguments", [("--scope", "root"), ("--scope", "app", "--monthly-limit", "0"), ()])
async def test_what_is_no_option_makes_no_key(command: Command, name: str, arguments: tuple[str, ...]):
    done = command("keys", "create", "--name", name, *arguments)
    assert (done.code, done.out) == (2, "")
    assert name not in command("keys", "list").out


async def test_two_of_a_name_are_told_apart_by_their_ids(command: Command, name: str):
    made = [said(command("keys", "create", "--name", name, "--scope", "app", "--json")) for _ in range(2)]
    done = command("keys", "revoke", name)
    assert (done.code, done.err) == (1, f"switchboard: 2 keys are named {name}; say which by its id\n")
    assert said(command("keys", "revoke", made[0]["id"], "--json"))["active"] is False


async def test_a_key_that_is_revoked_is_not_replaced(command: Command, name: str):
    said(command("keys", "create", "--name", name, "--scope", "app", "--json"))
    command("keys", "revoke", name)
    done = command("keys", "rotate", name)
    assert (done.code, done.out) == (1, "")
    assert f"the key {name} is revoked" in done.err


# Stored secrets.

OLDER = "an-older-app-secret-which-is-long-enough-too"
NEWER = "a-newer-app-secret-which-is-long-enough-too."


def test_every_column_that_is_sealed_is_one_that_can_be_sealed_anew():
    for column in SEALED:
        assert len(column.table.primary_key.columns) == 1


async def test_stored_secrets_are_sealed_anew(switchboard: Callable[..., Said], own_database: str):
    settings = settings_for(own_database, "redis://unused", None, app_secret=OLDER)
    engine = database.connect(own_database)
    async with engine.begin() as conn:
        for key in ("one", None):
            workflow = Workflow(f"with {key}", Hook("https://h.example/x", None if key is None else SecretStr(key)))
            assert await workflows.add(conn, settings, workflow)
    variables = {"DATABASE_URL": own_database, "REDIS_URL": "redis://127.0.0.1:1"}
    rotated = variables | {"APP_SECRET": NEWER, "APP_SECRET_PREVIOUS": OLDER}
    assert switchboard("secrets", "rotate", "--json", **rotated) == Said(0, '{"sealed": 1}\n', "")
    async with engine.connect() as conn:
        sealed = await conn.scalar(select(workflow_rows.c.hook_key).where(workflow_rows.c.hook_key.is_not(None)))
    assert Sealer(SecretStr(NEWER)).open(sealed or "").get_secret_value() == "one"
    # The older one is needed no more.
    done = switchboard("secrets", "rotate", **variables | {"APP_SECRET": NEWER})
    assert done.out.startswith("Stored secrets encrypted with APP_SECRET: 1, all that there are.\n")
    await engine.dispose()


async def test_nothing_is_sealed_anew_where_something_cannot_be_opened(
    switchboard: Callable[..., Said], own_database: str
):
    engine = database.connect(own_database)
    async with engine.begin() as conn:
        for name, secret in (("a", OLDER), ("b", "x" * 32)):
            settings = settings_for(own_database, "redis://unused", None, app_secret=secret)
            assert await workflows.add(conn, settings, Workflow(name, Hook("https://h.example/x", SecretStr("k"))))
        before = (await conn.execute(select(workflow_rows.c.hook_key).order_by(workflow_rows.c.id))).all()
    variables = {"DATABASE_URL": own_database, "REDIS_URL": "redis://127.0.0.1:1", "APP_SECRET": APP_SECRET}
    done = switchboard("secrets", "rotate", **variables, APP_SECRET_PREVIOUS=OLDER)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("switchboard: workflows b: a stored secret cannot be opened")
    async with engine.connect() as conn:
        assert (await conn.execute(select(workflow_rows.c.hook_key).order_by(workflow_rows.c.id))).all() == before
    await engine.dispose()
