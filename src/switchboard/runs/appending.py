"""The short way of the one writer: what changes nothing but the timelines of known runs, in one statement.

Most callbacks are logs. Their statement is a transaction of its own that takes its turn, as every writer does, and
commits, so that one way to PostgreSQL and back is all that a callback waits for. See migrations for the function.
"""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from pydantic_core import to_json

from switchboard.database import Line
from switchboard.events import APPROVAL_REQUESTED, Event, NewEvent
from switchboard.jobs import rank
from switchboard.runs.sorting import Duplicate, News, Recorded
from switchboard.tables import RunStatus

_APPEND = "SELECT * FROM switchboard_append($1, $2, $3, $4, $5, $6, $7, $8)"


def plain(news: Sequence[News]) -> dict[int, NewEvent]:
    """Those, by their places, that may change nothing but timelines: no copies, and none of a run that may move.

    Whether it is so is for the database to say, which knows where their runs stand.
    """
    others = {event.run_id for event in news if isinstance(event, NewEvent) and not _is_plain(event)}
    found: dict[int, NewEvent] = {}
    keys: set[UUID] = set()
    for place, event in enumerate(news):
        if not isinstance(event, NewEvent) or event.run_id in others or event.dedupe_key in keys:
            continue
        if event.dedupe_key is not None:
            keys.add(event.dedupe_key)
        found[place] = event
    return found


def _is_plain(event: NewEvent) -> bool:
    return (
        # A word that is no news where its run is under way already.
        event.status in (None, RunStatus.RUNNING)
        and event.event_type != APPROVAL_REQUESTED
        and event.only_after is None
        and event.then is None
        and not (event.guess or event.only_if_it_moves or event.session_ended)
    )


async def append(
    line: Line, events: Sequence[NewEvent], *, reconcile_after: float
) -> list[Recorded | Duplicate | None]:
    """Appends plain events; None for each of a run with which something else is to be done, too."""
    rows = await line.fetch(
        _APPEND,
        [event.run_id for event in events],
        [event.event_type for event in events],
        [event.status for event in events],
        [None if event.data is None else to_json(event.data).decode() for event in events],
        [event.occurred_at for event in events],
        [event.dedupe_key for event in events],
        timedelta(seconds=reconcile_after),
        rank(reconcile_after),
    )
    outcomes: list[Recorded | Duplicate | None] = [None] * len(events)
    for place, number, context_id, workflow_id, status, created_at in rows:
        event = events[place - 1]
        outcomes[place - 1] = (
            Duplicate()
            if number is None
            else Recorded(
                Event(
                    number,
                    event.run_id,
                    context_id,
                    workflow_id,
                    event.event_type,
                    RunStatus(status),
                    event.occurred_at or created_at,
                    event.data,
                    created_at.timestamp(),
                )
            )
        )
    return outcomes
