"""Codec 3: the difference of every element to the base's, as byte planes.

    map: u8 | cast: u8 | itemsize: u8 | n_tail: u8 | offset: u32 | scale: f32 | planes as in coder.py | tail

The differences are those of differences.py: small numbers where little changed, so the upper planes are
all zero or of few symbols.
"""

from __future__ import annotations

import struct

import numpy as np

from deltackpt import differences
from deltackpt.codecs import coder
from deltackpt.codecs.chunk import Base, Kind, Mode
from deltackpt.differences import Form
from deltackpt.errors import CorruptError, InvalidInputError
from deltackpt.types import U8

NUMBER = 3
NAME = "delta-dense"

_HEAD = struct.Struct("<BBBBIf")


def part(data: U8, kind: Kind, base: Base) -> U8 | None:
    """Return the part of the base that a chunk is compared with; None if it is too short."""
    form = Form(kind.itemsize, 0, base.cast)
    size = data.size // kind.itemsize * form.base_itemsize
    return base.data[base.offset : base.offset + size] if base.offset + size <= base.data.size else None


def split(data: U8, kind: Kind, base: Base, mode: Mode, buffer: U8) -> coder.Split:
    """Split the differences into `buffer`."""
    itemsize = kind.itemsize
    n = data.size // itemsize
    whole = n * itemsize
    form = Form(itemsize, mode.map or 0, base.cast, mode.scale)
    compared = part(data, kind, base)
    if compared is None:
        raise InvalidInputError(f"base has {base.data.size} bytes, a chunk of {data.size} at {base.offset}")
    out = coder.body(buffer, _HEAD.size, itemsize)[:whole]
    differences.split(data[:whole], compared, form, out)
    head = _HEAD.pack(form.map, form.cast, itemsize, data.size - whole, base.offset, form.scale)
    return coder.Split(head, *coder.judged(out, itemsize), data[whole:], buffer)


def encode(data: U8, kind: Kind, base: Base, mode: Mode) -> U8:
    """Return the payload, larger than `data` or not."""
    return coder.encode_all([split(data, kind, base, mode, np.empty(coder.room(data.size), np.uint8))])[0]


def decode(payload: U8, itemsize: int, out: U8, base: U8) -> None:
    """Undo `encode`, given the base chunk's bytes."""
    if payload.size < _HEAD.size:
        raise CorruptError(f"payload has {payload.size} bytes, its header needs {_HEAD.size}")
    map_, cast, found_itemsize, n_tail, offset, scale = _HEAD.unpack_from(payload)
    n = out.size // itemsize
    form = checked(Form(itemsize, map_, cast, scale))
    if found_itemsize != itemsize or n_tail != out.size % itemsize:
        raise CorruptError(f"header {found_itemsize, n_tail} does not fit {out.size} bytes of {itemsize}")
    planes, tail = coder.decode(payload, _HEAD.size, [n] * itemsize, n_tail)
    differences.join(planes, compared(base, offset, n, form), form, out[: n * itemsize])
    out[n * itemsize :] = tail


def checked(form: Form) -> Form:
    """Return a form that was read; `CorruptError` if there is no such."""
    try:
        form.check()
    except InvalidInputError as e:
        raise CorruptError(e.message) from e
    return form


def compared(base: U8, offset: int, n: int, form: Form) -> U8:
    """Return the part of a base that a payload names; `CorruptError` if it has none such."""
    size = n * form.base_itemsize
    if offset + size > base.size:
        raise CorruptError(f"base has {base.size} bytes, {size} at {offset} are needed")
    return base[offset : offset + size]
