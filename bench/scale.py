"""How the figures of a save grow: with the state, its tensors, the store's steps and index, the threads.

Owns   the stores that are grown, and the processes that each figure is taken in.
Never  compares with other tools (series.py), and never draws conclusions.

    python bench/scale.py [--only size tensors steps index threads] [--size-mib-max 1024] [--repeats 5]
                          [--dir DIR] [--json]

One thing is varied at a time, from 64 MiB of NumPy floats in 64 tensors, no step in the store but the first,
and all cores.  A save is one in which an eighth of the tensors moved a little.  Each figure is a median of
--repeats, in processes begun for it: one fills the store without a flush, one saves, one restores.  The index
is simulated: files of random ids, whose packs are not there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from meter import core_s, machine, measured, memory, say

from deltackpt import open_run
from deltackpt.backends.local import LocalBackend
from deltackpt.backends.osshim import Os
from deltackpt.format import ROW
from deltackpt.index import Segment, keys_of
from deltackpt.pack import PackName
from deltackpt.records import index_key
from deltackpt.report import human_size, human_time, table
from deltackpt.run import Run
from deltackpt.store import open_store

_processes = multiprocessing.get_context("spawn")

#: Bytes of the state while something else is varied; of one whose steps are counted.
SIZE, STEP_SIZE = 64 << 20, 1 << 20
#: An index of several files: what that many saves leave that nobody merged.
N_FILES = 300
#: Chunks in a pack of a simulated index: 128 MiB.
_PACK_ROWS = 512
#: Of the tensors, one in so many moves from save to save.
_MOVES = 8


@dataclass(frozen=True, slots=True)
class Point:
    """A store, a state and a machine."""

    varied: str
    state_size: int = SIZE
    n_tensors: int = 64
    n_steps: int = 1
    n_rows: int = 0
    n_files: int = 1
    n_threads: int = len(os.sched_getaffinity(0))


def points(size_max: int, scale: float) -> dict[str, list[Point]]:
    """What is measured, by what is varied; `scale` shrinks all but the threads."""

    def some(*values: float) -> list[int]:
        return sorted({max(1, round(value * scale)) for value in values})

    sizes = [size for size in (SIZE << k for k in range(0, 20, 2)) if size < size_max] + [size_max]
    base = Point("", round(SIZE * scale))
    cores = len(os.sched_getaffinity(0))
    threads = sorted({n for n in (1, 2, 4, 8, 16, 32, cores) if n <= cores})
    small = replace(base, state_size=round(STEP_SIZE * scale))
    return {
        "size": [replace(base, varied="size", state_size=n) for n in some(*sizes)],
        "tensors": [
            replace(base, varied="tensors", n_tensors=n) for n in some(10, 100, 1000, 10_000, 100_000)
        ],
        "steps": [replace(small, varied="steps", n_steps=n) for n in some(1, 10, 100, 1000, 10_000)],
        "index": [
            replace(small, varied="index", n_rows=n, n_files=n_files)
            for n in some(1e4, 1e5, 1e6, 1e7)
            for n_files in (1, N_FILES)
        ],
        "threads": [replace(base, varied="threads", n_threads=n) for n in threads],
    }


class NoFlush(Os):
    """A system that loses all when its power does: what is measured flushes, what is only filled need not."""

    def fsync(self, fd: int) -> None:
        pass


class State:
    """Floats as weights are; `move` moves one in eight tensors by about a thousandth."""

    def __init__(self, point: Point) -> None:
        rng = np.random.default_rng(0)
        n = max(1, point.state_size // 4 // point.n_tensors)
        values = rng.standard_normal((point.n_tensors, n), np.float32)
        self.tensors = {f"layer{i}.weight": values[i] for i in range(point.n_tensors)}
        self._rng = rng

    def move(self) -> dict[str, np.ndarray[Any, Any]]:
        for i, tensor in enumerate(self.tensors.values()):
            if i % _MOVES == 0:
                tensor *= 1 + self._rng.standard_normal(tensor.shape, np.float32) / 1000
        return self.tensors


def fill(point: Point, at: Path) -> None:
    """Make the store, with all but one of the steps, and the index."""
    state = State(point)
    run = open_run(LocalBackend(at, calls=NoFlush()))
    for step in range(point.n_steps):
        run.save(state.move(), step=step)
    if point.n_rows:
        rng = np.random.default_rng(1)
        for _ in range(point.n_files):
            write_index(at, point.n_rows // point.n_files, rng)
    os.sync()


def write_index(at: Path, n_rows: int, rng: np.random.Generator) -> None:
    """Write an index file of random ids."""
    rows = np.zeros(n_rows, ROW)
    rows["id"] = rng.integers(0, 256, (n_rows, 32), np.uint8)
    first = np.sort(rng.integers(0, 1 << 64, n_rows, np.uint64)).astype(">u8")
    rows["id"][:, :8] = first[:, None].view(np.uint8)
    rows["raw_size"] = rows["stored_size"] = 256 << 10
    sid = secrets.token_bytes(16)
    packs = [PackName(sid, 0, n) for n in range(-(-n_rows // _PACK_ROWS))]
    rows["pack"] = np.arange(n_rows) // _PACK_ROWS
    segment = Segment(packs, np.full(len(packs), 128 << 20), keys_of(rows["id"]), rows)
    (at / index_key(sid)).write_bytes(segment.to_bytes(open_store(at).uuid, sid))


def opened(point: Point, at: Path) -> dict[str, float]:
    """Open the store and its index; the memory is that beyond the process with its imports."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: point.n_threads])
    before = memory("self", "VmRSS")
    with measured() as cost:
        open_store(at).refresh()
    return {"open_s": cost.seconds, "open_memory_size": cost.peak_size - before}


