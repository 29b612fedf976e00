"""The protocol of commit and gc, small enough to try every order of its steps.

A pack holds copies of chunks, whole or as deltas of a base, each of its depth.  Writers save a step that
needs one chunk: they find it with its whole chain, or write it, as a delta if its base is found.  Or they
save one step together, in one slot: ranks hand over, and one more writer, the coordinator, decides for all.
Steps are forgotten at any time.  gcs finish what others began, begin cycles, copy what is in use out of packs
of much waste, and store deltas whole.  Any process may stop anywhere for ever, as it does in those orders
where it is not its turn again.  A state is bad when what a visible step needs cannot be decoded from the
packs that are there, or when no gc can begin a cycle any more because what a step needs is condemned.

What is not here: what happens inside a mark, which is one step; power losses but for deletions that they
undo, and packs that no index lists (tests/crash); that gc's own sessions are waited for, since it is safe
without; forks, which are writers that can do less, since they have to read what they write.

`without` names rules to break:

==================  =====================================================================================
ignore-condemned    a writer builds on packs that gc condemned (W3)
base-not-looked-up  a writer builds on a delta without asking where its base is (W3)
look-before-record  a writer reads what is condemned before its session can be seen (W3 before W2)
ends-too-early      a writer removes its session record before it decides (W5)
abort-deletes       a writer that gives up deletes the pack it has closed
swept-is-free       a pack is no longer condemned once it is swept, though it is there still
spared-for-ever     a pack that one cycle spared is no longer condemned by any other
base-not-marked     what is in use is not closed under bases (G1, G4)
relies-on-condemned gc counts a copy in a pack that was condemned before as one that stays (G1, G4)
tier-before-depth   of two copies gc keeps the one in the better pack, though it is too deep for a delta (G4)
own-candidates      a gc that finds the condemn record there goes on with what it would have condemned (G2)
no-drain            gc does not wait for the writers that were at work when it condemned (G3)
drain-one-too-few   gc waits only for writers that began before the cycle's epoch, not in it (G3)
no-fence-on-file    gc gives a writer up without taking its decision's name: the writer may still commit (G3)
no-second-mark      gc sweeps what it condemned without looking again (G4)
own-list            a gc that finds the sweep record there deletes what it would have written itself (G4)
begin-beside        a cycle is begun although the one before is not swept in that view (G1)
sweep-unsure        a sweep deletes though a step needs what another unfinished cycle condemned (G4)
tombstone-first     who replaces a step forgets the old one before the new one is decided
pin-not-looked      who pins does not look whether the step was forgotten meanwhile
pin-is-void         gc heeds a tombstone though the step is pinned
slots-not-compared  the coordinator takes a part of another attempt
ends-handing-over   a rank's session record goes when it hands over, before its slot is decided
record-not-looked   the coordinator does not look whether the rank's session record is there
packs-not-looked    nor whether its packs are
fence-of-one        a fence ends the session that was found dead, and not all of its slot (G3)
drain-one-a-slot    gc waits only for the newest session of each slot (G3)
==================  =====================================================================================

`begin-beside` and `sweep-unsure` each make up for the other: only without both is something lost.  So does
the look at the rank's record make up for `ends-handing-over`; it is there for a coordinator that gave up, so
that the records went, and tries again with the parts that it has.  `packs-not-looked` loses nothing: only gc
deletes packs, and none that an open session wrote.  That look is there for what a storage loses by itself.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import NamedTuple


class Row(NamedTuple):
    """A copy of a chunk in a pack; `base` is "" if it is whole."""

    chunk: str
    base: str = ""
    depth: int = 0


Pack = frozenset[Row]


def pack(*rows: tuple) -> Pack:
    return frozenset(Row(*row) for row in rows)


class World(NamedTuple):
    """What is in the store at first, and what a writer saves.

    `wanted`: chunks of visible steps, each of a step of its own; `forgettable`: those that may go.
    `goal`: what a step that a writer saves needs.  `ways`: packs it may write if the store lacks that.
    `part`: what the ranks save of the one step, if there are any: all writers but one are.
    """

    start: tuple[Pack, ...]
    wanted: str
    forgettable: str
    goal: str
    ways: tuple[Pack, ...]
    replaces: bool = False
    pins: bool = False
    part: str = ""


WHOLE = pack(("b",))
DELTA = pack(("b", "a", 1))
BOTH = pack(("a",), ("b", "a", 1))
WORLDS = {
    # One chunk: the protocol as it would be without deltas.
    "whole": World((pack(("a",)),), "a", "a", "a", (pack(("a",)),)),
    # A delta and its base in packs of their own, and each in a step of its own.
    "chain": World((pack(("a",)), DELTA), "ab", "ab", "b", (WHOLE, DELTA, BOTH)),
    # What is in use lies beside what is not: a repack.  And the base is in no step: it is there to be undone.
    "waste": World((pack(("a",), ("x",)), DELTA), "bx", "bx", "b", (WHOLE, DELTA)),
    # b is there in depth 1, which the delta c needs, and, in a pack that stays for the sake of a, in depth 3.
    "deep": World(
        (
            pack(("a",), ("x", "a", 1), ("y", "x", 2), ("b", "y", 3), ("c", "b", 2)),
            pack(("b", "a", 1)),
        ),
        "ac",
        "c",
        "c",
        (pack(("c",)),),
    ),
    "replaced": World((pack(("a",)), DELTA), "a", "", "b", (WHOLE, DELTA), replaces=True),
    "pinned": World((pack(("a",)),), "a", "", "a", (pack(("a",)),), pins=True),
    # The rank's part is there and may go; what the coordinator writes may be a delta of what the rank wrote.
    "ranks": World((pack(("a",)),), "a", "a", "b", (pack(("a",)), WHOLE, DELTA), part="a"),
}

RULES = {
    "ignore-condemned": "whole",
    "base-not-looked-up": "chain",
    "look-before-record": "whole",
    "ends-too-early": "whole",
    "abort-deletes": "whole",
    "swept-is-free": "whole",
    "spared-for-ever": "whole",
    "base-not-marked": "chain",
    "relies-on-condemned": "whole",
    "tier-before-depth": "deep",
    "own-candidates": "chain",
    "no-drain": "whole",
    "drain-one-too-few": "whole",
    "no-fence-on-file": "whole",
    "no-second-mark": "whole",
    "own-list": "whole",
    "begin-beside, sweep-unsure": "chain",
    "tombstone-first": "replaced",
    "pin-not-looked": "pinned",
    "pin-is-void": "pinned",
    "slots-not-compared": "ranks",
    "record-not-looked": "ranks",
    "ends-handing-over, record-not-looked": "ranks",
    "fence-of-one": "ranks",
    "drain-one-a-slot": "ranks",
}

# A set of packs is a number: bit i is the i-th pack that was ever thought of.  So is a set of chunks.
Set = int


class Writer(NamedTuple):
    """`at` is the step of the protocol that is done; a session is open from W2 until it has ended.

    Where there are ranks, those of one `attempt` have one slot.
    """

    at: str = ""
    epoch: int = -1
    is_open: bool = False
    is_fenced: bool = False
    seen: Set = 0
    mine: Set = 0
    is_rank: bool = False
    attempt: int = 0


class Gc(NamedTuple):
    """`packs`: what it is about to condemn or to delete; `copies`: the pack it is about to write."""

    at: str = ""
    cycle: int = 0
    packs: Set = 0
    copies: Set = 0


class Pin(NamedTuple):
    """One step, whom somebody pins while somebody else forgets it."""

    is_gone: bool = False
    is_pinned: bool = False
    pins: str = ""
    forgets: str = ""


class State(NamedTuple):
    packs: Set
    condemned: tuple[Set, ...]
    swept: tuple[Set | None, ...]
    wanted: Set
    writers: tuple[Writer, ...]
    gcs: tuple[Gc, ...]
    pin: Pin
    n_fences: int = 0


Move = tuple[str, State]


def bits(packs: Set) -> Iterator[Set]:
    while packs:
        yield packs & -packs
        packs &= packs - 1


def with_one(items: tuple, i: int, value: object) -> tuple:
    # Sorted: which of two alike is which makes no difference.
    return tuple(sorted((*items[:i], value, *items[i + 1 :])))


def who(w: Writer) -> str:
    return "a rank" if w.is_rank else "a writer"


def ended(w: Writer) -> Writer:
    """Return a session whose step is committed; its record may be there still."""
    return Writer("end", w.epoch, w.is_open, mine=w.mine) if w.is_open else Writer("end")


def again(w: Writer) -> Writer:
    """Return who saves again, in the next slot; once."""
    return Writer("end") if w.attempt else Writer(is_rank=w.is_rank)


class Model:
    """One world, with some rules broken."""

    def __init__(self, world: World, n_cycles: int, without: str = "", *, is_undone: bool = False) -> None:
        self.world = world
        self.n_cycles = n_cycles
        self.is_undone = is_undone
        self.without = frozenset(without.split(", ")) - {""}
        self.contents: list[Pack] = []
        self.instances: dict[Pack, list[Set]] = {}
        chunks = {row.chunk for content in (*world.start, *world.ways) for row in content}
        self.chunk_bit = {chunk: 1 << i for i, chunk in enumerate(sorted(chunks))}
        self.usable = cache(self._usable)
        self.in_use = cache(self._in_use)

    # -- packs and copies

    def new(self, content: Pack, state: State) -> Set:
        """Return a pack that was never there: no name is used twice."""
        used = state.packs
        for packs in (*state.condemned, *(gc.packs | gc.copies for gc in state.gcs)):
            used |= packs
        known = self.instances.setdefault(content, [])
        for bit in known:
            if not bit & used:
                return bit
        self.contents.append(content)
        known.append(1 << (len(self.contents) - 1))
        return known[-1]

    def rows(self, packs: Set) -> list[tuple[Set, Row]]:
        return [(bit, row) for bit in bits(packs) for row in self.contents[bit.bit_length() - 1]]

    def _usable(self, packs: Set) -> list[tuple[Set, Row]]:
        """Return the copies that can be decoded, least depth first."""
        found: list[tuple[Set, Row]] = []
        least: dict[str, int] = {}
        for bit, row in sorted(self.rows(packs), key=lambda at: at[1].depth):
            if not row.base or least.get(row.base, 99) < row.depth:
                found.append((bit, row))
                least.setdefault(row.chunk, row.depth)
        return found

    def has(self, packs: Set, chunks: Set) -> bool:
        """Whether these chunks can all be decoded from these packs."""
        there = 0
        for _, row in self.usable(packs):
            there |= self.chunk_bit[row.chunk]
        return not chunks & ~there

    def _in_use(self, packs: Set, avoid: Set, last: Set, wanted: Set) -> list[frozenset[tuple[Set, Row]]]:
        """Return what may be the copies in use: of those that are equally good, any."""

        def rank(at: tuple[Set, Row]) -> tuple[int, int]:
            tier = 2 if at[0] & last else 1 if at[0] & avoid else 0
            return (tier, at[1].depth) if "tier-before-depth" in self.without else (at[1].depth, tier)

        best: dict[str, list[tuple[Set, Row]]] = {}
        for at in sorted(self.usable(packs), key=rank):
            same = best.setdefault(at[1].chunk, [])
            if not same or rank(same[0]) == rank(at):
                same.append(at)
        found = set()
        for choice in product(*best.values()):
            of = {row.chunk: (bit, row) for bit, row in choice}
            chosen = set()
            todo = [chunk for chunk, bit in self.chunk_bit.items() if bit & wanted]
            while todo:
                at = of.get(todo.pop())
                if at is not None and at not in chosen:
                    chosen.add(at)
                    if at[1].base and "base-not-marked" not in self.without:
                        todo.append(at[1].base)
            found.add(frozenset(chosen))
        return sorted(found, key=sorted)

    # -- what the store says

    def off_limits(self, state: State) -> Set:
        """What no writer may build on: by cycle the sweep record, or else the condemn record."""
        packs = spared = 0
        for condemned, swept in zip(state.condemned, state.swept, strict=True):
            if swept is None:
                packs |= condemned
            else:
                spared |= condemned & ~swept
                if "swept-is-free" not in self.without:
                    packs |= swept
        return packs & ~spared if "spared-for-ever" in self.without else packs

    def visible(self, state: State) -> Set:
        """The chunks of visible steps, as a mark sees them."""
        if self.world.pins and state.pin.is_gone:
            return state.wanted if state.pin.is_pinned and "pin-is-void" not in self.without else 0
        return state.wanted

    def is_bad(self, state: State) -> bool:
        wanted = state.wanted
        if self.world.pins and state.pin.is_gone and state.pin.pins != "pinned":
            wanted = 0  # or held by a pin that came too late, and goes again
        if self.world.replaces and not wanted:
            return True  # the step is there at no time
        if not self.has(state.packs, wanted):
            return True
        return None not in state.swept and not self.has(state.packs & ~self.off_limits(state), wanted)

    # -- moves

    def moves(self, state: State) -> Iterator[Move]:
        """Every step that some process can take next."""
        if self.world.part and (state.n_fences > 1 or {"end"} < {w.at for w in state.writers}):
            return  # two attempts are enough; a part that nobody decides is as a writer that gives up
        for chunk in self.world.forgettable:
            if state.wanted & self.chunk_bit[chunk]:
                yield f"{chunk} is forgotten", state._replace(wanted=state.wanted & ~self.chunk_bit[chunk])
        for i, w in enumerate(state.writers):
            if w.at != "end" and w not in state.writers[:i]:
                yield from self.writer_moves(state, i)
        for i, g in enumerate(state.gcs):
            if g not in state.gcs[:i]:
                yield from self.gc_moves(state, i)
        if self.world.part:
            yield from self.slot_moves(state)
        if self.world.pins:
            yield from self.pin_moves(state)
        if self.is_undone:
            for swept in state.swept:
                for bit in bits((swept or 0) & ~state.packs):
                    yield (
                        f"a power loss undoes the deletion of {bit}",
                        state._replace(packs=state.packs | bit),
                    )

    def writer_moves(self, state: State, i: int) -> Iterator[Move]:
        w, without = state.writers[i], self.without

        def then(label: str, writer: Writer, **changes: object) -> Move:
            writers = with_one(state.writers, i, writer)
            return f"{who(w)} {label}", state._replace(writers=writers, **changes)

        if w.at == "":
            at = w._replace(at="W1", epoch=len(state.condemned), attempt=state.n_fences)
            yield then("reads the epoch", at)
        elif w.at == "W1" and "look-before-record" in without:
            yield then("reads what is condemned", w._replace(at="W3-", seen=self.off_limits(state)))
        elif w.at == "W3-":
            yield then("opens its session", w._replace(at="W3", is_open=True))
        elif w.at == "W1":
            yield then("opens its session", w._replace(at="W2", is_open=True))
        elif w.at == "W2":
            seen = 0 if "ignore-condemned" in without else self.off_limits(state)
            yield then("reads what is condemned", w._replace(at="W3", seen=seen))
        elif w.at == "W3":
            found = state.packs & ~w.seen
            goal = self.world.part if w.is_rank else self.world.goal
            if self.finds(state.packs, found, goal):
                yield then("finds all it needs", w._replace(at="W4", seen=0))
            else:
                for way in self.world.ways:
                    if all(row.chunk != goal for row in way):
                        continue
                    bases = {row.base for row in way if row.base} - {row.chunk for row in way}
                    if all(self.finds(state.packs, found, base) for base in bases):
                        mine = self.new(way, state)
                        label = "writes " + " ".join(f"{row.chunk}{row.base}" for row in sorted(way))
                        yield then(label, w._replace(at="W4", seen=0, mine=mine), packs=state.packs | mine)
        elif w.at == "W4" and self.world.part:
            yield from self.part_moves(state, i)
        elif w.at == "W4":
            if self.world.replaces and "tombstone-first" in without:
                yield then("forgets what it replaces", w._replace(at="W4-"), wanted=0)
            elif "ends-too-early" in without:
                yield then("removes its session record", w._replace(at="W4-", is_open=False))
            else:
                yield self.decided(state, i)
            packs = state.packs & ~w.mine if "abort-deletes" in without else state.packs
            yield then("gives up", Writer("end"), packs=packs)
        elif w.at == "W4-":
            yield self.decided(state, i)
            if self.world.part:
                yield self.gives_up(state, i)
        elif w.at == "W5":
            old = state.wanted & self.chunk_bit[self.world.goal]
            yield then("forgets what it replaced", Writer("end"), wanted=old)

    def part_moves(self, state: State, i: int) -> Iterator[Move]:
        """Hand over; or check what the ranks have handed over."""
        w, without = state.writers[i], self.without

        def then(label: str, writer: Writer) -> Move:
            return f"{who(w)} {label}", state._replace(writers=with_one(state.writers, i, writer))

        parts = [part for part in state.writers if part.is_rank]
        wrong = {
            "slots-not-compared": any(part.attempt != w.attempt for part in parts),
            "record-not-looked": not all(part.is_open for part in parts),
            "packs-not-looked": any(part.mine & ~state.packs for part in parts),
        }
        if w.is_rank:
            is_open = w.is_open and "ends-handing-over" not in without
            yield then("hands over", w._replace(at="handed", is_open=is_open))
            yield then("gives up", Writer("end"))
        elif w.is_fenced:  # whatever it would find
            yield self.decided(state, i)
        elif not parts or any(part.at != "handed" for part in parts):
            return  # it waits
        elif {rule for rule, is_so in wrong.items() if is_so} - without:
            yield self.gives_up(state, i)
        else:
            yield then("has checked the parts", w._replace(at="W4-"))

    def gives_up(self, state: State, i: int) -> Move:
        """End the coordinator's session and those of its ranks; it tries again with the parts that it has."""
        writers = [part._replace(is_open=False, epoch=-1) if part.is_rank else part for part in state.writers]
        after = state._replace(writers=with_one(tuple(writers), i, again(state.writers[i])))
        return "a writer gives up, and its ranks' records go", after

    def slot_moves(self, state: State) -> Iterator[Move]:
        """Give a session up for dead, and so all of its slot; remove the records of decided slots."""
        for i, w in enumerate(state.writers):
            if w in state.writers[:i]:
                continue
            if w.is_open and w.at == "end":
                yield "a record goes", state._replace(writers=with_one(state.writers, i, Writer("end")))
            elif w.is_open and w.is_fenced:
                after = w._replace(is_open=False, epoch=-1)
                yield f"{who(w)}'s record goes", state._replace(writers=with_one(state.writers, i, after))
            elif w.is_open and "fence-of-one" in self.without:
                after = w._replace(is_fenced=True)
                yield f"{who(w)} is fenced", state._replace(writers=with_one(state.writers, i, after))
            elif w.is_open:
                writers = [
                    other._replace(is_fenced=True) if other.at and other.attempt == w.attempt else other
                    for other in state.writers
                ]
                after = state._replace(writers=tuple(sorted(writers)), n_fences=state.n_fences + 1)
                yield f"{who(w)}'s slot is fenced", after
            elif w.is_fenced and w.at == "handed":
                yield f"{who(w)} saves again", state._replace(writers=with_one(state.writers, i, again(w)))

    def finds(self, there: Set, allowed: Set, chunk: str) -> bool:
        if "base-not-looked-up" in self.without:
            return any(bit & allowed and row.chunk == chunk for bit, row in self.usable(there))
        return any(row.chunk == chunk for _, row in self.usable(allowed))

    def decided(self, state: State, i: int) -> Move:
        w = state.writers[i]
        end = Writer("W5") if self.world.replaces and not w.is_fenced else Writer("end")
        if self.world.part and w.is_fenced:
            end = again(w)
        writers = with_one(state.writers, i, end)
        if w.is_fenced:
            return "a writer loses to the fence", state._replace(writers=writers)
        wanted = state.wanted | self.chunk_bit[self.world.goal]
        if self.world.part:
            wanted |= self.chunk_bit[self.world.part]
            writers = tuple(sorted(map(ended, state.writers)))
        return "a writer commits", state._replace(writers=writers, wanted=wanted)

    def gc_moves(self, state: State, i: int) -> Iterator[Move]:
        g, n, without = state.gcs[i], state.gcs[i].cycle, self.without

        def then(label: str, gc: Gc, **changes: object) -> Move:
            return f"a gc {label}", state._replace(gcs=with_one(state.gcs, i, gc), **changes)

        if g.at == "":
            for k, swept in enumerate(state.swept):
                if swept is None or swept & state.packs:
                    yield then(f"goes on with cycle {k}", Gc("G2", k, state.condemned[k]))
                    return
            if len(state.condemned) < self.n_cycles:
                yield then("finds no cycle unfinished", Gc("G0"))
        elif g.at in ("G0", "again"):
            yield from self.marks(state, i)
        elif g.at == "copy":
            if not g.packs & ~state.packs:
                at = Gc("again", packs=g.packs) if g.packs else Gc("")
                yield then("writes its copies", at, packs=state.packs | g.copies)
            else:
                yield then("misses what it copies", Gc(""))
        elif g.at == "G1":
            if n == len(state.condemned):
                records = {"condemned": (*state.condemned, g.packs), "swept": (*state.swept, None)}
                yield then(f"condemns in cycle {n}", g._replace(at="G2"), **records)
            else:
                theirs = g.packs if "own-candidates" in without else state.condemned[n]
                yield then(f"finds cycle {n} begun", Gc("G2", n, theirs))
        elif g.at == "G2":
            old = [j for j, w in enumerate(state.writers) if w.is_open and w.epoch <= n]
            if "no-drain" in without:
                old = []
            elif "drain-one-too-few" in without:
                old = [j for j in old if state.writers[j].epoch < n]
            elif "drain-one-a-slot" in without:
                there = sorted((w for w in state.writers if w.is_open), key=lambda w: w.epoch)
                newest = {w.attempt: w.epoch for w in there}
                old = [j for j in old if newest[state.writers[j].attempt] <= n]
            if not old:
                yield then("has drained", g._replace(at="G3"))
            elif self.world.part:
                return  # see slot_moves
            for j in old:
                is_fenced = "no-fence-on-file" not in without
                fenced = state.writers[j]._replace(is_fenced=is_fenced, is_open=False)
                yield then("fences a writer", g, writers=with_one(state.writers, j, fenced))
        elif g.at == "G3":
            yield from self.sweeps(state, i)
        elif g.at == "G4":
            left = g.packs & state.packs
            if not left:
                yield then("is done", Gc(""))
            for bit in bits(left):
                yield then(f"deletes {self.named(bit)}", g, packs=state.packs & ~bit)

    def marks(self, state: State, i: int) -> Iterator[Move]:
        """G1: look, and condemn; or write copies, look again, and condemn."""
        g = state.gcs[i]

        def then(label: str, gc: Gc) -> Move:
            return f"a gc {label}", state._replace(gcs=with_one(state.gcs, i, gc))

        n, wanted = len(state.condemned), self.visible(state)
        is_settled = not n or state.swept[-1] is not None
        if n >= self.n_cycles or not (is_settled or "begin-beside" in self.without):
            yield then("is overtaken", Gc(""))
            return
        off_limits = self.off_limits(state)
        there = state.packs if "relies-on-condemned" in self.without else state.packs & ~off_limits
        if not self.has(there, wanted) and not ("begin-beside" in self.without and not is_settled):
            return  # it says that something is wrong, and stops
        writing = 0
        for w in state.writers:
            writing |= w.mine if w.is_open else 0
        candidates = state.packs & ~off_limits & ~writing
        for chosen in self.in_use(there, g.packs, 0, wanted):
            used = 0
            for bit, _ in chosen:
                used |= bit
            if g.at == "again":
                dead = candidates & ~used
                yield then("marks again", Gc("G1", n, dead) if dead else Gc(""))
                continue
            if dead := candidates & ~used:
                yield then("marks " + self.named(dead), Gc("G1", n, dead))
            live: dict[Set, set[Row]] = {}
            for bit, row in chosen:
                live.setdefault(bit, set()).add(row)
            mixed = [
                bit for bit in live if bit & candidates and live[bit] < self.contents[bit.bit_length() - 1]
            ]
            if mixed:
                copies = self.new(frozenset(row for bit in mixed for row in live[bit]), state)
                yield then("repacks " + self.named(sum(mixed)), Gc("copy", packs=sum(mixed), copies=copies))
            unwanted = {row.chunk for _, row in chosen if not self.chunk_bit[row.chunk] & wanted}
            if rest := {row.chunk for _, row in chosen if row.base in unwanted} - unwanted:
                whole = self.new(frozenset(Row(chunk) for chunk in rest), state)
                yield then("stores whole " + " ".join(sorted(rest)), Gc("copy", copies=whole))

    def sweeps(self, state: State, i: int) -> Iterator[Move]:
        """G4: look again, and record what is to be deleted; or adopt what is recorded."""
        g, n = state.gcs[i], state.gcs[i].cycle

        def then(label: str, mine: Set, **changes: object) -> Move:
            return f"a gc {label}", state._replace(gcs=with_one(state.gcs, i, Gc("G4", n, mine)), **changes)

        swept = state.swept[n]
        if swept is not None and "own-list" not in self.without:
            yield then(f"finds cycle {n} swept", swept)
            return
        wanted = self.visible(state)
        there = state.packs
        if "relies-on-condemned" not in self.without:
            there &= ~(self.off_limits(state) & ~g.packs)
        if not self.has(there, wanted) and "sweep-unsure" not in self.without:
            kept = {g.packs}
        else:
            last = 0 if "relies-on-condemned" in self.without else g.packs
            kept = set()
            for chosen in self.in_use(there, 0, last, wanted):
                used = 0
                for bit, _ in chosen:
                    used |= bit
                kept.add(used & g.packs)
        for some in sorted(kept):
            mine = g.packs if "no-second-mark" in self.without else g.packs & ~some
            if swept is None:
                yield then(
                    f"sweeps {self.named(mine)} in cycle {n}",
                    mine,
                    swept=(*state.swept[:n], mine, *state.swept[n + 1 :]),
                )
            else:
                yield then(f"keeps its own list for cycle {n}", mine)

    def pin_moves(self, state: State) -> Iterator[Move]:
        pin = state.pin

        def then(label: str, **changes: object) -> Move:
            return label, state._replace(pin=pin._replace(**changes))

        is_visible = not pin.is_gone or pin.is_pinned
        if pin.pins == "" and is_visible:
            yield then("who pins sees the step", pins="seen")
        elif pin.pins == "seen":
            yield then("who pins creates the pin", pins="created", is_pinned=True)
        elif pin.pins == "created":
            if pin.is_gone and "pin-not-looked" not in self.without:
                yield then("who pins finds a tombstone", pins="told", is_pinned=False)
            else:
                yield then("who pins is done", pins="pinned")
        if pin.forgets == "" and is_visible and not pin.is_pinned:
            yield then("who forgets sees no pin", forgets="seen")
        elif pin.forgets == "seen":
            yield then("who forgets creates the tombstone", forgets="done", is_gone=True)

    def named(self, packs: Set) -> str:
        def one(bit: Set) -> str:
            rows = sorted(self.contents[bit.bit_length() - 1])
            return (
                "+".join(row.chunk + (f"({row.base})" if row.base else "") for row in rows)
                + f"#{bit.bit_length()}"
            )

        return "{" + ", ".join(one(bit) for bit in bits(packs)) + "}"

    # -- all orders

    def explore(self, n_writers: int, n_gcs: int) -> tuple[int, list[str] | None]:
        """Try every order, shortest first; return the number of states and the way to a bad one, or None."""
        wanted = sum(self.chunk_bit[chunk] for chunk in self.world.wanted)
        writers = tuple(Writer(is_rank=bool(self.world.part) and i > 0) for i in range(n_writers))
        start = State(0, (), (), wanted, writers, (Gc(),) * n_gcs, Pin())
        for content in self.world.start:
            start = start._replace(packs=start.packs | self.new(content, start))
        came_from: dict[State, tuple[str, State] | None] = {start: None}
        queue = deque([start])
        while queue:
            state = queue.popleft()
            for label, after in self.moves(state):
                if after not in came_from:
                    came_from[after] = (label, state)
                    if self.is_bad(after):
                        return len(came_from), way_to(after, came_from)
                    queue.append(after)
        return len(came_from), None


