"""`/docs`: the API to read and to try, from this host alone."""

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse

from switchboard.edge import PAGE_POLICY
from switchboard.errors import NotFound

router = APIRouter(include_in_schema=False)

_HERE = Path(__file__).parent
_SWAGGER = Path(str(files("fastapi_swagger.resources")))

_PAGE = (_HERE / "page.html").read_text()

_ASSETS = {
    "init.js": _HERE / "init.js",
    "favicon-32x32.png": _SWAGGER / "favicon-32x32.png",
    "swagger-ui-bundle.js": _SWAGGER / "swagger-ui-bundle.js",
    "swagger-ui.css": _SWAGGER / "swagger-ui.css",
}


@router.get("/docs")
async def page() -> HTMLResponse:
    """The page, which has no script or style of its own in it."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"})


@router.get("/docs/{name}")
async def asset(name: str) -> FileResponse:
    """What the page loads. The files' names stay the same across releases, so they are kept for a day only."""
    if name not in _ASSETS:
        raise NotFound("Not Found")
    return FileResponse(_ASSETS[name], headers={"Cache-Control": "public, max-age=86400"})
