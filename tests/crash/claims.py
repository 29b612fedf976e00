"""Claims: what a store has promised at each moment of a recording, and what it may or may not have done yet.

A call that has returned is acknowledged: what it did is there, whatever comes.  One that has begun may be
found done or not done.  Positions are numbers of changes of the disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np

from deltackpt.backends import Backend
from deltackpt.run import Run
from deltackpt.store import Store, open_store


def frozen(value: Any) -> Any:
    """A state as something hashable; equal if types, dtypes, shapes, NaN payloads and signs of zero are."""
    if isinstance(value, dict):
        return "dict", tuple((key, frozen(part)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(map(frozen, value))
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return type(value).__name__, repr(value)


def found_in(where: Backend | Store) -> dict[Any, Any]:
    """What a new process finds: every step of every run, loaded; every pin."""
    store = open_store(where)
    found: dict[Any, Any] = {}
    for name in store.refs.runs():
        run = Run(store, name)
        pinned = run.pinned()
        for step in run.steps():
            found[name, step] = frozen(run.load(step))
        for step in pinned:
            found["pin", name, step] = True
    return found


@dataclass
class Claim:
    """`key` will be, and from `end` on is, `value`: None if it is absent."""

    key: Any
    value: Any
    begin: int
    end: float = math.inf
    is_acknowledged: bool = False


class Claims:
    """All claims of a recording, in the order in which they were made; `now` says how far the disk is."""

    def __init__(self, now, before: dict[Any, Any]):
        self.now = now
        self._claims = [Claim(key, value, 0, 0, True) for key, value in before.items()]

    def upto(self, n: int, now) -> Claims:
        """These claims when the process that makes them dies after n changes."""
        claims = Claims(now, {})
        claims._claims = [
            c if c.end <= n else replace(c, end=math.inf, is_acknowledged=False)
            for c in self._claims
            if c.begin <= n
        ]
        return claims

    def allowed(self, n: int) -> dict[Any, set[Any]]:
        """What each key may be after n changes; a key that is not there: nothing but absent."""
        allowed: dict[Any, set[Any]] = {}
        for claim in sorted(self._claims, key=lambda c: c.end):
            if claim.begin > n:
                continue
            values = allowed.setdefault(claim.key, {None})
            if claim.end > n:
                values.add(claim.value)
            elif claim.is_acknowledged:
                allowed[claim.key] = {claim.value}
        return allowed

    def _acknowledged(self, key: Any) -> Any:
        """What a key is, by the last call on it that has returned."""
        claims = [c for c in self._claims if c.key == key and c.is_acknowledged]
        return max(claims, key=lambda c: c.end).value if claims else None

    @contextmanager
    def claiming(self, *wanted: tuple[Any, Any], perhaps: tuple[Any, ...] = ()) -> Iterator[list[Any]]:
        """A call that makes each of the wanted true, and may remove `perhaps`: it lists which."""
        begin = self.now()
        claims = [Claim(key, value, begin) for key, value in wanted]
        removals = {key: Claim(key, None, begin) for key in perhaps}
        self._claims += [*claims, *removals.values()]
        removed: list[Any] = []
        yield removed
        # Not reached if it failed: then it may have been done, or not.
        for claim in (*claims, *removals.values()):
            claim.end = self.now()
            claim.is_acknowledged = claim in claims or claim.key in removed

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what is promised by every call of a run."""
        save, forget, fork, pin, unpin = Run.save, Run.forget, Run.fork, Run.pin, Run.unpin

        def saving(run, state, *, step, **kwargs):
            others = tuple((run.name, s) for s in run.steps() if s != step) if run.keep else ()
            with self.claiming(((run.name, step), frozen(state)), perhaps=others) as removed:
                report = save(run, state, step=step, **kwargs)
                is_first = self._acknowledged((run.name, step)) is None
                assert is_first or kwargs.get("overwrite"), (
                    f"two saves of step {step} were told that they won"
                )
                removed += [(run.name, s) for s in report.forgotten]
                return report

        def forgetting(run, steps, **kwargs):
            steps = list(steps)
            with self.claiming(*(((run.name, step), None) for step in steps)):
                return forget(run, steps, **kwargs)

        def forking(run, name, *, step):
            with self.claiming(((name, step), frozen(run.load(step)))):
                return fork(run, name, step=step)

        def pinning(run, step):
            with self.claiming((("pin", run.name, step), True)):
                pin(run, step)

        def unpinning(run, step):
            with self.claiming((("pin", run.name, step), None)):
                unpin(run, step)

        with mock.patch.multiple(
            Run, save=saving, forget=forgetting, fork=forking, pin=pinning, unpin=unpinning
        ):
            yield
