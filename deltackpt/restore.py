"""Restore: tensors from chunks.

Owns   following lists down to chunks, decoding in threads into place, reading only the chunks of a part.
Never  writes, or knows about states, steps and runs.
"""

from __future__ import annotations

import logging
import mmap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from deltackpt.errors import CorruptError, NotFoundError
from deltackpt.format import CHUNK_SIZE_MAX, LIST_ROW
from deltackpt.layout import Layout, touched
from deltackpt.links import Wanted
from deltackpt.manifest import TensorRow, list_from_bytes
from deltackpt.store import Store
from deltackpt.types import U8
from deltackpt.workers import n_threads, workers

log = logging.getLogger("deltackpt")
R = TypeVar("R")
#: Where bytes are wanted of, as `Layout.runs` gives it.
Runs: TypeAlias = tuple[npt.NDArray[np.int64], int]

#: Chunks in a run, however small: what is known of one while it is read takes a kilobyte.
_N_CHUNKS_MAX = 2048

#: Bytes a thread restores at a time: a task costs about 30 us, this much 2 ms, and is read together.
_TASK_SIZE = 2 << 20


def spans(ends: npt.NDArray[np.int64], size: int) -> Iterator[tuple[int, int]]:
    """Split chunks into runs of about `size` bytes: first chunk, chunk after the last."""
    first, start = 0, 0
    for i, end in enumerate(ends.tolist()):
        if end - start >= size or i - first >= _N_CHUNKS_MAX:
            yield first, i + 1
            first, start = i + 1, end
    if first < len(ends):
        yield first, len(ends)


@contextmanager
def _naming(row: TensorRow) -> Iterator[None]:
    """Name the tensor in what goes wrong."""
    try:
        yield
    except CorruptError as e:
        raise CorruptError(f"tensor {row.name!r}: {e.message}", hint=e.hint) from e


def _root(row: TensorRow) -> npt.NDArray[np.void]:
    """Return a tensor as a table of one chunk or list; of none if it has no bytes."""
    table = np.zeros(1 if row.size else 0, LIST_ROW)
    if row.size:
        table["id"], table["size"] = np.frombuffer(row.root, np.uint8), row.size
    return table


def _read_list(store: Store, entry: np.void, found: np.void, level: int) -> npt.NDArray[np.void]:
    chunk_id = entry["id"].tobytes()
    chunk = np.empty(int(found["raw_size"]), np.uint8)
    store.read_into(chunk_id, found, chunk)
    return list_from_bytes(chunk, level, int(entry["size"]), f"list {chunk_id.hex()[:16]}")


def resolve(store: Store, rows: Sequence[TensorRow]) -> list[npt.NDArray[np.void]]:
    """Return each tensor's chunks, ids and sizes, as LIST_ROW.

    Raises
    ------
    CorruptError
        If a list is missing or damaged; names the tensor.
    """
    return [table for table, _ in _resolve(store, rows, [None] * len(rows))]


def _resolve(
    store: Store, rows: Sequence[TensorRow], runs: Sequence[Runs | None]
) -> list[tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]]:
    """Return each tensor's chunks and where they start; if it has runs, those that hold a byte of them."""
    roots = [_root(row) for row in rows]
    found = [_kept(root, np.zeros(len(root), np.int64), of) for root, of in zip(roots, runs, strict=True)]
    for level in range(max((row.level for row in rows), default=0), 0, -1):
        todo = [i for i, row in enumerate(rows) if row.level >= level]
        at = iter(_find(store, [rows[i] for i in todo], [found[i][0] for i in todo]))
        for i in todo:
            table, starts = found[i]
            with _naming(rows[i]):
                lists = [_read_list(store, entry, next(at), level) for entry in table]
            below = [start + _starts(t) for start, t in zip(starts, lists, strict=True)]
            table = np.concatenate([np.zeros(0, LIST_ROW), *lists])
            found[i] = _kept(table, np.concatenate([np.zeros(0, np.int64), *below]), runs[i])
    return found


def _find(
    store: Store, rows: Sequence[TensorRow], tables: Sequence[npt.NDArray[np.void]]
) -> npt.NDArray[np.void]:
    """Look up the lists of several tensors at once; name the tensor that lacks one."""
    try:
        return store.find(np.concatenate([table["id"] for table in tables]))
    except CorruptError:
        for row, table in zip(rows, tables, strict=True):
            with _naming(row):
                store.find(table["id"])
        raise


