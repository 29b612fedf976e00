"""What a gc does when something fails, or somebody else acts, in the middle of it."""

import errno
import json
import logging
import subprocess
import sys

import pytest
from deltas import nearly, taken
from faults import Wrapper, contents, memory_of
from steps import assert_steps, collect, floats, noise, opened, visible

from deltackpt import gc
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import CorruptError, NotFoundError, StorageError
from deltackpt.format import seal
from deltackpt.records import GcRecord, SessionName, Slot
from deltackpt.repair import repair

KEPT = {2: {"kept": noise(1, 50_000)}}


class Hooked(Wrapper):
    """Calls `hook(op, name)` before each call; it may act, or raise in its place."""

    def __init__(self, inner, hook):
        super().__init__(inner)
        self.hook = hook

    def _do(self, op, name, call, *, mutates=True):
        self.hook(op, name)
        return call()


def half_used():
    """A store of one pack, half of it in use."""
    backend = MemoryBackend()
    run = opened(backend)
    run.save(KEPT[2] | {"waste": noise(2, 50_000)}, step=1)
    run.save(KEPT[2], step=2)
    run.forget([1])
    return backend


def once(act, op, prefix):
    """A hook that acts at the first such call; it may call the same backend again."""
    left = [act]

    def hook(at, name):
        if left and at == op and name.startswith(prefix):
            left.pop()()

    return hook


def record_read(backend):
    """The one record in use is read by gc only to be copied."""
    return next(name for name in contents(backend) if name.startswith("packs/"))


def test_a_gc_whose_pack_another_one_rewrote_meanwhile_looks_again():
    backend = half_used()
    other = once(lambda: collect(backend), "read", record_read(backend))
    result = collect(Hooked(backend, other))
    assert result.n_repacked == 0
    assert_steps(visible(backend), KEPT)
    assert len(backend.names("packs/")) == 1
    assert collect(backend).n_deleted == 0


def test_a_pack_that_is_listed_and_cannot_be_found_stops_gc():
    backend = half_used()

    def lost():
        raise NotFoundError("no such object")

    with pytest.raises(NotFoundError):
        collect(Hooked(backend, once(lost, "read", record_read(backend))))
    assert_steps(visible(backend), KEPT)
    assert collect(backend).n_repacked == 1


def test_without_room_for_copies_what_is_dead_goes_and_the_rest_is_told(caplog):
    backend = half_used()
    opened(backend, "other").save({"x": noise(3, 1000)}, step=1)
    opened(backend, "other").forget([1])

    def full(op, name):
        if op == "commit" and name.startswith("packs/"):
            raise StorageError(f"{name}: no room", errno=errno.ENOSPC)

    result = collect(Hooked(backend, full))
    assert (result.n_dead, result.n_repacked) == (1, 0)
    assert result.freed_size > 1000
    assert "what is half in use stays as it is" in caplog.text
    assert_steps(visible(backend), KEPT)


def test_without_room_for_a_merged_index_gc_is_done_all_the_same(monkeypatch, caplog):
    monkeypatch.setattr(gc, "N_FILES_MAX", 2)
    backend = MemoryBackend()
    states = {step: {"w": noise(step, 1000)} for step in range(4)}
    for step, state in states.items():
        opened(backend).save(state, step=step)

    def full(op, name):
        if op == "create_once" and name.startswith("index/"):
            raise StorageError(f"{name}: no room", errno=errno.ENOSPC)

    collect(Hooked(backend, full))
    assert "index files stay as they are" in caplog.text
    assert len(backend.names("index/")) == 4
    collect(backend)
    assert len(backend.names("index/")) == 1
    assert_steps(visible(backend), states)


@pytest.mark.parametrize("prefix", ["index/", "packs/", "gc/", "refs/main"])
def test_a_failing_disk_ends_gc_and_costs_nothing(prefix):
    backend = half_used()
    backend.create_once(SessionName(bytes(16), 0, Slot("main", 9, 1)).key, b"?", flush=False)

    def fails(op, name):
        if op in ("create_once", "commit") and name.startswith(prefix):
            raise StorageError(f"{name}: failed on purpose", errno=errno.EIO)

    with pytest.raises(StorageError, match="on purpose"):
        collect(Hooked(backend, fails))
    assert_steps(visible(backend), KEPT)
    assert collect(backend).n_repacked + len(backend.names("packs/")) >= 1
    assert_steps(visible(backend), KEPT)


def test_an_attempt_whose_writer_died_before_its_tombstone_is_forgotten():
    backend = MemoryBackend()
    opened(backend).save({"w": noise(1, 5000)}, step=2)
    opened(backend).save(KEPT[2], step=2, overwrite=True)
    backend.delete("refs/main/2.1.gone")
    assert collect(backend).n_deleted
    assert backend.exists("refs/main/2.1.gone")
    assert len(backend.names("packs/")) == 1
    assert_steps(visible(backend), KEPT)


def ended_process():
    """Who a process was that has ended."""
    script = "import json; from deltackpt import process; print(json.dumps(process.identity()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_writer_known_to_be_dead_is_given_up_at_once_and_one_that_is_not_is_waited_for():
    backend = half_used()
    dead, other = (SessionName(bytes([n] * 16), 0, Slot("main", 7 + n, 1)) for n in (0, 1))
    backend.create_once(dead.key, seal(ended_process()), flush=False)
    backend.create_once(other.key, seal({"pid": 1, "host": "elsewhere"}), flush=False)
    result = gc.collect(backend)
    assert result.fenced == ["run main step 7"]
    assert result.waiting_for == ["run main step 8 (process 1 on elsewhere)"]
    backend.delete(other.key)
    assert gc.collect(backend).n_deleted
    assert_steps(visible(backend), KEPT)


