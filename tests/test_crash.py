"""The orders of a power loss that once lost something.

What a power loss may leave at all is tried in tests/crash, what a failure may in test_every_call.py.
"""

import contextlib
import itertools

import numpy as np
import pytest
from faults import CrashBackend, Cut, contents
from scenes import saved, state, visible
from steps import assert_steps, collect, noise, opened

from deltackpt import session, snapshot
from deltackpt.backends.memory import MemoryBackend
from deltackpt.memory import Memory
from deltackpt.session import Session
from deltackpt.shadow import Shadow
from deltackpt.store import open_store


def revived(backend):
    """The storage as the next process has it: what the dead one meant to flush, nobody means to any more."""
    backend._cut_at = None
    backend._dirty.clear()
    return backend


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
    crash.run_to(crash.n_ops + 6)  # with a look at the directories
    with pytest.raises(Cut):
        opened(crash, "other").save(new, step=1)
    revived(crash)
    assert len(objects_of(crash, "packs/")) == 2
    store = open_store(crash)
    store.refresh(complete=True)  # as a load does that misses a chunk
    opened(store).save(new, step=2)
    for left in crash.crash_states():
        assert_steps(visible(left), {1: state(1), 2: new})


def died_after_deciding(step):
    """A store of a step, and another whose writer died between its decision and the flush of it."""
    decided, n_ops = f"refs/main/{step}.{1 + (step == 1)}", 0
    crash = CrashBackend(MemoryBackend())
    while decided not in contents(crash.inner):
        crash = CrashBackend(MemoryBackend())
        saved(1)(crash)
        crash.run_to(crash.n_ops + n_ops)
        with pytest.raises(Cut):
            opened(crash).save(state(step), step=step, overwrite=True)
        n_ops += 1
    return revived(crash)


@pytest.mark.parametrize(("seen", "saves"), [("2.1", "3.1"), ("1.2", "1.3")])
def test_a_power_loss_takes_no_decision_and_leaves_one_that_builds_on_it(seen, saves):
    step = int(saves[0])
    for nth in itertools.count():
        crash = died_after_deciding(int(seen[0]))
        crash.run_to(crash.n_ops + nth)
        with contextlib.suppress(Cut):
            opened(crash).save(state(step), step=step, overwrite=True)
        is_over = crash.n_ops <= crash._cut_at
        for left in crash.crash_states():
            names = contents(left)
            assert f"refs/main/{saves}" not in names or f"refs/main/{seen}" in names
        if is_over:
            break
