"""What is logged, and what never is."""

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, quote_plus, urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import httpx
import pytest
import structlog
from pydantic import BaseModel, SecretStr, ValidationError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from sqlalchemy.exc import IntegrityError

from switchboard import local, logs
from switchboard import migrate as migrations
from switchboard.errors import PUBLIC, NotFound, PostgresAway
from switchboard.logs import bound
from switchboard.logs.redaction import REDACTED, redactor
from switchboard.logs.traces import told, trace
from switchboard.settings import Settings
from tests.collector import Collector, collecting
from tests.conftest import APP_SECRET, Said, Servers, run_sql, settings_for, with_database

Lines = Callable[..., list[str]]

log = structlog.stdlib.get_logger("switchboard.somewhere")
foreign = logging.getLogger("somebody.else")
harmless = partial(logs.harmless, logging.getLogger("switchboard.somewhere"), logging.INFO)

PRODUCTION = {"environment": "production", "app_url": "https://switchboard.example"}


def settings(**more: Any) -> Settings:
    return settings_for("postgresql://p:a-long-database-password@h/x", "redis://unused", None, **more)


@pytest.fixture
def configured(capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    """Configures the logs, does something, and returns what stands on standard error then."""

    def lines(work: Callable[[], object], **more: Any) -> list[str]:
        logs.configure(settings(**more))
        work()
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()

    yield lines
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, logs._Stderr)]:
        root.removeHandler(handler)
    logging.captureWarnings(False)


def only(lines: list[str]) -> dict[str, Any]:
    [line] = lines
    found: dict[str, Any] = json.loads(line)
    return found


# Lines


def test_in_production_a_line_is_json(configured: Lines):
    execution_id = uuid4()

    def work() -> None:
        bound.begin(request_id="r-1")
        log.warning("execution unconfirmed", execution_id=execution_id, tries=2, seconds=0.5, more={"a": [None]})
        bound.end()

    line = only(configured(work, **PRODUCTION))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {
        "level": "warning",
        "logger": "switchboard.somewhere",
        "event": "execution unconfirmed",
        "request_id": "r-1",
        "execution_id": str(execution_id),
        "tries": 2,
        "seconds": 0.5,
        "more": {"a": [None]},
    }


def test_in_development_a_line_can_be_read(configured: Lines):
    [line] = configured(lambda: log.warning("job waits", subject="run_1"))
    _, _, rest = line.partition("Z ")
    assert rest.split() == ["[warning", "]", "job", "waits", "[switchboard.somewhere]", "subject=run_1"]
    assert "\x1b" not in line


def test_a_library_s_line_looks_like_ours(configured: Lines):
    line = only(configured(lambda: foreign.warning("%s of %d", "one", 2), **PRODUCTION))
    assert (line["event"], line["level"], line["logger"]) == ("one of 2", "warning", "somebody.else")
    line = only(configured(lambda: foreign.error("%(a)s", {"a": "named"}), **PRODUCTION))
    assert line["event"] == "named"
    line = only(configured(lambda: foreign.error("100% of it"), **PRODUCTION))
    assert line["event"] == "100% of it"


@pytest.mark.parametrize(
    ("level", "ours", "theirs"),
    [
        ("debug", ["debug", "info", "warning", "error"], ["warning", "error"]),
        ("info", ["info", "warning", "error"], ["warning", "error"]),
        ("warning", ["warning", "error"], ["warning", "error"]),
        ("error", ["error"], ["error"]),
    ],
)
def test_the_level_is_for_our_lines_and_libraries_warn_at_most(
    configured: Lines, level: str, ours: list[str], theirs: list[str]
):
    def say(name: str) -> None:
        for each in ("debug", "info", "warning", "error"):
            getattr(logging.getLogger(name), each)("said")

    for name, expected in (("switchboard.happyrobot", ours), ("httpx", theirs)):
        lines = configured(lambda name=name: say(name), log_level=level, **PRODUCTION)
        assert [json.loads(line)["level"] for line in lines] == expected


def test_it_can_be_configured_again_and_touches_no_other_handler(configured: Lines):
    root = logging.getLogger()
    before = list(root.handlers)
    configured(lambda: None)
    for _ in range(3):
        configured(lambda: None, **PRODUCTION)
    assert len(root.handlers) == len(before) + 1
    assert all(handler in root.handlers for handler in before)
    assert only(configured(lambda: log.warning("once"), **PRODUCTION))["event"] == "once"


@pytest.mark.parametrize("more", [PRODUCTION, {}])
def test_a_harmless_line_is_like_any_other(configured: Lines, more: dict[str, Any]):
    def say(kind: str) -> None:
        bound.begin(request_id="1")
        fields = {"method": "GET", "status": 200, "ms": 0.5}
        if kind == "usual":
            log.info("request", **fields)
        else:
            harmless("request", **fields)
        bound.end()

    def told(line: str) -> Any:
        if not more:
            return line.split(maxsplit=1)[1]
        found = json.loads(line)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("timestamp"))
        return found

    [short] = configured(lambda: say("short"), log_level="info", **more)
    [usual] = configured(lambda: say("usual"), log_level="info", **more)
    assert told(short) == told(usual)
    assert configured(lambda: say("short"), log_level="warning", **more) == []


