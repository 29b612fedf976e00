"""Deltas: relied on with all their bases, read from the root up, kept as long as a step needs them."""

import itertools
import logging
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from blake3 import blake3
from deltas import nearly, rows_of, taken
from faults import contents, memory_of
from steps import collect, floats, noise, opened, same, visible

from deltackpt import gc, rebase, restore, stats
from deltackpt.backends.memory import MemoryBackend
from deltackpt.chains import Chains, Copy, as_ids
from deltackpt.codecs import DELTAS, Kind
from deltackpt.errors import CorruptError
from deltackpt.format import NO_BASE, PACK_HEADER, PACK_TRAILER, RECORD_HEADER, ROW, seal, unseal
from deltackpt.index import Index, Segment
from deltackpt.liveness import Liveness
from deltackpt.manifest import TensorRow
from deltackpt.pack import PackName
from deltackpt.rebase import Link, Rebase
from deltackpt.records import Figures, GcRecord
from deltackpt.repair import repair
from deltackpt.session import Parent, Session
from deltackpt.store import DEPTH_MAX, DESCRIPTOR, open_store
from deltackpt.verify import verify

F4 = Kind(4, True)
OVERHEAD = RECORD_HEADER.size + ROW.itemsize


def id_of(array):
    return blake3(np.ascontiguousarray(array).view(np.uint8)).digest()


def series(n, size=2000):
    """Arrays, each a step of training after the one before."""
    arrays = [floats(0, size)]
    for seed in range(1, n):
        arrays.append(nearly(arrays[-1], seed))
    return arrays


def put_one(session, array, base=None, **parent):
    """Put an array as one chunk, against another one."""
    if base is not None:
        [copy] = session.look_up(as_ids([id_of(base)]))
        if copy is not None:
            parent = {"depth": copy.depth, "raw_size": copy.raw_size, "packs": copy.packs} | parent
        base = Parent(id_of(base), **{"data": None} | parent)
    session.put(id_of(array), array.view(np.uint8), F4, base)


def written(store, arrays, run="main"):
    """Put arrays into a pack each, every one against the one before."""
    for step, (base, array) in enumerate(itertools.pairwise([None, *arrays])):
        with Session(store, run, step) as session:
            put_one(session, array, base)
            session.publish(None)
    return store


def looked_up(store, *arrays):
    with Session(store, "other", 1) as session:
        return session.look_up(as_ids(map(id_of, arrays)))


def read(store, array):
    [row] = store.find(as_ids([id_of(array)]))
    out = np.empty(array.nbytes, np.uint8)
    store.read_into(id_of(array), row, out)
    return out


def in_store(array, store):
    return (read(store, array) == array.view(np.uint8)).all()


def a_store(**changes):
    backend = MemoryBackend()
    body = unseal(open_store(MemoryBackend(), create=True).backend.read(DESCRIPTOR), "here")
    backend.create_once(DESCRIPTOR, seal(body | changes))
    return open_store(backend)


def pack_of(store, array):
    [row] = store.find(as_ids([id_of(array)]))
    return store.pack_name(int(row["pack"]))


def damaged(store, array):
    """The store with a byte of an array's payload changed."""
    [row] = store.find(as_ids([id_of(array)]))
    objects = contents(store.backend)
    key = pack_of(store, array).key
    data = bytearray(objects[key])
    data[int(row["offset"]) + RECORD_HEADER.size + int(row["stored_size"]) - 1] ^= 1
    return open_store(memory_of(objects | {key: bytes(data)}))


def without(store, *arrays):
    """The store without the packs of some arrays; the index still has them."""
    gone = {pack_of(store, array).key for array in arrays}
    return open_store(memory_of({k: v for k, v in contents(store.backend).items() if k not in gone}))


# -- a session


def test_a_copy_is_as_deep_as_its_chain_and_needs_all_of_its_packs():
    arrays = series(4)
    store = written(a_store(), arrays)
    copies = looked_up(store, *arrays, floats(9, 3))
    assert copies.pop() is None
    rows = store.find(as_ids(map(id_of, arrays)))
    assert [copy.depth for copy in copies] == rows["depth"].tolist() == [0, 1, 2, 3]
    assert [len(copy.packs) for copy in copies] == [1, 2, 3, 4]
    assert [copy.stored_size for copy in copies] == rows["stored_size"].tolist()
    assert [copy.chain_size for copy in copies] == np.cumsum(rows["stored_size"]).tolist()
    assert {copy.raw_size for copy in copies} == {arrays[0].nbytes}
    assert all(in_store(array, store) for array in arrays)


def test_a_look_up_asks_the_index_once_a_depth_and_once_if_there_are_no_deltas(monkeypatch):
    arrays = series(4)
    chain, plain = written(a_store(), arrays), written(a_store(), arrays[:1])
    asked = []
    find = Index.find
    monkeypatch.setattr(Index, "find", lambda self, ids, *a: asked.append(len(ids)) or find(self, ids, *a))
    looked_up(plain, *arrays)
    assert asked == [4]
    asked.clear()
    looked_up(chain, *arrays)
    assert asked == [4, 3]  # 4 chunks, and of three deltas the bases: each met once
    asked.clear()
    looked_up(chain, arrays[3])
    assert asked == [1, 1, 1, 1]


def test_no_save_relies_on_a_delta_whose_base_is_condemned():
    arrays = series(3)
    store = written(a_store(), arrays)
    base = pack_of(store, arrays[0])
    store._gc_records["gc/condemn-0"] = gc.GcRecord("condemn", 0, frozenset([base]), 0, 3)
    store.backend.create_once("gc/condemn-0", store._gc_records["gc/condemn-0"].to_bytes())
    assert looked_up(store, *arrays) == [None, None, None]


@pytest.mark.parametrize("link", [0, 1])
def test_no_save_relies_on_a_delta_whose_base_is_quarantined_or_gone(link):
    arrays = series(3)
    store = written(a_store(), arrays)
    gone = without(store, arrays[link])
    store.backend.create_once(f"quarantine/{id_of(arrays[link]).hex()}", b"")
    for left in (store, gone):
        copies = looked_up(left, *arrays)
        assert [copy is not None for copy in copies] == [i < link for i in range(3)]


