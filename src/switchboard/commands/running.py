"""What these commands share: the way to the database, how they read and write, and how they end."""

import contextlib
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, NoReturn, TypeVar

import typer
from pydantic import ValidationError
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard import database, local, logs
from switchboard.settings import Settings, http_address

Result = TypeVar("Result")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_NO_SUCH_TABLE = "42P01"


def in_database(work: Callable[[AsyncConnection, Settings], Awaitable[Result]], *, sealing: bool = True) -> Result:
    """Does something in one transaction, in the database that `serve` would use; with its secret, if it seals."""
    settings = Settings() if sealing else _enough_for_the_database()
    with contextlib.ExitStack() as stack:
        if settings.database_url is None:
            stack.enter_context(local.servers(settings))
            settings = Settings()
        if sealing:
            stack.enter_context(local.app_secret(settings))
            settings = Settings()
        logs.configure(settings)
        assert settings.database_url is not None  # noqa: S101  # local.servers() has seen to it
        return local.run(_in_transaction(settings.database_url.get_secret_value(), settings, work))


def _enough_for_the_database() -> Settings:
    try:
        return Settings()
    except ValidationError:
        # Whoever has to revoke a key at night needs not all that a service needs.
        settings = Settings(environment="development")
        if settings.database_url is None:
            raise
        return settings


async def _in_transaction(
    url: str, settings: Settings, work: Callable[[AsyncConnection, Settings], Awaitable[Result]]
) -> Result:
    engine = database.connect(url)
    try:
        async with engine.begin() as conn:
            return await work(conn, settings)
    except ProgrammingError as error:
        if getattr(error.orig, "sqlstate", None) == _NO_SUCH_TABLE:
            refuse("the database has not the newest schema; run `switchboard migrate` first")
        raise
    finally:
        await engine.dispose()


def read(given: str) -> str:
    """What was given, or a line of standard input in place of `-`."""
    return sys.stdin.readline().strip() if given == "-" else given


def address(option: str, given: str) -> str:
    """An address that may be stored here; ends the command with any other."""
    try:
        found = http_address(given)
    except ValueError as error:
        refuse(f"{option} {error}")
    if Settings().environment == "production" and not found.startswith("https://"):
        refuse(f"{option} must be an https:// address")
    return found


def two_lines(moment: str) -> str:
    """A time in ISO 8601 as a narrow column shows it, to the minute."""
    return f"{moment[:10]}\n{moment[11:16]}Z"


def refuse(why: str) -> NoReturn:
    """Ends the command with a sentence."""
    sys.exit(f"switchboard: {why}")
