"""Triggers: written down, sent once, recorded; and everything that HappyRobot may answer."""

from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import UUID

import httpx
import pytest
import respx
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.errors import PostgresAway
from switchboard.happyrobot import client
from switchboard.runs import intake as intakes
from switchboard.runs import trigger as triggers
from switchboard.runs.intake import Intake
from switchboard.runs.sorting import NewRuns
from switchboard.tables import agent_runs, executions, run_events
from tests.conftest import HOOK_KEY, Servers, Service, Upstream, running_service, settings_for, until

URL = "/api/happyrobot/trigger"


async def execution(db: AsyncEngine, execution_id: str) -> Any:
    async with db.connect() as conn:
        return (await conn.execute(select(executions).where(executions.c.id == UUID(execution_id)))).one()


async def executions_of(db: AsyncEngine, context_id: str) -> int:
    async with db.connect() as conn:
        query = select(func.count()).select_from(executions).where(executions.c.context_id == context_id)
        return await conn.scalar(query) or 0


def answering(router: respx.MockRouter, database_url: str, servers: Servers) -> AbstractAsyncContextManager[Service]:
    """A service for which the router is HappyRobot."""
    settings = settings_for(database_url, servers.redis_url, None)
    return running_service(settings, httpx.MockTransport(router.async_handler))


async def test_a_call_from_the_trigger_to_its_result(
    service: Service, upstream: Upstream, db: AsyncEngine, context_id: str
):
    answer = await service.http.post(URL, json={"context_id": context_id, "name": "Check call", "description": "d"})
    assert answer.status_code == 200
    body = answer.json()
    [run_id] = body["run_ids"]
    assert body == {"success": True, "run_ids": [run_id], "execution_id": body["execution_id"]}

    async def is_over() -> bool:
        return bool((await service.run(run_id))["status"] == "COMPLETED")

    await until(is_over)
    run = await service.run(run_id)
    assert run | {"id": "", "createdAt": "", "updatedAt": "", "completedAt": "", "metadata": {}} == {
        "id": "",
        "runId": run_id,
        "contextId": context_id,
        "name": "Check call",
        "description": "d",
        "status": "COMPLETED",
        "createdAt": "",
        "updatedAt": "",
        "completedAt": "",
        "metadata": {},
        "workflowId": "default",
        "executionId": body["execution_id"],
    }
    told = upstream.simulator.runs[run_id].events
    assert run["metadata"]["logs"] == [event["data"] for event in told if event["event_type"] == "log"]
    assert run["metadata"]["result"] == told[-1]["data"]
    found = await execution(db, body["execution_id"])
    assert (found.status, found.error) == ("completed", None)
    assert found.completed_at is not None


async def test_everything_in_the_body_is_passed_on_and_ours_comes_last(
    service: Service, upstream: Upstream, context_id: str
):
    body = {
        "context_id": context_id,
        "workflow_id": "default",
        "customer_phone": "+15550100",
        "nested": {"deep": [1, 2.5, None, "ä"]},
        "callback_url": "https://attacker.example/",
        "execution_id": "mine",
    }
    answer = await service.http.post(URL, json=body)
    call = upstream.simulator.calls[-1]
    assert call.payload == body | {
        "callback_url": f"{service.url}/api/webhooks/happyrobot",
        "execution_id": answer.json()["execution_id"],
    }
    assert call.headers["x-api-key"] == HOOK_KEY


async def test_the_execution_keeps_what_was_asked_for(service: Service, db: AsyncEngine, context_id: str):
    body = {"context_id": context_id, "name": "N", "description": "D", "anything": [1]}
    answer = await service.http.post(URL, json=body)
    found = await execution(db, answer.json()["execution_id"])
    assert found.input == body
    assert (found.context_id, found.workflow_id, found.name, found.description) == (context_id, "default", "N", "D")


