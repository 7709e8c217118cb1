"""The Public API, to the letter of its contract: executions, errors, limits."""

import asyncio
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisGone
from sqlalchemy import func, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import workflows as registry
from switchboard.access import keys
from switchboard.access.rates import Rates
from switchboard.errors import PUBLIC, PostgresAway
from switchboard.executions import RunEnd, error, output, word
from switchboard.happyrobot.client import Hook
from switchboard.happyrobot.simulator import Call, Simulator
from switchboard.public import executions as public_executions
from switchboard.runs import intake as intakes
from switchboard.runs.queued import Launcher
from switchboard.runs.sorting import NewRuns, News, Outcome
from switchboard.runs.sweep import sweep
from switchboard.tables import ExecutionStatus, KeyScope, RunStatus, api_key_usage, api_keys, executions
from tests.conftest import (
    API_KEY,
    HOOK_KEY,
    Servers,
    Service,
    new_database,
    new_key,
    run_sql,
    running_service,
    serving,
    settings_for,
    unheard,
    until,
)
from tests.test_limits import from_address
from tests.website import Website, new_website

MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@dataclass
class House:
    """A service with a worker, and HappyRobot."""

    service: Service
    db: AsyncEngine
    simulator: Simulator

    async def website(self, **more: Any) -> Website:
        return await new_website(self.service, self.db, **more)

    def calls(self, execution_id: str) -> list[Call]:
        """Those that were placed for an execution."""
        return [
            call for call in self.simulator.calls if call.payload and call.payload.get("execution_id") == execution_id
        ]


@pytest.fixture(scope="module")
async def house(servers: Servers, template: str) -> AsyncIterator[House]:
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.002)
    async with (
        new_database(servers, template) as url,
        serving(lambda _: simulator.app) as (upstream, _),
        running_service(settings_for(url, servers.redis_url, upstream), worker=True) as service,
    ):
        yield House(service, service.state["db"], simulator)


@pytest.fixture
async def website(house: House) -> Website:
    return await house.website()


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and message of an error, which must have the contract's shape."""
    body = answer.json()
    assert list(body)[:3] == ["message", "error", "statusCode"]
    assert body["statusCode"] == answer.status_code
    assert body["error"] == httpx.codes(answer.status_code).name.replace("_", " ").title()
    assert {"x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"} <= set(answer.headers)
    return answer.status_code, body["message"]


CUSTOMER = {
    "customerId": "CUST001",
    "name": "John Doe",
    "phone": "+918610560986",
    "email": "john@example.com",
    "city": "Mumbai",
}


async def test_an_execution_from_its_acceptance_to_its_results(house: House, website: Website):
    answer = await website.post(
        "/agents/default/execute", {"input": {"csvData": [CUSTOMER], "load_id": "77"}, "description": "A campaign"}
    )
    accepted = answer.json()
    assert (answer.status_code, accepted) == (
        202,
        {
            "executionId": str(UUID(accepted["executionId"])),
            "status": "pending",
            "startedAt": accepted["startedAt"],
            "message": "Execution started successfully",
        },
    )
    assert MOMENT.fullmatch(accepted["startedAt"])
    execution_id = accepted["executionId"]
    status = await website.until(execution_id, "completed")
    assert status == {
        "id": execution_id,
        "status": "completed",
        "startedAt": accepted["startedAt"],
        "completedAt": status["completedAt"],
        "error": None,
        "approvalStatus": None,
    }
    assert MOMENT.fullmatch(status["completedAt"])
    results = (await website.get(f"/executions/{execution_id}/results")).json()
    assert results == {
        "id": execution_id,
        "status": "completed",
        "output": results["output"],
        "error": None,
        "startedAt": accepted["startedAt"],
        "completedAt": status["completedAt"],
    }
    assert results["output"]["load_id"] == "77", "what HappyRobot has reported"


async def test_a_workflow_gets_the_inputs_own_fields_and_ours(house: House, website: Website):
    given = {"csvData": [CUSTOMER], "callback_url": "http://evil.example", "execution_id": "x", "context_id": "x"}
    execution_id = await website.execute(given, description="A campaign", contextId="order_1")
    await website.until(execution_id, "completed")
    [call] = house.calls(execution_id)
    assert call.payload == {
        "csvData": [CUSTOMER],
        "callback_url": house.service.state["settings"].callback_url,
        "execution_id": execution_id,
        "context_id": "order_1",
        "description": "A campaign",
    }


