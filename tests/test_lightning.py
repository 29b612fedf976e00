"""Lightning's Trainer and ModelCheckpoint, unchanged, on a store."""

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

import lightning  # noqa: E402
import lightning_job  # noqa: E402
from commands import environment  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning_job import N_BATCHES, Tiny, fit, linked, quiet, top, trainer  # noqa: E402

import deltackpt  # noqa: E402
from deltackpt import gc, open_run  # noqa: E402
from deltackpt.errors import AlreadyExistsError, InvalidInputError, NotFoundError, StorageError  # noqa: E402
from deltackpt.export import export  # noqa: E402
from deltackpt.integrations.lightning import DeltaCheckpointIO  # noqa: E402
from deltackpt.markers import Marker, Runs  # noqa: E402
from deltackpt.verify import verify  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
N_EPOCHS = 6


@pytest.fixture(autouse=True)
def _quiet():
    quiet()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted job on Lightning's own files: losses, its trainer, which files are left."""
    quiet()
    directory = tmp_path_factory.mktemp("whole")
    losses, ours = fit(None, N_EPOCHS, top(directory))
    return losses, ours, sorted(path.name for path in directory.iterdir())


def runs_of(store):
    return {name: open_run(store, name).steps() for name in deltackpt.open_store(store).refs.runs()}


def markers_in(directory):
    return {path.name: Marker.at(path) for path in directory.iterdir()}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("background", [False, True])
def test_the_same_paths_stay_as_with_files_and_hold_what_the_files_hold(tmp_path, whole, background):
    losses, theirs, names = whole
    store, directory = tmp_path / "store", tmp_path / "ckpts"
    io = DeltaCheckpointIO(store, background=background)
    found, ours = fit(io, N_EPOCHS, top(directory))
    assert found == losses
    assert sorted(path.name for path in directory.iterdir()) == names
    markers = markers_in(directory)
    assert len({(m.run, m.step) for m in markers.values()}) == 3  # each path is a state of its own
    assert sorted((m.run, m.step) for m in markers.values()) == sorted(
        (run, step) for run, steps in runs_of(store).items() for step in steps
    )
    for name in names:
        mine = io.load_checkpoint(directory / name)
        file = torch.load(Path(theirs.checkpoint_callback.dirpath) / name, weights_only=False)
        assert mine["global_step"] == markers[name].step
        for key in file.keys() - {"callbacks"}:
            assert same(mine[key], file[key]), key
    assert (
        Path(ours.checkpoint_callback.best_model_path).name
        == Path(theirs.checkpoint_callback.best_model_path).name
    )
    assert verify(store, level="decode").clean


@pytest.mark.parametrize(("where", "nth", "n_left"), [("manifest", 5, 0), ("marker", 5, 0), ("forget", 1, 1)])
def test_killed_it_goes_on_from_the_one_before_with_the_same_losses(tmp_path, whole, where, nth, n_left):
    losses, _, names = whole
    store, directory = tmp_path / "store", tmp_path / "ckpts"
    command = [sys.executable, lightning_job.__file__, store, directory, str(N_EPOCHS), where, str(nth)]
    env = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    there = markers_in(directory)
    assert there["last.ckpt"].step == 2 * N_BATCHES
    for path in directory.iterdir():  # no marker without its step
        DeltaCheckpointIO(store).load_checkpoint(path)

    found, _ = fit(DeltaCheckpointIO(store), N_EPOCHS, top(directory), ckpt_path="last", seed=1)

    assert found == losses[2 * N_BATCHES :]
    assert sorted(path.name for path in directory.iterdir()) == names
    # What was to be forgotten when it was killed is in nobody's way.
    assert sum(map(len, runs_of(store).values())) == len(names) + n_left
    gc.collect(store)
    assert verify(store, level="decode").clean


