"""What a piece of work costs: seconds by the wall clock, and memory beyond what was there.

Owns   the clock, the reading of /proc (Linux), and running a program while watching its memory.
Never  knows what the work is.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
