"""Saves by another process: as those of this one, whoever of the two is killed, forked or out of memory."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing import Pipe

import numpy as np
import pytest

from deltackpt import errors, last, open_run, proxy, turns
from deltackpt.arena import Arena, Place, Window
from deltackpt.backends.local import LocalBackend
from deltackpt.backends.osshim import Os
from deltackpt.errors import (
    AlreadyExistsError,
    ConflictError,
    DeltackptError,
    InvalidInputError,
    StorageError,
)
from deltackpt.gc import collect
from deltackpt.staging import Staging
from deltackpt.wire import Found, Logged, PromptWire, Settle, Wire, portable


def weights(seed: int, n: int = 100_000) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


@pytest.fixture
def sent(monkeypatch) -> list[Found]:
    """All tensors that went to another process."""
    found = []
    flush = proxy.Proxy._flush
    monkeypatch.setattr(proxy.Proxy, "_flush", lambda self: (found.extend(self._found), flush(self)))
    return found


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def python(code: str, *arguments: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert check is None or (done.returncode, done.stderr) == (check, "")
    return done


def test_the_state_may_change_at_once_and_comes_back_as_it_was(tmp_path, sent):
    state = {
        "w": weights(0),
        "frozen": weights(1),
        "strided": weights(2)[::2],
        "empty": np.zeros(0),
        "step": 0,
    }
    saved = []
    with open_run(tmp_path) as run:
        for step in range(4):
            state["w"] *= np.float32(1.0001)
            state["step"] = step
            saved.append({name: np.array(value) for name, value in state.items()})
            pending = run.save_async(state, step=step)
            assert run._turns.proxy is not None
            w = state["w"].copy()
            state["w"][:] = 0
            report = pending.wait()
            state["w"][:] = w
            assert report.stall_s < report.total_s
            assert report.energy.joules > 0
        assert [found.place is not None for found in sent] == [True] * 3 + [True, False, False] * 3
        for step in range(4):
            found = run.load(step)
            assert all(np.array_equal(found[name], saved[step][name]) for name in state)


def test_it_stores_what_a_save_that_waits_stores(tmp_path):
    sizes = []
    for saves in ("save", "save_async"):
        w = weights(0)
        with open_run(tmp_path / saves) as run:
            for step in range(4):
                saved = getattr(run, saves)({"w": w, "copy": w.astype(np.float16)}, step=step)
                report = saved if saves == "save" else saved.wait()
                sizes.append(report.new_size)
                assert step == 0 or "delta-dense" in report.groups[0].codecs
                assert run.load(step)["w"].tobytes() == w.tobytes()
                w = w * np.float32(1 + 1e-5)
    assert sizes[:4] == sizes[4:]


def test_a_save_that_waits_goes_on_from_one_in_the_background_and_the_other_way(tmp_path, sent):
    state = {"w": weights(0), "frozen": weights(1)}
    with open_run(tmp_path) as run:
        run.save(state, step=0)
        assert run._turns.proxy is None
        state["w"] *= np.float32(1.0001)
        run.save_async(state, step=1).wait()
        assert [found.place is not None for found in sent] == [True, False]  # nothing was forgotten
        state["w"] *= np.float32(1.0001)
        report = run.save(state, step=2)
        assert report.stall_s == report.total_s
        assert "delta-dense" in report.groups[0].codecs
        assert [commit.parent for commit in run.commits()] == [None, 0, 1]
        assert all(np.array_equal(run.load()[name], state[name]) for name in state)


def test_a_job_that_goes_on_takes_deltas_against_the_step_it_found(tmp_path):
    w = weights(0)
    open_run(tmp_path).save({"w": w}, step=0)
    with open_run(tmp_path) as run:
        report = run.save_async({"w": w * np.float32(1.0001), "new": weights(1, 1000)}, step=1).wait()
        assert "delta-dense" in report.groups[0].codecs
        assert run._keeper.resumed == 0


def test_what_cannot_be_saved_is_told_at_once(tmp_path):
    with open_run(tmp_path) as run:
        run.save_async({"w": weights(0)}, step=0).wait()
        pid = run._turns.proxy.pid
        with pytest.raises(AlreadyExistsError, match="has step 0 already"):
            run.save_async({"w": weights(1)}, step=0)
        with pytest.raises(InvalidInputError):
            run.save_async({"w": object()}, step=1)
        assert run.save_async({"w": weights(1)}, step=0, overwrite=True).wait().step == 0
        assert run._turns.proxy.pid == pid
        assert np.array_equal(run.load()["w"], weights(1))


def test_a_state_without_arrays_has_none_of_the_step_before(tmp_path):
    with open_run(tmp_path) as run:
        run.save_async({"w": weights(0)}, step=0).wait()
        run.save_async({"lr": 0.5}, step=1).wait()
        assert (run.load(1), run.manifest(1).tensors) == ({"lr": 0.5}, [])
        run.save_async({"w": weights(0)}, step=2).wait()
        assert np.array_equal(run.load()["w"], weights(0))


def test_an_error_is_told_once_and_the_run_goes_on(tmp_path):
    with open_run(tmp_path) as run:
        run.save_async({"w": weights(0)}, step=0).wait()
        (tmp_path / "packs").rename(tmp_path / "away")
        pending = run.save_async({"w": weights(1)}, step=1)
        with pytest.raises(StorageError, match="No such file") as caught:
            pending.wait()
        assert caught.value.errno == 2
        assert "In the process that saves" in caught.value.__notes__[0]
        (tmp_path / "away").rename(tmp_path / "packs")
        assert run.steps() == [0]
        assert run.save_async({"w": weights(1)}, step=2).wait().step == 2
        assert np.array_equal(run.load()["w"], weights(1))
    assert not list((tmp_path / "sessions").iterdir())


def test_what_it_logs_is_logged_here(tmp_path, caplog):
    w = weights(0, 1_000_000)
    with open_run(tmp_path, shadow=0) as run, caplog.at_level(logging.WARNING, "deltackpt"):
        run.save_async({"w": w}, step=0).wait()
        for pack in (tmp_path / "packs").rglob("*.*"):
            data = bytearray(pack.read_bytes())
            data[1000:-1000] = bytes(len(data) - 2000)
            pack.chmod(0o600)
            pack.write_bytes(data)
        run.save_async({"w": w * np.float32(1.0001)}, step=1).wait()
        assert "stored whole" in caplog.text
        assert np.array_equal(run.load(1)["w"], w * np.float32(1.0001))


def test_packs_that_gc_condemned_are_not_relied_on(tmp_path, sent):
    state = {"w": weights(0), "frozen": weights(1)}
    with open_run(tmp_path) as run:
        run.save_async(state, step=0).wait()
        run.forget([0])
        collect(run.store)  # condemns the packs that nobody uses
        state["w"] *= np.float32(1.0001)
        run.save_async(state, step=1).wait()
        assert [found.place is not None for found in sent] == [True, True, True, True]
        collect(run.store)
        collect(run.store)
        assert all(np.array_equal(run.load()[name], state[name]) for name in state)


def test_neither_waits_for_the_other_however_much_is_logged():
    """Both send more than a socket holds before they receive."""
    left, right = Pipe()
    trains, saves = Wire(left), PromptWire(right)

    def save() -> None:
        for _ in range(20_000):
            saves.send(Logged(logging.WARNING, "stored whole"))
        assert [saves.receive() for _ in range(20_000)] == [Settle()] * 20_000

    def train() -> None:
        for _ in range(20_000):
            trains.send(Settle())
        assert {trains.receive() for _ in range(20_000)} == {Logged(logging.WARNING, "stored whole")}

    threads = [threading.Thread(target=end, daemon=True) for end in (save, train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    trains.close()
    for _ in range(2):  # whoever asks again is told again
        with pytest.raises(EOFError):
            saves.receive()


def test_a_path_that_imports_pass_over_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    with open_run(tmp_path / "store") as run:
        assert run.save_async({"w": weights(0)}, step=0).wait().step == 0


# -- memory


def test_an_arena_uses_pieces_again_and_gives_back_what_is_not_needed():
    arena = Arena()
    window = Window(arena.fd)
    first = [arena.place(weights(i, 10).view(np.uint8)) for i in range(3)]
    big = arena.place(weights(9, 10_000_000).view(np.uint8))
    assert [place.piece for place in first] == [0, 0, 0]
    assert big == Place(4 << 20, 40_001_536, 0, 40_000_000)
    held = [window.at(place) for place in first]
    assert [np.array_equal(a.view(np.float32), weights(i, 10)) for i, a in enumerate(held)] == [True] * 3
    assert window.held() == [0]
    arena.keep(window.held())
    again = arena.place(weights(8, 9_000_000).view(np.uint8))
    assert again.piece == big.piece  # the same size, about
    del held
    assert window.held() == []
    arena.keep([])
    arena.trim(5 << 20)  # only the small one has room
    assert 0 < os.fstat(arena.fd).st_blocks * 512 <= 4 << 20
    arena.trim()
    assert os.fstat(arena.fd).st_blocks == 0
    arena.close()


def test_copies_stay_within_the_bound(tmp_path, monkeypatch):
    """Eight tensors of 6 MB through 24 MB, of which the shadow may have a third."""
    state = {str(i): weights(i, 1_500_000) for i in range(8)}
    waves, most = [], []
    settle, place = proxy.Proxy.settle, Arena.place

    def settled(self) -> int:
        waves.append(settle(self))
        return waves[-1]

    def placed(self, data):
        found = place(self, data)
        most.append(os.fstat(self.fd).st_blocks * 512)
        return found

    monkeypatch.setattr(proxy.Proxy, "settle", settled)
    monkeypatch.setattr(Arena, "place", placed)
    with open_run(tmp_path, memory_max=24_000_000) as run:
        for step in range(3):
            run.save_async(state, step=step).wait()
            assert run._turns.proxy.shadow_size == 6_000_000
            found = run.load(step)
            assert all(np.array_equal(found[name], state[name]) for name in state)
            state = {name: value * np.float32(1.0001) for name, value in state.items()}
    assert len(waves) == 2 + 3 + 3
    assert 18_000_000 < max(most) <= 24_000_000 + 8 * 4096


def test_a_save_that_fails_in_a_wave_leaves_the_shadow(tmp_path, monkeypatch, caplog):
    line = proxy.Proxy.line

    def without_room(*args):
        (tmp_path / "tmp").rename(tmp_path / "away")
        (tmp_path / "tmp").touch()
        return line(*args)

    state = {str(i): weights(i, 1_500_000) for i in range(8)}
    with open_run(tmp_path, memory_max=24_000_000) as run:
        run.save_async(state, step=0).wait()
        arena = run._turns.proxy._arena
        held = len(arena._pieces) - len(arena._free)
        state = {name: value * np.float32(1.0001) for name, value in state.items()}
        with monkeypatch.context() as patch:
            patch.setattr(proxy.Proxy, "line", without_room)
            pending = run.save_async(state, step=1)
        with pytest.raises(StorageError):
            pending.wait()
        (tmp_path / "tmp").unlink()
        (tmp_path / "away").rename(tmp_path / "tmp")
        run.save_async(state, step=2).wait()
        assert len(arena._pieces) - len(arena._free) == held
        assert "its shadow in memory has changed" not in caplog.text
        found = run.load()
        assert all(np.array_equal(found[name], state[name]) for name in state)


def test_a_tensor_that_has_no_room_is_saved_by_a_thread(tmp_path):
    with open_run(tmp_path, memory_max=900_000) as run:
        run.save_async({"w": weights(0, 50_000)}, step=0).wait()
        assert run._turns.proxy is not None
        run.save_async({"w": weights(0, 50_000), "large": weights(1)}, step=1).wait()
        assert run._turns.proxy is None
        assert np.array_equal(run.load()["large"], weights(1))
        assert run.commits()[1].parent == 0


def test_only_what_another_process_can_open_is_saved_by_one(tmp_path, monkeypatch):
    class Mine(LocalBackend):
        pass

    assert proxy.address(LocalBackend(tmp_path)) == str(tmp_path)
    assert proxy.address(LocalBackend(tmp_path, calls=Os())) is None
    assert proxy.address(Mine(tmp_path)) is None
    monkeypatch.delattr(os, "memfd_create")
    assert proxy.address(LocalBackend(tmp_path)) is None


@pytest.mark.parametrize("executable", ["/no/python", "/bin/false"])
def test_a_run_does_without_if_no_process_can_be_started(tmp_path, monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    with open_run(tmp_path / "store") as run:
        assert run.save_async({"w": weights(0)}, step=0).wait().step == 0
        assert run._turns.proxy is None


# -- the end of either


@pytest.fixture
def kill_next(monkeypatch):
    """Have the process that saves killed once it has opened its next session."""
    line, armed = proxy.Proxy.line, []

    def killed(self, *arguments):
        if armed:
            armed.clear()
            os.kill(self.pid, signal.SIGKILL)
        return line(self, *arguments)

    monkeypatch.setattr(proxy.Proxy, "line", killed)
    return lambda: armed.append(True)


def test_a_process_that_was_killed_in_a_save_is_told_and_the_next_save_has_another(tmp_path, kill_next):
    with open_run(tmp_path) as run:
        run.save_async({"w": weights(0)}, step=0).wait()
        pid = run._turns.proxy.pid
        kill_next()
        with pytest.raises(StorageError, match=r"the process that saves ended by itself \(-9\)"):
            run.save_async({"w": weights(1)}, step=1).wait()
        assert run.save_async({"w": weights(1)}, step=2).wait().step == 2
        assert run._turns.proxy.pid != pid
        assert run.steps() == [0, 2]
        assert np.array_equal(run.load()["w"], weights(1))


def test_one_that_was_killed_while_nobody_saved_is_replaced(tmp_path):
    with open_run(tmp_path) as run:
        run.save_async({"w": weights(0)}, step=0).wait()
        process = run._turns.proxy._process
        process.kill()
        while process.poll() is None:
            time.sleep(0.01)
        assert run.save_async({"w": weights(1)}, step=1).wait().step == 1
        assert run._turns.proxy.pid != process.pid
        assert np.array_equal(run.load()["w"], weights(1))


def test_what_the_run_saved_itself_is_not_what_it_went_on_from(tmp_path, kill_next):
    with open_run(tmp_path, keep=last(1)) as run:
        for step in range(2):
            run.save_async({"w": weights(step)}, step=step).wait()
        kill_next()
        with pytest.raises(StorageError):
            run.save_async({"w": weights(2)}, step=2).wait()
        for step in range(3, 5):
            run.save_async({"w": weights(step)}, step=step).wait()
        assert run.steps() == [4]


def test_it_ends_with_the_run_or_when_that_is_forgotten(tmp_path):
    pids = []
    with open_run(tmp_path, "a") as run:
        run.save_async({"w": weights(0)}, step=0)
        pids.append(run._turns.proxy.pid)
    run = open_run(tmp_path, "b")
    run.save_async({"w": weights(0)}, step=0).wait()
    pids.append(run._turns.proxy.pid)
    del run
    assert not any(map(is_alive, pids))
    done = python(
        """
        import sys, numpy as np
        from deltackpt import open_run
        run = open_run(sys.argv[1], "c")
        run.save_async({"w": np.zeros(1000)}, step=0)
        print(run._turns.proxy.pid)
        """,
        str(tmp_path),
    )
    assert not is_alive(int(done.stdout))
    assert open_run(tmp_path, "c").steps() == [0]


@pytest.mark.parametrize("when", ["idle", "saving"])
def test_it_ends_with_the_process_it_saves_for(tmp_path, when):
    """Even if a child of that, as a data loader's worker is, still has the wire."""
    done = python(
        """
        import os, signal, sys, time, numpy as np
        from deltackpt import open_run
        run = open_run(sys.argv[1])
        w = np.random.default_rng(0).standard_normal(8_000_000).astype(np.float32)
        run.save_async({"w": w}, step=0).wait()
        print(run._turns.proxy.pid, flush=True)
        if not os.fork():
            os.closerange(0, 3)
            time.sleep(5)
            os._exit(0)
        if sys.argv[2] == "saving":
            run.save_async({"w": w * np.float32(1.0001)}, step=1)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        str(tmp_path),
        when,
        check=-9,
    )
    deadline = time.monotonic() + 4
    while is_alive(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int(done.stdout))
    run = open_run(tmp_path)
    assert run.steps()[0] == 0
    run.load()


def test_signals_to_the_whole_group_do_not_end_a_save(tmp_path):
    """Nor while the process that saves begins."""
    done = python(
        """
        import os, signal, subprocess, sys, numpy as np
        from deltackpt import open_run
        os.setpgrp()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        for number in numbers:
            signal.signal(number, lambda *_: None)

        class Popen(subprocess.Popen):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                for number in numbers:
                    os.killpg(0, number)

        subprocess.Popen = Popen
        run = open_run(sys.argv[1])
        w = np.random.default_rng(0).standard_normal(4_000_000).astype(np.float32)
        run.save_async({"w": w}, step=0).wait()
        pending = run.save_async({"w": w * np.float32(1.0001)}, step=1)
        for number in numbers:
            os.killpg(0, number)
        print(pending.wait().step)
        """,
        str(tmp_path),
    )
    assert done.stdout.split() == ["1"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_a_process_of_its_own(tmp_path):
    python(
        """
        import os, sys, numpy as np
        from deltackpt import open_run
        run = open_run(sys.argv[1])
        w = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
        run.save_async({"w": w}, step=0).wait()
        child = os.fork()
        if not child:
            run.save_async({"w": w + 1}, step=1).wait()
            run.close()
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0
        run.save_async({"w": w + 2}, step=2).wait()
        assert run.steps() == [0, 1, 2]
        """,
        str(tmp_path),
    )


def test_a_thread_that_cannot_be_started_leaves_no_answer_behind(tmp_path, monkeypatch):
    def fails(self) -> None:
        raise RuntimeError("can't start new thread")

    with open_run(tmp_path) as run:
        run.save_async({"w": weights(0)}, step=0).wait()
        with monkeypatch.context() as patch:
            patch.setattr(turns.Pending, "begin", fails)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                run.save_async({"w": weights(1)}, step=1)
        assert run.save_async({"w": weights(2)}, step=2).wait().step == 2
        assert np.array_equal(run.load()["w"], weights(2))


def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next(tmp_path, monkeypatch):
    """An interrupt, and another one while the first is seen to."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with open_run(tmp_path) as run:
        run.save_async({"w": weights(0)}, step=0).wait()
        with monkeypatch.context() as patch:
            patch.setattr(Staging, "stage", interrupted)
            patch.setattr(proxy.Proxy, "finish", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run.save_async({"w": weights(1)}, step=1)
        assert run.save_async({"w": weights(2)}, step=2).wait(20).step == 2
        assert np.array_equal(run.load()["w"], weights(2))


@pytest.mark.parametrize("where", range(8))
def test_an_interrupt_anywhere_leaves_no_lock(tmp_path, monkeypatch, where):
    targets = [
        (proxy.Proxy, "open"),
        (proxy.Proxy, "line"),
        (proxy.Proxy, "copy"),
        (proxy.Proxy, "_flush"),
        (Staging, "stage"),
        (Arena, "place"),
        (proxy.Wire, "send"),
        (proxy.Wire, "receive"),
    ]
    target, name = targets[where]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with open_run(tmp_path) as run:
        run.save_async({"w": weights(0)}, step=0).wait()
        with monkeypatch.context() as patch:
            patch.setattr(target, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                run.save_async({"w": weights(1)}, step=1)
        assert run.save_async({"w": weights(1)}, step=2).wait(20).step == 2
        assert run.steps() == [0, 2]
        assert np.array_equal(run.load()["w"], weights(1))
    if name not in ("send", "receive"):  # then it had to be killed, and gc takes that away
        assert not list((tmp_path / "sessions").iterdir())


# -- errors


@pytest.mark.parametrize(
    "error",
    [
        *(
            kind("what", hint="do")
            for kind in vars(errors).values()
            if str(kind).startswith("<class 'deltackpt")
        ),
        StorageError("what", hint="do", errno=28),
        MemoryError("none left"),
        KeyError("x"),
    ],
    ids=repr,
)
def test_errors_get_across_as_they_are(error):
    try:
        raise error
    except Exception as e:
        found = pickle.loads(pickle.dumps(portable(e)))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert found.args == error.args
    if isinstance(error, DeltackptError):
        assert (found.message, found.hint) == (error.message, error.hint)
    if isinstance(error, StorageError):
        assert found.errno == error.errno
    assert "Traceback" in found.__notes__[0]


def test_errors_of_others_get_across_by_their_names():
    class OddError(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a} and {b}")

    found = pickle.loads(pickle.dumps(portable(OddError(1, 2))))
    assert (type(found), str(found)) == (RuntimeError, "OddError: 1 and 2")
    assert isinstance(portable(ConflictError("a")), ConflictError)
