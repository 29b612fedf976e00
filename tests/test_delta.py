"""The public calls, and what each mistake and each failure says."""

import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from plain import same, weights

import deltackpt
import deltackpt.gc
import deltackpt.verify
from deltackpt import (
    AlreadyExistsError,
    ConflictError,
    CorruptError,
    InvalidInputError,
    NotFoundError,
    delta,
    open_run,
)
from deltackpt.backends.memory import MemoryBackend


@pytest.fixture
def state():
    return {
        "model": {"w": weights(100_000), "b": np.zeros(3)},
        "opt": [1, 2.5, None, True],
        "rng": b"\0" * 2000,
    }


def test_both_spellings_are_the_same_call():
    assert deltackpt.save is delta.save
    assert deltackpt.load is delta.load


def test_a_state_comes_back_bit_for_bit_with_its_nesting_and_types(tmp_path, state):
    report = delta.save(
        state, tmp_path / "s", step=7, metrics={"loss": np.float32(1.5)}, metadata={"git": "abc"}
    )
    assert same(delta.load(tmp_path / "s"), state)
    assert same(delta.load(str(tmp_path / "s"), step=7, run="main"), state)
    assert report.logical_size == 400_000 + 24 + 2000
    assert set(report.seconds) >= {"flatten", "write", "publish", "commit"}
    assert "main step 7" in str(report)


def test_latest_is_the_highest_step_not_the_last_saved(tmp_path):
    with open_run(tmp_path / "s", "r") as run:
        assert run.latest() is None
        for step in (10, 30, 20):
            run.save({"step": step}, step=step)
        assert run.steps() == [10, 20, 30]
        assert run.latest() == 30
        assert run.load() == {"step": 30}
        run.forget([30])
        assert run.load() == {"step": 20}


def test_metrics_and_metadata_are_kept(tmp_path):
    with open_run(tmp_path / "s") as run:
        run.save({}, step=1, metrics={"loss": 2}, metadata={"host": ["a", 1]})
        commit = run.commit(1)
        assert (commit.metrics, commit.metadata) == ({"loss": 2.0}, {"host": ["a", 1]})


def test_no_store_is_named_and_not_made(tmp_path):
    with pytest.raises(NotFoundError, match=r"nowhere: no deltackpt store here .*hint"):
        delta.load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_an_unknown_step_names_the_nearest(tmp_path):
    for step in (1000, 1500, 2000):
        delta.save({}, tmp_path, step=step)
    with pytest.raises(NotFoundError, match="run 'main' has no step 1200; nearest: 1000 and 1500"):
        delta.load(tmp_path, step=1200)
    with pytest.raises(NotFoundError, match="has no step 1; nearest: 1000"):
        delta.load(tmp_path, step=1)


def test_an_unknown_run_names_those_there_are(tmp_path):
    delta.save({}, tmp_path, step=1, run="exp1")
    with pytest.raises(NotFoundError, match="run 'exp2' has no steps; there are 'exp1'"):
        delta.load(tmp_path, run="exp2")


def test_the_same_step_twice_is_refused_and_nothing_changes(tmp_path):
    delta.save({"x": 1}, tmp_path, step=5)
    with pytest.raises(AlreadyExistsError, match="step 5 already"):
        delta.save({"x": 2}, tmp_path, step=5)
    assert delta.load(tmp_path) == {"x": 1}
    delta.save({"x": 2}, tmp_path, step=5, overwrite=True)
    assert delta.load(tmp_path) == {"x": 2}


def test_an_unsupported_object_is_named_by_its_path_and_nothing_is_left(tmp_path):
    with pytest.raises(InvalidInputError, match=r"state\['optimizer'\]\['state'\]\[0\].*set"):
        delta.save({"w": weights(1000), "optimizer": {"state": [{1, 2}]}}, tmp_path, step=1)
    assert open_run(tmp_path).steps() == []
    for name in ("packs", "index", "manifests", "sessions", "tmp"):
        assert not list((tmp_path / name).iterdir())


@pytest.mark.parametrize("step", [-1, 2**63, 1.5, True, "7", None])
def test_a_bad_step_is_refused(tmp_path, step):
    with pytest.raises(InvalidInputError, match="step: found"):
        delta.save({}, tmp_path, step=step)


@pytest.mark.parametrize("run", ["", "..", "a/b", "~gc", "-x", "a\0b", "x" * 200, "a.", "a.gone", 7])
def test_a_bad_run_name_is_refused(tmp_path, run):
    with pytest.raises(InvalidInputError, match="run: found"):
        delta.save({}, tmp_path, step=1, run=run)


def test_runs_that_differ_in_case_only_are_refused(tmp_path):
    delta.save({}, tmp_path, step=1, run="Exp")
    with pytest.raises(InvalidInputError, match="case only"):
        delta.save({}, tmp_path, step=1, run="exp")


