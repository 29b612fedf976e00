import errno
import multiprocessing
import os
import resource
import stat
import threading
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from faults import Cut, HookedOs, contents

from deltackpt.backends import Backend, Entry
from deltackpt.backends import local as local_module
from deltackpt.backends.local import LocalBackend
from deltackpt.backends.memory import MemoryBackend
from deltackpt.backends.osshim import Os
from deltackpt.errors import CorruptError, InvalidInputError, NotFoundError, StorageError

DIRS = ["packs", "refs", "sessions", "tmp"]


def make_local(path, calls=None):
    backend = LocalBackend(path / "store", calls=calls)
    backend.make_dirs(DIRS)
    backend.barrier()
    return backend


@pytest.fixture(params=["local", "memory"])
def backend(request, tmp_path):
    made = make_local(tmp_path) if request.param == "local" else MemoryBackend()
    yield made
    made.close()


@pytest.fixture
def calls():
    return HookedOs()


@pytest.fixture
def local(tmp_path, calls):
    made = make_local(tmp_path, calls)
    calls.n_calls.clear()
    yield made
    made.close()


def failing(call, code, *, at=0):
    """A hook that fails the given call once, from the `at`-th on."""
    seen = iter(range(1000))

    def hook(name, *args):
        if name == call and next(seen) == at:
            raise OSError(code, os.strerror(code))

    return hook


def run_threads(n, work):
    """Call `work(i)` in `n` threads at once; the answers, in order."""
    answers = [None] * n
    start = threading.Barrier(n)

    def run(i):
        start.wait()
        answers[i] = work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


# -- what every backend does ---------------------------------------------------------------------------------


def test_a_backend_makes_nothing_before_it_is_told_to(tmp_path):
    backend = LocalBackend(tmp_path / "a/store")
    assert contents(backend) == {}
    assert not backend.exists("deltackpt.json")
    assert not list(tmp_path.iterdir())


def test_the_probe_passes_and_leaves_nothing(backend):
    backend.probe()
    assert contents(backend) == {}


def test_an_object_is_created_once_and_never_changes(backend):
    assert backend.create_once("refs/main/1", b"ours")
    assert not backend.create_once("refs/main/1", b"theirs")
    assert not backend.create_once("refs/main/1", b"theirs", flush=False)
    assert backend.read("refs/main/1") == b"ours"
    assert backend.list("tmp/") == []


def test_of_eight_threads_racing_for_a_name_one_wins_and_its_bytes_are_there(backend):
    for n in range(50):
        won = run_threads(8, lambda i, name=f"refs/r/{n}": backend.create_once(name, bytes([i])))
        assert won.count(True) == 1
        assert backend.read(f"refs/r/{n}") == bytes([won.index(True)])


def test_of_eight_threads_streaming_to_a_name_one_wins(backend):
    def stream(i):
        with backend.create("packs/1") as writer:
            writer.write(bytes([i]) * 1000)
            return writer.commit()

    won = run_threads(8, stream)
    assert won.count(True) == 1
    assert backend.read("packs/1") == bytes([won.index(True)]) * 1000


def test_a_writer_joins_its_buffers_and_shows_them_only_at_the_commit(backend):
    with backend.create("packs/1") as writer:
        writer.write(b"ab", b"", bytearray(b"cd"), memoryview(b"ef"))
        writer.write()
        writer.write(np.arange(3, dtype="<u2").reshape(3, 1), np.empty((0, 4)))
        assert not backend.exists("packs/1")
        assert writer.commit()
    assert backend.read("packs/1") == b"abcdef\x00\x00\x01\x00\x02\x00"


def test_a_write_of_more_buffers_than_the_system_takes_at_once_is_whole(backend):
    parts = [bytes([i % 251]) * (i % 7) for i in range(5000)]
    with backend.create("packs/1") as writer:
        writer.write(*parts)
        writer.commit()
    assert backend.read("packs/1") == b"".join(parts)
    back = [bytearray(len(part)) for part in parts]
    backend.read_into("packs/1", 0, back)
    assert back == parts


def test_a_writer_that_does_not_commit_leaves_nothing(backend):
    with backend.create("packs/1") as writer:
        writer.write(b"data")
    with backend.create("packs/1") as writer:
        writer.write(b"data")
        writer.abort()
    with suppress(KeyError), backend.create("packs/1") as writer:
        writer.write(b"data")
        raise KeyError
    assert contents(backend) == {}


