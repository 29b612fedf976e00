import collections
import enum
import json
import re
import struct
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deltackpt.arrays import alias_key, allocate, is_array, to_tensor
from deltackpt.errors import (
    CorruptError,
    DeltackptError,
    FormatError,
    InvalidInputError,
    NotFoundError,
    UnsupportedVersionError,
)
from deltackpt.tree import flatten, leaf_names, pair_into, select, unflatten
from deltackpt.types import DTYPE_SIZES, NOT_IN_NUMPY, Deferred, Tensor

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
DTYPES = [("numpy", dtype) for dtype in DTYPE_SIZES if dtype not in NOT_IN_NUMPY]
DTYPES += [("torch", dtype) for dtype in DTYPE_SIZES if torch is not None]


def through_json(structure):
    return json.loads(json.dumps(structure, ensure_ascii=True, allow_nan=False, separators=(",", ":")))


def restored(tensor):
    array, data = allocate(tensor.dtype, tensor.shape, tensor.framework)
    data[:] = (tensor.taken() if isinstance(tensor, Deferred) else tensor).data
    return array


def round_trip(state):
    structure, tensors = flatten(state)
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    return unflatten(through_json(structure), [restored(tensor) for tensor in tensors])


def rows(tensors):
    return [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]


def names(flat):
    return [tensor.name for tensor in flat.tensors]


def picture(x):
    """Equal for two states exactly if types, order and bits are."""
    kind = type(x).__name__
    if is_array(x):
        tensor = to_tensor(x, "x")
        return tensor.framework, tensor.dtype, tensor.shape, tensor.data.tobytes()
    if isinstance(x, dict):
        return kind, [(picture(k), picture(v)) for k, v in x.items()]
    if isinstance(x, list | tuple):
        return kind, [picture(v) for v in x]
    return kind, struct.pack("<d", x) if isinstance(x, float) else x


