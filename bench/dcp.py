"""Distributed checkpoints by several ranks: deltackpt's writer against torch's own, on the same states.

Owns   the ranks, their shards, what is timed and counted.
Never  trains: the states are those of states.py.

    python bench/dcp.py [--regimes adapter finetune] [--size medium] [--ranks 4] [--repeats 3]
                        [--plan-caching] [--json FILE]

Every tensor is sharded by rows over the ranks, as FSDP2 does, and saved over gloo by `dcp.save`: each save
of a series by torch's `FileSystemWriter` and by `DeltaStorageWriter`, in turns, and loaded back by each at
the end. Seconds are the first rank's, from a barrier before to the return on all ranks; *its own* are those
in the writer, the rest is what DCP does with any: planning, telling the ranks, waiting for them. torch's
writer flushes its files (`sync_files=True`, its default). Then the last state is saved again by 2 and by 3
ranks: what of it is new, as bytes of chunks that the store did not have, and as bytes written?
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from cache import Tensors, default_cache
from meter import machine, say, tree_size
from states import REGIMES, SIZES, series
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from deltackpt import open_run
from deltackpt.integrations.torch_dcp import DeltaStorageReader, DeltaStorageWriter
from deltackpt.report import human_size, human_time, table

Tool = tuple[Callable[[Path, int], Any], Callable[[Path, int], Any]]
TOOLS: dict[str, Tool] = {
    "FileSystemWriter": (
        lambda at, step: dcp.FileSystemWriter(at / str(step)),
        lambda at, step: dcp.FileSystemReader(at / str(step)),
    ),
    "DeltaStorageWriter": (
        lambda at, step: DeltaStorageWriter(at, step=step),
        lambda at, step: DeltaStorageReader(at, step=step),
    ),
}
#: In the order they are printed in.
FIGURES = ("first_s", "first_own_s", "later_s", "later_own_s", "first_size", "later_size", "load_s")


def in_ranks(n: int, work: Callable[..., None], *args: Any) -> None:
    """Have `work(rank, ...)` done by n processes, each of one thread of torch."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, (n, port, work, args), nprocs=n)


