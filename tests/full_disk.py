"""What is done to a store on a disk that is full to the last byte: `python full_disk.py WHAT DIRECTORY SEED`.

The directory is a small file system of its own, made by test_full_disk.py in a namespace of its own.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from steps import noise, same

from deltackpt import gc, open_run
from deltackpt.backends.osshim import Os
from deltackpt.errors import StorageError
from deltackpt.verify import verify

#: Large beside what stays of a step for ever: its decision and its tombstone, a block each.
SIZE = 1_500_000
N_CYCLES = 100


def state(step):
    """A half that is new at every step, a quarter that every fourth step shares, a quarter that stays."""
    return {
        "new": noise(step, SIZE // 2),
        "shared": noise(10_000 + step % 4, SIZE // 4),
        "stays": noise(20_000, SIZE // 4),
        "step": step,
    }


def fill(path):
    """Somebody else takes what is left: every byte, as far as the file system tells."""
    with (path / "others").open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    status = os.statvfs(path)
    assert not status.f_bavail, status


def empty(path):
    (path / "others").unlink(missing_ok=True)


def check_says_full(error):
    assert error.is_full, error
    assert "No space left" in error.message, error
    assert "the disk is full" in error.hint, error


class Steps:
    """A run on a small disk, and which of its steps were acknowledged and not forgotten."""

    def __init__(self, path):
        self.path, self.store = path, path / "store"
        self.kept = set()
        self.step = 0

    def save_until_full(self):
        with open_run(self.store) as run:
            while True:
                self.step += 1
                try:
                    run.save(state(self.step), step=self.step)
                except StorageError as e:
                    check_says_full(e)
                    return
                self.kept.add(self.step)

    def die_in_a_save(self):
        """A writer is killed with its pack in tmp/, if there is room for that; return whether it was."""
        pid = os.fork()
        if not pid:
            save_and_die(self.store, self.step + 1)
        _, status = os.waitpid(pid, 0)
        return os.WIFSIGNALED(status) and any((self.store / "tmp").glob("*.pack.*"))

    def forget(self, steps):
        run = open_run(self.store)
        try:
            with run:
                run.forget(steps)
        except StorageError as e:  # each takes a block
            check_says_full(e)
            forgotten = self.kept - set(run.steps())
            assert len(forgotten) > 3
            self.kept -= forgotten
        else:
            self.kept -= set(steps)

    def check(self, n=3, rng=random):
        with open_run(self.store) as run:
            assert set(run.steps()) == self.kept
            for step in rng.sample(sorted(self.kept), min(n, len(self.kept))):
                assert same(run.load(step), state(step)), step


def save_and_die(store, step):
    """Save, and die once the pack is written, or has no room."""

    def last(self, fd):
        os.kill(os.getpid(), signal.SIGKILL)

    Os.fsync = last
    try:
        open_run(store).save(state(step), step=step)
    finally:
        os._exit(0)


def cycles(path, seed):
    """Fill, save, forget, gc and verify, again and again; what was freed, and how often from nothing."""
    rng = random.Random(seed)
    steps = Steps(path)
    n_from_full = freed = n_forgotten = n_killed = n_lean = 0
    for cycle in range(N_CYCLES):
        how = rng.choice(["forget", "forget", "waste", "killed"])
        if how == "killed":
            how = "killed" if steps.die_in_a_save() else "forget"
            n_killed += how == "killed"
        steps.save_until_full()
        steps.check(rng=rng)
        if rng.random() < 0.7:
            fill(path)
            n_from_full += 1
        if how != "killed":
            # All but a few; or every second step, so that in each pack something is in use.
            kept = set(rng.sample(sorted(steps.kept), 2))
            if how == "waste":
                kept = {step for step in steps.kept if step % 4 == rng.randrange(4)} or kept
            n_forgotten += len(steps.kept - kept)
            steps.forget(sorted(steps.kept - kept))
        result = gc.collect(steps.store)
        assert result.freed_size > (1000 if how == "killed" else SIZE // 4), (cycle, how, result)
        freed += result.freed_size
        steps.check(n=10, rng=rng)
        n_lean += result.n_repacked > 0
        if cycle % 5 == 0:
            assert verify(steps.store, level="decode").clean
        empty(path)
        if how == "killed":
            steps.forget(sorted(steps.kept)[:-2])
            gc.collect(steps.store)
    steps.check(n=100)
    return {
        "cycles": N_CYCLES,
        "from nothing free": n_from_full,
        "writers killed": n_killed,
        "rewritten": n_lean,
        "saved": steps.step,
        "forgotten": n_forgotten,
        "freed": freed,
    }


def commands(path, _):
    """The exit code of each command, from a full disk to one that has room again."""
    command = [sys.executable, "-m", "deltackpt", "--store", str(path / "store")]
    codes = {}

    def call(name, *arguments):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        codes[name] = done.returncode
        return done.stdout + done.stderr

    with tempfile.TemporaryDirectory() as files:
        for step in (1, 2):
            np.savez(f"{files}/s_{step}.npz", w=noise(step, 500_000))
        call("save", "save", f"{files}/s_1.npz")
        fill(path)
        told = call("save, full", "save", f"{files}/s_2.npz")
        assert "No space left on device" in told, told
        assert "hint: the disk is full: free some space, or run gc" in told, told
        assert "Traceback" not in told, told
        call("ls", "ls")
        call("forget", "forget", "--step", "1")
        call("gc", "gc")
        call("verify", "verify", "--decode")
        empty(path)
        call("save again", "save", f"{files}/s_2.npz")
    return codes


if __name__ == "__main__":
    what, directory, number = sys.argv[1:]
    print(json.dumps(globals()[what](Path(directory), int(number))))
