"""The integration guide's handlers in Python, as they stand: what somebody has who follows it and adds nothing.

Its table, its handlers, its set of webhook ids in memory; FastAPI, SQLAlchemy and asyncpg in place of Next.js and
Prisma; Redis pub/sub for the live updates, as it recommends. Its weaknesses are meant to be there: a log is appended
by reading the run's JSON and writing it back, copies are known to one process alone, and a run is stored only after
its call was placed.
"""

import asyncio
import contextlib
import json
import os
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any

import httpx
from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse, StreamingResponse
from redis.asyncio import Redis
from sqlalchemy import String, Text, func, select, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

WEBHOOK_URL = os.environ["HAPPYROBOT_WEBHOOK_URL"]
API_URL = os.environ["HAPPYROBOT_API_URL"]
API_KEY = os.environ["HAPPYROBOT_API_KEY"]
ORG_ID = os.environ["HAPPYROBOT_ORG_ID"]
KEY = os.environ["HAPPYROBOT_X_API_KEY"]
REDIS_URL = os.environ["REDIS_URL"]
CALLBACK_URL = f"{os.environ['APP_URL']}/api/webhooks/happyrobot"

STATUSES = {
    "pending": "PENDING",
    "running": "RUNNING",
    "completed": "COMPLETED",
    "failed": "FAILED",
    "canceled": "CANCELED",
}
NEWEST = 200
"""Runs in a list. The guide sets no limit, and a list of everything could be compared with nothing."""


class Base(DeclarativeBase):
    pass


class AgentRun(Base):
    __tablename__ = "agent_runs"

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(String(255), unique=True)
    context_id: Mapped[str] = mapped_column(String(255), index=True)
    name: Mapped[str | None] = mapped_column(String(255))
    description: Mapped[str | None] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(50), server_default="PENDING", index=True)
    # SQLAlchemy keeps the name `metadata` to itself.
    stored: Mapped[dict[str, Any]] = mapped_column("metadata", JSONB, server_default="{}")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now(), onupdate=func.now())


engine = create_async_engine(os.environ["DATABASE_URL"], pool_size=20, max_overflow=0)
sessions = async_sessionmaker(engine, expire_on_commit=False)
redis = Redis.from_url(REDIS_URL)
happyrobot = httpx.AsyncClient(timeout=30)
processed_webhooks: set[str] = set()
readers: defaultdict[str, set["asyncio.Queue[Any]"]] = defaultdict(set)


async def hand_out() -> None:
    """Gives each update to those who follow its context: one subscription for the whole process."""
    # redis-py would give up on a quiet channel after a few seconds.
    async with Redis.from_url(REDIS_URL, socket_timeout=None).pubsub() as channel:
        await channel.psubscribe("context:*")
        async for message in channel.listen():
            if message["type"] == "pmessage":
                context_id = message["channel"].decode().removeprefix("context:")
                news = json.loads(message["data"])
                for queue in readers.get(context_id, ()):
                    queue.put_nowait(news)


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as conn:
        await conn.run_sync(Base.metadata.create_all)
    handing_out = asyncio.create_task(hand_out())
    yield
    handing_out.cancel()
    await happyrobot.aclose()
    await redis.aclose()
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


def refused(status: int, error: str) -> JSONResponse:
    return JSONResponse({"error": error}, status)


@app.post("/api/happyrobot/trigger", response_model=None)
async def trigger(request: Request) -> dict[str, Any] | JSONResponse:
    body = await request.json()
    payload = {"callback_url": CALLBACK_URL, **body}
    response = await happyrobot.post(WEBHOOK_URL, json=payload, headers={"X-API-KEY": KEY})
    if not response.is_success:
        return refused(502, "Failed to trigger workflow")
    run_ids = response.json().get("queued_run_ids", [])
    async with sessions() as session:
        for run_id in run_ids:
            session.add(
                AgentRun(
                    run_id=run_id,
                    context_id=body["context_id"],
                    name=body.get("name") or "HappyRobot Run",
                    status="RUNNING",
                    stored={},
                )
            )
            await session.commit()
    return {"success": True, "run_ids": run_ids}


