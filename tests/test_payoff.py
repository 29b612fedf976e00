"""Whether deltas pay, in words: exact sentences for figures made by hand, and one run that was saved."""

import numpy as np
from plain import weights

from deltackpt import open_run, open_store, stats
from deltackpt.backends.memory import MemoryBackend
from deltackpt.groups import Coded, GroupCost
from deltackpt.payoff import words


def cost(group="weights", dtype="float32", size=1000, based=None, **codecs):
    """A cost of one chunk for every codec: bytes and payload by its name, ``_`` for ``-``."""
    coded = {name.replace("_", "-"): Coded(1, *sizes) for name, sizes in codecs.items()}
    put = sum(c.size for c in coded.values())
    return GroupCost(group, dtype, size, 9, put if based is None else based, coded)


FIRST = cost(based=0, planes=(1000, 830))


def one_run(*saves):
    return words([[[save] for save in saves]])


def test_deltas_that_pay_are_told_with_what_whole_takes():
    assert one_run(FIRST, cost(delta_dense=(1000, 560)), cost(delta_dense=(1000, 560))) == [
        "weights (float32): all of it changes; "
        "deltas save 33 %: they store 0.56 of the bytes, whole takes 0.83"
    ]


def test_moments_that_are_new_noise_are_told_what_to_do():
    first = cost("moments", based=0, planes=(1000, 900))
    assert one_run(first, cost("moments", delta_dense=(1000, 891))) == [
        "optimizer moments (float32): all of it changes; deltas save 1 % of what is stored whole: "
        "new noise in each step; save more often, or not the moments"
    ]


def test_what_came_out_no_smaller_as_a_delta_counts_as_whole():
    assert one_run(FIRST, cost(planes=(500, 415))) == [
        "weights (float32): nothing changes in 50 % of the bytes; "
        "deltas save nothing of what is stored whole: new noise in each step; save more often"
    ]


def test_what_has_no_base_is_not_called_noise():
    assert one_run(FIRST, cost(based=100, planes=(900, 747), delta_dense=(100, 50))) == [
        "weights (float32): all of it changes; 90 % of what changes has nothing to be compared with: "
        "tensors that are new, or change name, shape or dtype, are stored whole"
    ]


def test_what_never_changes_is_told_so():
    assert one_run(FIRST, cost(), cost()) == ["weights (float32): nothing changes"]


def test_without_anything_stored_whole_there_is_no_comparison():
    assert one_run(cost(), cost(delta_sparse=(200, 10))) == [
        "weights (float32): nothing changes in 80 % of the bytes; deltas store 0.05 of the bytes"
    ]


def test_groups_that_are_small_and_runs_of_one_step_are_worth_no_word():
    small = cost("other", "uint8", 40, raw=(40, 40))
    assert one_run(FIRST) == words([]) == words([[]]) == []
    assert words([[[FIRST, small], [cost(), small]]]) == ["weights (float32): nothing changes"]


def test_the_later_saves_of_all_runs_count_together():
    later = cost(delta_dense=(1000, 415))
    together = words([[[FIRST], [later]], [[FIRST], [cost(delta_dense=(1000, 415))]]])
    assert together == one_run(FIRST, later)


def test_a_training_run_is_told_that_weights_pay_and_noise_does_not():
    run = open_run(MemoryBackend())
    rng = np.random.default_rng(0)
    w = weights(300_000)
    for step in range(3):
        moments = rng.standard_normal(300_000).astype(np.float32)
        report = run.save({"model": {"w": w}, "optimizer": {"w": {"exp_avg": moments}}}, step=step)
        w = (w * (1 + 1e-5 * rng.standard_normal(w.shape))).astype(w.dtype)
    assert [(g.group, g.changed_size) for g in report.groups] == [
        ("weights", 1_200_000), ("moments", 1_200_000)
    ]  # fmt: skip
    assert set(report.groups[0].codecs) == {"delta-dense"}
    assert set(report.groups[1].codecs) == {"planes"}
    found = stats.look(open_store(run.store.backend))
    of_weights, of_moments = found.payoff
    assert of_weights.startswith("weights (float32): all of it changes; deltas save ")
    assert of_moments == (
        "optimizer moments (float32): all of it changes; deltas save nothing of what is stored whole: "
        "new noise in each step; save more often, or not the moments"
    )
    assert found.to_json()["payoff"] == found.payoff
    assert "\n".join(found.payoff) in str(found)