def test_harmless_lines_of_one_moment_are_written_together_and_before_what_follows(
    configured: Lines, monkeypatch: pytest.MonkeyPatch
):
    written: list[str] = []

    async def say() -> None:
        for number in range(3):
            harmless("request", number=number)
        assert written == []
        log.info("other")
        harmless("request", number=4)
        await asyncio.sleep(0)

    logs.configure(settings(log_level="info", **PRODUCTION))
    monkeypatch.setattr(sys.stderr, "write", written.append)
    asyncio.run(say())
    assert [piece.count("\n") for piece in written] == [4, 1]
    assert [json.loads(line).get("number") for line in "".join(written).splitlines()] == [0, 1, 2, None, 4]


def test_what_was_kept_when_the_process_ends_is_written(configured: Lines):
    async def say() -> None:
        harmless("request")

    logs.configure(settings(log_level="info", **PRODUCTION))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(say())
    loop.close()
    assert len(configured(logging.shutdown, log_level="info", **PRODUCTION)) == 1


def test_pytest_sees_our_lines(configured: Lines, caplog: pytest.LogCaptureFixture):
    def say() -> None:
        log.warning("job waits", subject="run_1")
        harmless("request", status=200)

    configured(say, log_level="info")
    waits, request = caplog.records
    assert waits.msg == {"event": "job waits", "subject": "run_1"}
    assert request.msg == {"event": "request", "status": 200}
    assert (request.name, request.levelname, request.getMessage()) == (waits.name, "INFO", str(request.msg))
    assert abs(request.created - waits.created) < 60


def test_a_line_that_cannot_be_written_says_no_more_than_whose_it_was(configured: Lines):
    def work() -> None:
        [handler] = [each for each in logging.getLogger().handlers if isinstance(each, logs._Stderr)]
        handler.handle(logging.LogRecord("somebody.else", logging.ERROR, "x.py", 1, "%d", ("a secret",), None))

    assert configured(work) == ["a line of somebody.else could not be written"]


# What is taken out

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl_-"
KEY = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (KEY, REDACTED),
        (f"the key sk_{KEY.upper()}.", f"the key sk_{REDACTED}."),
        (f"a {JWT} b", f"a {REDACTED} b"),
        ("Authorization: Bearer abc.def-ghi", f"Authorization: Bearer {REDACTED}"),
        ("X-API-KEY: short", f"X-API-KEY: {REDACTED}"),
        ("{'x-api-key': 'short'}", f"{{'x-api-key': '{REDACTED}'}}"),
        ("postgresql://me:pass@word/x@host:5432/db", f"postgresql://{REDACTED}@host:5432/db"),
        ("redis://onlyme@host", f"redis://{REDACTED}@host"),
        ("/api/events?access_token=abc&run_id=1", f"/api/events?access_token={REDACTED}&run_id=1"),
        ("https://h/x.wav?Expires=1&Signature=abc", f"https://h/x.wav?Expires=1&Signature={REDACTED}"),
        ("call +1 (555) 010-9999 now", f"call {REDACTED} now"),
        ("+4917612345678", REDACTED),
        ("tel:%2B15550109999", f"tel:{REDACTED}"),
        ("(555) 010-9999", REDACTED),
        ("555-010-9999,", f"{REDACTED},"),
        ("15550109999", REDACTED),
        ('{"to":5550109999}', f'{{"to":{REDACTED}}}'),
    ],
)
def test_what_looks_like_a_secret_or_a_phone_number_is_taken_out(text: str, expected: str):
    assert redactor()(text) == expected
    assert redactor()({"a": [{text: text}]}) == {"a": [{expected: expected}]}


@pytest.mark.parametrize(
    "text",
    [
        "19184e4c-74ca-474a-8978-e77f5a661e4f",
        "00000000-0000-4000-8000-155501099991",
        "a4a9542ea8e1493f83afab2a91dfaa1f",
        "2026-10-01T12:00:00.123456+00:00",
        "2026-10-01 12:00:00.123456 +0200",
        "1790000000",  # now, in seconds
        "1790000000123",  # in milliseconds
        "1790000000.123456",
        "0.1234567890123",
        "order_5550109999",
        "4848107521966110287",
        "http://127.0.0.1:8000/api/happyrobot/runs",
        "/usr/lib/python3.11/asyncio/tasks.py:1234 wait_for",
        "HappyRobot answered 503",
        "the Bearer token is missing",
    ],
)
def test_what_only_looks_a_little_like_it_stays(text: str):
    assert redactor()(text) == text


