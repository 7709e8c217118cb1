"""What reads texts and bytes of strangers: it understands them, or says in its own words that it does not."""

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from switchboard import bodies, database, edge, pages
from switchboard.access import origins
from switchboard.access.tokens import Signer, TokenExpired, TokenInvalid
from switchboard.errors import BadRequest
from switchboard.events import Event
from switchboard.executions import approval_data, requires_comment
from switchboard.happyrobot.addresses import hook_for, may_decide_at
from switchboard.happyrobot.payloads import moment, read_callback, read_json, started_runs
from switchboard.happyrobot.records import read_messages, read_recordings, read_run, read_sessions
from switchboard.live import messages, stream
from switchboard.public.executions import ExecuteIn
from switchboard.runs.queries import Cursor
from switchboard.runs.queued import MOST_ROWS, payload, rows_cut
from switchboard.runs.trigger import checked_key
from switchboard.settings import Settings, http_address
from tests.conftest import APP_SECRET
from tests.hostile.examples import ODD_VALUES, Verbatim, bodies_like, examples, written

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of what has failed

GUIDE = {"run_id": "r", "event_type": "pending_approval", "timestamp": "2026-01-15", "data": {"rows": []}}
CLOUD = {"specversion": "1.0", "id": "1", "type": "session.status_changed", "data": {"run_id": "r", "status": "failed"}}
ANSWER = {"queued_run_ids": ["a", "b"], "run": {"status": "completed", "id": "a"}, "sessions": [{"messages": []}]}
EXECUTED = {"input": {"csvData": [{"a": 1}], "x": 1.5}, "description": "What for", "contextId": "c"}

NUMBERS = ["0", "-1", "1e9", "99999999999999999999", "9" * 5_000, "\N{FULLWIDTH DIGIT ONE}", "1_0", "NaN", "inf"]
ADDRESSES = [
    "http://[",
    "https://[::1%eth0]:80/",
    "https://h:99999/",
    "https://h:port/",
    "https://user:pass@h/",
    "https://x.happyrobot.ai\\@evil.example/",
    "https://evil.example#.happyrobot.ai",
    "https://evil.example/.happyrobot.ai",
    "https://xn--/",
    "https://\N{FULLWIDTH FULL STOP}/",
    "//h",
    "https:/h",
    "HTTPS://H",
    "https://h/\u2028x",
    "javascript:alert(1)",
    "https://" + "a." * 5_000,
]
TEXTS = (
    st.text()
    | st.sampled_from(NUMBERS + ADDRESSES)
    | st.text("0123456789.:/@[]%?#&=_- \x00\r\n").map(lambda text: f"https://{text}")
)


@pytest.mark.parametrize("webhook_id", [None, "an id"])
def test_every_odd_value_is_refused_or_can_be_stored(webhook_id: str | None):
    for odd in map(Verbatim, ODD_VALUES):
        for body in (odd, [odd], GUIDE | {"data": odd}, GUIDE | {"timestamp": odd}, EXECUTED | {"input": {"a": odd}}):
            is_parsed_strictly(written(body), webhook_id)


@examples(100)
@given(st.one_of([bodies_like(each) for each in (GUIDE, CLOUD, EXECUTED)]), st.none() | st.text(max_size=10))
def test_what_is_parsed_is_strict_json_and_can_be_stored(raw: bytes, webhook_id: str | None):
    is_parsed_strictly(raw, webhook_id)


def is_parsed_strictly(raw: bytes, webhook_id: str | None) -> None:
    try:
        value = bodies.parse(raw)
    except BadRequest:
        return
    text = json.dumps(value, allow_nan=False)
    assert "\\u0000" not in text.replace("\\\\", "")
    assert json.loads(text) == value == json.loads(raw), "as anybody else reads it"
    json.dumps(value, ensure_ascii=False).encode()
    with suppress(BadRequest):
        event = read_callback(value, raw, webhook_id)
        requires_comment(event.data)
        assert approval_data(event.data).keys() >= {"rows", "metadata", "displayFields"}
    with suppress(BadRequest):
        bodies.check(ExecuteIn, value)
        sent = payload(value, "c")
        assert len(sent.get("csvData", [])) == len(value["input"].get("csvData", [])) - rows_cut(value) <= MOST_ROWS


