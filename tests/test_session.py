"""What a save leaves, what it costs in flushes, and the order in which it writes."""

import numpy as np
import pytest
from blake3 import blake3
from faults import HookedOs, Wrapper
from plain import same, weights

import deltackpt.session
from deltackpt import AlreadyExistsError, ConflictError, StorageError, gc, open_run, open_store
from deltackpt.backends.local import LocalBackend
from deltackpt.backends.memory import MemoryBackend
from deltackpt.codecs import Kind
from deltackpt.records import Fence, Figures
from deltackpt.run import Run
from deltackpt.session import Session


class Recorder(Wrapper):
    """Notes every change, in order."""

    def __init__(self, inner):
        super().__init__(inner)
        self.log = []

    def _do(self, op, name, call, *, mutates=True):
        answer = call()
        if mutates:
            self.log.append((op, name.split("/")[0].split("\0")[0]))
        return answer


def run_on(backend):
    open_store(backend, create=True)
    return Run(open_store(backend), "main")


@pytest.fixture
def local(tmp_path):
    return LocalBackend(tmp_path / "store", calls=HookedOs())


def files(backend):
    dirs = ("packs", "index", "manifests", "sessions", "refs/main", "gc", "quarantine", "tmp")
    return {entry.name for name in dirs for entry in backend.list(f"{name}/")}


def fsyncs(backend, save):
    before = backend._os.n_calls["fsync"]
    save()
    return backend._os.n_calls["fsync"] - before


def test_a_save_smaller_than_a_pack_leaves_four_files_and_costs_at_most_eight_flushes(local):
    run = run_on(local)
    state = {"w": weights(300_000)}
    assert fsyncs(local, lambda: run.save(state, step=1)) <= 8
    assert sorted(name.split("/")[0] for name in files(local)) == ["index", "manifests", "packs", "refs"]
    state["w"][0] += 1
    assert fsyncs(local, lambda: run.save(state, step=2)) <= 8
    assert len(files(local)) == 8


def test_a_save_in_a_new_process_costs_at_most_nine_flushes(tmp_path):
    run_on(LocalBackend(tmp_path / "store")).save({"w": weights(1000)}, step=1)
    again = LocalBackend(tmp_path / "store", calls=HookedOs())
    assert fsyncs(again, lambda: open_run(again).save({"w": weights(2000)}, step=2)) <= 9


def test_chunks_of_ever_larger_sizes_need_no_memory_of_their_own_each(monkeypatch):
    monkeypatch.setattr(deltackpt.session, "_WINDOW_SIZE", 4096)
    monkeypatch.setattr(deltackpt.session, "_BATCH_SIZE", 1024)
    monkeypatch.setattr(deltackpt.packer, "_WRITE_SIZE", 1024)
    with Session(open_store(MemoryBackend(), create=True), "main", 1) as session:
        for size in range(1024, 2024):
            session.put(size.to_bytes(32, "big"), np.zeros(size, np.uint8), Kind(1, False))
        free_size = sum(buffer.size for buffers in session._buffers.values() for buffer in buffers)
    assert free_size < 50_000 < session.new_size


def test_a_save_in_which_nothing_changed_writes_no_pack_and_costs_four_flushes(local):
    run = run_on(local)
    state = {"w": weights(300_000)}
    run.save(state, step=1)
    before = files(local)
    assert fsyncs(local, lambda: run.save(state, step=2)) == 4
    assert sorted(name.split("/")[0] for name in files(local) - before) == ["manifests", "refs"]


def test_packs_are_durable_before_the_index_and_all_before_the_decision():
    backend = Recorder(MemoryBackend())
    run = run_on(backend)
    run.store.prepare_to_write()
    backend.log.clear()
    run.save({"w": weights(1000)}, step=1)
    log = [(op, name) for op, name in backend.log if op != "write"]
    assert log == [
        ("create_once", "sessions"),
        ("commit", "packs"),
        ("barrier", "packs"),
        ("create_once", "index"),
        ("create_once", "manifests"),
        ("barrier", "manifests"),
        ("create_once", "refs"),
        ("barrier", "refs"),
        ("delete", "sessions"),
    ]


def test_packs_roll_over_and_are_found_again(monkeypatch):
    monkeypatch.setattr(deltackpt.packer, "PACK_SIZE", 100_000)
    backend = MemoryBackend()
    state = {f"w{i}": weights(20_000, seed=i) for i in range(10)}
    run_on(backend).save(state, step=1)
    assert len(backend.list("packs/")) > 3
    assert same(run_on(backend).load(1), state)