def test_a_deeper_copy_serves_where_the_base_of_the_other_is_gone():
    arrays = series(4)
    store = written(a_store(), arrays)
    store = without(store, arrays[0])
    other = series(3, size=arrays[0].size)[1:]
    with Session(store, "main", 9) as session:
        put_one(session, other[0].copy())
        session.publish(None)
    with Session(store, "main", 10) as session:  # arrays[3] again, whole
        put_one(session, arrays[3])
        session.publish(None)
    [copy] = looked_up(store, arrays[3])
    assert copy.depth == 0
    assert in_store(arrays[3], store)


def test_a_chunk_without_gain_is_stored_whole_and_has_no_depth():
    store = written(a_store(), [floats(1, 2000), floats(2, 2000)])
    rows = rows_of(store)
    assert rows["depth"].tolist() == [0, 0]
    assert not rows["base"].any()


def test_chunks_of_one_session_build_on_each_other_as_deep_as_they_are_then():
    arrays = series(3)
    whole = floats(77, 2000)
    store = a_store()
    with Session(store, "main", 1) as session:
        put_one(session, arrays[0])
        put_one(session, whole, arrays[0], depth=5, data=arrays[0].view("u1"), raw_size=arrays[0].nbytes)
        # The planner cannot know that this base turned out to be stored whole.
        put_one(session, nearly(whole, 1), whole, depth=7, data=whole.view("u1"), raw_size=whole.nbytes)
        put_one(session, arrays[1], arrays[0], depth=-1, data=arrays[0].view("u1"), raw_size=whole.nbytes)
        put_one(session, arrays[2], arrays[1], depth=-1, data=arrays[1].view("u1"), raw_size=whole.nbytes)
        session.publish(None)
        rows = session.rows()
    assert rows["depth"].tolist() == [0, 0, 1, 1, 2]
    assert [row["id"].tobytes() for row in rows][2] == id_of(nearly(whole, 1))
    for array in (*arrays, whole, nearly(whole, 1)):
        assert in_store(array, store)


def test_no_chain_grows_deeper_than_the_store_allows():
    arrays = series(6)
    store = written(a_store(depth_max=2), arrays)
    assert [copy.depth for copy in looked_up(store, *arrays)] == [0, 1, 2, 0, 1, 2]
    store = a_store(depth_max=2)
    with Session(store, "main", 1) as session:
        put_one(session, arrays[0])
        for base, array in itertools.pairwise(arrays):
            put_one(session, array, base, depth=0, data=base.view("u1"), raw_size=base.nbytes)
        session.publish(None)
    assert [copy.depth for copy in looked_up(store, *arrays)] == [0, 1, 2, 0, 1, 2]
    assert rows_of(written(a_store(depth_max=0), arrays))["depth"].max() == 0


@pytest.mark.parametrize("depth_max", [-1, 256, "8", None, True])
def test_a_store_whose_bound_is_none_is_refused(depth_max):
    with pytest.raises(CorruptError, match="depth_max is"):
        a_store(depth_max=depth_max)


def test_a_base_that_is_damaged_or_gone_keeps_no_chunk_from_being_saved(caplog):
    arrays = series(3)
    store = written(a_store(), arrays[:2])
    for left in (damaged(store, arrays[0]), damaged(store, arrays[1])):
        with Session(left, "main", 9) as session:
            put_one(session, arrays[2], arrays[1])
            session.publish(None)
            assert session.rows()["depth"].tolist() == [0]
        assert "stored whole" in caplog.text
        caplog.clear()
        assert in_store(arrays[2], left)


def test_a_base_of_many_chunks_is_read_once(monkeypatch):
    store = written(a_store(), series(1))
    base = series(1)[0]
    n_read = Counter()
    read_into = type(store).read_into
    monkeypatch.setattr(
        type(store), "read_into", lambda self, i, *a: n_read.update([i]) or read_into(self, i, *a)
    )
    with Session(store, "main", 1) as session:
        for seed in range(10):
            put_one(session, nearly(base, seed), base)
        session.publish(None)
        assert set(session.rows()["depth"].tolist()) == {1}
    assert n_read == {id_of(base): 1}


def test_a_parent_without_packs_is_looked_up_and_passed_over_if_it_cannot_be_relied_on():
    arrays = series(3)
    store = written(a_store(), arrays[:2])
    needed = {pack_of(store, array) for array in arrays[:2]}
    for left, depth in ((store, 2), (without(store, arrays[0]), 0)):
        with Session(left, "main", 9) as session:
            parent = Parent(id_of(arrays[1]), 7, arrays[1].view("u1"), arrays[1].nbytes)
            session.put(id_of(arrays[2]), arrays[2].view("u1"), F4, parent)
            session.publish(None)
            assert session.rows()["depth"].tolist() == [depth]
            assert (session.packs() >= needed) == (depth > 0)


def test_the_packs_of_a_session_are_those_that_its_deltas_need_too():
    arrays = series(3)
    store = written(a_store(), arrays[:2])
    needed = {pack_of(store, array) for array in arrays[:2]}
    with Session(store, "main", 9) as session:
        put_one(session, arrays[2], arrays[1])
        session.publish(None)
        assert session.packs() > needed


# -- reading


def calls_of(monkeypatch, backend):
    """What is read of packs, as lists of sizes."""
    calls = []
    read_into = type(backend).read_into

    def noted(self, name, offset, buffers):
        calls.append([memoryview(b).nbytes for b in buffers])
        read_into(self, name, offset, buffers)

    monkeypatch.setattr(type(backend), "read_into", noted)
    return calls


def test_a_chain_costs_one_read_a_link(monkeypatch):
    arrays = series(5)
    store = written(a_store(), arrays)
    calls = calls_of(monkeypatch, store.backend)
    assert in_store(arrays[4], store)
    assert len(calls) == 5
    assert all(record > RECORD_HEADER.size for (record,) in calls)


