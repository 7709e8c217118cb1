"""What HappyRobot sends: callbacks in the guide's form and as CloudEvents."""

import hashlib
import json
import math
from dataclasses import replace
from datetime import UTC, datetime
from types import NoneType
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError, from_json, to_json

from switchboard.bodies import Id, ShortText, Text, check
from switchboard.events import APPROVAL_REQUESTED, NewEvent
from switchboard.tables import RunStatus

# Only these words of a callback say where a run stands. Workflow authors design the rest: a `scheduled` or
# `skipped` of theirs may well mean a pickup or a question.
_CALLBACK_WORDS = {
    "running": RunStatus.RUNNING,
    "completed": RunStatus.COMPLETED,
    "failed": RunStatus.FAILED,
    "canceled": RunStatus.CANCELED,
    "cancelled": RunStatus.CANCELED,
    APPROVAL_REQUESTED: RunStatus.RUNNING,  # it waits, and is not over
}

# The Platform API's words: v1, v2, and the guide's `pending`.
_PLATFORM_WORDS = {
    "pending": RunStatus.PENDING,
    "scheduled": RunStatus.PENDING,
    "not_started": RunStatus.PENDING,
    "queued": RunStatus.PENDING,
    "running": RunStatus.RUNNING,
    "completed": RunStatus.COMPLETED,
    "succeeded": RunStatus.COMPLETED,
    "failed": RunStatus.FAILED,
    "canceled": RunStatus.CANCELED,
    "cancelled": RunStatus.CANCELED,
    "skipped": RunStatus.CANCELED,
}


def platform_status(word: object) -> RunStatus | None:
    """A status of the Platform API, or None for a word that nobody has documented."""
    return _PLATFORM_WORDS.get(word) if isinstance(word, str) else None


def _string_or_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float, NoneType)):
        raise PydanticCustomError("timestamp_type", "must be a string or a number")
    return value


_Timestamp = Annotated[
    Any,
    AfterValidator(_string_or_number),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "null"}]}),
]


