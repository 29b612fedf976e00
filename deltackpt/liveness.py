"""Liveness: which chunks committed steps need, and which copy of each is in use.

Owns   the mark: from commits over manifests and lists to chunks, from chunks to their bases, and to packs.
Never  changes anything; what follows from it is gc's to decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deltackpt.chains import as_ids
from deltackpt.errors import CorruptError
from deltackpt.format import PACK_HEADER, PACK_TRAILER, RECORD_HEADER, ROW
from deltackpt.index import Segment, keys_of
from deltackpt.manifest import list_from_bytes
from deltackpt.pack import PackName
from deltackpt.rebase import Link
from deltackpt.records import Commit, Slot
from deltackpt.store import Store
from deltackpt.types import U8

Ints = npt.NDArray[np.int64]

#: Tiers of packs; see `Liveness._tiers`.
_UNLISTED, _NEVER = 3, 9
#: Bytes of a pack without records: they count as used as soon as one record is.
PACK_SIZE_MIN = PACK_HEADER.size + PACK_TRAILER.size


@dataclass(frozen=True, slots=True)
class PackUse:
    """A pack's bytes: all, and those of records that are the copy in use of a live chunk."""

    size: int
    live_size: int


def look(store: Store) -> Liveness:
    """Look at a store that others may be changing.

    Raises
    ------
    CorruptError
        If a committed step's manifest, list or chunk is missing or damaged: then what is live is not known.
    """
    while True:
        before = _state(store)
        try:
            seen = Liveness(store)
            seen.check_whole()
        except CorruptError:
            if _state(store) == before:
                raise
            # A step was saved while this looked, or another gc moved what is in use, deleted, or merged the
            # index: look again.
        else:
            return seen