@pytest.mark.parametrize("link", range(4))
def test_the_link_that_is_damaged_is_named(link):
    arrays = series(4)
    store = damaged(written(a_store(), arrays), arrays[link])
    for i, array in enumerate(arrays):
        if i < link:
            assert in_store(array, store)
            continue
        with pytest.raises(CorruptError) as e:
            read(store, array)
        names = [id_of(a).hex()[:16] in e.value.message for a in arrays]
        assert names == [link <= n <= i for n in range(4)]
        assert pack_of(store, arrays[link]).key in e.value.message


def test_a_base_that_is_missing_is_named():
    arrays = series(3)
    store = without(written(a_store(), arrays), arrays[0])
    message = f"its base: .*{pack_of(store, arrays[0]).key}.*pack is missing"
    with pytest.raises(CorruptError, match=message):
        read(store, arrays[2])
    for name in list(contents(store.backend)):
        if name.startswith("index/"):
            store.backend.delete(name)
    store = open_store(store.backend)
    with pytest.raises(CorruptError, match=rf"its base: .*chunk {id_of(arrays[0]).hex()[:16]} is in no pack"):
        read(store, arrays[2])


@pytest.mark.parametrize("link", range(3))
def test_another_copy_of_any_link_serves(link):
    arrays = series(3)
    store = damaged(written(a_store(), arrays), arrays[link])
    with Session(store, "main", 9) as session:  # as a writer would that started beside the first
        put_one(session, arrays[link])
        session.publish(None)
    assert all(in_store(array, store) for array in arrays)


def tensor_row(array):
    """A tensor that is one chunk."""
    return TensorRow("w", "float32", array.shape, "numpy", array.nbytes, 0, id_of(array), b"")


def with_several_copies():
    """Of a there are two copies, both whole; of b one against a and one against z, of c against b and z."""
    a, b, c = series(3)
    z = nearly(a, 9)
    store = a_store()
    for step, (array, base) in enumerate([(a, None), (a, None), (z, None), (b, a), (b, z), (c, b), (c, z)]):
        with Session(store, "main", step) as session:
            put_one(session, array, base)
            session.publish(None)
    return store, [a, b, c, z]


def test_a_chunk_is_read_if_it_can_be_from_any_copies_whatever_else_is_damaged():
    store, arrays = with_several_copies()
    objects, index = contents(store.backend), store.refresh(complete=True)
    rows = [row for array in arrays for row in index.copies(id_of(array))]
    keys = [store.pack_name(int(row["pack"])).key for row in rows]
    assert len(set(keys)) == 7

    spoilt = {}
    for row, key in zip(rows, keys, strict=True):
        data = bytearray(objects[key])
        data[int(row["offset"]) + RECORD_HEADER.size + int(row["stored_size"]) - 1] ^= 1
        spoilt[key] = bytes(data)

    def is_good(chunk_id, below, bad):
        return any(
            row["id"].tobytes() == chunk_id and row["depth"] < below and key not in bad
            and (not row["depth"] or is_good(row["base"].tobytes(), row["depth"], bad))
            for row, key in zip(rows, keys, strict=True)
        )  # fmt: skip

    for bad in itertools.chain.from_iterable(itertools.combinations(keys, n) for n in range(8)):
        left = open_store(memory_of(objects | {key: spoilt[key] for key in bad}))
        good = [array for array in arrays if is_good(id_of(array), DEPTH_MAX + 1, bad)]
        for array in arrays:
            if any(array is one for one in good):
                assert in_store(array, left)
            else:
                with pytest.raises(CorruptError):
                    read(left, array)
        outs = [np.empty(array.nbytes, np.uint8) for array in good]
        restore.fill(left, [(tensor_row(array), out) for array, out in zip(good, outs, strict=True)])
        assert all((out == array.view(np.uint8)).all() for array, out in zip(good, outs, strict=True))


def index_of(rows):
    packs = [PackName(bytes(16), 0, n) for n in range(int(rows["pack"].max()) + 1)]
    index = Index()
    parts = [rows[rows["pack"] == n] for n in range(len(packs))]
    index.add(Segment.build([(name, 0, part) for name, part in zip(packs, parts, strict=True)]))
    return index


def a_row(chunk, depth=0, base=None, pack=0, stored_size=10):
    row = np.zeros(1, ROW)
    row["id"], row["depth"], row["pack"] = chunk, depth, pack
    row["base"] = 0 if base is None else base
    row["stored_size"], row["raw_size"] = stored_size, 100
    return row


def test_rows_that_need_each_other_end_every_walk():
    """A damaged index may say anything: A is a delta of B, and B of A."""
    index = index_of(np.concatenate([a_row(1, 2, 2), a_row(2, 2, 1), a_row(3, 1, 1), a_row(4, 200, 4)]))
    chains = Chains(index.packs, index.find, index.copies, DEPTH_MAX)
    ids = as_ids(bytes([n]) * 32 for n in range(1, 5))
    assert chains.look_up(ids) == [None] * 4


def test_a_walk_tries_every_copy_and_takes_that_of_least_depth():
    rows = [
        a_row(1),
        a_row(2, 1, 9),  # its base is nowhere
        a_row(2, 3, 1, stored_size=5),
        a_row(2, 5, 1),
        a_row(3, 2, 2),  # of a base too deep
        a_row(3, 4, 2, stored_size=7),
    ]
    index = index_of(np.concatenate(rows))
    chains = Chains(index.packs, index.find, index.copies, DEPTH_MAX)
    copies = chains.look_up(as_ids(bytes([n]) * 32 for n in (1, 2, 3)))
    packs = frozenset(index.packs)
    assert copies == [
        Copy(packs, 0, 10, 100, 10, bytes([1]) * 32),
        Copy(packs, 3, 15, 100, 5, bytes([1]) * 32),
        Copy(packs, 4, 22, 100, 7, bytes([1]) * 32),
    ]


