"""Codec 2: byte planes, each all zero, raw, or zstd in Huffman mode; for numbers.

Byte k of every element stands together, so that a float's exponent is a plane of few symbols and its
low mantissa bytes are noise that no coder is tried on.  Floats are rotated left by one bit first: the
sign moves next to the mantissa and the exponent fills the top plane.

    rotate: u8 | itemsize: u8 | n_tail: u8 | 0: u8 | per plane: kind u8, size u32 | planes | tail bytes

Byte shuffle as in Blosc (Alted, CiSE 12(2), 2010); planes apart as in ZipNN (Hershcovitch et al., 2024).
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash
import zstandard

from deltackpt import kernels
from deltackpt.errors import CorruptError
from deltackpt.scratch import Scratch
from deltackpt.types import U8

if TYPE_CHECKING:
    from deltackpt.codecs import Kind

log = logging.getLogger("deltackpt")

NUMBER = 2
NAME = "planes"

ZERO, RAW, ZSTD = 0, 1, 2
_HEAD = struct.Struct("<BBBB")
_PLANE = struct.Struct("<BI")

#: Bits a byte above which a plane is noise: zstd would gain under 2.5 %.
_NOISE_BITS = 7.8

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
        self.scratch = Scratch()


_local = _Local()


class Planes(NamedTuple):
    """A chunk split into byte planes, in a buffer that has room for the payload."""

    kind: Kind
    buffer: U8
    split: U8  # a view of `buffer`, where the planes of a payload start
    tail: U8
    bits: list[float]  # entropy of each plane, bits a byte


def room(size: int) -> int:
    """Return how large a buffer `split` needs for a chunk of `size` bytes."""
    return _HEAD.size + 8 * _PLANE.size + size


def split(data: U8, kind: Kind, buffer: U8) -> Planes:
    """Split a chunk into `buffer`, and judge each plane by the entropy of a sample."""
    n = data.size // kind.itemsize
    whole = n * kind.itemsize
    start = _HEAD.size + kind.itemsize * _PLANE.size
    planes = kernels.split_planes(data[:whole], kind.itemsize, kind.is_float, buffer[start : start + whole])
    bits = kernels.plane_entropies(planes, kind.itemsize) if n else []
    return Planes(kind, buffer, planes, data[whole:], bits)


def estimate(planes: Planes) -> float:
    """Return the expected payload / raw."""
    expected = sum(8.0 if bits > _NOISE_BITS else bits for bits in planes.bits)
    return expected / (8 * len(planes.bits)) if planes.bits else 1.0


def has_noise(planes: Planes) -> bool:
    """Return whether some plane is noise: then no bytes repeat across elements, and lz4 cannot win."""
    return any(bits > _NOISE_BITS for bits in planes.bits)


def encode(data: U8, kind: Kind) -> U8:
    """Return the planes' payload."""
    return encode_all([split(data, kind, np.empty(room(data.size), np.uint8))])[0]


def encode_all(chunks: Sequence[Planes]) -> list[U8]:
    """Return the payloads of chunks that were split, each in its chunk's buffer.

    The planes of all chunks go to zstd in one call: a thread that lets go of the interpreter's lock and
    takes it again for every plane gains nothing from a second core.
    """
    coded = [_planes_to_code(chunk) for chunk in chunks]
    frames = iter(_compress([plane for planes in coded for plane in planes.values()]))
    return [
        _assemble(chunk, {k: next(frames) for k in planes})
        for chunk, planes in zip(chunks, coded, strict=True)
    ]


def _planes_to_code(chunk: Planes) -> dict[int, U8]:
    """Return the planes worth trying zstd on: neither noise nor all zero."""
    n = len(chunk.split) // chunk.kind.itemsize
    planes = {k: chunk.split[k * n : (k + 1) * n] for k, bits in enumerate(chunk.bits) if bits <= _NOISE_BITS}
    return {k: plane for k, plane in planes.items() if chunk.bits[k] > 0.0 or plane.any()}


