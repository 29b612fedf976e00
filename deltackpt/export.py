"""Export: one step of a run as a file that other tools read, or as the files that it was saved from.

Owns   the choice of container by extension, what goes beside the tensors, the order and size of the reads.
Never  holds more than a batch of tensors in memory (but for torch's files), or leaves half a file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deltackpt import arrays, files, leaves, originals, restore
from deltackpt.errors import AlreadyExistsError, InvalidInputError, NotFoundError
from deltackpt.files import TensorSpec
from deltackpt.layout import Layout
from deltackpt.loader import check_inside
from deltackpt.manifest import Manifest, TensorRow
from deltackpt.records import Commit
from deltackpt.run import Run
from deltackpt.structure import Leaf, Names

#: Extensions that `export` writes.
WRITABLE = (".safetensors", ".npz", ".pt")

#: Bytes of tensors rebuilt at a time; a larger tensor makes a batch of its own.
_BATCH_SIZE = 64 << 20


@dataclass(frozen=True, slots=True)
class Exported:
    """What `export` wrote.

    Parameters
    ----------
    run, step : str, int
    path : Path
    file_size : int
        Bytes of the file, or of all files.
    total_s : float
        From the call to its return.
    """

    run: str
    step: int
    path: Path
    file_size: int
    total_s: float

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "path": str(self.path)}


def export(
    run: Run,
    step: int | str = "latest",
    out: Path | None = None,
    *,
    keys: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done_size, total_size: None,
) -> Exported:
    """Write one step as a ``.safetensors``, ``.npz`` or ``.pt`` file, every chunk checked against its id.

    A step of files is written as those, as by `deltackpt.load_files`, unless `keys` are given.

    Parameters
    ----------
    run : Run
    step : int or "latest"
    out : Path, optional
        Its extension chooses the container; by default ``<run>-step-<step>.safetensors`` here.
    keys : sequence of str, optional
        Only what these names or shell patterns match.
    overwrite : bool
        Replace `out` if it is there.
    progress : callable
        Is told the bytes of tensors done and of all, from time to time.

    Returns
    -------
    Exported

    Raises
    ------
    AlreadyExistsError
        If `out` is there and `overwrite` is false.
    InvalidInputError
        If the extension is unknown or the container cannot hold what the step holds.
    NotFoundError
        If there is no such step, key or directory.
    CorruptError
        If a byte of it is missing or changed; then no file is left, and an older one is as it was.

    Notes
    -----
    A ``.pt`` file holds the state as it was saved.  The other two hold arrays under their names in C order,
    tied ones once, views of others as arrays of their own, long bytes and strings as uint8; the nesting and
    all other values go beside them as JSON:
    ``{"run", "step", "structure", "tensors"}``, the latter giving names to the structure's tensor indices.
    """
    start = time.perf_counter()
    commit = run.commit(step)
    if keys is None and originals.holds_files(run.manifest(commit.slot.step)):
        done = originals.restore(run, commit.slot.step, out, overwrite=overwrite, progress=progress)
        seconds = round(time.perf_counter() - start, 6)
        return Exported(run.name, done.step, done.path, done.file_size, seconds)
    path = out or Path(f"{run.name}-step-{commit.slot.step}.safetensors")
    _check_target(path, overwrite)
    if path.suffix.lower() == ".pt":
        files.write_pt(path, run.load(commit.slot.step, keys=keys))
    else:
        with run.reading(commit):
            _write(run, commit, path, keys, progress)
    return Exported(
        run.name, commit.slot.step, path, path.stat().st_size, round(time.perf_counter() - start, 6)
    )


def _check_target(path: Path, overwrite: bool) -> None:
    if path.suffix.lower() not in WRITABLE:
        raise InvalidInputError(
            f"{path}: extension {path.suffix!r} is no known container",
            hint=f"use one of {', '.join(WRITABLE)}",
        )
    if not path.parent.is_dir():
        raise NotFoundError(f"{path.parent}: no such directory", hint="create it first")
    try:
        if path.is_dir():
            raise InvalidInputError(f"{path}: is a directory, expected a file name", hint="name a file in it")
        is_there = path.exists()
    except OSError as error:
        raise InvalidInputError(f"{path}: {error.strerror}", hint="choose another name") from error
    if is_there and not overwrite:
        raise AlreadyExistsError(f"{path}: exists already", hint="choose another name, or pass --overwrite")


def _write(
    run: Run, commit: Commit, path: Path, keys: Sequence[str] | None, progress: Callable[[int, int], None]
) -> None:
    manifest = run.store.read_manifest(commit)
    structure, items = _items(manifest, keys)
    beside = json.dumps(
        {
            "run": run.name,
            "step": commit.slot.step,
            "structure": structure,
            "tensors": {i: item.spec.name for i, item in enumerate(items)},
        },
        separators=(",", ":"),
    )
    total_size, done_size = sum(item.spec.size for item in items), 0
    with files.create_file(path, [item.spec for item in items], beside) as target:
        for batch in _batches(items, _BATCH_SIZE):
            whole = [item for item in batch if item.layout is None]
            restore.fill(run.store, [(item.row, target.buffer(item.spec.name)) for item in whole])
            for item in batch:
                if item.layout is not None:
                    data, layout = restore.part(run.store, item.row, item.layout)
                    arrays.copy_elements(target.buffer(item.spec.name), data, layout)
                target.done(item.spec.name)
            done_size += sum(item.spec.size for item in batch)
            progress(done_size, total_size)


class _Item(NamedTuple):
    """One tensor of the file: a whole row of the manifest, or the elements of one that lie so."""

    spec: TensorSpec
    row: TensorRow
    layout: Layout | None


def _items(manifest: Manifest, keys: Sequence[str] | None) -> tuple[Any, list[_Item]]:
    """Return the structure with each array as a tensor of its own, tied ones as one, and those tensors."""
    names, structure = [row.name for row in manifest.tensors], manifest.structure
    if keys is not None:
        structure, _ = leaves.select(structure, names, keys)
    items: list[_Item] = []
    numbers: dict[Any, int] = {}
    given = Names()

    def node(leaf: Leaf, name: str) -> Any:
        row, view = manifest.tensors[leaf.at], leaf.view
        check_inside(row, leaf)
        what = leaf.at, view.dtype, view.layout
        if what not in numbers:
            numbers[what] = len(items)
            shape = row.shape if view.layout is None else view.layout.shape
            items.append(
                _Item(TensorSpec(given.unique(name), view.dtype or row.dtype, shape), row, view.layout)
            )
        return {"tensor" if leaf.is_array else leaf.tag: numbers[what]}

    return leaves.rewritten(structure, names, node), items


def _batches(items: Sequence[_Item], size: int) -> Iterator[list[_Item]]:
    """Split tensors into runs of at most `size` bytes, or of one tensor."""
    batch: list[_Item] = []
    batch_size = 0
    for item in items:
        if batch and batch_size + item.spec.size > size:
            yield batch
            batch, batch_size = [], 0
        batch.append(item)
        batch_size += item.spec.size
    if batch:
        yield batch
