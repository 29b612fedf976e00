"""The system calls of the local backend, one method each.

Owns   nothing: a test replaces it to count, to fail or to cut any call.
Never  decides, retries or translates an error.
"""
# The calls themselves are the point here: pathlib would hide them.
# ruff: noqa: PTH102, PTH108

from __future__ import annotations

import os
import stat
from collections.abc import Sequence


class Os:
    """Calls of the operating system, as `LocalBackend` makes them; errors are bare `OSError`."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        """Open a file; `mode` is cut by the umask."""
        return os.open(path, flags, mode)

    def writev(self, fd: int, views: Sequence[memoryview]) -> int:
        """Append; may write fewer bytes than given."""
        return os.writev(fd, views)

    def write_behind(self, fd: int, offset: int, size: int) -> None:
        """Have what was written here sent to the device, without waiting for it."""
        if hasattr(os, "posix_fadvise"):
            # Linux starts to write dirty pages before it looks which are clean and may go; these are not.
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)

    def preadv(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        """Read from a position; may read fewer bytes than wanted, 0 at the end."""
        return os.preadv(fd, views, offset)

    def fstat(self, fd: int) -> os.stat_result:
        """Status of an open file."""
        return os.fstat(fd)

    def fsync(self, fd: int) -> None:
        """Make a file, or a directory's entries, durable."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close; the descriptor is gone even if this fails."""
        os.close(fd)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name, unless the name is taken."""
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        """Remove a name."""
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        """Make one directory."""
        os.mkdir(path)

    def lstat(self, path: str) -> os.stat_result:
        """Status of a name, a symbolic link being itself."""
        return os.lstat(path)

    def scandir(self, path: str) -> list[tuple[str, int]]:
        """Names in a directory, in any order, with `S_IFREG`, `S_IFDIR`, or 0 for anything else."""
        with os.scandir(path) as entries:
            return [(entry.name, _kind(entry)) for entry in entries]


def _kind(entry: os.DirEntry[str]) -> int:
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    return stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else 0
