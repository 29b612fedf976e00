"""Structure: a state without its tensors, as JSON; the grammar of its nodes.

Owns   the tags, plain values and keys as nodes and back, key paths and what they are called.
Never  walks a state, trusts a node, or reads a tensor.

null, booleans, strings, finite floats, lists, and integers below 2**53 stand for themselves.  Everything else
is an object of one member, its tag:

==========  ====================================================================================
tag         value
==========  ====================================================================================
int         hexadecimal digits, for an integer of 2**53 and more
float       16 hexadecimal digits, the IEEE 754 bits of a NaN or an infinity
complex     32 hexadecimal digits, the bits of both parts
str         base64 of UTF-8 with surrogates, for a string that JSON would not give back as it was
bytes       base64
scalar      [dtype, hexadecimal digits], or [dtype, node] of text and bytes: a scalar of NumPy's
size        list of integers: a torch.Size
device      text: a torch.device
dtype       text: a torch.dtype
tuple       list of nodes
map         object of nodes: a dict whose keys are strings
dict        list of [key, node]: any other dict; keys are nodes without tensors, lists or dicts
ordered     list of [key, node]: a collections.OrderedDict
counter     list of [key, node]: a collections.Counter
attributed  [list of [key, node], object of nodes]: an OrderedDict and its attributes, as state_dict() gives
namedtuple  [class, object of nodes]: the class as module:name, and its fields
dataclass   the same
tensor      index into the snapshot's tensors
view        object: ``tensor``, its index, and what the array is of it (see `view_node`)
blob        index of the tensor that holds a long bytes
text        index of the tensor that holds a long string in UTF-8 with surrogates
pickle      index of the tensor that holds a pickle
==========  ====================================================================================
"""

from __future__ import annotations

import base64
import math
import struct
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from deltackpt import classes, dtypes
from deltackpt.arrays import has_torch
from deltackpt.errors import (
    CorruptError,
    DeltackptError,
    FormatError,
    InvalidInputError,
    UnsupportedVersionError,
)
from deltackpt.layout import Layout
from deltackpt.types import WHOLE, View

#: What json.loads gives.
Json: TypeAlias = Any
#: A key path as a linked list, last key first: a child's path costs one tuple, and most are never looked at.
Path: TypeAlias = Any

# Levels of JSON: json's own parser gives up near 1,000 of them (Python 3.11), and a caller needs stack too.
DEPTH_MAX = 500
LEVELS = {
    "list": 1,
    "tuple": 2,
    "map": 2,
    "dict": 3,
    "ordered": 3,
    "counter": 3,
    "attributed": 4,
    "namedtuple": 3,
    "dataclass": 3,
}
INDEX_TAGS = ("tensor", "view", "blob", "text", "pickle")
_SCALAR_TAGS = ("int", "float", "complex", "str", "bytes", "scalar", "size", "device", "dtype")
TAGS = (*_SCALAR_TAGS, *(tag for tag in LEVELS if tag != "list"), *INDEX_TAGS)

_INT_PLAIN_MAX = 1 << 53  # from here on other JSON readers round
_INT_REPR_BITS_MAX = 2000  # 603 digits; sys.set_int_max_str_digits() takes no less than 640
_N_AXES_MAX = 64  # NumPy's and torch's own
_ADDRESS_MAX = 1 << 62

#: What json gives for a node that stands for itself.
PLAIN = frozenset({type(None), bool, int, float, str})
#: Types whose values are nodes without asking anybody.
SCALARS = PLAIN | {bytes, complex}


class Attribute(str):
    """The key, in a path, of an object's attribute; a dict's key of the same text is another."""

    __slots__ = ()


class Leaf(NamedTuple):
    """A node that names a tensor.

    Parameters
    ----------
    path : Path
    tag : str
        One of `INDEX_TAGS`.
    at : int
        Which tensor.
    view : View
        What the array is of it; of a blob, a text and a pickle `WHOLE`.
    """

    path: Path
    tag: str
    at: int
    view: View

    @property
    def is_array(self) -> bool:
        """Whether it stands for an array."""
        return self.tag in ("tensor", "view")


