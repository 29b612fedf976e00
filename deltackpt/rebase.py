"""Rebase: which deltas to store whole, so that bases kept only for their deltas can go.

Owns   the choice, a pure function of the records in use.
Never  reads or rewrites one: that is gc's.

A step that is forgotten leaves its chunks behind where later steps' deltas need them.  Of a chain of eight
of which only the end is wanted, seven records are there only to be undone: the end stored whole takes less.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple


class Link(NamedTuple):
    """A record in use, as far as the choice goes.

    Parameters
    ----------
    id : bytes
    base : bytes or None
        None if it is stored whole.
    depth : int
    is_wanted : bool
        Whether a step has the chunk; else it is there only for its deltas.
    size : int
        Bytes it takes in its pack.
    whole_size : int
        Bytes it would take there if it were stored whole, about.
    """

    id: bytes
    base: bytes | None
    depth: int
    is_wanted: bool
    size: int
    whole_size: int


@dataclass(frozen=True, slots=True)
class Rebase:
    """What to store whole, and what that is worth.

    Parameters
    ----------
    whole : list of bytes
        Ids of the chunks.
    added_size : int
        Bytes more that they take then, about.
    freed_size : int
        Bytes of the bases that nothing needs any more.
    """

    whole: list[bytes] = field(default_factory=list)
    added_size: int = 0
    freed_size: int = 0


def plan(links: Sequence[Link]) -> Rebase:
    """Choose the deltas to store whole, where that adds less than it frees.  Reads nothing, changes nothing.

    Bases that no step wants form trees, with deltas that are wanted as leaves.  A base can go if all that is
    above it goes or is stored whole; from the leaves down, the cheaper of the two is known of each, whatever
    is decided below it.

    Parameters
    ----------
    links : sequence of Link
        At least all that is not wanted, and all deltas taken against that; the rest changes nothing.

    Examples
    --------
    >>> chain = [Link(b"0", None, 0, False, 90, 90), Link(b"1", b"0", 1, False, 50, 90)]
    >>> plan([*chain, Link(b"2", b"1", 2, True, 60, 90)])
    Rebase(whole=[b'2'], added_size=30, freed_size=140)
    >>> plan([*chain, Link(b"2", b"1", 2, True, 10, 190)])
    Rebase(whole=[], added_size=0, freed_size=0)
    """
    # Of one chunk that of least depth, as what needs it does: then a base comes before its deltas below.
    by_depth = sorted(links, key=attrgetter("depth"))
    least = {link.id: link for link in reversed(by_depth)}
    above: defaultdict[bytes, list[Link]] = defaultdict(list)
    for link in least.values():
        if link.base is not None:
            above[link.base].append(link)
    unwanted = [link for link in by_depth if not link.is_wanted and least[link.id] is link]
    keep: dict[bytes, int] = {}
    drop: dict[bytes, int] = {}
    for link in reversed(unwanted):
        keep[link.id], drop[link.id] = link.size, 0
        for up in above[link.id]:
            if up.is_wanted:
                drop[link.id] += up.whole_size - up.size
            else:
                keep[link.id] += min(keep[up.id], drop[up.id])
                drop[link.id] += drop[up.id]

    goes: set[bytes] = set()
    whole: list[Link] = []
    for link in unwanted:
        if link.base in goes or drop[link.id] < keep[link.id]:
            goes.add(link.id)
            whole += [up for up in above[link.id] if up.is_wanted]
    return Rebase(
        sorted(up.id for up in whole),
        sum(up.whole_size - up.size for up in whole),
        sum(link.size for link in unwanted if link.id in goes),
    )
