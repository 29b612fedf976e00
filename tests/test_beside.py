"""One beside another, in orders that are made, not waited for: writers of a step, zombies, readers under gc.

A process stops itself with SIGSTOP at a chosen system call, and what it meets when it goes on happens
meanwhile; what runs in one process is called from inside the other's calls.
"""

import os
import signal
import threading

import numpy as np
import pytest
from faults import Cut, HookedOs, Wrapper, contents, memory_of
from steps import assert_steps, collect, floats, noise, opened, same, visible
from test_damage import AtOnce

from deltackpt import gc, packer, proxy
from deltackpt.backends.local import LocalBackend
from deltackpt.backends.memory import MemoryBackend
from deltackpt.chunking import Chunker
from deltackpt.errors import ConflictError, NotFoundError
from deltackpt.format import RECORD_HEADER
from deltackpt.run import Run
from deltackpt.session import Session
from deltackpt.store import open_store
from deltackpt.verify import verify
from deltackpt.workers import workers

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def state(step, by=0):
    """A part that all share, one that moves a little, one of whoever saves it."""
    return {"stays": noise(1, 3000), "moves": floats(step, 700), "by": floats(by, 50), "step": step}


# -- processes that stop themselves


class Child:
    """A forked process; `hook(name, *args)` runs before each of its system calls and may stop it."""

    def __init__(self, path, work, hook):
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                run = opened(LocalBackend(path, calls=HookedOs(hook)))
                os.write(write, work(run).encode())
            except BaseException as e:
                os.write(write, repr(e).encode())
            finally:
                os._exit(0)
        os.close(write)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """See that a stopped child does not outlive a test that failed."""
        if error[0] is not None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def is_stopped(self):
        """Wait until it stops itself, or ends."""
        return os.WIFSTOPPED(os.waitpid(self.pid, os.WUNTRACED)[1])

    def goes_on(self):
        """Let it go on to its end; return what it said."""
        os.kill(self.pid, signal.SIGCONT)
        with os.fdopen(self._read) as lines:
            said = lines.read()
        os.waitpid(self.pid, 0)
        return said


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def at_decision():
    """A hook that stops its process right before it decides, once: it tries again if its file goes."""
    todo = [stop]
    return lambda call, *args: call == "link" and "/refs/" in args[1] and todo and todo.pop()()


def at_call(nth):
    calls = iter(range(nth + 1))
    return lambda *_: next(calls, None) == nth and stop()


def saves(step, by):
    def work(run):
        try:
            run.save(state(step, by), step=step)
        except ConflictError as e:
            return e.message
        return "saved"

    return work


@forks
@pytest.mark.parametrize("first", [0, 1])
def test_of_two_processes_at_the_decision_of_one_step_the_first_wins_and_the_other_is_told(tmp_path, first):
    opened(tmp_path).save(state(1), step=1)
    with Child(tmp_path, saves(2, 0), at_decision()) as a, Child(tmp_path, saves(2, 1), at_decision()) as b:
        assert (a.is_stopped(), b.is_stopped()) == (True, True)
        winner, loser = (b, a) if first else (a, b)
        assert winner.goes_on() == "saved"
        assert "another writer committed it first" in loser.goes_on()
    assert_steps(visible(tmp_path), {1: state(1), 2: state(2, first)})
    collect(tmp_path)
    assert_steps(visible(tmp_path), {1: state(1), 2: state(2, first)})
    assert verify(tmp_path, level="decode").clean
    assert len(opened(tmp_path).store.backend.names("manifests/")) == 2


def saves_until_it_is_there(run):
    """What whoever is told to save again does."""
    said = saves(2, 0)(run)
    return said if said == "saved" else f"{said}; {saves(2, 0)(run)}"


@forks
def test_a_writer_suspended_at_any_call_and_given_up_is_refused_and_saves_again(tmp_path):
    n_fenced, nth, is_over = 0, 0, False
    while not is_over:
        path = tmp_path / str(nth)
        opened(path).save(state(1), step=1)
        with Child(path, saves_until_it_is_there, at_call(nth)) as child:
            is_over = not child.is_stopped()
            if not is_over:
                is_open = bool(open_store(path).sessions())
                is_decided = 2 in opened(path).steps()
                assert not gc.collect(path).fenced  # its process is alive, and an hour is not over
                assert collect(path).fenced == (["run main step 2"] if is_open and not is_decided else [])
                said = child.goes_on()
                assert said.endswith("saved"), (nth, said)
                assert is_open or said == "saved"
                n_fenced += "gc gave this save up for dead" in said
        assert_steps(visible(path), {1: state(1), 2: state(2)})
        collect(path)
        assert_steps(visible(path), {1: state(1), 2: state(2)})
        assert verify(path, level="decode").clean
        assert not open_store(path).sessions()
        nth += 1
    print(f"stopped at {nth - 1} calls, refused at {n_fenced}")
    assert nth > 50
    assert n_fenced > 5


