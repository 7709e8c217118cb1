"""What HappyRobot's Platform API knows about a run: one model for its two shapes of v1 and for v2.

Nobody promises that an answer is as documented: what a field should not be is left out, and never an error.
"""

import math
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from switchboard.events import Timestamp
from switchboard.happyrobot.payloads import moment, platform_status
from switchboard.tables import FINAL, RunStatus


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class ToolCall(_Record):
    """One use of a tool by the agent."""

    name: str | None = Field(None, examples=["find_load"])
    arguments: Any = Field(
        None, description="As HappyRobot gives them: often JSON in a string.", examples=['{"reference": "order_123"}']
    )


class Message(_Record):
    """One entry of a transcript."""

    id: str | None = Field(None, examples=["message-1"])
    role: str | None = Field(None, description="`assistant`, `user`, `tool` or `event`.", examples=["assistant"])
    content: str | None = Field(None, examples=["Hi, this is Riley about order 123. Is this Blue Mesa Freight?"])
    tool_calls: list[ToolCall] = []
    name: str | None = Field(None, description="The tool's, where one answers.", examples=["find_load"])
    interrupted: bool = Field(False, description="Whether the other side cut in.")
    filler: bool = Field(False, description="Whether it only bridged a wait.")
    latency: dict[str, float] | None = Field(
        None, description="What the answer's delay consists of, under HappyRobot's names.", examples=[{"llm": 412}]
    )
    data_deleted: bool = Field(False, description="Whether HappyRobot no longer keeps the content.")
    timestamp: Timestamp | None = None


class Session(_Record):
    """One conversation of a run, usually a phone call."""

    id: str | None = Field(None, examples=["session-1"])
    status: str | None = Field(None, description="HappyRobot's own word.", examples=["in-progress"])
    type: str | None = Field(None, description="`outbound`, `inbound` or `text`.", examples=["outbound"])
    duration: float | None = Field(None, description="Seconds.", examples=[59.5])
    user_number: str | None = Field(None, examples=["+12025550142"])
    timestamp: Timestamp | None = Field(None, description="When it began.")
    connected_at: Timestamp | None = Field(None, description="When the call was answered.")
    sip_code: str | None = Field(None, examples=["200"])
    sip_reason: str | None = Field(None, examples=["OK"])
    failure_reason: str | None = Field(None, examples=["Nobody answered"])
    messages: list[Message] = Field([], description="The transcript, in order.")


class Output(_Record):
    """What one node of the workflow gave."""

    id: str | None = Field(None, examples=["output-1"])
    session_id: str | None = Field(None, examples=["session-1"])
    node_id: str | None = Field(None, examples=["node-3"])
    name: str | None = Field(None, description="The node's name.", examples=["Extract the answer"])
    integration: str | None = Field(None, description="What the node belongs to.", examples=["AI"])
    event: str | None = Field(None, description="What the node does.", examples=["Extract"])
    data: Any = Field(None, description="Anything.", examples=[{"pickup_stands": True, "pickup_at": "10:00"}])
    error: Any = Field(
        None, description="Usually a text; null if nothing went wrong.", examples=["The transcript is empty"]
    )
    data_deleted: bool = Field(False, description="Whether HappyRobot no longer keeps the data.")
    timestamp: Timestamp | None = None


class Issue(_Record):
    """Something that HappyRobot or a person marked as wrong with a run."""

    id: str | None = Field(None, examples=["issue-1"])
    type: str | None = Field(None, description="What it is about.", examples=["transcriber"])
    status: str | None = Field(None, description="`open`, `approved`, `rejected` or `closed`.", examples=["open"])
    priority: str | None = Field(None, description="`low`, `medium` or `high`.", examples=["low"])
    message_id: str | None = Field(None, examples=["message-1"])
    correction: str | None = Field(None, examples=["Blue Mesa Freight"])
    correction_reason: str | None = Field(None, examples=["The name was heard as Blue Mesa Fright"])
    created_at: Timestamp | None = None


