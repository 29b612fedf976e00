"""Targets: what the user asked for at a path, put there whole and durably, or not at all.

Owns   the hidden names beside one, the renames, what a kill left of them, words for what the system refuses.
Never  looks into a file, or knows a store.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from deltackpt import process
from deltackpt.errors import InvalidInputError, NotFoundError, StorageError


def beside(path: Path, kind: str) -> Path:
    """Return a new hidden name in the directory of a target, which tells whose it is."""
    return path.with_name(f".deltackpt-{_mark(path)}.{process.tag()}.{secrets.token_hex(4)}.{kind}")


def _mark(path: Path) -> str:
    return blake3(os.fsencode(path.name)).hexdigest(length=8)


@contextmanager
def placing(path: Path) -> Iterator[Path]:
    """Yield a hidden name for a new file or directory, which takes the name `path` when the block ends well.

    Or else it vanishes.  What a process that is dead left of the same target goes too: first what it was
    writing, which takes room; last, once there is another, what it had moved away.
    """
    _sweep(path, "tmp")
    temporary = beside(path, "tmp")
    try:
        yield temporary
        _put_in_place(temporary, path)
    except BaseException:
        discard(temporary)
        raise
    _sweep(path, "old")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that takes the name `path`, durably, when the block ends well, or else vanishes."""
    if not path.parent.is_dir():
        raise NotFoundError(f"{path.parent}: no such directory", hint="create it first")
    if path.is_dir():
        raise InvalidInputError(f"{path}: is a directory, expected a file name")
    with placing(path) as temporary:
        with storage_errors(path):
            file = temporary.open("x+b")
        with file:
            yield file
            with storage_errors(path):
                file.flush()
                os.fsync(file.fileno())


def _put_in_place(temporary: Path, path: Path) -> None:
    """Give what was written under a hidden name its own, durably.

    A directory cannot take the place of another in one move: that one is moved away first, and deleted once
    the new one has its name.
    """
    away = beside(path, "old")
    with storage_errors(path):
        is_away = path.is_dir() and not path.is_symlink()
        if is_away or (temporary.is_dir() and os.path.lexists(path)):
            path.rename(away)
        try:
            temporary.rename(path)
        except BaseException:
            if os.path.lexists(away):
                away.rename(path)
            raise
    flush_names(path.parent)
    discard(away)


def _sweep(path: Path, kind: str) -> None:
    """Delete what processes that are dead have left of a target."""
    mine = re.compile(rf"\.deltackpt-{_mark(path)}\.([^.]+)\.[0-9a-f]+\.{kind}")
    with suppress(OSError):
        for other in path.parent.iterdir():
            found = mine.fullmatch(other.name)
            if found and process.is_dead_by(found[1]):
                discard(other)


def remove(path: Path) -> None:
    """Remove a directory; by its name it is whole, or not there."""
    gone = beside(path, "gone")
    with storage_errors(path):
        path.rename(gone)
    discard(gone)


def remove_leftovers(directory: Path) -> None:
    """Remove what is left of a directory whose removal was cut short."""
    for path in directory.glob(".deltackpt-*.gone"):
        discard(path)


def discard(path: Path) -> None:
    """Delete a file or a directory, as far as the system lets."""
    if path.is_dir() and not path.is_symlink():
        for directory, _, _ in os.walk(path):  # those without write permission too
            with suppress(OSError):
                Path(directory).chmod(0o700)
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, where they are not there; durable on return.

    Raises
    ------
    StorageError
        If it cannot be made.
    """
    with storage_errors(path):
        if path.is_dir():
            return
    make_directory(path.parent)
    with storage_errors(path):
        path.mkdir(exist_ok=True)
    flush_names(path.parent)


def flush_names(directory: Path) -> None:
    """Have what was created, renamed or removed there survive a power loss."""
    with storage_errors(directory):
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def reserve(fd: int, size: int) -> None:
    """Take the disk space now: a full disk met later, through a map, would kill the process by SIGBUS."""
    try:
        os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as error:  # AttributeError: macOS has none
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(fd, size)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Name the file in what the system refuses."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}", errno=error.errno) from error
