"""The short way of the one writer for new runs: what HappyRobot has named for executions that wait for nothing else.

As `appending`, whose manner it has: one statement that takes its turn and commits. See migrations for the function.
"""

from collections.abc import Sequence
from datetime import timedelta

from pydantic_core import to_json

from switchboard.database import Line
from switchboard.events import Event
from switchboard.jobs import rank
from switchboard.runs.sorting import TRIGGERED, NewRuns, News
from switchboard.tables import RunStatus

_BEGIN = "SELECT * FROM switchboard_begin($1, $2, $3, $4, $5, $6, $7)"


def fresh(news: Sequence[News]) -> dict[int, NewRuns]:
    """Those that may be the first news of their executions, by their places: nothing in them is named twice.

    Whether they are is for the database to say.
    """
    found: dict[int, NewRuns] = {}
    named: set[object] = set()
    for place, start in enumerate(news):
        if not isinstance(start, NewRuns) or start.adopted:
            continue
        ids = {start.execution_id, *start.run_ids}
        if len(ids) == 1 + len(start.run_ids) and named.isdisjoint(ids):
            named |= ids
            found[place] = start
    return found


async def begin(line: Line, starts: Sequence[NewRuns], *, reconcile_after: float) -> list[list[Event] | None]:
    """Writes the rows of new runs and their first events; None for each start of which more is to be done."""
    rows = await line.fetch(
        _BEGIN,
        [start.execution_id for start in starts],
        [start.name for start in starts],
        [to_json(start.data).decode() for start in starts],
        [run_id for start in starts for run_id in start.run_ids],
        [place for place, start in enumerate(starts, 1) for _ in start.run_ids],
        timedelta(seconds=reconcile_after),
        rank(reconcile_after),
    )
    found: dict[int, list[Event]] = {}
    for place, number, run_id, created_at in rows:
        start = starts[place - 1]
        found.setdefault(place, []).append(
            Event(
                number,
                run_id,
                start.context_id,
                start.workflow_id,
                TRIGGERED,
                RunStatus.RUNNING,
                created_at,
                start.data,
                created_at.timestamp(),
            )
        )
    return [found.get(place) for place, _ in enumerate(starts, 1)]
