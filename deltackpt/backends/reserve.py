"""The reserve: space kept on a disk for what leads to more of it being freed.

Owns   its one file, and how large that is.
Never  raises: that there is no room for it is no error.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress

from deltackpt.backends.osshim import Os

#: What a forget and a gc on a full disk need, or as much as there is room for.  Most records of theirs take a
#: block of the file system, 4 KiB.
_SIZE, _SIZE_MIN = 128 << 10, 8 << 10
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


class Reserve:
    """A file that means nothing, to be deleted when the disk is full.

    Parameters
    ----------
    calls : Os
    path : str
        Its name is that of no object: nobody lists it.
    """

    def __init__(self, calls: Os, path: str) -> None:
        self._os = calls
        self._path = path

    def keep(self) -> None:
        """Make it, unless it is there and whole."""
        size = _SIZE
        with suppress(OSError):
            if self._os.lstat(self._path).st_size >= size:
                return
        # It is not there, was cut short, or is of a time when there was less room.
        while size >= _SIZE_MIN and not self._write(size):
            size //= 2

    def spend(self, share: float) -> bool:
        """Give back a share of it, all but what is of use; False if there is nothing to give."""
        try:
            size = self._os.lstat(self._path).st_size
            left_size = max(int(size * (1 - share)), _SIZE_MIN if share < 1 else 0)
            if left_size >= size:
                return False
            self._os.unlink(self._path)
        except OSError:
            return False
        if left_size:
            self._write(left_size)
        return True

    def _write(self, size: int) -> bool:
        """Have it take so much space; False if there is not as much."""
        with suppress(OSError):
            self._os.unlink(self._path)
        done_size = 0
        with suppress(OSError):
            fd = self._os.open(self._path, _WRITE, 0o666)
            try:
                # Not zeros, which some file systems store as nothing.  Cut short, there was no more room.
                written_size = self._os.writev(fd, [memoryview(secrets.token_bytes(size))])
            finally:
                self._os.close(fd)
            done_size = written_size  # some tell only now that there is no room
        return done_size == size
