"""What the Public API's endpoints have in common: names in camelCase, and how they refuse."""

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from switchboard.errors import PublicErrorOut, Responses, described

RATE_HEADERS = {
    "X-RateLimit-Limit": {"description": "Requests at once, at most.", "schema": {"type": "integer"}},
    "X-RateLimit-Remaining": {"description": "Requests that are left now.", "schema": {"type": "integer"}},
    "X-RateLimit-Reset": {
        "description": "When all are there again, in milliseconds since 1970.",
        "schema": {"type": "integer"},
    },
}


class Camel(BaseModel):
    """A model whose fields are written in camelCase."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


def refusals(*statuses: int) -> Responses:
    """The errors of an endpoint; those of keys and limits are everybody's."""
    return described(*sorted({401, 403, 429, *statuses}), model=PublicErrorOut)
