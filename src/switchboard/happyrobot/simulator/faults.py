"""What can be made to go wrong with a simulated call."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NAMED_ANSWERS = ("garbage", "empty", "no_runs")


@dataclass(frozen=True, slots=True)
class Faults:
    duplicate: bool = False  # every callback is sent twice, both copies at the same instant
    reorder: bool = False  # callbacks wait until the run is over, then go out shuffled, the final one not last
    delay: float = 0.0  # seconds added before each callback
    drop_final: bool = False  # the final callback is never sent
    silent: bool = False  # no callback is sent at all
    call_back_first: bool = False  # the first callback arrives before the trigger is answered
    # How the trigger is answered: an HTTP status (and no run), "no_runs" (200, and no run), or "garbage" or
    # "empty" (200, and the call goes ahead).
    answer: str | None = None
    hang: bool = False  # the call goes ahead, the trigger is never answered
    disconnect: bool = False  # the call goes ahead, the connection breaks within the answer
    fail: bool = False  # the call ends `failed`
    # How the Platform API answers about the call: after so many seconds; with an HTTP status and nothing else; with
    # 404 for so many seconds after the trigger.
    api_delay: float = 0.0
    api_answer: str | None = None
    api_missing: float = 0.0
    resume_answer: str | None = None  # how a decision is answered, which is then not taken: an HTTP status

    @classmethod
    def parse(cls, text: str) -> "Faults":
        """From a command line: `duplicate,delay=2,answer=500`."""
        given: dict[str, object] = {}
        for word in filter(None, map(str.strip, text.split(","))):
            name, has_value, value = word.partition("=")
            given[name.strip().replace("-", "_")] = value.strip() if has_value else True
        return cls.read(given)

    @classmethod
    def read(cls, given: object) -> "Faults":
        """From JSON: the text that `parse` takes, or an object such as `{"duplicate": true, "delay": 2}`."""
        if isinstance(given, str):
            return cls.parse(given)
        if not isinstance(given, Mapping):
            raise ValueError("faults must be a text or an object")  # noqa: TRY004 -- bad input, not a bug
        return cls(**{name: _value(name, value) for name, value in given.items()})


def _value(name: str, value: object) -> Any:
    match name:
        case "delay" | "api_delay" | "api_missing":
            return _seconds(name, value)
        case "answer":
            return _answer(name, value, NAMED_ANSWERS)
        case "api_answer" | "resume_answer":
            return _answer(name, value)
        case "duplicate" | "reorder" | "drop_final" | "silent" | "call_back_first" | "hang" | "disconnect" | "fail":
            return _switch(name, value)
        case _:
            raise ValueError(f"unknown fault: {name}")


def _seconds(name: str, value: object) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except (ValueError, OverflowError):
            seconds = math.nan
        if 0 <= seconds < math.inf:
            return seconds
    raise ValueError(f"{name} must be a number of seconds, not {value!r}")


def _answer(name: str, value: object, named: Sequence[str] = ()) -> str | None:
    if value is None:
        return None
    text = str(value)
    if text in named:
        return text
    if text.isdecimal() and 400 <= int(text) <= 599:  # noqa: PLR2004 -- the statuses that refuse
        return text
    raise ValueError(f"{name} must be {', '.join(['a status from 400 to 599', *named])}, not {value!r}")


def _switch(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return value == "true"
    raise ValueError(f"{name} is either true or false, not {value!r}")
