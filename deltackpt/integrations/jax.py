"""JAX: pytrees of arrays as the steps of a run, and back onto the devices that they are wanted on.

Owns   a pytree as a state and back, by key paths; which part of an array each device is to have.
Never  keeps what a pytree is made of: restoring takes one like it.  Brings no array whole to one device.
       Asks other processes for anything: peers.py does.

A step holds nested dicts by the keys, indices and attributes that lead to each leaf, with NumPy's arrays::

    {"params": {"dense": {"kernel": array}}, "opt_state": {0: {"mu": {"dense": {"kernel": array}}}}, ...}

An array that is cut over several devices is one array there too: it is the same bytes on any mesh.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from deltackpt import arrays, delta, dtypes
from deltackpt.errors import ConflictError, InvalidInputError, NotFoundError
from deltackpt.integrations import peers
from deltackpt.loader import LazyArray, gather
from deltackpt.report import SaveReport
from deltackpt.run import Run
from deltackpt.store import Where
from deltackpt.types import U8, Deferred, State

#: Any nesting of what JAX knows as a container: dicts, lists, namedtuples, flax's and the user's classes.
PyTree: TypeAlias = Any
#: The keys, indices and attributes that lead to a leaf.
Path: TypeAlias = tuple[Hashable, ...]
#: Which part of an array: a start and a stop for each axis.
Box: TypeAlias = tuple[tuple[int, int], ...]

_N_PROBLEMS_MAX = 50


def save(
    pytree: PyTree,
    store: Where,
    *,
    step: int,
    run: str = "main",
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> SaveReport:
    """Save a pytree as one step of a run; durable and visible on return.

    Parameters
    ----------
    pytree : PyTree
        As `as_state` takes it.
    store, step, run, metrics, metadata, overwrite
        As of `deltackpt.delta.save`.

    Raises
    ------
    InvalidInputError
        As of `as_state`.
    DeltackptError
        As of `deltackpt.delta.save`.

    Examples
    --------
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> store = MemoryBackend()
    >>> params = {"w": jnp.arange(4.0), "key": jax.random.key(0)}
    >>> report = save(params, store, step=1)
    >>> restore(store, params)["w"]
    Array([0., 1., 2., 3.], dtype=float32)
    """
    return delta.save(
        as_state(pytree),
        store,
        step=step,
        run=run,
        metrics=metrics,
        metadata=metadata,
        overwrite=overwrite,
    )


def as_state(pytree: PyTree) -> State:
    """Return a pytree as what `Run.save` and `Run.save_async` take.

    On a CPU the state has the memory of arrays that are not cut, which JAX does not use again while the state
    is there.  All others are copied when they are saved, one by one, each shard once.

    Parameters
    ----------
    pytree : PyTree
        Of JAX's arrays, random keys among them, and of whatever `deltackpt.delta.save` takes.

    Raises
    ------
    InvalidInputError
        If an array was donated or is traced, or this process has not all of it; if two leaves have the same
        path; if a leaf is a container that JAX does not know as one.

    Examples
    --------
    >>> as_state({"layers": [{"w": jnp.zeros(2)}], "lr": 0.1})
    {'layers': {0: {'w': array([0., 0.], dtype=float32)}}, 'lr': 0.1}
    """
    found = _leaves(pytree)
    for path, leaf in found.items():
        _check_here(leaf, path)
    jax.block_until_ready(pytree)  # what fails in a step that is under way is no error of the save
    made: dict[int, State] = {}  # what is there twice is stored once
    for path, leaf in found.items():
        if id(leaf) not in made:
            made[id(leaf)] = _plain(leaf, path)
    return _nested({path: made[id(leaf)] for path, leaf in found.items()})


def restore(
    store: Where | Run,
    like: PyTree,
    *,
    step: int | str = "latest",
    run: str = "main",
    strict: bool = True,
) -> PyTree:
    """Load a step into a pytree like another: its nesting, and its arrays' shardings.

    Each device gets the part of an array that it is to have, and only the chunks are read that hold parts of
    devices of this process.  Of several processes (`jax.distributed`) all must call it: they restore the step
    that the first has found, and what fails in one is raised in all.

    Parameters
    ----------
    store : path, Backend, Store or Run
        Of a `Run`, which has its own name.
    like : PyTree
        Of arrays, or of `jax.ShapeDtypeStruct` with or without a sharding; what was donated will do.  A leaf
        that is a number of Python's or an array of NumPy's is given back as one.
    step : int, "latest" or "latest-good"
    run : str
    strict : bool
        Whether all leaves of the step must be in `like`; if not, the others are not read.

    Raises
    ------
    InvalidInputError
        If a leaf is not in the step, or has another dtype or shape there; lists everything that is wrong.  If
        processes ask for different steps, or have different stores.
    ConflictError
        If the step was overwritten or forgotten while it was restored: restore again.
    DeltackptError
        As of `deltackpt.delta.load`.

    Examples
    --------
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> store = MemoryBackend()
    >>> _ = save({"w": jnp.arange(4.0), "n": 3}, store, step=1)
    >>> abstract = jax.eval_shape(lambda: {"w": jnp.zeros(4)})
    >>> restore(store, abstract, strict=False)
    {'w': Array([0., 1., 2., 3.], dtype=float32)}
    """
    if jax.process_count() > 1:
        values = peers.use_found(store, run, step, lambda state: _read(state, like, strict))
    elif isinstance(store, Run):
        values = _read(store.load(step, lazy=True), like, strict)
    else:
        values = _read(delta.load(store, step=step, run=run, lazy=True), like, strict)
    leaves, treedef = jax.tree_util.tree_flatten(like)
    return jax.tree_util.tree_unflatten(treedef, map(_spread, values, leaves))


def _read(state: State, like: PyTree, strict: bool) -> list[Any]:
    """Return what a step has for each leaf of a pytree; all in place but what `_spread` puts there."""
    wanted = _leaves(like)
    found = {path: _at(state, path) for path in wanted}
    problems = [
        f"{_spelled(path)}: {problem}"
        for path, leaf in wanted.items()
        if (problem := _misfit(found[path], leaf)) is not None
    ]
    if strict:
        problems += [f"{_spelled(path)}: is in the step only" for path in _paths(state) if path not in wanted]
    if problems:
        more = [f"and {len(problems) - _N_PROBLEMS_MAX} more"] if len(problems) > _N_PROBLEMS_MAX else []
        raise InvalidInputError(
            "\n  ".join(["like: does not match the step", *problems[:_N_PROBLEMS_MAX], *more]),
            hint="pass a pytree nested, shaped and typed as it was saved; strict=False for a part of it",
        )
    picks = [
        (found[path], index)
        for path, leaf in wanted.items()
        if isinstance(found[path], LazyArray)
        for index in _indices(leaf)
    ]
    parts = map(arrays.as_numpy, gather(picks))
    try:
        return [_restored(found[path], leaf, parts) for path, leaf in wanted.items()]
    except NotFoundError as e:  # who catches that begins anew, and there may be a later step
        raise ConflictError(e.message, hint="restore again") from e


# --- a pytree by its paths ---


def _leaves(pytree: PyTree) -> dict[Path, Any]:
    """Return the leaves by their key paths, in the pytree's order; of random keys by their kind, too."""
    found: dict[Path, Any] = {}
    for entries, leaf in jax.tree_util.tree_flatten_with_path(pytree)[0]:
        path = tuple(map(_key, entries))
        if _is_random_key(leaf):
            path = (*path, _data_of(leaf)[0])
        if path in found:
            raise InvalidInputError(
                f"{_spelled(path)}: found two leaves of this path",
                hint="register their class with jax.tree_util.register_pytree_with_keys",
            )
        found[path] = leaf
    return found


