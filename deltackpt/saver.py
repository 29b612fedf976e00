"""A saver: what a process remembers of a run's last step, and how it saves the next.

Owns   the memory and the shadow of the last step, the second try, and the figures of a step.
Never  lists, keeps or forgets steps, copies a state, or lets two saves in at once: who has it has a lock.
"""

from __future__ import annotations

import errno
import heapq
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from deltackpt import kin, snapshot
from deltackpt.efforts import Optimize
from deltackpt.energy import Energy, moved_size
from deltackpt.errors import CorruptError, DeltackptError, NotFoundError, StorageError
from deltackpt.manifest import Manifest, TensorRow
from deltackpt.memory import Memory
from deltackpt.records import Figures
from deltackpt.report import SaveReport
from deltackpt.session import Session
from deltackpt.shadow import Shadow
from deltackpt.snapshot import Saved
from deltackpt.staging import Look
from deltackpt.store import Store
from deltackpt.tree import Flat
from deltackpt.types import Deferred, State, Tensor

log = logging.getLogger("deltackpt")

#: Errors that writing the same bytes again would meet again.
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
#: Other runs looked at for a first save's base: each costs a listing and a read.
_N_OTHERS_MAX = 64


class What(NamedTuple):
    """What a step is to be called and to say, beside its state.

    Parameters
    ----------
    step : int
    metrics : dict of str to float
    metadata : dict
        JSON.
    overwrite : bool
        Whether a step that is there may be superseded.
    optimize : {"time", "bytes", "energy"}
        What the save is to spare.
    """

    step: int
    metrics: dict[str, float]
    metadata: dict[str, Any]
    overwrite: bool = False
    optimize: Optimize = "time"


#: Given how many bytes a save has moved, and how many written, returns the energy it took so far.
Taken: TypeAlias = Callable[[int, int], Energy]
#: Given the tensors of the step before, returns those that are worth remembering.
Choose: TypeAlias = Callable[[list[TensorRow]], list[TensorRow]]
#: See `snapshot.save_looks`.
Walk: TypeAlias = Callable[[Callable[[], int]], Iterable[Look]]


