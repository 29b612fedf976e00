"""Objects as files under one directory.

Owns   the write-and-link that publishes a file once, the directories yet to be flushed, the files held open.
Never  calls the operating system but through `Os`, renames, overwrites, or knows what an object means.

An object is written to ``tmp/``, flushed, linked to its name and unlinked from ``tmp/``. A link makes the
name or finds it taken, in one step, on every POSIX file system and on NFS; a rename would silently replace.
"""

from __future__ import annotations

import builtins
import errno
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from deltackpt.backends import (
    Backend,
    Buffer,
    Entry,
    Writer,
    byte_views,
    check_name,
    check_prefix,
    check_range,
    is_name,
    not_found,
    too_short,
    unreadable,
)
from deltackpt.backends.handles import Handle, Handles, check_is_file
from deltackpt.backends.osshim import Os
from deltackpt.backends.reserve import Reserve
from deltackpt.errors import DeltackptError, InvalidInputError, NotFoundError, StorageError

_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY

#: Buffers in one readv or writev: IOV_MAX of Linux and of macOS.
_N_VIEWS_MAX = 1024

#: Bytes of an object after which the device is told to begin: the flush at its end then waits for the last
#: of them only. Hashed and written, 192 MiB took 100 ms instead of 138, by 32 MiB 116 (docs/design/0019).
_BEHIND_SIZE = 8 << 20

#: Files held open for reading. Half of the smallest usual limit on open files (256) is left to the caller.
_N_OPEN_MAX = 64

#: How often a small object is written again because its file in tmp/ was removed.
_N_SWEPT_MAX = 7
#: Characters of an object's name in that of its file in tmp/, for whoever lists it.
_N_TMP_CHARS = 48

#: What a look-up says where there is no object; a symbolic link, which is never followed, says ELOOP, a
#: socket ENXIO.
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})

_HINTS = {
    errno.ENOSPC: "the disk is full: free some space, or run gc",
    errno.EDQUOT: "the disk quota is used up: free some space, or run gc",
    errno.EFBIG: "the file is larger than the system allows: raise the limit on file sizes",
    errno.EROFS: "the file system is read-only: mount it writable, or choose another store",
    errno.EACCES: "permission denied, or read-only: give this user write access to the store",
    errno.EPERM: "not permitted: check the owner of the store, and that its file system has hard links",
    errno.EOPNOTSUPP: "the file system lacks this operation: choose one with hard links and fsync",
    errno.ENOENT: "a directory of the store is missing: check that its file system is mounted",
    errno.ESTALE: "the network file system was restarted: open the store again",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine: close some",
    errno.EIO: "the device failed: look at the system log, then run verify",
}


