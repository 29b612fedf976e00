"""Steps to save, and what comes back of them; small states of every codec; stores seen afresh."""

import numpy as np

from deltackpt import gc
from deltackpt.run import Run
from deltackpt.store import open_store


def floats(seed, n):
    """Codec planes: normal numbers."""
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def noise(seed, n):
    """Codec raw: any bytes."""
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


def repeats(seed, n):
    """Codec lz4: words of noise, shorter than what the coder of planes looks for, in any order."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (40, 6), np.uint8)[rng.integers(0, 40, n // 6 + 1)].reshape(-1)[:n]


def same(a, b):
    """Whether two states are equal, with types, dtypes, shapes, NaN payloads and the sign of zero."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return repr(a) == repr(b)


def assert_steps(found, expected):
    assert found.keys() == expected.keys()
    for step, state in expected.items():
        assert same(found[step], state), step


def opened(where, run="main"):
    """A run as a new process finds it: nothing is remembered."""
    return Run(open_store(where, create=True), run)


def visible(where, run="main"):
    """Every step that can be seen, loaded."""
    found = opened(where, run)
    return {step: found.load(step) for step in found.steps()}


def collect(where, **kwargs):
    """A gc that takes every session for dead: the writers of these tests are, their process is not."""
    return gc.collect(open_store(where), **{"patience_s": -1} | kwargs)
