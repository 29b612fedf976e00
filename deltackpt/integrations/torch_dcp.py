"""PyTorch's distributed checkpoints: a storage writer and reader for ``torch.distributed.checkpoint``.

Owns   how a step of several ranks is a state, and the way of each rank's part into it.
Never  puts a pickle into a store unasked, or makes a step visible before every part of it is durable.

Each rank is a session of its own that fills its own packs; all of them are of one slot.  They hand over what
they have published, and the coordinator decides for all.  So a rank that dies leaves nothing to be seen, and
gc needs to know nothing of ranks.  The state that such a step holds, as any other::

    {"tensors": {name: {"0,0": shard, "128,0": shard, ...}},     shards by their offsets
     "values": {name: what is no tensor},
     "sizes": {name: torch.Size},
     "requires_grad": {name: bool},
     "planner_data": what the planner needs to nest it again}
"""

from __future__ import annotations

import io
import logging
import os
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from operator import gt
from typing import Any, NamedTuple

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
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from deltackpt import leaves, loader, snapshot, tree
from deltackpt.efforts import Optimize, check_optimize
from deltackpt.errors import ConflictError, CorruptError, DeltackptError, InvalidInputError
from deltackpt.manifest import Manifest, TensorRow
from deltackpt.records import Commit, Fence, Figures, SessionName, check_run, check_step
from deltackpt.report import SaveReport
from deltackpt.retention import Rule
from deltackpt.run import Run, check_metadata, check_metrics, open_run
from deltackpt.saver import Saver, What
from deltackpt.session import Part
from deltackpt.shadow import SIZE_MAX, Shadow
from deltackpt.store import Store, open_store
from deltackpt.structure import Json, Leaf, view_node
from deltackpt.tally import folded
from deltackpt.types import State

log = logging.getLogger("deltackpt")

_KINDS = ("tensors", "values")
_KEYS = (*_KINDS, "sizes", "requires_grad", "planner_data")
#: Runs of which a process remembers what it saved last, for writers made anew for each save.
_N_SAVERS_MAX = 4


class _Written(NamedTuple):
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


