"""Results in words: one table for the terminal, one for Markdown, and where a peer is better.

Owns   the measures, their order and units, and which figure of a row is the best; of the series of regimes,
       and of the cases of codecs.
Never  measures, and never leaves a cell out: what failed or is not installed says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from deltackpt.report import human_size

OURS = "deltackpt"
#: The same as by default, where what is stored goes by the speed of the disk.
IN_TIME = "deltackpt (time)"
REFERENCE = "torch.save"


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that is compared.

    Parameters
    ----------
    key : str
        Its name in the results.
    title : str
    unit : {"B", "s", "GB/s", ""}
        Less is better, but of GB/s; none for a share of the raw bytes.
    """

    key: str
    title: str
    unit: str

    @property
    def is_time(self) -> bool:
        return self.unit in ("s", "GB/s")

    def text(self, value: float) -> str:
        return {
            "B": lambda: human_size(round(value)),
            "s": lambda: f"{value:.3g} s",
            "GB/s": lambda: f"{value:.2f}",
            "": lambda: f"{value:.4f}",
        }[self.unit]()

    def is_better(self, value: float, than: float) -> bool:
        return value > than if self.unit == "GB/s" else value < than

    def best(self, spread: dict[str, float]) -> float:
        """Of the repeats."""
        return spread["max" if self.unit == "GB/s" else "min"]

    def worst(self, spread: dict[str, float]) -> float:
        return spread["min" if self.unit == "GB/s" else "max"]


MEASURES = (
    Measure("stored_size", "bytes stored, all saves of the series", "B"),
    Measure("save_s", "seconds saving, all saves of the series", "s"),
    Measure("restore_s", "seconds restoring the last save", "s"),
    Measure("save_memory_size", "memory beyond the state, saving", "B"),
    Measure("restore_memory_size", "memory in all, restoring", "B"),
)
CODEC_MEASURES = (
    Measure("ratio", "stored / raw", ""),
    Measure("encode_gb_s", "encoding, GB/s of a core", "GB/s"),
    Measure("decode_gb_s", "decoding, GB/s of a core", "GB/s"),
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
    """One measure of one regime or case, tool by tool."""

    measure: Measure
    regime: str
    cells: dict[str, Cell]

    @property
    def best(self) -> set[str]:
        """The tools with the best figure, shown alike."""
        figures = {peer: cell for peer, cell in self.cells.items() if cell.spread}
        if not figures:
            return set()
        pick = max if self.measure.unit == "GB/s" else min
        best = pick(figures.values(), key=lambda cell: cell.spread["median"])
        return {peer for peer, cell in figures.items() if cell.text == best.text}


def regimes(results: dict[str, Any]) -> dict[str, Any]:
    """What the rows are: regimes, or cases of codecs."""
    return results["cases"] if "cases" in results else results["regimes"]


def measures(results: dict[str, Any]) -> tuple[Measure, ...]:
    return CODEC_MEASURES if "cases" in results else MEASURES


def is_other(results: dict[str, Any], peer: str) -> bool:
    """Whether it is not a part of deltackpt, shown beside it."""
    return not results["peers"][peer].get("is_part", False)


def rows(results: dict[str, Any], measure: Measure) -> Iterator[Row]:
    """The rows of a measure, one a regime."""
    for regime, series in regimes(results).items():
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
        f"{peer} {facts['version']}"
        for peer, facts in results["peers"].items()
        if facts["installed"] and is_other(results, peer)
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
        for regime, series in regimes(results).items()
        for peer, found in series["peers"].items()
        if "failed" in found
    ]


def losses(results: dict[str, Any]) -> list[str]:
    """In words, every figure in which a peer is better than deltackpt."""
    others = {peer for peer in results["peers"] if is_other(results, peer)}
    return [
        text
        for measure in measures(results)
        for row in rows(results, measure)
        for text in losses_of(row, others)
    ]


def losses_of(row: Row, others: set[str]) -> Iterator[str]:
    ours, is_better = row.cells.get(OURS), row.measure.is_better
    if ours is None or ours.spread is None:
        return
    better = []
    for peer, theirs in row.cells.items():
        if peer in others and theirs.spread and is_better(theirs.spread["median"], ours.spread["median"]):
            share = theirs.spread["median"] / max(ours.spread["median"], 1e-9)
            is_apart = is_better(row.measure.worst(theirs.spread), row.measure.best(ours.spread))
            overlap = "" if is_apart else ", spreads overlap"
            better.append(f"{peer} {theirs.text} ({share:.3g} of it{overlap})")
    if better:
        yield f"{row.measure.title}, {row.regime}: {OURS} {ours.text}; {', '.join(better)}"


def terminal(results: dict[str, Any]) -> Table:
    """All measures as one table, the best of each row bold."""
    table = Table(title=heading(results), caption="\n".join(absent(results)) or None)
    table.add_column("case" if "cases" in results else "regime", no_wrap=True)
    for peer, facts in results["peers"].items():
        table.add_column(peer if facts["installed"] else f"{peer}\nnot installed", justify="right")
    for measure in measures(results):
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
    parts, first = [f"{heading(results)}.\n"], "case" if "cases" in results else "regime"
    names = [p if f["installed"] else f"{p} (not installed)" for p, f in results["peers"].items()]
    for measure in measures(results):
        parts += [f"**{measure.title}**\n", "| " + " | ".join([first, *names]) + " |"]
        parts.append("|---|" + "---:|" * len(names))
        for row in rows(results, measure):
            texts = [f"**{c.text}**" if p in row.best else c.text for p, c in row.cells.items()]
            details = [f" ({c.detail})" if c.detail else "" for c in row.cells.values()]
            cells = [text + detail for text, detail in zip(texts, details, strict=True)]
            parts.append("| " + " | ".join([row.regime, *cells]) + " |")
        parts.append("")
    if "cases" in results:
        lines = [CASE_COLUMNS, *case_rows(results)]
        lines.insert(1, ["---", *["---:"] * (len(CASE_COLUMNS) - 1)])
        parts += [*("| " + " | ".join(line) + " |" for line in lines), ""]
    parts += [f"* {line}" for line in [*absent(results), *failures(results)]]
    parts += ["", f"**Where a peer is better than {OURS}**\n"]
    parts += [f"* {line}" for line in losses(results)] or ["Nowhere in this run."]
    return "\n".join(parts) + "\n"


CASE_COLUMNS = ["case", "raw", "elements changed", "took, share of chunks", "over the oracle", "2 threads"]


def case_rows(results: dict[str, Any]) -> Iterator[list[str]]:
    """What each case is, and what deltackpt made of it."""
    for case, facts in results["cases"].items():
        ours = facts["peers"].get(OURS, {})
        taken = ", ".join(f"{name} {share:.0%}" for name, share in ours.get("taken", {}).items())
        over, faster = ours.get("over_oracle"), ours.get("two_threads")
        yield [
            case,
            human_size(facts["raw_size"]),
            f"{facts['changed']:.2%}",
            taken or "-",
            "-" if over is None else f"{over:.2%}",
            "-" if faster is None else f"{faster['median']:.2f}x",
        ]


def cases(results: dict[str, Any]) -> Table:
    """The same for the terminal."""
    table = Table()
    for column in CASE_COLUMNS:
        table.add_column(column)
    for row in case_rows(results):
        table.add_row(*row)
    return table
