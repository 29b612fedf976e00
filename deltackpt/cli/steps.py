"""The command line: each command parses, calls, prints.

Owns   options, exit codes, tables, progress; with --json one document on stdout and nothing else there.
Never  decides anything, or computes what the library does not.

rich and what only one command needs is imported where it is used: ``deltackpt --help`` must not wait for it.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

import deltackpt
from deltackpt import delta, overview, retention
from deltackpt.errors import DeltackptError, InvalidInputError, NotFoundError, StorageError
from deltackpt.report import human_size, human_time
from deltackpt.run import open_run
from deltackpt.store import DESCRIPTOR, open_store

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Function = TypeVar("Function", bound=Callable[..., Any])

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it
EXIT_DAMAGED, EXIT_NOT_CHECKED = 1, 2  # of verify
_WIDE = 10_000  # a pipe has no width: lines are not folded there
_N_HITS_SHOWN = 5


# -- errors


class _Failure(click.ClickException):
    """A `DeltackptError` as click reports it."""

    def __init__(self, error: DeltackptError, exit_code: int | None = None) -> None:
        super().__init__(error.message)
        self.hint = error.hint
        self.exit_code = error.exit_code if exit_code is None else exit_code  # type: ignore[misc]

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it on stderr."""
        _note(f"error: {self.message}")
        if self.hint:
            _note(f"hint: {self.hint}")


class _Group(click.Group):
    """The group of all commands: gives our errors their exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DeltackptError as e:
            raise _Failure(e) from e
        except OSError as e:
            if e.errno == errno.EPIPE:
                raise  # click ends quietly
            raise _Failure(StorageError(f"output: {e.strerror or e}", errno=e.errno)) from e
        except KeyboardInterrupt:
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


def main() -> None:
    """Run the command, as ``deltackpt`` and as ``python -m deltackpt``."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name must not be too exotic to be listed
    try:
        cli(prog_name="deltackpt")
    except KeyboardInterrupt:  # while arguments were parsed
        sys.exit(EXIT_INTERRUPTED)


# -- options


def _step(ctx: click.Context, param: click.Parameter, value: str) -> int | str:
    if value == "latest":
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor 'latest'", ctx, param) from None


