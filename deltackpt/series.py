"""A series: the checkpoints of one training job, files or directories, and the step that each of them is.

Owns   finding them, reading steps from their names, saving them in order, the sum of what it took.
Never  guesses: names that do not tell their step apart are an error that lists them.
"""

from __future__ import annotations

import glob
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from deltackpt import delta, files, targets
from deltackpt.efforts import Optimize
from deltackpt.errors import AlreadyExistsError, InvalidInputError, NotFoundError
from deltackpt.folders import FolderSaver, Found
from deltackpt.records import STEP_MAX
from deltackpt.report import SaveReport, human_size, human_time
from deltackpt.run import open_run
from deltackpt.store import Where

#: Any kind of path, given back as it came.
P = TypeVar("P", bound="str | os.PathLike[str]")
Existing = Literal["refuse", "overwrite", "skip"]

_N_NAMED = 10
_N_PARTS = 2  # of a path that is alone: the file and its directory
#: The ``2-of-8`` of a file that is a part of a checkpoint.
_PART = re.compile(r"\d+-of-0*(\d+)", re.ASCII)
#: A whole number: not one with a decimal point, as in ``loss=0.25``.
_NUMBER = re.compile(r"(?<!\d)(?<!\d\.)(\d+)(?!\d)(?!\.\d)", re.ASCII)
#: ``step_100``, ``global_step100``.
_STEP = re.compile(rf"steps?[-_= ]?{_NUMBER.pattern}", re.ASCII | re.IGNORECASE)
#: ``20261128``, ``2026-11-28``, either with a time behind it.
_DATE = re.compile(
    r"(?<!\d)(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])"
    r"(?:[-_T ]?[0-2]\d[-_:.]?[0-5]\d(?:[-_:.]?[0-5]\d)?)?(?!\d)",
    re.ASCII,
)
#: What a checkpoint of some step is called: ``step_100``, ``checkpoint-100``, ``epoch=3``, ``iter_0000100``.
_CALLED = re.compile(r"(?:step|checkpoint|ckpt|epoch|iter|iteration)s?[-_= ]?\d", re.ASCII | re.IGNORECASE)
#: Files that a folder of checkpoints may hold; Lightning's are torch's by another name.
_CHECKPOINTS = (*files.READABLE, ".ckpt")


def find(patterns: Iterable[str]) -> list[Path]:
    """Return the files that names and shell patterns stand for, each once, sorted.

    Parameters
    ----------
    patterns : iterable of str
        The name of a file, or a pattern of `glob.glob`, in which ``**`` goes into directories.

    Raises
    ------
    NotFoundError
        If one stands for no file.
    """
    found: set[str] = set()
    for pattern in patterns:
        names = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)  # noqa: PTH207
        if not names:
            raise NotFoundError(f"{pattern}: no such file", hint="check the path, and quote patterns")
        found.update(names)
    return [Path(name) for name in sorted(found)]


def find_checkpoints(patterns: Iterable[str]) -> list[Path]:
    """Return the checkpoints that names and shell patterns stand for, each a step: files or directories.

    A directory whose name is that of a checkpoint, as ``checkpoint-100`` is, is one, unless there are several
    in it, as in ``iter2_runs``; of any other its series is taken: the files and directories in it whose names
    differ by their numbers alone.  Where there are several such series, those that are called steps,
    checkpoints, epochs or iterations are meant.

    Raises
    ------
    NotFoundError
        If one stands for no file, or a directory holds no series.
    InvalidInputError
        If a directory holds several; lists them.
    """
    return [
        step
        for path in find(patterns)
        for step in (_within(path) if path.is_dir() and not _is_checkpoint(path) else [path])
    ]


def passed_over(patterns: Iterable[str], checkpoints: Iterable[Path]) -> list[Path]:
    """Return what else is in the folders that checkpoints were found in, hidden files apart.

    Whoever deletes the originals must know what of them is nowhere else.
    """
    taken = set(checkpoints)
    folders = [path for path in find(patterns) if path.is_dir() and path not in taken]
    return [
        path
        for folder in folders
        for path in sorted(folder.iterdir())
        if path not in taken and not path.name.startswith(".")
    ]