def _key(entry: Any) -> Hashable:
    for kind, attribute in _ENTRIES.items():
        if isinstance(entry, kind):
            key: Hashable = getattr(entry, attribute)
            return key
    return str(jax.tree_util.keystr((entry,), simple=True))


_ENTRIES = {
    jax.tree_util.DictKey: "key",
    jax.tree_util.FlattenedIndexKey: "key",
    jax.tree_util.SequenceKey: "idx",
    jax.tree_util.GetAttrKey: "name",
}


def _nested(leaves: dict[Path, State]) -> State:
    if () in leaves:
        return leaves[()]
    inner: dict[Path, dict[Hashable, State]] = {(): {}}
    for path, value in leaves.items():
        for n in range(1, len(path)):
            if path[:n] in leaves:
                raise InvalidInputError(f"{_spelled(path[:n])}: is a leaf, and has leaves below it")
            if path[:n] not in inner:
                inner[path[:n]] = inner[path[: n - 1]][path[n - 1]] = {}
        inner[path[:-1]][path[-1]] = value
    return inner[()]


def _at(state: State, path: Path) -> Any:
    """Return what a step has at a path: `_MISSING` if nothing."""
    for key in path:
        if not isinstance(state, dict) or key not in state:
            return _MISSING
        state = state[key]
    return state


