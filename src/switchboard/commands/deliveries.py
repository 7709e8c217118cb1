"""`switchboard deliveries`: which webhooks were sent, and sending one again."""

import json
from typing import Annotated, Any
from uuid import UUID

import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.commands.keyring import only
from switchboard.commands.running import Json, in_database, refuse, two_lines
from switchboard.deliveries import log
from switchboard.deliveries.log import Delivery, Wanted
from switchboard.events import iso
from switchboard.settings import Settings
from switchboard.tables import DeliveryStatus

app = typer.Typer(help="Webhooks to customers, and what became of them.", no_args_is_help=True)

_MOST = 1000


@app.command(name="list")
def show(
    key: Annotated[
        str | None, typer.Option(metavar="ID", help="Only those of this key, named as for `switchboard keys`.")
    ] = None,
    status: Annotated[DeliveryStatus | None, typer.Option(help="Only those that stand so.")] = None,
    execution: Annotated[UUID | None, typer.Option(metavar="ID", help="Only those about this execution.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=_MOST, help="So many at most.")] = 50,
    as_json: Json = False,
) -> None:
    """List the webhooks, newest first, each with the attempts to send it."""

    async def work(conn: AsyncConnection, _: Settings) -> list[dict[str, Any]]:
        key_id = None if key is None else (await only(conn, key)).id
        return [_shown(each) for each in await log.listed(conn, Wanted(key_id, status, execution), limit=limit)]

    found = in_database(work, sealing=False)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    # In lines, so that it fits into a terminal of 80 columns.
    table = Table(
        "when",
        Column("event\ndelivery\nexecution", no_wrap=True),
        "status",
        "attempts",
        box=box.HORIZONTALS,
        show_lines=True,
    )
    for each in found:
        table.add_row(
            two_lines(each["created_at"]),
            f"{each['event']}\n{each['id']}\n{each['execution_id']}",
            each["status"],
            _tried(each["attempts"]),
        )
    Console(highlight=False, markup=False).print(table)


def _tried(attempts: list[dict[str, Any]]) -> str:
    """How often it was tried, and what went wrong the last time."""
    error = attempts[-1]["error"] if attempts else None
    return f"{len(attempts)}" if error is None else f"{len(attempts)}: {error}"


@app.command()
def redeliver(
    delivery: Annotated[UUID, typer.Argument(metavar="ID", help="The delivery's id.")], as_json: Json = False
) -> None:
    """Send a webhook again: the same bytes under the same id, as often as a new one."""

    async def work(conn: AsyncConnection, _: Settings) -> DeliveryStatus | None:
        return await log.send_again(conn, delivery)

    before = in_database(work, sealing=False)
    if before is None:
        refuse(f"there is no delivery {delivery}; `switchboard deliveries list` shows them")
    if before is DeliveryStatus.PENDING:
        refuse(f"the delivery {delivery} is on its way already")
    if as_json:
        typer.echo(json.dumps({"id": str(delivery), "status": DeliveryStatus.PENDING}, indent=2))
        return
    typer.echo(f"The delivery {delivery} is sent again.")


def _shown(delivery: Delivery) -> dict[str, Any]:
    return {
        "id": str(delivery.id),
        "key_id": str(delivery.key_id),
        "execution_id": str(delivery.execution_id),
        "event": delivery.event,
        "status": delivery.status,
        "created_at": iso(delivery.created_at),
        "next_attempt_at": None if delivery.next_attempt_at is None else iso(delivery.next_attempt_at),
        "attempts": [
            {
                "number": attempt.number,
                "started_at": iso(attempt.started_at),
                "duration_ms": attempt.duration_ms,
                "status_code": attempt.status_code,
                "response": attempt.response,
                "error": attempt.error,
            }
            for attempt in delivery.attempts
        ],
    }
