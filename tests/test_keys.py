"""The commands that look after API keys and stored secrets."""

import asyncio
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr
from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database, workflows
from switchboard.access import keys, webhooks
from switchboard.happyrobot.client import Hook
from switchboard.sealing import Sealer, reseal
from switchboard.tables import SEALED, KeyScope, WebhookEvent, api_key_digests, api_keys, metadata
from switchboard.tables import workflows as workflow_rows
from switchboard.workflows import Workflow
from tests.conftest import APP_SECRET, Said, Service, bearer, settings_for, until
from tests.test_tokens import RUNS

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
    assert hashlib.sha256(key.encode()).digest() in digests


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
        "burst": None,
        "per_minute": None,
        "webhook": None,
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
    assert done.err.startswith(f"switchboard: 2 keys are named {name}; say which by its id: ")
    assert all(f"{each['id']} (active)" in done.err for each in made)
    assert said(command("keys", "revoke", made[0]["id"], "--json"))["active"] is False


@pytest.mark.parametrize("state", ["revoked", "expired"])
async def test_a_key_that_opens_nothing_is_not_replaced(command: Command, db: AsyncEngine, name: str, state: str):
    said(command("keys", "create", "--name", name, "--scope", "app", "--json"))
    values = {"active": False} if state == "revoked" else {"expires_at": text("now()")}
    async with db.begin() as conn:
        await conn.execute(update(api_keys).where(api_keys.c.name == name).values(values))
    done = command("keys", "rotate", name)
    assert (done.code, done.out) == (1, "")
    assert f"the key {name} is {state}" in done.err


async def digests_of(db: AsyncEngine, name: str) -> list[datetime | None]:
    """When each of a key's digests ends, the oldest first."""
    query = select(api_key_digests.c.expires_at).join(api_keys).where(api_keys.c.name == name)
    async with db.connect() as conn:
        return list(await conn.scalars(query.order_by(api_key_digests.c.created_at)))


async def test_a_grace_does_not_grow_and_ends_with_the_key(command: Command, db: AsyncEngine, name: str):
    made = said(command("keys", "create", "--name", name, "--scope", "app", "--expires-in", "10h", "--json"))
    said(command("keys", "rotate", name, "--grace", "1h", "--json"))
    first, current = await digests_of(db, name)
    assert current is None
    rotated = said(command("keys", "rotate", name, "--grace", "2d", "--json"))
    assert (await digests_of(db, name))[0] == first
    assert rotated["previous_until"] == made["expires_at"]


async def test_of_two_rotations_at_once_one_key_is_the_newest(db: AsyncEngine, name: str):
    async with db.begin() as conn:
        made, _ = await keys.create(conn, name, [KeyScope.APP])

    async def rotate() -> None:
        async with db.begin() as conn:
            await keys.rotate(conn, made.id, timedelta(hours=1))

    await asyncio.gather(rotate(), rotate(), rotate())
    ends = await digests_of(db, name)
    assert (len(ends), ends.count(None)) == (4, 1)


async def test_a_leaked_key_is_revoked_by_itself_and_never_repeated(
    switchboard: Command, environment: dict[str, str], name: str
):
    made = said(switchboard("keys", "create", "--name", name, "--scope", "app", "--json", **environment))
    done = switchboard("keys", "revoke", "-", stdin=f"{made['key']}\n", **environment)
    assert done.out == f"The key {name} opens nothing any more.\n"
    unknown = "0" * 64
    done = switchboard("keys", "revoke", unknown, **environment)
    assert (done.code, done.err) == (1, "switchboard: there is no such key; `switchboard keys list` shows them\n")


async def test_a_key_in_its_grace_stands_for_the_key_that_it_was(
    switchboard: Command, environment: dict[str, str], name: str
):
    made = said(switchboard("keys", "create", "--name", name, "--scope", "app", "--json", **environment))
    for grace in ("1h", "0s"):
        done = switchboard("keys", "rotate", name, "--grace", grace, "--json", **environment)
        assert said(done)["expires_at"] is None
        again = switchboard("keys", "rotate", "-", "--json", stdin=f"{made['key']}\n", **environment)
        assert said(again)["expires_at"] is None


