"""A call of an application's own: triggered, and followed over a stream."""

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, connect_sse
from rich.console import Console
from rich.markup import escape

from switchboard.demo.screen import DemoFailed, coloured, line, panel


@contextlib.contextmanager
def watch(console: Console, client: httpx.Client) -> Iterator[list[str]]:
    """Places a call and shows it to its end; gives the lines that can be tried next."""
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
    yield _hints(str(client.base_url).rstrip("/"))


def _follow(console: Console, events: Iterator[ServerSentEvent], run_id: str) -> str:
    for sse in events:
        if not sse.data:
            continue
        event = sse.json()
        if event["run_id"] != run_id:
            continue
        text = event["data"].get("message", "") if isinstance(event["data"], dict) else ""
        line(
            console,
            event["timestamp"],
            (6, f"[dim]#{event['id']}[/]"),
            (10, coloured(event["event_type"], event["status"])),
            (0, escape(str(text))),
        )
        if event["status"] not in ("PENDING", "RUNNING"):
            return str(event["status"])
    raise DemoFailed("the stream ended before the call did")


def _show_result(console: Console, run: dict[str, Any]) -> None:
    outcome = run["metadata"].get("result") or run["metadata"].get("error") or {}
    shown = {"status": coloured(run["status"], run["status"]), "logs kept": len(run["metadata"]["logs"])}
    if isinstance(outcome, dict):
        shown |= {name: escape(str(value)) for name, value in outcome.items()}
    panel(console, "stored in PostgreSQL", shown)


def _hints(address: str) -> list[str]:
    trigger = """-H 'Content-Type: application/json' -d '{"context_id": "order_123", "name": "My first call"}'"""
    return [
        f"curl -N '{address}/api/events?last_event_id=0'",
        f"curl '{address}/api/happyrobot/runs?limit=1'",
        f"curl -X POST {address}/api/happyrobot/trigger {trigger}",
    ]
