"""How hard encoders work at a batch, by what was measured: never slower than raw in its own model."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain import same, weights

import deltackpt.efforts
import deltackpt.session
import deltackpt.snapshot
from deltackpt import delta, open_run
from deltackpt.backends.memory import MemoryBackend
from deltackpt.efforts import BESIDE_CPU_S, BESIDE_S, END_S, SMALL_SIZE, Progress, choose, joules, n_cores
from deltackpt.energy import WHOLE_CPU_S
from deltackpt.errors import InvalidInputError
from deltackpt.pace import Job, Pace
from deltackpt.rates import START, Rates, Sort, Took

BATCH_SIZE = 1 << 20
ORDER = ["small", "fast", "raw"]


def at(state_size, left_size, *, elapsed_s=0.0, encoding_s=0.0, unwritten_size=0.0, new_share=1.0, n=2):
    new_size = state_size - left_size
    return Progress(state_size, left_size, new_share, new_size, elapsed_s, encoding_s, unwritten_size, n)


@st.composite
def rates(draw):
    """What each effort takes: more work, fewer bytes."""
    cpu_s = sorted(draw(st.floats(1e-11, 5e-9)) for _ in range(3))
    shares = sorted((draw(st.floats(0.01, 1)) for _ in range(2)), reverse=True)
    took = zip(("raw", "fast", "small"), cpu_s, (1.0, *shares), strict=True)
    found = {effort: Took(cpu, share) for effort, cpu, share in took}
    return {effort: found[effort] for effort in ORDER if effort != "fast" or draw(st.booleans())}


speeds = st.floats(1e-10, 1e-7)
n_threads = st.integers(1, 8)


def test_bytes_are_as_few_as_can_be_whatever_it_takes():
    for write_s in (1e-10, 1e-7):
        assert choose("bytes", 1, START[True], write_s, at(10**10, 10**9, elapsed_s=99)).effort == "small"


def test_a_save_of_little_is_the_same_every_time():
    for size in (1, SMALL_SIZE):
        assert choose("time", size, START[True], 1e-10, at(size, 0, elapsed_s=99)).effort == "small"
    assert choose("time", 1, START[True], 1e-10, at(SMALL_SIZE + 1, 0, elapsed_s=99)).effort == "raw"


def test_a_state_of_which_little_changes_is_as_good_as_a_small_one():
    progress = at(10**10, 10**10, new_share=0.001, elapsed_s=99)
    assert choose("time", 1, START[True], 1e-10, progress).effort == "small"
    later = progress._replace(new_size=SMALL_SIZE)  # more changed than was expected
    assert choose("time", 1, START[True], 1e-10, later).effort == "raw"


def test_each_effort_is_tried_once_to_know_what_it_takes():
    late = at(10**10, 10**9, elapsed_s=99)
    for optimize in ("time", "energy"):
        efforts = [choose(optimize, 1, START[True], 1e-10, late, n_before=n).effort for n in range(3)]
        assert efforts == ["small", "fast", "raw"]
        efforts = [choose(optimize, 1, START[False], 1e-10, late, n_before=n).effort for n in range(2)]
        assert efforts == ["small", "raw"]


@given(rates(), speeds, st.floats(0, 1), st.floats(0, 20), st.floats(0, 1), n_threads)
def test_what_a_faster_disk_has_time_for_a_slower_one_has_too(took, write_s, left, elapsed_s, share, n):
    size = 10**9
    progress = at(size, int(left * size), elapsed_s=elapsed_s, new_share=share, n=n)
    efforts = [
        choose("time", BATCH_SIZE, took, write_s * slower, progress).effort for slower in (1, 1.5, 4, 20)
    ]
    assert efforts == sorted(efforts, key=ORDER.index, reverse=True)


class Ended(NamedTuple):
    s: float
    stored_size: float


def simulate(took, write_s, n, n_batches, changed=lambda i: True, only=None):
    """A save on a machine as the decision takes it to be: cores that share all work, a disk beside them."""
    state_size = n_batches * BATCH_SIZE
    cores_s = disk_s = here_s = stored = 0.0
    new = 0
    for i in range(n_batches):
        if not changed(i):
            continue
        left = (n_batches - i - 1) * BATCH_SIZE
        # What is not done yet when this batch is decided on.
        backlog = Progress(
            state_size,
            left,
            1.0,
            new + BATCH_SIZE,
            here_s,
            max(0.0, cores_s - here_s) * n,
            max(0.0, disk_s - here_s) / write_s,
            n,
        )
        effort = only or choose("time", BATCH_SIZE, took, write_s, backlog).effort
        new += BATCH_SIZE
        cores_s = max(cores_s, here_s) + BATCH_SIZE * (took[effort].cpu_s + BESIDE_CPU_S) / n
        disk_s = max(disk_s, here_s) + BATCH_SIZE * took[effort].share * write_s
        here_s += BATCH_SIZE * BESIDE_S
        stored += BATCH_SIZE * took[effort].share
    return Ended(max(cores_s, disk_s, here_s) + END_S, stored)


@given(rates(), speeds, n_threads, st.integers(40, 400), st.integers(1, 5))
def test_a_save_is_no_slower_than_writing_the_state_whole_or_raw(took, write_s, n, n_batches, every):
    def changed(i):
        return i % every == 0

    whole_s = n_batches * BATCH_SIZE * (write_s + WHOLE_CPU_S)
    raw = simulate(took, write_s, n, n_batches, changed, only="raw")
    found = simulate(took, write_s, n, n_batches, changed)
    # The first 32 MiB are as small as can be, and the last batch may be on its way.
    small_s = (SMALL_SIZE + BATCH_SIZE) * (took["small"].cpu_s + BESIDE_CPU_S) / n
    assert found.s <= max(whole_s, raw.s) + small_s
    assert found.stored_size <= raw.stored_size


@pytest.mark.parametrize(
    ("gb_s", "least", "most"), [(0.2, 0.6899, 0.6901), (1.0, 0.69, 0.78), (20.0, 0.8, 0.95)]
)
def test_how_much_of_a_dense_state_is_encoded_goes_by_the_disk(gb_s, least, most):
    n_batches = 1000
    found = simulate(START[True], 1e-9 / gb_s, 2, n_batches)
    assert least <= found.stored_size / (n_batches * BATCH_SIZE) <= most


def test_energy_is_what_the_constants_say():
    took = START[True]
    found = choose("energy", 1, took, 1e-9, at(10**9, 10**8))
    assert found.effort == min(took, key=lambda effort: joules(took[effort])) == "raw"
    sparse = {"small": Took(0.4e-9, 0.03), "fast": Took(0.4e-9, 0.1), "raw": Took(0.05e-9, 1.0)}
    assert choose("energy", 1, sparse, 1e-9, at(10**9, 10**8)).effort == "small"


# -- what is measured


def test_a_rate_goes_by_what_was_measured_last_and_by_how_much():
    rates = Rates()
    rates.wrote(1 << 20, 10.0)  # a flush, not a rate
    assert rates.write_s == Rates().write_s
    rates.wrote(64 << 20, 64 * 2**20 * 2e-9)
    assert rates.write_s == pytest.approx(2e-9)
    rates.wrote(512 << 20, 512 * 2**20 * 4e-9)
    assert rates.write_s == pytest.approx(3e-9)
    rates.wrote(8 << 20, 8 * 2**20 * 1e-9)  # nothing makes a disk faster than it is
    assert rates.write_s == pytest.approx(1e-9)


def test_a_batch_of_a_few_bytes_says_nothing_of_what_a_byte_takes():
    rates = Rates()
    rates.encoded(Sort(4, False), "small", 100, Took(300e-6, 124), 300e-6)
    assert rates.of(Sort(4, False)) == START[False]


def test_a_clock_that_did_not_tick_is_no_reason_to_fail():
    rates = Rates(1e-12)
    rates.encoded(Sort(4, False), "small", 1 << 20, Took(0.0, 1 << 19), 0.0)
    pace = Pace("time", rates)
    pace.expect(1 << 30, 1.0)
    busy = Job(Sort(4, False), "small", 1, 1e9, 1.0)
    assert [pace.job(Sort(4, False), 512 << 20, [busy], 0).effort for _ in "12"] == ["small", "raw"]
    assert "encoding inf" in pace.words()


def test_sorts_and_efforts_are_told_apart():
    rates = Rates()
    rates.encoded(Sort(4, True), "fast", 1 << 20, Took(1 << 10, 1 << 19), 1.0)
    assert rates.of(Sort(4, True))["fast"] == Took(2**-10, 0.5)
    assert rates.of(Sort(4, True))["small"] == START[True]["small"]
    assert rates.of(Sort(2, True)) == START[True]
    rates.encoded(Sort(4, False), "fast", 1 << 20, Took(1.0, 50), 1.0)  # as one that has no base after all
    assert list(rates.of(Sort(4, False))) == ["small", "raw"]


def test_where_others_have_the_cores_encoding_takes_longer():
    rates = Rates()
    for _ in range(100):
        rates.encoded(Sort(4, True), "small", 1 << 20, Took(0.1, 50), 1.0)
    assert rates.slowdown == pytest.approx(10)
    assert n_cores(2, rates.slowdown) == pytest.approx(0.4)
    progress = at(10**9, 9 * 10**8)
    assert choose("time", 1, START[True], 2e-9, progress).effort == "small"
    assert choose("time", 1, START[True], 2e-9, progress._replace(n_cores=0.4)).effort == "fast"
    assert choose("time", 1, START[True], 2e-9, progress._replace(n_cores=0.1)).effort == "raw"


# -- the pace of a save


def test_a_save_that_is_late_stops_encoding_and_says_why():
    now = [0.0]
    pace = Pace("time", Rates(write_s=1e-10), clock=lambda: now[0])
    pace.expect(400 << 20, 1.0)
    sort = Sort(4, True)
    efforts = [pace.job(sort, 40 << 20, [], 0).effort for _ in range(3)]
    now[0] = 5.0
    efforts += [pace.job(sort, 40 << 20, [], 0).effort for _ in range(7)]
    assert efforts[:2] == ["small", "fast"]
    assert efforts[3:] == ["raw"] * 7
    assert not pace.is_small()
    assert pace.words().startswith("raw ")
    assert "the storage takes 10.0 GB/s, encoding 1." in pace.words().replace("encoding 0", "encoding 1")


def test_what_is_in_the_store_already_leaves_time_for_the_rest():
    for passed, effort in ((0, "raw"), (3800 << 20, "small")):
        pace = Pace("time", Rates(write_s=1e-10), clock=iter([0.0, *[2.0] * 9]).__next__)
        pace.expect(4000 << 20, 1.0)
        pace.pass_by(passed)
        jobs = [pace.job(Sort(4, True), 40 << 20, [], 0) for _ in range(3)]
        assert jobs[-1].effort == effort


# -- saves


@pytest.fixture
def every_save_is_large(monkeypatch):
    monkeypatch.setattr(deltackpt.efforts, "SMALL_SIZE", 0)
    monkeypatch.setattr(deltackpt.session, "_BATCH_SIZE", 1 << 18)


def training(n_saves, n=8):
    """States as training leaves them: weights that move, moments, a bf16 copy, what is frozen."""
    rng = np.random.default_rng(0)
    w = {f"w{i}": weights(150_000, seed=i) for i in range(n)}
    for _ in range(n_saves):
        w = {name: (a + 1e-4 * rng.standard_normal(a.size) * np.abs(a)).astype("f4") for name, a in w.items()}
        yield {
            "w": w,
            "m": rng.standard_normal(200_000).astype("f4"),
            "half": {name: a.astype("f2") for name, a in w.items()},
            "frozen": weights(100_000, seed=99),
            "ids": np.arange(50_000),
        }


def codecs_of(report):
    sizes = Counter()
    for group in report.groups:
        sizes.update({name: coded.size for name, coded in group.codecs.items()})
    return sizes


@pytest.mark.usefixtures("every_save_is_large")
@pytest.mark.parametrize("optimize", ["bytes", "time", "energy"])
@pytest.mark.parametrize("write_s", [1e-11, 1e-7])
def test_every_state_comes_back_and_is_never_larger_than_raw(optimize, write_s):
    backend = MemoryBackend()
    run = open_run(backend, optimize=optimize)
    run.store.rates = Rates(write_s)
    run.store.rates.wrote = lambda size, seconds: None
    states = list(training(4))
    for step, state in enumerate(states):
        report = run.save(state, step=step)
        assert report.written_size < report.new_size + 20_000
    for step, state in enumerate(states):
        assert same(open_run(backend).load(step), state)


@pytest.mark.usefixtures("every_save_is_large")
def test_a_fast_disk_gets_raw_chunks_and_deltas_on_top_of_them(monkeypatch):
    monkeypatch.setattr(deltackpt.efforts, "WHOLE_CPU_S", 0.0)
    backend = MemoryBackend()
    run = open_run(backend)
    run.store.rates.wrote = lambda size, seconds: None
    first, second = training(2)
    run.store.rates = fast = Rates(1e-12)
    fast.wrote = lambda size, seconds: None
    raw = run.save(first, step=0)
    assert codecs_of(raw)["raw"] > 0.6 * raw.new_size
    assert re.match(r"raw \d+ %, .*: the storage takes 1000.0 GB/s, encoding \d", raw.efforts)
    assert str(raw).endswith(f"; {raw.efforts}")
    assert raw.table().endswith(f"effort: {raw.efforts}")
    run.store.rates = slow = Rates(1e-6)
    slow.wrote = lambda size, seconds: None
    small = run.save(second, step=1)
    assert small.efforts == ""
    assert codecs_of(small)["delta-dense"] > 0.4 * small.new_size
    assert same(open_run(backend).load(1), second)


def test_a_process_that_has_just_started_expects_as_much_to_change_as_last_time(monkeypatch):
    monkeypatch.setattr(deltackpt.efforts, "WHOLE_CPU_S", 0.0)
    monkeypatch.setattr(deltackpt.efforts, "SMALL_SIZE", 2 << 20)
    monkeypatch.setattr(deltackpt.session, "_BATCH_SIZE", 1 << 18)
    backend = MemoryBackend()
    state = {"w": weights(200_000), "z frozen": weights(4_000_000)}
    for step in range(3):
        run = open_run(backend)
        run.store.rates = fast = Rates(1e-12)
        fast.wrote = lambda size, seconds: None
        state["w"] = state["w"] * np.float32(1.0001)
        report = run.save(state, step=step)
        assert ("raw" in report.efforts) == (step < 2)  # the step before was all new, then hardly any of it
    assert same(open_run(backend).load(2), state)


def test_what_a_run_is_opened_with_goes_for_saves_in_the_background_too(tmp_path, monkeypatch):
    with open_run(tmp_path / "store", optimize="bytes") as run:
        state = next(training(1))
        assert run.save_async(state, step=0).wait().efforts == ""
        delta.save(state | {"w": weights(1000)}, tmp_path / "store", step=1, optimize="energy")
        assert same(run.load(0), state)


@pytest.mark.usefixtures("every_save_is_large")
def test_what_was_not_tried_for_lack_of_time_is_tried_when_there_is_some(monkeypatch):
    monkeypatch.setattr(deltackpt.efforts, "WHOLE_CPU_S", 0.0)
    monkeypatch.setattr(deltackpt.snapshot, "_GROUP_SIZE", 1 << 20)
    tried = []
    real = deltackpt.snapshot.run_trials

    def run_trials(store, trials):
        tried.append(len(trials))
        return real(store, trials)

    monkeypatch.setattr(deltackpt.snapshot, "run_trials", run_trials)
    run = open_run(MemoryBackend())
    n_tried = []
    for state, write_s in zip(training(4), (1e-12, 1e-12, 1e-6, 1e-12), strict=True):
        run.store.rates = Rates(write_s)
        run.store.rates.wrote = lambda size, seconds: None
        tried.clear()
        run.save(state, step=run.latest() + 1 if len(run) else 0)
        n_tried.append(sum(tried))
    assert n_tried[1] < n_tried[2]  # those of the first group are tried, to know what that takes
    assert n_tried[3] == 0, "what was found is not forgotten in a save that is short of time"


def test_nothing_else_can_be_optimized():
    with pytest.raises(
        InvalidInputError, match="optimize: found 'space', expected one of bytes, time, energy"
    ):
        open_run(MemoryBackend(), optimize="space")


def test_what_cannot_be_optimized_makes_no_store(tmp_path):
    with pytest.raises(InvalidInputError, match="optimize"):
        delta.save({}, tmp_path / "store", step=1, optimize="space")
    assert not (tmp_path / "store").exists()
