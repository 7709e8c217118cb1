"""Somebody who comes by the Public API and has a server that takes webhooks, and what it was told."""

import asyncio
import base64
import contextlib
import hmac
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.access import keys, webhooks
from switchboard.errors import PUBLIC
from switchboard.settings import Settings
from switchboard.tables import KeyScope, WebhookEvent
from tests.conftest import APP_SECRET
from tests.receiver import Receiver, Request, receiving, reply

EXECUTE = f"{PUBLIC}/agents/default/execute"
"""Where it asks for a call."""


class Notice(NamedTuple):
    """What a customer was told under one id."""

    taken: bool = False
    """Whether it was answered 200, at one attempt at least."""
    texts: frozenset[bytes] = frozenset()
    """In which words."""


Told = Mapping[tuple[str, str], Mapping[str, Notice]]
"""By execution and event, under which ids."""


@dataclass(eq=False)
class Customer:
    """Somebody with a key for the Public API, and a server that takes webhooks."""

    name: str
    key_id: Any
    headers: dict[str, str]
    receiver: Receiver
    mood: str = "well"
    """How its server answers: well, badly, late, never."""
    secret: str = ""
    """With which webhooks are signed."""
    forgeries: list[str] = field(default_factory=list)
    """Webhooks that were not signed with it, or do not say what they are about."""
    told: defaultdict[tuple[str, str], dict[str, Notice]] = field(default_factory=lambda: defaultdict(dict))
    """What it was told, by execution and event, under which ids."""

    def note(self, request: Request, status: int | None) -> None:
        """Notes an attempt, and how it was answered."""
        try:
            self._note(request, request.json, status)
        except (KeyError, ValueError) as error:
            self.forgeries.append(f"webhook to {self.name} is not right: {error!r}, {request}")

    def _note(self, request: Request, body: Any, status: int | None) -> None:
        notices = self.told[body["executionId"], body["event"]]
        before = notices.get(request.id, Notice())
        notices[request.id] = Notice(before.taken or status == 200, before.texts | {request.body})
        signed = self._signatures(request).items() <= request.headers.items()
        # What more may have happened in the same moment has a webhook of its own.
        status_told = body["event"].removeprefix("execution.").replace("started", "running")
        if not signed or request.event != body["event"] or body["data"]["status"] != status_told:
            self.forgeries.append(f"webhook {request.id} to {self.name} is not right: {request.headers}, {body}")

    def _signatures(self, request: Request) -> dict[str, str]:
        """What has to be in its headers: the Public API's signature, and the one of Standard Webhooks."""
        ours = hmac.new(self.secret.encode(), request.body, "sha256").hexdigest()
        content = f"{request.id}.{request.headers.get('webhook-timestamp')}.".encode() + request.body
        key = base64.b64decode(self.secret.removeprefix(webhooks.PREFIX))
        standard = base64.b64encode(hmac.digest(key, content, "sha256")).decode()
        return {"X-Webhook-Signature": f"sha256={ours}", "webhook-signature": f"v1,{standard}"}

    def told_by_now(self) -> Told:
        return {about: dict(notices) for about, notices in self.told.items()}


@contextlib.asynccontextmanager
async def customer_of(db: AsyncEngine, chance: random.Random, name: str, mood: str) -> AsyncIterator[Customer]:
    """A customer whose server is there until the block ends."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        status: int | None = None
        try:
            if customer.mood == "never":
                await asyncio.Event().wait()
            if customer.mood == "late":
                await asyncio.sleep(chance.uniform(0.2, 1.5))
            status = 500 if customer.mood == "badly" and chance.random() < 0.3 else 200
            await reply(writer, status)
        finally:
            customer.note(request, status)

    async with receiving(answer) as receiver:
        settings = Settings(_env_file=None, app_secret=SecretStr(APP_SECRET), allow_private_webhooks=True)
        async with db.begin() as conn:
            made, secret = await keys.create(conn, name, [KeyScope.PUBLIC], burst=1_000_000)
            signing = await webhooks.point(conn, settings, made.id, receiver.url, tuple(WebhookEvent))
        assert signing is not None
        headers = {"Authorization": f"Bearer {secret.get_secret_value()}"}
        customer = Customer(name, made.id, headers, receiver, mood, signing.get_secret_value())
        yield customer
