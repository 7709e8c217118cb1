"""What an operator does over HTTP: who they are, what waits for a decision, what customers were told."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.access.keys import create, find
from switchboard.happyrobot.simulator import Simulator
from switchboard.tables import KeyScope, approvals, deliveries, executions, workflows
from tests.conftest import (
    API_KEY,
    HOOK_KEY,
    Servers,
    Service,
    bearer,
    new_database,
    new_key,
    running_service,
    serving,
    settings_for,
    until,
)
from tests.test_tokens import SESSION, TOKENS, get_token
from tests.website import new_website

APPROVALS = "/api/happyrobot/approvals"
DELIVERIES = "/api/happyrobot/deliveries"
ASKS = {"simulate": {"approval": True}}


@pytest.fixture(scope="module")
async def simulator() -> Simulator:
    return Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.002)


@pytest.fixture(scope="module")
async def house(servers: Servers, template: str, simulator: Simulator) -> AsyncIterator[Service]:
    """A service with a worker, which wants credentials."""
    async with (
        new_database(servers, template) as url,
        serving(lambda _: simulator.app) as (upstream, _),
        running_service(settings_for(url, servers.redis_url, upstream, allow_anonymous=False), worker=True) as service,
    ):
        yield service


@pytest.fixture
def own(house: Service) -> AsyncEngine:
    """The house's database."""
    return house.state["db"]


@pytest.fixture
async def app(own: AsyncEngine) -> dict[str, str]:
    return (await new_key(own))[1]


@pytest.fixture
async def admin(own: AsyncEngine) -> dict[str, str]:
    return (await new_key(own, KeyScope.ADMIN))[1]


async def asked(house: Service, headers: dict[str, str], context_id: str, **simulate: Any) -> dict[str, Any]:
    """Starts a run that asks for an approval, and waits for it."""
    body = {"context_id": context_id, "simulate": {"approval": True, **simulate}}
    (await house.http.post("/api/happyrobot/trigger", json=body, headers=headers)).raise_for_status()
    return (await waiting(house, headers, context_id))[0]


