"""One call per intent: whatever is sent twice, lost or killed, nobody is called twice for one click."""

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import respx
from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine
from structlog.testing import capture_logs

from switchboard import local, workflows
from switchboard.access.callers import ANYBODY
from switchboard.errors import PostgresAway, TriggerFailed
from switchboard.events import NewEvent
from switchboard.happyrobot import client
from switchboard.happyrobot.client import Hook, NotSent, PutOff, Refused, Unknown, _certainly_not_started, _seconds
from switchboard.happyrobot.simulator import Simulator
from switchboard.runs.ingest import write
from switchboard.runs.intake import Intake
from switchboard.runs.queued import Launcher, accept
from switchboard.runs.sorting import NewRuns, News, Outcome, Unconfirmed
from switchboard.runs.sweep import sweep
from switchboard.runs.trigger import STOPPED, TriggerIn, place, start
from switchboard.tables import ExecutionStatus, RunStatus, api_key_usage, executions, run_events
from switchboard.workflows import Workflow
from tests.conftest import (
    API_KEY,
    APP_SECRET,
    HOOK_KEY,
    Servers,
    Service,
    Upstream,
    insert_run,
    new_key,
    rows_of,
    running_service,
    serving,
    settings_for,
    unheard,
    until,
)

URL = "/api/happyrobot/trigger"


@pytest.fixture
def key() -> str:
    return f"intent {uuid4()}"


def answering(router: respx.MockRouter, database_url: str, servers: Servers) -> AbstractAsyncContextManager[Service]:
    """A service for which the router is HappyRobot."""
    settings = settings_for(database_url, servers.redis_url, None)
    return running_service(settings, httpx.MockTransport(router.async_handler))


async def trigger(service: Service, key: str | None, **body: Any) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return await service.http.post(URL, json=body, headers=headers)


async def execution(db: AsyncEngine, execution_id: str) -> Any:
    async with db.connect() as conn:
        return (await conn.execute(select(executions).where(executions.c.id == execution_id))).one()


def calls_of(upstream: Upstream, context_id: str) -> int:
    return sum((call.payload or {}).get("context_id") == context_id for call in upstream.simulator.calls)


async def test_a_hundred_identical_requests_at_once_are_one_call(
    service: Service, upstream: Upstream, context_id: str, key: str
):
    answers = await asyncio.gather(*(trigger(service, key, context_id=context_id) for _ in range(100)))
    assert calls_of(upstream, context_id) == 1
    kinds = Counter(answer.status_code for answer in answers)
    assert set(kinds) <= {200, 409}
    assert kinds[200] >= 1
    [told] = {answer.text for answer in answers if answer.status_code == 200}
    for answer in answers:
        assert answer.json()["execution_id"] in told
    assert (await trigger(service, key, context_id=context_id)).text == told
    assert calls_of(upstream, context_id) == 1


async def test_the_same_key_is_the_same_call_after_a_restart_and_in_another_process(
    service: Service, database_url: str, servers: Servers, upstream: Upstream, context_id: str, key: str
):
    first = await trigger(service, key, context_id=context_id, n=1)
    async with running_service(settings_for(database_url, servers.redis_url, upstream.url)) as another:
        again = await trigger(another, key, n=1, context_id=context_id)
    assert (again.status_code, again.json()) == (200, first.json())
    assert calls_of(upstream, context_id) == 1


async def test_without_a_key_every_request_is_an_intent_of_its_own(
    service: Service, upstream: Upstream, context_id: str
):
    first, second = [await trigger(service, None, context_id=context_id) for _ in range(2)]
    assert first.json()["execution_id"] != second.json()["execution_id"]
    assert calls_of(upstream, context_id) == 2


async def test_a_key_that_was_used_for_something_else_is_refused(
    service: Service, upstream: Upstream, context_id: str, key: str
):
    await trigger(service, key, context_id=context_id, load=1)
    answer = await trigger(service, key, context_id=context_id, load=2)
    assert answer.status_code == 422
    assert answer.json() == {"error": "This Idempotency-Key was used with another body"}
    assert calls_of(upstream, context_id) == 1