# --- plain values ---


def scalar_node(x: Any) -> Json:
    """Return the node of a value of one of `SCALARS`."""
    kind = type(x)
    if kind is str:
        return x if is_plain_text(x) else {"str": _to_base64(x.encode("utf-8", "surrogatepass"))}
    if kind is int:
        return x if -_INT_PLAIN_MAX < x < _INT_PLAIN_MAX else {"int": format(x, "x")}
    if kind is float:
        return x if math.isfinite(x) else {"float": struct.pack(">d", x).hex()}
    if kind is complex:
        return {"complex": struct.pack(">dd", x.real, x.imag).hex()}
    return {"bytes": _to_base64(x)} if kind is bytes else x


def foreign_node(x: Any, where: str) -> Json | None:
    """Return the node of a scalar of NumPy's, or of a plain value of torch's; None if `x` is neither."""
    if isinstance(x, np.generic) and type(x).__module__ in ("numpy", "ml_dtypes"):
        return {"scalar": _numpy_scalar(x, where)}
    torch = sys.modules.get("torch")
    kind = type(x)
    if kind is getattr(torch, "Size", None):
        return {"size": [int(n) for n in x]}
    if kind is getattr(torch, "device", None):
        return {"device": str(x)}
    if kind is getattr(torch, "dtype", None):
        return {"dtype": str(x).removeprefix("torch.")}
    return None


def _numpy_scalar(x: np.generic, where: str) -> Json:
    if isinstance(x, np.str_):  # an array of one would lose zeros at the end
        return ["U", scalar_node(str.__str__(x))]
    if isinstance(x, np.bytes_):
        return ["S", scalar_node(bytes(x))]
    name = dtypes.name_of(x.dtype)
    if name is None:
        raise dtypes.refuse(x.dtype, where)
    return [name, x.tobytes().hex()]


def is_plain_text(x: Any) -> bool:
    """Whether `x` is a string that JSON gives back as it was: two lone surrogates may come back as a pair."""
    if type(x) is not str:
        return False
    if x.isascii():
        return True
    try:
        x.encode()
    except UnicodeEncodeError:
        return False
    return True


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def key_node(key: Any, path: Path, depth: int) -> Json:
    """Return the node of a dict's key."""
    if type(key) in SCALARS:
        return scalar_node(key)
    if type(key) is not tuple:
        raise InvalidInputError(
            f"{where('state', path)}: found a key of type {type_name(key)}, "
            "expected str, int, bool, None, float, complex, bytes or a tuple of those",
            hint="convert the key",
        )
    if depth > DEPTH_MAX:
        raise InvalidInputError(f"{where('state', path)[:200]}: a key is nested too deep", hint="flatten it")
    return {"tuple": [key_node(part, path, depth + 2) for part in key]}


def scalar(node: Json, path: Path) -> Any:
    """Return the value of a leaf that names no tensor."""
    if type(node) is not dict:
        return node
    [(tag, body)] = node.items()
    if tag in INDEX_TAGS:
        raise malformed(path, f"a {tag}", "a scalar")
    try:
        value = _READERS[tag](body)
    except (TypeError, ValueError, KeyError, OverflowError, RuntimeError, AttributeError, struct.error):
        raise malformed(path, f"the {tag} {body!r}"[:80], f"a {tag} as written by flatten") from None
    except DeltackptError as error:
        raise type(error)(f"{where('state', path)}: {error.message}", hint=error.hint) from None
    return value


def _read_int(body: Any) -> int:
    number = int(body, 16)
    if format(number, "x") != body:
        raise ValueError(body)
    return number


def _read_float(body: Any) -> float:
    (number,) = _unpacked(">d", body)
    return float(number)


