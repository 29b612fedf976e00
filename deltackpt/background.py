"""The background: who saves a state, once it is staged, while training goes on.

Owns   what there is to know of either way, and that of a thread of this process; that of another process is
       proxy.py.
Never  stages, or waits for anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from deltackpt import snapshot
from deltackpt.energy import Meter
from deltackpt.glances import Glances
from deltackpt.memory import Memory
from deltackpt.report import SaveReport
from deltackpt.saver import Saver, What
from deltackpt.session import Session
from deltackpt.staging import Line, Queue, Reusable
from deltackpt.tree import Flat
from deltackpt.types import Deferred, Tensor, without_bytes


class Background(Protocol):
    """Saves one step at a time: `open`, `line`, and then `finish` in a thread of its own; or else `abort`."""

    @property
    def found_step(self) -> int | None:
        """See `Saver`."""

    @property
    def shadow_size(self) -> int:
        """Bytes of the shadow."""

    def open(self, what: What, tensors: Sequence[Tensor | Deferred], meter: Meter) -> tuple[Memory, Reusable]:
        """Begin a save; return what is remembered, and whether the save may rely on that."""

    def line(self, flat: Flat, begin: Callable[[], None]) -> Line:
        """Return how the state is to be sent; `begin` begins the thread that calls `finish`."""

    def finish(self) -> SaveReport:
        """Save what is sent; durable on return."""

    def remember(self, glances: Glances) -> None:
        """Remember the glances at the step that `finish` saved."""

    def abort(self, error: BaseException) -> None:
        """Give the save up, since staging failed before anybody called `finish`."""

    def fail(self, error: BaseException) -> None:
        """Say that staging failed while somebody is in `finish`, which is to raise."""


class InThread:
    """Saves one step, in the thread that calls `finish`.

    Parameters
    ----------
    saver : Saver
    """

    def __init__(self, saver: Saver) -> None:
        self._saver = saver
        self._session: Session | None = None

    @property
    def found_step(self) -> int | None:
        """See `Saver`."""
        return self._saver.found_step

    @property
    def shadow_size(self) -> int:
        """Bytes of the shadow."""
        return self._saver.shadow.size

    def open(self, what: What, tensors: Sequence[Tensor | Deferred], meter: Meter) -> tuple[Memory, Reusable]:
        """See `Background.open`."""
        self._what, self._meter = what, meter
        self._session = self._saver.open(what)
        self._memory = self._saver.before(tensors)
        return self._memory, snapshot.reusable(self._session)

    def line(self, flat: Flat, begin: Callable[[], None]) -> Line:
        """See `Background.line`."""
        # The state itself is the caller's again once it is staged: the thread must not hold it.
        self._flat = Flat(flat.structure, [without_bytes(tensor) for tensor in flat.tensors])
        self._queue = Queue(begin)
        return self._queue

    def finish(self) -> SaveReport:
        """See `Background.finish`."""
        assert self._session is not None
        try:
            return self._saver.save_looks(
                self._session,
                self._flat,
                self._queue.received,
                self._memory,
                self._what,
                self._meter.read,
            )
        finally:
            self._queue.close()

    def remember(self, glances: Glances) -> None:
        """See `Background.remember`."""
        assert self._saver.memory is not None
        self._saver.memory.glances = glances

    def abort(self, error: BaseException) -> None:
        """See `Background.abort`."""
        if self._session is not None:
            self._session.abort()

    def fail(self, error: BaseException) -> None:
        """See `Background.fail`."""
        self._queue.fail(error)
