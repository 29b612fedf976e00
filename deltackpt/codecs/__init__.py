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
from deltackpt.differences import F32_BF16, F32_F16, F64_F32, Planed, cast, ungroup_all
from deltackpt.errors import CorruptError, UnsupportedVersionError
from deltackpt.types import U8

__all__ = [
    "CASTS",
    "DELTAS",
    "ITEMSIZES",
    "NAMES",
    "WHOLE",
    "Base",
    "Chunk",
    "Encoded",
    "Job",
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
    "join_all",
    "lz4",
    "planes",
    "raw",
    "room",
    "sparse",
    "unpack",
]


class PlainCodec(Protocol):
    """What the module of a codec offers whose payload is no planes."""

    NUMBER: int
    NAME: str

    @staticmethod
    def decode(payload: U8, out: U8) -> None:
        """Fill `out` exactly, or raise `CorruptError`."""


class PlanedCodec(Protocol):
    """What the module of a codec offers whose payload is planes as in coder.py."""

    NUMBER: int
    NAME: str

    @staticmethod
    def table(payload: U8, itemsize: int, size: int) -> coder.Table:
        """Return what the payload of a chunk of `size` bytes is to hold, or raise `CorruptError`."""


_PLAIN: dict[int, PlainCodec] = {c.NUMBER: c for c in (raw, lz4)}  # type: ignore[misc]
_PLANED: dict[int, PlanedCodec] = {c.NUMBER: c for c in (planes, dense, sparse)}  # type: ignore[misc]
#: Those whose payload is of use only with the base's bytes.
DELTAS = frozenset({dense.NUMBER, sparse.NUMBER})
NAMES = {number: codec.NAME for number, codec in (_PLAIN | _PLANED).items()}
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


class Job(NamedTuple):
    """What is left of decoding a chunk.

    Parameters
    ----------
    packed : Packed
    planes : Planes or None
        What `unpack` returned.
    out, base : ndarray of uint8
        As of `decode`.
    """

    packed: Packed
    planes: coder.Planes | None
    out: U8
    base: U8 | None = None


def join_all(jobs: Sequence[Job]) -> None:
    """Fill the `out` of each, in their order: the base of one may be the `out` of another before it.

    Dense deltas that follow each other are joined in one call: see `differences.ungroup_all`.

    Raises
    ------
    CorruptError
        If one does not fit its base, or does not decode to exactly `out.size` bytes; names it.
    """
    waiting: list[tuple[Job, Planed]] = []
    for job in jobs:
        codec, payload, itemsize, _, where = job.packed
        if (job.base is None) == (codec in DELTAS):
            raise CorruptError(f"{where}: {NAMES[codec]} {'without' if job.base is None else 'with'} a base")
        # A tail is written here: by then nobody must be waiting to read what was there before.
        if codec != dense.NUMBER or (job.planes is not None and job.planes.tail.size):
            _ungroup(waiting)
            waiting = []
        try:
            if job.planes is None:
                _PLAIN[codec].decode(payload, job.out)
            elif job.base is None:
                planes.join(job.planes, itemsize, job.out)
            elif codec == dense.NUMBER:
                waiting.append((job, dense.planed(job.planes, itemsize, job.out, job.base)))
            else:
                sparse.join(job.planes, itemsize, job.out, job.base)
        except CorruptError as e:
            raise CorruptError(f"{where}: {NAMES[codec]}: {e.message}") from e
    _ungroup(waiting)


def _ungroup(waiting: list[tuple[Job, Planed]]) -> None:
    fits = ungroup_all([planed for _, planed in waiting])
    for (job, planed), is_good in zip(waiting, fits, strict=True):
        if not is_good:
            n = planed.out.size // planed.form.itemsize
            raise CorruptError(
                f"{job.packed.where}: {dense.NAME}: the classes of {n} elements are not {planed.of}"
            )


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
    join_all([Job(packed, unpack([packed])[0], out, base)])