@st.composite
def arrays(draw):
    framework, dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    array, data = allocate(dtype, shape, framework)
    data[:] = np.random.default_rng(draw(st.integers(0, 9))).integers(
        0, 2 if dtype == "bool" else 256, data.size, np.uint8
    )
    # What .T gives is not contiguous, and what it holds must come back all the same.
    return array.T if len(shape) == 2 and draw(st.booleans()) else array


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
ANY_FLOAT = st.one_of(
    st.floats(), st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0])
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**53 - 1, 2**53, -(2**53), 10**400, -(7**700)]),
    ANY_FLOAT,
    ANY_TEXT,
    st.binary(max_size=8),
)
KEYS = st.recursive(SCALARS, lambda keys: st.lists(keys, max_size=3).map(tuple), max_leaves=4)
LONG = st.sampled_from(
    ["x" * 5000, "\ud83d\ude00é" * 900, b"x" * 1025, b"\xff" * 4000, "é" * 2048, b"x" * 1024]
)
STATES = st.recursive(
    st.one_of(SCALARS, arrays(), LONG),
    lambda states: st.one_of(
        st.lists(states, max_size=4),
        st.lists(states, max_size=4).map(tuple),
        st.dictionaries(ANY_TEXT, states, max_size=4),
        st.dictionaries(KEYS, states, max_size=4),
        st.dictionaries(KEYS, states, max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STATES)
@example({0: 1, "0": 2, True: 3, None: 4, (): 5, (0, ("a", b"b")): 6})
@example({False: 1, 1.0: 2, (True, 1): 3, (1, 1.5): 4})
@example({0.0: 2, "\ud800": 3, "\ud83d\ude00": 4})
@example(["\ud83d\ude00", "😀", "\x00", -0.0, 1.0, 1, True, float("inf"), 1e300, 5e-324])
def test_a_state_comes_back_with_its_types_its_order_and_its_bits(state):
    assert picture(round_trip(state)) == picture(state)


def test_a_structure_reads_like_the_state():
    x = np.zeros(2)
    state = {
        "a": [1, 2.0, None, "s"],
        "b": (True, 2**53),
        "c": {0: b"\xff"},
        "d": OrderedDict(x=x),
        "e": -np.inf,
    }
    assert flatten(state).structure == {
        "map": {
            "a": [1, 2.0, None, "s"],
            "b": {"tuple": [True, {"int": "20000000000000"}]},
            "c": {"dict": [[0, {"bytes": "/w=="}]]},
            "d": {"ordered": [["x", {"tensor": 0}]]},
            "e": {"float": "fff0000000000000"},
        }
    }


def test_long_bytes_and_long_strings_are_tensors_named_by_their_path():
    state = {"a": {"b": b"x" * 1025}, "c": ["\udcff" * 4097], "short": b"x" * 1024, "ascii": "x" * 4096}
    flat = flatten(state)
    assert [(t.name, t.dtype, t.size) for t in flat.tensors] == [
        ("a.b", "uint8", 1025),
        ("c.0", "uint8", 12291),
    ]
    assert unflatten(flat.structure, [t.data for t in flat.tensors]) == state
    assert unflatten(flat.structure, [t.data.tobytes() for t in flat.tensors]) == state


def test_tensors_are_named_by_their_key_path_and_doubles_are_numbered():
    x = [np.zeros(1) for _ in range(6)]
    state = {"a": {"b": x[0], 0: x[1], "0": x[2]}, "a.b": x[3], "a.0#2": x[4], (1, None): x[5]}
    assert names(flatten(state)) == ["a.b", "a.0", "a.0#2", "a.b#2", "a.0#2#2", "(1, None)"]
    assert names(flatten(x[0])) == ["value"]
    assert names(flatten({10**9999: x[0], "\ud800": x[1]}))[1] == "\\ud800"


def test_tied_arrays_are_one_tensor_and_come_back_as_one_object():
    x, y = np.zeros((2, 2)), np.ones((2, 2))
    state = {"head": x, "embed": x[:], "transposed": x.T, "list": [y, y]}
    flat = flatten(state)
    assert names(flat) == ["head", "transposed", "list.0"]
    back = round_trip(state)
    assert back["head"] is back["embed"]
    assert back["list"][0] is back["list"][1]
    assert back["transposed"] is not back["head"]


@needs_torch
def test_the_state_of_a_model_with_tied_weights_and_its_optimizer_comes_back():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    back = round_trip(state)
    assert picture(back) == picture(state)
    assert back["model"]["0.weight"] is back["model"]["2.weight"]
    model.load_state_dict(back["model"])
    optimizer.load_state_dict(back["optimizer"])


class Colour(enum.IntEnum):
    RED = 1


class Module:
    def state_dict(self):
        raise AssertionError


@pytest.mark.parametrize(
    ("x", "found", "hint"),
    [
        (collections.defaultdict(int), "collections.defaultdict", "dict(x)"),
        (collections.namedtuple("P", "a")(1), "P", "tuple(x)"),
        (Colour.RED, "Colour", "int(x)"),
        (np.float32(1), "numpy.float32", "x.item()"),
        (np.float64(1), "numpy.float64", "x.item()"),
        ({1}, "set", "leave it out"),
        (1j, "complex", "leave it out"),
        (bytearray(b""), "bytearray", "leave it out"),
        (Module(), "Module", "state_dict()"),
    ],
)
def test_what_has_no_plain_form_is_refused_by_path_and_type(x, found, hint):
    where = re.escape("state['optimizer']['state'][0]: found a ")
    with pytest.raises(InvalidInputError, match=f"^{where}.*{found}, expected") as caught:
        flatten({"optimizer": {"state": [x]}})
    assert hint in caught.value.hint


def test_a_key_of_no_plain_form_is_refused_by_path_and_type():
    for key in (frozenset(), Colour.RED, np.str_("a"), (1, frozenset())):
        with pytest.raises(InvalidInputError, match=r"^state\['a'\]: found a key of type"):
            flatten({"a": {"b": 0, key: 1}})


def test_a_key_nested_too_deep_is_refused():
    key = ()
    for _ in range(300):
        key = (key,)
    with pytest.raises(InvalidInputError, match="a key is nested too deep"):
        flatten({key: 1})


def test_an_array_of_no_plain_form_is_refused_by_path():
    with pytest.raises(InvalidInputError, match=r"^state\['a'\]\[1\]: dtype object") as caught:
        flatten({"a": [0, np.array([None])]})
    assert caught.value.hint


def test_a_state_that_contains_itself_is_refused_and_one_that_repeats_is_not():
    state = {"a": [{}]}
    state["a"][0]["b"] = state
    with pytest.raises(InvalidInputError, match=r"^state\['a'\]\[0\]\['b'\]: the dict contains itself"):
        flatten(state)
    shared = [1]
    assert round_trip([shared, shared]) == [[1], [1]]


WRAPS = [lambda x: [x], lambda x: (x,), lambda x: {"k": x}, lambda x: {0: x}, lambda x: OrderedDict(k=x)]


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_state_is_refused_as_too_deep_before_json_and_load_would_refuse_it(wrap):
    state, structure = 0, None
    for n_levels in range(502):  # noqa: B007
        try:
            structure = flatten(state).structure
        except InvalidInputError as error:
            assert "nested too deep" in error.message  # noqa: PT017 (the loop ends here, one way)
            break
        state = wrap(state)
    assert 160 < n_levels <= 501
    unflatten(through_json(structure), [])
    assert select(structure, [], "*") == (structure, [])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: [x],
        lambda x: {"tuple": [x]},
        lambda x: {"map": {"k": x}},
        lambda x: {"ordered": [["k", x]]},
    ],
)
def test_a_structure_that_is_too_deep_is_a_format_error(wrap):
    structure = None
    for _ in range(4000):
        structure = wrap(structure)
    assert_refuses_every_walk(structure)
    assert_refuses_every_walk({"dict": [[structure, 0]]})


