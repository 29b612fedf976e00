"""How far elements went: figures worked out by hand, and against Python's own integers."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltackpt.distance import Meter, bit_lengths, starts_of, windows
from deltackpt.dtypes import numpy_dtype
from deltackpt.format import LIST_ROW
from deltackpt.types import DTYPE_SIZES


def measured(old, new, dtype=None, **kwargs):
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (old, new))
    meter = Meter(dtype or new.dtype.name, b.size, **kwargs)
    meter.add(a, b)
    return meter.distance()


def steps(old, new, dtype):
    """The step between two numbers."""
    found = measured(np.array([old], dtype), np.array([new], dtype))
    return found.step_max


def test_one_ulp_of_one_element():
    old = np.ones(1000, np.float32)
    new = old.copy()
    new[7] = np.nextafter(np.float32(1), np.float32(2))
    found = measured(old, new)
    assert (found.n_elements, found.size, found.n_differing, found.differing_size) == (1000, 4000, 1, 1)
    assert (found.unit, found.step_max, found.step_bits) == ("ulp", 1, 1)
    assert (found.element_share, found.byte_share) == (0.001, 0.00025)
    assert str(found) == "0.10 % of elements, 0.03 % of bytes, by at most 1 ulp, half below 2^1"


@pytest.mark.parametrize(
    ("dtype", "old", "new", "step"),
    [
        ("f4", 1.0, -1.0, 2 * 0x3F800000 + 1),
        ("f4", -0.0, 0.0, 1),
        ("f4", np.float32(-1e-45), np.float32(1e-45), 3),
        ("f4", np.finfo("f4").max, np.inf, 1),
        ("f4", -np.inf, np.inf, 2 * 0x7F800000 + 1),
        ("f2", 1.0, 2.0, 1024),
        ("f2", -1.0, -2.0, 1024),
        ("f8", 1.0, 2.0, 1 << 52),
        ("f8", -1.0, 1.0, 2 * 0x3FF0000000000000 + 1),
        (ml_dtypes.bfloat16, 1.0, 2.0, 128),
        (ml_dtypes.bfloat16, 1.0, 1.0078125, 1),
        (ml_dtypes.float8_e4m3fn, 1.0, -1.0, 2 * 0x38 + 1),
        (ml_dtypes.float8_e5m2, 1.0, 2.0, 4),
        (ml_dtypes.float8_e8m0fnu, 0.5, 4.0, 3),
        (ml_dtypes.float6_e2m3fn, 1.0, 2.0, 8),
        (ml_dtypes.float6_e2m3fn, -0.0, 0.0, 1),
        (ml_dtypes.float4_e2m1fn, -1.0, 1.0, 5),
        ("i1", -128, 127, 255),
        ("i1", 1, -1, 2),
        ("u1", 0, 255, 255),
        ("i2", -1, 0, 1),
        ("i8", -(2**63), 2**63 - 1, 2**64 - 1),
        ("u8", 2**64 - 1, 0, 2**64 - 1),
        (ml_dtypes.int4, -8, 7, 15),
        (ml_dtypes.uint4, 0, 15, 15),
        (ml_dtypes.int2, -1, 1, 2),
    ],
)
def test_a_step_is_how_many_numbers_lie_between(dtype, old, new, step):
    assert steps(old, new, dtype) == steps(new, old, dtype) == step
    unit = "integer" if "int" in np.dtype(dtype).name else "ulp"
    assert measured(np.array([old], dtype), np.array([new], dtype)).unit == unit


def test_a_nan_is_what_its_bits_say():
    quiet, payload = (np.array([bits], "<u4").view("<f4") for bits in (0x7FC00000, 0x7FC00005))
    assert measured(quiet, quiet).n_differing == 0
    assert measured(quiet, payload).step_max == 5
    assert measured(np.array([np.inf], "<f4"), quiet).step_max == 0x400000


def test_a_complex_number_is_one_element_and_its_step_that_of_the_larger_part():
    old = np.array([1 + 1j, 2 + 2j, 3 + 3j], np.complex64)
    new = old.copy()
    new.view(np.float32).view(np.int32)[[0, 1, 4]] += [1, 6, 2]
    found = measured(old, new)
    assert (found.n_elements, found.n_differing, found.differing_size) == (3, 2, 3)
    assert (found.unit, found.step_max, found.step_bits) == ("ulp", 6, 2)


@pytest.mark.parametrize("dtype", ["bool", "float4_e2m1fn_x2"])
def test_what_is_no_number_has_no_step(dtype):
    found = measured(np.array([0, 1, 1], np.uint8), np.array([1, 1, 0], np.uint8), dtype)
    assert (found.n_differing, found.unit, found.step_max, found.step_bits) == (2, None, None, None)
    assert str(found) == "66.67 % of elements, 66.67 % of bytes"


def test_what_an_integer_only_carries_has_no_step():
    found = measured(np.array([7, 8], "<u4"), np.array([7, 9], "<u4"), is_number=False)
    assert (found.n_elements, found.n_differing, found.unit, found.step_max) == (2, 1, None, None)


def test_the_median_is_over_those_that_differ():
    old = np.zeros(10, np.int32)
    new = np.array([0, 0, 0, 0, 0, 1, -1, 5, 100, 100000], np.int32)
    found = measured(old, new)
    assert (found.n_differing, found.step_max, found.step_bits) == (5, 100000, 3)


def test_nothing_that_differs_has_neither_step_nor_share():
    found = measured(np.zeros(3, "f4"), np.zeros(3, "f4"))
    assert (found.n_differing, found.unit, found.step_max, found.step_bits) == (0, "ulp", None, None)
    empty = Meter("float32", 0).distance()
    assert (empty.element_share, empty.byte_share, empty.to_json()["element_share"]) == (0.0, 0.0, 0.0)


def test_nearly_none_and_nearly_all_are_not_said_to_be_none_and_all():
    old = np.zeros(100_000, np.uint8)
    one = old.copy()
    one[5] = 1
    assert str(measured(old, one)).startswith("0.01 % of elements")
    assert str(measured(old, 1 - one)).startswith("99.99 % of elements")
    assert str(measured(old, old + np.uint8(1))).startswith("100.00 % of elements")


def ordered(bits, width, is_float, is_signed):
    """What `Meter` does to an element, on Python's integers."""
    top = 1 << (width - 1)
    if not (is_float or is_signed):
        return bits
    return -(bits - top) - 1 if is_float and bits & top else bits - 2 * top if bits & top else bits


