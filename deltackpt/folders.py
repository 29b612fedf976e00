"""Folders: a file or a directory as a step, and back byte for byte.

Owns   walking a directory, its files cut at their tensors' borders, and putting them where they were.
Never  follows a link, writes outside its target, leaves half of one, or keeps what changed while it was read.

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

import mmap
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from deltackpt import restore as chunks
from deltackpt import targets, tree
from deltackpt.backends.local import LocalBackend
from deltackpt.containers import spans
from deltackpt.efforts import Optimize
from deltackpt.energy import Meter
from deltackpt.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptError,
    InvalidInputError,
    NotFoundError,
    StorageError,
    UnsupportedVersionError,
)
from deltackpt.manifest import Manifest, TensorRow
from deltackpt.records import check_step
from deltackpt.report import SaveReport
from deltackpt.run import Run, check_metadata, check_metrics, open_run
from deltackpt.saver import Saver, What
from deltackpt.shadow import SIZE_MAX, Shadow
from deltackpt.store import Where
from deltackpt.structure import Leaf, Names, where
from deltackpt.types import DTYPE_SIZES, U8, Tensor

#: The key that tells a step of files from other states, and how its entries are written down.
MARK = "deltackpt.files"
VERSION = 1

#: A file of no more bytes, in which there are no tensors, stands in the manifest.
_INLINE_SIZE_MAX = 1024
#: A file of no more bytes is read, a larger one mapped.
_READ_SIZE_MAX = 1 << 20
#: Bytes of tensors put into a file at a time; a larger tensor makes a batch of its own.
_BATCH_SIZE = 64 << 20
#: Bytes of a path, with room for a number: from 4096 on a text is a tensor, which a path must not be.
_PATH_SIZE_MAX = 4000
_MODE = 0o777  # no set-uid of a stranger's making
_MTIME_MAX = 1 << 63
_SIZE_MAX = 1 << 62  # beyond what a system can be asked for
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
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> here, store = Path(tempfile.mkdtemp()), MemoryBackend()
    >>> (here / "checkpoint-100").mkdir()
    >>> _ = (here / "checkpoint-100" / "config.json").write_text("{}")
    >>> report = save_files(here / "checkpoint-100", store, step=100)
    >>> load_files(store, here / "again").name
    'again'
    >>> (here / "again" / "config.json").read_text()
    '{}'
    """
    found = Found(Path(path), check_step(step))  # before a store is made
    with open_run(store, run, optimize=optimize) as opened:
        return FolderSaver(opened, shadow=0).save(
            found, metrics=metrics, metadata=metadata, overwrite=overwrite
        )


def load_files(
    store: Where,
    path: str | os.PathLike[str] | None = None,
    *,
    step: int | str = "latest",
    run: str = "main",
    overwrite: bool = False,
) -> Path:
    """Put the files of a step back, byte for byte, with names, modes and times; return where they are.

    Parameters
    ----------
    store : path, Backend or Store
    path : path-like, optional
        What it is to be called; by default as it was, in the current directory.  It appears whole or not at
        all.
    step : int, "latest" or "latest-good"
    run : str
    overwrite : bool
        Replace what is there.

    Raises
    ------
    NotFoundError
        If there is no such store, run or step, or no directory to put it in.
    AlreadyExistsError
        If `path` is there, and `overwrite` is false.
    InvalidInputError
        If the step was not saved by `save_files`; if `path` holds the store, or is a directory where the step
        is a file: neither is ever replaced.
    CorruptError
        If a byte is missing or changed, or a path leads out of the target; then nothing is left.
    StorageError
        If the disk fails or is full.
    """
    with open_run(store, run, create=False) as opened:
        return restore(opened, step, None if path is None else Path(path), overwrite=overwrite).path


