"""Rates: what the storage and the encoders took for a byte, as this process has measured it.

Owns   the averages, what they start with, and the words for how hard an encoder works.
Never  measures time itself, or decides anything (efforts.py does).

A rate is seconds a byte, so that costs add up.  What was measured last counts most.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

#: How hard the encoders work at a chunk: as small as they can make it; without entropy coding, but of what is
#: nearly constant; not at all.
Effort: TypeAlias = Literal["small", "fast", "raw"]

#: Measured on so many bytes, a rate counts as much as all before it: of encoding, and of writing, which other
#: work on the machine makes look slow for a while.
_HALF_SIZE = 32 << 20
_WRITE_HALF_SIZE = 512 << 20
#: The same for the slowdown, in CPU seconds.
_HALF_S = 0.05
#: Writing less than this tells what a flush takes, not what a byte does.
_MEASURED_SIZE_MIN = 8 << 20
#: Encoding less than this tells what a call takes: for 100 bytes 1000 times as much a byte.
_ENCODED_SIZE_MIN = 256 << 10


class Sort(NamedTuple):
    """What the rate of encoding depends on: bytes an element, and whether there is a base."""

    itemsize: int
    has_base: bool


class Took(NamedTuple):
    """What encoding takes.

    Parameters
    ----------
    cpu_s : float
        CPU seconds a byte: what else runs on the machine does not change them.
    share : float
        Bytes stored for each.
    """

    cpu_s: float
    share: float


#: Until it is measured: an NVMe SSD, copying to the page cache included.
WRITE_S = 1e-9
#: One core, fp32 weights ten steps apart, with and without their base (docs/design/0019-effort.md).
START: Mapping[bool, Mapping[Effort, Took]] = {
    True: {"small": Took(1.4e-9, 0.69), "fast": Took(0.65e-9, 0.78), "raw": Took(0.05e-9, 1.0)},
    False: {"small": Took(0.67e-9, 0.83), "raw": Took(0.05e-9, 1.0)},
}


class Rates:
    """Averages of one store; any thread may add to them.

    Parameters
    ----------
    write_s : float
        Seconds a byte of writing, until it is measured.

    Examples
    --------
    >>> rates = Rates()
    >>> rates.wrote(100 << 20, 0.2)
    >>> round(1e9 * rates.write_s, 1)
    1.9
    >>> rates.encoded(Sort(4, True), "small", 32 << 20, Took(0.02, 16 << 20), seconds=0.03)
    >>> took = rates.of(Sort(4, True))
    >>> round(1e9 * took["small"].cpu_s, 1), took["small"].share, took["raw"].share
    (0.6, 0.5, 1.0)
    """

    def __init__(self, write_s: float = WRITE_S) -> None:
        self._lock = threading.Lock()
        self._write_s = write_s
        self._is_measured = False
        self._slowdown = 1.0
        self._took: dict[tuple[Sort, Effort], Took] = {}

    @property
    def write_s(self) -> float:
        """Seconds that a byte takes from the encoder until it is durable, written in one stream."""
        return self._write_s

    @property
    def slowdown(self) -> float:
        """Seconds that a CPU second of an encoder lasts: more than one where there are not cores for all."""
        return self._slowdown

    def of(self, sort: Sort) -> dict[Effort, Took]:
        """Return what each effort takes that makes sense for a sort."""
        with self._lock:
            start = START[sort.has_base]
            return {effort: self._took.get((sort, effort), start[effort]) for effort in start}

    def wrote(self, size: int, seconds: float) -> None:
        """Learn from a file that was written and flushed; at once if it was faster: others only slow it."""
        if size < _MEASURED_SIZE_MIN:
            return
        with self._lock:
            new = seconds / size
            if self._is_measured and new > self._write_s:
                new = _mean(self._write_s, new, size / (size + _WRITE_HALF_SIZE))
            self._write_s, self._is_measured = new, True

    def encoded(self, sort: Sort, effort: Effort, size: int, took: Took, seconds: float) -> None:
        """Learn what chunks of `size` bytes in all took, all of them together, and how long that was."""
        if size < _ENCODED_SIZE_MIN or effort not in START[sort.has_base]:
            return
        new = Took(*(each / size for each in took))
        weight = size / (size + _HALF_SIZE)
        with self._lock:
            old = self._took.get((sort, effort), new)
            self._took[sort, effort] = Took(*(_mean(*pair, weight) for pair in zip(old, new, strict=True)))
            if took.cpu_s > 0:
                weight = took.cpu_s / (took.cpu_s + _HALF_S)
                self._slowdown = _mean(self._slowdown, max(1.0, seconds / took.cpu_s), weight)


def _mean(old: float, new: float, weight: float) -> float:
    return old + weight * (new - old)
