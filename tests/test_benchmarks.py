"""The benchmarks: that what is compared does what it says, and that what is counted is there. Nothing is measured."""

import asyncio
import importlib
import itertools
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from benchmarks import load, pace, report, rig
from benchmarks.__main__ import MEASURES
from benchmarks.backends import Backend
from benchmarks.figures import Delivery, Kept, Machine, Memory, Requests, Results, middle, ratio
from benchmarks.hook import Hook
from benchmarks.options import FULL, GROUPS, QUICK, Options, Unusable
from benchmarks.titles import EMPTY, GROWN, GROWN_CALLBACKS, NCHAN, PEER, SMALL, SWITCHBOARD, TRIGGERS, spread
from httpx_sse import aconnect_sse

from switchboard import local
from tests.conftest import HOOK_KEY, Servers, new_database, serving

REPORT = Path("RESULTS.md")


@pytest.fixture(scope="module")
async def guide(servers: Servers) -> AsyncIterator[httpx.AsyncClient]:
    """The guide's handlers, with HappyRobot's side."""
    loop, mark = asyncio.get_running_loop(), uuid4().hex
    numbers = itertools.count(1)
    hook = await loop.create_server(lambda: Hook(f"run_{mark}_", numbers), local.LOOPBACK, 0)
    upstream = f"http://{local.LOOPBACK}:{hook.sockets[0].getsockname()[1]}"
    async with new_database(servers) as url:
        said = {
            "HAPPYROBOT_WEBHOOK_URL": f"{upstream}/hook",
            "HAPPYROBOT_API_URL": upstream,
            "HAPPYROBOT_API_KEY": "key",
            "HAPPYROBOT_ORG_ID": "organisation",
            "HAPPYROBOT_X_API_KEY": HOOK_KEY,
            "APP_URL": "http://127.0.0.1:1",
            "DATABASE_URL": url.replace("postgresql:", "postgresql+asyncpg:"),
            "REDIS_URL": servers.redis_url,
        }
        with local.environment(**said):
            baseline = importlib.import_module("benchmarks.baseline")
        async with serving(lambda _: baseline.app) as (address, _), httpx.AsyncClient(base_url=address) as http:
            yield http
    hook.close()


async def started(guide: httpx.AsyncClient, context_id: str) -> str:
    answer = await guide.post("/api/happyrobot/trigger", json={"context_id": context_id})
    assert answer.status_code == 200, answer.text
    (run_id,) = answer.json()["run_ids"]
    assert answer.json()["success"]
    return str(run_id)


async def called_back(
    guide: httpx.AsyncClient, run_id: str, event_type: str, data: Any, **headers: str
) -> httpx.Response:
    body = {"run_id": run_id, "event_type": event_type, "timestamp": "2026-01-01T00:00:00Z", "data": data}
    return await guide.post("/api/webhooks/happyrobot", json=body, headers={"X-API-KEY": HOOK_KEY} | headers)


async def the_run(guide: httpx.AsyncClient, context_id: str) -> dict[str, Any]:
    (run,) = (await guide.get("/api/happyrobot/runs", params={"context_id": context_id})).json()
    found: dict[str, Any] = run
    return found


async def test_the_baseline_tracks_a_run_as_the_guide_does(guide: httpx.AsyncClient, context_id: str) -> None:
    run_id = await started(guide, context_id)
    assert (await the_run(guide, context_id))["status"] == "RUNNING"
    for number in (1, 2):
        assert (await called_back(guide, run_id, "log", {"seq": number})).json() == {"success": True}
    await called_back(guide, run_id, "on_hold", {"seq": 3})
    await called_back(guide, run_id, "completed", {"outcome": "booked"})
    run = await the_run(guide, context_id)
    assert (run["runId"], run["status"]) == (run_id, "COMPLETED")
    assert run["metadata"] == {"logs": [{"seq": 1}, {"seq": 2}], "result": {"outcome": "booked"}}


async def test_the_baseline_refuses_as_the_guide_does(guide: httpx.AsyncClient, context_id: str) -> None:
    run_id = await started(guide, context_id)
    refusals = [
        await called_back(guide, run_id, "log", {}, **{"X-API-KEY": "another"}),
        await called_back(guide, "", "log", {}),
        await called_back(guide, "run_unknown", "log", {}),
        await guide.get("/api/happyrobot/status", params={"run_id": "run_unknown"}),
    ]
    assert [answer.status_code for answer in refusals] == [401, 400, 404, 404]
    assert "logs" not in (await the_run(guide, context_id))["metadata"]


