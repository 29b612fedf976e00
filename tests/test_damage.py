"""A bit flipped in every byte, every cut, every loss and every exchange of a small store's files."""

import itertools
import random
from concurrent.futures import Executor, Future
from unittest import mock

import numpy as np
import pytest
from deltas import put
from faults import contents, memory_of
from steps import collect, floats, noise, opened, same, visible

from deltackpt import store
from deltackpt.backends.memory import MemoryBackend
from deltackpt.chunking import Chunker
from deltackpt.codecs import NAMES
from deltackpt.errors import DeltackptError
from deltackpt.format import VERSION, seal
from deltackpt.session import Session
from deltackpt.store import DEPTH_MAX, DESCRIPTOR, open_store
from deltackpt.verify import verify
from deltackpt.workers import workers

#: Flips are found in every byte; so are the cuts of files up to this size, of others a sample.
CUT_ALL_SIZE = 400
N_CUTS = 50
rng = random.Random(20)


class AtOnce(Executor):
    """Handing a kilobyte to a thread takes longer than to do what is to be done with it."""

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as e:
            future.set_exception(e)
        return future


@pytest.fixture(autouse=True)
def no_threads(monkeypatch):
    monkeypatch.setattr(workers, "_pool", AtOnce())


def moved(i):
    """Weights of which one moved; None: none did."""
    weights = floats(1, 70)
    if i is not None:
        weights.view("i4")[i] += 1
    return weights


def level(step):
    """Numbers that all move in step 3; the seed is one whose numbers are not cut, before and after."""
    numbers = floats(5, 77)
    numbers.view("i4")[:] += 5 * (step > 2)
    return numbers


def state(step):
    """Of step 3 `near` are deltas of depth 2: of step 2's, of which nothing else is left."""
    return {
        "weights": moved(None),
        "near": [moved(9 if step == 2 else i) for i in range(3)] if step > 1 else [],
        "level": level(step),
        "raw": noise(1, 70),
        "planes": np.arange(60, dtype=np.int64) * step,
        "lz4": np.frombuffer(b"once more " * 30, np.uint8),
        "list": np.arange(300, dtype=np.uint16) * 977,
        "step": step,
    }


@pytest.fixture(scope="module")
def small():
    """Objects of a store that holds every kind of record: every codec, lists, a forgotten step, a gc."""
    backend = MemoryBackend()
    body = {
        "format": "deltackpt",
        "version": VERSION,
        "uuid": "00000000-0000-4000-8000-000000000000",
        "chunker": Chunker(40, 300, 900).to_json(),
        "depth_max": DEPTH_MAX,
        "features": [],
    }
    backend.create_once(DESCRIPTOR, seal(body))
    run = opened(backend)
    with mock.patch.object(Session, "put", put):
        for step in (1, 2, 3):
            run.save(state(step), step=step)
    run.forget([2])
    assert collect(backend).n_deleted
    run.pin(1)
    run.pin(3)
    run.unpin(3)
    objects = contents(backend)
    rows = np.concatenate([s.rows for s in open_store(backend).refresh().segments])
    assert set(rows["codec"].tolist()) == NAMES.keys()
    assert set(rows["depth"].tolist()) == {0, 1, 2}
    assert max(row.level for row in run.manifest().tensors) > 0
    assert verify(backend, level="decode").clean
    return objects


def is_found(objects):
    """Whether verify reports damage, or raises; anything but a `DeltackptError` goes through."""
    try:
        return not verify(memory_of(objects), level="decode").clean
    except DeltackptError:
        return True


def check_never_wrong(objects):
    """Every step is loaded exactly, or with an error that says so."""
    try:
        run = opened(memory_of(objects))
    except DeltackptError:
        return
    for step in (1, 2, 3):
        try:
            found = run.load(step)
        except DeltackptError:
            continue
        assert same(found, state(step))


def check_next_save(objects):
    """What is saved beside the damage, shares chunks with it, and is loaded, is right or an error."""
    backend = memory_of(objects)
    new = state(3) | {"new": noise(9, 50), "nearer": moved(60)}
    try:
        with mock.patch.object(Session, "put", put):
            opened(backend).save(new, step=9)
        found = opened(backend).load(9)
    except DeltackptError:
        return
    assert same(found, new)


