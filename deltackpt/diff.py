"""A diff: what two snapshots do not share, tensor by tensor and value by value.

Owns   the comparison of two manifests, their chunks and, if it is given a way to read them, the elements in
       those that differ; and its words.
Never  reads a store, or a chunk that both have: equal chunk ids are equal bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from deltackpt import leaves, tree
from deltackpt.distance import Distance, Meter, windows
from deltackpt.errors import DeltackptError
from deltackpt.format import dump_json
from deltackpt.manifest import Manifest, TensorRow
from deltackpt.report import human_size, one_line
from deltackpt.types import DTYPE_SIZES, U8

Fate: TypeAlias = Literal["same", "changed", "added", "removed", "retyped"]
FATES: tuple[Fate, ...] = ("same", "changed", "added", "removed", "retyped")

#: Characters of a value, and lines of each kind, that are shown.
_VALUE_MAX = 60
_N_LINES_MAX = 50


class Side(NamedTuple):
    """One of the snapshots.

    Parameters
    ----------
    label : str
        What to call it.
    manifest : Manifest
    chunks : sequence of ndarray of LIST_ROW
        Each tensor's.
    read : callable, optional
        Returns the bytes of a tensor, given by its row and chunks, from start to stop.
    """

    label: str
    manifest: Manifest
    chunks: Sequence[npt.NDArray[np.void]]
    read: Callable[[TensorRow, npt.NDArray[np.void], int, int], U8] | None = None


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """How a tensor of one name differs.

    Parameters
    ----------
    name : str
    fate : {"same", "changed", "added", "removed", "retyped"}
        retyped: its dtype, its shape or its framework is another.
    old, new : str or None
        Those on either side; None where it is not there.
    size, n_chunks : int
        Bytes and chunks of the new tensor; of one removed, of the old.
    differing_size, n_differing : int
        Of those, what the other side's tensor of this name does not have, by chunk id.
    distance : Distance or None
        How far the elements are from the old ones; None if the bytes are equal, if dtype or shape is another,
        or if they were not to be read.
    """

    name: str
    fate: Fate
    old: str | None
    new: str | None
    size: int
    n_chunks: int
    differing_size: int
    n_differing: int
    distance: Distance | None = None


@dataclass(frozen=True, slots=True)
class ValueDiff:
    """A value that is no tensor and differs: its key path and both as text, None where it is not there."""

    name: str
    old: str | None
    new: str | None


@dataclass(frozen=True, slots=True)
class Diff:
    """What differs between two snapshots.

    Equal bytes that were cut at other places, or stand under another name, count as different.

    Parameters
    ----------
    old, new : str
        What the snapshots are called.
    tensors : list of TensorDiff
        All of them, in the order of the new snapshot; those removed last.
    values : list of ValueDiff
        The other values that differ.
    renested : bool
        Whether all tensors and values have their equal, but the containers, the order of keys or which
        tensors are tied differ.
    """

    old: str
    new: str
    tensors: list[TensorDiff]
    values: list[ValueDiff]
    renested: bool

    @property
    def is_empty(self) -> bool:
        """Whether both snapshots load as the same state, bit for bit."""
        return not self.values and not self.renested and all(t.fate == "same" for t in self.tensors)

    def count(self, fate: Fate) -> int:
        """Return how many tensors have this fate."""
        return sum(tensor.fate == fate for tensor in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the new snapshot's tensors."""
        return sum(tensor.size for tensor in self.tensors if tensor.fate != "removed")

    @property
    def differing_size(self) -> int:
        """Of those, bytes in chunks that the old tensor of the same name does not have."""
        return sum(tensor.differing_size for tensor in self.tensors if tensor.fate != "removed")

    def to_json(self) -> dict[str, Any]:
        """Return the diff as plain values, with its totals."""
        totals = {"size": self.size, "differing_size": self.differing_size}
        counts = {f"n_{fate}": self.count(fate) for fate in FATES}
        told = asdict(self)
        for row, tensor in zip(told["tensors"], self.tensors, strict=True):
            row["distance"] = tensor.distance.to_json() if tensor.distance else None
        return {**told, **counts, **totals, "is_empty": self.is_empty}

    def __str__(self) -> str:
        tensors = [(t.fate, one_line(t.name), _told(t)) for t in self.tensors if t.fate != "same"]
        values = [
            ("value", one_line(v.name), f"{_or_absent(v.old)} -> {_or_absent(v.new)}") for v in self.values
        ]
        lines = [line for part in (tensors, values) for line in part[:_N_LINES_MAX]]
        widths = [max((len(line[i]) for line in lines), default=0) for i in (0, 1)]
        told = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in lines]
        n_more = len(tensors) + len(values) - len(lines)
        told += [f"and {n_more} more"] if n_more else []
        told += ["containers, the order of keys, or ties differ"] if self.renested else []
        counts = ", ".join(f"{self.count(fate)} {fate}" for fate in FATES)
        sizes = f"{human_size(self.differing_size)} of {human_size(self.size)} differ"
        return "\n".join([f"{self.old} -> {self.new}", *told, f"{counts}; {sizes}"])