class LocalBackend(Backend):
    """A `Backend` on a directory of a POSIX file system; makes nothing until `make_dirs`.

    Parameters
    ----------
    path : path-like
        The directory of the store.
    calls : Os, optional
        The system calls; tests give their own.

    Notes
    -----
    Flushes: one per object, and in `barrier` one per directory that gained an object. The first time this
    instance writes into a directory, the directories above it are flushed too, once: whoever made
    it may not have got round to that.

    A flush, write or close that failed is not tried again, since after a failed fsync the kernel forgets
    what it could not write and the next one succeeds (Rebello et al., USENIX ATC 2020). The file is
    dropped, and the caller may write the object again.

    A directory below a top-level one (``refs/main/``) is made on demand. The top-level ones are not, so a
    store whose file system was unmounted is an error and not a new store under the mount point.

    Symbolic links are followed down to the store, and not inside it: where an object should be there is none,
    in the place of a directory one is an error. A directory is looked at when it is first used; whoever may
    write to the store can put a link in its place afterwards.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path:
    ...     backend = LocalBackend(path)
    ...     backend.make_dirs(["refs", "tmp"])
    ...     won = backend.create_once("refs/main/7.1", b"{}")
    ...     backend.barrier()
    ...     won, backend.list("refs/main/")
    (True, [Entry(name='refs/main/7.1', size=2)])
    """

    def __init__(self, path: str | os.PathLike[str], *, calls: Os | None = None) -> None:
        self._root = Path(path).absolute()
        self.url = str(self._root)
        # What is put in front of the system's calls, or changes them, is this process's alone.
        self.path = self.url if calls is None and type(self) is LocalBackend else None
        self._os = calls or Os()
        self._handles = Handles(self._os, _N_OPEN_MAX)
        self._reserve = Reserve(self._os, f"{self.url}/.reserve")
        self._lock = threading.Lock()
        self._barrier_lock = threading.Lock()
        # Directories to flush; those whose own name is not yet known to be durable; those where it is. For
        # the place where the store already is, that is taken for granted, unless it is being made.
        self._dirty: set[Path] = set()
        self._fresh: set[Path] = set()
        self._durable = {self._root, *self._root.parents}
        self._plain_dirs = {""}  # those inside the store that were found to be no links
        self._is_relied_on = False

    def is_same(self, other: Backend) -> bool:
        """See `Backend.is_same`."""
        return isinstance(other, LocalBackend) and self._identity() == other._identity()

    # -- writing ---------------------------------------------------------------------------------------------

    def make_dirs(self, names: Iterable[str]) -> None:
        """See `Backend.make_dirs`."""
        missing = takewhile(lambda path: not self._is_dir(path), (self._root, *self._root.parents))
        for path in reversed(list(missing)):
            self._mkdir(path)
            with self._lock:
                self._durable.discard(path)
        if not self._is_relied_on:
            self._doubt_place()
        for name in ("", *map(check_name, names)):
            path = self._root
            for part in filter(None, name.split("/")):
                path /= part
                self._mkdir(path)
            self._check_dirs(name)
            with self._lock:
                self._note_dir(path)

    def rely_on(self, names: Iterable[str]) -> None:
        """See `Backend.rely_on`."""
        with self._lock:
            self._is_relied_on = True
            self._durable.update((self._root, *self._root.parents))
            self._durable.update(self._root / check_name(name) for name in names)

    def doubt(self, directory: str) -> None:
        """See `Backend.doubt`."""
        self._check_dirs(check_name(directory))
        path = self._root / directory
        with self._lock:  # whoever makes it meanwhile notes it after this
            if self._is_dir(path):
                self._dirty.add(path)
                self._note_dir(path)
            else:
                self._dirty.discard(path)  # noted for a link that failed: there is nothing to flush

    def create_once(self, name: str, data: Buffer, *, flush: bool = True) -> bool:
        """See `Backend.create_once`."""
        for _ in range(_N_SWEPT_MAX):
            try:
                return self._create_once(name, data, flush)
            except _SweptError:
                # A gc took our file in tmp/ for a dead process's; under load, two gcs did so twice in a row.
                continue
        return self._create_once(name, data, flush)

    def create(self, name: str) -> Writer:
        """See `Backend.create`."""
        self._handles.drop_deleted()
        return _LocalWriter(self, self._os, check_name(name), flush=True)

    def barrier(self, *directories: str) -> None:
        """See `Backend.barrier`."""
        wanted = [Path(self._path(name)) for name in directories]
        # One at a time: whoever finds nothing left to flush must not return before the flush is over.
        with self._barrier_lock:
            with self._lock:
                above = {path.parent for directory in wanted for path in self._undurable(directory)}
                chosen = self._dirty & above.union(wanted) if wanted else set(self._dirty)
                named = {path for path in self._fresh if path.parent in chosen}
                self._dirty -= chosen
            try:
                for path in sorted(chosen, reverse=True):
                    self._fsync_dir(path)
            except BaseException:
                # Asked again next time. Unlike a file's bytes, entries go through the journal of the file
                # system, and a journal that failed stays failed.
                with self._lock:
                    self._dirty |= chosen
                raise
            with self._lock:
                self._durable |= named
                self._fresh -= named

    def delete(self, name: str) -> None:
        """See `Backend.delete`."""
        path = self._path(name)
        with suppress(NotFoundError), _translated(self._where(name), "delete", may_be_absent=True):
            self._os.unlink(path)
        self._handles.drop(path)

    def keep_reserve(self) -> None:
        """See `Backend.keep_reserve`."""
        self._reserve.keep()

    def spend_reserve(self, share: float = 1.0) -> bool:
        """See `Backend.spend_reserve`."""
        return self._reserve.spend(share)

    def close(self) -> None:
        """Close the files held open for reading; a later read opens them again."""
        self._handles.drop_all()

    # -- reading ---------------------------------------------------------------------------------------------

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """See `Backend.read`."""
        with self._opened(name) as handle:
            wanted_size = max(0, handle.size - offset) if size is None else size
            check_range(self._where(name), offset, wanted_size, handle.size)
            data = bytearray(wanted_size)
            self._fill(name, handle, offset, byte_views([data]))
        return bytes(data)

    def read_into(self, name: str, offset: int, buffers: Sequence[Buffer]) -> None:
        """See `Backend.read_into`."""
        views = byte_views(buffers)
        with self._opened(name) as handle:
            check_range(self._where(name), offset, sum(map(len, views)), handle.size)
            self._fill(name, handle, offset, views)

    def size(self, name: str) -> int:
        """See `Backend.size`."""
        return self._status(name).st_size

    def exists(self, name: str) -> bool:
        """See `Backend.exists`."""
        try:
            self._status(name)
        except NotFoundError:
            return False
        return True

    def age_s(self, name: str) -> float:
        """Seconds since the last byte was written, by the clock of the file system.

        That clock is read off a file made for it in ``tmp/``, as this machine's may differ: the store must be
        writable.
        """
        written_ns = self._status(name).st_mtime_ns
        with _translated(self.url, "read the clock"):
            path, fd = self._open_tmp("clock")
            try:
                now_ns = self._os.fstat(fd).st_mtime_ns
            finally:
                self._os.close(fd)
                with suppress(FileNotFoundError):  # a gc beside us tidies tmp/
                    self._os.unlink(path)
        return max(0, now_ns - written_ns) / 1e9

    def list(self, prefix: str) -> builtins.list[Entry]:
        """See `Backend.list`."""
        found = []
        names = self._names(prefix, stat.S_IFREG)
        with _translated(self._where(prefix), "list"):
            for name in names:
                # Deleted since the scan: it is not there.
                with suppress(FileNotFoundError):
                    size = self._os.lstat(f"{self.url}/{prefix}{name}").st_size
                    found.append(Entry(prefix + name, size))
        return found

    def names(self, prefix: str) -> builtins.list[str]:
        """See `Backend.names`."""
        return [prefix + name for name in self._names(prefix, stat.S_IFREG)]

    def list_dirs(self, prefix: str) -> builtins.list[str]:
        """See `Backend.list_dirs`."""
        for name in self._names(prefix, 0) if prefix else ():
            # What is behind a link, and may be somewhere else today, must not pass for nothing.
            try:
                self._os.lstat(f"{self.url}/{prefix}{name}/.")
            except NotADirectoryError:
                continue
            except OSError:
                pass
            self._check_dirs(prefix + name)
        return self._names(prefix, stat.S_IFDIR)

    # -- names and errors ------------------------------------------------------------------------------------

    def _where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _path(self, name: str) -> str:
        self._check_dirs(check_name(name).rpartition("/")[0])
        return f"{self.url}/{name}"

    def _check_dirs(self, directory: str) -> None:
        """Refuse a directory of the store that is, or lies below, a symbolic link."""
        if directory in self._plain_dirs:
            return
        self._check_dirs(directory.rpartition("/")[0])
        path = f"{self.url}/{directory}"
        try:
            mode = self._os.lstat(path).st_mode
        except OSError:
            return  # what is to be done there says what is wrong
        if stat.S_ISLNK(mode):
            raise StorageError(
                f"{path}: is a symbolic link, expected a directory",
                hint="put the directory itself there; the whole store may lie behind a link",
            )
        self._plain_dirs.add(directory)

    def _identity(self) -> tuple[int, int]:
        with _translated(self.url, "look up"):
            status = self._os.lstat(f"{self.url}/.")
        return status.st_dev, status.st_ino

    def _is_dir(self, path: Path) -> bool:
        try:
            with _translated(str(path), "look up", may_be_absent=True):
                # The dot follows a symbolic link, which is fine above the objects.
                return stat.S_ISDIR(self._os.lstat(f"{path}/.").st_mode)
        except NotFoundError:
            return False

    def _status(self, name: str) -> os.stat_result:
        with _translated(self._where(name), "look up", may_be_absent=True):
            status = self._os.lstat(self._path(name))
            check_is_file(self._where(name), status)
        return status

    def _names(self, prefix: str, kind: int) -> builtins.list[str]:
        """Sorted last parts of what is directly under a prefix; what has no legal name is not ours."""
        path = f"{self.url}/{check_prefix(prefix)}"
        self._check_dirs(prefix[:-1])
        try:
            with _translated(path, "list", may_be_absent=True):
                found = self._os.scandir(path)
        except NotFoundError:
            # No directory means no objects. But "no packs" of a store that is not there would be a lie.
            if not prefix or self._is_dir(self._root):
                return []
            raise StorageError(
                f"{self.url}: the directory of the store is gone",
                hint=_HINTS[errno.ENOENT],
                errno=errno.ENOENT,
            ) from None
        return sorted(name for name, its_kind in found if its_kind == kind and is_name(prefix + name))

    # -- reading, below --------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, name: str) -> Iterator[Handle]:
        path = self._path(name)
        with _translated(self._where(name), "open", may_be_absent=True):
            handle = self._handles.acquire(path)
        try:
            yield handle
        finally:
            self._handles.release(handle)

    def _fill(self, name: str, handle: Handle, offset: int, views: builtins.list[memoryview]) -> None:
        wanted_size = sum(map(len, views))
        with _translated(self._where(name), "read"):
            try:
                done_size = _move(views, lambda some, done: self._os.preadv(handle.fd, some, offset + done))
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                raise unreadable(self._where(name), offset, wanted_size) from error
        if done_size < wanted_size:
            raise too_short(self._where(name), offset, wanted_size, offset + done_size)

    # -- writing, below --------------------------------------------------------------------------------------

    def _create_once(self, name: str, data: Buffer, flush: bool) -> bool:
        with _LocalWriter(self, self._os, check_name(name), flush=flush) as writer:
            writer.write(data)
            return writer.commit()

    def _open_tmp(self, label: str) -> tuple[str, int]:
        self._check_dirs("tmp")
        while True:
            path = f"{self.url}/tmp/{label[:_N_TMP_CHARS]}.{secrets.token_hex(4)}"
            with suppress(FileExistsError):
                return path, self._os.open(path, _WRITE, 0o666)

    def _publish(self, tmp: str, name: str, flush: bool) -> bool:
        """Link a written file to its name; False if the name was taken."""
        try:
            return self._link(tmp, self._path(name))
        finally:
            # After the link, or a barrier in between would flush too early and forget; and also if the name
            # was taken or the answer lost: the caller builds on what is there, whoever made it.
            if flush:
                with self._lock:
                    directory = Path(self._path(name)).parent
                    self._dirty.add(directory)
                    self._note_dir(directory)

    def _link(self, tmp: str, target: str) -> bool:
        try:
            try:
                self._os.link(tmp, target)
            except FileNotFoundError:
                self._make_parents(Path(target))
                self._os.link(tmp, target)
        except OSError as error:
            # NFS may do it and lose the answer, then find on the retry that the name is taken: by us.
            if self._are_one_file(tmp, target):
                return True
            if error.errno == errno.EEXIST:
                return False
            raise
        return True

    def _are_one_file(self, tmp: str, target: str) -> bool:
        try:
            ours = self._os.lstat(tmp)
        except FileNotFoundError:
            raise _SweptError(
                f"{tmp}: was removed while it was written",
                hint="write the object again, and let gc spare young files",
                errno=errno.ENOENT,
            ) from None
        try:
            theirs = self._os.lstat(target)
        except FileNotFoundError:
            return False
        return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)

    def _make_parents(self, target: Path) -> None:
        """Make the directories above an object, but for the top-level one and the store's own."""
        inner = target.relative_to(self._root).parents
        for path in list(reversed(inner))[2:]:
            with suppress(FileExistsError):
                self._os.mkdir(f"{self.url}/{path}")

    def _mkdir(self, path: Path) -> None:
        with _translated(str(path), "make the directory"), suppress(FileExistsError):
            self._os.mkdir(str(path))

    def _doubt_place(self) -> None:
        """Have the place of a new store flushed, too: whoever made it may have died before doing so.

        As far up as its file system goes, and this user may look.
        """
        with _translated(self.url, "look up"):
            device = self._os.lstat(f"{self.url}/.").st_dev
            for path in (self._root, *self._root.parents[:-1]):
                try:
                    fd = self._os.open(str(path.parent), _DIRECTORY)
                except PermissionError:
                    break
                try:
                    is_same = self._os.fstat(fd).st_dev == device
                finally:
                    self._os.close(fd)
                if not is_same:
                    break
                with self._lock:
                    self._durable.discard(path)

    def _note_dir(self, directory: Path) -> None:
        """Have the next barrier flush the names of the directories down to this one; the lock is held."""
        undurable = self._undurable(directory)
        self._fresh.update(undurable)
        self._dirty.update(path.parent for path in undurable)

    def _undurable(self, directory: Path) -> builtins.list[Path]:
        """A directory and those above it, as far as their own names may be lost; the lock is held."""
        return list(takewhile(lambda path: path not in self._durable, (directory, *directory.parents)))

    def _fsync_dir(self, path: Path) -> None:
        with _translated(str(path), "flush the directory"):
            fd = self._os.open(str(path), _DIRECTORY)
            try:
                self._os.fsync(fd)
            finally:
                self._os.close(fd)


