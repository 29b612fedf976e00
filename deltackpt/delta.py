"""The two verbs: save a state, load it back.

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
from deltackpt.report import SaveReport
from deltackpt.run import Run, open_run
from deltackpt.store import DESCRIPTOR, Store, Where, check_path
from deltackpt.types import State

#: Runs remembered; each holds about 60 bytes for every 256 KiB of its last state.
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
) -> SaveReport:
    """Save a state as one step of a run; durable and visible on return.

    Only chunks that the store does not have are written.  When the call returns, the step survives
    kill -9 and power loss; when it raises, the store is as before.

    Parameters
    ----------
    state : State
        Any nesting of dict, list, tuple, None, bool, int, float, str, bytes, NumPy arrays and torch tensors.
        It must not change until the call returns.
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
    return _run(store, run, create=True).save(
        state, step=step, metrics=metrics, metadata=metadata, overwrite=overwrite
    )


def load(
    store: Where,
    *,
    step: int | str = "latest",
    run: str = "main",
    keys: str | Sequence[str] | None = None,
    into: State | None = None,
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

    Raises
    ------
    NotFoundError
        If there is no such store, run, step or key; names the nearest.
    InvalidInputError
        If `into` does not fit; lists every difference.
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
    return _run(store, run, create=False).load(step, keys=keys, into=into)


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