class Saver:
    """Saves the steps of one run, one after another.

    Parameters
    ----------
    store : Store
    run : str
    shadow : Shadow
    audit_every : int
        As `Watch` takes it.

    Attributes
    ----------
    memory : Memory or None
        The last step; None: it is read from the store when it is needed.
    last_step : int or None
        The step saved last; of a run that goes on, the latest there was.
    found_step : int or None
        The latest step there was when this first looked.
    """

    def __init__(self, store: Store, run: str, shadow: Shadow, audit_every: int = 1) -> None:
        self.store = store
        self.run = run
        self.shadow = shadow
        self.audit_every = audit_every
        self.memory: Memory | None = None
        self.last_step: int | None = None
        self.found_step: int | None = None

    def forget(self) -> None:
        """Forget the last step: the next save reads of it what the store has."""
        self.memory = None
        self.shadow.clear()

    def prepare(self, choose: Choose = list) -> None:
        """Read the lists of the run's latest snapshot, unless one is remembered: of the tensors chosen."""
        if self.memory is not None:
            return
        try:
            commit = self.store.refs.latest(self.run)
            if commit is None:
                self.store.refs.check_new_run(self.run)
                return
            if self.last_step is None:
                self.found_step = commit.slot.step
            self.last_step = commit.slot.step
            manifest = self.store.read_manifest(commit)
            chosen = Manifest(manifest.structure, choose(manifest.tensors))
            self.memory = Memory.from_store(self.store, chosen, new_share=commit.figures.new_share)
        except (CorruptError, NotFoundError) as e:
            # A damaged step must not keep the next one from being saved, whole if need be.
            log.warning("run %r: %s; saving without the step before", self.run, e.message)
            if self.last_step is None and self.found_step is None:
                # It is what this job goes on from all the same: no rule may let it go.
                slots = self.store.refs.visible(self.store.refs.listing(self.run))
                self.found_step = slots[-1].step if slots else None

    def before(self, tensors: Sequence[Tensor | Deferred]) -> Memory:
        """Return what is remembered of the step before, or of the likest step of another run."""
        return self.memory or kin.nearest(self.store, self._others(), tensors)

    def _others(self) -> Iterator[Manifest]:
        """Read what some other runs hold last, the newest first; damaged ones are passed over."""
        refs = self.store.refs
        latest = []
        try:
            for name in refs.runs()[-_N_OTHERS_MAX:]:
                commit = refs.latest(name) if name != self.run else None
                if commit is not None:
                    latest.append(commit)
        except DeltackptError as e:
            log.info("not all runs are looked at for a base: %s", e.message)
        for commit in heapq.nlargest(kin.N_SNAPSHOTS, latest, key=lambda c: c.created_s):
            try:
                yield self.store.read_manifest(commit)
            except DeltackptError as e:
                log.info("run %r is passed over as a base: %s", commit.slot.run, e.message)

    def open(self, what: What, choose: Choose = list) -> Session:
        """Open the session that is to commit a step; see `prepare`."""
        self.prepare(choose)
        return Session(self.store, self.run, what.step, overwrite=what.overwrite, optimize=what.optimize)

    def save(
        self,
        state: State,
        what: What,
        taken: Taken,
        *,
        allow_pickle: bool,
        check: Callable[[], None] = lambda: None,
    ) -> SaveReport:
        """Save a state that does not change meanwhile; durable and visible on return.

        Parameters
        ----------
        state : State
        what : What
        taken : Taken
        allow_pickle : bool
        check : callable
            Called when all of it is written, and before it is decided: raises if it did change.

        Raises
        ------
        DeltackptError
            As of `deltackpt.delta.save`.
        """
        session = self.open(what)
        try:
            return self._save(session, state, what, taken, allow_pickle, check)
        except StorageError as e:
            if e.errno in _LASTING or session.deciding:
                raise
            # Never write on after an error: all of it again, under new names, from the source.
            log.warning("run %r step %d: %s; saving once more", self.run, what.step, e.message)
        session = self.open(what)
        with session.losing():
            return self._save(session, state, what, taken, allow_pickle, check)

    def _save(
        self,
        session: Session,
        state: State,
        what: What,
        taken: Taken,
        allow_pickle: bool,
        check: Callable[[], None],
    ) -> SaveReport:
        start = time.perf_counter()
        with session:
            saved = snapshot.save(
                session,
                state,
                self.before,
                self.shadow,
                allow_pickle=allow_pickle,
                audit_every=self.audit_every,
            )
            check()
            return self._commit(session, saved, what, taken, start)

    def save_looks(
        self, session: Session, flat: Flat, walk: Walk, memory: Memory, what: What, taken: Taken
    ) -> SaveReport:
        """Save a state that was looked at already, what changed of it being copied.

        There is no second try: what did not change was not copied, and may have changed since.

        Parameters
        ----------
        session : Session
            As `open` returned it.
        flat, walk, memory
            As of `snapshot.save_looks`.
        what : What
        taken : Taken
        """
        start = time.perf_counter()
        with session.losing(), session:
            saved = snapshot.save_looks(session, flat, walk, memory, self.shadow, is_staged=True)
            return self._commit(session, saved, what, taken, start)

    def _commit(self, session: Session, saved: Saved, what: What, taken: Taken, start: float) -> SaveReport:
        """Publish and decide, and remember what was saved."""
        at = time.perf_counter()
        manifest = saved.manifest.to_bytes()
        session.publish(manifest)
        published = time.perf_counter()
        saved.seconds["publish"] = published - at
        packs, rows = session.packs(), session.rows()
        figures = saved.figures(session)
        figures = replace(figures, energy=_energy(taken, figures))
        before = session.superseded
        commit = session.commit(
            manifest,
            parent=before.parent if before else self.last_step,
            metrics=what.metrics,
            metadata=what.metadata,
            figures=figures,
        )
        self.memory = saved.memory(packs, rows)
        self.shadow.replace(saved.fresh)
        self.last_step = commit.slot.step
        end = time.perf_counter()
        report = SaveReport(
            self.run,
            commit.slot.step,
            figures.logical_size,
            figures.new_size,
            session.written_size,
            figures.n_tensors,
            figures.n_chunks,
            figures.n_new_chunks,
            {**saved.seconds, "commit": end - published},
            end - start,
            groups=figures.groups,
            efforts=session.pace.words(),
        )
        return replace(report, energy=_energy(taken, report))


def _energy(taken: Taken, cost: Figures | SaveReport) -> Energy:
    return taken(moved_size(cost.logical_size, cost.new_size, cost.written_size), cost.written_size)
