"""What is remembered of a snapshot, so that the next save finds what changed, and what it is a delta of.

Owns   `Known`, a tensor's cuts, ids and packs; `Memory`, all of them by name, by content, and by neighbours.
Never  holds a tensor's bytes: those are in the shadow, or in the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from deltackpt.glances import NONE, Glances
from deltackpt.manifest import Manifest, TensorRow
from deltackpt.modes import Modes
from deltackpt.pack import PackName
from deltackpt.restore import resolve
from deltackpt.store import Store
from deltackpt.types import U8, Deferred, Tensor

Ends = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What is remembered of a tensor, so that the next save finds what changed.

    Parameters
    ----------
    row : TensorRow
    ends : ndarray of int64, shape (n,)
        Where its chunks end.
    ids : ndarray of uint8, shape (n, 32)
    fingerprints : list of bytes or None
        xxh3_128 of each chunk; None when it was read from the store and not seen in this process.
    packs : frozenset of PackName or None
        Packs that hold its chunks and lists, perhaps among others; None when not looked up yet.
    modes : Modes
        How its chunks were best taken.
    """

    row: TensorRow
    ends: Ends
    ids: U8
    fingerprints: list[bytes] | None
    packs: frozenset[PackName] | None
    modes: Modes = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Where a tensor's bytes stood in others: cut so that each piece was within one chunk.

    Parameters
    ----------
    ends : ndarray of int64, shape (n,)
        Where the pieces end.
    ids : ndarray of uint8, shape (n, 32)
        Of the chunks that they were in.
    offsets : ndarray of int64, shape (n,)
        Where in them they began.
    """

    ends: Ends
    ids: U8
    offsets: Ends


class Sized(NamedTuple):
    """A chunk: its id and its bytes."""

    id: bytes
    size: int


class Memory:
    """The tensors of one snapshot as `Known`, by name and by content; and the glances at them.

    Parameters
    ----------
    tensors : iterable of Known
    glances : Glances
    new_share : float
        The part of its bytes that was new to the store: so much is expected to change again.

    Attributes
    ----------
    pieces : dict of str to Pieces
        By name, tensors that are not remembered as such, but as parts of others.
    """

    def __init__(
        self, tensors: Iterable[Known] = (), glances: Glances = NONE, *, new_share: float = 1.0
    ) -> None:
        self.glances = glances
        self.new_share = new_share
        self.pieces: dict[str, Pieces] = {}
        self._by_name: dict[str, Known] = {}
        self._by_content: dict[tuple[int, bytes], Known] = {}
        self._after: dict[bytes, Sized] | None = None
        self._before: dict[bytes, Sized] = {}
        for known in tensors:
            self.add(known)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the glances here: they are of this process's memory."""
        return {**vars(self), "glances": NONE}

    def add(self, known: Known) -> None:
        """Remember one more tensor."""
        self._by_name[known.row.name] = known
        self._by_content[known.row.size, known.row.fingerprint] = known

    def __iter__(self) -> Iterator[Known]:
        return iter(self._by_name.values())

    def named(self, name: str) -> Known:
        """Return what has this name."""
        return self._by_name[name]

    def same_place(self, tensor: Tensor | Deferred) -> Known | None:
        """Return what had this tensor's name, dtype and shape."""
        known = self._by_name.get(tensor.name)
        if known is not None and known.row.dtype == tensor.dtype and known.row.shape == tensor.shape:
            return known
        return None

    def same_content(self, size: int, fingerprint: bytes) -> Known | None:
        """Return what, by its fingerprint, had the same bytes; a hint which cuts to try."""
        return self._by_content.get((size, fingerprint))

    def after(self, chunk_id: bytes) -> Sized | None:
        """Return the chunk that followed another one in its tensor."""
        self._link()
        return (self._after or {}).get(chunk_id)

    def before(self, chunk_id: bytes) -> Sized | None:
        """Return the chunk that stood before another one in its tensor."""
        self._link()
        return self._before.get(chunk_id)

    def _link(self) -> None:
        """Note each chunk's neighbours, when first asked for one: 1 us a chunk, and seldom needed."""
        if self._after is not None:
            return
        self._after = {}
        for known in self._by_name.values():
            chunks = list(map(Sized, map(bytes, known.ids), np.diff(known.ends, prepend=0).tolist()))
            for left, right in pairwise(chunks):
                self._after[left.id] = right
                self._before[right.id] = left

    @classmethod
    def from_store(cls, store: Store, manifest: Manifest, *, new_share: float = 1.0) -> Memory:
        """Read a snapshot's lists, and none of its tensors."""
        rows = [row for row in manifest.tensors if row.size]
        lists = resolve(store, rows)
        tensors = (
            Known(
                row,
                np.cumsum(chunks["size"].astype(np.int64)),
                np.ascontiguousarray(chunks["id"]),
                None,
                None,
            )
            for row, chunks in zip(rows, lists, strict=True)
        )
        return cls(tensors, new_share=new_share)
