"""Sending a webhook once: what is refused, what is not believed, and what an endpoint cannot do to us."""

import asyncio
import contextlib
import gzip
import socket
import ssl
import threading
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from switchboard.deliveries import names, sender
from switchboard.deliveries.sender import Attempt, Sender, is_public
from tests.conftest import settings_for
from tests.receiver import Receiver, Request, never, receiving, reply, statuses

NOWHERE = "3ffe::1"
"""Looks public, and has not been anybody's since 2006."""


@contextlib.asynccontextmanager
async def sending(*, private: bool = False, production: bool = False) -> AsyncIterator[Sender]:
    """A sender; only one that may send to private addresses reaches the receivers of these tests."""
    settings = settings_for("postgresql://none", "redis://none", None, allow_private_webhooks=private)
    environment = "production" if production else "development"
    made = Sender(settings.model_copy(update={"environment": environment}))
    yield made
    await made.aclose()


async def send(url: str, *, private: bool = False, production: bool = False) -> Attempt:
    async with sending(private=private, production=production) as made:
        return await made.send(url, {"X-Test": "yes"}, b'{"a": 1}')


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less of it, so that tests need not wait."""
    monkeypatch.setattr(sender, "TIMEOUT", 0.5)


# --- where nothing is sent to ---


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "127.8.8.8",
        "0x7f000001",
        "2130706433",
        "017700000001",
        "0",
        "0.0.0.0",
        "localhost",
        "LOCALHOST",
        "user:password@127.0.0.1",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
    ],
)
async def test_nothing_is_sent_to_this_machine_however_it_is_written(receiver: Receiver, host: str):
    attempt = await send(f"http://{host}:{receiver.port}/hook")
    assert attempt.error is not None
    assert attempt.error.startswith("refused: ")
    assert attempt.error.endswith(" is not an address on the internet")
    assert (attempt.status_code, attempt.response, attempt.delivered) == (None, None, False)
    assert receiver.connections == 0, "not even asked whether anybody is there"


async def test_nothing_is_sent_to_this_machine_by_ipv6():
    async with receiving(host="::1") as receiver:
        attempt = await send(receiver.url)
        assert attempt.error == "refused: ::1 is not an address on the internet"
        assert receiver.connections == 0
        # The receiver is one that could be reached.
        assert (await send(receiver.url, private=True)).delivered


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",  # the clouds' metadata
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",  # shared by a provider's customers
        "224.0.0.1",  # multicast
        "239.255.255.250",
        "255.255.255.255",
        "240.0.0.1",
        "0.0.0.0",
        "192.0.2.1",
        "198.18.0.1",
        "::",
        "::1",
        "::ffff:10.0.0.1",  # IPv4, mapped
        "::ffff:169.254.169.254",
        "::ffff:0:10.0.0.1",  # translated
        "::10.0.0.1",  # compatible
        "2002:a00:1::",  # 6to4
        "2002:808:808::1",  # of a public one, whose relay would be anybody
        "2001:0:a00:1::",  # Teredo
        "64:ff9b::10.0.0.1",  # NAT64
        "64:ff9b::8.8.8.8",
        "64:ff9b:1::10.0.0.1",
        "fe80::1",
        "fec0::1",
        "fd00:ec2::254",  # the metadata of one cloud
        "fc00::1",
        "ff02::1",  # multicast
        "ff0e::1",
        "100::1",
        "2001:db8::1",
        "3fff::1",
        "4000::1",  # nobody's so far
    ],
)
async def test_nothing_is_sent_to_an_address_that_is_not_on_the_internet(address: str):
    assert not is_public(ip_address(address))
    host = f"[{address}]" if ":" in address else address
    attempt = await send(f"http://{host}/latest/meta-data/")
    assert attempt.error == f"refused: {address} is not an address on the internet"


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "::ffff:8.8.8.8", "2606:4700::1111", "2a00:1450::1"])
def test_an_address_on_the_internet_is_one(address: str):
    assert is_public(ip_address(address))


Leads = dict[str, list[Sequence[str]]]


@pytest.fixture
def leads(monkeypatch: pytest.MonkeyPatch) -> Leads:
    """Where names lead: to these addresses at the first look, to those at the next, then always as at the last."""
    leads: Leads = {}
    genuine = names.look_up

    def look(host: str) -> list[names.Address]:
        if host not in leads:
            return genuine(host)
        found = leads[host].pop(0) if len(leads[host]) > 1 else leads[host][0]
        return [ip_address(address) for address in found]

    monkeypatch.setattr(names, "look_up", look)
    return leads


async def test_nothing_is_sent_to_a_name_that_leads_to_a_private_address(receiver: Receiver, leads: Leads):
    leads["inside.example"] = [["127.0.0.1"]]
    attempt = await send(f"http://inside.example:{receiver.port}/")
    # Without the address, which is nobody's business.
    assert attempt.error == "refused: inside.example is not an address on the internet"
    assert receiver.connections == 0
    # The receiver is one that this name leads to.
    assert (await send(f"http://inside.example:{receiver.port}/", private=True)).delivered
    assert receiver.requests[0].headers["Host"] == f"inside.example:{receiver.port}"


async def test_a_name_is_looked_up_once_and_what_it_leads_to_afterwards_does_not_matter(
    receiver: Receiver, leads: Leads
):
    leads["rebinding.example"] = [[NOWHERE], ["127.0.0.1"]]
    attempt = await send(f"http://rebinding.example:{receiver.port}/")
    assert attempt.error is not None
    assert (receiver.connections, receiver.requests) == (0, [])
    assert leads["rebinding.example"] == [["127.0.0.1"]], "not looked up again"


async def test_the_address_that_is_connected_to_is_looked_at_too(receiver: Receiver, monkeypatch: pytest.MonkeyPatch):
    """Should anything that is decided beforehand go wrong."""

    async def anything(*_: Any) -> list[names.Address]:
        return [ip_address("127.0.0.1")]

    monkeypatch.setattr(Sender, "_addresses", anything)
    attempt = await send(f"http://public.example:{receiver.port}/")
    assert attempt.error == "refused: 127.0.0.1 is not an address on the internet"
    assert (receiver.seen, receiver.requests) == (b"", [])


@pytest.mark.parametrize("order", [[NOWHERE, "127.0.0.1"], ["127.0.0.1", NOWHERE]])
async def test_a_private_address_that_stands_beside_a_public_one_is_not_even_connected_to(
    receiver: Receiver, leads: Leads, order: list[str]
):
    leads["both.example"] = [order]
    attempt = await send(f"http://both.example:{receiver.port}/")
    assert attempt.error is not None
    assert not attempt.error.startswith("refused"), "the public one was tried"
    assert receiver.connections == 0


async def test_of_several_addresses_the_one_where_somebody_listens_is_taken(receiver: Receiver, leads: Leads):
    leads["several.example"] = [["127.0.0.2", "127.0.0.1"]]
    assert (await send(f"http://several.example:{receiver.port}/", private=True)).delivered
    leads["several.example"] = [["127.0.0.2", "127.0.0.3"]]
    attempt = await send(f"http://several.example:{receiver.port}/", private=True)
    assert attempt.error is not None
    assert attempt.error.startswith("ConnectError")


async def test_cookies_of_one_customer_reach_no_other(leads: Leads):
    async def feed(_: Request, writer: asyncio.StreamWriter) -> None:
        await reply(writer, 200, b"", {"Set-Cookie": "session=evil; Domain=.hosting.example; Path=/"})

    leads["a.hosting.example"] = leads["b.hosting.example"] = [["127.0.0.1"]]
    async with receiving(feed) as receiver, sending(private=True) as made:
        for name in "ab":
            assert (await made.send(f"http://{name}.hosting.example:{receiver.port}/", {}, b"{}")).delivered
    assert [("cookie" in request.headers) for request in receiver.requests] == [False, False]


async def test_a_name_server_that_does_not_answer_holds_up_nobody_else(
    receiver: Receiver, patience: None, monkeypatch: pytest.MonkeyPatch
):
    genuine, answers = names.look_up, threading.Event()

    def look(host: str) -> list[names.Address]:
        if host.startswith("dead"):
            answers.wait()
        return genuine(host)

    monkeypatch.setattr(names, "look_up", look)
    async with sending(private=True) as made:
        dead = [asyncio.ensure_future(made.send(f"http://dead{n % 50}.example/", {}, b"")) for n in range(100)]
        others = made.send(f"http://localhost:{receiver.port}/", {}, b"")
        # Not only other customers': the loop's own look-ups are HappyRobot's and PostgreSQL's.
        own = asyncio.get_running_loop().getaddrinfo("localhost", 80)
        delivered, found = await asyncio.gather(others, own)
        assert delivered.delivered
        assert found
        assert {(await each).error for each in dead} == {"no answer within 0.5 seconds"}
        started = [thread for thread in threading.enumerate() if thread.name == "names"]
        assert len(started) == 50, "one for each name"
        answers.set()


async def test_a_name_for_which_there_was_no_thread_is_looked_up_the_next_time(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
):
    def no_more(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    async with sending(private=True) as made:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_more)
            attempt = await made.send(receiver.url, {}, b"")
        assert attempt.error == "too many names are being looked up"
        assert (await made.send(receiver.url, {}, b"")).delivered


async def test_names_that_are_looked_up_are_counted(monkeypatch: pytest.MonkeyPatch, patience: None):
    answers = threading.Event()

    def look(_: str) -> list[names.Address]:
        answers.wait()
        return []

    monkeypatch.setattr(names, "look_up", look)
    monkeypatch.setattr(names, "_AT_ONCE", 2)
    async with sending() as made:
        attempts = await asyncio.gather(*(made.send(f"https://n{n}.example/", {}, b"") for n in range(3)))
        answers.set()
    assert sorted(str(attempt.error) for attempt in attempts) == [
        "no answer within 0.5 seconds",
        "no answer within 0.5 seconds",
        "too many names are being looked up",
    ]


async def test_a_redirect_is_not_followed(receiver: Receiver):
    for status in (301, 302, 303, 307, 308):

        async def elsewhere(_: Request, writer: asyncio.StreamWriter, status: int = status) -> None:
            await reply(writer, status, b"over there", {"Location": receiver.url})

        async with receiving(elsewhere) as first:
            attempt = await send(first.url, private=True)
        assert attempt.error == f"answered {status}: redirects are not followed"
        assert (attempt.status_code, attempt.response) == (status, "over there")
        assert len(first.requests) == 1
    assert receiver.connections == 0


@pytest.mark.parametrize("scheme", ["http", "HTTP", "hTtP"])
async def test_nothing_is_sent_in_the_clear_in_production(receiver: Receiver, scheme: str):
    url = receiver.url.replace("http", scheme, 1)
    attempt = await send(url, private=True, production=True)
    assert attempt.error == "refused: only https:// addresses are sent to in production"
    assert receiver.connections == 0
    assert (await send(url, private=True)).delivered, "as it is elsewhere"


def certificate(folder: Path) -> ssl.SSLContext:
    """A server's, for `localhost`, that nobody has signed but itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "pair.pem").write_bytes(key.private_bytes(*form) + made.public_bytes(form[0]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "pair.pem")
    return context


