"""The hunt for a mutant: its scenarios, until one shows a violation."""

from __future__ import annotations

from itertools import product

import losses
import orders
import pytest
from losses import Effort, ViolationError
from mutants import BROKEN

#: What is tried, the cheapest first: loads, then successors, then what comes next.
EFFORTS = [Effort(4, 0, 0), Effort(4, 0, 1.0), Effort(4, 0.5, 0)]


def hunt(name: str, seed: int) -> str | None:
    """Where a mutant was found out, and by what; None if it was not."""
    for where, effort in product(BROKEN[name].found_by, EFFORTS):
        try:
            with pytest.MonkeyPatch.context() as patch:
                BROKEN[name].breaks(patch)
                if where in orders.ORDERS:
                    orders.explore(where, 1.0, seed)
                else:
                    losses.explore(where, effort, seed)
        except ViolationError as violation:
            return f"{where}: {violation}"
    return None