def assert_refuses_every_walk(structure):
    for walk in (
        lambda: unflatten(structure, []),
        lambda: leaf_names(structure, []),
        lambda: select(structure, [], "*"),
        lambda: pair_into(structure, {}, []),
    ):
        with pytest.raises(FormatError):
            walk()


def test_too_little_stack_is_a_typed_error():
    def at_the_bottom(call):
        try:
            return at_the_bottom(call)
        except RecursionError:
            return call()

    structure = [0]
    for _ in range(300):
        structure = [structure]
    for call in (lambda: flatten(structure), lambda: unflatten(structure, [])):
        with pytest.raises(DeltackptError, match="nested too deep for the stack that is left"):
            at_the_bottom(call)


TAGS = ["int", "float", "str", "bytes", "tuple", "map", "dict", "ordered", "tensor", "blob", "text", "new"]
HOSTILE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 4), st.floats(), st.text("0afg=\ud800", max_size=16)),
    lambda json_values: st.one_of(
        st.lists(json_values, max_size=3),
        st.dictionaries(st.sampled_from(TAGS), json_values, max_size=2),
        st.tuples(st.sampled_from(TAGS), json_values).map(lambda pair: dict([pair])),
        st.tuples(
            st.sampled_from(["dict", "ordered"]), st.lists(st.lists(json_values, max_size=3), max_size=3)
        ).map(lambda pair: dict([pair])),
    ),
    max_leaves=10,
)


@settings(deadline=None, max_examples=400)
@given(HOSTILE)
@example({"tensor": True})
@example({"tensor": -1})
@example({"int": "0x1"})
@example({"float": " 0000000000000 1"})
@example({"dict": [[1, 0], [True, 0]]})
@example({"map": [[1, 2]]})
@example({"tuple": "ab"})
@example({})
def test_any_json_is_a_state_or_a_typed_error(structure):
    values = [b"\xff", np.zeros(3, np.uint8), np.zeros(2), None]
    tensors = [(f"t{i}", "float64", (2,)) for i in range(4)]
    for walk in (
        lambda: unflatten(structure, values),
        lambda: leaf_names(structure, ["a", "b", "", "d"]),
        lambda: select(structure, ["a", "b", "", "d"], ["*", "0"]),
        lambda: pair_into(structure, {"a": np.zeros(2)}, tensors),
    ):
        try:
            walk()
        except DeltackptError as error:
            assert error.message  # noqa: PT017 (either outcome is right)


@pytest.mark.parametrize(
    ("structure", "error", "says"),
    [
        (
            {"map": {"a": [{"tensor": 7}]}},
            CorruptError,
            r"state\['a'\]\[0\]: found tensor 7, expected less than 1",
        ),
        ({"map": {"a": {"later": 1}}}, UnsupportedVersionError, r"state\['a'\]: found the tag 'later'"),
        ({"tensor": True}, FormatError, "state: found the tensor True, expected an index"),
        ({"tensor": -1}, FormatError, "expected an index"),
        ({"map": {}, "list": []}, FormatError, "an object of 2 members"),
        ({"dict": [[1, 0], [True, 0]]}, FormatError, "a key twice"),
        ({"dict": [[[1], 0]]}, FormatError, "a key that is a list"),
        ({"dict": [[{"tensor": 0}, 0]]}, FormatError, "a tensor, expected a scalar"),
        ({"dict": [[1]]}, FormatError, "no pair"),
        ({"tuple": "ab"}, FormatError, "a tuple of str, expected a list"),
        ({"int": "0x10"}, FormatError, "the int '0x10'"),
        ({"float": "00"}, FormatError, "the float '00'"),
        ({"bytes": "?"}, FormatError, r"the bytes '\?'"),
        ({"str": "/w=="}, FormatError, "the str '/w=='"),
        ({"text": 0}, CorruptError, "no UTF-8"),
        ({1, 2}, FormatError, "found a set, expected JSON"),
    ],
)
def test_a_malformed_structure_says_where_and_what(structure, error, says):
    with pytest.raises(error, match=says):
        unflatten(structure, [np.array([255], np.uint8)])