async def test_at_night_a_key_is_revoked_with_nothing_but_the_database(
    switchboard: Command, database_url: str, command: Command, name: str, tmp_path: Path
):
    said(command("keys", "create", "--name", name, "--scope", "app", "--json"))
    variables = {"DATABASE_URL": database_url, "SWITCHBOARD_DATA_DIR": str(tmp_path / "data")}
    done = switchboard("keys", "revoke", name, **variables, ENVIRONMENT="production")
    assert done.out == f"The key {name} opens nothing any more.\n"
    assert switchboard("keys", "list", **variables).code == 0
    assert not (tmp_path / "data").exists(), "nothing was started"
    # But in production it is never the database of a developer.
    done = switchboard("keys", "list", SWITCHBOARD_DATA_DIR=str(tmp_path / "data"), ENVIRONMENT="production")
    assert (done.code, "DATABASE_URL: must be set" in done.err) == (1, True)
    assert not (tmp_path / "data").exists()


# How often a key may ask, and where its executions are reported.

HOOK = "https://customer.example/hooks?of=mine"
SECRET = "a-secret-of-the-customers-own"
DOCUMENTED = ["execution.started", "execution.completed", "execution.failed", "execution.pending_approval"]
PRODUCTION = {"ENVIRONMENT": "production", "APP_URL": "https://a.example", "HAPPYROBOT_X_API_KEY": "k"}


@dataclass(frozen=True)
class Stored:
    """What a key's row says about its webhooks."""

    events: list[str] | None
    sealed: str | None
    signing: tuple[str, ...]
    """The secrets that sign now, opened, the current one first."""


async def stored(db: AsyncEngine, name: str) -> Stored:
    query = select(api_keys.c.id, api_keys.c.webhook_events, api_keys.c.webhook_secret).where(api_keys.c.name == name)
    async with db.connect() as conn:
        row = (await conn.execute(query)).one()
        endpoint = await webhooks.endpoint_of(conn, settings_for("postgresql://unused", "redis://unused", None), row.id)
    signing = () if endpoint is None else tuple(secret.get_secret_value() for secret in endpoint.secrets)
    return Stored(row.webhook_events, row.webhook_secret, signing)


def reported(name: str, *more: str) -> tuple[str, ...]:
    """What creates a key whose executions are reported."""
    return ("keys", "create", "--name", name, "--scope", "public", "--webhook-url", HOOK, *more)


async def test_a_key_can_be_given_a_rate(command: Command, db: AsyncEngine, name: str):
    create = ("keys", "create", "--name", name, "--scope", "public", "--burst", "5", "--per-minute", "100000", "--json")
    made = said(command(*create))
    assert (made["burst"], made["per_minute"]) == (5, 100_000)
    async with db.connect() as conn:
        found = await keys.get(conn, UUID(made["id"]))
    assert found is not None
    assert (found.burst, found.per_minute) == (5, 100_000)
    assert "5 at once, 100000 a minute" in command("keys", "list").out


async def test_of_a_rate_that_is_given_in_part_the_rest_is_the_usual(command: Command, name: str):
    said(command("keys", "create", "--name", name, "--scope", "public", "--burst", "77", "--json"))
    assert "77 at once, 60 a minute" in command("keys", "list").out


