"""Distributed checkpoints: saved and loaded by real ranks, over gloo, with FSDP2 and other placements."""

import gc as python_gc
import pickle
import re
import threading
from contextlib import contextmanager
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as dcp  # noqa: E402
from faults import contents  # noqa: E402
from ranks import (  # noqa: E402
    dies,
    loads_placed,
    loads_rows,
    resumes,
    run_ranks,
    saves_async,
    saves_placed,
    saves_rows,
    trains,
)
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner  # noqa: E402
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType  # noqa: E402

import deltackpt  # noqa: E402
from deltackpt import gc, last, open_run, stats  # noqa: E402
from deltackpt.energy import Meter, estimate, moved_size  # noqa: E402
from deltackpt.errors import AlreadyExistsError, FormatError, InvalidInputError  # noqa: E402
from deltackpt.integrations.torch_dcp import DeltaStorageReader, DeltaStorageWriter  # noqa: E402
from deltackpt.store import open_store  # noqa: E402
from deltackpt.verify import verify  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Four ranks train for six steps and save three; the store, and what each rank saw."""
    store = tmp_path_factory.mktemp("job") / "store"
    return store, run_ranks(4, trains, str(store), 6, (1, 2, 3))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What four ranks have after the same four steps, never saved."""
    return run_ranks(4, trains, str(tmp_path_factory.mktemp("straight")), 4, ())[0][2]


def test_each_rank_has_packs_of_its_own_and_one_step_is_decided_for_all(job):
    store, found = job
    assert open_run(store).steps() == [1, 2, 3]
    assert found[1][1] is None
    report = found[0][1]
    assert report.step == 3
    assert 0 < report.new_size <= report.logical_size
    assert report.n_tensors > 4
    assert report.energy == open_run(store).commit(3).figures.energy
    assert report.energy.parts["cpu seconds"] > 0
    moved = moved_size(report.logical_size, report.new_size, report.written_size)
    expected = estimate(0.0, moved, report.written_size)  # of all ranks together
    assert {name: report.energy.parts[name] for name in ("bytes moved", "bytes written")} == pytest.approx(
        {name: expected[name] for name in ("bytes moved", "bytes written")}, abs=1e-5
    )
    assert stats.look(open_store(store)).energy.n_saves == 3
    backend = open_store(store).backend
    assert len(backend.list("packs/")) == 4 * 3
    assert len(backend.list("refs/main/")) == 3
    assert not backend.list("sessions/")
    assert verify(store, level="decode").clean


def test_nothing_in_the_store_is_a_pickle(job):
    store, _ = job
    assert '"pickle"' not in str(open_run(store).manifest().structure)
    for data in contents(open_store(store).backend).values():
        assert not data.startswith((b"\x80\x02", b"\x80\x04", b"PK\x03\x04"))


def test_on_as_many_ranks_training_goes_on_bit_for_bit(job):
    store, found = job
    for (losses, _, end), (step, _, again) in zip(found, run_ranks(4, resumes, str(store), 6), strict=True):
        assert step == 3
        assert again == losses[4:]
        assert end


@pytest.mark.parametrize("n", [1, 2, 3])
def test_on_fewer_ranks_every_tensor_is_what_it_was(job, straight, n):
    store, found = job
    for step, there, losses in run_ranks(n, resumes, str(store), 6):
        assert step == 3
        assert there == straight
        assert losses == pytest.approx([losses[0], losses[1]])
    assert found[0][0][4] > 0


def test_a_rank_that_dies_leaves_nothing_to_be_seen_and_the_next_save_works(tmp_path):
    store = str(tmp_path / "store")
    run_ranks(2, trains, store, 2, (1,))
    for victim in (0, 1):
        run_ranks(2, dies, store, victim, 5)
        assert open_run(store).steps() == [1]
    collected = gc.collect(store)
    assert not collected.waiting_for
    run_ranks(2, trains, store, 6, (5,))
    assert open_run(store).steps() == [1, 5]
    gc.collect(store)
    assert verify(store, level="decode").clean
    assert not open_store(store).backend.list("sessions/")


@pytest.mark.parametrize(("n", "dim", "m", "to"), [(2, 0, 3, 1), (3, 1, 2, 0), (2, None, 2, 1)])
def test_any_placement_is_loaded_into_any_other(tmp_path, n, dim, m, to):
    store = str(tmp_path / "store")
    report = run_ranks(n, saves_placed, store, 1, dim)[0]
    assert report.logical_size == 24 * 24 * 4 + 12
    assert run_ranks(m, loads_placed, store, to) == [(True, [7.0] * 3, "all")] * m