def test_no_phone_number_gets_through_however_it_is_written():
    clean = redactor()
    draw = random.Random(1)
    for _ in range(2000):
        digits = "".join(draw.choices("0123456789", k=draw.randint(7, 15)))
        number = "+" + "".join(digit + draw.choice(["", "", " ", "-", "."]) for digit in digits[:-1]) + digits[-1]
        assert clean(f"({number})") == f"({REDACTED})", number


@pytest.mark.parametrize(
    "number",
    [
        "1-555-010-9999",
        "1.555.010.9999",
        "(555) 010-9999",
        "+1/555/010/9999",
        "0176 12345678",
        "(0176) 12345678",
        "+49 (0)176 / 12345678",
        "+1\u00a0555\u00a0010\u00a09999",
        "+1\u2011555\u2011010\u20119999",
        5550109999,
    ],
)
def test_nor_does_one_that_is_written_as_people_do(number: str | int):
    assert redactor()({"to": number}) == {"to": REDACTED}
    assert redactor()(f"call {number} now") == f"call {REDACTED} now"


@pytest.mark.parametrize("number", [200, 4711, 1795626266, 1795626266123, True])
def test_numbers_that_are_none_stay(number: int):
    assert redactor()({"n": number}) == {"n": number}


@pytest.mark.parametrize("unit", ["eyJ", "://", "+1", "a:b@", "0 ", "Bearer "])
def test_what_is_very_long_is_cut_before_it_is_searched(unit: str):
    assert len(redactor()(unit * 1_000_000)) < 40_000


@pytest.mark.parametrize("before", range(16_320, 16_400, 7))
def test_nothing_is_left_of_a_secret_in_which_a_text_is_cut(before: int):
    text = redactor(["a-secret-of-ours-0123"])("x " * (before // 2) + "a-secret-of-ours-0123 " + "0123456789abcdef" * 4)
    assert "a-secret" not in text
    assert "0123456789" not in text


@pytest.mark.parametrize(
    "name", ["webhook_secret", "clientSecret", "switchboard-token", "customer_phone", "apiKey", "transcript"]
)
def test_secrets_are_known_by_the_ends_of_their_names(name: str):
    assert redactor()({name: "Lovelace"}) == {name: REDACTED}


def test_secret_settings_are_taken_out_wherever_they_turn_up(configured: Lines):
    chosen = {"happyrobot_api_key": "a/key+of=ours-0123", "happyrobot_callback_key": "short"}

    def work() -> None:
        log.warning("refused", where="x a/key+of=ours-0123 y", url=quote("a/key+of=ours-0123", safe=""))
        log.warning("with", secret_of_ours=[APP_SECRET], said="a short word")
        foreign.warning("cannot reach %s", "a-long-database-password")

    first, second, third = map(json.loads, configured(work, **PRODUCTION, **chosen))
    assert first["where"] == f"x {REDACTED} y"
    assert first["url"] == REDACTED
    assert second["secret_of_ours"] == [REDACTED]
    assert second["said"] == "a short word"
    assert third["event"] == f"cannot reach {REDACTED}"


def test_so_is_whatever_has_the_name_of_a_secret(configured: Lines):
    def work() -> None:
        log.warning("refused", payload={"a": 1}, headers={"X-API-Key": "k", "Accept": "*/*"}, token=JWT, key_id="7")

    line = only(configured(work, **PRODUCTION))
    assert (line["payload"], line["token"], line["key_id"]) == (REDACTED, REDACTED, "7")
    assert line["headers"] == {"X-API-Key": REDACTED, "Accept": "*/*"}


def test_of_an_object_that_could_hold_anything_the_class_is_named(configured: Lines):
    class Call(BaseModel):
        name: str = "Lovelace"

    def work() -> None:
        log.warning("seen", call=Call(), secret_word=SecretStr("x"), raw=b"Lovelace", where=Path("/x"), nothing=None)
        foreign.warning("seen %s", Call())

    ours, theirs = map(json.loads, configured(work, **PRODUCTION))
    assert "Lovelace" not in str((ours, theirs))
    assert ours["where"] == "/x"
    assert ours["nothing"] is None
    assert theirs["event"].startswith("seen <")


# Exceptions


def validation_error() -> Exception:
    class Call(BaseModel):
        seats: int

    with pytest.raises(ValidationError) as raised:
        Call.model_validate({"seats": "Lovelace"})
    return raised.value


class _Orig(Exception):
    sqlstate = "23514"


CHECKED = asyncpg.CheckViolationError("new row for Lovelace violates")
CHECKED.constraint_name = "known"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("Lovelace"), "ValueError"),
        (KeyError("Lovelace"), "KeyError"),
        (UnicodeDecodeError("utf-8", b"Lovelace", 0, 1, "x"), "UnicodeDecodeError"),
        (validation_error(), "pydantic_core._pydantic_core.ValidationError"),
        (httpx.ConnectError("Lovelace"), "httpx.ConnectError"),
        (httpx.InvalidURL("Lovelace"), "httpx.InvalidURL"),
        (ResponseError("unknown command Lovelace"), "redis.exceptions.ResponseError"),
        (ConnectionError("Lovelace"), "ConnectionError"),
        (
            IntegrityError("INSERT Lovelace", {"name": "Lovelace"}, _Orig("Lovelace")),
            "sqlalchemy.exc.IntegrityError: sqlstate 23514",
        ),
        (CHECKED, "asyncpg.exceptions.CheckViolationError: sqlstate 23514, constraint known"),
        (asyncpg.InterfaceError("invalid input: Lovelace"), "asyncpg.exceptions._base.InterfaceError"),
        (FileNotFoundError(2, "No such file or directory", "Lovelace"), "FileNotFoundError: No such file or directory"),
        (TypeError("str is not an int"), "TypeError: str is not an int"),
        (RuntimeError("Event loop is closed"), "RuntimeError: Event loop is closed"),
        (RedisConnectionError("Error 111"), "redis.exceptions.ConnectionError: Error 111"),
        (NotFound("Run not found"), "switchboard.errors.NotFound: Run not found"),
        (PostgresAway("takes none"), "switchboard.errors.PostgresAway: takes none"),
    ],
)
def test_an_exception_says_only_what_nobody_has_sent(configured: Lines, error: Exception, expected: str):
    assert told(error) == expected
    line = only(configured(lambda: log.warning("waits", error=error), **PRODUCTION))
    assert line["error"] == expected


