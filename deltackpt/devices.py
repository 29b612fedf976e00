"""Devices: torch tensors in other memory than this process's, and how their bytes come over the bus.

Owns   which tensor is on a device; the pinned buffers and the stream that its bytes come by.
Never  imports torch: where there is a tensor, there is torch.

A copy into memory that is not pinned makes CUDA copy twice, and the caller wait for both.  Here the bus fills
one pinned buffer while the processor empties the other.
"""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any, TypeAlias

import numpy as np

from deltackpt.types import U8

#: A torch.Tensor: no static type covers it without importing torch.
TorchTensor: TypeAlias = Any

#: Of a buffer, of which there are two: 160 us of a bus of 50 GB/s, and some 20 us to have it begin.
_PIECE_SIZE = 8 << 20


def device_of(x: TorchTensor) -> str | None:
    """Return torch's name of the device that a tensor is on; None if its memory is this process's own."""
    return None if x.is_cpu else str(x.device)


def fetch(raw: TorchTensor) -> U8:
    """Return a copy, in this process's memory, of bytes on a device.

    Parameters
    ----------
    raw : torch.Tensor of uint8, shape (size,)
        What is queued on the current stream of its device is done first.
    """
    out = np.empty(raw.numel(), np.uint8)
    bus_of(str(raw.device)).fetch(raw, out)
    return out


@functools.cache
def bus_of(device: str) -> Bus:
    """Return the one way from a device, by torch's name of it; its buffers stay for the next save."""
    return Bus(_CudaBuffers(device) if device.startswith("cuda") else _Buffers(device))


class Bus:
    """Brings bytes from one device.

    Parameters
    ----------
    buffers : _Buffers
        All that is special to a kind of device.

    Attributes
    ----------
    crossed_size : int
        Bytes that came over it so far.
    """

    def __init__(self, buffers: _Buffers) -> None:
        self._buffers = buffers
        self._lock = threading.Lock()
        self.crossed_size = 0

    def fetch(self, raw: TorchTensor, out: U8) -> None:
        """Copy bytes from the device.

        Parameters
        ----------
        raw : torch.Tensor of uint8, shape (size,)
        out : ndarray of uint8, shape (size,)
        """
        with self._lock:
            try:
                self._buffers.begin()
                waiting: list[tuple[int, U8]] = []
                for n, start in enumerate(range(0, out.size, _PIECE_SIZE)):
                    if len(waiting) == 2:
                        self._empty(*waiting.pop(0))
                    piece = out[start : start + _PIECE_SIZE]
                    self._buffers.fill(n % 2, raw[start : start + piece.size])
                    waiting.append((n % 2, piece))
                for which, piece in waiting:
                    self._empty(which, piece)
            finally:
                self._buffers.end()

    def _empty(self, which: int, piece: U8) -> None:
        np.copyto(piece, self._buffers.filled(which, piece.size))
        self.crossed_size += piece.size


class _Buffers:
    """Two buffers in this process's memory, filled by a device: here by plain copies, done once begun."""

    def __init__(self, device: str) -> None:
        self._torch = sys.modules["torch"]
        self._both = [self._new() for _ in range(2)]

    def _new(self) -> TorchTensor:
        return self._torch.empty(_PIECE_SIZE, dtype=self._torch.uint8, device="cpu")

    def begin(self) -> None:
        """Let what is queued on the device come first."""

    def fill(self, which: int, piece: TorchTensor) -> None:
        """Begin to fill a buffer."""
        self._both[which][: piece.numel()].copy_(piece)

    def filled(self, which: int, size: int) -> U8:
        """Return what is in a buffer, once it is there."""
        found: U8 = self._both[which][:size].numpy()
        return found

    def end(self) -> None:
        """Wait for whatever is under way."""


class _CudaBuffers(_Buffers):
    """Pinned, and filled on a stream beside the one that trains."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        cuda = self._torch.cuda
        self._device = self._torch.device(device)
        self._stream = cuda.Stream(self._device)
        self._events = [cuda.Event() for _ in range(2)]

    def _new(self) -> TorchTensor:
        return super()._new().pin_memory()

    def begin(self) -> None:
        self._stream.wait_stream(self._torch.cuda.current_stream(self._device))

    def fill(self, which: int, piece: TorchTensor) -> None:
        with self._torch.cuda.stream(self._stream):
            self._both[which][: piece.numel()].copy_(piece, non_blocking=True)
            self._events[which].record(self._stream)

    def filled(self, which: int, size: int) -> U8:
        self._events[which].synchronize()
        return super().filled(which, size)

    def end(self) -> None:
        self._stream.synchronize()
