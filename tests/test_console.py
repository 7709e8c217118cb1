"""`/`: the operator's page in a real browser, against the real service."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Dialog, Error, Locator, Page, Request, Route, expect
from sqlalchemy import delete, func, insert, update
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import local
from switchboard.access import keys
from switchboard.console import page_policy
from switchboard.happyrobot.simulator import Simulator
from switchboard.tables import KeyScope, agent_runs, api_keys, deliveries, delivery_attempts, run_events
from tests.conftest import (
    API_KEY,
    HOOK_KEY,
    Servers,
    Service,
    Tab,
    Upstream,
    bearer,
    insert_run,
    new_key,
    running_service,
    serving,
    settings_for,
    until,
)
from tests.test_processes import deployed

HOSTILE = "<img src=x onerror=\"document.title='broken in'\">"

SILENT = {"faults": "silent", "approval": True}
"""A simulated call of which the test itself tells, and which goes on until somebody decides or stops it."""


@pytest.fixture(autouse=True, scope="module")
def _patience() -> None:
    expect.set_options(timeout=20_000)


# Of its own: its calls may go on for ever, and other tests wait until none is under way at theirs.


@pytest.fixture(scope="module")
async def upstream() -> AsyncIterator[Upstream]:
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=0.002)
    async with serving(lambda _: simulator.app) as (url, _):
        yield Upstream(simulator, url)


@pytest.fixture(scope="module")
async def service(database_url: str, servers: Servers, upstream: Upstream) -> AsyncIterator[Service]:
    async with running_service(settings_for(database_url, servers.redis_url, upstream.url)) as service:
        yield service


async def started(service: Service, context_id: str, **more: Any) -> str:
    """Starts a workflow, which then says nothing by itself; its run."""
    body = {"context_id": context_id, "simulate": SILENT} | more
    answer = await service.http.post("/api/happyrobot/trigger", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["run_ids"][0])


async def asked(service: Service, context_id: str, **metadata: Any) -> str:
    """A run that waits for something to be approved."""
    run_id = await started(service, context_id)
    rows = [{"name": "Ada", "content": "Dear Ada", "internal": "not to be shown"}]
    data = {
        "rows": rows,
        "metadata": {"title": f"Look at {context_id}"} | metadata,
        "displayFields": ["name", "content"],
    }
    answer = await service.callback(run_id, "pending_approval", data)
    assert answer.status_code == 200, answer.text
    return run_id


def card(page: Page, context_id: str) -> Locator:
    return page.get_by_role("article", name=f"Look at {context_id}", exact=True)


def calls(upstream: Upstream, context_id: str) -> int:
    """How often HappyRobot was called for a context."""
    return sum((call.payload or {}).get("context_id") == context_id for call in upstream.simulator.calls)


class Held:
    """Requests that reach the service, and whose answers wait until they are let go."""

    def __init__(self) -> None:
        self.answered = asyncio.Event()
        self.let_go = asyncio.Event()

    async def __call__(self, route: Route) -> None:
        answer = await route.fetch()
        self.answered.set()
        await self.let_go.wait()
        with contextlib.suppress(Error):  # nobody may be waiting for it any more
            await route.fulfill(response=answer)


async def is_live(page: Page) -> None:
    await expect(page.locator(".connection")).to_have_attribute("data-state", "live")


async def open_run(page: Page, service: Service, run_id: str) -> None:
    """Opens a run, and waits until it was read as the page opened and again as the stream did."""
    reads: list[str] = []
    twice = asyncio.Event()

    def note(request: Request) -> None:
        if request.url.endswith(f"/runs/{run_id}"):
            reads.append(request.url)
        if len(reads) == 2:
            twice.set()

    page.on("requestfinished", note)
    await page.goto(f"{service.url}/#/run/{run_id}")
    await is_live(page)
    await twice.wait()


# How it is served


async def test_the_page_may_load_nothing_but_its_own_files_and_recordings(service: Service):
    answer = await service.http.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy
    assert policy.endswith("; media-src https: http://127.0.0.1:* http://localhost:*")
    assert "//" not in answer.text
    assert "style=" not in answer.text
    assert all("src=" in script for script in re.findall("<script[^>]*>", answer.text))
    head = await service.http.head("/")
    assert (head.status_code, head.content) == (200, b"")


def test_in_production_recordings_play_over_encrypted_connections_alone():
    production = settings_for(
        "postgresql://db/x", "redis://r", None, environment="production", app_url="https://calls.example.com"
    )
    assert page_policy(production).endswith("; media-src https:")


async def test_its_files_are_asked_for_each_time_and_sent_when_they_are_others(service: Service):
    first = await service.http.get("/console/main.js")
    assert first.headers["content-type"].startswith("text/javascript")
    assert first.headers["cache-control"] == "no-cache"
    again = await service.http.get("/console/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    other = await service.http.get("/console/main.js", headers={"If-None-Match": '"another release"'})
    assert (other.status_code, other.content) == (200, first.content)


@pytest.mark.parametrize("path", ["/console/__init__.py", "/console/page.html", "/console/..%2F__init__.py"])
async def test_nothing_else_is_to_be_had(service: Service, path: str):
    answer = await service.http.get(path)
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})


# Runs


async def test_a_workflow_is_started_from_the_form_and_followed_to_its_end(
    service: Service, tab: Tab, upstream: Upstream, context_id: str
):
    page = tab.page
    await page.goto(f"{service.url}/#/trigger")
    await page.get_by_label("Context id").fill(context_id)
    await page.get_by_label("Name", exact=True).fill("Carrier check")
    await page.get_by_role("button", name="Add a field").click()
    await page.get_by_label("Field name").fill("rate")
    await page.get_by_label("Type").select_option("Number")
    await page.get_by_label("Value").fill("1450")
    raw = page.get_by_label("What is sent, as JSON")
    sent = json.loads(await raw.input_value())
    assert sent == {"context_id": context_id, "workflow_id": "default", "name": "Carrier check", "rate": 1450}
    await raw.fill(json.dumps(sent | {"simulate": SILENT, "urgent": True, "constructor": "too"}))
    await expect(page.get_by_label("Field name").nth(2)).to_have_value("urgent")
    await expect(page.get_by_text("This starts default")).to_contain_text(context_id)
    await page.get_by_role("button", name="Start “default”").click()

    await expect(page.get_by_role("heading", name="Carrier check")).to_be_focused()
    run_id = page.url.rsplit("/", 1)[1]
    status, timeline = page.locator(".titled .badge"), page.locator(".timeline li")
    await expect(status).to_have_text("Running")
    await service.callback(run_id, "log", {"message": "The carrier is on the line"})
    await expect(timeline.last).to_contain_text("The carrier is on the line")
    async with page.expect_request("**/details"):  # what was said may be complete now
        await service.callback(run_id, "completed", {"summary": "Booked", "agreed": {"rate": 1525}})
    await expect(status).to_have_text("Completed")
    result = page.get_by_role("region", name="Result")
    await expect(result).to_contain_text("1525")
    await result.get_by_role("button", name="Raw JSON").click()
    await expect(result.locator("pre")).to_have_text(re.compile(r'"agreed": \{\s+"rate": 1525'))
    await timeline.last.locator("summary").click()
    await expect(timeline.last.locator("pre")).to_contain_text('"summary": "Booked"')
    payload = next(call.payload for call in upstream.simulator.calls if call.run_ids == [run_id])
    assert payload is not None
    assert (payload["rate"], payload["urgent"], payload["constructor"]) == (1450, True, "too")


async def test_a_double_click_places_one_call(service: Service, tab: Tab, upstream: Upstream, context_id: str):
    sent: list[str] = []
    tab.page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    await tab.page.goto(f"{service.url}/#/trigger?context_id={context_id}")
    form = tab.page.locator("form")
    await expect(form).to_be_visible()
    await form.evaluate("form => { form.requestSubmit(); form.requestSubmit(); }")
    await expect(tab.page).to_have_url(re.compile("#/run/"))
    assert (len(sent), calls(upstream, context_id)) == (1, 1)


async def test_a_reload_while_a_call_is_placed_places_no_other(
    service: Service, tab: Tab, upstream: Upstream, context_id: str
):
    page, held, asked_to_stay = tab.page, Held(), []

    async def leave(dialog: Dialog) -> None:
        asked_to_stay.append(dialog.type)
        await dialog.accept()

    page.on("dialog", leave)
    await page.route("**/trigger", held, times=1)
    await page.goto(f"{service.url}/#/trigger?context_id={context_id}")
    button = page.get_by_role("button", name="Start “default”")
    await button.click()
    await held.answered.wait()
    kept = await page.evaluate("JSON.stringify({...sessionStorage})")
    assert "console-" in kept
    assert context_id not in kept
    await page.reload()
    assert asked_to_stay == ["beforeunload"]
    held.let_go.set()
    await button.click()
    await expect(page).to_have_url(re.compile("#/run/"))
    assert calls(upstream, context_id) == 1
    assert await page.evaluate("sessionStorage.getItem('switchboard-intents')") == "{}"


async def test_what_is_sent_is_what_is_shown_as_json(service: Service, tab: Tab, upstream: Upstream, context_id: str):
    page = tab.page
    await page.goto(f"{service.url}/#/trigger")
    raw = page.get_by_label("What is sent, as JSON")
    written = {"context_id": context_id, "notes": "line one\nline two", " note": "of\r\ntwo lines", "simulate": SILENT}
    for number in ("12345678901234567890", "1e999"):
        await raw.fill(json.dumps(written)[:-1] + f', "known": [{{"id": {number}}}, "{number}"]}}')
        await expect(page.get_by_text(f"{number} is too long for a number")).to_be_visible()
    await raw.fill(json.dumps(written))
    await page.get_by_role("button", name="Start “default”").click()
    await expect(page).to_have_url(re.compile("#/run/"))
    [payload] = [
        call.payload for call in upstream.simulator.calls if (call.payload or {}).get("context_id") == context_id
    ]
    assert payload is not None
    assert {name: payload[name] for name in written} == written

    await page.go_back()
    await raw.fill(json.dumps(written))
    await page.get_by_label("Name", exact=True).fill("Written in a field")
    shown = json.loads(await raw.input_value())
    assert (shown["name"], shown["notes"]) == ("Written in a field", "line one\nline two")


async def test_whoever_looks_elsewhere_is_told_what_became_of_a_call(
    service: Service, tab: Tab, upstream: Upstream, context_id: str
):
    page, held = tab.page, Held()
    tab.expected = {"502"}
    await page.route("**/trigger", held)
    await page.goto(f"{service.url}/#/trigger")
    body = json.dumps({"context_id": context_id, "simulate": {"faults": "disconnect,silent"}})
    await page.get_by_label("What is sent, as JSON").fill(body)
    await page.get_by_role("button", name="Start “default”").click()
    await held.answered.wait()
    await page.get_by_role("link", name="Runs").click()
    await expect(page.get_by_role("heading", name="Runs", exact=True)).to_be_focused()
    held.let_go.set()
    told = page.locator(".notice")
    await expect(told).to_contain_text(f"About {context_id}: The call may have been placed")
    await page.get_by_role("link", name="Start a workflow").click()
    await page.get_by_label("What is sent, as JSON").fill(body)
    await expect(page.get_by_role("button", name="Start “default”")).to_be_disabled()
    await expect(page.locator(".warning")).to_contain_text("The call may have been placed: do not send it again.")
    assert calls(upstream, context_id) == 1


async def test_an_answer_that_gets_lost_is_asked_for_again_without_another_call(
    service: Service, tab: Tab, upstream: Upstream, context_id: str
):
    page, keys_sent = tab.page, []
    tab.expected = {"ERR_FAILED"}

    async def lose(route: Route) -> None:
        keys_sent.append(route.request.headers["idempotency-key"])
        await route.fetch()
        await route.abort()

    await page.route("**/trigger", lose, times=1)
    await page.goto(f"{service.url}/#/trigger?context_id={context_id}")
    button = page.get_by_role("button", name="Start “default”")
    await button.click()
    await expect(page.get_by_text("nobody is called twice")).to_be_visible()
    await page.get_by_role("link", name="Approvals").click()
    await page.go_back()
    async with page.expect_request("**/trigger") as asked_again:
        await button.click()
    await expect(page).to_have_url(re.compile("#/run/"))
    assert [(await asked_again.value).headers["idempotency-key"]] == keys_sent
    assert calls(upstream, context_id) == 1


async def test_nobody_is_told_to_send_again_what_may_have_been_placed(
    service: Service, tab: Tab, upstream: Upstream, context_id: str
):
    page = tab.page
    tab.expected = {"502"}
    await page.goto(f"{service.url}/#/trigger?context_id={context_id}")
    raw = page.get_by_label("What is sent, as JSON")
    risky = json.dumps({"context_id": context_id, "simulate": {"faults": "disconnect,silent"}})
    await raw.fill(risky)
    button = page.get_by_role("button", name="Start “default”")
    await button.click()
    await expect(page.get_by_text("The call may have been placed: do not send it again.")).to_be_visible()
    await expect(button).to_be_disabled()
    assert calls(upstream, context_id) == 1

    await raw.fill(json.dumps({"context_id": context_id, "simulate": {"faults": "answer=404"}}))
    await button.click()
    await expect(page.get_by_text("nobody was called")).to_be_visible()
    await expect(button).to_be_enabled()
    await raw.fill(risky)
    await expect(button).to_be_disabled()


async def test_what_is_wrong_with_a_form_is_said_before_anybody_is_called(service: Service, tab: Tab):
    page = tab.page
    await page.goto(f"{service.url}/#/trigger")
    button = page.get_by_role("button", name="Start “default”")
    await button.click()
    await expect(page.get_by_label("Context id")).to_be_focused()
    await expect(page.get_by_text("This is required.")).to_be_visible()
    await page.get_by_label("Context id").fill("somewhere")
    await page.get_by_role("button", name="Add a field").click()
    await page.get_by_label("Field name").fill("callback_url")
    await expect(page.get_by_text("Switchboard sets this one itself.")).to_be_visible()
    await button.click()
    await expect(page.get_by_label("Field name")).to_be_focused()
    await page.get_by_label("What is sent, as JSON").fill("{")
    await expect(page.get_by_text("This is not JSON yet.")).to_be_visible()
    assert page.url.endswith("#/trigger")


async def test_a_run_is_canceled_once_somebody_is_sure(service: Service, tab: Tab, context_id: str):
    page = tab.page
    run_id = await started(service, context_id)
    await page.goto(f"{service.url}/#/run/{run_id}")
    await page.get_by_role("button", name="Cancel run").click()
    dialog = page.get_by_role("dialog", name="Cancel this run?")
    await page.keyboard.press("Escape")
    await expect(dialog).to_be_hidden()
    assert (await service.run(run_id))["status"] == "RUNNING"
    await page.get_by_role("button", name="Cancel run").click()
    await dialog.get_by_role("button", name="Cancel run").click()
    await expect(page.locator(".titled .badge")).to_have_text("Canceled")
    await expect(page.get_by_role("button", name="Cancel run")).to_be_hidden()


async def test_a_question_goes_with_its_page_and_an_answer_follows(service: Service, tab: Tab, context_id: str):
    page, held = tab.page, Held()
    run_id = await started(service, context_id)
    await page.goto(f"{service.url}/#/runs?context_id={context_id}")
    await page.locator("tbody a").click()
    await page.get_by_role("button", name="Cancel run").click()
    dialog = page.get_by_role("dialog", name="Cancel this run?")
    await expect(dialog).to_be_visible()
    await page.go_back()
    await expect(page.get_by_role("heading", name="Runs", exact=True)).to_be_focused()
    await expect(dialog).to_be_hidden()
    await page.go_forward()
    await page.route("**/cancel", held)
    await page.get_by_role("button", name="Cancel run").click()
    await dialog.get_by_role("button", name="Cancel run").click()
    await expect(page.locator("h1")).to_be_focused()
    await held.answered.wait()
    await page.go_back()
    await expect(page.get_by_role("heading", name="Runs", exact=True)).to_be_focused()
    held.let_go.set()
    await expect(page.locator(".notice")).to_have_text("The run is canceled")
    assert (await service.run(run_id))["status"] == "CANCELED"


async def test_what_happens_to_a_run_replaces_what_was_only_guessed(
    service: Service, tab: Tab, db: AsyncEngine, context_id: str
):
    page = tab.page
    tab.expected = {"404"}  # HappyRobot knows nothing of that run, and cannot correct the guess
    run_id = await insert_run(db, context_id)
    guess = {"status": "FAILED", "timed_out": True, "completed_at": func.now(), "metadata": {"error": "Nothing heard"}}
    async with db.begin() as conn:
        await conn.execute(update(agent_runs).where(agent_runs.c.run_id == run_id).values(guess))
    await page.clock.install()
    await open_run(page, service, run_id)
    error = page.get_by_role("region", name="Error")
    await expect(error).to_contain_text("Nothing heard")
    await service.callback(run_id, "failed", {"error": "Nobody answered"})
    await expect(error).to_contain_text("Nobody answered")
    async with page.expect_request("**/details"):
        await page.clock.fast_forward(11_000)


async def test_a_run_shows_its_conversation_and_plays_its_recordings(service: Service, tab: Tab, context_id: str):
    page = tab.page
    await page.goto(f"{service.url}/#/runs?context_id={context_id}")
    await expect(page.get_by_text("No runs match")).to_be_visible()
    await is_live(page)
    await started(service, context_id, name="Heard", simulate={})
    await page.get_by_role("link", name="Heard").click()
    await expect(page.locator(".titled .badge")).to_have_text("Completed")
    transcript = page.get_by_role("list", name="Transcript").get_by_role("listitem")
    await expect(transcript.filter(has_text="Person").first).to_be_visible()
    await page.get_by_role("button", name="Get recordings").click()
    sound = page.locator("audio")
    await expect(sound).to_be_visible()
    await until(lambda: page.evaluate("document.querySelector('audio').duration > 0"))


async def test_what_cannot_be_had_is_said_in_a_sentence(
    tab: Tab, database_url: str, servers: Servers, upstream: Upstream, db: AsyncEngine, context_id: str
):
    tab.expected = {"409", "404"}
    run_id = await insert_run(db, context_id)
    settings = settings_for(database_url, servers.redis_url, upstream.url, happyrobot_api_key=None)
    async with running_service(settings) as service:
        await tab.page.goto(f"{service.url}/#/run/{run_id}")
        await expect(tab.page.get_by_text("HappyRobot cannot be asked about conversations")).to_be_visible()
        await tab.page.goto(f"{service.url}/#/run/nobody")
        await expect(tab.page.get_by_text("There is no such run, or it is not yours to see.")).to_be_visible()


async def test_the_list_follows_what_happens_and_keeps_to_its_filter(service: Service, tab: Tab, context_id: str):
    page = tab.page
    first = await started(service, context_id, name="First")
    await started(service, f"{context_id}-other", name="Elsewhere")
    await page.goto(f"{service.url}/#/runs")
    await page.get_by_role("searchbox", name="Context id").fill(context_id)
    await page.keyboard.press("Enter")
    await expect(page).to_have_url(re.compile(f"context_id={context_id}"))
    rows = page.get_by_role("table", name="Runs").locator("tbody tr")
    await expect(rows).to_have_count(1)
    await is_live(page)
    await service.callback(first, "log", {"message": "A word"})
    await expect(rows).to_contain_text("A word")
    await started(service, context_id, name="Second")
    await expect(rows).to_have_count(2)
    await expect(rows.first).to_contain_text("Second")
    await service.callback(first, "failed", {"error": "Nobody answered"})
    await expect(rows.last).to_contain_text("Failed")
    await expect(rows.last).to_contain_text("Nobody answered")

    await page.get_by_role("button", name="Failed").click()
    await expect(rows).to_have_count(1)
    await expect(page.get_by_role("button", name="Failed")).to_have_attribute("aria-pressed", "true")
    shared = page.url
    await page.go_back()
    await expect(rows).to_have_count(2)
    await page.goto("about:blank")
    await page.goto(shared)
    await expect(rows).to_have_count(1)
    await expect(rows).to_contain_text("First")
    await expect(page.get_by_role("searchbox", name="Context id")).to_have_value(context_id)


@pytest.mark.parametrize("place", ["#/constructor", "#/runs?status=nonsense&hours=toString", "#nonsense"])
async def test_an_address_that_means_nothing_leads_to_the_runs(service: Service, tab: Tab, place: str):
    await tab.page.goto(f"{service.url}/{place}")
    await expect(tab.page.get_by_role("heading", name="Runs", exact=True)).to_be_visible()
    await expect(tab.page.get_by_role("button", name="24 h")).to_have_attribute("aria-pressed", "true")


async def test_older_runs_are_loaded_and_counted(service: Service, tab: Tab, db: AsyncEngine, context_id: str):
    page, now = tab.page, datetime.now(UTC)
    runs = [
        {
            "run_id": f"{context_id}-{number}",
            "context_id": context_id,
            "name": f"Run {number}",
            "status": "COMPLETED",
            "created_at": now - timedelta(hours=hours),
            "completed_at": now - timedelta(hours=hours) + timedelta(seconds=90),
        }
        # None at the edge of the window, over which it may go when the hour turns.
        for number, hours in enumerate([*range(20), *range(30, 70)])
    ]
    async with db.begin() as conn:
        await conn.execute(insert(agent_runs), runs)
    await page.goto(f"{service.url}/#/runs?context_id={context_id}&hours=168")
    rows = page.get_by_role("table", name="Runs").locator("tbody tr")
    await expect(rows).to_have_count(50)
    await is_live(page)
    older = page.get_by_role("button", name="Load older")
    await older.focus()
    await started(service, context_id, name="Newest")
    await expect(rows.first).to_contain_text("Newest")
    await expect(older).to_be_focused()
    async with page.expect_request(re.compile(r"/runs\?.*cursor=")):
        await older.click()
    await expect(rows).to_have_count(61)
    await expect(rows.last).to_contain_text("Run 59")
    await expect(page.get_by_role("button", name="Completed")).to_contain_text("60")
    await expect(page.get_by_role("img", name="Runs started: 61 runs")).to_be_visible()
    await page.get_by_role("button", name="24 h").click()
    await expect(page.get_by_role("img", name="Runs started: 21 runs")).to_be_visible()
    chart = page.get_by_role("region", name="Duration", exact=True)
    await chart.get_by_text("As a table").click()
    await expect(chart.get_by_role("row")).to_have_count(25)
    await expect(chart.get_by_role("row").filter(has_text="1 min 30 s")).to_have_count(20)
    await expect(page.get_by_text("Started in the last 24 hours")).to_be_visible()
    await expect(page.get_by_role("heading", name="All runs of all time")).to_be_visible()


async def test_a_timeline_of_many_pages_has_everything_once(
    service: Service, tab: Tab, db: AsyncEngine, context_id: str
):
    page = tab.page
    run_id = await started(service, context_id)
    event = {"run_id": run_id, "context_id": context_id, "event_type": "log", "status": "RUNNING"}
    async with db.begin() as conn:
        await conn.execute(insert(run_events), [event | {"data": {"message": f"line {n}"}} for n in range(1200)])
    await page.goto(f"{service.url}/#/run/{run_id}")
    await is_live(page)
    await service.callback(run_id, "log", {"message": "the newest"})
    await expect(page.get_by_text("1,202 events")).to_be_visible()
    entries = page.locator(".timeline li")
    await expect(entries).to_have_count(200)
    await expect(entries.last).to_contain_text("the newest")
    await page.get_by_role("button", name="Show 200 earlier of 1,002").click()
    await expect(entries).to_have_count(400)
    await expect(entries.first).to_contain_text("line 801")


async def test_a_timeline_that_could_not_be_read_is_read_when_something_happens(
    service: Service, tab: Tab, context_id: str
):
    page, refused = tab.page, []
    tab.expected = {"503"}
    run_id = await started(service, context_id, name="Before")
    twice = asyncio.Event()  # as the page opened, and as the stream did

    async def refuse(route: Route) -> None:
        await route.fulfill(status=503, json={"error": "Not now"})
        refused.append(route)
        if len(refused) == 2:
            twice.set()

    events = re.compile("/runs/[^/]+/events")
    await page.route(events, refuse)
    await page.goto(f"{service.url}/#/run/{run_id}")
    await is_live(page)
    await twice.wait()
    timeline = page.get_by_role("region", name="Timeline")
    await expect(timeline).to_contain_text("Not now")
    await page.unroute(events)
    await service.callback(run_id, "log", {"message": "After"})
    await expect(timeline.locator(".event-gist")).to_have_text(["Before", "After"])
    await expect(timeline).not_to_contain_text("Not now")


STREAMS = """
window.streams = [];
window.EventSource = class extends EventSource {
  constructor(url) { super(url); window.streams.push(this); }
};
"""
"""Keeps the page's streams where a test finds them."""

