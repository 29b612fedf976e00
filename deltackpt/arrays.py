"""Arrays: where NumPy's and torch's become bytes, and bytes become theirs again.

Owns   which array types are taken, what one is (`Facts`), its memory as bytes, making arrays over bytes.
Never  imports torch unless an array of its kind is asked for, or knows where in a state an array sits.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import numpy as np

from deltackpt import devices, dtypes
from deltackpt.errors import FormatError, InvalidInputError, MissingDependencyError
from deltackpt.layout import Layout, plain_strides
from deltackpt.types import (
    DTYPE_SIZES,
    NOT_IN_NUMPY,
    NOT_IN_TORCH,
    U8,
    WHOLE,
    Deferred,
    Framework,
    Tensor,
    View,
)

log = logging.getLogger("deltackpt")

#: A numpy.ndarray, a torch.Tensor, a `Tensor` or a `Deferred`: no static type covers them without torch.
Array: TypeAlias = Any

# Below this NumPy does not ask for huge pages either.
_HUGE_SIZE_MIN = 4 << 20
#: Dtypes that every operation of torch takes, by element size: bits go through unchanged.
_TORCH_CARRIERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64", 16: "complex128"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is to know of an array.

    Parameters
    ----------
    array : numpy.ndarray, torch.Tensor, Tensor or Deferred
    framework : {"numpy", "torch"}
    dtype : str
        As `dtypes` writes it down.
    layout : Layout
        Its offset is the address in `space`.
    space : hashable
        Two arrays can share memory only if these are equal: "numpy", or torch's name of a device.
    is_direct : bool
        Whether its address is in this process's memory; if not, its bytes are to be copied from elsewhere.
    parameter, requires_grad, device
        As of `View`.
    """

    array: Array
    framework: Framework
    dtype: str
    layout: Layout
    space: Hashable
    is_direct: bool
    parameter: bool = False
    requires_grad: bool = False
    device: str | None = None

    @property
    def is_simple(self) -> bool:
        """Whether a tensor of its dtype and shape could be just this array."""
        return self.dtype in DTYPE_SIZES and self.layout.is_plain

    def as_whole(self) -> View:
        """Return what it is of a tensor of its dtype and shape."""
        if self.parameter or self.requires_grad or self.device is not None:
            return View(None, None, self.parameter, self.requires_grad, self.device)
        return WHOLE


def is_array(x: object) -> bool:
    """Whether `x` is an array of NumPy's or torch's, a `Tensor` or a `Deferred`; NumPy's scalars are none."""
    return isinstance(x, np.ndarray | Tensor | Deferred) or _is_torch(x)


def look(x: Array, name: str = "array") -> Facts:
    """Return what there is to know of an array.

    Raises
    ------
    InvalidInputError
        If its type, dtype or layout cannot be stored; the message starts with `name`.

    Examples
    --------
    >>> facts = look(np.zeros((2, 3), np.float32).T)
    >>> facts.dtype, facts.layout.shape, facts.layout.strides
    ('float32', (3, 2), (4, 12))
    """
    if isinstance(x, Tensor):  # from a file whose tensors belong to no framework
        layout = Layout.plain(x.shape, DTYPE_SIZES[x.dtype], _address(x.data))
        return Facts(x, x.framework, x.dtype, layout, (id(x), "file"), True)
    if isinstance(x, Deferred):  # of a framework that an integration speaks for
        layout = Layout.plain(x.shape, DTYPE_SIZES[x.dtype])
        return Facts(x, x.framework, x.dtype, layout, (id(x), "deferred"), False)
    return _look_numpy(x, name) if isinstance(x, np.ndarray) else _look_torch(x, name)


def memory(facts: Facts, start: int, stop: int, *, writable: bool = False) -> U8:
    """Return the bytes from one address to another of an array's memory, or a copy if it is elsewhere.

    The array must span some of them, and all of them be of the same block of memory.
    """
    if isinstance(facts.array, Tensor):
        at = facts.layout.offset
        return facts.array.data[start - at : stop - at]
    if isinstance(facts.array, Deferred):
        return facts.array.take()[start:stop]
    if facts.is_direct:
        return np.asarray(_Memory(start, stop - start, facts.array, not writable))
    return _fetched(facts, on_device(facts, (start, stop)))


