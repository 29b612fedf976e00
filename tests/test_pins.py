"""A pinned step stays: alone, beside whoever forgets it at the same moment, and after a crash."""

from __future__ import annotations

import itertools
import threading
from functools import partial

import pytest
from faults import CrashBackend, Cut, Wrapper, contents, memory_of
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import collect, noise, opened, same, visible

from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import (
    AlreadyExistsError,
    CorruptError,
    DeltackptError,
    InvalidInputError,
    NotFoundError,
)
from deltackpt.records import Fence, Pin, Slot
from deltackpt.retention import Retention
from deltackpt.verify import verify


def state(step):
    return {"w": noise(step, 3000), "step": step}


def saved(*steps):
    backend = MemoryBackend()
    run = opened(backend)
    for step in steps:
        run.save(state(step), step=step)
    return backend


def pins(backend):
    return [entry.name for entry in backend.list("refs/main/") if Pin.from_key(entry.name)]


def forget_unasked(backend, step):
    """What somebody does who looked for a pin before it was there."""
    refs = opened(backend).store.refs
    refs.forget([refs.commit("main", step).slot])


# -- alone


def test_a_pinned_step_is_listed_and_stays():
    run = opened(saved(1, 2, 3))
    run.pin(2)
    run.pin(1)
    assert run.pinned() == [1, 2]
    run.unpin(2)
    assert run.pinned() == [1]
    for change in (lambda: run.forget([1, 2]), lambda: run.save(state(9), step=1, overwrite=True)):
        with pytest.raises(InvalidInputError, match="run 'main' step 1 is pinned") as e:
            change()
        assert e.value.hint == "deltackpt pin 1 --run main --undo"
    assert run.steps() == [1, 2, 3]
    assert same(run.load(1), state(1))
    run.unpin(1)
    run.save(state(9), step=1, overwrite=True)
    run.forget([1])
    assert run.steps() == [2, 3]


def test_what_is_so_already_writes_nothing():
    backend = saved(1)
    run = opened(backend)
    run.unpin(1)
    assert pins(backend) == []
    for _ in range(2):
        run.pin(1)
    assert pins(backend) == ["refs/main/1.pin-1"]
    for _ in range(2):
        run.unpin(1)
    assert pins(backend) == ["refs/main/1.pin-1", "refs/main/1.pin-2"]
    opened(backend).pin(1)
    assert len(pins(backend)) == 3
    assert opened(backend).pinned() == [1]


def test_only_a_step_that_is_there_is_pinned():
    backend = saved(1, 2)
    run = opened(backend)
    run.forget([2])
    for step in (2, 7):
        for change in (run.pin, run.unpin):
            with pytest.raises(NotFoundError, match=f"has no step {step}; nearest: 1"):
                change(step)
    assert pins(backend) == []


def test_a_step_saved_again_after_it_was_forgotten_is_not_pinned():
    run = opened(saved(1, 2))
    run.pin(1)
    run.unpin(1)
    run.forget([1])
    run.save(state(1), step=1)
    assert run.pinned() == []
    run.pin(1)
    assert run.pinned() == [1]


def test_a_save_asks_for_no_pin_and_lists_nothing():
    class Asked(Wrapper):
        asked = ()

        def _do(self, op, name, call, *, mutates=True):
            self.asked = (*self.asked, (op, name))
            return call()

    backend = Asked(saved(1))
    run = opened(backend)
    run.save(state(2), step=2)
    backend.asked = ()
    run.save(state(3), step=3)
    assert not [name for _, name in backend.asked if ".pin-" in name]
    assert not [name for op, name in backend.asked if op == "list" and name.startswith("refs/")]


# -- with a tombstone


def test_a_tombstone_of_a_pinned_step_is_void_until_it_is_unpinned():
    backend = saved(1, 2)
    opened(backend).pin(1)
    forget_unasked(backend, 1)
    collect(backend)
    run = opened(backend)
    assert (run.steps(), run.pinned(), 1 in run) == ([1, 2], [1], True)
    assert not run.store.refs.is_gone(Slot("main", 1, 1))
    assert same(run.load(1), state(1))
    with pytest.raises(AlreadyExistsError):
        run.save(state(5), step=1)
    run.pin(1)  # as it is
    assert verify(backend, level="decode").clean
    run.unpin(1)
    assert (run.steps(), run.pinned(), 1 in run) == ([2], [], False)
    assert run.store.refs.is_gone(Slot("main", 1, 1))
    assert collect(backend).n_deleted
    with pytest.raises(NotFoundError):
        run.pin(1)
    run.save(state(6), step=1)
    assert same(run.load(1), state(6))


