"""Planes as they are stored: each all zero, raw, or zstd in Huffman mode.

Owns   which of the three a plane is, the table that says so, and the coders of each thread.
Never  knows what the planes are of: numbers, differences, or places.

    head | per plane: kind u8, stored size u32 | planes | tail
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import zstandard

from deltackpt import kernels
from deltackpt.errors import CorruptError
from deltackpt.types import U8

log = logging.getLogger("deltackpt")

ZERO, RAW, ZSTD = 0, 1, 2
_PLANE = struct.Struct("<BI")
#: Of differences of 4 to 8 bytes; the classes of bytes, eight to one, are 1/8 of the chunk more.
_N_PLANES_MAX = 31
_HEAD_SIZE_MAX = 40
#: The table of so many planes.
_TABLES = [struct.Struct("<" + n * _PLANE.format[1:]) for n in range(_N_PLANES_MAX + 1)]

#: Bits a byte above which a plane is noise: zstd would gain under 2.5 %.
NOISE_BITS = 7.8
#: The same of planes of so few bytes that the table of a frame is longer than what it would gain.
_SMALL_NOISE_BITS = 7.0

#: What a plane has for bits that is tried unseen.
TRY = 4.0

#: From so many frames on one call decodes all: it costs 8 us to set up, and each of the others 2 us, and ten
#: times that where another thread has taken the interpreter's lock meanwhile.
_N_FRAMES_MIN = 8

#: zstd as little more than its Huffman coder: on an exponent plane 13 % smaller than level 1, 3x faster.
_HUFFMAN = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    chain_log=6,
    search_log=1,
    window_log=18,
    target_length=0,
    write_content_size=True,
    write_checksum=False,
    write_dict_id=False,
)


class _Local(threading.local):
    """What each thread has of its own: coders, which may not be shared and cost 20 us to make."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_HUFFMAN)
        self.decompressor = zstandard.ZstdDecompressor()


_local = _Local()


class Split(NamedTuple):
    """What is to be stored as planes, in a buffer that has room for the payload.

    Parameters
    ----------
    head : bytes
    planes : list of ndarray of uint8
        Views of `buffer`, one after another from where `body` begins.
    bits : list of float
        Entropy of each plane, bits a byte.
    tail : ndarray of uint8
        Bytes that make no whole element.
    buffer : ndarray of uint8
    """

    head: bytes
    planes: list[U8]
    bits: list[float]
    tail: U8
    buffer: U8


def room(size: int) -> int:
    """Return how large a buffer the planes of a chunk of `size` bytes need, each plane raw."""
    return _HEAD_SIZE_MAX + _N_PLANES_MAX * _PLANE.size + size + size // 8 + 8


def body(buffer: U8, head_size: int = _HEAD_SIZE_MAX, n_planes: int = _N_PLANES_MAX) -> U8:
    """Return the part of a buffer where the planes are to be: behind room for head and table, of any size.

    If their sizes are given, raw planes that nothing smaller is in front of stand where they stay.
    """
    return buffer[head_size + n_planes * _PLANE.size :]


def is_noise(bits: float, size: int) -> bool:
    """Return whether a plane is stored raw, untried, given its entropy by a sample.

    Few bytes have few of a kind, whatever they are: 813 of noise read as 7.78 bits.  And the table of a frame
    takes 64 bytes and more.

    Examples
    --------
    >>> is_noise(7.9, 1 << 16), is_noise(7.78, 1 << 16), is_noise(7.78, 813), is_noise(3.0, 20)
    (True, False, True, False)
    """
    return bits > min(NOISE_BITS, max(_SMALL_NOISE_BITS, 8.0 - 512.0 / max(1, size)))


