"""A soak: writers, readers and gcs of one store, killed, suspended and told the wrong time; nothing is lost.

    python tests/soak.py --seconds 3600

Rounds of half a minute, each in a store of its own.  Sixteen writers share four runs, so that four fight for
each step; they save, overwrite, forget by name and by rule, in the foreground and the background, some from
what looks like another host.  Two gcs with little patience; one each who reads, verifies, pins and forks.  At
random one of them is killed and begins anew, or is suspended for longer than the patience and finds itself
given up for dead; at random a system call fails, or a clock goes wrong by an hour or by years: the one that
stamps the files, the one that gc reads, the one that steps are dated by.

Everybody notes what it is about to do and what it was told in a history of its own.  At the end of a round
every decision in the store is compared with what was tried and acknowledged, and every visible step is
loaded.  The seed decides what is done, not what the machine makes of it: a violation keeps the store and its
histories.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from deltas import nearly, put
from faults import HookedOs
from steps import floats, noise, repeats, same

from deltackpt import every_seconds, gc, index, last, process
from deltackpt.backends.local import LocalBackend
from deltackpt.chunking import Chunker
from deltackpt.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptError,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from deltackpt.format import VERSION, seal
from deltackpt.records import Commit, Fence
from deltackpt.run import Run
from deltackpt.session import Session
from deltackpt.store import DEPTH_MAX, DESCRIPTOR, DIRS, open_store
from deltackpt.verify import verify

PATIENCE_S = 1.0
ROUND_S = 30.0
N_RUNS = 4
FORKS = ["fork-a", "fork-b"]
YEAR_S = 365 * 86400
#: How far a clock may be off; mostly it is right.
OFF_S = [0.0] * 8 + [-3600.0, 3600.0, -5 * YEAR_S, 5 * YEAR_S]


class ViolationError(AssertionError):
    """Something was lost, came back, or is not what was saved."""


def require(condition, *what):
    if not condition:
        raise ViolationError(" ".join(map(str, what)))


def state(run, step, token):
    """What a step holds: by its token alone, so that whoever loads it can tell.

    Parts that all runs share, that come back after they were forgotten, that are this save's own, and that
    moved a little since the step before.
    """
    seed = zlib.crc32(run.encode())
    return {
        "shared": noise(1, 5000),
        "returns": noise(step % 5, 3000),
        "repeats": repeats(step % 3, 2000),
        "own": floats(token % 1_000_003, 200),
        "weights": nearly(nearly(floats(seed, 900), step), token % 11),
        "run": run,
        "step": step,
        "token": token,
    }


def check_content(found, run, step):
    """Refuse a state that is not, bit for bit, one that somebody saved as this step."""
    token = found.get("token") if isinstance(found, dict) else None
    require(isinstance(token, int), f"{run} {step}: holds no state of ours")
    require(same(found, state(found["run"], step, token)), f"{run} {step}: differs from what {token} saved")
    require(found["run"] == run or run in FORKS, f"{run} {step}: is a step of {found['run']}")
    return token


# -- who takes part


class Life(HookedOs):
    """One life of somebody who takes part, from its fork to its death; also the system calls it makes."""

    def __init__(self, root: Path, name: str, seed: str, faults: float):
        super().__init__(self.disturb)
        self.root, self.name, self.faults = root, name, faults
        self.rng = random.Random(seed)
        self.off_s = 0.0
        self.is_ready, self.n_faults = False, 0  # for calls that fail
        self._history = os.open(root / f"{name}.history", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        real = time.time
        time.time = lambda: real() + self.off_s

    def say(self, *event):
        os.write(self._history, (json.dumps([round(time.monotonic(), 4), *event]) + "\n").encode())

    def disturb(self, call, *args):
        """Fail a call, or lose one's turn before it."""
        may_fail = self.is_ready and call in ("writev", "fsync", "link", "unlink", "open")
        if may_fail and self.rng.random() < self.faults:
            self.n_faults += 1
            raise OSError(self.rng.choice([errno.EIO, errno.ENOSPC, errno.ESTALE]), "failed on purpose")
        if call in ("link", "unlink", "scandir") and self.rng.random() < 0.05:
            time.sleep(self.rng.uniform(0, 0.01))
        if call == "link" and args[1].endswith(".gone") and self.rng.random() < 0.3:
            time.sleep(self.rng.uniform(0, 0.3))  # time enough for a pin to come in between

    def link(self, source, target):
        if "/sessions/" in target and self.off_s:  # the record says when its writer began
            now = time.time()
            os.utime(source, (now, now))
        super().link(source, target)

    def fstat(self, fd):
        found = super().fstat(fd)
        fields = {name: getattr(found, name) for name in ("st_mode", "st_size", "st_dev", "st_ino")}
        return SimpleNamespace(**fields, st_mtime_ns=found.st_mtime_ns + int(self.off_s * 1e9))

    def store(self):
        return open_store(LocalBackend(self.root / "store", calls=self))

    def may_fail(self, do, *errors):
        """Do something; tell how it failed, if it may fail like that."""
        n_faults = self.n_faults
        self.off_s, self.is_ready = self.rng.choice(OFF_S), True
        try:
            do()
        except errors as e:
            return f"{type(e).__name__}: {e}"
        except StorageError as e:
            if self.n_faults == n_faults:
                raise
            return f"{type(e).__name__}: {e}"
        finally:
            self.is_ready = False
        return None

    def load(self, run, step):
        """Load a step and check it; it may be gone only if somebody meant to forget it."""
        began = time.monotonic()

        def load():
            check_content(run.load(step, lazy=False), run.name, step)

        try:
            why = self.may_fail(load, NotFoundError)
        except CorruptError:
            # A pin that came too late holds a step without its chunks until it is taken back.
            if was_pinning(histories(self.root), run.name, step, began):
                return
            raise
        if why is None:
            self.say("read", run.name, step)
        elif why.startswith("NotFoundError"):
            require(may_be_gone(histories(self.root), run.name, step), f"{run.name} {step}: {why}")


