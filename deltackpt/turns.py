"""Turns: the steps of a run are saved one at a time, by this process or another, now or in the background.

Owns   the lock, the saves under way and the telling of their errors, and the choice of who saves.
Never  knows what a run is, or which of its steps stay.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

from deltackpt import proxy, snapshot, tree
from deltackpt.background import Background, InThread
from deltackpt.energy import Meter
from deltackpt.errors import ConflictError, InvalidInputError
from deltackpt.glances import Watch
from deltackpt.pending import Pending
from deltackpt.proxy import Proxy
from deltackpt.report import SaveReport
from deltackpt.saver import Saver, What
from deltackpt.staging import Staging, looks
from deltackpt.types import Deferred, State, Tensor

log = logging.getLogger("deltackpt")

#: Saves: returns the report, and the latest step there was when the saver first looked.
Save: TypeAlias = Callable[[], tuple[SaveReport, int | None]]


class Request(NamedTuple):
    """A save that somebody asked for.

    Parameters
    ----------
    what : What
    allow_pickle : bool
    within : callable
        Is given what saves, and calls it; does what is to be done before the next turn; returns the report.
    tell : callable
        Is given the report, once the next turn may begin: it may ask for one itself.
    start_s : float
        When it was asked for, by `time.perf_counter`.
    meter : Meter
        Begun then.
    """

    what: What
    allow_pickle: bool
    within: Callable[[Save], SaveReport]
    tell: Callable[[SaveReport], None]
    start_s: float
    meter: Meter


class Turns:
    """Saves the steps of one run.

    Parameters
    ----------
    saver : Saver
    memory_max : int or None
        Bytes of copies and shadow together; None: no bound.

    Attributes
    ----------
    proxy : Proxy or None
        The process that saves, if there is one: then it remembers the last step, and `saver` does not.
    """

    def __init__(self, saver: Saver, memory_max: int | None) -> None:
        self.saver = saver
        self.proxy: Proxy | None = None
        self._memory_max = memory_max
        self._has_processes = True
        self._pendings: list[Pending] = []  # under way, or failed and not told
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Wait for the save under way, and forget what is remembered of the last step.

        Raises
        ------
        DeltackptError
            What made that save fail, if nobody was told yet.
        """
        if self._pid != os.getpid():
            return  # a forked child: its parent closes it
        try:
            self._settle()
        finally:
            with self._lock:
                self.saver.forget()
                self._stop_proxy()

    def save(self, state: State, asked: Request) -> SaveReport:
        """Save a state; durable and visible on return."""
        self._check_process()
        self._settle()
        self._lock.acquire()
        if self.proxy is not None:
            return self._begin(state, asked, waits=True).wait()

        def save() -> tuple[SaveReport, int | None]:
            report = self.saver.save(state, asked.what, asked.meter.read, allow_pickle=asked.allow_pickle)
            return report, self.saver.found_step

        try:
            report = asked.within(save)
        finally:
            self._lock.release()
        return _told(report, asked)

    def begin(
        self, state: State, asked: Request, when_busy: Literal["wait", "skip", "fail"]
    ) -> Pending | None:
        """Begin to save a state, which may change on return; as `Run.save_async`."""
        self._check_process()
        self._settle(wait=when_busy == "wait")
        if not self._lock.acquire(blocking=when_busy == "wait"):
            if when_busy == "skip":
                return None
            raise ConflictError(
                f"run {self.saver.run!r} step {asked.what.step}: a step is still being saved",
                hint="save less often, or when_busy='wait'",
            )
        return self._begin(state, asked, waits=False)

    def _begin(self, state: State, asked: Request, *, waits: bool) -> Pending:
        """Stage a state, and have it saved; the lock, which is held, is let go of when that is done."""
        what = asked.what
        background = pending = None
        owner = threading.Lock()
        try:
            flat = tree.flatten(state, allow_pickle=asked.allow_pickle)
            background = self._background(flat.tensors)
            memory, reusable = background.open(what, flat.tensors, asked.meter)
            pending = Pending(self.saver.run, what.step)
            line = background.line(flat, pending.begin)
            staging = Staging(self._room(background), asked.start_s, line)
            watch = snapshot.watch_of(flat, memory, self.saver.audit_every, what.step)
            pending.work = partial(self._finish, background, staging, watch, asked, owner, waits=waits)
            self._pendings.append(pending)
            order = snapshot.order_of(flat.tensors)
            staging.stage(looks(flat.tensors, order, memory, reusable, watch, staging.make_room))
        except BaseException as e:
            if owner.acquire(blocking=False):  # or the thread has it, and takes back what it wrote
                try:
                    if background is not None:
                        background.abort(e)
                finally:
                    if pending is not None:
                        pending.cancel()
                    self._lock.release()
            elif background is not None and pending is not None:
                background.fail(e)
                pending.give_up()
            raise
        asked.meter.resume()
        return pending

    def _background(self, tensors: Sequence[Tensor | Deferred]) -> Background:
        """Return who saves: another process, unless it cannot open the store, or a copy has no room."""
        if self.proxy is not None and self.proxy.is_stopped():
            self.proxy = None
        where = proxy.address(self.saver.store.backend)
        largest = max((tensor.size for tensor in tensors), default=0)
        # Beside what the shadow keeps of the last step, and of this one.
        room = math.inf if self._memory_max is None else self._memory_max - 2 * self.saver.shadow.size_max
        if where is None or largest > room or not self._has_processes:
            self._stop_proxy()
            return InThread(self.saver)
        if self.proxy is None:
            try:
                self.proxy = Proxy(where, self.saver)
            except OSError as e:
                log.warning("run %r: a thread saves, since no process can be started: %s", self.saver.run, e)
                self._has_processes = False
                return InThread(self.saver)
        return self.proxy

    def _room(self, background: Background) -> int | None:
        """Return the bytes that copies of a state may take."""
        return None if self._memory_max is None else max(0, self._memory_max - background.shadow_size)

    def _finish(
        self,
        background: Background,
        staging: Staging,
        watch: Watch,
        asked: Request,
        owner: threading.Lock,
        *,
        waits: bool,
    ) -> SaveReport:
        """Save what is staged, in a thread; then let go of the lock."""
        if not owner.acquire(blocking=False):
            raise ConflictError(f"run {self.saver.run!r}: the save was given up before it began")
        try:
            report = asked.within(partial(_saved, background, watch))
        finally:
            self._lock.release()
        return _told(report, asked, None if waits else staging.stall_s)

    def _settle(self, *, wait: bool = True) -> None:
        """Wait for saves under way; raise what made one fail, if nobody was told."""
        for pending in list(self._pendings):
            if wait or pending.done():
                try:
                    pending.settle()
                finally:
                    if pending.done() and pending in self._pendings:
                        self._pendings.remove(pending)

    def _check_process(self) -> None:
        """Refuse to save in a child that was forked in a save: locks that a thread held are held for ever."""
        if self._pid == os.getpid():
            return
        if self._lock.locked() or not all(pending.done() for pending in self._pendings):
            raise InvalidInputError(
                f"run {self.saver.run!r}: this process was forked while a step was saved",
                hint="open the store anew in the child",
            )
        self._pid = os.getpid()
        self._stop_proxy()  # which is the parent's

    def _stop_proxy(self) -> None:
        if self.proxy is not None:
            self.proxy.stop()
        self.proxy = None


def _saved(background: Background, watch: Watch) -> tuple[SaveReport, int | None]:
    """Save what is staged.  No closure: the trace of an error would hold that, and all copies with it."""
    report = background.finish()
    background.remember(watch.glances())
    return report, background.found_step


def _told(report: SaveReport, asked: Request, stall_s: float | None = None) -> SaveReport:
    """Hand a report on, complete, outside the lock."""
    total_s = time.perf_counter() - asked.start_s
    report = replace(report, total_s=total_s, stall_s=total_s if stall_s is None else stall_s)
    asked.tell(report)
    return report
