"""Which codec a chunk is stored by, and the rule that a payload is never larger than raw.

Owns   the choice, by the entropy of samples or by trying; the fit of a scale.
Never  knows which chunk a base is, or whether a chain may grow.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deltackpt import differences, kernels
from deltackpt.codecs import coder, dense, lz4, planes, raw, sparse
from deltackpt.codecs.chunk import WHOLE, Chunk, Encoded, Kind, Mode
from deltackpt.scratch import Scratch
from deltackpt.types import U8

#: Saving less than this share is not worth the decoding.
_GAIN_MIN = 0.02
#: lz4 is judged by four pieces of this size, spread over the chunk: 16 KiB tell ratios to about 1 %.
_PIECE_SIZE = 4096
#: This much of a chunk is tried.
_TRY_SIZE = 65536
#: Bytes of floats that vary have 7 bits of entropy and more, whole numbers and zeros less than this.
_PLAIN_BITS = 5.0
#: Elements that a scale is judged by, and scales tried.
_N_SAMPLES, _N_SCALES = 512, 32
#: Bits an element that a scale must save.
_SCALE_GAIN = 0.05

#: In haste only planes of fewer bits a byte are coded: half the CPU seconds, and 0.79 of the bytes of fp32
#: weights ten steps apart instead of 0.70 (docs/design/0019).
_FAST_BITS = 1.0

room = coder.room


class _Local(threading.local):
    """Where each thread splits a chunk only to see how large it would be."""

    def __init__(self) -> None:
        self.scratch = Scratch()


_local = _Local()


class _Attempt(NamedTuple):
    """A chunk split as one codec has it; of a delta that is worth it the entropy of the chunk's bytes."""

    codec: int
    split: coder.Split
    data_bits: float = 8.0


def encode(data: U8, kind: Kind) -> Encoded:
    """Return a chunk as it should be stored: by the codec that pays, else raw; never larger than raw.

    Examples
    --------
    >>> encode(np.zeros(1000, np.uint8), Kind(4, True)).payload.size
    24
    """
    return encode_all([Chunk(data, kind, np.empty(room(data.size), np.uint8))])[0]


def encode_all(chunks: Sequence[Chunk], *, fast: bool = False) -> list[Encoded]:
    """Return each of several chunks as it should be stored; every payload has been decoded again.

    A delta is used where it is smaller than the chunk stored whole, as far as the mode tells.

    Parameters
    ----------
    chunks : sequence of Chunk
    fast : bool
        Code only planes that are nearly constant, whatever others would gain.
    """
    attempts = _attempts(chunks, fast)
    splits = [a.split for a in attempts if isinstance(a, _Attempt)]
    payloads = iter(coder.encode_all([_in_haste(s) for s in splits] if fast else splits))
    encoded = []
    for chunk, attempt in zip(chunks, attempts, strict=True):
        if not isinstance(attempt, _Attempt):
            encoded.append(attempt)
            continue
        payload: bytes | U8 = next(payloads)
        if len(payload) <= (1 - _GAIN_MIN) * chunk.data.size:
            encoded.append(Encoded(attempt.codec, payload))
        elif chunk.base is not None:
            encoded.append(encode_all([chunk._replace(base=None)], fast=fast)[0])
        else:
            encoded.append(Encoded(raw.NUMBER, chunk.data))
    return encoded


def _in_haste(split: coder.Split) -> coder.Split:
    return coder.coarser(split, _FAST_BITS)


def _attempts(chunks: Sequence[Chunk], fast: bool) -> list[_Attempt | Encoded]:
    """Split each chunk for the codec that should pay most, or encode it if that takes no planes."""
    deltas: dict[int, Chunk] = {}
    for n, chunk in enumerate(chunks):
        if chunk.base is not None and dense.part(chunk.data, chunk.kind, chunk.base) is not None:
            mode = chunk.mode or best_mode(chunk)
            if mode.map is not None:
                deltas[n] = chunk._replace(mode=mode)
    found: dict[int, _Attempt] = {}
    for (n, chunk), attempt in zip(deltas.items(), _deltas(list(deltas.values())), strict=True):
        # Nearly constant, whatever the rest of its tensor is: then it may be smallest by itself.
        if attempt.data_bits > _PLAIN_BITS or coder.expected_size(attempt.split) <= _whole_size(chunk):
            found[n] = attempt
    rest = [n for n in range(len(chunks)) if n not in found]
    whole = dict(zip(rest, planes.split_all([chunks[n] for n in rest]), strict=True))
    return [found.get(n) or _whole(chunk, whole[n], fast) for n, chunk in enumerate(chunks)]


def _deltas(chunks: Sequence[Chunk]) -> list[_Attempt]:
    """Split chunks, each against its base and in its mode."""
    return [
        _Attempt(dense.NUMBER, found.split, found.data_bits)
        if isinstance(found, dense.Differences)
        else _sparse(chunk, found)
        for chunk, found in zip(chunks, dense.split_all(chunks, sparse.SHARE_MAX), strict=True)
    ]


def _sparse(chunk: Chunk, n_changed: int) -> _Attempt:
    split = sparse.split(chunk, n_changed)
    is_small = coder.expected_size(split) <= _GAIN_MIN * chunk.data.size
    return _Attempt(sparse.NUMBER, split, 8.0 if is_small else kernels.entropy(chunk.data))


def _whole_size(chunk: Chunk) -> float:
    """Return about how large a chunk's planes will be; its buffer stays as it is."""
    [split] = planes.split_all([chunk._replace(buffer=_local.scratch.of(room(chunk.data.size)))])
    return coder.expected_size(split)


