"""The protocol is tried in every order; and each of its rules is needed."""

import pytest
from model_gc import RULES, WORLDS, explore

#: Writers, gcs and cycles; larger ones by `python tests/model_gc.py`.
SIZES = {
    "whole": [(3, 2, 2), (1, 3, 3)],
    "chain": [(1, 2, 2), (2, 1, 2), (3, 1, 1)],
    "waste": [(1, 1, 3), (2, 1, 1), (1, 2, 1)],
    "deep": [(1, 1, 3), (2, 1, 1), (1, 2, 1)],
    "replaced": [(1, 2, 2)],  # who replaces is alone, or it would have lost
    "pinned": [(1, 2, 2), (2, 1, 2)],
    "ranks": [(2, 1, 2)],  # one of the writers is the coordinator
}
SMALL = [(1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)]


@pytest.mark.parametrize("world", WORLDS)
def test_no_order_of_steps_loses_a_committed_step(world):
    for n_writers, n_gcs, n_cycles in SIZES[world]:
        n_states, bad = explore(world, n_writers=n_writers, n_gcs=n_gcs, n_cycles=n_cycles)
        print(f"{world}, {n_writers} writers, {n_gcs} gcs, {n_cycles} cycles: {n_states} states")
        assert bad is None
        assert n_states > 100


@pytest.mark.parametrize("world", ["whole", "chain"])
def test_nor_if_deletions_are_undone_by_power_losses(world):
    n_states, bad = explore(world, n_writers=1, n_gcs=1, n_cycles=2, is_undone=True)
    print(f"{world}: {n_states} states")
    assert bad is None


@pytest.mark.parametrize("rule", RULES)
def test_without_any_one_rule_some_order_loses_a_step(rule):
    for n_writers, n_gcs, n_cycles in SMALL:
        _, bad = explore(RULES[rule], n_writers=n_writers, n_gcs=n_gcs, n_cycles=n_cycles, without=rule)
        if bad is not None:
            print(f"without {rule}:", *bad, sep="\n  ")
            return
    pytest.fail("no order of steps loses anything without it")


@pytest.mark.parametrize("rule", ["ends-handing-over", "packs-not-looked"])
def test_of_the_looks_at_a_rank_that_at_its_record_is_enough(rule):
    n_states, bad = explore("ranks", n_writers=2, n_gcs=1, n_cycles=1, without=rule)
    print(f"without {rule}: {n_states} states")
    assert bad is None


@pytest.mark.parametrize("rule", ["begin-beside", "sweep-unsure"])
def test_of_the_two_rules_against_cycles_at_a_time_either_is_enough(rule):
    n_states, bad = explore("chain", n_writers=1, n_gcs=2, n_cycles=2, without=rule)
    print(f"without {rule}: {n_states} states")
    assert bad is None
