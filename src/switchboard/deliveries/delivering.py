"""Sending what is in the outbox: claim it, send it, write down what came of it. No transaction is open meanwhile."""

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Float, Row, and_, cast, delete, exists, extract, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from switchboard import metrics
from switchboard.access.webhooks import Endpoint, endpoint_of
from switchboard.deliveries.log import SHOWN
from switchboard.deliveries.sender import TIMEOUT, Attempt, Sender
from switchboard.deliveries.signing import headers
from switchboard.sealing import SealBroken, SecretMissing
from switchboard.settings import Settings
from switchboard.tables import DeliveryStatus, deliveries, delivery_attempts

log = structlog.stdlib.get_logger(__name__)

PAUSES = (1.0, 5.0, 15.0)
"""Seconds after each attempt that failed until the next one; then it is left alone."""

_CLAIM = 2 * TIMEOUT
"""Seconds for which a delivery is one sender's, who is gone if it is not done by then."""

_AT_ONCE = 8
"""Webhooks that are under way to one customer from one process."""

_LOOKING, _SENDING = 2, 4
"""Connections to PostgreSQL of those who see whether it is their turn, and of those whose turn it is."""

_SLOW, _SLOW_AT_ONCE = 2.0, 2
"""Seconds that attempts take where there are fewer places."""

_STAYS = 1.5
"""Seconds until the next attempt that are waited out where one is."""

_LONGEST_WAIT = 60.0
"""Seconds after which one that had to wait for others of its customer looks again, at most."""

_SOON = 0.2
"""Seconds after which it looks again, at least."""


def pause_after(failures: int) -> float | None:
    """Seconds until the next attempt after so many that failed; None when there is none."""
    return PAUSES[failures - 1] if failures <= len(PAUSES) else None


@dataclass(slots=True)
class Lane:
    """What is under way to one customer from this process.

    An endpoint that does not answer keeps no more than its own lane busy: what finds it full is told when to come back.
    """

    sending: int = 0
    away: dict[UUID, float] = field(default_factory=dict)
    """When those are to come back that were sent away."""
    usually: float = 0.1
    """Seconds that an attempt takes, of late."""

    @property
    def places(self) -> int:
        """Fewer where an endpoint takes its time: many of those together must leave room for the rest."""
        return _AT_ONCE if self.usually < _SLOW else _SLOW_AT_ONCE

    @property
    def is_full(self) -> bool:
        return self.sending >= self.places

    @property
    def is_idle(self) -> bool:
        return not self.sending and max(self.away.values(), default=0) < time.monotonic()

    def send_away(self, delivery_id: UUID) -> float:
        """Seconds until it may be the turn of one more."""
        now = time.monotonic()
        # Those that are overdue came back elsewhere.
        self.away = {each: until for each, until in self.away.items() if until > now and each != delivery_id}
        wait = min(max(_SOON, (len(self.away) / self.places + 1) * self.usually), _LONGEST_WAIT)
        self.away[delivery_id] = now + wait
        return wait

    def note(self, seconds: float) -> None:
        self.usually += (seconds - self.usually) / 4


class Deliverer:
    """Sends webhooks, each in a job of its own."""

    def __init__(self, settings: Settings, db: AsyncEngine, sender: Sender) -> None:
        self._settings = settings
        self._db = db
        self._sender = sender
        self._lanes: dict[UUID, Lane] = {}
        # Many are under way, and requests need connections, too. Those who only look do not hold up those who send.
        self._looks, self._desk = asyncio.Semaphore(_LOOKING), asyncio.Semaphore(_SENDING)

    async def deliver(self, subject: str) -> float | None:
        """Sends a delivery if it is due; seconds until it is to be looked at again, None when it is done with."""
        delivery_id = UUID(subject)
        while True:
            async with self._looks, self._db.connect() as conn:
                waiting = await _waiting(conn, delivery_id)
            if waiting is None:
                return None
            if waiting.due_in > _STAYS:
                return float(waiting.due_in)
            if waiting.due_in > 0:
                # Worth staying for: put off, it would come up a little late.
                await asyncio.sleep(waiting.due_in)
                continue
            if (away := await self._in_its_lane(waiting.key_id, delivery_id, first=waiting.is_first)) is not None:
                return away

    async def _in_its_lane(self, key_id: UUID, delivery_id: UUID, *, first: bool) -> float | None:
        """Sends a delivery if there is room; seconds until it may look again, None when it has had its turn."""
        lane = self._lanes.setdefault(key_id, Lane())
        if lane.is_full or not first:
            return lane.send_away(delivery_id)
        lane.away.pop(delivery_id, None)
        lane.sending += 1
        try:
            return await self._send(delivery_id, lane)
        finally:
            lane.sending -= 1
            if lane.is_idle:
                self._lanes.pop(key_id, None)

    async def _send(self, delivery_id: UUID, lane: Lane) -> float | None:
        """Sends a delivery once; seconds until it may look again where somebody else is sending it."""
        async with self._desk, self._db.begin() as conn:
            delivery = await _claim(conn, delivery_id)
            endpoint = None if delivery is None else await self._endpoint(conn, delivery.key_id)
        if delivery is None:
            return _SOON  # somebody else was faster: when it is to be looked at is known by then
        began = time.monotonic()
        attempt = await self._attempt(delivery, endpoint)
        lane.note(time.monotonic() - began)
        final = attempt.delivered or isinstance(endpoint, str)
        pause = None if final else pause_after(delivery.failures + 1)
        async with self._desk, self._db.begin() as conn:
            await _write_down(conn, delivery, attempt, pause)
        outcome = "delivered" if attempt.delivered else "given_up" if pause is None else "failed"
        metrics.DELIVERY_ATTEMPTS.labels(outcome).inc()
        if not attempt.delivered:
            log.warning(
                "webhook not delivered",
                delivery_id=delivery.id,
                execution_id=delivery.execution_id,
                status=attempt.status_code,
                error=attempt.error,
                again_in=pause,
            )
        return None

    async def _endpoint(self, conn: AsyncConnection, key_id: UUID) -> Endpoint | str:
        """Where it goes, or why it cannot go anywhere."""
        try:
            found = await endpoint_of(conn, self._settings, key_id)
        except (SealBroken, SecretMissing) as error:
            log.error("webhook cannot be signed", error=error)  # noqa: TRY400  # in its own words
            return "its secret cannot be read"
        return found or "the API key was revoked, or is reported to nobody any more"

    async def _attempt(self, delivery: Row[Any], endpoint: Endpoint | str | None) -> Attempt:
        if not isinstance(endpoint, Endpoint):
            return Attempt(datetime.now(UTC), 0, error=endpoint)
        signed = headers(
            [secret.get_secret_value() for secret in endpoint.secrets],
            event=delivery.event,
            execution_id=delivery.execution_id,
            delivery_id=delivery.id,
            timestamp=int(time.time()),
            body=delivery.body,
        )
        return await self._sender.send(endpoint.url, signed, delivery.body)


