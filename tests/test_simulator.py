"""The stand-in for HappyRobot, from outside: over HTTP, with a receiver for its callbacks."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from switchboard import local
from switchboard.happyrobot.simulator import Faults, Simulator, create_app
from tests.conftest import serving

CALLBACK_URL = "http://switchboard.test/callbacks"
FINAL = {"completed", "failed", "canceled"}


class Receiver:
    """Takes callbacks, and answers them as it is told to."""

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)  # for the first ones; later ones are answered 200
        self.bodies: list[bytes] = []
        self.headers: list[Headers] = []
        self.news = asyncio.Condition()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await request.body()
        async with self.news:
            self.bodies.append(body)
            self.headers.append(request.headers)
            self.news.notify_all()
        await Response(status_code=self.answers.pop(0) if self.answers else 200)(scope, receive, send)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body) for body in self.bodies]

    @property
    def kinds(self) -> list[str]:
        return [event.get("event_type", "cloud event") for event in self.events]

    async def has(self, count: int) -> None:
        async with self.news:
            await asyncio.wait_for(self.news.wait_for(lambda: len(self.bodies) >= count), 5)

    async def asked(self, count: int = 1) -> list[dict[str, Any]]:
        """The callbacks that ask for an approval, once there are so many."""
        async with self.news:
            await asyncio.wait_for(self.news.wait_for(lambda: self.kinds.count("pending_approval") >= count), 5)
        return [event for event in self.events if event.get("event_type") == "pending_approval"]


@asynccontextmanager
async def simulated(
    receiver: ASGIApp | None = None, **options: Any
) -> AsyncIterator[tuple[Simulator, httpx.AsyncClient]]:
    """A simulator whose callbacks go to `receiver`, and a client for it."""
    transport = httpx.ASGITransport(receiver or Receiver())
    usual: dict[str, Any] = {"pace": 0, "backoff": (0, 0, 0), "transport": transport}
    simulator = Simulator(**usual | options)
    async with (
        aclosing(simulator),
        httpx.AsyncClient(transport=httpx.ASGITransport(simulator.app), base_url="http://sim.test") as client,
    ):
        yield simulator, client


async def trigger(client: httpx.AsyncClient, path: str = "/hooks/carrier-call", **payload: Any) -> list[str]:
    answer = await client.post(path, json={"callback_url": CALLBACK_URL} | payload)
    assert answer.status_code == 200
    run_ids: list[str] = answer.json()["queued_run_ids"]
    return run_ids


# Triggers


@pytest.mark.parametrize(
    ("path", "environment"),
    [
        ("/hooks/carrier-call", "production"),
        ("/hooks/staging/carrier-call", "staging"),
        ("/hooks/development/carrier-call", "development"),
        ("/webhook/carrier-call", "production"),
    ],
)
async def test_every_form_of_hook_queues_a_run(path: str, environment: str) -> None:
    async with simulated() as (simulator, client):
        answer = await client.post(path, json={"customer_name": "Acme"})
        assert answer.status_code == 200
        body = answer.json()
        assert body["status"] == "queued 1 parallel sequences, 0 failed"
        [run_id] = body["queued_run_ids"]
        assert UUID(run_id).version == 4
        [call] = simulator.calls
        assert (call.slug, call.environment, call.status) == ("carrier-call", environment, 200)
        assert call.run_ids == [run_id]
        assert call.payload == {"customer_name": "Acme"}


async def test_a_payload_may_ask_for_several_runs() -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        run_ids = await trigger(client, simulate={"runs": 3})
        assert len(set(run_ids)) == 3
        await simulator.settled()
        completed = [event["run_id"] for event in receiver.events if event["event_type"] == "completed"]
        assert sorted(completed) == sorted(run_ids)


@pytest.mark.parametrize("key", [None, "", "wrong", "schlüssel"])
async def test_a_wrong_hook_key_starts_nothing(key: str | None) -> None:
    async with simulated(hook_key="hook-key") as (simulator, client):
        headers = {} if key is None else {b"x-api-key": key.encode()}
        answer = await client.post("/hooks/carrier-call", json={}, headers=headers)
        assert answer.status_code == 401
        assert answer.json() == {"message": "invalid X-API-KEY"}
        assert simulator.runs == {}
        assert [(call.status, call.payload) for call in simulator.calls] == [(401, None)]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"x"', b'{"a": NaN}', b'{"a": "\\ud800"}', b"\xff", b"[" * 100_000]
)
async def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    async with simulated() as (simulator, client):
        answer = await client.post("/hooks/carrier-call", content=body)
        assert answer.status_code == 400
        assert "JSON" in answer.json()["message"]
        assert simulator.runs == {}


@pytest.mark.parametrize(
    "simulate",
    [
        "three",
        {"runs": 0},
        {"runs": True},
        {"runs": 1000},
        {"outcome": "lost"},
        {"faults": "gremlins"},
        {"faults": 7},
        {"approval": "yes"},
        {"approval": None},
        {"approval": 1},
        {"approval": {}},
        {"approval": {"require_comment": "no"}},
        {"approval": {"require_comment": True, "reviewers": 2}},
    ],
)
async def test_a_wish_that_makes_no_sense_is_refused(simulate: object) -> None:
    async with simulated() as (simulator, client):
        answer = await client.post("/hooks/carrier-call", json={"simulate": simulate})
        assert answer.status_code == 400
        assert simulator.runs == {}


# Callbacks


async def test_a_call_is_told_from_running_to_completed() -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        [run_id] = await trigger(client, customer_name="Acme Trucking", load_id="LD-7", rate="$2,000.00")
        await simulator.settled()
        assert receiver.kinds[0] == "running"
        assert receiver.kinds[-1] == "completed"
        assert set(receiver.kinds[1:-1]) == {"log"}
        assert 8 <= receiver.kinds.count("log") <= 12
        assert all(set(event) == {"run_id", "event_type", "timestamp", "data"} for event in receiver.events)
        assert {event["run_id"] for event in receiver.events} == {run_id}
        result = receiver.events[-1]["data"]
        assert result["carrier"] == "Acme Trucking"
        assert (result["offered_rate"], result["agreed_rate"]) == (2000, 2075)
        assert result["duration_seconds"] > 0
        logs = [event["data"] for event in receiver.events[1:-1]]
        assert logs[0]["message"].startswith("Agent: ")
        assert "LD-7" in logs[0]["message"]
        assert {log["role"] for log in logs} == {"assistant", "user"}
        assert all(log["message"].startswith(("Agent: ", "Carrier: ")) for log in logs)


@pytest.mark.parametrize("rate", ["free", -5, "nan", 10**9, None])
async def test_a_rate_nobody_would_offer_is_replaced(rate: object) -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        await trigger(client, rate=rate)
        await simulator.settled()
        assert receiver.events[-1]["data"]["offered_rate"] == 1850


async def test_times_of_a_run_only_ever_increase() -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        await trigger(client)
        await simulator.settled()
        stamps = [event["timestamp"] for event in receiver.events]
        assert all(stamp.endswith("Z") and len(stamp) == len("2025-01-06T09:00:00.000Z") for stamp in stamps)
        assert stamps == sorted(set(stamps))
        datetime.fromisoformat(stamps[0])


async def test_what_ties_a_callback_to_its_execution_is_echoed() -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        await trigger(client, execution_id="exec_1", context_id="order_1")
        await simulator.settled()
        assert {(event["execution_id"], event["context_id"]) for event in receiver.events} == {("exec_1", "order_1")}


@pytest.mark.parametrize(
    ("options", "key"),
    [({}, None), ({"hook_key": "h"}, "h"), ({"hook_key": "h", "callback_key": "c"}, "c")],
)
async def test_callbacks_carry_the_callback_key_or_else_the_hooks(options: dict[str, str], key: str | None) -> None:
    async with simulated(receiver := Receiver(), **options) as (simulator, client):
        client.headers["x-api-key"] = "h"
        await trigger(client)
        await simulator.settled()
        assert {headers.get("x-api-key") for headers in receiver.headers} == {key}


@pytest.mark.parametrize("url", [None, "", 5])
async def test_without_a_callback_url_the_run_goes_its_way_in_silence(url: object) -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        [run_id] = await trigger(client, callback_url=url)
        await simulator.settled()
        assert receiver.bodies == []
        assert simulator.runs[run_id].status == "completed"


@pytest.mark.parametrize("trouble", [404, 401, 500, 302])
async def test_a_refused_callback_is_sent_again_as_it_was(trouble: int) -> None:
    async with simulated(receiver := Receiver(trouble, trouble)) as (simulator, client):
        await trigger(client)
        await simulator.settled()
        assert receiver.bodies[0] == receiver.bodies[1] == receiver.bodies[2]
        assert receiver.kinds[2:4] == ["running", "log"]


async def test_a_callback_nobody_takes_is_given_up_and_the_story_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async with simulated(receiver := Receiver(*[500] * 4)) as (simulator, client):
        [run_id] = await trigger(client)
        await simulator.settled()
        assert receiver.kinds[:5] == ["running"] * 4 + ["log"]
        assert receiver.kinds[-1] == "completed"
        assert caplog.messages == [f"gave up the callback running of run {run_id}: status 500"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/nobody", "http://[", "mailto:me", "no url"])
async def test_an_address_that_cannot_be_reached_does_not_stop_the_story(
    url: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with simulated(transport=None) as (simulator, client):
        [run_id] = await trigger(client, callback_url=url)
        await simulator.settled()
        assert simulator.runs[run_id].status == "completed"
        assert len(caplog.messages) == len(simulator.runs[run_id].events)


# Outcomes and faults


@pytest.mark.parametrize("outcome", ["completed", "failed", "canceled"])
async def test_a_payload_may_ask_for_an_outcome(outcome: str) -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        [run_id] = await trigger(client, simulate={"outcome": outcome})
        await simulator.settled()
        assert receiver.kinds[-1] == outcome
        assert simulator.runs[run_id].status == outcome


async def test_fail_ends_the_call_with_an_error() -> None:
    async with simulated(receiver := Receiver(), faults=Faults(fail=True)) as (simulator, client):
        await trigger(client)
        await simulator.settled()
        assert receiver.kinds[-1] == "failed"
        assert receiver.events[-1]["data"]["error"]


async def test_duplicate_sends_every_callback_twice() -> None:
    async with simulated(receiver := Receiver(), faults=Faults(duplicate=True)) as (simulator, client):
        [run_id] = await trigger(client)
        await simulator.settled()
        assert set(Counter(receiver.bodies).values()) == {2}
        assert len(receiver.bodies) == 2 * len(simulator.runs[run_id].events)


async def test_reorder_sends_everything_and_the_end_not_last() -> None:
    async with simulated(receiver := Receiver(), faults=Faults(reorder=True)) as (simulator, client):
        for _ in range(20):
            [run_id] = await trigger(client)
            await simulator.settled()
            sent, told = receiver.events, simulator.runs[run_id].events
            assert sorted(map(str, sent)) == sorted(map(str, told))
            assert sent != told
            assert sent[-1]["event_type"] not in FINAL
            receiver.bodies.clear()


async def test_delay_comes_before_each_callback() -> None:
    async with simulated(receiver := Receiver(), faults=Faults(delay=0.01)) as (simulator, client):
        start = asyncio.get_running_loop().time()
        await trigger(client)
        await simulator.settled()
        assert asyncio.get_running_loop().time() - start >= 0.01 * len(receiver.bodies)


@pytest.mark.parametrize("reorder", [False, True])
async def test_drop_final_leaves_the_end_to_be_asked_for(reorder: bool) -> None:
    faults = Faults(drop_final=True, reorder=reorder)
    async with simulated(receiver := Receiver(), faults=faults) as (simulator, client):
        [run_id] = await trigger(client)
        await simulator.settled()
        assert not FINAL & set(receiver.kinds)
        assert "running" in receiver.kinds
        assert (await client.get(f"/api/v1/runs/{run_id}")).json()["run"]["status"] == "completed"


async def test_a_story_usually_begins_once_the_trigger_is_answered() -> None:
    answered: list[int | None] = []

    async def receiver(scope: Scope, receive: Receive, send: Send) -> None:
        answered.append(simulator.calls[0].status)
        await Response()(scope, receive, send)

    async with simulated(receiver) as (simulator, client):
        await trigger(client)
        await simulator.settled()
        assert set(answered) == {200}


async def test_call_back_first_calls_back_before_the_answer() -> None:
    async with simulated(receiver := Receiver(404), faults=Faults(call_back_first=True)) as (simulator, client):
        [run_id] = await trigger(client)
        assert receiver.events[0]["run_id"] == run_id
        await simulator.settled()
        assert receiver.kinds[:3] == ["running", "running", "log"]
        assert len(receiver.kinds) == len(simulator.runs[run_id].events) + 1


async def test_call_back_first_does_not_wait_for_callbacks_that_never_come() -> None:
    async with simulated(faults=Faults(call_back_first=True)) as (simulator, client):
        [run_id] = await trigger(client, callback_url=None)
        assert simulator.runs[run_id].status == "completed"


@pytest.mark.parametrize("status", [400, 429, 500, 503, 599])
async def test_an_answer_with_an_error_starts_nothing(status: int) -> None:
    async with simulated(faults=Faults.parse(f"answer={status}")) as (simulator, client):
        answer = await client.post("/hooks/carrier-call", json={})
        assert answer.status_code == status
        assert "message" in answer.json()
        assert simulator.runs == {}
        assert simulator.calls[0].status == status


@pytest.mark.parametrize(("answer", "body"), [("garbage", "<html>queued"), ("empty", "")])
async def test_an_answer_that_cannot_be_read_still_means_a_call(answer: str, body: str) -> None:
    async with simulated(receiver := Receiver(), faults=Faults(answer=answer)) as (simulator, client):
        response = await client.post("/hooks/carrier-call", json={"callback_url": CALLBACK_URL})
        assert (response.status_code, response.text) == (200, body)
        await simulator.settled()
        assert [event["run_id"] for event in receiver.events][-1:] == simulator.calls[0].run_ids


async def test_no_runs_is_json_without_run_ids_and_without_a_call() -> None:
    async with simulated(faults=Faults(answer="no_runs")) as (simulator, client):
        response = await client.post("/hooks/carrier-call", json={})
        assert response.status_code == 200
        assert response.json() == {"status": "queued 0 parallel sequences, 1 failed"}
        assert simulator.runs == {}
        assert simulator.calls[0].status == 200


async def test_hang_dials_and_never_answers() -> None:
    async with simulated(receiver := Receiver(), faults=Faults(hang=True)) as (simulator, client):
        waiting = asyncio.create_task(client.post("/hooks/carrier-call", json={"callback_url": CALLBACK_URL}))
        await receiver.has(1)
        await simulator.settled()
        assert receiver.kinds[-1] == "completed"
        assert not waiting.done()
        assert simulator.calls[0].status is None
        assert simulator.calls[0].run_ids == list(simulator.runs)
        await simulator.aclose()
        assert (await waiting).status_code == 503


async def test_a_hung_trigger_ends_when_its_caller_hangs_up() -> None:
    receiver = Receiver()
    simulator = Simulator(pace=0, faults=Faults(hang=True), transport=httpx.ASGITransport(receiver))
    async with serving(lambda _: simulator.app) as (url, _), httpx.AsyncClient(base_url=url) as client:
        waiting = asyncio.create_task(client.post("/hooks/carrier-call", json={"callback_url": CALLBACK_URL}))
        await receiver.has(1)
        waiting.cancel()
        await asyncio.wait([waiting])
    # The server had nothing left to wait for, or this line would not be reached.
    assert simulator.calls[0].status is None


async def test_disconnect_dials_and_breaks_the_answer() -> None:
    simulator = Simulator(pace=0, faults=Faults(disconnect=True))
    async with serving(lambda _: simulator.app) as (url, _), httpx.AsyncClient(base_url=url) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/hooks/carrier-call", json={})
        await simulator.settled()
        assert [run.status for run in simulator.runs.values()] == ["completed"]
        assert simulator.calls[0].status is None


async def test_disconnect_looks_the_same_without_a_server() -> None:
    async with simulated(faults=Faults(disconnect=True)) as (simulator, client):
        with pytest.raises(httpx.ReadError):
            await client.post("/hooks/carrier-call", json={})
        assert len(simulator.runs) == 1


async def test_a_payload_may_ask_for_faults_of_its_own() -> None:
    async with simulated(receiver := Receiver(), faults=Faults(answer="500")) as (simulator, client):
        await trigger(client, simulate={"faults": "drop-final"})
        await simulator.settled()
        assert set(receiver.kinds) == {"running", "log"}


async def test_a_run_keeps_the_faults_it_was_triggered_with() -> None:
    async with simulated(receiver := Receiver(), faults=Faults(drop_final=True)) as (simulator, client):
        await trigger(client)
        simulator.faults = Faults()
        await simulator.settled()
        assert not FINAL & set(receiver.kinds)


def test_faults_are_read_from_a_line() -> None:
    assert Faults.parse("") == Faults()
    assert Faults.parse(" duplicate, reorder,delay=2,answer=500,") == Faults(
        duplicate=True, reorder=True, delay=2.0, answer="500"
    )
    assert Faults.parse("drop-final=false,call_back_first=true") == Faults(call_back_first=True)


def test_faults_are_read_from_json() -> None:
    assert Faults.read({"delay": 1, "answer": 429, "fail": True}) == Faults(delay=1.0, answer="429", fail=True)
    assert Faults.read({"answer": None, "hang": False}) == Faults()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("duplicate,gremlins", "unknown fault: gremlins"),
        ("delay=soon", "delay must be"),
        ("delay=-1", "delay must be"),
        ("delay=inf", "delay must be"),
        ("delay", "delay must be"),
        ("answer=200", "answer must be"),
        ("answer", "answer must be"),
        ("hang=perhaps", "hang is either"),
    ],
)
def test_a_fault_that_makes_no_sense_is_named(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Faults.parse(text)


@pytest.mark.parametrize("given", [{"delay": 10**400}, {"delay": []}, {"fail": []}, ["duplicate"]])
def test_faults_of_the_wrong_type_are_refused(given: object) -> None:
    with pytest.raises(ValueError, match=r"must be|either"):
        Faults.read(given)


# The Platform API, v1


async def test_the_nested_shape_holds_the_whole_call() -> None:
    async with simulated() as (simulator, client):
        [run_id] = await trigger(client, customer_phone="+15550100")
        await simulator.settled()
        body = (await client.get(f"/api/v1/runs/{run_id}")).json()
        assert set(body) == {"run", "sessions", "outputs", "issues", "intermediates", "version"}
        assert (body["run"]["id"], body["run"]["status"]) == (run_id, "completed")
        [session] = body["sessions"]
        assert (session["status"], session["user_number"]) == ("completed", "+15550100")
        assert session["duration"] == simulator.runs[run_id].events[-1]["data"]["duration_seconds"]
        assert [message["role"] for message in session["messages"][:2]] == ["assistant", "user"]
        assert {message["session_id"] for message in session["messages"]} == {session["id"]}
        assert len({message["id"] for message in session["messages"]}) == len(session["messages"])
        [output] = body["outputs"]
        assert output["data"] == simulator.runs[run_id].events[-1]["data"]
        assert body["issues"] == []
        assert body["version"]["id"] == body["run"]["version_id"]


async def test_the_flat_shape_holds_the_same_call() -> None:
    async with simulated(shape="flat") as (simulator, client):
        [run_id] = await trigger(client, load_id="LD-7")
        await simulator.settled()
        flat = (await client.get(f"/api/v1/runs/{run_id}")).json()
        nested = (await client.get(f"/api/v1/runs/{run_id}?shape=nested")).json()
        assert "run" not in flat
        assert (flat["id"], flat["status"]) == (run_id, "completed")
        assert flat["completed_at"] == simulator.runs[run_id].events[-1]["timestamp"]
        hook, session, result = flat["events"]
        assert [hook["type"], session["type"], result["type"]] == ["action", "session", "action"]
        assert hook["output"]["load_id"] == "LD-7"
        assert session["messages"] == nested["sessions"][0]["messages"]
        assert (session["sip_code"], session["sip_reason"]) == ("200", "OK")
        assert result["output"] == nested["outputs"][0]["data"]
        assert (await client.get(f"/api/v1/runs/{run_id}?shape=flat")).json() == flat


async def test_reading_a_run_again_gives_the_same_ids() -> None:
    async with simulated() as (simulator, client):
        [run_id] = await trigger(client)
        await simulator.settled()
        first, again = [(await client.get(f"/api/v1/runs/{run_id}")).json() for _ in range(2)]
        assert first == again


async def test_a_failed_run_has_an_issue_and_no_output() -> None:
    async with simulated() as (simulator, client):
        [run_id] = await trigger(client, simulate={"outcome": "failed"})
        await simulator.settled()
        body = (await client.get(f"/api/v1/runs/{run_id}")).json()
        assert body["outputs"] == []
        assert [issue["type"] for issue in body["issues"]] == ["run"]
        [session] = (await client.get(f"/api/v2/runs/{run_id}/sessions")).json()["data"]
        assert (session["status"], session["failure_reason"]) == ("failed", "call_dropped")
        assert session["sip_code"] == "480"


async def test_the_status_follows_the_story() -> None:
    async with simulated(receiver := Receiver(), pace=60) as (simulator, client):
        [run_id] = await trigger(client)
        body = (await client.get(f"/api/v1/runs/{run_id}")).json()
        assert body["run"]["status"] == "scheduled"
        assert body["sessions"] == []
        assert (await client.get(f"/api/v2/runs/{run_id}")).json()["status"] == "not_started"

        simulator.pace = 0.05
        [run_id] = await trigger(client)
        await receiver.has(3)
        body = (await client.get(f"/api/v1/runs/{run_id}")).json()
        assert body["run"]["status"] == "running"
        assert (body["sessions"][0]["status"], body["sessions"][0]["duration"]) == ("in-progress", None)
        assert 1 <= len(body["sessions"][0]["messages"]) < 8
        assert (await client.get(f"/api/v2/runs/{run_id}")).json()["status"] == "running"


async def test_runs_are_listed_as_a_bare_array_newest_first() -> None:
    async with simulated() as (simulator, client):
        made = [(await trigger(client, path))[0] for path in ("/hooks/a", "/hooks/a", "/hooks/b")]
        await trigger(client, "/hooks/b", simulate={"outcome": "failed"})
        await simulator.settled()
        [failed] = (await client.get("/api/v1/runs", params={"status": "failed"})).json()
        assert failed["data"]["reason"] == "call_dropped"

        async def ids(**params: Any) -> list[str]:
            rows = (await client.get("/api/v1/runs", params={"status": "completed"} | params)).json()
            return [row["id"] for row in rows]

        assert await ids() == made[::-1]
        assert await ids(sort="asc") == made
        assert await ids(limit=1, offset=1) == made[1:2]
        assert await ids(use_case_id="a") == [made[1], made[0]]
        assert await ids(use_case_id=failed["use_case_id"]) == [made[2]]


@pytest.mark.parametrize("query", ["limit=0", "limit=5001", "limit=all", "offset=-1", "sort=up", "limit=" + "9" * 5000])
async def test_a_list_query_that_makes_no_sense_is_refused(query: str) -> None:
    async with simulated() as (_, client):
        answer = await client.get(f"/api/v1/runs?{query}")
        assert answer.status_code == 400
        assert "message" in answer.json()


async def test_an_unknown_shape_is_refused() -> None:
    async with simulated() as (_, client):
        [run_id] = await trigger(client)
        assert (await client.get(f"/api/v1/runs/{run_id}?shape=round")).status_code == 400


async def test_recordings_are_fresh_links_that_play() -> None:
    async with simulated() as (simulator, client):
        [run_id] = await trigger(client)
        path = f"/api/v1/runs/{run_id}/recordings"
        assert (await client.get(path)).json() == {"recordings": []}
        await simulator.settled()
        [first], [again] = [(await client.get(path)).json()["recordings"] for _ in range(2)]
        assert first["session_id"] == again["session_id"] == simulator.runs[run_id].session_id
        assert first["url"] != again["url"]
        assert first["url"].startswith("http://sim.test/")
        sound = await client.get(first["url"])
        assert sound.headers["content-type"] == "audio/wav"
        assert sound.content.startswith(b"RIFF")
        assert len((await client.get(path, params={"session_id": first["session_id"]})).json()["recordings"]) == 1
        assert (await client.get(path, params={"session_id": "another"})).json() == {"recordings": []}


# The Platform API, v2


async def test_v2_has_its_own_word_for_a_completed_run() -> None:
    async with simulated() as (simulator, client):
        [run_id] = await trigger(client)
        await simulator.settled()
        body = (await client.get(f"/api/v2/runs/{run_id}")).json()
        assert (body["id"], body["status"]) == (run_id, "succeeded")
        assert body["data"]["outcome"] == "load_booked"


async def test_v2_lists_sessions_and_their_messages() -> None:
    async with simulated() as (simulator, client):
        [run_id] = await trigger(client)
        await simulator.settled()
        sessions = (await client.get(f"/api/v2/runs/{run_id}/sessions")).json()
        [session] = sessions["data"]
        assert session["status"] == "completed"
        assert session["failure_reason"] is None
        assert sessions["pagination"] == {
            "page": 1,
            "page_size": 50,
            "total_pages": 1,
            "total_records": 1,
            "has_next_page": False,
            "has_previous_page": False,
        }
        path = f"/api/v2/sessions/{session['id']}/messages"
        everything = (await client.get(path)).json()["data"]
        v1 = (await client.get(f"/api/v1/runs/{run_id}")).json()["sessions"][0]["messages"]
        assert [message["id"] for message in everything] == [message["id"] for message in v1]
        second = (await client.get(path, params={"page": 2, "page_size": 4})).json()
        assert second["data"] == everything[4:8]
        assert second["pagination"]["has_next_page"]
        assert second["pagination"]["has_previous_page"]


async def test_a_run_can_be_canceled() -> None:
    async with simulated(receiver := Receiver(), pace=0.05) as (simulator, client):
        [run_id] = await trigger(client)
        await receiver.has(2)
        answer = await client.post(f"/api/v2/runs/{run_id}/cancel", json={})
        assert (answer.status_code, answer.json()) == (200, {"status": "canceled"})
        assert (await client.get(f"/api/v1/runs/{run_id}")).json()["run"]["status"] == "canceled"
        await simulator.settled()
        assert receiver.kinds[-1] == "canceled"
        assert receiver.kinds.count("canceled") == 1
        assert "completed" not in receiver.kinds
        assert receiver.events == simulator.runs[run_id].events


async def test_a_run_can_be_canceled_before_it_runs() -> None:
    async with simulated(receiver := Receiver(), pace=60) as (simulator, client):
        [run_id] = await trigger(client)
        await client.post(f"/api/v2/runs/{run_id}/cancel", json={})
        await simulator.settled()
        assert receiver.kinds == ["canceled"]


async def test_a_canceled_run_keeps_its_faults() -> None:
    async with simulated(receiver := Receiver(), pace=60, faults=Faults(reorder=True, drop_final=True)) as (
        simulator,
        client,
    ):
        [run_id] = await trigger(client)
        await client.post(f"/api/v2/runs/{run_id}/cancel", json={})
        await simulator.settled()
        assert receiver.kinds == []
        assert simulator.runs[run_id].status == "canceled"


@pytest.mark.parametrize("outcome", ["completed", "canceled"])
async def test_a_run_that_is_over_cannot_be_canceled(outcome: str) -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        [run_id] = await trigger(client, simulate={"outcome": outcome})
        await simulator.settled()
        sent = len(receiver.bodies)
        answer = await client.post(f"/api/v2/runs/{run_id}/cancel", json={})
        assert answer.status_code == 409
        assert answer.json() == {
            "error": "Conflict",
            "message": f"run is already {outcome}",
            "statusCode": 409,
        }
        await simulator.settled()
        assert len(receiver.bodies) == sent


async def test_canceling_demands_a_json_body() -> None:
    async with simulated(pace=60) as (simulator, client):
        [run_id] = await trigger(client)
        headers = {"content-type": "application/json"}
        answer = await client.post(f"/api/v2/runs/{run_id}/cancel", content=b"", headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"] == "Bad Request"
        assert simulator.runs[run_id].status == "scheduled"


# Keys, errors and counters


@pytest.mark.parametrize(
    "authorization", [None, "api-key", "Basic api-key", "Bearer wrong", "Bearer", "Bearer api-key "]
)
async def test_the_platform_api_wants_its_key(authorization: str | None) -> None:
    async with simulated(api_key="api-key") as (simulator, client):
        [run_id] = await trigger(client)
        headers = {} if authorization is None else {"authorization": authorization}
        for path in ("/api/v1/runs", f"/api/v1/runs/{run_id}", f"/api/v1/runs/{run_id}/recordings"):
            answer = await client.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json() == {"message": "invalid or revoked API key"}
        answer = await client.post(f"/api/v2/runs/{run_id}/cancel", json={}, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"] == "Unauthorized"
        await simulator.settled()
        assert simulator.runs[run_id].status == "completed"


async def test_the_right_key_opens_the_platform_api() -> None:
    async with simulated(api_key="api-key") as (_, client):
        [run_id] = await trigger(client)
        for scheme in ("Bearer", "bearer"):
            answer = await client.get(f"/api/v1/runs/{run_id}", headers={"authorization": f"{scheme} api-key"})
            assert answer.status_code == 200


@pytest.mark.parametrize("path", ["runs/nobody", "runs/nobody/recordings"])
async def test_v1_does_not_know_a_run_it_has_not_queued(path: str) -> None:
    async with simulated() as (_, client):
        answer = await client.get(f"/api/v1/{path}")
        assert (answer.status_code, answer.json()) == (404, {"message": "run not found"})


@pytest.mark.parametrize("path", ["runs/nobody", "runs/nobody/sessions", "sessions/nobody/messages", "elsewhere"])
async def test_v2_says_not_found_in_its_own_way(path: str) -> None:
    async with simulated() as (_, client):
        await trigger(client)
        answer = await client.get(f"/api/v2/{path}")
        assert answer.status_code == 404
        assert answer.json()["error"] == "Not Found"
        assert answer.json()["statusCode"] == 404


async def test_requests_to_the_platform_api_are_counted() -> None:
    async with simulated(api_key="api-key") as (simulator, client):
        [run_id] = await trigger(client)
        for _ in range(3):
            await client.get(f"/api/v1/runs/{run_id}")
        await client.get("/api/v1/runs", headers={"authorization": "Bearer api-key"})
        assert [(request.method, request.run_id) for request in simulator.requests] == [
            *[("GET", run_id)] * 3,
            ("GET", None),
        ]
        times = [request.at for request in simulator.requests]
        assert times == sorted(times)
        shown = (await client.get("/simulator/requests")).json()
        assert shown["total"] == 4
        assert shown["by_path"] == {f"/api/v1/runs/{run_id}": 3, "/api/v1/runs": 1}
        assert shown["by_run"] == {run_id: 3}
        assert [datetime.fromisoformat(request["at"]) for request in shown["requests"]] == times


# Control


async def test_calls_are_shown_without_the_key() -> None:
    async with simulated(hook_key="hook-key") as (simulator, client):
        headers = {"x-api-key": "hook-key", "user-agent": "tests", "cookie": "none of our business"}
        [run_id] = (await client.post("/hooks/a", json={"x": 1}, headers=headers)).json()["queued_run_ids"]
        await client.post("/hooks/b", json={})
        assert simulator.calls[0].headers["x-api-key"] == "hook-key"
        answer = await client.get("/simulator/calls")
        first, second = answer.json()
        assert "hook-key" not in answer.text
        assert first["headers"] == {"content-type": "application/json", "user-agent": "tests", "x-api-key": "***"}
        assert (first["slug"], first["payload"], first["run_ids"]) == ("a", {"x": 1}, [run_id])
        assert (second["slug"], second["payload"], second["status"]) == ("b", None, 401)


@pytest.mark.parametrize(
    ("body", "faults"),
    [
        ({"faults": "duplicate,delay=1"}, Faults(duplicate=True, delay=1.0)),
        ({"faults": {"hang": True}}, Faults(hang=True)),
        ({"reorder": True, "answer": "garbage"}, Faults(reorder=True, answer="garbage")),
        ({}, Faults()),
    ],
)
async def test_faults_can_be_set_from_another_process(body: dict[str, object], faults: Faults) -> None:
    async with simulated(faults=Faults(fail=True)) as (simulator, client):
        answer = await client.put("/simulator/faults", json=body)
        assert answer.status_code == 200
        assert simulator.faults == faults
        assert answer.json()["delay"] == faults.delay


@pytest.mark.parametrize("body", [{"gremlins": True}, {"faults": "gremlins"}, {"faults": 7}])
async def test_unknown_faults_are_refused_and_change_nothing(body: dict[str, object]) -> None:
    async with simulated(faults=Faults(fail=True)) as (simulator, client):
        answer = await client.put("/simulator/faults", json=body)
        assert answer.status_code == 400
        assert simulator.faults == Faults(fail=True)


async def test_the_app_runs_by_itself_and_says_so() -> None:
    async with serving(lambda _: create_app(pace=60)) as (url, _), httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/simulator/healthz")).json() == {"status": "ok"}
        await trigger(client, callback_url=None)


async def test_closing_ends_every_story() -> None:
    async with simulated(pace=60) as (simulator, client):
        [run_id] = await trigger(client)
        await asyncio.wait_for(simulator.aclose(), 5)
        assert simulator.runs[run_id].status == "scheduled"
        await simulator.aclose()  # a second time changes nothing


# CloudEvents


@pytest.mark.parametrize(("outcome", "said"), [("completed", "completed"), ("failed", "failed")])
async def test_cloud_events_tell_of_the_session_beside_the_callbacks(outcome: str, said: str) -> None:
    async with simulated(receiver := Receiver(), api_key="k") as (simulator, client):
        [run_id] = await trigger(client, simulate={"cloud_events": True, "outcome": outcome})
        await simulator.settled()
    events = [event for event in receiver.events if "specversion" in event]
    assert [event["data"]["status"]["current"] for event in events] == ["in-progress", said]
    assert {event["type"] for event in events} == {"session.status_changed"}
    assert {event["data"]["run_id"] for event in events} == {run_id}
    assert len({event["id"] for event in events}) == 2
    # The session ends before the run is said to.
    assert receiver.events.index(events[-1]) == len(receiver.events) - 2
    kinds = {headers["content-type"] for headers in receiver.headers}
    assert kinds == {"application/json", "application/cloudevents+json"}


async def test_cloud_events_are_sent_twice_by_a_fault_and_not_dropped_with_the_end() -> None:
    faults = Faults(duplicate=True, drop_final=True)
    async with simulated(receiver := Receiver(), cloud_events=True, faults=faults) as (simulator, client):
        await trigger(client)
        await simulator.settled()
    told = Counter(event["id"] for event in receiver.events if "specversion" in event)
    assert list(told.values()) == [2, 2]
    assert not FINAL & {event.get("event_type") for event in receiver.events}


async def test_a_wish_for_cloud_events_is_true_or_false() -> None:
    async with simulated() as (_, client):
        answer = await client.post("/hooks/x", json={"simulate": {"cloud_events": "yes"}})
    assert answer.status_code == 400


# Faults of the Platform API


async def about(client: httpx.AsyncClient, run_id: str) -> list[int]:
    paths = [f"/api/v1/runs/{run_id}", f"/api/v1/runs/{run_id}/recordings", f"/api/v2/runs/{run_id}"]
    return [(await client.get(path)).status_code for path in paths]


async def test_the_api_answers_about_a_run_as_it_is_told_to() -> None:
    async with simulated() as (simulator, client):
        [run_id] = await trigger(client, simulate={"faults": "api_answer=503"})
        [other] = await trigger(client)
        await simulator.settled()
        assert await about(client, run_id) == [503, 503, 503]
        assert (await client.post(f"/api/v2/runs/{run_id}/cancel", json={})).status_code == 503
        assert await about(client, other) == [200, 200, 200]


async def test_a_run_that_is_new_is_not_known_for_a_while() -> None:
    async with simulated() as (simulator, client):
        [run_id] = await trigger(client, simulate={"faults": {"api_missing": 600}})
        await simulator.settled()
        assert await about(client, run_id) == [404, 404, 404]
        simulator.runs[run_id].created_at -= timedelta(seconds=601)
        assert await about(client, run_id) == [200, 200, 200]


async def test_a_slow_api_answers_in_the_end_and_does_not_hold_up_the_close() -> None:
    simulator = Simulator(pace=0, transport=httpx.ASGITransport(Receiver()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(simulator.app), base_url="http://sim.test") as client:
        [run_id] = await trigger(client, simulate={"faults": "api_delay=600"})
        waiting = asyncio.create_task(client.get(f"/api/v1/runs/{run_id}"))
        async with asyncio.timeout(5):
            while not simulator.requests:  # noqa: ASYNC110  # it tells nobody
                await asyncio.sleep(0.001)
            await simulator.aclose()
            assert (await waiting).status_code == 200


@pytest.mark.parametrize(
    "fault",
    ["api_delay=-1", "api_missing=soon", "api_answer=garbage", "api_answer=200", "resume_answer=empty"],
)
def test_an_api_fault_that_makes_no_sense_is_refused(fault: str) -> None:
    with pytest.raises(ValueError, match=fault.split("=", maxsplit=1)[0]):
        Faults.parse(fault)


# Approvals


async def decide(client: httpx.AsyncClient, resume_url: str, decision: str, **more: Any) -> int:
    return (await client.post(resume_url, json={"decision": decision} | more)).status_code


async def test_a_call_asks_for_an_approval_half_way_and_goes_on_with_it() -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        [run_id] = await trigger(client, execution_id="exec_1", context_id="order_1", simulate={"approval": True})
        [asked] = await receiver.asked()
        half = ["running", *["log"] * 6, "pending_approval"]
        assert receiver.kinds == half
        assert set(asked) == {
            *("run_id", "event_type", "timestamp", "data", "resume_url"),
            *("execution_id", "context_id"),
        }
        assert (asked["run_id"], asked["execution_id"], asked["context_id"]) == (run_id, "exec_1", "order_1")
        assert (await client.get(f"/api/v1/runs/{run_id}")).json()["run"]["status"] == "running"
        assert (await client.get(f"/api/v2/runs/{run_id}")).json()["status"] == "running"
        assert receiver.kinds == half
        answer = await client.post(asked["resume_url"], json={"decision": "approved", "comment": "Good"})
        assert (answer.status_code, answer.json()) == (200, {"status": "approved"})
        await simulator.settled()
        assert receiver.kinds == [*half, *["log"] * 5, "completed"]
        assert receiver.events == simulator.runs[run_id].events


async def test_an_approval_is_asked_about_the_load() -> None:
    async with simulated(receiver := Receiver()) as (_, client):
        await trigger(client, load_id="LD-7", customer_name="Acme", rate=2000, simulate={"approval": True})
        [asked] = await receiver.asked()
    data = asked["data"]
    [row] = data["rows"]
    assert (row["reference"], row["carrier"], row["agreed_rate"]) == ("LD-7", "Acme", 2075)
    assert "$2,075" in row["generated_content"]
    assert row["compliance_status"] == "passed"
    assert data["displayFields"] == list(row)
    assert set(data) == {"rows", "metadata", "displayFields"}
    metadata = data["metadata"]
    assert "LD-7" in metadata.pop("title")
    assert "Acme" in metadata.pop("description")
    assert metadata == {"totalRows": 1, "allowBulkApproval": True, "requireComment": False}


async def test_an_approval_is_asked_about_each_row_of_the_payload() -> None:
    rows = [{"customerId": "C1", "name": "Ann"}, {"customerId": "C2", "phone": "+15550100"}]
    async with simulated(receiver := Receiver()) as (_, client):
        await trigger(client, csvData=rows, simulate={"approval": True})
        [asked] = await receiver.asked()
    data = asked["data"]
    contents = [row.pop("generated_content") for row in data["rows"]]
    assert "Ann" in contents[0]
    assert contents[0] != contents[1]
    assert data["rows"] == [row | {"compliance_status": "passed"} for row in rows]
    assert data["metadata"]["totalRows"] == 2
    assert set(data["displayFields"]) == {"customerId", "name", "phone", "generated_content", "compliance_status"}
    assert len(data["displayFields"]) == 5


@pytest.mark.parametrize("rows", [[], ["C1"], [{"name": "Ann"}, 7], {"name": "Ann"}, "name\nAnn", None])
async def test_rows_that_are_none_are_not_asked_about(rows: object) -> None:
    async with simulated(receiver := Receiver()) as (_, client):
        await trigger(client, csvData=rows, load_id="LD-7", simulate={"approval": True})
        [asked] = await receiver.asked()
    assert [row["reference"] for row in asked["data"]["rows"]] == ["LD-7"]


@pytest.mark.parametrize("required", [True, False])
async def test_an_approval_may_require_a_comment(required: bool) -> None:
    async with simulated(receiver := Receiver()) as (_, client):
        await trigger(client, simulate={"approval": {"require_comment": required}})
        [asked] = await receiver.asked()
    assert asked["data"]["metadata"]["requireComment"] is required


async def test_every_call_asks_for_an_approval_if_the_simulator_is_set_so() -> None:
    async with simulated(receiver := Receiver(), approval=True) as (simulator, client):
        [run_id] = await trigger(client, simulate={"approval": False})
        await simulator.settled()
        assert simulator.runs[run_id].status == "completed"
        assert "pending_approval" not in receiver.kinds
        await trigger(client)
        await receiver.asked()


@pytest.mark.parametrize("outcome", ["failed", "canceled"])
async def test_a_call_that_breaks_off_asks_before_it_does(outcome: str) -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        await trigger(client, simulate={"approval": True, "outcome": outcome})
        [asked] = await receiver.asked()
        assert await decide(client, asked["resume_url"], "approved") == 200
        await simulator.settled()
        assert receiver.kinds == ["running", *["log"] * 3, "pending_approval", *["log"] * 2, outcome]


@pytest.mark.parametrize("comment", [{"comment": "Too much"}, {}])
async def test_a_rejection_ends_the_run(comment: dict[str, str]) -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        [run_id] = await trigger(client, simulate={"approval": True})
        [asked] = await receiver.asked()
        assert await decide(client, asked["resume_url"], "rejected", **comment) == 200
        assert (await client.get(f"/api/v1/runs/{run_id}")).json()["run"]["status"] == "canceled"
        await simulator.settled()
        assert receiver.kinds == ["running", *["log"] * 6, "pending_approval", "canceled"]
        seconds = simulator.runs[run_id].duration
        assert seconds > 0
        reason = {"reason": "rejected", "comment": comment.get("comment"), "duration_seconds": seconds}
        assert receiver.events[-1]["data"] == reason


async def test_each_run_waits_for_a_decision_of_its_own() -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        await trigger(client, simulate={"approval": True, "runs": 2})
        first, second = await receiver.asked(2)
        assert await decide(client, first["resume_url"], "rejected") == 200
        assert await decide(client, second["resume_url"], "approved") == 200
        await simulator.settled()
        assert simulator.runs[first["run_id"]].status == "canceled"
        assert simulator.runs[second["run_id"]].status == "completed"


@pytest.mark.parametrize(("decision", "end"), [("approved", "completed"), ("rejected", "canceled")])
async def test_a_decision_may_come_before_the_callback_that_asks_is_answered(decision: str, end: str) -> None:
    told: list[str] = []

    async def receiver(scope: Scope, receive: Receive, send: Send) -> None:
        event = await Request(scope, receive).json()
        told.append(event["event_type"])
        if "resume_url" in event:
            assert await decide(client, event["resume_url"], decision) == 200
        await Response()(scope, receive, send)

    async with simulated(receiver, approval=True) as (simulator, client):
        await trigger(client)
        await simulator.settled()
    assert told[-1] == end
    assert told.count(end) == told.count("pending_approval") == 1


async def test_a_decision_goes_where_the_trigger_went() -> None:
    async with simulated(receiver := Receiver()) as (_, client):
        [run_id] = await trigger(client, "https://other.test:8443/hooks/a", simulate={"approval": True})
        [asked] = await receiver.asked()
    assert asked["resume_url"].startswith(f"https://other.test:8443/resume/{run_id}/")


async def test_a_run_can_be_canceled_while_it_waits_for_a_decision() -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        [run_id] = await trigger(client, simulate={"approval": True})
        [asked] = await receiver.asked()
        answer = await client.post(f"/api/v2/runs/{run_id}/cancel", json={})
        assert (answer.status_code, answer.json()) == (200, {"status": "canceled"})
        await simulator.settled()
        assert receiver.kinds[-2:] == ["pending_approval", "canceled"]
        assert receiver.events[-1]["data"]["reason"] == "canceled_by_request"
        for decision in ("approved", "rejected"):
            answer = await client.post(asked["resume_url"], json={"decision": decision})
            assert (answer.status_code, answer.json()) == (409, {"message": "run is already canceled"})
        await simulator.settled()
        assert receiver.kinds.count("canceled") == 1


async def test_closing_waits_for_no_decision() -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        [run_id] = await trigger(client, simulate={"approval": True})
        await receiver.asked()
        await asyncio.wait_for(simulator.aclose(), 5)
        assert simulator.runs[run_id].status == "running"


@pytest.mark.parametrize(("decision", "opposite"), [("approved", "rejected"), ("rejected", "approved")])
async def test_the_first_decision_counts(decision: str, opposite: str) -> None:
    async with simulated(receiver := Receiver(), pace=0.01) as (simulator, client):
        [run_id] = await trigger(client, simulate={"approval": True})
        [asked] = await receiver.asked()

        async def answers() -> list[int]:
            return [await decide(client, asked["resume_url"], each) for each in (decision, opposite, decision)]

        assert await answers() == [200, 409, 200]
        await simulator.settled()
        told = list(simulator.runs[run_id].events)
        assert told[-1]["event_type"] == {"approved": "completed", "rejected": "canceled"}[decision]
        # Nor does it change when the run is over.
        assert await answers() == [200, 409, 200]
        await simulator.settled()
        assert simulator.runs[run_id].events == receiver.events == told


@pytest.mark.parametrize("key", [None, "", "wrong", "schlüssel", "callback-key"])
async def test_a_decision_without_the_hooks_key_is_not_taken(key: str | None) -> None:
    async with simulated(receiver := Receiver(), hook_key="hook-key", callback_key="callback-key") as (_, client):
        hook_key = {"x-api-key": "hook-key"}
        await client.post(
            "/hooks/a", json={"callback_url": CALLBACK_URL, "simulate": {"approval": True}}, headers=hook_key
        )
        [asked] = await receiver.asked()
        headers = {} if key is None else {b"x-api-key": key.encode()}
        answer = await client.post(asked["resume_url"], json={"decision": "rejected"}, headers=headers)
        assert (answer.status_code, answer.json()) == (401, {"message": "invalid X-API-KEY"})
        answer = await client.post(asked["resume_url"], json={"decision": "approved"}, headers=hook_key)
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b'["approved"]', b"{}", b'{"decision": "maybe"}', b'{"decision": true}', b'{"decision": []}']
)
async def test_a_decision_that_is_none_is_refused(body: bytes) -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        await trigger(client, simulate={"approval": True})
        [asked] = await receiver.asked()
        answer = await client.post(asked["resume_url"], content=body)
        assert answer.status_code == 400
        assert "message" in answer.json()
        assert await decide(client, asked["resume_url"], "approved") == 200
        await simulator.settled()
        assert receiver.kinds[-1] == "completed"


async def test_a_decision_that_nobody_asked_for_is_not_found() -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        [without] = await trigger(client, callback_url=None)
        [run_id] = await trigger(client, simulate={"approval": True})
        [asked] = await receiver.asked()
        token = asked["resume_url"].rpartition("/")[2]
        for path in (f"nobody/{token}", f"{without}/{token}", f"{without}/None", f"{run_id}/wrong"):
            assert await decide(client, f"/resume/{path}", "rejected") == 404
        assert await decide(client, asked["resume_url"], "approved") == 200
        await simulator.settled()
        assert {run.status for run in simulator.runs.values()} == {"completed"}


async def test_decisions_are_shown_without_the_key_taken_or_not() -> None:
    async with simulated(receiver := Receiver(), hook_key="hook-key") as (simulator, client):
        client.headers.update({"x-api-key": "hook-key", "user-agent": "tests"})
        [run_id] = await trigger(client, simulate={"approval": True})
        [asked] = await receiver.asked()
        decision = {"decision": "approved", "comment": "Good"}
        requests: list[tuple[str, dict[str, Any]]] = [
            (asked["resume_url"], {"json": decision, "headers": {"x-api-key": "wrong"}}),
            (asked["resume_url"], {"content": b"{"}),
            ("/resume/nobody/token", {"json": decision}),
            (asked["resume_url"], {"json": decision, "headers": {"idempotency-key": "once", "cookie": "none"}}),
            (asked["resume_url"], {"json": {"decision": "rejected"}}),
        ]
        for url, request in requests:
            await client.post(url, **request)
        assert [(decision.run_id, decision.body, decision.status) for decision in simulator.decisions] == [
            (run_id, None, 401),
            (run_id, None, 400),
            ("nobody", decision, 404),
            (run_id, decision, 200),
            (run_id, {"decision": "rejected"}, 409),
        ]
        taken = simulator.decisions[3]
        assert taken.headers == {
            "content-type": "application/json",
            "idempotency-key": "once",
            "user-agent": "tests",
            "x-api-key": "hook-key",
        }
        times = [decision.at for decision in simulator.decisions]
        assert times == sorted(times)
        answer = await client.get("/simulator/decisions")
        assert "hook-key" not in answer.text
        assert len(answer.json()) == 5
        assert answer.json()[3] == {
            "run_id": run_id,
            "headers": taken.headers | {"x-api-key": "***"},
            "at": taken.at.isoformat(),
            "body": decision,
            "status": 200,
        }


async def test_a_decision_is_answered_as_the_fault_wants_it_and_not_taken() -> None:
    async with simulated(receiver := Receiver()) as (simulator, client):
        [run_id] = await trigger(client, simulate={"approval": True, "faults": "resume_answer=503"})
        [asked] = await receiver.asked()
        assert await decide(client, asked["resume_url"], "rejected", comment="No") == 503
        [decision] = simulator.decisions
        assert (decision.body, decision.status) == ({"decision": "rejected", "comment": "No"}, 503)
        simulator.runs[run_id].faults = Faults()
        assert await decide(client, asked["resume_url"], "approved") == 200
        await simulator.settled()
        assert receiver.kinds[-1] == "completed"


async def test_an_approval_is_asked_for_at_once_though_the_rest_is_reordered() -> None:
    async with simulated(receiver := Receiver(), faults=Faults(reorder=True)) as (simulator, client):
        [run_id] = await trigger(client, simulate={"approval": True})
        [asked] = await receiver.asked()
        assert receiver.kinds == ["pending_approval"]
        assert await decide(client, asked["resume_url"], "approved") == 200
        await simulator.settled()
        assert sorted(map(str, receiver.events)) == sorted(map(str, simulator.runs[run_id].events))
        assert receiver.kinds[-1] not in FINAL


async def test_a_rejected_run_keeps_its_faults() -> None:
    async with simulated(receiver := Receiver(), faults=Faults(duplicate=True, drop_final=True)) as (simulator, client):
        [run_id] = await trigger(client, simulate={"approval": True})
        first, second = await receiver.asked(2)
        assert first == second
        assert await decide(client, first["resume_url"], "rejected") == 200
        await simulator.settled()
        assert receiver.kinds[-2:] == ["pending_approval"] * 2
        assert simulator.runs[run_id].status == "canceled"


@pytest.mark.parametrize("quiet", [{"simulate": {"faults": "silent"}}, {"callback_url": None}])
async def test_an_approval_that_nobody_hears_of_is_waited_for_until_the_run_is_canceled(quiet: dict[str, Any]) -> None:
    async with simulated(receiver := Receiver(), approval=True) as (simulator, client):
        [run_id] = await trigger(client, **quiet)
        run = simulator.runs[run_id]
        async with asyncio.timeout(5):
            await run.called_back.wait()
        assert [event["event_type"] for event in run.events][-1] == "pending_approval"
        await client.post(f"/api/v2/runs/{run_id}/cancel", json={})
        await simulator.settled()
        assert run.status == "canceled"
        assert receiver.bodies == []


async def test_call_back_first_does_not_wait_for_a_decision() -> None:
    async with simulated(approval=True, faults=Faults(call_back_first=True)) as (simulator, client):
        async with asyncio.timeout(5):
            [run_id] = await trigger(client, callback_url=None)
        assert simulator.runs[run_id].status == "running"


@pytest.mark.parametrize(("decision", "said"), [("approved", "completed"), ("rejected", "canceled")])
async def test_cloud_events_tell_nothing_of_an_approval(decision: str, said: str) -> None:
    async with simulated(receiver := Receiver(), approval=True, cloud_events=True) as (simulator, client):
        await trigger(client)
        [asked] = await receiver.asked()
        assert await decide(client, asked["resume_url"], decision) == 200
        await simulator.settled()
    events = [event for event in receiver.events if "specversion" in event]
    assert [event["data"]["status"]["current"] for event in events] == ["in-progress", said]


async def test_the_command_asks_for_approvals_if_told_to() -> None:
    with (
        local.environment(HAPPYROBOT_X_API_KEY="hook-key"),
        local.child("simulate", "--port", "0", "--pace", "0", "--approval") as address,
    ):
        receiver = Receiver()
        async with (
            serving(lambda _: Starlette(routes=[Mount("/", receiver)])) as (callback_url, _),
            httpx.AsyncClient(base_url=address, headers={"x-api-key": "hook-key"}) as client,
        ):
            await trigger(client, callback_url=callback_url)
            [asked] = await receiver.asked()
            assert asked["resume_url"].startswith(f"{address}/resume/")
            assert await decide(client, asked["resume_url"], "approved") == 200
            await receiver.has(14)
            assert receiver.kinds[-1] == "completed"