class DeltaStorageWriter(StorageWriter):
    """Saves distributed checkpoints as the steps of a run; what ranks or steps have in common is stored once.

    Parameters
    ----------
    store : path-like
        Where every rank finds the same store; made if it is not there.
    run : str
    step : int, optional
        By default what ``checkpoint_id`` of the call names: a number, or a name that ends in one.
    keep : Rule, optional
        Which steps of the run stay once a new one is durable, as of `deltackpt.open_run`.
    overwrite : bool
        Whether a step that is there may be replaced.
    optimize : {"time", "bytes", "energy"}
    shadow : int
        Bytes of the last step that a rank may keep in memory to take deltas against.
    allow_pickle : bool
        Pickle values that have no plain form; the reader must be told the same.
    metrics, metadata : dict, optional
        As of `deltackpt.delta.save`.

    Attributes
    ----------
    report : SaveReport or None
        On the coordinator, of the last save; seconds and bytes are those of all ranks together.

    Raises
    ------
    AlreadyExistsError
        If the step is there.
    InvalidInputError
        If no step is named, or a value has no plain form.
    ConflictError
        If another job saved the step meanwhile, or gc gave this save up for dead.

    Notes
    -----
    It can be used for one save or for many, and pickled, as ``async_save`` in a process does.

    Examples
    --------
    >>> import tempfile, torch.distributed.checkpoint as dcp
    >>> with tempfile.TemporaryDirectory() as store:
    ...     state = {"w": torch.arange(6.0), "epoch": 3}
    ...     writer = DeltaStorageWriter(store, step=10)
    ...     _ = dcp.save(state, storage_writer=writer, no_dist=True)
    ...     found = {"w": torch.zeros(6), "epoch": 0}
    ...     dcp.load(found, storage_reader=DeltaStorageReader(store, step=10), no_dist=True)
    ...     found
    {'w': tensor([0., 1., 2., 3., 4., 5.]), 'epoch': 3}
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        run: str = "main",
        *,
        step: int | None = None,
        keep: Rule | None = None,
        overwrite: bool = False,
        optimize: Optimize = "time",
        shadow: int = SIZE_MAX,
        allow_pickle: bool = False,
        metrics: dict[str, float] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.store = os.fspath(store)
        self.run = check_run(run)
        self.step = None if step is None else check_step(step)
        if not isinstance(keep, Rule | None):
            raise InvalidInputError(
                f"keep: found {keep!r}, expected a rule", hint="keep=last(3) | every(1000)"
            )
        self.keep = keep
        self.overwrite = overwrite
        self.optimize = check_optimize(optimize)
        self.shadow = shadow
        self.allow_pickle = allow_pickle
        self.metrics = check_metrics(metrics or {})
        self.metadata = check_metadata(metadata or {})
        self.report: SaveReport | None = None
        self._start_s = 0.0
        #: Gives up what this rank handed over, if nobody decided it; when it is known that nobody will.
        self._give_up: weakref.finalize[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_give_up": None}

    # -- what torch calls, in this order

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save; `checkpoint_id` names its step, if it is given."""
        if checkpoint_id is not None:
            self.step = _step_of(checkpoint_id)
        self.report = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Check that a step is named, and that one rank is to decide for all."""
        self._start_s = time.perf_counter()
        if self._give_up is not None:
            self._give_up()  # the save before is over
        if not kwargs.get("use_collectives", True):
            raise InvalidInputError(
                "dcp.save: use_collectives=False would have every rank decide the step alone",
                hint="leave it out",
            )
        if self.step is None:
            raise InvalidInputError(
                "dcp.save: no step is named", hint="DeltaStorageWriter(..., step=100), or checkpoint_id='100'"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what this rank has of the step; durable, but not visible, on return."""
        future: Future[list[WriteResult]] = Future()
        results = [WriteResult(item.index, _size(item), None) for item in plan.items]
        if results:  # once: all of this rank's items are written together
            with _taken(self) as saver:
                written = self._write(_local(plan.items, planner), saver)
            self._give_up = weakref.finalize(self, _give_up, saver.store, written.part.name)
            results[0] = replace(results[0], storage_data=written)
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Decide the step, once every rank has written its part; visible to all on return."""
        everything = [rank[0].storage_data for rank in results if rank]
        with open_run(self.store, self.run, keep=self.keep) as run:
            report = run.retaining(lambda: self._decide(metadata, everything))
        self.report = replace(report, total_s=time.perf_counter() - self._start_s)
        log.info("%s", self.report)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether a step is named."""
        try:
            _step_of(checkpoint_id)
        except InvalidInputError:
            return False
        return True

    def storage_meta(self) -> StorageMeta | None:
        """Return which step is saved."""
        return StorageMeta(checkpoint_id=None if self.step is None else str(self.step))

    # -- below

    def _write(self, state: State, saver: Saver) -> _Written:
        assert self.step is not None
        session = saver.open(What(self.step, {}, {}, self.overwrite, self.optimize))
        with session.losing(), session:
            saved = snapshot.save(session, state, saver.before, saver.shadow, allow_pickle=self.allow_pickle)
            session.publish(None)
            packs, rows = session.packs(), session.rows()
            figures = saved.figures(session)
            part = session.hand_over()
        # Packs that are there may be relied on by the next save even if nobody decides this one.
        saver.memory = saved.memory(packs, rows)
        saver.shadow.replace(saved.fresh)
        nodes = {kind: node["map"] for kind, node in saved.manifest.structure["map"].items()}
        return _Written(part, saved.manifest.tensors, nodes, figures)

    def _decide(self, metadata: Metadata, everything: Sequence[_Written]) -> tuple[SaveReport, int | None]:
        """Commit what all ranks have written; the report, and the latest step there was at first."""
        assert self.step is not None
        what = What(self.step, self.metrics, self.metadata, self.overwrite, self.optimize)
        with _taken(self) as saver:
            session = saver.open(what)
            with session.losing(), session:
                data = _manifest(metadata, everything).to_bytes()
                session.publish(data, [written.part for written in everything])
                before = session.superseded
                commit = session.commit(
                    data,
                    parent=before.parent if before else saver.last_step,
                    metrics=what.metrics,
                    metadata=what.metadata,
                    figures=_figures([written.figures for written in everything], session.written_size),
                )
            saver.last_step = commit.slot.step
            return _report(commit), saver.found_step


