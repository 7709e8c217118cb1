"""`switchboard keys`: who may ask."""

import json
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from rich import box
from rich.console import Console
from rich.table import Column, Table
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard import workflows
from switchboard.access import keys
from switchboard.access.keys import ApiKey
from switchboard.commands.running import Json, in_database, refuse
from switchboard.events import iso
from switchboard.settings import Settings
from switchboard.tables import KeyScope
from switchboard.workflows import DEFAULT_WORKFLOW

app = typer.Typer(help="API keys of your own applications and of your customers' websites.", no_args_is_help=True)

_PUBLIC_LIMIT = 1000
"""Executions a month of a customer's key that is not given another limit."""

_LONGEST_NAME = 255

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_LONGEST = timedelta(days=36_500)

_Key = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="The key's id, its name if no other has it, or - to read the key itself from stdin."
    ),
]


def _duration(option: str, text: str, *, least: timedelta) -> timedelta:
    match = re.fullmatch(r"(\d{1,7})([smhdw])", text.strip())
    if match is None:
        refuse(f"{option} is a number with a unit, such as 90m, 24h, 30d or 8w")
    duration = timedelta(**{_UNITS[match[2]]: int(match[1])})
    if not least <= duration <= _LONGEST:
        refuse(f"{option} is at least {int(least.total_seconds())} s, and at most 100 years")
    return duration


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Whose it is; shown in lists.")],
    scope: Annotated[
        list[KeyScope],
        typer.Option(
            help="What it opens: `app` /api/happyrobot/* and /api/events, `public` the Public API, `admin` what an "
            "operator may do."
        ),
    ],
    workflow: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="A workflow that it may use.", show_default="all")
    ] = None,
    expires_in: Annotated[
        str | None, typer.Option(help="How long it lasts, such as 30d.", show_default="for ever")
    ] = None,
    monthly_limit: Annotated[
        int | None,
        typer.Option(
            min=1, max=2**31 - 1, help="Executions a month.", show_default=f"{_PUBLIC_LIMIT} with `public`, else any"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown this once; only its SHA-256 is kept."""
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable() or not name.strip():
        refuse(f"--name takes 1 to {_LONGEST_NAME} printable characters")
    lifetime = None if expires_in is None else _duration("--expires-in", expires_in, least=timedelta(seconds=1))
    if monthly_limit is None and KeyScope.PUBLIC in scope:
        monthly_limit = _PUBLIC_LIMIT

    async def work(conn: AsyncConnection, _: Settings) -> tuple[ApiKey, SecretStr]:
        await _require_workflows(conn, workflow or [])
        return await keys.create(
            conn, name, scope, workflows=workflow or None, lifetime=lifetime, monthly_limit=monthly_limit
        )

    made, secret = in_database(work, sealing=False)
    _hand_over(made, secret, as_json)


async def _require_workflows(conn: AsyncConnection, wanted: Sequence[str]) -> None:
    known = {DEFAULT_WORKFLOW, *(each.id for each, _ in await workflows.listed(conn))}
    if unknown := [each for each in wanted if each not in known]:
        refuse(f"there is no workflow {unknown[0]}; `switchboard workflows add` registers one")


@app.command(name="list")
def show(as_json: Json = False) -> None:
    """List the keys, newest first, without what nobody has but their owners."""

    async def work(conn: AsyncConnection, _: Settings) -> list[dict[str, Any]]:
        return [_shown(key) | {"used_this_month": used} for key, used in await keys.listed(conn)]

    found = in_database(work, sealing=False)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    # In lines, so that it fits into a terminal of 80 columns.
    table = Table(Column("key", no_wrap=True), "opens", "state", "last used", box=box.HORIZONTALS, show_lines=True)
    for each in found:
        limit, workflow_ids = each["monthly_limit"], each["workflows"]
        used = f"{each['used_this_month']}{'' if limit is None else f' of {limit}'} this month"
        table.add_row(
            f"{each['name']}\n{each['id']}\n{used}",
            "\n".join([", ".join(each["scopes"]), *(["all workflows"] if workflow_ids is None else workflow_ids)]),
            f"{each['state']}\n{_two_lines(each['expires_at'], 'for ever')}",
            _two_lines(each["last_used_at"], "never"),
        )
    Console(highlight=False, markup=False).print(table)


def _two_lines(moment: str | None, otherwise: str) -> str:
    return otherwise if moment is None else f"{moment[:10]}\n{moment[11:16]}Z"


@app.command()
def revoke(key: _Key, as_json: Json = False) -> None:
    """Make a key open nothing any more, at once, and the browser tokens that it has given neither."""

    async def work(conn: AsyncConnection, _: Settings) -> ApiKey | None:
        found = await _only(conn, key)
        await keys.revoke(conn, found.id)
        return await keys.get(conn, found.id)

    revoked = in_database(work, sealing=False)
    assert revoked is not None  # noqa: S101  # it was found in the same transaction
    typer.echo(json.dumps(_shown(revoked), indent=2) if as_json else f"The key {revoked.name} opens nothing any more.")


@app.command()
def rotate(
    key: _Key,
    grace: Annotated[
        str, typer.Option(help="How long the one that it replaces goes on working; 0s for not at all.")
    ] = "24h",
    as_json: Json = False,
) -> None:
    """Make another key in place of one, with all that it may. Both work until the grace is over."""
    period = _duration("--grace", grace, least=timedelta(0))

    async def work(conn: AsyncConnection, _: Settings) -> tuple[ApiKey, SecretStr, datetime]:
        found = await _only(conn, key)
        if not found.good:
            refuse(f"the key {found.name} is {_state(found)}; `switchboard keys create` makes a new one")
        return found, *await keys.rotate(conn, found.id, period)

    rotated, secret, until = in_database(work, sealing=False)
    _hand_over(rotated, secret, as_json, previous_until=until)


async def _only(conn: AsyncConnection, text: str) -> ApiKey:
    if text == "-":
        text = sys.stdin.readline().strip()
    found = await keys.named(conn, text)
    if not found:
        # A key itself is not repeated.
        refuse(f"there is no {'such key' if keys.is_one(text) else f'key {text}'}; `switchboard keys list` shows them")
    if len(found) > 1:
        which = ", ".join(f"{key.id} ({_state(key)})" for key in found)
        refuse(f"{len(found)} keys are named {text}; say which by its id: {which}")
    return found[0]


def _state(key: ApiKey) -> str:
    return "revoked" if not key.active else "expired" if key.expired else "active"


def _hand_over(key: ApiKey, secret: SecretStr, as_json: bool, *, previous_until: datetime | None = None) -> None:
    text = secret.get_secret_value()
    if as_json:
        more = {} if previous_until is None else {"previous_until": iso(previous_until)}
        typer.echo(json.dumps({"key": text} | _shown(key) | more, indent=2))
        return
    # The key alone on standard output, so that it can be piped to where it belongs.
    typer.echo(text)
    typer.echo(f"That is the key of {key.name} ({key.id}). It is not shown again.", err=True)
    if previous_until is not None:
        typer.echo(f"The one before it works until {iso(previous_until)}.", err=True)


def _shown(key: ApiKey) -> dict[str, Any]:
    return {
        "id": str(key.id),
        "name": key.name,
        "scopes": sorted(key.scopes),
        "workflows": None if key.workflows is None else sorted(key.workflows),
        "state": _state(key),
        "active": key.active,
        "expires_at": None if key.expires_at is None else iso(key.expires_at),
        "monthly_limit": key.monthly_limit,
        "last_used_at": None if key.last_used_at is None else iso(key.last_used_at),
        "created_at": iso(key.created_at),
    }