def test_only_the_newest_commit_of_a_pinned_step_is_held():
    backend = saved(1)
    run = opened(backend)
    run.save(state(2), step=1, overwrite=True)
    run.pin(1)
    forget_unasked(backend, 1)
    run.store.refs.decide(Fence(Slot("main", 1, 3), bytes(16)))
    fresh = opened(backend)
    listing = fresh.store.refs.listing("main")
    assert listing.gone == {Slot("main", 1, 1)}
    assert [fresh.store.refs.is_gone(Slot("main", 1, n)) for n in (1, 2)] == [True, False]
    assert fresh.store.refs.slot("main", 1) == (Slot("main", 1, 4), fresh.commit(1))
    assert same(fresh.load(1), state(2))


def test_a_listing_that_shows_a_tombstone_does_not_miss_the_pin_before_it():
    backend = saved(1)

    class Torn(Wrapper):
        """A pin and then a tombstone come while the directory is read, and only the later one is seen."""

        n_lists = 0

        def _do(self, op, name, call, *, mutates=True):
            found = call()
            if (op, name) == ("list", "refs/main/"):
                self.n_lists += 1
                if self.n_lists == 1:
                    opened(backend).pin(1)
                    forget_unasked(backend, 1)
                    return [e for e in call() if not Pin.from_key(e.name)]
            return found

    refs = opened(Torn(backend)).store.refs
    assert list(refs.steps("main")) == [1]


# -- at the same moment


class Gates(Wrapper):
    """Stops before every call that matters, until it is this actor's turn."""

    def __init__(self, inner, turns, actor):
        super().__init__(inner)
        self.turns, self.actor = turns, actor

    def _do(self, op, name, call, *, mutates=True):
        if self.turns.matters(name):
            self.turns.wait(self.actor)
        return call()


class Turns:
    """Lets actors go on one call at a time, in the order of a schedule; what is left out is in order."""

    def __init__(self, schedule, matters):
        self.schedule, self.matters = iter(schedule), matters
        self.changed = threading.Condition()
        self.waiting, self.running, self.taken = set(), 0, []
        self.turn = None

    def wait(self, actor):
        with self.changed:
            self.waiting.add(actor)
            self.running -= 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.turn == actor)
            self.turn = None
            self.waiting.remove(actor)

    def run(self, actors):
        """Run them all; return what each gave back or raised."""
        outcomes = {}

        def act(actor, function):
            try:
                self.wait(actor)
                outcomes[actor] = function()
            except DeltackptError as e:
                outcomes[actor] = e
            with self.changed:
                self.running -= 1
                self.changed.notify_all()

        threads = [threading.Thread(target=act, args=item) for item in actors.items()]
        self.running = len(threads)
        for thread in threads:
            thread.start()
        with self.changed:
            while True:
                self.changed.wait_for(lambda: not self.running and self.turn is None)
                if not self.waiting:
                    break
                wanted = next(self.schedule, 0)
                self.turn = sorted(self.waiting)[wanted % len(self.waiting)]
                self.taken.append((wanted % len(self.waiting), len(self.waiting)))
                self.running += 1
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.turn is None)
        for thread in threads:
            thread.join()
        return outcomes


def is_contended(name):
    """Whether calls about this can come in an order that matters; the decisions are all there."""
    return name.endswith(".gone") or ".pin-" in name or name == "refs/main/"


def schedules(play):
    """Call `play` with every schedule; it returns the choices taken and of how many."""
    todo = [[]]
    n = 0
    while todo:
        prefix = todo.pop()
        taken = play(prefix)
        n += 1
        for at in range(len(prefix), len(taken)):
            todo += [[c for c, _ in taken[:at]] + [other] for other in range(1, taken[at][1])]
    return n


def check(backend, pinned):
    """After a pin beside a forget, and gcs as they like: what a pin that succeeded promised."""
    collect(backend)
    found = visible(backend)
    assert same(found[2], state(2))
    if pinned is None:
        assert opened(backend).pinned() == [1]
        assert same(found[1], state(1))
    else:
        assert isinstance(pinned, NotFoundError)
        assert opened(backend).pinned() == []
        assert list(found) == [2]
    assert verify(backend, level="decode").clean


SAVED = contents(saved(1, 2))


