"""Packs that come back row for row, and the bytes they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from deltackpt import pack
from deltackpt.errors import CorruptError, FormatError, UnsupportedVersionError
from deltackpt.format import (
    CHUNK_SIZE_MAX,
    NO_BASE,
    PACK_HEADER,
    PACK_TRAILER,
    RECORD_HEADER,
    ROW,
    VERSION,
)
from deltackpt.pack import PackBuilder, PackName, Record

STORE = bytes(range(16))
NAME = PackName(b"s" * 16, 2, 7)


def build(payloads: list[bytes], name: PackName = NAME) -> bytes:
    builder = PackBuilder(STORE, name)
    parts = [builder.header()]
    for payload in payloads:
        chunk_id = blake3(payload).digest()
        record = Record.of(payload, codec=0, itemsize=4, raw_size=len(payload), chunk_id=chunk_id)
        builder.add(record)
        parts += [record.to_bytes(), payload]
    data = b"".join([*parts, builder.footer()])
    assert len(data) == builder.total_size
    return data


def rows_of(data: bytes) -> np.ndarray:
    return pack.read_footer(lambda offset, size: data[offset : offset + size], len(data), "here")


def problems(data: bytes) -> list[tuple[int, str]]:
    return list(
        pack.scan(lambda offset, size: data[offset : offset + size], len(data), rows_of(data), "here")
    )


def footer_of(rows: np.ndarray, footer_offset: int) -> bytes:
    table = rows.tobytes()
    return table + PACK_TRAILER.pack(len(rows), footer_offset, xxhash.xxh3_64_intdigest(table))


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=8))
def test_a_pack_tells_every_record_it_was_given(payloads: list[bytes]):
    data = build(payloads)
    assert pack.read_header(data, "here", store=STORE, name=NAME) == NAME
    rows = rows_of(data)
    assert [row["id"].tobytes() for row in rows] == [blake3(p).digest() for p in payloads]
    for row, payload in zip(rows, payloads, strict=True):
        start = int(row["offset"]) + RECORD_HEADER.size
        assert data[start : start + int(row["stored_size"])] == payload
    assert problems(data) == []


def test_a_copied_record_is_the_same_bytes():
    old = build([b"first", b"second"])
    row = rows_of(old)[1]
    taken = old[int(row["offset"]) :][: RECORD_HEADER.size + int(row["stored_size"])]
    builder = PackBuilder(STORE, PackName(b"t" * 16, 0, 0))
    builder.add(Record.from_bytes(taken, "here"))
    data = builder.header() + taken + builder.footer()
    assert problems(data) == []
    assert rows_of(data)[0]["id"].tobytes() == blake3(b"second").digest()


@settings(deadline=None)
@given(st.data())
def test_every_changed_byte_of_a_pack_is_found(data: st.DataObject):
    whole = build([b"some payload", b"", b"another payload" * 5])
    at = data.draw(st.integers(0, len(whole) - 1))
    bad = bytearray(whole)
    bad[at] ^= data.draw(st.integers(1, 255))
    try:
        pack.read_header(bytes(bad), "here", store=STORE, name=NAME)
        found = problems(bytes(bad))
    except CorruptError:
        return
    assert found


@settings(deadline=None)
@given(st.data())
def test_every_cut_of_a_pack_is_found(data: st.DataObject):
    whole = build([b"some payload", b"another payload" * 5])
    with pytest.raises(CorruptError):
        rows_of(whole[: data.draw(st.integers(0, len(whole) - 1))])


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_pack_or_a_format_error(junk: bytes):
    for parse in (
        lambda: pack.read_header(junk, "here"),
        lambda: rows_of(junk),
        lambda: Record.from_bytes(junk, "here"),
    ):
        with pytest.raises(FormatError):
            parse()


@settings(deadline=None)
@given(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=200)))
def test_a_trailer_that_lies_with_a_good_checksum_is_refused(lie: tuple[int, int, bytes]):
    n_records, footer_offset, table = lie
    trailer = PACK_TRAILER.pack(n_records, footer_offset, xxhash.xxh3_64_intdigest(table))
    with pytest.raises(CorruptError):
        rows_of(bytes(PACK_HEADER.size) + b"x" + table + trailer)


def test_records_that_leave_gaps_or_overlap_are_refused():
    whole = build([b"one", b"two"])
    rows = rows_of(whole).copy()
    footer_offset = len(whole) - PACK_TRAILER.size - rows.nbytes
    for column, value in [("offset", rows["offset"][1] - 1), ("stored_size", 2), ("stored_size", 4)]:
        bad = rows.copy()
        bad[column][1] = value
        with pytest.raises(CorruptError, match="do not fill the pack"):
            rows_of(whole[:footer_offset] + footer_of(bad, footer_offset))


def test_a_row_cannot_promise_more_than_a_chunk_may_have():
    whole = build([b"one"])
    rows = rows_of(whole).copy()
    footer_offset = len(whole) - PACK_TRAILER.size - rows.nbytes
    rows["raw_size"] = CHUNK_SIZE_MAX + 1
    with pytest.raises(CorruptError, match="at most 67108864 allowed"):
        rows_of(whole[:footer_offset] + footer_of(rows, footer_offset))


@pytest.mark.parametrize("field", ["raw_size", "stored_size"])
def test_a_record_cannot_claim_more_than_a_chunk_may_have(field: str):
    record = Record(0, 0, 1, 3, 3, bytes(32), NO_BASE, 0)._replace(**{field: CHUNK_SIZE_MAX + 1})
    with pytest.raises(CorruptError, match="at most 67108864 allowed"):
        Record.from_bytes(record.to_bytes(), "here")


def test_a_depth_needs_a_base_and_a_base_a_depth():
    for depth, base in [(1, NO_BASE), (0, b"b" * 32)]:
        with pytest.raises(CorruptError, match="does not fit base"):
            Record.from_bytes(Record(0, depth, 1, 3, 3, bytes(32), base, 0).to_bytes(), "here")


def test_a_short_record_header_says_where_and_how_short():
    with pytest.raises(CorruptError, match="pack 7f3a @ 96: Record header has 3 bytes, needs 96"):
        Record.from_bytes(b"DCR", "pack 7f3a @ 96")


def test_a_pack_of_another_store_or_another_name_is_refused():
    data = build([])
    with pytest.raises(CorruptError, match="pack of store"):
        pack.read_header(data, "here", store=bytes(16))
    with pytest.raises(CorruptError, match="header says packs/7373"):
        pack.read_header(data, "here", name=PackName(b"s" * 16, 2, 8))


def test_a_pack_of_a_newer_version_needs_an_upgrade():
    for version, flags in [(VERSION + 1, 0), (VERSION, 1)]:
        with pytest.raises(UnsupportedVersionError, match="reads up to 1"):
            pack.read_header(PACK_HEADER.pack(version, flags, STORE, NAME.sid, 2, 7, 0), "here")


def test_a_record_must_be_what_its_row_says():
    data = build([b"one"])
    row = rows_of(data)[0]
    record = Record.from_bytes(data[int(row["offset"]) :], "here")
    pack.check_row(record, row, "here")
    for name in ROW.names:
        if name in ("offset", "pack"):
            continue  # where it stands, not what it is
        other = row.copy()
        other[name] = other[name] ^ 1 if name not in ("id", "base") else np.full(32, 9, np.uint8)
        with pytest.raises(CorruptError, match="differs from its row"):
            pack.check_row(record, other, "here")


@settings(deadline=None)
@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_packs_name_comes_back(sid: bytes, rank: int, seq: int):
    name = PackName(sid, rank, seq)
    assert PackName.from_key(name.key) == name


@pytest.mark.parametrize(
    "key",
    [
        "packs/",
        "packs/.pack",
        "packs/73-0-0.pack",
        f"packs/{'73' * 16}-0.pack",
        f"packs/{'73' * 16}-0-0",
        f"packs/{'73' * 16}-00-0.pack",
        f"packs/{'73' * 16}-0-+1.pack",
        f"packs/{'73' * 16}-0-0-0.pack",
        f"packs/{'AA' * 16}-0-0.pack",
        f"packs/{'73' * 16}-0-{1 << 32}.pack",
        f"packs/{'73' * 16}-{'9' * 5000}-0.pack",
    ],
)
def test_other_names_are_no_packs(key: str):
    assert PackName.from_key(key) is None


@settings(deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_a_name_or_none(text: str):
    for key in (text, f"packs/{text}.pack"):
        name = PackName.from_key(key)
        assert name is None or name.key.endswith(key)
