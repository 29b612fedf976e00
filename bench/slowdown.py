"""What a training loop loses of its speed while a save goes on in the background.

    python bench/slowdown.py [--size-mib 512] [--repeats 5] [--tools NAME ...] [--loops NAME ...]
                             [--dir DIR] [--json FILE] [--markdown FILE]

Two loops, each on one thread: *torch*, training of two layers with AdamW; and *python*, which only counts.
Beside them each tool saves the same state, of which every float is new in each round.  From when the call
returns until the step is durable the loop is timed, and in a quiet window before and after; the loss is the
share of its speed that is missing.  *By CPU* is what of it each iteration takes in CPU seconds of its own
thread: the rest is waiting, for the interpreter's lock or for a core.

*Nothing* is a save that sleeps for two seconds: how far from zero it is, is how noisy the machine is.  Tools
take turns; medians over the rounds but the first.  It needs a core that is free beside the loop's.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import options as bench
import torch
from meter import say, spread
from savers import SAVERS, Saver, Saving, State
from torch import nn
from weights import made, perturb

from deltackpt.report import human_size, human_time

QUIET_S = 1.0
NOTHING_S = 2.0

Loop = Callable[[], object]


class Nothing(Saver):
    name, install, module, in_background = "nothing", "", "torch", True

    def begin(self, state: State, step: int) -> Saving:
        over = threading.Timer(NOTHING_S, lambda: None)
        over.start()
        return Saving(lambda: not over.is_alive(), over.join)

    def restores(self, step: int, into: State) -> dict[str, Callable[[], Any]]:
        return {}


TOOLS = {Nothing.name: Nothing, **{name: kind for name, kind in SAVERS.items() if kind.in_background}}


class Stamp(NamedTuple):
    """When an iteration began, by the clock and by the CPU seconds of its thread."""

    at_s: float
    cpu_s: float


class Pace(NamedTuple):
    """Of an iteration: seconds, and CPU seconds of its thread."""

    s: float
    cpu_s: float


def stamps(loop: Loop, over: Callable[[], bool]) -> list[Stamp]:
    """Go on until it is over; return the beginning of each iteration that ended before."""
    found = [Stamp(time.perf_counter(), time.thread_time())]
    while not over():
        loop()
        found.append(Stamp(time.perf_counter(), time.thread_time()))
    return found[:-1]  # the last iteration was under way when it was over


def pace(windows: Sequence[Sequence[Stamp]]) -> Pace | None:
    """Return the mean of an iteration over some windows; None if none was whole.

    >>> pace([[Stamp(0, 0), Stamp(2, 1), Stamp(4, 2)], [Stamp(10, 5), Stamp(13, 6)], []])
    Pace(s=2.3333333333333335, cpu_s=1.0)
    """
    n = sum(len(window) - 1 for window in windows if window)
    if not n:
        return None
    ends = [(window[0], window[-1]) for window in windows if window]
    return Pace(sum(b.at_s - a.at_s for a, b in ends) / n, sum(b.cpu_s - a.cpu_s for a, b in ends) / n)


def quiet(loop: Loop) -> list[Stamp]:
    """Let the loop run alone, after all that waits to be written is written."""
    os.sync()
    end_s = time.perf_counter() + QUIET_S
    return stamps(loop, lambda: time.perf_counter() > end_s)


def turn(saver: Saver, state: State, step: int, loop: Loop) -> dict[str, float] | None:
    """Save once while the loop goes on; None if it was over within an iteration."""
    before = quiet(loop)
    start = time.perf_counter()
    saving = saver.begin(state, step)
    stall_s = time.perf_counter() - start
    during = stamps(loop, saving.done)
    saving.wait()
    save_s = time.perf_counter() - start
    alone, beside = pace([before, quiet(loop)]), pace([during])
    if alone is None or beside is None:
        return None
    loss = 1 - alone.s / beside.s
    return {
        "stall_s": stall_s,
        "save_s": save_s,
        "loss": loss,
        "cpu_loss": 1 - alone.cpu_s / beside.cpu_s,
        "lost_s": stall_s + loss * (save_s - stall_s),
    }


def training() -> Loop:
    """Return a step of training of two layers with AdamW: two million weights, some 10 ms."""
    model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(64, 512)

    def step() -> None:
        loss = nn.functional.mse_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def count() -> int:
    x = 0
    for i in range(20_000):
        x += i & 7
    return x


#: Each is made anew for a run.
LOOPS: dict[str, Callable[[], Loop]] = {
    "torch": training,
    "python": lambda: count,
}


def measured(
    tools: Sequence[str], loop: str, state: dict[str, torch.Tensor], at: Path, repeats: int
) -> dict[str, Any]:
    """Return what each tool costs one loop, in turns."""
    iterate = LOOPS[loop]()
    state_size = sum(tensor.nbytes for tensor in state.values())
    savers, failed = {}, {}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in tools}
    for name in tools:
        (at / f"{loop}-{len(savers)}").mkdir()
        savers[name] = TOOLS[name](at / f"{loop}-{len(savers)}", state_size // 8)
    for step in range(repeats + 1):
        perturb(state)
        first = step % len(tools)
        for name in [*tools[first:], *tools[:first]]:
            if name in failed:
                continue
            try:
                figures = turn(savers[name], state, step, iterate)
                savers[name].forget(step)
            except Exception as error:  # a tool's fault is a cell of the table, not the end of the run
                failed[name] = figures = f"{type(error).__name__}: {error}"
            if step and isinstance(figures, dict):
                found[name].append(figures)
            say(f"{loop} {step}/{repeats} {name}: {figures}")
    for saver in savers.values():
        saver.close()
    return {name: {"failed": failed[name]} if name in failed else summary(found[name]) for name in tools}


def summary(several: list[dict[str, float]]) -> dict[str, Any]:
    """Return the medians, and the spread of the loss; only how many there are if there are none."""
    found: dict[str, Any] = {"n_saves": len(several)}
    if several:
        found |= {key: statistics.median(one[key] for one in several) for key in several[0]}
        found["losses"] = spread([one["loss"] for one in several])
    return found


def run(
    tools: Sequence[str], loops: Sequence[str], size: int, repeats: int, at: Path
) -> dict[str, dict[str, Any]]:
    """Measure all loops beside all tools."""
    state, n_threads = made(size), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {loop: measured(tools, loop, state, at, repeats) for loop in loops}
    finally:
        torch.set_num_threads(n_threads)


def table(results: dict[str, dict[str, Any]], size: int) -> bench.Table:
    rows = []
    for loop, tools in results.items():
        for name, f in tools.items():
            if not f.get("n_saves"):
                rows.append([loop, name, "failed" if "failed" in f else "too short", *[""] * 5])
                continue
            losses = f["losses"]
            rows.append(
                [
                    loop,
                    name,
                    f"{f['loss']:.1%}",
                    f"{losses['min']:.1%} to {losses['max']:.1%}",
                    f"{f['cpu_loss']:.1%}",
                    human_time(f["stall_s"]),
                    human_time(f["save_s"]),
                    human_time(f["lost_s"]),
                ]
            )
    columns = ("loop", "beside", ">speed lost", ">from to", ">by CPU", ">stall", ">durable", ">lost a save")
    return bench.Table(f"Training beside a save of {human_size(size)}, all changed", columns, rows)


def main() -> None:
    parser = bench.parser(__doc__, size_mib=512, repeats=5)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    options = parser.parse_args()
    tools, absent = bench.split(options.tools, TOOLS)
    size = options.size_mib << 20
    with bench.folder(options) as at:
        results = run(tools, options.loops, size, options.repeats, at)
    bench.show(options, {"size": size, "loops": results}, [table(results, size)], absent)


if __name__ == "__main__":
    main()