def kind(name):
    return "refs/gone" if name.endswith(".gone") else name.partition("/")[0]


def names_of(objects):
    """The files that are checked: of sessions only the name counts."""
    return [name for name in objects if kind(name) not in ("sessions", "tmp")]


def test_every_flipped_bit_is_found(small):
    missed = []
    n = 0
    for name in names_of(small):
        for at in range(len(small[name])):
            data = bytearray(small[name])
            data[at] ^= 1 << rng.randrange(8)
            damaged = small | {name: bytes(data)}
            check_never_wrong(damaged)
            if not is_found(damaged):
                missed.append(f"{name} @ {at}")
            if n % 50 == 0:
                check_next_save(damaged)
            n += 1
    assert not missed, f"{len(missed)} of {n}"


def test_a_stored_index_with_any_bit_flipped_is_left_for_the_packs_themselves(small, monkeypatch):
    monkeypatch.setattr(store, "_STORED_SIZE_MIN", 0)  # as if it were large: rows are read when looked up
    flips = [(name, at) for name in small if kind(name) == "index" for at in range(len(small[name]))]
    for n, (name, at) in enumerate(flips):
        data = bytearray(small[name])
        data[at] ^= 1 << rng.randrange(8)
        damaged = small | {name: bytes(data)}
        if n % 7 == 0:
            assert_steps_are_there(damaged)
        if n % 25 == 0:
            check_next_save(damaged)
            assert collect(memory_of(damaged)) is not None
    assert len(flips) > 1000


def test_every_cut_is_found(small):
    missed = []
    for name in names_of(small):
        size = len(small[name])
        sizes = range(size) if size <= CUT_ALL_SIZE else rng.sample(range(size), N_CUTS)
        for cut in sizes:
            damaged = small | {name: small[name][:cut]}
            check_never_wrong(damaged)
            if not is_found(damaged):
                missed.append(f"{name} cut to {cut}")
    assert not missed


def test_bytes_behind_the_end_are_found(small):
    missed = []
    for name, tail in itertools.product(names_of(small), [b"\0", b"\n", bytes(300)]):
        damaged = small | {name: small[name] + tail}
        check_never_wrong(damaged)
        if not is_found(damaged):
            missed.append(name)
    assert not missed


def test_every_lost_file_is_found_or_not_needed(small):
    for name in names_of(small):
        damaged = {n: data for n, data in small.items() if n != name}
        check_never_wrong(damaged)
        check_next_save(damaged)
        if kind(name) in ("packs", "manifests", "refs/gone"):
            assert is_found(damaged), name
        if kind(name) in ("index", "gc"):  # derived, or the end of a cycle that is then ended again
            assert_steps_are_there(damaged)


def assert_steps_are_there(objects):
    found = visible(memory_of(objects))
    assert all(same(found[step], state(step)) for step in (1, 3))


def test_every_exchange_of_two_files_is_found(small):
    missed = []
    for a, b in itertools.combinations(names_of(small), 2):
        if kind(a) == kind(b) and small[a] != small[b]:
            damaged = small | {a: small[b], b: small[a]}
            check_never_wrong(damaged)
            if not is_found(damaged):
                missed.append((a, b))
    assert not missed


def test_a_file_of_another_store_in_the_place_of_ours_is_found(small):
    other = MemoryBackend()
    for step in (1, 2, 3):
        opened(other).save(state(step), step=step)
    theirs = contents(other)
    for ours in names_of(small):
        for name in theirs:
            if kind(name) == kind(ours) and name != DESCRIPTOR and f"{ours}.gone" not in small:
                damaged = small | {ours: theirs[name]}
                check_never_wrong(damaged)
                assert is_found(damaged), (ours, name)


def test_of_a_lost_pack_every_chunk_names_the_tensors_that_need_it():
    backend = MemoryBackend()
    opened(backend).save({"a": noise(1, 1000), "b": noise(2, 1000)}, step=1)
    opened(backend).save({"a": noise(1, 1000), "c": noise(3, 1000)}, step=2)
    backend.delete(min(backend.list("packs/"), key=lambda entry: -entry.size).name)
    found = {tuple(damage.hits) for damage in verify(backend).damage}
    assert found == {("main 1: a", "main 2: a"), ("main 1: b",)}
