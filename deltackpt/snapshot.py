"""A snapshot: a state as tensors, chunks and a manifest.  The way back is in restore.py and loader.py.

Owns   which of a tensor's chunks are new, its lists and its row; what is remembered of the last one.
Never  touches storage but through a store or a session, or knows about steps and runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import xxhash
from blake3 import blake3

from deltackpt import tree
from deltackpt.codecs import Kind
from deltackpt.format import CHUNK_ID_SIZE
from deltackpt.manifest import Manifest, TensorRow, build_lists
from deltackpt.pack import PackName
from deltackpt.restore import resolve, spans
from deltackpt.session import Session
from deltackpt.store import Store, n_threads, workers
from deltackpt.types import DTYPE_SIZES, U8, Deferred, State, Tensor

Ends = npt.NDArray[np.int64]
T = TypeVar("T")
R = TypeVar("R")

#: Bytes a thread takes at a time: a task costs about 30 us, hashing this much 200 us and more.
_TASK_SIZE = 4 << 20
#: A remembered set of packs only grows; past this many a tensor's chunks are looked up again, 1 us each.
_N_PACKS_MAX = 16
#: Bytes of changed tensors whose chunks are looked up together.
_GROUP_SIZE = 8 << 20
_LIST_KIND = Kind(1, False)


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
    """

    row: TensorRow
    ends: Ends
    ids: U8
    fingerprints: list[bytes] | None
    packs: frozenset[PackName] | None


class Memory:
    """The tensors of one snapshot as `Known`, by name and by content."""

    def __init__(self, tensors: Iterable[Known] = ()) -> None:
        self._by_name: dict[str, Known] = {}
        self._by_content: dict[tuple[int, bytes], Known] = {}
        for known in tensors:
            self.add(known)

    def add(self, known: Known) -> None:
        """Remember one more tensor."""
        self._by_name[known.row.name] = known
        self._by_content[known.row.size, known.row.fingerprint] = known

    def same_place(self, tensor: Tensor) -> Known | None:
        """Return what had this tensor's name, dtype and shape."""
        known = self._by_name.get(tensor.name)
        if known is not None and known.row.dtype == tensor.dtype and known.row.shape == tensor.shape:
            return known
        return None

    def same_content(self, size: int, fingerprint: bytes) -> Known | None:
        """Return what, by its fingerprint, had the same bytes; a hint which cuts to try."""
        return self._by_content.get((size, fingerprint))

    @classmethod
    def from_store(cls, store: Store, manifest: Manifest) -> Memory:
        """Read a snapshot's lists, and none of its tensors."""
        rows = [row for row in manifest.tensors if row.size]
        lists = resolve(store, rows)
        return cls(
            Known(
                row,
                np.cumsum(chunks["size"].astype(np.int64)),
                np.ascontiguousarray(chunks["id"]),
                None,
                None,
            )
            for row, chunks in zip(rows, lists, strict=True)
        )


@dataclass(slots=True)
class Saved:
    """What `save` made: the manifest, what to remember, and its figures."""

    manifest: Manifest
    tensors: list[Known]
    changed: set[str]
    logical_size: int = 0
    n_chunks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def memory(self, packs: frozenset[PackName]) -> Memory:
        """Return what to remember once the session has written these packs."""
        shared: dict[frozenset[PackName], frozenset[PackName]] = {}  # one set for all tensors that have it
        tensors = []
        for known in self.tensors:
            if known.row.name in self.changed:
                together = (known.packs or frozenset()) | packs
                known = replace(known, packs=shared.setdefault(together, together))
            tensors.append(known)
        return Memory(tensors)


