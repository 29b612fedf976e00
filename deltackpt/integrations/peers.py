"""Peers: the processes of one JAX job, of which all restore the same step.

Owns   what they tell each other: which step the first has found, and what went wrong.
Never  lets one go on where another has failed; knows a pytree, or saves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from deltackpt import errors, loader
from deltackpt.errors import ConflictError, DeltackptError, InvalidInputError, NotFoundError
from deltackpt.records import Slot
from deltackpt.run import Run, open_run
from deltackpt.store import Where
from deltackpt.types import State

#: Room for what a process tells the others: 800 characters, each of which takes 12 bytes at most.
_SAID_SIZE = 10 << 10
T = TypeVar("T")


def use_found(store: Where | Run, name: str, step: int | str, use: Callable[[State], T]) -> T:
    """Have each process use, lazily loaded, the step that process 0 finds; if one fails, all raise.

    Another process may see a step that was saved since.  And one that went on alone would wait for ever for
    the others, or begin anew while they resume.
    """
    run, slot = _found_by_all(store, name, step)
    error: Exception | None = None
    try:
        result = use(_loaded(run, slot))
    except Exception as e:
        error = e
    _raise_any(error, _said_by_all({"error": _told(error)}))
    return result


def _found_by_all(store: Where | Run, name: str, step: int | str) -> tuple[Run, Slot]:
    """Return where process 0 has found the step, or raise what kept it from that, in all processes."""
    mine: dict[str, Any] = {
        "step": repr(step)[:99],
        "run": str(name)[:200],
        "store": None,
        "slot": None,
    }
    error: Exception | None = None
    try:
        run = store if isinstance(store, Run) else open_run(store, name, create=False)
        mine["run"], mine["store"] = run.name, run.store.uuid.hex()
        if jax.process_index() == 0:
            mine["slot"] = run.commit(step).slot
    except Exception as e:  # whatever it is, the others wait to hear of it
        error = e
    said = _said_by_all({**mine, "error": _told(error)})
    _check_same(said)
    _raise_any(error, said)
    return run, Slot(*said[0]["slot"])


def _loaded(run: Run, slot: Slot) -> State:
    """Load an attempt at a step, and no other."""
    with suppress(NotFoundError):  # who catches that begins anew: it is only for a step that nobody has found
        commit = run.commit(slot.step)
        if commit.slot == slot:
            with run.reading(commit):
                manifest = run.store.read_manifest(commit)
                return loader.load(run.store, manifest, lazy=True, reading=lambda: run.reading(commit))
    raise ConflictError(
        f"run {run.name!r} step {slot.step}: was overwritten or forgotten while it was restored",
        hint="restore again",
    )


def _told(error: Exception | None) -> tuple[str, str, str] | None:
    """Return an error as the other processes are told of it: its class, its message, its hint."""
    if error is None:
        return None
    if not isinstance(error, DeltackptError):
        return DeltackptError.__name__, f"{type(error).__name__}: {error}"[:400], ""
    return type(error).__name__, error.message[:400], (error.hint or "")[:100]


def _said_by_all(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Tell all processes something short, and return what each has said."""
    data = json.dumps(mine).encode()
    row = np.zeros(_SAID_SIZE, np.uint8)
    row[: len(data)] = list(data)
    return [json.loads(said.tobytes().rstrip(b"\0")) for said in process_allgather(row)]


def _check_same(said: Sequence[dict[str, Any]]) -> None:
    """Raise, in all processes, if not all ask for the same."""
    first = said[0]
    for i, other in enumerate(said):
        if any(other[key] != first[key] for key in ("step", "run", "store")):
            told = [
                f"process {n} asks for step {x['step']} of run {x['run']!r}, "
                + (f"store {x['store'][:8]}" if x["store"] else f"and has no store: {x['error'][1]}")
                for n, x in ((0, first), (i, other))
            ]
            raise InvalidInputError(
                f"restore: {told[0]}; {told[1]}",
                hint="have all processes restore the same step from a store that all of them see",
            )


def _raise_any(error: Exception | None, said: Sequence[dict[str, Any]]) -> None:
    """Raise what has failed here, or else what has in the first process that says so."""
    if error is not None:
        raise error
    for i, other in enumerate(said):
        if other["error"]:
            kind, message, hint = other["error"]
            raise getattr(errors, kind, DeltackptError)(f"process {i}: {message}", hint=hint or None)
