"""The few plain values that every layer speaks of.

Owns   dtypes by name and size; `Tensor` and `Deferred`, bytes with a dtype and a shape, here or yet to be
       copied; `View`, what an array is of one.
Never  imports a framework, touches a disk, or copies an array.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from deltackpt.layout import Layout

U8: TypeAlias = npt.NDArray[np.uint8]
Framework: TypeAlias = Literal["numpy", "torch"]

#: Element size in bytes by dtype name, the names being NumPy's and torch's own.
DTYPE_SIZES: dict[str, int] = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float8_e4m3": 1,
    "float8_e4m3b11fnuz": 1,
    "float8_e3m4": 1,
    "float6_e2m3fn": 1,
    "float6_e3m2fn": 1,
    "float4_e2m1fn": 1,
    "float4_e2m1fn_x2": 1,
    "int4": 1,
    "uint4": 1,
    "int2": 1,
    "uint2": 1,
    "complex32": 4,
}

#: Dtypes that NumPy has only with the help of ml_dtypes, if at all.
NOT_IN_NUMPY = frozenset(
    {"bfloat16", "complex32", "int4", "uint4", "int2", "uint2"}
    | {name for name in DTYPE_SIZES if name.startswith(("float8_", "float6_", "float4_"))}
)
#: Dtypes of ml_dtypes that torch does not have, or only as a name.
NOT_IN_TORCH = frozenset(
    {
        "float8_e4m3",
        "float8_e4m3b11fnuz",
        "float8_e3m4",
        "float6_e2m3fn",
        "float6_e3m2fn",
        "float4_e2m1fn",
        "int4",
        "uint4",
        "int2",
        "uint2",
    }
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named n-d array's bytes, little-endian, in C order of its shape.

    Parameters
    ----------
    name : str
        Key path joined by dots, e.g. ``"model.layer.0.weight"``; unique in a state.
    dtype : str
        A key of `DTYPE_SIZES`.
    shape : tuple of int
        ``()`` for a scalar.
    framework : {"numpy", "torch"}
        What it is given back as.
    data : ndarray of uint8, shape (size,)
        The bytes; may alias the caller's memory, so it is read and never written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    framework: Framework
    data: U8

    @property
    def size(self) -> int:
        """Bytes."""
        return int(self.data.size)


@dataclass(frozen=True, slots=True)
class Deferred:
    """A tensor whose bytes are somewhere else, or in another order: copied when they are needed, not before.

    A state on a device, or of transposed arrays, must not be in memory twice to be saved.

    Parameters
    ----------
    name, dtype, shape, framework
        As of `Tensor`.
    take : callable
        Returns the bytes, anew each time.
    is_own : bool
        Whether that is a copy, which nobody else has; if not, it may change once the tensor is saved.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    framework: Framework
    take: Callable[[], U8]
    is_own: bool = True

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPE_SIZES[self.dtype]

    def taken(self) -> Tensor:
        """Return the tensor, with its bytes."""
        return Tensor(self.name, self.dtype, self.shape, self.framework, self.take())


def without_bytes(tensor: Tensor | Deferred) -> Deferred:
    """Return what a tensor is; its bytes are not to be had from it."""
    return Deferred(tensor.name, tensor.dtype, tensor.shape, tensor.framework, no_bytes)


def no_bytes() -> U8:
    """Stand for bytes that nobody is to ask for."""
    raise AssertionError("the bytes of this tensor are not here")


@dataclass(frozen=True, slots=True)
class View:
    """What an array is, where it is not simply the tensor that holds its bytes.

    Parameters
    ----------
    dtype : str, optional
        A key of `DTYPE_SIZES`, or as `dtypes` spells it, ``">f4"``; given together with `layout`.
    layout : Layout, optional
        Where its elements lie in the tensor's bytes; None if it has the tensor's dtype and shape, in C order.
    parameter : bool
        Whether it is a torch.nn.Parameter.
    requires_grad : bool
    device : str, optional
        The device it was saved from, where that was not the CPU.
    """

    dtype: str | None = None
    layout: Layout | None = None
    parameter: bool = False
    requires_grad: bool = False
    device: str | None = None


#: An array that is simply its tensor.
WHOLE = View()

#: What the user saves; docs/reference.md lists all that may be in it.
State: TypeAlias = Any
