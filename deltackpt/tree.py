"""Tree: a nested state as a structure and a flat list of tensors, and back.

Owns   the two walks: a state taken apart, and put together again; the names of its tensors.
Never  reads or writes a store, copies an array it can view, or guesses at a type it does not know.
"""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from deltackpt import aliases, classes, pickles
from deltackpt.arrays import Facts, is_array, look
from deltackpt.errors import CorruptError, DeltackptError, FormatError, InvalidInputError
from deltackpt.structure import (
    DEPTH_MAX,
    LEVELS,
    SCALARS,
    Attribute,
    Json,
    Leaf,
    Names,
    Path,
    closed,
    foreign_node,
    is_plain_text,
    key_node,
    leaf,
    malformed,
    name,
    opened,
    scalar,
    scalar_node,
    type_name,
    view_node,
    where,
)
from deltackpt.types import Deferred, State, Tensor

_BYTES_INLINE_MAX = 1024
_TEXT_INLINE_MAX = 4096

_CONTAINERS = frozenset({dict, list, tuple, OrderedDict, Counter})
_TAG_OF: dict[type, str] = {list: "list", tuple: "tuple", OrderedDict: "ordered", Counter: "counter"}


@contextlib.contextmanager
def no_recursion_error(error: type[DeltackptError]) -> Iterator[None]:
    """Raise `error` instead of RecursionError: the depth cap leaves room for usual callers' stacks only."""
    try:
        yield
    except RecursionError:
        message = "state: nested too deep for the stack that is left"
        raise error(message, hint="call from a shallower stack, or see sys.setrecursionlimit") from None


class Flat(NamedTuple):
    """A state taken apart by `flatten`.

    Parameters
    ----------
    structure : Json
    tensors : list of Tensor or Deferred
    sources : sequence of Source or None
        Of each tensor, the arrays it holds; None of a blob, a text or a pickle.
    """

    structure: Json
    tensors: list[Tensor | Deferred]
    sources: Sequence[aliases.Source | None] = ()


