"""Speed of every kernel on one core, compiled against NumPy.

Owns   the inputs and the clock: CPU time of this thread, median of the repeats, GB/s of input bytes.
Never  asserts anything; tests/test_kernels.py says whether the two agree.

    python bench/kernels.py [--size-mib 64] [--repeats 7] [--json]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from deltackpt import differences, kernels
from deltackpt.chunking import Chunker
from deltackpt.differences import SUB, Form
from deltackpt.types import U8

CHUNK_SIZE = 256 << 10
#: Chunks in a batch of a save.
N_TOGETHER = 4
#: Of the elements changed, as in bf16 weights of a fine-tune.
SPARSE_SHARE = 0.05


def noise(size: int) -> U8:
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)


def cut_pass(data: U8, align: int, cut: Callable[..., Any]) -> None:
    chunker = Chunker()
    cut(data, align, chunker.min_size, chunker.max_size, chunker.threshold(align))


def split_pass(data: U8, itemsize: int, split: Callable[..., Any]) -> None:
    for start in range(0, data.size, CHUNK_SIZE):
        split(data[start : start + CHUNK_SIZE], itemsize, True)


def join_pass(data: U8, itemsize: int, join: Callable[..., Any]) -> None:
    out = np.empty(CHUNK_SIZE, np.uint8)
    for start in range(0, data.size, CHUNK_SIZE):
        join(data[start : start + CHUNK_SIZE], itemsize, True, out)


def entropy_pass(data: U8, itemsize: int, entropy: Callable[..., Any]) -> None:
    plane_size = CHUNK_SIZE // itemsize
    for start in range(0, data.size, plane_size):
        entropy(data[start : start + plane_size])


class Delta(NamedTuple):
    """A chunk, its base, and where and by what they differ."""

    chunk: U8
    base: U8
    places: U8
    packed: U8


def counted(chunk: U8, base: U8, itemsize: int) -> differences.Pair:
    """A pair of which only the elements that differ are counted, however many they are."""
    return differences.Pair(chunk, base, Form(itemsize, SUB), chunk[:0].copy(), chunk.size // itemsize)


@functools.lru_cache(1)  # made while warming up: no pass is timed while it makes its input
def deltas(size: int, itemsize: int, share: float) -> list[Delta]:
    """Chunks of which about `share` of the elements are a step away from the base's."""
    data = noise(size)
    base = data.copy()
    base.view(f"<u{itemsize}")[np.random.default_rng(1).random(size // itemsize) < share] += 1
    made = []
    for start in range(0, size, CHUNK_SIZE):
        chunk, old = (a[start : start + CHUNK_SIZE] for a in (data, base))
        [n_changed] = differences.group_all([counted(chunk, old, itemsize)])
        assert isinstance(n_changed, int)
        places, packed = np.empty(chunk.size, np.uint8), np.empty(n_changed * itemsize, np.uint8)
        n = differences.take(chunk, old, Form(itemsize, SUB), bitmap=False, places=places, packed=packed)
        made.append(Delta(chunk, old, places[:n].copy(), packed))
    return made


class Grouped(NamedTuple):
    """A chunk whose differences to its base are of three classes, and their planes."""

    chunk: U8
    base: U8
    of: differences.Classes
    planes: U8


@functools.lru_cache(1)
def grouped(size: int, itemsize: int) -> list[Grouped]:
    """Chunks of which a third of the elements are a little, another third some more away from the base's."""
    data = noise(size)
    base = data.copy()
    words = base.view(f"<u{itemsize}")
    words += np.random.default_rng(1).choice(np.array([0, 1, 200], words.dtype), words.size)
    made = []
    for start in range(0, size, CHUNK_SIZE):
        chunk, old = (a[start : start + CHUNK_SIZE] for a in (data, base))
        planes = np.empty(chunk.size + chunk.size // 8 + 8, np.uint8)
        [found] = differences.group_all([differences.Pair(chunk, old, Form(itemsize, SUB), planes)])
        assert not isinstance(found, int)
        made.append(Grouped(chunk, old, found.of, planes))
    return made


def group_pass(data: U8, itemsize: int, group_all: Callable[..., Any]) -> None:
    form, made = Form(itemsize, SUB), grouped(data.size, itemsize)
    pairs = [differences.Pair(d.chunk, d.base, form, d.planes) for d in made]
    for i in range(0, len(made), N_TOGETHER):
        group_all(pairs[i : i + N_TOGETHER])


def ungroup_pass(data: U8, itemsize: int, ungroup_all: Callable[..., Any]) -> None:
    out = np.empty(CHUNK_SIZE, np.uint8)
    made = grouped(data.size, itemsize)
    for i in range(0, len(made), N_TOGETHER):
        planed = []
        for d in made[i : i + N_TOGETHER]:
            sizes = differences.plane_sizes(d.of)
            planes = np.split(d.planes[: sum(sizes)], np.cumsum(sizes)[:-1])
            planed.append(differences.Planed(planes, d.base, Form(itemsize, SUB), d.of, out[: d.chunk.size]))
        ungroup_all(planed)


def ungroup_all_ref(planed: list[differences.Planed]) -> list[bool]:
    return [differences.ungroup_ref(*one) for one in planed]


def count_pass(data: U8, itemsize: int, group_all: Callable[..., Any]) -> None:
    pairs = [counted(d.chunk, d.base, itemsize) for d in deltas(data.size, itemsize, SPARSE_SHARE)]
    for i in range(0, len(pairs), N_TOGETHER):
        group_all(pairs[i : i + N_TOGETHER])


def take_pass(data: U8, itemsize: int, take: Callable[..., Any]) -> None:
    places = np.empty(CHUNK_SIZE, np.uint8)
    for d in deltas(data.size, itemsize, SPARSE_SHARE):
        take(d.chunk, d.base, Form(itemsize, SUB), bitmap=False, places=places, packed=d.packed)


def put_pass(data: U8, itemsize: int, put: Callable[..., Any]) -> None:
    out = np.empty(CHUNK_SIZE, np.uint8)
    for d in deltas(data.size, itemsize, SPARSE_SHARE):
        put(
            d.base,
            Form(itemsize, SUB),
            bitmap=False,
            places=d.places,
            packed=d.packed,
            out=out[: d.chunk.size],
        )


#: Name, one pass over the data, its width, the dispatching function, its twin.
CASES: list[
    tuple[str, Callable[[U8, int, Callable[..., Any]], None], int, Callable[..., Any], Callable[..., Any]]
] = [
    *(("cut", cut_pass, align, kernels.cut, kernels.cut_ref) for align in (2, 4, 8)),
    *(("split_planes", split_pass, w, kernels.split_planes, kernels.split_planes_ref) for w in (1, 2, 4, 8)),
    *(("join_planes", join_pass, w, kernels.join_planes, kernels.join_planes_ref) for w in (1, 2, 4, 8)),
    *(("delta group", group_pass, w, differences.group_all, differences.group_all_ref) for w in (2, 4, 8)),
    *(("delta ungroup", ungroup_pass, w, differences.ungroup_all, ungroup_all_ref) for w in (2, 4, 8)),
    *(("count", count_pass, w, differences.group_all, differences.group_all_ref) for w in (2, 4)),
    *(("sparse take", take_pass, w, differences.take, differences.take_ref) for w in (2, 4)),
    *(("sparse put", put_pass, w, differences.put, differences.put_ref) for w in (2, 4)),
    ("entropy", entropy_pass, 4, kernels.entropy, kernels.entropy_ref),
]


def speed(run: Callable[[], None], size: int, repeats: int) -> float:
    """GB/s of CPU time, median of `repeats` after one warm-up."""
    run()
    times_s = []
    for _ in range(repeats):
        start_s = time.thread_time()
        run()
        times_s.append(time.thread_time() - start_s)
    return size / statistics.median(times_s) / 1e9


def measure(size: int, repeats: int) -> list[dict[str, Any]]:
    data = noise(size)
    rows = []
    for name, one_pass, width, native, twin in CASES:
        row: dict[str, Any] = {"kernel": name, "width": width, "c_gb_s": None}
        if kernels.NATIVE:
            row["c_gb_s"] = speed(lambda p=one_pass, w=width, f=native: p(data, w, f), size, repeats)
        row["numpy_gb_s"] = speed(lambda p=one_pass, w=width, f=twin: p(data, w, f), size, repeats)
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]], size: int, repeats: int) -> None:
    print(
        f"{kernels.describe()}; {size >> 20} MiB of noise, median of {repeats}, GB/s of one core's CPU time"
    )
    print(f"{'kernel':<14}{'width':>6}{'C':>8}{'NumPy':>8}")
    for row in rows:
        native = f"{row['c_gb_s']:.2f}" if row["c_gb_s"] else "-"
        print(f"{row['kernel']:<14}{row['width']:>6}{native:>8}{row['numpy_gb_s']:>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-mib", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    size = options.size_mib << 20
    rows = measure(size, options.repeats)
    if options.json:
        report = {"kernels": kernels.describe(), "size": size, "repeats": options.repeats, "rows": rows}
        print(json.dumps(report, indent=2))
    else:
        print_table(rows, size, options.repeats)


if __name__ == "__main__":
    main()