async def test_the_context_is_the_executions_own_unless_it_is_given(house: House, website: Website):
    execution_id = await website.execute({"description": "of the input"})
    await website.until(execution_id, "completed")
    [call] = house.calls(execution_id)
    assert call.payload is not None
    assert call.payload["context_id"] == f"execution:{execution_id}"
    assert call.payload["description"] == "of the input"
    runs = (
        await house.service.http.get("/api/happyrobot/runs", params={"context_id": f"execution:{execution_id}"})
    ).json()
    assert [run["executionId"] for run in runs] == [execution_id]


@pytest.mark.parametrize(("rows", "cut"), [(99, None), (100, None), (101, 1), (250, 150)])
async def test_rows_over_a_hundred_are_cut_and_it_is_said(house: House, website: Website, rows: int, cut: int | None):
    data = [{"n": number} for number in range(rows)]
    answer = await website.post("/agents/default/execute", {"input": {"csvData": data}})
    assert answer.json().get("truncatedRows") == cut
    await website.until(answer.json()["executionId"], "completed")
    [call] = house.calls(answer.json()["executionId"])
    assert call.payload is not None
    assert call.payload["csvData"] == data[:100]


async def test_of_several_runs_the_output_is_a_list(house: House, website: Website):
    execution_id = await website.execute({"simulate": {"runs": 2}})
    await website.until(execution_id, "completed")
    found = (await website.get(f"/executions/{execution_id}/results")).json()["output"]
    run_ids = house.calls(execution_id)[0].run_ids
    assert [run["runId"] for run in found["runs"]] == run_ids
    for run in found["runs"]:
        assert (run["status"], run["error"], run["result"]["outcome"]) == ("completed", None, "load_booked")


async def test_a_failed_call_says_why(house: House, website: Website):
    execution_id = await website.execute({"simulate": {"outcome": "failed"}})
    status = await website.until(execution_id, "failed")
    assert status["error"] == "The line dropped before a rate was agreed"
    results = (await website.get(f"/executions/{execution_id}/results")).json()
    assert (results["error"], results["output"]) == (status["error"], None)


async def test_a_canceled_call_is_cancelled(house: House, website: Website):
    execution_id = await website.execute({"simulate": {"outcome": "canceled"}})
    status = await website.until(execution_id, "cancelled")
    assert status["error"] is None
    assert status["completedAt"]


async def test_what_happyrobot_refuses_has_failed(house: House, website: Website):
    execution_id = await website.execute({"simulate": {"faults": "answer=400"}})
    status = await website.until(execution_id, "failed")
    assert status["error"] == "HappyRobot answered 400"
    assert len(house.calls(execution_id)) == 1


async def test_what_may_have_been_placed_is_pending_and_placed_once(house: House, website: Website):
    """The word of the service's own, `submission_unknown`, is none of this contract."""
    execution_id = await website.execute({"simulate": {"faults": "disconnect,silent"}})

    async def unknown() -> bool:
        async with house.db.connect() as conn:
            query = select(executions.c.status).where(executions.c.id == execution_id)
            return await conn.scalar(query) == ExecutionStatus.SUBMISSION_UNKNOWN

    await until(unknown)
    assert (await website.status(execution_id))["status"] == "pending"
    # It is not waited for longer than for any other silence.
    async with house.db.begin() as conn:
        ago = func.now() - timedelta(seconds=1801)
        await conn.execute(update(executions).where(executions.c.id == execution_id).values(updated_at=ago))
    await sweep(house.db, house.service.state["intake"], 15, 1800)
    status = await website.status(execution_id)
    assert status["status"] == "failed"
    assert status["error"].startswith("HappyRobot did not answer")
    # Whoever it was that was called, their callback is still theirs.
    [call] = house.calls(execution_id)
    run_id = call.run_ids[0]
    await house.service.callback(run_id, "running", execution_id=execution_id)
    status = await website.status(execution_id)
    assert (status["status"], status["error"], status["completedAt"]) == ("running", None, None)
    assert len(house.calls(execution_id)) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The body is not valid JSON"),
        (b"{", "The body is not valid JSON"),
        (b"[]", "The body must be a JSON object"),
        (b'"x"', "The body must be a JSON object"),
        (b"{}", "input required"),
        (b'{"input": null}', "input: Input should be an object"),
        (b'{"input": []}', "input: Input should be an object"),
        (b'{"input": "x"}', "input: Input should be an object"),
        (b'{"input": {"csvData": {}}}', "input: csvData must be a list of objects"),
        (b'{"input": {"csvData": "a,b"}}', "input: csvData must be a list of objects"),
        (b'{"input": {"csvData": null}}', "input: csvData must be a list of objects"),
        (b'{"input": {"csvData": [{}, 1]}}', "input: csvData must be a list of objects"),
        (b'{"input": {"x": NaN}}', "The body is not valid JSON"),
        (b'{"input": {"x": "\\u0000"}}', "The body contains a NUL character"),
        (b'{"input": {"x": "\\ud800"}}', "The body is not valid JSON"),
        (b'{"input": {}, "description": 7}', "description: Input should be a valid string"),
        (b'{"input": {}, "contextId": ""}', "contextId required"),
        (b'{"input": {}, "contextId": 1}', "contextId: Input should be a valid string"),
        (b'{"input": {"x": ' + b"[" * 300 + b"]" * 300 + b"}}", "The body is not valid JSON"),
    ],
)
async def test_bad_input_is_refused_and_changes_nothing(house: House, website: Website, body: bytes, message: str):
    url = f"{PUBLIC}/agents/default/execute"
    answer = await website.http.post(url, content=body, headers=website.headers)
    assert refusal(answer) == (400, message)
    assert await stored(house, website) == 0


