"""Tree: a nested state as a JSON structure and a flat list of tensors, and back.

Owns   the structure's tags, the tensors' names, and the choice of leaves by name or by key path.
Never  reads or writes a store, copies a tensor it can view, or guesses at a type it does not know.

The structure is JSON.  null, booleans, strings, finite floats, lists, and integers below 2**53 stand for
themselves.  Everything else is an object of one member, its tag:

=========  =====================================================================================
tag        value
=========  =====================================================================================
int        hexadecimal digits, for an integer of 2**53 and more
float      16 hexadecimal digits, the IEEE 754 bits of a NaN or an infinity
str        base64 of UTF-8 with surrogates, for a string that JSON would not give back as it was
bytes      base64
tuple      list of nodes
map        object of nodes: a dict whose keys are strings
dict       list of [key, node]: any other dict; keys are nodes without tensors, lists or dicts
ordered    list of [key, node]: a collections.OrderedDict
tensor     index into the snapshot's tensors
blob       index of the tensor that holds a long bytes
text       index of the tensor that holds a long string in UTF-8 with surrogates
=========  =====================================================================================
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import fnmatch
import math
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from deltackpt.arrays import Array, alias_key, deferred, describe, is_array
from deltackpt.errors import (
    CorruptError,
    DeltackptError,
    FormatError,
    InvalidInputError,
    NotFoundError,
    UnsupportedVersionError,
)
from deltackpt.types import Deferred, State, Tensor

#: What json.loads gives.
Json: TypeAlias = Any
#: Name, dtype and shape of a stored tensor.
Row: TypeAlias = tuple[str, str, Sequence[int]]
# A key path as a linked list, last key first: a child's path costs one tuple, and most are never looked at.
_Path: TypeAlias = Any

# Levels of JSON: json's own parser gives up near 1,000 of them (Python 3.11), and a caller needs stack too.
_DEPTH_MAX = 500
_LEVELS = {"list": 1, "tuple": 2, "map": 2, "dict": 3, "ordered": 3}
_BYTES_INLINE_MAX = 1024
_TEXT_INLINE_MAX = 4096
_INT_PLAIN_MAX = 1 << 53  # from here on other JSON readers round
_INT_REPR_BITS_MAX = 2000  # 603 digits; sys.set_int_max_str_digits() takes no less than 640
_N_LISTED_MAX = 50

_PLAIN = frozenset({type(None), bool, int, float, str})
_SCALARS = _PLAIN | {bytes}
_CONTAINERS = frozenset({dict, list, tuple, OrderedDict})
_TAG_OF: dict[type, str] = {list: "list", tuple: "tuple", OrderedDict: "ordered"}
_INDEX_TAGS = ("tensor", "blob", "text")
_TAGS = ("int", "float", "str", "bytes", "tuple", "map", "dict", "ordered", *_INDEX_TAGS)
_DROPPED = object()


@contextlib.contextmanager
def _no_recursion_error(error: type[DeltackptError]) -> Iterator[None]:
    # The depth cap leaves room for a usual caller's stack, not for every one.
    try:
        yield
    except RecursionError:
        message = "state: nested too deep for the stack that is left"
        raise error(message, hint="call from a shallower stack, or see sys.setrecursionlimit") from None


class Flat(NamedTuple):
    """A state taken apart by `flatten`."""

    structure: Json
    tensors: list[Tensor | Deferred]


@_no_recursion_error(InvalidInputError)
def flatten(state: State) -> Flat:
    """Take a nested state apart into a JSON structure and its tensors.

    Parameters
    ----------
    state : State
        Any nesting of dict, OrderedDict, list, tuple, None, bool, int, float, str, bytes and arrays, of
        exactly these types.  Keys are str, int, bool, None, float, bytes or tuples of those.

    Returns
    -------
    Flat
        Arrays that are the same memory share a tensor, under the first one's name.  Tensors alias
        the arrays, or are copied from them when they are needed.

    Raises
    ------
    InvalidInputError
        If something in it has no plain form, contains itself or is nested too deep; names the key path.

    Examples
    --------
    >>> flat = flatten({"step": 3, "model": {"w": np.zeros(2)}})
    >>> flat.structure
    {'map': {'step': 3, 'model': {'map': {'w': {'tensor': 0}}}}}
    >>> [tensor.name for tensor in flat.tensors]
    ['model.w']
    """
    flattener = _Flattener()
    return Flat(flattener.node(state, None, 0), flattener.tensors)


@_no_recursion_error(FormatError)
def unflatten(structure: Json, values: Sequence[Any]) -> State:
    """Put a state together again; the inverse of `flatten`.

    Parameters
    ----------
    structure : Json
        As `flatten` or `select` gave it; need not be trusted.
    values : sequence
        What replaces tensor i, by i; for a long bytes or string, its bytes as a uint8 array or as bytes.

    Raises
    ------
    FormatError
        If the structure is malformed; names the key path.  As UnsupportedVersionError for an unknown tag, as
        CorruptError for an index out of range or bytes that are no text.

    Examples
    --------
    >>> unflatten({"tuple": [1, {"tensor": 0}]}, ["w"])
    (1, 'w')
    """
    return _value(structure, values, None, 0)


@_no_recursion_error(FormatError)
def leaf_names(structure: Json, tensor_names: Sequence[str]) -> list[str]:
    """List the name of every leaf, tensor or not, in the state's order; an empty container is a leaf.

    Examples
    --------
    >>> leaf_names({"map": {"w": {"tensor": 0}, "betas": {"tuple": [0.9, 0.99]}}}, ["w"])
    ['w', 'betas.0', 'betas.1']
    """
    return [_leaf_name(path, node, tensor_names) for path, node in _leaves(structure)]


@_no_recursion_error(FormatError)
def plain_leaves(structure: Json, tensor_names: Sequence[str]) -> dict[str, Json]:
    """Return what is no tensor, by name: scalars and empty containers, as the structure has them.

    Examples
    --------
    >>> plain_leaves({"map": {"w": {"tensor": 0}, "betas": {"tuple": [0.9, 0.99]}}}, ["w"])
    {'betas.0': 0.9, 'betas.1': 0.99}
    """
    leaves: dict[str, Json] = {}
    for path, node in _leaves(structure):
        if _index(node, len(tensor_names), path, _INDEX_TAGS) is None:
            name = first = _leaf_name(path, node, tensor_names)
            n = 1
            while name in leaves:  # keys may hold dots themselves
                n += 1
                name = f"{first}#{n}"
            leaves[name] = node
    return leaves


@_no_recursion_error(FormatError)
def select(
    structure: Json, tensor_names: Sequence[str], patterns: str | Sequence[str]
) -> tuple[Json, list[int]]:
    """Keep only the leaves whose names match.

    Parameters
    ----------
    structure : Json
        As `flatten` gave it; need not be trusted.
    tensor_names : sequence of str
        The name of tensor i, by i.
    patterns : str or sequence of str
        Shell patterns (``*``, ``?``, ``[ab]``; ``*`` crosses dots, case counts).  One without wildcards also
        matches everything below it: ``"model"`` matches ``"model.w"``.  Each must match something.

    Returns
    -------
    structure : Json
        Without the other leaves, and without containers left empty.  A list or tuple that lost elements is a
        dict by index, so that no element is taken for another.  Tensor indices are unchanged.
    indices : list of int
        The tensors it needs, ascending.

    Raises
    ------
    NotFoundError
        If a pattern matches nothing; names the nearest leaves.

    Examples
    --------
    >>> select([1, 2, {"tensor": 0}], ["2"], "2")
    ({'dict': [[2, {'tensor': 0}]]}, [0])
    """
    wanted = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(wanted, Sequence) or not all(isinstance(pattern, str) for pattern in wanted):
        raise InvalidInputError(
            f"keys: found {patterns!r}, expected a name or a list of names", hint="keys='model.*'"
        )
    if not wanted:
        raise InvalidInputError(
            "keys: found no pattern, expected at least one", hint="pass '*' for everything"
        )
    names = leaf_names(structure, tensor_names)
    matchers = [_matcher(pattern) for pattern in wanted]
    for pattern, matches in zip(wanted, matchers, strict=True):
        if not any(map(matches, names)):
            raise _nothing_matches(pattern, names)
    kept = iter([any(matches(name) for matches in matchers) for name in names])
    indices: set[int] = set()
    pruned = _prune(structure, kept, len(tensor_names), indices, None, 0)
    return pruned, sorted(indices)


@_no_recursion_error(FormatError)
def pair_into(structure: Json, into: State, rows: Sequence[Row]) -> list[tuple[int, Array]]:
    """Match a snapshot's tensors with the arrays they are to be loaded into, by key path.

    Parameters
    ----------
    structure : Json
        As `flatten` or `select` gave it; need not be trusted.
    into : State
        Nested like the saved state.  What is no array in it is ignored; a list's element matches a dict's
        integer key.
    rows : sequence of (name, dtype, shape)
        The stored tensors, by index.

    Returns
    -------
    list of (int, array)
        A tensor's index and where it goes, in the snapshot's order.  An index comes again if tied tensors go
        to arrays that are not tied.

    Raises
    ------
    InvalidInputError
        If paths are missing on either side, dtypes or shapes differ, or two tensors would go to one array;
        lists everything that is wrong.

    Examples
    --------
    >>> w = np.zeros(2)
    >>> pair_into({"map": {"w": {"tensor": 0}}}, {"w": w}, [("w", "float64", (2,))])
    [(0, array([0., 0.]))]
    """
    tensors = ((path, _index(node, len(rows), path, {"tensor"})) for path, node in _leaves(structure))
    stored = _by_path("state", ((path, index) for path, index in tensors if index is not None))
    given = _by_path("into", _arrays(into))
    problems = [f"{_where('into', path)}: missing" for key, (path, _) in stored.items() if key not in given]
    problems += [
        f"{_where('into', path)}: not in the snapshot"
        for key, (path, _) in given.items()
        if key not in stored
    ]
    pairs: list[tuple[int, Array]] = []
    taken: dict[Any, int] = {}
    for key, (path, index) in stored.items():
        if key not in given:
            continue
        array = given[key][1]
        problem = _mismatch(array, rows[index], path)
        memory = alias_key(array) or id(array)
        if problem is not None:
            problems.append(problem)
        elif memory not in taken:
            taken[memory] = index
            pairs.append((index, array))
        elif taken[memory] != index:
            names = f"{rows[taken[memory]][0]!r} and {rows[index][0]!r}"
            problems.append(
                f"{_where('into', path)}: the same array for two tensors of the snapshot, {names}"
            )
    if problems:
        raise _all_of(problems)
    return pairs


# --- from a state to a structure ---


class _Flattener:
    """One walk over a state."""

    __slots__ = ("_aliases", "_names", "_open", "tensors")

    def __init__(self) -> None:
        self.tensors: list[Tensor | Deferred] = []
        self._aliases: dict[Any, int] = {}
        self._names: dict[str, int] = {}  # how often each was given
        self._open: set[int] = set()  # the containers we are inside of, by id

    def node(self, x: State, path: _Path, depth: int) -> Json:
        kind = type(x)
        if kind in _SCALARS:
            return self._scalar(x, path)
        if kind not in _CONTAINERS:
            return {"tensor": self._array(x, path)}
        tag = _TAG_OF.get(kind) or ("map" if all(map(_is_plain_text, x)) else "dict")
        depth += _LEVELS[tag]
        self._enter(x, path, depth)
        # Loops, not comprehensions, which take a second stack frame per level (Python 3.11).
        body: Any = {} if tag == "map" else []
        if tag == "map":
            for k, v in x.items():
                body[k] = self.node(v, (path, k), depth)
        elif tag == "list" or tag == "tuple":
            for i, v in enumerate(x):
                body.append(self.node(v, (path, i), depth))
        else:
            for k, v in x.items():
                body.append([_key_node(k, path, depth), self.node(v, (path, k), depth)])
        self._open.remove(id(x))
        return body if tag == "list" else {tag: body}

    def _enter(self, x: Any, path: _Path, depth: int) -> None:
        if id(x) in self._open:
            where = _where("state", path)
            raise InvalidInputError(f"{where}: the {_type_name(x)} contains itself", hint="break the cycle")
        if depth > _DEPTH_MAX:
            raise InvalidInputError(
                f"{_where('state', path)[:200]}...: nested too deep, expected {_DEPTH_MAX} levels at most",
                hint="flatten it",
            )
        self._open.add(id(x))

    def _scalar(self, x: Any, path: _Path) -> Json:
        kind = type(x)
        if kind is bytes and len(x) > _BYTES_INLINE_MAX:
            return {"blob": self._bytes(x, path)}
        if kind is str and 4 * len(x) > _TEXT_INLINE_MAX:
            encoded = x.encode("utf-8", "surrogatepass")
            if len(encoded) > _TEXT_INLINE_MAX:
                return {"text": self._bytes(encoded, path)}
        return _scalar_node(x)

    def _array(self, x: Any, path: _Path) -> int:
        if not is_array(x):
            raise InvalidInputError(
                f"{_where('state', path)}: found a {_type_name(x)}, "
                "expected None, bool, int, float, str, bytes, dict, list, tuple or an array",
                hint=_advice(x),
            )
        key = alias_key(x)
        if key is not None and key in self._aliases:
            return self._aliases[key]
        name = self._unique(path)
        try:
            self.tensors.append(deferred(x, name))
        except InvalidInputError as error:
            message = _where("state", path) + error.message.removeprefix(name)
            raise InvalidInputError(message, hint=error.hint) from None
        index = len(self.tensors) - 1
        if key is not None:
            self._aliases[key] = index
        return index

    def _bytes(self, x: bytes, path: _Path) -> int:
        data = np.frombuffer(x, np.uint8)
        self.tensors.append(Tensor(self._unique(path), "uint8", data.shape, "numpy", data))
        return len(self.tensors) - 1

    def _unique(self, path: _Path) -> str:
        first = name = _name(path)
        while name in self._names:
            self._names[first] += 1
            name = f"{first}#{self._names[first]}"
        self._names[name] = 1
        return name


def _scalar_node(x: Any) -> Json:
    kind = type(x)
    if kind is str:
        return x if _is_plain_text(x) else {"str": _to_base64(x.encode("utf-8", "surrogatepass"))}
    if kind is int:
        return x if -_INT_PLAIN_MAX < x < _INT_PLAIN_MAX else {"int": format(x, "x")}
    if kind is float:
        return x if math.isfinite(x) else {"float": struct.pack(">d", x).hex()}
    return {"bytes": _to_base64(x)} if kind is bytes else x


def _key_node(key: Any, path: _Path, depth: int) -> Json:
    if type(key) in _SCALARS:
        return _scalar_node(key)
    if type(key) is not tuple:
        raise InvalidInputError(
            f"{_where('state', path)}: found a key of type {_type_name(key)}, "
            "expected str, int, bool, None, float, bytes or a tuple of those",
            hint="convert the key",
        )
    if depth > _DEPTH_MAX:
        raise InvalidInputError(f"{_where('state', path)[:200]}: a key is nested too deep", hint="flatten it")
    return {"tuple": [_key_node(part, path, depth + 2) for part in key]}


def _is_plain_text(x: Any) -> bool:
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


def _advice(x: object) -> str:
    if hasattr(x, "state_dict"):
        return "pass its state_dict()"
    if isinstance(x, np.generic):
        return "pass x.item(), or numpy.asarray(x) to keep its dtype"
    for base in (dict, list, tuple, int, float, str, bytes):
        if isinstance(x, base):
            return f"pass {base.__name__}(x)"
    return "convert it to one of those, or leave it out"


def _type_name(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")


# --- from a structure to a state ---


def _opened(node: Json, path: _Path, depth: int) -> tuple[str, list[tuple[Any, Json]]] | None:
    """Check a node, whoever walks: a container's tag and its (key, node) pairs, or None for a leaf."""
    if depth > _DEPTH_MAX:
        raise FormatError(
            f"{_where('state', path)[:200]}...: nested too deep, expected {_DEPTH_MAX} levels at most"
        )
    if type(node) is list:
        return "list", list(enumerate(node))
    if type(node) is not dict:
        if type(node) in _PLAIN:
            return None
        raise _malformed(path, f"a {_type_name(node)}", "JSON")
    if len(node) != 1:
        raise _malformed(path, f"an object of {len(node)} members", "one, the tag")
    [(tag, body)] = node.items()
    if tag not in _TAGS:
        raise UnsupportedVersionError(
            f"{_where('state', path)}: found the tag {tag!r}, expected one of {', '.join(_TAGS)}",
            hint="pip install -U deltackpt",
        )
    if tag not in _LEVELS:
        return None
    if tag == "map":
        if type(body) is not dict:
            raise _malformed(path, f"a map of {_type_name(body)}", "an object")
        return tag, list(body.items())
    if type(body) is not list:
        raise _malformed(path, f"a {tag} of {_type_name(body)}", "a list")
    if tag == "tuple":
        return tag, list(enumerate(body))
    items = [_keyed(pair, path, depth) for pair in body]
    if len(dict(items)) != len(items):
        raise _malformed(path, "a key twice", "each once")
    return tag, items


