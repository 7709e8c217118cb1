"""`/api/happyrobot/tokens` and `/api/happyrobot/session`: what a browser is let in with."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, TypedDict

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from switchboard.access.callers import COOKIE, Bearer, Caller, CurrentSigner, Issuer, Known
from switchboard.access.tokens import BrowserToken, Right
from switchboard.bodies import Id, JsonBody, body_of, check
from switchboard.errors import BadRequest, Forbidden, NotConfigured, Unauthorized, described
from switchboard.events import Timestamp
from switchboard.settings import CurrentSettings, Settings

router = APIRouter(prefix="/api/happyrobot", tags=["access"])

_QUARTER_OF_AN_HOUR = 900
_DAY = 86_400

_LONGEST = 3_500
"""Characters of a token: with its name it has to fit into a cookie, of which browsers take 4,096."""


Scope = Literal["read", "trigger", "decide", "operate"]


class TokenIn(BaseModel):
    """What a browser is to be let in for."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={"examples": [{"context_ids": ["order_123"], "scopes": ["read"], "expires_in": 900}]},
    )

    context_ids: Annotated[list[Id], Field(min_length=1, max_length=100)] | Literal["*"] = Field(
        description='The contexts that it may see, or `"*"` for all.', examples=[["order_123"]]
    )
    scopes: Annotated[list[Scope], Field(min_length=1)] = Field(
        ["read"],
        description="`read` sees runs and follows them, `trigger` starts and stops them, `decide` approves and rejects "
        "what they ask for, `operate` sees webhooks to customers and sends them again, and, for all contexts, metrics.",
    )
    expires_in: Annotated[int, Field(ge=1, le=_DAY)] = Field(
        _QUARTER_OF_AN_HOUR, description="Seconds; 24 hours at most."
    )


class TokenOut(BaseModel):
    """A browser token."""

    token: str = Field(description="For `Authorization: Bearer`.", examples=["eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9…"])
    expires_at: Timestamp


class SessionOut(BaseModel):
    """Until when the browser is let in."""

    expires_at: Timestamp


class CallerOut(BaseModel):
    """Who is asking, and what they may."""

    anonymous: bool = Field(description="Whether these are no credentials, and none are needed.", examples=[False])
    name: str | None = Field(
        description="Of the API key, or of the one that gave a token for all contexts.", examples=["Our app"]
    )
    scopes: list[Scope] = Field(examples=[["read", "trigger"]])
    context_ids: list[str] | Literal["*"] = Field(
        description='The contexts that they may see, or `"*"` for all.', examples=["*"]
    )
    expires_at: Timestamp | None = Field(description="When that ends, if it does.")


@router.post(
    "/tokens",
    summary="Make a browser token",
    responses=described(400, 401, 403, 408, 409, 413, 429),
    openapi_extra=body_of(TokenIn),
)
async def make_token(caller: Issuer, signer: CurrentSigner, body: JsonBody) -> TokenOut:
    """For a browser that is to see its own contexts and nothing else. It is your backend that asks, with its API key.

    A token lasts no longer than the API key, and ends with it when that is revoked.
    """
    wanted = check(TokenIn, body)
    if signer is None:
        raise NotConfigured("APP_SECRET is not set")
    rights = frozenset(map(Right, wanted.scopes))
    if beyond := sorted(rights - caller.rights):
        raise Forbidden(f"This API key cannot give what it has not: {', '.join(beyond)}")
    token = BrowserToken(
        contexts=None if wanted.context_ids == "*" else frozenset(wanted.context_ids),
        rights=rights,
        expires_at=_end(caller, wanted.expires_in),
        key_id=caller.key_id,
    )
    signed = signer.sign(token)
    if len(signed) > _LONGEST:
        raise BadRequest("context_ids: too long for one token")
    return TokenOut(token=signed, expires_at=token.expires_at)


@router.get("/session", summary="Who am I?", responses=described(400, 401, 403, 429))
async def read_session(caller: Known) -> CallerOut:
    """What these credentials are good for; without any, whether that is enough here."""
    contexts = caller.sight.contexts
    return CallerOut(
        anonymous=caller.key is None and caller.token is None,
        # What a key is called is no business of browsers that see some contexts alone.
        name=None if caller.key is None or contexts is not None else caller.key.name,
        scopes=sorted(caller.rights),
        context_ids="*" if contexts is None else sorted(contexts),
        expires_at=caller.expires_at,
    )


@router.post("/session", summary="Keep a token as a cookie", responses=described(400, 401, 403, 429))
async def open_session(
    request: Request, response: Response, caller: Known, bearer: Bearer, settings: CurrentSettings
) -> SessionOut:
    """Keeps the browser token of the `Authorization` header in a cookie that scripts cannot read.

    From then on requests and streams of pages of this origin are let in by themselves.
    """
    if bearer is None or caller.token is None:
        raise Unauthorized("A browser token is needed, as `Authorization: Bearer`")
    left = caller.token.expires_at - datetime.now(UTC)
    response.set_cookie(
        COOKIE, bearer.credentials, max_age=max(int(left.total_seconds()), 0), **_attributes(request, settings)
    )
    return SessionOut(expires_at=caller.token.expires_at)


@router.delete("/session", summary="Forget the cookie", status_code=204, responses=described(400))
async def close_session(request: Request, response: Response, settings: CurrentSettings) -> None:
    """The browser is let in no more; the token itself is good until it ends."""
    response.delete_cookie(COOKIE, **_attributes(request, settings))


def _end(caller: Caller, seconds: int) -> datetime:
    # To the second, as the token has it, and not a moment more than the key.
    end = datetime.now(UTC) + timedelta(seconds=seconds)
    if caller.expires_at is not None:
        end = min(end, caller.expires_at)
    return end.replace(microsecond=0)


class _Attributes(TypedDict):
    path: str
    secure: bool
    httponly: bool
    samesite: Literal["strict"]


def _attributes(request: Request, settings: Settings) -> _Attributes:
    secure = settings.environment == "production" or request.url.scheme == "https"
    return {"path": "/api", "secure": secure, "httponly": True, "samesite": "strict"}