def is_file(path: str) -> bool:
    """Whether the place of a store is taken by a file."""
    try:
        return stat.S_ISREG(Os().lstat(path).st_mode)
    except OSError:
        return False


class _SweptError(StorageError):
    """Our file in tmp/ is gone."""


class _LocalWriter(Writer):
    def __init__(self, backend: LocalBackend, calls: Os, name: str, *, flush: bool) -> None:
        self._backend = backend
        self._os = calls
        self._name = name
        self._flush = flush
        self._where = backend._where(name)
        self._size = 0
        self._begun_size = 0  # of that, what the device was told to begin with
        self._fd: int | None = None
        with _translated(self._where, "create"):
            self._tmp, self._fd = backend._open_tmp(name.rpartition("/")[2])

    def write(self, *buffers: Buffer) -> None:
        fd = self._open_fd()
        views = byte_views(buffers)
        wanted_size = sum(map(len, views))
        with self._dead_on_error("write"):
            done_size = _move(views, lambda some, _: self._os.writev(fd, some))
            if done_size < wanted_size:
                raise OSError(errno.EIO, f"wrote {done_size} of {wanted_size} bytes")
            self._size += done_size
            if self._flush and self._size - self._begun_size >= _BEHIND_SIZE:
                with suppress(OSError):  # it is the flush that counts
                    self._os.write_behind(fd, self._begun_size, self._size - self._begun_size)
                self._begun_size = self._size

    def commit(self) -> bool:
        fd = self._open_fd()
        with self._dead_on_error("flush"):
            if self._flush:
                self._os.fsync(fd)
            # Before the link: some network file systems report a failed write only now.
            self._fd = None
            self._os.close(fd)
        with self._dead_on_error("publish"):
            won = self._backend._publish(self._tmp, self._name, self._flush)
        self._unlink()
        return won

    def abort(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with suppress(OSError):
                self._os.close(fd)
            self._unlink()

    def _open_fd(self) -> int:
        if self._fd is None:
            raise InvalidInputError(f"{self._where}: this writer is closed", hint="create another")
        return self._fd

    @contextmanager
    def _dead_on_error(self, doing: str) -> Iterator[None]:
        try:
            with _translated(self._where, doing):
                yield
        except BaseException:
            if self._fd is None:
                self._unlink()
            self.abort()
            raise

    def _unlink(self) -> None:
        # What cannot be removed now is left to gc: the object's fate is decided already.
        with suppress(OSError):
            self._os.unlink(self._tmp)


def _move(views: list[memoryview], step: Callable[[list[memoryview], int], int]) -> int:
    """Call `step(views, size moved so far)` until all bytes are moved, or it moves none; the size moved."""
    done_size = 0
    at = 0
    while at < len(views):
        step_size = step(views[at : at + _N_VIEWS_MAX], done_size)
        if not step_size:
            break
        done_size += step_size
        while at < len(views) and step_size >= len(views[at]):
            step_size -= len(views[at])
            at += 1
        if step_size:
            views[at] = views[at][step_size:]
    return done_size


@contextmanager
def _translated(where: str, doing: str, *, may_be_absent: bool = False) -> Iterator[None]:
    """Turn what the system says into what the package raises."""
    try:
        yield
    except DeltackptError:
        raise
    except OSError as error:
        code = error.errno or 0
        if may_be_absent and code in _ABSENT:
            raise not_found(where) from error
        raise StorageError(
            f"{where}: could not {doing}: {error.strerror or error} ({errno.errorcode.get(code, code)})",
            hint=_HINTS.get(code),
            errno=error.errno,
        ) from error