async def stored(house: House, website: Website) -> int:
    """How many executions a website has."""
    async with house.db.connect() as conn:
        query = select(func.count()).select_from(executions).where(executions.c.key_id == website.key_id)
        return await conn.scalar(query) or 0


async def test_a_body_of_a_megabyte_is_too_large(house: House, website: Website):
    answer = await website.post("/agents/default/execute", {"input": {"x": "y" * 1_000_000}})
    assert answer.status_code == 413
    assert list(answer.json()) == ["message", "error", "statusCode"]
    assert answer.headers["x-ratelimit-limit"]
    assert await stored(house, website) == 0


@pytest.mark.parametrize("workflow", ["nothing", "x" * 255, "x" * 256, "%00", "a%2Fb", "%F0%9F%98%80", ".."])
async def test_an_unknown_workflow_is_not_found(house: House, website: Website, workflow: str):
    answer = await website.post(f"/agents/{workflow}/execute", {"input": {}})
    assert answer.status_code in (400, 404), "400 for what can be no id"
    refusal(answer)
    if workflow == "nothing":
        assert refusal(answer) == (404, "Workflow not found")
    assert await stored(house, website) == 0


async def register(house: House, name: str, *, active: bool = True) -> str:
    settings = house.service.state["settings"]
    default = registry.default(settings)
    assert default is not None
    async with house.db.begin() as conn:
        workflow = registry.Workflow(f"{name}-{uuid4().hex}", Hook(default.hook.url, default.hook.key), active=active)
        await registry.add(conn, settings, workflow)
    return workflow.id


async def test_an_inactive_workflow_is_not_started(house: House, website: Website):
    workflow = await register(house, "off", active=False)
    answer = await website.post(f"/agents/{workflow}/execute", {"input": {}})
    assert refusal(answer) == (403, "Workflow is inactive")
    assert await stored(house, website) == 0


async def test_a_key_for_some_workflows_knows_of_no_others(house: House):
    mine, other = await register(house, "mine"), await register(house, "other")
    website = await house.website(workflows=[mine])
    execution_id = await website.execute(workflow=mine)
    await website.until(execution_id, "completed")
    for workflow in (other, "default", "nothing"):
        answer = await website.post(f"/agents/{workflow}/execute", {"input": {}})
        assert refusal(answer) == (404, "Workflow not found")


async def test_a_workflow_that_is_switched_off_meanwhile_is_not_started(own_database: str, servers: Servers):
    simulator = Simulator(hook_key=HOOK_KEY, pace=0.002)
    async with serving(lambda _: simulator.app) as (upstream, _):
        settings = settings_for(own_database, servers.redis_url, upstream)
        async with running_service(settings) as service:
            house = House(service, service.state["db"], simulator)
            website = await house.website()
            workflow = await register(house, "brief")
            execution_id = await website.execute(workflow=workflow)
            async with house.db.begin() as conn:
                await registry.set_active(conn, workflow, active=False)
        async with running_service(settings, worker=True) as service:
            again = Website(service.http, website.key_id, website.headers)
            status = await again.until(execution_id, "failed")
            assert status["error"] == "The workflow cannot be started any more"
    assert simulator.calls == []


