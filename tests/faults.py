"""Storage that fails, is cut off, or loses power, on purpose and at a chosen operation."""

from __future__ import annotations

import errno
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from deltackpt.backends import Backend, Writer
from deltackpt.backends.memory import MemoryBackend
from deltackpt.backends.osshim import Os
from deltackpt.errors import StorageError


class Cut(BaseException):
    """The process died here: nothing may catch this."""


class HookedOs(Os):
    """System calls that can be recorded, failed, torn, delayed, or the last ones of their process.

    `hook(call, *args)` runs before each: it may note it, raise in its place, wait, or kill.  Of a writev or a
    preadv it may return how many bytes are to be moved at most.  Calls are counted by name.
    """

    def __init__(self, hook=lambda call, *args: None):
        self.n_calls = Counter()
        self.hook = hook


def _hooked(name):
    def call(self, *args):
        self.n_calls[name] += 1
        size_max = self.hook(name, *args)
        if type(size_max) is int and name in ("writev", "preadv"):
            fd, views, *rest = args
            args = (fd, _cut(views, size_max), *rest)
        return getattr(Os, name)(self, *args)

    return call


def _cut(views, size_max):
    """The first `size_max` bytes of some buffers."""
    kept = []
    for view in views:
        kept.append(view[:size_max])
        size_max -= len(kept[-1])
    return kept


for _name in [name for name in vars(Os) if not name.startswith("_")]:
    setattr(HookedOs, _name, _hooked(_name))


def _reading(op):
    def call(self, name, *args):
        return self._do(op, name, lambda: getattr(self.inner, op)(name, *args), mutates=False)

    return call


class Wrapper(Backend):
    """Hands every call to `inner` by way of `_do`, where a subclass does its mischief."""

    def __init__(self, inner: Backend):
        self.inner, self.url = inner, inner.url
        self.n_ops = 0  # mutating ones so far
        self._lock = threading.RLock()

    def _do(self, op: str, name: str, call: Callable, *, mutates: bool = True):
        raise NotImplementedError

    def make_dirs(self, names):
        return self._do("make_dirs", "", lambda: self.inner.make_dirs(names))

    def rely_on(self, names):
        self.inner.rely_on(names)

    def doubt(self, directory):
        self.inner.doubt(directory)

    def create_once(self, name, data, *, flush=True):
        return self._do("create_once", name, lambda: self.inner.create_once(name, data, flush=flush))

    def create(self, name):
        return self._do("create", name, lambda: _Writer(self, name, self.inner.create(name)), mutates=False)

    def barrier(self, *directories):
        return self._do("barrier", "\0".join(directories), lambda: self.inner.barrier(*directories))

    def delete(self, name):
        return self._do("delete", name, lambda: self.inner.delete(name))

    def close(self):
        self.inner.close()

    read, read_into, map = _reading("read"), _reading("read_into"), _reading("map")
    size, exists, age_s = _reading("size"), _reading("exists"), _reading("age_s")
    list, list_dirs = _reading("list"), _reading("list_dirs")


class _Writer(Writer):
    def __init__(self, backend: Wrapper, name: str, inner: Writer):
        self.backend, self.name, self.inner = backend, name, inner

    def write(self, *buffers):
        return self.backend._do("write", self.name, lambda: self.inner.write(*buffers))

    def commit(self):
        return self.backend._do("commit", self.name, self.inner.commit)

    def abort(self):
        self.inner.abort()


class FailingBackend(Wrapper):
    """Fails the `nth` mutating operation, counted from 0, with a `StorageError`.

    From then on every call fails, reads too, as when a disk is gone; with `once` only that one.
    With `landed` the operation is done and only its answer is lost.
    """

    def __init__(self, inner, nth, *, error=errno.EIO, once=False, landed=False):
        super().__init__(inner)
        self.nth, self.error, self.once, self.landed = nth, error, once, landed

    def _do(self, op, name, call, *, mutates=True):
        with self._lock:
            at = self.n_ops
            self.n_ops += mutates
        if mutates and at == self.nth:
            if self.landed:
                call()
            raise self._failure(op, name)
        if at > self.nth and not self.once:
            raise self._failure(op, name)
        return call()

    def _failure(self, op, name):
        return StorageError(f"{self.url}: {op} {name} failed on purpose", errno=self.error)