HIDDEN = "Object.defineProperty(document, 'hidden', { get: () => !window.seen });"
"""A page that was opened out of sight."""


async def test_a_page_out_of_sight_gives_its_connection_back(service: Service, tab: Tab):
    page = tab.page
    await page.clock.install()
    await page.add_init_script(STREAMS + HIDDEN)
    await page.goto(service.url)
    await is_live(page)
    await page.clock.fast_forward(11_000)
    await until(lambda: page.evaluate("streams.length === 1 && streams[0].readyState === EventSource.CLOSED"))
    await page.evaluate("dispatchEvent(new Event('online'))")
    assert await page.evaluate("streams.length") == 1
    await page.evaluate("window.seen = true; document.dispatchEvent(new Event('visibilitychange'))")
    await until(lambda: page.evaluate("streams.length === 2 && streams[1].readyState === EventSource.OPEN"))
    await is_live(page)


async def test_a_stream_that_is_open_in_name_only_is_not_called_live(service: Service, tab: Tab, context_id: str):
    page = tab.page
    tab.expected = {"ERR_FAILED"}
    run_id = await started(service, context_id)
    await page.clock.install()
    await page.add_init_script(STREAMS)
    await open_run(page, service, run_id)
    for dead in (f"**/runs/{run_id}", "**/api/events*"):
        await page.route(dead, lambda route: route.abort())
    await page.clock.fast_forward(31_000)
    await until(lambda: page.evaluate("streams.length > 1"))
    await expect(page.locator(".connection")).not_to_have_attribute("data-state", "live")


