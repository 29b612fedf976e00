"""Every kind of state, and a picture of one: equal exactly if types, bits, strides and aliasing are."""

from __future__ import annotations

import collections
import dataclasses
import struct
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from deltackpt.arrays import allocate, bytes_of, is_array, look
from deltackpt.types import DTYPE_SIZES, NOT_IN_NUMPY, NOT_IN_TORCH

try:
    import torch
except ImportError:
    torch = None

NUMPY = [name for name in DTYPE_SIZES if name not in NOT_IN_NUMPY or hasattr(ml_dtypes, name)]
TORCH = [n for n in DTYPE_SIZES if n not in NOT_IN_TORCH and hasattr(torch, n)] if torch is not None else []
PRINTED = [
    name for name in TORCH if name != "float4_e2m1fn_x2"
]  # torch cannot print that one, as Hypothesis must
#: Dtypes that have no name, only NumPy's spelling.
SPELLED = [
    np.dtype(text)
    for text in (">f4", ">f8", ">i2", ">c8", "M8[ns]", ">m8[25us]", "U5", ">U2", "S3", "V7", "g", "G")
]


class Point(NamedTuple):
    x: Any
    y: Any


Pair = collections.namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Config:
    lr: Any
    layers: Any = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    value: Any


@dataclasses.dataclass
class Child(Config):
    extra: Any = None

    def __post_init__(self) -> None:
        raise AssertionError("a constructor ran")


def child(lr: Any, extra: Any) -> Child:
    """Make one past its constructor, which must never run."""
    x = object.__new__(Child)
    x.__dict__.update(lr=lr, layers=(), extra=extra)
    return x


def random_bytes(size: int, seed: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, size, np.uint8)


@st.composite
def plain_arrays(draw):
    """One array in C order, of any dtype."""
    shape = tuple(draw(st.lists(st.sampled_from([2, 3, 1, 4, 0]), max_size=3)))
    seed = draw(st.integers(0, 9))
    kind = draw(st.sampled_from([("numpy", n) for n in NUMPY] + [("torch", n) for n in PRINTED] + SPELLED))
    if isinstance(kind, tuple):
        framework, dtype = kind
        array, data = allocate(dtype, shape, framework)
        data[:] = random_bytes(data.size, seed, dtype)
        return array
    if kind.kind == "U":
        return np.array(["aé\U0001f600"[: seed % 4]] * int(np.prod(shape)), kind).reshape(shape)
    return random_bytes(int(np.prod(shape)) * kind.itemsize, seed).view(kind).reshape(shape)


def _index(draw, x):
    parts = []
    for n in x.shape:
        low = draw(st.integers(0, n))
        steps = [1, 2] if not isinstance(x, np.ndarray) else [1, 2, -1]
        parts.append(slice(low, None, draw(st.sampled_from(steps))) if n else slice(None))
    return tuple(parts)


@st.composite
def views(draw):
    """Several arrays over the same memory, or over none of each other's."""
    base = draw(plain_arrays())
    found = [base]
    for _ in range(draw(st.integers(0, 4))):
        x = draw(st.sampled_from(found))
        how = draw(st.sampled_from(["same", "transpose", "slice", "expand", "flat", "dtype", "grad", "copy"]))
        if how == "same":
            y = x
        elif how == "transpose":
            order = draw(st.permutations(range(x.ndim)))
            y = x.transpose(order) if isinstance(x, np.ndarray) else x.permute(order)
        elif how == "slice" and x.ndim:  # NumPy makes a scalar of an array without axes
            y = x[_index(draw, x)]
        elif how == "expand":
            shape = (2, *x.shape)
            y = np.broadcast_to(x, shape) if isinstance(x, np.ndarray) else x.expand(shape)
        elif how == "flat" and isinstance(x, np.ndarray) and x.flags.c_contiguous:
            y = x.reshape(-1)
        elif how == "dtype" and isinstance(x, np.ndarray) and x.ndim and x.flags.c_contiguous and x.size:
            y = x.view(np.uint8)
        elif how == "grad" and torch is not None and isinstance(x, torch.Tensor):
            y = x
            if x.dtype in (torch.float32, torch.bfloat16, torch.complex64):
                y = torch.nn.Parameter(x.detach(), requires_grad=draw(st.booleans()))
        elif how == "copy":
            y = x.copy() if isinstance(x, np.ndarray) else x.clone() if x.element_size() > 1 else x
        else:
            y = x
        found.append(y)
    return found


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
    st.builds(complex, ANY_FLOAT, ANY_FLOAT),
    ANY_TEXT,
    st.binary(max_size=8),
)
KEYS = st.recursive(SCALARS, lambda keys: st.lists(keys, max_size=3).map(tuple), max_leaves=4)
LONG = st.sampled_from(
    ["x" * 5000, "\ud83d\ude00é" * 900, b"x" * 1025, b"\xff" * 4000, "é" * 2048, b"x" * 1024]
)
FOREIGN = [
    np.float32(1.5),
    np.float64("nan"),
    np.int8(-1),
    np.bool_(True),
    np.complex64(1 - 2j),
    np.longdouble(1) / 3,
    np.str_("a\0"),
    np.bytes_(b"b\0"),
    np.datetime64("2026-01-01T00", "h"),
    np.timedelta64(3, "us"),
    ml_dtypes.bfloat16(0.1),
    ml_dtypes.float8_e4m3fn(3),
]
if torch is not None:
    FOREIGN += [torch.Size([2, 3]), torch.Size([]), torch.device("cuda", 1), torch.device("cpu")]
    FOREIGN += [torch.float32, torch.bfloat16, torch.float8_e5m2]