class Version(_Record):
    """The version of the workflow that ran."""

    id: str | None = Field(None, examples=["version-7"])
    number: int | None = Field(None, examples=[7])
    name: str | None = Field(None, examples=["Version 7"])
    slug: str | None = Field(None, examples=["version-7"])
    is_live: bool | None = None
    published_at: Timestamp | None = None


class RunRecord(_Record):
    """A run as HappyRobot describes it."""

    status: str | None = Field(None, description="HappyRobot's own word.", examples=["completed"])
    started_at: Timestamp | None = None
    completed_at: Timestamp | None = None
    annotation: str | None = Field(
        None, description="A person's verdict: `correct`, `incorrect` or `critical`.", examples=["correct"]
    )
    sessions: list[Session] = []
    outputs: list[Output] = []
    issues: list[Issue] = []
    version: Version | None = None

    @property
    def run_status(self) -> RunStatus | None:
        """The status in our words, or None for a word that nobody has documented."""
        return platform_status(self.status)

    @property
    def over(self) -> bool:
        return self.run_status in FINAL

    @property
    def hollow(self) -> bool:
        """Whether HappyRobot has already deleted something of the transcript: an older copy is better."""
        return any(message.data_deleted for session in self.sessions for message in session.messages)

    def over_older(self, older: "RunRecord") -> "RunRecord":
        """This record, with what HappyRobot no longer has of an older one.

        What people say of a call (its issues, their verdict) comes after it; what was said in it goes in time.
        """
        said = ("started_at", "completed_at", "annotation", "version")
        kept: dict[str, Any] = {name: getattr(older, name) for name in said if getattr(self, name) is None}
        kept["sessions"] = _over_older(self.sessions, older.sessions, _session_over_older)
        kept["outputs"] = _over_older(self.outputs, older.outputs, _output_over_older)
        kept["issues"] = self.issues or older.issues
        return self.model_copy(update=kept)


_Part = TypeVar("_Part", Session, Output)


def _over_older(newer: list[_Part], older: list[_Part], merge: Callable[[_Part, _Part], _Part]) -> list[_Part]:
    """All parts that either has, each as it is in the newer one, completed by the older one."""
    before = {part.id: part for part in older if part.id is not None}
    parts = [merge(part, before.pop(part.id)) if part.id in before else part for part in newer]
    parts += before.values()
    # Those without an id cannot be told apart: the longer list is the better one.
    return in_order(parts) if len(parts) >= len(older) else older


def _session_over_older(newer: Session, older: Session) -> Session:
    emptied = any(message.data_deleted for message in newer.messages)
    return (
        newer.model_copy(update={"messages": older.messages})
        if emptied or len(newer.messages) < len(older.messages)
        else newer
    )


def _output_over_older(newer: Output, older: Output) -> Output:
    return older if newer.data_deleted else newer


class Recording(_Record):
    """A link to the sound of one session."""

    session_id: str | None = Field(None, examples=["session-1"])
    url: str = Field(
        description="Signed by HappyRobot; it stops working after a while.",
        examples=["https://recordings.example.com/session-1.mp3?signature=c2ln"],
    )


# Answers

_Json = dict[str, Any]


def read_run(body: Any) -> RunRecord | None:
    """Reads v1's answer in either shape, and v2's, which is without sessions; None if it describes no run."""
    if not isinstance(body, dict):
        return None
    head = body.get("run")
    if not isinstance(head, dict):
        head = body
        if not isinstance(head.get("status"), str) and not isinstance(head.get("id"), str):
            return None
    # The flat shape has its sessions among its events, the nested one has none of those.
    events = _objects(body.get("events"))
    sessions = _objects(body.get("sessions")) + [event for event in events if event.get("type") == "session"]
    version = body.get("version")
    return RunRecord(
        status=_text(head.get("status")),
        started_at=_time(head.get("timestamp")),
        completed_at=_time(head.get("completed_at")),
        annotation=_text(head.get("annotation")),
        sessions=in_order([_session(session) for session in sessions]),
        outputs=_outputs(body, sessions, events),
        issues=[_issue(issue) for issue in _objects(body.get("issues"))],
        version=_version(version) if isinstance(version, dict) else None,
    )


