"""Scalars: the reports of a run's saves on a dashboard.

Owns   the names and units of the scalars, and how two libraries want to be given them.
Never  imports either: their own objects are handed in.  For ``open_run(on_save=...)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deltackpt.report import SaveReport

PREFIX = "deltackpt/"


def of(report: SaveReport) -> dict[str, float]:
    """Return a report's scalars, by name.

    Examples
    --------
    >>> found = of(SaveReport("main", 7, 2_000_000, 10_000, 9_000, 3, 9, 1, {"write": 0.003}, 0.004))
    >>> found["deltackpt/ratio"], found["deltackpt/seconds/write"]
    (0.0045, 0.003)
    """
    scalars = {
        "logical_size": report.logical_size,
        "new_size": report.new_size,
        "written_size": report.written_size,
        "ratio": report.ratio,
        "total_s": report.total_s,
        "joules": report.energy.joules,
        **{f"seconds/{phase}": seconds for phase, seconds in report.seconds.items()},
        **{f"stored_size/{group}": size for group, size in _stored_sizes(report).items()},
    }
    return {PREFIX + name: float(value) for name, value in scalars.items()}


def _stored_sizes(report: SaveReport) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for cost in report.groups:
        sizes[cost.group] = sizes.get(cost.group, 0) + cost.stored_size
    return sizes


def tensorboard(writer: Any) -> Callable[[SaveReport], None]:
    """Return what logs each save to a ``SummaryWriter``, at its step.

    Parameters
    ----------
    writer : torch.utils.tensorboard.SummaryWriter
        Or what has its ``add_scalar(name, value, step)``.

    Examples
    --------
    >>> import numpy as np
    >>> from deltackpt import open_run
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> class Writer:
    ...     def add_scalar(self, name, value, step):
    ...         if name == "deltackpt/logical_size":
    ...             print(name, value, step)
    >>> run = open_run(MemoryBackend(), on_save=tensorboard(Writer()))
    >>> _ = run.save({"w": np.zeros(3)}, step=10)
    deltackpt/logical_size 24.0 10
    """

    def log(report: SaveReport) -> None:
        for name, value in of(report).items():
            writer.add_scalar(name, value, report.step)

    return log


def wandb(run: Any) -> Callable[[SaveReport], None]:
    """Return what logs each save to a W&B run, with its step as ``deltackpt/step``.

    W&B's own step may only grow, and the training loop counts it on: a save must not set it.

    Parameters
    ----------
    run : wandb.Run
        As ``wandb.init()`` returns it, or what has its ``define_metric`` and ``log``.
    """
    run.define_metric(PREFIX + "step")
    run.define_metric(PREFIX + "*", step_metric=PREFIX + "step")

    def log(report: SaveReport) -> None:
        run.log({**of(report), PREFIX + "step": report.step})

    return log
