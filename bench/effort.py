"""What an encoder's efforts give and take, which way to write is quickest, and how long dense saves take.

    python bench/effort.py [--size-mib 192] [--repeats 7] [--dir DIR] [--parts encoding writing saving]

encoding: fp32 weights and moments of `pairs.py`, ten steps apart: bytes stored for each, CPU seconds of a
core a GB; *fast* by how many bits a byte a plane may have that is coded.  writing: a file of --size-mib, by
when the device is told to begin; bytes are hashed meanwhile, as in a save.  saving: a full fine-tune, all of
which changes, by what is optimized, in turns with torch.save + fsync into a new file.

Memory that the machine never used takes up to 2 s a GB when it is first touched: --size-mib of it is, three
times over, before anything is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from blake3 import blake3
from cache import default_cache
from meter import machine
from pairs import Pair, pair
from spine import Trainer, timed, torch_save

from deltackpt import codecs, open_run
from deltackpt.codecs import encoder

CASES = ("fp32-1e-3-weights-10", "fp32-1e-3-exp_avg-10", "fp32-1e-3-exp_avg_sq-10", "fp32-1e-5-weights-10")
FAST_BITS = (5.0, 3.0, 1.0, 0.0)
CHUNK_SIZE, BATCH_SIZE, WRITE_SIZE = 1 << 18, 1 << 20, 1 << 20


# ---------------------------------------------------------------- encoding


def chunks(given: Pair, has_base: bool) -> Iterator[codecs.Chunk]:
    """The chunks of a pair, each tensor's in its best mode."""
    kind = codecs.Kind(given.itemsize, True)
    for name, new in given.new.items():
        data, old = (t.reshape(-1).numpy().view(np.uint8) for t in (new, given.old[name]))
        mode = None
        for at in range(0, data.size - CHUNK_SIZE + 1, CHUNK_SIZE):
            part = slice(at, at + CHUNK_SIZE)
            base = codecs.Base(old[part]) if has_base else None
            chunk = codecs.Chunk(data[part], kind, np.empty(codecs.room(CHUNK_SIZE), np.uint8), base)
            mode = mode or (codecs.best_mode(chunk) if has_base else None)
            yield chunk._replace(mode=mode)


def encoding(size: str, repeats: int) -> dict[str, Any]:
    """Stored share and CPU seconds a GB, by case and effort."""
    found: dict[str, Any] = {}
    for case in CASES:
        given = pair(case, size, 0, default_cache())
        for has_base in (True, False):
            todo = list(chunks(given, has_base))
            row = found[f"{case}, {'delta' if has_base else 'whole'}"] = {"small": encoded(todo, repeats)}
            for bits in FAST_BITS:
                encoder._FAST_BITS = bits
                row[f"fast, {bits:g} bits"] = encoded(todo, repeats, fast=True)
    return found


def encoded(todo: list[codecs.Chunk], repeats: int, **how: bool) -> dict[str, float]:
    n = BATCH_SIZE // CHUNK_SIZE
    took_s = []
    for _ in range(repeats):
        start_s = time.thread_time()
        done = [codecs.encode_all(todo[i : i + n], **how) for i in range(0, len(todo), n)]
        took_s.append(time.thread_time() - start_s)
    size = CHUNK_SIZE * len(todo)
    stored_size = sum(len(e.payload) for batch in done for e in batch)
    return {"share": stored_size / size, "cpu_s_per_gb": min(took_s) / size * 1e9}


# ---------------------------------------------------------------- writing


