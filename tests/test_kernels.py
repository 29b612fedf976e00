"""The compiled kernels against their NumPy twins, and the twins against something obviously right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltackpt import kernels
from deltackpt.errors import InvalidInputError
from deltackpt.kernels import Move, Splitting
from deltackpt.types import U8

needs_native = pytest.mark.skipif(
    not kernels.NATIVE, reason="no compiled kernels: nothing to compare the twin with"
)

ALIGNS = st.sampled_from([2, 4, 8])
WIDTHS = st.sampled_from([1, 2, 4, 8])


def unaligned(data: bytes, offset: int) -> U8:
    """The bytes as an array whose first byte lies `offset` after an aligned address."""
    room = np.empty(len(data) + offset, np.uint8)
    room[offset:] = np.frombuffer(data, np.uint8)
    return room[offset:]


@st.composite
def buffers(draw: st.DrawFn, size_max: int = 12_000) -> U8:
    """Noise, runs of zeros and of other constant words, in any order; any size, any alignment."""

    def part() -> bytes:
        n = draw(st.integers(0, size_max // 4))
        kind = draw(st.sampled_from(["noise", "zeros", "word", "few values"]))
        rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
        if kind == "noise":
            return rng.bytes(n)
        if kind == "few values":
            return rng.integers(0, 3, n, dtype=np.uint8).tobytes()
        word = b"\0" if kind == "zeros" else draw(st.binary(min_size=1, max_size=8))
        return (word * n)[:n]

    return unaligned(b"".join(part() for _ in range(draw(st.integers(0, 4)))), draw(st.integers(0, 9)))


@st.composite
def cut_rules(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(align, min_size, max_size, threshold), so that hits, maxima and tails all happen."""
    align = draw(ALIGNS)
    min_size = draw(st.integers(1, 3000))
    max_size = draw(st.integers(min_size + align, 12_000))
    threshold = draw(st.sampled_from([0, 1, 1 << 20, 1 << 23, 1 << 26, 1 << 30, (1 << 32) - 1]))
    return align, min_size, max_size, threshold