def test_a_refused_run_is_refused_again(tmp_path):
    delta.save({"a": 1}, tmp_path / "store", step=1, run="main")
    for _ in range(2):
        with pytest.raises(InvalidInputError, match="case only"):
            delta.save({"a": 1}, tmp_path / "store", step=1, run="Main")


@pytest.mark.parametrize(
    ("metrics", "metadata"),
    [
        ({"a": float("nan")}, None),
        ({"a": "x"}, None),
        ({1: 2.0}, None),
        (None, {"a": {1}}),
        (None, {"a": "x" * 2**20}),
    ],
)
def test_metrics_must_be_finite_numbers_and_metadata_json(tmp_path, metrics, metadata):
    with pytest.raises(InvalidInputError):
        delta.save({}, tmp_path, step=1, metrics=metrics, metadata=metadata)


def test_numpy_integers_are_steps(tmp_path):
    delta.save({}, tmp_path, step=np.int64(3))
    assert open_run(tmp_path).steps() == [3]


def test_a_directory_of_other_files_is_not_made_a_store(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidInputError, match=r"holds 'thesis\.tex'"):
        delta.save({}, tmp_path, step=1)


def test_foreign_files_in_a_store_do_no_harm(tmp_path, state):
    delta.save(state, tmp_path, step=1)
    for place in ("", "packs", "index", "manifests", "sessions", "refs", "refs/main", "gc", "tmp"):
        (tmp_path / place / "notes.txt").write_text("mine")
    foreign = set(tmp_path.rglob("notes.txt"))
    delta.save(state, tmp_path, step=2)
    open_run(tmp_path).forget([1])
    deltackpt.gc.collect(tmp_path)
    assert same(delta.load(tmp_path, step=2), state)
    assert set(tmp_path.rglob("notes.txt")) == foreign
    assert deltackpt.verify.verify(tmp_path).clean


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(deltackpt.DeltackptError, match="f"):
        delta.save({}, tmp_path / "f", step=1)
    assert (tmp_path / "f").read_text() == "x"


def test_a_truncated_pack_is_corrupt_and_named(tmp_path, state):
    delta.save(state, tmp_path, step=1)
    (pack,) = (tmp_path / "packs").iterdir()
    os.truncate(pack, pack.stat().st_size // 2)
    with pytest.raises(CorruptError, match=rf"run 'main' step 1: .*{pack.name}"):
        delta.load(tmp_path, step=1)


def test_a_store_made_anew_in_the_same_place_is_not_taken_for_the_old_one(tmp_path, state):
    delta.save(state, tmp_path / "s", step=1)
    shutil.rmtree(tmp_path / "s")
    delta.save(state, tmp_path / "s", step=1)
    assert same(delta.load(tmp_path / "s"), state)


def test_of_two_writers_of_one_step_one_wins_and_the_other_is_told(state):
    backend = MemoryBackend()
    deltackpt.open_store(backend, create=True)
    outcomes = []
    start = threading.Barrier(2)

    def write(value):
        run = deltackpt.Run(deltackpt.open_store(backend), "main")
        start.wait()
        try:
            run.save({**state, "who": value}, step=1)
        except (AlreadyExistsError, ConflictError) as e:
            outcomes.append(type(e))
        else:
            outcomes.append(value)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [o for o in outcomes if isinstance(o, int)]
    assert delta.load(backend)["who"] == winner


FILL = """
import resource, sys, numpy as np, signal
from deltackpt import delta, StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = sys.argv[1]
delta.save({"w": np.arange(1000)}, store, step=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    delta.save({"w": np.random.default_rng(0).standard_normal(100_000)}, store, step=2)
except StorageError as e:
    print(e.exit_code, e.hint)
assert delta.load(store)["w"].tolist() == list(range(1000))
"""


def test_a_file_that_may_not_grow_is_a_storage_error_and_the_step_before_is_there(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", FILL, tmp_path / "s"], capture_output=True, text=True, check=False
    )
    assert run.stdout.startswith("6 "), run.stderr
    assert open_run(tmp_path / "s").steps() == [1]
    assert not list((tmp_path / "s" / "tmp").iterdir())


@pytest.mark.parametrize("store", [None, b"x", 5, ""])
def test_what_is_no_store_is_refused(store):
    with pytest.raises(InvalidInputError, match="store: found"):
        delta.save({}, store, step=1)
    with pytest.raises(InvalidInputError, match="store: found"):
        delta.load(store)


def test_metrics_and_keys_of_the_wrong_type_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="metrics: found"):
        delta.save({}, tmp_path, step=1, metrics=[1])
    delta.save({"w": 1}, tmp_path, step=1)
    with pytest.raises(InvalidInputError, match="keys: found"):
        delta.load(tmp_path, keys=3)


def test_a_forked_child_saves_for_itself(tmp_path, state):
    delta.save(state, tmp_path, step=1)
    pid = os.fork()
    if not pid:
        try:
            delta.save(state, tmp_path, step=2)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert delta.save(state, tmp_path, step=3).new_size == 0
    assert open_run(tmp_path).steps() == [1, 2, 3]
