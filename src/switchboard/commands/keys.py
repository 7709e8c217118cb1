"""`switchboard keys`: who may ask."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from pydantic import SecretStr
from rich import box
from rich.console import Console
from rich.table import Column, Table
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard import workflows
from switchboard.access import keys, webhooks
from switchboard.access.keys import ApiKey
from switchboard.access.rates import BURST, PER_MINUTE
from switchboard.commands.running import Json, address, in_database, read, refuse, two_lines
from switchboard.deliveries.sender import is_public
from switchboard.events import iso
from switchboard.settings import Settings
from switchboard.tables import KeyScope, WebhookEvent
from switchboard.workflows import DEFAULT_WORKFLOW

app = typer.Typer(help="API keys of your own applications and of your customers' websites.", no_args_is_help=True)

_PUBLIC_LIMIT = 1000
"""Executions a month of a customer's key that is not given another limit."""

_LONGEST_NAME = 255

_HIGHEST_RATE = 100_000

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_LONGEST = timedelta(days=36_500)

_Key = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="The key's id, its name if no other has it, or - to read the key itself from stdin."
    ),
]

_Secret = Annotated[
    str | None,
    typer.Option(
        "--webhook-secret",
        help="Signs its webhooks, in place of one that is made here; - reads it from stdin.",
        show_default=False,
    ),
]

_Grace = Annotated[str, typer.Option(help="How long the one that it replaces goes on working; 0s for not at all.")]


@dataclass(frozen=True, slots=True)
class _Webhook:
    """Where a key's executions are to be reported; None for the events and the secret that it has, or the usual."""

    url: str
    events: Sequence[WebhookEvent] | None
    secret: SecretStr | None


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
    webhook_secret: _Secret = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown this once; only its SHA-256 is kept."""
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable() or not name.strip():
        refuse(f"--name takes 1 to {_LONGEST_NAME} printable characters")
    lifetime = None if expires_in is None else _duration("--expires-in", expires_in, least=timedelta(seconds=1))
    if monthly_limit is None and KeyScope.PUBLIC in scope:
        monthly_limit = _PUBLIC_LIMIT
    if webhook_url is None and (webhook_event or webhook_secret is not None):
        refuse("--webhook-event and --webhook-secret go with --webhook-url")
    wanted = None if webhook_url is None else _webhook("--webhook-url", webhook_url, webhook_event, webhook_secret)

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
        made, secret = await _report(conn, settings, made, wanted)
        return made, key, secret

    made, key, secret = in_database(work, sealing=wanted is not None)
    _warn_of_private(made)
    _hand_over(made, key, as_json, secret=secret)


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
def revoke(key: _Key, as_json: Json = False) -> None:
    """Make a key open nothing any more, at once, and the browser tokens that it has given neither."""

    async def work(conn: AsyncConnection, _: Settings) -> ApiKey:
        found = await only(conn, key)
        await keys.revoke(conn, found.id)
        return await _again(conn, found)

    revoked = in_database(work, sealing=False)
    typer.echo(json.dumps(_shown(revoked), indent=2) if as_json else f"The key {revoked.name} opens nothing any more.")


@app.command()
def rotate(key: _Key, grace: _Grace = "24h", as_json: Json = False) -> None:
    """Make another key in place of one, with all that it may. Both work until the grace is over."""
    period = _duration("--grace", grace, least=timedelta(0))

    async def work(conn: AsyncConnection, _: Settings) -> tuple[ApiKey, SecretStr, datetime]:
        found = await _good(conn, key)
        return found, *await keys.rotate(conn, found.id, period)

    rotated, secret, until = in_database(work, sealing=False)
    _hand_over(rotated, secret, as_json, previous_until=until)


@app.command()
def webhook(
    key: _Key,
    url: Annotated[str | None, typer.Option(help="Where its executions are reported.", show_default=False)] = None,
    event: Annotated[
        list[WebhookEvent] | None,
        typer.Option(help="What is reported of them.", show_default="as before; at first all but execution.cancelled"),
    ] = None,
    webhook_secret: _Secret = None,
    off: Annotated[bool, typer.Option("--off", help="Report them nowhere any more.")] = False,
    as_json: Json = False,
) -> None:
    """Set or change where a key's executions are reported, or stop it. It keeps its secret unless another is given."""
    if off == (url is not None):
        refuse("one of --url and --off is needed")
    if off and (event or webhook_secret is not None):
        refuse("--event and --webhook-secret go with --url")
    _require_one_reader(key, webhook_secret)
    wanted = None if url is None else _webhook("--url", url, event, webhook_secret)

    async def work(conn: AsyncConnection, settings: Settings) -> tuple[ApiKey, SecretStr | None]:
        if wanted is not None:
            return await _report(conn, settings, await _good(conn, key), wanted)
        found = await only(conn, key)
        await webhooks.stop(conn, found.id)
        return await _again(conn, found), None

    changed, secret = in_database(work, sealing=wanted is not None)
    _warn_of_private(changed)
    if as_json:
        typer.echo(json.dumps(_shown(changed, secret), indent=2))
        return
    where = "nowhere any more" if changed.webhook_url is None else f"to {changed.webhook_url}"
    typer.echo(f"Executions of {changed.name} are reported {where}.")
    _say_secret(secret)