def test_on_more_or_fewer_ranks_a_save_costs_what_changed(tmp_path):
    store = str(tmp_path / "store")
    first = run_ranks(4, saves_rows, store, 1, 0.0)[0]
    for step, n in ((2, 2), (3, 3), (4, 4)):
        report = run_ranks(n, saves_rows, store, step, 0.0)[0]
        assert report.written_size < 0.01 * report.logical_size
    # Trained on by other ranks: deltas of what the ranks before had.
    report = run_ranks(3, saves_rows, store, 5, 1e-4)[0]
    assert report.written_size < 0.8 * first.written_size
    for step, moved in ((3, 0.0), (5, 1e-4)):
        assert run_ranks(2, loads_rows, store, step, moved) == [True] * 2
    assert verify(store, level="decode").clean
    open_run(store).forget([1, 2, 3, 4])
    gc.collect(store)
    assert run_ranks(2, loads_rows, store, 5, 1e-4) == [True] * 2


@pytest.mark.parametrize("kind", [AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS])
def test_saves_in_the_background_by_threads_and_by_processes(tmp_path, kind):
    store = str(tmp_path / "store")
    run_ranks(2, saves_async, store, kind)
    run = open_run(store)
    assert run.steps() == [1, 2]
    shards = run.load(2)["tensors"]["w"]
    first = run.load(1)["tensors"]["w"]
    assert all(torch.equal(shards[key], first[key] + 1) for key in ("0,0", "12,0"))


# -- one process


@contextmanager
def refused(kind, match=""):
    """Torch wraps what a rank raises, in something that is no Exception."""
    with pytest.raises(dcp.api.CheckpointException) as caught:
        yield
    error = next(iter(caught.value.failures.values()))[0]
    assert isinstance(error, kind)
    assert re.search(match, str(error))


def saved(store, state, step, **options):
    writer = DeltaStorageWriter(store, step=step, **options)
    dcp.save(state, storage_writer=writer, no_dist=True)
    return writer.report


def loaded(store, into, **options):
    dcp.load(into, storage_reader=DeltaStorageReader(store, **options), no_dist=True)
    return into


def test_every_kind_of_tensor_and_value_comes_back(tmp_path):
    tied = torch.randn(5, 4)
    state = {
        "a": tied,
        "b": tied,
        "t": tied.t(),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "bits": torch.tensor([float("nan"), -0.0]).view(torch.int32),
        "flag": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "values": {"lr": 1e-3, "name": "x", "none": None, "list": [1, {"deep": torch.arange(3)}], "n": 2**70},
    }
    saved(tmp_path, state, 1)
    empty = {k: torch.zeros_like(v) for k, v in state.items() if k != "values"}
    empty["values"] = {
        "lr": 0,
        "name": "",
        "none": 0,
        "list": [0, {"deep": torch.zeros(3, dtype=int)}],
        "n": 0,
    }
    found = loaded(tmp_path, empty)
    for name, tensor in state.items():
        if name != "values":
            assert torch.equal(found[name], tensor.detach()), name
    assert found["values"]["list"][1]["deep"].tolist() == [0, 1, 2]
    assert (found["values"]["n"], found["values"]["none"]) == (2**70, None)


def test_a_later_save_writes_what_changed(tmp_path):
    state = {"frozen": torch.randn(1 << 18), "moves": torch.zeros(8)}
    first = saved(tmp_path, state, 1)
    state["moves"] += 1
    second = saved(tmp_path, state, 2)
    assert first.new_size >= first.logical_size
    assert second.new_size < 200
    assert [g.group for g in second.groups] == ["weights"]


def test_no_rank_asks_counters_which_are_the_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(Meter, "read", None)
    report = saved(tmp_path, {"w": torch.ones(1000)}, 1)
    assert report.energy.method == "estimated: cpu seconds, bytes moved, bytes written"


def test_a_part_is_loaded_by_reading_a_part(tmp_path, monkeypatch):
    state = {"big": torch.randn(1 << 20), "small": torch.arange(4)}
    saved(tmp_path, state, 1)
    found = loaded(tmp_path, {"small": torch.zeros(4, dtype=int)})
    assert found["small"].tolist() == [0, 1, 2, 3]
    with refused(RuntimeError, "Missing key"):
        loaded(tmp_path, {"missing": torch.zeros(4)})


