"""The OpenAPI document: complete, true, and no 500 behind any of it."""

import asyncio
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import httpx
import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from switchboard import local
from switchboard.app import create_app
from switchboard.errors import PUBLIC
from tests.conftest import API_KEY, HOOK_KEY, Servers, run_sql, settings_for, with_database

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
]
HEADERS = {"X-API-KEY": HOOK_KEY}
STREAM = "/api/events"
SESSION = "/api/happyrobot/session"
TOKENS = "/api/happyrobot/tokens"
CALLBACKS = "/api/webhooks/happyrobot"
KNOWN = "a-run-that-is-over"
UNDER_WAY = "the-run-that-is-under-way"  # stands for the id that the simulator gives it
WEBSITE = "5" * 64  # an API key
EXECUTION = str(UUID(int=5))
DELIVERY = str(UUID(int=6))  # which nobody asks for but one test: it can be sent again only when it is not under way


@dataclass(frozen=True)
class Subject:
    url: str

    def start(self) -> str:
        """A run that stays under way."""
        answer = httpx.post(f"{self.url}/api/happyrobot/trigger", json={"context_id": "c"})
        [run_id] = answer.json()["run_ids"]
        return str(run_id)

    @functools.cached_property
    def under_way(self) -> str:
        return self.start()


@pytest.fixture(scope="module")
def subject(servers: Servers, template: str) -> Iterator[Subject]:
    """The service in a process of its own, for a client that blocks, with a simulator that calls nobody back."""
    name = f"openapi_{uuid4().hex}"
    asyncio.run(run_sql(servers.database_url, f"CREATE DATABASE {name} TEMPLATE {template}"))
    url = with_database(servers.database_url, name)
    known = f"INSERT INTO agent_runs (run_id, context_id, status) VALUES ('{KNOWN}', 'c', 'COMPLETED')"
    asyncio.run(run_sql(url, known, *of_a_website()))
    with (
        local.environment(
            DATABASE_URL=url,
            REDIS_URL=servers.redis_url,
            HAPPYROBOT_X_API_KEY=HOOK_KEY,
            HAPPYROBOT_API_KEY=API_KEY,
            HAPPYROBOT_API_PACE="1000",
        ),
        local.child("simulate", "--port", "0", "--pace", "3600") as upstream,
        local.environment(HAPPYROBOT_WEBHOOK_URL=f"{upstream}/hooks/x", HAPPYROBOT_API_URL=f"{upstream}/api/v1"),
        local.child("serve", "--port", "0", "--no-migrate") as url,
    ):
        yield Subject(url)
    asyncio.run(run_sql(servers.database_url, f"DROP DATABASE {name} WITH (FORCE)"))


def of_a_website() -> Iterator[str]:
    """A key of the Public API, an execution of it, and a webhook about that."""
    key_id, digest = UUID(int=1), hashlib.sha256(WEBSITE.encode()).hexdigest()
    yield f"INSERT INTO api_keys (id, name, scopes, burst) VALUES ('{key_id}', 'w', '{{public}}', 100000)"
    yield f"INSERT INTO api_key_digests (digest, key_id) VALUES (decode('{digest}', 'hex'), '{key_id}')"
    yield (
        "INSERT INTO executions (id, workflow_id, context_id, status, input, key_id) "
        f"VALUES ('{EXECUTION}', 'default', 'c', 'completed', '{{}}', '{key_id}')"
    )
    for delivery_id in (EXECUTION, DELIVERY):
        yield (
            "INSERT INTO deliveries (id, key_id, execution_id, event, body, status) "
            f"VALUES ('{delivery_id}', '{key_id}', '{EXECUTION}', 'execution.completed', '{{}}', 'delivered')"
        )
    yield (
        "INSERT INTO delivery_attempts (delivery_id, number, started_at, duration_ms, status_code) "
        f"VALUES ('{EXECUTION}', 1, now(), 7, 200)"
    )


