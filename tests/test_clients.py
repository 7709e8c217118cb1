"""What others are asked with."""

from typing import Any

import httpx
import pytest

from switchboard.clients import Client
from switchboard.deliveries.sender import Sender
from tests.conftest import settings_for


class Breaks(httpx.AsyncBaseTransport):
    """What anyio makes of a connection that is reset as it is made: it asks a socket that is no more."""

    def __init__(self, question: str) -> None:
        self._question = question

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:  # noqa: ARG002
        return getattr(None, self._question)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["getpeername", "setsockopt"])
async def test_a_connection_that_is_reset_as_it_is_made_was_none(name: str):
    async with Client(transport=Breaks(name)) as client:
        with pytest.raises(httpx.ConnectError, match="reset as it was made"):
            await client.get("http://h.example")
        with pytest.raises(httpx.ConnectError, match="reset as it was made"):
            async with client.stream("POST", "http://h.example"):
                pass


async def test_a_mistake_of_ours_stays_one():
    async with Client(transport=Breaks("something")) as client:
        with pytest.raises(AttributeError, match="something"):
            await client.get("http://h.example")


async def test_no_cookie_is_kept():
    def take(request: httpx.Request) -> httpx.Response:
        assert "cookie" not in request.headers
        return httpx.Response(200, headers={"Set-Cookie": "a=b"})

    async with Client(transport=httpx.MockTransport(take)) as client:
        for _ in range(2):
            assert (await client.get("http://h.example")).status_code == 200
        assert not client.cookies


async def test_a_webhook_that_meets_it_has_failed_as_by_any_other_break(monkeypatch: pytest.MonkeyPatch):
    async def breaks(*_: Any) -> httpx.Response:
        return getattr(None, "getpeername")  # type: ignore[no-any-return]  # noqa: B009

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", breaks)
    settings = settings_for("postgresql://h.example", "redis://h.example", None, allow_private_webhooks=True)
    sender = Sender(settings)
    attempt = await sender.send("http://127.0.0.1:1/", {}, b"{}")
    await sender.aclose()
    assert (attempt.delivered, attempt.error) == (False, "ConnectError: the connection was reset as it was made")
