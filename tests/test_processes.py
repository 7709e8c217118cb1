"""Several processes, started by the commands that users type."""

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from httpx_sse import aconnect_sse
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import __version__, app, local
from switchboard.tables import run_events
from tests.conftest import APP_SECRET, HOOK_KEY, Said, Servers, insert_run, new_database, rows_of

HEADERS = {"X-API-KEY": HOOK_KEY}


def deployed(database_url: str, servers: Servers) -> contextlib.AbstractContextManager[None]:
    """What a deployment's environment says. HappyRobot is not needed here."""
    return local.environment(
        DATABASE_URL=database_url,
        REDIS_URL=servers.redis_url,
        HAPPYROBOT_WEBHOOK_URL="http://127.0.0.1:1/hooks/none",
        APP_URL="http://127.0.0.1:1",
        HAPPYROBOT_X_API_KEY=HOOK_KEY,
        APP_SECRET=APP_SECRET,
        LOG_LEVEL="warning",
    )


@pytest.fixture
def environment(database_url: str, servers: Servers) -> Iterator[None]:
    with deployed(database_url, servers):
        yield


@pytest.fixture(scope="module")
def two_processes(database_url: str, servers: Servers) -> Iterator[tuple[str, str]]:
    """Where they answer; they share a database and Redis."""
    with contextlib.ExitStack() as stack:
        with deployed(database_url, servers):
            one = stack.enter_context(local.child("serve", "--port", "0"))
            other = stack.enter_context(local.child("serve", "--port", "0", "--no-migrate"))
        yield one, other


def command(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "switchboard", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=180)  # no more than a bound on a hang
    return process.returncode, out, err


@contextlib.asynccontextmanager
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=20, headers=HEADERS) as http:
        await answers(http)
        yield http


async def answers(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get("/healthz")).status_code == 200:
                    return
            await asyncio.sleep(0.02)


async def test_a_browser_on_one_process_sees_a_callback_that_another_took(
    two_processes: tuple[str, str], context_id: str, run_id: str
):
    one, other = two_processes
    async with (
        client(one) as here,
        client(other) as there,
        aconnect_sse(here, "GET", "/api/events", params={"context_id": context_id}) as source,
    ):
        events = source.aiter_sse()
        first = await anext(events)
        assert first.retry
        body = {"run_id": run_id, "event_type": "log", "data": {"from": "the other side"}}
        assert (await there.post("/api/webhooks/happyrobot", json=body)).status_code == 200
        async with asyncio.timeout(10):
            event = await anext(events)
        assert event.json()["data"] == {"from": "the other side"}


async def test_the_same_500_callbacks_twice_to_two_processes_are_500_events(
    two_processes: tuple[str, str], db: AsyncEngine, context_id: str
):
    run_id = await insert_run(db, context_id)
    one, other = two_processes
    async with client(one) as here, client(other) as there:
        places = asyncio.Semaphore(20)

        async def send(to: httpx.AsyncClient, number: int) -> bool:
            stamp = f"2026-01-01T00:{number // 60:02}:{number % 60:02}Z"
            body = {"run_id": run_id, "event_type": "log", "timestamp": stamp, "data": {"n": number}}
            async with places:
                answer = await to.post("/api/webhooks/happyrobot", json=body)
            assert answer.status_code == 200
            return "duplicate" in answer.json()

        copies = await asyncio.gather(*(send(to, number) for number in range(500) for to in (here, there)))
        assert sum(copies) == 500
        run = (await here.get(f"/api/happyrobot/runs/{run_id}")).json()
    assert sorted(log["n"] for log in run["metadata"]["logs"]) == list(range(500))
    assert await rows_of(db, run_events, run_id) == 500


async def test_several_workers_share_a_port(environment: None, db: AsyncEngine, context_id: str, run_id: str):
    with local.child("serve", "--port", "0", "--no-migrate", "--workers", "2") as address:
        async with client(address) as http:
            streams = [
                await stack_stream(address, context_id)
                for _ in range(6)  # spread over the workers by the kernel
            ]
            body = {"run_id": run_id, "event_type": "log", "data": 1}
            assert (await http.post("/api/webhooks/happyrobot", json=body)).status_code == 200
            for stack, events in streams:
                async with asyncio.timeout(10):
                    assert (await anext(events)).json()["data"] == 1
                await stack.aclose()
            # Each has the bounds of the settings.
            assert (await http.get("/healthz", headers={"X": "x" * 32_768})).status_code == 431