def _unpacked(code: str, body: Any) -> tuple[Any, ...]:
    if len(body) != 2 * struct.calcsize(code):
        raise ValueError(body)
    return struct.unpack(code, bytes.fromhex(body))


def _read_complex(body: Any) -> complex:
    return complex(*_unpacked(">dd", body))


def _read_bytes(body: Any) -> bytes:
    return base64.b64decode(body, validate=True)


def _read_str(body: Any) -> str:
    return _read_bytes(body).decode("utf-8", "surrogatepass")


def _read_scalar(body: Any) -> Any:
    dtype, value = body
    if dtype in ("U", "S"):
        read = scalar(value, None)
        if type(read) is not {"U": str, "S": bytes}[dtype]:
            raise ValueError(value)
        return (np.str_ if dtype == "U" else np.bytes_)(read)
    kind = dtypes.numpy_dtype(dtype)
    data = bytes.fromhex(value)
    if len(data) != kind.itemsize:
        raise ValueError(value)
    return np.frombuffer(data, kind)[0]


def _read_size(body: Any) -> Any:
    if type(body) is not list or any(type(n) is not int or not 0 <= n < 1 << 63 for n in body):
        raise TypeError(body)
    return sys.modules["torch"].Size(body) if has_torch() else tuple(body)


def _read_device(body: Any) -> Any:
    if type(body) is not str:
        raise TypeError(body)
    return sys.modules["torch"].device(body) if has_torch() else body


def _read_dtype(body: Any) -> Any:
    if type(body) is not str or not body.isidentifier():
        raise TypeError(body)
    if not has_torch():
        return f"torch.{body}"
    found = vars(sys.modules["torch"]).get(body)  # not getattr(), which imports what it is asked for
    if not isinstance(found, sys.modules["torch"].dtype):
        raise TypeError(body)
    return found


_READERS: dict[str, Callable[[Any], Any]] = {
    "int": _read_int,
    "float": _read_float,
    "complex": _read_complex,
    "bytes": _read_bytes,
    "str": _read_str,
    "scalar": _read_scalar,
    "size": _read_size,
    "device": _read_device,
    "dtype": _read_dtype,
}


# --- nodes that hold others ---


def opened(node: Json, path: Path, depth: int) -> tuple[str, list[tuple[Any, Json]]] | None:
    """Check a node, whoever walks: a container's tag and its (key, node) pairs, or None for a leaf."""
    if depth > DEPTH_MAX:
        raise FormatError(
            f"{where('state', path)[:200]}...: nested too deep, expected {DEPTH_MAX} levels at most"
        )
    if type(node) is list:
        return "list", list(enumerate(node))
    if type(node) is not dict:
        if type(node) in PLAIN:
            return None
        raise malformed(path, f"a {type_name(node)}", "JSON")
    if len(node) != 1:
        raise malformed(path, f"an object of {len(node)} members", "one, the tag")
    [(tag, body)] = node.items()
    if tag not in TAGS:
        raise UnsupportedVersionError(
            f"{where('state', path)}: found the tag {tag!r}, expected one of {', '.join(TAGS)}",
            hint="pip install -U deltackpt",
        )
    if tag not in LEVELS:
        return None
    if tag == "map":
        return tag, _members(tag, body, path)
    if type(body) is not list:
        raise malformed(path, f"a {tag} of {type_name(body)}", "a list")
    if tag == "tuple":
        return tag, list(enumerate(body))
    if tag in ("namedtuple", "dataclass"):
        if len(body) != 2 or type(body[0]) is not str:
            raise malformed(path, f"a {tag} of {body!r}"[:80], "its class and its fields")
        return tag, _members(tag, body[1], path)
    attributes: list[tuple[Any, Json]] = []
    if tag == "attributed":
        if len(body) != 2 or type(body[0]) is not list:
            raise malformed(path, f"an attributed of {body!r}"[:80], "its items and its attributes")
        attributes = [(Attribute(k), child) for k, child in _members(tag, body[1], path)]
        body = body[0]
    items = [_keyed(pair, path, depth) for pair in body]
    if len(dict(items)) != len(items):
        raise malformed(path, "a key twice", "each once")
    return tag, items + attributes