@examples(50)
@given(bodies_like(ANSWER))
def test_an_answer_is_read_as_far_as_it_can_be(raw: bytes):
    try:
        value = read_json(raw)
    except ValueError:
        return
    assert all(0 < len(run_id) <= 255 for run_id in started_runs(value))
    read_recordings(value)
    for record in (read_run(value), *read_sessions(value)[0], *read_messages(value)[0]):
        if record is not None:
            assert type(record).model_validate_json(record.model_dump_json()) == record


def the_asked(path: bytes, query: bytes) -> Request:
    return Request({"type": "http", "raw_path": path, "query_string": query, "headers": [], "path": ""})


Reader = Callable[[str], object]
SIGNER = Signer(SecretStr(APP_SECRET))
READERS: dict[str, tuple[Reader, tuple[type[Exception], ...]]] = {
    "a cursor": (Cursor.decode, (BadRequest,)),
    "an Idempotency-Key": (checked_key, (BadRequest,)),
    "a Last-Event-ID": (stream._resumed_at, (BadRequest,)),
    "a browser token": (SIGNER.read, (TokenInvalid, TokenExpired)),
    "an Origin": (origins._place, ()),
    "a Host": (lambda text: origins._name(f"//{text}"), ()),
    "an address of the network": (edge.ip, ()),
    "a time": (moment, ()),
    "an address": (http_address, (ValueError,)),
    "a hook": (partial(hook_for, environment="staging"), (ValueError,)),
    "where to decide": (partial(may_decide_at, hook_url="https://h.example/hooks/x", hosts=["a.example"]), ()),
    "an event": (lambda text: Event.decode(text.encode(errors="replace")), (ValueError,)),
    "a message": (lambda text: messages.unpack(text.encode(errors="replace")), (ValueError,)),
}


@pytest.mark.parametrize("what", READERS)
@examples(25)
@given(text=TEXTS)
def test_a_text_is_understood_or_refused_in_the_readers_own_words(what: str, text: str):
    read, refusals = READERS[what]
    with suppress(*refusals):
        read(text)


@examples(100)
@given(number=st.integers(0, 2**63 - 1), at=st.datetimes(timezones=st.just(UTC)), behind=st.text(max_size=3))
def test_a_cursor_comes_back_as_it_was_given(number: int, at: datetime, behind: str):
    cursor = Cursor(at, number)
    assert Cursor.decode(cursor.encode()) == cursor
    with suppress(BadRequest):
        decoded = Cursor.decode(cursor.encode() + behind)
        assert 0 <= decoded.id < 2**63


@examples(100)
@given(path=st.binary(max_size=30), query=st.binary(max_size=30), place=st.text(max_size=5))
def test_a_link_is_one_line_of_ascii_and_leads_nowhere_else(path: bytes, query: bytes, place: str):
    response = Response()
    pages.link_next(the_asked(b"/api" + path, query), response, cursor=place)
    link = response.headers["link"]
    assert link.isascii()
    assert link.isprintable()
    assert link.startswith("</api")
    assert link.endswith('>; rel="next"')
    assert link.count(">") == link.count("<") == 1


@examples(100)
@given(address=TEXTS, host=st.sampled_from(["happyrobot.ai", "h.example", "evil.example"]))
def test_a_decision_goes_where_http_itself_says_that_it_goes(address: str, host: str):
    """However an address is written, its host for us is the one that is connected to."""
    for url in (address, f"https://{address}.{host}/", f"https://{host}{address}", f"https://{host}\\{address}"):
        if may_decide_at(url, "https://h.example/hooks/x", ["a.example"]):
            with suppress(httpx.InvalidURL):
                there = httpx.URL(http_address(url)).host
                assert there in ("h.example", "a.example") or there.endswith(".happyrobot.ai")


SETTINGS = {
    "database_url": "postgresql://",
    "redis_url": "redis://",
    "happyrobot_webhook_url": "https://",
    "app_url": "https://",
    "cors_origins": "https://",
    "trusted_proxies": "",
    "happyrobot_resume_hosts": "",
}


@examples(10)
@given(text=TEXTS, query=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_a_setting_is_understood_or_named_and_not_repeated(text: str, query: dict[str, str]):
    text = f"{text}?{'&'.join(map('='.join, query.items()))}"
    for name, start in SETTINGS.items():
        refused, settings = None, Settings()
        try:
            settings = Settings.model_validate({name: start + text})
        except ValidationError as error:
            refused = error
        if refused is not None:
            assert [each["loc"] for each in refused.errors()] == [(name,)]
            assert "input_value" not in str(refused)
        elif settings.database_url is not None:
            assert urlsplit(database.dsn(settings.database_url.get_secret_value())).scheme == "postgresql"
