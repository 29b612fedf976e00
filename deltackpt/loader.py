"""Loader: a state from its tensors, whole, in part or lazily.

Owns   which memory each array comes into, the caller's or new, on which device; arrays that read when asked.
Never  follows lists or decodes (restore.py does), or knows about steps and runs.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import numpy as np

from deltackpt import arrays, leaves, tree
from deltackpt.errors import FormatError, InvalidInputError, MissingDependencyError
from deltackpt.layout import Layout
from deltackpt.leaves import Wanted
from deltackpt.manifest import Manifest, TensorRow
from deltackpt.restore import fill, parts, spans
from deltackpt.store import Store
from deltackpt.structure import Leaf, name, where
from deltackpt.types import DTYPE_SIZES, U8, WHOLE, State, View

T = TypeVar("T")

#: Where a torch tensor goes: a device; what a device that it was saved from becomes; or a function of its
#: name and of that device.  What is mapped to None stays on the CPU.
DeviceMap = Any

#: Bytes loaded at a time on their way to other memory.
_COPY_SIZE = 64 << 20


def load(
    store: Store,
    manifest: Manifest,
    *,
    keys: str | Sequence[str] | None = None,
    into: State | None = None,
    strict: bool = True,
    device_map: DeviceMap = None,
    lazy: bool = False,
    allow_pickle: bool = False,
    reading: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> State:
    """Rebuild a state, as `deltackpt.delta.load` says; a lazy array reads inside `reading()`."""
    if into is not None and (lazy or device_map is not None):
        other = "lazy" if lazy else "map"
        raise InvalidInputError(
            f"load: found both into and {other}, expected one of them", hint=f"drop {other}"
        )
    rows, structure = manifest.tensors, manifest.structure
    if keys is not None:
        structure, _ = leaves.select(structure, [row.name for row in rows], keys)
    found = leaves.named(structure, len(rows))
    # Everything that can be told before a byte is read, and before the caller's arrays are written.
    tree.check(structure, len(rows), allow_pickle=allow_pickle)
    for leaf in found:
        check_inside(rows[leaf.at], leaf)
    if into is None:
        later = {i for i, leaf in enumerate(found) if lazy and leaf.is_array}
        values = _new(store, rows, [leaf for i, leaf in enumerate(found) if i not in later], device_map)
        if lazy:
            values = _with_lazy(store, rows, found, values, device_map, reading)
    else:
        pairs = leaves.pair_into(found, into, lambda leaf: _wanted(rows[leaf.at], leaf), strict=strict)
        placed = dict(pairs)
        dropped = {i for i, leaf in enumerate(found) if leaf.is_array and i not in placed}
        if dropped:
            structure = leaves.without(structure, len(rows), dropped)
        values = fill_into(
            store, rows, [(leaf, placed.get(i)) for i, leaf in enumerate(found) if i not in dropped]
        )
    each = iter(values)
    # Unflattening asks for leaves in the order in which they are listed.
    return tree.unflatten(structure, len(rows), lambda leaf: next(each), allow_pickle=allow_pickle)


def read(
    store: Store, manifest: Manifest, wanted: str, index: Any = ..., *, device_map: DeviceMap = None
) -> Any:
    """Read one array, or what an index picks of it, as `deltackpt.delta.read` says."""
    rows = manifest.tensors
    leaf = leaves.find(manifest.structure, [row.name for row in rows], wanted)
    check_inside(rows[leaf.at], leaf)
    return read_part(store, rows[leaf.at], leaf, index, device_map)


class Source(NamedTuple):
    """What lazy arrays of one load read from."""

    store: Store
    device_map: DeviceMap
    reading: Callable[[], AbstractContextManager[None]]


class LazyArray:
    """An array that is still in the store: it has a dtype and a shape, and reads what it is indexed by.

    Examples
    --------
    >>> from deltackpt import delta
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> store = MemoryBackend()
    >>> _ = delta.save({"w": np.arange(12).reshape(3, 4)}, store, step=1)
    >>> w = delta.load(store, lazy=True)["w"]
    >>> w
    <LazyArray w: int64 (3, 4)>
    >>> w[1, ::2]
    array([4, 6])
    """

    __slots__ = ("_leaf", "_row", "_source", "dtype", "name", "shape", "size")

    def __init__(self, source: Source, row: TensorRow, leaf: Leaf) -> None:
        _, self.dtype, layout = _wanted(row, leaf)
        self.name = name(leaf.path)
        self.shape = layout.shape
        self.size = layout.size
        self._source, self._row, self._leaf = source, row, leaf

    def __repr__(self) -> str:
        return f"<LazyArray {self.name}: {self.dtype} {self.shape}>"

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """Read what basic indexing picks: integers, slices, ``...`` and None; no more chunks than hold it."""
        return next(gather([(self, index)]))

    def __iter__(self) -> Iterator[Any]:
        """Read it row by row."""
        return (self[i] for i in range(len(self)))

    __contains__ = None  # it would read everything to answer

    def load(self) -> Any:
        """Read all of it."""
        return self[...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError("a LazyArray is no memory: reading it makes a copy")
        return np.asarray(arrays.as_numpy(self.load()), dtype)


# --- what a leaf is ---


def _layout(row: TensorRow, view: View) -> Layout:
    return view.layout or Layout.plain(row.shape, DTYPE_SIZES[row.dtype])


def _wanted(row: TensorRow, leaf: Leaf) -> Wanted:
    return Wanted(row.name, leaf.view.dtype or row.dtype, _layout(row, leaf.view))


def check_inside(row: TensorRow, leaf: Leaf) -> None:
    """Refuse a leaf whose elements reach out of its tensor."""
    if leaf.view.layout is None:
        return
    start, stop = leaf.view.layout.span
    if start < 0 or stop > row.size:
        raise FormatError(
            f"{where('state', leaf.path)}: found bytes {start} to {stop} of a tensor of {row.size} bytes"
        )


# --- into new memory ---


def _new(store: Store, rows: Sequence[TensorRow], wanted: Sequence[Leaf], device_map: DeviceMap) -> list[Any]:
    """Return what leaves stand for; those that are the same of one tensor are one object."""
    devices: dict[int, str | None] = {}
    for leaf in wanted:
        devices.setdefault(leaf.at, leaf.view.device)
    bases: dict[int, Any] = {}
    order, place = list(devices), _placer(device_map)
    # All at once unless what is loaded goes elsewhere: then this memory is needed for a moment only.
    for group in [order] if device_map is None else _groups(order, [rows[i].size for i in order]):
        made = {i: arrays.allocate(rows[i].dtype, rows[i].shape, rows[i].framework) for i in group}
        fill(store, [(rows[i], data) for i, (_, data) in made.items()])
        bases.update({i: place(rows[i].name, devices[i], array) for i, (array, _) in made.items()})
    views: dict[tuple[int, View], Any] = {}
    values = []
    for leaf in wanted:
        if leaf.view is WHOLE:
            values.append(bases[leaf.at])
            continue
        key = leaf.at, leaf.view
        if key not in views:
            views[key] = arrays.view(bases[leaf.at], leaf.view, where("state", leaf.path))
        values.append(views[key])
    return values


def _placer(device_map: DeviceMap) -> Callable[[str, str | None, Any], Any]:
    """Return what moves an array, given its tensor's name and the device it was saved from."""
    if device_map is None:
        return lambda called, device, array: array
    if not arrays.has_torch():
        raise MissingDependencyError(
            "map: places torch's tensors, and torch is not installed", hint="pip install 'deltackpt[torch]'"
        )

    def place(called: str, device: str | None, array: Any) -> Any:
        if isinstance(array, np.ndarray):
            return array
        if isinstance(device_map, Mapping):
            target = device_map.get(device or "cpu")
        elif callable(device_map):
            target = device_map(called, device or "cpu")
        else:
            target = device_map
        try:
            return array if target is None else array.to(sys.modules["torch"].device(target))
        except (RuntimeError, TypeError, AssertionError) as error:  # torch's ways of saying no such device
            message = str(error).partition("\n")[0]
            raise InvalidInputError(
                f"map: cannot place {called!r} on {target!r}: {message}",
                hint="map to a device that torch has here, as 'cpu' or 'cuda:0'",
            ) from error

    return place


