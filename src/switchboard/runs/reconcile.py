"""The truth converges: HappyRobot is asked about runs that it stopped talking about."""

import random
from dataclasses import dataclass

import structlog
from sqlalchemy import ColumnElement, Float, Select, and_, cast, exists, extract, func, literal_column, or_, select
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import metrics
from switchboard.database import singly
from switchboard.events import NewEvent
from switchboard.happyrobot.client import BACKGROUND, HappyRobot, NoAnswer
from switchboard.happyrobot.lookups import Lookups
from switchboard.runs import archive
from switchboard.runs.intake import Intake
from switchboard.runs.status import Standing
from switchboard.settings import Settings
from switchboard.tables import FINAL, ApprovalStatus, RunStatus, agent_runs, approvals, run_events, run_records

log = structlog.stdlib.get_logger(__name__)

LONGEST_PAUSE = 300.0
"""Seconds between two questions about a run that is under way, at most."""

_LONGEST_PAUSE_AFTERWARDS = 3600.0
GIVE_UP_AFTER = 86_400.0
"""Seconds between questions about a run that only we hold for dead, or whose record is missing; and how long it is
asked about at all."""

_NO_TURN_PAUSE = 5.0


@dataclass(frozen=True, slots=True)
class Watch:
    """What decides when a run is asked about. Times are in seconds."""

    standing: Standing
    silent: float
    """Since anything last happened to it."""
    unheard: float
    """Since anybody, HappyRobot included, last knew where it stands."""
    newest_event: int
    kept: bool
    """Whether HappyRobot's record of its end is kept."""
    waits: bool = False
    """Whether it is silent because somebody has to decide."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long silence is borne, in seconds."""

    reconcile_after: float
    stale_after: float

    def pause(self, watch: Watch) -> float | None:
        """Until a run is next asked about; None when there is nothing more to find out.

        The first question comes after `reconcile_after`, the next ones after as long again as the silence has lasted.
        """
        if watch.standing.over:
            if watch.silent > GIVE_UP_AFTER or (watch.kept and not watch.standing.timed_out):
                return None
            return min(max(watch.silent, self.reconcile_after), _LONGEST_PAUSE_AFTERWARDS)
        if watch.silent < self.reconcile_after:
            return self.reconcile_after - watch.silent
        pause = max(min(watch.silent, LONGEST_PAUSE), self.reconcile_after)
        left = self._bearable(watch) - watch.unheard
        return min(pause, left) if left > 0 else pause

    def is_stale(self, watch: Watch) -> bool:
        return watch.unheard >= self._bearable(watch)

    def _bearable(self, watch: Watch) -> float:
        """How long silence is borne; people who decide may sleep over it."""
        return max(self.stale_after, GIVE_UP_AFTER) if watch.waits else self.stale_after


def outcome(before: Standing, after: Standing, *, asked: bool, heard: bool) -> str:
    """What a look at a run has brought, in a word."""
    if after != before:
        return "timed_out" if after.timed_out else "moved"
    if heard:
        return "unchanged"
    return "no_answer" if asked else "no_key"


def jittered(pause: float) -> float:
    """A little less, so that runs which started together are not asked about together for ever."""
    return pause * random.uniform(0.85, 1)  # noqa: S311


def _age(*moments: ColumnElement[object]) -> ColumnElement[float]:
    """Seconds since the latest of some times; those that are not set do not count."""
    return cast(extract("epoch", func.clock_timestamp() - func.greatest(*moments)), Float)


_NEWEST = (
    select(run_events.c.id, run_events.c.created_at)
    .where(run_events.c.run_id == agent_runs.c.run_id)
    .order_by(run_events.c.id.desc())
    .limit(1)
    .lateral("newest")
)
_WATCH: Select[tuple[str, bool, float, float, int, bool, bool]] = select(
    agent_runs.c.status,
    agent_runs.c.timed_out,
    _age(agent_runs.c.updated_at, _NEWEST.c.created_at).label("silent"),
    _age(agent_runs.c.updated_at, _NEWEST.c.created_at, agent_runs.c.heard_at).label("unheard"),
    func.coalesce(_NEWEST.c.id, 0).label("newest_event"),
    exists().where(run_records.c.run_id == agent_runs.c.run_id).label("kept"),
    exists()
    .where(
        approvals.c.run_id == agent_runs.c.run_id,
        # Or it was decided, and HappyRobot is still being told.
        or_(
            approvals.c.status == ApprovalStatus.PENDING,
            and_(approvals.c.status == ApprovalStatus.APPROVED, approvals.c.told_at.is_(None)),
        ),
    )
    .label("waits"),
).select_from(agent_runs.outerjoin(_NEWEST, literal_column("true")))


