"""Stopping a run: the wish is recorded, HappyRobot is asked, and the run is canceled when HappyRobot says so."""

from uuid import NAMESPACE_OID, uuid5

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import jobs
from switchboard.errors import Conflict, NotConfigured, UpstreamFailed
from switchboard.events import NewEvent
from switchboard.happyrobot.client import BACKGROUND, POLL, READ, Effort, HappyRobot, NoAnswer, Refused
from switchboard.happyrobot.lookups import Lookups
from switchboard.happyrobot.payloads import platform_status
from switchboard.runs.intake import Intake
from switchboard.runs.queries import find_run, found
from switchboard.runs.status import Standing
from switchboard.sight import EVERYTHING, Sight
from switchboard.tables import RunStatus

log = structlog.stdlib.get_logger(__name__)

_AGAIN_AFTER = 15.0
_LONGEST_PAUSE = 300.0
_ATTEMPTS = 12
"""Seconds between requests that HappyRobot did not answer, doubled each time, and how many there are."""


class Canceler:
    """Asks HappyRobot to stop runs."""

    def __init__(self, db: AsyncEngine, happyrobot: HappyRobot, lookups: Lookups, intake: Intake) -> None:
        self._db = db
        self._happyrobot = happyrobot
        self._lookups = lookups
        self._intake = intake

    async def cancel(self, run_id: str, sight: Sight) -> RunStatus:
        """Records the wish and asks HappyRobot; returns where the run stands then.

        A run that is not CANCELED then is asked for again in the background. Raises NotFound, also for one that is not
        to be seen, Conflict for a run that is over, UpstreamFailed where HappyRobot refuses.
        """
        self._refuse_if_over(await self._standing(run_id, sight))
        if not self._happyrobot.can_be_asked:
            raise NotConfigured("HAPPYROBOT_API_KEY is not set")
        await self._intake.take(
            NewEvent(
                run_id,
                "cancel_requested",
                # Wished for once, however often the button is pressed.
                dedupe_key=uuid5(NAMESPACE_OID, f"switchboard cancel {run_id}"),
                then=jobs.Job(jobs.CANCEL, run_id, _AGAIN_AFTER),
            )
        )
        try:
            await self._ask(run_id, READ, POLL)
        except NoAnswer as error:
            log.warning("run is not canceled yet; HappyRobot is asked again", run_id=run_id, error=error)
        except Refused as error:
            async with self._db.begin() as conn:
                # A caller who is told that it cannot be done must not find it done a little later.
                await jobs.drop(conn, jobs.CANCEL, run_id)
            # Most likely it has ended in the meantime.
            await self._lookups.ask(run_id, READ, anew=True)
            self._refuse_if_over(await self._standing(run_id, sight))
            raise UpstreamFailed("HappyRobot refused to cancel the run", detail=str(error)) from error
        return (await self._standing(run_id, sight)).status

    async def again(self, run_id: str, attempt: int) -> float | None:
        """Asks once more; seconds until the next attempt, None when there is no use in one."""
        async with self._db.connect() as conn:
            run = await find_run(conn, run_id, EVERYTHING)
        if run is None or Standing(RunStatus(run.status), run.timed_out).settled:
            return None
        if attempt >= _ATTEMPTS:
            log.error("run is not canceled; HappyRobot does not answer", run_id=run_id)
            return None
        try:
            await self._ask(run_id, BACKGROUND, BACKGROUND)
        except NoAnswer:
            return min(_AGAIN_AFTER * float(2**attempt), _LONGEST_PAUSE)
        except Refused as error:
            log.warning("run cannot be canceled", run_id=run_id, error=error)
        return None

    async def _ask(self, run_id: str, to_cancel: Effort, to_look: Effort) -> None:
        word = platform_status(await self._happyrobot.cancel(run_id, to_cancel))
        if word is RunStatus.CANCELED:
            data = {"reason": "cancel_requested"}
            await self._intake.take(NewEvent(run_id, "canceled", data, word, only_if_it_moves=True))
        else:
            # It was heard; what came of it, the run itself says.
            await self._lookups.ask(run_id, to_look, anew=True)

    async def _standing(self, run_id: str, sight: Sight) -> Standing:
        async with self._db.connect() as conn:
            run = found(await find_run(conn, run_id, sight))
        return Standing(RunStatus(run.status), run.timed_out)

    @staticmethod
    def _refuse_if_over(standing: Standing) -> None:
        if standing.settled:
            raise Conflict(f"Run is already {standing.status.lower()}", status=standing.status.lower())
