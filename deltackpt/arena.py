"""An arena: memory that two processes share, for copies that the one makes and the other reads.

Owns   which pieces there are, which of them are free, and giving back those that are not needed.
Never  knows what a copy is of, or who holds it: its user says which pieces are in use.

Fresh memory costs a page fault for every 4 KiB, more than the copy itself, so a piece that is free again is
used again.
"""

from __future__ import annotations

import mmap
import os
import weakref
from bisect import bisect_left
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from deltackpt.types import U8

#: Smaller copies stand side by side in pieces of this size.  A piece is in memory as long as one of them is
#: in use, so the less the better; but a process may have 65,530, and a state of 100 GB takes 25,000.
_PIECE_SIZE = 4 << 20
_ALIGNMENT = 64
#: A free piece serves for a copy that fills this much of it.
_FILL_MIN = 0.75


class Place(NamedTuple):
    """Where a copy is.

    Parameters
    ----------
    piece, piece_size : int
        Where its piece begins in the arena, and the bytes that has.
    start, size : int
        Where it begins in the piece, and its bytes.
    """

    piece: int
    piece_size: int
    start: int
    size: int


class Arena:
    """The side that makes copies.

    Raises
    ------
    OSError
        If there is no memory of this kind here.

    Examples
    --------
    >>> arena = Arena()
    >>> place = arena.place(np.arange(3, dtype=np.uint8))
    >>> Window(arena.fd).at(place).tolist()
    [0, 1, 2]
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("deltackpt", os.MFD_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self.fd)
        self._size = 0
        self._pieces: dict[int, mmap.mmap] = {}
        self._free: list[tuple[int, int]] = []  # by size, and where they begin: a save asks once a piece
        #: Bytes of the pieces that were begun; whoever wants to know sets it to 0.
        self.used_size = 0
        self._open = -1  # the piece being filled
        self._filled_size = 0

    def close(self) -> None:
        """Give all of it back, as far as this process is concerned."""
        self._pieces.clear()
        self._free.clear()
        self._close()

    def place(self, data: U8) -> Place:
        """Copy some bytes."""
        size = -(-data.size // _ALIGNMENT) * _ALIGNMENT
        if self._open < 0 or self._filled_size + size > len(self._pieces[self._open]):
            self._open, self._filled_size = self._piece(size), 0
            self.used_size += len(self._pieces[self._open])
        piece, start = self._pieces[self._open], self._filled_size
        self._filled_size += size
        np.copyto(np.frombuffer(piece, np.uint8, data.size, start), data)
        return Place(self._open, len(piece), start, data.size)

    def _piece(self, size: int) -> int:
        """Return a piece for a copy of that size: a free one that it about fills, or a new one."""
        wanted = max(size, _PIECE_SIZE)
        i = bisect_left(self._free, (wanted, 0))
        if i < len(self._free) and _FILL_MIN * self._free[i][0] <= wanted:
            return self._free.pop(i)[1]
        # Or what is free would be in memory beside what is used instead.
        self.trim(sum(size for size, _ in self._free) - wanted)
        at, wanted = self._size, -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self.fd, at + wanted)
        self._pieces[at] = mmap.mmap(self.fd, wanted, flags=mmap.MAP_SHARED, offset=at)
        self._size = at + wanted
        return at

    def keep(self, held: Collection[int]) -> None:
        """Say which pieces are in use; all others are free."""
        self._free = sorted((len(self._pieces[at]), at) for at in self._pieces.keys() - set(held))
        self._open = -1

    def trim(self, size_max: int = 0) -> None:
        """Give back the memory of the pieces that are free, but of so many bytes of them."""
        for size, at in self._free:
            size_max -= size
            if size_max < 0:
                self._pieces.pop(at).madvise(mmap.MADV_REMOVE)
        self._free = [(size, at) for size, at in self._free if at in self._pieces]


class Window:
    """The side that reads copies.

    Parameters
    ----------
    fd : int
        Of the `Arena`.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pieces: weakref.WeakValueDictionary[int, np.ndarray[tuple[int], np.dtype[np.uint8]]]
        self._pieces = weakref.WeakValueDictionary()

    def at(self, place: Place) -> U8:
        """Return a copy's bytes; its piece is in use for as long as somebody has them."""
        piece = self._pieces.get(place.piece)
        if piece is None:
            mapped = mmap.mmap(self._fd, place.piece_size, flags=mmap.MAP_SHARED, offset=place.piece)
            piece = self._pieces[place.piece] = np.frombuffer(mapped, np.uint8)
        return piece[place.start : place.start + place.size]

    def held(self) -> list[int]:
        """Return which pieces are in use."""
        return list(self._pieces.keys())
