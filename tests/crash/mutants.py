"""Mutants: the protocol with one rule broken, each small, and what is to find it out.

`BROKEN[name]` is a function that breaks the package by a `MonkeyPatch`, and the scenarios or orders in which
that must lead to a violation: to a promise broken, not merely to an error where it was broken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest

from deltackpt import gc, run
from deltackpt.backends import byte_views, local
from deltackpt.backends.local import LocalBackend
from deltackpt.codecs import lz4
from deltackpt.index import Segment, keys_of
from deltackpt.liveness import Liveness
from deltackpt.records import GcRecord, manifest_key
from deltackpt.refs import Refs
from deltackpt.session import Session
from deltackpt.store import Store


class Mutant(NamedTuple):
    breaks: Callable[[pytest.MonkeyPatch], None]
    found_by: tuple[str, ...]


BROKEN: dict[str, Mutant] = {}


def mutant(name: str, *found_by: str):
    def note(breaks):
        BROKEN[name] = Mutant(breaks, found_by)
        return breaks

    return note


SHARES, FIRST, TWICE = "a save that shares", "the first save", "an overwrite"
GC, CYCLES, MERGE = "a gc of dead packs", "a second cycle", "three saves of one process"
GIVES_UP, WAITS, SAVES = (
    "a gc that gives everyone up, beside a save",
    "a gc that waits, beside a save",
    "a save beside a gc",
)


# -- flushes


def flushed_less(patch: pytest.MonkeyPatch, *prefixes: str) -> None:
    """Objects under these are published before their bytes are flushed."""
    commit = local._LocalWriter.commit

    def committed(self):
        if not self._name.startswith(prefixes):
            return commit(self)
        fd, self._fd = self._open_fd(), None
        self._os.close(fd)
        won = self._backend._publish(self._tmp, self._name, True)
        self._unlink()
        return won

    patch.setattr(local._LocalWriter, "commit", committed)


def barriers_less(patch: pytest.MonkeyPatch, prefix: str) -> None:
    """Names under these are never flushed."""
    barrier = LocalBackend.barrier

    def fewer(self, *directories):
        kept = [name for name in directories if not name.startswith(prefix)]
        if kept or not directories:
            barrier(self, *kept)

    patch.setattr(LocalBackend, "barrier", fewer)


@mutant("a file is not flushed", SHARES)
def _(patch):
    flushed_less(patch, "")


@mutant("packs are not flushed", SHARES)
def _(patch):
    flushed_less(patch, "packs/")


@mutant("manifests are not flushed", SHARES)
def _(patch):
    flushed_less(patch, "manifests/")


@mutant("decisions are not flushed", SHARES)
def _(patch):
    flushed_less(patch, "refs/")


@mutant("directories are not flushed", SHARES)
def _(patch):
    patch.setattr(LocalBackend, "_fsync_dir", lambda self, path: None)


@mutant("a new directory's name is not flushed", FIRST)
def _(patch):
    patch.setattr(LocalBackend, "_note_dir", lambda self, directory: None)


@mutant("the place of a store is taken to be durable", FIRST)
def _(patch):
    patch.setattr(LocalBackend, "_doubt_place", lambda self: None)


@mutant("a store's descriptor is taken to be durable", FIRST)
def _(patch):
    prepare = Store.prepare_to_write

    def prepared(self):
        self.backend.rely_on(self.backend.list_dirs(""))
        prepare(self)

    patch.setattr(Store, "prepare_to_write", prepared)


@mutant("a failed flush is tried again", "a save whose pack cannot be flushed at first")
def _(patch):
    commit = local._LocalWriter.commit

    def committed(self):
        with pytest.MonkeyPatch.context() as within:
            within.setattr(self._os, "fsync", partial(flushed_somehow, self._os.fsync))
            return commit(self)

    def flushed_somehow(fsync, fd):
        try:
            fsync(fd)
        except OSError:
            fsync(fd)

    patch.setattr(local._LocalWriter, "commit", committed)


@mutant("a short write is taken for a whole one", "a save whose writes are short")
def _(patch):
    def written(self, *buffers):
        with self._dead_on_error("write"):
            self._os.writev(self._open_fd(), byte_views(buffers))

    patch.setattr(local._LocalWriter, "write", written)


@mutant("a name is taken by a rename, which overwrites", "two saves of one step")
def _(patch):
    def renamed(self, tmp, target):
        self._make_parents(local.Path(target))
        self._os.replace(tmp, target)
        return True

    patch.setattr(LocalBackend, "_link", renamed)


# -- the order of a save


@mutant("the decision is not flushed before it is told", SHARES)
def _(patch):
    barriers_less(patch, "refs")


@mutant("the directory of packs is not flushed", SHARES)
def _(patch):
    barriers_less(patch, "packs")


@mutant("the directory of manifests is not flushed", SHARES)
def _(patch):
    barriers_less(patch, "manifests")


@mutant("the decision comes before the manifest", SHARES)
def _(patch):
    publish, commit = Session.publish, Session.commit

    def committed(self, manifest, **kwargs):
        done = commit(self, manifest, **kwargs)
        self._create(manifest_key(self.sid), manifest)
        self._backend.barrier("manifests")
        return done

    patch.setattr(Session, "publish", lambda self, manifest, parts=(): publish(self, None, parts))
    patch.setattr(Session, "commit", committed)


@mutant("the index comes before its packs are durable", SHARES, MERGE)
def _(patch):
    publish_index = Session._publish_index
    barrier = LocalBackend.barrier

    def published(self):
        publish_index(self)
        if isinstance(self._backend, LocalBackend):
            barrier(self._backend, "packs")

    patch.setattr(LocalBackend, "barrier", lambda self, *d: None if d == ("packs",) else barrier(self, *d))
    patch.setattr(Session, "_publish_index", published)


@mutant("saves build on packs that no index lists", SHARES, MERGE)
def _(patch):
    patch.setattr(Session, "_off_limits", lambda self: {*self._condemned, *self._lost})


@mutant("the session record goes before the decision", WAITS)
def _(patch):
    commit = Session.commit

    def committed(self, manifest, **kwargs):
        self._backend.delete(self.name.key)
        return commit(self, manifest, **kwargs)

    patch.setattr(Session, "commit", committed)


@mutant(
    "what is condemned is read before the session is seen",
    "a writer that opens its session once gc has drained",
)
def _(patch):
    start = Session._start

    def started(self, store, slot, optimize):
        state = store.gc_state()
        with pytest.MonkeyPatch.context() as within:
            within.setattr(store, "gc_state", lambda: state)
            start(self, store, slot, optimize)

    patch.setattr(Session, "_start", started)


@mutant("what was replaced is forgotten before the decision", TWICE)
def _(patch):
    commit = Session.commit

    def committed(self, manifest, **kwargs):
        if self.superseded is not None:
            self.store.refs.forget([self.superseded.slot])
        return commit(self, manifest, **kwargs)

    patch.setattr(Session, "commit", committed)


@mutant("packs are not looked at before the decision", "a save whose pack is lost at once")
def _(patch):
    patch.setattr(Session, "_check_packs", lambda self: None)


@mutant("payloads are not decoded before they are written", "a save while lz4 errs")
def _(patch):
    patch.setattr(lz4, "encode", lambda data: lz4.lz4.block.compress(data.tobytes(), store_size=False))


@mutant("a fork does not look its chunks up", "a fork beside a forget and a gc")
def _(patch):
    patch.setattr(run, "take_over", lambda session, manifest: None)


@mutant("what is condemned is used", SAVES)
def _(patch):
    start = Session._start

    def started(self, *args):
        start(self, *args)
        self._condemned = frozenset()

    patch.setattr(Session, "_start", started)


# -- steps


@mutant("tombstones are ignored", "a forget")
def _(patch):
    listing = Refs.listing
    patch.setattr(Refs, "listing", lambda self, run: replace(listing(self, run), gone=frozenset()))


@mutant("a tombstone is not flushed before it is told", "a forget")
def _(patch):
    forget = Refs.forget

    def forgotten(self, slots):
        with pytest.MonkeyPatch.context() as within:
            within.setattr(self._backend, "barrier", lambda *directories: None)
            forget(self, slots)

    patch.setattr(Refs, "forget", forgotten)


@mutant("a pin is not flushed before it is told", "a pin, and a forget that it survives")
def _(patch):
    turn = Refs._turn

    def turned(self, *args, **kwargs):
        with pytest.MonkeyPatch.context() as within:
            within.setattr(self._backend, "barrier", lambda *directories: None)
            return turn(self, *args, **kwargs)

    patch.setattr(Refs, "_turn", turned)


# -- gc


@mutant("gc does not settle what others forgot", "a forget", TWICE)
def _(patch):
    patch.setattr(Refs, "settle", lambda self: None)


@mutant("gc's records are not flushed", GC, CYCLES)
def _(patch):
    barriers_less(patch, "gc")


@mutant("gc does not wait", WAITS)
def _(patch):
    patch.setattr(gc._Gc, "_drain", lambda self, cycle: True)


@mutant("gc waits for one cycle's writers too few", WAITS)
def _(patch):
    drain = gc._Gc._drain
    patch.setattr(gc._Gc, "_drain", lambda self, cycle: drain(self, cycle - 1))


@mutant("gc does not look again before it sweeps", WAITS)
def _(patch):
    patch.setattr(Liveness, "needed_from", lambda self, condemned: frozenset())


@mutant("gc gives a writer up without taking its decision's name", GIVES_UP)
def _(patch):
    def fenced(self, name):
        self._result.fenced.append(f"run {name.slot.run} step {name.slot.step}")
        self._end(name)

    patch.setattr(gc._Gc, "_fence", fenced)


def swept(self, cycle, *, deletes_first):
    """G4 and G5 with the list that this gc has found itself."""
    condemned = self._store.gc_record(f"gc/condemn-{cycle}").packs
    if not self._backend.exists(f"gc/sweep-{cycle}"):
        seen = self._look()
        own = condemned - seen.needed_from(condemned)
        record = GcRecord("sweep", cycle, own, seen.n_refs, len(seen.packs))
        for name in own if deletes_first else ():
            self._delete(name.key)
        self._backend.create_once(record.key, record.to_bytes())
        self._backend.barrier("gc")
        for name in own:
            self._delete(name.key)


DIFFERENT = "two gcs that find different packs dead, and a writer between"


@mutant("gc deletes its own list and not the one that is there", DIFFERENT)
def _(patch):
    patch.setattr(gc._Gc, "_sweep", lambda self, cycle: swept(self, cycle, deletes_first=False))


@mutant("gc deletes before its record is there", DIFFERENT)
def _(patch):
    patch.setattr(gc._Gc, "_sweep", lambda self, cycle: swept(self, cycle, deletes_first=True))


@mutant("a cycle that is swept condemns nothing any more", SAVES)
def _(patch):
    state = Store.gc_state

    def released(self):
        n, condemned = state(self)
        records = set(self.backend.names("gc/"))
        done = [self.gc_record(f"gc/sweep-{i}").packs for i in range(n) if f"gc/sweep-{i}" in records]
        return n, condemned.difference(*done)

    patch.setattr(Store, "gc_state", released)


@mutant(
    "bases are not marked",
    "deltas whose base's step is forgotten, and a gc",
    "deltas beside an unfinished gc",
)
def _(patch):
    in_use = Liveness._in_use

    def wanted(self, *args):
        at = in_use(self, *args)
        return at[np.isin(self._chunk[at], self._wanted)] if len(at) else at

    patch.setattr(Liveness, "_in_use", wanted)


@mutant("manifests of writers at work are tidied away", GIVES_UP, WAITS)
def _(patch):
    tidy = gc._Gc._tidy

    def tidied(self):
        with pytest.MonkeyPatch.context() as within:
            within.setattr(self._store, "sessions", list)
            tidy(self)

    patch.setattr(gc._Gc, "_tidy", tidied)


# -- index files


@mutant("a merge of index files loses rows", MERGE)
def _(patch):
    merge = Segment.merge.__func__

    def merged(cls, segments, without=()):
        whole = merge(cls, segments, without)
        rows = whole.rows[: len(whole.rows) * 2 // 3]
        return cls(whole.packs, whole.sizes, keys_of(rows["id"]), rows)

    patch.setattr(Segment, "merge", classmethod(merged))


@mutant("index files go before their merge is durable", MERGE)
def _(patch):
    barriers_less(patch, "index")