def test_a_writer_is_of_no_use_after_its_end(backend):
    for end in ("commit", "abort"):
        with backend.create(f"packs/{end}") as writer:
            getattr(writer, end)()
            with pytest.raises(InvalidInputError, match="closed"):
                writer.write(b"more")
            with pytest.raises(InvalidInputError, match="closed"):
                writer.commit()


def test_a_commit_under_a_taken_name_says_so_and_leaves_nothing(backend):
    backend.create_once("packs/1", b"first")
    with backend.create("packs/1") as writer:
        writer.write(b"second")
        assert not writer.commit()
    assert contents(backend) == {"packs/1": b"first"}


def test_a_range_can_be_read(backend):
    backend.create_once("packs/1", b"0123456789")
    assert backend.read("packs/1", 3) == b"3456789"
    assert backend.read("packs/1", 3, 4) == b"3456"
    assert backend.read("packs/1", 10) == b""
    assert backend.read("packs/1", 0, 0) == b""


def test_buffers_are_filled_one_after_the_other(backend):
    backend.create_once("packs/1", b"0123456789")
    a, b, c = bytearray(2), np.zeros(4, np.uint8), bytearray(0)
    backend.read_into("packs/1", 1, [a, c, b])
    assert (a, b.tobytes()) == (b"12", b"3456")


@pytest.mark.parametrize(("offset", "size", "got"), [(8, 3, 2), (11, 1, 0), (2**70, 1, 0), (0, 2**70, 10)])
def test_a_short_object_says_where_and_how_short(backend, offset, size, got):
    backend.create_once("packs/1", b"0123456789")
    with pytest.raises(CorruptError, match=f"packs/1.* @ {offset}: found {got} bytes, expected {size};"):
        backend.read("packs/1", offset, size)


def test_a_short_object_does_not_fill_buffers(backend):
    backend.create_once("packs/1", b"0123456789")
    with pytest.raises(CorruptError, match="@ 6: found 4 bytes, expected 5"):
        backend.read_into("packs/1", 6, [bytearray(2), bytearray(3)])


def test_a_negative_range_is_the_callers_mistake(backend):
    backend.create_once("packs/1", b"0123456789")
    for offset, size in ((-1, 1), (0, -1), (-1, None)):
        with pytest.raises(InvalidInputError):
            backend.read("packs/1", offset, size)


def test_the_clock_is_read_though_a_gc_tidies_the_file_it_is_read_off(tmp_path, monkeypatch):
    backend = LocalBackend(tmp_path)
    backend.make_dirs(["packs", "tmp"])
    backend.create_once("packs/1", b"x")
    fstat = Os.fstat

    def tidied(self, fd):
        for path in (tmp_path / "tmp").iterdir():
            path.unlink()
        return fstat(self, fd)

    monkeypatch.setattr(Os, "fstat", tidied)
    assert backend.age_s("packs/1") >= 0


def test_size_exists_and_age_speak_of_what_is_there(backend):
    backend.create_once("packs/1", b"0123456789")
    assert backend.size("packs/1") == 10
    assert backend.exists("packs/1")
    assert backend.age_s("packs/1") >= 0
    assert not backend.exists("packs/2")
    assert not backend.exists("packs/1/below")
    assert not backend.exists("nowhere/1")
    assert [entry.name for entry in backend.list("tmp/")] == []


def test_an_absent_object_is_not_found(backend):
    reads = [backend.read, backend.size, backend.age_s, lambda n: backend.read_into(n, 0, [])]
    for read in reads:
        for name in ("packs/none", "nowhere/none"):
            with pytest.raises(NotFoundError, match=name):
                read(name)


def test_age_goes_by_the_clock_of_the_storage(tmp_path):
    now_s = 100.0
    memory = MemoryBackend(clock=lambda: now_s)
    memory.create_once("sessions/1", b"")
    now_s = 160.0
    assert memory.age_s("sessions/1") == 60
    local = make_local(tmp_path)
    local.create_once("sessions/1", b"")
    path = tmp_path / "store/sessions/1"
    os.utime(path, (0, path.stat().st_mtime - 60))
    assert 60 <= local.age_s("sessions/1") < 3600
    os.utime(path, (0, path.stat().st_mtime + 3600))
    assert local.age_s("sessions/1") == 0
    assert local.list("tmp/") == []