@settings(deadline=None)
@given(st.data(), st.sampled_from(["float16", "float32", "float64", "bfloat16", "int8", "uint16", "int64"]))
def test_any_bits_are_counted_as_python_would(data, dtype):
    width = 8 * DTYPE_SIZES[dtype]
    bits = st.integers(0, 2**width - 1)
    pairs = data.draw(st.lists(st.tuples(bits, bits) | bits.map(lambda v: (v, v)), min_size=1, max_size=20))
    old, new = (np.array(side, f"<u{width // 8}") for side in zip(*pairs, strict=True))
    found = measured(old, new, dtype)
    how = width, "float" in dtype, dtype.startswith("int")
    expected = sorted(abs(ordered(a, *how) - ordered(b, *how)) for a, b in pairs if a != b)
    assert found.n_differing == len(expected)
    assert found.step_max == (expected[-1] if expected else None)
    assert found.step_bits == (expected[(len(expected) - 1) // 2].bit_length() if expected else None)
    assert found.differing_size == int((old.view(np.uint8) != new.view(np.uint8)).sum())


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_the_length_in_bits_is_pythons(values):
    assert bit_lengths(np.array(values, np.uint64)).tolist() == [v.bit_length() for v in values]


def test_every_dtype_is_measured():
    for dtype, size in DTYPE_SIZES.items():
        found = measured(np.zeros(3 * size, np.uint8), np.full(3 * size, 1, np.uint8), dtype)
        assert (found.n_elements, found.n_differing, found.differing_size) == (3, 3, 3 * size), dtype
        assert (found.unit is None) == (dtype in ("bool", "float4_e2m1fn_x2")), dtype
        if dtype not in ("complex32", "float4_e2m1fn_x2"):
            assert numpy_dtype(dtype).itemsize == size


def test_parts_handed_in_add_up():
    rng = np.random.default_rng(0)
    old, new = (rng.integers(0, 3, 100_000).astype(np.float32) for _ in range(2))
    parts = Meter("float32", new.nbytes)
    for cut in range(0, new.size, 33_333):
        parts.add(*(x[cut : cut + 33_333].view(np.uint8) for x in (old, new)))
    assert parts.distance() == measured(old, new)


# -- what must be looked at


def chunks(*parts):
    """A table of chunks of these ids and sizes."""
    table = np.zeros(len(parts), LIST_ROW)
    for row, (name, size) in zip(table, parts, strict=True):
        row["id"], row["size"] = ord(name), size
    return table


def test_only_ranges_that_differ_are_looked_at():
    old = chunks(("a", 100), ("b", 50), ("c", 50), ("d", 8))
    assert list(windows(old, old, 4)) == []
    assert list(windows(old, chunks(("a", 100), ("x", 50), ("c", 50), ("y", 8)), 4)) == [
        (100, 152),
        (200, 208),
    ]
    assert list(windows(old, chunks(("x", 100), ("y", 50), ("c", 50), ("d", 8)), 4)) == [(0, 152)]


def test_tables_that_are_cut_differently_are_equal_where_start_size_and_id_are():
    old = chunks(("a", 100), ("b", 60), ("c", 40), ("d", 100))
    new = chunks(("a", 100), ("e", 100), ("d", 100))
    assert list(windows(old, new, 1)) == [(100, 200)]
    assert list(windows(old, chunks(("a", 99), ("e", 101), ("d", 100)), 1)) == [(0, 200)]
    assert list(windows(old, chunks(("b", 60), ("a", 100), ("x", 140)), 1)) == [(0, 300)]


def test_a_long_range_is_cut_where_a_chunk_ends():
    old, new = (chunks(*((name, 10) for _ in range(10))) for name in "ab")
    assert list(windows(old, new, 1, 25)) == [(0, 30), (30, 60), (60, 90), (90, 100)]


def test_ranges_are_whole_elements_wherever_the_cuts_are():
    old, new = (chunks((name, 5), ("c", 3), (name, 6), (name, 2)) for name in "ab")
    assert list(windows(old, new, 8)) == [(0, 8), (8, 16)]
    tiny = [chunks((name, 1), ("c", 1), (name, 1), ("c", 1), (name, 1), ("d", 3)) for name in "ab"]
    assert list(windows(*tiny, 8)) == [(0, 8)]
    long = [chunks(*((name, 9) for _ in range(8))) for name in "ab"]
    assert list(windows(*long, 8, 16)) == [(0, 16), (16, 32), (32, 48), (48, 64), (64, 72)]


cuts = st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 9)), min_size=1, max_size=12)


@settings(deadline=None)
@given(cuts, cuts, st.sampled_from([1, 2, 4, 8]), st.integers(1, 40))
def test_ranges_cover_what_is_not_in_both_and_no_byte_twice(a, b, itemsize, size):
    n = max(sum(s for _, s in part) for part in (a, b)) // itemsize * itemsize + itemsize
    old, new = (chunks(*part, ("z", n - sum(s for _, s in part))) for part in (a, b))
    found = list(windows(old, new, itemsize, size))
    assert all(start < stop and start % itemsize == stop % itemsize == 0 for start, stop in found)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(found))
    seen = {i for start, stop in found for i in range(start, stop)}
    there, here = (
        {(start, row.tobytes()) for start, row in zip(starts_of(table).tolist(), table, strict=True)}
        for table in (old, new)
    )
    equal = {
        i
        for start, row in there & here
        for i in range(start, start + int(np.frombuffer(row, LIST_ROW)["size"][0]))
    }
    assert seen >= set(range(n)) - equal
    assert seen == set(range(n)) - equal or itemsize > 1