def fail_with_secrets() -> None:
    local_secret = "Lovelace-in-a-variable"
    try:
        int("Lovelace")
    except ValueError as error:
        raise NotFound("Run not found") from error
    finally:
        del local_secret


def raised() -> Exception:
    with pytest.raises(NotFound) as caught:
        fail_with_secrets()
    return caught.value


def test_an_exception_is_logged_with_its_places_and_its_causes(configured: Lines):
    def work() -> None:
        try:
            fail_with_secrets()
        except NotFound:
            log.exception("job failed", subject="run_1")

    line = only(configured(work, **PRODUCTION))
    assert line["level"] == "error"
    first, *between, last = line["exception"].splitlines()
    assert first == "switchboard.errors.NotFound: Run not found"
    assert re.search(r"test_logs\.py:\d+ fail_with_secrets$", last)
    assert between[-2:] == ["caused by", "ValueError"]
    assert "Lovelace" not in str(line)
    in_console = "\n".join(configured(work))
    assert line["exception"].splitlines()[0] in in_console
    assert "Lovelace" not in in_console


def test_so_is_one_that_a_library_logs(configured: Lines):
    line = only(configured(lambda: foreign.error("Exception in %s\n", "it", exc_info=raised()), **PRODUCTION))
    assert line["event"] == "Exception in it"
    assert line["exception"].startswith("switchboard.errors.NotFound: Run not found\n")
    assert "Lovelace" not in str(line)


def test_one_that_came_up_while_another_was_handled_names_it_unless_it_is_hidden():
    error = TypeError("second")
    error.__context__ = KeyError("Lovelace")
    assert trace(error).splitlines() == ["TypeError: second", "while handling", "KeyError"]
    error.__suppress_context__ = True  # as `from None` does
    assert trace(error) == "TypeError: second"


def test_a_group_is_taken_apart_and_a_circle_is_not_followed_for_ever():
    one, other = ValueError("Lovelace"), TypeError("second")
    one.__cause__, other.__cause__ = other, one
    lines = trace(ExceptionGroup("of Lovelace", [one, ExceptionGroup("inner", [RuntimeError("third")])])).splitlines()
    assert lines[0] == "ExceptionGroup"
    assert "  | ValueError" in lines
    assert "  | TypeError: second" in lines
    assert "  |   | RuntimeError: third" in lines
    assert "Lovelace" not in str(lines)


def test_a_deep_stack_is_cut():
    def deeper(more: int) -> None:
        if more:
            deeper(more - 1)
        raise TypeError

    with pytest.raises(TypeError) as caught:
        deeper(100)
    lines = trace(caught.value).splitlines()
    assert len(lines) == 42
    assert re.fullmatch(r"  … \d+ more", lines[1])


def test_a_traceback_that_comes_as_text_keeps_its_places(configured: Lines):
    """As Starlette tells uvicorn of a start that has failed."""
    with pytest.raises(ExceptionGroup) as caught:
        raise ExceptionGroup("of Lovelace", [raised()])
    for error in (raised(), caught.value):
        text = "".join(traceback.format_exception(error))
        line = only(configured(lambda text=text: foreign.error(text), **PRODUCTION))
        assert line["event"] == "exception"
        assert "ValueError" in line["exception"].splitlines()
        assert re.search(r"test_logs\.py:\d+ fail_with_secrets$", line["exception"], re.MULTILINE)
        assert "Lovelace" not in str(line)


