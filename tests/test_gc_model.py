"""The protocol is tried in every order; and each of its rules is needed."""

import pytest
from model_gc import RULES, explore


@pytest.mark.parametrize(("n_writers", "n_gcs", "n_cycles"), [(3, 1, 2), (2, 2, 3), (1, 2, 3)])
def test_no_order_of_steps_loses_a_committed_step(n_writers, n_gcs, n_cycles):
    n_states, bad = explore(n_writers=n_writers, n_gcs=n_gcs, n_cycles=n_cycles)
    assert bad is None
    assert n_states > 1000


@pytest.mark.parametrize("rule", RULES)
def test_without_any_one_rule_some_order_loses_a_step(rule):
    _, bad = explore(n_writers=2, n_gcs=2, n_cycles=1, without=rule)
    assert bad is not None
