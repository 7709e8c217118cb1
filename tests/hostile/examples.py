"""How many examples a property is tried with, and what nobody should send."""

import json
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_TIMES = int(os.environ.get("EXAMPLES", "1"))
"""`EXAMPLES=100` tries a hundred times as many, drawn anew each time; otherwise they are always the same."""


def examples(number: int) -> settings:
    """Decorates a property that is tried with so many examples."""
    return settings(
        max_examples=number * _TIMES,
        derandomize=_TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def deep(levels: int, inside: bytes = b"") -> bytes:
    """Lists in each other."""
    return b"[" * levels + inside + b"]" * levels


_ODD_TEXTS = [
    b"",
    b" ",
    b"x" * 255,
    b"x" * 256,
    b"x" * 70_000,
    "\N{GRINNING FACE}".encode() * 255,
    rb"\u0000",
    rb"before\u0000behind",
    rb"\\u0000",
    rb"\ud800",
    rb"\udfff\ud800",
    rb"\ud83d\ude00",
    rb"\ufffe\uffff",
    rb"\u2028\u2029\u0085\u001b[2J\r\n",
    rb"\x",
    b"a\x00b",
    b"a\nb",
    b"\xff",
    b"\xc0\x80",  # NUL, in too many bytes
    b"\xed\xa0\x80",  # half an emoji
    b"\xf4\x90\x80\x80",  # beyond all characters
    b"'; DROP TABLE agent_runs; --",
    b"%00",
    b"../../../etc/passwd",
    b"{{7*7}}",
    b"__proto__",
    b"null",
    b"infinity",
    b"-infinity",
    b"now",
    b"0001-01-01T00:00:00Z",
    b"9999-12-31T23:59:60.999999999Z",
    b"2026-13-45T99:99:99Z",
    b"http://[",
    b"https://x.happyrobot.ai:99999/",
    b"[NaN]",
    b'{\\"rows\\": [1e999, {\\"a\\": NaN}], \\"metadata\\": {\\"requireComment\\": 1}}',
    deep(300),
]

ODD_VALUES = [
    *(b'"%b"' % text for text in _ODD_TEXTS),
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e400",
    b"-1e400",
    b"1E+0000400",
    b"1e-400",
    b"1e308",
    b"5e-324",
    b"-0",
    b"-0.0",
    b"0.1",
    b"1.",
    b"01",
    b"+1",
    b"0x1",
    b"1" * 10_000,
    b"9" * 4_300,
    b"-" + b"9" * 4_300,
    b"9" * 4_301,
    b"9" * 400,
    b"9" * 250 + b"e99",
    b"0." + b"3" * 10_000,
    b"9007199254740993",
    b"1767323045",
    b"-62135596800",
    b"null",
    b"true",
    b"False",
    b"[]",
    b"[,]",
    b"[1,]",
    b"{}",
    b"{,}",
    b'{"": {"": ""}}',
    b'{"a": 1, "a": 2}',
    b'{"a": 1 // no\n}',
    b'{"\\u0000": 1}',
    b"{'a': 1}",
    b'{"resume_url": {"resume_url": ["x"]}, "rows": 5, "metadata": {"requireComment": 1e999}}',
    deep(100),
    deep(199),
    deep(200),
    deep(201),
    deep(100_000),
    b"[" * 100_000,
    b'{"a":' * 195 + b"1" + b"}" * 195,
    b"",
]
"""Values in JSON, and what is none."""


class Verbatim(bytes):
    """A part of a body that is written as it is."""


def written(value: Any) -> bytes:
    """JSON, good or bad. An object that says something twice is a list of pairs."""
    match value:
        case Verbatim():
            return bytes(value)
        case dict():
            return b"{%b}" % b", ".join(b"%b: %b" % (written(name), written(each)) for name, each in value.items())
        case list():
            return b"[%b]" % b", ".join(map(written, value))
        case _:
            return json.dumps(value).encode()


_ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_ANY_TEXT, inner, max_size=4),
    max_leaves=15,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Where something stands: in which object or list, and under which name or number."""
    if isinstance(value, dict):
        inside = list(value.items())
    else:
        inside = list(enumerate(value)) if isinstance(value, list) else []
    return [(value, name) for name, _ in inside] + [place for _, each in inside for place in places(each)]


@st.composite
def damaged(draw: st.DrawFn, whole: dict[str, Any]) -> bytes:
    """A good body in which something is left out, said twice, replaced, or under another name."""
    body: Any = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        part, name = draw(st.sampled_from(places(body)))
        odd = draw(st.sampled_from(ODD_VALUES).map(Verbatim) | ANY_JSON)
        what = draw(st.sampled_from(["replace", "replace", "replace", "leave out", "twice", "rename", "add"]))
        if what == "replace" or isinstance(part, list):
            part[name] = odd
        elif what == "leave out" and len(part) > 1:
            del part[name]
        elif what == "twice":
            # Behind it, and under the same name.
            part[name] = Verbatim(b"%b, %b: %b" % (written(part[name]), written(name), written(odd)))
        elif what == "rename":
            part[draw(_ANY_TEXT)] = part.pop(name)
        else:
            part[draw(_ANY_TEXT)] = odd
        if isinstance(part, dict) and not places(body):
            break
    return written(body)


_CODINGS = st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "utf-16-be", "utf-7", "cp037"])


@st.composite
def _otherwise_coded(draw: st.DrawFn, whole: dict[str, Any]) -> bytes:
    return json.dumps(whole).encode(draw(_CODINGS))


@st.composite
def _cut(draw: st.DrawFn, whole: dict[str, Any]) -> bytes:
    raw = json.dumps(whole).encode()
    at = draw(st.integers(0, len(raw)))
    return raw[:at] + draw(st.sampled_from([b"", b"\x00", b"\xff\xfe", b"}", b" " * 50_000, raw]))


class Body(bytes):
    """Bytes of which no more is printed than can be read."""

    def __repr__(self) -> str:
        return f"{bytes(self[:1_000])!r} of {len(self)}"


@st.composite
def bodies_like(draw: st.DrawFn, whole: dict[str, Any]) -> Body:
    """Bodies of every kind, most of them nearly good."""
    nearly = damaged(whole)
    return Body(draw(nearly | nearly | nearly | _cut(whole) | _otherwise_coded(whole) | st.binary(max_size=100)))


CHUNKED = b"Transfer-Encoding"

HOW_IT_IS_SENT = st.fixed_dictionaries(
    {},
    optional={
        b"Content-Type": st.sampled_from(
            [
                b"application/json",
                b"application/json; charset=utf-16",
                b"application/json; charset=\xff",
                b"text/plain",
                b"multipart/form-data",
                b"multipart/form-data; boundary=" + b"x" * 5_000,
                b"application/x-www-form-urlencoded",
                b"application/cloudevents-batch+json",
                b";" * 500,
                b"",
            ]
        ),
        b"Content-Encoding": st.sampled_from(
            [b"gzip", b"br", b"zstd", b"deflate", b"identity", b"gzip, gzip", b"x" * 1_000]
        ),
        CHUNKED: st.just(b"chunked"),
    },
)
"""Headers that say something about a body which may be true or not."""
