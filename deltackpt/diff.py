"""A diff: what two snapshots do not share, tensor by tensor and value by value.

Owns   the comparison of two manifests and their chunks, as a pure function, and its words.
Never  reads a store, or looks at a tensor's elements: equal chunk ids are equal bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from deltackpt import leaves, tree
from deltackpt.errors import DeltackptError
from deltackpt.format import dump_json
from deltackpt.manifest import Manifest, TensorRow
from deltackpt.report import human_size, one_line

Fate: TypeAlias = Literal["same", "changed", "added", "removed", "retyped"]
FATES: tuple[Fate, ...] = ("same", "changed", "added", "removed", "retyped")

#: Characters of a value, and lines of each kind, that are shown.
_VALUE_MAX = 60
_N_LINES_MAX = 50


class Side(NamedTuple):
    """One of the snapshots: what to call it, its manifest, and each tensor's chunks as LIST_ROW."""

    label: str
    manifest: Manifest
    chunks: Sequence[npt.NDArray[np.void]]


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
    """

    name: str
    fate: Fate
    old: str | None
    new: str | None
    size: int
    n_chunks: int
    differing_size: int
    n_differing: int


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
        return {**asdict(self), **counts, **totals, "is_empty": self.is_empty}

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
    """Compare two snapshots.

    Raises
    ------
    FormatError
        If a structure is malformed.
    """
    before = {row.name: (row, chunks) for row, chunks in zip(old.manifest.tensors, old.chunks, strict=True)}
    tensors = []
    for row, chunks in zip(new.manifest.tensors, new.chunks, strict=True):
        found = before.pop(row.name, None)
        tensors.append(_added("added", row, chunks) if found is None else _pair(*found, row, chunks))
    tensors += [_added("removed", row, chunks) for row, chunks in before.values()]
    values = _values(_leaves(old.manifest), _leaves(new.manifest))
    renested = False
    if not values and all(tensor.old and tensor.new for tensor in tensors):
        renested = _nesting(old.manifest) != _nesting(new.manifest)
    return Diff(old.label, new.label, tensors, values, renested)


def _pair(
    old: TensorRow, old_chunks: npt.NDArray[np.void], new: TensorRow, new_chunks: npt.NDArray[np.void]
) -> TensorDiff:
    n_chunks = len(new_chunks)
    told = _type(old), _type(new), new.size, n_chunks
    if (old.level, old.root) == (new.level, new.root):
        return TensorDiff(new.name, "same" if told[0] == told[1] else "retyped", *told, 0, 0)
    # Counted: of two equal chunks where there was one before, the second differs.
    there = Counter(chunk["id"].tobytes() for chunk in old_chunks)
    n_differing = differing_size = 0
    for chunk in new_chunks:
        chunk_id = chunk["id"].tobytes()
        there[chunk_id] -= 1
        if there[chunk_id] < 0:
            n_differing += 1
            differing_size += int(chunk["size"])
    fate: Fate = "changed" if told[0] == told[1] else "retyped"
    return TensorDiff(new.name, fate, *told, differing_size, n_differing)


def _added(fate: Literal["added", "removed"], row: TensorRow, chunks: npt.NDArray[np.void]) -> TensorDiff:
    old, new = (None, _type(row)) if fate == "added" else (_type(row), None)
    return TensorDiff(row.name, fate, old, new, row.size, len(chunks), row.size, len(chunks))


def _type(row: TensorRow) -> str:
    framework = "" if row.framework == "numpy" else f"{row.framework} "
    return f"{framework}{row.dtype} {'x'.join(map(str, row.shape)) or 'scalar'}"


def _told(tensor: TensorDiff) -> str:
    if tensor.old is None or tensor.new is None:
        return f"{tensor.old or tensor.new}, {human_size(tensor.size)}"
    retyped = f"{tensor.old} -> {tensor.new}, " if tensor.fate == "retyped" else ""
    differing = f"{human_size(tensor.differing_size)} of {human_size(tensor.size)}"
    return f"{retyped}{differing}, {tensor.n_differing} of {tensor.n_chunks} chunks"


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
