"""Look-ups against a dict, and index files against any bytes."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from deltackpt import index
from deltackpt.errors import CorruptError, FormatError, UnsupportedVersionError
from deltackpt.format import CHUNK_SIZE_MAX, INDEX_HEADER, ROW, VERSION
from deltackpt.index import Index, Segment, keys_of
from deltackpt.pack import PackName

STORE = bytes(range(16))
SID = b"s" * 16


def name(n: int) -> PackName:
    return PackName(bytes([n]) * 16, 0, 0)


def chunk_id(n: int) -> bytes:
    """Ids of one key in pairs: the first eight bytes alone do not tell them apart."""
    return bytes([n // 2]) * 8 + bytes([n]) * 24


def ids_of(numbers: list[int]) -> np.ndarray:
    return np.frombuffer(b"".join(map(chunk_id, numbers)), np.uint8).reshape(-1, 32)


def rows_of(entries: list[tuple[int, int]]) -> np.ndarray:
    rows = np.zeros(len(entries), ROW)
    for row, (number, depth) in zip(rows, entries, strict=True):
        row["id"] = np.frombuffer(chunk_id(number), np.uint8)
        row["depth"], row["offset"], row["raw_size"] = depth, 1000 * number + depth, 5
    return rows


#: Packs, each a list of (chunk number, depth).
PACKS = st.lists(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3)), max_size=6), max_size=12)


def segments_of(packs: list[list[tuple[int, int]]]) -> list[Segment]:
    return [Segment.build([(name(i), 100 + i, rows_of(entries))]) for i, entries in enumerate(packs)]


def reseal(data: bytes) -> bytes:
    return data + xxhash.xxh3_128_digest(data)


@settings(deadline=None)
@given(PACKS, st.sets(st.integers(0, 11)))
def test_a_look_up_finds_the_copy_of_least_depth_as_a_dict_would(packs, banned):
    lookup = Index()
    expected: dict[int, int] = {}
    for number, (segment, entries) in enumerate(zip(segments_of(packs), packs, strict=True)):
        lookup.add(segment)
        for chunk, depth in entries:
            if number not in banned:
                expected[chunk] = min(depth, expected.get(chunk, 9))
    found, rows = lookup.find(ids_of(list(range(12))), [name(n) for n in banned])
    assert {n: int(rows["depth"][n]) for n in range(12) if found[n]} == expected
    for n in np.flatnonzero(found):
        assert rows[n]["id"].tobytes() == chunk_id(n)
        assert (n, rows[n]["depth"]) in packs[lookup.packs[int(rows[n]["pack"])].sid[0]]


@settings(deadline=None)
@given(PACKS)
def test_copies_are_all_there_least_depth_first(packs):
    lookup = Index()
    for segment in segments_of(packs):
        lookup.add(segment)
    for chunk in range(12):
        rows = lookup.copies(chunk_id(chunk))
        told = [(lookup.packs[int(row["pack"])].sid[0], int(row["depth"])) for row in rows]
        assert sorted(told) == sorted((i, d) for i, e in enumerate(packs) for c, d in e if c == chunk)
        assert [d for _, d in told] == sorted(d for _, d in told)


@settings(deadline=None)
@given(PACKS, st.sets(st.integers(0, 11)))
def test_a_merge_holds_every_row_of_the_packs_kept(packs, banned):
    merged = Segment.merge(segments_of(packs), without=[name(n) for n in banned])
    told = [(merged.packs[int(r["pack"])].sid[0], r["id"].tobytes(), int(r["depth"])) for r in merged.rows]
    kept = [(i, chunk_id(c), d) for i, e in enumerate(packs) for c, d in e if i not in banned]
    assert sorted(told) == sorted(kept)
    assert [t[1:] for t in told] == sorted(t[1:] for t in told)
    assert [int(s) for s in merged.sizes] == [100 + p.sid[0] for p in merged.packs]


def test_a_pack_covered_twice_is_counted_once():
    one = segments_of([[(1, 0), (2, 0)]])[0]
    assert len(Segment.merge([one, one]).rows) == 2


@settings(deadline=None)
@given(PACKS)
def test_an_index_file_comes_back(packs):
    segment = Segment.merge(segments_of(packs))
    back = Segment.from_bytes(segment.to_bytes(STORE, SID), STORE, "here")
    assert back.packs == segment.packs
    assert back.rows.tobytes() == segment.rows.tobytes()
    assert np.array_equal(back.keys, keys_of(back.rows["id"]))
    assert np.array_equal(back.sizes, segment.sizes)


def test_a_row_beyond_the_small_ones_is_found_too(monkeypatch):
    monkeypatch.setattr(index, "SMALL_ROWS", 3)
    lookup = Index()
    for segment in segments_of([[(n, 0)] for n in range(11)]):
        lookup.add(segment)
    found, _ = lookup.find(ids_of(list(range(11))))
    assert found.all()
    assert len(lookup.segments) < 11


def test_many_saves_copy_each_row_a_few_times_only(monkeypatch):
    merge, n_copied = Segment.merge, []

    def counted(segments, without=()):
        n_copied.append(sum(len(segment.rows) for segment in segments))
        return merge(segments, without)

    monkeypatch.setattr(Segment, "merge", counted)
    lookup = Index()
    for segment in segments_of([[(n, 0)] for n in range(250)]):
        lookup.add(segment)
    assert sum(n_copied) < 15 * 250
    assert len(lookup.segments) < 12


SMALL = Segment.merge(segments_of([[(1, 0), (2, 1)], [(3, 0)]])).to_bytes(STORE, SID)


@settings(deadline=None)
@given(st.integers(0, len(SMALL) - 1), st.integers(1, 255))
def test_every_changed_byte_of_an_index_is_found(at: int, change: int):
    bad = bytearray(SMALL)
    bad[at] ^= change
    with pytest.raises(FormatError):
        Segment.from_bytes(bytes(bad), STORE, "here")


@settings(deadline=None)
@given(st.integers(0, len(SMALL) - 1))
def test_every_cut_of_an_index_is_found(size: int):
    with pytest.raises(CorruptError):
        Segment.from_bytes(SMALL[:size], STORE, "here")


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=300))
def test_any_counts_and_bytes_are_an_index_or_a_format_error(n_packs: int, n_rows: int, rest: bytes):
    head = INDEX_HEADER.pack(VERSION, 0, STORE, SID, n_packs, 0, n_rows)
    try:
        segment = Segment.from_bytes(reseal(head + rest), STORE, "here")
    except FormatError:
        return
    assert (len(segment.packs), len(segment.rows)) == (n_packs, n_rows)


@settings(deadline=None)
@given(st.binary(max_size=88 * 3), st.integers(0, 3))
def test_any_rows_with_good_checksums_are_safe_to_look_up(rest: bytes, n_packs: int):
    n_rows = len(rest) // 96
    rest = rest[: 96 * n_rows]
    head = INDEX_HEADER.pack(VERSION, 0, STORE, SID, n_packs, 0, n_rows)
    try:
        segment = Segment.from_bytes(reseal(head + bytes(32 * n_packs) + rest), STORE, "here")
    except FormatError:
        return
    lookup = Index()
    lookup.add(segment)
    lookup.find(ids_of([0, 1, 2]))
    lookup.copies(bytes(32))


def test_a_row_cannot_promise_more_than_a_chunk_may_have():
    for column in ("raw_size", "stored_size"):
        rows = rows_of([(1, 0)])
        rows[column] = CHUNK_SIZE_MAX + 1
        data = Segment.build([(name(0), 1, rows)]).to_bytes(STORE, SID)
        with pytest.raises(CorruptError, match="at most 67108864 allowed"):
            Segment.from_bytes(data, STORE, "here")


def test_a_row_of_a_pack_that_is_not_listed_is_refused():
    segment = Segment.build([(name(0), 1, rows_of([(1, 0)]))])
    segment.rows["pack"] = 1
    with pytest.raises(CorruptError, match="a row names pack 1 of 1"):
        Segment.from_bytes(segment.to_bytes(STORE, SID), STORE, "here")


def test_an_index_of_another_store_or_a_newer_version_is_refused():
    with pytest.raises(CorruptError, match="index of store"):
        Segment.from_bytes(SMALL, bytes(16), "here")
    newer = reseal(INDEX_HEADER.pack(VERSION + 1, 0, STORE, SID, 0, 0, 0))
    with pytest.raises(UnsupportedVersionError, match="upgrade deltackpt"):
        Segment.from_bytes(newer, STORE, "here")
