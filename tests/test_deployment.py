"""What is deployed: the image's recipe, its locks, what goes into it, and what Railway is told."""

import asyncio
import fnmatch
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hatchling.build import build_wheel
from typer.main import get_group

from switchboard import cli, leaving
from switchboard.app import create_app
from switchboard.settings import Settings
from tests.conftest import Service, Upstream

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RAILWAY = tomllib.loads((ROOT / "railway.toml").read_text())
LOCK, PRODUCTION, BUILD = "requirements.lock", "requirements.production.lock", "requirements.build.lock"

Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """A Dockerfile's, without comments, each in one line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    whole = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in whole.splitlines())]


RECIPE = instructions((ROOT / "Dockerfile").read_text())
IMAGE = RECIPE[max(number for number, (name, _) in enumerate(RECIPE) if name == "FROM") :]
"""The last stage, which is all that is shipped."""


def said(name: str, recipe: Iterable[Instruction] = IMAGE) -> list[str]:
    return [rest for each, rest in recipe if each == name]


def copied(recipe: Iterable[Instruction] = RECIPE) -> set[str]:
    """What is taken from the repository."""
    return {
        source for rest in said("COPY", recipe) if not rest.startswith("--from") for source in shlex.split(rest)[:-1]
    }


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of a `switchboard` command, as the command line reads them, with its name."""
    program, name, *arguments = words
    assert program == "switchboard"
    commands = get_group(cli.app)
    command = commands.get_command(commands.make_context("switchboard", [name], resilient_parsing=True), name)
    assert command is not None, f"there is no `switchboard {name}`"
    return {"command": name, **command.make_context(name, arguments).params}


def paths_answered() -> set[str]:
    app = create_app(Settings(database_url="postgresql://db/x", redis_url="redis://cache"))
    return set(app.openapi()["paths"])


def matches(path: str, pattern: str) -> bool:
    """As Docker does: whole paths, and with a folder all that is in it."""
    expression = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
    parents = [str(parent) for parent in Path(path).parents]
    return any(re.fullmatch(expression, each) for each in (path, *parents))


def let_through(path: str) -> bool:
    """Whether .dockerignore lets it into the build; the last pattern that matches decides."""
    through = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if pattern and not line.startswith("#") and matches(path, pattern):
            through = line.startswith("!")
    return through


def pinned(lock: str) -> dict[str, tuple[str, frozenset[str]]]:
    """The packages of a lock, with version and hashes."""
    whole = (ROOT / lock).read_text().replace("\\\n", " ")
    found = re.finditer(r"^([a-z0-9._-]+)(?:\[[^]]*\])?==(\S+)(.*)$", whole, re.MULTILINE)
    return {each[1]: (each[2], frozenset(re.findall(r"--hash=(\S+)", each[3]))) for each in found}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^a-z0-9._-]", each, maxsplit=1)[0] for each in requirements}


# Railway.


def test_railway_migrates_before_it_starts_what_does_not_migrate():
    [before] = RAILWAY["deploy"]["preDeployCommand"]
    assert parsed(shlex.split(before))["command"] == "migrate"
    start = parsed(shlex.split(RAILWAY["deploy"]["startCommand"]))
    assert (start["command"], start["migrate"], start["host"]) == ("serve", False, "::")


def test_railway_asks_for_a_path_that_is_answered():
    assert RAILWAY["deploy"]["healthcheckPath"] in paths_answered()


def test_railway_gives_a_process_more_time_than_it_takes_to_leave():
    # Twice as much: the clock runs on while a busy machine lets the process wait.
    assert RAILWAY["deploy"]["drainingSeconds"] >= 2 * leaving.GONE


def test_railway_builds_from_the_dockerfile_and_again_when_anything_in_it_has_changed():
    build = RAILWAY["build"]
    assert build["builder"] == "DOCKERFILE"
    assert (ROOT / build["dockerfilePath"]).is_file()
    patterns = [pattern.removeprefix("/") for pattern in build["watchPatterns"]]
    for source in {"Dockerfile", *copied()}:
        file = f"{source}/a/file" if (ROOT / source).is_dir() else source
        watched = any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
        assert watched or source in {"README.md", "LICENSE"}, source


# The image.


