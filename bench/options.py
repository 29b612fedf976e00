"""The options that benches of single saves share, and how their results are shown.

Owns   --size-mib, --repeats, --dir, --json and --markdown, a temporary folder to write in, tables as text.
Never  measures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from meter import machine
from peers import Tool

from deltackpt import report


class Table(NamedTuple):
    """Some results in words; a column whose name starts with ``>`` is aligned right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        return f"{self.title}\n\n{report.table(self.columns, self.rows)}\n"

    def markdown(self) -> str:
        names = [column.removeprefix(">") for column in self.columns]
        rules = ["---:" if column.startswith(">") else "---" for column in self.columns]
        lines = ["| " + " | ".join(cells) + " |" for cells in (names, rules, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, ""])


def parser(about: str | None, *, size_mib: int, repeats: int) -> argparse.ArgumentParser:
    """Return a parser of what all of them take; `about` is the bench's docstring."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size-mib", type=int, default=size_mib, help=f"size of the state; default {size_mib}")
    made.add_argument("--repeats", type=int, default=repeats, help=f"default {repeats}")
    made.add_argument("--dir", type=Path, help="where to write; default a temporary directory here")
    made.add_argument("--json", type=Path, help="write the results to this file")
    made.add_argument("--markdown", type=Path, help="write the tables to this file")
    return made


@contextmanager
def folder(options: argparse.Namespace) -> Iterator[Path]:
    """Make a folder to write in, and remove it."""
    with tempfile.TemporaryDirectory(dir=options.dir or Path.cwd(), prefix="bench-") as name:
        yield Path(name)


def split(names: Sequence[str], kinds: Mapping[str, type[Tool]]) -> tuple[list[str], list[str]]:
    """Return the tools that are installed, and what to say of those that are not."""
    absent = [name for name in names if not kinds[name].is_installed()]
    notes = [f"{name}: not installed, {kinds[name].install}" for name in absent]
    return [name for name in names if name not in absent], notes


def show(
    options: argparse.Namespace, results: dict[str, Any], tables: Sequence[Table], notes: Sequence[str]
) -> None:
    """Print tables and notes; write what was asked for."""
    if options.json:
        body = {"machine": machine(), **results, "notes": list(notes)}
        options.json.write_text(json.dumps(body, indent=1) + "\n")
    if options.markdown:
        lines = [*(table.markdown() for table in tables), *(f"* {note}" for note in notes)]
        options.markdown.write_text("\n".join(lines) + "\n")
    print("\n".join([*(table.text() for table in tables), *notes]))
