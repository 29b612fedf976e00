"""Single saves and restores of the same states by each tool, in turns: what is waited for, taken and written.

    python bench/saves.py [--size-mib 512] [--repeats 5] [--tools NAME ...]
                          [--dir DIR] [--json FILE] [--markdown FILE]

The states are those of spine.py, trained for real: an adapter on a frozen base of about --size-mib and a full
fine-tune of an eighth of that, both with a step of training before each save; and the first once more, when
nothing changed.  Each save is waited for before the next tool's begins.  Then each tool brings its last step
back, from the page cache and from the disk.  What a save costs a training loop beside it is slowdown.py's,
and its peak memory peak.py's, on a state of --size-mib.  Figures are medians, bench/README.md says how they
are taken.
"""

from __future__ import annotations

import copy
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import family
import numpy as np
import options as bench
import peak
import slowdown
import torch
import xxhash
from cache import flatten
from measure import is_same
from meter import say, tree_size
from savers import SAVERS, Saver, State
from spine import Trainer, timed
from weights import N_TENSORS

from deltackpt.energy import CPU_W, WRITTEN_J, Energy, Machine, Meter
from deltackpt.report import human_energy, human_size, human_time

ADAPTER, SAME, DENSE = "adapter on a frozen base", "nothing changed", "full fine-tune"
REFERENCE = "torch.save + fsync"
WORDS = {True: "yes", False: "NO"}
#: The lowest and highest published watts of a thread and joules of a byte written, by those that are used.
WEIGHTS = [
    {"cpu seconds": cpu_w / CPU_W, "bytes written": written_j / WRITTEN_J}
    for cpu_w in (1.7, 8.6)
    for written_j in (1e-9, 14e-9)
]


class Floor:
    """The least that a save can hold its caller: look at all, copy what changed to memory that is there."""

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}
        self._copies: dict[str, np.ndarray[Any, Any]] = {}

    def seconds(self, state: State) -> float:
        arrays = {
            n: t.reshape(-1).view(torch.uint8).numpy() for n, t in flatten(state)[0].items() if t.numel()
        }
        for name, array in arrays.items():
            if name not in self._copies:
                self._copies[name] = array.copy()
        start = time.perf_counter()
        for name, array in arrays.items():
            digest = xxhash.xxh3_128_digest(array)
            if self._digests.get(name) != digest:
                self._digests[name] = digest
                np.copyto(self._copies[name], array)
        return time.perf_counter() - start


def save(saver: Saver, state: State, state_size: int, step: int) -> dict[str, Any]:
    """Save once and wait for it."""
    os.sync()  # so that nobody pays for what the tool before left to be written
    stored_size = tree_size(saver.at)
    meter = Meter(Machine(cpu_clock=family.cpu_s, visible=os.environ.get("CUDA_VISIBLE_DEVICES")))
    cpu_s, start = family.cpu_s(), time.perf_counter()
    saving = saver.begin(state, step)
    stall_s = time.perf_counter() - start
    meter.resume()
    saving.wait()
    save_s = time.perf_counter() - start
    cpu_s = family.cpu_s() - cpu_s
    written_size = tree_size(saver.at) - stored_size
    energy = meter.read(saver.moved_size(state_size), written_size)
    return {
        "stall_s": stall_s,
        "save_s": save_s,
        "cpu_s": cpu_s,
        "written_size": written_size,
        "energy": energy,
    }


def drop_from_cache(at: Path) -> None:
    """Have the system forget the contents of all files under a folder, which needs no rights.

    What is not on disk yet, or mapped by somebody, would stay.
    """
    for root, _, names in os.walk(at):
        for name in names:
            fd = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


class Field:
    """The tools that take turns; who fails once is out, and its message stays."""

    def __init__(self, tools: Sequence[str], at: Path, memory_max: int) -> None:
        self.savers: dict[str, Saver] = {}
        self.failed: dict[str, str] = {}
        for i, name in enumerate(tools):
            (at / str(i)).mkdir(parents=True)
            self.savers[name] = SAVERS[name](at / str(i), memory_max)

    def each(self, turn: int, work: Callable[[str, Saver], None]) -> None:
        """Do it with each tool; each turn begins with another one."""
        names = [name for name in self.savers if name not in self.failed]
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            try:
                work(name, self.savers[name])
            except Exception as error:  # a tool's fault is a cell of the table, not the end of the run
                self.failed[name] = f"{type(error).__name__}: {error}"
                say(f"{name} failed: {error}")

    def close(self) -> None:
        for saver in self.savers.values():
            saver.close()


