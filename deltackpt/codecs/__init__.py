"""Codecs: numbered reversible transforms of a chunk's bytes.

Owns   the registry, the choice of a codec for a chunk, and the rule that a payload is never larger than raw.
Never  does I/O or hashes: the caller compares the decoded bytes with the chunk id.

A number, once released, means the same bytes for ever (docs/format.md, "Codecs").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from deltackpt.codecs import lz4, planes, raw
from deltackpt.errors import CorruptError, UnsupportedVersionError
from deltackpt.types import U8


class Codec(Protocol):
    """What a codec module offers."""

    NUMBER: int
    NAME: str

    @staticmethod
    def encode(data: U8, kind: Kind) -> bytes | U8:
        """Return the payload, larger than `data` or not."""

    @staticmethod
    def decode(payload: U8, itemsize: int, out: U8) -> None:
        """Fill `out` exactly, or raise `CorruptError`."""


class Kind(NamedTuple):
    """What a codec may know of a chunk's elements: bytes each {1, 2, 4, 8}, and whether they are floats."""

    itemsize: int
    is_float: bool


class Encoded(NamedTuple):
    """A chunk as stored."""

    codec: int
    payload: bytes | U8


CODECS: dict[int, Codec] = {c.NUMBER: c for c in (raw, lz4, planes)}  # type: ignore[misc]
NAMES = {number: codec.NAME for number, codec in CODECS.items()}
ITEMSIZES = (1, 2, 4, 8)

#: Saving less than this share is not worth the decoding.
_GAIN_MIN = 0.02
#: lz4 is judged by four pieces of this size, spread over the chunk: 16 KiB tell ratios to about 1 %.
_PIECE_SIZE = 4096

room = planes.room


class Chunk(NamedTuple):
    """A chunk to encode.

    Parameters
    ----------
    data : ndarray of uint8
    kind : Kind
    buffer : ndarray of uint8, shape (room(data.size),) or more
        Memory to work in; the payload may be a view of it, or of `data`.
    """

    data: U8
    kind: Kind
    buffer: U8


def encode(data: U8, kind: Kind) -> Encoded:
    """Return a chunk as it should be stored: by the codec that pays, else raw; never larger than raw.

    Examples
    --------
    >>> encode(np.zeros(1000, np.uint8), Kind(4, True)).payload.size
    24
    """
    return encode_all([Chunk(data, kind, np.empty(room(data.size), np.uint8))])[0]


def encode_all(chunks: Sequence[Chunk]) -> list[Encoded]:
    """Return each of several chunks as it should be stored; every payload has been decoded again."""
    splits = [planes.split(*chunk) for chunk in chunks]
    numbers = [choose(chunk.data, split) for chunk, split in zip(chunks, splits, strict=True)]
    by_planes = [split for split, number in zip(splits, numbers, strict=True) if number == planes.NUMBER]
    payloads = iter(planes.encode_all(by_planes))
    encoded = []
    for chunk, number in zip(chunks, numbers, strict=True):
        payload: bytes | U8 = chunk.data
        if number == planes.NUMBER:
            payload = next(payloads)
        elif number == lz4.NUMBER:
            payload = lz4.encode(chunk.data, chunk.kind)
        if len(payload) > (1 - _GAIN_MIN) * chunk.data.size:
            number, payload = raw.NUMBER, chunk.data
        encoded.append(Encoded(number, payload))
    return encoded


def choose(data: U8, split: planes.Planes) -> int:
    """Return the number of the codec that should pay most on a chunk, given its planes.

    Byte planes are judged by the entropy of each plane, lz4 by trying it on a sample: it wins where bytes
    repeat in runs (masks, token ids, text), planes where exponents are few (weights, moments).
    """
    by_planes = planes.estimate(split)
    by_lz4 = 1.0
    if not planes.has_noise(split):
        sample = _sample(data)
        by_lz4 = len(lz4.encode(sample, split.kind)) / max(1, sample.size)
    if min(by_planes, by_lz4) > 1 - _GAIN_MIN:
        return raw.NUMBER
    return lz4.NUMBER if by_lz4 < by_planes else planes.NUMBER


def _sample(data: U8) -> U8:
    if data.size <= 4 * _PIECE_SIZE:
        return data
    step = (data.size - _PIECE_SIZE) // 3
    return np.concatenate([data[i * step : i * step + _PIECE_SIZE] for i in range(4)])


def decode(codec: int, payload: U8, itemsize: int, out: U8, where: str) -> None:
    """Fill `out` with a chunk's decoded bytes.

    Raises
    ------
    UnsupportedVersionError
        If no codec of this build has that number.
    CorruptError
        If the payload does not decode to exactly `out.size` bytes.
    """
    known = CODECS.get(codec)
    if known is None:
        raise UnsupportedVersionError(
            f"{where}: codec {codec}, this build knows {NAMES}", hint="upgrade deltackpt"
        )
    if itemsize not in ITEMSIZES:
        raise CorruptError(f"{where}: element size {itemsize}, expected one of {ITEMSIZES}")
    try:
        known.decode(payload, itemsize, out)
    except CorruptError as e:
        raise CorruptError(f"{where}: {known.NAME}: {e.message}") from e