def _metrics(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            metrics[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE with a number", ctx, param)
    return metrics


def _best(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[retention.Best]:
    try:
        return [retention.Best.parse(value) for value in values]
    except InvalidInputError as e:
        raise click.BadParameter(e.message, ctx, param) from e


def _json_option(function: Function) -> Function:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(function)


def _run_option(function: Function) -> Function:
    return click.option("--run", default="main", show_default=True, metavar="RUN", help="Which run.")(
        function
    )


def _step_option(function: Function) -> Function:
    return click.option(
        "--step",
        default="latest",
        show_default=True,
        callback=_step,
        metavar="N|latest",
        help="Which step.",
    )(function)


def _here(ctx: click.Context, param: click.Parameter, store: Path | None) -> Path:
    if store is not None:
        return store
    here = Path()
    return here if (here / DESCRIPTOR).is_file() else here / "checkpoints"


# -- printing


def _plain(text: str) -> str:
    """Return text without what a terminal would obey, but for new lines: names come from files."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _print(shown: Any, data: Any, as_json: bool) -> None:
    """Print text or a table, or else the same as JSON."""
    if as_json:
        click.echo(json.dumps(data))
    elif isinstance(shown, str):
        click.echo(_plain(shown))
    else:
        _console().print(shown)


def _note(text: str) -> None:
    click.echo(_plain(text), err=True)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if is_terminal else _WIDE, highlight=False)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table; a column whose name starts with ``>`` is aligned right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(_plain(cell)) for cell in row))
    return table


@contextmanager
def _busy(what: str) -> Iterator[None]:
    """Say what is going on while it lasts, on a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    with _console(stderr=True).status(what):
        yield


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what to tell the bytes done and the bytes in all; shown on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done_size, total_size: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=_console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done_size, total_size: bar.update(task, completed=done_size, total=total_size)


def _when(created_s: float) -> str:
    try:
        return datetime.fromtimestamp(created_s).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):  # a clock that was far off
        return f"{created_s:g} s"


def _figures(metrics: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in metrics.items())


# -- commands


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(deltackpt.__version__, "-V", "--version", message="%(prog)s %(version)s")
@click.option(
    "-s",
    "--store",
    type=click.Path(path_type=Path),
    envvar="DELTACKPT_STORE",
    show_envvar=True,
    callback=_here,
    help="The store's directory.  Default: the current directory if it is a store, else ./checkpoints.",
)
@click.pass_context
def cli(ctx: click.Context, store: Path) -> None:
    """Incremental training checkpoints: store only what changed, restore any step bit for bit.

    \b
    Exit codes: 0 done, 1 it was there already or a package is missing, 2 wrong usage or input,
    3 not found, 4 another writer won, 5 unreadable bytes, 6 the storage failed, 130 interrupted.
    verify: 0 clean, 1 damaged, 2 could not check.

    \b
    Examples:
      deltackpt save model.safetensors --step 1000 --metric loss=2.31
      deltackpt ls
      deltackpt restore --step latest -o model.safetensors
    """
    ctx.obj = store


@cli.command(short_help="Save a checkpoint file as one step.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--step", type=int, required=True, metavar="N", help="The training step it is.")
@_run_option
@click.option("--overwrite", is_flag=True, help="Supersede the step if it is there.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    callback=_metrics,
    metavar="NAME=VALUE",
    help="A figure to list, and to retain by; may be given again.",
)
@_json_option
@click.pass_obj
def save(
    store: Path,
    file: Path,
    step: int,
    run: str,
    overwrite: bool,
    metrics: dict[str, float],
    as_json: bool,
) -> None:
    """Save FILE (.safetensors, .npz, .pt) as one step; only what changed is written.

    \b
    Examples:
      deltackpt save model.safetensors --step 1000
      deltackpt save state.pt --step 2000 --run ablation --metric loss=2.31
    """
    from deltackpt import files

    with _busy(f"saving {file}"):
        state = files.read_state(file)
        report = delta.save(state, store, step=step, run=run, metrics=metrics, overwrite=overwrite)
    _print(str(report), report.to_json(), as_json)


@cli.command(short_help="Write one step to a file.")
@_step_option
@_run_option
@click.option(
    "--keys",
    multiple=True,
    metavar="GLOB",
    help="Only what this name or pattern matches; may be given again.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="File to write: .safetensors, .npz or .pt.  Default: RUN-step-N.safetensors here.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there.")
@_json_option
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
    """Write one step to a file, every byte checked.

    Values that are no tensors go into a .safetensors or .npz file as JSON beside the tensors; a .pt file
    holds the state as it was saved.

    \b
    Examples:
      deltackpt restore
      deltackpt restore --step 1000 --run ablation -o state.pt
      deltackpt restore --keys 'model.*' -o weights.npz
    """
    from deltackpt.export import export

    with open_run(store, run, create=False) as opened, _progress("restoring") as progress:
        done = export(opened, step, out, keys=keys or None, overwrite=overwrite, progress=progress)
    shown = f"{done.path}: {run} step {done.step}, {human_size(done.file_size)}, {human_time(done.total_s)}"
    _print(shown, done.to_json(), as_json)


@cli.command(short_help="List runs and steps.")
@click.option("--run", metavar="RUN", help="Only this run.  Default: all.")
@_json_option
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
            _when(line["created_s"]),
            human_size(line["logical_size"]),
            human_size(line["written_size"]),
            f"{100 * line['ratio']:.2f} %",
            _figures(line["metrics"]),
        )
        for line in lines
    ]
    table = _table(("run", ">step", "saved", ">in", ">written", ">ratio", "metrics"), rows)
    _print(table if rows else f"{opened.url}: no steps", {"store": opened.url, "steps": lines}, as_json)


@cli.command(short_help="Show what one step holds.")
@_step_option
@_run_option
@_json_option
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
    _print(_table(("tensor", "dtype", "shape", ">size", ">chunks"), rows), found, as_json)


@cli.command(short_help="Forget steps, by name or by rules of what to keep.")
@_run_option
@click.option("--step", "steps", type=int, multiple=True, metavar="N", help="Forget this step; repeatable.")
@click.option("--keep-last", "last", type=click.IntRange(min=1), metavar="N", help="Keep the newest N steps.")
@click.option(
    "--keep-every", "every", type=click.IntRange(min=1), metavar="N", help="Keep the multiples of N."
)
@click.option(
    "--keep-best",
    "best",
    multiple=True,
    callback=_best,
    metavar="METRIC:N",
    help="Keep the N steps of the lowest METRIC, of the highest with METRIC:N:max; repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go and why, and stop.")
@_json_option
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
    _print(_table((">step", "", "why"), rows), {"run": run, "dry_run": dry_run, "steps": lines}, as_json)


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
@_json_option
@click.pass_obj
def gc(store: Path, dry_run: bool, force: bool, patience_s: float | None, as_json: bool) -> None:
    """Give back the space that no step needs; safe beside running saves.

    With a save running it frees nothing yet: it says what it waits for, and a later call frees.

    \b
    Examples:
      deltackpt gc --dry-run
      deltackpt gc
    """
    from deltackpt.gc import PATIENCE_S, collect

    with _busy("collecting"):
        result = collect(
            store,
            dry_run=dry_run,
            force=force,
            patience_s=PATIENCE_S if patience_s is None else patience_s,
        )
    lines = [
        f"{result.n_packs} packs: {human_size(result.live_size)} in use, {human_size(result.dead_size)} not",
        f"{result.n_dead} to delete, {result.n_repacked} to rewrite"
        if dry_run
        else f"freed {human_size(result.freed_size)} in {result.n_deleted} files",
    ]
    lines += [f"gave up for dead: {who}" for who in result.fenced]
    lines += [f"waiting for: {who}" for who in result.waiting_for]
    _print("\n".join(lines), asdict(result), as_json)


@cli.command(short_help="Check the store and name every damage.")
@click.option(
    "--stored", "level", flag_value="stored", help="Read every stored byte against its checksum too."
)
@click.option("--decode", "level", flag_value="decode", help="Decode every chunk against its id too.")
@_json_option
@click.pass_context
def verify(ctx: click.Context, level: str | None, as_json: bool) -> None:
    """Check the store and name every damage; changes nothing.

    By default it checks every record, and that every chunk that a step needs is there.  Exits 0 if the store
    is clean, 1 if it is damaged, 2 if it could not be checked.

    \b
    Examples:
      deltackpt verify
      deltackpt verify --decode --json
    """
    from deltackpt.verify import verify as check

    try:
        with _busy("verifying"):
            report = check(ctx.obj, level=level or "references")  # type: ignore[arg-type]
    except DeltackptError as e:
        raise _Failure(e, EXIT_NOT_CHECKED) from e
    lines = []
    for damage in report.damage:
        lines.append(f"damaged {damage.kind} {damage.key}: {damage.message}")
        lines += [f"  lost: {hit}" for hit in damage.hits[:_N_HITS_SHOWN]]
        n_more = len(damage.hits) - _N_HITS_SHOWN
        lines += [f"  and {n_more} more; --json lists all"] if n_more > 0 else []
    lines += [f"not a file of deltackpt's: {name}" for name in report.foreign]
    lines.append(
        f"{'clean' if report.clean else f'{len(report.damage)} damaged'}: {report.n_steps} steps, "
        f"{report.n_packs} packs, {report.n_chunks} chunks ({report.level}, "
        f"{human_size(report.checked_size)} read)"
    )
    _print("\n".join(lines), report.to_json(), as_json)
    if not report.clean:
        ctx.exit(EXIT_DAMAGED)


@cli.command(short_help="Say what runs here, and what the store holds.")
@_json_option
@click.pass_obj
def info(store: Path, as_json: bool) -> None:
    """Say which deltackpt this is, what it runs on, and what the store holds, if there is one.

    \b
    Examples:
      deltackpt info
      deltackpt -s /data/ckpt info --json
    """
    build = overview.build()
    try:
        totals = overview.totals(open_store(store))
    except NotFoundError:
        totals = None
    rows = [(name.replace("_", " "), "not installed" if v is None else str(v)) for name, v in build.items()]
    if totals is None:
        rows.append(("store", f"none at {store}"))
    else:
        sizes = {name: human_size(v) if name.endswith("size") else str(v) for name, v in totals.items()}
        rows += [(f"store {name.removeprefix('n_').replace('_', ' ')}", v) for name, v in sizes.items()]
    table = _table(("", ""), rows)
    table.show_header = False
    _print(table, {**build, "store": totals}, as_json)


@cli.command(short_help="Train, kill, resume, and compare every bit.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the killed and resumed run's store here.",
)
@_json_option
def demo(keep: Path | None, as_json: bool) -> None:
    """Train a small model, kill it in the middle of a save, resume, and compare every bit.

    \b
    Examples:
      deltackpt demo
      deltackpt demo --keep /tmp/demo
    """
    from deltackpt.demo import run_demo

    result = run_demo(keep, show=_console(stderr=as_json).print)
    if as_json:
        _print("", asdict(result), as_json)
