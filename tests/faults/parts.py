"""PostgreSQL, Valkey and Switchboard's own processes: started, killed, stopped, and started again when they end."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import asyncpg
import httpx
import psutil  # type: ignore[import-untyped]

from switchboard.embedded.servers import PORT, Account, Programs

_STARTS_WITHIN, _ENDS_WITHIN = 60.0, 30.0
"""Seconds; no more than bounds on a hang."""


_ROOT = Path(__file__).parents[2]


class Size(NamedTuple):
    """How large a process is."""

    pid: int
    memory: int
    """Bytes that are resident."""
    files: int
    """Those that are open."""


@dataclass
class Part:
    """A program that somebody starts again when it ends, as a platform does."""

    name: str
    command: Callable[[], list[str]]
    is_ready: Callable[[Self], Awaitable[bool]]
    log: Path
    environment: Mapping[str, str] | None = None
    folder: Path | None = None
    """In which it is started."""
    account: Account | None = None
    wanted: bool = False
    """Whether it is started again when it ends."""
    surprises: list[str] = field(default_factory=list)
    """When it ended though nobody had asked it to, and how."""
    address: str = ""
    _told: bool = False
    """Whether somebody has ended it, or what it needs to run."""
    _process: "subprocess.Popen[bytes] | None" = None
    _watching: asyncio.Task[None] | None = None
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def __aenter__(self) -> Self:
        self.wanted = True
        self._watching = asyncio.create_task(self._watch())
        await self.until_ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.wanted = False
        assert self._watching is not None
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        if self._process is not None:
            self.send(signal.SIGCONT)
            self.send(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(15):
                    await self.gone()
            self.send(signal.SIGKILL)
            await self.gone()
            if self._process.stdin is not None:
                self._process.stdin.close()
            if self._process.stdout is not None:
                self._process.stdout.close()

    async def until_ready(self) -> None:
        async with asyncio.timeout(_STARTS_WITHIN):
            await self._ready.wait()

    async def gone(self) -> None:
        """Waits until the program of now has ended; by then another may have begun."""
        process = self._process
        assert process is not None
        async with asyncio.timeout(_ENDS_WITHIN):
            while process.poll() is None:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.01)

    def send(self, signum: signal.Signals) -> None:
        """Sends it to the program, and to what that has started."""
        assert self._process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid)
            for one in (family, *family.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(signum)

    async def kill(self) -> None:
        """Ends it at once; it is started again."""
        assert self._process is not None
        self._told = True
        self._ready.clear()
        self._process.send_signal(signal.SIGKILL)
        await self.gone()

    async def end(self, signum: signal.Signals) -> None:
        """Tells it to end, and keeps it away until it is wanted again."""
        self.wanted, self._told = False, True
        self._ready.clear()
        assert self._process is not None
        self._process.send_signal(signum)
        await self.gone()
        if self.address and self._process.returncode:
            self.surprises.append(f"{self.name} was told to leave, and left with {self._process.returncode}")

    async def kill_a_child(self, chance: random.Random) -> None:
        """Ends one of the processes that it has started, if there is any."""
        self._ready.clear()
        with contextlib.suppress(psutil.NoSuchProcess):
            if children := psutil.Process(self.pid).children():
                chance.choice(children).kill()
        async with asyncio.timeout(_STARTS_WITHIN):
            while not await self.is_ready(self):  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.02)
        self._ready.set()

    def want(self) -> None:
        self.wanted = True

    def size(self) -> Size:
        one = psutil.Process(self.pid)
        return Size(one.pid, one.memory_info().rss, one.num_fds())

    def last_words(self, size: int = 4000) -> str:
        """The end of what it has logged, in so many bytes at most."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - size))
            return log.read().decode(errors="replace").partition("\n")[2]

    async def _watch(self) -> None:
        while True:
            if self.wanted and (self._process is None or self._process.poll() is not None):
                if self._process is not None and not self._told:
                    self.surprises.append(f"{self.name} ended by itself, with {self._process.returncode}")
                with contextlib.suppress(TimeoutError):
                    await self._start()
            await asyncio.sleep(0.02)

    async def _start(self) -> None:
        self._ready.clear()
        if self._process is not None:
            for pipe in filter(None, (self._process.stdin, self._process.stdout)):
                pipe.close()
        with self.log.open("ab") as log:
            self._process = _spawn(self.command(), log, self.environment, self.folder, self.account)
        self._told, self.address = False, ""
        process = self._process
        while process.poll() is None and self.wanted:
            if await self.is_ready(self):
                self._ready.set()
                return
            await asyncio.sleep(0.02)