def writer(me, run_name, i):
    os.nice(3)  # many of them and two gcs: or there would be few cycles
    if i % 2:  # its session can be told to be dead by its age alone
        here = {**process._here(), "host": f"other-{i}"}
        process._here = lambda: here
    if i % 4 < 2:
        Session.put = put  # deltas of whatever there is, in long chains
    rule = [None, None, last(4), last(2) | every_seconds(5)][i % 4]
    rng, run = me.rng, None
    while True:
        if run is None or rng.random() < 0.05:
            run = Run(me.store(), run_name, keep=rule)
        act = rng.random()
        steps = run.steps()
        if act < 0.7 or len(steps) < 3:
            saves(me, run, steps, is_again=bool(steps) and act < 0.12)
        elif act < 0.85:
            me.load(run, rng.choice(steps))
        else:
            keep = steps[-rng.randint(2, 5) :]
            forgets(me, run, [step for step in steps if step not in keep and rng.random() < 0.7])


def saves(me, run, steps, *, is_again):
    rng = me.rng
    token = rng.getrandbits(60)
    step = rng.choice(steps[-3:]) if is_again else (steps[-1] if steps else 0) + rng.choice([1, 1, 1, 2])
    whole = state(run.name, step, token)
    options = {"step": step, "metadata": {"token": token}, "overwrite": is_again}
    me.say("save", token, run.name, step, is_again)
    if run.keep is not None:
        me.say("rule", run.name)

    def save():
        if rng.random() < 0.7:
            run.save(whole, **options)
            return
        pending = run.save_async(whole, **options)
        for value in whole.values():
            if isinstance(value, np.ndarray):
                value[:] = 0  # training goes on
        pending.wait()

    why = me.may_fail(save, ConflictError, AlreadyExistsError, InvalidInputError)
    if why is None:
        me.say("saved", token)
        me.load(run, step)
    else:
        require(not why.startswith("InvalidInputError") or "is pinned" in why, why)
        me.say("lost", token, why)


def forgets(me, run, steps):
    if not steps:
        return
    me.say("forget", run.name, steps)
    why = me.may_fail(lambda: run.forget(steps), NotFoundError, InvalidInputError)
    me.say("forgot" if why is None else "kept", run.name, steps)


def collector(me, patience_s):
    gc.N_FILES_MAX = index.N_FILES_MAX = 4
    store = me.store()
    while True:
        if me.rng.random() < 0.1:
            store = me.store()
        began, result = time.monotonic(), gc.GcResult(False)

        def collect(store=store, result=result):
            done = gc.collect(store, patience_s=patience_s)
            result.n_deleted, result.fenced = done.n_deleted, done.fenced

        try:
            me.may_fail(collect)
        except CorruptError:
            if not was_pinning(histories(me.root), None, None, began):
                raise
        me.say("gc", result.n_deleted, len(result.fenced))
        time.sleep(me.rng.uniform(0, 0.1))


