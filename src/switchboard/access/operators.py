"""Operators who may read what was measured while PostgreSQL, which knows them, is away."""

import time
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials
from starlette.requests import HTTPConnection

from switchboard.access import keys
from switchboard.access.callers import Bearer, Caller, InCookie, InQuery, caller_of, operator
from switchboard.errors import will_pass
from switchboard.logs import bound

_REMEMBERED = 600.0
"""Seconds for which one is, from the last time that PostgreSQL vouched for it."""

_MOST = 100


class Operators:
    """API keys that this process has lately found to be an operator's, by their digests."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[float, Caller]] = {}

    def remember(self, key: str, caller: Caller) -> None:
        self.forget(key)
        if len(self._known) >= _MOST:
            del self._known[next(iter(self._known))]  # the one who has not come for longest
        self._known[_digest(key)] = time.monotonic(), caller

    def forget(self, key: str) -> None:
        self._known.pop(_digest(key), None)

    def recall(self, key: str) -> Caller | None:
        """Whose key it is, if that was found out lately, and it has not expired since."""
        seen_at, caller = self._known.get(_digest(key), (0.0, None))
        if caller is None or time.monotonic() - seen_at > _REMEMBERED:
            return None
        return None if caller.expires_at is not None and caller.expires_at <= datetime.now(UTC) else caller


def _digest(key: str) -> bytes:
    return blake2b(key.encode(), digest_size=32).digest()


async def _operators(connection: HTTPConnection) -> Operators:
    operators: Operators = connection.state.operators
    return operators


async def _scraper(
    request: Request,
    operators: Annotated[Operators, Depends(_operators)],
    bearer: Bearer,
    _in_query: InQuery,  # for the OpenAPI document
    _in_cookie: InCookie,
) -> Caller:
    key = _api_key(bearer)
    try:
        caller = await operator(await caller_of(request))
    except Exception as error:
        if key is None:
            raise
        if not will_pass(error):
            operators.forget(key)
            raise
        known = operators.recall(key)
        if known is None or known.key is None:
            raise
        bound.add(key_id=str(known.key.id))
        return known
    if key is not None:
        operators.remember(key, caller)
    return caller


def _api_key(bearer: HTTPAuthorizationCredentials | None) -> str | None:
    return bearer.credentials if bearer is not None and keys.is_one(bearer.credentials) else None


Scraper = Annotated[Caller, Depends(_scraper)]
"""Somebody who looks after the installation; while PostgreSQL is away, an API key that was one's a moment ago."""
