"""Bytes read from a store to get a part of a state: one row of a tensor, or a hundredth of the names.

Owns   a backend that counts what is read through it.
Never  times anything: what a read costs depends on where the store lies, the bytes do not.

    python bench/partial.py [--size medium] [--cache DIR] [--dir DIR] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cache import default_cache
from states import SIZES, series

from deltackpt import delta, open_run
from deltackpt.backends import Buffer
from deltackpt.backends.local import LocalBackend
from deltackpt.report import human_size

TABLE = "model.middle.weight"


class CountingBackend(LocalBackend):
    """A directory that adds up the bytes read from it; a file that is mapped counts whole."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.read_size = 0
        self._counting = threading.Lock()

    def _count(self, size: int) -> None:
        with self._counting:
            self.read_size += size

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        data = super().read(name, offset, size)
        self._count(len(data))
        return data

    def read_into(self, name: str, offset: int, buffers: Sequence[Buffer]) -> None:
        super().read_into(name, offset, buffers)
        self._count(sum(memoryview(buffer).nbytes for buffer in buffers))

    def map(self, name: str) -> memoryview:
        mapped = super().map(name)
        self._count(mapped.nbytes)
        return mapped


def counted(store: Path, read: Callable[[LocalBackend], Any]) -> tuple[int, Any]:
    """What a first read of a store that nothing is known of takes, and what it gives."""
    backend = CountingBackend(store)
    try:
        found = read(backend)
    finally:
        backend.close()
    return backend.read_size, found


def names_of_a_share(store: Path, share: float) -> tuple[list[str], int]:
    """The smallest tensors that together have about this share of a state's bytes, and how many those are."""
    with open_run(store) as run:
        tensors = sorted(run.manifest().tensors, key=lambda tensor: (tensor.size, tensor.name))
    limit, names, size = share * sum(t.size for t in tensors), [], 0
    for tensor in tensors:
        if size + tensor.size > limit:
            break
        names.append(tensor.name)
        size += tensor.size
    return names, size


def measure_row(size: str, cache_dir: Path, at: Path) -> dict[str, Any]:
    """One row of an embedding, after the last save of a whole series."""
    store, state = saved("zipf", size, cache_dir, at)
    table = state["model"]["middle.weight"]
    index = len(table) // 2
    step = last_step(store)
    read_size, row = counted(store, lambda backend: delta.read(backend, step, TABLE, index))
    assert torch.equal(torch.as_tensor(row), table[index])
    whole_size, _ = counted(store, delta.load)
    return {"wanted_size": table[index].nbytes, "read_size": read_size, "whole_read_size": whole_size}


def measure_keys(size: str, cache_dir: Path, at: Path) -> dict[str, Any]:
    """A hundredth of a fine-tune, by name."""
    store, _ = saved("finetune", size, cache_dir, at)
    names, wanted_size = names_of_a_share(store, 0.01)
    read_size, _ = counted(store, lambda backend: delta.load(backend, keys=names))
    whole_size, _ = counted(store, delta.load)
    return {"wanted_size": wanted_size, "read_size": read_size, "whole_read_size": whole_size}


def saved(regime: str, size: str, cache_dir: Path, at: Path) -> tuple[Path, dict[str, Any]]:
    """A store with a whole series, and the last state."""
    saves = series(regime, size, 0, cache_dir).saves
    for save in saves:
        delta.save(save.nested(save.tensors()), at / regime, step=save.step)
    return at / regime, saves[-1].nested(saves[-1].tensors())


def last_step(store: Path) -> int:
    with open_run(store) as run:
        step = run.latest()
    assert step is not None
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--dir", type=Path, help="where to write; default a temporary directory here")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir or Path.cwd(), prefix="bench-") as at:
        results = {
            "one row of an embedding": measure_row(options.size, options.cache, Path(at)),
            "a hundredth of the names": measure_keys(options.size, options.cache, Path(at)),
        }
    if options.json:
        print(json.dumps(results, indent=1))
        return
    for title, sizes in results.items():
        wanted, read, whole = (human_size(sizes[k]) for k in ("wanted_size", "read_size", "whole_read_size"))
        print(f"{title}: {wanted} wanted, {read} read; the whole state: {whole} read")


if __name__ == "__main__":
    main()
