"""Callbacks: taken once, kept, applied to the run, held when they are early."""

import asyncio
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.runs import intake
from switchboard.runs.ingest import TURN, write
from switchboard.runs.sorting import NewRuns
from switchboard.tables import agent_runs, executions, held_callbacks, run_events
from tests.conftest import (
    HOOK_KEY,
    Servers,
    Service,
    Upstream,
    insert_run,
    rows_of,
    running_service,
    settings_for,
)

HEADERS = {"X-API-KEY": HOOK_KEY}
URL = "/api/webhooks/happyrobot"
HUGE = b'{"run_id": "run_1", "event_type": "log", "data": ' + b"9" * 250 + b"e99}"


async def test_logs_are_kept_in_order(service: Service, run_id: str):
    for number in range(3):
        answer = await service.callback(run_id, "log", {"message": f"line {number}"})
        assert (answer.status_code, answer.json()) == (200, {"success": True})
    run = await service.run(run_id)
    assert run["metadata"] == {"logs": [{"message": f"line {number}"} for number in range(3)]}
    assert run["status"] == "RUNNING"


@pytest.mark.parametrize("data", [None, "a line", 7, 1.5, True, ["a"], {"ä": {"deep": [None]}}])
async def test_a_log_may_be_any_json(service: Service, run_id: str, data: Any):
    assert (await service.callback(run_id, "log", data)).status_code == 200
    assert (await service.run(run_id))["metadata"]["logs"] == [data]


async def test_a_log_without_data_is_null(service: Service, run_id: str):
    body = {"run_id": run_id, "event_type": "log"}
    assert (await service.http.post(URL, json=body, headers=HEADERS)).status_code == 200
    assert (await service.run(run_id))["metadata"]["logs"] == [None]


@pytest.mark.parametrize(
    ("event_type", "status", "metadata"),
    [
        ("running", "RUNNING", {"logs": []}),
        ("completed", "COMPLETED", {"logs": [], "result": {"x": 1}}),
        ("failed", "FAILED", {"logs": [], "error": {"x": 1}}),
        ("canceled", "CANCELED", {"logs": []}),
        ("cancelled", "CANCELED", {"logs": []}),
        ("pickup_confirmed", "RUNNING", {"logs": []}),
        ("skipped", "RUNNING", {"logs": []}),
    ],
)
async def test_each_type_moves_the_run(service: Service, run_id: str, event_type: str, status: str, metadata: Any):
    assert (await service.callback(run_id, event_type, {"x": 1})).json() == {"success": True}
    run = await service.run(run_id)
    assert (run["status"], run["metadata"]) == (status, metadata)
    assert (run["completedAt"] is not None) == (status in {"COMPLETED", "FAILED", "CANCELED"})


async def test_a_run_that_is_over_only_gets_a_longer_timeline(service: Service, run_id: str):
    for event_type, data in [("completed", {"rate": 1}), ("failed", {"oh": "no"}), ("running", None), ("log", "late")]:
        assert (await service.callback(run_id, event_type, data)).status_code == 200
    run = await service.run(run_id)
    assert run["status"] == "COMPLETED"
    assert run["metadata"] == {"logs": ["late"], "result": {"rate": 1}}
    timeline = (await service.http.get(f"/api/happyrobot/runs/{run_id}/events")).json()
    assert [(event["event_type"], event["status"]) for event in timeline] == [
        ("completed", "COMPLETED"),
        ("failed", "COMPLETED"),
        ("running", "COMPLETED"),
        ("log", "COMPLETED"),
    ]


async def test_a_result_that_comes_after_the_status_is_kept(service: Service, run_id: str):
    await service.callback(run_id, "completed")
    await service.callback(run_id, "completed", {"rate": 1})
    await service.callback(run_id, "completed", {"rate": 2})
    assert (await service.run(run_id))["metadata"]["result"] == {"rate": 1}


