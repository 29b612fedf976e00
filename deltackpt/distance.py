"""A distance: how far a tensor's elements are from those it had.

Owns   which ranges of two lists of chunks need looking at, and the counts over their elements.
Never  reads a chunk, or knows which snapshots they are of.

A *step* is how many numbers of the dtype lie between two elements, one end counted: for floats in ulps, by
integers in the order of the values, so that -0.0 and 0.0 are one apart and a NaN is what its bits say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from deltackpt.types import DTYPE_SIZES, U8

Unit: TypeAlias = Literal["ulp", "integer"]

#: Bytes of either side that are looked at together; and chunks that overlap their ends.
WINDOW_SIZE = 8 << 20
#: Elements computed at a time: their temporaries, 8 of up to 8 bytes each, stay in a core's cache.
_BLOCK = 1 << 14


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a tensor's elements are from those of the same place before.

    Parameters
    ----------
    n_elements, size : int
        Elements and bytes of the tensor.
    n_differing, differing_size : int
        Of those, how many differ, by their bits.
    unit : {"ulp", "integer"} or None
        What a step is counted in; None if the elements are no numbers, or stored in another byte order:
        bools, text, times, pickles.
    step_max : int or None
        The largest step of an element that differs, of a complex number's the larger part's; None if none
        does, or without a unit.
    step_bits : int or None
        The median, over elements that differ, of the step's length in bits: half are below two to that.
    """

    n_elements: int
    size: int
    n_differing: int
    differing_size: int
    unit: Unit | None
    step_max: int | None
    step_bits: int | None

    @property
    def element_share(self) -> float:
        """Of the elements, the share that differs."""
        return self.n_differing / self.n_elements if self.n_elements else 0.0

    @property
    def byte_share(self) -> float:
        """Of the bytes, the share that differs."""
        return self.differing_size / self.size if self.size else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the distance as plain values, with its shares."""
        return {**asdict(self), "element_share": self.element_share, "byte_share": self.byte_share}

    def __str__(self) -> str:
        told = f"{_share(self.element_share)} of elements, {_share(self.byte_share)} of bytes"
        if self.step_max is None:
            return told
        ulps = "" if self.unit == "integer" else " ulp" if self.step_max == 1 else " ulps"
        return f"{told}, by at most {self.step_max}{ulps}, half below 2^{self.step_bits}"


def _share(part: float) -> str:
    """Return a share in percent; all and none are told from nearly all and nearly none."""
    if 0 < part < 1:
        part = min(max(part, 0.0001), 0.9999)
    return f"{100 * part:.2f} %"


class Meter:
    """Counts over pairs of ranges of one tensor.

    Parameters
    ----------
    dtype : str
        A key of `DTYPE_SIZES`.
    size : int
        Bytes of the tensor.
    is_number : bool
        Whether the elements are what the dtype says: text, say, is carried by integers.

    Examples
    --------
    >>> meter = Meter("float32", 12)
    >>> meter.add(*(np.array(x, "<f4").view(np.uint8) for x in ([1, 2, 3], [1, 2, 3.0000002])))
    >>> print(meter.distance())
    33.33 % of elements, 8.33 % of bytes, by at most 1 ulp, half below 2^1
    """

    def __init__(self, dtype: str, size: int, *, is_number: bool = True) -> None:
        self._kind = _Kind(dtype, is_number)
        self._size = size
        self._n_differing = self._differing_size = 0
        self._step_max = 0
        self._n_of_bits = np.zeros(65, np.int64)

    def add(self, old: U8, new: U8) -> None:
        """Count the same elements of either side, whole ones."""
        block = _BLOCK * self._kind.itemsize
        for start in range(0, new.size, block):
            a, b = old[start : start + block], new[start : start + block]
            n_bytes = int(np.count_nonzero(a != b))
            if n_bytes:
                self._differing_size += n_bytes
                self._add_differing(a.view(self._kind.part), b.view(self._kind.part))

    def _add_differing(self, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> None:
        kind = self._kind
        differs = (a != b).reshape(-1, kind.n_parts)
        at = np.flatnonzero(differs[:, 0] if kind.n_parts == 1 else differs.any(axis=1))
        self._n_differing += len(at)
        if kind.unit is None:
            return
        x, y = (kind.ordered(v.reshape(-1, kind.n_parts)[at]) for v in (a, b))
        steps = (np.maximum(x, y) - np.minimum(x, y)).max(axis=1)
        self._step_max = max(self._step_max, int(steps.max()))
        self._n_of_bits += np.bincount(bit_lengths(steps), minlength=65)

    def distance(self) -> Distance:
        """Return what was counted; what was not handed in is equal."""
        kind, n = self._kind, self._n_differing
        has_steps = bool(n) and kind.unit is not None
        median = int(np.searchsorted(np.cumsum(self._n_of_bits), (n + 1) // 2)) if has_steps else None
        return Distance(
            n_elements=self._size // kind.itemsize,
            size=self._size,
            n_differing=n,
            differing_size=self._differing_size,
            unit=kind.unit,
            step_max=self._step_max if has_steps else None,
            step_bits=median,
        )


class _Kind:
    """What the elements of a dtype are, to count them."""

    def __init__(self, dtype: str, is_number: bool) -> None:
        self.itemsize = DTYPE_SIZES[dtype]
        self.n_parts = 2 if dtype.startswith("complex") else 1
        width = self.itemsize // self.n_parts
        self.part = np.dtype(f"<u{width}")
        self.unit: Unit | None = None
        found = re.match(r"(b?float|complex|u?int)(\d+)", dtype)
        if found is None or not is_number or dtype.endswith("_x2"):  # two numbers in a byte
            return
        self.unit = "integer" if "int" in dtype else "ulp"
        # An e8m0 is an exponent and no more: in order as it is.
        self._is_plain = found[1] == "uint" or dtype == "float8_e8m0fnu"
        # Numbers of fewer bits than a byte are in its low ones.
        self._n_unused = 8 * width - int(found[2]) // self.n_parts

    def ordered(self, v: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return unsigned integers in the order of the numbers."""
        if self._n_unused:
            v = v << v.dtype.type(self._n_unused)
        if not self._is_plain:
            n_below = 8 * v.itemsize - 1
            top = v.dtype.type(1 << n_below)
            # A float's bits count away from zero: all are flipped where the sign is set.
            flipped = (
                (v.view(f"<i{v.itemsize}") >> n_below).view(v.dtype) | top if self.unit == "ulp" else top
            )
            v = v ^ flipped
        return v >> v.dtype.type(self._n_unused) if self._n_unused else v


