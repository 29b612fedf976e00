"""Commands on a whole store, and on deltackpt itself: stats, gc, verify, repair, info, demo, completion.

Owns   their options and what they print.
Never  decides what goes, or what is damaged.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltackpt import overview
from deltackpt.cli.group import Failure, cli
from deltackpt.cli.options import any_run_option, output_options
from deltackpt.cli.printing import (
    answer,
    answer_table,
    busy,
    has_style,
    is_quiet,
    is_terminal,
    percent,
    table,
    tell,
)
from deltackpt.errors import DeltackptError, NotFoundError
from deltackpt.groups import TITLES
from deltackpt.report import cost_lines, human_size, one_line
from deltackpt.store import open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from deltackpt.repair import RepairResult
    from deltackpt.stats import Stats, Sums
    from deltackpt.verify import Damage

EXIT_DAMAGED, EXIT_NOT_CHECKED = 1, 2  # of verify and repair
_SHELLS = ("bash", "zsh", "fish")
_WIDE = 10_000  # a pipe has no width: lines are not folded there
_N_HITS_SHOWN = 5


@cli.command(short_help="Say what the steps take, and where the saving comes from.")
@any_run_option
@click.option("--over-time", is_flag=True, help="List what each save cost, step by step, too.")
@output_options
@click.pass_obj
def stats(store: Path, run: str | None, over_time: bool, as_json: bool) -> None:
    """Say what the steps take, where the saving comes from, and where there is little and why.

    It reads records, lists and the index, no tensor. In is what was handed in; unchanged, shared and
    repeated are the parts of it that the store had already: from an earlier step of the run, from another
    run, from the same step. New is the rest, and stored what that takes in packs. Weights, optimizer
    moments and other are told apart by the tensors' names and dtypes.

    In the table of runs each is counted as if it were alone; only its own is what forgetting it would free.

    \b
    Examples:
      deltackpt stats
      deltackpt stats --run ablation --over-time
      deltackpt stats --json | jq .groups
    """
    from deltackpt.stats import look

    with busy("adding up"):
        found = look(open_store(store), run)
    if as_json:
        answer("", found.to_json(), True)
        return
    groups = [(TITLES[name], *_sums(s)) for name, s in found.groups.items() if s.logical_size]
    columns = (">in", ">unchanged", ">shared", ">repeated", ">new", ">stored", ">times smaller")
    parts = [str(found), table(("group", *columns), [*groups, ("all", *_sums(found.sums))])]
    if found.costs:
        parts.append(table(*cost_lines(found.costs)))
    parts.append(_runs(found))
    if over_time:
        parts.append(_steps(found))
    answer("\n\n".join(parts), None, False)


def _sums(sums: Sums) -> list[str]:
    sizes = (
        sums.logical_size,
        sums.unchanged_size,
        sums.shared_size,
        sums.repeated_size,
        sums.new_size,
        sums.stored_size,
    )
    return [*map(human_size, sizes), _factor(sums.factor)]


def _factor(factor: float | None) -> str:
    return "" if factor is None else f"{factor:.1f}"


def _runs(found: Stats) -> str:
    rows = [
        (
            run.run,
            str(run.n_steps),
            human_size(run.sums.logical_size),
            human_size(run.sums.stored_size),
            human_size(run.only_size),
            _factor(run.sums.factor),
        )
        for run in found.runs
    ]
    return table(("run", ">steps", ">in", ">stored", ">only its own", ">times smaller"), rows)


def _steps(found: Stats) -> str:
    rows = [
        (
            line["run"],
            str(line["step"]),
            human_size(line["logical_size"]),
            human_size(line["new_size"]),
            human_size(line["written_size"]),
            percent(line["ratio"]),
        )
        for line in found.steps
    ]
    return table(("run", ">step", ">in", ">new", ">written", ">ratio"), rows)


@cli.command(short_help="Give back the space that no step needs.")
@click.option("--dry-run", is_flag=True, help="Say what could be freed, and stop.")
@click.option("--force", is_flag=True, help="Go on although decisions seem to be missing.")
@click.option(
    "--patience",
    "patience_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Give up a save for dead after this long, when its process cannot be asked.  [default: 3600]",
)
@output_options
@click.pass_obj
def gc(store: Path, dry_run: bool, force: bool, patience_s: float | None, as_json: bool) -> None:
    """Give back the space that no step needs; safe beside running saves.

    Run it after forget, or from time to time. It deletes packs that no step uses, rewrites those of much
    waste, and removes what dead saves left. With a save running it frees nothing yet: it says what it waits
    for, and a later call frees.

    \b
    Examples:
      deltackpt gc --dry-run
      deltackpt gc
    """
    from deltackpt.gc import PATIENCE_S, collect

    with busy("collecting"):
        result = collect(
            store,
            dry_run=dry_run,
            force=force,
            patience_s=PATIENCE_S if patience_s is None else patience_s,
        )
    lines = [
        f"{result.n_packs} packs: {human_size(result.live_size)} in use, {human_size(result.dead_size)} not",
        f"{result.n_dead} to delete, {result.n_repacked} to rewrite, {result.n_rebased} deltas to store whole"
        if dry_run
        else f"freed {human_size(result.freed_size)} in {result.n_deleted} files",
    ]
    lines += [f"gave up for dead: {who}" for who in result.fenced]
    lines += [f"waiting for: {who}" for who in result.waiting_for]
    (answer if dry_run else tell)("\n".join(lines), asdict(result), as_json)


@cli.command(short_help="Check the store and name every damage.")
@click.option("--stored", is_flag=True, help="Read every stored byte against its checksum too.")
@click.option("--decode", is_flag=True, help="All that, and decode every chunk against its id.")
@output_options
@click.pass_context
def verify(ctx: click.Context, stored: bool, decode: bool, as_json: bool) -> None:
    """Check the store and name every damage; changes nothing.

    By default it checks every record, and that every chunk that a step needs is there. --stored reads all
    that is stored, as to find what a disk has lost; --decode checks that each step would come back bit for
    bit.

    \b
    Exit codes:
      0    the store is clean
      1    it is damaged
      2    it could not be checked

    \b
    Examples:
      deltackpt verify
      deltackpt verify --decode --json
      deltackpt verify --stored --quiet || mail -s 'damaged checkpoints' me
    """
    from deltackpt.verify import verify as check

    try:
        with busy("verifying"):
            report = check(ctx.obj, level="decode" if decode else "stored" if stored else "references")
    except DeltackptError as e:
        raise Failure(e, EXIT_NOT_CHECKED) from e
    lines = _damage_lines(report.damage)
    lines += [f"not a file of deltackpt's: {one_line(name)}" for name in report.foreign]
    lines.append(
        f"{'clean' if report.clean else f'{len(report.damage)} damaged'}: {report.n_steps} steps, "
        f"{report.n_packs} packs, {report.n_chunks} chunks ({report.level}, "
        f"{human_size(report.checked_size)} read)"
    )
    (tell if report.clean else answer)("\n".join(lines), report.to_json(), as_json)
    if not report.clean:
        ctx.exit(EXIT_DAMAGED)


def _damage_lines(found: Sequence[Damage]) -> list[str]:
    lines = []
    for damage in found:
        lines.append(f"damaged {damage.kind} {damage.key}: {damage.message}")
        lines += [f"  lost: {one_line(hit)}" for hit in damage.hits[:_N_HITS_SHOWN]]
        n_more = len(damage.hits) - _N_HITS_SHOWN
        lines += [f"  and {n_more} more; --json lists all"] if n_more > 0 else []
    return lines


@cli.command(short_help="Mend a damaged store, as far as its bytes are to be had.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="STORE",
    help="Take what is lost here from this store.",
)
@output_options
@click.pass_context
def repair(ctx: click.Context, dry_run: bool, source: Path | None, as_json: bool) -> None:
    """Mend a damaged store, as far as its bytes are to be had; deletes nothing, safe beside running saves.

    Good records of bad packs go into a new pack, the bad ones are set aside; a lost index is made again.
    What is lost for good is told, and the next save that has the same bytes makes the old steps whole too.
    It reads all that is stored.

    \b
    Exit codes:
      0    the store is clean
      1    some of it is damaged still; with --dry-run, there is something to do
      2    it could not be repaired

    \b
    Examples:
      deltackpt repair --dry-run
      deltackpt repair --from /mnt/copy
    """
    from deltackpt.repair import repair as mend

    try:
        with busy("repairing"):
            result = mend(ctx.obj, source=source, dry_run=dry_run)
    except DeltackptError as e:
        raise Failure(e, EXIT_NOT_CHECKED) from e
    lines = [f"{action.verb} {action.key}: {action.why}" for action in result.actions]
    lines += _damage_lines(result.damage)
    lines.append(_repaired(result))
    (tell if result.clean else answer)("\n".join(lines), result.to_json(), as_json)
    if not result.clean:
        ctx.exit(EXIT_DAMAGED)


def _repaired(result: RepairResult) -> str:
    done = "to be done" if result.dry_run else "done"
    what = f"{len(result.actions)} {done}" if result.actions else "nothing to do"
    if not result.damage:
        return f"clean: {what}"
    return f"{len(result.damage)} damaged{'' if result.dry_run else ' still'}: {what}"


@cli.command(short_help="Say what runs here, and what the store holds.")
@output_options
@click.pass_obj
def info(store: Path, as_json: bool) -> None:
    """Say which deltackpt this is, what it runs on, and what the store holds, if there is one.

    "Kernels" says whether the C kernels run, or their slower twins in NumPy. Put it into bug reports.

    \b
    Examples:
      deltackpt info
      deltackpt -s /data/ckpt info --json
    """
    build = overview.build()
    totals, why = None, f"none at {store}"
    try:
        totals = overview.totals(open_store(store))
    except NotFoundError:
        pass
    except DeltackptError as e:  # a report of a bug needs the rest all the more
        why = str(e)
    rows = [(name.replace("_", " "), "not installed" if v is None else str(v)) for name, v in build.items()]
    if totals is None:
        rows.append(("store", why))
    else:
        sizes = {name: human_size(v) if name.endswith("size") else str(v) for name, v in totals.items()}
        rows += [(f"store {name.removeprefix('n_').replace('_', ' ')}", v) for name, v in sizes.items()]
    answer_table(("", ""), rows, {**build, "store": totals}, as_json)


@cli.command(short_help="Train, kill, resume, and compare every bit.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the killed and resumed run's store here.",
)
@output_options
def demo(keep: Path | None, as_json: bool) -> None:
    """Train a small model, kill it in the middle of a save, resume, and compare every bit.

    It takes a few seconds, and needs nothing but what deltackpt needs.

    \b
    Examples:
      deltackpt demo
      deltackpt demo --keep /tmp/demo
    """
    from deltackpt.demo import run_demo

    def nothing(shown: object) -> None:
        """Show nothing."""

    result = run_demo(keep, show=nothing if is_quiet() else _console(stderr=as_json).print)
    if as_json:
        answer("", asdict(result), True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    options: dict[str, Any] = {} if has_style(stream) else {"color_system": None}
    return Console(stderr=stderr, width=None if is_terminal(stream) else _WIDE, highlight=False, **options)


@cli.command(short_help="Print the script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete deltackpt's words.

    Commands, options and files are completed, and from the store also runs, steps and the tensors' names.

    \b
    Examples:
      deltackpt completion fish > ~/.config/fish/completions/deltackpt.fish
      eval "$(deltackpt completion bash)"       # in ~/.bashrc
      eval "$(deltackpt completion zsh)"        # in ~/.zshrc
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click has a class for each of them
    click.echo(kind(cli, {}, "deltackpt", "_DELTACKPT_COMPLETE").source(), nl=False)
