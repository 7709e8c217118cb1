"""HappyRobot's own record of a run, its recordings, and stopping it."""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import pytest
import respx
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.happyrobot.client import Effort
from switchboard.happyrobot.records import Message, RunRecord, Session
from switchboard.runs.archive import keep, kept
from switchboard.tables import run_records
from tests.conftest import API_KEY, Servers, Service, Upstream, insert_run, rows_of, running_service, settings_for


def answering(
    router: respx.MockRouter, database_url: str, servers: Servers, **more: Any
) -> AbstractAsyncContextManager[Service]:
    """A service for which the router is HappyRobot."""
    settings = settings_for(database_url, servers.redis_url, None, **more)
    return running_service(settings, httpx.MockTransport(router.async_handler))


async def call(service: Service, upstream: Upstream, context_id: str, **simulate: Any) -> str:
    """A call from its trigger to its end."""
    body = {"context_id": context_id, "simulate": simulate}
    answer = await service.http.post("/api/happyrobot/trigger", json=body)
    await upstream.simulator.settled()
    run_id: str = answer.json()["run_ids"][0]
    return run_id


async def details_of(service: Service, run_id: str) -> Any:
    answer = await service.http.get(f"/api/happyrobot/runs/{run_id}/details")
    assert answer.status_code == 200
    return answer.json()


async def test_a_call_can_be_read_and_outlives_happyrobots_own_record(
    service: Service, upstream: Upstream, context_id: str
):
    run_id = await call(service, upstream, context_id)
    first = await details_of(service, run_id)
    simulated = upstream.simulator.runs[run_id]
    assert (first["run_id"], first["status"], first["source"]) == (run_id, "completed", "happyrobot")
    [session] = first["sessions"]
    assert [(said["role"], said["content"]) for said in session["messages"]] == [
        (said.role, said.content) for said in simulated.messages
    ]
    assert [output["data"] for output in first["outputs"]] == [simulated.payload, simulated.ending]
    assert first["version"]["number"] == 1
    [recording] = first["recordings"]
    async with httpx.AsyncClient() as http:
        assert (await http.get(recording["url"])).headers["content-type"] == "audio/wav"
    del upstream.simulator.runs[run_id]
    later = await details_of(service, run_id)
    assert later == first | {"source": "database", "recordings": None}


