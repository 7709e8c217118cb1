"""What no line may hold.

Nothing of it is logged on purpose: this is for what a library, or somebody's haste, lets slip.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from pathlib import PurePath
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from uuid import UUID

from pydantic import SecretStr

from switchboard.logs.traces import told
from switchboard.settings import Settings

REDACTED = "[redacted]"

_SECRET_FIELDS = re.compile(
    r"(?:token|secret|password|authorization|cookie|phone|phone_?number|payload|body|transcript|api_?key|_key)$",
    re.IGNORECASE,
)
"""Names of fields whose values nobody has to see, by their ends."""

_LONGEST = 16_384
"""Characters of a text; what is behind is cut off, before it is searched for long."""

_SHORTEST = 12
"""Characters of a setting that is searched for: a password such as `postgres` is a word, too."""

_SHORT = 64
"""Characters of a text for which it is worth remembering what was found in it."""

_NAMES = "(?:access_|refresh_|id_)?token|(?:x-)?api[_-]?key|password|secret|signature|authorization"

_ALONE = r"(?<![\w.-])(?!1\d{9}(?:\d{3})?(?!\d))\d{10,15}(?!\.?[\w-])"

_PATTERNS: Sequence[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern, re.ASCII | re.IGNORECASE), replacement)
    for pattern, replacement in (
        # user:password@ in an address, up to the last @, for passwords hold anything.
        (r"(?<=://)[^\s\"'<>]{1,255}@", f"{REDACTED}@"),
        (r"\b(bearer|basic) +[\w.~+/=-]{8,}", rf"\1 {REDACTED}"),
        # token=… in a query, X-API-KEY: … in a header, "password": "…" in JSON.
        (rf"\b({_NAMES})([\"']?(?:=|: ?)[\"']?)(?!(?:bearer|basic) )[^\s\"'&#,;}}]+", rf"\1\2{REDACTED}"),
        # JSON Web Tokens, signed and encrypted.
        (r"(?<![\w-])eyJ[\w-]{4,}(?:\.[\w-]*){2,4}", REDACTED),
        # API keys, secrets, hashes.
        (r"(?<![0-9a-f])[0-9a-f]{64,}(?![0-9a-f])", REDACTED),
        # Phone numbers. With a plus, or its escape; as (555) 123-4567, with or without a 1; as 0176 1234567: these are
        # known for what they are.
        (r"(?:\+|%2B)(?:[ ()./\u00a0\u2011-]{0,4}\d){7,15}(?!\d)", REDACTED),
        (r"(?<![\w.-])(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])", REDACTED),
        (r"(?<![\w.:-])(?:\(0\d{2,5}\)|0\d{2,5})[ /-]{1,3}\d[\d -]{4,12}\d(?![\w-])", REDACTED),
        # Otherwise, 10 to 15 digits that stand alone. Not those that may be a time in seconds or milliseconds, until
        # 2033, which begin with 1. Our own ids are small numbers, or hold letters; another's id may be taken for one,
        # which harms less than the reverse.
        (_ALONE, REDACTED),
    )
]


def secrets_of(settings: Settings) -> frozenset[str]:
    """The secret settings, and the passwords in those that are addresses."""
    found = set()
    for _, value in settings:
        if isinstance(value, SecretStr):
            secret = value.get_secret_value()
            found.add(secret)
            with contextlib.suppress(ValueError):
                found.add(unquote(urlsplit(secret).password or ""))
    return frozenset(secret for secret in found if len(secret) >= _SHORTEST)


def redactor(secrets: Iterable[str] = ()) -> Callable[[Any], Any]:
    """Makes a function that takes these secrets, and what looks like one, or like a phone number, out of a value."""
    forms = {form for secret in secrets for form in (secret, quote(secret, safe=""))}
    known = re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True)))) if forms else None

    def searched(text: str) -> str:
        text = known.sub(REDACTED, text) if known else text
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
        return text

    # Most of a line is what all lines are made of: names of fields, of loggers, of routes.
    searched_before = lru_cache(1000)(searched)

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            text = str(value)
            if len(text) > _LONGEST:
                # At a space: half a secret would not be known for one.
                text = f"{text[:_LONGEST].rpartition(' ')[0]} [cut]"
            return searched_before(text) if len(text) < _SHORT else searched(text)
        if isinstance(value, Mapping):
            return {
                str(clean(name)): REDACTED if _SECRET_FIELDS.search(str(name).replace("-", "_")) else clean(each)
                for name, each in value.items()
            }
        if isinstance(value, (list, tuple, set, frozenset)):
            return [clean(each) for each in value]
        if isinstance(value, int) and re.fullmatch(_ALONE, str(value)):
            return REDACTED
        printed = plain(value)
        return clean(printed) if isinstance(printed, str) else printed

    return clean


def plain(value: Any) -> Any:
    """A value as it may be printed. Of an object that could hold anything, its class."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (UUID, date, PurePath, IPv4Address, IPv6Address)):
        return str(value)
    if isinstance(value, BaseException):
        return told(value)
    return f"<{type(value).__qualname__}>"
