"""Crash states: what a power loss may leave of a scenario, after each change, and whether that is right.

    scenario  ── recorded on a model disk ──  changes, and claims of what was acknowledged when
    prefix    ── with what of the rest a power loss may leave ──  trees (disk.Replay)
    tree      ── opened by a new process ──  every acknowledged step bit-exact, every other whole or absent;
                                             the next save and gc work, and survive the next power loss

A process that dies leaves what it did, durable or not, to the next one, which may build on it.  So the same
is done once more for what a *successor* does after a prefix, power being lost only then.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from claims import Claims, found_in, frozen
from disk import Disk, Replay, Tree
from scenarios import ROOT, Scenario, made
from scenes import state
from steps import collect, opened
from test_damage import AtOnce

from deltackpt import backends, gc
from deltackpt.backends import Backend
from deltackpt.backends.local import LocalBackend
from deltackpt.errors import DeltackptError
from deltackpt.repair import repair
from deltackpt.store import DESCRIPTOR, open_store
from deltackpt.verify import verify
from deltackpt.workers import workers

TMP, SESSIONS = f"{ROOT}/tmp", f"{ROOT}/sessions"
#: What nobody reads, and what no reader does.
UNREAD = (TMP, f"{ROOT}/.reserve")
#: The step that a successor saves, and the one that is saved after a crash.
AFTER, NEXT = 9, 20


class ViolationError(AssertionError):
    """A promise was broken."""


#: How a broken promise shows; anything else is a fault of these tests, or of the package in any case.
BROKEN = (ViolationError, DeltackptError, AssertionError)


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Parameters
    ----------
    n_random : int
        Random sets of survivors after each change.
    whole_share : float
        Share of the distinct trees in which the next save, gc and verify are tried too, and not only loads.
    cut_share : float
        Share of the changes after which successors go on.
    n_moments : int or None
        Of each successor, moments at which power is lost, beside the ends of what it does; None: all.
    """

    n_random: int = 12
    whole_share: float = 0.04
    cut_share: float = 0.06
    n_moments: int | None = 3


ALL = Effort(48, 1.0, 1.0, None)


def explore(name: str, effort: Effort, seed: int) -> Counter[str]:
    """Try the crash states of a scenario; return how many of what there were.

    Raises
    ------
    ViolationError
        At the first state that is not right.
    """
    rng = random.Random(f"{name} {seed}")
    with at_once(rng), made(name) as scenario:
        return _Explorer(scenario, effort, rng).run()


@contextmanager
def at_once(rng: random.Random) -> Iterator[None]:
    """No threads, and names by the seed: what is done is done in the same order every time."""
    logging.getLogger("deltackpt").setLevel(logging.CRITICAL)
    with (
        mock.patch.object(workers, "_pool", AtOnce()),
        mock.patch.object(backends, "_N_RACERS", 1),
        mock.patch.object(secrets, "token_bytes", lambda size=32: rng.randbytes(size)),
        mock.patch.object(secrets, "token_hex", lambda size=32: rng.randbytes(size).hex()),
    ):
        yield


