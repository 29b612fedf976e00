"""Refs: which steps a store has, by the decisions in it.

Owns   listing runs and steps, reading decisions, deciding a slot, forgetting.
Never  moves a pointer: the latest step is derived from the commits there are.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from deltackpt.backends import Backend
from deltackpt.errors import ConflictError, InvalidInputError, NotFoundError
from deltackpt.records import GONE, Commit, Fence, Slot, check_run, decision_from_bytes, is_run, tombstone


@dataclass(frozen=True, slots=True)
class Listing:
    """A run's slots, those of them that are forgotten, and those that have a tombstone.

    A tombstone forgets the older attempts at its step too: else one that a crash kept from having its own
    would come back.
    """

    slots: list[Slot]
    gone: frozenset[Slot]
    tombstones: frozenset[Slot]


class Refs:
    """The decisions of a store.  They never change, so each is read once."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: dict[Slot, Commit | Fence] = {}

    def runs(self) -> list[str]:
        """Return the names of all runs, sorted; gc's own sessions and foreign directories are none."""
        return [name for name in self._backend.list_dirs("refs/") if is_run(name)]

    def listing(self, run: str) -> Listing:
        """List a run's slots, by step and attempt."""
        slots: list[Slot] = []
        tombstones: set[Slot] = set()
        forgotten: dict[int, int] = {}  # step: newest attempt with a tombstone
        for name in self._backend.names(f"refs/{run}/"):
            slot = Slot.from_key(name.removesuffix(GONE))
            if slot is None:
                continue
            if name.endswith(GONE):
                tombstones.add(slot)
                forgotten[slot.step] = max(slot.attempt, forgotten.get(slot.step, 0))
            else:
                slots.append(slot)
        gone = {slot for slot in slots if slot.attempt <= forgotten.get(slot.step, 0)}
        return Listing(sorted(slots), frozenset(gone), frozenset(tombstones))

    def decision(self, slot: Slot) -> Commit | Fence | None:
        """Return what was decided in a slot; None while nothing is."""
        if slot not in self._known:
            try:
                data = self._backend.read(slot.key)
            except NotFoundError:
                return None
            self._known[slot] = decision_from_bytes(data, slot)
        return self._known[slot]

    def commits(self, run: str) -> list[Commit]:
        """Return a run's commits that are not forgotten, by step; superseded attempts before the newer."""
        listing = self.listing(run)
        decisions = [self.decision(slot) for slot in listing.slots if slot not in listing.gone]
        return [d for d in decisions if isinstance(d, Commit)]

    def steps(self, run: str) -> dict[int, Commit]:
        """Return a run's steps in order, each with its commit: the newest attempt."""
        return {commit.slot.step: commit for commit in self.commits(check_run(run))}

    def latest(self, run: str) -> Commit | None:
        """Return the commit of a run's highest step, None if it has none."""
        listing = self.listing(check_run(run))
        for slot in reversed(listing.slots):
            if slot not in listing.gone:
                decision = self.decision(slot)
                if isinstance(decision, Commit):
                    return decision
        return None

    def commit(self, run: str, step: int) -> Commit:
        """Return the commit of one step.

        Raises
        ------
        NotFoundError
            Naming the nearest steps, or the runs there are.
        """
        _, commit = self.slot(run, step)
        if commit is None:
            raise self.unknown_step(run, step)
        return commit

    def unknown_step(self, run: str, step: int | None) -> NotFoundError:
        """Return the error for a step, or any step, that a run does not have."""
        steps = sorted(self.steps(run))
        if not steps:
            runs = [name for name in self.runs() if name != run]
            near = difflib.get_close_matches(run, runs, 3, 0.3) or runs[:3]
            there = f"there are {', '.join(map(repr, near))}" if near else "there is no other run"
            return NotFoundError(f"run {run!r} has no steps; {there}", hint="deltackpt ls")
        below = [s for s in steps if step is not None and s < step][-1:]
        above = [s for s in steps if step is not None and s > step][:1]
        near_steps = " and ".join(map(str, below + above))
        return NotFoundError(
            f"run {run!r} has no step {step}; nearest: {near_steps}", hint=f"deltackpt ls --run {run}"
        )

    def slot(self, run: str, step: int) -> tuple[Slot, Commit | None]:
        """Return the first undecided slot of a step, and the step's commit if it has one.

        Attempts are dense, so this asks for one name after another and lists nothing: a save must not
        cost more in a run of 10,000 steps.
        """
        check_run(run)
        newest = None
        attempt = 1
        while decision := self.decision(Slot(run, step, attempt)):
            if self._backend.exists(decision.slot.key + GONE):
                newest = None
            elif isinstance(decision, Commit):
                newest = decision
            attempt += 1
        return Slot(run, step, attempt), newest

    def is_gone(self, slot: Slot) -> bool:
        """Return whether the commit in a slot was forgotten, itself or with a newer attempt."""
        while not self._backend.exists(slot.key + GONE):
            slot = Slot(slot.run, slot.step, slot.attempt + 1)
            if not self._backend.exists(slot.key):
                return False
        return True

    def decide(self, decision: Commit | Fence) -> int:
        """Create a slot's decision, durable on return; return its size in bytes.

        Raises
        ------
        ConflictError
            If the slot is decided already.
        """
        data = decision.to_bytes()
        slot = decision.slot
        if not self._backend.create_once(slot.key, data):
            found = self.decision(slot)
            raise _lost(slot, found)
        self._backend.barrier(f"refs/{slot.run}", "refs")
        self._known[slot] = decision
        return len(data)

    def forget(self, commits: Iterable[Commit]) -> None:
        """Make steps invisible, durable on return; gc gives their space back."""
        runs = set()
        for commit in commits:
            key, data = tombstone(commit.slot)
            self._backend.create_once(key, data)
            runs.add(commit.slot.run)
        self._backend.barrier(*(f"refs/{run}" for run in sorted(runs)))

    def check_new_run(self, run: str) -> None:
        """Refuse a run whose name differs from another's in case only: file systems may mix them up."""
        for other in self.runs():
            if other != run and other.casefold() == run.casefold():
                raise InvalidInputError(
                    f"run {run!r} differs from run {other!r} in case only", hint="choose another name"
                )


def _lost(slot: Slot, found: Commit | Fence | None) -> ConflictError:
    if isinstance(found, Fence):
        return ConflictError(
            f"run {slot.run!r} step {slot.step}: gc gave this save up for dead while it was running",
            hint="save again; raise gc's patience if saves take that long",
        )
    return ConflictError(
        f"run {slot.run!r} step {slot.step}: another writer committed it first",
        hint="give each job its own run, or save the next step",
    )
