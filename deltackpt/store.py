"""A store: where the format meets I/O for reading.

Owns   opening and creating, the descriptor, the index over all packs, what gc condemned, reading chunks.
Never  writes but once, at its creation (see session.py), or knows what a tensor is.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
from blake3 import blake3

from deltackpt import chains, pack
from deltackpt.backends import Backend
from deltackpt.backends.local import LocalBackend, is_file
from deltackpt.chains import Bases
from deltackpt.chunking import Chunker
from deltackpt.errors import (
    CorruptError,
    DeltackptError,
    InvalidInputError,
    NotFoundError,
    StorageError,
    UnsupportedVersionError,
)
from deltackpt.format import VERSION, check_features, seal, unseal
from deltackpt.index import Index, Rows, Segment, StoredSegment, to_merge
from deltackpt.links import Reader, Row, Wanted
from deltackpt.manifest import Manifest
from deltackpt.pack import PackName
from deltackpt.rates import Rates
from deltackpt.records import (
    Commit,
    GcRecord,
    Quarantine,
    SessionName,
    aside_key,
    parse_gc_key,
    sid_of,
)
from deltackpt.refs import Refs
from deltackpt.types import U8

log = logging.getLogger("deltackpt")
R = TypeVar("R")

DESCRIPTOR = "deltackpt.json"
DIRS = ("packs", "index", "manifests", "sessions", "refs", "gc", "quarantine", "tmp")
#: Made once all else is durable, so whoever finds it need not flush that.  Nothing in it lasts.
LAST_DIR = "sessions"
_FIRST_DIRS = tuple(name for name in DIRS if name != LAST_DIR)
#: No chain is deeper; on file so that every writer of a store keeps to the same bound.
DEPTH_MAX = 8
#: What a record's one byte of depth can say.
_DEPTH_END = 255

#: Smaller index files are read whole; there are few, see `index.to_merge`.
_STORED_SIZE_MIN = 1 << 20

#: What every call takes as a store: its directory, a backend, or a store already open.
Where: TypeAlias = "str | os.PathLike[str] | Backend | Store"


class Store:
    """An open store.  Safe to share between threads.

    Use `open_store`; `Store(backend)` is for a store known to be there.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        descriptor = self.read_descriptor()
        self.descriptor_bytes, body = descriptor
        self.uuid = uuid.UUID(body["uuid"]).bytes
        self.chunker = Chunker.from_json(body.get("chunker"))
        self.depth_max: int = body["depth_max"]
        self.refs = Refs(backend)
        self.rates = Rates()
        self._links = Reader(backend, self.pack_name, self.depth_max)
        self._index = Index()
        self._loaded: dict[str, int | None] = {}  # rows of each index file; None: damaged
        self._gc_records: dict[str, GcRecord] = {}
        self._is_prepared = False
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        """Where it is, for messages."""
        return self.backend.url

    def read_descriptor(self) -> tuple[bytes, dict[str, Any]]:
        """Return the descriptor's bytes and content, checked."""
        try:
            data = self.backend.read(DESCRIPTOR)
        except NotFoundError as e:
            raise NotFoundError(
                f"{self.backend.url}: no deltackpt store here", hint="check the path, or save into it first"
            ) from e
        where = f"{self.backend.url}/{DESCRIPTOR}"
        body = unseal(data, where)
        if body.get("format") != "deltackpt" or not isinstance(body.get("version"), int):
            raise CorruptError(f"{where}: format {body.get('format')!r} version {body.get('version')!r}")
        if body["version"] > VERSION:
            raise UnsupportedVersionError(
                f"{where}: format version {body['version']}, this build reads up to {VERSION}",
                hint="upgrade deltackpt",
            )
        check_features(body.get("features"), where)
        try:
            uuid.UUID(body["uuid"])
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise CorruptError(f"{where}: uuid is {body.get('uuid')!r}") from e
        depth_max = body.get("depth_max")
        if type(depth_max) is not int or not 0 <= depth_max <= _DEPTH_END:
            raise CorruptError(f"{where}: depth_max is {depth_max!r}, expected 0 to {_DEPTH_END}")
        return data, body

    def prepare_to_write(self) -> None:
        """See to the directories, once; who writes calls this first, whatever the store was opened for."""
        with self._lock:
            if self._is_prepared:
                return
            there = set(self.backend.list_dirs(""))
            if LAST_DIR not in there:
                # Whoever made the store may have died before all of it was durable.
                self.backend.make_dirs(_FIRST_DIRS)
                self.backend.barrier()
                there.update(_FIRST_DIRS)
            self.backend.rely_on(there.intersection(DIRS))
            # A copy made by a tool that drops empty directories lacks some.
            self.backend.make_dirs(sorted(set(DIRS) - there))
            self._is_prepared = True

    def freeing(self, do: Callable[[StorageError | None], R], share: float = 1.0) -> R:
        """Do what leads to space being freed; if the disk is full, again, with the reserve to write into.

        Parameters
        ----------
        do : callable
            Takes up what was begun, if it is called again; then it is given the error that said so.
        share : float
            Of the reserve.
        """
        try:
            return do(None)
        except StorageError as e:
            if not e.is_full or not self.backend.spend_reserve(share):
                raise
            full = e
            log.info("%s; going on with what was kept back for this", e.message)
        try:
            return do(full)
        finally:
            self.backend.keep_reserve()

    # -- what is where

    def refresh(self, *, complete: bool = False) -> Index:
        """Load what index files were added; return the index.

        Parameters
        ----------
        complete : bool
            Read the footers of packs that no index file covers too.  An index is derived data: a power
            loss may take it, or damage, and then the packs themselves tell what they hold.
        """
        with self._lock:
            names = {name for name in self.backend.names("index/") if sid_of(name)}
            if not self._loaded.keys() <= names:  # merged meanwhile
                self._index, self._loaded = Index(self._index), {}
            for name in sorted(names - self._loaded.keys()):
                try:
                    segment = self._open_segment(name)
                except NotFoundError:  # merged since the listing
                    return self.refresh(complete=complete)
                except CorruptError as e:
                    log.warning("%s; its packs are read instead; deltackpt gc replaces it", e.message)
                    self._loaded[name] = None
                else:
                    self._index.add(segment)
                    self._loaded[name] = len(segment.keys)
            if complete:
                self._index.check()
                self._cover()
            return self._index

    def read_segment(self, name: str) -> Segment:
        """Return an index file's content, every row of it checked."""
        return Segment.from_bytes(self.backend.read(name), self.uuid, self._where(name))

    def _open_segment(self, name: str) -> Segment | StoredSegment:
        """Return an index file's content; if it is large, its rows stay in it."""
        size = self.backend.size(name)
        if size < _STORED_SIZE_MIN:
            return self.read_segment(name)
        fill = partial(self.backend.read_into, name)
        return StoredSegment.open(fill, size, self.uuid, self._where(name))

    def _where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _cover(self) -> None:
        """Take in the footers of packs that no index file covers."""
        for entry in self.backend.list("packs/"):
            name = PackName.from_key(entry.name)
            if name is None or name in self._index:
                continue
            where = f"{self.url}/{entry.name}"
            try:
                rows = pack.read_footer(self._reader(entry.name), entry.size, where)
            except NotFoundError:  # deleted by gc since the listing
                continue
            except CorruptError as e:
                log.warning("%s; what it holds is not known", e.message)
                continue
            self._index.add_unlisted(Segment.build([(name, entry.size, rows)]))

    def _reader(self, key: str) -> pack.ReadAt:
        return lambda offset, size: self.backend.read(key, offset, size)

    def to_merge(self) -> dict[str, Segment]:
        """Return the index files that a writer merges into the one it is about to write; mostly none."""
        with self._lock:
            names = to_merge({name: n for name, n in self._loaded.items() if n is not None})
        found = {}
        for name in names:
            try:
                found[name] = self.read_segment(name)
            except NotFoundError:  # another writer merges them
                return {}
            except CorruptError:  # since it was read; gc replaces it
                self._loaded[name] = None
        return found

    def learn(self, key: str, segment: Segment, merged: Mapping[str, Segment]) -> None:
        """Take in an index file that this process has just written: its own rows, and what it merged."""
        with self._lock:
            stored = self._index.stored()
            gone = [part for name, part in merged.items() if self._where(name) in stored]
            self._index.add(Segment.merge([segment, *gone]) if gone else segment)
            for name in merged:
                self._loaded.pop(name, None)
            self._loaded[key] = len(segment.rows) + sum(len(part.rows) for part in merged.values())

    def gc_state(self) -> tuple[int, frozenset[PackName]]:
        """Return the number of gc cycles begun, and the packs that no new save may use.

        Those are, cycle by cycle, the packs in its sweep record if it has one, else in its condemn record:
        release is per cycle, so a pack that one cycle spared stays condemned if another condemned it.
        """
        found = {parse_gc_key(name) for name in self.backend.names("gc/")}
        n_cycles = max((key[1] + 1 for key in found if key), default=0)
        condemned: set[PackName] = set()
        for cycle in range(n_cycles):
            kind = "sweep" if ("sweep", cycle) in found else "condemn"
            condemned |= self.gc_record(f"gc/{kind}-{cycle}").packs
        return n_cycles, frozenset(condemned)

    def gc_record(self, key: str) -> GcRecord:
        """Return a gc record; they never change, so each is read once.

        One that cannot be read and is set aside lists nothing: what it may have listed is condemned anew.
        """
        with self._lock:
            if key not in self._gc_records:
                try:
                    record = self._read_gc_record(key)
                except CorruptError:
                    if not self.backend.exists(aside_key(key)):
                        raise
                    kind, cycle = parse_gc_key(key) or ("", 0)
                    record = GcRecord(kind, cycle, frozenset(), 0, 0)
                self._gc_records[key] = record
            return self._gc_records[key]

    def _read_gc_record(self, key: str) -> GcRecord:
        try:
            return GcRecord.from_bytes(self.backend.read(key), key)
        except NotFoundError as e:
            raise CorruptError(f"{self.url}/{key}: is missing", hint="run deltackpt repair") from e

    def quarantine(self) -> Quarantine:
        """Return what nobody is to build on."""
        return Quarantine.of(self.backend.names("quarantine/"))

    def read_manifest(self, commit: Commit) -> Manifest:
        """Read a commit's manifest, checked against the digest in the commit.

        Raises
        ------
        CorruptError
            If it is missing or not the one that was committed.
        """
        return Manifest.from_bytes(self.read_manifest_bytes(commit), f"{self.url}/{commit.manifest_key}")

    def read_manifest_bytes(self, commit: Commit) -> bytes:
        """Read the file of a commit's manifest, as `read_manifest` does."""
        where = f"{self.url}/{commit.manifest_key}"
        try:
            data = self.backend.read(commit.manifest_key)
        except NotFoundError as e:
            raise CorruptError(f"{where}: manifest is missing", hint="run deltackpt verify") from e
        if blake3(data).digest() != commit.manifest:
            raise CorruptError(f"{where}: {len(data)} bytes are not the manifest that was committed")
        return data

    def sessions(self) -> list[SessionName]:
        """Return the writers at work, and the dead whom gc has not ended yet."""
        names = (SessionName.from_key(name) for name in self.backend.names("sessions/"))
        return [name for name in names if name is not None]

    # -- reading chunks

    def find(self, ids: U8) -> Rows:
        """Return where each chunk is, `pack` counting in the index's packs.

        Parameters
        ----------
        ids : ndarray of uint8, shape (n, 32)

        Raises
        ------
        CorruptError
            If a chunk is nowhere in the store.
        """
        with self._lock:
            found, rows = self._index.find(ids)
            for complete in (False, True):
                if found.all():
                    break
                found, rows = self.refresh(complete=complete).find(ids)
        if not found.all():
            missing = ids[int(np.argmin(found))].tobytes().hex()
            raise CorruptError(f"{self.url}: chunk {missing[:16]} is in no pack", hint="run deltackpt verify")
        return rows

    def pack_name(self, number: int) -> PackName:
        """Return the pack that a found row's `pack` counts."""
        return self._index.packs[number]

    def bases(self, rows: Rows) -> Bases:
        """Return where all chunks are that found rows need to be decoded; for `read_into`, many at a time."""
        if not rows["depth"].any():
            return {}
        with self._lock:
            return chains.bases_of(rows, self._index.find, self.depth_max)

    def read_into(
        self, chunk_id: bytes, row: np.void, out: U8, bases: Bases | None = None, base: U8 | None = None
    ) -> None:
        """Fill `out` with a chunk's decoded bytes, checked against its id.

        A copy that is damaged or gone does no harm while there is another one: of the chunk, or of a base.

        Parameters
        ----------
        chunk_id : bytes
        row : void of ROW
            Where it is.
        out : ndarray of uint8
            Of the chunk's size.
        bases : dict, optional
            What `bases` returned for rows of which this is one; else they are looked up, 100 us each.
        base : ndarray of uint8, optional
            The decoded bytes of the base, checked already, where the caller has them.

        Raises
        ------
        CorruptError
            If no copy gives the chunk's bytes; names the chunk and the pack of the copy tried first, and the
            base that is damaged or missing, if it is one.
        """
        try:
            if row["depth"] and bases is None and base is None:
                bases = self.bases(np.array([row]))
            self.read_copies([Wanted(chunk_id, row, out, base)], bases or {})
        except (CorruptError, NotFoundError) as e:
            log.warning("%s; looking for another copy", e.message)
            self._read_other_copy(chunk_id, row, out, e)

    def read_copies(self, wanted: Sequence[Wanted], bases: Bases) -> None:
        """Read many chunks as `read_into` does one, in less time, but from no other copies than these.

        Raises
        ------
        CorruptError, NotFoundError
            If one of them is not as it was written; `read_into` tells which, or finds another copy.
        """
        self._links.read(wanted, bases)

    def _read_other_copy(self, chunk_id: bytes, tried: np.void, out: U8, first: DeltackptError) -> None:
        """Try every copy of a chunk, and of every link of its chain: this time each is checked, and named."""
        error: CorruptError
        for complete in (False, True):
            with self._lock:
                index = self.refresh(complete=True) if complete else self._index
            failed: _Failed = {}
            if not tried["depth"]:  # of a chain it is not known yet which link is bad
                failed[int(tried["pack"]), int(tried["offset"])] = _as_corrupt(first)
            try:
                self._read_checked(index, chunk_id, self.depth_max + 1, failed, out)
            except CorruptError as e:
                error = e
            else:
                return
        raise CorruptError(
            error.message, hint="run deltackpt verify; restore another step or copy"
        ) from first

    def _read_checked(
        self, index: Index, chunk_id: bytes, below: int, failed: _Failed, out: U8 | None = None
    ) -> U8:
        """Return a chunk's bytes from any copy of less depth than `below`.

        Calls itself for a base, so `below` bounds it.  What failed once is not tried again: however many
        copies a damaged store claims, each costs one chain.
        """
        first: CorruptError | None = None
        for row in index.copies(chunk_id):  # of least depth first
            at, depth = (int(row["pack"]), int(row["offset"])), int(row["depth"])
            if depth >= below:
                break
            where = self._links.where(Row.of(row))
            try:
                if at in failed:
                    raise failed[at]
                base = self._read_base(index, row, failed, where) if depth else None
                data = np.empty(int(row["raw_size"]), np.uint8) if out is None else out
                self.read_copies([Wanted(chunk_id, row, data, base)], {})
            except (CorruptError, NotFoundError) as e:
                failed[at] = _as_corrupt(e)
                first = first or failed[at]
            else:
                return data
        if first is None:
            of = "" if below > self.depth_max else f" with a depth below {below}"
            first = CorruptError(f"{self.url}: chunk {chunk_id.hex()[:16]} is in no pack{of}")
        raise first

    def _read_base(self, index: Index, row: np.void, failed: _Failed, where: str) -> U8:
        """Return what a delta needs; where that fails, say what the chunk is that is damaged."""
        try:
            return self._read_checked(index, row["base"].tobytes(), int(row["depth"]), failed)
        except CorruptError as e:
            raise CorruptError(f"{where}: its base: {e.message}") from e


