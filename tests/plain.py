"""States for tests, and their comparison bit for bit."""

import numpy as np


def weights(n, seed=0, dtype=np.float32):
    """Numbers distributed as weights are."""
    return (0.02 * np.random.default_rng(seed).standard_normal(n)).astype(dtype)


def same(a, b):
    """Whether two states are the same, types and bits included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
