"""A keeper: which of a run's steps stay once another is saved, and forgetting the rest.

Owns   the step that a job went on from, and the steps that its rule chooses among.
Never  decides what a rule keeps, or makes a save fail: its step is durable.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from deltackpt.errors import DeltackptError
from deltackpt.records import Commit
from deltackpt.refs import Refs
from deltackpt.report import SaveReport
from deltackpt.retention import Retention, Rule

log = logging.getLogger("deltackpt")


class Keeper:
    """Keeps the steps of one run, as its rule says.

    Parameters
    ----------
    refs : Refs
    run : str
    keep : Rule, optional
        By default all steps stay.

    Attributes
    ----------
    keep : Rule or None
    resumed : int or None
        The step that this job went on from, which no rule lets go.
    """

    def __init__(self, refs: Refs, run: str, keep: Rule | None = None) -> None:
        self._refs = refs
        self._run = run
        self.keep = keep
        self._steps: dict[int, Commit] | None = None  # what a rule chooses among, once it was listed
        self.resumed: int | None = None

    def retention(self, keep: Rule | None = None) -> Retention:
        """Return which steps stay and which would go now, each with why, by its own rule or another."""
        keep = keep or self.keep
        listing = self._refs.listing(self._run)
        steps = {commit.slot.step: commit for commit in self._refs.commits_of(listing)}
        if keep is None:
            why = dict.fromkeys(steps, "there are no rules")
        else:
            why = keep.decide(steps, pinned=listing.pinned, resumed=self.resumed)
        return Retention.of(self._run, steps, why)

    def retaining(self, save: Callable[[], tuple[SaveReport, int | None]]) -> SaveReport:
        """Have another save a step; forget what the rule does not keep, now that it is durable.

        Returns the report of both.

        Parameters
        ----------
        save : callable
            Returns the report, and the latest step there was when it first looked.
        """
        try:
            report, found_step = save()
            if self.resumed is None:
                self.resumed = found_step
            return self._retained(report)
        except BaseException:
            self._steps = None  # the step may be there all the same
            raise

    def _retained(self, report: SaveReport) -> SaveReport:
        if self.keep is None:
            self._steps = None  # a rule may be set later
            return report
        before = time.perf_counter()
        goes: list[int] = []
        try:
            goes = self._let_go(self.keep, report.step)
        except DeltackptError as e:
            log.warning(
                "run %r step %d is saved, but not all that may go is forgotten: %s",
                self._run,
                report.step,
                e.message,
            )
        seconds = {**report.seconds, "retain": time.perf_counter() - before}
        return replace(report, seconds=seconds, forgotten=goes)

    def _let_go(self, keep: Rule, saved: int) -> list[int]:
        """Forget what a rule does not keep, and return it.

        The run is listed once: a listing has all steps that ever were, 3 us each, so no save may need one.
        What others pinned, forgot or overwrote since is asked for by name, if a step is to go, and only of
        steps that this depends on; what they saved since stays.
        """
        refs = self._refs
        if self._steps is None:
            self._steps = refs.steps(self._run)
        steps = self._steps
        _, commit = refs.slot(self._run, saved)
        if commit is not None:
            steps[saved] = commit
        stays = keep.stays(steps, resumed=self.resumed, saved=saved)
        asked = (steps.keys() - stays) | keep.chosen(steps) | {max(steps, default=saved)}
        if len(stays) < len(steps) and any(refs.is_gone(steps[step].slot) for step in asked):
            steps = self._steps = refs.steps(self._run)  # a rule may choose others in their place
            stays = keep.stays(steps, resumed=self.resumed, saved=saved)
        goes = [step for step in sorted(steps.keys() - stays) if not refs.is_pinned(self._run, step)]
        refs.forget(steps[step].slot for step in goes)
        for step in goes:
            del steps[step]
        return goes
