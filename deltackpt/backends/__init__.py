"""Where objects live: a flat namespace of write-once byte strings with '/'-separated names.

Owns   the `Backend` contract, the rules for names, and the checks that every backend shares.
Never  knows what an object means, overwrites one, or touches a disk itself.
"""

from __future__ import annotations

import builtins
import re
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, cast

import numpy.typing as npt

from deltackpt.errors import CorruptError, InvalidInputError, NotFoundError, StorageError

#: Anything C-contiguous that holds bytes; to be read into, it must be writable.
Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[Any]

#: Longest name in bytes of UTF-8: what S3 allows a key.
NAME_SIZE_MAX = 1024

#: Longest part between slashes, in bytes of UTF-8: below the 255 of the usual file systems.
PART_SIZE_MAX = 240

_PLAIN = re.compile(r"[\w~-][\w.~-]*(?:/[\w~-][\w.~-]*)*", re.ASCII)

#: How many writers race for one name in `Backend.probe`.
_N_RACERS = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One object in a listing: its whole name, and its size in bytes."""

    name: str
    size: int


class Writer(ABC):
    """One object being written, seen by nobody until `commit`; for one thread.

    Leaving the ``with`` block without a commit, or after any error, leaves nothing behind.

    Examples
    --------
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> backend = MemoryBackend()
    >>> with backend.create("packs/7f.pack") as writer:
    ...     writer.write(b"head", b"body")
    ...     writer.commit()
    True
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.abort()

    @abstractmethod
    def write(self, *buffers: Buffer) -> None:
        """Append the buffers in order; all of their bytes, or a `StorageError` and the writer is dead."""

    @abstractmethod
    def commit(self) -> bool:
        """Flush the bytes and publish them under the name: True if ours are there, False if it was taken.

        The name itself survives a power loss only after `Backend.barrier`.
        """

    @abstractmethod
    def abort(self) -> None:
        """Drop what was written; does nothing after a commit."""


class Backend(ABC):
    """Storage of write-once objects; every method may be called from any thread.

    A name is at most 1024 bytes of parts joined by '/'; no part is empty, starts with '.', is longer than
    240 bytes, or holds NUL or a backslash. Anything else is an `InvalidInputError`, from every method.
    What the storage refuses is a `StorageError` with the system's errno; an absent object is a
    `NotFoundError`.

    **Order of durability.** Creating an object flushes its bytes but not its name. The caller decides what
    must outlive what by calling `barrier` in between: all that was created before it is durable before
    anything created after it can be seen. So a save pays one flush per object and one per directory,
    however many objects the directory gained.

    Attributes
    ----------
    url : str
        Which storage this is, for messages.
    path : str or None
        The directory by which another process of this machine opens the same; None if it cannot.
    """

    url: str
    path: str | None = None

    def is_same(self, other: Backend) -> bool:
        """Whether both are one storage, by whatever name each was opened."""
        return self is other

    @abstractmethod
    def make_dirs(self, names: Iterable[str]) -> None:
        """Make the storage and these directories, where it has such things; durable at the next barrier.

        Directories below these are made when an object needs them.
        """

    @abstractmethod
    def rely_on(self, names: Iterable[str]) -> None:
        """Take it from the caller that these directories, and the storage's own, are durable already.

        No barrier flushes their names then.
        """

    @abstractmethod
    def doubt(self, directory: str) -> None:
        """Take what is directly under a directory for not durable, whoever made it: a barrier flushes it.

        Whoever finds an object cannot know whether its writer lived to have its name flushed.
        """

    @abstractmethod
    def create_once(self, name: str, data: Buffer, *, flush: bool = True) -> bool:
        """Publish `data` under `name` unless the name is taken, all of it at once.

        Parameters
        ----------
        name : str
            Name of the object.
        data : buffer
            Its bytes; not needed any more when the call returns.
        flush : bool
            False: seen by everybody at once, but neither the bytes nor the name are made durable. After a
            power loss the object may be gone, empty or cut short.

        Returns
        -------
        bool
            True: ours is there. False: the name was taken. Of any number of callers one gets True.
        """

    @abstractmethod
    def create(self, name: str) -> Writer:
        """Begin an object whose bytes come piece by piece."""

    @abstractmethod
    def barrier(self, *directories: str) -> None:
        """Make durable all that this backend has created, or found taken, since the last barrier.

        Objects created with ``flush=False`` are not waited for, nor are deletes: a deleted object may come
        back after a power loss.

        Parameters
        ----------
        *directories : str
            Only what is directly under these, as in ``barrier("packs", "refs/main")``; without any,
            everything.
        """

    @abstractmethod
    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `offset` on, or all that follow; `CorruptError` if there are fewer."""

    @abstractmethod
    def read_into(self, name: str, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill the writable buffers one after the other from `offset` on.

        Raises
        ------
        CorruptError
            If the object ends before the buffers are full, or the device cannot read it (EIO); their
            contents are then undefined.
        """

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of an object."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether the object can be seen now."""

    @abstractmethod
    def age_s(self, name: str) -> float:
        """Seconds since the object was written, by the storage's own clock; never negative."""

    @abstractmethod
    def list(self, prefix: str) -> builtins.list[Entry]:
        """All objects directly under a directory, sorted by name; none if it does not exist.

        Parameters
        ----------
        prefix : str
            ``""`` or ends in '/', as in ``"packs/"``.
        """

    def names(self, prefix: str) -> builtins.list[str]:
        """The names of `list`, without asking for sizes: on a file system that is a system call each."""
        return [entry.name for entry in self.list(prefix)]

    @abstractmethod
    def list_dirs(self, prefix: str) -> builtins.list[str]:
        """Last parts of the names of the directories directly under `prefix`, sorted.

        A directory that holds no object may be in the list or not.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; nothing happens if there is none."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held open."""

    def keep_reserve(self) -> None:  # noqa: B027 - most storage is not full to the last byte
        """Keep a little space back, if there is none yet, for what leads to more of it being freed.

        Where storage may run full; it is no object, and that there is no room for it is no error.
        """

    def spend_reserve(self, share: float = 1.0) -> bool:
        """Give back the space that is kept, or a share of it; False if there is no so much."""
        return False

    def probe(self) -> None:
        """Try what a store relies on: of several writers of one name one wins, and a flush works.

        The racers are threads of this process: storage that errs between machines is not found out.

        Raises
        ------
        StorageError
            Naming what the storage cannot do.
        """
        name = f"tmp/probe-{secrets.token_hex(4)}"
        won: list[int] = []
        failed: list[BaseException] = []
        start = threading.Barrier(_N_RACERS)

        def race(racer: int) -> None:
            start.wait()
            try:
                if self.create_once(name, b"%d" % racer):
                    won.append(racer)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=race, args=(racer,)) for racer in range(_N_RACERS)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if failed:
                raise failed[0]
            self.barrier()
            found = self.read(name)
        finally:
            with suppress(StorageError):
                self.delete(name)
        if len(won) != 1 or found != b"%d" % won[0]:
            raise StorageError(
                f"{self.url}: create-once: writers {won} of one name were told that they won, and {found!r} "
                "is there; expected one winner and its bytes",
                hint="put the store on storage with atomic hard links or conditional puts",
            )


