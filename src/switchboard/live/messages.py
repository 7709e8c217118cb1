"""How events travel: through Redis to every process, and from there to browsers."""

from collections.abc import Sequence
from typing import NamedTuple, Self

from switchboard.events import Event


class Frame:
    """An event, encoded once for all who read it."""

    __slots__ = ("event", "line", "sse", "written_at")

    def __init__(self, event: Event, line: bytes, written_at: float | None = None) -> None:
        self.event = event
        self.line = line
        self.written_at = written_at
        """When the event, or the first of those that came with it, was written; None if nobody has said so."""
        self.sse = b"id: %d\ndata: %b\n\n" % (event.id, line)
        """The event as a server-sent event without a name, so that `onmessage` sees it."""

    @classmethod
    def of(cls, event: Event) -> Self:
        return cls(event, event.encode(), event.written_at)


def joined(frames: Sequence[Frame]) -> bytes:
    """Events as server-sent events in one piece: it is the pieces that cost something, and not what is in them."""
    return frames[0].sse if len(frames) == 1 else b"".join([frame.sse for frame in frames])


class Head(NamedTuple):
    """The first line of a message: of which events it tells."""

    first: int
    last: int
    written_at: float | None


def pack(frames: Sequence[Frame]) -> bytes:
    """Events as a message: the first and last id, when the first was written, then a line of JSON each."""
    head = [frames[0].event.id, frames[-1].event.id]
    if (written_at := frames[0].written_at) is not None:
        head.append(round(written_at * 1_000_000))
    return b"\n".join([b" ".join(b"%d" % number for number in head), *(frame.line for frame in frames)])


def head_of(message: bytes) -> Head:
    """Reads the first line alone; an older announcer leaves out when that was. Raises ValueError for anything else."""
    first, last, *written = map(int, message.partition(b"\n")[0].split())
    if len(written) > 1:
        raise ValueError("a newer one says more")
    return Head(first, last, written[0] / 1_000_000 if written else None)


def unpack(message: bytes) -> tuple[tuple[int, int], list[Frame]]:
    """Reads what an announcer packed: the first and last id, and the events. Raises ValueError for anything else."""
    first, last, written_at = head_of(message)
    lines = message.split(b"\n")[1:]
    return (first, last), [Frame(Event.decode(line), line, written_at) for line in lines]
