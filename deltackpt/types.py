"""The few plain values that every layer speaks of.

Owns   dtypes by name and size, and `Tensor`: bytes with a dtype and a shape, of whatever framework.
Never  imports a framework, touches a disk, or copies an array.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

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
}

#: Dtypes that NumPy itself does not have.
NOT_IN_NUMPY = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2"})


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named n-d array's bytes, in C order and little-endian.

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
        Returns the bytes, a copy each time.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    framework: Framework
    take: Callable[[], U8]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPE_SIZES[self.dtype]

    def taken(self) -> Tensor:
        """Return the tensor, with a copy of its bytes."""
        return Tensor(self.name, self.dtype, self.shape, self.framework, self.take())


#: Any nesting of dict, list, tuple, None, bool, int, float, str, bytes and arrays.
State: TypeAlias = Any
