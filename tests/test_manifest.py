"""Manifests and lists that come back, and the ones that could not have been written."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import xxhash
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from deltackpt import manifest
from deltackpt.errors import CorruptError, FormatError, UnsupportedVersionError
from deltackpt.format import (
    CHUNK_SIZE_MAX,
    LIST_HEADER,
    LIST_LEVEL_MAX,
    LIST_MAGIC,
    LIST_ROW,
    LIST_ROWS_MAX,
    MANIFEST_HEADER,
    MANIFEST_SIZE_MAX,
    VERSION,
)
from deltackpt.manifest import Manifest, TensorRow, build_lists, list_from_bytes, list_to_bytes
from deltackpt.types import DTYPE_SIZES

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 53), 1 << 53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def tensor_rows(draw: st.DrawFn) -> TensorRow:
    dtype = draw(st.sampled_from(sorted(DTYPE_SIZES)))
    shape = tuple(draw(st.lists(st.integers(0, 50), max_size=4)))
    size = DTYPE_SIZES[dtype] * math.prod(shape)
    return TensorRow(
        draw(st.text()),
        dtype,
        shape,
        draw(st.sampled_from(["numpy", "torch"])),
        size,
        draw(st.integers(0, LIST_LEVEL_MAX)) if size else 0,
        draw(st.binary(min_size=32, max_size=32)) if size else b"",
        draw(st.binary(min_size=16, max_size=16)),
    )


def wrap(body: bytes, *, raw_size: int | None = None, frame: bytes | None = None) -> bytes:
    """A manifest file whose checksums are right, whatever it says."""
    frame = zstandard.compress(body) if frame is None else frame
    raw_size = len(body) if raw_size is None else raw_size
    return MANIFEST_HEADER.pack(VERSION, 0, raw_size, len(frame), xxhash.xxh3_64_intdigest(frame)) + frame


def body_of(**changes: object) -> dict[str, object]:
    """A manifest's JSON with one float32 of shape (2,), and what is to be wrong with that."""
    row: dict[str, object] = {
        "name": "w",
        "dtype": "float32",
        "shape": [2],
        "framework": "numpy",
        "size": 8,
        "level": 0,
        "root": "ab" * 32,
        "fingerprint": "cd" * 16,
    }
    return {"features": [], "tensors": {k: [v] for k, v in (row | changes).items()}, "structure": None}


def parse(body: object) -> Manifest:
    return Manifest.from_bytes(wrap(json.dumps(body).encode()), "here")


@settings(deadline=None)
@given(JSON, st.lists(tensor_rows(), max_size=4))
def test_a_manifest_comes_back(structure, rows):
    made = Manifest(structure, rows)
    assert Manifest.from_bytes(made.to_bytes(), "here") == made
    assert Manifest.from_bytes(made.to_bytes(), "here").to_bytes() == made.to_bytes()


@settings(deadline=None)
@given(st.data())
def test_every_changed_or_missing_byte_of_a_manifest_is_found(data: st.DataObject):
    whole = Manifest({"map": {"a": 1}}, []).to_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    bad = bytearray(whole)
    bad[at] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(bad), whole[:at], whole + b"\0"):
        with pytest.raises(FormatError):
            Manifest.from_bytes(damaged, "here")


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_a_format_error(junk: bytes):
    for data in (junk, wrap(junk), wrap(b"", frame=junk, raw_size=len(junk))):
        with pytest.raises(FormatError):
            Manifest.from_bytes(data, "here")


_COLUMN_VALUES = JSON | st.sampled_from([[2], [2, 0], "float32", "ab" * 32, "cd" * 16, 8, 0, 1 << 50])


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(TensorRow.__slots__), _COLUMN_VALUES, max_size=3))
def test_any_columns_are_a_manifest_or_a_format_error(changes):
    try:
        row = parse(body_of(**changes)).tensors[0]
    except FormatError:
        return
    assert row.size == DTYPE_SIZES[row.dtype] * math.prod(row.shape)


@settings(deadline=None)
@given(JSON)
def test_any_json_is_a_manifest_or_a_format_error(body):
    with pytest.raises(FormatError):
        parse(body)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": "float31"}, "dtype 'float31' is not one of"),
        ({"framework": "jax"}, "framework 'jax'"),
        ({"shape": [3]}, "float32 of shape \\[3\\], size is 8"),
        ({"shape": [-2]}, "shape"),
        ({"shape": [2.0]}, "shape"),
        ({"shape": [True, 2]}, "shape"),
        ({"shape": 2}, "shape"),
        ({"level": 5}, "level 5"),
        ({"level": -1}, "level -1"),
        ({"shape": [0], "size": 0, "root": "", "level": 1}, "level 1"),
        ({"root": "ab" * 31}, "root"),
        ({"root": "zz" * 32}, "root"),
        ({"root": 7}, "root"),
        ({"fingerprint": ""}, "fingerprint"),
        ({"shape": [0], "size": 0}, "root"),
        ({"name": None}, "name None"),
        ({"shape": [CHUNK_SIZE_MAX], "size": 4 * CHUNK_SIZE_MAX}, "more than level 0 can hold"),
    ],
)
def test_a_row_that_cannot_be_says_what_is_wrong(changes, says: str):
    with pytest.raises(CorruptError, match=says):
        parse(body_of(**changes))


def test_a_shape_of_a_million_lengths_is_refused_at_once():
    with pytest.raises(CorruptError, match="of shape"):
        parse(body_of(shape=[1 << 40] * 1_000_000))


