"""Customers' webhooks: written with the change, sent by any worker, again where it failed, in order, signed, kept."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import Row, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from standardwebhooks import Webhook, WebhookVerificationError

from switchboard import database, jobs, local, worker
from switchboard.access import keys, webhooks
from switchboard.deliveries import delivering, log, outbox, sender, signing
from switchboard.deliveries.delivering import Deliverer, Lane, pause_after
from switchboard.deliveries.sender import Attempt, Sender
from switchboard.errors import PUBLIC
from switchboard.events import NewEvent, iso
from switchboard.jobs import DELIVER, Job
from switchboard.runs.ingest import write
from switchboard.runs.sorting import Decision, NewRuns, News, Unconfirmed
from switchboard.runs.sweep import sweep
from switchboard.settings import Settings
from switchboard.tables import (
    ApprovalStatus,
    DeliveryStatus,
    ExecutionStatus,
    KeyScope,
    RunStatus,
    WebhookEvent,
    agent_runs,
    api_keys,
    approvals,
    deliveries,
    delivery_attempts,
    executions,
)
from switchboard.wiring import connected
from switchboard.worker import working
from tests.conftest import APP_SECRET, HOOK_KEY, Servers, Service, running_service, settings_for, until
from tests.receiver import Receiver, Request, never, ok, receiving, reply, statuses

SECRET = "your-webhook-secret-key"
"""As the Public API's documentation has it."""

ALL = tuple(WebhookEvent)


@dataclass
class Bench:
    """A database of its own, and what happens in it."""

    settings: Settings
    db: AsyncEngine

    async def key(self, url: str | None, events: Sequence[WebhookEvent] | None = None, secret: str = SECRET) -> UUID:
        """A customer's key, whose executions are reported there."""
        async with self.db.begin() as conn:
            made, _ = await keys.create(conn, "a customer", [KeyScope.PUBLIC], burst=1_000_000)
            if url is not None:
                await webhooks.point(conn, self.settings, made.id, url, events, SecretStr(secret))
        return made.id

    async def accepted(self, key_id: UUID | None) -> "Execution":
        """An execution of which HappyRobot has said nothing yet."""
        execution = Execution(self, uuid4())
        async with self.db.begin() as conn:
            await conn.execute(
                insert(executions).values(
                    id=execution.id,
                    workflow_id="default",
                    context_id=f"c-{execution.id}",
                    input={},
                    key_id=key_id,
                    answer_by=func.now() + timedelta(hours=1),  # until then nobody takes its process for gone
                )
            )
        return execution

    async def started(self, key_id: UUID | None) -> "Execution":
        execution = await self.accepted(key_id)
        await execution.happens(execution.runs())
        return execution

    async def posted(self, key_id: UUID) -> Sequence[Row[Any]]:
        """A key's deliveries, in their order."""
        async with self.db.connect() as conn:
            query = select(deliveries).where(deliveries.c.key_id == key_id).order_by(deliveries.c.number)
            return (await conn.execute(query)).all()

    async def stand(self, key_id: UUID, status: DeliveryStatus) -> bool:
        """Whether all of a key's deliveries do."""
        return {row.status for row in await self.posted(key_id)} <= {status}

    async def attempts(self, delivery_id: UUID | str) -> Sequence[Row[Any]]:
        query = (
            select(delivery_attempts)
            .where(delivery_attempts.c.delivery_id == UUID(str(delivery_id)))
            .order_by(delivery_attempts.c.number)
        )
        async with self.db.connect() as conn:
            return (await conn.execute(query)).all()

    async def until_all(self, key_id: UUID, status: DeliveryStatus) -> None:
        await until(lambda: self.stand(key_id, status))

    @contextlib.asynccontextmanager
    async def workers(self, number: int = 1) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(number):
                state = await stack.enter_async_context(connected(self.settings, NOBODY))
                await stack.enter_async_context(working(state))
            yield


@dataclass
class Execution:
    """One with a single run."""

    bench: Bench
    id: UUID
    run_id: str = field(default_factory=lambda: f"run_{uuid4().hex}")

    def runs(self) -> NewRuns:
        return NewRuns(self.id, "default", f"c-{self.id}", "A call", None, [self.run_id])

    async def happens(self, *news: News) -> None:
        async with self.bench.db.begin() as conn:
            await self.happens_in(conn, *news)

    async def happens_in(self, conn: AsyncConnection, *news: News) -> None:
        await write(conn, news, reconcile_after=600)

    def completed(self, result: Any = None) -> NewEvent:
        return NewEvent(self.run_id, "completed", result, RunStatus.COMPLETED, outcome=result)

    def failed(self, error: Any) -> NewEvent:
        return NewEvent(self.run_id, "failed", error, RunStatus.FAILED, outcome=error)

    def asks(self, data: Any = None) -> NewEvent:
        return NewEvent(self.run_id, "pending_approval", data)

    async def row(self) -> Row[Any]:
        async with self.bench.db.connect() as conn:
            return (await conn.execute(select(executions).where(executions.c.id == self.id))).one()


NOBODY = httpx.MockTransport(lambda _: httpx.Response(503))
"""HappyRobot, which has nothing to do with this."""


@pytest.fixture
async def bench(own_database: str, servers: Servers) -> AsyncIterator[Bench]:
    """With workers only where a test starts them."""
    settings = settings_for(
        own_database, servers.redis_url, None, allow_private_webhooks=True, reconcile_after=600, log_level="error"
    )
    db = database.connect(own_database)
    yield Bench(settings, db)
    await db.dispose()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other without the pauses, of which other tests are."""
    monkeypatch.setattr(delivering, "PAUSES", (0.05, 0.05, 0.05))
    monkeypatch.setattr(worker, "_LOOK_EVERY", timedelta(seconds=0.1))


def documented(secret: str, body: bytes) -> str:
    """The check of the Public API's documentation."""
    return f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


def verify(secret: str, request: Request) -> None:
    """The check of Standard Webhooks. A secret that is not in its form stands for its own characters."""
    Webhook(secret if secret.startswith("whsec_") else secret.encode()).verify(request.body, request.headers)