async def test_a_burst_of_events_leaves_the_page_as_it_should_be(service: Service, tab: Tab, context_id: str):
    page = tab.page
    await page.goto(f"{service.url}/#/runs?context_id={context_id}")
    await is_live(page)
    runs = await asyncio.gather(*(started(service, context_id, name=f"Run {n}") for n in range(10)))
    await asyncio.gather(*(service.callback(run, "log", {"message": f"{n}"}) for n in range(10) for run in runs))
    await asyncio.gather(*(service.callback(run, "completed", {"summary": "Done"}) for run in runs))
    rows = page.get_by_role("table", name="Runs").locator("tbody tr")
    await expect(rows).to_have_count(10)
    await expect(rows.filter(has_text="Done")).to_have_count(10)
    await expect(rows.filter(has_text="Completed")).to_have_count(10)


# Approvals


async def test_what_waits_is_shown_and_approved(service: Service, tab: Tab, context_id: str):
    page = tab.page
    await page.clock.install()
    await page.goto(f"{service.url}/#/approvals")
    await is_live(page)
    run_id = await asked(service, context_id, description="Please look at this")
    waiting = card(page, context_id)
    await expect(waiting).to_be_visible()
    await page.clock.fast_forward(5000)  # what waits is counted now and then
    await expect(waiting).to_contain_text("Please look at this")
    await expect(waiting.get_by_role("columnheader")).to_have_text(["Name", "Content"])
    await expect(waiting.get_by_role("cell")).to_have_text(["Ada", "Dear Ada"])
    await expect(page.get_by_role("link", name="Approvals").locator(".count-badge")).to_be_visible()
    await waiting.get_by_label("Comment").fill("Well said")
    await waiting.get_by_role("button", name="Approve").click()
    await expect(waiting).to_contain_text(re.compile("Approved .*Well said"))
    await expect(waiting.get_by_role("button", name="Approve")).to_be_hidden()
    await asked(service, f"{context_id} again")
    await expect(card(page, f"{context_id} again")).to_be_visible()
    query = {"status": "approved", "context_id": context_id}
    [approved] = (await service.http.get("/api/happyrobot/approvals", params=query)).json()
    assert (approved["run_id"], approved["comment"]) == (run_id, "Well said")


