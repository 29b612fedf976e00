"""Arrays: where NumPy's and torch's become bytes, and bytes become theirs again.

Owns   which array types and dtypes are taken, byte views onto them, when two of them are the same memory.
Never  imports torch unless an array of its kind is asked for, or knows where in a state an array sits.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

import numpy as np

from deltackpt.errors import FormatError, InvalidInputError, MissingDependencyError
from deltackpt.types import DTYPE_SIZES, NOT_IN_NUMPY, U8, Deferred, Framework, Tensor

#: A numpy.ndarray or a torch.Tensor: no static type covers both without importing torch.
Array: TypeAlias = Any

# Little-endian dtypes only, so that a foreign byte order is looked up and not found.
_NUMPY_NAMES = {np.dtype(name).newbyteorder("<"): name for name in DTYPE_SIZES if name not in NOT_IN_NUMPY}
_NUMPY_DTYPES = {name: dtype for dtype, name in _NUMPY_NAMES.items()}

# Below this NumPy does not ask for huge pages either.
_HUGE_SIZE_MIN = 4 << 20


def is_array(x: object) -> bool:
    """Whether `x` is a NumPy array, a torch tensor or a `Tensor`; NumPy's scalars are not arrays."""
    return isinstance(x, np.ndarray | Tensor) or _is_torch(x)


def to_tensor(x: Array, name: str) -> Tensor:
    """View an array's bytes, in C order and little-endian.

    Parameters
    ----------
    x : numpy.ndarray or torch.Tensor
        Of any shape, stride and device.  Copied once if it is not contiguous CPU memory, else not at all.
    name : str
        Its key path: the name of the result, and what an error calls it.

    Raises
    ------
    InvalidInputError
        If its type, dtype or layout cannot be stored.

    Examples
    --------
    >>> to_tensor(np.array([1, 2], np.int16), "x").data
    array([1, 0, 2, 0], dtype=uint8)
    """
    if isinstance(x, Tensor):  # from a file whose tensors belong to no framework
        return replace(x, name=name)
    if isinstance(x, np.ndarray):
        dtype, shape = _describe_numpy(x, name)
        # copy(), for ascontiguousarray() would make a 0-d array 1-d.
        plain = x if x.flags.c_contiguous else x.copy(order="C")
        return Tensor(name, dtype, shape, "numpy", _numpy_bytes(plain))
    dtype, shape = _describe_torch(x, name)
    plain = x.detach() if x.requires_grad else x
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    if not plain.is_cpu:
        plain = plain.cpu()
    return Tensor(name, dtype, shape, "torch", _torch_bytes(plain.contiguous(), dtype))


def deferred(x: Array, name: str) -> Tensor | Deferred:
    """Return `to_tensor`'s result where that takes no copy, else a promise of it; refuses the same arrays."""
    if isinstance(x, Tensor):
        return to_tensor(x, name)
    dtype, shape = describe(x, name)
    if isinstance(x, np.ndarray):
        is_plain, framework = bool(x.flags.c_contiguous), "numpy"
    else:
        is_plain = x.is_cpu and x.is_contiguous() and not (x.is_conj() or x.is_neg())
        framework = "torch"
    if is_plain:
        return to_tensor(x, name)
    return Deferred(name, dtype, shape, cast(Framework, framework), lambda: to_tensor(x, name).data)


def describe(x: Array, name: str = "array") -> tuple[str, tuple[int, ...]]:
    """Name an array's dtype, a key of `DTYPE_SIZES`, and give its shape.

    Raises
    ------
    InvalidInputError
        If its type, dtype or layout cannot be stored; the message starts with `name`.

    Examples
    --------
    >>> describe(np.zeros((2, 3), np.float32))
    ('float32', (2, 3))
    """
    if isinstance(x, Tensor):
        return x.dtype, x.shape
    return _describe_numpy(x, name) if isinstance(x, np.ndarray) else _describe_torch(x, name)


def alias_key(x: Array) -> tuple[Any, ...] | None:
    """Give two arrays the same key exactly when they are the same view of the same memory.

    Returns
    -------
    tuple or None
        Valid while the array lives; None if it holds no memory of its own kind, and so shares none.
    """
    if isinstance(x, Tensor):
        return None
    if isinstance(x, np.ndarray):
        address: int = x.__array_interface__["data"][0]
        return (address, x.shape, x.strides, x.dtype) if x.size else None
    try:
        address = x.data_ptr()
        # conj() shares the memory whose signs it changes only when read.
        key = (address, x.shape, x.stride(), x.dtype, x.device, x.is_conj(), x.is_neg())
    except RuntimeError:  # sparse, quantized per channel, fake
        return None
    return key if address and x.numel() else None