# -- saving


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
        if _holds(found.path, self.run):
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
    """A directory or a file as it was found, its files mapped.

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
        for relative, found in _walk(path):
            full = path / relative if relative else path
            _check_size(full, relative)
            entry: dict[str, Any] = {"path": relative}
            entries.append(entry)
            if stat.S_ISLNK(found.st_mode):
                with targets.storage_errors(full):
                    target = os.readlink(full)  # noqa: PTH115  (a Path would not be as it was written)
                _check_size(full, target)
                if not _stays_inside(relative, target):
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
            entry |= {"mode": found.st_mode & _MODE, "mtime_ns": found.st_mtime_ns}
            self._seen.append((full, _signs(found)))
            if is_file:
                data = _mapped(full, found)
                entry["blake3"] = _hash(data)
                entry["key"] = keys.unique(_key(relative, step))
                entry["gaps"], files[entry["key"]] = _taken_apart(data)
        self.state = {MARK: VERSION, "name": name, "entries": entries, "files": files}

    def check(self) -> None:
        """Raise a `ConflictError` if anything of it was changed since it was found."""
        for path, signs in self._seen:
            try:
                same = _signs(os.lstat(path)) == signs
            except OSError:
                same = False
            if not same:
                raise ConflictError(
                    f"{path}: changed while it was read; nothing is saved",
                    hint="save it again once nobody writes to it",
                )


def _check_size(full: Path, text: str) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > _PATH_SIZE_MAX:
        raise InvalidInputError(
            f"{full}: its path, or what it leads to, takes {size} bytes, at most {_PATH_SIZE_MAX} allowed",
            hint="save a directory that is deeper in, or give it shorter names",
        )


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
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


def _mapped(path: Path, found: os.stat_result) -> U8:
    with targets.storage_errors(path):
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            now = os.fstat(file)
            if _signs(now) != _signs(found):
                raise ConflictError(f"{path}: changed while it was read", hint="save it again")
            if now.st_size > _READ_SIZE_MAX:
                return np.frombuffer(mmap.mmap(file, now.st_size, access=mmap.ACCESS_READ), np.uint8)
            with os.fdopen(file, "rb", closefd=False) as content:
                return np.frombuffer(content.read(), np.uint8)
        finally:
            os.close(file)


def _hash(data: U8) -> str:
    return blake3(data, max_threads=blake3.AUTO).hexdigest()


def _key(relative: str, step: int) -> str:
    """Return what a file is called in the state.

    Examples
    --------
    >>> _key("global_step100/mp_rank_00.pt", 100), _key("rng_state_1.pth", 1), _key("", 7)
    ('global_stepN/mp_rank_00.pt', 'rng_state_1.pth', 'file')
    """
    return _STEP.sub(lambda m: m[1] + "N" if int(m[2]) == step else m[0], relative) or "file"


def _taken_apart(data: U8) -> tuple[list[int], Any]:
    """Return the sizes of what lies around a file's tensors, and its content."""
    found = spans(data)
    if not found:
        return [], data.tobytes() if data.size <= _INLINE_SIZE_MAX else _tensor(data, "uint8")
    ends = [0, *(span.offset + span.size for span in found)]
    starts = [*(span.offset for span in found), data.size]
    rest = [data[end:start] for end, start in zip(ends, starts, strict=True)]
    names = Names()
    parts = {names.unique("rest"): _tensor(np.concatenate(rest), "uint8")}
    for span in found:
        parts[names.unique(span.name)] = _tensor(data[span.offset : span.offset + span.size], span.dtype)
    return [part.size for part in rest], parts


