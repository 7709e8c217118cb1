"""The workflows that may be started: `default` from the environment, others from the database."""

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from pydantic import SecretStr
from sqlalchemy import Row, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.happyrobot.addresses import PRODUCTION
from switchboard.happyrobot.client import Hook
from switchboard.sealing import Sealer
from switchboard.settings import Settings
from switchboard.tables import workflows

DEFAULT_WORKFLOW = "default"


@dataclass(frozen=True, slots=True)
class Workflow:
    """One workflow at HappyRobot and how it is started."""

    id: str
    hook: Hook
    name: str | None = None
    environment: str = PRODUCTION
    approval_url: str | None = None
    """Where an approval's decision goes, if the request for it does not say."""
    org_slug: str | None = None
    platform_id: str | None = None
    """Organisation and workflow in links to the platform."""
    active: bool = True


def default(settings: Settings) -> Workflow | None:
    """The environment's workflow; None where no hook is set."""
    if settings.happyrobot_webhook_url is None:
        return None
    return Workflow(
        DEFAULT_WORKFLOW,
        Hook(settings.happyrobot_webhook_url, settings.happyrobot_x_api_key),
        DEFAULT_WORKFLOW,
        org_slug=settings.happyrobot_org_slug,
        platform_id=settings.happyrobot_workflow_id,
    )


async def find(conn: AsyncConnection, settings: Settings, workflow_id: str) -> Workflow | None:
    """A workflow, disabled or not. Raises SealBroken or SecretMissing where its key cannot be read."""
    if workflow_id == DEFAULT_WORKFLOW:
        return default(settings)
    row = (await conn.execute(select(workflows).where(workflows.c.id == workflow_id))).one_or_none()
    if row is None:
        return None
    key = None if row.hook_key is None else Sealer.of(settings).open(row.hook_key)
    return _workflow(row, key)


async def listed(conn: AsyncConnection) -> Sequence[tuple[Workflow, bool]]:
    """The stored workflows, and whether each has a key, which stays sealed."""
    rows = await conn.execute(select(workflows).order_by(workflows.c.id))
    return [(_workflow(row, None), row.hook_key is not None) for row in rows]


async def add(conn: AsyncConnection, settings: Settings, workflow: Workflow, *, replace: bool = False) -> bool:
    """Stores a workflow, its key sealed; False if there is one of this id that is not to be replaced.

    One that is replaced stays disabled if it was, and keeps its key if it is given none and stays with its host.
    """
    key = workflow.hook.key
    sealed = None if key is None else Sealer.of(settings).seal(key.get_secret_value())
    if replace and sealed is None:
        query = select(workflows.c.hook_url, workflows.c.hook_key).where(workflows.c.id == workflow.id)
        before = (await conn.execute(query.with_for_update())).one_or_none()
        if before is not None and urlsplit(before.hook_url).netloc == urlsplit(workflow.hook.url).netloc:
            sealed = before.hook_key
    values = {
        "name": workflow.name,
        "hook_url": workflow.hook.url,
        "hook_key": sealed,
        "environment": workflow.environment,
        "approval_url": workflow.approval_url,
        "org_slug": workflow.org_slug,
        "platform_id": workflow.platform_id,
    }
    statement = upsert(workflows).values(id=workflow.id, active=workflow.active, **values)
    if replace:
        statement = statement.on_conflict_do_update(index_elements=["id"], set_={**values, "updated_at": func.now()})
    else:
        statement = statement.on_conflict_do_nothing(index_elements=["id"])
    return (await conn.execute(statement)).rowcount == 1


async def set_active(conn: AsyncConnection, workflow_id: str, *, active: bool) -> bool:
    """Enables or disables a workflow; False if there is none of this id."""
    changed = await conn.execute(
        update(workflows).where(workflows.c.id == workflow_id).values(active=active, updated_at=func.now())
    )
    return changed.rowcount == 1


def _workflow(row: Row[tuple[object, ...]], key: SecretStr | None) -> Workflow:
    return Workflow(
        id=row.id,
        hook=Hook(row.hook_url, key),
        name=row.name,
        environment=row.environment,
        approval_url=row.approval_url,
        org_slug=row.org_slug,
        platform_id=row.platform_id,
        active=row.active,
    )
