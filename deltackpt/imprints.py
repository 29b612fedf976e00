"""Imprints: what fingerprints are to bytes in memory, of bytes on a device, computed where they are.

Owns   the hash, in torch's operations and in NumPy's, equal bit for bit on every device.
Never  brings more than 16 bytes over the bus for every 8 MiB.

The bytes, padded with zeros to words of 8, are taken in blocks of 8 MiB.  A block has two lanes, with keys
of their own: ``sum((w + k).low * (w + k).high)`` over its words ``w``, where ``k`` is the key of the word's
place, low and high are the halves of 32 bits as signed numbers, and all else wraps at 64 bits.  That is NH of
UMAC (Black et al., CRYPTO 1999), as in XXH3: over its keys, a lane is the same for two different blocks with
probability 2^-32, and both are with 2^-64.  The imprint is the xxh3_128 of all lanes, block by block, and of
the size.

A sum that wraps is the same in whatever order it is taken, so all devices must agree; each is asked once
whether it does.  A block takes four operations of torch, and 32 MiB of the device's memory; the keys take
16 MiB.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from deltackpt.devices import TorchTensor, fetch
from deltackpt.types import U8

log = logging.getLogger("deltackpt")
I64: TypeAlias = npt.NDArray[np.int64]

_N_LANES = 2
#: Large enough that to begin an operation, some 5 us, is no more than it takes; small enough for a cache.
_BLOCK_SIZE = 8 << 20


def imprints(raws: Iterable[TorchTensor]) -> list[bytes | None]:
    """Return the imprint of each tensor; those of one device come over the bus together.

    Parameters
    ----------
    raws : iterable of torch.Tensor of uint8, shape (size,)
        On any devices; each is let go of before the next is asked for.

    Returns
    -------
    list of bytes or None
        16 bytes each; None where a device has no room, or does not compute as `reference` does.
    """
    lanes = [(str(raw.device), raw.numel(), _lanes_of(raw)) for raw in raws]
    found: list[bytes | None] = [None] * len(lanes)
    for device in {device for device, _, lane in lanes if lane is not None}:
        which = [i for i, (of, _, lane) in enumerate(lanes) if of == device and lane is not None]
        for i, fetched in zip(which, _fetched([lanes[i][2] for i in which]), strict=True):
            found[i] = _digest(fetched, lanes[i][1])
    return found


def _lanes_of(raw: TorchTensor) -> TorchTensor | None:
    try:
        return _lanes(raw) if _is_exact(str(raw.device)) else None
    except (RuntimeError, TypeError) as e:  # no room, or no such operation: it is copied to be looked at
        log.warning("a tensor on %s is looked at by copying it: %s", raw.device, e)
        return None


@functools.cache
def _is_exact(device: str) -> bool:
    """Return whether a device computes what NumPy does: asked once, of a pattern."""
    torch = sys.modules["torch"]
    pattern = np.arange(100_003, dtype=np.uint64).view(np.uint8)[: 8 * 100_003 - 5] ^ np.uint8(0xA5)
    there = _lanes(torch.from_numpy(pattern).to(device))
    if _digest(_fetched([there])[0], pattern.size) == reference(pattern):
        return True
    log.warning("%s does not compute as others do: its tensors are looked at by copying them", device)
    return False


def _fetched(lanes: Sequence[TorchTensor]) -> list[U8]:
    """Bring lanes of one device over the bus, together."""
    torch = sys.modules["torch"]
    ends = np.cumsum([lane.numel() * 8 for lane in lanes])
    return np.split(fetch(torch.cat(list(lanes)).reshape(-1).view(torch.uint8)), ends[:-1])


def reference(data: U8) -> bytes:
    """Return the imprint of bytes in memory: slow, and what every device must equal.

    Examples
    --------
    >>> reference(np.arange(100, dtype=np.uint8)).hex()
    'ee162b40988dc9e241171e3c2125f600'
    """
    lanes = []
    for start in range(0, data.size, _BLOCK_SIZE):
        block = data[start : start + _BLOCK_SIZE]
        words = np.zeros(-(-block.size // 8), "<i8")
        words.view(np.uint8)[: block.size] = block
        halves = (words + _keys()[:, : words.size]).view("<i4").reshape(_N_LANES, -1, 2).astype(np.int64)
        lanes.append((halves[..., 0] * halves[..., 1]).sum(axis=1).astype("<i8"))
    return _digest(np.concatenate([*lanes, np.empty(0, "<i8")]).view(np.uint8), data.size)


def _digest(lanes: U8, size: int) -> bytes:
    return xxhash.xxh3_128_digest(lanes.tobytes() + size.to_bytes(8, "little"))


def _lanes(raw: TorchTensor) -> TorchTensor:
    """Return the lanes of each block, int64 of shape (n, 2), on the tensor's device."""
    torch = sys.modules["torch"]
    n_blocks = -(-raw.numel() // _BLOCK_SIZE)
    lanes = torch.empty((n_blocks, _N_LANES), dtype=torch.int64, device=raw.device)
    keys = _keys_on(str(raw.device))
    for i in range(n_blocks):
        words = _words(raw[i * _BLOCK_SIZE : (i + 1) * _BLOCK_SIZE])
        halves = (words + keys[:, : words.numel()]).view(torch.int32).view(_N_LANES, -1, 2)
        product = halves[..., 0].to(torch.int64)
        product *= halves[..., 1]
        torch.sum(product, dim=1, out=lanes[i])
    return lanes


def _words(block: TorchTensor) -> TorchTensor:
    """Return bytes as words of 8; of a copy, unless they are whole words where words can lie."""
    torch = sys.modules["torch"]
    size = -(-block.numel() // 8) * 8
    if size != block.numel() or block.storage_offset() % 8:
        copy = torch.zeros(size, dtype=torch.uint8, device=block.device)
        copy[: block.numel()] = block
        block = copy
    return block.view(torch.int64)


@functools.cache
def _keys() -> I64:
    """Return each lane's keys, by place: SplitMix64 (Steele et al., OOPSLA 2014), which starts at 0."""
    n = _BLOCK_SIZE // 8
    with np.errstate(over="ignore"):
        z = np.arange(1, _N_LANES * n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z.view(np.int64).reshape(_N_LANES, n)


@functools.cache
def _keys_on(device: str) -> TorchTensor:
    return sys.modules["torch"].from_numpy(_keys()).to(device)
