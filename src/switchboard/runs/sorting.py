"""What becomes of news about runs: decided here, without looking at anything, and written by `ingest`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal
from uuid import UUID

from switchboard.events import APPROVAL_REQUESTED, Event, NewEvent
from switchboard.jobs import CHECK, Job
from switchboard.runs.status import Standing, advance, timed_out
from switchboard.tables import ApprovalStatus, ExecutionStatus, RunStatus

TRIGGERED = "triggered"
"""The type of a run's first event."""


@dataclass(frozen=True, slots=True)
class NewRuns:
    """Runs that HappyRobot named in its answer to a trigger."""

    execution_id: UUID
    workflow_id: str
    context_id: str
    name: str
    description: str | None
    run_ids: Sequence[str]
    adopted: bool = False
    """Whether it was not HappyRobot's answer that named them, but a callback of theirs."""

    @property
    def data(self) -> dict[str, Any]:
        """What the first event of each of them says."""
        told: dict[str, Any] = {
            "name": self.name,
            "workflow_id": self.workflow_id,
            "execution_id": str(self.execution_id),
        }
        return told | {"adopted": True} if self.adopted else told


@dataclass(frozen=True, slots=True)
class Unconfirmed:
    """A trigger that ended without runs: HappyRobot named none, or refused it, or nobody knows."""

    execution_id: UUID
    status: ExecutionStatus
    error: str


@dataclass(frozen=True, slots=True)
class GivenUp:
    """An execution that HappyRobot never confirmed, and of which nothing was heard for too long."""

    execution_id: UUID


@dataclass(frozen=True, slots=True)
class Decision:
    """What somebody has decided about what an execution asks to have approved."""

    execution_id: UUID
    verdict: Literal[ApprovalStatus.APPROVED, ApprovalStatus.REJECTED]
    comment: str | None = None
    approval_id: UUID | None = None
    """Which request, if they say so; else the one that is pending."""
    key_id: UUID | None = None
    """Whose API key it was."""


News = NewEvent | NewRuns | Unconfirmed | GivenUp | Decision


@dataclass(frozen=True, slots=True)
class Recorded:
    """It is in the timeline."""

    event: Event


@dataclass(frozen=True, slots=True)
class Registered:
    """The runs have rows, and what was held for them is in their timelines."""


@dataclass(frozen=True, slots=True)
class Noted:
    """The execution says what is known. The runs are those whose callbacks had named it before."""

    run_ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A copy of it was there already; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Unchanged:
    """It was wanted only if it moved its run, and it did not."""


@dataclass(frozen=True, slots=True)
class Held:
    """Its run is not known yet; it is kept until the run is."""


@dataclass(frozen=True, slots=True)
class Decided:
    """It is decided so, by this decision or by an earlier one."""

    approval_id: UUID


class Undecided(StrEnum):
    """Why a decision does not count."""

    NOTHING_PENDING = "nothing_pending"
    OTHERWISE = "otherwise"  # it was decided before, the other way
    NEEDS_COMMENT = "needs_comment"


Outcome = Recorded | Registered | Noted | Duplicate | Unchanged | Held | Decided | Undecided


@dataclass(frozen=True, slots=True)
class Request:
    """Something that a run of an execution asks to have approved."""

    execution_id: UUID
    run_id: str
    data: Any
    resume_url: str | None


@dataclass(frozen=True, slots=True)
class Written:
    """What came of a turn."""

    outcomes: Sequence[Outcome]
    """One for each of the news, in their order."""
    events: Sequence[Event]
    """All that is new in the timelines, by id; to be announced after the commit."""


@dataclass(slots=True)
class Run:
    """A run as the database has it, and as this turn leaves it."""

    run_id: str
    context_id: str
    workflow_id: str
    execution_id: UUID | None
    before: Standing
    now: Standing
    known: set[str]
    """Which of `result` and `error` its metadata holds."""
    has_held: bool
    asleep: bool = False
    """Whether HappyRobot is to be asked about it later than it is about a run that has just spoken."""
    newest_event: int | None = None
    """Loaded only where somebody's news depend on it."""
    gained: dict[str, Any] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)

    @property
    def changed(self) -> bool:
        return self.now != self.before or bool(self.gained)

    @property
    def unsettled(self) -> bool:
        """Whether HappyRobot may have something to say that we do not know: it is not over, or only by our guess."""
        return not self.now.settled

    @property
    def oversleeps(self) -> bool:
        """Whether, having spoken, it should be asked about sooner."""
        return self.asleep and self.unsettled

    def take(self, event: NewEvent) -> bool:
        """Moves the run as the event says, and keeps a result or an error that comes with its end.

        Returns whether the run moved.
        """
        was = self.now
        self.now = timed_out(was) if event.guess else advance(was, event.status)
        if was.timed_out and not self.now.timed_out:
            self.known.discard("error")
            self.lost.add("error")
        if event.status is self.now.status and self.now.timed_out is event.guess:
            # Also after the end: a poll may have learnt of it before the callback brought the result.
            self._keep(_KEPT_AS.get(event.status), event.outcome)
        return self.now != was

    def _keep(self, name: str | None, outcome: Any) -> None:
        if name is not None and outcome is not None and name not in self.known:
            self.known.add(name)
            self.gained[name] = outcome


_KEPT_AS = {RunStatus.COMPLETED: "result", RunStatus.FAILED: "error"}


@dataclass(slots=True)
class Sorting:
    """Which events are written, held or dropped; moves the runs on the way."""

    runs: dict[str, Run]
    seen: set[UUID]
    rows: list[dict[str, Any]] = field(default_factory=list)
    early: list[NewEvent] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    """What is to be done because of them."""
    requests: list[Request] = field(default_factory=list)
    """What is to be approved because of them."""

    def sort(self, event: NewEvent) -> Outcome | int:
        """What becomes of an event: the place of its row, or the reason why it has none."""
        run = self.runs.get(event.run_id)
        if run is None:
            self.early.append(event)
            return Held()
        if event.dedupe_key in self.seen:
            if event.then is not None and run.unsettled:
                self.jobs.append(event.then)  # what was to be done then may be over, and in vain
            return Duplicate()
        if event.only_after is not None and run.newest_event != event.only_after:
            return Unchanged()
        moved = run.take(event)
        if event.only_if_it_moves and not moved:
            return Unchanged()
        if event.dedupe_key is not None:
            self.seen.add(event.dedupe_key)
        run.newest_event = None  # it is this one, whose id is not known yet
        if event.session_ended and run.unsettled:
            self.jobs.append(Job(CHECK, run.run_id))
        if event.then is not None:
            self.jobs.append(event.then)
        if event.event_type == APPROVAL_REQUESTED and run.execution_id is not None and not run.now.over:
            self.requests.append(Request(run.execution_id, run.run_id, event.data, event.resume_url))
        self.rows.append(
            {
                "run_id": run.run_id,
                "context_id": run.context_id,
                "workflow_id": run.workflow_id,
                "event_type": event.event_type,
                "status": run.now.status,
                "data": event.data,
                "occurred_at": event.occurred_at,
                "dedupe_key": event.dedupe_key,
            }
        )
        return len(self.rows) - 1