# --- what is sent ---


async def test_a_webhook_is_sent_again_after_1_and_5_seconds_with_the_same_bytes_and_id(
    bench: Bench, receiver: Receiver
):
    receiver.answer = statuses(500, 500, 200)
    secret = webhooks.new_secret().get_secret_value()
    key_id = await bench.key(receiver.url, secret=secret)
    async with bench.workers():
        changed = time.time()
        await bench.started(key_id)
        first, second, third = await receiver.took(3)
        await bench.until_all(key_id, DeliveryStatus.DELIVERED)
    assert first.body == second.body == third.body
    assert first.id == second.id == third.id
    (row,) = await bench.posted(key_id)
    assert (str(row.id), row.body, row.failures) == (first.id, first.body, 2)
    # Never sooner than promised, nor much later; a hundredth for the clocks.
    assert 0 <= first.at - changed < 10
    assert 0.99 <= second.at - first.at < 10
    assert 4.99 <= third.at - second.at < 20
    for request in (first, second, third):
        assert request.headers["X-Webhook-Signature"] == documented(secret, request.body)
        verify(secret, request)
        # When this attempt was made, and not when the first one was.
        assert abs(int(request.headers["webhook-timestamp"]) - request.at) <= 2
    attempts = await bench.attempts(first.id)
    assert [(attempt.number, attempt.status_code, attempt.error) for attempt in attempts] == [
        (1, 500, "answered 500"),
        (2, 500, "answered 500"),
        (3, 200, None),
    ]
    assert len(receiver.requests) == 3, "what was delivered is done with"


async def test_a_webhook_has_the_documented_headers_and_those_of_standard_webhooks(bench: Bench, receiver: Receiver):
    key_id = await bench.key(receiver.url)
    execution = await bench.started(key_id)
    async with bench.workers():
        (request,) = await receiver.took(1)
    theirs = {"Host", "Accept", "Accept-Encoding", "Connection", "Content-Length"}  # of any HTTP request
    assert {name: value for name, value in request.headers.items() if name not in theirs} == {
        "Content-Type": "application/json",
        "User-Agent": "Workflow-Automation-Platform/1.0",
        "X-Webhook-Event": "execution.started",
        "X-Webhook-Execution-Id": str(execution.id),
        "X-Webhook-Signature": documented(SECRET, request.body),
        "webhook-id": str((await bench.posted(key_id))[0].id),
        "webhook-timestamp": request.headers["webhook-timestamp"],
        "webhook-signature": request.headers["webhook-signature"],
    }
    assert re.fullmatch(r"\d{10}", request.headers["webhook-timestamp"])
    assert re.fullmatch(r"v1,[A-Za-z0-9+/]{43}=", request.headers["webhook-signature"])
    verify(SECRET, request)
    assert request.line == "POST /hooks?of=mine HTTP/1.1"
    with pytest.raises(WebhookVerificationError):
        verify(SECRET, replace(request, body=request.body + b" "))


TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


async def told(bench: Bench, execution: Execution, event: WebhookEvent) -> dict[str, Any]:
    """What is posted of an event: it holds the documented fields, in the documented order, with these times."""
    (row,) = [
        row
        for row in await bench.posted((await execution.row()).key_id)
        if row.execution_id == execution.id and row.event == event
    ]
    payload: dict[str, Any] = Request(0, "", {}, row.body).json
    assert list(payload) == ["event", "executionId", "workflowId", "timestamp", "data"]
    assert list(payload["data"])[:3] == ["status", "startedAt", "completedAt"]
    assert payload["event"] == event
    assert payload["executionId"] == str(execution.id)
    assert payload["workflowId"] == "default"
    times = [payload["timestamp"], payload["data"]["startedAt"], payload["data"]["completedAt"]]
    assert all(moment is None or TIME.fullmatch(moment) for moment in times)
    assert payload["data"].pop("startedAt") == iso((await execution.row()).created_at)
    return payload


async def test_a_start_is_told_as_documented(bench: Bench):
    execution = await bench.started(await bench.key("http://h.example"))
    payload = await told(bench, execution, WebhookEvent.STARTED)
    assert payload["data"] == {"status": "running", "completedAt": None}
    assert payload["timestamp"] == iso((await execution.row()).began_at)


async def test_a_completion_is_told_as_documented(bench: Bench):
    execution = await bench.started(await bench.key("http://h.example"))
    result = {"successCount": 3, "failedCount": 0, "city": "Köln", "of": [1.5, None, True]}
    await execution.happens(execution.completed(result))
    payload = await told(bench, execution, WebhookEvent.COMPLETED)
    end = iso((await execution.row()).completed_at)
    assert payload["data"] == {"status": "completed", "completedAt": end, "output": result}
    assert payload["timestamp"] == end


async def test_a_failure_is_told_as_documented(bench: Bench):
    execution = await bench.started(await bench.key("http://h.example"))
    await execution.happens(execution.failed({"error": "nobody answered"}))
    payload = await told(bench, execution, WebhookEvent.FAILED)
    end = iso((await execution.row()).completed_at)
    assert payload["data"] == {"status": "failed", "completedAt": end, "output": None, "error": "nobody answered"}
    assert payload["timestamp"] == end


async def test_a_failure_before_anything_began_is_told_too(bench: Bench):
    execution = await bench.accepted(key_id := await bench.key("http://h.example"))
    await execution.happens(Unconfirmed(execution.id, ExecutionStatus.FAILED, "HappyRobot refused it"))
    payload = await told(bench, execution, WebhookEvent.FAILED)
    end = iso((await execution.row()).completed_at)
    assert payload["data"] == {"status": "failed", "completedAt": end, "output": None, "error": "HappyRobot refused it"}
    assert [row.event for row in await bench.posted(key_id)] == ["execution.failed"]


