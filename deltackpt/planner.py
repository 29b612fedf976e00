"""The planner: whether a chunk is there already, is stored as a delta, or whole; and against which base.

Owns   the decision, a pure function that says why, and the bounds of a chain.
Never  reads or encodes anything: what is not known of a chunk is not asked.

Restoring a chunk reads and undoes its whole chain: `COST_MAX` bounds what that takes.
A chunk whose predecessor's chain is full is compared with the root of that chain instead: farther away, but
a delta still, and of depth one.  docs/design/0014-bases.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from deltackpt.chains import Copy
from deltackpt.session import Parent
from deltackpt.types import U8

#: A chunk is no base once restoring it costs more than reading this many times its bytes.
COST_MAX = 3.2
#: What undoing a delta costs beside its bytes, in the same unit: 75 us of a chunk that takes 500 whole.
_COST_OF_DELTA = 0.15


class Candidate(NamedTuple):
    """A chunk that another may be stored as a delta of.

    Parameters
    ----------
    why : str
        Its relation: the previous chunk in that place, the root of its chain, a cast, a neighbour.
    id : bytes
    copy : Copy or None
        What a save may rely on; None if there is none.
    offset, cast : int
        As of `codecs.Base`.
    data : ndarray of uint8, optional
        Its bytes, where they are in memory.
    fingerprint : bytes, optional
        Their xxh3_128, where they are part of the state that is saved, which somebody may change.
    """

    why: str
    id: bytes
    copy: Copy | None = None
    offset: int = 0
    cast: int = 0
    data: U8 | None = None
    fingerprint: bytes | None = None


class Plan(NamedTuple):
    """What becomes of a chunk, and why.

    Examples
    --------
    >>> print(Plan("whole", None, "no base"))
    whole: no base
    """

    action: Literal["same", "delta", "whole"]
    base: Candidate | None
    why: str

    @property
    def parent(self) -> Parent | None:
        """What the session is told of the base."""
        base = self.base
        if base is None or base.copy is None:
            return None
        size = base.copy.raw_size if base.data is None else base.data.size
        copy = base.copy
        return Parent(
            base.id, copy.depth, base.data, size, base.offset, base.cast, copy.packs, base.fingerprint
        )

    def __str__(self) -> str:
        return f"{self.action}: {self.why}"


def plan(there: bool, candidates: Iterable[Candidate], depth_max: int) -> Plan:
    """Decide on one chunk.  Reads nothing, changes nothing.

    Parameters
    ----------
    there : bool
        Whether the store has the chunk.
    candidates : iterable of Candidate
        In the order they are preferred.
    depth_max : int
        No chain of the store is deeper.  The last level is left to casts: a bf16 copy is derived from its
        fp32 master, however deep that is.

    Examples
    --------
    >>> copy = Copy(frozenset(), depth=1, chain_size=140, raw_size=100, stored_size=60, root=b"r")
    >>> print(plan(False, [Candidate("previous", b"p", copy)], 8))
    delta: previous
    >>> print(plan(False, [Candidate("previous", b"p", copy._replace(chain_size=315))], 8))
    whole: previous has a chain that costs 3.3 times its bytes
    """
    if there:
        return Plan("same", None, "the store has it")
    why = []
    for candidate in candidates:
        against = refused(candidate, depth_max)
        if not against:
            return Plan("delta", candidate, candidate.why)
        why.append(f"{candidate.why} {against}")
    return Plan("whole", None, "; ".join(why) or "no base")


def refused(candidate: Candidate, depth_max: int) -> str:
    """Return why a chunk cannot be a base, "" if it can."""
    copy = candidate.copy
    if copy is None:
        return "has no copy to rely on"
    if copy.depth >= depth_max - (not candidate.cast):
        return f"is {copy.depth} deltas deep"
    cost = copy.chain_size / copy.raw_size + _COST_OF_DELTA * copy.depth
    return f"has a chain that costs {cost:.1f} times its bytes" if cost > COST_MAX else ""
