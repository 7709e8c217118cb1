"""The log: whatever is sent, each thing that happens is one line, and nobody else writes one."""

import asyncio
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from urllib.parse import quote

import httpx
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from switchboard import logs
from switchboard.access import webhooks
from switchboard.errors import PUBLIC
from switchboard.settings import Settings
from switchboard.tables import KeyScope
from tests.conftest import Servers, Service, new_key, running_service, settings_for, until
from tests.hostile.examples import examples
from tests.receiver import Request, receiving
from tests.test_protocol import connected

FORMATS = ["development", "production"]
LINE_ENDS = ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x1e", "\x85", "\u2028", "\u2029", "\x1b[1K\r", "\x00", "\u202e"]
FORGED = {
    "development": "2001-01-01T00:00:00.000Z [error    ] forged",
    "production": '{"timestamp": "2001-01-01T00:00:00.000Z", "level": "error", "logger": "x", "event": "forged"}',
}
"""Lines as they would look if they were real."""

log = structlog.stdlib.get_logger("switchboard.somewhere")
library = logging.getLogger("somebody.else")


class Written:
    """What is written to standard error."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def __str__(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text

    def forget(self) -> None:
        self._capsys.readouterr()
        self._text = ""


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Written]:
    """Keeps what is written, and leaves the log as it was."""
    root = logging.getLogger()
    handlers = [*root.handlers]
    yield Written(capsys)
    for handler in [each for each in root.handlers if each not in handlers]:
        root.removeHandler(handler)
    logging.captureWarnings(False)
    for name in ("", "switchboard"):
        logging.getLogger(name).setLevel(logging.WARNING)


def configure(environment: str) -> None:
    settings = Settings(log_level="debug")
    logs.configure(settings.model_copy(update={"environment": environment}))


def lines_of(text: str, environment: str) -> list[str]:
    """The lines of a log, by everything that anybody takes for the end of one."""
    lines = text.splitlines()
    assert text == "".join(f"{line}\n" for line in lines), "no other line ends"
    assert all(map(str.isprintable, lines)), "and nothing that a terminal would act upon"
    for line in lines:
        if environment == "production":
            assert json.loads(line).keys() >= {"timestamp", "level", "logger", "event"}
            assert json.loads(line)["event"] != "forged"
        else:
            assert not line.startswith("2001")
    return lines


ODD = st.text(max_size=30) | st.lists(st.sampled_from(LINE_ENDS) | st.sampled_from([*FORGED.values()]), max_size=4).map(
    "".join
)


def fail(error: Exception) -> None:
    raise error


def raised(text: str) -> None:
    """Logs an exception and its cause, each with a message of somebody else's."""
    try:
        try:
            fail(AttributeError(text))
        except AttributeError as error:
            raise RuntimeError(text) from error
    except RuntimeError:
        log.exception("it failed", told=text)


WAYS: dict[str, Callable[[str], None]] = {
    "a field": lambda text: log.warning("it happened", run_id=text),
    "a part of a field": lambda text: log.warning("it happened", run_ids=[text, {text: text}]),
    "a library's message": lambda text: library.warning(f"it happened {text}"),
    "a library's argument": lambda text: library.warning("it happened %s", text),
    "an error in a field": lambda text: log.warning("it happened", error=RuntimeError(text)),
}


@pytest.mark.parametrize("environment", FORMATS)
@pytest.mark.parametrize("way", WAYS)
@examples(20)
@given(text=ODD)
def test_whatever_is_logged_is_one_line(written: Written, way: str, environment: str, text: str):
    configure(environment)
    written.forget()
    WAYS[way](text)
    assert len(lines_of(str(written), environment)) == 1


@pytest.mark.parametrize("environment", FORMATS)
@examples(20)
@given(text=ODD)
def test_an_exception_has_as_many_lines_as_it_has_places(written: Written, environment: str, text: str):
    configure(environment)
    written.forget()
    raised(text)
    found = len(lines_of(str(written), environment))
    written.forget()
    raised("as usual")
    assert found == len(lines_of(str(written), environment))


# Wherever somebody can say something.


def forged(environment: str) -> list[str]:
    """A line, behind what ends the one before it somewhere."""
    ends = ["\n", "\r\n", "\r", "\x85", "\u2028", "\x1b[1K\r"]
    return [f"x{end}{FORGED[environment]}{end}" for end in ends]


def heads(text: str) -> list[bytes]:
    """Requests that say it wherever a head says something. Some are none, which is for the parser to find out."""
    raw = text.encode()
    names = [
        *("X-Request-ID", "User-Agent", "Referer", "Host", "Origin", "Cookie", "Authorization", "traceparent"),
        *("X-Forwarded-For", "X-Forwarded-Proto", "X-Webhook-Id", "Idempotency-Key", "Last-Event-ID", "Content-Type"),
    ]
    said = [b"GET /api/happyrobot/runs HTTP/1.1\r\nHost: h\r\n%b: %b\r\n" % (name.encode(), raw) for name in names]
    escaped = quote(text, safe="").encode()
    paths = (raw, escaped, b"?x=" + raw, b"?access_token=" + escaped, b"api/happyrobot/runs/" + escaped)
    said += [b"GET /%b HTTP/1.1\r\nHost: h\r\n" % path for path in paths]
    said.append(b"%b /healthz HTTP/1.1\r\nHost: h\r\n" % raw)
    return [head + b"Connection: close\r\n\r\n" for head in said]


async def say(url: str, head: bytes) -> int:
    """How many answers there are: what is smuggled may be a request of its own."""
    async with connected(url) as client:
        with suppress(ConnectionError):
            await client.send(head)
        return (await client.ended()).count(b"HTTP/1.1 ")


def happyrobot(environment: str) -> httpx.MockTransport:
    """HappyRobot, which names its runs as nobody should, and refuses everything else."""
    texts = forged(environment)
    named = (f"{number}{text}" for number in itertools.count() for text in texts)

    def answer(request: httpx.Request) -> httpx.Response:
        if b"callback_url" not in request.content:
            return httpx.Response(409, text=texts[0], headers={"Retry-After": "9"})
        return httpx.Response(200, json={"run_id": next(named)})

    return httpx.MockTransport(answer)


async def refuse(_: Request, writer: asyncio.StreamWriter) -> None:
    """A customer's endpoint, which says what it should not, too."""
    said = "\r\n".join(text for each in FORMATS for text in forged(each)).encode()
    writer.write(b"HTTP/1.1 500 " + said.partition(b"\n")[0] + b"\r\nX: " + said.splitlines()[0] + b"\r\n\r\n" + said)
    await writer.drain()
    writer.close()


@pytest.mark.parametrize("environment", FORMATS)
async def test_no_request_and_no_answer_writes_a_line_of_its_own(
    own_database: str, servers: Servers, written: Written, environment: str
):
    texts = forged(environment)
    settings = settings_for(own_database, servers.redis_url, None, log_level="debug", allow_private_webhooks=True)
    async with (
        receiving(refuse) as customer,
        running_service(settings, happyrobot(environment), worker=True) as service,
    ):
        configure(environment)
        answers = sum([await say(service.url, head) for text in texts for head in heads(text)])
        answers += await say_in_bodies(service, texts, customer.url)
        await until(lambda: "webhook not delivered" in str(written))
        await until(lambda: "decision has nowhere to go" in str(written))
    lines = lines_of(str(written), environment)
    about = [line for line in lines if "request_id" in line and ("refused" in line or "route" in line)]
    assert len(about) == answers, "one line each"


async def say_in_bodies(service: Service, texts: list[str], customer: str) -> int:
    """Says it in the ids and words of callbacks, triggers and decisions; how many answers there were."""
    answers: list[httpx.Response] = []

    async def note(answer: httpx.Response) -> None:
        answers.append(answer)

    service.http.event_hooks["response"].append(note)
    settings, db = service.state["settings"], service.state["db"]
    key_id, website = await new_key(db, KeyScope.PUBLIC, burst=1_000)
    async with db.begin() as conn:
        await webhooks.point(conn, settings, key_id, f"{customer}&{quote(texts[0])}", None, SecretStr("s" * 40))
    for number, text in enumerate(texts):
        told = {"context_id": f"c{number}", "name": text, "workflow_id": text}
        await service.http.post("/api/happyrobot/trigger", json=told)
        started = await service.http.post("/api/happyrobot/trigger", json=told | {"name": "A", "workflow_id": ""})
        for run_id in started.json()["run_ids"]:
            await service.http.post(f"/api/happyrobot/runs/{quote(run_id, safe='')}/cancel")
            asked = {"resume_url": f"https://elsewhere.example/{text}", "execution_id": text}
            await service.callback(run_id, "pending_approval", {"rows": [text]}, **asked)
            await service.callback(run_id, text, text, timestamp=text)
        await service.callback(text, "log", execution_id=text)
        body = {"input": {"more": text}, "contextId": f"of the website {number}"}
        await service.http.post(f"{PUBLIC}/agents/default/execute", json=body, headers=website)
    for approval in (await service.http.get("/api/happyrobot/approvals")).json():
        await service.http.post(f"/api/happyrobot/approvals/{approval['id']}/approve", json={"comment": texts[0]})
    assert {answer.status_code for answer in answers} == {200, 202, 404, 502}
    return len(answers)
