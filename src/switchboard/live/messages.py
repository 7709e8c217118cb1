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

    @classmethod
    def of(cls, event: Event) -> Self:
        return cls(event, event.encode())

    @property
    def sse(self) -> bytes:
        """The event as a server-sent event without a name, so that `onmessage` sees it."""
        return b"id: %d\ndata: %b\n\n" % (self.event.id, self.line)


def pack(events: Sequence[Event]) -> bytes:
    """Events as a message: the first and last id, then a line of JSON each."""
    return b"%d %d\n" % (events[0].id, events[-1].id) + b"\n".join(event.encode() for event in events)


def unpack(message: bytes) -> tuple[tuple[int, int], list[Frame]]:
    """Reads what the announcer packed. Raises ValueError for anything else."""
    head, *lines = message.split(b"\n")
    first, last = map(int, head.split())
    return (first, last), [Frame(Event.model_validate_json(line), line) for line in lines]
