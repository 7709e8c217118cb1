"""`/`: the operator's page, which uses nothing but the API that everybody has."""

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Self

from fastapi import APIRouter, Request, Response

from switchboard.edge import PAGE_POLICY
from switchboard.errors import NotFound
from switchboard.settings import CurrentSettings, Settings

router = APIRouter(include_in_schema=False)

_HERE = Path(__file__).parent
_KINDS = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_RECORDINGS = "media-src https:"
"""Recordings play from wherever HappyRobot keeps them."""

_SIMULATED_RECORDINGS = " http://127.0.0.1:* http://localhost:*"


@dataclass(frozen=True, slots=True)
class _File:
    """One of the page's files, as it is sent."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, path: Path) -> Self:
        content = path.read_bytes()
        # Of what is in it: a release may have the same size and time as the one before.
        etag = f'"{blake2b(content, digest_size=16).hexdigest()}"'
        return cls(content, _KINDS[path.suffix], etag)


_PAGE = _File.of(_HERE / "page.html")
_FILES = {path.name: _File.of(path) for path in _HERE.iterdir() if path.suffix in _KINDS and path.suffix != ".html"}


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request, settings: CurrentSettings) -> Response:
    """The page, which has no script, style or data of its own in it."""
    return _answer(request, _PAGE, {"Content-Security-Policy": page_policy(settings)})


@router.api_route("/console/{name}", methods=["GET", "HEAD"])
async def file(request: Request, name: str) -> Response:
    """What the page loads."""
    if name not in _FILES:
        raise NotFound("Not Found")
    return _answer(request, _FILES[name], {})


def page_policy(settings: Settings) -> str:
    """What the page may load: its own files, and recordings; from this machine only where the simulator may run."""
    simulated = _SIMULATED_RECORDINGS if settings.environment == "development" else ""
    return f"{PAGE_POLICY}; {_RECORDINGS}{simulated}"


def _answer(request: Request, file: _File, headers: dict[str, str]) -> Response:
    # Asked for each time, and sent only if it is another one: modules of two releases do not fit together.
    headers |= {"Cache-Control": "no-cache", "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
