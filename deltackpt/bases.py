"""Bases: for every chunk that a save must put, the chunks it may be a delta of, in order of preference.

Owns   who is asked: the source of a cast, the chunk that was there before, the root of its chain, neighbours.
Never  decides (planner.py does) or encodes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deltackpt import planner
from deltackpt.chains import Copy, as_ids
from deltackpt.digests import fingerprint
from deltackpt.memory import Known, Memory, Pieces
from deltackpt.planner import Candidate, Plan
from deltackpt.session import Session
from deltackpt.shadow import Shadow
from deltackpt.types import DTYPE_SIZES, U8, Tensor

log = logging.getLogger("deltackpt")


@dataclass(frozen=True, slots=True, eq=False)
class CastOf:
    """The tensor of the same state that a tensor is the cast of: what is known of it, its bytes, the cast."""

    known: Known
    tensor: Tensor
    cast: int


@dataclass(frozen=True, slots=True, eq=False)
class Lacking:
    """A tensor's chunks that the store lacks.

    Parameters
    ----------
    tensor : Tensor
    known : Known
    which : list of int
        Those chunks.
    before : Known or None
        What was remembered in this place, cut alike.
    pieces : Pieces or None
        If there was nothing in this place: where it stood in others, cut alike.
    source : CastOf or None
    """

    tensor: Tensor
    known: Known
    which: list[int]
    before: Known | None
    pieces: Pieces | None
    source: CastOf | None


class Put(NamedTuple):
    """A chunk to put, the `i`-th of its tensor, and as what."""

    i: int
    plan: Plan


class Bases:
    """Where the bases of one save come from."""

    def __init__(self, session: Session, memory: Memory, shadow: Shadow) -> None:
        self._session = session
        self._memory = memory
        self._shadow = shadow
        self._copies: dict[bytes, Copy | None] = {}
        self._to_put: set[bytes] = set()  # in this session, before what is planned after them

    def plan(self, group: Sequence[Lacking]) -> list[list[Put]]:
        """Plan a group of tensors together: a look-up costs as much for one chunk as for a thousand.

        They are put in the order they are given in, before the next group is planned.
        """
        wanted = []
        for t in group:
            self._to_put.update(t.known.ids[i].tobytes() for i in t.which)
            shadow = self._shadow_of(t) if t.which else None
            wanted.append([list(self._candidates(t, i, shadow)) for i in t.which])
        self._look_up(c.id for chunks in wanted for candidates in chunks for c in candidates)
        # A chain that is full leads to its root, one look-up more.
        roots = [
            [[root for c in candidates if (root := self._root(c))] for candidates in chunks]
            for chunks in wanted
        ]
        self._look_up(root.id for chunks in roots for found in chunks for root in found)
        return [
            list(self._puts(t, chunks, found)) for t, chunks, found in zip(group, wanted, roots, strict=True)
        ]

    def _look_up(self, ids: Iterator[bytes]) -> None:
        new = sorted({i for i in ids if i not in self._copies})
        if new:
            found = self._session.look_up(as_ids(new))
            self._copies.update(zip(new, found, strict=True))

    def _candidates(self, t: Lacking, i: int, shadow: U8 | None) -> Iterator[Candidate]:
        start, end = _span(t.known.ends, i)
        if t.source is not None:
            cast = _cast(t.source, start, end, DTYPE_SIZES[t.tensor.dtype])
            if cast is not None:
                yield cast
        if t.before is not None:
            yield Candidate(
                "previous", t.before.ids[i].tobytes(), data=None if shadow is None else shadow[start:end]
            )
            return
        if t.pieces is not None:
            yield Candidate("previous", t.pieces.ids[i].tobytes(), offset=int(t.pieces.offsets[i]))
            return
        # Cut anew: what stood between the same neighbours may go on where this one ends, or begin before it.
        ids, size = t.known.ids, end - start
        right = self._memory.after(ids[i - 1].tobytes()) if i else None
        if right is not None and right.size >= size:
            yield Candidate("neighbour, from its start", right.id)
        left = self._memory.before(ids[i + 1].tobytes()) if i + 1 < len(ids) else None
        if left is not None and left.size >= size:
            yield Candidate("neighbour, to its end", left.id, offset=left.size - size)

    def _root(self, candidate: Candidate) -> Candidate | None:
        """Return the root of the previous chunk's chain, if that chain is full."""
        copy = self._copies[candidate.id]
        if candidate.why != "previous" or copy is None or copy.root == candidate.id:
            return None
        if not planner.refused(candidate._replace(copy=copy), self._session.store.depth_max):
            return None
        return Candidate("root", copy.root, offset=candidate.offset)

    def _puts(self, t: Lacking, chunks: list[list[Candidate]], roots: list[list[Candidate]]) -> Iterator[Put]:
        for i, candidates, found in zip(t.which, chunks, roots, strict=True):
            start, end = _span(t.known.ends, i)
            known = map(self._known, candidates + found)
            # A chain may lead to a chunk cut otherwise.
            fitting = [c for c in known if c.cast or not c.copy or c.copy.raw_size >= c.offset + end - start]
            yield Put(i, planner.plan(False, fitting, self._session.store.depth_max))

    def _known(self, candidate: Candidate) -> Candidate:
        copy = self._copies[candidate.id]
        if copy is None and candidate.cast and candidate.id in self._to_put:
            copy = Copy(frozenset(), 0, 0, 1, 0, candidate.id)  # no deeper than the planner lets it be
        return candidate._replace(copy=copy)

    def _shadow_of(self, t: Lacking) -> U8 | None:
        """Return the remembered bytes of a tensor, if they are still what was saved."""
        if t.before is None or t.before.fingerprints is None:
            return None
        data = self._shadow.get(t.tensor.name, t.before.row.root)
        if data is not None and fingerprint(data, t.before.ends) != t.before.fingerprints:
            log.error("tensor %r: its shadow in memory has changed; not used", t.tensor.name)
            return None
        return data


def _span(ends: npt.NDArray[np.int64], i: int) -> tuple[int, int]:
    return int(ends[i - 1]) if i else 0, int(ends[i])


def _cast(source: CastOf, start: int, end: int, itemsize: int) -> Candidate | None:
    """Return the chunk that holds the source of a tensor's bytes, if it is one chunk."""
    wide = DTYPE_SIZES[source.tensor.dtype]
    start, end = start // itemsize * wide, end // itemsize * wide
    j = int(np.searchsorted(source.known.ends, start, "right"))
    first, stop = _span(source.known.ends, j)
    if end > stop:
        return None
    return Candidate(
        "cast of another tensor",
        source.known.ids[j].tobytes(),
        offset=start - first,
        cast=source.cast,
        data=source.tensor.data[first:stop],
        fingerprint=source.known.fingerprints[j] if source.known.fingerprints is not None else None,
    )
