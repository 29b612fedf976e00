"""Retention: which steps of a run stay, and why.

Owns   the rules, their union, and what they decide for the steps there are, as pure functions.
Never  forgets a step: whoever asks does, with the answer in hand.

A rule is a value: ``last(3) | every(1000) | best("loss", 2)`` keeps what any of the three keeps.
"""

from __future__ import annotations

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

from deltackpt.errors import InvalidInputError, NotFoundError
from deltackpt.records import check_step

# The name is greedy: it may hold colons itself.
_BEST = re.compile(r"(.+):([1-9][0-9]{0,8})(?::(min|max))?", re.DOTALL)


class Facts(Protocol):
    """What a rule looks at of a step; a `records.Commit` has both."""

    @property
    def created_s(self) -> float:
        """Seconds since 1970 by the writer's clock."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """The user's figures."""


class Rule(ABC):
    """What to keep; rules are joined by ``|``.

    Examples
    --------
    >>> print(last(3) | every(1000) | best("loss", 2))
    last(3) | every(1000) | best('loss', 2)
    """

    __slots__ = ()

    @abstractmethod
    def reasons(self, steps: Mapping[int, Facts]) -> dict[int, list[str]]:
        """Return the steps this rule keeps, each with why."""

    def chosen(self, steps: Mapping[int, Facts]) -> set[int]:
        """Return the steps this rule keeps in place of others: were one of them gone, another might stay."""
        return set(self.reasons(steps))

    def __or__(self, other: Rule) -> Rule:
        rules = tuple(dict.fromkeys((*_parts(self), *_parts(other))))
        return Union(rules) if len(rules) > 1 else rules[0]

    def check(self, steps: Mapping[int, Facts]) -> None:
        """Refuse a rule that a misspelt name makes keep nothing.

        Raises
        ------
        NotFoundError
            If no step has a metric that the rule goes by; names the nearest.
        """
        names = sorted({name for facts in steps.values() for name in facts.metrics})
        for rule in _parts(self):
            if isinstance(rule, best) and rule.metric not in names:
                near = difflib.get_close_matches(rule.metric, names, 3, 0.3) or names[:3]
                there = f"there are {', '.join(map(repr, near))}" if near else "no step has metrics"
                raise NotFoundError(
                    f"metric {rule.metric!r} is in no step; {there}", hint="name one that the steps have"
                )

    def stays(
        self, steps: Mapping[int, Facts], *, resumed: int | None = None, saved: int | None = None
    ) -> set[int]:
        """Return the steps that stay, as `decide` does, but without why: a third of the time.

        Examples
        --------
        >>> from types import SimpleNamespace
        >>> steps = {s: SimpleNamespace(created_s=0.0, metrics={}) for s in (10, 20, 30)}
        >>> sorted(last(1).stays(steps, resumed=10))
        [10, 30]
        """
        named = {step for step in (max(steps, default=None), resumed, saved) if step is not None}
        return (self.reasons(steps).keys() | named) & steps.keys()

    def decide(
        self,
        steps: Mapping[int, Facts],
        *,
        pinned: Collection[int] = (),
        resumed: int | None = None,
        saved: int | None = None,
    ) -> dict[int, str]:
        """Choose the steps that stay: what the rule keeps, the latest, and those named here.

        Parameters
        ----------
        steps : mapping of int to Facts
            The steps there are.
        pinned : collection of int
            Those that the user pinned.
        resumed, saved : int, optional
            The step that a job went on from, and the one it saved just now.

        Returns
        -------
        dict of int to str
            The steps that stay, in order, each with every reason; all others may go.

        Examples
        --------
        >>> from types import SimpleNamespace
        >>> losses = {10: 0.1, 20: 0.5, 30: 0.4, 40: 0.3}
        >>> steps = {s: SimpleNamespace(created_s=0.0, metrics={"loss": x}) for s, x in losses.items()}
        >>> (best("loss", 2) | last(1)).decide(steps, pinned=[20])
        {10: 'lowest loss, 1 of 2', 20: 'pinned', 40: 'latest; lowest loss, 2 of 2; last 1'}
        """
        why: dict[int, list[str]] = {step: [] for step in sorted(steps)}
        if why:
            why[max(why)].append("latest")
        for step in pinned:
            why.get(step, []).append("pinned")
        for name, one in (("saved just now", saved), ("resumed from", resumed)):
            if one in why:
                why[one].append(name)
        for step, reasons in self.reasons(steps).items():
            why.get(step, []).extend(reasons)
        return {step: "; ".join(dict.fromkeys(reasons)) for step, reasons in why.items() if reasons}


