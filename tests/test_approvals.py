"""Approvals: asked for by a run, decided once, and told to HappyRobot however long that takes."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import workflows as registry
from switchboard.events import NewEvent
from switchboard.executions import approval_data, requires_comment
from switchboard.happyrobot.addresses import may_decide_at, takes_hook_key
from switchboard.happyrobot.client import Hook
from switchboard.happyrobot.simulator import Faults, Run, Simulator
from switchboard.runs.ingest import write
from switchboard.runs.reconcile import Patience, Watch, _watch
from switchboard.runs.sorting import Decision, NewRuns, News
from switchboard.runs.status import Standing, execution_status
from switchboard.tables import ApprovalStatus, ExecutionStatus, RunStatus, approvals
from tests.conftest import (
    API_KEY,
    HOOK_KEY,
    Servers,
    Service,
    new_database,
    running_service,
    serving,
    settings_for,
    until,
)
from tests.website import Website, new_website

ASKS = {"simulate": {"approval": True}}
OPPOSITE = {"approve": "reject", "reject": "approve"}
STATUS = {"approve": "approved", "reject": "rejected"}


@dataclass
class Desk:
    """A service with a worker, a website, and HappyRobot, which does nothing until it is asked."""

    service: Service
    db: AsyncEngine
    website: Website
    simulator: Simulator

    def run_of(self, execution_id: str) -> Run:
        """The one run of an execution."""
        [run] = [run for run in self.simulator.runs.values() if run.payload["execution_id"] == execution_id]
        return run

    def told(self, execution_id: str) -> list[Any]:
        """What HappyRobot was told about an execution."""
        return [
            decision.body["decision"]
            for decision in self.simulator.decisions
            if decision.body is not None and decision.body["execution_id"] == execution_id
        ]

    async def asked(self, given: dict[str, Any] | None = None) -> str:
        """An execution that waits for approval."""
        execution_id = await self.website.execute(given or ASKS)
        await self.website.until(execution_id, "pending_approval")
        return execution_id

    async def silent(self) -> str:
        """An execution whose run says nothing, and waits for somebody who never comes."""
        execution_id = await self.website.execute({"simulate": {"approval": True, "faults": "silent"}})
        await self.website.until(execution_id, "running")
        return execution_id

    async def decide(self, execution_id: str, what: str, **body: Any) -> httpx.Response:
        return await self.website.post(f"/executions/{execution_id}/{what}", body)

    async def rows(self, execution_id: str) -> list[Any]:
        query = select(approvals).where(approvals.c.execution_id == execution_id).order_by(approvals.c.number)
        async with self.db.connect() as conn:
            return list(await conn.execute(query))

    async def hurry(self) -> None:
        """Lets the jobs come up that wait for their next attempt."""
        async with self.db.begin() as conn:
            await conn.execute(text("UPDATE switchboard_pgqueuer SET execute_after = now() WHERE status = 'queued'"))


@pytest.fixture(scope="module")
async def desk(servers: Servers, template: str) -> AsyncIterator[Desk]:
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.002)
    async with (
        new_database(servers, template) as url,
        serving(lambda _: simulator.app) as (upstream, _),
        running_service(settings_for(url, servers.redis_url, upstream), worker=True) as service,
    ):
        db = service.state["db"]
        yield Desk(service, db, await new_website(service, db), simulator)


async def test_what_a_run_asks_for_is_shown_and_approved_and_the_run_goes_on(desk: Desk):
    rows = [{"customerId": "C1", "name": "John Doe"}, {"customerId": "C2", "name": "Jane Doe"}]
    execution_id = await desk.asked({**ASKS, "csvData": rows})
    status = await desk.website.status(execution_id)
    assert (status["status"], status["approvalStatus"]) == ("pending_approval", "pending")
    answer = await desk.website.get(f"/executions/{execution_id}/pending-approval")
    pending = answer.json()
    assert answer.status_code == 200
    assert pending == {
        "id": execution_id,
        "workflowId": "default",
        "status": "pending_approval",
        "approvalData": pending["approvalData"],
        "startedAt": status["startedAt"],
        "approvalId": pending["approvalId"],
    }
    shown = pending["approvalData"]
    assert set(shown) == {"rows", "metadata", "displayFields"}, "and not where the decision goes"
    assert [row["customerId"] for row in shown["rows"]] == ["C1", "C2"]
    decided = await desk.decide(execution_id, "approve", comment="Content approved, looks good")
    assert (decided.status_code, decided.json()) == (
        200,
        {
            "executionId": execution_id,
            "status": "approved",
            "message": "Execution approved and will continue",
            "approvalId": pending["approvalId"],
        },
    )
    ended = await desk.website.until(execution_id, "completed")
    assert ended["approvalStatus"] == "approved"
    assert desk.told(execution_id) == ["approved"]
    [told] = [each for each in desk.simulator.decisions if each.body and each.body["execution_id"] == execution_id]
    assert told.body is not None
    assert told.body == {
        "approval_id": pending["approvalId"],
        "execution_id": execution_id,
        "run_id": desk.run_of(execution_id).id,
        "decision": "approved",
        "approved": True,
        "comment": "Content approved, looks good",
        "decided_at": told.body["decided_at"],
    }
    assert told.headers["idempotency-key"] == pending["approvalId"]
    assert (await desk.website.get(f"/executions/{execution_id}/pending-approval")).status_code == 409


async def test_what_is_rejected_is_over_and_its_call_is_stopped(desk: Desk):
    execution_id = await desk.asked()
    decided = await desk.decide(execution_id, "reject", comment="Content does not meet standards")
    assert (decided.status_code, decided.json()) == (
        200,
        {
            "executionId": execution_id,
            "status": "rejected",
            "message": "Execution rejected and stopped",
            "approvalId": decided.json()["approvalId"],
        },
    )
    status = await desk.website.status(execution_id)
    assert (status["status"], status["approvalStatus"]) == ("cancelled", "rejected")
    assert status["completedAt"] is not None
    run = desk.run_of(execution_id)

    async def stopped() -> bool:
        return bool((await desk.service.run(run.id))["status"] == "CANCELED")

    await until(stopped)
    assert desk.told(execution_id) == ["rejected"]
    after = await desk.website.status(execution_id)
    assert after == status, "what its run does until it has stopped changes nothing"


async def test_all_calls_of_what_is_rejected_are_stopped(desk: Desk):
    """Also one that does not listen to the decision, and one that has asked for nothing."""
    execution_id = await desk.website.execute({"simulate": {"approval": True, "runs": 3}})

    async def all_ask() -> bool:
        return len(await desk.rows(execution_id)) == 3

    await until(all_ask)
    assert (await desk.decide(execution_id, "reject")).status_code == 200
    runs = [run for run in desk.simulator.runs.values() if run.payload["execution_id"] == execution_id]

    async def all_stopped() -> bool:
        return all([(await desk.service.run(run.id))["status"] == "CANCELED" for run in runs])

    await until(all_stopped)
    assert desk.told(execution_id) == ["rejected"], "the one that was decided"
    assert Counter(row.status for row in await desk.rows(execution_id)) == {"rejected": 1, "withdrawn": 2}


@pytest.mark.parametrize("first", ["approve", "reject"])
async def test_the_first_decision_counts_and_the_same_again_is_harmless(desk: Desk, first: str):
    execution_id = await desk.asked()
    one = await desk.decide(execution_id, first, comment="first")
    again = await desk.decide(execution_id, first, comment="again")
    assert (again.status_code, again.json()) == (200, one.json())
    other = await desk.decide(execution_id, OPPOSITE[first])
    assert (other.status_code, other.json()["error"]) == (409, "Conflict")
    await desk.website.until(execution_id, "completed", "cancelled")
    await desk.simulator.settled()
    # After its end, too.
    assert (await desk.decide(execution_id, first)).status_code == 200
    assert (await desk.decide(execution_id, OPPOSITE[first])).status_code == 409
    assert desk.told(execution_id) == [STATUS[first]]
    [row] = await desk.rows(execution_id)
    assert (row.comment, row.decided_by) == ("first", desk.website.key_id)


async def test_fifty_decisions_at_one_instant_are_one_and_happyrobot_is_told_once(desk: Desk, servers: Servers):
    execution_id = await desk.asked()
    settings = desk.service.state["settings"]
    # A second process takes half of them.
    async with running_service(settings, worker=True) as second:
        elsewhere = Website(second.http, desk.website.key_id, desk.website.headers)
        answers = await asyncio.gather(
            *(
                (desk.website, elsewhere)[number % 2].post(
                    f"/executions/{execution_id}/{('approve', 'reject')[number // 2 % 2]}", {"comment": str(number)}
                )
                for number in range(50)
            )
        )
        statuses = Counter((str(answer.request.url).rpartition("/")[2], answer.status_code) for answer in answers)
        [row] = await desk.rows(execution_id)
        won = next(what for what, status in STATUS.items() if status == row.status)
        assert statuses == {(won, 200): statuses[(won, 200)], (OPPOSITE[won], 409): statuses[(OPPOSITE[won], 409)]}
        assert statuses.total() == 50
        await desk.website.until(execution_id, "completed", "cancelled")
        await desk.simulator.settled()

    async def written_down() -> bool:
        [row] = await desk.rows(execution_id)
        return row.told_at is not None

    await until(written_down)
    assert desk.told(execution_id) == [row.status]


async def test_a_comment_may_be_required(desk: Desk):
    execution_id = await desk.asked({"simulate": {"approval": {"require_comment": True}}})
    for body in ({}, {"comment": None}, {"comment": " \n"}):
        answer = await desk.website.post(f"/executions/{execution_id}/approve", body)
        assert (answer.status_code, answer.json()) == (
            400,
            {"message": "comment required", "error": "Bad Request", "statusCode": 400},
        )
    assert (await desk.website.status(execution_id))["approvalStatus"] == "pending"
    assert (await desk.decide(execution_id, "approve", comment="fine")).status_code == 200


@pytest.mark.parametrize(
    "body", [b"[]", b"null", b'"yes"', b"{", b'{"comment": 1}', b'{"comment": "\\u0000"}', b'{"approvalId": 7}']
)
async def test_a_decision_that_cannot_be_understood_decides_nothing(desk: Desk, body: bytes):
    execution_id = await desk.asked()
    url = f"/api/v1/public/executions/{execution_id}/approve"
    answer = await desk.website.http.post(url, content=body, headers=desk.website.headers)
    assert (answer.status_code, list(answer.json())) == (400, ["message", "error", "statusCode"])
    assert (await desk.website.status(execution_id))["approvalStatus"] == "pending"


async def test_a_decision_needs_no_body(desk: Desk):
    execution_id = await desk.asked()
    url = f"/api/v1/public/executions/{execution_id}/approve"
    assert (await desk.website.http.post(url, headers=desk.website.headers)).status_code == 200


async def test_what_asks_for_nothing_cannot_be_decided(desk: Desk):
    execution_id = await desk.website.execute()
    await desk.website.until(execution_id, "completed")
    for answer in (
        await desk.website.get(f"/executions/{execution_id}/pending-approval"),
        await desk.decide(execution_id, "approve"),
        await desk.decide(execution_id, "reject"),
    ):
        assert (answer.status_code, answer.json()) == (
            409,
            {"message": "Execution is not waiting for approval", "error": "Conflict", "statusCode": 409},
        )
    assert (await desk.website.status(execution_id))["status"] == "completed"


async def ask_again(desk: Desk, execution_id: str, **data: Any) -> None:
    """Lets the run of an execution ask for something else."""
    run_id = desk.run_of(execution_id).id
    answer = await desk.service.callback(run_id, "pending_approval", data, resume_url=f"{desk.service.url}/nowhere")
    assert answer.status_code == 200


async def test_a_decision_is_about_the_request_that_it_names(desk: Desk):
    """Two at once: nobody approves what they have not seen."""
    execution_id = await desk.silent()
    await ask_again(desk, execution_id, rows=[{"n": 1}])
    await ask_again(desk, execution_id, rows=[{"n": 2}])
    first, second = await desk.rows(execution_id)
    shown = (await desk.website.get(f"/executions/{execution_id}/pending-approval")).json()
    assert shown["approvalId"] == str(first.id), "the oldest"
    assert (await desk.decide(execution_id, "approve", approvalId=str(first.id))).status_code == 200
    assert (await desk.website.status(execution_id))["approvalStatus"] == "pending"
    again = await desk.decide(execution_id, "approve", approvalId=str(first.id))
    assert again.status_code == 200
    for unknown in ("nonsense", str(desk.website.key_id)):
        assert (await desk.decide(execution_id, "approve", approvalId=unknown)).status_code == 409
    assert [row.status for row in await desk.rows(execution_id)] == ["approved", "pending"]
    assert (await desk.decide(execution_id, "approve", approvalId=str(second.id))).status_code == 200
    assert [row.status for row in await desk.rows(execution_id)] == ["approved", "approved"]


async def test_who_repeats_a_decision_does_not_decide_the_next_question(desk: Desk):
    """The answer to the first was lost. A website that knows nothing of ids looks at what it decides."""
    execution_id = await desk.silent()
    await ask_again(desk, execution_id, rows=[{"n": 1}])
    assert (await desk.decide(execution_id, "approve")).status_code == 200, "the first, also unseen"
    await ask_again(desk, execution_id, rows=[{"n": 2}])
    first, _ = await desk.rows(execution_id)
    again = await desk.decide(execution_id, "approve")
    assert (again.status_code, again.json()["approvalId"]) == (200, str(first.id)), "as before"
    assert [row.status for row in await desk.rows(execution_id)] == ["approved", "pending"]
    shown = (await desk.website.get(f"/executions/{execution_id}/pending-approval")).json()
    assert shown["approvalData"]["rows"] == [{"n": 2}]
    assert (await desk.decide(execution_id, "approve")).status_code == 200
    assert [row.status for row in await desk.rows(execution_id)] == ["approved", "approved"]


async def test_who_decides_the_other_way_repeats_nothing(desk: Desk):
    """A question that nobody has looked at can be rejected: what it is about does not go on."""
    execution_id = await desk.silent()
    for number in (1, 2):
        await ask_again(desk, execution_id, rows=[{"n": number}])
    assert (await desk.decide(execution_id, "approve")).status_code == 200
    assert (await desk.decide(execution_id, "reject")).status_code == 200
    assert [row.status for row in await desk.rows(execution_id)] == ["approved", "rejected"]
    assert (await desk.website.status(execution_id))["status"] == "cancelled"


async def test_the_same_request_twice_is_one(desk: Desk):
    """Without a timestamp or an id a copy cannot be told from another event."""
    execution_id = await desk.silent()
    await ask_again(desk, execution_id, rows=[{"n": 1}])
    for _ in range(2):
        await ask_again(desk, execution_id, rows=[{"n": 2}])
    assert len(await desk.rows(execution_id)) == 2
    await ask_again(desk, execution_id, rows=[{"n": 3}])
    _, second, _ = await desk.rows(execution_id)
    # Also when it was decided: who names an address waits there once.
    assert (await desk.decide(execution_id, "approve", approvalId=str(second.id))).status_code == 200
    await ask_again(desk, execution_id, rows=[{"n": 2}])
    assert len(await desk.rows(execution_id)) == 3


async def test_who_names_no_address_may_ask_the_same_again(desk: Desk):
    execution_id = await desk.silent()
    run_id = desk.run_of(execution_id).id
    for number in (1, 2):
        for _ in range(2):
            await desk.service.callback(run_id, "pending_approval", {"rows": []})
        assert len(await desk.rows(execution_id)) == number
        await desk.website.get(f"/executions/{execution_id}/pending-approval")
        assert (await desk.decide(execution_id, "approve")).status_code == 200


async def in_one_turn(desk: Desk, *news: News) -> list[Any]:
    """What comes of news that are written together."""
    async with desk.db.begin() as conn:
        return list((await write(conn, news)).outcomes)


async def test_a_rejection_is_for_good_whatever_comes_with_it(desk: Desk):
    for approve_first in (True, False):
        execution_id = await desk.website.execute({"simulate": {"runs": 3, "approval": True, "faults": "silent"}})
        await desk.website.until(execution_id, "running")
        first, second, third = sorted(
            run.id for run in desk.simulator.runs.values() if run.payload["execution_id"] == execution_id
        )
        for run_id in (first, second):
            await desk.service.callback(run_id, "pending_approval", {"run": run_id})
        one, other = await desk.rows(execution_id)
        approve = Decision(one.execution_id, ApprovalStatus.APPROVED, approval_id=one.id)
        reject = Decision(one.execution_id, ApprovalStatus.REJECTED, approval_id=other.id)
        asks = NewEvent(third, "pending_approval", {"rows": []}, RunStatus.RUNNING)
        if approve_first:
            await in_one_turn(desk, approve, reject, asks)
        else:
            await in_one_turn(desk, reject, approve, asks)
        status = await desk.website.status(execution_id)
        assert (status["status"], status["approvalStatus"]) == ("cancelled", "rejected")
        assert "pending" not in [row.status for row in await desk.rows(execution_id)]
        assert (await desk.decide(execution_id, "approve")).status_code == 409
        assert (await desk.decide(execution_id, "reject")).status_code == 200
        # Not even what it asks afterwards.
        await desk.service.callback(third, "pending_approval", {"rows": [{"late": True}]})
        assert (await desk.website.status(execution_id))["status"] == "cancelled"


async def test_a_run_that_joins_what_was_rejected_is_stopped_too(desk: Desk):
    execution_id = await desk.asked()
    assert (await desk.decide(execution_id, "reject")).status_code == 200
    other = await desk.website.execute({"simulate": {"approval": True}})
    await desk.website.until(other, "pending_approval")
    stray = desk.run_of(other)
    async with desk.db.begin() as conn:
        await conn.execute(text("DELETE FROM agent_runs WHERE run_id = :id"), {"id": stray.id})
    [row] = await desk.rows(execution_id)
    await desk.service.state["intake"].take(NewRuns(row.execution_id, "default", "c", "late", None, [stray.id]))

    async def stopped() -> bool:
        return stray.over

    await until(stopped)
    assert (await desk.website.status(execution_id))["status"] == "cancelled"


async def test_time_that_people_take_to_decide_is_no_silence(desk: Desk):
    """Somebody may sleep over it. What only we hold for dead may still be decided."""
    patience = Patience(15, 1800)
    watch = Watch(Standing(RunStatus.RUNNING), silent=7200, unheard=7200, newest_event=1, kept=False)
    assert patience.is_stale(watch)
    assert not patience.is_stale(replace(watch, waits=True))
    assert patience.is_stale(replace(watch, waits=True, unheard=90_000)), "but not for ever"
    execution_id = await desk.asked()
    run = desk.run_of(execution_id)
    async with desk.db.begin() as conn:
        found = await _watch_of(desk, run.id)
        assert found.waits
        guess = NewEvent(run.id, "timed_out", {}, RunStatus.FAILED, guess=True, only_if_it_moves=True)
        await write(conn, [guess])
    assert (await desk.website.get(f"/executions/{execution_id}/pending-approval")).status_code == 200
    assert (await desk.decide(execution_id, "approve")).status_code == 200
    await desk.website.until(execution_id, "completed")
    assert desk.told(execution_id) == ["approved"]


async def _watch_of(desk: Desk, run_id: str) -> Watch:
    found = await _watch(desk.db, run_id)
    assert found is not None
    return found


async def test_a_request_that_an_older_version_left_open_cannot_be_decided_after_its_run(desk: Desk):
    execution_id = await desk.asked()
    run_id = desk.run_of(execution_id).id
    async with desk.db.begin() as conn:
        await conn.execute(text("UPDATE agent_runs SET status = 'COMPLETED' WHERE run_id = :id"), {"id": run_id})
        await conn.execute(
            text("UPDATE executions SET status = 'completed' WHERE id = CAST(:id AS uuid)"), {"id": execution_id}
        )
    assert (await desk.decide(execution_id, "reject")).status_code == 409
    status = await desk.website.status(execution_id)
    assert (status["status"], status["approvalStatus"]) == ("completed", None)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ({"rows": [1], "metadata": {"a": 1}, "displayFields": ["x"], "more": 2}, None),
        ([{"n": 1}], {"rows": [{"n": 1}], "metadata": {}, "displayFields": []}),
        ('{"rows": [{"n": 1}]}', {"rows": [{"n": 1}], "metadata": {}, "displayFields": []}),
        ("not JSON", {"rows": [], "metadata": {}, "displayFields": []}),
        (None, {"rows": [], "metadata": {}, "displayFields": []}),
        (
            {"rows": None, "metadata": "x", "displayFields": None},
            {"rows": [], "metadata": {}, "displayFields": []},
        ),
    ],
)
def test_a_page_can_rely_on_the_shape_whatever_the_workflow_sends(data: Any, shown: Any):
    assert approval_data(data) == (data if shown is None else shown)


@pytest.mark.parametrize(
    ("value", "required"),
    [
        (True, True),
        ("true", True),
        (1, True),
        (False, False),
        ("false", False),
        (0, False),
        (None, False),
        ([1], False),
    ],
)
def test_authors_write_it_in_several_ways_that_a_comment_is_required(value: Any, required: bool):
    assert requires_comment({"metadata": {"requireComment": value}}) is required


async def test_what_a_run_has_asked_for_is_withdrawn_when_it_is_over(desk: Desk):
    execution_id = await desk.asked()
    run_id = desk.run_of(execution_id).id
    await desk.service.callback(run_id, "failed", {"error": "Nobody was there to decide"})
    status = await desk.website.status(execution_id)
    assert (status["status"], status["error"], status["approvalStatus"]) == (
        "failed",
        "Nobody was there to decide",
        None,
    )
    assert (await desk.decide(execution_id, "approve")).status_code == 409
    [row] = await desk.rows(execution_id)
    assert (row.status, row.resume_url) == ("withdrawn", None)
    # And what comes late asks for nothing.
    await ask_again(desk, execution_id, rows=[])
    assert len(await desk.rows(execution_id)) == 1


async def test_a_run_that_only_we_hold_for_dead_may_still_ask(desk: Desk):
    execution_id = await desk.silent()
    run_id = desk.run_of(execution_id).id
    async with desk.db.begin() as conn:
        await conn.execute(
            text("UPDATE agent_runs SET status = 'FAILED', timed_out = true WHERE run_id = :id"), {"id": run_id}
        )
    await ask_again(desk, execution_id, rows=[])
    assert (await desk.website.status(execution_id))["status"] == "pending_approval"


async def test_a_request_that_comes_before_its_run_is_known_is_kept_whole(desk: Desk):
    execution_id = await desk.website.execute({"simulate": {"approval": True, "faults": "call_back_first"}})
    await desk.website.until(execution_id, "pending_approval")
    assert (await desk.decide(execution_id, "approve")).status_code == 200
    await desk.website.until(execution_id, "completed")


async def test_where_a_decision_goes_is_nobodys_business(desk: Desk):
    """Whoever knows the address can decide."""
    execution_id = await desk.asked()
    run_id = desk.run_of(execution_id).id
    inside = {"rows": [], "resume_url": f"{desk.service.url}/resume/secret-1"}
    await desk.service.callback(run_id, "pending_approval", inside, resume_url=f"{desk.service.url}/resume/secret-2")
    seen = [
        (await desk.service.http.get(f"/api/happyrobot/runs/{run_id}")).text,
        (await desk.service.http.get(f"/api/happyrobot/runs/{run_id}/events")).text,
        (await desk.website.get(f"/executions/{execution_id}/pending-approval")).text,
    ]
    assert not any("resume" in text for text in seen)
    *_, row = await desk.rows(execution_id)
    assert row.resume_url == f"{desk.service.url}/resume/secret-2"


async def test_happyrobot_is_told_as_soon_as_it_listens(desk: Desk):
    execution_id = await desk.asked()
    run = desk.run_of(execution_id)
    run.faults = Faults(resume_answer="503")
    assert (await desk.decide(execution_id, "approve")).status_code == 200

    async def tried(times: int) -> bool:
        await desk.hurry()
        return len(desk.told(execution_id)) >= times

    await until(lambda: tried(3))
    assert (await desk.website.status(execution_id))["status"] == "running"
    run.faults = Faults()

    async def heard() -> bool:
        await desk.hurry()
        return bool((await desk.website.status(execution_id))["status"] == "completed")

    await until(heard)
    bodies = [each.body for each in desk.simulator.decisions if each.body and each.body["execution_id"] == execution_id]
    assert all(body == bodies[0] for body in bodies), "the same each time"
    [row] = await desk.rows(execution_id)
    assert row.told_at is not None
    assert row.resume_url is None


async def test_a_rejected_call_is_stopped_though_nobody_listens_to_the_decision(desk: Desk):
    execution_id = await desk.asked()
    run = desk.run_of(execution_id)
    run.faults = Faults(resume_answer="500")
    assert (await desk.decide(execution_id, "reject")).status_code == 200

    async def stopped() -> bool:
        await desk.hurry()
        return bool((await desk.service.run(run.id))["status"] == "CANCELED")

    await until(stopped)


async def test_nobody_is_told_for_ever_who_says_that_there_is_nothing_to_decide(desk: Desk):
    """But again at first: whoever answers there may just be starting."""
    execution_id = await desk.asked()
    desk.run_of(execution_id).faults = Faults(resume_answer="410")
    assert (await desk.decide(execution_id, "approve")).status_code == 200

    async def done() -> bool:
        await desk.hurry()
        [row] = await desk.rows(execution_id)
        query = text("SELECT count(*) FROM switchboard_pgqueuer WHERE dedupe_key = :key")
        async with desk.db.connect() as conn:
            return not await conn.scalar(query, {"key": f"decide:{row.id}"})

    await until(done)
    assert len(desk.told(execution_id)) == 4


async def test_a_decision_without_an_address_waits_for_one(desk: Desk, servers: Servers):
    """The callback named none that may be used; an operator gives the workflow an approval hook."""
    workflow_id = await hooked(desk, None)
    given = {"simulate": {"approval": True, "faults": "silent"}}
    execution_id = await desk.website.execute(given, workflow=workflow_id)
    await desk.website.until(execution_id, "running")
    run_id = desk.run_of(execution_id).id
    await desk.service.callback(run_id, "pending_approval", {"rows": []}, resume_url="https://evil.example/resume")
    assert (await desk.decide(execution_id, "approve")).status_code == 200
    heard: list[httpx.Request] = []
    async with receiver(heard) as url:
        await hooked(desk, f"{url}/approvals", workflow_id)

        async def there() -> bool:
            await desk.hurry()
            return bool(heard)

        await until(there)
    assert heard[0].url.path == "/approvals"
    assert "x-api-key" not in heard[0].headers, "the hook's key is for the hook"


async def hooked(desk: Desk, approval_url: str | None, workflow_id: str = "") -> str:
    """A workflow like the default one, with this approval hook."""
    settings = desk.service.state["settings"]
    default = registry.default(settings)
    assert default is not None
    made = registry.Workflow(
        workflow_id or f"w{id(approval_url)}{len(desk.simulator.runs)}",
        Hook(default.hook.url, SecretStr(HOOK_KEY)),
        approval_url=approval_url,
    )
    async with desk.db.begin() as conn:
        await registry.add(conn, settings, made, replace=True)
    return made.id


@contextlib.asynccontextmanager
async def receiver(heard: list[httpx.Request], *, slow: float = 0) -> AsyncIterator[str]:
    """A server that takes everything, remembers it, and answers after so many seconds."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = [(name.decode(), value.decode()) for name, value in scope["headers"]]
            heard.append(httpx.Request(scope["method"], f"http://receiver{scope['path']}", headers=headers))
            await asyncio.sleep(slow)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    async with serving(lambda _: app) as (url, _):
        yield url