async def test_happyrobots_word_replaces_our_timeout(service: Service, db: AsyncEngine, run_id: str):
    async with db.begin() as conn:
        await conn.execute(
            update(agent_runs)
            .where(agent_runs.c.run_id == run_id)
            .values(status="FAILED", timed_out=True, metadata={"error": "Timed out", "mine": 1})
        )
    await service.callback(run_id, "log", "still here")
    assert (await service.run(run_id))["status"] == "FAILED"
    await service.callback(run_id, "completed", {"rate": 1})
    run = await service.run(run_id)
    assert run["status"] == "COMPLETED"
    assert run["metadata"] == {"logs": ["still here"], "result": {"rate": 1}, "mine": 1}
    await service.callback(run_id, "failed", {})
    assert (await service.run(run_id))["status"] == "COMPLETED"


async def test_five_hundred_logs_at_twenty_a_time_are_all_kept(service: Service, run_id: str):
    places = asyncio.Semaphore(20)

    async def send(number: int) -> int:
        async with places:
            return (await service.callback(run_id, "log", {"n": number})).status_code

    assert set(await asyncio.gather(*map(send, range(500)))) == {200}
    logs = (await service.run(run_id))["metadata"]["logs"]
    assert sorted(log["n"] for log in logs) == list(range(500))


async def test_copies_sent_to_two_services_at_once_count_once(
    service: Service, database_url: str, servers: Servers, upstream: Upstream, db: AsyncEngine, run_id: str
):
    async with running_service(settings_for(database_url, servers.redis_url, upstream.url)) as other:

        async def send(to: Service, number: int) -> bool:
            stamp = f"2026-01-01T00:00:00.{number:03}Z"
            answer = await to.callback(run_id, "log", {"n": number}, timestamp=stamp)
            assert answer.status_code == 200
            assert answer.json().items() >= {("success", True)}
            return bool(answer.json().get("duplicate", False))

        copies = [send(to, number) for number in range(100) for to in (service, other, service)]
        assert sum(await asyncio.gather(*copies)) == 200
    assert await rows_of(db, run_events, run_id) == 100


async def test_copies_are_known_by_webhook_id_whatever_they_say(service: Service, run_id: str):
    headers = HEADERS | {"X-Webhook-Id": "wh_1"}
    first = await service.http.post(URL, json={"run_id": run_id, "event_type": "log"}, headers=headers)
    again = await service.http.post(URL, json={"run_id": run_id, "event_type": "log", "data": 1}, headers=headers)
    assert first.json() == {"success": True}
    assert again.json() == {"success": True, "duplicate": True}
    assert (await service.run(run_id))["metadata"]["logs"] == [None]


async def test_a_webhook_id_is_known_per_run(service: Service, db: AsyncEngine, run_id: str):
    headers = HEADERS | {"X-Webhook-Id": "the same for everybody"}
    for name in (run_id, await insert_run(db, "another")):
        answer = await service.http.post(URL, json={"run_id": name, "event_type": "log"}, headers=headers)
        assert answer.json() == {"success": True}


async def test_equal_bodies_without_a_timestamp_are_two_events(service: Service, run_id: str):
    await service.callback(run_id, "log", "hello")
    await service.callback(run_id, "log", "hello")
    assert (await service.run(run_id))["metadata"]["logs"] == ["hello", "hello"]


async def test_a_cloud_event_is_stored_once_and_does_not_end_the_run(service: Service, run_id: str):
    data = {"run_id": run_id, "session_id": "s", "status": {"previous": "in-progress", "current": "completed"}}
    body = {
        "specversion": "1.0",
        "id": "a1b2",
        "source": "https://platform.happyrobot.ai",
        "type": "session.status_changed",
        "time": "2025-07-08T12:34:56Z",
        "datacontenttype": "application/json",
        "data": data,
    }
    answers = [await service.http.post(URL, json=body, headers=HEADERS) for _ in range(2)]
    assert [answer.json() for answer in answers] == [{"success": True}, {"success": True, "duplicate": True}]
    [event] = (await service.http.get(f"/api/happyrobot/runs/{run_id}/events")).json()
    assert (event["event_type"], event["data"]) == ("session.status_changed", data)
    assert event["timestamp"] == "2025-07-08T12:34:56.000Z"
    assert (await service.run(run_id))["status"] == "RUNNING"


