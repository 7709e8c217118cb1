"""Secrets at rest: sealed with a key that is derived from `APP_SECRET`, so that a copy of the database tells none."""

import base64
from typing import Self

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import SecretStr
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.settings import Settings
from switchboard.tables import SEALED

_PURPOSE = b"switchboard: secrets at rest, 1"
"""Keeps this key apart from others that are derived from the same secret."""


class SecretMissing(Exception):
    """There is nothing to seal with."""


class SealBroken(Exception):
    """Something was sealed with another secret."""


class Sealer:
    """Seals with the current secret, and opens what it or the previous one has sealed."""

    def __init__(self, secret: SecretStr, previous: SecretStr | None = None) -> None:
        self._fernet = MultiFernet([_fernet(each) for each in (secret, previous) if each is not None])

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Raises SecretMissing."""
        if settings.app_secret is None:
            raise SecretMissing("APP_SECRET is not set: secrets cannot be stored or read without it")
        return cls(settings.app_secret, settings.app_secret_previous)

    def seal(self, text: str) -> str:
        """What may be stored; another text each time."""
        return self._fernet.encrypt(text.encode()).decode()

    def open(self, sealed: str) -> SecretStr:
        """Raises SealBroken."""
        try:
            return SecretStr(self._fernet.decrypt(sealed).decode())
        except InvalidToken as error:
            raise SealBroken(
                "a stored secret cannot be opened: APP_SECRET is not the one that sealed it; "
                "set APP_SECRET_PREVIOUS to the older one"
            ) from error


async def reseal(conn: AsyncConnection, sealer: Sealer) -> int:
    """Seals everything anew with the current secret, in the caller's transaction; returns how much there was.

    Raises SealBroken where something cannot be opened, and nothing is to be changed then.
    """
    count = 0
    for column in SEALED:
        (key,) = column.table.primary_key
        # Locked, so that one which is set meanwhile is not overwritten with what was there before.
        query = select(key, column).where(column.is_not(None)).order_by(key).with_for_update(key_share=True)
        for name, sealed in (await conn.execute(query)).all():
            try:
                anew = sealer.seal(sealer.open(sealed).get_secret_value())
            except SealBroken as error:
                raise SealBroken(f"{column.table.name} {name}: {error}") from error
            await conn.execute(update(column.table).where(key == name).values({column: anew}))
            count += 1
    return count


def derived(secret: SecretStr, purpose: bytes) -> bytes:
    """A key of 32 bytes for one purpose, which says nothing about the secret or about keys for others."""
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=purpose).derive(secret.get_secret_value().encode())


def _fernet(secret: SecretStr) -> Fernet:
    return Fernet(base64.urlsafe_b64encode(derived(secret, _PURPOSE)))
