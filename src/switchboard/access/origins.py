"""Where a request comes from, for those that any page could make a browser send."""

from urllib.parse import urlsplit

from fastapi import Request

from switchboard.edge import ip
from switchboard.settings import Settings

_NOBODYS = (".internal", ".local", ".localhost", ".test")
"""Ends of names that mean something in a private network alone, and that nobody can register (but take, in there)."""


def is_from_here(request: Request, settings: Settings) -> bool:
    """Whether this comes from a page of this origin or of one that `CORS_ORIGINS` trusts, or from no browser."""
    origin = request.headers.get("origin")
    if origin is not None and origin.lower() in settings.cors_origins:
        return True
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        # Somebody who follows a link from elsewhere, or types an address, reads the answer themselves.
        followed = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"
        return site in ("same-origin", "none") or followed
    # What an older browser says, or one that has no encrypted connection.
    if origin is None:
        return True
    # A proxy may ask under another name, and says under which it was asked. No page can, without asking beforehand.
    hosts = (request.headers.get(name, "").lower() for name in ("host", "x-forwarded-host"))
    return _place(origin) in {*hosts, _place(settings.app_url)} - {""}


def is_ours(request: Request, settings: Settings) -> bool:
    """Whether the host name that was asked cannot be that of somebody who makes it lead here, page and all."""
    host = request.headers.get("host")
    if host is None:
        return True  # every browser says it
    name = _name(f"//{host}")
    if name and ("." not in name or name.endswith(_NOBODYS)):
        return True
    if name in {_name(address) for address in (settings.app_url, *settings.cors_origins) if address}:
        return True
    return ip(name) is not None


def _place(address: str | None) -> str:
    """Name and port as they stand in an address; nothing of what is none."""
    try:
        return urlsplit(address or "").netloc.lower()
    except ValueError:
        return ""


def _name(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
