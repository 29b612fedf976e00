"""A run as a collection of its steps: which stay after a save, which is good, and iterating over them."""

from __future__ import annotations

import errno
import logging

import numpy as np
import pytest
from faults import Wrapper, contents, memory_of
from steps import noise, opened, same, visible

from deltackpt import best, every, every_seconds, last, open_run, these
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import (
    AlreadyExistsError,
    CorruptError,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from deltackpt.export import export
from deltackpt.restore import check


def state(step):
    return {"w": noise(step, 2000), "step": step}


def train(run, steps, **kwargs):
    """Save steps; return what each save forgot."""
    return [run.save(state(step), step=step, **kwargs).forgotten for step in steps]


# -- keep


def test_without_rules_every_step_stays():
    run = open_run(MemoryBackend())
    assert train(run, range(5)) == [[]] * 5
    assert run.steps() == [0, 1, 2, 3, 4]
    assert [row.why for row in run.retention().rows] == ["there are no rules"] * 5


def test_after_a_save_what_no_rule_keeps_is_forgotten_and_reported():
    backend = MemoryBackend()
    run = open_run(backend, keep=last(2) | every(10))
    assert train(run, [10, 11, 12, 13, 20]) == [[], [], [], [11], [12]]
    assert run.steps() == [10, 13, 20]
    assert visible(backend).keys() == {10, 13, 20}
    report = run.save(state(21), step=21)
    assert report.forgotten == report.to_json()["forgotten"] == [13]
    assert str(report).endswith(", forgot 13")
    assert report.seconds["retain"] <= report.total_s


def test_the_retention_of_a_run_is_what_its_next_save_would_find():
    run = open_run(MemoryBackend(), keep=last(1) | best("loss", 1))
    for step, loss in [(10, 0.5), (20, 0.1), (30, 0.3)]:
        run.save(state(step), step=step, metrics={"loss": loss})
    assert str(run.retention()).splitlines() == [
        "step         why",
        "  20  stays  lowest loss, 1 of 1",
        "  30  stays  latest; last 1",
    ]
    assert run.retention(every(7)).goes == [20]


def test_a_metric_that_no_step_has_yet_or_that_is_misspelt_lets_no_step_go():
    run = open_run(MemoryBackend(), keep=best("loss", 2))
    assert train(run, [1, 2]) == [[], []]
    assert train(run, [3], metrics={"loss": 0.5}) == [[1, 2]]
    run = open_run(MemoryBackend(), keep=best("lss", 1) | last(1))
    assert train(run, [1, 2, 3], metrics={"loss": 0.5}) == [[], [], []]
    assert "no step has lss" in str(run.retention())


def test_what_was_resumed_from_stays_until_another_is_loaded():
    backend = MemoryBackend()
    train(open_run(backend), [1, 2, 3])
    run = open_run(backend, keep=last(1))
    assert same(run.load(2), state(2))
    assert train(run, [4, 5]) == [[1, 3], [4]]
    assert run.retention().rows[0].why == "resumed from"
    run.load("latest")
    run.manifest(2)  # to look at one is not to go on from it
    assert train(run, [6, 7]) == [[2], [6]]
    assert run.steps() == [5, 7]


def test_a_job_that_loads_nothing_keeps_the_latest_it_found():
    backend = MemoryBackend()
    train(open_run(backend), [1, 2, 3])
    run = open_run(backend, keep=last(1))
    assert train(run, [4, 5]) == [[1, 2], [4]]
    run.close()
    train(run, [6])
    assert run.steps() == [3, 6]


def test_a_job_that_found_nothing_keeps_no_step_for_it():
    run = open_run(MemoryBackend(), keep=last(1))
    train(run, [1, 2])
    run.close()
    train(run, [3, 4])
    assert run.steps() == [4]


def test_the_step_just_saved_stays_even_if_it_is_an_old_one():
    run = open_run(MemoryBackend(), keep=last(1))
    train(run, [10])
    assert run.save(state(3), step=3).forgotten == []
    assert run.steps() == [3, 10]


def test_a_pinned_step_stays():
    run = open_run(MemoryBackend(), keep=last(1))
    train(run, [1])
    run.pin(1)
    assert train(run, [2, 3]) == [[], [2]]
    assert run.steps() == [1, 3]
    run.unpin(1)
    assert train(run, [4]) == [[1, 3]]


def test_a_step_pinned_at_the_moment_it_is_forgotten_stays():
    backend = MemoryBackend()

    class Pinned(Wrapper):
        def _do(self, op, name, call, *, mutates=True):
            if (op, name) == ("create_once", "refs/main/1.1.gone"):
                opened(backend).pin(1)
            return call()

    run = open_run(Pinned(backend), keep=last(1))
    train(run, [1, 2])
    assert run.steps() == [1, 2]
    assert train(run, [3]) == [[2]]
    assert run.pinned() == [1]


def test_time_keeps_steps_apart(monkeypatch):
    run = open_run(MemoryBackend(), keep=every_seconds(60))
    for step, at_s in enumerate([0, 20, 70, 100, 131]):
        monkeypatch.setattr("time.time", lambda at_s=at_s: 1e9 + at_s)
        train(run, [step])
    assert run.steps() == [0, 2, 4]


class Failing(Wrapper):
    """Fails what is told."""

    fails = staticmethod(lambda op, name: False)

    def _do(self, op, name, call, *, mutates=True):
        if self.fails(op, name):
            raise StorageError(f"{op} {name} failed on purpose", errno=errno.EIO)
        return call()


def test_a_step_that_cannot_be_forgotten_does_not_fail_the_save(caplog):
    backend = Failing(MemoryBackend())
    run = open_run(backend, keep=last(1))
    train(run, [1])
    backend.fails = lambda op, name: name.endswith(".gone") and op == "create_once"
    with caplog.at_level(logging.WARNING):
        report = run.save(state(2), step=2)
    assert report.forgotten == []
    assert "step 2 is saved, but" in caplog.text
    assert "refs/main/1.1.gone failed on purpose" in caplog.text
    backend.fails = lambda op, name: False
    assert run.steps() == [1, 2]
    assert train(run, [3]) == [[1, 2]]


def test_a_save_that_fails_forgets_nothing():
    backend = Failing(MemoryBackend())
    run = open_run(backend, keep=last(1))
    train(run, [1])
    run.keep = None
    train(run, [2])
    run.keep = last(1)
    before = contents(backend.inner)
    backend.fails = lambda op, name: op == "create_once" and name == "refs/main/3.1"
    with pytest.raises(StorageError):
        run.save(state(3), step=3)
    with pytest.raises(AlreadyExistsError):
        run.save(state(9), step=2)
    assert {n for n in contents(backend.inner) if n.startswith("refs/")} == {
        n for n in before if n.startswith("refs/")
    }


def test_a_tombstone_is_created_only_after_the_decision():
    log = []

    class Logged(Wrapper):
        def _do(self, op, name, call, *, mutates=True):
            if op == "create_once" and name.startswith("refs/"):
                log.append(name)
            return call()

    run = open_run(Logged(MemoryBackend()), keep=last(1))
    train(run, [1, 2])
    assert log == ["refs/main/1.1", "refs/main/2.1", "refs/main/1.1.gone"]


def test_with_rules_a_save_reads_no_decision_again():
    reads = []

    class Logged(Wrapper):
        def _do(self, op, name, call, *, mutates=True):
            if op == "read" and name.startswith("refs/"):
                reads.append(name)
            return call()

    backend = Logged(MemoryBackend())
    run = open_run(backend, keep=last(3) | every(2))
    train(run, range(20))
    reads.clear()
    train(run, [20, 21])
    assert [name for name in reads if not name.startswith(("refs/main/20.", "refs/main/21."))] == []


def test_what_is_no_rule_is_refused():
    with pytest.raises(InvalidInputError, match="keep: found 3, expected a rule"):
        open_run(MemoryBackend(), keep=3)


def test_these_keeps_what_is_named():
    run = open_run(MemoryBackend(), keep=these([1, 2]))
    assert train(run, [1, 2, 3, 4]) == [[], [], [], [3]]


# -- latest-good


def damaged(backend, *steps):
    """The same store with a byte wrong in the pack that each of these steps wrote."""
    objects = contents(backend)
    run = opened(backend)
    for step in steps:
        [name] = [n for n in objects if n.startswith(f"packs/{run.commit(step).sid.hex()}")]
        data = bytearray(objects[name])
        data[500] ^= 1
        objects[name] = bytes(data)
    return memory_of(objects)


def saved(*steps):
    backend = MemoryBackend()
    train(open_run(backend), steps)
    return backend


def test_latest_good_is_the_latest_when_nothing_is_damaged(caplog):
    run = opened(saved(1, 2))
    with caplog.at_level(logging.WARNING):
        assert run.commit("latest-good").slot.step == 2
        assert same(run.load("latest-good"), state(2))
    assert caplog.records == []


def test_latest_good_passes_over_damaged_steps_with_a_warning_each(caplog, tmp_path):
    run = opened(damaged(saved(1, 2, 3, 4), 3, 4))
    with pytest.raises(CorruptError):
        run.load("latest")
    with caplog.at_level(logging.WARNING):
        assert same(run.load("latest-good"), state(2))
    told = [r.message for r in caplog.records if "is not good" in r.message]
    assert [t.partition(":")[0] for t in told] == [
        "run 'main' step 4 is not good",
        "run 'main' step 3 is not good",
    ]
    assert "tensor 'w'" in told[0]
    assert export(run, "latest-good", tmp_path / "out.npz").step == 2
    assert run.manifest("latest-good") == run.manifest(2)


@pytest.mark.parametrize("kind", ["manifests", "refs"])
def test_a_step_without_a_readable_manifest_or_record_is_not_good(kind):
    backend = saved(1, 2)
    run = opened(backend)
    key = run.commit(2).manifest_key if kind == "manifests" else "refs/main/2.1"
    objects = contents(backend)
    objects[key] = objects[key][:-3]
    assert same(opened(memory_of(objects)).load("latest-good"), state(1))


def test_none_good_is_not_found():
    with pytest.raises(NotFoundError, match="has no good step; damaged or unreadable: 2") as e:
        opened(damaged(saved(1, 2), 1, 2)).load("latest-good")
    assert e.value.hint == "run deltackpt verify"
    with pytest.raises(NotFoundError, match="run 'none' has no steps"):
        opened(saved(1), "none").load("latest-good")
    with pytest.raises(InvalidInputError, match="'latest' or 'latest-good'"):
        opened(saved(1)).load("best")


def test_a_check_reads_what_tensors_share_once_and_keeps_nothing(monkeypatch):
    backend = MemoryBackend()
    run = opened(backend)
    run.save({"a": noise(1, 3 << 20), "b": noise(1, 3 << 20), "none": np.zeros(0)}, step=1)
    sizes = []
    read_copies = type(run.store).read_copies

    def counted(self, wanted, bases):
        sizes.extend(one.out.size for one in wanted)
        read_copies(self, wanted, bases)

    rows = run.manifest().tensors
    monkeypatch.setattr(type(run.store), "read_copies", counted)
    check(run.store, rows)
    lists = 2 * max(size for size in sizes if size < 1000)
    assert sum(sizes) == (3 << 20) + lists


# -- a collection


def test_a_run_is_a_collection_of_its_steps():
    backend = saved(30, 10, 20)
    run = opened(backend)
    run.save(state(21), step=20, overwrite=True)
    assert list(run) == run.steps() == [10, 20, 30]
    assert len(run) == 3
    assert [s in run for s in (10, np.int64(20), 25, -1, "10", None, True)] == [
        True,
        True,
        False,
        False,
        False,
        False,
        False,
    ]
    assert [(c.slot.step, c.slot.attempt) for c in run.commits()] == [(10, 1), (20, 2), (30, 1)]
    run.forget([10])
    assert (list(run), 10 in run) == ([20, 30], False)
    assert list(opened(backend, "empty")) == []


def test_forgetting_a_number_says_that_steps_are_a_list():
    with pytest.raises(InvalidInputError, match="forget: found 1, expected steps"):
        open_run(MemoryBackend()).forget(1)


# ---------------------------------------------------------------- what others do between two saves


def kept(backend, keep, steps):
    """A run with rules that has saved some steps, and another process's view of it."""
    run = open_run(backend, keep=keep)
    for step in steps:
        run.save({"w": [step]}, step=step)
    return run, open_run(backend)


def test_a_step_that_another_pinned_since_the_run_was_listed_stays():
    run, other = kept(MemoryBackend(), last(2), (1, 2, 3))
    other.pin(2)
    assert run.save({"w": [4]}, step=4).forgotten == []
    assert run.save({"w": [5]}, step=5).forgotten == [3]
    other.unpin(2)
    assert run.save({"w": [6]}, step=6).forgotten == [2, 4]


def test_of_steps_that_another_forgot_the_rules_keep_others_in_their_place():
    run, other = kept(MemoryBackend(), last(3), (1, 2, 3))
    other.forget([3])
    assert run.save({"w": [4]}, step=4).forgotten == []
    assert other.steps() == [1, 2, 4]
    other.forget([1])  # which would have gone
    assert run.save({"w": [5]}, step=5).forgotten == []
    assert other.steps() == [2, 4, 5]


def test_a_step_that_another_overwrote_is_let_go_as_it_is_now():
    run, other = kept(MemoryBackend(), last(2), (1, 2))
    other.save({"w": [20]}, step=1, overwrite=True)
    assert run.save({"w": [3]}, step=3).forgotten == [1]
    assert other.steps() == [2, 3]


def test_what_another_saved_meanwhile_stays_until_the_run_is_opened_again():
    backend = MemoryBackend()
    run, other = kept(backend, last(2), (1, 2))
    other.save({"w": [3]}, step=3)
    assert run.save({"w": [4]}, step=4).forgotten == [1]
    assert other.steps() == [2, 3, 4]
    assert kept(backend, last(2), (5,))[0].steps() == [4, 5]


def test_what_was_saved_without_rules_goes_by_them_once_there_are_some():
    run, _ = kept(MemoryBackend(), last(1), (1, 2))
    run.keep = None
    run.save({"w": [3]}, step=3)
    run.keep = last(1)
    assert run.save({"w": [4]}, step=4).forgotten == [2, 3]


def test_a_step_whose_save_failed_after_its_decision_goes_by_the_rules():
    inner = MemoryBackend()
    run = open_run(inner, keep=last(2))
    run.save({"w": [1]}, step=1)
    decide = run.store.refs.decide

    def lost(decision):
        decide(decision)
        raise StorageError("the answer is lost")

    run.store.refs.decide = lost
    with pytest.raises(StorageError):
        run.save({"w": [2]}, step=2)
    run.store.refs.decide = decide
    assert run.save({"w": [3]}, step=3).forgotten == [1]
    assert run.save({"w": [4]}, step=4).forgotten == [2]