def check_name(name: str) -> str:
    """Give the name back if it is one that every backend can hold; `InvalidInputError` if not."""
    fault = _fault_of(name)
    if fault:
        raise InvalidInputError(f"object name {name[:300]!r}: {fault}", hint="give another name")
    return name


def is_name(name: str) -> bool:
    """Whether every backend can hold an object of this name."""
    if len(name) <= PART_SIZE_MAX and _PLAIN.fullmatch(name):  # nearly all: a listing asks of every name
        return True
    return not _fault_of(name)


def _fault_of(name: str) -> str:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if size > NAME_SIZE_MAX:
        return f"has {size} bytes, at most {NAME_SIZE_MAX} are allowed"
    if "\0" in name or "\\" in name:
        return "holds NUL or a backslash"
    for part in name.split("/"):
        if not part:
            return "has an empty part, expected parts joined by single slashes"
        # Covers '.' and '..', and what file systems hide: .nfs0001, .snapshot, .DS_Store.
        if part[0] == ".":
            return f"part {part[:300]!r} starts with a dot"
        if len(part.encode()) > PART_SIZE_MAX:
            return f"a part has {len(part.encode())} bytes, at most {PART_SIZE_MAX} are allowed"
    return ""


def check_prefix(prefix: str) -> str:
    """Give the prefix of a listing back if it is empty or a name and a slash; `InvalidInputError` if not."""
    if prefix:
        if not prefix.endswith("/"):
            raise InvalidInputError(f"prefix {prefix[:300]!r} does not end in '/'", hint="add the slash")
        check_name(prefix[:-1])
    return prefix


def check_range(where: str, offset: int, wanted_size: int, size: int) -> None:
    """Check that an object of `size` bytes has `wanted_size` at `offset`, before anything is allocated."""
    if offset < 0 or wanted_size < 0:
        raise InvalidInputError(f"{where}: cannot read {wanted_size} bytes from offset {offset}")
    if offset + wanted_size > size:
        raise too_short(where, offset, wanted_size, size)


def too_short(where: str, offset: int, wanted_size: int, size: int) -> CorruptError:
    """The error for an object that ends after `size` bytes, too early."""
    got_size = max(0, size - offset)
    return CorruptError(
        f"{where} @ {offset}: found {got_size} bytes, expected {wanted_size}; the object ends at {size}",
        hint="run verify",
    )


def unreadable(where: str, offset: int, wanted_size: int) -> CorruptError:
    """The error for bytes that the device does not give back: as bad as changed, another copy will do."""
    return CorruptError(
        f"{where} @ {offset}: the device cannot read {wanted_size} bytes (EIO)",
        hint="look at the system log, then run repair",
    )


def not_found(where: str) -> NotFoundError:
    """The error for an object that is not there."""
    return NotFoundError(f"{where}: there is no such object")


def byte_views(buffers: Iterable[Buffer]) -> list[memoryview]:
    """Flat views of the buffers' bytes, without the empty ones, which have nothing to move."""
    # The cast is for type checkers: before Python 3.12 they cannot know that an array is a buffer.
    views = (memoryview(cast(Any, buffer)) for buffer in buffers)
    return [view.cast("B") for view in views if view.nbytes]
