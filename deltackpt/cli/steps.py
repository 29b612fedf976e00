"""Commands on the steps of runs: ls, show, diff, pin, fork, forget.

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
    complete_steps_of_runs,
    output_options,
    run_option,
    step_of_run,
    step_option,
)
from deltackpt.cli.printing import answer, answer_table, figures, percent, table, tell, when
from deltackpt.energy import Energy
from deltackpt.groups import GroupCost
from deltackpt.report import cost_lines, energy_lines, human_size
from deltackpt.retention import Rule
from deltackpt.run import open_run
from deltackpt.store import open_store


@cli.command(short_help="List runs and steps.")
@any_run_option
@output_options
@click.pass_obj
def ls(store: Path, run: str | None, as_json: bool) -> None:
    """List runs and steps: what was handed in, what it took to store, and metrics.

    The note says which steps are pinned, and what a run was forked from.

    \b
    Examples:
      deltackpt ls
      deltackpt ls --run ablation --json
    """
    opened = open_store(store)
    lines = overview.listing(opened, run)
    rows = [
        (
            line["run"],
            str(line["step"]),
            when(line["created_s"]),
            human_size(line["logical_size"]),
            human_size(line["written_size"]),
            percent(line["ratio"]),
            _note(line["pinned"], line["origin"]),
            figures(line["metrics"]),
        )
        for line in lines
    ]
    columns = ("run", ">step", "saved", ">in", ">written", ">ratio", "note", "metrics")
    empty = f"{opened.url}: no steps"
    answer_table(columns, rows, {"store": opened.url, "steps": lines}, as_json, empty=empty)


def _note(is_pinned: bool, origin: dict[str, object] | None) -> str:
    notes = ["pinned"] if is_pinned else []
    notes += [f"from {origin['run']}@{origin['step']}"] if origin else []
    return ", ".join(notes)


@cli.command(short_help="Show what one step holds.")
@step_option
@run_option
@output_options
@click.pass_obj
def show(store: Path, step: int | str, run: str, as_json: bool) -> None:
    """Show what one step holds: every tensor's name, dtype, shape, size and chunks.

    With --json it is all that is on record: the tensors' rows, the structure with the values that are no
    tensors, and the commit with metrics, metadata and figures.

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
    cost = found["commit"]["figures"]
    groups = [GroupCost.from_json(group) for group in cost["groups"]]
    told = [table(*cost_lines(groups))] if groups else []
    told += energy_lines(Energy.from_json(cost["energy"]) if cost["energy"] else None)
    if told and not as_json:
        answer("\n" + "\n".join(told), None, False)


@cli.command(short_help="Show what differs between two steps.")
@click.argument("a", callback=step_of_run, shell_complete=complete_steps_of_runs)
@click.argument("b", callback=step_of_run, shell_complete=complete_steps_of_runs)
@run_option
@click.option("--lists", is_flag=True, help="Compare lists of chunks alone, and read no tensor.")
@output_options
@click.pass_obj
def diff(
    store: Path,
    a: tuple[str | None, int | str],
    b: tuple[str | None, int | str],
    run: str,
    lists: bool,
    as_json: bool,
) -> None:
    """Show what differs between the steps A and B, tensor by tensor and value by value.

    A and B are each a STEP of --run, or RUN@STEP; a STEP is a number, latest or latest-good. Of a tensor it
    says how many elements and bytes differ and by how much, and reads the chunks that only one step has;
    --lists spares that. It exits 0 whether they differ or not: is_empty in the JSON tells.

    \b
    Examples:
      deltackpt diff 1000 2000
      deltackpt diff main@latest ablation@latest
      deltackpt diff 1000 latest --lists --json | jq .is_empty
    """
    (run_a, step_a), (run_b, step_b) = a, b
    opened = open_store(store)
    with open_run(opened, run_a or run) as left, open_run(opened, run_b or run) as right:
        found = left.diff(step_a, step_b, other=right, values=not lists)
    answer(str(found), found.to_json(), as_json)


