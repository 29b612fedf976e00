"""Storages: what the pickle of a torch file says of the storages beside it.

Owns   reading that pickle as data: which storage is of which dtype, and the keys that lead to it.
Never  makes, imports or calls what the pickle names.

What it finds is a hint: it chooses names, and how differences are taken, never which bytes come back.
"""

from __future__ import annotations

import pickletools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deltackpt.types import DTYPE_SIZES

#: A pickle of more bytes is not read: 64 MiB of it are some hundred thousand tensors, and half a minute.
_SIZE_MAX = 64 << 20
#: Characters of a name; a key path that is longer is cut, and told apart by what gives the names.
_NAME_SIZE_MAX = 200

#: What torch rebuilds a tensor from, at most.
_N_ARGS_MAX = 8

#: torch's classes of storages, by dtype.
_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


class Storage(NamedTuple):
    """What is known of one storage: the keys of the first tensor in it, joined by dots, and its dtype."""

    name: str
    dtype: str


def storages(data: bytes) -> dict[str, Storage]:
    """Return what a torch file's pickle says of its storages, by their keys; nothing where it is malformed.

    Examples
    --------
    >>> import io, zipfile
    >>> import torch  # doctest: +SKIP
    >>> torch.save({"w": torch.ones(3)}, file := io.BytesIO())  # doctest: +SKIP
    >>> storages(zipfile.ZipFile(file).read("archive/data.pkl"))  # doctest: +SKIP
    {'0': Storage(name='w', dtype='float32')}
    >>> storages(b"no pickle")
    {}
    """
    if len(data) > _SIZE_MAX:
        return {}
    try:
        return _named(_Machine().run(data))
    except Exception:  # hostile bytes raise anything from KeyError to OverflowError
        return {}


class _Global(NamedTuple):
    """A name that the pickle would import."""

    module: str
    name: str


@dataclass(eq=False)
class _Part:
    """A storage, by its key."""

    key: str
    dtype: str


@dataclass(eq=False)
class _Object:
    """Anything else: what it would be made of, which others may share, and what is added to it."""

    args: Sequence[Any]
    parts: list[Any] = field(default_factory=list)


class _Machine:
    """Follows a pickle's operations with plain containers, and with names in place of what they name."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for op, arg, _ in pickletools.genops(data):
            if op.name == "STOP":
                return self._stack.pop()
            self._do(op, arg)
        return None

    def _do(self, op: Any, arg: Any) -> None:
        name, stack = op.name, self._stack
        if name == "MARK":
            self._marked.append(stack)
            self._stack = []
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[int(arg)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[int(arg)])
        elif name in ("TUPLE", "LIST", "DICT", "FROZENSET", "POP_MARK", "INST", "OBJ"):
            self._close(name)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_TUPLE": ()}.get(name, []))
        elif name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS", "ADDITEMS"):
            self._add(name)
        elif name == "GLOBAL":
            stack.append(_Global(*arg.split(" ", 1)))
        elif name in ("BINPERSID", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD"):
            self._make(name)
        elif name == "POP":
            stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif not op.stack_before and len(op.stack_after) == 1:  # a plain value
            stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(name, arg))

    def _close(self, name: str) -> None:
        """End what a mark began."""
        items, self._stack = self._stack, self._marked.pop()
        if name == "TUPLE":
            self._stack.append(tuple(items))
        elif name == "DICT":
            self._stack.append(_dict(items))
        elif name in ("LIST", "FROZENSET"):
            self._stack.append(items)
        elif name != "POP_MARK":
            self._stack.append(_Object(items))

    def _add(self, name: str) -> None:
        """Put items into the container below them."""
        if name.endswith("S"):
            items, self._stack = self._stack, self._marked.pop()
        else:
            n = 2 if name == "SETITEM" else 1
            items = self._stack[-n:]
            del self._stack[-n:]
        into = self._stack[-1]
        if isinstance(into, _Object):
            into.parts += items
        elif name.startswith("SETITEM"):
            into |= _dict(items)
        else:
            into.extend(items)

    def _make(self, name: str) -> None:
        stack = self._stack
        last = stack.pop()
        if name == "BINPERSID":
            kind, cls, key, _, _ = last
            assert kind == "storage"
            stack.append(_Part(_text(key), _DTYPES.get(cls.name, "uint8")))
        elif name == "STACK_GLOBAL":
            stack.append(_Global(_text(stack.pop()), _text(last)))
        elif name == "BUILD":
            if isinstance(stack[-1], _Object):
                stack[-1].parts.append(last)
        elif name == "NEWOBJ_EX":
            stack[-2:] = [_Object([stack[-1], last])]
        else:
            stack.append(_made(stack.pop(), last) if name == "REDUCE" else _Object([stack.pop(), last]))


def _text(x: Any) -> str:
    if not isinstance(x, str):
        raise TypeError
    return x


def _dict(items: list[Any]) -> dict[Any, Any]:
    """Return a dict of keys and values in turn; a key that is no text or number is not looked into.

    To hash a tuple takes the stack that it is deep, and a time that doubles with each tuple that holds
    another twice.
    """
    keys = (key if isinstance(key, str | int) else _Object([key]) for key in items[::2])
    return dict(zip(keys, items[1::2], strict=True))


def _made(function: Any, args: Any) -> Any:
    """Return what stands for the result of a call."""
    called = function.name if isinstance(function, _Global) else ""
    if called == "OrderedDict" and not args:
        return {}
    if called.startswith(("_rebuild_tensor", "_rebuild_parameter")) and isinstance(args[0], _Part):
        for arg in args[1:_N_ARGS_MAX]:  # of a dtype that has no class of storages
            if isinstance(arg, _Global) and arg.module == "torch" and arg.name in DTYPE_SIZES:
                args[0].dtype = arg.name
        return args[0]
    return _Object(args if isinstance(args, tuple | list) else [args])


def _named(root: Any) -> dict[str, Storage]:
    """Walk over what was found, each container once: a hostile pickle may hold one in itself."""
    found: dict[str, Storage] = {}
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", root)]
    while todo:
        name, x = todo.pop()
        if isinstance(x, _Part):
            found.setdefault(x.key, Storage(name or "value", x.dtype))
            continue
        if not isinstance(x, dict | list | tuple | _Object) or isinstance(x, _Global) or id(x) in seen:
            continue
        seen.add(id(x))
        items: Iterable[tuple[Any, Any]]
        if isinstance(x, _Object):
            items = enumerate(x.parts, len(x.args))
        else:
            items = x.items() if isinstance(x, dict) else enumerate(x)
        todo += reversed([(_joined(name, key), value) for key, value in items])
        if isinstance(x, _Object):
            todo.append((name, x.args))
    return found


def _joined(name: str, key: Hashable) -> str:
    text = str(key)[:_NAME_SIZE_MAX] if isinstance(key, str | int) else "?"
    return (f"{name}.{text}" if name else text)[:_NAME_SIZE_MAX]
