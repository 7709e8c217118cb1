"""What the commands about keys share: which key is meant, and what is shown of it."""

import re
from datetime import timedelta
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.access import keys, webhooks
from switchboard.access.keys import ApiKey
from switchboard.commands.running import read, refuse
from switchboard.events import iso
from switchboard.tables import WebhookEvent

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_LONGEST = timedelta(days=36_500)

Key = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="The key's id, its name if no other has it, or - to read the key itself from stdin."
    ),
]

Grace = Annotated[str, typer.Option(help="How long the one that it replaces goes on working; 0s for not at all.")]


def duration(option: str, text: str, *, least: timedelta) -> timedelta:
    """How long an option says; ends the command where it says nothing of use."""
    match = re.fullmatch(r"(\d{1,7})([smhdw])", text.strip())
    if match is None:
        refuse(f"{option} is a number with a unit, such as 90m, 24h, 30d or 8w")
    found = timedelta(**{_UNITS[match[2]]: int(match[1])})
    if not least <= found <= _LONGEST:
        refuse(f"{option} is at least {int(least.total_seconds())} s, and at most 100 years")
    return found


async def again(conn: AsyncConnection, key: ApiKey) -> ApiKey:
    """A key as it is now."""
    found = await keys.get(conn, key.id)
    assert found is not None  # noqa: S101  # keys are never deleted
    return found


async def good(conn: AsyncConnection, text: str) -> ApiKey:
    """The key that is meant, if it still opens anything."""
    found = await only(conn, text)
    if not found.good:
        refuse(f"the key {found.name} is {state(found)}; `switchboard keys create` makes a new one")
    return found


async def only(conn: AsyncConnection, text: str) -> ApiKey:
    """The key that is meant: its id, its name if no other has it, or - where the key itself is on standard input."""
    text = read(text)
    found = await keys.named(conn, text)
    if not found:
        # A key itself is not repeated.
        refuse(f"there is no {'such key' if keys.is_one(text) else f'key {text}'}; `switchboard keys list` shows them")
    if len(found) > 1:
        which = ", ".join(f"{key.id} ({state(key)})" for key in found)
        refuse(f"{len(found)} keys are named {text}; say which by its id: {which}")
    return found[0]


def state(key: ApiKey) -> str:
    return "revoked" if not key.active else "expired" if key.expired else "active"


def shown(key: ApiKey, secret: SecretStr | None = None) -> dict[str, Any]:
    """Everything about a key but the key; of its webhooks' secret only one that was just made."""
    return {
        "id": str(key.id),
        "name": key.name,
        "scopes": sorted(key.scopes),
        "workflows": None if key.workflows is None else sorted(key.workflows),
        "state": state(key),
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


def say_secret(secret: SecretStr | None) -> None:
    if secret is not None:
        typer.echo(f"Its webhooks are signed with {secret.get_secret_value()}. It is not shown again.", err=True)