async def test_while_the_call_is_being_placed_the_same_key_is_told_so(
    database_url: str, servers: Servers, context_id: str, key: str
):
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def slowly(_: httpx.Request) -> httpx.Response:
        asked.set()
        await may_answer.wait()
        return httpx.Response(200, json={"queued_run_ids": [f"run_{context_id}"]})

    router = respx.MockRouter()
    hook = router.post("/hooks/test").mock(side_effect=slowly)
    async with answering(router, database_url, servers) as service:
        first = asyncio.create_task(trigger(service, key, context_id=context_id))
        await asked.wait()
        meanwhile = await trigger(service, key, context_id=context_id)
        other = await trigger(service, key, context_id=context_id, other=True)
        may_answer.set()
        placed = await first
    assert placed.status_code == 200
    assert meanwhile.status_code == 409
    assert meanwhile.json() == {
        "error": "A request with this Idempotency-Key is in progress",
        "execution_id": placed.json()["execution_id"],
        "status": "pending",
    }
    assert other.status_code == 422
    assert hook.call_count == 1


@pytest.mark.parametrize(("fault", "status"), [("answer=400", "failed"), ("disconnect", "submission_unknown")])
async def test_a_call_that_was_not_confirmed_is_not_placed_again_by_its_key(
    service: Service, upstream: Upstream, context_id: str, key: str, fault: str, status: str
):
    body = {"context_id": context_id, "simulate": {"faults": f"{fault},drop_final"}}
    first = await trigger(service, key, **body)
    assert (first.status_code, first.json()["status"]) == (502, status)
    if status == "failed":
        again = await trigger(service, key, **body)
        assert (again.status_code, again.json()) == (502, first.json())
    assert calls_of(upstream, context_id) == 1


@pytest.mark.parametrize("bad", ["", "x" * 256, "tab\there", "ümlaut".encode().decode("latin-1")])
async def test_a_key_that_is_none_is_refused_and_nothing_is_dialled(
    service: Service, upstream: Upstream, context_id: str, bad: str
):
    headers = {b"Idempotency-Key": bad.encode("latin-1")}
    answer = await service.http.post(URL, json={"context_id": context_id}, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("idempotency-key")
    assert calls_of(upstream, context_id) == 0


async def test_what_is_refused_uses_up_no_key(service: Service, context_id: str, key: str):
    assert (await trigger(service, key, context_id="")).status_code == 400
    assert (await trigger(service, key, context_id=context_id, workflow_id="none such")).status_code == 404
    assert (await trigger(service, key, context_id=context_id)).status_code == 200


# Sending again, and not


def queued(context_id: str) -> httpx.Response:
    return httpx.Response(200, json={"queued_run_ids": [f"run_{context_id}"]})


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.001)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    "trouble",
    [
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("no answer to SYN"),
        httpx.PoolTimeout("no connection"),
        httpx.Response(429),
        httpx.Response(429, headers={"Retry-After": "0"}),
        httpx.Response(429, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        httpx.Response(502),
        httpx.Response(503),
        httpx.Response(504),
    ],
    ids=str,
)
async def test_what_certainly_started_nothing_is_sent_again(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str, trouble: Any
):
    router = respx.MockRouter()
    hook = router.post("/hooks/test").mock(side_effect=[trouble, trouble, queued(context_id)])
    async with answering(router, database_url, servers) as service:
        answer = await trigger(service, None, context_id=context_id)
    assert answer.status_code == 200
    assert hook.call_count == 3
    bodies = {call.request.content for call in hook.calls}
    assert len(bodies) == 1, "it is the same execution each time"
    assert (await execution(db, answer.json()["execution_id"])).status == "running"


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("trouble", "status"),
    [
        (httpx.ReadTimeout("dialling?"), "submission_unknown"),
        (httpx.ReadError("reset"), "submission_unknown"),
        (httpx.WriteError("reset"), "submission_unknown"),
        (httpx.WriteTimeout("stuck"), "submission_unknown"),
        (httpx.RemoteProtocolError("closed without an answer"), "submission_unknown"),
        (httpx.Response(200, text="<html>"), "submission_unknown"),
        (httpx.Response(500), "submission_unknown"),
        (httpx.Response(501), "submission_unknown"),
        (httpx.Response(302, headers={"Location": "/elsewhere"}), "failed"),
        (httpx.Response(400), "failed"),
        (httpx.Response(401), "failed"),
        (httpx.Response(404), "failed"),
        (httpx.Response(409), "failed"),
        (httpx.Response(422), "failed"),
        (httpx.Response(429, headers={"Retry-After": "3600"}), "failed"),
    ],
    ids=str,
)
async def test_anything_else_is_sent_once(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str, trouble: Any, status: str
):
    router = respx.MockRouter()
    hook = router.post("/hooks/test").mock(side_effect=[trouble, queued(context_id)])
    async with answering(router, database_url, servers) as service:
        answer = await trigger(service, None, context_id=context_id)
    assert hook.call_count == 1
    assert (answer.status_code, answer.json()["status"]) == (502, status)
    found = await execution(db, answer.json()["execution_id"])
    assert (found.status, found.unconfirmed) == (status, True)


