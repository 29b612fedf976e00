"""Glances: what tells that a tensor is what it was at the last save, without a pass over its bytes in memory.

Owns   which tensors have imprints and which have stamps, when a stamp is trusted, and the audit of that.
Never  looks at all of a tensor's bytes: who does tells what was found.

An *imprint* is as good as a fingerprint.  A *stamp* is not: it says which memory a tensor is, and how often
torch counted a write to it.  Writes through ``.data``, NumPy, DLPack or a storage, and those of torch's fused
optimizers, are not counted.  So a stamp is trusted only

*  of a tensor that a look has found the same under the same stamp: what fused optimizers train never is;
*  while 4 KiB, spread over the tensor, are what they were: one that is trained from now on is not;
*  until the next audit, the save that looks at everything.

What an audit finds changed is saved as it is, logged as an error that names the steps that may hold it as it
was, and nothing is trusted any more.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import xxhash

from deltackpt.aliases import Source
from deltackpt.arrays import Facts, memory, on_device
from deltackpt.imprints import imprints
from deltackpt.layout import Layout
from deltackpt.types import U8

log = logging.getLogger("deltackpt")

#: A look at less takes no longer than a glance: 10 us.
_SIZE_MIN = 64 << 10
#: What is compared of a tensor that is trusted: places, and bytes of each.
_N_SAMPLES, _SAMPLE_SIZE = 16, 256


class Stamp(NamedTuple):
    """Which memory of torch's a tensor is, and how often that was written to; equal: probably the same bytes.

    Parameters
    ----------
    storage : torch.multiprocessing.reductions.StorageWeakRef
        While it is kept no other storage can be taken for this one, though it may be given the same memory.
    arrays : tuple of (Layout, int)
        Of each array that shares it: where it lies, and its version.
    """

    storage: Any
    arrays: tuple[tuple[Layout, int], ...]


class Glance(NamedTuple):
    """What was seen of a tensor without looking at all of it.

    Parameters
    ----------
    imprint : bytes or None
        Of a tensor on a device.
    stamp : Stamp or None
        Of a tensor here that may be trusted, if it is to be.
    sample : bytes
        The fingerprint of some of its bytes, if it has a stamp.
    is_proven : bool
        Whether a look found it the same under the same stamp.
    looked_at : int
        The step of the last look.
    passed : tuple of int
        The steps since then that trusted it.
    """

    imprint: bytes | None = None
    stamp: Stamp | None = None
    sample: bytes = b""
    is_proven: bool = False
    looked_at: int = 0
    passed: tuple[int, ...] = ()


NOTHING = Glance()


@dataclass(frozen=True, slots=True)
class Glances:
    """The glances of one snapshot.

    Parameters
    ----------
    by_name : dict of str to Glance
    n_unaudited : int
        Saves since the last that looked at everything.
    distrusted : frozenset of str
        Tensors that were written to under the same stamp: these are always looked at.
    is_betrayed : bool
        Whether one that was trusted was: all are always looked at.
    """

    by_name: dict[str, Glance] = field(default_factory=dict)
    n_unaudited: int = 0
    distrusted: frozenset[str] = frozenset()
    is_betrayed: bool = False


#: Of a snapshot that nobody has glanced at.
NONE = Glances()


class Watch:
    """The glances of one save, compared with those of the save before.

    Parameters
    ----------
    names : sequence of str
        The state's tensors.
    sources : sequence of Source or None
        Whose memory holds each; None if it is no array's.
    before : Glances
    audit_every : int
        Of as many saves one looks at everything; 1: all do.
    step : int
        Of this save.

    Examples
    --------
    A tensor that is no torch tensor is always looked at:

    >>> watch = Watch(["w"], [None], Glances(), 10, step=7)
    >>> watch.is_same(0)
    False
    >>> watch.looked(0, is_same=True)
    >>> watch.glances().by_name
    {}
    """

    def __init__(
        self,
        names: Sequence[str],
        sources: Sequence[Source | None],
        before: Glances,
        audit_every: int,
        *,
        step: int,
    ) -> None:
        self._names = names
        self._before = before
        self._step = step
        self._distrusted = set(before.distrusted)
        self._is_betrayed = before.is_betrayed
        self._is_audit = before.is_betrayed or before.n_unaudited + 1 >= audit_every
        self._now: list[Glance] = [NOTHING] * len(names)
        there = [
            (at, source) for at, source in enumerate(sources) if source is not None and source.facts.device
        ]
        found = imprints(on_device(source.facts, source.span) for _, source in there)
        for (at, _), imprint in zip(there, found, strict=True):
            self._now[at] = Glance(imprint)
        if audit_every > 1 and not before.is_betrayed:
            for at, source in enumerate(sources):
                if source is not None and names[at] not in self._distrusted:
                    self._now[at] = _stamped(source) or self._now[at]

    def is_same(self, at: int) -> bool:
        """Return whether a tensor is taken for what it was, by a glance."""
        return is_same(self._old(at), self._now[at], is_audit=self._is_audit)

    def passed(self, at: int) -> None:
        """Note that a tensor was not looked at."""
        old = self._old(at)
        if old.stamp is not None:
            self._now[at] = old._replace(passed=(*old.passed, self._step))

    def looked(self, at: int, *, is_same: bool) -> None:
        """Note what a look at all of a tensor found, and log if it was trusted and should not have been."""
        old, now, name = self._old(at), self._now[at], self._names[at]
        if now.stamp is None:
            return
        is_stamped = now.stamp == old.stamp
        self._now[at] = now._replace(is_proven=is_stamped and is_same, looked_at=self._step)
        if is_stamped and not is_same:
            self._distrusted.add(name)
            if old.passed:
                self._is_betrayed = True
                log.error(
                    "%s was written to in a way that torch does not count, after step %d: it is saved as it "
                    "is, but steps %s may hold it as it was; from now on every save looks at every tensor",
                    name,
                    old.looked_at,
                    ", ".join(map(str, old.passed)),
                )

    def glances(self) -> Glances:
        """Return what to remember, once this save is durable."""
        by_name = {
            name: glance for name, glance in zip(self._names, self._now, strict=True) if glance != NOTHING
        }
        n_unaudited = 0 if self._is_audit else self._before.n_unaudited + 1
        return Glances(by_name, n_unaudited, frozenset(self._distrusted), self._is_betrayed)

    def _old(self, at: int) -> Glance:
        return self._before.by_name.get(self._names[at], NOTHING)


def is_same(old: Glance, now: Glance, *, is_audit: bool) -> bool:
    """Decide whether a tensor need not be looked at.

    Examples
    --------
    >>> is_same(Glance(b"imprint"), Glance(b"imprint"), is_audit=True)
    True
    >>> old, now = Glance(stamp=Stamp(None, ()), is_proven=True), Glance(stamp=Stamp(None, ()))
    >>> is_same(old, now, is_audit=False), is_same(old, now, is_audit=True), is_same(now, now, is_audit=False)
    (True, False, False)
    """
    if now.imprint is not None:
        return now.imprint == old.imprint
    is_stamped = now.stamp is not None and (now.stamp, now.sample) == (old.stamp, old.sample)
    return is_stamped and old.is_proven and not is_audit


def _stamped(source: Source) -> Glance | None:
    """Return the glance at a tensor here; None if it is not to be trusted."""
    start, stop = source.facts.layout.span
    if stop - start < _SIZE_MIN or not all(map(_is_counted, source.arrays)):
        return None
    reference = sys.modules["torch"].multiprocessing.reductions.StorageWeakRef
    arrays = tuple([(facts.layout, facts.array._version) for facts in source.arrays])
    stamp = Stamp(reference(source.facts.array.untyped_storage()), arrays)
    return Glance(stamp=stamp, sample=_sample(memory(source.facts, start, stop)))


def _is_counted(facts: Facts) -> bool:
    """Return whether torch counts writes to an array: not to one made in inference mode."""
    if facts.framework != "torch" or not facts.is_direct or facts.requires_grad:
        return False
    return type(facts.array).__module__.startswith("torch") and not facts.array.is_inference()


def _sample(data: U8) -> bytes:
    step = data.size // _N_SAMPLES
    return xxhash.xxh3_128_digest(
        np.ascontiguousarray(data[: step * _N_SAMPLES].reshape(_N_SAMPLES, step)[:, :_SAMPLE_SIZE])
    )
