"""Payoff: whether the deltas of a run save anything, group by group, and why not, in words.

Owns   the judgement, a pure function of what the saves say they paid.
Never  reads anything, or adds up what the steps take (stats.py does).

What deltas save is told against what the same bytes would take whole, at the rate at which chunks of their
group were stored whole: in a first step all are, later those whose delta would have been no smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

from deltackpt.groups import TITLES, Coded, GroupCost, added

#: Saves less than this of what is stored whole: worth a word on why.
_PAYS_FROM = 0.05
#: Of the bytes handed in after the first steps; less is not worth a line.
_MATTERS_FROM = 0.05
#: A group with fewer of its changed bytes compared with a base is short of bases.
_BASED_FROM = 0.5
#: Changed, so that one can speak of all.
_ALL_FROM = 0.995


def words(runs: Sequence[Sequence[Sequence[GroupCost]]]) -> list[str]:
    """Say of each group and dtype that matters what its deltas save, a sentence each; why, if it is little.

    Parameters
    ----------
    runs : for each run, for each of its saves in order, the costs of the groups
        A run's first save has nothing to take deltas of: it only tells what storing whole takes.

    Examples
    --------
    >>> first = [GroupCost("weights", "float32", 100, 1, 0, {"planes": Coded(1, 100, 80)})]
    >>> later = [GroupCost("weights", "float32", 100, 1, 100, {"delta-dense": Coded(1, 100, 40)})]
    >>> words([[first, later]])
    ['weights (float32): all of it changes; deltas save 50 %: they store 0.40 of the bytes, whole takes 0.80']
    """
    every = {_key(cost): cost for cost in added([cost for run in runs for save in run for cost in save])}
    later = added([cost for run in runs for save in run[1:] for cost in save])
    total_size = sum(cost.logical_size for cost in later)
    return [
        f"{TITLES.get(cost.group, cost.group)} ({cost.dtype}): {_verdict(cost, _whole(every[_key(cost)]))}"
        for cost in later
        if cost.logical_size and cost.logical_size >= _MATTERS_FROM * total_size
    ]


def _key(cost: GroupCost) -> tuple[str, str]:
    return cost.group, cost.dtype


def _whole(cost: GroupCost) -> Coded:
    return sum((c for name, c in cost.codecs.items() if not name.startswith("delta")), Coded())


def _verdict(cost: GroupCost, whole: Coded) -> str:
    changed = cost.changed_size
    if not changed:
        return "nothing changes"
    share = changed / cost.logical_size
    unchanged = f"nothing changes in {100 * (1 - share):.0f} % of the bytes"
    told = "all of it changes" if share >= _ALL_FROM else unchanged
    rate = cost.stored_size / changed
    if cost.based_size < _BASED_FROM * changed:
        lacking = 1 - cost.based_size / changed
        return (
            f"{told}; {100 * lacking:.0f} % of what changes has nothing to be compared with: "
            "tensors that are new, or change name, shape or dtype, are stored whole"
        )
    if not whole.size:
        return f"{told}; deltas store {rate:.2f} of the bytes"
    whole_rate = whole.stored_size / whole.size
    saved = 1 - rate / whole_rate if whole_rate else 0.0
    if saved >= _PAYS_FROM:
        return (
            f"{told}; deltas save {100 * saved:.0f} %: they store {rate:.2f} of the bytes, "
            f"whole takes {whole_rate:.2f}"
        )
    little = f"{100 * saved:.0f} %" if saved >= 0.005 else "nothing"
    advice = "save more often, or not the moments" if cost.group == "moments" else "save more often"
    return f"{told}; deltas save {little} of what is stored whole: new noise in each step; {advice}"
