"""Every bit flipped, every cut, every loss and every exchange of files of small stores.

Who reads each bit is in spoiling.py.  All of verify, a load and the next save are done for a sample of flips
and cuts (`DELTACKPT_SEED` chooses it), and with `DELTACKPT_LONG=1` for every one: an hour on two cores.
"""

import itertools
import os
import random
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from deltas import put
from faults import contents, memory_of
from spoiling import AtOnce, everywhere
from steps import collect, floats, noise, opened, same, visible

from deltackpt import store
from deltackpt.backends.memory import MemoryBackend
from deltackpt.chunking import Chunker
from deltackpt.codecs import NAMES
from deltackpt.errors import DeltackptError
from deltackpt.format import VERSION, seal
from deltackpt.records import Slot
from deltackpt.session import Session
from deltackpt.store import DEPTH_MAX, DESCRIPTOR, open_store
from deltackpt.verify import verify
from deltackpt.workers import workers

IS_LONG = bool(os.environ.get("DELTACKPT_LONG"))
SEED = int(os.environ.get("DELTACKPT_SEED", "20"))
#: Flips, and cuts, after which all of verify and of a load is done; after one in so many a save too.
N_WHOLE, N_EACH_SAVED = 800, 10
GOLDEN = Path(__file__).parent / "golden"
#: The share of a golden store's bytes that is flipped and cut: of the first one all; all of all, an hour.
SHARES = {path.name: 1.0 if IS_LONG else 0.1 for path in GOLDEN.iterdir() if path.is_dir()}
SHARES |= {} if IS_LONG else {"v1": 1.0, "v1-delta": 0.005, "v1-midway": 0.02}
rng = random.Random(SEED)


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


def golden(name):
    """Objects of a golden store."""
    root = GOLDEN / name / "store"
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("what", ["flips", "cuts"])
def test_every_bit_and_every_cut_is_found(small, what):
    n, n_exact, missed = everywhere(small, what)
    print(f"{n} {what}; {n_exact} of them change no bit of a chunk")
    assert n == sum(len(small[name]) for name in names_of(small)) * (8 if what == "flips" else 1)
    assert n_exact < n / 1000
    assert not missed, f"{len(missed)} of {n}: {missed[:9]}"


@pytest.mark.parametrize("what", ["flips", "cuts"])
@pytest.mark.parametrize("name", SHARES)
def test_every_bit_and_every_cut_of_a_golden_store_is_found(name, what):
    objects = golden(name)
    n, n_exact, missed = everywhere(objects, what, SHARES[name], SEED)
    print(f"{n} {what} of {SHARES[name]:.1%} of {name}, seed {SEED}; {n_exact} change no bit of a chunk")
    per_byte = 8 if what == "flips" else 1
    assert n >= SHARES[name] * 0.6 * per_byte * sum(map(len, objects.values()))
    assert n_exact < n / 1000
    assert not missed, f"{len(missed)} of {n}, seed {SEED}: {missed[:9]}"


def flips(objects):
    """Every bit flipped, or a sample of them."""
    names = names_of(objects)
    every = [(name, at, bit) for name in names for at in range(len(objects[name])) for bit in range(8)]
    for name, at, bit in every if IS_LONG else rng.sample(every, N_WHOLE):
        data = bytearray(objects[name])
        data[at] ^= 1 << bit
        yield f"{name}, bit {bit} of byte {at}", objects | {name: bytes(data)}


def cuts(objects):
    """Every file cut to every length, or a sample of them."""
    every = [(name, size) for name in names_of(objects) for size in range(len(objects[name]))]
    for name, size in every if IS_LONG else rng.sample(every, N_WHOLE):
        yield f"{name} cut to {size}", objects | {name: objects[name][:size]}


@pytest.mark.parametrize("spoilt", [flips, cuts])
def test_what_is_found_file_by_file_the_whole_of_verify_finds_and_no_load_is_wrong(small, spoilt):
    missed = []
    for n, (what, damaged) in enumerate(spoilt(small)):
        check_never_wrong(damaged)
        if not is_found(damaged):
            missed.append(what)
        if n % N_EACH_SAVED == 0:
            check_next_save(damaged)
    assert not missed, f"{len(missed)} of {n + 1}, seed {SEED}"


def test_a_stored_index_with_any_bit_flipped_is_left_for_the_packs_themselves(small, monkeypatch):
    monkeypatch.setattr(store, "_STORED_SIZE_MIN", 0)  # as if it were large: rows are read when looked up
    places = [(name, at) for name in small if kind(name) == "index" for at in range(len(small[name]))]
    for name, at in places if IS_LONG else rng.sample(places, 250):
        data = bytearray(small[name])
        data[at] ^= 1 << rng.randrange(8)
        damaged = small | {name: bytes(data)}
        assert_steps_are_there(damaged)
        if at % 10 == 0:
            check_next_save(damaged)
            assert collect(memory_of(damaged)) is not None


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
        if kind(name) in ("packs", "manifests", "refs/gone") or Slot.from_key(name):
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


def test_behind_a_bad_footer_a_bad_record_is_found_too():
    backend = MemoryBackend()
    opened(backend).save({"a": noise(1, 1000), "b": noise(2, 1000)}, step=1)
    [key] = backend.names("packs/")
    data = bytearray(backend.read(key))
    data[300] ^= 1
    data[-40] ^= 1
    spoilt = memory_of(contents(backend) | {key: bytes(data)})
    for level in ("stored", "decode"):
        frame, record = verify(spoilt, level=level).damage
        assert (frame.hits, record.hits) == ([], ["main 1: a"])
