"""Who may do what: every route against every kind of caller."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import UUID

import httpx
import pytest
from httpx_sse import aconnect_sse
from pydantic import SecretStr
from sqlalchemy import insert, text, update
from starlette.routing import Route

from switchboard.access import keys
from switchboard.access.tokens import BrowserToken, Right, Signer
from switchboard.app import create_app
from switchboard.errors import PUBLIC
from switchboard.happyrobot.simulator import Simulator
from switchboard.tables import KeyScope, agent_runs, api_keys
from tests.conftest import (
    API_KEY,
    APP_SECRET,
    HOOK_KEY,
    Servers,
    Service,
    new_database,
    running_service,
    serving,
    settings_for,
)

MINE, THEIRS = "order_1", "order_2"

TRIGGER = ("POST", "/api/happyrobot/trigger")
STATUS = ("GET", "/api/happyrobot/status")
RUNS = ("GET", "/api/happyrobot/runs")
RUN = ("GET", "/api/happyrobot/runs/{run_id}")
TIMELINE = ("GET", "/api/happyrobot/runs/{run_id}/events")
DETAILS = ("GET", "/api/happyrobot/runs/{run_id}/details")
RECORDINGS = ("GET", "/api/happyrobot/runs/{run_id}/recordings")
CANCEL = ("POST", "/api/happyrobot/runs/{run_id}/cancel")
TOKENS = ("POST", "/api/happyrobot/tokens")
WORKFLOWS = ("GET", "/api/happyrobot/workflows")
STATS = ("GET", "/api/happyrobot/stats")
APPROVALS = ("GET", "/api/happyrobot/approvals")
LET_GO_ON = ("POST", "/api/happyrobot/approvals/{id}/approve")
STOP = ("POST", "/api/happyrobot/approvals/{id}/reject")
ALL_DELIVERIES = ("GET", "/api/happyrobot/deliveries")
SEND_AGAIN = ("POST", "/api/happyrobot/deliveries/{id}/redeliver")
WHO_AM_I = ("GET", "/api/happyrobot/session")
SESSION = ("POST", "/api/happyrobot/session")
END_SESSION = ("DELETE", "/api/happyrobot/session")
STREAM = ("GET", "/api/events")
CALLBACK = ("POST", "/api/webhooks/happyrobot")
EXECUTE = ("POST", f"{PUBLIC}/agents/{{workflowId}}/execute")
EXECUTION = ("GET", f"{PUBLIC}/executions/{{id}}/status")
RESULTS = ("GET", f"{PUBLIC}/executions/{{id}}/results")
PENDING = ("GET", f"{PUBLIC}/executions/{{id}}/pending-approval")
APPROVE = ("POST", f"{PUBLIC}/executions/{{id}}/approve")
REJECT = ("POST", f"{PUBLIC}/executions/{{id}}/reject")
DELIVERIES = ("GET", f"{PUBLIC}/deliveries")
REDELIVER = ("POST", f"{PUBLIC}/deliveries/{{id}}/redeliver")
NOTHING = [
    (method, path)
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
    for path in (PUBLIC, f"{PUBLIC}/{{rest}}")
]
HEALTH = ("GET", "/healthz")
READINESS = ("GET", "/readyz")
METRICS = ("GET", "/metrics")
CONSOLE = ("GET", "/")
CONSOLE_PART = ("GET", "/console/{name}")
DOCUMENT = ("GET", "/openapi.json")
DOCS = ("GET", "/docs")
DOCS_PART = ("GET", "/docs/{name}")

# Who asks. What each of them may is in the table below.
STRANGERS = {
    "nobody": 401,
    "wrong key": 401,
    "nonsense": 401,
    "expired key": 403,
    "revoked key": 403,
    "replaced key": 403,  # its grace is over
    "key of a website": 403,  # another scope
    "expired token": 401,
    "token of another secret": 401,
    "token of a revoked key": 401,
    "token of anybody": 401,  # given where no credentials were needed, which is no longer so
}
FRIENDS = {"key": 200, "operator": 200, "token": 200, "token for all": 200}
OTHERS = {"token of another context": 404, "key of another workflow": 404, "token of such a key": 404}

TO_READ = {**STRANGERS, **FRIENDS, **OTHERS, "read token": 200, "trigger token": 403}
TO_CHANGE = {**STRANGERS, **FRIENDS, **OTHERS, "read token": 403, "trigger token": 200}
TO_DECIDE = TO_CHANGE | {"trigger token": 403}
TO_OPERATE = {**STRANGERS, **dict.fromkeys([*FRIENDS, *OTHERS, "read token", "trigger token"], 403), "operator": 200}
BROWSERS = [kind for kind in TO_READ if "token" in kind and kind not in STRANGERS]
KEYS = ["key", "operator", "key of another workflow"]


def for_all(answer: int) -> dict[str, int]:
    return dict.fromkeys(TO_READ, answer)


WEBSITE = "key of a website"
# An API key and nothing else, and one that is for it.
IN_PUBLIC = {
    **dict.fromkeys(TO_READ, 401),
    **dict.fromkeys([*KEYS, *(kind for kind in STRANGERS if "key" in kind)], 403),
}
IN_PUBLIC |= {"wrong key": 401, "token of a revoked key": 401}

# What each route answers each of them.
ANSWERS: dict[tuple[str, str], dict[str, int]] = {
    TRIGGER: TO_CHANGE | dict.fromkeys(OTHERS, 403),
    STATUS: TO_READ,
    RUNS: TO_READ | dict.fromkeys(OTHERS, 200),  # without what they may not see
    RUN: TO_READ,
    TIMELINE: TO_READ,
    DETAILS: TO_READ,
    RECORDINGS: TO_READ,
    CANCEL: TO_CHANGE,
    STREAM: TO_READ,
    WORKFLOWS: TO_CHANGE | dict.fromkeys(OTHERS, 200),
    STATS: TO_READ | dict.fromkeys(OTHERS, 200),
    APPROVALS: TO_READ | dict.fromkeys(OTHERS, 200),
    LET_GO_ON: TO_DECIDE,
    STOP: TO_DECIDE,
    ALL_DELIVERIES: TO_OPERATE,
    SEND_AGAIN: TO_OPERATE | {"operator": 404},  # there is none of this id
    WHO_AM_I: STRANGERS | dict.fromkeys([*KEYS, *BROWSERS, "key of a website"], 200),
    TOKENS: STRANGERS | dict.fromkeys(KEYS, 200) | dict.fromkeys(BROWSERS, 403),
    # A key is not kept in a browser.
    SESSION: STRANGERS | dict.fromkeys([*KEYS, "key of a website"], 401) | dict.fromkeys(BROWSERS, 200),
    END_SESSION: for_all(204),
    CALLBACK: for_all(401),  # it has a key of its own
    EXECUTE: IN_PUBLIC | {WEBSITE: 202},
    EXECUTION: IN_PUBLIC | {WEBSITE: 200},
    RESULTS: IN_PUBLIC | {WEBSITE: 200},
    PENDING: IN_PUBLIC | {WEBSITE: 409},  # there is nothing to decide
    APPROVE: IN_PUBLIC | {WEBSITE: 409},
    REJECT: IN_PUBLIC | {WEBSITE: 409},
    DELIVERIES: IN_PUBLIC | {WEBSITE: 200},
    REDELIVER: IN_PUBLIC | {WEBSITE: 404},
    **dict.fromkeys(NOTHING, IN_PUBLIC | {WEBSITE: 404}),
    HEALTH: for_all(200),
    READINESS: for_all(200),
    METRICS: TO_OPERATE,
    CONSOLE: for_all(200),
    CONSOLE_PART: for_all(404),  # not of this name
    DOCUMENT: for_all(200),
    DOCS: for_all(200),
    DOCS_PART: for_all(200),
}


@dataclass
class House:
    """A service that wants credentials, and everybody who may ask it."""

    service: Service
    simulator: Simulator
    credentials: dict[str, str]
    """What each of them sends as `Authorization`."""
    ids: dict[str, UUID]
    execution_id: str = ""
    """One of the website's."""
    approval_id: str = ""
    """What the last run that was prepared for it asks to have approved."""

    async def prepared(self, route: tuple[str, str]) -> str:
        """A run of `MINE` that this route can be asked about."""
        run_id = await self.call()
        if route in (LET_GO_ON, STOP):
            body = {"run_id": run_id, "event_type": "pending_approval", "data": {"rows": []}}
            await self.service.http.post(CALLBACK[1], json=body, headers={"X-API-KEY": HOOK_KEY})
            headers = {"Authorization": self.credentials["key"]}
            waiting = (await self.service.http.get(APPROVALS[1], headers=headers)).json()
            [self.approval_id] = [each["id"] for each in waiting if each["run_id"] == run_id]
        return run_id

    async def ask(self, kind: str, route: tuple[str, str], run_id: str) -> httpx.Response:
        """A request of this kind of caller for this route, about a run of `MINE`. Of a stream only its beginning."""
        method, path = route
        credential = self.credentials[kind].encode()
        headers = [(b"authorization", credential)] if credential else []
        params = {"run_id": run_id} if route in (STATUS, STREAM) else {}
        body: Any = None
        if route == TRIGGER:
            body = {"context_id": MINE}
        elif route == TOKENS:
            body = {"context_ids": [MINE]}
        elif route == CALLBACK:
            body = {"run_id": run_id, "event_type": "completed"}
        elif route == EXECUTE:
            body = {"input": {}}
        names = {"run_id": run_id, "name": "init.js", "workflowId": "default", "id": self.execution_id, "rest": "x"}
        if route in (LET_GO_ON, STOP):
            names["id"] = self.approval_id
        url = path.format(**names)
        request = self.service.http.build_request(method, url, headers=headers, params=params, json=body)
        answer = await self.service.http.send(request, stream=route == STREAM)
        if answer.status_code != 200 and not answer.is_stream_consumed:
            await answer.aread()
        await answer.aclose()
        self.service.http.cookies.clear()
        return answer

    @asynccontextmanager
    async def stream(self, kind: str, **params: str) -> AsyncIterator[AsyncIterator[Any]]:
        """Events as this kind of caller sees them."""
        headers = {"Authorization": self.credentials[kind]}
        async with aconnect_sse(self.service.http, "GET", STREAM[1], params=params, headers=headers) as source:
            source.response.raise_for_status()
            yield (sse.json() async for sse in source.aiter_sse() if sse.data)

    async def call(self) -> str:
        """A run of `MINE` that is under way."""
        headers = {"Authorization": self.credentials["key"]}
        answer = await self.service.http.post(TRIGGER[1], json={"context_id": MINE}, headers=headers)
        answer.raise_for_status()
        return str(answer.json()["run_ids"][0])

    async def everything(self) -> dict[str, Any]:
        """All that is stored, but for when keys were used, and how many calls were placed."""
        found: dict[str, Any] = {"calls": len(self.simulator.calls)}
        async with self.service.state["db"].connect() as conn:
            tables = await conn.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"))
            for table in tables.all():
                rows = f"SELECT (to_jsonb({table}) - 'last_used_at')::text AS row FROM {table}"
                found[table] = await conn.scalar(text(f"SELECT md5(string_agg(row, ',' ORDER BY row)) FROM ({rows}) r"))
        return found


