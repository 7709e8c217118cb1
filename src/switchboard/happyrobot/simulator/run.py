"""One simulated run: how far its story has come, and what has been said."""

import asyncio
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid4, uuid5

from switchboard.happyrobot.simulator.faults import Faults
from switchboard.happyrobot.simulator.story import (
    PENDING_APPROVAL,
    Approval,
    Line,
    Outcome,
    Role,
    Step,
    spoken_seconds,
)

Status = Literal["scheduled", "running", "completed", "failed", "canceled"]
OVER: tuple[Status, ...] = ("completed", "failed", "canceled")
Verdict = Literal["approved", "rejected"]


def now() -> datetime:
    """To the millisecond, which is as finely as HappyRobot writes times."""
    at = datetime.now(UTC)
    return at.replace(microsecond=at.microsecond // 1000 * 1000)


def stamp(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def stable_id(*parts: str) -> str:
    """The same UUID for the same parts, however often it is asked for."""
    return str(uuid5(NAMESPACE_URL, "/".join(("https://happyrobot.invalid", *parts))))


@dataclass(frozen=True, slots=True)
class Message:
    id: str
    role: Role
    content: str
    at: datetime


@dataclass(eq=False, slots=True)
class Run:
    slug: str  # of the hook it came in by
    environment: str
    payload: dict[str, Any]
    outcome: Outcome
    faults: Faults
    base_url: str  # under which the trigger reached the simulator
    cloud_events: bool = False  # beside the callbacks
    approval: Approval | None = None
    id: str = field(default_factory=lambda: str(uuid4()))
    created_at: datetime = field(default_factory=now)
    status: Status = "scheduled"
    started_at: datetime | None = None
    completed_at: datetime | None = None
    messages: list[Message] = field(default_factory=list)
    ending: dict[str, Any] | None = None  # the data of the final event
    events: list[dict[str, Any]] = field(default_factory=list)  # every callback it gives rise to, sent or not
    clock: datetime = field(default_factory=now)  # of its last event
    started: bool = False  # its story is being told
    token: str | None = None  # of the address that takes the decision; None: not asked for yet
    verdict: Verdict | None = None
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    canceled: asyncio.Event = field(default_factory=asyncio.Event)  # from outside, not by its story
    called_back: asyncio.Event = field(default_factory=asyncio.Event)  # a first callback was tried

    @property
    def session_id(self) -> str:
        return stable_id(self.id, "session")

    @property
    def over(self) -> bool:
        return self.status in OVER

    @property
    def callback_url(self) -> str | None:
        url = self.payload.get("callback_url")
        return url if isinstance(url, str) and url else None

    @property
    def duration(self) -> int:
        """Seconds of talk so far; what was said in them does not depend on the simulator's pace."""
        return spoken_seconds([Line(message.role, message.content) for message in self.messages])

    def advance(self, step: Step) -> dict[str, Any]:
        """Lets one thing happen, and gives the body of the callback that tells of it."""
        # Strictly increasing, so that no two callbacks of a run have the same body.
        self.clock = at = max(now(), self.clock + timedelta(milliseconds=1))
        if step.line is not None:
            message_id = stable_id(self.id, "message", str(len(self.messages)))
            self.messages.append(Message(message_id, step.line.role, step.line.text, at))
        elif step.event_type == "running":
            self.status, self.started_at = "running", at
        elif step.event_type != PENDING_APPROVAL:
            self.status = next(status for status in OVER if status == step.event_type)
            self.completed_at, self.ending = at, step.data
        event = {"run_id": self.id, "event_type": step.event_type, "timestamp": stamp(at), "data": step.data}
        if step.event_type == PENDING_APPROVAL:
            self.token = secrets.token_urlsafe(24)
            event["resume_url"] = f"{self.base_url}/resume/{self.id}/{self.token}"
        event |= {name: self.payload[name] for name in ("execution_id", "context_id") if name in self.payload}
        self.events.append(event)
        return event

    def cancel(self, **why: Any) -> None:
        """Ends the run at once; its story notices, and sends the callback."""
        self.advance(Step("canceled", why | {"duration_seconds": self.duration}))
        self.canceled.set()

    def decide(self, verdict: Verdict, comment: object) -> None:
        """Lets the story go on, or ends it."""
        self.verdict = verdict
        if verdict == "rejected":
            self.cancel(reason="rejected", comment=comment)
        self.decided.set()
