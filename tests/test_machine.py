"""A store against a dict of states: whatever is done, in whatever order, both hold the same."""

import errno
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
from deltas import nearly, put
from faults import CrashBackend, Cut, Wrapper
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from steps import assert_steps, collect, floats, noise, opened, repeats, same, visible

from deltackpt import every, last, manifest, restore
from deltackpt.backends.memory import MemoryBackend
from deltackpt.chunking import Chunker
from deltackpt.errors import AlreadyExistsError, InvalidInputError, NotFoundError, StorageError
from deltackpt.format import VERSION, seal
from deltackpt.run import Run
from deltackpt.session import Session
from deltackpt.store import DEPTH_MAX, DESCRIPTOR, open_store

RUNS = ["main", "other"]
KINDS = [noise, floats, repeats, lambda seed, n: np.zeros(n, np.float16)]

NAMES = ["a", "b", "c", "d.e", "Ä f", ""]

a_run = st.sampled_from(RUNS)


def with_part_changed(array, rng):
    array = array.copy()
    flat = array.reshape(-1).view(np.uint8)
    start = int(rng.random() * flat.size)
    part = flat[start : start + int(rng.integers(1, 3000))]
    part[:] = noise(0, part.size)
    return array


def with_part_inserted(array, rng):
    at = int(rng.random() * array.size)
    return np.insert(array, at, noise(0, int(rng.integers(1, 2000))).astype(array.dtype))


def with_part_cut_out(array, rng):
    at = int(rng.random() * array.size)
    return np.delete(array, slice(at, at + int(rng.integers(1, 2000))))


CHANGES = [
    with_part_changed,
    with_part_inserted,
    with_part_cut_out,
    lambda array, rng: array.reshape(1, -1),
    lambda array, rng: array,
]


def small_store():
    """A store whose chunks are so small that a few kilobytes have lists of lists of lists."""
    backend = MemoryBackend()
    body = {
        "format": "deltackpt",
        "version": VERSION,
        "uuid": "00000000-0000-4000-8000-000000000000",
        "chunker": Chunker(64, 256, 1024).to_json(),
        "depth_max": DEPTH_MAX,
        "features": [],
    }
    backend.create_once(DESCRIPTOR, seal(body))
    return backend


