"""Scenes: what is in a store, what is done to it, and what must be there afterwards.

The crash, kill and fault tests all act these out; each brings its own way to go wrong.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from deltas import nearly, rows_of, taken
from faults import CrashBackend, Cut, contents, memory_of
from steps import assert_steps, collect, floats, noise, opened, repeats, same
from steps import visible as steps_of

from deltackpt import gc, index, last, open_run, these
from deltackpt.backends.memory import MemoryBackend
from deltackpt.store import open_store
from deltackpt.verify import verify


def state(step, *, seed=0):
    """A part that stays, one that changes at every step, one that comes back at every second."""
    return {
        "stays": noise(1, 3000),
        "moves": floats(100 * seed + step, 700),
        "returns": repeats(step % 2, 4000),
        "none": np.zeros((0, 3), np.float16),
        "step": step,
    }


def trained(step):
    """Weights that move a little at every step, so that a save has a delta of them."""
    weights = floats(1, 700)
    for seed in range(step):
        weights = nearly(weights, seed)
    return {"weights": weights, "stays": noise(1, 500), "step": step}


def visible(where):
    """Every step that can be seen, loaded; those of a fork by name."""
    return steps_of(where) | {f"fork {step}": s for step, s in steps_of(where, "fork").items()}


@dataclass
class Scene:
    """What is there, what is done, and what is there afterwards; in between, either."""

    before: dict[int, Any]
    act: Any
    after: dict[int, Any]
    objects: dict[str, bytes]
    may_stay: frozenset[int] = frozenset()  # a save is done though a rule's forgetting failed
    may_ask: bool = False

    def backend(self):
        return memory_of(self.objects)

    def is_old_or_new(self, found):
        def same_at(step, wanted):
            if step not in wanted:
                return step not in found
            return step in found and same(found[step], wanted[step])

        steps = found.keys() | self.before.keys() | self.after.keys()
        return all(same_at(step, self.before) or same_at(step, self.after) for step in steps)

    def is_new(self, found):
        there = {s: found[s] for s in found.keys() - (self.may_stay - self.after.keys())}
        return there.keys() == self.after.keys() and all(same(there[s], self.after[s]) for s in there)


def scene(prepare, act, after, **options):
    backend = MemoryBackend()
    prepare(backend)
    before = visible(backend) if contents(backend) else {}
    return Scene(before, act, after(before), contents(backend), **options)


def saved(*steps, **kwargs):
    """One save after another, in one process."""

    def act(backend):
        run = opened(backend)
        for step in steps:
            run.save(state(step, **kwargs), step=step, overwrite=True)

    return act


def trained_to(*steps):
    """One save of deltas after another, in one process."""

    def act(backend):
        run = opened(backend)
        for step in steps:
            run.save(trained(step), step=step)

    return act


def forgot(*steps):
    return lambda backend: opened(backend).forget(steps)


def many(*acts):
    def act(backend):
        for one in acts:
            one(backend)

    act.acts = acts
    return act


def with_(steps, **kwargs):
    return lambda before: before | {step: state(step, **kwargs) for step in steps}


def with_trained(*steps):
    return lambda before: before | {step: trained(step) for step in steps}


def without(*steps):
    return lambda before: {step: s for step, s in before.items() if step not in steps}


def with_fork(step):
    return lambda before: before | {f"fork {step}": before[step]}


def condemned_only(backend):
    """A gc that died with its cycle condemned, not swept."""
    crash = CrashBackend(backend)
    for nth in itertools.count():
        if "gc/condemn-0" in contents(backend):
            return
        crash.run_to(nth)
        with pytest.raises(Cut):
            collect(crash)
        crash = CrashBackend(backend)


def nothing(backend):
    pass


SCENES = {
    "the first save": (nothing, saved(1), with_([1])),
    "a save that shares": (saved(1), saved(2), with_([2])),
    "a save of what is all there": (
        saved(1),
        lambda b: opened(b).save(state(1), step=2),
        lambda before: before | {2: state(1)},
    ),
    "three saves of one process": (saved(1), saved(2, 3, 4), with_([2, 3, 4])),
    "an overwrite": (saved(1, 2), saved(2, seed=7), with_([2], seed=7)),
    "a forget": (saved(1, 2, 3), forgot(1, 3), without(1, 3)),
    "a gc of dead packs": (many(saved(1, 2, 3), forgot(2, 3)), collect, without()),
    "a gc that has nothing to do": (saved(1, 2), collect, without()),
    "a gc that repacks": (
        many(
            lambda b: opened(b).save({"a": noise(1, 5000), "b": noise(2, 5000)}, step=1),
            lambda b: opened(b).save({"a": noise(1, 5000)}, step=2),
            forgot(1),
        ),
        collect,
        without(),
    ),
    "a second cycle": (
        many(saved(1, 2, 3, 4), forgot(2), collect, forgot(3)),
        many(collect, saved(5), forgot(4), collect),
        lambda before: without(4)(with_([5])(before)),
    ),
    "a save beside an unfinished gc": (
        many(saved(1, 2, 3), forgot(2), condemned_only),
        saved(4),
        with_([4]),
    ),
    "a save that lets steps go": (
        saved(1, 2, 3),
        lambda b: open_run(b, keep=last(1) | these([2])).save(state(4), step=4),
        lambda before: {2: state(2), 3: state(3), 4: state(4)},
    ),
    "a pin, and a forget that it survives": (
        saved(1, 2, 3),
        many(lambda b: opened(b).pin(1), lambda b: open_run(b, keep=last(1)).save(state(4), step=4)),
        lambda before: {1: state(1), 3: state(3), 4: state(4)},
    ),
    "an unpin, a forget and a gc": (
        many(saved(1, 2), lambda b: opened(b).pin(1)),
        many(lambda b: opened(b).unpin(1), forgot(1), collect),
        without(1),
    ),
    "a fork": (saved(1, 2), lambda b: opened(b).fork("fork", step=1), with_fork(1)),
    "a fork beside an unfinished gc": (
        many(saved(1, 2, 3), forgot(2), condemned_only),
        many(lambda b: opened(b).fork("fork", step=3), forgot(3), collect),
        lambda before: without(3)(with_fork(3)(before)),
    ),
    "a save of deltas": (trained_to(1, 2), trained_to(3, 4), with_trained(3, 4)),
    "deltas whose base's step is forgotten, and a gc": (
        many(trained_to(1, 2), lambda b: opened(b).fork("fork", step=2), trained_to(3, 4)),
        many(forgot(1, 3), collect),
        without(1, 3),
    ),
    "a gc that stores deltas whole": (
        many(trained_to(1, 2, 3, 4, 5), forgot(1, 2, 3, 4)),
        collect,
        without(),
    ),
    "deltas beside an unfinished gc": (
        many(trained_to(1, 2, 3), saved(4), forgot(2, 3, 4), condemned_only),
        many(trained_to(5), forgot(1), collect),
        lambda before: without(1)(with_trained(5)(before)),
    ),
    "the end of another's gc": (many(saved(1, 2, 3), forgot(2), condemned_only), collect, without()),
}


def made(name, monkeypatch):
    """Prepare the scene of that name, with limits so low that it does what it is named for."""
    for module in (gc, index):
        monkeypatch.setattr(module, "N_FILES_MAX", 2)  # so that index files are merged too
    if "delta" in name:
        taken(monkeypatch)
    options = {}
    if "lets steps go" in name or "a pin" in name:
        options["may_stay"] = frozenset([1, 2, 3])
    if name == "a fork beside an unfinished gc":
        # Nobody flushes a new run's directory for its dead writer: a decision in it that a gc has counted may
        # go with the power, and then gc asks whether refs/ is whole.
        options["may_ask"] = True
    made = scene(*SCENES[name], **options)
    has_deltas = bool(rows_of(open_store(made.backend(), create=True))["depth"].any())
    assert has_deltas or "delta" not in name
    return made


def check_usable(a_scene, backend, found, collect=collect):
    """The next save and the next gc work, and leave no step worse and nothing dead behind."""
    opened(backend).save(state(9), step=9)
    expected = found | {9: state(9)}
    assert_steps(visible(backend), expected)
    collect(backend)
    assert_steps(visible(backend), expected)
    assert verify(backend, level="decode").clean
    there = contents(backend)
    assert not [name for name in there if name.startswith(("sessions/", "tmp/"))]
    # Of two copies gc may keep the one whose pack it then finds to be needless: once more is enough.
    collect(backend)
    assert gc.collect(backend, dry_run=True).n_dead == 0
