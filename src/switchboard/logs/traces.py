"""Exceptions in a log: where they happened, and only those words that nobody has sent."""

import re
import traceback
from collections.abc import Iterator
from itertools import islice
from types import TracebackType

TRACEBACK = "Traceback (most recent call last)"
_FRAMES, _CAUSES = 40, 20
"""Of an exception, the innermost; and exceptions in a chain."""

_SPEAKING = frozenset(
    {
        AssertionError,
        AttributeError,
        ImportError,
        ModuleNotFoundError,
        NameError,
        NotImplementedError,
        RecursionError,
        RuntimeError,
        TypeError,
        UnboundLocalError,
    }
)
"""Classes, without those derived from them, whose messages speak of code. ValueError and KeyError repeat values."""

_SPEAKING_TOO = frozenset(
    {
        "redis.exceptions.BusyLoadingError",
        "redis.exceptions.ConnectionError",
        "redis.exceptions.MaxConnectionsError",
        "redis.exceptions.TimeoutError",
        "sqlalchemy.exc.TimeoutError",
    }
)
"""By their names, so that this page needs none of those libraries."""


def told(error: BaseException) -> str:
    """An exception in a line: its class, and its message where that cannot hold what somebody has sent."""
    words = _words(error)
    # One line, whatever stands in it: the next one would pass for a place, or for another line of the log.
    return f"{_name(error)}: {' '.join(words.splitlines())}" if words else _name(error)


def _name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _words(error: BaseException) -> str | None:
    # PostgreSQL's messages, and still more their details, repeat the row that it did not take.
    sqlstate = getattr(getattr(error, "orig", error), "sqlstate", None)
    if isinstance(sqlstate, str):
        named = {name: getattr(error, f"{name}_name", None) for name in ("table", "constraint")}
        return ", ".join([f"sqlstate {sqlstate}", *(f"{name} {value}" for name, value in named.items() if value)])
    if type(error) in _SPEAKING or _name(error) in _SPEAKING_TOO or _name(error).startswith("switchboard."):
        return str(error)
    if isinstance(error, OSError) and isinstance(error.strerror, str):
        return error.strerror
    return None


def trace(error: BaseException) -> str:
    """An exception with its places (file, line, function) and with those that led to it."""
    return "\n".join(_traced(error, set()))


def _traced(error: BaseException, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    yield told(error)
    yield from _frames(error.__traceback__)
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            if id(each) not in seen and len(seen) < _CAUSES:
                yield from (f"  | {line}" for line in _traced(each, seen))
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if earlier is not None and id(earlier) not in seen and len(seen) < _CAUSES:
        yield "caused by" if error.__cause__ else "while handling"
        yield from _traced(earlier, seen)


def _frames(innermost: TracebackType | None) -> Iterator[str]:
    found = list(traceback.walk_tb(innermost))
    if len(found) > _FRAMES:
        yield f"  … {len(found) - _FRAMES} more"
    for frame, line in islice(found, max(0, len(found) - _FRAMES), None):
        yield f"  {frame.f_code.co_filename}:{line} {frame.f_code.co_qualname}"


def places(text: str) -> Iterator[str]:
    """What `trace` would say of an exception of which only Python's own text is left."""
    inside = False
    for line in text.splitlines():
        bare = re.sub(r"^\s*[|+]\s?", "", line)  # of a group
        if TRACEBACK in bare:
            inside = True
        elif inside and (place := re.match(r'\s+File "(.+)", line (\d+)(?:, in (.+))?$', bare)):
            yield f"  {place[1]}:{place[2]} {place[3] or ''}".rstrip()
        elif inside and bare and not bare.startswith(" "):
            inside = False
            yield bare.partition(":")[0]
