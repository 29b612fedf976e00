"""The shadow: a copy, in memory, of what changed in a run's last save, to take the next deltas against.

Owns   the copies and their bound.
Never  vouches for its bytes: who uses them compares their fingerprints, a flipped bit would spoil the delta.

Without a shadow the base is read back from the store, which costs about as much as encoding its delta.
A tensor that did not change in the last save is not kept: a frozen base takes no memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from deltackpt.types import U8

#: Bytes that a run keeps unless told otherwise.
SIZE_MAX = 1 << 30


class Fresh(NamedTuple):
    """A tensor to be kept.

    Parameters
    ----------
    name : str
    root : bytes
        Names its content.
    data : ndarray of uint8
    is_own : bool
        Whether nobody else holds the memory, so that it need not be copied.
    """

    name: str
    root: bytes
    data: U8
    is_own: bool


class Shadow:
    """Copies of some tensors, at most `size_max` bytes.

    Examples
    --------
    >>> shadow = Shadow(100)
    >>> shadow.replace([Fresh("w", b"root", np.zeros(60, np.uint8), False)])
    >>> shadow.get("w", b"root").size, shadow.get("w", b"another")
    (60, None)
    """

    def __init__(self, size_max: int = SIZE_MAX) -> None:
        self.size_max = size_max
        self._kept: dict[str, tuple[bytes, U8]] = {}

    @property
    def size(self) -> int:
        """Bytes it takes."""
        return sum(data.size for _, data in self._kept.values())

    def get(self, name: str, root: bytes) -> U8 | None:
        """Return what was kept of a tensor, if it is this content."""
        kept = self._kept.get(name)
        return kept[1] if kept and kept[0] == root else None

    def replace(self, fresh: Iterable[Fresh]) -> None:
        """Keep these, as far as the bound allows, and nothing else; memory of the same size is used again."""
        kept: dict[str, tuple[bytes, U8]] = {}
        size = 0
        for name, root, data, is_own in fresh:
            if size + data.size > self.size_max:
                continue
            size += data.size
            if not is_own:
                old = self._kept.pop(name, (b"", np.empty(0, np.uint8)))[1]
                copy = old if old.size == data.size else np.empty(data.size, np.uint8)
                np.copyto(copy, data)
                data = copy
            kept[name] = root, data
        self._kept = kept

    def clear(self) -> None:
        """Give the memory back."""
        self._kept = {}