def test_a_listing_is_sorted_and_stays_in_its_directory(backend):
    for name in (
        "refs/b/2",
        "refs/b/10",
        "refs/a/1",
        "refs/top",
        "refs/b/x/deep",
        "refs-not/1",
        "deltackpt.json",
    ):
        if isinstance(backend, LocalBackend) and name.startswith("refs-not"):
            backend.make_dirs(["refs-not"])
        assert backend.create_once(name, name.encode())
    assert backend.list("refs/b/") == [Entry("refs/b/10", 9), Entry("refs/b/2", 8)]
    assert [entry.name for entry in backend.list("refs/")] == ["refs/top"]
    assert [entry.name for entry in backend.list("")] == ["deltackpt.json"]
    assert backend.list_dirs("refs/") == ["a", "b"]
    assert backend.list_dirs("refs/b/") == ["x"]
    assert {"refs", "refs-not"} <= set(backend.list_dirs(""))


def test_a_missing_directory_lists_nothing(backend):
    assert backend.list("nowhere/") == []
    assert backend.list("refs/nobody/") == []
    assert backend.list_dirs("nowhere/") == []


def test_a_delete_is_idempotent_and_frees_the_name(backend):
    backend.create_once("packs/1", b"old")
    assert backend.read("packs/1") == b"old"
    backend.delete("packs/1")
    backend.delete("packs/1")
    backend.delete("nowhere/1")
    assert not backend.exists("packs/1")
    assert backend.create_once("packs/1", b"new one")
    assert backend.read("packs/1") == b"new one"


NOT_NAMES = [
    "",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "./a",
    "a/.hidden",
    "a\0",
    "a\\b",
    "x" * 241,
    "é" * 121,
]
NOT_NAMES += ["/".join(["x" * 200] * 6), "a\udcff"]


@pytest.mark.parametrize("name", NOT_NAMES)
def test_a_name_that_could_escape_or_not_be_stored_is_refused_everywhere(backend, name):
    uses = [backend.read, backend.size, backend.age_s, backend.exists, backend.delete]
    uses += [backend.create, lambda n: backend.create_once(n, b""), lambda n: backend.read_into(n, 0, [])]
    uses += [lambda n: backend.make_dirs([n]), backend.barrier]
    for use in uses:
        with pytest.raises(InvalidInputError, match="object name"):
            use(name)
    for use in (backend.list, backend.list_dirs):
        with pytest.raises(InvalidInputError):
            use(f"{name}/")


def test_a_prefix_without_its_slash_is_refused(backend):
    with pytest.raises(InvalidInputError, match="slash"):
        backend.list("packs")


def test_the_longest_and_oddest_names_are_held(backend):
    for name in (
        "x" * 240,
        "packs/" + "é" * 120,
        "refs/a b\n*?:\"<>|'/1",
        "/".join(["refs"] + ["x" * 200] * 5),
    ):
        assert backend.create_once(name, b"1")
        with backend.create(f"{name[:-1]}y") as writer:
            assert writer.commit()
        assert name in contents(backend)


def test_a_probe_finds_storage_with_two_winners():
    class Overwriting(MemoryBackend):
        def create_once(self, name, data, *, flush=True):
            self.delete(name)
            super().create_once(name, data)
            return True

    with pytest.raises(StorageError, match="create-once"):
        Overwriting().probe()


def test_every_method_is_in_the_contract():
    for kind in (LocalBackend, MemoryBackend):
        extra = {name for name in vars(kind) if not name.startswith("_")} - set(vars(Backend))
        assert not extra


# -- what only files do --------------------------------------------------------------------------------------


def _race(path, names, start, won):
    backend = LocalBackend(path)
    start.wait()
    for name in names:
        if backend.create_once(name, str(os.getpid()).encode()):
            won.put((name, os.getpid()))
    won.put(None)