class _Explorer:
    """The states of one scenario."""

    def __init__(self, scenario: Scenario, effort: Effort, rng: random.Random):
        self._scenario = scenario
        self._effort = effort
        self._rng = rng
        self._found: dict[int, dict] = {}  # by what a reader reads
        self._seen: set[int] = set()
        self._listed: frozenset = frozenset()
        self.count: Counter[str] = Counter()

    def run(self) -> Counter[str]:
        disk = self._scenario.disk()
        before = {}
        if disk.contents():
            backend = LocalBackend(ROOT, calls=disk)
            before = found_in(backend)
            self._listed = frozenset(open_store(backend).refresh().packs)
        claims = Claims(lambda: len(disk.changes), before)
        disk.claims = claims
        with claims.noting():
            self._scenario.act(disk)
        self.count["changes"] = len(disk.changes)
        replay = Replay(disk)
        for n in range(len(disk.changes) + 1):
            if n:
                replay.step(disk.changes[n - 1])
            where = f"after change {n} of {len(disk.changes)}" + (f", {disk.changes[n - 1]}" if n else "")
            self._try(replay, claims.allowed(n), where, self._effort.n_random)
            if self._rng.random() < self._effort.cut_share:
                for order in ("again, gc", "gc, save"):
                    self._succeed(disk, n, replay.copy(), claims, order, where)
        return self.count

    def _try(self, replay: Replay, allowed: dict, where: str, n_random: int) -> None:
        """Lose power now, in every way."""
        for tree in replay.trees(self._rng, n_random, TMP):
            self.count["states"] += 1
            try:
                self._check(tree, allowed)
            except BROKEN as e:
                raise ViolationError(f"{where}\n  {tree.how}\n  {type(e).__name__}: {e}") from e

    def _succeed(self, disk: Disk, n: int, replay: Replay, claims: Claims, order: str, where: str) -> None:
        """Have another process go on where the scenario's died, and lose power then."""
        after = disk.upto(n)
        claims = claims.upto(n, lambda: len(after.changes))
        moments = set()
        self.count["successors"] += 1
        try:
            with claims.noting():
                for act in order.split(", "):
                    _ACTS[act](LocalBackend(ROOT, calls=after), self._scenario.may_ask)
                    moments.add(len(after.changes))
        except BROKEN as e:
            raise ViolationError(f"{where}\n  then {order}: {type(e).__name__}: {e}") from e
        others = range(n + 1, len(after.changes))
        n_moments = self._effort.n_moments
        moments |= set(
            self._rng.sample(others, min(n_moments, len(others))) if n_moments is not None else others
        )
        for m in range(n + 1, len(after.changes) + 1):
            replay.step(after.changes[m - 1])
            if m in moments:
                told = f"{where}\n  then {order}, {m - n} changes, the last {after.changes[m - 1]}"
                self._try(replay, claims.allowed(m), told, self._effort.n_random // 3)

    # -- one state

    def _check(self, tree: Tree, allowed: dict) -> None:
        found = self._read(tree)
        check_allowed(found, allowed)
        key = tree.key(*UNREAD)
        if key not in self._seen:
            self._seen.add(key)
            self.count["distinct"] += 1
            if self._rng.random() < self._effort.whole_share:
                self.count["whole"] += 1
                check_usable(tree.disk(), found, self._scenario)

    def _read(self, tree: Tree) -> dict:
        """What a new process reads; the same of what looks the same to it."""
        key = tree.key(*UNREAD, SESSIONS)
        if key not in self._found:
            found = {}
            if f"{ROOT}/{DESCRIPTOR}" in tree.names:
                disk = tree.disk()
                disk.hook = _reads_only
                store = open_store(LocalBackend(ROOT, calls=disk))
                found = found_in(store)
                # A merge of index files is durable before they go.
                index = store.refresh()
                listed = set(index.packs) - index.unlisted
                for name in self._listed - listed - store.gc_state()[1]:
                    if f"{ROOT}/{name.key}" in tree.names:
                        raise ViolationError(f"{name.key} was in an index file, and is in none now")
            self._found[key] = found
        return self._found[key]


def check_allowed(found: dict, allowed: dict) -> None:
    """What is found is what may be."""
    for key in found.keys() | allowed.keys():
        if found.get(key) not in allowed.get(key, {None}):
            raise ViolationError(
                f"{key} is {_told(found.get(key))}, may be {_told(*allowed.get(key, [None]))}"
            )


def check_usable(disk: Disk, found: dict, scenario: Scenario) -> None:
    """The next save and the next gc work, leave no step worse and nothing dead behind, and last."""
    backend = LocalBackend(ROOT, calls=disk)
    opened(backend).save(state(NEXT), step=NEXT)
    expected = found | {("main", NEXT): frozen(state(NEXT))}
    check_same(disk, expected, "the next save")
    if scenario.is_damaged:
        repair(backend)
        check_same(disk, expected, "a repair")
    collect(backend, force=scenario.may_ask)
    check_same(disk, expected, "the next gc")
    damage = verify(backend, level="decode").damage
    if damage:
        raise ViolationError(f"verify: {damage[0].message}")
    left = [path for path in disk.contents() if path.startswith((TMP, SESSIONS))]
    if left:
        raise ViolationError(f"left behind: {left}")
    # Of two copies gc may keep the one whose pack it then finds to be needless: once more is enough.
    collect(backend)
    n_dead = gc.collect(backend, dry_run=True).n_dead
    if n_dead:
        raise ViolationError(f"{n_dead} dead packs after two gcs")


def _save(backend: Backend, force: bool) -> None:
    """Save what the dead one was saving, and more, so that it finds some of it there."""
    new = {**state(2), **{f"{s}.moves": state(s)["moves"] for s in range(6)}}
    opened(backend).save(new, step=AFTER)


def _save_again(backend: Backend, force: bool) -> None:
    """Save what the dead one was saving, and nothing else: if all of it is there, no pack is written."""
    run = opened(backend)
    run.store.refresh(complete=True)  # as a load does that misses a chunk
    run.save(state(2), step=AFTER)


def _gc(backend: Backend, force: bool) -> None:
    if backend.exists(DESCRIPTOR):
        collect(backend, force=force)


_ACTS = {"save": _save, "again": _save_again, "gc": _gc}


def check_same(disk: Disk, expected: dict, after: str) -> None:
    """Every step is there, even after a power loss that takes all it may."""
    replay = Replay(disk)
    for change in disk.changes:
        replay.step(change)
    found = found_in(LocalBackend(ROOT, calls=replay.worst().disk()))
    for key in found.keys() | expected.keys():
        if found.get(key) != expected.get(key):
            told = f"{key} is {_told(found.get(key))}, was {_told(expected.get(key))}"
            raise ViolationError(f"{after}, and a power loss: {told}")


def _reads_only(call: str, *args: object) -> None:
    """Readers neither look into tmp/ and sessions/ nor change anything: so these need not be compared."""
    path = args[0]
    assert call in ("open", "preadv", "fstat", "close", "lstat", "scandir"), call
    assert not (isinstance(path, str) and path.startswith((TMP, SESSIONS))), path


def _told(*values: object) -> str:
    return " or ".join("absent" if value is None else f"#{hash(value) % 9999}" for value in values)
