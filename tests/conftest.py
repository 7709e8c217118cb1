"""Real servers for the tests: PostgreSQL and Valkey, a service over HTTP, HappyRobot's simulator; the commands."""

import asyncio
import contextlib
import gc
import io
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
import uvicorn
from httpx_sse import aconnect_sse
from playwright.async_api import Browser, Page, async_playwright
from sqlalchemy import Connection, Table, event, func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from switchboard import cli, database, embedded, local
from switchboard.access import keys, seats
from switchboard.app import create_app
from switchboard.embedded.folder import KEEPER_LOCK, poll
from switchboard.embedded.lease import _kept
from switchboard.errors import PostgresAway
from switchboard.happyrobot.simulator import Simulator
from switchboard.live.hub import Hub
from switchboard.migrate import migrate
from switchboard.protocol import BoundedProtocol
from switchboard.settings import Settings
from switchboard.tables import KeyScope
from switchboard.wiring import State

HOOK_KEY = "hook-key-of-the-tests"
API_KEY = "api-key-of-the-tests"
APP_SECRET = "app-secret-of-the-tests-which-is-long-enough"


_FOLDER = "SWITCHBOARD_TESTS_FOLDER"

# What is imported and collected stays: to look through it for garbage meanwhile takes nearly half of the time.
gc.disable()
# Asked for by httpcore several times a request, and looked for in vain in every folder of `sys.path` each time.
if find_spec("sniffio") is None:
    sys.modules["sniffio"] = None  # type: ignore[assignment]


def pytest_configure(config: pytest.Config) -> None:
    """Makes one folder for all workers.

    Not below pytest's own: as root the servers run as somebody else, and whenever another run of pytest starts, it
    closes that folder to everybody else.
    """
    if not hasattr(config, "workerinput"):
        os.environ[_FOLDER] = tempfile.mkdtemp(prefix="switchboard-tests-", dir=_in_memory())


def _in_memory(room: int = 4_000_000_000) -> str | None:
    """A folder whose files never go to a disk, if there is one with room: to make a database there costs a third."""
    folder = "/dev/shm"
    with contextlib.suppress(OSError):
        found = os.statvfs(folder)
        programs_run = not found.f_flag & os.ST_NOEXEC
        if programs_run and found.f_bavail * found.f_frsize > room and os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


def pytest_collection_finish() -> None:
    """Spares what stays to the end, modules and tests, being looked through for garbage: a quarter of a test's time."""
    gc.set_threshold(20_000)
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        _remove(Path(os.environ.pop(_FOLDER)))


def _remove(folder: Path) -> None:
    """Removes a folder once the servers that ran in it have stopped."""
    for lock in folder.rglob(KEEPER_LOCK):
        assert poll(lambda data_dir=lock.parent: not _kept(data_dir)), f"servers still run in {lock.parent}"  # type: ignore[misc]
    shutil.rmtree(folder)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """An own folder, in which embedded servers can run."""
    folder = Path(tempfile.mkdtemp(dir=os.environ[_FOLDER]))
    yield folder
    _remove(folder)


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}  # as `serve` does


@dataclass(frozen=True)
class Servers:
    database_url: str
    redis_url: str


@pytest.fixture(scope="session", autouse=True)
def _no_environment() -> Iterator[None]:
    """Tests say what the settings are; the developer's own environment does not."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.lower() in Settings.model_fields or name.startswith("OTEL_"):
                patch.delenv(name)
        patch.setitem(Settings.model_config, "env_file", None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _certificates() -> Iterator[None]:
    """Those of the machine are read once, not for each client: that takes as long as many a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("httpx._transports.default.create_ssl_context", cache(httpx.create_ssl_context))
        yield


_GIVEN = Servers(os.environ.get("DATABASE_URL", ""), os.environ.get("REDIS_URL", ""))


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """`DATABASE_URL` and `REDIS_URL` where both are set, embedded servers otherwise; all workers share them."""
    if _GIVEN.database_url and _GIVEN.redis_url:
        yield _GIVEN
        return
    with embedded.running(Path(os.environ[_FOLDER]) / "servers") as started:
        # Nobody pulls the plug on a test, and no database lasts until it has to be tidied up.
        off = [f"ALTER SYSTEM SET {setting} = off" for setting in ("fsync", "full_page_writes", "autovacuum")]
        asyncio.run(run_sql(started.database_url, *off, "SELECT pg_reload_conf()"))
        yield Servers(started.database_url, started.redis_url)


