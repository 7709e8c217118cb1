"""Sending a webhook to a customer's address, which may be anybody's, and must not be ours."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Any

import httpx
from httpx_secure import SSRFProtectionError, httpx_ssrf_protection

from switchboard import tracing
from switchboard.clients import Client
from switchboard.deliveries.names import Address, Names, Nowhere
from switchboard.settings import Settings

TIMEOUT = 10.0
"""Seconds that an attempt may take, from looking up the name to the end of the answer."""

_KEPT = 1_000
"""Bytes of an answer that are kept: the first ones."""

_TRIED = 3
"""Addresses of a name that are tried, in turn, where nothing is listening."""

_LONGEST_ERROR = 500

# Not the address that a name leads to, which is nobody's business.
_PRIVATE = "refused: {} is not an address on the internet"

# Not left to the lists of Python, which call everything public that they do not know.
_UNICAST = IPv6Network("2000::/3")
"""Where all IPv6 addresses of machines on the internet are."""

# The first two hold an IPv4 address, which would be the one that is reached; the last one is for documents.
_NOBODYS = (IPv6Network("2002::/16"), IPv6Network("2001::/32"), IPv6Network("3fff::/20"))

_OF_THE_CLOUD = IPv4Address("168.63.129.16")
"""Looks public, and is Azure's own service for each of its machines."""


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
        self._names = Names()
        # A new connection for each: one that was kept may have been cut, which would look like the customer's fault.
        # Nothing from the environment: a proxy would connect where we may not.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = Client(timeout=TIMEOUT, limits=limits, follow_redirects=False, trust_env=False)
        if not self._private_allowed:
            # Whatever is decided here beforehand: it looks at the address to which it connects.
            httpx_ssrf_protection(self._http, custom_validator=lambda _, address, __: is_public(address))

    async def aclose(self) -> None:
        await self._http.aclose()

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> Attempt:
        """Sends a webhook once. Whatever goes wrong is part of the attempt."""
        started_at, began = datetime.now(UTC), time.perf_counter()
        answered = _Answered()
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._send(url, headers, body, answered)
            error = None
        except (Refused, Nowhere) as refused:
            error = str(refused)
        except SSRFProtectionError as refused:
            error = _PRIVATE.format(refused.hostname)
        except (TimeoutError, httpx.TimeoutException):
            error = f"no answer within {TIMEOUT:g} seconds"
        except (httpx.InvalidURL, ValueError) as trouble:
            error = f"the address cannot be used: {trouble}"
        except (httpx.HTTPError, OSError) as trouble:
            error = f"{type(trouble).__name__}: {trouble}".removesuffix(": ")
        elapsed = round((time.perf_counter() - began) * 1000)
        # Who has answered has answered, whatever becomes of the rest.
        error = answered.complaint if answered.status_code is not None else error
        # Some errors repeat what somebody has sent.
        return Attempt(started_at, elapsed, answered.status_code, answered.response, error and error[:_LONGEST_ERROR])

    async def _send(self, url: str, headers: Mapping[str, str], body: bytes, answered: "_Answered") -> None:
        target = httpx.URL(url)
        addresses = (await self._addresses(target))[:_TRIED]
        more: dict[str, Any] = {
            "headers": {**headers, "Host": target.netloc.decode("ascii")},
            "content": body,
            "timeout": httpx.Timeout(TIMEOUT, connect=TIMEOUT / len(addresses)),
            # What its certificate is to name.
            "extensions": {"sni_hostname": target.raw_host.decode("ascii")},
        }
        for left, address in zip(reversed(range(len(addresses))), addresses, strict=True):
            try:
                with tracing.call("POST", target.host) as took_it:
                    async with self._http.stream("POST", target.copy_with(host=str(address)), **more) as answer:
                        took_it(answer.status_code)
                        await answered.take(answer)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                # Nothing was sent; another of its addresses may be there.
                if not left:
                    raise
            else:
                return

    async def _addresses(self, target: httpx.URL) -> list[Address]:
        """Where to send to, in numbers; refuses what can be seen to be wrong before anything is connected to."""
        if target.scheme not in ("http", "https") or not target.host:
            raise Refused("the address cannot be used: it is none of http:// or https://")
        if self._https_only and target.scheme != "https":
            raise Refused("refused: only https:// addresses are sent to in production")
        found = await self._names.addresses(target.raw_host.decode("ascii"))
        public = [address for address in found if self._private_allowed or is_public(address)]
        if not public:
            raise Refused(_PRIVATE.format(target.host))
        return public


@dataclass(slots=True)
class _Answered:
    """As much of an answer as has come."""

    status_code: int | None = None
    response: str | None = None
    complaint: str | None = None

    async def take(self, answer: httpx.Response) -> None:
        """Reads the beginning of an answer."""
        self.status_code, self.complaint = answer.status_code, _complaint(answer)
        self.response = await _beginning(answer)


def is_public(address: Address) -> bool:
    """Whether this is the address of one machine on the internet."""
    plain = (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
    if isinstance(plain, IPv6Address) and (plain not in _UNICAST or any(plain in network for network in _NOBODYS)):
        return False
    return plain.is_global and not plain.is_multicast and plain != _OF_THE_CLOUD


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