def _parts(rule: Rule) -> tuple[Rule, ...]:
    if not isinstance(rule, Rule):
        raise InvalidInputError(
            f"keep: found {rule!r}, expected a rule of deltackpt", hint="keep=last(3) | every(1000)"
        )
    return rule.rules if isinstance(rule, Union) else (rule,)


@dataclass(frozen=True, slots=True)
class Union(Rule):
    """Keep what any of these rules keeps; made by ``|``."""

    rules: tuple[Rule, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.rules))

    def reasons(self, steps: Mapping[int, Facts]) -> dict[int, list[str]]:
        """Return the steps that any rule keeps, with the reasons of each."""
        all_reasons: dict[int, list[str]] = {}
        for rule in self.rules:
            for step, reasons in rule.reasons(steps).items():
                all_reasons.setdefault(step, []).extend(reasons)
        return all_reasons

    def chosen(self, steps: Mapping[int, Facts]) -> set[int]:
        """See `Rule.chosen`."""
        return set().union(*(rule.chosen(steps) for rule in self.rules))


@dataclass(frozen=True, slots=True)
class last(Rule):
    """Keep the `n` highest steps.

    Raises
    ------
    InvalidInputError
        If `n` is less than 1.
    """

    n: int

    def __post_init__(self) -> None:
        _check_count("last", self.n)

    def __str__(self) -> str:
        return f"last({self.n})"

    def reasons(self, steps: Mapping[int, Facts]) -> dict[int, list[str]]:
        """See `Rule.reasons`."""
        why = [f"last {self.n}"]
        return dict.fromkeys(sorted(steps)[-self.n :], why)


@dataclass(frozen=True, slots=True)
class every(Rule):
    """Keep the steps that are multiples of `n`.

    Raises
    ------
    InvalidInputError
        If `n` is less than 1.
    """

    n: int

    def __post_init__(self) -> None:
        _check_count("every", self.n)

    def __str__(self) -> str:
        return f"every({self.n})"

    def reasons(self, steps: Mapping[int, Facts]) -> dict[int, list[str]]:
        """See `Rule.reasons`."""
        why = [f"multiple of {self.n}"]
        return {step: why for step in steps if step % self.n == 0}

    def chosen(self, steps: Mapping[int, Facts]) -> set[int]:
        """Return none: whether a step stays does not depend on others."""
        return set()


@dataclass(frozen=True, slots=True)
class best(Rule):
    """Keep the `n` steps with the best values of a metric; of equal values the newest.

    A step without the metric is not kept by this rule, and a NaN is worse than every number.  While no step
    has the metric the rule lets none go: it may be misspelt.

    Parameters
    ----------
    metric : str
    n : int
        How many; at least 1.
    highest : bool
        Whether high values are the good ones.

    Raises
    ------
    InvalidInputError
        If `metric` is no name or `n` is less than 1.

    Examples
    --------
    >>> best.parse("accuracy:1:max")
    best(metric='accuracy', n=1, highest=True)
    """

    metric: str
    n: int
    highest: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str):
            raise InvalidInputError(
                f"best: metric: found {self.metric!r}, expected a name", hint="best('loss', 2)"
            )
        _check_count("best", self.n)

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
        return f"best({self.metric!r}, {self.n}{', highest=True' if self.highest else ''})"

    def reasons(self, steps: Mapping[int, Facts]) -> dict[int, list[str]]:
        """See `Rule.reasons`."""
        values = {s: facts.metrics[self.metric] for s, facts in steps.items() if self.metric in facts.metrics}
        if not values:
            return {step: [f"no step has {self.metric}"] for step in steps}
        sign = -1 if self.highest else 1
        # A NaN compares with nothing.
        cost = {step: math.inf if math.isnan(value) else sign * value for step, value in values.items()}
        order = sorted(values, key=lambda step: (cost[step], -step))[: self.n]
        which = "highest" if self.highest else "lowest"
        return {s: [f"{which} {self.metric}, {rank} of {self.n}"] for rank, s in enumerate(order, 1)}


