"""Bodies of every kind: nobody is answered 5xx, what is refused changes nothing, what is taken can be read for ever."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.errors import PUBLIC
from switchboard.runs.queued import Launcher
from switchboard.runs.sorting import NewRuns
from switchboard.tables import KeyScope, api_keys
from tests.conftest import HOOK_KEY, Servers, Service, new_database, new_key, running_service, settings_for, until
from tests.hostile.examples import CHUNKED, HOW_IT_IS_SENT, ODD_VALUES, Verbatim, bodies_like, examples, written

CALLBACKS = "/api/webhooks/happyrobot"
TRIGGER = "/api/happyrobot/trigger"
EXECUTE = f"{PUBLIC}/agents/default/execute"
TOKENS = "/api/happyrobot/tokens"

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of what has failed

Headers = dict[bytes, bytes]


@dataclass(repr=False)
class House:
    """A service with a HappyRobot that says yes to everything, and a website with an execution under way."""

    service: Service
    website: dict[str, str]
    launcher: Launcher
    payloads: list[dict[str, Any]]
    """What HappyRobot was sent."""
    counting: str
    shown: dict[int, Any] = field(default_factory=dict)
    """Events as a browser saw them that has been there all the time."""
    waiting: dict[str, str] = field(default_factory=dict)
    """What can be decided, by the addresses where that is done."""

    @property
    def http(self) -> httpx.AsyncClient:
        return self.service.http

    @property
    def db(self) -> AsyncEngine:
        db: AsyncEngine = self.service.state["db"]
        return db

    async def stored(self) -> dict[str, int]:
        """How many rows there are of everything, and how many calls were placed."""
        async with self.db.connect() as conn:
            rows = (await conn.execute(text(self.counting))).one()
        return {**rows._mapping, "calls": len(self.payloads)}

    async def post(self, url: str, raw: bytes, headers: Headers, **more: str) -> httpx.Response:
        named = {name.encode(): value.encode() for name, value in more.items()}
        if url.startswith(PUBLIC):
            named |= {name.encode(): value.encode() for name, value in self.website.items()}
        content = _in_pieces(raw) if CHUNKED in headers else bytes(raw)
        answer = await self.http.post(url, content=content, headers=headers | named)
        assert answer.status_code < 500, answer.text
        return answer

    async def ok(self, url: str, **params: str | int) -> Any:
        headers = self.website if url.startswith(PUBLIC) else {}
        answer = await self.http.get(url, params=params, headers=headers)
        assert answer.status_code == 200, (url, answer.text)
        return answer.json()

    async def launch(self, execution_id: str) -> str:
        """Places the call of an execution that was accepted, as a worker does; returns its run."""
        await self.launcher.start(execution_id)
        return str(self.payloads[-1]["run_id"])

    async def execute(self) -> tuple[str, str]:
        """An execution of the website that is under way, and its run."""
        answer = await self.post(EXECUTE, b'{"input": {}}', {})
        execution_id = str(answer.json()["executionId"])
        return execution_id, await self.launch(execution_id)

    async def asking(self, url: str) -> str:
        """The address at which something that waits can be decided: once it is, there is something else."""
        if url not in self.waiting:
            execution_id, run_id = await self.execute()
            await self.service.callback(run_id, "pending_approval", {"rows": [{"of": url}]})
            [approval] = await self.ok("/api/happyrobot/approvals", context_id=f"execution:{execution_id}")
            self.waiting[url] = url.format(execution=execution_id, approval=approval["id"])
        return self.waiting[url]


async def _in_pieces(raw: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(raw), 20_000):
        yield raw[start : start + 20_000]
        await asyncio.sleep(0)


@pytest.fixture(scope="module")
async def house(servers: Servers, template: str) -> AsyncIterator[House]:
    payloads: list[dict[str, Any]] = []

    def happyrobot(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"run": {"status": "running"}})
        payload = json.loads(request.content) | {"run_id": f"run_{uuid4().hex}"}
        payloads.append(payload)
        return httpx.Response(200, json={"queued_run_ids": [payload["run_id"]]})

    async with new_database(servers, template) as url:
        settings = settings_for(url, servers.redis_url, None)
        async with running_service(settings, httpx.MockTransport(happyrobot)) as service:
            state = service.state
            key_id, website = await new_key(state["db"], KeyScope.PUBLIC, burst=10**6, lifetime=timedelta(days=1))
            async with state["db"].begin() as conn:
                # Where nobody is told anything, because nobody is there who would: but it is written down.
                told = {"webhook_url": "https://website.example/", "webhook_secret": "sealed"}
                await conn.execute(update(api_keys).where(api_keys.c.id == key_id).values(**told))
                tables = await conn.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"))
                counts = ", ".join(f'(SELECT count(*) FROM "{table}") AS "{table}"' for table in tables)
            launcher = Launcher(state["settings"], state["db"], state["happyrobot"], state["intake"])
            house = House(service, website, launcher, payloads, f"SELECT {counts}")
            async with service.stream() as stream:
                watching = asyncio.create_task(_watch(house, stream))
                yield house
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching


async def _watch(house: House, stream: AsyncIterator[Any]) -> None:
    async for event in stream:
        house.shown[event["id"]] = event


async def can_be_read(house: House, run_id: str) -> list[Any]:
    """Reads what is known of a run in every way that there is; returns its timeline."""
    name = quote(run_id, safe="")
    timeline = await house.ok(f"/api/happyrobot/runs/{name}/events")
    run = await house.ok(f"/api/happyrobot/runs/{name}")
    assert run["runId"] == run_id
    assert len(run["metadata"]["logs"]) == sum(event["event_type"] == "log" for event in timeline)
    assert run in await house.ok("/api/happyrobot/runs", context_id=run["contextId"])
    assert (await house.ok("/api/happyrobot/status", run_id=run_id))["run_id"] == run_id
    await house.ok("/api/happyrobot/approvals", context_id=run["contextId"])
    async with house.service.stream(run_id=run_id, last_event_id="0") as stream:
        replayed = [await anext(stream) for _ in timeline]
    await until(lambda: timeline[-1]["id"] in house.shown)
    assert timeline == replayed == [house.shown[event["id"]] for event in timeline]
    return timeline  # type: ignore[no-any-return]


async def can_be_told(house: House, execution_id: str) -> None:
    """Reads what a website is told of an execution."""
    url = f"{PUBLIC}/executions/{execution_id}"
    status = await house.ok(f"{url}/status")
    assert (await house.ok(f"{url}/results"))["status"] == status["status"]
    if status["status"] == "pending_approval":
        await house.ok(f"{url}/pending-approval")
    await house.ok(f"{PUBLIC}/deliveries", executionId=execution_id)


def is_refusal(answer: httpx.Response, *statuses: int) -> bool:
    """Whether an answer is one of these refusals, in the shape of whoever gives it."""
    is_public = answer.request.url.path.startswith(PUBLIC)
    shape = ["message", "error", "statusCode"] if is_public else ["error"]
    return answer.status_code in statuses and list(answer.json()) == shape


# Callbacks.

WORDS = ("log", "running", "completed", "failed", "canceled", "pending_approval", "a word of theirs")
RUN = "the-run"


def callback(word: str) -> dict[str, Any]:
    return {
        "run_id": RUN,
        "event_type": word,
        "timestamp": "2026-01-15T09:30:12.500Z",
        "data": {"message": "Hello", "rows": [{"a": 1}], "metadata": {"requireComment": False}, "error": {"code": 5}},
        "execution_id": "5f0c8c1e-6a55-4a3e-9a53-0c8f5f3a6f10",
        "resume_url": "https://workflows.platform.happyrobot.ai/resume/abc",
    }


CLOUD_EVENT = {
    "specversion": "1.0",
    "id": "an-event",
    "source": "https://platform.happyrobot.ai",
    "type": "session.status_changed",
    "time": "2026-01-15T09:30:12.500Z",
    "data": {"run_id": RUN, "status": {"previous": "queued", "current": "in-progress"}},
}
WEBHOOK_IDS = st.none() | st.sampled_from(["", "a", "x" * 8_000, "a b", "\\u0000", "%00"])


async def sent(house: House, raw: bytes, headers: Headers, webhook_id: str | None) -> None:
    execution_id, run_id = await house.execute()
    raw = bytes(raw).replace(RUN.encode(), run_id.encode())
    before = await house.stored()
    more = {} if webhook_id is None else {"X-Webhook-Id": webhook_id}
    answer = await house.post(CALLBACKS, raw, headers, **{"X-API-KEY": HOOK_KEY}, **more)
    after = await house.stored()
    if not (answer.status_code == 200 or is_refusal(answer, 404)):
        assert is_refusal(answer, 400, 413), answer.text
        assert after == before
        return
    body = json.loads(raw)
    about = (body["data"] if "specversion" in body else body)["run_id"]
    # Of a run that an example before has named there may be a copy.
    new = "duplicate" not in answer.json()
    assert new or about != run_id
    if answer.status_code == 200:
        assert after["run_events"] == before["run_events"] + new
    else:
        assert after == before | {"held_callbacks": before["held_callbacks"] + 1}
        # Whatever it was, it must not break the run that it belongs to, once that is known.
        await house.service.state["intake"].take(NewRuns(uuid4(), "default", f"of {uuid4()}", "A", None, [about]))
        assert (await house.stored())["held_callbacks"] == before["held_callbacks"]
    timeline = await can_be_read(house, about)
    if new and timeline[-1]["event_type"] != "pending_approval":
        assert timeline[-1]["data"] == body.get("data"), "it is what was sent"
    await can_be_told(house, execution_id)


@examples(25)
@given(raw=st.one_of([bodies_like(callback(word)) for word in WORDS]), headers=HOW_IT_IS_SENT, webhook_id=WEBHOOK_IDS)
async def test_a_callback_is_refused_or_stored_once_and_breaks_no_reader(
    house: House, raw: bytes, headers: Headers, webhook_id: str | None
):
    await sent(house, raw, headers, webhook_id)


@examples(10)
@given(raw=bodies_like(CLOUD_EVENT), headers=HOW_IT_IS_SENT, webhook_id=WEBHOOK_IDS)
async def test_so_is_a_cloud_event(house: House, raw: bytes, headers: Headers, webhook_id: str | None):
    await sent(house, raw, headers, webhook_id)


# What starts a workflow.

STARTED = {
    "context_id": "order_1",
    "workflow_id": "default",
    "name": "A call",
    "description": "What for",
    "callback_url": "https://elsewhere.example/",
    "execution_id": "theirs",
    "rows": [{"phone": "+12025550142", "more": {"a": [1, 2.5, None, True]}}],
}


@examples(12)
@given(raw=bodies_like(STARTED), headers=HOW_IT_IS_SENT)
async def test_a_trigger_is_refused_or_one_call_that_can_be_read(house: House, raw: bytes, headers: Headers):
    before = await house.stored()
    answer = await house.post(TRIGGER, raw, headers)
    after = await house.stored()
    if answer.status_code != 200:
        assert is_refusal(answer, 400, 404, 413), answer.text
        assert after == before
        return
    told = {name: after[name] - before[name] for name in ("calls", "executions", "agent_runs", "run_events")}
    assert told == dict.fromkeys(told, 1)
    [run_id] = answer.json()["run_ids"]
    sent = house.payloads[-1]
    ours = {"callback_url", "execution_id", "run_id"}
    assert sent["callback_url"].endswith(CALLBACKS)
    assert sent["execution_id"] == answer.json()["execution_id"]
    assert {name: value for name, value in json.loads(raw).items() if name not in ours} == {
        name: value for name, value in sent.items() if name not in ours
    }
    await can_be_read(house, run_id)


EXECUTED = {
    "input": {"csvData": [{"customerId": "C-1", "phone": "+12025550142"}, {}], "more": {"a": [1, 2.5, None, True]}},
    "description": "What for",
    "contextId": "order_1",
}


@examples(12)
@given(raw=bodies_like(EXECUTED), headers=HOW_IT_IS_SENT)
async def test_an_execution_is_refused_or_accepted_once_and_started(house: House, raw: bytes, headers: Headers):
    before = await house.stored()
    answer = await house.post(EXECUTE, raw, headers)
    after = await house.stored()
    if answer.status_code != 202:
        assert is_refusal(answer, 400, 413), answer.text
        assert after == before
        return
    assert after["executions"] == before["executions"] + 1
    assert after["calls"] == before["calls"]
    execution_id = answer.json()["executionId"]
    run_id = await house.launch(execution_id)
    assert len(house.payloads) == before["calls"] + 1
    await can_be_read(house, run_id)
    await can_be_told(house, execution_id)


# Decisions and tokens.

DECISIONS = [
    *(f"/api/happyrobot/approvals/{{approval}}/{verdict}" for verdict in ("approve", "reject")),
    *(f"{PUBLIC}/executions/{{execution}}/{verdict}" for verdict in ("approve", "reject")),
]


@examples(6)
@given(raw=bodies_like({"comment": "As they wish", "approvalId": None}), headers=HOW_IT_IS_SENT)
@pytest.mark.parametrize("url", DECISIONS)
async def test_a_decision_is_refused_or_counts(house: House, url: str, raw: bytes, headers: Headers):
    there = await house.asking(url)
    before = await house.stored()
    answer = await house.post(there, raw, headers)
    after = await house.stored()
    if answer.status_code != 200:
        assert is_refusal(answer, 400, 409, 413), answer.text
        assert after == before
        return
    del house.waiting[url]
    assert after["run_events"] > before["run_events"]
    if url.startswith(PUBLIC):
        await can_be_told(house, there.split("/")[-2])
    status = "approved" if url.endswith("approve") else "rejected"
    listed = await house.ok("/api/happyrobot/approvals", status=status)
    assert listed[0]["status"] == status
    assert await can_be_read(house, listed[0]["run_id"])


@examples(12)
@given(
    raw=bodies_like({"context_ids": ["order_1", "order_2"], "scopes": ["read", "trigger"], "expires_in": 900}),
    headers=HOW_IT_IS_SENT,
)
async def test_a_token_is_refused_or_good(house: House, raw: bytes, headers: Headers):
    before = await house.stored()
    answer = await house.post(TOKENS, raw, headers)
    assert await house.stored() == before
    if answer.status_code != 200:
        assert is_refusal(answer, 400, 413), answer.text
        return
    token = {"Authorization": f"Bearer {answer.json()['token']}"}
    known = (await house.http.get("/api/happyrobot/session", headers=token)).json()
    asked = json.loads(raw)
    assert known["context_ids"] == (
        asked["context_ids"] if asked["context_ids"] == "*" else sorted({*asked["context_ids"]})
    )
    assert set(known["scopes"]) == set(asked.get("scopes", ["read"]))


# One after the other, where it matters most.


@pytest.mark.parametrize(
    ("url", "whole", "names"),
    [
        (CALLBACKS, callback("completed"), ["data", "run_id", "event_type"]),
        (CALLBACKS, callback("pending_approval"), ["data"]),
        (TRIGGER, STARTED, ["context_id"]),
        (EXECUTE, EXECUTED, ["input", "contextId"]),
        (TOKENS, {"context_ids": "*"}, ["context_ids"]),
    ],
    ids=["callback", "request for approval", "trigger", "execution", "token"],
)
async def test_every_odd_value_is_refused_or_taken(house: House, url: str, whole: dict[str, Any], names: list[str]):
    execution_id, run_id = await house.execute()
    before = await house.stored()
    for name in names:
        without = {each: value for each, value in whole.items() if each != name}
        for body in (without, *(without | {name: Verbatim(odd)} for odd in ODD_VALUES)):
            raw = written(body).replace(RUN.encode(), run_id.encode())
            answer = await house.post(url, raw, {}, **{"X-API-KEY": HOOK_KEY})
            after = await house.stored()
            if answer.is_error and answer.status_code != 404:  # which is kept, where it is a callback
                assert is_refusal(answer, 400, 413), (raw, answer.text)
                assert after == before, raw
            before = after
    await can_be_read(house, run_id)
    await can_be_told(house, execution_id)
