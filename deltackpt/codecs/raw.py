"""Codec 0: the bytes as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltackpt.errors import CorruptError
from deltackpt.types import U8

if TYPE_CHECKING:
    from deltackpt.codecs.chunk import Kind

NUMBER = 0
NAME = "raw"


def encode(data: U8, kind: Kind) -> U8:
    """Return `data` itself."""
    return data


def decode(payload: U8, itemsize: int, out: U8) -> None:
    """Copy the payload out."""
    if payload.size != out.size:
        raise CorruptError(f"payload has {payload.size} bytes, expected {out.size}")
    out[:] = payload