def with_database(url: str, name: str) -> str:
    """The same server's other database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


async def run_sql(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(database.dsn(url))
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def template(servers: Servers) -> Iterator[str]:
    """A migrated database to clone."""
    name = f"template_{uuid4().hex}"
    asyncio.run(run_sql(servers.database_url, f"CREATE DATABASE {name}"))
    asyncio.run(migrate(with_database(servers.database_url, name)))
    yield name
    asyncio.run(run_sql(servers.database_url, f"DROP DATABASE {name} WITH (FORCE)"))


@contextlib.asynccontextmanager
async def new_database(servers: Servers, template: str = "template1") -> AsyncIterator[str]:
    name = f"test_{uuid4().hex}"
    # Copied files cost a third of pages that are written into the log, but are synced, which ours do not do.
    strategy = "WAL_LOG" if servers is _GIVEN else "FILE_COPY"
    await run_sql(servers.database_url, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY {strategy}")
    try:
        yield with_database(servers.database_url, name)
    finally:
        await run_sql(servers.database_url, f"DROP DATABASE {name} WITH (FORCE)")


# One database, simulator and service for all tests of a worker: tests keep apart by the ids that they draw.
# Who needs other settings, or a database to itself, makes them with the functions here.


@pytest.fixture(scope="session")
async def database_url(servers: Servers, template: str) -> AsyncIterator[str]:
    """A database at the newest schema."""
    async with new_database(servers, template) as url:
        yield url


@pytest.fixture
async def own_database(servers: Servers, template: str) -> AsyncIterator[str]:
    """A database of its own: the jobs of other tests are not for these workers."""
    async with new_database(servers, template) as url:
        yield url


@pytest.fixture(scope="session")
async def db(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = database.connect(database_url)
    yield engine
    await engine.dispose()


@pytest.fixture
async def line(db: AsyncEngine) -> AsyncIterator[database.Line]:
    """A connection of a writer's own."""
    line = database.Line(db)
    yield line
    await line.hang_up()


@dataclass
class Upstream:
    """The simulator, served over HTTP."""

    simulator: Simulator
    url: str


class _Server(uvicorn.Server):
    """Soon notices that it should leave: several hundred times, a tenth of a second is much."""

    async def main_loop(self) -> None:
        await self.on_tick(counter=0)  # sets the date
        while not await self.on_tick(counter=1):  # noqa: ASYNC110  # it is told by an attribute
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving(
    build: Callable[[int], Any], *, http: type[asyncio.Protocol] = HttpToolsProtocol
) -> AsyncIterator[tuple[str, uvicorn.Server]]:
    """Serves the ASGI application that is built for a free port, in this event loop."""
    with local.listening(local.LOOPBACK, 0) as listener:
        port = listener.getsockname()[1]
        # Kept alive longer than any test lasts, as `serve` does: no connection is closed under a request.
        config = uvicorn.Config(
            build(port),
            http=http,
            ws="none",
            proxy_headers=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=600,
            timeout_graceful_shutdown=5,
        )
        server = _Server(config)
        # Without the signal handlers of `serve`, which are the process's.
        task = asyncio.create_task(server._serve([listener]))
        try:
            while not server.started:
                assert not task.done(), "the server did not start"
                await asyncio.sleep(0.005)
            yield f"http://127.0.0.1:{port}", server
        finally:
            server.should_exit = True
            await task


@pytest.fixture(scope="session")
async def upstream() -> AsyncIterator[Upstream]:
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.002)
    async with serving(lambda _: simulator.app) as (url, _):
        yield Upstream(simulator, url)


def settings_for(database_url: str, redis_url: str, upstream_url: str | None, **more: Any) -> Settings:
    values: dict[str, Any] = {
        "database_url": database_url,
        "redis_url": redis_url,
        "happyrobot_webhook_url": f"{upstream_url or 'http://127.0.0.1:1'}/hooks/test",
        "happyrobot_x_api_key": HOOK_KEY,
        "happyrobot_api_url": f"{upstream_url or 'http://127.0.0.1:1'}/api/v1",
        "happyrobot_api_key": API_KEY,
        "happyrobot_api_pace": 1000,
        "app_secret": APP_SECRET,
        "failed_logins_per_minute": 10**6,  # everybody comes from the same address
        "log_level": "warning",  # thousands of requests are no news
    }
    return Settings(**(values | more))