async def test_several_runs_of_one_trigger_are_all_recorded(
    service: Service, upstream: Upstream, db: AsyncEngine, context_id: str
):
    body = {"context_id": context_id, "simulate": {"runs": 3}}
    answer = (await service.http.post(URL, json=body)).json()
    assert len(set(answer["run_ids"])) == 3
    await upstream.simulator.settled()
    runs = (await service.http.get("/api/happyrobot/runs", params={"context_id": context_id})).json()
    assert {run["runId"] for run in runs} == set(answer["run_ids"])
    assert {run["executionId"] for run in runs} == {answer["execution_id"]}
    assert {run["name"] for run in runs} == {"HappyRobot Run"}
    assert (await execution(db, answer["execution_id"])).status == "completed"


@pytest.mark.parametrize(("outcome", "status"), [("failed", "failed"), ("canceled", "cancelled")])
async def test_the_execution_ends_as_its_run_does(
    service: Service, upstream: Upstream, db: AsyncEngine, context_id: str, outcome: str, status: str
):
    body = {"context_id": context_id, "simulate": {"outcome": outcome}}
    answer = (await service.http.post(URL, json=body)).json()
    assert (await execution(db, answer["execution_id"])).status == "running"
    await upstream.simulator.settled()
    assert (await execution(db, answer["execution_id"])).status == status


async def test_a_run_appears_in_its_timeline_as_triggered(service: Service, context_id: str):
    answer = (await service.http.post(URL, json={"context_id": context_id, "name": "N"})).json()
    timeline = (await service.http.get(f"/api/happyrobot/runs/{answer['run_ids'][0]}/events")).json()
    assert timeline[0]["event_type"] == "triggered"
    assert timeline[0]["data"] == {"name": "N", "workflow_id": "default", "execution_id": answer["execution_id"]}


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "The body is not valid JSON"),
        (b"[]", "The body must be a JSON object"),
        (b'"x"', "The body must be a JSON object"),
        (b"{}", "context_id required"),
        (b'{"context_id": ""}', "context_id required"),
        (b'{"context_id": null}', "context_id: Input should be a valid string"),
        (b'{"context_id": 5}', "context_id: Input should be a valid string"),
        (b'{"context_id": "' + b"x" * 256 + b'"}', "context_id: String should have at most 255 characters"),
        (b'{"context_id": "a\\u0000b"}', "The body contains a NUL character"),
        (b'{"context_id": "a", "x": NaN}', "The body is not valid JSON"),
        (b'{"context_id": "a", "x": "\\udfff"}', "The body is not valid JSON"),
        (b'{"context_id": "a", "x": ' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}", "The body is not valid JSON"),
        (b'{"context_id": "a", "name": 5}', "name: Input should be a valid string"),
        (b'{"context_id": "a", "name": "' + b"x" * 256 + b'"}', "name: String should have at most 255 characters"),
        (b'{"context_id": "a", "description": {}}', "description: Input should be a valid string"),
        (b'{"context_id": "a", "workflow_id": 1}', "workflow_id: Input should be a valid string"),
        (b'{"context_id": "a", "x": ' + b"9" * 250 + b"e99}", "The body contains a number that is too large"),
    ],
)
async def test_bad_input_is_refused_and_nothing_is_dialled(
    service: Service, upstream: Upstream, db: AsyncEngine, body: bytes, complaint: str
):
    calls = len(upstream.simulator.calls)
    before = await executions_of(db, "a")
    answer = await service.http.post(URL, content=body)
    assert (answer.status_code, answer.json()) == (400, {"error": complaint})
    assert len(upstream.simulator.calls) == calls
    assert await executions_of(db, "a") == before


async def test_an_unknown_workflow_is_not_found_and_nothing_is_dialled(
    service: Service, upstream: Upstream, db: AsyncEngine, context_id: str
):
    calls = len(upstream.simulator.calls)
    answer = await service.http.post(URL, json={"context_id": context_id, "workflow_id": "no such"})
    assert (answer.status_code, answer.json()) == (404, {"error": "Workflow not found"})
    assert len(upstream.simulator.calls) == calls
    assert await executions_of(db, context_id) == 0


