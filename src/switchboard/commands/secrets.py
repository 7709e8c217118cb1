"""`switchboard secrets`: what is stored encrypted."""

import json

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard import sealing
from switchboard.commands.running import Json, in_database
from switchboard.sealing import Sealer
from switchboard.settings import Settings

app = typer.Typer(help="What is stored encrypted with a key derived from APP_SECRET.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `rotate` a command of its own: Typer would leave out the name of an only one."""


@app.command()
def rotate(as_json: Json = False) -> None:
    """Encrypt everything anew with APP_SECRET, so that APP_SECRET_PREVIOUS is needed no more."""

    async def work(conn: AsyncConnection, settings: Settings) -> int:
        return await sealing.reseal(conn, Sealer.of(settings))

    count = in_database(work)
    if as_json:
        typer.echo(json.dumps({"sealed": count}))
        return
    typer.echo(f"Stored secrets encrypted with APP_SECRET: {count}, all that there are.")
    typer.echo("APP_SECRET_PREVIOUS can go once no browser token is left that it signed, in 24 hours at the latest.")
