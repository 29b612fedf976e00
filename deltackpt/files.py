"""The checkpoint files people already have: safetensors, npz and torch's pt, read and written.

Owns   parsing those containers as untrusted input, and writing them, a tensor at a time.
Never  runs code from a file, knows a store, or leaves a half-written target.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import pickle
import re
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from deltackpt import arrays, dtypes, targets
from deltackpt.containers import FROM_SAFETENSORS, HEADER_SIZE_MAX
from deltackpt.errors import (
    DeltackptError,
    FormatError,
    InvalidInputError,
    MissingDependencyError,
    NotFoundError,
)
from deltackpt.types import DTYPE_SIZES, NOT_IN_NUMPY, NOT_IN_TORCH, U8, Framework, State, Tensor

#: File name extensions that `read_state` knows.
READABLE = (".safetensors", ".npz", ".pt", ".pth", ".bin")

_TO_SAFETENSORS = {ours: theirs for theirs, ours in FROM_SAFETENSORS.items()}

_METADATA = "__metadata__"
_STRUCTURE = "deltackpt"  # key of the safetensors metadata
_STRUCTURE_MEMBER = "deltackpt.json"  # member of an npz

_N_DIMS_MAX = 32  # NumPy 1's cap
_SIZE_MAX = (1 << 63) - 1  # of any tensor, even where another dimension is 0: what NumPy can address
_ZIP_NAME_SIZE_MAX = 65_000  # 65,535 in the zip format, less ".npy" and a margin
_DEFLATE_RATIO_MAX = 1032  # what one byte of a deflate stream can become at most (zlib's technical notes)
_READ_SIZE = 1 << 20


# ---------------------------------------------------------------- reading


def read_state(path: Path) -> State:
    """Read a checkpoint file, whatever its container; nothing in it is executed.

    Parameters
    ----------
    path : Path
        A ``.safetensors``, ``.npz``, ``.pt``, ``.pth`` or ``.bin`` file.

    Returns
    -------
    State
        For safetensors a flat dict of name to `Tensor` over a memory map of the file: nothing is copied,
        and the file must not be truncated while they live. For npz a flat dict of arrays. For torch's
        files whatever was saved.

    Raises
    ------
    NotFoundError
        If there is no such file.
    InvalidInputError
        If the extension is unknown, or the file holds objects that only unpickling would bring back.
    FormatError
        If the bytes are not what the extension says, or contradict themselves.
    MissingDependencyError
        If the file needs torch and torch is not installed.

    Examples
    --------
    >>> read_state(Path("model.safetensors"))["wte.weight"].shape  # doctest: +SKIP
    (50257, 768)
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        raise _unknown_suffix(path, READABLE)
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file", hint="check the path")
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix == ".npz":
        return _read_npz(path)
    return _read_pt(path)