class CallbackIn(BaseModel):
    """The guide's callback."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "run_id": "19184e4c-74ca-474a-8978-e77f5a661e4f",
                    "event_type": "log",
                    "timestamp": "2026-01-15T09:30:12.500Z",
                    "data": {"message": "Blue Mesa Freight has answered"},
                }
            ]
        },
    )

    run_id: Id = Field(description="HappyRobot's run.", examples=["19184e4c-74ca-474a-8978-e77f5a661e4f"])
    event_type: Id = Field(
        description="`log`, `running`, `completed`, `failed`, `canceled`, `pending_approval`, or a word of the "
        "workflow's author.",
        examples=["log"],
    )
    timestamp: _Timestamp = Field(None, description="When it happened.", examples=["2026-01-15T09:30:12.500Z"])
    data: Any = Field(None, description="Anything.", examples=[{"message": "Blue Mesa Freight has answered"}])
    execution_id: ShortText | None = Field(
        None,
        description="Our execution, if the workflow echoes it.",
        examples=["5f0c8c1e-6a55-4a3e-9a53-0c8f5f3a6f10"],
    )
    resume_url: Any = Field(
        None,
        description="Where the decision is to be sent, with `pending_approval`.",
        examples=["https://workflows.platform.happyrobot.ai/hooks/resume/abc"],
    )


class _CloudEventData(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    run_id: Id
    status: Any = None

    @property
    def session_status(self) -> object:
        """The word for where a session stands now."""
        return self.status.get("current") if isinstance(self.status, dict) else self.status


class _CloudEvent(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    id: Id
    source: ShortText = ""
    type: Id
    time: Text | None = None
    data: _CloudEventData


CLOUD_EVENT = {
    "specversion": "1.0",
    "id": "3f2b9c04-7d1e-4a58-9b52-6d1f0c8e7a11",
    "source": "https://platform.happyrobot.ai",
    "type": "session.status_changed",
    "time": "2026-01-15T09:30:12.500Z",
    "data": {
        "run_id": "19184e4c-74ca-474a-8978-e77f5a661e4f",
        "status": {"previous": "queued", "current": "in-progress"},
    },
}
"""An example of one."""


# Seconds stay below this until the year 5138; milliseconds passed it in 1973.
_MOST_SECONDS = 1e11


# Outside of it is what means "not set" elsewhere (the years 1 and 9999), and what PostgreSQL takes for infinite.
_CALENDAR = range(1970, 2200)


def moment(value: str | float | None) -> datetime | None:
    """A time as authors write it: ISO 8601, or seconds or milliseconds since 1970. Nonsense is None."""
    try:
        if isinstance(value, str):
            at = datetime.fromisoformat(value)
            at = (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)
        elif isinstance(value, (int, float)):
            at = datetime.fromtimestamp(value / 1000 if math.fabs(value) > _MOST_SECONDS else value, UTC)
        else:
            return None
    except (ValueError, OverflowError, OSError):
        return None
    return at if at.year in _CALENDAR else None


def _tells_copies_apart(timestamp: str | float | None) -> bool:
    """Whether what is no time that we know is one all the same, and not a variable that resolved to nothing.

    One in words of the author's own is good enough; a zero time is not.
    """
    if not isinstance(timestamp, str) or not timestamp.strip():
        return False
    try:
        datetime.fromisoformat(timestamp)
    except ValueError:
        return True
    return False


def _key(run_id: str, kind: str, *parts: str | bytes) -> UUID:
    # Bound to the run: a header that an author made static must not swallow another run's events.
    digest = hashlib.blake2b(to_json([run_id, kind]), digest_size=16)
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\x00")
    return UUID(bytes=digest.digest())


def read_callback(body: Any, raw: bytes, webhook_id: str | None) -> NewEvent:
    """Reads a callback in either form.

    Copies are recognised by `X-Webhook-Id`, else the CloudEvent's id, else the body's bytes when it carries a
    timestamp: without one, two equal bodies may well be two events.
    """
    if isinstance(body, dict) and "specversion" in body:
        return _read_cloud_event(check(_CloudEvent, body), body["data"], webhook_id)
    return _read_guide_callback(check(CallbackIn, body), raw, webhook_id)


_SESSION_CHANGED = "session.status_changed"
_SESSION_UNDER_WAY = "in-progress"
_SESSION_ENDS = frozenset({"completed", "busy", "missed", "voicemail", "canceled", "failed"})


def _read_cloud_event(event: _CloudEvent, data: Any, webhook_id: str | None) -> NewEvent:
    run_id = event.data.run_id
    word = event.data.session_status if event.type == _SESSION_CHANGED else None
    found = NewEvent(
        run_id,
        event.type,
        data,
        RunStatus.RUNNING if word == _SESSION_UNDER_WAY else None,
        # A run can have several sessions: the end of one is no more than a reason to ask.
        session_ended=isinstance(word, str) and word in _SESSION_ENDS,
        occurred_at=moment(event.time),
        dedupe_key=_key(run_id, "webhook", webhook_id)
        if webhook_id
        else _key(run_id, "cloudevent", event.source, event.id),
    )
    return _without_resume_url(found)


def _read_guide_callback(callback: CallbackIn, raw: bytes, webhook_id: str | None) -> NewEvent:
    key = None
    occurred_at = moment(callback.timestamp)
    if webhook_id:
        key = _key(callback.run_id, "webhook", webhook_id)
    elif occurred_at is not None or _tells_copies_apart(callback.timestamp):
        key = _key(callback.run_id, "body", raw)
    event = NewEvent(
        callback.run_id,
        callback.event_type,
        callback.data,
        _CALLBACK_WORDS.get(callback.event_type),
        outcome=callback.data,
        occurred_at=occurred_at,
        execution_id=callback.execution_id,
        dedupe_key=key,
    )
    return _without_resume_url(event, callback.resume_url)


def _without_resume_url(event: NewEvent, beside: Any = None) -> NewEvent:
    """A request for approval whose data may be shown: whoever knows where the decision goes can decide."""
    if event.event_type != APPROVAL_REQUESTED:
        return event
    data, inside = event.data, None
    if isinstance(data, dict):
        inside = data.get(_RESUME_URL)
        data = {name: value for name, value in data.items() if name != _RESUME_URL}
    address = next((each for each in (beside, inside) if isinstance(each, str) and each), None)
    return replace(event, data=data, outcome=None, resume_url=address)


_RESUME_URL = "resume_url"

_ID: TypeAdapter[str] = TypeAdapter(Annotated[Id, Strict()])
_MOST_DIGITS = 4000


def read_json(raw: bytes) -> Any:
    """Reads an answer of HappyRobot's as far as it can be read. Raises ValueError where it is no JSON at all.

    Callbacks must be strict JSON, for they are stored as they are. What HappyRobot answers is read into our own shapes
    field by field, and half an emoji in a transcript must not make the whole answer worthless.
    """
    try:
        return from_json(raw)
    except ValueError:
        pass
    try:
        # Python's own reader takes lone surrogates, deeper nesting, and, told so, numbers of any length.
        return json.loads(raw, parse_int=_number)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


def started_runs(answer: Any) -> list[str]:
    """The runs that a hook's answer names, each once, in HappyRobot's order.

    Every field is optional there. What is no id is passed over: a run that was named beside it is under way.
    """
    if not isinstance(answer, dict):
        return []
    queued = answer.get("queued_run_ids")
    named = [run_id for run_id in queued if _is_id(run_id)] if isinstance(queued, list) else []
    return list(dict.fromkeys(named or filter(_is_id, [answer.get("run_id")])))


def _is_id(value: Any) -> bool:
    try:
        _ID.validate_python(value)
    except ValidationError:
        return False
    return True
