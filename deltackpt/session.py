"""A session: one writer's attempt to commit one snapshot.

Owns   the order of writes, dedup against the packs a new save may use, filling packs.
Never  knows what a tensor is, or changes anything that is there.

The order is the protocol (format.md, "Commit"); a reader sees the old step or the new, never half:

    W1  read the gc epoch              W4  packs, then index and manifest
    W2  create the session record      W5  create the decision
    W3  then read what gc condemned    then the session record goes
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import xxhash
from blake3 import blake3

from deltackpt import codecs, process
from deltackpt.chains import Chains, Copy, as_ids
from deltackpt.codecs import Base, Chunk, Encoded, Kind
from deltackpt.efforts import Optimize
from deltackpt.errors import (
    AlreadyExistsError,
    ConflictError,
    DeltackptError,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from deltackpt.format import NO_BASE, ROW, seal
from deltackpt.index import Index, Rows, Segment
from deltackpt.pace import Job, Pace
from deltackpt.pack import PackName, Payload, Record
from deltackpt.packer import Packer
from deltackpt.rates import Sort, Took
from deltackpt.records import (
    GC_RUN,
    STEP_MAX,
    Commit,
    Fence,
    Figures,
    Origin,
    SessionName,
    Slot,
    index_key,
    lost_key,
    manifest_key,
)
from deltackpt.refs import lost
from deltackpt.scratch import Scratch
from deltackpt.store import Store
from deltackpt.types import U8
from deltackpt.workers import n_threads, workers

log = logging.getLogger("deltackpt")

#: Bytes of chunks a thread encodes at a time: threads take turns at the interpreter's lock between tasks.
_BATCH_SIZE = 1 << 20
#: Bytes of chunks being encoded or waiting to be written: what a save needs in memory, about.
_WINDOW_SIZE = (2 + 2 * n_threads()) << 20


class Parent(NamedTuple):
    """What a chunk may be stored as a delta against.

    Parameters
    ----------
    id : bytes
        Of a chunk that `Session.look_up` found, or that was put into the same session before.
    depth : int
        As `look_up` said; of a chunk of the same session it says nothing, since what that chunk becomes is
        known only once it is encoded.
    data : ndarray of uint8 or None
        Its decoded bytes, known to be those of the id, and not changed until `publish` returns; None: a
        thread reads them from the store.  Of a chunk of the same session they must be given.
    raw_size : int
    offset, cast : int
        See `codecs.Base`.
    packs : frozenset of PackName
        As `look_up` said; `Session.packs` has them once a delta of this is written.  Of a chunk of the same
        session they are not needed; of another one, `put` asks for them if there are none, 100 us a chunk.
    fingerprint : bytes, optional
        The xxh3_128 of `data`, where that is somebody's state: see `Session.put`.
    """

    id: bytes
    depth: int
    data: U8 | None
    raw_size: int
    offset: int = 0
    cast: int = 0
    packs: frozenset[PackName] = frozenset()
    fingerprint: bytes | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What another session of the same slot has published and leaves to be decided: a rank's part of a step.

    Parameters
    ----------
    name : SessionName
        Its record, which goes with the decision.
    packs : list of (PackName, int)
        What it wrote, with sizes.
    """

    name: SessionName
    packs: list[tuple[PackName, int]]