async def test_what_is_decided_stays_in_its_place_and_the_next_is_at_hand(service: Service, tab: Tab, context_id: str):
    page = tab.page
    names = [f"{context_id} {letter}" for letter in "ABC"]
    for name in names[:2]:
        await asked(service, name)
    await page.goto(f"{service.url}/#/approvals")
    await is_live(page)
    headings = page.get_by_role("heading", name=f"Look at {context_id}")
    await expect(headings).to_have_count(2)
    await card(page, names[1]).get_by_role("button", name="Reject").click()
    await expect(card(page, names[1])).to_contain_text("Rejected")
    await asked(service, names[2])
    await expect(headings).to_have_text([f"Look at {name}" for name in names])
    await card(page, names[0]).get_by_role("button", name="Approve").press("Enter")
    await expect(headings.last).to_be_focused()
    await card(page, names[2]).get_by_role("button", name="Approve").press("Enter")
    await expect(page.get_by_role("heading", name="Approvals", level=1)).to_be_focused()


async def test_all_rows_can_be_seen_and_a_table_is_not_without_end(service: Service, tab: Tab, context_id: str):
    page = tab.page
    rows = [{f"{row}-{column}": 1 for column in range(100)} for row in range(60)]
    letters = [{"to": f"Person {row}", "text": "Hello", "from": "Us", "by": "phone"} for row in range(300)]
    runs = [await started(service, context_id) for _ in range(2)]
    for run_id, name, sent in zip(runs, ("wide", "long"), (rows, letters), strict=True):
        data = {"rows": sent, "metadata": {"title": f"Look at {context_id} {name}"}}
        await service.callback(run_id, "pending_approval", data)
    await page.goto(f"{service.url}/#/approvals")
    wide, long = card(page, f"{context_id} wide"), card(page, f"{context_id} long")
    await expect(wide.get_by_role("columnheader")).to_have_count(30)
    await expect(wide).to_contain_text("… and 5,970 more columns")
    await wide.get_by_role("button", name="Raw JSON").click()
    await expect(wide.locator("pre")).to_contain_text('"59-99": 1')
    await expect(long.locator("tbody tr")).to_have_count(250)
    await long.get_by_role("button", name="Show all 300 rows").click()
    await expect(long.locator("tbody tr")).to_have_count(300)
    await expect(long.locator("tbody tr").last).to_contain_text("Person 299")
    for run_id in runs:
        await service.callback(run_id, "completed")  # what others look at is small again


