import subprocess
import sys

import numpy as np
import pytest

from deltackpt.arrays import alias_key, allocate, copy_into, describe, destination, is_array, to_tensor
from deltackpt.errors import FormatError, InvalidInputError, MissingDependencyError
from deltackpt.types import DTYPE_SIZES, NOT_IN_NUMPY

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
FRAMEWORKS = ["numpy", pytest.param("torch", marks=needs_torch)]
SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (2, 3, 4)]
CASES = [
    pytest.param(framework, dtype, id=f"{framework}-{dtype}", marks=[needs_torch] * (framework == "torch"))
    for framework in ("numpy", "torch")
    for dtype in DTYPE_SIZES
    if framework == "torch" or dtype not in NOT_IN_NUMPY
]


def random_bytes(size, dtype="uint8"):
    return np.random.default_rng(size).integers(0, 2 if dtype == "bool" else 256, size, np.uint8)


def filled(framework, dtype, shape):
    array, data = allocate(dtype, shape, framework)
    data[:] = random_bytes(data.size, dtype)
    return array


def bits(array):
    return to_tensor(array, "x").data.tobytes()


@pytest.mark.parametrize(("framework", "dtype"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_array_is_its_bytes(framework, dtype, shape):
    array, data = allocate(dtype, shape, framework)
    data[:] = random_bytes(data.size, dtype)
    tensor = to_tensor(array, "x")
    assert describe(array) == (tensor.dtype, tensor.shape) == (dtype, shape)
    assert type(tensor.shape) is tuple
    assert tensor.framework == framework
    assert tensor.data.dtype == np.uint8
    assert tensor.data.shape == (int(np.prod(shape)) * DTYPE_SIZES[dtype],)
    assert tensor.data.tobytes() == data.tobytes()
    assert not data.size or np.shares_memory(tensor.data, data)


@pytest.mark.parametrize(("framework", "dtype"), CASES)
def test_bytes_go_into_the_array_they_came_from_and_into_the_other_frameworks(framework, dtype):
    saved = filled(framework, dtype, (4, 3))
    for other in ("numpy", "torch"):
        if (other == "numpy" and dtype in NOT_IN_NUMPY) or (other == "torch" and torch is None):
            continue
        plain, _ = allocate(dtype, (4, 3), other)
        destination(plain, dtype, (4, 3))[:] = to_tensor(saved, "x").data
        assert bits(plain) == bits(saved)

        strided = allocate(dtype, (3, 4), other)[0].T
        assert destination(strided, dtype, (4, 3)) is None
        copy_into(strided, saved)
        assert bits(strided) == bits(saved)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[::2, 1:],
        lambda x: x[:, ::-1],
        lambda x: np.broadcast_to(x[0], (5, 4)),
        np.asfortranarray,
        lambda x: x[1:3],
        lambda x: np.frombuffer(b"\0" + x.tobytes(), np.int32, offset=1),
    ],
)
def test_numpy_strides_are_followed(view):
    x = view(np.arange(24, dtype=np.int32).reshape(6, 4))
    assert to_tensor(x, "x").data.tobytes() == x.tobytes()


@needs_torch
def test_torch_views_are_resolved():
    x = torch.arange(24, dtype=torch.float32).reshape(6, 4).requires_grad_()
    c = torch.view_as_complex(torch.randn(3, 2))
    for view in (
        x,
        x.T,
        x[::2, 1:],
        x[0].expand(5, 4),
        torch.nn.Parameter(x),
        c.conj(),
        c.conj().imag,
        c[::2],
    ):
        plain = view.detach().clone().resolve_conj().resolve_neg()
        assert bits(view) == np.ascontiguousarray(plain.numpy()).tobytes()


def test_a_memmap_is_read_and_written_in_place(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(3, 2))
    assert type(to_tensor(x, "x").data) is np.ndarray
    destination(x, "float32", (3, 2))[:] = 1
    assert x.tobytes() == b"\1" * 24


@pytest.mark.parametrize(
    ("x", "says", "hint"),
    [
        (np.zeros(2, ">f4"), "dtype >f4", "newbyteorder"),
        (np.zeros(2, [("a", "f4")]), r"dtype \[\('a'", "fields"),
        (np.array([None]), "dtype object", "tolist"),
        (np.array(["a"]), "dtype <U1", "tolist"),
        (np.array(["2020"], "M8[s]"), r"dtype datetime64\[s\]", "int64"),
        (np.ma.masked_array([1.0], [True]), "MaskedArray", "x.mask"),
        (np.zeros((1, 1)).view(np.matrix), "matrix", "asarray"),
    ],
)
def test_numpy_arrays_of_no_plain_form_are_refused_by_name(x, says, hint):
    assert is_array(x)
    with pytest.raises(InvalidInputError, match=f"^model.w: .*{says}") as caught:
        to_tensor(x, "model.w")
    assert hint in caught.value.hint
    alias_key(x)


