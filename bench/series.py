"""deltackpt and its peers on whole series of saves from real training: bytes, seconds, memory, every bit.

Owns   the order in which tools take turns, and the summary of the repeats.
Never  runs a tool itself (measure.py), and never compares figures of different runs.

    python bench/series.py [--size small|medium|large] [--regimes ...] [--peers ...] [--repeats 3]
                           [--json FILE] [--markdown FILE] [--plots DIR]

What the regimes are, how each peer is called and what is unfair: bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import bounds
import plots
import tables
from cache import Series, default_cache
from measure import Measurement, measure
from meter import machine, say, spread
from peers import PEERS
from rich.console import Console
from states import REGIMES, SIZES, series

#: Seconds. A tool that takes longer to save a series is measured once: it is slower by more than any noise.
SLOW_S = 30


def measure_in_turns(peers: list[str], training: Series, repeats: int, at: Path) -> dict[str, Any]:
    """All repeats of all tools on one series; each repeat begins with another tool."""
    taken: dict[str, list[Measurement]] = {peer: [] for peer in peers}
    failed: dict[str, str] = {}
    for repeat in range(repeats):
        first = repeat % max(1, len(peers))
        for peer in peers[first:] + peers[:first]:
            if peer in failed or (taken[peer] and sum(taken[peer][0].save_s) > SLOW_S):
                continue
            try:
                taken[peer].append(measure(peer, training, at / "work"))
                say(f"{training.regime} {repeat + 1}/{repeats} {peer}: {sum(taken[peer][-1].save_s):.2f} s")
            except Exception as error:  # a peer's fault is a cell of the table, not the end of the run
                failed[peer] = f"{type(error).__name__}: {error}"
                say(f"{training.regime} {peer} failed: {error}")
    return {peer: {"failed": failed[peer]} if peer in failed else summary(taken[peer]) for peer in peers}


def summary(taken: list[Measurement]) -> dict[str, Any]:
    """The spread over the repeats; bytes after each save are those of the first repeat."""
    deep = [ratio for m in taken for ratio in m.deep_restore]
    return {
        "repeats": len(taken),
        "stored_size": spread([m.stored_size[-1] for m in taken]),
        "save_s": spread([sum(m.save_s) for m in taken]),
        "restore_s": spread([m.restore_s for m in taken]),
        "save_memory_size": spread([m.save_memory_size for m in taken]),
        "restore_memory_size": spread([m.restore_memory_size for m in taken]),
        "stored_sizes": taken[0].stored_size,
        "each_save_s": [statistics.median(times) for times in zip(*(m.save_s for m in taken), strict=True)],
        "lossless": all(m.lossless for m in taken),
        **({"deep_restore": spread(deep)} if deep else {}),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    peers = {name: PEERS[name].about() for name in options.peers}
    results: dict[str, Any] = {
        "size": options.size,
        "seed": options.seed,
        "repeats": options.repeats,
        "machine": machine(),
        "peers": peers,
        "regimes": {},
    }
    trainings = []
    for regime in options.regimes:
        say(f"{regime}: from the cache, or training ...")
        trainings.append(series(regime, options.size, options.seed, options.cache))
    ready = [name for name, facts in peers.items() if facts["installed"]]
    with tempfile.TemporaryDirectory(dir=options.dir or Path.cwd(), prefix="bench-") as at:
        for training in trainings:
            figures = measure_in_turns(ready, training, options.repeats, Path(at))
            results["regimes"][training.regime] = {**training.to_json(), "peers": figures}
            if options.json:  # after each regime: a long run that is cut short has not been for nothing
                options.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where trained states are kept")
    parser.add_argument("--dir", type=Path, help="where tools write; default a temporary directory here")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--plots", type=Path, help="write SVG and PNG pictures into this folder")
    parser.add_argument("--from-json", type=Path, help="measure nothing: show the results of an earlier run")
    options = parser.parse_args()
    if options.from_json:
        results = json.loads(options.from_json.read_text())
    else:
        results = run(options)
    checks = bounds.checks(results)
    if options.markdown:
        options.markdown.write_text(tables.markdown(results) + bounds.markdown(checks))
    if options.plots:
        plots.draw_all(results, options.plots)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(tables.terminal(results))
    for line in [*tables.failures(results), *tables.losses(results)]:
        console.print(line, highlight=False, markup=False)
    console.print(bounds.terminal(checks))


if __name__ == "__main__":
    main()