class Session:
    """A writer at work on one slot; a context manager that aborts unless committed or handed over.

    Parameters
    ----------
    store : Store
    run, step : str, int
        Checked by the caller.
    overwrite : bool
        Whether a step that is there may be superseded.
    optimize : {"bytes", "time", "energy"}
        See `efforts.choose`.

    Raises
    ------
    AlreadyExistsError
        If the step is there and `overwrite` is false.
    InvalidInputError
        If it is there and pinned.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        step: int,
        *,
        overwrite: bool = False,
        optimize: Optimize = "bytes",
    ) -> None:
        slot, self.superseded = store.refs.slot(run, step)
        if self.superseded is not None and not overwrite:
            raise AlreadyExistsError(
                f"run {run!r} has step {step} already", hint="save another step, or say overwrite"
            )
        if self.superseded is not None:
            store.refs.check_unpinned(run, step)
        self._start(store, slot, optimize)

    @classmethod
    def for_gc(cls, store: Store) -> Session:
        """Open gc's own session, or repair's: it copies and merges, and commits no step.

        In a slot of its own: one that two share, or that was fenced in an earlier gc, ends both.
        """
        session = cls.__new__(cls)
        session.superseded = None
        session._start(store, Slot(GC_RUN, secrets.randbelow(STEP_MAX), 1), "bytes")
        return session

    def _start(self, store: Store, slot: Slot, optimize: Optimize) -> None:
        self.store = store
        self.slot = slot
        self.sid = secrets.token_bytes(16)
        self.deciding = False
        self.new_size = 0
        self.n_new_chunks = 0
        self.written_size = 0
        self._backend = store.backend
        self._index: Index | None = None
        self._lost: set[PackName] = set()
        #: Depth of each chunk put, at most; exactly, once its record is in a pack.
        self._new: dict[bytes, int] = {}
        #: Chunks of which there are deltas, and none that can be relied on.
        self._dead: set[bytes] = set()
        self._has_condemned = False  # packs that are there still
        self._batch: list[_Put] = []
        self._batch_size = 0
        self._encoding: deque[_Encoding] = deque()
        self._encoding_size = 0
        self._buffers: defaultdict[int, list[U8]] = defaultdict(list)  # free ones, by bits of their size
        self.pace = Pace(optimize, store.rates)
        self._packer = Packer(self._backend, store.uuid, self.sid, store.rates)
        self._present: dict[PackName, bool] = {}
        self._needed: set[PackName] = set()  # by the chains of what is written here
        self._parts: Sequence[Part] = ()
        store.prepare_to_write()
        epoch, _ = store.gc_state()  # W1
        self.name = SessionName(self.sid, epoch, slot)
        try:
            self._backend.create_once(self.name.key, seal(process.identity()), flush=False)  # W2
            _, self._condemned = (
                store.gc_state()
            )  # W3: after W2, or gc could condemn what is used here unseen
            quarantine = store.quarantine()
            self._condemned |= quarantine.packs
            self._quarantined = quarantine.ids
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.abort()

    # -- what is there already

    def may_use(self, packs: frozenset[PackName]) -> bool:
        """Return whether chunks in these packs can be relied on: none is condemned or aside, all there."""
        return packs.isdisjoint(self._condemned) and all(map(self._is_present, packs))

    def _is_present(self, name: PackName) -> bool:
        """Whether a pack's file is there; asked once: the protocol keeps it while the session is open."""
        if name not in self._present:
            self._present[name] = self._backend.exists(name.key)
        return self._present[name]

    def look_up(self, ids: U8) -> list[Copy | None]:
        """Return a copy of each chunk that can be relied on; None for what must be `put`.

        A copy counts only with its whole chain: every base must be in a pack that a new save may use, or
        this one would rely on what gc deletes.

        Parameters
        ----------
        ids : ndarray of uint8, shape (n, 32)
        """
        if self._index is None:
            self._index = self.store.refresh()
            self._has_condemned = any(name in self._index for name in self._condemned)
        chains = Chains(self._index.packs, self._find, self._copies, self.store.depth_max)
        copies = chains.look_up(ids)
        self._dead |= chains.dead
        if self._has_condemned and None in copies:  # gc may spare a pack, and not the base
            missing = ids[[copy is None for copy in copies]]
            _, rows = self._index.find(missing)
            self._dead.update(map(bytes, missing[rows["depth"] > 0]))
        return copies

    def _find(self, ids: U8) -> tuple[npt.NDArray[np.bool_], Rows]:
        """Look ids up in the packs that a new save may use; zeros where not found."""
        assert self._index is not None
        while True:
            found, rows = self._index.find(ids, self._off_limits())
            names = {self._index.packs[n] for n in set(rows["pack"][found].tolist())}
            lost = {name for name in names if not self._is_present(name)}
            if not lost:
                break
            self._lost |= lost  # a pack that somebody deleted: what it held is written again
        if self._quarantined:
            found &= np.array([i.tobytes() not in self._quarantined for i in ids], np.bool_)
            rows[~found] = np.zeros(1, ROW)
        return found, rows

    def _off_limits(self) -> set[PackName]:
        assert self._index is not None
        return {*self._condemned, *self._lost, *self._index.unlisted}

    def _copies(self, chunk_id: bytes) -> list[np.void]:
        """Return the rows of a chunk in packs that a new save may use."""
        assert self._index is not None
        if chunk_id in self._quarantined:
            return []
        avoid, packs = self._off_limits(), self._index.packs
        rows = [(packs[int(row["pack"])], row) for row in self._index.copies(chunk_id)]
        return [row for name, row in rows if name not in avoid and self._is_present(name)]

    # -- writing chunks

    def was_put(self, chunk_id: bytes) -> bool:
        """Return whether this session stores a chunk already."""
        return chunk_id in self._new

    def put(
        self,
        chunk_id: bytes,
        data: U8,
        kind: Kind,
        base: Parent | None = None,
        mode: codecs.Mode | None = None,
        fingerprint: bytes | None = None,
    ) -> None:
        """Store a chunk that `look_up` does not find; once, however often it is put.

        `data` is read until `settle` or `publish` returns, and must not change until then.

        Parameters
        ----------
        chunk_id : bytes
        data : ndarray of uint8
        kind : Kind
        base : Parent, optional
            Store the difference to this chunk, if that is smaller.  If it cannot be read, or would make a
            chain deeper than the store allows, the chunk is stored whole: an old chunk that is damaged must
            not keep a new step from being saved.  So it is if there is a delta of it that cannot be used: a
            reader would try that one first, unless it is deeper.
        mode : codecs.Mode, optional
            How the difference is taken; by default whoever encodes tries what fits.
        fingerprint : bytes, optional
            The xxh3_128 of `data` from before its id was made: once it is encoded it must be the same still,
            or this or a later call raises `InvalidInputError`.
        """
        if chunk_id in self._new:
            self.pace.pass_by(data.size)
            return
        if chunk_id in self._dead:
            base = None
        depth, is_ours = 0, base is not None and base.id in self._new
        if base is not None and not is_ours and not base.packs:
            base = self._relied_on(base)
        if base is not None:
            depth = (self._new[base.id] if is_ours else base.depth) + 1
            if depth > self.store.depth_max:
                depth, base = 0, None
        self._new[chunk_id] = depth
        self.new_size += data.size
        self.n_new_chunks += 1
        self._batch.append(
            _Put(chunk_id, data, kind, self._buffer(codecs.room(data.size)), base, is_ours, mode, fingerprint)
        )
        # A base is memory too, if it has to be read.
        self._batch_size += data.size + (base.raw_size if base is not None and base.data is None else 0)
        if self._batch_size >= _BATCH_SIZE:
            self._submit()

    def _relied_on(self, base: Parent) -> Parent | None:
        """Return a parent as it is in the store; None if it cannot be relied on."""
        [copy] = self.look_up(as_ids([base.id]))
        return base._replace(depth=copy.depth, packs=copy.packs) if copy is not None else None

    def is_short_of_time(self, itemsize: int) -> bool:
        """Return whether a chunk that has a base would now be stored raw."""
        return self.pace.is_short(Sort(itemsize, True), self._jobs(), self._packer.unwritten_size)

    def _jobs(self) -> list[Job]:
        return [encoding.job for encoding in self._encoding if not encoding.ready.done()]

    def _submit(self) -> None:
        """Have the batch encoded; write what is ready while more than the window is under way."""
        largest = max(self._batch, key=lambda put: put.data.size)
        size = sum(put.data.size for put in self._batch)
        sort = Sort(largest.kind.itemsize, largest.base is not None)
        job = self.pace.job(sort, size, self._jobs(), self._packer.unwritten_size)
        ready = workers.submit(_encode, self.store, self._batch, job, self.pace)
        self._encoding.append(_Encoding(self._batch_size, self._batch, job, ready))
        self._encoding_size += self._batch_size
        self._batch, self._batch_size = [], 0
        while self._encoding_size + self._packer.unwritten_size > _WINDOW_SIZE:
            if self._encoding:
                self._drain()
            else:
                self._packer.wait()

    def _drain(self) -> None:
        size, batch, _, encoded = self._encoding.popleft()
        self._encoding_size -= size
        for put, (record, payload) in zip(batch, encoded.result(), strict=True):
            if record.base != NO_BASE and put.is_ours:
                # Put before, so in a pack by now: its depth is known.
                record = record._replace(depth=self._new[record.base] + 1)
            self._new[put.id] = record.depth
            if put.base is not None and record.depth:
                self._needed |= put.base.packs
            # Once it is written, the memory of the payload serves for another chunk.
            for free in self._packer.add(record, payload, put.buffer):
                self._buffers[free.size.bit_length()].append(free)

    def _buffer(self, size: int) -> U8:
        """Return memory to encode into: what was used before, if there is some of the size's power of two."""
        room = 1 << size.bit_length()
        free = self._buffers[room.bit_length()]
        return free.pop() if free else np.empty(room, np.uint8)

    def copy(self, record: Record, payload: U8) -> None:
        """Take over a record from another pack as it is."""
        self._new[record.id] = record.depth
        self._packer.add(record, payload, payload)
        while self._packer.unwritten_size > _WINDOW_SIZE:
            self._packer.wait()

    def packs(self) -> frozenset[PackName]:
        """Return the packs written so far, that being filled included, and those that their deltas need."""
        return frozenset(self._needed | self._packer.names())

    def rows(self) -> Rows:
        """Return a row of each record written, in order: what codec, depth and size each chunk got.

        Complete once `publish` has returned; `pack` says nothing.
        """
        return self._packer.rows()

    def settle(self) -> None:
        """Encode and write what was put so far: nothing reads its data, or its bases', any more."""
        self._finish_encoding()
        self._packer.settle()

    def _finish_encoding(self) -> None:
        if self._batch:
            self._submit()
        while self._encoding:
            self._drain()

    # -- deciding

    def publish(self, manifest: bytes | None, parts: Sequence[Part] = ()) -> None:
        """Write what is left of W4: close the packs, then index and manifest, durable on return.

        Parameters
        ----------
        manifest : bytes or None
            None: what was put here is part of a step that another session decides, or of none.
        parts : sequence of Part
            What other sessions have handed over, which `commit` then decides with what was put here.

        Raises
        ------
        ConflictError
            If one of them is of another slot, or over: what protects its packs ends with its decision.
        """
        self._parts = parts
        for part in parts:
            # A record that is gone protects nothing any more.
            if part.name.slot != self.slot or not self._backend.exists(part.name.key):
                slot = min(part.name.slot, self.slot)
                raise lost(slot, self.store.refs.decision(slot))
        self._finish_encoding()
        self._packer.finish()
        if self._packer.done:
            # Packs before index: an index that outlives its packs would promise chunks that are not there.
            self._backend.barrier("packs")
            self._publish_index()
        if manifest is not None:
            self._create(manifest_key(self.sid), manifest)
            self._backend.barrier("manifests", *self.store.refs.below(self.slot))
        self._check_packs()
        for chunk_id in self._quarantined & self._new.keys():
            self._backend.delete(lost_key(chunk_id))  # there is a good copy now

    def _publish_index(self) -> None:
        segment, merged = Segment.build(self._packer.done), self.store.to_merge()
        whole = Segment.merge([segment, *merged.values()]) if merged else segment
        key = index_key(self.sid)
        # Flushed but without a barrier: derived data; if a power loss takes its name the packs tell the same.
        self._create(key, whole.to_bytes(self.store.uuid, self.sid))
        self.store.learn(key, segment, merged)
        self.written_size += sum(size for _, size, _ in self._packer.done)
        if merged:
            # The merged file before the others go: a look-up finds the one or the other.
            self._backend.barrier("index")
            for name in merged:
                self._backend.delete(name)

    def _create(self, key: str, data: bytes) -> None:
        if not self._backend.create_once(key, data):
            raise ConflictError(
                f"{self.store.url}/{key}: exists already, written by somebody else", hint="save again"
            )
        self.written_size += len(data)

    def _check_packs(self) -> None:
        written = [(name, size) for name, size, _ in self._packer.done]
        for name, size in [*written, *(pack for part in self._parts for pack in part.packs)]:
            try:
                found = self._backend.size(name.key)
            except NotFoundError:
                found = None
            if found != size:
                raise StorageError(
                    f"{self.store.url}/{name.key}: has {found} bytes after writing {size}",
                    hint="check the storage",
                )

    def commit(
        self,
        manifest: bytes,
        *,
        parent: int | None,
        metrics: dict[str, float],
        metadata: dict[str, Any],
        figures: Figures,
        origin: Origin | None = None,
    ) -> Commit:
        """Decide the slot (W5): the step is durable and visible on return.

        Raises
        ------
        ConflictError
            If another writer committed the step meanwhile, or gc fenced this session.
        """
        commit = Commit(
            self.slot,
            self.sid,
            blake3(manifest).digest(),
            parent,
            time.time(),
            metrics,
            metadata,
            figures,
            origin,
        )
        self.deciding = True
        self.written_size += self.store.refs.decide(commit)
        try:
            if self.superseded is not None:
                self.store.refs.forget([self.superseded.slot])
            self._close()
        except DeltackptError as e:
            # The step is durable, so this is no failed save; gc does it.
            log.warning("run %r step %d is saved, but: %s", self.slot.run, self.slot.step, e.message)
        return commit

    def hand_over(self) -> Part:
        """Leave what was put here, and published without a manifest, to another session of the same slot.

        The session's record stays, so that gc waits for the slot's decision; whoever decides removes it.
        """
        part = Part(self.name, [(name, size) for name, size, _ in self._packer.done])
        self.name = None  # type: ignore[assignment]
        return part

    @contextmanager
    def losing(self) -> Iterator[None]:
        """Tell a failure of the storage from a lost slot: then gc takes the files while they are written.

        Raises
        ------
        ConflictError
            In place of a `StorageError`, if the slot is another's, or fenced.
        """
        try:
            yield
        except StorageError as e:
            decision = None
            with suppress(DeltackptError):
                decision = self.store.refs.decision(self.slot)
            if decision is None or (not isinstance(decision, Fence) and decision.sid == self.sid):
                raise
            raise lost(self.slot, decision) from e

    def check_open(self) -> None:
        """Raise what `losing` would if somebody has ended this session: then nothing protects its packs."""
        if not self._backend.exists(self.name.key):
            raise lost(self.slot, self.store.refs.decision(self.slot))

    def finish(self) -> None:
        """End gc's own session after `publish`; its packs hold only copies, so nothing is to be decided."""
        self._close()

    def abort(self) -> None:
        """Give up: what nobody can have seen is taken back, as far as the storage lets us; gc gets the rest.

        A pack, once closed, stays: a gc may have found a committed step's chunk in it and let go of another
        copy since.  So does a manifest once a decision was tried: it may be there though its answer was lost.
        """
        if self.name is None:
            return
        for encoding in self._encoding:
            encoding.ready.cancel()
        self._batch, self._encoding = [], deque()  # they hold what was to be written
        try:
            self._packer.abort()
            if not self.deciding:
                self._backend.delete(manifest_key(self.sid))
            self._close()
        except DeltackptError as e:
            log.warning("session %s left behind: %s", self.sid.hex(), e.message)

    def _close(self) -> None:
        for name in (self.name, *(part.name for part in self._parts)):
            self._backend.delete(name.key)
        self.name = None  # type: ignore[assignment]


