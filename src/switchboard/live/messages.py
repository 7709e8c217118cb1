"""How events travel: through Redis to every process, and from there to browsers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from switchboard.events import Event


@dataclass(frozen=True, slots=True)
class Frame:
    """An event, encoded once for all who read it."""

    event: Event
    line: bytes
    written_at: float | None = None
    """When the event, or the first of those that came with it, was written; None if nobody has said so."""

    @classmethod
    def of(cls, event: Event) -> Self:
        return cls(event, event.encode(), event.written_at)

    @property
    def sse(self) -> bytes:
        """The event as a server-sent event without a name, so that `onmessage` sees it."""
        return b"id: %d\ndata: %b\n\n" % (self.event.id, self.line)


def pack(events: Sequence[Event]) -> bytes:
    """Events as a message: the first and last id, when the first was written, then a line of JSON each."""
    head = [events[0].id, events[-1].id]
    if (written_at := events[0].written_at) is not None:
        head.append(round(written_at * 1_000_000))
    return b"\n".join([b" ".join(b"%d" % number for number in head), *(event.encode() for event in events)])


def unpack(message: bytes) -> tuple[tuple[int, int], list[Frame]]:
    """Reads what the announcer packed; an older one leaves out when that was. Raises ValueError for anything else."""
    head, *lines = message.split(b"\n")
    first, last, *written = map(int, head.split())
    if len(written) > 1:
        raise ValueError("a newer one says more")
    written_at = written[0] / 1_000_000 if written else None
    return (first, last), [Frame(Event.model_validate_json(line), line, written_at) for line in lines]
