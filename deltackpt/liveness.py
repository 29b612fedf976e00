"""Liveness: which chunks committed steps need, and which copy of each is in use.

Owns   the mark: from commits over manifests and lists to chunks, and from chunks to packs.
Never  changes anything; what follows from it is gc's to decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deltackpt.errors import CorruptError
from deltackpt.format import CHUNK_ID_SIZE, PACK_HEADER, PACK_TRAILER, RECORD_HEADER, ROW
from deltackpt.index import Segment
from deltackpt.manifest import list_from_bytes
from deltackpt.pack import PackName
from deltackpt.records import Commit, Slot
from deltackpt.run import read_manifest
from deltackpt.store import Store

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
        steps = _steps(store)
        try:
            seen = Liveness(store)
            seen.check_whole()
        except CorruptError:
            if _steps(store) == steps:
                raise
            # A step was saved while this looked, or forgotten and deleted by another gc: look again.
        else:
            return seen


class Liveness:
    """What is in a store at one moment, and which copy of each live chunk is in use.

    Listed in an order that can only err towards keeping: gc records, packs, sessions, refs, index.  A pack
    seen here whose session is not seen open has ended, so its decision is seen too.
    """

    def __init__(self, store: Store) -> None:
        self.n_cycles, self._condemned = store.gc_state()
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
        self._chunk = live.find(self._rows.rows["id"], self._rows.keys, np.ones(1, np.bool_))
        self._n_live = len(live.rows)
        self._store = store

    def _tiers(self, avoid: frozenset[PackName], last: frozenset[PackName]) -> npt.NDArray[np.int64]:
        """Rank the packs as places of copies: 0 rely on, 1 to 3 only if there is no better, 9 never."""

        def tier(name: PackName) -> int:
            if name not in self.packs or name in self._condemned - last:
                return 9
            if name in self._unlisted:  # perhaps not durable: a power loss could take it, not the other
                return 3
            if name in last:
                return 2
            return 1 if name in avoid else 0

        return np.array([tier(name) for name in self._rows.packs], np.int64)

    def _in_use(self, avoid: frozenset[PackName], last: frozenset[PackName]) -> npt.NDArray[np.int64]:
        """Return the rows in use: of each live chunk the copy of lowest tier, then least depth, then in the
        pack that is used most, so that two packs with the same content do not keep each other alive."""
        rows, chunk = self._rows.rows, self._chunk
        tiers = self._tiers(avoid, last)
        at = np.flatnonzero((chunk >= 0) & (tiers[rows["pack"]] < 9)) if len(rows) else np.zeros(0, np.int64)
        pack_of = rows["pack"][at]
        used = np.bincount(pack_of, _stored_sizes(rows[at]), len(self._sizes)) / np.maximum(self._sizes, 1)
        by_name = np.argsort(np.argsort([name.key for name in self._rows.packs])) if len(tiers) else tiers
        order = np.lexsort((by_name[pack_of], -used[pack_of], rows["depth"][at], tiers[pack_of], chunk[at]))
        at = at[order]
        first = np.ones(len(at), np.bool_)
        first[1:] = chunk[at[1:]] != chunk[at[:-1]]
        return at[first]

    def check_whole(self) -> None:
        """Refuse to go on when a live chunk has no copy at all: deleting would make it worse."""
        there = np.array([name in self.packs for name in self._rows.packs], np.bool_)
        rows = self._rows.rows
        have = np.unique(self._chunk[there[rows["pack"]]]) if len(rows) else np.zeros(0, np.int64)
        n_missing = self._n_live - int((have >= 0).sum())
        if n_missing:
            raise CorruptError(
                f"{self._store.url}: {n_missing} chunks that steps need are in no pack; nothing deleted",
                hint="run deltackpt verify, and forget the damaged steps",
            )

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

    def needed_from(self, condemned: frozenset[PackName]) -> frozenset[PackName]:
        """Return those of the condemned packs that hold a live chunk's only copy."""
        at = self._in_use(frozenset(), condemned)
        names = {self._rows.packs[n] for n in np.unique(self._rows.rows["pack"][at])}
        return frozenset(names & condemned)

    def in_use_of(self, victims: frozenset[PackName]) -> list[tuple[PackName, np.void]]:
        """Return the rows in use of some packs, in the order they stand there."""
        at = self._in_use(frozenset(), frozenset())
        rows = self._rows.rows[at]
        wanted = np.array([name in victims for name in self._rows.packs], np.bool_)
        rows = rows[wanted[rows["pack"]]]
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


def _steps(store: Store) -> set[Slot]:
    return {commit.slot for commit in _commits(store)[0]}


def _live_ids(store: Store, commits: list[Commit]) -> Segment:
    """Return the ids of all chunks and lists that commits need, as the rows of a segment."""
    nodes: set[tuple[int, bytes, int]] = set()
    for commit in commits:
        try:
            manifest = read_manifest(store, commit)
        except CorruptError:
            if store.refs.is_gone(commit.slot):
                continue
            raise
        nodes |= {(row.level, row.root, row.size) for row in manifest.tensors if row.size}
    found = {root for _, root, _ in nodes}
    for level in range(max((n[0] for n in nodes), default=0), 0, -1):
        lists = sorted(n for n in nodes if n[0] == level)
        ids = np.frombuffer(b"".join(n[1] for n in lists), np.uint8).reshape(-1, CHUNK_ID_SIZE)
        rows = store.find(ids)
        for (_, chunk_id, size), row in zip(lists, rows, strict=True):
            data = np.empty(int(row["raw_size"]), np.uint8)
            store.read_into(chunk_id, row, data)
            for entry in list_from_bytes(data, level, size, f"list {chunk_id.hex()[:16]}"):
                child = entry["id"].tobytes()
                found.add(child)
                if level > 1:
                    nodes.add((level - 1, child, int(entry["size"])))
    table = np.zeros(len(found), ROW)
    if found:
        table["id"] = np.frombuffer(b"".join(found), np.uint8).reshape(-1, CHUNK_ID_SIZE)
    return Segment.build([(PackName(bytes(16), 0, 0), 0, table)])
