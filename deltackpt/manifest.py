"""A manifest: what one snapshot holds.  And list chunks: which chunks one tensor holds.

Owns   both, as values and as bytes.
Never  opens a file, or looks a chunk up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard
from blake3 import blake3

from deltackpt.errors import CorruptError, FormatError
from deltackpt.format import (
    CHUNK_ID_SIZE,
    CHUNK_SIZE_MAX,
    LIST_HEADER,
    LIST_LEVEL_MAX,
    LIST_MAGIC,
    LIST_ROW,
    LIST_ROWS_MAX,
    MANIFEST_HEADER,
    MANIFEST_SIZE_MAX,
    VERSION,
    check_features,
    check_version,
    dump_json,
    load_json,
)
from deltackpt.types import DTYPE_SIZES, U8, Framework

_FINGERPRINT_SIZE = 16


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A tensor as a manifest lists it.

    Parameters
    ----------
    name, dtype, shape, framework
        As in `types.Tensor`.
    size : int
        Bytes.
    level : int
        0: `root` is the one chunk; 1: a list of chunks; 2: a list of lists; ...
    root : bytes
        Chunk id; empty when `size` is 0.
    fingerprint : bytes
        xxh3_128 of all the tensor's bytes: tells the next save which cuts to try, and no more.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    framework: Framework
    size: int
    level: int
    root: bytes
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """The structure of a state, with small values in it, and its tensors' rows."""

    structure: Any
    tensors: list[TensorRow]

    def to_bytes(self) -> bytes:
        """Return the manifest file's bytes."""
        rows = self.tensors
        body = dump_json(
            {
                "features": [],
                "tensors": {
                    "name": [r.name for r in rows],
                    "dtype": [r.dtype for r in rows],
                    "shape": [r.shape for r in rows],
                    "framework": [r.framework for r in rows],
                    "size": [r.size for r in rows],
                    "level": [r.level for r in rows],
                    "root": [r.root.hex() for r in rows],
                    "fingerprint": [r.fingerprint.hex() for r in rows],
                },
                "structure": self.structure,
            }
        )
        if len(body) > MANIFEST_SIZE_MAX:
            raise FormatError(f"manifest has {len(body)} bytes, at most {MANIFEST_SIZE_MAX} allowed")
        frame = zstandard.ZstdCompressor(level=3).compress(body)
        return (
            MANIFEST_HEADER.pack(VERSION, 0, len(body), len(frame), xxhash.xxh3_64_intdigest(frame)) + frame
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Parse a manifest.

        Raises
        ------
        CorruptError
            If any byte is not as written, or a row is impossible.
        UnsupportedVersionError
            If a newer deltackpt wrote it.
        """
        body = load_json(_unpack(data, where), where)
        if not isinstance(body, dict) or not isinstance(body.get("tensors"), dict) or "structure" not in body:
            raise CorruptError(f"{where}: manifest lacks its tensors or its structure")
        check_features(body.get("features"), where)
        columns = [body["tensors"].get(c) for c in TensorRow.__slots__]
        if any(not isinstance(c, list) or len(c) != len(columns[0]) for c in columns):
            raise CorruptError(f"{where}: tensor columns are missing or of different lengths")
        rows = [_row(values, f"{where}: tensor {i}") for i, values in enumerate(zip(*columns, strict=True))]
        return cls(body["structure"], rows)


def _unpack(data: bytes, where: str) -> bytes:
    version, flags, raw_size, stored_size, check = MANIFEST_HEADER.unpack(data, where)
    check_version(version, flags, where)
    frame = memoryview(data)[MANIFEST_HEADER.size :]
    if len(frame) != stored_size or xxhash.xxh3_64_intdigest(frame) != check:
        raise CorruptError(f"{where}: manifest of {len(data)} bytes fails its checksum")
    if raw_size > MANIFEST_SIZE_MAX:
        raise CorruptError(f"{where}: manifest claims {raw_size} bytes, at most {MANIFEST_SIZE_MAX} allowed")
    try:
        parameters = zstandard.get_frame_parameters(frame)
        if parameters.content_size != raw_size:
            raise CorruptError(f"{where}: frame of {parameters.content_size} bytes, header says {raw_size}")
        return zstandard.ZstdDecompressor().decompress(frame)
    except zstandard.ZstdError as e:
        raise CorruptError(f"{where}: manifest does not decompress: {e}") from e


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 50


def _row(values: tuple[Any, ...], where: str) -> TensorRow:
    name, dtype, shape, framework, size, level, root, fingerprint = values
    if not isinstance(name, str) or not isinstance(dtype, str) or framework not in ("numpy", "torch"):
        raise CorruptError(f"{where}: name {name!r}, dtype {dtype!r}, framework {framework!r}")
    if dtype not in DTYPE_SIZES:
        raise CorruptError(f"{where} ({name}): dtype {dtype!r} is not one of {sorted(DTYPE_SIZES)}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)) or not _is_size(size):
        raise CorruptError(f"{where} ({name}): shape {shape!r}, size {size!r}")
    n = 0 if 0 in shape else DTYPE_SIZES[dtype]
    for length in shape:
        n *= length
        if n > size:  # enough seen: a product of a million large numbers takes hours
            break
    if n != size or not _is_size(level) or level > (LIST_LEVEL_MAX if size else 0):
        raise CorruptError(
            f"{where} ({name}): {dtype} of shape {shape!r:.200}, size is {size}, level {level}"
        )
    if size > CHUNK_SIZE_MAX * LIST_ROWS_MAX**level:
        raise CorruptError(f"{where} ({name}): {size} bytes are more than level {level} can hold")
    try:
        ids = bytes.fromhex(root), bytes.fromhex(fingerprint)
    except (TypeError, ValueError):
        ids = b"", b""
    if len(ids[0]) != (CHUNK_ID_SIZE if size else 0) or len(ids[1]) != _FINGERPRINT_SIZE:
        raise CorruptError(f"{where} ({name}): root {root!r}, fingerprint {fingerprint!r}")
    return TensorRow(name, dtype, tuple(shape), framework, size, level, *ids)


def build_lists(ids: U8, sizes: npt.NDArray[np.int64]) -> tuple[int, list[list[bytes]]]:
    """Return the list chunks over a tensor's chunks, lowest level first; the last level is the root.

    Parameters
    ----------
    ids : ndarray of uint8, shape (n, 32), n >= 2
    sizes : ndarray of int64, shape (n,)

    Returns
    -------
    level : int
        Of the root.
    lists : list of list of bytes
        The list chunks of level 1, 2, ...; a list's own id is the BLAKE3 of its bytes.
    """
    levels: list[list[bytes]] = []
    while not levels or len(levels[-1]) > 1:
        level = len(levels) + 1
        lists = []
        for start in range(0, len(ids), LIST_ROWS_MAX):
            rows = np.zeros(min(LIST_ROWS_MAX, len(ids) - start), LIST_ROW)
            rows["id"] = ids[start : start + LIST_ROWS_MAX]
            rows["size"] = sizes[start : start + LIST_ROWS_MAX]
            lists.append(list_to_bytes(level, rows))
        levels.append(lists)
        ids = np.frombuffer(b"".join(blake3(data).digest() for data in lists), np.uint8).reshape(
            -1, CHUNK_ID_SIZE
        )
        sizes = np.array([LIST_HEADER.unpack_from(data)[5] for data in lists], np.int64)
    return len(levels), levels


def list_to_bytes(level: int, rows: npt.NDArray[np.void]) -> bytes:
    """Return a list chunk's bytes."""
    return LIST_HEADER.pack(LIST_MAGIC, level, 0, len(rows), 0, int(rows["size"].sum())) + rows.tobytes()


def list_from_bytes(data: bytes | memoryview | U8, level: int, size: int, where: str) -> npt.NDArray[np.void]:
    """Return a list chunk's rows, checked to be of `level` and to cover `size` tensor bytes."""
    if len(data) < LIST_HEADER.size:
        raise CorruptError(f"{where}: list has {len(data)} bytes, needs {LIST_HEADER.size}")
    magic, found_level, flags, n, _, total = LIST_HEADER.unpack_from(data)
    if magic != LIST_MAGIC or found_level != level or flags:
        raise CorruptError(
            f"{where}: list magic {magic!r} level {found_level} flags {flags}, expected level {level}"
        )
    if not 0 < n <= LIST_ROWS_MAX or len(data) != LIST_HEADER.size + n * LIST_ROW.itemsize or total != size:
        raise CorruptError(
            f"{where}: list of {n} rows and {total} bytes in {len(data)}, expected {size} bytes"
        )
    rows = np.frombuffer(data, LIST_ROW, n, LIST_HEADER.size)
    if int(rows["size"].max()) > size or int(rows["size"].min()) == 0 or int(rows["size"].sum()) != size:
        raise CorruptError(f"{where}: list rows do not add up to {size} bytes")
    return rows
