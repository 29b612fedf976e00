import collections
import dataclasses
import enum
import json
import random
import re
from collections import Counter, OrderedDict

import numpy as np
import pytest
from anystate import Child, Config, Frozen, Point, child, picture, states
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deltackpt.arrays import allocate, bytes_of, destination, view
from deltackpt.errors import (
    CorruptError,
    DeltackptError,
    FormatError,
    InvalidInputError,
    MissingDependencyError,
    UnsupportedVersionError,
)
from deltackpt.layout import Layout
from deltackpt.leaves import leaf_names, named, select
from deltackpt.structure import TAGS
from deltackpt.tree import flatten, unflatten
from deltackpt.types import Deferred, Tensor

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def through_json(structure):
    return json.loads(json.dumps(structure, ensure_ascii=True, allow_nan=False, separators=(",", ":")))


def restored(tensor):
    array, data = allocate(tensor.dtype, tensor.shape, tensor.framework)
    data[:] = (tensor.taken() if isinstance(tensor, Deferred) else tensor).data
    return array


def put_together(structure, values, **options):
    made = {}

    def value(leaf):
        if not leaf.is_array:
            return values[leaf.at]
        return made.setdefault((leaf.at, leaf.view), view(values[leaf.at], leaf.view))

    return unflatten(structure, len(values), value, **options)


def round_trip(state, **options):
    structure, tensors, _ = flatten(state, **options)
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    return put_together(through_json(structure), [restored(tensor) for tensor in tensors], **options)


def names(flat):
    return [tensor.name for tensor in flat.tensors]


@SLOW
@given(states())
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
    assert put_together(flat.structure, [t.data for t in flat.tensors]) == state
    assert put_together(flat.structure, [t.data.tobytes() for t in flat.tensors]) == state


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
    assert names(flat) == ["head", "list.0"]
    back = round_trip(state)
    assert back["head"] is back["embed"]
    assert back["list"][0] is back["list"][1]
    back["transposed"][0, 1] = 7
    assert back["head"][1, 0] == 7


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
        (Colour.RED, "Colour", "int(x)"),
        ({1}, "set", "leave it out"),
        (bytearray(b""), "bytearray", "leave it out"),
        (Module(), "Module", "state_dict()"),
        (random.Random(1), "Random", "getstate()"),
        (np.random.RandomState(1), "RandomState", "get_state()"),
        (np.random.default_rng(1), "Generator", "bit_generator.state"),
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
    put_together(through_json(structure), [])
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
        lambda: put_together(structure, []),
        lambda: leaf_names(structure, []),
        lambda: select(structure, [], "*"),
        lambda: named(structure, 0),
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
    for call in (lambda: flatten(structure), lambda: put_together(structure, [])):
        with pytest.raises(DeltackptError, match="nested too deep for the stack that is left"):
            at_the_bottom(call)


