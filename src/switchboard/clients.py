"""Clients of those whom we ask."""

from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx


class Client(httpx.AsyncClient):
    """httpx's, without cookies: one host's could be sent to another's.

    A connection that is reset in the moment in which it is made fails as any other does.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])), **options)

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        try:
            return await super().send(request, **options)
        except AttributeError as error:
            if error.obj is not None or error.name not in {"getpeername", "setsockopt"}:
                raise
            # The socket that anyio, or httpcore, asks is gone by then; nothing has been sent.
            raise httpx.ConnectError("the connection was reset as it was made", request=request) from error
