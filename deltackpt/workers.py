"""Workers: the threads of this process that hash, encode and decode.

Owns   how many there are, their one pool, and what happens at the end of the interpreter.
Never  knows what they do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def n_threads() -> int:
    """Return how many threads encode and decode: one a core that is this process's, at most 8.

    The ranks of a job that are on one machine share its cores: ``LOCAL_WORLD_SIZE``, as torchrun and its like
    set it, says how many they are.  A rank that is bound to cores of its own has those.
    """
    n_all = os.cpu_count() or 1
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_all
    n_ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    share = n_all // max(1, int(n_ranks) if n_ranks.isdecimal() else 1)
    return max(1, min(8, n_cores, share))


def submit(pool: ThreadPoolExecutor, function: Callable[..., R], *args: Any) -> Future[R]:
    """Have a thread of a pool call a function; call it here if it takes nothing any more.

    At the end of the interpreter pools take nothing, but a save that is under way then is to be finished.
    """
    future: Future[R] = Future()
    claim = threading.Lock()

    def once() -> None:
        # A pool that cannot start a thread has queued the call all the same, and may make it later.
        if claim.acquire(blocking=False) and future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*args))
            except BaseException as e:
                future.set_exception(e)

    try:
        pool.submit(once)
    except RuntimeError:
        once()
    return future


class Workers:
    """Worker threads, made when first needed and again in a forked child.

    Examples
    --------
    >>> list(Workers(n_threads).map(abs, [-1, 2, -3]))
    [1, 2, 3]
    """

    def __init__(self, n: Callable[[], int]) -> None:
        self._n = n
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def submit(self, function: Callable[..., R], *args: Any) -> Future[R]:
        """Have a thread call a function."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._n(), "deltackpt")
            pool = self._pool
        return submit(pool, function, *args)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Return what a function says of each item, in order, asked for in threads."""
        futures = [self.submit(function, item) for item in items]
        return (future.result() for future in futures)

    def forget(self) -> None:
        """Start anew in a forked child: threads are not inherited, a lock that one held is."""
        self._lock = threading.Lock()
        self._pool = None


workers = Workers(n_threads)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=workers.forget)