def reader(me):
    while True:
        store = me.store()
        for _ in range(30):
            name = me.rng.choice(store.refs.runs() or ["none"])
            run = Run(store, name)
            steps = run.steps()
            if steps:
                me.load(run, me.rng.choice(steps))


def verifier(me):
    while True:
        level = me.rng.choice(["references", "stored", "decode"])
        began, found = time.monotonic(), []
        me.may_fail(lambda level=level, found=found: found.append(verify(me.store(), level=level)))
        for report in found:
            if not report.clean and not was_pinning(histories(me.root), None, None, began):
                raise ViolationError(f"verify {level}: {report.damage}")
            me.say("verified", level)


def pinner(me):
    """Pins and unpins; never killed or suspended in between, see "Pin" in format.md."""
    pinned = []
    while True:
        store = me.store()
        run = Run(store, f"run-{me.rng.randrange(N_RUNS)}")
        steps = run.steps()
        if steps and len(pinned) < 4:
            step = me.rng.choice(steps)
            if (run.name, step) in pinned:
                continue
            me.say("pin", run.name, step)
            why = me.may_fail(lambda run=run, step=step: run.pin(step), NotFoundError)
            me.say("pinned" if why is None else "unpinned", run.name, step)
            if why is None:
                pinned.append((run.name, step))
        elif pinned:
            name, step = pinned.pop(me.rng.randrange(len(pinned)))
            run = Run(store, name)
            require(step in run.steps(), f"{name} {step}: is pinned, and gone")
            me.load(run, step)
            me.say("unpin", name, step)
            run.unpin(step)
            me.say("unpinned", name, step)
        time.sleep(0.1)


def forker(me):
    while True:
        store = me.store()
        name = me.rng.choice(FORKS)
        fork = Run(store, name)
        if steps := fork.steps():
            me.load(fork, steps[0])
            forgets(me, fork, steps)
            continue
        run = Run(store, f"run-{me.rng.randrange(N_RUNS)}")
        if not (steps := run.steps()):
            continue
        step = me.rng.choice(steps)
        me.say("fork", name, run.name, step)
        why = me.may_fail(
            lambda run=run, name=name, step=step: run.fork(name, step=step),
            *(ConflictError, AlreadyExistsError, NotFoundError),
        )
        if why is None:
            me.say("forked", name, run.name, step)
            me.load(Run(store, name), step)
        time.sleep(me.rng.uniform(0, 0.1))


# -- histories


class History(NamedTuple):
    """What everybody said, in the order of time; tries stand before what came of them."""

    events: list[list]

    def of(self, *kinds):
        return [event for event in self.events if event[1] in kinds]


def histories(root):
    events = []
    for path in Path(root).glob("*.history"):
        with path.open() as lines:
            events += [json.loads(line) for line in lines if line.endswith("\n")]
    return History(sorted(events, key=lambda event: event[0]))


def may_be_gone(history, run, step, until=float("inf")):
    """Whether somebody meant to forget a step, or might have by a rule, which spares the latest."""
    has_rule = is_old = False
    for t, kind, *what in history.of("forget", "rule", "save"):
        if t > until:
            break
        if kind == "forget" and what[0] == run and step in what[1]:
            return True
        has_rule = has_rule or (kind == "rule" and what[0] == run)
        is_old = is_old or (kind == "save" and what[1] == run and what[2] > step)
    return has_rule and is_old


def was_pinning(history, run, step, since):
    """Whether a step was about to be pinned at some time since; None: any step."""
    began = {}
    for t, _, *what in history.of("pin", "pinned", "unpinned"):
        if run is None or what == [run, step]:
            began[tuple(what)] = t if _ == "pin" else None
            if _ != "pin" and t >= since:
                return True
    return any(t is not None for t in began.values())


