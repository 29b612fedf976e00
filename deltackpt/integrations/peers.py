"""Peers: the processes of one JAX job, of which all restore the same step.

Owns   what they tell each other: which step the first has found, and what went wrong.
Never  reads an array, or saves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

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


def found_by_all(store: Where | Run, name: str, step: int | str) -> State:
    """Load, lazily, the step that process 0 finds: another may see one that was saved since."""
    mine: dict[str, Any] = {
        "step": repr(step)[:99],
        "run": str(name)[:200],
        "store": None,
        "slot": None,
        "error": None,
    }
    error: Exception | None = None
    try:
        run = store if isinstance(store, Run) else open_run(store, name, create=False)
        mine["run"], mine["store"] = run.name, run.store.uuid.hex()
        if jax.process_index() == 0:
            mine["slot"] = run.commit(step).slot
    except Exception as e:  # whatever it is, the others wait to hear of it
        error, mine["error"] = e, _told(e)
    slot = _agreed(_said_by_all(mine), error)
    with suppress(NotFoundError):  # of which others, that have found it, would not hear
        commit = run.commit(slot.step)
        if commit.slot == slot:
            with run.reading(commit):
                manifest = run.store.read_manifest(commit)
                return loader.load(run.store, manifest, lazy=True, reading=lambda: run.reading(commit))
    raise ConflictError(
        f"run {run.name!r} step {slot.step}: was overwritten or forgotten while it was restored",
        hint="restore again",
    )


def _told(error: Exception) -> tuple[str, str, str]:
    """Return an error as the other processes are told of it: its class, its message, its hint."""
    if not isinstance(error, DeltackptError):
        return DeltackptError.__name__, f"{type(error).__name__}: {error}"[:400], ""
    return type(error).__name__, error.message[:400], (error.hint or "")[:100]


def _said_by_all(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Tell all processes something short, and return what each has said."""
    data = json.dumps(mine).encode()
    row = np.zeros(_SAID_SIZE, np.uint8)
    row[: len(data)] = list(data)
    return [json.loads(said.tobytes().rstrip(b"\0")) for said in process_allgather(row)]


def _agreed(said: Sequence[dict[str, Any]], error: Exception | None) -> Slot:
    """Return what process 0 has found, or raise what kept it from that; the same in all processes."""
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
    if error is not None:
        raise error
    if first["error"]:
        kind, message, hint = first["error"]
        raise getattr(errors, kind, DeltackptError)(f"process 0: {message}", hint=hint or None)
    return Slot(*first["slot"])
