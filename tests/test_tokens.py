"""Browser tokens: what they are, what they open, how long, and how browsers bring them."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import jwt
import pytest
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.access import keys
from switchboard.access.callers import COOKIE
from switchboard.access.tokens import BrowserToken, Right, Signer, TokenExpired, TokenInvalid
from switchboard.sealing import derived
from tests.conftest import (
    APP_SECRET,
    Servers,
    Service,
    Upstream,
    bearer,
    insert_run,
    new_key,
    running_service,
    settings_for,
)

TOKENS = "/api/happyrobot/tokens"
SESSION = "/api/happyrobot/session"
RUNS = "/api/happyrobot/runs"
TRIGGER = "/api/happyrobot/trigger"

SECRET = SecretStr("one secret of the tests, long enough")
OTHER = SecretStr("another secret of the tests, long enough")


def token(**more: Any) -> BrowserToken:
    values = {
        "contexts": frozenset({"order_1"}),
        "rights": frozenset({Right.READ}),
        "expires_at": datetime.now(UTC).replace(microsecond=0) + timedelta(days=1),
        "key_id": uuid4(),
    }
    return BrowserToken(**(values | more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "made",
    [
        token(),
        token(contexts=None),
        token(contexts=frozenset({"*", "ü\r\n", "order 2"}), rights=frozenset(Right)),
        token(key_id=None),
    ],
)
def test_a_token_says_what_it_was_made_to_say(made: BrowserToken):
    assert Signer(SECRET).read(Signer(SECRET).sign(made)) == made


def test_no_two_tokens_are_the_same():
    made = token()
    assert Signer(SECRET).sign(made) != Signer(SECRET).sign(made)


def test_a_token_of_another_secret_is_no_token():
    with pytest.raises(TokenInvalid):
        Signer(SECRET).read(Signer(OTHER).sign(token()))


def test_a_token_of_the_previous_secret_is_good_until_it_ends():
    made = token()
    assert Signer(SECRET, OTHER).read(Signer(OTHER).sign(made)) == made
    with pytest.raises(TokenExpired):
        Signer(SECRET, OTHER).read(Signer(OTHER).sign(token(expires_at=datetime.now(UTC))))


def test_no_part_of_a_token_can_be_altered():
    signed = Signer(SECRET).sign(token())
    for place in range(0, len(signed) - 1, 7):
        altered = signed[:place] + ("A" if signed[place] != "A" else "B") + signed[place + 1 :]
        with pytest.raises(TokenInvalid):
            Signer(SECRET).read(altered)


def without_padding(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", ""])
def test_a_token_without_a_signature_is_no_token(algorithm: str):
    claims = jwt.decode(Signer(SECRET).sign(token()), options={"verify_signature": False})
    head = without_padding(json.dumps({"alg": algorithm, "typ": "JWT"}).encode())
    body = without_padding(json.dumps(claims).encode())
    for signature in ("", "x"):
        with pytest.raises(TokenInvalid):
            Signer(SECRET).read(f"{head}.{body}.{signature}")


KEY = derived(SECRET, b"switchboard: browser tokens, 1")


@pytest.mark.parametrize(
    ("claims", "algorithm"),
    [
        ({}, "HS512"),
        ({"aud": "elsewhere"}, "HS256"),
        ({"iss": "somebody"}, "HS256"),
        ({"exp": None}, "HS256"),
        ({"exp": "soon"}, "HS256"),
        ({"exp": 10**20}, "HS256"),
        ({"contexts": None}, "HS256"),
        ({"contexts": 7}, "HS256"),
        ({"scopes": ["admin"]}, "HS256"),
        ({"key": "no uuid"}, "HS256"),
    ],
)
def test_what_we_would_not_have_signed_is_no_token(claims: dict[str, Any], algorithm: str):
    good = jwt.decode(Signer(SECRET).sign(token()), options={"verify_signature": False})
    made = {name: value for name, value in (good | claims).items() if value is not None}
    with pytest.raises(TokenInvalid):
        Signer(SECRET).read(jwt.encode(made, KEY if algorithm == "HS256" else KEY * 2, algorithm))


@pytest.mark.parametrize("text", ["", ".", "..", "a.b.c", "ü.ü.ü", "x\r\nSet-Cookie: y", "\x00", "eyJ" * 5000])
def test_nonsense_is_no_token(text: str):
    with pytest.raises(TokenInvalid):
        Signer(SECRET).read(text)


def test_clocks_of_replicas_may_differ():
    claims = jwt.decode(Signer(SECRET).sign(token()), options={"verify_signature": False})
    early = claims | {"iat": claims["iat"] + 30}
    assert Signer(SECRET).read(jwt.encode(early, KEY, "HS256")).contexts == frozenset({"order_1"})


def test_a_secret_says_nothing_about_what_it_signs_with():
    forged = jwt.encode({"iss": "switchboard"}, SECRET.get_secret_value(), "HS256")
    with pytest.raises(TokenInvalid):
        Signer(SECRET).read(forged)


# Over HTTP.


@pytest.fixture(scope="module")
async def guarded(database_url: str, servers: Servers, upstream: Upstream) -> AsyncIterator[Service]:
    """A service that answers nobody without credentials."""
    settings = settings_for(database_url, servers.redis_url, upstream.url, allow_anonymous=False)
    async with running_service(settings) as service:
        yield service


async def get_token(service: Service, headers: dict[str, str], context_ids: Any, **more: Any) -> str:
    answer = await service.http.post(TOKENS, json={"context_ids": context_ids} | more, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["token"])


async def test_a_token_reads_for_a_quarter_of_an_hour_unless_more_is_asked_for(guarded: Service, db: AsyncEngine):
    _, headers = await new_key(db)
    asked = datetime.now(UTC)
    answer = await guarded.http.post(TOKENS, json={"context_ids": ["order_1"]}, headers=headers)
    ends = datetime.fromisoformat(answer.json()["expires_at"])
    assert abs(ends - asked - timedelta(minutes=15)) < timedelta(seconds=10)
    assert (await guarded.http.get(RUNS, headers=bearer(answer.json()["token"]))).status_code == 200
    refused = await guarded.http.post(TRIGGER, json={"context_id": "order_1"}, headers=bearer(answer.json()["token"]))
    assert (refused.status_code, refused.json()) == (403, {"error": "This token is not allowed to do that"})


async def test_a_token_lasts_no_longer_than_the_key_that_gave_it(guarded: Service, db: AsyncEngine):
    _, headers = await new_key(db, lifetime=timedelta(minutes=1))
    asked = datetime.now(UTC)
    answer = await guarded.http.post(TOKENS, json={"context_ids": "*", "expires_in": 86_400}, headers=headers)
    assert datetime.fromisoformat(answer.json()["expires_at"]) <= asked + timedelta(minutes=1, seconds=5)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({}, "context_ids required"),
        ({"context_ids": []}, "context_ids"),
        ({"context_ids": "order_1"}, "context_ids"),
        ({"context_ids": [""]}, "context_ids"),
        ({"context_ids": ["x" * 256]}, "context_ids"),
        ({"context_ids": [7]}, "context_ids"),
        ({"context_ids": ["x"] * 101}, "context_ids"),
        ({"context_ids": [f"{number:0>200}" for number in range(50)]}, "context_ids: too long for one token"),
        ({"context_ids": "*", "scopes": []}, "scopes"),
        ({"context_ids": "*", "scopes": ["admin"]}, "scopes"),
        ({"context_ids": "*", "scopes": "read"}, "scopes"),
        ({"context_ids": "*", "expires_in": 0}, "expires_in"),
        ({"context_ids": "*", "expires_in": 86_401}, "expires_in"),
        ({"context_ids": "*", "expires_in": "900"}, "expires_in"),
        ([], "The body must be a JSON object"),
    ],
)
async def test_a_token_for_what_there_is_not_is_refused(guarded: Service, db: AsyncEngine, body: Any, complaint: str):
    _, headers = await new_key(db)
    answer = await guarded.http.post(TOKENS, json=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(complaint)


async def test_the_longest_token_fits_into_a_cookie(guarded: Service, db: AsyncEngine):
    _, headers = await new_key(db)
    signed = await get_token(guarded, headers, [f"order_{number:0>12}" for number in range(100)])
    answer = await guarded.http.post(SESSION, headers=bearer(signed))
    assert len(answer.headers["set-cookie"]) < 4096
    guarded.http.cookies.clear()


async def test_a_token_ends_with_its_key(guarded: Service, db: AsyncEngine):
    key_id, headers = await new_key(db)
    signed = await get_token(guarded, headers, "*")
    async with db.begin() as conn:
        await keys.revoke(conn, key_id)
    answer = await guarded.http.get(RUNS, headers=bearer(signed))
    assert (answer.status_code, answer.json()) == (401, {"error": "Token is no longer good"})


async def test_a_token_is_good_while_its_key_is_being_replaced_and_after(guarded: Service, db: AsyncEngine):
    key_id, headers = await new_key(db)
    signed = await get_token(guarded, headers, "*")
    async with db.begin() as conn:
        await keys.rotate(conn, key_id, timedelta(0))
    assert (await guarded.http.get(RUNS, headers=headers)).status_code == 403
    assert (await guarded.http.get(RUNS, headers=bearer(signed))).status_code == 200


async def test_an_expired_token_says_so(guarded: Service, db: AsyncEngine):
    key_id, _ = await new_key(db)
    signed = Signer(SecretStr(APP_SECRET)).sign(token(key_id=key_id, expires_at=datetime.now(UTC)))
    answer = await guarded.http.get(RUNS, headers=bearer(signed))
    assert (answer.status_code, answer.json()) == (401, {"error": "Token expired"})


async def test_an_address_carries_a_token_for_reading_only(guarded: Service, db: AsyncEngine, context_id: str):
    run_id = await insert_run(db, context_id)
    _, headers = await new_key(db)
    signed = await get_token(guarded, headers, [context_id], scopes=["read", "trigger"])
    params = {"access_token": signed}
    assert [run["runId"] for run in (await guarded.http.get(RUNS, params=params)).json()] == [run_id]
    async with guarded.stream(access_token=signed) as stream:
        await guarded.callback(run_id, "log", 1)
        assert (await anext(stream))["run_id"] == run_id
    answer = await guarded.http.post(TRIGGER, params=params, json={"context_id": context_id})
    assert answer.status_code == 401


async def test_an_address_carries_no_api_key(guarded: Service, db: AsyncEngine):
    _, headers = await new_key(db)
    key = headers["Authorization"].removeprefix("Bearer ")
    assert (await guarded.http.get(RUNS, params={"access_token": key})).status_code == 401


async def test_pages_that_follow_one_another_are_read_with_a_token_in_the_address(
    guarded: Service, db: AsyncEngine, context_id: str
):
    for _ in range(2):
        await insert_run(db, context_id)
    _, headers = await new_key(db)
    params = {"access_token": await get_token(guarded, headers, [context_id]), "limit": "1"}
    link = (await guarded.http.get(RUNS, params=params)).headers["link"]
    assert len((await guarded.http.get(link[1 : link.index(">")])).json()) == 1


@pytest.mark.parametrize("scheme", ["Basic dXNlcjpwYXNz", "Bearer", "Digest x"])
async def test_what_is_not_ours_to_read_is_no_credential(guarded: Service, service: Service, scheme: str):
    headers = {"Authorization": scheme}
    assert (await guarded.http.get(RUNS, headers=headers)).status_code == 401
    assert (await service.http.get(RUNS, headers=headers)).status_code == 200


async def test_wrong_credentials_are_refused_also_where_none_are_needed(service: Service):
    assert (await service.http.get(RUNS, headers=bearer("0" * 64))).status_code == 401
    assert (await service.http.get(RUNS, params={"access_token": "x"})).status_code == 401


async def test_where_no_credentials_are_needed_a_token_narrows_all_the_same(
    service: Service, db: AsyncEngine, context_id: str
):
    run_id, other = await insert_run(db, context_id), await insert_run(db, "another")
    signed = await get_token(service, {}, [context_id])
    assert [run["runId"] for run in (await service.http.get(RUNS, headers=bearer(signed))).json()] == [run_id]
    assert (await service.http.get(f"{RUNS}/{other}", headers=bearer(signed))).status_code == 404


# As a cookie.


async def test_a_token_is_kept_in_a_cookie_that_scripts_cannot_read(guarded: Service, db: AsyncEngine, context_id: str):
    await insert_run(db, context_id)
    _, headers = await new_key(db)
    signed = await get_token(guarded, headers, [context_id], expires_in=600)
    async with httpx.AsyncClient(base_url=guarded.url) as browser:
        answer = await browser.post(SESSION, headers=bearer(signed))
        cookie = answer.headers["set-cookie"].lower()
        assert cookie.startswith(f"{COOKIE}=")
        assert {part.strip() for part in cookie.split(";")[1:]} >= {"httponly", "samesite=strict", "path=/api"}
        assert "secure" not in cookie
        [seconds] = [part for part in cookie.split(";") if "max-age" in part]
        assert 590 <= int(seconds.split("=")[1]) <= 600
        assert [run["contextId"] for run in (await browser.get(RUNS)).json()] == [context_id]
        assert (await browser.delete(SESSION)).status_code == 204
        assert (await browser.get(RUNS)).status_code == 401


async def test_the_cookie_is_for_https_alone_where_there_is_https(guarded: Service, db: AsyncEngine):
    _, headers = await new_key(db)
    signed = await get_token(guarded, headers, "*")
    answer = await guarded.http.post(SESSION, headers=bearer(signed) | {"X-Forwarded-Proto": "https"})
    assert "secure" in answer.headers["set-cookie"].lower()
    guarded.http.cookies.clear()


async def test_the_cookie_is_for_https_alone_in_production(database_url: str, servers: Servers, db: AsyncEngine):
    settings = settings_for(
        database_url, servers.redis_url, None, environment="production", app_url="https://calls.example.com"
    )
    _, headers = await new_key(db)
    async with running_service(settings) as service:
        answer = await service.http.post(SESSION, headers=bearer(await get_token(service, headers, "*")))
    assert "secure" in answer.headers["set-cookie"].lower()


async def with_cookie(guarded: Service, db: AsyncEngine, headers: dict[str, str], method: str = "GET") -> int:
    _, key = await new_key(db)
    signed = await get_token(guarded, key, "*", scopes=["read", "trigger"])
    url = RUNS if method == "GET" else TRIGGER
    body = None if method == "GET" else {"context_id": "order_1"}
    request = guarded.http.build_request(method, url, json=body, headers=headers | {"Cookie": f"{COOKIE}={signed}"})
    return (await guarded.http.send(request)).status_code


HERE = [
    {},
    {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"},
    {"Sec-Fetch-Site": "none"},
    {"Origin": "http://switchboard.test:81", "Host": "switchboard.test:81"},
    {"Origin": "http://10.1.2.3:3000", "X-Forwarded-Host": "10.1.2.3:3000"},
]
ELSEWHERE = [
    {"Origin": "http://[x]"},
    {"Origin": "http://[::1"},
    {"Origin": ""},
    {"Origin": "http://127.0.0.1:9"},  # the same site, so that cookies are sent
    {"Origin": "null"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://switchboard.test", "Host": "switchboard.test"},
]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("headers", HERE, ids=str)
async def test_a_cookie_counts_for_pages_of_this_origin(
    guarded: Service, db: AsyncEngine, headers: dict[str, str], method: str
):
    assert await with_cookie(guarded, db, headers, method) == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("headers", ELSEWHERE, ids=str)
async def test_a_cookie_does_not_count_for_pages_of_another(
    guarded: Service, db: AsyncEngine, headers: dict[str, str], method: str
):
    assert await with_cookie(guarded, db, headers, method) == 403


async def test_who_follows_a_link_from_elsewhere_is_let_in_to_read(guarded: Service, db: AsyncEngine):
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert await with_cookie(guarded, db, headers) == 200
    assert await with_cookie(guarded, db, headers, "POST") == 403


@pytest.mark.parametrize("headers", ELSEWHERE, ids=str)
async def test_no_page_of_another_origin_places_calls_where_no_credentials_are_needed(
    service: Service, upstream: Upstream, headers: dict[str, str]
):
    before = len(upstream.simulator.calls)
    answer = await service.http.post(TRIGGER, json={"context_id": "x"}, headers=headers)
    assert answer.status_code == 403
    assert len(upstream.simulator.calls) == before


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "internal.example", "a.b", "[x", "x]:1.2"]
)
async def test_no_page_passes_for_this_origin_by_leading_its_own_name_here(
    service: Service, guarded: Service, db: AsyncEngine, host: str
):
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}):
        assert (await service.http.get(RUNS, headers=headers)).status_code == 403
        assert (await service.http.post(TRIGGER, json={"context_id": "x"}, headers=headers)).status_code == 403
    # With credentials of their own, names do not matter.
    _, key = await new_key(db)
    assert (await guarded.http.get(RUNS, headers=key | {"Host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "localhost:8000",
        "app.localhost",
        "switchboard",
        "calls.railway.internal",
        "x.svc.cluster.local",
        "10.1.2.3:80",
        "[::1]:8000",
        "[fe80::1]",
    ],
)
async def test_names_that_nobody_else_can_have_need_no_credentials_in_development(service: Service, host: str):
    assert (await service.http.get(RUNS, headers={"Host": host})).status_code == 200


async def test_the_services_own_name_needs_none_either(database_url: str, servers: Servers, upstream: Upstream):
    settings = settings_for(
        database_url,
        servers.redis_url,
        upstream.url,
        app_url="https://calls.example.com",
        cors_origins="https://a.example",
    )
    async with running_service(settings) as service:
        for host, status in (("calls.example.com", 200), ("a.example", 200), ("b.example", 403)):
            assert (await service.http.get(RUNS, headers={"Host": host})).status_code == status
        # Behind a proxy that asks under another name.
        headers = {"Host": "internal:8000", "Origin": "https://calls.example.com"}
        assert (await service.http.post(TRIGGER, json={"context_id": "x"}, headers=headers)).status_code == 200


async def test_of_two_credentials_of_a_kind_one_counts_and_nothing_is_mixed(
    guarded: Service, db: AsyncEngine, context_id: str
):
    run_ids = [await insert_run(db, context) for context in (context_id, f"{context_id}-2")]
    _, headers = await new_key(db)
    tokens = [await get_token(guarded, headers, [context]) for context in (context_id, f"{context_id}-2")]
    for more in (
        {"headers": [("Authorization", f"Bearer {each}") for each in tokens]},
        {"params": [("access_token", each) for each in tokens]},
        {"headers": [("Cookie", f"{COOKIE}={each}") for each in tokens]},
    ):
        answer = await guarded.http.get(RUNS, **more)  # type: ignore[arg-type]
        assert [run["runId"] for run in answer.json()] in ([run_ids[0]], [run_ids[1]])


async def test_origins_that_are_trusted_may_do_what_this_one_may(
    database_url: str, servers: Servers, upstream: Upstream, context_id: str
):
    settings = settings_for(database_url, servers.redis_url, upstream.url, cors_origins="https://app.example.com")
    headers = {"Origin": "https://app.example.com", "Sec-Fetch-Site": "cross-site"}
    async with running_service(settings) as service:
        answer = await service.http.post(TRIGGER, json={"context_id": context_id}, headers=headers)
        assert answer.status_code == 200
        answer = await service.http.post(
            TRIGGER, json={"context_id": context_id}, headers=headers | {"Origin": "https://evil.example.com"}
        )
        assert answer.status_code == 403


async def test_somebody_elses_cookie_does_no_harm_where_none_is_needed(service: Service, guarded: Service):
    for signed in ("nonsense", Signer(OTHER).sign(token()), Signer(SecretStr(APP_SECRET)).sign(token())):
        headers = {"Cookie": f"{COOKIE}={signed}"}
        assert (await service.http.get(RUNS, headers=headers)).status_code == 200
        assert (await guarded.http.get(RUNS, headers=headers)).status_code == 401


async def test_without_a_secret_there_are_no_tokens(database_url: str, servers: Servers, upstream: Upstream):
    settings = settings_for(database_url, servers.redis_url, upstream.url, app_secret=None)
    async with running_service(settings) as service:
        answer = await service.http.post(TOKENS, json={"context_ids": "*"})
        assert (answer.status_code, answer.json()) == (409, {"error": "APP_SECRET is not set"})
        assert (await service.http.get(RUNS, headers=bearer(Signer(SECRET).sign(token())))).status_code == 401


# Streams.


async def test_a_stream_ends_with_its_token_and_resumes_with_another(
    guarded: Service, db: AsyncEngine, context_id: str
):
    run_id = await insert_run(db, context_id)
    _, headers = await new_key(db)
    said: list[str] = []
    for seconds in (2, 4, 8, 16, 32):
        short = await get_token(guarded, headers, [context_id], expires_in=seconds)
        async with guarded.http.stream("GET", "/api/events", params={"access_token": short}) as answer:
            if answer.status_code == 401:
                continue  # it took as long to get here
            lines = answer.aiter_lines()
            assert await anext(lines) == ": connected"
            await guarded.callback(run_id, "log", "before")
            async with asyncio.timeout(60):  # it would go on for ever
                said = [line async for line in lines if line]
        break
    named = said.index("event: renew")
    assert json.loads(said[named + 1].removeprefix("data: ")) == {"error": "Access has ended"}
    last = said[named - 1].removeprefix("id: ")
    assert json.loads(said[named - 2].removeprefix("data: "))["data"] == "before"
    await guarded.callback(run_id, "log", "meanwhile")
    longer = await get_token(guarded, headers, [context_id])
    async with guarded.stream(last, access_token=longer) as stream:
        assert (await anext(stream))["data"] == "meanwhile"
    refused = await guarded.http.get("/api/events", params={"access_token": short})
    assert refused.json() == {"error": "Token expired"}
