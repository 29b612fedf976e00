"""Objects in a dict: for tests, and for a store that need not outlive the process.

Owns   the bytes it holds.
Never  touches a disk.
"""

from __future__ import annotations

import builtins
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from deltackpt.backends import (
    Backend,
    Buffer,
    Entry,
    Writer,
    byte_views,
    check_name,
    check_prefix,
    check_range,
    not_found,
)
from deltackpt.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes
    created_s: float


class MemoryBackend(Backend):
    """A `Backend` in memory; nothing is durable, and a barrier has nothing to do.

    Parameters
    ----------
    clock : callable, optional
        Seconds, from any origin, that never go back; what `age_s` goes by.

    Examples
    --------
    >>> backend = MemoryBackend()
    >>> backend.create_once("refs/main/7.1", b"ours"), backend.create_once("refs/main/7.1", b"theirs")
    (True, False)
    >>> backend.read("refs/main/7.1")
    b'ours'
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.url = "memory:"
        self._clock = clock
        self._objects: dict[str, _Object] = {}
        self._lock = threading.Lock()

    def make_dirs(self, names: Iterable[str]) -> None:
        """Check the names; there are no directories here."""
        for name in names:
            check_name(name)

    def doubt(self, directory: str) -> None:
        """See `Backend.doubt`."""
        check_name(directory)

    def rely_on(self, names: Iterable[str]) -> None:
        """Do nothing: there are no directories here."""

    def create_once(self, name: str, data: Buffer, *, flush: bool = True) -> bool:
        """See `Backend.create_once`."""
        made = _Object(b"".join(byte_views([data])), self._clock())
        with self._lock:
            return self._objects.setdefault(check_name(name), made) is made

    def create(self, name: str) -> Writer:
        """See `Backend.create`."""
        return _MemoryWriter(self, check_name(name))

    def barrier(self, *directories: str) -> None:
        """Check the names; memory is as durable as it gets at once."""
        for name in directories:
            check_name(name)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """See `Backend.read`."""
        data = self._get(name).data
        wanted_size = max(0, len(data) - offset) if size is None else size
        check_range(self._where(name), offset, wanted_size, len(data))
        return data[offset : offset + wanted_size]

    def read_into(self, name: str, offset: int, buffers: Sequence[Buffer]) -> None:
        """See `Backend.read_into`."""
        data = memoryview(self._get(name).data)
        views = byte_views(buffers)
        check_range(self._where(name), offset, sum(map(len, views)), len(data))
        for view in views:
            view[:] = data[offset : offset + len(view)]
            offset += len(view)

    def size(self, name: str) -> int:
        """See `Backend.size`."""
        return len(self._get(name).data)

    def exists(self, name: str) -> bool:
        """See `Backend.exists`."""
        with self._lock:
            return check_name(name) in self._objects

    def age_s(self, name: str) -> float:
        """See `Backend.age_s`."""
        return max(0.0, self._clock() - self._get(name).created_s)

    def list(self, prefix: str) -> builtins.list[Entry]:
        """See `Backend.list`."""
        found = self._under(prefix)
        return sorted(
            (Entry(name, len(held.data)) for name, held in found if "/" not in name[len(prefix) :]),
            key=lambda entry: entry.name,
        )

    def list_dirs(self, prefix: str) -> builtins.list[str]:
        """See `Backend.list_dirs`."""
        tails = (name[len(prefix) :] for name, _ in self._under(prefix))
        return sorted({tail.partition("/")[0] for tail in tails if "/" in tail})

    def delete(self, name: str) -> None:
        """See `Backend.delete`."""
        with self._lock:
            self._objects.pop(check_name(name), None)

    def close(self) -> None:
        """Nothing is held open; the objects stay."""

    def _where(self, name: str) -> str:
        return f"{self.url} object {name!r}"

    def _get(self, name: str) -> _Object:
        with self._lock:
            held = self._objects.get(check_name(name))
        if held is None:
            raise not_found(self._where(name))
        return held

    def _under(self, prefix: str) -> builtins.list[tuple[str, _Object]]:
        check_prefix(prefix)
        with self._lock:
            return [(name, held) for name, held in self._objects.items() if name.startswith(prefix)]


class _MemoryWriter(Writer):
    def __init__(self, backend: MemoryBackend, name: str) -> None:
        self._backend = backend
        self._name = name
        self._data: bytearray | None = bytearray()

    def write(self, *buffers: Buffer) -> None:
        for view in byte_views(buffers):
            self._open().extend(view)

    def commit(self) -> bool:
        data = self._open()
        self._data = None
        return self._backend.create_once(self._name, data)

    def abort(self) -> None:
        self._data = None

    def _open(self) -> bytearray:
        if self._data is None:
            raise InvalidInputError(f"writer of {self._name!r} is closed", hint="create another")
        return self._data
