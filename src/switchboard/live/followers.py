"""Who follows what: each event is shown to those alone who may want it, however many others there are."""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence

from switchboard import metrics
from switchboard.events import Scope
from switchboard.live.messages import Frame, joined

MAX_UNREAD = 1000
MAX_UNREAD_BYTES = 8_000_000
"""Events, and their size, that a reader may lag behind before it is sent away. It resumes from PostgreSQL."""

HEARTBEAT = 15.0
"""Seconds after which a follower is reminded again, so that proxies keep a quiet stream and dead peers are noticed."""

PATIENCE = 2
"""Heartbeats that a browser may miss while it is being sent something: 30 seconds, and no more than 45."""

_PORTION = 256_000
"""Bytes of events that are shown in one piece, unless a single one is larger."""

_SLICES = 60
"""Parts in which followers are reminded, one after the other: thousands at once would keep everybody else waiting."""


def _nothing() -> None:
    pass


class Follower:
    """One reader's place in the hub: the events of its scope that it has not read yet."""

    __slots__ = (
        "_closed",
        "_reminded",
        "_unread",
        "_unread_bytes",
        "_wake",
        "dismissed",
        "joined_after",
        "lagging",
        "scope",
        "sent",
        "sink",
        "slice",
        "stuck",
        "unheard",
        "when_stuck",
    )

    def __init__(self, scope: Scope, joined_after: int, place: int = 0) -> None:
        self.scope = scope
        self.slice = place
        self.joined_after = joined_after
        """Every event up to this id was committed before this follower joined; later ones are handed to it."""
        self.sent = joined_after
        """Its reader has been sent whatever it is to see of the events up to this id."""
        self.sink: Callable[[bytes], bool] | None = None
        """Sends a waiting reader something at once; returns False if that cannot be done."""
        self.lagging = False
        self.dismissed = False
        self.stuck = False
        self.when_stuck: Callable[[], object] = _nothing
        """What to do about a reader that has not taken what it is being sent for too long."""
        self.unheard: int | None = None
        """How often it was reminded since the reader began to be sent something; None while it is sent nothing."""
        self._unread: list[Frame] = []
        self._unread_bytes = 0
        self._wake: asyncio.Future[None] | None = None
        self._reminded = False
        self._closed = False

    def push(self, frames: Sequence[Frame], part: bytes) -> bool:
        """Hands events to the reader, which are `part` in one piece; whether it has been sent them already."""
        if self._takes_now(frames, part):
            return True
        for frame in frames:
            if len(self._unread) >= MAX_UNREAD or self._unread_bytes >= MAX_UNREAD_BYTES:
                self.lagging = True
                self.close()
            if not self._closed:
                self._unread.append(frame)
                self._unread_bytes += len(frame.line)
        self._wake_up()
        return False

    def _takes_now(self, frames: Sequence[Frame], part: bytes) -> bool:
        # Only while the reader waits: then nothing is unread, and nothing on its way.
        waits = self._wake is not None and not self._wake.done()
        if self.sink is None or not waits or frames[0].event.id <= self.sent or not self.sink(part):
            return False
        self.sent = frames[-1].event.id
        return True

    def remind(self) -> None:
        """Makes the reader be told something, also if there is nothing to read; notices if it takes nothing."""
        self._reminded = True
        self._wake_up()
        if self.unheard is not None:
            self.unheard += 1
            if self.unheard > PATIENCE:
                self.stuck = True
                self.when_stuck()

    def close(self) -> None:
        """Ends the reader's waiting: it gets what it has not read, then nothing more."""
        self._closed = True
        self._wake_up()

    def dismiss(self) -> None:
        """Sends the reader away, whose time is over."""
        self.dismissed = True
        self.close()

    async def read(self) -> list[Frame] | None:
        """All that is unread, as soon as there is something; nothing, where it was only reminded.

        None once the follower is closed, and everything read.
        """
        if not (self._unread or self._reminded or self._closed):
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        frames, self._unread, self._unread_bytes = self._unread, [], 0
        self._reminded = False
        return None if self._closed and not frames else frames

    def _wake_up(self) -> None:
        if self._wake is not None:
            if not self._wake.done():
                self._wake.set_result(None)
            self._wake = None


_Place = tuple[str | None, str | None]
"""Where somebody waits for events: those of a run, of a context, or with neither of the two all of them."""


class Followers:
    """All readers of a process, by what they follow."""

    def __init__(self) -> None:
        self._by_scope: dict[Scope, dict[Follower, None]] = {}
        self._scopes: dict[_Place, dict[Scope, dict[Follower, None]]] = {}
        self._slices: list[dict[Follower, None]] = [{} for _ in range(_SLICES)]
        self._turns = itertools.cycle(range(_SLICES))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Follower]:
        return itertools.chain.from_iterable(self._slices)

    def join(self, scope: Scope, joined_after: int) -> Follower:
        follower = Follower(scope, joined_after, next(self._turns))
        together = self._by_scope.setdefault(scope, {})
        if not together:
            for place in _places(scope):
                self._scopes.setdefault(place, {})[scope] = together
        together[follower] = self._slices[follower.slice][follower] = None
        self._count += 1
        return follower

    def leave(self, follower: Follower) -> None:
        scope = follower.scope
        together = self._by_scope[scope]
        del together[follower], self._slices[follower.slice][follower]
        self._count -= 1
        if not together:
            del self._by_scope[scope]
            for place in _places(scope):
                del self._scopes[place][scope]
                if not self._scopes[place]:
                    del self._scopes[place]

    def show(self, frames: Sequence[Frame]) -> None:
        """Hands events, in their order, to those whose scope they are in, and several of a scope in one piece.

        Who has the same scope is asked about once for all.
        """
        for some in _portions(frames):
            wanted: dict[Scope, list[Frame]] = {}
            for frame in some:
                event = frame.event
                for place in ((event.run_id, None), (None, event.context_id), (None, None)):
                    for scope in self._scopes.get(place, ()):
                        if event in scope:
                            wanted.setdefault(scope, []).append(frame)
            for scope, found in wanted.items():
                part, sent = joined(found), False
                for follower in self._by_scope[scope]:
                    sent |= follower.push(found, part)
                if sent:
                    metrics.note_sent(found[0].written_at)

    async def remind(self) -> None:
        """Reminds everybody, again and again, a part at a time."""
        time = asyncio.get_running_loop().time
        due = time()
        for turn in itertools.cycle(self._slices):
            due = max(due + HEARTBEAT / _SLICES, time())  # nobody is stuck because we were
            await asyncio.sleep(due - time())
            for follower in turn:
                follower.remind()


def _portions(frames: Sequence[Frame]) -> Iterator[Sequence[Frame]]:
    begin = size = 0
    for end, frame in enumerate(frames):
        if size and size + len(frame.sse) > _PORTION:
            yield frames[begin:end]
            begin, size = end, 0
        size += len(frame.sse)
    if size:
        yield frames[begin:]


def _places(scope: Scope) -> list[_Place]:
    """Where to wait for all that a scope may hold; one event comes to no more than one of them."""
    if scope.run_id is not None:
        return [(scope.run_id, None)]
    if scope.context_id is not None:
        return [(None, scope.context_id)]
    if scope.sight.contexts is not None:
        return [(None, context_id) for context_id in scope.sight.contexts]
    return [(None, None)]
