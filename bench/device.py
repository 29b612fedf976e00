"""On a GPU: what training waits for in a save, and how many bytes come over the bus for it.

    python bench/device.py [--size-mib 4096] [--repeats 5] [--dir DIR] [--json FILE] [--markdown FILE]

A state of --size-mib of bf16 weights on the GPU, in tensors of 64 MiB, of which one changes between two
saves, or all do.  `Run.save_async`, `dcp.async_save` and `torch.save` + fsync save it in turns.  The seconds
are medians, with the GPU idle at their beginning; the first save is left out.  Bytes over the bus are those
of one more save, as torch's profiler counts the copies from device to host, for all three alike.

Without a GPU it says so, and does nothing.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import options as bench
import torch
from savers import SAVERS, Saver, State
from torch.profiler import ProfilerActivity, profile

from deltackpt.report import human_size, human_time

TENSOR_SIZE = 64 << 20
TOOLS = ["Run.save_async", "dcp.async_save", "torch.save + fsync"]
#: Whether all tensors change between two saves, or one.
REGIMES = {"one tensor changes": False, "all change": True}


def save(saver: Saver, state: State, step: int) -> tuple[float, float]:
    """Save once; return the seconds that training is held, and until it is durable."""
    start = time.perf_counter()
    saving = saver.begin(state, step)
    stall_s = time.perf_counter() - start
    saving.wait()
    return stall_s, time.perf_counter() - start


def crossed(call: Callable[[], object], at: Path) -> int:
    """Return the bytes that come from the device in a call, as torch's profiler tells."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        call()
    found.export_chrome_trace(str(at / "trace.json"))
    # Not strict: torch writes the name of the process as it is, control characters too.
    events = json.loads((at / "trace.json").read_text(), strict=False)["traceEvents"]
    return sum(e["args"]["bytes"] for e in events if e.get("name", "").startswith("Memcpy DtoH"))


def measured(size: int, all_change: bool, at: Path, repeats: int, device: str = "cuda") -> dict[str, Any]:
    """Return the figures of each tool; on another device only to see that it runs."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    part = min(TENSOR_SIZE, size // 2)
    state = {
        f"layer.{i}.weight": torch.randn(part // 2, device=device, dtype=torch.bfloat16)
        for i in range(size // part)
    }
    changing = list(state.values()) if all_change else [state["layer.0.weight"]]
    savers = {}
    for name in TOOLS:
        (at / name).mkdir(parents=True)
        savers[name] = SAVERS[name](at / name, 0)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in TOOLS}
    found: dict[str, Any] = {}
    for step in range(repeats + 2):
        for tensor in changing:
            tensor.mul_(1 + 2**-7)
        for name, saver in savers.items():
            wait()
            if step <= repeats:
                seconds[name].append(save(saver, state, step))
            else:
                found[name] = {"bus_size": crossed(partial(save, saver, state, step), at)}
            if step:
                saver.forget(step - 1)
    for name, saver in savers.items():
        saver.close()
        stalls, durables = zip(*seconds[name][1:], strict=True)
        found[name] |= {"stall_s": statistics.median(stalls), "save_s": statistics.median(durables)}
    shutil.rmtree(at)
    return found


def tables(regimes: dict[str, Any], size: int) -> Iterator[bench.Table]:
    columns = ("tool", ">stall", ">durable", ">over the bus")
    for regime, found in regimes.items():
        rows = [
            [name, human_time(f["stall_s"]), human_time(f["save_s"]), human_size(f["bus_size"])]
            for name, f in found.items()
        ]
        yield bench.Table(f"{regime}, {human_size(size)} on a GPU", columns, rows)


def main() -> None:
    options = bench.parser(__doc__, size_mib=4096, repeats=5).parse_args()
    if not torch.cuda.is_available():
        print("no GPU here")
        return
    size = options.size_mib << 20
    with bench.folder(options) as at:
        regimes = {
            regime: measured(size, all_change, at / regime, options.repeats)
            for regime, all_change in REGIMES.items()
        }
    results = {"gpu": torch.cuda.get_device_name(), "size": size, "regimes": regimes}
    bench.show(options, results, list(tables(regimes, size)), [])


if __name__ == "__main__":
    main()
