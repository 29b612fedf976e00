"""What changed a little costs little: which base each chunk gets, over saves, runs, forks and restarts."""

import numpy as np
import pytest
from faults import Wrapper
from plain import same, weights

from deltackpt import codecs, delta, open_run, open_store, restore, snapshot
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import StorageError
from deltackpt.gc import collect
from deltackpt.glances import NONE, Watch
from deltackpt.memory import Memory
from deltackpt.run import Run
from deltackpt.session import Session
from deltackpt.shadow import Shadow
from deltackpt.staging import looks
from deltackpt.types import Deferred, Tensor

ml_dtypes = pytest.importorskip("ml_dtypes")


@pytest.fixture
def backend():
    backend = MemoryBackend()
    open_store(backend, create=True)
    return backend


def fresh(backend, run="main", **options):
    """The run as a new process sees it."""
    return Run(open_store(backend), run, **options)


def trained(w, seed=0, share=1.0, size=1e-5):
    """Weights after a step that moves a share of the elements."""
    rng = np.random.default_rng(seed)
    moved = w * (1 + size * rng.standard_normal(w.shape)).astype(w.dtype)
    return np.where(rng.random(w.shape) < share, moved, w).astype(w.dtype)


def rows(backend, sid=None):
    """Every record of the store, or of the session that saved one step."""
    index = open_store(backend).refresh(complete=True)
    return [
        row
        for segment in index.segments
        for row in segment.rows
        if sid is None or segment.packs[int(row["pack"])].sid == sid
    ]


def of_step(run, step):
    return rows(run.store.backend, run.commit(step).sid)


def depths(run, step):
    """Depth of each data chunk a step put."""
    return sorted(int(r["depth"]) for r in of_step(run, step) if r["raw_size"] >= 65536)


@pytest.mark.parametrize("shadow", [0, 1 << 30])
def test_a_step_that_changed_every_element_a_little_is_stored_as_deltas(backend, shadow):
    run = fresh(backend, shadow=shadow)
    states, sizes = [], []
    w = weights(500_000)
    for step in range(6):
        states.append({"w": w})
        sizes.append(run.save(states[-1], step=step).written_size)
        w = trained(w, step)
    assert max(sizes[1:]) < 0.75 * sizes[0]
    assert set(depths(run, 0)) == {0}
    assert set(depths(run, 1)) == {1}
    assert all(same(fresh(backend).load(step), state) for step, state in enumerate(states))


def test_a_chain_that_is_full_goes_on_from_its_root(backend):
    run = fresh(backend)
    w = weights(300_000)
    seen = []
    for step in range(12):
        run.save({"w": w}, step=step)
        seen.append(max(depths(run, step)))
        w = trained(w, step)
    assert seen[:2] == [0, 1]
    assert max(seen) >= 2
    assert 1 in seen[2:], "no delta went back to the root"
    assert 0 not in seen[1:], "a keyframe, though the root was near"


def test_a_restarted_process_goes_on_with_deltas(backend):
    w = weights(300_000)
    first = fresh(backend).save({"w": w}, step=0)
    again = fresh(backend).save({"w": trained(w)}, step=1)
    assert again.written_size < 0.75 * first.written_size


def test_bf16_weights_that_changed_here_and_there_cost_what_changed(backend):
    w = weights(1_000_000).astype(ml_dtypes.bfloat16)
    run = fresh(backend)
    run.save({"w": w}, step=0)
    bits = w.view(np.uint16).copy()
    at = np.random.default_rng(1).choice(len(bits), 50_000, replace=False)
    bits[at] += 1
    state = {"w": bits.view(ml_dtypes.bfloat16)}
    assert run.save(state, step=1).written_size < 0.03 * w.nbytes
    assert same(fresh(backend).load(1), state)


def test_a_copy_in_lower_precision_costs_nothing(backend):
    run = fresh(backend)
    w = weights(600_000)
    for step in range(3):
        narrow = w.astype(ml_dtypes.bfloat16)
        state = {"model": {"w": narrow}, "master": {"w": w}}
        both = run.save(state, step=step).written_size
        alone = fresh(MemoryBackend_of(w, step)).commits()[-1].figures.written_size if step == 0 else None
        if alone is not None:
            assert both < alone + 0.02 * narrow.nbytes
        assert same(fresh(backend).load(step), state)
        w = trained(w, step)
    derived = [r for r in of_step(run, 2) if r["itemsize"] == 2]
    assert derived
    assert sum(int(r["stored_size"]) for r in derived) < 0.005 * narrow.nbytes


def MemoryBackend_of(w, step):  # noqa: N802 - a store with the master alone
    backend = MemoryBackend()
    delta.save({"master": {"w": w}}, backend, step=step)
    return backend


def test_a_copy_that_is_not_quite_the_cast_comes_back_as_it_was(backend):
    w = weights(600_000)
    narrow = w.astype(ml_dtypes.bfloat16)
    bits = narrow.view(np.uint16)
    bits[1000::5000] += 3
    state = {"narrow": narrow, "wide": w}
    delta.save(state, backend, step=0)
    assert same(delta.load(backend), state)