async def test_the_baseline_knows_a_copy_by_its_webhook_id(guide: httpx.AsyncClient, context_id: str) -> None:
    run_id = await started(guide, context_id)
    copies = [await called_back(guide, run_id, "log", {"seq": 1}, **{"X-Webhook-Id": context_id}) for _ in range(2)]
    assert [answer.json() for answer in copies] == [{"success": True}, {"success": True, "duplicate": True}]
    assert len((await the_run(guide, context_id))["metadata"]["logs"]) == 1


async def test_the_baseline_asks_happyrobot_for_a_status(guide: httpx.AsyncClient, context_id: str) -> None:
    run_id = await started(guide, context_id)
    await called_back(guide, run_id, "failed", {"reason": "busy"})
    answer = (await guide.get("/api/happyrobot/status", params={"run_id": run_id})).json()
    assert (answer["run_id"], answer["status"]) == (run_id, "running")
    assert (await the_run(guide, context_id))["status"] == "RUNNING"


async def test_the_baseline_streams_the_callbacks_of_a_context(guide: httpx.AsyncClient, context_id: str) -> None:
    run_id, other = await started(guide, context_id), await started(guide, f"{context_id}_other")
    async with aconnect_sse(guide, "GET", "/api/events", params={"context_id": context_id}) as source:
        source.response.raise_for_status()
        events = source.aiter_sse()
        await called_back(guide, other, "log", {"seq": 1})
        await called_back(guide, run_id, "log", {"seq": 2})
        assert (await anext(events)).json() == {"run_id": run_id, "event_type": "log", "data": {"seq": 2}}


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}")


TAKEN = (200, b'{"success": true}')
COPY = (200, b'{"success": true, "duplicate": true}')


def refused(status: int) -> tuple[int, bytes]:
    return status, b"{}"