@needs_torch
def test_torch_tensors_of_no_plain_form_are_refused_by_name():
    class Sub(torch.Tensor):
        pass

    freed = torch.zeros(9)
    freed.untyped_storage().resize_(0)
    for x, says in (
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.zeros(2, device="meta"), "meta tensor"),
        (torch.zeros(2, dtype=torch.float8_e4m3fnuz), "dtype torch.float8_e4m3fnuz"),
        (torch.zeros(2).as_subclass(Sub), "Sub"),
        (freed, "storage was freed"),
    ):
        assert is_array(x)
        with pytest.raises(InvalidInputError, match=f"^model.w: .*{says}"):
            to_tensor(x, "model.w")
        alias_key(x)


def test_scalars_and_lists_are_no_arrays():
    assert not any(map(is_array, (np.float32(1), 1.0, [1], None, "x", memoryview(b"x"), np.ndarray)))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_only_the_same_view_of_the_same_memory_is_an_alias(framework):
    x = filled(framework, "float32", (4, 4))
    same = [x, x[:], x.T.T, x.reshape(4, 4)]
    others = [x.T, x[1:], x[:, :2], x.reshape(16), filled(framework, "float32", (4, 4))]
    assert len({alias_key(a) for a in same}) == 1
    assert len({alias_key(a) for a in [x, *others]}) == 1 + len(others)
    assert alias_key(x[:0]) is None


@needs_torch
def test_a_conjugate_is_no_alias_of_what_it_conjugates():
    c = torch.zeros(2, dtype=torch.complex64)
    assert c.conj().data_ptr() == c.data_ptr()
    assert alias_key(c.conj()) != alias_key(c)
    assert alias_key(c.conj().imag) != alias_key(c.imag)
    assert alias_key(torch.nn.Parameter(x := torch.zeros(2))) == alias_key(x)


def test_a_destination_of_another_dtype_or_shape_is_refused():
    for dtype, shape in (("float32", (3,)), ("float64", (2,)), ("float32", (2, 1))):
        with pytest.raises(InvalidInputError, match=r"w: the array is float32 \(2,\), expected"):
            destination(np.zeros(2, np.float32), dtype, shape, "w")


def test_a_read_only_destination_is_refused():
    with pytest.raises(InvalidInputError, match="w: the array is read-only"):
        destination(np.frombuffer(b"abcd", np.uint8), "uint8", (4,), "w")


def test_a_destination_that_overlaps_itself_is_refused():
    x = np.lib.stride_tricks.as_strided(np.zeros(9, np.uint8), (3, 4), (2, 1), writeable=True)
    with pytest.raises(InvalidInputError, match="overlap"):
        destination(x, "uint8", (3, 4))
    if torch is not None:
        with pytest.raises(InvalidInputError, match="overlap"):
            destination(torch.zeros(3).expand(2, 3), "float32", (2, 3))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_strided_destinations_are_not_taken_for_overlapping_ones(framework):
    x = filled(framework, "float32", (4, 5, 6))
    for view in (x.swapaxes(0, 2), x[::2, :, 1:], x[:, :1], x[:, 2:, 5]):
        assert destination(view, "float32", tuple(view.shape)) is None


@needs_torch
def test_a_parameter_and_a_conjugate_can_be_loaded_into():
    w = torch.nn.Parameter(torch.zeros(2))
    destination(w, "float32", (2,))[:] = to_tensor(np.array([1, 2], np.float32), "w").data
    assert w.tolist() == [1, 2]
    c = torch.zeros(2, dtype=torch.complex64)
    assert destination(c.conj(), "complex64", (2,)) is None
    copy_into(c.conj(), torch.tensor([1 + 2j, 3]))
    assert c.tolist() == [1 - 2j, 3]


def test_a_dtype_or_shape_that_a_framework_lacks_is_a_format_error():
    with pytest.raises(FormatError, match="NumPy has no dtype bfloat16"):
        allocate("bfloat16", (2,), "numpy")
    for shape in ((-1,), (1,) * 65, (1 << 62, 1 << 62)):
        with pytest.raises(FormatError, match="NumPy has no float32 array of shape"):
            allocate("float32", shape, "numpy")


@needs_torch
def test_a_shape_that_torch_lacks_is_a_format_error_and_one_too_large_a_memory_error():
    for shape in ((-1,), (1 << 62, 1 << 62)):
        with pytest.raises(FormatError, match="torch has no float32 tensor of shape"):
            allocate("float32", shape, "torch")
    with pytest.raises(MemoryError):
        allocate("uint8", (1 << 55,), "torch")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_large_array_is_writable_to_its_last_byte(framework):
    array, data = allocate("int16", (3 << 20, 1), framework)
    data[:] = 255
    assert int(array.min()) == int(array.max()) == -1


def test_torch_tensors_without_torch_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert not is_array(object())
    with pytest.raises(MissingDependencyError) as caught:
        allocate("float32", (2,), "torch")
    assert caught.value.hint == "pip install 'deltackpt[torch]'"


def test_torch_is_not_imported_for_numpy_arrays():
    program = (
        "import sys, numpy as np\n"
        "from deltackpt.arrays import *\n"
        "from deltackpt.tree import flatten\n"
        "x = np.zeros(3)\n"
        "flatten({'x': x, 'y': 1})\n"
        "is_array([]), destination(x, 'float64', (3,)), allocate('int8', (1,), 'numpy')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
