"""HappyRobot's addresses: hooks and their environments, the versions of its API, pages of its platform."""

import re
from collections.abc import Collection
from urllib.parse import quote, urlsplit, urlunsplit

from switchboard.settings import http_address

_PLATFORM_UI = "https://v2.platform.happyrobot.ai"

PRODUCTION = "production"
ENVIRONMENTS = (PRODUCTION, "staging", "development")

_VERSION = re.compile(r"/v[12]$")
_HOOK = re.compile(r"^/hooks/(?:(?P<environment>staging|development)/)?(?P<slug>[^/]+)$")


def platform_url(org_slug: str | None, workflow: str | None, run_id: str) -> str | None:
    """The run's page at HappyRobot, once organisation and workflow are known."""
    if not org_slug or not workflow:
        return None
    return (
        f"{_PLATFORM_UI}/{quote(org_slug, safe='')}/workflow/{quote(workflow, safe='')}"
        f"/runs?run_id={quote(run_id, safe='')}"
    )


def api_root(url: str, version: int) -> str:
    """Where a version of the Platform API begins, given where any of them does.

    An address without a version is somebody's own and serves as it is.
    """
    return _VERSION.sub(f"/v{version}", url)


def hook_for(url: str, environment: str | None) -> tuple[str, str]:
    """A hook's address in an environment, and that environment; by default the one that the address names.

    Raises ValueError where the two do not fit together.
    """
    parts = urlsplit(url)
    found = _HOOK.match(parts.path)
    named = (found["environment"] if found else None) or PRODUCTION
    if environment in (None, named):
        return url, named
    assert environment is not None  # noqa: S101  # for the type checker
    if found is None:
        raise ValueError(f"only addresses like …/hooks/SLUG can be put into {environment}")
    if found["environment"] is not None:
        raise ValueError(f"the address is of {named}, not of {environment}")
    return urlunsplit(parts._replace(path=f"/hooks/{environment}/{found['slug']}")), environment


_HAPPYROBOT = ".happyrobot.ai"


def may_decide_at(url: str, hook_url: str, hosts: Collection[str]) -> bool:
    """Whether a decision may be sent to an address that came with a callback.

    Where the hook itself is, and, encrypted, at HappyRobot and on hosts that somebody has listed.
    """
    try:
        there, hook = urlsplit(http_address(url)), urlsplit(hook_url)
        if (there.scheme, there.hostname, there.port) == (hook.scheme, hook.hostname, hook.port):
            return True
    except ValueError:
        return False
    host = there.hostname or ""
    listed = host in {each.lower() for each in hosts} or there.netloc.lower() in {each.lower() for each in hosts}
    return there.scheme == "https" and (host.endswith(_HAPPYROBOT) or listed)


def takes_hook_key(url: str, hook_url: str) -> bool:
    """Whether a hook's key may be sent to an address: not to hosts that have nothing to do with the hook."""
    there, hook = urlsplit(url), urlsplit(hook_url)
    if (there.hostname or "").endswith(_HAPPYROBOT) and (hook.hostname or "").endswith(_HAPPYROBOT):
        return there.scheme == "https"
    return there.netloc == hook.netloc and there.scheme == hook.scheme
