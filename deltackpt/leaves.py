"""Leaves: a structure's ends, by name and by key path.

Owns   what a leaf is called, the choice of leaves by name or pattern, matching them with arrays to load into.
Never  reads a tensor, or puts a state together.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import itertools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from deltackpt.aliases import groups, share_bytes
from deltackpt.arrays import Array, Facts, is_array, look
from deltackpt.classes import kind_of
from deltackpt.errors import FormatError, InvalidInputError, NotFoundError
from deltackpt.layout import Layout
from deltackpt.structure import (
    LEVELS,
    Attribute,
    Json,
    Leaf,
    Names,
    Path,
    key_node,
    key_of_path,
    leaf,
    name,
    opened,
    type_name,
    where,
)
from deltackpt.tree import no_recursion_error
from deltackpt.types import State

_N_LISTED_MAX = 50
#: Names are the paths spelled out: nested keys of a small structure can make large ones.
_NAMES_SIZE_MAX = 256 << 20
_DROPPED = object()


@no_recursion_error(FormatError)
def leaf_names(structure: Json, tensor_names: Sequence[str]) -> list[str]:
    """List the name of every leaf, tensor or not, in the state's order; an empty container is a leaf.

    Examples
    --------
    >>> leaf_names({"map": {"w": {"tensor": 0}, "betas": {"tuple": [0.9, 0.99]}}}, ["w"])
    ['w', 'betas.0', 'betas.1']
    """
    return [called for _, _, called in _named_walk(structure, tensor_names)]


@no_recursion_error(FormatError)
def plain_leaves(structure: Json, tensor_names: Sequence[str]) -> dict[str, Json]:
    """Return what is no tensor, by name: scalars and empty containers, as the structure has them.

    Examples
    --------
    >>> plain_leaves({"map": {"w": {"tensor": 0}, "betas": {"tuple": [0.9, 0.99]}}}, ["w"])
    {'betas.0': 0.9, 'betas.1': 0.99}
    """
    found: dict[str, Json] = {}
    names = Names()  # keys may hold dots themselves
    for path, node, called in _named_walk(structure, tensor_names):
        if leaf(node, len(tensor_names), path) is None:
            found[names.unique(called)] = node
    return found


@no_recursion_error(FormatError)
def named(structure: Json, n_tensors: int) -> list[Leaf]:
    """List the leaves that name tensors, in the state's order.

    Raises
    ------
    CorruptError
        If one names a tensor that there is not.

    Examples
    --------
    >>> [leaf.at for leaf in named([{"tensor": 1}, 5, {"blob": 0}], 2)]
    [1, 0]
    """
    found = (leaf(node, n_tensors, path) for path, node in _walk(structure))
    return [one for one in found if one is not None]


def find(structure: Json, tensor_names: Sequence[str], wanted: str) -> Leaf:
    """Return the array of this name.

    Raises
    ------
    NotFoundError
        If there is none; names the nearest.
    InvalidInputError
        If what has the name is no array.
    """
    if not isinstance(wanted, str):
        raise InvalidInputError(
            f"name: found {wanted!r:.80}, expected a tensor's name", hint="deltackpt show"
        )
    arrays = []
    for path, node, called in _named_walk(structure, tensor_names):
        found = leaf(node, len(tensor_names), path)
        if found is not None and found.is_array:
            if called == wanted:
                return found
            arrays.append(called)
        elif called == wanted:
            raise InvalidInputError(f"name: {wanted!r} is no array", hint="load(keys=...) gives any value")
    raise _nothing_matches("name", wanted, arrays)


@no_recursion_error(FormatError)
def select(
    structure: Json, tensor_names: Sequence[str], patterns: str | Sequence[str]
) -> tuple[Json, list[int]]:
    """Keep only the leaves whose names match.

    Parameters
    ----------
    structure : Json
        As `tree.flatten` gave it; need not be trusted.
    tensor_names : sequence of str
        The name of tensor i, by i.
    patterns : str or sequence of str
        Shell patterns (``*``, ``?``, ``[ab]``; ``*`` crosses dots, case counts).  One without wildcards also
        matches everything below it: ``"model"`` matches ``"model.w"``.  Each must match something.

    Returns
    -------
    structure : Json
        Without the other leaves, and without containers left empty.  A list or tuple that lost elements is a
        dict by index, so that no element is taken for another; what lost fields is a dict by field.  Tensor
        indices are unchanged.
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
            raise _nothing_matches("keys", pattern, names)
    indices: set[int] = set()
    kept = iter([any(matches(n) for matches in matchers) for n in names])
    return _prune(structure, kept, len(tensor_names), indices, None, 0), sorted(indices)