def _compress(planes: list[U8]) -> list[U8 | None]:
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
    result: list[U8 | None] = []
    for plane, frame, decoded in zip(planes, frames, back, strict=True):
        # Digests, since they cost a quarter of numpy.array_equal, which makes an array of answers.
        if xxhash.xxh3_128_digest(decoded) != xxhash.xxh3_128_digest(plane):
            log.error("zstd gives other bytes back, the plane is stored raw")
            result.append(None)
        else:
            result.append(np.frombuffer(frame, np.uint8) if len(frame) < plane.size else None)
    return result


def _assemble(chunk: Planes, frames: dict[int, U8 | None]) -> U8:
    """Write header, table and planes into the chunk's buffer, where the planes stand already."""
    itemsize, rotate = chunk.kind
    buffer, n = chunk.buffer, chunk.split.size // itemsize
    _HEAD.pack_into(buffer.data, 0, rotate, itemsize, chunk.tail.size, 0)
    start = end = _HEAD.size + itemsize * _PLANE.size
    for k in range(itemsize):
        frame = frames.get(k)
        is_noise = k < len(chunk.bits) and chunk.bits[k] > _NOISE_BITS
        if frame is not None:
            code, size = ZSTD, frame.size
            buffer[end : end + size] = frame
        elif k in frames or is_noise:
            code, size = RAW, n
            if end != start + k * n:
                # Never later than it stands, and NumPy minds the overlap.
                buffer[end : end + size] = chunk.split[k * n : (k + 1) * n]
        else:
            code, size = ZERO, 0
        _PLANE.pack_into(buffer.data, _HEAD.size + k * _PLANE.size, code, size)
        end += size
    buffer[end : end + chunk.tail.size] = chunk.tail
    return buffer[: end + chunk.tail.size]


def decode(payload: U8, itemsize: int, out: U8) -> None:
    """Undo `encode`; every size is checked before it is used."""
    body_offset = _HEAD.size + itemsize * _PLANE.size
    if payload.size < body_offset:
        raise CorruptError(f"payload has {payload.size} bytes, its header needs {body_offset}")
    rotate, found_itemsize, n_tail, zero = _HEAD.unpack_from(payload)
    if found_itemsize != itemsize or rotate > 1 or zero or n_tail != out.size % itemsize:
        raise CorruptError(
            f"header {rotate, found_itemsize, n_tail, zero} does not fit {out.size} bytes of {itemsize}"
        )
    n = out.size // itemsize
    split = _local.scratch.of(n * itemsize)
    offset = body_offset
    for k in range(itemsize):
        code, size = _PLANE.unpack_from(payload, _HEAD.size + k * _PLANE.size)
        if offset + size > payload.size:
            raise CorruptError(f"plane {k} of {size} bytes at {offset} leaves the payload of {payload.size}")
        _decode_plane(code, payload[offset : offset + size], split[k * n : (k + 1) * n], k)
        offset += size
    if offset + n_tail != payload.size:
        raise CorruptError(f"payload has {payload.size} bytes, its parts {offset + n_tail}")
    kernels.join_planes(split, itemsize, bool(rotate), out[: n * itemsize])
    out[n * itemsize :] = payload[offset:]


def _decode_plane(code: int, body: U8, plane: U8, k: int) -> None:
    if code == ZERO and body.size == 0:
        plane[:] = 0
    elif code == RAW and body.size == plane.size:
        plane[:] = body
    elif code == ZSTD:
        try:
            # The frame's own size first: a frame that claims more must not be allocated.
            if zstandard.get_frame_parameters(body.data).content_size != plane.size:
                raise CorruptError(f"plane {k}: frame does not hold {plane.size} bytes")
            plane[:] = np.frombuffer(
                _local.decompressor.decompress(body.data, allow_extra_data=False), np.uint8
            )
        except (zstandard.ZstdError, ValueError) as e:
            raise CorruptError(f"plane {k} does not decompress: {e}") from e
    else:
        raise CorruptError(f"plane {k}: kind {code} with {body.size} bytes for {plane.size}")