#: What is wrong with the copies tried, by pack and offset.
_Failed: TypeAlias = dict[tuple[int, int], CorruptError]


def _as_corrupt(error: DeltackptError) -> CorruptError:
    """Return what is wrong with a copy; one whose file is not there is as good as damaged."""
    if isinstance(error, CorruptError):
        return error
    return CorruptError(f"{error.message}: its pack is missing")


def open_store(where: Where, *, create: bool = False) -> Store:
    """Open a store.

    Parameters
    ----------
    where : path, Backend or Store
        A store already open is returned as it is.
    create : bool
        Make it if there is none.

    Raises
    ------
    NotFoundError
        If there is none and `create` is false.
    InvalidInputError
        If `create` would make it among other files.

    Examples
    --------
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> len(open_store(MemoryBackend(), create=True).uuid)
    16
    """
    if isinstance(where, Store):
        return where
    backend = where if isinstance(where, Backend) else _directory(where)
    if create and not backend.exists(DESCRIPTOR):
        _create(backend)
    return Store(backend)


def check_path(where: Any) -> str:
    """Return a path given as a store; `InvalidInputError` if it is none."""
    path = os.fspath(where) if isinstance(where, str | os.PathLike) else ""
    if not isinstance(path, str) or not path:
        raise InvalidInputError(
            f"store: found {where!r}, expected a directory, a Backend or a Store",
            hint="give the store's directory",
        )
    return path


