"""Who is asking: an API key, a browser with a token, or somebody without a name where that is allowed."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Request
from fastapi.security import APIKeyCookie, APIKeyQuery, HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.access import keys, origins
from switchboard.access.keys import ApiKey
from switchboard.access.limits import CurrentFailures, address_of
from switchboard.access.rates import CurrentRates
from switchboard.access.tokens import BrowserToken, Right, Signer, TokenExpired, TokenInvalid
from switchboard.database import Db, singly
from switchboard.edge import add_headers
from switchboard.errors import Forbidden, SwitchboardError, TooMany, Unauthorized
from switchboard.logs import bound
from switchboard.settings import CurrentSettings, Settings
from switchboard.sight import EVERYTHING, Sight
from switchboard.tables import KeyScope

COOKIE = "switchboard_token"
"""Where a browser keeps its token, so that requests to its own origin bring it by themselves."""

_bearer = HTTPBearer(auto_error=False, scheme_name="bearer", description="An API key, or a browser token.")
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
"""What stands in `Authorization`, if it is ours to read."""

_query = APIKeyQuery(
    name="access_token",
    auto_error=False,
    scheme_name="access_token",
    description="A browser token, for EventSource, which cannot send headers. Only with GET.",
)
_cookie = APIKeyCookie(
    name=COOKIE, auto_error=False, scheme_name="cookie", description="A browser token, on this origin."
)

InQuery = Annotated[str | None, Depends(_query)]
InCookie = Annotated[str | None, Depends(_cookie)]

_ALL_RIGHTS = frozenset(Right)

_RIGHTS = {
    KeyScope.APP: frozenset({Right.READ, Right.TRIGGER, Right.DECIDE}),
    KeyScope.ADMIN: _ALL_RIGHTS,
    KeyScope.PUBLIC: frozenset[Right](),  # those of the Public API are its own
}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking, and what they may."""

    sight: Sight = EVERYTHING
    rights: frozenset[Right] = _ALL_RIGHTS
    key: ApiKey | None = None
    """Whose rights these are; None where no credentials are needed."""
    token: BrowserToken | None = None
    """What a browser came with."""
    expires_at: datetime | None = None
    """When that ends."""

    @property
    def key_id(self) -> UUID | None:
        return None if self.key is None else self.key.id

    def owner(self, context_id: str) -> str:
        """Within whose requests an `Idempotency-Key` stands for one of them.

        Browsers that may not see all are kept apart by context: none can use up the keys of another, or of the backend.
        """
        name = str(self.key_id or "")
        if self.token is not None and self.token.contexts is not None:
            name += f":{blake2b(context_id.encode(), digest_size=16).hexdigest()}"
        return name


ANYBODY = Caller()


async def _signer(request: Request) -> Signer | None:
    signer: Signer | None = request.state.signer
    return signer


CurrentSigner = Annotated[Signer | None, Depends(_signer)]


async def _caller(
    request: Request,
    db: Db,
    settings: CurrentSettings,
    signer: CurrentSigner,
    failures: CurrentFailures,
    bearer: Bearer,
    in_query: InQuery,
    in_cookie: InCookie,
) -> Caller:
    try:
        return await _known(request, db, settings, signer, bearer, in_query, in_cookie)
    except _Wrong as error:
        await failures.count(address_of(request))
        raise Unauthorized("Unauthorized") from error


async def caller_of(request: Request) -> Caller:
    """Who is asking, for routes whose dependencies nobody solves."""
    state, headers = request.scope["state"], request.headers
    # Each of the three takes as long as all that is done with a key that it finds.
    bearer = await _bearer(request) if "authorization" in headers else None
    in_query = await _query(request) if request.scope["query_string"] else None
    in_cookie = await _cookie(request) if "cookie" in headers else None
    return await _caller(
        request, state["db"], state["settings"], state["signer"], state["failures"], bearer, in_query, in_cookie
    )


class _Wrong(Exception):
    """Credentials that somebody may be guessing."""


async def _known(
    request: Request,
    db: AsyncEngine,
    settings: Settings,
    signer: Signer | None,
    bearer: HTTPAuthorizationCredentials | None,
    in_query: str | None,
    in_cookie: str | None,
) -> Caller:
    if bearer is not None:
        if keys.is_one(bearer.credentials):
            return await _with_key(db, bearer.credentials)
        return await _with_token(db, settings, signer, bearer.credentials)
    if in_query is not None and request.method == "GET":
        # An API key is not taken here, even if it is one: addresses are written down everywhere.
        return await _with_token(db, settings, signer, in_query)
    # What browsers send by themselves, and what needs no credentials, any page could make use of.
    if in_cookie is not None:
        try:
            caller = await _with_token(db, settings, signer, in_cookie)
        except (SwitchboardError, _Wrong):
            # Cookies are kept per host, not per port: it may be another installation's.
            if not settings.anonymous_allowed:
                raise
            caller = ANYBODY
    elif settings.anonymous_allowed:
        caller = ANYBODY
    else:
        raise Unauthorized("Unauthorized")
    if not origins.is_from_here(request, settings):
        raise Forbidden("Requests from this origin need credentials of their own")
    if caller is ANYBODY and not origins.is_ours(request, settings):
        raise Forbidden("Requests for this host name need credentials; APP_URL and CORS_ORIGINS name those that do not")
    return caller


