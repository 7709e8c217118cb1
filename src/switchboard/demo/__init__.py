"""The demonstration: everything started, one call placed and watched."""

import contextlib
import signal
import time
from collections.abc import Iterator

import httpx
from rich.console import Console

from switchboard import local
from switchboard.demo import call, website
from switchboard.demo.screen import DemoFailed
from switchboard.settings import Settings

__all__ = ["DemoFailed", "run"]


def run(*, once: bool, port: int, pace: float, approval: bool) -> None:
    """Starts everything, follows one call to its end, and stays until it is told to leave, unless `once`.

    With `approval` it is a customer's website that starts the call, over the Public API, and decides what it asks.
    """
    console = Console(highlight=False)
    what = "one call that asks first" if approval else "one call, from the trigger to the result"
    console.print(f"\n[bold]Switchboard[/bold]  {what}\n")
    # Whatever the environment says: a demonstration calls nobody, and touches nobody's database.
    settings = Settings(
        environment="development", database_url=None, redis_url=None, happyrobot_webhook_url=None, app_url=None
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            local.environment(ENVIRONMENT="development", ALLOW_ANONYMOUS="true", ALLOW_PRIVATE_WEBHOOKS="true")
        )
        if "log_level" not in settings.model_fields_set:
            # Only what goes wrong stands between the events of the call.
            stack.enter_context(local.environment(LOG_LEVEL="warning"))
        with _step(console, "PostgreSQL and Redis"):
            stack.enter_context(local.servers(settings))
        # Shared with the service, so that what is sealed here can be opened there.
        stack.enter_context(local.app_secret(settings))
        with _step(console, "HappyRobot"):
            simulator = stack.enter_context(local.upstream(settings, pace=pace))
        with _step(console, "Service"):
            address = stack.enter_context(local.child("serve", "--port", str(port), "--for-demo"))
            client = stack.enter_context(httpx.Client(base_url=address, timeout=httpx.Timeout(10, read=_PATIENCE)))
            _expect_an_answer(client)
        if port and not address.endswith(f":{port}"):
            console.print(f"  [yellow]Port {port} is taken; the service listens on {address}.[/yellow]")
        console.print(f"  calls go to the simulator on {simulator}\n")
        watch = website.watch if approval else call.watch
        try:
            hints = stack.enter_context(watch(console, client))
        except httpx.HTTPError as error:
            raise DemoFailed(f"the service did not answer as it should ({error})") from error
        _suggest(console, hints, address)
        if not once:
            console.print("\nEverything stays up until you press Ctrl+C.\n")
            signal.pause()


_PATIENCE = 60.0
"""Seconds that the service, or the call, may be silent."""


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


def _suggest(console: Console, hints: list[str], address: str) -> None:
    console.print("\n[bold]Try next[/bold]\n")
    for line in hints:
        # Not wrapped, so that it can be copied as it stands.
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"\nThe console, to look: {address}/\nThe API, to read and to try: {address}/docs")