async def test_a_worker_of_its_own_does_what_a_service_without_one_leaves(
    environment: None, servers: Servers, template: str, context_id: str
):
    async with new_database(servers, template) as url:
        with local.child("simulate", "--port", "0", "--pace", "0.001") as simulator:
            elsewhere = local.environment(
                DATABASE_URL=url,
                HAPPYROBOT_WEBHOOK_URL=f"{simulator}/hooks/x",
                HAPPYROBOT_API_URL=f"{simulator}/api/v1",
                HAPPYROBOT_API_KEY="any",
                RECONCILE_AFTER="0.5",
            )
            with elsewhere, local.child("serve", "--port", "0", "--no-migrate", "--no-worker") as address:
                async with client(address) as http:
                    body = {"context_id": context_id, "simulate": {"faults": "silent"}}
                    answer = await http.post("/api/happyrobot/trigger", json=body)
                    run_id = answer.json()["run_ids"][0]
                    async with httpx.AsyncClient(base_url=simulator) as there:
                        await ended(there, run_id)
                    assert (await http.get(f"/api/happyrobot/runs/{run_id}")).json()["status"] == "RUNNING"
                    worker = command("worker")
                    assert worker.stdout is not None
                    assert "works in the background" in await asyncio.to_thread(worker.stdout.readline)
                    async with asyncio.timeout(30):
                        while (await http.get(f"/api/happyrobot/runs/{run_id}")).json()["status"] != "COMPLETED":  # noqa: ASYNC110  # it is in a database
                            await asyncio.sleep(0.05)
                    worker.send_signal(signal.SIGTERM)
                    code, _, err = await asyncio.to_thread(finish, worker)
                    assert (code, err) == (0, "")


async def ended(simulator: httpx.AsyncClient, run_id: str) -> None:
    headers = {"Authorization": "Bearer any"}
    async with asyncio.timeout(30):
        while True:
            answer = await simulator.get(f"/api/v1/runs/{run_id}", headers=headers)
            if answer.json()["run"]["status"] == "completed":
                return
            await asyncio.sleep(0.02)


async def stack_stream(address: str, context_id: str) -> tuple[contextlib.AsyncExitStack, Any]:
    stack = contextlib.AsyncExitStack()
    http = await stack.enter_async_context(httpx.AsyncClient(base_url=address, timeout=20))
    source = await stack.enter_async_context(
        aconnect_sse(http, "GET", "/api/events", params={"context_id": context_id})
    )
    events = source.aiter_sse()
    await anext(events)
    return stack, events


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_service_and_its_streams_in_order(
    environment: None, own_database: str, signum: signal.Signals
):
    # Its worker finds nothing here that others have left, and has nothing to say.
    with local.environment(DATABASE_URL=own_database):
        process = command("serve", "--port", "0")
    assert process.stdout is not None
    address = process.stdout.readline().split()[-1]
    async with client(address) as http, http.stream("GET", "/api/events?context_id=x") as answer:
        chunks = answer.aiter_text()
        await anext(chunks)
        process.send_signal(signum)
        async with asyncio.timeout(10):
            said = "".join([chunk async for chunk in chunks])
            assert said.removeprefix(": still here\n") == ": goodbye, resume elsewhere\n\n"
    code, _, err = await asyncio.to_thread(finish, process)
    assert (code, err) == (0, "")


def test_a_signal_waits_until_the_event_loop_is_whole(monkeypatch: pytest.MonkeyPatch):
    made: list[asyncio.AbstractEventLoop] = []
    genuine = asyncio.events.new_event_loop

    def interrupted() -> asyncio.AbstractEventLoop:
        signal.raise_signal(signal.SIGTERM)
        made.append(genuine())
        return made[0]

    monkeypatch.setattr(asyncio.events, "new_event_loop", interrupted)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with pytest.raises(SystemExit):
            local.run(asyncio.sleep(60))
    finally:
        signal.signal(signal.SIGTERM, before)
    [loop] = made
    assert loop.is_closed()