def test_a_writer_that_ends_while_gc_looks_at_it_stops_nothing():
    backend = half_used()
    name = SessionName(bytes(16), 0, Slot("main", 7, 1))
    backend.create_once(name.key, seal({}), flush=False)
    hook = once(lambda: backend.delete(name.key), "read", name.key)
    result = gc.collect(Hooked(backend, hook))
    assert not result.fenced
    assert result.n_repacked == 1


def test_a_writer_of_which_nothing_is_known_any_more_is_waited_for_by_its_step():
    backend = half_used()
    name = SessionName(bytes(16), 0, Slot("main", 7, 1))
    backend.create_once(name.key, seal({}), flush=False)
    n_reads = []

    def hook(op, at):
        if (op, at) == ("read", name.key):
            n_reads.append(at)
            if len(n_reads) == 3:  # twice to see whether it is dead, then to name it
                raise NotFoundError("ended")

    result = gc.collect(Hooked(backend, hook))
    assert result.waiting_for == ["run main step 7 (process ? on an unknown host)"]


def test_lost_decisions_are_missed_by_the_newest_record_that_counts_them():
    backend = half_used()
    opened(backend).save({"w": noise(3, 1000)}, step=3)
    opened(backend).forget([3])
    collect(backend)
    whole = contents(backend)
    last = max(int(name.rpartition("-")[2]) for name in whole if name.startswith("gc/"))
    for kind in ("condemn", "sweep"):  # as a repair makes up for one that is lost
        record = GcRecord(kind, last + 1, frozenset(), 0, 0)
        whole[record.key] = record.to_bytes()
    del whole["refs/main/3.1"], whole["refs/main/3.1.gone"]
    with pytest.raises(StorageError, match="lists 2 decisions, 3 were there at the last gc"):
        collect(memory_of(whole))
    collect(memory_of(whole), force=True)


def test_chunks_that_only_condemned_packs_have_stop_gc():
    backend = half_used()
    [key] = backend.names("packs/")
    record = GcRecord("condemn", 0, frozenset([gc.PackName.from_key(key)]), 2, 1)
    swept = GcRecord("sweep", 0, frozenset(), 2, 1)
    backend.create_once(record.key, record.to_bytes())
    broken = memory_of(contents(backend) | {swept.key: swept.to_bytes()})
    # Swept and spared: in use again.
    collect(broken)
    assert_steps(visible(broken), KEPT)
    # Not swept: the one who finishes it spares what steps need.
    collect(backend)
    assert_steps(visible(backend), KEPT)


def test_a_damaged_copy_that_is_to_stay_is_told(caplog):
    backend = half_used()
    opened(backend).save({"more": noise(5, 1000)}, step=3)
    caplog.set_level(logging.WARNING)
    [key] = [name for name in backend.names("packs/") if backend.size(name) > 50_000]
    at = backend.read(key).index(KEPT[2]["kept"].tobytes()[:64])
    data = bytearray(backend.read(key))
    data[at] ^= 1
    spoilt = memory_of(contents(backend) | {key: bytes(data)})
    with pytest.raises(CorruptError, match="checksum"):
        collect(spoilt)  # it would copy what is damaged
    assert spoilt.names("packs/") == backend.names("packs/")
    repair(spoilt)
    assert spoilt.exists(key)


@pytest.mark.parametrize("what", ["rewritten", "stored whole", "merged"])
def test_the_index_of_what_gc_wrote_is_durable_before_anything_is_condemned_or_deleted(monkeypatch, what):
    taken(monkeypatch)
    if what == "rewritten":
        backend = half_used()
    else:
        backend, array = MemoryBackend(), floats(1, 3000)
        for step in range(9):
            opened(backend).save({"w": array}, step=step)
            array = nearly(array, step)
        if what == "stored whole":
            opened(backend).forget(range(8))
        else:
            monkeypatch.setattr(gc, "N_FILES_MAX", 2)
    calls = []
    collect(Hooked(backend, lambda op, name: calls.append((op, name))))
    at = next(i for i, (op, name) in enumerate(calls) if op == "create_once" and name.startswith("index/"))
    after = calls[at:]
    builds_on_it = [
        i
        for i, (op, name) in enumerate(after)
        if (op == "delete" and name.startswith(("index/", "packs/")))
        or (op == "create_once" and name.startswith("gc/"))
    ]
    assert after.index(("barrier", "index")) < builds_on_it[0]


def test_on_a_full_disk_the_largest_of_what_is_dead_goes_first(monkeypatch):
    monkeypatch.setattr(gc, "_N_DEAD_TIGHT", 1)
    backend = half_used()
    for step, size in ((1, 1000), (2, 3000), (3, 2000)):
        opened(backend, "other").save({"x": noise(9 + step, size)}, step=step)
    opened(backend, "other").forget([1, 2, 3])
    condemned = []

    def full(op, name):
        if op == "commit" and name.startswith("packs/"):
            raise StorageError(f"{name}: no room", errno=errno.ENOSPC)
        if op == "delete" and name.startswith("packs/"):
            condemned.append(backend.size(name))

    result = collect(Hooked(backend, full))
    assert result.n_dead == 3
    assert condemned == sorted(condemned, reverse=True)
