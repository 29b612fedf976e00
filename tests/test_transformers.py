"""Hugging Face's Trainer: its checkpoints in a store, and training that goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from trainers import (
    Processes,
    Recorder,
    arguments,
    dies,
    facts,
    resumed,
    train_together,
    trained,
)
from transformers.trainer_utils import get_last_checkpoint

from deltackpt import every, gc, load_files, open_run
from deltackpt.errors import AlreadyExistsError, CorruptError, InvalidInputError, NotFoundError
from deltackpt.integrations.transformers import DeltaCallback
from deltackpt.verify import verify


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The losses of six steps, never interrupted."""
    losses = trained(tmp_path_factory.mktemp("straight"), [], save_strategy="no")
    assert len(set(losses)) == 6
    return losses


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A whole training with the callback: where, its losses, and what the Trainer had written each time."""
    here, recorder = tmp_path_factory.mktemp("job"), Recorder()
    callback = DeltaCallback(here / "store")
    losses = trained(here / "out", [recorder, callback])
    return here, losses, recorder.seen, callback


@pytest.fixture(scope="module")
def processes():
    with Processes() as found:
        yield found


def on_disk(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def test_every_file_of_every_checkpoint_comes_back_as_the_trainer_wrote_it(job, straight, tmp_path):
    here, losses, seen, callback = job
    assert losses == straight  # and training is none the worse for it
    assert open_run(here / "store").steps() == list(seen) == [2, 4, 6]
    for step, files in seen.items():
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= files.keys()
        assert facts(load_files(here / "store", tmp_path / str(step), step=step)) == files
    assert callback.report.step == 6
    assert open_run(here / "store").commit(6).metrics["loss"] == losses[-1]


def test_only_the_newest_directory_stays_and_the_trainer_can_resume_from_it_as_ever(job):
    here, _, seen, _ = job
    assert on_disk(here / "out") == ["checkpoint-6"]
    assert facts(here / "out" / "checkpoint-6") == seen[6]


def test_training_goes_on_from_any_step_with_the_same_losses(job, straight, tmp_path):
    here, *_ = job
    shutil.copytree(here / "store", tmp_path / "store")
    open_run(tmp_path / "store").forget([6])
    assert resumed(tmp_path / "out", tmp_path / "store") == straight
    assert open_run(tmp_path / "store").steps() == [2, 4, 6]


@pytest.mark.parametrize(
    ("where", "step", "disk"),
    [
        ("before the decision", 2, ["checkpoint-2", "checkpoint-4"]),
        ("in the Trainer's own save", 2, ["checkpoint-2", "checkpoint-4"]),
        ("between the decision and the removal", 4, ["checkpoint-2", "checkpoint-4"]),
        ("in the removal", 4, ["checkpoint-4"]),
    ],
)
def test_a_kill_anywhere_in_a_save_leaves_a_step_to_go_on_from(
    tmp_path, straight, processes, where, step, disk
):
    out, store = tmp_path / "out", tmp_path / "store"
    assert processes.run(1, dies, out, store, where) == [-signal.SIGKILL]
    assert open_run(store).steps() == list(range(2, step + 1, 2))
    assert [name for name in on_disk(out) if not name.startswith(".")] == disk
    if where == "in the Trainer's own save":
        half = Path(get_last_checkpoint(str(out)))  # what it would resume from, by itself
        assert half.name == "checkpoint-4"
        assert not (half / "trainer_state.json").exists()
    assert DeltaCallback(store).restore(arguments(out)) == str(out / f"checkpoint-{step}")
    assert resumed(out, store) == straight
    assert on_disk(out) == ["checkpoint-6"]
    gc.collect(store)
    assert verify(store, level="decode").clean


def test_a_directory_that_is_not_what_was_saved_is_put_right_before_a_resume(job, tmp_path, caplog):
    here, _, seen, _ = job
    out, callback = tmp_path / "out", DeltaCallback(here / "store")
    path = Path(callback.restore(arguments(out)))
    before = path.stat().st_ino
    (path / "notes.txt").write_text("what others put there is not ours to delete")
    assert callback.restore(arguments(out)) == str(path)
    assert path.stat().st_ino == before  # it is as saved, and not written again
    assert (path / "notes.txt").exists()
    weights = path / "model.safetensors"
    of = weights.stat()
    weights.write_bytes(bytes(of.st_size))  # as a power loss leaves it: size and time are right
    os.utime(weights, ns=(of.st_atime_ns, of.st_mtime_ns))
    (out / "checkpoint-9").mkdir()
    callback.restore(arguments(out))
    assert facts(path) == seen[6]
    assert "checkpoint-6: is not what was saved of step 6, and is replaced" in caplog.text
    assert "checkpoint-9: is not in the store, and may be half-written" in caplog.text


def test_a_damaged_step_is_passed_over_if_that_is_asked_for(job, tmp_path):
    here, *_ = job
    shutil.copytree(here / "store", tmp_path / "store")
    packs = sorted((tmp_path / "store" / "packs").rglob("*.pack"), key=lambda path: path.stat().st_mtime_ns)
    data = bytearray(packs[-1].read_bytes())
    data[len(data) // 3] ^= 1
    packs[-1].write_bytes(data)
    callback = DeltaCallback(tmp_path / "store")
    with pytest.raises(CorruptError):
        callback.restore(arguments(tmp_path / "out"))
    assert on_disk(tmp_path / "out") == []
    assert Path(callback.restore(arguments(tmp_path / "out"), "latest-good")).name == "checkpoint-4"


# -- which steps stay


@pytest.mark.parametrize("limit", [2, 3])
def test_the_limit_leaves_the_steps_that_the_trainer_would_leave(tmp_path, limit):
    options = {
        "save_steps": 1, "max_steps": 4, "save_total_limit": limit, "eval_strategy": "steps", "eval_steps": 1,
        "metric_for_best_model": "loss", "greater_is_better": False,  # the first is the best
    }  # fmt: skip
    trained(tmp_path / "alone", [], **options)
    trained(tmp_path / "out", [DeltaCallback(tmp_path / "store")], **options)
    stay = [int(name.rpartition("-")[2]) for name in on_disk(tmp_path / "alone")]
    assert open_run(tmp_path / "store").steps() == stay == [1, *range(6 - limit, 5)]
    assert on_disk(tmp_path / "out") == ["checkpoint-1", "checkpoint-4"]


def test_the_best_stays_on_disk_and_is_loaded_at_the_end_and_comes_back_with_a_resume(tmp_path):
    out, store = tmp_path / "out", tmp_path / "store"
    options = {
        "save_steps": 1, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1,
        "metric_for_best_model": "loss", "greater_is_better": False, "load_best_model_at_end": True,
    }  # fmt: skip
    trained(out, [DeltaCallback(store, on_disk=0)], **options)
    assert on_disk(out) == ["checkpoint-1"]
    assert open_run(store).steps() == [1, 3]
    assert open_run(store).commit(3).metrics.keys() >= {"loss", "eval_loss"}
    shutil.rmtree(out)
    DeltaCallback(store).restore(arguments(out))
    assert on_disk(out) == ["checkpoint-1", "checkpoint-3"]
    assert json.loads((out / "checkpoint-3/trainer_state.json").read_text())["best_global_step"] == 1


def test_the_limit_spares_the_step_that_training_went_on_from_and_a_rule_takes_its_place(tmp_path):
    out, store = tmp_path / "out", tmp_path / "store"
    trained(out, [DeltaCallback(store, keep=every(1))], save_steps=1, max_steps=2, save_total_limit=1)
    assert open_run(store).steps() == [1, 2]
    resumed(out, store, save_steps=1, max_steps=4, save_total_limit=1)
    assert open_run(store).steps() == [2, 4]


def test_a_directory_that_the_store_does_not_have_as_it_is_stays(tmp_path):
    out, store = tmp_path / "out", tmp_path / "store"
    trained(out, [], save_steps=1, max_steps=1)
    callback = DeltaCallback(store, on_disk=0)
    trained(out, [callback], save_steps=1, max_steps=3, resume=str(out / "checkpoint-1"))
    assert on_disk(out) == ["checkpoint-1"]
    assert open_run(store).steps() == [2, 3]


# -- what is refused


def test_to_begin_anew_in_a_run_that_has_gone_on_is_refused_before_a_step_is_made(job, tmp_path):
    here, *_ = job
    for resume, at in ((None, 0), (str(load_files(here / "store", tmp_path / "checkpoint-2", step=2)), 2)):
        with pytest.raises(AlreadyExistsError, match=f"has step 6, and training begins at step {at}"):
            trained(tmp_path / "out", [DeltaCallback(here / "store")], resume=resume)
    assert open_run(here / "store").steps() == [2, 4, 6]


def test_without_a_step_training_begins_anew(tmp_path, job):
    here, *_ = job
    assert DeltaCallback(tmp_path / "none").restore(arguments(tmp_path / "out")) is None
    assert DeltaCallback(here / "store", "other").restore(arguments(tmp_path / "out")) is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(NotFoundError, match="nearest"):
        DeltaCallback(here / "store").restore(arguments(tmp_path / "out"), 3)


@pytest.mark.parametrize("options", [{"keep": 3}, {"on_disk": -1}, {"on_disk": True}, {"run": "a/b"}])
def test_wrong_options_are_told(tmp_path, options):
    with pytest.raises(InvalidInputError):
        DeltaCallback(tmp_path, **options)


# -- adapters, and several processes


def test_adapters_come_back_and_go_on_with_the_same_losses(tmp_path):
    pytest.importorskip("peft")
    out, store, recorder = tmp_path / "out", tmp_path / "store", Recorder()
    straight = trained(tmp_path / "straight", [], peft=True, save_strategy="no")
    assert trained(out, [recorder, DeltaCallback(store)], peft=True, max_steps=4) == straight[:4]
    for step, files in recorder.seen.items():
        assert "adapter_model.safetensors" in files
        assert facts(load_files(store, tmp_path / str(step), step=step)) == files
    shutil.rmtree(out)
    assert resumed(out, store, peft=True) == straight


def test_files_of_all_processes_are_in_a_step_and_all_go_on_from_it(tmp_path, processes):
    out, store = tmp_path / "out", tmp_path / "store"
    for args in ((tmp_path / "straight", tmp_path / "beside", 4), (out, store, 2)):
        assert processes.run(2, train_together, *args) == [0, 0]
    assert open_run(store).steps() == [2]
    shutil.rmtree(out)
    assert processes.run(2, train_together, out, store, 4) == [0, 0]
    assert open_run(store).steps() == [2, 4]
    assert Path(f"{out}.json").read_text() == (tmp_path / "straight.json").read_text()
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= facts(load_files(store, tmp_path / "back")).keys()