def _keyed(pair: Json, path: _Path, depth: int) -> tuple[Any, Json]:
    if type(pair) is not list or len(pair) != 2:
        raise _malformed(path, "a member that is no pair", "[key, value]")
    return _key(pair[0], path, depth), pair[1]


def _key(node: Json, path: _Path, depth: int) -> Any:
    opened = _opened(node, path, depth)
    if opened is None:
        return _scalar(node, path)
    tag, items = opened
    if tag != "tuple":
        raise _malformed(path, f"a key that is a {tag}", "a scalar or a tuple")
    return tuple([_key(part, path, depth + 2) for _, part in items])


def _value(node: Json, values: Sequence[Any], path: _Path, depth: int) -> State:
    opened = _opened(node, path, depth)
    if opened is None:
        index = _index(node, len(values), path, _INDEX_TAGS)
        if index is None:
            return _scalar(node, path)
        return values[index] if "tensor" in node else _long(node, values[index], path)
    tag, items = opened
    depth += _LEVELS[tag]
    if tag == "list" or tag == "tuple":
        elements = []
        for k, child in items:
            elements.append(_value(child, values, (path, k), depth))
        return elements if tag == "list" else tuple(elements)
    members = OrderedDict() if tag == "ordered" else {}
    for k, child in items:
        members[k] = _value(child, values, (path, k), depth)
    return members