async def test_a_rejection_that_needs_a_comment_gets_one(service: Service, tab: Tab, context_id: str):
    page = tab.page
    await asked(service, context_id, requireComment=True)
    await page.goto(f"{service.url}/#/approvals")
    waiting = card(page, context_id)
    await waiting.get_by_role("button", name="Reject").click()
    await expect(waiting).to_contain_text("A comment is required.")
    await expect(waiting.get_by_label("Comment")).to_be_focused()
    await waiting.get_by_label("Comment").fill("Too dear")
    await waiting.get_by_role("button", name="Reject").click()
    await expect(waiting).to_contain_text(re.compile("Rejected .*Too dear"))
    await page.get_by_role("button", name="Rejected").click()
    await expect(card(page, context_id)).to_contain_text("Too dear")


async def test_what_was_decided_elsewhere_is_said_so(service: Service, tab: Tab, context_id: str):
    page = tab.page
    run_id = await asked(service, context_id)
    await page.goto(f"{service.url}/#/run/{run_id}")
    await expect(page.get_by_text("This run waits for a decision.")).to_be_visible()
    await page.get_by_role("link", name="Look at it").click()
    waiting = card(page, context_id)
    await waiting.get_by_label("Comment").fill("Half a sen")
    await is_live(page)
    query = {"context_id": context_id}
    [approval] = (await service.http.get("/api/happyrobot/approvals", params=query)).json()
    await service.http.post(f"/api/happyrobot/approvals/{approval['id']}/approve", json={"comment": "I was quicker"})
    await expect(waiting).to_contain_text("Approved elsewhere")
    await expect(waiting).to_contain_text("I was quicker")
    await expect(waiting.get_by_label("Comment")).to_be_hidden()