async def test_an_address_to_which_nothing_can_be_sent_has_called_nobody(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.001)
    settings = settings_for(database_url, servers.redis_url, None)
    # As somebody may have put it into the table by hand.
    workflow = Workflow(f"workflow_{context_id}", Hook("http://127.0.0.1:1/hooks/x\n"))
    async with db.begin() as conn:
        await workflows.add(conn, settings, workflow)
    async with running_service(settings) as service:
        answer = await trigger(service, None, context_id=context_id, workflow_id=workflow.id)
    assert (answer.status_code, answer.json()["status"]) == (502, "failed")
    assert answer.json()["detail"] == "HappyRobot cannot be reached (InvalidURL)"


async def test_a_hook_gets_a_new_connection_for_each_trigger(database_url: str, servers: Servers, context_id: str):
    """One that was kept may break at the moment of sending, and then nobody knows whether somebody was called."""
    ports: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                ports.append(writer.get_extra_info("peername")[1])
                body = b'{"queued_run_ids": ["run_%d_%s"]}' % (len(ports), context_id.encode())
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as hook:
        url = f"http://127.0.0.1:{hook.sockets[0].getsockname()[1]}"
        async with running_service(settings_for(database_url, servers.redis_url, url)) as service:
            for _ in range(3):
                assert (await trigger(service, None, context_id=context_id)).status_code == 200
    assert len(set(ports)) == 3


@pytest.mark.usefixtures("_quick")
async def test_a_hook_that_stays_busy_is_left_alone_after_four_attempts(
    database_url: str, servers: Servers, context_id: str
):
    router = respx.MockRouter()
    hook = router.post("/hooks/test").respond(503)
    async with answering(router, database_url, servers) as service:
        answer = await trigger(service, None, context_id=context_id)
    assert hook.call_count == 4
    assert answer.json() | {"execution_id": ""} == {
        "error": "Failed to trigger workflow",
        "execution_id": "",
        "status": "failed",
        "detail": "HappyRobot answered 503",
    }


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (NotSent("x"), True),
        (Unknown("x"), False),
        (Refused(429), True),
        (Refused(429, 7), 7),
        (Refused(503, 20), 20),
        (Refused(503, 21), False),
        (Refused(400, 1), False),
        (ValueError("ours"), False),
    ],
    ids=str,
)
def test_a_hook_gets_the_pause_that_it_asks_for(error: Exception, verdict: bool | float):
    assert _certainly_not_started(error) == verdict


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7), (None, None), ("", None), ("-1", None), ("soon", None), ("²", None)]
)
def test_only_seconds_are_understood_as_a_pause(header: str | None, seconds: float | None):
    assert _seconds(header) == seconds


# Adoption


