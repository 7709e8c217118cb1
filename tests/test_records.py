"""What HappyRobot knows about a run, read from each shape of its answers."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import from_json

from switchboard.happyrobot.records import (
    Issue,
    Message,
    Output,
    Recording,
    RunRecord,
    Session,
    ToolCall,
    Version,
    read_messages,
    read_recordings,
    read_run,
    read_sessions,
)
from switchboard.happyrobot.simulator import Simulator
from switchboard.tables import RunStatus

ANSWERS = {path.stem: from_json(path.read_bytes()) for path in (Path(__file__).parent / "records").glob("*.json")}


def run(body: Any) -> RunRecord:
    record = read_run(body)
    assert record is not None
    return record


def session(**fields: Any) -> Session:
    [found], _ = read_sessions({"data": [fields]})
    return found


def message(**fields: Any) -> Message:
    [found], _ = read_messages({"data": [fields]})
    return found


def outputs(**lists: Any) -> list[Output]:
    return run({"id": "r"} | lists).outputs


def transcript(record: RunRecord) -> list[Message]:
    return [message for session in record.sessions for message in session.messages]


# Both shapes of v1


def test_the_nested_shape_is_read_whole():
    record = run(ANSWERS["nested"])
    assert (record.status, record.run_status, record.over) == ("completed", RunStatus.COMPLETED, True)
    assert (record.annotation, record.completed_at) == ("correct", None)
    assert record.started_at == datetime(2026, 1, 15, 9, 30, 0, 250_000, UTC)

    [call] = record.sessions
    assert (call.status, call.type, call.duration, call.user_number) == ("completed", "outbound", 48, "+13125550142")
    assert [said.role for said in call.messages] == ["event", "assistant", "user", "assistant", "tool", "assistant"]
    hello, filler, tool, cut = (call.messages[index] for index in (1, 3, 4, 5))
    assert hello.content == "Hello, am I speaking with Acme Logistics?"
    assert hello.latency is not None
    assert (len(hello.latency), hello.latency["initial_wait"]) == (7, 12.5)
    assert filler.tool_calls == [ToolCall(name="find_load", arguments='{"reference":"LD-204"}')]
    assert (filler.filler, tool.name, cut.interrupted) == (True, "find_load", True)

    assert [(output.name, output.integration, output.event) for output in record.outputs] == [
        ("Incoming hook", "Webhook", "Incoming hook"),
        ("Find the load", "HTTP request", "GET"),
        ("Extract the result", "AI", "Extract"),
        ("Tell the broker", "Email", "Send email"),
    ]
    assert record.outputs[2].data == {"outcome": "booked", "rate": 1850}
    assert record.outputs[3].error == "the mailbox is full"

    [issue] = record.issues
    assert (issue.type, issue.status, issue.priority, issue.correction_reason) == (
        "transcriber",
        "open",
        "low",
        "misheard",
    )
    assert issue.message_id == call.messages[2].id
    assert record.version is not None
    assert (record.version.number, record.version.slug, record.version.is_live) == (7, "carrier-sales", True)
    assert record.version.published_at == datetime(2026, 1, 12, 8, tzinfo=UTC)


def test_the_flat_shape_says_the_same():
    nested, flat = run(ANSWERS["nested"]), run(ANSWERS["flat"])
    assert transcript(flat) == transcript(nested)
    assert flat.outputs == nested.outputs
    # Only one of the shapes has these.
    assert flat.completed_at == datetime(2026, 1, 15, 9, 31, 15, 250_000, UTC)
    [call] = flat.sessions
    assert (call.sip_code, call.sip_reason) == ("200", "OK")
    assert (call.status, call.type, call.user_number) == (None, None, None)
    only_nested = {name: getattr(nested.sessions[0], name) for name in ("status", "type", "user_number")}
    same_call = call.model_copy(update=only_nested | {"sip_code": None, "sip_reason": None})
    assert flat.model_copy(update={"completed_at": None, "sessions": [same_call]}) == nested


def test_v2_tells_of_a_run_without_its_sessions():
    record = run({"id": "r", "status": "succeeded", "timestamp": "2026-01-15T09:30:00Z", "data": {"outcome": "booked"}})
    assert (record.status, record.run_status, record.over) == ("succeeded", RunStatus.COMPLETED, True)
    assert (record.sessions, record.outputs, record.issues, record.version) == ([], [], [], None)


@pytest.mark.parametrize(
    "body", [None, [], "completed", {}, {"message": "not found"}, {"error": "Not Found", "status": 404}, {"run": None}]
)
def test_what_describes_no_run_is_none(body: Any):
    assert read_run(body) is None


def test_a_status_that_nobody_has_documented_is_kept_as_it_is():
    record = run({"run": {"status": "paused"}})
    assert (record.status, record.run_status, record.over) == ("paused", None, False)


# Order


def test_a_transcript_is_in_order_however_it_is_given():
    body = json.loads(json.dumps(ANSWERS["nested"]))
    said = body["sessions"][0]["messages"]
    said[3]["timestamp"] = said[4]["timestamp"]
    expected = transcript(run(body))
    said.reverse()
    assert transcript(run(body)) == expected
    said[0], said[2] = said[2], said[0]  # in no order at all
    assert [found.timestamp for found in transcript(run(body))] == [found.timestamp for found in expected]


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        # One without a time stays behind the one that it follows, in whichever direction the rest goes.
        (["1@1", "2", "3@3"], "123"),
        (["3@3", "2", "1@1"], "123"),
        (["1", "2@1", "3@2"], "123"),
        (["2@2", "x", "1@1", "3@3"], "12x3"),
        (["b", "a"], "ba"),
    ],
)
def test_messages_without_a_time_stay_where_they_belong(given: list[str], ordered: str):
    data = []
    for each in given:
        name, _, second = each.partition("@")
        data.append({"id": name} | ({"timestamp": 1768469400 + int(second)} if second else {}))
    messages, more = read_messages({"data": data, "pagination": {"has_next_page": True}})
    assert "".join(found.id or "" for found in messages) == ordered
    assert more


def test_messages_of_one_instant_stay_as_given():
    messages, more = read_messages({"data": [{"id": name, "timestamp": 1768469400} for name in "bca"]})
    assert [found.id for found in messages] == ["b", "c", "a"]
    assert not more


def test_sessions_are_in_order():
    data = [{"id": "2", "timestamp": 1768469460}, {"id": "1", "timestamp": 1768469400}]
    sessions, _ = read_sessions({"data": data})
    assert [found.id for found in sessions] == ["1", "2"]
    events = [{"type": "session"} | fields for fields in data]
    assert [found.id for found in run({"id": "r", "events": events}).sessions] == ["1", "2"]


# Outputs


def test_an_output_that_stands_in_several_places_is_listed_once():
    output = {"id": "o", "name": "Extract", "data": 1}
    places = {"outputs": [output], "intermediates": [output | {"name": "other"}, "o"]}
    found = outputs(sessions=[{"id": "s", "node_outputs": [output, {"id": "p"}]}], **places)
    assert [(each.id, each.name, each.session_id) for each in found] == [("o", "Extract", None), ("p", None, "s")]


def test_outputs_without_an_id_are_all_listed():
    assert [each.data for each in outputs(outputs=[{"data": 1}, {"data": 1}, 1])] == [1, 1]


def test_an_action_is_an_output_if_it_gave_something():
    action = {"type": "action", "integration_name": "AI", "event_name": "Extract", "node_id": "n"}
    given = {"id": "o", "session_id": "s", "node_id": "other", "name": "Result", "data": 1, "error": "e"}
    found = outputs(
        events=[
            action,
            action | {"output": None, "intermediate": "?"},
            action | {"output": {"a": 1}},
            action | {"output": {"a": 2}, "intermediate": given},
            {"type": "session", "id": "t", "actions": [action | {"intermediate": {"data": 3, "data_deleted": True}}]},
            {"type": "else", "output": 4},
        ]
    )
    usual = {"node_id": "n", "integration": "AI", "event": "Extract"}
    assert found == [
        Output(name="Extract", data={"a": 1}, **usual),
        Output(id="o", session_id="s", name="Result", data={"a": 2}, error="e", **usual),
        Output(session_id="t", name="Extract", data=3, data_deleted=True, **usual),
    ]


# Fields


def test_deleted_content_makes_a_record_hollow():
    body = json.loads(json.dumps(ANSWERS["flat"]))
    assert not run(body).hollow
    body["events"][1]["messages"][2] |= {"content": None, "data_deleted": True}
    record = run(body)
    assert record.hollow
    assert RunRecord.model_validate_json(record.model_dump_json()).hollow


def test_tool_calls_are_read_in_both_forms():
    calls = [
        {"function": {"name": "a", "arguments": {"b": 1}}},
        {"name": "c", "arguments": "{}"},
        None,
        {"function": 1},
    ]
    assert message(tool_calls=calls).tool_calls == [
        ToolCall(name="a", arguments={"b": 1}),
        ToolCall(name="c", arguments="{}"),
        ToolCall(),
    ]
    assert message(tool_calls="{}").tool_calls == []


def test_of_the_latency_the_numbers_are_kept():
    delays = {"llm": 412, "tts": 0.5, "eos": None, "network": "12", "is_slow": True, "wait": 10**400}
    assert message(latency_breakdown=delays).latency == {"llm": 412.0, "tts": 0.5}
    assert message(latency_breakdown={"llm": None}).latency is None


@pytest.mark.parametrize(("code", "read"), [("486", "486"), (486, "486"), (True, None), (4.5, None), ({}, None)])
def test_sip_codes_may_be_numbers(code: Any, read: str | None):
    assert session(sip_code=code).sip_code == read


@pytest.mark.parametrize("duration", [True, "48", 10**400, float("inf"), float("nan"), []])
def test_a_duration_that_is_none_is_left_out(duration: Any):
    assert session(duration=duration).duration is None


@pytest.mark.parametrize("timestamp", [True, "soon", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", 10**400, {}])
def test_a_time_that_is_none_is_left_out(timestamp: Any):
    assert session(timestamp=timestamp).timestamp is None


def test_only_links_to_servers_are_recordings():
    urls = [
        "https://r.example/1.wav?Signature=a%2Fb",
        "HTTP://r.example/2.wav",
        "javascript:alert(1)",
        "https://",
        "https://r.example/\x00",
        "/1",
        None,
    ]
    found = read_recordings({"recordings": [*({"session_id": "s", "url": url} for url in urls), "x", {}]})
    assert found == [Recording(session_id="s", url=str(url)) for url in urls[:2]]


# Anything

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["session", "action", "completed", "a\x00b", "2026-01-15T09:30:00.123456Z", "https://a.example"])
    | st.integers(1_700_000_000, 1_700_000_005)
)


def names(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(names, value.values()))
    return set().union(*map(names, value)) if isinstance(value, list) else set()


NAMES = sorted(names(list(ANSWERS.values())) | {"data", "pagination", "has_next_page", "recordings", "url", "\x00"})
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=30,
)


@st.composite
def damaged(draw: Callable[..., Any]) -> Any:
    """One of the documented answers, some of it replaced."""
    body = json.loads(json.dumps(draw(st.sampled_from(list(ANSWERS.values())))))
    for _ in range(draw(st.integers(1, 4))):
        part: Any = body
        for _ in range(draw(st.integers(0, 7))):
            inner = part[draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))]
            if not isinstance(inner, (dict, list)) or not inner:
                break
            part = inner
        part[draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))] = draw(JSON)
    return body


def through_the_database(record: RunRecord) -> RunRecord:
    text = json.dumps(record.model_dump(mode="json"), allow_nan=False)
    assert "\\u0000" not in text
    return RunRecord.model_validate(json.loads(text))


@given(JSON | damaged())
def test_whatever_is_answered_can_be_read_and_stored(body: Any):
    sessions, _ = read_sessions(body)
    messages, _ = read_messages(body)
    for recording in read_recordings(body):
        assert Recording.model_validate_json(recording.model_dump_json()) == recording
    read = read_run(body) or RunRecord()
    for record in (
        read,
        read.model_copy(update={"sessions": sessions}),
        read.model_copy(update={"sessions": [Session(messages=messages)]}),
    ):
        assert RunRecord.model_validate_json(record.model_dump_json()) == record
        assert through_the_database(record) == record


def test_what_nests_endlessly_is_cut_off():
    deep: Any = "bottom"
    for _ in range(95):
        deep = {"a": [deep]}
    [found], _ = read_messages({"data": [{"tool_calls": [{"name": "a", "arguments": deep}]}]})
    record = RunRecord(sessions=[Session(messages=[found])])
    assert RunRecord.model_validate_json(record.model_dump_json()) == through_the_database(record) == record


# A later record over an older one


def record_of(sessions: dict[str, list[str | None]], **more: Any) -> RunRecord:
    """Messages that are None have been deleted."""
    return RunRecord(
        sessions=[
            Session(id=name, messages=[Message(content=said, data_deleted=said is None) for said in messages])
            for name, messages in sessions.items()
        ],
        **more,
    )


def said_in(record: RunRecord) -> dict[str | None, list[str | None]]:
    return {session.id: [message.content for message in session.messages] for session in record.sessions}


@pytest.mark.parametrize(
    ("older", "newer", "merged"),
    [
        ({"a": ["1", "2"]}, {"a": ["1", "2", "3"]}, {"a": ["1", "2", "3"]}),
        ({"a": ["1", "2"]}, {"a": ["1"]}, {"a": ["1", "2"]}),
        ({"a": ["1"]}, {"a": [None]}, {"a": ["1"]}),
        ({"a": ["1"]}, {"a": [None], "b": ["2"]}, {"a": ["1"], "b": ["2"]}),
        ({"a": ["1"]}, {"b": ["2"]}, {"b": ["2"], "a": ["1"]}),
        ({"busy": []}, {}, {"busy": []}),
    ],
)
def test_what_was_said_is_never_lost_to_a_later_record(older: Any, newer: Any, merged: Any):
    assert said_in(record_of(newer).over_older(record_of(older))) == merged


def test_what_a_later_record_does_not_know_stays():
    issue, output = Issue(id="i"), Output(id="o", data={"rate": 1900})
    older = RunRecord(annotation="critical", issues=[issue], outputs=[output], version=Version(id="v"))
    assert RunRecord(status="completed").over_older(older) == older.model_copy(update={"status": "completed"})
    emptied = RunRecord(annotation="correct", outputs=[Output(id="o", data_deleted=True), Output(id="p")])
    merged = emptied.over_older(older)
    assert (merged.annotation, [found.id for found in merged.outputs]) == ("correct", ["o", "p"])
    assert merged.outputs[0] == output


# The simulator's answers


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_the_simulator_tells_the_same_in_every_shape(outcome: str):
    simulator = Simulator(pace=0)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(simulator.app), base_url="http://sim.test") as client:

        async def ask(path: str, **query: str) -> Any:
            return from_json((await client.get(f"/api{path}", params=query)).content)

        trigger = {"simulate": {"outcome": outcome}}
        [run_id] = (await client.post("/hooks/carrier-call", json=trigger)).json()["queued_run_ids"]
        await simulator.settled()
        nested = run(await ask(f"/v1/runs/{run_id}", shape="nested"))
        flat = run(await ask(f"/v1/runs/{run_id}", shape="flat"))
        head = run(await ask(f"/v2/runs/{run_id}"))
        [call], more_sessions = read_sessions(await ask(f"/v2/runs/{run_id}/sessions"))
        messages, more_messages = read_messages(await ask(f"/v2/sessions/{call.id}/messages", sort="desc"))
        recordings = read_recordings(await ask(f"/v1/runs/{run_id}/recordings"))
    await simulator.aclose()

    assert messages
    assert transcript(nested) == transcript(flat) == messages
    assert (more_sessions, more_messages) == (False, False)
    assert nested.run_status == flat.run_status == head.run_status == RunStatus(outcome.upper())
    assert nested.started_at == flat.started_at == head.started_at
    assert flat.completed_at == head.completed_at is not None
    assert nested.issues == flat.issues
    assert nested.version == flat.version is not None
    assert nested.outputs == flat.outputs
    assert flat.outputs[0].name == "Incoming hook"
    assert [recording.session_id for recording in recordings] == [call.id]