def read_sessions(body: Any) -> tuple[list[Session], bool]:
    """Reads a page of v2's sessions; the second value tells whether there is another."""
    sessions, more = _page(body)
    return in_order([_session(session) for session in sessions]), more


def read_messages(body: Any) -> tuple[list[Message], bool]:
    """Reads a page of v2's messages; the second value tells whether there is another."""
    messages, more = _page(body)
    return in_order([_message(message) for message in messages]), more


_LINK = re.compile(r"https?://[^\s\x00]+", re.IGNORECASE)


def read_recordings(body: Any) -> list[Recording]:
    """Reads v1's links to recordings; what a browser would not take for a link to a server is left out."""
    return [
        Recording(session_id=_text(recording.get("session_id")), url=url)
        for recording in _objects(_object(body).get("recordings"))
        if isinstance(url := recording.get("url"), str) and _LINK.fullmatch(url)
    ]


_Dated = TypeVar("_Dated", Message, Session, Output)


def in_order(items: list[_Dated]) -> list[_Dated]:
    """Oldest first. One that does not say when it was stays behind the one that it follows."""
    dated = [item.timestamp for item in items if item.timestamp is not None]
    if not dated:
        return items
    # Given newest first, those of one instant stand the wrong way round, too, and sorting would leave them so.
    newest_first = dated != sorted(dated) and dated == sorted(dated, reverse=True)
    moment, moments = min(dated), []
    given = items[::-1] if newest_first else items
    for item in given:
        moment = item.timestamp or moment
        moments.append(moment)
    return [item for _, item in sorted(zip(moments, given, strict=True), key=lambda pair: pair[0])]


# Their parts


def _session(raw: _Json) -> Session:
    code = raw.get("sip_code")
    return Session(
        id=_text(raw.get("id")),
        status=_text(raw.get("status")),
        type=_text(raw.get("type")) if raw.get("type") != "session" else None,  # which is its kind of event
        duration=_number(raw.get("duration")),
        user_number=_text(raw.get("user_number")),
        timestamp=_time(raw.get("timestamp")),
        connected_at=_time(raw.get("call_connected_at")),
        sip_code=_text(code) if _integer(code) is None else str(code),
        sip_reason=_text(raw.get("sip_reason")),
        failure_reason=_text(raw.get("failure_reason")),
        messages=in_order([_message(message) for message in _objects(raw.get("messages"))]),
    )


def _message(raw: _Json) -> Message:
    delays = {_storable(name): _number(delay) for name, delay in _object(raw.get("latency_breakdown")).items()}
    return Message(
        id=_text(raw.get("id")),
        role=_text(raw.get("role")),
        content=_text(raw.get("content")),
        tool_calls=[_tool_call(call) for call in _objects(raw.get("tool_calls"))],
        name=_text(raw.get("name")),
        interrupted=raw.get("is_interrupted") is True,
        filler=raw.get("is_filler") is True,
        latency={name: delay for name, delay in delays.items() if delay is not None} or None,
        data_deleted=raw.get("data_deleted") is True,
        timestamp=_time(raw.get("timestamp")),
    )


def _tool_call(raw: _Json) -> ToolCall:
    call = raw["function"] if isinstance(raw.get("function"), dict) else raw
    return ToolCall(name=_text(call.get("name")), arguments=_storable(call.get("arguments")))


def _outputs(body: _Json, sessions: list[_Json], events: list[_Json]) -> list[Output]:
    """What all nodes gave, each once, wherever the answer has it."""
    found = [_output(output) for output in _objects(body.get("outputs"))]
    found += [
        _output(output, session.get("id")) for session in sessions for output in _objects(session.get("node_outputs"))
    ]
    found += [_output(output) for output in _objects(body.get("intermediates"))]
    found += [_action(event) for event in events if event.get("type") == "action" and _gave_something(event)]
    found += [
        _action(action, session.get("id"))
        for session in sessions
        for action in _objects(session.get("actions"))
        if _gave_something(action)
    ]
    once: dict[str | int, Output] = {}
    for index, output in enumerate(found):
        # Those without an id cannot be told apart, and may well be several.
        once.setdefault(output.id or index, output)
    return in_order(list(once.values()))