def compare(old: Side, new: Side) -> Diff:
    """Compare two snapshots, by their elements too if both can be read.

    Raises
    ------
    FormatError
        If a structure is malformed, or what is read is damaged.
    """
    before = _tensors(old)
    tensors = []
    for name, tensor in _tensors(new).items():
        found = before.pop(name, None)
        tensors.append(_added("added", tensor) if found is None else _pair(found, tensor))
    tensors += [_added("removed", tensor) for tensor in before.values()]
    values = _values(_leaves(old.manifest), _leaves(new.manifest))
    renested = False
    if not values and all(tensor.old and tensor.new for tensor in tensors):
        renested = _nesting(old.manifest) != _nesting(new.manifest)
    return Diff(old.label, new.label, tensors, values, renested)


class _Stored(NamedTuple):
    """A tensor of a side, and whether its elements are what its dtype says."""

    side: Side
    row: TensorRow
    chunks: npt.NDArray[np.void]
    is_number: bool

    def read(self, start: int, stop: int) -> U8:
        assert self.side.read is not None
        return self.side.read(self.row, self.chunks, start, stop)


def _tensors(side: Side) -> dict[str, _Stored]:
    rows = side.manifest.tensors
    numbers = _numbers(side.manifest) if side.read else set()
    found = zip(rows, side.chunks, strict=True)
    return {row.name: _Stored(side, row, chunks, i in numbers) for i, (row, chunks) in enumerate(found)}


def _numbers(manifest: Manifest) -> set[int]:
    """Return the tensors whose dtype is an array's own: text, times and pickles are only carried."""
    found = leaves.named(manifest.structure, len(manifest.tensors))
    return {
        leaf.at
        for leaf in found
        if leaf.is_array and leaf.view.dtype in (None, manifest.tensors[leaf.at].dtype)
    }


def _pair(old: _Stored, new: _Stored) -> TensorDiff:
    told = _type(old.row), _type(new.row), new.row.size, len(new.chunks)
    if (old.row.level, old.row.root) == (new.row.level, new.row.root):
        return TensorDiff(new.row.name, "same" if told[0] == told[1] else "retyped", *told, 0, 0)
    # Counted: of two equal chunks where there was one before, the second differs.
    there = Counter(chunk["id"].tobytes() for chunk in old.chunks)
    n_differing = differing_size = 0
    for chunk in new.chunks:
        chunk_id = chunk["id"].tobytes()
        there[chunk_id] -= 1
        if there[chunk_id] < 0:
            n_differing += 1
            differing_size += int(chunk["size"])
    fate: Fate = "changed" if told[0] == told[1] else "retyped"
    return TensorDiff(new.row.name, fate, *told, differing_size, n_differing, _distance(old, new))


def _distance(old: _Stored, new: _Stored) -> Distance | None:
    is_alike = (old.row.dtype, old.row.shape) == (new.row.dtype, new.row.shape)
    if not is_alike or old.side.read is None or new.side.read is None:
        return None
    meter = Meter(new.row.dtype, new.row.size, is_number=old.is_number and new.is_number)
    for start, stop in windows(old.chunks, new.chunks, DTYPE_SIZES[new.row.dtype]):
        meter.add(old.read(start, stop), new.read(start, stop))
    return meter.distance()


def _added(fate: Literal["added", "removed"], tensor: _Stored) -> TensorDiff:
    row, n_chunks = tensor.row, len(tensor.chunks)
    old, new = (None, _type(row)) if fate == "added" else (_type(row), None)
    return TensorDiff(row.name, fate, old, new, row.size, n_chunks, row.size, n_chunks)


def _type(row: TensorRow) -> str:
    framework = "" if row.framework == "numpy" else f"{row.framework} "
    return f"{framework}{row.dtype} {'x'.join(map(str, row.shape)) or 'scalar'}"


def _told(tensor: TensorDiff) -> str:
    if tensor.old is None or tensor.new is None:
        return f"{tensor.old or tensor.new}, {human_size(tensor.size)}"
    retyped = f"{tensor.old} -> {tensor.new}, " if tensor.fate == "retyped" else ""
    differing = f"{human_size(tensor.differing_size)} of {human_size(tensor.size)}"
    distance = f"; {tensor.distance}" if tensor.distance else ""
    return f"{retyped}{differing}, {tensor.n_differing} of {tensor.n_chunks} chunks{distance}"


# -- values


def _leaves(manifest: Manifest) -> dict[str, Any]:
    return leaves.plain_leaves(manifest.structure, [row.name for row in manifest.tensors])


def _values(old: dict[str, Any], new: dict[str, Any]) -> list[ValueDiff]:
    """Compare leaves as JSON: 1, 1.0 and True differ, and a NaN is equal to itself."""
    found = []
    for name in dict.fromkeys((*new, *old)):
        a, b = (dump_json(values[name]) if name in values else None for values in (old, new))
        if a != b:
            found.append(ValueDiff(name, _text(old, name), _text(new, name)))
    return found


def _text(values: dict[str, Any], name: str) -> str | None:
    """Return a value as Python writes it, cut short if it is long."""
    if name not in values:
        return None
    try:
        text = repr(tree.unflatten(values[name], 0, lambda leaf: None))
    except DeltackptError:  # of a class that is not imported here
        text = dump_json(values[name]).decode()
    n_more = len(text) - _VALUE_MAX
    return f"{text[:_VALUE_MAX]}... and {n_more} more" if n_more > 0 else text


def _or_absent(text: str | None) -> str:
    return "absent" if text is None else text


def _nesting(manifest: Manifest) -> bytes:
    return dump_json([manifest.structure, [row.name for row in manifest.tensors]])
