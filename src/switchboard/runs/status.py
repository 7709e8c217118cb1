"""Where a run stands and what moves it: pure decisions."""

from collections.abc import Iterable
from dataclasses import dataclass

from switchboard.tables import FINAL, ApprovalStatus, ExecutionStatus, RunStatus

_ORDER = {
    RunStatus.PENDING: 0,
    RunStatus.RUNNING: 1,
    RunStatus.COMPLETED: 2,
    RunStatus.FAILED: 2,
    RunStatus.CANCELED: 2,
}


@dataclass(frozen=True, slots=True)
class Standing:
    """A run's status, and whether it is only our guess: FAILED because nobody had said anything for too long."""

    status: RunStatus
    timed_out: bool = False

    @property
    def over(self) -> bool:
        return self.status in FINAL

    @property
    def settled(self) -> bool:
        """Whether it is over, and not only by our guess."""
        return self.over and not self.timed_out


def timed_out(current: Standing) -> Standing:
    """Where a run stands once we have given up waiting."""
    return current if current.over else Standing(RunStatus.FAILED, timed_out=True)


def advance(current: Standing, word: RunStatus | None) -> Standing:
    """Where a run stands once HappyRobot has said `word` about it; None is an event without such a word.

    Never backwards, and nothing moves a run that is over. The exception is our own guess: HappyRobot's word
    replaces it, and one that is not final brings the run back as RUNNING, which it was before.
    """
    if word is None:
        return current
    if current.timed_out:
        return Standing(word if word in FINAL else RunStatus.RUNNING)
    return Standing(word) if _ORDER[word] > _ORDER[current.status] else current


def execution_status(runs: Iterable[RunStatus], approval: ApprovalStatus | None = None) -> ExecutionStatus:
    """What its runs and decisions make of an execution: under way until all are over; then any failure is its own.

    One that was rejected is over, whatever its runs do until they have stopped.
    """
    if approval is ApprovalStatus.REJECTED:
        return ExecutionStatus.CANCELLED
    statuses = set(runs)
    if not statuses <= FINAL:
        waits = approval is ApprovalStatus.PENDING
        return ExecutionStatus.PENDING_APPROVAL if waits else ExecutionStatus.RUNNING
    if RunStatus.FAILED in statuses:
        return ExecutionStatus.FAILED
    if RunStatus.COMPLETED in statuses:
        return ExecutionStatus.COMPLETED
    return ExecutionStatus.CANCELLED