async def test_a_body_of_a_megabyte_is_refused(service: Service, upstream: Upstream, context_id: str):
    calls = len(upstream.simulator.calls)
    answer = await service.http.post(URL, json={"context_id": context_id, "x": "x" * 1_000_000})
    assert answer.status_code == 413
    assert len(upstream.simulator.calls) == calls


@pytest.mark.parametrize(
    ("fault", "status", "detail"),
    [
        ("answer=400", "failed", "HappyRobot answered 400"),
        ("answer=500", "submission_unknown", "HappyRobot answered 500"),
        ("answer=garbage", "submission_unknown", "HappyRobot answered 200 with something unreadable"),
        ("answer=empty", "submission_unknown", "HappyRobot answered 200 with something unreadable"),
        ("answer=no_runs", "submission_unknown", "HappyRobot answered 200 without naming a run"),
        ("disconnect", "submission_unknown", "HappyRobot did not answer (RemoteProtocolError)"),
    ],
)
async def test_what_happyrobot_does_not_confirm_is_a_502_that_says_what_happened(
    service: Service, upstream: Upstream, db: AsyncEngine, context_id: str, fault: str, status: str, detail: str
):
    calls = len(upstream.simulator.calls)
    answer = await service.http.post(URL, json={"context_id": context_id, "simulate": {"faults": fault}})
    body = answer.json()
    assert answer.status_code == 502
    # Where the call went ahead, its callbacks may have named the execution by then.
    run_ids = body.pop("run_ids", [])
    assert run_ids in ([], upstream.simulator.calls[-1].run_ids)
    assert body == {
        "error": "Failed to trigger workflow",
        "execution_id": body["execution_id"],
        "status": status,
        "detail": detail,
    }
    found = await execution(db, body["execution_id"])
    assert found.unconfirmed
    if not upstream.simulator.calls[-1].run_ids:
        assert (found.status, found.error) == (status, detail)
    assert len(upstream.simulator.calls) == calls + 1, "it is dialled once"


async def test_a_hook_that_never_answers_is_left_after_the_timeout(
    database_url: str, servers: Servers, upstream: Upstream, db: AsyncEngine, context_id: str
):
    settings = settings_for(database_url, servers.redis_url, upstream.url, happyrobot_trigger_timeout=0.2)
    async with running_service(settings) as service:
        calls = len(upstream.simulator.calls)
        answer = await service.http.post(URL, json={"context_id": context_id, "simulate": {"faults": "hang"}})
        assert answer.status_code == 502
        assert answer.json()["status"] == "submission_unknown"
        assert (await execution(db, answer.json()["execution_id"])).unconfirmed
        assert len(upstream.simulator.calls) == calls + 1


async def test_a_hook_that_cannot_be_reached_was_not_called(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.001)
    async with running_service(settings_for(database_url, servers.redis_url, None)) as service:
        answer = await service.http.post(URL, json={"context_id": context_id})
        assert answer.status_code == 502
        assert answer.json()["status"] == "failed"
        found = await execution(db, answer.json()["execution_id"])
        assert (found.status, found.error) == ("failed", "HappyRobot cannot be reached (ConnectError)")


@pytest.mark.parametrize(
    "answer",
    [
        {"queued_run_ids": "run_1"},
        {"queued_run_ids": [1]},
        {"queued_run_ids": [None]},
        {"queued_run_ids": [""]},
        {"queued_run_ids": ["x" * 256]},
        {"queued_run_ids": ["a\x00b"]},
        {"run_id": {}},
        [],
        "run_1",
    ],
)
async def test_nonsense_in_place_of_run_ids_is_not_recorded(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str, answer: Any
):
    router = respx.MockRouter()
    router.post("/hooks/test").respond(json=answer)
    async with answering(router, database_url, servers) as service:
        response = await service.http.post(URL, json={"context_id": context_id})
    assert response.status_code == 502
    assert response.json()["status"] == "submission_unknown"
    async with db.connect() as conn:
        count = select(func.count()).select_from(agent_runs).where(agent_runs.c.context_id == context_id)
        assert await conn.scalar(count) == 0


