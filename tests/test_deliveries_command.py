"""The command that shows what was sent to customers, and sends it again."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.access import keys
from switchboard.events import iso
from switchboard.tables import DeliveryStatus, KeyScope, WebhookEvent, deliveries, delivery_attempts
from tests.conftest import Said

Command = Callable[..., Said]

BEGAN = datetime(2026, 10, 23, 14, 30, 45, 67_000, tzinfo=UTC)
REFUSED = "refused: 127.0.0.1 is not an address on the internet"


@pytest.fixture
def command(switchboard: Command, database_url: str) -> Command:
    """With nothing but the database: no secret is needed to look, or to send again."""

    def run(*arguments: str) -> Said:
        return switchboard("deliveries", *arguments, DATABASE_URL=database_url, ENVIRONMENT="production")

    return run


@pytest.fixture
def name() -> str:
    return f"key {uuid4().hex}"


@pytest.fixture
async def key_id(db: AsyncEngine, name: str) -> UUID:
    """A key to which nobody else's deliveries belong."""
    async with db.begin() as conn:
        made, _ = await keys.create(conn, name, [KeyScope.PUBLIC])
    return made.id


async def written(
    db: AsyncEngine,
    key_id: UUID,
    status: DeliveryStatus = DeliveryStatus.DELIVERED,
    *,
    event: WebhookEvent = WebhookEvent.COMPLETED,
    errors: tuple[str | None, ...] = (),
) -> tuple[str, str]:
    """A delivery with an attempt for each of these; its id, and that of its execution."""
    execution_id = uuid4()
    row = {"key_id": key_id, "execution_id": execution_id, "event": event, "body": b"{}", "status": status}
    async with db.begin() as conn:
        delivery_id = await conn.scalar(
            insert(deliveries).values(**row, failures=len(errors)).returning(deliveries.c.id)
        )
        for number, error in enumerate(errors, start=1):
            attempt = {"started_at": BEGAN + timedelta(seconds=number), "duration_ms": 12, "error": error}
            attempt |= {"status_code": 200, "response": "OK"} if error is None else {}
            await conn.execute(insert(delivery_attempts).values(delivery_id=delivery_id, number=number, **attempt))
    return str(delivery_id), str(execution_id)


def said(done: Said) -> Any:
    assert done.code == 0, done.err
    return json.loads(done.out)


async def test_deliveries_are_listed_newest_first_with_their_attempts(
    command: Command, db: AsyncEngine, key_id: UUID, name: str
):
    older, _ = await written(db, key_id, event=WebhookEvent.STARTED)
    newer, execution_id = await written(db, key_id, errors=("answered 503", None))
    found = said(command("list", "--key", name, "--json"))
    assert [each["id"] for each in found] == [newer, older]
    async with db.connect() as conn:
        created_at = await conn.scalar(select(deliveries.c.created_at).where(deliveries.c.id == UUID(newer)))
    assert created_at is not None
    assert found[0] == {
        "id": newer,
        "key_id": str(key_id),
        "execution_id": execution_id,
        "event": "execution.completed",
        "status": "delivered",
        "created_at": iso(created_at),
        "next_attempt_at": None,
        "attempts": [
            {
                "number": 1,
                "started_at": "2026-10-23T14:30:46.067Z",
                "duration_ms": 12,
                "status_code": None,
                "response": None,
                "error": "answered 503",
            },
            {
                "number": 2,
                "started_at": "2026-10-23T14:30:47.067Z",
                "duration_ms": 12,
                "status_code": 200,
                "response": "OK",
                "error": None,
            },
        ],
    }
    assert found[1]["attempts"] == []


async def test_one_that_is_to_be_sent_says_when(command: Command, db: AsyncEngine, key_id: UUID):
    await written(db, key_id, DeliveryStatus.PENDING)
    [found] = said(command("list", "--key", str(key_id), "--json"))
    assert found["next_attempt_at"] == found["created_at"]