def _members(tag: str, body: Json, path: Path) -> list[tuple[Any, Json]]:
    if type(body) is not dict:
        raise malformed(path, f"a {tag} of {type_name(body)}", "an object")
    return list(body.items())


def _keyed(pair: Json, path: Path, depth: int) -> tuple[Any, Json]:
    if type(pair) is not list or len(pair) != 2:
        raise malformed(path, "a member that is no pair", "[key, value]")
    return _key(pair[0], path, depth), pair[1]


def _key(node: Json, path: Path, depth: int) -> Any:
    found = opened(node, path, depth)
    if found is None:
        key = scalar(node, path)
        if type(key) not in SCALARS:
            raise malformed(path, f"a key of type {type_name(key)}", "a plain value or a tuple")
        return key
    tag, items = found
    if tag != "tuple":
        raise malformed(path, f"a key that is a {tag}", "a scalar or a tuple")
    return tuple([_key(part, path, depth + 2) for _, part in items])


def closed(node: Json, tag: str, items: Sequence[tuple[Any, Any]], path: Path) -> Any:
    """Return the container that a node stands for, given its keys with their values instead of nodes."""
    if tag == "list" or tag == "tuple":
        values = [value for _, value in items]
        return values if tag == "list" else tuple(values)
    if tag == "namedtuple" or tag == "dataclass":
        return classes.put_together(tag, node[tag][0], items, where("state", path))  # type: ignore[arg-type]
    if tag == "map" or tag == "dict":
        return dict(items)
    if tag == "counter":
        counter: Counter[Any] = Counter()
        dict.update(counter, items)  # Counter's own update would add
        return counter
    members = OrderedDict((k, value) for k, value in items if type(k) is not Attribute)
    members.__dict__.update((str(k), value) for k, value in items if type(k) is Attribute)
    return members


# --- nodes that name tensors ---


def leaf(node: Json, n_tensors: int, path: Path) -> Leaf | None:
    """Return what a leaf says of a tensor; None for one that names none."""
    if type(node) is not dict:
        return None
    [(tag, body)] = node.items()
    if tag not in INDEX_TAGS:
        return None
    view = WHOLE
    index = body
    if tag == "view":
        if type(body) is not dict or "tensor" not in body:
            raise malformed(path, f"the view {body!r}"[:80], "an object with a tensor")
        index = body["tensor"]
        view = _read_view(body, path)
    if type(index) is not int or index < 0:
        raise malformed(path, f"the {tag} {index!r}"[:80], "an index")
    if index >= n_tensors:
        raise CorruptError(
            f"{where('state', path)}: found {tag} {index}, expected less than {n_tensors}, their count"
        )
    return Leaf(path, tag, index, view)


def view_node(index: int, view: View) -> Json:
    """Return the node of an array.

    ``dtype``, ``shape``, ``strides`` and ``offset``, the latter two in bytes, stand together; without them
    the array is as the tensor.

    Examples
    --------
    >>> view_node(0, WHOLE), view_node(0, View(parameter=True, requires_grad=True))
    ({'tensor': 0}, {'view': {'tensor': 0, 'parameter': True, 'requires_grad': True}})
    """
    if view == WHOLE:
        return {"tensor": index}
    body: dict[str, Json] = {"tensor": index}
    if view.layout is not None:
        body["dtype"] = view.dtype
        body["shape"], body["strides"] = list(view.layout.shape), list(view.layout.strides)
        body["offset"] = view.layout.offset
    if view.parameter:
        body["parameter"] = True
    if view.requires_grad:
        body["requires_grad"] = True
    if view.device is not None:
        body["device"] = view.device
    return {"view": body}