EVERYTHING_ABOUT_ONE = [
    ("GET", "/executions/{id}/status"),
    ("GET", "/executions/{id}/results"),
    ("GET", "/executions/{id}/pending-approval"),
    ("POST", "/executions/{id}/approve"),
    ("POST", "/executions/{id}/reject"),
]


@pytest.mark.parametrize(("method", "path"), EVERYTHING_ABOUT_ONE)
async def test_an_execution_of_another_key_does_not_exist(house: House, website: Website, method: str, path: str):
    other = await house.website()
    theirs = await other.execute({"simulate": {"approval": True}})
    await other.until(theirs, "pending_approval")
    for execution_id in (theirs, str(uuid4()), "nonsense", "0", "%00", "x" * 300):
        url = PUBLIC + path.format(id=execution_id)
        answer = await website.http.request(method, url, headers=website.headers)
        assert refusal(answer) == (404, "Execution not found")
    assert (await other.status(theirs))["approvalStatus"] == "pending"


async def test_what_is_not_there_is_said_in_the_contracts_shape(house: House, website: Website):
    assert refusal(await website.get("/nothing")) == (404, "Not Found")
    assert refusal(await website.post("/")) == (404, "Not Found")
    for wrong in (
        await website.post(f"/executions/{uuid4()}/status"),
        await website.http.delete(f"{PUBLIC}/deliveries", headers=website.headers),
    ):
        assert refusal(wrong) == (405, "Method Not Allowed")
        assert wrong.headers["allow"] == "GET"
    for method in ("OPTIONS", "TRACE", "HEAD", "PUT"):
        for path, status in (("/deliveries", 405), ("/nothing", 404), ("", 404), ("/deliveries/", 404)):
            answer = await website.http.request(method, PUBLIC + path, headers=website.headers)
            assert answer.status_code == status
            assert answer.headers["x-ratelimit-limit"] == "1000000"
            assert method == "HEAD" or refusal(answer)


async def test_an_error_of_our_own_has_the_contracts_shape_and_says_nothing(
    website: Website, monkeypatch: pytest.MonkeyPatch
):
    async def fail(*_: object) -> None:
        raise RuntimeError("what nobody should read")

    execution_id = await website.execute()
    monkeypatch.setattr(public_executions, "ends_of", fail)
    answer = await website.get(f"/executions/{execution_id}/status")
    assert refusal(answer) == (500, "Internal server error")
    assert "nobody" not in answer.text


# Keys


async def test_without_a_good_key_nobody_is_let_in(house: House):
    url = f"{PUBLIC}/executions/{uuid4()}/status"
    for headers in ({}, {"Authorization": f"Bearer {'0' * 64}"}, {"Authorization": "Basic eDp5"}):
        answer = await house.service.http.get(url, headers=headers)
        assert answer.json() == {"message": "Invalid API key", "error": "Unauthorized", "statusCode": 401}
        refusal(answer)


async def test_a_key_that_may_not_is_told_why(house: House):
    revoked, expired = await house.website(), await house.website(lifetime=timedelta(seconds=0))
    async with house.db.begin() as conn:
        await keys.revoke(conn, revoked.key_id)
    _, headers = await new_key(house.db, KeyScope.APP)
    app = Website(house.service.http, uuid4(), headers)
    for website, message in (
        (revoked, "API key is inactive"),
        (expired, "API key has expired"),
        (app, "API key is not for the Public API"),
    ):
        assert refusal(await website.post("/agents/default/execute", {"input": {}})) == (403, message)


# Idempotency


async def test_the_same_request_again_is_the_same_execution(house: House, website: Website):
    key = f"campaign/{uuid4()}"
    body = {"input": {"csvData": [CUSTOMER] * 101}}
    first = await website.post("/agents/default/execute", body, **{"Idempotency-Key": key})
    await website.until(first.json()["executionId"], "completed")
    again = await website.post("/agents/default/execute", body, **{"Idempotency-Key": key})
    assert (again.status_code, again.json()) == (202, first.json())
    assert len(house.calls(first.json()["executionId"])) == 1
    assert await stored(house, website) == 1
    workflow = await register(house, "other")
    for path, other in (
        ("default", {"input": {}}),
        ("default", body | {"description": "x"}),
        (workflow, body),
    ):
        answer = await website.post(f"/agents/{path}/execute", other, **{"Idempotency-Key": key})
        assert refusal(answer) == (422, "This Idempotency-Key was used with another body")
    # It is the key's own.
    other_website = await house.website()
    answer = await other_website.post("/agents/default/execute", body, **{"Idempotency-Key": key})
    assert answer.json()["executionId"] != first.json()["executionId"]


