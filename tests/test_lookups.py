"""Asking HappyRobot: shared by all who ask, within its pace, and never waited for too long."""

import asyncio
import time
from collections import Counter
from contextlib import AbstractAsyncContextManager
from itertools import pairwise
from typing import Any

import httpx
import pytest
import respx
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine

from switchboard.happyrobot import lookups, pace
from switchboard.happyrobot.client import BACKGROUND, POLL, Effort, HappyRobot, NoTurn
from switchboard.happyrobot.pace import Pace
from switchboard.happyrobot.simulator import Simulator
from switchboard.tables import run_events
from tests.conftest import (
    API_KEY,
    HOOK_KEY,
    Servers,
    Service,
    insert_run,
    rows_of,
    running_service,
    serving,
    settings_for,
    until,
)


def asking(
    router: respx.MockRouter, database_url: str, servers: Servers, **more: Any
) -> AbstractAsyncContextManager[Service]:
    """A service for which the router is HappyRobot."""
    settings = settings_for(database_url, servers.redis_url, None, **more)
    return running_service(settings, httpx.MockTransport(router.async_handler))


def platform(router: respx.MockRouter, run_id: str) -> respx.Route:
    return router.get(f"/api/v1/runs/{run_id}")


def says(status: str) -> httpx.Response:
    return httpx.Response(200, json={"run": {"id": "r", "status": status}, "sessions": []})


async def status_of(service: Service, run_id: str) -> Any:
    answer = await service.http.get("/api/happyrobot/status", params={"run_id": run_id})
    assert answer.status_code == 200
    return answer.json()


async def test_three_hundred_who_ask_once_a_second_cost_a_request_in_two_seconds(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str
):
    simulator = Simulator(hook_key=HOOK_KEY, api_key=API_KEY, pace=60)
    async with serving(lambda _: simulator.app) as (url, _):
        settings = settings_for(database_url, servers.redis_url, url)
        async with running_service(settings) as one, running_service(settings) as other:
            answer = await one.http.post("/api/happyrobot/trigger", json={"context_id": context_id})
            run_id = answer.json()["run_ids"][0]
            heard: Counter[bool] = Counter()

            async def poll(number: int) -> None:
                ask = (one, other)[number % 2].state["lookups"].ask
                await asyncio.sleep(number / 300)
                for _ in range(6):
                    heard[(await ask(run_id, POLL)).heard] += 1
                    await asyncio.sleep(1)

            await asyncio.gather(*(poll(number) for number in range(300)))
            # Some of them as browsers do.
            answers = await asyncio.gather(*(status_of(one, run_id) for _ in range(30)))
    asked_at = [request.at.timestamp() for request in simulator.requests]
    # From one claim to the next; on its way to the simulator one may be a little late.
    assert all(later - earlier > lookups.SHARED_FOR - 0.5 for earlier, later in pairwise(asked_at))
    assert len(asked_at) >= 3, "the answer is asked for anew"
    assert heard[True] > 1500, "but for those who were held up for so long that they gave up"
    assert ("running", "happyrobot") in {(answer["status"], answer["source"]) for answer in answers}


async def test_the_one_who_waits_for_an_answer_of_another_process_gets_it(
    database_url: str, servers: Servers, run_id: str
):
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def slowly(_: httpx.Request) -> httpx.Response:
        asked.set()
        await may_answer.wait()
        return says("completed")

    router = respx.MockRouter()
    route = platform(router, run_id).mock(side_effect=slowly)
    async with asking(router, database_url, servers) as one, asking(router, database_url, servers) as other:
        first = asyncio.create_task(status_of(one, run_id))
        await asked.wait()
        second = asyncio.create_task(status_of(other, run_id))
        await asyncio.sleep(0.2)
        may_answer.set()
        answers = [await first, await second]
    assert [(answer["status"], answer["source"]) for answer in answers] == [("completed", "happyrobot")] * 2
    assert route.call_count == 1


