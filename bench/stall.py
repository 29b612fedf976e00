"""What training waits for in a save that goes on in the background, and how long until the step is durable.

    python bench/stall.py [--size-mib 512] [--repeats 7] [--dir DIR] [--json]

The states are those of spine.py, trained for real: an adapter on a frozen base of about --size-mib, and a
full fine-tune of an eighth of that.  In turns, of each state: `Run.save_async`; torch's
`dcp.async_save` (one process, gloo); `torch.save` + fsync; and the *floor*, one pass of xxh3 over the state
and a copy of the tensors that changed, into memory that is there.  Medians, the first save left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from spine import Trainer, torch_save

from deltackpt import open_run
from deltackpt.report import human_size, human_time, table

REGIMES = {"adapter on a frozen base": True, "full fine-tune": False}


def tensors(state: Any) -> list[torch.Tensor]:
    """Return all tensors of a state, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


class Floor:
    """The least that a save can take: look at everything, copy what changed."""

    def __init__(self) -> None:
        self._digests: dict[int, bytes] = {}
        self._copies: dict[int, np.ndarray[Any, Any]] = {}

    def save(self, state: dict[str, Any]) -> float:
        """Return the seconds."""
        arrays = [t.detach().reshape(-1).view(torch.uint8).numpy() for t in tensors(state) if t.numel()]
        for i, array in enumerate(arrays):
            if i not in self._copies:
                self._copies[i] = array.copy()
        start = time.perf_counter()
        for i, array in enumerate(arrays):
            digest = xxhash.xxh3_128_digest(array)
            if self._digests.get(i) != digest:
                self._digests[i] = digest
                np.copyto(self._copies[i], array)
        return time.perf_counter() - start


def dcp_save(state: dict[str, Any], at: Path) -> tuple[float, float]:
    """Return the seconds until `dcp.async_save` returns, and until what it gives is done."""
    flat = {str(i): tensor.detach() for i, tensor in enumerate(tensors(state))}
    start = time.perf_counter()
    future = dcp.async_save(flat, checkpoint_id=at)
    stall_s = time.perf_counter() - start
    future.result()
    return stall_s, time.perf_counter() - start


def measured(trainer: Trainer, at: Path, repeats: int) -> dict[str, float]:
    """Return the medians of saves that took turns, each after a step of training."""
    found: dict[str, list[float]] = {}
    floor = Floor()
    with open_run(at / "store") as run:
        for n in range(repeats + 1):
            trainer.step()
            state = trainer.state()
            start = time.perf_counter()
            pending = run.save_async(state, step=n)
            stall_s = time.perf_counter() - start
            assert pending is not None
            report = pending.wait()
            durable_s = time.perf_counter() - start
            dcp_stall_s, dcp_s = dcp_save(state, at / f"dcp-{n}")
            start = time.perf_counter()
            torch_save(state, at / "whole.pt")
            whole_s = time.perf_counter() - start
            (at / "whole.pt").unlink()
            floor_s = floor.save(state)
            if n:
                for name, value in {
                    "state_size": report.logical_size,
                    "written_size": report.written_size,
                    "stall_s": stall_s,
                    "durable_s": durable_s,
                    "floor_s": floor_s,
                    "dcp_stall_s": dcp_stall_s,
                    "dcp_s": dcp_s,
                    "torch_save_s": whole_s,
                }.items():
                    found.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def run(size: int, repeats: int, directory: Path | None) -> dict[str, dict[str, float]]:
    """Measure all regimes."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    results = {}
    with tempfile.TemporaryDirectory(dir=directory, prefix="bench-") as name:
        at = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{at / 'rendezvous'}", rank=0, world_size=1)
        try:
            for regime, adapter in REGIMES.items():
                where = at / regime.replace(" ", "-")
                where.mkdir()
                trainer = Trainer(size if adapter else size // 32, adapter=adapter)
                results[regime] = measured(trainer, where, repeats)
        finally:
            dist.destroy_process_group()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-mib", type=int, default=512, help="size of the frozen base")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dir", type=Path, help="where to write; default the current directory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = run(options.size_mib << 20, options.repeats, options.dir or Path.cwd())
    if options.json:
        print(json.dumps(results, indent=1))
        return
    rows = [
        (
            regime,
            human_size(int(f["state_size"])),
            human_size(int(f["written_size"])),
            *(
                human_time(f[name])
                for name in ("stall_s", "floor_s", "dcp_stall_s", "durable_s", "dcp_s", "torch_save_s")
            ),
            f"{f['stall_s'] / f['floor_s']:.2f}",
            f"{f['stall_s'] / f['dcp_stall_s']:.2f}",
        )
        for regime, f in results.items()
    ]
    columns = (
        "regime",
        ">state",
        ">written",
        ">stall",
        ">floor",
        ">dcp stall",
        ">durable",
        ">dcp done",
        ">torch.save",
        ">to floor",
        ">to dcp",
    )
    print(table(columns, rows))


if __name__ == "__main__":
    main()