class Flaky(Wrapper):
    """Fails one change, when told to."""

    fails_in = None

    def _do(self, op, name, call, *, mutates=True):
        if mutates and self.fails_in is not None:
            self.fails_in -= 1
            if self.fails_in < 0:
                self.fails_in = None
                raise StorageError(f"{op} {name} failed on purpose", errno=errno.EIO)
        return call()


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.patches = [
            mock.patch.object(manifest, "LIST_ROWS_MAX", 4),
            mock.patch.object(Session, "put", put),
        ]
        for patch in self.patches:
            patch.start()

    def teardown(self):
        if hasattr(self, "backend"):
            self.nothing_else_is_there()
        for patch in self.patches:
            patch.stop()

    @initialize(is_small=st.booleans())
    def create(self, is_small):
        # Sizes in bytes of the largest tensor: 256 chunks are what four levels of four rows can list.
        self.size_max = 30_000 if is_small else 400_000
        self.start(small_store() if is_small else MemoryBackend())
        self.states = {run: {} for run in RUNS}
        self.pinned = {run: set() for run in RUNS}
        self.lost = {run: set() for run in RUNS}  # steps that only their pin holds
        self.work = {}
        self.train(1, 12)

    def start(self, backend):
        self.backend = Flaky(backend)
        store = open_store(self.backend, create=True)
        self.runs = {run: Run(store, run) for run in RUNS}

    # -- the state in training

    @rule(seed=st.integers(0, 1 << 16), n=st.integers(1, 4))
    def train(self, seed, n):
        """Change some tensors; one number decides on all of it, so that most rules are left to the store."""
        rng = np.random.default_rng(seed)
        for _ in range(n):
            work = dict(self.work)
            name = NAMES[rng.integers(len(NAMES))]
            array = work.pop(name, None)
            if array is None or rng.random() < 0.2:
                kind = KINDS[rng.integers(len(KINDS))]
                work[name] = kind(int(rng.integers(9)), int(self.size_max ** rng.random() / 8 * 2))
            else:
                changed = CHANGES[rng.integers(len(CHANGES))](array, rng)
                if rng.random() < 0.2:  # renamed, or dropped where the other name was taken
                    name = NAMES[rng.integers(len(NAMES))]
                if changed.nbytes <= self.size_max:
                    work[name] = changed
            self.work = work

    @rule(seed=st.integers(0, 9))
    def train_all(self, seed):
        """Change every array of floats a little, so that the next save has deltas."""
        work = {"w": floats(seed, 500)} | self.work
        self.work = {n: nearly(v, seed) if getattr(v, "dtype", None) == "f4" else v for n, v in work.items()}

    # -- the store

    def next_state(self, step):
        self.work = {**self.work, "step": step}
        return self.work

    def a_new_step(self, run, gap):
        return max(self.states[run], default=0) + gap

    @rule(run=a_run, gap=st.integers(1, 3))
    def save(self, run, gap):
        step = self.a_new_step(run, gap)
        self.runs[run].save(self.next_state(step), step=step)
        self.states[run][step] = self.work

    @rule(run=a_run, data=st.data(), overwrite=st.booleans())
    @precondition(lambda self: any(self.states.values()))
    def save_again(self, run, data, overwrite):
        if not self.states[run]:
            return
        step = data.draw(st.sampled_from(sorted(self.states[run])))
        if overwrite and step in self.pinned[run]:
            with pytest.raises(InvalidInputError, match="is pinned"):
                self.runs[run].save(self.work, step=step, overwrite=True)
        elif overwrite:
            self.runs[run].save(self.next_state(step), step=step, overwrite=True)
            self.states[run][step] = self.work
        else:
            with pytest.raises(AlreadyExistsError):
                self.runs[run].save(self.work, step=step)

    @rule(run=a_run, fails_in=st.integers(0, 12))
    def save_when_a_call_fails(self, run, fails_in):
        step = self.a_new_step(run, 1)
        self.backend.fails_in = fails_in
        try:
            self.runs[run].save(self.next_state(step), step=step)
        except StorageError:
            pass
        else:
            assert self.runs[run].load(step)["step"] == step
        self.backend.fails_in = None
        self.take_over(run, step)

    @rule(run=a_run, nth=st.integers(0, 12), which=st.integers(0, 5))
    def die_while_saving(self, run, nth, which):
        """`which` 0: the process dies; else the power fails, in one of some ways."""
        step = self.a_new_step(run, 1)
        crash = CrashBackend(self.backend.inner)
        crash.run_to(nth)
        try:
            opened(crash, run).save(self.next_state(step), step=step)
        except Cut:
            is_saved = False
        else:
            is_saved = True
        left = [crash.inner, *crash.crash_states(limit=5, seed=nth)]
        self.start(left[which % len(left)])
        self.take_over(run, step)
        assert step in self.states[run] or not is_saved

    def take_over(self, run, step):
        """After a save that was not acknowledged: its step is there, whole, or not at all."""
        if step in self.runs[run].steps():
            assert same(self.runs[run].load(step), self.work)
            self.states[run][step] = self.work

    @rule(run=a_run, data=st.data())
    def load(self, run, data):
        if not self.states[run]:
            with pytest.raises(NotFoundError):
                self.runs[run].load()
            return
        step = data.draw(st.sampled_from(["latest", *sorted(self.states[run])]))
        state = self.states[run][max(self.states[run]) if step == "latest" else step]
        assert same(self.runs[run].load(step), state)

    @rule(run=a_run, data=st.data())
    def load_some(self, run, data):
        if self.states[run]:
            step = data.draw(st.sampled_from(sorted(self.states[run])))
            state = self.states[run][step]
            arrays = sorted(n for n, v in state.items() if isinstance(v, np.ndarray) and n)
            names = set(data.draw(st.lists(st.sampled_from(arrays)))) if arrays else set()
            if names:
                found = self.runs[run].load(step, keys=sorted(names))
                assert same(found, {n: v for n, v in state.items() if n in names})

    @rule(run=a_run, data=st.data())
    def load_into(self, run, data):
        if self.states[run]:
            step = data.draw(st.sampled_from(sorted(self.states[run])))
            state = self.states[run][step]
            into = {n: np.ones_like(v) if isinstance(v, np.ndarray) else v for n, v in state.items()}
            found = self.runs[run].load(step, into=into)
            assert same(found, state)
            assert all(found[n] is v for n, v in into.items() if isinstance(v, np.ndarray))

    @rule(run=a_run, data=st.data())
    def forget(self, run, data):
        if self.states[run]:
            steps = data.draw(st.sets(st.sampled_from(sorted(self.states[run])), min_size=1))
            if steps & self.pinned[run]:
                with pytest.raises(InvalidInputError, match="is pinned"):
                    self.runs[run].forget(steps)
                return
            self.runs[run].forget(steps)
            for step in steps:
                del self.states[run][step]

    @rule(run=a_run, data=st.data(), late=st.booleans())
    def pin(self, run, data, late):
        """`late`: somebody who looked before the step was pinned forgets it all the same."""
        if self.states[run]:
            step = data.draw(st.sampled_from(sorted(self.states[run])))
            self.runs[run].pin(step)
            self.pinned[run].add(step)
            if late:
                refs = opened(self.backend, run).store.refs
                refs.forget([refs.commit(run, step).slot])
                self.lost[run].add(step)

    @rule(run=a_run, data=st.data())
    def unpin(self, run, data):
        if self.pinned[run]:
            step = data.draw(st.sampled_from(sorted(self.pinned[run])))
            self.runs[run].unpin(step)
            self.pinned[run].remove(step)
            if step in self.lost[run]:
                self.lost[run].remove(step)
                del self.states[run][step]

    @rule(run=a_run, data=st.data())
    def fork(self, run, data):
        other = next(name for name in RUNS if name != run)
        if self.states[run]:
            step = data.draw(st.sampled_from(sorted(self.states[run])))
            if self.states[other]:
                with pytest.raises(AlreadyExistsError):
                    self.runs[run].fork(other, step=step)
            else:
                self.runs[other] = self.runs[run].fork(other, step=step)
                self.states[other][step] = self.states[run][step]

    @rule(run=a_run, n_last=st.integers(1, 3), n_every=st.integers(1, 4))
    def save_and_keep(self, run, n_last, n_every):
        step = self.a_new_step(run, 1)
        self.runs[run].keep = last(n_last) | every(n_every)
        forgotten = self.runs[run].save(self.next_state(step), step=step).forgotten
        self.runs[run].keep = None
        self.states[run][step] = self.work
        gone = {s for s in sorted(self.states[run])[:-n_last] if s % n_every} - self.pinned[run]
        assert set(forgotten) <= gone
        assert len(gone - set(forgotten)) <= 1  # what it was resumed from
        for step in forgotten:
            del self.states[run][step]

    @rule()
    def gc_by_another_process(self):
        collect(self.backend)

    @rule()
    def gc_by_this_process(self):
        collect(self.runs["main"].store)

    @rule()
    def restart(self):
        self.start(self.backend.inner)

    @invariant()
    def the_steps_are_the_same(self):
        if hasattr(self, "states"):
            for run in RUNS:
                assert self.runs[run].steps() == sorted(self.states[run])
                assert self.runs[run].pinned() == sorted(self.pinned[run])

    def nothing_else_is_there(self):
        for run in RUNS:
            assert_steps({s: self.runs[run].load(s) for s in self.runs[run].steps()}, self.states[run])
        for _ in range(3):
            collect(self.backend)
        for run in RUNS:
            assert_steps(visible(self.backend, run), self.states[run])
        plan = collect(self.backend, dry_run=True)
        assert plan.n_dead == 0
        if not any(self.states.values()):
            assert plan.n_packs == 0


Machine.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestMachine = Machine.TestCase


def test_small_chunks_give_lists_of_lists(monkeypatch):
    monkeypatch.setattr(manifest, "LIST_ROWS_MAX", 4)
    run = opened(small_store())
    run.save({"a": noise(1, 20_000)}, step=1)
    assert run.manifest().tensors[0].level >= 3
    assert len(restore.resolve(run.store, run.manifest().tensors)[0]) > 16
    assert same(run.load(), {"a": noise(1, 20_000)})