async def test_deliveries_are_narrowed_by_key_status_and_execution(command: Command, db: AsyncEngine, key_id: UUID):
    async with db.begin() as conn:
        other, _ = await keys.create(conn, "another", [KeyScope.PUBLIC])
    failed, execution_id = await written(db, key_id, DeliveryStatus.FAILED)
    delivered, _ = await written(db, key_id)
    others, _ = await written(db, other.id, DeliveryStatus.FAILED)

    def ids(*arguments: str) -> list[str]:
        return [each["id"] for each in said(command("list", *arguments, "--json"))]

    assert ids("--key", str(key_id)) == [delivered, failed]
    assert ids("--key", str(key_id), "--status", "failed") == [failed]
    assert ids("--key", str(key_id), "--status", "pending") == []
    assert ids("--execution", execution_id) == [failed]
    assert ids("--execution", execution_id, "--key", str(other.id)) == []
    assert ids("--key", str(key_id), "--limit", "1") == [delivered]
    assert ids("--limit", "1000")[:3] == [others, delivered, failed]


async def test_the_list_fits_into_80_columns_with_the_last_error(command: Command, db: AsyncEngine, key_id: UUID):
    event = WebhookEvent.PENDING_APPROVAL
    failed, execution_id = await written(
        db, key_id, DeliveryStatus.FAILED, event=event, errors=("answered 503", REFUSED)
    )
    delivered, _ = await written(db, key_id, errors=("answered 503", None))
    waiting, _ = await written(db, key_id, DeliveryStatus.PENDING)
    out = command("list", "--key", str(key_id)).out
    assert max(map(len, out.splitlines())) <= 80
    assert all(each in out for each in (waiting, delivered, failed, execution_id, event, "pending", "delivered"))
    newest_first = [out.index(each) for each in (waiting, delivered, failed)]
    assert newest_first == sorted(newest_first)
    shown = " ".join(line[61:].strip() for line in out.splitlines())
    assert f"2: {REFUSED}" in shown
    assert "answered 503" not in shown, "only the last one"


@pytest.mark.parametrize("status", [DeliveryStatus.FAILED, DeliveryStatus.DELIVERED])
async def test_a_delivery_is_sent_again_from_the_beginning(
    command: Command, db: AsyncEngine, key_id: UUID, status: DeliveryStatus
):
    delivery_id, _ = await written(db, key_id, status, errors=("answered 503",) * 4)
    jobs = text("SELECT count(*) FROM switchboard_pgqueuer WHERE starts_with(dedupe_key, :key)")
    job = {"key": f"deliver:{delivery_id}:"}
    async with db.connect() as conn:
        assert await conn.scalar(jobs, job) == 0
    assert command("redeliver", delivery_id) == Said(0, f"The delivery {delivery_id} is sent again.\n", "")
    async with db.connect() as conn:
        query = select(deliveries.c.status, deliveries.c.failures).where(deliveries.c.id == UUID(delivery_id))
        assert (await conn.execute(query)).one() == (DeliveryStatus.PENDING, 0)
        assert await conn.scalar(jobs, job) == 1


async def test_what_is_sent_again_is_said_in_json(command: Command, db: AsyncEngine, key_id: UUID):
    delivery_id, _ = await written(db, key_id)
    assert said(command("redeliver", delivery_id, "--json")) == {"id": delivery_id, "status": "pending"}


async def test_one_that_is_on_its_way_is_not_sent_twice(command: Command, db: AsyncEngine, key_id: UUID):
    delivery_id, _ = await written(db, key_id, DeliveryStatus.PENDING, errors=("answered 503",))
    complaint = f"switchboard: the delivery {delivery_id} is on its way already\n"
    assert command("redeliver", delivery_id, "--json") == Said(1, "", complaint)
    async with db.connect() as conn:
        query = select(deliveries.c.failures).where(deliveries.c.id == UUID(delivery_id))
        assert await conn.scalar(query) == 1, "its attempts are not counted anew"


async def test_a_delivery_that_there_is_not_is_said_so(command: Command):
    unknown = str(uuid4())
    complaint = f"switchboard: there is no delivery {unknown}; `switchboard deliveries list` shows them\n"
    assert command("redeliver", unknown) == Said(1, "", complaint)


async def test_a_key_that_there_is_not_is_said_so(command: Command):
    done = command("list", "--key", "nobody")
    assert done == Said(1, "", "switchboard: there is no key nobody; `switchboard keys list` shows them\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "--status", "lost"),
        ("list", "--execution", "x"),
        ("list", "--limit", "0"),
        ("list", "--limit", "1001"),
        ("redeliver", "x"),
    ],
)
async def test_what_is_no_option_lists_nothing(command: Command, arguments: tuple[str, ...]):
    done = command(*arguments)
    assert (done.code, done.out) == (2, "")
