"""Processes are killed with SIGKILL: those that save, forget and collect, at every system call of every scene
and at any time; those that train, and those that save for them."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from cores import spread
from faults import HookedOs, contents
from scenes import SCENES, check_usable, made, saved, state, visible, with_, without
from steps import assert_steps, opened, same

from deltackpt import gc, open_run, process, proxy
from deltackpt.backends.local import LocalBackend
from deltackpt.errors import AlreadyExistsError, StorageError
from deltackpt.run import Run
from deltackpt.store import open_store
from deltackpt.verify import verify

SEED = int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(1 << 32))
#: Of so many system calls of a scene one is tried; KILL_STRIDE=1: every one.
STRIDE = int(os.environ.get("KILL_STRIDE") or 4)
N_BY_TIME = 20
N_TRAININGS, N_SAVERS, N_CALLS_OF_A_SAVE = 6, 8, 70
N_PARTS = 4

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def cycles(backend):
    """Two cycles of saves, a forget and a gc, with one run that stays open."""
    run = opened(backend)
    for step in (3, 4, 5, 6):
        run.save(state(step), step=step)
        if step % 2 == 0:
            run.forget([step // 2 - 1])
            gc.collect(run.store)


ACTS = SCENES | {
    "two cycles of one process": (
        saved(1, 2),
        cycles,
        lambda before: without(1, 2)(with_([3, 4, 5, 6])(before)),
    )
}


class Child:
    """A forked process at work on a store; what it says is told line by line."""

    def __init__(self, work, path, hook=lambda call, *args: None):
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                backend = LocalBackend(path, calls=HookedOs(hook))
                work(backend, lambda line: os.write(write, f"{line}\n".encode()))
            finally:
                os._exit(0)
        os.close(write)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def told(self):
        """Every line, and whether it was killed, once it is dead."""
        with os.fdopen(self._read) as lines:
            told = lines.read().split("\n")[:-1]
        _, status = os.waitpid(self.pid, 0)
        return told, os.WIFSIGNALED(status)


def at_call(nth):
    """Dies at the nth system call from now on."""
    calls = itertools.count()

    def hook(call, *args):
        if next(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def telling(act):
    """An act that tells before each forget, and after each save and each forget."""

    def work(backend, say):
        save, forget = Run.save, Run.forget

        def told_save(run, *args, step, **kwargs):
            report = save(run, *args, step=step, **kwargs)
            say(f"saved {step}")
            return report

        def told_forget(run, steps, **kwargs):
            say("".join(f"forget {step}\n" for step in steps).strip())
            forget(run, steps, **kwargs)
            say("".join(f"forgot {step}\n" for step in steps).strip())

        Run.save, Run.forget = told_save, told_forget  # in a child that does nothing else
        act(backend)
        say("done")

    return work


def assert_kept(a_scene, found, told):
    """What was acknowledged is there, and nothing is half there."""
    assert a_scene.is_new(found) if "done" in told else a_scene.is_old_or_new(found)
    for line in told:
        word, _, step = line.partition(" ")
        step = int(step or 0)
        if word == "saved" and f"forget {step}" not in told:
            assert step in found
            assert step not in a_scene.after or same(found[step], a_scene.after[step])
        if word == "forgot":
            assert step not in found


def dead():
    """The identity of a process that is dead: what is there before a scene is not left by this one."""
    return {**_identity(), "start": -1}


_identity = process.identity


def killed_in(job):
    """Kill a scene at every `STRIDE`-th system call of one part of `N_PARTS`; how many, and what failed."""
    name, part, stride, shift = job
    failed = []
    n_points = 0
    with pytest.MonkeyPatch.context() as patched, tempfile.TemporaryDirectory(dir=room()) as room_:
        with pytest.MonkeyPatch.context() as earlier:
            earlier.setattr(process, "identity", dead)
            earlier.setitem(SCENES, name, ACTS[name])
            a_scene = made(name, patched)
        path = Path(room_) / "store"
        for nth in range(shift + part * stride, 1 << 30, N_PARTS * stride):
            for file, data in a_scene.objects.items():
                (path / file).parent.mkdir(parents=True, exist_ok=True)
                (path / file).write_bytes(data)
            told, is_killed = Child(telling(a_scene.act), path, at_call(nth)).told()
            try:
                assert is_killed or "done" in told
                found = visible(path)
                assert_kept(a_scene, found, told)
                # By its own patience: it knows that the dead are dead.
                check_usable(a_scene, LocalBackend(path), found, collect=collected)
            except Exception as e:
                failed.append(f"{name}, killed at call {nth}, told {told}: {e!r}")
            shutil.rmtree(path, ignore_errors=True)
            if not is_killed:
                break
            n_points += 1
    return n_points, failed


def collected(path, **kwargs):
    assert not gc.collect(path, **kwargs).waiting_for


def room():
    """Where files are made at once, if there is such a place: no power is lost here."""
    return next((path for path in ("/dev/shm",) if os.access(path, os.W_OK)), None)


def test_killed_at_any_system_call_of_any_scene_it_leaves_whole_steps_and_nothing_in_the_way():
    shift = SEED % STRIDE
    jobs = [(name, part, STRIDE, shift) for part in range(N_PARTS) for name in ACTS]
    n_points, failed = 0, []
    for n, wrong in spread(killed_in, jobs):
        n_points += n
        failed += wrong
    print(f"killed at {n_points} system calls, one of {STRIDE}, seed {SEED}")
    assert not failed, f"{len(failed)} of {n_points}, seed {SEED}:\n" + "\n".join(failed[:20])
    assert n_points >= min(1000, 4000 // STRIDE)


# -- at any time


def saves_on(backend, say):
    run = opened(backend)
    for step in range((run.latest() or 0) + 1, 10_000):
        run.save(state(step), step=step)
        say(f"saved {step}")


def check(path, acknowledged):
    """What was acknowledged is there, nothing is half there, and nothing dead stands in the way or stays."""
    found = visible(path)
    assert acknowledged <= found.keys()
    assert_steps(found, {step: state(step) for step in found})
    following = max(found, default=0) + 1
    opened(path).save(state(following), step=following)
    expected = visible(path)
    for _ in range(2):
        collected(path)
        assert_steps(visible(path), expected)
    backend = open_store(path).backend
    assert not backend.list("sessions/")
    assert not backend.list("tmp/")
    assert len(backend.list("manifests/")) == len(expected)
    assert gc.collect(path, dry_run=True).n_dead == 0
    assert verify(path, level="decode").clean


def test_killed_at_any_time_it_leaves_whole_steps_and_nothing_in_the_way(tmp_path):
    rng = random.Random(SEED)
    path = tmp_path / "store"
    opened(path)
    kept = set()
    for nth in range(N_BY_TIME):
        child = Child(saves_on, path)
        time.sleep(rng.uniform(0.002, 0.08))
        child.kill()
        told, _ = child.told()
        kept |= {int(line.split()[1]) for line in told}
        try:
            check(path, kept)
        except BaseException:
            print(f"seed {SEED}: kill {nth}", told)
            raise
        opened(path).forget(opened(path).steps()[:-2])
        kept &= set(opened(path).steps())


# -- of the two that save in the background, either


def moving(step):
    """Weights, most of which move: large enough that a save takes a while."""
    rng = np.random.default_rng(step)
    return {"frozen": np.arange(50_000), "w": rng.standard_normal(300_000).astype(np.float32), "step": step}


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for_end(pid):
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} outlives the one it saves for"
        time.sleep(0.02)


def check_moving(path, acknowledged):
    """As `check`, of steps saved in the background."""
    found = visible(path)
    assert acknowledged <= found.keys()
    assert_steps(found, {step: moving(step) for step in found})
    following = max(found, default=0) + 1
    with open_run(path) as run:
        run.save_async(moving(following), step=following).wait()
    expected = found | {following: moving(following)}
    collected(path)
    assert_steps(visible(path), expected)
    assert not contents(LocalBackend(path), "sessions/")
    assert not contents(LocalBackend(path), "tmp/")
    assert verify(path, level="decode").clean


TRAINS = """
    import sys
    sys.path[:0] = sys.argv[2:]
    from test_kill import moving
    from deltackpt import open_run
    with open_run(sys.argv[1]) as run:
        first = step = (run.latest() or 0) + 1
        while True:
            pending = run.save_async(moving(step), step=step)
            if step == first:
                print("pid", run._turns.proxy.pid, flush=True)
            pending.wait()
            print("saved", step, flush=True)
            step += 1
