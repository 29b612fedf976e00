"""Every system call of every scene fails in every way, once or from then on: an error, or a success."""

from __future__ import annotations

import errno
import itertools
import os
import random
import secrets
import sys
import time
import traceback
import uuid
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from cores import spread
from scenes import SCENES, check_usable, made, state, visible
from steps import assert_steps
from test_damage import AtOnce

from deltackpt import process, run, session
from deltackpt.backends import local
from deltackpt.backends.local import LocalBackend
from deltackpt.energy import Energy
from deltackpt.errors import DeltackptError, StorageError
from deltackpt.records import Figures
from deltackpt.run import Run
from deltackpt.store import DIRS
from deltackpt.verify import verify
from deltackpt.workers import workers

sys.path.append(str(Path(__file__).parent / "crash"))
from disk import DIRECTORY, Disk

SEED = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(1 << 32))
#: Of so many saves that failed one is followed by another of the same process; FAULT_STRIDE=1: every one.
STRIDE = int(os.environ.get("FAULT_STRIDE") or 12)
N_PARTS_MAX = 4

WRITES = {"writev", "link", "unlink", "mkdir", "fsync", "close", "open"}
#: What a full disk refuses, and what is refused where no file can be opened; other errors may meet any call.
REFUSED = {
    errno.ENOSPC: {"open", "writev", "link", "mkdir", "fsync", "close"},
    errno.EDQUOT: {"open", "writev", "link", "mkdir", "fsync", "close"},
    errno.EMFILE: {"open", "scandir"},
}
ERRORS = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.ESTALE, errno.EACCES, errno.EMFILE]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one call, and with those after it if it `stays`.

    Parameters
    ----------
    code : int
        The error; 0: fewer bytes are moved than asked for, `share` of them.
    is_done : bool
        What was asked for is done, and only the answer lost.
    """

    code: int = 0
    stays: bool = False
    is_done: bool = False
    share: float = 0.0

    def meets(self, call):
        """Whether it can meet this call at all, as the first."""
        if not self.code:
            return call in ("writev", "preadv")
        return call in WRITES if self.is_done else True

    def follows(self, call):
        """Whether it meets this call too, once it has met another."""
        return self.stays and self.meets(call) and call in REFUSED.get(self.code, {call})

    def __str__(self):
        what = errno.errorcode[self.code] if self.code else f"{self.share:.0%} of the bytes"
        return what + (", but it is done" if self.is_done else "") + (", from now on" if self.stays else "")


FAULTS = [
    *(Fault(code, stays) for code in ERRORS for stays in (False, True)),
    *(Fault(errno.EIO, stays, is_done=True) for stays in (False, True)),
    *(Fault(stays=stays, share=share) for share in (0.0, 0.5) for stays in (False, True)),
]


class Faulty(Disk):
    """A disk whose nth call meets a fault; says what is done with a file after its flush failed."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls: list[str] = []
        self.nth, self.fault = -1, Fault()
        self.met: str | None = None
        self.wrong: list[str] = []
        self.unflushed: set[int] = set()

    def told(self, call, *args):
        """What this call meets, if anything."""
        self.calls.append(call)
        if len(self.calls) == self.nth + 1:
            self.met = call
            return self.fault
        return self.fault if self.met and self.fault.follows(call) else None

    def heal(self):
        self.nth, self.met = -1, None


def _faulty(call):
    honest = getattr(Disk, call)

    def answer(self, *args):
        fault = self.told(call, *args)
        if call == "fsync" and isinstance(self._open[args[0]], int):
            if self._open[args[0]] in self.unflushed:
                self.wrong.append("flushes a file again whose flush failed")
            if fault:
                self.unflushed.add(self._open[args[0]])
        if call == "link" and self._names.get(args[0]) in self.unflushed:
            self.wrong.append("publishes a file whose flush failed")
        if fault is None:
            return honest(self, *args)
        if not fault.code:
            fd, views, *offset = args
            wanted = int(fault.share * sum(map(len, views))) or bool(fault.share)
            return honest(self, fd, _first(views, wanted), *offset)
        if fault.is_done or call == "close":  # the descriptor is gone even if it fails
            done = honest(self, *args)
            if call == "open":
                Disk.close(self, done)
        raise OSError(fault.code, os.strerror(fault.code))

    return answer


