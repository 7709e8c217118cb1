"""A customer's website: starts a call over the Public API, is told about it, and decides what it asks."""

import contextlib
import hashlib
import hmac
import json
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import httpx
from pydantic import SecretStr
from rich.console import Console
from rich.markup import escape
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard import database, local
from switchboard.access import keys, webhooks
from switchboard.access.keys import ApiKey
from switchboard.demo.screen import DemoFailed, coloured, line, panel
from switchboard.errors import PUBLIC
from switchboard.settings import Settings
from switchboard.tables import KeyScope

_PATIENCE = 60.0
"""Seconds until the next webhook, at most."""

_CUSTOMERS = [
    {"customerId": "C-1", "name": "Ada Miller", "phone": "+15550100"},
    {"customerId": "C-2", "name": "Sam Okafor", "phone": "+15550101"},
]

Result = TypeVar("Result")


@contextlib.contextmanager
def watch(console: Console, client: httpx.Client) -> Iterator[list[str]]:
    """Starts a call, approves it, and shows it to its end; gives the lines that can be tried next."""
    with _receiving() as (url, arrived):
        key, text, secret = _in_database(lambda conn, settings: _new_key(conn, settings, url))
        try:
            api = _Api(client, text.get_secret_value())
            execution_id = _start(console, api)
            _follow(console, api, arrived, secret, execution_id)
            yield _hints(str(client.base_url).rstrip("/"), text.get_secret_value(), execution_id)
        finally:
            # What was shown on a screen opens nothing once it is over.
            _in_database(lambda conn, _: keys.revoke(conn, key.id))


class _Api:
    """The Public API, with the website's key."""

    def __init__(self, client: httpx.Client, key: str) -> None:
        self._client = client
        self._headers = {"Authorization": f"Bearer {key}"}

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._client.request(method, PUBLIC + path, json=body, headers=self._headers)
        if answer.is_error:
            raise DemoFailed(f"{method} {path} was answered {answer.status_code}: {answer.text}")
        return answer.json()


def _start(console: Console, api: _Api) -> str:
    path = "/agents/default/execute"
    body = {"input": {"csvData": _CUSTOMERS, "simulate": {"approval": True}}, "description": "Confirm what is sent"}
    execution_id = str(api.ask("POST", path, body)["executionId"])
    console.print(f"[bold]POST {PUBLIC}{path}[/bold]  [dim]execution {execution_id[:8]}…[/dim]")
    console.print("[bold]webhooks[/bold], as the website gets them\n")
    return execution_id


def _follow(
    console: Console, api: _Api, arrived: "queue.Queue[_Webhook]", secret: SecretStr, execution_id: str
) -> None:
    status = "pending"
    while status not in ("completed", "failed"):
        try:
            webhook = arrived.get(timeout=_PATIENCE)
        except queue.Empty:
            raise DemoFailed("no webhook came") from None
        if not webhook.is_signed_with(secret):
            raise DemoFailed("a webhook was not signed as it should")
        told = json.loads(webhook.body)
        status = told["data"]["status"]
        signed = "[green]✓[/green] signature"
        line(console, told["timestamp"], (26, coloured(told["event"], status)), (0, signed))
        if status == "pending_approval":
            _approve(console, api, execution_id)
    results = api.ask("GET", f"/executions/{execution_id}/results")
    output = results["output"] if isinstance(results["output"], dict) else {}
    shown = {name: escape(str(value)) for name, value in output.items()}
    panel(console, "GET …/results", {"status": coloured(status, status)} | shown)
    if status != "completed":
        raise DemoFailed(f"the execution ended as {status}")


def _approve(console: Console, api: _Api, execution_id: str) -> None:
    pending = api.ask("GET", f"/executions/{execution_id}/pending-approval")
    data = pending["approvalData"]
    rows = {str(row.get("name") or row.get("customerId")): _shown(row) for row in data["rows"]}
    panel(console, f"GET …/pending-approval: {escape(str(data['metadata'].get('title')))}", rows)
    body = {"comment": "Content approved, looks good", "approvalId": pending["approvalId"]}
    answer = api.ask("POST", f"/executions/{execution_id}/approve", body)
    console.print(f"\n[bold]POST …/approve[/bold]  {escape(answer['message'])}\n")


def _shown(row: dict[str, Any]) -> str:
    return escape(f"{row.get('generated_content')} ({row.get('compliance_status')})")


def _hints(address: str, key: str, execution_id: str) -> list[str]:
    header = f"-H 'Authorization: Bearer {key}'"
    return [
        f"curl '{address}{PUBLIC}/executions/{execution_id}/status' {header}",
        f"curl '{address}{PUBLIC}/deliveries' {header}",
    ]


# The website's own server.


class _Webhook:
    def __init__(self, body: bytes, signature: str) -> None:
        self.body = body
        self._signature = signature

    def is_signed_with(self, secret: SecretStr) -> bool:
        """The check that the Public API's document shows."""
        expected = hmac.new(secret.get_secret_value().encode(), self.body, hashlib.sha256).hexdigest()
        return hmac.compare_digest(self._signature, f"sha256={expected}")


@contextlib.contextmanager
def _receiving() -> Iterator[tuple[str, "queue.Queue[_Webhook]"]]:
    arrived: queue.Queue[_Webhook] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # its base class looks for this name
            body = self.rfile.read(int(self.headers["Content-Length"]))
            arrived.put(_Webhook(body, self.headers["X-Webhook-Signature"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer((local.LOOPBACK, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://{local.LOOPBACK}:{server.server_port}/webhooks", arrived
        finally:
            server.shutdown()


# What an operator does with `switchboard keys create`.


async def _new_key(conn: AsyncConnection, settings: Settings, url: str) -> tuple[ApiKey, SecretStr, SecretStr]:
    key, text = await keys.create(conn, "demonstration", [KeyScope.PUBLIC])
    secret = await webhooks.point(conn, settings, key.id, url, None)
    assert secret is not None  # noqa: S101  # a new key has none yet
    return key, text, secret


def _in_database(work: Callable[[AsyncConnection, Settings], Awaitable[Result]]) -> Result:
    settings = Settings(environment="development")
    assert settings.database_url is not None  # noqa: S101  # the demonstration has started it
    url = settings.database_url.get_secret_value()

    async def do() -> Result:
        engine = database.connect(url)
        try:
            async with engine.begin() as conn:
                return await work(conn, settings)
        finally:
            await engine.dispose()

    return local.run(do())