def explore(
    world: str, *, n_writers: int, n_gcs: int, n_cycles: int, without: str = "", is_undone: bool = False
) -> tuple[int, list[str] | None]:
    return Model(WORLDS[world], n_cycles, without, is_undone=is_undone).explore(n_writers, n_gcs)


def way_to(state: State, came_from: dict[State, tuple[str, State] | None]) -> list[str]:
    labels = []
    while (before := came_from[state]) is not None:
        label, state = before
        labels.append(label)
    return labels[::-1]


def main() -> None:
    options = argparse.ArgumentParser(description="Try every order of the steps of commit and gc.")
    options.add_argument("--world", choices=WORLDS, default="chain")
    options.add_argument("--writers", type=int, default=2)
    options.add_argument("--gcs", type=int, default=2)
    options.add_argument("--cycles", type=int, default=2)
    options.add_argument("--without", default="", help="rules to break, separated by a comma and a space")
    options.add_argument("--undone", action="store_true", help="power losses undo deletions")
    given = options.parse_args()
    start = time.perf_counter()
    n_states, bad = explore(
        given.world,
        n_writers=given.writers,
        n_gcs=given.gcs,
        n_cycles=given.cycles,
        without=given.without,
        is_undone=given.undone,
    )
    print(f"{n_states} states, {time.perf_counter() - start:.1f} s:", "none bad" if bad is None else "")
    for step in bad or []:
        print("   ", step)


if __name__ == "__main__":
    main()
