"""Codec 4: where elements differ from the base's, and the differences of those alone, as byte planes.

    map: u8 | cast: u8 | itemsize: u8 | n_tail: u8 | offset: u32 | n_changed: u32 | places_size: u32
    | planes as in coder.py: the places, then the differences | tail

With the top bit of `map` set the places are a bitmap, else gaps (differences.take).  Nothing changed: no
planes, as where a tensor is the cast of another.
"""

from __future__ import annotations

import struct
import threading

import numpy as np

from deltackpt import differences, kernels
from deltackpt.codecs import coder
from deltackpt.codecs.chunk import Chunk
from deltackpt.codecs.dense import checked, compared, part
from deltackpt.differences import Form
from deltackpt.errors import CorruptError, InvalidInputError
from deltackpt.scratch import Scratch
from deltackpt.types import U8

NUMBER = 4
NAME = "delta-sparse"

#: Above this share of changed elements the others are as well written down as differences of zero.
SHARE_MAX = 0.5
#: Above this share a bit for each element is shorter than a byte for each that changed.
_BITMAP_SHARE = 0.15
_BITMAP = 0x80
_HEAD = struct.Struct("<BBBBIII")


class _Local(threading.local):
    """Where each thread packs what changed, and has it before it is put in place."""

    def __init__(self) -> None:
        self.packed = Scratch()
        self.places = Scratch()


_local = _Local()


def split(chunk: Chunk, n_changed: int) -> coder.Split:
    """Split places and differences into the chunk's buffer, given how many elements changed: at most half."""
    data, (itemsize, _), buffer, base, mode = chunk
    n = data.size // itemsize
    whole = n * itemsize
    if base is None or (old := part(data, chunk.kind, base)) is None:
        raise InvalidInputError(f"a chunk of {data.size} bytes does not fit its base {base}")
    form = Form(itemsize, (mode and mode.map) or 0, base.cast)
    bitmap = n_changed > _BITMAP_SHARE * n
    out = coder.body(buffer)
    places = out[: (n + 7) // 8 if bitmap else n_changed + n // 255]
    packed = _local.packed.of(n_changed * itemsize)
    size = differences.take(data[:whole], old, form, bitmap=bitmap, places=places, packed=packed)
    map_ = form.map | _BITMAP * bitmap
    head = _HEAD.pack(map_, base.cast, itemsize, data.size - whole, base.offset, n_changed, size)
    if not n_changed:
        return coder.Split(head, [], [], data[whole:], buffer)
    planes = out[size : size + packed.size]
    [bits] = kernels.split_all([kernels.Splitting(packed, itemsize, False, planes)])
    parts = [out[:size], *coder.apart(planes, [n_changed] * itemsize)]
    # The places are runs or gaps, never noise: zstd tells what they take.
    return coder.Split(head, parts, [coder.TRY, *bits], data[whole:], buffer)


def table(payload: U8, itemsize: int, size: int) -> coder.Table:
    """Return what a payload is to hold if it is of a chunk of `size` bytes."""
    if payload.size < _HEAD.size:
        raise CorruptError(f"payload has {payload.size} bytes, its header needs {_HEAD.size}")
    head = map_, cast, found_itemsize, n_tail, _, changed, n_places = _HEAD.unpack_from(payload)
    n = size // itemsize
    checked(Form(itemsize, map_ & ~_BITMAP, cast))
    room = (n + 7) // 8 if map_ & _BITMAP else changed + n // 255
    fits = changed <= n and n_places <= room and (changed or not n_places)
    if found_itemsize != itemsize or n_tail != size % itemsize or not fits:
        raise CorruptError(
            f"header {found_itemsize, n_tail, changed, n_places} does not fit {size} bytes of {itemsize}"
        )
    return coder.Table(head, _HEAD.size, [n_places, *[changed] * itemsize] if changed else [], n_tail)


def join(coded: coder.Planes, itemsize: int, out: U8, base: U8) -> None:
    """Fill `out` from a payload's planes and the base chunk's bytes."""
    map_, cast, _, n_tail, offset, changed, size = coded.head
    n = out.size // itemsize
    bitmap, form = bool(map_ & _BITMAP), Form(itemsize, map_ & ~_BITMAP, cast)
    planes = coded.planes
    places = _local.places.of(size)
    packed = _local.packed.of(changed * itemsize)
    if changed:
        places[:] = 0 if planes[0] is None else planes[0]
        split_up = np.empty(packed.size, np.uint8)
        for k, plane in enumerate(planes[1:]):
            split_up[k * changed : (k + 1) * changed] = 0 if plane is None else plane
        kernels.join_planes(split_up, itemsize, False, packed)
    old = compared(base, offset, n, form)
    if not differences.put(old, form, bitmap=bitmap, places=places, packed=packed, out=out[: n * itemsize]):
        raise CorruptError(f"{size} bytes of places do not name {changed} of {n} elements")
    if n_tail:
        out[n * itemsize :] = coded.tail
