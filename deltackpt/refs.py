"""Refs: which steps a store has, by the decisions in it.

Owns   listing runs and steps, reading decisions, deciding a slot, forgetting, pinning.
Never  moves a pointer: the latest step is derived from the commits there are.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from deltackpt.backends import Backend
from deltackpt.errors import ConflictError, CorruptError, FormatError, InvalidInputError, NotFoundError
from deltackpt.records import (
    GONE,
    PIN,
    Commit,
    Fence,
    Pin,
    Slot,
    check_run,
    decision_from_bytes,
    is_run,
    tombstone,
)


@dataclass(frozen=True, slots=True)
class Listing:
    """A run's slots, those of them that are forgotten, those that have a tombstone, and the pins.

    A tombstone forgets the older attempts at its step too: else one that a crash kept from having its own
    would come back.  While a step is pinned its newest commit is not forgotten, tombstone or not.
    """

    slots: list[Slot]
    gone: frozenset[Slot]
    tombstones: frozenset[Slot]
    pins: list[Pin]

    @property
    def pinned(self) -> frozenset[int]:
        """The steps that are pinned."""
        newest = {pin.step: pin for pin in self.pins}  # they are in order
        return frozenset(step for step, pin in newest.items() if pin.pins)


class Refs:
    """The decisions of a store.  They never change, so each is read once."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: dict[Slot, Commit | Fence] = {}
        self._tombstones: frozenset[Slot] = frozenset()  # those seen; replaced, never changed
        self._settled: dict[str, Listing] = {}  # by run, what is known to be durable
        self._written: set[str] = set()  # runs in which this process has

    def runs(self) -> list[str]:
        """Return the names of all runs, sorted; gc's own sessions and foreign directories are none."""
        return [name for name in self._backend.list_dirs("refs/") if is_run(name)]

    def listing(self, run: str) -> Listing:
        """List a run's slots, by step and attempt."""
        slots: list[Slot] = []
        tombstones: set[Slot] = set()
        forgotten: dict[int, int] = {}  # step: newest attempt with a tombstone
        seen = self._tombstones
        names = self._backend.names(f"refs/{run}/")
        for name in names:
            slot = Slot.from_key(name.removesuffix(GONE))
            if slot is None:
                continue
            if name.endswith(GONE):
                tombstones.add(slot)
                forgotten[slot.step] = max(slot.attempt, forgotten.get(slot.step, 0))
            else:
                slots.append(slot)
        gone = {slot for slot in slots if slot.attempt <= forgotten.get(slot.step, 0)}
        if not tombstones <= seen:
            # Again: one listing may show a tombstone and miss the pin that was there before it.  One that was
            # seen before this listing began is no such case.
            names = self._backend.names(f"refs/{run}/")
            self._tombstones |= tombstones
        found = (Pin.from_key(name) for name in names if PIN in name)
        pins = sorted((pin for pin in found if pin), key=lambda pin: (pin.step, pin.n))
        listing = Listing(sorted(slots), frozenset(gone), frozenset(tombstones), pins)
        held = {self._newest_commit(listing.slots, step) for step in listing.pinned & forgotten.keys()}
        return replace(listing, gone=listing.gone - held)

    def _newest_commit(self, slots: list[Slot], step: int) -> Slot | None:
        """Return the slot of the newest commit at a step; a decision that cannot be read may be one."""
        for slot in reversed(slots):
            if slot.step == step and not self._is_fence(slot):
                return slot
        return None

    def decision(self, slot: Slot) -> Commit | Fence | None:
        """Return what was decided in a slot; None while nothing is."""
        if slot not in self._known:
            try:
                data = self._backend.read(slot.key)
            except NotFoundError:
                return None
            try:
                self._known[slot] = decision_from_bytes(data, slot)
            except CorruptError as e:
                give_up = f"deltackpt forget --run {slot.run} --step {slot.step}"
                hint = f"run deltackpt verify; `{give_up}` gives the step up, so that the others can be used"
                raise CorruptError(e.message, hint=hint) from e
        return self._known[slot]

    def commits(self, run: str) -> list[Commit]:
        """Return a run's commits that are not forgotten, by step; superseded attempts before the newer."""
        return self.commits_of(self.listing(run))

    def commits_of(self, listing: Listing) -> list[Commit]:
        """Return the commits of a listing that are not forgotten, as `commits` does."""
        decisions = [self.decision(slot) for slot in listing.slots if slot not in listing.gone]
        return [d for d in decisions if isinstance(d, Commit)]

    def visible(self, listing: Listing) -> list[Slot]:
        """Return the slots of a listing that are not forgotten and no fences; those of no use included.

        A decision that is damaged may have been a commit: it must be possible to forget it.
        """
        return [s for s in listing.slots if s not in listing.gone and not self._is_fence(s)]

    def _is_fence(self, slot: Slot) -> bool:
        try:
            return isinstance(self.decision(slot), Fence)
        except FormatError:
            return False

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
        steps = sorted({slot.step for slot in self.visible(self.listing(run))})
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
        slot, newest, has_tombstone = self._attempts(check_run(run), step)
        # Asked after the tombstone was seen: a pin that was there before it is seen too.
        if newest is None or (has_tombstone and not self.is_pinned(run, step)):
            return slot, None
        return slot, newest

    def _attempts(self, run: str, step: int) -> tuple[Slot, Commit | None, bool]:
        """Return a step's first undecided slot, its newest commit, and whether that has a tombstone."""
        newest, has_tombstone = None, False
        attempt = 1
        while decision := self._decided(Slot(run, step, attempt)):
            if isinstance(decision, Commit):
                newest, has_tombstone = decision, False
            has_tombstone = has_tombstone or self._backend.exists(decision.slot.key + GONE)
            attempt += 1
        return Slot(run, step, attempt), newest, has_tombstone

    def _decided(self, slot: Slot) -> Commit | Fence | None:
        """Return what was decided in a slot; what is lost or damaged, and forgotten, counts as a fence.

        Its tombstone forgets whatever would be decided there again.
        """
        try:
            decision, error = self.decision(slot), None
        except CorruptError as e:
            decision, error = None, e
        if decision is None and self._backend.exists(slot.key + GONE):
            return Fence(slot, bytes(16))
        if error is not None:
            raise error
        return decision

    def is_gone(self, slot: Slot) -> bool:
        """Return whether the commit in a slot was forgotten, itself or with a newer attempt."""
        at = slot
        while not self._backend.exists(at.key + GONE):
            at = Slot(at.run, at.step, at.attempt + 1)
            if not self._backend.exists(at.key):
                return False
        _, newest = self.slot(slot.run, slot.step)
        return newest is None or newest.slot != slot

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
            raise lost(slot, found)
        self._backend.barrier(f"refs/{slot.run}", "refs")
        self._known[slot] = decision
        self._written.add(slot.run)
        return len(data)

    def forget(self, slots: Iterable[Slot]) -> None:
        """Make what was committed in some slots invisible, durable on return; gc gives the space back."""
        runs = set()
        for slot in slots:
            key, data = tombstone(slot)
            self._backend.create_once(key, data)
            self._tombstones |= {slot}
            runs.add(slot.run)
        self._backend.barrier(*(f"refs/{run}" for run in sorted(runs)))

    def settle(self) -> None:
        """Make durable what was decided and forgotten in every run, whoever did: they may have died before.

        For gc: what it deletes must not come back into use with a tombstone that a power loss takes.
        """
        for run in self.runs():
            listing = self.listing(run)
            if listing != self._settled.get(run) and listing.slots:
                self._backend.doubt(f"refs/{run}")
                self._backend.barrier(f"refs/{run}", "refs")
                self._settled[run] = listing

    def below(self, slot: Slot) -> tuple[str, ...]:
        """Return the directories to be flushed before a decision in a slot; none if this process has decided.

        A power loss must not take the step before, or the attempt that is replaced, and leave what builds on
        it: nobody was told of either, but the store would miss one for ever.
        """
        if slot.run in self._written and slot.attempt == 1:
            return ()
        self._backend.doubt(f"refs/{slot.run}")
        return f"refs/{slot.run}", "refs"

    # -- pins

    def is_pinned(self, run: str, step: int) -> bool:
        """Return whether a step is pinned; asks for one name after another and lists nothing."""
        return self._n_pins(run, step) % 2 == 1

    def check_unpinned(self, run: str, step: int) -> None:
        """Refuse to replace or forget a step that is pinned."""
        if self.is_pinned(run, step):
            raise InvalidInputError(
                f"run {run!r} step {step} is pinned", hint=f"deltackpt pin {step} --run {run} --undo"
            )

    def _n_pins(self, run: str, step: int) -> int:
        n = 0
        while self._backend.exists(Pin(run, step, n + 1).key):
            n += 1
        return n

    def pin(self, run: str, step: int) -> None:
        """Keep a step from being forgotten, durable on return; nothing happens if it is pinned already.

        Whoever forgets the step at the same time looks for a pin first and creates a tombstone then; this
        creates a pin first and looks for a tombstone then.  So one of them sees the other, or both do; a
        tombstone that comes after the pin is void, and one that comes before it is seen here.

        Raises
        ------
        NotFoundError
            If the step is not there, or was forgotten meanwhile.
        """
        self.commit(run, step)
        created = self._turn(run, step, pins=True)
        if created is None:
            return
        _, newest, has_tombstone = self._attempts(run, step)
        if newest is None or has_tombstone:
            if created:  # its chunks may be deleted already, so it must not come back
                self._turn(run, step, pins=False)
            raise NotFoundError(
                f"run {run!r} step {step}: was forgotten while it was being pinned",
                hint="pin another step",
            )

    def unpin(self, run: str, step: int) -> None:
        """Let a step be forgotten again, durable on return; nothing happens if it is not pinned.

        Raises
        ------
        NotFoundError
            If the step is not there.
        """
        self.commit(run, step)
        self._turn(run, step, pins=False)

    def _turn(self, run: str, step: int, *, pins: bool) -> bool | None:
        """Create the next pin record; None if the last one says so already, False if another was first."""
        n = self._n_pins(run, step)
        if n % 2 == pins:
            return None
        pin = Pin(run, step, n + 1)
        created = self._backend.create_once(pin.key, pin.to_bytes())
        self._backend.barrier(f"refs/{run}")
        return created

    def check_new_run(self, run: str) -> None:
        """Refuse a run whose name differs from another's in case only: file systems may mix them up."""
        for other in self.runs():
            if other != run and other.casefold() == run.casefold():
                raise InvalidInputError(
                    f"run {run!r} differs from run {other!r} in case only", hint="choose another name"
                )


def lost(slot: Slot, found: Commit | Fence | None) -> ConflictError:
    """Return the error of whoever finds his slot decided by another, or by a fence."""
    if isinstance(found, Fence):
        return ConflictError(
            f"run {slot.run!r} step {slot.step}: gc gave this save up for dead while it was running",
            hint="save again; raise gc's patience if saves take that long",
        )
    if found is None:
        return ConflictError(f"run {slot.run!r} step {slot.step}: this save was given up", hint="save again")
    return ConflictError(
        f"run {slot.run!r} step {slot.step}: another writer committed it first",
        hint="give each job its own run, or save the next step",
    )