def _paths(state: State) -> Iterator[Path]:
    """Yield the paths of a step's leaves."""
    todo: list[tuple[Path, State]] = [((), state)]
    while todo:
        path, x = todo.pop()
        if isinstance(x, dict):
            todo += [((*path, key), child) for key, child in reversed(x.items())]
        else:
            yield path


def _spelled(path: Path) -> str:
    return "pytree" + "".join(f"[{key!r}]" for key in path)


# --- leaves as they are stored ---


def _check_here(leaf: Any, path: Path) -> None:
    if isinstance(leaf, jax.core.Tracer):
        raise InvalidInputError(f"{_spelled(path)}: is traced", hint="save outside of jit, grad and vmap")
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        raise InvalidInputError(
            f"{_spelled(path)}: was donated or deleted",
            hint="save what the step has returned, not what it was given",
        )
    if isinstance(leaf, jax.Array) and not _is_all_here(leaf):
        raise InvalidInputError(
            f"{_spelled(path)}: other processes have parts of it",
            hint="have all call jax.experimental.multihost_utils.process_allgather, and one save that",
        )
    if _is_container(leaf):
        raise InvalidInputError(
            f"{_spelled(path)}: found a {type(leaf).__name__}, a container that JAX takes for a leaf",
            hint="jax.tree_util.register_dataclass, or the like; or pass what is in it as a dict",
        )


def _is_container(x: Any) -> bool:
    """Whether a step has what is in `x` one by one."""
    return isinstance(x, dict | list | tuple) or dataclasses.is_dataclass(x)


def _is_all_here(x: jax.Array) -> bool:
    return x.is_fully_addressable or (x.is_fully_replicated and bool(x.addressable_shards))