#: What may stand in a node, and what may not.
WORDS = [*TAGS, "new", "dtype", "shape", "strides", "offset", "anystate:Point", "anystate:Config", "x", "lr"]
HOSTILE = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 4),
        st.floats(),
        st.text("0afg=\ud800", max_size=16),
        st.sampled_from([*WORDS, "float32", "<M8[ns]", ">f4", "cuda:0", "bfloat16"]),
    ),
    lambda json_values: st.one_of(
        st.lists(json_values, max_size=3),
        st.dictionaries(st.sampled_from(WORDS), json_values, max_size=2),
        st.tuples(st.sampled_from(WORDS), json_values).map(lambda pair: dict([pair])),
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
    for walk in (
        lambda: unflatten(structure, 4, lambda leaf: values[leaf.at]),
        lambda: unflatten(structure, 4, lambda leaf: view(np.zeros(2), leaf.view)),
        lambda: leaf_names(structure, ["a", "b", "", "d"]),
        lambda: select(structure, ["a", "b", "", "d"], ["*", "0"]),
        lambda: named(structure, 4),
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
        put_together(structure, [np.array([255], np.uint8)])


def test_long_bytes_need_bytes():
    for value in (np.zeros(3), np.zeros((1, 1), np.uint8), "x", 3, None):
        with pytest.raises(FormatError, match="expected a 1-d uint8 array"):
            put_together({"blob": 0}, [value])


def test_a_tensor_of_no_framework_is_stored_as_it_is():
    data = np.arange(4, dtype=np.uint8)
    flat = flatten({"a": Tensor("elsewhere", "bfloat16", (2,), "torch", data)})
    (tensor,) = flat.tensors
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.framework) == ("a", "bfloat16", (2,), "torch")
    assert np.shares_memory(tensor.data, data)


def test_what_is_somewhere_else_is_fetched_when_it_is_needed_and_stored_once():
    n_fetched = []

    def take():
        n_fetched.append(1)
        return np.arange(6, dtype=np.uint8)

    x = Deferred("", "int16", (3, 1), "numpy", take)
    flat = flatten({"a": x, "b": [x], "none": np.zeros(0)})
    assert not n_fetched
    assert flat.structure == {"map": {"a": {"tensor": 0}, "b": [{"tensor": 0}], "none": {"tensor": 1}}}
    tensor = flat.tensors[0].taken()
    assert (tensor.name, tensor.dtype, tensor.shape, len(n_fetched)) == ("a", "int16", (3, 1), 1)
    assert tensor.data.tobytes() == bytes_of(x) == bytes(range(6))
    with pytest.raises(InvalidInputError, match="read-only"):
        destination(x, "int16", Layout.plain((3, 1), 2))


def test_what_overlaps_is_stored_once_and_overlaps_again():
    flat = np.arange(40, dtype=np.float32)
    state = {
        "w": flat[:12].reshape(3, 4),
        "wt": flat[:12].reshape(3, 4).T,
        "flat": flat,
        "head": flat[8:20],
        "bits": flat[2:4].view(np.uint16),
        "row": np.broadcast_to(flat[:4], (5, 4)),
    }
    taken = flatten(state)
    assert [(t.name, t.dtype, t.shape) for t in taken.tensors] == [("flat", "float32", (40,))]
    assert np.shares_memory(taken.tensors[0].data, flat)
    back = round_trip(state)
    assert picture(back) == picture(state)
    back["flat"][:] = 0
    assert not any(x.any() for x in back.values())


def test_what_only_lies_side_by_side_is_stored_apart():
    buffer = np.arange(20, dtype=np.float32)
    taken = flatten({"a": buffer[:10], "b": buffer[10:]})
    assert [(t.name, t.size) for t in taken.tensors] == [("a", 40), ("b", 40)]


def test_a_slice_that_is_alone_is_stored_without_what_lies_between():
    large = np.arange(10_000.0).reshape(100, 100)
    taken = flatten({"a": large[:, :3]})
    assert [t.size for t in taken.tensors] == [2400]
    back = round_trip({"a": large[:, :3]})["a"]
    assert (back == large[:, :3]).all()
    assert back.flags.c_contiguous


def test_arrays_of_any_order_are_stored_as_they_lie_and_not_copied():
    x = np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))
    for view_of in (x, x.swapaxes(0, 1), x[::-1], x[..., None]):
        (tensor,) = flatten([view_of]).tensors
        assert isinstance(tensor, Tensor)
        assert np.shares_memory(tensor.data, x)
        (back,) = round_trip([view_of])
        assert back.strides == view_of.strides


@needs_torch
def test_channels_last_weights_come_back_channels_last():
    w = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    (tensor,) = flatten([w]).tensors
    assert isinstance(tensor, Tensor)
    (back,) = round_trip([w])
    assert back.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(back, w)


@needs_torch
def test_parameters_and_gradients_come_back_as_such():
    w = torch.nn.Parameter(torch.randn(3))
    state = {"w": w, "same": w, "data": w.data, "frozen": torch.nn.Parameter(w.data, requires_grad=False)}
    back = round_trip(state | {"leaf": torch.zeros(2, requires_grad=True)})
    assert type(back["w"]) is torch.nn.Parameter
    assert back["w"] is back["same"]
    assert back["w"].requires_grad
    assert (type(back["data"]), back["data"].requires_grad) == (torch.Tensor, False)
    assert (type(back["frozen"]), back["frozen"].requires_grad) == (torch.nn.Parameter, False)
    assert back["leaf"].requires_grad
    assert len({x.data_ptr() for x in (back["w"], back["data"], back["frozen"])}) == 1


