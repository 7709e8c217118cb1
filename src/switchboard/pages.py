"""Lists that come in pages: the way to the next one."""

from urllib.parse import quote, urlencode

from fastapi import Request, Response


def link_next(request: Request, response: Response, **place: str | int) -> None:
    """Says in `Link` where the list goes on; `place` replaces what the query says of where it begins."""
    # Relative, so that it is right behind any proxy. As it came, so that an id with a slash in it stays one.
    path = quote(request.scope["raw_path"], safe="/%")
    query = urlencode({**request.query_params, **place})
    response.headers["Link"] = f'<{path}?{query}>; rel="next"'
