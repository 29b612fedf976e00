"""A fork: a step of one run as the first of another, without a byte of it copied."""

from __future__ import annotations

import numpy as np
import pytest
from faults import CrashBackend, Cut, Wrapper, contents, memory_of
from steps import collect, floats, noise, opened, repeats, same, visible

from deltackpt import open_run
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import AlreadyExistsError, ConflictError, CorruptError, InvalidInputError, NotFoundError
from deltackpt.records import Origin
from deltackpt.run import Run
from deltackpt.session import Session
from deltackpt.verify import verify


def state(step):
    return {
        "list": noise(step, 900_000),
        "planes": floats(step, 3000),
        "half": floats(step, 500).astype(np.complex64),
        "lz4": repeats(step, 3000),
        "none": np.zeros(0),
        "step": step,
    }


def saved(*steps):
    backend = MemoryBackend()
    run = opened(backend)
    for step in steps:
        run.save(state(step), step=step, metrics={"loss": 1 / step}, metadata={"lr": step})
    return backend


def test_a_fork_has_the_step_with_all_that_is_on_record():
    run = opened(saved(1, 2))
    branch = run.fork("branch", step=1)
    assert (branch.name, branch.steps(), branch.store) == ("branch", [1], run.store)
    assert same(branch.load(), state(1))
    commit, source = branch.commit(), run.commit(1)
    assert (commit.origin, commit.parent, source.origin) == (Origin("main", 1), None, None)
    assert (commit.metrics, commit.metadata) == ({"loss": 1.0}, {"lr": 1})
    assert commit.manifest == source.manifest
    assert commit.figures.logical_size == source.figures.logical_size
    assert run.fork("third").commit().origin == Origin("main", 2)


def test_a_fork_writes_a_manifest_and_a_decision_and_nothing_else():
    backend = saved(1)
    before = contents(backend)
    branch = opened(backend).fork("branch")
    after = contents(backend)
    commit = branch.commit()
    written = {name: data for name, data in after.items() if name not in before}
    assert sorted(written) == [commit.manifest_key, "refs/branch/1.1"]
    assert written[commit.manifest_key] == before[opened(backend).commit().manifest_key]
    figures = commit.figures
    assert (figures.new_size, figures.n_new_chunks) == (0, 0)
    assert figures.written_size == len(written[commit.manifest_key])
    assert before.keys() <= after.keys()


def test_a_fork_goes_on_alone_and_outlives_what_it_came_from():
    backend = saved(1, 2)
    branch = opened(backend).fork("branch")
    assert branch.save(state(2) | {"step": 3}, step=3).new_size == 0
    opened(backend).forget([1, 2])
    collect(backend)
    assert {s: same(v, state(2) | {"step": s}) for s, v in visible(backend, "branch").items()} == {
        2: True,
        3: True,
    }
    assert verify(backend, level="decode").clean


def test_a_run_that_has_steps_or_differs_in_case_only_is_no_fork():
    run = opened(saved(1))
    run.fork("branch")
    for name in ("main", "branch"):
        with pytest.raises(AlreadyExistsError, match=f"run '{name}' has steps already"):
            run.fork(name)
    with pytest.raises(InvalidInputError, match="differs from run 'branch' in case only"):
        run.fork("Branch")
    with pytest.raises(InvalidInputError, match="run: found 'a/b'"):
        run.fork("a/b")
    with pytest.raises(NotFoundError, match="has no step 7"):
        run.fork("other", step=7)
    assert run.store.refs.runs() == ["branch", "main"]


def test_the_latest_good_step_is_forked_when_the_latest_is_not():
    backend = saved(1, 2)
    objects = contents(backend)
    objects[opened(backend).commit(2).manifest_key] = b"?"
    branch = opened(memory_of(objects)).fork("branch", step="latest-good")
    assert same(branch.load(), state(1))


def test_a_run_whose_steps_are_all_forgotten_can_be_forked_into():
    run = opened(saved(1))
    run.fork("branch").forget([1])
    assert same(run.fork("branch").load(), state(1))


