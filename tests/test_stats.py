"""What a store's steps take, counted from its records, against an obviously right count of the bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deltackpt import delta, open_run, open_store, stats
from deltackpt.backends.memory import MemoryBackend
from deltackpt.energy import Energy, whole
from deltackpt.errors import CorruptError, NotFoundError
from deltackpt.format import RECORD_HEADER, ROW
from deltackpt.groups import group_of
from deltackpt.records import Commit, Figures, Slot
from deltackpt.restore import resolve
from deltackpt.run import Run

SIZE = 300_000  # floats of a tensor: some five chunks


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)


def state(step: int, base: int = 0) -> dict[str, Any]:
    """Weights of which a part is frozen and one is tied by value, moments that change, and a counter."""
    return {
        "model": {"frozen": noise(base), "head": noise(100 + base + step), "again": noise(base)},
        "optimizer": {"head": {"exp_avg": noise(200 + base + step), "step": np.array(float(step))}},
    }


@pytest.fixture
def store():
    """Run a of three steps, run b of two that shares its frozen weights, run c of one that shares nothing."""
    opened = open_store(MemoryBackend(), create=True)
    for run, step, base in [("a", 1, 0), ("a", 2, 0), ("a", 3, 0), ("b", 5, 0), ("b", 6, 0), ("c", 1, 50)]:
        delta.save(state(step, base), opened, step=step, run=run)
    return opened


def chunks_of(store, run: str, step: int) -> list[tuple[bytes, int, str]]:
    """A step's chunks, one by one: id, size, group."""
    rows = Run(store, run).manifest(step).tensors
    return [
        (entry["id"].tobytes(), int(entry["size"]), group_of(row.name, row.dtype, row.shape))
        for row, table in zip(rows, resolve(store, rows), strict=True)
        for entry in table
    ]


