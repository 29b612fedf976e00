"""A layout: where an array's elements lie in memory.

Owns   strides arithmetic: what bytes an array spans, in which order, which overlap, what an index picks.
Never  touches memory, or knows a framework or a chunk.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from deltackpt.errors import InvalidInputError

#: Elements nearer than this count as one run: the chunker cuts no smaller chunk but a tensor's last
#: (chunking.Chunker).  Pieces of shards may be smaller; of those one too many is read.
_NEAR = 1 << 16
#: Runs of an array of 256 GiB whose elements do not overlap, at most.
_N_RUNS_MAX = 1 << 22


@dataclass(frozen=True, slots=True)
class Layout:
    """Element ``(i, j, ...)`` is the `itemsize` bytes at ``offset + i * strides[0] + j * strides[1] + ...``.

    Parameters
    ----------
    shape : tuple of int
    strides : tuple of int
        Bytes; negative for an axis that runs backwards, 0 for one that repeats.
    offset : int
        Bytes.
    itemsize : int
        Bytes of an element.

    Examples
    --------
    >>> Layout.plain((2, 3), 4).strides
    (12, 4)
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    itemsize: int

    @classmethod
    def plain(cls, shape: tuple[int, ...], itemsize: int, offset: int = 0) -> Layout:
        """Return the layout of elements in C order without gaps."""
        return cls(shape, plain_strides(shape, itemsize), offset, itemsize)

    @property
    def size(self) -> int:
        """Bytes of the elements, each counted as often as it is there."""
        return math.prod(self.shape) * self.itemsize

    @property
    def is_plain(self) -> bool:
        """Whether it is in C order without gaps, in the very strides that such an array has."""
        return self.strides == plain_strides(self.shape, self.itemsize)

    @property
    def span(self) -> tuple[int, int]:
        """Where the bytes start and end; an empty range if there are no elements."""
        low = high = self.offset
        for n, stride in zip(self.shape, self.strides, strict=True):
            if n == 0:
                return self.offset, self.offset
            if stride < 0:
                low += (n - 1) * stride
            else:
                high += (n - 1) * stride
        return low, high + self.itemsize

    def moved(self, by: int) -> Layout:
        """Return it `by` bytes further on."""
        return replace(self, offset=self.offset + by)

    def narrowed(self) -> Layout:
        """Return it with every axis that only repeats cut to one element."""
        if 0 not in self.strides:
            return self
        shape = tuple(1 if s == 0 and n else n for n, s in zip(self.shape, self.strides, strict=True))
        return replace(self, shape=shape)

    def order(self) -> tuple[int, ...]:
        """Return the axes from the outermost in memory to the innermost."""
        key = [(n > 1, -abs(s)) for n, s in zip(self.shape, self.strides, strict=True)]
        return tuple(sorted(range(len(key)), key=key.__getitem__))

    def overlaps(self) -> bool:
        """Whether two indices might mean the same bytes; exact for slices and transposes of a plain array."""
        reach = self.itemsize
        if 0 in self.shape:
            return False
        for axis in reversed(self.order()):
            if self.shape[axis] > 1:
                if abs(self.strides[axis]) < reach:
                    return True
                reach += (self.shape[axis] - 1) * abs(self.strides[axis])
        return False

    def is_solid(self) -> bool:
        """Whether its elements fill what they span, each byte once, in whatever order."""
        start, stop = self.span
        return stop - start == self.size and not self.overlaps()

    def packed(self) -> Layout:
        """Return the same axes in the same order of memory, without gaps, from offset 0."""
        order = self.order()
        plain = plain_strides(tuple(self.shape[axis] for axis in order), self.itemsize)
        strides = [0] * len(order)
        for axis, stride in zip(order, plain, strict=True):
            strides[axis] = stride
        return Layout(self.shape, tuple(strides), 0, self.itemsize)

    def indexed(self, index: Any, name: str = "index") -> Layout:
        """Return the layout of what basic indexing picks: integers, slices, ``...`` and None.

        Raises
        ------
        InvalidInputError
            If `index` is something else, or out of range; the message starts with `name`.

        Examples
        --------
        >>> Layout.plain((5, 4), 2).indexed((3, slice(None, None, -2)))
        Layout(shape=(2,), strides=(-4,), offset=30, itemsize=2)
        """
        shape: list[int] = []
        strides: list[int] = []
        offset, axis = self.offset, 0
        for part in _full(index, len(self.shape), name):
            if part is None:
                shape.append(1)
                strides.append(0)
                continue
            n, stride = self.shape[axis], self.strides[axis]
            if isinstance(part, slice):
                start, stop, step = _slice(part, n, name)
                count = len(range(start, stop, step))
                offset += start * stride if count else 0
                shape.append(count)
                strides.append(step * stride)
            else:
                if not -n <= part < n:
                    raise InvalidInputError(
                        f"{name}: {part} is out of range, axis {axis} of shape {self.shape} has {n}"
                    )
                offset += (part % n) * stride
            axis += 1
        return Layout(tuple(shape), tuple(strides), offset, self.itemsize)

    def addresses(self) -> npt.NDArray[np.int64]:
        """Return where each element is, in no order."""
        found = np.full(1, self.offset, np.int64)
        for n, stride in zip(self.shape, self.strides, strict=True):
            found = (found[:, None] + stride * np.arange(n, dtype=np.int64)).reshape(-1)
        return found

    def runs(self) -> tuple[npt.NDArray[np.int64], int]:
        """Return where runs of bytes start that hold all elements, and how long each of them is.

        Elements up to 64 KiB apart make one run, so there are few: what lies between them is in the same
        chunk, or in the next.
        """
        if 0 in self.shape:
            return np.zeros(0, np.int64), self.itemsize
        start = self.span[0]
        length, outer = self.itemsize, []
        axes = [(abs(s), n) for n, s in zip(self.shape, self.strides, strict=True) if n != 1 and s]
        for stride, n in sorted(axes):
            if stride <= max(length, _NEAR):
                length += (n - 1) * stride
            else:
                outer.append((stride, n))
        starts = np.full(1, start, np.int64)
        if math.prod(n for _, n in outer) > _N_RUNS_MAX:  # only of elements that overlap: all of it, then
            return starts, self.span[1] - start
        for stride, n in outer:
            starts = (starts[:, None] + stride * np.arange(n, dtype=np.int64)).reshape(-1)
        return np.sort(starts), length