async def test_fifty_of_the_same_at_once_are_one_call(house: House, website: Website):
    headers = {"Idempotency-Key": str(uuid4())}
    answers = await asyncio.gather(
        *(website.post("/agents/default/execute", {"input": {"a": 1}}, **headers) for _ in range(50))
    )
    assert {answer.status_code for answer in answers} == {202}
    [execution_id] = {answer.json()["executionId"] for answer in answers}
    await website.until(execution_id, "completed")
    assert len(house.calls(execution_id)) == 1
    async with house.db.connect() as conn:
        used = select(api_key_usage.c.executions).where(api_key_usage.c.key_id == website.key_id)
        assert await conn.scalar(used) == 1, "and counts once"


# Executions and the workers that start them


async def test_what_was_accepted_is_started_when_a_worker_comes_and_never_twice(own_database: str, servers: Servers):
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.002)
    async with serving(lambda _: simulator.app) as (upstream, _):
        settings = settings_for(own_database, servers.redis_url, upstream)
        async with running_service(settings) as service:
            website = await new_website(service, service.state["db"])
            ids = [await website.execute() for _ in range(20)]
            assert {(await website.status(each))["status"] for each in ids} == {"pending"}
            # One whose process was killed after it had begun: its call may be placed.
            async with service.state["db"].begin() as conn:
                ago = func.now() - timedelta(seconds=1)
                await conn.execute(update(executions).where(executions.c.id == ids[0]).values(answer_by=ago))
                # And one whose job was lost.
                await conn.execute(
                    text("DELETE FROM switchboard_pgqueuer WHERE dedupe_key = :key"), {"key": f"start:{ids[1]}"}
                )
                long_ago = func.now() - timedelta(minutes=2)
                await conn.execute(update(executions).where(executions.c.id == ids[1]).values(created_at=long_ago))
        assert simulator.calls == []
        async with running_service(settings, worker=True) as one, running_service(settings, worker=True):
            again = Website(one.http, website.key_id, website.headers)
            for each in ids[1:]:
                await again.until(each, "completed")
            assert (await again.status(ids[0]))["status"] == "pending"
            async with one.state["db"].connect() as conn:
                known = await conn.scalar(select(executions.c.status).where(executions.c.id == ids[0]))
            assert known == ExecutionStatus.SUBMISSION_UNKNOWN
    placed = Counter(call.payload and call.payload["execution_id"] for call in simulator.calls)
    assert placed == Counter(ids[1:])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("UPDATE executions SET created_at = now() - interval '31 minutes'", "It could not be started in time"),
        ("UPDATE api_keys SET active = false", "The API key was revoked before it was started"),
    ],
)
async def test_nobody_is_called_for_what_is_old_or_whose_key_was_revoked(
    own_database: str, servers: Servers, change: str, error: str
):
    simulator = Simulator(hook_key=HOOK_KEY, pace=0.002)
    async with serving(lambda _: simulator.app) as (upstream, _):
        settings = settings_for(own_database, servers.redis_url, upstream)
        async with running_service(settings) as service:
            execution_id = await (await new_website(service, service.state["db"])).execute()
            await run_sql(own_database, change)
        async with running_service(settings, worker=True) as service:
            assert await error_of(service.state["db"], execution_id) == error
    assert simulator.calls == []


async def test_a_worker_that_does_not_know_the_hook_leaves_it_to_one_that_does(own_database: str, servers: Servers):
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.002)
    async with serving(lambda _: simulator.app) as (upstream, _):
        settings = settings_for(own_database, servers.redis_url, upstream)
        async with running_service(settings) as service:
            website = await new_website(service, service.state["db"])
            execution_id = await website.execute()
            knows_none = settings.model_copy(update={"happyrobot_webhook_url": None})
            async with running_service(knows_none) as other:
                state = other.state
                launcher = Launcher(knows_none, state["db"], state["happyrobot"], state["intake"])
                assert await launcher.start(execution_id) == 2
            assert (await website.status(execution_id))["status"] == "pending"
            async with running_service(settings, worker=True):
                await website.until(execution_id, "running", "completed")
    assert len(simulator.calls) == 1