def test_of_four_processes_racing_for_a_name_one_wins(tmp_path):
    backend = make_local(tmp_path)
    context = multiprocessing.get_context("spawn")
    names = [f"refs/r/{n}" for n in range(100)]
    start, won = context.Barrier(4), context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path / "store", names, start, won)) for _ in range(4)]
    for racer in racers:
        racer.start()
    winners = [item for _ in racers for item in iter(won.get, None)]
    for racer in racers:
        racer.join()
    assert sorted(name for name, _ in winners) == sorted(names)
    assert all(backend.read(name) == str(pid).encode() for name, pid in winners)
    assert backend.list("tmp/") == []


def test_creating_costs_one_flush_and_a_barrier_one_for_each_directory_that_gained(local, calls):
    for name in ("packs/1", "packs/2", "refs/1", "sessions/1"):
        local.create_once(name, b"1")
    assert calls.n_calls["fsync"] == 4
    local.barrier()
    assert calls.n_calls["fsync"] == 4 + 3
    local.barrier()
    assert calls.n_calls["fsync"] == 4 + 3


def test_a_streamed_object_costs_one_flush(local, calls):
    with local.create("packs/1") as writer:
        writer.write(b"1")
        writer.write(b"2")
        writer.commit()
    assert calls.n_calls["fsync"] == 1


def test_the_device_is_told_to_begin_with_what_is_to_be_flushed_and_may_refuse(tmp_path, monkeypatch):
    monkeypatch.setattr(local_module, "_BEHIND_SIZE", 1000)
    told = []

    def hook(call, *args):
        if call == "write_behind":
            told.append(args[1:])
            raise OSError(errno.EINVAL, "no")

    backend = LocalBackend(tmp_path, calls=HookedOs(hook))
    backend.make_dirs(["packs", "tmp"])
    with backend.create("packs/a") as writer:
        for _ in range(5):
            writer.write(bytes(400), bytes(100))
        assert writer.commit()
    assert told == [(0, 1000), (1000, 1000)]
    backend.create_once("packs/b", bytes(5000), flush=False)
    assert len(told) == 2
    assert backend.read("packs/a") == bytes(2500)


def test_what_need_not_survive_costs_no_flush(local, calls):
    local.create_once("sessions/1", b"1", flush=False)
    local.delete("sessions/1")
    local.barrier()
    assert calls.n_calls["fsync"] == 0


def test_the_directories_above_are_flushed_once_by_every_instance(local, calls):
    local.create_once("refs/main/1", b"1")
    local.barrier()
    assert calls.n_calls["fsync"] == 1 + 2  # refs/main and refs; the root is known to be safe
    local.create_once("refs/main/2", b"1")
    local.barrier()
    assert calls.n_calls["fsync"] == 3 + 1 + 1
    other = HookedOs()
    late = LocalBackend(local.url, calls=other)
    late.create_once("refs/main/3", b"1")
    late.barrier()
    assert other.n_calls["fsync"] == 1 + 3


def test_a_barrier_may_be_for_some_directories_and_leaves_the_rest_to_a_later_one(local, calls):
    for name in ("packs/1", "refs/main/1", "refs/other/1", "sessions/1"):
        local.create_once(name, b"1", flush=True)
    calls.n_calls.clear()
    local.barrier("packs")
    assert calls.n_calls["fsync"] == 1
    local.barrier("packs", "tmp")
    assert calls.n_calls["fsync"] == 1
    local.barrier("refs/main")
    assert calls.n_calls["fsync"] == 1 + 2  # and refs, for the name of refs/main, which covers refs/other too
    local.barrier("refs/other")
    assert calls.n_calls["fsync"] == 3 + 1
    local.barrier()
    assert calls.n_calls["fsync"] == 4 + 1


def test_a_name_found_taken_is_flushed_too_as_its_maker_may_not_have(local, calls):
    LocalBackend(local.url).create_once("packs/1", b"1")
    local.create_once("packs/1", b"1")
    local.barrier()
    assert calls.n_calls["fsync"] == 1 + 1


