"""Events: what happened to runs, as it comes in, is stored, listed and streamed."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic_core import from_json, to_json
from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from switchboard.jobs import Job
from switchboard.portions import kept, until_heavy
from switchboard.sight import Sight
from switchboard.tables import RunStatus, run_events


def iso(moment: datetime) -> str:
    """A time as JavaScript's `toISOString` writes it: UTC, milliseconds, `Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Timestamp = Annotated[
    datetime,
    PlainSerializer(iso, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2026-01-15T09:30:00.250Z"]}),
]

# What answers are about. All examples of the OpenAPI document tell of one call.
IdOfRun = Annotated[str, Field(examples=["19184e4c-74ca-474a-8978-e77f5a661e4f"])]
IdOfContext = Annotated[str, Field(examples=["order_123"])]
IdOfWorkflow = Annotated[str, Field(examples=["default"])]
IdOfExecution = Annotated[UUID, Field(examples=["5f0c8c1e-6a55-4a3e-9a53-0c8f5f3a6f10"])]
IdOfApproval = Annotated[UUID, Field(examples=["b1f6a1a8-3a43-4f0b-8a0f-6c8c6f1f0c11"])]


APPROVAL_REQUESTED = "pending_approval"
"""The type of events with which a run asks for something to be approved."""


@dataclass(slots=True)  # frozen, each would take three times as long to make
class NewEvent:
    """Something that happened to a run and is not written yet."""

    run_id: str
    event_type: str
    data: Any = None
    status: RunStatus | None = None
    """What it says about the run, if anything."""
    outcome: Any = None
    """What it leaves as `result` or `error` of a run that ends so."""
    guess: bool = False
    """Whether that is only what we suppose, because nobody says anything."""
    only_if_it_moves: bool = False
    """Whether it is worth an event only where it changes the run's status."""
    only_after: int | None = None
    """The run's newest event, if this one stands only while nothing else has happened."""
    then: Job | None = None
    """What is to be done once it is written."""
    session_ended: bool = False
    """Whether the run may well be over now, so that HappyRobot should be asked at once."""
    occurred_at: datetime | None = None
    execution_id: str | None = None
    """Our execution, where HappyRobot sends it back."""
    resume_url: str | None = None
    """Where the decision goes, of a request for approval."""
    dedupe_key: UUID | None = None
    """The same for every copy of this event; None when copies cannot be told apart."""


class EventOut(BaseModel):
    """One thing that happened to a run. `run_id`, `event_type` and `data` are the guide's."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": 4711,
                    "run_id": "19184e4c-74ca-474a-8978-e77f5a661e4f",
                    "context_id": "order_123",
                    "workflow_id": "default",
                    "event_type": "log",
                    "status": "RUNNING",
                    "timestamp": "2026-01-15T09:30:12.500Z",
                    "data": {"message": "Blue Mesa Freight has answered"},
                }
            ]
        },
    )

    id: int = Field(description="Grows with time; resume after it.", examples=[4711])
    run_id: IdOfRun
    context_id: IdOfContext
    workflow_id: IdOfWorkflow
    event_type: str = Field(examples=["log"])
    status: RunStatus = Field(description="The run's status once this had happened.")
    timestamp: Timestamp = Field(description="When it happened, or when we learnt of it.")
    data: Any = Field(examples=[{"message": "Blue Mesa Freight has answered"}])


@dataclass(slots=True)
class Event:
    """One thing that happened to a run, as it is stored. `encode` writes it as an `EventOut`."""

    id: int
    run_id: str
    context_id: str
    workflow_id: str
    event_type: str
    status: RunStatus
    timestamp: datetime
    data: Any
    written_at: float | None = None
    """When its row was written, in seconds since 1970, if that is known; for us alone."""

    @classmethod
    def of(cls, row: Row[Any]) -> "Event":
        """The event in a row of `run_events`."""
        return cls(
            row.id,
            row.run_id,
            row.context_id,
            row.workflow_id,
            row.event_type,
            RunStatus(row.status),
            row.occurred_at or row.created_at,
            row.data,
            row.created_at.timestamp(),
        )

    def encode(self) -> bytes:
        """The event as one line of JSON."""
        return to_json(
            {
                "id": self.id,
                "run_id": self.run_id,
                "context_id": self.context_id,
                "workflow_id": self.workflow_id,
                "event_type": self.event_type,
                "status": self.status,
                "timestamp": iso(self.timestamp),
                "data": self.data,
            }
        )

    @classmethod
    def decode(cls, line: bytes) -> "Event":
        """Reads what `encode` wrote. Raises ValueError for anything else."""
        try:
            fields = from_json(line)
            status, timestamp = RunStatus(fields["status"]), datetime.fromisoformat(fields["timestamp"])
            return cls(**{**fields, "status": status, "timestamp": timestamp})
        except (TypeError, KeyError) as error:
            raise ValueError("not an event") from error


@dataclass(frozen=True, slots=True)
class Scope:
    """Which events somebody wants, those of a context, of a run, or all, of what they may see."""

    sight: Sight
    context_id: str | None = None
    run_id: str | None = None

    def __contains__(self, event: object) -> bool:
        return (
            isinstance(event, Event)
            and self.context_id in (None, event.context_id)
            and self.run_id in (None, event.run_id)
            and self.sight.covers(event.context_id, event.workflow_id)
        )


class Page(NamedTuple):
    """Some events, oldest first."""

    events: Sequence[Event]
    more: bool
    """Whether there are others behind them."""

    def next_limit(self, most: int) -> int:
        """How many to ask for next: where few fit on a page, not many more need be weighed."""
        return min(most, 2 * len(self.events))


_HEAVY = 4_000_000
"""Bytes of events after which a page ends: one of them may weigh as much as a request."""


async def read_events(conn: AsyncConnection, scope: Scope, *, after: int, limit: int, up_to: int | None = None) -> Page:
    """Events with `after` < id <= `up_to`: so many at most, and fewer where they are heavy, but at least one."""
    query = select(run_events).where(run_events.c.id > after).order_by(run_events.c.id).limit(limit + 1)
    if scope.context_id is not None:
        query = query.where(run_events.c.context_id == scope.context_id)
    if scope.run_id is not None:
        query = query.where(run_events.c.run_id == scope.run_id)
    query = scope.sight.narrow(query, run_events.c.context_id, run_events.c.workflow_id)
    if up_to is not None:
        query = query.where(run_events.c.id <= up_to)
    rows = (await conn.execute(until_heavy(query, "data", _HEAVY, lambda column: [column.id]))).all()
    page, more = kept(rows, limit)
    return Page([Event.of(row) for row in page], more)