async def test_what_cannot_be_told_because_a_key_cannot_be_read_is_stopped_all_the_same(desk: Desk):
    workflow_id = await hooked(desk, None)
    execution_id = await desk.website.execute({"simulate": {"approval": True}}, workflow=workflow_id)
    await desk.website.until(execution_id, "pending_approval")
    async with desk.db.begin() as conn:
        await conn.execute(text("UPDATE workflows SET hook_key = 'broken' WHERE id = :id"), {"id": workflow_id})
    assert (await desk.decide(execution_id, "reject")).status_code == 200
    run = desk.run_of(execution_id)

    async def stopped() -> bool:
        await desk.hurry()
        return run.over

    await until(stopped)
    assert desk.told(execution_id) == []


async def test_a_decision_that_is_being_told_is_told_out_when_the_worker_is_to_stop(
    own_database: str, servers: Servers
):
    """Else HappyRobot would be told twice with each deployment."""
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.002)
    async with serving(lambda _: simulator.app) as (upstream, _):
        heard: list[httpx.Request] = []
        async with receiver(heard, slow=1.0) as url:
            settings = settings_for(own_database, servers.redis_url, upstream)
            async with running_service(settings, worker=True) as service:
                desk = Desk(service, service.state["db"], await new_website(service, service.state["db"]), simulator)
                given = {"simulate": {"approval": True, "faults": "silent"}}
                execution_id = await desk.website.execute(given, workflow=await hooked(desk, f"{url}/approvals"))
                await desk.website.until(execution_id, "running")
                await desk.service.callback(desk.run_of(execution_id).id, "pending_approval", {"rows": []})
                assert (await desk.decide(execution_id, "approve")).status_code == 200

                async def began() -> bool:
                    return bool(heard)

                await until(began)
            async with running_service(settings) as service:
                query = select(approvals.c.told_at).where(approvals.c.execution_id == execution_id)
                async with service.state["db"].connect() as conn:
                    assert await conn.scalar(query) is not None
    assert len(heard) == 1


