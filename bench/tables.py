"""Results in words: one table for the terminal, one for Markdown, and where a peer is better.

Owns   the measures, their order and units, and which figure of a row is the best.
Never  measures, and never leaves a cell out: what failed or is not installed says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from deltackpt.report import human_size

OURS = "deltackpt"
REFERENCE = "torch.save"


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that is compared; less is better.

    Parameters
    ----------
    key : str
        Its name in the results.
    title : str
    """

    key: str
    title: str

    @property
    def is_time(self) -> bool:
        return self.key.endswith("_s")

    def text(self, value: float) -> str:
        return f"{value:.3g} s" if self.is_time else human_size(round(value))


MEASURES = (
    Measure("stored_size", "bytes stored, all saves of the series"),
    Measure("save_s", "seconds saving, all saves of the series"),
    Measure("restore_s", "seconds restoring the last save"),
    Measure("save_memory_size", "memory beyond the state, saving"),
    Measure("restore_memory_size", "memory in all, restoring"),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One tool's figure in a row.

    Parameters
    ----------
    spread : dict or None
        Its median, min and max; None if there is no figure.
    text, detail : str
        The figure, or why there is none; and its spread, or what share of torch.save's it is.
    """

    spread: dict[str, float] | None
    text: str
    detail: str


@dataclass(frozen=True, slots=True)
class Row:
    """One measure of one regime, tool by tool."""

    measure: Measure
    regime: str
    cells: dict[str, Cell]

    @property
    def best(self) -> set[str]:
        """The tools with the least, shown alike."""
        figures = {peer: cell for peer, cell in self.cells.items() if cell.spread}
        if not figures:
            return set()
        least = min(figures.values(), key=lambda cell: cell.spread["median"])
        return {peer for peer, cell in figures.items() if cell.text == least.text}


def rows(results: dict[str, Any], measure: Measure) -> Iterator[Row]:
    """The rows of a measure, one a regime."""
    for regime, series in results["regimes"].items():
        figures = {peer: series["peers"].get(peer) for peer in results["peers"]}
        yield Row(measure, regime, {peer: cell(measure, figures, peer) for peer in figures})


def cell(measure: Measure, figures: dict[str, Any], peer: str) -> Cell:
    found = figures[peer]
    if found is None:
        return Cell(None, "-", "")
    if "failed" in found:
        return Cell(None, "failed", "")
    if not found["lossless"]:
        return Cell(None, "not lossless", "")
    spread = found[measure.key]
    detail = ""
    if measure.is_time and spread["min"] < spread["max"]:
        detail = f"{spread['min']:.3g}-{spread['max']:.3g}"
    elif measure.key == "stored_size" and "stored_size" in (figures.get(REFERENCE) or {}):
        detail = f"{spread['median'] / figures[REFERENCE]['stored_size']['median']:.3f}"
    return Cell(spread, measure.text(spread["median"]), detail)


def heading(results: dict[str, Any]) -> str:
    """What was measured, on what, and which versions."""
    machine = results["machine"]
    versions = [
        f"{peer} {facts['version']}" for peer, facts in results["peers"].items() if facts["installed"]
    ]
    return (
        f"size {results['size']}, seed {results['seed']}, medians of {results['repeats']}; "
        f"{machine['n_cores']} cores, Python {machine['python']}, {machine['kernels']}; {', '.join(versions)}"
    )


def absent(results: dict[str, Any]) -> list[str]:
    """What is not installed, with the command that installs it."""
    return [
        f"{peer}: not installed, {facts['install']}"
        for peer, facts in results["peers"].items()
        if not facts["installed"]
    ]


def failures(results: dict[str, Any]) -> list[str]:
    return [
        f"{peer} failed on {regime}: {found['failed']}"
        for regime, series in results["regimes"].items()
        for peer, found in series["peers"].items()
        if "failed" in found
    ]


def losses(results: dict[str, Any]) -> list[str]:
    """In words, every figure in which a peer is better than deltackpt."""
    return [text for measure in MEASURES for row in rows(results, measure) for text in losses_of(row)]


def losses_of(row: Row) -> Iterator[str]:
    ours = row.cells.get(OURS)
    if ours is None or ours.spread is None:
        return
    better = []
    for peer, theirs in row.cells.items():
        if theirs.spread and theirs.spread["median"] < ours.spread["median"]:
            share = theirs.spread["median"] / max(ours.spread["median"], 1e-9)
            overlap = ", spreads overlap" if theirs.spread["max"] >= ours.spread["min"] else ""
            better.append(f"{peer} {theirs.text} ({share:.3g} of it{overlap})")
    if better:
        yield f"{row.measure.title}, {row.regime}: {OURS} {ours.text}; {', '.join(better)}"


def terminal(results: dict[str, Any]) -> Table:
    """All measures as one table, the best of each row bold."""
    table = Table(title=heading(results), caption="\n".join(absent(results)) or None)
    table.add_column("regime")
    for peer, facts in results["peers"].items():
        table.add_column(peer if facts["installed"] else f"{peer}\nnot installed", justify="right")
    for measure in MEASURES:
        table.add_section()
        table.add_row(f"[italic]{measure.title}[/]")
        for row in rows(results, measure):
            shown = [
                f"[bold green]{cell.text}[/]\n{cell.detail}"
                if peer in row.best
                else f"{cell.text}\n{cell.detail}"
                for peer, cell in row.cells.items()
            ]
            table.add_row(row.regime, *(text.strip() for text in shown))
    return table


def markdown(results: dict[str, Any]) -> str:
    """The same for a page: a table a measure, then what is absent, and where peers are better."""
    parts = [f"{heading(results)}.\n"]
    names = [p if f["installed"] else f"{p} (not installed)" for p, f in results["peers"].items()]
    for measure in MEASURES:
        parts += [f"**{measure.title}**\n", "| " + " | ".join(["regime", *names]) + " |"]
        parts.append("|---|" + "---:|" * len(names))
        for row in rows(results, measure):
            texts = [f"**{c.text}**" if p in row.best else c.text for p, c in row.cells.items()]
            details = [f" ({c.detail})" if c.detail else "" for c in row.cells.values()]
            cells = [text + detail for text, detail in zip(texts, details, strict=True)]
            parts.append("| " + " | ".join([row.regime, *cells]) + " |")
        parts.append("")
    parts += [f"* {line}" for line in [*absent(results), *failures(results)]]
    parts += ["", f"**Where a peer is better than {OURS}**\n"]
    parts += [f"* {line}" for line in losses(results)] or ["Nowhere in this run."]
    return "\n".join(parts) + "\n"