def test_a_reader_refuses_a_depth_above_the_stores_though_it_could_decode_it():
    arrays = series(2)
    store = written(a_store(), arrays[:1])
    with Session(store, "main", 1) as session:
        put_one(session, arrays[1], arrays[0], depth=4)
        session.publish(None)
    assert in_store(arrays[1], store)
    body = unseal(store.backend.read(DESCRIPTOR), "here")
    objects = contents(store.backend) | {DESCRIPTOR: seal(body | {"depth_max": 4})}
    shallow = open_store(memory_of(objects))
    assert in_store(arrays[0], shallow)
    with pytest.raises(CorruptError, match=id_of(arrays[1]).hex()[:16]):
        read(shallow, arrays[1])
    assert [copy is None for copy in looked_up(shallow, *arrays)] == [False, True]


def test_a_base_as_deep_as_its_delta_is_none():
    arrays = series(3)
    store = written(a_store(), arrays[:2])
    with Session(store, "main", 2) as session:
        put_one(session, arrays[2], arrays[1], depth=0)
        session.publish(None)
        assert session.rows()["depth"].tolist() == [1]
    base, chunk = id_of(arrays[1]).hex()[:16], id_of(arrays[2]).hex()[:16]
    with pytest.raises(CorruptError, match=f"{chunk}: its base: .*{base} is in no pack with a depth below 1"):
        read(store, arrays[2])
    assert looked_up(store, arrays[2]) == [None]


# -- restore


@pytest.fixture
def as_deltas(monkeypatch):
    taken(monkeypatch)


def states(n, size=3000):
    return {step: {"w": array, "step": step} for step, array in enumerate(series(n, size))}


def saved(n, backend=None, size=3000):
    run = opened(backend or MemoryBackend())
    for step, state in states(n, size).items():
        run.save(state, step=step)
    return run


@pytest.mark.usefixtures("as_deltas")
def test_every_step_of_a_chain_comes_back_whole_in_part_and_into_memory():
    run = saved(6)
    assert rows_of(run.store)["depth"].max() == 5
    for step, state in states(6).items():
        assert same(opened(run.store.backend).load(step), state)
        assert same(run.read(step, "w", slice(100, 200)), state["w"][100:200])
        into = {"w": np.empty(3000, np.float32), "step": 0}
        assert same(run.load(step, into=into)["w"], state["w"])
        assert same(run.load(step, lazy=True)["w"][7:9], state["w"][7:9])


@pytest.mark.usefixtures("as_deltas")
def test_a_base_that_is_restored_too_is_decoded_once(monkeypatch):
    base = floats(1, 3000)
    tensors = {"a": base, "b": nearly(base, 1), "c": nearly(nearly(base, 1), 2)}
    run = opened(MemoryBackend())
    for step, names in enumerate(["a", "ab", "abc"]):
        run.save({name: tensors[name] for name in names}, step=step)
    rows = rows_of(run.store)
    assert sorted(rows["depth"].tolist()) == [0, 1, 2]
    calls = calls_of(monkeypatch, run.store.backend)
    assert same(run.load(2), tensors)
    assert len(calls) == 3
    calls.clear()
    assert same(run.load(2, keys=["c"]), {"c": tensors["c"]})
    assert len(calls) == 3
    calls.clear()
    restore.check(run.store, run.manifest(2).tensors)  # keeps nothing, so a base is decoded for each
    assert len(calls) == 1 + 2 + 3


def test_what_is_wanted_is_read_in_the_round_after_its_base():
    rows = np.concatenate([a_row(1, 2, 3), a_row(2), a_row(3, 1, 2), a_row(4, 1, 9), a_row(5, 1, 3)])
    ids = as_ids(bytes([n]) * 32 for n in range(1, 6))
    base_at = restore._wanted_bases(ids, rows)
    assert base_at.tolist() == [2, -1, 1, -1, -1]  # 9 is not wanted, and 3 is as deep as its delta
    assert restore._rounds(rows, base_at).tolist() == [2, 0, 1, 0, 0]


@pytest.mark.usefixtures("as_deltas")
def test_a_restore_looks_all_bases_up_together(monkeypatch):
    run = opened(MemoryBackend())
    for step in range(3):
        run.save({str(i): nearly(floats(i, 300 + i), step) for i in range(50)}, step=step)
    store = open_store(run.store.backend)
    manifest = run.manifest(2)
    store.refresh()
    n_found = []
    find = Index.find
    monkeypatch.setattr(Index, "find", lambda self, ids, *a: n_found.append(len(ids)) or find(self, ids, *a))
    out = [np.empty(row.size, np.uint8) for row in manifest.tensors]
    restore.fill(store, list(zip(manifest.tensors, out, strict=True)))
    assert len(n_found) <= 1 + DEPTH_MAX


# -- what stays


@pytest.mark.usefixtures("as_deltas")
@pytest.mark.parametrize("n", [1, 2, 3])
def test_to_forget_any_steps_breaks_no_other(n):
    for gone in itertools.combinations(range(5), n):
        backend = saved(5).store.backend
        opened(backend).forget(gone)
        for _ in range(2):
            collect(backend)
        left = {step: state for step, state in states(5).items() if step not in gone}
        found = visible(backend)
        assert found.keys() == left.keys()
        assert all(same(found[step], left[step]) for step in left)
        assert verify(backend, level="decode").clean
        assert collect(backend, dry_run=True).n_dead == 0


def pack_sizes(backend):
    return [len(data) for name, data in contents(backend).items() if name.startswith("packs/")]


@pytest.mark.usefixtures("as_deltas")
def test_a_chain_of_which_the_end_is_wanted_becomes_one_whole_record():
    run = saved(9)
    backend = run.store.backend
    assert rows_of(run.store)["depth"].max() == 8
    run.forget(range(8))
    assert collect(backend, dry_run=True).n_rebased == 1
    result = collect(backend)
    assert result.n_rebased == 1
    store = open_store(backend)
    rows = rows_of(store)
    assert rows["depth"].tolist() == [0]
    [size] = pack_sizes(backend)
    assert size == PACK_HEADER.size + PACK_TRAILER.size + OVERHEAD + int(rows["stored_size"][0])
    assert same(visible(backend), {8: states(9)[8]})
    assert collect(backend).n_rebased == 0