async def test_a_run_whose_trigger_was_never_answered_is_adopted_by_its_first_callback(
    database_url: str, servers: Servers, upstream: Upstream, db: AsyncEngine, context_id: str
):
    settings = settings_for(database_url, servers.redis_url, upstream.url, happyrobot_trigger_timeout=0.3)
    async with running_service(settings) as service:
        body = {"context_id": context_id, "name": "N", "simulate": {"faults": "hang"}}
        answer = await trigger(service, None, **body)
        await upstream.simulator.settled()
        runs = (await service.http.get("/api/happyrobot/runs", params={"context_id": context_id})).json()
    assert answer.status_code == 502
    assert answer.json()["status"] == "submission_unknown"
    assert calls_of(upstream, context_id) == 1
    [run] = runs
    assert (run["executionId"], run["status"], run["name"]) == (answer.json()["execution_id"], "COMPLETED", "N")
    # The simulator talked before the trigger had timed out: what it said then is there, too.
    told = upstream.simulator.runs[run["runId"]].events
    assert run["metadata"]["logs"] == [event["data"] for event in told if event["event_type"] == "log"]
    found = await execution(db, answer.json()["execution_id"])
    assert (found.status, found.error) == ("completed", None)


async def test_a_callback_that_comes_later_brings_the_run_to_its_execution(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str, key: str
):
    router = respx.MockRouter()
    router.post("/hooks/test").mock(side_effect=httpx.ReadTimeout("?"))
    async with answering(router, database_url, servers) as service:
        lost = await trigger(service, key, context_id=context_id, name="N", description="D")
        execution_id = lost.json()["execution_id"]
        assert (await trigger(service, key, context_id=context_id, name="N", description="D")).json() == lost.json()
        one, other = f"run_1_{context_id}", f"run_2_{context_id}"
        callback = await service.callback(one, "log", {"message": "hello"}, execution_id=execution_id)
        assert (callback.status_code, callback.json()) == (200, {"success": True})
        run = await service.run(one)
        assert (run["contextId"], run["name"], run["description"]) == (context_id, "N", "D")
        assert (run["executionId"], run["status"]) == (execution_id, "RUNNING")
        timeline = (await service.http.get(f"/api/happyrobot/runs/{one}/events")).json()
        assert [event["event_type"] for event in timeline] == ["triggered", "log"]
        assert timeline[0]["data"]["adopted"] is True
        # A trigger can start several runs; all of them find home.
        assert (await service.callback(other, "failed", "busy", execution_id=execution_id)).status_code == 200
        again = await trigger(service, key, context_id=context_id, name="N", description="D")
        assert (again.status_code, again.json()["run_ids"]) == (200, [one, other])
        assert (await execution(db, execution_id)).status == "running"
        await service.callback(one, "completed", {"ok": True}, execution_id=execution_id)
        assert (await execution(db, execution_id)).status == "failed"


async def test_a_refused_trigger_whose_call_was_placed_all_the_same_is_adopted_too(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str
):
    router = respx.MockRouter()
    router.post("/hooks/test").respond(400)
    async with answering(router, database_url, servers) as service:
        execution_id = (await trigger(service, None, context_id=context_id)).json()["execution_id"]
        await service.callback(f"run_{context_id}", "completed", {"ok": True}, execution_id=execution_id)
        found = await execution(db, execution_id)
    assert (found.status, found.error) == ("completed", None)


async def test_an_execution_and_its_callback_that_are_written_in_one_go_find_each_other(
    service: Service, db: AsyncEngine, context_id: str
):
    for number, turned in enumerate((False, True)):
        abandoned = await pending(db, context_id, "1 minute")
        run_id = f"run_{number}_{context_id}"
        lost = Unconfirmed(UUID(abandoned), ExecutionStatus.SUBMISSION_UNKNOWN, "?")
        echo = NewEvent(run_id, "completed", "done", RunStatus.COMPLETED, "done", execution_id=abandoned)
        async with db.begin() as conn:
            written = await write(conn, [lost, echo] if turned else [echo, lost])
        assert {type(outcome).__name__ for outcome in written.outcomes} == {"Noted", "Recorded"}
        assert (await service.run(run_id))["status"] == "COMPLETED"


