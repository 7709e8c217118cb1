"""Where customers' names lead, found out in threads of their own.

The event loop has a few threads for this, which all requests of the process share: a name server that does not answer
would hold up HappyRobot's names, and those of every other customer.
"""

import asyncio
import socket
import threading
from ipaddress import IPv4Address, IPv6Address, ip_address

Address = IPv4Address | IPv6Address

_AT_ONCE = 256
"""Names that are looked up at a time; a thread stays with one for as long as its name server takes."""


_TOO_MANY = "too many names are being looked up"


class Nowhere(Exception):
    """A name that leads nowhere, or of which that cannot be found out now."""


class Names:
    """Looks names up, each once at a time."""

    def __init__(self) -> None:
        self._asked: dict[str, asyncio.Future[list[Address]]] = {}

    async def addresses(self, host: str) -> list[Address]:
        """The addresses of a name, in the order in which they should be tried; raises Nowhere."""
        if host not in self._asked:
            if len(self._asked) >= _AT_ONCE:
                raise Nowhere(_TOO_MANY)
            self._ask(host)
        # Whoever gives up leaves the others waiting.
        return list(await asyncio.shield(self._asked[host]))

    def _ask(self, host: str) -> None:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[Address]] = loop.create_future()
        self._asked[host] = found

        def settle(result: list[Address] | Exception) -> None:
            del self._asked[host]
            if isinstance(result, Exception):
                found.set_exception(result)
                found.exception()  # looked at, should nobody wait any more
            else:
                found.set_result(result)

        def work() -> None:
            try:
                result: list[Address] | Exception = look_up(host)
            except Exception as error:  # noqa: BLE001  # whatever it is, those who wait are told
                result = error if isinstance(error, Nowhere) else Nowhere(f"the name {host} leads nowhere")
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result)

        # A daemon: a process that leaves does not wait for a name server.
        thread = threading.Thread(target=work, name="names", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more of them
            del self._asked[host]
            raise Nowhere(_TOO_MANY) from None


def look_up(host: str) -> list[Address]:
    """The addresses of a name; raises OSError or UnicodeError where there are none."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    # Of a link-local address the rest says by which interface.
    addresses = [ip_address(str(where[0]).partition("%")[0]) for *_, where in found]
    return list(dict.fromkeys(addresses))