@dataclass(frozen=True, slots=True)
class every_seconds(Rule):
    """Keep the first step, and each that was saved `s` seconds or more from the one kept before it.

    By the writer's clock, either way: a clock may jump back.  Applied again after the others are forgotten
    it keeps the same steps.

    Raises
    ------
    InvalidInputError
        If `s` is no positive number.
    """

    s: float

    def __post_init__(self) -> None:
        s = self.s
        if not isinstance(s, (int, float)) or isinstance(s, bool) or not 0 < s < math.inf:
            raise InvalidInputError(
                f"every_seconds: found {s!r}, expected a number above 0", hint="every_seconds(3600)"
            )

    def __str__(self) -> str:
        return f"every_seconds({self.s!r})"

    def reasons(self, steps: Mapping[int, Facts]) -> dict[int, list[str]]:
        """See `Rule.reasons`."""
        kept: list[int] = []
        for step in sorted(steps):
            if not kept or abs(steps[step].created_s - steps[kept[-1]].created_s) >= self.s:
                kept.append(step)
        return {step: [f"{self.s:g} s apart"] for step in kept}


@dataclass(frozen=True, slots=True)
class these(Rule):
    """Keep the steps named, those of them that are there.

    Examples
    --------
    >>> print(these([20, 10]))
    these([10, 20])
    """

    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        if not isinstance(steps, Iterable):
            raise InvalidInputError(
                f"these: found {steps!r}, expected steps", hint="write for example these([1000, 2000])"
            )
        object.__setattr__(self, "steps", frozenset(check_step(step) for step in steps))

    def __str__(self) -> str:
        return f"these({sorted(self.steps)})"

    def reasons(self, steps: Mapping[int, Facts]) -> dict[int, list[str]]:
        """See `Rule.reasons`."""
        return {step: ["named"] for step in steps if step in self.steps}


def _check_count(rule: str, n: Any) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise InvalidInputError(f"{rule}: found {n!r}, expected at least 1", hint="leave the rule out")


class Fate(NamedTuple):
    """What becomes of a step, and why."""

    step: int
    stays: bool
    why: str


@dataclass(frozen=True, slots=True)
class Retention:
    """What becomes of a run's steps.

    Parameters
    ----------
    run : str
    rows : list of Fate
        Every step, in order.

    Examples
    --------
    >>> print(Retention.of("main", [1000, 2000], {2000: "latest; last 1"}))
    step         why
    1000  goes   no rule keeps it
    2000  stays  latest; last 1
    """

    run: str
    rows: list[Fate]

    @classmethod
    def of(
        cls, run: str, steps: Iterable[int], why: Mapping[int, str], why_not: str = "no rule keeps it"
    ) -> Self:
        """Return the fate of `steps` when those in `why` stay, as `Rule.decide` gives them."""
        return cls(run, [Fate(step, step in why, why.get(step, why_not)) for step in sorted(steps)])

    @property
    def stays(self) -> list[int]:
        """The steps that stay."""
        return [row.step for row in self.rows if row.stays]

    @property
    def goes(self) -> list[int]:
        """The steps that go."""
        return [row.step for row in self.rows if not row.stays]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"run": self.run, "steps": [row._asdict() for row in self.rows]}

    def __str__(self) -> str:
        cells = [("step", "", "why")]
        cells += [(str(row.step), "stays" if row.stays else "goes", row.why) for row in self.rows]
        width = max(len(step) for step, _, _ in cells)
        return "\n".join(f"{step:>{width}}  {fate:<5}  {why}" for step, fate, why in cells)