async def test_a_decision_survives_the_process_that_took_it(own_database: str, servers: Servers):
    """It was committed while no worker ran."""
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.002)
    async with serving(lambda _: simulator.app) as (upstream, _):
        # Where its callbacks went to is gone by then: it is asked.
        settings = settings_for(own_database, servers.redis_url, upstream, reconcile_after=0.5)
        async with running_service(settings, worker=True) as service:
            website = await new_website(service, service.state["db"])
            desk = Desk(service, service.state["db"], website, simulator)
            execution_id = await desk.asked()
        async with running_service(settings) as without:
            alone = Website(without.http, website.key_id, website.headers)
            assert (await alone.post(f"/executions/{execution_id}/approve", {})).status_code == 200
            assert desk.told(execution_id) == []
        async with running_service(settings, worker=True) as service:
            again = Website(service.http, website.key_id, website.headers)
            await again.until(execution_id, "completed")
            assert desk.told(execution_id) == ["approved"]


async def test_decisions_are_in_the_timeline(desk: Desk):
    execution_id = await desk.asked()
    await desk.decide(execution_id, "approve", comment="go")
    await desk.website.until(execution_id, "completed")
    run_id = desk.run_of(execution_id).id
    timeline = (await desk.service.http.get(f"/api/happyrobot/runs/{run_id}/events")).json()
    [row] = await desk.rows(execution_id)
    [event] = [event for event in timeline if event["event_type"] == "approved"]
    assert event["data"] == {"approval_id": str(row.id), "comment": "go"}
    assert event["status"] == "RUNNING"