@pytest.fixture(scope="module")
async def house(servers: Servers, template: str) -> AsyncIterator[House]:
    # Nothing happens by itself here: runs stay under way.
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=3600)
    async with new_database(servers, template) as url, serving(lambda _: simulator.app) as (upstream, _):
        settings = settings_for(url, servers.redis_url, upstream, allow_anonymous=False)
        async with running_service(settings) as service:
            house = House(service, simulator, *await everybody(service))
            house.execution_id = (await house.ask(WEBSITE, EXECUTE, "")).json()["executionId"]
            yield house


async def everybody(service: Service) -> tuple[dict[str, str], dict[str, UUID]]:
    """Makes the keys and the tokens; returns what each sends, and the ids of the keys."""
    found: dict[str, str] = {"nobody": "", "wrong key": "0" * 64, "nonsense": "schlüssel"}
    ids = {}
    app, day = [KeyScope.APP], timedelta(days=1)
    async with service.state["db"].begin() as conn:
        for kind, scopes, workflows in (
            ("key", app, None),
            ("operator", [KeyScope.ADMIN], None),
            ("key of a website", [KeyScope.PUBLIC], None),
            ("key of another workflow", app, ["another"]),
            ("expired key", app, None),
            ("revoked key", app, None),
            ("replaced key", app, None),
        ):
            made, secret = await keys.create(conn, kind, scopes, workflows=workflows, lifetime=day, burst=10**6)
            ids[kind], found[kind] = made.id, secret.get_secret_value()
        await conn.execute(update(api_keys).where(api_keys.c.id == ids["expired key"]).values(expires_at=text("now()")))
        await keys.revoke(conn, ids["revoked key"])
        await keys.rotate(conn, ids["replaced key"], timedelta(0))
        # Somebody else's run, which nobody but those who may see all is to see.
        await conn.execute(insert(agent_runs).values(run_id="theirs", context_id=THEIRS, status="COMPLETED"))
    both = frozenset(Right)
    signer = Signer(SecretStr(APP_SECRET))
    for kind, contexts, rights, key in (
        ("token", {MINE}, both, "key"),
        ("token for all", None, both, "key"),
        ("read token", {MINE}, {Right.READ}, "key"),
        ("trigger token", {MINE}, {Right.TRIGGER}, "key"),
        ("token of another context", {THEIRS}, both, "key"),
        ("token of such a key", {MINE}, both, "key of another workflow"),
        ("token of a revoked key", {MINE}, both, "revoked key"),
        ("token of anybody", {MINE}, both, None),
        ("expired token", {MINE}, both, "key"),
        ("token of another secret", {MINE}, both, "key"),
    ):
        ends = datetime.now(UTC) + (-day if kind == "expired token" else day)
        token = BrowserToken(
            None if contexts is None else frozenset(contexts), frozenset(rights), ends, ids[key] if key else None
        )
        by = Signer(SecretStr("x" * 32)) if kind == "token of another secret" else signer
        found[kind] = by.sign(token)
    return {kind: credential and f"Bearer {credential}" for kind, credential in found.items()}, ids


