"""Routes that answer as directly as they can: for what is asked all the time.

They stand in the document like any other. But nothing looks for parameters, checks what is returned, or tries the other
routes first: the endpoint is given the request, and returns the response.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from switchboard import edge, errors, tracing
from switchboard.settings import Settings

Endpoint = Callable[[Request], Awaitable[Response]]


class DirectRoute(APIRoute):
    """A route whose endpoint takes the request and returns the response."""

    def __init__(self, path: str, endpoint: Endpoint, **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self.endpoint(Request(scope, receive, send))
        except Exception as error:  # noqa: BLE001  # what nobody expected is raised again
            response = errors.rendered(scope["path"], error)
        await response(scope, receive, send)


def direct(router: APIRouter, method: str, path: str, **options: Any) -> Callable[[Endpoint], Endpoint]:
    """Adds a direct route to a router, as its own decorators add the others."""

    def add(endpoint: Endpoint) -> Endpoint:
        route = DirectRoute(router.prefix + path, endpoint, methods=[method], tags=router.tags, **options)
        router.routes.append(route)
        return endpoint

    return add


class Application(FastAPI):
    """FastAPI, and past most of it the direct routes, which have the same edge around them."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        super().__init__(**options)
        self._settings = settings
        self._direct: dict[tuple[str, str], ASGIApp] = {}

    def add_direct(self, *routes: object) -> None:
        """Lets these routes, which are the application's by now, be found at once."""
        for route in routes:
            if isinstance(route, DirectRoute):
                app = tracing.Traced(edge.around(_Named(route), self._settings))
                self._direct |= {(method, route.path): app for method in route.methods or ()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (app := self._direct.get((scope["method"], scope["path"]))) is not None:
            scope["app"] = self
            await app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class _Named:
    """Says in the scope which route it is, as the router does."""

    def __init__(self, route: DirectRoute) -> None:
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self._route
        await self._route.app(scope, receive, send)
