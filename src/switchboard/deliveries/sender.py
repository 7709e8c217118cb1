"""Sending a webhook to a customer's address, which may be anybody's, and must not be ours."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

import httpx
from httpx_secure import SSRFProtectionError, httpx_ssrf_protection

from switchboard.settings import Settings

TIMEOUT = 10.0
"""Seconds that an attempt may take, from looking up the name to the end of the answer."""

_KEPT = 1_000
"""Bytes of an answer that are kept: the first ones."""

_NAMES_KEPT = 30.0
"""Seconds for which it is remembered where a name leads."""

_PRIVATE = "refused: {} is not an address on the internet"

# Not left to the lists of Python, which call everything public that they do not know.
_UNICAST = IPv6Network("2000::/3")
"""Where all IPv6 addresses of machines on the internet are."""

# The first two hold an IPv4 address, which would be the one that is reached; the last one is for documents.
_NOBODYS = (IPv6Network("2002::/16"), IPv6Network("2001::/32"), IPv6Network("3fff::/20"))


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of sending a webhook once."""

    started_at: datetime
    duration_ms: int
    status_code: int | None = None
    response: str | None = None
    """How the answer began."""
    error: str | None = None
    """Why it failed; None where it was delivered."""

    @property
    def delivered(self) -> bool:
        return self.error is None


class Refused(Exception):
    """Nothing is sent to this address; the message says why."""


class Sender:
    """Sends to addresses on the internet, and to no others unless the settings say so."""

    def __init__(self, settings: Settings) -> None:
        self._private_allowed = settings.allow_private_webhooks
        self._https_only = settings.environment == "production"
        # A new connection for each: one that was kept may have been cut, which would look like the customer's fault.
        # Nothing from the environment: a proxy would connect where we may not.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(timeout=TIMEOUT, limits=limits, follow_redirects=False, trust_env=False)
        if not self._private_allowed:
            # Decides by the address to which it has connected, whatever the name meant a moment ago.
            httpx_ssrf_protection(
                self._http, custom_validator=lambda _, address, __: is_public(address), dns_cache_ttl=_NAMES_KEPT
            )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> Attempt:
        """Sends a webhook once. Whatever goes wrong is part of the attempt."""
        started_at, began = datetime.now(UTC), time.perf_counter()
        status_code = response = None
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._look(url)
                async with self._http.stream("POST", url, headers=headers, content=body) as answer:
                    status_code = answer.status_code
                    response = await _beginning(answer)
            error = _complaint(answer)
        except Refused as refused:
            error = str(refused)
        except SSRFProtectionError as refused:
            error = _PRIVATE.format(refused.ip_addr or refused.hostname)
        except (TimeoutError, httpx.TimeoutException):
            error = f"no answer within {TIMEOUT:g} seconds"
        except (httpx.InvalidURL, ValueError) as trouble:
            error = f"the address cannot be used: {trouble}"
        except (httpx.HTTPError, OSError) as trouble:
            error = f"{type(trouble).__name__}: {trouble}".removesuffix(": ")
        elapsed = round((time.perf_counter() - began) * 1000)
        return Attempt(started_at, elapsed, status_code, response, error)

    async def _look(self, url: str) -> None:
        """Refuses what can be seen to be wrong before anything is connected to."""
        parts = urlsplit(url)
        if self._https_only and parts.scheme != "https":
            raise Refused("refused: only https:// addresses are sent to in production")
        if self._private_allowed:
            return
        host = parts.hostname or ""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, parts.port or 443, type=1)
        except (OSError, UnicodeError) as error:
            raise Refused(f"the name {host} leads nowhere") from error
        addresses = [ip_address(str(address[0]).partition("%")[0]) for *_, address in found]
        if not any(map(is_public, addresses)):
            raise Refused(_PRIVATE.format(addresses[0] if addresses else host))


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether this is the address of one machine on the internet."""
    plain = (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
    if isinstance(plain, IPv6Address) and (plain not in _UNICAST or any(plain in network for network in _NOBODYS)):
        return False
    return plain.is_global and not plain.is_multicast


def _complaint(answer: httpx.Response) -> str | None:
    if answer.is_success:
        return None
    if answer.has_redirect_location:
        return f"answered {answer.status_code}: redirects are not followed"
    return f"answered {answer.status_code}"


async def _beginning(answer: httpx.Response) -> str:
    # As it comes, without unpacking: a small answer can be made to unpack into a huge one.
    found = bytearray()
    async for chunk in answer.aiter_raw(_KEPT):
        found += chunk
        if len(found) >= _KEPT:
            break
    return bytes(found[:_KEPT]).decode(errors="replace").replace("\x00", "\ufffd")