def test_a_new_store_flushes_all_directories_above_it_as_their_maker_may_not_have(tmp_path):
    flushed = []
    opened = {}

    class Recording(HookedOs):
        def open(self, path, flags, mode=0o666):
            fd = super().open(path, flags, mode)
            opened[fd] = path
            return fd

        def fsync(self, fd):
            flushed.append(opened[fd])

    above = {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a/b")}
    there = {str(path) for path in tmp_path.parents}
    backend = LocalBackend(tmp_path / "a/b", calls=Recording())
    backend.make_dirs(["packs", "refs"])
    backend.barrier("packs")
    assert above <= set(flushed) <= above | there  # as far as their file system goes
    n_flushed = len(flushed)
    backend.barrier()
    assert len(flushed) == n_flushed


def test_a_barrier_that_fails_is_asked_again(local, calls):
    local.create_once("packs/1", b"1")
    calls.hook = failing("fsync", errno.EIO)
    with pytest.raises(StorageError, match="flush the directory"):
        local.barrier()
    calls.n_calls.clear()
    local.barrier()
    assert calls.n_calls["fsync"] == 1


def test_a_barrier_with_nothing_left_to_flush_waits_for_the_one_that_flushes(local, calls):
    local.create_once("packs/1", b"1")
    order = []
    is_flushing, go_on = threading.Event(), threading.Event()

    def slow(call, *args):
        if call == "fsync":
            is_flushing.set()
            go_on.wait(10)
            order.append("flushed")

    calls.hook = slow
    first = threading.Thread(target=local.barrier)
    first.start()
    is_flushing.wait(10)
    second = threading.Thread(target=lambda: (local.barrier(), order.append("second is back")))
    second.start()
    second.join(0.05)
    go_on.set()
    first.join()
    second.join()
    assert order == ["flushed", "second is back"]


FAULTS = [
    ("open", "create"),
    ("writev", "write"),
    ("fsync", "flush"),
    ("close", "flush"),
    ("link", "publish"),
]


@pytest.mark.parametrize(
    "code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.EROFS, errno.EACCES]
)
@pytest.mark.parametrize(("call", "doing"), FAULTS)
def test_a_failed_call_is_a_storage_error_and_leaves_nothing(local, calls, call, doing, code):
    calls.hook = failing(call, code)
    with pytest.raises(
        StorageError, match=f"packs/1: could not {doing}: .*{errno.errorcode[code]}"
    ) as caught:
        local.create_once("packs/1", b"data")
    assert caught.value.errno == code
    assert contents(local) == {}
    assert local.create_once("packs/1", b"data")


def test_a_process_that_dies_at_any_call_leaves_the_object_whole_or_absent(local, calls):
    for nth in range(100):
        n_left = nth

        def die(call, *args):
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                raise Cut(call)

        name = f"refs/{nth}/1"
        calls.hook = die
        try:
            local.create_once(name, b"data")
            local.barrier()
            break
        except Cut:
            calls.hook = lambda *args: None
            left = LocalBackend(local.url)
            assert {entry.size for entry in left.list(f"refs/{nth}/")} <= {4}
            left.create_once(name, b"data")
            assert left.read(name) == b"data"
    assert nth > 10


@pytest.mark.parametrize("call", ["writev", "fsync", "close", "link"])
def test_a_writer_is_dead_after_a_failure(local, calls, call):
    calls.hook = failing(call, errno.EIO)
    with local.create("packs/1") as writer:
        with pytest.raises(StorageError):
            writer.write(b"data") or writer.commit()
        with pytest.raises(InvalidInputError):
            writer.commit()
    assert calls.n_calls["fsync"] <= 1
    assert contents(local) == {}


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "read-only"),
    ],
)
def test_the_hint_says_what_to_do(local, calls, code, hint):
    calls.hook = failing("writev", code)
    with pytest.raises(StorageError) as caught:
        local.create_once("packs/1", b"data")
    assert hint in caught.value.hint


def test_an_object_that_is_published_stays_so_whatever_happens_to_its_file_in_tmp(local, calls):
    calls.hook = failing("unlink", errno.EIO)
    assert local.create_once("packs/1", b"data")
    (left,) = local.list("tmp/")
    local.delete(left.name)
    assert contents(local) == {"packs/1": b"data"}


def test_short_writes_and_reads_are_continued(local, calls, monkeypatch):
    monkeypatch.setattr(calls, "writev", lambda fd, views: os.write(fd, views[0][:3]))
    monkeypatch.setattr(calls, "preadv", lambda fd, views, at: os.preadv(fd, [views[0][:3]], at))
    local.create_once("packs/1", bytes(range(100)))
    assert local.read("packs/1") == bytes(range(100))