@forks
def test_a_writer_suspended_right_before_its_decision_never_commits(tmp_path):
    opened(tmp_path).save(state(1), step=1)
    with Child(tmp_path, saves(2, 0), at_decision()) as child:
        assert child.is_stopped()
        opened(tmp_path).forget([1])  # what it found there and relies on
        assert "run main step 2" in gc.collect(tmp_path).waiting_for[0]
        assert collect(tmp_path).fenced == ["run main step 2"]
        collect(tmp_path)
        assert not opened(tmp_path).store.backend.names("packs/")
        opened(tmp_path).save(state(2, 7), step=2)  # somebody else does what it did not
        assert "gc gave this save up for dead" in child.goes_on()
    assert_steps(visible(tmp_path), {2: state(2, 7)})


# -- readers


class Interrupted(Wrapper):
    """Does something else right before the nth read since it was set."""

    def __init__(self, inner):
        super().__init__(inner)
        self.left, self.meanwhile = -1, lambda: None

    def set(self, nth, meanwhile):
        self.left, self.meanwhile = nth, meanwhile

    def _do(self, op, name, call, *, mutates=True):
        self.left -= 1
        if self.left == -1:
            self.meanwhile()
        return call()


def whole(run):
    return run.load(3)


def into(run):
    into = {"stays": np.zeros(3000, np.uint8), "moves": np.zeros(700, np.float32), "step": 0}
    return run.load(3, into=into)


def lazily(run):
    found = run.load(3, lazy=True)
    return {name: value.load() if hasattr(value, "load") else value for name, value in found.items()}


def in_part(run):
    return {"stays": run.read(3, "stays"), "moves": run.read(3, "moves")}


def mapped(run):
    torch = pytest.importorskip("torch")
    found = run.load(3, map="cpu")
    return {n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in found.items()}


def latest_good(run):
    return run.load("latest-good")


WAYS = [whole, into, lazily, in_part, mapped]


def read_state(step):
    """Several packs: a step needs those of the steps before it too; weights, so that there are deltas."""
    weights = floats(1, 700)
    weights.view("i4")[: 3 * step] += 1
    stays = noise(1, 3000)
    stays[: 10 * step] = step
    return {"stays": stays, "moves": weights, "step": step}


@pytest.fixture
def store(monkeypatch):
    """A store of three steps, whose chunks are so small that there are lists."""
    monkeypatch.setattr(workers, "_pool", AtOnce())
    monkeypatch.setattr(Chunker, "__init__", small)
    run = opened(MemoryBackend())
    for step in (1, 2, 3):
        run.save(read_state(step), step=step)
    assert max(row.level for row in run.manifest(3).tensors) == 1
    return contents(run.store.backend)


_init = Chunker.__init__


def small(self, *sizes):
    _init(self, *(sizes or (64, 256, 1024)))


def at_every_read(objects, way, meanwhile):
    """Have something happen before each read of a way to load, one at a time; return what came of each."""
    outcomes, n_reads, nth = [], None, 0
    while n_reads is None or nth < n_reads:
        backend = Interrupted(memory_of(objects))
        run = opened(backend)
        n_before = 10_000
        at = nth if n_reads is not None else n_before
        backend.set(at, lambda backend=backend: meanwhile(backend.inner))
        try:
            outcomes.append(way(run))
        except NotFoundError as e:
            outcomes.append(e)
        if n_reads is None:
            n_reads = n_before - backend.left
            outcomes.pop()
        else:
            nth += 1
    assert n_reads > 5
    return outcomes


def forgets_and_collects(backend):
    opened(backend).forget([3])
    opened(backend).save({"other": noise(9, 500)}, step=4)
    collect(backend)
    collect(backend)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_forgotten_and_collected_while_it_is_read_is_whole_or_said_to_be_forgotten(store, way):
    outcomes = at_every_read(store, way, forgets_and_collects)
    told = [str(e) for e in outcomes if isinstance(e, NotFoundError)]
    loaded = [found for found in outcomes if not isinstance(found, NotFoundError)]
    expected = {n: v for n, v in read_state(3).items() if n != "step" or way is not in_part}
    assert all(same(found, expected) for found in loaded)
    assert len(told) > len(outcomes) // 2
    assert all("was forgotten while it was read" in text or "has no step 3" in text for text in told)
    print(f"{way.__name__}: {len(outcomes)} reads, {len(told)} told")


