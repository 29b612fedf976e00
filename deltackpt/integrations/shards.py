"""Shards: a step of several ranks as a state, and back.

Owns   where each shard stands in the state, and stood in shards of another number of ranks; what ranks have
       written put together; reading boxes of shards.
Never  opens a session, or decides a step.

The state that such a step holds, as any other::

    {"tensors": {name: {"0,0": shard, "128,0": shard, ...}},     shards by their offsets
     "values": {name: what is no tensor},
     "sizes": {name: torch.Size},
     "requires_grad": {name: bool},
     "planner_data": what the planner needs to nest it again}
"""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple
from operator import gt, itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlanner,
    ReadItem,
    SavePlanner,
    WriteItem,
    WriteItemType,
)

from deltackpt import leaves, loader, tree
from deltackpt.energy import Energy
from deltackpt.errors import ConflictError, CorruptError, InvalidInputError
from deltackpt.manifest import Manifest, TensorRow
from deltackpt.memory import Known, Memory, Pieces
from deltackpt.records import Commit, Figures
from deltackpt.run import Run
from deltackpt.session import Part
from deltackpt.structure import Json, Leaf, view_node
from deltackpt.tally import folded
from deltackpt.types import Deferred, State, Tensor

_KINDS = ("tensors", "values")
#: What a shard is called: its offsets.
_OFFSETS = r"[0-9]{1,18}(,[0-9]{1,18})*"
#: A chunk costs some 180 bytes beside its own: pieces are not to be smaller on average.
_PIECE_SIZE = 16 << 10
_FIRST = itemgetter(0)
_KEYS = (*_KINDS, "sizes", "requires_grad", "planner_data")


class Written(NamedTuple):
    """What one rank has written, on its way to the coordinator.

    Parameters
    ----------
    part : Part
    rows : list of TensorRow
    nodes : dict
        Of each kind, the structure's node for each name; tensors are counted in `rows`.
    figures : Figures
    """

    part: Part
    rows: list[TensorRow]
    nodes: dict[str, dict[str, Json]]
    figures: Figures


def of_rank(items: Sequence[WriteItem], planner: SavePlanner) -> State:
    """Return what a rank is to write, as a state."""
    state: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
    for item in items:
        fqn = item.index.fqn
        if item.type is not WriteItemType.BYTE_IO:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor)
            state["tensors"].setdefault(fqn, {})[_key(item.index)] = tensor.detach()
        elif hasattr(planner, "lookup_object"):
            state["values"][fqn] = planner.lookup_object(item.index)
        else:
            raise InvalidInputError(
                f"dcp.save: the {type(planner).__name__} gives {fqn!r} as a pickle only",
                hint="use a planner with lookup_object, as DefaultSavePlanner and what is derived from it",
            )
    return state


def _key(index: MetadataIndex) -> str:
    """Return what a shard is called: its offsets, 0 of a scalar."""
    return ",".join(map(str, index.offset or (0,)))


def needed(rows: list[TensorRow], state: State) -> list[TensorRow]:
    """Return of a step's tensors those that a rank saves again: of a thousand ranks' a thousandth.

    All of them, if it has other shards of the same tensors.
    """
    mine = {
        (fqn, key, tuple(shard.shape))
        for fqn, shards in state["tensors"].items()
        for key, shard in shards.items()
    }
    there = [(*_split(row.name), row.shape) for row in rows]
    others = {fqn for fqn, _, _ in mine.difference(there)}
    if any(fqn in others for fqn, _, _ in there):
        return rows
    return [row for row, shard in zip(rows, there, strict=True) if shard in mine or shard[0] is None]


def _split(name: str) -> tuple[str | None, str]:
    """Return of which tensor a shard of this name is, and at which offsets; None of what is none."""
    tensor, _, key = name.rpartition(".")
    return (tensor.removeprefix("tensors."), key) if tensor.startswith("tensors.") else (None, "")


class _Band(NamedTuple):
    """What shards have in common that are rows of the same columns of a tensor."""

    tensor: str
    dtype: str
    columns: tuple[int, ...]
    sizes: tuple[int, ...]


