"""`switchboard doctor`: what is wrong, and what to do about it. Changes nothing, and places no call."""

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass
from uuid import uuid4

import httpx
import typer
from alembic.script import ScriptDirectory
from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard import database, embedded, jobs, local, logs, migrate, workflows
from switchboard.clients import Client
from switchboard.errors import PostgresAway, postgres_is_away
from switchboard.happyrobot.client import READ, HappyRobot, KeyRefused, NoAnswer, NotKnown, NotSent, reach
from switchboard.runs.ingest import TURN
from switchboard.sealing import SealBroken, Sealer
from switchboard.settings import Settings
from switchboard.tables import SEALED
from switchboard.workflows import Workflow

_LONGEST = 15.0
"""Seconds that the checks of one thing may take together; those of different things run side by side."""

_PATIENCE = 5.0
"""Seconds that any one of them may wait for an answer."""

_LATE = 60.0
"""Seconds for which a job may be due until that is odd."""

_MISSED = 60.0
"""Seconds since something that runs every minute should have run, after which no worker is alive."""


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one check."""

    level: Level
    check: str
    what: str
    advice: str | None = None

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.check}: {self.what}{f'. {self.advice}' if self.advice else ''}"


Findings = AsyncGenerator[Finding, None]


def run(*, as_json: bool) -> None:
    """Prints what the checks find; ends with status 1 if anything is wrong."""
    settings, findings = _settings()
    logs.configure(settings.model_copy(update={"log_level": "error"}))
    all_is_well = local.run(_report(_with_what_runs_here(settings), findings, as_json=as_json))
    raise typer.Exit(0 if all_is_well else 1)


async def _report(settings: Settings, findings: list[Finding], *, as_json: bool) -> bool:
    # Said in here: to leave, the event loop waits for names that are still looked up, and nobody else should.
    findings = [*findings, *await _examine(settings)]
    all_is_well = all(finding.level is not Level.FAIL for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ok": all_is_well, "checks": [asdict(finding) for finding in findings]}, indent=2))
    else:
        typer.echo("\n".join(map(str, findings)))
    return all_is_well


async def _examine(settings: Settings) -> list[Finding]:
    checks = {
        "PostgreSQL": _postgresql(settings),
        "Redis": _redis(settings),
        "Platform API": _platform_api(settings),
        "workflow default": _default_workflow(settings),
        "APP_URL": _own_address(settings),
    }
    found = await asyncio.gather(*(_bounded(check, findings) for check, findings in checks.items()))
    return [finding for findings in found for finding in findings]


async def _bounded(check: str, findings: Findings) -> list[Finding]:
    """What is found until the check ends, breaks or takes too long."""
    found: list[Finding] = []
    try:
        async with contextlib.aclosing(findings), asyncio.timeout(_LONGEST):
            async for finding in findings:
                found.append(finding)  # noqa: PERF401  # those before an error count
    except TimeoutError:
        found.append(Finding(Level.FAIL, check, "no answer in time"))
    except Exception as error:  # noqa: BLE001  # its own words may hold what is nobody's business
        found.append(Finding(Level.FAIL, check, f"cannot be checked ({type(error).__name__})"))
    return found


# Settings


class _Environment(BaseSettings):
    """Which environment is meant, whatever else is said about it."""

    model_config = Settings.model_config

    environment: str = "development"


def _settings() -> tuple[Settings, list[Finding]]:
    """The settings, and what is wrong with them; then with the defaults in place of those that cannot be read."""
    try:
        settings = Settings()
    except ValidationError as error:
        wrong = _complaints(error)
        findings = [Finding(Level.FAIL, "settings", f"{name.upper()} {what}") for name, what in wrong.items()]
        return _as_far_as_they_go(), findings
    return settings, [Finding(Level.OK, "settings", f"fit together ({settings.environment})")]


def _complaints(error: ValidationError) -> dict[str, str]:
    return {str(each["loc"][0]): each["msg"] for each in error.errors(include_url=False, include_input=False)}


def _as_far_as_they_go() -> Settings:
    # What is unsafe in production can be looked at all the same; what is malformed cannot.
    usable: dict[str, Any] = {"environment": "development", "reconcile_after": 1, "stale_after": 2}
    try:
        settings = Settings(**usable)
    except ValidationError as error:
        defaults = {name: Settings.model_fields[name].get_default() for name in _complaints(error)}
        settings = Settings(**defaults | usable)
    return settings.model_copy(update={"environment": _Environment().environment})


def _with_what_runs_here(settings: Settings) -> Settings:
    """With the servers and the secret of the data folder where they would be used; starts and makes nothing."""
    if settings.environment == "production":
        return settings
    folder = Path(settings.switchboard_data_dir).resolve()
    found: dict[str, SecretStr] = {}
    with contextlib.suppress(OSError):
        found["app_secret"] = SecretStr((folder / local.SECRET_FILE).read_text().strip())
    with contextlib.suppress(OSError):
        if (servers := embedded.found(folder)) is not None:
            found["database_url"] = SecretStr(servers.database_url)
            found["redis_url"] = SecretStr(servers.redis_url)
    return settings.model_copy(update={name: it for name, it in found.items() if getattr(settings, name) is None})


def _not_there(settings: Settings, check: str, variable: str) -> Finding:
    if settings.environment == "production":
        return Finding(Level.FAIL, check, f"{variable} is not set")
    return Finding(Level.OK, check, "does not run; `switchboard serve` starts one, unless it is named")


# PostgreSQL, and what only it knows


async def _postgresql(settings: Settings) -> Findings:
    if settings.database_url is None:
        yield _not_there(settings, "PostgreSQL", "DATABASE_URL")
        return
    engine = database.connect(settings.database_url.get_secret_value(), pool_size=1, statement_timeout=_PATIENCE)
    try:
        async with engine.connect() as conn:
            began = time.monotonic()
            version = await conn.scalar(text("SHOW server_version"))
            yield Finding(Level.OK, "PostgreSQL", f"{version} answers in {_ms(began)}")
            schema = await _schema(conn)
            yield schema
            yield await _turn(conn)
            if schema.level is Level.FAIL:
                return
            for finding in await _work(conn):
                yield finding
            yield await _sealed(conn, settings)
            registered = [workflow for workflow, _ in await workflows.listed(conn)]
    except PostgresAway as error:
        advice = "Does it run, can it be reached from here, is DATABASE_URL right, are its connections used up?"
        yield Finding(Level.FAIL, "PostgreSQL", str(error), advice)
        return
    finally:
        await engine.dispose()
    for finding in await asyncio.gather(*map(_hook, registered)):
        yield finding


async def _schema(conn: AsyncConnection) -> Finding:
    try:
        revision = await conn.scalar(text("SELECT version_num FROM alembic_version"))
    except ProgrammingError:
        revision = None  # there is no such table
    await conn.rollback()
    earlier = await asyncio.to_thread(migrate.earlier_revisions)
    newest = ScriptDirectory.from_config(migrate.config()).get_current_head()
    if revision is None or revision in earlier:
        what = f"is at {revision or 'nothing'}, this version needs {newest}"
        return Finding(Level.FAIL, "schema", what, "Run `switchboard migrate`")
    if revision != newest:
        what = f"is at {revision}, newer than this version's {newest}"
        return Finding(Level.WARN, "schema", what, "Fine during a deployment; else this version is an old one")
    return Finding(Level.OK, "schema", f"is the newest, {revision}")


async def _turn(conn: AsyncConnection) -> Finding:
    """Whether callbacks can be written, for which their writers take turns."""
    began = time.monotonic()
    try:
        await conn.execute(TURN)
    except (DBAPIError, TimeoutError) as error:
        if postgres_is_away(error) and not isinstance(error, TimeoutError):
            raise
        return Finding(
            Level.FAIL,
            "writers",
            "wait for their turn in vain, so that no callback is taken",
            "Who has it: SELECT pid, state, xact_start, query FROM pg_locks JOIN pg_stat_activity USING (pid) "
            "WHERE locktype = 'advisory' AND granted; pg_terminate_backend(pid) ends a session",
        )
    finally:
        await conn.rollback()
    return Finding(Level.OK, "writers", f"get their turn in {_ms(began)}")


async def _work(conn: AsyncConnection) -> list[Finding]:
    """Whether workers live, and keep up."""
    missed = await jobs.overdue(conn, "sweep")
    due = [pile for pile in await jobs.piles(conn) if pile.state == jobs.DUE]
    advice = "Start `switchboard serve`, without --no-worker, or `switchboard worker`"
    if missed is None:
        workers = Finding(Level.FAIL, "workers", "none has ever run", advice)
    elif missed > _MISSED:
        workers = Finding(Level.FAIL, "workers", f"none has been alive for {missed:.0f} s", advice)
    else:
        workers = Finding(Level.OK, "workers", "are alive")
    oldest = max(due, key=lambda pile: pile.oldest, default=None)
    if oldest is None or oldest.oldest < _LATE:
        return [workers, Finding(Level.OK, "jobs", "none is overdue")]
    what = f"{sum(pile.number for pile in due)} are due, one ({oldest.job}) for {oldest.oldest:.0f} s"
    advice = "More workers help, or a higher HAPPYROBOT_API_PACE if HappyRobot allows it"
    return [workers, Finding(Level.WARN, "jobs", what, advice)]


async def _sealed(conn: AsyncConnection, settings: Settings) -> Finding:
    """Whether the secrets that are stored can be opened."""
    sealer = None if settings.app_secret is None else Sealer.of(settings)
    opened, closed = 0, []
    for stored in SEALED:
        (key,) = stored.table.primary_key
        for name, sealed in await conn.execute(select(key, stored).where(stored.is_not(None)).order_by(key)):
            if _opens(sealer, sealed):
                opened += 1
            else:
                closed.append(f"{stored.table.name} {name} ({stored.name})")
    if closed:
        what = f"{len(closed)} of {opened + len(closed)} stored secrets cannot be opened: {', '.join(closed[:5])}"
        advice = "Set APP_SECRET, or APP_SECRET_PREVIOUS, to what sealed them, or store them anew"
        return Finding(Level.FAIL, "APP_SECRET", what, advice)
    if settings.app_secret is None:
        return Finding(Level.WARN, "APP_SECRET", "is not set", "Without it no secret can be stored, no token signed")
    return Finding(Level.OK, "APP_SECRET", f"opens all {opened} stored secrets")


def _opens(sealer: Sealer | None, sealed: str) -> bool:
    if sealer is None:
        return False
    try:
        sealer.open(sealed)
    except SealBroken:
        return False
    return True


# Redis


async def _redis(settings: Settings) -> Findings:
    if settings.redis_url is None:
        yield _not_there(settings, "Redis", "REDIS_URL")
        return
    redis = Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_timeout=_PATIENCE,
        socket_connect_timeout=_PATIENCE,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        await redis.ping()
        began = time.monotonic()
        await redis.ping()
        yield Finding(Level.OK, "Redis", f"answers in {_ms(began)}")
        yield await _news(redis)
    except (RedisError, OSError) as error:
        advice = "Does it run, is REDIS_URL right? Until then streams are seconds late, and limits hold in each process"
        yield Finding(Level.FAIL, "Redis", f"does not do what it is asked ({type(error).__name__})", advice)
    finally:
        await redis.aclose()


async def _news(redis: Redis) -> Finding:
    """Whether what is published arrives."""
    channel = f"switchboard:doctor:{uuid4()}"
    began = time.monotonic()
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe(channel)
        await pubsub.get_message(timeout=_PATIENCE)  # that it is subscribed
        await redis.publish(channel, "news")
        message = await pubsub.get_message(timeout=_PATIENCE)
    if message is None:
        return Finding(Level.FAIL, "news", "do not arrive: Redis loses what is published", "Streams are seconds late")
    return Finding(Level.OK, "news", f"arrive in {_ms(began)}")


# HappyRobot


async def _platform_api(settings: Settings) -> Findings:
    if settings.happyrobot_webhook_url is None and settings.environment != "production":
        yield Finding(Level.OK, "Platform API", "is the simulator's")
        return
    if settings.happyrobot_api_key is None:
        what = "HAPPYROBOT_API_KEY is not set"
        yield Finding(Level.WARN, "Platform API", what, "Runs that fall silent time out, whatever became of them")
        return
    redis = Redis()  # not asked: one question needs no pace
    happyrobot = HappyRobot(settings, redis)
    began = time.monotonic()
    try:
        await happyrobot.run(str(uuid4()), READ, turn_taken=True)
    except NotKnown:
        took = _ms(began)
        if await _minds_keys(settings, redis):
            yield Finding(Level.OK, "Platform API", f"takes HAPPYROBOT_API_KEY, and answers in {took}")
        else:
            what = "knows nothing, whatever the key"
            yield Finding(Level.WARN, "Platform API", what, "Is HAPPYROBOT_API_URL right, to the end of its path?")
    except KeyRefused as error:
        advice = "Is HAPPYROBOT_API_KEY of the region of HAPPYROBOT_API_URL, and of the organisation HAPPYROBOT_ORG_ID?"
        yield Finding(Level.FAIL, "Platform API", f"refuses HAPPYROBOT_API_KEY ({error})", advice)
    except NoAnswer as error:
        advice = f"Is HAPPYROBOT_API_URL right, can {_host(settings.happyrobot_api_url)} be reached from here?"
        yield Finding(Level.FAIL, "Platform API", str(error), advice)
    else:
        what = "answers, but knows a run that does not exist"
        yield Finding(Level.WARN, "Platform API", what, "Is HAPPYROBOT_API_URL HappyRobot's?")
    finally:
        await happyrobot.aclose()
        await redis.aclose()


async def _minds_keys(settings: Settings, redis: Redis) -> bool:
    """Whether a key that is none is refused: else an address where nothing is would pass for HappyRobot's."""
    nobody = settings.model_copy(update={"happyrobot_api_key": SecretStr("no-key-of-anybody")})
    happyrobot = HappyRobot(nobody, redis)
    try:
        await happyrobot.run(str(uuid4()), READ, turn_taken=True)
    except KeyRefused:
        return True
    except NoAnswer:
        return False
    finally:
        await happyrobot.aclose()
    return False