def _is_checkpoint(folder: Path) -> bool:
    is_called = _CALLED.search(folder.resolve().name) is not None
    return is_called and not any(len(paths) > 1 for paths in _called(_series(folder)).values())


def _called(found: Mapping[str, list[Path]]) -> dict[str, list[Path]]:
    return {pattern: paths for pattern, paths in found.items() if _CALLED.search(paths[0].name)}


def _series(folder: Path) -> dict[str, list[Path]]:
    """Return the files and directories in it that may be checkpoints, by what their names have in common."""
    found: dict[str, list[Path]] = defaultdict(list)
    with targets.storage_errors(folder):
        paths = sorted(folder.iterdir())
    for path in paths:
        name = path.name
        is_one = path.is_dir() or path.suffix.lower() in _CHECKPOINTS
        if is_one and not name.startswith((".", "_")) and not _PART.search(name) and _NUMBER.search(name):
            found[re.sub(r"\d+(?:\.\d+)?", "*", name)].append(path)
    return found


def _within(folder: Path) -> list[Path]:
    found = _series(folder)
    several = _called(found) or found
    if not several:
        raise NotFoundError(
            f"{folder}: holds no series of checkpoints",
            hint="a file or directory in it, with a number in its name, for each step; or name them",
        )
    if len(several) > 1:
        patterns = [str(folder / pattern) for pattern in several]
        raise InvalidInputError(
            f"{folder}: holds several series: {', '.join(patterns)}", hint="name one of them"
        )
    return next(iter(several.values()))


def steps_of(paths: Iterable[P]) -> dict[P, int]:
    """Read from the names of files which step each of them is.

    The number that follows the word ``step``, if every path has one and they are not all the same; else the
    last number that is not the same in all paths, counted from the end.  A number is a run of digits without
    a decimal point, and not the ``2-of-8`` of a part, nor a date if every path has one and another number;
    names that have not the same count of them are not compared.  A directory counts as a part of the name.
    A path that is alone has nothing to differ from: it takes the last number of its file's and its
    directory's name.

    Parameters
    ----------
    paths : iterable of path

    Returns
    -------
    dict of path to int
        In the order of the steps.

    Raises
    ------
    InvalidInputError
        If a path has no number, two have the same, or one is a part of a checkpoint; lists them.

    Examples
    --------
    >>> steps_of(["run2/step_000100.pt", "run2/step_000020.pt"])
    {'run2/step_000020.pt': 20, 'run2/step_000100.pt': 100}
    >>> list(steps_of(["epoch=3-step=1200.pt", "epoch=4-step=1600.pt"]).values())
    [1200, 1600]
    >>> list(steps_of(["checkpoint-100-20261128", "checkpoint-200-20261129"]).values())
    [100, 200]
    """
    by_text = {str(path): path for path in paths}
    texts = list(by_text)
    names = [str(Path(*Path(texts[0]).parts[-_N_PARTS:]))] if len(texts) == 1 else texts
    _refuse([t for t in texts if any(int(n) > 1 for n in _PART.findall(t))], "is one part of a checkpoint")
    names = [_PART.sub("", name) for name in names]
    found = _called_steps(names) or _last_but_dates(names)
    _refuse([t for t, n in zip(texts, found, strict=True) if n is None], "has no number that tells its step")
    steps = {t: int(n) for t, n in zip(texts, found, strict=True) if n is not None}
    _refuse([f"{t} ({s})" for t, s in steps.items() if s > STEP_MAX], f"has a number above {STEP_MAX}")
    same: dict[int, list[str]] = defaultdict(list)
    for text, step in steps.items():
        same[step].append(text)
    twice = {step: names for step, names in same.items() if len(names) > 1}
    _refuse([f"{', '.join(n)} ({s})" for s, n in sorted(twice.items())], "have the same step in their names")
    return {by_text[text]: steps[text] for text in sorted(steps, key=lambda t: steps[t])}


