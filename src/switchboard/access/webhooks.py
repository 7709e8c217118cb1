"""Where an API key's executions are reported: an address, which events, and the secret that signs them."""

import base64
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic import SecretStr
from sqlalchemy import ARRAY, Uuid, any_, func, literal, null, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.sealing import Sealer
from switchboard.settings import Settings
from switchboard.tables import WebhookEvent, api_keys

DOCUMENTED = (
    WebhookEvent.STARTED,
    WebhookEvent.COMPLETED,
    WebhookEvent.FAILED,
    WebhookEvent.PENDING_APPROVAL,
)
"""The events of a key that was given no others."""

PREFIX = "whsec_"
"""How a secret begins whose rest is Base64, as Standard Webhooks has it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where reports go, and with what they are signed."""

    url: str
    secrets: tuple[SecretStr, ...]
    """The current one first."""


def new_secret() -> SecretStr:
    """256 random bits, in the form of Standard Webhooks."""
    return SecretStr(PREFIX + base64.b64encode(secrets.token_bytes(32)).decode())


async def wanted(conn: AsyncConnection, key_ids: Collection[UUID]) -> dict[UUID, frozenset[WebhookEvent]]:
    """Which events of their executions these keys want to be told of; those that want none are left out."""
    if not key_ids:
        return {}
    query = select(api_keys.c.id, api_keys.c.webhook_events).where(
        api_keys.c.id == any_(literal(list(key_ids), ARRAY(Uuid))),
        api_keys.c.active,
        api_keys.c.webhook_url.is_not(None),
    )
    return {
        row.id: frozenset(DOCUMENTED if row.webhook_events is None else map(WebhookEvent, row.webhook_events))
        for row in await conn.execute(query)
    }


async def endpoint_of(conn: AsyncConnection, settings: Settings, key_id: UUID) -> Endpoint | None:
    """Where reports of a key go; None for one that has been revoked or has no address.

    Raises SealBroken or SecretMissing where its secret cannot be read.
    """
    good_before = (api_keys.c.webhook_secret_before_until > func.now()).label("good_before")
    query = select(
        api_keys.c.webhook_url, api_keys.c.webhook_secret, api_keys.c.webhook_secret_before, good_before
    ).where(api_keys.c.id == key_id, api_keys.c.active, api_keys.c.webhook_url.is_not(None))
    row = (await conn.execute(query)).one_or_none()
    if row is None:
        return None
    sealed = [row.webhook_secret, *([row.webhook_secret_before] if row.good_before else [])]
    sealer = Sealer.of(settings)
    return Endpoint(row.webhook_url, tuple(sealer.open(each) for each in sealed))


async def point(
    conn: AsyncConnection,
    settings: Settings,
    key_id: UUID,
    url: str,
    events: Collection[WebhookEvent] | None,
    secret: SecretStr | None = None,
) -> SecretStr | None:
    """Sends a key's reports to an address; returns its secret if it is a new one.

    Without a secret a key keeps the one that it has, or gets one.
    """
    # Locked: of two that find none, only one makes one.
    mine = select(api_keys.c.webhook_secret).where(api_keys.c.id == key_id).with_for_update(key_share=True)
    has_one = await conn.scalar(mine)
    fresh = secret or (None if has_one else new_secret())
    values: dict[str, Any] = {
        "webhook_url": url,
        "webhook_events": None if events is None else sorted(set(events)),
        "updated_at": func.now(),
    }
    if fresh is not None:
        values["webhook_secret"] = Sealer.of(settings).seal(fresh.get_secret_value())
        values["webhook_secret_before"] = values["webhook_secret_before_until"] = null()
    await conn.execute(update(api_keys).where(api_keys.c.id == key_id).values(values))
    return fresh


async def stop(conn: AsyncConnection, key_id: UUID) -> None:
    """Reports nothing of a key any more; its secret stays."""
    await conn.execute(update(api_keys).where(api_keys.c.id == key_id).values(webhook_url=None, updated_at=func.now()))


async def replaced_until(conn: AsyncConnection, key_id: UUID) -> datetime | None:
    """Until when the secret before a key's secret signs, too; None if it does not."""
    query = select(api_keys.c.webhook_secret_before_until).where(
        api_keys.c.id == key_id, api_keys.c.webhook_secret_before_until > func.now()
    )
    until: datetime | None = await conn.scalar(query)
    return until


async def rotate(
    conn: AsyncConnection, settings: Settings, key_id: UUID, grace: timedelta, secret: SecretStr | None = None
) -> tuple[SecretStr, datetime]:
    """Another secret in place of a key's; both sign until the time that is returned."""
    fresh = secret or new_secret()
    changed = await conn.execute(
        update(api_keys)
        .where(api_keys.c.id == key_id)
        .values(
            webhook_secret=Sealer.of(settings).seal(fresh.get_secret_value()),
            webhook_secret_before=api_keys.c.webhook_secret,
            webhook_secret_before_until=func.now() + grace,
            updated_at=func.now(),
        )
        .returning(api_keys.c.webhook_secret_before_until)
    )
    return fresh, changed.scalar_one()
