"""Secrets at rest: sealed with a key that is derived from `APP_SECRET`, so that a copy of the database tells none."""

import base64
from typing import Self

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import SecretStr

from switchboard.settings import Settings

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
            raise SecretMissing("APP_SECRET is not set: hook keys cannot be stored or read without it")
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


def _fernet(secret: SecretStr) -> Fernet:
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=_PURPOSE).derive(secret.get_secret_value().encode())
    return Fernet(base64.urlsafe_b64encode(key))