def resharded(memory: Memory, tensors: Sequence[Tensor | Deferred]) -> Memory:
    """Return a memory that knows where new shards stood in others: there are more or fewer ranks than before.

    Only shards by rows, which are contiguous in each other; those that were sharded by columns too are
    compared with shards of the same columns.
    """
    new = [tensor for tensor in tensors if tensor.size and memory.same_place(tensor) is None]
    places = {tensor.name: place for tensor in new if (place := _place(tensor)) is not None}
    bands: dict[_Band, list[tuple[int, Known]]] = {band: [] for band, _ in places.values()}
    for known in memory if bands else ():
        found = _place(known.row)
        if found is not None and found[0] in bands:
            bands[found[0]].append((found[1], known))
    for shards in bands.values():
        shards.sort(key=_FIRST)
    memory.pieces = {}  # of the tensors it was given before
    for tensor in new:
        if tensor.name in places:
            band, start = places[tensor.name]
            pieces = _pieces(start, tensor.size, bands[band])
            if pieces is not None:
                memory.pieces[tensor.name] = pieces
    return memory


def _place(tensor: Tensor | Deferred | TensorRow) -> tuple[_Band, int] | None:
    """Return the band of a shard, and at which of its bytes it begins; None of what is not called as one."""
    fqn, key = _split(tensor.name)
    if fqn is None or not re.fullmatch(_OFFSETS, key) or not tensor.shape:
        return None
    row, *columns = map(int, key.split(","))
    if len(columns) + 1 != len(tensor.shape):
        return None
    band = _Band(fqn, tensor.dtype, tuple(columns), tensor.shape[1:])
    return band, row * (tensor.size // tensor.shape[0])


def _pieces(start: int, size: int, shards: Sequence[tuple[int, Known]]) -> Pieces | None:
    """Return where bytes of a band stood in its shards; None if some did not, or in too many chunks."""
    at, stop, n = start, start + size, 0
    parts = []
    # From the one that it begins in: a band has as many shards as there were ranks.
    for k in range(max(0, bisect_right(shards, start, key=_FIRST) - 1), len(shards)):
        first, known = shards[k]
        # Within the shard: offsets are anybody's, and may be too large for an array.
        low, high = at - first, min(stop - first, int(known.ends[-1]))
        if not 0 <= low < high:
            break
        i, j = np.searchsorted(known.ends, low, "right"), np.searchsorted(known.ends, high) + 1
        begins = np.append(known.ends[i - 1] if i else 0, known.ends[i : j - 1])
        ends = np.minimum(known.ends[i:j], high)
        parts.append(Pieces(ends + (first - start), known.ids[i:j], np.maximum(begins, low) - begins))
        at, n = first + high, n + len(ends)
    if at < stop or n > max(1, size // _PIECE_SIZE):
        return None
    return Pieces(*(np.concatenate(columns) for columns in zip(*map(astuple, parts), strict=True)))


def together(metadata: Metadata, everything: Sequence[Written]) -> Manifest:
    """Return what all ranks have written as one snapshot."""
    rows: list[TensorRow] = []
    nodes: dict[str, dict[str, Json]] = {kind: {} for kind in _KINDS}
    for written in everything:
        names, start = [row.name for row in written.rows], len(rows)

        def moved(leaf: Leaf, name: str, start: int = start) -> Json:
            return view_node(start + leaf.at, leaf.view) if leaf.is_array else {leaf.tag: start + leaf.at}

        mine = {
            kind: leaves.rewritten({"map": node}, names, moved)["map"] for kind, node in written.nodes.items()
        }
        for fqn, shards in mine["tensors"].items():
            nodes["tensors"].setdefault(fqn, {"map": {}})["map"].update(shards["map"])
        nodes["values"].update(mine["values"])
        rows += written.rows
    found = metadata.state_dict_metadata
    tensors = {fqn: m for fqn, m in found.items() if isinstance(m, TensorStorageMetadata)}
    rest = tree.flatten(
        {
            "sizes": {fqn: m.size for fqn, m in tensors.items()},
            "requires_grad": {fqn: m.properties.requires_grad for fqn, m in tensors.items()},
            "planner_data": metadata.planner_data,
        }
    )
    if rest.tensors:
        raise InvalidInputError(
            f"dcp.save: the planner's data has {rest.tensors[0].name!r}, an array or a long text",
            hint="use DefaultSavePlanner, or one that is derived from it",
        )
    return Manifest(
        {"map": {**{kind: {"map": node} for kind, node in nodes.items()}, **rest.structure["map"]}}, rows
    )


def figures_of(parts: Sequence[Figures], written_size: int, energy: Energy) -> Figures:
    """Return the figures of all ranks together, and of what the coordinator took to decide for them."""
    names = dict.fromkeys(name for part in parts for name in part.seconds)
    return Figures(
        sum(part.logical_size for part in parts),
        sum(part.new_size for part in parts),
        written_size + sum(part.written_size for part in parts),
        sum(part.n_tensors for part in parts),
        sum(part.n_chunks for part in parts),
        sum(part.n_new_chunks for part in parts),
        {name: sum(part.seconds.get(name, 0.0) for part in parts) for name in names},
        folded([cost for part in parts for cost in part.groups]),
        Energy.total([energy, *(part.energy for part in parts if part.energy is not None)]),
    )


class Step(NamedTuple):
    """A step as a reader needs it.

    Parameters
    ----------
    run : Run
    commit : Commit
    manifest : Manifest
    state : dict
        All of it but the values; a `Leaf` stands for each shard.
    allow_pickle : bool
    """

    run: Run
    commit: Commit
    manifest: Manifest
    state: dict[str, Any]
    allow_pickle: bool

    @classmethod
    def of(cls, run: Run, step: int | str, allow_pickle: bool) -> Step:
        """Look a step up, and check that it holds what `together` makes.

        Raises
        ------
        NotFoundError
            If there is no such step.
        InvalidInputError
            If it was saved otherwise.
        CorruptError
            If it holds what no writer has written.
        """
        commit = run.commit(step)
        with run.reading(commit):
            manifest = run.store.read_manifest(commit)
            parts = manifest.structure.get("map") if isinstance(manifest.structure, dict) else None
            if not isinstance(parts, dict) or not all(key in parts for key in _KEYS):
                raise InvalidInputError(
                    f"run {run.name!r} step {commit.slot.step}: was not saved by a DeltaStorageWriter",
                    hint="load it by deltackpt.load",
                )
            outside = {"map": {key: parts[key] for key in _KEYS if key != "values"}}
            state = tree.unflatten(outside, len(manifest.tensors), lambda leaf: leaf)
            found = cls(run, commit, manifest, state, allow_pickle)
            found._check()
        return found

    def _check(self) -> None:
        """Refuse what no writer has written: a store's files are anybody's."""
        tensors, sizes, values = self.state["tensors"], self.state["sizes"], self._values()
        if not all(isinstance(x, dict) for x in (tensors, sizes, values, self.state["requires_grad"])):
            raise CorruptError("tensors, sizes, requires_grad or values are no dicts")
        for fqn, shards in tensors.items():
            size = sizes.get(fqn)
            if not isinstance(size, torch.Size) or not isinstance(shards, dict) or not shards:
                raise CorruptError(f"tensor {fqn!r}: has no shards, or no size")
            for key, leaf in shards.items():
                is_array = isinstance(leaf, Leaf) and self.manifest.tensors[leaf.at].framework == "torch"
                if not is_array or not re.fullmatch(_OFFSETS, str(key)):
                    raise CorruptError(f"tensor {fqn!r}: shard {key!r} is no tensor, or not at offsets")
                loader.check_inside(self.manifest.tensors[leaf.at], leaf)
                shape = self._shape(leaf)
                offsets = _offsets(key, shape)
                ends = [a + n for a, n in zip(offsets, shape, strict=False)]
                if len(shape) != len(size) or len(offsets) != len(size) or any(map(gt, ends, size)):
                    raise CorruptError(
                        f"tensor {fqn!r}: shard {key!r} of shape {shape} is not in {tuple(size)}"
                    )
                if self._dtype(leaf) != self._dtype(next(iter(shards.values()))):
                    raise CorruptError(f"tensor {fqn!r}: its shards are of several dtypes")
                if not isinstance(getattr(torch, self._dtype(leaf), None), torch.dtype):
                    raise CorruptError(f"tensor {fqn!r}: torch has no {self._dtype(leaf)}")

    def _values(self) -> Any:
        node = self.manifest.structure["map"]["values"]
        return node.get("map") if isinstance(node, dict) else None

    def metadata(self) -> Metadata:
        """Return what torch wants to know of it."""
        found: dict[str, Any] = {}
        for fqn, shards in self.state["tensors"].items():
            dtype = self._dtype(next(iter(shards.values())))
            chunks = [
                ChunkStorageMetadata(_offsets(key, self._shape(leaf)), torch.Size(self._shape(leaf)))
                for key, leaf in shards.items()
            ]
            properties = TensorProperties(
                dtype=getattr(torch, dtype), requires_grad=self.state["requires_grad"].get(fqn) is True
            )
            found[fqn] = TensorStorageMetadata(properties, self.state["sizes"][fqn], chunks)
        found |= {fqn: BytesStorageMetadata() for fqn in self._values()}
        where = StorageMeta(checkpoint_id=str(self.commit.slot.step))
        return Metadata(found, self.state["planner_data"], storage_meta=where)

    def read(self, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        """Hand out what is asked for: whole shards straight into their place, of others the parts."""
        whole: list[tuple[ReadItem, Leaf, torch.Tensor]] = []
        cut: list[tuple[ReadItem, Leaf, torch.Tensor, tuple[slice, ...]]] = []
        rows = self.manifest.tensors
        with self.run.reading(self.commit):
            for item in items:
                if item.type is LoadItemType.BYTE_IO:
                    self._load_value(item, planner)
                    continue
                leaf = self.state["tensors"].get(item.storage_index.fqn, {}).get(_key(item.storage_index))
                if leaf is None:
                    raise changed(self.commit)
                target = planner.resolve_tensor(item).detach()
                # A part is cast as torch does.
                is_same_kind = target.dtype == getattr(torch, self._dtype(leaf))
                if tuple(item.lengths) == self._shape(leaf) and is_same_kind:
                    whole.append((item, leaf, target))
                    continue
                index = tuple(
                    slice(a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True)
                )
                cut.append((item, leaf, target, index))
            wanted = [(rows[leaf.at], leaf, index) for _, leaf, _, index in cut]
            parts = loader.read_parts(self.run.store, wanted, "cpu")
            for (item, _, target, _), part in zip(cut, parts, strict=True):
                target.copy_(part)
                planner.commit_tensor(item, target)
            loader.fill_into(self.run.store, rows, [(leaf, target) for _, leaf, target in whole])
        for item, _, target in whole:
            planner.commit_tensor(item, target)

    def _load_value(self, item: ReadItem, planner: LoadPlanner) -> None:
        """Give a value to the planner, which takes pickles only: one that this process has just made."""
        values = self._values()
        if item.storage_index.fqn not in values:
            raise changed(self.commit)
        node = values[item.storage_index.fqn]
        value = loader.load(
            self.run.store,
            Manifest(node, self.manifest.tensors),
            device_map="cpu",
            allow_pickle=self.allow_pickle,
        )
        data = io.BytesIO()
        torch.save(value, data)
        data.seek(0)
        planner.load_bytes(item, data)

    def _dtype(self, leaf: Leaf) -> str:
        return leaf.view.dtype or self.manifest.tensors[leaf.at].dtype

    def _shape(self, leaf: Leaf) -> tuple[int, ...]:
        return leaf.view.layout.shape if leaf.view.layout else self.manifest.tensors[leaf.at].shape


def changed(commit: Commit) -> ConflictError:
    """Return the error of ranks that have looked at different attempts or steps."""
    return ConflictError(
        f"run {commit.slot.run!r} step {commit.slot.step}: was saved while the ranks looked at it",
        hint="load again",
    )


def _offsets(key: str, shape: tuple[int, ...]) -> torch.Size:
    return torch.Size([int(n) for n in key.split(",")][: len(shape)])
