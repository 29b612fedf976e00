"""The public names, each as a page of reference writes it."""

from __future__ import annotations

import inspect

import deltackpt
from deltackpt import LazyArray, Pending, Run, SaveReport, Store

#: Classes that a user gets and does not make.
GIVEN = {LazyArray, Pending, Run, SaveReport, Store}
#: Those whose members a user calls.
CALLED = {LazyArray, Run}


class _Text(str):
    """An annotation without quotes, as it stands in the code."""

    def __repr__(self) -> str:
        return str(self)


def signature(function: object, *, is_method: bool = False) -> str:
    """Return a signature on one line, with ``...`` for Ellipsis."""
    found = inspect.signature(function)
    parameters = [
        p.replace(annotation=_Text(p.annotation)) for p in list(found.parameters.values())[is_method:]
    ]
    returns = found.empty if isinstance(function, type) else _Text(found.return_annotation)
    return str(found.replace(parameters=parameters, return_annotation=returns)).replace("Ellipsis", "...")


def signatures() -> set[str]:
    """Return every public name and the members of `CALLED`, what is called with its signature."""
    found = set()
    for name in deltackpt.__all__:
        value = getattr(deltackpt, name)
        found.add(name + (signature(value) if callable(value) and value not in GIVEN else ""))
        if value in CALLED:
            for member, made in vars(value).items():
                if not member.startswith("_"):
                    told = signature(made, is_method=True) if inspect.isfunction(made) else ""
                    found.add(f"{name}.{member}{told}")
    return found
