"""The whole document, asked by every kind of caller: no 500, and every answer is one that it describes."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import schemathesis
from anyio.from_thread import start_blocking_portal
from hypothesis import strategies as st
from pydantic import SecretStr
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from sqlalchemy import insert, text, update

from switchboard.access import keys
from switchboard.access.callers import COOKIE
from switchboard.access.tokens import BrowserToken, Right, Signer
from switchboard.app import create_app
from switchboard.happyrobot.simulator import Simulator
from switchboard.tables import KeyScope, agent_runs, api_keys
from tests.conftest import API_KEY, APP_SECRET, HOOK_KEY, Servers, new_database, running_service, serving, settings_for
from tests.hostile.examples import examples

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
RUN, CONTEXT = "a-run-that-is-over", "order_1"
STREAM = "/api/events"

KEYS: dict[str, tuple[list[KeyScope], list[str] | None]] = {
    "app": ([KeyScope.APP], None),
    "admin": ([KeyScope.ADMIN], None),
    "public": ([KeyScope.PUBLIC], None),
    "all scopes": (list(KeyScope), None),
    "of another workflow": ([KeyScope.APP, KeyScope.PUBLIC], ["another"]),
    "revoked": (list(KeyScope), None),
    "expired": (list(KeyScope), None),
}
TOKENS: dict[str, tuple[set[str] | None, set[Right]]] = {
    "read": (None, {Right.READ}),
    "trigger": (None, {Right.TRIGGER}),
    "decide": (None, {Right.DECIDE}),
    "operate": (None, {Right.OPERATE}),
    "all of one context": ({CONTEXT}, set(Right)),
    "all of another context": ({"order_2"}, set(Right)),
}


NOBODY = ["nobody", "nonsense", "HappyRobot"]
CALLERS = [*NOBODY, *KEYS, *(f"token: {name}" for name in TOKENS), "cookie", "cookie from elsewhere"]


@dataclass
class House:
    """A service that wants credentials, in a thread beside a client that blocks."""

    url: str
    callers: dict[str, dict[str, str]]
    """What each sends."""


@asynccontextmanager
async def open_house(servers: Servers, template: str) -> AsyncIterator[House]:
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=3600)
    async with new_database(servers, template) as url, serving(lambda _: simulator.app) as (upstream, _):
        settings = settings_for(url, servers.redis_url, upstream, allow_anonymous=False)
        async with running_service(settings) as service:
            yield House(service.url, await everybody(service.state["db"]))


async def everybody(db: Any) -> dict[str, dict[str, str]]:
    """Makes the keys and tokens, and a run."""
    found = {"nobody": {}, "nonsense": {"Authorization": "Bearer x.y.z"}, "HappyRobot": {"X-API-KEY": HOOK_KEY}}
    ids = {}
    async with db.begin() as conn:
        await conn.execute(insert(agent_runs).values(run_id=RUN, context_id=CONTEXT, status="COMPLETED"))
        for name, (scopes, workflows) in KEYS.items():
            made, secret = await keys.create(conn, name, scopes, workflows=workflows, burst=10**6)
            ids[name] = made.id
            found[name] = {"Authorization": f"Bearer {secret.get_secret_value()}"}
        await keys.revoke(conn, ids["revoked"])
        await conn.execute(update(api_keys).where(api_keys.c.id == ids["expired"]).values(expires_at=text("now()")))
    signer, ends = Signer(SecretStr(APP_SECRET)), datetime.now(UTC) + timedelta(days=1)
    for name, (contexts, rights) in TOKENS.items():
        within = None if contexts is None else frozenset(contexts)
        signed = signer.sign(BrowserToken(within, frozenset(rights), ends, ids["all scopes"]))
        found[f"token: {name}"] = {"Authorization": f"Bearer {signed}"}
    cookie = {"Cookie": f"{COOKIE}={signed}"}
    return found | {"cookie": cookie, "cookie from elsewhere": cookie | {"Origin": "https://evil.example"}}


@pytest.fixture(scope="module")
def house(servers: Servers, template: str) -> Iterator[House]:
    with (
        start_blocking_portal("asyncio", {"use_uvloop": True}) as portal,
        portal.wrap_async_context_manager(open_house(servers, template)) as house,
    ):
        yield house


def document() -> dict[str, Any]:
    """The document, without a word about credentials: each request brings its own."""
    settings = settings_for("postgresql://unused", "redis://unused", None, allow_anonymous=False)
    found = create_app(settings).openapi()
    for operations in found["paths"].values():
        for operation in operations.values():
            operation.pop("security", None)
    return found


schema = schemathesis.openapi.from_dict(document())
# What is drawn alone: with every example and every limit of the document, anybody is enough.
schema.config.phases.examples.enabled = schema.config.phases.coverage.enabled = False


@schema.given(caller=st.sampled_from(CALLERS), known=st.booleans())
@schema.parametrize()
@examples(8)
def test_every_caller_is_answered_as_the_document_says(
    case: schemathesis.Case[Any], house: House, caller: str, known: bool
):
    if case.path == STREAM and case.method == "GET":
        # Of a run that is over, because that stream ends.
        case.query = {**(case.query or {}), "run_id": RUN}
    for place in (case.path_parameters, case.query):
        if known and place and "run_id" in place:
            place["run_id"] = RUN
    answer = case.call_and_validate(base_url=house.url, headers=house.callers[caller], checks=CHECKS)
    assert ("www-authenticate" in answer.headers) == (answer.status_code == 401)