def _first(views, size):
    found = []
    for view in views:
        found.append(view[:size])
        size -= len(found[-1])
    return found


CALLS = [name for name in vars(local.Os) if not name.startswith("_")]
for _call in CALLS:
    setattr(Faulty, _call, _faulty(_call))


class Still:
    """A meter of nothing, read at once."""

    def read(self, *sizes):
        return Energy()

    held = read

    def resume(self):
        pass


class Numbers:
    """Random numbers that are none: what is done twice writes the same bytes, and finds itself known."""

    def __init__(self):
        self.begin(0)

    def begin(self, series):
        self._next = itertools.count((series << 20) + 1)

    def bytes(self, size):
        return (next(self._next) << 8 * max(0, size - 4)).to_bytes(size, "big")


def numbered(patched):
    """Have numbers and clocks stand still; return the numbers."""
    numbers = Numbers()
    commit, who = session.Commit, {**process.identity(), "start": -1}

    def plain(*args):
        return commit(*args[:4], 0.0, *args[5:7], Figures(), *args[8:])

    patched.setattr(secrets, "token_bytes", numbers.bytes)
    patched.setattr(secrets, "token_hex", lambda size: numbers.bytes(size).hex())
    patched.setattr(uuid, "uuid4", lambda: uuid.UUID(bytes=numbers.bytes(16)))
    patched.setattr(process, "identity", lambda: who)
    patched.setattr(run, "Meter", Still)
    patched.setattr(session, "Commit", plain)
    patched.setattr(workers, "_pool", AtOnce())
    patched.setattr(local, "_BEHIND_SIZE", 1000)
    return numbers


ROOT = "/store"


def disk_of(objects):
    """A disk with these objects of a store, and the directories of one if there are any."""
    files = {f"{ROOT}/{name}": data for name, data in objects.items()}
    above = {str(path) for name in files for path in Path(name).parents[:-1]}
    return Faulty(files, sorted(above | {ROOT} | {f"{ROOT}/{name}" for name in DIRS if files}))


def copy_of(disk):
    dirs = [path for path, at in disk._names.items() if at == DIRECTORY and path]
    return Faulty(disk.contents(), dirs)


def parts_of(a_scene):
    """The acts of a scene, one by one, each with what is there before it and after."""

    def acts_of(act):
        return [part for one in act.acts for part in acts_of(one)] if hasattr(act, "acts") else [act]

    files, before = a_scene.objects, a_scene.before
    for act in acts_of(a_scene.act):
        disk = disk_of(files)
        act(LocalBackend(ROOT, calls=disk))
        calls = list(disk.calls)
        after = visible(LocalBackend(ROOT, calls=disk))
        yield replace(a_scene, before=before, act=act, after=after, objects=files), calls
        files = {path.removeprefix(f"{ROOT}/"): data for path, data in disk.contents().items()}
        before = after
    assert a_scene.is_new(after)


@dataclass
class Tally:
    """What was tried and what came of it."""

    n_points: int = 0
    n_trees: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def tried(job):
    """Every fault at each call of one act of a scene."""
    name, part, stride, seed = job
    tally = Tally()
    start = time.process_time()
    with pytest.MonkeyPatch.context() as patched:
        trial = Trial(numbered(patched), tally, patched)
        parts = list(parts_of(made(name, patched)))
        if part < len(parts):
            one, calls = parts[part]
            before = disk_of(one.objects)
            for (nth, call), fault in itertools.product(enumerate(calls), FAULTS):
                if not fault.meets(call):
                    continue
                try:
                    trial.one(one, before, nth, fault, goes_on=(seed + tally.n_points) % stride == 0)
                except Exception as e:
                    where = traceback.extract_tb(e.__traceback__)[-1]
                    what = f"call {nth} of {len(calls)}, {call}: {fault}"
                    tally.failed.append(f"{name}, part {part}, {what}: {e!r} at {where}")
            tally.n_trees = len(trial.known)
    tally.seconds = time.process_time() - start
    return tally


