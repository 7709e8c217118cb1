"""What fits into one answer, or into memory at once."""

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.sql.base import ReadOnlyColumnCollection

Columns = ReadOnlyColumnCollection[str, ColumnElement[Any]]


def until_heavy(
    query: Select[Any],
    weighed: str,
    most: ColumnElement[int] | int,
    order: Callable[[Columns], Sequence[ColumnElement[Any]]],
) -> Select[Any]:
    """The rows of a query, in this order, until a column of theirs weighs more bytes than `most`; at least one.

    `there` is how many rows it has. What a value weighs, as it is stored, stands beside it: those that are left out are
    not read.
    """
    rows = query.subquery("rows")
    size = func.coalesce(func.pg_column_size(rows.c[weighed]), 0)
    before = (func.sum(size).over(order_by=order(rows.c)) - size).label("before")
    some = select(rows, before, func.count().over().label("there")).subquery("some")
    return select(some).where(some.c.before < most).order_by(*order(some.c))