def allocate(dtype: str, shape: Sequence[int], framework: Framework) -> tuple[Array, U8]:
    """Make an uninitialised array, and a writable view of its bytes.

    Parameters
    ----------
    dtype : str
        A key of `DTYPE_SIZES`.
    shape : sequence of int
        ``()`` for a 0-d array.
    framework : {"numpy", "torch"}
        Whose array.

    Returns
    -------
    array : numpy.ndarray or torch.Tensor
        On the CPU.
    data : ndarray of uint8, shape (size,)
        The same memory.

    Raises
    ------
    MissingDependencyError
        If it is torch's and torch is not installed.
    FormatError
        If the framework has no such array.

    Examples
    --------
    >>> array, data = allocate("int16", (2,), "numpy")
    >>> data[:] = [1, 0, 2, 0]
    >>> array
    array([1, 2], dtype=int16)
    """
    if framework == "torch":
        return _allocate_torch(dtype, shape)
    if dtype not in _NUMPY_DTYPES:
        raise FormatError(f"NumPy has no dtype {dtype}", hint="load it as a torch tensor")
    try:
        array = np.empty(shape, _NUMPY_DTYPES[dtype])
    except (ValueError, OverflowError) as error:
        raise FormatError(f"NumPy has no {dtype} array of shape {tuple(shape)}: {error}") from error
    return array, _numpy_bytes(array)


def destination(x: Array, dtype: str, shape: Sequence[int], name: str = "array") -> U8 | None:
    """View a caller's array as writable bytes, to load into it without a second copy.

    Parameters
    ----------
    x : numpy.ndarray or torch.Tensor
        Of either framework, whichever the bytes were saved from.
    dtype, shape
        What it must be.
    name : str
        What an error calls it.

    Returns
    -------
    ndarray of uint8, shape (size,), or None
        None if it is not contiguous CPU memory: fill a temporary, then `copy_into`.

    Raises
    ------
    InvalidInputError
        If it is something else, is read-only, or holds elements that overlap.
    """
    found = describe(x, name)
    if found != (dtype, tuple(shape)):
        wanted = f"{dtype} {tuple(shape)}"
        raise InvalidInputError(f"{name}: the array is {found[0]} {found[1]}, expected {wanted}")
    is_numpy = isinstance(x, np.ndarray)
    if isinstance(x, Tensor) or (is_numpy and not x.flags.writeable):
        raise InvalidInputError(
            f"{name}: the array is read-only", hint="pass a writable array, e.g. x.copy()"
        )
    if is_numpy and x.flags.c_contiguous:
        return _numpy_bytes(x)
    if not is_numpy and x.is_cpu and x.is_contiguous() and not (x.is_conj() or x.is_neg()):
        return _torch_bytes(x.detach(), dtype)
    if _may_overlap(x.shape, x.strides if is_numpy else x.stride(), x.itemsize if is_numpy else 1):
        raise InvalidInputError(f"{name}: the array's elements overlap in memory", hint="pass a copy of it")
    return None


def copy_into(x: Array, array: Array) -> None:
    """Copy a temporary into a caller's array for which `destination` gave None.

    Parameters
    ----------
    x : numpy.ndarray or torch.Tensor
        The caller's, on any device.
    array : numpy.ndarray or torch.Tensor
        Of either framework, with the bytes of `x` in C order, whatever its own dtype and shape.
    """
    data = to_tensor(array, "temporary").data
    if isinstance(x, np.ndarray):
        np.copyto(x, data.view(x.dtype).reshape(x.shape))
        return
    torch = sys.modules["torch"]
    x.detach().copy_(torch.from_numpy(data).view(x.dtype).reshape(x.shape))


def _is_torch(x: object) -> bool:
    # getattr: another thread may be half way through importing torch.
    return isinstance(x, getattr(sys.modules.get("torch"), "Tensor", ()))


@functools.cache
def _torch_names() -> dict[Any, str]:
    torch = sys.modules["torch"]
    return {getattr(torch, name): name for name in DTYPE_SIZES}


