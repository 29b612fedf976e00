"""Where a tensor's bytes are cut into chunks.

Owns   the chunker's parameters, their meaning, and how they are written down in a store's descriptor.
Never  hashes, stores or names a chunk; the arithmetic is `kernels.cut`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deltackpt import kernels
from deltackpt.errors import FormatError, InvalidInputError, UnsupportedVersionError
from deltackpt.format import CHUNK_SIZE_MAX
from deltackpt.types import U8

#: The rule by which chunks are cut, constants included.  Another rule needs another name.
NAME = "word-v1"

# Element size -> bytes the rule looks at as one word.  A row of single bytes is cut at multiples of 4.
_ALIGN = {1: 4, 2: 2, 4: 4, 8: 8, 16: 8}

# avg - min is at least two words: the threshold stays within 2**31, and runs of zeros uncut (kernels.cut).
_SPREAD_MIN = 16


@dataclass(frozen=True)
class Chunker:
    """Content-defined cuts: equal content is cut alike, whatever tensor, shard or offset it lies at.

    Parameters
    ----------
    min_size, avg_size, max_size : int
        Bytes of a chunk.  Only a tensor's last chunk is smaller than `min_size`.  `avg_size` is what random
        data would give without a maximum; under the defaults it gives 0.5 % less.

    Raises
    ------
    InvalidInputError
        If not ``1 <= min_size``, ``min_size + 16 <= avg_size <= max_size <= CHUNK_SIZE_MAX``.

    Notes
    -----
    Two saves share chunks only if they were cut with the same parameters: a store keeps them in its
    descriptor.

    Examples
    --------
    >>> Chunker().cuts(np.zeros(3 << 20, np.uint8), itemsize=4)
    array([1048576, 2097152, 3145728])
    """

    min_size: int = 65536
    avg_size: int = 262144
    max_size: int = 1048576

    def __post_init__(self) -> None:
        sizes = (self.min_size, self.avg_size, self.max_size)
        if not all(type(size) is int for size in sizes):
            raise InvalidInputError(f"chunker: sizes are {sizes}, expected integers")
        if not (
            1 <= self.min_size <= self.avg_size - _SPREAD_MIN
            and self.avg_size <= self.max_size <= CHUNK_SIZE_MAX
        ):
            raise InvalidInputError(
                f"chunker: sizes are {sizes}, expected 1 <= min, min + {_SPREAD_MIN} <= avg <= max, "
                f"max <= {CHUNK_SIZE_MAX}",
            )

    def threshold(self, align: int) -> int:
        """Chance, in 2**-32, that a word of `align` bytes ends a chunk: a cut every ``avg - min`` bytes."""
        return (align << 32) // (self.avg_size - self.min_size)

    def cuts(self, data: U8, itemsize: int) -> npt.NDArray[np.int64]:
        """Cut a tensor's bytes.

        Parameters
        ----------
        data : ndarray of uint8, shape (size,)
            The tensor's bytes, contiguous.
        itemsize : {1, 2, 4, 8, 16}
            Bytes of an element.  No element is split.

        Returns
        -------
        ndarray of int64, shape (n_chunks,)
            End offsets, ascending, the last one ``data.size``; none for empty data.

        Raises
        ------
        InvalidInputError
            If `data` is anything else, or `itemsize` is another.
        """
        align = _ALIGN.get(itemsize)
        if align is None:
            raise InvalidInputError(f"chunker: itemsize is {itemsize}, expected one of {sorted(_ALIGN)}")
        return kernels.cut(data, align, self.min_size, self.max_size, self.threshold(align))

    def to_json(self) -> dict[str, Any]:
        """The parameters as a plain dict, for a store's descriptor."""
        return {
            "name": NAME,
            "min_size": self.min_size,
            "avg_size": self.avg_size,
            "max_size": self.max_size,
        }

    @classmethod
    def from_json(cls, value: Any) -> Chunker:
        """Read what `to_json` wrote.

        Raises
        ------
        UnsupportedVersionError
            If the chunks were cut by a rule that is not known here.
        FormatError
            If `value` is no such dict.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise FormatError(f"chunker: found {value!r:.200}, expected an object with a name")
        if value["name"] != NAME:
            raise UnsupportedVersionError(
                f"chunker: chunks are cut by {value['name']!r:.200}, expected {NAME!r}",
                hint="upgrade deltackpt",
            )
        expected = {"name", "min_size", "avg_size", "max_size"}
        if value.keys() != expected:
            raise FormatError(f"chunker: found keys {list(value)!r:.200}, expected {sorted(expected)}")
        try:
            return cls(value["min_size"], value["avg_size"], value["max_size"])
        except InvalidInputError as error:
            raise FormatError(error.message) from error
