"""Pages and streams in a real browser: with the cookie on this origin, refused from another."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from switchboard.access import keys
from tests.conftest import (
    Servers,
    Service,
    Tab,
    Upstream,
    insert_run,
    new_key,
    running_service,
    serving,
    settings_for,
    until,
)
from tests.test_tokens import get_token

SIGN_IN = """
async token => {
  const headers = { Authorization: `Bearer ${token}` };
  const answer = await fetch("/api/happyrobot/session", { method: "POST", headers });
  return answer.status;
}
"""

LIST = """
async () => {
  const answer = await fetch("/api/happyrobot/runs");
  return [answer.status, (await answer.json()).map?.(run => run.contextId)];
}
"""

FOLLOW = """
contextId => new Promise((opened, failed) => {
  window.heard = [];
  window.told = [];
  const events = new EventSource(`/api/events?context_id=${contextId}`);
  events.onopen = () => opened();
  events.onerror = () => failed(new Error("no stream"));
  events.onmessage = ({ data }) => window.heard.push(JSON.parse(data).data);
  events.addEventListener("renew", ({ data }) => window.told.push(JSON.parse(data).error));
  window.events = events;
})
"""

TRIGGER = """
async ([contextId, address, options]) => {
  const body = JSON.stringify({ context_id: contextId });
  try {
    const answer = await fetch(`${address}/api/happyrobot/trigger`, { method: "POST", body, ...options });
    return answer.status;
  } catch (error) {
    return "refused";
  }
}
"""

POLL = """
async contextId => {
  const ask = async (path, options) => (await fetch(`/api/happyrobot/${path}`, options)).json();
  const list = async () => (await ask(`runs?context_id=${contextId}`)).map(run => [run.runId, run.status]);
  const before = await list();
  const headers = { "Content-Type": "application/json" };
  const body = JSON.stringify({ context_id: contextId, customer: "C1" });
  const { run_ids: [runId] } = await ask("trigger", { method: "POST", headers, body });
  let answer;
  do {
    await new Promise(done => setTimeout(done, 20));
    answer = await ask(`status?run_id=${runId}`);
  } while (!["completed", "failed", "canceled"].includes(answer.status));
  return [before, [[runId, answer.status.toUpperCase()]], await list()];
}
"""

READ = """
async ([address, options]) => {
  try {
    const answer = await fetch(`${address}/api/happyrobot/runs?limit=1`, options);
    await answer.text();
    return [answer.status, answer.headers.get("X-Request-ID") !== null];
  } catch (error) {
    return "refused";
  }
}
"""

LISTEN = """
address => new Promise(settle => {
  const events = new EventSource(`${address}/api/events`, { withCredentials: true });
  events.onopen = () => settle("open");
  events.onerror = () => settle("refused");
})
"""


REFUSED = {"blocked by CORS policy", "net::ERR_FAILED", "net::ERR_BLOCKED_BY_RESPONSE"}
"""What a browser writes down when it keeps an answer from a page."""


async def page_of_somebody(_: Request) -> Response:
    return HTMLResponse("<link rel=icon href=data:,>")


@asynccontextmanager
async def another_origin() -> AsyncIterator[str]:
    """An origin on the same host, so that the browser sends it the same cookies."""
    async with serving(lambda _: Starlette(routes=[Route("/", page_of_somebody)])) as (url, _):
        yield url


async def sign_in(tab: Tab, service: Service, db: AsyncEngine, context_id: str, **more: object) -> UUID:
    """Gives the browser a cookie; returns the API key that it comes from."""
    key_id, headers = await new_key(db)
    token = await get_token(service, headers, [context_id], **more)
    assert await tab.page.evaluate(SIGN_IN, token) == 200
    return key_id


async def test_pages_of_this_origin_are_let_in_with_the_cookie(
    tab: Tab, guarded: Service, db: AsyncEngine, context_id: str
):
    page = tab.page
    run_id = await insert_run(db, context_id)
    await page.goto(f"{guarded.url}/docs")
    tab.expected = {"status of 401"}  # the browser itself writes down that it was refused
    assert (await page.evaluate(LIST))[0] == 401

    await sign_in(tab, guarded, db, context_id, scopes=["read", "trigger"])
    assert await page.evaluate("document.cookie") == ""
    assert await page.evaluate(LIST) == [200, [context_id]]
    await page.evaluate(FOLLOW, context_id)
    await guarded.callback(run_id, "log", "heard in the browser")
    await until(lambda: page.evaluate("window.heard.includes('heard in the browser')"))
    assert await page.evaluate(TRIGGER, [context_id, "", {}]) == 200


async def test_a_stream_whose_token_ends_goes_on_by_itself_once_there_is_another(
    tab: Tab, guarded: Service, db: AsyncEngine, context_id: str
):
    page = tab.page
    run_id = await insert_run(db, context_id)
    await page.goto(f"{guarded.url}/docs")
    key_id = await sign_in(tab, guarded, db, context_id)
    await page.evaluate(FOLLOW, context_id)
    await guarded.callback(run_id, "log", "first")
    await until(lambda: page.evaluate("window.heard.length === 1"))
    # Another is there before the browser comes back by itself.
    await sign_in(tab, guarded, db, context_id)
    async with db.begin() as conn:
        await keys.revoke(conn, key_id)
    await until(lambda: page.evaluate("window.told.length === 1"))
    await guarded.callback(run_id, "log", "meanwhile")
    await until(lambda: page.evaluate("window.heard.length === 2"))
    assert await page.evaluate("window.heard") == ["first", "meanwhile"]
    assert await page.evaluate("window.told") == ["Access has ended"]


async def test_pages_of_another_origin_are_refused_with_the_same_cookie(
    tab: Tab, guarded: Service, upstream: Upstream, db: AsyncEngine, context_id: str
):
    page = tab.page
    await page.goto(f"{guarded.url}/docs")
    await sign_in(tab, guarded, db, context_id, scopes=["read", "trigger"])
    before = len(upstream.simulator.calls)
    tab.expected = REFUSED
    async with another_origin() as elsewhere:
        await page.goto(elsewhere)
        ours = guarded.url
        assert await page.evaluate(READ, [ours, {"credentials": "include"}]) == "refused"
        assert await page.evaluate(LISTEN, ours) == "refused"
        assert await page.evaluate(TRIGGER, [context_id, ours, {"credentials": "include"}]) == "refused"
        # Such a request is sent without asking first. Its answer cannot be read, but would a call be placed?
        silent = {"credentials": "include", "mode": "no-cors", "headers": {"Content-Type": "text/plain"}}
        assert await page.evaluate(TRIGGER, [context_id, ours, silent]) == "refused"
    assert len(upstream.simulator.calls) == before


async def test_no_page_elsewhere_places_calls_where_no_credentials_are_needed(
    tab: Tab, service: Service, upstream: Upstream, context_id: str
):
    before = len(upstream.simulator.calls)
    tab.expected = REFUSED
    async with another_origin() as elsewhere:
        await tab.page.goto(elsewhere)
        silent = {"mode": "no-cors", "headers": {"Content-Type": "text/plain"}}
        assert await tab.page.evaluate(TRIGGER, [context_id, service.url, silent]) == "refused"
        assert await tab.page.evaluate(TRIGGER, [context_id, service.url, {}]) == "refused"
        assert await tab.page.evaluate(READ, [service.url, {}]) == "refused"
    assert len(upstream.simulator.calls) == before


async def test_a_page_that_only_polls_sees_a_run_through(tab: Tab, service: Service, context_id: str):
    """As frontends do that know the guide alone: list, trigger, poll, list again."""
    await tab.page.goto(f"{service.url}/docs")
    before, told, after = await tab.page.evaluate(POLL, context_id)
    assert before == []
    assert told == after
    assert after[0][1] == "COMPLETED"


async def test_an_origin_that_is_named_asks_with_a_token_of_its_own(
    tab: Tab, database_url: str, servers: Servers, upstream: Upstream, db: AsyncEngine, context_id: str
):
    async with another_origin() as elsewhere:
        settings = settings_for(
            database_url, servers.redis_url, upstream.url, allow_anonymous=False, cors_origins=elsewhere
        )
        async with running_service(settings) as service:
            _, headers = await new_key(db)
            token = await get_token(service, headers, [context_id], scopes=["read", "trigger"])
            await tab.page.goto(elsewhere)
            more = {"Authorization": f"Bearer {token}", "Last-Event-ID": "1", "Content-Type": "application/json"}
            assert await tab.page.evaluate(READ, [service.url, {"headers": more}]) == [200, True]
            key = more | {"Idempotency-Key": "one"}
            assert await tab.page.evaluate(TRIGGER, [context_id, service.url, {"headers": key}]) == 200