class Odd:
    """Something of no plain form."""

    def __eq__(self, other):
        return type(other) is Odd

    __hash__ = None


def test_what_has_no_plain_form_is_pickled_only_if_both_sides_say_so(tmp_path):
    with refused(InvalidInputError, r"odd.*found a .*Odd"):
        saved(tmp_path, {"odd": Odd(), "w": torch.ones(2)}, 1)
    assert open_run(tmp_path).steps() == []
    saved(tmp_path, {"odd": Odd(), "w": torch.ones(2)}, 1, allow_pickle=True)
    with refused(InvalidInputError, "was pickled"):
        loaded(tmp_path, {"odd": None, "w": torch.zeros(2)})
    assert loaded(tmp_path, {"odd": None, "w": torch.zeros(2)}, allow_pickle=True)["odd"] == Odd()


def test_steps_are_named_by_the_writer_or_by_the_call(tmp_path):
    state = {"w": torch.ones(2)}
    for checkpoint_id, step in (("7", 7), ("runs/step-8", 8), (tmp_path / "checkpoint-9", 9)):
        writer = DeltaStorageWriter(tmp_path / "s")
        dcp.save(state, checkpoint_id=checkpoint_id, storage_writer=writer, no_dist=True)
        assert writer.report.step == step
    reader = DeltaStorageReader(tmp_path / "s")
    dcp.load(state, checkpoint_id="step-8", storage_reader=reader, no_dist=True)
    assert reader.step == 8
    for bad in ("latest", "step-8a", ""):
        assert not DeltaStorageWriter.validate_checkpoint_id(bad)
    with refused(InvalidInputError, "no step is named"):
        dcp.save(state, storage_writer=DeltaStorageWriter(tmp_path / "s"), no_dist=True)
    with refused(AssertionError, "no step 99"):
        loaded(tmp_path / "s", state, step=99)


def test_a_step_is_saved_once_unless_told_and_rules_let_steps_go(tmp_path):
    saved(tmp_path, {"w": torch.ones(2)}, 1)
    with refused(AlreadyExistsError):
        saved(tmp_path, {"w": torch.zeros(2)}, 1)
    saved(tmp_path, {"w": torch.zeros(2)}, 1, overwrite=True)
    assert loaded(tmp_path, {"w": torch.ones(2)})["w"].tolist() == [0, 0]
    for step in (2, 3):
        report = saved(tmp_path, {"w": torch.ones(2)}, step, keep=last(2))
    assert report.forgotten == [1]
    assert open_run(tmp_path).steps() == [2, 3]


def test_what_no_decision_could_say_is_refused_before_anything_is_written(tmp_path):
    for options in ({"metrics": {"loss": "low"}}, {"metadata": ["a"]}, {"metadata": {"f": id}}, {"keep": 3}):
        with pytest.raises(InvalidInputError):
            DeltaStorageWriter(tmp_path, step=1, **options)
    saved(tmp_path, {"w": torch.ones(2)}, 1, metrics={"loss": True}, metadata={"a": [1]})
    assert open_run(tmp_path).commit().metrics == {"loss": 1.0}


def test_one_rank_is_to_decide_for_all(tmp_path):
    writer = DeltaStorageWriter(tmp_path, step=1)
    with pytest.raises(InvalidInputError, match="use_collectives"):
        writer.set_up_storage_writer(True, rank=0, use_collectives=False)


