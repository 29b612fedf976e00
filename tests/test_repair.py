"""Each kind of damage is repaired as far as can be, and no repair makes it worse."""

import contextlib
import errno
import itertools
import shutil

import numpy as np
import pytest
from blake3 import blake3
from deltas import nearly, rows_of, taken
from faults import CrashBackend, Cut, contents, memory_of
from steps import assert_steps, collect, floats, noise, opened, repeats, same, visible

from deltackpt import gc, snapshot
from deltackpt.backends.local import LocalBackend
from deltackpt.backends.memory import MemoryBackend
from deltackpt.backends.osshim import Os
from deltackpt.errors import CorruptError, DeltackptError, InvalidInputError, StorageError
from deltackpt.memory import Memory
from deltackpt.pack import Record
from deltackpt.records import GC_RUN, Fence, Figures, SessionName, Slot, aside_key, lost_key
from deltackpt.repair import repair
from deltackpt.session import Session
from deltackpt.shadow import Shadow
from deltackpt.store import open_store
from deltackpt.verify import verify


def state(step):
    return {
        "stays": noise(1, 3000),
        "moves": floats(step, 700),
        "returns": repeats(step % 2, 4000),
        "long": floats(9, 200_000),
        "step": step,
    }


STATES = {step: state(step) for step in (1, 2, 3)}


@pytest.fixture(scope="module")
def whole():
    """A store of three steps, a forgotten one, a pin, and a gc."""
    backend = MemoryBackend()
    run = opened(backend)
    for step in (1, 2, 3, 4):
        run.save(state(step), step=step)
    run.forget([4])
    assert collect(backend).n_deleted
    run.pin(1)
    run.pin(2)
    run.unpin(2)
    assert verify(backend, level="decode").clean
    return contents(backend)


def named(objects, prefix, n=0):
    return sorted((name for name in objects if name.startswith(prefix)), key=lambda n: -len(objects[n]))[n]


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def readable(backend):
    """The steps that can be loaded, the others left out."""
    found = {}
    for step in opened(backend).steps():
        try:
            found[step] = opened(backend).load(step)
        except DeltackptError:
            continue
    return found


def verbs(result):
    return [action.verb for action in result.actions]


def check_settled(backend):
    """A second repair does nothing."""
    before = contents(backend)
    assert repair(backend).actions == []
    assert contents(backend) == before


def test_of_a_clean_store_nothing_is_to_be_done(whole):
    backend = memory_of(whole)
    result = repair(backend)
    assert result.clean
    assert not result.actions
    assert contents(backend) == whole


# -- packs


def test_good_records_of_a_bad_pack_are_kept_and_the_next_save_makes_old_steps_whole(whole):
    key = named(whole, "packs/")
    backend = memory_of(whole | {key: flipped(whole[key], 100)})  # the first record's payload or header
    lost_before = {1, 2, 3} - readable(backend).keys()
    assert lost_before
    result = repair(backend)
    assert "rewrite" in verbs(result)
    assert "quarantine" in verbs(result)
    assert not result.clean
    assert contents(backend)[key] == flipped(whole[key], 100)  # it stays where it is
    assert readable(backend).keys() == {1, 2, 3} - lost_before
    assert [d for d in verify(backend, level="decode").damage if d.kind == "pack"] == []
    check_settled(backend)
    with pytest.raises(CorruptError, match="in no pack"):
        collect(backend)  # it would take the bad copy for one
    opened(backend).save(state(1), step=9)
    assert verify(backend, level="decode").clean
    assert_steps(visible(backend), STATES | {9: state(1)})
    assert not [name for name in contents(backend) if name.startswith("quarantine/") and "~" not in name]
    collect(backend)
    assert key not in contents(backend)  # every step is whole without it
    assert_steps(visible(backend), STATES | {9: state(1)})
    assert verify(backend, level="decode").clean
    check_settled(backend)


@pytest.mark.parametrize("part", ["header", "footer", "trailer"])
def test_a_pack_of_which_only_the_frame_is_bad_loses_nothing(whole, part):
    key = named(whole, "packs/")
    data = whole[key]
    at = {"header": 20, "footer": len(data) - 50, "trailer": len(data) - 10}[part]
    backend = memory_of(whole | {key: flipped(data, at)})
    assert repair(backend).clean
    assert_steps(visible(backend), STATES)
    check_settled(backend)


