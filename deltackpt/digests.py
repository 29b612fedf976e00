"""Digests of a tensor's chunks, in threads: fingerprints tell what changed, ids name it.

Owns   which chunks a thread hashes at a time.
Never  compares or stores anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import xxhash
from blake3 import blake3

from deltackpt.restore import spans
from deltackpt.types import U8
from deltackpt.workers import n_threads, workers

Ends = npt.NDArray[np.int64]
T = TypeVar("T")
R = TypeVar("R")

#: Bytes a thread takes at a time: a task costs about 30 us, hashing this much 200 us and more.
_TASK_SIZE = 4 << 20


def fingerprint(data: U8, ends: Ends) -> list[bytes]:
    """Return the xxh3_128 of each chunk."""

    def span(bounds: tuple[int, int]) -> list[bytes]:
        first, stop = bounds
        start = int(ends[first - 1]) if first else 0
        digests = []
        for end in ends[first:stop].tolist():
            digests.append(xxhash.xxh3_128_digest(data[start:end]))
            start = end
        return digests

    return [d for part in _in_parallel(span, list(spans(ends, _TASK_SIZE))) for d in part]


def identify(data: U8, ends: Ends, which: npt.NDArray[np.int64]) -> list[bytes]:
    """Return the BLAKE3-256 of some chunks."""
    if len(ends) == 1:  # as most tensors of an adapter are: no arrays for one hash
        return [blake3(data).digest()] if len(which) else []
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends

    def some(numbers: npt.NDArray[np.int64]) -> list[bytes]:
        return [blake3(data[starts[i] : ends[i]]).digest() for i in numbers.tolist()]

    n_tasks = max(1, int((ends[which] - starts[which]).sum()) // _TASK_SIZE)
    return [d for part in _in_parallel(some, np.array_split(which, n_tasks)) for d in part]


def _in_parallel(function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]:
    """Map over items in order, in threads when there are several."""
    if len(items) < 2 or n_threads() == 1:
        return map(function, items)
    return workers.map(function, items)
