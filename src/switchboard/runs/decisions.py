"""Telling HappyRobot what was decided, for as long as it takes and there is somebody to tell."""

from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Row, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from switchboard.events import iso
from switchboard.happyrobot.addresses import may_decide_at, takes_hook_key
from switchboard.happyrobot.client import HappyRobot, Hook, NoAnswer, Refused
from switchboard.runs.status import Standing
from switchboard.sealing import SealBroken, SecretMissing
from switchboard.settings import Settings
from switchboard.tables import ApprovalStatus, RunStatus, agent_runs, approvals
from switchboard.workflows import Workflow, find

log = structlog.stdlib.get_logger(__name__)

_PAUSES = (1.0, 5.0, 15.0, 60.0)
_LONGEST_PAUSE = 300.0
_ATTEMPTS = 300
"""Seconds between attempts, and how many there are: about a day."""

_NOBODY_THERE = frozenset({404, 409, 410})
"""Answers that say that nobody waits there any more, at an address that came with the request."""

_SURE = 3
"""Attempts after which that is believed: whoever answers there may just be starting."""


class Decider:
    """Sends decisions, each in a job of its own."""

    def __init__(self, settings: Settings, db: AsyncEngine, happyrobot: HappyRobot) -> None:
        self._settings = settings
        self._db = db
        self._happyrobot = happyrobot

    async def tell(self, subject: str, attempt: int) -> float | None:
        """Tells HappyRobot of a decision; seconds until the next attempt, None when there is no use in one."""
        async with self._db.connect() as conn:
            approval = await _decided(conn, UUID(subject))
            if approval is None or _is_over(approval):
                return None
            workflow = await self._workflow(conn, approval)
        return await self._tell(approval, workflow, attempt)

    async def _workflow(self, conn: AsyncConnection, approval: Row[Any]) -> Workflow | None:
        try:
            return await find(conn, self._settings, approval.workflow_id)
        except (SealBroken, SecretMissing) as error:
            log.error("workflow cannot be told", workflow_id=approval.workflow_id, error=error)  # noqa: TRY400
            return None

    async def _tell(self, approval: Row[Any], workflow: Workflow | None, attempt: int) -> float | None:
        told = {"approval_id": str(approval.id), "run_id": approval.run_id, "attempt": attempt + 1}
        # Looked up anew each time: somebody may have set it by now.
        hook = None if workflow is None else self._hook(approval, workflow)
        if hook is None:
            log.error(
                "decision has nowhere to go; HAPPYROBOT_RESUME_HOSTS, or an approval hook of the workflow, is missing",
                workflow_id=approval.workflow_id,
                **told,
            )
            return _pause(attempt)
        try:
            await self._happyrobot.decide(hook, _body(approval))
        except Refused as error:
            log.warning("decision is refused", error=error, **told)
            gone = hook.url == approval.resume_url and error.status in _NOBODY_THERE and attempt >= _SURE
            return None if gone else _pause(attempt)
        except NoAnswer as error:
            log.warning("decision is sent again", error=error, **told)
            return _pause(attempt)
        async with self._db.begin() as conn:
            await conn.execute(
                update(approvals).where(approvals.c.id == approval.id).values(told_at=func.now(), resume_url=None)
            )
        return None

    def _hook(self, approval: Row[Any], workflow: Workflow) -> Hook | None:
        """Where a decision goes: where its request says, if that may be, else to the workflow's approval hook."""
        hosts = self._settings.happyrobot_resume_hosts
        if approval.resume_url and may_decide_at(approval.resume_url, workflow.hook.url, hosts):
            url = approval.resume_url
        elif workflow.approval_url is not None:
            url = workflow.approval_url
        else:
            return None
        return Hook(url, workflow.hook.key if takes_hook_key(url, workflow.hook.url) else None)


def _pause(attempt: int) -> float | None:
    if attempt >= _ATTEMPTS:
        return None
    return _PAUSES[attempt] if attempt < len(_PAUSES) else _LONGEST_PAUSE


async def _decided(conn: AsyncConnection, approval_id: UUID) -> Row[Any] | None:
    """A decision that HappyRobot has not taken, and where its run stands."""
    query = (
        select(approvals, agent_runs.c.workflow_id, agent_runs.c.status.label("run_status"), agent_runs.c.timed_out)
        .join(agent_runs, agent_runs.c.run_id == approvals.c.run_id)
        .where(approvals.c.id == approval_id, approvals.c.told_at.is_(None))
        .where(approvals.c.status.in_([ApprovalStatus.APPROVED, ApprovalStatus.REJECTED]))
    )
    found: Row[Any] | None = (await conn.execute(query)).one_or_none()
    return found


def _is_over(approval: Row[Any]) -> bool:
    """Whether nobody waits for the decision any more; a run that only we hold for dead may."""
    return Standing(RunStatus(approval.run_status), approval.timed_out).settled


def _body(approval: Row[Any]) -> dict[str, Any]:
    """What the workflow is told."""
    return {
        "approval_id": str(approval.id),
        "execution_id": str(approval.execution_id),
        "run_id": approval.run_id,
        "decision": approval.status,
        "approved": approval.status == ApprovalStatus.APPROVED,
        "comment": approval.comment,
        "decided_at": iso(approval.decided_at),
    }
