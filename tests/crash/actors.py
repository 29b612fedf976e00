"""Actors: processes that take turns at one disk, each stopping where it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from disk import Disk

from deltackpt.backends import Backend

#: Says before which call an actor is to stop.
Stop = Callable[[str, tuple], bool]


def before(call: str, name: str) -> Stop:
    """Before a call of this kind on a path that has this in it."""
    return lambda now, args: now == call and any(isinstance(arg, str) and name in arg for arg in args)


def behind(call: str, name: str) -> Stop:
    """Before whatever call comes after such a one."""
    is_it, seen = before(call, name), []

    def stop(now, args):
        if seen:
            return True
        seen.extend([now] if is_it(now, args) else [])
        return False

    return stop


def at_call(n: int) -> Stop:
    """Before the n-th call from now, counted from 0."""
    left = iter(range(n))
    return lambda now, args: next(left, None) is None


def never(now, args):
    return False


class Actor(threading.Thread):
    """A process of its own: it goes on when it is told to, until it is to stop or has ended."""

    def __init__(self, backend: Backend, act: Callable[[Backend], object]):
        super().__init__(daemon=True)
        self._backend, self._act = backend, act
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._stop: Stop = never
        self.is_over = False
        self.n_calls = 0
        self.error: BaseException | None = None

    def advance(self, stop: Stop) -> None:
        if self.is_over:
            return
        self._stop = stop
        if self.ident is None:
            self.start()
        else:
            self._go.release()
        assert self._halted.acquire(timeout=120), "an actor hangs"

    def pause_before(self, call: str, args: tuple) -> None:
        if self._stop(call, args):
            self._halted.release()
            self._go.acquire()
        self.n_calls += 1

    def run(self) -> None:
        try:
            self._act(self._backend)
        except BaseException as e:
            self.error = e
        self.is_over = True
        self._halted.release()


@contextmanager
def pausing(disk: Disk) -> Iterator[None]:
    """Every call of an actor is a place where it may stop."""

    def hook(call: str, *args: object) -> None:
        actor = threading.current_thread()
        # A close may come from the interpreter's tidying up, in the middle of another call.
        if isinstance(actor, Actor) and call != "close":
            actor.pause_before(call, args)

    disk.hook = hook
    yield
    disk.hook = lambda call, *args: None