def test_flat_shards_that_end_elsewhere_are_parts_of_what_was_there(backend):
    flat = weights(3_000_000)
    run = fresh(backend)
    for step, n_ranks in enumerate((2, 3, 4, 3)):
        state = {f"rank{r}": part for r, part in enumerate(np.split(flat, n_ranks))}
        report = run.save(state, step=step)
        if step:
            assert report.written_size < 0.035 * flat.nbytes
        assert same(fresh(backend).load(step), state)


def test_a_sweep_from_one_base_becomes_deltas_by_itself(backend):
    base = {"model": {"w": weights(800_000), "b": weights(800_000, 1)}}
    whole = fresh(backend, "base").save(base, step=100).written_size
    other = {"model": {"w": weights(800_000, 5), "b": weights(800_000, 6)}}
    fresh(backend, "unrelated").save(other, step=100)  # saved later, of the same names and shapes
    tuned = {"model": {k: trained(v, 3) for k, v in base["model"].items()}}
    report = fresh(backend, "tuned").save(tuned, step=110)
    assert report.written_size < 0.75 * whole
    assert same(fresh(backend, "tuned").load(), tuned)


def test_a_first_save_takes_no_base_from_what_is_not_like_it(backend):
    fresh(backend, "a").save({"w": weights(300_000)}, step=0)
    run = fresh(backend, "b")
    run.save({"w": weights(300_000, 1)}, step=0)
    assert set(depths(run, 0)) == {0}


def test_a_first_save_does_without_a_snapshot_that_cannot_be_read(backend):
    a = fresh(backend, "a")
    a.save({"w": weights(300_000)}, step=0)
    for pack in backend.names("packs/"):
        backend.delete(pack)
    state = {"w": trained(weights(300_000))}
    fresh(backend, "b").save(state, step=0)
    assert same(fresh(backend, "b").load(), state)


def test_a_fork_goes_on_with_deltas_against_the_step_it_began_with(backend):
    w = weights(300_000)
    run = fresh(backend)
    whole = run.save({"w": w}, step=0).written_size
    branch = run.fork("branch")
    assert branch.save({"w": trained(w)}, step=1).written_size < 0.75 * whole


def test_forgetting_any_step_breaks_no_other(backend):
    states, w = [], weights(200_000)
    run = fresh(backend)
    for step in range(6):
        states.append({"w": w})
        run.save(states[-1], step=step)
        w = trained(w, step)
    for gone in (0, 3, 1):
        run.forget([gone])
        collect(run.store)
        for step in run.steps():
            assert same(fresh(backend).load(step), states[step])
    run.save({"w": w}, step=6)
    assert same(fresh(backend).load(6), {"w": w})


def test_a_shadow_that_was_changed_under_us_is_not_used(backend, caplog):
    run = fresh(backend)
    w = weights(300_000)
    run.save({"w": w}, step=0)
    run._turns.saver.shadow.get("w", run._turns.saver.memory._by_name["w"].row.root)[12345] ^= 1
    state = {"w": trained(w)}
    run.save(state, step=1)
    assert "shadow" in caplog.text
    assert same(fresh(backend).load(1), state)


def test_a_save_that_failed_leaves_memory_and_shadow_as_they_were(backend):
    run = fresh(backend)
    w = weights(300_000)
    run.save({"w": w}, step=0)
    with pytest.raises(Exception, match="has step 0 already"):
        run.save({"w": trained(w, 1)}, step=0)
    state = {"w": trained(w, 2)}
    run.save(state, step=1)
    assert same(fresh(backend).load(1), state)


def test_a_frozen_tensor_takes_no_room_in_the_shadow(backend):
    run = fresh(backend)
    frozen, w = weights(300_000), weights(100_000, 1)
    for step in range(3):
        run.save({"frozen": frozen, "w": w}, step=step)
        w = trained(w, step)
    assert run._turns.saver.shadow.size == w.nbytes


def test_integers_and_8_bit_floats_become_deltas_too(backend):
    rng = np.random.default_rng(0)
    ints = rng.integers(0, 1 << 40, 200_000)
    eight = rng.integers(0, 256, 1_000_000, np.uint8).view(ml_dtypes.float8_e4m3fn)
    run = fresh(backend)
    run.save({"ints": ints, "eight": eight}, step=0)
    changed = eight.view(np.uint8).copy()
    changed[::100] += 1
    state = {"ints": ints + rng.integers(0, 3, ints.shape), "eight": changed.view(eight.dtype)}
    report = run.save(state, step=1)
    assert report.written_size < 0.25 * ints.nbytes + 0.05 * eight.nbytes
    assert same(fresh(backend).load(1), state)


