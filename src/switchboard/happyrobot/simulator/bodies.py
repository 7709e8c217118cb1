"""Reading JSON bodies, headers and keys, and saying no."""

import json
import secrets
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

HEADERS_OF_INTEREST = ("content-type", "idempotency-key", "user-agent", "x-api-key", "x-request-id")


async def json_object(request: Request) -> dict[str, Any]:
    """The body, if it is a JSON object that can be written down again; 400 otherwise."""
    try:
        body = json.loads(await request.body(), parse_constant=_not_json)
        json.dumps(body, ensure_ascii=False).encode()  # lone surrogates
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body is not a JSON object")
    return body


def _not_json(constant: str) -> None:
    raise ValueError(constant)


def is_key(given: str | None, key: str | None) -> bool:
    """Where no key is set, every request is welcome."""
    return key is None or secrets.compare_digest((given or "").encode(), key.encode())


def headers_of_interest(request: Request) -> dict[str, str]:
    return {name: request.headers[name] for name in HEADERS_OF_INTEREST if name in request.headers}


def masked(headers: Mapping[str, str]) -> dict[str, str]:
    """For others to see: without the key itself, which may be a real one."""
    return {name: "***" if name == "x-api-key" else value for name, value in headers.items()}


async def refusal(request: Request, error: Exception) -> Response:
    """The one error handler: v2 has an envelope of its own, everything else says `message`."""
    assert isinstance(error, HTTPException)  # noqa: S101 -- registered for no other
    body: dict[str, Any] = {"message": error.detail}
    if request.url.path.startswith("/api/v2/"):
        status = HTTPStatus(error.status_code)
        body = {"error": status.phrase, "message": error.detail, "statusCode": status.value}
    return JSONResponse(body, error.status_code, headers=error.headers)
