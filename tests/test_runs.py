"""Reading: the list, one run, its status, its timeline."""

import asyncio
import base64
import secrets
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx
import pytest
import respx
from sqlalchemy import text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import events
from switchboard.runs import queries
from switchboard.tables import agent_runs, run_events
from tests.conftest import Servers, Service, Upstream, insert_run, rows_of, running_service, settings_for

RUNS = "/api/happyrobot/runs"
STATUS = "/api/happyrobot/status"


def cursor(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


async def test_the_list_is_what_the_guides_hook_reads(service: Service, db: AsyncEngine, context_id: str):
    run_id = await insert_run(db, context_id)
    await service.callback(run_id, "log", {"message": "hello"})
    await service.callback(run_id, "completed", {"rate": 1})
    answer = await service.http.get(RUNS, params={"context_id": context_id})
    assert answer.status_code == 200
    [run] = answer.json()
    assert run["id"].isdecimal()
    assert {key: run[key] for key in ("runId", "contextId", "name", "description", "status")} == {
        "runId": run_id,
        "contextId": context_id,
        "name": "A",
        "description": None,
        "status": "COMPLETED",
    }
    assert run["metadata"] == {"logs": [{"message": "hello"}], "result": {"rate": 1}}
    assert "platformUrl" not in run
    for key in ("createdAt", "updatedAt", "completedAt"):
        assert len(run[key]) == len("2026-01-02T03:04:05.678Z")
        assert run[key].endswith("Z")
    assert run["createdAt"] < run["updatedAt"]
    assert run == await service.run(run_id)


async def test_a_context_without_runs_is_an_empty_list(service: Service, context_id: str):
    answer = await service.http.get(RUNS, params={"context_id": context_id})
    assert (answer.status_code, answer.json()) == (200, [])


async def test_a_log_is_a_sign_of_life(service: Service, run_id: str):
    before = await service.run(run_id)
    await service.callback(run_id, "log", 1)
    after = await service.run(run_id)
    assert before["updatedAt"] < after["updatedAt"]


async def test_runs_are_listed_newest_first_page_by_page(service: Service, db: AsyncEngine, context_id: str):
    run_ids = [await insert_run(db, context_id) for _ in range(7)]
    # All at the same moment: the id decides.
    async with db.begin() as conn:
        await conn.execute(
            update(agent_runs).where(agent_runs.c.run_id.in_(run_ids[:4])).values(created_at=text("'2020-01-01Z'"))
        )
    listed: list[str] = []
    url: str | None = f"{RUNS}?context_id={context_id}&limit=3"
    sizes = []
    while url:
        answer = await service.http.get(url)
        sizes.append(len(answer.json()))
        listed += [run["runId"] for run in answer.json()]
        link = answer.headers.get("link")
        assert link is None or link.endswith('>; rel="next"')
        url = link and link[1 : link.index(">")]
    assert listed == run_ids[::-1]
    assert sizes == [3, 3, 1]


async def test_a_page_that_is_just_full_has_no_next_one(service: Service, db: AsyncEngine, context_id: str):
    for _ in range(2):
        await insert_run(db, context_id)
    answer = await service.http.get(RUNS, params={"context_id": context_id, "limit": 2})
    assert len(answer.json()) == 2
    assert "link" not in answer.headers


async def test_a_page_ends_where_it_gets_heavy(
    service: Service, db: AsyncEngine, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(queries, "_RESULT_BYTES", 3_000)
    run_ids = [await insert_run(db, context_id) for _ in range(5)]
    for run_id, size in zip(run_ids, (10_000, 10, 1_400, 1_400, 1_400), strict=True):
        await service.callback(run_id, "completed", {"said": secrets.token_hex(size // 2)})
    pages: list[list[str]] = []
    url: str | None = f"{RUNS}?context_id={context_id}"
    while url:
        answer = await service.http.get(url)
        pages.append([run["runId"] for run in answer.json()])
        link = answer.headers.get("link")
        url = link and link[1 : link.index(">")]
    assert pages == [run_ids[4:1:-1], run_ids[1::-1]]


async def test_a_timeline_ends_where_it_gets_heavy(service: Service, run_id: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(events, "_HEAVY", 1_000)
    sizes = [10_000, 10, 600, 600, 600]
    for size in sizes:
        await service.callback(run_id, "log", "x" * 10 if size == 10 else secrets.token_hex(size // 2))
    pages: list[list[int]] = []
    url: str | None = f"{RUNS}/{run_id}/events"
    while url:
        answer = await service.http.get(url)
        pages.append([len(event["data"]) for event in answer.json()])
        link = answer.headers.get("link")
        url = link and link[1 : link.index(">")]
    assert pages == [[10_000], [10, 600, 600], [600]]


async def test_what_is_packed_where_it_is_stored_weighs_what_it_weighs_unpacked(
    service: Service, db: AsyncEngine, context_id: str, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(events, "_HEAVY", 1_000)
    monkeypatch.setattr(queries, "_RESULT_BYTES", 1_000)
    run_ids = [run_id, await insert_run(db, context_id)]
    for each in run_ids:
        for kind in ("log", "completed"):
            await service.callback(each, kind, {"said": "x" * 5_000})
    timeline = await service.http.get(f"{RUNS}/{run_id}/events")
    listed = await service.http.get(RUNS, params={"context_id": context_id})
    for answer in (timeline, listed):
        assert len(answer.json()) == 1
        assert "link" in answer.headers


async def test_the_list_can_be_narrowed(service: Service, db: AsyncEngine, context_id: str):
    ids = {status: await insert_run(db, context_id, status) for status in ("PENDING", "RUNNING", "FAILED")}
    workflow_id = f"w_{uuid4().hex}"
    async with db.begin() as conn:
        await conn.execute(
            update(agent_runs).where(agent_runs.c.run_id == ids["PENDING"]).values(workflow_id=workflow_id)
        )

    async def listed(**params: Any) -> list[str]:
        return [run["runId"] for run in (await service.http.get(RUNS, params=params)).json()]

    assert await listed(context_id=context_id, status="FAILED") == [ids["FAILED"]]
    assert await listed(context_id=context_id, status="failed") == [ids["FAILED"]]
    assert await listed(context_id=context_id, status="CANCELED") == []
    assert await listed(workflow_id=workflow_id) == [ids["PENDING"]]
    assert set(await listed(context_id=context_id, workflow_id="")) == set(ids.values())
    assert ids["RUNNING"] in await listed(context_id="", limit=1000)


async def test_metadata_of_a_foreign_insert_is_kept(service: Service, db: AsyncEngine, context_id: str):
    run_id = f"run_{uuid4().hex}"
    async with db.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO agent_runs "
                "(run_id, context_id, name, description, status, metadata, created_at, updated_at)"
                """ VALUES (:run_id, :context_id, 'n', 'd', 'PENDING', '{"logs": ["old"], "mine": 1}', now(), now())"""
            ),
            {"run_id": run_id, "context_id": context_id},
        )
    await service.callback(run_id, "log", "new")
    await service.callback(run_id, "completed", {"rate": 1})
    run = await service.run(run_id)
    assert run["metadata"] == {"logs": ["old", "new"], "mine": 1, "result": {"rate": 1}}
    assert run["status"] == "COMPLETED"


@pytest.mark.parametrize("stored", ["[]", "null", '"text"', '{"logs": "no list"}'])
async def test_odd_metadata_of_a_foreign_insert_does_no_harm(
    service: Service, db: AsyncEngine, run_id: str, context_id: str, stored: str
):
    async with db.begin() as conn:
        await conn.execute(
            text("UPDATE agent_runs SET metadata = CAST(:stored AS jsonb) WHERE run_id = :run_id"),
            {"stored": stored, "run_id": run_id},
        )
    await service.callback(run_id, "log", "new")
    assert (await service.callback(run_id, "completed", {"rate": 1})).status_code == 200
    run = await service.run(run_id)
    assert run["metadata"]["logs"] == ["new"]
    assert run["status"] == "COMPLETED"
    assert run["metadata"]["result"] == {"rate": 1}


async def test_very_many_logs_are_cut_to_the_newest(service: Service, db: AsyncEngine, run_id: str):
    async with db.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO run_events (run_id, context_id, event_type, status, data) SELECT :run_id, 'c', 'log', "
                "'RUNNING', to_json(n) FROM generate_series(1, 1005) AS n ORDER BY n"
            ),
            {"run_id": run_id},
        )
    metadata = (await service.run(run_id))["metadata"]
    earlier: str | None = metadata.pop("earlier_logs")
    assert metadata == {"logs": list(range(6, 1006)), "logs_truncated": True}
    assert await logs_at(service, f"{earlier}&limit=2") == [1, 2, 3, 4, 5]


async def logs_at(service: Service, url: str | None) -> list[Any]:
    """The logs in a timeline, page by page."""
    logs = []
    while url:
        page = await service.http.get(url)
        page.raise_for_status()
        logs += [event["data"] for event in page.json() if event["event_type"] == "log"]
        url = page.links.get("next", {}).get("url")
    return logs


@pytest.mark.parametrize("name", ["a b", "€?x=1&y#", "%2F"])
async def test_all_logs_are_found_whatever_the_run_is_called(
    service: Service, db: AsyncEngine, context_id: str, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(queries, "MAX_LOGS", 2)
    run_id = f"{name}{uuid4().hex}"
    async with db.begin() as conn:
        await conn.execute(agent_runs.insert().values(run_id=run_id, context_id=context_id, status="RUNNING"))
    for number in range(5):
        await service.callback(run_id, "log", number)
        await service.callback(run_id, "progress", number)
    [run] = (await service.http.get(RUNS, params={"context_id": context_id})).json()
    assert await logs_at(service, run["metadata"]["earlier_logs"]) + run["metadata"]["logs"] == [0, 1, 2, 3, 4]


async def test_a_long_list_gives_fewer_logs_of_each_run(
    service: Service, db: AsyncEngine, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(queries, "_LOGS_IN_A_LIST", 4)
    for _ in range(2):
        run_id = await insert_run(db, context_id)
        for number in range(3):
            await service.callback(run_id, "log", number)
    runs = (await service.http.get(RUNS, params={"context_id": context_id})).json()
    assert [run["metadata"]["logs_truncated"] for run in runs] == [True, True]
    assert [run["metadata"]["logs"] for run in runs] == [[1, 2], [1, 2]]
    assert (await service.run(run_id))["metadata"] == {"logs": [0, 1, 2]}


async def test_the_timeline_is_read_from_any_event_on(service: Service, run_id: str, context_id: str):
    for number in range(5):
        await service.callback(run_id, "log", number, timestamp=f"2026-01-01T00:00:0{number}Z")
    url = f"{RUNS}/{run_id}/events"
    events = (await service.http.get(url)).json()
    assert [event["data"] for event in events] == list(range(5))
    assert [event["id"] for event in events] == sorted(event["id"] for event in events)
    assert events[3] == {
        "id": events[3]["id"],
        "run_id": run_id,
        "context_id": context_id,
        "workflow_id": "default",
        "event_type": "log",
        "status": "RUNNING",
        "timestamp": "2026-01-01T00:00:03.000Z",
        "data": 3,
    }
    later = await service.http.get(url, params={"after": events[2]["id"]})
    assert later.json() == events[3:]
    first = await service.http.get(url, params={"limit": 2})
    assert first.json() == events[:2]
    link = first.headers["link"]
    second = await service.http.get(link[1 : link.index(">")])
    assert second.json() == events[2:4]
    assert "link" not in (await service.http.get(url, params={"limit": 5})).headers


@pytest.mark.parametrize("name", ["€", "a b", "a>b", "a\r\nb", 'q?x=1&y#"', "%2F"])
async def test_links_lead_on_whatever_the_run_is_called(service: Service, db: AsyncEngine, context_id: str, name: str):
    run_id = f"{name}{uuid4().hex}"
    async with db.begin() as conn:
        await conn.execute(agent_runs.insert().values(run_id=run_id, context_id=context_id))
    for number in range(3):
        await service.callback(run_id, "log", number)
    answer = await service.http.get(f"{RUNS}/{quote(run_id, safe='')}/events?limit=2")
    link = answer.headers["link"]
    rest = await service.http.get(link[1 : link.index(">")])
    assert [event["data"] for event in answer.json() + rest.json()] == [0, 1, 2]
    assert {event["run_id"] for event in rest.json()} == {run_id}


async def test_very_large_logs_are_cut_by_their_size(
    service: Service, db: AsyncEngine, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(queries, "_LOG_BYTES", 250)
    for number in range(4):
        await service.callback(run_id, "log", str(number) * 100)
    assert (await service.run(run_id))["metadata"]["logs"] == ["2" * 100, "3" * 100]
    await service.callback(run_id, "log", "x" * 1000)
    # The newest is shown, however large.
    metadata = (await service.run(run_id))["metadata"]
    assert (metadata["logs"], metadata["logs_truncated"]) == (["x" * 1000], True)
    assert await logs_at(service, metadata["earlier_logs"]) == [str(number) * 100 for number in range(4)]


async def test_the_timeline_of_a_silent_run_is_empty(service: Service, run_id: str):
    assert (await service.http.get(f"{RUNS}/{run_id}/events")).json() == []


@pytest.mark.parametrize("path", [f"{RUNS}/nobody", f"{RUNS}/nobody/events", f"{STATUS}?run_id=nobody"])
async def test_an_unknown_run_is_not_found(service: Service, path: str):
    answer = await service.http.get(path)
    assert (answer.status_code, answer.json()) == (404, {"error": "Run not found"})


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        (STATUS, "run_id required"),
        (f"{STATUS}?run_id=", "run_id required"),
        (f"{STATUS}?run_id=%00", "run_id: must not contain a NUL character"),
        (f"{STATUS}?run_id={'x' * 256}", "run_id: String should have at most 255 characters"),
        (f"{RUNS}?limit=0", "limit: Input should be greater than or equal to 1"),
        (f"{RUNS}?limit=1001", "limit: Input should be less than or equal to 1000"),
        (f"{RUNS}?limit=many", None),
        (f"{RUNS}?status=DONE", None),
        (f"{RUNS}?status=", None),
        (f"{RUNS}?context_id=%00", None),
        (f"{RUNS}?cursor=nonsense", "cursor: not one that this list gave"),
        (f"{RUNS}?cursor=", "cursor: not one that this list gave"),
        (f"{RUNS}?cursor=%FF", "cursor: not one that this list gave"),
        (f"{RUNS}?cursor=MjAyMC0wMS0wMSA1", "cursor: not one that this list gave"),  # a time without a zone
        (f"{RUNS}?cursor=MjAyMC0wMS0wMVQwMDowMDowMCswMDowMCAtMQ", "cursor: not one that this list gave"),
        (f"{RUNS}?cursor={cursor('0001-01-01T00:00:00+14:00 5')}", "cursor: not one that this list gave"),
        (f"{RUNS}?cursor={cursor('9999-12-31T23:59:59-14:00 5')}", "cursor: not one that this list gave"),
        (f"{RUNS}/{'x' * 256}", None),
        (f"{RUNS}/a%00b", None),
        (f"{RUNS}/a/events?after=-1", None),
        (f"{RUNS}/a/events?after=9223372036854775808", None),
        (f"{RUNS}/a/events?up_to=-1", None),
        (f"{RUNS}/a/events?limit=0", None),
    ],
)
async def test_bad_input_is_a_400_in_the_guides_shape(service: Service, path: str, complaint: str | None):
    answer = await service.http.get(path)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    if complaint is not None:
        assert answer.json() == {"error": complaint}


async def test_what_is_not_there_is_not_found_in_the_guides_shape(service: Service):
    answer = await service.http.get("/api/happyrobot/nothing")
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})
    answer = await service.http.get("/api/happyrobot/trigger")
    assert (answer.status_code, answer.json()) == (405, {"error": "Method Not Allowed"})
    assert answer.headers["allow"] == "POST"


async def test_status_asks_happyrobot_and_records_what_it_says(
    service: Service, upstream: Upstream, db: AsyncEngine, context_id: str
):
    body = {"context_id": context_id, "name": "N", "simulate": {"faults": "drop_final"}}
    [run_id] = (await service.http.post("/api/happyrobot/trigger", json=body)).json()["run_ids"]
    await upstream.simulator.settled()
    assert (await service.run(run_id))["status"] == "RUNNING"
    answer = await service.http.get(STATUS, params={"run_id": run_id})
    run = await service.run(run_id)
    assert answer.json() == {
        "run_id": run_id,
        "status": "completed",
        "name": "N",
        "created_at": run["createdAt"],
        "updated_at": run["updatedAt"],
        "source": "happyrobot",
    }
    assert run["status"] == "COMPLETED"
    asked = len(upstream.simulator.requests)
    again = await service.http.get(STATUS, params={"run_id": run_id})
    assert (again.json()["status"], again.json()["source"]) == ("completed", "database")
    assert len(upstream.simulator.requests) == asked, "a run that is over is not asked about"


@pytest.mark.parametrize("word", ["scheduled", "running", "queued"])
async def test_a_poll_that_moves_nothing_leaves_no_event(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str, word: str
):
    router = respx.MockRouter()
    router.get(f"/api/v1/runs/{run_id}").respond(json={"run": {"id": run_id, "status": word}})
    settings = settings_for(database_url, servers.redis_url, None)
    async with running_service(settings, httpx.MockTransport(router.async_handler)) as service:
        answers = [(await service.http.get(STATUS, params={"run_id": run_id})).json() for _ in range(3)]
    # A run that is RUNNING does not go back.
    assert {(answer["status"], answer["source"]) for answer in answers} == {("running", "happyrobot")}
    assert await rows_of(db, run_events, run_id) == 0


async def test_polls_at_the_same_moment_are_one_event(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str
):
    router = respx.MockRouter()
    router.get(f"/api/v1/runs/{run_id}").respond(json={"id": run_id, "status": "failed"})
    settings = settings_for(database_url, servers.redis_url, None)
    async with running_service(settings, httpx.MockTransport(router.async_handler)) as service:
        answers = await asyncio.gather(*(service.http.get(STATUS, params={"run_id": run_id}) for _ in range(10)))
        assert {answer.json()["status"] for answer in answers} == {"failed"}
        [event] = (await service.http.get(f"{RUNS}/{run_id}/events")).json()
    assert (event["event_type"], event["status"], event["data"]) == ("status", "FAILED", {"status": "failed"})


@pytest.mark.parametrize(("word", "kept"), [("completed", "result"), ("failed", "error")])
async def test_a_poll_that_comes_first_does_not_take_the_place_of_the_result(
    database_url: str, servers: Servers, run_id: str, word: str, kept: str
):
    router = respx.MockRouter()
    router.get(f"/api/v1/runs/{run_id}").respond(json={"status": word})
    settings = settings_for(database_url, servers.redis_url, None)
    async with running_service(settings, httpx.MockTransport(router.async_handler)) as service:
        await service.http.get(STATUS, params={"run_id": run_id})
        assert (await service.run(run_id))["metadata"] == {"logs": []}
        await service.callback(run_id, word, {"rate": 1})
        assert (await service.run(run_id))["metadata"] == {"logs": [], kept: {"rate": 1}}


async def test_the_database_answers_where_happyrobot_does_not(service: Service, run_id: str):
    """The simulator answers 404 about a run that it does not know."""
    answer = await service.http.get(STATUS, params={"run_id": run_id})
    assert (answer.status_code, answer.json()["status"], answer.json()["source"]) == (200, "running", "database")


@pytest.mark.parametrize("api_key", [None, "wrong"])
async def test_the_database_answers_without_a_key(
    database_url: str, servers: Servers, upstream: Upstream, run_id: str, api_key: str | None
):
    settings = settings_for(database_url, servers.redis_url, upstream.url, happyrobot_api_key=api_key)
    async with running_service(settings) as service:
        answer = await service.http.get(STATUS, params={"run_id": run_id})
        assert (answer.json()["status"], answer.json()["source"]) == ("running", "database")


async def test_links_to_the_platform_appear_once_they_can_be_built(
    database_url: str, servers: Servers, upstream: Upstream, run_id: str
):
    names = {"happyrobot_org_slug": "acme inc", "happyrobot_workflow_id": "w1", "happyrobot_org_id": "o"}
    async with running_service(settings_for(database_url, servers.redis_url, upstream.url, **names)) as service:
        link = f"https://v2.platform.happyrobot.ai/acme%20inc/workflow/w1/runs?run_id={run_id}"
        assert (await service.run(run_id))["platformUrl"] == link
        answer = await service.http.get(STATUS, params={"run_id": run_id})
        assert answer.json()["platform_url"] == link


@pytest.mark.parametrize(
    "path", [RUNS, f"{RUNS}/x", f"{RUNS}/x/events", f"{STATUS}?run_id=x", "/api/events", "/api/happyrobot/trigger"]
)
async def test_without_anonymous_access_nobody_is_answered(database_url: str, servers: Servers, path: str):
    settings = settings_for(database_url, servers.redis_url, None, allow_anonymous=False)
    async with running_service(settings) as service:
        method = "POST" if path.endswith("trigger") else "GET"
        answer = await service.http.request(method, path)
        assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})


async def test_frontends_on_other_hosts_are_let_in_by_name(database_url: str, servers: Servers):
    settings = settings_for(database_url, servers.redis_url, None, cors_origins=("https://app.example",))
    async with running_service(settings) as service:
        good = await service.http.get(RUNS, headers={"Origin": "https://app.example"})
        assert good.headers["access-control-allow-origin"] == "https://app.example"
        bad = await service.http.get(RUNS, headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in bad.headers


async def test_the_process_says_that_it_lives(service: Service):
    answer = await service.http.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