async def error_of(db: AsyncEngine, execution_id: str) -> str:
    """Why an execution has failed, once it has."""
    query = select(executions.c.status, executions.c.error).where(executions.c.id == execution_id)

    async def failed() -> bool:
        async with db.connect() as conn:
            return bool((await conn.execute(query)).one().status == ExecutionStatus.FAILED)

    await until(failed)
    async with db.connect() as conn:
        return str((await conn.execute(query)).one().error)


async def test_a_call_that_is_being_placed_is_heard_out_when_the_worker_is_to_stop(own_database: str, servers: Servers):
    """Else each deployment would lose the calls of its moment."""
    asked = asyncio.Event()

    async def hook(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            asked.set()
            await asyncio.sleep(1)
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"queued_run_ids": ["the-run"]}'})

    async with serving(lambda _: hook) as (url, _):
        settings = settings_for(own_database, servers.redis_url, url, happyrobot_api_key=None)
        async with running_service(settings, worker=True) as service:
            website = await new_website(service, service.state["db"])
            execution_id = await website.execute()
            await asked.wait()
        async with running_service(settings) as service:
            again = Website(service.http, website.key_id, website.headers)
            assert (await again.status(execution_id))["status"] == "running"


async def test_a_job_that_comes_up_twice_places_one_call(own_database: str, servers: Servers):
    """Its worker's sign of life was late, or it was killed after it had begun: the call may be placed."""
    asked, answers = 0, asyncio.Event()

    async def hook(scope: Any, receive: Any, send: Any) -> None:
        nonlocal asked
        if scope["type"] == "http":
            asked += 1
            await answers.wait()
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"queued_run_ids": ["the-run"]}'})

    async def is_asked() -> bool:
        return bool(asked)

    async with serving(lambda _: hook) as (url, _):
        settings = settings_for(own_database, servers.redis_url, url, happyrobot_api_key=None)
        async with running_service(settings) as one, running_service(settings) as other:
            website = await new_website(one, one.state["db"])
            execution_id = await website.execute()
            first, second = (
                Launcher(settings, state["db"], state["happyrobot"], state["intake"])
                for state in (one.state, other.state)
            )
            placing = asyncio.create_task(first.start(execution_id))
            await until(is_asked)
            await second.start(execution_id)
            answers.set()
            await placing
            await second.start(execution_id)
            assert (await website.status(execution_id))["status"] == "running"
    assert asked == 1


async def test_a_call_whose_worker_did_not_hear_that_it_was_its_own_is_placed_all_the_same(
    own_database: str, servers: Servers
):
    """PostgreSQL goes away between a commit and its answer: nobody was called."""
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.002)
    async with serving(lambda _: simulator.app) as (upstream, _):
        settings = settings_for(own_database, servers.redis_url, upstream)
        async with running_service(settings) as service:
            state = service.state
            website = await new_website(service, state["db"])
            execution_id = await website.execute()
            launcher = Launcher(settings, state["db"], state["happyrobot"], state["intake"])
            with unheard(state["db"]), pytest.raises(PostgresAway):
                await launcher.start(execution_id)
            assert simulator.calls == []
            await launcher.start(execution_id)
    assert len(simulator.calls) == 1


async def test_runs_are_recorded_however_long_postgresql_is_away(
    own_database: str, servers: Servers, monkeypatch: pytest.MonkeyPatch
):
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.002)
    monkeypatch.setattr(intakes, "_PAUSES", (0.01,))
    async with serving(lambda _: simulator.app) as (upstream, _):
        settings = settings_for(own_database, servers.redis_url, upstream)
        async with running_service(settings, worker=True) as service:
            intake, away = service.state["intake"], Counter[str]()
            take = intake.take

            async def away_for_a_while(news: News, size: int = 0) -> Outcome:
                if isinstance(news, NewRuns) and away["times"] < 20:
                    away["times"] += 1
                    raise PostgresAway("PostgreSQL takes no connection")
                return await take(news, size)

            monkeypatch.setattr(intake, "take", away_for_a_while)
            website = await new_website(service, service.state["db"])
            await website.until(await website.execute(), "completed")
    assert (away["times"], len(simulator.calls)) == (20, 1)


# The monthly limit