@dataclass
class Service:
    """Switchboard, served over HTTP, with a client for it."""

    url: str
    http: httpx.AsyncClient
    state: State

    @property
    def hub(self) -> Hub:
        return self.state["hub"]

    async def callback(self, run_id: str, event_type: str, data: Any = None, **more: Any) -> httpx.Response:
        """Sends a callback as HappyRobot does; without a timestamp, so that no two are copies."""
        body = {"run_id": run_id, "event_type": event_type, "data": data} | more
        headers = {"X-API-KEY": HOOK_KEY}
        return await self.http.post("/api/webhooks/happyrobot", json=body, headers=headers)

    async def run(self, run_id: str) -> dict[str, Any]:
        answer = await self.http.get(f"/api/happyrobot/runs/{run_id}")
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    @contextlib.asynccontextmanager
    async def stream(self, resume: int | str | None = None, /, **params: str) -> AsyncIterator[AsyncIterator[Any]]:
        """Follows events; yields them parsed. The `end` of a run's stream comes as the string "end"."""
        headers = {} if resume is None else {"Last-Event-ID": str(resume)}
        async with aconnect_sse(self.http, "GET", "/api/events", params=params, headers=headers) as source:
            source.response.raise_for_status()

            async def events() -> AsyncIterator[Any]:
                async for sse in source.aiter_sse():
                    if sse.event == "end":
                        yield "end"
                    elif sse.data:
                        assert sse.event == "message", "named events are not seen by onmessage"
                        assert sse.id == str(sse.json()["id"])
                        yield sse.json()

            stream = events()
            yield stream
            await stream.aclose()  # type: ignore[attr-defined]


@contextlib.asynccontextmanager
async def running_service(
    settings: Settings, upstream: httpx.AsyncBaseTransport | None = None, *, worker: bool = False
) -> AsyncIterator[Service]:
    """A service with these settings; callbacks come to its own address."""

    def build(port: int) -> Any:
        return create_app(settings.model_copy(update={"port": port}), upstream=upstream, worker=worker)

    async with serving(build, http=BoundedProtocol) as (url, server):
        state = server.lifespan.state
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=url, timeout=20, limits=limits, verify=False) as http:
            yield Service(url, http, state)
        # What a signal does.
        state["leaving"].begin()


@pytest.fixture(scope="session")
async def service(database_url: str, servers: Servers, upstream: Upstream) -> AsyncIterator[Service]:
    """The service, with the simulator upstream."""
    async with running_service(settings_for(database_url, servers.redis_url, upstream.url)) as service:
        yield service


@pytest.fixture
async def guarded(
    database_url: str, servers: Servers, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Service]:
    """A service that wants credentials, and soon notices that some are no longer good."""
    monkeypatch.setattr(seats, "_LOOK_EVERY", 0.05)
    settings = settings_for(database_url, servers.redis_url, upstream.url, allow_anonymous=False)
    async with running_service(settings) as service:
        yield service


@pytest.fixture
def context_id() -> str:
    return f"order_{uuid4().hex}"


@pytest.fixture
async def run_id(db: AsyncEngine, context_id: str) -> str:
    """A run under way, as the guide's own code would insert it."""
    return await insert_run(db, context_id)


async def insert_run(db: AsyncEngine, context_id: str, status: str = "RUNNING") -> str:
    run_id = f"run_{uuid4().hex}"
    async with db.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO agent_runs (run_id, context_id, name, status) VALUES (:run_id, :context_id, 'A', :status)"
            ),
            {"run_id": run_id, "context_id": context_id, "status": status},
        )
    return run_id


async def new_key(db: AsyncEngine, *scopes: KeyScope, **more: Any) -> tuple[UUID, dict[str, str]]:
    """A key's id, and the header that carries it."""
    async with db.begin() as conn:
        made, secret = await keys.create(conn, "test", scopes or [KeyScope.APP], **more)
    return made.id, bearer(secret.get_secret_value())


def bearer(credential: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}"}


