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
from claims import frozen
from disk import Disk
from faults import contents
from scenes import forgot, many, nothing, saved, state
from steps import opened

from deltackpt import gc, index, series, snapshot
from deltackpt.backends import Backend
from deltackpt.backends.local import LocalBackend
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import StorageError
from deltackpt.memory import Memory
from deltackpt.records import Figures
from deltackpt.repair import repair
from deltackpt.session import Part, Session
from deltackpt.shadow import Shadow
from deltackpt.store import DIRS, open_store

#: Two directories that are not there yet.
ROOT = "/disk/store"


@dataclass(frozen=True)
class Scenario:
    """What is on the disk, and what is done to it."""

    objects: dict[str, bytes]
    act: Callable[[Disk], None]
    may_ask: bool = False
    #: Whether something is damaged, so that a repair comes before a verify.
    is_damaged: bool = False

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
    with mock.patch.object(lz4.block, "compress", lambda data, **kw: compress(data[::-1], **kw)):
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
    by_turns(disk, actors)


def rank(backend: Backend, step: int, part: dict) -> tuple[Part, bytes]:
    """One rank's part of a step, published and handed over, and its manifest."""
    with Session(open_store(backend), "main", step) as session:
        manifest = snapshot.save(session, part, lambda _: Memory(), Shadow(0)).manifest
        session.publish(None)
        return session.hand_over(), manifest.to_bytes()


def decide(backend: Backend, step: int, whole: bytes, parts: list[Part]) -> None:
    """The step of several ranks, by one that has written nothing itself and looks nothing up."""
    with Session(open_store(backend), "main", step) as session:
        session.publish(whole, parts)
        session.commit(whole, parent=None, metrics={}, metadata={}, figures=Figures())


def ranks(step: int, of: int) -> Act:
    """Two ranks of what another step has, one after the other, and the decision."""

    def act(backend: Backend) -> None:
        with promising(backend)((("main", step), frozen(state(of)))):
            part, whole = rank(backend, step, state(of))
            other, _ = rank(backend, step, {"moves": state(of)["moves"]})
            decide(backend, step, whole, [part, other])

    return act


def ranks_at_once(disk: Disk) -> None:
    """Two ranks by turns, three calls each, and the decision."""
    backend = LocalBackend(ROOT, calls=disk)
    told: dict[int, tuple[Part, bytes]] = {}

    def act(i: int, part: dict) -> Callable[[Backend], None]:
        return lambda own: told.update({i: rank(own, 3, part)})

    with promising(backend)((("main", 3), frozen(state(3)))):
        acts = [act(0, state(3)), act(1, {"moves": state(3)["moves"]})]
        by_turns(disk, [Actor(LocalBackend(ROOT, calls=disk), one) for one in acts])
        decide(backend, 3, told[0][1], [told[0][0], told[1][0]])


def by_turns(disk: Disk, actors: list[Actor]) -> None:
    """All of what they do, three calls each."""
    with pausing(disk):
        while not all(actor.is_over for actor in actors):
            for actor in actors:
                actor.advance(at_call(3))
    for actor in actors:
        if actor.error:
            raise actor.error


def promising(backend: Backend) -> Callable:
    """The claims of the recording that a disk is part of."""
    return backend._os.claims.claiming


def with_a_bad_pack(backend: Backend) -> None:
    """Two copies of each chunk, one of them in a pack with a damaged byte; and no index files."""
    other = Session(open_store(backend, create=True), "other", 1)
    other.look_up(np.zeros((0, 32), np.uint8))  # it looks before the save below, and so knows nothing of it
    saved(1)(backend)
    data = snapshot.save(other, state(1), lambda _: Memory(), Shadow(0)).manifest.to_bytes()
    other.publish(data)
    other.commit(data, parent=None, metrics={}, metadata={}, figures=Figures())
    for entry in backend.list("index/"):
        backend.delete(entry.name)
    bad = f"packs/{other.sid.hex()}-0-0.pack"
    damaged = bytearray(backend.read(bad))
    damaged[300] ^= 1
    backend.delete(bad)
    backend.create_once(bad, damaged)


def condemns(backend: Backend) -> None:
    """A gc that has to wait for a writer at work."""
    with Session(open_store(backend), "main", 8):
        assert gc.collect(backend).waiting_for


#: What is there, and what is done: those that tests/scenes.py lacks.
MORE: dict[str, tuple[Act, Callable[[Disk], None]]] = {
    "a store is made": (nothing, on_store(opened)),
    "an import": (saved(1), on_store(imports)),
    "two ranks of a step": (saved(1), ranks_at_once),
    "two writers at once": (saved(1), two_at_once),
    "a save whose pack cannot be flushed at first": (saved(1), a_flush_fails(0)),
    "a save whose decision cannot be flushed": (saved(1), a_flush_fails(5)),
    "a save whose writes are short": (saved(1), writes_are_short),
    "a save whose pack is lost at once": (saved(1), a_pack_is_lost),
    "a save while lz4 errs": (saved(1), on_store(lz4_errs)),
    "a repair": (with_a_bad_pack, on_store(repair)),
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
            yield Scenario(prepared(prepare), act, is_damaged=name == "a repair")