async def test_an_endless_answer_is_not_read_to_its_end(database_url: str, servers: Servers, context_id: str):
    async def endless():
        while True:
            yield b"x" * 1_000_000

    router = respx.MockRouter()
    router.post("/hooks/test").mock(return_value=httpx.Response(200, content=endless()))
    async with answering(router, database_url, servers) as service:
        response = await service.http.post(URL, json={"context_id": context_id})
    assert (response.status_code, response.json()["status"]) == (502, "submission_unknown")


async def test_a_call_that_was_placed_is_never_answered_try_again(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    """PostgreSQL goes away between HappyRobot's answer and our writing it down, which is made up for."""
    monkeypatch.setattr(triggers, "_PATIENCE", 0.05)
    monkeypatch.setattr(intakes, "_PAUSES", (0.0, 0.3))
    genuine = Intake.take
    failures = 2

    async def take(self: Intake, news: Any) -> Any:
        nonlocal failures
        if failures and isinstance(news, NewRuns):
            failures -= 1
            raise PostgresAway("gone")
        return await genuine(self, news)

    monkeypatch.setattr(Intake, "take", take)
    router = respx.MockRouter()
    hook = router.post("/hooks/test").respond(json={"queued_run_ids": [f"run_{context_id}"]})
    async with answering(router, database_url, servers) as service:
        lost = await service.http.post(URL, json={"context_id": context_id})
        assert lost.status_code == 502
        assert lost.json() == {
            "error": "Failed to trigger workflow",
            "execution_id": lost.json()["execution_id"],
            "status": "submission_unknown",
            "detail": "HappyRobot started it, but its runs could not be recorded",
            "run_ids": [f"run_{context_id}"],
        }
        known = f"/api/happyrobot/runs?context_id={context_id}"

        async def is_known() -> bool:
            return [run["executionId"] for run in (await service.http.get(known)).json()] == [
                lost.json()["execution_id"]
            ]

        await until(is_known)
        monkeypatch.setattr(triggers, "_PATIENCE", 60)
        failures = 1
        saved = await service.http.post(URL, json={"context_id": context_id})
        assert saved.status_code == 200
    assert hook.call_count == 2


async def test_a_failure_is_told_even_if_it_cannot_be_written_down(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    async def fail(*_: object) -> None:
        raise PostgresAway("gone")

    router = respx.MockRouter()
    router.post("/hooks/test").respond(400)
    async with answering(router, database_url, servers) as service:
        with monkeypatch.context() as away:
            away.setattr(Intake, "take", fail)
            away.setattr(triggers, "_PATIENCE", 0.5)
            answer = await service.http.post(URL, json={"context_id": context_id})
            assert (answer.status_code, answer.json()["status"]) == (502, "failed")
            assert (await execution(db, answer.json()["execution_id"])).status == "pending"

        async def is_written_down() -> bool:
            return bool((await execution(db, answer.json()["execution_id"])).status == "failed")

        await until(is_written_down)


async def test_an_empty_workflow_is_the_default_one(service: Service, context_id: str):
    assert (await service.http.post(URL, json={"context_id": context_id, "workflow_id": ""})).status_code == 200


async def test_a_run_that_is_known_already_stays_as_it_is(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str, context_id: str
):
    router = respx.MockRouter()
    router.post("/hooks/test").respond(json={"queued_run_ids": [run_id]})
    async with answering(router, database_url, servers) as service:
        response = await service.http.post(URL, json={"context_id": "another"})
        assert response.json()["run_ids"] == [run_id]
        run = await service.run(run_id)
        assert (run["contextId"], run["executionId"]) == (context_id, response.json()["execution_id"])
        assert (await execution(db, run["executionId"])).status == "running"
        await service.callback(run_id, "completed")
        assert (await execution(db, run["executionId"])).status == "completed"
    async with db.connect() as conn:
        count = select(func.count()).select_from(run_events).where(run_events.c.run_id == run_id)
        assert await conn.scalar(count) == 1  # the callback, and no `triggered`
