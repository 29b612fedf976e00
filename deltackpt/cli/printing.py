"""Printing: what commands put on stdout and stderr.

Owns   which stream what goes to, the style of tables, the line of progress, quiet, and how figures read.
Never  asks the store, or lets a name from a file command the terminal.

Data and news of what was done go to stdout, all else to stderr.  A line of output is a line: nothing is
folded, and styles are for terminals alone.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import IO, Any

import click

from deltackpt import report
from deltackpt.report import human_size

_QUIET = "deltackpt.quiet"
_REDRAW_S = 0.1


def be_quiet() -> None:
    """Print no progress and no news from here on; data that was asked for, and errors, still are."""
    click.get_current_context().meta[_QUIET] = True


def is_quiet() -> bool:
    """Return whether `be_quiet` was said."""
    ctx = click.get_current_context(silent=True)
    return bool(ctx and ctx.meta.get(_QUIET))


def is_terminal(stream: IO[str] | None) -> bool:
    """Return whether someone is looking; a stream that was closed is None."""
    return stream is not None and stream.isatty()


def has_style(stream: IO[str] | None) -> bool:
    """Return whether a stream may be sent escape codes (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def plain(text: str) -> str:
    """Return text without what a terminal would obey, but for new lines: names come from files."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def answer(shown: str, data: Any, as_json: bool) -> None:
    """Print what was asked for, as text or as one JSON document."""
    line.erase()
    if as_json:
        click.echo(json.dumps(data))
    else:
        click.echo(plain(shown))


def tell(shown: str, data: Any, as_json: bool) -> None:
    """Print what was done, as `answer` does; the text only if no quiet was asked for."""
    if as_json or not is_quiet():
        answer(shown, data, as_json)


def note(text: str) -> None:
    """Print on stderr what is no data: errors, hints, warnings."""
    line.erase()
    click.echo(plain(text), err=True)


class Notes(logging.Handler):
    """Warnings of the library, as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        note(f"{record.levelname.lower()}: {record.getMessage()}")


# -- tables


def answer_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], data: Any, as_json: bool, *, empty: str = ""
) -> None:
    """Print a table that was asked for, or `empty` if it has no rows; with `as_json` the data instead."""
    if as_json or not rows:
        answer(empty, data, as_json)
    else:
        click.echo(table(columns, rows, bold=has_style(sys.stdout)))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, bold: bool = False) -> str:
    """Return a table as `report.table` does, its head bold if there is one."""
    head, _, rest = report.table(columns, rows).partition("\n")
    if bold and any(column.removeprefix(">") for column in columns):
        head = click.style(head, bold=True)
    return "\n".join([head, rest] if rest else [head])


# -- progress


class _Line:
    """The line that says what is going on, on a terminal: drawn over itself, gone when it is over.

    It takes no escape codes: carriage returns and blanks do.
    """

    def __init__(self) -> None:
        self._drawn = 0

    def draw(self, text: str) -> None:
        """Show a text in place of the one before."""
        text = plain(text)[: shutil.get_terminal_size().columns - 1]
        click.echo("\r" + text.ljust(self._drawn), err=True, nl=False)
        self._drawn = len(text)

    def erase(self) -> None:
        """Leave the line empty."""
        if self._drawn:
            click.echo("\r" + " " * self._drawn + "\r", err=True, nl=False)
            self._drawn = 0


line = _Line()


@contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """Yield what to tell the bytes done, the bytes in all, and what it is about; shown on a terminal."""
    if is_quiet() or not is_terminal(sys.stderr):
        yield lambda done_size, total_size, now=what: None
        return
    start = time.monotonic()
    last, last_now = start, what

    def told(done_size: int, total_size: int, now: str = what) -> None:
        nonlocal last, last_now
        at = time.monotonic()
        if at - last < _REDRAW_S and now == last_now:
            return
        last, last_now = at, now
        share = f"{100 * done_size / total_size:3.0f} %" if total_size else ""
        speed = f"{human_size(int(done_size / (at - start)))}/s" if at - start > 1 else ""
        line.draw(f"{now}  {share}  {human_size(done_size)} of {human_size(total_size)}  {speed}")

    try:
        line.draw(what)
        yield told
    finally:
        line.erase()


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Say what is going on while it lasts, on a terminal."""
    with progress(what):
        yield


# -- figures


def when(created_s: float) -> str:
    """Return a moment in local time."""
    try:
        return datetime.fromtimestamp(created_s).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):  # a clock that was far off
        return f"{created_s:g} s"


def figures(metrics: Mapping[str, float]) -> str:
    """Return metrics in one line."""
    return " ".join(f"{name}={value:g}" for name, value in metrics.items())


def percent(part: float) -> str:
    """Return a ratio as a percentage."""
    return f"{100 * part:.2f} %"
