"""Scenarios: all scenes of tests/scenes.py, and those that need the disk itself or a second actor."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import lz4.block
import numpy as np
import pytest
import scenes
from actors import Actor, at_call, pausing
from disk import Disk
from faults import contents
from scenes import forgot, many, nothing, saved, state
from steps import opened

from deltackpt import gc, index, series
from deltackpt.backends import Backend
from deltackpt.backends.local import LocalBackend
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import StorageError
from deltackpt.session import Session
from deltackpt.store import DIRS, open_store

#: Two directories that are not there yet.
ROOT = "/disk/store"


@dataclass(frozen=True)
class Scenario:
    """What is on the disk, and what is done to it."""

    objects: dict[str, bytes]
    act: Callable[[Disk], None]
    may_ask: bool = False

    def disk(self) -> Disk:
        """The disk as it is before, all of it durable."""
        files = {f"{ROOT}/{name}": data for name, data in self.objects.items()}
        dirs: set[str] = set()
        if files:
            dirs = {"/disk", ROOT, *(f"{ROOT}/{name}" for name in DIRS)}
            dirs |= {path.rpartition("/")[0] for path in files}
        return Disk(files, sorted(dirs))


Act = Callable[[Backend], object]


@contextmanager
def limits() -> Iterator[None]:
    """Limits so low that small stores reach them: index files are merged too."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (gc, index):
            patch.setattr(module, "N_FILES_MAX", 2)
        yield


def prepared(prepare: Act) -> dict[str, bytes]:
    """The objects of a store to which that was done."""
    backend = MemoryBackend()
    prepare(backend)
    return contents(backend)


def on_store(act: Act) -> Callable[[Disk], None]:
    def on_disk(disk: Disk) -> None:
        act(LocalBackend(ROOT, calls=disk))

    return on_disk


def imports(backend: Backend) -> None:
    """Two checkpoint files become steps, as by the command."""
    with tempfile.TemporaryDirectory() as at:
        for step in (4, 5):
            arrays = {name: value for name, value in state(step).items() if isinstance(value, np.ndarray)}
            np.savez(Path(at) / f"step_{step}.npz", **arrays)
        steps = series.steps_of(series.find([f"{at}/*.npz"]))
        for _ in series.save(steps, backend):
            pass


def a_flush_fails(nth: int) -> Callable[[Disk], None]:
    """A save of which the nth flush fails, once."""

    def act(disk: Disk) -> None:
        left = iter(range(nth))

        def hook(call: str, *args: object) -> None:
            if call == "fsync" and next(left, None) is None:
                disk.hook = lambda call, *args: None
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        disk.hook = hook
        with suppress(StorageError):
            saved(2)(LocalBackend(ROOT, calls=disk))

    return act


def writes_are_short(disk: Disk) -> None:
    disk.write_size_max = 1500
    saved(2)(LocalBackend(ROOT, calls=disk))


def a_pack_is_lost(disk: Disk) -> None:
    """A save whose pack is gone as soon as it has its name."""
    there = set(disk.contents())

    def hook(call: str, *args: object) -> None:
        for path in disk.contents().keys() - there:
            if "/packs/" in path:
                disk.hook = lambda call, *args: None
                disk.unlink(path)

    disk.hook = hook
    saved(2)(LocalBackend(ROOT, calls=disk))


def lz4_errs(backend: Backend) -> None:
    """A save whose chunks do not come back from their blocks."""
    compress = lz4.block.compress
    with mock.patch.object(lz4.block, "compress", lambda data, **kw: compress(data[::-1].tobytes(), **kw)):
        saved(2)(backend)


def two_at_once(disk: Disk) -> None:
    """Two writers by turns, three calls each, in runs of their own; each has what the other has too."""
    runs = ["one", "two"]
    actors = [
        Actor(
            LocalBackend(ROOT, calls=disk),
            lambda backend, run=run: opened(backend, run).save(state(3), step=3),
        )
        for run in runs
    ]
    with pausing(disk):
        while not all(actor.is_over for actor in actors):
            for actor in actors:
                actor.advance(at_call(3))
    for actor in actors:
        if actor.error:
            raise actor.error


def condemns(backend: Backend) -> None:
    """A gc that has to wait for a writer at work."""
    with Session(open_store(backend), "main", 8):
        assert gc.collect(backend).waiting_for


#: What is there, and what is done: those that tests/scenes.py lacks.
MORE: dict[str, tuple[Act, Callable[[Disk], None]]] = {
    "a store is made": (nothing, on_store(opened)),
    "an import": (saved(1), on_store(imports)),
    "two writers at once": (saved(1), two_at_once),
    "a save whose pack cannot be flushed at first": (saved(1), a_flush_fails(0)),
    "a save whose decision cannot be flushed": (saved(1), a_flush_fails(5)),
    "a save whose writes are short": (saved(1), writes_are_short),
    "a save whose pack is lost at once": (saved(1), a_pack_is_lost),
    "a save while lz4 errs": (saved(1), on_store(lz4_errs)),
    "a gc that condemns and waits": (many(saved(1, 2, 3), forgot(2)), on_store(condemns)),
}
NAMES = [*scenes.SCENES, *MORE]


@contextmanager
def made(name: str) -> Iterator[Scenario]:
    """The scenario of that name, with limits so low that it does what it is named for."""
    with limits(), pytest.MonkeyPatch.context() as patch:
        if name in scenes.SCENES:
            scene = scenes.made(name, patch)
            yield Scenario(scene.objects, on_store(scene.act), scene.may_ask)
        else:
            prepare, act = MORE[name]
            yield Scenario(prepared(prepare), act)
