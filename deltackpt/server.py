"""The process that saves, while another one trains.

Owns   its life, from its start to the end of the process it saves for, and the answers on the wire.
Never  has a state of its own: bytes come by the arena, and what it wrote is a step like any other.

Two threads of one process take turns at the interpreter's lock, and at the cores: a training loop in Python
ran at half its speed while threads saved, and the save took ten times as long.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from deltackpt.arena import Window
from deltackpt.digests import fingerprint
from deltackpt.energy import Energy, Meter
from deltackpt.memory import Memory
from deltackpt.saver import Saver, What
from deltackpt.session import Session
from deltackpt.shadow import Shadow
from deltackpt.snapshot import reusable
from deltackpt.staging import Look, StoppedError
from deltackpt.store import open_store
from deltackpt.tree import Flat
from deltackpt.types import Deferred, Tensor, no_bytes
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
    PromptWire,
    Ready,
    Settle,
    Settled,
    Wire,
    portable,
)

log = logging.getLogger("deltackpt")

#: What training takes of a core goes first, by about ten to one.
_NICENESS = 10
#: Seconds after which the end of the other process is noticed while a step is saved.
_WATCH_S = 0.25
_ZERO = np.zeros(1, np.uint8)


class Server:
    """Saves the steps of one run for another process.

    Parameters
    ----------
    wire : Wire
    window : Window
    """

    def __init__(self, wire: Wire, window: Window) -> None:
        self._wire = wire
        self._window = window
        self._hello: Hello = wire.receive()
        self._saver: Saver | None = None
        self._bare: list[Bare] = []

    def serve(self) -> None:
        """Save one step after another, until an `EOFError` says that nobody wants more."""
        self._wire.send(Ready())
        while True:
            what: What = self._wire.receive()
            try:
                meter, saver = Meter(), self._opened()
                session = saver.open(what)
                opened = self._opening(saver, session)
            except Exception as e:
                self._wire.send(Failed(portable(e), self._window.held()))
            else:
                self._wire.send(opened)
                self._wire.send(self._one(saver, session, what, meter))
                del session  # with what it encoded into

    def _opened(self) -> Saver:
        if self._saver is None:
            hello = self._hello
            self._saver = Saver(open_store(hello.store), hello.run, Shadow(hello.shadow_size_max))
            self._saver.memory, self._saver.last_step = hello.memory, hello.last_step
            self._hello = hello._replace(memory=None)
        return self._saver

    def _opening(self, saver: Saver, session: Session) -> Opened:
        usable = reusable(session)
        try:
            refused = [
                known.row.name for known in saver.memory or () if known.fingerprints and not usable(known)
            ]
        except BaseException:
            session.abort()
            raise
        return Opened(refused, saver.found_step, saver.memory is None)

    def _one(self, saver: Saver, session: Session, what: What, meter: Meter) -> Done | Failed:
        received = _Received(self._wire, self._window)
        try:
            return self._save(saver, session, received, what, meter)
        except Exception as e:
            session.abort()
            error = portable(e)
            traceback.clear_frames(e.__traceback__)  # they hold copies
        received.drain()
        return Failed(error, self._window.held())

    def _save(self, saver: Saver, session: Session, received: _Received, what: What, meter: Meter) -> Done:
        plan: Plan = received.take()
        self._bare = self._bare if plan.tensors is None else plan.tensors
        flat = Flat(plan.structure, [Deferred(*bare, no_bytes) for bare in self._bare])
        memory = plan.likest or saver.memory or Memory()

        def taken(moved_size: int, written_size: int) -> Energy:
            return Energy.total([received.energy, meter.read(moved_size, written_size)])

        report = saver.save_looks(
            session, flat, lambda settle: received.looks(flat, memory, settle), memory, what, taken
        )
        assert saver.memory is not None
        cuts = {}
        for at in received.changed:
            known, before = saver.memory.named(flat.tensors[at].name), memory.same_place(flat.tensors[at])
            assert known.fingerprints is not None
            if before is None or before.fingerprints is None or known.ends is not before.ends:
                cuts[at] = known.ends, known.fingerprints
        return Done(report, cuts, saver.shadow.size, self._window.held())


class _Received:
    """What of a state comes on the wire."""

    def __init__(self, wire: Wire, window: Window) -> None:
        self._wire = wire
        self._window = window
        self._is_over = False
        self.changed: list[int] = []
        self.energy = Energy()

    def take(self) -> Any:
        """Return the next message."""
        message = self._wire.receive()
        self._is_over = isinstance(message, End | Fail)
        if isinstance(message, Fail):
            raise StoppedError(f"{message.why} while the state was copied")
        return message

    def looks(self, flat: Flat, memory: Memory, settle: Callable[[], int]) -> Iterator[Look]:
        """Return each tensor that was looked at, with its copy."""
        while not isinstance(message := self.take(), End):
            if isinstance(message, Settle):
                kept_size = settle()
                self._wire.send(Settled(kept_size, self._window.held()))
            else:
                for found in message:
                    yield self._look(found, flat.tensors[found.at], memory)
        self.energy = message.energy

    def _look(self, found: Found, given: Tensor | Deferred, memory: Memory) -> Look:
        before = memory.same_place(given)
        if found.place is None:
            assert before is not None, f"{given.name} is not known here"  # or zeros would be saved
            zeros = np.broadcast_to(_ZERO, given.size)
            nothing = Tensor(given.name, given.dtype, given.shape, given.framework, zeros)
            return Look(found.at, nothing, before, found.fingerprints, True, False)
        self.changed.append(found.at)
        data = self._window.at(found.place)
        # What the process that trains has not seen yet, it has no fingerprints of.
        fingerprints = found.fingerprints or (fingerprint(data, before.ends) if before is not None else [])
        tensor = Tensor(given.name, given.dtype, given.shape, given.framework, data)
        return Look(found.at, tensor, before, fingerprints, False, True)

    def drain(self) -> None:
        """Read on to the end, whatever comes."""
        while not self._is_over:
            message = self._wire.receive()
            self._is_over = isinstance(message, End | Fail)
            if isinstance(message, Settle):
                self._wire.send(Settled(None, self._window.held()))


class _Sent(logging.Handler):
    """Logs on the wire."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire = wire

    def emit(self, record: logging.LogRecord) -> None:
        """Send what was logged; whoever gets it decides what becomes of it."""
        with suppress(OSError):
            self._wire.send(Logged(record.levelno, record.getMessage()))


def _watch(parent: int) -> None:
    """End this process with the other: a step must not appear once its job may have gone on elsewhere."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os._exit(1)


def main(wire_fd: int, arena_fd: int, parent: int) -> None:
    """Save for the process `parent`, until it wants no more or is gone."""
    for number in SIGNALS:  # which the other one blocked, until now
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with suppress(OSError):
        os.nice(_NICENESS)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    wire = PromptWire(Connection(wire_fd))
    log.addHandler(_Sent(wire))
    log.setLevel(logging.INFO)
    log.propagate = False
    with suppress(EOFError, ConnectionError):
        Server(wire, Window(arena_fd)).serve()
