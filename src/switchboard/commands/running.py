"""What these commands share: the way to the database, and how they end."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard import database, local, logs
from switchboard.settings import Settings

Result = TypeVar("Result")

_NO_SUCH_TABLE = "42P01"


def in_database(work: Callable[[AsyncConnection, Settings], Awaitable[Result]]) -> Result:
    """Does something in one transaction, in the database and with the secret that `serve` would use."""
    with local.servers(Settings()), local.app_secret(Settings()):
        settings = Settings()
        logs.configure(settings)
        assert settings.database_url is not None  # noqa: S101  # local.servers() has seen to it
        return asyncio.run(_in_transaction(settings.database_url.get_secret_value(), settings, work))


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


def refuse(why: str) -> NoReturn:
    """Ends the command with a sentence."""
    sys.exit(f"switchboard: {why}")
