"""A disk in memory that knows what a power loss would leave of it.

`LocalBackend` runs on it unchanged, so that what is tried is every system call of its own, and not only
what it promises.  No more is promised here than POSIX does:

* fsync of a file makes its bytes durable, and no name of it;
* a name, made or removed, is durable once its directory was flushed; until then it may be lost, or survive
  alone, in any order against others;
* a directory is a name in the one above it, and with its name goes all that is below;
* of bytes that were not flushed any prefix may be there, the last write may be zeros, or there is nothing;
* after a flush that failed these bytes are never durable, whatever a later flush says.
"""

from __future__ import annotations

import copy
import errno
import os
import random
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import NamedTuple

from deltackpt.backends.osshim import Os

#: What stands under a directory's name.
DIRECTORY = -1


class Change(NamedTuple):
    """One thing done to the disk: what, under which name, to which file, with which bytes."""

    what: str  # create, write, flush, flush fails, link, unlink, mkdir, flush names, replace
    path: str = ""
    file: int = DIRECTORY
    data: bytes = b""

    def __str__(self):
        of = self.path or f"file {self.file}"
        return f"{self.what} {of}" + (f" ({len(self.data)} bytes)" if self.data else "")


@dataclass(slots=True)
class File:
    """Bytes as they were written; the first `n_flushed` of these writes are durable."""

    writes: list[bytes] = field(default_factory=list)
    n_flushed: int = 0
    is_lost: bool = False  # a flush of it failed
    written_ns: int = 0
    joined: bytes | None = b""

    def append(self, data: bytes) -> None:
        self.writes.append(data)
        self.joined = None

    @property
    def data(self) -> bytes:
        if self.joined is None:
            self.joined = b"".join(self.writes)
        return self.joined


