"""Commands on the steps of runs: ls, show, forget.

Owns   their options and what they print.
Never  decides which step stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from deltackpt import overview, retention
from deltackpt.cli.group import cli
from deltackpt.cli.options import (
    any_run_option,
    best_rules,
    complete_numbers,
    output_options,
    run_option,
    step_option,
)
from deltackpt.cli.printing import answer, answer_table, figures, percent, table, tell, when
from deltackpt.report import human_size
from deltackpt.run import open_run
from deltackpt.store import open_store


@cli.command(short_help="List runs and steps.")
@any_run_option
@output_options
@click.pass_obj
def ls(store: Path, run: str | None, as_json: bool) -> None:
    """List runs and steps: what was handed in, what it took to store, and metrics.

    \b
    Examples:
      deltackpt ls
      deltackpt ls --run ablation --json
    """
    opened = open_store(store)
    lines = [overview.step_line(commit) for commit in overview.commits(opened, run)]
    rows = [
        (
            line["run"],
            str(line["step"]),
            when(line["created_s"]),
            human_size(line["logical_size"]),
            human_size(line["written_size"]),
            percent(line["ratio"]),
            figures(line["metrics"]),
        )
        for line in lines
    ]
    columns = ("run", ">step", "saved", ">in", ">written", ">ratio", "metrics")
    answer_table(
        columns, rows, {"store": opened.url, "steps": lines}, as_json, empty=f"{opened.url}: no steps"
    )


@cli.command(short_help="Show what one step holds.")
@step_option
@run_option
@output_options
@click.pass_obj
def show(store: Path, step: int | str, run: str, as_json: bool) -> None:
    """Show what one step holds; with --json its whole manifest and record.

    \b
    Examples:
      deltackpt show --step 1000
      deltackpt show --json | jq .structure
    """
    with open_run(store, run, create=False) as opened:
        found = overview.contents(opened, step)
    rows = [
        (
            row["name"],
            row["dtype"],
            "x".join(map(str, row["shape"])) or "()",
            human_size(row["size"]),
            str(row["n_chunks"]),
        )
        for row in found["tensors"]
    ]
    columns = ("tensor", "dtype", "shape", ">size", ">chunks")
    answer_table(columns, rows, found, as_json, empty=f"run {run} step {found['step']}: no tensors")


@cli.command(short_help="Forget steps, by name or by rules of what to keep.")
@run_option
@click.option(
    "--step",
    "steps",
    type=int,
    multiple=True,
    metavar="N",
    shell_complete=complete_numbers,
    help="Forget this step; repeatable.",
)
@click.option("--keep-last", "last", type=click.IntRange(min=1), metavar="N", help="Keep the newest N steps.")
@click.option(
    "--keep-every", "every", type=click.IntRange(min=1), metavar="N", help="Keep the multiples of N."
)
@click.option(
    "--keep-best",
    "best",
    multiple=True,
    callback=best_rules,
    metavar="METRIC:N",
    help="Keep the N steps of the lowest METRIC, of the highest with METRIC:N:max; repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go and why, and stop.")
@output_options
@click.pass_obj
def forget(
    store: Path,
    run: str,
    steps: Sequence[int],
    last: int | None,
    every: int | None,
    best: Sequence[retention.Best],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Forget steps: those named, or all that no --keep rule keeps.

    Rules add up: a step stays if any of them keeps it, and the latest always does.  To give the space back,
    run gc.

    \b
    Examples:
      deltackpt forget --step 1000 --step 2000
      deltackpt forget --keep-last 3 --keep-every 10000 --keep-best loss:2 --dry-run
    """
    rules = last is not None or every is not None or bool(best)
    if rules == bool(steps):
        raise click.UsageError("give either --step or --keep rules")
    with open_run(store, run, create=False) as opened:
        metrics = {c.slot.step: c.metrics for c in overview.commits(opened.store, run)}
        if rules:
            stay = retention.decide(metrics, last=last, every=every, best=best)
        else:
            stay = retention.all_but(metrics, [opened.commit(step).slot.step for step in steps])
        if not dry_run:
            opened.forget(metrics.keys() - stay.keys())
    why_not = "no rule keeps it" if rules else "named"
    lines = [{"step": s, "stays": s in stay, "why": stay.get(s, why_not)} for s in metrics]
    goes = "would go" if dry_run else "forgotten"
    rows = [(str(line["step"]), "stays" if line["stays"] else goes, str(line["why"])) for line in lines]
    data = {"run": run, "dry_run": dry_run, "steps": lines}
    (answer if dry_run else tell)(table((">step", "", "why"), rows), data, as_json)