def _called_steps(names: Sequence[str]) -> list[str | None] | None:
    """Return the numbers that are called steps, if they tell the names apart."""
    found = [_STEP.findall(name) for name in names]
    if not all(found):
        return None
    last = [numbers[-1] for numbers in found]
    return list(last) if len(last) == 1 or len(set(map(_value, last))) > 1 else None


def _last_but_dates(names: Sequence[str]) -> list[str | None]:
    """Return the last numbers that differ and are no dates; dates, if there are no others."""
    if all(map(_DATE.search, names)):
        found = _last_that_differ([_DATE.sub("", name) for name in names])
        if None not in found:
            return found
    return _last_that_differ(names)


def _last_that_differ(names: Sequence[str]) -> list[str | None]:
    """Return of each name the last number that is not the same in all; None where there is none."""
    found = [_NUMBER.findall(name) for name in names]
    if all(found) and len(set(map(len, found))) > 1:
        return [None] * len(names)  # what would be compared with what?
    for back in range(1, min(map(len, found), default=0) + 1):
        values = [numbers[-back] for numbers in found]
        if len(values) == 1 or len(set(map(_value, values))) > 1:
            return list(values)
    # All that they have is the same: those with as few numbers as any are to blame.
    return [None] * len(names) if all(found) else [n[-1] if n else None for n in found]


def _value(number: str) -> str:
    return number.lstrip("0")


def _refuse(
    names: Sequence[str], why: str, hint: str = "rename, or save one file at a time with --step"
) -> None:
    if names:
        raise InvalidInputError(f"{why}: {_listed('', names, '; ')}", hint=hint)


def _listed(noun: str, items: Iterable[str], between: str = ", ") -> str:
    """Return the first few of some things, and how many more there are."""
    names = list(items)
    more = f" and {len(names) - _N_NAMED} more" if len(names) > _N_NAMED else ""
    plural = noun and noun + ("s " if len(names) > 1 else " ")
    return plural + between.join(names[:_N_NAMED]) + more


@dataclass(frozen=True, slots=True)
class Saved:
    """One file or directory of a series, saved, or passed over.

    Parameters
    ----------
    path : Path
    step : int
    file_size : int
        Bytes of the file, or of all files in the directory.
    report : SaveReport or None
        None: the run had the step already.
    """

    path: Path
    step: int
    file_size: int
    report: SaveReport | None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        report = self.report.to_json() if self.report else {"step": self.step}
        return {"path": str(self.path), "file_size": self.file_size, "saved": bool(self.report), **report}

    def __str__(self) -> str:
        return f"{self.path}: {self.report or f'step {self.step} is there already'}"


@dataclass(frozen=True, slots=True)
class Total:
    """What a series took, against storing every file whole.

    Parameters
    ----------
    n_saved, n_skipped : int
        Files.
    file_size, written_size : int
        Bytes of the files that were saved, and of what was written for them.
    total_s : float
        Reading the files included.

    Examples
    --------
    >>> print(Total(12, 0, 13_200_000_000, 1_100_000_000, 60.0))
    12 steps: 13.2 GB in files, 1.1 GB written: 12.0 times smaller than every file whole, 60.0 s
    """

    n_saved: int
    n_skipped: int
    file_size: int
    written_size: int
    total_s: float

    @classmethod
    def of(cls, done: Sequence[Saved], total_s: float) -> Total:
        """Add up."""
        reports = [(one, one.report) for one in done if one.report]
        return cls(
            len(reports),
            len(done) - len(reports),
            sum(one.file_size for one, _ in reports),
            sum(report.written_size for _, report in reports),
            total_s,
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.n_saved} step{'' if self.n_saved == 1 else 's'}"
        if self.n_skipped:
            text += f", {self.n_skipped} there already"
        if self.n_saved:
            text += (
                f": {human_size(self.file_size)} in files, {human_size(self.written_size)} written: "
                f"{self.file_size / max(1, self.written_size):.1f} times smaller than every file whole"
            )
        return f"{text}, {human_time(self.total_s)}"


