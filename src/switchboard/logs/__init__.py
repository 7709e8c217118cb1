"""What is logged, ours and the libraries': one line each, on standard error, with nothing secret in it.

Our modules only ask structlog for a logger, and log a constant sentence and named fields. An exception can be such a
field. The one line that comes with every request takes a shorter way.
"""

import asyncio
import contextlib
import logging
import re
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import structlog
from opentelemetry.trace import format_trace_id, get_current_span
from pydantic_core import to_json
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor

from switchboard.logs import bound
from switchboard.logs.redaction import plain, redactor, secrets_of
from switchboard.logs.traces import TRACEBACK, places, trace
from switchboard.settings import Settings

# What the standard library would find out for each record, and no line of ours says: as its documentation advises.
logging._srcfile = None  # noqa: SLF001
logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False

# At import, because something may be logged before anybody has read the settings. From here on our lines are records of
# the standard library's, which pytest and others can take as well.
structlog.configure(
    processors=[structlog.stdlib.filter_by_level, ProcessorFormatter.wrap_for_formatter],
    wrapper_class=structlog.stdlib.BoundLogger,
    logger_factory=structlog.stdlib.LoggerFactory(),
    cache_logger_on_first_use=True,
)


class _Harmless(logging.LogRecord):
    """A line that comes with every request, and whose fields hold nothing to be searched for."""


_USUAL = logging.makeLogRecord({}).__dict__
"""What a record says that says nothing."""


def harmless(logger: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """Logs a line in which nothing can be secret, by the shortest way; not for anything that somebody has sent.

    Like any other it is a record of the standard library's, of which most has not to be found out each time.
    """
    if logger.isEnabledFor(level):
        record = _Harmless.__new__(_Harmless)
        now = time.time()
        record.__dict__ = {
            **_USUAL,
            "name": logger.name,
            "msg": {"event": event, **fields},
            "levelno": level,
            "levelname": logging.getLevelName(level),
            "created": now,
            "msecs": now % 1 * 1000,
        }
        logger.handle(record)


def configure(settings: Settings) -> None:
    """Sends everything that is logged to standard error: in JSON in production, readable in development.

    Can be called again; then the last settings hold.
    """
    root = logging.getLogger()
    handler = next((each for each in root.handlers if isinstance(each, _Stderr)), None)
    if handler is None:
        handler = _Stderr()
        root.addHandler(handler)
    handler.setFormatter(_formatter(settings))
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    logging.getLogger("switchboard").setLevel(level)
    # Libraries tell of every request at INFO, with addresses and more.
    root.setLevel(max(level, logging.WARNING))
    logging.captureWarnings(True)


class _Stderr(logging.Handler):
    """Writes to what is standard error at the moment.

    The lines of requests that are answered in the same turn of the event loop are written together.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if isinstance(record, _Harmless) and self._keeps(line):
                return
            self._kept.append(line)
            self.flush()
        except Exception:  # noqa: BLE001  # whoever logs goes on
            self.handleError(record)

    def _keeps(self, line: str) -> bool:
        if not self._kept:
            try:
                asyncio.get_running_loop().call_soon(self.flush)
            except RuntimeError:
                return False
        self._kept.append(line)
        return True

    def flush(self) -> None:
        with self.lock or contextlib.nullcontext():
            if self._kept:
                kept, self._kept = self._kept, []
                sys.stderr.write("\n".join([*kept, ""]))
                sys.stderr.flush()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the standard library's name
        # In place of its own, which would print the message and its arguments as they are.
        with contextlib.suppress(Exception):
            sys.stderr.write(f"a line of {record.name} could not be written\n")


def _formatter(settings: Settings) -> logging.Formatter:
    clean = redactor(secrets_of(settings))
    processors: list[Processor] = [
        lambda _, __, line: {**bound.current(), **line},
        _traced,
        _headed,
        lambda _, __, line: clean(line),  # last, so that nothing escapes it
    ]
    short: Processor
    if settings.environment == "production":
        short = _json
        processors.append(structlog.processors.JSONRenderer())  # it writes half an emoji, too
    else:
        short = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False)
        processors += [_printable, short]
    return _Formatter(
        short,
        processors=processors,
        foreign_pre_chain=[_foreign],
        use_get_message=False,
        pass_foreign_args=True,
    )


class _Formatter(ProcessorFormatter):
    """Takes the short way with what is harmless."""

    def __init__(self, short: Processor, **options: Any) -> None:
        super().__init__(**options)
        self._short = short

    def format(self, record: logging.LogRecord) -> str:
        if not isinstance(record, _Harmless):
            return super().format(record)
        line: Any = record.msg
        line = {**_head(record, line["event"]), **bound.current(), **line}
        return str(self._short(None, record.levelname, dict(_traced(None, "", line))))


def _json(_: object, __: str, line: EventDict) -> str:
    return to_json(line).decode()


# From a record to what a line says.


def _foreign(_: object, __: str, line: EventDict) -> EventDict:
    """Puts the message of a library's record together, without what objects say of themselves."""
    arguments = line.pop("positional_args", None)
    text = str(line["event"])
    if isinstance(arguments, Mapping):
        text %= {name: plain(value) for name, value in arguments.items()}
    elif arguments:
        text %= tuple(map(plain, arguments))
    first, _, rest = text.strip().partition("\n")
    match line["_record"].name:
        case "asyncio":
            # "Exception in callback f(what, somebody, sent)", and behind it the task with its exception's message.
            first = re.sub(r"^(Exception in callback [^(]*)\(.*", r"\1", first)
        case "py.warnings":
            # "file:1: UserWarning: what pydantic could not serialize", and behind it the line of code.
            first = re.sub(r"^(.*?:\d+: \w+): .*", r"\1", first)
    if TRACEBACK in first:
        # Starlette reports a start that has failed as nothing but a traceback.
        line["exception"] = "\n".join(places(f"{first}\n{rest}"))
        first = "exception"
    line["event"] = first
    return line


def _traced(_: object, __: str, line: EventDict) -> EventDict:
    """Names the trace of the request or the job, where there is one."""
    context = get_current_span().get_span_context()
    return {**line, "trace_id": format_trace_id(context.trace_id)} if context.is_valid else line


def _headed(_: object, __: str, line: EventDict) -> EventDict:
    record: logging.LogRecord = line.pop("_record")
    del line["_from_structlog"]
    headed = _head(record, line.pop("event"))
    error = _error(line.pop("exc_info", None))
    if error is not None:
        line["exception"] = trace(error)
    return headed | dict(line)


def _head(record: logging.LogRecord, event: str) -> dict[str, Any]:
    second = int(record.created)
    return {
        "timestamp": f"{_second(second)}.{int((record.created - second) * 1000):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": event,
    }


@lru_cache(1)
def _second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat()[:-6]


def _error(exc_info: Any) -> BaseException | None:
    """The exception behind what `exc_info` may be: True, an exception, or what `sys.exc_info` returns."""
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple):
        return exc_info[1]  # type: ignore[no-any-return]
    return sys.exception() if exc_info else None


def _printable(_: object, __: str, line: EventDict) -> EventDict:
    """Escapes what would move a terminal's cursor, or be taken for the end of a line."""
    for name, value in line.items():
        if isinstance(value, str):
            line[name] = "\n".join(map(_escaped, value.split("\n"))) if name == "exception" else _escaped(value)
    return line


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