@needs_torch
def test_the_versions_in_a_state_dict_come_back():
    model = torch.nn.BatchNorm1d(2)
    back = round_trip(model.state_dict())
    assert back._metadata == model.state_dict()._metadata == OrderedDict({"": {"version": 2}})
    assert type(back._metadata) is OrderedDict


def test_the_state_of_a_scheduler_with_a_counter_comes_back():
    counter = Counter({30: 1, 80: 2})
    assert picture(round_trip({"milestones": counter})) == picture({"milestones": counter})


def test_random_states_come_back():
    generator = np.random.default_rng(3)
    state = {
        "python": random.Random(1).getstate(),
        "numpy": np.random.RandomState(2).get_state(),
        "generator": generator.bit_generator.state,
    }
    if torch is not None:
        state["torch"] = torch.get_rng_state()
    back = round_trip(state)
    assert picture(back) == picture(state)
    expected = generator.random(3).tolist()
    other = np.random.default_rng()
    other.bit_generator.state = back["generator"]
    assert other.random(3).tolist() == expected
    random.Random().setstate(back["python"])
    np.random.RandomState().set_state(back["numpy"])


def test_no_constructor_runs_when_a_dataclass_comes_back():
    state = {"a": child(1, [np.zeros(2)]), "b": Frozen(value=2), "c": Config(lr=1, layers=[Point(1, 2)])}
    back = round_trip(state)
    assert picture(back) == picture(state)
    assert type(back["a"]) is Child


def test_a_class_that_is_not_imported_is_named_and_not_imported():
    structure = {"map": {"cfg": {"dataclass": ["antigravity:Config", {"lr": 1}]}}}
    with pytest.raises(MissingDependencyError, match=r"state\['cfg'\]: is a antigravity:Config") as caught:
        put_together(structure, [])
    assert "import antigravity" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "kind"),
    [("builtins:int", "dataclass"), ("os:system", "namedtuple"), ("subprocess:Popen", "dataclass")],
)
def test_what_is_no_dataclass_is_not_made(name, kind):
    with pytest.raises(DeltackptError):
        put_together({kind: [name, {}]}, [])


def test_fields_that_changed_are_told():
    structure = through_json(flatten(Config(lr=1)).structure)
    structure["dataclass"][1]["momentum"] = structure["dataclass"][1].pop("layers")
    with pytest.raises(
        InvalidInputError, match="has the fields lr, layers now, it was saved with lr, momentum"
    ):
        put_together(structure, [])


def test_an_object_that_is_more_than_its_fields_is_refused():
    config = Config(lr=1)
    config.cache = {}
    with pytest.raises(
        InvalidInputError, match=r"^state\['c'\]: this anystate:Config has attributes .*cache"
    ):
        flatten({"c": config})

    @dataclasses.dataclass
    class Local:
        a: int

    with pytest.raises(InvalidInputError, match=r"^state\[0\]: the class .*Local is not to be found"):
        flatten([Local(1)])


def test_what_has_no_plain_form_is_pickled_when_both_sides_say_so():
    state = {"a": {1, 2}, "b": [Colour.RED, np.array([None, "x"], object)], "w": np.zeros(3)}
    with pytest.raises(InvalidInputError, match=r"state\['a'\]"):
        flatten(state)
    flat = flatten(state, allow_pickle=True)
    assert names(flat) == ["a", "b.0", "b.1", "w"]
    values = [restored(tensor) for tensor in flat.tensors]
    back = put_together(flat.structure, values, allow_pickle=True)
    assert back["a"] == {1, 2}
    assert back["b"][0] is Colour.RED
    assert back["b"][1].tolist() == [None, "x"]
    with pytest.raises(InvalidInputError, match=r"state\['a'\]: was pickled.*allow_pickle=True"):
        put_together(flat.structure, values)
    assert put_together(select(flat.structure, names(flat), "w")[0], values)["w"].tolist() == [0, 0, 0]