class Trial:
    """Faults at calls, one after another; what equal stores are good for is found out once."""

    def __init__(self, numbers, tally, patched):
        self.numbers, self.tally = numbers, tally
        self.known, self.after, self.runs = {}, {}, []
        make = Run.__init__

        def noted(run, *args, **kwargs):
            make(run, *args, **kwargs)
            self.runs.append(run)

        patched.setattr(Run, "__init__", noted)

    def one(self, a_scene, before, nth, fault, *, goes_on):
        disk = copy_of(before)
        disk.nth, disk.fault = nth, fault
        backend = LocalBackend(ROOT, calls=disk)
        error = None
        self.runs.clear()
        self.numbers.begin(1)
        try:
            a_scene.act(backend)
        except DeltackptError as e:
            error = e
        met, run = disk.met, self.runs[-1] if self.runs else None
        assert met
        self.tally.n_points += 1
        self.tally.outcomes["error" if error else "success"] += 1
        disk.heal()
        backend.close()
        assert not disk._open, f"{met}: a file is left open"
        assert not disk.wrong, disk.wrong
        if isinstance(error, StorageError) and fault.code and error.errno:
            assert error.errno == fault.code, (met, error)
        key = hash(frozenset(disk.contents().items()))
        if key not in self.known:
            self.known[key] = self.seen(a_scene, copy_of(disk))
        found, trouble = self.known[key]
        assert a_scene.is_old_or_new(found) if error else a_scene.is_new(found)
        if trouble:
            raise trouble
        if goes_on and run is not None:
            self.goes_on(run, disk, found)

    def seen(self, a_scene, disk):
        """What is to be seen in a store, and what is wrong with the next save and gc, if anything is."""
        self.numbers.begin(2)
        found = visible(LocalBackend(ROOT, calls=disk))
        try:
            check_usable(a_scene, LocalBackend(ROOT, calls=disk), found)
        except Exception as e:
            return found, e
        return found, None

    def goes_on(self, run, disk, found):
        """The same process saves again, with all that it remembers."""
        self.tally.outcomes["saved on"] += 1
        self.numbers.begin(3)
        run.save(state(8), step=8)
        key = hash(frozenset(disk.contents().items()))
        if key not in self.after:
            backend = LocalBackend(ROOT, calls=copy_of(disk))
            self.after[key] = visible(backend), verify(backend, level="decode").clean
        after, is_clean = self.after[key]
        assert is_clean
        wanted = found | {8 if run.name == "main" else f"{run.name} 8": state(8)}
        kept = after.keys() if run.keep else wanted.keys()
        assert_steps(after, {step: wanted[step] for step in kept})


def test_every_call_may_fail_in_every_way_and_is_an_error_or_a_success():
    jobs = [(name, part, STRIDE, SEED) for part in range(N_PARTS_MAX) for name in reversed(SCENES)]
    n_points, n_trees, outcomes, failed, seconds = 0, 0, Counter(), [], 0
    for tally in spread(tried, jobs):
        n_points += tally.n_points
        n_trees += tally.n_trees
        outcomes += tally.outcomes
        failed += tally.failed
        seconds += tally.seconds
    print(f"{n_points} faults, {dict(outcomes)}, {n_trees} different stores, {seconds:.0f} s of a core")
    assert not failed, f"{len(failed)} of {n_points}:\n" + "\n".join(failed[:20])
    assert n_points > 40_000