# Deliveries


async def test_a_webhook_that_failed_is_sent_again(service: Service, tab: Tab, db: AsyncEngine):
    page = tab.page
    key_id, _ = await new_key(db, KeyScope.PUBLIC)
    delivery = await failed_delivery(db, key_id)
    await page.goto(f"{service.url}/#/deliveries?status=failed")
    row = page.get_by_role("table", name="Deliveries").get_by_role("row").filter(has_text=str(delivery)[-6:])
    await expect(row).to_contain_text("answered 500")
    await row.get_by_text("1 attempt").click()
    await expect(row).to_contain_text(HOSTILE)
    await row.get_by_role("button", name="Send again").click()
    await expect(page.get_by_text("The webhook is on its way again").first).to_be_visible()
    await expect(row).to_be_hidden()
    await page.get_by_role("button", name="On its way").click()
    await expect(row).to_be_visible()
    assert await page.title() == "Deliveries · Switchboard"


async def test_older_deliveries_are_loaded_as_far_as_they_can_be(service: Service, tab: Tab, db: AsyncEngine):
    page, held = tab.page, Held()
    key_id, _ = await new_key(db, KeyScope.PUBLIC)
    more = {"key_id": key_id, "event": "execution.completed", "body": b"{}", "status": "failed", "failures": 4}
    async with db.begin() as conn:
        await conn.execute(insert(deliveries), [more | {"id": uuid4(), "execution_id": uuid4()} for _ in range(210)])
    await page.clock.install()
    await page.goto(f"{service.url}/#/deliveries")
    rows = page.get_by_role("table", name="Deliveries").locator("tbody tr")
    older = page.get_by_role("button", name="Load older")
    await expect(rows).to_have_count(50)
    await older.focus()
    newest = await failed_delivery(db, key_id)
    await page.clock.fast_forward(6000)
    await expect(rows.first).to_contain_text(str(newest)[-6:])
    await expect(older).to_be_focused()

    await page.route("**/deliveries?*before=*", held, times=1)
    await older.click()
    await held.answered.wait()
    await page.get_by_role("button", name="Delivered").click()
    await expect(page.get_by_text("No webhooks here")).to_be_visible()
    held.let_go.set()
    await expect(page.locator(".more button")).to_be_enabled()
    assert await rows.count() == 0

    await page.get_by_role("button", name="All").click()
    for shown in (50, 100, 150):
        await expect(rows).to_have_count(shown)
        await older.click()
    await expect(page.get_by_text("200 shown, newest first. Choose a status to see older ones.")).to_be_visible()
    await expect(older).to_be_hidden()
    async with db.begin() as conn:
        await conn.execute(delete(deliveries).where(deliveries.c.key_id == key_id))


async def failed_delivery(db: AsyncEngine, key_id: UUID) -> UUID:
    """The execution that a webhook is about which did not arrive."""
    execution_id, delivery_id = uuid4(), uuid4()
    row = {"id": delivery_id, "key_id": key_id, "execution_id": execution_id, "event": "execution.completed"}
    attempt = {"number": 1, "started_at": datetime.now(UTC), "duration_ms": 12, "status_code": 500}
    async with db.begin() as conn:
        await conn.execute(insert(deliveries).values(**row, body=b"{}", status="failed", failures=4))
        await conn.execute(
            insert(delivery_attempts).values(**attempt, delivery_id=delivery_id, response=HOSTILE, error="answered 500")
        )
    return execution_id


# Who is let in