async def test_a_request_for_approval_is_told_as_documented(bench: Bench):
    execution = await bench.started(await bench.key("http://h.example"))
    asked = {"rows": [{"customerId": "CUST001"}], "metadata": {"title": "Review"}, "displayFields": ["customerId"]}
    await execution.happens(execution.asks(asked))
    payload = await told(bench, execution, WebhookEvent.PENDING_APPROVAL)
    async with bench.db.connect() as conn:
        approval_id = await conn.scalar(select(approvals.c.id).where(approvals.c.execution_id == execution.id))
    assert payload["data"] == {
        "status": "pending_approval",
        "completedAt": None,
        "approvalId": str(approval_id),
        "approvalData": asked,
    }


async def test_a_cancellation_is_told_where_it_was_asked_for(bench: Bench):
    execution = await bench.started(key_id := await bench.key("http://h.example", ALL))
    other = await bench.started(other_id := await bench.key("http://h.example"))
    for each in (execution, other):
        await each.happens(each.asks())
        await each.happens(Decision(each.id, ApprovalStatus.REJECTED))
    payload = await told(bench, execution, WebhookEvent.CANCELLED)
    end = iso((await execution.row()).completed_at)
    assert payload["data"] == {"status": "cancelled", "completedAt": end, "output": None}
    begun = ["execution.started", "execution.pending_approval"]
    assert [row.event for row in await bench.posted(key_id)] == [*begun, "execution.cancelled"]
    assert [row.event for row in await bench.posted(other_id)] == begun


async def test_all_that_happens_in_one_moment_is_told_one_by_one(bench: Bench):
    """Each with the status that it is about, also where more has happened by then."""
    execution = await bench.accepted(key_id := await bench.key("http://h.example"))
    await execution.happens(execution.runs(), execution.asks({"rows": []}), execution.completed({"a": 1}))
    payloads = [Request(0, "", {}, row.body).json for row in await bench.posted(key_id)]
    assert [(each["event"], each["data"]["status"]) for each in payloads] == [
        ("execution.started", "running"),
        ("execution.pending_approval", "pending_approval"),
        ("execution.completed", "completed"),
    ]


async def test_the_same_end_is_told_once(bench: Bench):
    execution = await bench.started(key_id := await bench.key("http://h.example"))
    for _ in range(3):
        await execution.happens(execution.completed({"a": 1}))
    assert [row.event for row in await bench.posted(key_id)] == ["execution.started", "execution.completed"]


async def test_a_result_that_comes_behind_the_end_is_told_with_it(bench: Bench, receiver: Receiver):
    """Somebody has asked HappyRobot, and was quicker than its callback."""
    execution = await bench.started(key_id := await bench.key(receiver.url, [WebhookEvent.COMPLETED]))
    polled = NewEvent(execution.run_id, "status", {"status": "completed"}, RunStatus.COMPLETED, only_if_it_moves=True)
    await execution.happens(polled)
    (waiting,) = await bench.posted(key_id)
    assert waiting.due_at - waiting.created_at == timedelta(seconds=5)
    assert Request(0, "", {}, waiting.body).json["data"]["output"] is None
    await execution.happens(execution.completed({"paid": True}))
    async with bench.workers():
        (request,) = await receiver.took(1)
    assert request.json["data"]["output"] == {"paid": True}
    (sent,) = await bench.posted(key_id)
    assert sent.id == waiting.id
    # What was sent stays as it was.
    async with bench.db.begin() as conn:
        await conn.execute(update(agent_runs).values(metadata={}))
    await execution.happens(execution.completed({"paid": False}))
    assert (await bench.posted(key_id))[0].body == sent.body


