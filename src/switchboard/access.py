"""Who may ask."""

from fastapi import Depends

from switchboard.errors import Unauthorized
from switchboard.settings import CurrentSettings


async def _allowed(settings: CurrentSettings) -> None:
    if not settings.anonymous_allowed:
        raise Unauthorized("Unauthorized")


Allowed = Depends(_allowed)
"""Lets a request pass where anonymous requests are answered."""
