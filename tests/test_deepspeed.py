"""DeepSpeed's engine on a store: ZeRO on two ranks, resumed, killed, thinned out."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")

from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo  # noqa: E402
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler  # noqa: E402
from deepspeed_job import AT, STEPS, goes_on, resumes  # noqa: E402
from ranks import run_ranks  # noqa: E402

import deltackpt  # noqa: E402
from deltackpt import gc, last, open_run  # noqa: E402
from deltackpt.errors import InvalidInputError  # noqa: E402
from deltackpt.integrations.deepspeed import DeltaCheckpointEngine  # noqa: E402
from deltackpt.markers import Marker  # noqa: E402
from deltackpt.verify import verify  # noqa: E402

STAGES = (0, 1, 3, 2)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Two ranks train for each stage, and then one dies in a save; where, and what each rank found."""
    base = tmp_path_factory.mktemp("jobs")
    assert run_ranks(2, goes_on, str(base), STAGES) == [None, None]
    return base, [json.loads((base / f"{rank}.json").read_text()) for rank in range(2)]


def markers_in(directory):
    return {path.name: Marker.at(path) for path in Path(directory).iterdir()}


def test_every_stage_goes_on_with_the_losses_of_a_job_never_stopped(jobs):
    _, ranks = jobs
    for found in ranks:
        assert len(found) == len(STAGES)
        for whole, again, tag, epoch in found:
            assert again == whole
            assert (tag, epoch) == (f"global_step{AT}", AT - 1)


def test_each_file_is_a_run_and_what_no_rule_keeps_is_gone_from_both(jobs):
    base, _ = jobs
    for stage, n_files in zip(STAGES, (1, 3, 4, 3), strict=True):
        store, tags = base / str(stage) / "store", base / str(stage) / "tags"
        runs = deltackpt.open_store(store).refs.runs()
        assert len(runs) == n_files
        # Two were kept, of three, when the fourth began.
        assert [open_run(store, run).steps() for run in runs] == [[AT - 2, AT - 1, AT]] * n_files
        assert list(markers_in(tags / "global_step1").values()) == []
        for step in (AT - 1, AT):
            there = markers_in(tags / f"global_step{step}")
            assert {(f"main.{name.removesuffix('.pt')}", step) for name in there} == {
                (marker.run, marker.step) for marker in there.values()
            }
        assert verify(store, level="decode").clean


def test_nothing_in_the_store_is_a_pickle(jobs):
    base, _ = jobs
    for stage in STAGES:
        store = deltackpt.open_store(base / str(stage) / "store")
        for run in store.refs.runs():
            assert '"pickle"' not in json.dumps(open_run(store, run).manifest().structure)


def test_a_rank_that_dies_leaves_no_tag_and_the_job_goes_on_from_the_one_before(jobs):
    base, first = jobs
    stage = STAGES[-1]
    store, tags = base / str(stage) / "store", base / str(stage) / "tags"
    assert (tags / "latest").read_text() == f"global_step{AT}"
    assert markers_in(tags / f"global_step{STEPS}") == {}
    for rank, (losses, told, is_same) in enumerate(run_ranks(2, resumes, str(base), stage)):
        assert losses == first[rank][STAGES.index(stage)][0]
        # Both are told of what only the first one writes.
        assert "state['seen']: found a set" in told[0]
        assert told[0].startswith("InvalidInputError: " + ("rank 0: " if rank else "state"))
        assert is_same
    assert (tags / "latest").read_text() == f"global_step{STEPS}"
    assert markers_in(tags / "refused") == {}
    assert set(torch.load(tags / "model.bin")) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    runs = [open_run(store, run) for run in deltackpt.open_store(store).refs.runs()]
    assert all(0 not in run for run in runs)  # what was refused to one rank was taken back from the other
    assert sorted(run.name for run in runs if STEPS in run) == sorted(
        marker.run for marker in markers_in(tags / f"global_step{STEPS}").values()
    )
    gc.collect(store)
    assert verify(store, level="decode").clean


def test_a_moving_loss_scale_comes_back_as_what_it_was(tmp_path):
    engine = DeltaCheckpointEngine(tmp_path / "store")
    scaler = DynamicLossScaler(2.0**16, 1000, 1.0, 1, False)
    scaler.cur_scale, scaler.cur_iter = 2.0**15, 7
    info = CheckpointCommitInfo(tag="global_step3", save_dir=str(tmp_path), save_latest=True)
    engine.create(info)
    path = tmp_path / "global_step3" / "a.pt"
    engine.save({"optimizer": {"loss_scaler": scaler}}, path)
    assert not path.exists()  # until all ranks have saved
    assert engine.commit(info)
    found = engine.load(path, map_location=lambda storage, place: storage)["optimizer"]
    assert type(found["loss_scaler"]) is DynamicLossScaler
    assert vars(found["loss_scaler"]) == vars(scaler)


def save_tag(engine, directory, step):
    info = CheckpointCommitInfo(tag=f"global_step{step}", save_dir=str(directory), save_latest=True)
    engine.create(info)
    engine.save({"n": step}, f"{directory}/global_step{step}/a.pt")
    assert engine.commit(info)


def test_of_a_job_that_went_back_the_tag_that_latest_names_stays(tmp_path):
    store, tags = tmp_path / "store", tmp_path / "tags"
    engine = DeltaCheckpointEngine(store, keep=last(2))
    for step in (10, 20, 30, 40):
        save_tag(engine, tags, step)
    engine = DeltaCheckpointEngine(store, keep=last(2))
    engine.load(tags / "global_step20" / "a.pt")
    save_tag(engine, tags, 25)
    save_tag(engine, tags, 28)  # when it begins, `latest` says 25
    assert open_run(store, "main.a").steps() == [20, 25, 28, 30, 40]
    assert engine.load(tags / "global_step25" / "a.pt") == {"n": 25}


def test_a_directory_named_by_way_of_another_holds_markers_too(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    engine = DeltaCheckpointEngine(tmp_path / "store")
    save_tag(engine, "../tags", 3)
    assert Marker.at(tmp_path / "tags" / "global_step3" / "a.pt").step == 3
    assert engine.load("../tags/global_step3/a.pt") == {"n": 3}


def test_what_is_no_marker_is_not_unpickled_unasked(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "file.pt")
    with pytest.raises(InvalidInputError, match="may run code"):
        DeltaCheckpointEngine(tmp_path / "store").load(tmp_path / "file.pt")
    trusting = DeltaCheckpointEngine(tmp_path / "store", allow_pickle=True)
    assert trusting.load(tmp_path / "file.pt")["w"].sum() == 2
    with pytest.raises(InvalidInputError, match="found create, expected options of saves"):
        DeltaCheckpointEngine(tmp_path, create=True)