def rewrites(backend):
    """What the step needs moves to other packs, and its index files are merged."""
    opened(backend).forget([1, 2])
    assert collect(backend).n_deleted
    collect(backend)


@pytest.mark.parametrize("way", [*WAYS, latest_good])
def test_a_step_that_gc_moves_while_it_is_read_is_read_whole(store, way):
    expected = {n: v for n, v in read_state(3).items() if n != "step" or way is not in_part}
    for found in at_every_read(store, way, rewrites):
        assert same(found, expected)


def replaces(backend):
    opened(backend).save(read_state(7) | {"step": 3}, step=3, overwrite=True)
    opened(backend).forget([1, 2])
    collect(backend)
    collect(backend)


@pytest.mark.parametrize("way", [whole, into, in_part, mapped])
def test_a_step_replaced_while_it_is_read_is_the_old_one_or_the_new(store, way):
    wanted = [{**read_state(step), "step": 3} for step in (3, 7)]
    if way is in_part:
        wanted = [{n: state[n] for n in ("stays", "moves")} for state in wanted]
        return  # each array is read by itself
    outcomes = at_every_read(store, way, replaces)
    kinds = [[same(found, state) for state in wanted] for found in outcomes]
    assert all(map(any, kinds))
    assert any(new for _, new in kinds)


def test_the_latest_step_forgotten_while_it_is_read_gives_the_one_that_is_the_latest_then(store):
    def forgets(backend):
        opened(backend).forget([3])
        collect(backend)
        collect(backend)

    outcomes = at_every_read(store, lambda run: run.load(), forgets)
    assert all(same(found, read_state(found["step"])) for found in outcomes)
    assert {2} <= {found["step"] for found in outcomes} <= {2, 3}


def test_the_latest_good_step_forgotten_while_it_is_looked_for_gives_one_that_is_good(store):
    allowed = [read_state(2), read_state(3), {"other": noise(9, 500)}]
    for found in at_every_read(store, latest_good, forgets_and_collects):
        assert any(same(found, state) for state in allowed), found


def test_lazy_arrays_of_a_forgotten_step_say_so_every_time_they_are_asked(store):
    backend = memory_of(store)
    found = opened(backend).load(3, lazy=True)
    assert same(found["moves"][:5], read_state(3)["moves"][:5])
    forgets_and_collects(backend)
    for index in (slice(None), 0, slice(5, 600)):
        with pytest.raises(NotFoundError, match="run 'main' step 3: was forgotten while it was read"):
            found["stays"][index]


def test_a_reader_holding_files_open_reads_right_or_says_that_the_step_was_forgotten(tmp_path):
    """A pack that is open can be read after it was deleted; one that was not opened yet cannot."""
    told = []
    for nth in range(60):
        path = tmp_path / str(nth)
        for step in (1, 2, 3):
            opened(path).save(read_state(step), step=step)
        left = [-1]

        def hook(call, *args, left=left, path=path):
            if call in ("open", "preadv", "lstat", "scandir") and left:
                left[0] -= 1
                if left[0] == -1:
                    left.clear()
                    forgets_and_collects(path)

        run = opened(LocalBackend(path, calls=HookedOs(hook)))
        left[0] = nth
        try:
            assert same(run.load(3), read_state(3))
        except NotFoundError as e:
            told.append(e.message)
        if left:
            break
    assert nth > 10
    assert len(told) > 5
    assert all("was forgotten while it was read" in text or "has no step 3" in text for text in told)


@pytest.mark.parametrize(
    ("level", "meanwhile"),
    [("references", replaces), ("decode", forgets_and_collects), ("decode", rewrites)],
)
def test_a_store_that_others_change_while_it_is_verified_is_not_said_to_be_damaged(store, level, meanwhile):
    for report in at_every_read(store, lambda run: verify(run.store, level=level), meanwhile):
        assert report.clean, report.damage


def test_what_is_damaged_is_told_though_others_change_the_store_meanwhile(store):
    name = max((name for name in store if name.startswith("packs/")), key=lambda name: len(store[name]))
    middle = len(store[name]) // 2
    bad = store | {name: store[name][:middle] + bytes([store[name][middle] ^ 1]) + store[name][middle + 1 :]}
    assert not verify(memory_of(bad), level="stored").clean

    def saves(backend):
        opened(backend).save({"other": noise(9, 500)}, step=4)

    for report in at_every_read(bad, lambda run: verify(run.store, level="stored"), saves):
        assert [damage.key for damage in report.damage] == [name]


