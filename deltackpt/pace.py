"""The pace of one save: how far it is, and what effort each batch of its chunks got.

Owns   the clock since the save began, what is expected of the rest, the count by effort.
Never  decides (efforts.py does), or encodes or writes.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from deltackpt.efforts import Choice, Optimize, Progress, choose, n_cores
from deltackpt.rates import Effort, Rates, Sort, Took
from deltackpt.workers import n_threads


class Job(NamedTuple):
    """A batch that encoders are given: its effort, and what that is expected to take."""

    sort: Sort
    effort: Effort
    size: int
    cpu_s: float
    stored_size: float


class Pace:
    """How far a save is.

    Parameters
    ----------
    optimize : {"bytes", "time", "energy"}
    rates : Rates
    clock : callable
        Seconds; tests give their own.

    Examples
    --------
    >>> pace = Pace("time", Rates())
    >>> pace.expect(1000, 1.0)
    >>> pace.pass_by(200)
    >>> pace.job(Sort(4, True), 800, [], 0).effort, pace.words()
    ('small', '')
    """

    def __init__(
        self, optimize: Optimize, rates: Rates, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._optimize = optimize
        self._rates = rates
        self._clock = clock
        self._n_threads = n_threads()  # asking the system takes 30 us, a batch is some 2 ms
        self._start_s = clock()
        self._state_size = 0
        self._passed_size = 0
        self._new_share = 1.0
        self._new_size = 0
        self._n_batches: Counter[Sort] = Counter()
        #: Bytes of chunks that got each effort.
        self.sizes: Counter[Effort] = Counter()

    def expect(self, state_size: int, new_share: float) -> None:
        """Say how large the state is, and which part of it changed the last time."""
        self._state_size = state_size
        self._new_share = new_share

    def pass_by(self, size: int) -> None:
        """Note that so many more bytes of the state are in the store already."""
        self._passed_size += size

    def is_short(self, sort: Sort, under_way: Iterable[Job], unwritten_size: int) -> bool:
        """Return whether a chunk would now be stored raw."""
        return self._choice(sort, 0, list(under_way), unwritten_size).effort == "raw"

    def job(self, sort: Sort, size: int, under_way: Iterable[Job], unwritten_size: int) -> Job:
        """Return what is to be done with a batch.

        Parameters
        ----------
        sort : Sort
        size : int
            Bytes of its chunks.
        under_way : iterable of Job
            What encoders have been given and have not finished.
        unwritten_size : int
            Bytes that wait for the storage beside those.
        """
        effort = self._choice(sort, size, list(under_way), unwritten_size).effort
        self._n_batches[sort] += 1
        self._new_size += size
        self.sizes[effort] += size
        took = self._rates.of(sort)[effort]
        return Job(sort, effort, size, size * took.cpu_s, size * took.share)

    def over(self, job: Job, took: Took, seconds: float) -> None:
        """Learn what a job took, all of it together, and how long."""
        self._rates.encoded(job.sort, job.effort, job.size, took, seconds)

    def _choice(self, sort: Sort, size: int, under_way: list[Job], unwritten_size: int) -> Choice:
        progress = Progress(
            self._state_size,
            max(0, self._state_size - self._passed_size - self._new_size - size),
            self._new_share,
            self._new_size + size,
            self._clock() - self._start_s,
            sum(job.cpu_s for job in under_way),
            unwritten_size + sum(job.stored_size for job in under_way),
            n_cores(self._n_threads, self._rates.slowdown),
        )
        took, write_s = self._rates.of(sort), self._rates.write_s
        return choose(self._optimize, size, took, write_s, progress, n_before=self._n_batches[sort])

    def is_small(self) -> bool:
        """Return whether all was encoded as small as can be."""
        return self.sizes["small"] == self.sizes.total()

    def words(self) -> str:
        """Say what got which effort, and why, unless all was encoded as small as can be."""
        if self.is_small():
            return ""
        total = self.sizes.total()
        parts = [f"{effort} {100 * size / total:.0f} %" for effort, size in self.sizes.most_common() if size]
        return f"{', '.join(parts)}: {self._why()}"

    def _why(self) -> str:
        if self._optimize == "energy":
            return "fewest joules"
        sort = max(self._n_batches, key=self._n_batches.__getitem__)
        encoding_s = self._rates.of(sort)["small"].cpu_s / self._n_threads
        return f"the storage takes {_gb_s(self._rates.write_s):.1f} GB/s, encoding {_gb_s(encoding_s):.1f}"


def _gb_s(seconds: float) -> float:
    """Return GB a second, given seconds a byte: none, by a clock that ticks every 10 ms, of a first batch."""
    return 1e-9 / seconds if seconds else math.inf