async def test_a_keys_executions_are_reported_and_signed_with_a_secret_that_is_shown_once(
    command: Command, db: AsyncEngine, name: str
):
    done = command(*reported(name))
    assert re.fullmatch(r"[0-9a-f]{64}\n", done.out), "the key alone, so that it can be piped"
    [secret] = re.findall(
        r"^Its webhooks are signed with (whsec_\S{44})\. It is not shown again\.$", done.err, re.MULTILINE
    )
    row = await stored(db, name)
    assert (row.events, row.signing) == (None, (secret,))
    assert row.sealed is not None
    assert secret not in row.sealed
    listed = {each["name"]: each for each in said(command("keys", "list", "--json"))}
    assert listed[name]["webhook"] == {"url": HOOK, "events": DOCUMENTED}
    for arguments in (("list",), ("list", "--json"), ("rotate", name, "--json"), ("revoke", name, "--json")):
        done = command("keys", *arguments)
        assert done.code == 0
        assert secret not in done.out + done.err


async def test_a_key_is_made_with_the_events_and_the_secret_that_are_given(
    switchboard: Command, environment: dict[str, str], db: AsyncEngine, name: str
):
    events = ("--webhook-event", "execution.failed", "--webhook-event", "execution.cancelled")
    create = reported(name, *events, "--webhook-secret", "-")
    done = switchboard(*create, "--json", stdin=f"{SECRET}\n", **environment)
    assert said(done)["webhook"] == {"url": HOOK, "events": ["execution.failed", "execution.cancelled"]}
    assert SECRET not in done.out + done.err, "whoever gave it has it"
    row = await stored(db, name)
    assert (row.events, row.signing) == (["execution.cancelled", "execution.failed"], (SECRET,))


async def test_a_secret_that_is_made_is_in_the_json(command: Command, db: AsyncEngine, name: str):
    webhook = said(command(*reported(name, "--json")))["webhook"]
    assert (await stored(db, name)).signing == (webhook.pop("secret"),)
    assert webhook == {"url": HOOK, "events": DOCUMENTED}


async def test_the_list_fits_into_80_columns(command: Command, name: str):
    url = f"https://customer.example/{'x' * 200}"
    given = (f"{name} {'of a customer with a name ' * 3}", "--scope", "app", "--burst", "99999", "--per-minute", "9999")
    create = ("keys", "create", "--scope", "public", "--name", *given, "--webhook-url", url, "--expires-in", "30d")
    made = said(command(*create, "--webhook-event", "execution.pending_approval", "--json"))
    lines = command("keys", "list").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.strip().startswith(made["id"]) for line in lines), "in one piece"
    # As its column shows it.
    shown = "".join(line[: line.index("  ", 2) if "  " in line[2:] else None].strip() for line in lines)
    assert url.removeprefix("https://") in shown
    assert "execution.pending_approval" in shown


async def test_where_executions_are_reported_is_set_changed_and_stopped(command: Command, db: AsyncEngine, name: str):
    said(command("keys", "create", "--name", name, "--scope", "app", "--json"))
    done = command("keys", "webhook", name, "--url", HOOK, "--event", "execution.cancelled")
    assert done.out == f"Executions of {name} are reported to {HOOK}.\n"
    [secret] = re.findall(r"Its webhooks are signed with (whsec_\S+)\. It is not shown again\.", done.err)
    assert (await stored(db, name)).signing == (secret,)
    # What is not given anew stays.
    changed = said(command("keys", "webhook", name, "--url", f"{HOOK}/2", "--json"))
    assert changed["webhook"] == {"url": f"{HOOK}/2", "events": ["execution.cancelled"]}
    assert (await stored(db, name)).signing == (secret,)
    again = command("keys", "webhook", name, "--url", HOOK, "--event", "execution.failed", "--webhook-secret", SECRET)
    assert again == Said(0, f"Executions of {name} are reported to {HOOK}.\n", "")
    row = await stored(db, name)
    assert (row.events, row.signing) == (["execution.failed"], (SECRET,))
    stopped = command("keys", "webhook", name, "--off")
    assert stopped == Said(0, f"Executions of {name} are reported nowhere any more.\n", "")
    assert (await stored(db, name)).signing == ()
    assert said(command("keys", "webhook", name, "--off", "--json"))["webhook"] is None
    # What was so before it was stopped is so again.
    command("keys", "webhook", name, "--url", HOOK)
    assert await stored(db, name) == row