async def sign_in(page: Page, headers: dict[str, str]) -> None:
    await page.get_by_label("API key").fill(headers["Authorization"].removeprefix("Bearer "))
    await page.get_by_role("button", name="Sign in").click()


async def test_a_key_opens_the_page_where_one_wanted_to_be_until_it_is_revoked(
    guarded: Service, tab: Tab, db: AsyncEngine, context_id: str
):
    page = tab.page
    run_id = await insert_run(db, context_id)
    tab.expected = {"401", "403", "404"}  # HappyRobot knows nothing of that run
    await page.goto(f"{guarded.url}/#/run/{run_id}")
    await expect(page.get_by_label("API key")).to_be_focused()
    await sign_in(page, {"Authorization": "Bearer nonsense"})
    await expect(page.get_by_text("This key is not known here.")).to_be_visible()
    key_id, headers = await new_key(db, KeyScope.ADMIN)
    await sign_in(page, headers)
    await expect(page.locator(".titled .badge")).to_have_text("Running")
    await expect(page.get_by_role("link", name="Deliveries")).to_be_visible()
    await is_live(page)
    kept = await page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert kept == '[{},{},""]'

    async with db.begin() as conn:
        await keys.revoke(conn, key_id)
    await expect(page.get_by_role("main").get_by_text("Your session has ended.")).to_be_visible()
    await expect(page.get_by_role("link", name="Deliveries")).to_be_hidden()
    _, headers = await new_key(db, KeyScope.APP)
    await sign_in(page, headers)
    await expect(page.locator(".titled .badge")).to_have_text("Running")
    await is_live(page)
    await guarded.callback(run_id, "log", {"message": "Heard again"})
    await expect(page.locator(".timeline li").last).to_contain_text("Heard again")
    # What this key does not allow is not offered.
    await expect(page.get_by_role("link", name="Deliveries")).to_be_hidden()
    await page.goto(f"{guarded.url}/#/deliveries")
    await expect(page.get_by_text("Your key does not allow this.")).to_be_visible()

    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_role("main").get_by_text("You have signed out.")).to_be_visible()
    await page.reload()
    await expect(page.get_by_label("API key")).to_be_visible()


async def test_a_session_that_expires_leads_to_the_door(guarded: Service, tab: Tab, db: AsyncEngine):
    page = tab.page
    tab.expected = {"401", "403"}
    key_id, headers = await new_key(db, KeyScope.APP, lifetime=timedelta(hours=1))
    await page.goto(guarded.url)
    await sign_in(page, headers)
    await is_live(page)
    async with db.begin() as conn:
        # The hour goes by.
        await conn.execute(update(api_keys).where(api_keys.c.id == key_id).values(expires_at=func.now()))
    await expect(page.get_by_role("main").get_by_text("Your session has ended.")).to_be_visible()


async def test_a_key_of_a_customer_opens_nothing(guarded: Service, tab: Tab, db: AsyncEngine):
    tab.expected = {"401", "403"}
    _, headers = await new_key(db, KeyScope.PUBLIC)
    await tab.page.goto(guarded.url)
    await sign_in(tab.page, headers)
    await expect(tab.page.get_by_text("This key opens nothing here")).to_be_visible()


async def test_what_is_half_written_outlives_a_session_but_not_a_farewell(
    guarded: Service, tab: Tab, db: AsyncEngine, context_id: str
):
    page = tab.page
    tab.expected = {"401", "403"}
    key_id, headers = await new_key(db, KeyScope.APP)
    await page.goto(f"{guarded.url}/#/trigger")
    await sign_in(page, headers)
    await page.get_by_label("Context id").fill(context_id)
    await page.get_by_role("button", name="Add a field").click()
    await page.get_by_label("Field name").fill("notes")
    await page.get_by_label("Value").fill("half a sen")
    await is_live(page)
    async with db.begin() as conn:
        await keys.revoke(conn, key_id)
    await expect(page.get_by_label("API key")).to_have_accessible_description(re.compile("^Your session has ended."))
    await expect(page.locator("#announcements")).to_have_text("Your session has ended.")
    _, headers = await new_key(db, KeyScope.APP)
    await sign_in(page, headers)
    await expect(page.get_by_label("Value")).to_have_value("half a sen")
    await expect(page.get_by_label("What is sent, as JSON")).to_have_value(re.compile(context_id))
    await page.get_by_role("button", name="Sign out").click()
    await sign_in(page, headers)
    await expect(page.get_by_label("Context id")).to_have_value("")


async def test_pages_of_one_browser_are_signed_in_and_out_together(guarded: Service, tab: Tab, db: AsyncEngine):
    page, other = tab.page, await tab.page.context.new_page()
    tab.expected = {"401"}
    _, admin = await new_key(db, KeyScope.ADMIN)
    _, app = await new_key(db, KeyScope.APP)
    for each in (other, page):
        await each.goto(guarded.url)
        await expect(each.get_by_label("API key")).to_be_visible()
    await sign_in(page, admin)
    await is_live(other)
    await expect(other.get_by_role("link", name="Deliveries")).to_be_visible()
    await page.get_by_role("button", name="Sign out").click()
    await expect(other.get_by_role("main").get_by_text("You have signed out.")).to_be_visible()
    await sign_in(page, app)
    await is_live(other)
    await expect(other.get_by_role("link", name="Deliveries")).to_be_hidden()


async def test_whoever_may_only_look_is_offered_nothing_else(
    guarded: Service, tab: Tab, db: AsyncEngine, context_id: str
):
    page = tab.page
    await insert_run(db, context_id)
    _, headers = await new_key(db, KeyScope.ADMIN)
    wanted = {"context_ids": "*", "scopes": ["read"], "expires_in": 600}
    token = (await guarded.http.post("/api/happyrobot/tokens", json=wanted, headers=headers)).json()["token"]
    await page.request.post(f"{guarded.url}/api/happyrobot/session", headers=bearer(token))
    await page.goto(f"{guarded.url}/#/runs?context_id={context_id}")
    await expect(page.get_by_role("table", name="Runs").locator("tbody tr")).to_contain_text("default")
    await expect(page.get_by_role("link", name="Start a workflow")).to_be_hidden()
    await expect(page.locator(".notice")).to_have_count(0)


# Restarts


