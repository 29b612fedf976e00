"""Codecs: numbered reversible transforms of a chunk's bytes.

Owns   the registry, and decoding by number.
Never  does I/O or hashes: the caller compares the decoded bytes with the chunk id.

A number, once released, means the same bytes for ever (docs/format.md, "Codecs").
"""

from __future__ import annotations

from typing import Protocol

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
    "best_mode",
    "cast",
    "coder",
    "decode",
    "dense",
    "encode",
    "encode_all",
    "encoder",
    "lz4",
    "planes",
    "raw",
    "room",
    "sparse",
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


CODECS: dict[int, Codec] = {c.NUMBER: c for c in (raw, lz4, planes)}  # type: ignore[misc]
DELTAS: dict[int, DeltaCodec] = {c.NUMBER: c for c in (dense, sparse)}  # type: ignore[misc]
NAMES = {number: codec.NAME for number, codec in (CODECS | DELTAS).items()}
ITEMSIZES = (1, 2, 4, 8)
#: (dtype of the base, dtype of the chunk) -> how the one is made the other.
CASTS = {
    ("float32", "bfloat16"): F32_BF16,
    ("float32", "float16"): F32_F16,
    ("float64", "float32"): F64_F32,
}


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
    if codec not in NAMES:
        raise UnsupportedVersionError(
            f"{where}: codec {codec}, this build knows {NAMES}", hint="upgrade deltackpt"
        )
    if itemsize not in ITEMSIZES:
        raise CorruptError(f"{where}: element size {itemsize}, expected one of {ITEMSIZES}")
    if (base is None) == (codec in DELTAS):
        raise CorruptError(f"{where}: {NAMES[codec]} {'without' if base is None else 'with'} a base")
    try:
        if base is not None:
            DELTAS[codec].decode(payload, itemsize, out, base)
        else:
            CODECS[codec].decode(payload, itemsize, out)
    except CorruptError as e:
        raise CorruptError(f"{where}: {NAMES[codec]}: {e.message}") from e