def check_decisions(history, store):
    """Compare all decisions with what was tried and acknowledged; return what is visible, by token."""
    tried = {what[0]: (t, *what[1:]) for t, _, *what in history.of("save")}
    saved = {what[0]: t for t, _, *what in history.of("saved")}
    ended = {what[0]: t for t, _, *what in history.of("saved", "lost")}
    forgot = defaultdict(list)  # (run, step): when it was asked for, of those that were acknowledged
    asked = {}
    for t, kind, run, steps in history.of("forget", "forgot"):
        for step in steps:
            if kind == "forget":
                asked[run, step] = t
            else:
                forgot[run, step].append(asked[run, step])
    pins = {}
    for _, kind, *what in history.of("pin", "pinned", "unpin", "unpinned"):
        pins[tuple(what)] = kind

    attempts, visible, n_fences = {}, defaultdict(dict), 0
    for run in store.refs.runs():
        listing = store.refs.listing(run)
        by_step = defaultdict(list)
        for slot in listing.slots:
            decision = store.refs.decision(slot)
            n_fences += isinstance(decision, Fence)
            if isinstance(decision, Commit):
                by_step[slot.step].append(decision)
        for step, commits in by_step.items():
            where = f"{run} {step}"
            for commit in commits:
                token = commit.metadata["token"]
                require(token in tried, f"{where}: nobody tried to save {token}")
                if commit.origin is None:
                    require(tried[token][1:3] == (run, step), f"{where}: {token} was saved elsewhere")
                    require(token not in attempts, f"{where}: {token} was committed twice")
                    attempts[token] = commit.slot.attempt
            for before, after in pairwise(commits):
                began, *_, is_again = tried[after.metadata["token"]]
                until = ended.get(after.metadata["token"], float("inf"))
                if not is_again and after.origin is None:
                    require(
                        may_be_gone(history, run, step, until),
                        f"{where}: attempt {after.slot.attempt} replaced {before.slot.attempt} unasked",
                    )
            newest = commits[-1]
            is_gone = newest.slot in listing.gone
            if is_gone:
                require(may_be_gone(history, run, step), f"{where}: nobody asked to forget it")
            else:
                visible[run][step] = newest.metadata["token"]
            when = saved.get(newest.metadata["token"])
            if pins.get((run, step)) == "pinned":
                require(not is_gone, f"{where}: is pinned, and gone")
            elif (run, step) not in pins and newest.origin is None and when is not None:
                require(
                    is_gone or all(t < when for t in forgot[run, step]),
                    f"{where}: was forgotten, and is back",
                )
    for token, when in saved.items():
        _, run, step, _ = tried[token]
        require(token in attempts, f"{run} {step}: {token} was acknowledged, and is lost")
        for other, (began, *place, _) in tried.items():
            if place == [run, step] and began > when and other in attempts:
                require(attempts[other] > attempts[token], f"{run} {step}: {other} came before {token}")
    return visible, n_fences


def check_loads(store, visible):
    """Load every visible step; return how many."""
    for run in store.refs.runs():
        steps = Run(store, run).steps()
        require(steps == sorted(visible[run]), f"{run}: has {steps}, expected {sorted(visible[run])}")
        for step in steps:
            found = Run(store, run).load(step)
            token = check_content(found, run, step)
            require(token == visible[run][step], f"{run} {step}: holds {token}, not {visible[run][step]}")
    return sum(map(len, visible.values()))


def check_round(root):
    """Everything that must hold once all are dead; return figures."""
    history = histories(root)
    visible, n_fences = check_decisions(history, open_store(root / "store"))
    n_visible = check_loads(open_store(root / "store"), visible)
    for _ in range(3):
        result = gc.collect(root / "store", patience_s=-1)
        require(not result.waiting_for, f"gc waits for {result.waiting_for}")
        check_loads(open_store(root / "store"), visible)
    store = open_store(root / "store")
    report = verify(store, level="decode")
    require(report.clean, f"verify: {report}")
    for what in ("sessions/", "tmp/"):
        require(not store.backend.names(what), f"left: {store.backend.names(what)}")
    require(len(store.backend.names("manifests/")) == n_visible, "left: manifests")
    require(gc.collect(store, dry_run=True).n_dead == 0, "left: dead packs")
    lost = [what[1] for _, _, *what in history.of("lost")]
    collected = [what for _, _, *what in history.of("gc")]
    return Counter(
        saves=len(history.of("save")),
        saved=len(history.of("saved")),
        raced=sum("has step" in why or "another writer" in why for why in lost),
        refused_as_dead=sum("for dead" in why for why in lost),
        failed_calls=sum(why.startswith("StorageError") for why in lost),
        fences=n_fences,
        read=len(history.of("read")),
        verified=len(history.of("verified")),
        forgot=sum(len(what[1]) for _, _, *what in history.of("forgot")),
        pinned=len(history.of("pinned")),
        forked=len(history.of("forked")),
        gcs=len(collected),
        deleted=sum(what[0] for what in collected),
        steps_compared=n_visible,
    )


# -- who conducts