def _output(raw: _Json, session_id: object = None) -> Output:
    event = _object(raw.get("event"))
    return Output(
        id=_text(raw.get("id")),
        session_id=_text(raw.get("session_id")) or _text(session_id),
        node_id=_text(raw.get("node_id")),
        name=_text(raw.get("name")),
        integration=_text(_object(event.get("integration")).get("name")),
        event=_text(event.get("name")),
        data=_storable(raw.get("data")),
        error=_storable(raw.get("error")),
        data_deleted=raw.get("data_deleted") is True,
        timestamp=_time(raw.get("timestamp")),
    )


def _gave_something(action: _Json) -> bool:
    return action.get("output") is not None or isinstance(action.get("intermediate"), dict)


def _action(raw: _Json, session_id: object = None) -> Output:
    """What a node gave, in the flat shape: its record, if there is one, is the `intermediate`."""
    record = _output(_object(raw.get("intermediate")), session_id)
    event, output = _text(raw.get("event_name")), raw.get("output")
    return record.model_copy(
        update={
            "node_id": _text(raw.get("node_id")) or record.node_id,
            "name": record.name or event,
            "integration": _text(raw.get("integration_name")),
            "event": event,
            "data": record.data if output is None else _storable(output),
            "timestamp": record.timestamp or _time(raw.get("timestamp")),
        }
    )


def _issue(raw: _Json) -> Issue:
    return Issue(
        id=_text(raw.get("id")),
        type=_text(raw.get("type")),
        status=_text(raw.get("status")),
        priority=_text(raw.get("priority")),
        message_id=_text(raw.get("message_id")),
        correction=_text(raw.get("correction")),
        correction_reason=_text(raw.get("correction_reason")),
        created_at=_time(raw.get("created_at")),
    )


def _version(raw: _Json) -> Version:
    live = raw.get("is_live")
    return Version(
        id=_text(raw.get("id")),
        number=_integer(raw.get("version_number")),
        name=_text(raw.get("name")),
        slug=_text(raw.get("slug")),
        is_live=live if isinstance(live, bool) else None,
        published_at=_time(raw.get("published_at")),
    )


# Their values


def _object(value: Any) -> _Json:
    return value if isinstance(value, dict) else {}


# More than any call has; an answer that is made to be slow is not read to its end.
_MOST_OBJECTS = 20_000


def _objects(value: Any) -> list[_Json]:
    return [item for item in value[:_MOST_OBJECTS] if isinstance(item, dict)] if isinstance(value, list) else []


def _page(body: Any) -> tuple[list[_Json], bool]:
    page = _object(body)
    return _objects(page.get("data")), _object(page.get("pagination")).get("has_next_page") is True


# What neither PostgreSQL nor a browser would take.
_NO_CHARACTER = re.compile("[\x00\ud800-\udfff]")


def _text(value: Any) -> str | None:
    return _NO_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _time(value: Any) -> datetime | None:
    """To the millisecond, as times are written: a record that is stored and read again stays the same."""
    at = None if isinstance(value, bool) else moment(value)
    return at and at.replace(microsecond=at.microsecond // 1000 * 1000)


# Parsers stop at 200, and a record may have its data deeper down than the answer had it.
_DEEPEST = 100


def _storable(value: Any, depth: int = 0) -> Any:
    """Any JSON as PostgreSQL and browsers take it: no NUL, no infinite numbers, nothing that nests endlessly."""
    match value:
        case str():
            return _text(value)
        case float():
            return _number(value)
        case dict() | list() if depth == _DEEPEST:
            return None
        case dict():
            return {_text(name): _storable(item, depth + 1) for name, item in value.items()}
        case list():
            return [_storable(item, depth + 1) for item in value]
        case _:
            return value
