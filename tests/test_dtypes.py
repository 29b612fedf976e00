"""Dtypes by name and by spelling, and what their bytes are stored as."""

import ml_dtypes
import numpy as np
import pytest
from anystate import NUMPY, SPELLED

from deltackpt.dtypes import carrier, itemsize, name_of, numpy_dtype
from deltackpt.errors import DeltackptError, FormatError, MissingDependencyError
from deltackpt.types import DTYPE_SIZES


@pytest.mark.parametrize("name", NUMPY)
def test_a_name_is_a_dtype_of_its_size(name):
    dtype = numpy_dtype(name)
    assert (name_of(dtype), dtype.itemsize, carrier(name)) == (name, DTYPE_SIZES[name], (name, 1))


@pytest.mark.parametrize("dtype", [*SPELLED, np.dtype("M8"), np.dtype("c32")], ids=str)
def test_a_spelling_is_its_dtype_and_is_carried_by_its_bytes(dtype):
    name = name_of(dtype)
    assert numpy_dtype(name) == dtype
    unit, n = carrier(name)
    assert DTYPE_SIZES[unit] * n == dtype.itemsize == itemsize(name)


def test_what_is_no_plain_number_time_or_text_has_no_name():
    for dtype in (object, [("a", "f4")], "V0", np.dtypes.StringDType(), ("i4", 3)):
        assert name_of(np.dtype(dtype)) is None
    assert name_of(np.dtype(ml_dtypes.bfloat16)) == "bfloat16"


def test_a_long_double_of_another_machine_is_refused():
    other = "/112" if np.finfo(np.longdouble).nmant == 63 else "/63"
    with pytest.raises(FormatError, match="another kind of machine"):
        numpy_dtype("<f16" + other)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "f4,f4",
        "<f4,<i4",
        "O",
        "|O",
        "<f3",
        "<U99999999999",
        "<f4[3]",
        "<M8[parsec]",
        "<f8/63",
        "<f4",
        "i4",
    ],
)
def test_any_other_text_is_no_dtype(text):
    with pytest.raises(DeltackptError):
        numpy_dtype(text)


def test_what_only_torch_has_says_what_to_install():
    with pytest.raises(MissingDependencyError) as caught:
        numpy_dtype("float4_e2m1fn_x2")
    assert "deltackpt[torch]" in caught.value.hint
