"""What each line says that is logged for the same request: its id, and by and by more."""

from collections.abc import Mapping
from contextvars import ContextVar, Token
from types import MappingProxyType
from typing import Any

_bound: ContextVar[Mapping[str, Any]] = ContextVar("bound", default=MappingProxyType({}))


def begin(**fields: Any) -> Token[Mapping[str, Any]]:
    """Says these from now on, and nothing else.

    A request that waited behind another one on a connection begins in its context, and is not about its key.
    """
    return _bound.set(fields)


def add(**fields: Any) -> None:
    _bound.set({**_bound.get(), **fields})


def end(token: Token[Mapping[str, Any]]) -> None:
    _bound.reset(token)


def current() -> Mapping[str, Any]:
    return _bound.get()
