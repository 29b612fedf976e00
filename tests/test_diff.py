"""What two steps do not share, told by tensor, by chunk and by value."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections import OrderedDict
from dataclasses import replace

import deltas
import ml_dtypes
import numpy as np
import pytest
from faults import Wrapper
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import floats, noise, opened, same

from deltackpt import restore, tree
from deltackpt.backends.memory import MemoryBackend
from deltackpt.chunking import Chunker
from deltackpt.distance import WINDOW_SIZE, Distance
from deltackpt.errors import CorruptError, NotFoundError
from deltackpt.format import LIST_ROW
from deltackpt.leaves import plain_leaves


def diff(a, b, **kwargs):
    run = opened(MemoryBackend())
    run.save(a, step=1)
    run.save(b, step=2)
    return run.diff(1, 2, **kwargs)


def distances(a, b):
    return {t.name: t.distance for t in diff(a, b, values=True).tensors}


def fates(found):
    return {t.name: t.fate for t in found.tensors}


def test_every_tensor_has_a_fate():
    w = np.arange(6.0)
    old = {name: w.copy() for name in ("same", "moved", "shape", "dtype", "gone")}
    new = {"same": w, "moved": w + 1, "shape": w.reshape(2, 3).copy(), "dtype": w.astype("f4"), "new": w + 2}
    found = diff(old, new)
    assert fates(found) == {
        "same": "same",
        "moved": "changed",
        "shape": "retyped",
        "dtype": "retyped",
        "new": "added",
        "gone": "removed",
    }
    by_name = {t.name: t for t in found.tensors}
    assert (by_name["shape"].old, by_name["shape"].new) == ("float64 6", "float64 2x3")
    assert by_name["shape"].differing_size == 0
    assert (by_name["gone"].old, by_name["gone"].new, by_name["gone"].size) == ("float64 6", None, 48)
    assert found.size == 4 * 48 + 24
    assert found.differing_size == 48 + 24 + 48
    assert not found.is_empty


def test_chunks_that_differ_are_counted_by_id():
    data = noise(1, 4 << 20)
    other = data.copy()
    other[100] ^= 1
    found = diff({"w": data}, {"w": other}).tensors[0]
    assert found.n_differing == 1
    assert found.n_chunks > 4
    assert 0 < found.differing_size <= 1 << 20
    inserted = np.concatenate([noise(2, 1000), data])
    grown = diff({"w": data}, {"w": inserted}).tensors[0]
    assert (grown.fate, grown.n_differing <= 2) == ("retyped", True)


def test_a_chunk_that_is_there_once_more_differs_once():
    zeros = np.zeros(1 << 20, np.uint8)
    more = diff({"w": zeros}, {"w": np.zeros(3 << 20, np.uint8)}).tensors[0]
    assert (more.n_chunks, more.n_differing, more.differing_size) == (3, 2, 2 << 20)


def test_values_are_told_with_their_key_path():
    old = {"lr": 0.1, "epoch": 1, "betas": (0.9, 0.99), "name": "a", "gone": None, "x": {"y": b"\0"}}
    new = {"lr": 0.05, "epoch": 1, "betas": (0.9, 0.999), "name": "b", "new": [], "x": {"y": b"\1"}}
    assert {v.name: (v.old, v.new) for v in diff(old, new).values} == {
        "lr": ("0.1", "0.05"),
        "betas.1": ("0.99", "0.999"),
        "name": ("'a'", "'b'"),
        "gone": ("None", None),
        "new": (None, "[]"),
        "x.y": ("b'\\x00'", "b'\\x01'"),
    }


@pytest.mark.parametrize(("a", "b"), [(1, 1.0), (1, True), (0.0, -0.0), (math.nan, math.inf), ("1", 1)])
def test_values_of_other_types_or_bits_differ(a, b):
    assert len(diff({"v": a}, {"v": b}).values) == 1
    assert diff({"v": a}, {"v": a}).is_empty


def test_keys_that_read_alike_are_not_taken_for_each_other():
    old = {"a.b": 1, "a": {"b": 2}}
    assert [v.name for v in diff(old, {"a.b": 3, "a": {"b": 2}}).values] == ["a.b"]
    assert [v.name for v in diff(old, {"a.b": 1, "a": {"b": 3}}).values] == ["a.b#2"]
    assert plain_leaves(tree.flatten(old).structure, []) == {"a.b": 1, "a.b#2": 2}


def test_a_long_value_is_cut_short_and_a_long_list_too():
    found = diff({"v": "x" * 4000}, {"v": "y" * 4000})
    assert found.values[0].old == f"'{'x' * 59}... and 3942 more"
    many = diff({str(i): i for i in range(500)}, {str(i): -i - 1 for i in range(500)})
    assert len(many.values) == 500
    assert len(str(many).splitlines()) == 53
    assert "and 450 more" in str(many)


def test_another_nesting_of_the_same_values_is_told():
    w = np.ones(3)
    for a, b in [([1, 2], (1, 2)), ({"x": 1, "y": 2}, {"y": 2, "x": 1}), ({"x": 1}, OrderedDict(x=1))]:
        found = diff(a, b)
        assert (found.values, found.renested, found.is_empty) == ([], True, False)
        assert "containers, the order of keys, or ties differ" in str(found)
    assert not diff({"a": w}, {"a": w}).renested


def test_a_tensor_in_the_place_of_a_value_is_both_added_and_removed():
    found = diff({"v": 3}, {"v": np.zeros(2)})
    assert fates(found) == {"v": "added"}
    assert [(v.old, v.new) for v in found.values] == [("3", None)]


def test_steps_of_two_runs_and_two_stores_are_compared():
    a, b = opened(MemoryBackend()), opened(MemoryBackend(), "other")
    a.save({"w": noise(1, 3000), "v": 1}, step=1)
    b.save({"w": noise(1, 3000), "v": 2}, step=7)
    found = a.diff(1, "latest", other=b)
    assert (found.old, found.new) == ("main step 1", "other step 7")
    assert fates(found) == {"w": "same"}
    assert len(found.values) == 1
    assert a.diff(1, 1).is_empty
    with pytest.raises(NotFoundError, match="run 'other' has no step 1"):
        a.diff(1, 1, other=b)


class Counted(Wrapper):
    """Counts the records that are read."""

    n_chunks = 0

    def _do(self, op, name, call, *, mutates=True):
        with self._lock:
            self.n_chunks += op == "read_into"
        return call()


def test_only_manifests_and_lists_are_read():
    backend = MemoryBackend()
    run = opened(backend)
    for step in (1, 2):
        run.save({"big": noise(step, 3 << 20), "small": noise(step, 500)}, step=step)
    counted = Counted(backend)
    assert opened(counted).diff(1, 2).count("changed") == 2
    assert counted.n_chunks == 2  # the one list of either step


# -- elements


def test_it_is_said_how_many_elements_differ_and_how_far():
    w = floats(1, 1000)
    old = {"same": w, "one": w.copy(), "sign": np.float32([1, 2]), "shape": np.zeros(4), "gone": w + 1}
    moved = w.copy()
    moved[3] = np.nextafter(moved[3], np.float32(9))
    new = {"same": w, "one": moved, "sign": np.float32([1, -2]), "shape": np.ones((2, 2)), "new": w + 2}
    found = distances(old, new)
    assert found["one"] == Distance(1000, 4000, 1, 1, "ulp", 1, 1)
    assert found["sign"] == Distance(2, 8, 1, 1, "ulp", 0x80000001, 32)
    assert [found[name] for name in ("same", "shape", "gone", "new")] == [None] * 4
    assert all(t.distance is None for t in diff(old, new).tensors)


def test_nan_payloads_small_floats_and_integers_are_told():
    nan = np.array([0x7FC00000, 0x7FC00000], "<u4").view("<f4")
    other = np.array([0x7FC00000, 0x7FC00010], "<u4").view("<f4")
    half = np.array([1, 2, 3], ml_dtypes.bfloat16)
    up = np.array([1, 2, 3.03125], ml_dtypes.bfloat16)
    found = distances(
        {"nan": nan, "bf16": half, "i8": np.int8([-128, 5]), "empty": np.zeros((0, 3), "f4")},
        {"nan": other, "bf16": up, "i8": np.int8([127, 5]), "empty": np.zeros((0, 3), "f4")},
    )
    assert found["nan"] == Distance(2, 8, 1, 1, "ulp", 16, 5)
    assert found["bf16"] == Distance(3, 6, 1, 1, "ulp", 2, 2)
    assert found["i8"] == Distance(2, 2, 1, 1, "integer", 255, 8)
    assert found["empty"] is None


def test_what_is_no_number_as_it_is_stored_has_no_step():
    a = {"text": np.array(["ab", "c"]), "time": np.array([1, 2], "M8[s]"), "big": np.array([1, 2], ">f4")}
    b = {"text": np.array(["ab", "d"]), "time": np.array([1, 3], "M8[s]"), "big": np.array([1, 3], ">f4")}
    a, b = a | {"bool": np.array([True, False])}, b | {"bool": np.array([True, True])}
    a, b = a | {"long": "a" * 100_000}, b | {"long": "a" * 99_999 + "b"}
    found = distances(a, b)
    assert {name: (d.n_differing, d.unit, d.step_max) for name, d in found.items()} == dict.fromkeys(
        a, (1, None, None)
    )
    transposed = [np.asfortranarray(np.full((2, 3), x, np.float32)) for x in (1, 2)]
    assert distances({"t": transposed[0]}, {"t": transposed[1]})["t"].step_max == 1 << 23


@pytest.mark.parametrize("n", [1, 1 << 18, (5 << 20) + 3])
def test_what_is_told_of_chunks_is_what_numpy_finds_in_the_whole(n):
    rng = np.random.default_rng(n)
    old = rng.normal(size=n).astype(np.float32)
    new = old.copy()
    at = np.unique(rng.integers(0, n, 50))
    new.view(np.int32)[at] += rng.integers(1, 1000, len(at), np.int32)
    a, b = old.view(np.int32).astype(np.int64), new.view(np.int32).astype(np.int64)
    found = distances({"w": old}, {"w": new})["w"]
    assert (found.n_elements, found.n_differing, found.step_max) == (n, len(at), abs(a - b).max())
    assert found.differing_size == (old.view(np.uint8) != new.view(np.uint8)).sum()


def test_two_tensors_that_are_cut_differently_are_compared_all_the_same():
    data = noise(1, 4 << 20)
    inserted = np.concatenate([noise(2, 1000), data])
    runs = [opened(MemoryBackend()) for _ in range(2)]
    moved = inserted.copy()
    moved[:1000] ^= 0x80
    moved[-5:] ^= 1
    for run, first, second in zip(runs, (inserted, data), (moved, moved), strict=True):
        run.save({"w": first}, step=1)
        run.save({"w": second}, step=2)  # cut anew, or as the step before it was
    found = runs[0].diff(2, 2, other=runs[1], values=True)
    assert found.tensors[0].fate == "same"
    told = runs[0].diff(1, 2, other=runs[1], values=True).tensors[0]
    assert told.distance == Distance(moved.size, moved.size, 1005, 1005, "integer", 128, 8)


def test_cuts_inside_elements_do_no_harm(monkeypatch):
    old = floats(1, 3 << 18)
    new = old.copy()
    new.view(np.int32)[::100_000] += 7
    run = opened(MemoryBackend())
    for step, array in enumerate((old, new), 1):
        # As bytes they are cut anywhere; the floats that have these bytes take those cuts over.
        monkeypatch.setattr(
            Chunker, "cuts", lambda self, data, *args: np.array([333_333, 666_667, data.size])
        )
        run.save({"w": array}, step=step)
    chunks = run.diff(1, 2, values=True).tensors[0]
    assert chunks.n_chunks == 3
    assert chunks.distance == Distance(3 << 18, 3 << 20, 8, 8, "ulp", 7, 3)


def test_chunks_that_both_have_are_not_read():
    backend = MemoryBackend()
    run = opened(backend)
    data = noise(1, 4 << 20)
    for step in (1, 2):
        data[100], data[3 << 20] = step, step
        run.save({"w": data, "frozen": noise(5, 4 << 20)}, step=step)
    counted = Counted(backend)
    told = opened(counted).diff(1, 2, values=True).tensors[0]
    assert (told.distance.n_differing, told.n_differing) == (2, 2)
    n_bases = int((deltas.rows_of(run.store)["depth"] > 0).sum())
    # Of w 2 chunks of either step and the bases of those that are deltas; and a list of each tensor and step.
    assert counted.n_chunks == 2 * 2 + n_bases + 4


def test_memory_is_bounded_whatever_the_size():
    run = opened(MemoryBackend())
    for step in (1, 2):
        run.save({"w": noise(step, 64 << 20)}, step=step)
    run = opened(run.store.backend)
    tracemalloc.start()
    try:
        told = run.diff(1, 2, values=True).tensors[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert told.distance.n_differing > 60 << 20
    assert peak < 2 * (WINDOW_SIZE + (2 << 20)) + (4 << 20) < 32 << 20


def test_chunks_that_are_deltas_are_compared_too(monkeypatch):
    deltas.taken(monkeypatch)
    run = opened(MemoryBackend())
    state = {"w": floats(1, 1 << 18)}
    for step in (1, 2, 3):
        run.save(state, step=step)
        state = {"w": deltas.nearly(state["w"], step)}
    assert deltas.rows_of(run.store)["depth"].max() > 1
    a, b = (run.load(step)["w"].view(np.int32).astype(np.int64) for step in (1, 3))
    found = opened(run.store.backend).diff(1, 3, values=True).tensors[0].distance
    assert (found.n_differing, found.step_max) == (np.count_nonzero(a != b), abs(a - b).max())
    assert found.step_max == 6


def test_a_damaged_chunk_is_named_with_its_step_and_tensor():
    class Broken(Wrapper):
        def _do(self, op, name, call, *, mutates=True):
            if op == "read_into":
                raise CorruptError(f"{name}: broken")
            return call()

    backend = MemoryBackend()
    run = opened(backend)
    for step in (1, 2):
        run.save({"w": noise(step, 500)}, step=step)
    broken = opened(Broken(backend))
    assert broken.diff(1, 2).count("changed") == 1
    with pytest.raises(CorruptError, match=r"run 'main' step 1: tensor 'w': .*broken"):
        broken.diff(1, 2, values=True)


def test_a_chunk_that_claims_too_much_is_refused_before_there_is_memory_for_it():
    run = opened(MemoryBackend())
    run.save({"w": noise(1, 500)}, step=1)
    row = replace(run.manifest(1).tensors[0], size=1 << 40)
    chunks = np.zeros(1, LIST_ROW)
    chunks["size"] = 1 << 30
    with pytest.raises(CorruptError, match=f"tensor 'w': a chunk of {1 << 30} bytes, at most {1 << 26}"):
        restore.stretch(run.store, row, chunks, 0, 8)


def test_json_and_text_hold_the_distance():
    found = diff({"w": np.float32([1, 2]), "v": 1}, {"w": np.float32([1, 2.0000002]), "v": 1}, values=True)
    assert json.loads(json.dumps(found.to_json()))["tensors"][0]["distance"] == {
        "n_elements": 2,
        "size": 8,
        "n_differing": 1,
        "differing_size": 1,
        "unit": "ulp",
        "step_max": 1,
        "step_bits": 1,
        "element_share": 0.5,
        "byte_share": 0.125,
    }
    assert (
        "changed  w  8 B of 8 B, 1 of 1 chunks; 50.00 % of elements, 12.50 % of bytes, by at most 1 ulp, "
        "half below 2^1\n"
    ) in str(found)


# -- both


def test_a_comparison_is_not_resuming():
    run = opened(MemoryBackend())
    for step in (1, 2):
        run.save({"v": step}, step=step)
    run.load(2)
    run.diff(1, 2)
    assert run._keeper.resumed == 2


def test_json_holds_the_totals():
    found = diff({"w": np.zeros(2), "v": 1}, {"w": np.ones(2), "v": 2})
    told = json.loads(json.dumps(found.to_json()))
    assert told["tensors"][0] == {
        "name": "w",
        "fate": "changed",
        "old": "float64 2",
        "new": "float64 2",
        "size": 16,
        "n_chunks": 1,
        "differing_size": 16,
        "n_differing": 1,
        "distance": None,
    }
    assert told["values"] == [{"name": "v", "old": "1", "new": "2"}]
    assert (told["n_changed"], told["n_same"], told["size"], told["differing_size"]) == (1, 0, 16, 16)


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(["", "a", b"b"])
    | st.integers(0, 3).map(lambda seed: noise(seed, 8))
)
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(st.sampled_from(["a", "b", "a.b", 1]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(states, states)
def test_a_diff_is_empty_exactly_if_both_load_the_same(a, b):
    assert diff(a, b).is_empty == same(a, b)
    assert diff(a, a).is_empty
    str(diff(a, b))