def test_a_damaged_list_is_told_though_one_of_the_steps_that_need_it_is_forgotten_meanwhile(store):
    run = opened(memory_of(store))
    [root] = {row.root for row in run.manifest(3).tensors if row.name == "stays"}
    row = run.store.find(np.frombuffer(root, np.uint8)[None])[0]
    name = run.store.refresh().packs[row["pack"]].key
    at = int(row["offset"]) + RECORD_HEADER.size + int(row["stored_size"]) // 2
    bad = store | {name: store[name][:at] + bytes([store[name][at] ^ 1]) + store[name][at + 1 :]}

    def forgets(backend):
        opened(backend).forget([1])

    for report in at_every_read(bad, lambda run: verify(run.store), forgets):
        assert [damage.kind for damage in report.damage] == ["list"]


# -- given up while its files are written


def given_up_at(monkeypatch, nth):
    """Have a gc without patience take the files of a session that is about to close its nth pack."""
    close = packer._Pack.close
    n_packs = 0

    def fenced(self, *arguments):
        nonlocal n_packs
        n_packs += 1
        if n_packs == nth:
            path = self.writer._backend.url
            assert collect(path).fenced
        return close(self, *arguments)

    monkeypatch.setattr(packer._Pack, "close", fenced)


def lost_to(backend, by):
    """Somebody else commits the step, and a gc ends whoever lost it, with what he has in tmp/."""
    if by == "gc":
        assert collect(backend).fenced == ["run main step 2"]
    else:
        opened(backend).save(state(2, by=7), step=2)
        gc.collect(backend)


@pytest.mark.parametrize("by", ["gc", "another"])
def test_a_save_in_the_background_whose_files_gc_takes_says_that_it_lost(tmp_path, monkeypatch, by):
    run = opened(LocalBackend(tmp_path, calls=HookedOs()))  # a thread saves
    run.save(state(1), step=1)
    close = packer._Pack.close

    def lost(self, *arguments):
        monkeypatch.setattr(packer._Pack, "close", close)
        lost_to(tmp_path, by)
        return close(self, *arguments)

    monkeypatch.setattr(packer._Pack, "close", lost)
    with pytest.raises(
        ConflictError, match="for dead" if by == "gc" else "another writer committed it first"
    ):
        run.save_async(state(2), step=2).wait()
    assert run.save_async(state(3), step=3).wait().step == 3
    expected = {1: state(1), 3: state(3)} | ({} if by == "gc" else {2: state(2, by=7)})
    assert_steps(visible(tmp_path), expected)


def test_a_fork_whose_files_gc_takes_says_that_it_lost(tmp_path, monkeypatch):
    run = opened(tmp_path)
    run.save(state(1), step=1)
    name = next(iter(run.store.backend.names("packs/")))
    monkeypatch.setattr(Session, "look_up", lambda self, ids: [None] * len(ids))  # as if it were condemned
    given_up_at(monkeypatch, 1)
    with pytest.raises(ConflictError, match="gc gave this save up for dead"):
        run.fork("branch")
    assert opened(tmp_path, "branch").steps() == []
    assert opened(tmp_path).store.backend.names("packs/") == [name]


def test_a_gc_whose_files_another_takes_while_it_repacks_looks_again(tmp_path, monkeypatch):
    run = opened(tmp_path)
    run.save({"kept": noise(1, 5000), "waste": noise(2, 5000)}, step=1)
    run.save({"kept": noise(1, 5000)}, step=2)
    run.forget([1])
    given_up_at(monkeypatch, 1)
    assert gc.collect(tmp_path).n_repacked == 1 or gc.collect(tmp_path).n_packs == 1
    assert len(run.store.backend.names("packs/")) == 1
    assert_steps(visible(tmp_path), {2: {"kept": noise(1, 5000)}})


def test_a_gc_after_one_that_was_given_up_is_not_taken_for_it(tmp_path, monkeypatch):
    run = opened(tmp_path)
    run.save({"kept": noise(1, 5000), "waste": noise(2, 5000)}, step=1)
    run.save({"kept": noise(1, 5000)}, step=2)
    run.forget([1])
    publish, is_there = Session.publish, []

    def dies(self, manifest):
        self.name = None  # or it would tidy up
        raise Cut

    def goes_on_beside_another(self, manifest):
        publish(self, manifest)
        result = gc.GcResult(False)
        gc._Gc(open_store(tmp_path), result, force=False, patience_s=3600)._reap()
        is_there.append([name.sid for name in self.store.sessions()] == [self.sid])

    monkeypatch.setattr(Session, "publish", dies)
    with pytest.raises(Cut):
        gc.collect(tmp_path)
    monkeypatch.setattr(Session, "publish", goes_on_beside_another)
    assert collect(tmp_path).fenced == ["gc"]
    assert is_there == [True]