async def test_an_execution_that_has_its_runs_is_not_unknown_any_more(
    service: Service, db: AsyncEngine, context_id: str
):
    """A sweep that looked just before the answer was stored."""
    execution_id = (await trigger(service, None, context_id=context_id)).json()["execution_id"]
    lost = Unconfirmed(UUID(execution_id), ExecutionStatus.SUBMISSION_UNKNOWN, "?")
    async with db.begin() as conn:
        await write(conn, [lost])
    found = await execution(db, execution_id)
    assert (found.status, found.error, found.unconfirmed) in [("running", None, False), ("completed", None, False)]


@pytest.mark.parametrize("echo", ["6f1e1b0e-5f5b-4a7e-9d6e-0d3a4c9b2f11", "no uuid", ""])
async def test_an_echo_that_is_none_of_ours_adopts_nothing(service: Service, context_id: str, echo: str):
    answer = await service.callback(f"run_{context_id}", "log", execution_id=echo)
    assert answer.status_code == 404


async def test_an_execution_that_has_its_runs_adopts_no_others(service: Service, context_id: str):
    execution_id = (await trigger(service, None, context_id=context_id)).json()["execution_id"]
    answer = await service.callback(f"run_{context_id}", "log", execution_id=execution_id)
    assert answer.status_code == 404


# What a killed process leaves behind


async def pending(db: AsyncEngine, context_id: str, answer_by: str) -> str:
    execution_id = str(uuid4())
    async with db.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO executions (id, workflow_id, context_id, input, answer_by) "
                f"VALUES (:id, 'default', :context_id, '{{}}', now() + interval '{answer_by}')"
            ),
            {"id": execution_id, "context_id": context_id},
        )
    return execution_id


async def test_an_execution_found_half_way_is_unknown_and_never_sent_again(
    service: Service, upstream: Upstream, db: AsyncEngine, context_id: str
):
    abandoned = await pending(db, context_id, "-1 second")
    alive = await pending(db, context_id, "1 minute")
    calls = len(upstream.simulator.calls)
    await sweep(db, service.state["intake"], 15, 1800)
    found = await execution(db, abandoned)
    assert (found.status, found.error) == ("submission_unknown", STOPPED)
    assert (await execution(db, alive)).status == "pending"
    assert len(upstream.simulator.calls) == calls
    run_id = f"run_{context_id}"
    assert (await service.callback(run_id, "completed", execution_id=abandoned)).status_code == 200
    assert (await execution(db, abandoned)).status == "completed"


