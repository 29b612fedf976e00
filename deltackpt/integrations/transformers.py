"""Hugging Face's Trainer: each ``checkpoint-N`` it writes goes into a store, and comes back for a resume.

Owns   when a checkpoint is taken over, which directories stay on disk, which steps the limits let go.
Never  changes what the Trainer writes, removes what is not durable, or leaves half a directory by its name.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltackpt import originals, targets
from deltackpt.efforts import Optimize, check_optimize
from deltackpt.errors import AlreadyExistsError, InvalidInputError, NotFoundError
from deltackpt.folders import FolderSaver, Found
from deltackpt.records import check_run
from deltackpt.report import SaveReport
from deltackpt.retention import Rule, last, these
from deltackpt.run import Run, open_run

log = logging.getLogger("deltackpt")

_CHECKPOINT = re.compile(r"checkpoint-(\d+)", re.ASCII)


class DeltaCallback(TrainerCallback):  # type: ignore[misc]
    """Saves each checkpoint of a Trainer as a step of a run, every file as it is.

    Parameters
    ----------
    store : path-like
        Made if it is not there.
    run : str
    keep : Rule, optional
        Which steps of the run stay once a new one is durable, as of `deltackpt.open_run`; by default those
        that ``save_total_limit`` leaves, and all if there is no limit.
    on_disk : int
        How many of the newest directories stay where the Trainer wrote them; the best one always does.
    optimize : {"time", "bytes", "energy"}
        As of `deltackpt.open_run`: training waits for the save.

    Attributes
    ----------
    report : SaveReport or None
        On the main process, what the last save cost.

    Raises
    ------
    AlreadyExistsError
        If training begins where the run has later steps already.
    ConflictError
        If a checkpoint changed while it was read.

    Examples
    --------
    >>> from transformers import Trainer, TrainingArguments
    >>> callback = DeltaCallback("checkpoints", run="sft")
    >>> args = TrainingArguments("out", save_steps=100)  # doctest: +SKIP
    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
    >>> trainer.train(resume_from_checkpoint=callback.restore(args))  # doctest: +SKIP
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        run: str = "main",
        *,
        keep: Rule | None = None,
        on_disk: int = 1,
        optimize: Optimize = "time",
    ) -> None:
        if not isinstance(keep, Rule | None):
            raise InvalidInputError(
                f"keep: found {keep!r}, expected a rule", hint="keep=last(3) | every(1000)"
            )
        if isinstance(on_disk, bool) or not isinstance(on_disk, int) or on_disk < 0:
            raise InvalidInputError(
                f"on_disk: found {on_disk!r}, expected a number of directories", hint="on_disk=1"
            )
        self.store = os.fspath(store)
        self.run = check_run(run)
        self.keep = keep
        self.on_disk = on_disk
        self.optimize = check_optimize(optimize)
        self.report: SaveReport | None = None
        self._saver: FolderSaver | None = None

    def restore(self, args: TrainingArguments, step: int | str = "latest") -> str | None:
        """Put a checkpoint into ``args.output_dir``; return its path for ``resume_from_checkpoint``.

        Parameters
        ----------
        args : TrainingArguments
        step : int, "latest" or "latest-good"

        Returns
        -------
        str or None
            None if the run has no steps yet: training begins anew.

        Raises
        ------
        NotFoundError
            If there is no such step.
        CorruptError
            If a byte of it is missing or changed; ``"latest-good"`` passes over such a step.
        """
        with args.main_process_first(local=False, desc="restoring a checkpoint"):
            run = self._existing()
            if run is None or (step == "latest" and run.latest() is None):
                return None
            with run:
                number = run.commit(step).slot.step
                path = Path(args.output_dir) / f"checkpoint-{number}"
                if args.process_index == 0:
                    _restore(run, number, path)
        return str(path)

    # -- what the Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to begin where the run has gone on already."""
        if not state.is_world_process_zero:
            return
        targets.remove_leftovers(Path(args.output_dir))
        self.report = None
        run = self._existing()
        newest = run.latest() if run is not None else None
        if newest is not None and newest > state.global_step:
            raise AlreadyExistsError(
                f"run {self.run!r} has step {newest}, and training begins at step {state.global_step}",
                hint="trainer.train(resume_from_checkpoint=callback.restore(args)), or give it another run;"
                " deltackpt fork NEW --step N begins one at an older step",
            )
        if newest is not None and newest == state.global_step:
            self._opened().run.commit(newest)  # no rule may let go what this job goes on from

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the directory that the Trainer has just written; then remove those that need not stay."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes files of its own
        if not state.is_world_process_zero:
            return
        step, best = state.global_step, _number(state.best_model_checkpoint)
        path = Path(args.output_dir) / f"checkpoint-{step}"
        found = Found(path, step)
        saver = self._opened()
        saver.run.keep = self.keep or _limit(args.save_total_limit, {*saver.run.steps(), step}, best)
        stale = _stale(saver.run, path.parent, step, best, self.on_disk)
        # Twice at one step, as at the end of an epoch, it is the same job's.
        again = self.report is not None and self.report.step == step
        self.report = saver.save(found, metrics=_metrics(state), overwrite=again)
        log.info("%s", self.report)
        # Only now that the step is durable; each goes by one rename, so that what has its name is whole.
        for old in stale if self.on_disk or step == best else [*stale, path]:
            targets.remove(old)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of what is remembered of the last step."""
        if self._saver is not None:
            self._saver.run.close()
            self._saver = None

    # -- below

    def _existing(self) -> Run | None:
        try:
            return open_run(self.store, self.run, create=False)
        except NotFoundError:
            return None

    def _opened(self) -> FolderSaver:
        if self._saver is None:
            self._saver = FolderSaver(open_run(self.store, self.run, optimize=self.optimize))
        return self._saver


def _restore(run: Run, step: int, path: Path) -> None:
    """Put a step where the Trainer wrote it, and the best one that it speaks of."""
    targets.make_directory(path.parent)
    if not path.exists() or not originals.is_as_saved(run, step, path, by_content=True):
        if path.exists():
            log.warning("%s: is not what was saved of step %d, and is replaced", path, step)
        originals.restore(run, step, path, overwrite=True)
    for number, other in _on_disk(path.parent).items():
        if number > step:
            log.warning(
                "%s: is not in the store, and may be half-written; training goes on from %s", other, path
            )
    best = _best_of(path)
    if best is not None and best not in _on_disk(path.parent) and best in run:
        originals.restore(run, best, path.with_name(f"checkpoint-{best}"))


def _best_of(path: Path) -> int | None:
    """Return the step that a checkpoint calls the best: without its directory the Trainer forgets it."""
    try:
        state = json.loads((path / "trainer_state.json").read_text())
        return _number(state["best_model_checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _number(checkpoint: str | None) -> int | None:
    found = _CHECKPOINT.fullmatch(Path(checkpoint).name) if checkpoint else None
    return int(found[1]) if found else None


def _on_disk(directory: Path) -> dict[int, Path]:
    """Return the checkpoints in a directory by their steps, in order."""
    found = {_number(path.name): path for path in directory.iterdir() if path.is_dir()}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


def _stale(run: Run, directory: Path, step: int, best: int | None, on_disk: int) -> list[Path]:
    """Return the directories that may go once a step is durable: those the store has as they are."""
    older = [(number, path) for number, path in _on_disk(directory).items() if number < step]
    n_stay = max(0, on_disk - 1)
    return [
        path
        for number, path in older[: len(older) - n_stay]
        if number != best and number in run and originals.is_as_saved(run, number, path)
    ]


def _limit(limit: int | None, steps: set[int], best: int | None) -> Rule | None:
    """Return the rule of ``save_total_limit``: the newest and the best stay, and of the others the newest.

    Examples
    --------
    >>> print(_limit(2, {1, 2, 3, 4}, 3), _limit(2, {1, 2, 3, 4}, 1), _limit(1, {1, 2}, None), sep="; ")
    last(2); last(1) | these([1]); last(1)
    """
    if limit is None or limit <= 0:
        return None
    if best is None or best not in steps or best in sorted(steps)[-limit:]:
        return last(limit)
    return last(max(1, limit - 1)) | these([best])


def _metrics(state: TrainerState) -> dict[str, float]:
    """Return what was logged of this step: its loss, and how it was evaluated."""
    logged: dict[str, float] = {}
    for entry in state.log_history:
        if entry.get("step") == state.global_step:
            logged |= {
                name: value
                for name, value in entry.items()
                if isinstance(value, int | float) and name != "step" and math.isfinite(value)
            }
    return logged