async def test_a_rotated_secret_signs_beside_the_one_before_until_the_grace_is_over(
    command: Command, db: AsyncEngine, name: str
):
    first = said(command(*reported(name, "--json")))["webhook"]["secret"]
    done = command("keys", "rotate-secret", name)
    second = done.out.strip()
    assert done.out == f"{second}\n", "alone, so that it can be piped"
    assert f"That signs the webhooks of {name} (" in done.err
    assert "The one before it signs them, too, until " in done.err
    assert second not in done.err
    assert (await stored(db, name)).signing == (second, first)
    # What was promised to the first is kept, unless nobody is to be waited for.
    again = command("keys", "rotate-secret", name)
    assert again.code == 1
    assert "--grace 0s replaces both at once" in again.err
    assert (await stored(db, name)).signing == (second, first)
    second = command("keys", "rotate-secret", name, "--grace", "0s").out.strip()
    assert (await stored(db, name)).signing == (second,)
    rotated = said(command("keys", "rotate-secret", name, "--grace", "1h", "--json"))
    until = datetime.fromisoformat(rotated["previous_until"])
    assert abs(until - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=5)
    third = rotated["webhook"]["secret"]
    assert (await stored(db, name)).signing == (third, second)
    async with db.begin() as conn:
        over = {"webhook_secret_before_until": text("now()")}
        await conn.execute(update(api_keys).where(api_keys.c.name == name).values(over))
    assert (await stored(db, name)).signing == (third,)


async def test_without_a_grace_only_the_new_secret_signs(
    switchboard: Command, environment: dict[str, str], db: AsyncEngine, name: str
):
    switchboard(*reported(name), **environment)
    rotate = ("keys", "rotate-secret", name, "--grace", "0s", "--webhook-secret", "-")
    done = switchboard(*rotate, stdin=f"{SECRET}\n", **environment)
    assert done.out == f"Webhooks of {name} are signed with the secret that was given.\n"
    assert SECRET not in done.err
    assert (await stored(db, name)).signing == (SECRET,)


async def test_of_those_who_set_a_webhook_at_once_one_is_told_its_secret(db: AsyncEngine, name: str):
    settings = settings_for("postgresql://unused", "redis://unused", None)
    async with db.begin() as conn:
        made, _ = await keys.create(conn, name, [KeyScope.PUBLIC])

    async def point() -> SecretStr | None:
        async with db.begin() as conn:
            return await webhooks.point(conn, settings, made.id, HOOK, None)

    told = [secret for secret in await asyncio.gather(*(point() for _ in range(5))) if secret is not None]
    assert (await stored(db, name)).signing == tuple(secret.get_secret_value() for secret in told)