@pytest.mark.parametrize(
    ("current", "status"),
    [
        ("in-progress", "RUNNING"),
        *((word, "PENDING") for word in ("queued", "connecting", "completed", "busy", "missed", "failed", "canceled")),
    ],
)
async def test_only_a_session_in_progress_says_where_its_run_stands(
    service: Service, db: AsyncEngine, context_id: str, current: str, status: str
):
    run_id = await insert_run(db, context_id, "PENDING")
    data = {"run_id": run_id, "session_id": "s", "status": {"previous": "queued", "current": current}}
    body = {"specversion": "1.0", "id": "1", "source": "h", "type": "session.status_changed", "data": data}
    assert (await service.http.post(URL, json=body, headers=HEADERS)).status_code == 200
    assert (await service.run(run_id))["status"] == status


async def test_an_early_callback_is_held_and_applied_once_the_run_is_known(
    service: Service, upstream: Upstream, db: AsyncEngine, context_id: str
):
    body = {"context_id": context_id, "simulate": {"faults": "call_back_first"}}
    answer = await service.http.post("/api/happyrobot/trigger", json=body)
    [run_id] = answer.json()["run_ids"]
    await upstream.simulator.settled()
    types = [event["event_type"] for event in (await service.http.get(f"/api/happyrobot/runs/{run_id}/events")).json()]
    assert types[:3] == ["triggered", "running", "log"]
    assert types.count("running") == 1
    assert types[-1] == "completed"
    assert await rows_of(db, held_callbacks, run_id) == 0


async def test_held_callbacks_are_applied_in_the_order_they_came_and_copies_once(service: Service, db: AsyncEngine):
    """The run ends before its trigger is answered: the row appears complete."""
    run_id = f"early_{uuid4().hex}"

    async def send(event_type: str, data: Any, webhook_id: str) -> None:
        body = {"run_id": run_id, "event_type": event_type, "data": data}
        answer = await service.http.post(URL, json=body, headers=HEADERS | {"X-Webhook-Id": webhook_id})
        assert (answer.status_code, answer.json()) == (404, {"error": "Run not found"})

    await send("log", 1, "a")
    await send("log", 2, "b")
    await send("log", 1, "a")
    await send("completed", {"rate": 3}, "c")
    assert await rows_of(db, held_callbacks, run_id) == 3
    execution_id = await register_run(db, run_id)
    run = await service.run(run_id)
    assert (run["status"], run["metadata"]) == ("COMPLETED", {"logs": [1, 2], "result": {"rate": 3}})
    again = await service.http.post(
        URL, json={"run_id": run_id, "event_type": "log"}, headers=HEADERS | {"X-Webhook-Id": "b"}
    )
    assert again.json() == {"success": True, "duplicate": True}
    async with db.connect() as conn:
        assert await conn.scalar(select(executions.c.status).where(executions.c.id == execution_id)) == "completed"


async def register_run(db: AsyncEngine, run_id: str) -> UUID:
    """What a trigger does once HappyRobot has named the run."""
    execution_id = uuid4()
    async with db.begin() as conn:
        await conn.execute(
            executions.insert().values(id=execution_id, workflow_id="default", context_id="order_1", input={})
        )
        await write(conn, [NewRuns(execution_id, "default", "order_1", "A", None, [run_id])])
    return execution_id


async def test_held_callbacks_are_applied_when_somebody_else_writes_the_row(
    service: Service, db: AsyncEngine, context_id: str
):
    run_id = await insert_run(db, context_id)
    async with db.begin() as conn:
        await conn.execute(delete(agent_runs).where(agent_runs.c.run_id == run_id))
    assert (await service.callback(run_id, "log", 1)).status_code == 404
    assert (await service.callback(run_id, "log", 2)).status_code == 404
    async with db.begin() as conn:
        await conn.execute(agent_runs.insert().values(run_id=run_id, context_id=context_id, status="RUNNING"))
    assert (await service.callback(run_id, "log", 3)).json() == {"success": True}
    assert (await service.run(run_id))["metadata"]["logs"] == [1, 2, 3]
    assert await rows_of(db, held_callbacks, run_id) == 0


