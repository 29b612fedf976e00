"""Modes: tried once, kept while they give what they gave, tried anew when they do not."""

from unittest import mock

import numpy as np
import pytest

from deltackpt import codecs, open_run
from deltackpt.backends.memory import MemoryBackend
from deltackpt.codecs import Mode
from deltackpt.modes import DRIFT_MAX, N_SAVES_MAX, Tried


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def saves(rng: np.random.Generator, sizes: list[float]) -> list[int]:
    """Save a tensor that moves by these steps; return how often a mode was tried in each save."""
    run = open_run(MemoryBackend())
    w = (rng.standard_normal(1 << 18) * 0.02).astype(np.float32)
    run.save({"w": w}, step=0)
    counts = []
    with mock.patch.object(codecs, "best_mode", wraps=codecs.best_mode) as tried:
        for step, size in enumerate(sizes, 1):
            w = (w * (1 + size * rng.standard_normal(w.shape))).astype(np.float32)
            before = tried.call_count
            run.save({"w": w}, step=step)
            counts.append(tried.call_count - before)
            assert (run.load(step)["w"] == w).all()
    return counts


def test_a_mode_is_tried_in_the_first_save_with_a_base_and_kept(rng: np.random.Generator):
    assert saves(rng, [1e-5] * 3) == [1, 0, 0]


def test_a_mode_is_tried_anew_once_it_gives_something_else(rng: np.random.Generator):
    counts = saves(rng, [1e-5, 1e-5, 1e-2, 1e-2])
    assert counts[:3] == [1, 0, 0]
    assert counts[3] > 0


@pytest.mark.parametrize("share", [0.5, 0.5 * (1 + DRIFT_MAX / 2)])
def test_a_mode_serves_so_many_saves_and_no_more(share: float):
    tried: Tried | None = Tried(Mode(1))
    for _ in range(N_SAVES_MAX - 1):
        assert tried is not None
        tried = tried.after(share, 1 << 20)
    assert tried is not None
    assert tried.after(share, 1 << 20) is None


@pytest.mark.parametrize(
    ("size", "n_saves"), [(1 << 25, 8), (1 << 20, 8), (1 << 18, 32), (20_000, 64), (0, 64)]
)
def test_the_mode_of_a_small_tensor_is_tried_more_seldom(size: int, n_saves: int):
    tried, n = Tried(Mode(1)), 0
    while tried is not None:
        tried, n = tried.after(0.5, size), n + 1
    assert n == n_saves


def test_what_is_known_of_other_relations_stays(rng: np.random.Generator):
    """A chain that is full is left for its root, and begun again: neither is tried twice."""
    assert saves(rng, [1e-5] * 7).count(0) >= 5


def test_a_small_tensor_may_drift_as_far_as_a_trial_is_not_worth():
    first = Tried(Mode(1)).after(0.5, 20_000)
    assert first.after(0.55, 20_000) is not None
    assert first.after(0.65, 20_000) is None


def test_less_than_was_foreseen_is_tried_anew_too():
    first = Tried(Mode(1)).after(0.5, 1 << 20)
    assert first is not None
    assert first.after(0.4, 1 << 20) is None
