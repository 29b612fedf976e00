"""Classes: the users' own namedtuples and dataclasses that may stand in a state.

Owns   telling which objects are nothing but their fields, and making them again from those.
Never  imports a module, or runs a constructor or a destructor that a state chose.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from types import MemberDescriptorType
from typing import Any, Literal

from deltackpt.errors import FormatError, InvalidInputError, MissingDependencyError

Kind = Literal["namedtuple", "dataclass"]

#: A dataclass that is one of these too is more than its fields.
_BUILTINS = (dict, list, tuple, set, frozenset, str, bytes, int, float, BaseException)


def kind_of(x: object) -> Kind | None:
    """Say whether an object is an instance of a namedtuple or of a dataclass; None if of neither."""
    kind = type(x)
    if isinstance(x, tuple):
        return "namedtuple" if _is_namedtuple(kind) else None
    is_plain = dataclasses.is_dataclass(kind) and not isinstance(x, _BUILTINS)
    return "dataclass" if is_plain else None


def _is_namedtuple(kind: type) -> bool:
    fields = getattr(kind, "_fields", None)
    return issubclass(kind, tuple) and isinstance(fields, tuple) and all(isinstance(f, str) for f in fields)


def _fields(kind: type) -> tuple[str, ...]:
    if issubclass(kind, tuple):
        return tuple(kind._fields)  # type: ignore[attr-defined]
    return tuple(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]


def take_apart(x: Any, where: str) -> tuple[str, list[tuple[str, Any]]]:
    """Return the name of an object's class, and its fields with their values.

    Raises
    ------
    InvalidInputError
        If the class could not be found again by its name, or the object is more than its fields.
    """
    kind = type(x)
    name = f"{kind.__module__}:{kind.__qualname__}"
    if _find(name) is not kind:
        raise InvalidInputError(
            f"{where}: the class {name} is not to be found under its name, so it could not be loaded",
            hint="define the class at the top of a module",
        )
    fields = _fields(kind)
    if isinstance(x, tuple):
        if len(fields) != len(x) or getattr(x, "__dict__", None):
            raise InvalidInputError(
                f"{where}: a {name} that is more than its fields", hint="pass tuple(x) and the rest beside it"
            )
        return name, list(zip(fields, x, strict=True))
    slots = {slot for base in kind.__mro__ for slot in _slots(base) if hasattr(x, slot)}
    held = set(getattr(x, "__dict__", ())) | slots
    missing = [field for field in fields if field not in held]
    more = sorted(held - set(fields))
    if missing or more:
        found = f"lacks the fields {missing}" if missing else f"has attributes that are no fields: {more}"
        raise InvalidInputError(f"{where}: this {name} {found}", hint="pass vars(x)")
    return name, [(field, getattr(x, field)) for field in fields]


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (
        (slots,)
        if isinstance(slots, str)
        else tuple(s for s in slots if s not in ("__dict__", "__weakref__"))
    )


def put_together(kind: Kind, name: str, items: Sequence[tuple[str, Any]], where: str) -> Any:
    """Return an object of the class of this name, from its fields, without calling its constructor.

    Raises
    ------
    MissingDependencyError
        If the class is not imported.
    InvalidInputError
        If it has other fields now.
    FormatError
        If what has the name is no such class.
    """
    module = name.partition(":")[0]
    found = _find(name)
    if found is None:
        raise MissingDependencyError(
            f"{where}: is a {name}, which is not imported here",
            hint=f"import {module} before you load, or leave it out with keys=",
        )
    is_kind = isinstance(found, type) and (
        _is_namedtuple(found) if kind == "namedtuple" else dataclasses.is_dataclass(found)
    )
    if not is_kind or hasattr(found, "__del__") or (kind == "dataclass" and issubclass(found, _BUILTINS)):
        raise FormatError(f"{where}: {name} is no {kind}")
    fields, saved = _fields(found), tuple(field for field, _ in items)
    if fields != saved:
        raise InvalidInputError(
            f"{where}: {name} has the fields {', '.join(fields)} now, it was saved with {', '.join(saved)}",
            hint="load with the code that saved it, or leave it out with keys=",
        )
    if kind == "namedtuple":
        return tuple.__new__(found, [value for _, value in items])
    try:
        made: Any = object.__new__(found)
    except TypeError as error:  # it is an extension type too, made by its own constructor only
        raise FormatError(f"{where}: {name} cannot be made from its fields: {error}") from error
    for field, value in items:
        _set(made, field, value)
    return made


def _set(x: object, field: str, value: Any) -> None:
    """Set a field where it is kept: in the object's dict, or in its slot if the class has one."""
    if hasattr(x, "__dict__") and not isinstance(getattr(type(x), field, None), MemberDescriptorType):
        x.__dict__[field] = value
    else:
        object.__setattr__(x, field, value)


def _find(name: str) -> type | None:
    """Return the class of a name, if its module is imported."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        try:  # past __getattr__ and lazy modules, which run code
            found = object.__getattribute__(found, "__dict__").get(part)
        except AttributeError:
            return None
    return found if isinstance(found, type) else None
