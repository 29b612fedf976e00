"""Saves while training goes on: the state as it was is saved, errors are told once, memory is bounded."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from deltackpt import differences, open_run, session, turns
from deltackpt import staging as staging_module
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import AlreadyExistsError, ConflictError, InvalidInputError, StorageError
from deltackpt.glances import NONE, Watch
from deltackpt.memory import Memory
from deltackpt.saver import Saver
from deltackpt.staging import Queue, Staging, StoppedError, looks
from deltackpt.types import Deferred, Tensor
from deltackpt.workers import submit


class Gate(MemoryBackend):
    """A store whose packs are not written before they may be."""

    def __init__(self) -> None:
        super().__init__()
        self.may_write = threading.Event()
        self.may_write.set()
        self.error: Exception | None = None

    def create(self, name):
        if name.startswith("packs/"):
            assert self.may_write.wait(20)
            if self.error is not None:
                raise self.error
        return super().create(name)


def watch(n: int) -> Watch:
    """One that trusts nothing."""
    return Watch([""] * n, [None] * n, NONE, 1, step=0)


def weights(seed: int, n: int = 100_000) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


@pytest.fixture
def gate() -> Gate:
    return Gate()


def test_the_state_may_change_as_soon_as_save_async_returns(gate):
    state = {"w": weights(0), "frozen": weights(1), "strided": weights(2)[::2], "step": 1}
    with open_run(gate) as run:
        run.save(state, step=0)
        before = {name: np.array(value) for name, value in state.items()}
        for step in (1, 2, 3):
            state["w"] += 1
            state["step"] = step
            saved = {name: np.array(value) for name, value in state.items()}
            gate.may_write.clear()
            pending = run.save_async(state, step=step)
            assert pending.staged()
            assert not pending.done()
            assert pending.report is None
            state["w"][:] = state["strided"][:] = 0
            state["frozen"] += 1  # it was looked at, not copied
            gate.may_write.set()
            report = pending.wait()
            assert pending.report is report
            assert report.stall_s <= report.total_s
            found = run.load(step)
            assert all(np.array_equal(found[name], saved[name]) for name in saved)
        assert np.array_equal(run.load(0)["w"], before["w"])


def test_deltas_and_the_shadow_are_those_of_saves_that_wait():
    sizes = []
    for saves in ("save", "save_async"):
        w = weights(0)
        with open_run(MemoryBackend()) as run:
            for step in range(4):
                saved = getattr(run, saves)({"w": w, "copy": w.astype(np.float16)}, step=step)
                report = saved if saves == "save" else saved.wait()
                sizes.append(report.written_size - len(str(report)))
                w = w * np.float32(1 + 1e-5)
            assert run._turns.saver.shadow.size > 0
            assert {"delta-dense", "delta-sparse"} & {c for g in report.groups for c in g.codecs}
    assert sizes[:4] == pytest.approx(sizes[4:], rel=0.01)


def test_the_next_save_waits_is_skipped_or_fails(gate):
    with open_run(gate) as run:
        gate.may_write.clear()
        first = run.save_async({"w": weights(0)}, step=0)
        assert run.save_async({"w": weights(1)}, step=1, when_busy="skip") is None
        with pytest.raises(ConflictError, match="step 1: a step is still being saved"):
            run.save_async({"w": weights(1)}, step=1, when_busy="fail")
        with pytest.raises(InvalidInputError, match="when_busy: found 'later'"):
            run.save_async({"w": weights(1)}, step=1, when_busy="later")
        threading.Timer(0.05, gate.may_write.set).start()
        second = run.save_async({"w": weights(1)}, step=1)
        assert first.done()
        third = run.save({"w": weights(2)}, step=2)
        assert second.done()
        assert (third.step, run.steps()) == (2, [0, 1, 2])


@pytest.mark.parametrize("told_by", ["wait", "save", "save_async", "close", "with"])
def test_an_error_is_raised_once_by_whatever_comes_first(gate, told_by):
    run = open_run(gate)
    run.save({"w": weights(0)}, step=0)
    gate.error = StorageError("packs: the disk is full", errno=28)
    pending = run.save_async({"w": weights(1)}, step=1)
    tell = {
        "wait": pending.wait,
        "save": lambda: run.save({"w": weights(2)}, step=2),
        "save_async": lambda: run.save_async({"w": weights(2)}, step=2),
        "close": run.close,
        "with": lambda: run.__enter__().__exit__(None, None, None),
    }[told_by]
    with pytest.raises(StorageError, match="the disk is full"):
        tell()
    gate.error = None
    assert run.steps() == [0]
    assert run.save({"w": weights(2)}, step=2).step == 2
    run.close()
    assert pending.done()


def test_an_error_does_not_hide_what_ends_a_block(gate):
    def block() -> None:
        with open_run(gate) as run:
            gate.error = StorageError("packs: the disk is full", errno=28)
            run.save_async({"w": weights(1)}, step=1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()


def test_what_cannot_be_saved_is_told_at_once_and_the_run_goes_on(gate):
    with open_run(gate) as run:
        with pytest.raises(InvalidInputError):
            run.save_async({"w": object()}, step=0)
        with pytest.raises(InvalidInputError):
            run.save_async({"w": weights(0)}, step=-1)
        run.save_async({"w": weights(0)}, step=0).wait()
        with pytest.raises(AlreadyExistsError):
            run.save_async({"w": weights(0)}, step=0)
        assert run.save_async({"w": weights(1)}, step=1).wait().step == 1
        assert run.steps() == [0, 1]
    assert not gate.names("sessions/")


def test_what_fails_while_it_is_copied_leaves_nothing(gate):
    def broken():
        raise RuntimeError("the device is gone")

    run = open_run(gate)
    tensors = [
        Tensor("a", "uint8", (3,), "numpy", np.zeros(3, np.uint8)),
        Deferred("b", "uint8", (3,), "numpy", broken),
    ]
    queue = Queue(lambda: None)
    staging = Staging(None, 0.0, queue)
    with pytest.raises(RuntimeError, match="the device is gone"):
        staging.stage(looks(tensors, [0, 1], Memory(), lambda known: True, watch(2)))
    received = queue.received(lambda: 0)
    assert next(received).at == 0
    queue.fail(RuntimeError("the device is gone"))
    with pytest.raises(StoppedError, match="RuntimeError while the state was copied: the device is gone"):
        next(received)
    assert run.steps() == []


def test_a_timeout_is_no_failure(gate):
    with open_run(gate) as run:
        gate.may_write.clear()
        pending = run.save_async({"w": weights(0)}, step=0)
        with pytest.raises(TimeoutError, match=r"step 0: not saved after 0\.01 s"):
            pending.wait(0.01)
        gate.may_write.set()
        assert pending.wait(20).step == 0


# -- memory


def test_copies_stay_within_the_bound_and_the_save_goes_in_waves():
    """Eight tensors of 400 kB through 1 MB: each wave is saved before the next is copied."""
    state = {str(i): weights(i) for i in range(8)}
    held, most = [0], [0]
    with open_run(MemoryBackend(), memory_max=1_000_000) as run:
        for step in range(3):
            run.save_async(state, step=step).wait()
            assert run._turns.saver.shadow.size <= 333_333
            found = run.load(step)
            assert all(np.array_equal(found[name], state[name]) for name in state)
            state = {name: value * np.float32(1.0001) for name, value in state.items()}

    tensors = [
        Tensor(name, "float32", value.shape, "numpy", value.view(np.uint8)) for name, value in state.items()
    ]
    waves = []

    def settle() -> int:
        waves.append(held[0])
        most[0] = max(most[0], held[0])
        held[0] = 0
        return 0

    def take() -> None:
        for look in queue.received(settle):
            assert look.is_own
            held[0] += look.tensor.size
        settle()

    thread = threading.Thread(target=take)
    queue = Queue(thread.start)
    staging = Staging(1_000_000, 0.0, queue)
    staging.stage(looks(tensors, range(8), Memory(), lambda known: True, watch(8)))
    thread.join()
    assert most[0] == 800_000
    assert len(waves) == 4


def test_a_tensor_larger_than_the_bound_is_saved_before_save_async_returns(gate):
    w = weights(0)
    with open_run(gate, memory_max=1000) as run:
        threading.Timer(0.1, gate.may_write.set).start()
        gate.may_write.clear()
        pending = run.save_async({"w": w, "small": weights(1, 10)}, step=0)
        assert gate.may_write.is_set()
        expected = w.copy()
        w[:] = 0
        report = pending.wait()
        assert report.stall_s >= 0.1
        assert np.array_equal(run.load(0)["w"], expected)
    with pytest.raises(InvalidInputError, match="memory_max: found -1"):
        open_run(gate, memory_max=-1)


def test_nobody_waits_for_room_when_the_save_has_failed(gate):
    gate.error = StorageError("packs: the disk is full", errno=28)
    run = open_run(gate, memory_max=1_000_000)
    pending = run.save_async({str(i): weights(i) for i in range(8)}, step=0)
    with pytest.raises(StorageError):
        pending.wait()
    assert run.steps() == []


def test_a_state_that_changes_while_it_is_saved_is_no_step(monkeypatch):
    w = weights(0)
    encode_all = session.codecs.encode_all

    def meanwhile(chunks, **how):
        encoded = encode_all(chunks, **how)
        w[50_000] += 1
        return encoded

    run = open_run(MemoryBackend())
    with monkeypatch.context() as patch:
        patch.setattr(session.codecs, "encode_all", meanwhile)
        with pytest.raises(InvalidInputError, match="the state changed while it was saved"):
            run.save({"w": w}, step=0)
        assert run.steps() == []
        pending = run.save_async({"w": w}, step=0)  # a copy does not change
        assert pending.wait().step == 0
    run.save({"w": w}, step=1)
    assert np.array_equal(run.load(1)["w"], w)


# -- processes


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_program_that_ends_waits_for_its_last_save(tmp_path):
    done = python(
        """
        import sys, numpy as np
        from deltackpt import differences, open_run, session
        run = open_run(sys.argv[1])
        w = np.random.default_rng(0).standard_normal(4_000_000).astype(np.float32)
        run.save_async({"w": w}, step=0)
        run.save_async({"w": w * np.float32(1.001)}, step=1)
        """,
        str(tmp_path / "store"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert open_run(tmp_path / "store").steps() == [0, 1]
    assert open_run(tmp_path / "store").load(1)["w"].size == 4_000_000


def test_a_program_killed_in_a_save_leaves_the_step_before(tmp_path):
    done = python(
        """
        import os, signal, sys, threading, numpy as np
        from deltackpt import differences, open_run, session
        run = open_run(sys.argv[1])
        w = np.random.default_rng(0).standard_normal(4_000_000).astype(np.float32)
        run.save({"w": w}, step=0)
        run.save_async({"w": w * np.float32(1.001)}, step=1)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        str(tmp_path / "store"),
    )
    assert done.returncode == -9
    run = open_run(tmp_path / "store")
    assert run.steps() in ([0], [0, 1])  # a fast one may be through
    assert run.load()["w"].size == 4_000_000
    assert run.save({"w": weights(0)}, step=2).step == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_neither_waits_for_its_parents_save_nor_ends_it(tmp_path):
    done = python(
        """
        import os, sys, threading, numpy as np
        from deltackpt import differences, open_run, session
        from deltackpt.errors import InvalidInputError
        run = open_run(sys.argv[1])
        w = np.random.default_rng(0).standard_normal(4_000_000).astype(np.float32)
        pending = run.save_async({"w": w}, step=0)
        child = os.fork()
        if not child:
            try:
                run.save({"w": w[:1000]}, step=6)
            except InvalidInputError as e:
                assert "forked while a step was saved" in str(e)
            with open_run(sys.argv[1], "child") as own:
                own.save({"w": w[:1000]}, step=7)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        pending.wait()
        assert run.steps()[0] == 0
        assert open_run(sys.argv[1], "child").steps() == [7]
        """,
        str(tmp_path / "store"),
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_saves_of_two_threads_take_turns(gate):
    run = open_run(gate)
    errors = []

    def work(first: int) -> None:
        try:
            for step in range(first, 20, 2):
                saved = run.save_async({"w": weights(step, 5000)}, step=step)
                if step % 4 < 2:
                    saved.wait()
        except Exception as e:  # pragma: no cover
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.close()
    assert errors == []
    assert run.steps() == list(range(20))


def test_who_is_told_of_a_save_may_save_again():
    told = []

    def again(report) -> None:
        told.append(report.step)
        if report.step < 3:
            run.save({"w": weights(report.step)}, step=report.step + 1)

    run = open_run(MemoryBackend(), on_save=again)
    run.save_async({"w": weights(9)}, step=0).wait()
    run.close()
    assert (told, run.steps()) == ([0, 1, 2, 3], [0, 1, 2, 3])


def test_nobody_waits_for_a_save_in_what_it_calls():
    told = []

    def wait(report) -> None:
        with pytest.raises(InvalidInputError, match="on_save cannot wait for its own save"):
            pendings[0].wait()
        told.append(report.step)

    gate = Gate()
    gate.may_write.clear()
    run = open_run(gate, on_save=wait)
    pendings = [run.save_async({"w": weights(9)}, step=0)]
    gate.may_write.set()
    pendings[0].wait()
    assert told == [0]


@pytest.mark.parametrize("where", range(8))
def test_an_interrupt_anywhere_leaves_no_lock_and_no_thread(monkeypatch, where):
    """As Ctrl-C or a SIGTERM handler that raises may come in any call."""
    run = open_run(MemoryBackend())
    run.save({"w": weights(0)}, step=0)
    n_threads = threading.active_count()
    targets = [
        (Saver, "prepare"),
        (Saver, "open"),
        (Saver, "before"),
        (turns.tree, "flatten"),
        (turns.snapshot, "order_of"),
        (turns.Staging, "_stage"),
        (turns.Staging, "stage"),
        (turns.Pending, "begin"),
    ]
    target, name = targets[where]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.save_async({"w": weights(1)}, step=1)
    assert run.save_async({"w": weights(1)}, step=2).wait(20).step == 2
    run.close()
    assert run.steps() == [0, 2]
    assert not run.store.backend.names("sessions/")
    assert threading.active_count() <= n_threads + 4  # workers


def test_an_interrupt_of_a_later_wave_ends_the_save(monkeypatch):
    stage, n = Staging._stage, []

    def interrupted(self, found):
        n.append(1)
        if len(n) > 4:
            raise KeyboardInterrupt
        stage(self, found)

    run = open_run(MemoryBackend(), memory_max=1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "_stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.save_async({str(i): weights(i) for i in range(8)}, step=0)
    assert run.save_async({"w": weights(1)}, step=2).wait(20).step == 2
    assert run.steps() == [2]


def test_what_is_saved_is_held_by_the_copies_alone(gate):
    w = weights(0)
    alive = weakref.ref(w)
    run = open_run(gate)
    gate.may_write.clear()
    pending = run.save_async({"w": w}, step=0)
    del w
    gc.collect()
    assert alive() is None
    gate.may_write.set()
    pending.wait()


def test_a_failed_save_holds_no_copies(gate):
    run = open_run(gate)
    gate.error = StorageError("packs: the disk is full", errno=28)
    copies = []
    of = staging_module._Copies.of

    def noted(self, data):
        copy = of(self, data)
        copies.append(weakref.ref(copy.base if copy.base is not None else copy))
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging_module._Copies, "of", noted)
        pending = run.save_async({"w": weights(0)}, step=0)
        with pytest.raises(StorageError):
            pending.wait()
    gc.collect()
    assert copies
    assert not [copy for copy in copies if copy() is not None]


def test_what_did_not_change_takes_no_memory_though_it_had_to_be_copied_to_be_looked_at():
    """As tensors on a device are."""
    state = {str(i): np.repeat(weights(i), 2)[::2] for i in range(8)}
    with open_run(MemoryBackend(), memory_max=1_000_000) as run:
        run.save(state, step=0)
        state["0"] += 1
        tensors = turns.tree.flatten(state).tensors
        queue = Queue(lambda: None)
        staging = Staging(1_000_000, 0.0, queue)
        staging.stage(looks(tensors, range(8), run._turns.saver.memory, lambda known: True, watch(8)))
        held = {
            len(set(look.tensor.data.strides)) and look.tensor.data.strides
            for look in queue.received(lambda: 0)
        }
        assert held == {(0,), (1,)}


def test_a_pool_that_cannot_start_threads_calls_everything_once(monkeypatch):
    called = []
    pool = ThreadPoolExecutor(4)
    start = threading.Thread.start
    n = []

    def fails(self):
        n.append(1)
        if len(n) > 1:
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        futures = [submit(pool, lambda i=i: (time.sleep(0.01), called.append(i))) for i in range(8)]
        for future in futures:
            future.result()
    pool.shutdown()
    assert sorted(called) == list(range(8))


@pytest.mark.parametrize("kernel", ["lengths_ref", "group_ref", "count_changed_ref", "group_all", "take"])
def test_a_state_that_changes_while_it_is_compared_is_told_so(monkeypatch, kernel):
    n = 100_000
    old = weights(0, n)
    run = open_run(MemoryBackend())
    run.save({"w": old.copy()}, step=0)
    w = old * np.float32(1.00001) if kernel in ("lengths_ref", "group_ref") else old.copy()
    w[::10] += 1
    function = getattr(differences, kernel)

    def meanwhile(*arguments, **options):
        found = function(*arguments, **options)
        w.view(np.uint32)[1::2] += np.uint32(12_345)
        return found

    with monkeypatch.context() as patch:
        if kernel.endswith("_ref"):  # what C does in one call the twin does in steps
            patch.setattr(differences, "_native", None)
        patch.setattr(differences, kernel, meanwhile)
        with pytest.raises(InvalidInputError, match="the state changed while it was saved"):
            run.save({"w": w}, step=1)
    assert run.steps() == [0]


def test_a_base_that_changes_under_its_cast_is_told_too(monkeypatch):
    w = weights(0)
    encode_all, calls = session.codecs.encode_all, []

    def meanwhile(chunks, **how):
        if any(chunk.base is not None and chunk.base.cast for chunk in chunks):
            w[0] += 1
            calls.append(1)
        return encode_all(chunks, **how)

    run = open_run(MemoryBackend())
    with monkeypatch.context() as patch:
        patch.setattr(session.codecs, "encode_all", meanwhile)
        with pytest.raises(InvalidInputError, match="the state changed while it was saved"):
            run.save({"w": w, "h": w.astype(np.float16)}, step=0)
    assert calls
    assert run.steps() == []
