"""The demonstration: everything started, one call placed and watched."""

import contextlib
import secrets
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, connect_sse
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table

from switchboard import local
from switchboard.settings import Settings

_PATIENCE = 60.0
"""Seconds that the service, or the call, may be silent."""

_COLOURS = {"RUNNING": "cyan", "PENDING": "cyan", "COMPLETED": "green", "FAILED": "red", "CANCELED": "yellow"}


class DemoFailed(Exception):
    """The call did not go as it should."""


def run(*, once: bool, port: int, pace: float) -> None:
    """Starts everything, follows one call to its end, and stays until it is told to leave, unless `once`."""
    console = Console(highlight=False)
    console.print("\n[bold]Switchboard[/bold]  one call, from the trigger to the result\n")
    # Whatever the environment says: a demonstration calls nobody, and touches nobody's database.
    settings = Settings(
        environment="development", database_url=None, redis_url=None, happyrobot_webhook_url=None, app_url=None
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(local.environment(ENVIRONMENT="development", ALLOW_ANONYMOUS="true"))
        if "log_level" not in settings.model_fields_set:
            # Only what goes wrong stands between the events of the call.
            stack.enter_context(local.environment(LOG_LEVEL="warning"))
        with _step(console, "PostgreSQL and Redis"):
            stack.enter_context(local.servers(settings))
        with _step(console, "HappyRobot"):
            simulator = stack.enter_context(local.upstream(settings, pace=pace))
        with _step(console, "Service"):
            address = stack.enter_context(local.child("serve", "--port", str(port), "--for-demo"))
            client = stack.enter_context(httpx.Client(base_url=address, timeout=httpx.Timeout(10, read=_PATIENCE)))
            _expect_an_answer(client)
        if not address.endswith(f":{port}"):
            console.print(f"  [yellow]Port {port} is taken; the service listens on {address}.[/yellow]")
        console.print(f"  calls go to the simulator on {simulator}\n")
        try:
            _watch_a_call(console, client)
        except httpx.HTTPError as error:
            raise DemoFailed(f"the service did not answer as it should ({error})") from error
        _suggest(console, address)
        if not once:
            console.print("\nEverything stays up until you press Ctrl+C.\n")
            signal.pause()


@contextlib.contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    started = time.monotonic()
    with console.status(f"starting {what} …"):
        yield
    console.print(f"  [green]✓[/green] {what} [dim]{time.monotonic() - started:.1f} s[/dim]")


def _expect_an_answer(client: httpx.Client) -> None:
    # Its socket listens already: the request waits there until the service is ready.
    try:
        client.get("/healthz").raise_for_status()
    except httpx.HTTPError as error:
        raise DemoFailed("the service does not answer") from error


def _watch_a_call(console: Console, client: httpx.Client) -> None:
    load = str(secrets.randbelow(9000) + 1000)
    context_id = f"load-{load}"
    with connect_sse(client, "GET", "/api/events", params={"context_id": context_id}) as stream:
        stream.response.raise_for_status()
        answer = client.post(
            "/api/happyrobot/trigger",
            json={
                "context_id": context_id,
                "name": "Carrier check call",
                "load_id": load,
                "customer_name": "Blue Mesa Freight",
                "origin": "Laredo, TX",
                "destination": "Dallas, TX",
                "rate": 1450,
            },
        )
        if answer.is_error:
            raise DemoFailed(f"the trigger was answered {answer.status_code}: {answer.text}")
        run_id = answer.json()["run_ids"][0]
        console.print(f"[bold]POST /api/happyrobot/trigger[/bold]  context [cyan]{context_id}[/cyan]")
        console.print(f"[bold]GET  /api/events?context_id={context_id}[/bold]  [dim]run {run_id[:8]}…[/dim]\n")
        status = _follow(console, stream.iter_sse(), run_id)
    run = client.get(f"/api/happyrobot/runs/{run_id}").raise_for_status().json()
    _show_result(console, run)
    if status != "COMPLETED" or run["status"] != "COMPLETED":
        raise DemoFailed(f"the call ended as {run['status']}")


def _follow(console: Console, events: Iterator[ServerSentEvent], run_id: str) -> str:
    for sse in events:
        if not sse.data:
            continue
        event = sse.json()
        if event["run_id"] != run_id:
            continue
        _show_event(console, event)
        if event["status"] not in ("PENDING", "RUNNING"):
            return str(event["status"])
    raise DemoFailed("the stream ended before the call did")


def _show_event(console: Console, event: dict[str, Any]) -> None:
    colour = _COLOURS[event["status"]]
    text = event["data"].get("message", "") if isinstance(event["data"], dict) else ""
    line = Table.grid(padding=(0, 2))
    for width in (12, 6, 10):
        line.add_column(width=width, no_wrap=True)
    line.add_row(
        f"[dim]{event['timestamp'][11:23]}[/]",
        f"[dim]#{event['id']}[/]",
        f"[{colour}]{escape(event['event_type'])}[/]",
        escape(str(text)),
    )
    console.print(Padding(line, (0, 0, 0, 2)))


def _show_result(console: Console, run: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("status", f"[{_COLOURS[run['status']]}]{run['status']}[/]")
    table.add_row("logs kept", str(len(run["metadata"]["logs"])))
    outcome = run["metadata"].get("result") or run["metadata"].get("error") or {}
    for name, value in outcome.items() if isinstance(outcome, dict) else ():
        table.add_row(escape(str(name)), escape(str(value)))
    console.print()
    console.print(Panel(table, title="stored in PostgreSQL", title_align="left", expand=False))


def _suggest(console: Console, address: str) -> None:
    console.print("\n[bold]Try next[/bold]\n")
    trigger = """-H 'Content-Type: application/json' -d '{"context_id": "order_123", "name": "My first call"}'"""
    for line in (
        f"curl -N '{address}/api/events?last_event_id=0'",
        f"curl '{address}/api/happyrobot/runs?limit=1'",
        f"curl -X POST {address}/api/happyrobot/trigger {trigger}",
    ):
        # Not wrapped, so that it can be copied as it stands.
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"\nThe API, to read and to try: {address}/docs")
