"""Codec 2: byte planes, each all zero, raw, or zstd in Huffman mode; for numbers.

Byte k of every element stands together, so that a float's exponent is a plane of few symbols and its
low mantissa bytes are noise that no coder is tried on.  Floats are rotated left by one bit first: the
sign moves next to the mantissa and the exponent fills the top plane.

    rotate: u8 | itemsize: u8 | n_tail: u8 | 0: u8 | planes as in coder.py | tail bytes

Byte shuffle as in Blosc (Alted, CiSE 12(2), 2010); planes apart as in ZipNN (Hershcovitch et al., 2024).
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence

from deltackpt import kernels
from deltackpt.codecs import coder
from deltackpt.codecs.chunk import Chunk
from deltackpt.errors import CorruptError
from deltackpt.scratch import Scratch
from deltackpt.types import U8

NUMBER = 2
NAME = "planes"

_HEAD = struct.Struct("<BBBB")


class _Local(threading.local):
    """Where each thread has its planes before they are joined."""

    def __init__(self) -> None:
        self.scratch = Scratch()


_local = _Local()


def split_all(chunks: Sequence[Chunk]) -> list[coder.Split]:
    """Split each chunk into its buffer, and judge each plane by a sample; bases do not matter."""
    splits = []
    for data, (itemsize, is_float), buffer, *_ in chunks:
        whole = data[: data.size // itemsize * itemsize]
        out = coder.body(buffer, _HEAD.size, itemsize)[: whole.size]
        splits.append(kernels.Splitting(whole, itemsize, is_float, out))
    found = []
    for chunk, (whole, itemsize, rotate, out), bits in zip(
        chunks, splits, kernels.split_all(splits), strict=True
    ):
        tail = chunk.data[whole.size :]
        head = _HEAD.pack(rotate, itemsize, tail.size, 0)
        planes = coder.apart(out, [whole.size // itemsize] * itemsize)
        found.append(coder.Split(head, planes, bits, tail, chunk.buffer))
    return found


def has_noise(planes: coder.Split) -> bool:
    """Return whether some plane is noise: then no bytes repeat across elements, and lz4 cannot win."""
    return any(bits > coder.NOISE_BITS for bits in planes.bits)


def table(payload: U8, itemsize: int, size: int) -> coder.Table:
    """Return what a payload is to hold if it is of a chunk of `size` bytes."""
    if payload.size < _HEAD.size:
        raise CorruptError(f"payload has {payload.size} bytes, its header needs {_HEAD.size}")
    head = rotate, found_itemsize, n_tail, zero = _HEAD.unpack_from(payload)
    if found_itemsize != itemsize or rotate > 1 or zero or n_tail != size % itemsize:
        raise CorruptError(f"header {head} does not fit {size} bytes of {itemsize}")
    return coder.Table(head, _HEAD.size, [size // itemsize] * itemsize, n_tail)


def join(coded: coder.Planes, itemsize: int, out: U8) -> None:
    """Fill `out` from a payload's planes."""
    rotate, _, n_tail, _ = coded.head
    n = out.size // itemsize
    joined = _local.scratch.of(n * itemsize)
    for k, plane in enumerate(coded.planes):
        joined[k * n : (k + 1) * n] = 0 if plane is None else plane
    kernels.join_planes(joined, itemsize, bool(rotate), out[: n * itemsize])
    if n_tail:
        out[n * itemsize :] = coded.tail