REPORTED = (*CREATE, "x", "--webhook-url")
POINT = ("webhook", "nobody")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((*CREATE, "x", "--webhook-event", "execution.failed"), "--webhook-event and --webhook-secret go with"),
        ((*CREATE, "x", "--webhook-secret", SECRET), "--webhook-event and --webhook-secret go with --webhook-url"),
        ((*REPORTED, "customer.example"), "--webhook-url must be an http:// or https:// address"),
        ((*REPORTED, "https://u:very-secret@h/x"), "--webhook-url must not contain a user or a password"),
        ((*REPORTED, HOOK, "--webhook-secret", "very-secret-777"), "--webhook-secret takes 16 to 255 printable ASCII"),
        ((*REPORTED, HOOK, "--webhook-secret", "very-secret " * 2), "--webhook-secret takes 16 to 255 printable"),
        ((*REPORTED, HOOK, "--webhook-secret", "very-secret-ä" * 2), "--webhook-secret takes 16 to 255 printable"),
        ((*REPORTED, HOOK, "--webhook-secret", "s" * 256), "--webhook-secret takes 16 to 255 printable ASCII"),
        ((*REPORTED, HOOK, "--webhook-secret", "-"), "--webhook-secret takes 16 to 255 printable ASCII"),
        (POINT, "one of --url and --off is needed"),
        ((*POINT, "--url", HOOK, "--off"), "one of --url and --off is needed"),
        ((*POINT, "--off", "--event", "execution.failed"), "--event and --webhook-secret go with --url"),
        ((*POINT, "--off", "--webhook-secret", SECRET), "--event and --webhook-secret go with --url"),
        ((*POINT, "--url", "ftp://h"), "--url must be an http:// or https:// address"),
        ((*POINT, "--url", HOOK), "there is no key nobody"),
        ((*POINT, "--off"), "there is no key nobody"),
        (("webhook", "-", "--url", HOOK, "--webhook-secret", "-"), "standard input can hold the key or the secret"),
        (("rotate-secret", "-", "--webhook-secret", "-"), "standard input can hold the key or the secret, not both"),
        (("rotate-secret", "nobody", "--webhook-secret", "short"), "--webhook-secret takes 16 to 255 printable"),
        (("rotate-secret", "nobody", "--grace", "soon"), "--grace is a number with a unit"),
        (("rotate-secret", "nobody"), "there is no key nobody"),
    ],
)
async def test_webhooks_that_cannot_be_are_refused_in_a_line(
    command: Command, arguments: tuple[str, ...], complaint: str
):
    done = command("keys", *arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"switchboard: {complaint}")
    assert "very-secret" not in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--burst", "0"),
        ("--burst", "100001"),
        ("--per-minute", "0"),
        ("--per-minute", "100001"),
        ("--webhook-url", HOOK, "--webhook-event", "execution.paused"),
    ],
)
async def test_a_rate_or_an_event_that_there_is_not_makes_no_key(
    command: Command, name: str, arguments: tuple[str, ...]
):
    done = command("keys", "create", "--name", name, "--scope", "public", *arguments)
    assert (done.code, done.out) == (2, "")
    assert name not in command("keys", "list", "--json").out


@pytest.mark.parametrize("secret", ["s" * 16, "s" * 255])
async def test_a_secret_may_be_as_short_and_as_long_as_is_said(
    command: Command, db: AsyncEngine, name: str, secret: str
):
    assert command(*reported(name, "--webhook-secret", secret)).code == 0
    assert (await stored(db, name)).signing == (secret,)


async def test_of_a_key_that_opens_nothing_reports_can_only_be_stopped(command: Command, name: str):
    command(*reported(name))
    command("keys", "revoke", name)
    for arguments in (("webhook", name, "--url", HOOK), ("rotate-secret", name)):
        done = command("keys", *arguments)
        assert (done.code, done.out) == (1, "")
        assert f"the key {name} is revoked" in done.err
    assert command("keys", "webhook", name, "--off").code == 0


async def test_the_secret_of_a_key_that_is_reported_nowhere_is_not_replaced(command: Command, name: str):
    command("keys", "create", "--name", name, "--scope", "public")
    nowhere = f"executions of {name} are reported nowhere; `switchboard keys webhook` changes that"
    assert command("keys", "rotate-secret", name) == Said(1, "", f"switchboard: {nowhere}\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3", "[::1]", "169.254.169.254"])
async def test_an_address_that_is_not_on_the_internet_is_kept_and_warned_of(command: Command, name: str, host: str):
    url = f"http://{host}:8000/hooks"
    warning = f"{host.strip('[]')} is not on the internet: webhooks to it are refused unless ALLOW_PRIVATE_WEBHOOKS"
    create = ("keys", "create", "--name", name, "--scope", "public", "--json", "--webhook-url", url)
    done = command(*create)
    assert said(done)["webhook"]["url"] == url
    assert done.err.startswith(warning)
    assert command("keys", "webhook", name, "--url", url).err.startswith(warning)
    assert command("keys", "webhook", name, "--url", url, ALLOW_PRIVATE_WEBHOOKS="true").err == ""