async def test_a_claim_that_was_sent_twice_is_not_taken_for_somebody_elses(
    database_url: str, servers: Servers, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    router = respx.MockRouter()
    platform(router, run_id).respond(json={"run": {"id": "r", "status": "completed"}, "sessions": []})
    really = Redis.set

    async def twice(self: Redis, name: str, *arguments: Any, **more: Any) -> Any:
        # As redis-py does when the answer to the first one got lost.
        if more.get("nx"):
            await really(self, name, *arguments, **more)
        return await really(self, name, *arguments, **more)

    monkeypatch.setattr(Redis, "set", twice)
    async with asking(router, database_url, servers) as service:
        answer = await status_of(service, run_id)
    assert (answer["status"], answer["source"]) == ("completed", "happyrobot")


async def test_a_claim_that_came_to_nothing_is_given_up_and_nobody_elses(
    database_url: str, servers: Servers, run_id: str
):
    """Whoever gets no turn leaves the question to others, but not if it has become theirs meanwhile."""
    async with (
        asking(respx.MockRouter(), database_url, servers) as service,
        Redis.from_url(servers.redis_url) as redis,
    ):
        shared = service.state["lookups"]
        name = shared._prefix + run_id
        assert await shared._claim(run_id, b"?mine", POLL)
        assert not await shared._claim(run_id, b"?theirs", POLL)
        await shared._tell(run_id, b"?theirs", await shared._nothing())
        assert await redis.get(name) == b"?mine"
        await shared._tell(run_id, b"?mine", await shared._nothing())
        assert await redis.get(name) is None


async def test_a_browser_that_hangs_up_takes_nobody_elses_answer_with_it(
    database_url: str, servers: Servers, run_id: str
):
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def slowly(_: httpx.Request) -> httpx.Response:
        asked.set()
        await may_answer.wait()
        return says("running")

    router = respx.MockRouter()
    platform(router, run_id).mock(side_effect=slowly)
    async with asking(router, database_url, servers) as service:
        ask = service.state["lookups"].ask
        first = asyncio.create_task(ask(run_id, POLL))
        await asked.wait()
        second = asyncio.create_task(ask(run_id, POLL))
        first.cancel()
        may_answer.set()
        assert (await second).status == "RUNNING"


@pytest.mark.parametrize(
    "trouble",
    [
        httpx.Response(404, json={"message": "run not found"}),
        httpx.Response(401, json={"message": "invalid or revoked API key"}),
        httpx.Response(429),
        httpx.Response(500),
        httpx.Response(503),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"run": {"status": "no such word"}}),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
    ],
    ids=str,
)
async def test_the_database_answers_when_happyrobot_says_nothing_of_use(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str, trouble: Any
):
    router = respx.MockRouter()
    route = platform(router, run_id).mock(side_effect=[trouble])
    async with asking(router, database_url, servers) as service:
        for _ in range(3):
            answer = await status_of(service, run_id)
            assert (answer["status"], answer["source"]) == ("running", "database")
    assert route.call_count == 1, "that it said nothing is shared, too"
    assert await rows_of(db, run_events, run_id) == 0


