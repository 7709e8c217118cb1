"""Reading what HappyRobot sends."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchboard import bodies
from switchboard.errors import BadRequest
from switchboard.events import NewEvent
from switchboard.happyrobot.payloads import read_callback, read_json, started_runs


def read(body: dict[str, Any], webhook_id: str | None = None) -> NewEvent:
    raw = json.dumps(body).encode()
    return read_callback(bodies.parse(raw), raw, webhook_id)


def guide(**fields: Any) -> dict[str, Any]:
    return {"run_id": "r", "event_type": "log"} | fields


@pytest.mark.parametrize(
    ("timestamp", "moment"),
    [
        ("2026-01-02T03:04:05.678Z", datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)),
        ("2026-01-02T05:04:05+02:00", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02T03:04:05", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02", datetime(2026, 1, 2, tzinfo=UTC)),
        (1767323045, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        (1767323045678, datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)),
        ("0001-01-01T00:00:00Z", None),  # what "not set" looks like elsewhere
        (-62135596800, None),
        ("0001-01-01T00:00:00+14:00", None),
        ("9999-12-31T23:59:59.999999Z", None),
        ("9999-12-31T23:59:59-14:00", None),
        ("yesterday", None),
        ("", None),
        (1e300, None),
        (None, None),
    ],
)
def test_times_as_authors_write_them(timestamp: Any, moment: datetime | None):
    assert read(guide(timestamp=timestamp)).occurred_at == moment


def test_a_timestamp_makes_copies_known():
    assert read(guide()).dedupe_key is None
    assert read(guide(timestamp=None)).dedupe_key is None
    copies = {read(guide(timestamp="2026-01-01T00:00:00Z")).dedupe_key for _ in range(2)}
    assert len(copies) == 1
    assert None not in copies


@pytest.mark.parametrize("timestamp", ["", " ", "0001-01-01T00:00:00Z", 0.5e300, -62135596800])
def test_a_timestamp_that_was_not_set_does_not(timestamp: Any):
    assert read(guide(timestamp=timestamp)).dedupe_key is None


def test_a_timestamp_in_the_authors_own_words_does():
    assert read(guide(timestamp="5 January, half past nine")).dedupe_key is not None


@pytest.mark.parametrize("timestamp", [{}, [], True])
def test_a_timestamp_of_another_type_is_refused_in_plain_words(timestamp: Any):
    with pytest.raises(BadRequest, match=r"^timestamp: must be a string or a number$"):
        read(guide(timestamp=timestamp))


def test_every_part_of_an_identity_counts():
    def cloud(**fields: Any) -> dict[str, Any]:
        event = {"specversion": "1.0", "id": "1", "source": "s", "type": "t", "data": {"run_id": "r"}}
        return event | fields

    different = [
        read(guide(timestamp="t")),
        read(guide(timestamp="u")),
        read(guide(timestamp="t", data=1)),
        read(guide(timestamp="t", run_id="q")),
        read(guide(timestamp="t"), "1"),
        read(guide(timestamp="t", run_id="q"), "1"),
        read(guide(timestamp="t"), "2"),
        read(cloud()),
        read(cloud(id="2")),
        read(cloud(source="u")),
        read(cloud(id="s1", source="")),
        read(cloud(data={"run_id": "q"})),
    ]
    assert len({event.dedupe_key for event in different}) == len(different)
    assert read(cloud(), "1").dedupe_key == read(guide(), "1").dedupe_key, "X-Webhook-Id comes first"


def test_the_echoed_execution_is_read():
    assert read(guide(execution_id="e")).execution_id == "e"
    assert read(guide()).execution_id is None


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")), inner, max_size=5
        )
    ),
    max_leaves=20,
)


@given(json_values)
def test_all_json_that_can_be_stored_is_read_as_it_is(value: Any):
    assert bodies.parse(json.dumps(value).encode()) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_a_bad_request(raw: bytes):
    try:
        bodies.parse(raw)
    except BadRequest:
        pass
    else:
        json.loads(raw)


@given(json_values, st.none() | st.text(max_size=20))
def test_any_json_is_a_callback_or_a_bad_request(value: Any, webhook_id: str | None):
    raw = json.dumps(value).encode()
    try:
        event = read_callback(value, raw, webhook_id)
    except BadRequest:
        return
    assert 1 <= len(event.run_id) <= 255
    assert 1 <= len(event.event_type) <= 255


@pytest.mark.parametrize(
    ("answer", "run_ids"),
    [
        ({"queued_run_ids": ["a", "b", "a"], "status": "queued 2 parallel sequences, 0 failed"}, ["a", "b"]),
        ({"queued_run_ids": [], "run_id": "a"}, ["a"]),
        ({"run_id": "a", "queued_run_ids": None, "message": None}, ["a"]),
        ({"run_id": "a", "queued_run_ids": ["b"]}, ["b"]),
        ({"status": "queued 0 parallel sequences, 1 failed"}, []),
        # What is odd beside a run does not make the run go away: it is under way.
        ({"queued_run_ids": ["a", None, 7, "", "x" * 256, "nul\x00", "b"], "run_id": 7, "status": {}}, ["a", "b"]),
        ({"queued_run_ids": "a", "run_id": "b"}, ["b"]),
        ({"queued_run_ids": [None], "run_id": ""}, []),
        (["a"], []),
        (None, []),
    ],
)
def test_the_runs_in_an_answer_to_a_trigger(answer: Any, run_ids: list[str]):
    assert started_runs(answer) == run_ids


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'{"a": "half an emoji \\ud83d"}', {"a": "half an emoji \ud83d"}),
        (b"[" * 300 + b"]" * 300, ...),
        (b"[" + b"9" * 5000 + b"]", [float("inf")]),
        (b"[" + b"9" * 30 + b"]", [10**30 - 1]),
    ],
)
def test_what_happyrobot_answers_is_read_as_far_as_it_can_be(raw: bytes, value: Any):
    read = read_json(raw)
    assert value is ... or read == value


@pytest.mark.parametrize("raw", [b"", b"<html>", b"{", b'"\xff"', b"[" * 100_000 + b"]" * 100_000])
def test_what_is_no_json_is_not_read(raw: bytes):
    with pytest.raises(ValueError, match=r"."):
        read_json(raw)
