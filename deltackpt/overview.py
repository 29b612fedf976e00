"""Overview: what a store holds, and what runs here, as plain values to be shown.

Owns   gathering them.
Never  formats, or reads a tensor.
"""

from __future__ import annotations

import importlib.metadata
import platform
import uuid
from dataclasses import asdict
from typing import Any

import deltackpt
from deltackpt import kernels
from deltackpt.format import VERSION
from deltackpt.pack import PackName
from deltackpt.records import Commit
from deltackpt.restore import resolve
from deltackpt.run import Run
from deltackpt.store import DESCRIPTOR, DIRS, Store

_PACKAGES = ("numpy", "torch", "zstandard", "lz4", "blake3", "xxhash")


def commits(store: Store, run: str | None = None) -> list[Commit]:
    """Return the commits of a run, or of all runs, by run and step.

    Raises
    ------
    NotFoundError
        If the run named has no steps.

    Examples
    --------
    >>> from deltackpt import delta, open_store
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> store = open_store(MemoryBackend(), create=True)
    >>> report = delta.save({"w": [1.0]}, store, step=3)
    >>> [(c.slot.run, c.slot.step) for c in commits(store)]
    [('main', 3)]
    """
    found = [c for r in (store.refs.runs() if run is None else [run]) for c in store.refs.steps(r).values()]
    if run is not None and not found:
        raise store.refs.unknown_step(run, None)
    return found


def listing(store: Store, run: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run, or of all runs: `step_line`, and whether the step is pinned.

    Raises
    ------
    NotFoundError
        If the run named has no steps.

    Examples
    --------
    >>> from deltackpt import open_run
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> run = open_run(MemoryBackend())
    >>> for step in (1, 2):
    ...     _ = run.save({"w": [1.0]}, step=step)
    >>> run.pin(1)
    >>> [(line["step"], line["pinned"]) for line in listing(run.store)]
    [(1, True), (2, False)]
    """
    found = commits(store, run)
    pinned = {name: store.refs.listing(name).pinned for name in {commit.slot.run for commit in found}}
    return [{**step_line(c), "pinned": c.slot.step in pinned[c.slot.run]} for c in found]


def step_line(commit: Commit) -> dict[str, Any]:
    """Return what is on record of a step: sizes in bytes, time in seconds since 1970."""
    figures = commit.figures
    return {
        "run": commit.slot.run,
        "step": commit.slot.step,
        "created_s": commit.created_s,
        "logical_size": figures.logical_size,
        "new_size": figures.new_size,
        "written_size": figures.written_size,
        "ratio": figures.written_size / figures.logical_size if figures.logical_size else 0.0,
        "n_tensors": figures.n_tensors,
        "energy": asdict(figures.energy) if figures.energy else None,
        "metrics": commit.metrics,
        "metadata": commit.metadata,
        "origin": asdict(commit.origin) if commit.origin else None,
    }


def contents(run: Run, step: int | str = "latest") -> dict[str, Any]:
    """Return all that is on record of a step, and how many chunks each of its tensors has."""
    commit = run.commit(step)
    manifest = run.store.read_manifest(commit)
    n_chunks = [len(table) for table in resolve(run.store, manifest.tensors)]
    tensors = [
        {
            **asdict(row),
            "root": row.root.hex(),
            "fingerprint": row.fingerprint.hex(),
            "n_chunks": n,
        }
        for row, n in zip(manifest.tensors, n_chunks, strict=True)
    ]
    record = {
        **asdict(commit),
        "sid": commit.sid.hex(),
        "manifest": commit.manifest.hex(),
        "manifest_key": commit.manifest_key,
    }
    return {
        "run": commit.slot.run,
        "step": commit.slot.step,
        "commit": record,
        "tensors": tensors,
        "structure": manifest.structure,
    }


def build() -> dict[str, Any]:
    """Return which deltackpt runs here, on what; a package that is not installed is None."""
    return {
        "version": deltackpt.__version__,
        "format_version": VERSION,
        "kernels": kernels.describe(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    # Asks the installer's records: importing torch to ask it takes a second.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def totals(store: Store) -> dict[str, Any]:
    """Return a store's identity and its sizes in bytes."""
    runs = store.refs.runs()
    packs = [e for e in store.backend.list("packs/") if PackName.from_key(e.name)]
    others = [e for d in DIRS if d not in ("packs", "refs") for e in store.backend.list(f"{d}/")]
    others += [e for run in runs for e in store.backend.list(f"refs/{run}/")]
    pack_size = sum(e.size for e in packs)
    return {
        "url": store.url,
        "uuid": str(uuid.UUID(bytes=store.uuid)),
        "n_runs": len(runs),
        "n_steps": len(commits(store)),
        "n_packs": len(packs),
        "pack_size": pack_size,
        "size": pack_size + sum(e.size for e in others) + store.backend.size(DESCRIPTOR),
    }