@pytest.mark.usefixtures("as_deltas")
def test_a_base_stays_while_its_deltas_are_cheaper_with_it_and_goes_when_they_are_not():
    base = floats(1, 3000)
    backend = MemoryBackend()
    store = written(open_store(backend, create=True), [base])  # by a step that is forgotten
    tuned = {f"r{n}": nearly(base, n) for n in range(4)}
    for run, array in tuned.items():
        with Session(store, run, 1) as session:
            put_one(session, array, base)
            commit(session, array)
    assert collect(backend, dry_run=True).n_rebased == 0
    assert collect(backend).n_rebased == 0
    assert sorted(rows_of(open_store(backend))["depth"].tolist()) == [0, 1, 1, 1, 1]
    for run in ("r1", "r2", "r3"):
        opened(backend, run).forget([1])
    assert collect(backend).n_rebased == 1
    assert same(visible(backend, "r0"), {1: {"w": tuned["r0"]}})
    [row] = rows_of(open_store(backend))
    assert (row["depth"], row["id"].tobytes()) == (0, id_of(tuned["r0"]))


def fan(n, *, base_size=90, delta_size=30, whole_size=90):
    return [
        Link(b"base", None, 0, False, base_size, base_size),
        *(Link(bytes([i]), b"base", 1, True, delta_size, whole_size) for i in range(n)),
    ]


def test_a_base_of_few_deltas_goes_and_one_of_many_stays():
    assert rebase.plan(fan(1)) == Rebase([b"\0"], 60, 90)
    assert rebase.plan(fan(2)) == Rebase()  # 120 more for 90
    assert rebase.plan(fan(2, delta_size=50)) == Rebase([b"\0", b"\1"], 80, 90)
    assert rebase.plan([]) == Rebase()


def test_a_side_branch_goes_although_its_root_stays():
    side = [Link(b"x", b"base", 1, False, 40, 90), Link(b"y", b"x", 2, True, 30, 65)]
    assert rebase.plan([*fan(3), *side]) == Rebase([b"y"], 35, 40)


def test_what_needs_a_delta_that_is_wanted_is_left_as_it_is():
    wanted = Link(b"a", None, 0, True, 90, 90)
    between = Link(b"b", b"a", 1, False, 40, 90)
    end = Link(b"c", b"b", 2, True, 60, 90)
    assert rebase.plan([wanted, between, end]) == Rebase([b"c"], 30, 40)
    assert rebase.plan([wanted, between._replace(size=20), end]) == Rebase()


def test_two_records_of_one_chunk_are_planned_as_the_one_of_least_depth():
    a, b = Link(b"a", None, 0, False, 90, 90), Link(b"b", b"a", 1, False, 50, 90)
    end = Link(b"c", b"b", 2, True, 60, 90)
    deep = [a._replace(base=b"b", depth=3, size=1), b._replace(base=b"a", depth=4)]
    for links in itertools.permutations([a, b, end, *deep]):
        assert rebase.plan(links) == Rebase([b"c"], 30, 140)


def cost(links, goes):
    """Bytes of records if the bases in `goes` go; None if a base that stays would need one of them."""
    size = 0
    for link in links:
        if link.id in goes:
            continue
        if link.base in goes and not link.is_wanted:
            return None
        size += link.whole_size if link.base in goes else link.size
    return size


def test_the_plan_is_the_cheapest_of_all():
    rng = np.random.default_rng(5)
    for _ in range(300):
        links = [Link(b"\0", None, 0, bool(rng.integers(4) == 0), 90, 90)]
        for i in range(1, int(rng.integers(2, 9))):
            base = links[rng.integers(len(links))]
            size = int(rng.integers(1, 90))
            wanted = bool(rng.integers(2))
            links.append(Link(bytes([i]), base.id, base.depth + 1, wanted, size, int(rng.integers(60, 120))))
        unwanted = [link.id for link in links if not link.is_wanted]
        subsets = itertools.chain.from_iterable(
            itertools.combinations(unwanted, n) for n in range(len(unwanted) + 1)
        )
        best = min(c for goes in subsets if (c := cost(links, set(goes))) is not None)
        found = rebase.plan(links)
        assert cost(links, set()) + found.added_size - found.freed_size == best


def commit(session, array):
    """Commit a state of one array, which is one chunk and is there."""
    elsewhere = opened(MemoryBackend())
    elsewhere.save({"w": array}, step=1)
    manifest = elsewhere.manifest(1)
    assert manifest.tensors[0].root == id_of(array)
    data = manifest.to_bytes()
    session.publish(data)
    session.commit(data, parent=None, metrics={}, metadata={}, figures=Figures())


@pytest.mark.usefixtures("as_deltas")
def test_a_gc_takes_no_base_from_a_writer_that_builds_on_it():
    backend = saved(3).store.backend
    store = open_store(backend)
    new = nearly(states(3)[2]["w"], 9)
    with Session(store, "other", 1) as session:
        [copy] = session.look_up(as_ids([id_of(states(3)[2]["w"])]))
        assert copy.depth == 2
        opened(backend).forget([0, 1, 2])
        assert gc.collect(backend, patience_s=1000).waiting_for
        put_one(session, new, states(3)[2]["w"])
        commit(session, new)
    assert rows_of(open_store(backend))["depth"].max() == 3
    for _ in range(3):
        collect(backend)
        assert same(visible(backend, "other"), {1: {"w": new}})
        assert verify(backend, level="decode").clean


@pytest.mark.usefixtures("as_deltas")
def test_no_save_builds_on_a_base_in_a_pack_that_gc_has_condemned():
    backend = saved(3).store.backend
    with Session(open_store(backend), "other", 1):
        opened(backend).forget([0, 1, 2])
        assert gc.collect(backend, patience_s=1000).n_dead == 3
        opened(backend).save(states(4)[3], step=3)
    assert rows_of(open_store(backend))["depth"][-1:].tolist() != [NO_BASE]
    for _ in range(3):
        collect(backend)
    assert rows_of(open_store(backend))["depth"].tolist() == [0]
    assert same(visible(backend), {3: states(4)[3]})