def cut_slowly(data: U8, align: int, min_size: int, max_size: int, threshold: int) -> list[int]:
    """`kernels.cut` as its docstring says it, in Python's own integers."""
    mask = (1 << 32) - 1

    def x(i: int) -> int:
        if i < 0:
            return 0
        v = int.from_bytes(data[i * align : (i + 1) * align].tobytes(), "little")
        return v if align < 8 else ((v & mask) + (v >> 32) * 0xC2B2AE3D) & mask

    def rotl(v: int, n: int) -> int:
        return (v << n | v >> (32 - n)) & mask

    def a(i: int) -> int:
        return (x(i) * 0x9E3779B1 + rotl(x(i - 1), 11)) & mask

    def h(i: int) -> int:
        return ((a(i) ^ rotl(a(i - 2), 15)) * 0x85EBCA77 & mask) ^ 0xA5C3965A

    ends, start = [], 0
    for i in range(data.size // align):
        size = (i + 1) * align - start
        if size >= min_size and (h(i) < threshold or size + align > max_size):
            start = (i + 1) * align
            ends.append(start)
    return ends if start == data.size else [*ends, data.size]


# ---- cut ----


@settings(deadline=None, max_examples=30)
@given(buffers(size_max=2000), cut_rules())
def test_the_twin_cuts_as_the_docstring_says(data: U8, rule: tuple[int, int, int, int]):
    assert kernels.cut_ref(data, *rule).tolist() == cut_slowly(data, *rule)


@needs_native
@settings(deadline=None, max_examples=400)
@given(buffers(), cut_rules())
def test_c_and_numpy_cut_alike(data: U8, rule: tuple[int, int, int, int]):
    assert kernels.cut(data, *rule).tolist() == kernels.cut_ref(data, *rule).tolist()


@needs_native
@pytest.mark.parametrize("align", [2, 4, 8])
@pytest.mark.parametrize("offset", [0, 1])
def test_c_and_numpy_cut_alike_across_blocks(align: int, offset: int):
    data = unaligned(np.random.default_rng(3).bytes(1_500_007), offset)
    data[400_000:600_000] = 0
    ends = kernels.cut(data, align, 4096, 65536, align << 18)
    assert ends.size > 40
    assert ends.tolist() == kernels.cut_ref(data, align, 4096, 65536, align << 18).tolist()


@settings(deadline=None)
@given(buffers(), cut_rules())
def test_chunks_cover_the_data_and_keep_the_sizes(data: U8, rule: tuple[int, int, int, int]):
    align, min_size, max_size, _ = rule
    ends = kernels.cut(data, *rule)
    assert ends.dtype == np.int64
    sizes = np.diff(ends, prepend=0)
    assert sizes.sum() == data.size
    assert (sizes > 0).all()
    assert (sizes[:-1] >= min_size).all()
    assert (sizes <= max_size).all()
    assert (ends[:-1] % align == 0).all()


@settings(deadline=None)
@given(buffers(), ALIGNS)
def test_what_follows_an_end_is_cut_as_if_it_stood_alone(data: U8, align: int):
    rule = (
        align,
        64,
        1024,
        1 << 26,
    )  # 64 bytes: the hash at the first place that may be an end lies in the chunk
    ends = kernels.cut(data, *rule).tolist()
    for nth, end in enumerate(ends[:-1], 1):
        assert (kernels.cut(data[end:], *rule) + end).tolist() == ends[nth:]


@pytest.mark.parametrize("align", [2, 4, 8])
def test_zeros_are_cut_at_the_maximum_only(align: int):
    ends = kernels.cut(np.zeros(10_000, np.uint8), align, 512, 2048, 1 << 31)
    assert ends.tolist() == [2048, 4096, 6144, 8192, 10_000]


def usual_constants(align: int) -> list[int]:
    """Repeated bytes, small integers, powers of two and of ten, in the element types of `align` bytes."""
    floats = np.concatenate(
        [[1.0, -1.0, 0.0, -0.0, np.inf, np.nan], 2.0 ** np.arange(-14, 15), 10.0 ** np.arange(-6, 4)]
    )
    views = {2: ["<f2"], 4: ["<f4"], 8: ["<f8"]}[align]
    words = [int(w) for view in views for w in floats.astype(view).view(f"<u{align}")]
    if align == 2:
        words += [int(w) >> 16 for w in floats.astype("<f4").view("<u4")]  # bfloat16
    words += [int.from_bytes(bytes([b]) * align, "little") for b in range(256)]
    return words + list(range(256)) + [(1 << 8 * align) - 1 - i for i in range(256)]


@pytest.mark.parametrize("align", [2, 4, 8])
def test_usual_constants_are_cut_at_the_maximum_only(align: int):
    # 1/4000, the bound that kernels.py states, is 6 to 25 times the threshold of the default chunker.
    for word in usual_constants(align):
        data = np.frombuffer(word.to_bytes(align, "little") * 64, np.uint8)
        ends = kernels.cut_ref(data, align, 8 * align, 16 * align, (1 << 32) // 4000)
        assert ends.tolist() == [16 * align * i for i in range(1, 5)], hex(word)


def test_a_constant_that_is_a_hit_is_cut_at_every_minimum():
    word = next(
        w
        for w in range(1 << 16)
        if cut_slowly(np.full(8, w, "<u4").view(np.uint8), 4, 16, 32, 1 << 18) == [16, 32]
    )
    data = np.full(64, word, "<u4").view(np.uint8)
    assert kernels.cut(data, 4, 16, 64, 1 << 18).tolist() == list(range(16, 257, 16))


def test_bytes_behind_the_last_element_are_in_the_last_chunk():
    assert kernels.cut(np.zeros(1003, np.uint8), 4, 100, 2000, 0).tolist() == [1003]
    assert kernels.cut(np.zeros(1003, np.uint8), 4, 100, 1000, 0).tolist() == [1000, 1003]
    assert kernels.cut(np.zeros(3, np.uint8), 8, 8, 16, 0).tolist() == [3]


def test_empty_data_has_no_chunks():
    assert kernels.cut(np.empty(0, np.uint8), 4, 4, 8, 0).tolist() == []
    assert kernels.cut_ref(np.empty(0, np.uint8), 4, 4, 8, 0).tolist() == []


@pytest.mark.parametrize("function", [kernels.cut, kernels.cut_ref])
@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ((3, 4, 8, 0), "align is 3"),
        ((4, 0, 8, 0), "sizes are 0 to 8"),
        ((4, 8, 7, 0), "sizes are 8 to 7"),
        ((8, 9, 15, 0), "sizes are 9 to 15"),
        ((4, 4, 1 << 63, 0), "sizes are 4 to"),
        ((4, 4, 8, -1), "threshold is -1"),
        ((4, 4, 8, 1 << 32), "threshold is 4294967296"),
    ],
)
def test_cut_names_the_argument_that_is_wrong(function, rule: tuple[int, int, int, int], found: str):
    with pytest.raises(InvalidInputError, match=found):
        function(np.zeros(64, np.uint8), *rule)