def test_asyncio_does_not_tell_what_a_task_failed_with(configured: Lines):
    async def fail(word: str) -> None:
        raise ValueError(word)

    async def leave_behind() -> None:
        loop = asyncio.get_running_loop()
        task = loop.create_task(fail("Lovelace"))
        await asyncio.wait([task])
        loop.call_exception_handler({"message": "Task exception was never retrieved", "task": task})
        task.exception()
        error = ValueError("Lovelace")
        loop.call_exception_handler({"message": "Exception in callback f('Lovelace') at x.py:1", "exception": error})

    first, second = map(json.loads, configured(lambda: asyncio.run(leave_behind()), **PRODUCTION))
    assert (first["event"], second["event"]) == ("Task exception was never retrieved", "Exception in callback f")
    assert second["exception"] == "ValueError"


def test_a_warning_is_named_and_not_repeated(configured: Lines):
    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("input_value='Lovelace'", UserWarning, stacklevel=1)

    lines = configured(work, **PRODUCTION)
    assert re.search(r"test_logs\.py:\d+: UserWarning$", only(lines)["event"])


def test_a_command_that_fails_unexpectedly_repeats_no_setting(
    switchboard: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
):
    def fail(url: str) -> None:
        raise ValueError(url)

    monkeypatch.setattr(migrations, "migrate", fail)
    done = switchboard("migrate", DATABASE_URL="postgresql://me:Lovelace@h/x", REDIS_URL="redis://x")
    assert done.code == 1
    assert done.err.startswith("switchboard: ValueError\n")
    assert "Lovelace" not in done.out + done.err


# The whole of it: processes, through which secrets and somebody's data go in every place that there is


def mark(what: str) -> str:
    """Something that nobody else writes, and that looks like nothing that is taken out."""
    return f"mark-{what}-{uuid4().hex[:12]}"


def marks() -> dict[str, str]:
    """What must not be found: settings under their names, and what is sent."""
    settings = (
        "HAPPYROBOT_X_API_KEY",
        "HAPPYROBOT_CALLBACK_KEY",
        "HAPPYROBOT_API_KEY",
        "APP_SECRET",
        "APP_SECRET_PREVIOUS",
        "database password",
        "redis password",
    )
    sent = (
        "hook key",
        "hook secret",
        "wrong key",
        "name",
        "context",
        "transcript",
        "idempotency key",
        "webhook id",
        "query",
        "path",
        "malformed",
        "webhook secret",
        "webhook path",
        "resume path",
        "comment",
    )
    found = {what: mark(what.lower().replace(" ", "-").replace("_", "-")).ljust(40, "0") for what in settings + sent}
    return found | {"phone": f"+1555{random.randrange(10**7):07}"}


def forms(marked: str) -> set[str]:
    """How it may be written."""
    # Of a token, what makes it one is its last part.
    return {marked, quote(marked, safe=""), quote_plus(marked), marked.lstrip("+"), marked.rpartition(".")[2]}


