"""What a save paid for each group: parsed as it was written, added up, and told apart by name and dtype."""

import pytest

from deltackpt.groups import Coded, GroupCost, added, group_of

COST = GroupCost("moments", "float32", 1000, 9, 300, {"raw": Coded(1, 100, 101), "lz4": Coded(2, 200, 50)})


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "group"),
    [
        ("w", "float32", (3,), "weights"),
        ("layers.0.attn.q_proj.weight", "bfloat16", (3, 3), "weights"),
        ("model.qweight", "int8", (3, 3), "weights"),
        ("optimizer.state.3.exp_avg_sq", "float32", (3,), "moments"),
        ("opt_state.0.mu.dense.kernel", "bfloat16", (3,), "moments"),
        ("optim.master.w", "float32", (3,), "moments"),
        ("0.momentum_buffer", "float32", (3,), "moments"),
        ("optimizer.state.3.step", "float32", (), "other"),
        ("optimizer.state.3.step", "int64", (1,), "other"),
        ("bn.num_batches_tracked", "int64", (), "other"),
        ("rng_state", "uint8", (5056,), "other"),
        ("temperature", "float32", (), "other"),
    ],
)
def test_tensors_are_told_apart_by_name_and_dtype(name, dtype, shape, group):
    assert group_of(name, dtype, shape) == group


def test_a_cost_comes_back_from_json_whatever_a_later_version_adds():
    body = COST.to_json()
    assert GroupCost.from_json(body) == COST
    body["codecs"]["raw"]["n_bases"] = 3
    assert GroupCost.from_json(body | {"seconds": 3.5}) == COST


@pytest.mark.parametrize(
    "changes",
    [
        {"group": 3},
        {"dtype": None},
        {"logical_size": -1},
        {"n_chunks": 1.5},
        {"based_size": True},
        {"codecs": []},
        {"codecs": {"raw": [1, 2, 3]}},
        {"codecs": {"raw": {"n_chunks": "1"}}},
    ],
)
def test_what_is_no_cost_is_a_value_error(changes):
    with pytest.raises(ValueError, match=r"is|are"):
        GroupCost.from_json(COST.to_json() | changes)


def test_what_was_not_put_is_the_same():
    assert (COST.changed_size, COST.stored_size) == (300, 151)
    assert COST.same == Coded(6, 700, 0)


def test_costs_are_added_by_group_and_dtype_the_largest_dtype_first():
    weights = [GroupCost("weights", dtype, size, 1) for dtype, size in [("int8", 1), ("float32", 9)]]
    found = added([COST, *weights, COST])
    assert [(c.group, c.dtype) for c in found] == [
        ("weights", "float32"), ("weights", "int8"), ("moments", "float32")
    ]  # fmt: skip
    assert found[2].codecs == {"raw": Coded(2, 200, 202), "lz4": Coded(4, 400, 100)}
