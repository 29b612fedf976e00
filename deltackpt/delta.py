"""The verbs: save a state, load it back, read a part of it.

Owns   the runs this process has used, so that a second save finds what changed without reading.
Never  does more than find the run and call it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from deltackpt.backends import Backend
from deltackpt.backends.local import LocalBackend
from deltackpt.efforts import Optimize, check_optimize
from deltackpt.loader import DeviceMap
from deltackpt.report import SaveReport
from deltackpt.run import Run, open_run
from deltackpt.store import DESCRIPTOR, Store, Where, check_path
from deltackpt.types import State

#: Runs remembered; each holds about 100 bytes for every 256 KiB of its last state.
_N_RUNS_MAX = 8
_runs: OrderedDict[tuple[Any, str], Run] = OrderedDict()
_lock = threading.Lock()


def save(
    state: State,
    store: Where,
    *,
    step: int,
    run: str = "main",
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    optimize: Optimize = "time",
) -> SaveReport:
    """Save a state as one step of a run; durable and visible on return.

    Only chunks that the store does not have are written.  When the call returns, the step survives
    kill -9 and power loss; when it raises, the steps are as before, but that after a `StorageError` at the
    very last flush this one may be there.

    Parameters
    ----------
    state : State
        Any nesting of plain values, containers, NumPy arrays and torch tensors (listed in docs/reference.md).
        Arrays that share memory are stored once, and share memory when they are loaded.  It must not change
        until the call returns.
    store : path, Backend or Store
        Where; a directory is made if it does not exist.
    step : int
        0 <= step < 2 ** 63.
    run : str
        Runs of one store share what they have in common.
    metrics : dict of str to float, optional
        Shown by ``deltackpt ls``; retention can keep the best by one.
    metadata : dict, optional
        Anything JSON can hold, up to 1 MiB.
    overwrite : bool
        Supersede the step if it is there.
    allow_pickle : bool
        Pickle what has no plain form, instead of refusing it; `load` must be told the same, and then runs
        code that whoever wrote the store chose.
    optimize : {"time", "bytes", "energy"}
        As of `deltackpt.open_run`.

    Returns
    -------
    SaveReport
        Bytes in, new and written, and seconds by phase.

    Raises
    ------
    InvalidInputError
        If the state, step or run cannot be saved; names what and where in the state.
    AlreadyExistsError
        If the run has this step already.
    ConflictError
        If another process saved this step at the same time.
    StorageError
        If the disk is full or fails.

    Examples
    --------
    >>> import numpy as np
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> store = MemoryBackend()
    >>> report = save({"w": np.zeros(1000), "step": 1}, store, step=1)
    >>> report.logical_size
    8000
    """
    check_optimize(optimize)  # before a store is made
    found = _run(store, run, create=True)
    found.optimize = optimize
    return found.save(
        state,
        step=step,
        metrics=metrics,
        metadata=metadata,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
    )


def load(
    store: Where,
    *,
    step: int | str = "latest",
    run: str = "main",
    keys: str | Sequence[str] | None = None,
    into: State | None = None,
    strict: bool = True,
    map: DeviceMap = None,
    lazy: bool = False,
    allow_pickle: bool = False,
) -> State:
    """Load a step, bit for bit, with the nesting and the types it was saved with.

    Parameters
    ----------
    store : path, Backend or Store
    step : int, "latest" or "latest-good"
        latest-good: the newest step every chunk of which is there and decodes to its id.
    run : str
    keys : str or list of str, optional
        Load only what these names or shell patterns match, as in ``"model.*"``; nothing else is read.
    into : State, optional
        A state of the same nesting whose arrays are filled in place: no second copy of the model.
    strict : bool
        Whether `into` and the step must have the same arrays; if not, those that only one of them has are
        left out.  Dtypes and shapes must fit in any case.
    map : device, dict or callable, optional
        Where torch's tensors go: a device; ``{"cuda:0": "cuda:1"}`` by the device they were saved from; or a
        function of a tensor's name and that device.  What is not mapped, or to None, stays on the CPU.
    lazy : bool
        Give a `LazyArray` for each array, which reads from the store what it is indexed by: for states larger
        than memory.
    allow_pickle : bool
        Unpickle what was saved with ``allow_pickle=True``.  **Whoever can write to the store can then run
        code here.**

    Returns
    -------
    State
        Tensors of torch's on the CPU unless `map` says otherwise; where torch is not installed NumPy arrays,
        with the dtypes of ml_dtypes where NumPy has none.

    Raises
    ------
    NotFoundError
        If there is no such store, run, step or key; names the nearest.
    InvalidInputError
        If `into` does not fit; lists every difference.
    MissingDependencyError
        If a class of the state is not imported, or no installed package has a dtype.
    CorruptError
        If what was saved cannot be given back; names tensor, chunk and pack.  Never zeros, never a guess.

    Examples
    --------
    >>> import numpy as np
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> store = MemoryBackend()
    >>> report = save({"w": np.arange(3), "epoch": 2}, store, step=1)
    >>> load(store)
    {'w': array([0, 1, 2]), 'epoch': 2}
    """
    return _run(store, run, create=False).load(
        step, keys=keys, into=into, strict=strict, map=map, lazy=lazy, allow_pickle=allow_pickle
    )


def read(
    store: Where, step: int | str, name: str, index: Any = ..., *, run: str = "main", map: DeviceMap = None
) -> Any:
    """Read one array of a step, or a part of it, and no more chunks than hold it.

    Parameters
    ----------
    store : path, Backend or Store
    step : int or "latest"
    name : str
        Its key path joined by dots, as ``deltackpt show`` lists it.
    index
        As NumPy's basic indexing: integers, slices of any step, ``...`` and None, or a tuple of them.
    run : str
    map : device, dict or callable, optional
        As of `load`.

    Returns
    -------
    numpy.ndarray or torch.Tensor
        An array of its own.

    Raises
    ------
    NotFoundError
        If there is no such store, run, step or array; names the nearest.
    InvalidInputError
        If `index` is out of range or of another kind.
    CorruptError
        If a chunk of that part cannot be given back.

    Examples
    --------
    >>> import numpy as np
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> store = MemoryBackend()
    >>> report = save({"model": {"w": np.arange(12).reshape(3, 4)}}, store, step=1)
    >>> read(store, 1, "model.w", (slice(None, None, 2), -1))
    array([ 3, 11])
    """
    return _run(store, run, create=False).read(step, name, index, map=map)


def _forget_runs() -> None:
    """Start anew in a forked child: another thread may have held the lock, or a run's."""
    global _lock
    _lock = threading.Lock()
    _runs.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_runs)


def _run(where: Where, name: str, *, create: bool) -> Run:
    """Return the run, the same one as in the last call if the store is still the same."""
    if isinstance(where, (Backend, Store)):
        key: Any = id(where)
    else:
        key = os.path.abspath(check_path(where))  # noqa: PTH100 - a key, links kept
    with _lock:
        run = _runs.get((key, name))
        if run is not None and _is_same_store(run, where):
            _runs.move_to_end((key, name))
            return run
        run = open_run(where, name, create=create)
        _runs[key, name] = run
        while len(_runs) > _N_RUNS_MAX:
            _runs.popitem(last=False)
        return run


def _is_same_store(run: Run, where: Where) -> bool:
    """Whether the remembered run's store was not deleted or made anew meanwhile."""
    if isinstance(where, Backend | Store):
        return (where.backend if isinstance(where, Store) else where) is run.store.backend
    backend = LocalBackend(where)  # the run's own may hold a deleted file open
    try:
        return backend.read(DESCRIPTOR) == run.store.descriptor_bytes
    except LookupError:
        return False
    finally:
        backend.close()