def _describe_numpy(x: Array, name: str) -> tuple[str, tuple[int, ...]]:
    kind = type(x)
    if kind is not np.ndarray and kind is not np.memmap:
        raise InvalidInputError(
            f"{name}: cannot keep a {kind.__module__}.{kind.__qualname__} as it is, expected a plain array",
            hint="pass numpy.asarray(x); for a masked array, pass x.data and x.mask",
        )
    dtype = _NUMPY_NAMES.get(x.dtype)
    if dtype is None:
        raise InvalidInputError(
            f"{name}: dtype {x.dtype} cannot be stored, expected one of {', '.join(_NUMPY_DTYPES)}",
            hint=_numpy_advice(x.dtype),
        )
    return dtype, x.shape


def _numpy_advice(dtype: np.dtype[Any]) -> str:
    if dtype.newbyteorder("<") in _NUMPY_NAMES:
        return "pass x.astype(x.dtype.newbyteorder('<'))"
    if dtype.names:
        return "pass a dict of its fields: {field: x[field] for field in x.dtype.names}"
    if dtype.kind in "mM":
        return "pass x.view('int64'), and the unit beside it"
    return "pass x.tolist(), or convert it with x.astype(...)"


def _describe_torch(x: Array, name: str) -> tuple[str, tuple[int, ...]]:
    torch = sys.modules["torch"]
    kind = type(x)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        raise InvalidInputError(
            f"{name}: cannot keep a {kind.__module__}.{kind.__qualname__} as it is, expected a plain tensor",
            hint="pass its parts as plain tensors; for a DTensor, pass x.to_local() or x.full_tensor()",
        )
    if x.layout is not torch.strided:
        hint = "pass x.to_dense(), or its indices and values"
        raise InvalidInputError(
            f"{name}: layout {x.layout} cannot be stored, expected a dense tensor", hint=hint
        )
    dtype = _torch_names().get(x.dtype)
    if dtype is None:
        raise InvalidInputError(
            f"{name}: dtype {x.dtype} cannot be stored, expected one of {', '.join(DTYPE_SIZES)}",
            hint="for a quantized tensor pass x.int_repr() and its scales, else x.view(torch.uint8)",
        )
    # FSDP frees parameters by shrinking their storage to nothing: reading one would read address 0.
    if not x.data_ptr() and x.numel() and (x.is_cpu or x.is_meta):
        kind_of = "a meta tensor" if x.is_meta else "a tensor whose storage was freed"
        raise InvalidInputError(f"{name}: {kind_of} has no bytes", hint="give it its values first")
    return dtype, tuple(x.shape)


def _allocate_torch(dtype: str, shape: Sequence[int]) -> tuple[Array, U8]:
    try:
        import torch
    except ImportError as error:
        message = "this tensor was saved from torch, which is not installed"
        raise MissingDependencyError(message, hint="pip install 'deltackpt[torch]'") from error
    try:
        array = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="cpu")
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise FormatError(f"torch has no {dtype} tensor of shape {tuple(shape)}: {error}") from error
    data = _torch_bytes(array, dtype)
    _ask_for_huge_pages(data)
    return array, data


def _numpy_bytes(x: Array) -> U8:
    # asarray: a view onto a memmap is a memmap, whose every slice costs microseconds.
    view: U8 = np.asarray(x).reshape(-1).view(np.uint8)
    return view


def _torch_bytes(x: Array, dtype: str) -> U8:
    # numpy() before view(): 1.2 us against 2.2, NumPy's views being the cheaper ones.
    if dtype in NOT_IN_NUMPY:
        torch = sys.modules["torch"]
        x = x.view(torch.int16 if DTYPE_SIZES[dtype] == 2 else torch.uint8)
    return _numpy_bytes(x.numpy())


def _may_overlap(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether two indices might mean the same bytes; exact for slices and transposes of a plain array."""
    spans = sorted((abs(stride), n) for stride, n in zip(strides, shape, strict=True) if n > 1)
    sizes = itertools.accumulate((stride * (n - 1) for stride, n in spans), initial=itemsize)
    return math.prod(shape) > 0 and any(
        stride < size for (stride, _), size in zip(spans, sizes, strict=False)
    )


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _ask_for_huge_pages(data: U8) -> None:
    """Ask as NumPy does for its own arrays: fresh memory is then written about four times as fast."""
    madvise = _madvise()
    if madvise is None or data.size < _HUGE_SIZE_MIN:
        return
    start = -(-data.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (data.ctypes.data + data.size) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise(start, end - start, mmap.MADV_HUGEPAGE)  # advice: no answer is wrong
