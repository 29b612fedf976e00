"""Which steps stay: every rule, their union, and what stays whatever the rules say."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltackpt
from deltackpt import best, every, every_seconds, last, these
from deltackpt.errors import InvalidInputError, NotFoundError
from deltackpt.retention import Retention


class At(NamedTuple):
    created_s: float
    metrics: dict[str, float]


def with_losses(losses):
    return {step: At(0.0, {} if loss is None else {"loss": loss}) for step, loss in losses.items()}


def at_seconds(times):
    return {step: At(float(t), {}) for step, t in enumerate(times)}


STEPS = with_losses({10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 2.5})

rules = st.recursive(
    st.integers(1, 8).map(last)
    | st.integers(1, 12).map(every)
    | st.builds(best, st.sampled_from(["loss", "other", "none"]), st.integers(1, 4), st.booleans())
    | st.floats(0.5, 50).map(every_seconds)
    | st.sets(st.integers(0, 60), max_size=3).map(these),
    lambda inner: st.builds(lambda a, b: a | b, inner, inner),
    max_leaves=4,
)
facts = st.builds(
    At,
    st.floats(-100, 100),
    st.dictionaries(st.sampled_from(["loss", "other"]), st.floats(allow_infinity=False)),
)
runs = st.dictionaries(st.integers(0, 60), facts, max_size=25)


def test_last_keeps_the_highest_steps():
    assert list(last(2).decide(STEPS)) == [40, 50]
    assert list(last(99).decide(STEPS)) == [10, 20, 30, 40, 50]


def test_every_keeps_multiples_and_the_latest():
    assert every(20).decide(STEPS) == {20: "multiple of 20", 40: "multiple of 20", 50: "latest"}


def test_step_zero_is_a_multiple_of_everything():
    assert list(every(5).decide(with_losses({0: None, 3: None, 7: None}))) == [0, 7]


def test_best_keeps_the_lowest_values_or_the_highest():
    assert best("loss", 2).decide(STEPS) == {
        20: "lowest loss, 1 of 2",
        40: "lowest loss, 2 of 2",
        50: "latest",
    }
    assert list(best("loss", 1, highest=True).decide(STEPS)) == [10, 50]


def test_of_equal_values_the_newest_is_best():
    assert list(best("loss", 1).reasons(with_losses({1: 5, 2: 5, 3: 6}))) == [2]


@pytest.mark.parametrize("highest", [False, True])
def test_nan_is_never_better_than_a_number(highest):
    assert list(best("loss", 1, highest).reasons(with_losses({1: 5.0, 2: math.nan}))) == [1]


def test_a_metric_that_no_step_has_lets_none_go():
    assert list(best("lsos", 2).decide(STEPS)) == sorted(STEPS)


def test_a_check_refuses_a_misspelt_metric_and_names_the_nearest():
    rule = last(1) | best("loss", 1) | best("lsos", 1)
    with pytest.raises(NotFoundError, match=r"metric 'lsos' is in no step; there are 'loss'"):
        rule.check(STEPS)
    (last(1) | best("loss", 1)).check(STEPS)
    with pytest.raises(NotFoundError, match="no step has metrics"):
        best("loss", 1).check(with_losses({1: None}))


def test_every_seconds_keeps_what_is_far_enough_from_the_last_one_kept():
    assert list(every_seconds(10).reasons(at_seconds([0, 4, 9, 11, 15, 21, 30]))) == [0, 3, 5]


def test_a_clock_that_jumps_back_does_not_stop_every_seconds():
    assert list(every_seconds(10).reasons(at_seconds([1000, 1005, 3, 8, 14]))) == [0, 2, 4]


def test_these_keeps_the_steps_named_that_are_there():
    assert these([20, 25]).decide(STEPS) == {20: "named", 50: "latest"}


def test_every_reason_is_given_once():
    rule = last(1) | every(25) | best("loss", 1) | best("loss", 1, highest=True) | last(1)
    assert rule.decide(STEPS, pinned=[20, 30, 35], resumed=40, saved=10) == {
        10: "saved just now; highest loss, 1 of 1",
        20: "pinned; lowest loss, 1 of 1",
        30: "pinned",
        40: "resumed from",
        50: "latest; last 1; multiple of 25",
    }


def test_no_steps_leave_nothing_to_decide():
    assert (last(3) | best("loss", 1)).decide({}, pinned=[1], resumed=2, saved=3) == {}


@given(runs, rules, st.sets(st.integers(0, 60)), st.none() | st.integers(0, 60), st.integers(0, 60))
def test_the_latest_pinned_resumed_and_saved_steps_always_stay(steps, rule, pinned, resumed, saved):
    stays = rule.decide(steps, pinned=pinned, resumed=resumed, saved=saved)
    assert rule.stays(steps, resumed=resumed, saved=saved) == set(
        rule.decide(steps, resumed=resumed, saved=saved)
    )
    always = {max(steps, default=None), *pinned, resumed, saved} & steps.keys()
    assert always <= stays.keys() <= steps.keys()
    assert list(stays) == sorted(stays)
    assert all(stays.values())


@given(runs, rules, rules)
def test_a_union_keeps_what_one_or_the_other_keeps(steps, a, b):
    together = (a | b).reasons(steps)
    assert together.keys() == a.reasons(steps).keys() | b.reasons(steps).keys()
    assert {step: set(why) for step, why in together.items()} == {
        step: set(a.reasons(steps).get(step, [])) | set(b.reasons(steps).get(step, [])) for step in together
    }


@given(runs, rules, st.sets(st.integers(0, 60)))
def test_a_rule_applied_again_lets_nothing_more_go(steps, rule, pinned):
    stays = rule.decide(steps, pinned=pinned)
    left = {step: steps[step] for step in stays}
    assert rule.decide(left, pinned=pinned) == stays


@given(runs, rules, st.sets(st.integers(0, 60)))
def test_of_what_stays_only_what_is_chosen_and_the_latest_decide_on_others(steps, rule, gone):
    stays = rule.stays(steps)
    gone &= stays - rule.chosen(steps) - {max(steps, default=None)}
    left = {step: facts for step, facts in steps.items() if step not in gone}
    assert rule.stays(left) == stays - gone


@given(rules)
def test_a_rule_is_a_value_that_reads_as_it_was_written(rule):
    again = eval(str(rule), vars(deltackpt).copy())
    assert again == rule
    assert hash(again) == hash(rule)
    assert str(again) == str(rule)


@pytest.mark.parametrize("make", [last, every, lambda n: best("loss", n), every_seconds])
@pytest.mark.parametrize("n", [0, -1, True, "3", math.nan])
def test_a_count_that_is_none_is_refused(make, n):
    with pytest.raises(InvalidInputError, match=r"expected (at least 1|a number above 0)"):
        make(n)


def test_only_rules_are_joined():
    with pytest.raises(InvalidInputError, match="expected a rule"):
        last(3) | 3


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("loss:3", best("loss", 3)),
        ("loss:3:min", best("loss", 3)),
        ("acc:1:max", best("acc", 1, highest=True)),
        ("val:loss:2", best("val:loss", 2)),
        ("val:1:2:max", best("val:1", 2, highest=True)),
    ],
)
def test_a_best_rule_is_parsed_from_the_right(text, rule):
    assert best.parse(text) == rule


@pytest.mark.parametrize("text", ["", "loss", "loss:", ":3", "loss:0", "loss:-1", "loss:x", "loss:3:mid"])
def test_what_is_no_best_rule_is_refused(text):
    with pytest.raises(InvalidInputError, match="expected METRIC:N"):
        best.parse(text)


def test_a_retention_lists_what_stays_and_what_goes():
    decided = Retention.of("main", STEPS, last(1).decide(STEPS))
    assert (decided.stays, decided.goes) == ([50], [10, 20, 30, 40])
    assert str(decided).splitlines()[1] == "  10  goes   no rule keeps it"
    assert decided.to_json()["steps"][-1] == {"step": 50, "stays": True, "why": "latest; last 1"}