def _index(node: Json, n_tensors: int, path: _Path, tags: Container[str]) -> int | None:
    """Give the index that a leaf with one of `tags` holds; None for any other leaf."""
    if type(node) is not dict:
        return None
    [(tag, index)] = node.items()
    if tag not in tags:
        return None
    if type(index) is not int or index < 0:
        raise _malformed(path, f"the {tag} {index!r}"[:80], "an index")
    if index >= n_tensors:
        raise CorruptError(
            f"{_where('state', path)}: found {tag} {index}, expected less than {n_tensors}, their count"
        )
    return index


def _scalar(node: Json, path: _Path) -> Any:
    if type(node) is not dict:
        return node
    [(tag, body)] = node.items()
    if tag in _INDEX_TAGS:
        raise _malformed(path, f"a {tag}", "a scalar")
    try:
        if tag == "int":
            number = int(body, 16)
            if format(number, "x") == body:
                return number
        elif tag == "float":
            if len(body) == 16:
                return struct.unpack(">d", bytes.fromhex(body))[0]
        else:
            data = base64.b64decode(body, validate=True)
            return data if tag == "bytes" else data.decode("utf-8", "surrogatepass")
    except (TypeError, ValueError, struct.error):
        pass
    raise _malformed(path, f"the {tag} {body!r}"[:80], f"a {tag} as written by flatten")