def save(
    steps: Mapping[Path, int],
    store: Where,
    *,
    run: str = "main",
    existing: Existing = "refuse",
    optimize: Optimize = "bytes",
    metrics: Mapping[str, float] | None = None,
    as_files: bool = False,
    progress: Callable[[int, int, str], None] = lambda done_size, total_size, now: None,
) -> Iterator[Saved]:
    """Save files as steps of a run, one after another; yield each when it is durable.

    Of a file the state in it is saved, of a directory its files as they are, as `save_files` does.

    What can be checked is checked before the first is saved.  A series that breaks off all the same leaves
    the steps it has saved.

    Parameters
    ----------
    steps : mapping of Path to int
        As `steps_of` gives them; saved in this order.
    store : path, Backend or Store
        Made when the first file has been read, if there is none.
    run : str
    existing : {"refuse", "overwrite", "skip"}
        What to do about steps that are there already.
    optimize : {"bytes", "time", "energy"}
        As of `deltackpt.open_run`; by default the smallest, since no training waits for it.
    metrics : dict of str to float, optional
        Of every step.
    as_files : bool
        Save files as they are too, and not the states in them.
    progress : callable
        Is told the bytes of files done, of all, and which is read now.

    Raises
    ------
    AlreadyExistsError
        If the run has some of the steps, and `existing` is ``"refuse"``.
    InvalidInputError
        If a file is of a kind that cannot be read.
    """
    _refuse(
        [
            str(path)
            for path in steps
            if not as_files and not path.is_dir() and path.suffix.lower() not in files.READABLE
        ],
        f"is none of {', '.join(files.READABLE)}",
        "name files of these kinds, as in 'ckpt/*.pt'",
    )
    there, pinned = (found & set(steps.values()) for found in _steps_there(store, run))
    if there and existing == "refuse":
        raise AlreadyExistsError(
            f"run {run!r} has {_listed('step', map(str, sorted(there)))} already",
            hint=("" if as_files else "--overwrite replaces, ") + "--skip-existing passes over what is there",
        )
    if pinned and existing == "overwrite":
        are = "is" if len(pinned) == 1 else "are"
        raise InvalidInputError(
            f"run {run!r} {_listed('step', map(str, sorted(pinned)))} {are} pinned",
            hint="deltackpt pin STEP --undo, or leave them out",
        )
    sizes = {path: _size(path) for path in steps}
    total_size, done_size = sum(sizes.values()), 0
    with ExitStack() as opened:
        folders: FolderSaver | None = None
        for number, (path, step) in enumerate(steps.items(), 1):
            progress(done_size, total_size, f"saving {path} ({number} of {len(steps)})")
            report = None
            if step in there and existing != "overwrite":
                pass
            elif as_files or path.is_dir():
                found = Found(path, step)  # before a store is made
                if folders is None:
                    folders = FolderSaver(opened.enter_context(open_run(store, run, optimize=optimize)))
                report = folders.save(found, metrics=metrics, overwrite=existing == "overwrite")
            else:
                report = delta.save(
                    files.read_state(path),
                    store,
                    step=step,
                    run=run,
                    metrics=metrics,
                    overwrite=existing == "overwrite",
                    optimize=optimize,
                )
            done_size += sizes[path]
            yield Saved(path, step, sizes[path], report)


def _steps_there(store: Where, run: str) -> tuple[set[int], set[int]]:
    """Return the steps of a run, and those that are pinned."""
    try:
        opened = open_run(store, run, create=False)
    except NotFoundError:  # no store yet
        return set(), set()
    return set(opened.steps()), set(opened.pinned())


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())
    return path.stat().st_size if path.is_file() else 0  # whatever reads it says what is wrong with it
