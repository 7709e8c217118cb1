"""Bringing the database to the newest schema."""

from pathlib import Path

from alembic import command
from alembic.config import Config

from switchboard import database

_HERE = Path(__file__).resolve().parent


def config() -> Config:
    """Alembic's configuration, with the migrations of the wheel or of the checkout."""
    in_wheel, in_checkout = _HERE / "migrations", _HERE.parents[1] / "migrations"
    alembic = Config()
    alembic.set_main_option("script_location", str(in_wheel if in_wheel.exists() else in_checkout))
    return alembic


async def migrate(url: str) -> None:
    """Upgrades to the newest revision in one transaction; waits while another process does the same."""
    engine = database.connect(url, statement_timeout=None)
    alembic = config()

    def upgrade(connection: object) -> None:
        alembic.attributes["connection"] = connection
        command.upgrade(alembic, "head")

    try:
        async with engine.begin() as connection:
            await connection.run_sync(upgrade)
    finally:
        await engine.dispose()
