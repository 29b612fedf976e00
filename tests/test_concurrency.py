"""Writers, readers and gcs at once: in threads, in processes, and in the orders that once lost something."""

import errno
import json
import os
import socket
import threading
import time
import traceback

import pytest
from deltas import nearly, taken
from faults import CrashBackend, Cut, Wrapper, contents
from steps import assert_steps, collect, floats, noise, opened, same, visible

from deltackpt import gc, packer, snapshot
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import AlreadyExistsError, ConflictError, StorageError
from deltackpt.manifest import Manifest
from deltackpt.memory import Memory
from deltackpt.records import GC_RUN, Figures
from deltackpt.refs import Refs
from deltackpt.session import Session
from deltackpt.shadow import Shadow
from deltackpt.store import open_store
from deltackpt.verify import verify

SOAK_S = 3.0


def state(step, run=0):
    return {
        "shared": noise(1, 5000),
        "by step": noise(step % 7, 3000),
        "own": floats(1000 * run + step, 300),
        "weights": nearly(floats(run, 400), step),
        "step": step,
        "run": run,
    }


def packs(backend):
    return {name: len(data) for name, data in contents(backend).items() if name.startswith("packs/")}


def indexes(backend):
    return [name for name in contents(backend) if name.startswith("index/")]


def commit(writer, whole):
    """End a session as a run does, with a state."""
    saved = snapshot.save(writer, whole, lambda _: Memory(), Shadow(0))
    return decide(writer, saved.manifest)


def decide(writer, manifest: Manifest):
    data = manifest.to_bytes()
    writer.publish(data)
    return writer.commit(data, parent=None, metrics={}, metadata={}, figures=Figures())


# -- at once


def told(work, i):
    """What `work(i)` gives back, or how it failed, as text."""
    try:
        return json.dumps(work(i))
    except BaseException:
        return traceback.format_exc()


