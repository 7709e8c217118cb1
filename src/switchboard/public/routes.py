"""The Public API: everything under `/api/v1/public`, with a key and within its limit."""

from fastapi import APIRouter, Depends, Request
from starlette.exceptions import HTTPException
from starlette.routing import Match

from switchboard.access.callers import customer
from switchboard.errors import PUBLIC
from switchboard.public import approvals, deliveries, executions

router = APIRouter(tags=["public"], dependencies=[Depends(customer)])

_PARTS = (executions.router, approvals.router, deliveries.router)

for _part in _PARTS:
    router.include_router(_part)


_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]


@router.api_route(PUBLIC, methods=_METHODS, include_in_schema=False)
@router.api_route(PUBLIC + "/{rest:path}", methods=_METHODS, include_in_schema=False)
async def nothing(request: Request) -> None:
    """Nothing is here. Who asks for it is counted all the same, and told what is left of their limit."""
    for route in (route for part in _PARTS for route in part.routes):
        if route.matches(request.scope)[0] is Match.PARTIAL:
            allowed = ", ".join(sorted(getattr(route, "methods", ())))
            raise HTTPException(405, "Method Not Allowed", {"Allow": allowed})
    raise HTTPException(404, "Not Found")
