"""Codecs, deltackpt's and others', behind one small interface: a class of tensors in, payloads, and back.

Owns   how every codec is called, and what it is given: chunks, one buffer, or a file.
Never  measures, and never lets a codec use more than one thread.
"""

from __future__ import annotations

import importlib
import subprocess
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pairs import Pair, as_bytes
from peers import Tool
from safetensors.torch import save

from deltackpt import codecs, differences

CHUNK_SIZE = 256 << 10
#: As many bytes as a session hands to a worker at once.
BATCH_SIZE = 1 << 20
#: As many chunks as a load decodes together: payloads and bytes of 8 MiB.
N_DECODED = 20

Bytes = NDArray[np.uint8]


class Coder(Tool):
    """A codec with a pair of states at hand; `at` is an empty folder."""

    def __init__(self, pair: Pair, at: Path):
        self.pair, self.at = pair, at
        self.library: Any = importlib.import_module(self.module) if self.module else None  # not timed

    def prepare(self) -> None:
        """Before every `encode`, not timed."""

    @abstractmethod
    def encode(self) -> Any:
        """Return the payloads of the new state."""

    @abstractmethod
    def decode(self, payloads: Any) -> Any:
        """Return the new state's bytes, or something that `is_same` understands."""

    def stored_size(self, payloads: Any) -> int:
        return len(payloads)

    def is_same(self, decoded: Any) -> bool:
        """Whether every bit came back."""
        return np.array_equal(np.frombuffer(decoded, np.uint8), self.pair.new_bytes)


# ---------------------------------------------------------------- deltackpt