def in_threads(work, n):
    """Run `work(i)` in n threads that start together; return what each gave back."""
    start = threading.Barrier(n)
    results = [""] * n

    def one(i):
        start.wait()
        results[i] = told(work, i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return understood(results)


def understood(texts):
    failed = [text for text in texts if text.startswith("Traceback")]
    assert not failed, "\n".join(failed)
    return [json.loads(text) for text in texts]


def in_processes(work, n):
    """Run `work(i)` in n forked processes; return what each gave back."""
    pipes = []
    for i in range(n):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(write, told(work, i).encode()[:60_000])
            os._exit(0)
        os.close(write)
        pipes.append((pid, read))
    texts = []
    for pid, read in pipes:
        with os.fdopen(read) as file:
            texts.append(file.read())
        os.waitpid(pid, 0)
    return understood(texts)


@pytest.mark.parametrize("at_once", [in_threads, in_processes])
def test_of_many_writers_of_one_step_one_is_acknowledged_and_its_state_is_there(tmp_path, at_once):
    opened(tmp_path)
    for step in range(5):

        def work(i, step=step):
            try:
                opened(tmp_path).save(state(step, run=i), step=step)
            except (AlreadyExistsError, ConflictError):
                return "no"
            return "yes"

        answers = at_once(work, 4)
        assert sorted(answers) == ["no", "no", "no", "yes"]
        assert same(opened(tmp_path).load(step), state(step, run=answers.index("yes")))


@pytest.mark.parametrize("at_once", [in_threads, in_processes])
def test_a_store_made_by_many_at_once_is_one_store(tmp_path, at_once):
    for i in range(5):
        uuids = at_once(lambda _, i=i: open_store(tmp_path / str(i), create=True).uuid.hex(), 4)
        assert len(set(uuids)) == 1, uuids


def soak_writer(path, i, until):
    """Save, load and forget in a run of its own; the acknowledged steps that it did not forget."""
    run = opened(path, f"run{i}")
    kept = []
    step = 0
    while time.monotonic() < until:
        step += 1
        try:
            run.save(state(step, run=i), step=step)
        except ConflictError:  # a gc without patience
            continue
        kept.append(step)
        assert same(run.load(kept[step % len(kept)]), state(kept[step % len(kept)], run=i))
        if step % 5 == 0:
            run.forget(kept[:-3])
            kept = kept[-3:]
        if step % 17 == 0:
            run = opened(path, f"run{i}")
    return kept


def soak_gc(path, until, **kwargs):
    n = 0
    while time.monotonic() < until:
        n += gc.collect(path, **kwargs).n_deleted
    return n


@pytest.mark.parametrize("patience_s", [3600, 0])
def test_no_committed_step_is_lost_while_threads_write_and_two_collect(monkeypatch, tmp_path, patience_s):
    """Of one process; tests/soak.py is about many."""
    taken(monkeypatch)
    opened(tmp_path)
    until = time.monotonic() + SOAK_S

    def work(i):
        if i < 3:
            return soak_writer(tmp_path, i, until)
        return soak_gc(tmp_path, until, patience_s=patience_s)

    *kept, n_first, n_second = in_threads(work, 5)
    assert n_first + n_second > 0
    for i in range(3):
        assert_steps(visible(tmp_path, f"run{i}"), {step: state(step, run=i) for step in kept[i]})
    assert verify(tmp_path, level="decode").clean


# -- fences


def test_a_writer_given_up_for_dead_is_told_and_saves_again():
    backend = MemoryBackend()
    opened(backend).save(state(1), step=1)
    run = opened(backend)
    with Session(run.store, "main", 2) as writer:
        saved = snapshot.save(writer, state(2), lambda _: Memory(), Shadow(0))
        assert collect(backend).fenced == ["run main step 2"]
        with pytest.raises(ConflictError, match="gave this save up"):
            decide(writer, saved.manifest)
    assert_steps(visible(backend), {1: state(1)})
    run.save(state(2), step=2)
    collect(backend)
    assert_steps(visible(backend), {1: state(1), 2: state(2)})


@pytest.mark.parametrize("times", [1, 2])
def test_a_writer_whose_files_a_gc_without_patience_takes_saves_again_or_is_told(
    tmp_path, monkeypatch, times
):
    run = opened(tmp_path)
    run.save(state(1), step=1)
    close = packer._Pack.close
    taken_away = []

    def fenced(self, *arguments):
        if len(taken_away) < times:
            taken_away.append(gc.collect(tmp_path, patience_s=-1).fenced)  # with what it has in tmp/
        return close(self, *arguments)

    monkeypatch.setattr(packer._Pack, "close", fenced)
    if times == 1:
        run.save(state(2), step=2)
        assert_steps(visible(tmp_path), {1: state(1), 2: state(2)})
    else:
        with pytest.raises(ConflictError, match="gc gave this save up for dead"):
            run.save(state(2), step=2)
        assert_steps(visible(tmp_path), {1: state(1)})
    assert taken_away == [["run main step 2"]] * times


def test_a_writer_with_a_live_process_is_waited_for_and_keeps_what_it_found():
    backend = MemoryBackend()
    opened(backend).save(state(1), step=1)
    store = open_store(backend)
    with Session(store, "main", 2) as writer:
        saved = snapshot.save(writer, state(1), lambda _: Memory(), Shadow(0))  # all of it is there
        opened(backend).forget([1])
        before = packs(backend)
        assert len(gc.collect(backend).waiting_for) == 1
        assert packs(backend) == before
        decide(writer, saved.manifest)
    assert gc.collect(backend).waiting_for == []
    assert_steps(visible(backend), {2: state(1)})


def test_gc_says_whom_it_waits_for():
    backend = MemoryBackend()
    run = opened(backend)
    for step in (1, 2):
        run.save(state(step), step=step)
    with Session(run.store, "main", 3):
        run.forget([1])
        waiting_for = gc.collect(backend).waiting_for
    assert waiting_for == [f"run main step 3 (process {os.getpid()} on {socket.gethostname()})"]


def test_a_gc_given_up_for_dead_while_it_repacks_loses_nothing(monkeypatch):
    backend = wasteful_store()
    publish = Session.publish

    def fenced_first(self, manifest):
        publish(self, manifest)
        if self.slot.run == GC_RUN:
            monkeypatch.setattr(Session, "publish", publish)
            assert collect(backend).fenced == ["gc"]

    monkeypatch.setattr(Session, "publish", fenced_first)
    collect(backend)
    assert same(opened(backend).load(2), {"kept": noise(1, 5000)})
    collect(backend)
    assert same(opened(backend).load(2), {"kept": noise(1, 5000)})


def test_a_writer_that_gives_up_does_not_take_a_copy_away_that_gc_relies_on(monkeypatch):
    """The order in which model_gc.py loses a step when writers delete the packs they have closed."""
    backend = MemoryBackend()
    whole = {"a": noise(1, 3000)}
    opened(backend).save(whole, step=1)
    first = Session(open_store(backend), "main", 2)
    saved = snapshot.save(first, whole, lambda _: Memory(), Shadow(0))  # found in the pack of step 1
    opened(backend).forget([1])
    assert gc.collect(backend).waiting_for  # condemned
    late = Session(open_store(backend), "late", 1)
    snapshot.save(
        late, whole, lambda _: Memory(), Shadow(0)
    )  # may not use the condemned pack: writes its own
    monkeypatch.setattr(late, "_publish_index", lambda: late.abort())
    decide(first, saved.manifest)
    crash = CrashBackend(backend)
    for nth in range(20):
        crash.run_to(nth)
        with pytest.raises(Cut):
            gc.collect(crash)
        if "gc/sweep-0" in contents(backend):
            break
        crash = CrashBackend(backend)
    late.publish(None)  # closes its pack, and gives up
    collect(backend)
    assert_steps(visible(backend), {2: whole})


def test_an_overwrite_beside_a_gc_is_not_taken_for_the_attempt_it_replaces(monkeypatch):
    backend = MemoryBackend()
    opened(backend).save(state(1), step=1)
    listing = Refs.listing

    def overwritten_meanwhile(self, run):
        found = listing(self, run)
        monkeypatch.setattr(Refs, "listing", listing)
        opened(backend).save(state(2), step=1, overwrite=True)
        return found

    monkeypatch.setattr(Refs, "listing", overwritten_meanwhile)
    collect(backend)
    assert_steps(visible(backend), {1: state(2)})


# -- dedup


def test_runs_and_processes_share_what_they_have_in_common(tmp_path):
    opened(tmp_path, "a").save(state(1), step=1)
    assert in_processes(lambda i: opened(tmp_path, "b").save(state(1), step=5).n_new_chunks, 1) == [0]
    run = opened(tmp_path, "c")
    in_processes(lambda i: opened(tmp_path, "b").save({"new": noise(8, 4000)}, step=6).step, 1)
    assert run.save({"mine": noise(8, 4000)}, step=1).n_new_chunks == 0


def test_a_pack_deleted_by_hand_is_written_again_by_whoever_needs_it_next():
    backend = MemoryBackend()
    run = opened(backend)
    run.save(state(1), step=1)
    for name in packs(backend):
        backend.delete(name)
    remembered = run.save(state(1), step=2)
    assert remembered.new_size == opened(MemoryBackend()).save(state(1), step=1).new_size
    assert_steps(visible(backend), {1: state(1), 2: state(1)})


@pytest.mark.parametrize("n_gcs", [1, 2])
def test_a_run_kept_open_does_not_build_on_packs_that_another_process_collected(n_gcs):
    backend = MemoryBackend()
    run = opened(backend)
    run.save(state(1), step=1)
    opened(backend).forget([1])
    for _ in range(n_gcs):
        assert not collect(backend).waiting_for
    assert not packs(backend)
    run.save(state(1), step=2)
    assert_steps(visible(backend), {2: state(1)})


def test_a_run_kept_open_does_not_build_on_packs_condemned_in_an_unfinished_cycle():
    backend = MemoryBackend()
    run = opened(backend)
    run.save(state(1), step=1)
    (old,) = packs(backend)
    opened(backend).forget([1])
    with Session(open_store(backend), "other", 1):
        assert gc.collect(backend).waiting_for
        assert old in packs(backend)
        run.save(state(1), step=2)
    gc.collect(backend)
    assert old not in packs(backend)
    assert_steps(visible(backend), {2: state(1)})


def test_a_pack_that_a_sweep_spared_may_be_used_again():
    backend = MemoryBackend()
    opened(backend).save(state(1), step=1)
    (old,) = packs(backend)
    with Session(open_store(backend), "main", 2) as writer:
        saved = snapshot.save(writer, state(1), lambda _: Memory(), Shadow(0))
        opened(backend).forget([1])
        assert gc.collect(backend).waiting_for
        decide(writer, saved.manifest)
    gc.collect(backend)
    assert list(packs(backend)) == [old]
    assert opened(backend).save(state(1), step=3).n_new_chunks == 0


# -- gc's own work


def wasteful_store():
    backend = MemoryBackend()
    run = opened(backend)
    run.save({"kept": noise(1, 5000), "waste": noise(2, 5000)}, step=1)
    run.save({"kept": noise(1, 5000)}, step=2)
    run.forget([1])
    return backend


def test_a_pack_that_is_half_waste_is_rewritten_and_shrinks_to_what_is_used():
    backend = wasteful_store()
    ((old, old_size),) = packs(backend).items()
    fresh = MemoryBackend()
    opened(fresh).save({"kept": noise(1, 5000)}, step=1)
    ((_, fresh_size),) = packs(fresh).items()
    result = collect(backend)
    assert (result.n_repacked, result.freed_size >= old_size) == (1, True)
    ((new, new_size),) = packs(backend).items()
    assert new != old
    assert new_size == fresh_size < 0.6 * old_size
    assert same(opened(backend).load(2), {"kept": noise(1, 5000)})
    assert collect(backend).n_deleted == 0


class Full(Wrapper):
    """A disk with room only once what a dead writer left in tmp/ is gone."""

    def _do(self, op, name, call, *, mutates=True):
        if op in ("create_once", "commit") and self.inner.list("tmp/"):
            raise StorageError(f"{name}: no room", errno=errno.ENOSPC)
        return call()


def test_on_a_full_disk_gc_begins_with_what_dead_writers_left():
    backend = wasteful_store()
    backend.create_once(f"tmp/{'a' * 32}-0-0.pack.00c0ffee", b"left behind")
    assert collect(Full(backend)).n_repacked == 1
    assert same(opened(backend).load(2), {"kept": noise(1, 5000)})


def test_waste_below_a_tenth_is_left_alone():
    backend = MemoryBackend()
    run = opened(backend)
    run.save({"kept": noise(1, 9000), "waste": noise(2, 300)}, step=1)
    run.save({"kept": noise(1, 9000)}, step=2)
    run.forget([1])
    before = packs(backend)
    assert collect(backend).n_repacked == 0
    assert packs(backend) == before


def test_many_index_files_become_one_and_say_the_same(monkeypatch):
    monkeypatch.setattr(gc, "N_FILES_MAX", 4)
    backend = MemoryBackend()
    run = opened(backend)
    for step in range(4):
        run.save(state(step), step=step)
    collect(backend)
    assert len(indexes(backend)) == 4
    run.save(state(4), step=4)
    collect(backend)
    assert len(indexes(backend)) == 1
    for again in (run, opened(backend)):
        assert again.save(state(3), step=again.latest() + 1).n_new_chunks == 0
    assert same(run.load(2), state(2))


class Paused:
    """Does something else once, in the middle of a load: after the first chunk was read."""

    def __init__(self, store, meanwhile):
        self.read_copies, self.meanwhile = store.read_copies, meanwhile
        store.read_copies = self

    def __call__(self, *args):
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return self.read_copies(*args)


def test_a_load_goes_on_when_gc_rewrites_packs_and_index_under_it():
    backend = MemoryBackend()
    run = opened(backend)
    big = {str(i): noise(i, 3000) for i in range(8)}
    run.save({"x": noise(100, 9000)}, step=1)
    for step in range(2, 6):  # what is kept and what is not is mixed in each pack
        part = {k: v for k, v in big.items() if int(k) // 2 == step - 2}
        run.save({**part, "waste": noise(step + 50, 9000)}, step=step)
    run.save(big, step=9)
    reader = opened(backend)
    reader.store.refresh()

    def collected():
        opened(backend).forget([1, 2, 3, 4, 5])
        assert collect(backend).n_repacked == 4
        assert len(packs(backend)) == 1

    Paused(reader.store, collected)
    assert same(reader.load(9), big)
