"""Codec 1: one lz4 block; for bytes that repeat in runs."""

from __future__ import annotations

import logging

import lz4.block
import numpy as np

from deltackpt.errors import CorruptError
from deltackpt.types import U8

log = logging.getLogger("deltackpt")

NUMBER = 1
NAME = "lz4"


def encode(data: U8) -> bytes:
    """Return an lz4 block without the size in front, decoded again before anybody relies on it."""
    whole = data.tobytes()  # first: whoever changes the data meanwhile is no fault of lz4's
    block: bytes = lz4.block.compress(whole, store_size=False)
    try:
        if lz4.block.decompress(block, uncompressed_size=data.size) == whole:
            return block
    except (lz4.block.LZ4BlockError, ValueError) as e:
        log.error("lz4 cannot decode its own block: %s", e)
    log.error("lz4 does not give the chunk back, it is stored raw")
    return whole


def decode(payload: U8, out: U8) -> None:
    """Decompress exactly `out.size` bytes."""
    try:
        data = lz4.block.decompress(payload, uncompressed_size=out.size)
    except (lz4.block.LZ4BlockError, ValueError, MemoryError) as e:
        raise CorruptError(f"block does not decompress to {out.size} bytes: {e}") from e
    if len(data) != out.size:
        raise CorruptError(f"block decompresses to {len(data)} bytes, expected {out.size}")
    out[:] = np.frombuffer(data, np.uint8)
