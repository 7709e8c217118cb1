"""What is asked of a run, from the environment (or `make bench NAME=value`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

GROUPS = ("callbacks", "one_run", "lives", "triggers", "reads", "fanout", "memory", "growth")


class Unusable(Exception):
    """What was asked for cannot be measured here; says why."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured, and for how long."""

    rounds: int
    seconds: int
    """Of one load, in whole seconds, as wrk takes them."""
    runs: int
    burst: int
    """Callbacks of the one run whose loss is counted."""
    stream_rates: tuple[int, ...]
    """Events a second."""
    stream_rounds: int
    stream_seconds: int
    streams: int
    idle_streams: int
    grown_events: int


FULL = Size(
    rounds=3,
    seconds=3,
    runs=100_000,
    burst=2_000,
    stream_rates=(10, 30, 60, 150),
    stream_rounds=2,
    stream_seconds=10,
    streams=1_000,
    idle_streams=10_000,
    grown_events=5_000_000,
)
QUICK = Size(
    rounds=1,
    seconds=1,
    runs=20_000,
    burst=500,
    stream_rates=(30, 150),
    stream_rounds=1,
    stream_seconds=3,
    streams=300,
    idle_streams=1_000,
    grown_events=100_000,
)

CONNECTIONS = (1, 8, 32, 128)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another backend with the guide's contract, which somebody else has started."""

    url: str
    database_url: str
    key: str
    hook_port: int
    """Where it sends its triggers, and asks for statuses."""


@dataclass(frozen=True, slots=True)
class Options:
    groups: tuple[str, ...]
    size: Size
    peer: Peer | None
    database_url: str | None
    redis_url: str | None
    report: Path | None
    """Where it goes; None only prints it."""
    lock: Path | None
    """Held during each round, where several people measure on one machine."""

    @classmethod
    def read(cls, environment: Mapping[str, str], report: Path) -> Self:
        """Only a full run replaces the report, unless OUT says where it goes. Raises Unusable."""
        quick = environment.get("QUICK", "") not in {"", "0"}
        only = tuple(filter(None, environment.get("ONLY", "").replace(",", " ").split()))
        if unknown := set(only) - set(GROUPS):
            raise Unusable(f"ONLY: {', '.join(sorted(unknown))} is none of {', '.join(GROUPS)}")
        out = environment.get("OUT")
        return cls(
            groups=tuple(group for group in GROUPS if not only or group in only),
            size=QUICK if quick else FULL,
            peer=_peer(environment),
            database_url=environment.get("DATABASE_URL") or None,
            redis_url=environment.get("REDIS_URL") or None,
            report=Path(out).absolute() if out else None if quick or only else report,
            lock=Path(environment["LOCK"]).absolute() if environment.get("LOCK") else None,
        )


def _peer(environment: Mapping[str, str]) -> Peer | None:
    url = environment.get("PEER_URL", "").rstrip("/")
    if not url:
        return None
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname not in {"127.0.0.1", "localhost"} or parts.port is None:
        raise Unusable("PEER_URL must be http://127.0.0.1 with a port: load is sent to this machine alone")
    database_url = environment.get("PEER_DATABASE_URL", "")
    if not database_url:
        raise Unusable("PEER_DATABASE_URL must be set beside PEER_URL: runs are written to its table agent_runs")
    return Peer(
        f"http://127.0.0.1:{parts.port}",
        database_url,
        environment.get("PEER_KEY") or "k",
        int(environment.get("HOOK_PORT") or "3399"),
    )
