"""`/docs`: a page of our own, with nothing from other hosts."""

import pytest
from playwright.async_api import expect

from tests.conftest import Service, Tab


async def test_the_page_lists_the_endpoints_and_tries_one(service: Service, tab: Tab):
    await tab.page.goto(f"{service.url}/docs")
    for path in ("/api/happyrobot/trigger", "/api/webhooks/happyrobot", "/healthz"):
        await expect(tab.page.get_by_role("button").filter(has_text=path).first).to_be_visible()
    await tab.page.get_by_role("button", name="GET /healthz", exact=False).first.click()
    await tab.page.get_by_role("button", name="Try it out").click()
    await tab.page.get_by_role("button", name="Execute", exact=True).click()
    await expect(tab.page.locator(".live-responses-table")).to_contain_text('"status": "ok"')


async def test_the_page_may_load_nothing_but_its_own(service: Service):
    answer = await service.http.get("/docs")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "//" not in answer.text.replace("<!doctype", "")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("init.js", "text/javascript"),
        ("swagger-ui-bundle.js", "text/javascript"),
        ("swagger-ui.css", "text/css"),
        ("favicon-32x32.png", "image/png"),
    ],
)
async def test_what_it_loads_is_kept_for_a_day(service: Service, name: str, kind: str):
    answer = await service.http.get(f"/docs/{name}")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(kind)
    assert answer.headers["cache-control"] == "public, max-age=86400"
    assert answer.headers["etag"]


@pytest.mark.parametrize("path", ["/docs/__init__.py", "/docs/page.html", "/docs/..%2F__init__.py", "/redoc"])
async def test_nothing_else_is_to_be_had(service: Service, path: str):
    answer = await service.http.get(path)
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})
