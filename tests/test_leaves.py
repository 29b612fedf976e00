import json

import numpy as np
import pytest
from anystate import Config, Point, picture, states
from hypothesis import given
from test_tree import SLOW, names, needs_torch, through_json

from deltackpt.dtypes import itemsize
from deltackpt.errors import CorruptError, InvalidInputError, NotFoundError
from deltackpt.layout import Layout
from deltackpt.leaves import Row, find, leaf_names, named, pair_into, rewritten, select, without
from deltackpt.tree import flatten, unflatten

try:
    import torch
except ImportError:
    torch = None


def pairs_of(flat, into, structure=None, **options):
    """Places of tensors, and the arrays they go to."""
    found = named(through_json(flat.structure if structure is None else structure), len(flat.tensors))

    def row(leaf):
        tensor = flat.tensors[leaf.at]
        return Row(tensor.name, tensor.dtype, Layout.plain(tensor.shape, itemsize(tensor.dtype)))

    return [(found[i].at, array) for i, array in pair_into(found, into, row, **options)]


def example_state():
    return {
        "model": {"w": np.zeros(1), "b": np.ones(1), "empty": {}},
        "optimizer": {"state": [{"m": np.full(1, i)} for i in range(3)], "betas": (0.9, 0.99)},
        0: "zero",
    }


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        ("model.w", {"model": {"w": 0}}),
        ("model", {"model": {"w": 0, "b": 1, "empty": {}}}),
        ("*.w", {"model": {"w": 0}}),
        ("model.[bw]", {"model": {"w": 0, "b": 1}}),
        ("optimizer.state", {"optimizer": {"state": [{"m": 2}, {"m": 3}, {"m": 4}]}}),
        ("*.2.m", {"optimizer": {"state": {2: {"m": 4}}}}),
        ("optimizer.betas.1", {"optimizer": {"betas": {1: 0.99}}}),
        ("optimizer.betas", {"optimizer": {"betas": (0.9, 0.99)}}),
        (["0", "model.b"], {"model": {"b": 1}, 0: "zero"}),
        ("model.empty", {"model": {"empty": {}}}),
    ],
)
def test_select_keeps_what_matches_and_shifts_no_index(patterns, kept):
    flat = flatten(example_state())
    structure, indices = select(through_json(flat.structure), names(flat), patterns)
    assert picture(unflatten(structure, 5, lambda leaf: leaf.at)) == picture(kept)
    assert indices == [i for i in range(5) if f'{{"tensor": {i}}}' in json.dumps(structure)]


@SLOW
@given(states())
def test_selecting_everything_changes_nothing(state):
    flat = flatten(state)
    assert select(through_json(flat.structure), names(flat), "*") == (
        flat.structure,
        [*range(len(flat.tensors))],
    )


def test_a_root_array_is_selected_by_the_name_value():
    flat = flatten(np.zeros(1))
    assert select(flat.structure, names(flat), "value") == ({"tensor": 0}, [0])


def test_tied_and_double_leaves_are_selected_one_by_one():
    x, y = np.zeros(1), np.zeros(1)
    flat = flatten({"a": {"b": x}, "a.b": y, "tied": x, "text": "t" * 5000})
    assert leaf_names(flat.structure, names(flat)) == ["a.b", "a.b#2", "tied", "text"]
    assert select(flat.structure, names(flat), "tied") == ({"map": {"tied": {"tensor": 0}}}, [0])
    assert select(flat.structure, names(flat), "a.b#2") == ({"map": {"a.b": {"tensor": 1}}}, [1])
    assert select(flat.structure, names(flat), "text") == ({"map": {"text": {"text": 2}}}, [2])


def test_a_name_with_brackets_matches_itself():
    flat = flatten({"w[0]": 1, "w0": 2})
    assert select(flat.structure, [], "w[0]")[0] == flat.structure


def test_a_pattern_that_matches_nothing_names_the_nearest():
    flat = flatten(example_state())
    with pytest.raises(NotFoundError, match=r"matches 'modle\.w'; nearest are 'model\.w'"):
        select(flat.structure, names(flat), ["model", "modle.w"])
    with pytest.raises(InvalidInputError, match="no pattern"):
        select(flat.structure, names(flat), [])


def test_into_is_matched_by_path_whatever_its_order_and_its_other_values():
    state = example_state()
    flat = flatten(state)
    into = dict(reversed(example_state().items())) | {"extra": "ignored", "object": object()}
    into["optimizer"]["betas"] = None
    pairs = pairs_of(flat, into)
    assert [index for index, _ in pairs] == [0, 1, 2, 3, 4]
    assert pairs[0][1] is into["model"]["w"]
    assert pairs[4][1] is into["optimizer"]["state"][2]["m"]


def test_into_fits_a_selection_by_list_or_by_index():
    flat = flatten({"a": [np.zeros(1), np.zeros(1)]})
    structure, _ = select(flat.structure, names(flat), "a.1")
    x = np.zeros(1)
    assert pairs_of(flat, {"a": {1: x}}, structure) == [(1, x)]