@pytest.mark.usefixtures("as_deltas")
def test_a_repack_copies_deltas_as_they_are(monkeypatch):
    monkeypatch.setattr(rebase, "plan", lambda links: Rebase())
    backend = MemoryBackend()
    run = opened(backend)
    for step, state in states(4).items():
        run.save(state | {"waste": noise(step, 9000)}, step=step)
    for step, state in states(4).items():
        run.save(state, step=10 + step)
    before = {row["id"].tobytes(): row["depth"] for row in rows_of(run.store)}
    run.forget(range(4))
    run.forget([11])
    assert collect(backend).n_repacked == 4
    rows = rows_of(open_store(backend))
    assert {row["id"].tobytes(): row["depth"] for row in rows} == {
        i: depth for i, depth in before.items() if i in {id_of(s["w"]) for s in states(4).values()}
    }
    assert sorted(rows["depth"].tolist()) == [0, 1, 2, 3]
    assert len(pack_sizes(backend)) == 1
    for step in (10, 12, 13):
        assert same(opened(backend).load(step), states(4)[step - 10])


def with_two_copies():
    """Of b there is a delta of depth 1, which c needs, and one of depth 3 by another writer."""
    base, b, c = series(3)
    backend = MemoryBackend()
    run = opened(backend)
    for step, array in enumerate((base, b, c)):
        run.save({"w": array}, step=step)
    deep = [nearly(base, 50), nearly(nearly(base, 50), 51)]
    with Session(open_store(backend), "deep", 1) as session:
        put_one(session, deep[0], base)
        put_one(session, deep[1], deep[0], depth=1, data=deep[0].view("u1"), raw_size=base.nbytes)
        put_one(session, b, deep[1], depth=2, data=deep[1].view("u1"), raw_size=base.nbytes)
        commit(session, deep[1])
        assert session.rows()["depth"].tolist() == [1, 2, 3]
    return backend, c, deep[1]


@pytest.mark.usefixtures("as_deltas")
def test_of_two_copies_gc_keeps_the_one_that_a_delta_can_build_on():
    backend, *_ = with_two_copies()
    for _ in range(3):
        collect(backend)
        assert visible(backend).keys() == {0, 1, 2}
    assert sorted(rows_of(open_store(backend))["depth"].tolist()) == [0, 1, 1, 2, 2]


@pytest.mark.usefixtures("as_deltas")
def test_a_sweep_spares_a_base_that_is_elsewhere_only_too_deep(monkeypatch):
    """A writer that relies on c commits it while c and b are condemned; elsewhere b is too deep for c."""
    monkeypatch.setattr(gc, "plan", lambda packs, plan=gc.plan: plan(packs, waste_max=1000.0))
    monkeypatch.setattr(rebase, "plan", lambda links: Rebase())
    backend, c, other = with_two_copies()
    with Session(open_store(backend), "other", 1) as session:
        [copy] = session.look_up(as_ids([id_of(c)]))
        assert copy.depth == 2
        opened(backend).forget([0, 1, 2])
        waiting = gc.collect(backend, patience_s=1000)
        assert (waiting.n_dead, len(waiting.waiting_for)) == (2, 1)
        commit(session, c)
    assert collect(backend).n_deleted == 0
    for _ in range(2):
        assert same(visible(backend, "other"), {1: {"w": c}})
        assert same(visible(backend, "deep"), {1: {"w": other}})
        assert verify(backend, level="decode").clean
        collect(backend)


@pytest.mark.usefixtures("as_deltas")
def test_a_base_that_is_left_only_too_deep_is_repaired_by_storing_it_whole():
    backend, c, deep = with_two_copies()
    backend = without(open_store(backend), series(2)[1]).backend
    with pytest.raises(CorruptError, match="its pack is missing"):
        opened(backend).load(2)
    assert repair(backend).clean
    assert same(opened(backend).load(2), {"w": c})
    assert same(visible(backend, "deep"), {1: {"w": deep}})
    assert repair(backend).actions == []


# -- verify and stats


@pytest.mark.usefixtures("as_deltas")
@pytest.mark.parametrize("link", range(3))
def test_damage_of_a_base_is_told_of_every_step_that_needs_it(link):
    store = damaged(saved(3).store, states(3)[link]["w"])
    for level in ("stored", "decode"):
        report = verify(store, level=level)
        hits = {hit for damage in report.damage for hit in damage.hits}
        assert hits == {f"main {step}: w" for step in range(link, 3)}
    assert verify(store).clean  # by its references alone


@pytest.mark.usefixtures("as_deltas")
def test_a_missing_base_is_damage_of_the_steps_that_need_it():
    run = saved(3)
    run.forget([0])
    store = without(run.store, states(3)[0]["w"])
    [damage] = verify(store).damage
    assert (damage.kind, damage.key) == ("chunk", id_of(states(3)[0]["w"]).hex())
    assert damage.hits == ["main 1: w", "main 2: w"]
    with pytest.raises(CorruptError, match="lack a base; nothing deleted"):
        collect(store.backend)


@pytest.mark.usefixtures("as_deltas")
def test_a_delta_that_no_step_needs_may_have_lost_its_base(monkeypatch, caplog):
    """It lies in a pack with what is needed; the base is gone, rightly.  And then its chunk comes back."""
    monkeypatch.setattr(gc, "WASTE_MAX", 1000.0)
    first, second = series(2, 500)
    backend = MemoryBackend()
    run = opened(backend)
    run.save({"w": first}, step=0)
    run.save({"w": second, "stays": noise(1, 9000)}, step=1)
    run.save({"stays": noise(1, 9000)}, step=2)
    run.forget([0, 1])
    monkeypatch.setattr(gc, "plan", lambda packs, *, plan=gc.plan: plan(packs, waste_max=1000.0))
    assert collect(backend).n_deleted
    store = open_store(backend)
    assert rows_of(store)["depth"].tolist().count(1) == 1
    assert looked_up(store, second) == [None]
    assert verify(store, level="decode").clean
    caplog.set_level(logging.WARNING, "deltackpt")
    opened(backend).save({"w": second}, step=3)
    for again in range(4, 6):
        assert opened(backend).save({"w": second}, step=again).n_new_chunks == 0
    assert same(opened(backend).load(3), {"w": second})
    for _ in range(3):
        collect(backend)
    assert visible(backend).keys() == {2, 3, 4, 5}
    assert verify(backend, level="decode").clean