def _groups(items: Sequence[T], sizes: Sequence[int]) -> Iterator[Sequence[T]]:
    """Split items into runs of about `_COPY_SIZE` bytes."""
    for first, stop in spans(np.cumsum(np.array(sizes, np.int64)), _COPY_SIZE):
        yield items[first:stop]


# --- into the caller's memory ---


def fill_into(store: Store, rows: Sequence[TensorRow], pairs: Sequence[tuple[Leaf, Any]]) -> list[Any]:
    """Fill the caller's arrays; return what leaves stand for, given each with its array, or with None."""
    direct: dict[int, U8] = {}  # tensor: the memory that it is read into
    long: dict[int, U8] = {}  # tensor: the bytes, text or pickle in it
    others: dict[int, list[tuple[Leaf, Any]]] = {}  # tensor: arrays to copy it to
    for leaf, array in pairs:
        row, layout = rows[leaf.at], _layout(rows[leaf.at], leaf.view)
        if not leaf.is_array:
            long[leaf.at] = np.empty(row.size, np.uint8)
            continue
        data = arrays.destination(array, _wanted(row, leaf).dtype, layout, where("into", leaf.path))
        is_whole = layout.span == (0, row.size) and layout.is_solid()
        if data is not None and is_whole and leaf.at not in direct:
            direct[leaf.at] = data
        elif layout.size and not (data is not None and is_whole and _is_same(data, direct[leaf.at])):
            others.setdefault(leaf.at, []).append((leaf, array))
    fill(store, [(rows[i], data) for part in (direct, long) for i, data in part.items()])
    left = [i for i in others if i not in direct]
    for group in _groups(left, [rows[i].size for i in left]):
        temporary = {i: np.empty(rows[i].size, np.uint8) for i in group}
        fill(store, [(rows[i], data) for i, data in temporary.items()])
        for i, data in temporary.items():
            _copy(rows[i], others[i], data)
    for i in others.keys() & direct.keys():
        _copy(rows[i], others[i], direct[i])
    return [array if leaf.is_array else long[leaf.at] for leaf, array in pairs]