def counted(store, steps: list[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """The definition, word by word, with sets."""
    sums = {g: dict.fromkeys(("repeated", "unchanged", "shared", "new", "stored"), 0) for g in stats.GROUPS}
    seen: set[bytes] = set()
    by_run: dict[str, set[bytes]] = {}
    for run, step in steps:
        in_step: set[bytes] = set()
        in_run = by_run.setdefault(run, set())
        for chunk, size, group in chunks_of(store, run, step):
            if chunk in in_step:
                column = "repeated"
            elif chunk in in_run:
                column = "unchanged"
            elif chunk in seen:
                column = "shared"
            else:
                column = "new"
                row = store.find(np.frombuffer(chunk, np.uint8).reshape(1, 32))[0]
                sums[group]["stored"] += int(row["stored_size"]) + RECORD_HEADER.size + ROW.itemsize
            sums[group][column] += size
            in_step.add(chunk)
        in_run |= in_step
        seen |= in_step
    return sums


def as_table(groups: dict[str, stats.Sums]) -> dict[str, dict[str, int]]:
    return {
        name: {c: getattr(sums, f"{c}_size") for c in ("repeated", "unchanged", "shared", "new", "stored")}
        for name, sums in groups.items()
    }


ALL = [("a", 1), ("a", 2), ("a", 3), ("b", 5), ("b", 6), ("c", 1)]


def test_the_sums_are_those_of_the_definition(store):
    found = stats.look(store)
    expected = counted(store, ALL)
    assert as_table(found.groups) == expected
    assert all(sum(columns.values()) > 0 for columns in expected.values())
    assert {c for columns in expected.values() for c, size in columns.items() if size} == {
        "repeated", "unchanged", "shared", "new", "stored"
    }  # fmt: skip


def test_a_run_is_counted_as_if_it_were_alone(store):
    found = stats.look(store, "b")
    assert as_table(found.groups) == counted(store, [("b", 5), ("b", 6)])
    assert [run.run for run in found.runs] == ["b"]
    assert found.sums == found.runs[0].sums == stats.look(store).runs[1].sums
    assert [(line["run"], line["step"]) for line in found.steps] == [("b", 5), ("b", 6)]


def test_what_is_handed_in_is_what_the_saves_said(store):
    found = stats.look(store)
    assert found.sums.logical_size == sum(line["logical_size"] for line in found.steps)
    for sums in [found.sums, *found.groups.values(), *(run.sums for run in found.runs)]:
        parts = sums.repeated_size + sums.unchanged_size + sums.shared_size + sums.new_size
        assert sums.logical_size == parts == parts - sums.new_size + sums.encoded_size + sums.stored_size


def test_only_its_own_is_what_forgetting_a_run_frees(store):
    before = stats.look(store)
    for run in before.runs:
        others = [(name, step) for name, step in ALL if name != run.run]
        left = sum(columns["stored"] for columns in counted(store, others).values())
        assert run.only_size == before.sums.stored_size - left


def test_groups_and_how_much_of_them_changes(store):
    found = stats.look(store)
    assert found.groups["weights"].logical_size == 6 * 3 * SIZE * 4
    assert found.groups["moments"].logical_size == 6 * SIZE * 4
    assert found.groups["other"].logical_size == 6 * 8
    assert found.changed == {"weights": pytest.approx(1 / 3), "moments": 1.0, "other": 1.0}


def test_the_words_say_where_it_comes_from_and_where_it_does_not_pay(store):
    headline, *lines = str(stats.look(store)).splitlines()
    assert headline.startswith("6 steps of 3 runs: 28.8 MB handed in, ")
    assert headline.endswith(" times smaller")
    text = "\n".join(lines)
    for words in (
        "unchanged since an earlier",
        "shared with another run",
        "repeated within",
        "encoding what",
    ):
        assert words in text
    assert "does not pay much: optimizer moments, 1." in text
    assert "100 % of their bytes change from step to step" in text
    assert "does not pay much: weights" not in text


def test_one_step_says_that_there_is_nothing_to_be_unchanged_yet():
    opened = open_store(MemoryBackend(), create=True)
    delta.save({"w": noise(1)}, opened, step=1)
    text = str(stats.look(opened))
    assert "1 step of 1 run: 1.2 MB handed in" in text
    assert "does not pay much: weights" in text
    assert "in one step only" in text


def test_energy_is_summed_over_the_saves_that_have_it_on_record(store):
    commits = [commit for name in "abc" for commit in open_run(store, name).commits()]
    found = stats.look(store).energy
    assert (found.n_saves, found.n_steps) == (6, 6)
    assert found.took.joules == pytest.approx(sum(c.figures.energy.joules for c in commits), abs=1e-4)
    assert found.took.joules > 0
    assert found.whole_joules == pytest.approx(sum(whole(c.figures.logical_size) for c in commits))
    assert str(found) in str(stats.look(store))
    before = [replace(c, figures=replace(c.figures, energy=None)) for c in commits]
    assert stats.EnergySums.of(before) == stats.EnergySums(0, 6, Energy(), 0)
    assert stats.EnergySums.of([*before[1:], commits[0]]).took == commits[0].figures.energy


def test_what_whole_saves_take_follows_the_bytes_handed_in_alone():
    def energy(size, joules):
        figures = Figures(logical_size=size, energy=Energy.of({"nvml": joules}))
        return stats.EnergySums.of([Commit(Slot("a", 1, 1), b"", b"", None, 0.0, {}, {}, figures)])

    assert energy(10**9, 1.0).whole_joules == energy(10**9, 9.0).whole_joules == pytest.approx(8.14)
    assert energy(2 * 10**9, 1.0).whole_joules == pytest.approx(16.28)


def test_an_empty_store_has_zero_of_everything():
    found = stats.look(open_store(MemoryBackend(), create=True))
    assert found.sums == stats.Sums(0, 0, 0, 0, 0, 0)
    assert "0 steps of 0 runs: 0 B handed in" in str(found)
    assert found.to_json()["steps"] == []


def test_a_state_without_bytes_is_counted():
    opened = open_store(MemoryBackend(), create=True)
    delta.save({"e": np.zeros((0, 3)), "lr": 0.1}, opened, step=1)
    assert stats.look(opened).sums.factor is None
    assert len(stats.look(opened).steps) == 1


def test_no_tensor_is_read(store, monkeypatch):
    read = []
    original = type(store).read_into
    monkeypatch.setattr(
        type(store),
        "read_into",
        lambda self, i, row, out, *rest: read.append(out.size) or original(self, i, row, out, *rest),
    )
    stats.look(store)
    assert max(read) < 1000  # lists


def test_an_unknown_run_and_damage_are_errors(store):
    with pytest.raises(NotFoundError, match="run 'd' has no steps"):
        stats.look(store, "d")
    store.backend.delete(Run(store, "a").commit(2).manifest_key)
    with pytest.raises(CorruptError, match=r"run 'a' step 2: .*manifest is missing"):
        stats.look(store)