def test_a_fenced_session_cannot_commit_and_the_step_can_be_saved_again():
    backend = MemoryBackend()
    run = run_on(backend)
    with Session(run.store, "main", 1) as session:
        run.store.refs.decide(Fence(session.slot, session.sid))
        with pytest.raises(ConflictError, match="gave this save up"):
            session.commit(b"", parent=None, metrics={}, metadata={}, figures=Figures())
    run.save({"x": 1}, step=1)
    assert run.load(1) == {"x": 1}


def test_a_step_there_is_refused_and_superseded_only_on_purpose():
    run = run_on(MemoryBackend())
    run.save({"x": 1}, step=1)
    with pytest.raises(AlreadyExistsError, match="step 1 already"):
        run.save({"x": 2}, step=1)
    run.save({"x": 2}, step=1, overwrite=True)
    assert run.load(1) == {"x": 2}
    assert run.steps() == [1]


def test_an_aborted_session_leaves_no_record_and_nothing_half_written(local):
    run = run_on(local)
    before = files(local)
    with Session(run.store, "main", 1) as session:
        session.put(b"i" * 32, weights(1000).view("u1"), deltackpt.codecs.Kind(4, True))
        session.publish(None)
    left = {name.split("/")[0] for name in files(local) - before}
    assert "sessions" not in left
    assert "tmp" not in left


def test_a_write_error_is_met_by_saving_all_of_it_once_more():
    class Once(Wrapper):
        failed = False

        def _do(self, op, name, call, *, mutates=True):
            if op == "write" and not self.failed:
                self.failed = True
                raise StorageError("failed on purpose", errno=5)
            return call()

    backend = Once(MemoryBackend())
    run = run_on(backend)
    state = {"w": weights(100_000)}
    run.save(state, step=1)
    assert backend.failed
    assert same(run.load(1), state)
    assert len(backend.list("packs/")) == 1


# -- several ranks


def rank(backend, numbers, step=1):
    """Put one chunk as a rank does, unless it is there, and hand it over."""
    session = Session(open_store(backend), "main", step)
    data = np.full(1000, numbers, np.uint8)
    chunk_id = blake3(data).digest()
    if session.look_up(np.frombuffer(chunk_id, np.uint8)[None]) == [None]:
        session.put(chunk_id, data, Kind(1, False))
    session.publish(None)
    return session.hand_over()


def decided(backend, parts, step=1):
    with Session(open_store(backend), "main", step) as session:
        session.publish(b"manifest", parts)
        session.commit(b"manifest", parent=None, metrics={}, metadata={}, figures=Figures())


def test_one_session_decides_for_all_of_its_slot_and_their_records_go():
    backend = MemoryBackend()
    open_store(backend, create=True)
    parts = [rank(backend, n) for n in range(3)]
    assert len(backend.list("sessions/")) == len(backend.list("packs/")) == len(backend.list("index/")) == 3
    assert not backend.list("refs/main/")
    decided(backend, parts)
    assert not backend.list("sessions/")
    assert open_run(backend).steps() == [1]


def test_gc_waits_for_every_rank_and_keeps_what_all_of_them_wrote_or_use():
    backend = MemoryBackend()
    open_store(backend, create=True)
    run = open_run(backend)
    run.save({"old": np.full(1000, 7, np.uint8)}, step=0)
    part = rank(backend, 7)  # finds what step 0 has
    assert not part.packs
    run.forget([0])
    assert gc.collect(backend).waiting_for
    other = rank(backend, 8)
    assert len(gc.collect(backend).waiting_for) == 1  # the second knows what is condemned
    assert len(backend.list("packs/")) == 2
    # Whoever is found dead ends it for all.
    assert gc.collect(backend, patience_s=-1).fenced == ["run main step 1"]
    with pytest.raises(ConflictError):
        decided(backend, [part, other])
    assert open_run(backend).steps() == []


def test_parts_of_another_attempt_or_whose_packs_are_gone_are_refused():
    backend = MemoryBackend()
    open_store(backend, create=True)
    early = rank(backend, 1)
    open_store(backend).refs.decide(Fence(early.name.slot, early.name.sid))
    late = rank(backend, 2)
    with pytest.raises(ConflictError, match="gave this save up"):
        decided(backend, [early, late])
    with pytest.raises(ConflictError, match="given up"):
        decided(backend, [late])  # whoever failed to decide has given it up
    last = rank(backend, 3)
    [(pack, _)] = last.packs
    backend.delete(pack.key)
    with pytest.raises(StorageError, match="has None bytes"):
        decided(backend, [last])
    assert open_run(backend).steps() == []