def _long(node: Json, value: Any, path: _Path) -> bytes | str:
    is_bytes = isinstance(value, bytes | bytearray | memoryview)
    if not is_bytes and not (isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1):
        raise _malformed(path, f"a {_type_name(value)} for its bytes", "a 1-d uint8 array")
    data = bytes(value)
    try:
        return data if "blob" in node else data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise CorruptError(f"{_where('state', path)}: found bytes that are no UTF-8: {error}") from error


def _malformed(path: _Path, found: str, expected: str) -> FormatError:
    return FormatError(f"{_where('state', path)}: found {found}, expected {expected}")


# --- leaves by name ---


def _leaves(structure: Json) -> Iterator[tuple[_Path, Json]]:
    todo: list[tuple[_Path, Json, int]] = [(None, structure, 0)]
    while todo:
        path, node, depth = todo.pop()
        opened = _opened(node, path, depth)
        if opened is None or not opened[1]:
            yield path, node
        else:
            tag, items = opened
            todo.extend(((path, k), child, depth + _LEVELS[tag]) for k, child in reversed(items))


def _leaf_name(path: _Path, node: Json, tensor_names: Sequence[str]) -> str:
    name = _name(path)
    index = _index(node, len(tensor_names), path, _INDEX_TAGS)
    # "a.b#2" is this leaf's own; any other name is that of the leaf it is tied to.
    return tensor_names[index] if index is not None and tensor_names[index].startswith(f"{name}#") else name


