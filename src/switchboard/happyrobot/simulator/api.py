"""The simulated Platform API, v1 and v2."""

import asyncio
import io
import secrets
import wave
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from switchboard.happyrobot.simulator import records
from switchboard.happyrobot.simulator.bodies import is_key, json_object
from switchboard.happyrobot.simulator.run import Run, now

Endpoint = Callable[[Request], Awaitable[Response]]

ENDLESS = 2**53


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One request to the Platform API, counted before its key is checked."""

    method: str
    path: str
    run_id: str | None
    at: datetime


class PlatformApi:
    def __init__(
        self,
        runs: Mapping[str, Run],
        *,
        api_key: str | None,
        shape: records.Shape,
        closing: asyncio.Event,
    ) -> None:
        self.runs = runs
        self.api_key = api_key
        self.shape = shape
        self.closing = closing
        self.requests: list[ApiRequest] = []

    @property
    def routes(self) -> list[Route]:
        def route(path: str, endpoint: Endpoint, method: str = "GET") -> Route:
            return Route(path, self._guarded(endpoint), methods=[method])

        return [
            route("/api/v1/runs", self.list_runs),
            route("/api/v1/runs/{run_id}", self.get_run),
            route("/api/v1/runs/{run_id}/recordings", self.list_recordings),
            route("/api/v2/runs/{run_id}", self.get_run_v2),
            route("/api/v2/runs/{run_id}/sessions", self.list_sessions),
            route("/api/v2/runs/{run_id}/cancel", self.cancel_run, "POST"),
            route("/api/v2/sessions/{session_id}/messages", self.list_messages),
            Route("/recordings/{session_id}.wav", recording),  # the link is its own permission
        ]

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        async def guarded(request: Request) -> Response:
            path, run_id = request.url.path, request.path_params.get("run_id")
            self.requests.append(ApiRequest(request.method, path, run_id, datetime.now(UTC)))
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            if not is_key(key if scheme.lower() == "bearer" else None, self.api_key):
                raise HTTPException(401, "invalid or revoked API key")
            if (run := self.runs.get(run_id or "")) is not None:
                await self._go_wrong(run)
            return await endpoint(request)

        return guarded

    async def _go_wrong(self, run: Run) -> None:
        """As the run's faults want it."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.closing.wait(), run.faults.api_delay)
        if run.faults.api_answer is not None:
            raise HTTPException(int(run.faults.api_answer), "the simulator was told to answer so")
        if now() < run.created_at + timedelta(seconds=run.faults.api_missing):
            raise HTTPException(404, "run not found")

    async def list_runs(self, request: Request) -> Response:
        query = request.query_params
        found = [
            run
            for run in self.runs.values()
            if query.get("use_case_id") in (None, "", run.slug, records.use_case_id(run.slug))
            and query.get("status") in (None, run.status)
        ]
        start = number(request, "offset", default=0, least=0, most=ENDLESS)
        limit = number(request, "limit", default=1000, least=1, most=5000)
        return JSONResponse([records.row(run) for run in in_order(request, found, "desc")[start : start + limit]])

    async def get_run(self, request: Request) -> Response:
        match request.query_params.get("shape", self.shape):
            case "nested":
                return JSONResponse(records.nested(self._run(request)))
            case "flat":
                return JSONResponse(records.flat(self._run(request)))
            case _:
                raise HTTPException(400, "shape is nested or flat")

    async def list_recordings(self, request: Request) -> Response:
        """New links at every request, as signed links are."""
        run = self._run(request)
        days = number(request, "url_expires_in_days", default=1, least=1, most=7)
        wanted = request.query_params.get("session_id") in (None, run.session_id)
        expires = int((now() + timedelta(days=days)).timestamp())
        url = request.url_for("recording", session_id=run.session_id).include_query_params(
            Expires=expires, Signature=secrets.token_urlsafe(24)
        )
        recordings = [{"session_id": run.session_id, "url": str(url)}] if run.messages and run.over and wanted else []
        return JSONResponse({"recordings": recordings})

    async def get_run_v2(self, request: Request) -> Response:
        return JSONResponse(records.v2(self._run(request)))

    async def list_sessions(self, request: Request) -> Response:
        return JSONResponse(page(request, records.v2_sessions(self._run(request)), "desc"))

    async def list_messages(self, request: Request) -> Response:
        for run in self.runs.values():
            if run.session_id == request.path_params["session_id"] and run.started_at is not None:
                return JSONResponse(page(request, records.v2_messages(run), "asc"))
        raise HTTPException(404, "session not found")

    async def cancel_run(self, request: Request) -> Response:
        run = self._run(request)
        await json_object(request)
        if run.over:
            raise HTTPException(409, f"run is already {run.status}")
        run.cancel(reason="canceled_by_request")
        return JSONResponse({"status": "canceled"})

    def _run(self, request: Request) -> Run:
        run = self.runs.get(request.path_params["run_id"])
        if run is None:
            raise HTTPException(404, "run not found")
        return run


async def recording(_request: Request) -> Response:
    """A second of silence, so that the link plays."""
    sound = io.BytesIO()
    with wave.open(sound, "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(8000)
        wav.writeframes(bytes(2 * 8000))
    return Response(sound.getvalue(), media_type="audio/wav")


def page(request: Request, items: Sequence[Any], order: str) -> dict[str, Any]:
    at = number(request, "page", default=1, least=1, most=ENDLESS)
    size = number(request, "page_size", default=50, least=1, most=100)
    pages = -(-len(items) // size)
    return {
        "data": in_order(request, items, order)[(at - 1) * size : at * size],
        "pagination": {
            "page": at,
            "page_size": size,
            "total_pages": pages,
            "total_records": len(items),
            "has_next_page": at < pages,
            "has_previous_page": at > 1,
        },
    }


def in_order(request: Request, items: Sequence[Any], default: str) -> Sequence[Any]:
    """`items` stand as they came about; `sort=desc` begins with the newest."""
    sort = request.query_params.get("sort", default)
    if sort not in ("asc", "desc"):
        raise HTTPException(400, "sort is asc or desc")
    return items if sort == "asc" else items[::-1]


def number(request: Request, name: str, *, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and least <= int(text[:20]) <= most):
        raise HTTPException(400, f"{name} must be a number from {least} to {most}")
    return int(text)