async def _default_workflow(settings: Settings) -> Findings:
    default = workflows.default(settings)
    if default is not None:
        yield await _hook(default)
    elif settings.environment == "production":
        yield Finding(Level.FAIL, "workflow default", "HAPPYROBOT_WEBHOOK_URL is not set")
    else:
        yield Finding(Level.OK, "workflow default", "HAPPYROBOT_WEBHOOK_URL is not set: calls go to the simulator")


async def _hook(workflow: Workflow) -> Finding:
    """Whether a connection to a hook can be made."""
    check, host = f"workflow {workflow.id}", _host(workflow.hook.url)
    if _goes_by_proxy(workflow.hook.url):
        return Finding(Level.WARN, check, f"{host} is reached by way of a proxy, which was not tried")
    try:
        await reach(workflow.hook)
    except NotSent as error:
        level = Level.FAIL if workflow.active else Level.WARN
        return Finding(level, check, f"{host}: {error}", _why(error.__cause__))
    return Finding(Level.OK, check, f"{host} can be reached")


def _goes_by_proxy(url: str) -> bool:
    """Whether the environment names a proxy for this address, by which it is then called."""
    parts, proxies = urlsplit(url), getproxies()
    return bool(proxies.get(parts.scheme) or proxies.get("all")) and not proxy_bypass(parts.netloc)