def _directory(where: Any) -> LocalBackend:
    path = check_path(where)
    if is_file(path):
        raise InvalidInputError(f"{path}: is a file, expected a directory", hint="give the store's directory")
    return LocalBackend(path)


def _check_only_ours(backend: Backend) -> None:
    """Refuse to make a store among other people's files; one half made by a dead process is ours."""
    names = [entry.name for entry in backend.list("")] + backend.list_dirs("")
    foreign = sorted(set(names) - {DESCRIPTOR, *DIRS})
    if foreign:
        raise InvalidInputError(
            f"{backend.url}: not a deltackpt store, and it holds {foreign[0]!r}",
            hint="choose an empty or a new directory",
        )


def _create(backend: Backend) -> None:
    _check_only_ours(backend)
    backend.make_dirs(_FIRST_DIRS)
    backend.probe()
    backend.barrier()
    body = {
        "format": "deltackpt",
        "version": VERSION,
        "uuid": str(uuid.uuid4()),
        "chunker": Chunker().to_json(),
        "depth_max": DEPTH_MAX,
        "features": [],
    }
    # After the barrier: whoever finds a descriptor may rely on the directories.
    backend.create_once(DESCRIPTOR, seal(body))
    backend.barrier()
    backend.make_dirs([LAST_DIR])
    backend.keep_reserve()
