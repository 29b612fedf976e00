"""DeepSpeed's engine on a store: ZeRO on two ranks, resumed, killed, thinned out."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")

from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo  # noqa: E402
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler  # noqa: E402
from deepspeed_job import AT, STEPS, goes_on, resumes, thins  # noqa: E402
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


def save_tag(engine, directory, step, names="a"):
    """Save a tag of several files, as DeepSpeed does."""
    info = CheckpointCommitInfo(tag=f"global_step{step}", save_dir=str(directory), save_latest=True)
    engine.create(info)
    for name in names:
        engine.save({"n": step, "of": name}, f"{directory}/{info.tag}/{name}.pt")
    assert engine.commit(info)
    Path(directory, "latest").write_text(info.tag)


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
    engine = DeltaCheckpointEngine(store, keep=last(2))  # a job started anew goes by the file
    engine.load(tags / "global_step20" / "a.pt")
    save_tag(engine, tags, 21)
    assert open_run(store, "main.a").steps() == [20, 21, 28, 30, 40]
    assert engine.load(tags / "global_step28" / "a.pt") == {"n": 28, "of": "a"}


def steps_of_runs(store):
    return {run: open_run(store, run).steps() for run in deltackpt.open_store(store).refs.runs()}


def test_a_tag_that_was_saved_twice_goes_as_others_do(tmp_path):
    store, tags = tmp_path / "store", tmp_path / "tags"
    engine = DeltaCheckpointEngine(store, keep=last(1))
    for step in (1, 2, 2, 2, 3, 4):
        save_tag(engine, tags, step, "ab")
    engine = DeltaCheckpointEngine(store, keep=last(1))  # which is not told of the runs of tags saved twice
    save_tag(engine, tags, 5, "ab")
    assert steps_of_runs(store) == {"main.a": [4, 5], "main.a-2": [], "main.b": [4, 5], "main.b-2": []}
    assert [sorted(markers_in(tags / f"global_step{step}")) for step in range(1, 6)] == [
        [], [], [], ["a.pt", "b.pt"], ["a.pt", "b.pt"]
    ]  # fmt: skip


def test_on_ranks_a_tag_is_there_for_all_or_is_gone_for_all_of_them(tmp_path):
    files = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    files.append("mp_rank_00_model_states.pt")
    for names, loaded in run_ranks(2, thins, str(tmp_path), 2):
        assert names == [[], [], [], files, files]
        assert [Path(path).parent.name for path in loaded] == ["global_step4", "global_step5"]


def test_a_tag_goes_whole_or_stays_whole_whatever_of_it_was_loaded(tmp_path):
    store, tags = tmp_path / "store", tmp_path / "tags"
    engine = DeltaCheckpointEngine(store, keep=last(2))
    for step in (10, 20, 30):
        save_tag(engine, tags, step, "ab")
    open_run(store, "main.b").pin(10)
    engine = DeltaCheckpointEngine(store, keep=last(2))
    engine.load(tags / "global_step20" / "a.pt")  # the module alone, say
    for step in (40, 50, 60):
        save_tag(engine, tags, step, "ab")
    assert steps_of_runs(store) == {f"main.{name}": [10, 20, 40, 50, 60] for name in "ab"}
    for step in (10, 20, 40, 50, 60):
        assert [engine.load(tags / f"global_step{step}" / f"{name}.pt")["of"] for name in "ab"] == ["a", "b"]


def test_what_a_kill_left_of_a_tag_goes_with_it(tmp_path):
    store, tags = tmp_path / "store", tmp_path / "tags"
    engine = DeltaCheckpointEngine(store)
    save_tag(engine, tags, 1, "ab")
    (tags / "global_step1" / "b.pt").unlink()  # as if it had not been put down yet
    save_tag(engine, tags, 2, "ab")
    save_tag(engine, tags, 3, "ab")
    for name in "ab":
        (tags / "global_step2" / f"{name}.pt").unlink()  # removed by hand: its steps are the user's
    save_tag(DeltaCheckpointEngine(store, keep=last(1)), tags, 4, "ab")
    assert steps_of_runs(store) == {f"main.{name}": [2, 3, 4] for name in "ab"}


def test_a_tag_that_is_saved_again_does_not_go_meanwhile(tmp_path):
    store, tags = tmp_path / "store", tmp_path / "tags"
    engine = DeltaCheckpointEngine(store)
    for step in (1, 2, 3):
        save_tag(engine, tags, step)
    engine = DeltaCheckpointEngine(store, keep=last(1))
    engine.create(CheckpointCommitInfo(tag="global_step1", save_dir=str(tags), save_latest=True))
    assert steps_of_runs(store) == {"main.a": [1, 3]}
    assert engine.load(tags / "global_step1" / "a.pt")["n"] == 1


def test_the_tags_of_a_job_with_a_longer_name_are_not_touched(tmp_path):
    store = tmp_path / "store"
    other = DeltaCheckpointEngine(store, run="main.b")
    for step in (1, 2, 3):
        save_tag(other, tmp_path / "other", step)
    engine = DeltaCheckpointEngine(store, keep=last(1))
    for step in (1, 2, 3):
        save_tag(engine, tmp_path / "tags", step)
    assert steps_of_runs(store) == {"main.a": [2, 3], "main.b.a": [1, 2, 3]}


def test_each_directory_of_tags_is_thinned_by_itself_by_whatever_name(tmp_path):
    engine = DeltaCheckpointEngine(tmp_path / "store", keep=last(1))
    best, link = tmp_path / "tags" / "best", tmp_path / "link"
    save_tag(engine, best, 1)
    for step in (1, 2, 3):
        save_tag(engine, tmp_path / "tags", step)
    link.symlink_to(tmp_path / "tags")
    save_tag(engine, link, 4)
    assert steps_of_runs(tmp_path / "store") == {"main.a": [1, 3, 4], "main.a-2": []}
    assert engine.load(best / "global_step1" / "a.pt")["n"] == 1


@pytest.mark.parametrize("path", ["/no\0path/a.pt", "/no\ud800path/a.pt", f"/{'x' * 300}/a.pt", "x" * 9000])
def test_a_step_whose_path_is_none_keeps_no_tag_from_going(tmp_path, path):
    engine = DeltaCheckpointEngine(tmp_path / "store", keep=last(1))
    open_run(tmp_path / "store", "main.b").save({"n": 1}, step=1, metadata={"path": path})
    for step in (1, 2, 3):
        save_tag(engine, tmp_path / "tags", step)
    assert steps_of_runs(tmp_path / "store") == {"main.a": [2, 3], "main.b": [1]}


def test_an_object_of_another_deepspeed_is_told_with_what_to_do(tmp_path):
    path = tmp_path / "tags" / "global_step1" / "a.pt"
    save_tag(DeltaCheckpointEngine(tmp_path / "store"), tmp_path / "tags", 1)
    run = open_run(tmp_path / "store", "main.a")
    run.save({"scaler": {"__deepspeed__": "NewScaler", "value": {}}}, step=2)
    Marker.of(run, run.commit(2)).put(path)
    with pytest.raises(InvalidInputError, match="'NewScaler'") as e:
        DeltaCheckpointEngine(tmp_path / "store").load(path)
    assert "DeepSpeed and the deltackpt that saved it" in e.value.hint


def test_a_directory_named_by_way_of_another_holds_markers_too(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    engine = DeltaCheckpointEngine(tmp_path / "store")
    save_tag(engine, "../tags", 3)
    assert Marker.at(tmp_path / "tags" / "global_step3" / "a.pt").step == 3
    assert engine.load("../tags/global_step3/a.pt") == {"n": 3, "of": "a"}


def test_what_is_no_marker_is_not_unpickled_unasked(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "file.pt")
    with pytest.raises(InvalidInputError, match="may run code"):
        DeltaCheckpointEngine(tmp_path / "store").load(tmp_path / "file.pt")
    trusting = DeltaCheckpointEngine(tmp_path / "store", allow_pickle=True)
    assert trusting.load(tmp_path / "file.pt")["w"].sum() == 2
    with pytest.raises(InvalidInputError, match="found create, expected options of saves"):
        DeltaCheckpointEngine(tmp_path, create=True)