def test_everything_wrong_with_into_is_listed_at_once():
    flat = flatten({"a": np.zeros(2), "b": np.zeros(2), 0: np.zeros(2), "d": np.zeros(2)})
    into = {"a": np.zeros(3), "b": np.zeros(2, np.float32), "0": np.zeros(2), "d": np.array([None])}
    with pytest.raises(InvalidInputError) as caught:
        pairs_of(flat, into)
    assert caught.value.message.splitlines()[1:] == [
        "  into[0]: missing",
        "  into['0']: not in the snapshot",
        "  into['a']: found float64 (3,), expected float64 (2,)",
        "  into['b']: found float32 (2,), expected float64 (2,)",
        "  into['d']: dtype object cannot be stored, expected numbers, times, fixed-size text or bytes",
    ]


def test_a_long_list_of_what_is_wrong_with_into_is_cut():
    flat = flatten([np.zeros(1) for _ in range(60)])
    with pytest.raises(InvalidInputError, match="and 10 more"):
        pairs_of(flat, [])


def test_one_array_cannot_take_two_tensors_but_two_can_take_one():
    x = np.zeros(1)
    flat = flatten({"a": x, "b": np.zeros(1)})
    with pytest.raises(
        InvalidInputError, match=r"into\['b'\]: the same array for two tensors .* 'a' and 'b'"
    ):
        pairs_of(flat, {"a": x, "b": x})
    tied = flatten({"a": x, "b": x})
    assert [i for i, _ in pairs_of(tied, {"a": x, "b": x})] == [0, 0]
    into = {"a": np.zeros(1), "b": np.zeros(1)}
    assert [i for i, _ in pairs_of(tied, into)] == [0, 0]


def test_into_paths_that_cannot_be_told_apart_are_refused():
    state = {float("nan"): np.zeros(1), -float("nan"): np.zeros(1)}
    flat = flatten(state)
    with pytest.raises(InvalidInputError, match=r"state\[nan\]: found two of this path"):
        pairs_of(flat, state)


def test_into_that_contains_itself_is_refused():
    into = {"a": np.zeros(1)}
    into["b"] = [into, into]
    with pytest.raises(InvalidInputError, match="contains itself"):
        pairs_of(flatten({}), into)


@needs_torch
def test_torch_and_numpy_load_into_each_other():
    flat = flatten({"w": torch.zeros(2, 3)})
    x = np.zeros((2, 3), np.float32)
    assert pairs_of(flat, {"w": x})[0][1] is x


def test_into_may_lack_arrays_and_have_more_if_it_is_not_strict_but_shapes_must_fit():
    flat = flatten({"a": np.zeros(1), "b": np.zeros(2)})
    x = np.zeros(2)
    assert pairs_of(flat, {"b": x, "c": np.zeros(3)}, strict=False) == [(1, x)]
    with pytest.raises(InvalidInputError, match=r"into\['a'\]: found float64 \(7,\)"):
        pairs_of(flat, {"a": np.zeros(7)}, strict=False)


def test_into_is_matched_by_field():
    state = {"c": Config(lr=np.zeros(1), layers=[Point(np.zeros(2), 3)])}
    flat = flatten(state)
    pairs = pairs_of(flat, state)
    assert [x is y for (_, x), y in zip(pairs, (state["c"].lr, state["c"].layers[0].x), strict=True)] == [
        True
    ] * 2


def test_what_lost_fields_or_attributes_is_a_dict():
    flat = flatten({"c": Config(lr=1, layers=Point(2, 3))})
    structure, _ = select(flat.structure, [], "c.layers.x")
    assert unflatten(structure, 0, None) == {"c": {"layers": {"x": 2}}}
    whole, _ = select(flat.structure, [], "c.layers")
    assert unflatten(whole, 0, None) == {"c": {"layers": Point(2, 3)}}


@SLOW
@given(states())
def test_a_structure_rewritten_to_itself_is_itself(state):
    flat = flatten(state)
    nodes = iter([node for _, node in leaf_nodes(flat.structure)])
    assert rewritten(flat.structure, names(flat), lambda leaf, name: next(nodes)) == flat.structure


def leaf_nodes(structure):
    """Every leaf that names a tensor, with its node, found the slow way."""
    kept = []
    rewritten(structure, ["x"] * 10_000, lambda leaf, name: kept.append(leaf))
    from deltackpt.leaves import _walk
    from deltackpt.structure import leaf

    return [(path, node) for path, node in _walk(structure) if leaf(node, 10_000, path) is not None]


def test_leaves_are_dropped_by_their_place():
    flat = flatten({"a": np.zeros(1), "n": 5, "b": [np.zeros(2), np.zeros(3)]})
    assert without(flat.structure, 3, {0, 2}) == {"map": {"n": 5, "b": {"dict": [[0, {"tensor": 1}]]}}}
    assert without(flatten([np.zeros(1)]).structure, 1, {0}) == {"map": {}}


def test_an_array_is_found_by_name_and_what_is_none_is_told():
    flat = flatten({"model": {"w": np.zeros(1), "lr": 0.5}})
    assert find(flat.structure, names(flat), "model.w").at == 0
    with pytest.raises(NotFoundError, match=r"matches 'model\.v'; nearest are 'model\.w'"):
        find(flat.structure, names(flat), "model.v")
    with pytest.raises(InvalidInputError, match=r"'model\.lr' is no array"):
        find(flat.structure, names(flat), "model.lr")
    with pytest.raises(InvalidInputError, match="expected a tensor's name"):
        find(flat.structure, names(flat), 3)
    with pytest.raises(CorruptError, match="found tensor 0, expected less than 0"):
        named(flat.structure, 0)