class _Clock:
    """Seconds of the calling thread by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def save(session: Session, state: State, memory: Memory, *, allow_pickle: bool = False) -> Saved:
    """Put the chunks of a state that the store lacks into a session.

    Parameters
    ----------
    session : Session
    state : State
    memory : Memory
        The previous snapshot: its boundaries are kept where a tensor kept its name, dtype and shape.
    allow_pickle : bool
        Pickle what has no plain form.

    Raises
    ------
    InvalidInputError
        If the state holds what has no plain form; names the key path.
    """
    clock = _Clock()
    flat = tree.flatten(state, allow_pickle=allow_pickle)
    clock.lap("flatten")
    saver = _Saver(session, memory, clock)
    knowns = saver.all(flat.tensors)
    rows = [
        known.row if known is not None else _row(tensor, 0, b"", xxhash.xxh3_128_digest(b""))
        for tensor, known in zip(flat.tensors, knowns, strict=True)
    ]
    tensors = [known for known in knowns if known is not None]
    saved = Saved(Manifest(flat.structure, rows), tensors, saver.changed, seconds=clock.seconds)
    saved.logical_size = sum(row.size for row in rows)
    saved.n_chunks = sum(len(known.ends) for known in tensors)
    return saved


def _row(tensor: Tensor | Deferred, level: int, root: bytes, fingerprint: bytes) -> TensorRow:
    return TensorRow(
        tensor.name, tensor.dtype, tensor.shape, tensor.framework, tensor.size, level, root, fingerprint
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """A tensor whose chunks are to be looked up; `known.packs` is None until then.

    Parameters
    ----------
    at : int
        The tensor's place in the state.
    tensor : Tensor
    known : Known
    asked : ndarray of int64
        The chunks that are not known to be there.
    packs : frozenset of PackName
        Packs that hold the others.
    lists : list of ndarray of uint8
        The tensor's list chunks.
    list_ids : list of bytes
    """

    at: int
    tensor: Tensor
    known: Known
    asked: npt.NDArray[np.int64]
    packs: frozenset[PackName]
    lists: list[U8]
    list_ids: list[bytes]


class _Saver:
    """One walk over a state's tensors.

    What changed is looked up and put group by group: a look-up costs 100 us whether for one chunk or for
    a thousand, and hashing is done before encoders compete for the cores.
    """

    def __init__(self, session: Session, memory: Memory, clock: _Clock) -> None:
        self._session = session
        self._memory = memory
        self._here = Memory()
        self._clock = clock
        self._knowns: list[Known | None] = []
        self._pending: list[_Pending] = []
        self._pending_size = 0
        self.changed: set[str] = set()  # tensors with chunks or lists in the packs of this session

    def all(self, tensors: Sequence[Tensor | Deferred]) -> list[Known | None]:
        """Put the new chunks of all tensors; return what is known of each, None for one without bytes."""
        for given in tensors:
            tensor = given.taken() if isinstance(given, Deferred) else given
            known = self._unchanged_or_changed(tensor) if tensor.size else None
            self._knowns.append(known)
            if known is not None:
                self._here.add(known)
            if self._pending_size >= _GROUP_SIZE:
                self._put_pending()
        self._put_pending()
        return self._knowns

    def _put_pending(self) -> None:
        """Look the group's chunks and lists up, and put those that the store lacks."""
        group, self._pending, self._pending_size = self._pending, [], 0
        if not group:
            return
        parts = [p.known.ids[p.asked] for p in group]
        parts += [_as_ids(p.list_ids) for p in group if p.list_ids]
        holders = iter(self._session.look_up(np.concatenate(parts)))
        chunks = [[next(holders) for _ in p.asked] for p in group]
        for pending, found in zip(group, chunks, strict=True):
            self._finish(pending, found, [next(holders) for _ in pending.list_ids])
        self._clock.lap("write")

    def _finish(self, p: _Pending, chunks: list[PackName | None], lists: list[PackName | None]) -> None:
        """Put what is in no pack, given the packs of a tensor's asked chunks and of its lists."""
        kind, ends = _kind(p.tensor.dtype), p.known.ends
        for i, holder in zip(p.asked.tolist(), chunks, strict=True):
            if holder is None:
                start = int(ends[i - 1]) if i else 0
                self._session.put(p.known.ids[i].tobytes(), p.tensor.data[start : int(ends[i])], kind)
        for chunk_id, data, holder in zip(p.list_ids, p.lists, lists, strict=True):
            if holder is None:
                self._session.put(chunk_id, data, _LIST_KIND)
        holders = {*chunks, *lists}
        if None in holders:
            self.changed.add(p.tensor.name)
        packs = p.packs.union(name for name in holders if name is not None)
        self._knowns[p.at] = replace(p.known, packs=packs)

    def _unchanged_or_changed(self, tensor: Tensor) -> Known:
        before = self._memory.same_place(tensor)
        if before is not None:
            fingerprints = fingerprint(tensor.data, before.ends)
            self._clock.lap("compare")
            if fingerprints == before.fingerprints and self._reusable(before):
                return before if before.row.framework == tensor.framework else self._renamed(before, tensor)
            whole = self._whole(tensor, fingerprints)
        else:
            whole = xxhash.xxh3_128_digest(tensor.data)
            before = self._here.same_content(tensor.size, whole) or self._memory.same_content(
                tensor.size, whole
            )
            if before is not None:
                fingerprints = fingerprint(tensor.data, before.ends)
                self._clock.lap("compare")
                if fingerprints == before.fingerprints and self._reusable(before):
                    return self._renamed(before, tensor)
        if before is None:
            ends = self._session.store.chunker.cuts(tensor.data, DTYPE_SIZES[tensor.dtype])
            fingerprints = fingerprint(tensor.data, ends)
            self._clock.lap("chunk")
        else:
            ends = before.ends
        return self._changed(tensor, ends, fingerprints, whole, before)

    def _whole(self, tensor: Tensor, fingerprints: list[bytes]) -> bytes:
        return fingerprints[0] if len(fingerprints) == 1 else xxhash.xxh3_128_digest(tensor.data)

    def _reusable(self, known: Known) -> bool:
        return known.packs is not None and self._session.may_use(known.packs)

    def _renamed(self, known: Known, tensor: Tensor) -> Known:
        """Return the same chunks as another tensor's."""
        row = known.row
        return replace(known, row=_row(tensor, row.level, row.root, row.fingerprint))

    def _changed(
        self, tensor: Tensor, ends: Ends, fingerprints: list[bytes], whole: bytes, before: Known | None
    ) -> Known:
        """Identify a tensor's chunks and lists, to be put with the group."""
        data = tensor.data
        ids = np.empty((len(ends), CHUNK_ID_SIZE), np.uint8)
        changed = np.ones(len(ends), np.bool_)
        if before is not None and before.fingerprints is not None:
            changed[:] = [a != b for a, b in zip(fingerprints, before.fingerprints, strict=True)]
            ids[~changed] = before.ids[~changed]
        hashed = identify(data, ends, np.flatnonzero(changed))
        if hashed:
            ids[changed] = _as_ids(hashed)
        # What did not change is there already, unless gc condemned it meanwhile.
        packs: frozenset[PackName] = frozenset()
        asked = np.arange(len(ends))
        if before is not None and self._reusable(before) and len(before.packs or ()) <= _N_PACKS_MAX:
            packs, asked = before.packs or packs, np.flatnonzero(changed)
        level, root, lists, list_ids = _lists(ids, ends)
        self._clock.lap("identify")
        known = Known(_row(tensor, level, root, whole), ends, ids, fingerprints, None)
        at = len(self._knowns)
        self._pending.append(_Pending(at, tensor, known, asked, packs, lists, list_ids))
        self._pending_size += tensor.size
        return known