@dataclass(frozen=True)
class _Pending:
    """A change that a power loss may undo; `data` None: a delete; not flushed: the bytes may be torn."""

    name: str
    data: bytes | None
    is_flushed: bool = True


class CrashBackend(Wrapper):
    """Knows what a power loss would leave of what was done to a `MemoryBackend`.

    A flushed object has all of its bytes or is absent; its name is safe once a barrier follows. An object
    with ``flush=False`` may also be empty or cut short, for ever; its directory is not flushed for its sake.
    A delete may be undone until its directory is flushed for something else. That is what `LocalBackend`
    does, and no more than POSIX promises. `run_to` makes the process die instead of the nth change.
    """

    def __init__(self, inner: MemoryBackend):
        super().__init__(inner)
        self._cut_at: int | None = None
        self._durable = contents(inner)
        self._torn: set[str] = set()  # durable names whose bytes never were flushed
        self._pending: list[_Pending] = []
        self._dirty: set[str] = set()

    def run_to(self, nth: int) -> None:
        """Raise `Cut` once `nth` changes, counted from the start, were made and another call comes."""
        self._cut_at = nth

    def doubt(self, directory):
        self._dirty.add(directory)

    def create_once(self, name, data, *, flush=True):
        def call():
            return self._created(name, self.inner.create_once(name, data, flush=flush), flush)

        return self._do("create_once", name, call)

    def _do(self, op, name, call, *, mutates=True):
        with self._lock:
            if self._cut_at is not None and self.n_ops + mutates > self._cut_at:
                self.n_ops = self._cut_at + 1  # dead: not even a read is answered any more
                raise Cut(f"{op} {name}")
            existed = op == "delete" and self.inner.exists(name)
            answer = call()
            if op == "commit":
                self._created(name, answer, flush=True)
            elif existed:
                self._pending.append(_Pending(name, None))
            elif op == "barrier":
                self._flush(set(name.split("\0")) if name else set(self._dirty))
            self.n_ops += mutates
            return answer

    def _created(self, name, made, flush):
        if made:
            self._pending.append(_Pending(name, self.inner.read(name), flush))
        if flush:
            self._dirty.add(_directory(name))
        return made

    def _flush(self, wanted):
        kept = []
        for change in self._pending:
            if _directory(change.name) in self._dirty & wanted:
                _apply(self._durable, self._torn, change)
            else:
                kept.append(change)
        self._pending, self._dirty = kept, self._dirty - wanted

    def crash_states(self, limit: int = 100, seed: int = 0) -> Iterator[MemoryBackend]:
        """At most `limit` distinct states that a power loss may leave, the plainest first.

        All changes survived; none of the pending; one lost; one survived; each of these with unflushed bytes
        empty or halved; then random mixtures.
        """
        seen = set()
        for survivors, cut in self._outcomes(random.Random(seed), limit):
            state = dict(self._durable)
            torn = set(self._torn)
            for change in survivors:
                _apply(state, torn, change)
            for name in torn & state.keys():
                state[name] = cut(state[name])
            key = frozenset(state.items())
            if key not in seen and len(seen) < limit:
                seen.add(key)
                yield memory_of(state)

    def _outcomes(self, rng, limit):
        changes = self._pending
        sets = [changes, []]
        sets += [[other for other in changes if other is not change] for change in changes]
        sets += [[change] for change in changes]
        yield from itertools.product(sets, (bytes, lambda data: b"", lambda data: data[: len(data) // 2]))
        for _ in range(4 * limit):
            yield (
                [change for change in changes if rng.random() < 0.5],
                lambda data: data[: rng.randint(0, len(data))],
            )


def _apply(state: dict[str, bytes], torn: set[str], change: _Pending) -> None:
    (torn.discard if change.is_flushed else torn.add)(change.name)
    if change.data is None:
        state.pop(change.name, None)
    else:
        state[change.name] = change.data


def _directory(name: str) -> str:
    return name.rpartition("/")[0]


def contents(backend: Backend, prefix: str = "") -> dict[str, bytes]:
    """Every object of a backend with its bytes."""
    found = {entry.name: backend.read(entry.name) for entry in backend.list(prefix)}
    for name in backend.list_dirs(prefix):
        found |= contents(backend, f"{prefix}{name}/")
    return found


def memory_of(state: dict[str, bytes]) -> MemoryBackend:
    """A `MemoryBackend` that holds these objects."""
    backend = MemoryBackend()
    for name, data in state.items():
        backend.create_once(name, data)
    return backend
