"""Handles: the files that were read last, kept open.

Owns   how many there are, and who still reads one that is to be closed.
Never  writes, or translates what the system says.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress

from deltackpt.backends.osshim import Os
from deltackpt.errors import NotFoundError

# Not to wait: a pipe in the place of an object has nobody at its other end.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class Handle:
    """An open file, closed when it is neither kept nor in use."""

    __slots__ = ("fd", "is_kept", "n_users", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self.n_users = 1
        self.is_kept = False


class Handles:
    """The files read last, kept open, so that a restore opens each pack once."""

    def __init__(self, calls: Os, n_open_max: int) -> None:
        self._os = calls
        self._n_open_max = n_open_max
        self._kept: OrderedDict[str, Handle] = OrderedDict()
        self._n_drops = 0
        self._lock = threading.Lock()

    def __del__(self) -> None:
        # Whoever loads by path, again and again, never sees the backend that is to be closed.
        self.drop_all()

    def acquire(self, path: str) -> Handle:
        """The open file, for use until `release`; bare `OSError` if it cannot be opened."""
        with self._lock:
            handle = self._kept.get(path)
            if handle is not None:
                self._kept.move_to_end(path)
                handle.n_users += 1
                return handle
            n_drops = self._n_drops
        handle = self._open(path)
        with self._lock:
            # Opened by two at once: each uses its own, one is kept. Dropped meanwhile: maybe this very file.
            if path not in self._kept and n_drops == self._n_drops:
                handle.is_kept = True
                self._kept[path] = handle
            evicted = [self._kept.popitem(last=False)[1] for _ in range(len(self._kept) - self._n_open_max)]
        self._let_go(evicted)
        return handle

    def release(self, handle: Handle) -> None:
        """Be done with a file."""
        with self._lock:
            handle.n_users -= 1
            is_last = not handle.n_users and not handle.is_kept
        if is_last:
            self._close(handle)

    def drop(self, path: str) -> None:
        """Keep a file no longer."""
        with self._lock:
            self._n_drops += 1
            handle = self._kept.pop(path, None)
        self._let_go([handle] if handle else [])

    def drop_deleted(self) -> None:
        """Keep no file that somebody deleted: while it is open the system does not give its space back."""
        with self._lock:
            paths = list(self._kept)
        for path in paths:
            try:
                self._os.lstat(path)
            except FileNotFoundError:
                self.drop(path)
            except OSError:
                continue

    def drop_all(self) -> None:
        """Keep no file."""
        with self._lock:
            self._n_drops += 1
            handles = list(self._kept.values())
            self._kept.clear()
        self._let_go(handles)

    def _let_go(self, handles: Iterable[Handle]) -> None:
        for handle in handles:
            with self._lock:
                handle.is_kept = False
                is_unused = not handle.n_users
            if is_unused:
                self._close(handle)

    def _open(self, path: str) -> Handle:
        fd = self._os.open(path, _READ)
        try:
            status = self._os.fstat(fd)
            check_is_file(path, status)
        except BaseException:
            self._os.close(fd)
            raise
        return Handle(fd, status.st_size)

    def _close(self, handle: Handle) -> None:
        # Nothing was written through it, so nothing is lost.
        with suppress(OSError):
            self._os.close(handle.fd)


def check_is_file(where: str, status: os.stat_result) -> None:
    """Refuse what is no regular file."""
    if not stat.S_ISREG(status.st_mode):
        kind = stat.filemode(status.st_mode)[0]
        raise NotFoundError(f"{where}: found an entry of kind {kind!r}, expected a regular file ('-')")