class Watched:
    """A command beside this one, all of whose output is kept."""

    def __init__(self, folder: Path, *command: str, **variables: str) -> None:
        self._out, self._err = (folder / f"{command[0]}.{stream}" for stream in ("out", "err"))
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "switchboard", *command, "--leave-with-stdin"],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env=os.environ | variables,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def address(self) -> str:
        until(lambda: "listens on http" in self.out or self._process.poll() is not None)
        assert self._process.poll() is None, self.err
        return self.out.split()[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        assert self._process.returncode == 0, self.err


Step = dict[str, Any]


def post(url: str, **more: Any) -> Step:
    return {"method": "POST", "url": url, **more}


def get(url: str, **more: Any) -> Step:
    return {"method": "GET", "url": url, **more}


TRIGGER, CALLBACK, RUNS = "/api/happyrobot/trigger", "/api/webhooks/happyrobot", "/api/happyrobot/runs"
EXECUTE = f"{PUBLIC}/agents/default/execute"

FAULTS = ("answer=400", "answer=500", "answer=503", "answer=garbage", "answer=no_runs", "disconnect", "hang")


def payload(marked: dict[str, str], **more: Any) -> dict[str, Any]:
    return {
        "context_id": marked["context"],
        "name": marked["name"],
        "description": f"call {marked['phone']}",
        "phone_number": marked["phone"],
        "notes": [{"transcript": marked["transcript"]}],
        **more,
    }


def credentials(marked: dict[str, str]) -> list[Step]:
    """Good ones and wrong ones, wherever they may stand."""
    key, token = marked["API key"], marked["browser token"]
    headers = [
        {"X-API-KEY": marked["wrong key"]},
        *({"Authorization": f"Bearer {each}"} for each in (marked["wrong key"], key, key[:-1], token, token + "x")),
        {"Authorization": f"Basic {marked['wrong key']}"},
        *({"Cookie": f"switchboard_token={each}"} for each in (marked["wrong key"], token)),
    ]
    queries = [{"access_token": each} for each in (marked["wrong key"], key, token, token + "x")]
    return [{"headers": each} for each in headers] + [{"params": each} for each in queries]


def steps(marked: dict[str, str], run_id: str) -> list[Step]:
    """What is asked of the service. Whatever is secret from now on has its mark in `marks`, and its steps here."""
    context, name, transcript, query = (marked[what] for what in ("context", "name", "transcript", "query"))
    good = {"X-API-KEY": marked["HAPPYROBOT_CALLBACK_KEY"]}
    once = {"Idempotency-Key": marked["idempotency key"]}
    broken = f'{{"name": "{marked["malformed"]}", "phone": {marked["phone"]}'.encode()
    said = {"transcript": [{"role": "user", "content": f"{transcript} {marked['phone']}"}]}
    event = {"run_id": run_id, "event_type": "log", "data": said}
    strange = f"/api/{marked['path']}/{quote(marked['phone'])}?access_token={query}"
    return [
        post(TRIGGER, json=payload(marked), headers=once),
        post(TRIGGER, json=payload(marked), headers=once),
        post(TRIGGER, json=payload(marked, more=1), headers=once),
        post(TRIGGER, json=payload(marked, workflow_id="marked")),
        post(TRIGGER, json=payload(marked, workflow_id=name)),
        post(TRIGGER, json=payload(marked, context_id=1)),
        post(TRIGGER, json=payload(marked, name={name: transcript}, context_id=context + "\x00")),
        post(TRIGGER, json=[payload(marked)]),
        post(TRIGGER, json=payload(marked, large=transcript * 30_000), headers={"Connection": "close"}),
        post(TRIGGER, content=broken),
        post(CALLBACK, json=event, headers=good | {"X-Webhook-Id": marked["webhook id"]}),
        post(CALLBACK, json=event | {"event_type": name, "timestamp": transcript}, headers=good),
        post(CALLBACK, json=event | {"run_id": context}, headers=good),
        post(CALLBACK, json=event | {"run_id": [transcript]}, headers=good),
        post(CALLBACK, content=broken, headers=good),
        *(post(CALLBACK, json=event, **each) for each in credentials(marked)),
        *(post(TRIGGER, json=payload(marked, workflow_id="none"), **each) for each in credentials(marked)),
        *(get(RUNS, **each) for each in credentials(marked)),
        get(f"{RUNS}/{run_id}"),
        *(get(f"{RUNS}/{run_id}/{what}") for what in ("events", "details", "recordings")),
        post(f"{RUNS}/{run_id}/cancel"),
        get(f"{RUNS}/{context}"),
        get(RUNS, params={"context_id": context, "limit": query}),
        get(RUNS, params={"cursor": query, "status": query}),
        get(f"/api/happyrobot/status?run_id={run_id}"),
        get("/api/happyrobot/status", params={"run_id": query}),
        get("/api/events", params={"run_id": query, "token": query}),
        get("/api/events", params={"context_id": context, "last_event_id": query}),
        get(strange),
        post(strange, json=payload(marked)),
        {"method": "DELETE", "url": f"{RUNS}?token={query}"},
        *of_a_website(marked),
    ]


def of_a_website(marked: dict[str, str]) -> list[Step]:
    """What is asked of the Public API."""
    website = {"Authorization": f"Bearer {marked['website key']}"}
    once = website | {"Idempotency-Key": marked["idempotency key"]}
    body = {"input": payload(marked), "description": marked["transcript"], "contextId": marked["context"]}
    return [
        post(EXECUTE, json=body, headers=once),
        post(EXECUTE, json=body, headers=once),
        post(EXECUTE, json=body | {"description": marked["name"]}, headers=once),
        post(EXECUTE, json=body | {"contextId": [marked["context"]]}, headers=website),
        post(EXECUTE, json=body | {"input": {"csvData": [marked["name"]]}}, headers=website),
        post(f"{PUBLIC}/agents/{marked['path']}/execute", json=body, headers=website),
        *(post(EXECUTE, json=body, **each) for each in credentials(marked)),
        get(f"{PUBLIC}/executions/{marked['path']}/status", headers=website),
        get(f"{PUBLIC}/{marked['path']}", headers=website, params={"token": marked["query"]}),
        get(f"{PUBLIC}/deliveries", headers=website, params={"executionId": marked["query"]}),
        post(f"{PUBLIC}/deliveries/{marked['path']}/redeliver", headers=website),
    ]


def let_a_website_decide(http: httpx.Client, marked: dict[str, str], upstream: str) -> list[tuple[int, str]]:
    """An approval from its request to a decision that HappyRobot refuses."""
    website = {"Authorization": f"Bearer {marked['website key']}"}
    # It says nothing, and waits for somebody who never comes.
    body = {"input": payload(marked, simulate={"faults": "silent", "approval": True})}
    execution = f"{PUBLIC}/executions/{http.post(EXECUTE, json=body, headers=website).json()['executionId']}"

    def status() -> str:
        return str(http.get(f"{execution}/status", headers=website).json()["status"])

    until(lambda: status() == "running")
    runs = http.get(RUNS, params={"limit": "1000"}).json()
    run_id = next(run["runId"] for run in runs if run["executionId"] == execution.rpartition("/")[2])
    asked = {
        "run_id": run_id,
        "event_type": "pending_approval",
        "data": {"rows": [{"name": marked["name"]}], "metadata": {"requireComment": True}},
        "resume_url": f"{upstream}/resume/{marked['resume path']}",
    }
    answer = http.post(CALLBACK, json=asked, headers={"X-API-KEY": marked["HAPPYROBOT_CALLBACK_KEY"]})
    assert answer.status_code == 200, answer.text
    comment = {"comment": marked["comment"]}
    wanted = [
        post(f"{execution}/approve", json={"comment": " ", "approvalId": None}, headers=website),
        post(f"{execution}/approve", json={"comment": [marked["comment"]]}, headers=website),
        post(f"{execution}/approve", json=comment | {"approvalId": marked["query"]}, headers=website),
        post(f"{execution}/approve", json=comment, headers=website),
        post(f"{execution}/reject", json=comment, headers=website),
    ]
    return [found for step in wanted for found in ask(http, [step])]


def ask(http: httpx.Client, wanted: Sequence[Step]) -> list[tuple[int, str]]:
    """Statuses and what the service says of errors; what it answers otherwise is the data itself."""

    def one(step: Step) -> tuple[int, str]:
        # A body that is too large may be cut off while it is sent.
        with contextlib.suppress(httpx.TransportError), http.stream(**step) as answer:
            return answer.status_code, answer.read().decode() if answer.is_error else ""
        return 0, ""

    with ThreadPoolExecutor(8) as together:
        return list(together.map(one, wanted))


def send_nonsense(address: str, marked: dict[str, str]) -> str:
    """What is no HTTP."""
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(f"GET /{marked['path']} HTTP/x\r\nX-API-KEY {marked['wrong key']}\r\n\r\n".encode())
        return connection.makefile(errors="replace").read()


def with_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or 'postgres'}:{password}@{host}"))


