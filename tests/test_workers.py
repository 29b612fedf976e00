"""Workers: how many threads a process has for its chunks."""

import os

import pytest

from deltackpt.workers import n_threads


@pytest.mark.parametrize(
    ("n_cores", "n_ranks", "expected"),
    [
        (1, None, 1),
        (6, None, 6),
        (96, None, 8),
        (96, "8", 8),
        (32, "8", 4),
        (2, "4", 1),
        (6, "", 6),
        (6, "0", 6),
        (6, "-2", 6),
        (6, "two", 6),
    ],
)
def test_ranks_on_one_machine_share_its_cores(monkeypatch, n_cores, n_ranks, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: n_cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(n_cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if n_ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", n_ranks)
    assert n_threads() == expected


def test_a_rank_that_is_bound_to_cores_has_those(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5}, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert n_threads() == 2
