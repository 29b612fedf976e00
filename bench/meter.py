"""What a piece of work costs: seconds by the wall clock or of a core, and memory beyond what was there.

Owns   the clocks, the reading of /proc (Linux), running a program while watching its memory, and what is
       said of the machine and of repeats.
Never  knows what the work is.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltackpt import kernels

POLL_S = 0.002


@dataclass(slots=True)
class Cost:
    """Filled when the work is done: seconds, and the most memory this process has had meanwhile."""

    seconds: float = 0.0
    peak_size: int = 0


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure a block."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # begin a new VmHWM
    cost, start = Cost(), time.perf_counter()
    yield cost
    cost.seconds = time.perf_counter() - start
    cost.peak_size = memory("self", "VmHWM")


def core_s(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU time of the work, of all its threads and of programs it runs, and its result."""
    start = _core_s()
    result = work()
    return _core_s() - start, result


def _core_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def say(line: str) -> None:
    """How far a run is; not part of its results."""
    print(line, file=sys.stderr, flush=True)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """What the figures depend on, and no name."""
    return {
        "n_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "kernels": kernels.describe(),
    }


def memory(pid: int | str, field: str) -> int:
    """Bytes that /proc says of a process: VmRSS (now) or VmHWM (at most so far)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    return 0  # a zombie has no memory


def run_tool(command: list[str], cwd: Path, environment: dict[str, str]) -> int:
    """Run a program to its end and return the most memory it has had; not what its children had.

    The memory is looked at while it runs: what the system tells of an ended child includes its parent's
    memory from before the program was started.

    Raises
    ------
    RuntimeError
        If it fails; says what it said.
    """
    peak_size = 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
        while process.poll() is None:
            with suppress(OSError):
                peak_size = max(peak_size, memory(process.pid, "VmHWM"))
            time.sleep(POLL_S)
        said.seek(0)
        if process.returncode:
            words = said.read().decode(errors="replace").strip()[-500:]
            raise RuntimeError(f"{' '.join(command)} exited {process.returncode}: {words}")
    return peak_size


def tree_size(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum((Path(root) / name).lstat().st_size for root, _, names in os.walk(folder) for name in names)