class Liveness:
    """What is in a store at one moment, and which copy of each live chunk is in use.

    Listed in an order that can only err towards keeping: quarantine, gc records, packs, sessions, refs,
    index.  A pack seen here whose session is not seen open has ended, so its decision is seen too.

    What is in use is closed under bases: with a delta of depth d, a copy of its base of depth below d.  A
    copy is *usable* if its pack may be relied on and, of a delta, if some usable copy of its base is of less
    depth.  The copy in use is the usable one of least depth, so for any usable delta above it, it is low
    enough.  The tier of a pack decides only between copies of one depth; were it first, a copy too deep for a
    delta above it could be kept, and the one that the delta needs deleted.

    One exception: a copy in a pack that no index lists, or with a base there, comes after all others, for it
    may be gone after a power loss.  Where a delta, itself such a copy, needs its base with less depth than
    the others have, both are in use.
    """

    def __init__(self, store: Store) -> None:
        # Before the packs: what was good in a pack set aside was stored elsewhere before.
        self._aside = store.quarantine().packs
        records = set(store.backend.names("gc/"))
        self.n_cycles, self._condemned = store.gc_state()
        #: Whether no cycle was unfinished: of one that is, it is not known yet what it will spare.
        self.is_settled = not self.n_cycles or f"gc/sweep-{self.n_cycles - 1}" in records
        self.packs: dict[PackName, int] = {}
        for entry in store.backend.list("packs/"):
            name = PackName.from_key(entry.name)
            if name is not None:
                self.packs[name] = entry.size
        self._writing = {name.sid for name in store.sessions()}
        commits, self.n_refs = _commits(store)
        live = _live_ids(store, commits)
        index = store.refresh(complete=True)
        self._unlisted = frozenset(index.unlisted)
        self._rows = Segment.merge(index.segments)
        self._sizes = np.array([self.packs.get(name, 0) for name in self._rows.packs], np.int64)
        self._store = store
        self._number()
        at = self._find(live)
        self._wanted = self._chunk[at[at >= 0]]  # what steps have themselves
        self._n_unknown = int((at < 0).sum())

    def _number(self) -> None:
        """Number the chunks; note of each row its chunk, and that of its base, -1 where there is none."""
        rows = self._rows.rows
        is_new = np.ones(len(rows), np.bool_)
        is_new[1:] = (rows["id"][1:] != rows["id"][:-1]).any(axis=1)
        self._chunk = np.cumsum(is_new) - 1
        self._n_chunks = int(is_new.sum())
        self._base = np.full(len(rows), -1, np.int64)
        deltas = np.flatnonzero(rows["depth"])
        at = self._find(np.ascontiguousarray(rows["base"][deltas]))
        self._base[deltas[at >= 0]] = self._chunk[at[at >= 0]]

    def _find(self, ids: U8) -> Ints:
        everywhere = np.ones(len(self._rows.packs), np.bool_)
        at, _ = self._rows.find(ids, keys_of(ids), everywhere)
        return at

    def _tiers(self, avoid: frozenset[PackName], last: frozenset[PackName]) -> Ints:
        """Rank the places of rows: 0 rely on, 1 to 3 only if there is no better, 9 never."""

        def tier(name: PackName) -> int:
            if not self._counts(name) or name in self._condemned - last:
                return _NEVER
            if name in self._unlisted:  # perhaps not durable: a power loss could take it, not the other
                return _UNLISTED
            if name in last:
                return 2
            return 1 if name in avoid else 0

        tiers = np.array([tier(name) for name in self._rows.packs], np.int64)
        of_rows: Ints = tiers[self._rows.rows["pack"]]
        return of_rows

    def _usable(self, allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return which of the allowed rows can be decoded from allowed ones: those of depth 0, then 1, ..."""
        depths = self._rows.rows["depth"]
        usable = np.zeros(len(depths), np.bool_)
        there = np.zeros(self._n_chunks, np.bool_)
        for depth in range(self._store.depth_max + 1):
            at = np.flatnonzero(allowed & (depths == depth))
            if depth:
                at = at[self._base[at] >= 0]
                at = at[there[self._base[at]]]
            usable[at] = True
            there[self._chunk[at]] = True
            if depth >= int(depths.max(initial=0)):
                break
        return usable

    def _needed(self, usable: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return the chunks that steps have, and those that any of their usable copies needs."""
        needed = np.zeros(self._n_chunks, np.bool_)
        needed[self._wanted] = True
        deltas = np.flatnonzero(usable & (self._base >= 0))
        while True:
            bases = self._base[deltas[needed[self._chunk[deltas]]]]
            if needed[bases].all():
                return needed
            needed[bases] = True

    def _in_use(self, avoid: frozenset[PackName], last: frozenset[PackName]) -> Ints:
        """Return the rows in use: of each live chunk the usable copy of least depth, then of lowest tier.

        Then that in the pack which is used most: two packs of one content must not keep each other alive.
        """
        rows, chunk = self._rows.rows, self._chunk
        if not len(rows):
            return np.zeros(0, np.int64)
        tiers = self._tiers(avoid, last)
        usable, listed = self._usable(tiers < _NEVER), self._usable(tiers < _UNLISTED)
        at = np.flatnonzero(usable & self._needed(usable)[chunk])
        pack_of = rows["pack"][at]
        used = np.bincount(pack_of, _stored_sizes(rows[at]), len(self._sizes)) / np.maximum(self._sizes, 1)
        by_name = np.argsort(np.argsort([name.key for name in self._rows.packs]))
        depths = rows["depth"].astype(np.int64)
        order = (by_name[pack_of], -used[pack_of], tiers[at])
        first = self._first(at[np.lexsort((*order, depths[at], ~listed[at], chunk[at]))])
        shallowest = first
        if not listed[at].all():
            shallowest = self._first(at[np.lexsort((*order, ~listed[at], depths[at], chunk[at]))])
        in_use = np.zeros(len(rows), np.bool_)
        todo, below = self._wanted, np.full(len(self._wanted), self._store.depth_max + 1)
        while len(todo):  # of ever less depth
            choice = np.where(depths[first[todo]] < below, first[todo], shallowest[todo])
            choice = np.unique(choice[first[todo] >= 0])
            choice = choice[~in_use[choice]]
            in_use[choice] = True
            deltas = choice[depths[choice] > 0]
            todo, below = self._base[deltas], depths[deltas]
        return np.flatnonzero(in_use)

    def _first(self, at: Ints) -> Ints:
        """Return of each chunk its first row in `at`, where those of one chunk stand together; or -1."""
        is_first = np.ones(len(at), np.bool_)
        is_first[1:] = self._chunk[at[1:]] != self._chunk[at[:-1]]
        first = np.full(self._n_chunks, -1, np.int64)
        first[self._chunk[at[is_first]]] = at[is_first]
        return first

    def _counts(self, name: PackName) -> bool:
        """Whether a pack is there; one that is set aside is not: gc cannot tell what in it is bad."""
        return name in self.packs and name not in self._aside

    def check_whole(self) -> None:
        """Refuse to go on when a live chunk cannot be there at all: deleting would make it worse."""
        there = np.array([self._counts(name) for name in self._rows.packs], np.bool_)
        n_missing = self._n_unknown + self._n_unusable(there[self._rows.rows["pack"]])
        if n_missing:
            raise CorruptError(
                f"{self._store.url}: {n_missing} chunks that steps need are in no pack, or lack a base; "
                "nothing deleted",
                hint="run deltackpt repair; save again what is lost, or forget the damaged steps",
            )

    def check_uncondemned(self) -> None:
        """Refuse to go on when a live chunk is usable only with what is condemned: no gc leaves that."""
        n_lost = self._n_unusable(self._tiers(frozenset(), frozenset()) < _NEVER)
        if n_lost:
            raise CorruptError(
                f"{self._store.url}: {n_lost} chunks that steps need are condemned, or a base of theirs is; "
                "nothing deleted",
                hint="copy the steps out with deltackpt restore, and report this",
            )

    def _n_unusable(self, allowed: npt.NDArray[np.bool_]) -> int:
        """Return how many of the chunks that steps have cannot be decoded from the allowed rows."""
        have = np.zeros(self._n_chunks, np.bool_)
        if len(self._rows.rows):
            have[self._chunk[self._usable(allowed)]] = True
        return int((~have[self._wanted]).sum())

    def use(self, avoid: frozenset[PackName] = frozenset()) -> dict[PackName, PackUse]:
        """Return how much of each pack is in use; of those that could be condemned."""
        at = self._in_use(avoid, frozenset())
        rows = self._rows.rows[at]
        sizes = np.bincount(rows["pack"], _stored_sizes(rows), len(self._sizes)).astype(np.int64)
        live = {
            name: int(size) + PACK_SIZE_MIN
            for name, size in zip(self._rows.packs, sizes, strict=True)
            if size
        }
        return {
            name: PackUse(size, min(size, live.get(name, 0)))
            for name, size in self.packs.items()
            if name not in self._condemned and name.sid not in self._writing
        }

    def links(self) -> list[Link]:
        """Return the records in use of chunks that no step has, and the deltas taken against them."""
        if not self._rows.rows["depth"].any():
            return []
        at = self._in_use(frozenset(), frozenset())
        rows, chunk, base = self._rows.rows[at], self._chunk[at], self._base[at]
        wanted = np.zeros(self._n_chunks, np.bool_)
        wanted[self._wanted] = True
        unwanted = np.zeros(self._n_chunks + 1, np.bool_)  # the last for no base: -1
        unwanted[chunk[~wanted[chunk]]] = True
        whole_sizes = self._whole_sizes(at)
        sizes = _stored_sizes(rows).astype(np.int64)
        return [
            Link(
                rows["id"][i].tobytes(),
                rows["base"][i].tobytes() if rows["depth"][i] else None,
                int(rows["depth"][i]),
                bool(wanted[chunk[i]]),
                int(sizes[i]),
                int(whole_sizes[i]),
            )
            for i in np.flatnonzero(unwanted[chunk] | unwanted[base]).tolist()
        ]

    def _whole_sizes(self, at: Ints) -> Ints:
        """Return what chunks would take whole: about as much a byte as the one at the root of their chain."""
        rows, chunk, base = self._rows.rows[at], self._chunk[at], self._base[at]
        share = np.ones(self._n_chunks)
        for depth in range(int(rows["depth"].max(initial=0)) + 1):
            of = rows["depth"] == depth
            known = rows["stored_size"][of] / np.maximum(rows["raw_size"][of], 1)
            share[chunk[of]] = share[base[of]] if depth else known
        sizes: Ints = (share[chunk] * rows["raw_size"]).astype(np.int64) + RECORD_HEADER.size + ROW.itemsize
        return sizes

    def needed_from(self, condemned: frozenset[PackName]) -> frozenset[PackName]:
        """Return those of the condemned packs that hold what is in use of a live chunk.

        All of them, if what a step needs is usable only with packs that another unfinished cycle condemned:
        a chain may lie in both, and each cycle would think of the other's part that it is gone.
        """
        if self._n_unusable(self._tiers(frozenset(), condemned) < _NEVER):
            return condemned
        at = self._in_use(frozenset(), condemned)
        names = {self._rows.packs[n] for n in np.unique(self._rows.rows["pack"][at])}
        return frozenset(names & condemned)

    def in_use_of(self, victims: frozenset[PackName]) -> list[tuple[PackName, np.void]]:
        """Return the rows in use of some packs, in the order they stand there."""
        at = self._in_use(frozenset(), frozenset())
        return self._in_order(at[self._is_in(victims)[at]])

    def relied_on(
        self, dead: frozenset[PackName], condemned: frozenset[PackName]
    ) -> tuple[list[tuple[PackName, np.void]], frozenset[PackName]]:
        """Return the rows in use of chunks that dead packs have too, and those of them that do.

        In use as `needed_from` has it, which said which of the condemned packs are dead.
        """
        at, is_in = self._in_use(frozenset(), condemned), self._is_in(dead)
        is_copied, is_needed = (np.zeros(self._n_chunks, np.bool_) for _ in range(2))
        is_copied[self._chunk[is_in]] = True
        is_needed[self._chunk[at]] = True
        elsewhere = at[is_copied[self._chunk[at]] & ~is_in[at]]
        holders = np.unique(self._rows.rows["pack"][is_in & is_needed[self._chunk]])
        return self._in_order(elsewhere), frozenset(self._rows.packs[n] for n in holders)

    def _is_in(self, packs: frozenset[PackName]) -> npt.NDArray[np.bool_]:
        """Return of each row whether it stands in one of these packs."""
        chosen = np.array([name in packs for name in self._rows.packs], np.bool_)
        of_rows: npt.NDArray[np.bool_] = chosen[self._rows.rows["pack"]]
        return of_rows

    def _in_order(self, at: Ints) -> list[tuple[PackName, np.void]]:
        """Return rows with their packs, by pack and in the order they stand there."""
        rows = self._rows.rows[at]
        rows = rows[np.lexsort((rows["offset"], rows["pack"]))]
        return [(self._rows.packs[int(row["pack"])], row) for row in rows]


def _stored_sizes(rows: npt.NDArray[np.void]) -> npt.NDArray[np.float64]:
    """Bytes each record takes in its pack, its footer row included."""
    return rows["stored_size"].astype(np.float64) + RECORD_HEADER.size + ROW.itemsize


def _commits(store: Store) -> tuple[list[Commit], int]:
    """Return all commits that are not forgotten, and how many slots were ever decided: that never shrinks."""
    commits, n_slots = [], 0
    for run in store.refs.runs():
        n_slots += len(store.refs.listing(run).slots)
        commits += store.refs.commits(run)
    return commits, n_slots


def _state(store: Store) -> tuple[set[Slot], list[str], list[str]]:
    """Return what changes if others make rows come or go: steps, packs, index files."""
    steps = {commit.slot for commit in _commits(store)[0]}
    return steps, store.backend.names("packs/"), store.backend.names("index/")


def _live_ids(store: Store, commits: list[Commit]) -> U8:
    """Return the ids of all chunks and lists that commits need."""
    nodes: set[tuple[int, bytes, int]] = set()
    for commit in commits:
        try:
            manifest = store.read_manifest(commit)
        except CorruptError:
            if store.refs.is_gone(commit.slot):
                continue
            raise
        nodes |= {(row.level, row.root, row.size) for row in manifest.tensors if row.size}
    found = {root for _, root, _ in nodes}
    for level in range(max((n[0] for n in nodes), default=0), 0, -1):
        lists = sorted(n for n in nodes if n[0] == level)
        rows = store.find(as_ids(n[1] for n in lists))
        for (_, chunk_id, size), row in zip(lists, rows, strict=True):
            data = np.empty(int(row["raw_size"]), np.uint8)
            store.read_into(chunk_id, row, data)
            for entry in list_from_bytes(data, level, size, f"list {chunk_id.hex()[:16]}"):
                child = entry["id"].tobytes()
                found.add(child)
                if level > 1:
                    nodes.add((level - 1, child, int(entry["size"])))
    return as_ids(found)
