"""Bringing the database to the newest schema."""

import functools
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from switchboard import database, jobs

_HERE = Path(__file__).resolve().parent


def config() -> Config:
    """Alembic's configuration, with the migrations of the wheel or of the checkout."""
    in_wheel, in_checkout = _HERE / "migrations", _HERE.parents[1] / "migrations"
    alembic = Config()
    alembic.set_main_option("script_location", str(in_wheel if in_wheel.exists() else in_checkout))
    return alembic


@functools.cache
def earlier_revisions() -> frozenset[str]:
    """All that are known here but the newest. One that is not known at all is of a newer version."""
    scripts = ScriptDirectory.from_config(config())
    return frozenset(script.revision for script in scripts.walk_revisions()) - set(scripts.get_heads())


async def migrate(url: str) -> None:
    """Upgrades to the newest revision, then the job queue's own tables.

    In one transaction, but for what is built beside the traffic. Waits while another process does the same.
    """
    engine = database.connect(url, statement_timeout=None)
    alembic = config()

    def upgrade(connection: object) -> None:
        alembic.attributes["connection"] = connection
        command.upgrade(alembic, "head")

    try:
        async with engine.connect() as connection:
            await connection.run_sync(upgrade)
        # A newer PgQueuer may expect more of its tables than the one that made them.
        async with engine.connect() as connection:
            await jobs.upgrade((await connection.get_raw_connection()).driver_connection)
    finally:
        await engine.dispose()