HOOK = "https://workflows.platform.happyrobot.ai/hooks/x"


@pytest.mark.parametrize(
    ("url", "hook", "allowed"),
    [
        ("https://workflows.platform.happyrobot.ai/resume/1", HOOK, True),
        ("https://other.happyrobot.ai/resume/1", HOOK, True),
        ("http://other.happyrobot.ai/resume/1", HOOK, False),
        ("https://nothappyrobot.ai/resume/1", HOOK, False),
        ("https://happyrobot.ai.evil.example/resume/1", HOOK, False),
        ("https://user@happyrobot.ai/resume", HOOK, False),
        ("https://evil.example/resume?x=.happyrobot.ai", HOOK, False),
        ("https://evil.example/resume", HOOK, False),
        ("https://listed.example/resume", HOOK, True),
        ("https://LISTED.example/resume", HOOK, True),
        ("http://listed.example/resume", HOOK, False),
        ("https://sub.listed.example/resume", HOOK, False),
        ("https://listed.example:8443/resume", HOOK, True),
        ("http://127.0.0.1:8090/resume", "http://127.0.0.1:8090/hooks/x", True),
        ("http://127.0.0.1:8091/resume", "http://127.0.0.1:8090/hooks/x", False),
        ("http://169.254.169.254/latest", HOOK, False),
        ("file:///etc/passwd", HOOK, False),
        ("https://[::1", HOOK, False),
        ("", HOOK, False),
    ],
)
def test_decisions_go_to_the_hooks_host_to_happyrobot_and_to_listed_hosts(url: str, hook: str, allowed: bool):
    assert may_decide_at(url, hook, ["listed.example"]) is allowed