class _Put(NamedTuple):
    """A chunk to be stored; `buffer` may come to hold its payload.  `is_ours`: its base was put here too."""

    id: bytes
    data: U8
    kind: Kind
    buffer: U8
    base: Parent | None
    is_ours: bool
    mode: codecs.Mode | None
    fingerprint: bytes | None


class _Ready(NamedTuple):
    """A chunk as a record."""

    record: Record
    payload: Payload


class _Encoding(NamedTuple):
    """A batch that encoders have been given; `size`: bytes of its chunks, and of bases that are read."""

    size: int
    batch: list[_Put]
    job: Job
    ready: Future[list[_Ready]]


class _Local(threading.local):
    """What each thread reads the bases of a batch into."""

    def __init__(self) -> None:
        self.scratch = Scratch()


_local = _Local()


def _encode(store: Store, puts: list[_Put], job: Job, pace: Pace) -> list[_Ready]:
    start_s, start_cpu_s = time.perf_counter(), time.thread_time()
    try:
        encoded = [_own(put, one) for put, one in zip(puts, _encoded(store, puts, job), strict=True)]
    except InvalidInputError:
        _check_unchanged(puts)  # what changes meanwhile may be of other sizes at every look
        raise
    _check_unchanged(puts, encoded)
    ready = []
    for put, (codec, payload) in zip(puts, encoded, strict=True):
        is_delta = put.base is not None and codec in codecs.DELTAS
        record = Record.of(
            payload,
            codec=codec,
            itemsize=put.kind.itemsize,
            raw_size=put.data.size,
            chunk_id=put.id,
            depth=put.base.depth + 1 if put.base is not None and is_delta else 0,
            base=put.base.id if put.base is not None and is_delta else NO_BASE,
        )
        ready.append(_Ready(record, payload))
    took = Took(time.thread_time() - start_cpu_s, sum(len(payload) for _, payload in encoded))
    pace.over(job, took, time.perf_counter() - start_s)
    return ready