@no_recursion_error(InvalidInputError)
def flatten(state: State, *, allow_pickle: bool = False) -> Flat:
    """Take a nested state apart into a JSON structure and its tensors.

    Parameters
    ----------
    state : State
        Any nesting of dict, OrderedDict, Counter, list, tuple, None, bool, int, float, complex, str, bytes,
        of exactly these types; of namedtuples and dataclasses; of arrays and NumPy's scalars; of torch.Size,
        device and dtype.  Keys are str, int, bool, None, float, complex, bytes or tuples of those.
    allow_pickle : bool
        Pickle whatever else there is.

    Returns
    -------
    Flat
        Arrays that share memory share a tensor.  Tensors alias the arrays, or are copied from them when
        they are needed.

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
    flattener = _Flattener(allow_pickle)
    structure = flattener.node(state, None, 0)
    return Flat(structure, *flattener.tensors())


@no_recursion_error(FormatError)
def unflatten(
    structure: Json, n_tensors: int, value: Callable[[Leaf], Any], *, allow_pickle: bool = False
) -> State:
    """Put a state together again; the inverse of `flatten`.

    Parameters
    ----------
    structure : Json
        As `flatten` or `leaves.select` gave it; need not be trusted.
    n_tensors : int
    value : callable
        Is asked for what each leaf that names a tensor stands for, in the state's order: an array; for a long
        bytes or string, or a pickle, its bytes as a uint8 array or as bytes.
    allow_pickle : bool
        Unpickle what was pickled, which runs code that the structure's writer chose.

    Raises
    ------
    FormatError
        If the structure is malformed; names the key path.  As UnsupportedVersionError for an unknown tag, as
        CorruptError for bytes that are no text.
    InvalidInputError
        If something was pickled and `allow_pickle` is false, or a class has other fields now.
    MissingDependencyError
        If a class is not imported.

    Examples
    --------
    >>> unflatten({"tuple": [1, {"tensor": 0}]}, 1, lambda leaf: "w")
    (1, 'w')
    """
    return _Unflattener(n_tensors, value, allow_pickle).value(structure, None, 0)


@no_recursion_error(FormatError)
def check(structure: Json, n_tensors: int, *, allow_pickle: bool = False) -> None:
    """Raise what `unflatten` would, before a tensor is read; but not what is wrong with a pickle or text."""
    _Unflattener(n_tensors, lambda leaf: None, allow_pickle, is_dry=True).value(structure, None, 0)


# --- from a state to a structure ---


class _Flattener:
    """One walk over a state.

    The nodes of arrays are left empty until the walk has seen all of them: only then is it known which of
    them share memory.
    """

    __slots__ = ("_allow_pickle", "_entries", "_facts", "_names", "_open")

    def __init__(self, allow_pickle: bool) -> None:
        self._allow_pickle = allow_pickle
        # In the state's order: an array's path and node, or a path, node and bytes that go into a tensor.
        self._entries: list[tuple[Path, dict[str, Json], bytes | None]] = []
        self._facts: list[Facts] = []
        self._names = Names()
        self._open: set[int] = set()  # the containers we are inside of, by id

    def node(self, x: State, path: Path, depth: int) -> Json:
        kind = type(x)
        if kind in SCALARS:
            return self._scalar(x, path)
        if kind not in _CONTAINERS:
            return self._other(x, path, depth)
        tag = _TAG_OF.get(kind) or ("map" if all(map(is_plain_text, x)) else "dict")
        if tag == "counter" and vars(x):
            raise InvalidInputError(
                f"{where('state', path)}: this Counter has attributes",
                hint="pass dict(x), and vars(x) beside it",
            )
        attributes = x.__dict__ if tag == "ordered" else None
        if attributes:
            return self._attributed(x, attributes, path, depth)
        depth += LEVELS[tag]
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
                body.append([key_node(k, path, depth), self.node(v, (path, k), depth)])
        self._open.remove(id(x))
        return body if tag == "list" else {tag: body}

    def _enter(self, x: Any, path: Path, depth: int) -> None:
        if id(x) in self._open:
            at = where("state", path)
            raise InvalidInputError(f"{at}: the {type_name(x)} contains itself", hint="break the cycle")
        if depth > DEPTH_MAX:
            raise InvalidInputError(
                f"{where('state', path)[:200]}...: nested too deep, expected {DEPTH_MAX} levels at most",
                hint="flatten it",
            )
        self._open.add(id(x))

    def _attributed(self, x: Any, attributes: dict[str, Any], path: Path, depth: int) -> Json:
        """Return the node of an OrderedDict with attributes: load_state_dict() reads a state_dict()'s."""
        depth += LEVELS["attributed"]
        self._enter(x, path, depth)
        items = [[key_node(k, path, depth), self.node(v, (path, k), depth)] for k, v in x.items()]
        named = {str(k): self.node(v, (path, Attribute(k)), depth) for k, v in attributes.items()}
        self._open.remove(id(x))
        return {"attributed": [items, named]}

    def _scalar(self, x: Any, path: Path) -> Json:
        kind = type(x)
        if kind is bytes and len(x) > _BYTES_INLINE_MAX:
            return self._entry("blob", path, x)
        if kind is str and 4 * len(x) > _TEXT_INLINE_MAX:
            encoded = x.encode("utf-8", "surrogatepass")
            if len(encoded) > _TEXT_INLINE_MAX:
                return self._entry("text", path, encoded)
        return scalar_node(x)

    def _other(self, x: Any, path: Path, depth: int) -> Json:
        """Return the node of an array, of what NumPy, torch or the user has made, or of a pickle."""
        try:
            if is_array(x):
                self._facts.append(_look(x, path))
                return self._entry("tensor", path, None)
            found = foreign_node(x, where("state", path))
            if found is not None:
                return found
            kind = classes.kind_of(x)
            if kind is not None:
                return self._fields(kind, x, path, depth)
        except InvalidInputError:
            if not self._allow_pickle or id(x) in self._open:
                raise
        if self._allow_pickle:
            return self._entry("pickle", path, pickles.to_bytes(x, where("state", path)))
        raise InvalidInputError(
            f"{where('state', path)}: found a {type_name(x)}, "
            "expected a plain value, a container of some or an array",
            hint=_advice(x),
        )

    def _fields(self, kind: classes.Kind, x: Any, path: Path, depth: int) -> Json:
        class_name, fields = classes.take_apart(x, where("state", path))
        depth += LEVELS[kind]
        self._enter(x, path, depth)
        body = {field: self.node(v, (path, field), depth) for field, v in fields}
        self._open.remove(id(x))
        return {kind: [class_name, body]}

    def _entry(self, tag: str, path: Path, data: bytes | None) -> Json:
        node: dict[str, Json] = {tag: None}
        self._entries.append((path, node, data))
        return node

    def tensors(self) -> tuple[list[Tensor | Deferred], list[aliases.Source | None]]:
        """Return the tensors and what they are of, and fill in the nodes that name them."""
        sources, views = aliases.gather(self._facts)
        paths = [path for path, _, data in self._entries if data is None]
        numbers: dict[int, int] = {}  # source: its tensor
        tensors: list[Tensor | Deferred] = []
        of: list[aliases.Source | None] = []
        each = iter(views)
        for path, node, data in self._entries:
            if data is not None:
                [tag] = node
                node[tag] = len(tensors)
                content = np.frombuffer(data, np.uint8)
                tensors.append(
                    Tensor(self._names.unique(name(path)), "uint8", content.shape, "numpy", content)
                )
                of.append(None)
                continue
            at, view = next(each)
            if at not in numbers:
                numbers[at] = len(tensors)
                tensors.append(sources[at].named(self._names.unique(name(paths[sources[at].owner]))))
                of.append(sources[at])
            node.clear()
            node.update(view_node(numbers[at], view))
        return tensors, of