def saved(point: Point, at: Path, repeats: int) -> dict[str, float]:
    """Save again and again; the memory is that beyond the state."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: point.n_threads])
    state, run = State(point), open_run(at)
    before = memory("self", "VmRSS")
    found: dict[str, list[float]] = {}
    with measured() as first:
        run.save(state.move(), step=point.n_steps)
    for n in range(2 * repeats):
        moved, step = state.move(), point.n_steps + 1 + n
        figures = later(run, moved, step, before) if n % 2 else now(run, moved, step, before)
        for name, value in figures.items():
            found.setdefault(name, []).append(value)
    run.close()
    manifest = (at / run.commit().manifest_key).stat().st_size
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {"first_s": first.seconds, **medians, "manifest_size": manifest}


def now(run: Run, state: dict[str, Any], step: int, before: int) -> dict[str, float]:
    with measured() as cost:
        used_s, report = core_s(lambda: run.save(state, step=step))
    size = cost.peak_size - before
    return {
        "save_s": cost.seconds,
        "core_s": used_s,
        "written_size": report.written_size,
        "memory_size": size,
    }


def later(run: Run, state: dict[str, Any], step: int, before: int) -> dict[str, float]:
    with measured() as cost:
        start = time.perf_counter()
        pending = run.save_async(state, step=step)
        stall_s = time.perf_counter() - start
        assert pending is not None
        pending.wait()
    return {"stall_s": stall_s, "async_memory_size": cost.peak_size - before}


def restored(point: Point, at: Path) -> dict[str, float]:
    """Load the latest step."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: point.n_threads])
    with measured() as cost:
        open_run(at).load()
    return {"restore_s": cost.seconds}


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own; what it raises is raised here."""
    with ProcessPoolExecutor(1, mp_context=_processes) as pool:
        return pool.submit(function, *arguments).result()


def measure(point: Point, directory: Path, repeats: int) -> dict[str, float]:
    """Measure one point."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="bench-") as name:
        at = Path(name) / "store"
        in_fresh_process(fill, point, at)
        opens = [in_fresh_process(opened, point, at) for _ in range(repeats)]
        saves = in_fresh_process(saved, point, at, repeats)
        restores = [in_fresh_process(restored, point, at) for _ in range(repeats)]
    return {**_medians(opens), **saves, **_medians(restores)}


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


COLUMNS = {
    "open": "open_s",
    "its memory": "open_memory_size",
    "first save": "first_s",
    "save": "save_s",
    "of a core": "core_s",
    "written": "written_size",
    "memory": "memory_size",
    "stall": "stall_s",
    "async memory": "async_memory_size",
    "restore": "restore_s",
    "manifest": "manifest_size",
}


def text_of(point: Point) -> str:
    """What is varied, in words."""
    files = f" in {point.n_files} files" if point.n_files > 1 else ""
    return {
        "size": human_size(point.state_size),
        "tensors": f"{point.n_tensors:,} tensors",
        "steps": f"{point.n_steps:,} steps",
        "index": f"{point.n_rows:,} chunks{files}",
        "threads": f"{point.n_threads} threads",
    }[point.varied]


def cells(figures: dict[str, float]) -> Iterator[str]:
    for name in COLUMNS.values():
        yield human_time(figures[name]) if name.endswith("_s") else human_size(max(0, int(figures[name])))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=points(SIZE, 1), default=list(points(SIZE, 1)))
    parser.add_argument("--size-mib-max", type=int, default=1024, help="the largest state")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="shrink everything, to try the bench")
    parser.add_argument("--dir", type=Path, help="where to write; default the current directory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    for name in options.only:
        for point in points(options.size_mib_max << 20, options.scale)[name]:
            say(f"{name}: {text_of(point)} ...")
            figures = measure(point, options.dir or Path.cwd(), options.repeats)
            say("   " + ", ".join(f"{t} {c}" for t, c in zip(COLUMNS, cells(figures), strict=True)))
            results.append((point, figures))
    if options.json:
        found = [{"point": asdict(point), "figures": figures} for point, figures in results]
        print(json.dumps({"machine": machine(), "repeats": options.repeats, "points": found}, indent=1))
        return
    print(table(("", *(f">{title}" for title in COLUMNS)), [(text_of(p), *cells(f)) for p, f in results]))


if __name__ == "__main__":
    main()