def packed(facts: Facts) -> U8:
    """Return a copy of an array's elements without gaps, its axes in the order they have in memory."""
    if facts.framework == "numpy":
        return _numpy_bytes(facts.array[_narrow(facts)].transpose(facts.layout.order()).copy(order="C"))
    return _fetched(facts, on_device(facts, None))


def on_device(facts: Facts, span: tuple[int, int] | None) -> Array:
    """Return the bytes of a torch tensor where they are, as a tensor of uint8 and of one axis.

    Parameters
    ----------
    facts : Facts
        Of a torch tensor.
    span : (int, int) or None
        As `memory` takes it: its own memory, or a copy there with its signs resolved.  None: a copy there of
        its elements, as `packed` returns them.
    """
    plain = facts.array.detach()
    if span is None:
        packed = _as_carrier(plain)[_narrow(facts)].permute(facts.layout.order()).contiguous()
        return packed.reshape(-1).view(sys.modules["torch"].uint8)
    start, stop = span
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg().contiguous()
        return _strided(plain, "uint8", Layout.plain((plain.numel() * plain.element_size(),), 1))
    offset = start - facts.layout.offset + plain.storage_offset() * plain.element_size()
    return _strided(plain, "uint8", Layout.plain((stop - start,), 1, offset))


def _narrow(facts: Facts) -> tuple[slice, ...]:
    """Return what picks one of the elements of an axis that are all in one place."""
    return tuple(
        slice(0, 1) if stride == 0 and n else slice(None)
        for n, stride in zip(facts.layout.shape, facts.layout.strides, strict=True)
    )


def _fetched(facts: Facts, raw: Array) -> U8:
    return devices.fetch(raw) if facts.device is not None else _torch_bytes(raw, "uint8")


