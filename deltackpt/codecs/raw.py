"""Codec 0: the bytes as they are."""

from __future__ import annotations

from deltackpt.errors import CorruptError
from deltackpt.types import U8

NUMBER = 0
NAME = "raw"


def decode(payload: U8, out: U8) -> None:
    """Copy the payload out."""
    if payload.size != out.size:
        raise CorruptError(f"payload has {payload.size} bytes, expected {out.size}")
    out[:] = payload