"""


@pytest.mark.skipif(not proxy.address(LocalBackend("/")), reason="only threads save in the background here")
def test_a_killed_training_takes_its_saving_process_along_and_no_step_is_half_there(tmp_path):
    rng = random.Random(SEED)
    path = tmp_path / "store"
    kept = set()
    for nth in range(N_TRAININGS):
        tests = [str(Path(__file__).parent), str(Path(open_run.__code__.co_filename).parents[1])]
        command = [sys.executable, "-c", textwrap.dedent(TRAINS), str(path), *tests]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as training:
            word, _, pid = training.stdout.readline().partition(" ")
            assert word == "pid"
            time.sleep(rng.uniform(0, 0.3))
            training.kill()
            told = training.stdout.read().split("\n")[:-1]
        kept |= {int(line.split()[1]) for line in told}
        try:
            wait_for_end(int(pid))
            check_moving(path, kept)
        except BaseException:
            print(f"seed {SEED}: training {nth}", told)
            raise


@pytest.mark.skipif(not proxy.address(LocalBackend("/")), reason="only threads save in the background here")
def test_a_saving_process_killed_at_any_system_call_is_told_and_replaced(tmp_path, monkeypatch):
    rng = random.Random(SEED)
    path = tmp_path / "store"
    code = proxy._CODE
    dies = "sys.path.append({tests!r}); import test_kill; test_kill.die_at({nth}); from deltackpt.server"
    kept = set()
    n_killed = 0
    with open_run(path) as run:
        for step in range(N_SAVERS):
            nth = rng.randrange(N_CALLS_OF_A_SAVE)
            armed = dies.format(tests=str(Path(__file__).parent), nth=nth)
            monkeypatch.setattr(proxy, "_CODE", code.replace("from deltackpt.server", armed))
            run._turns._stop_proxy()
            try:
                run.save_async(moving(step), step=step).wait()
                kept.add(step)
            except StorageError as e:
                n_killed += "ended by itself (-9)" in e.message
            monkeypatch.setattr(proxy, "_CODE", code)
            try:
                with suppress(AlreadyExistsError):  # it was decided, only nobody was told
                    run.save_async(moving(step), step=step).wait()
                    run._turns._stop_proxy()
                kept.add(step)
                found = visible(path)
                assert_steps(found, {step: moving(step) for step in kept})
            except BaseException:
                print(f"seed {SEED}: step {step}, killed at call {nth}")
                raise
    assert n_killed
    check_moving(path, kept)


def die_at(nth):
    """Have this process die at the nth system call of its local backends."""
    hook, make = at_call(nth), LocalBackend.__init__

    def hooked(self, path):
        make(self, path, calls=HookedOs(hook))

    LocalBackend.__init__ = hooked