async def test_the_record_of_a_run_under_way_is_happyrobots_and_is_not_kept(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    router = respx.MockRouter()
    body = {"run": {"id": run_id, "status": "running"}, "sessions": [{"id": "s", "messages": [{"content": "Hel"}]}]}
    record = router.get(f"/api/v1/runs/{run_id}").respond(json=body)
    router.get(f"/api/v1/runs/{run_id}/recordings").respond(503)
    async with answering(router, database_url, servers) as service:
        for _ in range(2):
            found = await details_of(service, run_id)
            assert (found["source"], found["recordings"]) == ("happyrobot", None)
            assert found["sessions"][0]["messages"][0]["content"] == "Hel"
    assert record.call_count == 2
    assert await rows_of(db, run_records, run_id) == 0


async def test_links_to_recordings_are_new_each_time_and_never_stored(
    service: Service, upstream: Upstream, db: AsyncEngine, context_id: str
):
    run_id = await call(service, upstream, context_id)
    links = set()
    for _ in range(2):
        links.add((await details_of(service, run_id))["recordings"][0]["url"])
        answer = await service.http.get(f"/api/happyrobot/runs/{run_id}/recordings")
        [recording] = answer.json()["recordings"]
        assert recording["session_id"] == upstream.simulator.runs[run_id].session_id
        links.add(recording["url"])
    assert len(links) == 4
    async with db.connect() as conn:
        record = await conn.scalar(
            select(text("record::text")).select_from(run_records).where(run_records.c.run_id == run_id)
        )
    assert "/recordings/" not in record


async def test_a_record_that_happyrobot_has_emptied_takes_no_place(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    router = respx.MockRouter()
    messages = [{"role": "user", "content": None, "data_deleted": True}]
    body = {"run": {"id": run_id, "status": "completed"}, "sessions": [{"id": "s", "messages": messages}]}
    router.get(f"/api/v1/runs/{run_id}").respond(json=body)
    router.get(f"/api/v1/runs/{run_id}/recordings").respond(json={"recordings": []})
    async with answering(router, database_url, servers) as service:
        found = await details_of(service, run_id)
    assert (found["source"], found["recordings"]) == ("happyrobot", [])
    assert await rows_of(db, run_records, run_id) == 0


async def test_what_is_said_of_a_call_afterwards_is_shown_and_what_was_said_in_it_stays(
    database_url: str, servers: Servers, run_id: str
):
    message = {"role": "user", "content": "I'll take it."}
    ended = {
        "run": {"id": run_id, "status": "completed", "annotation": None},
        "sessions": [{"id": "s", "messages": [message]}],
        "outputs": [{"id": "o", "data": {"rate": 1900}}],
        "version": {"id": "v"},
    }
    judged = {
        "run": {"id": run_id, "status": "completed", "annotation": "critical"},
        "sessions": [{"id": "s", "messages": [message | {"content": None, "data_deleted": True}]}],
        "outputs": [],
        "issues": [{"id": "i", "type": "interruption"}],
    }
    router = respx.MockRouter()
    away = httpx.Response(503)
    answers = [httpx.Response(200, json=ended), httpx.Response(200, json=judged), away]
    router.get(f"/api/v1/runs/{run_id}").mock(side_effect=answers)
    router.get(f"/api/v1/runs/{run_id}/recordings").respond(404)
    async with answering(router, database_url, servers) as service:
        first, second, third = [await details_of(service, run_id) for _ in range(3)]
    assert [found["source"] for found in (first, second, third)] == ["happyrobot", "happyrobot", "database"]
    assert (first["annotation"], first["issues"]) == (None, [])
    assert (second["annotation"], second["issues"][0]["id"]) == ("critical", "i")
    for part in ("sessions", "outputs", "version"):
        assert second[part] == first[part], "it outlives HappyRobot's own"
    assert third == second | {"source": "database"}


async def test_two_who_keep_a_record_at_once_keep_all_of_it(db: AsyncEngine, context_id: str):
    def record(*said: str) -> RunRecord:
        return RunRecord(sessions=[Session(id="s", messages=[Message(content=each) for each in said])])

    for _ in range(20):
        run_id = await insert_run(db, context_id)
        await asyncio.gather(keep(db, run_id, record("1", "2", "3")), keep(db, run_id, record("1")))
        async with db.connect() as conn:
            assert await kept(conn, run_id) == record("1", "2", "3")


async def test_a_reader_who_learns_that_a_run_is_over_is_not_the_only_one(
    database_url: str, servers: Servers, run_id: str
):
    router = respx.MockRouter()
    router.get(f"/api/v1/runs/{run_id}").respond(json={"run": {"id": run_id, "status": "completed"}})
    router.get(f"/api/v1/runs/{run_id}/recordings").respond(404)
    async with answering(router, database_url, servers) as service:
        assert (await details_of(service, run_id))["status"] == "completed"
        assert (await service.run(run_id))["status"] == "COMPLETED"
        assert await kinds(service, run_id) == [("status", "COMPLETED")]


async def test_nobody_waits_for_a_record_without_an_end(
    database_url: str, servers: Servers, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    """Each of v2's pages is quick enough; all of them together are not."""
    monkeypatch.setattr("switchboard.runs.details.READ", Effort(patience=1, timeout=0.5))

    async def page(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.1)
        return httpx.Response(200, json={"data": [{"id": "s"}], "pagination": {"has_next_page": True}})

    router = respx.MockRouter()
    router.get(path__regex=r"/api/v1/.*").respond(404)
    router.get(f"/api/v2/runs/{run_id}").respond(json={"id": run_id, "status": "running"})
    router.get(path__regex=r"/api/v2/.*").mock(side_effect=page)
    more = {"happyrobot_api_url": "http://127.0.0.1:1/api/v2"}
    async with answering(router, database_url, servers, **more) as service:
        answer = await service.http.get(f"/api/happyrobot/runs/{run_id}/details")
    assert (answer.status_code, answer.json()) == (503, {"error": "HappyRobot takes too long to answer"})


async def test_happyrobot_is_told_the_organisation_and_never_the_key_of_a_hook(
    database_url: str, servers: Servers, run_id: str
):
    router = respx.MockRouter()
    router.get(path__regex=r"/api/v1/runs/.+").respond(404)
    async with answering(router, database_url, servers, happyrobot_org_id="org_1") as service:
        await service.http.get(f"/api/happyrobot/runs/{run_id}/details")
    for call in router.calls:
        assert call.request.headers["x-organization-id"] == "org_1"
        assert call.request.headers["authorization"] == f"Bearer {API_KEY}"
        assert "x-api-key" not in call.request.headers


async def test_a_key_that_happyrobot_refuses_is_named_once(
    database_url: str, servers: Servers, run_id: str, caplog: pytest.LogCaptureFixture
):
    router = respx.MockRouter()
    router.get(path__regex=r"/api/v1/runs/.+").respond(401, json={"message": "invalid or revoked API key"})
    async with answering(router, database_url, servers) as service:
        for _ in range(2):
            assert (await service.http.get(f"/api/happyrobot/runs/{run_id}/details")).status_code == 503
    complaint: Any
    [complaint] = [record.msg for record in caplog.records if "HAPPYROBOT_API_KEY" in record.getMessage()]
    assert complaint["event"] == "HappyRobot refuses HAPPYROBOT_API_KEY; is it of this region and organisation?"
    assert complaint["status"] == 401
    assert API_KEY not in caplog.text


@pytest.mark.parametrize("what", ["details", "recordings"])
@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [
        (httpx.Response(404), 404, "HappyRobot has no record of this run"),
        (httpx.Response(500), 503, "HappyRobot answered 500"),
        (httpx.Response(200, text="<html>"), 503, "HappyRobot answered 200 with something unreadable"),
        (httpx.ReadTimeout("slow"), 503, "HappyRobot did not answer (ReadTimeout)"),
    ],
    ids=str,
)
async def test_what_happyrobot_does_not_tell_is_said(
    database_url: str, servers: Servers, run_id: str, what: str, answer: Any, status: int, error: str
):
    router = respx.MockRouter()
    router.get(path__regex=r"/api/v1/runs/.+").mock(side_effect=[answer, answer])
    async with answering(router, database_url, servers) as service:
        told = await service.http.get(f"/api/happyrobot/runs/{run_id}/{what}")
    assert (told.status_code, told.json()) == (status, {"error": error})
    assert told.headers.get("retry-after") == ("1" if status == 503 else None)


@pytest.mark.parametrize(("method", "what"), [("GET", "details"), ("GET", "recordings"), ("POST", "cancel")])
async def test_without_a_key_or_a_run_there_is_nothing_to_ask(
    database_url: str, servers: Servers, run_id: str, method: str, what: str
):
    async with answering(respx.MockRouter(), database_url, servers, happyrobot_api_key=None) as service:
        answer = await service.http.request(method, f"/api/happyrobot/runs/{run_id}/{what}")
        assert (answer.status_code, answer.json()) == (409, {"error": "HAPPYROBOT_API_KEY is not set"})
        answer = await service.http.request(method, f"/api/happyrobot/runs/no-such-run/{what}")
        assert (answer.status_code, answer.json()) == (404, {"error": "Run not found"})


# Stopping


async def cancel(service: Service, run_id: str) -> tuple[int, Any]:
    answer = await service.http.post(f"/api/happyrobot/runs/{run_id}/cancel")
    return answer.status_code, answer.json()


async def kinds(service: Service, run_id: str) -> list[tuple[str, str]]:
    timeline = (await service.http.get(f"/api/happyrobot/runs/{run_id}/events")).json()
    return [(event["event_type"], event["status"]) for event in timeline]


async def test_a_run_is_canceled_when_happyrobot_confirms_it(database_url: str, servers: Servers, run_id: str):
    router = respx.MockRouter()
    route = router.post(f"/api/v2/runs/{run_id}/cancel").respond(json={"status": "canceled"})
    async with answering(router, database_url, servers) as service:
        assert await cancel(service, run_id) == (200, {"success": True, "run_id": run_id, "status": "canceled"})
        assert await kinds(service, run_id) == [("cancel_requested", "RUNNING"), ("canceled", "CANCELED")]
        assert await cancel(service, run_id) == (409, {"error": "Run is already canceled", "status": "canceled"})
    [sent] = route.calls
    assert sent.request.content == b"{}"
    assert sent.request.headers["content-type"] == "application/json"


async def test_a_simulated_call_is_stopped_half_way(service: Service, upstream: Upstream, context_id: str):
    body = {"context_id": context_id, "simulate": {"faults": "delay=0.2"}}
    run_id = (await service.http.post("/api/happyrobot/trigger", json=body)).json()["run_ids"][0]
    assert (await cancel(service, run_id))[0] == 200
    await upstream.simulator.settled()
    assert upstream.simulator.runs[run_id].status == "canceled"
    assert (await service.run(run_id))["status"] == "CANCELED"


@pytest.mark.parametrize("trouble", [httpx.Response(404), httpx.Response(503), httpx.ReadTimeout("slow")], ids=str)
async def test_a_wish_that_happyrobot_did_not_hear_is_kept_and_told_again(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str, trouble: Any
):
    router = respx.MockRouter()
    router.post(f"/api/v2/runs/{run_id}/cancel").mock(
        side_effect=[trouble, trouble, trouble, httpx.Response(200, json={"status": "canceled"})]
    )
    async with answering(router, database_url, servers) as service:
        for _ in range(2):
            assert await cancel(service, run_id) == (202, {"success": True, "run_id": run_id, "status": "running"})
        assert await kinds(service, run_id) == [("cancel_requested", "RUNNING")], "wished for once"
        assert await jobs_to_cancel(db, run_id) == 1
        canceler = service.state["canceler"]
        assert await canceler.again(run_id, 0) == 15
        assert await canceler.again(run_id, 1) is None
        assert (await service.run(run_id))["status"] == "CANCELED"
        assert await canceler.again(run_id, 2) is None
    assert router.calls.call_count == 4


async def jobs_to_cancel(db: AsyncEngine, run_id: str) -> int:
    async with db.connect() as conn:
        job = text("SELECT count(*) FROM switchboard_pgqueuer WHERE dedupe_key = :key")
        return await conn.scalar(job, {"key": f"cancel:{run_id}"}) or 0


async def test_a_wish_that_is_repeated_is_told_again_too(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    router = respx.MockRouter()
    router.get(f"/api/v1/runs/{run_id}").respond(json={"run": {"id": run_id, "status": "running"}})
    router.post(f"/api/v2/runs/{run_id}/cancel").mock(side_effect=[httpx.Response(400), httpx.Response(503)])
    async with answering(router, database_url, servers) as service:
        assert (await cancel(service, run_id))[0] == 502
        assert await jobs_to_cancel(db, run_id) == 0, "who is told that it cannot be done does not find it done later"
        assert (await cancel(service, run_id))[0] == 202
        assert await jobs_to_cancel(db, run_id) == 1, "as the answer says"
        assert await kinds(service, run_id) == [("cancel_requested", "RUNNING")], "wished for once"


async def test_a_wish_is_not_told_for_ever(database_url: str, servers: Servers, run_id: str):
    router = respx.MockRouter()
    router.post(f"/api/v2/runs/{run_id}/cancel").respond(503)
    async with answering(router, database_url, servers) as service:
        canceler = service.state["canceler"]
        pauses: list[float] = []
        while (pause := await canceler.again(run_id, len(pauses))) is not None:
            pauses.append(pause)
        assert await canceler.again("no such run", 0) is None
    assert pauses == [15, 30, 60, 120, 240, *[300] * 7]


async def test_a_run_that_ended_in_the_meantime_is_not_canceled(database_url: str, servers: Servers, run_id: str):
    router = respx.MockRouter()
    router.post(f"/api/v2/runs/{run_id}/cancel").respond(409, json={"error": "Conflict"})
    router.get(f"/api/v1/runs/{run_id}").respond(json={"run": {"id": run_id, "status": "completed"}})
    async with answering(router, database_url, servers) as service:
        assert await cancel(service, run_id) == (409, {"error": "Run is already completed", "status": "completed"})
        assert (await service.run(run_id))["status"] == "COMPLETED"


async def test_a_refusal_is_told(database_url: str, servers: Servers, run_id: str):
    router = respx.MockRouter()
    router.post(f"/api/v2/runs/{run_id}/cancel").respond(400)
    router.get(f"/api/v1/runs/{run_id}").respond(json={"run": {"id": run_id, "status": "running"}})
    async with answering(router, database_url, servers) as service:
        assert await cancel(service, run_id) == (
            502,
            {"error": "HappyRobot refused to cancel the run", "detail": "HappyRobot answered 400"},
        )
        assert await service.state["canceler"].again(run_id, 0) is None
        assert (await service.run(run_id))["status"] == "RUNNING"


@pytest.mark.parametrize("said", [{}, {"status": "canceling"}, []])
async def test_an_answer_that_confirms_nothing_is_a_reason_to_ask(
    database_url: str, servers: Servers, run_id: str, said: Any
):
    router = respx.MockRouter()
    router.post(f"/api/v2/runs/{run_id}/cancel").respond(json=said)
    router.get(f"/api/v1/runs/{run_id}").respond(json={"run": {"id": run_id, "status": "canceled"}})
    async with answering(router, database_url, servers) as service:
        assert (await cancel(service, run_id))[0] == 200
        assert await kinds(service, run_id) == [("cancel_requested", "RUNNING"), ("status", "CANCELED")]


async def test_a_run_that_only_we_hold_for_dead_can_be_canceled(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    async with db.begin() as conn:
        statement = text("UPDATE agent_runs SET status = 'FAILED', timed_out = true WHERE run_id = :run_id")
        await conn.execute(statement, {"run_id": run_id})
    router = respx.MockRouter()
    router.post(f"/api/v2/runs/{run_id}/cancel").mock(
        side_effect=[httpx.Response(503), httpx.Response(200, json={"status": "canceled"})]
    )
    async with answering(router, database_url, servers) as service:
        assert (await cancel(service, run_id))[0] == 202
        assert await service.state["canceler"].again(run_id, 0) is None
        assert (await service.run(run_id))["status"] == "CANCELED"


async def test_two_who_cancel_at_once_are_both_told_the_truth(
    service: Service, upstream: Upstream, db: AsyncEngine, context_id: str
):
    body = {"context_id": context_id, "simulate": {"faults": "delay=0.1"}}
    run_id = (await service.http.post("/api/happyrobot/trigger", json=body)).json()["run_ids"][0]
    answers = await asyncio.gather(*(cancel(service, run_id) for _ in range(5)))
    assert {status for status, _ in answers} <= {200, 409}
    await upstream.simulator.settled()
    timeline = [kind for kind, _ in await kinds(service, run_id)]
    assert timeline.count("cancel_requested") == 1
    assert (await service.run(run_id))["status"] == "CANCELED"
