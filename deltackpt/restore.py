"""Restore: tensors from chunks, and a state from its tensors.

Owns   following lists down to chunks, decoding in threads into place, loading into arrays the caller has.
Never  writes, or knows about steps and runs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from deltackpt import arrays, tree
from deltackpt.errors import CorruptError
from deltackpt.format import LIST_ROW
from deltackpt.manifest import Manifest, TensorRow, list_from_bytes
from deltackpt.scratch import Scratch
from deltackpt.store import Store, n_threads, workers
from deltackpt.types import U8, State

T = TypeVar("T")
R = TypeVar("R")

#: Bytes a thread restores at a time: a task costs about 30 us, this much 1 ms.
_TASK_SIZE = 1 << 20
#: Bytes loaded at a time on their way to arrays that cannot be loaded into.
_COPY_SIZE = 64 << 20


def spans(ends: npt.NDArray[np.int64], size: int) -> Iterator[tuple[int, int]]:
    """Split chunks into runs of about `size` bytes: first chunk, chunk after the last."""
    first, start = 0, 0
    for i, end in enumerate(ends.tolist()):
        if end - start >= size:
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


def resolve(store: Store, rows: Sequence[TensorRow]) -> list[npt.NDArray[np.void]]:
    """Return each tensor's chunks, ids and sizes, as LIST_ROW.

    Raises
    ------
    CorruptError
        If a list is missing or damaged; names the tensor.
    """
    tables = []
    for row in rows:
        table = np.zeros(1 if row.size else 0, LIST_ROW)
        if row.size:
            table["id"], table["size"] = np.frombuffer(row.root, np.uint8), row.size
        tables.append(table)
    for level in range(max((row.level for row in rows), default=0), 0, -1):
        todo = [i for i, row in enumerate(rows) if row.level >= level]
        ids = np.concatenate([tables[i]["id"] for i in todo])
        found = store.find(ids)
        at = 0
        for i in todo:
            parts = []
            for entry in tables[i]:
                chunk_id = entry["id"].tobytes()
                with _naming(rows[i]):
                    chunk = np.empty(int(found[at]["raw_size"]), np.uint8)
                    store.read_into(chunk_id, found[at], chunk)
                    where = f"list {chunk_id.hex()[:16]}"
                    parts.append(list_from_bytes(chunk, level, int(entry["size"]), where))
                at += 1
            tables[i] = np.concatenate(parts)
    return tables


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
    sizes = chunks["size"].astype(np.int64)
    offsets = np.concatenate(
        [np.cumsum(t["size"].astype(np.int64)) - t["size"].astype(np.int64) for t in tables] or [sizes]
    )
    ids = np.ascontiguousarray(chunks["id"])
    found = store.find(ids)
    # In the order of the packs, so that disks are read forwards.
    order = np.lexsort((found["offset"], found["pack"]))
    window: _Window[None] = _Window(4 * n_threads())

    def some(numbers: list[int]) -> None:
        for i in numbers:
            row, out = tensors[owners[i]]
            with _naming(row):
                store.read_into(ids[i].tobytes(), found[i], out[offsets[i] : offsets[i] + sizes[i]])

    try:
        for first, stop in spans(np.cumsum(sizes[order]), _TASK_SIZE):
            window.submit(some, order[first:stop].tolist())
    finally:
        window.finish()


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
    ids, owners, sizes = np.ascontiguousarray(chunks["id"][at]), owners[at], chunks["size"][at].astype(int)
    found = store.find(ids)
    order = np.lexsort((found["offset"], found["pack"]))
    window: _Window[None] = _Window(4 * n_threads())

    def some(numbers: list[int]) -> None:
        for i in numbers:
            with _naming(rows[owners[i]]):
                store.read_into(ids[i].tobytes(), found[i], _decoded.scratch.of(int(sizes[i])))

    try:
        for first, stop in spans(np.cumsum(sizes[order]), _TASK_SIZE):
            window.submit(some, order[first:stop].tolist())
    finally:
        window.finish()


def load(store: Store, manifest: Manifest, *, keys: str | Sequence[str] | None, into: State | None) -> State:
    """Rebuild a state, or those parts of it whose names match `keys`, into `into`'s arrays where given."""
    rows = manifest.tensors
    if keys is None:
        structure, wanted = manifest.structure, list(range(len(rows)))
    else:
        structure, wanted = tree.select(manifest.structure, [row.name for row in rows], keys)
    values: list[Any] = [None] * len(rows)
    jobs: list[tuple[TensorRow, U8]] = []
    by_copy: list[tuple[int, Any]] = []  # what is on a device, or in another order
    tied: list[tuple[int, Any]] = []
    if into is not None:
        pairs = tree.pair_into(structure, into, [(row.name, row.dtype, row.shape) for row in rows])
        for i, array in pairs:
            if values[i] is not None:
                tied.append((i, array))
                continue
            values[i] = array
            out = arrays.destination(array, rows[i].dtype, rows[i].shape, rows[i].name)
            if out is None:
                by_copy.append((i, array))
            else:
                jobs.append((rows[i], out))
    for i in wanted:
        if values[i] is None:
            values[i], out = _allocate(rows[i])
            jobs.append((rows[i], out))
    fill(store, jobs)
    for group in _groups(by_copy, [rows[i].size for i, _ in by_copy]):
        temporary = [_allocate(rows[i]) for i, _ in group]
        fill(store, [(rows[i], out) for (i, _), (_, out) in zip(group, temporary, strict=True)])
        for (_, array), (source, _) in zip(group, temporary, strict=True):
            arrays.copy_into(array, source)
    for i, array in tied:
        if array is not values[i]:
            arrays.copy_into(array, values[i])
    return tree.unflatten(structure, values)


def _allocate(row: TensorRow) -> tuple[Any, U8]:
    return arrays.allocate(row.dtype, row.shape, row.framework)  # type: ignore[arg-type]


def _groups(items: Sequence[T], sizes: Sequence[int]) -> Iterator[Sequence[T]]:
    """Split items into runs of about `_COPY_SIZE` bytes."""
    for first, stop in spans(np.cumsum(np.array(sizes, np.int64)), _COPY_SIZE):
        yield items[first:stop]


class _Decoded(threading.local):
    """What each thread decodes into when nobody wants the bytes."""

    def __init__(self) -> None:
        self.scratch = Scratch()


_decoded = _Decoded()


class _Window(Generic[R]):
    """Tasks in threads, at most `size` of them unfinished."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._futures: deque[Future[R]] = deque()

    def submit(self, function: Callable[..., R], *args: Any) -> None:
        self._futures.append(workers.get().submit(function, *args))
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
