"""deltackpt's codecs and others' on classes of tensors from real training: ratio and GB/s of a core.

Owns   the repeats, the choice of what is timed, and the oracle.
Never  calls a codec itself (coders.py), and never trains (pairs.py).

    python bench/codec.py [--size small|medium|large] [--cases 'fp32-*-weights-*' ...] [--peers ...]
                          [--repeats 3] [--json FILE] [--markdown FILE]

What the cases are, how each codec is called and what is unfair: bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bounds
import numpy as np
import tables
from cache import default_cache
from coders import CODERS, OURS, Chosen, Coder
from meter import core_s, machine, say, spread
from numpy.typing import NDArray
from pairs import CASES, Pair, chosen, pair
from rich.console import Console
from states import SIZES

from deltackpt import codecs

#: Seconds. A codec that takes longer to encode and decode a class is measured once.
SLOW_S = 2


def measure_all(names: list[str], given: Pair, repeats: int) -> dict[str, Any]:
    """Every codec on one pair, and the best that deltackpt could have done."""
    figures: dict[str, Any] = {}
    sizes: dict[str, NDArray[np.int64]] = {}
    for name in names:
        try:
            with tempfile.TemporaryDirectory(prefix="bench-") as at:
                figures[name], sizes[name] = measure(CODERS[name](given, Path(at)), repeats)
        except Exception as error:  # a codec's fault is a cell of the table, not the end of the run
            figures[name] = {"failed": f"{type(error).__name__}: {error}"}
            say(f"{given.case} {name} failed: {error}")
    each = [sizes.get(name) for name in OURS]
    if all(found is not None for found in each):
        figures[tables.OURS]["over_oracle"] = float(each[0].sum() / np.minimum.reduce(each).sum() - 1)
    return figures


def measure(coder: Coder, repeats: int) -> tuple[dict[str, Any], NDArray[np.int64] | None]:
    """One codec on one pair: its figures, and the bytes of each chunk where it makes chunks."""
    raw_size = coder.pair.new_bytes.size
    encode_gb_s, decode_gb_s, lossless = [], [], True
    for _ in range(repeats):
        coder.prepare()
        encode_s, payloads = core_s(coder.encode)
        decode_s, back = core_s(lambda: coder.decode(payloads))  # noqa: B023 - called at once
        encode_gb_s.append(raw_size / max(encode_s, 1e-9) / 1e9)
        decode_gb_s.append(raw_size / max(decode_s, 1e-9) / 1e9)
        lossless = lossless and coder.is_same(back)
        if encode_s + decode_s > SLOW_S:
            break
    figures = {
        "repeats": len(encode_gb_s),
        "ratio": spread([coder.stored_size(payloads) / raw_size]),
        "encode_gb_s": spread(encode_gb_s),
        "decode_gb_s": spread(decode_gb_s),
        "lossless": lossless,
    }
    if not isinstance(coder, Chosen):
        return figures, None
    if coder.name == tables.OURS:
        taken = Counter(codecs.NAMES[encoded.codec] for encoded in payloads)
        figures["taken"] = {name: n / len(payloads) for name, n in taken.most_common()}
        figures["two_threads"] = spread([two_threads(coder) for _ in range(repeats)])
    return figures, coder.sizes(payloads)


def two_threads(coder: Chosen) -> float:
    """How much sooner two threads have encoded than one."""
    batches, took_s = list(coder.batches()), []
    for n_threads in (1, 2):
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(time.sleep, [0.001] * n_threads))  # the threads are there before the clock runs
            start_s = time.perf_counter()
            list(pool.map(codecs.encode_all, batches))
            took_s.append(time.perf_counter() - start_s)
    return took_s[0] / took_s[1]


def run(options: argparse.Namespace) -> dict[str, Any]:
    peers = {name: {**CODERS[name].about(), "is_part": name in OURS} for name in options.peers}
    results: dict[str, Any] = {
        "size": options.size,
        "seed": options.seed,
        "repeats": options.repeats,
        "machine": machine(),
        "peers": peers,
        "cases": {},
    }
    ready = [name for name, facts in peers.items() if facts["installed"]]
    for case in chosen(options.cases):
        say(f"{case}: from the cache, or training ...")
        given = pair(case, options.size, options.seed, options.cache)
        results["cases"][case] = {**given.to_json(), "peers": measure_all(ready, given, options.repeats)}
        if options.json:  # after each case: a long run that is cut short has not been for nothing
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--cases", nargs="+", default=["*"], help=f"patterns of {', '.join(CASES)}")
    parser.add_argument("--peers", nargs="+", choices=CODERS, default=list(CODERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where trained states are kept")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--from-json", type=Path, help="measure nothing: show the results of an earlier run")
    options = parser.parse_args()
    results = json.loads(options.from_json.read_text()) if options.from_json else run(options)
    checks = bounds.checks(results)
    if options.markdown:
        options.markdown.write_text(tables.markdown(results) + bounds.markdown(checks))
    console = Console(width=None if sys.stdout.isatty() else 190)
    console.print(tables.terminal(results))
    console.print(tables.cases(results))
    for line in [*tables.failures(results), *tables.losses(results)]:
        console.print(line, highlight=False, markup=False)
    console.print(bounds.terminal(checks))


if __name__ == "__main__":
    main()