def attributed(items: dict) -> OrderedDict:
    made = OrderedDict(items)
    made._metadata = OrderedDict({"": {"version": 1}})
    return made


@st.composite
def states(draw):
    """Any state: some memory, and a nesting of views of it and of everything else."""
    pool = [x for group in draw(st.lists(views(), max_size=3)) for x in group]
    together = draw(st.permutations(pool)) if pool and draw(st.booleans()) else []
    leaf = [SCALARS, LONG, st.sampled_from(FOREIGN)] + ([st.sampled_from(pool)] * 4 if pool else [])
    nested = draw(
        st.recursive(
            st.one_of(leaf),
            lambda inner: st.one_of(
                st.lists(inner, max_size=4),
                st.lists(inner, max_size=4).map(tuple),
                st.dictionaries(ANY_TEXT, inner, max_size=4),
                st.dictionaries(KEYS, inner, max_size=4),
                st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict),
                st.dictionaries(ANY_TEXT, inner, max_size=3).map(attributed),
                st.dictionaries(KEYS, inner, max_size=3).map(lambda d: _counter(d)),
                st.builds(Point, inner, inner),
                st.builds(Pair, inner, inner),
                st.builds(Config, inner),
                st.builds(Frozen, inner),
                st.builds(child, inner, inner),
            ),
            max_leaves=12,
        )
    )
    return [nested, together] if together else nested


def _counter(items: dict) -> Counter:
    made: Counter = Counter()
    dict.update(made, items)
    return made


def picture(state: Any) -> Any:
    """Equal for two states exactly if types, order, bits, strides and what shares memory are."""
    arrays: list[Any] = []
    return _picture(state, arrays), _shared(arrays)


def _picture(x: Any, arrays: list[Any]) -> Any:
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    if is_array(x):
        arrays.append(x)
        facts = look(x)
        layout = facts.layout
        # What is cut out of something larger keeps the order of its axes, and not the gaps.
        strides = layout.strides if layout.narrowed().is_solid() else layout.narrowed().packed().strides
        strides = tuple(0 if old == 0 else new for old, new in zip(layout.strides, strides, strict=True))
        grads = facts.parameter, facts.requires_grad
        return facts.framework, facts.dtype, layout.shape, strides, grads, bytes_of(x)
    if isinstance(x, np.generic):
        text = str.__str__(x) if isinstance(x, np.str_) else bytes(x) if isinstance(x, np.bytes_) else None
        return kind, x.dtype.str, x.tobytes(), text
    if isinstance(x, dict):
        rest = _picture(vars(x), arrays) if getattr(x, "__dict__", None) else None
        return kind, [(_picture(k, arrays), _picture(v, arrays)) for k, v in x.items()], rest
    if dataclasses.is_dataclass(x):
        return kind, [_picture(getattr(x, f.name), arrays) for f in dataclasses.fields(x)]
    if isinstance(x, list | tuple):
        return kind, [_picture(v, arrays) for v in x]
    if isinstance(x, float):
        return kind, struct.pack("<d", x)
    if isinstance(x, complex):
        return kind, struct.pack("<dd", x.real, x.imag)
    return kind, x


def _shared(arrays: list[Any]) -> list[Any]:
    """Which arrays overlap, and how far apart they start."""
    found = []
    facts = [look(x) for x in arrays]
    for i, a in enumerate(facts):
        for j, b in enumerate(facts[:i]):
            if a.layout.size and b.layout.size and a.framework == b.framework:
                (start, stop), (begin, end) = a.layout.span, b.layout.span
                if start < end and begin < stop:
                    solid = a.layout.narrowed().is_solid() and b.layout.narrowed().is_solid()
                    found.append((i, j, start - begin if solid else None))
            elif arrays[i] is arrays[j]:
                found.append((i, j, "same"))
    return found