def bit_lengths(v: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return how many bits each unsigned integer takes.

    Examples
    --------
    >>> bit_lengths(np.array([0, 1, 2, 3, 4, 2**64 - 1], np.uint64)).tolist()
    [0, 1, 2, 2, 3, 64]
    """
    # Without the bit below the highest no rounding to a float can reach the next power of two.
    exponents = (v & ~(v >> v.dtype.type(1))).astype(np.float64).view(np.int64) >> 52
    lengths: npt.NDArray[np.int64] = np.maximum(exponents - 1022, 0)
    return lengths


def windows(
    old: npt.NDArray[np.void], new: npt.NDArray[np.void], itemsize: int, size: int = WINDOW_SIZE
) -> Iterator[tuple[int, int]]:
    """Return the ranges of two tensors of one size outside of which they are equal, in order and apart.

    Parameters
    ----------
    old, new : ndarray of LIST_ROW
        Their chunks; equal bytes that were cut at other places are not seen to be equal.
    itemsize : int
        Bytes of an element; ranges are of whole ones.
    size : int
        Bytes of a range, about: it ends with the chunk of `new` that reaches it.
    """
    old_starts, starts = starts_of(old), starts_of(new)
    stops = starts + new["size"].astype(np.int64)
    at = np.searchsorted(old_starts, starts, "right") - 1
    same = (old_starts[at] == starts) & (old["size"][at] == new["size"])
    same &= (old["id"][at] == new["id"]).all(axis=1)
    begin = done = 0
    for i in np.flatnonzero(~same).tolist():
        if i == 0 or same[i - 1]:
            # Cuts may be inside elements: they are those of another dtype if it once had the same bytes.
            begin = max(int(starts[i]) // itemsize * itemsize, done)
        stop = -(-int(stops[i]) // itemsize) * itemsize
        if stop > begin and (stop - begin >= size or i + 1 == len(new) or same[i + 1]):
            yield begin, stop
            begin = done = stop


def starts_of(chunks: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """Return where each of consecutive chunks starts."""
    sizes = chunks["size"].astype(np.int64)
    return np.cumsum(sizes) - sizes
