"""Look-ups against a dict, and index files against any bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltackpt import index
from deltackpt.errors import CorruptError, FormatError, NotFoundError, UnsupportedVersionError
from deltackpt.format import CHUNK_SIZE_MAX, INDEX_HEADER, ROW, VERSION
from deltackpt.index import Index, Segment, StoredSegment, keys_of, to_merge
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


def file_of(packs: bytes, n_packs: int, rows: bytes, n_rows: int, version: int = VERSION) -> bytes:
    """An index file of any packs and rows, with good checksums."""
    size = index._BLOCK_SIZE
    blocks = [rows[at : at + size] for at in range(0, len(rows), size)]
    ids = [rows[at : at + 8] for at in range(0, len(rows), ROW.itemsize)]
    keys = b"".join(some.ljust(8, b"\0")[::-1] for some in ids)
    checks = b"".join(xxhash.xxh3_64_intdigest(block).to_bytes(8, "little") for block in blocks)
    head = INDEX_HEADER.pack(version, 0, STORE, SID, n_packs, 0, n_rows) + packs + keys + checks
    return head + xxhash.xxh3_128_digest(head) + rows


@pytest.fixture
def blocks_of_two(monkeypatch):
    """Few rows make many blocks."""
    monkeypatch.setattr(index, "INDEX_BLOCK_ROWS", 2)
    monkeypatch.setattr(index, "_BLOCK_SIZE", 2 * ROW.itemsize)


def stored(data: bytes, read: Callable[[int], None] = lambda size: None) -> StoredSegment:
    """A file as a large one is opened; `read` is told how many bytes are read."""

    def fill(offset, buffers):
        for buffer in buffers:
            buffer[:] = np.frombuffer(data, np.uint8, buffer.size, offset)
            offset += buffer.size
            read(buffer.size)

    return StoredSegment.open(fill, len(data), STORE, "here")


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
    for packs, rows in ((rest, b""), (b"", rest)):
        data = file_of(packs, n_packs, rows, n_rows)
        for parse in (
            lambda data=data: stored(data).load(),
            lambda data=data: Segment.from_bytes(data, STORE, ""),
        ):
            try:
                segment = parse()
            except FormatError:
                continue
            assert (len(segment.packs), len(segment.rows)) == (n_packs, n_rows)


@settings(deadline=None)
@given(st.binary(max_size=88 * 5), st.integers(0, 3), st.booleans())
def test_any_rows_with_good_checksums_are_safe_to_look_up(rest: bytes, n_packs: int, is_stored: bool):
    n_rows = len(rest) // 88
    data = file_of(bytes(32 * n_packs), n_packs, rest[: 88 * n_rows], n_rows)
    try:
        segment = stored(data) if is_stored else Segment.from_bytes(data, STORE, "here")
    except FormatError:
        return
    lookup = Index()
    lookup.add(segment)
    _, rows = lookup.find(ids_of([0, 1, 2]))
    rows = np.concatenate([rows, lookup.copies(bytes(32))])
    assert (rows["pack"] < max(1, n_packs)).all()
    assert (rows["raw_size"] <= CHUNK_SIZE_MAX).all()


# ---------------------------------------------------------------- files whose rows are read when looked up


@pytest.mark.usefixtures("blocks_of_two")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PACKS, st.sets(st.integers(0, 11)), st.sampled_from([1, 2, 1024]))
def test_a_stored_segment_says_what_one_in_memory_does(packs, banned, n_read):
    merged = Segment.merge(segments_of(packs))
    whole, large = Index(), Index()
    whole.add(merged)
    large.add(stored(merged.to_bytes(STORE, SID)))
    without = [name(n) for n in banned]
    ids = ids_of([*range(12), *range(12)])
    with mock.patch.object(index, "_N_BLOCKS_READ", n_read):
        for one, other in zip(whole.find(ids, without), large.find(ids, without), strict=True):
            assert one.tobytes() == other.tobytes()
        for chunk in range(12):
            assert whole.copies(chunk_id(chunk)).tobytes() == large.copies(chunk_id(chunk)).tobytes()
        assert large.segments[0].rows.tobytes() == merged.rows.tobytes()


MANY = Segment.merge(segments_of([[(n, 0)] for n in range(200)]))
MANY_FILE = MANY.to_bytes(STORE, SID)
ROWS_OFFSET = len(MANY_FILE) - MANY.rows.nbytes


def test_opening_reads_no_row_a_miss_none_and_a_hit_one_block():
    read: list[int] = []
    lookup = Index()
    lookup.add(stored(MANY_FILE, read.append))
    assert sum(read) == ROWS_OFFSET
    read.clear()
    assert not lookup.find(np.full((5, 32), 255, np.uint8))[0].any()
    assert sum(read) == 0
    assert lookup.find(ids_of([6, 6]))[0].all()
    assert sum(read) == 64 * ROW.itemsize
    read.clear()
    assert lookup.find(ids_of(list(range(200))))[0].all()
    assert sum(read) <= 2 * MANY.rows.nbytes  # ids of one key go on to the next row


@settings(deadline=None)
@given(st.integers(0, len(MANY_FILE) - 1), st.integers(1, 255))
def test_of_a_file_with_a_changed_byte_no_wrong_row_is_used(at: int, change: int):
    bad = bytearray(MANY_FILE)
    bad[at] ^= change
    lookup = Index()
    try:
        lookup.add(stored(bytes(bad)))
    except FormatError:
        assert at < ROWS_OFFSET
        return
    assert at >= ROWS_OFFSET
    for chunk in range(200):
        found, rows = lookup.find(ids_of([chunk]))
        rows = np.concatenate([rows[found], lookup.copies(chunk_id(chunk))])
        expected = MANY.rows[MANY.rows["offset"] == 1000 * chunk]
        assert all(row.tobytes() == expected.tobytes() for row in rows)
    # Found out by one look-up of the bad block, and covers nothing from then on.
    assert not found[0]
    assert name(0) not in lookup
    assert not lookup.segments


def test_a_file_that_is_gone_or_cut_when_a_row_is_read_covers_nothing():
    for error in (NotFoundError("gone"), CorruptError("cut")):
        segment = stored(MANY_FILE)
        lookup = Index()

        def fill(offset, buffers, error=error):
            raise error

        lookup.add(replace(segment, fill=fill))
        assert name(0) in lookup
        assert not lookup.find(ids_of([3]))[0].any()
        assert name(0) not in lookup


def test_what_another_file_says_too_stays_covered_when_one_is_damaged():
    bad = bytearray(MANY_FILE)
    bad[-1] ^= 1
    lookup = Index()
    lookup.add(segments_of([[(0, 0)]])[0])
    lookup.add(stored(bytes(bad)))
    assert name(1) in lookup
    lookup.check()
    assert name(0) in lookup
    assert name(1) not in lookup
    assert lookup.find(ids_of([0]))[0].all()


# ---------------------------------------------------------------- what a writer merges


def test_writers_keep_index_files_few_and_copy_each_row_a_few_times():
    files: dict[str, int] = {}
    most = n_copied = 0
    for n in range(10_000):
        names = to_merge(files)
        n_copied += sum(files[name] for name in names)
        files[f"index/{n}"] = 3 + sum(files.pop(name) for name in names)
        most = max(most, len(files))
    assert sum(files.values()) == 30_000
    assert most <= 32
    assert n_copied <= 8 * 30_000


def test_a_writer_merges_no_more_rows_than_it_may():
    files = {f"index/{n}": 1000 for n in range(1000)}
    names = to_merge(files)
    assert 16 <= len(names) <= index.MERGED_ROWS_MAX // 1000
    assert not to_merge({f"index/{n}": index.MERGED_ROWS_MAX for n in range(1000)})


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
    newer = file_of(b"", 0, b"", 0, VERSION + 1)
    with pytest.raises(UnsupportedVersionError, match="upgrade deltackpt"):
        Segment.from_bytes(newer, STORE, "here")