def _rank(rank: int, n: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(n)  # as torchrun does
    dist.init_process_group("cpu:gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=n)
    work(rank, *args)
    dist.barrier()
    dist.destroy_process_group()


def sharded(tensors: Tensors, mesh: DeviceMesh) -> dict[str, DTensor]:
    """Return the tensors cut by rows; scalars are on every rank."""
    return {
        name: distribute_tensor(tensor, mesh, [Shard(0) if tensor.ndim else Replicate()], src_data_rank=None)
        for name, tensor in tensors.items()
    }


def saves(rank: int, regime: str, size: str, cache: Path, caching: bool, at: Path, out: Path) -> None:
    """Save a series by each tool; seconds and bytes of every save, seconds of the last one's load."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "own": [], "bytes": []} for name in TOOLS}
    trained = series(regime, size, 0, cache).saves
    # A class of planners caches for all that it plans for.
    planners = {name: type(name, (dcp.DefaultSavePlanner,), {}) for name in TOOLS}
    for step, save in enumerate(trained):
        state = sharded(save.tensors(), mesh)
        for name, (writer, _) in TOOLS.items():
            by = writer(at / name, step)
            own = [timing(by, call) for call in ("write_data", "finish")]
            planner = planners[name](enable_plan_caching=caching)
            saving = functools.partial(dcp.save, state, storage_writer=by, planner=planner)
            found[name]["seconds"].append(timed(saving))
            found[name]["own"].append(sum(map(sum, own)))
            found[name]["bytes"].append(tree_size(at / name) - sum(found[name]["bytes"]))
    for name, (_, reader) in TOOLS.items():
        into = {key: tensor.clone().detach() for key, tensor in state.items()}
        for tensor in into.values():
            tensor.to_local().zero_()
        last = len(trained) - 1
        seconds = timed(functools.partial(dcp.load, into, storage_reader=reader(at / name, last)))
        found[name]["load_s"] = seconds
        assert all(torch.equal(into[key].to_local(), state[key].to_local()) for key in state)
    if rank == 0:
        out.write_text(json.dumps({"state_size": trained[-1].state_size, "tools": found}))


def timed(work: Callable[[], Any]) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def timing(writer: dcp.StorageWriter, call: str) -> list[float]:
    """Have the seconds of each call of a method noted."""
    taken: list[float] = []
    method = getattr(writer, call)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **kwargs)
        taken.append(time.perf_counter() - start)
        return result

    setattr(writer, call, wrapped)
    return taken


def saves_again(rank: int, regime: str, size: str, cache: Path, at: Path, step: int) -> None:
    """Save the last state once more, by this many ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = sharded(series(regime, size, 0, cache).saves[-1].tensors(), mesh)
    dcp.save(state, storage_writer=DeltaStorageWriter(at / "DeltaStorageWriter", step=step))


def measure(regime: str, options: argparse.Namespace) -> dict[str, Any]:
    series(regime, options.size, 0, options.cache)  # trained here, not by every rank
    runs = []
    for n in range(options.repeats):
        say(f"{regime}: {n + 1} of {options.repeats} ...")
        with tempfile.TemporaryDirectory(dir=options.dir or Path.cwd(), prefix="bench-") as name:
            at, out = Path(name) / "stores", Path(name) / "found.json"
            in_ranks(options.ranks, saves, regime, options.size, options.cache, options.plan_caching, at, out)
            found = json.loads(out.read_text())
            if n == 0:
                shares = {}
                for ranks in (2, 3):
                    step = 1000 + ranks
                    in_ranks(ranks, saves_again, regime, options.size, options.cache, at, step)
                    of = open_run(at / "DeltaStorageWriter").commit(step).figures
                    shares[ranks] = [of.new_size / of.logical_size, of.written_size / of.logical_size]
                runs.append({**found, "new share by ranks": shares})
            else:
                runs.append(found)
    tools = {}
    for name in TOOLS:
        each = [run["tools"][name] for run in runs]
        tools[name] = {
            "first_s": statistics.median(one["seconds"][0] for one in each),
            "later_s": statistics.median(s for one in each for s in one["seconds"][1:]),
            "first_own_s": statistics.median(one["own"][0] for one in each),
            "later_own_s": statistics.median(s for one in each for s in one["own"][1:]),
            "first_size": each[0]["bytes"][0],
            "later_size": statistics.median(each[0]["bytes"][1:]),
            "load_s": statistics.median(one["load_s"] for one in each),
        }
    return {
        "state_size": runs[0]["state_size"],
        "tools": tools,
        "new share by ranks": runs[0]["new share by ranks"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=["adapter", "finetune"])
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plan-caching", action="store_true", help="plan once, for both writers")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--dir", type=Path, help="where to write; default the current directory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {regime: measure(regime, options) for regime in options.regimes}
    if options.json:
        body = {"machine": machine(), "ranks": options.ranks, "repeats": options.repeats, "regimes": results}
        options.json.write_text(json.dumps(body, indent=1) + "\n")
    columns = ("", "", ">first save", ">its own", ">later", ">its own", ">bytes, first", ">later", ">load")
    for regime, found in results.items():
        torchs, ours = found["tools"].values()
        rows = [
            (
                regime,
                name,
                *(human_time(f[key]) for key in ("first_s", "first_own_s", "later_s", "later_own_s")),
                human_size(f["first_size"]),
                human_size(int(f["later_size"])),
                human_time(f["load_s"]),
            )
            for name, f in found["tools"].items()
        ]
        rows.append((regime, "ratio", *(f"{ours[key] / torchs[key]:.3f}" for key in FIGURES)))
        print(table(columns, rows))
        for n, (new, written) in found["new share by ranks"].items():
            print(f"the last state saved by {n} ranks: {100 * new:.1f} % new, {100 * written:.1f} % written")
        print()


if __name__ == "__main__":
    main()