def fill(store: Store, tensors: Sequence[tuple[TensorRow, U8]]) -> None:
    """Rebuild tensors, decoding in threads straight into their memory, every chunk checked against its id.

    Parameters
    ----------
    store : Store
    tensors : sequence of (TensorRow, ndarray of uint8)
        Each tensor and its destination, of exactly its size.

    Raises
    ------
    CorruptError
        If a chunk is missing or damaged; names the tensor, the chunk and its pack.
    """
    tables = resolve(store, [row for row, _ in tensors])
    chunks = np.concatenate([np.zeros(0, LIST_ROW), *tables])
    owners = np.repeat(np.arange(len(tables)), [len(t) for t in tables])
    starts = np.concatenate([np.zeros(0, np.int64), *(_starts(t) for t in tables)])
    sizes = chunks["size"].astype(np.int64)

    def place(i: int) -> tuple[TensorRow, U8]:
        row, out = tensors[owners[i]]
        return row, out[starts[i] : starts[i] + sizes[i]]

    _read_all(store, chunks, place)


def part(store: Store, row: TensorRow, layout: Layout) -> tuple[U8, Layout]:
    """Rebuild those chunks of a tensor that hold certain elements, as `parts` does."""
    return parts(store, [(row, layout)])[0]


def parts(store: Store, wanted: Sequence[tuple[TensorRow, Layout]]) -> list[tuple[U8, Layout]]:
    """Rebuild those chunks of tensors that hold certain elements; nothing else of them is read.

    Parameters
    ----------
    store : Store
    wanted : sequence of (TensorRow, Layout)
        Where the elements lie in the tensor's bytes; must lie inside them.

    Returns
    -------
    list of (ndarray of uint8, Layout)
        The bytes from the first of those chunks to the last; what lies in others takes no memory, and is
        zeros.  And where the elements lie in them.

    Raises
    ------
    CorruptError
        If a chunk or a list on the way to it is missing or damaged.
    """
    rows = [row for row, _ in wanted]
    found = _resolve(store, rows, [layout.runs() for _, layout in wanted])
    made: list[tuple[U8, Layout]] = []
    begins = [np.zeros(0, np.int64)]
    for (_, layout), (table, starts) in zip(wanted, found, strict=True):
        sizes = table["size"].astype(np.int64)
        first = int(starts[0]) if len(table) else layout.offset
        size = int(starts[-1] + sizes[-1]) - first if len(table) else 0
        made.append((_sparse(size), layout.moved(-first)))
        begins.append(starts - first)
    chunks = np.concatenate([np.zeros(0, LIST_ROW), *(table for table, _ in found)])
    owners = np.repeat(np.arange(len(found)), [len(table) for table, _ in found])
    begin = np.concatenate(begins)
    end = begin + chunks["size"].astype(np.int64)

    def place(i: int) -> tuple[TensorRow, U8]:
        return rows[owners[i]], made[owners[i]][0][begin[i] : end[i]]

    # A chunk that several parts lie in is read once.
    listed = chunks.view(np.uint8).reshape(len(chunks), LIST_ROW.itemsize)
    _, at, back = np.unique(listed, axis=0, return_index=True, return_inverse=True)
    _read_all(store, chunks[at], lambda i: place(at[i]))
    for i, source in enumerate(at[back.reshape(-1)].tolist()):
        if i != source:
            place(i)[1][:] = place(source)[1]
    return made


def stretch(store: Store, row: TensorRow, chunks: npt.NDArray[np.void], start: int, stop: int) -> U8:
    """Rebuild a range of a tensor's bytes, from the chunks that `resolve` found; no other one is read.

    Takes memory for those chunks whole, each of which is 64 MiB at most.

    Raises
    ------
    CorruptError
        If a chunk is missing or damaged; names the tensor, the chunk and its pack.
    """
    at = _starts(chunks)
    first, end = int(np.searchsorted(at, start, "right")) - 1, int(np.searchsorted(at, stop))
    table = chunks[first:end]
    starts, skipped = _starts(table), start - int(at[first])
    sizes = table["size"].astype(np.int64)
    if int(sizes.max(initial=0)) > CHUNK_SIZE_MAX:
        raise CorruptError(f"tensor {row.name!r}: a chunk of {sizes.max()} bytes, at most {CHUNK_SIZE_MAX}")
    data = np.empty(int(sizes.sum()), np.uint8)
    _read_all(store, table, lambda i: (row, data[starts[i] : starts[i] + sizes[i]]))
    return data[skipped : skipped + stop - start]