class DeltaStorageReader(StorageReader):
    """Loads distributed checkpoints from the steps of a run, into any number of ranks.

    Parameters
    ----------
    store : path-like
    run : str
    step : int, "latest" or "latest-good"
        A ``checkpoint_id`` of the call takes its place.
    allow_pickle : bool
        Unpickle values that were pickled, which runs code that their writer chose.

    Raises
    ------
    NotFoundError
        If there is no such step.
    InvalidInputError
        If the step was not saved by a `DeltaStorageWriter`.
    CorruptError
        If something of it cannot be given back.

    Notes
    -----
    Of a shard only those chunks are read that hold what a rank asks for.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        run: str = "main",
        *,
        step: int | str = "latest",
        allow_pickle: bool = False,
    ) -> None:
        self.store = os.fspath(store)
        self.run = check_run(run)
        self.step = step
        self.allow_pickle = allow_pickle
        self._opened: _Step | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a load; `checkpoint_id` names its step, if it is given."""
        if checkpoint_id is not None:
            self.step = _step_of(checkpoint_id)
        self._opened = None

    # Torch tries again with rank=, for files of single ranks, where a parameter is called kwargs: a rank to
    # which that happened would leave the others waiting for it.
    def read_metadata(self, *_: Any, **options: Any) -> Metadata:
        """Return what the step holds."""
        self._opened = _Step.of(open_run(self.store, self.run, create=False), self.step, self.allow_pickle)
        return self._opened.metadata()

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Open the step, on ranks that have not read its metadata."""
        if self._opened is None:
            self.read_metadata()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Have all ranks read what the coordinator has found: a later step may be there by now."""
        assert self._opened is not None
        return [replace(plan, storage_data=self._opened.commit.slot) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank wants, into its tensors."""
        assert self._opened is not None
        chosen = plan.storage_data
        if chosen is not None and self._opened.commit.slot != chosen:
            self.step = chosen.step
            self.read_metadata()
            if self._opened.commit.slot != chosen:
                raise _changed(self._opened.commit)
        self._opened.read(plan.items, planner)
        self._opened.run.close()  # and the files that were read
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether a step is named."""
        return DeltaStorageWriter.validate_checkpoint_id(checkpoint_id)


# -- the state


def _local(items: Sequence[WriteItem], planner: SavePlanner) -> State:
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


def _size(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _manifest(metadata: Metadata, everything: Sequence[_Written]) -> Manifest:
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


def _figures(parts: Sequence[Figures], written_size: int) -> Figures:
    """Return the figures of all ranks together, and of what the coordinator has written."""
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
    )


def _report(commit: Commit) -> SaveReport:
    of = commit.figures
    return SaveReport(
        commit.slot.run,
        commit.slot.step,
        of.logical_size,
        of.new_size,
        of.written_size,
        of.n_tensors,
        of.n_chunks,
        of.n_new_chunks,
        of.seconds,
        0.0,
        groups=of.groups,
    )


class _Step(NamedTuple):
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
    def of(cls, run: Run, step: int | str, allow_pickle: bool) -> _Step:
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
                if not is_array or not re.fullmatch(r"[0-9]{1,18}(,[0-9]{1,18})*", str(key)):
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
        with self.run.reading(self.commit):
            for item in items:
                if item.type is LoadItemType.BYTE_IO:
                    self._load_value(item, planner)
                    continue
                leaf = self.state["tensors"].get(item.storage_index.fqn, {}).get(_key(item.storage_index))
                if leaf is None:
                    raise _changed(self.commit)
                target = planner.resolve_tensor(item).detach()
                # A part is cast as torch does.
                is_same_kind = target.dtype == getattr(torch, self._dtype(leaf))
                if tuple(item.lengths) == self._shape(leaf) and is_same_kind:
                    whole.append((item, leaf, target))
                    continue
                index = tuple(
                    slice(a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True)
                )
                row = self.manifest.tensors[leaf.at]
                target.copy_(loader.read_part(self.run.store, row, leaf, index, "cpu"))
                planner.commit_tensor(item, target)
            loader.fill_into(
                self.run.store, self.manifest.tensors, [(leaf, target) for _, leaf, target in whole]
            )
        for item, _, target in whole:
            planner.commit_tensor(item, target)

    def _load_value(self, item: ReadItem, planner: LoadPlanner) -> None:
        """Give a value to the planner, which takes pickles only: one that this process has just made."""
        values = self._values()
        if item.storage_index.fqn not in values:
            raise _changed(self.commit)
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


def _changed(commit: Commit) -> ConflictError:
    return ConflictError(
        f"run {commit.slot.run!r} step {commit.slot.step}: was saved while the ranks looked at it",
        hint="load again",
    )


def _offsets(key: str, shape: tuple[int, ...]) -> torch.Size:
    return torch.Size([int(n) for n in key.split(",")][: len(shape)])


def _step_of(checkpoint_id: str | os.PathLike[str]) -> int:
    """Return the step that an id names: ``"100"``, ``"runs/step-100"``, ``"checkpoint-100/"``."""
    text = os.fspath(checkpoint_id)
    found = re.search(r"(?:^|[^0-9])([0-9]+)/*$", text)
    if not found:
        raise InvalidInputError(
            f"checkpoint_id: found {text!r}, expected a number or a name that ends in one",
            hint="checkpoint_id='step-100'",
        )
    return check_step(int(found[1]))


# -- what a process remembers

_savers: OrderedDict[tuple[str, str], Saver] = OrderedDict()
_lock = threading.Lock()


@contextmanager
def _taken(of: DeltaStorageWriter) -> Iterator[Saver]:
    """Take who saved this run's last step from this process: it knows what did not change.

    For one save at a time: another that comes meanwhile begins anew, as does one after an error.
    """
    key = (os.path.abspath(of.store), of.run)  # noqa: PTH100 - a key, links kept
    store = open_store(of.store, create=True)
    with _lock:
        saver = _savers.pop(key, None)
    if saver is None or saver.store.descriptor_bytes != store.descriptor_bytes:
        saver = Saver(store, of.run, Shadow(of.shadow))
    try:
        yield saver
    except BaseException:
        saver.forget()
        raise
    finally:
        with _lock:
            _savers[key] = saver
            while len(_savers) > _N_SAVERS_MAX:
                _savers.popitem(last=False)


def _give_up(store: Store, name: SessionName) -> None:
    """End what a rank handed over and nobody decided: while its process lives gc would wait for it.

    By a fence, and not by taking its record away: a coordinator that is only slow must not decide it then.
    """
    try:
        if store.refs.decision(name.slot) is None:
            with suppress(ConflictError):
                store.refs.decide(Fence(name.slot, name.sid))
        store.backend.delete(name.key)
    except DeltackptError as e:
        log.warning("session %s left behind: %s", name.sid.hex(), e.message)


def _forget_savers() -> None:
    """Start anew in a forked child: another thread may have held the lock."""
    global _lock
    _lock = threading.Lock()
    _savers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_savers)