def begin(fd: int, offset: int, size: int) -> None:
    os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def write(path: Path, data: np.ndarray, behind_size: int, *, reserve: bool, flushes: bool) -> None:
    """One file, written and flushed by a thread while this one hashes; told to begin every `behind_size`."""
    queue: SimpleQueue[np.ndarray | None] = SimpleQueue()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    if reserve:
        os.posix_fallocate(fd, 0, data.size)

    def writing() -> None:
        done = begun = 0
        while (part := queue.get()) is not None:
            done += os.write(fd, part)
            if behind_size and done - begun >= behind_size:
                os.fdatasync(fd) if flushes else begin(fd, begun, done - begun)
                begun = done
        os.fsync(fd)

    thread = threading.Thread(target=writing)
    thread.start()
    for at in range(0, data.size, WRITE_SIZE):
        part = data[at : at + WRITE_SIZE]
        blake3(part).digest()
        queue.put(part)
    queue.put(None)
    thread.join()
    os.close(fd)


def writing(at: Path, size: int, repeats: int) -> dict[str, float]:
    """Median seconds of each way, in turns."""
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    ways: dict[str, Callable[[Path], None]] = {
        "fsync at the end": lambda path: write(path, data, 0, reserve=False, flushes=False),
        "posix_fallocate": lambda path: write(path, data, 0, reserve=True, flushes=False),
        "write-behind every 8 MiB": lambda path: write(path, data, 8 << 20, reserve=False, flushes=False),
        "write-behind every 32 MiB": lambda path: write(path, data, 32 << 20, reserve=False, flushes=False),
        "fdatasync every 32 MiB": lambda path: write(path, data, 32 << 20, reserve=False, flushes=True),
    }
    took_s: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, how in ways.items():
            took_s[way].append(timed(lambda how=how: how(at / "file")))
            (at / "file").unlink()
    return {way: statistics.median(values) for way, values in took_s.items()}


# ---------------------------------------------------------------- saving


def saving(at: Path, size: int, repeats: int) -> dict[str, Any]:
    """A dense state by what is optimized, in turns with torch.save."""
    trainer = Trainer(size // 3, adapter=False)
    runs = {optimize: open_run(at / optimize, optimize=optimize) for optimize in ("time", "bytes", "energy")}
    for step in range(2):  # the second has bases, and tries modes
        trainer.step()
        for run in runs.values():
            run.save(trainer.state(), step=step)
    took_s: dict[str, list[float]] = {name: [] for name in ("torch.save", *runs)}
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    told = {}
    for step in range(2, 2 + repeats):
        trainer.step()
        state = trainer.state()
        took_s["torch.save"].append(timed(lambda state=state: torch_save(state, at / "x.pt")))
        (at / "x.pt").unlink()
        for name, run in runs.items():
            report = run.save(state, step=step)
            took_s[name].append(report.total_s)
            ratios[name].append(report.ratio)
            told[name] = report.efforts
    torch_s = took_s["torch.save"]
    return {
        "state_size": report.logical_size,
        "torch.save": {"s": statistics.median(torch_s)},
        **{
            name: {
                "s": statistics.median(took_s[name]),
                "to torch.save": statistics.median(
                    ours / theirs for ours, theirs in zip(took_s[name], torch_s, strict=True)
                ),
                "written": statistics.median(ratios[name]),
                "efforts": told[name],
            }
            for name in runs
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-mib", type=int, default=192)
    parser.add_argument("--size", default="small", help="of the trainings whose tensors are encoded")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dir", type=Path, help="where to write; default a temporary directory here")
    parser.add_argument("--parts", nargs="+", default=["encoding", "writing", "saving"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    size, repeats = options.size_mib << 20, options.repeats
    results: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(dir=options.dir or Path.cwd(), prefix="bench-") as name:
        at = Path(name)
        np.ones(3 * size, np.uint8)  # touched, and given back
        if "encoding" in options.parts:
            results["encoding"] = encoding(options.size, repeats)
        if "writing" in options.parts:
            results["writing, s"] = writing(at, size, repeats)
        if "saving" in options.parts:
            results["saving"] = saving(at, size, repeats)
    if options.json:
        print(json.dumps(results, indent=1))
        return
    for title, figures in results.items():
        print(title)
        for key, value in figures.items():
            print(f"  {key:36} {shown(value)}")


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {shown(each)}" for key, each in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