async def test_the_service_goes_when_the_one_who_started_it_is_killed(environment: None):
    starter = await asyncio.create_subprocess_exec(sys.executable, "-c", STARTER, stdout=subprocess.PIPE)
    assert starter.stdout is not None
    address = (await starter.stdout.readline()).decode().strip()
    async with client(address):
        pass
    starter.kill()
    await starter.wait()
    async with asyncio.timeout(20):
        await goes_away(address)


STARTER = """
import time
from switchboard import local
with local.child("serve", "--port", "0", "--no-migrate") as address:
    print(address, flush=True)
    time.sleep(60)
"""


async def goes_away(address: str) -> None:
    async with httpx.AsyncClient(base_url=address) as http:
        while True:
            try:
                await http.get("/healthz")
            except httpx.TransportError:
                return


async def test_everything_that_is_not_named_is_brought_along(tmp_path: Path):
    """No PostgreSQL, no Redis, no HappyRobot: one command, and a call goes through."""
    process = command("serve", "--port", "0", cwd=tmp_path)
    assert process.stdout is not None
    address = (await asyncio.to_thread(process.stdout.readline)).split()[-1]
    async with client(address) as http:
        answer = await http.post("/api/happyrobot/trigger", json={"context_id": "order_1"})
        assert answer.status_code == 200
        run_id = answer.json()["run_ids"][0]
        async with aconnect_sse(http, "GET", f"/api/events?run_id={run_id}&last_event_id=0") as source:
            messages = [sse async for sse in source.aiter_sse() if sse.event == "message" and sse.data]
    kinds = [sse.json()["event_type"] for sse in messages]
    assert kinds[0] == "triggered"
    assert kinds[-1] == "completed"
    process.terminate()
    code, _, err = await asyncio.to_thread(finish, process)
    assert code == 0
    assert err.startswith("HAPPYROBOT_WEBHOOK_URL is not set: calls go to the simulator on http://127.0.0.1:")
    # What was stored is there the next time, for whichever command comes.
    code, out, err = await asyncio.to_thread(finish, command("migrate", cwd=tmp_path))
    assert (code, out) == (0, "The database is at the newest schema.\n"), err


async def test_the_demo_shows_a_call_and_leaves_and_calls_nobody_whatever_the_environment_says(tmp_path: Path):
    called = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal called
        called += 1
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as somebody:
        port = somebody.sockets[0].getsockname()[1]
        address = f"127.0.0.1:{port}"
        (tmp_path / ".env").write_text(
            f"HAPPYROBOT_WEBHOOK_URL=http://{address}/hooks/real\nHAPPYROBOT_X_API_KEY=real\n"
            f"HAPPYROBOT_CALLBACK_KEY=other\nAPP_URL=http://{address}\nALLOW_ANONYMOUS=false\n"
            f"DATABASE_URL=postgresql://{address}/real\nREDIS_URL=redis://{address}\nENVIRONMENT=production\n"
        )
        process = command("demo", "--once", "--pace", "0.01", "--port", str(port), cwd=tmp_path)
        code, out, err = await asyncio.to_thread(finish, process)
    assert code == 0, err
    assert called == 0
    assert f"Port {port} is taken" in out
    for expected in ("triggered", "completed", "COMPLETED", "logs kept", "Try next"):
        assert expected in out
    # The three lines are whole, so that they can be copied.
    assert sum(line.startswith("curl ") for line in out.splitlines()) == 3


async def test_the_demo_stays_until_it_is_told_to_leave_and_its_lines_work(tmp_path: Path):
    process = command("demo", "--pace", "0.01", "--port", "0", cwd=tmp_path)
    assert process.stdout is not None
    lines = []
    while not (line := await asyncio.to_thread(process.stdout.readline)).startswith("Everything stays up"):
        assert line, "the demo left"
        lines.append(line)
    commands = [line.strip() for line in lines if line.startswith("curl ")]
    stream, listing, trigger = commands
    for shell, expected in ((listing, "COMPLETED"), (trigger, "execution_id")):
        done = await asyncio.to_thread(subprocess.run, shell, shell=True, capture_output=True, text=True, check=True)
        assert expected in done.stdout
    shell = stream.replace("curl", "curl --max-time 2")
    done = await asyncio.to_thread(subprocess.run, shell, shell=True, capture_output=True, text=True, check=False)
    assert '"event_type":"triggered"' in done.stdout
    process.send_signal(signal.SIGINT)
    code, _, err = await asyncio.to_thread(finish, process)
    assert (code, err) == (0, "")


