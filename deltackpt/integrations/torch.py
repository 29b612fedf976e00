"""PyTorch: all that a training job goes on from, saved and resumed by one call each.

Owns   which state a job's parts have, its random numbers, whose of several ranks it is, how far a loader is.
Never  saves or loads by itself: the run it is given does; shards of one tensor are torch_dcp.py's.

What a step holds, as any other state::

    {name: the state dict of each part that all ranks have alike,
     "training": {"parts": [name of every part], "n_ranks": how many ranks saved it,
                  "ranks": {rank: {"rng": its generators, "loaders": {name: state dict}}}}}
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from deltackpt import classes, tree
from deltackpt.errors import DeltackptError, InvalidInputError, NotFoundError
from deltackpt.loader import LazyArray
from deltackpt.pending import Pending
from deltackpt.report import SaveReport
from deltackpt.run import Run
from deltackpt.types import State

log = logging.getLogger("deltackpt")
T = TypeVar("T")

#: Where a step holds what is no part.
_OURS = "training"
#: What torch calls in a state dict what a module's ``get_extra_state`` gave.
_EXTRA = "_extra_state"


class Training:
    """What a training job goes on from: its parts, and the generators of random numbers.

    Of a job of several ranks (``torch.distributed``) every rank makes one, and calls the same methods.  What
    all ranks have alike is saved once, by rank 0; the generators and loaders of each rank come back to it.

    Parameters
    ----------
    run : Run
        As `deltackpt.open_run` gives it; on every rank, of a store that every rank sees.
    **parts
        Whatever has ``state_dict`` and ``load_state_dict``: modules, optimizers, schedulers, a GradScaler, an
        average of weights.  What can be iterated over, and is no module, is a loader: torchdata's
        ``StatefulDataLoader``, or `Batches` around a plain ``DataLoader``.

    Raises
    ------
    InvalidInputError
        If a part has no state dict, or a name by which it could not be found again.

    Examples
    --------
    >>> from deltackpt import open_run
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> model = nn.Linear(3, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> with open_run(MemoryBackend()) as run:
    ...     training = Training(run, model=model, optimizer=optimizer)
    ...     _ = training.resume()  # None: there is no step yet
    ...     _ = training.save(step=10)
    ...     expected = torch.rand(2)
    ...     training.resume(), torch.equal(torch.rand(2), expected)
    (10, True)
    """

    def __init__(self, run: Run, /, **parts: Any) -> None:
        for name, part in parts.items():
            _check_name(name, [*parts, _OURS])
            _check_part(name, part)
        self.run = run
        self.parts = {name: _unwrapped(part) for name, part in parts.items()}

    def save(self, step: int, **options: Any) -> SaveReport:
        """Save a step; durable and visible on return, on every rank.

        Parameters
        ----------
        step : int
        **options
            As of `deltackpt.Run.save`: ``metrics``, ``metadata``, ``overwrite``, ``allow_pickle``.

        Raises
        ------
        InvalidInputError
            If the state of a part has no plain form; the place names the part, or the rank.
        DeltackptError
            As of `deltackpt.Run.save`, on every rank.
        """
        state = self._state(options.get("allow_pickle", False))
        return _on_first(lambda: self.run.save(state, step=step, **options))

    def save_async(self, step: int, **options: Any) -> Pending | None:
        """Save a step while training goes on; returns once the parts may be changed.

        An error is raised by the next save, or, on rank 0, by whichever comes first of ``wait()`` of what
        this returns and ``close()`` of the run.

        Parameters
        ----------
        step : int
        **options
            As of `deltackpt.Run.save_async`: those of `save`, and ``when_busy``.

        Returns
        -------
        Pending or None
            None on all ranks but the first, and if the save was skipped.
        """
        state = self._state(options.get("allow_pickle", False))
        begun: list[Pending | None] = []
        _on_first(lambda: begun.append(self.run.save_async(state, step=step, **options)))
        return begun[0] if begun else None

    def resume(
        self, step: int | str = "latest", *, strict: bool = True, allow_pickle: bool = False
    ) -> int | None:
        """Put all parts and generators back where they were at a step; return it, None if there is none.

        Call it last before the loop: what draws random numbers in between is not undone.  Modules are loaded
        into the memory they have.

        Parameters
        ----------
        step : int, "latest" or "latest-good"
        strict : bool
            If False, what only the step has or only the job has is left as it is: parts, parameters, and, of
            another number of ranks, generators and loaders.  A warning is logged for each.
        allow_pickle : bool
            As of `deltackpt.Run.load`.

        Raises
        ------
        InvalidInputError
            If the step does not fit the parts, or was saved by another number of ranks; no part of this job
            has been changed, unless it refuses its state dict itself.
        NotFoundError
            If a step is asked for by its number, and is not there, or if none is good.
        CorruptError
            If something of it cannot be given back.
        DeltackptError
            What made a save in the background fail, if nobody was told yet.
        """
        found_step = _on_first(lambda: self._step(step))
        if found_step is None:
            return None
        on_all(lambda: self._load(found_step, strict, allow_pickle))
        return found_step

    # -- below

    def _step(self, step: int | str) -> int | None:
        """Return which step is meant: one for all ranks, since a later one may be there by now."""
        self.run.close()  # a save may be under way: it is the latest
        if isinstance(step, str) and self.run.latest() is None:
            return None
        return self.run.commit(step).slot.step

    def _state(self, allow_pickle: bool) -> State:
        """Return what is to be saved; only rank 0 has what all ranks have alike."""

        def own() -> dict[str, Any]:
            alike = {n: p.state_dict() for n, p in self.parts.items() if not _is_loader(p)}
            loaders = {n: p.state_dict() for n, p in self.parts.items() if _is_loader(p)}
            kept.update(alike)
            ours = {"rng": rng_state(), "loaders": loaders}
            # Here, where it can be told to all: what cannot be sent would leave the other ranks waiting.
            tree.flatten({_OURS: {"ranks": {rank: ours}}}, allow_pickle=allow_pickle)
            return ours

        rank, _ = place()
        kept: dict[str, Any] = {}
        ranks = on_all(own)
        ours = {"parts": list(self.parts), "n_ranks": len(ranks), "ranks": dict(enumerate(ranks))}
        return {**kept, _OURS: ours}

    def _load(self, step: int, strict: bool, allow_pickle: bool) -> None:
        rank, n_ranks = place()
        there, n_saved = self._content(step)
        wrong = [f"part {name!r}: is not in the step" for name in self.parts if name not in there]
        wrong += [
            f"part {name!r}: is in the step, and not in the job" for name in sorted(there - self.parts.keys())
        ]
        if n_saved != n_ranks:
            wrong.append(f"generators and loaders: are of {n_saved} ranks, and this job has {n_ranks}")
        where = f"run {self.run.name!r} step {step}"
        if wrong and strict:
            raise InvalidInputError(
                "\n  ".join([f"{where}: does not fit", *wrong]),
                hint="resume(strict=False) leaves these as they are",
            )
        _warn(where, wrong)
        alike = {n: part for n, part in self.parts.items() if n in there and not _is_loader(part)}
        # Modules are read straight into their own tensors: no second copy of the model.  Not if some may be
        # missing: it would not be told which.
        placed = {n: part.state_dict() for n, part in alike.items() if strict and _is_module(part)}
        if any(map(_is_extra, itertools.chain(*placed.values()))):
            # Of any size and kind, as the step has it: the module takes it, and it has no place of its own.
            there = self.run.load(step, keys=[*placed], lazy=True, allow_pickle=allow_pickle)
            for name, state in placed.items():
                saved = there.get(name)
                if isinstance(saved, dict):  # else it is refused below
                    state.update({k: _read(x) for k, x in saved.items() if _is_extra(k) and k in state})
        keys = [name for name in alike if name not in placed]
        if n_saved == n_ranks:
            keys.append(f"{_OURS}.ranks.{rank}")
        found = self.run.load(step, keys=keys, allow_pickle=allow_pickle) if keys else {}
        if placed:
            found |= self.run.load(step, keys=[*placed], into=placed, allow_pickle=allow_pickle)
        for name, part in alike.items():
            if strict or not _is_module(part):
                part.load_state_dict(found[name])
            else:
                missing, unexpected = part.load_state_dict(found[name], strict=False)
                _warn(where, [f"part {name!r}: {key!r} is not in the step" for key in missing])
                _warn(where, [f"part {name!r}: {key!r} is in the step only" for key in unexpected])
        if n_saved != n_ranks:
            return
        own = found[_OURS]["ranks"][rank]
        for name in own["loaders"].keys() & self.parts.keys():
            loader = self.parts[name]
            loader.load_state_dict(own["loaders"][name])
            # A StatefulDataLoader draws a seed for the iterator that it goes on with.  It is to do so now,
            # before the generators are put back: asked for its state, it makes that iterator.
            loader.state_dict()
        set_rng_state(own["rng"])

    def _content(self, step: int) -> tuple[set[str], int]:
        """Return the names of the parts that a step has, and of how many ranks it is."""
        try:
            ours = self.run.load(step, keys=[f"{_OURS}.parts", f"{_OURS}.n_ranks"])[_OURS]
        except NotFoundError:
            if step not in self.run:
                raise
            ours = {}
        names, n_ranks = ours.get("parts"), ours.get("n_ranks")
        if not isinstance(names, list) or not isinstance(n_ranks, int):
            raise InvalidInputError(
                f"run {self.run.name!r} step {step}: was not saved by Training", hint="load it by run.load"
            )
        return set(names), n_ranks


class Batches:
    """A plain ``DataLoader`` that can say how far it is, and go on from there.

    Resumed in the middle of a pass, it begins that pass anew, with the generators as they were then, and
    passes over the batches that were trained on, which takes as long as reading them.  So the rest comes in
    the same order, with the same augmentation by workers.  A pass that was left early goes on after a
    resume; within a process the next loop begins a new one.

    Parameters
    ----------
    loader : DataLoader
        With or without workers, of a dataset that keeps nothing in mind between items.

    Attributes
    ----------
    epoch : int
        How many passes are behind it; told at the beginning of each to a sampler that has ``set_epoch``, as
        a ``DistributedSampler``.

    Raises
    ------
    InvalidInputError
        If the loader cannot be repeated: ``persistent_workers`` have drawn random numbers that nobody
        counted, with ``in_order=False`` batches come as they happen to be ready; or if it keeps its own
        state.

    Examples
    --------
    >>> batches = Batches(DataLoader(range(6), batch_size=2, shuffle=True))
    >>> whole = []
    >>> for batch in batches:
    ...     whole.append(batch.tolist())
    ...     if len(whole) == 1:
    ...         saved = batches.state_dict()
    >>> again = Batches(DataLoader(range(6), batch_size=2, shuffle=True))
    >>> again.load_state_dict(saved)
    >>> [batch.tolist() for batch in again] == whole[1:], again.epoch
    (True, 1)
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        # One that Accelerate has prepared has the method, and mostly no state.
        is_stateful = hasattr(loader, "state_dict") and getattr(loader, "use_stateful_dataloader", True)
        if not isinstance(loader, DataLoader) or is_stateful:
            raise InvalidInputError(
                f"Batches: found a {type(loader).__name__}, expected a plain DataLoader",
                hint="give Training what has a state_dict as it is",
            )
        if loader.num_workers and (loader.persistent_workers or not getattr(loader, "in_order", True)):
            raise InvalidInputError(
                "Batches: with persistent_workers=True or in_order=False a pass cannot be repeated",
                hint="leave them out, or use torchdata's StatefulDataLoader",
            )
        self.loader = loader
        self.epoch = 0
        self._n_given = 0
        #: The generators as this pass found them; None before the first batch.
        self._start: dict[str, Any] | None = None
        self._is_resumed = False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Give the batches of a pass, or after `load_state_dict` of what is left of one."""
        n_behind = self._n_given if self._is_resumed else 0
        self._is_resumed = False
        if n_behind:
            now = rng_state()
            assert self._start is not None
            set_rng_state(self._start["rng"])
            self._set_generators(self._start["generators"])
        else:
            self._start = {"rng": rng_state(), "generators": self._generator_states()}
        for drawing in self._drawing():
            if hasattr(drawing, "set_epoch"):
                drawing.set_epoch(self.epoch)
        batches = iter(self.loader)
        self._n_given = sum(1 for _ in itertools.islice(batches, n_behind))
        if self._n_given < n_behind:
            raise InvalidInputError(
                f"Batches: {n_behind} of this pass are behind it, and the loader gives {self._n_given}",
                hint="make it, and its dataset, as they were when it was saved",
            )
        if n_behind:
            set_rng_state(now)
        for batch in batches:
            self._n_given += 1
            yield batch
        self.epoch += 1
        self._n_given = 0
        self._start = None

    def state_dict(self) -> dict[str, Any]:
        """Return how far it is."""
        start = self._start or {"rng": None, "generators": self._generator_states()}
        seeds = [sampler.initial_seed for sampler in self._seeded()]
        return {"epoch": self.epoch, "n_given": self._n_given, "seeds": seeds, **start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next pass begin where the state was taken."""
        seeded, seeds = self._seeded(), state["seeds"]
        if len(seeded) != len(seeds):
            raise InvalidInputError(
                f"Batches: the loader has {len(seeded)} samplers with a seed of their own, had {len(seeds)}",
                hint="make it as it was made when it was saved",
            )
        self.epoch, self._n_given = state["epoch"], state["n_given"]
        self._start = None
        if self._n_given:
            self._start = {"rng": state["rng"], "generators": state["generators"]}
        self._set_generators(state["generators"])
        for sampler, seed in zip(seeded, seeds, strict=True):
            sampler.initial_seed = seed
        self._is_resumed = True

    def _drawing(self) -> Iterator[Any]:
        """Yield the loader and its samplers, however deep they are wrapped."""
        todo: list[Any] = [self.loader]
        while todo:
            one = todo.pop()
            yield one
            inner = [getattr(one, name, None) for name in ("sampler", "batch_sampler")]
            todo += [sampler for sampler in inner if sampler is not None]

    def _generators(self) -> list[torch.Generator]:
        """Return the generators of its own that the loader draws from."""
        seeded = {id(sampler) for sampler in self._seeded()}
        found = [getattr(one, "generator", None) for one in self._drawing() if id(one) not in seeded]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def _seeded(self) -> list[Any]:
        """Return the samplers that seed their generators in each pass, as Accelerate's with a seed do."""
        return list({id(one): one for one in self._drawing() if hasattr(one, "initial_seed")}.values())

    def _generator_states(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        generators = self._generators()
        if len(generators) != len(states):
            raise InvalidInputError(
                f"Batches: the loader has {len(generators)} generators of its own, and had {len(states)}",
                hint="make it as it was made when it was saved",
            )
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def rng_state() -> dict[str, Any]:
    """Return the state of this process's generators of random numbers: Python's, NumPy's, torch's, CUDA's."""
    version, words, gauss = random.getstate()
    state = {
        "python": {"version": version, "words": np.array(words, np.uint32), "gauss": gauss},
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # else nothing was drawn there
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back; a warning is logged for those of devices that are not there."""
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    devices = state.get("cuda", [])
    n_there = torch.cuda.device_count() if devices else 0
    for device, words in enumerate(devices[:n_there]):
        torch.cuda.set_rng_state(words, device)
    _warn("generators", [f"cuda:{i} is not there" for i in range(n_there, len(devices))])


# -- parts


def _check_name(name: str, others: Iterable[str]) -> None:
    """Refuse a name that is no key, or that of more, where a step is loaded: see `deltackpt.Run.load`."""
    if name == _OURS or any(wildcard in name for wildcard in "*?["):
        raise InvalidInputError(
            f"Training: no part can be called {name!r}", hint="choose another name, without * ? ["
        )
    for other in others:
        if name.startswith(f"{other}."):
            raise InvalidInputError(
                f"Training: the part {name!r} is one in {other!r} by its name",
                hint="choose one without a dot",
            )


def _check_part(name: str, part: Any) -> None:
    if callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None)):
        return
    if isinstance(part, DataLoader):
        raise InvalidInputError(
            f"Training: {name!r} is a plain DataLoader, which cannot say how far it is",
            hint=f"{name}=Batches({name}) and loop over that, or use torchdata's StatefulDataLoader",
        )
    raise InvalidInputError(
        f"Training: {name!r} is a {type(part).__name__}, which has no state_dict and load_state_dict",
        hint="pass modules, optimizers, schedulers, or an object of yours that has both",
    )


def _unwrapped(part: Any) -> Any:
    """Return the module in a DDP wrapper, so that a step loads with one or without."""
    return part.module if isinstance(part, nn.parallel.DistributedDataParallel) else part


def _is_module(part: Any) -> bool:
    return isinstance(part, nn.Module)


def _is_loader(part: Any) -> bool:
    return isinstance(part, Iterable) and not _is_module(part)


def _is_extra(key: Any) -> bool:
    return str(key).rpartition(".")[2] == _EXTRA


def _read(x: State) -> State:
    """Return what was loaded lazily, read."""
    if isinstance(x, LazyArray):
        return x[...]
    if isinstance(x, dict):
        return {key: _read(value) for key, value in x.items()}
    if (kind := classes.kind_of(x)) is not None:
        name, items = classes.take_apart(x, _EXTRA)
        return classes.put_together(kind, name, [(field, _read(y)) for field, y in items], _EXTRA)
    return [_read(value) for value in x] if type(x) in (list, tuple) else x


def _warn(where: str, lines: Iterable[str]) -> None:
    for line in lines:
        log.warning("%s: %s", where, line)


# -- ranks


def place() -> tuple[int, int]:
    """Return this process's rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def on_all(do: Callable[[], T]) -> list[T]:
    """Call something on every rank, and return what it gives on each.

    If it fails on one, all raise, so that none waits for ever.  All must call this; of a single process it is
    the call and no more.
    """
    rank, n_ranks = place()
    if n_ranks == 1:
        return [do()]
    result, failure, told = None, None, None
    try:
        result = do()
    except Exception as e:
        failure, told = e, _told(e, rank)
    everything: list[Any] = [None] * n_ranks
    dist.all_gather_object(everything, (result, told))
    for error in (failure, *(error for _, error in everything)):
        if error is not None:
            raise error
    return [result for result, _ in everything]


def _on_first(do: Callable[[], T]) -> T:
    """Return what it gives on rank 0, on all ranks."""
    rank, _ = place()
    first: T = on_all(lambda: do() if rank == 0 else None)[0]  # type: ignore[assignment]
    return first


def _told(error: Exception, rank: int) -> DeltackptError:
    """Return an error as the other ranks raise it."""
    if isinstance(error, DeltackptError):
        return type(error)(f"rank {rank}: {error.message}", hint=error.hint)
    return DeltackptError(f"rank {rank}: {type(error).__name__}: {error}")