_is_pending = deliveries.c.status == DeliveryStatus.PENDING


async def _waiting(conn: AsyncConnection, delivery_id: UUID) -> Row[Any] | None:
    """A delivery that is to be sent: whose it is, in how many seconds, and whether it is the next of its execution.

    One that somebody is sending is so at the earliest when they have had their time.
    """
    earlier = deliveries.alias()
    # Its first attempt is not over: what follows would overtake it. An endpoint that fails does not hold up the rest.
    not_tried = and_(earlier.c.status == DeliveryStatus.PENDING, earlier.c.failures == 0)
    free_at = func.greatest(deliveries.c.due_at, deliveries.c.claimed_until)
    query = select(
        deliveries.c.key_id,
        cast(extract("epoch", free_at - func.clock_timestamp()), Float).label("due_in"),
        ~exists()
        .where(earlier.c.execution_id == deliveries.c.execution_id, earlier.c.number < deliveries.c.number, not_tried)
        .label("is_first"),
    ).where(deliveries.c.id == delivery_id, _is_pending)
    return (await conn.execute(query)).one_or_none()


async def _claim(conn: AsyncConnection, delivery_id: UUID) -> Row[Any] | None:
    """Makes a delivery ours for a while; None if it is somebody else's, was sent just now, or is done with."""
    is_due = deliveries.c.due_at <= func.now()
    nobodys = or_(deliveries.c.claimed_until.is_(None), deliveries.c.claimed_until < func.now())
    claimed = await conn.execute(
        update(deliveries)
        .where(deliveries.c.id == delivery_id, _is_pending, is_due, nobodys)
        .values(claimed_until=func.now() + timedelta(seconds=_CLAIM))
        .returning(deliveries)
    )
    found: Row[Any] | None = claimed.one_or_none()
    return found


async def _write_down(conn: AsyncConnection, delivery: Row[Any], attempt: Attempt, pause: float | None) -> None:
    """Writes down what came of an attempt; `pause` is in seconds, None where it was the last one."""
    # Whoever has claimed it after us writes its attempt behind ours.
    await conn.execute(select(deliveries.c.id).where(deliveries.c.id == delivery.id).with_for_update())
    values: dict[str, Any] = {"claimed_until": None}
    if attempt.delivered:
        values |= {"status": DeliveryStatus.DELIVERED, "finished_at": func.now()}
    else:
        values["failures"] = delivery.failures + 1
        if pause is None:
            values |= {"status": DeliveryStatus.FAILED, "finished_at": func.now()}
        else:
            values["due_at"] = func.now() + timedelta(seconds=pause)
    mine = update(deliveries).where(deliveries.c.id == delivery.id)
    if not attempt.delivered:
        # Not if it has taken so long that somebody else has claimed it.
        mine = mine.where(deliveries.c.claimed_until == delivery.claimed_until)
    await conn.execute(mine.values(values))
    so_far = select(func.coalesce(func.max(delivery_attempts.c.number), 0)).where(
        delivery_attempts.c.delivery_id == delivery.id
    )
    await conn.execute(
        insert(delivery_attempts).values(
            delivery_id=delivery.id,
            number=so_far.scalar_subquery() + 1,
            started_at=attempt.started_at,
            duration_ms=attempt.duration_ms,
            status_code=attempt.status_code,
            response=attempt.response,
            error=attempt.error,
        )
    )
    await conn.execute(
        delete(delivery_attempts).where(
            delivery_attempts.c.delivery_id == delivery.id,
            delivery_attempts.c.number <= so_far.scalar_subquery() - SHOWN,
        )
    )