def test_without_footer_and_index_the_records_are_found_by_their_headers(whole):
    objects = {name: data for name, data in whole.items() if not name.startswith("index/")}
    for key in [name for name in objects if name.startswith("packs/")]:
        objects[key] = flipped(objects[key], len(objects[key]) - 10)
    backend = memory_of(objects)
    assert not readable(backend)
    assert repair(backend).clean
    assert_steps(visible(backend), STATES)


def test_two_packs_that_were_exchanged_lose_nothing(whole):
    a, b = named(whole, "packs/"), named(whole, "packs/", 1)
    backend = memory_of(whole | {a: whole[b], b: whole[a]})
    assert repair(backend).clean
    assert_steps(visible(backend), STATES)
    check_settled(backend)


def test_a_record_that_decodes_to_something_else_is_not_taken_for_its_chunk():
    """As an encoder would write it that has a bug: every checksum is right."""
    backend = MemoryBackend()
    opened(backend).save(STATES[1], step=1)
    good = STATES[1]["stays"]
    payload = good.copy()
    payload[7] ^= 1
    record = Record.of(payload, codec=0, itemsize=1, raw_size=good.size, chunk_id=blake3(good).digest())
    key = named(contents(backend), "packs/")
    with Session.for_gc(open_store(backend)) as session:
        session.copy(record, payload)
        session.publish(None)
        session.finish()
    backend.delete(key)  # the good copy is in it, and all else
    repair(backend)
    assert lost_key(record.id) in contents(backend)
    opened(backend).save(STATES[1], step=2)
    assert verify(backend, level="decode").clean
    assert_steps(visible(backend), {1: STATES[1], 2: STATES[1]})