async def test_of_a_thousand_at_once_the_last_ten_are_accepted(house: House):
    website = await house.website(monthly_limit=1000)
    async with house.db.begin() as conn:
        for_now = {"key_id": website.key_id, "month": keys.this_month(), "executions": 990}
        await conn.execute(api_key_usage.insert().values(for_now))
    # Nobody is called for it.
    workflow = await register(house, "nobody")
    async with house.db.begin() as conn:
        await conn.execute(
            text("UPDATE workflows SET hook_url = 'http://127.0.0.1:1/hooks/x' WHERE id = :id"), {"id": workflow}
        )
    places = asyncio.Semaphore(200)  # an ordinary user may not have many more files open, and each takes two

    async def execute(number: int) -> tuple[int, Any]:
        async with places:
            return await at_once(house, website, f"/agents/{workflow}/execute", {"input": {"n": number}})

    answers = await asyncio.gather(*map(execute, range(1000)))
    assert Counter(status for status, _ in answers) == {202: 10, 403: 990}
    assert {body["message"] for status, body in answers if status == 403} == {"API key usage limit exceeded"}
    assert await stored(house, website) == 10
    async with house.db.connect() as conn:
        used = select(api_key_usage.c.executions).where(api_key_usage.c.key_id == website.key_id)
        assert await conn.scalar(used) == 1000


async def at_once(house: House, website: Website, path: str, body: Any) -> tuple[int, Any]:
    """A request over a connection of its own, without a client that would make a thousand of them queue.

    Tried again where there is too much to do, as it is told.
    """
    url, content = urlsplit(house.service.url), json.dumps(body)
    head = {"Host": url.netloc, "Content-Length": str(len(content)), "Connection": "close", **website.headers}
    lines = [f"POST {PUBLIC}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", content]
    while True:
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write("\r\n".join(lines).encode())
        answer = await reader.read()
        writer.close()
        begin, _, end = answer.partition(b"\r\n\r\n")
        status = int(begin.split()[1])
        if status != 503:
            return status, json.loads(end)


async def test_what_is_refused_does_not_count(house: House):
    website = await house.website(monthly_limit=1)
    for path, body in (("nothing", {"input": {}}), ("default", {}), ("default", {"input": {"csvData": 1}})):
        assert (await website.post(f"/agents/{path}/execute", body)).status_code in (400, 404)
    await website.execute()
    assert refusal(await website.post("/agents/default/execute", {"input": {}})) == (
        403,
        "API key usage limit exceeded",
    )
    # Asking costs nothing.
    assert (await website.get(f"/executions/{uuid4()}/status")).status_code == 404


# The rate limit


def rate(answer: httpx.Response) -> tuple[int, int, float]:
    """Limit, remaining, and the seconds until all of it is there again."""
    left = int(answer.headers["x-ratelimit-reset"]) / 1000 - time.time()
    return int(answer.headers["x-ratelimit-limit"]), int(answer.headers["x-ratelimit-remaining"]), left


async def test_ten_at_once_and_one_a_second(house: House):
    website = await house.website(burst=None)
    began = time.monotonic()
    for number in itertools.count(1):
        answer = await website.get("/deliveries")
        took = time.monotonic() - began
        limit, remaining, left = rate(answer)
        assert limit == 10
        if answer.status_code == 429:
            break
        # As many as there were at first, and those that came since; to the token and to the second.
        assert 10 - number <= remaining <= 10 - number + took + 1
        assert number - took - 1 < left <= number + 1
    accepted = number - 1
    assert 10 <= accepted <= 10 + took + 1
    assert remaining == 0
    body = answer.json()
    wait = body.pop("retryAfter")
    assert body == {"message": "Rate limit exceeded", "error": "Too Many Requests", "statusCode": 429}
    assert answer.headers["retry-after"] == str(wait) == "1"
    # After what it says there is room.
    await asyncio.sleep(wait)
    assert (await website.get("/deliveries")).status_code == 200


async def test_a_key_may_have_a_limit_of_its_own(house: House):
    website = await house.website(burst=2, per_minute=6)
    assert [(await website.get("/deliveries")).status_code for _ in range(3)] == [200, 200, 429]
    refused = await website.get("/deliveries")
    assert 9 <= refused.json()["retryAfter"] <= 10
    limit, remaining, left = rate(refused)
    assert (limit, remaining) == (2, 0)
    assert 18 <= left <= 20.1
    # Others are not the worse for it.
    assert (await (await house.website(burst=None)).get("/deliveries")).status_code == 200


async def test_a_limit_that_was_made_smaller_leaves_nothing_and_no_less(house: House):
    website = await house.website(burst=50, per_minute=60)
    for _ in range(30):
        assert (await website.get("/deliveries")).status_code == 200
    async with house.db.begin() as conn:
        await conn.execute(update(api_keys).where(api_keys.c.id == website.key_id).values(burst=5))
    refused = await website.get("/deliveries")
    assert (refused.status_code, rate(refused)[1]) == (429, 0)