def saves(trainer: Trainer, field: Field, steps: range, *, trains: bool) -> dict[str, Any]:
    """Save each step with each tool in turns; return what each save took, and the floor."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in field.savers}
    floor, floors = Floor(), []
    for step in steps:
        if trains:
            trainer.step()
        state = trainer.state()
        size = state_size(state)
        floors.append(floor.seconds(state))

        def one(name: str, saver: Saver, step: int = step, state: State = state, size: int = size) -> None:
            found[name].append(save(saver, state, size, step))
            if step:
                saver.forget(step - 1)
            say(f"step {step} {name}: {found[name][-1]['save_s']:.3g} s")

        field.each(step, one)
    return {"state_size": size, "floor_s": statistics.median(floors[1:]), "saves": found}


def state_size(state: State) -> int:
    return sum(tensor.nbytes for tensor in flatten(state)[0].values())


def restores(state: State, field: Field, step: int, repeats: int) -> list[dict[str, Any]]:
    """Bring a step back with each tool in turns, in each of its ways, cold and warm."""
    expected, into = flatten(state)[0], copy.deepcopy(state)
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def brought(bring: Callable[[], Any], cell: dict[str, Any], key: str, turn: int) -> None:
        got: list[Any] = []
        if not turn:
            clear(into)
        seconds = timed(lambda: got.append(bring()))
        if turn:
            cell[key].append(seconds)
        else:  # what only the first pays is not counted
            cell["lossless"] &= is_same(flatten(got[0])[0], expected)

    for turn in range(repeats + 1):

        def one(name: str, saver: Saver, turn: int = turn) -> None:
            for how, bring in saver.restores(step, into).items():
                cell = found.setdefault((name, how), {"cold_s": [], "warm_s": [], "lossless": True})
                drop_from_cache(saver.at)
                brought(bring, cell, "cold_s", turn)
                brought(bring, cell, "warm_s", turn)

        field.each(turn, one)
    return [
        {"tool": name, "how": how, "lossless": cell["lossless"]}
        | {key: statistics.median(cell[key]) for key in ("cold_s", "warm_s")}
        for (name, how), cell in found.items()
        if name not in field.failed
    ]


def clear(state: State) -> None:
    for tensor in flatten(state)[0].values():
        tensor.zero_()


def joules(several: Sequence[Energy], weights: Mapping[str, float]) -> float:
    """Return the median, the parts of each source weighted."""
    return statistics.median(
        sum(part * weights.get(name, 1.0) for name, part in energy.parts.items()) for energy in several
    )


def summary(taken: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of a tool's saves, and its joules by those of torch.save, by all constants."""
    energies = [one["energy"] for one in taken]
    found = {key: statistics.median(one[key] for one in taken) for key in taken[0] if key != "energy"}
    found |= {"joules": joules(energies, {}), "method": energies[-1].method}
    if reference:
        whole = [one["energy"] for one in reference]
        ratios = [joules(energies, w) / joules(whole, w) for w in WEIGHTS]
        ratio = joules(energies, {}) / joules(whole, {})
        found |= {"joules_ratio": ratio, "joules_ratio_min": min(ratios), "joules_ratio_max": max(ratios)}
    return found


def summaries(measured: dict[str, Any], failed: Mapping[str, str], part: slice) -> dict[str, Any]:
    """Return the figures of some of the saves, tool by tool; of one that failed, why."""
    taken = {name: several[part] for name, several in measured["saves"].items()}
    reference = [] if REFERENCE in failed else taken.get(REFERENCE, [])
    return {
        "state_size": measured["state_size"],
        "floor_s": measured["floor_s"],
        "tools": {
            name: {"failed": failed[name]} if name in failed else summary(several, reference)
            for name, several in taken.items()
        },
    }


