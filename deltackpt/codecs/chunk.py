"""A chunk to encode: its bytes, what they are, and what it may be a delta of."""

from __future__ import annotations

from typing import NamedTuple

from deltackpt.types import U8


class Kind(NamedTuple):
    """What a codec may know of a chunk's elements: bytes each {1, 2, 4, 8}, and whether they are floats."""

    itemsize: int
    is_float: bool


class Base(NamedTuple):
    """What a delta is taken against.

    Parameters
    ----------
    data : ndarray of uint8
        The base chunk's decoded bytes.
    offset : int
        Byte of `data` where the part begins that the chunk is compared with.
    cast : int
        How an element of the base becomes one to compare with: a value of `CASTS`, 0 as it is.
    """

    data: U8
    offset: int = 0
    cast: int = 0


class Mode(NamedTuple):
    """How the chunks of a tensor are best stored.

    Parameters
    ----------
    map : int or None
        As of `differences.Form`; None: whole, without a base.
    scale : float
        As of `differences.Form`.
    """

    map: int | None
    scale: float = 1.0


#: As if there were no base.
WHOLE = Mode(None)


class Chunk(NamedTuple):
    """A chunk to encode.

    Parameters
    ----------
    data : ndarray of uint8
    kind : Kind
    buffer : ndarray of uint8, shape (room(data.size),) or more
        Memory to work in; the payload may be a view of it, or of `data`.
    base : Base, optional
    mode : Mode, optional
        How to take the difference; by default it is tried.
    """

    data: U8
    kind: Kind
    buffer: U8
    base: Base | None = None
    mode: Mode | None = None


class Encoded(NamedTuple):
    """A chunk as stored."""

    codec: int
    payload: bytes | U8
