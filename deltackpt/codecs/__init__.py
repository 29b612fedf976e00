"""Codecs: numbered reversible transforms of a chunk's bytes.

Owns   the registry, and decoding by number.
Never  does I/O or hashes: the caller compares the decoded bytes with the chunk id.

A number, once released, means the same bytes for ever (docs/format.md, "Codecs").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from deltackpt.codecs import coder, dense, encoder, lz4, planes, raw, sparse
from deltackpt.codecs.chunk import WHOLE, Base, Chunk, Encoded, Kind, Mode
from deltackpt.codecs.encoder import best_mode, encode, encode_all, room
from deltackpt.differences import F32_BF16, F32_F16, F64_F32, cast
from deltackpt.errors import CorruptError, UnsupportedVersionError
from deltackpt.types import U8

__all__ = [
    "CASTS",
    "CODECS",
    "DELTAS",
    "ITEMSIZES",
    "NAMES",
    "WHOLE",
    "Base",
    "Chunk",
    "Codec",
    "DeltaCodec",
    "Encoded",
    "Kind",
    "Mode",
    "Packed",
    "best_mode",
    "cast",
    "coder",
    "decode",
    "dense",
    "encode",
    "encode_all",
    "encoder",
    "join",
    "lz4",
    "planes",
    "raw",
    "room",
    "sparse",
    "unpack",
]


class Codec(Protocol):
    """What the module of a codec offers that needs no base."""

    NUMBER: int
    NAME: str

    @staticmethod
    def encode(data: U8, kind: Kind) -> bytes | U8:
        """Return the payload, larger than `data` or not."""

    @staticmethod
    def decode(payload: U8, itemsize: int, out: U8) -> None:
        """Fill `out` exactly, or raise `CorruptError`."""


class DeltaCodec(Protocol):
    """What the module of a codec offers whose payload is of use only with the base's bytes."""

    NUMBER: int
    NAME: str

    @staticmethod
    def encode(data: U8, kind: Kind, base: Base, mode: Mode) -> U8:
        """Return the payload, larger than `data` or not."""

    @staticmethod
    def decode(payload: U8, itemsize: int, out: U8, base: U8) -> None:
        """Fill `out` exactly, or raise `CorruptError`."""

    @staticmethod
    def join(coded: coder.Planes, itemsize: int, out: U8, base: U8) -> None:
        """Do the part of `decode` that is left once the planes are decoded."""


class PlanedCodec(Protocol):
    """What the module of a codec offers whose payload is planes as in coder.py."""

    @staticmethod
    def table(payload: U8, itemsize: int, size: int) -> coder.Table:
        """Return what the payload of a chunk of `size` bytes is to hold, or raise `CorruptError`."""


CODECS: dict[int, Codec] = {c.NUMBER: c for c in (raw, lz4, planes)}  # type: ignore[misc]
DELTAS: dict[int, DeltaCodec] = {c.NUMBER: c for c in (dense, sparse)}  # type: ignore[misc]
_PLANED: dict[int, PlanedCodec] = {c.NUMBER: c for c in (planes, dense, sparse)}  # type: ignore[misc]
NAMES = {number: codec.NAME for number, codec in (CODECS | DELTAS).items()}
ITEMSIZES = (1, 2, 4, 8)
#: (dtype of the base, dtype of the chunk) -> how the one is made the other.
CASTS = {
    ("float32", "bfloat16"): F32_BF16,
    ("float32", "float16"): F32_F16,
    ("float64", "float32"): F64_F32,
}


class Packed(NamedTuple):
    """A payload to decode.

    Parameters
    ----------
    codec, itemsize : int
        Of the record.
    payload : ndarray of uint8
    size : int
        Bytes that the chunk has.
    where : str
        For messages.
    """

    codec: int
    payload: U8
    itemsize: int
    size: int
    where: str


def unpack(payloads: Sequence[Packed]) -> list[coder.Planes | None]:
    """Do of decoding what needs no base: return the planes of each payload, None where it has none.

    For many together: see `coder.decode_all`.

    Raises
    ------
    UnsupportedVersionError
        If no codec of this build has the number of one.
    CorruptError
        If one is damaged; names it.
    """
    for packed in payloads:
        _check(packed)
    planed = [p for p in payloads if p.codec in _PLANED]
    try:
        tables = [(p.payload, _PLANED[p.codec].table(p.payload, p.itemsize, p.size)) for p in planed]
        planes = iter(coder.decode_all(tables))
    except CorruptError as e:
        if len(planed) > 1:
            for packed in planed:
                unpack([packed])
        raise CorruptError(f"{planed[0].where}: {NAMES[planed[0].codec]}: {e.message}") from e
    return [next(planes) if p.codec in _PLANED else None for p in payloads]


def _check(packed: Packed) -> None:
    if packed.codec not in NAMES:
        raise UnsupportedVersionError(
            f"{packed.where}: codec {packed.codec}, this build knows {NAMES}", hint="upgrade deltackpt"
        )
    if packed.itemsize not in ITEMSIZES:
        raise CorruptError(f"{packed.where}: element size {packed.itemsize}, expected one of {ITEMSIZES}")


def join(packed: Packed, unpacked: coder.Planes | None, out: U8, base: U8 | None = None) -> None:
    """Fill `out` with a chunk's bytes, given what `unpack` returned, and as of `decode` the base."""
    codec, payload, itemsize, _, where = packed
    if (base is None) == (codec in DELTAS):
        raise CorruptError(f"{where}: {NAMES[codec]} {'without' if base is None else 'with'} a base")
    try:
        if unpacked is None:
            CODECS[codec].decode(payload, itemsize, out)
        elif base is None:
            planes.join(unpacked, itemsize, out)
        else:
            DELTAS[codec].join(unpacked, itemsize, out, base)
    except CorruptError as e:
        raise CorruptError(f"{where}: {NAMES[codec]}: {e.message}") from e


def decode(codec: int, payload: U8, itemsize: int, out: U8, where: str, base: U8 | None = None) -> None:
    """Fill `out` with a chunk's decoded bytes.

    Parameters
    ----------
    codec, itemsize : int
        Of the record.
    payload : ndarray of uint8
    out : ndarray of uint8
        Exactly as many bytes as the chunk has.
    where : str
        For messages.
    base : ndarray of uint8, optional
        The base chunk's decoded bytes, whole; needed by `DELTAS` and by no other.

    Raises
    ------
    UnsupportedVersionError
        If no codec of this build has that number.
    CorruptError
        If the payload does not decode to exactly `out.size` bytes.
    """
    packed = Packed(codec, payload, itemsize, out.size, where)
    join(packed, unpack([packed])[0], out, base)
