"""Limits on everybody: wrong credentials, open streams, executions in a month."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import HTTPConnection

from switchboard.access import keys, seats
from switchboard.access.limits import address_of
from switchboard.access.tokens import Signer
from switchboard.tables import KeyScope, api_key_usage, api_keys, executions
from tests.conftest import (
    APP_SECRET,
    HOOK_KEY,
    Servers,
    Service,
    Upstream,
    bearer,
    insert_run,
    new_key,
    running_service,
    settings_for,
    until,
)
from tests.test_tokens import RUNS, TOKENS, TRIGGER, get_token, token

STREAM = "/api/events"


@pytest.fixture
async def strict(database_url: str, servers: Servers, upstream: Upstream) -> AsyncIterator[Service]:
    """A service with small limits, which answers nobody without credentials."""
    settings = settings_for(
        database_url,
        servers.redis_url,
        upstream.url,
        allow_anonymous=False,
        failed_logins_per_minute=5,
        streams_per_address=2,
        streams_per_key=3,
    )
    async with running_service(settings) as service:
        yield service


def from_address(context_id: str, number: int = 1) -> dict[str, str]:
    """A header by which a request comes from an address of this test's own."""
    return {"X-Forwarded-For": f"2001:db8:{context_id[6:10]}:{context_id[10:14]}::{number}"}


# Wrong credentials.


async def test_whoever_guesses_is_told_to_wait(strict: Service, db: AsyncEngine, context_id: str):
    guess, address = bearer("0" * 64), from_address(context_id)
    statuses = [(await strict.http.get(RUNS, headers=guess | address)).status_code for _ in range(5)]
    assert statuses == [401] * 5
    answer = await strict.http.get(RUNS, headers=guess | address)
    assert (answer.status_code, answer.json()) == (429, {"error": "Too many wrong credentials"})
    assert 1 <= int(answer.headers["retry-after"]) <= 12
    # All of a customer's addresses are one.
    assert (await strict.http.get(RUNS, headers=guess | from_address(context_id, 2))).status_code == 429


async def test_nobody_is_locked_out_by_those_who_guess_beside_them(strict: Service, db: AsyncEngine, context_id: str):
    run_id, address = await insert_run(db, context_id), from_address(context_id)
    for _ in range(6):
        answer = await strict.http.get(RUNS, headers=bearer("x.y.z") | address)
    assert answer.status_code == 429
    _, headers = await new_key(db)
    assert (await strict.http.get(RUNS, headers=headers | address)).status_code == 200
    assert (await strict.http.get(RUNS, headers=bearer("0" * 64))).status_code == 401
    body = {"run_id": run_id, "event_type": "log"}
    callback = await strict.http.post("/api/webhooks/happyrobot", json=body, headers={"X-API-KEY": HOOK_KEY} | address)
    assert callback.status_code == 200


async def test_wrong_keys_of_callbacks_count_too(strict: Service, context_id: str):
    headers = {"X-API-KEY": "wrong"} | from_address(context_id)
    statuses = [(await strict.http.post("/api/webhooks/happyrobot", headers=headers)).status_code for _ in range(6)]
    assert statuses == [401] * 5 + [429]


@pytest.mark.parametrize("kind", ["nothing", "revoked key", "token of it", "expired token"])
async def test_who_brings_nothing_or_what_was_good_once_does_not_guess(
    strict: Service, db: AsyncEngine, context_id: str, kind: str
):
    key_id, key = await new_key(db)
    signed = await get_token(strict, key, "*")
    ended = Signer(SecretStr(APP_SECRET)).sign(token(key_id=key_id, expires_at=datetime.now(UTC)))
    async with db.begin() as conn:
        await keys.revoke(conn, key_id)
    headers = {"nothing": {}, "revoked key": key, "token of it": bearer(signed), "expired token": bearer(ended)}[kind]
    for _ in range(6):
        answer = await strict.http.get(RUNS, headers=headers | from_address(context_id))
        assert answer.status_code == (403 if kind == "revoked key" else 401)


