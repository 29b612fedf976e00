"""Commands between a store and the user's files: save, restore, import.

Owns   their options and what they print.
Never  reads a checkpoint's bytes itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import click

from deltackpt.cli.group import cli
from deltackpt.cli.options import complete_keys, metric_values, output_options, run_option, step_option
from deltackpt.cli.printing import answer, progress, tell
from deltackpt.efforts import Optimize
from deltackpt.report import human_size, human_time
from deltackpt.run import open_run


@cli.command(short_help="Save checkpoint files as steps.")
@click.argument("file", type=click.Path(), nargs=-1, required=True)
@click.option(
    "--step",
    type=click.IntRange(min=0),
    metavar="N",
    help="Of one FILE: the training step that it is.  [default: from its name]",
)
@run_option
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    callback=metric_values,
    metavar="NAME=VALUE",
    help="Of one FILE: a figure to list, and to retain by; may be given again.",
)
@click.option("--overwrite", is_flag=True, help="Supersede the steps that are there already.")
@click.option("--skip-existing", is_flag=True, help="Pass over the steps that are there already.")
@click.option(
    "--optimize",
    type=click.Choice(get_args(Optimize)),
    default="bytes",
    show_default=True,
    help="What to spare: time stores more where the storage outruns the encoders, energy where that is less.",
)
@click.option("--dry-run", is_flag=True, help="Say which step each file would be, and stop.")
@output_options
@click.pass_obj
def save(
    store: Path,
    file: Sequence[str],
    step: int | None,
    run: str,
    metrics: dict[str, float],
    overwrite: bool,
    skip_existing: bool,
    optimize: Optimize,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Save each FILE (.safetensors, .npz, .pt, .pth, .bin) as one step; only what changed is written.

    A FILE may be a pattern in quotes. A step is durable and visible when its line is printed; files are
    saved in the order of their steps. The store is made if there is none. A torch file is read without
    executing what it holds.

    A FILE may be a directory, as of DCP, DeepSpeed or a Trainer: its files are saved as they are, and
    restore gives them back byte for byte. Of other FILEs it saves the state in them; import saves those as
    they are too.

    Without --step the names tell which step each file is: the number after the word "step", if every name
    has one and they are not all the same; else the last number that is not the same in all names, counted
    from the end. A number is a run of digits without a decimal point; the 2-of-8 of a part is none. A
    directory counts as a part of the name: of a file that is alone, the one that it is in. Names without
    a number, or two with the same, are an error that lists them, before anything is saved.

    If the run has one of the steps already, nothing is saved, unless --overwrite or --skip-existing says
    what to do. A series that breaks off leaves the steps it saved; --skip-existing goes on from there.

    \b
    Examples:
      deltackpt save model.safetensors --step 1000 --metric loss=2.31
      deltackpt save 'ckpt/step_*.pt'
      deltackpt save out/checkpoint-500
      deltackpt save 'out/checkpoint-*/model.safetensors' --skip-existing
    """
    from deltackpt import series

    if overwrite and skip_existing:
        raise click.UsageError("give --overwrite or --skip-existing, not both")
    existing: series.Existing = "overwrite" if overwrite else "skip" if skip_existing else "refuse"
    paths = series.find(file)
    if len(paths) > 1 and (step is not None or metrics):
        raise click.UsageError(f"--step and --metric are of one file, these are {len(paths)}: leave them out")
    steps = series.steps_of(paths) if step is None else {paths[0]: step}
    if dry_run:
        lines = [f"{path}: {run} step {s}" for path, s in steps.items()]
        told = [{"path": str(path), "step": s} for path, s in steps.items()]
        answer("\n".join(lines), {"run": run, "dry_run": True, "steps": told}, as_json)
        return
    start, done = time.perf_counter(), []
    with progress("saving") as told_progress:
        for one in series.save(
            steps,
            store,
            run=run,
            existing=existing,
            optimize=optimize,
            metrics=metrics,
            progress=told_progress,
        ):
            done.append(one)
            if not as_json:
                tell(str(one) if step is None else str(one.report or one), None, False)
    total = series.Total.of(done, round(time.perf_counter() - start, 6))
    if as_json and step is not None:
        answer("", (done[0].report or done[0]).to_json(), True)
    elif as_json:
        answer("", {"run": run, "steps": [one.to_json() for one in done], "total": total.to_json()}, True)
    elif len(done) > 1:
        tell(str(total), None, False)


