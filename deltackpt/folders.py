"""Folders: a file or a directory as a step.

Owns   walking a directory, its files cut at their tensors' borders; how a step of files is written down.
Never  follows a link, writes to a file, or keeps what changed while it was read.

A step of files is a state like any other, so the store knows nothing of files:

    {"deltackpt.files": 1, "name": "checkpoint-100",
     "entries": [{"path": "", "kind": "directory", "mode": 493, "mtime_ns": ...},
                 {"path": "model.safetensors", "kind": "file", "mode": 420, "mtime_ns": ...,
                  "blake3": "...", "key": "model.safetensors", "gaps": [4144, 0, 0]},
                 {"path": "best", "kind": "link", "target": "model.safetensors"}],
     "files": {"model.safetensors": {"rest": ..., "wte.weight": ..., "wpe.weight": ...}}}

A file is its tensors in their order, and the rest of it in between, `gaps` bytes at a time; or all of it is
one array, or bytes.  Its key is its path, without the number of the step: the next step is to find what it
differs from.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from deltackpt import targets
from deltackpt.backends.local import LocalBackend
from deltackpt.containers import spans
from deltackpt.efforts import Optimize
from deltackpt.energy import Meter
from deltackpt.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
)
from deltackpt.labels import check_metadata, check_metrics
from deltackpt.records import check_step
from deltackpt.report import SaveReport
from deltackpt.run import Run, open_run
from deltackpt.saver import Saver, What
from deltackpt.shadow import SIZE_MAX, Shadow
from deltackpt.store import Where
from deltackpt.structure import Names
from deltackpt.types import DTYPE_SIZES, U8, Deferred

#: The key that tells a step of files from other states, and how its entries are written down.
MARK = "deltackpt.files"
VERSION = 1

#: A file of no more bytes, in which there are no tensors, stands in the manifest.
_INLINE_SIZE_MAX = 1024
#: So many bytes are read, more are mapped: each map takes a descriptor, of which there may be 1,024, and what
#: a shadow of a gigabyte is to be copied from takes 512.
_READ_SIZE_MAX = 2 << 20
#: Bytes of a path, with room for a number: from 4096 on a text is a tensor, which a path must not be.
_PATH_SIZE_MAX = 4000
MODE = 0o777  # no set-uid of a stranger's making
#: Who hashes in several threads: a forked child has none of its parent's, and would wait for them for ever.
_PID = os.getpid()
#: The number of a step in a path: ``global_step100``, ``checkpoint-100``, ``iter_0000100``.
_STEP = re.compile(r"(?i)((?:step|checkpoint|ckpt|epoch|iter|iteration)s?[-_= ]?)0*(\d+)")


def save_files(
    path: str | os.PathLike[str],
    store: Where,
    *,
    step: int,
    run: str = "main",
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    optimize: Optimize = "bytes",
) -> SaveReport:
    """Save a directory, or a file, as one step, to be given back byte for byte.

    On return it is durable and visible.  Files of safetensors, torch and NumPy are cut at the borders of
    their tensors, so that only what changed from step to step is stored; whatever else there is, and whatever
    cannot be understood, is kept as bytes.  Nothing in a file is executed.

    Parameters
    ----------
    path : path-like
        With all that is in it: files, directories and symbolic links that stay inside.
    store : path, Backend or Store
        Where; a directory is made if it does not exist.
    step : int
    run, metrics, metadata, overwrite
        As of `deltackpt.save`.
    optimize : {"bytes", "time", "energy"}
        As of `deltackpt.open_run`; by default the smallest, since no training waits for it.

    Raises
    ------
    NotFoundError
        If there is no such file or directory.
    InvalidInputError
        If it holds a socket, a pipe, a device, a link that leads out, or the store itself; names it.
    ConflictError
        If it changed while it was read.
    AlreadyExistsError
        If the run has this step already.
    StorageError
        If something cannot be read, or the disk of the store is full or fails.

    Examples
    --------
    >>> import tempfile
    >>> import deltackpt
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> here, store = Path(tempfile.mkdtemp()), MemoryBackend()
    >>> (here / "checkpoint-100").mkdir()
    >>> _ = (here / "checkpoint-100" / "config.json").write_text("{}")
    >>> report = save_files(here / "checkpoint-100", store, step=100)
    >>> deltackpt.load_files(store, here / "again").name
    'again'
    >>> (here / "again" / "config.json").read_text()
    '{}'
    """
    found = Found(Path(path), check_step(step))  # before a store is made
    with open_run(store, run, optimize=optimize) as opened:
        return FolderSaver(opened, shadow=0).save(
            found, metrics=metrics, metadata=metadata, overwrite=overwrite
        )


class FolderSaver:
    """Saves directories and files as steps of a run, one after another; for one thread.

    Parameters
    ----------
    run : Run
        Its rules say which steps stay; what is remembered of the last step lives as long as this.
    shadow : int
        Bytes of memory for what changed in the last step, as of `deltackpt.open_run`.
    """

    def __init__(self, run: Run, *, shadow: int = SIZE_MAX) -> None:
        self.run = run
        self._saver = Saver(run.store, run.name, Shadow(shadow))

    def save(
        self,
        found: Found,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> SaveReport:
        """Save one; as `save_files`."""
        if holds_store(found.path, self.run):
            raise InvalidInputError(
                f"{found.path}: holds the store {self.run.store.url}, which changes as it is saved into",
                hint="keep the store elsewhere",
            )
        start_s, meter = time.perf_counter(), Meter()
        what = What(
            found.step,
            check_metrics(metrics or {}),
            check_metadata(metadata or {}),
            overwrite,
            self.run.optimize or "bytes",
        )

        def save() -> tuple[SaveReport, int | None]:
            report = self._saver.save(found.state, what, meter.read, allow_pickle=False, check=found.check)
            return report, self._saver.found_step

        report = self.run.retaining(save)
        total_s = time.perf_counter() - start_s
        return replace(report, total_s=total_s, stall_s=total_s)


class Found:
    """A directory or a file as it was found; the bytes of its files are read when they are looked at.

    Parameters
    ----------
    path : Path
    step : int
        Which it is to be; its number is left out of keys.

    Attributes
    ----------
    path : Path
        Where it is, links followed.
    state : dict
        What is saved.

    Raises
    ------
    NotFoundError, InvalidInputError, ConflictError, StorageError
        As of `save_files`.
    """

    def __init__(self, path: Path, step: int) -> None:
        if not os.path.lexists(path):
            raise NotFoundError(f"{path}: no such file or directory", hint="check the path")
        self.step = step
        name = path.absolute().name
        with targets.storage_errors(path):
            path = Path(os.path.realpath(path, strict=True))  # it may itself be a link
        if not name or name == "..":
            name = path.name or "files"
        self.path = path
        self._seen: list[tuple[Path, tuple[int, ...]]] = []
        files: dict[str, Any] = {}
        entries: list[dict[str, Any]] = []
        keys = Names()
        for relative, found in walk(path):
            full = path / relative if relative else path
            _check_size(full, relative)
            entry: dict[str, Any] = {"path": relative}
            entries.append(entry)
            if stat.S_ISLNK(found.st_mode):
                with targets.storage_errors(full):
                    target = os.readlink(full)  # noqa: PTH115  (a Path would not be as it was written)
                _check_size(full, target)
                if not stays_inside(relative, target):
                    raise InvalidInputError(
                        f"{full}: is a link to {target!r}, which leads out of what is saved",
                        hint="put the file itself in its place, as cp -rL does",
                    )
                entry |= {"kind": "link", "target": target}
                continue
            is_file = stat.S_ISREG(found.st_mode)
            if not is_file and not stat.S_ISDIR(found.st_mode):
                raise InvalidInputError(f"{full}: is neither a file nor a directory", hint="leave it out")
            entry |= {"kind": "file" if is_file else "directory"}
            entry |= {"mode": found.st_mode & MODE, "mtime_ns": found.st_mtime_ns}
            self._seen.append((full, _signs(found)))
            if is_file:
                entry["key"] = keys.unique(_key(relative, step))
                entry["blake3"], entry["gaps"], files[entry["key"]] = _taken_apart(File.of(full, found))
        self.state = {MARK: VERSION, "name": name, "entries": entries, "files": files}

    def check(self) -> None:
        """Raise a `ConflictError` if anything of it was changed since it was found."""
        for path, signs in self._seen:
            try:
                same = _signs(os.lstat(path)) == signs
            except OSError:
                same = False
            if not same:
                raise _changed(path)


def _check_size(full: Path, text: str) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > _PATH_SIZE_MAX:
        raise InvalidInputError(
            f"{full}: its path, or what it leads to, takes {size} bytes, at most {_PATH_SIZE_MAX} allowed",
            hint="save a directory that is deeper in, or give it shorter names",
        )


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Find all there is, a directory before what is in it, by name."""
    todo = [""]
    while todo:
        relative = todo.pop()
        full = root / relative if relative else root
        with targets.storage_errors(full):
            found = full.lstat()
            yield relative, found
            if stat.S_ISDIR(found.st_mode):
                names = sorted((entry.name for entry in os.scandir(full)), reverse=True)
                todo += [f"{relative}/{name}" if relative else name for name in names]


