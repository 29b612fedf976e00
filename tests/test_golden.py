"""Stores written by releases load for ever, and new saves still meet the chunks in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import make_golden
import numpy as np
import pytest

from deltackpt import gc
from deltackpt.backends.local import LocalBackend
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import CorruptError
from deltackpt.records import Commit, Fence, Origin, Slot
from deltackpt.restore import fill
from deltackpt.run import Run
from deltackpt.store import DIRS, Store
from deltackpt.types import DTYPE_SIZES
from deltackpt.verify import verify

try:
    import torch
except ImportError:
    torch = None

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def opened(version: str) -> tuple[Store, dict[str, Any]]:
    expected = json.loads((GOLDEN / version / "expected.json").read_text())
    return Store(LocalBackend(GOLDEN / version / "store")), expected


def plain(value: Any) -> Any:
    """A state as something that compares by bits: arrays as dtype, shape and bytes."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return type(value).__name__, [(repr(k), plain(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [plain(v) for v in value]
    return type(value).__name__, value


@pytest.mark.parametrize("version", VERSIONS)
def test_every_step_of_a_golden_store_comes_back(version: str):
    store, expected = opened(version)
    assert make_golden.describe(store) == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_a_golden_store_verifies(version: str):
    report = verify(LocalBackend(GOLDEN / version / "store"), level="decode")
    assert report.damage == []
    assert report.foreign == []


def test_v1_loads_as_the_states_that_were_saved():
    store, _ = opened("v1")
    run = Run(store, "main")
    assert run.steps() == [1, 3, 5]
    for step, saved_as in [(1, 1), (3, 4), (5, 5)]:
        loaded = run.load(step)
        assert plain(loaded) == plain(make_golden.state(saved_as))
        assert loaded["model"]["tied"] is loaded["model"]["again"]
    assert run.commit(3).metrics == {"loss": 0.25}
    assert (run.commit(1).metadata, run.commit(3).parent) == ({"lr": 3e-4}, 2)


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_v1_loads_torch_tensors():
    store, _ = opened("v1")
    loaded, saved = Run(store, "torch").load(10), make_golden.torch_state()
    assert list(loaded) == list(saved)
    for name, tensor in saved.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        same = [
            x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for x in (loaded[name], tensor)
        ]
        assert same[0] == same[1]


def test_v1_holds_what_its_readme_says():
    store, expected = opened("v1")
    rows = np.concatenate([segment.rows for segment in store.refresh(complete=True).segments])
    assert set(rows["codec"].tolist()) == {0, 1, 2}
    tensors = [t for run in expected.values() for step in run.values() for t in step["tensors"].values()]
    assert {t["level"] for t in tensors} == {0, 1, 2}
    assert {t["dtype"] for t in tensors} == set(DTYPE_SIZES)
    decisions = [store.refs.decision(Slot("main", *at)) for at in [(3, 1), (3, 2), (5, 1), (5, 2)]]
    assert [type(d) for d in decisions] == [Commit, Commit, Fence, Commit]
    assert store.gc_state()[0] == 1
    assert store.gc_record("gc/sweep-0").packs == store.gc_record("gc/condemn-0").packs
    size = sum(path.stat().st_size for path in (GOLDEN / "v1").rglob("*") if path.is_file())
    assert size < 150_000


def test_v1_runs_holds_what_its_readme_says():
    store, _ = opened("v1-runs")
    run, branch = Run(store, "main"), Run(store, "branch")
    assert (run.steps(), run.pinned()) == ([1, 3, 4], [1, 3])
    assert {pin.key for pin in store.refs.listing("main").pins} == {
        f"refs/main/{name}" for name in ("1.pin-1", "2.pin-1", "2.pin-2", "3.pin-1")
    }
    assert store.backend.exists("refs/main/3.1.gone")
    assert not store.refs.is_gone(Slot("main", 3, 1))
    assert branch.steps() == [2, 3]
    assert [commit.origin for commit in branch.commits()] == [Origin("main", 2), None]
    assert branch.load(2)["step"] == 2
    assert run.load(3)["w"].tobytes() == make_golden.weights(300, 3).tobytes()
    assert store.gc_state()[0] == 1
    size = sum(path.stat().st_size for path in (GOLDEN / "v1-runs").rglob("*") if path.is_file())
    assert size < 40_000


def test_the_same_is_written_today():
    _, expected = opened("v1-runs")
    store = make_golden.make_store(MemoryBackend())
    make_golden.write_runs(store)
    assert make_golden.describe(store) == expected


def test_a_state_saved_anew_has_the_chunks_and_the_manifest_of_the_golden_store():
    _, expected = opened("v1")
    store = make_golden.make_store(MemoryBackend())
    make_golden.write(store, with_torch=torch is not None)
    assert make_golden.describe(store).items() <= expected.items()


def test_a_golden_store_goes_on_as_if_written_today(tmp_path: Path):
    shutil.copytree(GOLDEN / "v1" / "store", tmp_path / "store")
    backend = LocalBackend(tmp_path / "store")
    backend.make_dirs(DIRS)  # git keeps no empty directory
    store = Store(backend)
    run = Run(store, "main")
    report = run.save(make_golden.state(5), step=6)
    assert report.new_size == 0
    run.save(make_golden.state(7), step=7)
    run.forget([1, 3, 5, 6])
    gc.collect(store)
    assert verify(store, level="decode").clean
    assert plain(Run(Store(backend), "main").load(7)) == plain(make_golden.state(7))


def test_one_damaged_byte_of_a_golden_pack_is_an_error_and_never_a_guess():
    store, _ = opened("v1")
    memory = MemoryBackend()
    for path in sorted((GOLDEN / "v1" / "store").rglob("*")):
        if path.is_file():
            data = bytearray(path.read_bytes())
            if path.suffix == ".pack":
                data[100::400] = [b ^ 1 for b in data[100::400]]
            memory.create_once(path.relative_to(GOLDEN / "v1" / "store").as_posix(), bytes(data))
    damaged, wrong = Store(memory), 0
    for row in Run(store, "main").manifest(5).tensors:
        good, bad = np.empty(row.size, np.uint8), np.empty(row.size, np.uint8)
        fill(store, [(row, good)])
        try:
            fill(damaged, [(row, bad)])
        except CorruptError:
            wrong += 1
        else:
            assert good.tobytes() == bad.tobytes()
    assert wrong
