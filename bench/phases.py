"""Where the time of a save and of a restore goes, when every float changed.

    python bench/phases.py [--size-mib 256] [--repeats 5] [--dir DIR] [--json FILE] [--markdown FILE]

A full fine-tune as spine.py trains it, of an eighth of --size-mib with its moments, two states a step apart.
*Stages* are called alone, one after another, on batches of 1 MiB of weights and moments: seconds that a core
takes for a GB.  *Phases* are those of the thread that saves, by the report, and what the whole save took, by
what is optimized and in turns with `torch.save` + fsync into a new file.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import options as opts
import xxhash
from blake3 import blake3
from cache import flatten
from spine import Trainer, timed, torch_save

from deltackpt import codecs, open_run
from deltackpt.codecs import coder, dense
from deltackpt.report import human_time

CHUNK_SIZE, N_CHUNKS = 1 << 18, 4
KIND = codecs.Kind(4, True)
OPTIMIZE = ("bytes", "time")


def batches(old: dict[str, Any], new: dict[str, Any]) -> list[list[codecs.Chunk]]:
    """Return the chunks of what changed, with their bases, each tensor's in its best mode."""
    chunks = []
    for name, tensor in new.items():
        if tensor.dtype.itemsize != KIND.itemsize or tensor.nbytes < CHUNK_SIZE:
            continue
        data, base = (t.detach().reshape(-1).numpy().view(np.uint8) for t in (tensor, old[name]))
        mode = None
        for at in range(0, data.size - CHUNK_SIZE + 1, CHUNK_SIZE):
            part = slice(at, at + CHUNK_SIZE)
            buffer = np.empty(codecs.room(CHUNK_SIZE), np.uint8)
            chunk = codecs.Chunk(data[part], KIND, buffer, codecs.Base(base[part]))
            mode = mode or codecs.best_mode(chunk)
            if mode != codecs.WHOLE:
                chunks.append(chunk._replace(mode=mode))
    return [chunks[at : at + N_CHUNKS] for at in range(0, len(chunks) - N_CHUNKS + 1, N_CHUNKS)]


def stages(given: list[list[codecs.Chunk]], at: Path, repeats: int) -> dict[str, float]:
    """Return the CPU seconds a GB of chunks, the median of the repeats."""
    took: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, seconds in once(given, at).items():
            took.setdefault(name, []).append(seconds)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def hashed(datas: list[Any]) -> list[bytes]:
    return [xxhash.xxh3_128_digest(data) for data in datas]


def named(datas: list[Any]) -> list[bytes]:
    return [blake3(data).digest() for data in datas]


def once(given: list[list[codecs.Chunk]], at: Path) -> dict[str, float]:
    total: dict[str, float] = {}

    def stage(name: str, function: Callable[[], Any]) -> Any:
        start = time.thread_time()
        result = function()
        total[name] = total.get(name, 0.0) + time.thread_time() - start
        return result

    file = os.open(at / "written", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    n_bytes = 0
    for batch in given:
        n_bytes += sum(chunk.data.size for chunk in batch)
        datas = [chunk.data for chunk in batch]
        stage("see what changed: xxh3", partial(hashed, datas))
        stage("identify: BLAKE3", partial(named, datas))
        found = stage("difference: map, subtract, group, sample", partial(dense.split_all, batch))
        splits = [one.split for one in found if isinstance(one, dense.Differences)]
        payloads = stage("code: Huffman by zstd, decoded and compared", partial(coder.encode_all, splits))
        stage("see that it has not changed since: xxh3", partial(hashed, datas))
        stage("write to the page cache", partial(os.writev, file, payloads))
        packed = [codecs.Packed(dense.NUMBER, payload, KIND.itemsize, CHUNK_SIZE, "") for payload in payloads]
        planes = stage("restore: decompress", partial(codecs.unpack, packed))
        outs = [np.empty(CHUNK_SIZE, np.uint8) for _ in batch]
        jobs = [
            codecs.Job(one, coded, out, chunk.base.data)
            for one, coded, out, chunk in zip(packed, planes, outs, batch, strict=True)
        ]
        stage("restore: add to the base", partial(codecs.join_all, jobs))
        stage("restore: compare with the id: BLAKE3", partial(named, outs))
    os.close(file)
    return {name: seconds / n_bytes * 1e9 for name, seconds in total.items()}


def saves(trainer: Trainer, at: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Return the medians of the phases of saves, and of all of each, in turns with `torch.save`."""
    took: dict[str, dict[str, list[float]]] = {name: {} for name in (*OPTIMIZE, "torch.save + fsync")}
    runs = {name: open_run(at / name, optimize=name) for name in OPTIMIZE}
    for step in range(repeats + 2):
        trainer.step()
        state = trainer.state()
        for name, run in runs.items():
            report = run.save(state, step=step)
            if step > 1:
                for phase, seconds in {**report.seconds, "all": report.total_s}.items():
                    took[name].setdefault(phase, []).append(seconds)
        path = at / f"{step}.pt"
        whole_s = timed(partial(torch_save, state, path))
        path.unlink()
        if step > 1:
            took["torch.save + fsync"].setdefault("all", []).append(whole_s)
    for run in runs.values():
        run.close()
    return {
        name: {phase: statistics.median(values) for phase, values in phases.items()}
        for name, phases in took.items()
    }


def main() -> None:
    given = opts.parser(__doc__, size_mib=256, repeats=5).parse_args()
    with opts.folder(given) as at:
        trainer = Trainer((given.size_mib << 20) // 32, adapter=False)
        trainer.step()
        old = {name: tensor.clone() for name, tensor in flatten(trainer.state())[0].items()}
        trainer.step()
        found = batches(old, flatten(trainer.state())[0])
        alone = stages(found, at, given.repeats)
        phases = saves(trainer, at, given.repeats)
    names = sorted({phase for of in phases.values() for phase in of}, key=lambda name: (name == "all", name))
    tables = [
        opts.Table(
            "Stages, one core",
            ["stage", ">seconds a GB", ">GB/s"],
            [[name, f"{seconds:.3f}", f"{1 / seconds:.1f}"] for name, seconds in alone.items()],
        ),
        opts.Table(
            "Phases of the thread that saves",
            ["phase", *(f">{name}" for name in phases)],
            [
                [name, *(human_time(of[name]) if name in of else "" for of in phases.values())]
                for name in names
            ],
        ),
    ]
    opts.show(given, {"stages": alone, "phases": phases}, tables, [])


if __name__ == "__main__":
    main()
