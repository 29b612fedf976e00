"""Which steps stay: every rule, and their union."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltackpt.errors import InvalidInputError, NotFoundError
from deltackpt.retention import Best, all_but, decide

LOSSES = {10: {"loss": 3.0}, 20: {"loss": 1.0}, 30: {}, 40: {"loss": 2.0}, 50: {"loss": 2.5}}
COUNTS = st.none() | st.integers(1, 12)


def test_the_latest_stays_without_any_rule():
    assert decide(LOSSES) == {50: "latest"}


def test_no_steps_leave_nothing_to_decide():
    assert decide({}, last=3, every=2) == {}


def test_last_keeps_the_highest_steps():
    assert list(decide(LOSSES, last=2)) == [40, 50]
    assert list(decide(LOSSES, last=99)) == [10, 20, 30, 40, 50]


def test_every_keeps_multiples_and_the_latest():
    assert decide(LOSSES, every=20) == {20: "multiple of 20", 40: "multiple of 20", 50: "latest"}


def test_step_zero_is_a_multiple_of_everything():
    assert list(decide({0: {}, 3: {}, 7: {}}, every=5)) == [0, 7]


def test_best_keeps_the_lowest_values_or_the_highest():
    assert list(decide(LOSSES, best=[Best("loss", 2)])) == [20, 40, 50]
    assert list(decide(LOSSES, best=[Best("loss", 1, highest=True)])) == [10, 50]


def test_of_equal_values_the_newest_is_best():
    assert Best("m", 1).choose({1: {"m": 5}, 2: {"m": 5}, 3: {"m": 6}}) == [2]


@pytest.mark.parametrize("highest", [False, True])
def test_nan_is_never_better_than_a_number(highest):
    assert Best("m", 1, highest).choose({1: {"m": 5.0}, 2: {"m": math.nan}}) == [1]


def test_a_metric_no_step_has_is_an_error_that_names_the_nearest():
    with pytest.raises(NotFoundError, match=r"metric 'lsos' is in no step; there are 'loss'"):
        decide(LOSSES, last=1, best=[Best("lsos", 1)])


def test_rules_add_up_and_every_reason_is_given():
    stays = decide(LOSSES, last=1, every=25, best=[Best("loss", 1), Best("loss", 1, highest=True)])
    assert stays == {
        10: "highest loss, 1 of them",
        20: "lowest loss, 1 of them",
        50: "latest; last 1; multiple of 25",
    }


@pytest.mark.parametrize("rules", [{"last": 0}, {"every": -1}, {"best": [Best("loss", 0)]}])
def test_a_count_below_one_is_refused(rules):
    with pytest.raises(InvalidInputError, match="expected at least 1"):
        decide(LOSSES, **rules)


@pytest.mark.parametrize(
    ("text", "best"),
    [
        ("loss:3", Best("loss", 3)),
        ("loss:3:min", Best("loss", 3)),
        ("acc:1:max", Best("acc", 1, highest=True)),
        ("val:loss:2", Best("val:loss", 2)),
        ("val:1:2:max", Best("val:1", 2, highest=True)),
    ],
)
def test_a_best_rule_is_parsed_from_the_right(text, best):
    assert Best.parse(text) == best


@pytest.mark.parametrize("text", ["", "loss", "loss:", ":3", "loss:0", "loss:-1", "loss:x", "loss:3:mid"])
def test_what_is_no_best_rule_is_refused(text):
    with pytest.raises(InvalidInputError, match="expected METRIC:N"):
        Best.parse(text)


@given(st.sets(st.integers(0, 60), min_size=1), COUNTS, COUNTS, st.none() | st.integers(1, 5))
def test_a_union_of_rules_keeps_what_each_keeps_alone_and_nothing_else(steps, last, every, n):
    metrics = {step: {"m": float(step * 7 % 11)} for step in steps}
    best = [Best("m", n)] if n else []
    alone = [decide(metrics), decide(metrics, last=last), decide(metrics, every=every)]
    alone.append(decide(metrics, best=best))
    together = decide(metrics, last=last, every=every, best=best)
    assert set(together) == set().union(*alone)
    assert max(steps) in together
    assert list(together) == sorted(together)


def test_all_but_keeps_the_others():
    assert all_but({1: {}, 2: {}, 3: {}}, [2, 3]) == {1: "not named"}
