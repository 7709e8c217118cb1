"""Calls to HappyRobot: the only file that knows its addresses and headers.

HappyRobotError
├── NotSent         the request never left: nothing was started
├── Refused         HappyRobot answered that it did not
└── Unknown         it may have been started; nobody can say
"""

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import quote

import httpx
from fastapi import Depends
from pydantic import SecretStr
from pydantic_core import from_json
from starlette.requests import HTTPConnection

from switchboard.happyrobot.payloads import TriggerAnswer, read_run_status
from switchboard.settings import Settings
from switchboard.tables import RunStatus

_PLATFORM_UI = "https://v2.platform.happyrobot.ai"
_MAX_ANSWER = 10_000_000
_CONNECT_TIMEOUT = 5.0
"""Seconds to wait for a connection, a free one or a new one: until then nothing has been sent."""

_STATUS_TIMEOUT = 2.0
"""Seconds. Whoever asks for a status waits no longer for HappyRobot; the database answers instead."""


class HappyRobotError(Exception):
    """HappyRobot did not do what it was asked for; the message says what happened, without secrets."""


class NotSent(HappyRobotError):
    pass


class Refused(HappyRobotError):
    pass


class Unknown(HappyRobotError):
    pass


@dataclass(frozen=True, slots=True)
class Hook:
    """What starts a workflow."""

    url: str
    key: SecretStr | None = None


def platform_url(settings: Settings, run_id: str) -> str | None:
    """The run's page at HappyRobot, once slug and workflow are known."""
    slug, workflow = settings.happyrobot_org_slug, settings.happyrobot_workflow_id
    if not slug or not workflow:
        return None
    return (
        f"{_PLATFORM_UI}/{quote(slug, safe='')}/workflow/{quote(workflow, safe='')}"
        f"/runs?run_id={quote(run_id, safe='')}"
    )


class HappyRobot:
    """A pool of connections to HappyRobot's hooks and its Platform API."""

    def __init__(self, settings: Settings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._settings = settings

        def client(timeout: float) -> httpx.AsyncClient:
            return httpx.AsyncClient(
                transport=transport,
                timeout=httpx.Timeout(timeout, connect=_CONNECT_TIMEOUT, pool=_CONNECT_TIMEOUT),
                limits=httpx.Limits(max_connections=100, max_keepalive_connections=20),
                headers={"User-Agent": "switchboard"},
            )

        # Apart, so that hooks which hang leave the Platform API its connections.
        self._hooks = client(settings.happyrobot_trigger_timeout)
        self._platform = client(_STATUS_TIMEOUT)

    async def aclose(self) -> None:
        await self._hooks.aclose()
        await self._platform.aclose()

    async def trigger(self, hook: Hook, payload: dict[str, Any]) -> list[str]:
        """Starts a workflow and returns its runs' ids, at least one.

        Sent once: HappyRobot knows no idempotency key, so a second request would be a second phone call.
        """
        headers = {"X-API-KEY": hook.key.get_secret_value()} if hook.key else {}
        try:
            async with asyncio.timeout(self._settings.happyrobot_trigger_timeout):
                request = self._hooks.build_request("POST", hook.url, json=payload, headers=headers)
                status, body = await _send(self._hooks, request)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise NotSent(f"HappyRobot cannot be reached ({type(error).__name__})") from error
        except (httpx.HTTPError, TimeoutError) as error:
            raise Unknown(f"HappyRobot did not answer ({type(error).__name__})") from error
        if not httpx.codes.is_success(status):
            raise Refused(f"HappyRobot answered {status}")
        try:
            run_ids = TriggerAnswer.model_validate(from_json(body)).run_ids
        except ValueError as error:
            raise Unknown(f"HappyRobot answered {status} with something unreadable") from error
        if not run_ids:
            raise Unknown(f"HappyRobot answered {status} without naming a run")
        return run_ids

    async def run_status(self, run_id: str) -> RunStatus | None:
        """Asks the Platform API; None when there is no key, no answer in time, or no word that is known."""
        key = self._settings.happyrobot_api_key
        if key is None:
            return None
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"}
        if self._settings.happyrobot_org_id:
            headers["x-organization-id"] = self._settings.happyrobot_org_id
        url = f"{self._settings.happyrobot_api_url}/runs/{quote(run_id, safe='')}"
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT):
                status, body = await _send(self._platform, self._platform.build_request("GET", url, headers=headers))
            return read_run_status(from_json(body)) if status == httpx.codes.OK else None
        except (httpx.HTTPError, TimeoutError, ValueError):
            return None


async def _send(client: httpx.AsyncClient, request: httpx.Request) -> tuple[int, bytes]:
    response = await client.send(request, stream=True)
    try:
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > _MAX_ANSWER:
                raise httpx.DecodingError("the answer is too large", request=request)
        return response.status_code, bytes(body)
    finally:
        await response.aclose()


def _happyrobot(connection: HTTPConnection) -> HappyRobot:
    happyrobot: HappyRobot = connection.state.happyrobot
    return happyrobot


CurrentHappyRobot = Annotated[HappyRobot, Depends(_happyrobot)]