@pytest.mark.parametrize("url", [HOOK, "http://1.1.1.1/hooks", "http://localhost/hooks"])
async def test_of_names_and_of_addresses_on_the_internet_nobody_is_warned(command: Command, name: str, url: str):
    assert command("keys", "create", "--name", name, "--scope", "public", "--json", "--webhook-url", url).err == ""


async def test_in_production_webhooks_are_encrypted(command: Command, name: str):
    create = ("keys", "create", "--name", name, "--scope", "public")
    done = command(*create, "--webhook-url", "http://customer.example/hooks", **PRODUCTION)
    assert done == Said(1, "", "switchboard: --webhook-url must be an https:// address\n")
    assert command(*create, "--webhook-url", HOOK, **PRODUCTION).code == 0
    done = command("keys", "webhook", name, "--url", "http://customer.example/hooks", **PRODUCTION)
    assert done == Said(1, "", "switchboard: --url must be an https:// address\n")


async def test_only_what_seals_a_secret_needs_the_secret_that_seals_it(
    switchboard: Command, environment: dict[str, str], database_url: str, command: Command, name: str
):
    command(*reported(f"reported {name}"))
    database_alone = {"DATABASE_URL": database_url, "ENVIRONMENT": "production"}
    assert switchboard("keys", "create", "--name", name, "--scope", "app", "--burst", "5", **database_alone).code == 0
    assert switchboard("keys", "webhook", f"reported {name}", "--off", **database_alone).code == 0
    unsealed = environment | PRODUCTION | {"APP_SECRET": ""}
    for arguments in (
        reported(f"another {name}"),
        ("keys", "webhook", name, "--url", HOOK),
        ("keys", "rotate-secret", name),
    ):
        done = switchboard(*arguments, **unsealed)
        assert (done.code, done.out) == (1, "")
        assert "APP_SECRET: must be set" in done.err
    assert f"another {name}" not in command("keys", "list", "--json").out


def test_everything_is_reported_but_what_has_to_be_asked_for():
    """As the help says."""
    assert set(WebhookEvent) - set(webhooks.DOCUMENTED) == {WebhookEvent.CANCELLED}


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


async def test_a_secret_that_is_set_meanwhile_is_not_overwritten_by_the_one_before(own_database: str):
    settings = settings_for(own_database, "redis://unused", None, app_secret=OLDER)
    sealer = Sealer(SecretStr(NEWER), SecretStr(OLDER))
    engine = database.connect(own_database)
    async with engine.begin() as conn:
        assert await workflows.add(conn, settings, Workflow("w", Hook("https://h.example/x", SecretStr("before"))))

    async def anew() -> int:
        async with engine.begin() as conn:
            return await reseal(conn, sealer)

    async def waits() -> bool:
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        async with engine.connect() as conn:
            return bool(await conn.scalar(text(waiting)))

    async with engine.begin() as conn:
        await conn.execute(update(workflow_rows).values(hook_key=sealer.seal("meanwhile")))
        sealing = asyncio.create_task(anew())
        await until(waits)
    assert await sealing == 1
    async with engine.connect() as conn:
        sealed = await conn.scalar(select(workflow_rows.c.hook_key))
    assert sealer.open(sealed or "").get_secret_value() == "meanwhile"
    await engine.dispose()


@pytest.mark.parametrize("rest", ["", "short", "not*base64*not*base64*not*base64", "QUJDREVGR0hJSktMTU5PUA=="])
async def test_a_secret_in_the_form_of_standard_webhooks_is_one(command: Command, name: str, rest: str):
    """Else their libraries would make another key of it than we do."""
    refused = command(
        *("keys", "create", "--name", name, "--scope", "public", "--webhook-url", "https://a.example"),
        *("--webhook-secret", f"whsec_{rest}".ljust(16, "=")),
    )
    assert refused.code == 1
    assert "Base64 of 24 bytes or more" in refused.err
