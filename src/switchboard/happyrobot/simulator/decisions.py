"""The addresses at which calls that wait for an approval take the decision."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from switchboard.happyrobot.simulator.bodies import headers_of_interest, is_key, json_object, masked
from switchboard.happyrobot.simulator.run import Run


@dataclass(slots=True)
class Decision:
    """One request to such an address, taken or refused."""

    run_id: str
    headers: dict[str, str]
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    body: dict[str, Any] | None = None  # None: no JSON object, or not read because the key was wrong
    status: int | None = None  # None: not answered

    @classmethod
    def of(cls, request: Request) -> "Decision":
        return cls(request.path_params["run_id"], headers_of_interest(request))

    def shown(self) -> dict[str, Any]:
        return asdict(self) | {"at": self.at.isoformat(), "headers": masked(self.headers)}


class Decisions:
    def __init__(self, runs: Mapping[str, Run], *, key: str | None) -> None:
        self.runs = runs
        self.key = key
        self.received: list[Decision] = []

    @property
    def route(self) -> Route:
        return Route("/resume/{run_id}/{token}", self._receive, methods=["POST"])

    async def _receive(self, request: Request) -> Response:
        decision = Decision.of(request)
        self.received.append(decision)
        try:
            answer = await self._decide(decision, request)
        except HTTPException as refused:
            decision.status = refused.status_code
            raise
        decision.status = answer.status_code
        return answer

    async def _decide(self, decision: Decision, request: Request) -> Response:
        if not is_key(request.headers.get("x-api-key"), self.key):
            raise HTTPException(401, "invalid X-API-KEY")
        decision.body = await json_object(request)
        run = self.runs.get(decision.run_id)
        if run is None or run.token != request.path_params["token"]:
            raise HTTPException(404, "nothing waits for a decision here")
        verdict = decision.body.get("decision")
        if verdict not in ("approved", "rejected"):
            raise HTTPException(400, "decision must be approved or rejected")
        if run.faults.resume_answer is not None:
            raise HTTPException(int(run.faults.resume_answer), "the simulator was told to answer so")
        # The verdict comes first: who repeats a rejection, which has ended the run, has done nothing wrong.
        if run.verdict not in (None, verdict):
            raise HTTPException(409, f"run is already {run.verdict}")
        if run.verdict is None:
            if run.over:
                raise HTTPException(409, f"run is already {run.status}")
            run.decide(verdict, decision.body.get("comment"))
        return JSONResponse({"status": verdict})
