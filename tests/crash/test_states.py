"""After a power loss at any moment, whatever it takes, acknowledged steps are there and the store works.

A second process between any two calls of a first; and each rule of the protocol broken, to see that it is
found out.  `CRASH_STATES=all pytest tests/crash` leaves nothing out; `CRASH_SEED=n` gives a run again.
"""

import losses
import orders
import pytest
from hunt import hunt
from mutants import BROKEN
from orders import ORDERS
from runs import EFFORT, ORDER_SHARE, SEED, total
from scenarios import NAMES


def jobs(function, names, *args):
    return pytest.mark.parametrize(
        "job", [pytest.param((function, name, *args, SEED), id=name) for name in names]
    )


def outcome(results, job):
    try:
        return results[job].result()
    except AssertionError as violation:
        pytest.fail(f"CRASH_SEED={SEED}: {job[1]}, {violation}", pytrace=False)


@jobs(losses.explore, NAMES, EFFORT)
def test_a_power_loss_leaves_what_was_acknowledged_and_a_store_that_works(results, job):
    count = outcome(results, job)
    assert count["states"] > 0
    total.update(count)


def test_at_least_a_hundred_thousand_states_were_tried(results):
    tried = [job for job in results if job[0] is losses.explore]
    if len(tried) < len(NAMES):
        pytest.skip("not all scenarios were asked for")
    assert total["states"] >= 100_000


@jobs(orders.explore, ORDERS, ORDER_SHARE)
def test_whatever_comes_between_loses_nothing(results, job):
    total.update(outcome(results, job))


@jobs(hunt, BROKEN)
def test_a_broken_rule_is_found_out(results, job):
    assert outcome(results, job), f"CRASH_SEED={SEED}: nothing found"
    total["mutants"] += 1