def _matcher(pattern: str) -> Callable[[str], bool]:
    if not any(wildcard in pattern for wildcard in "*?["):
        return lambda name: name == pattern or name.startswith(f"{pattern}.")
    match = re.compile(fnmatch.translate(pattern)).match
    # A name may hold brackets itself, and then matches as it is.
    return lambda name: name == pattern or match(name) is not None


def _nothing_matches(pattern: str, names: Sequence[str]) -> NotFoundError:
    nearest = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3)
    known = (
        f"nearest are {', '.join(map(repr, nearest))}"
        if nearest
        else f"the {len(names)} names are all unlike it"
    )
    return NotFoundError(
        f"keys: nothing in the snapshot matches {pattern!r}; {known}", hint="pass one of its names"
    )


def _prune(
    node: Json, kept: Iterator[bool], n_tensors: int, indices: set[int], path: _Path, depth: int
) -> Json:
    opened = _opened(node, path, depth)
    if opened is None or not opened[1]:
        if not next(kept):
            return _DROPPED
        index = _index(node, n_tensors, path, _INDEX_TAGS) if opened is None else None
        if index is not None:
            indices.add(index)
        return node
    tag, items = opened
    depth += _LEVELS[tag]
    left = []
    for k, child in items:
        pruned = _prune(child, kept, n_tensors, indices, (path, k), depth)
        if pruned is not _DROPPED:
            left.append((k, pruned))
    if not left:
        return _DROPPED
    if tag == "map":
        return {tag: dict(left)}
    if (tag == "list" or tag == "tuple") and len(left) == len(items):
        children = [child for _, child in left]
        return children if tag == "list" else {tag: children}
    return {"ordered" if tag == "ordered" else "dict": [[_key_node(k, path, 0), child] for k, child in left]}