def test_what_cannot_be_pickled_and_what_is_no_pickle_are_named():
    with pytest.raises(InvalidInputError, match=r"^state\['f'\]: cannot be pickled"):
        flatten({"f": lambda: 0}, allow_pickle=True)
    with pytest.raises(FormatError, match=r"^state\['f'\]: cannot be unpickled"):
        put_together({"map": {"f": {"pickle": 0}}}, [b"rubbish"], allow_pickle=True)


@needs_torch
@pytest.mark.parametrize(
    ("x", "says"),
    [
        (lambda: torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (lambda: torch.eye(2).to_sparse_csr(), "layout torch.sparse_csr"),
        (lambda: torch.zeros(2, device="meta"), "meta tensor"),
        (lambda: torch.zeros(2).to(torch.int8).view(torch.bits8), "dtype torch.bits8"),
        (lambda: torch.Generator(), "torch._C.Generator"),
        (lambda: np.zeros(2, [("a", "f4")]), "dtype"),
        (lambda: np.array([object()]), "dtype object"),
        (lambda: np.ma.masked_array([1.0], [True]), "MaskedArray"),
        (lambda: np.zeros(1, np.dtypes.StringDType()), "dtype StringDType"),
        (lambda: np.zeros(1, [("a", "f4")])[0], "dtype"),
        (lambda: torch.nn.UninitializedParameter(), "UninitializedParameter"),
    ],
)
def test_every_array_that_cannot_be_kept_is_refused_by_its_path(x, says):
    with pytest.raises(InvalidInputError, match=rf"^state\['model'\]\[3\]: .*{says}") as caught:
        flatten({"model": [1, 2, 3, x()]})
    assert caught.value.hint


class Watched:
    """Tells when a destructor runs."""

    gone = 0


@dataclasses.dataclass
class Doomed:
    path: str

    def __del__(self):
        Watched.gone += 1


class Slotted:
    __slots__ = ("hidden",)


@dataclasses.dataclass
class Lower(Slotted):
    a: int


class Half(np.float64):
    pass


def test_a_store_cannot_have_a_destructor_run():
    with pytest.raises(FormatError, match="test_tree:Doomed is no dataclass"):
        put_together({"dataclass": ["test_tree:Doomed", {"path": "/etc"}]}, [])
    assert Watched.gone == 0


@needs_torch
def test_a_dtype_is_no_way_to_have_a_module_imported():
    with pytest.raises(FormatError, match="the dtype '_inductor'"):
        put_together({"dtype": "_inductor"}, [])


def test_what_is_more_than_its_fields_is_refused_wherever_it_keeps_it():
    lower = Lower(a=1)
    lower.hidden = 2
    bare = Config(lr=1)
    del bare.layers
    counter = Counter(a=1)
    counter.note = "x"
    for x, says in (
        (lower, "attributes that are no fields: .*hidden"),
        (bare, "lacks the fields .*layers"),
        (counter, "this Counter has attributes"),
        (Half(1.5), "found a test_tree.Half"),
    ):
        with pytest.raises(InvalidInputError, match=rf"^state\['x'\]: .*{says}"):
            flatten({"x": x})


@pytest.mark.parametrize(
    "structure",
    [
        {"scalar": ["U", {"map": {}}]},
        {"scalar": ["U", {"new": 1}]},
        {"dict": [[{"scalar": ["|V8", "00" * 8]}, 1]]},
        {"dict": [[{"size": [1]}, 1]]},
        {"view": {"tensor": 0, "dtype": ">f4", "shape": [1], "strides": [4], "offset": 0}},
        {
            "view": {
                "tensor": 0,
                "dtype": "float8_e4m3",
                "shape": [0, 1 << 61],
                "strides": [1, 1],
                "offset": 0,
            }
        },
    ],
)
def test_hostile_scalars_keys_and_views_are_typed_errors(structure):
    values = [np.zeros(4, np.uint8)] if torch is None else [torch.zeros(4, dtype=torch.uint8)]
    with pytest.raises(DeltackptError):
        put_together(structure, values)


def test_names_that_would_take_up_memory_are_refused(monkeypatch):
    monkeypatch.setattr("deltackpt.leaves._NAMES_SIZE_MAX", 10_000)
    structure = {"map": {"k" * 1000: [{"tensor": 0}] * 50}}
    with pytest.raises(FormatError, match="the names of its leaves take more than"):
        leaf_names(structure, ["w"])