_LAYOUT_MEMBERS = {"dtype": None, "shape": None, "strides": None, "offset": None}.keys()
_VIEW_MEMBERS = {"tensor", "parameter", "requires_grad", "device"} | _LAYOUT_MEMBERS


def _read_view(body: dict[str, Json], path: Path) -> View:
    unknown = body.keys() - _VIEW_MEMBERS
    if unknown:
        raise UnsupportedVersionError(
            f"{where('state', path)}: a view has {sorted(unknown)}, expected {sorted(_VIEW_MEMBERS)}",
            hint="pip install -U deltackpt",
        )
    device, flags = body.get("device"), (body.get("parameter", False), body.get("requires_grad", False))
    if not (device is None or type(device) is str) or not all(type(flag) is bool for flag in flags):
        raise malformed(path, f"the view {body!r}"[:120], "a view as written by flatten")
    if not body.keys() & _LAYOUT_MEMBERS:
        return View(None, None, *flags, device)
    dtype: Any
    shape: Any
    strides: Any
    offset: Any
    dtype, shape, strides, offset = [body.get(member) for member in _LAYOUT_MEMBERS]
    is_good = type(dtype) is str and _are_integers(shape, 0) and _are_integers(strides, -_ADDRESS_MAX)
    if not is_good or not _are_integers([offset], 0) or not len(shape) == len(strides) <= _N_AXES_MAX:
        raise malformed(path, f"the view {body!r}"[:120], "a view as written by flatten")
    try:
        itemsize = dtypes.itemsize(dtype)
    except DeltackptError as error:
        raise type(error)(f"{where('state', path)}: {error.message}", hint=error.hint) from None
    layout = Layout(tuple(shape), tuple(strides), offset, itemsize)
    return View(dtype, layout, *flags, device)


def _are_integers(values: Any, low: int) -> bool:
    return type(values) is list and all(type(n) is int and low <= n <= _ADDRESS_MAX for n in values)


# --- paths ---


def keys_of(path: Path) -> list[Any]:
    """Return a path's keys, first to last."""
    keys = []
    while path is not None:
        path, key = path
        keys.append(key)
    keys.reverse()
    return keys


def name(path: Path) -> str:
    """Return what a leaf at a path is called: its keys joined by dots."""
    if path is None:
        return "value"
    text = ".".join([str(k) if isinstance(k, str) else _key_text(k) for k in keys_of(path)])
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


class Names:
    """Names given once each: the second ``a`` is ``a#2``."""

    def __init__(self) -> None:
        self._given: dict[str, int] = {}

    def unique(self, wanted: str) -> str:
        """Return the name wanted, or that with a number if it was given already."""
        name = wanted
        while name in self._given:
            self._given[wanted] += 1
            name = f"{wanted}#{self._given[wanted]}"
        self._given[name] = 1
        return name


def where(root: str, path: Path) -> str:
    """Return a path as Python would write it."""
    return root + "".join(f".{k}" if type(k) is Attribute else f"[{_key_text(k)}]" for k in keys_of(path))


def _key_text(key: object) -> str:
    """As repr(), which refuses integers of more than some thousand decimal digits."""
    if type(key) is tuple:
        return f"({', '.join(map(_key_text, key))}{',' * (len(key) == 1)})"
    return hex(key) if type(key) is int and key.bit_length() > _INT_REPR_BITS_MAX else repr(key)


def key_of_path(path: Path) -> tuple[Any, ...]:
    """Return something equal for two paths exactly if they are the same; 1, True and 1.0 are three keys."""
    return tuple(k if type(k) in (str, int) else (type_name(k), _key_text(k)) for k in keys_of(path))


def type_name(x: object) -> str:
    """Return the name of an object's type, with its module."""
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")


def malformed(path: Path, found: str, expected: str) -> FormatError:
    """Return the error for a node that flatten did not write."""
    return FormatError(f"{where('state', path)}: found {found}, expected {expected}")
