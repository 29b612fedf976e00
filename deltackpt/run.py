"""A run: the steps of one training job.

Owns   listing, loading, keeping, forgetting and comparing a run's steps, and forking it.
Never  touches storage but through its store, or saves: turns.py and saver.py do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt

from deltackpt import diff, loader, restore
from deltackpt.diff import Diff, Side
from deltackpt.efforts import Optimize, check_optimize
from deltackpt.energy import Meter
from deltackpt.errors import (
    AlreadyExistsError,
    CorruptError,
    FormatError,
    InvalidInputError,
    NotFoundError,
)
from deltackpt.fork import take_over
from deltackpt.keeper import Keeper
from deltackpt.labels import check_metadata, check_metrics
from deltackpt.loader import DeviceMap
from deltackpt.manifest import Manifest, TensorRow
from deltackpt.pending import Pending
from deltackpt.records import Commit, Origin, check_run, check_step
from deltackpt.report import SaveReport
from deltackpt.retention import Retention, Rule
from deltackpt.saver import Saver, What
from deltackpt.session import Session
from deltackpt.shadow import SIZE_MAX, Shadow
from deltackpt.store import Store, Where, open_store
from deltackpt.turns import Request, Turns
from deltackpt.types import U8, State

log = logging.getLogger("deltackpt")
R = TypeVar("R")


class Run:
    """A run of a store; a context manager.  Safe to share between threads: saves take turns.

    Use `open_run`.

    Examples
    --------
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> run = open_run(MemoryBackend())
    >>> for step in (10, 20, 30):
    ...     _ = run.save({"w": [0.5 * step]}, step=step)
    >>> list(run), len(run), 20 in run, 25 in run
    ([10, 20, 30], 3, True, False)
    """

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        keep: Rule | None = None,
        shadow: int = SIZE_MAX,
        memory_max: int | None = None,
        audit_every: int = 1,
        on_save: Callable[[SaveReport], object] | None = None,
        optimize: Optimize | None = None,
    ) -> None:
        if not isinstance(keep, Rule | None):
            raise InvalidInputError(
                f"keep: found {keep!r}, expected a rule", hint="keep=last(3) | every(1000)"
            )
        if on_save is not None and not callable(on_save):
            raise InvalidInputError(
                f"on_save: found {on_save!r}, expected a function of a report", hint="on_save=print"
            )
        if isinstance(audit_every, bool) or not isinstance(audit_every, int) or audit_every < 1:
            raise InvalidInputError(
                f"audit_every: found {audit_every!r}, expected a number of saves, 1 or more",
                hint="audit_every=10",
            )
        self.store = store
        self.audit_every = audit_every
        self.name = check_run(name)
        self.on_save = on_save
        self.optimize = None if optimize is None else check_optimize(optimize)
        self._keeper = Keeper(store.refs, self.name, keep)
        self.memory_max = None if memory_max is None else _bytes("memory_max", memory_max)
        shadow = _bytes("shadow", shadow)
        # The copies of the last save, those of this one, and those on their way have a third each.
        shadow = shadow if memory_max is None else min(shadow, memory_max // 3)
        saver = Saver(store, self.name, Shadow(shadow), audit_every)
        self._turns = Turns(saver, self.memory_max)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
            # It is logged; what ends the block says more.

    def close(self) -> None:
        """Wait for the save under way; let go of what is remembered of the last snapshot, and of open files.

        Raises
        ------
        DeltackptError
            What made that save fail, if nobody was told yet.
        """
        try:
            self._turns.close()
        finally:
            self.store.backend.close()

    # -- steps

    def steps(self) -> list[int]:
        """Return the steps there are, in order."""
        return list(self.store.refs.steps(self.name))

    def commits(self) -> list[Commit]:
        """Return the records of the steps there are, in order."""
        return list(self.store.refs.steps(self.name).values())

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps())

    def __len__(self) -> int:
        return len(self.steps())

    def __contains__(self, step: object) -> bool:
        try:
            return self.store.refs.slot(self.name, check_step(step))[1] is not None
        except InvalidInputError:
            return False

    def latest(self) -> int | None:
        """Return the highest step, None if there is none."""
        commit = self.store.refs.latest(self.name)
        return commit.slot.step if commit else None

    def commit(self, step: int | str = "latest") -> Commit:
        """Return the record of one step, from which a job that asks for it goes on: `keep` spares it.

        Parameters
        ----------
        step : int, "latest" or "latest-good"
            latest-good: the newest step every chunk of which is there and decodes to its id; it is read
            whole.  A warning is logged for each step passed over.

        Raises
        ------
        NotFoundError
            If there is no such step; names the nearest.
        """
        commit = self._find(step)
        self._keeper.resumed = commit.slot.step
        return commit

    def _find(self, step: int | str) -> Commit:
        if step == "latest":
            commit = self.store.refs.latest(self.name)
            if commit is None:
                raise self.store.refs.unknown_step(self.name, None)
            return commit
        if step == "latest-good":
            return self._latest_good()
        if isinstance(step, str):
            raise InvalidInputError(
                f"step: found {step!r}, expected an integer, 'latest' or 'latest-good'", hint="deltackpt ls"
            )
        return self.store.refs.commit(self.name, check_step(step))

    def _latest_good(self) -> Commit:
        refs = self.store.refs
        listing = refs.listing(self.name)
        n_damaged = 0
        for step in sorted({slot.step for slot in listing.slots if slot not in listing.gone}, reverse=True):
            try:
                _, commit = refs.slot(self.name, step)
                if commit is None:
                    continue  # only given up, or forgotten since the listing
                with self.reading(commit):
                    restore.check(self.store, self.store.read_manifest(commit).tensors)
                return commit
            except NotFoundError:
                continue
            except FormatError as e:
                n_damaged += 1
                log.warning("run %r step %d is not good: %s", self.name, step, e.message)
        if not n_damaged:
            raise refs.unknown_step(self.name, None)
        raise NotFoundError(
            f"run {self.name!r} has no good step; damaged or unreadable: {n_damaged}",
            hint="run deltackpt verify",
        )

    def forget(self, steps: Iterable[int], *, dry_run: bool = False) -> Retention:
        """Make steps invisible; `gc` gives their space back.

        A step whose record is damaged is forgotten like any other.

        Parameters
        ----------
        steps : iterable of int
        dry_run : bool
            Say what would become of the steps, and change nothing.

        Raises
        ------
        NotFoundError
            If one is not there; then none is forgotten.
        InvalidInputError
            If one is pinned; then none is forgotten.
        """
        if not isinstance(steps, Iterable):
            raise InvalidInputError(f"forget: found {steps!r}, expected steps", hint="run.forget([1000])")
        wanted = {check_step(step) for step in steps}
        refs = self.store.refs
        listing = refs.listing(self.name)
        slots = refs.visible(listing)
        there = {slot.step for slot in slots}
        unknown = sorted(wanted - there)
        if unknown:
            raise refs.unknown_step(self.name, unknown[0])
        for step in sorted(wanted & listing.pinned):
            refs.check_unpinned(self.name, step)
        if not dry_run:
            self.store.prepare_to_write()
            goes = [slot for slot in slots if slot.step in wanted]
            # Of the reserve a part is left for gc, which is what frees.
            self.store.freeing(lambda _: refs.forget(goes), share=0.75)
        return Retention.of(self.name, there, dict.fromkeys(there - wanted, "not named"), "named")

    # -- which steps stay

    @property
    def keep(self) -> Rule | None:
        """The rule that says which steps stay after a save; None: all do."""
        return self._keeper.keep

    @keep.setter
    def keep(self, keep: Rule | None) -> None:
        self._keeper.keep = keep

    def pin(self, step: int) -> None:
        """Keep a step until it is unpinned, whatever the rules say; durable on return.

        Raises
        ------
        NotFoundError
            If it is not there; names the nearest.

        Examples
        --------
        >>> from deltackpt.backends.memory import MemoryBackend
        >>> run = open_run(MemoryBackend())
        >>> _ = run.save({"w": [0.5]}, step=10)
        >>> run.pin(10)
        >>> run.pinned()
        [10]
        """
        self.store.prepare_to_write()
        self.store.refs.pin(self.name, check_step(step))

    def unpin(self, step: int) -> None:
        """Let a pinned step go when the rules do; durable on return.

        If somebody forgot the step at the very moment it was pinned, it is forgotten from now on.

        Raises
        ------
        NotFoundError
            If it is not there; names the nearest.
        """
        self.store.prepare_to_write()
        self.store.refs.unpin(self.name, check_step(step))

    def pinned(self) -> list[int]:
        """Return the steps that are pinned, in order."""
        refs = self.store.refs
        listing = refs.listing(self.name)
        return sorted(listing.pinned & {commit.slot.step for commit in refs.commits_of(listing)})

    def retention(self, keep: Rule | None = None) -> Retention:
        """Return which of the steps there are stay and which would go now, each with why.

        Parameters
        ----------
        keep : Rule, optional
            By default the run's own; if it has none, every step stays.

        Examples
        --------
        >>> from deltackpt import last
        >>> from deltackpt.backends.memory import MemoryBackend
        >>> run = open_run(MemoryBackend())
        >>> for step in (10, 20, 30):
        ...     _ = run.save({"w": [0.5]}, step=step)
        >>> print(run.retention(last(2)))
        step         why
          10  goes   no rule keeps it
          20  stays  last 2
          30  stays  latest; last 2
        """
        return self._keeper.retention(keep)

    def retaining(self, save: Callable[[], tuple[SaveReport, int | None]]) -> SaveReport:
        """Have another save a step of this run; forget what no rule keeps, now that it is durable.

        Returns the report of both.

        Parameters
        ----------
        save : callable
            Returns the report, and the latest step there was when this run first looked.
        """
        return self._keeper.retaining(save)

    # -- fork and compare

    def fork(self, name: str, *, step: int | str = "latest") -> Run:
        """Begin a run with a step of this one: the same number, content, metrics and metadata.

        No chunk is copied; the new run's steps stand on their own like any others.

        Parameters
        ----------
        name : str
            The new run.
        step : int, "latest" or "latest-good"

        Returns
        -------
        Run
            The new run, open on the same store.

        Raises
        ------
        AlreadyExistsError
            If a run of this name has steps.
        NotFoundError
            If there is no such step; names the nearest.
        CorruptError
            If what the step holds is damaged where it has to be read.

        Examples
        --------
        >>> from deltackpt.backends.memory import MemoryBackend
        >>> run = open_run(MemoryBackend())
        >>> _ = run.save({"w": [0.5]}, step=10)
        >>> branch = run.fork("branch")
        >>> branch.steps(), branch.load(), branch.commit().origin
        ([10], {'w': [0.5]}, Origin(run='main', step=10))
        """
        branch = Run(self.store, name)
        refs = self.store.refs
        refs.check_new_run(name)
        if refs.latest(name) is not None:
            raise AlreadyExistsError(f"run {name!r} has steps already", hint="choose another name")
        source = self._find(step)
        session = Session(self.store, name, source.slot.step)
        with session.losing(), session:
            with self.reading(source):
                data = self.store.read_manifest_bytes(source)
                take_over(session, Manifest.from_bytes(data, source.manifest_key))
            session.publish(data)
            session.commit(
                data,
                parent=None,
                metrics=source.metrics,
                metadata=source.metadata,
                figures=replace(
                    source.figures,
                    new_size=session.new_size,
                    n_new_chunks=session.n_new_chunks,
                    written_size=session.written_size,
                    seconds={},
                    groups=[replace(group, based_size=0, codecs={}) for group in source.figures.groups],
                    energy=None,
                ),
                origin=Origin(self.name, source.slot.step),
            )
        return branch

    def diff(self, a: int | str, b: int | str, *, other: Run | None = None, values: bool = False) -> Diff:
        """Return what differs between two steps, tensor by tensor and value by value.

        Reads their manifests and lists of chunks, and no tensor unless `values` are asked for.

        Parameters
        ----------
        a, b : int, "latest" or "latest-good"
        other : Run, optional
            The run that `b` is of, in this store or another; by default this one.
        values : bool
            Say of each tensor that differs how many elements and bytes do, and by how much.  Reads the chunks
            that only one of them has, 8 MiB of either at a time.

        Raises
        ------
        NotFoundError
            If there is no such step; names the nearest.
        CorruptError
            If a list, or with `values` a chunk, is missing or damaged.

        Examples
        --------
        >>> import numpy as np
        >>> from deltackpt.backends.memory import MemoryBackend
        >>> run = open_run(MemoryBackend())
        >>> for step in (10, 20):
        ...     _ = run.save({"w": np.full(3, step), "frozen": np.ones(5), "lr": 1 / step}, step=step)
        >>> print(run.diff(10, 20))
        main step 10 -> main step 20
        changed  w   24 B of 24 B, 1 of 1 chunks
        value    lr  0.1 -> 0.05
        1 same, 1 changed, 0 added, 0 removed, 0 retyped; 24 B of 64 B differ
        >>> run.diff(10, 20, values=True).tensors[0].distance.step_max
        10
        """
        return diff.compare(self._side(a, values), (other or self)._side(b, values))

    def _side(self, step: int | str, values: bool) -> Side:
        commit = self._find(step)

        def read(row: TensorRow, chunks: npt.NDArray[np.void], start: int, stop: int) -> U8:
            with self.reading(commit):
                return restore.stretch(self.store, row, chunks, start, stop)

        with self.reading(commit):
            manifest = self.store.read_manifest(commit)
            label = f"{self.name} step {commit.slot.step}"
            chunks = restore.resolve(self.store, manifest.tensors)
            return Side(label, manifest, chunks, read if values else None)

    # -- save

    def save(
        self,
        state: State,
        *,
        step: int,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        allow_pickle: bool = False,
    ) -> SaveReport:
        """Save a state; durable and visible on return.  See `deltackpt.delta.save`."""
        asked = self._asked(step, metrics, metadata, overwrite, allow_pickle, "time")
        return self._turns.save(state, asked)

    def save_async(
        self,
        state: State,
        *,
        step: int,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        allow_pickle: bool = False,
        when_busy: Literal["wait", "skip", "fail"] = "wait",
    ) -> Pending | None:
        """Save a state while training goes on; returns once the state may be changed.

        What changed since the last save is copied, what did not is only looked at; another process does the
        rest, or a thread where none can.
        One save is under way at a time.  An error of it is raised by whichever comes first of `wait`, the
        next save, and `close` or the end of a ``with`` block.  A program that ends waits for its last save.

        Parameters
        ----------
        state, step, metrics, metadata, overwrite, allow_pickle
            As of `deltackpt.delta.save`.
        when_busy : {"wait", "skip", "fail"}
            What to do while the save before is still under way: wait for it; save nothing; or raise.

        Returns
        -------
        Pending or None
            None if there was nothing to do but skip.

        Raises
        ------
        ConflictError
            If the save before is under way, and `when_busy` is "fail".
        DeltackptError
            As of `deltackpt.delta.save`; of the save before, if that failed.

        Examples
        --------
        >>> import numpy as np
        >>> from deltackpt.backends.memory import MemoryBackend
        >>> w = np.zeros(1000, np.float32)
        >>> with open_run(MemoryBackend()) as run:
        ...     pending = run.save_async({"w": w}, step=10)
        ...     w += 1  # training goes on
        ...     report = pending.wait()
        ...     run.load(10)["w"][:2].tolist()
        [0.0, 0.0]
        """
        asked = self._asked(step, metrics, metadata, overwrite, allow_pickle, "bytes")
        if when_busy not in ("wait", "skip", "fail"):
            raise InvalidInputError(
                f"when_busy: found {when_busy!r}, expected 'wait', 'skip' or 'fail'", hint="when_busy='wait'"
            )
        return self._turns.begin(state, asked, when_busy)

    def _asked(
        self,
        step: int,
        metrics: Mapping[str, float] | None,
        metadata: Mapping[str, Any] | None,
        overwrite: bool,
        allow_pickle: bool,
        optimize: Optimize,
    ) -> Request:
        """Return what is asked for, checked; `optimize` holds where the run does not say otherwise."""
        start_s, meter = time.perf_counter(), Meter()
        what = What(
            check_step(step),
            check_metrics(metrics or {}),
            check_metadata(metadata or {}),
            overwrite,
            self.optimize or optimize,
        )
        return Request(what, allow_pickle, self.retaining, self._tell, start_s, meter)

    def _tell(self, report: SaveReport) -> None:
        """Hand a report on, outside the lock: whoever gets it may ask this run for more, or save."""
        log.info("%s", report)
        try:
            if self.on_save is not None:
                self.on_save(report)
        except Exception:  # what a user's function raises is anything; the step is durable
            log.warning("run %r step %d is saved, but on_save failed", self.name, report.step, exc_info=True)

    # -- load

    def load(
        self,
        step: int | str = "latest",
        *,
        keys: str | Sequence[str] | None = None,
        into: State | None = None,
        strict: bool = True,
        map: DeviceMap = None,
        lazy: bool = False,
        allow_pickle: bool = False,
    ) -> State:
        """Rebuild a step, bit for bit.  See `deltackpt.delta.load`."""

        def rebuild(commit: Commit, manifest: Manifest) -> State:
            return loader.load(
                self.store,
                manifest,
                keys=keys,
                into=into,
                strict=strict,
                device_map=map,
                lazy=lazy,
                allow_pickle=allow_pickle,
                reading=lambda: self.reading(commit),
            )

        return self._with_manifest(step, rebuild)

    def read(self, step: int | str, name: str, index: Any = ..., *, map: DeviceMap = None) -> Any:
        """Read one array, or a part of it.  See `deltackpt.delta.read`."""
        return self._with_manifest(
            step, lambda commit, manifest: loader.read(self.store, manifest, name, index, device_map=map)
        )

    def _with_manifest(self, step: int | str, use: Callable[[Commit, Manifest], R]) -> R:
        """Use what a step holds; again if it was overwritten meanwhile, or, as the latest, forgotten."""
        commit = self.commit(step)
        while True:
            try:
                with self.reading(commit):
                    return use(commit, self.store.read_manifest(commit))
            except NotFoundError:
                before, commit = commit, self.commit(step)
                if commit is before:
                    raise

    @contextmanager
    def reading(self, commit: Commit) -> Iterator[None]:
        """Name run and step in what goes wrong; tell a step forgotten meanwhile from a damaged one."""
        where = f"run {self.name!r} step {commit.slot.step}"
        try:
            yield
        except CorruptError as e:
            if self.store.refs.is_gone(commit.slot):
                raise NotFoundError(
                    f"{where}: was forgotten while it was read", hint="load another step"
                ) from e
            raise CorruptError(f"{where}: {e.message}", hint=e.hint) from e

    def manifest(self, step: int | str = "latest") -> Manifest:
        """Return what a step holds, without reading its tensors."""
        commit = self._find(step)
        with self.reading(commit):
            return self.store.read_manifest(commit)


def _bytes(name: str, size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise InvalidInputError(f"{name}: found {size!r}, expected bytes, 0 or more", hint=f"{name}=1 << 30")
    return size


def open_run(
    store: Where,
    run: str = "main",
    *,
    create: bool = True,
    keep: Rule | None = None,
    shadow: int = SIZE_MAX,
    memory_max: int | None = None,
    audit_every: int = 1,
    on_save: Callable[[SaveReport], object] | None = None,
    optimize: Optimize | None = None,
) -> Run:
    """Open a run, and its store.

    Parameters
    ----------
    store : path, Backend or Store
    run : str
        1 to 128 of ``A-Z a-z 0-9 . _ -``.
    create : bool
        Make the store if there is none.
    keep : Rule, optional
        After each save, once it is durable, forget the steps that this does not keep; by default all stay.
        What stays always: the step just saved, the latest, those pinned, and the one this job went on from:
        which it loaded last, or else the latest when it first saved.
    shadow : int
        Bytes of memory, at most, in which the tensors that changed in the last save are kept: the next save
        takes its deltas against them.  What has no room is read back from the store for it, which takes
        about as long as encoding does; 0 keeps nothing.
    memory_max : int, optional
        Bytes of memory, at most, for copies of the state: the shadow, a third of it at most, and what
        `Run.save_async` copies so that training may go on.  Where a state changes by more, that waits until
        there is room again.  By default there is no bound on the copies of one save.
    audit_every : int
        Hash every tensor in one of so many saves.  In the others a torch tensor that needs no gradient, lies
        where it lay, and was not written to as far as torch counts is taken for what it was.  Torch does not
        count all writes: docs/howto/async.md says which, and what an audit does that finds one.  By default
        every save hashes everything.
    on_save : callable, optional
        Given the `SaveReport` of each save once it is durable, in the thread that saves: `print`, or
        `scalars.tensorboard` and `scalars.wandb`.  What it raises is logged, and no save fails for it.
    optimize : {"time", "bytes", "energy"}, optional
        What saves are to spare; by default time, where training waits for them, and bytes of `save_async`.
        time: what changed is stored as small as it can be without the save taking longer than writing the
        whole state would, by how fast this process has found the storage and its encoders to be; if need be
        some of it is encoded less, or stored as it is.  bytes: always as small as can be.  energy: whatever
        takes the fewest joules, by the constants of docs/energy.md.

    Examples
    --------
    >>> from deltackpt import best, every, last
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> with open_run(MemoryBackend(), "exp1") as run:
    ...     _ = run.save({"w": [1.0, 2.0]}, step=10)
    ...     run.steps(), run.load(10)
    ([10], {'w': [1.0, 2.0]})

    >>> with open_run(MemoryBackend(), keep=last(2) | every(100) | best("loss", 1)) as run:
    ...     for step in range(100, 150, 10):
    ...         report = run.save({"w": [1.0]}, step=step, metrics={"loss": abs(step - 115)})
    ...     run.steps(), report.forgotten
    ([100, 120, 130, 140], [])
    """
    check_run(run)
    return Run(
        open_store(store, create=create),
        run,
        keep=keep,
        shadow=shadow,
        memory_max=memory_max,
        audit_every=audit_every,
        on_save=on_save,
        optimize=optimize,
    )