async def test_a_row_that_a_foreign_session_has_locked_stops_nobody_else(
    service: Service, db: AsyncEngine, run_id: str, context_id: str
):
    other = await insert_run(db, context_id)
    async with db.begin() as conn:
        await conn.execute(update(agent_runs).where(agent_runs.c.run_id == run_id).values(name="locked"))
        locked, free = await asyncio.gather(
            service.callback(run_id, "completed", {"rate": 1}), service.callback(other, "completed", {"rate": 2})
        )
    assert (free.status_code, locked.status_code) == (200, 503)
    assert locked.headers["retry-after"] == "1"
    assert (await service.run(run_id))["status"] == "RUNNING"
    assert (await service.callback(run_id, "completed", {"rate": 1})).status_code == 200


async def test_a_caller_that_hangs_up_in_the_middle_leaves_no_trace(
    service: Service, run_id: str, caplog: pytest.LogCaptureFixture
):
    host, _, port = service.url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {HOOK_KEY}\r\nContent-Length: 100\r\n\r\n"
    writer.write(head.encode() + b'{"run_id": ')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await service.callback(run_id, "log", 1)).status_code == 200
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_held_callbacks_that_nobody_claims_are_dropped_after_a_day(service: Service, db: AsyncEngine):
    run_id = f"nobody_{uuid4().hex}"
    held = held_callbacks.c.run_id == run_id
    await service.callback(run_id, "log", "old")
    async with db.begin() as conn:
        long_ago = func.now() - text("interval '1 day 1 second'")
        await conn.execute(update(held_callbacks).where(held).values(created_at=long_ago))
    await service.callback(run_id, "log", "new")
    async with db.connect() as conn:
        assert list(await conn.scalars(select(held_callbacks.c.data).where(held))) == ["new"]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "The body is not valid JSON"),
        (b"{", "The body is not valid JSON"),
        (b"\xff", "The body is not valid JSON"),
        (b"[]", "The body must be a JSON object"),
        (b'"text"', "The body must be a JSON object"),
        (b"null", "The body must be a JSON object"),
        (b'{"run_id": "run_1", "event_type": "log", "data": NaN}', "The body is not valid JSON"),
        (b'{"run_id": "run_1", "event_type": "log", "data": 1e999}', "The body contains a number that is too large"),
        (
            b'{"run_id": "x", "event_type": "log", "data": ' + b"9" * 250 + b"e99}",
            "The body contains a number that is too large",
        ),
        (b'{"run_id": "run_1", "event_type": "log", "data": "\\ud800"}', "The body is not valid JSON"),
        (b'{"run_id": "run_1", "event_type": "log", "data": ["\\u0000"]}', "The body contains a NUL character"),
        (b'{"run_id": "run_1", "event_type": "log", "data": {"\\u0000": 1}}', "The body contains a NUL character"),
        (b'{"run_id": "run_1", "event_type": "log", "data": ' + b"[" * 1000 + b"]" * 1000 + b"}", None),
        (b'{"event_type": "log"}', "run_id required"),
        (b'{"run_id": "", "event_type": "log"}', "run_id required"),
        (b'{"run_id": 5, "event_type": "log"}', "run_id: Input should be a valid string"),
        (b'{"run_id": null, "event_type": "log"}', "run_id: Input should be a valid string"),
        (b'{"run_id": "run_1"}', "event_type required"),
        (b'{"run_id": "run_1", "event_type": ["log"]}', "event_type: Input should be a valid string"),
        (b'{"run_id": "' + b"x" * 256 + b'", "event_type": "log"}', None),
        (b'{"run_id": "run_1", "event_type": "' + b"x" * 256 + b'"}', None),
        (b'{"run_id": "run_1", "event_type": "log", "timestamp": {}}', "timestamp: must be a string or a number"),
        (b'{"specversion": "1.0", "id": "a", "type": "t"}', "data required"),
        (b'{"specversion": "1.0", "id": "a", "type": "t", "data": {}}', "data.run_id required"),
        (b'{"specversion": "1.0", "type": "t", "data": {"run_id": "run_1"}}', "id required"),
    ],
)
async def test_bad_input_is_refused_and_changes_nothing(
    service: Service, db: AsyncEngine, run_id: str, body: bytes, complaint: str | None
):
    answer = await service.http.post(URL, content=body.replace(b"run_1", run_id.encode()), headers=HEADERS)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    if complaint is not None:
        assert answer.json()["error"] == complaint
    assert await rows_of(db, run_events, run_id) == await rows_of(db, held_callbacks, run_id) == 0


