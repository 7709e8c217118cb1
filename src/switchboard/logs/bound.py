"""What each line says that is logged for the same request: its id, and by and by more."""

from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

_NOTHING: Mapping[str, Any] = MappingProxyType({})

_bound: ContextVar[Mapping[str, Any]] = ContextVar("bound", default=_NOTHING)


def begin(**fields: Any) -> None:
    """Says these from now on, and nothing else.

    A request that waited behind another one on a connection begins in its context, and is not about its key.
    """
    _bound.set(fields)


def add(**fields: Any) -> None:
    _bound.set({**_bound.get(), **fields})


def end() -> None:
    """Says nothing from now on. What was said before `begin` was about somebody else."""
    _bound.set(_NOTHING)


def current() -> Mapping[str, Any]:
    return _bound.get()
