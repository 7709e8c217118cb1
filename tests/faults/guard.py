"""`python guard.py FOLDER`: clears up after a suite that was killed, and could not do it itself.

What runs in the folder is ended, and disks that are mounted there are given back with the memory that they take.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_OVER = b"over"


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Has a folder cleared up should this process not come to the end of the block."""
    command = [sys.executable, __file__, str(folder.resolve())]
    # What interrupts this process is not to interrupt it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd="/", start_new_session=True) as guard:
        try:
            yield
        finally:
            guard.communicate(_OVER)


def _end_all(folder: Path) -> None:
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] and Path(process.info["cwd"]).is_relative_to(folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _give_back_disks(folder: Path) -> None:
    for disk in psutil.disk_partitions(all=True):
        if Path(disk.mountpoint).is_relative_to(folder):
            subprocess.run(["umount", "--lazy", disk.mountpoint], check=False)


if __name__ == "__main__" and sys.stdin.buffer.read() != _OVER:
    _end_all(Path(sys.argv[1]))
    _give_back_disks(Path(sys.argv[1]))