def _why(error: BaseException | None) -> str:
    match error:
        case socket.gaierror():
            return "There is no such host for this machine: is the hook's address right, does DNS work?"
        case ssl.SSLError():
            return "Its certificate is not trusted here: is the hook's address right, does a proxy come between?"
        case _:
            return "Nobody takes the connection: is the hook's address right, does a firewall let this machine out?"


# This service


async def _own_address(settings: Settings) -> Findings:
    """Whether what HappyRobot sends to our address comes to this service, or to one with the same key."""
    if settings.app_url is None:
        yield Finding(Level.WARN, "APP_URL", "is not set", "HappyRobot cannot send callbacks; only the simulator can")
        return
    async with Client(timeout=_PATIENCE) as client:
        try:
            alive = await client.get(f"{settings.app_url}/healthz")
            if alive.status_code != httpx.codes.OK or alive.text.replace(" ", "") != '{"status":"ok"}':
                # Not shown our key.
                what = f"GET /healthz is answered {alive.status_code}, and not by Switchboard"
                yield Finding(Level.FAIL, "APP_URL", what, "Does it lead here, path included?")
                return
            yield Finding(Level.OK, "APP_URL", f"{_host(settings.app_url)} is alive")
            yield await _callbacks(client, settings)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            what = f"{_host(settings.app_url)} cannot be reached ({type(error).__name__})"
            yield Finding(Level.FAIL, "APP_URL", what, "Does the service run, do DNS and proxies lead to it?")