def headers_for(path: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {WEBSITE}"} if path.startswith(PUBLIC) else HEADERS


def document() -> dict[str, Any]:
    """The document, in which some requests are made to ask for what is there."""
    found = create_app(settings_for("postgresql://unused", "redis://unused", None)).openapi()
    for path in found["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] == "id":
                    parameter["examples"] = {"known": {"value": EXECUTION}}
                if parameter["name"] == "run_id":
                    parameter["examples"] = {"known": {"value": KNOWN}, "under way": {"value": UNDER_WAY}}
    return found


def with_credentials(found: dict[str, Any]) -> dict[str, Any]:
    """A copy without a word about those that each request of a test brings, so that none is made without."""
    copy: dict[str, Any] = json.loads(json.dumps(found))
    for path, operations in copy["paths"].items():
        for operation in operations.values() if path.startswith(PUBLIC) else ():
            del operation["security"]
    return copy


DOCUMENT = document()
schema = schemathesis.openapi.from_dict(with_credentials(DOCUMENT))


@schema.exclude(path=STREAM).parametrize()
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_one_that_the_document_describes(case: schemathesis.Case[Any], subject: Subject):
    for place in (case.path_parameters, case.query):
        if place and place.get("run_id") == UNDER_WAY:
            place["run_id"] = subject.under_way
    case.call_and_validate(base_url=subject.url, headers=headers_for(case.path), checks=CHECKS)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/executions/{id}/status", 200),
        ("GET", "/executions/{id}/results", 200),
        ("GET", "/executions/{id}/pending-approval", 409),
        ("POST", "/executions/{id}/approve", 409),
        ("GET", "/deliveries", 200),
        ("POST", "/deliveries/{id}/redeliver", 202),
    ],
)
def test_so_is_what_a_website_is_told(subject: Subject, method: str, path: str, status: int):
    its_id = DELIVERY if path.startswith("/deliveries/") else EXECUTION
    case = schema[PUBLIC + path][method].Case(path_parameters={"id": its_id} if "{id}" in path else {})
    answer = case.call_and_validate(base_url=subject.url, headers=headers_for(PUBLIC), checks=CHECKS)
    assert answer.status_code == status


RUN = "/api/happyrobot/runs/{run_id}"


@pytest.mark.parametrize(
    ("method", "path", "statuses"),
    [("GET", f"{RUN}/details", [200]), ("GET", f"{RUN}/recordings", [200]), ("POST", f"{RUN}/cancel", [200, 409])],
)
def test_so_is_what_happyrobot_has_to_be_asked_for(subject: Subject, method: str, path: str, statuses: list[int]):
    case = schema[path][method].Case(path_parameters={"run_id": subject.start()})
    for status in statuses:
        assert case.call_and_validate(base_url=subject.url, headers=HEADERS, checks=CHECKS).status_code == status


@pytest.mark.parametrize("fault", ["answer=400", "disconnect"])
def test_so_is_what_becomes_of_a_trigger_that_was_not_confirmed(subject: Subject, fault: str):
    body: dict[str, Any] = {"context_id": "c", "simulate": {"faults": fault}}
    case = schema["/api/happyrobot/trigger"]["POST"].Case(body=body, media_type="application/json")
    checks = [check for check in CHECKS if check is not not_a_server_error]
    assert case.call_and_validate(base_url=subject.url, headers=HEADERS, checks=checks).status_code == 502


@schema.include(path=STREAM).parametrize()
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_so_is_every_answer_about_a_stream(case: schemathesis.Case[Any], subject: Subject):
    if case.method == "GET":
        # Of a run that is over, because that stream ends.
        case.query = {**(case.query or {}), "run_id": KNOWN}
    case.call_and_validate(
        base_url=subject.url, headers=HEADERS, checks=CHECKS, excluded_checks=[negative_data_rejection]
    )


def test_every_endpoint_is_described_with_its_errors():
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (path, method)
            assert operation["description"], (path, method)
            # Bad input is 400; FastAPI would say 422.
            assert ("422" in operation["responses"]) == path.endswith(("/trigger", "/execute")), (path, method)
            if path.startswith("/api/"):
                assert "503" in operation["responses"], (path, method)
                # An id that cannot be one is no id of anything.
                assert "400" in operation["responses"] or path.startswith(f"{PUBLIC}/"), (path, method)
                # Whoever has no session may end it.
                assert ("401" in operation["responses"]) == ((path, method) != (SESSION, "delete")), (path, method)


