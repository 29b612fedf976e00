"""Commands on the steps of runs: ls, show, forget.

Owns   their options and what they print.
Never  decides which step stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
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
from deltackpt.retention import Retention, Rule
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
@click.option(
    "--keep-last", "n_last", type=click.IntRange(min=1), metavar="N", help="Keep the newest N steps."
)
@click.option(
    "--keep-every", "n_every", type=click.IntRange(min=1), metavar="N", help="Keep the multiples of N."
)
@click.option(
    "--keep-best",
    "bests",
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
    n_last: int | None,
    n_every: int | None,
    bests: Sequence[Rule],
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
    rules: list[Rule] = [
        *([retention.last(n_last)] if n_last else []),
        *([retention.every(n_every)] if n_every else []),
        *bests,
    ]
    if bool(rules) == bool(steps):
        raise click.UsageError("give either --step or --keep rules")
    with open_run(store, run, create=False) as opened:
        commits = {c.slot.step: c for c in overview.commits(opened.store, run)}
        if rules:
            rule = reduce(or_, rules)
            rule.check(commits)
            decided = opened.retention(rule)
        else:
            going = {opened.store.refs.commit(run, step).slot.step for step in steps}
            decided = Retention.of(run, commits, dict.fromkeys(commits.keys() - going, "not named"), "named")
        if not dry_run:
            opened.forget(decided.goes)
    goes = "would go" if dry_run else "forgotten"
    rows = [(str(row.step), "stays" if row.stays else goes, row.why) for row in decided.rows]
    data = {"run": run, "dry_run": dry_run, "steps": decided.to_json()["steps"]}
    (answer if dry_run else tell)(table((">step", "", "why"), rows), data, as_json)