def routes(router: Any) -> set[tuple[str, str]]:
    """Every method and path of an application, also of the routers that it includes."""
    found = set()
    for route in router.routes:
        if (included := getattr(route, "original_router", None)) is not None:
            found |= routes(included)
        else:
            assert isinstance(route, Route), f"{route} is of a kind that this test cannot judge"
            path = route.path.replace(":path}", "}")
            found |= {(method, path) for method in route.methods or () if method != "HEAD"}
    return found


def test_every_route_is_in_the_table_and_says_what_it_answers_everybody():
    assert routes(create_app(settings_for("postgresql://x", "redis://x", None))) == set(ANSWERS)
    assert all(answers.keys() == TO_READ.keys() for answers in ANSWERS.values())


@pytest.mark.parametrize("route", ANSWERS, ids=" ".join)
async def test_a_route_answers_everybody_as_the_table_says_and_changes_nothing_for_those_it_refuses(
    house: House, route: tuple[str, str]
):
    answers = {}
    run_id = await house.prepared(route)
    before = await house.everything()
    for kind in [kind for kind, status in ANSWERS[route].items() if status >= 400]:
        answer = await house.ask(kind, route, run_id)
        answers[kind] = answer.status_code
        shape = ["message", "error", "statusCode"] if route[1].startswith(PUBLIC) else ["error"]
        assert list(answer.json()) == shape, kind
        assert "set-cookie" not in answer.headers, kind
        assert ("www-authenticate" in answer.headers) == (answer.status_code == 401), kind
    assert await house.everything() == before
    for kind in ANSWERS[route].keys() - answers.keys():
        # One that was canceled cannot be again.
        run_id = await house.call() if route == CANCEL else run_id
        answers[kind] = (await house.ask(kind, route, run_id)).status_code
    assert answers == ANSWERS[route]