@app.command()
def rotate_secret(key: _Key, grace: _Grace = "24h", webhook_secret: _Secret = None, as_json: Json = False) -> None:
    """Make another secret for a key's webhooks in place of one. Both sign until the grace is over."""
    period = _duration("--grace", grace, least=timedelta(0))
    _require_one_reader(key, webhook_secret)
    given = _signing(webhook_secret)

    async def work(conn: AsyncConnection, settings: Settings) -> tuple[ApiKey, SecretStr, datetime]:
        found = await _good(conn, key)
        if found.webhook_url is None:
            refuse(f"executions of {found.name} are reported nowhere; `switchboard keys webhook` changes that")
        return found, *await webhooks.rotate(conn, settings, found.id, period, given)

    rotated, secret, until = in_database(work)
    made = secret if given is None else None
    if as_json:
        typer.echo(json.dumps(_shown(rotated, made) | {"previous_until": iso(until)}, indent=2))
        return
    if made is None:
        typer.echo(f"Webhooks of {rotated.name} are signed with the secret that was given.")
    else:
        # Alone on standard output, as a key is.
        typer.echo(made.get_secret_value())
        typer.echo(f"That signs the webhooks of {rotated.name} ({rotated.id}). It is not shown again.", err=True)
    typer.echo(f"The one before it signs them, too, until {iso(until)}.", err=True)


def _webhook(option: str, url: str, events: Sequence[WebhookEvent] | None, secret: str | None) -> _Webhook:
    return _Webhook(address(option, url), events or None, _signing(secret))


def _signing(given: str | None) -> SecretStr | None:
    if given is None:
        return None
    secret = read(given)
    if not re.fullmatch(r"[\x21-\x7e]{16,255}", secret):
        refuse("--webhook-secret takes 16 to 255 printable ASCII characters without spaces")
    return SecretStr(secret)


def _require_one_reader(key: str, secret: str | None) -> None:
    if key == secret == "-":
        refuse("standard input can hold the key or the secret, not both")


async def _report(
    conn: AsyncConnection, settings: Settings, key: ApiKey, wanted: _Webhook
) -> tuple[ApiKey, SecretStr | None]:
    """Has a key's executions reported; returns the key as it is then, and its secret if that was made here."""
    events = wanted.events or key.webhook_events
    fresh = await webhooks.point(conn, settings, key.id, wanted.url, events, wanted.secret)
    return await _again(conn, key), fresh if wanted.secret is None else None


def _warn_of_private(key: ApiKey) -> None:
    host = urlsplit(key.webhook_url or "").hostname or ""
    try:
        public = is_public(ip_address(host))
    except ValueError:
        return  # a name: where it leads is looked up with each webhook
    if not public and not Settings().allow_private_webhooks:
        typer.echo(
            f"{host} is not on the internet: webhooks to it are refused unless ALLOW_PRIVATE_WEBHOOKS is set", err=True
        )


def _say_secret(secret: SecretStr | None) -> None:
    if secret is not None:
        typer.echo(f"Its webhooks are signed with {secret.get_secret_value()}. It is not shown again.", err=True)


async def _again(conn: AsyncConnection, key: ApiKey) -> ApiKey:
    """A key as it is now."""
    found = await keys.get(conn, key.id)
    assert found is not None  # noqa: S101  # keys are never deleted
    return found


async def _good(conn: AsyncConnection, text: str) -> ApiKey:
    """The key that is meant, if it still opens anything."""
    found = await only(conn, text)
    if not found.good:
        refuse(f"the key {found.name} is {_state(found)}; `switchboard keys create` makes a new one")
    return found


async def only(conn: AsyncConnection, text: str) -> ApiKey:
    """The key that is meant: its id, its name if no other has it, or - where the key itself is on standard input."""
    text = read(text)
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
        typer.echo(json.dumps({"key": text} | _shown(made, secret) | more, indent=2))
        return
    # The key alone on standard output, so that it can be piped to where it belongs.
    typer.echo(text)
    typer.echo(f"That is the key of {made.name} ({made.id}). It is not shown again.", err=True)
    _say_secret(secret)
    if previous_until is not None:
        typer.echo(f"The one before it works until {iso(previous_until)}.", err=True)


def _shown(key: ApiKey, secret: SecretStr | None = None) -> dict[str, Any]:
    """Everything about a key but the key; of its webhooks' secret only one that was just made."""
    return {
        "id": str(key.id),
        "name": key.name,
        "scopes": sorted(key.scopes),
        "workflows": None if key.workflows is None else sorted(key.workflows),
        "state": _state(key),
        "active": key.active,
        "expires_at": None if key.expires_at is None else iso(key.expires_at),
        "monthly_limit": key.monthly_limit,
        "burst": key.burst,
        "per_minute": key.per_minute,
        "webhook": None if key.webhook_url is None else _shown_webhook(key, secret),
        "last_used_at": None if key.last_used_at is None else iso(key.last_used_at),
        "created_at": iso(key.created_at),
    }


def _shown_webhook(key: ApiKey, secret: SecretStr | None) -> dict[str, Any]:
    told = webhooks.DOCUMENTED if key.webhook_events is None else key.webhook_events
    shown = {"url": key.webhook_url, "events": [event for event in WebhookEvent if event in told]}
    return shown if secret is None else shown | {"secret": secret.get_secret_value()}
