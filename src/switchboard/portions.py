"""What fits into one answer, or into memory at once."""

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, Text, case, cast, func, select
from sqlalchemy.sql.base import ReadOnlyColumnCollection

Columns = ReadOnlyColumnCollection[str, ColumnElement[Any]]


def kept(rows: Sequence[Row[Any]], limit: int) -> tuple[Sequence[Row[Any]], bool]:
    """The first rows of such a query, and whether it has others behind them."""
    return rows[:limit], bool(rows) and rows[0].there > min(len(rows), limit)


def until_heavy(
    query: Select[Any],
    weighed: str,
    most: ColumnElement[int] | int,
    order: Callable[[Columns], Sequence[ColumnElement[Any]]],
) -> Select[Any]:
    """The rows of a query, in this order, until a column of theirs weighs more bytes than `most`; at least one.

    `there` is how many rows it has. What a value weighs stands beside it, unless it is packed.
    """
    rows = query.subquery("rows")
    value = rows.c[weighed]
    # What is packed weighs more where it is read.
    size = case(
        (value.is_(None), 0),
        (func.pg_column_compression(value).is_(None), func.pg_column_size(value)),
        else_=func.octet_length(cast(value, Text)),
    )
    before = (func.sum(size).over(order_by=order(rows.c)) - size).label("before")
    some = select(rows, before, func.count().over().label("there")).subquery("some")
    return select(some).where(some.c.before < most).order_by(*order(some.c))