@pytest.mark.parametrize(
    ("kind", "contexts"),
    [
        ("key", {MINE, THEIRS}),
        ("operator", {MINE, THEIRS}),
        ("token for all", {MINE, THEIRS}),
        ("token", {MINE}),
        ("read token", {MINE}),
        ("token of another context", {THEIRS}),
        ("key of another workflow", set()),
        ("token of such a key", set()),
    ],
)
async def test_lists_hold_what_may_be_seen_and_nothing_else(house: House, kind: str, contexts: set[str]):
    await house.call()
    headers = {"Authorization": house.credentials[kind]}
    found: set[str] = set()
    url = f"{RUNS[1]}?limit=1"
    while url:
        answer = await house.service.http.get(url, headers=headers)
        found |= {run["contextId"] for run in answer.json()}
        link = answer.headers.get("link", "")
        url = link[1 : link.index(">")] if link else ""
    assert found == contexts
    for context in (MINE, THEIRS):
        answer = await house.service.http.get(RUNS[1], params={"context_id": context}, headers=headers)
        assert {run["contextId"] for run in answer.json()} == contexts & {context}


async def test_a_callback_needs_its_own_key_and_no_other(house: House):
    run_id = await house.call()
    body = {"run_id": run_id, "event_type": "log"}
    answer = await house.service.http.post(CALLBACK[1], json=body, headers={"X-API-KEY": HOOK_KEY})
    assert answer.status_code == 200


