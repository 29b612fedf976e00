"""A survey: what is left of a damaged store, and what another one has of it.

Owns   which records of a damaged pack are good, which chunks are lost, and what is to be had where.
Never  changes anything, or decides what is to be done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from blake3 import blake3

from deltackpt import codecs, pack
from deltackpt.backends import Backend
from deltackpt.chains import Chains, Copy, as_ids
from deltackpt.errors import CorruptError, FormatError, NotFoundError, UnsupportedVersionError
from deltackpt.format import PACK_HEADER, RECORD_HEADER, ROW
from deltackpt.index import Index, Rows, Segment
from deltackpt.manifest import Manifest, list_from_bytes
from deltackpt.pack import PackName, Record
from deltackpt.records import (
    GC_RUN,
    Commit,
    Fence,
    GcRecord,
    Quarantine,
    Slot,
    decision_from_bytes,
    parse_gc_key,
    sid_of,
)
from deltackpt.refs import Listing
from deltackpt.store import Store
from deltackpt.types import U8
from deltackpt.verify import Damage, verify

#: What is read at a time of a file that the device cannot read whole: a page, of which a disk loses all.
_BLOCK_SIZE = 4096
#: A run of which nothing is left.
_NOTHING = Listing([], frozenset(), frozenset(), [])


class Salvage(NamedTuple):
    """What is left of a damaged pack.

    Parameters
    ----------
    name : PackName
    rows : ndarray of ROW
        The records that are as they were written, in order; `pack` says nothing.
    bad : frozenset of bytes
        The chunks of the others, as far as anything tells.
    """

    name: PackName
    rows: Rows
    bad: frozenset[bytes]


@dataclass(slots=True)
class Survey:
    """What is wrong with a store, and what is left.

    Parameters
    ----------
    damage : list of Damage
    quarantine : Quarantine
    cycles : dict
        Each gc record that is there by kind and cycle; None: it cannot be read.
    packs : set of PackName
    listings : dict of str to Listing
        Each run's decisions.
    committed : set of Slot
        The commits among them that can be read and are not forgotten.
    decisions : dict of Slot to Commit or Fence
        Decisions that are damaged or missing here and are to be had; fences for what is forgotten there.
    manifests : dict of str to bytes
        Manifests that are damaged or missing here and are to be had.
    salvages : list of Salvage
    lost : set of bytes
        Chunks and lists that steps need and cannot be decoded, whatever is salvaged.
    bad : set of bytes
        Chunks of bad records, needed or not, that are nowhere else.
    doomed : set of bytes
        Those whose only good copies are in packs that a gc is about to delete.
    bases : set of bytes
        What lost deltas can be decoded with, and is good here, though only in packs set aside or in too many
        deltas.
    offered : set of bytes
        Those that are lost and that the other store has; or, where it has not, what they are deltas of.
    whole : set of bytes
        Chunks in quarantine that can be decoded.
    bad_index : list of str
        Index files that cannot be read.
    stale_index : list of str
        Index files that name packs which are lost or set aside.
    unlisted : list of PackName
        Packs in use that no index file names.
    """

    damage: list[Damage]
    quarantine: Quarantine
    cycles: dict[tuple[str, int], GcRecord | None] = field(default_factory=dict)
    packs: set[PackName] = field(default_factory=set)
    listings: dict[str, Listing] = field(default_factory=dict)
    committed: set[Slot] = field(default_factory=set)
    decisions: dict[Slot, Commit | Fence] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    salvages: list[Salvage] = field(default_factory=list)
    lost: set[bytes] = field(default_factory=set)
    bad: set[bytes] = field(default_factory=set)
    doomed: set[bytes] = field(default_factory=set)
    bases: set[bytes] = field(default_factory=set)
    offered: set[bytes] = field(default_factory=set)
    whole: set[bytes] = field(default_factory=set)
    bad_index: list[str] = field(default_factory=list)
    stale_index: list[str] = field(default_factory=list)
    unlisted: list[PackName] = field(default_factory=list)


def look(store: Store, other: Store | None = None) -> Survey:
    """Read all of a store, and of another one what this one lacks.

    Raises
    ------
    StorageError
        If either cannot be read.
    """
    # A store of its own, as verify takes one: what was read before proves nothing.
    return _Surveyor(Store(store.backend), other).look()


class _Surveyor:
    """One call of `look`."""

    def __init__(self, store: Store, other: Store | None) -> None:
        self._store = store
        self._backend = store.backend
        self._other = other
        self._found = Survey([], store.quarantine())

    def look(self) -> Survey:
        found = self._found
        found.damage = verify(self._store, level="decode").damage
        self._cycles()
        self._refs()
        self._manifests()
        index = self._store.refresh(complete=True)  # before the packs: what it names is older
        entries = self._backend.list("packs/")
        found.packs = {name for entry in entries if (name := PackName.from_key(entry.name))}
        for key in sorted({d.key for d in found.damage if d.kind == "pack"}):
            name = PackName.from_key(key)
            salvage = self._salvage(name, index) if name in found.packs and name is not None else None
            if salvage is not None:
                found.salvages.append(salvage)
        self._index_files()
        self._chunks(index)
        if found.lost and (again := self._again(index)):
            found.salvages += again
            self._chunks(index)
        return found

    # -- small records

    def _cycles(self) -> None:
        for key in self._backend.names("gc/"):
            parsed = parse_gc_key(key)
            if parsed is not None:
                try:
                    self._found.cycles[parsed] = self._store.gc_record(key)
                except CorruptError:
                    self._found.cycles[parsed] = None

    def _refs(self) -> None:
        """List the decisions; look for those that are missing or cannot be read in another copy."""
        for run in (*self._store.refs.runs(), GC_RUN):
            self._found.listings[run] = self._store.refs.listing(run)
        self._found.committed = {commit.slot for commit in self._commits()}
        if self._other is None or self._other.uuid != self._store.uuid:
            return
        damaged = {d.key for d in self._found.damage if d.kind == "commit"}
        slots = {Slot.from_key(key) for key in damaged} - {None}
        if "refs/" in damaged:  # some are missing, and nothing here says which
            slots |= self._missing(self._other)
        gone: set[Slot] = set()
        for slot in tuple(slots):
            assert slot is not None
            # All of the step: an attempt that the other has replaced must not come back alone.
            theirs = self._other.refs.listing(slot.run)
            here = self._found.listings.setdefault(slot.run, _NOTHING)
            slots |= {s for s in theirs.slots if s.step == slot.step and s not in here.slots}
            gone |= theirs.gone
        for slot in slots:
            assert slot is not None
            if slot in gone:
                if slot not in self._found.listings[slot.run].slots:
                    self._found.decisions[slot] = Fence(slot, bytes(16))
                continue
            try:
                decision = decision_from_bytes(self._other.backend.read(slot.key), slot)
            except (FormatError, NotFoundError):
                continue
            if isinstance(decision, Commit):
                self._found.decisions[slot] = decision

    def _missing(self, other: Store) -> set[Slot | None]:
        """Return the slots that another copy has and this one has not; decisions are never removed."""
        slots: set[Slot | None] = set()
        for run in other.refs.runs():
            listing, theirs = self._found.listings.setdefault(run, _NOTHING), other.refs.listing(run)
            slots |= set(theirs.slots) - theirs.gone - set(listing.slots)
        return slots

    def _manifests(self) -> None:
        """Look for damaged manifests by their digests: a fork has the same one, another copy too."""
        wanted = {}
        for commit in self._commits():
            if any(d.key == commit.manifest_key for d in self._found.damage):
                wanted[commit.manifest] = commit.manifest_key
        stores = [self._store] if self._other is None else [self._store, self._other]
        for backend in (store.backend for store in stores if wanted):
            for key in backend.names("manifests/"):
                if sid_of(key) is not None:
                    try:
                        data = backend.read(key)
                    except (CorruptError, NotFoundError):
                        continue
                    digest = blake3(data).digest()
                    if digest in wanted:
                        self._found.manifests[wanted[digest]] = data

    def _commits(self) -> Iterator[Commit]:
        """Yield the commits of visible steps, those to be had elsewhere too."""
        for run, listing in self._found.listings.items():
            missing = {slot for slot in self._found.decisions if slot.run == run} - listing.tombstones
            for slot in sorted(missing.union(listing.slots) - listing.gone):
                decision = self._found.decisions.get(slot)
                try:
                    decision = decision or self._store.refs.decision(slot)
                except FormatError:
                    continue
                if isinstance(decision, Commit):
                    yield decision

    # -- packs

    def _salvage(self, name: PackName, index: Index) -> Salvage | None:
        """Return what is left of a pack; None if all of it is right: then only a base elsewhere is not."""
        try:
            data = readable(self._backend, name.key)
        except NotFoundError:
            return None
        try:
            pack.read_header(data[: PACK_HEADER.size], name.key, store=self._store.uuid, name=name)
            told = pack.read_footer(lambda offset, size: data[offset : offset + size], len(data), name.key)
            is_framed = True
        except UnsupportedVersionError:
            return None
        except CorruptError:
            told, is_framed = index.rows_of(name), False
        good = self._good(name, data)
        if is_framed and np.array_equal(good["offset"], told["offset"]):
            return None
        ids = {chunk_id.tobytes() for chunk_id in told["id"]}
        return Salvage(name, good, frozenset(ids - {chunk_id.tobytes() for chunk_id in good["id"]}))

    def _again(self, index: Index) -> list[Salvage]:
        """Return what packs that were set aside before have of what is lost now, and of its bases."""
        found, after = self._found, self._after(index)
        names = sorted(found.quarantine.packs & found.packs)
        goods = [self._good(name, readable(self._backend, name.key)) for name in names]
        after.add(Segment.build((name, 0, good) for name, good in zip(names, goods, strict=True)))
        lost = sorted(found.lost)
        # Or a delta whose base is nowhere would be copied by every repair.
        wanted = {i for i, copy in zip(lost, self._look_up(after, lost), strict=True) if copy is not None}
        wanted |= self._bases(after, wanted)
        goods = [good[[i.tobytes() in wanted for i in good["id"]]] for good in goods]
        return [Salvage(n, good, frozenset()) for n, good in zip(names, goods, strict=True) if len(good)]

    def _good(self, name: PackName, data: bytes) -> Rows:
        """Return a row of each record in a pack that is right."""
        rows = [
            _row(offset, record)
            for offset, record in pack.salvage(data, name.key)
            if self._is_right(record, np.frombuffer(data, np.uint8)[offset + RECORD_HEADER.size :], name.key)
        ]
        return np.concatenate([np.zeros(0, ROW), *rows])

    def _is_right(self, record: Record, rest: U8, where: str) -> bool:
        """Return whether a record gives its chunk; of a delta whose base is not to be had nobody can tell."""
        base = self._base(record) if record.depth else None
        if record.depth and base is None:
            return True
        out = np.empty(record.raw_size, np.uint8)
        try:
            codecs.decode(record.codec, rest[: record.stored_size], record.itemsize, out, where, base)
        except UnsupportedVersionError:
            return True
        except CorruptError:
            return False
        return blake3(out).digest() == record.id

    def _base(self, record: Record) -> U8 | None:
        try:
            [row] = self._store.find(as_ids([record.base]))
            if row["depth"] >= record.depth:
                return None
            return _read(self._store, record.base, row)
        except CorruptError:
            return None

    # -- index

    def _index_files(self) -> None:
        found = self._found
        segments: dict[str, Segment] = {}
        for key in self._backend.names("index/"):
            if sid_of(key) is None:
                continue
            try:
                segments[key] = self._store.read_segment(key)
            except NotFoundError:
                continue
            except UnsupportedVersionError:
                continue
            except CorruptError:
                found.bad_index.append(key)
        # Listed after the index files were read: a pack is there before an index names it.
        there = {PackName.from_key(key) for key in self._backend.names("packs/")} - found.quarantine.packs
        there -= {salvage.name for salvage in found.salvages}
        swept = {name for (kind, _), r in found.cycles.items() if kind == "sweep" and r for name in r.packs}
        for key, segment in segments.items():
            if not {*segment.packs} - swept <= there:
                found.stale_index.append(key)

    # -- chunks

    def _chunks(self, index: Index) -> None:
        """Find out which chunks that steps need would be lost once all is salvaged."""
        found = self._found
        after, gone = self._after(index), self._gone(index)
        swept = {name for (kind, _), r in found.cycles.items() if kind == "sweep" and r for name in r.packs}
        needed = sorted(self._needed())
        copies = self._look_up(after, needed)
        found.lost = {i for i, copy in zip(needed, copies, strict=True) if copy is None}
        kept = self._look_up(after, needed, without=swept)
        doomed = {i for i, copy in zip(needed, kept, strict=True) if copy is None} - found.lost
        found.doomed = {i for i in doomed if self._is_here(i)}
        bad = sorted({i for salvage in found.salvages for i in salvage.bad})
        found.bad = {i for i, copy in zip(bad, self._look_up(after, bad), strict=True) if copy is None}
        unlisted = index.unlisted - gone
        if unlisted:
            listed = self._look_up(after, needed, without=unlisted)
            used = {n for a, b in zip(copies, listed, strict=True) if a and not b for n in a.packs}
            found.unlisted = sorted(unlisted & used)
        found.offered = {i for i in found.lost if self._is_offered(i)}
        bases = self._bases(
            after, found.lost - found.offered, lambda i: self._is_here(i) or self._is_offered(i)
        )
        found.bases = {i for i in bases if self._is_here(i)}
        found.offered |= {i for i in bases - found.bases if self._is_offered(i)}
        quarantined = sorted(found.quarantine.ids)
        copies = self._look_up(after, quarantined)
        found.whole = {i for i, copy in zip(quarantined, copies, strict=True) if copy is not None}

    def _gone(self, index: Index) -> set[PackName]:
        """Return the packs that are not there, or not as they are, once all is salvaged."""
        found = self._found
        salvaged = {salvage.name for salvage in found.salvages}
        return salvaged | found.quarantine.packs | set(index.packs) - found.packs

    def _after(self, index: Index) -> Index:
        """Return what is where once all is salvaged."""
        after = Index()
        after.add(Segment.merge(index.segments, without=self._gone(index)))
        after.add(Segment.build((salvage.name, 0, salvage.rows) for salvage in self._found.salvages))
        return after

    def _is_here(self, chunk_id: bytes) -> bool:
        return read(self._store, chunk_id) is not None

    def _is_offered(self, chunk_id: bytes) -> bool:
        return self._other is not None and read(self._other, chunk_id) is not None

    def _bases(
        self, index: Index, chunk_ids: set[bytes], is_enough: Callable[[bytes], bool] = lambda _: False
    ) -> set[bytes]:
        """Return what chunks are deltas of, directly or not, each walk as far as the first that is enough."""
        found: set[bytes] = set()
        todo = chunk_ids
        while todo:
            rows = [row for chunk_id in todo for row in index.copies(chunk_id) if row["depth"]]
            todo = {row["base"].tobytes() for row in rows} - found - chunk_ids
            found |= todo
            todo = {i for i in todo if not is_enough(i)}
        return found

    def _look_up(
        self, index: Index, ids: list[bytes], without: frozenset[PackName] | set[PackName] = frozenset()
    ) -> list[Copy | None]:
        def copies(chunk_id: bytes) -> list[np.void]:
            return [row for row in index.copies(chunk_id) if index.packs[int(row["pack"])] not in without]

        chains = Chains(index.packs, lambda some: index.find(some, without), copies, self._store.depth_max)
        return chains.look_up(as_ids(ids))

    def _needed(self) -> set[bytes]:
        """Return the ids of all chunks and lists that steps need, as far as lists are to be had."""
        nodes: set[tuple[int, bytes, int]] = set()
        for commit in self._commits():
            try:
                data = self._found.manifests.get(commit.manifest_key)
                data = self._store.read_manifest_bytes(commit) if data is None else data
                manifest = Manifest.from_bytes(data, commit.manifest_key)
            except FormatError:
                continue
            nodes |= {(row.level, row.root, row.size) for row in manifest.tensors if row.size}
        ids = {chunk_id for _, chunk_id, _ in nodes}
        for level in range(max((node[0] for node in nodes), default=0), 0, -1):
            for _, chunk_id, size in [node for node in nodes if node[0] == level]:
                for entry in self._list(chunk_id, level, size):
                    child = entry["id"].tobytes()
                    ids.add(child)
                    nodes.add((level - 1, child, int(entry["size"])))
        return ids

    def _list(self, chunk_id: bytes, level: int, size: int) -> Iterable[np.void]:
        for store in (self._store, self._other):
            data = None if store is None else read(store, chunk_id)
            if data is not None:
                entries: Iterable[np.void] = list_from_bytes(data, level, size, f"list {chunk_id.hex()[:16]}")
                return entries
        return ()


def readable(backend: Backend, key: str) -> bytes:
    """Return a file's bytes, with zeros for blocks that the device cannot read."""
    try:
        return backend.read(key)
    except CorruptError:
        data = bytearray(backend.size(key))
    for at in range(0, len(data), _BLOCK_SIZE):
        with suppress(CorruptError):
            backend.read_into(key, at, [memoryview(data)[at : at + _BLOCK_SIZE]])
    return bytes(data)


def read(store: Store, chunk_id: bytes) -> U8 | None:
    """Return a chunk; None if a store has no good copy of it."""
    try:
        [row] = store.find(as_ids([chunk_id]))
        return _read(store, chunk_id, row)
    except FormatError:
        return None


def _read(store: Store, chunk_id: bytes, row: np.void) -> U8:
    data = np.empty(int(row["raw_size"]), np.uint8)
    store.read_into(chunk_id, row, data)
    return data


def _row(offset: int, record: Record) -> Rows:
    row = np.zeros(1, ROW)
    row["id"], row["base"] = as_ids([record.id]), as_ids([record.base])
    row["offset"], row["raw_size"], row["stored_size"] = offset, record.raw_size, record.stored_size
    row["codec"], row["depth"], row["itemsize"] = record.codec, record.depth, record.itemsize
    return row