async def test_what_cannot_be_put_in_order_keeps_nothing_else_from_it(
    service: Service, db: AsyncEngine, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    stuck, *others = [await pending(db, context_id, "-1 second") for _ in range(3)]
    unwatched = await insert_run(db, context_id)
    genuine = service.state["intake"].take

    async def take(news: News, *size: int) -> Outcome:
        if isinstance(news, Unconfirmed) and str(news.execution_id) == stuck:
            raise PostgresAway("somebody has its row")
        outcome: Outcome = await genuine(news, *size)
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(service.state["intake"], "take", take)
        with pytest.raises(PostgresAway, match="somebody has its row"):
            await sweep(db, service.state["intake"], 15, 1800)
    assert (await execution(db, stuck)).status == "pending"
    assert {(await execution(db, each)).status for each in others} == {"submission_unknown"}
    async with db.connect() as conn:
        watched = text("SELECT count(*) FROM switchboard_pgqueuer WHERE dedupe_key = :key")
        assert await conn.scalar(watched, {"key": f"reconcile:{unwatched}"}) == 1
    await sweep(db, service.state["intake"], 15, 1800)
    assert (await execution(db, stuck)).status == "submission_unknown"


async def test_callbacks_that_came_before_the_execution_was_found_are_its_own(
    service: Service, db: AsyncEngine, context_id: str
):
    abandoned = await pending(db, context_id, "1 minute")
    run_id = f"run_{context_id}"
    for number in range(3):
        answer = await service.callback(run_id, "log", number, execution_id=abandoned)
        assert answer.status_code == 404
    assert (await service.callback(run_id, "completed", "done", execution_id=abandoned)).status_code == 404
    async with db.begin() as conn:
        await conn.execute(update(executions).where(executions.c.id == abandoned).values(answer_by=text("now()")))
    await sweep(db, service.state["intake"], 15, 1800)
    run = await service.run(run_id)
    assert (run["status"], run["metadata"]) == ("COMPLETED", {"logs": [0, 1, 2], "result": "done"})
    assert await rows_of(db, run_events, run_id) == 5
    assert (await execution(db, abandoned)).status == "completed"


async def test_an_answer_that_comes_after_all_still_counts(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str
):
    """A process that was stopped for so long that it counted as gone, and goes on."""
    async with running_service(settings_for(database_url, servers.redis_url, None)) as sweeper:

        async def late(request: httpx.Request) -> httpx.Response:
            async with db.begin() as conn:
                this = executions.c.context_id == context_id
                await conn.execute(update(executions).where(this).values(answer_by=text("now()")))
            await sweep(db, sweeper.state["intake"], 15, 1800)
            return queued(context_id)

        router = respx.MockRouter()
        router.post("/hooks/test").mock(side_effect=late)
        async with answering(router, database_url, servers) as service:
            answer = await trigger(service, None, context_id=context_id)
    assert answer.status_code == 200
    found = await execution(db, answer.json()["execution_id"])
    assert (found.status, found.error) == ("running", None)


async def test_a_service_that_stops_during_a_call_says_at_once_that_nobody_knows(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str
):
    asked = asyncio.Event()

    async def never(_: httpx.Request) -> httpx.Response:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    router = respx.MockRouter()
    router.post("/hooks/test").mock(side_effect=never)
    async with answering(router, database_url, servers) as service:
        state, body = service.state, {"context_id": context_id}
        placing = asyncio.create_task(
            start(
                state["db"],
                state["happyrobot"],
                state["intake"],
                state["ledger"],
                state["settings"],
                ANYBODY,
                TriggerIn.model_validate(body),
                body,
            )
        )
        await asked.wait()
        # As uvicorn does with what is under way when its time to stop is over.
        placing.cancel()
    # The service has stopped by now, but not before this was written.
    async with db.connect() as conn:
        found = (await conn.execute(select(executions).where(executions.c.context_id == context_id))).one()
    assert (found.status, found.error, found.unconfirmed) == ("submission_unknown", STOPPED, True)
    with pytest.raises(TriggerFailed) as told:
        await placing
    assert told.value.fields == {"execution_id": str(found.id), "status": "submission_unknown", "detail": STOPPED}


async def test_a_second_attempt_that_is_cut_off_may_have_been_heard(
    database_url: str, servers: Servers, monkeypatch: pytest.MonkeyPatch
):
    """That the first one started nothing says nothing about it."""
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.001)
    asked, again = 0, asyncio.Event()

    async def answer(_: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        if asked == 1:
            return httpx.Response(503)
        again.set()
        await asyncio.Event().wait()
        raise AssertionError

    router = respx.MockRouter()
    hook = Hook("http://127.0.0.1:1/hooks/test")
    router.post("/hooks/test").mock(side_effect=answer)
    async with answering(router, database_url, servers) as service:
        placing = asyncio.create_task(service.state["happyrobot"].trigger(hook, {}))
        await again.wait()
        placing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await placing


async def test_what_was_stored_though_nobody_heard_of_it_is_taken_back_and_called_when_it_is_asked_for_again(
    service: Service, db: AsyncEngine, upstream: Upstream, context_id: str
):
    """PostgreSQL goes away between a commit and its answer: nobody was called."""
    key_id, headers = await new_key(db, monthly_limit=1)
    body = {"context_id": context_id, "simulate": {"faults": "silent"}}
    headers |= {"Idempotency-Key": context_id}
    with unheard(service.state["db"]):
        answer = await service.http.post(URL, json=body, headers=headers)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")

    async def is_called() -> bool:
        return (await service.http.post(URL, json=body, headers=headers)).status_code == 200

    # Until it is taken back, it is in progress for all that others know.
    await until(is_called)
    calls = [call.payload for call in upstream.simulator.calls if call.payload is not None]
    assert sum(payload["context_id"] == context_id for payload in calls) == 1
    async with db.connect() as conn:
        assert await conn.scalar(select(api_key_usage.c.executions).where(api_key_usage.c.key_id == key_id)) == 1


async def test_a_service_that_stops_while_it_writes_down_what_was_started_says_so(
    database_url: str, servers: Servers, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    """Never a word to try again: the call is placed."""
    writing, may_end = asyncio.Event(), asyncio.Event()

    async def never(_: Intake, news: object) -> None:
        assert isinstance(news, NewRuns)
        writing.set()
        await may_end.wait()

    router = respx.MockRouter()
    router.post("/hooks/test").respond(json={"queued_run_ids": [context_id]})
    async with answering(router, database_url, servers) as service:
        monkeypatch.setattr(Intake, "take", never)
        state = service.state
        runs = NewRuns(uuid4(), "default", context_id, "A call", None, ())
        workflow = Workflow("default", Hook("http://127.0.0.1:1/hooks/test"))
        placing = asyncio.create_task(
            place(state["happyrobot"], state["intake"], state["settings"], workflow, runs, {}, patience=60)
        )
        await writing.wait()
        placing.cancel()
        with pytest.raises(TriggerFailed) as told:
            await placing
        may_end.set()
    assert told.value.fields["status"] == "submission_unknown"
    assert told.value.fields["run_ids"] == [context_id]


async def test_a_call_that_is_put_off_when_the_service_stops_was_not_placed(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str
):
    async def stopped_between_two_attempts(work: Awaitable[Any]) -> Any:
        with capture_logs() as logged:
            task = asyncio.ensure_future(work)
            await until(lambda: task.done() or any(line["event"] == "trigger is sent again" for line in logged))
        task.cancel()
        return await task

    router = respx.MockRouter()
    hook = router.post("/hooks/test").mock(return_value=httpx.Response(429, headers={"Retry-After": "15"}))
    async with answering(router, database_url, servers) as service:
        happyrobot = service.state["happyrobot"]
        with pytest.raises(PutOff, match="HappyRobot answered 429; the service stopped"):
            await stopped_between_two_attempts(happyrobot.trigger(Hook("http://127.0.0.1:1/hooks/test"), {}))
        # Of one that was accepted the next worker places the call.
        settings, intake = service.state["settings"], service.state["intake"]
        async with db.begin() as conn:
            accepted = await accept(conn, settings, ANYBODY, "default", {"input": {}, "contextId": context_id}, None)
        launcher = Launcher(settings, db, happyrobot, intake)
        assert await stopped_between_two_attempts(launcher.start(str(accepted.id))) == 0.0
        found = await execution(db, str(accepted.id))
        assert (found.status, found.answer_by) == ("pending", None)
        hook.mock(return_value=httpx.Response(200, json={"queued_run_ids": [context_id]}))
        await launcher.start(str(accepted.id))
    assert (await execution(db, str(accepted.id))).status == "running"


@pytest.fixture
async def own_upstream() -> AsyncIterator[Upstream]:
    """A HappyRobot whose callbacks reach nobody."""
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.001, backoff=())
    async with serving(lambda _: simulator.app) as (url, _):
        yield Upstream(simulator, url)


# A process that kills itself at a step of a trigger.
SERVE = """
import os, signal, sys
from switchboard import cli
from switchboard.happyrobot.client import HappyRobot

step = sys.argv.pop(1)
genuine = HappyRobot.trigger

async def trigger(self, hook, payload):
    if step == "before the call":
        os.kill(os.getpid(), signal.SIGKILL)
    run_ids = await genuine(self, hook, payload)
    if step == "after the answer":
        os.kill(os.getpid(), signal.SIGKILL)
    return run_ids

HappyRobot.trigger = trigger
cli.main()
"""


@pytest.mark.parametrize(
    ("step", "calls", "fault"),
    [("before the call", 0, ""), ("during the call", 1, "hang"), ("after the answer", 1, "")],
)
async def test_a_process_that_is_killed_leaves_the_truth_and_never_a_second_call(
    database_url: str,
    servers: Servers,
    own_upstream: Upstream,
    db: AsyncEngine,
    context_id: str,
    key: str,
    step: str,
    calls: int,
    fault: str,
):
    body = {"context_id": context_id, "simulate": {"faults": fault}}
    environment = {
        "DATABASE_URL": database_url,
        "REDIS_URL": servers.redis_url,
        "HAPPYROBOT_WEBHOOK_URL": f"{own_upstream.url}/hooks/test",
        "HAPPYROBOT_X_API_KEY": HOOK_KEY,
        "APP_SECRET": APP_SECRET,
    }
    command = [sys.executable, "-c", SERVE, step, "serve", "--port", "0", "--no-migrate", "--no-worker"]
    with local.environment(**environment):
        process = subprocess.Popen(  # noqa: ASYNC220
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    assert process.stdout is not None
    address = (await asyncio.to_thread(process.stdout.readline)).split()[-1]
    async with httpx.AsyncClient(base_url=address, timeout=30) as http:
        request = asyncio.create_task(http.post(URL, json=body, headers={"Idempotency-Key": key}))
        if step == "during the call":
            async with asyncio.timeout(20):
                while not calls_of(own_upstream, context_id):  # noqa: ASYNC110  # the simulator tells nobody
                    await asyncio.sleep(0.01)
            process.kill()
        with pytest.raises(httpx.TransportError):
            await request
    await asyncio.to_thread(process.communicate)
    assert process.returncode == -signal.SIGKILL

    async with db.begin() as conn:
        this = executions.c.context_id == context_id
        [execution_id] = await conn.scalars(select(executions.c.id).where(this, executions.c.status == "pending"))
        # Time passes.
        await conn.execute(update(executions).where(this).values(answer_by=text("now()")))
    settings = settings_for(database_url, servers.redis_url, own_upstream.url)
    async with running_service(settings, worker=True) as service:
        async with asyncio.timeout(20):
            while (await execution(db, str(execution_id))).status == "pending":  # noqa: ASYNC110  # it is in a database
                await asyncio.sleep(0.02)
        again = await trigger(service, key, **body)
        assert (again.status_code, again.json()["status"]) == (502, "submission_unknown")
        assert again.json()["execution_id"] == str(execution_id)
        for run in [run for run in own_upstream.simulator.runs.values() if run.payload.get("context_id") == context_id]:
            # What HappyRobot says in the end brings it together.
            answer = await service.callback(run.id, "completed", {"ok": True}, execution_id=str(execution_id))
            assert answer.status_code == 200
            again = await trigger(service, key, **body)
            assert (again.status_code, again.json()["run_ids"]) == (200, [run.id])
            assert (await execution(db, str(execution_id))).status == "completed"
    assert calls_of(own_upstream, context_id) == calls


async def test_who_placed_a_call_knows_better_than_the_sweep(service: Service, db: AsyncEngine, context_id: str):
    """What became of it could not be written for so long that it counted as unknown."""
    unknown, failed = ExecutionStatus.SUBMISSION_UNKNOWN, ExecutionStatus.FAILED
    execution_id = uuid4()
    async with db.begin() as conn:
        values = {"id": execution_id, "workflow_id": "default", "context_id": context_id, "input": {}}
        await conn.execute(executions.insert().values(values))
    for said, stands in ((unknown, unknown), (failed, failed), (unknown, failed)):
        await service.state["intake"].take(Unconfirmed(execution_id, said, "why"))
        async with db.connect() as conn:
            query = select(executions.c.status).where(executions.c.id == execution_id)
            assert await conn.scalar(query) == stands
