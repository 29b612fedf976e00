"""Kin: which of a store's recent snapshots a new run's first one is likest, so that it becomes deltas too.

Owns   how near a snapshot is: by encoding a few chunks against it.
Never  vouches for a snapshot: what cannot be read is passed over, and a save goes on without a base.

A sweep of runs from one base, and a fine-tune imported again, begin like that (a run that was forked has
its first step already).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np

from deltackpt import codecs
from deltackpt.dtypes import kind_of
from deltackpt.errors import DeltackptError
from deltackpt.manifest import Manifest
from deltackpt.memory import Known, Memory
from deltackpt.store import Store
from deltackpt.types import Deferred, Tensor

log = logging.getLogger("deltackpt")

#: Snapshots worth looking at: the latest of the runs saved last.
N_SNAPSHOTS = 8
#: Tensors compared, a chunk of each.
_N_TENSORS = 4
#: Less of a state than this in the same tensors is no kin: a share of its bytes.
_SHARE_MIN = 0.5


def nearest(store: Store, manifests: Iterable[Manifest], tensors: Sequence[Tensor | Deferred]) -> Memory:
    """Return what is to be remembered of the likest snapshot; an empty memory if none is like these tensors.

    Parameters
    ----------
    store : Store
    manifests : iterable of Manifest
        Of steps of other runs.
    tensors : sequence of Tensor or Deferred
    """
    best, chosen = Memory(), _sample(tensors)
    least = sum(t.size for t in chosen)
    sample: list[Tensor] = []
    for manifest in manifests:
        if not least or _share(manifest, tensors) < _SHARE_MIN:
            continue
        try:
            memory = Memory.from_store(store, manifest)
            # Taken only now: a tensor on a device is copied for it.
            sample = sample or [t if isinstance(t, Tensor) else t.taken() for t in chosen]
            cost = sum(_cost(store, t, memory.same_place(t)) for t in sample)
        except DeltackptError as e:
            log.info("a snapshot is passed over as a base: %s", e.message)
            continue
        if cost < least:
            best, least = memory, cost
    return best


def _sample(tensors: Sequence[Tensor | Deferred]) -> list[Tensor | Deferred]:
    """Return some of the larger tensors, spread over the state: weights and moments lie apart."""
    sizes = np.array([t.size for t in tensors])
    if not sizes.any():
        return []
    large = [tensors[i] for i in np.flatnonzero(sizes >= sizes[sizes > 0].mean()).tolist()]
    return [large[i] for i in np.unique(np.linspace(0, len(large) - 1, _N_TENSORS).astype(int))]


def _share(manifest: Manifest, tensors: Sequence[Tensor | Deferred]) -> float:
    there = {(row.name, row.dtype, row.shape) for row in manifest.tensors}
    same = sum(t.size for t in tensors if (t.name, t.dtype, t.shape) in there)
    return same / max(1, sum(t.size for t in tensors))


def _cost(store: Store, tensor: Tensor, known: Known | None) -> int:
    """Return about what a tensor would take as deltas of a known one, judged by its middle chunk."""
    if known is None:
        return tensor.size
    i = len(known.ends) // 2
    start, end = int(known.ends[i - 1]) if i else 0, int(known.ends[i])
    base = np.empty(end - start, np.uint8)
    store.read_into(known.ids[i].tobytes(), store.find(known.ids[i : i + 1])[0], base)
    piece = tensor.data[start:end]
    buffer = np.empty(codecs.room(piece.size), np.uint8)
    chunk = codecs.Chunk(piece, kind_of(tensor.dtype), buffer, codecs.Base(base))
    encoded = codecs.encode_all([chunk])[0]
    if encoded.codec not in codecs.DELTAS:  # stored whole it is no kin, and has its own cuts
        return tensor.size
    return len(encoded.payload) * tensor.size // piece.size