@pytest.fixture
def own_database_url(servers: Servers, template: str) -> Iterator[str]:
    name = f"logs_{uuid4().hex}"
    asyncio.run(run_sql(servers.database_url, f"CREATE DATABASE {name} TEMPLATE {template}"))
    yield with_database(servers.database_url, name)
    asyncio.run(run_sql(servers.database_url, f"DROP DATABASE {name} WITH (FORCE)"))


@contextlib.contextmanager
def broken(url: str, *changes: tuple[str, str]) -> Iterator[None]:
    """Changes the database under the service, and puts it back."""
    asyncio.run(run_sql(url, *(change for change, _ in changes)))
    yield
    asyncio.run(run_sql(url, *(undo for _, undo in changes)))


AWAY = ("ALTER TABLE agent_runs RENAME TO away", "ALTER TABLE away RENAME TO agent_runs")


def refusing(table: str, column: str, word: str) -> tuple[str, str]:
    """A constraint: when it is violated, PostgreSQL repeats the row."""
    check = f"CHECK (coalesce({column}::text, '') NOT LIKE '%{word}%') NOT VALID"
    return f"ALTER TABLE {table} ADD CONSTRAINT refusing {check}", f"ALTER TABLE {table} DROP CONSTRAINT refusing"


def until(condition: Callable[[], bool], *, within: float = 60) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def make_keys(switchboard: Callable[..., Said], marked: dict[str, str]) -> str:
    """Makes the API keys, which have no marks of their own; returns what is said beside them."""
    reported = f"https://127.0.0.1:1/{marked['webhook path']}?token={marked['webhook path']}"
    with_webhook = ("--burst", "100000", "--webhook-url", reported, "--webhook-secret", "-")
    said = ""
    for name, scope, more in (("API key", "app", ()), ("website key", "public", with_webhook)):
        made = switchboard(
            *("keys", "create", "--name", "marked", "--scope", scope, "--json", *more),
            stdin=marked["webhook secret"],
        )
        assert made.code == 0, made.err
        marked[name] = json.loads(made.out)["key"]
        said += made.err
    return said


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Takes the traces, also those that FastAPI might send by itself."""
    with (
        collecting() as collector,
        local.environment(OTEL_EXPORTER_OTLP_ENDPOINT=collector.address, FASTAPI_OTEL_AUTO_CONFIGURE="true"),
    ):
        yield collector


TRACED = {f"POST {TRIGGER}", f"POST {CALLBACK}", f"GET {RUNS}", "POST 127.0.0.1", "INSERT", "job start", "job deliver"}


@pytest.mark.parametrize("environment", ["development", "production"])
def test_no_secret_and_nobody_s_data_is_found_in_a_log_or_an_error(
    servers: Servers,
    own_database_url: str,
    tmp_path: Path,
    switchboard: Callable[..., Said],
    collector: Collector,
    environment: str,
):
    marked = marks()
    production = environment == "production"
    variables = {name: value for name, value in marked.items() if name.isupper()} | {
        "DATABASE_URL": with_password(own_database_url, marked["database password"]),
        # In development it is away.
        "REDIS_URL": servers.redis_url if production else f"redis://:{marked['redis password']}@127.0.0.1:1/0",
        "HAPPYROBOT_TRIGGER_TIMEOUT": "2",
        "HAPPYROBOT_API_PACE": "1000",
        "RECONCILE_AFTER": "0.2",
        "LOG_LEVEL": "debug",
    }
    more = {"ENVIRONMENT": "production", "APP_URL": "https://127.0.0.1:1", "ALLOW_ANONYMOUS": "true"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(local.environment(**variables))
        simulator = stack.enter_context(Watched(tmp_path, "simulate", "--port", "0", "--pace", "0.05"))
        upstream = simulator.address
        hook = f"{upstream}/hooks/x?secret={marked['hook secret']}"
        stack.enter_context(local.environment(HAPPYROBOT_WEBHOOK_URL=hook, HAPPYROBOT_API_URL=f"{upstream}/api/v1"))
        arguments = ["--workers", "2"] if production else []
        service = stack.enter_context(
            Watched(tmp_path, "serve", "--port", "0", *arguments, **(more if production else {}))
        )
        added = switchboard(
            "workflows", "add", "marked", "--hook-url", hook, "--hook-key", "-", stdin=marked["hook key"]
        )
        assert added.code == 0, added.err
        said_of_keys = make_keys(switchboard, marked)
        http = stack.enter_context(httpx.Client(base_url=service.address, timeout=20))
        as_key = {"Authorization": f"Bearer {marked['API key']}"}
        answer = http.post("/api/happyrobot/tokens", json={"context_ids": [marked["context"]]}, headers=as_key)
        marked["browser token"] = answer.json()["token"]

        def start(fault: str) -> str:
            answer = http.post(TRIGGER, json=payload(marked, simulate={"faults": fault}))
            assert answer.status_code == 200, answer.text
            return str(answer.json()["run_ids"][0])

        answers = ask(http, [post(TRIGGER, json=payload(marked, simulate={"faults": fault})) for fault in FAULTS])
        answers += ask(http, steps(marked, start("api_answer=500")))
        usual = steps(marked, start("api_answer=401,silent"))
        answers += ask(http, usual)
        assert marked["name"] in http.get(RUNS).text, "nothing came through"
        decided = let_a_website_decide(http, marked, upstream)
        assert [code for code, _ in decided] == [400, 400, 409, 200, 409], decided
        answers += decided
        until(lambda: "webhook not delivered" in service.err and "decision is refused" in service.err)
        with broken(
            own_database_url,
            refusing("executions", "input", marked["transcript"]),
            refusing("run_events", "data", marked["transcript"]),
        ):
            answers += ask(http, usual)
        with broken(own_database_url, AWAY):
            answers += ask(http, usual)
            until(lambda: "job failed" in service.err)
        nonsense = send_nonsense(service.address, marked)

    statuses = {status for status, _ in answers}
    assert {200, 400, 401, 404, 405, 422, 500, 502} <= statuses, statuses
    expected = [
        "execution unconfirmed",
        "HappyRobot refuses HAPPYROBOT_API_KEY",
        "sqlstate 23514, table executions, constraint refusing",
        "sqlstate 42P01",
    ]
    if not production:
        expected.append("Redis is away")
    assert [sentence for sentence in expected if sentence not in service.err] == []
    assert "gave up the callback" in simulator.err
    assert {span.name for span in collector.spans} >= TRACED
    if production:
        for line in service.err.splitlines():
            assert {"timestamp", "level", "logger", "event"} <= json.loads(line).keys(), line
    places = {
        "the service's output": service.out,
        "the service's log": service.err,
        "the simulator's output": simulator.out,
        "the simulator's log": simulator.err,
        "what is said of a workflow": added.out + added.err,
        "what is said of keys": said_of_keys,
        "what is said of webhooks": switchboard("deliveries", "list", "--json").out,
        "an answer": "\n".join(text for _, text in answers) + nonsense,
        "a trace": collector.raw.decode(errors="replace"),
    }
    found = [
        (what, place, text[max(0, text.find(form) - 300) : text.find(form) + 100])
        for place, text in places.items()
        for what, value in marked.items()
        for form in forms(value)
        if form in text
    ]
    assert found == []