async def test_a_page_outlives_a_restart_and_misses_nothing(
    service: Service, tab: Tab, database_url: str, servers: Servers, context_id: str
):
    tab.expected = {"net::ERR_", "409"}  # what a browser says while nobody listens; and there is no key to ask with
    run_id = await started(service, context_id, name="First")
    with local.listening(local.LOOPBACK, 0) as free:
        port = free.getsockname()[1]
    listed = await tab.page.context.new_page()
    async with other_process(database_url, servers, port) as url:
        await tab.page.goto(f"{url}/#/run/{run_id}")
        await listed.goto(f"{url}/#/runs?context_id={context_id}")
        await is_live(tab.page)
        await is_live(listed)
        await service.callback(run_id, "log", {"message": "before"})
        await expect(tab.page.locator(".timeline li").last).to_contain_text("before")
    await expect(tab.page.locator(".connection")).not_to_have_attribute("data-state", "live")
    await service.callback(run_id, "log", {"message": "meanwhile"})
    await started(service, context_id, name="Second")
    async with other_process(database_url, servers, port):
        await is_live(tab.page)
        await is_live(listed)
        await service.callback(run_id, "completed", {"summary": "after"})
        told = tab.page.locator(".timeline .event-gist")
        await expect(told).to_have_text(["First", "before", "meanwhile", "after"])
        rows = listed.get_by_role("table", name="Runs").locator("tbody tr")
        await expect(rows.first).to_contain_text("Second")
        await expect(rows.last).to_contain_text("Completed")
        await listed.close()
        await tab.page.close()


@contextlib.asynccontextmanager
async def other_process(database_url: str, servers: Servers, port: int) -> AsyncIterator[str]:
    """A service on this port, in a process of its own, on the same database."""
    with deployed(database_url, servers):
        process = local.child("serve", "--port", str(port), "--no-migrate", "--no-worker")
        url = await asyncio.to_thread(process.__enter__)
    try:
        yield url
    finally:
        await asyncio.to_thread(process.__exit__, None, None, None)


# For everybody


async def places(service: Service, db: AsyncEngine, context_id: str) -> dict[str, str]:
    """Each view with something to show, and what is there once it is shown."""
    key_id, _ = await new_key(db, KeyScope.PUBLIC)
    await failed_delivery(db, key_id)
    waiting = await asked(service, context_id, description=HOSTILE, title=HOSTILE, requireComment=True)
    failed = await started(service, f"{context_id}-{'long' * 40}", name=HOSTILE, description="word" * 60)
    await service.callback(failed, HOSTILE, {"message": HOSTILE, HOSTILE: [{HOSTILE: HOSTILE}]})
    await service.callback(failed, "failed", {"error": HOSTILE, "long": "x" * 400, HOSTILE: {"rows": [{"a": HOSTILE}]}})
    return {
        "#/runs": ".list tbody tr",
        f"#/run/{failed}": ".panel[data-kind=error]",
        f"#/run/{waiting}": ".hint",
        "#/approvals": ".approval",
        "#/deliveries": ".list tbody tr",
        "#/trigger?context_id=order&rate=1450": ".field-row",
    }


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
async def test_every_view_is_accessible_and_fits(
    service: Service, tab: Tab, db: AsyncEngine, context_id: str, scheme: Any, width: int
):
    page = tab.page
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    await page.set_viewport_size({"width": width, "height": 780})
    for place, shown in (await places(service, db, context_id)).items():
        await page.goto(f"{service.url}/{place}")
        await expect(page.locator(shown).first).to_be_visible()
        await expect(page.locator(".skeleton")).to_have_count(0)
        assert await page.evaluate("document.documentElement.scrollWidth") <= width, place
        await is_accessible(page)


async def is_accessible(page: Page) -> None:
    found = await Axe().run(page)
    assert [each for each in found.response["violations"] if each["impact"] in ("serious", "critical")] == [], page.url


async def test_the_door_is_accessible(guarded: Service, tab: Tab):
    tab.expected = {"401"}
    await tab.page.set_viewport_size({"width": 360, "height": 780})
    await tab.page.goto(guarded.url)
    await expect(tab.page.get_by_label("API key")).to_be_visible()
    assert await tab.page.evaluate("document.documentElement.scrollWidth") <= 360
    await is_accessible(tab.page)


async def test_what_strangers_write_stays_text(service: Service, tab: Tab, db: AsyncEngine, context_id: str):
    page = tab.page
    for place, shown in (await places(service, db, context_id)).items():
        await page.goto(f"{service.url}/{place}")
        await expect(page.locator(shown).first).to_be_visible()
        assert await page.locator("main img").count() == 0
    await page.goto(f"{service.url}/#/approvals")
    await expect(page.get_by_role("heading", name=HOSTILE).first).to_be_visible()


CONTROLS = """
  [...document.querySelectorAll("a, button, input, select, textarea, summary")]
    .filter((each) => each.checkVisibility() && !each.disabled)
"""


async def test_everything_is_reached_by_keyboard(service: Service, tab: Tab):
    page = tab.page
    await page.goto(service.url)
    await is_live(page)
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("main")).to_be_focused()
    await page.get_by_role("link", name="Approvals").press("Enter")
    await expect(page.get_by_role("heading", name="Approvals", level=1)).to_be_focused()
    await page.goto(f"{service.url}/#/trigger?rate=1450")
    await expect(page.get_by_label("Value")).to_be_visible()
    wanted = await page.evaluate(f"window.wanted = new Set({CONTROLS}); wanted.size")
    assert wanted > 15
    for _ in range(wanted + 2):
        await page.keyboard.press("Tab")
        await page.evaluate("wanted.delete(document.activeElement)")
    assert await page.evaluate("[...wanted].map((each) => each.outerHTML)") == []


async def test_light_and_dark_are_remembered(service: Service, tab: Tab):
    page = tab.page
    await page.emulate_media(color_scheme="light")
    await page.goto(service.url)
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light = await page.evaluate(ground)
    await page.get_by_role("button", name="Light or dark").click()
    dark = await page.evaluate(ground)
    assert dark != light
    await page.reload()
    assert await page.evaluate(ground) == dark