@pytest.fixture
def with_a_dead_delta(monkeypatch, as_deltas):
    """A store with a delta of depth 1 that has lost its base, and one of depth 1 to take another against."""
    first, second = series(2)
    third, fourth = nearly(second, 5), nearly(second, 6)
    backend = MemoryBackend()
    monkeypatch.setattr(gc, "plan", lambda packs, plan=gc.plan: plan(packs, waste_max=1000.0))
    stays = {"stays": floats(9, 900)}
    for step, state in enumerate([{"w": first}, {"w": second} | stays, stays]):
        opened(backend).save(state, step=step)
    opened(backend).forget([0, 1])
    collect(backend)
    written(open_store(backend), [third, fourth], "others")
    assert looked_up(open_store(backend), second) == [None]
    return backend, second, fourth


@pytest.mark.usefixtures("as_deltas")
def test_a_chunk_of_which_there_is_a_dead_delta_is_stored_whole(with_a_dead_delta, caplog):
    """Or whoever looks for the copy of least depth would find the dead one."""
    backend, second, base = with_a_dead_delta
    with Session(open_store(backend), "again", 1) as session:
        session.look_up(as_ids([id_of(second)]))
        put_one(session, second, base)
        commit(session, second)
        assert session.rows()["depth"].tolist() == [0]
    caplog.set_level(logging.INFO, "deltackpt")
    assert same(opened(backend, "again").load(1), {"w": second})
    assert not caplog.text


@pytest.mark.usefixtures("as_deltas")
def test_so_is_one_of_which_the_only_delta_is_condemned():
    """Its pack may be spared for another's sake, and its base not."""
    first, second, third = series(3)
    store = written(a_store(), [first, second])
    dead = frozenset([pack_of(store, second)])
    store.backend.create_once("gc/condemn-0", GcRecord("condemn", 0, dead, 0, 2).to_bytes())
    with Session(store, "again", 1) as session:
        assert session.look_up(as_ids(map(id_of, [second, third]))) == [None, None]
        for array in (second, third):
            put_one(session, array, first)
        session.publish(None)
        assert session.rows()["depth"].tolist() == [0, 1]


@pytest.mark.usefixtures("as_deltas")
@pytest.mark.parametrize("level", ["references", "stored", "decode"])
def test_a_dead_delta_beside_a_deeper_copy_is_no_damage(with_a_dead_delta, level):
    backend, second, base = with_a_dead_delta
    with Session(open_store(backend), "again", 1) as session:
        put_one(session, second, base)  # it was not looked up: nobody knows of the dead one
        commit(session, second)
        assert session.rows()["depth"].tolist() == [2]
    assert verify(backend, level=level).clean
    if level != "references":
        damage = verify(damaged(open_store(backend), base), level=level).damage
        assert [d.hits for d in damage] == [["again 1: w"]] * len(damage) != []


@pytest.mark.usefixtures("as_deltas")
def test_a_base_too_deep_is_told_of_the_link_that_needs_it():
    backend, c, _ = with_two_copies()
    last = nearly(c, 7)
    with Session(open_store(backend), "last", 1) as session:
        put_one(session, last, c)
        commit(session, last)
    opened(backend).forget([2])
    b = series(2)[1]
    [damage] = verify(without(open_store(backend), b)).damage
    assert (damage.key, damage.hits) == (id_of(c).hex(), ["last 1: w"])
    assert damage.message == f"needs {id_of(b).hex()[:16]}, of less depth than 2"


@pytest.mark.usefixtures("as_deltas")
def test_what_a_run_takes_is_also_the_bases_that_only_its_deltas_need(monkeypatch):
    run = saved(3)
    rows = rows_of(run.store)
    sizes = rows["stored_size"].astype(int) + OVERHEAD
    whole = stats.look(run.store)
    run.forget([0])
    left = stats.look(run.store)
    assert whole.sums.stored_size == left.sums.stored_size == sizes.sum() == left.runs[0].only_size
    assert left.sums.logical_size == 2 * whole.sums.logical_size // 3
    assert left.sums.new_size == left.sums.logical_size
    branch = run.fork("branch")
    assert stats.look(run.store).sums.stored_size == sizes.sum()
    assert [r.only_size for r in stats.look(run.store).runs] == [0, 0]
    assert stats.look(run.store, "branch").sums.stored_size == sizes.sum()
    assert branch.steps() == [2]


def test_the_codecs_of_deltas_are_the_ones_with_a_depth(monkeypatch):
    taken(monkeypatch)
    rows = rows_of(saved(4).store)
    assert all((row["codec"] in DELTAS) == (row["depth"] > 0) for row in rows)


# -- the mark, against what it says of itself


NEVER, UNLISTED = 9, 3


def a_mark(rows, tiers, wanted, depth_max=DEPTH_MAX):
    """A `Liveness` of made-up rows in packs of given tiers; steps have the chunks in `wanted`."""
    mark = Liveness.__new__(Liveness)
    packs = [PackName(bytes(16), 0, n) for n in range(len(tiers))]
    parts = [rows[rows["pack"] == n] for n in range(len(packs))]
    mark._rows = Segment.build([(name, 1000, part) for name, part in zip(packs, parts, strict=True)])
    mark._sizes = np.full(len(packs), 1000)
    mark._store = SimpleNamespace(depth_max=depth_max, url="here")
    mark.packs = {name: 1000 for name, tier in zip(packs, tiers, strict=True) if tier != NEVER}
    mark._condemned, mark._aside, mark._writing = frozenset(), frozenset(), set()
    mark._unlisted = frozenset(name for name, tier in zip(packs, tiers, strict=True) if tier == UNLISTED)
    mark._number()
    at = mark._find(as_ids(bytes([n]) * 32 for n in wanted))
    mark._wanted, mark._n_unknown = mark._chunk[at[at >= 0]], int((at < 0).sum())
    by_tier = [frozenset(name for name, t in zip(packs, tiers, strict=True) if t == tier) for tier in (1, 2)]
    return mark, by_tier


