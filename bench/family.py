"""A process and all that it began: their memory and their CPU seconds, of all alike (Linux).

Owns   what /proc says of them.
Never  imports what takes memory: it is also the program that watches another.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

POLL_S = 0.004
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def pids(pid: int) -> Iterator[int]:
    """Yield a process and its descendants; those that end meanwhile may be missing."""
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                for child in (task / "children").read_text().split():
                    if not _is_starting(int(child), pid):
                        yield from pids(int(child))


def _is_starting(child: int, parent: int) -> bool:
    """Return whether a child has its parent's memory, as between vfork and exec: it must not count twice."""
    sizes = [Path(f"/proc/{pid}/statm").read_text() for pid in (child, parent)]
    return sizes[0] == sizes[1]


def memory(pid: int, but: int | None = None) -> int:
    """Return the bytes of memory of a process and its descendants, each page counted once.

    Shared memory counts whole as long as one of them has it open, mapped or not.

    Parameters
    ----------
    pid : int
    but : int, optional
        A descendant that does not count.
    """
    own_size = shared_size = 0
    open_files: dict[tuple[int, int], int] = {}
    for one in pids(pid):
        if one == but:
            continue
        with suppress(OSError):
            for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in ("Pss_Anon", "Pss_File"):
                    own_size += int(value.split()[0]) << 10
                elif name == "Pss_Shmem":
                    shared_size += int(value.split()[0]) << 10
            for fd in Path(f"/proc/{one}/fd").iterdir():
                with suppress(OSError):
                    if str(fd.readlink()).startswith(("/memfd:", "/dev/shm/")):
                        found = fd.stat()
                        open_files[found.st_dev, found.st_ino] = found.st_blocks * 512
    return own_size + max(shared_size, sum(open_files.values()))


def cpu_s() -> float:
    """Return the CPU seconds of this process and its descendants, those that ended included."""
    used = os.times()
    total_s = time.process_time() + used.children_user + used.children_system
    for pid in pids(os.getpid()):
        if pid != os.getpid():
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total_s += sum(map(int, fields[11:15])) * _TICK_S
    return total_s


class Watch:
    """The most memory that this process and its descendants have had, by a program that looks all the time.

    Examples
    --------
    >>> with Watch() as watch:
    ...     before_size = watch.most()
    ...     held = bytes(100_000_000)
    ...     del held
    ...     100_000_000 <= watch.most() - before_size < 110_000_000
    True
    """

    def __enter__(self) -> Self:
        command = [sys.executable, "-S", __file__, str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def most(self) -> int:
        """Return the most bytes since the last call, or since it began."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def watch(pid: int) -> None:
    """Look at a process; for each line of input print the most that was seen since the last."""
    most_size = 0
    while True:
        most_size = max(most_size, memory(pid, but=os.getpid()))
        if select.select([0], [], [], POLL_S)[0]:
            if not os.read(0, 1):
                return
            most_size = max(most_size, memory(pid, but=os.getpid()))
            print(most_size, flush=True)
            most_size = 0


if __name__ == "__main__":
    watch(int(sys.argv[1]))