@no_recursion_error(FormatError)
def without(structure: Json, n_tensors: int, dropped: Container[int]) -> Json:
    """Drop some leaves, by their place among those that `named` lists; of all, an empty dict is left."""
    numbers = itertools.count()
    nodes = _walk(structure)
    kept = iter([leaf(node, n_tensors, path) is None or next(numbers) not in dropped for path, node in nodes])
    pruned = _prune(structure, kept, n_tensors, set(), None, 0)
    return {"map": {}} if pruned is _DROPPED else pruned


@no_recursion_error(FormatError)
def rewritten(structure: Json, tensor_names: Sequence[str], node: Callable[[Leaf, str], Json]) -> Json:
    """Return a structure with other nodes for the leaves that name tensors, given each leaf and its name.

    Examples
    --------
    >>> rewritten([{"tensor": 7}, 5], ["w"] * 8, lambda leaf, name: {"tensor": 0})
    [{'tensor': 0}, 5]
    """
    return _rewritten(structure, tensor_names, node, None, 0)


class Wanted(NamedTuple):
    """What an array that a leaf stands for must be.

    Parameters
    ----------
    name : str
        Its tensor's.
    dtype : str
        As `dtypes` writes it down.
    layout : Layout
        Where its elements lie in the tensor's bytes.
    """

    name: str
    dtype: str
    layout: Layout


def pair_into(
    found: Sequence[Leaf], into: State, wanted: Callable[[Leaf], Wanted], *, strict: bool = True
) -> list[tuple[int, Array]]:
    """Match a snapshot's arrays with those they are to be loaded into, by key path.

    Parameters
    ----------
    found : sequence of Leaf
        As `named` lists them.
    into : State
        Nested like the saved state.  What is no array in it is ignored; a list's element matches a dict's
        integer key.
    wanted : callable
        Tells what a leaf's array must be.
    strict : bool
        Whether every array must have its counterpart.

    Returns
    -------
    list of (int, array)
        A leaf's place in `found`, and where it goes.

    Raises
    ------
    InvalidInputError
        If dtypes or shapes differ, two different tensors would go to one array, or, if `strict`, paths are
        missing on either side; lists everything that is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> found = named({"map": {"w": {"tensor": 0}}}, 1)
    >>> pair_into(found, {"w": np.zeros(2)}, lambda leaf: Wanted("w", "float64", Layout.plain((2,), 8)))
    [(0, array([0., 0.]))]
    """
    stored = _by_path("state", ((one.path, i) for i, one in enumerate(found) if one.is_array))
    given = _by_path("into", _arrays(into))
    problems: list[str] = []
    if strict:
        problems += [
            f"{where('into', path)}: missing" for key, (path, _) in stored.items() if key not in given
        ]
        problems += [
            f"{where('into', path)}: not in the snapshot"
            for key, (path, _) in given.items()
            if key not in stored
        ]
    pairs: list[tuple[int, Array]] = []
    targets: list[Facts] = []
    for key, (path, at) in stored.items():
        if key in given:
            facts = _fitting(given[key][1], wanted(found[at]), path, problems)
            if facts is not None:
                pairs.append((at, given[key][1]))
                targets.append(facts)
    problems += _clashes([found[at] for at, _ in pairs], targets, wanted)
    if problems:
        raise _all_of(problems)
    return pairs


# --- by name ---