def _encoded(store: Store, puts: list[_Put], job: Job) -> list[Encoded]:
    if job.effort == "raw":
        return [Encoded(codecs.raw.NUMBER, put.data) for put in puts]
    read = _read_bases(store, [put.base for put in puts if put.base is not None and put.base.data is None])
    chunks = []
    for put in puts:
        base = None
        if put.base is not None:
            data = put.base.data if put.base.data is not None else read.get(put.base.id)
            base = Base(data, put.base.offset, put.base.cast) if data is not None else None
        chunks.append(Chunk(put.data, put.kind, put.buffer, base, put.mode))
    return codecs.encode_all(chunks, fast=job.effort == "fast")


def _own(put: _Put, encoded: Encoded) -> Encoded:
    """Copy what is stored as it is: it is written later, and somebody may change it after it was checked."""
    if encoded.payload is not put.data:
        return encoded
    payload = put.buffer[: put.data.size]
    np.copyto(payload, put.data)
    return Encoded(encoded.codec, payload)


def _check_unchanged(puts: Sequence[_Put], encoded: Sequence[Encoded] = ()) -> None:
    """Refuse what is not what it was when its id, or its base's, was made: nobody could read it."""
    for put, one in zip_longest(puts, encoded):
        is_raw = one is not None and one.codec == codecs.raw.NUMBER
        seen = [(one.payload if is_raw else put.data, put.fingerprint)]
        if put.base is not None and put.base.data is not None:
            seen.append((put.base.data, put.base.fingerprint))
        for data, fingerprint in seen:
            if fingerprint is not None and xxhash.xxh3_128_digest(data) != fingerprint:
                raise InvalidInputError(
                    "the state changed while it was saved",
                    hint="let save return before you change it, or save a copy",
                )


def _read_bases(store: Store, bases: list[Parent]) -> dict[bytes, U8]:
    """Read chunks that others are to be compared with, each once; those that cannot be read are left out."""
    sizes = {base.id: base.raw_size for base in bases}
    memory = _local.scratch.of(sum(sizes.values()))
    read: dict[bytes, U8] = {}
    at = 0
    try:
        rows = store.find(as_ids(sizes)) if sizes else np.zeros(0, ROW)
        below = store.bases(rows)
    except DeltackptError as e:
        log.warning("%s; what was to be a delta is stored whole", e.message)
        return read
    for (chunk_id, size), row in zip(sizes.items(), rows, strict=True):
        out = memory[at : at + size]
        at += size
        try:
            store.read_into(chunk_id, row, out, below)
        except DeltackptError as e:
            log.warning("%s; what was to be a delta of it is stored whole", e.message)
        else:
            read[chunk_id] = out
    return read
