"""Codec 3: the difference of every element to the base's, grouped by how many bytes it has.

    map: u8 | cast: u8 | itemsize: u8 | n_tail: u8 | offset: u32 | scale: f32 | lengths: u16 | 0: u16
    | n: u32 for each bit of `lengths` | planes as in coder.py | tail

Bit l of `lengths`: there are differences stored with l bytes, n of them.  The planes are those of
differences.group_all.  Where most differences have two bytes and some three, the third byte of those few
costs its own entropy and a bit for each of all, which is less than a plane of bytes that are mostly zero.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from deltackpt import differences
from deltackpt.codecs import coder
from deltackpt.codecs.chunk import Base, Chunk, Kind
from deltackpt.differences import N_CLASSES_MAX, Form
from deltackpt.errors import CorruptError, InvalidInputError
from deltackpt.types import U8

NUMBER = 3
NAME = "delta-dense"

_HEAD = struct.Struct("<BBBBIfHH")


class Differences(NamedTuple):
    """The differences of a chunk, and the entropy of its own bytes: if low it may be smaller without."""

    split: coder.Split
    data_bits: float


def part(data: U8, kind: Kind, base: Base) -> U8 | None:
    """Return the part of the base that a chunk is compared with; None if it is too short."""
    form = Form(kind.itemsize, 0, base.cast)
    size = data.size // kind.itemsize * form.base_itemsize
    return base.data[base.offset : base.offset + size] if base.offset + size <= base.data.size else None


def split_all(chunks: Sequence[Chunk], share_few: float = -1.0) -> list[Differences | int]:
    """Split the differences of each chunk to its base, in its mode, into its buffer.

    Returns
    -------
    list of Differences or int
        How many elements changed, where they are at most the share `share_few` of all.
    """
    pairs = []
    for data, kind, buffer, base, mode in chunks:
        if base is None or (old := part(data, kind, base)) is None:
            raise InvalidInputError(f"a chunk of {data.size} bytes does not fit its base {base}")
        n = data.size // kind.itemsize
        form = Form(kind.itemsize, (mode and mode.map) or 0, base.cast, mode.scale if mode else 1.0)
        new = data[: n * kind.itemsize]
        n_few = int(share_few * n) if share_few >= 0 else -1
        pairs.append(differences.Pair(new, old, form, coder.body(buffer), n_few))
    return [
        found if isinstance(found, int) else _split(chunk, pair, found)
        for chunk, pair, found in zip(chunks, pairs, differences.group_all(pairs), strict=True)
    ]


def _split(chunk: Chunk, pair: differences.Pair, grouped: differences.Grouped) -> Differences:
    of, form = grouped.of, pair.form
    tail = chunk.data[pair.data.size :]
    head = _HEAD.pack(
        form.map,
        form.cast,
        form.itemsize,
        tail.size,
        chunk.base.offset if chunk.base is not None else 0,
        form.scale,
        sum(1 << length for length in of),
        0,
    ) + struct.pack(f"<{len(of)}I", *of.values())
    planes = coder.apart(pair.out, differences.plane_sizes(of))
    return Differences(coder.Split(head, planes, grouped.bits, tail, chunk.buffer), grouped.data_bits)


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


def planed(coded: coder.Planes, itemsize: int, out: U8, base: U8) -> differences.Planed:
    """Return what is left to be done, by `differences.ungroup_all`, to fill `out`."""
    form, offset, of = coded.head
    n = out.size // itemsize
    old = compared(base, offset, n, form)
    out[n * itemsize :] = coded.tail
    return differences.Planed(coded.planes, old, form, of, out[: n * itemsize])


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
