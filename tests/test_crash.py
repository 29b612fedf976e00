"""Every write of every operation is cut short, fails, or is undone by a power loss."""

import errno
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from deltas import nearly, rows_of, taken
from faults import CrashBackend, Cut, FailingBackend, contents, memory_of
from steps import assert_steps, collect, floats, noise, opened, repeats, same
from steps import visible as steps_of

from deltackpt import gc, index, last, open_run, session, snapshot, these
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import StorageError
from deltackpt.memory import Memory
from deltackpt.session import Session
from deltackpt.shadow import Shadow
from deltackpt.store import open_store
from deltackpt.verify import verify

#: Power-loss states tried after each cut.
N_STATES = 8


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


@pytest.fixture(params=SCENES)
def a_scene(request, monkeypatch):
    for module in (gc, index):
        monkeypatch.setattr(module, "N_FILES_MAX", 2)  # so that index files are merged too
    if "delta" in request.param:
        taken(monkeypatch)
    options = {}
    if "lets steps go" in request.param or "a pin" in request.param:
        options["may_stay"] = frozenset([1, 2, 3])
    if request.param == "a fork beside an unfinished gc":
        # Nobody flushes a new run's directory for its dead writer: a decision in it that a gc has counted may
        # go with the power, and then gc asks whether refs/ is whole.
        options["may_ask"] = True
    made = scene(*SCENES[request.param], **options)
    has_deltas = bool(rows_of(open_store(made.backend(), create=True))["depth"].any())
    assert has_deltas or "delta" not in request.param
    return made


def cuts(a_scene):
    """The scene cut after its 0th change, its 1st, ... and not at all: backend, whether it was completed."""
    for nth in itertools.count():
        backend = CrashBackend(a_scene.backend())
        backend.run_to(nth)
        try:
            a_scene.act(backend)
        except Cut:
            yield backend, False
        else:
            yield backend, True
            return


def check_usable(a_scene, backend, found):
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


def test_a_process_that_dies_anywhere_leaves_the_old_or_the_new(a_scene):
    for backend, is_done in cuts(a_scene):
        left = backend.inner
        found = visible(left)
        assert a_scene.is_new(found) if is_done else a_scene.is_old_or_new(found)
        check_usable(a_scene, left, found)


def test_a_power_loss_anywhere_leaves_the_old_or_the_new(a_scene):
    for nth, (backend, is_done) in enumerate(cuts(a_scene)):
        for left in backend.crash_states(limit=N_STATES, seed=nth):
            found = visible(left)
            assert a_scene.is_new(found) if is_done else a_scene.is_old_or_new(found)
            check_usable(a_scene, left, found)


@pytest.mark.parametrize("landed", [False, True], ids=["not done", "answer lost"])
@pytest.mark.parametrize(
    ("error", "once"),
    [(errno.ENOSPC, False), (errno.EIO, True)],
    ids=["the disk is full for good", "one call fails"],
)
def test_any_write_may_fail_and_is_either_an_error_or_a_success(a_scene, error, once, landed):
    errors = set()
    for nth in itertools.count():
        inner = a_scene.backend()
        backend = FailingBackend(inner, nth, error=error, once=once, landed=landed)
        try:
            a_scene.act(backend)
        except StorageError as e:
            is_done = False
            errors.add(e.errno)
        else:
            is_done = True
        found = visible(inner)
        assert a_scene.is_new(found) if is_done else a_scene.is_old_or_new(found)
        check_usable(a_scene, inner, found)
        if backend.n_ops <= nth:
            break
    assert errors <= {error}


def revived(backend):
    """The storage as the next process has it: what the dead one meant to flush, nobody means to any more."""
    backend._cut_at = None
    backend._dirty.clear()
    return backend


@pytest.mark.parametrize("next_acts", ["gc, save", "save, gc"])
def test_what_the_next_process_builds_on_survives_a_power_loss(a_scene, next_acts):
    for nth, (backend, is_done) in enumerate(cuts(a_scene)):
        revived(backend)
        found = visible(backend)
        for act in next_acts.split(", "):
            if act == "gc":
                collect(backend)
            else:
                # It holds what the dead one was saving, so that it finds it there.
                opened(backend).save(
                    {**state(2), **{f"{s}.moves": state(s)["moves"] for s in range(6)}}, step=9
                )
        saved = opened(backend).load(9)
        for left in backend.crash_states(limit=4, seed=nth):
            after = visible(left)
            assert same(after.pop(9), saved)
            if is_done:
                assert_steps(after, a_scene.after)
            # Without an acknowledgement a step that was seen may still go.
            assert a_scene.is_old_or_new(after)
            found = visible(left)
            collect(left, force=a_scene.may_ask)
            assert_steps(visible(left), found)


def objects_of(backend, prefix):
    return [name for name in contents(backend) if name.startswith(prefix)]


def test_an_index_whose_name_is_lost_costs_no_step_and_gc_makes_it_again():
    crash = CrashBackend(MemoryBackend())
    saved(1)(crash)
    state_without = next(
        s for s in crash.crash_states() if objects_of(s, "packs/") and not objects_of(s, "index/")
    )
    assert_steps(visible(state_without), {1: state(1)})
    collect(state_without)
    assert len(objects_of(state_without, "index/")) == 1
    assert opened(state_without).save(state(1), step=2).n_new_chunks == 0
    assert_steps(visible(state_without), {1: state(1), 2: state(1)})


def test_a_pack_whose_name_is_lost_while_its_index_is_there_is_written_again():
    backend = MemoryBackend()
    saved(1)(backend)
    opened(backend).forget([1])  # as if it had not been committed
    for name in objects_of(backend, "packs/"):
        backend.delete(name)
    assert objects_of(backend, "index/")
    saved(2)(backend)
    collect(backend)
    assert_steps(visible(backend), {2: state(2)})


def sids(*digits):
    values = iter(bytes([digit]) * 16 for digit in digits)
    return lambda size: next(values)


@pytest.mark.parametrize("digits", [(1, 2, 3, 4, 5), (2, 1, 3, 4, 5)])
def test_gc_does_not_trade_a_durable_copy_for_one_whose_writer_died_before_its_barrier(monkeypatch, digits):
    crash = CrashBackend(MemoryBackend())
    whole = {"a": noise(1, 3000)}
    store = open_store(crash, create=True)
    monkeypatch.setattr(session.secrets, "token_bytes", sids(*digits))
    other = Session(store, "other", 1)
    other.look_up(np.zeros((0, 32), np.uint8))  # it looks before the save below, and so knows nothing of it
    opened(crash).save(whole, step=1)
    snapshot.save(other, whole, lambda _: Memory(), Shadow(0))
    crash.run_to(crash.n_ops + 2)
    with pytest.raises(Cut):
        other.publish(b"")  # its pack is there, and not flushed by a barrier
    revived(crash)
    assert len(objects_of(crash, "packs/")) == 2
    collect(crash)
    for left in crash.crash_states():
        assert_steps(visible(left), {1: whole})


def test_no_save_builds_on_a_pack_whose_writer_died_before_its_barrier():
    crash = CrashBackend(MemoryBackend())
    saved(1)(crash)
    new = {"a": noise(5, 3000)}
    crash.run_to(crash.n_ops + 4)
    with pytest.raises(Cut):
        opened(crash, "other").save(new, step=1)
    revived(crash)
    assert len(objects_of(crash, "packs/")) == 2
    store = open_store(crash)
    store.refresh(complete=True)  # as a load does that misses a chunk
    opened(store).save(new, step=2)
    for left in crash.crash_states():
        assert_steps(visible(left), {1: state(1), 2: new})