def test_a_pack_cut_short_keeps_what_is_whole(whole):
    key = named(whole, "packs/")
    backend = memory_of(whole | {key: whole[key][: len(whole[key]) // 2]})
    assert not repair(backend).clean
    check_settled(backend)
    for step in STATES:
        opened(backend).save(state(step), step=10 + step)
    assert verify(backend, level="decode").clean
    assert_steps(visible(backend), STATES | {10 + step: state(step) for step in STATES})


def test_a_lost_pack_is_told_and_healed_by_the_next_save(whole):
    key = named(whole, "packs/")
    backend = memory_of({name: data for name, data in whole.items() if name != key})
    result = repair(backend)
    assert not result.clean
    assert "index" in verbs(result)
    check_settled(backend)
    with pytest.raises(CorruptError, match="in no pack"):
        collect(backend)
    for step in STATES:
        opened(backend).save(state(step), step=10 + step)
    assert verify(backend, level="decode").clean
    collect(backend)
    assert_steps(visible(backend), STATES | {10 + step: state(step) for step in STATES})


def test_a_process_that_remembers_its_last_save_heals_too(whole):
    backend = MemoryBackend()
    run = opened(backend)
    run.save(state(1), step=1)
    key = named(contents(backend), "packs/")
    data = contents(backend)[key]
    backend.delete(key)
    backend.create_once(key, flipped(data, 100))
    repair(backend)
    run.save(state(1), step=2)
    assert verify(backend, level="decode").clean
    assert_steps(visible(backend), {1: state(1), 2: state(1)})


def test_a_delta_whose_base_is_bad_is_kept_and_usable_once_the_base_is_back(monkeypatch):
    taken(monkeypatch)
    backend = MemoryBackend()
    weights = floats(1, 700)
    states = {1: {"w": weights}, 2: {"w": nearly(weights, 1)}}
    for step, of in states.items():
        opened(backend).save(of, step=step)
    base = next(n for n in contents(backend) if n.startswith("packs/") and _depths(backend, n) == {0})
    data = backend.read(base)
    backend.delete(base)
    backend.create_once(base, flipped(data, 200))
    assert not repair(backend).clean
    assert readable(backend) == {}
    monkeypatch.undo()
    opened(backend).save(states[1], step=3)
    assert verify(backend, level="decode").clean
    assert_steps(visible(backend), states | {3: states[1]})


def _depths(backend, key):
    index = open_store(backend).refresh(complete=True)
    return {
        int(row["depth"]) for s in index.segments for row in s.rows if s.packs[int(row["pack"])].key == key
    }


# -- index


@pytest.mark.parametrize("damage", ["flipped", "lost"])
def test_an_index_is_made_again_from_packs(whole, damage):
    objects = dict(whole)
    for key in [name for name in whole if name.startswith("index/")]:
        data = objects.pop(key)
        if damage == "flipped":
            objects[key] = flipped(data, len(data) // 2)
    backend = memory_of(objects)
    assert repair(backend).clean
    assert not open_store(backend).refresh(complete=True).unlisted
    assert opened(backend).save(state(3), step=9).n_new_chunks == 0
    check_settled(backend)
    assert_steps(visible(backend), STATES | {9: state(3)})


# -- small records


def test_records_whose_names_say_all_are_set_aside(whole):
    keys = [n for n in whole if n.endswith(".gone") or ".pin-" in n]
    assert len(keys) == 4
    backend = memory_of(whole | dict.fromkeys(keys, b"?"))
    assert not verify(backend).clean
    assert repair(backend).clean
    assert_steps(visible(backend), STATES)
    assert opened(backend).pinned() == [1]
    check_settled(backend)


def test_a_missing_pin_between_others_is_put_back(whole):
    key = next(n for n in whole if n.endswith("2.pin-1"))
    backend = memory_of({n: data for n, data in whole.items() if n != key})
    assert repair(backend).clean
    assert contents(backend)[key] == whole[key]


def test_a_forgotten_decision_that_is_lost_does_not_swallow_the_next_save_of_its_step(whole):
    backend = memory_of({n: data for n, data in whole.items() if n != "refs/main/4.1"})
    opened(backend).save(state(4), step=4)
    assert same(opened(backend).load(4), state(4))
    assert repair(backend).clean
    assert same(opened(backend).load(4), state(4))
    check_settled(backend)


def test_a_newest_decision_that_is_lost_is_missed_by_number_and_comes_back_from_a_copy():
    backend = MemoryBackend()
    states = {step: {"w": noise(step, 3000)} for step in (1, 2, 3)}
    for step, of in states.items():
        opened(backend).save(of, step=step)
    opened(backend).forget([1])
    assert collect(backend).n_deleted
    copy = contents(backend)
    backend.delete("refs/main/3.1")
    assert [d.key for d in verify(backend).damage] == ["refs/"]
    assert not repair(backend).clean
    assert repair(backend, source=memory_of(copy)).clean
    assert_steps(visible(backend), {2: states[2], 3: states[3]})


def test_a_forgotten_decision_that_is_damaged_is_set_aside(whole):
    backend = memory_of(whole | {"refs/main/4.1": b"?"})
    assert repair(backend).clean
    opened(backend).save(state(4), step=4)
    assert_steps(visible(backend), STATES | {4: state(4)})
    collect(backend)
    check_settled(backend)


def replaced(objects=None):
    """A store of two steps, the first of them saved twice."""
    backend = memory_of(objects or {})
    for step, seed in ((1, 1), (1, 2), (2, 3)):
        opened(backend).save({"w": noise(seed, 3000)}, step=step, overwrite=True)
    return backend


REPLACED = {1: {"w": noise(2, 3000)}, 2: {"w": noise(3, 3000)}}


@pytest.mark.parametrize("lost", [["1.1"], ["1.1", "1.1.gone"]])
def test_an_attempt_that_is_lost_below_the_one_that_counts_is_fenced(lost):
    backend = replaced()
    for name in lost:
        backend.delete(f"refs/main/{name}")
    assert not verify(backend).clean
    assert repair(backend).clean
    assert_steps(visible(backend), REPLACED)
    check_settled(backend)
    opened(backend).save({"w": noise(4, 3000)}, step=1, overwrite=True)
    assert_steps(visible(backend), REPLACED | {1: {"w": noise(4, 3000)}})


def test_a_damaged_fence_below_the_attempt_that_counts_costs_nothing():
    backend = MemoryBackend()
    opened(backend).save({"w": noise(3, 3000)}, step=2)
    key = Slot("main", 1, 1).key
    backend.create_once(key, Fence(Slot("main", 1, 1), bytes(16)).to_bytes())
    opened(backend).save({"w": noise(2, 3000)}, step=1)
    spoilt = memory_of(contents(backend) | {key: b"?"})
    assert repair(spoilt).clean
    assert_steps(visible(spoilt), REPLACED)
    collect(spoilt)
    check_settled(spoilt)
    assert_steps(visible(spoilt), REPLACED)


def test_a_damaged_fence_of_a_gc_is_set_aside_and_stops_no_gc():
    backend = replaced()
    slot = Slot(GC_RUN, 7, 1)
    backend.create_once(slot.key, b"?")
    backend.create_once(SessionName(bytes(16), 0, slot).key, b"?", flush=False)
    collect(backend)
    assert not backend.names("sessions/")
    assert not verify(backend).clean
    assert repair(backend).clean
    check_settled(backend)
    collect(backend)
    assert_steps(visible(backend), REPLACED)


def test_a_visible_decision_that_is_damaged_is_told_and_left_alone(whole):
    backend = memory_of(whole | {"refs/main/2.1": b"?"})
    result = repair(backend)
    assert not result.clean
    assert not result.actions
    assert [d.hits for d in result.damage] == [["main 2: all of it"]]
    with pytest.raises(CorruptError):
        collect(backend)
    opened(backend).forget([2])
    assert repair(backend).clean
    collect(backend)
    assert_steps(visible(backend), {1: state(1), 3: state(3)})


@pytest.mark.parametrize("kinds", [("condemn",), ("sweep",), ("condemn", "sweep")])
@pytest.mark.parametrize("damage", ["flipped", "lost"])
def test_a_lost_record_of_a_gc_is_made_up_for_by_another_cycle(whole, kinds, damage):
    objects = dict(whole)
    for kind in kinds:
        data = objects.pop(f"gc/{kind}-0")
        if damage == "flipped":
            objects[f"gc/{kind}-0"] = flipped(data, 10)
    if damage == "lost" and kinds != ("condemn",):
        return  # nobody can tell: the cycle is not there, or ended again
    backend = memory_of(objects)
    assert repair(backend).clean
    check_settled(backend)
    collect(backend)
    assert_steps(visible(backend), STATES)
    opened(backend).save(state(5), step=5)
    collect(backend)
    assert_steps(visible(backend), STATES | {5: state(5)})
    assert verify(backend, level="decode").clean


def test_what_a_lost_record_of_a_gc_may_have_listed_no_save_relies_on_until_another_gc_has_looked(whole):
    """Another gc may have read the record before it was damaged, and delete by it; or a save rely on it."""
    packs = {name for name in whole if name.startswith("packs/")}
    backend = memory_of(whole | {"gc/condemn-0": b"?", "gc/sweep-0": b"?"})
    with pytest.raises(CorruptError):
        opened(backend).save(state(3), step=9)
    repair(backend)
    assert {pack.key for pack in open_store(backend).gc_state()[1]} == packs
    assert opened(backend).save(state(3), step=9).n_new_chunks > 0
    collect(backend)
    assert opened(backend).save(state(3), step=10).n_new_chunks == 0
    gone = open_store(memory_of(whole)).gc_record("gc/sweep-0").packs
    [key] = [pack.key for pack in gone]
    backend = memory_of(whole | {"gc/sweep-0": b"?", key: whole[named(whole, "packs/")]})  # it came back
    repair(backend)
    assert open_store(backend).gc_state()[1] == gone


# -- another store


def test_a_manifest_comes_back_from_a_fork_of_its_step(whole):
    backend = memory_of(whole)
    opened(backend).fork("fork", step=2)
    key = opened(backend).commit(2).manifest_key
    data = backend.read(key)
    backend.delete(key)
    backend.create_once(key, flipped(data, 50))
    result = repair(backend)
    assert result.clean
    assert verbs(result) == ["replace"]
    assert backend.read(aside_key(key)) == flipped(data, 50)
    assert_steps(visible(backend), STATES)
    check_settled(backend)


def every_damage(whole):
    """One object lost, or spoilt, at a time."""
    for name in whole:
        if name.startswith(("sessions/", "tmp/")) or name == "deltackpt.json":
            continue
        yield name, {n: data for n, data in whole.items() if n != name}
        yield name, whole | {name: flipped(whole[name], len(whole[name]) // 2)}


def test_with_a_copy_of_the_store_everything_comes_back(whole):
    for name, objects in every_damage(whole):
        backend = memory_of(objects)
        repair(backend, source=memory_of(whole))
        is_lost = name not in objects
        if is_lost and name == "refs/main/4.1.gone":  # to be forgotten again
            assert [d.hits for d in verify(backend).damage] == [["main 4: all of it"]]
            opened(backend).forget([4])
        assert verify(backend, level="decode").clean, name
        assert_steps(visible(backend), STATES)
        check_settled(backend)


def test_chunks_come_back_from_a_store_of_another_job(whole):
    other = MemoryBackend()
    for step in (3, 2, 1):
        opened(other, "theirs").save(state(step), step=100 - step)
    key = named(whole, "packs/")
    backend = memory_of({n: data for n, data in whole.items() if n != key})
    result = repair(backend, source=other)
    assert result.clean
    assert "fetch" in verbs(result)
    assert_steps(visible(backend), STATES)
    check_settled(backend)


def test_a_chunk_that_is_damaged_there_too_is_told(whole):
    key = named(whole, "packs/")
    spoilt = whole | {key: flipped(whole[key], 100)}
    backend = memory_of(spoilt)
    result = repair(backend, source=memory_of(spoilt))
    assert not result.clean
    assert "fetch" not in verbs(result)  # its index has the chunk, its pack has not
    check_settled(backend)


def test_a_store_is_not_repaired_from_itself(whole):
    backend = memory_of(whole)
    with pytest.raises(InvalidInputError, match="itself"):
        repair(backend, source=backend)


def test_nor_by_another_name_of_it(tmp_path):
    saved_on_disk(tmp_path / "store", (1, 1))
    (tmp_path / "link").symlink_to("store")
    with pytest.raises(InvalidInputError, match="itself"):
        repair(tmp_path / "store", source=tmp_path / "link")


# -- the plan, and a repair cut short


def test_a_dry_run_tells_what_is_done_then_and_changes_nothing(whole):
    for name, objects in every_damage(whole):
        backend = memory_of(objects)
        told = repair(backend, dry_run=True)
        assert contents(backend) == objects
        done = repair(backend)
        assert told.actions == done.actions, name
        assert told.clean == (objects == whole or not (told.actions or told.damage))


def spoilt_everywhere(whole):
    """Damage of many kinds at a time; step 2 stays whole, or would."""
    packs = sorted((n for n in whole if n.startswith("packs/")), key=lambda n: -len(whole[n]))
    objects = dict(whole)
    objects[packs[0]] = flipped(whole[packs[0]], 100)
    objects[packs[1]] = flipped(whole[packs[1]], len(whole[packs[1]]) - 5)
    del objects[named(whole, "index/")]
    for key in ("refs/main/4.1.gone", "refs/main/4.1", "gc/sweep-0", "refs/main/2.pin-1"):
        objects[key] = b"?"
    return objects


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power lost"])
@pytest.mark.parametrize("has_source", [False, True])
def test_a_repair_cut_short_anywhere_is_no_worse_and_can_be_done_again(whole, power, has_source):
    objects = spoilt_everywhere(whole)
    source = memory_of(whole) if has_source else None
    done = memory_of(objects)
    best = repair(done, source=source)
    expected, before = readable(done), readable(memory_of(objects))
    for nth in itertools.count():
        crash = CrashBackend(memory_of(objects))
        crash.run_to(nth)
        try:
            repair(crash, source=source)
        except Cut:
            is_done = False
        else:
            is_done = True
        for left in crash.crash_states(limit=6, seed=nth) if power else [crash.inner]:
            found = readable(left)
            assert all(step in found and same(found[step], before[step]) for step in before)
            assert repair(left, source=source).damage == best.damage
            assert_steps(readable(left), expected)
            check_settled(left)
        if is_done:
            break
    assert nth > 8


# -- beside others


def test_a_save_that_relies_on_the_bad_pack_finds_what_was_good_in_it(whole):
    key = named(whole, "packs/")
    backend = memory_of(whole | {key: flipped(whole[key], 100)})
    opened(backend).unpin(1)
    opened(backend).forget([1, 2, 3])
    new = {"long": state(1)["long"]}
    session = Session(open_store(backend), "main", 9)  # it began before the pack was set aside
    saved = snapshot.save(session, new, lambda _: Memory(), Shadow(0))
    assert session.n_new_chunks == 0
    repair(backend)
    gc.collect(backend)
    manifest = saved.manifest.to_bytes()
    session.publish(manifest)
    session.commit(manifest, parent=None, metrics={}, metadata={}, figures=Figures())
    collect(backend)
    collect(backend)
    assert key not in contents(backend)
    assert_steps(visible(backend), {9: new})


class Between(CrashBackend):
    """Does something else before the nth change."""

    def __init__(self, inner, nth, other):
        super().__init__(inner)
        self._nth, self._other = nth, other

    def _do(self, op, name, call, *, mutates=True):
        if mutates and self.n_ops == self._nth and self._other is not None:
            other, self._other = self._other, None
            other(self.inner)
        return super()._do(op, name, call, mutates=mutates)


OTHERS = {
    "a save": lambda backend: opened(backend).save(state(1), step=9),
    "a gc": lambda backend: _collect_if_it_can(backend),
    "a repair": repair,
    "a save and a gc": lambda b: (opened(b).save(state(1), step=9), _collect_if_it_can(b)),
}


def _collect_if_it_can(backend):
    with contextlib.suppress(CorruptError):
        collect(backend, patience_s=3600)


@pytest.mark.parametrize("other", OTHERS)
def test_a_repair_beside_others_loses_nothing(whole, other):
    key = named(whole, "packs/")
    objects = whole | {key: flipped(whole[key], 100), named(whole, "index/"): b"?"}
    done = memory_of(objects)
    repair(done)
    expected = readable(done)
    for nth in itertools.count():
        between = Between(memory_of(objects), nth, OTHERS[other])
        repair(between)
        left = between.inner
        if between._other is not None:
            break
        repair(left)
        found = readable(left)
        assert all(step in found and same(found[step], expected[step]) for step in expected)
        if "save" in other:
            opened(left).save(state(1), step=19)
            assert same(opened(left).load(9), state(1))
            collect(left)
            collect(left)
            assert_steps(visible(left), STATES | {9: state(1), 19: state(1)})
            assert verify(left, level="decode").clean
    assert nth > 8


def test_latest_good_passes_over_steps_that_are_damaged(whole):
    for key in [n for n in whole if n.startswith(("packs/", "manifests/", "refs/main/3.1"))]:
        for damaged in (
            {n: d for n, d in whole.items() if n != key},
            whole | {key: flipped(whole[key], 100)},
        ):
            backend = memory_of(damaged)
            good = max(readable_all(backend), default=None)
            if good is None:
                with pytest.raises(DeltackptError):
                    opened(backend).load("latest-good")
            else:
                assert same(opened(backend).load("latest-good"), state(good)), key


def readable_all(backend):
    found = []
    for step in (1, 2, 3):
        try:
            if same(opened(backend).load(step), state(step)):
                found.append(step)
        except DeltackptError:
            continue
    return found


# -- what a copy, a gc and a repair know of each other


def saved_on_disk(path, *steps, **options):
    for step, seed in steps:
        opened(path).save({"w": noise(seed, 60_000)}, step=step, **options)


def spoil(path, at=5000):
    path.chmod(0o600)
    data = path.read_bytes()
    path.write_bytes(data[:at] + b"a bad sector!!!!" + data[at + 16 :])


def packs_of(path):
    return set((path / "packs").iterdir())


def test_a_chunk_whose_only_good_copy_gc_is_about_to_delete_is_kept(tmp_path, monkeypatch):
    saved_on_disk(tmp_path, (1, 1), (5, 9))
    opened(tmp_path).forget([1])
    delete = gc._Gc._delete

    def killed(self, key):
        if key.startswith("packs/"):
            raise KeyboardInterrupt
        delete(self, key)

    monkeypatch.setattr(gc._Gc, "_delete", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path)
    monkeypatch.undo()
    before = packs_of(tmp_path)
    saved_on_disk(tmp_path, (2, 1))  # what gc has condemned is stored again
    [newer] = packs_of(tmp_path) - before
    spoil(newer)
    assert repair(tmp_path).clean
    collect(tmp_path)
    assert same(opened(tmp_path).load(2), {"w": noise(1, 60_000)})
    assert repair(tmp_path).actions == []


def saved_twice(backend, whole):
    """Save a state in two sessions that know nothing of each other; return their packs, run main's first."""
    writers = [Session(open_store(backend, create=True), run, 1) for run in ("main", "other")]
    for writer in writers:
        writer.look_up(np.zeros((0, 32), np.uint8))  # what comes now it does not see
    for writer in writers:
        saved = snapshot.save(writer, whole, lambda _: Memory(), Shadow(0)).manifest.to_bytes()
        writer.publish(saved)
        writer.commit(saved, parent=None, metrics={}, metadata={}, figures=Figures())
    return [f"packs/{writer.sid.hex()}-0-0.pack" for writer in writers]


@pytest.mark.parametrize("n", [0, 1])
def test_of_two_copies_gc_deletes_none_of_which_the_other_is_damaged(n, caplog):
    whole, backend = {"w": noise(1, 60_000)}, MemoryBackend()
    keys = saved_twice(backend, whole)
    spoilt = memory_of(contents(backend) | {keys[n]: flipped(backend.read(keys[n]), 3000)})
    for _ in range(2):
        collect(spoilt)
    repair(spoilt)
    for _ in range(2):
        collect(spoilt)
    assert_steps(visible(spoilt), {1: whole})
    caplog.clear()
    collect(backend)
    assert not caplog.text
    assert len(backend.names("packs/")) == 1


def test_gc_misses_lost_decisions_though_a_record_of_its_own_was_set_aside(tmp_path):
    saved_on_disk(tmp_path, (1, 1), (2, 2), (3, 3))
    opened(tmp_path).forget([1])
    collect(tmp_path)
    lost = (tmp_path / "refs/main/2.1").read_bytes()
    (tmp_path / "refs/main/2.1").unlink()
    spoil(tmp_path / "gc/sweep-0", 2)
    assert not repair(tmp_path).clean
    with pytest.raises(StorageError, match="decisions"):
        gc.collect(tmp_path)
    (tmp_path / "refs/main/2.1").write_bytes(lost)
    assert same(opened(tmp_path).load(2), {"w": noise(2, 60_000)})


def test_a_copy_gives_back_the_attempt_that_counts_and_not_one_that_was_replaced(tmp_path):
    store, copy = tmp_path / "store", tmp_path / "copy"
    saved_on_disk(store, (1, 1))
    saved_on_disk(store, (1, 2), overwrite=True)
    saved_on_disk(store, (2, 3))
    shutil.copytree(store, copy)
    for name in ("1.1", "1.1.gone", "1.2"):
        (store / "refs/main" / name).unlink()
    for _ in range(3):
        found = repair(store, source=copy)
    assert found.clean
    assert found.actions == []
    assert same(opened(store).load(1), {"w": noise(2, 60_000)})


def test_a_repair_whose_session_a_gc_has_ended_sets_nothing_aside(tmp_path, monkeypatch):
    saved_on_disk(tmp_path, (1, 1))
    [pack] = packs_of(tmp_path)
    spoil(pack)
    publish = Session.publish

    def given_up(self, manifest, parts=()):
        publish(self, manifest, parts)
        gc.collect(tmp_path, patience_s=-1)

    monkeypatch.setattr(Session, "publish", given_up)
    with pytest.raises(DeltackptError):
        repair(tmp_path)
    monkeypatch.undo()
    assert not list((tmp_path / "quarantine").iterdir())


class BadSector(Os):
    """A disk that cannot read one page of the file whose name ends so."""

    def __init__(self, name, page):
        self.name, self.page, self.paths = name, page, {}

    def open(self, path, *args):
        fd = super().open(path, *args)
        self.paths[fd] = path
        return fd

    def preadv(self, fd, views, offset):
        start = 4096 * self.page
        end = offset + sum(map(len, views))
        if self.paths[fd].endswith(self.name) and offset < start + 4096 and start < end:
            raise OSError(errno.EIO, "input/output error")
        return super().preadv(fd, views, offset)


@pytest.mark.parametrize("kind", ["packs", "manifests", "index", "refs/main", "gc"])
def test_what_the_device_cannot_read_is_damage_like_any_other(tmp_path, kind):
    store, copy = tmp_path / "store", tmp_path / "copy"
    for step in (1, 2):
        opened(store).save(state(step), step=step)
    opened(store, "other").save({"x": noise(7, 9000)}, step=1)
    opened(store, "other").forget([1])
    assert collect(store).n_deleted
    shutil.copytree(store, copy)
    name = max((store / kind).iterdir(), key=lambda path: path.stat().st_size).name
    bad = LocalBackend(store, calls=BadSector(name, 0))
    damage = verify(bad, level="decode").damage
    assert any(name in d.key and "EIO" in d.message for d in damage)
    found = repair(bad, source=copy)
    assert found.actions
    if kind == "packs":  # but for the page and the pack that has it, all is there again
        assert found.clean
        assert same(opened(bad).load(2), state(2))


def test_what_was_set_aside_is_looked_at_again_if_its_copy_is_lost(tmp_path):
    opened(tmp_path).save({"w": noise(1, 2_000_000)}, step=1)
    before = packs_of(tmp_path)
    spoil(*before)
    found = repair(tmp_path)
    assert found.damage
    [copy] = packs_of(tmp_path) - before
    copy.unlink()
    again = repair(tmp_path)
    assert len(again.damage) == len(found.damage)
    assert packs_of(tmp_path) - before
    assert repair(tmp_path).actions == []


# -- deltas


@pytest.fixture
def step_of_a_delta(monkeypatch):
    """A store of one step, a delta of what no step has; an older copy that has only that; the step."""
    taken(monkeypatch)
    backend, weights = MemoryBackend(), floats(1, 700)
    opened(backend).save({"w": weights}, step=1)
    older = contents(backend)
    opened(backend).save({"w": nearly(weights, 1)}, step=2)
    opened(backend).forget([1])
    monkeypatch.undo()
    return backend, older, {2: {"w": nearly(weights, 1)}}


def with_depths(backend, *depths):
    [key] = [n for n in contents(backend) if n.startswith("packs/") and _depths(backend, n) == {*depths}]
    return key


def test_a_copy_from_before_gives_back_the_base_of_a_later_delta(step_of_a_delta):
    backend, older, states = step_of_a_delta
    key = with_depths(backend, 0)
    for data in (flipped(backend.read(key), 200), None):
        objects = {n: old for n, old in contents(backend).items() if n != key}
        bad = memory_of(objects | ({key: data} if data else {}))
        result = repair(bad, source=memory_of(older))
        assert result.clean
        assert "fetch" in verbs(result)
        assert "quarantine" not in verbs(result)
        assert_steps(visible(bad), states)
        check_settled(bad)


def test_a_delta_comes_back_though_it_is_good_and_lies_beside_its_bad_base():
    """Kept as it is it is of no use: it is stored whole."""
    backend, master = MemoryBackend(), floats(1, 3000)
    half = {"half": master.astype(np.float16)}
    opened(backend).save({"master": master, **half}, step=1)
    opened(backend).save(half, step=2)
    opened(backend).forget([1])
    key = with_depths(backend, 0, 1)
    [base] = [row for row in rows_of(open_store(backend)) if row["raw_size"] == master.nbytes]
    data, at = backend.read(key), int(base["offset"]) + 1000
    bad = memory_of(contents(backend) | {key: data[:at] + bytes(8000) + data[at + 8000 :]})
    assert not readable(bad)
    alone = memory_of(contents(bad))
    assert not repair(alone).clean
    check_settled(alone)
    assert repair(bad, source=backend).clean
    assert_steps(visible(bad), {2: half})
    check_settled(bad)


def test_a_base_that_was_set_aside_is_looked_at_again_if_its_copy_is_lost(step_of_a_delta):
    backend, _, states = step_of_a_delta
    key = with_depths(backend, 0)
    bad = memory_of(contents(backend) | {key: flipped(backend.read(key), len(backend.read(key)) - 10)})
    before = set(bad.names("packs/"))
    assert repair(bad).clean
    [copy] = set(bad.names("packs/")) - before
    for data in (flipped(bad.read(copy), 200), None):
        objects = {n: old for n, old in contents(bad).items() if n != copy}
        again = memory_of(objects | ({copy: data} if data else {}))
        result = repair(again)
        assert result.clean
        assert "quarantine" not in verbs(result)
        assert_steps(visible(again), states)
        check_settled(again)
        collect(again)
        assert_steps(visible(again), states)


def test_a_sweep_looks_at_the_copy_that_it_spares():
    """Both copies were condemned, and a save that began before relies on them: the bad one may go."""
    whole, backend = {"w": noise(1, 60_000)}, MemoryBackend()
    keys = saved_twice(backend, whole)
    with Session(open_store(backend), "late", 1) as writer:
        found = snapshot.save(writer, whole, lambda _: Memory(), Shadow(0)).manifest.to_bytes()
        for run in ("main", "other"):
            opened(backend, run).forget([1])
        assert gc.collect(backend, patience_s=1000).n_dead == 2
        writer.publish(found)
        writer.commit(found, parent=None, metrics={}, metadata={}, figures=Figures())
    assert writer.n_new_chunks == 0
    for key in keys:
        spoilt = memory_of(contents(backend) | {key: flipped(backend.read(key), 3000)})
        collect(spoilt)
        assert_steps(visible(spoilt, "late"), {1: whole})
    collect(backend)
    assert len(backend.names("packs/")) == 1
