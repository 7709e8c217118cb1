"""Limits on those who guess credentials."""

import hashlib
from ipaddress import IPv6Address, ip_network
from typing import Annotated

from fastapi import Depends
from redis.asyncio import Redis
from starlette.requests import HTTPConnection
from throttled.asyncio import per_min

from switchboard.access.rates import Rate
from switchboard.edge import ip
from switchboard.errors import TooMany
from switchboard.throttling import Throttle


def address_of(connection: HTTPConnection) -> str:
    """Whose request it is, as far as the network tells; of IPv6 the part that one customer is given."""
    host = connection.client.host if connection.client is not None else ""
    address = ip(host)
    if isinstance(address, IPv6Address) and not address.is_loopback:
        return str(ip_network((address, 64), strict=False))
    return str(address or host)  # or a socket in the file system


class Failures:
    """Wrong credentials, counted by address.

    Good ones are taken however many wrong ones came from the same address: what is guessed here has 256 bits, and
    whoever shares an address with somebody who guesses, a proxy's above all, must not be locked out with them.
    """

    def __init__(self, redis: Redis, per_minute: int) -> None:
        self._throttle, self._quota = Throttle(redis, "failures"), per_min(per_minute)

    async def take(self, address: str) -> Rate:
        """Counts one more of an address."""
        key = hashlib.blake2b(address.encode(), digest_size=12).hexdigest()
        return Rate.of(await self._throttle.limit(key, self._quota))

    async def count(self, address: str) -> None:
        """Counts one more of an address; raises TooMany for one too many."""
        rate = await self.take(address)
        if rate.limited:
            raise TooMany("Too many wrong credentials", retry_after=rate.retry_after)


async def _failures(connection: HTTPConnection) -> Failures:
    failures: Failures = connection.state.failures
    return failures


CurrentFailures = Annotated[Failures, Depends(_failures)]
