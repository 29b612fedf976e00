"""Links: many records read and decoded together, each held to its row, its base and its id."""

from itertools import pairwise

import numpy as np
import pytest
from blake3 import blake3
from coded import payload_of
from deltas import nearly
from faults import contents, memory_of
from steps import floats, noise

from deltackpt import codecs, links
from deltackpt.backends.memory import MemoryBackend
from deltackpt.chains import as_ids
from deltackpt.codecs import Base, Job, Kind, Mode, Packed, coder
from deltackpt.errors import CorruptError, NotFoundError
from deltackpt.format import RECORD_HEADER, ROW
from deltackpt.links import Row, Wanted
from deltackpt.session import Parent, Session
from deltackpt.store import open_store

F4 = Kind(4, True)
N_STEPS = 4


def id_of(array):
    return blake3(array.view(np.uint8)).digest()


def series():
    """The arrays of each step: three that move a little from step to step, and one that is stored raw."""
    steps = [[*(floats(seed, 3000 + seed) for seed in range(3)), noise(9, 5000)]]
    for step in range(1, N_STEPS):
        steps.append([nearly(array, step) for array in steps[-1][:3]] + [noise(step, 5000)])
    return steps


STEPS = series()


def saved():
    """A store of the series, each step in a pack of its own, what moves a little as deltas."""
    store = open_store(MemoryBackend(), create=True)
    for step, arrays in enumerate(STEPS):
        with Session(store, "main", step) as session:
            for i, array in enumerate(arrays):
                base = None
                if step and i < 3:
                    [copy] = session.look_up(as_ids([id_of(STEPS[step - 1][i])]))
                    base = Parent(id_of(STEPS[step - 1][i]), copy.depth, None, copy.raw_size)
                session.put(id_of(array), array.view(np.uint8), F4 if i < 3 else Kind(1, False), base)
            session.publish(None)
    return store


def wanted(store, arrays):
    rows = store.find(as_ids(map(id_of, arrays)))
    assert rows["depth"].max() == N_STEPS - 1
    outs = [np.zeros(array.nbytes, np.uint8) for array in arrays]
    return [Wanted(id_of(a), row, out) for a, row, out in zip(arrays, rows, outs, strict=True)]


def read(store, asked):
    store.read_copies(asked, store.bases(np.array([one.row for one in asked])))


def are_right(asked, arrays):
    return [one.out.tobytes() == array.tobytes() for one, array in zip(asked, arrays, strict=True)]


def changed(store, array, at, value=None):
    """The store with a byte of an array's record changed, or its pack cut there."""
    [row] = store.find(as_ids([id_of(array)]))
    key = store.pack_name(int(row["pack"])).key
    objects = contents(store.backend)
    data = bytearray(objects[key])
    place = int(row["offset"]) + at
    if value is None:
        del data[place:]
    else:
        data[place] ^= value
    return open_store(memory_of(objects | {key: bytes(data)}))


@pytest.mark.parametrize("size", [1, 30_000, 60_000, 1 << 30])
def test_chains_are_the_same_however_many_records_are_read_together(monkeypatch, size):
    store = saved()
    monkeypatch.setattr(links, "_GROUP_SIZE", size)
    for order in (1, -1):
        arrays = STEPS[-1][::order]
        asked = wanted(store, arrays)
        read(store, asked)
        assert all(are_right(asked, arrays))


@pytest.mark.parametrize(("size", "n_reads"), [(1, 3 * N_STEPS + 1), (1 << 30, N_STEPS)])
def test_what_lies_side_by_side_in_a_pack_is_read_in_one_go(monkeypatch, size, n_reads):
    store = saved()
    calls = []
    read_into = MemoryBackend.read_into
    monkeypatch.setattr(
        MemoryBackend, "read_into", lambda self, *a: calls.append(a[0]) or read_into(self, *a)
    )
    monkeypatch.setattr(links, "_GROUP_SIZE", size)
    read(store, wanted(store, STEPS[-1]))
    assert len(calls) == n_reads
    assert len(set(calls)) == N_STEPS


def test_no_more_than_a_group_is_held_at_a_time(monkeypatch):
    """However deep a chain, and however little of it is stored: rows may promise 64 MiB each."""
    store = saved()
    held = []
    unpack = links.unpack

    def noted(packed):
        held.append([one.size + one.payload.size for one in packed])
        return unpack(packed)

    monkeypatch.setattr(links, "unpack", noted)
    monkeypatch.setattr(links, "_GROUP_SIZE", 50_000)
    read(store, wanted(store, STEPS[-1]))
    assert sum(map(len, held)) == 3 * N_STEPS + 1
    assert all(sum(sizes) <= 50_000 for sizes in held)
    assert max(map(len, held)) > 1


@pytest.mark.parametrize("at", [5, RECORD_HEADER.size + 40])
@pytest.mark.parametrize("step", range(N_STEPS))
def test_a_link_that_is_damaged_is_told_among_many(step, at):
    store = changed(saved(), STEPS[step][1], at, 1)
    with pytest.raises(CorruptError):
        read(store, wanted(store, STEPS[-1]))
    asked = wanted(store, [STEPS[-1][0], STEPS[-1][2], STEPS[-1][3]])
    read(store, asked)
    assert all(are_right(asked, [STEPS[-1][0], STEPS[-1][2], STEPS[-1][3]]))


