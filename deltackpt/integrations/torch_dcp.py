"""PyTorch's distributed checkpoints: a storage writer and reader for ``torch.distributed.checkpoint``.

Owns   the way of each rank's part into a step, and of a step into each rank.
Never  puts a pickle into a store unasked, or makes a step visible before every part of it is durable.

Each rank is a session of its own that fills its own packs; all of them are of one slot.  They hand over what
they have published, and the coordinator decides for all.  So a rank that dies leaves nothing to be seen, and
gc needs to know nothing of ranks.
"""

from __future__ import annotations

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
from typing import Any

from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from deltackpt import snapshot
from deltackpt.efforts import Optimize, check_optimize
from deltackpt.energy import Energy, Meter, moved_size
from deltackpt.errors import ConflictError, DeltackptError, InvalidInputError
from deltackpt.integrations.shards import (
    Step,
    Written,
    changed,
    figures_of,
    needed,
    of_rank,
    resharded,
    together,
)
from deltackpt.labels import check_metadata, check_metrics
from deltackpt.memory import Memory
from deltackpt.records import Commit, Fence, SessionName, check_run, check_step
from deltackpt.report import SaveReport
from deltackpt.retention import Rule
from deltackpt.run import open_run
from deltackpt.saver import Saver, What
from deltackpt.shadow import SIZE_MAX, Shadow
from deltackpt.store import Store, open_store
from deltackpt.types import Deferred, State, Tensor

log = logging.getLogger("deltackpt")

#: Runs of which a process remembers what it saved last, for writers made anew for each save.
_N_SAVERS_MAX = 4


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
        On the coordinator, of the last save; seconds, bytes and joules are those of all ranks together, the
        joules estimated.

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
    >>> import tempfile, torch, torch.distributed.checkpoint as dcp
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
            meter = Meter()
            with _taken(self) as saver:
                written = self._write(of_rank(plan.items, planner), saver, meter)
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

    def _write(self, state: State, saver: Saver, meter: Meter) -> Written:
        assert self.step is not None

        def before(tensors: Sequence[Tensor | Deferred]) -> Memory:
            return resharded(saver.before(tensors), tensors)

        what = What(self.step, {}, {}, self.overwrite, self.optimize)
        session = saver.open(what, lambda rows: needed(rows, state))
        with session.losing(), session:
            saved = snapshot.save(session, state, before, saver.shadow, allow_pickle=self.allow_pickle)
            session.publish(None)
            packs, rows = session.packs(), session.rows()
            figures = saved.figures(session)
            # Not by counters: ranks of one machine would each count all of it.
            moved = moved_size(figures.logical_size, figures.new_size, figures.written_size)
            figures = replace(figures, energy=meter.estimated(moved, figures.written_size))
            part = session.hand_over()
        # Packs that are there may be relied on by the next save even if nobody decides this one.
        saver.memory = saved.memory(packs, rows)
        saver.shadow.replace(saved.fresh)
        nodes = {kind: node["map"] for kind, node in saved.manifest.structure["map"].items()}
        return Written(part, saved.manifest.tensors, nodes, figures)

    def _decide(self, metadata: Metadata, everything: Sequence[Written]) -> tuple[SaveReport, int | None]:
        """Commit what all ranks have written; the report, and the latest step there was at first."""
        assert self.step is not None
        what = What(self.step, self.metrics, self.metadata, self.overwrite, self.optimize)
        meter = Meter()
        with _taken(self) as saver:
            session = saver.open(what)
            with session.losing(), session:
                data = together(metadata, everything).to_bytes()
                session.publish(data, [written.part for written in everything])
                before = session.superseded
                written_size = session.written_size
                energy = meter.estimated(moved_size(0, 0, written_size), written_size)
                commit = session.commit(
                    data,
                    parent=before.parent if before else saver.last_step,
                    metrics=what.metrics,
                    metadata=what.metadata,
                    figures=figures_of([written.figures for written in everything], written_size, energy),
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
        self._opened: Step | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a load; `checkpoint_id` names its step, if it is given."""
        if checkpoint_id is not None:
            self.step = _step_of(checkpoint_id)
        self._opened = None

    # Torch tries again with rank=, for files of single ranks, where a parameter is called kwargs: a rank to
    # which that happened would leave the others waiting for it.
    def read_metadata(self, *_: Any, **options: Any) -> Metadata:
        """Return what the step holds."""
        self._opened = Step.of(open_run(self.store, self.run, create=False), self.step, self.allow_pickle)
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
                raise changed(self._opened.commit)
        self._opened.read(plan.items, planner)
        self._opened.run.close()  # and the files that were read
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether a step is named."""
        return DeltaStorageWriter.validate_checkpoint_id(checkpoint_id)


def _size(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


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
        energy=of.energy or Energy(),
    )


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