def test_two_saves_at_once_do_not_share_what_is_remembered(tmp_path):
    weights = torch.randn(1 << 16)
    saved(tmp_path, {"w": weights}, 0)
    start = threading.Barrier(2)

    def save(which):
        for i in range(4):
            start.wait()
            saved(tmp_path, {"w": weights + which * 1e-4 + i * 1e-5}, 1 + 2 * i + which)

    threads = [threading.Thread(target=save, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        for which in (0, 1):
            found = loaded(tmp_path, {"w": torch.zeros(1 << 16)}, step=1 + 2 * i + which)["w"]
            assert torch.equal(found, weights + which * 1e-4 + i * 1e-5)


def test_a_part_that_nobody_decides_keeps_no_gc_waiting_once_its_writer_is_gone(tmp_path):
    class Failing(DeltaStorageWriter):
        def finish(self, metadata, results):
            raise OSError("the coordinator is gone")

    writer = Failing(tmp_path, step=1)
    with refused(OSError):
        dcp.save({"w": torch.ones(2)}, storage_writer=writer, no_dist=True)
    assert len(open_store(tmp_path).backend.list("sessions/")) == 1
    del writer
    python_gc.collect()
    assert not open_store(tmp_path).backend.list("sessions/")
    saved(tmp_path, {"w": torch.ones(2)}, 1)
    assert open_run(tmp_path).steps() == [1]


def test_a_whole_shard_is_cast_as_torch_casts_a_part(tmp_path):
    saved(tmp_path, {"w": torch.arange(4.0)}, 1)
    found = loaded(tmp_path, {"w": torch.zeros(4, dtype=torch.bfloat16)})["w"]
    assert found.tolist() == [0, 1, 2, 3]


def test_a_planner_with_arrays_of_its_own_is_refused(tmp_path):
    class Odd(DefaultSavePlanner):
        def create_global_plan(self, plans):
            plans, metadata = super().create_global_plan(plans)
            return plans, replace(metadata, planner_data={"w": torch.ones(2)})

    with refused(InvalidInputError, "planner's data"):
        writer = DeltaStorageWriter(tmp_path, step=1)
        dcp.save({"w": torch.ones(2)}, storage_writer=writer, planner=Odd(), no_dist=True)


def test_the_step_a_job_went_on_from_stays(tmp_path):
    for step in (1, 2, 3):
        deltackpt.save({"w": torch.ones(2)}, tmp_path, step=step)
    for step in (4, 5, 6):
        report = saved(tmp_path, {"w": torch.ones(2)}, step, keep=last(2))
    assert open_run(tmp_path).steps() == [3, 5, 6]
    assert report.forgotten == [4]


def test_a_step_that_was_saved_otherwise_is_refused(tmp_path):
    deltackpt.save({"w": torch.ones(2)}, tmp_path, step=1)
    with refused(AssertionError, "was not saved by a DeltaStorageWriter"):
        loaded(tmp_path, {"w": torch.zeros(2)})
    with refused(AssertionError, "run 'other' has no step"):
        loaded(tmp_path, {"w": torch.zeros(2)}, run="other")


def good():
    return {
        "tensors": {"w": {"0": torch.ones(2), "2": torch.ones(1)}},
        "values": {},
        "sizes": {"w": torch.Size([3])},
        "requires_grad": {"w": False},
        "planner_data": None,
    }


SPOILT = {
    "tensors is a list": {"tensors": []},
    "shards are a list": {"tensors": {"w": [torch.ones(3)]}},
    "no shards": {"tensors": {"w": {}}},
    "a shard is text": {"tensors": {"w": {"0": "text"}}},
    "a shard is long text": {"tensors": {"w": {"0": "text" * 9999}}},
    "a shard is NumPy's": {"tensors": {"w": {"0": np.ones(3, "M8[s]")}}},
    "offsets are words": {"tensors": {"w": {"zero": torch.ones(3)}}},
    "an offset is a number": {"tensors": {"w": {0.5: torch.ones(3)}}},
    "an offset is below": {"tensors": {"w": {"-1": torch.ones(3)}}},
    "an offset is too far": {"tensors": {"w": {"1": torch.ones(3)}}},
    "too many offsets": {"tensors": {"w": {"0,0,0": torch.ones(3, 1)}}},
    "two dtypes": {"tensors": {"w": {"0": torch.ones(2), "2": torch.ones(1, dtype=int)}}},
    "no size": {"sizes": {}},
    "a size is a list": {"sizes": {"w": [3]}},
    "names are in a list": {"requires_grad": ["w"]},
    "torch has no such dtype": {"tensors": {"w": {"0": np.ones(3, "f2").astype(ml_dtypes.float8_e4m3)}}},
    "values are a list": {"values": [1]},
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_step_that_says_impossible_things_is_refused(tmp_path, name):
    deltackpt.save(good(), tmp_path, step=1)
    assert loaded(tmp_path, {"w": torch.zeros(3)})["w"].tolist() == [1, 1, 1]
    deltackpt.save({**good(), **SPOILT[name]}, tmp_path, step=2)
    reader = DeltaStorageReader(tmp_path)
    with pytest.raises(FormatError):
        reader.read_metadata()


def test_writer_and_reader_can_be_pickled(tmp_path):
    writer = pickle.loads(pickle.dumps(DeltaStorageWriter(tmp_path, step=3, keep=last(2))))
    dcp.save({"w": torch.ones(2)}, storage_writer=writer, no_dist=True)
    reader = pickle.loads(pickle.dumps(DeltaStorageReader(tmp_path)))
    state = {"w": torch.zeros(2)}
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert state["w"].tolist() == [1, 1]
