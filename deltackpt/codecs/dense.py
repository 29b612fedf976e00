"""Codec 3: the difference of every element to the base's, grouped by how many bytes it has.

    map: u8 | cast: u8 | itemsize: u8 | n_tail: u8 | offset: u32 | scale: f32 | lengths: u16 | 0: u16
    | n: u32 for each bit of `lengths` | planes as in coder.py | tail

Bit l of `lengths`: there are differences stored with l bytes, n of them.  The planes are those of
differences.group.  Where most differences have two bytes and some three, the third byte of those few costs
its own entropy and a bit for each of all, which is less than a plane of bytes that are mostly zero.
"""

from __future__ import annotations

import struct

import numpy as np

from deltackpt import differences
from deltackpt.codecs import coder
from deltackpt.codecs.chunk import Base, Kind, Mode
from deltackpt.differences import N_CLASSES_MAX, Form
from deltackpt.errors import CorruptError, InvalidInputError
from deltackpt.types import U8

NUMBER = 3
NAME = "delta-dense"

_HEAD = struct.Struct("<BBBBIfHH")


def part(data: U8, kind: Kind, base: Base) -> U8 | None:
    """Return the part of the base that a chunk is compared with; None if it is too short."""
    form = Form(kind.itemsize, 0, base.cast)
    size = data.size // kind.itemsize * form.base_itemsize
    return base.data[base.offset : base.offset + size] if base.offset + size <= base.data.size else None


def split(data: U8, kind: Kind, base: Base, mode: Mode, buffer: U8) -> coder.Split:
    """Split the differences into `buffer`."""
    itemsize = kind.itemsize
    whole = data.size // itemsize * itemsize
    form = Form(itemsize, mode.map or 0, base.cast, mode.scale)
    compared = part(data, kind, base)
    if compared is None:
        raise InvalidInputError(f"base has {base.data.size} bytes, a chunk of {data.size} at {base.offset}")
    of = differences.classes(differences.lengths(data[:whole], compared, form))
    head = _HEAD.pack(
        form.map,
        form.cast,
        itemsize,
        data.size - whole,
        base.offset,
        form.scale,
        sum(1 << length for length in of),
        0,
    ) + struct.pack(f"<{len(of)}I", *of.values())
    sizes = differences.plane_sizes(of)
    out = coder.body(buffer, len(head), len(sizes))[: sum(sizes)]
    differences.group(data[:whole], compared, form, of, out)
    return coder.Split(head, *coder.judged(out, sizes), data[whole:], buffer)


def encode(data: U8, kind: Kind, base: Base, mode: Mode) -> U8:
    """Return the payload, larger than `data` or not."""
    return coder.encode_all([split(data, kind, base, mode, np.empty(coder.room(data.size), np.uint8))])[0]


def decode(payload: U8, itemsize: int, out: U8, base: U8) -> None:
    """Undo `encode`, given the base chunk's bytes."""
    join(coder.decode(payload, table(payload, itemsize, out.size)), itemsize, out, base)


def table(payload: U8, itemsize: int, size: int) -> coder.Table:
    """Return what a payload is to hold if it is of a chunk of `size` bytes."""
    if payload.size < _HEAD.size:
        raise CorruptError(f"payload has {payload.size} bytes, its header needs {_HEAD.size}")
    map_, cast, found_itemsize, n_tail, offset, scale, mask, zero = _HEAD.unpack_from(payload)
    form = checked(Form(itemsize, map_, cast, scale))
    if found_itemsize != itemsize or n_tail != size % itemsize or zero:
        raise CorruptError(f"header {found_itemsize, n_tail, zero} does not fit {size} bytes of {itemsize}")
    lengths = [length for length in range(16) if mask >> length & 1]
    head_size = _HEAD.size + 4 * len(lengths)
    if not 0 < len(lengths) <= N_CLASSES_MAX or lengths[-1] > itemsize or payload.size < head_size:
        raise CorruptError(f"payload of {payload.size} bytes with lengths {lengths} of {itemsize} at most")
    of = dict(zip(lengths, struct.unpack_from(f"<{len(lengths)}I", payload, _HEAD.size), strict=True))
    if sum(of.values()) != size // itemsize:
        raise CorruptError(f"{of} are not {size // itemsize} elements")
    return coder.Table((form, offset, of), head_size, differences.plane_sizes(of), n_tail)


def join(coded: coder.Planes, itemsize: int, out: U8, base: U8) -> None:
    """Fill `out` from a payload's planes and the base chunk's bytes."""
    form, offset, of = coded.head
    whole = out.size // itemsize * itemsize
    old = compared(base, offset, whole // itemsize, form)
    if not differences.ungroup(coded.planes, old, form, of, out[:whole]):
        raise CorruptError(f"the classes of {whole // itemsize} elements are not {of}")
    out[whole:] = coded.tail


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
