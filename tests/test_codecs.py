"""Codecs: exact, never larger than raw, safe on any bytes, and paying where they should."""

from __future__ import annotations

import struct

import lz4.block
import numpy as np
import pytest
import zstandard
from coded import payload_of
from hypothesis import given, settings
from hypothesis import strategies as st

from deltackpt import codecs, kernels
from deltackpt.codecs import DELTAS, ITEMSIZES, NAMES, Kind, coder, planes
from deltackpt.codecs import lz4 as lz4_codec
from deltackpt.errors import CorruptError, FormatError, UnsupportedVersionError
from deltackpt.types import U8

KINDS = st.builds(Kind, st.sampled_from(ITEMSIZES), st.booleans())
ALL = sorted(set(NAMES) - DELTAS)


@st.composite
def chunks(draw: st.DrawFn, size_max: int = 40_000) -> U8:
    """Noise, constants, runs and few values, of any size."""
    n = draw(st.integers(0, size_max) | st.integers(0, 40))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    kind = draw(st.sampled_from(["noise", "zeros", "constant", "few", "floats", "runs", "rows"]))
    if kind == "noise":
        return rng.integers(0, 256, n, np.uint8)
    if kind == "zeros":
        return np.zeros(n, np.uint8)
    if kind == "constant":
        return np.frombuffer((rng.bytes(draw(st.sampled_from([1, 2, 3, 4, 8]))) * n)[:n], np.uint8)
    if kind == "few":
        return rng.integers(0, 3, n, np.uint8)
    if kind in ("floats", "rows"):
        floats = rng.standard_normal((n // 64 + 1, 16)).astype(np.float32)
        if kind == "rows":
            floats[rng.random(len(floats)) < rng.random()] = 0
        return floats.reshape(-1).view(np.uint8)[:n]
    return np.repeat(rng.integers(0, 256, n // 50 + 1, np.uint8), 50)[:n]


def decode(codec: int, payload: bytes | U8, itemsize: int, size: int) -> bytes:
    out = np.full(size, 0xEE, np.uint8)
    codecs.decode(codec, np.frombuffer(payload, np.uint8), itemsize, out, "here")
    return out.tobytes()


@settings(deadline=None)
@given(chunks(), KINDS)
def test_what_is_encoded_comes_back_and_is_never_larger(data: U8, kind: Kind):
    before = data.tobytes()
    codec, payload = codecs.encode(data, kind)
    assert len(payload) <= data.size
    assert decode(codec, payload, kind.itemsize, data.size) == before
    assert data.tobytes() == before


@settings(deadline=None)
@given(chunks(), KINDS, st.sampled_from(ALL))
def test_every_codec_gives_back_what_another_might_have_chosen(data: U8, kind: Kind, codec: int):
    payload = payload_of(codec, data, kind)
    assert decode(codec, payload, kind.itemsize, data.size) == data.tobytes()


@settings(deadline=None)
@given(chunks(), KINDS, st.sampled_from(ALL), st.integers(-9, 9).filter(bool))
def test_a_payload_decodes_to_its_exact_size_only(data: U8, kind: Kind, codec: int, more: int):
    payload = payload_of(codec, data, kind)
    # Planes that are all zero have no size of their own: there the chunk id tells.
    all_zero = codec == planes.NUMBER and not data[: data.size - data.size % kind.itemsize].any()
    if data.size + more >= 0 and not all_zero:
        with pytest.raises(CorruptError):
            decode(codec, payload, kind.itemsize, data.size + more)


@settings(deadline=None)
@given(st.binary(max_size=300), KINDS, st.sampled_from(ALL), st.integers(0, 400))
def test_any_bytes_decode_or_are_a_format_error(junk: bytes, kind: Kind, codec: int, size: int):
    try:
        decode(codec, junk, kind.itemsize, size)
    except FormatError:
        return


@settings(deadline=None)
@given(chunks(2000), KINDS, st.sampled_from([1, 2]), st.data())
def test_any_changed_payload_decodes_or_is_a_format_error(
    data: U8, kind: Kind, codec: int, draw: st.DataObject
):
    payload = bytearray(payload_of(codec, data, kind))
    for _ in range(draw.draw(st.integers(1, 3))):
        if payload:
            payload[draw.draw(st.integers(0, len(payload) - 1))] = draw.draw(st.integers(0, 255))
    cut = draw.draw(st.integers(0, len(payload)))
    for bad in (bytes(payload), bytes(payload[:cut]), bytes(payload) + b"\0"):
        try:
            decode(codec, bad, kind.itemsize, data.size)
        except FormatError:
            continue


@settings(deadline=None)
@given(chunks(), KINDS)
def test_c_and_numpy_kernels_give_the_same_payload(data: U8, kind: Kind):
    chosen, payload = codecs.encode(data, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_native", None)
        other, twin = codecs.encode(data, kind)
        assert decode(chosen, payload, kind.itemsize, data.size) == data.tobytes()
    assert (other, bytes(twin)) == (chosen, bytes(payload))


# -- what pays

N = 1 << 18
rng = np.random.default_rng(0)
WEIGHTS = (rng.standard_normal(N) * 0.02).astype(np.float32)
SPARSE = rng.random(N) < 0.01
ROWS = np.where(rng.random((N // 64, 1)) < 0.5, WEIGHTS.reshape(-1, 64), 0).astype(np.float32)
WORDS = [bytes(rng.integers(97, 123, n, np.uint8)) for n in rng.integers(3, 12, 300)]
CASES = {
    # name: array, codec that should win, payload / raw at most
    "zeros": (np.zeros(N, np.float32), "planes", 0.0001),
    "constant": (np.full(N, 0.1, np.float32), "planes", 0.001),
    "noise": (rng.integers(0, 256, N, np.uint8), "raw", 1.0),
    "noise of 8 bytes": (rng.integers(0, 1 << 63, N // 8, np.uint64), "raw", 1.0),
    "float32 weights": (WEIGHTS, "planes", 0.84),
    "float64": (WEIGHTS.astype(np.float64) + rng.standard_normal(N) * 1e-9, "planes", 0.90),
    "bfloat16 weights": ((WEIGHTS.view(np.uint32) >> 16).astype(np.uint16), "planes", 0.67),
    "sparse moments": (np.where(SPARSE, WEIGHTS, 0).astype(np.float32), "planes", 0.04),
    "moments with rows of zeros": (ROWS, "planes", 0.46),
    "bfloat16 moments with rows of zeros": ((ROWS.view(np.uint32) >> 16).astype(np.uint16), "planes", 0.35),
    "token counts": (rng.integers(0, 50_000, N // 8), "planes", 0.26),
    "token ids in runs": (np.repeat(rng.integers(0, 50_000, N // 40), 10).astype(np.int32), "lz4", 0.15),
    "token ids in long runs": (
        np.repeat(rng.integers(0, 50_000, N // 400), 100).astype(np.int32),
        "planes",
        0.01,
    ),
    "text": (np.frombuffer(b" ".join(WORDS[i] for i in rng.integers(0, 300, N // 4)), np.uint8), "lz4", 0.4),
}
FLOATS = {"bfloat16 weights", "bfloat16 moments with rows of zeros"}


@pytest.mark.parametrize("name", CASES)
def test_the_codec_that_pays_is_chosen(name: str):
    array, winner, share = CASES[name]
    is_float = array.dtype.kind == "f" or name in FLOATS
    kind = Kind(array.itemsize, is_float)
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)[:N]
    codec, payload = codecs.encode(data, kind)
    assert NAMES[codec] == winner
    assert len(payload) <= share * data.size
    assert decode(codec, payload, kind.itemsize, data.size) == data.tobytes()


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
@pytest.mark.parametrize("width", [16, 64, 512])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_rows_of_zeros_cost_no_more_than_the_smallest_codec(itemsize: int, width: int, share: float):
    """Entropies know nothing of runs, and a sample of 16 KiB little of rows: both are tried."""
    rng = np.random.default_rng(0)
    moments = (rng.standard_normal((N // 4 // width, width)) * 1e-3).astype("<f8" if itemsize == 8 else "<f4")
    moments[rng.random(len(moments)) < share] = 0
    data = np.ascontiguousarray(moments).reshape(-1).view(np.uint8)
    if itemsize == 2:
        data = data.reshape(-1, 4)[:, 2:].reshape(-1)  # as bfloat16
    kind = Kind(itemsize, True)
    encoded = codecs.encode(data, kind)
    assert len(encoded.payload) <= min(payload_of(codec, data, kind).size for codec in ALL)
    again = codecs.encode(data, kind)
    assert (again.codec, bytes(again.payload)) == (encoded.codec, bytes(encoded.payload))


def test_what_changes_while_it_is_encoded_is_no_fault_of_lz4s(monkeypatch, caplog):
    data = np.frombuffer(b"abcdefgh" * 1000, np.uint8).copy()
    before, compress = data.tobytes(), lz4.block.compress

    def slow(*args, **options):
        block = compress(*args, **options)
        data[:] = 0
        return block

    monkeypatch.setattr(lz4.block, "compress", slow)
    block = lz4_codec.encode(data)
    assert decode(lz4_codec.NUMBER, block, 1, data.size) == before
    assert not caplog.records


def test_the_sign_beside_the_mantissa_makes_floats_smaller():
    for data, size in [(WEIGHTS.view(np.uint8), 4), (CASES["bfloat16 weights"][0].view(np.uint8), 2)]:
        assert len(payload_of(2, data, Kind(size, True))) < len(payload_of(2, data, Kind(size, False)))


def test_a_chunk_without_one_whole_element_is_raw():
    assert codecs.encode(np.arange(7, dtype=np.uint8), Kind(8, True)).codec == codecs.raw.NUMBER
    codec, payload = codecs.encode(np.zeros(0, np.uint8), Kind(4, True))
    assert (codec, len(payload)) == (codecs.raw.NUMBER, 0)


def test_nan_payloads_and_negative_zero_come_back():
    bits = np.tile(np.array([0x7FC00001, 0xFF800000, 0x80000000, 1, 0x7F800001], "<u4"), 2000)
    codec, payload = codecs.encode(bits.view(np.uint8), Kind(4, True))
    assert NAMES[codec] != "raw"
    assert decode(codec, payload, 4, bits.nbytes) == bits.tobytes()


# -- what lies


def planes_payload(n: int, code: int, body: bytes, *, size: int | None = None) -> bytes:
    """Codec 2 of one plane of `n` bytes, whatever its body."""
    return (
        struct.pack("<BBBB", 0, 1, 0, 0)
        + struct.pack("<BI", code, len(body) if size is None else size)
        + body
    )


def test_a_frame_that_claims_more_than_its_plane_is_refused_before_it_is_allocated():
    bomb = zstandard.compress(bytes(1 << 26))
    with pytest.raises(CorruptError, match="plane 0: frame does not hold 100 bytes"):
        decode(planes.NUMBER, planes_payload(100, coder.ZSTD, bomb), 1, 100)


def test_a_frame_that_hides_or_fakes_its_size_is_refused():
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    skippable = b"\x50\x2a\x4d\x18" + struct.pack("<I", 100) + bytes(100)
    two = zstandard.compress(bytes(100)) * 2
    for body in (hidden, skippable, two, b"", two[:7]):
        with pytest.raises(CorruptError):
            decode(planes.NUMBER, planes_payload(100, coder.ZSTD, body), 1, 100)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_small_planes_cannot_be_faked_either(n: int):
    for size in range(4):
        skippable = b"\x50\x2a\x4d\x18" + struct.pack("<I", size) + bytes(size)
        if n == size == 0:
            continue
        with pytest.raises(CorruptError):
            decode(planes.NUMBER, planes_payload(n, coder.ZSTD, skippable), 1, n)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\1\0\0",
        planes_payload(100, 3, b"x" * 100),
        planes_payload(100, coder.ZERO, b"x"),
        planes_payload(100, coder.RAW, b"x" * 99),
        planes_payload(100, coder.RAW, b"x" * 101),
        planes_payload(100, coder.RAW, b"x" * 100, size=2**32 - 1),
        planes_payload(100, coder.RAW, b"x" * 100) + b"tail",
        b"\2" + planes_payload(100, coder.RAW, b"x" * 100)[1:],
        b"\0\2" + planes_payload(100, coder.RAW, b"x" * 100)[2:],
        b"\0\1\1" + planes_payload(100, coder.RAW, b"x" * 100)[3:],
        b"\0\1\0\1" + planes_payload(100, coder.RAW, b"x" * 100)[4:],
    ],
)
def test_planes_that_do_not_fit_are_refused(payload: bytes):
    with pytest.raises(CorruptError, match="here: planes: "):
        decode(planes.NUMBER, payload, 1, 100)


def test_an_lz4_block_that_holds_more_or_less_is_refused():
    block = lz4.block.compress(bytes(1000), store_size=False)
    for size in (0, 1, 999, 1001):
        with pytest.raises(CorruptError, match="here: lz4: block"):
            decode(lz4_codec.NUMBER, block, 1, size)


def test_an_unknown_codec_needs_an_upgrade_and_an_odd_element_size_is_damage():
    with pytest.raises(UnsupportedVersionError, match="here: codec 99"):
        decode(99, b"", 1, 0)
    with pytest.raises(CorruptError, match="element size 3"):
        decode(0, b"", 3, 0)


def test_numbers_never_change_their_meaning():
    assert NAMES == {0: "raw", 1: "lz4", 2: "planes", 3: "delta-dense", 4: "delta-sparse"}


def test_frames_of_nothing_are_damage():
    """Eight of them in one call made zstandard 0.25 free memory twice."""
    frame = zstandard.ZstdCompressor().compress(b"")
    table = b"".join(struct.pack("<BI", 2, len(frame)) for _ in range(8))
    payload = np.frombuffer(bytes([0, 8, 3, 0]) + table + 8 * frame + b"abc", np.uint8)
    with pytest.raises(CorruptError, match="kind 2 with 9 bytes for 0"):
        codecs.decode(2, payload, 8, np.empty(3, np.uint8), "here")
