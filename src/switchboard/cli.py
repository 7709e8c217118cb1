"""The `switchboard` command.

What a command needs is imported when it runs: everything together takes longer to import than most commands take.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup
from typer.main import get_group

from switchboard import __version__, garbage, local

if TYPE_CHECKING:
    from pydantic import SecretStr

_GROUPS = ("keys", "workflows", "deliveries", "secrets")
"""Modules of `switchboard.commands`."""


class _Commands(TyperGroup):
    """The commands of this module, and the groups, each of which is imported once it is asked for."""

    # Typer keeps the types of these to itself.
    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_GROUPS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _GROUPS:
            return super().get_command(ctx, cmd_name)
        group = get_group(import_module(f"switchboard.commands.{cmd_name}").app)
        group.name = cmd_name
        return group


app = typer.Typer(
    cls=_Commands,
    help="The backend between an application and HappyRobot's voice agents.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Hidden = Annotated[bool, typer.Option(hidden=True)]


_LOOPBACK = (local.LOOPBACK, "localhost", "::1")


def main() -> None:
    """Runs the command; what went wrong is a line, not a traceback."""
    # Nearly all that an import makes stays: to look through it for garbage every 700 objects takes a fifth of a start.
    garbage.search_rarely()
    try:
        app()
    except Exception as error:  # noqa: BLE001  # Python's own traceback would repeat, say, a malformed password
        sys.exit(f"switchboard: {_said(error)}")


def _said(error: Exception) -> str:
    """A sentence of ours, or else where it happened and what of it nobody has sent."""
    from pydantic import ValidationError

    from switchboard.demo import DemoFailed
    from switchboard.embedded import EmbeddedUnavailable
    from switchboard.errors import PostgresAway
    from switchboard.logs.traces import trace
    from switchboard.sealing import SealBroken, SecretMissing

    match error:
        case ValidationError():
            complaints = [
                f"  {'.'.join(map(str, complaint['loc'])).upper()}: {complaint['msg']}".replace("  : ", "  ")
                for complaint in error.errors(include_url=False, include_input=False)
            ]
            return "\n".join(["the settings do not fit together", *complaints])
        case (
            EmbeddedUnavailable()
            | PostgresAway()
            | SealBroken()
            | SecretMissing()
            | DemoFailed()
            | local.ChildFailed()
            | local.PortTaken()
            | local.NoFolder()
            | local.SecretNotKept()
        ):
            return str(error)
        case _:
            return trace(error)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[  # noqa: ARG001  # its callback answers
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # Ends a command in order, so that what it started beside itself is stopped, too.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: sys.exit(0))


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = local.LOOPBACK,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on, 0 for any free one.", show_default="$PORT or 8000")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that serve.")] = 1,
    migrate: Annotated[bool, typer.Option(help="Bring the database to the newest schema first.")] = True,
    worker: Annotated[bool, typer.Option(help="Do the background work, too.")] = True,
    for_demo: _Hidden = False,
    leave_with_stdin: _Hidden = False,
) -> None:
    """Run the service. In development, what the environment does not name is started beside it."""
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    from switchboard import logs
    from switchboard.leaving import UNDER_WAY
    from switchboard.protocol import BoundedProtocol
    from switchboard.settings import Settings

    if leave_with_stdin:
        local.leave_with_stdin()
    settings = Settings()
    logs.configure(settings)
    with contextlib.ExitStack() as stack:
        wanted = settings.port if port is None else port
        listener = stack.enter_context(local.listening(host, wanted, or_any=for_demo))
        port = listener.getsockname()[1]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        stack.enter_context(local.environment(PORT=str(port)))
        if settings.app_url is None or for_demo:
            # Where the simulator finds us. HappyRobot itself could not.
            stack.enter_context(local.environment(APP_URL=_on_this_machine(address)))
            if settings.happyrobot_webhook_url is not None and not for_demo:
                typer.echo("APP_URL is not set: HappyRobot cannot send its callbacks to this machine", err=True)
        stack.enter_context(local.servers(settings))
        stack.enter_context(local.app_secret(settings))
        simulator = stack.enter_context(local.upstream(settings))
        if migrate:
            _migrate()
        if settings.anonymous_allowed and host not in _LOOPBACK:
            typer.echo("ALLOW_ANONYMOUS: whoever reaches this address can place calls and read everything", err=True)
        if simulator:
            typer.echo(f"HAPPYROBOT_WEBHOOK_URL is not set: calls go to the simulator on {simulator}", err=True)
        typer.echo(f"Switchboard {__version__} listens on {address}")
        config = uvicorn.Config(
            "switchboard.app:alone" if worker else "switchboard.app:alone_without_worker",
            factory=True,
            workers=workers,
            loop="uvloop",
            http=BoundedProtocol,
            ws="none",
            proxy_headers=False,  # the application does it, by TRUSTED_PROXIES
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            # Longer than proxies and clients keep an idle connection: whoever closes first, it is not us under a
            # request that is on its way.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(UNDER_WAY),
        )
        if workers > 1:
            # Only now: this process has nothing to add to what they measure.
            stack.enter_context(local.metrics_together())
            Multiprocess(config, [listener]).run()
        else:
            uvicorn.Server(config).run([listener])


def _on_this_machine(address: str) -> str:
    return address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


@app.command(name="worker")
def work(
    migrate: Annotated[bool, typer.Option(help="Bring the database to the newest schema first.")] = False,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port on which Prometheus may read metrics, without credentials.")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of that port.")] = local.LOOPBACK,
) -> None:
    """Do the background work alone; any number of workers may run beside the service."""
    from switchboard import logs
    from switchboard import worker as background
    from switchboard.settings import Settings

    settings = Settings()
    logs.configure(settings)
    with local.servers(settings), local.app_secret(settings):
        if migrate:
            _migrate()
        with contextlib.nullcontext() if metrics_port is None else _metrics_on(metrics_host, metrics_port):
            typer.echo(f"Switchboard {__version__} works in the background")
            local.run(background.work(Settings()))


@contextlib.contextmanager
def _metrics_on(host: str, port: int) -> Iterator[None]:
    """Lets whoever reaches this port read what the process measures."""
    from prometheus_client import start_http_server

    from switchboard.metrics import REGISTRY

    try:
        server, thread = start_http_server(port, host, REGISTRY)
    except OSError as error:
        raise local.PortTaken(f"cannot listen on {host} port {port}: {error.strerror}") from error
    try:
        typer.echo(f"Metrics are on port {server.server_port}")
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@app.command()
def migrate() -> None:
    """Bring the database to the newest schema."""
    from switchboard import logs
    from switchboard.settings import Settings

    settings = Settings()
    logs.configure(settings)
    with local.servers(settings):
        _migrate()
    typer.echo("The database is at the newest schema.")


def _migrate() -> None:
    from switchboard import migrate as migrations
    from switchboard.settings import Settings

    url = Settings().database_url
    assert url is not None  # noqa: S101  # local.servers() has seen to it
    local.run(migrations.migrate(url.get_secret_value()))


@app.command()
def simulate(
    port: Annotated[int, typer.Option(help="Port to listen on, 0 for any free one.")] = 8090,
    pace: Annotated[float, typer.Option(min=0, help="Seconds between callbacks.")] = 0.4,
    faults: Annotated[str, typer.Option(help="What goes wrong, such as `duplicate,delay=2,answer=500`.")] = "",
    shape: Annotated[
        Literal["nested", "flat"], typer.Option(help="Of the Platform API's answer about a run in v1.")
    ] = "nested",
    cloud_events: Annotated[bool, typer.Option(help="Tell of sessions as CloudEvents, too.")] = False,
    approval: Annotated[bool, typer.Option(help="Ask for an approval half-way through a call.")] = False,
    leave_with_stdin: _Hidden = False,
) -> None:
    """Play HappyRobot: a hook that starts calls, their callbacks, and the Platform API."""
    import uvicorn

    from switchboard import logs
    from switchboard.happyrobot.simulator import Faults, Simulator
    from switchboard.settings import Settings

    if leave_with_stdin:
        local.leave_with_stdin()
    try:
        chosen = Faults.parse(faults)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--faults") from error
    settings = Settings()
    logs.configure(settings)
    simulator = Simulator(
        hook_key=_revealed(settings.happyrobot_x_api_key),
        callback_key=_revealed(settings.callback_key),
        api_key=_revealed(settings.happyrobot_api_key),
        pace=pace,
        faults=chosen,
        cloud_events=cloud_events,
        approval=approval,
        shape=shape,
    )
    with local.listening(local.LOOPBACK, port) as listener:
        typer.echo(f"The simulator listens on http://{local.LOOPBACK}:{listener.getsockname()[1]}")
        config = uvicorn.Config(simulator.app, log_config=None, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run([listener])


def _revealed(secret: "SecretStr | None") -> str | None:
    return None if secret is None else secret.get_secret_value()


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check the settings, and all that the service depends on. Changes nothing, and places no call."""
    from switchboard.commands import doctor

    doctor.run(as_json=as_json)


@app.command(name="demo")
def show(
    once: Annotated[bool, typer.Option(help="Leave once the call has completed.")] = False,
    port: Annotated[int, typer.Option(help="Port of the service, if it is free.")] = 8000,
    pace: Annotated[float, typer.Option(min=0, help="Seconds between the events of the call.")] = 0.4,
    approval: Annotated[
        bool, typer.Option(help="As a customer's website, with an approval: the Public API and its webhooks.")
    ] = False,
) -> None:
    """Start everything, place one call, and watch it live."""
    from switchboard import demo

    demo.run(once=once, port=port, pace=pace, approval=approval)