async def waiting(house: Service, headers: dict[str, str], context_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def there() -> bool:
        nonlocal found
        found = (await house.http.get(APPROVALS, params={"context_id": context_id}, headers=headers)).json()
        return bool(found)

    await until(there)
    return found


def stands(house: Service, run_id: str, status: str, headers: dict[str, str]) -> Callable[[], Awaitable[bool]]:
    async def there() -> bool:
        answer = await house.http.get(f"/api/happyrobot/runs/{run_id}", headers=headers)
        return bool(answer.json()["status"] == status)

    return there


# --- who am I? ---


@pytest.mark.parametrize(
    ("scope", "scopes"),
    [
        (KeyScope.APP, ["decide", "read", "trigger"]),
        (KeyScope.ADMIN, ["decide", "operate", "read", "trigger"]),
        (KeyScope.PUBLIC, []),
    ],
)
async def test_a_key_is_told_what_it_is_good_for(house: Service, own: AsyncEngine, scope: KeyScope, scopes: list[str]):
    _, headers = await new_key(own, scope)
    answer = await house.http.get(SESSION, headers=headers)
    assert answer.json() == {
        "anonymous": False,
        "name": "test",
        "scopes": scopes,
        "context_ids": "*",
        "expires_at": None,
    }


async def test_a_token_is_told_what_it_is_good_for_and_its_cookie_too(house: Service, app: dict[str, str]):
    signed = await get_token(house, app, ["order_1", "order_2"], scopes=["read", "decide"])
    # Not what the key is called: that is no business of browsers that see some contexts alone.
    expected = {"anonymous": False, "name": None, "scopes": ["decide", "read"], "context_ids": ["order_1", "order_2"]}
    told = (await house.http.get(SESSION, headers=bearer(signed))).json()
    assert told.pop("expires_at") is not None
    assert told == expected
    (await house.http.post(SESSION, headers=bearer(signed))).raise_for_status()
    with_cookie = (await house.http.get(SESSION)).json()
    house.http.cookies.clear()
    assert {name: with_cookie[name] for name in expected} == expected


async def test_where_nobody_is_asked_for_credentials_everything_is_allowed(service: Service):
    assert (await service.http.get(SESSION)).json() == {
        "anonymous": True,
        "name": None,
        "scopes": ["decide", "operate", "read", "trigger"],
        "context_ids": "*",
        "expires_at": None,
    }


async def test_a_key_gives_no_more_than_it_has(house: Service, app: dict[str, str], admin: dict[str, str]):
    body = {"context_ids": "*", "scopes": ["read", "operate"]}
    refused = await house.http.post(TOKENS, json=body, headers=app)
    assert (refused.status_code, refused.json()) == (
        403,
        {"error": "This API key cannot give what it has not: operate"},
    )
    given = (await house.http.post(TOKENS, json=body, headers=admin)).json()["token"]
    assert (await house.http.get(DELIVERIES, headers=bearer(given))).status_code == 200


async def test_a_token_to_trigger_decides_nothing(house: Service, app: dict[str, str], context_id: str):
    """Those who hold one may be the very people whose requests are to be approved."""
    approval = await asked(house, app, context_id)
    signed = await get_token(house, app, [context_id], scopes=["read", "trigger"])
    answer = await house.http.post(f"{APPROVALS}/{approval['id']}/approve", headers=bearer(signed))
    assert (answer.status_code, answer.json()) == (403, {"error": "This token is not allowed to do that"})
    assert (await waiting(house, app, context_id))[0]["status"] == "pending"


# --- what can be started ---


async def test_workflows_are_listed_without_their_addresses(
    house: Service, own: AsyncEngine, app: dict[str, str], admin: dict[str, str]
):
    async with own.begin() as conn:
        for name, active in (("b", True), ("a", False)):
            row = {"id": name, "name": f"The {name}", "hook_url": "https://secret.example/hooks/x", "active": active}
            await conn.execute(insert(workflows).values(row))
        _, narrow = await create(conn, "narrow", [KeyScope.APP], workflows=["b", "default"])
    everything = [
        {"id": "default", "name": "default", "active": True},
        {"id": "a", "name": "The a", "active": False},
        {"id": "b", "name": "The b", "active": True},
    ]
    assert (await house.http.get("/api/happyrobot/workflows", headers=admin)).json() == everything
    headers = bearer(narrow.get_secret_value())
    some = (await house.http.get("/api/happyrobot/workflows", headers=headers)).json()
    assert [each["id"] for each in some] == ["default", "b"]


# --- approvals ---


async def test_what_an_app_has_started_is_approved_and_goes_on(
    house: Service, app: dict[str, str], context_id: str, simulator: Simulator
):
    approval = await asked(house, app, context_id)
    run_id = approval["run_id"]
    assert approval["context_id"] == context_id
    assert approval["status"] == "pending"
    assert approval["decided_at"] is approval["comment"] is None
    assert approval["approval_data"].keys() >= {"rows", "metadata", "displayFields"}
    answer = await house.http.post(f"{APPROVALS}/{approval['id']}/approve", json={"comment": "go ahead"}, headers=app)
    assert (answer.status_code, answer.json()) == (
        200,
        {
            "success": True,
            "id": approval["id"],
            "execution_id": approval["execution_id"],
            "run_id": run_id,
            "status": "approved",
        },
    )
    async with house.state["db"].connect() as conn:
        decided_by = await conn.scalar(select(approvals.c.decided_by).where(approvals.c.id == UUID(approval["id"])))
    async with house.state["db"].connect() as conn:
        found = await find(conn, app["Authorization"].removeprefix("Bearer "))
    assert found is not None
    assert decided_by == found.id
    await until(stands(house, run_id, "COMPLETED", app))
    [told] = [each.body for each in simulator.decisions if each.body and each.body["run_id"] == run_id]
    assert (told["decision"], told["comment"]) == ("approved", "go ahead")
    params = {"status": "approved", "context_id": context_id}
    [listed] = (await house.http.get(APPROVALS, params=params, headers=app)).json()
    assert (listed["comment"], listed["decided_at"] is not None) == ("go ahead", True)
    assert (await house.http.get(APPROVALS, params={"context_id": context_id}, headers=app)).json() == []


async def test_what_is_rejected_is_stopped(house: Service, app: dict[str, str], context_id: str):
    approval = await asked(house, app, context_id)
    assert (await house.http.post(f"{APPROVALS}/{approval['id']}/reject", headers=app)).status_code == 200
    await until(stands(house, approval["run_id"], "CANCELED", app))
    for what, status in (("reject", 200), ("approve", 409)):
        answer = await house.http.post(f"{APPROVALS}/{approval['id']}/{what}", headers=app)
        assert answer.status_code == status


async def test_a_comment_is_asked_for_where_it_is_needed(house: Service, app: dict[str, str], context_id: str):
    approval = await asked(house, app, context_id, approval={"require_comment": True})
    assert approval["require_comment"] is True
    url = f"{APPROVALS}/{approval['id']}/approve"
    for body in ({}, {"comment": " "}):
        answer = await house.http.post(url, json=body, headers=app)
        assert (answer.status_code, answer.json()) == (400, {"error": "comment required"})
    assert (await house.http.post(url, json={"comment": 7}, headers=app)).status_code == 400
    assert (await house.http.post(url, json={"comment": "fine"}, headers=app)).status_code == 200


async def test_an_operator_decides_for_a_website_and_the_website_sees_it(
    house: Service, own: AsyncEngine, admin: dict[str, str]
):
    website = await new_website(house, own)
    execution_id = await website.execute(ASKS)
    await website.until(execution_id, "pending_approval")
    found = (await house.http.get(APPROVALS, params={"limit": "500"}, headers=admin)).json()
    [approval] = [each for each in found if each["execution_id"] == execution_id]
    assert (await house.http.post(f"{APPROVALS}/{approval['id']}/approve", headers=admin)).status_code == 200
    assert (await website.until(execution_id, "completed"))["approvalStatus"] == "approved"


async def test_two_deciders_at_one_instant_are_not_both_right(house: Service, app: dict[str, str], context_id: str):
    approval = await asked(house, app, context_id)
    answers = await asyncio.gather(
        *(
            house.http.post(f"{APPROVALS}/{approval['id']}/{('approve', 'reject')[number % 2]}", headers=app)
            for number in range(10)
        )
    )
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [409] * 5
    assert len({answer.json()["status"] for answer in answers if answer.status_code == 200}) == 1


@pytest.mark.parametrize("approval_id", ["00000000-0000-4000-8000-000000000000", "1", "x y", "%00"])
async def test_an_approval_that_there_is_not_is_not_found(house: Service, app: dict[str, str], approval_id: str):
    answer = await house.http.post(f"{APPROVALS}/{approval_id}/approve", headers=app)
    assert (answer.status_code, answer.json()) == (404, {"error": "Approval not found"})


async def test_what_waits_is_listed_oldest_first_in_pages_and_what_does_not_newest_first(
    house: Service, app: dict[str, str], context_id: str
):
    ids = [(await asked_once_more(house, app, context_id, number))["id"] for number in range(5)]
    assert await pages(house, f"{APPROVALS}?limit=2&context_id={context_id}", app) == [ids[:2], ids[2:4], ids[4:]]
    for approval_id in ids:
        (await house.http.post(f"{APPROVALS}/{approval_id}/approve", headers=app)).raise_for_status()
    ids.reverse()
    url = f"{APPROVALS}?limit=4&status=approved&context_id={context_id}"
    assert await pages(house, url, app) == [ids[:4], ids[4:]]


async def asked_once_more(house: Service, app: dict[str, str], context_id: str, number: int) -> dict[str, Any]:
    await asked(house, app, context_id)
    found: list[dict[str, Any]] = []

    async def there() -> bool:
        nonlocal found
        found = await waiting(house, app, context_id)
        return len(found) == number + 1

    await until(there)
    return found[-1]


async def pages(house: Service, url: str, headers: dict[str, str]) -> list[list[str]]:
    """The ids that a list has on each of its pages."""
    found = []
    while url:
        answer = await house.http.get(url, headers=headers)
        found.append([each["id"] for each in answer.json()])
        link = answer.headers.get("link", "")
        url = link[1 : link.index(">")] if link else ""
    return found


async def test_what_others_ask_for_is_neither_listed_nor_decided(
    house: Service, own: AsyncEngine, app: dict[str, str], context_id: str
):
    approval = await asked(house, app, context_id)
    async with own.begin() as conn:
        _, elsewhere = await create(conn, "elsewhere", [KeyScope.APP], workflows=["another"])
    for others in (
        bearer(await get_token(house, app, ["another"], scopes=["read", "decide"])),
        bearer(elsewhere.get_secret_value()),
    ):
        for query in ({}, {"context_id": context_id}):
            assert (await house.http.get(APPROVALS, params=query, headers=others)).json() == []
        answer = await house.http.post(f"{APPROVALS}/{approval['id']}/approve", headers=others)
        assert answer.status_code == 404
    assert (await waiting(house, app, context_id))[0]["status"] == "pending"


async def test_metrics_are_for_those_who_see_everything(house: Service, own: AsyncEngine, admin: dict[str, str]):
    async with own.begin() as conn:
        _, narrow = await create(conn, "narrow", [KeyScope.ADMIN], workflows=["another"])
    signed = await get_token(house, admin, ["order_1"], scopes=["operate"])
    for some in (bearer(narrow.get_secret_value()), bearer(signed)):
        answer = await house.http.get("/metrics", headers=some)
        assert (answer.status_code, answer.json()) == (403, {"error": "Metrics are of the whole installation"})
    everything = await get_token(house, admin, "*", scopes=["operate"])
    assert (await house.http.get("/metrics", headers=bearer(everything))).status_code == 200


# --- deliveries ---


async def delivered(own: AsyncEngine, status: str, context_id: str, **more: Any) -> tuple[UUID, UUID]:
    """A delivery that stands so, and its execution."""
    execution_id, delivery_id = uuid4(), uuid4()
    async with own.begin() as conn:
        key, _ = await create(conn, "A customer", [KeyScope.PUBLIC])
        await conn.execute(
            insert(executions).values(
                id=execution_id,
                workflow_id="default",
                context_id=context_id,
                input={},
                key_id=key.id,
                status="completed",
            )
        )
        row = {"id": delivery_id, "key_id": key.id, "execution_id": execution_id, "event": "execution.completed"}
        await conn.execute(insert(deliveries).values(row | {"body": b"{}", "status": status} | more))
    return delivery_id, execution_id


async def test_deliveries_of_all_customers_are_listed_and_sent_again(
    house: Service, own: AsyncEngine, admin: dict[str, str], context_id: str
):
    delivery_id, execution_id = await delivered(own, "failed", context_id)
    found = await house.http.get(DELIVERIES, params={"execution_id": str(execution_id)}, headers=admin)
    [listed] = found.json()
    assert {name: listed[name] for name in ("id", "event", "execution_id", "key_name", "status", "attempts")} == {
        "id": str(delivery_id),
        "event": "execution.completed",
        "execution_id": str(execution_id),
        "key_name": "A customer",
        "status": "failed",
        "attempts": [],
    }
    again = await house.http.post(f"{DELIVERIES}/{delivery_id}/redeliver", headers=admin)
    assert (again.status_code, again.json()) == (
        202,
        {"success": True, "id": str(delivery_id), "status": "pending"},
    )

    async def tried() -> bool:
        params = {"execution_id": str(execution_id)}
        [now] = (await house.http.get(DELIVERIES, params=params, headers=admin)).json()
        return bool(now["attempts"])

    await until(tried)  # it has nowhere to go, which is an attempt of its own


async def test_deliveries_are_filtered_and_come_in_pages(
    house: Service, own: AsyncEngine, admin: dict[str, str], context_id: str
):
    ids = [str((await delivered(own, "delivered", context_id))[0]) for _ in range(3)]
    signed = await get_token(house, admin, [context_id], scopes=["operate"])
    ids.reverse()
    assert await pages(house, f"{DELIVERIES}?limit=2", bearer(signed)) == [ids[:2], ids[2:]]
    assert await pages(house, f"{DELIVERIES}?status=failed", bearer(signed)) == [[]]
    assert await pages(house, f"{DELIVERIES}?key_id={uuid4()}", bearer(signed)) == [[]]


async def test_who_sees_some_contexts_or_workflows_sees_their_deliveries_alone(
    house: Service, own: AsyncEngine, admin: dict[str, str], context_id: str
):
    theirs, _ = await delivered(own, "failed", "somebody else's")
    async with own.begin() as conn:
        _, narrow = await create(conn, "narrow", [KeyScope.ADMIN], workflows=["another"])
    signed = await get_token(house, admin, [context_id], scopes=["operate"])
    for some in (bearer(signed), bearer(narrow.get_secret_value())):
        assert (await house.http.get(DELIVERIES, headers=some)).json() == []
        answer = await house.http.post(f"{DELIVERIES}/{theirs}/redeliver", headers=some)
        assert (answer.status_code, answer.json()) == (404, {"error": "Delivery not found"})


async def test_one_that_is_on_its_way_is_not_sent_twice(
    house: Service, own: AsyncEngine, admin: dict[str, str], context_id: str
):
    delivery_id, _ = await delivered(own, "pending", context_id)
    answer: httpx.Response = await house.http.post(f"{DELIVERIES}/{delivery_id}/redeliver", headers=admin)
    assert (answer.status_code, answer.json()) == (409, {"error": "Delivery is already on its way"})


@pytest.mark.parametrize("query", ["status=lost", "execution_id=x", "key_id=1", "limit=0", "limit=201", "before=0"])
async def test_a_list_of_nonsense_is_refused(house: Service, admin: dict[str, str], query: str):
    answer = await house.http.get(f"{DELIVERIES}?{query}", headers=admin)
    assert (answer.status_code, list(answer.json())) == (400, ["error"])
