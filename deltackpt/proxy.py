"""A proxy: what the process that trains has of the one that saves for it.

Owns   starting that process and stopping it, what of the last step training has to know, and the memory of
       the copies.
Never  saves: it looks, copies and waits.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from deltackpt.arena import Arena
from deltackpt.backends import Backend
from deltackpt.energy import Meter
from deltackpt.errors import StorageError
from deltackpt.format import CHUNK_ID_SIZE
from deltackpt.glances import Glances
from deltackpt.manifest import TensorRow
from deltackpt.memory import Ends, Known, Memory
from deltackpt.report import SaveReport
from deltackpt.saver import Saver, What
from deltackpt.staging import Line, Look, Reusable
from deltackpt.tree import Flat
from deltackpt.types import Deferred, Tensor, without_bytes
from deltackpt.wire import (
    SIGNALS,
    Bare,
    Done,
    End,
    Fail,
    Failed,
    Found,
    Hello,
    Logged,
    Opened,
    Plan,
    Ready,
    Settle,
    Settled,
    Wire,
)

if TYPE_CHECKING:
    from subprocess import Popen

log = logging.getLogger("deltackpt")
T = TypeVar("T")

_NO_IDS = np.empty((0, CHUNK_ID_SIZE), np.uint8)

#: Seconds that a process which is to end gets for it.
_STOP_S = 10.0
_CODE = "import sys; sys.path[:] = {path!r}; from deltackpt.server import main; main({wire}, {arena}, {pid})"


def address(backend: Backend) -> str | None:
    """Return by what another process can open a store; None if none can, or no memory can be shared here."""
    can_start = sys.executable and not getattr(sys, "frozen", False)  # or it would be the whole application
    return backend.path if can_start and hasattr(os, "memfd_create") else None


class Proxy:
    """Has a run's steps saved by another process.

    Parameters
    ----------
    store : str
        As `address` returns it.
    saver : Saver
        What is remembered of the last step; the other process takes over from it.

    Raises
    ------
    OSError
        If no process can be started, or it ends before it can save.
    """

    def __init__(self, store: str, saver: Saver) -> None:
        # Here, since they take 15 ms, and most processes never save in the background.
        from multiprocessing import Pipe
        from subprocess import DEVNULL, Popen

        self._arena = Arena()
        here, there = Pipe()
        with there:
            fds = there.fileno(), self._arena.fd
            path = [entry for entry in sys.path if isinstance(entry, str)]  # as imports take them
            code = _CODE.format(path=path, wire=fds[0], arena=fds[1], pid=os.getpid())
            # Until it ignores them: it inherits what is blocked.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                process = Popen(
                    [sys.executable, "-P", "-c", code],
                    pass_fds=fds,
                    # One arena of malloc for all threads: each of its own keeps some MB that it freed.
                    env={**os.environ, "MALLOC_ARENA_MAX": "1"},
                    stdin=DEVNULL,
                    stdout=DEVNULL,  # or a reader of ours would wait for its end
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._wire = Wire(here)
        self._process = process
        self._stop = weakref.finalize(self, _stop, self._wire, process, os.getpid())
        #: The last step, as far as training has to know it: cuts and fingerprints.
        self._seen = saver.memory or Memory()
        self.shadow_size = 0
        self.found_step: int | None = None
        self._bare: list[Bare] | None = None
        self._is_open = self._has_ended = self._is_over = self._is_talking = False
        self._saver = saver
        self._send(Hello(store, saver.run, saver.shadow.size_max, saver.memory, saver.last_step))
        self._answer(Ready)
        saver.forget()

    @property
    def pid(self) -> int:
        """The other process."""
        return self._process.pid

    def stop(self) -> None:
        """End the other process, once it has done what it was asked to."""
        self._stop()
        self._arena.close()

    def is_stopped(self) -> bool:
        """Return whether it is gone; if it ended by itself, while nobody saved, that is no error."""
        if self._process.poll() is not None:
            self.stop()
        return not self._stop.alive

    # -- one save

    def open(self, what: What, tensors: Sequence[Tensor | Deferred], meter: Meter) -> tuple[Memory, Reusable]:
        """See `Background.open`."""
        self._found: list[Found] = []
        self._arena.used_size = 0
        self._cuts: dict[int, tuple[Ends, list[bytes]]] = {}
        self._meter = meter
        self._is_open = self._has_ended = self._is_over = False
        self._is_open = True
        self._send(what)
        opened = self._answer(Opened)
        self.found_step = opened.found_step
        self._is_new = opened.is_new
        refused = set(opened.refused)
        return self._seen, lambda known: known.row.name not in refused

    def line(self, flat: Flat, begin: Callable[[], None]) -> Line:
        """See `Background.line`."""
        self._begin = begin
        self._tensors = list(map(without_bytes, flat.tensors))  # the state is not to be held
        bare = [(t.name, t.dtype, t.shape, t.framework) for t in flat.tensors]
        likest = self._saver.before(flat.tensors) if self._is_new else None
        plan = Plan(flat.structure, bare if bare != self._bare else None, likest)
        self._bare = None  # until it is there
        self._send(plan)
        self._bare = bare
        return self

    def same(self, found: Look) -> None:
        """See `Line.same`."""
        self._found.append(Found(found.at, None, []))

    def copy(self, found: Look) -> None:
        """See `Line.copy`."""
        if found.before is not None:
            self._cuts[found.at] = found.before.ends, found.fingerprints
        place = self._arena.place(found.tensor.data)
        self._found.append(Found(found.at, place, found.fingerprints))

    def lend(self, found: Look) -> None:
        """See `Line.lend`; nobody can lend another process his memory."""
        raise AssertionError("a tensor larger than the room is saved by a thread")

    def _flush(self) -> None:
        """Send what was found.  Not before all is copied: who saves would take cores and memory from that."""
        if self._found:
            self._send(self._found)
        self._found = []

    def settle(self) -> int:
        """See `Line.settle`."""
        self._flush()
        self._send(Settle())
        settled = self._answer(Settled)
        self._is_over = settled.kept_size is None
        self._arena.keep(settled.held)
        return settled.kept_size or 0

    def is_over(self) -> bool:
        """See `Line.is_over`."""
        return self._is_over

    def end(self) -> None:
        """See `Line.end`."""
        self._flush()
        self._meter.resume()
        end = End(self._meter.held())
        self._has_ended = self._is_talking = True  # first: an interrupt finds it sent, or on its way
        self._send(end)
        self._arena.trim()
        self._begin()

    def finish(self) -> SaveReport:
        """See `Background.finish`."""
        try:
            done = self._answer(Done)
            self._saver.last_step = done.report.step  # for whoever saves when the other process is gone
            self._cuts.update(done.cuts)
            seen = []
            for at, tensor in enumerate(self._tensors):
                if tensor.size:
                    seen.append(self._known(at, tensor))
            self._seen = Memory(seen)
            self._arena.keep(done.held)
            self._arena.trim(
                self._arena.used_size
            )  # the next save may need as much, not what the first one did
            self.shadow_size = done.shadow_size
            self._is_open = False
        finally:
            self._drop()
        return done.report

    def remember(self, glances: Glances) -> None:
        """See `Background.remember`."""
        self._seen.glances = glances

    def _known(self, at: int, tensor: Tensor | Deferred) -> Known:
        if at not in self._cuts:
            return self._seen.named(tensor.name)
        ends, fingerprints = self._cuts[at]
        row = TensorRow(tensor.name, tensor.dtype, tensor.shape, tensor.framework, tensor.size, 0, b"", b"")
        return Known(row, ends, _NO_IDS, fingerprints, None)

    def abort(self, error: BaseException) -> None:
        """See `Background.abort`."""
        if self.is_stopped() or not self._is_open:
            return
        try:
            if not self._is_talking:
                if not self._has_ended:
                    self._send(Fail(f"{type(error).__name__}: {error}"))
                self.finish()  # its answer must not be taken for one to the next save
        except Exception as e:
            log.debug("run %r: given up: %s", self._saver.run, e)
        finally:
            self._drop()

    def _drop(self) -> None:
        """End the other process if it is in a save still: its answer would be taken for one to the next."""
        if self._is_open:
            self._process.kill()
            self.stop()

    def fail(self, error: BaseException) -> None:
        """See `Background.fail`: by then all is sent."""

    # -- the wire

    def _send(self, message: Any) -> None:
        self._is_talking = True
        try:
            self._wire.send(message)
        except OSError as e:
            raise self._gone() from e
        self._is_talking = False

    def _answer(self, kind: type[T]) -> T:
        """Wait for an answer; log what comes before it, raise what went wrong."""
        while True:
            self._is_talking = True
            try:
                message = self._wire.receive()
            except (EOFError, OSError) as e:
                raise self._gone() from e
            self._is_talking = False
            if isinstance(message, Logged):
                log.log(message.level, "%s", message.text)
            elif isinstance(message, Failed):
                self._is_open = False
                self._arena.keep(message.held)
                raise message.error
            else:
                assert isinstance(message, kind)
                return message

    def _gone(self) -> StorageError:
        self.stop()
        code = self._process.returncode
        return StorageError(
            f"the process that saves ended by itself ({code})",
            hint="save again; if it was short of memory, give open_run a memory_max",
        )


def _stop(wire: Wire, process: Popen[bytes], pid: int) -> None:
    """Close the wire, on which the other process ends; in a forked child, only this end of it."""
    wire.close()
    if os.getpid() != pid:
        process.returncode = 0  # it is not this process's to wait for
        return
    from subprocess import TimeoutExpired

    try:
        process.wait(_STOP_S)
    except TimeoutExpired:
        process.kill()
        process.wait()