async def test_a_context_that_a_token_is_not_for_cannot_be_followed(house: House):
    headers = {"Authorization": house.credentials["token"]}
    answer = await house.service.http.get(STREAM[1], params={"context_id": THEIRS}, headers=headers)
    assert (answer.status_code, answer.json()) == (403, {"error": "Not allowed for this context"})


@pytest.mark.parametrize(
    ("kind", "seen"), [("token", [MINE]), ("token for all", [MINE, THEIRS]), ("key", [MINE, THEIRS])]
)
async def test_a_stream_of_everything_holds_what_may_be_seen_and_nothing_else(house: House, kind: str, seen: list[str]):
    mine = await house.call()
    async with house.stream(kind, last_event_id="0") as live, house.stream(kind) as fresh:
        for run_id in ("theirs", mine):
            await house.service.callback(run_id, "log", kind)
        for stream in (live, fresh):
            found = [event async for event in until_run(stream, mine, kind)]
            assert [event["context_id"] for event in found if event["data"] == kind] == [
                context for context in (THEIRS, MINE) if context in seen
            ]
            assert {event["context_id"] for event in found} <= set(seen)


async def until_run(stream: AsyncIterator[Any], run_id: str, data: str) -> AsyncIterator[Any]:
    """The events of a stream, to the one with this run and data."""
    async for event in stream:
        yield event
        if (event["run_id"], event["data"]) == (run_id, data):
            return


async def test_no_stream_holds_runs_of_a_workflow_that_a_key_is_not_for(house: House):
    async with house.service.state["db"].begin() as conn:
        await conn.execute(
            insert(agent_runs).values(run_id="of another", context_id=MINE, workflow_id="another", status="RUNNING")
        )
    mine = await house.call()
    for kind in ("key of another workflow", "token of such a key"):
        async with house.stream(kind, last_event_id="0") as stream:
            await house.service.callback(mine, "log", kind)
            await house.service.callback("of another", "log", kind)
            found = [event async for event in until_run(stream, "of another", kind)]
        assert {event["workflow_id"] for event in found} == {"another"}


@pytest.mark.parametrize("route", [TRIGGER, TOKENS, CALLBACK], ids=" ".join)
async def test_who_is_refused_has_nothing_read_of_what_they_send(house: House, route: tuple[str, str]):
    port = urlsplit(house.service.url).port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    method, path = route
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n".encode())
    # Not a byte of the body follows.
    assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("text", ["a\r\nSet-Cookie: x=y", "ü", "\u2028", "%0d%0a", "a/b", "' OR 1=1 --", "😀"])
async def test_odd_ids_open_nothing_and_come_back_as_they_are(house: House, text: str):
    headers = {"Authorization": house.credentials["key"]}
    http = house.service.http
    answer = await http.get(f"{RUNS[1]}/{quote(text, safe='')}", headers=headers)
    assert answer.status_code == 404
    assert "set-cookie" not in answer.headers
    made = await http.post(TOKENS[1], json={"context_ids": [text], "scopes": ["read", "trigger"]}, headers=headers)
    token = {"Authorization": f"Bearer {made.json()['token']}"}
    started = await http.post(TRIGGER[1], json={"context_id": text}, headers=token)
    assert started.status_code == 200
    assert {run["contextId"] for run in (await http.get(RUNS[1], headers=token)).json()} == {text}