async def test_an_endpoint_must_show_that_it_is_the_one(tmp_path: Path):
    async with receiving(tls=certificate(tmp_path)) as receiver:
        attempt = await send(receiver.url.replace("127.0.0.1", "localhost"), private=True, production=True)
        assert attempt.error is not None
        assert "CERTIFICATE_VERIFY_FAILED" in attempt.error
        assert receiver.seen == b""


async def test_a_proxy_of_the_environment_is_not_asked(receiver: Receiver, monkeypatch: pytest.MonkeyPatch):
    async with receiving() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert (await send(receiver.url, private=True)).delivered
        assert proxy.connections == 0
    assert len(receiver.requests) == 1


# --- what came of it ---


async def test_what_was_sent_and_answered_is_told_as_it_is(receiver: Receiver):
    async def answer(_: Request, writer: asyncio.StreamWriter) -> None:
        await reply(writer, 201, "schön \0".encode() + b"\xff")

    receiver.answer = answer
    before = datetime.now(UTC)
    attempt = await send(receiver.url, private=True)
    assert before <= attempt.started_at <= datetime.now(UTC)
    assert 0 <= attempt.duration_ms < 60_000
    assert (attempt.status_code, attempt.error, attempt.delivered) == (201, None, True)
    assert attempt.response == "schön ��", "PostgreSQL takes no NUL"
    (request,) = receiver.requests
    assert request.line == "POST /hooks?of=mine HTTP/1.1"
    assert request.body == b'{"a": 1}'
    assert request.headers["X-Test"] == "yes"


