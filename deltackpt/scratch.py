"""Memory that is used again.

Owns   growing it and handing out views.
Never  keeps two views apart: one user at a time.

Fresh memory costs a page fault every 4 KiB, in a virtual machine 2-4 us: for a chunk of 256 KiB as much as
encoding it.
"""

from __future__ import annotations

import numpy as np

from deltackpt.types import U8


class Scratch:
    """One block of memory, grown as needed.

    Examples
    --------
    >>> scratch = Scratch()
    >>> scratch.of(10).size, scratch.of(5).size
    (10, 5)
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def of(self, size: int) -> U8:
        """Return a view of `size` bytes; the last one is not to be used any more."""
        if self._memory.size < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size]