@cli.command(short_help="Keep a step until it is unpinned.")
@click.argument("step", type=int, metavar="STEP", shell_complete=complete_numbers)
@run_option
@click.option("--undo", is_flag=True, help="Let the step go again when the rules do.")
@output_options
@click.pass_obj
def pin(store: Path, step: int, run: str, undo: bool, as_json: bool) -> None:
    """Keep STEP, a number, until it is unpinned.

    No rule lets a pinned step go, neither of forget nor of a training job, and it cannot be forgotten by
    name or overwritten. To pin what is pinned, or unpin what is not, is no error.

    \b
    Examples:
      deltackpt pin 1000
      deltackpt pin 1000 --run ablation --undo
    """
    with open_run(store, run, create=False) as opened:
        (opened.unpin if undo else opened.pin)(step)
        pinned = opened.pinned()
    tell(
        f"{run} step {step}: {'not pinned' if undo else 'pinned'}",
        {"run": run, "step": step, "pinned": not undo, "all_pinned": pinned},
        as_json,
    )


@cli.command(short_help="Begin a run with a step of another.")
@click.argument("new", metavar="NEW")
@step_option
@run_option
@output_options
@click.pass_obj
def fork(store: Path, new: str, step: int | str, run: str, as_json: bool) -> None:
    """Begin the run NEW with a step of --run: the same number, content, metrics and metadata.

    Nothing is copied, and the two are independent from then on: to forget or overwrite steps of one does
    not touch the other.

    \b
    Examples:
      deltackpt fork ablation --step 1000
      deltackpt fork sft-2 --run sft
    """
    with open_run(store, run, create=False) as opened, opened.fork(new, step=step) as branch:
        line = overview.step_line(branch.commit())
    origin = line["origin"]
    told = f"{new} step {line['step']}: from {origin['run']}@{origin['step']}"
    tell(f"{told}, {human_size(line['written_size'])} written", line, as_json)


@cli.command(short_help="Forget steps, by name or by rules of what to keep.")
@run_option
@click.option(
    "--step",
    "steps",
    type=int,
    multiple=True,
    metavar="N",
    shell_complete=complete_numbers,
    help="Forget this step; repeatable, not together with rules.",
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
@click.option(
    "--keep-seconds",
    "seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Keep the first step, and each saved S seconds or more after the one kept before it.",
)
@click.option(
    "--keep-step",
    "kept",
    type=int,
    multiple=True,
    metavar="N",
    shell_complete=complete_numbers,
    help="Keep this step; repeatable.",
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
    seconds: float | None,
    kept: Sequence[int],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Forget steps: those named, or all that no --keep rule keeps.

    Rules add up: a step stays if any of them keeps it, and the latest and those that are pinned always do.
    A step that is pinned is not forgotten by name either: unpin it first. No other step is harmed, whatever
    they share. To give the space back, run gc.

    \b
    Examples:
      deltackpt forget --step 1000 --step 2000
      deltackpt forget --keep-last 3 --keep-every 1000 --dry-run
      deltackpt forget --keep-best loss:2 --keep-seconds 3600 --keep-step 1000
    """
    rules: list[Rule] = [
        *([retention.last(n_last)] if n_last else []),
        *([retention.every(n_every)] if n_every else []),
        *bests,
        *([retention.every_seconds(seconds)] if seconds else []),
        *([retention.these(kept)] if kept else []),
    ]
    if bool(rules) == bool(steps):
        raise click.UsageError("give either --step or --keep rules")
    with open_run(store, run, create=False) as opened:
        if rules:
            for step in kept:
                opened.store.refs.commit(run, step)  # a slip here would let others go
            rule = reduce(or_, rules)
            rule.check({c.slot.step: c for c in overview.commits(opened.store, run)})
            decided = opened.retention(rule)
            if not dry_run:
                opened.forget(decided.goes)
        else:
            decided = opened.forget(steps, dry_run=dry_run)
    goes = "would go" if dry_run else "forgotten"
    rows = [(str(row.step), "stays" if row.stays else goes, row.why) for row in decided.rows]
    data = {"run": run, "dry_run": dry_run, "steps": decided.to_json()["steps"]}
    (answer if dry_run else tell)(table((">step", "", "why"), rows), data, as_json)