@pytest.mark.parametrize("status", [400, 404, 410, 429, 500, 503, 304])
async def test_an_answer_other_than_2xx_is_a_failure(receiver: Receiver, status: int):
    async def no(_: Request, writer: asyncio.StreamWriter) -> None:
        await reply(writer, status, b"" if status == 304 else b"no")

    receiver.answer = no
    attempt = await send(receiver.url, private=True)
    assert (attempt.status_code, attempt.error) == (status, f"answered {status}")
    assert len(receiver.requests) == 1


async def test_only_the_beginning_of_an_answer_is_kept(receiver: Receiver):
    async def long(_: Request, writer: asyncio.StreamWriter) -> None:
        await reply(writer, 500, b"0123456789" * 1000)

    receiver.answer = long
    assert (await send(receiver.url, private=True)).response == "0123456789" * 100


# --- what an endpoint may do to us ---


async def stay(writer: asyncio.StreamWriter, chunk: bytes, pause: float) -> None:
    while True:
        writer.write(chunk)
        await writer.drain()
        await asyncio.sleep(pause)


async def trickling_head(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    await stay(writer, b"X-A: b\r\n", 0.05)


async def never_quite(_: Request, writer: asyncio.StreamWriter) -> None:
    """Says that it is about to answer, for ever."""
    await stay(writer, b"HTTP/1.1 102 Processing\r\n\r\n", 0.001)


@pytest.mark.parametrize("answer", [never, trickling_head, never_quite], ids=lambda each: each.__name__)
async def test_an_endpoint_that_never_comes_to_an_end_is_given_up(receiver: Receiver, patience: None, answer: Any):
    receiver.answer = answer
    async with asyncio.timeout(8):  # less than the ten seconds that it usually has
        attempt = await send(receiver.url, private=True)
    assert attempt.error == "no answer within 0.5 seconds"
    assert 500 <= attempt.duration_ms < 8_000
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(("status", "error"), [(200, None), (500, "answered 500")])
async def test_who_has_answered_has_answered_though_the_rest_never_comes(
    receiver: Receiver, patience: None, status: int, error: str | None
):
    async def trickling_body(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 100000\r\n\r\n" % status)
        await stay(writer, b".", 0.05)

    receiver.answer = trickling_body
    attempt = await send(receiver.url, private=True)
    assert (attempt.status_code, attempt.error) == (status, error)
    assert 500 <= attempt.duration_ms < 8_000


async def test_an_error_is_no_longer_than_can_be_read(receiver: Receiver):
    async def broken(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n" + b"x" * 60_000 + b"\r\n\r\n")

    receiver.answer = broken
    attempt = await send(receiver.url, private=True)
    assert attempt.error is not None
    assert len(attempt.error) <= 500


async def test_an_endpoint_where_nobody_listens_is_a_failure():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        attempt = await send(f"http://127.0.0.1:{silent.getsockname()[1]}/", private=True)
    assert attempt.error is not None
    assert attempt.error.startswith("ConnectError")


async def test_an_answer_of_gigabytes_is_not_read(receiver: Receiver):
    written = 0

    async def endless(_: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8000000000\r\n\r\n")
        while True:
            writer.write(b"z" * 1_000_000)
            await writer.drain()
            written += 1

    receiver.answer = endless
    attempt, most = await measured(receiver.url)
    assert (attempt.status_code, attempt.error, attempt.response) == (200, None, "z" * 1_000)
    assert written < 100, "megabytes that went into the buffers between us"
    assert most < 20_000_000, "with those that the receiver has made"


async def test_an_answer_is_not_unpacked(receiver: Receiver):
    bomb = gzip.compress(gzip.compress(b"\0" * 50_000_000, 1), 9)
    assert len(bomb) < 1_000_000

    async def explode(_: Request, writer: asyncio.StreamWriter) -> None:
        await reply(writer, 200, bomb, {"Content-Encoding": "gzip, gzip"})

    receiver.answer = explode
    attempt, most = await measured(receiver.url)
    assert (attempt.status_code, attempt.error) == (200, None)
    assert attempt.response == bomb[:1_000].decode(errors="replace").replace("\0", "�")
    assert most < 5_000_000


async def measured(url: str) -> tuple[Attempt, int]:
    """An attempt, and the most bytes that Python held during it."""
    async with sending(private=True) as made:
        tracemalloc.start()
        try:
            attempt = await made.send(url, {}, b"{}")
            return attempt, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n",
        b"no HTTP at all\r\n\r\n",
        b"\x00\xff\x00\xff" * 100,
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: \x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
async def test_an_answer_that_is_no_http_is_a_failure(receiver: Receiver, answer: bytes):
    async def broken(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()

    receiver.answer = broken
    attempt = await send(receiver.url, private=True)
    assert attempt.error
    assert not attempt.delivered
    assert "\0" not in attempt.error, "PostgreSQL takes none"
    assert len(attempt.error) < 500
    assert len(receiver.requests) == 1, "sent once"


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com/hook",
        "//example.com/hook",
        "http://",
        "https:///path",
        "https://:443/",
        "http:/\\h/",
        "https://not a name/",
        "https://h:99999/",
        "https://h:-1/",
        "https://h:port/",
        "https://[::1",
        "https://[zz]/",
        "https://[v1.a]/",
        "https://h/\n",
        "https://münchen.invalid/",
        "https://" + "ü" * 70 + ".invalid/",
        "https://" + "a" * 64 + ".invalid/",
        "https://a..invalid/",
        "https://.invalid/",
        "https://xn--/",
        "https://xn--a/",
        "https://\u202e.invalid/",
        "https://\U0001f600.invalid/",
        "https://%zz.invalid/",
        "https://*.invalid/",
        "https://h.invalid/" + "x" * 70_000,
        "ftp://h.invalid/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "mailto:a@b.invalid",
        "unix:///var/run/docker.sock",
        "gopher://127.0.0.1:1/_",
    ],
)
async def test_an_address_that_is_none_is_a_failure_and_no_trouble(patience: None, private: bool, url: str):
    attempt = await send(url, private=private)
    assert attempt.error
    assert not attempt.delivered
    assert len(attempt.error) < 500


async def test_two_attempts_in_a_row_share_no_connection(receiver: Receiver):
    """One that was kept may have been cut in the meantime, which would look like the customer's fault."""

    async def kept_alive(request: Request, writer: asyncio.StreamWriter) -> None:
        await reply(writer)
        await never(request, writer)

    receiver.answer = kept_alive
    async with sending(private=True) as made:
        assert [(await made.send(receiver.url, {}, b"{}")).error for _ in range(2)] == [None, None]
    assert receiver.connections == 2


async def test_an_attempt_does_not_wait_for_others(receiver: Receiver):
    receiver.answer = never
    async with receiving(statuses(204)) as other, sending(private=True) as made:
        stuck = [asyncio.create_task(made.send(receiver.url, {}, b"{}")) for _ in range(150)]
        await receiver.took(150)
        assert (await made.send(other.url, {}, b"{}")).status_code == 204
        assert not any(task.done() for task in stuck)
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