def _lists(ids: U8, ends: Ends) -> tuple[int, bytes, list[U8], list[bytes]]:
    """Return level and id of a tensor's root, and its lists with their ids; a single chunk needs none."""
    if len(ends) == 1:
        return 0, ids[0].tobytes(), [], []
    level, levels = build_lists(ids, np.diff(ends, prepend=0))
    lists = [np.frombuffer(data, np.uint8) for row in levels for data in row]
    list_ids = [blake3(data).digest() for data in lists]
    return level, list_ids[-1], lists, list_ids


def _as_ids(digests: list[bytes]) -> U8:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, CHUNK_ID_SIZE)


def _kind(dtype: str) -> Kind:
    size = DTYPE_SIZES[dtype]
    if dtype.startswith("complex"):
        return Kind(size // 2, True)
    return Kind(size, "float" in dtype and size > 1)


def fingerprint(data: U8, ends: Ends) -> list[bytes]:
    """Return the xxh3_128 of each chunk."""

    def span(bounds: tuple[int, int]) -> list[bytes]:
        first, stop = bounds
        start = int(ends[first - 1]) if first else 0
        digests = []
        for end in ends[first:stop].tolist():
            digests.append(xxhash.xxh3_128_digest(data[start:end]))
            start = end
        return digests

    return [d for part in _in_parallel(span, list(spans(ends, _TASK_SIZE))) for d in part]


def identify(data: U8, ends: Ends, which: npt.NDArray[np.int64]) -> list[bytes]:
    """Return the BLAKE3-256 of some chunks."""
    if len(ends) == 1:  # as most tensors of an adapter are: no arrays for one hash
        return [blake3(data).digest()] if len(which) else []
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends

    def some(numbers: npt.NDArray[np.int64]) -> list[bytes]:
        return [blake3(data[starts[i] : ends[i]]).digest() for i in numbers.tolist()]

    n_tasks = max(1, int((ends[which] - starts[which]).sum()) // _TASK_SIZE)
    return [d for part in _in_parallel(some, np.array_split(which, n_tasks)) for d in part]


def _in_parallel(function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]:
    """Map over items in order, in threads when there are several."""
    if len(items) < 2 or n_threads() == 1:
        return map(function, items)
    return workers.get().map(function, items)
