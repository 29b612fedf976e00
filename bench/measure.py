"""One tool on one series: all saves in one fresh process, the restore of the last in another.

Owns   the processes, what is timed and what is not, and the comparison of the restored bytes.
Never  averages: each call is one measurement.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cache import SavedState, Series, Tensors, flatten
from meter import measured, memory, tree_size
from peers import PEERS, Deltackpt, Given, Peer

# Forks from a process that has imported torch and done nothing yet: fresh, without paying for the imports.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch", "safetensors.torch", "deltackpt.delta"])

#: How often the slowest step is restored.
N_DEEP = 5


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one tool did with one series, once.

    Parameters
    ----------
    save_s : list of float
        Seconds of each save, until it is durable.
    stored_size : list of int
        Bytes of the store after each save.
    restore_s : float
        Seconds until the last state is in memory.
    save_memory_size, restore_memory_size : int
        Most memory beyond the Python process with its imports and the state that it saves; a restore's
        includes the state that it brings back.
    lossless : bool
        Whether every bit of the last state came back.
    deep_restore : list of float
        Of deltackpt: seconds to restore the slowest step, to those of the same state saved alone.
    """

    save_s: list[float]
    stored_size: list[int]
    restore_s: float
    save_memory_size: int
    restore_memory_size: int
    lossless: bool
    deep_restore: list[float]


def measure(peer: str, series: Series, at: Path) -> Measurement:
    """Measure a tool in a new folder `at`, which is removed afterwards.

    Raises
    ------
    Exception
        Whatever the tool raises.
    """
    os.sync()  # so that nobody pays for what the tool before left to be written
    try:
        at.mkdir(parents=True)
        save_s, stored_size, save_memory_size = in_fresh_process(save_all, peer, series, at)
        restore_s, restore_memory_size, lossless = in_fresh_process(restore_last, peer, series, at)
        deep = in_fresh_process(deep_restore, peer, series, at) if PEERS[peer] is Deltackpt else []
    finally:
        shutil.rmtree(at, ignore_errors=True)
    return Measurement(save_s, stored_size, restore_s, save_memory_size, restore_memory_size, lossless, deep)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own; what it raises is raised here."""
    with ProcessPoolExecutor(1, mp_context=_processes) as pool:
        return pool.submit(function, *arguments).result()


def save_all(name: str, series: Series, at: Path) -> tuple[list[float], list[int], int]:
    peer, save_s, stored_size, most_size = PEERS[name](at), [], [], 0
    tensors: Tensors = {}
    peer.prepare()
    gc.freeze()  # what the imports left is not looked through after each save
    own_size = memory("self", "VmRSS")
    for saved in series.saves:
        given = given_to(peer, saved, tensors)
        with measured() as cost:
            peer.save(given)
        save_s.append(cost.seconds)
        stored_size.append(tree_size(peer.store))
        state_size = 0 if peer.takes_files else saved.state_size
        most_size = max(most_size, cost.peak_size - own_size - state_size, peer.tool_peak_size)
        gc.collect()
    return save_s, stored_size, most_size


def given_to(peer: Peer, saved: SavedState, tensors: Tensors) -> Given:
    """What a tool gets; `tensors` stay where they are from save to save, as a training's do."""
    if peer.takes_files:
        return Given(saved.run, saved.step, {}, {}, Path(saved.path))
    saved.fill(tensors)
    return Given(saved.run, saved.step, saved.nested(tensors), tensors, Path(saved.path))


def restore_last(name: str, series: Series, at: Path) -> tuple[float, int, bool]:
    peer = PEERS[name](at)
    own_size = memory("self", "VmRSS")
    with measured() as cost:
        state = peer.restore(series.saves)
    extra_size = max(cost.peak_size - own_size, peer.tool_peak_size)
    return cost.seconds, extra_size, is_same(flatten(state)[0], series.saves[-1].tensors())


def deep_restore(name: str, series: Series, at: Path) -> list[float]:
    """The slowest step, which is the deepest, and the same state in a store of its own, in turns."""
    peer, alone, saves = PEERS[name](at), PEERS[name](at / "alone"), series.saves

    def restore_s(peer: Peer, saves: list[SavedState]) -> float:
        with measured() as cost:
            peer.restore(saves)
        return cost.seconds

    restore_s(peer, saves)  # what only the first pays
    least_s = [min(restore_s(peer, saves[: i + 1]) for _ in range(2)) for i in range(len(saves))]
    slowest = saves[: least_s.index(max(least_s)) + 1]
    alone.at.mkdir()
    alone.prepare()
    alone.save(given_to(alone, slowest[-1], {}))
    os.sync()
    return [restore_s(peer, slowest) / restore_s(alone, slowest) for _ in range(N_DEEP)]


def is_same(found: Tensors, expected: Tensors) -> bool:
    """Whether names, types, shapes and every bit are the same."""
    return found.keys() == expected.keys() and all(same_bits(found[name], t) for name, t in expected.items())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
