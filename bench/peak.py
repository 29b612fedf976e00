"""The most memory that a save takes beyond the state, each tool in a fresh process.

    python bench/peak.py [--size-mib 512] [--repeats 3] [--n-changed 32 1] [--memory-max-mib N]
                         [--tools NAME ...] [--dir DIR] [--json FILE] [--markdown FILE]

Of a state of 32 fp32 tensors all or some change from save to save.  Counted are all pages of the process and
of those it began, each once, looked at every 4 ms by another program, or what the system says was the most of
the process itself (VmHWM) if that is more; less what there was before the first save, with the state, the
imports, and the tool after a save of one float.  A later save is the last one.

`--size-mib 8192 --memory-max-mib 1024 --n-changed 4 --tools 'Run.save_async, memory_max'` is a state of 8 GiB
through 1 GiB.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import options as bench
import torch
from family import Watch
from measure import in_fresh_process
from meter import measured, memory, say
from savers import SAVERS
from weights import N_TENSORS, made, perturb

from deltackpt.report import human_size


def saves(name: str, at: Path, size: int, n_changed: int, repeats: int, memory_max: int) -> dict[str, int]:
    """Save some steps; return the most memory of the first and the last beyond what there was before."""
    state = made(size)
    (at / "small").mkdir(parents=True)
    small = SAVERS[name](at / "small", memory_max)
    small.begin({"w": torch.ones(1)}, 0).wait()
    small.close()
    (at / "store").mkdir()
    over_size, changed_size = [], size
    with Watch() as watch:
        before_size, own_size = watch.most(), memory("self", "VmRSS")
        saver = SAVERS[name](at / "store", memory_max)
        for step in range(repeats + 1):
            if step:
                changed_size = perturb(state, n_changed, step * n_changed)
            watch.most()
            with measured() as cost:
                saver.begin(state, step).wait()
            over_size.append(max(watch.most() - before_size, cost.peak_size - own_size))
            if step:
                saver.forget(step - 1)
        saver.close()
    return {"changed_size": changed_size, "first_size": over_size[0], "over_size": over_size[-1]}


def run(
    tools: Sequence[str],
    at: Path,
    *,
    size: int,
    n_changed: Sequence[int],
    repeats: int,
    memory_max: int,
) -> list[dict[str, Any]]:
    """Measure each tool for each number of tensors that change."""
    found = []
    for n in n_changed:
        for name in tools:
            where = at / f"peak-{len(found)}"
            try:
                figures = in_fresh_process(saves, name, where, size, n, repeats, memory_max)
            except Exception as error:  # a tool's fault is a cell of the table, not the end of the run
                figures = {"failed": f"{type(error).__name__}: {error}"}
            shutil.rmtree(where)
            found.append({"tool": name, "state_size": size, "n_changed": n, **figures})
            say(f"memory of {name}: {found[-1]}")
    return found


def table(found: Sequence[dict[str, Any]]) -> bench.Table:
    rows = [
        [
            f["tool"],
            *(human_size(f[key]) for key in ("state_size", "changed_size", "first_size", "over_size")),
        ]
        for f in found
    ]
    columns = ("tool", ">state", ">changed", ">first save", ">later save")
    return bench.Table("Peak memory beyond the state", columns, rows)


def main() -> None:
    parser = bench.parser(__doc__, size_mib=512, repeats=3)
    parser.add_argument("--tools", nargs="+", choices=SAVERS, default=list(SAVERS))
    parser.add_argument("--n-changed", type=int, nargs="+", default=[N_TENSORS, 1], help="of 32 tensors")
    parser.add_argument("--memory-max-mib", type=int, help="of deltackpt; default an eighth of the state")
    options = parser.parse_args()
    tools, absent = bench.split(options.tools, SAVERS)
    size = options.size_mib << 20
    memory_max = size // 8 if options.memory_max_mib is None else options.memory_max_mib << 20
    with bench.folder(options) as at:
        found = run(
            tools,
            at,
            size=size,
            n_changed=options.n_changed,
            repeats=options.repeats,
            memory_max=memory_max,
        )
    bench.show(options, {"memory": found}, [table(found)], absent)


if __name__ == "__main__":
    main()
