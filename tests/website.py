"""A customer's website, which knows the Public API and nothing else."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.errors import PUBLIC
from switchboard.tables import KeyScope
from tests.conftest import Service, new_key, until


@dataclass(frozen=True)
class Website:
    """With an API key, and no other limits than those that a test gives it."""

    http: httpx.AsyncClient
    key_id: UUID
    headers: dict[str, str]

    async def get(self, path: str, **more: Any) -> httpx.Response:
        return await self.http.get(PUBLIC + path, headers=self.headers, **more)

    async def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        return await self.http.post(PUBLIC + path, json=body, headers=self.headers | headers)

    async def execute(self, given: Any = None, workflow: str = "default", **more: Any) -> str:
        """Starts an execution; its id."""
        answer = await self.post(f"/agents/{workflow}/execute", {"input": {} if given is None else given} | more)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["executionId"])

    async def status(self, execution_id: str) -> dict[str, Any]:
        answer = await self.get(f"/executions/{execution_id}/status")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def until(self, execution_id: str, *statuses: str) -> dict[str, Any]:
        """Where an execution stands once it stands so."""

        async def there() -> bool:
            return (await self.status(execution_id))["status"] in statuses

        await until(there)
        return await self.status(execution_id)


async def new_website(service: Service, db: AsyncEngine, **more: Any) -> Website:
    """One whose key allows a million requests at once, unless it is given another limit."""
    key_id, headers = await new_key(db, KeyScope.PUBLIC, **({"burst": 1_000_000} | more))
    return Website(service.http, key_id, headers)