def _signs(found: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is written to or replaced, or a directory gets or loses an entry."""
    size = found.st_size if stat.S_ISREG(found.st_mode) else 0
    return found.st_ino, size, found.st_mtime_ns, found.st_ctime_ns


class Stretch(NamedTuple):
    """Some bytes of a file."""

    offset: int
    size: int


class File(NamedTuple):
    """A file as it was found.

    Nothing of it is held: a directory may be larger than the memory, and have more files than may be open.
    """

    path: Path
    size: int
    signs: tuple[int, ...]

    @classmethod
    def of(cls, path: Path, found: os.stat_result) -> File:
        """Return what was found."""
        return cls(path, found.st_size, _signs(found))

    def content(self) -> U8:
        """Return all of its bytes."""
        return self.read(Stretch(0, self.size))

    def read(self, *stretches: Stretch) -> U8:
        """Return some of its bytes, one stretch behind another: a copy, or, of one long stretch, a map.

        Raises
        ------
        ConflictError
            If it is not what was found any more.
        StorageError
            If it cannot be read.
        """
        with targets.storage_errors(self.path):
            try:
                file = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError as e:
                if e.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                raise _changed(self.path) from e
            try:
                if _signs(os.fstat(file)) != self.signs:
                    raise _changed(self.path)
                return _map(file, *stretches) if _is_mapped(stretches) else self._copy(file, stretches)
            finally:
                os.close(file)

    def _copy(self, file: int, stretches: Sequence[Stretch]) -> U8:
        data, end = np.empty(sum(part.size for part in stretches), np.uint8), 0
        for offset, size in stretches:
            stop = end + size
            while end < stop:
                n = os.preadv(file, [data[end:stop].data], offset + size - (stop - end))
                if not n:
                    raise _changed(self.path)
                end += n
        return data

    def tensor(self, dtype: str, *stretches: Stretch) -> Deferred:
        """Return some of its bytes as elements, to be read when they are needed."""
        n = sum(part.size for part in stretches) // DTYPE_SIZES[dtype]
        return Deferred("", dtype, (n,), "numpy", partial(self.read, *stretches), not _is_mapped(stretches))


def _is_mapped(stretches: Sequence[Stretch]) -> bool:
    return len(stretches) == 1 and stretches[0].size > _READ_SIZE_MAX


def _map(file: int, stretch: Stretch) -> U8:
    before = stretch.offset % mmap.ALLOCATIONGRANULARITY
    whole = mmap.mmap(file, before + stretch.size, access=mmap.ACCESS_READ, offset=stretch.offset - before)
    return np.frombuffer(whole, np.uint8)[before:]


def _changed(path: Path) -> ConflictError:
    return ConflictError(
        f"{path}: changed while it was read; nothing is saved", hint="save it again once nobody writes to it"
    )


def hash_of(data: U8) -> str:
    """Return what tells a file's bytes from all others."""
    return blake3(data, max_threads=blake3.AUTO if os.getpid() == _PID else 1).hexdigest()


def _key(relative: str, step: int) -> str:
    """Return what a file is called in the state.

    Examples
    --------
    >>> _key("global_step100/mp_rank_00.pt", 100), _key("rng_state_1.pth", 1), _key("", 7)
    ('global_stepN/mp_rank_00.pt', 'rng_state_1.pth', 'file')
    """
    return _STEP.sub(lambda m: m[1] + "N" if int(m[2]) == step else m[0], relative) or "file"


def _taken_apart(file: File) -> tuple[str, list[int], Any]:
    """Return a file's hash, the sizes of what lies around its tensors, and its content."""
    data = file.content()
    digest, found = hash_of(data), spans(data)
    if not found:
        is_small = data.size <= _INLINE_SIZE_MAX
        return digest, [], data.tobytes() if is_small else file.tensor("uint8", Stretch(0, file.size))
    ends = [0, *(span.offset + span.size for span in found)]
    starts = [*(span.offset for span in found), file.size]
    gaps = [Stretch(end, start - end) for end, start in zip(ends, starts, strict=True)]
    names = Names()
    parts = {names.unique("rest"): file.tensor("uint8", *gaps)}
    for span in found:
        parts[names.unique(span.name)] = file.tensor(span.dtype, Stretch(span.offset, span.size))
    return digest, [gap.size for gap in gaps], parts


def stays_inside(relative: str, target: str) -> bool:
    """Return whether a link leads to a place inside, whatever links lie on the way there.

    It may only go up first: what is above a link in its way is another place than the path says.

    Examples
    --------
    >>> stays_inside("a/b", "../c"), stays_inside("a/b", "../../c"), stays_inside("a", "b/../c")
    (True, False, False)
    """
    parts = [part for part in target.split("/") if part not in ("", ".")]
    n_up = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    return (
        bool(target)
        and "\0" not in target
        and not target.startswith("/")
        and ".." not in parts[n_up:]
        and n_up <= relative.count("/")
    )


def holds_store(path: Path, run: Run) -> bool:
    """Return whether the store of a run lies in what has this name, or is it."""
    backend = run.store.backend
    if not isinstance(backend, LocalBackend):
        return False
    here = os.path.join(os.path.realpath(path.parent), path.name)  # noqa: PTH118  (a link is what it is)
    return Path(os.path.realpath(backend.url)).is_relative_to(here)