def _fill_a_limited_disk(path, answer):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    backend = LocalBackend(path)
    try:
        with backend.create("packs/1") as writer:
            writer.write(bytes(4000), bytes(4000), bytes(4000))
            writer.commit()
    except StorageError as error:
        answer.put((error.errno, error.hint, contents(backend)))


def test_storage_that_really_takes_no_more_is_an_error_that_leaves_nothing(tmp_path):
    make_local(tmp_path)
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_fill_a_limited_disk, args=(tmp_path / "store", answer))
    process.start()
    code, hint, left = answer.get(timeout=60)
    process.join()
    assert code == errno.EFBIG
    assert "limit" in hint
    assert left == {}


def test_a_read_only_directory_is_an_error_with_a_hint(tmp_path):
    backend = make_local(tmp_path)
    for path in (tmp_path / "store/packs", tmp_path / "store/tmp"):
        path.chmod(0o555)
        if os.access(path, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(StorageError, match="read-only") as caught:
            backend.create_once("packs/1", b"data")
        path.chmod(0o755)
        assert caught.value.errno == errno.EACCES
        assert contents(backend) == {}


def test_our_own_link_is_recognised_when_its_answer_was_lost(local, calls):
    for n, code in enumerate([errno.EEXIST, errno.EIO]):

        def lose(call, *args, code=code):
            if call == "link":
                os.link(*args)
                raise OSError(code, "answer lost")

        calls.hook = lose
        assert local.create_once(f"packs/{n}", b"ours")
        calls.hook = lambda *args: None
        assert not local.create_once(f"packs/{n}", b"theirs")
        assert local.read(f"packs/{n}") == b"ours"


def sweep_tmp(local, calls, n_times):
    def sweep(call, *args):
        nonlocal n_times
        if call == "link" and n_times and Path(args[0]).exists():
            n_times -= 1
            Path(args[0]).unlink()

    calls.hook = sweep


def test_an_object_whose_file_was_swept_from_tmp_is_written_again(local, calls):
    sweep_tmp(local, calls, 7)
    assert local.create_once("packs/1", b"data")
    assert contents(local) == {"packs/1": b"data"}
    sweep_tmp(local, calls, 8)
    with pytest.raises(StorageError, match="removed while it was written"):
        local.create_once("packs/2", b"data")
    assert contents(local) == {"packs/1": b"data"}


def test_a_streamed_object_whose_file_was_swept_must_be_written_again_by_the_caller(local, calls):
    sweep_tmp(local, calls, 1)
    with local.create("packs/1") as writer, pytest.raises(StorageError, match="removed while it was written"):
        writer.commit()
    assert contents(local) == {}


def test_a_store_that_was_unmounted_is_an_error_and_is_not_made_anew(tmp_path):
    backend = make_local(tmp_path)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    for use in (
        lambda: backend.create_once("refs/main/1", b""),
        lambda: backend.list("refs/"),
        backend.probe,
    ):
        with pytest.raises(StorageError, match="mounted"):
            use()
    (tmp_path / "store/tmp").mkdir(parents=True)  # only the mount point's own, or another's
    with pytest.raises(StorageError, match="mounted"):
        backend.create_once("refs/main/1", b"")
    assert contents(backend) == {}


@pytest.mark.parametrize(("call", "missing"), [("link", "hard links"), ("fsync", "fsync")])
def test_a_probe_names_what_the_storage_lacks(local, calls, call, missing):
    def lack(name, *args):
        if name == call:
            raise OSError(errno.EOPNOTSUPP, "not supported")

    calls.hook = lack
    with pytest.raises(StorageError) as caught:
        local.probe()
    assert missing in caught.value.hint
    assert contents(local) == {}


def test_a_probe_finds_links_that_overwrite(local, calls, monkeypatch):
    monkeypatch.setattr(calls, "link", lambda source, target: os.rename(source, target))  # noqa: PTH104
    with pytest.raises(StorageError, match="create-once"):
        local.probe()


def test_what_is_not_a_plain_file_with_a_legal_name_is_no_object(local, tmp_path):
    store = tmp_path / "store"
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (store / "packs/link").symlink_to(secret)
    (store / "packs/dir").mkdir()
    (store / "packs/.nfs0001").write_bytes(b"")
    os.mkfifo(store / "packs/pipe")
    Path(os.fsdecode(bytes(store / "packs") + b"/\xff")).write_bytes(b"")
    assert local.list("packs/") == []
    assert local.list_dirs("packs/") == ["dir"]
    for name in ("packs/link", "packs/dir"):
        assert not local.exists(name)
        for use in (local.read, local.size):
            with pytest.raises(NotFoundError):
                use(name)
    with pytest.raises(NotFoundError, match="expected a regular file"):
        local.size("packs/pipe")
    assert not local.create_once("packs/link", b"through the link")
    local.delete("packs/link")
    assert secret.read_bytes() == b"secret"


def test_files_get_the_permissions_the_umask_leaves(local, tmp_path):
    before = os.umask(0o027)
    try:
        local.create_once("refs/main/1", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "store/refs/main/1").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "store/refs/main").stat().st_mode) == 0o750