def _walk(structure: Json) -> Iterator[tuple[Path, Json]]:
    todo: list[tuple[Path, Json, int]] = [(None, structure, 0)]
    while todo:
        path, node, depth = todo.pop()
        found = opened(node, path, depth)
        if found is None or not found[1]:
            yield path, node
        else:
            tag, items = found
            todo.extend(((path, k), child, depth + LEVELS[tag]) for k, child in reversed(items))


def _named_walk(structure: Json, tensor_names: Sequence[str]) -> Iterator[tuple[Path, Json, str]]:
    """Yield every leaf with its name; refuse a structure whose names take up memory as no state's do."""
    total_size = 0
    for path, node in _walk(structure):
        called = _leaf_name(path, node, tensor_names)
        total_size += len(called)
        if total_size > _NAMES_SIZE_MAX:
            raise FormatError(f"state: the names of its leaves take more than {_NAMES_SIZE_MAX} bytes")
        yield path, node, called


def _leaf_name(path: Path, node: Json, tensor_names: Sequence[str]) -> str:
    called = name(path)
    found = leaf(node, len(tensor_names), path)
    if found is None:
        return called
    # "a.b#2" is this leaf's own; any other name is that of the leaf it is tied to.
    own, hash_, number = tensor_names[found.at].rpartition("#")
    return tensor_names[found.at] if hash_ and own == called and number.isdecimal() else called


def _matcher(pattern: str) -> Callable[[str], bool]:
    if not any(wildcard in pattern for wildcard in "*?["):
        return lambda name: name == pattern or name.startswith(f"{pattern}.")
    match = re.compile(fnmatch.translate(pattern)).match
    # A name may hold brackets itself, and then matches as it is.
    return lambda name: name == pattern or match(name) is not None


def _nothing_matches(what: str, pattern: str, names: Sequence[str]) -> NotFoundError:
    nearest = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3)
    known = (
        f"nearest are {', '.join(map(repr, nearest))}"
        if nearest
        else f"the {len(names)} names are all unlike it"
    )
    return NotFoundError(
        f"{what}: nothing in the snapshot matches {pattern!r}; {known}", hint="pass one of its names"
    )


def _prune(
    node: Json, kept: Iterator[bool], n_tensors: int, indices: set[int], path: Path, depth: int
) -> Json:
    found = opened(node, path, depth)
    if found is None or not found[1]:
        if not next(kept):
            return _DROPPED
        names = leaf(node, n_tensors, path) if found is None else None
        if names is not None:
            indices.add(names.at)
        return node
    tag, items = found
    depth += LEVELS[tag]
    left = []
    for k, child in items:
        pruned = _prune(child, kept, n_tensors, indices, (path, k), depth)
        if pruned is not _DROPPED:
            left.append((k, pruned))
    if not left:
        return _DROPPED
    if len(left) == len(items):
        return _with_children(node, tag, [child for _, child in left])
    if tag in ("map", "namedtuple", "dataclass"):
        return {"map": dict(left)}
    pairs = [[key_node(k, path, 0), child] for k, child in left if type(k) is not Attribute]
    attributes = {str(k): child for k, child in left if type(k) is Attribute}
    if attributes:
        return {"attributed": [pairs, attributes]}
    return {"ordered" if tag in ("ordered", "attributed") else "dict": pairs}


def _rewritten(
    node: Json, tensor_names: Sequence[str], new: Callable[[Leaf, str], Json], path: Path, depth: int
) -> Json:
    found = opened(node, path, depth)
    if found is None:
        names = leaf(node, len(tensor_names), path)
        return node if names is None else new(names, _leaf_name(path, node, tensor_names))
    tag, items = found
    depth += LEVELS[tag]
    children = []
    for k, child in items:
        children.append(_rewritten(child, tensor_names, new, (path, k), depth))
    return _with_children(node, tag, children)


def _with_children(node: Json, tag: str, children: list[Json]) -> Json:
    """Return a container's node with other nodes in the place of its children."""
    if tag == "list":
        return children
    body = node[tag]
    if tag == "tuple":
        return {tag: children}
    if tag == "map":
        return {tag: dict(zip(body, children, strict=True))}
    if tag in ("namedtuple", "dataclass"):
        return {tag: [body[0], dict(zip(body[1], children, strict=True))]}
    pairs = body[0] if tag == "attributed" else body
    changed = [[key, child] for (key, _), child in zip(pairs, children, strict=False)]
    if tag != "attributed":
        return {tag: changed}
    return {tag: [changed, dict(zip(body[1], children[len(pairs) :], strict=True))]}