class _Memory:
    """What NumPy makes an array over, and keeps as its base: an address, and who owns what is there."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, address: int, size: int, owner: object, read_only: bool) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "data": (address, read_only),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }


def allocate(dtype: str, shape: Sequence[int], framework: Framework) -> tuple[Array, U8]:
    """Make an uninitialised array, and a writable view of its bytes.

    Parameters
    ----------
    dtype : str
        A key of `DTYPE_SIZES`; for NumPy as `dtypes` writes it down.
    shape : sequence of int
        ``()`` for a 0-d array.
    framework : {"numpy", "torch"}
        Whose array; NumPy's, with ml_dtypes, if it is torch's and torch is not installed.

    Returns
    -------
    array : numpy.ndarray or torch.Tensor
        On the CPU.
    data : ndarray of uint8, shape (size,)
        The same memory.

    Raises
    ------
    MissingDependencyError
        If no package that is installed has the dtype.
    FormatError
        If the framework has no such array.

    Examples
    --------
    >>> array, data = allocate("int16", (2,), "numpy")
    >>> data[:] = [1, 0, 2, 0]
    >>> array
    array([1, 2], dtype=int16)
    """
    if framework == "torch" and has_torch():
        return _allocate_torch(dtype, shape)
    kind = dtypes.numpy_dtype(dtype)
    try:
        array = np.empty(shape, kind)
    except (ValueError, OverflowError) as error:
        raise FormatError(f"NumPy has no {dtype} array of shape {tuple(shape)}: {error}") from error
    return array, _numpy_bytes(array)


@functools.cache
def has_torch() -> bool:
    """Whether torch can be imported, which this does; says once if not."""
    try:
        import torch  # noqa: F401
    except ImportError:
        log.warning("torch is not installed: its tensors come back as NumPy arrays")
        return False
    return True


def view(base: Array, what: View, where: str = "array") -> Array:
    """Make the array that `what` says, over the memory of another.

    Parameters
    ----------
    base : numpy.ndarray or torch.Tensor
        In C order, without gaps.
    what : View
        Need not be trusted.
    where : str
        What an error calls it.

    Raises
    ------
    FormatError
        If it does not lie inside `base`, or the framework has no such array.

    Examples
    --------
    >>> view(np.arange(6), View(layout=Layout((3, 2), (8, 24), 0, 8)))
    array([[0, 3],
           [1, 4],
           [2, 5]])
    """
    if what == WHOLE:
        return base
    is_torch = _is_torch(base)
    dtype = what.dtype or _dtype_of(base)
    layout = what.layout or Layout.plain(tuple(base.shape), dtypes.itemsize(dtype))
    size = base.numel() * base.element_size() if is_torch else base.nbytes
    start, stop = layout.span
    if start < 0 or stop > size or min(layout.shape, default=0) < 0:
        raise FormatError(f"{where}: found bytes {start} to {stop} of a tensor of {size}")
    try:
        if is_torch:
            return _torch_view(base, dtype, what, layout)
        kind, data = dtypes.numpy_dtype(dtype), _numpy_bytes(base)
        return np.ndarray(layout.shape, kind, data, layout.offset, layout.strides)
    except (ValueError, OverflowError, RuntimeError, TypeError) as error:
        raise FormatError(f"{where}: no {dtype} array of {layout}: {error}") from error


def _torch_view(base: Array, dtype: str, what: View, layout: Layout) -> Array:
    torch = sys.modules["torch"]
    x = base
    if what.dtype is not None or what.layout is not None:
        x = _strided(base, dtype, layout)
    if what.parameter:
        return torch.nn.Parameter(x, requires_grad=what.requires_grad)
    # Not on the base itself: another array of the state may be the same memory without gradients.
    return x.detach().requires_grad_() if what.requires_grad else x


def _strided(x: Array, dtype: str, layout: Layout) -> Array:
    """Return a torch tensor over the storage of another; `layout` counts from the storage's start."""
    torch = sys.modules["torch"]
    kind = _torch_dtype(dtype)
    if any(n % kind.itemsize for n in (layout.offset, *layout.strides)):
        raise ValueError(f"elements of {kind.itemsize} bytes cannot lie there in torch")
    strides = [stride // kind.itemsize for stride in layout.strides]
    made = torch.empty(0, dtype=kind, device=x.device)
    # The caller has checked that all of it is in there: set_() would make a storage that is too small larger.
    return made.set_(x.untyped_storage(), layout.offset // kind.itemsize, layout.shape, strides)


def destination(x: Array, dtype: str, layout: Layout, name: str = "array") -> U8 | None:
    """View a caller's array as writable bytes, to load into it without a second copy.

    Parameters
    ----------
    x : numpy.ndarray or torch.Tensor
        Of either framework, whichever the bytes were saved from.
    dtype : str
        What it must be.
    layout : Layout
        Whose shape it must have.
    name : str
        What an error calls it.

    Returns
    -------
    ndarray of uint8, shape (size,), or None
        None unless it is CPU memory that its elements fill in the order that `layout` has: fill a temporary,
        then `copy_into`.

    Raises
    ------
    InvalidInputError
        If it is something else, is read-only, or holds elements that overlap.
    """
    facts = look(x, name)
    if (facts.dtype, facts.layout.shape) != (dtype, layout.shape):
        wanted = f"{dtype} {layout.shape}"
        raise InvalidInputError(f"{name}: the array is {facts.dtype} {facts.layout.shape}, expected {wanted}")
    if isinstance(x, Tensor | Deferred) or (isinstance(x, np.ndarray) and not x.flags.writeable):
        raise InvalidInputError(
            f"{name}: the array is read-only", hint="pass a writable array, e.g. x.copy()"
        )
    if facts.layout.overlaps():
        raise InvalidInputError(f"{name}: the array's elements overlap in memory", hint="pass a copy of it")
    if not facts.layout.size:
        return np.empty(0, np.uint8)
    start, stop = facts.layout.span
    same = replace(facts.layout.moved(-start), strides=_ignoring_single(facts.layout))
    if (
        facts.is_direct
        and facts.layout.is_solid()
        and same == replace(layout.moved(-layout.span[0]), strides=_ignoring_single(layout))
    ):
        return memory(facts, start, stop, writable=True)
    return None


def _ignoring_single(layout: Layout) -> tuple[int, ...]:
    """Return strides with 0 for axes of one element, where they mean nothing."""
    return tuple(s if n > 1 else 0 for n, s in zip(layout.shape, layout.strides, strict=True))


def copy_into(x: Array, data: U8, layout: Layout) -> None:
    """Copy the elements that lie somewhere in some bytes into a caller's array.

    Parameters
    ----------
    x : numpy.ndarray or torch.Tensor
        The caller's, on any device.
    data : ndarray of uint8, shape (size,)
    layout : Layout
        Where in `data` the elements of `x` lie; it must not reach out of it.
    """
    if isinstance(x, np.ndarray):
        raw = np.dtype((np.void, layout.itemsize))
        np.copyto(x.view(raw), np.ndarray(layout.shape, raw, data, layout.offset, layout.strides))
        return
    torch = sys.modules["torch"]
    carrier = np.dtype(_TORCH_CARRIERS[layout.itemsize])
    plain = np.ndarray(layout.shape, carrier, data, layout.offset, layout.strides)
    source = torch.from_numpy(plain.copy())  # from_numpy() takes no negative strides
    target = x.detach()
    if target.is_conj() or target.is_neg():
        target.copy_(source.view(x.dtype))
    else:
        _as_carrier(target).copy_(source)


def copy_elements(out: U8, data: U8, layout: Layout) -> None:
    """Copy the elements that lie somewhere in some bytes, in C order, into as many bytes."""
    if layout.size:
        raw = np.dtype((np.void, layout.itemsize))
        copy_into(np.ndarray(layout.shape, raw, out), data, layout)


def compact(dtype: str, framework: Framework, data: U8, layout: Layout) -> Array:
    """Make an array in C order of the elements that lie somewhere in some bytes.

    Examples
    --------
    >>> compact("uint8", "numpy", np.arange(9, dtype=np.uint8), Layout((2, 2), (-3, 2), 5, 1))
    array([[5, 7],
           [2, 4]], dtype=uint8)
    """
    array, _ = allocate(dtype, layout.shape, framework if dtype in DTYPE_SIZES else "numpy")
    if layout.size:
        copy_into(array, data, layout)
    return array


def as_torch(x: np.ndarray[Any, Any], dtype: str) -> Array:
    """Make a torch tensor over an array's memory, or over a copy if that is not plain and writable."""
    torch = sys.modules["torch"]
    carried = x.view(_TORCH_CARRIERS[x.itemsize])
    return torch.from_numpy(np.require(carried, None, ["C", "W"])).view(getattr(torch, dtype))


def as_numpy(x: Array) -> np.ndarray[Any, Any]:
    """Return an array of NumPy's with the elements of one of either framework."""
    if isinstance(x, np.ndarray):
        return x
    facts = look(x)
    data = np.frombuffer(bytes_of(x), np.uint8)
    array: np.ndarray[Any, Any] = data.view(dtypes.numpy_dtype(facts.dtype)).reshape(facts.layout.shape)
    return array


def bytes_of(x: Array) -> bytes:
    """Return a copy of an array's elements in C order, whatever its strides.

    Examples
    --------
    >>> bytes_of(np.array([[1, 2], [3, 4]], np.uint8).T)
    b'\\x01\\x03\\x02\\x04'
    """
    facts = look(x)
    if isinstance(x, Tensor):
        return x.data.tobytes()
    if isinstance(x, Deferred):
        return x.take().tobytes()
    if isinstance(x, np.ndarray):
        return x.tobytes()
    plain = x.detach().resolve_conj().resolve_neg() if x.is_conj() or x.is_neg() else x.detach()
    return _torch_bytes(
        _as_carrier(plain).cpu().contiguous(), _TORCH_CARRIERS[facts.layout.itemsize]
    ).tobytes()


def _is_torch(x: object) -> bool:
    # getattr: another thread may be half way through importing torch.
    return isinstance(x, getattr(sys.modules.get("torch"), "Tensor", ()))


def _dtype_of(x: Array) -> str:
    name = _torch_names().get(x.dtype) if _is_torch(x) else dtypes.name_of(x.dtype)
    assert name is not None
    return name


@functools.cache
def _torch_names() -> dict[Any, str]:
    torch = sys.modules["torch"]
    names = [name for name in DTYPE_SIZES if name not in NOT_IN_TORCH and hasattr(torch, name)]
    return {getattr(torch, name): name for name in names}


def _look_numpy(x: Array, name: str) -> Facts:
    kind = type(x)
    if kind is not np.ndarray and kind is not np.memmap:
        raise InvalidInputError(
            f"{name}: cannot keep a {kind.__module__}.{kind.__qualname__} as it is, expected a plain array",
            hint="pass numpy.asarray(x); for a masked array, pass x.data and x.mask",
        )
    dtype = dtypes.name_of(x.dtype)
    if dtype is None:
        raise dtypes.refuse(x.dtype, name)
    # The strides of an array without elements mean nothing.
    strides = x.strides if x.size else plain_strides(x.shape, x.itemsize)
    return Facts(x, "numpy", dtype, Layout(x.shape, strides, _address(x), x.itemsize), "numpy", True)


def _address(x: np.ndarray[Any, Any]) -> int:
    address: int = x.__array_interface__["data"][0]
    return address


def _look_torch(x: Array, name: str) -> Facts:
    torch = sys.modules["torch"]
    kind = type(x)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        raise InvalidInputError(
            f"{name}: cannot keep a {kind.__module__}.{kind.__qualname__} as it is, expected a plain tensor",
            hint="pass its parts as plain tensors; for a DTensor, pass x.to_local() or x.full_tensor()",
        )
    if x.layout is not torch.strided or x.is_nested:
        hint = "pass x.to_dense(), or its indices and values"
        raise InvalidInputError(
            f"{name}: layout {'nested' if x.is_nested else x.layout} cannot be stored, "
            "expected a dense tensor",
            hint=hint,
        )
    dtype = _torch_names().get(x.dtype)
    if dtype is None:
        raise InvalidInputError(
            f"{name}: dtype {x.dtype} cannot be stored, expected one of {', '.join(_torch_names().values())}",
            hint="for a quantized tensor pass x.int_repr() and its scales, else x.view(torch.uint8)",
        )
    itemsize = DTYPE_SIZES[dtype]
    shape = tuple(x.shape)
    if x.is_meta and x.numel():
        raise InvalidInputError(f"{name}: a meta tensor has no bytes", hint="give it its values first")
    device = devices.device_of(x)
    parameter = kind is torch.nn.Parameter
    if x.is_conj() or x.is_neg():  # the memory whose signs it changes when read is no copy of it
        space: Hashable = (id(x), "resolved")
        layout, is_direct = Layout.plain(shape, itemsize), False
    else:
        space = device or "torch"
        strides = tuple([stride * itemsize for stride in x.stride()])
        strides = strides if x.numel() else plain_strides(shape, itemsize)
        layout, is_direct = Layout(shape, strides, x.data_ptr(), itemsize), device is None
        # FSDP frees parameters by shrinking their storage: reading one would read what is somebody else's.
        end = layout.span[1] - layout.offset + x.storage_offset() * itemsize
        if x.numel() and end > x.untyped_storage().nbytes():
            raise InvalidInputError(
                f"{name}: a tensor whose storage was freed has no bytes", hint="give it its values first"
            )
    return Facts(x, "torch", dtype, layout, space, is_direct, parameter, x.requires_grad, device)


def _allocate_torch(dtype: str, shape: Sequence[int]) -> tuple[Array, U8]:
    torch, kind = sys.modules["torch"], _torch_dtype(dtype)
    try:
        array = torch.empty(tuple(shape), dtype=kind, device="cpu")
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise FormatError(f"torch has no {dtype} tensor of shape {tuple(shape)}: {error}") from error
    data = _torch_bytes(array, dtype)
    _ask_for_huge_pages(data)
    return array, data


def _torch_dtype(name: str) -> Any:
    torch = sys.modules["torch"]
    kind = None if name in NOT_IN_TORCH or name not in DTYPE_SIZES else getattr(torch, name, None)
    if kind is None:
        raise MissingDependencyError(
            f"torch {torch.__version__} has no dtype {name}", hint="pip install -U torch"
        )
    return kind


def _numpy_bytes(x: Array) -> U8:
    # asarray: a view onto a memmap is a memmap, whose every slice costs microseconds.
    view: U8 = np.asarray(x).reshape(-1).view(np.uint8)
    return view


def _torch_bytes(x: Array, dtype: str) -> U8:
    # numpy() before view(): 1.2 us against 2.2, NumPy's views being the cheaper ones.
    if dtype not in _SHARED_WITH_NUMPY:
        x = _as_carrier(x)
    return _numpy_bytes(x.numpy())


#: What numpy() takes in every torch from 2.6 on.
_SHARED_WITH_NUMPY = DTYPE_SIZES.keys() - NOT_IN_NUMPY - {"uint16", "uint32", "uint64"}


def _as_carrier(x: Array) -> Array:
    """View a torch tensor as one of the same strides whose dtype every operation takes."""
    torch = sys.modules["torch"]
    return x.view(getattr(torch, _TORCH_CARRIERS[x.element_size()]))


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return cast(Callable[..., int], function)


def _ask_for_huge_pages(data: U8) -> None:
    """Ask as NumPy does for its own arrays: fresh memory is then written about four times as fast."""
    madvise = _madvise()
    if madvise is None or data.size < _HUGE_SIZE_MIN:
        return
    start = -(-data.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (data.ctypes.data + data.size) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise(start, end - start, mmap.MADV_HUGEPAGE)  # advice: no answer is wrong
