"""Databases of a run of its own, and the runs in them."""

import asyncio
import contextlib
import secrets
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from benchmarks.names import Names
from switchboard.database import dsn

RUNS_OF_A_CONTEXT = 10
"""Runs in a context."""

LONG_LIST = 200
"""Runs in the one context that has many."""

_RUNS = """
INSERT INTO agent_runs (run_id, context_id, name, status)
SELECT $1::text || i, $2::text || (i + $3::int - 1) / $3::int, 'Carrier check call', 'RUNNING'
FROM generate_series(1, $4::int) i
"""


async def _execute(url: str, statement: str, *arguments: object) -> None:
    connection = await asyncpg.connect(dsn(url))
    try:
        await connection.execute(statement, *arguments, timeout=600)
    finally:
        await connection.close()


def execute(url: str, statement: str, *arguments: object) -> None:
    asyncio.run(_execute(url, statement, *arguments))


async def _value(url: str, query: str, *arguments: object) -> object:
    connection = await asyncpg.connect(dsn(url))
    try:
        return await connection.fetchval(query, *arguments)
    finally:
        await connection.close()


def value(url: str, query: str, *arguments: object) -> object:
    return asyncio.run(_value(url, query, *arguments))


@contextlib.contextmanager
def database(server_url: str) -> Iterator[str]:
    """A new database on a server, gone at the end."""
    name = f"benchmarks_{secrets.token_hex(6)}"
    execute(server_url, f"CREATE DATABASE {name}")
    try:
        yield urlunsplit(urlsplit(server_url)._replace(path=f"/{name}"))
    finally:
        execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")


def add_runs(url: str, names: Names, runs: int) -> None:
    """Runs that are under way, ten to a context, as the guide's code would insert them; one context has 200."""
    execute(url, _RUNS, names.run, names.context, RUNS_OF_A_CONTEXT, runs)
    execute(url, _RUNS, names.long_run, names.long_context, LONG_LIST, LONG_LIST)
    execute(url, _RUNS, names.followed_run, names.followed_context, names.FOLLOWED, names.FOLLOWED)
    execute(url, _RUNS, names.one_run, names.one_context, 1, names.ONE)
    # What a database that has grown over weeks has behind it.
    execute(url, "VACUUM ANALYZE agent_runs")


def remove_runs(url: str, names: Names) -> None:
    """For a database that is not ours."""
    execute(url, "DELETE FROM agent_runs WHERE starts_with(run_id, $1)", names.mark)
