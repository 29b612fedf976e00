"""A process that saves, forgets and collects is killed with SIGKILL, at any system call and at any time."""

import os
import random
import signal
import time

import pytest
from faults import HookedOs
from steps import assert_steps, floats, noise, opened, repeats, visible

from deltackpt import gc
from deltackpt.backends.local import LocalBackend
from deltackpt.store import open_store
from deltackpt.verify import verify

SEED = random.SystemRandom().randrange(1 << 32)
N_BY_CALL, N_BY_TIME = 80, 20

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def state(step):
    return {
        "stays": noise(1, 3000),
        "moves": floats(step, 700),
        "returns": repeats(step % 2, 4000),
        "step": step,
    }


def life(backend, say):
    """Two cycles of save, forget and gc, each told before and after."""
    run = opened(backend)
    for step in (1, 2, 3, 4, 5, 6):
        say(f"save {step}")
        run.save(state(step), step=step)
        say(f"saved {step}")
        if step in (3, 6):
            say(f"forget {step - 1}")
            run.forget([step - 1])
            say(f"forgot {step - 1}")
            gc.collect(run.store)


def saves_on(backend, say):
    run = opened(backend)
    for step in range((run.latest() or 0) + 1, 10_000):
        run.save(state(step), step=step)
        say(f"saved {step}")


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
        """Every line, once it is dead."""
        with os.fdopen(self._read) as lines:
            told = lines.read().split("\n")[:-1]
        os.waitpid(self.pid, 0)
        return told


def kill_at(nth):
    n_calls = 0

    def hook(call, *args):
        nonlocal n_calls
        if n_calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        n_calls += 1

    return hook


def check(path, told):
    """What was acknowledged is there, nothing is half there, and nothing dead stands in the way or stays."""
    found = visible(path)
    assert_steps(found, {step: state(step) for step in found})
    words = {(verb, int(step)) for verb, step in (line.split() for line in told)}
    for verb, step in words:
        if verb == "saved" and ("forget", step) not in words:
            assert step in found
        if verb == "forgot":
            assert step not in found
    following = max(found, default=0) + 1
    opened(path).save(state(following), step=following)
    expected = visible(path)
    collected = gc.collect(path)
    assert not collected.waiting_for
    assert_steps(visible(path), expected)
    gc.collect(path)
    assert_steps(visible(path), expected)
    assert_only_live_things(path, len(expected))


def assert_only_live_things(path, n_steps):
    backend = open_store(path).backend
    assert not backend.list("sessions/")
    assert not backend.list("tmp/")
    assert len(backend.list("manifests/")) == n_steps
    assert gc.collect(path, dry_run=True).n_dead == 0
    assert verify(path, level="decode").clean


def count_calls(path):
    calls = HookedOs()
    life(LocalBackend(path, calls=calls), lambda line: None)
    return sum(calls.n_calls.values())


def test_killed_at_any_system_call_it_leaves_whole_steps_and_nothing_in_the_way(tmp_path):
    rng = random.Random(SEED)
    n_calls = count_calls(tmp_path / "whole")
    points = sorted(rng.randrange(n_calls) for _ in range(N_BY_CALL))
    for nth in points:
        path = tmp_path / f"{nth}-{rng.random()}"
        path.mkdir()
        check_told(path, Child(life, path, kill_at(nth)), f"seed {SEED}: killed at call {nth} of {n_calls}")


def test_killed_at_any_time_it_leaves_whole_steps_and_nothing_in_the_way(tmp_path):
    rng = random.Random(SEED)
    path = tmp_path / "store"
    opened(path)
    for nth in range(N_BY_TIME):
        child = Child(saves_on, path)
        time.sleep(rng.uniform(0.002, 0.08))
        child.kill()
        check_told(path, child, f"seed {SEED}: kill {nth}")
        opened(path).forget(opened(path).steps()[:-2])


def check_told(path, child, label):
    told = child.told()
    try:
        check(path, told)
    except BaseException:
        print(label, told)
        raise