def test_columns_of_different_lengths_are_refused():
    body = body_of()
    body["tensors"]["name"].append("x")  # type: ignore[index]
    with pytest.raises(CorruptError, match="of different lengths"):
        parse(body)
    for column in TensorRow.__slots__:
        body = body_of()
        del body["tensors"][column]  # type: ignore[attr-defined]
        with pytest.raises(CorruptError, match="columns are missing"):
            parse(body)


def test_an_unknown_feature_or_version_needs_an_upgrade():
    with pytest.raises(UnsupportedVersionError, match=r"needs features \['shards'\]"):
        parse(body_of() | {"features": ["shards"]})
    with pytest.raises(UnsupportedVersionError, match="format version 2"):
        Manifest.from_bytes(MANIFEST_HEADER.pack(2, 0, 0, 0, 0), "here")


def test_a_manifest_that_claims_too_much_is_refused_before_it_is_allocated():
    frame = zstandard.compress(b"{}")
    with pytest.raises(CorruptError, match=f"claims {MANIFEST_SIZE_MAX + 1} bytes"):
        Manifest.from_bytes(wrap(b"", frame=frame, raw_size=MANIFEST_SIZE_MAX + 1), "here")
    with pytest.raises(CorruptError, match="frame of 2 bytes, header says 3"):
        Manifest.from_bytes(wrap(b"", frame=frame, raw_size=3), "here")


def test_a_frame_that_hides_its_size_is_refused():
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(b"{}" * 1000)
    with pytest.raises(FormatError):
        Manifest.from_bytes(wrap(b"", frame=frame, raw_size=2000), "here")


def test_a_manifest_too_large_to_be_read_is_not_written(monkeypatch):
    monkeypatch.setattr(manifest, "MANIFEST_SIZE_MAX", 100)
    with pytest.raises(FormatError, match="at most 100 allowed"):
        Manifest("x" * 200, []).to_bytes()


# -- lists


def chunks_of(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, 32), np.uint8), rng.integers(1, 1 << 20, n)


@pytest.mark.parametrize(
    ("n", "level"), [(2, 1), (1024, 1), (1025, 2), (2048, 2), (3000, 2), (1024 * 1024 + 1, 3)]
)
def test_lists_lead_from_the_root_to_every_chunk(n: int, level: int):
    ids, sizes = chunks_of(n)
    found_level, levels = build_lists(ids, sizes)
    assert (found_level, len(levels), len(levels[-1])) == (level, level, 1)
    by_id = {blake3(data).digest(): data for lists in levels for data in lists}
    rows = np.zeros(1, LIST_ROW)
    rows["id"] = np.frombuffer(blake3(levels[-1][0]).digest(), np.uint8)
    rows["size"] = sizes.sum()
    for at in range(level, 0, -1):
        rows = np.concatenate(
            [list_from_bytes(by_id[r["id"].tobytes()], at, int(r["size"]), "here") for r in rows]
        )
    assert np.array_equal(rows["id"], ids)
    assert np.array_equal(rows["size"], sizes)


def one_list() -> tuple[bytes, int]:
    ids, sizes = chunks_of(3)
    _, levels = build_lists(ids, sizes)
    return levels[0][0], int(sizes.sum())


@pytest.mark.parametrize(
    ("level", "flags", "n", "total"),
    [
        (2, 0, 3, None),
        (1, 1, 3, None),
        (1, 0, 0, None),
        (1, 0, 2, None),
        (1, 0, 4, None),
        (1, 0, LIST_ROWS_MAX + 1, None),
        (1, 0, 2**32 - 1, None),
        (1, 0, 3, 0),
        (1, 0, 3, 2**64 - 1),
    ],
)
def test_a_list_that_lies_is_refused(level: int, flags: int, n: int, total: int | None):
    data, size = one_list()
    bad = LIST_HEADER.pack(LIST_MAGIC, level, flags, n, 0, size if total is None else total)
    with pytest.raises(CorruptError, match="here: list"):
        list_from_bytes(bad + data[LIST_HEADER.size :], 1, size, "here")


def test_list_rows_must_add_up_even_if_they_overflow():
    rows = np.zeros(3, LIST_ROW)
    for sizes in ([0, 4, 4], [8, 8, 8], [2**63, 2**63, 8], [2**64 - 1, 1, 8]):
        rows["size"] = sizes
        data = LIST_HEADER.pack(LIST_MAGIC, 1, 0, 3, 0, 8) + rows.tobytes()
        with pytest.raises(CorruptError, match="do not add up to 8"):
            list_from_bytes(data, 1, 8, "here")


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_are_a_list_or_a_format_error(junk: bytes, size: int):
    for data in (junk, LIST_HEADER.pack(LIST_MAGIC, 1, 0, len(junk) // 40, 0, size) + junk):
        try:
            rows = list_from_bytes(data, 1, size, "here")
        except FormatError:
            continue
        assert int(rows["size"].sum()) == size


def test_a_list_is_the_bytes_the_format_says():
    rows = np.zeros(2, LIST_ROW)
    rows["id"][0], rows["id"][1], rows["size"] = 1, 2, [3, 4]
    data = list_to_bytes(1, rows)
    tail = b"\1" * 32 + b"\3" + bytes(7) + b"\2" * 32 + b"\4" + bytes(7)
    assert data == b"DCLS" + b"\1\0" + b"\0\0" + b"\2\0\0\0" + bytes(4) + b"\7" + bytes(7) + tail