@pytest.mark.parametrize(
    ("url", "hook", "with_key"),
    [
        (HOOK, HOOK, True),
        ("https://other.happyrobot.ai/resume", HOOK, True),
        ("http://other.happyrobot.ai/resume", HOOK, False),
        ("https://listed.example/resume", HOOK, False),
        ("https://other.happyrobot.ai/resume", "https://own.example/hooks/x", False),
        ("https://own.example/resume", "https://own.example/hooks/x", True),
        ("http://own.example/resume", "https://own.example/hooks/x", False),
        ("https://own.example:444/resume", "https://own.example/hooks/x", False),
    ],
)
def test_the_hooks_key_goes_to_its_own_place(url: str, hook: str, with_key: bool):
    assert takes_hook_key(url, hook) is with_key


@pytest.mark.parametrize(
    ("runs", "approval", "status"),
    [
        ("RUNNING", None, "running"),
        ("RUNNING", "pending", "pending_approval"),
        ("RUNNING", "approved", "running"),
        ("RUNNING", "rejected", "cancelled"),
        ("COMPLETED", "rejected", "cancelled"),
        ("COMPLETED", "approved", "completed"),
        ("COMPLETED RUNNING", "pending", "pending_approval"),
        ("FAILED COMPLETED", None, "failed"),
        ("CANCELED COMPLETED", None, "completed"),
        ("CANCELED", None, "cancelled"),
    ],
)
def test_what_an_execution_is_made_of(runs: str, approval: str | None, status: str):
    found = execution_status(map(RunStatus, runs.split()), ApprovalStatus(approval) if approval else None)
    assert found is ExecutionStatus(status)
