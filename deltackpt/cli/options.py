"""Options: what several commands take, parsed, and completed in a shell.

Owns   turning words of the command line into values, and offering those that the store has.
Never  prints, or does what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from deltackpt.cli.printing import be_quiet
from deltackpt.errors import DeltackptError, InvalidInputError
from deltackpt.retention import best
from deltackpt.run import open_run
from deltackpt.store import DESCRIPTOR, open_store

Function = TypeVar("Function", bound=Callable[..., Any])

LATEST, LATEST_GOOD = "latest", "latest-good"
DEFAULT_RUN = "main"


# -- parsing


def store_path(ctx: click.Context, param: click.Parameter, store: Path | None) -> Path:
    """Return the store's directory, whether or not there is one."""
    if store is not None:
        return store
    here = Path()
    return here if (here / DESCRIPTOR).is_file() else here / "checkpoints"


def step_word(ctx: click.Context, param: click.Parameter, value: str) -> int | str:
    """Parse one step: a number, or a word that stands for one."""
    if value in (LATEST, LATEST_GOOD):
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is neither a number nor {LATEST!r} nor {LATEST_GOOD!r}", ctx, param
        ) from None


def step_of_run(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str | None, int | str]:
    """Parse ``STEP`` or ``RUN@STEP``; a run's name holds no ``@``."""
    run, at, step = value.rpartition("@")
    if at and not run:
        raise click.BadParameter(f"{value!r} names no run before the @", ctx, param)
    return run or None, step_word(ctx, param, step)


def metric_values(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, float]:
    """Parse ``NAME=VALUE`` given any number of times."""
    metrics: dict[str, float] = {}
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            metrics[name] = float(number)
        except ValueError:
            name = ""
        if not name or not math.isfinite(metrics[name]):
            raise click.BadParameter(f"{value!r} is not NAME=VALUE with a finite number", ctx, param)
    return metrics


def best_rules(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[best]:
    """Parse ``METRIC:N`` given any number of times."""
    try:
        return [best.parse(value) for value in values]
    except InvalidInputError as e:
        raise click.BadParameter(e.message, ctx, param) from e


def _quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        be_quiet()


# -- completing


def complete_runs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Offer the store's runs."""
    return _offer(lambda: open_store(_store(ctx)).refs.runs(), incomplete)


def complete_steps(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Offer the words for a step and the run's steps, the newest first."""
    return _offer(lambda: _words() + _steps(ctx, _run(ctx)), incomplete)


def complete_numbers(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Offer the run's steps, the newest first."""
    return _offer(lambda: _steps(ctx, _run(ctx)), incomplete)


def complete_steps_of_runs(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Offer the run's steps; behind ``RUN@`` that run's."""
    run, at, _ = incomplete.rpartition("@")
    if at:
        return _offer(lambda: [f"{run}@{step}" for step in _words() + _steps(ctx, run)], incomplete)
    return complete_steps(ctx, param, incomplete) + _offer(
        lambda: [f"{run}@{LATEST}" for run in open_store(_store(ctx)).refs.runs()], incomplete
    )


def complete_keys(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Offer the names of the step's tensors."""

    def names() -> list[str]:
        step = ctx.params.get("step") or LATEST
        step = LATEST if step == LATEST_GOOD else step  # to find that one takes reading all of it
        with open_run(_store(ctx), _run(ctx), create=False) as run:
            return [row.name for row in run.manifest(step).tensors]

    return _offer(names, incomplete)


def _offer(words: Callable[[], list[str]], incomplete: str) -> list[CompletionItem[str]]:
    try:
        found = words()
    except (DeltackptError, OSError):  # in the middle of a command line nobody wants to read of it
        return []
    # The shells' scripts take a line for a word.
    return [CompletionItem(w) for w in found if w.startswith(incomplete) and w.isprintable()]


def _store(ctx: click.Context) -> Path:
    store: Path = ctx.find_root().params["store"]
    return store


def _run(ctx: click.Context) -> str:
    return ctx.params.get("run") or DEFAULT_RUN


def _words() -> list[str]:
    return [LATEST, LATEST_GOOD]


def _steps(ctx: click.Context, run: str) -> list[str]:
    with open_run(_store(ctx), run, create=False) as opened:
        return [str(step) for step in reversed(opened.steps())]


# -- options


def quiet_option(function: Function) -> Function:
    """Let a command take ``--quiet``."""
    return click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=_quiet,
        help="Print no progress and no news of success.",
    )(function)


def output_options(function: Function) -> Function:
    """Let a command take ``--json`` and ``--quiet``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(
        quiet_option(function)
    )


def run_option(function: Function) -> Function:
    """Let a command take ``--run``, by default main."""
    return click.option(
        "--run",
        default=DEFAULT_RUN,
        show_default=True,
        metavar="RUN",
        shell_complete=complete_runs,
        help="Which run.",
    )(function)


def any_run_option(function: Function) -> Function:
    """Let a command take ``--run``, by default all."""
    return click.option(
        "--run", metavar="RUN", shell_complete=complete_runs, help="Only this run.  [default: all]"
    )(function)


def step_option(function: Function) -> Function:
    """Let a command take ``--step``, by default the latest."""
    return click.option(
        "--step",
        default=LATEST,
        show_default=True,
        callback=step_word,
        shell_complete=complete_steps,
        metavar="STEP",
        help="Which step: a number, latest, or latest-good: the newest that is not damaged.",
    )(function)
