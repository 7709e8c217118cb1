"""docs/public-api.md: what it shows is what happens."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from fastapi import FastAPI
from standardwebhooks.webhooks import WebhookVerificationError

from switchboard.access.webhooks import new_secret
from switchboard.app import create_app
from switchboard.deliveries.signing import headers
from switchboard.errors import PUBLIC
from switchboard.tables import WebhookEvent
from tests.conftest import Service, Tab, settings_for

DOCUMENT = (Path(__file__).parents[1] / "docs/public-api.md").read_text()
EXAMPLES = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)

BODY = '{"event":"execution.completed","data":{"name":"Zoë"}}'.encode()


def code(language: str, first_line: str) -> str:
    [found] = [text for kind, text in EXAMPLES if kind == language and text.startswith(first_line)]
    return str(found)


def python(first_line: str) -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(code("python", first_line), names)
    verify: Callable[..., Any] = names["verify"]
    return verify


def signed(*secrets: str, timestamp: int | None = None) -> dict[str, str]:
    return headers(
        secrets,
        event=WebhookEvent.COMPLETED,
        execution_id=uuid4(),
        delivery_id=UUID(int=7),
        timestamp=int(time.time()) if timestamp is None else timestamp,
        body=BODY,
    )


@pytest.fixture
def secret() -> str:
    return new_secret().get_secret_value()


def test_the_librarys_way_takes_what_is_ours_and_nothing_else(secret: str):
    verify = python("# verify with standardwebhooks")
    assert verify(secret, signed(secret), BODY) == json.loads(BODY)
    # While a secret is being replaced, either is taken.
    before = new_secret().get_secret_value()
    assert verify(before, signed(secret, before), BODY) == json.loads(BODY)
    recorded = signed(secret, timestamp=int(time.time()) - 3600)
    for wrong in (signed(before), recorded, signed(secret) | {"webhook-id": "another"}):
        with pytest.raises(WebhookVerificationError):
            verify(secret, wrong, BODY)
    with pytest.raises(WebhookVerificationError):
        verify(secret, signed(secret), BODY + b" ")


def test_so_does_the_way_without_a_library(secret: str):
    verify = python("# verify with hmac")
    before = new_secret().get_secret_value()
    ours = signed(secret, before)
    assert verify(secret, ours["X-Webhook-Signature"], BODY)
    assert verify(before, ours["X-Webhook-Signature-Previous"], BODY)
    for wrong in (ours["X-Webhook-Signature-Previous"], "", "sha256=", "é", ours["X-Webhook-Signature"].upper()):
        assert not verify(secret, wrong, BODY)
    assert not verify(secret, ours["X-Webhook-Signature"], BODY + b" ")


async def test_so_does_javascript(service: Service, tab: Tab, secret: str):
    await tab.page.goto(f"{service.url}/docs")
    verify = code("js", "// verify with Web Crypto")

    async def says(signature: str, body: bytes) -> bool:
        script = f"""async ([secret, signature, body]) => {{
            {verify}
            return await verify(secret, signature, Uint8Array.from(body));
        }}"""
        return bool(await tab.page.evaluate(script, [secret, signature, list(body)]))

    ours = signed(secret)["X-Webhook-Signature"]
    assert await says(ours, BODY)
    assert not await says(ours, BODY + b" ")
    for wrong in ("", "sha256=", signed(new_secret().get_secret_value())["X-Webhook-Signature"], ours + "00"):
        assert not await says(wrong, BODY)


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(settings_for("postgresql://unused", "redis://unused", None))


def test_every_endpoint_is_in_the_document_and_no_other(app: FastAPI):
    described = set(re.findall(r"`(GET|POST) (/[^`?]*)(?:\?[^`]*)?`", DOCUMENT))
    there = {
        (method.upper(), path.removeprefix(PUBLIC))
        for path, operations in app.openapi()["paths"].items()
        if path.startswith(PUBLIC)
        for method in operations
    }
    assert described == there


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/agents/{workflowId}/execute", "post", "202"),
        ("/executions/{id}/status", "get", "200"),
        ("/executions/{id}/results", "get", "200"),
        ("/executions/{id}/pending-approval", "get", "200"),
        ("/executions/{id}/status", "get", "404"),
    ],
)
def test_answers_that_are_shown_have_the_fields_that_they_have(app: FastAPI, path: str, method: str, status: str):
    document = app.openapi()
    answer = document["paths"][PUBLIC + path][method]["responses"][status]
    name = answer["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    schema = document["components"]["schemas"][name]
    always = set(schema["required"])
    shown = [set(example) for kind, text in EXAMPLES if kind == "json" if (example := json.loads(text))]
    assert any(always <= fields <= set(schema["properties"]) for fields in shown), always
