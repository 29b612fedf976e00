"""Staging: what of a state changed, and copies of that, so that training may go on before it is saved.

Owns   the comparison with what is remembered, the copies, and how many bytes of them there may be.
Never  knows what becomes of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import NamedTuple, TypeAlias

import numpy as np

from deltackpt.digests import fingerprint
from deltackpt.memory import Known, Memory
from deltackpt.types import U8, Deferred, Tensor

_ZERO = np.zeros(1, np.uint8)
#: What copies are made in: as much of it as is written takes memory.
_PIECE_SIZE = 32 << 20
_ALIGNMENT = 64
#: Whether a save may rely on the chunks of a remembered tensor.
Reusable: TypeAlias = Callable[[Known], bool]


class StoppedError(RuntimeError):
    """A save whose state was not copied to its end; who copied it has the error itself."""


class Look(NamedTuple):
    """A tensor of a state, compared with what is remembered of the last one.

    Parameters
    ----------
    at : int
        Its place in the state.
    tensor : Tensor
    before : Known or None
        What was remembered under its name, of its dtype and shape.
    fingerprints : list of bytes
        Of its bytes, cut as they were before; none without `before`.
    is_same : bool
        Whether it is what it was, and the store has it.
    is_own : bool
        Whether its bytes are a copy that nobody else has.

    What is staged and the same has no bytes any more, but zeros that take no memory.
    """

    at: int
    tensor: Tensor
    before: Known | None
    fingerprints: list[bytes]
    is_same: bool
    is_own: bool


def look(at: int, given: Tensor | Deferred, memory: Memory, reusable: Reusable) -> Look:
    """Compare one tensor with what is remembered."""
    tensor = given.taken() if isinstance(given, Deferred) else given
    before = memory.same_place(tensor)
    fingerprints = fingerprint(tensor.data, before.ends) if before is not None else []
    is_same = before is not None and fingerprints == before.fingerprints and reusable(before)
    return Look(at, tensor, before, fingerprints, is_same, tensor is not given)


def looks(
    tensors: Sequence[Tensor | Deferred], order: Iterable[int], memory: Memory, reusable: Reusable
) -> Iterator[Look]:
    """Look at each tensor that has bytes when it is asked for, and copy none."""
    for at in order:
        if tensors[at].size:
            yield look(at, tensors[at], memory, reusable)


class Staging:
    """Copies on their way from a thread that trains to one that saves.

    The one calls `stage`, and may change the state once it returns; the other takes what there is from
    `received`.  Where there is no room for a copy, the first waits until `settle` has let go of those before.
    A tensor larger than all of it is not copied: the first waits until it is saved.

    Parameters
    ----------
    size_max : int or None
        Bytes of copies at a time; None: whatever it takes.
    start_s : float
        Since when the first thread has been held, by `time.perf_counter`.
    begin : callable
        Begins the second thread: once all is staged, or when there is no more room.  Two threads that take
        turns at the interpreter's lock make the first wait the longer.

    Examples
    --------
    >>> tensor = Tensor("w", "uint8", (3,), "numpy", np.arange(3, dtype=np.uint8))
    >>> staging = Staging(None, 0.0, lambda: None)
    >>> staging.stage([look(0, tensor, Memory(), lambda known: True)])
    >>> tensor.data[:] = 0
    >>> [found.tensor.data.tolist() for found in staging.received(lambda: 0)]
    [[0, 1, 2]]
    """

    def __init__(self, size_max: int | None, start_s: float, begin: Callable[[], None]) -> None:
        self._size_max = size_max
        self._start_s = start_s
        self._begin: Callable[[], None] | None = begin
        #: Seconds that the first thread was held.
        self.stall_s = 0.0
        self._queue: SimpleQueue[Look | threading.Event | BaseException | None] = SimpleQueue()
        self._size = 0
        self._copies = _Copies()
        self._ended = threading.Event()

    def stage(self, found: Iterable[Look]) -> None:
        """Copy what changed."""
        for one in found:
            if self._ended.is_set():
                break  # nobody takes it: what made the save fail is told by it
            self._stage(one)
        self.stall_s = time.perf_counter() - self._start_s
        self._queue.put(None)
        self._have_begun()

    def fail(self, error: BaseException) -> None:
        """End what `received` gives, by an error: there will be no more."""
        self._queue.put(error)

    def _have_begun(self) -> None:
        begin, self._begin = self._begin, None
        if begin is not None:
            begin()

    def _stage(self, found: Look) -> None:
        size = found.tensor.size
        if found.is_same:
            nothing = np.broadcast_to(_ZERO, size)
            self._queue.put(found._replace(tensor=replace(found.tensor, data=nothing), is_own=False))
            return
        fits = True
        if self._size_max is not None and self._size + size > self._size_max:
            self._settle()
            fits = self._size + size <= self._size_max
        if fits:
            self._size += size
            data = found.tensor.data if found.is_own else self._copies.of(found.tensor.data)
            self._queue.put(found._replace(tensor=replace(found.tensor, data=data), is_own=True))
        else:
            self._queue.put(found._replace(is_own=False))
            self._settle()

    def _settle(self) -> None:
        """Wait until all that was staged is saved; or until nobody saves any more."""
        settled = threading.Event()
        self._queue.put(settled)
        self._have_begun()
        while not settled.wait(0.05):
            if self._ended.is_set():
                break
        self._copies = _Copies()

    def received(self, settle: Callable[[], int]) -> Iterator[Look]:
        """Take what was staged, in order.

        Parameters
        ----------
        settle : callable
            Saves what was received so far, lets go of it, and returns the bytes of copies that it keeps.
        """
        try:
            while (found := self._queue.get()) is not None:
                if isinstance(found, threading.Event):
                    self._size = settle()
                    found.set()
                elif isinstance(found, BaseException):
                    raise StoppedError(
                        f"{type(found).__name__} while the state was copied: {found}"
                    ) from None
                else:
                    yield found
                del found
        finally:
            self.end()

    def end(self) -> None:
        """Say that nobody takes anything any more: whoever waits for room goes on."""
        self._ended.set()


class _Copies:
    """Copies that stand one after another in few large pieces of memory.

    Fresh memory costs more than the copy, unless it is so large that the system gives it in huge pages.
    """

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def of(self, data: U8) -> U8:
        """Return a copy."""
        size = -(-data.size // _ALIGNMENT) * _ALIGNMENT
        if size > self._free.size:
            self._free = np.empty(max(size, _PIECE_SIZE), np.uint8)
        copy, self._free = self._free[: data.size], self._free[size:]
        np.copyto(copy, data)
        return copy
