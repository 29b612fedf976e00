"""Chains: a delta, the base that it needs, that one's base, down to a chunk stored whole.

Owns   following chains through the rows of an index, and what is known of a copy with all its bases.
Never  reads or decodes a record, or says which packs may be used.

Depth strictly decreases from a record to its base (format.md, "Delta chains"): so every walk ends, whatever
the rows say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from deltackpt.format import CHUNK_ID_SIZE
from deltackpt.index import Rows
from deltackpt.pack import PackName
from deltackpt.types import U8

#: The row of each base by its chunk id; None: it is nowhere.
Bases: TypeAlias = dict[bytes, np.void | None]
#: Looks a batch of ids up: which are found, and their rows.
Find = Callable[[U8], tuple[npt.NDArray[np.bool_], Rows]]


class Copy(NamedTuple):
    """A copy of a chunk with all that it takes to decode it.

    Parameters
    ----------
    packs : frozenset of PackName
        Its own pack, and those of all its bases.
    depth : int
        Deltas to undo; 0: it is stored whole.
    chain_size : int
        Bytes of its payload and of those of all its bases.
    raw_size, stored_size : int
        Of the chunk alone: decoded bytes, and those of its payload.
    root : bytes
        Id of the chunk stored whole that its chain ends in; its own if it is whole.
    """

    packs: frozenset[PackName]
    depth: int
    chain_size: int
    raw_size: int
    stored_size: int
    root: bytes

    @classmethod
    def of(cls, row: np.void, pack: PackName, base: Copy | None) -> Copy | None:
        """Return a row as a copy, given that of its base; None if it cannot be decoded.

        A base as deep as what needs it is none: the two may be of different times, and need each other.
        """
        depth, raw_size, stored_size = int(row["depth"]), int(row["raw_size"]), int(row["stored_size"])
        if not depth:
            return cls(frozenset([pack]), 0, stored_size, raw_size, stored_size, row["id"].tobytes())
        if base is None or base.depth >= depth or not raw_size:  # nothing is no delta of anything
            return None
        packs, chain_size = base.packs | {pack}, base.chain_size + stored_size
        return cls(packs, depth, chain_size, raw_size, stored_size, base.root)


def bases_of(rows: Rows, find: Find, depth_max: int) -> Bases:
    """Return the rows of all chunks that some rows need, directly or not; each is looked up once.

    Parameters
    ----------
    rows : ndarray of ROW
    find : callable
        Called at most `depth_max` times, with all bases of one depth together: a look-up costs 100 us,
        whether for one chunk or for a thousand.
    depth_max : int
    """
    bases: Bases = {}
    for _ in range(depth_max):
        deltas = rows[rows["depth"] > 0]
        todo = sorted({base.tobytes() for base in deltas["base"]} - bases.keys())
        if not todo:
            break
        found, rows = find(as_ids(todo))
        bases.update((i, row if there else None) for i, there, row in zip(todo, found, rows, strict=True))
        rows = rows[found]
    return bases


class Chains:
    """Which copies of chunks can be decoded, from packs that may be used.

    Parameters
    ----------
    packs : sequence of PackName
        What a row's `pack` counts in.
    find : callable
        Looks ids up: the rows of least depth in packs that may be used.
    copies : callable
        Returns all rows of one chunk in packs that may be used, of least depth first.
    depth_max : int

    Attributes
    ----------
    dead : set of bytes
        Of the chunks looked up, those of which there are deltas, and none that has all its bases.
    """

    def __init__(
        self,
        packs: Sequence[PackName],
        find: Find,
        copies: Callable[[bytes], Iterable[np.void]],
        depth_max: int,
    ) -> None:
        self._packs = packs
        self._find = find
        self._copies = copies
        self._depth_max = depth_max
        self.dead: set[bytes] = set()

    def look_up(self, ids: U8) -> list[Copy | None]:
        """Return a copy of each chunk, with all its bases; None where there is none."""
        found, rows = self._find(ids)
        copies: list[Copy | None] = [None] * len(ids)
        at = np.flatnonzero(found)
        packs, raw_sizes, stored_sizes = (
            rows[name][at].tolist() for name in ("pack", "raw_size", "stored_size")
        )
        names = {n: frozenset([self._packs[n]]) for n in set(packs)}
        roots = map(bytes, ids[at])  # each its own
        packs_of = map(names.__getitem__, packs)
        whole = map(Copy, packs_of, repeat(0), stored_sizes, raw_sizes, stored_sizes, roots)
        for i, copy in zip(at.tolist(), whole, strict=True):
            copies[i] = copy
        deltas = np.flatnonzero(rows["depth"])
        if len(deltas):
            bases = self._of_bases(bases_of(rows[deltas], self._find, self._depth_max))
            for i in deltas.tolist():
                copies[i] = self._of_row(ids[i].tobytes(), rows[i], bases)
            self.dead.update(ids[i].tobytes() for i in deltas.tolist() if copies[i] is None)
        return copies

    def _of_bases(self, bases: Bases) -> dict[bytes, Copy | None]:
        """Return the copies that the rows of bases are, from the whole ones up."""
        copies: dict[bytes, Copy | None] = {}
        there = [(chunk_id, row) for chunk_id, row in bases.items() if row is not None]
        for chunk_id, row in sorted(there, key=lambda item: int(item[1]["depth"])):
            copies[chunk_id] = self._of_row(chunk_id, row, copies)
        return copies

    def _of_row(self, chunk_id: bytes, row: np.void, bases: dict[bytes, Copy | None]) -> Copy | None:
        copy = Copy.of(row, self._packs[int(row["pack"])], bases.get(row["base"].tobytes()))
        if copy is not None and copy.depth <= self._depth_max:
            return copy
        # A base is gone, and its delta is left in a pack that holds better things: another copy may serve.
        return self._of_any(chunk_id, self._depth_max + 1, {})

    def _of_any(
        self, chunk_id: bytes, below: int, known: dict[tuple[bytes, int], Copy | None]
    ) -> Copy | None:
        """Return the copy of least depth, less than `below`, that has all its bases."""
        key = chunk_id, below
        if key not in known:
            known[key] = None
            for row in self._copies(chunk_id):
                depth = int(row["depth"])
                if depth >= below:
                    break
                base = self._of_any(row["base"].tobytes(), depth, known) if depth else None
                if copy := Copy.of(row, self._packs[int(row["pack"])], base):
                    known[key] = copy
                    break
        return known[key]


def as_ids(chunk_ids: Iterable[bytes]) -> U8:
    """Return chunk ids as an array of shape (n, 32)."""
    return np.frombuffer(b"".join(chunk_ids), np.uint8).reshape(-1, CHUNK_ID_SIZE)