OPERATIONS = [
    (method, path, operation)
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
]
BODIES = [
    (path, media_type, body)
    for _, path, operation in OPERATIONS
    for media_type, body in operation.get("requestBody", {}).get("content", {}).items()
]


def test_every_parameter_is_described():
    for method, path, operation in OPERATIONS:
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), (method, path, parameter["name"])


@pytest.mark.parametrize(
    ("path", "media_type", "body"), BODIES, ids=[f"{path} {media_type}" for path, media_type, _ in BODIES]
)
def test_the_example_of_a_body_is_taken_as_it_stands(
    subject: Subject, path: str, media_type: str, body: dict[str, Any]
):
    headers = headers_for(path) | {"Content-Type": media_type}
    url = subject.url + path.format(id=EXECUTION, workflowId="default")
    answer = httpx.post(url, content=json.dumps(body["example"]), headers=headers)
    # Nobody knows the runs and requests of examples, which is found out once the body has been understood.
    of_nobody = "{id}" in path or path == CALLBACKS
    assert answer.status_code in ((404, 409) if of_nobody else (200, 202)), answer.text


def with_properties() -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas of the document, those of bodies included, which stand where they are used."""
    yield from DOCUMENT["components"]["schemas"].items()
    for path, media_type, body in BODIES:
        yield f"{path} {media_type}", body["schema"]


def contents() -> Iterator[dict[str, Any]]:
    """What bodies and answers are."""
    yield from (body for _, _, body in BODIES)
    for _, _, operation in OPERATIONS:
        for answer in operation["responses"].values():
            yield from answer.get("content", {}).values()


def is_shown(found: dict[str, Any]) -> bool:
    """Whether a reader sees what such a value looks like."""
    if not {"examples", "format", "enum", "const", "default", "$ref"}.isdisjoint(found):
        return True
    if "anyOf" in found:
        return any(is_shown(each) for each in found["anyOf"])
    return is_shown(found["items"]) if "items" in found else found.get("type") == "boolean"


def test_every_property_says_what_it_looks_like():
    hidden = [
        (name, of)
        for of, found in with_properties()
        for name, each in found.get("properties", {}).items()
        if not is_shown(each)
    ]
    assert hidden == []


def test_every_example_is_one_of_its_schema():
    schemas = json.loads(json.dumps(dict(with_properties())))
    for found in schemas.values():
        found.setdefault("additionalProperties", False)  # a field that it has not is misspelt
    parts = [part for found in schemas.values() for part in (found, *found.get("properties", {}).values())]
    shown = [(part, example) for part in parts for example in part.get("examples", [])]
    shown += [(content["schema"], content["example"]) for content in contents() if "example" in content]
    for part, example in shown:
        validator = jsonschema_rs.Draft202012Validator(
            {"components": {"schemas": schemas}} | part, validate_formats=True
        )
        assert [error.message for error in validator.iter_errors(example)] == [], example


def test_every_endpoint_says_with_which_credentials_it_is_asked():
    guarded = create_app(settings_for("postgresql://unused", "redis://unused", None, allow_anonymous=False)).openapi()
    assert set(guarded["components"]["securitySchemes"]) == {"bearer", "access_token", "cookie"}
    for path, operations in guarded["paths"].items():
        for method, operation in operations.items():
            ways = operation.get("security", [])
            if path in ("/healthz", "/readyz", CALLBACKS) or (path, method) == (SESSION, "delete"):
                assert ways == []
                continue
            assert {"bearer": []} in ways
            if path.startswith(PUBLIC):
                assert ways == [{"bearer": []}] == DOCUMENT["paths"][path][method]["security"], "always with a key"
                continue
            assert ({"access_token": []} in ways) == (method == "get")
            assert ({"cookie": []} in ways) == (
                path != "/metrics" and (path not in (TOKENS, SESSION) or method == "get")
            )
            assert [{}, *ways] == DOCUMENT["paths"][path][method]["security"], "where none are needed"