async def test_two_services_count_together_and_each_alone_without_redis(
    database_url: str, servers: Servers, upstream: Upstream, context_id: str
):
    settings = settings_for(
        database_url, servers.redis_url, upstream.url, allow_anonymous=False, failed_logins_per_minute=2
    )
    headers = bearer("0" * 64) | from_address(context_id)
    async with running_service(settings) as one, running_service(settings) as other:
        statuses = [(await each.http.get(RUNS, headers=headers)).status_code for each in (one, other, one, other)]
        assert statuses == [401, 401, 429, 429]
    alone = settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1")})
    async with running_service(alone) as service:
        statuses = [(await service.http.get(RUNS, headers=headers)).status_code for _ in range(3)]
        assert statuses == [401, 401, 429]


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("203.0.113.7", 1), "203.0.113.7"),
        (("::ffff:203.0.113.7", 1), "203.0.113.7"),
        (("2001:db8:1:2:3:4:5:6", 1), "2001:db8:1:2::/64"),
        (("::1", 1), "::1"),
        (("", 0), ""),
        (None, ""),
    ],
)
def test_an_address_is_what_one_customer_is_given(client: Any, address: str):
    assert address_of(HTTPConnection({"type": "http", "client": client})) == address


# Open streams.


@contextlib.asynccontextmanager
async def open_stream(service: Service, headers: dict[str, str], **params: str) -> AsyncIterator[httpx.Response]:
    async with service.http.stream("GET", STREAM, headers=headers, params=params) as answer:
        if answer.status_code != 200:
            await answer.aread()
        yield answer


async def test_an_address_has_so_many_streams_and_another_its_own(strict: Service, db: AsyncEngine, context_id: str):
    _, headers = await new_key(db)
    here, there = headers | from_address(context_id), headers | {"X-Forwarded-For": "203.0.113.7"}
    async with open_stream(strict, here) as one, open_stream(strict, here) as two:
        assert (one.status_code, two.status_code) == (200, 200)
        async with open_stream(strict, here) as three, open_stream(strict, there) as other:
            assert (three.status_code, three.json()) == (429, {"error": "Too many open streams to this address"})
            assert "retry-after" in three.headers
            assert other.status_code == 200

    async def room_again() -> bool:
        async with open_stream(strict, here) as again:
            return again.status_code == 200

    await until(room_again)


async def test_a_key_has_so_many_streams_its_tokens_included(strict: Service, db: AsyncEngine):
    _, headers = await new_key(db)
    signed = bearer(await get_token(strict, headers, "*"))
    _, others = await new_key(db)
    async with contextlib.AsyncExitStack() as stack:
        for each in (headers, signed, headers):
            # From this machine, where addresses are not counted.
            assert (await stack.enter_async_context(open_stream(strict, each))).status_code == 200
        full = await stack.enter_async_context(open_stream(strict, signed))
        assert (full.status_code, full.json()) == (429, {"error": "Too many open streams of this API key"})
        assert (await stack.enter_async_context(open_stream(strict, others))).status_code == 200


