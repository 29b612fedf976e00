import errno

import pytest
from faults import CrashBackend, Cut, FailingBackend, HookedOs, contents, memory_of

from deltackpt.backends.local import LocalBackend
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import StorageError


def use(backend):
    """Six changes: a session, a pack in two writes, a barrier, a ref."""
    backend.create_once("sessions/1", b"here", flush=False)
    with backend.create("packs/1") as writer:
        writer.write(b"data")
        writer.commit()
    backend.barrier()
    backend.create_once("refs/main/1", b"commit")
    backend.delete("sessions/1")


ALL = {"packs/1": b"data", "refs/main/1": b"commit"}


def test_every_change_can_be_made_to_fail_and_the_disk_stays_gone():
    for nth in range(6):
        backend = FailingBackend(MemoryBackend(), nth, error=errno.ENOSPC)
        with pytest.raises(StorageError) as caught:
            use(backend)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(StorageError):
            backend.list("packs/")
    use(FailingBackend(MemoryBackend(), 6))


def test_a_single_failure_passes():
    backend = FailingBackend(MemoryBackend(), 0, once=True)
    with pytest.raises(StorageError):
        use(backend)
    use(backend)
    assert contents(backend) == ALL


def test_a_lost_answer_leaves_the_change():
    backend = FailingBackend(MemoryBackend(), 2, landed=True)
    with pytest.raises(StorageError):
        use(backend)
    assert "packs/1" in contents(backend.inner)


def test_a_cut_lets_exactly_n_changes_through_and_kills_for_good():
    for nth, n_objects in enumerate([0, 1, 1, 2, 2, 3]):
        backend = CrashBackend(MemoryBackend())
        backend.run_to(nth)
        with pytest.raises(Cut):
            use(backend)
        assert len(contents(backend.inner)) == n_objects
        with pytest.raises(Cut):
            backend.exists("packs/1")
    backend = CrashBackend(MemoryBackend())
    backend.run_to(6)
    use(backend)
    assert contents(backend) == ALL


def states(backend, **kwargs):
    return [contents(state) for state in backend.crash_states(**kwargs)]


def test_after_a_barrier_a_flushed_object_survives_every_crash():
    backend = CrashBackend(memory_of({"old": b"o"}))
    backend.create_once("packs/1", b"data")
    assert states(backend) == [{"old": b"o", "packs/1": b"data"}, {"old": b"o"}]
    backend.barrier()
    assert states(backend) == [{"old": b"o", "packs/1": b"data"}]


def test_a_barrier_for_one_directory_leaves_the_others_at_risk():
    backend = CrashBackend(MemoryBackend())
    backend.create_once("packs/1", b"p")
    backend.create_once("refs/a b/1", b"r")
    backend.barrier("packs")
    assert states(backend) == [{"packs/1": b"p", "refs/a b/1": b"r"}, {"packs/1": b"p"}]
    backend.barrier("refs/a b")
    assert states(backend) == [{"packs/1": b"p", "refs/a b/1": b"r"}]


def test_an_unflushed_object_may_be_whole_torn_empty_or_gone_even_after_a_barrier():
    backend = CrashBackend(MemoryBackend())
    backend.create_once("sessions/1", b"here", flush=False)
    backend.barrier()
    found = states(backend)
    for state in ({}, {"sessions/1": b"here"}, {"sessions/1": b""}, {"sessions/1": b"he"}):
        assert state in found


def test_a_delete_may_come_back_until_its_directory_is_flushed():
    backend = CrashBackend(memory_of({"packs/1": b"data"}))
    backend.delete("packs/1")
    backend.barrier()
    assert states(backend) == [{}, {"packs/1": b"data"}]
    backend.create_once("packs/2", b"more")
    backend.barrier()
    assert states(backend) == [{"packs/2": b"more"}]


def test_pending_changes_are_lost_alone_and_survive_alone():
    backend = CrashBackend(MemoryBackend())
    for name in "abc":
        backend.create_once(name, b"")
    found = {"".join(sorted(state)) for state in states(backend)}
    assert found == {"abc", "", "ab", "ac", "bc", "a", "b", "c"}
    assert len(states(backend, limit=3)) == 3
    assert states(backend, seed=1) == states(backend, seed=1)


def test_hooked_calls_are_counted_and_can_fail(tmp_path):
    def no_links(call, *args):
        if call == "link":
            raise OSError(errno.EIO, "no")

    calls = HookedOs(no_links)
    backend = LocalBackend(tmp_path, calls=calls)
    backend.make_dirs(["tmp"])
    with pytest.raises(StorageError, match="publish"):
        backend.create_once("a", b"")
    assert calls.n_calls["fsync"] == 1


def test_hooked_calls_can_be_torn_and_waited_with(tmp_path):
    told = []

    def hook(call, *args):
        told.append(call)  # where a test may wait, or kill the process
        return 3 if call in ("writev", "preadv") else None

    backend = LocalBackend(tmp_path, calls=HookedOs(hook))
    backend.make_dirs(["tmp"])
    with backend.create("a") as writer:
        writer.write(b"ab", b"cdef", b"g")
        writer.commit()
    assert backend.read("a") == b"abcdefg"
    assert told.count("writev") == told.count("preadv") == 3