class Disk(Os):
    """System calls on files in memory; every change is noted in `changes`.

    `hook(call, *args)` runs before each call, and may raise in its place, note it, or wait.
    """

    def __init__(self, files: Mapping[str, bytes] | None = None, dirs: Iterable[str] = ()):
        self.changes: list[Change] = []
        self.hook = lambda call, *args: None
        self.claims = None  # of a recording: what was promised when
        self.write_size_max: int | None = None  # of one writev: it may move fewer bytes than it was given
        self._names: dict[str, int] = dict.fromkeys(["", *dirs], DIRECTORY)
        self._under: dict[str, set[str]] = {path: set() for path in self._names}
        self._files: list[File] = []
        self._open: dict[int, int | str] = {}
        self._n_opened = 1000
        self._clock_ns = 0
        self._lock = threading.RLock()
        for path in self._names:
            self._enter(path)
        for path, data in (files or {}).items():
            self._names[path] = len(self._files)
            self._files.append(File([data], 1, joined=data))
            self._enter(path)
        #: What was there at first, and is durable.
        self.before = dict(self._names), [File([f.data], 1, joined=f.data) for f in self._files]

    def contents(self) -> dict[str, bytes]:
        """Every file as a process sees it now."""
        return {path: self._files[at].data for path, at in self._names.items() if at != DIRECTORY}

    def upto(self, n: int) -> Disk:
        """The disk as processes saw it after n changes, these noted."""
        names, files = self.before
        dirs = [path for path, at in names.items() if at == DIRECTORY and path]
        disk = Disk({path: files[at].data for path, at in names.items() if at != DIRECTORY}, dirs)
        for change in self.changes[:n]:
            disk._redo(change)
        return disk

    # -- the calls of Os

    def open(self, path, flags, mode=0o666):
        with self._call("open", path, flags):
            path = path.rstrip("/")
            at = self._names.get(path)
            if flags & os.O_CREAT:
                if at is not None:
                    raise _error(errno.EEXIST)
                self._check_parent(path)
                at = len(self._files)
                self._files.append(File(written_ns=self._clock_ns))
                self._name(path, at)
                self._note("create", path, at)
            elif at is None:
                raise _error(errno.ENOENT)
            self._n_opened += 1
            self._open[self._n_opened] = path if at == DIRECTORY else at
            return self._n_opened

    def writev(self, fd, views):
        with self._call("writev", fd, views):
            data = b"".join(views)[: self.write_size_max]
            at = self._open[fd]
            self._files[at].append(data)
            self._files[at].written_ns = self._clock_ns
            self._note("write", file=at, data=data)
            return len(data)

    def write_behind(self, fd, offset, size):
        with self._call("write_behind", fd, offset, size):
            pass

    def preadv(self, fd, views, offset):
        with self._call("preadv", fd, views, offset):
            data = self._files[self._open[fd]].data
            done = 0
            for view in views:
                part = data[offset + done : offset + done + len(view)]
                view[: len(part)] = part
                done += len(part)
            return done

    def fstat(self, fd):
        with self._call("fstat", fd):
            return self._status(self._open[fd])

    def fsync(self, fd):
        at = self._open[fd]
        try:
            with self._call("fsync", fd):
                if isinstance(at, str):
                    self._note("flush names", at)
                else:
                    self._note("flush", file=at)
        except OSError:
            if not isinstance(at, str):
                self._note("flush fails", file=at)
            raise

    def close(self, fd):
        with self._call("close", fd):
            del self._open[fd]

    def link(self, source, target):
        with self._call("link", source, target):
            if source not in self._names:
                raise _error(errno.ENOENT)
            self._check_parent(target)
            if target in self._names:
                raise _error(errno.EEXIST)
            self._name(target, self._names[source])
            self._note("link", target, self._names[source])

    def replace(self, source, target):
        """A rename; `LocalBackend` has no use for it, but some broken ones have."""
        with self._call("replace", source, target):
            self._check_parent(target)
            at = self._names[source]
            self._forget(source)
            if target in self._names:
                self._forget(target)
            self._name(target, at)
            self._note("unlink", source)
            self._note("link", target, at)

    def unlink(self, path):
        with self._call("unlink", path):
            if path not in self._names:
                raise _error(errno.ENOENT)
            self._forget(path)
            self._note("unlink", path)

    def mkdir(self, path):
        with self._call("mkdir", path):
            self._check_parent(path)
            if path in self._names:
                raise _error(errno.EEXIST)
            self._name(path, DIRECTORY)
            self._under[path] = set()
            self._note("mkdir", path)

    def lstat(self, path):
        with self._call("lstat", path):
            path = path.removesuffix("/.").rstrip("/")
            at = self._names.get(path)
            if at is None:
                raise _error(errno.ENOENT)
            return self._status(path if at == DIRECTORY else at)

    def scandir(self, path):
        with self._call("scandir", path):
            path = path.rstrip("/")
            if path not in self._under:
                raise _error(errno.ENOENT)
            kinds = {True: stat.S_IFDIR, False: stat.S_IFREG}
            return [
                (name, kinds[self._names[f"{path}/{name}"] == DIRECTORY])
                for name in sorted(self._under[path])
            ]

    # -- below

    def _call(self, call, *args):
        self.hook(call, *args)
        self._clock_ns += 1000
        return self._lock

    def _note(self, what, path="", file=DIRECTORY, data=b""):
        self.changes.append(Change(what, path, file, data))

    def _redo(self, change):
        match change.what:
            case "create":
                self._files.append(File(written_ns=self._clock_ns))
                self._name(change.path, change.file)
            case "write":
                self._files[change.file].append(change.data)
            case "link":
                self._name(change.path, change.file)
            case "mkdir":
                self._name(change.path, DIRECTORY)
                self._under[change.path] = set()
            case "unlink":
                self._forget(change.path)
        self.changes.append(change)

    def _name(self, path, at):
        self._names[path] = at
        self._enter(path)

    def _enter(self, path):
        if path:
            parent, _, name = path.rpartition("/")
            self._under[parent].add(name)

    def _forget(self, path):
        del self._names[path]
        parent, _, name = path.rpartition("/")
        self._under[parent].discard(name)

    def _check_parent(self, path):
        if path.rpartition("/")[0] not in self._under:
            raise _error(errno.ENOENT)

    def _status(self, at):
        if isinstance(at, str):
            return SimpleNamespace(st_mode=stat.S_IFDIR | 0o755, st_dev=1, st_ino=hash(at), st_size=0)
        file = self._files[at]
        return SimpleNamespace(
            st_mode=stat.S_IFREG | 0o644,
            st_dev=1,
            st_ino=at,
            st_size=len(file.data),
            st_mtime_ns=file.written_ns,
        )


def _error(code):
    return OSError(code, os.strerror(code))


class Tree(NamedTuple):
    """What is on a disk after a power loss: names, and of each file its bytes."""

    names: dict[str, int]
    data: dict[int, bytes]
    how: str

    def files(self) -> dict[str, bytes]:
        return {path: self.data[at] for path, at in self.names.items() if at != DIRECTORY}

    def disk(self) -> Disk:
        dirs = [path for path, at in self.names.items() if at == DIRECTORY and path]
        return Disk(self.files(), sorted(dirs))

    def key(self, *unread: str) -> int:
        """The same for trees that are equal, but for what is below some names."""
        return hash(
            frozenset(
                (path, None if at == DIRECTORY else self.data[at])
                for path, at in self.names.items()
                if not path.startswith(unread)
            )
        )


