"""The protocol of commit and gc, small enough to try every order of its steps.

One chunk, which step 0 needs and pack 0 holds.  Writer i saves step i, which needs the chunk too: it finds
the chunk in a pack, or writes its own copy, pack i.  Steps are forgotten at any time; several gcs run; any
process may stop anywhere for ever, as it does in those orders where it is not its turn again.  A state is bad
when a committed step is left without a copy.

`without` names one rule to break:

==================  =====================================================================================
ignore-condemned    a writer builds on packs that gc condemned (W3)
no-drain            gc does not wait for the writers that were at work when it condemned (G3)
drain-one-too-few   gc waits only for writers that began before the cycle's epoch, not in it
no-second-mark      gc sweeps what it condemned without looking again (G4)
own-list            a gc that finds the sweep record there deletes what it would have written itself (G4)
no-fence-on-file    gc gives a writer up without taking its decision's name: the writer may still commit
abort-deletes       a writer that gives up deletes the pack it has closed
==================  =====================================================================================
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

RULES = [
    "ignore-condemned",
    "no-drain",
    "drain-one-too-few",
    "no-second-mark",
    "own-list",
    "no-fence-on-file",
    "abort-deletes",
]

Packs = frozenset[int]


class Writer(NamedTuple):
    """`at` is the step of the protocol that is done; a session is open from W2 until it has ended."""

    at: str = ""
    epoch: int = -1
    is_open: bool = False
    is_fenced: bool = False
    must_write: bool = False


class Gc(NamedTuple):
    at: str = ""
    cycle: int = 0
    packs: Packs = frozenset()


class State(NamedTuple):
    packs: Packs
    condemned: tuple[Packs, ...]
    swept: tuple[Packs, ...]
    steps: frozenset[int]
    writers: tuple[Writer, ...]
    gcs: tuple[Gc, ...]


Move = tuple[str, State]


def off_limits(state: State) -> Packs:
    """What no writer may build on: by cycle the sweep record, or else the condemn record."""
    n_swept = len(state.swept)
    return frozenset().union(*state.swept, *state.condemned[n_swept:])


def is_bad(state: State) -> bool:
    return bool(state.steps) and not state.packs


def with_one(items: tuple, i: int, value: object) -> tuple:
    return (*items[:i], value, *items[i + 1 :])


def writer_moves(state: State, i: int, without: str | None) -> Iterator[Move]:
    w = state.writers[i]

    def then(label: str, writer: Writer, **changes: object) -> Move:
        return f"writer {i + 1} {label}", state._replace(
            writers=with_one(state.writers, i, writer), **changes
        )

    if w.at == "":
        yield then("reads the epoch", w._replace(at="W1", epoch=len(state.condemned)))
    elif w.at == "W1":
        yield then("opens its session", w._replace(at="W2", is_open=True))
    elif w.at == "W2":
        usable = state.packs if without == "ignore-condemned" else state.packs - off_limits(state)
        yield then("looks the chunk up", w._replace(at="W3", must_write=not usable))
    elif w.at == "W3" and w.must_write:
        yield then("writes a pack", w._replace(at="W4"), packs=state.packs | {i + 1})
    elif w.at in ("W3", "W4"):
        end = w._replace(at="end", is_open=False)
        if w.is_fenced:
            yield then("loses to the fence", end)
        else:
            yield then("commits", end, steps=state.steps | {i + 1})
        if w.at == "W4":
            packs = state.packs - {i + 1} if without == "abort-deletes" else state.packs
            yield then("gives up", end, packs=packs)


def gc_moves(state: State, i: int, n_cycles: int, without: str | None) -> Iterator[Move]:
    g = state.gcs[i]

    def then(label: str, gc: Gc, **changes: object) -> Move:
        return f"gc {i + 1} {label}", state._replace(gcs=with_one(state.gcs, i, gc), **changes)

    n = g.cycle
    if g.at == "" and n < n_cycles:
        if n < len(state.condemned):
            yield then(f"adopts condemn-{n}", Gc("G2", n, state.condemned[n]))
        elif n == len(state.condemned) == len(state.swept):
            writing = {j + 1 for j, w in enumerate(state.writers) if w.is_open}
            candidates = state.packs - off_limits(state)
            # Of several copies it may choose any one to keep.
            for kept in candidates if state.steps else [None]:
                dead = candidates - writing - {kept}
                if dead:
                    yield then(f"marks {sorted(dead)}", Gc("G1", n, dead))
    elif g.at == "G1":
        if n == len(state.condemned):
            yield then(f"creates condemn-{n}", g._replace(at="G2"), condemned=(*state.condemned, g.packs))
        else:
            yield then("finds another's condemn record", Gc("", n))
    elif g.at == "G2":
        old = [j for j, w in enumerate(state.writers) if w.is_open and not w.is_fenced and w.epoch <= n]
        if without == "no-drain":
            old = []
        elif without == "drain-one-too-few":
            old = [j for j in old if state.writers[j].epoch < n]
        if not old:
            yield then("has drained", g._replace(at="G3"))
        for j in old:
            w = state.writers[j]
            fenced = w._replace(is_fenced=without != "no-fence-on-file", is_open=False)
            yield then(f"fences writer {j + 1}", g, writers=with_one(state.writers, j, fenced))
    elif g.at == "G3":
        needed = state.packs & g.packs if state.steps and not state.packs - off_limits(state) else frozenset()
        mine = g.packs if without == "no-second-mark" else g.packs - needed
        if len(state.swept) == n:
            yield then(f"creates sweep-{n}", g._replace(at="G4", packs=mine), swept=(*state.swept, mine))
        else:
            theirs = mine if without == "own-list" else state.swept[n]
            yield then(f"finds sweep-{n}", g._replace(at="G4", packs=theirs))
    elif g.at == "G4":
        left = g.packs & state.packs
        if not left:
            yield then("is done", Gc("", n + 1))
        for pack in left:
            yield then(f"deletes pack {pack}", g, packs=state.packs - {pack})


def moves(state: State, n_cycles: int, without: str | None) -> Iterator[Move]:
    """Every step that some process can take next."""
    for step in state.steps:
        yield f"step {step} is forgotten", state._replace(steps=state.steps - {step})
    for i in range(len(state.writers)):
        yield from writer_moves(state, i, without)
    for i in range(len(state.gcs)):
        yield from gc_moves(state, i, n_cycles, without)


def explore(
    *, n_writers: int, n_gcs: int, n_cycles: int, without: str | None = None
) -> tuple[int, list[str] | None]:
    """Try every order, shortest first; return the number of states and the way to a bad one, or None."""
    start = State(frozenset({0}), (), (), frozenset({0}), (Writer(),) * n_writers, (Gc(),) * n_gcs)
    came_from: dict[State, tuple[str, State] | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        if is_bad(state):
            return len(came_from), way_to(state, came_from)
        for label, after in moves(state, n_cycles, without):
            if after not in came_from:
                came_from[after] = (label, state)
                queue.append(after)
    return len(came_from), None


def way_to(state: State, came_from: dict[State, tuple[str, State] | None]) -> list[str]:
    labels = []
    while (before := came_from[state]) is not None:
        label, state = before
        labels.append(label)
    return labels[::-1]