def _is_random_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed random keys, or says that one is wanted."""
    is_jax = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    return is_jax and bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _data_of(keys: Any) -> tuple[str, jax.ShapeDtypeStruct]:
    """Return the kind of random keys, and what their data is like."""
    kinds: list[str] = []

    def look(traced: Any) -> Any:
        kinds.append(str(jax.random.key_impl(traced)))
        return jax.random.key_data(traced)

    data = jax.eval_shape(look, jax.ShapeDtypeStruct(keys.shape, keys.dtype))
    return kinds[0], data


def _plain(leaf: Any, path: Path) -> State:
    """Return a leaf without JAX in it."""
    if not isinstance(leaf, jax.Array):
        return leaf
    if _is_random_key(leaf):
        leaf = jax.random.key_data(leaf)
    dtype = dtypes.name_of(np.dtype(leaf.dtype))
    if dtype is None:
        raise dtypes.refuse(leaf.dtype, _spelled(path))
    shards: dict[Box, jax.Array] = {}
    for shard in leaf.addressable_shards:
        shards.setdefault(_box(shard.index, leaf.shape), shard.data)
    if len(shards) == 1 and all(device.platform == "cpu" for device in leaf.devices()):
        [data] = shards.values()
        return _fetched(data)

    def together() -> U8:
        _check_here(leaf, path)  # it may have been donated since
        array, data = arrays.allocate(dtype, leaf.shape, "numpy")
        for box, shard in shards.items():
            array[_slices(box)] = _fetched(shard)
        return data

    return Deferred("", dtype, leaf.shape, "numpy", together)


def _fetched(data: jax.Array) -> np.ndarray[Any, Any]:
    """Return what one device has as an array of NumPy's: on a CPU the same memory, else a copy.

    By way of another array: JAX keeps a copy for as long as there is the array that it was made of.
    """
    return np.asarray(jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data]))


# --- leaves as they are wanted ---


def _misfit(found: Any, leaf: Any) -> str | None:
    """Return why what a step has cannot be given back as a leaf; None if it can."""
    if found is _MISSING or isinstance(found, dict):
        return "is not in the step"
    if not _is_array(leaf):
        if _is_container(found):
            return f"found a {type(found).__name__}, expected no container"
        if not isinstance(found, LazyArray):
            return None
        is_number = found.shape == () and _is_of(dtypes.numpy_dtype(found.dtype), type(leaf))
        return None if is_number else f"found {found.dtype} {found.shape}, expected a {type(leaf).__name__}"
    shape, dtype = _shape_of(leaf)
    sharding = getattr(leaf, "sharding", None)
    if isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        return "its sharding is over an AbstractMesh, expected a Mesh: one of devices"
    try:
        if sharding is not None:
            sharding.shard_shape(shape)
    except ValueError as error:
        return f"cannot be cut so: {error}"
    is_jax = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    if is_jax and (made := jax.dtypes.canonicalize_dtype(dtype)) != dtype:
        return f"JAX makes {made} of {dtype} without jax_enable_x64"
    wanted = f"{dtypes.name_of(dtype)} {shape}"
    if isinstance(found, LazyArray):
        there = f"{found.dtype} {found.shape}"
    elif isinstance(found, np.generic):
        there = f"{dtypes.name_of(found.dtype)} ()"
    elif shape == () and _is_number_of(found, dtype):
        return None  # of which a jitted function has made an array since
    else:
        there = f"a {type(found).__name__}"
    return None if there == wanted else f"found {there}, expected {wanted}"


#: Python's numbers, and what an array of one is of.
_KINDS = {bool: np.bool_, int: np.integer, float: np.floating, complex: np.complexfloating}
_MISSING = object()


def _is_of(dtype: np.dtype[Any], kind: type) -> bool:
    """Whether a dtype's numbers are of a kind of Python's."""
    return kind in _KINDS and bool(jnp.issubdtype(dtype, _KINDS[kind]))


def _is_number_of(x: Any, dtype: np.dtype[Any]) -> bool:
    if type(x) is int and _is_of(dtype, int):
        bounds = jnp.iinfo(dtype)
        return bool(bounds.min <= x <= bounds.max)
    return _is_of(dtype, type(x))


def _is_array(leaf: Any) -> bool:
    """Whether a leaf is an array of NumPy's or JAX's, or says what one of JAX's is to be."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic)