async def _watch(db: AsyncEngine, run_id: str) -> Watch | None:
    async with singly(db).connect() as conn:
        row = (await conn.execute(_WATCH.where(agent_runs.c.run_id == run_id))).one_or_none()
    if row is None:
        return None
    standing = Standing(RunStatus(row.status), row.timed_out)
    return Watch(standing, max(row.silent, 0), max(row.unheard, 0), row.newest_event, row.kept, row.waits)


class Reconciler:
    """Finds out what became of runs, one question at a time."""

    def __init__(
        self, settings: Settings, db: AsyncEngine, happyrobot: HappyRobot, lookups: Lookups, intake: Intake
    ) -> None:
        self._patience = Patience(settings.reconcile_after, settings.stale_after)
        self._db = db
        self._happyrobot = happyrobot
        self._lookups = lookups
        self._intake = intake

    async def reconcile(self, run_id: str) -> float | None:
        """Asks about a run if it has been silent for long enough; seconds until the next look, None if it is done."""
        watch = await _watch(self._db, run_id)
        if watch is None:
            return None
        if not watch.standing.over and watch.silent < 0.99 * self._patience.reconcile_after:
            return self._patience.pause(watch)
        return await self._look(run_id, watch, anew=False)

    async def check(self, run_id: str) -> float | None:
        """Asks about a run at once; seconds until the next look if it is over and its record is missing.

        Of one that is not over the next look is `reconcile`'s.
        """
        watch = await _watch(self._db, run_id)
        if watch is None:
            return None
        pause = await self._look(run_id, watch, anew=True)
        now = await _watch(self._db, run_id)
        return pause if now is not None and now.standing.over else None

    async def _look(self, run_id: str, watch: Watch, *, anew: bool) -> float | None:
        if watch.standing.settled:
            return await self._fetch_record(run_id, watch)
        heard, can_be_asked = False, self._happyrobot.can_be_asked
        if can_be_asked:
            answer = await self._lookups.ask(run_id, BACKGROUND, anew=anew)
            if not answer.asked:
                metrics.RECONCILIATIONS.labels("no_turn").inc()
                return _NO_TURN_PAUSE
            heard = answer.heard
        if not heard and self._patience.is_stale(watch):
            await self._time_out(run_id, watch)
        after = await _watch(self._db, run_id)
        if after is None:
            return None
        brought = outcome(watch.standing, after.standing, asked=can_be_asked, heard=heard)
        metrics.RECONCILIATIONS.labels(brought).inc()
        if (pause := self._patience.pause(after)) is None:
            return None
        if after.standing.settled:
            return 0.0  # for its record
        return max(jittered(pause), 0.1)

    async def _time_out(self, run_id: str, watch: Watch) -> None:
        # A guess: HappyRobot's word replaces it whenever it comes. Not if anything has happened in the meantime.
        await self._intake.take(
            NewEvent(
                run_id,
                "timed_out",
                {"error": "Timed out", "silent_for": round(watch.unheard)},
                RunStatus.FAILED,
                outcome="Timed out",
                guess=True,
                only_if_it_moves=True,
                only_after=watch.newest_event,
            )
        )

    async def _fetch_record(self, run_id: str, watch: Watch) -> float | None:
        """Keeps HappyRobot's record of a run that is over, once HappyRobot says so, too."""
        pause = self._patience.pause(watch)
        if pause is None or not self._happyrobot.can_be_asked:
            return None
        answer = await self._lookups.ask(run_id, BACKGROUND, anew=True)
        if not answer.asked:
            return _NO_TURN_PAUSE
        now = await _watch(self._db, run_id)
        if now is None or now.kept:
            return None  # its record came with the answer
        # What follows the call may take HappyRobot a while.
        late = watch.silent >= _LONGEST_PAUSE_AFTERWARDS
        if answer.status in FINAL or (answer.heard and late):
            try:
                record = await self._happyrobot.record(run_id, BACKGROUND)
            except NoAnswer as error:
                log.debug("no record of run yet", run_id=run_id, error=error)
            else:
                if record.over or late:
                    await archive.keep(self._db, run_id, record)
                    return None
        return jittered(pause)