async def test_nobody_waits_for_a_slow_happyrobot_and_what_it_says_in_the_end_still_counts(
    database_url: str, servers: Servers, db: AsyncEngine, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    may_answer = asyncio.Event()

    async def slowly(_: httpx.Request) -> httpx.Response:
        await may_answer.wait()
        return says("completed")

    monkeypatch.setattr("switchboard.runs.calling.POLL", Effort(patience=0.1, timeout=0.2))
    router = respx.MockRouter()
    route = platform(router, run_id).mock(side_effect=slowly)
    async with asking(router, database_url, servers) as service:
        for _ in range(3):
            answer = await status_of(service, run_id)
            assert (answer["status"], answer["source"]) == ("running", "database")
        may_answer.set()

        async def over() -> bool:
            return bool((await service.run(run_id))["status"] == "COMPLETED")

        await until(over)
    assert route.call_count == 1


async def test_a_browsers_impatience_is_not_happyrobots_silence(
    database_url: str, servers: Servers, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    """A worker that shares a browser's question gets the answer for which the browser did not wait."""
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def slowly(_: httpx.Request) -> httpx.Response:
        asked.set()
        await may_answer.wait()
        return says("running")

    monkeypatch.setattr("switchboard.runs.calling.POLL", Effort(patience=0.1, timeout=0.2))
    router = respx.MockRouter()
    platform(router, run_id).mock(side_effect=slowly)
    async with asking(router, database_url, servers) as one, asking(router, database_url, servers) as other:
        browser = asyncio.create_task(status_of(one, run_id))
        await asked.wait()
        workers = [asyncio.create_task(each.state["lookups"].ask(run_id, BACKGROUND)) for each in (one, other)]
        assert (await browser)["source"] == "database"
        may_answer.set()
        assert [(await worker).heard for worker in workers] == [True, True]


async def test_a_happyrobot_that_never_answers_is_silent_in_the_end(
    database_url: str, servers: Servers, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lookups, "LONGEST_ANSWER", 0.2)

    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    router = respx.MockRouter()
    platform(router, run_id).mock(side_effect=never)
    async with asking(router, database_url, servers) as service:
        answer = await service.state["lookups"].ask(run_id, BACKGROUND)
    assert (answer.asked, answer.heard) == (True, False)


async def test_an_answer_that_is_too_large_to_read_is_no_silence(
    database_url: str, servers: Servers, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("switchboard.happyrobot.client._MAX_ANSWER", 1000)
    router = respx.MockRouter()
    platform(router, run_id).respond(json={"run": {"status": "running"}, "sessions": ["x" * 1000]})
    async with asking(router, database_url, servers) as service:
        answer = await service.state["lookups"].ask(run_id, BACKGROUND)
    assert (answer.status, answer.heard) == (None, True)


async def test_half_an_emoji_does_not_make_an_answer_worthless(database_url: str, servers: Servers, run_id: str):
    router = respx.MockRouter()
    body = b'{"run": {"status": "completed"}, "sessions": [{"id": "s", "messages": [{"content": "Bye \\ud83d"}]}]}'
    platform(router, run_id).respond(content=body)
    router.get(f"/api/v1/runs/{run_id}/recordings").respond(404)
    async with asking(router, database_url, servers) as service:
        assert (await status_of(service, run_id))["status"] == "completed"
        details = (await service.http.get(f"/api/happyrobot/runs/{run_id}/details")).json()
    assert details["sessions"][0]["messages"][0]["content"] == "Bye \N{REPLACEMENT CHARACTER}"


async def test_turns_are_not_saved_up_while_an_older_answer_is_waited_for(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str
):
    run_ids = [await insert_run(db, context_id) for _ in range(8)]
    asked_at: list[float] = []

    def answer(_: httpx.Request) -> httpx.Response:
        asked_at.append(time.monotonic())
        return says("running")

    router = respx.MockRouter()
    router.get(path__regex=r"/api/v1/runs/.+").mock(side_effect=answer)
    pace = 10
    async with asking(router, database_url, servers, happyrobot_api_pace=pace, happyrobot_org_id=context_id) as service:
        ask = service.state["lookups"].ask
        for anew in (False, True):
            await asyncio.gather(*(ask(run_id, BACKGROUND, anew=anew) for run_id in run_ids))
    # A turn that is taken is used at once; a busy machine may be late with one or another.
    gaps = [later - earlier for earlier, later in pairwise(asked_at)]
    assert len(gaps) == 15
    assert sorted(gaps)[5] > 0.5 / pace


async def test_a_browser_does_not_wait_for_the_turn_of_a_background_question(
    database_url: str, servers: Servers, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    waits = asyncio.Event()
    router = respx.MockRouter()
    platform(router, run_id).mock(return_value=says("running"))
    async with asking(router, database_url, servers) as service:
        happyrobot = service.state["happyrobot"]
        genuine = happyrobot.turn

        async def turn(effort: Effort) -> None:
            if effort is BACKGROUND:
                waits.set()
                await asyncio.Event().wait()
            await genuine(effort)

        monkeypatch.setattr(happyrobot, "turn", turn)
        background = asyncio.create_task(service.state["lookups"].ask(run_id, BACKGROUND))
        await waits.wait()
        answer = await status_of(service, run_id)
        background.cancel()
    assert answer["source"] == "happyrobot"


async def test_a_browser_does_not_wait_for_the_slow_answer_to_a_background_question(
    database_url: str, servers: Servers, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def slowly(_: httpx.Request) -> httpx.Response:
        asked.set()
        await may_answer.wait()
        return says("completed")

    monkeypatch.setattr("switchboard.runs.calling.POLL", Effort(patience=0.1, timeout=0.2))
    router = respx.MockRouter()
    route = platform(router, run_id).mock(side_effect=slowly)
    async with asking(router, database_url, servers) as service:
        background = asyncio.create_task(service.state["lookups"].ask(run_id, BACKGROUND))
        await asked.wait()
        # Answered before HappyRobot is: or else this waits for ever.
        answer = await status_of(service, run_id)
        may_answer.set()
        assert (await background).status == "COMPLETED", "who can wait gets the answer all the same"
    assert answer["source"] == "database"
    assert route.call_count == 1


def test_a_browser_waits_two_seconds_at_most():
    assert POLL.timeout == 2
    assert POLL.patience < POLL.timeout


async def test_the_database_answers_while_the_pace_is_used_up(
    database_url: str, servers: Servers, db: AsyncEngine, context_id: str
):
    run_ids = [await insert_run(db, context_id) for _ in range(12)]
    router = respx.MockRouter()
    route = router.get(path__regex=r"/api/v1/runs/.+").mock(return_value=says("running"))
    async with asking(router, database_url, servers, happyrobot_api_pace=0.5, happyrobot_org_id=context_id) as service:
        answers = await asyncio.gather(*(status_of(service, run_id) for run_id in run_ids))
    assert Counter(answer["source"] for answer in answers) == {"happyrobot": 1, "database": 11}
    assert route.call_count == 1


async def test_without_a_key_nobody_is_asked(database_url: str, servers: Servers, run_id: str):
    router = respx.MockRouter()
    async with asking(router, database_url, servers, happyrobot_api_key=None) as service:
        assert (await status_of(service, run_id))["source"] == "database"
        assert not service.state["happyrobot"].can_be_asked


async def test_one_who_asks_anew_gets_an_answer_from_now_on(database_url: str, servers: Servers, run_id: str):
    router = respx.MockRouter()
    route = platform(router, run_id).mock(side_effect=[says("running"), says("completed")])
    async with asking(router, database_url, servers) as one, asking(router, database_url, servers) as other:
        assert (await one.state["lookups"].ask(run_id, POLL)).status == "RUNNING"
        assert (await other.state["lookups"].ask(run_id, POLL)).status == "RUNNING"
        answer = await other.state["lookups"].ask(run_id, BACKGROUND, anew=True)
    assert answer.status == "COMPLETED"
    assert route.call_count == 2


async def test_without_redis_each_process_shares_by_itself(database_url: str, run_id: str):
    router = respx.MockRouter()
    route = platform(router, run_id).mock(return_value=says("running"))
    async with asking(router, database_url, Servers(database_url, "redis://127.0.0.1:1")) as service:
        answers = await asyncio.gather(*(status_of(service, run_id) for _ in range(20)))
        answer = await service.state["lookups"].ask(run_id, POLL, anew=True)
    assert {answer["source"] for answer in answers} == {"happyrobot"}
    assert answer.heard
    assert route.call_count == 2


# The pace


async def spread_of(paces: list[Pace], waiters: int, turns: int) -> list[float]:
    taken: list[float] = []

    async def wait(number: int) -> None:
        while len(taken) < turns:
            if await paces[number % len(paces)].turn(1):
                taken.append(time.monotonic())

    await asyncio.gather(*(wait(number) for number in range(waiters)))
    return sorted(taken)


async def test_all_processes_together_keep_the_pace(servers: Servers, context_id: str):
    clients = [Redis.from_url(servers.redis_url) for _ in range(3)]
    taken = await spread_of([Pace(client, context_id, 20) for client in clients], waiters=12, turns=30)
    for client in clients:
        await client.aclose()
    # Any second sees 20 of them at most: Redis spaces them evenly, and we hear of it a little later.
    assert all(later - earlier > 1 - 0.05 for earlier, later in zip(taken, taken[20:], strict=False))


async def test_without_redis_a_process_keeps_the_pace_by_itself(context_id: str):
    taken = await spread_of([Pace(Redis.from_url("redis://127.0.0.1:1"), context_id, 20)], waiters=4, turns=25)
    assert all(later - earlier > 1 - 0.05 for earlier, later in zip(taken, taken[20:], strict=False))


async def test_two_accounts_have_a_pace_each(servers: Servers, context_id: str):
    client = Redis.from_url(servers.redis_url)
    one, other = Pace(client, f"{context_id} secret-a", 0.1), Pace(client, f"{context_id} secret-b", 0.1)
    assert [await one.turn(0), await other.turn(0), await one.turn(0)] == [True, True, False]
    keys = [key.decode() async for key in client.scan_iter("switchboard:pace*")]
    await client.aclose()
    assert keys
    assert not [key for key in keys if "secret" in key]


@pytest.mark.parametrize(("a_second", "interval"), [(8, 0.125), (0.5, 2), (2.5, 0.4), (1000, 0.001), (0.001, 60)])
def test_the_pace_is_an_even_one(a_second: float, interval: float):
    quota = pace._quota(a_second)
    assert quota.emission_interval == pytest.approx(interval)
    assert quota.burst == 1


async def test_background_work_waits_for_its_turn_and_gives_up_in_the_end(
    database_url: str, servers: Servers, context_id: str, monkeypatch: pytest.MonkeyPatch
):
    impatient = Effort(patience=0.05, timeout=1)
    monkeypatch.setattr("switchboard.happyrobot.client.BACKGROUND", impatient)
    async with asking(respx.MockRouter(), database_url, servers, happyrobot_org_id=context_id) as service:
        happyrobot = service.state["happyrobot"]
        monkeypatch.setattr(happyrobot._pace, "turn", lambda _: asyncio.sleep(60))
        first = asyncio.create_task(happyrobot.turn(impatient))
        with pytest.raises(NoTurn):
            await happyrobot.turn(impatient)
        with pytest.raises(NoTurn):
            await first


async def test_who_would_wait_in_vain_need_not_wait(
    database_url: str, servers: Servers, monkeypatch: pytest.MonkeyPatch
):
    go_on = asyncio.Event()

    async def as_long_as_it_takes(_: Pace, __: float) -> bool:
        return await go_on.wait()

    monkeypatch.setattr(Pace, "turn", as_long_as_it_takes)
    redis = Redis.from_url(servers.redis_url)
    happyrobot = HappyRobot(settings_for(database_url, servers.redis_url, None, happyrobot_api_pace=3), redis)
    effort = Effort(patience=2, timeout=5)
    waiting = [asyncio.create_task(happyrobot.turn(effort)) for _ in range(6)]
    await asyncio.sleep(0)
    with pytest.raises(NoTurn):
        await happyrobot.turn(effort)
    # Nobody waits for those, and they wait for nobody.
    job = asyncio.create_task(happyrobot.turn(BACKGROUND))
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(*waiting, job)
    await happyrobot.turn(effort)
    await happyrobot.aclose()
    await redis.aclose()