def _shape_of(leaf: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    data = _data_of(leaf)[1] if _is_random_key(leaf) else leaf
    return tuple(data.shape), np.dtype(data.dtype)


def _indices(leaf: Any) -> list[Any]:
    """Return by which indices to read what a leaf is to have, in the order in which it is put there."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or _is_weak(leaf) or _sharding_of(leaf) is None:
        return [...]
    shape, _ = _shape_of(leaf)
    # NumPy's [()] is no array.
    return [_slices(box) or ... for box, _ in _reads(list(_devices(leaf.sharding, shape)), shape)]


def _sharding_of(leaf: Any) -> jax.sharding.Sharding | None:
    """Return where a leaf is to be; None: wherever JAX puts it."""
    return None if isinstance(leaf, jax.Array) and not leaf.committed else leaf.sharding


def _is_weak(leaf: Any) -> bool:
    """Whether a leaf is a scalar whose dtype gives way to others, as Python's numbers do."""
    return leaf.shape == () and getattr(leaf, "weak_type", False)


def _restored(found: Any, leaf: Any, parts: Iterator[np.ndarray[Any, Any]]) -> Any:
    """Return what a step has as a leaf like another; next among the parts are those of `_indices`."""
    if not _is_array(leaf):
        if isinstance(found, LazyArray):
            return type(leaf)(next(parts).item())
        is_number = isinstance(found, np.generic) and _is_of(found.dtype, type(leaf))
        return type(leaf)(found.item()) if is_number else found
    shape, dtype = _shape_of(leaf)
    if not isinstance(found, LazyArray):
        parts = repeat(np.asarray(found, dtype))
    if isinstance(leaf, np.ndarray | np.generic):
        whole = next(parts)
        return whole[()] if isinstance(leaf, np.generic) else whole
    sharding = _sharding_of(leaf)
    if _is_weak(leaf):
        value = next(parts)
        made = _weak(value, sharding)
        if made is not None:
            return made
        parts = repeat(value)
    made = jax.device_put(next(parts)) if sharding is None else _sharded(parts, shape, dtype, sharding)
    return jax.random.wrap_key_data(made, impl=_data_of(leaf)[0]) if _is_random_key(leaf) else made


def _weak(value: np.ndarray[Any, Any], sharding: jax.sharding.Sharding | None) -> jax.Array | None:
    """Return a scalar as one that is weak, to be spread; None if JAX makes no such of its dtype or bits."""
    if sharding is not None and not sharding.is_fully_addressable and value != value:
        return None  # to JAX it would not be the same in all processes
    made = jnp.asarray(value.item())
    return made if made.dtype == value.dtype and np.asarray(made).tobytes() == value.tobytes() else None


def _spread(value: Any, leaf: Any) -> Any:
    """Put a weak scalar where a leaf is: of several processes all must be here, since JAX compares theirs."""
    is_weak = isinstance(value, jax.Array) and _is_weak(value)
    sharding = _sharding_of(leaf) if is_weak else None
    return value if sharding is None else jax.device_put(value, sharding)


def _sharded(
    parts: Iterator[np.ndarray[Any, Any]],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """Put what was read of an array onto the devices of this process that are to have it."""
    devices = _devices(sharding, shape)
    placed = []
    for read, boxes in _reads(list(devices), shape):
        part = next(parts)
        for box in boxes:
            one = np.asarray(part[_slices(_inside(box, read))], order="C")
            for device in devices[box]:
                where = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
                placed.append(jax.device_put(one, where))
    # Where this process has no device of it, JAX has to be told of what the array is.
    of = None if placed else dtype
    return jax.make_array_from_single_device_arrays(shape, sharding, placed, dtype=of)


def _devices(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> dict[Box, list[jax.Device]]:
    """Return which devices of this process are to have which parts of an array."""
    devices: dict[Box, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices.setdefault(_box(index, shape), []).append(device)
    return devices


# --- boxes ---


def _reads(boxes: Sequence[Box], shape: tuple[int, ...]) -> list[tuple[Box, list[Box]]]:
    """Return which boxes of an array to read, and which of those wanted are in each.

    Rows of which every part is wanted are read together: parts of a row are mostly in the same chunks.

    Examples
    --------
    >>> _reads([((0, 2), (0, 4)), ((2, 4), (0, 4))], (4, 4))
    [(((0, 2), (0, 4)), [((0, 2), (0, 4))]), (((2, 4), (0, 4)), [((2, 4), (0, 4))])]
    >>> _reads([((0, 4), (0, 2)), ((0, 4), (2, 4))], (4, 4))
    [(((0, 4), (0, 4)), [((0, 4), (0, 2)), ((0, 4), (2, 4))])]
    >>> _reads([((0, 4), (0, 2))], (4, 4))
    [(((0, 4), (0, 2)), [((0, 4), (0, 2))])]
    """
    by_rows: dict[Box, list[Box]] = {}
    for box in boxes:
        by_rows.setdefault((*box[:1], *((0, n) for n in shape[1:])), []).append(box)
    found: list[tuple[Box, list[Box]]] = []
    for rows, parts in by_rows.items():
        is_all = sum(map(_count, parts)) == _count(rows)
        found += [(rows, parts)] if is_all else [(part, [part]) for part in parts]
    return found


def _count(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))


def _inside(box: Box, outer: Box) -> Box:
    return tuple((a - o, b - o) for (a, b), (o, _) in zip(box, outer, strict=True))


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
