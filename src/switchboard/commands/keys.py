"""`switchboard keys`: who may ask."""

import json
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
from switchboard.access.rates import BURST, PER_MINUTE
from switchboard.commands.keyring import Grace, Key, again, duration, good, only, say_secret, shown
from switchboard.commands.running import Json, in_database, refuse, two_lines
from switchboard.commands.webhooks import Secret, report, reported, rotate_secret, warn_of_private, webhook
from switchboard.events import iso
from switchboard.settings import Settings
from switchboard.tables import KeyScope, WebhookEvent
from switchboard.workflows import DEFAULT_WORKFLOW

app = typer.Typer(help="API keys of your own applications and of your customers' websites.", no_args_is_help=True)

_PUBLIC_LIMIT = 1000
"""Executions a month of a customer's key that is not given another limit."""

_LONGEST_NAME = 255

_HIGHEST_RATE = 100_000


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
    burst: Annotated[
        int | None,
        typer.Option(min=1, max=_HIGHEST_RATE, help="Requests to the Public API at once.", show_default=str(BURST)),
    ] = None,
    per_minute: Annotated[
        int | None,
        typer.Option(
            min=1, max=_HIGHEST_RATE, help="Requests to the Public API a minute.", show_default=str(PER_MINUTE)
        ),
    ] = None,
    webhook_url: Annotated[
        str | None, typer.Option(help="Where its executions are reported.", show_default="nowhere")
    ] = None,
    webhook_event: Annotated[
        list[WebhookEvent] | None,
        typer.Option(help="What is reported of them.", show_default="all but execution.cancelled"),
    ] = None,
    webhook_secret: Secret = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown this once; only its SHA-256 is kept."""
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable() or not name.strip():
        refuse(f"--name takes 1 to {_LONGEST_NAME} printable characters")
    lifetime = None if expires_in is None else duration("--expires-in", expires_in, least=timedelta(seconds=1))
    if monthly_limit is None and KeyScope.PUBLIC in scope:
        monthly_limit = _PUBLIC_LIMIT
    if webhook_url is None and (webhook_event or webhook_secret is not None):
        refuse("--webhook-event and --webhook-secret go with --webhook-url")
    wanted = None if webhook_url is None else reported("--webhook-url", webhook_url, webhook_event, webhook_secret)

    async def work(conn: AsyncConnection, settings: Settings) -> tuple[ApiKey, SecretStr, SecretStr | None]:
        await _require_workflows(conn, workflow or [])
        made, key = await keys.create(
            conn,
            name,
            scope,
            workflows=workflow or None,
            lifetime=lifetime,
            monthly_limit=monthly_limit,
            burst=burst,
            per_minute=per_minute,
        )
        if wanted is None:
            return made, key, None
        made, secret = await report(conn, settings, made, wanted)
        return made, key, secret

    made, key, secret = in_database(work, sealing=wanted is not None)
    warn_of_private(made)
    _hand_over(made, key, as_json, secret=secret)


async def _require_workflows(conn: AsyncConnection, wanted: Sequence[str]) -> None:
    known = {DEFAULT_WORKFLOW, *(each.id for each, _ in await workflows.listed(conn))}
    if unknown := [each for each in wanted if each not in known]:
        refuse(f"there is no workflow {unknown[0]}; `switchboard workflows add` registers one")


@app.command(name="list")
def show(as_json: Json = False) -> None:
    """List the keys, newest first, without what nobody has but their owners."""

    async def work(conn: AsyncConnection, _: Settings) -> list[dict[str, Any]]:
        return [shown(key) | {"used_this_month": used} for key, used in await keys.listed(conn)]

    found = in_database(work, sealing=False)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    # In lines, so that it fits into a terminal of 80 columns.
    table = Table(
        Column("key", overflow="fold", min_width=36),  # an id is copied from here, and stays in one piece
        "opens",
        "state",
        "last used",
        box=box.HORIZONTALS,
        show_lines=True,
    )
    for each in found:
        workflow_ids, ends, used = each["workflows"], each["expires_at"], each["last_used_at"]
        table.add_row(
            "\n".join([each["name"], each["id"], *_limits(each), *_reports(each["webhook"])]),
            "\n".join([", ".join(each["scopes"]), *(["all workflows"] if workflow_ids is None else workflow_ids)]),
            f"{each['state']}\n{'for ever' if ends is None else two_lines(ends)}",
            "never" if used is None else two_lines(used),
        )
    Console(highlight=False, markup=False).print(table)


def _limits(shown: dict[str, Any]) -> list[str]:
    limit, burst, per_minute = shown["monthly_limit"], shown["burst"], shown["per_minute"]
    used = f"{shown['used_this_month']}{'' if limit is None else f' of {limit}'} this month"
    if burst is None and per_minute is None:
        return [used]
    return [used, f"{burst or BURST} at once, {per_minute or PER_MINUTE} a minute"]


def _reports(webhook: dict[str, Any] | None) -> list[str]:
    return [] if webhook is None else [f"reports to {webhook['url']}", ", ".join(webhook["events"])]


@app.command()
def revoke(key: Key, as_json: Json = False) -> None:
    """Make a key open nothing any more, at once, and the browser tokens that it has given neither."""

    async def work(conn: AsyncConnection, _: Settings) -> ApiKey:
        found = await only(conn, key)
        await keys.revoke(conn, found.id)
        return await again(conn, found)

    revoked = in_database(work, sealing=False)
    typer.echo(json.dumps(shown(revoked), indent=2) if as_json else f"The key {revoked.name} opens nothing any more.")


@app.command()
def rotate(key: Key, grace: Grace = "24h", as_json: Json = False) -> None:
    """Make another key in place of one, with all that it may. Both work until the grace is over."""
    period = duration("--grace", grace, least=timedelta(0))

    async def work(conn: AsyncConnection, _: Settings) -> tuple[ApiKey, SecretStr, datetime]:
        found = await good(conn, key)
        return found, *await keys.rotate(conn, found.id, period)

    rotated, secret, until = in_database(work, sealing=False)
    _hand_over(rotated, secret, as_json, previous_until=until)


app.command()(webhook)
app.command()(rotate_secret)


def _hand_over(
    made: ApiKey,
    key: SecretStr,
    as_json: bool,
    *,
    secret: SecretStr | None = None,
    previous_until: datetime | None = None,
) -> None:
    text = key.get_secret_value()
    if as_json:
        more = {} if previous_until is None else {"previous_until": iso(previous_until)}
        typer.echo(json.dumps({"key": text} | shown(made, secret) | more, indent=2))
        return
    # The key alone on standard output, so that it can be piped to where it belongs.
    typer.echo(text)
    typer.echo(f"That is the key of {made.name} ({made.id}). It is not shown again.", err=True)
    say_secret(secret)
    if previous_until is not None:
        typer.echo(f"The one before it works until {iso(previous_until)}.", err=True)
