import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from anystate import NUMPY, TORCH, random_bytes

from deltackpt import arrays, dtypes
from deltackpt.arrays import (
    allocate,
    bytes_of,
    compact,
    copy_into,
    destination,
    is_array,
    look,
    memory,
    packed,
    view,
)
from deltackpt.errors import FormatError, InvalidInputError, MissingDependencyError
from deltackpt.layout import Layout
from deltackpt.types import DTYPE_SIZES, WHOLE, View

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
FRAMEWORKS = ["numpy", pytest.param("torch", marks=needs_torch)]
SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (2, 3, 4)]
CASES = [("numpy", dtype) for dtype in NUMPY] + [("torch", dtype) for dtype in TORCH]


def filled(framework, dtype, shape):
    array, data = allocate(dtype, shape, framework)
    data[:] = random_bytes(data.size, 5, dtype)
    return array


def plain(shape, dtype):
    return Layout.plain(shape, dtypes.itemsize(dtype))


@pytest.mark.parametrize(("framework", "dtype"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_array_is_its_bytes(framework, dtype, shape):
    array, data = allocate(dtype, shape, framework)
    data[:] = random_bytes(data.size, 5, dtype)
    facts = look(array)
    assert (facts.dtype, facts.layout.shape) == (dtype, shape)
    assert facts.framework == framework
    assert facts.layout.is_plain
    found = memory(facts, *facts.layout.span)
    assert found.dtype == np.uint8
    assert found.shape == (int(np.prod(shape)) * DTYPE_SIZES[dtype],)
    assert found.tobytes() == data.tobytes() == bytes_of(array)
    assert not data.size or np.shares_memory(found, data)


@pytest.mark.parametrize(("framework", "dtype"), CASES)
def test_bytes_go_into_the_array_they_came_from_and_into_the_other_frameworks(framework, dtype):
    saved = bytes_of(filled(framework, dtype, (4, 3)))
    data = np.frombuffer(saved, np.uint8)
    layout = plain((4, 3), dtype)
    for other in [f for f in ("numpy", "torch") if (f, dtype) in CASES]:
        whole, _ = allocate(dtype, (4, 3), other)
        destination(whole, dtype, layout)[:] = data
        assert bytes_of(whole) == saved

        base = allocate(dtype, (3, 4), other)[0]
        strided = base.T if other == "numpy" else base.t()
        assert destination(strided, dtype, layout) is None
        copy_into(strided, data, layout)
        assert bytes_of(strided) == saved
        assert bytes_of(compact(dtype, other, data, layout)) == saved


def test_an_array_of_the_same_order_is_loaded_into_in_place_whatever_that_order_is():
    x = np.zeros((4, 3), np.float32, order="F")
    assert np.shares_memory(destination(x, "float32", look(x).layout), x)
    assert destination(x, "float32", plain((4, 3), "float32")) is None
    row = np.zeros((3, 1, 4), np.float32)[:, :1]
    assert destination(row, "float32", Layout((3, 1, 4), (16, 4, 4), 0, 4)) is not None


@pytest.mark.parametrize(
    "of",
    [
        lambda x: x.T,
        lambda x: x[::2, 1:],
        lambda x: x[:, ::-1],
        lambda x: np.broadcast_to(x[0], (5, 4)),
        np.asfortranarray,
        lambda x: x[1:3],
        lambda x: np.frombuffer(b"\0" + x.tobytes(), np.int32, offset=1),
        lambda x: x.astype(">i4")[::2],
        lambda x: x.astype("U7")[:, 1:],
    ],
)
def test_numpy_strides_are_followed(of):
    x = of(np.arange(24, dtype=np.int32).reshape(6, 4))
    assert bytes_of(x) == x.tobytes()
    narrow = look(x).layout.narrowed()
    order = narrow.order()
    kept = x[tuple(slice(0, n) for n in narrow.shape)]
    assert packed(look(x)).tobytes() == kept.transpose(order).tobytes()


@needs_torch
def test_torch_views_are_resolved():
    x = torch.arange(24, dtype=torch.float32).reshape(6, 4).requires_grad_()
    c = torch.view_as_complex(torch.randn(3, 2))
    for one in (
        x,
        x.T,
        x[::2, 1:],
        x[0].expand(5, 4),
        torch.nn.Parameter(x),
        c.conj(),
        c.conj().imag,
        c[::2],
    ):
        expected = one.detach().clone().resolve_conj().resolve_neg()
        assert bytes_of(one) == np.ascontiguousarray(expected.numpy()).tobytes()
    facts = look(c.conj())
    assert memory(facts, *facts.layout.span).tobytes() == c.conj().resolve_conj().numpy().tobytes()


def test_a_memmap_is_read_and_written_in_place(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(3, 2))
    destination(x, "float32", plain((3, 2), "float32"))[:] = 1
    assert x.tobytes() == b"\1" * 24


@pytest.mark.parametrize(
    ("x", "says", "hint"),
    [
        (np.zeros(2, [("a", "f4")]), r"dtype \[\('a'", "fields"),
        (np.array([None]), "dtype object", "tolist"),
        (np.zeros(2, np.dtypes.StringDType()), "dtype StringDType", "tolist"),
        (np.zeros(2, [("", "i4", 3)]), "dtype", "fields"),
        (np.zeros(3, "V0"), r"dtype \|V0", "tolist"),
        (np.ma.masked_array([1.0], [True]), "MaskedArray", "x.mask"),
        (np.zeros((1, 1)).view(np.matrix), "matrix", "asarray"),
    ],
)
def test_numpy_arrays_of_no_plain_form_are_refused_by_name(x, says, hint):
    assert is_array(x)
    with pytest.raises(InvalidInputError, match=f"^model.w: .*{says}") as caught:
        look(x, "model.w")
    assert hint in caught.value.hint


@needs_torch
def test_torch_tensors_of_no_plain_form_are_refused_by_name():
    class Sub(torch.Tensor):
        pass

    freed = torch.zeros(9)
    freed.untyped_storage().resize_(0)
    for x, says in (
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.zeros(2, device="meta"), "meta tensor"),
        (torch.zeros(2, dtype=torch.uint8).view(torch.int4), "dtype torch.int4"),
        (torch.zeros(2).as_subclass(Sub), "Sub"),
        (freed, "storage was freed"),
    ):
        assert is_array(x)
        with pytest.raises(InvalidInputError, match=f"^model.w: .*{says}"):
            look(x, "model.w")


def test_scalars_and_lists_are_no_arrays():
    assert not any(map(is_array, (np.float32(1), 1.0, [1], None, "x", memoryview(b"x"), np.ndarray)))


def test_a_destination_of_another_dtype_or_shape_is_refused():
    for dtype, shape in (("float32", (3,)), ("float64", (2,)), ("float32", (2, 1))):
        with pytest.raises(InvalidInputError, match=r"w: the array is float32 \(2,\), expected"):
            destination(np.zeros(2, np.float32), dtype, plain(shape, dtype), "w")


def test_a_read_only_destination_is_refused():
    with pytest.raises(InvalidInputError, match="w: the array is read-only"):
        destination(np.frombuffer(b"abcd", np.uint8), "uint8", plain((4,), "uint8"), "w")


def test_a_destination_that_overlaps_itself_is_refused():
    x = np.lib.stride_tricks.as_strided(np.zeros(9, np.uint8), (3, 4), (2, 1), writeable=True)
    with pytest.raises(InvalidInputError, match="overlap"):
        destination(x, "uint8", plain((3, 4), "uint8"))
    if torch is not None:
        with pytest.raises(InvalidInputError, match="overlap"):
            destination(torch.zeros(3).expand(2, 3), "float32", plain((2, 3), "float32"))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_strided_destinations_are_not_taken_for_overlapping_ones(framework):
    x = filled(framework, "float32", (4, 5, 6))
    for one in (x.swapaxes(0, 2), x[::2, :, 1:], x[:, :1], x[:, 2:, 5]):
        assert destination(one, "float32", plain(tuple(one.shape), "float32")) is None


@needs_torch
def test_a_parameter_and_a_conjugate_can_be_loaded_into():
    w = torch.nn.Parameter(torch.zeros(2))
    destination(w, "float32", plain((2,), "float32"))[:] = np.array([1, 2], np.float32).view(np.uint8)
    assert w.tolist() == [1, 2]
    c = torch.zeros(2, dtype=torch.complex64)
    layout = plain((2,), "complex64")
    assert destination(c.conj(), "complex64", layout) is None
    copy_into(c.conj(), np.array([1 + 2j, 3], np.complex64).view(np.uint8), layout)
    assert c.tolist() == [1 - 2j, 3]


def test_a_view_lies_inside_its_tensor_or_is_a_format_error():
    base = np.arange(12, dtype=np.int32)
    assert view(base, WHOLE) is base
    good = view(base, View("int16", Layout((3,), (-8,), 20, 2)))
    assert good.tolist() == [5, 3, 1]
    good[0] = 9
    assert base[5] == 9
    for layout in (
        Layout((13,), (4,), 0, 4),
        Layout((2,), (4,), 44, 4),
        Layout((2,), (-4,), 0, 4),
        Layout((1 << 62, 1 << 62), (0, 0), 0, 4),
        Layout((3, 3), (4, 1 << 60), 0, 4),
    ):
        with pytest.raises(FormatError):
            view(base, View("int32", layout))
        if torch is not None:
            with pytest.raises(FormatError):
                view(torch.arange(12, dtype=torch.int32), View("int32", layout))


@needs_torch
def test_a_view_of_torch_cannot_grow_its_storage_or_fall_between_elements():
    base = torch.arange(4, dtype=torch.int32)
    with pytest.raises(FormatError):
        view(base, View("int32", Layout((2,), (2,), 0, 4)))
    with pytest.raises(FormatError):
        view(base, View("int64", Layout((5,), (8,), 0, 8)))
    assert base.untyped_storage().nbytes() == 16


def test_a_dtype_or_shape_that_a_framework_lacks_is_a_typed_error():
    with pytest.raises(MissingDependencyError, match="neither NumPy nor ml_dtypes"):
        allocate("float4_e2m1fn_x2", (2,), "numpy")
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
    with pytest.raises(MissingDependencyError, match="has no dtype int4"):
        allocate("int4", (1,), "torch")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_large_array_is_writable_to_its_last_byte(framework):
    array, data = allocate("int16", (3 << 20, 1), framework)
    data[:] = 255
    assert int(array.min()) == int(array.max()) == -1


def test_without_torch_its_tensors_are_arrays_of_numpy_and_of_ml_dtypes(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch", None)
    arrays.has_torch.cache_clear()
    try:
        assert allocate("float32", (2,), "torch")[0].dtype == np.float32
        assert allocate("bfloat16", (2,), "torch")[0].dtype == ml_dtypes.bfloat16
        assert allocate("float8_e5m2", (2,), "torch")[0].dtype == ml_dtypes.float8_e5m2
        assert caplog.text.count("torch is not installed") == 1
    finally:
        arrays.has_torch.cache_clear()


def test_torch_is_not_imported_for_numpy_arrays():
    program = (
        "import sys, numpy as np\n"
        "from deltackpt.arrays import *\n"
        "from deltackpt.tree import flatten\n"
        "x = np.zeros(3)\n"
        "flatten({'x': x, 'y': 1})\n"
        "is_array([]), destination(x, 'float64', look(x).layout), allocate('int8', (1,), 'numpy')\n"
        "assert not {'torch', 'ml_dtypes'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
