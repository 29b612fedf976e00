"""Results as pictures, each an SVG and a PNG.

Owns   the look: one colour and one marker a tool in every picture, told apart without colour too.
Never  computes a figure that is not in the results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from tables import OURS, REFERENCE

#: Okabe and Ito's palette, safe for the colour-blind, and a marker for those who print in grey.
LOOKS = {
    "deltackpt": ("#000000", "o"),
    "deltackpt (time)": ("#000000", "."),
    "torch.save": ("#999999", "|"),
    "safetensors": ("#F0E442", "s"),
    "zstd -3": ("#56B4E9", "v"),
    "zipnn": ("#009E73", "^"),
    "z4ai": ("#D55E00", "D"),
    "restic": ("#CC79A7", "P"),
    "borg": ("#E69F00", "X"),
    "casync": ("#0072B2", "*"),
    # More tools than the palette has colours: greys, and a brown.
    "DCP": ("#666666", "<"),
    "Orbax": ("#8B5A2B", ">"),
    "git-lfs": ("#BBBBBB", "d"),
}


def draw_all(results: dict[str, Any], folder: Path) -> None:
    """Write every picture into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.size": 10, "svg.hashsalt": "deltackpt", "svg.fonttype": "none"}):
        write(folder / "stored", draw_stored(results))
        write(folder / "seconds", draw_seconds(results))
        write(folder / "growth", draw_growth(results))


def write(path: Path, figure: Figure) -> None:
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=130)
    plt.close(figure)


def figures(results: dict[str, Any], regime: str) -> dict[str, Any]:
    """The tools that have figures for a regime."""
    peers = results["regimes"][regime]["peers"]
    return {peer: found for peer, found in peers.items() if found.get("lossless")}


def draw_stored(results: dict[str, Any]) -> Figure:
    """Bytes of the whole series over those of torch.save, on a logarithmic scale."""
    figure, axes = dots_frame(
        results, f"bytes stored of a whole series, {REFERENCE} = 1; further left is better"
    )
    for y, regime in enumerate(results["regimes"]):
        found = figures(results, regime)
        if REFERENCE in found:
            whole = found[REFERENCE]["stored_size"]["median"]
            for peer, facts in found.items():
                if peer != REFERENCE:
                    dot(axes, peer, facts["stored_size"]["median"] / whole, y + offset(peer))
    axes.axvline(1, color=LOOKS[REFERENCE][0], linewidth=1.5, label=REFERENCE, zorder=1)
    legend(figure, axes)
    return figure


def draw_seconds(results: dict[str, Any]) -> Figure:
    """Seconds of all saves of a series, the line from the fastest repeat to the slowest."""
    figure, axes = dots_frame(
        results, "seconds for all saves of a series, until durable; further left is better"
    )
    for y, regime in enumerate(results["regimes"]):
        for peer, facts in figures(results, regime).items():
            seconds, at = facts["save_s"], y + offset(peer)
            axes.plot(
                [seconds["min"], seconds["max"]], [at, at], color=LOOKS[peer][0], linewidth=1.5, zorder=2
            )
            dot(axes, peer, seconds["median"], at)
    legend(figure, axes)
    return figure


def dots_frame(results: dict[str, Any], label: str) -> tuple[Figure, Axes]:
    """Axes with a line for each regime."""
    regimes = list(results["regimes"])
    figure, axes = plt.subplots(figsize=(9, 1.8 + 0.5 * len(regimes)), layout="constrained")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_yticks(range(len(regimes)), regimes)
    axes.set_ylim(len(regimes) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="both", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for y in range(1, len(regimes)):
        axes.axhline(y - 0.5, color="#eeeeee", linewidth=0.8, zorder=0)
    return figure, axes


def offset(peer: str) -> float:
    """How far from its regime's line a tool is drawn, so that equal figures do not hide each other."""
    return 0.72 * (list(LOOKS).index(peer) / (len(LOOKS) - 1) - 0.5)


def dot(axes: Axes, peer: str, x: float, y: float) -> None:
    colour, marker = LOOKS[peer]
    edge = {} if marker == "|" else {"edgecolors": "#333333", "linewidths": 0.6}  # a stroke has no edge
    size = 75 if peer == OURS else 48
    axes.scatter([x], [y], s=size, c=colour, marker=marker, label=peer, zorder=3, **edge)


def draw_growth(results: dict[str, Any]) -> Figure:
    """Bytes of the store after each save, a panel a regime."""
    regimes = list(results["regimes"])
    n_columns = min(3, len(regimes))
    n_lines = -(-len(regimes) // n_columns)
    figure, panels = plt.subplots(
        n_lines,
        n_columns,
        figsize=(3.4 * n_columns, 0.9 + 2.4 * n_lines),
        squeeze=False,
        layout="constrained",
    )
    most = max((f["stored_size"]["max"] for r in regimes for f in figures(results, r).values()), default=0)
    unit, unit_name = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    for axes, regime in zip(panels.flat, regimes, strict=False):
        for peer, facts in figures(results, regime).items():
            colour, marker = LOOKS[peer]
            sizes = [size / unit for size in facts["stored_sizes"]]
            saves = range(1, len(sizes) + 1)
            look = {"color": colour, "marker": marker, "markersize": 4, "label": peer}
            if peer == REFERENCE:  # on top and dashed: safetensors' lies beneath it
                axes.plot(saves, sizes, linestyle=(0, (4, 4)), linewidth=1.5, zorder=4, **look)
            else:
                axes.plot(saves, sizes, linewidth=2.2 if peer == OURS else 1.2, **look)
        axes.set_title(regime, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#dddddd", linewidth=0.6)
    for axes in panels.flat[len(regimes) :]:
        axes.set_axis_off()
    figure.supxlabel("saves")
    figure.supylabel(f"{unit_name} stored")
    legend(figure, *panels.flat)
    return figure


def legend(figure: Figure, *panels: Axes) -> None:
    """One legend above all, a tool named once."""
    handles = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    order = [peer for peer in LOOKS if peer in handles]
    figure.legend(
        [handles[p] for p in order],
        order,
        loc="outside upper center",
        ncols=min(5, len(order)),
        frameon=False,
    )
