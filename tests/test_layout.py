"""Strides arithmetic, against NumPy's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltackpt.errors import InvalidInputError
from deltackpt.layout import Layout, touched


def layout_of(x, base):
    at = x.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    return Layout(x.shape, x.strides, at, x.itemsize)


SLICES = st.builds(
    slice,
    st.none() | st.integers(-6, 6),
    st.none() | st.integers(-6, 6),
    st.none() | st.sampled_from([1, 2, 3, -1, -2]),
)


@st.composite
def indexed_arrays(draw):
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    base = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    x = base.transpose(draw(st.permutations(range(len(shape)))))
    parts = [draw(SLICES | st.integers(-n, n - 1) if n else SLICES) for n in x.shape]
    parts = parts[: draw(st.integers(0, len(parts)))]
    for extra in draw(st.lists(st.just(None), max_size=2)) + draw(st.lists(st.just(...), max_size=1)):
        parts.insert(draw(st.integers(0, len(parts))), extra)
    return base, x, tuple(parts)


@given(indexed_arrays())
def test_basic_indexing_picks_what_numpy_picks(case):
    base, x, index = case
    try:
        expected = x[index]
    except IndexError:
        with pytest.raises(InvalidInputError):
            layout_of(x, base).indexed(index)
        return
    picked = layout_of(x, base).indexed(index)
    assert picked.shape == np.shape(expected)
    if not picked.size:
        return
    found = np.ndarray(picked.shape, x.dtype, base, picked.offset, picked.strides)
    assert np.array_equal(found, expected)


@given(indexed_arrays())
def test_span_runs_solidity_and_order_are_those_of_the_elements(case):
    base, x, index = case
    try:
        x = x[index]
    except IndexError:
        return
    if not np.shares_memory(x, base):
        return
    layout = layout_of(x, base)
    offsets = np.zeros(x.shape, np.int64) + layout.offset
    for axis, stride in enumerate(layout.strides):
        ramp = stride * np.arange(x.shape[axis])
        offsets += ramp.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    bytes_used = np.unique(offsets.reshape(-1, 1) + np.arange(4))
    assert layout.span == (bytes_used[0], bytes_used[-1] + 1)
    assert layout.is_solid() == (len(bytes_used) == layout.span[1] - layout.span[0])
    assert not layout.overlaps()
    starts, length = layout.runs()
    covered = (starts.reshape(-1, 1) + np.arange(length)).reshape(-1)
    assert set(bytes_used.tolist()) <= set(covered.tolist())
    axes = [axis for axis in layout.order() if x.shape[axis] > 1]
    strides = [abs(x.strides[axis]) for axis in axes]
    assert strides == sorted(strides, reverse=True)
    assert layout.packed().is_solid()


def test_rows_far_apart_are_runs_of_their_own():
    column = Layout.plain((8, 1 << 20), 4).indexed((slice(None), 7))
    starts, length = column.runs()
    assert (starts.tolist(), length) == ([28 + (i << 22) for i in range(8)], 4)
    near = Layout.plain((1000, 100), 4).indexed((slice(None), 7))
    assert len(near.runs()[0]) == 1


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=6).map(sorted),
    st.integers(1, 40),
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
)
def test_touched_is_every_range_with_a_byte_of_a_run(begins, length, sizes):
    stops = np.cumsum(sizes)
    starts = stops - sizes
    used = {b + i for b in begins for i in range(length)}
    expected = [any(start <= byte < stop for byte in used) for start, stop in zip(starts, stops, strict=True)]
    assert touched((np.array(begins), length), starts, stops).tolist() == expected


def test_what_overlaps_is_told_and_what_repeats_can_be_narrowed():
    windows = Layout((5, 4), (2, 2), 0, 2)
    repeats = Layout((3, 4), (0, 2), 0, 2)
    assert windows.overlaps()
    assert repeats.overlaps()
    assert not repeats.narrowed().overlaps()
    assert repeats.narrowed().is_solid()


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (3, "3 is out of range, axis 0 of shape"),
        (-4, "-4 is out of range"),
        ((0, 0, 0), "expected at most 2 axes"),
        ((..., ...), "one '...'"),
        ([0, 1], "expected integers, slices"),
        (np.array([0]), "expected integers, slices"),
        (True, "expected integers, slices"),
        (1.0, "expected integers, slices"),
        ("a", "expected integers, slices"),
        (slice("a"), "slice"),
        (slice(None, None, 0), "zero"),
    ],
)
def test_any_other_index_is_refused(index, says):
    with pytest.raises(InvalidInputError, match=f"^index of 'w': .*{says}"):
        Layout.plain((3, 4), 2).indexed(index, "index of 'w'")


def test_numbers_of_other_kinds_index():
    assert Layout.plain((3, 4), 2).indexed((np.int64(1), np.array(2))).offset == 12