async def test_text_that_looks_like_nul_or_huge_is_taken(service: Service, run_id: str):
    data = {"path": "C:\\u0000 is fine when the backslash is escaped", "small": 1e-300, "long": int("9" * 400)}
    assert (await service.callback(run_id, "log", data)).status_code == 200
    assert (await service.run(run_id))["metadata"]["logs"] == [data]


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_of_a_megabyte_is_refused(service: Service, db: AsyncEngine, run_id: str, declared: bool):
    body = b'{"run_id": "%b", "event_type": "log", "data": "' % run_id.encode() + b"x" * 1_000_000 + b'"}'

    async def chunks():
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    answer = await service.http.post(URL, content=body if declared else chunks(), headers=HEADERS)
    assert (answer.status_code, answer.json()) == (413, {"error": "The body must be smaller than 1 MB"})
    assert await rows_of(db, run_events, run_id) == 0


async def test_a_body_just_below_a_megabyte_is_taken(service: Service, run_id: str):
    frame = b'{"run_id": "%b", "event_type": "log", "data": ""}' % run_id.encode()
    body = frame[:-2] + b"x" * (999_999 - len(frame)) + frame[-2:]
    assert (await service.http.post(URL, content=body, headers=HEADERS)).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"X-API-KEY": ""}, {"X-API-KEY": "wrong"}, {"X-API-KEY": b"\xe4\xf6"}])
async def test_without_the_key_nothing_is_read(service: Service, db: AsyncEngine, run_id: str, headers: Any):
    answer = await service.http.post(URL, content=b"not even JSON", headers=headers)
    assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
    assert await rows_of(db, run_events, run_id) == 0


async def test_where_no_key_is_set_none_is_asked_for(database_url: str, servers: Servers, run_id: str):
    settings = settings_for(database_url, servers.redis_url, None, happyrobot_x_api_key=None)
    async with running_service(settings) as service:
        body = {"run_id": run_id, "event_type": "log"}
        assert (await service.http.post(URL, json=body)).status_code == 200


async def test_the_callback_key_may_differ_from_the_hooks(database_url: str, servers: Servers, run_id: str):
    settings = settings_for(database_url, servers.redis_url, None, happyrobot_callback_key="another")
    async with running_service(settings) as service:
        body = {"run_id": run_id, "event_type": "log"}
        assert (await service.http.post(URL, json=body, headers=HEADERS)).status_code == 401
        assert (await service.http.post(URL, json=body, headers={"X-API-KEY": "another"})).status_code == 200


async def test_more_than_there_is_room_for_is_told_to_come_back(
    service: Service, db: AsyncEngine, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    await service.callback(run_id, "log")  # from here on the writer has its connection
    monkeypatch.setattr(intake, "MAX_WAITING_BYTES", 1)
    async with db.begin() as conn:
        await conn.execute(TURN)  # in which nobody else writes
        # One is being written, one waits; for others there is no room.
        sent = [asyncio.create_task(service.callback(run_id, "log", number)) for number in range(4)]
        refused, accepted = await asyncio.wait(sent, return_when=asyncio.FIRST_COMPLETED)
        while len(refused) < 2:
            more, accepted = await asyncio.wait(accepted, return_when=asyncio.FIRST_COMPLETED)
            refused |= more
    assert [(each.result().status_code, each.result().headers["retry-after"]) for each in refused] == [(503, "1")] * 2
    assert [each.status_code for each in await asyncio.gather(*accepted)] == [200] * 2
    assert await rows_of(db, run_events, run_id) == 3


async def test_the_key_is_checked_before_the_body_is_waited_for(service: Service):
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(service.url).port)
    writer.write(f"POST {URL} HTTP/1.1\r\nHost: x\r\nX-API-KEY: wrong\r\nContent-Length: 100\r\n\r\n".encode())
    async with asyncio.timeout(10):
        assert b" 401 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_answers_do_not_grow(service: Service, run_id: str):
    first, second = [await service.callback(run_id, "log", number) for number in range(2)]
    assert len(first.headers.get_list("x-request-id", split_commas=True)) == 1
    assert [name for name, _ in first.headers.raw] == [name for name, _ in second.headers.raw]