def run(tools: Sequence[str], size: int, repeats: int, at: Path) -> dict[str, Any]:
    """Measure all of it."""
    regimes, brought = {}, {}
    for regime, trained_size in ((ADAPTER, size), (DENSE, size // 32)):
        trainer = Trainer(trained_size, adapter=regime == ADAPTER)
        trainer.step()
        where = at / regime.replace(" ", "-")
        field = Field(tools, where, size // 8)
        found = saves(trainer, field, range(repeats + 1), trains=True)
        regimes[f"{regime}, first save"] = summaries(found, field.failed, slice(1))
        regimes[f"{regime}, each save after a step"] = summaries(found, field.failed, slice(1, None))
        brought[regime] = restores(trainer.state(), field, repeats, repeats)
        if regime == ADAPTER:
            again = saves(trainer, field, range(repeats + 1, 2 * repeats + 2), trains=False)
            regimes[SAME] = summaries(again, field.failed, slice(1, None))
        field.close()
        shutil.rmtree(where)
    beside = [name for name in tools if name in slowdown.TOOLS]
    return {
        "regimes": regimes,
        "restores": brought,
        "memory": peak.run(tools, at, size=size, n_changed=[N_TENSORS, 1], repeats=2, memory_max=size // 8),
        "size": size,
        "loops": slowdown.run([slowdown.Nothing.name, *beside], list(slowdown.LOOPS), size, repeats, at),
    }


def tables(results: dict[str, Any]) -> Iterator[bench.Table]:
    for regime, found in results["regimes"].items():
        yield saves_table(regime, found)
    for regime, cells in results["restores"].items():
        rows = [
            [
                c["tool"],
                c["how"],
                human_time(c["warm_s"]),
                human_time(c["cold_s"]),
                "yes" if c["lossless"] else "NO",
            ]
            for c in cells
        ]
        columns = ("tool", "restored by", ">warm", ">cold", "every bit")
        yield bench.Table(f"Restores, {regime}", columns, rows)
    yield peak.table(results["memory"])
    yield slowdown.table(results["loops"], results["size"])


def saves_table(regime: str, found: dict[str, Any]) -> bench.Table:
    rows, size, methods = [], found["state_size"], set()
    for name, f in found["tools"].items():
        if "failed" in f:
            rows.append([name, "failed", *[""] * 8])
            continue
        methods.add(f["method"])
        rows.append(
            [
                name,
                human_time(f["stall_s"]),
                f"{f['stall_s'] / found['floor_s']:.2f}",
                human_time(f["save_s"]),
                human_time(f["cpu_s"]),
                human_size(round(f["written_size"])),
                f"{f['written_size'] / size:.3f}",
                human_energy(f["joules"]),
                *(
                    [
                        f"{f['joules_ratio']:.2f}",
                        f"{f['joules_ratio_min']:.2f} to {f['joules_ratio_max']:.2f}",
                    ]
                    if "joules_ratio" in f
                    else ["", ""]
                ),
            ]
        )
    floor = human_time(found["floor_s"])
    columns = ("tool", ">stall", ">to floor", ">durable", ">CPU", ">written", ">to state", ">joules")
    columns += (">to torch.save", ">by other constants")
    title = f"{regime}: {human_size(size)}, floor {floor}; joules {' or '.join(sorted(methods))}"
    return bench.Table(title, columns, rows)


def main() -> None:
    parser = bench.parser(__doc__, size_mib=512, repeats=5)
    parser.add_argument("--tools", nargs="+", choices=SAVERS, default=list(SAVERS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    tools, absent = bench.split(options.tools, SAVERS)
    with bench.folder(options) as at:
        results = run(tools, options.size_mib << 20, options.repeats, at)
    failed = {
        f"{name} failed on {regime}: {f['failed']}"
        for regime, found in results["regimes"].items()
        for name, f in found["tools"].items()
        if "failed" in f
    }
    bench.show(options, results, list(tables(results)), [*absent, *sorted(failed)])


if __name__ == "__main__":
    main()