def test_in_every_order_a_pin_beside_a_forget_holds_the_step_or_says_that_it_is_gone():
    seen = set()

    def play(schedule):
        backend = memory_of(SAVED)
        turns = Turns(schedule, is_contended)
        outcomes = turns.run(
            {
                "forget": lambda: opened(Gates(backend, turns, "forget")).forget([1]),
                "pin": lambda: opened(Gates(backend, turns, "pin")).pin(1),
            }
        )
        check(backend, outcomes["pin"])
        has_tombstone = backend.exists("refs/main/1.1.gone")
        assert has_tombstone == isinstance(outcomes["forget"], Retention)
        seen.add((outcomes["pin"] is None, has_tombstone, len(pins(backend))))
        return turns.taken

    assert schedules(play) > 50
    # Pinned and forgotten in vain; pinned and so not forgotten; forgotten first; taken back.
    assert seen == {(True, True, 1), (True, False, 1), (False, True, 0), (False, True, 2)}


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 2), max_size=150))
def test_nor_does_a_gc_in_between_take_what_is_pinned(schedule):
    backend = memory_of(SAVED)
    turns = Turns(schedule, lambda name: is_contended(name) or name.startswith(("packs/", "gc/")))
    outcomes = turns.run(
        {
            "forget": lambda: opened(Gates(backend, turns, "forget")).forget([1]),
            "gc": lambda: collect(Gates(backend, turns, "gc")),
            "pin": lambda: opened(Gates(backend, turns, "pin")).pin(1),
        }
    )
    if isinstance(outcomes["gc"], DeltackptError):  # it met the step that was about to be given up again
        assert isinstance(outcomes["gc"], CorruptError)
        assert isinstance(outcomes["pin"], NotFoundError)
    check(backend, outcomes["pin"])


def test_two_who_pin_at_once_write_one_record():
    def play(schedule):
        backend = memory_of(SAVED)
        turns = Turns(schedule, is_contended)
        gates = [Gates(backend, turns, who) for who in "ab"]
        outcomes = turns.run({gate.actor: partial(lambda g: opened(g).pin(1), gate) for gate in gates})
        assert outcomes == {"a": None, "b": None}
        assert pins(backend) == ["refs/main/1.pin-1"]
        return turns.taken

    assert schedules(play) > 5


@pytest.mark.parametrize("change", ["pin", "unpin"])
def test_a_pin_cut_short_anywhere_is_there_or_not_and_harms_no_step(change):
    before, wanted = memory_of(SAVED), [1]
    if change == "unpin":
        opened(before).pin(1)
        wanted = []
    for nth in itertools.count():
        crash = CrashBackend(memory_of(contents(before)))
        crash.run_to(nth)
        try:
            getattr(opened(crash), change)(1)
        except Cut:
            is_done = False
        else:
            is_done = True
        for left in [crash.inner, *crash.crash_states(limit=20)]:
            assert opened(left).pinned() in ([wanted] if is_done else [[1], []])
            assert {s: same(v, state(s)) for s, v in visible(left).items()} == {1: True, 2: True}
            assert verify(left).clean
            getattr(opened(left), change)(1)
            assert opened(left).pinned() == wanted
        if is_done:
            break


# -- verify


def test_verify_knows_a_pin_and_tells_one_that_is_damaged_or_out_of_sequence():
    backend = saved(1)
    for _ in range(2):
        opened(backend).pin(1)
        opened(backend).unpin(1)
    objects = contents(backend)
    assert (verify(backend).damage, verify(backend).foreign) == ([], [])
    key = "refs/main/1.pin-2"
    for data, told in [(objects[key][:-1], "checksum"), (objects["refs/main/1.pin-1"], "of its name")]:
        [damage] = verify(memory_of(objects | {key: data})).damage
        assert (damage.kind, damage.key) == ("pin", key)
        assert told in damage.message
    del objects[key]
    [damage] = verify(memory_of(objects)).damage
    assert (damage.kind, damage.key) == ("pin", key)
    assert damage.message == "missing, and refs/main/1.pin-3 is there"


def test_verify_tells_a_pin_of_no_step_and_files_that_are_not_ours():
    backend = saved(1)
    lone = Pin("main", 5, 1)
    backend.create_once(lone.key, lone.to_bytes())
    for name in ("refs/main/1.pin-0", "refs/main/1.pin-x", "refs/main/notes"):
        backend.create_once(name, b"mine")
    report = verify(backend)
    assert [(d.kind, d.key) for d in report.damage] == [("pin", lone.key)]
    assert report.foreign == ["refs/main/1.pin-0", "refs/main/1.pin-x", "refs/main/notes"]
    assert opened(backend).pinned() == []


def test_a_number_that_a_name_claims_costs_nothing():
    backend = saved(1)
    far = Pin("main", 1, 999_999_999)
    backend.create_once(far.key, far.to_bytes())
    assert 1 <= len(verify(backend).damage) <= 10
