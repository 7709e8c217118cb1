"""Reading JSON bodies: bounded, strict, and storable in PostgreSQL."""

import asyncio
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import AfterValidator, BaseModel, JsonValue, StringConstraints, ValidationError
from pydantic_core import PydanticCustomError, from_json

from switchboard.errors import BadRequest, RequestTimeout, TooLarge, complaint
from switchboard.settings import Settings

# What the parser lets through and PostgreSQL or a browser would not take: NUL characters, and numbers so large
# that they have become infinite. Both are rare, so only a body that looks like it is searched.
_SUSPICIOUS = re.compile(rb"\\u0000|\d[eE]\+?\d{3}|\d{200}")


def _without_nul(value: str) -> str:
    if "\x00" in value:
        raise PydanticCustomError("nul_character", "must not contain a NUL character")
    return value


Text = Annotated[str, AfterValidator(_without_nul)]
ShortText = Annotated[str, StringConstraints(max_length=255), AfterValidator(_without_nul)]
Id = Annotated[str, StringConstraints(min_length=1, max_length=255), AfterValidator(_without_nul)]

Model = TypeVar("Model", bound=BaseModel)


def _strings_and_floats(value: Any) -> Iterator[str | float]:
    if isinstance(value, (str, float)):
        yield value
    elif isinstance(value, dict):
        yield from value  # its keys
        for item in value.values():
            yield from _strings_and_floats(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings_and_floats(item)


def parse(raw: bytes) -> Any:
    """Parses strict JSON: no NaN, no lone surrogates, no NUL, no infinite numbers, 200 levels at most."""
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest("The body is not valid JSON") from error
    if _SUSPICIOUS.search(raw):
        for item in _strings_and_floats(value):
            if isinstance(item, str) and "\x00" in item:
                raise BadRequest("The body contains a NUL character")
            if isinstance(item, float) and math.isinf(item):
                raise BadRequest("The body contains a number that is too large")
    return value


async def read(request: Request) -> bytes:
    """The body's bytes; stops reading as soon as there are too many, or they are too slow to come."""
    state = request.scope["state"]
    settings: Settings = state["settings"]
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) >= settings.max_body_size:
        raise _too_large(settings)
    if (cycle := state.get("cycle")) is not None and cycle.has_arrived():
        # With its head, as most do: there is nothing to wait for.
        message = await request.receive()
        if len(body := message.get("body", b"")) >= settings.max_body_size:
            raise _too_large(settings)
        return bytes(body)
    raw = bytearray()
    try:
        async with asyncio.timeout(settings.request_timeout):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) >= settings.max_body_size:
                    raise _too_large(settings)
    except TimeoutError as error:
        raise RequestTimeout(f"The body must arrive within {settings.request_timeout:g} seconds") from error
    return bytes(raw)


def _too_large(settings: Settings) -> TooLarge:
    return TooLarge(f"The body must be smaller than {settings.max_body_size / 1e6:g} MB")


def check(model: type[Model], value: Any) -> Model:
    """Validates an object against a model; the first complaint becomes the error."""
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise BadRequest(complaint(error.errors(include_url=False, include_input=False))) from error


async def _json_body(request: Request) -> Any:
    return parse(await read(request))


JsonBody = Annotated[Any, Depends(_json_body)]


def body_of(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """An endpoint's body, for the OpenAPI document: it is read by our own strict reader, and not by FastAPI."""
    return {"requestBody": {"required": required, "content": {"application/json": shown(model)}}}


def answered(example: JsonValue) -> dict[int | str, dict[str, Any]]:
    """An endpoint's answer, for the OpenAPI document, where its model's example is another endpoint's."""
    return {200: {"content": {"application/json": {"example": example}}}}


def shown(model: type[BaseModel]) -> dict[str, Any]:
    """A model's schema, and beside it the one example that it has."""
    schema = model.model_json_schema()
    [example] = schema.pop("examples")
    return {"schema": schema, "example": example}
