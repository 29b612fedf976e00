"""What a save and an opening cost does not grow with the store: operations, bytes, memory."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from faults import HookedOs, Wrapper
from steps import opened, same

import deltackpt.store
from deltackpt import every, gc, index, last
from deltackpt.backends.local import LocalBackend
from deltackpt.backends.memory import MemoryBackend
from deltackpt.format import ROW
from deltackpt.index import Index, Segment
from deltackpt.pack import PackName
from deltackpt.records import index_key
from deltackpt.run import open_run
from deltackpt.store import open_store

N_STEPS = 600


class Counting(Wrapper):
    """Counts what is asked of a backend, and the names that its listings give."""

    def __init__(self, inner):
        super().__init__(inner)
        self.n_calls = Counter()
        self.n_names = 0
        self.read_size = 0

    def _do(self, op, name, call, *, mutates=True):
        self.n_calls[op] += 1
        found = call()
        if op == "list":
            self.n_names += len(found)
        if op in ("read", "map"):
            self.read_size += len(found)
        return found


def tiny(step):
    """A state whose two tensors change, one chunk each."""
    return {"w": np.full(10, step, np.float32), "m": np.full(20, step, np.float64)}


def saved(n, **options):
    """A store with a run of many steps, and that run, open."""
    backend = Counting(MemoryBackend())
    run = open_run(backend, **options)
    for step in range(n):
        run.save(tiny(step), step=step)
    return backend, run


def cost_of_saves(backend, run, start):
    """What each of some saves asks for; each twentieth or so also merges index files, so the median."""
    costs = []
    for step in range(start, start + 9):
        backend.n_calls.clear()
        backend.n_names = backend.read_size = 0
        run.save(tiny(step), step=step)
        costs.append((sum(backend.n_calls.values()), backend.n_names, backend.read_size))
    return [sorted(column)[4] for column in zip(*costs, strict=True)]


@pytest.mark.parametrize("keep", [None, last(3), last(10_000), last(3) | every(2)], ids=str)
def test_a_save_asks_for_as_much_after_many_steps_as_after_few(keep):
    few = cost_of_saves(*saved(10, keep=keep), 10)
    many = cost_of_saves(*saved(N_STEPS, keep=keep), N_STEPS)
    n_calls, n_names, read_size = many
    assert n_calls <= few[0] + 2
    assert n_names <= 2 * index.N_FILES_MAX + 4
    assert read_size <= few[2] + 1000


def test_many_saves_leave_few_index_files_with_every_row():
    backend, _ = saved(N_STEPS)
    names = backend.names("index/")
    assert len(names) <= 2 * index.N_FILES_MAX
    rows = np.concatenate([segment.rows for segment in open_store(backend).refresh().segments])
    assert len(rows) == len(np.unique(rows["id"], axis=0)) == 2 * N_STEPS
    assert same(opened(backend.inner).load(7), tiny(7))


def test_a_store_opened_before_others_merged_finds_what_they_saved():
    backend = MemoryBackend()
    reader = opened(backend)
    for step in range(3):
        opened(backend).save(tiny(step), step=step)
    assert same(reader.load(1), tiny(1))
    writer = opened(backend)
    for step in range(3, 40):
        writer.save(tiny(step), step=step)
    assert len(backend.names("index/")) < 20
    assert same(reader.load(39), tiny(39))
    assert same(reader.load(0), tiny(0))
    assert reader.save(tiny(1), step=40).n_new_chunks == 0


def test_of_two_writers_that_merge_at_once_nothing_is_lost(monkeypatch):
    backend = MemoryBackend()
    a, b = open_run(backend, "a"), open_run(backend, "b")
    for step in range(index.N_FILES_MAX):
        (a, b)[step % 2].save(tiny(step), step=step)
    merge = Segment.merge

    def beside(segments, without=()):
        monkeypatch.setattr(Segment, "merge", merge)
        b.save(tiny(101), step=101)  # merges the same files
        return merge(segments, without)

    a.store.refresh()
    monkeypatch.setattr(Segment, "merge", beside)
    a.save(tiny(100), step=100)
    for run in ("a", "b"):
        for step in open_run(backend, run).steps():
            assert same(open_run(backend, run).load(step), tiny(step))


def test_a_writer_that_merges_a_file_whose_rows_were_not_in_memory_knows_them_still(monkeypatch):
    monkeypatch.setattr(deltackpt.store, "_STORED_SIZE_MIN", 1000)
    backend = MemoryBackend()
    open_run(backend).save({f"w{i}": np.full(10, i) for i in range(20)}, step=0)
    for step in range(1, index.N_FILES_MAX):
        open_run(backend).save(tiny(step), step=step)
    run = open_run(backend)
    run.save(tiny(100), step=100)
    assert len(backend.names("index/")) == 1
    assert run.save({"w": np.full(10, 7)}, step=101).n_new_chunks == 0
    assert run.save(tiny(3), step=102).n_new_chunks == 0


@pytest.mark.parametrize("who", ["writer", "gc"])
def test_files_that_others_merge_while_gc_looks_are_not_missed(who, monkeypatch):
    monkeypatch.setattr(deltackpt.store, "_STORED_SIZE_MIN", 0)
    backend = MemoryBackend()
    for step in range(index.N_FILES_MAX):
        open_run(backend).save(tiny(step), step=step)
    check = Index.check

    def beside(self):
        check(self)
        monkeypatch.setattr(Index, "check", check)
        if who == "gc":
            monkeypatch.setattr(gc, "N_FILES_MAX", 2)
            gc.collect(backend)
        else:
            open_run(backend).save(tiny(99), step=99)
        assert len(backend.names("index/")) == 1

    monkeypatch.setattr(Index, "check", beside)
    assert gc.collect(backend).n_dead == 0


# ---------------------------------------------------------------- a large index


def large(path, n_rows):
    """A store with one index file of many rows; the packs that it names are not there."""
    store = open_store(path, create=True)
    rng = np.random.default_rng(0)
    rows = np.zeros(n_rows, ROW)
    rows["id"][:, :8] = np.sort(rng.integers(0, 1 << 64, n_rows, np.uint64)).astype(">u8")[:, None].view("u1")
    rows["id"][:, 8:] = rng.integers(0, 256, (n_rows, 24), np.uint8)
    rows["raw_size"] = rows["stored_size"] = 1000
    packs = [PackName(bytes(16), 0, n) for n in range(-(-n_rows // 500))]
    rows["pack"] = np.arange(n_rows) % len(packs)
    segment = Segment(packs, np.full(len(packs), 1 << 27), index.keys_of(rows["id"]), rows)
    data = segment.to_bytes(store.uuid, bytes(16))
    store.backend.create_once(index_key(bytes(16)), data)
    return store, rows, len(data)


OPEN = """
import sys, numpy as np
from deltackpt.store import open_store
def size(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) << 10
before = size("VmRSS")
index = open_store(sys.argv[1]).refresh()
print(size("VmHWM") - before)
found, rows = index.find(np.load(sys.argv[2]))
print(found.all() and (rows["raw_size"] == 1000).all(), size("VmHWM") - before)
"""


def test_opening_a_large_index_takes_a_fraction_of_its_size_in_memory(tmp_path):
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    _, rows, size = large(tmp_path / "store", 500_000)
    np.save(tmp_path / "ids.npy", np.ascontiguousarray(rows["id"][:: len(rows) // 20]))
    command = [sys.executable, "-c", OPEN, str(tmp_path / "store"), str(tmp_path / "ids.npy")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(said[0]) < size / 7
    assert said[1] == "True"
    assert int(said[2]) < size / 6


def test_a_look_up_reads_as_much_of_a_large_index_as_of_a_small_one(tmp_path):
    sizes = []
    for n_rows in (50_000, 500_000):
        _, rows, _ = large(tmp_path / str(n_rows), n_rows)
        os = HookedOs()
        store = open_store(LocalBackend(tmp_path / str(n_rows), calls=os))
        index = store.refresh()
        os.n_calls.clear()
        assert index.find(np.ascontiguousarray(rows["id"][:: n_rows // 10]))[0].all()
        sizes.append(os.n_calls["preadv"])
    assert sizes == [10, 10]


def calls_of(action):
    """How many functions are called in this thread, of Python or not: the same each time, but for waits."""
    n_calls = 0

    def count(frame, event, argument):
        nonlocal n_calls
        n_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return n_calls


def calls_of_saves(n_tensors):
    """Calls of a first save, of one in which all moved, and of one in which nothing did."""
    run = opened(MemoryBackend())
    states = [{f"t{i}": np.full(9, i + step) for i in range(n_tensors)} for step in (1, 2, 2)]
    return [calls_of(lambda at=at: run.save(states[at], step=at)) for at in range(3)]


def test_calls_of_a_save_grow_with_the_number_of_tensors_not_with_its_square():
    few, many = calls_of_saves(250), calls_of_saves(1000)
    assert [n <= 4.4 * m for m, n in zip(few, many, strict=True)] == [True] * 3, (few, many)
