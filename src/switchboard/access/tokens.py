"""Browser tokens: signed, short-lived, for some contexts or for all."""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Self
from uuid import UUID, uuid4

import jwt
from pydantic import SecretStr

from switchboard.sealing import derived
from switchboard.settings import Settings

_PURPOSE = b"switchboard: browser tokens, 1"
_ALGORITHM = "HS256"
_ISSUER = "switchboard"
_AUDIENCE = "browser"


class TokenInvalid(Exception):
    """Not one of ours, or not as we made it."""


class TokenExpired(Exception):
    """It was good once."""


class Right(StrEnum):
    """What a browser token may be good for."""

    READ = "read"  # see runs, follow them, see what they ask to have approved
    TRIGGER = "trigger"  # start workflows, and stop runs
    DECIDE = "decide"  # approve and reject what runs ask for
    OPERATE = "operate"  # look after the installation: webhooks to customers, metrics


@dataclass(frozen=True, slots=True)
class BrowserToken:
    """What a token says."""

    contexts: frozenset[str] | None
    """None for all."""
    rights: frozenset[Right]
    expires_at: datetime
    """To the second."""
    key_id: UUID | None
    """Whose it is: the API key that it was given by, None where no credentials were needed."""


class Signer:
    """Signs with the current secret; takes what that or the previous one has signed."""

    def __init__(self, secret: SecretStr, previous: SecretStr | None = None) -> None:
        self._keys = [derived(each, _PURPOSE) for each in (secret, previous) if each is not None]

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """None where there is no secret to sign with."""
        return None if settings.app_secret is None else cls(settings.app_secret, settings.app_secret_previous)

    def sign(self, token: BrowserToken) -> str:
        """The token as a JWT."""
        claims: dict[str, Any] = {
            "iss": _ISSUER,
            "aud": _AUDIENCE,
            "iat": datetime.now(UTC),
            "exp": token.expires_at,
            "jti": uuid4().hex,
            "contexts": "*" if token.contexts is None else sorted(token.contexts),
            "scopes": sorted(token.rights),
        }
        if token.key_id is not None:
            claims["key"] = str(token.key_id)
        return jwt.encode(claims, self._keys[0], _ALGORITHM)

    def read(self, text: str) -> BrowserToken:
        """Raises TokenInvalid or TokenExpired."""
        for key in self._keys:
            try:
                claims = jwt.decode(
                    text,
                    key,
                    # This one and no other, whatever the token's own header says.
                    algorithms=[_ALGORITHM],
                    issuer=_ISSUER,
                    audience=_AUDIENCE,
                    # When it was made is for those who look into it: clocks of replicas differ.
                    options={"require": ["exp", "iss", "aud"], "verify_iat": False},
                )
                return _token(claims)
            except jwt.ExpiredSignatureError as error:
                raise TokenExpired from error
            except (jwt.InvalidTokenError, ValueError, TypeError, KeyError, OverflowError):
                continue
        raise TokenInvalid


def _token(claims: dict[str, Any]) -> BrowserToken:
    contexts = claims["contexts"]
    return BrowserToken(
        contexts=None if contexts == "*" else frozenset(contexts),
        rights=frozenset(map(Right, claims["scopes"])),
        expires_at=datetime.fromtimestamp(claims["exp"], UTC),
        key_id=UUID(claims["key"]) if "key" in claims else None,
    )