# --- leaves by key path ---


def _arrays(into: State) -> Iterator[tuple[_Path, Array]]:
    todo: list[tuple[_Path, Any, frozenset[int]]] = [(None, into, frozenset())]
    while todo:
        path, x, outer = todo.pop()
        if is_array(x):
            yield path, x
            continue
        if not isinstance(x, dict | list | tuple):
            continue
        if id(x) in outer:
            raise InvalidInputError(f"{_where('into', path)}: the {_type_name(x)} contains itself")
        items = list(x.items() if isinstance(x, dict) else enumerate(x))
        todo.extend(((path, k), child, outer | {id(x)}) for k, child in reversed(items))


def _by_path(root: str, leaves: Iterable[tuple[_Path, Any]]) -> dict[Any, tuple[_Path, Any]]:
    found: dict[Any, tuple[_Path, Any]] = {}
    for path, leaf in leaves:
        # 1, True and 1.0 are one key to a dict, and three to a state.
        keys = [k if type(k) in (str, int) else (_type_name(k), _key_text(k)) for k in _keys(path)]
        if found.setdefault(tuple(keys), (path, leaf))[0] is not path:
            raise InvalidInputError(f"{_where(root, path)}: found two of this path", hint="load without into")
    return found


def _mismatch(array: Array, row: Row, path: _Path) -> str | None:
    try:
        dtype, shape = describe(array, "")
    except InvalidInputError as error:
        return _where("into", path) + error.message
    if (dtype, shape) == (row[1], tuple(row[2])):
        return None
    return f"{_where('into', path)}: found {dtype} {shape}, expected {row[1]} {tuple(row[2])}"


def _all_of(problems: Sequence[str]) -> InvalidInputError:
    n_more = len(problems) - _N_LISTED_MAX
    more = [f"and {n_more} more"] if n_more > 0 else []
    return InvalidInputError(
        "\n  ".join(["into: does not match the snapshot", *problems[:_N_LISTED_MAX], *more]),
        hint="pass arrays nested, shaped and typed as they were saved, or load without into",
    )


# --- paths ---


def _keys(path: _Path) -> list[Any]:
    keys = []
    while path is not None:
        path, key = path
        keys.append(key)
    keys.reverse()
    return keys


def _name(path: _Path) -> str:
    if path is None:
        return "value"
    name = ".".join([k if type(k) is str else _key_text(k) for k in _keys(path)])
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def _where(root: str, path: _Path) -> str:
    return root + "".join(f"[{_key_text(k)}]" for k in _keys(path))


def _key_text(key: object) -> str:
    """As repr(), which refuses integers of more than some thousand decimal digits."""
    if type(key) is tuple:
        return f"({', '.join(map(_key_text, key))}{',' * (len(key) == 1)})"
    return hex(key) if type(key) is int and key.bit_length() > _INT_REPR_BITS_MAX else repr(key)