def test_long_bytes_need_bytes():
    for value in (np.zeros(3), np.zeros((1, 1), np.uint8), "x", 3, None):
        with pytest.raises(FormatError, match="expected a 1-d uint8 array"):
            unflatten({"blob": 0}, [value])


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
    assert picture(unflatten(structure, range(5))) == picture(kept)
    assert indices == [i for i in range(5) if f'{{"tensor": {i}}}' in json.dumps(structure)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STATES)
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
    pairs = pair_into(flat.structure, into, rows(flat.tensors))
    assert [index for index, _ in pairs] == [0, 1, 2, 3, 4]
    assert pairs[0][1] is into["model"]["w"]
    assert pairs[4][1] is into["optimizer"]["state"][2]["m"]


def test_into_fits_a_selection_by_list_or_by_index():
    flat = flatten({"a": [np.zeros(1), np.zeros(1)]})
    structure, _ = select(flat.structure, names(flat), "a.1")
    x = np.zeros(1)
    assert pair_into(structure, {"a": {1: x}}, rows(flat.tensors)) == [(1, x)]


def test_everything_wrong_with_into_is_listed_at_once():
    flat = flatten({"a": np.zeros(2), "b": np.zeros(2), 0: np.zeros(2), "d": np.zeros(2)})
    into = {"a": np.zeros(3), "b": np.zeros(2, np.float32), "0": np.zeros(2), "d": np.array([None])}
    with pytest.raises(InvalidInputError) as caught:
        pair_into(flat.structure, into, rows(flat.tensors))
    assert caught.value.message.splitlines()[1:] == [
        "  into[0]: missing",
        "  into['0']: not in the snapshot",
        "  into['a']: found float64 (3,), expected float64 (2,)",
        "  into['b']: found float32 (2,), expected float64 (2,)",
        "  into['d']: dtype object cannot be stored, expected one of "
        + ", ".join(d for d in DTYPE_SIZES if d not in NOT_IN_NUMPY),
    ]


def test_a_long_list_of_what_is_wrong_with_into_is_cut():
    flat = flatten([np.zeros(1) for _ in range(60)])
    with pytest.raises(InvalidInputError, match="and 10 more"):
        pair_into(flat.structure, [], rows(flat.tensors))


def test_one_array_cannot_take_two_tensors_but_two_can_take_one():
    x = np.zeros(1)
    flat = flatten({"a": x, "b": np.zeros(1)})
    with pytest.raises(
        InvalidInputError, match=r"into\['b'\]: the same array for two tensors .* 'a' and 'b'"
    ):
        pair_into(flat.structure, {"a": x, "b": x}, rows(flat.tensors))
    tied = flatten({"a": x, "b": x})
    assert [i for i, _ in pair_into(tied.structure, {"a": x, "b": x}, rows(tied.tensors))] == [0]
    into = {"a": np.zeros(1), "b": np.zeros(1)}
    assert [i for i, _ in pair_into(tied.structure, into, rows(tied.tensors))] == [0, 0]


def test_into_paths_that_cannot_be_told_apart_are_refused():
    state = {float("nan"): np.zeros(1), -float("nan"): np.zeros(1)}
    flat = flatten(state)
    with pytest.raises(InvalidInputError, match=r"state\[nan\]: found two of this path"):
        pair_into(flat.structure, state, rows(flat.tensors))


def test_into_that_contains_itself_is_refused():
    into = {"a": np.zeros(1)}
    into["b"] = [into, into]
    with pytest.raises(InvalidInputError, match="contains itself"):
        pair_into({"map": {}}, into, [])


@needs_torch
def test_torch_and_numpy_load_into_each_other():
    flat = flatten({"w": torch.zeros(2, 3)})
    x = np.zeros((2, 3), np.float32)
    assert pair_into(flat.structure, {"w": x}, rows(flat.tensors))[0][1] is x
    assert alias_key(x) is not None


def test_a_tensor_of_no_framework_is_stored_as_it_is():
    data = np.arange(4, dtype=np.uint8)
    flat = flatten({"a": Tensor("elsewhere", "bfloat16", (2,), "torch", data)})
    (tensor,) = flat.tensors
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.framework) == ("a", "bfloat16", (2,), "torch")
    assert tensor.data is data
