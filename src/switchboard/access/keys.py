"""API keys: 64 hexadecimal characters that are shown once, and of which only the SHA-256 is kept."""

import hashlib
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic import SecretStr
from sqlalchemy import ARRAY, Row, Select, Uuid, any_, bindparam, cast, desc, func, insert, literal, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.tables import KeyScope, WebhookEvent, api_key_digests, api_key_usage, api_keys

_FORM = re.compile(r"[0-9a-f]{64}")

_USED = timedelta(minutes=1)
"""How exactly it is known when a key was last used: not every request writes."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Everything about a key but the key itself."""

    id: UUID
    name: str
    scopes: frozenset[KeyScope]
    workflows: frozenset[str] | None
    """Those that it may start, and whose runs it sees; None for all."""
    active: bool
    expires_at: datetime | None
    """Also the end of its grace, where another has taken its place."""
    monthly_limit: int | None
    burst: int | None
    per_minute: int | None
    """Requests to the Public API, so many at once and so many a minute; None for the usual ones."""
    webhook_url: str | None
    webhook_events: frozenset[WebhookEvent] | None
    """Those of which it wants to be told; None for the documented ones."""
    last_used_at: datetime | None
    created_at: datetime
    digest: bytes | None = None
    """Of the key that was brought, where one was."""

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)

    @property
    def good(self) -> bool:
        """Whether it opens anything."""
        return self.active and not self.expired


def is_one(text: str) -> bool:
    """Whether a text has a key's form."""
    return _FORM.fullmatch(text) is not None


_KEYS: Select[Any] = select(api_keys)

# Put together once: nearly every request asks one of the two.
_NAMED = _KEYS.where(api_keys.c.id == bindparam("key_id"))
# By its digest, so that how long it takes tells nothing about the keys that there are.
_FOUND = (
    select(api_keys, api_key_digests.c.digest, api_key_digests.c.expires_at.label("grace"))
    .join(api_key_digests, api_key_digests.c.key_id == api_keys.c.id)
    .where(api_key_digests.c.digest == bindparam("brought"))
)


async def find(conn: AsyncConnection, key: str) -> ApiKey | None:
    """The key of this text, in whatever state it is."""
    row = (await conn.execute(_FOUND, {"brought": _digest(key)})).one_or_none()
    return None if row is None else _api_key(row, grace=row.grace, digest=row.digest)


async def get(conn: AsyncConnection, key_id: UUID) -> ApiKey | None:
    """The key of this id, in whatever state it is."""
    row = (await conn.execute(_NAMED, {"key_id": key_id})).one_or_none()
    return None if row is None else _api_key(row)


async def named(conn: AsyncConnection, text: str) -> Sequence[ApiKey]:
    """The keys of this id or of this name, or the one that this is."""
    if is_one(text) and (found := await find(conn, text)) is not None:
        text = str(found.id)
    try:
        query = _KEYS.where(api_keys.c.id == UUID(text))
    except ValueError:
        query = _KEYS.where(api_keys.c.name == text)
    return [_api_key(row) for row in await conn.execute(query)]


async def listed(conn: AsyncConnection) -> Sequence[tuple[ApiKey, int]]:
    """All keys, newest first, and how many executions each has had this month."""
    used = api_key_usage.c
    query = (
        select(api_keys, func.coalesce(used.executions, 0).label("used"))
        .outerjoin(api_key_usage, (used.key_id == api_keys.c.id) & (used.month == this_month()))
        .order_by(desc(api_keys.c.created_at), api_keys.c.id)
    )
    return [(_api_key(row), row.used) for row in await conn.execute(query)]


async def create(
    conn: AsyncConnection,
    name: str,
    scopes: Collection[KeyScope],
    *,
    workflows: Collection[str] | None = None,
    lifetime: timedelta | None = None,
    monthly_limit: int | None = None,
    burst: int | None = None,
    per_minute: int | None = None,
) -> tuple[ApiKey, SecretStr]:
    """Makes a key; the second part is the key itself, which nobody can look up later."""
    row = await conn.execute(
        insert(api_keys)
        .values(
            name=name,
            scopes=sorted(set(scopes)),
            workflows=None if workflows is None else sorted(set(workflows)),
            expires_at=None if lifetime is None else func.now() + lifetime,
            monthly_limit=monthly_limit,
            burst=burst,
            per_minute=per_minute,
        )
        .returning(api_keys)
    )
    api_key = _api_key(row.one())
    return api_key, await _another(conn, api_key.id)


