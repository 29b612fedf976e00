"""Retention: which steps of a run stay, and why.

Owns   the rules and their union, as pure functions.
Never  forgets a step: whoever asks does, with the answer in hand.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from deltackpt.errors import InvalidInputError, NotFoundError

# The name is greedy: it may hold colons itself.
_BEST = re.compile(r"(.+):([1-9][0-9]{0,8})(?::(min|max))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Best:
    """Keep the steps with the best values of a metric.

    Parameters
    ----------
    metric : str
    n : int
        How many; at least 1.
    highest : bool
        Whether high values are the good ones.

    Examples
    --------
    >>> Best.parse("loss:3")
    Best(metric='loss', n=3, highest=False)
    >>> str(Best.parse("accuracy:1:max"))
    'highest accuracy, 1 of them'
    """

    metric: str
    n: int
    highest: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``METRIC:N``, ``METRIC:N:min`` or ``METRIC:N:max``.

        Raises
        ------
        InvalidInputError
            If it is none of these.
        """
        found = _BEST.fullmatch(text)
        if not found:
            raise InvalidInputError(
                f"found {text!r}, expected METRIC:N or METRIC:N:max", hint="write for example loss:3"
            )
        return cls(found[1], int(found[2]), found[3] == "max")

    def __str__(self) -> str:
        return f"{'highest' if self.highest else 'lowest'} {self.metric}, {self.n} of them"

    def choose(self, steps: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Return the steps this rule keeps; of equal values the newest.

        Raises
        ------
        NotFoundError
            If no step has the metric: a misspelt name must not keep nothing.
        """
        values = {step: metrics[self.metric] for step, metrics in steps.items() if self.metric in metrics}
        if not values:
            raise _unknown_metric(self.metric, {name for metrics in steps.values() for name in metrics})
        sign = -1 if self.highest else 1
        # A NaN compares with nothing, so it is worse than everything.
        cost = {step: math.inf if math.isnan(value) else sign * value for step, value in values.items()}
        return sorted(values, key=lambda step: (cost[step], -step))[: self.n]


def _unknown_metric(name: str, known: Iterable[str]) -> NotFoundError:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 3, 0.3) or names[:3]
    there = f"there are {', '.join(map(repr, near))}" if near else "no step has metrics"
    return NotFoundError(f"metric {name!r} is in no step; {there}", hint="name one that the steps have")


def decide(
    steps: Mapping[int, Mapping[str, float]],
    *,
    last: int | None = None,
    every: int | None = None,
    best: Sequence[Best] = (),
) -> dict[int, str]:
    """Choose the steps that stay: those that any rule keeps, and always the latest.

    Parameters
    ----------
    steps : mapping of int to (mapping of str to float)
        The metrics of each step there is.
    last : int, optional
        Keep this many of the highest steps; at least 1.
    every : int, optional
        Keep the steps that are multiples of this; at least 1.
    best : sequence of Best
        Keep the best by each of these.

    Returns
    -------
    dict of int to str
        The steps that stay, in order, each with why; all others may go.

    Raises
    ------
    InvalidInputError
        If a count is less than 1.
    NotFoundError
        If no step has a rule's metric.

    Examples
    --------
    >>> decide({10: {"loss": 0.1}, 20: {"loss": 0.5}, 30: {}}, best=[Best("loss", 1)])
    {10: 'lowest loss, 1 of them', 30: 'latest'}
    """
    for name, count in [("last", last), ("every", every), *((f"best {b.metric}", b.n) for b in best)]:
        if count is not None and count < 1:
            raise InvalidInputError(f"{name}: found {count}, expected at least 1", hint="leave the rule out")
    order = sorted(steps)
    kept: list[tuple[str, Sequence[int]]] = [("latest", order[-1:])]
    if last is not None:
        kept.append((f"last {last}", order[-last:]))
    if every is not None:
        kept.append((f"multiple of {every}", [step for step in order if step % every == 0]))
    kept += [(str(rule), rule.choose(steps)) for rule in best]
    reasons: dict[int, list[str]] = {}
    for why, chosen in kept:
        for step in chosen:
            reasons.setdefault(step, []).append(why)
    return {step: "; ".join(reasons[step]) for step in order if step in reasons}


def all_but(steps: Iterable[int], named: Iterable[int]) -> dict[int, str]:
    """Return the steps that stay when those named go, as `decide` does.

    Examples
    --------
    >>> all_but([1, 2, 3], [2])
    {1: 'not named', 3: 'not named'}
    """
    going = set(named)
    return {step: "not named" for step in sorted(steps) if step not in going}
