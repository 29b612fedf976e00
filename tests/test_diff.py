"""What two steps do not share, told by tensor, by chunk and by value."""

from __future__ import annotations

import json
import math
from collections import OrderedDict

import numpy as np
import pytest
from faults import Wrapper
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import noise, opened, same

from deltackpt import tree
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import NotFoundError


def diff(a, b):
    run = opened(MemoryBackend())
    run.save(a, step=1)
    run.save(b, step=2)
    return run.diff(1, 2)


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
    assert tree.plain_leaves(tree.flatten(old).structure, []) == {"a.b": 1, "a.b#2": 2}


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


def test_only_manifests_and_lists_are_read():
    class Counted(Wrapper):
        n_chunks = 0

        def _do(self, op, name, call, *, mutates=True):
            found = call()
            if op == "read_into":
                Counted.n_chunks += 1
            return found

    backend = MemoryBackend()
    run = opened(backend)
    for step in (1, 2):
        run.save({"big": noise(step, 3 << 20), "small": noise(step, 500)}, step=step)
    counted = opened(Counted(backend))
    assert counted.diff(1, 2).count("changed") == 2
    assert Counted.n_chunks == 2  # the one list of either step


def test_a_comparison_is_not_resuming():
    run = opened(MemoryBackend())
    for step in (1, 2):
        run.save({"v": step}, step=step)
    run.load(2)
    run.diff(1, 2)
    assert run._resumed == 2


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
