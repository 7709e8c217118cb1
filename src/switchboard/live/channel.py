"""The Redis channel of one database's events."""

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.tables import installation


class Channel:
    """Names the channel, once PostgreSQL has said which database this is.

    Each database has its own: staging and production may share a Redis, and channels know no database numbers. Events
    of another would not only be shown to the wrong people: their ids would pass for ours.
    """

    def __init__(self, db: AsyncEngine) -> None:
        self._db = db
        self._name: str | None = None

    async def name(self) -> str:
        """Raises what the database raises while it is away."""
        if self._name is None:
            # The database's name tells a restored copy on the same server from its original.
            query = select(installation.c.id, func.current_database().label("database"))
            async with self._db.connect() as conn:
                row = (await conn.execute(query)).one()
            self._name = f"switchboard:{row.id}:{row.database}"
        return self._name