async def test_an_end_without_a_result_is_told_all_the_same(
    bench: Bench, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(outbox, "_FOR_A_RESULT", 0.05)
    execution = await bench.started(await bench.key(receiver.url, [WebhookEvent.COMPLETED]))
    await execution.happens(execution.completed())
    async with bench.workers():
        (request,) = await receiver.took(1)
    assert request.json["data"]["output"] is None


# --- who is told of what ---


async def test_a_key_is_told_of_the_events_that_it_wants(bench: Bench):
    wanted = [WebhookEvent.COMPLETED, WebhookEvent.CANCELLED]
    ends, all_documented, nothing = (
        await bench.key("http://h.example", wanted),
        await bench.key("http://h.example"),
        await bench.key("http://h.example", []),
    )
    for key_id in (ends, all_documented, nothing):
        execution = await bench.started(key_id)
        await execution.happens(execution.completed())
    assert [row.event for row in await bench.posted(ends)] == ["execution.completed"]
    assert [row.event for row in await bench.posted(all_documented)] == ["execution.started", "execution.completed"]
    assert await bench.posted(nothing) == []


async def test_nobody_else_is_told_anything(bench: Bench):
    """Keys without an address, those that were stopped or revoked, and executions that are no key's."""
    await bench.key("http://somebody.example", ALL)
    stopped, revoked = await bench.key("http://h.example"), await bench.key("http://h.example")
    async with bench.db.begin() as conn:
        await webhooks.stop(conn, stopped)
        await keys.revoke(conn, revoked)
    for key_id in (await bench.key(None), stopped, revoked, None):
        execution = await bench.started(key_id)
        await execution.happens(execution.completed())
    async with bench.db.connect() as conn:
        assert await conn.scalar(select(func.count()).select_from(deliveries)) == 0
    assert await no_job_is_left(bench)


async def test_what_a_revoked_key_was_to_be_told_fails_and_says_why(bench: Bench, receiver: Receiver):
    revoked, stopped, good = [await bench.key(receiver.url) for _ in range(3)]
    for key_id in (revoked, stopped, good):
        await bench.started(key_id)
    async with bench.db.begin() as conn:
        await keys.revoke(conn, revoked)
        await webhooks.stop(conn, stopped)
    async with bench.workers():
        await bench.until_all(good, DeliveryStatus.DELIVERED)
        for key_id in (revoked, stopped):
            await bench.until_all(key_id, DeliveryStatus.FAILED)
    for key_id in (revoked, stopped):
        (row,) = await bench.posted(key_id)
        (attempt,) = await bench.attempts(row.id)
        assert attempt.error == "the API key was revoked, or is reported to nobody any more"
        assert (attempt.status_code, attempt.response) == (None, None)
        assert row.finished_at is not None
    assert len(receiver.requests) == 1, "the good key's"


# --- signatures ---


async def test_after_a_rotation_both_secrets_sign_until_the_grace_is_over(bench: Bench, receiver: Receiver):
    old = webhooks.new_secret().get_secret_value()
    key_id = await bench.key(receiver.url, secret=old)
    async with bench.db.begin() as conn:
        fresh, _ = await webhooks.rotate(conn, bench.settings, key_id, timedelta(hours=1))
    new = fresh.get_secret_value()
    assert new != old
    async with bench.workers():
        await bench.started(key_id)
        (during,) = await receiver.took(1)
        await bench.until_all(key_id, DeliveryStatus.DELIVERED)
        async with bench.db.begin() as conn:
            await conn.execute(update(api_keys).values(webhook_secret_before_until=func.now()))
        await bench.started(key_id)
        _, after = await receiver.took(2)
    assert during.headers["X-Webhook-Signature"] == documented(new, during.body)
    assert during.headers["X-Webhook-Signature-Previous"] == documented(old, during.body)
    assert len(during.headers["webhook-signature"].split(" ")) == 2
    for secret in (new, old):
        verify(secret, during)
    assert after.headers["X-Webhook-Signature"] == documented(new, after.body)
    assert "X-Webhook-Signature-Previous" not in after.headers
    assert len(after.headers["webhook-signature"].split(" ")) == 1
    verify(new, after)
    with pytest.raises(WebhookVerificationError):
        verify(old, after)


async def test_secrets_are_stored_sealed(bench: Bench):
    secret = webhooks.new_secret().get_secret_value()
    key_id = await bench.key("http://h.example", secret=secret)
    async with bench.db.begin() as conn:
        await webhooks.rotate(conn, bench.settings, key_id, timedelta(hours=1))
        row = str((await conn.execute(select(api_keys).where(api_keys.c.id == key_id))).one())
    assert secret not in row
    assert secret.removeprefix("whsec_") not in row


async def test_pointing_a_key_elsewhere_keeps_its_secret_unless_it_is_given_another(bench: Bench):
    key_id = await bench.key(None)

    async def secrets_of() -> list[str]:
        async with bench.db.connect() as conn:
            endpoint = await webhooks.endpoint_of(conn, bench.settings, key_id)
        assert endpoint is not None
        return [endpoint.url, *(each.get_secret_value() for each in endpoint.secrets)]

    async def point(url: str, secret: str | None = None) -> SecretStr | None:
        async with bench.db.begin() as conn:
            given = None if secret is None else SecretStr(secret)
            return await webhooks.point(conn, bench.settings, key_id, url, None, given)

    made = await point("https://one.example")
    assert made is not None
    assert await secrets_of() == ["https://one.example", made.get_secret_value()]
    assert await point("https://two.example") is None
    assert await secrets_of() == ["https://two.example", made.get_secret_value()]
    async with bench.db.begin() as conn:
        await webhooks.rotate(conn, bench.settings, key_id, timedelta(hours=1), SecretStr("my own"))
    assert await secrets_of() == ["https://two.example", "my own", made.get_secret_value()]
    # Whoever says which one it is means this one alone.
    assert await point("https://two.example", SECRET) is not None
    assert await secrets_of() == ["https://two.example", SECRET]


ONE = UUID(int=1)


def signed(*secrets: str, body: bytes = b'{"a":1}', delivery_id: Any = ONE, at: int = 1_700_000_000) -> dict[str, str]:
    return signing.headers(
        secrets,
        event="execution.started",
        execution_id=UUID(int=2),
        delivery_id=delivery_id,
        timestamp=at,
        body=body,
    )


def test_a_signature_is_that_of_the_standards_own_example():
    """https://github.com/standard-webhooks/standard-webhooks, in the tests of its libraries."""
    found = signed(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        delivery_id="msg_p5jXN8AQM9LWM0D4loKWxJek",
        at=1_614_265_330,
        body=b'{"test": 2432232314}',
    )
    assert found["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("secret", [SECRET, "whsec_", "whsec_not base64", "whsec_größer", "ключ", "a" * 500])
def test_any_secret_signs(secret: str):
    found = signed(secret)
    assert found["X-Webhook-Signature"] == documented(secret, b'{"a":1}')
    version, _, signature = found["webhook-signature"].partition(",")
    assert version == "v1"
    assert len(base64.b64decode(signature, validate=True)) == 32


def test_a_signature_is_of_the_body_the_id_the_time_and_the_secret():
    usual = signed(SECRET)
    for other in (signed("another"), signed(SECRET, body=b'{"a":2}')):
        for name in ("X-Webhook-Signature", "webhook-signature"):
            assert other[name] != usual[name]
    for other in (signed(SECRET, delivery_id=UUID(int=3)), signed(SECRET, at=1_700_000_001)):
        assert other["webhook-signature"] != usual["webhook-signature"]


def test_a_new_secret_has_the_form_of_standard_webhooks_and_is_no_other():
    one, other = (webhooks.new_secret().get_secret_value() for _ in range(2))
    assert one != other
    assert one.startswith("whsec_")
    assert len(base64.b64decode(one.removeprefix("whsec_"), validate=True)) == 32


# --- what fails ---


def test_after_four_failures_there_is_no_further_attempt():
    assert [pause_after(failures) for failures in range(1, 6)] == [1, 5, 15, None, None]


async def test_what_failed_four_times_is_kept_with_all_that_was_tried(bench: Bench, receiver: Receiver, at_once: None):
    async def out_of_order(_: Request, writer: asyncio.StreamWriter) -> None:
        await reply(writer, 503, b"out of order\0 " * 200)

    receiver.answer = out_of_order
    key_id = await bench.key(receiver.url)
    async with bench.workers():
        await bench.started(key_id)
        await bench.until_all(key_id, DeliveryStatus.FAILED)
        await until(lambda: no_job_is_left(bench))
    (row,) = await bench.posted(key_id)
    assert (row.failures, row.claimed_until) == (4, None)
    assert row.finished_at is not None
    attempts = await bench.attempts(row.id)
    assert [attempt.number for attempt in attempts] == [1, 2, 3, 4]
    for attempt in attempts:
        assert attempt.status_code == 503
        assert attempt.error == "answered 503"
        assert attempt.response == ("out of order� " * 200)[:1000]
        assert 0 <= attempt.duration_ms < 60_000
    assert [attempt.started_at for attempt in attempts] == sorted({attempt.started_at for attempt in attempts})
    assert [request.id for request in receiver.requests].count(str(row.id)) == 4


async def no_job_is_left(bench: Bench) -> bool:
    async with bench.db.connect() as conn:
        left = "SELECT count(*) FROM switchboard_pgqueuer WHERE entrypoint = 'deliver'"
        return bool(await conn.scalar(text(left)) == 0)


async def test_of_very_many_attempts_the_last_are_kept(bench: Bench, receiver: Receiver):
    await bench.started(key_id := await bench.key(receiver.url))
    (row,) = await bench.posted(key_id)
    made = Sender(bench.settings)
    deliverer = Deliverer(bench.settings, bench.db, made)
    for _ in range(log.SHOWN + 5):
        assert await deliverer.deliver(str(row.id)) is None
        async with bench.db.begin() as conn:
            await log.send_again(conn, row.id)
    await made.aclose()
    assert [attempt.number for attempt in await bench.attempts(row.id)] == list(range(6, log.SHOWN + 6))
    async with bench.db.connect() as conn:
        (listed,) = await log.listed(conn, log.Wanted(key_id), limit=10)
    assert [attempt.number for attempt in listed.attempts] == list(range(6, log.SHOWN + 6))


async def test_what_failed_is_sent_again_over_the_public_api_and_by_the_operator(
    bench: Bench, receiver: Receiver, at_once: None
):
    receiver.answer = statuses(500)
    async with running_service(bench.settings, NOBODY, worker=True) as service:
        async with bench.db.begin() as conn:
            made, secret = await keys.create(conn, "a customer", [KeyScope.PUBLIC], burst=1000)
            await webhooks.point(conn, bench.settings, made.id, receiver.url, None, SecretStr(SECRET))
        service.http.headers["Authorization"] = f"Bearer {secret.get_secret_value()}"
        await bench.started(made.id)
        await bench.until_all(made.id, DeliveryStatus.FAILED)
        (row,) = await bench.posted(made.id)
        path = f"{PUBLIC}/deliveries/{row.id}/redeliver"
        # As often as a new one.
        answer = await service.http.post(path)
        assert answer.status_code == 202
        assert answer.json() == {
            "deliveryId": str(row.id),
            "status": "pending",
            "message": "Delivery will be sent again",
        }
        await bench.until_all(made.id, DeliveryStatus.FAILED)
        assert len(await receiver.took(8)) == 8
        receiver.answer = ok
        assert (await service.http.post(path)).status_code == 202
        await bench.until_all(made.id, DeliveryStatus.DELIVERED)
        # Also what was delivered: it may have been lost over there.
        async with bench.db.begin() as conn:
            assert await log.send_again(conn, row.id) is DeliveryStatus.DELIVERED
            assert await log.send_again(conn, row.id) is DeliveryStatus.PENDING
        requests = await receiver.took(10)
        await bench.until_all(made.id, DeliveryStatus.DELIVERED)
        assert {(request.id, request.body) for request in requests} == {(str(row.id), row.body)}
        for request in requests:
            verify(SECRET, request)
        (listed,) = (await service.http.get(f"{PUBLIC}/deliveries")).json()
        assert [attempt["statusCode"] for attempt in listed["attempts"]] == [500] * 8 + [200] * 2
        assert [attempt["number"] for attempt in listed["attempts"]] == list(range(1, 11))
        assert (listed["id"], listed["status"], listed["nextAttemptAt"]) == (str(row.id), "delivered", None)
        # Another's is not there.
        async with bench.db.begin() as conn:
            assert await log.send_again(conn, row.id, key_id=uuid4()) is None
            assert await log.send_again(conn, uuid4()) is None
    assert len(receiver.requests) == 10


# --- what is lost, and what is not ---


async def test_what_was_committed_while_no_worker_ran_is_sent_when_one_starts(bench: Bench, receiver: Receiver):
    key_id = await bench.key(receiver.url)
    executions_then = [await bench.started(key_id) for _ in range(5)]
    for execution in executions_then:
        await execution.happens(execution.completed())
    assert receiver.connections == 0
    async with bench.workers():
        requests = await receiver.took(10)
        await bench.until_all(key_id, DeliveryStatus.DELIVERED)
    assert sorted(request.body for request in requests) == sorted(row.body for row in await bench.posted(key_id))


async def test_a_change_that_is_rolled_back_posts_nothing(bench: Bench, receiver: Receiver):
    key_id = await bench.key(receiver.url)
    async with bench.workers():
        undone, done = await bench.accepted(key_id), await bench.accepted(key_id)

        async def change_and_fail() -> None:
            async with bench.db.begin() as conn:
                await undone.happens_in(conn, undone.runs(), undone.completed())
                rows = await conn.scalar(select(func.count()).select_from(deliveries))
                assert rows == 2, "they are there, for whoever sees the change"
                assert await bench.posted(key_id) == [], "and not for whoever does not"
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await change_and_fail()
        assert await bench.posted(key_id) == []
        assert (await undone.row()).status == ExecutionStatus.PENDING
        # What comes after it is the first that arrives.
        await done.happens(done.runs())
        assert [row.execution_id for row in await bench.posted(key_id)] == [done.id]
        (request,) = await receiver.took(1)
        await bench.until_all(key_id, DeliveryStatus.DELIVERED)
    assert request.headers["X-Webhook-Execution-Id"] == str(done.id)
    assert len(receiver.requests) == 1


async def test_a_worker_that_is_killed_in_the_middle_loses_none_and_repeats_at_most_that_one(
    bench: Bench, servers: Servers, receiver: Receiver
):
    held = asyncio.Event()

    async def hold_the_fourth(request: Request, writer: asyncio.StreamWriter) -> None:
        if len({each.id for each in receiver.requests}) == 4 and not held.is_set():
            held.set()
            await never(request, writer)
        await reply(writer)

    receiver.answer = hold_the_fourth
    key_id = await bench.key(receiver.url)
    execution = await bench.started(key_id)
    for number in range(10):
        await execution.happens(execution.asks({"rows": [number]}))
    await execution.happens(execution.completed())
    expected = [str(row.id) for row in await bench.posted(key_id)]
    assert len(expected) == 12

    with worker_process(bench, servers) as process:
        async with asyncio.timeout(60):
            await held.wait()
        process.kill()
        await asyncio.to_thread(process.wait)
    assert [request.id for request in receiver.requests] == expected[:4]
    assert await bench.attempts(expected[3]) == [], "nobody knows what became of it"
    # A minute goes by: whoever holds a delivery or a job for so long is gone.
    async with bench.db.begin() as conn:
        for table, column in (
            ("deliveries", "claimed_until"),
            ("switchboard_pgqueuer", "heartbeat"),
            ("switchboard_pgqueuer", "execute_after"),
        ):
            await conn.execute(text(f"UPDATE {table} SET {column} = {column} - interval '1 minute'"))
    with worker_process(bench, servers) as process:
        await bench.until_all(key_id, DeliveryStatus.DELIVERED)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 0
    assert [request.id for request in receiver.requests] == [*expected[:4], *expected[3:]]
    first, again = (request for request in receiver.requests if request.id == expected[3])
    assert first.body == again.body


@contextlib.contextmanager
def worker_process(bench: Bench, servers: Servers) -> Any:
    """`switchboard worker`, once it works."""
    assert bench.settings.database_url is not None
    with local.environment(
        DATABASE_URL=bench.settings.database_url.get_secret_value(),
        REDIS_URL=servers.redis_url,
        HAPPYROBOT_WEBHOOK_URL="http://127.0.0.1:1/hooks/none",
        APP_URL="http://127.0.0.1:1",
        HAPPYROBOT_X_API_KEY=HOOK_KEY,
        APP_SECRET=APP_SECRET,
        ALLOW_PRIVATE_WEBHOOKS="true",
        LOG_LEVEL="error",
    ):
        process = subprocess.Popen([sys.executable, "-m", "switchboard", "worker"], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_a_delivery_whose_job_was_lost_is_found(bench: Bench, receiver: Receiver):
    key_id = await bench.key(receiver.url)
    await bench.started(key_id)
    async with bench.db.begin() as conn:
        await conn.execute(text("DELETE FROM switchboard_pgqueuer"))
        await conn.execute(update(deliveries).values(due_at=func.now() - timedelta(minutes=5)))
    async with bench.workers():  # which looks for it when it starts
        await receiver.took(1)
        await bench.until_all(key_id, DeliveryStatus.DELIVERED)
    assert len(receiver.requests) == 1


async def test_a_worker_that_is_told_to_leave_leaves_a_delivery_to_the_next(bench: Bench, receiver: Receiver):
    receiver.answer = never
    key_id = await bench.key(receiver.url)
    await bench.started(key_id)
    async with bench.workers():
        await receiver.took(1)
    assert await bench.stand(key_id, DeliveryStatus.PENDING)
    receiver.answer = ok
    async with bench.db.begin() as conn:
        await conn.execute(update(deliveries).values(claimed_until=func.now()))  # its time goes by
    async with bench.workers():
        first, again = await receiver.took(2)
        await bench.until_all(key_id, DeliveryStatus.DELIVERED)
    assert (first.id, first.body) == (again.id, again.body)


# --- who waits for whom ---


def test_a_lane_is_full_with_eight():
    lane = Lane()
    for _ in range(8):
        assert not lane.is_full
        lane.sending += 1
    assert lane.is_full


def test_a_slow_endpoint_has_fewer_places():
    lane = Lane(sending=2)
    assert not lane.is_full
    lane.usually = 10
    assert lane.is_full


def test_a_lane_is_forgotten_once_nobody_is_in_it_or_comes_back():
    lane = Lane(sending=1)
    assert not lane.is_idle
    lane.sending = 0
    assert lane.is_idle
    lane.send_away(uuid4())
    assert not lane.is_idle
    lane.away = {uuid4(): time.monotonic() - 1}
    assert lane.is_idle, "it came back elsewhere"


async def test_who_has_many_that_wait_lets_others_go_first(bench: Bench):
    crowd, other = await bench.key("http://h.example"), await bench.key("http://h.example")
    await post(bench, crowd, 50)
    late = [await bench.accepted(key_id) for key_id in (crowd, other)]
    for execution in late:
        await execution.happens(execution.runs())
    query = text(
        "SELECT d.execution_id FROM switchboard_pgqueuer q JOIN deliveries d ON q.dedupe_key = 'deliver:' || d.id "
        "WHERE d.execution_id = ANY(:ids) ORDER BY q.priority DESC, q.id"
    )
    async with bench.db.connect() as conn:
        order = list(await conn.scalars(query, {"ids": [execution.id for execution in late]}))
    assert order == [late[1].id, late[0].id]


def test_who_is_sent_away_comes_back_later_the_more_have_been_and_the_slower_it_goes():
    lane = Lane()
    waits = [lane.send_away(uuid4()) for _ in range(100)]
    assert waits[0] == 0.2, "at least"
    assert waits == sorted(waits)
    assert waits[-1] > 1
    slow = Lane(usually=10)
    assert slow.send_away(uuid4()) == pytest.approx(10)
    assert max(slow.send_away(uuid4()) for _ in range(1_000)) == 60, "at most"


def test_who_is_sent_away_twice_counts_once():
    lane, one = Lane(usually=8), uuid4()
    assert {lane.send_away(one) for _ in range(100)} == {8}
    assert list(lane.away) == [one]


def test_a_lane_knows_how_long_it_takes_of_late():
    lane = Lane()
    for _ in range(30):
        lane.note(10)
    assert 9 < lane.usually <= 10
    for _ in range(30):
        lane.note(0.1)
    assert 0.1 <= lane.usually < 0.2


@dataclass
class Calls:
    """HappyRobot, where calls can be started."""

    made: int = 0

    def answer(self, _: httpx.Request) -> httpx.Response:
        self.made += 1
        return httpx.Response(200, json={"queued_run_ids": [f"run_{uuid4().hex}"]})


async def post(bench: Bench, key_id: UUID, number: int) -> None:
    """Writes down that a key is to be told of as many executions."""
    async with bench.db.begin() as conn:
        rows = [
            {"id": uuid4(), "key_id": key_id, "execution_id": uuid4(), "event": "execution.started", "body": b"{}"}
            for _ in range(number)
        ]
        await conn.execute(insert(deliveries), rows)
        await jobs.enqueue(conn, [Job(DELIVER, str(row["id"])) for row in rows])


async def execute(bench: Bench, service: Service, url: str) -> str:
    """Another customer starts an execution, which is reported there; returns its id."""
    async with bench.db.begin() as conn:
        made, secret = await keys.create(conn, "another", [KeyScope.PUBLIC])
        await webhooks.point(conn, bench.settings, made.id, url, None)
    headers = {"Authorization": f"Bearer {secret.get_secret_value()}"}
    answer = await service.http.post(f"{PUBLIC}/agents/default/execute", json={"input": {}}, headers=headers)
    assert answer.status_code == 202
    return str(answer.json()["executionId"])


async def all_were_picked(bench: Bench) -> bool:
    """Whether each job is under way, or has been put off."""
    query = "SELECT count(*) FROM switchboard_pgqueuer WHERE status = 'queued' AND attempts = 0"
    async with bench.db.connect() as conn:
        return bool(await conn.scalar(text(query)) == 0)


@pytest.fixture
def endless_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much that no attempt comes to an end by itself."""
    monkeypatch.setattr(sender, "TIMEOUT", 600.0)


async def test_a_dead_endpoint_delays_neither_other_customers_nor_calls(
    bench: Bench, receiver: Receiver, endless_patience: None
):
    calls = Calls()
    async with receiving(never) as dead:
        # More than there is room for, in all.
        await post(bench, await bench.key(dead.url), 260)
        async with running_service(bench.settings, httpx.MockTransport(calls.answer), worker=True) as service:
            await dead.took(8)
            await until(lambda: all_were_picked(bench))
            execution_id = await execute(bench, service, receiver.url)
            (request,) = await receiver.took(1, within=30)
            assert request.headers["X-Webhook-Execution-Id"] == execution_id
            assert calls.made == 1
            assert (dead.connections, dead.most) == (8, 8), "it has no more than its lane"


async def test_many_dead_endpoints_leave_calls_their_places(bench: Bench, receiver: Receiver, endless_patience: None):
    calls = Calls()
    async with receiving(never) as dead:
        for _ in range(8):
            await post(bench, await bench.key(dead.url), 8)
        async with running_service(bench.settings, httpx.MockTransport(calls.answer), worker=True) as service:
            await dead.took(64)  # more than the calls that a worker makes at once
            execution_id = await execute(bench, service, receiver.url)
            (request,) = await receiver.took(1, within=30)
            assert request.headers["X-Webhook-Execution-Id"] == execution_id
            assert calls.made == 1


async def test_the_first_attempts_of_an_execution_arrive_in_the_order_of_its_events(bench: Bench, receiver: Receiver):
    """Also with two workers, and where the endpoint takes its time, or fails."""
    turn = 0

    async def slower_first(_: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal turn
        turn += 1
        await asyncio.sleep(0.05 if turn % 2 else 0)  # so that the next would overtake it
        await reply(writer, 500 if turn % 5 == 0 else 200)

    receiver.answer = slower_first
    key_id = await bench.key(receiver.url)
    started = [await bench.accepted(key_id) for _ in range(4)]
    async with bench.workers(2):
        for number in range(5):
            for execution in started:
                await execution.happens(*[execution.runs()] * (number == 0), execution.asks({"rows": [number]}))
        for execution in started:
            await execution.happens(execution.completed())
        await until(lambda: all_tried(bench, key_id))
    for execution in started:
        rows = [row for row in await bench.posted(key_id) if row.execution_id == execution.id]
        assert len(rows) == 7
        arrived = dict.fromkeys(
            request.id
            for request in receiver.requests
            if request.headers["X-Webhook-Execution-Id"] == str(execution.id)
        )
        assert list(arrived) == [str(row.id) for row in rows]


async def test_a_failure_does_not_hold_up_what_follows(
    bench: Bench, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(delivering, "PAUSES", (600.0, 600.0, 600.0))
    receiver.answer = statuses(500, 200)
    execution = await bench.started(key_id := await bench.key(receiver.url))
    await execution.happens(execution.completed())
    async with bench.workers():
        assert [request.event for request in await receiver.took(2)] == ["execution.started", "execution.completed"]
        _, second = await bench.posted(key_id)
        await until(lambda: no_job_waits_for(bench, second.id))
    assert [row.status for row in await bench.posted(key_id)] == [DeliveryStatus.PENDING, DeliveryStatus.DELIVERED]
    assert len(receiver.requests) == 2


async def no_job_waits_for(bench: Bench, delivery_id: UUID) -> bool:
    query = "SELECT count(*) FROM switchboard_pgqueuer WHERE dedupe_key = :key"
    async with bench.db.connect() as conn:
        return bool(await conn.scalar(text(query), {"key": f"deliver:{delivery_id}"}) == 0)


async def all_tried(bench: Bench, key_id: UUID) -> bool:
    return all(row.status == DeliveryStatus.DELIVERED or row.failures for row in await bench.posted(key_id))


async def test_what_waits_for_its_turn_does_not_hold_up_those_whose_turn_it_is(bench: Bench, receiver: Receiver):
    """A customer with many that are due, as after an hour of being away."""
    key_id = await bench.key(receiver.url)
    await post(bench, key_id, 300)
    made = Sender(bench.settings)
    deliverer, looks = Deliverer(bench.settings, bench.db, made), 0
    rows = await bench.posted(key_id)

    async def until_done(delivery_id: UUID) -> None:
        nonlocal looks
        while await deliverer.deliver(str(delivery_id)) is not None:
            looks += 1

    await asyncio.gather(*(until_done(row.id) for row in rows))
    await made.aclose()
    await bench.until_all(key_id, DeliveryStatus.DELIVERED)
    assert len(receiver.requests) == 300
    assert looks < 300, "most had their turn when they came"


async def test_two_workers_send_each_attempt_once(bench: Bench, receiver: Receiver):
    key_ids = [await bench.key(receiver.url) for _ in range(4)]
    async with bench.workers(2):
        for number in range(100):
            await bench.started(key_ids[number % 4])
        await receiver.took(100)
        for key_id in key_ids:
            await bench.until_all(key_id, DeliveryStatus.DELIVERED)
    assert len(receiver.requests) == 100
    assert len({request.id for request in receiver.requests}) == 100
    async with bench.db.connect() as conn:
        assert await conn.scalar(select(func.count()).select_from(delivery_attempts)) == 100


async def test_a_delivery_with_two_jobs_is_sent_once(bench: Bench, receiver: Receiver):
    """As when a job was taken for lost which was not."""
    key_id = await bench.key(receiver.url)
    for _ in range(20):
        await bench.started(key_id)
    async with bench.db.begin() as conn:
        again = [
            Job(DELIVER, str(row.id), occasion=str(copy)) for row in await bench.posted(key_id) for copy in range(3)
        ]
        await jobs.enqueue(conn, again)
    async with bench.workers(2):
        await bench.until_all(key_id, DeliveryStatus.DELIVERED)
    assert len(receiver.requests) == 20


async def test_an_attempt_that_just_failed_is_not_repeated_by_whoever_came_at_the_same_time(
    bench: Bench, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
):
    receiver.answer = statuses(500)
    await bench.started(key_id := await bench.key(receiver.url))
    (row,) = await bench.posted(key_id)
    made = Sender(bench.settings)
    one, other = (Deliverer(bench.settings, bench.db, made) for _ in range(2))
    genuine = delivering._claim
    failed = asyncio.Event()

    async def after_the_other(conn: AsyncConnection, delivery_id: UUID) -> Any:
        if asyncio.current_task() is late:
            await failed.wait()
        return await genuine(conn, delivery_id)

    monkeypatch.setattr(delivering, "_claim", after_the_other)
    monkeypatch.setattr(delivering, "_STAYS", 0)
    late = asyncio.create_task(other.deliver(str(row.id)))
    assert await one.deliver(str(row.id)) == pytest.approx(1, abs=0.5)
    failed.set()
    assert await late is not None, "it looks again"
    await made.aclose()
    assert len(receiver.requests) == 1
    assert len(await bench.attempts(row.id)) == 1


async def test_an_attempt_that_took_too_long_does_not_undo_what_another_has_done(bench: Bench, receiver: Receiver):
    """Its worker slept, and another one has claimed the delivery and delivered it."""
    await bench.started(key_id := await bench.key(receiver.url))
    (row,) = await bench.posted(key_id)
    async with bench.db.begin() as conn:
        slept = await delivering._claim(conn, row.id)
        assert slept is not None
        assert await delivering._claim(conn, row.id) is None, "it is somebody's"
        await conn.execute(update(deliveries).values(claimed_until=func.now() - timedelta(seconds=1)))
    made = Sender(bench.settings)
    assert await Deliverer(bench.settings, bench.db, made).deliver(str(row.id)) is None
    await made.aclose()
    async with bench.db.begin() as conn:
        late = Attempt(row.created_at, 25_000, error="no answer within 10 seconds")
        await delivering._write_down(conn, slept, late, None)
    (row,) = await bench.posted(key_id)
    assert (row.status, row.failures) == (DeliveryStatus.DELIVERED, 0)
    assert [attempt.error for attempt in await bench.attempts(row.id)] == [None, "no answer within 10 seconds"]


async def test_whoever_finds_somebody_sending_looks_again_when_their_time_is_over(bench: Bench, receiver: Receiver):
    """The rest of it, and not all of it once more: they may have been gone for a while."""
    await bench.started(key_id := await bench.key(receiver.url))
    (row,) = await bench.posted(key_id)
    async with bench.db.begin() as conn:
        await conn.execute(update(deliveries).values(claimed_until=func.now() + timedelta(seconds=8)))
    made = Sender(bench.settings)
    assert await Deliverer(bench.settings, bench.db, made).deliver(str(row.id)) == pytest.approx(8, abs=1)
    await made.aclose()
    assert receiver.requests == []


async def test_a_delivery_that_is_not_there_is_nothing_to_do(bench: Bench, receiver: Receiver):
    made = Sender(bench.settings)
    assert await Deliverer(bench.settings, bench.db, made).deliver(str(uuid4())) is None
    await made.aclose()


async def test_what_is_sent_again_and_takes_its_time_is_still_sent_once(
    bench: Bench, receiver: Receiver, service: Service
):
    """The sweep gives a job to what seems to have lost it."""
    await bench.started(key_id := await bench.key(receiver.url))
    async with bench.workers():
        await bench.until_all(key_id, DeliveryStatus.DELIVERED)
    (row,) = await bench.posted(key_id)
    async with bench.db.begin() as conn:
        await log.send_again(conn, row.id)
        await conn.execute(update(deliveries).values(due_at=func.now() - timedelta(minutes=5)))
    await sweep(bench.db, service.state["intake"], 15, 1800)
    async with bench.workers(2):
        await bench.until_all(key_id, DeliveryStatus.DELIVERED)
    assert len(receiver.requests) == 2