@cli.command(short_help="Write one step to a file, or as the files it was.")
@step_option
@run_option
@click.option(
    "--keys",
    multiple=True,
    metavar="GLOB",
    shell_complete=complete_keys,
    help="Only what this name or pattern matches; may be given again. Nothing else is read.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What to write. Of a state, the extension says which kind: .safetensors, .npz or .pt."
    "  [default: RUN-step-N.safetensors here; of files, as they were called]",
)
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@output_options
@click.pass_obj
def restore(
    store: Path,
    step: int | str,
    run: str,
    keys: Sequence[str],
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write one step to a file, or as the files it was saved from, every byte checked.

    It appears whole or not at all: damage is an error (exit code 5) that names the tensor, and
    --step latest-good passes over damaged steps. Values that are no tensors go into a .safetensors or .npz
    file as JSON beside the tensors; a .pt file holds the state as it was saved.

    A step of files, as import makes them and save of a directory, comes back as these files, byte for byte,
    with names, modes and times; with --keys, as a state of which those tensors are written to a file.

    \b
    Examples:
      deltackpt restore
      deltackpt restore --step 1000 --run ablation -o state.pt
      deltackpt restore --step 500 -o out/checkpoint-500
      deltackpt restore --keys 'model.*' -o weights.npz
    """
    from deltackpt.export import export

    with open_run(store, run, create=False) as opened, progress("restoring") as told:
        done = export(opened, step, out, keys=keys or None, overwrite=overwrite, progress=told)
    shown = f"{done.path}: {run} step {done.step}, {human_size(done.file_size)}, {human_time(done.total_s)}"
    tell(shown, done.to_json(), as_json)


@cli.command("import", short_help="Take over a folder of checkpoints.")
@click.argument("path", type=click.Path(), nargs=-1, required=True)
@run_option
@click.option("--skip-existing", is_flag=True, help="Pass over the steps that are there already.")
@click.option("--dry-run", is_flag=True, help="Say which step each checkpoint would be, and stop.")
@output_options
@click.pass_obj
def import_(
    store: Path, path: Sequence[str], run: str, skip_existing: bool, dry_run: bool, as_json: bool
) -> None:
    """Save all checkpoints in the folder PATH as they are, in the order of their steps; change none.

    What is a checkpoint, the names tell: files (.safetensors, .npz, .pt, .pth, .bin, .ckpt) and directories
    whose names differ by their numbers alone, as step_*.pt, checkpoint-* and global_step* do. Where there are
    several such series, those called steps, checkpoints, epochs or iterations are meant; if there are several
    of these, it is an error that lists them. A PATH may also be one of the checkpoints, or a pattern in
    quotes. Which step each is, is told as by save.

    restore gives each back byte for byte: names, modes and times too. A series that breaks off leaves the
    steps it saved; --skip-existing goes on from there. The last lines say what else is in the folder and was
    not taken, and what the store saves.

    \b
    Examples:
      deltackpt import runs/exp1 --dry-run
      deltackpt import runs/exp1 --run exp1 --skip-existing
      deltackpt import 'out/checkpoint-*'
    """
    from deltackpt import series

    steps = series.steps_of(series.find_checkpoints(path))
    others = [str(other) for other in series.passed_over(path, steps)]
    left = f"not taken: {', '.join(others)}" if others else ""
    if dry_run:
        lines = [*(f"{one}: {run} step {s}" for one, s in steps.items()), *filter(None, [left])]
        told = [{"path": str(one), "step": s} for one, s in steps.items()]
        data = {"run": run, "dry_run": True, "steps": told, "not_taken": others}
        answer("\n".join(lines), data, as_json)
        return
    start, done = time.perf_counter(), []
    with progress("importing") as told_progress:
        for saved in series.save(
            steps,
            store,
            run=run,
            existing="skip" if skip_existing else "refuse",
            as_files=True,
            progress=told_progress,
        ):
            done.append(saved)
            if not as_json:
                tell(str(saved), None, False)
    total = series.Total.of(done, round(time.perf_counter() - start, 6))
    data = {"run": run, "steps": [one.to_json() for one in done], "total": total.to_json()}
    if left and not as_json:
        tell(left, None, False)
    tell(str(total), data | {"not_taken": others}, as_json)