def _starts(table: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    sizes = table["size"].astype(np.int64)
    return np.cumsum(sizes) - sizes


def _kept(
    table: npt.NDArray[np.void], starts: npt.NDArray[np.int64], runs: Runs | None
) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
    if runs is None or not len(table):
        return table, starts
    keep = touched(runs, starts, starts + table["size"].astype(np.int64))
    return table[keep], starts[keep]


def _sparse(size: int) -> U8:
    """Return zeroed memory that takes room only where it is written: it may be larger than there is."""
    if size < _TASK_SIZE:  # a process has no more than some 65,000 mappings
        return np.zeros(size, np.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        return np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)
    except OSError as error:
        raise MemoryError(f"no room for {size} bytes") from error


def _read_all(
    store: Store,
    chunks: npt.NDArray[np.void],
    place: Callable[[int], tuple[TensorRow, U8]],
    *,
    is_kept: bool = True,
) -> None:
    """Read chunks in threads, each to where `place` says, which also tells whose it is.

    A base that is wanted itself is decoded once: its deltas come in the round after it, and find it in its
    place, unless nothing is kept there.
    """
    sizes = chunks["size"].astype(np.int64)
    ids = np.ascontiguousarray(chunks["id"])
    found = store.find(ids)
    bases = store.bases(found)
    base_at = _wanted_bases(ids, found) if is_kept and bases else np.full(len(ids), -1)
    rounds = _rounds(found, base_at)
    # In the order of the packs, so that disks are read forwards.
    order = np.lexsort((found["offset"], found["pack"]))

    def some(numbers: list[int]) -> None:
        rows, wanted = [], []
        for i in numbers:
            row, out = place(i)
            base = place(base_at[i])[1] if base_at[i] >= 0 else None
            rows.append(row)
            wanted.append(Wanted(ids[i].tobytes(), found[i], out, base))
        try:
            store.read_copies(wanted, bases)
        except (CorruptError, NotFoundError) as e:
            log.info("%s; reading each chunk alone", e.message)
            # Alone, each finds another copy, or says what is wrong with it.
            for row, (chunk_id, at, out, base) in zip(rows, wanted, strict=True):
                with _naming(row):
                    store.read_into(chunk_id, at, out, bases, base)

    for n in range(int(rounds.max(initial=0)) + 1):
        window: _Window[None] = _Window(4 * n_threads())
        numbers = order[rounds[order] == n]
        try:
            for first, stop in spans(np.cumsum(sizes[numbers]), _TASK_SIZE):
                window.submit(some, numbers[first:stop].tolist())
        finally:
            window.finish()


def _wanted_bases(ids: U8, found: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """Return of each chunk the number of its base among them; -1 if it has none, or it is not wanted."""
    base_at = np.full(len(ids), -1, np.int64)
    deltas = np.flatnonzero(found["depth"])
    bases = [base.tobytes() for base in found["base"][deltas]]
    asked = set(bases)
    numbers = {i: n for n, i in enumerate(chunk_id.tobytes() for chunk_id in ids) if i in asked}
    base_at[deltas] = [numbers.get(base, -1) for base in bases]
    # As deep as its delta, it is not what the delta was taken against: read_into says so, or finds another.
    base_at[found["depth"][base_at] >= found["depth"]] = -1
    return base_at


def _rounds(found: npt.NDArray[np.void], base_at: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return when to read each chunk: in the round after the base that is read too, if there is one."""
    rounds = np.zeros(len(found), np.int64)
    for depth in range(1, int(found["depth"].max(initial=0)) + 1):
        at = np.flatnonzero((found["depth"] == depth) & (base_at >= 0))
        rounds[at] = rounds[base_at[at]] + 1
    return rounds


def check(store: Store, rows: Sequence[TensorRow]) -> None:
    """Decode every chunk of some tensors, in threads, and keep none of it; each against its id.

    Raises
    ------
    CorruptError
        If one is missing or damaged; names the tensor, the chunk and its pack.
    """
    tables = resolve(store, rows)
    chunks = np.concatenate([np.zeros(0, LIST_ROW), *tables])
    owners = np.repeat(np.arange(len(tables)), [len(t) for t in tables])
    _, at = np.unique(chunks["id"], axis=0, return_index=True)  # what tensors share is read once
    chunks, owners = chunks[at], owners[at]

    def place(i: int) -> tuple[TensorRow, U8]:
        return rows[owners[i]], np.empty(int(chunks["size"][i]), np.uint8)

    _read_all(store, chunks, place, is_kept=False)


class _Window(Generic[R]):
    """Tasks in threads, at most `size` of them unfinished."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._futures: deque[Future[R]] = deque()

    def submit(self, function: Callable[..., R], *args: Any) -> None:
        self._futures.append(workers.submit(function, *args))
        while len(self._futures) > self._size:
            self._futures.popleft().result()

    def finish(self) -> None:
        """Wait for all; raise the first error once none runs any more."""
        error: BaseException | None = None
        for future in self._futures:
            error = error or future.exception()
        self._futures.clear()
        if error is not None:
            raise error
