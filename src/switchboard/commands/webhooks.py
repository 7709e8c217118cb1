"""`switchboard keys webhook` and `rotate-secret`: where a key's executions are reported, and what signs it."""

import base64
import binascii
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Annotated
from urllib.parse import urlsplit

import typer
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.access import webhooks
from switchboard.access.keys import ApiKey
from switchboard.commands.keyring import Grace, Key, again, duration, good, only, say_secret, shown
from switchboard.commands.running import Json, address, in_database, read, refuse
from switchboard.deliveries.sender import is_public
from switchboard.events import iso
from switchboard.settings import Settings
from switchboard.tables import WebhookEvent

Secret = Annotated[
    str | None,
    typer.Option(
        "--webhook-secret",
        help="Signs its webhooks, in place of one that is made here; - reads it from stdin.",
        show_default=False,
    ),
]

_SHORTEST_KEY = 24
"""Bytes, as Standard Webhooks has it."""


@dataclass(frozen=True, slots=True)
class Reported:
    """Where a key's executions are to be reported; None for the events and the secret that it has, or the usual."""

    url: str
    events: Sequence[WebhookEvent] | None
    secret: SecretStr | None


def webhook(
    key: Key,
    url: Annotated[str | None, typer.Option(help="Where its executions are reported.", show_default=False)] = None,
    event: Annotated[
        list[WebhookEvent] | None,
        typer.Option(help="What is reported of them.", show_default="as before; at first all but execution.cancelled"),
    ] = None,
    webhook_secret: Secret = None,
    off: Annotated[bool, typer.Option("--off", help="Report them nowhere any more.")] = False,
    as_json: Json = False,
) -> None:
    """Set or change where a key's executions are reported, or stop it. It keeps its secret unless another is given."""
    if off == (url is not None):
        refuse("one of --url and --off is needed")
    if off and (event or webhook_secret is not None):
        refuse("--event and --webhook-secret go with --url")
    _require_one_reader(key, webhook_secret)
    wanted = None if url is None else reported("--url", url, event, webhook_secret)

    async def work(conn: AsyncConnection, settings: Settings) -> tuple[ApiKey, SecretStr | None]:
        if wanted is not None:
            return await report(conn, settings, await good(conn, key), wanted)
        found = await only(conn, key)
        await webhooks.stop(conn, found.id)
        return await again(conn, found), None

    changed, secret = in_database(work, sealing=wanted is not None)
    warn_of_private(changed)
    if as_json:
        typer.echo(json.dumps(shown(changed, secret), indent=2))
        return
    where = "nowhere any more" if changed.webhook_url is None else f"to {changed.webhook_url}"
    typer.echo(f"Executions of {changed.name} are reported {where}.")
    say_secret(secret)


def rotate_secret(key: Key, grace: Grace = "24h", webhook_secret: Secret = None, as_json: Json = False) -> None:
    """Make another secret for a key's webhooks in place of one. Both sign until the grace is over."""
    period = duration("--grace", grace, least=timedelta(0))
    _require_one_reader(key, webhook_secret)
    given = _signing(webhook_secret)

    async def work(conn: AsyncConnection, settings: Settings) -> tuple[ApiKey, SecretStr, datetime]:
        found = await good(conn, key)
        if found.webhook_url is None:
            refuse(f"executions of {found.name} are reported nowhere; `switchboard keys webhook` changes that")
        until = await webhooks.replaced_until(conn, found.id)
        if until is not None and period:
            refuse(f"the secret before this one signs until {iso(until)}; --grace 0s replaces both at once")
        return found, *await webhooks.rotate(conn, settings, found.id, period, given)

    rotated, secret, until = in_database(work)
    made = secret if given is None else None
    if as_json:
        typer.echo(json.dumps(shown(rotated, made) | {"previous_until": iso(until)}, indent=2))
        return
    if made is None:
        typer.echo(f"Webhooks of {rotated.name} are signed with the secret that was given.")
    else:
        # Alone on standard output, as a key is.
        typer.echo(made.get_secret_value())
        typer.echo(f"That signs the webhooks of {rotated.name} ({rotated.id}). It is not shown again.", err=True)
    typer.echo(f"The one before it signs them, too, until {iso(until)}.", err=True)


def reported(option: str, url: str, events: Sequence[WebhookEvent] | None, secret: str | None) -> Reported:
    return Reported(address(option, url), events or None, _signing(secret))


def _signing(given: str | None) -> SecretStr | None:
    if given is None:
        return None
    secret = read(given)
    if not re.fullmatch(r"[\x21-\x7e]{16,255}", secret):
        refuse("--webhook-secret takes 16 to 255 printable ASCII characters without spaces")
    if secret.startswith(webhooks.PREFIX):
        _require_base64(secret.removeprefix(webhooks.PREFIX))
    return SecretStr(secret)


def _require_base64(text: str) -> None:
    # The libraries of Standard Webhooks would make another key of it, or none.
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) < _SHORTEST_KEY:
        refuse(f"behind {webhooks.PREFIX} --webhook-secret takes Base64 of {_SHORTEST_KEY} bytes or more")


def _require_one_reader(key: str, secret: str | None) -> None:
    if key == secret == "-":
        refuse("standard input can hold the key or the secret, not both")


async def report(
    conn: AsyncConnection, settings: Settings, key: ApiKey, wanted: Reported
) -> tuple[ApiKey, SecretStr | None]:
    """Has a key's executions reported; returns the key as it is then, and its secret if that was made here."""
    events = wanted.events or key.webhook_events
    fresh = await webhooks.point(conn, settings, key.id, wanted.url, events, wanted.secret)
    return await again(conn, key), fresh if wanted.secret is None else None


def warn_of_private(key: ApiKey) -> None:
    host = urlsplit(key.webhook_url or "").hostname or ""
    try:
        public = is_public(ip_address(host))
    except ValueError:
        return  # a name: where it leads is looked up with each webhook
    if not public and not Settings().allow_private_webhooks:
        typer.echo(
            f"{host} is not on the internet: webhooks to it are refused unless ALLOW_PRIVATE_WEBHOOKS is set", err=True
        )
