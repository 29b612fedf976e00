"""Staging: what of a state changed, and copies of that, so that training may go on before it is saved.

Owns   the comparison with what is remembered, how many bytes of copies there may be, and the line on which
       they go to a thread.
Never  knows what becomes of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from deltackpt.digests import fingerprint
from deltackpt.glances import Watch
from deltackpt.memory import Known, Memory
from deltackpt.types import U8, Deferred, Tensor

_ZERO = bytes(1)
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


def look(
    at: int,
    given: Tensor | Deferred,
    memory: Memory,
    reusable: Reusable,
    watch: Watch,
    make_room: Callable[[int], None] = lambda size: None,
) -> Look:
    """Compare one tensor with what is remembered.

    Parameters
    ----------
    at : int
    given : Tensor or Deferred
    memory : Memory
    reusable : callable
    watch : Watch
        Tells what need not be looked at.
    make_room : callable
        Given bytes, before as many are copied to be looked at.
    """
    before = memory.same_place(given)
    if before is not None and before.fingerprints is not None and watch.is_same(at) and reusable(before):
        watch.passed(at)
        tensor = _bare(given) if isinstance(given, Deferred) else given
        return Look(at, tensor, before, before.fingerprints, True, False)
    is_own = isinstance(given, Deferred) and given.is_own
    if is_own:
        make_room(given.size)
    tensor = given.taken() if isinstance(given, Deferred) else given
    fingerprints = fingerprint(tensor.data, before.ends) if before is not None else []
    is_same = before is not None and fingerprints == before.fingerprints
    watch.looked(at, is_same=is_same)
    is_same = is_same and before is not None and reusable(before)
    return Look(at, tensor, before, fingerprints, is_same, is_own)


def looks(
    tensors: Sequence[Tensor | Deferred],
    order: Iterable[int],
    memory: Memory,
    reusable: Reusable,
    watch: Watch,
    make_room: Callable[[int], None] = lambda size: None,
) -> Iterator[Look]:
    """Look at each tensor that has bytes when it is asked for, and copy none that need not be."""
    for at in order:
        if tensors[at].size:
            yield look(at, tensors[at], memory, reusable, watch, make_room)


def _bare(tensor: Tensor | Deferred) -> Tensor:
    """Return what a tensor is, with zeros that take no memory for its bytes."""
    nothing = np.ndarray(tensor.size, np.uint8, _ZERO, 0, (0,))
    return Tensor(tensor.name, tensor.dtype, tensor.shape, tensor.framework, nothing)


class Line(Protocol):
    """How a state gets from the thread that trains to whoever saves it."""

    def same(self, found: Look) -> None:
        """Send a tensor that is what it was: no bytes."""

    def copy(self, found: Look) -> None:
        """Send a copy of a tensor, or the tensor if it is one already and that will do."""

    def lend(self, found: Look) -> None:
        """Send a tensor that must not change until `settle` has returned."""

    def settle(self) -> int:
        """Wait until all that was sent is saved; return how many bytes of copies are still needed."""

    def end(self) -> None:
        """Say that this was all."""

    def is_over(self) -> bool:
        """Return whether nobody takes anything any more: what made the save fail is told by it."""


class Staging:
    """Copies a state onto a line: the state may be changed once `stage` returns.

    Where there is no room for a copy, it waits until those before are saved.  A tensor larger than all of the
    room is not copied: it waits until that is saved.

    Parameters
    ----------
    size_max : int or None
        Bytes of copies at a time; None: whatever it takes.
    start_s : float
        Since when training has been held, by `time.perf_counter`.
    line : Line

    Examples
    --------
    >>> tensor = Tensor("w", "uint8", (3,), "numpy", np.arange(3, dtype=np.uint8))
    >>> queue = Queue(lambda: None)
    >>> watch = Watch(["w"], [None], Memory().glances, 1, step=0)
    >>> Staging(None, 0.0, queue).stage([look(0, tensor, Memory(), lambda known: True, watch)])
    >>> tensor.data[:] = 0
    >>> [found.tensor.data.tolist() for found in queue.received(lambda: 0)]
    [[0, 1, 2]]
    """

    def __init__(self, size_max: int | None, start_s: float, line: Line) -> None:
        self._size_max = size_max
        self._start_s = start_s
        self._line = line
        self._size = 0
        #: Seconds that training was held.
        self.stall_s = 0.0

    def stage(self, found: Iterable[Look]) -> None:
        """Copy what changed."""
        for one in found:
            if self._line.is_over():
                break
            self._stage(one)
        self.stall_s = time.perf_counter() - self._start_s
        self._line.end()

    def _stage(self, found: Look) -> None:
        size = found.tensor.size
        if found.is_same:
            self._size -= size if found.is_own else 0
            self._line.same(found)
            return
        if not found.is_own:
            self.make_room(size)
        if self._size_max is None or self._size <= self._size_max:
            self._line.copy(found)
        else:
            self._line.lend(found)
            self._size = self._line.settle()

    def make_room(self, size: int) -> None:
        """Take room for a copy; wait for it, if there is none, until those before are saved."""
        if self._size_max is not None and self._size + size > self._size_max:
            self._size = self._line.settle()
        self._size += size


class Queue:
    """A `Line` to a thread of this process.

    Parameters
    ----------
    begin : callable
        Begins the thread that saves: once all is staged, or when there is no more room.  Two threads that
        take turns at the interpreter's lock make the first wait the longer.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin: Callable[[], None] | None = begin
        self._queue: SimpleQueue[Look | threading.Event | BaseException | None] = SimpleQueue()
        self._kept_size = 0
        self._copies = _Copies()
        self._over = threading.Event()

    def same(self, found: Look) -> None:
        """See `Line.same`."""
        self._queue.put(found._replace(tensor=_bare(found.tensor), is_own=False))

    def copy(self, found: Look) -> None:
        """See `Line.copy`."""
        if not found.is_own:
            data = self._copies.of(found.tensor.data)
            found = found._replace(tensor=replace(found.tensor, data=data), is_own=True)
        self._queue.put(found)

    def lend(self, found: Look) -> None:
        """See `Line.lend`."""
        self._queue.put(found._replace(is_own=False))

    def settle(self) -> int:
        """See `Line.settle`."""
        settled = threading.Event()
        self._queue.put(settled)
        self._have_begun()
        while not settled.wait(0.05):
            if self._over.is_set():
                break
        self._copies = _Copies()
        return self._kept_size

    def end(self) -> None:
        """See `Line.end`."""
        self._queue.put(None)
        self._have_begun()

    def is_over(self) -> bool:
        """See `Line.is_over`."""
        return self._over.is_set()

    def fail(self, error: BaseException) -> None:
        """End what `received` gives, by an error: there will be no more."""
        self._queue.put(error)

    def _have_begun(self) -> None:
        begin, self._begin = self._begin, None
        if begin is not None:
            begin()

    def received(self, settle: Callable[[], int]) -> Iterator[Look]:
        """Take what was put, in order.

        Parameters
        ----------
        settle : callable
            Saves what was received so far, lets go of it, and returns the bytes of copies that it keeps.
        """
        try:
            while (found := self._queue.get()) is not None:
                if isinstance(found, threading.Event):
                    self._kept_size = settle()
                    found.set()
                elif isinstance(found, BaseException):
                    raise StoppedError(
                        f"{type(found).__name__} while the state was copied: {found}"
                    ) from None
                else:
                    yield found
                del found
        finally:
            self.close()

    def close(self) -> None:
        """Take nothing any more: whoever waits for room goes on."""
        self._over.set()


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