def _spawn(
    command: list[str],
    log: IO[bytes],
    environment: Mapping[str, str] | None,
    folder: Path | None,
    account: Account | None,
) -> "subprocess.Popen[bytes]":
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=environment, cwd=folder, **_as(account))


def postgres(folder: Path, *, durable: bool) -> tuple[Part, str]:
    """A PostgreSQL of its own, and the path of its socket; its data lie in `folder`, which may be small."""
    programs, account, data = Programs.installed(), Account.for_servers(folder), folder / "postgres"
    if account is not None:
        account.receive(folder)
        account.open_way_to(programs.postgres)
    _initialise(data, programs, account)
    settings = ["listen_addresses=", "max_connections=200", "timezone=UTC", "min_wal_size=32MB", "max_wal_size=96MB"]
    settings += ["shared_buffers=32MB", "log_min_messages=error"]
    if not durable:
        settings.append("fsync=off")  # what a killed process has written is kept by the machine
    command = [str(programs.postgres), "-D", str(data), "-k", str(folder), "-p", str(PORT)]
    command += [f"--{setting}" for setting in settings]
    path = folder / f".s.PGSQL.{PORT}"

    async def is_ready(_: Part) -> bool:
        try:
            connection = await asyncpg.connect(host=str(folder), port=PORT, user="postgres", database="postgres")
            await connection.close()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        return True

    return Part("postgres", lambda: command, is_ready, folder.parent / "postgres.log", account=account), str(path)


def _initialise(data: Path, programs: Programs, account: Account | None) -> None:
    command = [str(programs.initdb), "-D", str(data), "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"]
    command += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **_as(account))


def _as(account: Account | None) -> dict[str, Any]:
    return {} if account is None else {"user": account.uid, "group": account.gid, "extra_groups": []}


def valkey(folder: Path) -> tuple[Part, str]:
    """A Valkey that keeps nothing, and the path of its socket."""
    programs, path = Programs.installed(), folder / "valkey.sock"
    command = [str(programs.valkey), "--dir", str(folder), "--unixsocket", str(path), "--port", "0", "--save", ""]

    async def is_ready(_: Part) -> bool:
        try:
            reader, writer = await asyncio.open_unix_connection(str(path))
        except OSError:
            return False
        writer.write(b"PING\r\n")
        answer = await reader.read(16)
        writer.close()
        return answer.startswith(b"+PONG")

    return Part("valkey", lambda: command, is_ready, folder / "valkey.log"), str(path)


def switchboard(name: str, folder: Path, environment: Mapping[str, str], *arguments: str) -> Part:
    """A process of Switchboard's, by the commands that users type."""
    log = folder / f"{name}.log"
    # Not where the suite was started: there may be a developer's `.env`.
    environment = {
        **environment,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "tests.faults.process", *arguments]

    async def is_ready(part: Part) -> bool:
        process = part._process
        assert process is not None
        assert process.stdout is not None
        said = (await asyncio.to_thread(process.stdout.readline)).decode()
        if not said:
            return False
        last = said.split()[-1]
        if arguments[0] == "worker":
            part.address = f"http://127.0.0.1:{last}"
            return True
        part.address = last
        async with httpx.AsyncClient(base_url=part.address, timeout=5) as http:
            while process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if (await http.get("/healthz")).status_code == 200:
                        return True
                await asyncio.sleep(0.02)
        return False

    return Part(name, lambda: command, is_ready, log, environment=environment, folder=folder)


class FullDisk:
    """A folder that is a disk of its own and can be filled, where this user may mount one."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        self._filler = folder / "filler"
        self.mounted = False
        if os.geteuid() == 0 and shutil.which("mount"):
            tried = [
                "mount",
                "-t",
                "tmpfs",
                "-o",
                f"size={megabytes}m,mode=0755",
                f"faults-{folder.parent.name}",
                str(folder),
            ]
            self.mounted = subprocess.run(tried, capture_output=True, check=False).returncode == 0

    async def fill(self) -> None:
        await asyncio.to_thread(self._fill)

    def _fill(self) -> None:
        with self._filler.open("ab", buffering=0) as filler:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        filler.write(b"\0" * size)

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)

    def unmount(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=False)
