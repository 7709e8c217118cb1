"""The OpenAPI document: complete, true, and no 500 behind any of it."""

import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

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
from tests.conftest import HOOK_KEY, Servers, run_sql, settings_for, with_database

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
KNOWN = "a-run-that-is-over"


@pytest.fixture(scope="module")
def address(servers: Servers, template: str) -> Iterator[str]:
    """The service in a process of its own, for a client that blocks, with a simulator that says nothing."""
    name = f"openapi_{uuid4().hex}"
    asyncio.run(run_sql(servers.database_url, f"CREATE DATABASE {name} TEMPLATE {template}"))
    url = with_database(servers.database_url, name)
    known = f"INSERT INTO agent_runs (run_id, context_id, status) VALUES ('{KNOWN}', 'c', 'COMPLETED')"
    asyncio.run(run_sql(url, known))
    with (
        local.environment(DATABASE_URL=url, REDIS_URL=servers.redis_url, HAPPYROBOT_X_API_KEY=HOOK_KEY),
        local.child("simulate", "--port", "0", "--pace", "3600") as upstream,
        local.environment(HAPPYROBOT_WEBHOOK_URL=f"{upstream}/hooks/x", HAPPYROBOT_API_URL=f"{upstream}/api/v1"),
        local.child("serve", "--port", "0") as url,
    ):
        yield url
    asyncio.run(run_sql(servers.database_url, f"DROP DATABASE {name} WITH (FORCE)"))


def document() -> dict[str, Any]:
    """The document, in which some requests are made to ask for what is there."""
    found = create_app(settings_for("postgresql://unused", "redis://unused", None)).openapi()
    for path in found["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] == "run_id":
                    parameter["examples"] = {"known": {"value": KNOWN}}
    return found


DOCUMENT = document()
schema = schemathesis.openapi.from_dict(DOCUMENT)


@schema.exclude(path=STREAM).parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_one_that_the_document_describes(case: schemathesis.Case[Any], address: str):
    case.call_and_validate(base_url=address, headers=HEADERS, checks=CHECKS)


@schema.include(path=STREAM).parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_so_is_every_answer_about_a_stream(case: schemathesis.Case[Any], address: str):
    if case.method == "GET":
        # Of a run that is over, because that stream ends.
        case.query = {**(case.query or {}), "run_id": KNOWN}
    case.call_and_validate(base_url=address, headers=HEADERS, checks=CHECKS, excluded_checks=[negative_data_rejection])


def test_every_endpoint_is_described_with_its_errors():
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (path, method)
            assert operation["description"], (path, method)
            # Bad input is 400; FastAPI would say 422.
            assert ("422" in operation["responses"]) == path.endswith("/trigger"), (path, method)
            if path.startswith("/api/"):
                assert {"401", "400", "503"} <= set(operation["responses"]), (path, method)