def _unknown_suffix(path: Path, known: Sequence[str]) -> InvalidInputError:
    return InvalidInputError(
        f"{path}: extension {path.suffix!r} is no known container", hint=f"use one of {', '.join(known)}"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with targets.storage_errors(path), path.open("rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        if file_size < 8:
            raise FormatError(f"{path}: file has {file_size} bytes, a safetensors file has at least 8")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content: U8 = np.frombuffer(mapped, np.uint8)
    header_size = int.from_bytes(mapped[:8], "little")
    if header_size > min(HEADER_SIZE_MAX, content.size - 8):
        raise FormatError(
            f"{path}: header size is {header_size}, "
            f"expected at most {min(HEADER_SIZE_MAX, content.size - 8)} in a file of {content.size} bytes"
        )
    header = _parse_json_object(mapped[8 : 8 + header_size], where=str(path))
    header.pop(_METADATA, None)
    data = content[8 + header_size :]
    entries = {name: _Entry.parse(entry, f"{path}: tensor {name!r:.200}") for name, entry in header.items()}
    _check_tiling(entries, data.size, path)
    return {name: entry.to_tensor(name, data) for name, entry in entries.items()}


def _parse_json_object(raw: bytes, *, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise FormatError(f"{where}: header is a JSON {type(header).__name__}, expected an object")
    return header


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor's line in a safetensors header, checked against itself."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def parse(cls, entry: object, where: str) -> _Entry:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise FormatError(f"{where}: entry needs exactly dtype, shape and data_offsets")
        dtype = FROM_SAFETENSORS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise FormatError(
                f"{where}: dtype is {entry['dtype']!r:.80}, expected one of {', '.join(FROM_SAFETENSORS)}"
            )
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not isinstance(shape, list) or not _is_shape(shape):
            raise FormatError(f"{where}: shape is {shape!r:.80}, expected at most {_N_DIMS_MAX} counts")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
            raise FormatError(f"{where}: data_offsets are {offsets!r:.80}, expected a pair of counts")
        size = math.prod(shape) * DTYPE_SIZES[dtype]
        if offsets[1] - offsets[0] != size:
            raise FormatError(f"{where}: data_offsets are {offsets}, but dtype and shape make {size} bytes")
        return cls(dtype, tuple(shape), *offsets)

    def to_tensor(self, name: str, data: U8) -> Tensor:
        framework: Framework = "torch" if self.dtype in NOT_IN_NUMPY else "numpy"
        return Tensor(name, self.dtype, self.shape, framework, data[self.start : self.stop])


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _SIZE_MAX  # a bool is no count


def _is_shape(shape: Sequence[object]) -> bool:
    if len(shape) > _N_DIMS_MAX or not all(map(_is_count, shape)):
        return False
    return math.prod(n or 1 for n in shape) * max(DTYPE_SIZES.values()) <= _SIZE_MAX  # type: ignore[misc]


def _check_tiling(entries: dict[str, _Entry], data_size: int, path: Path) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise FormatError(
                f"{path}: tensor {name!r:.200} starts at {entry.start}, expected {end}: overlap or hole"
            )
        end = entry.stop
    if end != data_size:
        last = max(entries, key=lambda name: entries[name].stop, default=None)
        raise FormatError(
            f"{path}: tensors end at {end} (last {last!r:.200}), the file holds {data_size} bytes of data"
        )


def _read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with _zip_errors(path, "npz"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_members(members, path)
        return {
            member.filename.removesuffix(".npy"): _read_member(archive, member, path)
            for member in members
            if member.filename != _STRUCTURE_MEMBER
        }


@contextmanager
def _zip_errors(path: Path, kind: str) -> Iterator[None]:
    with targets.storage_errors(path):
        try:
            yield
        # RuntimeError: an encrypted member. NotImplementedError: a zip feature that zipfile has not.
        # UnicodeDecodeError: a name in front of a member that is none.
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            RuntimeError,
            NotImplementedError,
            UnicodeDecodeError,
        ) as error:
            raise FormatError(f"{path}: not a readable {kind}: {error}") from error
        except OSError as error:
            if isinstance(error, DeltackptError) or error.errno != errno.EINVAL:
                raise
            # zipfile seeks where a damaged directory sends it, before the file's start too.
            raise FormatError(f"{path}: not a readable {kind}: its directory points outside of it") from error


def _check_members(members: list[zipfile.ZipInfo], path: Path) -> None:
    """Refuse names that collide, and sizes that the file cannot hold, before anything is allocated."""
    if len({member.filename for member in members}) != len(members):
        raise FormatError(f"{path}: two members have the same name")
    for member in members:
        where = f"{path}: member {member.filename!r}"
        if not member.filename.endswith(".npy") and member.filename != _STRUCTURE_MEMBER:
            raise InvalidInputError(f"{where} is no array", hint="save with numpy.savez")
        ratio_max = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _DEFLATE_RATIO_MAX}.get(
            member.compress_type
        )
        if ratio_max is None:
            raise FormatError(f"{where}: compression method is {member.compress_type}, expected 0 or 8")
        if member.file_size > member.compress_size * ratio_max:
            raise FormatError(
                f"{where}: {member.compress_size} stored bytes cannot make {member.file_size}, as declared"
            )
    _check_room(members, path)


def _check_room(members: list[zipfile.ZipInfo], path: Path) -> None:
    stored_size, file_size = sum(member.compress_size for member in members), path.stat().st_size
    if any(member.header_offset >= file_size for member in members):
        raise FormatError(f"{path}: a member lies beyond its {file_size} bytes")
    if stored_size > file_size:  # also true of members that share their bytes, as a zip bomb's do
        raise FormatError(f"{path}: members take {stored_size} bytes, the file has {file_size}")


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> np.ndarray[Any, Any]:
    where = f"{path}: member {member.filename!r}"
    with archive.open(member) as file:
        try:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            elif version == (2, 0):
                shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
            else:  # 3.0 exists for field names of structured arrays, which are refused below anyway
                raise FormatError(f"{where}: npy version is {version}, expected 1.0 or 2.0")
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise FormatError(f"{where}: not an npy header: {error}") from error
        if dtypes.name_of(dtype) is None:
            raise InvalidInputError(
                f"{where}: dtype is {dtype}, expected numbers",
                hint="load it yourself and save it as a plain array",
            )
        size, left_size = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        if size != left_size or not _is_shape(shape):
            raise FormatError(
                f"{where}: shape {shape} of {dtype} makes {size} bytes, the member has {left_size}"
            )
        data = np.empty(size, np.uint8)
        _read_exactly(file, data, where)
    return data.view(dtype).reshape(shape, order="F" if fortran_order else "C")


def _read_exactly(file: IO[bytes], into: U8, where: str) -> None:
    got = 0
    while got < into.size:
        block = file.read(min(_READ_SIZE, into.size - got))
        if not block:
            raise FormatError(f"{where}: ends after {got} bytes, expected {into.size}")
        into[got : got + len(block)] = np.frombuffer(block, np.uint8)
        got += len(block)
    if file.read(1):  # reading on to the end also checks the member's CRC
        raise FormatError(f"{where}: has more than the {into.size} bytes expected")


def _read_pt(path: Path) -> State:
    torch = _import_torch(path)
    with targets.storage_errors(path), path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # torch before 1.6 wrote a stream, which cannot be mapped
    if is_zip:
        _check_pt(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise InvalidInputError(
            f"{path}: torch will not load it without running code from it: {_first_line(error)}",
            hint="if you trust the file, torch.load it yourself and save its tensors and plain values",
        ) from error
    except Exception as error:  # hostile bytes raise anything from KeyError to RuntimeError
        raise FormatError(
            f"{path}: torch cannot read it: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _check_pt(path: Path) -> None:
    """Refuse a zip whose members are not simply in it: torch makes room for whatever they say they become."""
    with _zip_errors(path, "pt"), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise FormatError(f"{path}: member {member.filename!r} is compressed, torch compresses none")
        _check_room(archive.infolist(), path)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            f"{path}: torch is needed for a {path.suffix} file", hint="pip install 'deltackpt[torch]'"
        ) from error
    # Before 2.6 a crafted file got code past weights_only (CVE-2025-32434).
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise MissingDependencyError(
            f"{path}: torch is {torch.__version__}, at least 2.6 is needed",
            hint="pip install -U 'torch>=2.6'",
        )
    return torch


# ---------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one tensor of a file to be written is, without its bytes.

    Parameters
    ----------
    name : str
        Unique in the file.
    dtype : str
        As `dtypes` writes it down.
    shape : tuple of int
        ``()`` for a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * dtypes.itemsize(self.dtype)


class Output(ABC):
    """A file being written: asked for a tensor's buffer, told when it is full.

    Buffers may be filled, and `buffer` and `done` called, from several threads at once. Each tensor takes
    one `buffer`, then one `done`.
    """

    @abstractmethod
    def buffer(self, name: str) -> U8:
        """Give the writable bytes of tensor `name`, shape ``(size,)``, to be filled before `done`."""

    @abstractmethod
    def done(self, name: str) -> None:
        """Take note that the buffer of `name` is full; it must not be touched any more."""


@contextmanager
def create_file(path: Path, specs: Sequence[TensorSpec], structure: str | None = None) -> Iterator[Output]:
    """Write a ``.safetensors`` or ``.npz`` file one tensor at a time, and put it in place at the end.

    The bytes go to a hidden file beside `path`. When the block ends well that file is synced and renamed
    over `path`; when it raises, it is removed and `path` is as it was.

    Parameters
    ----------
    path : Path
        Its extension chooses the container; its directory must exist.
    specs : sequence of TensorSpec
        Every tensor of the file, in file order.
    structure : str, optional
        A JSON text kept beside the tensors: metadata ``deltackpt`` of a safetensors file, member
        ``deltackpt.json`` of an npz.

    Yields
    ------
    Output
        For safetensors its buffers are slices of the mapped file, so nothing is held in memory; for npz
        a buffer is memory until `Output.done`.

    Raises
    ------
    InvalidInputError
        If the container cannot hold a dtype or a name, or a tensor was never filled.
    NotFoundError
        If the directory does not exist.
    StorageError
        If the disk fails or is full.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "ones.npz"
    >>> with create_file(path, [TensorSpec("x", "uint8", (3,))]) as out:
    ...     out.buffer("x")[:] = 1
    ...     out.done("x")
    >>> np.load(path)["x"]
    array([1, 1, 1], dtype=uint8)
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".npz"):
        raise _unknown_suffix(path, (".safetensors", ".npz"))
    _check_specs(path, specs)
    with targets.replacing(path) as file:
        out: _SafetensorsOutput | _NpzOutput
        with targets.storage_errors(path):
            if suffix == ".safetensors":
                out = _SafetensorsOutput(file, specs, structure)
            else:
                out = _NpzOutput(file, specs, structure)
        try:
            yield out
        finally:
            with targets.storage_errors(path):
                out.close()
        if out.missing:
            raise InvalidInputError(f"{path}: tensor {min(out.missing)!r} was never filled")


def _check_specs(path: Path, specs: Sequence[TensorSpec]) -> None:
    is_held = _TO_SAFETENSORS.__contains__ if path.suffix.lower() == ".safetensors" else _is_npz_dtype
    seen: set[str] = set()
    for spec in specs:
        where = f"{path}: tensor {spec.name!r}"
        if not is_held(spec.dtype):
            hint = "write .safetensors" if spec.dtype in _TO_SAFETENSORS else "write .npz or .pt"
            raise InvalidInputError(f"{where} is {spec.dtype}, which {path.suffix} cannot hold", hint=hint)
        if spec.name in seen:
            raise InvalidInputError(f"{where} is there twice")
        if not _is_writable_name(spec.name) or (path.suffix.lower() == ".npz" and _leads_out(spec.name)):
            raise InvalidInputError(f"{where}: a {path.suffix} file cannot hold this name", hint="rename it")
        seen.add(spec.name)


def _is_npz_dtype(dtype: str) -> bool:
    return dtype not in NOT_IN_NUMPY


def _is_writable_name(name: str) -> bool:
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return name != _METADATA and "\0" not in name and size <= _ZIP_NAME_SIZE_MAX


def _leads_out(name: str) -> bool:
    """Whether a zip's member of this name would land outside of the directory that it is taken out to."""
    return name.startswith("/") or ".." in re.split(r"[/\\]", name)


class _SafetensorsOutput(Output):
    def __init__(self, file: BinaryIO, specs: Sequence[TensorSpec], structure: str | None) -> None:
        header: dict[str, object] = {} if structure is None else {_METADATA: {_STRUCTURE: structure}}
        offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for spec in specs:
            offsets[spec.name] = (end, end + spec.size)
            end += spec.size
            header[spec.name] = {
                "dtype": _TO_SAFETENSORS[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": list(offsets[spec.name]),
            }
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        raw += b" " * (-len(raw) % 8)
        if len(raw) > HEADER_SIZE_MAX:
            raise InvalidInputError(
                f"safetensors header takes {len(raw)} bytes, the limit is {HEADER_SIZE_MAX}"
            )
        targets.reserve(file.fileno(), 8 + len(raw) + end)
        self._mapped = mmap.mmap(file.fileno(), 8 + len(raw) + end)
        self._mapped[: 8 + len(raw)] = len(raw).to_bytes(8, "little") + raw
        self._data: U8 = np.frombuffer(self._mapped, np.uint8)[8 + len(raw) :]
        self._offsets = offsets
        self.missing = set(offsets)

    def buffer(self, name: str) -> U8:
        start, stop = self._offsets[name]
        return self._data[start:stop]

    def done(self, name: str) -> None:
        self.missing.remove(name)

    def close(self) -> None:
        if not self.missing:  # an unfinished file is about to be removed
            self._mapped.flush()


class _NpzOutput(Output):
    def __init__(self, file: BinaryIO, specs: Sequence[TensorSpec], structure: str | None) -> None:
        self._archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        self._specs = {spec.name: spec for spec in specs}
        self._buffers: dict[str, U8] = {}
        self._writing = threading.Lock()
        self.missing = set(self._specs)
        if structure is not None:
            self._archive.writestr(_zip_info(_STRUCTURE_MEMBER), structure)

    def buffer(self, name: str) -> U8:
        self._buffers[name] = np.empty(self._specs[name].size, np.uint8)
        return self._buffers[name]

    def done(self, name: str) -> None:
        spec, data = self._specs[name], self._buffers.pop(name)
        descr = np.lib.format.dtype_to_descr(dtypes.numpy_dtype(spec.dtype))
        header = {"descr": descr, "fortran_order": False, "shape": spec.shape}
        with self._writing, targets.storage_errors(Path(f"{name}.npy")):
            with self._archive.open(_zip_info(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                member.write(data.data)
            self.missing.remove(name)

    def close(self) -> None:
        self._archive.close()


def _zip_info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)  # its date is 1980, always: the same state makes the same file
    info.external_attr = 0o644 << 16
    return info


def write_pt(path: Path, state: State) -> None:
    """Write `state` as a torch file that ``torch.load(path, weights_only=True)`` reads.

    NumPy arrays and scalars become torch tensors, because the pickle of an array is not among what
    ``weights_only`` lets in.

    Parameters
    ----------
    path : Path
        Put in place atomically; its directory must exist.
    state : State
        The whole of it, in memory.

    Raises
    ------
    MissingDependencyError
        If torch is not installed.
    NotFoundError
        If the directory does not exist.
    StorageError
        If the disk fails or is full.
    """
    path = Path(path)
    torch = _import_torch(path)
    with targets.replacing(path) as file, targets.storage_errors(path):
        torch.save(_to_torch(state, path), file)


def _to_torch(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _to_torch(item, path) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_torch(item, path) for item in value)
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        if array.dtype.kind in "iufc":
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
        dtype = dtypes.name_of(array.dtype)
        if dtype not in DTYPE_SIZES or dtype in NOT_IN_TORCH:
            raise InvalidInputError(f"{path}: torch has no dtype {dtype or array.dtype}", hint="write .npz")
        return arrays.as_torch(array, dtype)
    return value