class Conductor:
    """Begins lives, ends them, and suspends them."""

    def __init__(self, root, seed, faults, writers):
        self.root, self.seed, self.faults = root, seed, faults
        self.rng = random.Random(seed)
        self.parts = {f"writer-{i}": (writer, f"run-{i % N_RUNS}", i // N_RUNS) for i in range(writers)}
        self.parts |= {"gc-1": (collector, PATIENCE_S), "gc-2": (collector, 2 * PATIENCE_S)}
        self.parts |= {"reader": (reader,), "verifier": (verifier,), "forker": (forker,), "pinner": (pinner,)}
        self.n_lives = Counter()
        self.pids = {}  # name: pid
        self.suspended = {}  # name: when it goes on
        self.counts = Counter()

    def begin(self, name):
        work, *args = self.parts[name]
        self.n_lives[name] += 1
        pid = os.fork()
        if pid:
            self.pids[name] = pid
            return
        try:
            me = Life(self.root, name, f"{self.seed} {name} {self.n_lives[name]}", self.faults)
            try:
                work(me, *args)
            except BaseException:
                me.say("violation", name, traceback.format_exc())
        finally:
            os._exit(1)

    def end(self, name):
        os.kill(self.pids[name], signal.SIGKILL)
        os.waitpid(self.pids.pop(name), 0)
        self.suspended.pop(name, None)

    def conduct(self, until):
        for name in self.parts:
            self.begin(name)
        while time.monotonic() < until:
            time.sleep(self.rng.expovariate(8))
            for name, when in list(self.suspended.items()):
                if time.monotonic() > when:
                    os.kill(self.pids[name], signal.SIGCONT)
                    del self.suspended[name]
            name = self.rng.choice([name for name in self.parts if name != "pinner"])
            if name not in self.suspended and self.rng.random() < 0.4 and len(self.suspended) < 6:
                os.kill(self.pids[name], signal.SIGSTOP)
                self.suspended[name] = time.monotonic() + PATIENCE_S * self.rng.uniform(0.1, 4)
                self.counts["suspended"] += 1
            elif self.rng.random() < 0.5:
                self.end(name)
                self.begin(name)
                self.counts["killed"] += 1
            if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return  # nobody ends but by a violation

    def close(self):
        for name in list(self.pids):
            self.end(name)


def make_store(path):
    """Make a store with chunks so small that a state of kilobytes has lists."""
    backend = LocalBackend(path)
    backend.make_dirs(DIRS)
    body = {
        "format": "deltackpt",
        "version": VERSION,
        "uuid": "00000000-0000-4000-8000-000000000000",
        "chunker": Chunker(256, 1024, 4096).to_json(),
        "depth_max": DEPTH_MAX,
        "features": [],
    }
    backend.create_once(DESCRIPTOR, seal(body))


def soak_round(root, seed, seconds, *, writers=16, faults=0.001):
    """Soak one store; return figures, or raise `ViolationError`."""
    make_store(root / "store")
    conductor = Conductor(root, seed, faults, writers)
    try:
        conductor.conduct(time.monotonic() + seconds)
    finally:
        conductor.close()
    told = histories(root).of("violation")
    require(not told, "\n".join(f"{name}: {text}" for _, _, name, text in told))
    return check_round(root) + conductor.counts


def soak(seconds, seed, *, writers=16, faults=0.001, where=None):
    """Soak store after store; return the figures of all.  A store that lost something is kept."""
    until, n, total = time.monotonic() + seconds, 0, Counter()
    while (left := until - time.monotonic()) > 0:
        root = Path(tempfile.mkdtemp(prefix="soak-", dir=where))
        try:
            total += soak_round(root, f"{seed}/{n}", min(left, ROUND_S), writers=writers, faults=faults)
        except BaseException as e:
            if not isinstance(e, KeyboardInterrupt):
                print(f"seed {seed} round {n}: kept in {root}", flush=True)
            raise
        shutil.rmtree(root)
        n += 1
        print(f"seed {seed} round {n}: {json.dumps(total)}", flush=True)
    return total


def main():
    logging.getLogger("deltackpt").setLevel(logging.CRITICAL)  # losing a race is what everybody does here
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--writers", type=int, default=16)
    options.add_argument("--faults", type=float, default=0.001, help="share of system calls that fail")
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options.add_argument(
        "--dir", help="where the stores are made; by default in memory, if there is /dev/shm"
    )
    given = options.parse_args()
    where = given.dir or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    try:
        soak(given.seconds, given.seed, writers=given.writers, faults=given.faults, where=where)
    except ViolationError as e:
        print(f"VIOLATION: {e}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