async def test_the_demo_shows_a_website_that_decides(tmp_path: Path):
    process = command("demo", "--once", "--approval", "--pace", "0.01", "--port", "0", cwd=tmp_path)
    code, out, err = await asyncio.to_thread(finish, process)
    assert code == 0, err
    told = [line.split()[1:] for line in out.splitlines() if "execution." in line]
    assert told == [[f"execution.{what}", "✓", "signature"] for what in ("started", "pending_approval", "completed")]
    for expected in ("Ada Miller", "Execution approved and will continue", "load_booked"):
        assert expected in out


async def test_the_simulator_can_be_run_alone():
    with local.environment(HAPPYROBOT_X_API_KEY="k"), local.child("simulate", "--port", "0") as address:
        async with httpx.AsyncClient(base_url=address) as http:
            assert (await http.post("/hooks/x", json={})).status_code == 401
            answer = await http.post("/hooks/x", json={}, headers={"X-API-KEY": "k"})
            assert len(answer.json()["queued_run_ids"]) == 1


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "said"),
    [
        (["--version"], {}, 0, __version__),
        (["simulate", "--faults", "gremlins"], {}, 2, "unknown fault: gremlins"),
        (["serve"], {"PORT": "many"}, 1, "PORT: Input should be a valid integer"),
        (["serve"], {"ENVIRONMENT": "production"}, 1, "APP_URL: must be set to this service's public https:// address"),
        (["serve", "--host", "203.0.113.1"], {}, 1, "cannot listen on 203.0.113.1"),
        (["migrate"], {"SWITCHBOARD_DATA_DIR": "/dev/null/x"}, 1, "cannot hold the private servers"),
        (
            ["migrate"],
            {"DATABASE_URL": "postgresql://p@127.0.0.1:1/x", "REDIS_URL": "redis://x"},
            1,
            "takes no connection",
        ),
        (["serve"], {"DATABASE_URL": "mysql://p:secret@h/x"}, 1, "DATABASE_URL: must start with postgres"),
        (["serve"], {"REDIS_URL": "127.0.0.1:6379"}, 1, "REDIS_URL: must start with redis://"),
    ],
)
def test_what_goes_wrong_is_said(
    switchboard: Callable[..., Said], arguments: list[str], variables: dict[str, str], code: int, said: str
):
    done = switchboard(*arguments, **variables)
    assert done.code == code
    assert said in done.out + done.err


def test_a_command_that_fails_leaves_no_traceback(tmp_path: Path):
    process = command("demo", "--once", cwd=tmp_path, env=os.environ | {"SWITCHBOARD_DATA_DIR": "/dev/null/x"})
    code, _, err = finish(process)
    assert code == 1
    assert err.startswith("switchboard: /dev/null/x cannot hold the private servers")
    assert err.count("\n") == 1


def test_a_taken_port_is_named():
    with local.listening(local.LOOPBACK, 0) as taken:
        port = taken.getsockname()[1]
        with local.listening(local.LOOPBACK, port, or_any=True) as another:
            assert another.getsockname()[1] not in (0, port)
        with pytest.raises(local.PortTaken, match=f"port {port}"), local.listening(local.LOOPBACK, port):
            pass


def test_processes_without_a_folder_for_their_metrics_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/x")
    with pytest.raises(local.NoFolder, match="set TMPDIR"), local.metrics_together():
        pass


def test_a_child_that_does_not_start_is_noticed():
    with pytest.raises(local.ChildFailed, match="`switchboard nonsense` did not start"), local.child("nonsense"):
        pass


@pytest.mark.parametrize(("make", "works"), [(app.alone, True), (app.alone_without_worker, False)])
def test_a_process_of_its_own_does_not_search_what_it_begins_with_for_garbage(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], FastAPI], works: bool
):
    made: list[bool] = []
    monkeypatch.setattr(app, "create_app", lambda *, worker=True: made.append(worker))
    thresholds, frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.set_threshold(700)
    try:
        make()
        assert gc.get_freeze_count() > frozen
        assert gc.get_threshold()[0] > 10_000
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
    assert made == [works]