def plain_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides, in bytes, of elements in C order without gaps."""
    strides = []
    for n in reversed(shape):
        strides.append(itemsize)
        itemsize *= n or 1
    return tuple(strides[::-1])


def touched(
    runs: tuple[npt.NDArray[np.int64], int], starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return which of some ascending ranges hold a byte of a run.

    Examples
    --------
    >>> touched((np.array([0, 70]), 5), np.array([0, 10, 60]), np.array([10, 60, 90]))
    array([ True, False,  True])
    """
    begins, length = runs
    # The first run that ends behind the range's start must begin before its end.
    at = np.searchsorted(begins, starts - length, "right")
    found: npt.NDArray[np.bool_] = at < len(begins)
    found[found] = begins[at[found]] < stops[found]
    return found


def _full(index: Any, n_axes: int, name: str) -> list[Any]:
    """Return an index's parts: integers, slices and Nones, the integers and slices one an axis."""
    parts = list(index) if isinstance(index, tuple) else [index]
    n_given = sum(part is not None and part is not Ellipsis for part in parts)
    if sum(part is Ellipsis for part in parts) > 1 or n_given > n_axes:
        raise InvalidInputError(f"{name}: found {index!r}, expected at most {n_axes} axes and one '...'")
    if Ellipsis not in [part if part is Ellipsis else None for part in parts]:
        parts.append(Ellipsis)
    at = next(i for i, part in enumerate(parts) if part is Ellipsis)
    parts[at : at + 1] = [slice(None)] * (n_axes - n_given)
    return [part if part is None or isinstance(part, slice) else _integer(part, name) for part in parts]


def _integer(part: Any, name: str) -> int:
    # A bool is an integer to Python and a mask to NumPy; an array of one element has an __index__ too.
    if not isinstance(part, bool | np.bool_) and not getattr(part, "shape", ()):
        try:
            return operator.index(part)
        except TypeError:
            pass
    raise InvalidInputError(
        f"{name}: found {part!r:.80}, expected integers, slices, '...' or None",
        hint="read the range that holds them, then pick from it",
    )


def _slice(part: slice, n: int, name: str) -> tuple[int, int, int]:
    try:
        return part.indices(n)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{name}: found {part!r:.80}: {error}", hint="use integers") from error
