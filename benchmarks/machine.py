"""On what it was measured."""

import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks import databases
from benchmarks.children import ROOT
from benchmarks.figures import Machine

_MODEL = r"model name\s*:\s*(.+)"
_KIB = r"MemTotal:\s*(\d+)"


def here(folder: Path, database_url: str, *, is_ours: bool) -> Machine:
    """This machine, where the folder holds the data of PostgreSQL if that is ours."""
    return Machine(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=_commit(),
        processor=f"{os.cpu_count()} x {_first('/proc/cpuinfo', _MODEL)}",
        memory=f"{int(_first('/proc/meminfo', _KIB)) / 1024 / 1024:.0f} GiB",
        system=f"{platform.system()} {platform.release()}",
        storage=_file_system(folder) if is_ours else "a server that was given",
        versions={
            "Python": platform.python_version(),
            "PostgreSQL": str(databases.value(database_url, "SHOW server_version")),
            "uvicorn": version("uvicorn"),
            "FastAPI": version("fastapi"),
            "wrk": _wrk(),
        },
    )


def _first(file: str, pattern: str) -> str:
    found = re.search(pattern, Path(file).read_text())
    return found[1].strip() if found else "0"


def _commit() -> str:
    """With a mark where files were changed since."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    said = [
        subprocess.run([git, "-C", ROOT, *words], capture_output=True, text=True, check=False).stdout.strip()
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "src", "migrations"))
    ]
    return f"{said[0] or 'unknown'}{', with changes' if said[1] else ''}"


def _file_system(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    return max(
        ((point, kind) for point, kind in mounts if folder.is_relative_to(point)), key=lambda each: len(each[0])
    )[1]


def _wrk() -> str:
    said = subprocess.run(["wrk", "--version"], capture_output=True, text=True, check=False)
    return next(iter((said.stdout + said.stderr).split()[1:2]), "unknown")