def test_killed_in_the_background_the_link_leads_to_the_one_before(tmp_path, whole):
    losses, _, _ = whole
    store, directory = tmp_path / "store", tmp_path / "ckpts"
    args = [store, directory, str(N_EPOCHS), "marker", "4", "background"]
    env = environment(OMP_NUM_THREADS="1")
    command = [sys.executable, lightning_job.__file__, *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    io = DeltaCheckpointIO(store, background=True)
    assert io.load_checkpoint(directory / "last.ckpt")["global_step"] == 3 * N_BATCHES
    io.teardown()

    found, _ = fit(io, N_EPOCHS, linked(directory), ckpt_path="last", seed=1)

    assert found == losses[3 * N_BATCHES :]
    assert io.load_checkpoint(directory / "last.ckpt")["global_step"] == N_EPOCHS * N_BATCHES
    assert verify(store, level="decode").clean


def test_an_explicit_path_and_the_best_one_resume_and_test(tmp_path, whole):
    losses, _, _ = whole
    store, directory = tmp_path / "store", tmp_path / "ckpts"
    _, ours = fit(DeltaCheckpointIO(store), 2, top(directory, save_last=False, save_top_k=-1))
    first = directory / "epoch=0-step=5.ckpt"
    found, _ = fit(DeltaCheckpointIO(store), N_EPOCHS, ckpt_path=str(first), seed=3)
    assert found == losses[N_BATCHES:]
    model = Tiny()
    best = trainer(DeltaCheckpointIO(store), 3)
    best.fit(model, lightning_job.data(), ckpt_path=ours.checkpoint_callback.best_model_path)
    assert best.global_step == 3 * N_BATCHES
    assert deltackpt.load(store, step=5)["hyper_parameters"] == {"width": 8, "extra": None}


def test_several_checkpoints_of_one_step_and_versions_of_one_name_are_each_their_own(tmp_path):
    store, directory = tmp_path / "store", tmp_path / "ckpts"
    callbacks = [
        top(directory, filename="same", save_top_k=3, save_last=False),
        ModelCheckpoint(directory, filename="weights-{step}", save_weights_only=True, every_n_train_steps=5),
        ModelCheckpoint(directory, save_top_k=0, save_last=True, every_n_train_steps=3),
    ]
    fit(DeltaCheckpointIO(store), 3, *callbacks)
    markers = markers_in(directory)
    assert markers.keys() == {
        "same.ckpt",
        "same-v1.ckpt",
        "same-v2.ckpt",
        "weights-step=15.ckpt",
        "last.ckpt",
    }
    assert None not in markers.values()
    io = DeltaCheckpointIO(store)
    states = {name: io.load_checkpoint(directory / name) for name in markers}
    assert {states[name]["global_step"] for name in states if name.startswith("same")} == {5, 10, 15}
    assert "optimizer_states" not in states["weights-step=15.ckpt"]
    assert sum(map(len, runs_of(store).values())) == 5


@pytest.mark.parametrize("background", [False, True])
def test_a_link_to_the_last_one_is_no_second_save(tmp_path, whole, background):
    store, directory = tmp_path / "store", tmp_path / "ckpts"
    io = DeltaCheckpointIO(store, background=background)
    fit(io, 3, ModelCheckpoint(directory, save_last="link"))
    assert runs_of(store) == {"main": [15]}
    assert (directory / "last.ckpt").is_symlink()
    found, _ = fit(io, 4, ModelCheckpoint(directory, save_last="link"), ckpt_path="last", seed=2)
    assert found == whole[0][15:20]
    io.remove_checkpoint(directory / "last.ckpt")
    assert runs_of(store) == {"main": [20]}  # only the link went


def test_files_of_lightnings_own_still_load_and_are_removed(tmp_path, whole):
    losses, _, _ = whole
    directory = tmp_path / "ckpts"
    fit(None, 2, ModelCheckpoint(directory, filename="old"))
    io = DeltaCheckpointIO(tmp_path / "store")
    found, _ = fit(io, N_EPOCHS, ckpt_path=str(directory / "old.ckpt"), seed=1)
    assert found == losses[2 * N_BATCHES :]
    io.remove_checkpoint(directory / "old.ckpt")
    assert list(directory.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        io.load_checkpoint(directory / "old.ckpt")


def test_a_step_as_a_file_is_what_lightning_loads_itself(tmp_path):
    io = DeltaCheckpointIO(tmp_path / "store")
    ours = trainer(io, 1, ModelCheckpoint(tmp_path / "ckpts"))
    ours.fit(Tiny(width=6), lightning_job.data())
    export(open_run(tmp_path / "store"), "latest", tmp_path / "model.pt")
    found = Tiny.load_from_checkpoint(tmp_path / "model.pt")
    assert found.hparams.width == 6
    assert same(dict(found.state_dict()), dict(ours.model.state_dict()))


def test_fabric_saves_and_loads_by_the_number_in_the_name(tmp_path):
    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=[DeltaCheckpointIO(tmp_path / "store")])
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    fabric.save(tmp_path / "step-30.ckpt", {"model": model, "epoch": 4})
    assert open_run(tmp_path / "store").steps() == [30]
    assert fabric.load(tmp_path / "step-30.ckpt", {"model": other}) == {"epoch": 4}
    assert torch.equal(model.weight, other.weight)


# -- what goes wrong


def full(marker, path):
    raise StorageError("ckpts: the disk is full", errno=28)


def test_what_has_no_plain_form_is_refused_by_its_place(tmp_path):
    io = DeltaCheckpointIO(tmp_path / "store")
    ours = trainer(io, 1, ModelCheckpoint(tmp_path / "ckpts"))
    with pytest.raises(InvalidInputError, match=r"state\['hyper_parameters'\]\['extra'\]: found a set"):
        ours.fit(Tiny(extra={1, 2}), lightning_job.data())
    assert not list((tmp_path / "ckpts").iterdir())


def test_a_failed_save_in_the_background_is_raised_and_what_it_was_to_replace_stays(tmp_path, monkeypatch):
    store, directory = tmp_path / "store", tmp_path / "ckpts"
    io = DeltaCheckpointIO(store, background=True)
    state = {"state_dict": {"w": torch.zeros(3)}, "global_step": 1}
    io.save_checkpoint(state, directory / "a.ckpt")
    io.teardown()
    io.load_checkpoint(directory / "a.ckpt")
    put = Marker.put
    monkeypatch.setattr(Marker, "put", full)
    io.save_checkpoint({**state, "global_step": 2}, directory / "b.ckpt")
    assert Marker.at(directory / "b.ckpt").step == 1  # until its own is there
    io.remove_checkpoint(directory / "a.ckpt")
    with pytest.raises(StorageError, match="the disk is full"):
        io.save_checkpoint({**state, "global_step": 3}, directory / "c.ckpt")
    monkeypatch.setattr(Marker, "put", put)
    assert io.load_checkpoint(directory / "a.ckpt")["global_step"] == 1
    io.save_checkpoint({**state, "global_step": 3}, directory / "c.ckpt")
    io.remove_checkpoint(directory / "a.ckpt")
    io.teardown()
    assert markers_in(directory).keys() == {"c.ckpt"}
    assert 1 not in open_run(store)


def test_a_step_saved_over_since_is_not_taken_for_the_one_that_was_meant(tmp_path):
    io = DeltaCheckpointIO(tmp_path / "store")
    path, moved = tmp_path / "a.ckpt", tmp_path / "moved.ckpt"
    io.save_checkpoint({"global_step": 1, "n": 1}, path)
    path.rename(moved)
    assert io.load_checkpoint(moved)["n"] == 1
    io.save_checkpoint({"global_step": 1, "n": 2}, path)
    with pytest.raises(NotFoundError, match="saved over it since"):
        io.load_checkpoint(moved)
    io.remove_checkpoint(moved)
    assert io.load_checkpoint(path)["n"] == 2


def test_saved_again_at_its_path_a_step_is_there_until_the_new_one_is(tmp_path, monkeypatch):
    store, path = tmp_path / "store", tmp_path / "a.ckpt"
    io = DeltaCheckpointIO(store)
    io.save_checkpoint({"global_step": 1, "n": 1}, path)
    io.save_checkpoint({"global_step": 1, "n": 2}, path)
    assert io.load_checkpoint(path)["n"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(Marker, "put", full)
        with pytest.raises(StorageError):
            io.save_checkpoint({"global_step": 1, "n": 3}, path)
    assert io.load_checkpoint(path)["n"] == 2
    io.save_checkpoint({"global_step": 1, "n": 4}, path)
    assert io.load_checkpoint(path)["n"] == 4
    assert sum(map(len, runs_of(store).values())) == 1


def test_of_two_jobs_at_one_step_of_a_run_the_second_does_not_save_over_the_first(tmp_path, monkeypatch):
    ours, theirs = DeltaCheckpointIO(tmp_path / "store"), DeltaCheckpointIO(tmp_path / "store")
    free = Runs.free

    def they_are_first(runs, *args):
        found = free(runs, *args)
        if runs is ours._runs:
            theirs.save_checkpoint({"global_step": 5, "n": 2}, tmp_path / "theirs.ckpt")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Runs, "free", they_are_first)
        with pytest.raises(AlreadyExistsError, match="run 'main' has step 5"):
            ours.save_checkpoint({"global_step": 5, "n": 1}, tmp_path / "ours.ckpt")
    assert theirs.load_checkpoint(tmp_path / "theirs.ckpt")["n"] == 2
    ours.save_checkpoint({"global_step": 5, "n": 1}, tmp_path / "ours.ckpt")  # in a run of its own
    assert ours.load_checkpoint(tmp_path / "ours.ckpt")["n"] == 1


def test_what_cannot_be_done_is_refused(tmp_path):
    io = DeltaCheckpointIO(tmp_path / "store")
    with pytest.raises(InvalidInputError, match="DeltaCheckpointIO: found keep, expected options of saves"):
        DeltaCheckpointIO(tmp_path, keep=deltackpt.last(3))
    with pytest.raises(InvalidInputError, match="storage_options"):
        io.save_checkpoint({}, tmp_path / "a.ckpt", storage_options={})
    with pytest.raises(InvalidInputError, match="a local directory only"):
        io.save_checkpoint({}, "s3://bucket/a.ckpt")
    io.save_checkpoint({"w": torch.ones(2)}, tmp_path / "step-7.ckpt")
    assert open_run(tmp_path / "store").steps() == [7]
    with pytest.raises(InvalidInputError, match="found a function as map_location"):
        io.load_checkpoint(tmp_path / "step-7.ckpt", map_location=lambda storage, place: storage)
    assert io.load_checkpoint(tmp_path / "step-7.ckpt", map_location="meta")["w"].device.type == "meta"


def test_a_sharded_tensor_is_for_dcp(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(InvalidInputError, match=r"'w' is sharded.*torch_dcp"):
            DeltaCheckpointIO(tmp_path).save_checkpoint({"state_dict": {"w": sharded}}, tmp_path / "a.ckpt")
    finally:
        dist.destroy_process_group()


def test_it_goes_to_another_process_without_what_is_open(tmp_path):
    io = DeltaCheckpointIO(tmp_path / "store", "exp")
    io.save_checkpoint({"global_step": 1}, tmp_path / "a.ckpt")
    again = pickle.loads(pickle.dumps(io))
    assert again.load_checkpoint(tmp_path / "a.ckpt") == {"global_step": 1}