def _tensor(data: U8, dtype: str) -> Tensor:
    return Tensor("", dtype, (data.size // DTYPE_SIZES[dtype],), "numpy", data)


def _stays_inside(relative: str, target: str) -> bool:
    """Return whether a link leads to a place inside, whatever links lie on the way there.

    It may only go up first: what is above a link in its way is another place than the path says.

    Examples
    --------
    >>> _stays_inside("a/b", "../c"), _stays_inside("a/b", "../../c"), _stays_inside("a", "b/../c")
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


# -- restoring


class Restored(NamedTuple):
    """Where the files of a step were put, and how many bytes they have."""

    step: int
    path: Path
    file_size: int


def holds_files(manifest: Manifest) -> bool:
    """Return whether a step was saved from files."""
    structure = manifest.structure
    return isinstance(structure, dict) and isinstance(structure.get("map"), dict) and MARK in structure["map"]


def restore(
    run: Run,
    step: int | str = "latest",
    out: Path | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done_size, total_size: None,
) -> Restored:
    """Put the files of a step back; as `load_files`."""
    commit = run.commit(step)
    with run.reading(commit):
        folder = _Folder.of(run.store.read_manifest(commit), f"run {run.name!r} step {commit.slot.step}")
        path = Path(folder.name) if out is None else out
        _check_target(path, run, overwrite, is_file=folder.entries[0].kind == "file")
        temporary = targets.beside(path, "tmp")
        try:
            with targets.storage_errors(path):
                folder.write(temporary, partial(chunks.fill, run.store), progress)
            targets.put_in_place(temporary, path)
        except BaseException:
            targets.discard(temporary)
            raise
    return Restored(commit.slot.step, path, sum(entry.size for entry in folder.entries))


def is_as_saved(run: Run, step: int, path: Path, *, by_content: bool = False) -> bool:
    """Return whether a file or directory is what a step holds of it, by names, sizes and times of change.

    Parameters
    ----------
    run : Run
    step : int
    path : Path
    by_content : bool
        Read all of it, and go by that instead of sizes and times: after a power loss those may be right where
        the content is not.  There may be more beside it.
    """
    manifest = run.manifest(step)
    if not holds_files(manifest):
        return False
    folder = _Folder.of(manifest, f"run {run.name!r} step {step}")
    try:
        found = dict(_walk(path))
        saved = {entry.path for entry in folder.entries}
        are_there = found.keys() >= saved if by_content else found.keys() == saved
        return are_there and all(
            _is_same(path / entry.path if entry.path else path, found[entry.path], entry, by_content)
            for entry in folder.entries
        )
    except (ConflictError, StorageError):  # it is gone, or going
        return False


def _is_same(path: Path, found: os.stat_result, entry: _Entry, by_content: bool) -> bool:
    if entry.kind == "link":
        return stat.S_ISLNK(found.st_mode) and os.readlink(path) == entry.target  # noqa: PTH115
    if entry.kind == "directory":
        return stat.S_ISDIR(found.st_mode)
    if not stat.S_ISREG(found.st_mode) or found.st_size != entry.size:
        return False
    return _hash(_mapped(path, found)) == entry.blake3 if by_content else found.st_mtime_ns == entry.mtime_ns


def _holds(path: Path, run: Run) -> bool:
    """Return whether the store of a run lies in what has this name, or is it."""
    backend = run.store.backend
    if not isinstance(backend, LocalBackend):
        return False
    here = os.path.join(os.path.realpath(path.parent), path.name)  # noqa: PTH118  (a link is what it is)
    return Path(os.path.realpath(backend.url)).is_relative_to(here)


def _check_target(path: Path, run: Run, overwrite: bool, *, is_file: bool) -> None:
    if path.name in ("", "..") or not _is_text(str(path)):
        raise InvalidInputError(f"{path}: is no name of a file or directory", hint="name one")
    if not os.path.isdir(path.parent):  # noqa: PTH112  (pathlib raises if the name is too long)
        raise NotFoundError(f"{path.parent}: no such directory", hint="create it first")
    if _holds(path, run):
        raise InvalidInputError(f"{path}: holds the store {run.store.url}", hint="choose another name")
    is_directory = os.path.isdir(path) and not path.is_symlink()  # noqa: PTH112
    if is_directory and is_file:
        raise InvalidInputError(f"{path}: is a directory, expected a file name", hint="name a file in it")
    if os.path.lexists(path) and not overwrite:
        deletes = "deletes all that is in this one" if is_directory else "replaces this one"
        raise AlreadyExistsError(
            f"{path}: is there already", hint=f"choose another name; --overwrite {deletes}"
        )


class _Entry(NamedTuple):
    """One file, directory or link, checked."""

    path: str
    kind: str
    mode: int
    mtime_ns: int
    target: str
    blake3: str
    gaps: list[int]
    rest: bytes | TensorRow
    tensors: list[TensorRow]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        rest = self.rest.size if isinstance(self.rest, TensorRow) else len(self.rest)
        return rest + sum(row.size for row in self.tensors)


@dataclass(frozen=True, slots=True)
class _Folder:
    """What a step of files holds, checked: nothing in it leads out of where it is put."""

    name: str
    entries: list[_Entry]

    @classmethod
    def of(cls, manifest: Manifest, label: str) -> _Folder:
        if not holds_files(manifest):
            raise InvalidInputError(
                f"{label}: holds a state and no files",
                hint="deltackpt.load, or deltackpt restore -o FILE.safetensors",
            )

        def row(leaf: Leaf) -> TensorRow:
            if not leaf.is_array or leaf.view.layout is not None:
                raise CorruptError(f"{where('state', leaf.path)}: found a {leaf.tag}, expected bytes")
            return manifest.tensors[leaf.at]

        state = tree.unflatten(manifest.structure, len(manifest.tensors), row)
        if state[MARK] != VERSION:
            raise UnsupportedVersionError(
                f"{label}: its files are written down by version {state[MARK]!r:.80}, expected {VERSION}",
                hint="upgrade deltackpt",
            )
        return _checked(state)

    def write(
        self,
        root: Path,
        fill: Callable[[list[tuple[TensorRow, U8]]], None],
        progress: Callable[[int, int], None],
    ) -> None:
        """Write all of it to a new place, durably."""
        total_size, done_size = sum(entry.size for entry in self.entries), 0
        directories = []
        for entry in self.entries:
            path = root / entry.path if entry.path else root
            if entry.kind == "directory":
                path.mkdir(mode=0o700)
                directories.append((path, entry))
            elif entry.kind == "file":
                _write_file(path, entry, fill, _after(done_size, total_size, progress))
                done_size += entry.size
        for entry in self.entries:  # last, so that nothing is written through one
            if entry.kind == "link":
                (root / entry.path).symlink_to(entry.target)
        for path, entry in reversed(directories):  # what is in it changes a directory's time
            opened = os.open(path, os.O_RDONLY)
            try:
                os.utime(opened, ns=(entry.mtime_ns, entry.mtime_ns))
                os.fchmod(opened, entry.mode)
                os.fsync(opened)
            finally:
                os.close(opened)


def _after(done_size: int, total_size: int, progress: Callable[[int, int], None]) -> Callable[[int], None]:
    return lambda size: progress(done_size + size, total_size)


def _write_file(
    path: Path,
    entry: _Entry,
    fill: Callable[[list[tuple[TensorRow, U8]]], None],
    progress: Callable[[int], None],
) -> None:
    with path.open("x+b") as file:
        if entry.size:
            targets.reserve(file.fileno(), entry.size)
            mapped = mmap.mmap(file.fileno(), entry.size)
            content: U8 = np.frombuffer(mapped, np.uint8)
            _fill_file(content, entry, fill, progress)
            found = _hash(content)
            mapped.flush()
        else:
            found = blake3().hexdigest()
        if found != entry.blake3:
            raise CorruptError(f"file {entry.path!r}: its BLAKE3 is {found}, expected {entry.blake3}")
        os.fchmod(file.fileno(), entry.mode)
        os.utime(file.fileno(), ns=(entry.mtime_ns, entry.mtime_ns))
        os.fsync(file.fileno())


def _fill_file(
    content: U8,
    entry: _Entry,
    fill: Callable[[list[tuple[TensorRow, U8]]], None],
    progress: Callable[[int], None],
) -> None:
    """Put a file together, decoding each tensor in its place."""
    rest: U8
    if isinstance(entry.rest, TensorRow):
        rest = np.empty(entry.rest.size, np.uint8) if entry.tensors else content
        fill([(entry.rest, rest)])
    else:
        rest = np.frombuffer(entry.rest, np.uint8)
    if not entry.tensors:
        content[:] = rest
        return
    at = taken = batch_size = 0
    batch: list[tuple[TensorRow, U8]] = []
    for i, gap in enumerate(entry.gaps):
        content[at : at + gap] = rest[taken : taken + gap]
        at, taken = at + gap, taken + gap
        if i < len(entry.tensors):
            row = entry.tensors[i]
            batch.append((row, content[at : at + row.size]))
            at, batch_size = at + row.size, batch_size + row.size
        if batch_size >= _BATCH_SIZE or i == len(entry.tensors):
            fill(batch)
            batch, batch_size = [], 0
            progress(at)


def _checked(state: Any) -> _Folder:
    """Check what a store says of a step's files; whoever wrote it may have lied."""
    name, listed, files = state.get("name"), state.get("entries"), state.get("files")
    if not _is_name(name) or type(listed) is not list or type(files) is not dict:
        raise CorruptError(f"files: found the name {name!r:.80}, expected one, and entries and files")
    seen: set[str] = set()
    directories: set[str] = set()
    entries: list[_Entry] = []
    for body in listed:
        entry = _checked_entry(body, files)
        # The first, and no other, is what all the others are in.
        is_placed = entry.path.rpartition("/")[0] in directories if entry.path else not entries
        if not is_placed or entry.path in seen:
            raise CorruptError(f"files: {entry.path!r:.200} is there twice, or in no directory")
        seen.add(entry.path)
        if entry.kind == "directory":
            directories.add(entry.path)
        entries.append(entry)
    if not entries or entries[0].kind == "link":
        raise CorruptError("files: found nothing to put back")
    return _Folder(name, entries)


def _checked_entry(body: Any, files: dict[Any, Any]) -> _Entry:
    path, kind = (body.get("path"), body.get("kind")) if type(body) is dict else (None, None)
    if not isinstance(path, str) or not all(map(_is_name, path.split("/") if path else [])):
        raise CorruptError(f"files: found the path {path!r:.200}, expected one that leads nowhere else")
    at = f"file {path!r:.200}"
    if kind == "link":
        target = body.get("target")
        if not isinstance(target, str) or not _is_text(target) or not _stays_inside(path, target):
            raise CorruptError(f"{at}: is a link to {target!r:.200}, which leads out")
        return _Entry(path, kind, 0, 0, target, "", [], b"", [])
    mode, mtime_ns = body.get("mode"), body.get("mtime_ns")
    if type(mode) is not int or type(mtime_ns) is not int or not -_MTIME_MAX < mtime_ns < _MTIME_MAX:
        raise CorruptError(f"{at}: mode and time are {mode!r:.40} and {mtime_ns!r:.40}")
    if kind == "directory":
        return _Entry(path, kind, mode & _MODE, mtime_ns, "", "", [], b"", [])
    key, digest, gaps = body.get("key"), body.get("blake3"), body.get("gaps")
    if kind != "file" or not isinstance(key, str) or key not in files or type(gaps) is not list:
        raise CorruptError(f"{at}: found a {kind!r:.80} of key {key!r:.80}, expected a file and its content")
    content = files[key]
    tensors = list(content.values()) if type(content) is dict else []
    rest = content if not tensors else tensors.pop(0)
    if not isinstance(rest, bytes | TensorRow) or not all(isinstance(row, TensorRow) for row in tensors):
        raise CorruptError(f"{at}: found {type(rest).__name__}, expected bytes and tensors")
    entry = _Entry(path, kind, mode & _MODE, mtime_ns, "", str(digest), gaps, rest, tensors)
    if entry.size > _SIZE_MAX:
        raise CorruptError(f"{at}: has {entry.size} bytes, at most {_SIZE_MAX} allowed")
    if tensors:
        rest_size = entry.size - sum(row.size for row in tensors)
        is_good = all(type(gap) is int and gap >= 0 for gap in gaps)
        if not is_good or len(gaps) != len(tensors) + 1 or sum(gaps) != rest_size:
            raise CorruptError(
                f"{at}: {len(gaps)} gaps do not fit {len(tensors)} tensors and {rest_size} bytes"
            )
    return entry


def _is_name(name: Any) -> bool:
    """Return whether it is the name of something in a directory, and of nothing above it."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and _is_text(name)


def _is_text(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
