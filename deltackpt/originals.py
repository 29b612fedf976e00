"""Originals: the files that a step was saved from, put back byte for byte.

Owns   what a step says of its files, checked; writing them, and telling whether they are there already.
Never  leads out of its target, leaves half of one, or believes a step before its bytes are compared.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from blake3 import blake3

from deltackpt import restore as chunks
from deltackpt import targets, tree
from deltackpt.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptError,
    InvalidInputError,
    NotFoundError,
    StorageError,
    UnsupportedVersionError,
)
from deltackpt.folders import MARK, MODE, VERSION, File, hash_of, holds_store, stays_inside, walk
from deltackpt.manifest import Manifest, TensorRow
from deltackpt.run import Run, open_run
from deltackpt.store import Where
from deltackpt.structure import Leaf, where
from deltackpt.types import U8

#: Decodes tensors into their places.
Fill: TypeAlias = Callable[[list[tuple[TensorRow, U8]]], None]

#: Bytes of tensors put into a file at a time; a larger tensor makes a batch of its own.
_BATCH_SIZE = 64 << 20
_MTIME_MAX = 1 << 63
_SIZE_MAX = 1 << 62  # beyond what a system can be asked for


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
        with targets.placing(path) as temporary, targets.storage_errors(path):
            folder.write(temporary, partial(chunks.fill, run.store), progress)
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
        found = dict(walk(path))
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
    if by_content:
        return hash_of(File.of(path, found).content()) == entry.blake3
    return found.st_mtime_ns == entry.mtime_ns


def _check_target(path: Path, run: Run, overwrite: bool, *, is_file: bool) -> None:
    if path.name in ("", "..") or not _is_text(str(path)):
        raise InvalidInputError(f"{path}: is no name of a file or directory", hint="name one")
    if not os.path.isdir(path.parent):  # noqa: PTH112  (pathlib raises if the name is too long)
        raise NotFoundError(f"{path.parent}: no such directory", hint="create it first")
    if holds_store(path, run):
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
        fill: Fill,
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
    fill: Fill,
    progress: Callable[[int], None],
) -> None:
    with path.open("x+b") as file:
        if entry.size:
            targets.reserve(file.fileno(), entry.size)
            mapped = mmap.mmap(file.fileno(), entry.size)
            content: U8 = np.frombuffer(mapped, np.uint8)
            _fill_file(content, entry, fill, progress)
            found = hash_of(content)
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
    fill: Fill,
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
        if not isinstance(target, str) or not _is_text(target) or not stays_inside(path, target):
            raise CorruptError(f"{at}: is a link to {target!r:.200}, which leads out")
        return _Entry(path, kind, 0, 0, target, "", [], b"", [])
    mode, mtime_ns = body.get("mode"), body.get("mtime_ns")
    if type(mode) is not int or type(mtime_ns) is not int or not -_MTIME_MAX < mtime_ns < _MTIME_MAX:
        raise CorruptError(f"{at}: mode and time are {mode!r:.40} and {mtime_ns!r:.40}")
    if kind == "directory":
        return _Entry(path, kind, mode & MODE, mtime_ns, "", "", [], b"", [])
    key, digest, gaps = body.get("key"), body.get("blake3"), body.get("gaps")
    if kind != "file" or not isinstance(key, str) or key not in files or type(gaps) is not list:
        raise CorruptError(f"{at}: found a {kind!r:.80} of key {key!r:.80}, expected a file and its content")
    content = files[key]
    tensors = list(content.values()) if type(content) is dict else []
    rest = content if not tensors else tensors.pop(0)
    if not isinstance(rest, bytes | TensorRow) or not all(isinstance(row, TensorRow) for row in tensors):
        raise CorruptError(f"{at}: found {type(rest).__name__}, expected bytes and tensors")
    entry = _Entry(path, kind, mode & MODE, mtime_ns, "", str(digest), gaps, rest, tensors)
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