async def _with_key(db: AsyncEngine, text: str) -> Caller:
    async with singly(db).connect() as conn:
        key = await keys.find(conn, text)
    if key is None:
        raise _Wrong
    _name_in_the_log(key)
    await _require_good(db, key)
    return Caller(Sight(workflows=key.workflows), _rights(key), key, expires_at=key.expires_at)


async def _require_good(db: AsyncEngine, key: ApiKey) -> None:
    if not key.active:
        raise Forbidden("API key is inactive")
    if key.expired:
        raise Forbidden("API key has expired")
    await _note_use(db, key)


def _rights(key: ApiKey) -> frozenset[Right]:
    return frozenset().union(*(_RIGHTS[scope] for scope in key.scopes))


async def _with_token(db: AsyncEngine, settings: Settings, signer: Signer | None, text: str) -> Caller:
    if signer is None:
        raise _Wrong
    try:
        token = signer.read(text)
    except TokenExpired as error:
        raise Unauthorized("Token expired") from error
    except TokenInvalid as error:
        raise _Wrong from error
    if token.key_id is None:
        if not settings.anonymous_allowed:
            raise Unauthorized("Token is no longer good")
        return Caller(Sight(token.contexts), token.rights, None, token, token.expires_at)
    async with singly(db).connect() as conn:
        key = await keys.get(conn, token.key_id)
    if key is not None:
        _name_in_the_log(key)
    if key is None or not key.good:
        raise Unauthorized("Token is no longer good")
    await _note_use(db, key)
    rights = token.rights & _rights(key)
    return Caller(Sight(token.contexts, key.workflows), rights, key, token, token.expires_at)


def _name_in_the_log(key: ApiKey) -> None:
    # Also for those who are refused: they are who is looked for after a leak.
    bound.add(key_id=str(key.id))


async def _note_use(db: AsyncEngine, key: ApiKey) -> None:
    if not keys.use_is_noted(key):
        async with db.begin() as conn:
            await keys.note_use(conn, key)


Known = Annotated[Caller, Depends(_caller)]
"""Whoever they are, and whatever they may."""


def _with(right: Right) -> Callable[[Caller], Awaitable[Caller]]:
    async def allowed(caller: Known) -> Caller:
        if right not in caller.rights:
            what = "token" if caller.token is not None else "API key"
            raise Forbidden(f"This {what} is not allowed to do that")
        return caller

    return allowed


async def _of_a_backend(caller: Known) -> Caller:
    # A token gives no tokens: nobody could ever be sent away.
    if caller.token is not None or Right.READ not in caller.rights:
        raise Forbidden("Only an API key of an app is allowed to do that")
    return caller


reader = _with(Right.READ)
Reader = Annotated[Caller, Depends(reader)]
"""Somebody who may see runs, those of `sight`."""

starter = _with(Right.TRIGGER)
Starter = Annotated[Caller, Depends(starter)]
"""Somebody who may start workflows and stop runs, those of `sight`."""

Decider = Annotated[Caller, Depends(_with(Right.DECIDE))]
"""Somebody who may approve and reject what runs of `sight` ask for."""

operator = _with(Right.OPERATE)
Operator = Annotated[Caller, Depends(operator)]
"""Somebody who looks after the installation."""

Issuer = Annotated[Caller, Depends(_of_a_backend)]
"""Somebody who may let browsers in."""


async def customer(request: Request, db: Db, failures: CurrentFailures, rates: CurrentRates, bearer: Bearer) -> Caller:
    text = "" if bearer is None else bearer.credentials
    key = None
    if keys.is_one(text):
        try:
            async with singly(db).connect() as conn:
                key = await keys.find(conn, text)
        except Exception:
            # Whose request it is cannot be said, but that the address has asked.
            add_headers(request, (await failures.take(address_of(request))).headers)
            raise
    if key is not None:
        _name_in_the_log(key)
    # Counted before anything is said: who has no right to an answer has none to as many as they like either.
    rate = await (failures.take(address_of(request)) if key is None else rates.take(key))
    add_headers(request, rate.headers)
    if rate.limited:
        raise TooMany("Rate limit exceeded", retry_after=rate.retry_after)
    if key is None:
        raise Unauthorized("Invalid API key")
    await _require_good(db, key)
    if KeyScope.PUBLIC not in key.scopes:
        raise Forbidden("API key is not for the Public API")
    return Caller(Sight(workflows=key.workflows), frozenset(), key, expires_at=key.expires_at)


Customer = Annotated[Caller, Depends(customer)]
"""A customer's website, of the Public API: with an API key, and within its limit."""