@contextlib.contextmanager
def unheard(engine: AsyncEngine) -> Iterator[None]:
    """Commits the next transaction, and breaks the connection before anybody hears of it."""
    left = 1

    def commit(conn: Connection) -> None:
        nonlocal left
        if left:
            left -= 1
            conn.connection.commit()
            raise PostgresAway("no answer")

    event.listen(engine.sync_engine, "commit", commit)
    yield
    event.remove(engine.sync_engine, "commit", commit)
    assert not left, "nothing was committed"


async def rows_of(db: AsyncEngine, table: Table, run_id: str) -> int:
    """How many rows of a table are about a run."""
    async with db.connect() as conn:
        return await conn.scalar(select(func.count()).select_from(table).where(table.c.run_id == run_id)) or 0


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Chromium, for `async` tests. A machine without one does without these tests, except where changes are judged."""
    # First the one without windows, which others draw even if nobody sees them: that takes half of the time.
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)("there is no Chromium")
    async with async_playwright() as playwright:
        # Its sandbox is not for root, and containers have little shared memory.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = await playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        await browser.close()


@dataclass
class Tab:
    """A page in the browser, and what went wrong in it: what it logged as errors, and requests to other hosts.

    At the end of the test there must be nothing but what it has expected, which may still come by then.
    """

    page: Page
    complaints: list[str] = field(default_factory=list)
    expected: set[str] = field(default_factory=set)
    """Parts of complaints."""


@pytest.fixture
async def tab(browser: Browser) -> AsyncIterator[Tab]:
    """A page that shares nothing with those before it."""
    context = await browser.new_context(reduced_motion="reduce")  # each frame of what moves is drawn by the processor
    tab = Tab(await context.new_page())

    def listen(page: Page) -> None:
        page.on("console", lambda said: tab.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: tab.complaints.append(str(error)))

    def look(url: str) -> None:
        if urlsplit(url).hostname not in (local.LOOPBACK, "localhost", None):
            tab.complaints.append(f"asked another host: {url}")

    listen(tab.page)
    context.on("page", listen)
    context.on("request", lambda request: look(request.url))
    yield tab
    await context.close()
    assert [said for said in tab.complaints if not any(part in said for part in tab.expected)] == []


async def until(condition: Callable[[], Awaitable[bool] | bool], *, within: float = 60) -> None:
    """Waits for something that only looking can tell; looks less often in time, as to look may take a request."""
    pause = 0.02
    async with asyncio.timeout(within):
        while not (await found if isinstance(found := condition(), Awaitable) else found):
            await asyncio.sleep(pause)
            pause = min(1.2 * pause, 0.06)


@dataclass(frozen=True)
class Said:
    """What a command has left."""

    code: int
    out: str
    err: str


@pytest.fixture
def environment(database_url: str, servers: Servers) -> dict[str, str]:
    """What a command is told."""
    return {
        "DATABASE_URL": database_url,
        "REDIS_URL": servers.redis_url,
        "APP_SECRET": APP_SECRET,
        "HAPPYROBOT_WEBHOOK_URL": "https://h.example/hooks/default",
    }


@pytest.fixture
def switchboard(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Runs a command as it is typed, with environment variables, in this process: starting one takes seconds."""

    def run(*arguments: str, stdin: str = "", **variables: str) -> Said:
        with monkeypatch.context() as patch, ThreadPoolExecutor(1) as beside_the_event_loop:
            patch.setattr(sys, "argv", ["switchboard", *arguments])
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            patch.setattr(signal, "signal", lambda *_: None)  # a command's handlers are its process's
            for name, value in variables.items():
                patch.setenv(name, value)
            # What is worth a line to it is not what is worth one to other tests.
            levels = {name: logging.getLogger(name).level for name in ("", "switchboard")}
            error = beside_the_event_loop.submit(cli.main).exception()
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
        assert isinstance(error, SystemExit)
        out, err = capsys.readouterr()
        # The log is that of services in this process, which have nothing to do with the command.
        err = re.sub(r'^(\d{4}-\d\d-\d\dT\d\d|{"timestamp").*\n', "", err, flags=re.MULTILINE)
        # As the interpreter ends.
        return Said(1, out, f"{err}{error.code}\n") if isinstance(error.code, str) else Said(error.code or 0, out, err)

    return run