def usable_of(rows, may_use):
    """Whether each row can be decoded, from rows of which `may_use`: tried until nothing changes."""
    found = np.zeros(len(rows), bool)
    while True:
        there = {
            (row["id"][0], depth)
            for row in rows[found]
            for depth in range(int(row["depth"]) + 1, DEPTH_MAX + 1)
        }
        has_base = [not row["depth"] or (row["base"][0], row["depth"]) in there for row in rows]
        now = may_use & np.array(has_base, bool)
        if (now == found).all():
            return found
        found = now


def test_an_unlisted_base_stays_beside_a_listed_one_that_is_too_deep_for_an_unlisted_delta():
    made = [a_row(1, pack=0), a_row(2, 1, 1, pack=0), a_row(1, 2, 3, pack=1), a_row(3, pack=1)]
    mark, _ = a_mark(np.concatenate(made), [UNLISTED, 0], [1, 2])
    in_use = mark._rows.rows[mark._in_use(frozenset(), frozenset())]
    assert [(row["id"][0], row["depth"]) for row in in_use] == [(1, 0), (1, 2), (2, 1), (3, 0)]
    mark, _ = a_mark(np.concatenate(made), [UNLISTED, 0], [1])
    in_use = mark._rows.rows[mark._in_use(frozenset(), frozenset())]
    assert [(row["id"][0], row["depth"]) for row in in_use] == [(1, 2), (3, 0)]


@pytest.mark.parametrize("seed", range(200))
def test_what_is_in_use_is_closed_under_bases_and_the_least_deep_that_can_be_used(seed):
    rng = np.random.default_rng(seed)
    n, n_ids = int(rng.integers(1, 30)), 6
    made = []
    for _ in range(n):
        depth = int(rng.integers(0, 4)) * int(rng.integers(0, 2))
        chunk, base = (int(i) for i in rng.integers(1, n_ids + 1, 2))
        made.append(a_row(chunk, depth, base if depth else None, int(rng.integers(5))))
    tiers = rng.choice([0, 1, 2, UNLISTED, UNLISTED, NEVER], 5)
    mark, (avoid, last) = a_mark(np.concatenate(made), tiers, rng.permutation(n_ids)[:3] + 1)
    rows = mark._rows.rows
    tier_of = tiers[rows["pack"]]
    usable, listed = usable_of(rows, tier_of < NEVER), usable_of(rows, tier_of < UNLISTED)
    in_use = mark._in_use(avoid, last)
    chosen = rows[in_use]

    assert usable[in_use].all()
    for row in chosen[chosen["depth"] > 0]:
        bases = chosen[chosen["id"][:, 0] == row["base"][0]]
        assert bases["depth"].min(initial=99) < row["depth"]
    wanted = set(mark._wanted.tolist()) & set(mark._chunk[usable].tolist())
    for chunk in wanted | set(mark._chunk[in_use].tolist()):
        of = mark._chunk == chunk
        best = rows["depth"][of & (listed if listed[of].any() else usable)].min()
        mine = in_use[of[in_use]]
        if chunk in wanted or listed[mine].all():
            assert best in rows["depth"][mine]
        # What no index lists is in use only if there is nothing else, or another such needs it less deep.
        assert listed[mine].all() or not listed[of].any() or rows["depth"][mine].min() < best


@pytest.mark.usefixtures("as_deltas")
def test_a_chain_that_two_unfinished_cycles_condemned_in_part_is_kept():
    """Each cycle's view lacks the other's part: neither may conclude that its own is not needed."""
    backend = MemoryBackend()
    run = opened(backend)
    for step, state in states(3).items():
        run.save(state, step=step)
    store = open_store(backend)
    index = store.refresh()
    by_depth = {
        int(row["depth"]): segment.packs[int(row["pack"])]
        for segment in index.segments
        for row in segment.rows
    }
    assert sorted(by_depth) == [0, 1, 2]
    for step in (0, 1):
        run.forget([step])
    for cycle, depth in enumerate((1, 0)):
        record = GcRecord("condemn", cycle, frozenset([by_depth[depth]]), 3, 3)
        assert backend.create_once(record.key, record.to_bytes())
    collect(backend)
    assert verify(backend, level="decode").clean
    assert same(opened(backend).load(2), states(3)[2])


@pytest.mark.usefixtures("as_deltas")
def test_no_cycle_is_begun_on_a_look_that_saw_another_unfinished(monkeypatch):
    """Another gc condemns between this one's listing of what is unfinished and its look."""
    backend = MemoryBackend()
    run = opened(backend)
    for step, state in states(4).items():
        run.save(state, step=step)
    run.save({"w": floats(99, 5000)}, step=9)
    sid = run.commit(9).sid
    run.forget([9, 0])
    order = []
    look, create = gc._Gc._look, MemoryBackend.create_once

    def create_once(self, name, data, **options):
        if name.startswith("gc/"):
            order.append(name)
        return create(self, name, data, **options)

    def overtaken(self):
        if not order:
            packs = {PackName.from_key(key) for key in backend.names("packs/")}
            of_step_9 = {p for p in packs if p.sid == sid}
            record = GcRecord("condemn", 0, frozenset(of_step_9), 5, len(packs))
            backend.create_once(record.key, record.to_bytes())
        return look(self)

    monkeypatch.setattr(MemoryBackend, "create_once", create_once)
    monkeypatch.setattr(gc._Gc, "_look", overtaken)
    collect(backend)
    assert order[:2] == ["gc/condemn-0", "gc/sweep-0"], order
    assert order == [f"gc/{kind}-{n}" for n in range(len(order) // 2) for kind in ("condemn", "sweep")]
    for step in (1, 2, 3):
        assert same(opened(backend).load(step), states(4)[step])
