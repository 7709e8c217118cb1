"""What those learn who run the service: does it live, can it serve?"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import respx

from switchboard import health
from switchboard.happyrobot.client import HappyRobotError, Hook
from switchboard.migrate import migrate
from tests.conftest import Servers, Service, new_database, run_sql, running_service, settings_for, until
from tests.wires import relayed

NO_POSTGRES = "postgresql://somebody:secret@127.0.0.1:1/switchboard"
NO_REDIS = "redis://somebody:secret@127.0.0.1:1/0"
OK = {"postgresql": "ok", "migrations": "ok", "redis": "ok", "happyrobot": "unknown"}
READY = {"status": "ready", "checks": OK}
HOOK = Hook("http://127.0.0.1:1/hooks/x")


async def asked(service: Service) -> tuple[int, Any]:
    answer = await service.http.get("/readyz")
    return answer.status_code, answer.json()


async def told(database_url: str, redis_url: str) -> tuple[int, Any]:
    """What a service with these servers says."""
    async with running_service(settings_for(database_url, redis_url, None)) as service:
        return await asked(service)


@contextlib.asynccontextmanager
async def silent() -> AsyncIterator[str]:
    """Where somebody takes connections and says nothing."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(take, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_monitors_may_ask_without_wanting_the_answer(service: Service, path: str):
    whole, head = await service.http.get(path), await service.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]


async def test_a_service_that_has_everything_is_ready(database_url: str, servers: Servers):
    assert await told(database_url, servers.redis_url) == (200, READY)


async def test_a_service_whose_connections_are_all_in_use_is_busy_and_ready(database_url: str, servers: Servers):
    async with (
        running_service(settings_for(database_url, servers.redis_url, None)) as service,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(20):
            await stack.enter_async_context(service.state["db"].connect())
        assert await asked(service) == (200, READY)


async def test_without_postgresql_it_is_not_ready_and_alive(servers: Servers):
    async with running_service(settings_for(NO_POSTGRES, servers.redis_url, None)) as service:
        checks = OK | {"postgresql": "away", "migrations": "unknown"}
        assert await asked(service) == (503, {"status": "not ready", "checks": checks})
        assert (await service.http.head("/readyz")).status_code == 503
        assert (await service.http.get("/healthz")).json() == {"status": "ok"}


async def test_without_redis_it_goes_on_and_says_so(database_url: str):
    assert await told(database_url, NO_REDIS) == (200, {"status": "degraded", "checks": OK | {"redis": "away"}})


async def test_without_happyrobot_it_goes_on_and_says_so(database_url: str, servers: Servers):
    router = respx.MockRouter()
    route = router.post(HOOK.url)
    settings = settings_for(database_url, servers.redis_url, None, happyrobot_trigger_timeout=0.1)
    async with running_service(settings, httpx.MockTransport(router.async_handler)) as service:
        for answer, seen, status in (
            (httpx.Response(500), "away", "degraded"),
            (httpx.Response(200, json={"run_id": "r"}), "ok", "ready"),
        ):
            route.mock(return_value=answer)
            with contextlib.suppress(HappyRobotError):
                await service.state["happyrobot"].trigger(HOOK, {})
            # It is asked nothing for this.
            for _ in range(2):
                assert await asked(service) == (200, {"status": status, "checks": OK | {"happyrobot": seen}})
        assert route.call_count == 2


async def test_servers_that_say_nothing_are_not_waited_for_for_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "_PATIENCE", 0.2)
    checks = OK | {"postgresql": "away", "migrations": "unknown", "redis": "away"}
    async with silent() as address:
        settings = settings_for(f"postgresql://somebody@{address}/x", f"redis://{address}", None)
        async with running_service(settings) as service:
            # Sooner than the five seconds after which a connection to PostgreSQL is given up.
            async with asyncio.timeout(4):
                assert await asked(service) == (503, {"status": "not ready", "checks": checks})


async def test_on_a_wire_that_went_dead_it_answers_in_time_and_is_ready_when_it_is_back(
    own_database: str, servers: Servers, monkeypatch: pytest.MonkeyPatch
):
    async with (
        relayed(own_database) as postgresql,
        relayed(servers.redis_url) as redis,
        running_service(settings_for(postgresql.url, redis.url, None)) as service,
    ):
        assert await asked(service) == (200, READY)
        postgresql.lose()
        redis.lose()
        with monkeypatch.context() as impatient:
            impatient.setattr(health, "_PATIENCE", 0.2)
            for _ in range(2):
                async with asyncio.timeout(4):
                    status, said = await asked(service)
                assert (status, said["checks"]["postgresql"], said["checks"]["redis"]) == (503, "away", "away")
        await postgresql.restore()
        await redis.restore()
        await until(lambda: is_ready(service))


async def is_ready(service: Service) -> bool:
    return await asked(service) == (200, READY)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE alembic_version SET version_num = '0001'",
        "DELETE FROM alembic_version",
        "DROP TABLE alembic_version",
    ],
)
async def test_on_an_older_schema_it_is_not_ready(own_database: str, servers: Servers, change: str):
    await run_sql(own_database, change)
    checks = OK | {"migrations": "behind"}
    assert await told(own_database, servers.redis_url) == (503, {"status": "not ready", "checks": checks})


async def test_it_becomes_ready_with_the_migration(servers: Servers):
    async with new_database(servers) as url, running_service(settings_for(url, servers.redis_url, None)) as service:
        assert (await asked(service))[1]["checks"]["migrations"] == "behind"
        await migrate(url)
        assert await asked(service) == (200, READY)


async def test_on_a_newer_schema_it_is_ready_for_a_deployment_has_begun(own_database: str, servers: Servers):
    await run_sql(own_database, "UPDATE alembic_version SET version_num = 'of a version to come'")
    assert await told(own_database, servers.redis_url) == (200, READY)


async def test_a_redis_that_fails_in_a_way_of_uvloop_s_is_away(
    database_url: str, servers: Servers, monkeypatch: pytest.MonkeyPatch
):
    async with running_service(settings_for(database_url, servers.redis_url, None)) as service:
        closed = Mock(side_effect=RuntimeError("unable to perform operation on <TCPTransport closed=True>"))
        monkeypatch.setattr(service.state["redis"], "ping", closed)
        status, said = await asked(service)
    assert (status, said["status"], said["checks"]["redis"]) == (200, "degraded", "away")
