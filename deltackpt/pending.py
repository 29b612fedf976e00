"""Pending: a save on its way, while the training that asked for it goes on.

Owns   the thread that saves, what became of it, and telling it once.
Never  saves: it is given what to do.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections.abc import Callable

from deltackpt.errors import InvalidInputError, StorageError
from deltackpt.report import SaveReport

log = logging.getLogger("deltackpt")


class Pending:
    """A save that goes on by itself; `Run.save_async` returns it.

    Parameters
    ----------
    run, step : str, int

    Examples
    --------
    >>> pending = Pending("main", 7)
    >>> pending.work = lambda: SaveReport("main", 7, 0, 0, 0, 0, 0, 0, {}, 0.0)
    >>> pending.begin()
    >>> pending.wait().step, pending.done(), pending.error
    (7, True, None)
    """

    def __init__(self, run: str, step: int) -> None:
        self.run = run
        self.step = step
        #: Saves, and returns the report.
        self.work: Callable[[], SaveReport] | None = None
        #: What stopped it, once it is done; None if it is saved.
        self.error: BaseException | None = None
        self._report: SaveReport | None = None
        self._is_told = False
        self._done = threading.Event()
        self._pid = os.getpid()
        # No daemon: the interpreter waits for it at its end, so that the last save is not lost.
        self._thread = threading.Thread(target=self._save, name=f"deltackpt-save-{step}")

    def begin(self) -> None:
        """Begin to save, in a thread."""
        self._thread.start()

    def _save(self) -> None:
        try:
            work, self.work = self.work, None  # with it goes what it holds of the state
            assert work is not None
            self._report = work()
        except BaseException as e:
            log.error("run %r step %d is not saved: %s", self.run, self.step, e)
            traceback.clear_frames(e.__traceback__)  # they hold every copy of the state
            self.error = e
        finally:
            work = None
            self._done.set()

    def staged(self) -> bool:
        """Return whether the state may be changed: always, of what `save_async` has returned."""
        return True

    def done(self) -> bool:
        """Return whether it is over: saved and durable, or failed."""
        self._check_process()
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
            What made it fail: as of `deltackpt.delta.save`.
        InvalidInputError
            If it is called by what the save itself calls, as `on_save` is.
        """
        if threading.current_thread() is self._thread:
            raise InvalidInputError(
                f"run {self.run!r} step {self.step}: on_save cannot wait for its own save",
                hint="use the report it is given",
            )
        self._check_process()
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"run {self.run!r} step {self.step}: not saved after {timeout_s} s")
        self._is_told = True
        if self.error is not None:
            raise self.error
        assert self._report is not None
        return self._report

    def settle(self) -> None:
        """Wait until it is over; raise what made it fail, unless somebody was told.

        Does nothing in the thread that saves, where `on_save` may save once more.
        """
        if threading.current_thread() is self._thread:
            return
        self._check_process()
        self._done.wait()
        if self.error is not None and not self._is_told:
            self._is_told = True
            raise self.error

    def cancel(self) -> None:
        """Say that it never began; `save_async` raises why."""
        self._is_told = True
        self._done.set()

    def give_up(self) -> None:
        """Wait until it is over; `save_async` raises what ends it."""
        self._is_told = True
        self._done.wait()

    def _check_process(self) -> None:
        """A forked child has no thread that would ever end this."""
        if os.getpid() != self._pid and not self._done.is_set():
            self.error = StorageError(
                f"run {self.run!r} step {self.step}: is saved by the process that this one was forked from",
                hint="save and wait in one process",
            )
            self._done.set()