async def _callbacks(client: httpx.AsyncClient, settings: Settings) -> Finding:
    key = settings.callback_key
    headers = {} if key is None else {"X-API-KEY": key.get_secret_value()}
    # Without a body it is refused, but only once the key was taken.
    answer = await client.post(settings.callback_url, headers=headers)
    match answer.status_code:
        case httpx.codes.BAD_REQUEST if key is None:
            what = "are taken from everybody"
            return Finding(Level.WARN, "callbacks", what, "Set HAPPYROBOT_CALLBACK_KEY or HAPPYROBOT_X_API_KEY")
        case httpx.codes.BAD_REQUEST:
            return Finding(Level.OK, "callbacks", "reach a service that takes the key")
        case httpx.codes.UNAUTHORIZED:
            advice = "Another service answers at APP_URL, or it was started with other settings"
            return Finding(Level.FAIL, "callbacks", "are refused: the key at APP_URL is another one", advice)
        case status:
            advice = "Does a proxy before it let POST through to this service?"
            return Finding(Level.FAIL, "callbacks", f"are answered {status}, not by this service", advice)


def _host(url: str) -> str:
    """All of an address that is shown: the rest of a hook's is as good as a key."""
    return urlsplit(url).hostname or "its host"


def _ms(began: float) -> str:
    return f"{max(1, round((time.monotonic() - began) * 1000))} ms"