def test_the_shadow_is_bytes_or_an_error(backend):
    for wrong in (-1, 1.5, True, "1G"):
        with pytest.raises(ValueError, match="shadow"):
            open_run(backend, shadow=wrong)


def test_every_depth_on_file_is_one_more_than_its_bases(backend):
    run = fresh(backend)
    w = weights(400_000)
    for step in range(10):
        run.save({"n": w.astype(np.float16), "w": w}, step=step)
        w = trained(w, step, share=0.01)
    by_id = {r["id"].tobytes(): int(r["depth"]) for r in rows(backend)}
    deltas = [r for r in rows(backend) if r["depth"]]
    assert deltas
    assert all(int(r["depth"]) == by_id[r["base"].tobytes()] + 1 for r in deltas)
    assert max(by_id.values()) <= open_store(backend).depth_max
    assert {int(r["codec"]) for r in deltas} <= set(codecs.DELTAS)


def test_a_tensor_of_which_a_part_is_new_is_not_stored_whole_for_it(backend):
    run = fresh(backend)
    w = weights(3_000_000)
    run.save({"w": w}, step=0)
    new = trained(w, share=0.001)
    new[1_350_000:1_650_000] = weights(300_000, 9)
    report = run.save({"w": new}, step=1)
    assert report.written_size < 0.2 * w.nbytes
    assert same(fresh(backend).load(1), {"w": new})


def test_an_unrelated_run_gives_a_first_save_neither_base_nor_cuts(backend):
    pretrained = weights(1_000_000)
    fresh(backend, "pretrained").save({"model": {"w": pretrained}}, step=0)
    fresh(backend, "scratch").save({"w": weights(1_000_000, 1)}, step=0)
    assert fresh(backend, "finetune").save({"w": pretrained}, step=0).new_size == 0


class Unreadable(Wrapper):
    """Fails to read some objects, as a bad sector or another user's file does."""

    bad = ()

    def _do(self, op, name, call, *, mutates=True):
        if op.startswith("read") and name in self.bad:
            raise StorageError(f"{name}: Input/output error")
        return call()

    def read_into(self, name, offset, buffers):
        return self._do("read", name, lambda: self.inner.read_into(name, offset, buffers))


@pytest.mark.parametrize("kind", ["packs/", "manifests/", "refs/other/"])
def test_another_runs_unreadable_file_does_not_keep_a_new_run_from_being_saved(kind):
    backend = Unreadable(MemoryBackend())
    w = weights(300_000)
    fresh_store = open_store(backend, create=True)
    Run(fresh_store, "other").save({"w": w}, step=0)
    backend.bad = set(backend.names(kind))
    assert backend.bad
    state = {"w": trained(w)}
    fresh(backend, "new").save(state, step=0)
    backend.bad = ()
    assert same(fresh(backend, "new").load(), state)


def test_a_base_that_cannot_be_read_does_not_keep_the_next_step_from_being_saved():
    backend = Unreadable(MemoryBackend())
    open_store(backend, create=True)
    w = weights(1_000_000)
    run = fresh(backend, shadow=0)
    run.save({"w": w}, step=0)
    backend.bad = set(backend.names("packs/"))
    state = {"w": trained(w)}
    run.save(state, step=1)
    assert same(fresh(backend).load(1), state)


def test_a_source_that_moves_between_two_looks_is_no_source(backend):
    """As memory of a device may: what is copied again must be what was saved."""
    wide = weights(600_000).astype(np.float64)
    narrow = wide.astype(np.float32)
    taken = []

    def take():
        taken.append(1)
        return (wide + (len(taken) > 1)).view(np.uint8)

    n = len(wide)
    tensors = [
        Deferred("wide", "float64", (n,), "numpy", take),
        Tensor("narrow", "float32", (n,), "numpy", narrow.view(np.uint8)),
    ]
    store = open_store(backend)
    with Session(store, "main", 0) as session:
        saver = snapshot._Saver(session, Memory(), Shadow(0), snapshot._Clock())
        watch = Watch(["wide", "narrow"], [None, None], NONE, 1, step=0)
        found = looks(tensors, snapshot.order_of(tensors), Memory(), snapshot.reusable(session), watch)
        knowns = saver.all(tensors, found)
        session.publish(None)
        rows = session.rows()
    assert len(taken) == 2
    assert not rows["depth"].any()
    found = np.empty(narrow.nbytes, np.uint8)
    restore.fill(store, [(knowns[1].row, found)])
    assert found.tobytes() == narrow.tobytes()


def test_the_shadow_and_what_replaces_it_stay_within_the_bound(backend):
    """Copies of what had to be copied anyway are kept only where the old ones leave room."""
    run = fresh(backend, shadow=5_000_000)
    for step in range(3):
        strided = {str(i): np.repeat(weights(250_000, 10 * step + i), 2)[::2] for i in range(4)}
        held = run._turns.saver.shadow.size
        run.save(strided, step=step)
        assert held + run._turns.saver.shadow.size <= 5_000_000
