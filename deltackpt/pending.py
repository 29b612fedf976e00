"""Pending: a save on its way, while the training that asked for it goes on.

Owns   the thread that saves, what became of it, and telling it once.
Never  saves: it is given what to do.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from deltackpt.errors import StorageError
from deltackpt.report import SaveReport

log = logging.getLogger("deltackpt")


class Pending:
    """A save that goes on by itself; `Run.save_async` returns it.

    Parameters
    ----------
    run, step : str, int
    work : callable
        Saves, and returns the report.

    Examples
    --------
    >>> pending = Pending("main", 7, lambda: SaveReport("main", 7, 0, 0, 0, 0, 0, 0, {}, 0.0))
    >>> pending.begin()
    >>> pending.wait().step, pending.done(), pending.error
    (7, True, None)
    """

    def __init__(self, run: str, step: int, work: Callable[[], SaveReport]) -> None:
        self.run = run
        self.step = step
        #: What stopped it, once it is done; None if it is saved.
        self.error: BaseException | None = None
        self._report: SaveReport | None = None
        self._work = work
        self._is_told = False
        self._staged = threading.Event()
        self._done = threading.Event()
        self._pid = os.getpid()
        # No daemon: the interpreter waits for it at its end, so that the last save is not lost.
        self._thread = threading.Thread(target=self._save, name=f"deltackpt-save-{step}")

    def begin(self) -> None:
        """Begin to save, in a thread."""
        self._thread.start()

    def _save(self) -> None:
        try:
            self._report = self._work()
        except BaseException as e:
            log.error("run %r step %d is not saved: %s", self.run, self.step, e)
            self.error = e
        finally:
            del self._work  # with it goes what it holds of the state
            self._done.set()

    def mark_staged(self) -> None:
        """Say that the state may be changed."""
        self._staged.set()

    def staged(self) -> bool:
        """Return whether the state may be changed: always, of what `save_async` has returned."""
        return self._staged.is_set()

    def done(self) -> bool:
        """Return whether it is over: saved and durable, or failed."""
        return self._done.is_set()

    @property
    def report(self) -> SaveReport | None:
        """What it cost; None until it is saved, or if it failed."""
        return self._report

    def wait(self, timeout_s: float | None = None) -> SaveReport:
        """Wait until it is durable and visible; return what it cost.

        Parameters
        ----------
        timeout_s : float, optional

        Raises
        ------
        TimeoutError
            If it takes longer; it goes on.
        DeltackptError
            What made it fail; then the steps are as before.
        """
        self._check_process()
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"run {self.run!r} step {self.step}: not saved after {timeout_s} s")
        self._is_told = True
        if self.error is not None:
            raise self.error
        assert self._report is not None
        return self._report

    def settle(self) -> None:
        """Wait until it is over; raise what made it fail, unless `wait` has.

        Does nothing in the thread that saves, where `on_save` may save once more.
        """
        if threading.current_thread() is self._thread:
            return
        self._check_process()
        self._done.wait()
        if self.error is not None and not self._is_told:
            self._is_told = True
            raise self.error

    def give_up(self) -> None:
        """Wait until it is over; whoever calls has met the error that made it fail, and raises that."""
        self._is_told = True
        self._done.wait()

    def _check_process(self) -> None:
        """A forked child has no thread that would ever end this."""
        if os.getpid() != self._pid and not self._done.is_set():
            self._done.set()
            self.error = StorageError(
                f"run {self.run!r} step {self.step}: is saved by the process that this one was forked from",
                hint="save and wait in one process",
            )
            self._is_told = True
