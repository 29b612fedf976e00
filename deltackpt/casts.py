"""Casts: which tensors of a state are others' values in a narrower dtype, as bf16 weights of a fp32 master.

Owns   finding the pairs, by a sample of their elements.
Never  vouches for a pair: a delta against the cast puts right whatever differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deltackpt import codecs
from deltackpt.types import DTYPE_SIZES, U8, Deferred, Tensor

#: Elements compared; wrong pairs cost a delta that is not used, right ones missed cost the tensor.
_N_SAMPLES = 64
#: Smaller tensors are not worth the look: a record takes 200 bytes.
_SIZE_MIN = 4096

_NARROW: dict[str, list[tuple[str, int]]] = {}
for (_source, _target), _number in codecs.CASTS.items():
    _NARROW.setdefault(_source, []).append((_target, _number))


class Source(NamedTuple):
    """Where a tensor's values come from: which tensor of the state, and by what cast."""

    at: int
    cast: int


class Casts:
    """The sources seen so far on a walk over a state's tensors, in `order`.

    Parameters
    ----------
    tensors : sequence of Tensor or Deferred
    """

    def __init__(self, tensors: Sequence[Tensor | Deferred]) -> None:
        self._there = {(t.size // DTYPE_SIZES[t.dtype], t.dtype) for t in tensors if t.size >= _SIZE_MIN}
        self._sources: dict[tuple[int, str, bytes], Source] = {}
        self._targets = {
            (n, target)
            for n, dtype in self._there
            for target, _ in _NARROW.get(dtype, ())
            if (n, target) in self._there
        }

    def order(self, tensors: Sequence[Tensor | Deferred]) -> list[int]:
        """Return the places of the tensors, those that may be casts of others last."""
        last = [self._key(t) in self._targets for t in tensors]
        return [i for i, is_last in enumerate(last) if not is_last] + [
            i for i, is_last in enumerate(last) if is_last
        ]

    def _key(self, tensor: Tensor | Deferred) -> tuple[int, str]:
        return tensor.size // DTYPE_SIZES[tensor.dtype], tensor.dtype

    def add(self, at: int, tensor: Tensor) -> None:
        """Note a tensor that others may be casts of."""
        n, dtype = self._key(tensor)
        for target, number in _NARROW.get(dtype, ()):
            if (n, target) in self._targets:
                sample = codecs.cast(_sample(tensor.data, n), number).tobytes()
                self._sources.setdefault((n, target, sample), Source(at, number))

    def find(self, tensor: Tensor) -> Source | None:
        """Return what a tensor seems to be the cast of."""
        n, dtype = self._key(tensor)
        if not self._sources or (n, dtype) not in self._targets:
            return None
        sample = _sample(tensor.data, n)
        if not sample.any():
            return None  # zeros say nothing, and cost nothing
        return self._sources.get((n, dtype, sample.tobytes()))


def _sample(data: U8, n: int) -> U8:
    """Return some elements' bytes, spread over a tensor of `n`."""
    at = np.linspace(0, n - 1, _N_SAMPLES).astype(np.int64)
    return data.reshape(n, -1)[at].ravel()
