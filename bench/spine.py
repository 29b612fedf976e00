"""What a save and a load cost, against torch.save and safetensors in the same run, on real training states.

    python bench/spine.py [--size-mib 1024] [--repeats 5] [--dir DIR] [--json FILE] [--markdown FILE]

Two states, both made by really training: an adapter on a frozen base of about --size-mib, and a full
fine-tune with AdamW of a quarter of that.  Times are medians, and ratios are of medians of runs that took
turns on the same disk.  Machines are noisy: look at the ratios.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import options as bench
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deltackpt import delta, open_run
from deltackpt.report import human_size

CONTEXT = 64


class Model(nn.Module):
    """A byte-level language model of feed-forward blocks, wide enough to hold the bytes asked for."""

    def __init__(self, size: int, adapter: bool):
        super().__init__()
        width = 1024 if size > 1 << 20 else 128  # small enough for a test
        depth = max(1, round(size / 4 / (8 * width * width)))
        self.embed = nn.Embedding(256, width)
        self.mix = nn.GRU(width, width // 8, batch_first=True)
        self.spread = nn.Linear(width // 8, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )
            for _ in range(depth)
        )
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 16, bias=False), nn.Linear(16, width, bias=False))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 256)
        for name, parameter in self.named_parameters():  # as GPT-2 is initialised
            if name.endswith("weight") and parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for pair in self.adapters:
            nn.init.zeros_(pair[1].weight)
        if adapter:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.startswith("adapters"))

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.spread(self.mix(x)[0])
        for block, adapter in zip(self.blocks, self.adapters, strict=True):
            x = x + block(x) + adapter(x)
        return self.head(x)


class Trainer:
    """Trains for real, on text that ships with Python."""

    def __init__(self, size: int, *, adapter: bool):
        torch.manual_seed(0)
        self.text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
        self.model = Model(size, adapter)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def step(self):
        at = torch.randint(0, len(self.text) - CONTEXT - 1, (2,))
        ids = torch.stack([self.text[i : i + CONTEXT + 1] for i in at])
        loss = nn.functional.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def torch_save(state, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def median(values) -> float:
    return statistics.median(values)


def measure_adapter(trainer: Trainer, at: Path, repeats: int) -> dict:
    """Saves of a training adapter, each after a real step, in turn with torch.save."""
    store, ours, theirs, written = at / "adapter", [], [], []
    delta.save(trainer.state(), store, step=0)
    for step in range(1, repeats + 1):
        trainer.step()
        state = trainer.state()
        theirs.append(timed(lambda state=state: torch_save(state, at / "x.pt")))
        report = delta.save(state, store, step=step)
        ours.append(report.total_s)
        written.append(report.written_size)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    adapter_size = sum(3 * p.nbytes for p in trained)  # with both moments
    return {
        "state_size": report.logical_size,
        "frozen_share": 1 - adapter_size / report.logical_size,
        "adapter_size": adapter_size,
        "written_size": median(written),
        "written_per_adapter": median(written) / adapter_size,
        "save_s": median(ours),
        "torch_save_s": median(theirs),
        "times_faster": median(theirs) / median(ours),
    }


def measure_unchanged(trainer: Trainer, at: Path, repeats: int) -> dict:
    """The same state saved again in the process: on one core, and on all."""
    state, store, result = trainer.state(), at / "adapter", {}
    cores = os.sched_getaffinity(0)
    with open_run(store) as run:
        run.save(state, step=1000)
        for name, allowed in (("one_core", {min(cores)}), ("all_cores", cores)):
            os.sched_setaffinity(0, allowed)
            reports = [run.save(state, step=1001 + len(allowed) * 1000 + i) for i in range(repeats)]
            result[f"gb_per_s_{name}"] = reports[0].logical_size / median([r.total_s for r in reports]) / 1e9
    result["written_share"] = max(r.written_size for r in reports) / reports[0].logical_size
    return result


def measure_small(at: Path) -> dict:
    """A small unchanged state, against one fsync of a small file."""
    import numpy as np

    state = {f"w{i}": np.full(1000, i, np.float32) for i in range(10)}
    saves, fsyncs = [], []

    def fsync(path: Path) -> None:
        with path.open("wb") as file:
            file.write(b"x" * 100)
            file.flush()
            os.fsync(file.fileno())

    with open_run(at / "small") as run:
        run.save(state, step=0)
        for i in range(1, 101):
            saves.append(run.save(state, step=i).total_s)
            fsyncs.append(timed(lambda i=i: fsync(at / f"f{i}")))
    return {"save_s": median(saves), "fsync_s": median(fsyncs), "fsyncs": median(saves) / median(fsyncs)}


def measure_first(name: str, state: dict, at: Path, repeats: int) -> dict:
    """First saves into new stores, in turn with torch.save."""
    ours, theirs = [], []
    for i in range(repeats):
        theirs.append(timed(lambda: torch_save(state, at / "x.pt")))
        (at / "x.pt").unlink()
        report = delta.save(state, at / f"first{i}", step=1, run=name)
        ours.append(report.total_s)
        shutil.rmtree(at / f"first{i}")
    return {
        "state_size": report.logical_size,
        "written_share": report.written_size / report.logical_size,
        "save_s": median(ours),
        "torch_save_s": median(theirs),
        "ratio": median(ours) / median(theirs),
    }


def measure_dense(trainer: Trainer, at: Path, repeats: int) -> dict:
    """A full fine-tune: every float changes between two saves; what is stored is as the storage allows."""
    store, ours, theirs, written = at / "dense", [], [], []
    delta.save(trainer.state(), store, step=0)
    for step in range(1, repeats + 1):
        trainer.step()
        state = trainer.state()
        theirs.append(timed(lambda state=state: torch_save(state, at / "x.pt")))
        report = delta.save(state, store, step=step)
        ours.append(report.total_s)
        written.append(report.written_size / report.logical_size)
    shutil.rmtree(store)
    return {
        "state_size": report.logical_size,
        "written_share": median(written),
        "save_s": median(ours),
        "torch_save_s": median(theirs),
        "ratio": median(ours) / median(theirs),
    }


def measure_restore(state: dict, at: Path, repeats: int) -> dict:
    """Warm restores, in turn with safetensors, whose load_file only maps the file until it is touched."""
    tensors = {name: t.contiguous() for name, t in state["model"].items()}
    save_file(tensors, at / "m.safetensors")
    delta.save(tensors, at / "restore", step=1)
    ours, mapped, touched, into_s = [], [], [], []
    into = {name: torch.zeros_like(t) for name, t in tensors.items()}
    for _ in range(repeats):
        mapped.append(timed(lambda: load_file(at / "m.safetensors")))
        touched.append(timed(lambda: {k: t.clone() for k, t in load_file(at / "m.safetensors").items()}))
        ours.append(timed(lambda: delta.load(at / "restore")))
        into_s.append(timed(lambda: delta.load(at / "restore", into=into)))
    assert all(torch.equal(into[name], t) for name, t in tensors.items())
    return {
        "state_size": sum(t.nbytes for t in tensors.values()),
        "load_s": median(ours),
        "load_into_s": median(into_s),
        "safetensors_mapped_s": median(mapped),
        "safetensors_in_memory_s": median(touched),
        "ratio": median(ours) / median(touched),
    }


PEAK = """
import resource, sys, numpy as np, torch
from deltackpt import delta
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
verb, store, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
state = {f"w{i}": torch.empty(n // 16).normal_(std=0.02) for i in range(16)}
delta.save({"warm": torch.ones(3)}, store, step=0, run="warm-" + verb)
before = peak()
if verb == "save":
    delta.save(state, store, step=1)
else:
    for t in state.values():
        t.zero_()
    delta.load(store, step=1, into=state)
print(peak() - before)
"""


def measure_memory(at: Path, size: int) -> dict:
    """Peak memory over the state's own, of processes of their own."""

    def peak(verb: str) -> int:
        command = [sys.executable, "-c", PEAK, verb, str(at / "peak"), str(size // 4)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return {"state_size": size, "save_extra_size": peak("save"), "load_into_extra_size": peak("load")}


def measure_import(repeats: int) -> dict:
    """Seconds `import deltackpt` takes over `import numpy`."""

    def seconds(what: str) -> float:
        return timed(lambda: subprocess.run([sys.executable, "-c", f"import {what}"], check=True))

    seconds("deltackpt")
    pairs = [(seconds("deltackpt"), seconds("numpy")) for _ in range(max(7, repeats))]
    return {"over_numpy_s": median([a - b for a, b in pairs])}


def main() -> None:
    options = bench.parser(__doc__, size_mib=1024, repeats=5).parse_args()
    size, repeats = options.size_mib << 20, options.repeats
    with bench.folder(options) as at:
        results = {"import": measure_import(repeats), "small unchanged": measure_small(at)}
        results["memory"] = measure_memory(at, size)
        trainer = Trainer(size, adapter=True)
        results["adapter"] = measure_adapter(trainer, at, repeats)
        results["unchanged"] = measure_unchanged(trainer, at, repeats)
        results["first save, frozen base"] = measure_first("base", trainer.state(), at, min(3, repeats))
        results["restore, warm"] = measure_restore(trainer.state(), at, repeats)
        del trainer
        trainer = Trainer(size // 16, adapter=False)
        for _ in range(20):
            trainer.step()
        results["first save, fine-tune"] = measure_first("tuned", trainer.state(), at, min(3, repeats))
        results["later save, fine-tune"] = measure_dense(trainer, at, repeats)
    tables = [bench.Table(title, ("", ">"), list(texts(figures))) for title, figures in results.items()]
    peak_size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    bench.show(options, results, tables, [f"peak memory of this process: {human_size(peak_size)}"])


def texts(figures: dict[str, float]) -> Iterator[tuple[str, str]]:
    for key, value in figures.items():
        yield key, human_size(int(value)) if key.endswith("_size") else f"{value:.4g}"


if __name__ == "__main__":
    main()