# --- by key path ---


def _arrays(into: State) -> Iterator[tuple[Path, Array]]:
    todo: list[tuple[Path, Any, frozenset[int]]] = [(None, into, frozenset())]
    while todo:
        path, x, outer = todo.pop()
        if is_array(x):
            yield path, x
            continue
        items = _items(x)
        if items is None:
            continue
        if id(x) in outer:
            raise InvalidInputError(f"{where('into', path)}: the {type_name(x)} contains itself")
        todo.extend(((path, k), child, outer | {id(x)}) for k, child in reversed(items))


def _items(x: Any) -> list[tuple[Any, Any]] | None:
    """Return a container's keys with what is there; None for anything else."""
    if isinstance(x, dict):
        return list(x.items())
    kind = kind_of(x)
    if kind == "namedtuple":
        return list(zip(x._fields, x, strict=False))
    if kind == "dataclass":
        return [(f.name, getattr(x, f.name, None)) for f in dataclasses.fields(x)]
    return list(enumerate(x)) if isinstance(x, list | tuple) else None


def _by_path(root: str, found: Iterable[tuple[Path, Any]]) -> dict[Any, tuple[Path, Any]]:
    known: dict[Any, tuple[Path, Any]] = {}
    for path, one in found:
        if known.setdefault(key_of_path(path), (path, one))[0] is not path:
            raise InvalidInputError(f"{where(root, path)}: found two of this path", hint="load without into")
    return known


def _fitting(array: Array, row: Wanted, path: Path, problems: list[str]) -> Facts | None:
    """Return what is known of an array that fits, else say what is wrong."""
    try:
        facts = look(array, where("into", path))
    except InvalidInputError as error:
        problems.append(error.message)
        return None
    shape = row.layout.shape
    if (facts.dtype, facts.layout.shape) == (row.dtype, shape):
        return facts
    problems.append(
        f"{where('into', path)}: found {facts.dtype} {facts.layout.shape}, expected {row.dtype} {shape}"
    )
    return None


def _clashes(
    found: Sequence[Leaf], targets: Sequence[Facts], wanted: Callable[[Leaf], Wanted]
) -> Iterator[str]:
    """Say which arrays share memory that the snapshot's do not share in the same way."""
    one_space = [replace(facts, space="cpu") if facts.is_direct else facts for facts in targets]
    for group in groups(one_space):
        if len(group) == 1 or not targets[group[0]].layout.size:
            continue
        placed = {
            (_placed(found[i].at, wanted(found[i]).layout, targets[i].layout), targets[i].layout)
            for i in group
        }
        if len({what for what, _ in placed}) == 1:
            continue
        layouts = [layout for _, layout in placed]
        if len(set(layouts)) < len(layouts) or share_bytes(layouts):
            names = " and ".join(where("into", found[i].path) for i in group[:4])
            yield f"{names}: share memory otherwise than in the snapshot"


def _placed(at: int, wanted: Layout, target: Layout) -> tuple[Any, ...]:
    """Return something equal for all targets that are a tensor's memory anew, in its strides."""
    strides = [
        [s if n > 1 else 0 for n, s in zip(layout.shape, layout.strides, strict=True)]
        for layout in (wanted, target)
    ]
    return (at, target.offset - wanted.offset) if strides[0] == strides[1] else (at, wanted, target)


def _all_of(problems: Sequence[str]) -> InvalidInputError:
    n_more = len(problems) - _N_LISTED_MAX
    more = [f"and {n_more} more"] if n_more > 0 else []
    return InvalidInputError(
        "\n  ".join(["into: does not match the snapshot", *problems[:_N_LISTED_MAX], *more]),
        hint="pass arrays nested, shaped and typed as they were saved, or load without into",
    )
