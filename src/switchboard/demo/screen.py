"""What a demonstration's lines look like."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table


class DemoFailed(Exception):
    """The call did not go as it should."""


_COLOURS = {
    "pending": "cyan",
    "running": "cyan",
    "pending_approval": "yellow",
    "completed": "green",
    "failed": "red",
    "canceled": "yellow",
    "cancelled": "yellow",
}


def coloured(text: str, status: str) -> str:
    """A text in the colour of a status."""
    return f"[{_COLOURS[status.lower()]}]{escape(text)}[/]"


def line(console: Console, when: str, *cells: tuple[int, str]) -> None:
    """A line about something that happened: the time of an ISO timestamp, then cells of these widths."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=12, no_wrap=True)
    for width, _ in cells:
        table.add_column(width=width or None, no_wrap=bool(width))
    table.add_row(f"[dim]{when[11:23]}[/]", *(text for _, text in cells))
    console.print(Padding(table, (0, 0, 0, 2)))


def panel(console: Console, title: str, fields: dict[str, Any]) -> None:
    """A frame with names and values; what is marked up stays so."""
    table = Table.grid(padding=(0, 2))
    for name, value in fields.items():
        table.add_row(escape(name), str(value))
    console.print()
    console.print(Panel(table, title=title, title_align="left", expand=False))
