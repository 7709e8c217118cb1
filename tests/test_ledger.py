"""Executions are written down before their calls are placed, many of them in one statement."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard import database
from switchboard.database import Line
from switchboard.errors import PostgresAway, Unavailable
from switchboard.runs import ledger
from switchboard.runs.ledger import Ledger, NewExecution
from switchboard.settings import Settings
from switchboard.tables import executions
from tests.conftest import Servers, Service, new_key, settings_for, until


class Counting(Line):
    """A line that remembers how many executions were in each statement, and lets go when it is told to."""

    def __init__(self, db: AsyncEngine) -> None:
        super().__init__(db)
        self.sizes: list[int] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def fetch(self, query: str, *arguments: Any) -> Sequence[Any]:
        self.sizes.append(len(arguments[0]))
        await self.go_on.wait()
        return await super().fetch(query, *arguments)


@pytest.fixture
async def counting(db: AsyncEngine) -> AsyncIterator[Counting]:
    line = Counting(db)
    yield line
    await line.hang_up()


@pytest.fixture
def own_settings(database_url: str, servers: Servers) -> Settings:
    return settings_for(database_url, servers.redis_url, None)


def new(context_id: str, **body: Any) -> NewExecution:
    return NewExecution(uuid4(), "default", context_id, "A call", "What about", {"a": "ü"} | body, None)


async def written(db: AsyncEngine, context_id: str) -> list[Any]:
    query = select(executions, (executions.c.answer_by - func.now()).label("time")).where(
        executions.c.context_id == context_id
    )
    async with db.connect() as conn:
        return list((await conn.execute(query)).all())


async def test_one_that_is_entered_is_committed(db: AsyncEngine, line: Line, own_settings: Settings, context_id: str):
    execution = new(context_id)
    assert await Ledger(line, own_settings).enter(execution, f"owner {context_id}")
    [row] = await written(db, context_id)
    assert (row.id, row.workflow_id, row.name, row.description) == (execution.id, "default", "A call", "What about")
    assert (row.input, row.idempotency_key, row.owner) == ({"a": "ü"}, None, f"owner {context_id}")
    assert (row.status, row.key_id, row.began_at, row.unconfirmed) == ("pending", None, None, False)
    assert 100 < row.time.total_seconds() <= 120


async def test_those_that_come_while_one_is_written_are_one_statement(
    db: AsyncEngine, counting: Counting, own_settings: Settings, context_id: str
):
    book = Ledger(counting, own_settings)
    assert all(await asyncio.gather(*(book.enter(new(context_id), "") for _ in range(50))))
    assert counting.sizes == [50]
    counting.go_on.clear()
    first = asyncio.create_task(book.enter(new(context_id), ""))
    await asyncio.sleep(0)
    others = [asyncio.create_task(book.enter(new(context_id), "")) for _ in range(3)]
    await asyncio.sleep(0)
    counting.go_on.set()
    assert all(await asyncio.gather(first, *others))
    assert counting.sizes == [50, 1, 3]
    assert len(await written(db, context_id)) == 54


async def test_what_postgresql_does_not_take_harms_nobody_else(
    db: AsyncEngine, counting: Counting, own_settings: Settings, context_id: str
):
    book = Ledger(counting, own_settings)
    entered = await asyncio.gather(
        book.enter(new(context_id), ""), book.enter(new(context_id, bad="\0"), ""), book.enter(new(context_id), "")
    )
    assert list(entered) == [True, False, True]
    assert len(await written(db, context_id)) == 2


async def test_everybody_is_told_that_postgresql_is_away(own_settings: Settings, context_id: str):
    nowhere = database.connect("postgresql://127.0.0.1:1/none")
    async with Ledger(Line(nowhere), own_settings).running() as book:
        told = await asyncio.gather(*(book.enter(new(context_id), "") for _ in range(3)), return_exceptions=True)
    assert [type(error) for error in told] == [PostgresAway] * 3
    await nowhere.dispose()


async def test_one_too_many_is_sent_away(
    line: Line, own_settings: Settings, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ledger, "MAX_WAITING", 2)
    book = Ledger(line, own_settings)
    told = await asyncio.gather(*(book.enter(new(context_id), "") for _ in range(3)), return_exceptions=True)
    assert told[:2] == [True, True]
    assert isinstance(told[2], Unavailable)
    assert await book.enter(new(context_id), "")


@pytest.mark.parametrize(("most", "bytes_"), [(2, 10_000), (10, 250)])
async def test_a_statement_is_not_larger_than_postgresql_likes(
    counting: Counting, own_settings: Settings, context_id: str, monkeypatch: pytest.MonkeyPatch, most: int, bytes_: int
):
    monkeypatch.setattr(ledger, "MAX_BATCH", most)
    monkeypatch.setattr(ledger, "MAX_BATCH_BYTES", bytes_)
    book = Ledger(counting, own_settings)
    assert all(await asyncio.gather(*(book.enter(new(context_id, long="x" * 120), "") for _ in range(5))))
    assert counting.sizes == [2, 2, 1]


async def test_nothing_is_written_down_for_whoever_has_gone(
    db: AsyncEngine, counting: Counting, own_settings: Settings, context_id: str
):
    book = Ledger(counting, own_settings)
    counting.go_on.clear()
    first = asyncio.create_task(book.enter(new(context_id), ""))
    await asyncio.sleep(0)
    gone = asyncio.create_task(book.enter(new(context_id), ""))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait({gone})
    counting.go_on.set()
    assert await first
    assert len(await written(db, context_id)) == 1


async def test_what_waits_is_bounded_by_its_size(
    line: Line, own_settings: Settings, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ledger, "MAX_WAITING_BYTES", 300)
    book = Ledger(line, own_settings)

    async def enter(*sizes: int) -> list[type[Any]]:
        new_ones = [book.enter(new(context_id, long="x" * size), "") for size in sizes]
        return [type(each) for each in await asyncio.gather(*new_ones, return_exceptions=True)]

    assert await enter(100, 100, 100) == [bool, bool, Unavailable]
    assert await enter(500, 1) == [bool, Unavailable], "one that is alone has all the room there is"
    assert await enter(100, 100) == [bool, bool]


async def test_what_was_written_for_whoever_has_gone_meanwhile_is_taken_back(
    db: AsyncEngine, counting: Counting, own_settings: Settings, context_id: str
):
    book = Ledger(counting, own_settings)
    counting.go_on.clear()
    waiting = [asyncio.create_task(book.enter(new(context_id), "")) for _ in range(2)]
    await until(lambda: counting.sizes == [2])
    waiting[0].cancel()
    await asyncio.wait({waiting[0]})
    counting.go_on.set()
    assert await waiting[1]
    await until(lambda: not book._unplaced)
    assert len(await written(db, context_id)) == 1


async def test_what_is_stored_though_nobody_heard_of_it_is_taken_back(
    db: AsyncEngine, own_settings: Settings, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    """PostgreSQL goes away between a commit and its answer; whoever asked is told to come back."""
    away = 2

    class Unheard(Line):
        async def fetch(self, query: str, *arguments: Any) -> Sequence[Any]:
            nonlocal away
            rows = await super().fetch(query, *arguments) if away != 1 else []
            if away:
                away -= 1
                raise PostgresAway("no answer")
            return rows

    monkeypatch.setattr(ledger, "_AGAIN_AFTER", 0.01)
    line = Unheard(db)
    async with Ledger(line, own_settings).running() as book:
        with pytest.raises(PostgresAway):
            await book.enter(new(context_id), "")
        assert len(await written(db, context_id)) == 1
        await until(lambda: not book._unplaced)
        assert await book.enter(new(context_id), "")
    await line.hang_up()
    assert len(await written(db, context_id)) == 1


async def test_who_comes_when_it_is_closed_is_sent_away(line: Line, own_settings: Settings, context_id: str):
    async with Ledger(line, own_settings).running() as book:
        assert await book.enter(new(context_id), "")
    with pytest.raises(Unavailable):
        await book.enter(new(context_id), "")


@pytest.mark.parametrize("begun", [False, True])
async def test_who_still_waits_when_the_service_stops_is_told_nothing(
    counting: Counting, own_settings: Settings, context_id: str, begun: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ledger, "_PATIENCE", 0.05)
    counting.go_on.clear()
    async with Ledger(counting, own_settings).running() as book:
        waiting = [asyncio.create_task(book.enter(new(context_id), "")) for _ in range(2)]
        await asyncio.sleep(0)
        if begun:
            await asyncio.sleep(0)
            waiting.append(asyncio.create_task(book.enter(new(context_id), "")))
            await asyncio.sleep(0)
    async with asyncio.timeout(5):
        told = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(each) for each in told} == {asyncio.CancelledError}
    assert counting.sizes


async def test_a_key_s_executions_are_counted_all_the_same(service: Service, db: AsyncEngine, context_id: str):
    _, headers = await new_key(db, monthly_limit=1)
    body = {"context_id": context_id}
    answers = [
        await service.http.post("/api/happyrobot/trigger", json=body, headers=headers | {"Idempotency-Key": str(n)})
        for n in range(2)
    ]
    assert [answer.status_code for answer in answers] == [200, 403]


async def test_requests_with_a_key_wait_for_each_other_and_for_nobody_else(
    service: Service, db: AsyncEngine, context_id: str
):
    async with db.connect() as conn, conn.begin() as held:
        stuck = insert(executions).values(
            id=uuid4(), workflow_id="default", context_id=context_id, input={}, idempotency_key="stuck", owner=""
        )
        await conn.execute(stuck)
        body = {"context_id": context_id}
        headers = {"Idempotency-Key": "stuck"}
        waiting = asyncio.create_task(service.http.post("/api/happyrobot/trigger", json=body, headers=headers))
        locks = text("SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'")
        async with db.connect() as other:
            await until(lambda: other.scalar(locks))
        assert (await service.http.post("/api/happyrobot/trigger", json=body)).status_code == 200
        await held.rollback()
    assert (await waiting).status_code == 200