#: What becomes of a file's bytes that were not flushed; `rng` chooses where there is a choice.
TEARS = {
    "whole": lambda file, rng: file.data,
    "gone": lambda file, rng: _durable(file),
    "last write zeros": lambda file, rng: (
        _durable(file) + b"".join(file.writes[file.n_flushed : -1]) + bytes(len(file.writes[-1]))
    ),
    "cut": lambda file, rng: file.data[: max(len(_durable(file)), int(rng.random() * len(file.data)))],
}


def _durable(file):
    return b"".join(file.writes[: file.n_flushed])


class Replay:
    """The disk at a moment of its past: what was durable then, and what a power loss could undo."""

    def __init__(self, disk: Disk):
        names, files = disk.before
        self._durable = dict(names)
        self._pending: list[tuple[str, int | None]] = []
        self._files = {at: File(list(f.writes), f.n_flushed, joined=f.joined) for at, f in enumerate(files)}

    def step(self, change: Change) -> None:
        match change.what:
            case "create":
                self._files[change.file] = File()
                self._pending.append((change.path, change.file))
            case "link" | "mkdir":
                self._pending.append((change.path, change.file))
            case "unlink":
                self._pending.append((change.path, None))
            case "write":
                self._files[change.file].append(change.data)
            case "flush":
                file = self._files[change.file]
                if not file.is_lost:
                    file.n_flushed = len(file.writes)
            case "flush fails":
                self._files[change.file].is_lost = True
            case "flush names":
                kept = []
                for path, at in self._pending:
                    if path.rpartition("/")[0] == change.path:
                        _put(self._durable, path, at)
                    else:
                        kept.append((path, at))
                self._pending = kept

    def copy(self) -> Replay:
        replay = copy.copy(self)
        replay._durable, replay._pending = dict(self._durable), list(self._pending)
        replay._files = {at: replace(file, writes=list(file.writes)) for at, file in self._files.items()}
        return replay

    def worst(self) -> Tree:
        """What is left if all is lost that may be."""
        names = self._names(frozenset())
        data = {at: _durable(self._files[at]) for at in names.values() if at != DIRECTORY}
        return Tree(names, data, "nothing survived")

    def trees(self, rng: random.Random, n_random: int, together: str) -> Iterator[Tree]:
        """What a power loss may leave now: the plainest first, some of them equal.

        Of the pending names all survived, none, each alone, all but each, `n_random` random sets of them;
        each of these with every way to tear the bytes that were not flushed.  Names under `together` count
        as one, but in the random sets.
        """
        units: list[list[int]] = []
        aside = []
        for i, (path, _) in enumerate(self._pending):
            if path.startswith(together):
                aside.append(i)
            else:
                units.append([i])
        units += [aside] if aside else []
        every = frozenset(range(len(self._pending)))
        chosen = {"all pending survived": every, "none survived": frozenset()}
        if len(units) > 1:
            for unit in units:
                what = self._pending[unit[0]]
                chosen[f"only {what} survived"] = frozenset(unit)
                chosen[f"all but {what} survived"] = every - set(unit)
        for n in range(n_random if len(every) > 2 else 0):
            chosen[f"random {n}"] = frozenset(i for i in every if rng.random() < 0.5)
        for how, survivors in chosen.items():
            names = self._names(survivors)
            torn = {at for at in names.values() if at != DIRECTORY and self._is_torn(at)}
            kinds = TEARS if torn else ["whole"]
            for kind in kinds:
                data = {
                    at: TEARS[kind](self._files[at], rng) if at in torn else self._files[at].data
                    for at in names.values()
                    if at != DIRECTORY
                }
                yield Tree(names, data, f"{how}; bytes not flushed: {kind}")

    def _is_torn(self, at):
        file = self._files[at]
        return file.n_flushed < len(file.writes)

    def _names(self, survivors):
        names = dict(self._durable)
        for i in sorted(survivors):
            _put(names, *self._pending[i])
        # Without its directory a name is nowhere.
        reached: dict[str, bool] = {"": True}

        def is_reached(path):
            if path not in reached:
                parent = path.rpartition("/")[0]
                reached[path] = names.get(parent) == DIRECTORY and is_reached(parent)
            return reached[path]

        return {path: at for path, at in names.items() if is_reached(path)}


def _put(names, path, at):
    if at is None:
        names.pop(path, None)
    else:
        names[path] = at