@pytest.mark.parametrize(
    "data", [np.zeros(8, np.int8), np.zeros((2, 4), np.uint8), np.zeros(8, np.uint8)[::2], b"bytes"]
)
def test_kernels_take_contiguous_bytes_only(data):
    for call in (
        lambda: kernels.cut(data, 4, 4, 8, 0),
        lambda: kernels.split_planes(data, 4, False),
        lambda: kernels.join_planes(data, 4, False, np.zeros(8, np.uint8)),
        lambda: kernels.join_planes(np.zeros(8, np.uint8), 4, False, data),
        lambda: kernels.entropy(data),
    ):
        with pytest.raises(InvalidInputError, match="expected contiguous uint8"):
            call()


# ---- byte planes ----


@settings(deadline=None)
@given(buffers(), WIDTHS, st.booleans())
def test_planes_join_to_what_was_split(data: U8, itemsize: int, rotate: bool):
    data = data[: data.size // itemsize * itemsize]
    before = data.copy()
    planes = kernels.split_planes(data, itemsize, rotate)
    out = unaligned(bytes(data.size), 3)
    kernels.join_planes(planes, itemsize, rotate, out)
    assert np.array_equal(out, data)
    assert np.array_equal(before, data)


@needs_native
@settings(deadline=None)
@given(buffers(), WIDTHS, st.booleans())
def test_c_and_numpy_split_and_join_alike(data: U8, itemsize: int, rotate: bool):
    data = data[: data.size // itemsize * itemsize]
    planes = kernels.split_planes_ref(data, itemsize, rotate)
    assert np.array_equal(kernels.split_planes(data, itemsize, rotate), planes)
    ours, theirs = np.empty_like(data), np.empty_like(data)
    kernels.join_planes(data, itemsize, rotate, ours)
    kernels.join_planes_ref(data, itemsize, rotate, theirs)
    assert np.array_equal(ours, theirs)


def test_rotation_leaves_the_exponent_alone_in_the_top_plane():
    data = np.array([1.5, -1.5, 1.0, -1.0], "<f4").view(np.uint8)
    assert kernels.split_planes(data, 4, True).reshape(4, 4).tolist() == [
        [0, 1, 0, 1],
        [0] * 4,
        [128, 128, 0, 0],
        [127] * 4,
    ]
    assert kernels.split_planes(data, 4, False).reshape(4, 4)[3].tolist() == [63, 191, 63, 191]


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("rotate", [False, True])
def test_nan_payloads_and_negative_zero_survive(dtype: str, rotate: bool):
    itemsize = np.dtype(dtype).itemsize
    floats = np.array([np.nan, -np.nan, -0.0, np.inf, -np.inf, 0.0], dtype)
    words = np.concatenate(
        [floats.view(f"<u{itemsize}"), floats.view(f"<u{itemsize}") | 1]
    )  # signalling NaNs too
    data = words.view(np.uint8)
    out = np.empty_like(data)
    kernels.join_planes(kernels.split_planes(data, itemsize, rotate), itemsize, rotate, out)
    assert out.tobytes() == data.tobytes()


@pytest.mark.parametrize("split", [kernels.split_planes, kernels.split_planes_ref])
def test_planes_never_alias_the_data(split):
    data = np.zeros(8, np.uint8)
    assert not np.shares_memory(split(data, 1, False), data)


@pytest.mark.parametrize("join", [kernels.join_planes, kernels.join_planes_ref])
def test_join_refuses_an_out_that_does_not_fit(join):
    planes, frozen = np.zeros(8, np.uint8), np.zeros(8, np.uint8)
    frozen.flags.writeable = False
    for out, found in [(np.zeros(7, np.uint8), "has 7 bytes"), (planes, "overlaps"), (frozen, "read-only")]:
        with pytest.raises(InvalidInputError, match=found):
            join(planes, 4, False, out)


@pytest.mark.parametrize("split", [kernels.split_planes, kernels.split_planes_ref])
def test_split_refuses_what_is_not_whole_elements(split):
    with pytest.raises(InvalidInputError, match="itemsize is 3"):
        split(np.zeros(6, np.uint8), 3, False)
    with pytest.raises(InvalidInputError, match="size is 6, expected a multiple of 4"):
        split(np.zeros(6, np.uint8), 4, False)


# ---- entropy ----


@settings(deadline=None)
@given(buffers(), st.integers(1, 5000))
def test_c_and_numpy_agree_on_entropy_exactly(data: U8, n_samples: int):
    assert kernels.entropy(data, n_samples) == kernels.entropy_ref(data, n_samples)


@settings(deadline=None)
@given(buffers())
def test_entropy_of_a_whole_buffer_is_shannons(data: U8):
    n = data.size
    shannon = sum(c / n * log2(n / c) for c in Counter(data.tolist()).values())
    assert kernels.entropy(data, 1 << 20) == pytest.approx(shannon, abs=1e-9)


def test_entropy_tells_noise_from_text_and_from_a_constant():
    noise = np.random.default_rng(0).integers(0, 256, 1 << 18, dtype=np.uint8)
    assert kernels.entropy(noise) > 7.9
    assert kernels.entropy(noise & 15) < 4.01
    assert kernels.entropy(np.full(1 << 18, 7, np.uint8)) == 0.0
    assert kernels.entropy(np.empty(0, np.uint8)) == 0.0


def test_the_sample_of_a_matrix_is_not_one_column():
    rows = np.tile(np.arange(64, dtype=np.uint8), 4096)
    assert kernels.entropy(rows) == pytest.approx(6.0, abs=0.01)


def test_entropy_needs_a_sample():
    with pytest.raises(InvalidInputError, match="n_samples is 0"):
        kernels.entropy(np.zeros(8, np.uint8), 0)


# ---- many buffers ----


@settings(deadline=None)
@given(st.lists(st.tuples(buffers(), WIDTHS, st.booleans()), max_size=3))
def test_many_are_split_and_judged_as_each_alone(many: list[tuple[U8, int, bool]]):
    splits = [
        Splitting(
            data[: data.size // width * width], width, rotate, np.empty(data.size // width * width, np.uint8)
        )
        for data, width, rotate in many
    ]
    bits = kernels.split_all(splits)
    for (data, width, rotate, out), found in zip(splits, bits, strict=True):
        assert out.tobytes() == kernels.split_planes_ref(data, width, rotate).tobytes()
        assert found == [kernels.entropy_ref(plane) for plane in out.reshape(width, -1)]
        out[:] = 0
    assert kernels.split_all_ref(splits) == bits
    for data, width, rotate, out in splits:
        assert out.tobytes() == kernels.split_planes_ref(data, width, rotate).tobytes()


@pytest.mark.parametrize("native", [True, False])
def test_buffers_are_equal_if_all_their_bytes_are(native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels, "_native", None)
    a = np.arange(100, dtype=np.uint8)
    b = a.copy()
    b[99] ^= 1
    pairs = [(a, a.tobytes()), (a, b), (a[:99], memoryview(b)[:99]), (a, a[:99]), (b"", a[:0])]
    assert kernels.are_equal(pairs) == [True, False, True, False, True]
    assert kernels.are_equal([]) == []


@pytest.mark.parametrize("native", [True, False])
def test_moves_are_made_in_order_and_may_overlap(native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels, "_native", None)
    room = np.arange(200, dtype=np.uint8)
    expected = room.copy()
    expected[10:190] = np.arange(20, 200)
    expected[:3] = expected[50:53]
    expected[190:] = np.frombuffer(b"0123456789", np.uint8)
    moves = [Move(room, 10, room[20:]), Move(room, 0, room[50:53]), Move(room, 190, b"0123456789")]
    kernels.move([*moves, Move(room, 200, b"")])
    assert room.tolist() == expected.tolist()
    for bad in (Move(room, 191, b"0123456789"), Move(room, -1, b"0"), Move(room[:2], 0, room)):
        with pytest.raises(InvalidInputError, match="does not fit"):
            kernels.move([bad])


# ---- the compiled module by itself ----


@needs_native
def test_c_checks_its_bounds_itself():
    from deltackpt import _kernels as native

    data, ends, counts = np.zeros(64, np.uint8), np.empty(2, np.int64), np.empty(256, np.int64)
    for call in (
        lambda: native.cut(data, ends, 4, 4, 8, 0),  # 8 ends do not fit in 2
        lambda: native.cut(data, ends, 3, 4, 8, 0),
        lambda: native.cut(data, ends, 4, 0, 8, 0),
        lambda: native.cut(data, ends, 4, -8, 8, 0),
        lambda: native.cut(data, ends, 8, 9, 15, 0),
        lambda: native.cut(data, ends, 4, 4, 8, 1 << 32),
        lambda: native.cut(data, ends.view(np.uint8)[1:9], 4, 64, 64, 0),
        lambda: native.split_planes(data, np.empty(63, np.uint8), 4, False),
        lambda: native.split_planes(data, np.empty(64, np.uint8), 3, False),
        lambda: native.split_planes(data[:63], np.empty(63, np.uint8), 4, False),
        lambda: native.join_planes(data, data, 4, False),
        lambda: native.join_planes(data[:40], data[24:], 4, False),
        lambda: native.split_all(((data, np.empty(63, np.uint8), 4, False),), counts, 255),
        lambda: native.split_all(((data, data, 4, False),), counts, 255),
        lambda: native.split_all(((data, np.empty(64, np.uint8), 3, False),), counts, 255),
        lambda: native.split_all((), counts, 256),
        lambda: native.split_all((), counts, 0),
        lambda: native.move(((data, 1, data),)),
        lambda: native.move(((data, sys.maxsize, data),)),
        lambda: native.are_equal((data,), ()),
        lambda: native.delta_group(((data, data, data, 4, 0, 0, 1.0, -1),), counts, 255),
        lambda: native.delta_group(((data, data + 1, ends, 4, 0, 0, 1.0, -1),), counts, 255),
        lambda: native.delta_group(((data, data, ends, 4, 0, 0, 1.0, -1),), counts, 256),
        lambda: native.delta_group(((data, data, ends, 4, 0, 0, 1.0, -1),), counts, 0),
        lambda: native.entropies((data,), counts[:64], 64),
        lambda: native.entropies((data,), counts[:0], 64),
        lambda: native.entropies((data,), counts, 0),
        lambda: native.entropies((data,), counts.view(np.uint8)[1:], 64),
    ):
        with pytest.raises(ValueError):
            call()


def describe_in_a_fresh_python(wanted: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from deltackpt import kernels; print(kernels.NATIVE, kernels.describe())"],
        env={**os.environ, "DELTACKPT_KERNELS": wanted, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_chooses_the_twin():
    assert describe_in_a_fresh_python("numpy").stdout == "False NumPy twin (no compiled kernels)\n"
    assert "DELTACKPT_KERNELS is 'cuda'" in describe_in_a_fresh_python("cuda").stderr


def test_describe_says_who_answers():
    assert kernels.describe().startswith("C kernels") == kernels.NATIVE


def test_the_examples_in_the_docstrings_run():
    import doctest

    assert doctest.testmod(kernels).failed == 0