class Stub:
    """Answers callbacks in a certain way, and streams in pieces that end anywhere."""

    def __init__(self, *answers: tuple[int, bytes], pieces: tuple[bytes, ...] = ()) -> None:
        self.answers = itertools.cycle(answers or (TAKEN,))
        self.pieces = pieces
        self.callbacks: list[dict[str, Any]] = []
        self.webhook_ids: list[str] = []
        self.leave = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/api/events":
            await self.stream(send)
            return
        message = await receive()
        if message["type"] == "http.disconnect":
            return  # the load is over
        if scope["method"] == "POST":
            self.callbacks.append(json.loads(message["body"]))
            self.webhook_ids.append(dict(scope["headers"])[b"x-webhook-id"].decode())
        status, body = next(self.answers)
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def stream(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": next(self.answers)[0], "headers": []})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await self.leave.wait()
        await send({"type": "http.response.body", "body": b""})


def backend(address: str) -> Backend:
    return Backend("stub", address, HOOK_KEY)


def streamed(program: Path, address: str, streams: int, events: int, patience: float = 20) -> dict[str, Any]:
    with load.streams(program, backend(address), "context", streams, 20, patience) as opened:
        return opened.finish(events)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("cc")
    return rig.compiled(tmp_path_factory.mktemp("streams"))


PIECES = (
    b': connected\n\ndata: {"t_us": 1}\n\n',
    b'data: {"text": "not one of them"}\n\nid: 7\nda',
    b'ta: {"t_u',
    b's": 99}\n',
    b'\ndata: {"padding": "' + b"x" * 5000,
    b'"}\n\nevent: "t_us": 5\n\ndata: {"t_us":3}\n\n',
)


async def test_streams_are_counted_wherever_their_pieces_end(program: Path) -> None:
    stub = Stub(pieces=PIECES)
    async with serving(lambda _: stub) as (address, _):
        seen = await asyncio.to_thread(streamed, program, address, 20, 3)
        assert (seen["delivered"], seen["extra"], seen["fewest"], seen["closed"]) == (60, 0, 3, 0)
        # Of what is not expected nobody waits, and it makes nothing up for what is lost elsewhere.
        seen = await asyncio.to_thread(streamed, program, address, 20, 2)
        assert (seen["delivered"], seen["extra"]) == (40, 20)
        # Those that are missing are waited for, and then missing.
        seen = await asyncio.to_thread(streamed, program, address, 20, 4, 0.3)
        assert (seen["delivered"], seen["extra"], seen["fewest"]) == (60, 0, 3)
        stub.leave.set()


async def test_a_stream_that_is_refused_is_no_measurement(program: Path) -> None:
    stub = Stub(TAKEN, TAKEN, refused(503))
    async with serving(lambda _: stub) as (address, _):
        with pytest.raises(load.LoadFailed, match="not answered 200"):
            await asyncio.to_thread(streamed, program, address, 3, 1)
        stub.leave.set()


async def test_callbacks_by_the_clock_are_sent_once_each_and_refusals_counted() -> None:
    stub = Stub(TAKEN, TAKEN, refused(404))
    async with serving(lambda _: stub) as (address, _):
        callbacks = [pace.callback(backend(address), "run", f"webhook_{seq}", seq) for seq in range(30)]
        assert await pace.steadily(backend(address).port, callbacks, rate=500) == 10
    assert sorted(callback["data"]["seq"] for callback in stub.callbacks) == list(range(30))
    due = sorted(callback["data"]["t_us"] for callback in stub.callbacks)
    assert {later - sooner for sooner, later in itertools.pairwise(due)} == {2000}


async def test_of_callbacks_that_are_sent_at_once_it_is_known_which_were_taken() -> None:
    stub = Stub()
    async with serving(lambda _: stub) as (address, _):
        callbacks = [pace.callback(backend(address), "run", f"webhook_{seq}", seq) for seq in range(30)]
        assert await pace.at_once(backend(address).port, callbacks, connections=4) == [True] * 30
        stub.answers = itertools.cycle([refused(500)])
        assert await pace.at_once(backend(address).port, callbacks, connections=4) == [False] * 30


async def test_wrk_counts_what_was_not_answered_as_it_should_be() -> None:
    need("wrk")
    stub = Stub(TAKEN, refused(302), COPY, refused(500))
    values = {"KEY": HOOK_KEY, "RUN": "run_", "RUNS": "3", "MARK": "mark_"}
    async with serving(lambda _: stub) as (address, _):
        seen = await asyncio.to_thread(load.wrk, address, "callbacks.lua", 2, 1, **values)
    assert seen.errors == pytest.approx(0.75 * seen.answers, abs=2)
    assert len(set(stub.webhook_ids)) == len(stub.webhook_ids) >= seen.answers > 0
    assert {callback["run_id"] for callback in stub.callbacks} == {"run_1", "run_2", "run_3"}
    assert {callback["event_type"] for callback in stub.callbacks} == {"log"}
    assert all(callback["timestamp"] for callback in stub.callbacks)


def rounds(*rates: float, errors: int = 0, p50: float = 1, p99: float = 2) -> list[Requests]:
    return [Requests(round(rate * 10) + errors, 10, p50, p99, errors) for rate in rates]


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_figures() -> None:
    ours, theirs = rounds(100, 400, 900), rounds(100, 100, 300)
    assert middle(ours, report.rate) == 400
    assert ratio(ours, theirs, report.rate) == 3


def test_a_figure_with_errors_is_none() -> None:
    good, bad = rounds(100, 100), [*rounds(100), *rounds(100, errors=1)]
    assert middle(bad, report.rate) is None
    assert ratio(good, bad, report.rate) is None
    assert ratio(bad, good, report.rate) is None
    assert middle([], report.rate) is None


def measured() -> Results:
    results = Results()
    results.requests[spread(32)] |= {
        SWITCHBOARD: rounds(4000, p99=10),
        PEER: rounds(400, p99=100),
        EMPTY: rounds(5000),
    }
    results.requests[spread(1)] |= {SWITCHBOARD: rounds(900, p50=1.5), PEER: rounds(300, p50=2)}
    results.requests[TRIGGERS] |= {SWITCHBOARD: rounds(900), PEER: rounds(200, errors=3)}
    results.requests[GROWN_CALLBACKS] |= {SMALL: rounds(900, p50=2), GROWN: rounds(800, p50=2.5)}
    results.deliveries[30] |= {
        SWITCHBOARD: [Delivery(3000, 3000, 20, 50)],
        NCHAN: [Delivery(3000, 3000, 10, 20)],
        PEER: [Delivery(3000, 3000, 100, 300)],
    }
    results.deliveries[150][SWITCHBOARD] = [Delivery(14_999, 15_000, 30, 400)]
    results.kept |= {SWITCHBOARD: Kept(500, 500), PEER: Kept(500, 178)}
    results.memory[SWITCHBOARD] = Memory(100_000_000, 600_000_000, 10_000)
    results.notes.append("This is noted.")
    return results


def test_the_goals_say_what_was_reached_what_was_not_and_what_nobody_knows() -> None:
    found = {goal.what: (goal.measured, goal.met) for goal in report.goals(measured())}
    assert found == {
        "callbacks a second at 32 connections, to the peer's": ("10.00x", True),
        "their p99, to the peer's": ("0.10x", True),
        "callbacks a second at 32 connections, to an empty handler's": ("0.80x", True),
        "one caller, one callback at a time: p50, to the peer's": ("0.75x", False),
        "all callbacks for one run: a second, to those that are spread": ("-", None),
        "callbacks for one run that were answered 200 and are not there": ("0 of 500", True),
        "triggers a second, to the peer's": ("errors", None),
        "streams at 30 events a second: p50, to nchan's": ("2.00x", True),
        "streams at 30 events a second: p50, to the peer's": ("0.20x", True),
        "streams at 150 events a second: delivered": ("14,999 of 15,000", False),
        "streams at 150 events a second: p99": ("errors", None),
        "memory of an idle stream, of 10,000": ("50.0 kB", False),
        "p50 of callbacks, grown to small": ("1.25x", True),
        "p50 of a context's list, grown to small": ("-", None),
    }


def test_goals_are_there_where_nothing_was_measured() -> None:
    assert {goal.met for goal in report.goals(Results())} == {None}


MACHINE = Machine(
    date="2026-01-02 03:04 UTC",
    commit="0123abc",
    processor="2 x Fast",
    memory="24 GiB",
    system="Linux 6",
    storage="ext4",
    versions={"Python": "3.11.7", "PostgreSQL": "18.4"},
)


def test_the_report_gives_ratios_first_and_figures_behind() -> None:
    lines = report.render(measured(), MACHINE).splitlines()
    titles = [line for line in lines if line.startswith("## ")]
    assert titles.index("## Switchboard to the others") < titles.index("## Requests") < titles.index("## Streams")
    assert (
        "| callbacks of many runs, 32 connections | - | 10.00x / 1.00x / 0.10x | 0.80x / 1.00x / 5.00x | - |" in lines
    )
    assert "| triggers, 32 connections | - | errors | - | - |" in lines
    assert "| triggers, 32 connections | peer | errors | errors | errors | 3 |" in lines
    assert "| callbacks of many runs, 32 connections | Switchboard | 4,000 | 1.00 ms | 10 ms | 0 |" in lines
    assert "| 30 a second | Switchboard | 20 ms | 50 ms | 3,000 of 3,000 | 0 |" in lines
    assert "| 150 a second | Switchboard | errors | errors | 14,999 of 15,000 | 0 |" in lines
    assert "| peer | 500 | 178 | 322 |" in lines
    assert "| Switchboard | 10,000 | 50.0 kB | 100 MB | 600 MB |" in lines
    assert "| callbacks, 8 connections | 1.25x | 1.00x | 2.00 ms | 2.00 ms | 2.50 ms | 2.00 ms |" in lines
    assert "| processors | 2 x Fast |" in lines
    assert "- This is noted." in lines


def test_a_quick_run_says_so_and_leaves_the_results_alone() -> None:
    assert "quick run" in report.render(measured(), MACHINE, quick=True)
    assert "quick run" not in report.render(measured(), MACHINE)
    assert Options.read({}, REPORT).report == REPORT
    assert Options.read({"QUICK": "1"}, REPORT).report is None
    assert Options.read({"ONLY": "reads"}, REPORT).report is None
    assert Options.read({"ONLY": "reads", "OUT": "/tmp/there.md"}, REPORT).report == Path("/tmp/there.md")


def test_a_part_can_be_asked_for_by_the_names_of_its_groups() -> None:
    assert Options.read({}, REPORT).groups == GROUPS == tuple(MEASURES)
    assert Options.read({"ONLY": "growth, callbacks"}, REPORT).groups == ("callbacks", "growth")
    assert Options.read({"QUICK": "1"}, REPORT).size == QUICK
    assert Options.read({"QUICK": "0"}, REPORT).size == FULL
    with pytest.raises(Unusable, match="streams is none of"):
        Options.read({"ONLY": "streams"}, REPORT)


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        ({"PEER_URL": "http://example.com:80", "PEER_DATABASE_URL": "postgresql://"}, "this machine alone"),
        ({"PEER_URL": "https://127.0.0.1:3300", "PEER_DATABASE_URL": "postgresql://"}, "this machine alone"),
        ({"PEER_URL": "http://127.0.0.1:3300"}, "PEER_DATABASE_URL"),
    ],
)
def test_load_is_sent_to_nobody_else(peer: dict[str, str], why: str) -> None:
    with pytest.raises(Unusable, match=why):
        Options.read(peer, REPORT)


def test_without_its_tools_it_names_debians_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unusable, match=r"apt-get install wrk gcc libc6-dev$"):
        rig.require_tools()