def test_an_object_cut_short_under_an_open_file_is_an_error(local, tmp_path):
    local.create_once("packs/1", b"0123456789")
    assert local.read("packs/1", 0, 1) == b"0"
    os.truncate(tmp_path / "store/packs/1", 4)
    with pytest.raises(CorruptError, match="@ 2: found 2 bytes, expected 8; the object ends at 4"):
        local.read("packs/1", 2)


def test_an_object_is_opened_once_for_many_reads_and_no_longer_after_a_delete(local, calls):
    local.create_once("packs/1", b"0123456789")
    calls.n_calls.clear()
    for _ in range(5):
        local.read("packs/1")
    assert calls.n_calls["open"] == 1
    assert calls.n_calls["close"] == 0
    local.delete("packs/1")
    assert calls.n_calls["close"] == 1
    with pytest.raises(NotFoundError):
        local.read("packs/1")


def test_no_file_stays_open_after_close(local, calls):
    for n in range(100):
        local.create_once(f"packs/{n}", b"")
        local.read(f"packs/{n}")
    assert calls.n_calls["open"] - calls.n_calls["close"] == local_module._N_OPEN_MAX
    local.close()
    assert calls.n_calls["open"] == calls.n_calls["close"]


def test_no_file_stays_open_when_nobody_holds_the_backend_any_more(tmp_path):
    calls = HookedOs()
    backend = LocalBackend(tmp_path / "store", calls=calls)
    backend.make_dirs(["packs", "tmp"])
    backend.create_once("packs/1", b"one")
    backend.read("packs/1")
    before = calls.n_calls["close"]
    del backend
    assert calls.n_calls["close"] == before + 1


def test_a_file_deleted_while_it_is_being_opened_is_not_kept_open(local, calls):
    local.create_once("packs/1", b"old")

    def delete_it(call, *args):
        if call == "fstat":
            calls.hook = lambda *args: None
            local.delete("packs/1")
            local.create_once("packs/1", b"new")

    calls.hook = delete_it
    assert local.read("packs/1") == b"old"
    assert local.read("packs/1") == b"new"


def test_readers_never_read_another_file_while_the_few_open_ones_are_evicted(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(local_module, "_N_OPEN_MAX", 2)
    local = make_local(tmp_path, calls)
    for n in range(16):
        local.create_once(f"packs/{n}", bytes([n]) * 100)

    def read(i):
        rng = np.random.default_rng(i)
        for n in rng.integers(0, 16, 500):
            if n == 15:
                local.close()
            buffers = [bytearray(10), bytearray(80)]
            local.read_into(f"packs/{n}", 10, buffers)
            if b"".join(buffers) != bytes([n]) * 90:
                return False
        return True

    assert all(run_threads(8, read))
    local.close()
    assert calls.n_calls["open"] == calls.n_calls["close"]


def test_the_barriers_of_many_threads_flush_what_each_created(local, calls):
    def save(i):
        for n in range(20):
            local.create_once(f"refs/{i % 3}/{i}.{n}", b"")
            local.barrier()

    run_threads(6, save)
    calls.n_calls.clear()
    local.barrier()
    assert calls.n_calls["fsync"] == 0
    assert all(a.name < b.name for a, b in pairwise(local.list("refs/0/")))


def test_names_are_those_of_the_listing(backend):
    for name in ("packs/b", "packs/a", "refs/main/1.1"):
        backend.create_once(name, b"x")
    assert (
        backend.names("packs/") == [entry.name for entry in backend.list("packs/")] == ["packs/a", "packs/b"]
    )
    assert backend.names("gc/") == []
