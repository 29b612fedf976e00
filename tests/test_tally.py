"""What each group cost, counted beside a save, against an obviously right count of what the store holds."""

import numpy as np
import pytest
from plain import weights

from deltackpt import open_run, open_store
from deltackpt.backends.memory import MemoryBackend
from deltackpt.codecs import NAMES
from deltackpt.format import ROW
from deltackpt.groups import Coded, group_of
from deltackpt.manifest import TensorRow
from deltackpt.restore import resolve
from deltackpt.run import Run
from deltackpt.tally import N_GROUPS_MAX, Tally

SIZE = 300_000


def state(step):
    rng = np.random.default_rng(step)
    noise = rng.standard_normal(SIZE).astype(np.float32)
    w = weights(SIZE)
    moved = (w * (1 + 1e-5 * rng.standard_normal(w.shape))).astype(w.dtype)
    return {
        "model": {"w": moved, "frozen": w, "half": moved.astype(np.float16)},
        "optimizer": {"w": {"exp_avg": noise, "exp_avg_sq": noise * noise, "again": noise.copy()}},
        "rng": rng.integers(0, 256, 5056).astype(np.uint8),
        "zeros": np.zeros((0, 3)),
    }


@pytest.fixture
def run():
    return open_run(MemoryBackend())


def counted(run, step):
    """Bytes and payloads put, by group, dtype and codec: tensor by tensor, the first that has a chunk."""
    commit = run.commit(step)
    segments = open_store(run.store.backend).refresh(complete=True).segments
    put = {
        row["id"].tobytes(): row
        for segment in segments
        for row in segment.rows
        if segment.packs[int(row["pack"])].sid == commit.sid
    }
    sums = {}
    tensors = run.manifest(step).tensors
    for tensor, table in zip(tensors, resolve(run.store, tensors), strict=True):
        for entry in table:
            row = put.pop(entry["id"].tobytes(), None)
            if row is not None:
                key = (
                    group_of(tensor.name, tensor.dtype, tensor.shape),
                    tensor.dtype,
                    NAMES[int(row["codec"])],
                )
                sums[key] = sums.get(key, Coded()) + Coded(1, int(row["raw_size"]), int(row["stored_size"]))
    return sums


def test_the_costs_are_those_of_the_definition(run):
    for step in range(3):
        report = run.save(state(step), step=step)
        told = {(g.group, g.dtype, name): c for g in report.groups for name, c in g.codecs.items()}
        assert told == counted(run, step)
        assert sum(g.logical_size for g in report.groups) == report.logical_size
        assert sum(g.n_chunks for g in report.groups) == report.n_chunks
        assert {g.group for g in report.groups} == {"weights", "moments", "other"}
    names = {name for group in report.groups for name in group.codecs}
    assert {"delta-dense", "planes"} <= names


def test_what_had_a_base_is_told_from_what_had_none(run):
    first = run.save(state(0), step=0)
    assert [g.based_size for g in first.groups if g.dtype == "float32"] == [0, 0]
    second = run.save(state(1), step=1)
    assert all(g.based_size == g.changed_size for g in second.groups)


def test_what_did_not_change_costs_nothing(run):
    run.save(state(0), step=0)
    report = run.save(state(0), step=1)
    assert [g.codecs for g in report.groups] == [{}] * len(report.groups)
    assert report.groups[0].same.size == report.groups[0].logical_size
    assert report.table().splitlines()[0].split() == ["group", "dtype", "in", "changed", "stored", "same"]


def test_the_groups_are_kept_with_the_step_and_a_fork_paid_nothing_for_them(run):
    report = run.save(state(0), step=0)
    assert Run(open_store(run.store.backend), "main").commit(0).figures.groups == report.groups
    forked = run.fork("branch").commit().figures.groups
    assert [g.codecs for g in forked] == [{}] * len(report.groups)
    assert [g.logical_size for g in forked] == [g.logical_size for g in report.groups]


def test_a_chunk_that_two_tensors_put_is_the_first_ones_and_lists_are_nobodys():
    ids = np.arange(96, dtype=np.uint8).reshape(3, 32)
    rows = np.zeros(3, ROW)
    rows["id"], rows["raw_size"], rows["stored_size"], rows["codec"] = (
        ids,
        [100, 50, 7],
        [60, 50, 7],
        [2, 0, 0],
    )
    a, b = (TensorRow(name, "float32", (25,), "numpy", 100, 1, b"", b"") for name in ("w", "opt.w"))
    tally = Tally()
    tally.put(a, ids[:1], [False])
    tally.put(b, ids[:2], [True, True])
    one, other = tally.costs([(a, 1), (b, 2)], rows)
    assert (one.codecs, one.based_size) == ({"planes": Coded(1, 100, 60)}, 0)
    assert (other.codecs, other.based_size) == ({"raw": Coded(1, 50, 50)}, 50)


def test_a_state_of_very_many_dtypes_has_a_dozen_groups_and_all_of_its_bytes(run):
    names = ["f2", "f4", "f8", "c8", "c16", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"]
    arrays = {f"a{name.strip('?')}": np.ones(100 + i, name) for i, name in enumerate(names)}
    report = run.save(arrays, step=0)
    assert len(report.groups) == N_GROUPS_MAX
    assert sum(g.logical_size for g in report.groups) == sum(a.nbytes for a in arrays.values())
    assert "mixed" in [g.dtype for g in report.groups]
