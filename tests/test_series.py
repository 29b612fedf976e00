"""Which step a file is, by its name; a series of files or directories, found, and saved as steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltackpt import delta, load_files, open_run, series
from deltackpt.errors import AlreadyExistsError, InvalidInputError, NotFoundError
from deltackpt.series import steps_of

NUMBERS = st.lists(st.integers(0, 10**9), min_size=2, max_size=20, unique=True)
#: What stands around a number: no digits, no point that would make it a fraction.
WORDS = st.text("abcxyz_-=/", max_size=12)


@given(NUMBERS, WORDS, WORDS, st.integers(1, 10))
def test_the_number_that_differs_is_the_step_whatever_stands_around_it(numbers, before, after, width):
    names = {f"{before}{n:0{width}}{after}.pt": n for n in numbers}
    assert steps_of(names) == names


@given(NUMBERS, WORDS, WORDS, st.randoms())
def test_the_order_is_that_of_the_steps_whatever_the_order_of_the_files(numbers, before, after, random):
    names = [f"{before}{n}{after}.pt" for n in numbers]
    random.shuffle(names)
    assert list(steps_of(names).values()) == sorted(numbers)


@given(NUMBERS, st.integers(0, 999), st.integers(0, 999))
def test_numbers_that_are_the_same_in_all_names_are_no_steps(numbers, before, after):
    names = {f"run{before}/ckpt-{n}/rank{after}.npz": n for n in numbers}
    assert steps_of(names) == names


@given(NUMBERS, st.lists(st.floats(0, 1), min_size=20, max_size=20))
def test_what_is_called_a_step_wins_over_epochs_and_losses(numbers, losses):
    names = {f"epoch={i}-step={n}-val_loss={losses[i]:.3f}.pt": n for i, n in enumerate(numbers)}
    assert steps_of(names) == names


@given(st.lists(st.text("ab12_-./=", min_size=1, max_size=12), min_size=1, max_size=8, unique=True))
def test_any_names_give_each_its_own_step_or_an_error_that_lists_some(names):
    found, message = {}, ""
    try:
        found = steps_of(names)
    except InvalidInputError as e:
        message = e.message
    if message:
        assert any(name in message for name in names)
        return
    assert sorted(found) == sorted(names)
    assert len(set(found.values())) == len(names)
    assert list(found.values()) == sorted(found.values())
    assert all(str(step) in name for name, step in found.items())


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["step_000100.pt"], [100]),
        (["a/step_000100.pt", "a/step_000200.pt"], [100, 200]),
        (["model-epoch=3-step=1200.pt", "model-epoch=4-step=1600.pt"], [1200, 1600]),
        (["checkpoint-500/model.safetensors"], [500]),
        (["2024/out/checkpoint-500/model.safetensors"], [500]),
        (["checkpoint-500/model.pt", "checkpoint-1000/model.pt"], [500, 1000]),
        (["global_step500/mp_rank_00_states.pt", "global_step40/mp_rank_00_states.pt"], [40, 500]),
        (["100step/epoch_1.pt", "100step/epoch_2.pt"], [1, 2]),
        (["step_7.pt", "step_10_final.pt"], [7, 10]),
        (["c-7/model-00001-of-00001.pt"], [7]),
        (["c-1/model-00001-of-00001.pt", "c-2/model-00001-of-00001.pt"], [1, 2]),
        (["v1.5-100.pt", "v1.5-200.pt"], [100, 200]),
        (["Step5.npz", "STEP-6.npz"], [5, 6]),
        (["a1_7.pt", "a01_8.pt"], [7, 8]),
        (["checkpoint-100-20261128", "checkpoint-200-20261129"], [100, 200]),
        (["checkpoint-100-20261128"], [100]),
        (["epoch=3-step=1200.ckpt"], [1200]),
        (["iter_0000500", "iter_0001000"], [500, 1000]),
        (["iter_0000500/mp_rank_00/model_optim_rng.pt", "iter_0001000/mp_rank_00/model_optim_rng.pt"],
         [500, 1000]),
        (["global_step100", "global_step200"], [100, 200]),
        (["model_20261128_step_300.pt", "model_20261129_step_400.pt"], [300, 400]),
        (["step_300_20261128.pt", "step_400_20261128.pt"], [300, 400]),
        (["run7_ckpt_100.pt", "run8_ckpt_200.pt"], [100, 200]),
        (["ckpt_20240101_100.pt", "ckpt_20240102_200.pt"], [100, 200]),
        (["c-100_2026-11-28_10-15-00.pt", "c-200_2026-11-29_09-00-59.pt"], [100, 200]),
        (["c_20261128.pt", "c_20261129.pt"], [20261128, 20261129]),
        (["v3_20261128.pt", "v3_20261129.pt"], [20261128, 20261129]),
        (["a_20000101.pt", "a_20001399.pt"], [20000101, 20001399]),
        (["checkpoint_1_500.pt", "checkpoint_2_1000.pt"], [500, 1000]),
        (["epoch1-500.pt", "epoch1-600.pt", "epoch2-700.pt"], [500, 600, 700]),
        (["checkpoint_1_500.pt", "checkpoint_1_1000.pt", "checkpoint_2_1500.pt"], [500, 1000, 1500]),
        (["checkpoint_7/rank_0.pt", "checkpoint_7/rank_1.pt"], [0, 1]),
        (["arbiter1_10.pt", "arbiter2_20.pt"], [10, 20]),
        (["checkpoint_0.5_10.pt", "checkpoint_0.25_20.pt"], [10, 20]),
    ],
)  # fmt: skip
def test_names_that_people_give_are_understood(names, steps):
    assert list(steps_of(names).values()) == steps


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["model.pt"], ["has no number that tells its step: model.pt"]),
        (["2024/out/model.pt"], ["has no number that tells its step: 2024/out/model.pt"]),
        (["a1.pt", "b.pt", "c.pt"], ["has no number", "b.pt; c.pt"]),
        (["x/a_7.pt", "y/a_7.pt"], ["x/a_7.pt; y/a_7.pt"]),
        (["a_07.pt", "b_7.pt", "c_8.pt"], ["have the same step in their names: a_07.pt, b_7.pt (7)"]),
        (["c-1/model-00001-of-00002.pt"], ["is one part of a checkpoint: c-1/model-00001-of-00002.pt"]),
        (["step_1_at_7.pt", "step_1_at_8.pt", "step_2_at_9.pt"], ["step_1_at_7.pt, step_1_at_8.pt (1)"]),
        (["loss=0.25.pt", "loss=0.50.pt"], ["has no number", "loss=0.25.pt; loss=0.50.pt"]),
        ([f"s{n}.pt" for n in (1, 2**63)], ["(9223372036854775808)"]),
        ([f"{c}.pt" for c in "abcdefghijklm"], ["a.pt; b.pt", "j.pt and 3 more"]),
    ],
)
def test_names_that_do_not_tell_are_listed(names, told):
    with pytest.raises(InvalidInputError) as e:
        steps_of(names)
    for text in told:
        assert text in e.value.message


def test_no_paths_have_no_steps():
    assert steps_of([]) == {}


# -- finding and saving


def write(path: str, seed: int) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    np.savez(path, w=np.arange(50_000) + (seed > 2), n=np.array(seed))


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in (3, 10, 2):
        write(f"c/step_{n}.npz", n)


def test_patterns_and_names_are_found_once_and_sorted():
    assert series.find(["c/*.npz", "c/step_2.npz"]) == [
        Path("c/step_10.npz"), Path("c/step_2.npz"), Path("c/step_3.npz")
    ]  # fmt: skip
    assert len(series.find(["**/*.npz"])) == 3
    write("c/odd[1].npz", 1)
    assert series.find(["c/odd[1].npz"]) == [Path("c/odd[1].npz")]
    with pytest.raises(NotFoundError, match=r"d/\*\.npz: no such file"):
        series.find(["d/*.npz"])


def save(**options):
    return list(series.save(steps_of(series.find(["c/*.npz"])), "store", **options))


def test_a_series_is_saved_in_the_order_of_its_steps():
    told = []
    done = save(progress=lambda *args: told.append(args))
    assert [one.step for one in done] == [2, 3, 10]
    assert delta.load("store", step=3)["n"] == 3
    total = sum(one.file_size for one in done)
    assert [(size, whole) for size, whole, _ in told] == [
        (0, total), (done[0].file_size, total), (total - done[2].file_size, total)
    ]  # fmt: skip
    assert told[0][2] == "saving c/step_2.npz (1 of 3)"
    took = series.Total.of(done, 1.0)
    assert took.file_size == total
    assert took.written_size == sum(one.report.written_size for one in done)
    assert done[2].report.new_size < 1000  # w is as in step 3


def test_steps_that_are_there_stop_the_series_before_it_begins():
    delta.save({}, "store", step=10)
    for options, hint in ({}, "--overwrite replaces, --skip"), ({"as_files": True}, "--skip"):
        with pytest.raises(AlreadyExistsError, match="run 'main' has step 10 already") as e:
            save(**options)
        assert e.value.hint.startswith(hint)  # import replaces nothing
    assert open_run("store").steps() == [10]


def test_steps_that_are_there_are_skipped_or_overwritten_when_told():
    delta.save({}, "store", step=10)
    done = save(existing="skip")
    assert [(one.step, one.report is None) for one in done] == [(2, False), (3, False), (10, True)]
    assert str(done[2]) == "c/step_10.npz: step 10 is there already"
    assert delta.load("store", step=10) == {}
    assert "2 steps, 1 there already: " in str(series.Total.of(done, 1.0))
    assert all(one.report for one in save(existing="overwrite"))
    assert delta.load("store", step=10)["n"] == 10


def test_a_file_of_no_known_kind_stops_the_series_before_it_begins():
    Path("c/state_11.json").write_text("{}")
    with pytest.raises(InvalidInputError, match=r"is none of .*: c/state_11\.json"):
        list(series.save(steps_of(series.find(["c/*"])), "store"))
    assert not Path("store").exists()


def test_a_series_that_breaks_off_leaves_the_steps_it_saved():
    Path("c/step_3.npz").write_bytes(b"PK\x03\x04 not")
    with pytest.raises(Exception, match="step_3"):
        save()
    assert open_run("store").steps() == [2]


def test_names_with_different_counts_of_numbers_are_not_compared():
    with pytest.raises(InvalidInputError, match="has no number that tells its step"):
        steps_of(["epoch=1-step=100-v1.pt", "epoch=1-step=100.pt"])


# -- folders of checkpoints


def names(*patterns: str) -> list[str]:
    return [str(path) for path in series.find_checkpoints(patterns)]


@pytest.mark.parametrize(
    ("there", "found"),
    [
        (["step_10.pt", "step_9.pt", "log.txt", "config.json"], ["step_10.pt", "step_9.pt"]),
        (["checkpoint-5/", "checkpoint-10/", "model.bin", "runs/"], ["checkpoint-10", "checkpoint-5"]),
        (["global_step5/", "global_step10/", "latest", "zero_to_fp32.py"], ["global_step10", "global_step5"]),
        (["epoch=0-step=9.ckpt", "epoch=1-step=18.ckpt", "last.ckpt"],
         ["epoch=0-step=9.ckpt", "epoch=1-step=18.ckpt"]),
        (["loss=0.25-step=1.pt", "loss=0.2-step=2.pt"], ["loss=0.2-step=2.pt", "loss=0.25-step=1.pt"]),
        (["run-7.npz", "run-8.npz"], ["run-7.npz", "run-8.npz"]),
        (["checkpoint_0/", "checkpoint_1/", "events.123/"], ["checkpoint_0", "checkpoint_1"]),
        (["step_1.pt", ".step_2.pt", "_step_3.pt", "step_4.txt"], ["step_1.pt"]),
    ],
)  # fmt: skip
def test_the_series_of_a_folder_is_found_among_other_files(there, found):
    Path("f").mkdir()
    for name in there:
        (Path("f") / name).mkdir() if name.endswith("/") else (Path("f") / name).touch()
    assert names("f") == [f"f/{name}" for name in found]


def test_a_checkpoint_is_one_however_it_is_named_and_is_not_looked_into():
    Path("out/checkpoint-7/global_step7").mkdir(parents=True)
    Path("out/checkpoint-7/rng_state_0.pth").touch()
    assert names("out/checkpoint-7") == names("out") == names("out/checkpoint-*") == ["out/checkpoint-7"]
    assert names("c/step_2.npz") == ["c/step_2.npz"]
    Path("c").rename("iter2_runs")  # and a folder of several is none, whatever it is called
    assert names("iter2_runs") == [f"iter2_runs/step_{n}.npz" for n in (10, 2, 3)]


def test_a_folder_of_no_series_or_of_several_is_refused_with_what_there_is():
    Path("f").mkdir()
    Path("f/model-00001-of-00002.safetensors").touch()
    with pytest.raises(NotFoundError, match="f: holds no series of checkpoints"):
        names("f")
    for name in ("model_step_1.pt", "model_step_2.pt", "optimizer_step_1.pt"):
        Path("f", name).touch()
    with pytest.raises(
        InvalidInputError, match=r"several series: f/model_step_\*.pt, f/optimizer_step_\*.pt"
    ):
        names("f")
    assert names("f/model_step_*.pt") == ["f/model_step_1.pt", "f/model_step_2.pt"]


def test_a_series_taken_over_as_files_comes_back_byte_for_byte_and_is_not_touched():
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("c").iterdir()}
    done = save(as_files=True)
    assert [one.step for one in done] == [2, 3, 10]
    assert done[2].report.new_size < 3000  # w is as in step 3
    for path, (content, time) in before.items():
        assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, time)
        out = load_files("store", "out", step=steps_of([path])[path], overwrite=True)
        assert (out.read_bytes(), out.stat().st_mtime_ns) == (content, time)


def test_a_series_taken_over_goes_on_where_it_broke_off(monkeypatch):
    real = series.Found

    def broken(path: Path, step: int) -> object:
        if step == 10:
            raise KeyboardInterrupt
        return real(path, step)

    monkeypatch.setattr(series, "Found", broken)
    with pytest.raises(KeyboardInterrupt):
        save(as_files=True)
    assert open_run("store").steps() == [2, 3]
    monkeypatch.setattr(series, "Found", real)
    assert [bool(one.report) for one in save(as_files=True, existing="skip")] == [False, False, True]


def test_directories_and_files_may_stand_in_one_series():
    Path("c/step_11").mkdir()
    write("c/step_11/w.npz", 11)
    done = list(series.save(steps_of(series.find(["c/*"])), "store"))
    assert [one.step for one in done] == [2, 3, 10, 11]
    assert done[3].file_size == Path("c/step_11/w.npz").stat().st_size
    assert delta.load("store", step=10)["n"] == 10
    assert (load_files("store", "out", step=11) / "w.npz").read_bytes() == Path(
        "c/step_11/w.npz"
    ).read_bytes()


def test_what_else_is_in_a_folder_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("epoch_1.pt", "epoch_2.pt", "optimizer_1.pt", "config.json", ".hidden"):
        Path(name).write_bytes(b"")
    taken = series.find_checkpoints(["."])
    assert [str(path) for path in taken] == ["epoch_1.pt", "epoch_2.pt"]
    assert [str(path) for path in series.passed_over(["."], taken)] == ["config.json", "optimizer_1.pt"]
    assert series.passed_over(["epoch_1.pt"], taken[:1]) == []