async def test_a_key_that_is_revoked_keeps_no_stream(
    database_url: str, servers: Servers, upstream: Upstream, db: AsyncEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(seats, "_LOOK_EVERY", 0.05)
    async with running_service(settings_for(database_url, servers.redis_url, upstream.url)) as service:
        key_id, headers = await new_key(db)
        _, others = await new_key(db)
        signed = bearer(await get_token(service, headers, "*"))
        async with contextlib.AsyncExitStack() as stack:
            ended = [await stack.enter_async_context(open_stream(service, each)) for each in (headers, signed)]
            stays = await stack.enter_async_context(open_stream(service, others))
            nobodys = await stack.enter_async_context(open_stream(service, {}))
            async with db.begin() as conn:
                await keys.revoke(conn, key_id)
            for stream in ended:
                assert "event: renew" in [line async for line in stream.aiter_lines()]
            # Those of others go on.
            run_id = await insert_run(db, "order_1")
            await service.callback(run_id, "log", "still here")
            for stream in (stays, nobodys):
                assert await anext(line async for line in stream.aiter_lines() if "still here" in line)


async def test_a_key_that_was_replaced_keeps_no_stream_and_its_tokens_keep_theirs(
    database_url: str, servers: Servers, upstream: Upstream, db: AsyncEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(seats, "_LOOK_EVERY", 0.05)
    async with running_service(settings_for(database_url, servers.redis_url, upstream.url)) as service:
        key_id, headers = await new_key(db)
        signed = bearer(await get_token(service, headers, "*"))
        async with open_stream(service, headers) as ended, open_stream(service, signed) as stays:
            async with db.begin() as conn:
                secret, _ = await keys.rotate(conn, key_id, timedelta(0))
            assert "event: renew" in [line async for line in ended.aiter_lines()]
            async with open_stream(service, bearer(secret.get_secret_value())) as fresh:
                run_id = await insert_run(db, "order_1")
                await service.callback(run_id, "log", "still here")
                for stream in (stays, fresh):
                    assert await anext(line async for line in stream.aiter_lines() if "still here" in line)


async def test_what_is_good_is_neither_revoked_nor_over(db: AsyncEngine):
    async with db.begin() as conn:
        made = [await keys.create(conn, "test", [KeyScope.APP]) for _ in range(4)]
        found = [await keys.find(conn, secret.get_secret_value()) for _, secret in made]
        ids = [key.id for key, _ in made]
        await keys.revoke(conn, ids[0])
        await conn.execute(update(api_keys).where(api_keys.c.id == ids[1]).values(expires_at=text("now()")))
        await keys.rotate(conn, ids[2], timedelta(0))
        good = await keys.good(conn, ids)
    assert good & set(ids) == {ids[2], ids[3]}
    assert [key is not None and key.digest in good for key in found] == [False, False, False, True]


@pytest.mark.parametrize("wrong", [ConnectionError, RuntimeError], ids=["PostgreSQL is away", "nobody knows what"])
async def test_streams_outlive_what_goes_wrong_while_keys_are_looked_at_and_looking_goes_on(
    database_url: str,
    servers: Servers,
    upstream: Upstream,
    db: AsyncEngine,
    monkeypatch: pytest.MonkeyPatch,
    wrong: type[Exception],
):
    looked = asyncio.Event()
    really = keys.good

    async def broken(*_: Any) -> set[Any]:
        monkeypatch.setattr(keys, "good", really)
        looked.set()
        raise wrong

    monkeypatch.setattr(seats, "_LOOK_EVERY", 0.05)
    monkeypatch.setattr(keys, "good", broken)
    async with running_service(settings_for(database_url, servers.redis_url, upstream.url)) as service:
        key_id, headers = await new_key(db)
        async with open_stream(service, headers) as stream:
            await looked.wait()
            async with db.begin() as conn:
                await keys.revoke(conn, key_id)
            assert "event: renew" in [line async for line in stream.aiter_lines()]


# Executions in a month.


async def trigger(service: Service, headers: dict[str, str], **more: str) -> httpx.Response:
    return await service.http.post(TRIGGER, json={"context_id": "order_1"}, headers=headers | more)


async def test_a_key_has_so_many_executions_a_month_however_many_come_at_once(
    service: Service, upstream: Upstream, db: AsyncEngine
):
    key_id, headers = await new_key(db, monthly_limit=5)
    signed = bearer(await get_token(service, headers, "*", scopes=["trigger"]))
    before = len(upstream.simulator.calls)
    answers = await asyncio.gather(*(trigger(service, headers if n % 2 else signed) for n in range(20)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200] * 5 + [403] * 15
    assert {answer.json()["error"] for answer in answers if answer.status_code == 403} == {
        "API key usage limit exceeded"
    }
    assert len(upstream.simulator.calls) == before + 5
    async with db.connect() as conn:
        query = select(executions.c.id).where(executions.c.key_id == key_id)
        assert len((await conn.execute(query)).all()) == 5
        assert {key.id: used for key, used in await keys.listed(conn)}[key_id] == 5


async def test_a_new_month_is_a_new_beginning(service: Service, db: AsyncEngine):
    key_id, headers = await new_key(db, monthly_limit=1)
    async with db.begin() as conn:
        last_month = (datetime.now(UTC).replace(day=1) - timedelta(days=1)).date().replace(day=1)
        await conn.execute(insert(api_key_usage).values(key_id=key_id, month=last_month, executions=1))
    assert (await trigger(service, headers)).status_code == 200
    assert (await trigger(service, headers)).status_code == 403


async def test_what_is_refused_or_told_again_does_not_count(service: Service, db: AsyncEngine):
    _, headers = await new_key(db, monthly_limit=1)
    unknown = {"context_id": "order_1", "workflow_id": "unknown"}
    assert (await service.http.post(TRIGGER, json=unknown, headers=headers)).status_code == 404
    first = await trigger(service, headers, **{"Idempotency-Key": "one"})
    again = await trigger(service, headers, **{"Idempotency-Key": "one"})
    assert (first.status_code, again.json()) == (200, first.json())


# Whose requests they are.


async def test_an_idempotency_key_is_its_owners(service: Service, db: AsyncEngine):
    _, one = await new_key(db)
    _, other = await new_key(db)
    browsers = [
        bearer(await get_token(service, one, contexts, scopes=["trigger"]))
        for contexts in (["order_1"], ["order_1", "order_2"], "*")
    ]
    idempotency_key = {"Idempotency-Key": "one"}
    answers = [await trigger(service, each, **idempotency_key) for each in (one, other, *browsers)]
    assert [answer.status_code for answer in answers] == [200] * 5
    ids = [answer.json()["execution_id"] for answer in answers]
    # A browser whose token was renewed, for more than before, is the same one; one for all is the backend's equal.
    assert ids[2] == ids[3]
    assert ids[0] == ids[4]
    assert len(set(ids)) == 3


async def test_browsers_with_different_contexts_do_not_use_up_each_others_keys(service: Service, db: AsyncEngine):
    _, headers = await new_key(db)
    for context in ("order_1", "order_2"):
        signed = bearer(await get_token(service, headers, [context], scopes=["trigger"]))
        answer = await service.http.post(
            TRIGGER, json={"context_id": context}, headers=signed | {"Idempotency-Key": "one"}
        )
        assert answer.status_code == 200


async def test_it_is_known_when_a_key_was_last_used(service: Service, db: AsyncEngine):
    key_id, headers = await new_key(db)

    async def last_used() -> datetime | None:
        async with db.connect() as conn:
            found: datetime | None = await conn.scalar(select(api_keys.c.last_used_at).where(api_keys.c.id == key_id))
            return found

    assert await last_used() is None
    await service.http.get(RUNS, headers=headers)
    first = await last_used()
    assert first is not None
    assert abs(datetime.now(UTC) - first) < timedelta(minutes=1)
    # To the minute is enough: not every request writes.
    await service.http.get(RUNS, headers=headers)
    assert await last_used() == first
    async with db.begin() as conn:
        earlier = text("UPDATE api_keys SET last_used_at = now() - interval '2 minutes' WHERE id = :id")
        await conn.execute(earlier, {"id": key_id})
    signed = bearer(await get_token(service, headers, "*"))
    again = await last_used()
    assert again is not None
    assert again > first
    assert (await service.http.get(RUNS, headers=signed)).status_code == 200


async def test_nobody_waits_for_whoever_looks_at_a_key(service: Service, db: AsyncEngine):
    key_id, headers = await new_key(db)
    async with db.begin() as conn:
        await conn.execute(select(api_keys).where(api_keys.c.id == key_id).with_for_update())
        answer = await service.http.get(RUNS, params={"limit": "1"}, headers=headers)
    assert answer.status_code == 200


async def test_a_request_that_was_begun_with_a_good_key_places_no_call_with_a_revoked_one(
    service: Service, upstream: Upstream, db: AsyncEngine
):
    key_id, headers = await new_key(db)
    before = len(upstream.simulator.calls)

    async def revoked_meanwhile() -> AsyncIterator[bytes]:
        yield b'{"context_id": '
        # It has been let in once it is known to be in use.
        await until(lambda: used(db, key_id))
        async with db.begin() as conn:
            await keys.revoke(conn, key_id)
        yield b'"order_1"}'

    answer = await service.http.post(TRIGGER, content=revoked_meanwhile(), headers=headers)
    assert (answer.status_code, answer.json()) == (403, {"error": "API key is inactive"})
    assert len(upstream.simulator.calls) == before


async def used(db: AsyncEngine, key_id: UUID) -> bool:
    async with db.connect() as conn:
        return await conn.scalar(select(api_keys.c.last_used_at).where(api_keys.c.id == key_id)) is not None


async def test_whoever_is_refused_is_named_in_the_log(
    database_url: str, servers: Servers, db: AsyncEngine, capsys: pytest.CaptureFixture[str]
):
    key_id, headers = await new_key(db)
    async with running_service(settings_for(database_url, servers.redis_url, None, log_level="info")) as service:
        signed = bearer(await get_token(service, headers, "*"))
        async with db.begin() as conn:
            await keys.revoke(conn, key_id)
        for each in (headers, signed):
            capsys.readouterr()
            await service.http.get(RUNS, headers=each)
            lines = capsys.readouterr().err.splitlines()
            assert any(str(key_id) in line and "status=40" in line for line in lines)


async def test_many_requests_at_once_note_the_use_without_waiting_for_each_other(service: Service, db: AsyncEngine):
    _, headers = await new_key(db, KeyScope.ADMIN)
    answers = await asyncio.gather(*(service.http.get(RUNS, params={"limit": "1"}, headers=headers) for _ in range(30)))
    assert {answer.status_code for answer in answers} == {200}
    assert (await service.http.post(TOKENS, json={"context_ids": "*"}, headers=headers)).status_code == 200