async def ask_happyrobot(run_id: str) -> str | None:
    headers = {"Authorization": f"Bearer {API_KEY}", "X-Organization-Id": ORG_ID}
    try:
        response = await happyrobot.get(f"{API_URL}/runs/{run_id}", headers=headers)
    except httpx.HTTPError:
        return None
    return response.json().get("status") if response.is_success else None


@app.get("/api/happyrobot/status", response_model=None)
async def status(run_id: str) -> dict[str, Any] | JSONResponse:
    async with sessions() as session:
        run = await session.scalar(select(AgentRun).where(AgentRun.run_id == run_id))
    if run is None:
        return refused(404, "Run not found")
    # No connection is held meanwhile, and none is in the guide.
    word = await ask_happyrobot(run_id)
    new_status = STATUSES.get(word or "", run.status)
    if new_status != run.status:
        async with sessions() as session:
            await session.execute(update(AgentRun).where(AgentRun.run_id == run_id).values(status=new_status))
            await session.commit()
    return {
        "run_id": run_id,
        "status": word or run.status.lower(),
        "name": run.name,
        "created_at": run.created_at,
        "updated_at": run.updated_at,
    }


@app.get("/api/happyrobot/runs")
async def runs(context_id: str | None = None) -> list[dict[str, Any]]:
    query = select(AgentRun).order_by(AgentRun.created_at.desc()).limit(NEWEST)
    if context_id:
        query = query.where(AgentRun.context_id == context_id)
    async with sessions() as session:
        found = (await session.scalars(query)).all()
    return [
        {
            "id": str(run.id),
            "runId": run.run_id,
            "contextId": run.context_id,
            "name": run.name,
            "description": run.description,
            "status": run.status,
            "metadata": run.stored,
            "createdAt": run.created_at,
            "updatedAt": run.updated_at,
        }
        for run in found
    ]


@app.post("/api/webhooks/happyrobot", response_model=None)
async def receive(
    request: Request,
    x_api_key: Annotated[str | None, Header()] = None,
    x_webhook_id: Annotated[str | None, Header()] = None,
) -> dict[str, Any] | JSONResponse:
    if x_webhook_id in processed_webhooks:
        return {"success": True, "duplicate": True}
    if x_api_key != KEY:
        return refused(401, "Unauthorized")
    payload = await request.json()
    run_id, event_type, data = payload.get("run_id"), payload.get("event_type"), payload.get("data")
    if not run_id:
        return refused(400, "run_id required")
    async with sessions() as session:
        run = await session.scalar(select(AgentRun).where(AgentRun.run_id == run_id))
        if run is None:
            return refused(404, "Run not found")
        match event_type:
            case "log":
                run.stored = {**run.stored, "logs": [*run.stored.get("logs", []), data]}
            case "completed":
                run.status = "COMPLETED"
                run.stored = {**run.stored, "result": data}
            case "failed":
                run.status = "FAILED"
                run.stored = {**run.stored, "error": data}
            case _:
                pass  # only told to those who follow
        await session.commit()
    news = {"run_id": run_id, "event_type": event_type, "data": data}
    await redis.publish(f"context:{run.context_id}", json.dumps(news))
    if x_webhook_id:
        processed_webhooks.add(x_webhook_id)
    return {"success": True}


async def lines(context_id: str) -> AsyncIterator[str]:
    queue: asyncio.Queue[Any] = asyncio.Queue()
    readers[context_id].add(queue)
    try:
        yield ": ok\n\n"
        while True:
            yield f"data: {json.dumps(await queue.get())}\n\n"
    finally:
        readers[context_id].discard(queue)


@app.get("/api/events")
async def events(context_id: str) -> StreamingResponse:
    return StreamingResponse(lines(context_id), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
