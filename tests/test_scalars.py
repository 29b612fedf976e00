"""What is told of each save, to whom: a function, and two dashboards by stand-ins with their names."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path

import numpy as np
import pytest

from deltackpt import open_run, scalars
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import InvalidInputError, StorageError

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "watch.md"


def state(step: int) -> dict[str, np.ndarray]:
    return {"w": np.full(1000, step, np.float32), "optimizer": {"exp_avg": np.full(1000, -step, np.float32)}}


def test_on_save_is_given_the_report_that_save_returns_once_the_step_is_there():
    told = []
    backend = MemoryBackend()
    run = open_run(backend, on_save=lambda report: told.append((report, open_run(backend).steps())))
    reports = [run.save(state(step), step=step) for step in (1, 2)]
    assert told == [(reports[0], [1]), (reports[1], [1, 2])]


def test_on_save_may_save():
    saved = []

    def again(report):
        if report.step < 3:
            saved.append(run.save(state(report.step + 1), step=report.step + 1).step)

    run = open_run(MemoryBackend(), on_save=again)
    run.save(state(1), step=1)
    assert (run.steps(), saved) == ([1, 2, 3], [3, 2])


def test_an_error_of_on_save_is_logged_and_fails_no_save(caplog):
    def fail(report):
        raise ValueError("the dashboard is down")

    run = open_run(MemoryBackend(), on_save=fail)
    with caplog.at_level(logging.INFO, "deltackpt"):
        report = run.save(state(1), step=1)
    assert run.steps() == [report.step] == [1]
    (info, warning) = caplog.records
    assert info.getMessage() == str(report)
    assert warning.getMessage() == "run 'main' step 1 is saved, but on_save failed"
    assert "the dashboard is down" in str(warning.exc_info[1])


def test_a_save_that_fails_is_not_told():
    class Full(MemoryBackend):
        def create(self, name):
            raise StorageError(f"{name}: disk is full")

    run = open_run(MemoryBackend(), on_save=lambda report: pytest.fail("told"))
    run.store.backend.__class__ = Full
    with pytest.raises(StorageError):
        run.save(state(1), step=1)


def test_on_save_must_be_a_function():
    with pytest.raises(InvalidInputError, match="on_save: found 'print'"):
        open_run(MemoryBackend(), on_save="print")


class Writer:
    """As torch.utils.tensorboard.SummaryWriter."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, scalar_value, global_step=None):
        self.scalars[tag, global_step] = scalar_value


def test_tensorboard_has_every_scalar_at_the_step_of_the_save():
    writer = Writer()
    run = open_run(MemoryBackend(), on_save=scalars.tensorboard(writer))
    report = run.save(state(1), step=7)
    assert writer.scalars == {(name, 7): value for name, value in scalars.of(report).items()}
    assert writer.scalars["deltackpt/logical_size", 7] == 8000
    assert writer.scalars["deltackpt/joules", 7] == report.energy.joules > 0
    assert all(type(value) is float for value in writer.scalars.values())


class WandbRun:
    """As wandb.Run."""

    def __init__(self):
        self.defined, self.logged = {}, []

    def define_metric(self, name, step_metric=None):
        self.defined[name] = step_metric

    def log(self, data, step=None, commit=None):
        assert step is None  # W&B's own step is the training loop's
        self.logged.append(data)


def test_wandb_has_every_scalar_and_the_step_as_an_axis():
    dashboard = WandbRun()
    run = open_run(MemoryBackend(), on_save=scalars.wandb(dashboard))
    reports = [run.save(state(step), step=step) for step in (5, 6)]
    assert dashboard.defined == {"deltackpt/step": None, "deltackpt/*": "deltackpt/step"}
    assert dashboard.logged == [{**scalars.of(r), "deltackpt/step": r.step} for r in reports]


def test_torchs_writer_has_the_method_that_is_called():
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter
    assert list(inspect.signature(writer.add_scalar).parameters)[1:4] == [
        "tag",
        "scalar_value",
        "global_step",
    ]


def test_the_page_tells_every_scalar():
    report = open_run(MemoryBackend()).save(state(1), step=1)
    told = set(re.findall(r"^\| `deltackpt/([\w/]+)", PAGE.read_text(), re.M)) - {"step"}
    assert told == {re.sub(r"/.*", "/", name.removeprefix("deltackpt/")) for name in scalars.of(report)}