def test_a_pack_that_is_cut_or_gone_is_told():
    store = saved()
    with pytest.raises(CorruptError):
        read(cut := changed(store, STEPS[1][2], 200), wanted(cut, STEPS[-1]))
    asked = wanted(store, STEPS[-1])
    key = store.pack_name(int(store.find(as_ids([id_of(STEPS[0][0])]))[0]["pack"])).key
    store.backend.delete(key)
    with pytest.raises(NotFoundError):
        read(store, asked)


def test_a_row_of_another_chunk_or_size_is_refused():
    store = saved()
    first, second, *_ = wanted(store, STEPS[-1])
    for lie, message in (
        (first._replace(row=second.row), "is found for chunk"),
        (first._replace(out=np.empty(first.out.size + 1, np.uint8)), "expected 12001"),
    ):
        with pytest.raises(CorruptError, match=message):
            read(store, [second, lie])


def test_a_record_that_its_row_does_not_describe_is_refused():
    store = saved()
    asked = wanted(store, STEPS[-1])
    for field, value in (("codec", 4), ("itemsize", 8), ("offset", int(asked[1].row["offset"]))):
        row = asked[0].row.copy()
        row[field] = value
        with pytest.raises(CorruptError, match="differs from its row"):
            read(store, [asked[0]._replace(row=row)])


# -- many payloads


def payloads(n):
    base = floats(0, 2000)
    moved = [nearly(base, seed) for seed in range(n)]
    kinds = [payload_of(3, a.view("u1"), F4, Base(base.view("u1")), Mode(1)) for a in moved]
    whole = [payload_of(2, a.view("u1"), F4) for a in moved]
    packed = [Packed(3, np.array(p), 4, 8000, f"delta {i}") for i, p in enumerate(kinds)]
    packed += [Packed(2, np.array(p), 4, 8000, f"whole {i}") for i, p in enumerate(whole)]
    return base, moved, packed


@pytest.mark.parametrize("n", [1, 9])
def test_many_payloads_decode_as_each_alone(n):
    base, moved, packed = payloads(n)
    outs = [np.empty(8000, np.uint8) for _ in packed]
    jobs = [
        Job(one, planes, out, base.view("u1") if one.codec == 3 else None)
        for one, planes, out in zip(packed, codecs.unpack(packed), outs, strict=True)
    ]
    codecs.join_all(jobs)
    for array, out in zip(moved * 2, outs, strict=True):
        assert out.tobytes() == array.tobytes()


@pytest.mark.parametrize("n_tail", [0, 3])
def test_links_of_a_chain_are_joined_in_their_order_in_two_places_by_turns(n_tail):
    rng = np.random.default_rng(0)
    data = [rng.integers(0, 256, 8000 + n_tail, np.uint8)]
    for _ in range(5):
        data.append(data[-1].copy())
        data[-1][: 8000 - 4000 * (n_tail > 0)].view("<u4")[:] += rng.integers(0, 9, 1, np.uint32)
        data[-1][8000:] += 1
    # Compared with all of the one before but its head, its tail too: that must not be a later one's by then.
    links = [
        Packed(3, payload_of(3, new, F4, Base(old, n_tail), Mode(0)), 4, new.size, "here")
        for old, new in pairwise(data)
    ]
    places = [np.zeros(data[0].size, np.uint8) for _ in "ab"]
    jobs, base = [], data[0]
    for n, (link, planes) in enumerate(zip(links, codecs.unpack(links), strict=True)):
        jobs.append(Job(link, planes, places[n % 2], base))
        base = places[n % 2]
    codecs.join_all(jobs)
    assert base.tobytes() == data[-1].tobytes()


@pytest.mark.parametrize("nth", [0, 7, 17])
def test_the_payload_among_many_that_is_damaged_is_named(nth):
    _, _, packed = payloads(9)
    n = packed[nth].payload.size
    for bad in (
        packed[nth].payload[: n // 2],
        packed[nth].payload[:3],
        np.concatenate([packed[nth].payload, packed[nth].payload]),
    ):
        lies = [*packed[:nth], packed[nth]._replace(payload=bad), *packed[nth + 1 :]]
        with pytest.raises(CorruptError, match=f"^{packed[nth].where}: "):
            codecs.unpack(lies)


@pytest.mark.parametrize("claimed", [99, 101])
def test_a_frame_of_another_size_is_refused_among_many_too(claimed):
    frame = np.frombuffer(coder._local.compressor.compress(bytes(claimed)), np.uint8)
    good = np.frombuffer(coder._local.compressor.compress(bytes(100)), np.uint8)

    def payload(body):
        head = np.frombuffer(b"\0\1\0\0" + coder._PLANE.pack(coder.ZSTD, body.size), np.uint8)
        return Packed(2, np.concatenate([head, body]), 1, 100, "here")

    assert all(p is not None for p in codecs.unpack([payload(good)] * 9))
    with pytest.raises(CorruptError, match="here: planes: plane 0: frame does not hold 100 bytes"):
        codecs.unpack([payload(good)] * 8 + [payload(frame)])


def test_a_row_as_plain_values_is_the_row_of_an_index():
    row = np.zeros(1, ROW)
    row["id"], row["base"] = np.arange(32), np.arange(32, 64)
    for n, name in enumerate(ROW.names[2:], 1):
        row[name] = n
    assert tuple(Row.of(row[0])) == (bytes(range(32)), bytes(range(32, 64)), 1, 2, 3, 4, 5, 6, 7)
    assert Row._fields == ROW.names
