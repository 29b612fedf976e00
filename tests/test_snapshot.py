"""What is stored anew, what is not, and what a load reads: all figures are exact."""

import weakref

import numpy as np
import pytest
from faults import Wrapper
from plain import same, weights

from deltackpt import delta, open_run, open_store
from deltackpt.backends.memory import MemoryBackend
from deltackpt.run import Run
from deltackpt.tree import flatten
from deltackpt.types import Deferred, Tensor


class Counting(Wrapper):
    """Counts the bytes read of each kind of file."""

    def __init__(self, inner):
        super().__init__(inner)
        self.read_size = {}

    def _do(self, op, name, call, *, mutates=True):
        answer = call()
        kind = name.split("/")[0]
        if op == "read":
            self.read_size[kind] = self.read_size.get(kind, 0) + len(answer)
        return answer

    def read_into(self, name, offset, buffers):
        kind = name.split("/")[0]
        self.read_size[kind] = self.read_size.get(kind, 0) + sum(memoryview(b).nbytes for b in buffers)
        return self.inner.read_into(name, offset, buffers)


@pytest.fixture
def backend():
    backend = Counting(MemoryBackend())
    open_store(backend, create=True)
    return backend


def fresh(backend, run="main"):
    """The run as a new process sees it."""
    return Run(open_store(backend), run)


def test_a_second_save_reads_nothing_and_a_new_process_reads_only_lists(backend):
    state = {"a": weights(1_000_000), "b": weights(500_000, 1)}
    run = fresh(backend)
    run.save(state, step=1)
    backend.read_size.clear()
    assert run.save(state, step=2).new_size == 0
    assert backend.read_size.get("packs", 0) == 0
    assert fresh(backend).save(state, step=3).new_size == 0
    assert backend.read_size["packs"] < 0.001 * 6_000_000


def test_one_changed_element_costs_one_chunk_and_a_list(backend):
    state = {"a": weights(2_000_000), "b": weights(2_000_000, 1)}
    run = fresh(backend)
    run.save(state, step=1)
    state["b"][1_000_000] += 1
    report = run.save(state, step=2)
    assert report.n_new_chunks == 2
    assert report.new_size <= 2**20 + 10_000
    assert same(run.load(2), state)


def test_equal_tensors_of_one_state_are_stored_once(backend):
    w = weights(1_000_000)
    report = fresh(backend).save({"a": w, "b": w.copy(), "c": w.view(np.uint32).copy()}, step=1)
    assert report.logical_size == 12_000_000
    assert report.new_size < 4_010_000


def test_tied_arrays_come_back_tied(backend):
    w = weights(1000)
    run = fresh(backend)
    run.save({"a": w, "b": [w]}, step=1)
    loaded = run.load(1)
    assert loaded["a"] is loaded["b"][0]


def test_a_renamed_tensor_costs_nothing_whatever_its_cuts(backend):
    run = fresh(backend)
    w = weights(1_000_000)
    run.save({"old": w}, step=1)
    w[:] = weights(1_000_000, 5)  # keeps the boundaries of the first content
    run.save({"old": w}, step=2)
    assert run.save({"new": w}, step=3).new_size == 0
    assert fresh(backend).save({"newer": w}, step=4).new_size == 0


def test_runs_and_processes_share_what_they_have_in_common(backend):
    state = {"w": weights(1_000_000)}
    fresh(backend, "a").save(state, step=1)
    assert fresh(backend, "b").save({"other": state["w"]}, step=7).new_size == 0


def test_flat_shards_cut_anew_for_another_number_of_ranks_share_their_bytes(backend):
    flat = weights(16_000_000)
    run = fresh(backend)

    def shards(n):
        return {f"rank{i}": part for i, part in enumerate(np.array_split(flat, n))}

    run.save(shards(2), step=2)
    for n in (3, 4):
        report = run.save(shards(n), step=n)
        assert report.new_size <= 0.06 * report.logical_size
        assert same(run.load(n), shards(n))


def test_rows_inserted_in_an_embedding_cost_little(backend):
    table = weights(64_000 * 256).reshape(64_000, 256)
    run = fresh(backend)
    run.save({"emb": table}, step=1)
    grown = np.concatenate([table[:1000], weights(128 * 256, 9).reshape(128, 256), table[1000:]])
    report = run.save({"emb": grown}, step=2)
    assert report.new_size <= 0.03 * report.logical_size
    assert same(run.load(2)["emb"], grown)


def test_zeros_are_one_chunk_whatever_their_size(backend):
    report = fresh(backend).save({"moment": np.zeros(10_000_000, np.float32)}, step=1)
    assert report.new_size <= 2 * 2**20 + 10_000
    assert report.written_size < 20_000


def test_keys_read_only_what_they_need(backend):
    state = {f"w{i}": weights(250_000, i) for i in range(20)}
    fresh(backend).save(state, step=1)
    backend.read_size.clear()
    loaded = fresh(backend).load(1, keys="w7")
    assert same(loaded, {"w7": state["w7"]})
    assert backend.read_size["packs"] < 1.02 * 1_000_000 + 10_000


def test_into_fills_the_callers_arrays(backend):
    state = {"w": weights(300_000), "t": np.arange(6).reshape(2, 3), "step": 3}
    delta.save(state, backend, step=1)
    mine = {"w": np.zeros(300_000, np.float32), "t": np.zeros((3, 2), np.int64).T, "step": 0}
    loaded = delta.load(backend, into=mine)
    assert loaded["w"] is mine["w"]
    assert same(mine["w"], state["w"])
    assert mine["t"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["step"] == 3


def test_boundaries_stay_when_the_content_moves_on(backend):
    run = fresh(backend)
    run.save({"w": weights(2_000_000)}, step=1)
    before = run._turns.saver.memory.same_place(_tensor(2_000_000)).ends
    run.save({"w": weights(2_000_000, 1)}, step=2)
    assert np.array_equal(run._turns.saver.memory.same_place(_tensor(2_000_000)).ends, before)


def _tensor(n):
    return flatten({"w": np.zeros(n, np.float32)}).tensors[0]


def test_a_damaged_previous_step_does_not_keep_the_next_from_being_saved(backend):
    state = {"w": weights(1_000_000)}
    fresh(backend).save(state, step=1)
    (entry,) = backend.list("manifests/")
    backend.delete(entry.name)
    run = fresh(backend)
    run.save(state, step=2)
    assert same(run.load(2), state)


@pytest.mark.parametrize("n_changed", [3_000_000, 1])
def test_arrays_that_must_be_copied_are_copied_one_at_a_time(backend, n_changed):
    """A state of slices, or on a device, must not be in memory twice."""
    live, most = 0, 0

    def gone():
        nonlocal live
        live -= 1

    def taken(self):
        nonlocal live, most
        data = self.take()
        weakref.finalize(data.base, gone)
        live += 1
        most = max(most, live)
        return Tensor(self.name, self.dtype, self.shape, self.framework, data)

    state = {f"w{i}": weights(3_000_000, i).reshape(1000, 3000)[:, 1:] for i in range(6)}
    run = open_run(backend, shadow=0)
    run.save(state, step=1)
    for w in state.values():
        w.flat[:n_changed] += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Deferred, "taken", taken)
        run.save(state, step=2)
    assert live == 0
    assert 0 < most <= 3
    assert same(fresh(backend).load(2), state)