def _whole(chunk: Chunk, split: coder.Split, fast: bool) -> _Attempt | Encoded:
    """Return a chunk's planes, if that pays most; else encode it.

    Byte planes are judged by the entropy of each plane, lz4 by trying it on a sample: it wins where bytes
    repeat in runs (masks, token ids, text), planes where exponents are few (weights, moments).  An entropy
    knows nothing of runs, which the coder of planes finds: where lz4 should win both are tried.  Of moments
    with rows of zeros it takes 1.1 to 1.6 times the bytes.
    """
    data = chunk.data
    least = (1 - _GAIN_MIN) * data.size
    by_planes, by_lz4 = coder.expected_size(split), _lz4_size(chunk, split)
    if min(by_planes, by_lz4) > least:
        return Encoded(raw.NUMBER, data)
    if by_lz4 > by_planes:
        return _Attempt(planes.NUMBER, split)
    encoded = Encoded(planes.NUMBER, coder.encode_all([_in_haste(split) if fast else split])[0])
    block = lz4.encode(data)
    if len(block) < len(encoded.payload):
        encoded = Encoded(lz4.NUMBER, block)
    return encoded if len(encoded.payload) <= least else Encoded(raw.NUMBER, data)


def _lz4_size(chunk: Chunk, split: coder.Split) -> float:
    """Return about how large an lz4 block will be, by a sample; of floats with noise it is not worth one."""
    if chunk.kind.is_float and planes.has_noise(split):
        return chunk.data.size
    sample = _sample(chunk.data)
    return len(lz4.encode(sample)) / max(1, sample.size) * chunk.data.size


def best_mode(chunk: Chunk) -> Mode:
    """Return how a chunk, and others of its tensor, are best stored, by trying each way on it.

    Parameters
    ----------
    chunk : Chunk
        With a base; its mode does not matter.
    """
    data, kind, _, base, _ = chunk
    if base is None or dense.part(data, kind, base) is None:
        return WHOLE
    modes = _modes(chunk._replace(data=data[:_TRY_SIZE]))
    # Each in memory of its own, so that one call codes all: a call takes 30 us whatever it is given.
    pieces = [
        Chunk(data[:_TRY_SIZE], kind, np.empty(room(min(data.size, _TRY_SIZE)), np.uint8), base, mode)
        for mode in (*modes, WHOLE)
    ]
    attempts = [*_deltas(pieces[:-1]), *_attempts(pieces[-1:], fast=False)]
    sizes = coder.stored_sizes([a.split for a in attempts if isinstance(a, _Attempt)])
    sizes += [len(a.payload) for a in attempts if isinstance(a, Encoded)]
    *deltas, whole = sizes
    least = min(deltas)
    return modes[deltas.index(least)] if least <= (1 - _GAIN_MIN) * whole else WHOLE


def _modes(chunk: Chunk) -> list[Mode]:
    """Return the ways in which a difference may be taken."""
    data, kind, _, base, _ = chunk
    if base is None or not kind.is_float:
        return [Mode(differences.INTEGER)]
    scale = fit_scale(data, base.data[base.offset :], kind.itemsize) if not base.cast else 1.0
    return [Mode(differences.SUB, scale), Mode(differences.RSUB, scale)]


def fit_scale(data: U8, base: U8, itemsize: int) -> float:
    """Return what a base is best multiplied by, so that it foresees the chunk; 1.0 if nothing is better.

    What moments keep of themselves from one step to the next is a factor (0.999 of exp_avg_sq at each), found
    here as one of the ratios that occur.

    Parameters
    ----------
    data, base : ndarray of uint8
        Floats of `itemsize` bytes, 2 bytes being bfloat16; the base may be longer.

    Examples
    --------
    >>> base = np.linspace(1, 2, 1000, dtype=np.float32)
    >>> data = base * np.float32(0.9) + np.where(np.arange(1000) % 3, 0, base).astype(np.float32)
    >>> round(fit_scale(data.view(np.uint8), base.view(np.uint8), 4), 4)
    0.9
    """
    n = data.size // itemsize
    if itemsize not in (2, 4, 8) or n < _N_SAMPLES:
        return 1.0
    at = np.linspace(0, n - 1, _N_SAMPLES).astype(np.int64)
    with np.errstate(all="ignore"):
        new, old = (_floats(a[: n * itemsize].reshape(n, itemsize)[at], itemsize) for a in (data, base))
        ratios = (new / old).astype(np.float32)  # as it is stored: what is below 2 must stay below
        ok = np.isfinite(ratios) & (ratios > differences.SCALE_MIN) & (ratios < differences.SCALE_MAX)
        if np.count_nonzero(ok) < _N_SAMPLES // 2:
            return 1.0
        new, old, ratios = new[ok], old[ok], np.sort(ratios[ok])
        picked = ratios[np.linspace(0, len(ratios) - 1, _N_SCALES + 2).astype(np.int64)[1:-1]]
        scales = np.concatenate([[1.0], picked])
        # Bits of the difference in units of the last place, on average.
        mantissa = {2: 8, 4: 24, 8: 53}[itemsize]
        bits = np.log2(np.abs(new - scales[:, None] * old) / np.abs(old) * 2.0**mantissa + 1).mean(axis=1)
    best = int(np.argmin(bits))
    return float(np.float32(scales[best])) if bits[best] < bits[0] - _SCALE_GAIN else 1.0


def _floats(elements: U8, itemsize: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    flat = elements.ravel()
    if itemsize == 2:
        return (flat.view("<u2").astype("<u4") << np.uint32(16)).view("<f4").astype(np.float64)
    return flat.view(f"<f{itemsize}").astype(np.float64)


def _sample(data: U8) -> U8:
    if data.size <= 4 * _PIECE_SIZE:
        return data
    step = (data.size - _PIECE_SIZE) // 3
    return np.concatenate([data[i * step : i * step + _PIECE_SIZE] for i in range(4)])
