"""`switchboard workflows`: which workflows may be started."""

import json
import re
from enum import StrEnum
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard import workflows
from switchboard.commands.running import Json, address, in_database, read, refuse
from switchboard.happyrobot.addresses import ENVIRONMENTS, hook_for
from switchboard.happyrobot.client import Hook
from switchboard.settings import Settings
from switchboard.workflows import DEFAULT_WORKFLOW, Workflow

app = typer.Typer(help="Workflows that may be started, beside the environment's `default`.", no_args_is_help=True)

Environment = StrEnum("Environment", {name: name for name in ENVIRONMENTS})  # type: ignore[misc]  # typer wants an enum

_LONGEST = 255

_Id = Annotated[str, typer.Argument(metavar="ID", help="The `workflow_id` of a trigger.")]


@app.command()
def add(
    workflow_id: _Id,
    hook_url: Annotated[str, typer.Option(help="Its hook at HappyRobot.")],
    hook_key: Annotated[
        str | None, typer.Option(help="Key of the hook; `-` reads it from standard input.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="Shown in lists.")] = None,
    environment: Annotated[
        Environment | None, typer.Option(help="Puts a plain hook address into this environment.")
    ] = None,
    approval_url: Annotated[
        str | None, typer.Option(help="Where approvals' decisions go, if their request does not say.")
    ] = None,
    org_slug: Annotated[
        str | None, typer.Option(help="Organisation in links to the platform.", show_default="HAPPYROBOT_ORG_SLUG")
    ] = None,
    platform_id: Annotated[str | None, typer.Option(help="The workflow's id in links to the platform.")] = None,
    replace_it: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Replace the workflow of this id; on the same host it keeps its key unless another is given.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Register a workflow. Its key is stored encrypted."""
    _require_own(workflow_id)
    if not re.fullmatch(r"[\x21-\x2e\x30-\x7e]{1,255}", workflow_id):
        refuse("an id has 1 to 255 printable ASCII characters, no spaces or slashes")
    for option, value in {"--name": name, "--org-slug": org_slug, "--platform-id": platform_id}.items():
        if value is not None and (len(value) > _LONGEST or not value.isprintable()):
            refuse(f"{option} takes up to {_LONGEST} printable characters")
    try:
        url, found = hook_for(address("--hook-url", hook_url), environment and str(environment))
    except ValueError as error:
        refuse(str(error))
    approval_url = approval_url and address("--approval-url", approval_url)
    workflow = Workflow(workflow_id, Hook(url, _key(hook_key)), name, found, approval_url, org_slug, platform_id)

    async def work(conn: AsyncConnection, settings: Settings) -> list[dict[str, Any]]:
        added = await workflows.add(conn, settings, workflow, replace=replace_it)
        return await _found(conn, workflow_id) if added else []

    if not (stored := in_database(work)):
        refuse(f"there is a workflow {workflow_id} already; --replace takes its place")
    state = "can be started" if stored[0]["active"] else "is disabled"
    _print(stored, as_json, f"Workflow {workflow_id} {state}.")


@app.command(name="list")
def show(as_json: Json = False) -> None:
    """List the workflows, first `default`, if HAPPYROBOT_WEBHOOK_URL names its hook."""

    async def work(conn: AsyncConnection, settings: Settings) -> list[dict[str, Any]]:
        default = workflows.default(settings)
        first = [] if default is None else [_shown(default, has_key=default.hook.key is not None)]
        return first + [_shown(workflow, has_key=has_key) for workflow, has_key in await workflows.listed(conn)]

    found = in_database(work)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("id", "name", "environment", "active", "hook", "key")
    for each in found:
        state = "yes" if each["active"] else "no"
        table.add_row(
            each["id"], each["name"], each["environment"], state, each["hook_url"], "set" if each["has_key"] else "none"
        )
    Console(highlight=False, markup=False).print(table)


@app.command()
def disable(workflow_id: _Id, as_json: Json = False) -> None:
    """Refuse to start a workflow; its runs go on."""
    _switch(workflow_id, active=False, as_json=as_json)


@app.command()
def enable(workflow_id: _Id, as_json: Json = False) -> None:
    """Let a workflow be started again."""
    _switch(workflow_id, active=True, as_json=as_json)


def _switch(workflow_id: str, *, active: bool, as_json: bool) -> None:
    _require_own(workflow_id)

    async def work(conn: AsyncConnection, _: Settings) -> list[dict[str, Any]]:
        await workflows.set_active(conn, workflow_id, active=active)
        return await _found(conn, workflow_id)

    found = in_database(work)
    if not found:
        refuse(f"there is no workflow {workflow_id}")
    _print(found, as_json, f"Workflow {workflow_id} {'can be started' if active else 'is disabled'}.")


async def _found(conn: AsyncConnection, workflow_id: str) -> list[dict[str, Any]]:
    """The workflow of this id as it is shown, if there is one."""
    listed = await workflows.listed(conn)
    return [_shown(workflow, has_key=has_key) for workflow, has_key in listed if workflow.id == workflow_id]


def _print(found: list[dict[str, Any]], as_json: bool, sentence: str) -> None:
    typer.echo(json.dumps(found[0], indent=2) if as_json else sentence)


def _shown(workflow: Workflow, *, has_key: bool) -> dict[str, Any]:
    """A workflow without its key."""
    return {
        "id": workflow.id,
        "name": workflow.name,
        "environment": workflow.environment,
        "active": workflow.active,
        "hook_url": workflow.hook.url,
        "has_key": has_key,
        "approval_url": workflow.approval_url,
        "org_slug": workflow.org_slug,
        "platform_id": workflow.platform_id,
    }


def _require_own(workflow_id: str) -> None:
    if workflow_id == DEFAULT_WORKFLOW:
        refuse("the workflow `default` comes from HAPPYROBOT_WEBHOOK_URL and HAPPYROBOT_X_API_KEY")


def _key(given: str | None) -> SecretStr | None:
    if given is None:
        return None
    key = read(given)
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        refuse("a hook's key must be printable ASCII without spaces, and not empty")
    return SecretStr(key)