def test_a_gc_that_runs_beside_a_fork_leaves_it_whole(monkeypatch):
    """The step is forgotten and condemned once the fork relies on its chunks; the session holds gc off."""
    backend = saved(1)
    look_up = Session.look_up

    def forgotten_meanwhile(self, ids):
        monkeypatch.setattr(Session, "look_up", look_up)
        found = look_up(self, ids)
        opened(backend).forget([1])
        waiting = collect(backend, patience_s=1000)
        assert waiting.n_dead == len(waiting.waiting_for) == 1
        assert backend.list("packs/")
        return found

    monkeypatch.setattr(Session, "look_up", forgotten_meanwhile)
    opened(backend).fork("branch")
    for _ in range(2):
        collect(backend)
    assert same(visible(backend, "branch")[1], state(1))
    assert verify(backend, level="decode").clean


def test_what_is_in_a_condemned_pack_only_is_stored_again():
    """A save used the pack after gc's mark and before its condemn record, which a session then holds up."""
    backend = saved(1)
    opened(backend).forget([1])

    class Saved(Wrapper):
        def _do(self, op, name, call, *, mutates=True):
            if (op, name) == ("create_once", "gc/condemn-0"):
                opened(backend).save(state(1), step=2)
            return call()

    with Session(opened(backend).store, "other", 1):
        assert collect(Saved(backend), patience_s=1000).waiting_for
        branch = opened(backend).fork("branch")
    figures = branch.commit().figures
    assert figures.n_new_chunks > figures.n_chunks  # the lists too
    assert opened(backend).commit(2).figures.n_new_chunks == 0
    opened(backend).forget([2])
    for _ in range(2):
        collect(backend)
    assert same(visible(backend, "branch")[2], state(1))
    assert verify(backend, level="decode").clean


def test_a_fork_of_a_step_that_is_damaged_where_it_must_be_read_says_so():
    backend = saved(1)
    [pack] = [entry.name for entry in backend.list("packs/")]
    backend.delete(pack)
    with pytest.raises(CorruptError, match=r"run 'main' step 1: "):
        opened(backend).fork("branch")
    assert opened(backend, "branch").steps() == []


def test_a_step_forgotten_while_it_is_forked_is_not_found(monkeypatch):
    backend = saved(1)
    run = opened(backend)
    find = Run._find

    def found_and_lost(self, step):
        commit = find(self, step)
        opened(backend).forget([1])
        collect(backend)
        return commit

    monkeypatch.setattr(Run, "_find", found_and_lost)
    with pytest.raises(NotFoundError, match="was forgotten"):
        run.fork("branch")


def test_of_two_forks_into_one_name_one_is_told(monkeypatch):
    backend = saved(1)
    publish = Session.publish

    def beaten(self, manifest):
        monkeypatch.setattr(Session, "publish", publish)
        opened(backend).fork("branch")
        publish(self, manifest)

    monkeypatch.setattr(Session, "publish", beaten)
    with pytest.raises(ConflictError):
        opened(backend).fork("branch")
    assert same(visible(backend, "branch")[1], state(1))


def test_a_fork_cut_short_anywhere_is_whole_or_absent():
    objects = contents(saved(1))
    for nth in range(100):
        crash = CrashBackend(memory_of(objects))
        crash.run_to(nth)
        try:
            opened(crash).fork("branch")
        except Cut:
            is_done = False
        else:
            is_done = True
        for left in [crash.inner, *crash.crash_states(limit=10)]:
            found = visible(left, "branch")
            assert found == {} or same(found[1], state(1))
            assert found or not is_done
            collect(left)
            assert same(visible(left)[1], state(1))
            assert visible(left, "branch").keys() == found.keys()
            assert verify(left).clean
        if is_done:
            return
    raise AssertionError("100 changes were not enough")


def test_a_fork_on_disk_shares_its_packs(tmp_path):
    run = open_run(tmp_path / "store")
    run.save(state(1), step=1)
    packs = set((tmp_path / "store" / "packs").iterdir())
    with run.fork("branch") as branch:
        assert same(branch.load(), state(1))
    assert set((tmp_path / "store" / "packs").iterdir()) == packs
