"""What can go wrong, and how the guide's endpoints and the Public API say it.

SwitchboardError
├── BadRequest      400  the request cannot be understood
├── Unauthorized    401  no credentials, or wrong ones
├── Forbidden       403  known, and not allowed
├── NotFound        404
├── RequestTimeout  408  the body did not arrive in time
├── Conflict        409  not as things stand
├── NotConfigured   409  not without a setting that is missing
├── TooLarge        413  the body is over the limit
├── TooMany         429  more than is allowed in so short a time
├── Unprocessable   422  an Idempotency-Key that stands for something else
├── TriggerFailed   502  HappyRobot did not confirm that it started the workflow
├── UpstreamFailed  502  HappyRobot refused something else
└── Unavailable     503  something that is needed is away; worth another try
"""

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import DBAPIError, InterfaceError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

log = structlog.stdlib.get_logger(__name__)


class SwitchboardError(Exception):
    """An error that a caller is told about: a status, a sentence, and fields beside it."""

    status_code = 500
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields


class BadRequest(SwitchboardError):
    status_code = 400


class Unauthorized(SwitchboardError):
    status_code = 401
    headers = MappingProxyType({"WWW-Authenticate": "Bearer"})


class Forbidden(SwitchboardError):
    status_code = 403


class NotFound(SwitchboardError):
    status_code = 404


class RequestTimeout(SwitchboardError):
    status_code = 408
    headers = MappingProxyType({"Connection": "close"})  # what else of it comes is not waited for


class Conflict(SwitchboardError):
    status_code = 409


class TooLarge(SwitchboardError):
    status_code = 413


class Unprocessable(SwitchboardError):
    status_code = 422


class TooMany(SwitchboardError):
    """Worth another try after some seconds."""

    status_code = 429

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.headers = {"Retry-After": str(math.ceil(retry_after))}


class NotConfigured(SwitchboardError):
    status_code = 409


class TriggerFailed(SwitchboardError):
    status_code = 502


class UpstreamFailed(SwitchboardError):
    status_code = 502


class Unavailable(SwitchboardError):
    status_code = 503


class ErrorOut(BaseModel):
    """The guide's error shape."""

    model_config = ConfigDict(extra="allow")

    error: str = Field(examples=["Run not found"])


PUBLIC = "/api/v1/public"
"""Where the Public API begins, whose errors have a shape of their own."""


class PublicErrorOut(BaseModel):
    """The Public API's error shape."""

    model_config = ConfigDict(extra="allow")

    message: str = Field(examples=["Execution not found"])
    error: str = Field(examples=["Not Found"], description="The status in words.")
    statusCode: int = Field(examples=[404])  # noqa: N815  # the contract's own name


_MEANINGS = {
    400: "The request cannot be understood; nothing was changed.",
    401: "Credentials are missing or wrong; nothing was changed.",
    403: "Known, and not allowed; nothing was changed.",
    404: "There is no such thing.",
    408: "The body did not arrive within `REQUEST_TIMEOUT`; nothing was changed.",
    409: "Not as things stand; nothing was changed.",
    413: "The body is not smaller than `MAX_BODY_SIZE`; nothing was changed.",
    429: "More than is allowed in so short a time; try again after `Retry-After` seconds.",
    422: "The `Idempotency-Key` was used with another body; nothing was changed.",
    502: "HappyRobot did not confirm it.",
    503: "PostgreSQL or HappyRobot is away, or there is too much to do; try again after `Retry-After` seconds.",
}

Responses = dict[int | str, dict[str, Any]]


def described(*statuses: int, model: type[BaseModel] = ErrorOut) -> Responses:
    """The errors of an endpoint, for the OpenAPI document. 503 is everybody's."""
    return {status: {"model": model, "description": _MEANINGS[status]} for status in (*statuses, 503)}


def answer(
    path: str, status_code: int, message: str, headers: Mapping[str, str] | None = None, **fields: Any
) -> Response:
    """An error in the shape of whoever answers at this path."""
    headers = dict(headers or {})
    if status_code == Unavailable.status_code:
        headers.setdefault("Retry-After", "1")
    if not path.startswith(PUBLIC):
        return JSONResponse({"error": message, **fields}, status_code, headers)
    body = {"message": message, "error": HTTPStatus(status_code).phrase, "statusCode": status_code, **fields}
    if "Retry-After" in headers:
        body["retryAfter"] = int(headers["Retry-After"])
    return JSONResponse(body, status_code, headers)


def complaint(errors: Sequence[Any], *, skip: int = 0) -> str:
    """The first of pydantic's errors in words, the guide's own for a field that is missing or empty.

    `skip` leaves out the first parts of the field's path.
    """
    first = errors[0]
    name = ".".join(map(str, first["loc"][skip:]))
    if first["type"] in ("missing", "string_too_short"):
        return f"{name} required"
    if first["type"] == "dict_type":
        return f"{name}: Input should be an object"
    return f"{name}: {first['msg']}"


class PostgresAway(ConnectionError):
    """PostgreSQL takes no connection, has lost one, or cannot do it now, whatever it is."""


class StatementFailed(Exception):
    """PostgreSQL is there, and cannot do this."""


_PASSING_CLASSES = frozenset({"08", "53", "57", "58"})
"""No connection; too little of something, such as room on its disk; somebody stops it, or it is not there yet; what it
stands on fails."""

_PASSING = frozenset({"25006", "25P03", "25P04", "40001", "40P01", "55P03"})
"""It may only be read, as while another takes its place; a transaction that was ended; copies that came together; a
deadlock, and a lock that took too long."""


def passes(sqlstate: str | None) -> bool:
    """Whether what PostgreSQL says is not the statement's fault, and may be over a moment later."""
    return sqlstate is not None and (sqlstate in _PASSING or sqlstate[:2] in _PASSING_CLASSES)


def postgres_is_away(error: Exception) -> bool:
    """Whether an error says that there is no connection, and not that a statement failed."""
    return isinstance(error, (PostgresAway, InterfaceError, PoolTimeout, TimeoutError)) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )


def will_pass(error: Exception) -> bool:
    """Whether the same request may well succeed a moment later."""
    return postgres_is_away(error) or passes(getattr(getattr(error, "orig", None), "sqlstate", None))


def install(app: FastAPI) -> None:
    """Renders every error in the shape of the endpoint that it comes from."""

    async def handle(request: Request, error: Exception) -> Response:
        return rendered(request.url.path, error)

    for kind in _RENDERED:
        app.add_exception_handler(kind, handle)


_RENDERED = (
    SwitchboardError,
    RequestValidationError,
    HTTPException,
    DBAPIError,
    PoolTimeout,
    PostgresAway,
    TimeoutError,
    ClientDisconnect,
)


def rendered(path: str, error: Exception) -> Response:
    """An error in the shape of the endpoint that it comes from. Raises one that nobody expected."""
    match error:
        case SwitchboardError():
            return answer(path, error.status_code, error.message, error.headers, **error.fields)
        case RequestValidationError():
            return answer(path, 400, complaint(error.errors(), skip=1))  # "query", "path"
        case HTTPException():
            return answer(path, error.status_code, error.detail, error.headers)
        case ClientDisconnect():
            # Hung up in the middle of its body: nobody is there to read this.
            return answer(path, 400, "The body is incomplete")
        case _ if isinstance(error, _RENDERED) and will_pass(error):
            log.warning("PostgreSQL is away or busy", error=error)
            return answer(path, 503, "Database unavailable")
        case _:
            raise error