async def test_replicas_share_a_limit(house: House, servers: Servers):
    website = await house.website(burst=20, per_minute=1)
    settings = house.service.state["settings"]
    async with running_service(settings) as second:
        elsewhere = Website(second.http, website.key_id, website.headers)
        answers = await asyncio.gather(*((website, elsewhere)[n % 2].get("/deliveries") for n in range(60)))
    accepted = [answer for answer in answers if answer.status_code == 200]
    assert 20 <= len(accepted) <= 21
    assert sorted(rate(answer)[1] for answer in accepted)[:20] == list(range(20)), "each token is given once"


async def test_without_redis_each_process_keeps_the_same_limit(
    house: House, servers: Servers, monkeypatch: pytest.MonkeyPatch
):
    website = await house.website(burst=5, per_minute=1)
    redis = Redis.from_url(servers.redis_url)

    async def gone(*_: Any, **__: Any) -> None:
        raise RedisGone("gone")

    monkeypatch.setattr(redis, "execute_command", gone)
    monkeypatch.setattr(redis, "evalsha", gone, raising=False)
    settings = house.service.state["settings"]
    async with running_service(settings) as service:
        # Its requests go by a Redis that is not there.
        monkeypatch.setitem(service.state, "rates", Rates(redis))
        alone = Website(service.http, website.key_id, website.headers)
        answers = [await alone.get("/deliveries") for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
    assert [rate(answer)[1] for answer in answers] == [4, 3, 2, 1, 0, 0, 0]
    await redis.aclose()


async def test_wrong_keys_are_limited_by_address(house: House, context_id: str):
    settings = house.service.state["settings"].model_copy(update={"failed_logins_per_minute": 3})
    address = from_address(context_id)
    async with running_service(settings) as service:
        answers = [await service.http.get(f"{PUBLIC}/deliveries", headers=address) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [401, 401, 401, 429, 429]
        assert refusal(answers[-1]) == (429, "Rate limit exceeded")
        assert answers[-1].json()["retryAfter"] == int(answers[-1].headers["retry-after"])
        # A good one is let in from there all the same.
        website = await house.website()
        again = Website(service.http, website.key_id, website.headers | address)
        assert (await again.get("/deliveries")).status_code == 200


# Pure decisions


@pytest.mark.parametrize(
    ("status", "given_up", "said"),
    [
        (ExecutionStatus.PENDING, False, "pending"),
        (ExecutionStatus.SUBMISSION_UNKNOWN, False, "pending"),
        (ExecutionStatus.SUBMISSION_UNKNOWN, True, "failed"),
        (ExecutionStatus.RUNNING, False, "running"),
        (ExecutionStatus.PENDING_APPROVAL, False, "pending_approval"),
        (ExecutionStatus.COMPLETED, True, "completed"),
        (ExecutionStatus.FAILED, True, "failed"),
        (ExecutionStatus.CANCELLED, True, "cancelled"),
    ],
)
def test_every_status_has_a_word_of_the_contract(status: ExecutionStatus, given_up: bool, said: str):
    assert word(status, given_up=given_up) == said


def end(status: RunStatus, result: Any = None, error: Any = None) -> RunEnd:
    return RunEnd("r", status, result, error)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("Busy", "Busy"),
        ({"error": "Busy", "reason": "x"}, "Busy"),
        ({"message": "Busy"}, "Busy"),
        ({"reason": "busy"}, "busy"),
        ({"code": 486}, '{"code":486}'),
        ([1], "[1]"),
        (None, "The call failed"),
    ],
)
def test_an_error_is_a_sentence_whatever_the_workflow_sends(found: Any, said: str):
    assert error(None, [end(RunStatus.COMPLETED), end(RunStatus.FAILED, error=found)]) == said
    assert error("HappyRobot answered 400", []) == "HappyRobot answered 400"


def test_the_output_is_what_was_reported():
    assert output([]) is None
    assert output([end(RunStatus.COMPLETED, {"a": 1})]) == {"a": 1}
    assert output([end(RunStatus.CANCELED), end(RunStatus.FAILED, error={"error": "Busy"})]) == {
        "runs": [
            {"runId": "r", "status": "cancelled", "result": None, "error": None},
            {"runId": "r", "status": "failed", "result": None, "error": "Busy"},
        ]
    }
