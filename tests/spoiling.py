"""Damage to a store in memory, file by file, and who finds it without a look at what it cannot touch.

`verify` checks each file, and each record of a pack, by one of its parts, which depends on no other bytes: to
spoil a file and to do that part alone says what all of `verify` would, in a hundredth of the time.  A restore
goes from decision to manifest to records; what it reads of a spoilt file is read here the same way.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np

from deltackpt import pack
from deltackpt.backends.memory import MemoryBackend
from deltackpt.chains import as_ids
from deltackpt.errors import DeltackptError
from deltackpt.format import RECORD_HEADER
from deltackpt.links import Wanted
from deltackpt.pack import PackName
from deltackpt.records import GC_RUN, GONE, Pin, Slot, tombstone
from deltackpt.refs import Listing
from deltackpt.store import DESCRIPTOR, Store
from deltackpt.verify import VerifyReport, _Verifier
from deltackpt.workers import workers


class AtOnce(Executor):
    """Handing a kilobyte to a thread takes longer than to do what is to be done with it."""

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as e:
            future.set_exception(e)
        return future


class Spoilt(MemoryBackend):
    """A store of which one file at a time is another."""

    def __init__(self, objects: dict[str, bytes]):
        super().__init__()
        self.objects = objects
        for name, data in objects.items():
            self.create_once(name, data)

    def spoil(self, name: str, data: bytes | None) -> None:
        self.delete(name)
        if data is not None:
            self.create_once(name, data)

    def mend(self, name: str) -> None:
        self.spoil(name, self.objects[name])


class Spoiler:
    """A small store, whole, and what is to be said of it with one file spoilt."""

    def __init__(self, objects: dict[str, bytes]):
        self.objects = objects
        self.backend = Spoilt(objects)
        self.store = Store(self.backend)
        self.n_exact = 0  # spoilt records that decode to what they did before
        self.runs = self.store.refs.runs()
        self.commits = {c.manifest_key: c for run in self.runs for c in self.store.refs.commits(run)}

    def is_told(self, name: str, data: bytes, at: int) -> bool:
        """Whether the part of verify that reads this place of a file tells that it is spoilt, or raises."""
        self.backend.spoil(name, data)
        try:
            return bool(
                self._part(_Verifier(Store(self.backend), VerifyReport("stored")), name, len(data), at)
            )
        except DeltackptError:
            return True
        finally:
            self.backend.mend(name)

    def _part(self, verifier: _Verifier, name: str, size: int, at: int) -> list[object]:
        kind = name.partition("/")[0]
        if kind == "packs":
            row = self._row_at.get((name, at))
            if row is not None and size == len(self.objects[name]):
                return verifier._record(name, row, {}) or []
            pack_name = PackName.from_key(name)
            verifier._packs = {pack_name: size}
            return list(verifier._pack(pack_name))
        if kind == "index":
            verifier._index_files()
        elif kind == "gc":
            verifier._small_records()
        elif kind == "refs":
            self._part_of_refs(verifier, name)
        elif kind == "manifests":
            verifier._decision(self.commits[name].slot, False, self._steps)
        return verifier._report.damage

    def _part_of_refs(self, verifier: _Verifier, name: str) -> None:
        slot, pin = Slot.from_key(name.removesuffix(GONE)), Pin.from_key(name)
        if pin is not None:
            verifier._record_is("pin", pin.key, pin.to_bytes())
        elif name.endswith(GONE):
            verifier._record_is("tombstone", *tombstone(slot))
        else:
            verifier._decision(slot, slot in self._gone, self._steps)

    @cached_property
    def _listings(self) -> list[Listing]:
        return [self.store.refs.listing(run) for run in [*self.runs, GC_RUN]]

    @cached_property
    def _gone(self) -> set[Slot]:
        return {slot for listing in self._listings for slot in listing.gone}

    @cached_property
    def _steps(self) -> set[int]:
        return {slot.step for listing in self._listings for slot in listing.slots}

    def restores_wrongly(self, name: str, data: bytes, at: int) -> bool:
        """Whether a restore that reads this place of a spoilt file goes on as if nothing were."""
        self.backend.spoil(name, data)
        try:
            return self._restores_wrongly(name, at)
        except DeltackptError:
            return False
        finally:
            self.backend.mend(name)

    def _restores_wrongly(self, name: str, at: int) -> bool:
        kind = name.partition("/")[0]
        if kind == "packs":
            needing = self._needing.get((name, at), ())
            return any(self._reads_wrongly(chunk_id, name, at) for chunk_id in needing)
        if kind == "refs":
            slot = Slot.from_key(name)  # None: only that it is there counts
            return slot is not None and bool(Store(self.backend).refs.decision(slot))
        if kind == "manifests":
            return bool(Store(self.backend).read_manifest(self.commits[name]))
        if kind == "index":
            store = Store(self.backend)
            store.refresh()
            return store._loaded[name] is not None  # else it is as good as lost
        if name == DESCRIPTOR:
            return bool(Store(self.backend))
        return False  # no restore looks at gc's records

    @cached_property
    def _chunks(self) -> dict[bytes, tuple[np.void, bytes]]:
        """The row and the bytes of every chunk that can be decoded."""
        found = {}
        for segment in self.store.refresh(complete=True).segments:
            for chunk_id in {row["id"].tobytes() for row in segment.rows}:
                try:
                    [row] = self.store.find(as_ids([chunk_id]))
                    found[chunk_id] = row, self._read(chunk_id, row).tobytes()
                except DeltackptError:  # a delta that no step needs may have lost its base
                    continue
        return found

    def _read(self, chunk_id: bytes, row: np.void) -> np.ndarray:
        out = np.zeros(int(row["raw_size"]), np.uint8)
        self.store.read_copies([Wanted(chunk_id, row, out)], self.store.bases(np.array([row])))
        return out

    def _reads_wrongly(self, chunk_id: bytes, name: str, at: int) -> bool:
        """Whether a chunk is given, and is not what it was.

        It may be what it was: a payload has bits that make no difference, as whether zeros were rotated, and
        a delta may be of a part of its base that is as it was.  A restore compares with the id.
        """
        row, data = self._chunks[chunk_id]
        try:
            found = self._read(chunk_id, row)
        except DeltackptError:
            return False
        self.n_exact += self._row_at[name, at]["id"].tobytes() == chunk_id
        return found.tobytes() != data

    def _chain(self, chunk_id: bytes) -> Iterator[np.void]:
        row = self._chunks[chunk_id][0]
        yield row
        if row["depth"]:
            yield from self._chain(row["base"].tobytes())

    def _places(self, row: np.void) -> Iterator[tuple[str, int]]:
        """Every byte of a record."""
        name, start = self.store.pack_name(int(row["pack"])).key, int(row["offset"])
        return ((name, start + at) for at in range(RECORD_HEADER.size + int(row["stored_size"])))

    @cached_property
    def _row_at(self) -> dict[tuple[str, int], np.void]:
        """For every byte of a record its row in the footer."""
        found = {}
        for entry in self.backend.list("packs/"):

            def read_at(offset, size, name=entry.name):
                return self.backend.read(name, offset, size)

            for row in pack.read_footer(read_at, entry.size, entry.name):
                start = int(row["offset"])
                for at in range(start, start + RECORD_HEADER.size + int(row["stored_size"])):
                    found[entry.name, at] = row
        return found

    @cached_property
    def _needing(self) -> dict[tuple[str, int], list[bytes]]:
        """For every byte of every record the chunks that are decoded from it."""
        found: dict[tuple[str, int], list[bytes]] = {}
        for chunk_id in self._chunks:
            for row in self._chain(chunk_id):
                for place in self._places(row):
                    found.setdefault(place, []).append(chunk_id)
        return found

    # -- all of it

    def names(self) -> list[str]:
        """The files whose bytes count: of sessions only the name does, and what is set aside is damaged."""
        of_names = ("sessions", "tmp", "quarantine", "manifests")
        names = [n for n in self.objects if n in self.commits or n.partition("/")[0] not in of_names]
        return [name for name in names if not self.store.quarantine().holds(name)]

    def flips(self, name: str, start: int, stop: int) -> tuple[int, list[str]]:
        """Flip every bit of some bytes of a file; return how many there were, and what was missed."""
        missed = []
        for at in range(start, stop):
            for bit in range(8):
                data = bytearray(self.objects[name])
                data[at] ^= 1 << bit
                missed += self._missed(name, bytes(data), f"bit {bit} of byte {at}", at)
        return 8 * (stop - start), missed

    def cuts(self, name: str, start: int, stop: int) -> tuple[int, list[str]]:
        """Cut a file to every length of some; return how many there were, and what was missed."""
        missed = []
        for size in range(start, stop):
            # What is read of a pack are records, and the first that is cut is one of them.
            missed += self._missed(name, self.objects[name][:size], f"cut to {size}", size)
        return stop - start, missed

    def _missed(self, name: str, data: bytes, what: str, at: int) -> list[str]:
        missed = [] if self.is_told(name, data, at) else [f"{name}, {what}: verify"]
        if self.restores_wrongly(name, data, at):
            missed.append(f"{name}, {what}: restore")
        return missed


#: Bytes, or lengths, that a process does at a time.
_N_AT_A_TIME = 200
_spoiler: Spoiler


def _begin(objects: dict[str, bytes]) -> None:
    global _spoiler
    logging.disable()  # of what is spoilt there is much to be told
    workers._pool = AtOnce()
    _spoiler = Spoiler(objects)


def _do(what: str, name: str, start: int, stop: int) -> tuple[int, int, list[str]]:
    before = _spoiler.n_exact
    n, missed = getattr(_spoiler, what)(name, start, stop)
    return n, _spoiler.n_exact - before, missed


class Count(NamedTuple):
    """How many flips or cuts there were, how many changed no bit of a chunk, and what was missed."""

    n: int
    n_exact: int
    missed: list[str]


def everywhere(objects: dict[str, bytes], what: str, share: float = 1.0, seed: int = 0) -> Count:
    """Do `flips` or `cuts` to all of a store, or to a share of its bytes, on all cores."""
    rng = random.Random(seed)
    step = _N_AT_A_TIME if share == 1 else 1
    spans = [
        (name, start, min(start + step, len(objects[name])))
        for name in Spoiler(objects).names()
        for start in range(0, len(objects[name]), step)
        if rng.random() < share
    ]
    n, n_exact, missed = 0, 0, []
    pool = ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"), _begin, (objects,)
    )
    with pool:
        done = pool.map(_do, [what] * len(spans), *zip(*spans, strict=True), chunksize=_N_AT_A_TIME // step)
        for n_some, n_some_exact, some in done:
            n += n_some
            n_exact += n_some_exact
            missed += some
    return Count(n, n_exact, missed)