def _is_same(a: U8, b: U8) -> bool:
    """Whether two views are of the same memory: what is tied is filled once."""
    return a.size == b.size and a.ctypes.data == b.ctypes.data


def _copy(row: TensorRow, targets: Sequence[tuple[Leaf, Any]], data: Any) -> None:
    for leaf, array in targets:
        arrays.copy_into(array, data, _layout(row, leaf.view))


# --- a part, or later ---


def _with_lazy(
    store: Store,
    rows: Sequence[TensorRow],
    found: Sequence[Leaf],
    others: Sequence[Any],
    device_map: DeviceMap,
    reading: Callable[[], AbstractContextManager[None]],
) -> list[Any]:
    """Return what leaves stand for: lazy arrays, one for those that are the same, and what else there is."""
    made: dict[tuple[int, View], LazyArray] = {}
    source = Source(store, device_map, reading)
    each = iter(others)
    values = []
    for leaf in found:
        if not leaf.is_array:
            values.append(next(each))
            continue
        key = leaf.at, leaf.view
        if key not in made:
            made[key] = LazyArray(source, rows[leaf.at], leaf)
        values.append(made[key])
    return values


def gather(picks: Sequence[tuple[LazyArray, Any]]) -> Iterator[Any]:
    """Yield what indices pick of lazy arrays of one load, in order, each as an array of its own.

    They are read together, and kept until they are yielded: 64 MiB at a time, or one that is larger.
    """
    if picks:
        store, device_map, reading = picks[0][0]._source
        wanted = [(lazy._row, lazy._leaf, index) for lazy, index in picks]
        yield from read_parts(store, wanted, device_map, reading)


def read_part(store: Store, row: TensorRow, leaf: Leaf, index: Any, device_map: DeviceMap) -> Any:
    """Return what an index picks of a leaf's array, as an array of its own."""
    return next(read_parts(store, [(row, leaf, index)], device_map))


def read_parts(
    store: Store,
    wanted: Sequence[tuple[TensorRow, Leaf, Any]],
    device_map: DeviceMap,
    reading: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Any]:
    """Yield what indices pick of leaves' arrays, as `gather` does; each read is inside `reading()`."""
    picks = [
        _Pick(row, leaf.view, _layout(row, leaf.view).indexed(index, f"index of {name(leaf.path)!r}"))
        for row, leaf, index in wanted
    ]
    place = _placer(device_map)
    sizes = [min(pick.read_size(store.chunker.max_size), _COPY_SIZE) for pick in picks]
    for group in _groups(picks, sizes):
        with reading():
            whole = {i: p.allocated() for i, p in enumerate(group) if p.is_whole}
            fill(store, [(group[i].row, data) for i, (_, data) in whole.items()])
            cut = deque(parts(store, [(p.row, p.layout) for i, p in enumerate(group) if i not in whole]))
        for i, p in enumerate(group):
            array = (
                whole.pop(i)[0] if i in whole else arrays.compact(p.dtype, p.row.framework, *cut.popleft())
            )
            yield place(p.row.name, p.view.device, array)
            del array


class _Pick(NamedTuple):
    """What was picked of a view of a tensor: where its elements lie in the tensor."""

    row: TensorRow
    view: View
    layout: Layout

    @property
    def dtype(self) -> str:
        return self.view.dtype or self.row.dtype

    def read_size(self, chunk_size: int) -> int:
        """Return how much memory reading it takes: from its first chunk to its last."""
        start, stop = self.layout.span
        return min(self.row.size, stop - start + chunk_size)

    def allocated(self) -> tuple[Any, U8]:
        return arrays.allocate(self.row.dtype, self.row.shape, self.row.framework)

    @property
    def is_whole(self) -> bool:
        whole = Layout.plain(self.row.shape, self.layout.itemsize)
        return self.dtype == self.row.dtype and self.layout == whole