def test_the_image_does_not_run_as_root():
    *_, user = said("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "platforms can only see of a number that it is not root"


def test_the_image_starts_a_command_that_there_is_and_that_hears_signals():
    [command] = said("CMD")
    words = json.loads(command)  # with a shell in between, SIGTERM would end at the shell
    assert parsed(words)["command"] == "serve"
    assert parsed(words)["host"] == "::"
    assert said("ENTRYPOINT") == []  # Railway's commands take its place


def test_the_image_is_for_production_unless_it_is_told_otherwise():
    [variables] = said("ENV")
    assert "ENVIRONMENT=production" in shlex.split(variables)


def test_the_image_holds_what_is_locked_with_hashes_and_nothing_else():
    installs = re.findall(r"(?:pip|bin/python) install ([^&]*)", " && ".join(said("RUN", RECIPE)))
    locked = [each for each in installs if "--no-index" not in each]
    assert [re.search(r"--require-hashes -r (\S+)", each)[1] for each in locked] == [PRODUCTION, BUILD]  # type: ignore[index]
    assert all("--no-deps" in each for each in installs if each not in locked)
    assert [rest.partition("[")[2] for rest in said("RUN", RECIPE) if "embedded" in rest] == []
    # An environment knows its own path.
    [(source, destination)] = [shlex.split(rest)[1:] for rest in said("COPY") if rest.startswith("--from")]
    assert source == destination
    assert f"venv --without-pip {source}" in " ".join(said("RUN", RECIPE))


async def test_the_image_knows_whether_it_is_well(service: Service, upstream: Upstream):
    [check] = said("HEALTHCHECK")
    program, *arguments = json.loads(check.partition("CMD ")[2])
    assert program == "python"

    async def outcome(port: int | None) -> int:
        environment = {**os.environ, "PORT": str(port)}
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, env=environment, stderr=asyncio.subprocess.DEVNULL
        )
        return await process.wait()

    assert await outcome(urlsplit(service.url).port) == 0
    assert await outcome(urlsplit(upstream.url).port) != 0, "it answers, and does not know of any health"
    assert await outcome(1) != 0, "nobody answers"


# What goes into it.


def test_only_what_the_image_is_built_from_gets_into_the_build():
    for source in copied():
        assert (ROOT / source).exists(), source
        assert let_through(source), source
    for secret in (".env", ".env.production", "src/.env", "src/switchboard/.env.local", ".switchboard/app-secret"):
        assert not let_through(secret), secret
    for other in (".git/config", ".venv/bin/python", "tests/conftest.py", LOCK, "src/switchboard/__pycache__/a.pyc"):
        assert not let_through(other), other


def test_the_wheel_of_the_image_has_all_of_the_package_and_the_migrations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = [
        str(file.relative_to(ROOT))
        for source in copied()
        for file in (sorted((ROOT / source).rglob("*")) if (ROOT / source).is_dir() else [ROOT / source])
        if file.is_file() and "__pycache__" not in file.parts
    ]
    for file in filter(let_through, files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path))) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {
        re.sub("^(src/|(?=migrations/))", lambda found: "" if found[0] else "switchboard/", file)
        for file in files
        if file.startswith(("src/", "migrations/"))
    }
    assert packed == wanted
    pages = {"switchboard/reference/page.html", "switchboard/console/page.html"}
    assert packed > {"switchboard/migrations/env.py", *pages}


# The locks.


@pytest.mark.parametrize("lock", [PRODUCTION, BUILD])
def test_the_image_gets_the_versions_that_were_tested(lock: str):
    tested, shipped = pinned(LOCK), pinned(lock)
    assert shipped
    assert {name: tested.get(name) for name in shipped} == shipped
    assert all(hashes for _, hashes in shipped.values())
    assert not re.search(r"://|--\w*-?index|--find-links|@ ", (ROOT / lock).read_text())


def test_the_image_has_what_the_project_needs_and_nothing_for_development():
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    shipped = set(pinned(PRODUCTION))
    needed = names(project["dependencies"]) | names(extras["otel"])
    assert needed <= shipped
    assert (names(extras["embedded"]) | names(extras["dev"])) & shipped == set()
    assert names(PROJECT["build-system"]["requires"]) <= set(pinned(BUILD))
