"""Trials: in which mode the chunks of a tensor are best taken, by trying it on one of them.

Owns   what is tried, and reading the base that it is tried against.
Never  remembers the answer (modes.py does), or stores anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deltackpt import codecs
from deltackpt.chains import as_ids
from deltackpt.codecs import Kind, Mode
from deltackpt.errors import DeltackptError, InvalidInputError
from deltackpt.session import Parent
from deltackpt.store import Store
from deltackpt.types import U8
from deltackpt.workers import workers


class Pair(NamedTuple):
    """A chunk, and the base that it may be stored as a delta against."""

    data: U8
    parent: Parent


class Trial(NamedTuple):
    """Chunks of one tensor, whose bases have one relation to them."""

    pairs: Sequence[Pair]
    kind: Kind


def run_trials(store: Store, trials: Sequence[Trial]) -> list[Mode | None]:
    """Return the best mode of each, in threads; None where a base cannot be read."""
    if len(trials) < 2:
        return [_run(store, trial) for trial in trials]
    return list(workers.map(lambda trial: _run(store, trial), trials))


def _run(store: Store, trial: Trial) -> Mode | None:
    """Try one chunk; whole only if three are best so: a part may be new, and the rest hardly changed."""
    n = len(trial.pairs)
    mode = None
    for at in sorted({n // 2, n // 6, 5 * n // 6}, key=lambda at: abs(at - n // 2)):
        mode = _tried(store, trial.pairs[at], trial.kind)
        if mode != codecs.WHOLE:
            break
    return mode


def _tried(store: Store, pair: Pair, kind: Kind) -> Mode | None:
    data, parent = pair
    base = parent.data
    if base is None:
        base = np.empty(parent.raw_size, np.uint8)
        try:
            store.read_into(parent.id, store.find(as_ids([parent.id]))[0], base)
        except DeltackptError:
            return None  # whoever encodes meets it again, says so, and does without
    buffer = np.empty(codecs.room(data.size), np.uint8)
    chunk = codecs.Chunk(data, kind, buffer, codecs.Base(base, parent.offset, parent.cast))
    try:
        return codecs.best_mode(chunk)
    except InvalidInputError:
        return None  # it changes meanwhile: whoever encodes says so