# -- in the background


class Gated(MemoryBackend):
    """A store in which no step is decided before it may be."""

    def __init__(self):
        super().__init__()
        self.is_there, self.may_decide = threading.Event(), threading.Event()

    def create_once(self, name, data, **options):
        if name.startswith("refs/main/2.") and threading.current_thread() is not threading.main_thread():
            self.is_there.set()
            assert self.may_decide.wait(20)
        return super().create_once(name, data, **options)


@pytest.fixture
def gated():
    backend = Gated()
    run = opened(backend)
    run.save(state(1), step=1)
    return backend, run


def test_a_save_in_the_background_is_waited_for_by_gc(gated):
    backend, run = gated
    pending = run.save_async(state(1) | {"step": 2}, step=2)  # all of it is there
    assert backend.is_there.wait(20)
    opened(backend).forget([1])
    assert "run main step 2" in gc.collect(backend).waiting_for[0]
    backend.may_decide.set()
    assert pending.wait().step == 2
    assert gc.collect(backend).waiting_for == []
    assert_steps(visible(backend), {2: state(1) | {"step": 2}})


def test_a_save_in_the_background_that_gc_gave_up_is_refused_and_the_next_one_is_whole(gated):
    backend, run = gated
    whole = state(2)
    pending = run.save_async(whole, step=2)
    assert backend.is_there.wait(20)
    opened(backend).forget([1])
    assert collect(backend).fenced == ["run main step 2"]
    assert not contents(backend, "packs/")
    backend.may_decide.set()
    with pytest.raises(ConflictError, match="gave this save up for dead"):
        pending.wait()
    assert visible(backend) == {}
    assert run.save_async(whole, step=2).wait().step == 2  # nothing is taken for stored that is not
    assert_steps(visible(backend), {2: state(2)})
    collect(backend)
    assert_steps(visible(backend), {2: state(2)})


def test_a_save_in_the_background_of_a_step_that_another_saves_meanwhile_is_told(gated):
    backend, run = gated
    pending = run.save_async(state(2, by=1), step=2)
    assert backend.is_there.wait(20)
    opened(backend).save(state(2, by=2), step=2)
    backend.may_decide.set()
    with pytest.raises(ConflictError, match="another writer committed it first"):
        pending.wait()
    run.save_async(state(3), step=3).wait()
    collect(backend)
    assert_steps(visible(backend), {1: state(1), 2: state(2, by=2), 3: state(3)})


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memory that two processes share")
@pytest.mark.parametrize("meanwhile", ["given up", "saved by another"])
def test_a_process_that_saves_in_the_background_may_be_suspended_like_any_writer(
    tmp_path, monkeypatch, meanwhile
):
    big = {"w": floats(1, 50_000), "frozen": floats(2, 50_000)}
    line = proxy.Proxy.line

    def suspended(self, flat, begin):
        if flat.structure and self._what_step == 2:
            os.kill(self.pid, signal.SIGSTOP)  # with its session open
        return line(self, flat, begin)

    open_ = proxy.Proxy.open

    def noted(self, what, tensors, meter):
        self._what_step = what.step
        return open_(self, what, tensors, meter)

    monkeypatch.setattr(proxy.Proxy, "open", noted)
    monkeypatch.setattr(proxy.Proxy, "line", suspended)
    with Run(open_store(tmp_path, create=True), "main") as run:
        run.save_async(big, step=1).wait()
        pending = run.save_async({**big, "w": big["w"] * 2}, step=2)
        if meanwhile == "given up":
            assert collect(tmp_path).fenced == ["run main step 2"]
        else:
            opened(tmp_path).save({"other": 1}, step=2)
        os.kill(run._turns.proxy.pid, signal.SIGCONT)
        with pytest.raises(ConflictError, match="for dead" if meanwhile == "given up" else "another writer"):
            pending.wait()
        run.save_async({**big, "w": big["w"] * 3}, step=3).wait()
        assert same(run.load(3), {**big, "w": big["w"] * 3})
        assert same(run.load(1), big)
        assert run.steps() == ([1, 3] if meanwhile == "given up" else [1, 2, 3])
    collect(tmp_path)
    assert verify(tmp_path, level="decode").clean