async def revoke(conn: AsyncConnection, key_id: UUID) -> None:
    """Makes a key open nothing any more, and with it the browser tokens that it has given."""
    await conn.execute(update(api_keys).where(api_keys.c.id == key_id).values(active=False, updated_at=func.now()))


async def rotate(conn: AsyncConnection, key_id: UUID, grace: timedelta) -> tuple[SecretStr, datetime]:
    """Another key in place of those that there are; they go on working for a while, until the time that is returned."""
    end = func.now() + grace
    # First, because it lets only one rotation at a time go on from here: each replaces what the one before has made.
    changed = await conn.execute(
        update(api_keys)
        .where(api_keys.c.id == key_id)
        .values(updated_at=func.now())
        .returning(func.least(end, api_keys.c.expires_at))
    )
    await conn.execute(
        update(api_key_digests)
        .where(
            api_key_digests.c.key_id == key_id,
            # One that ends sooner, from an earlier rotation, is not given more time.
            or_(api_key_digests.c.expires_at.is_(None), api_key_digests.c.expires_at > end),
        )
        .values(expires_at=end)
    )
    return await _another(conn, key_id), changed.scalar_one()


async def note_use(conn: AsyncConnection, key: ApiKey) -> None:
    """Writes down that a key was used just now."""
    # Whoever else does the same at this moment writes the same: nobody waits for anybody.
    mine = select(api_keys.c.id).where(api_keys.c.id == key.id).with_for_update(skip_locked=True, key_share=True)
    await conn.execute(update(api_keys).where(api_keys.c.id.in_(mine)).values(last_used_at=func.now()))


def use_is_noted(key: ApiKey) -> bool:
    """Whether it is known well enough when a key was last used."""
    return key.last_used_at is not None and key.last_used_at > datetime.now(UTC) - _USED


async def good(conn: AsyncConnection, key_ids: Collection[UUID]) -> set[UUID | bytes]:
    """Which of these keys still open something: their ids, and the digests by which they do."""
    query = (
        select(api_keys.c.id, api_key_digests.c.digest)
        .join(api_key_digests, api_key_digests.c.key_id == api_keys.c.id)
        .where(
            api_keys.c.id == any_(literal(list(key_ids), ARRAY(Uuid))),
            api_keys.c.active,
            or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > func.now()),
            or_(api_key_digests.c.expires_at.is_(None), api_key_digests.c.expires_at > func.now()),
        )
    )
    return {name for row in await conn.execute(query) for name in row}


def this_month() -> Any:
    """The first day of the month that it is in UTC, as SQL."""
    return cast(func.date_trunc("month", func.timezone("UTC", func.now())), api_key_usage.c.month.type)


async def _another(conn: AsyncConnection, key_id: UUID) -> SecretStr:
    key = secrets.token_hex(32)
    await conn.execute(insert(api_key_digests).values(digest=_digest(key), key_id=key_id))
    return SecretStr(key)


def _digest(key: str) -> bytes:
    # Without salt or stretching: 256 random bits can be neither guessed nor looked up.
    return hashlib.sha256(key.encode()).digest()


def _api_key(row: Row[Any], *, grace: datetime | None = None, digest: bytes | None = None) -> ApiKey:
    ends = [end for end in (row.expires_at, grace) if end is not None]
    return ApiKey(
        id=row.id,
        name=row.name,
        scopes=frozenset(map(KeyScope, row.scopes)),
        workflows=None if row.workflows is None else frozenset(row.workflows),
        active=row.active,
        expires_at=min(ends, default=None),
        monthly_limit=row.monthly_limit,
        burst=row.burst,
        per_minute=row.per_minute,
        webhook_url=row.webhook_url,
        webhook_events=None if row.webhook_events is None else frozenset(map(WebhookEvent, row.webhook_events)),
        last_used_at=row.last_used_at,
        created_at=row.created_at,
        digest=digest,
    )