def _look(x: Any, path: Path) -> Facts:
    try:
        return look(x, "")
    except InvalidInputError as error:  # spelling a path out takes as long as looking
        raise InvalidInputError(where("state", path) + error.message, hint=error.hint) from None


def _advice(x: object) -> str:
    for method, call in (
        ("state_dict", "its state_dict()"),
        ("getstate", "x.getstate()"),
        ("get_state", "x.get_state()"),
    ):
        if hasattr(x, method):
            return f"pass {call}"
    if hasattr(x, "bit_generator"):
        return "pass x.bit_generator.state"
    if hasattr(x, "__array__"):
        return "pass numpy.asarray(x); for JAX see deltackpt.integrations.jax"
    for base in (dict, list, tuple, int, float, str, bytes):
        if isinstance(x, base):
            return f"pass {base.__name__}(x)"
    return "convert it to one of those, leave it out, or say allow_pickle=True, here and at load"


# --- from a structure to a state ---


class _Unflattener:
    """One walk over a structure."""

    __slots__ = ("_allow_pickle", "_is_dry", "_leaf_value", "_n_tensors")

    def __init__(
        self, n_tensors: int, leaf_value: Callable[[Leaf], Any], allow_pickle: bool, *, is_dry: bool = False
    ) -> None:
        self._is_dry = is_dry
        self._n_tensors = n_tensors
        self._leaf_value = leaf_value
        self._allow_pickle = allow_pickle

    def value(self, node: Json, path: Path, depth: int) -> State:
        found = opened(node, path, depth)
        if found is None:
            names = leaf(node, self._n_tensors, path)
            return scalar(node, path) if names is None else self._named(names)
        tag, items = found
        depth += LEVELS[tag]
        values = []
        for k, child in items:
            values.append((k, self.value(child, (path, k), depth)))
        return closed(node, tag, values, path)

    def _named(self, names: Leaf) -> Any:
        if names.tag == "pickle" and not self._allow_pickle:
            raise InvalidInputError(
                f"{where('state', names.path)}: was pickled, and unpickling runs code from the store",
                hint="if you trust who wrote it, say allow_pickle=True, in Python; else leave it out by keys",
            )
        value = self._leaf_value(names)
        return value if names.is_array or self._is_dry else _long(names, value)


def _long(names: Leaf, value: Any) -> Any:
    is_bytes = isinstance(value, bytes | bytearray | memoryview)
    if not is_bytes and not (isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1):
        raise malformed(names.path, f"a {type_name(value)} for its bytes", "a 1-d uint8 array")
    data = bytes(value)
    if names.tag == "pickle":
        return pickles.from_bytes(data, where("state", names.path))
    try:
        return data if names.tag == "blob" else data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise CorruptError(f"{where('state', names.path)}: found bytes that are no UTF-8: {error}") from error