class Chosen(Coder):
    """What a save does: the mode of a tensor by trying its middle chunk, then codec by codec a chunk."""

    name, install, module = "deltackpt", "pip install .", "deltackpt"

    def __init__(self, pair: Pair, at: Path):
        super().__init__(pair, at)
        kind = codecs.Kind(pair.itemsize, True)
        self.tensors = [
            [
                codecs.Chunk(new, kind, np.empty(codecs.room(new.size), np.uint8), codecs.Base(old))
                for new, old in zip(chunks(as_bytes(tensor)), chunks(as_bytes(pair.old[name])), strict=True)
            ]
            for name, tensor in pair.new.items()
        ]
        self.out = np.zeros(pair.new_bytes.size, np.uint8)

    def modes(self, tensor: list[codecs.Chunk]) -> list[codecs.Chunk]:
        """Say of every chunk of a tensor how it is encoded."""
        mode = codecs.best_mode(tensor[len(tensor) // 2])
        return [chunk._replace(mode=mode) for chunk in tensor]

    def batches(self) -> Iterator[list[codecs.Chunk]]:
        batch: list[codecs.Chunk] = []
        for tensor in self.tensors:
            for chunk in self.modes(tensor):
                batch.append(chunk)
                if sum(c.data.size for c in batch) >= BATCH_SIZE:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def encode(self) -> list[codecs.Encoded]:
        return [encoded for batch in self.batches() for encoded in codecs.encode_all(batch)]

    def decode(self, payloads: list[codecs.Encoded]) -> Bytes:
        """Decode as a load does: what needs no base of many chunks together, then the rest."""
        offset = 0
        whole = [chunk for tensor in self.tensors for chunk in tensor]
        for first in range(0, len(whole), N_DECODED):
            packed, outs, bases = [], [], []
            for chunk, (number, payload) in zip(
                whole[first : first + N_DECODED], payloads[first : first + N_DECODED], strict=True
            ):
                size, stored = chunk.data.size, np.frombuffer(payload, np.uint8)
                packed.append(codecs.Packed(number, stored, chunk.kind.itemsize, size, self.pair.case))
                outs.append(self.out[offset : offset + size])
                bases.append(chunk.base.data if number in codecs.DELTAS and chunk.base is not None else None)
                offset += size
            jobs = zip(packed, codecs.unpack(packed), outs, bases, strict=True)
            codecs.join_all([codecs.Job(*job) for job in jobs])
        return self.out

    def sizes(self, payloads: list[codecs.Encoded]) -> NDArray[np.int64]:
        """Bytes of each chunk."""
        return np.array([len(encoded.payload) for encoded in payloads])

    def stored_size(self, payloads: list[codecs.Encoded]) -> int:
        return int(self.sizes(payloads).sum())


def chunks(data: Bytes) -> list[Bytes]:
    return [data[start : start + CHUNK_SIZE] for start in range(0, data.size, CHUNK_SIZE)]


class Whole(Chosen):
    """Every chunk without its base."""

    name = "whole"

    def modes(self, tensor: list[codecs.Chunk]) -> list[codecs.Chunk]:
        return [chunk._replace(mode=codecs.WHOLE) for chunk in tensor]


class Sub(Chosen):
    """Every chunk as a difference of integers in the order of the floats, its base scaled as fits it best.

    The choice of the scale is not timed.
    """

    name, map = "sub", "SUB"

    def __init__(self, pair: Pair, at: Path):
        super().__init__(pair, at)
        self.tensors = [[chunk._replace(mode=self.mode(chunk)) for chunk in t] for t in self.tensors]

    def mode(self, chunk: codecs.Chunk) -> codecs.Mode:
        scale = codecs.encoder.fit_scale(chunk.data, chunk.base.data, chunk.kind.itemsize)
        return codecs.Mode(getattr(differences, self.map), scale)

    def modes(self, tensor: list[codecs.Chunk]) -> list[codecs.Chunk]:
        return tensor


class Rsub(Sub):
    """The same with the sign in the lowest bit."""

    name, map = "rsub", "RSUB"


# ---------------------------------------------------------------- others


class Zstd(Coder):
    """Of the bytes as they are, all tensors of the class in one buffer."""

    name, install, module = "zstd -3", "pip install zstandard", "zstandard"

    def encode(self) -> bytes:
        return self.library.ZstdCompressor(level=3).compress(self.pair.new_bytes)

    def decode(self, payloads: bytes) -> bytes:
        return self.library.ZstdDecompressor().decompress(payloads)


class ZstdPatch(Coder):
    """The program, from file to file: the Python binding's dictionaries find a third less."""

    name, install, program = "zstd --patch-from", "apt-get install zstd", "zstd"

    def __init__(self, pair: Pair, at: Path):
        super().__init__(pair, at)
        self.old, self.new, self.patch, self.back = (at / name for name in ("old", "new", "patch", "back"))
        self.old.write_bytes(pair.old_bytes)
        self.new.write_bytes(pair.new_bytes)

    def encode(self) -> int:
        self.run("-3", self.new, self.patch)
        return self.patch.stat().st_size

    def decode(self, payloads: int) -> Path:
        self.run("-d", self.patch, self.back)
        return self.back

    def run(self, what: str, source: Path, target: Path) -> None:
        options = ["-q", "-f", "--single-thread", "--long=31", f"--patch-from={self.old}"]
        subprocess.run([self.program, what, *options, source, "-o", target], check=True, capture_output=True)

    def stored_size(self, payloads: int) -> int:
        return payloads

    def is_same(self, decoded: Path) -> bool:
        return super().is_same(decoded.read_bytes())


class Zipnn(Coder):
    """Its delta mode, an XOR of one buffer; it gets copies, since it turns the bits of what it is given."""

    name, install, module = "zipnn delta", "pip install zipnn", "zipnn"

    def __init__(self, pair: Pair, at: Path):
        super().__init__(pair, at)
        dtype = pair.to_json()["dtype"]
        self.packer = self.library.ZipNN(
            input_format="byte", bytearray_dtype=dtype, delta_compressed_type="byte", threads=1
        )

    def prepare(self) -> None:
        self.new, self.old = self.pair.new_bytes.tobytes(), self.pair.old_bytes.tobytes()

    def encode(self) -> bytes:
        return self.packer.compress(self.new, delta_second_data=self.old)

    def decode(self, payloads: bytes) -> bytes:
        return self.packer.decompress(payloads, delta_second_data=self.pair.old_bytes.tobytes())


class Z4ai(Coder):
    """`model_delta` of two safetensors files in memory, one thread."""

    name, install, module = "z4ai", "pip install z4ai", "z4ai"

    def __init__(self, pair: Pair, at: Path):
        super().__init__(pair, at)
        self.model_delta: Any = importlib.import_module("z4ai.model_delta")
        self.old, self.new = save(pair.old), save(pair.new)

    def encode(self) -> bytes:
        return self.model_delta.compress(self.new, self.old, threads=1)

    def decode(self, payloads: bytes) -> bytes:
        return self.model_delta.decompress(payloads, self.old)

    def is_same(self, decoded: bytes) -> bool:
        return decoded == self.new


class Blosc(Coder):
    """Bit shuffle and zstd at its own default level, all tensors in one buffer."""

    name, install, module = "blosc2", "pip install blosc2", "blosc2"

    def encode(self) -> bytes:
        return self.library.compress2(
            self.pair.new_bytes,
            codec=self.library.Codec.ZSTD,
            filters=[self.library.Filter.BITSHUFFLE],
            typesize=self.pair.itemsize,
            nthreads=1,
        )

    def decode(self, payloads: bytes) -> bytes:
        return self.library.decompress2(payloads, nthreads=1)


class Pcodec(Coder):
    """Of the numbers as they are; bf16, which it does not know, as integers in the order of the floats."""

    name, install, module = "pcodec", "pip install pcodec", "pcodec"

    def __init__(self, pair: Pair, at: Path):
        super().__init__(pair, at)
        self.numbers = self.numbers_of(pair)
        self.out = np.zeros_like(self.numbers)

    def numbers_of(self, pair: Pair) -> NDArray[Any]:
        return pair.new_bytes.view("<f4") if pair.itemsize == 4 else ordered(pair.new_bytes, pair.itemsize)

    def config(self) -> Any:
        return self.library.ChunkConfig()

    def encode(self) -> bytes:
        return self.library.standalone.simple_compress(self.numbers, self.config())

    def decode(self, payloads: bytes) -> NDArray[Any]:
        self.library.standalone.simple_decompress_into(payloads, self.out)
        return self.out

    def is_same(self, decoded: NDArray[Any]) -> bool:
        return np.array_equal(decoded.view(np.uint8), self.numbers.view(np.uint8))


class PcodecDelta(Pcodec):
    """Of the differences to the old state that deltackpt makes too; making and undoing them is not timed."""

    name = "pcodec of deltas"

    def numbers_of(self, pair: Pair) -> NDArray[Any]:
        change = ordered(pair.new_bytes, pair.itemsize) - ordered(pair.old_bytes, pair.itemsize)
        signed = change.view(f"<i{pair.itemsize}")
        return ((signed << 1) ^ (signed >> (8 * pair.itemsize - 1))).view(change.dtype)

    def config(self) -> Any:
        return self.library.ChunkConfig(delta_spec=self.library.DeltaSpec.no_op())


def ordered(data: Bytes, itemsize: int) -> NDArray[Any]:
    """Floats as unsigned integers of the same order."""
    bits = data.view(f"<u{itemsize}")
    sign = bits.dtype.type(1 << (8 * itemsize - 1))
    return np.where(bits & sign, ~bits, bits | sign)


OURS: dict[str, type[Chosen]] = {kind.name: kind for kind in (Chosen, Whole, Sub, Rsub)}
CODERS: dict[str, type[Coder]] = {
    **OURS,
    **{kind.name: kind for kind in (Zstd, ZstdPatch, Zipnn, Z4ai, Blosc, Pcodec, PcodecDelta)},
}