def apart(planes: U8, sizes: Sequence[int]) -> list[U8]:
    """Return planes that lie one after another."""
    return [planes[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def coarser(split: Split, bits_max: float) -> Split:
    """Return a split of which planes of more bits a byte are taken for noise."""
    bits = [b if b <= bits_max or b == TRY else 8.0 for b in split.bits]
    return split._replace(bits=bits)


def expected_size(split: Split) -> float:
    """Return about how large the payload will be."""
    sizes = [
        p.size * (8.0 if is_noise(b, p.size) else b) for p, b in zip(split.planes, split.bits, strict=True)
    ]
    return sum(sizes) / 8 + len(split.head) + split.tail.size


def stored_sizes(splits: Sequence[Split]) -> list[int]:
    """Return how large the payloads will be; no frame is decoded again, since nobody relies on it."""
    coded = [_to_code(split) for split in splits]
    planes = [plane for of in coded for plane in of.values()]
    frames: Any = iter(_local.compressor.multi_compress_to_buffer([p.data for p in planes]) if planes else ())
    return [
        len(split.head)
        + len(split.planes) * _PLANE.size
        + sum(p.size for k, p in enumerate(split.planes) if is_noise(split.bits[k], p.size))
        + sum(min(len(next(frames)), p.size) for p in of.values())
        + split.tail.size
        for split, of in zip(splits, coded, strict=True)
    ]


def encode_all(splits: Sequence[Split]) -> list[U8]:
    """Return the payloads, each in its buffer.

    What is done is done to all planes in one call: a thread that lets go of the interpreter's lock and
    takes it again for every plane gains nothing from a second core.
    """
    coded = [_to_code(split) for split in splits]
    frames = iter(_compress([plane for planes in coded for plane in planes.values()]))
    moves: list[kernels.Move] = []
    payloads = [
        _assemble(split, {k: next(frames) for k in planes}, moves)
        for split, planes in zip(splits, coded, strict=True)
    ]
    kernels.move(moves)
    return payloads


def _to_code(split: Split) -> dict[int, U8]:
    """Return the planes worth trying zstd on: neither noise nor all zero."""
    planes = {
        k: p for k, (p, b) in enumerate(zip(split.planes, split.bits, strict=True)) if not is_noise(b, p.size)
    }
    # A sample that is all alike may miss what is not; nobody has looked at what is tried unseen.
    return {k: plane for k, plane in planes.items() if 0.0 < split.bits[k] != TRY or plane.any()}


def _compress(planes: list[U8]) -> list[Any]:
    """Return a zstd frame for each plane; None where it does not pay, or does not give the plane back.

    Every frame is decoded before anybody relies on it: a zstd release once corrupted backups (restic #4523).
    """
    if not planes:
        return []
    frames: Any = _local.compressor.multi_compress_to_buffer([plane.data for plane in planes])
    try:
        back: Any = _local.decompressor.multi_decompress_to_buffer(frames)
    except (zstandard.ZstdError, ValueError) as e:
        log.error("zstd cannot decode its own frames, planes are stored raw: %s", e)
        return [None] * len(planes)
    same = kernels.are_equal(list(zip(back, planes, strict=True)))
    if not all(same):
        log.error("zstd gives other bytes back, planes are stored raw")
    return [
        frame if is_same and len(frame) < plane.size else None
        for frame, plane, is_same in zip(frames, planes, same, strict=True)
    ]


def _assemble(split: Split, frames: dict[int, Any], moves: list[kernels.Move]) -> U8:
    """Return where the payload will be once `moves` are made: head, table, and the planes moved up to them.

    No plane goes later than it stands, so none is written over before it is moved.
    """
    buffer = split.buffer
    end = len(split.head) + len(split.planes) * _PLANE.size
    table: list[int] = []
    moves.append(kernels.Move(buffer, 0, b""))
    first = len(moves) - 1
    for k, plane in enumerate(split.planes):
        data, code = frames.get(k), ZSTD
        if data is None:
            code = RAW if k in frames or is_noise(split.bits[k], plane.size) else ZERO
            data = plane if code == RAW else b""
        moves.append(kernels.Move(buffer, end, data))
        table += code, len(data)
        end += len(data)
    moves.append(kernels.Move(buffer, end, split.tail))
    moves[first] = kernels.Move(buffer, 0, split.head + _TABLES[len(split.planes)].pack(*table))
    return buffer[: end + split.tail.size]


class Table(NamedTuple):
    """What a payload is to hold.

    Parameters
    ----------
    head : tuple
        What its codec has read of it.
    head_size : int
        Bytes before the table.
    sizes : sequence of int
        Bytes of each plane.
    n_tail : int
    """

    head: tuple[Any, ...]
    head_size: int
    sizes: Sequence[int]
    n_tail: int


class Planes(NamedTuple):
    """What a payload holds: the head of its `Table`, its planes (None: all zeros), and its tail."""

    head: tuple[Any, ...]
    planes: list[U8 | None]
    tail: U8


def decode_all(payloads: Sequence[tuple[U8, Table]]) -> list[Planes]:
    """Return the planes of each payload, and its tail; raw ones are views of it.

    All frames are given to zstd in one call, as in `encode_all`.  What follows a frame inside its plane is
    refused only where they are few: that the planes are right is for the chunk's id to tell.

    Raises
    ------
    CorruptError
        If one does not have exactly what its table says; every size is checked before it is used.
    """
    found: list[Planes] = []
    frames: list[Any] = []
    sizes: list[int] = []
    places: list[tuple[list[U8 | None], int]] = []
    for payload, table in payloads:
        n = len(table.sizes)
        offset = table.head_size + n * _PLANE.size
        if payload.size < offset:
            raise CorruptError(f"payload has {payload.size} bytes, its header needs {offset}")
        kinds = _TABLES[n].unpack_from(payload, table.head_size)
        planes: list[U8 | None] = [None] * n
        for k, wanted in enumerate(table.sizes):
            code, size = kinds[2 * k], kinds[2 * k + 1]
            data = payload[offset : offset + size]
            if data.size != size:
                raise CorruptError(
                    f"plane {k} of {size} bytes at {offset} leaves the payload of {payload.size}"
                )
            # A frame of nothing is damage: zstandard 0.25 frees memory twice if it is given such alone.
            if code == ZSTD and wanted:
                frames.append(_checked_frame(data, wanted, k))
                sizes.append(wanted)
                places.append((planes, k))
            elif code == RAW and size == wanted:
                planes[k] = data
            elif code != ZERO or size:
                raise CorruptError(f"plane {k}: kind {code} with {size} bytes for {wanted}")
            offset += size
        if offset + table.n_tail != payload.size:
            raise CorruptError(f"payload has {payload.size} bytes, its parts {offset + table.n_tail}")
        found.append(Planes(table.head, planes, payload[offset:]))
    for (planes, k), plane in zip(places, _decompressed(frames, sizes), strict=True):
        planes[k] = np.frombuffer(plane, np.uint8)
    return found


def _checked_frame(data: U8, size: int, k: int) -> memoryview:
    """Return a frame that says itself that it holds so many bytes: one of more must not be allocated."""
    try:
        if zstandard.get_frame_parameters(data.data).content_size != size:
            raise CorruptError(f"plane {k}: frame does not hold {size} bytes")
    except (zstandard.ZstdError, ValueError) as e:
        raise CorruptError(f"plane {k} does not decompress: {e}") from e
    return data.data


def _decompressed(frames: list[Any], sizes: list[int]) -> Any:
    """Return what frames hold, as buffers."""
    decompressor = _local.decompressor
    try:
        if len(frames) < _N_FRAMES_MIN:
            return [decompressor.decompress(frame, allow_extra_data=False) for frame in frames]
        return decompressor.multi_decompress_to_buffer(
            frames, decompressed_sizes=np.array(sizes, np.uint64).data
        )
    except (zstandard.ZstdError, ValueError) as e:
        raise CorruptError(f"a plane does not decompress: {e}") from e
