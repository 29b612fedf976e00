"""Dtypes: NumPy's by name, and those of NumPy's that have only a spelling.

Owns   which dtypes of NumPy and ml_dtypes are taken, how each is written down, as what its bytes are stored.
Never  touches an array, or evaluates what a file says a dtype is.

A dtype is written as its name, a key of `DTYPE_SIZES`.  The others that have a plain form are written in
NumPy's own spelling, ``>f4 <M8[ns] <U5 |S3 |V8``; a long double, whose format is the machine's, with the
bits of its mantissa behind a slash: ``<f16/63``.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

from deltackpt.codecs import Kind
from deltackpt.errors import FormatError, InvalidInputError, MissingDependencyError
from deltackpt.types import DTYPE_SIZES, NOT_IN_NUMPY

# Little-endian dtypes only, so that a foreign byte order is looked up and not found.
_NAMES = {np.dtype(name).newbyteorder("<"): name for name in DTYPE_SIZES if name not in NOT_IN_NUMPY}
_BY_NAME = {name: dtype for dtype, name in _NAMES.items()}
_SPELLING = re.compile(
    r"([<>|])([biufcmMSUV])([1-9][0-9]{0,8})(\[[0-9]{0,9}[A-Za-z]{1,7}\])?(?:/([0-9]{1,3}))?"
)
#: Bytes of an element: NumPy's own bound is 2**31.
_ITEMSIZE_MAX = 1 << 30
_N_CACHED = 1024


def name_of(dtype: np.dtype[Any]) -> str | None:
    """Write a dtype down; None if arrays of it have no plain form.

    Examples
    --------
    >>> name_of(np.dtype("float32")), name_of(np.dtype(">f4")), name_of(np.dtype("M8[ns]"))
    ('float32', '>f4', '<M8[ns]')
    >>> name_of(np.dtype(object))
    """
    name = _NAMES.get(dtype)
    if name is not None:
        return name
    if dtype.type.__module__ == "ml_dtypes":
        return dtype.name if dtype.name in NOT_IN_NUMPY and dtype.isnative else None
    if (
        dtype.kind not in "biufcmMSUV"
        or dtype.names
        or dtype.subdtype
        or dtype.hasobject
        or not dtype.itemsize
    ):
        return None
    if dtype.kind == "V" and dtype.type is not np.void:
        return None
    mantissa = _mantissa(dtype)
    return dtype.str if mantissa is None else f"{dtype.str}/{mantissa}"


def _mantissa(dtype: np.dtype[Any]) -> int | None:
    """Return the bits of a long double's mantissa; None for any other dtype."""
    if dtype.kind not in "fc" or dtype.itemsize // (1 + (dtype.kind == "c")) <= 8:
        return None
    return int(np.finfo(np.longdouble).nmant)


@functools.lru_cache(_N_CACHED)
def kind_of(name: str) -> Kind:
    """Return what a codec may know of a dtype's elements; a complex number is two floats.

    Examples
    --------
    >>> kind_of("bfloat16"), kind_of("complex64"), kind_of("int8")
    (Kind(itemsize=2, is_float=True), Kind(itemsize=4, is_float=True), Kind(itemsize=1, is_float=False))
    """
    size = DTYPE_SIZES[name]
    if name.startswith("complex"):
        return Kind(size // 2, True)
    return Kind(size, "float" in name and size > 1)


@functools.lru_cache(_N_CACHED)
def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype that is written down so.

    Raises
    ------
    FormatError
        If it is no dtype's name or spelling, or a long double of another kind of machine.
    MissingDependencyError
        If only torch, or another ml_dtypes, has it.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name in NOT_IN_NUMPY:
        import ml_dtypes

        scalar = getattr(ml_dtypes, name, None)
        if scalar is None:
            raise MissingDependencyError(
                f"neither NumPy nor ml_dtypes {ml_dtypes.__version__} has the dtype {name}",
                hint="pip install -U ml_dtypes, or pip install 'deltackpt[torch]'",
            )
        made: np.dtype[Any] = np.dtype(scalar)
        return made
    found = _SPELLING.fullmatch(name)
    dtype: np.dtype[Any] | None = None
    if found and int(found[3]) <= _ITEMSIZE_MAX:
        try:
            dtype = np.dtype(name.partition("/")[0])
        except (TypeError, ValueError):
            dtype = None
    if dtype is None:
        raise FormatError(f"dtype {name!r:.80} is none of NumPy's")
    if name_of(dtype) != name:
        raise FormatError(
            f"dtype {name!r} was saved on another kind of machine, here it would be {name_of(dtype)!r}",
            hint="load it where its numbers have the same format",
        )
    return dtype


def itemsize(name: str) -> int:
    """Return the bytes of an element of a dtype that is written down so."""
    size = DTYPE_SIZES.get(name)
    return numpy_dtype(name).itemsize if size is None else size


@functools.lru_cache(_N_CACHED)
def carrier(name: str) -> tuple[str, int]:
    """Return the dtype that a dtype's bytes are stored as, and how many of it make an element.

    Examples
    --------
    >>> carrier("float32"), carrier("<M8[ns]"), carrier("<U5"), carrier("|S3")
    (('float32', 1), ('uint64', 1), ('uint32', 5), ('uint8', 3))
    """
    if name in DTYPE_SIZES:
        return name, 1
    dtype = numpy_dtype(name)
    unit = 4 if dtype.kind == "U" else next(u for u in (8, 4, 2, 1) if dtype.itemsize % u == 0)
    if dtype.kind in "SV":
        unit = 1
    return f"uint{8 * unit}", dtype.itemsize // unit


def advice(dtype: np.dtype[Any]) -> str:
    """Say what to do with arrays of a dtype that has no plain form."""
    if dtype.names:
        return "pass a dict of its fields: {field: x[field] for field in x.dtype.names}"
    return "pass x.tolist(), or convert it with x.astype(...)"


def refuse(dtype: np.dtype[Any], where: str) -> InvalidInputError:
    """Return the error for an array, or a scalar, of a dtype that has no plain form."""
    return InvalidInputError(
        f"{where}: dtype {dtype} cannot be stored, expected numbers, times, fixed-size text or bytes",
        hint=advice(dtype),
    )
