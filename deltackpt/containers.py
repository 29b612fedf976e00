"""Containers: where the tensors lie in a file of safetensors, torch's zip or npz.

Owns   the spans of a file's bytes that are better kept by themselves: a tensor each, or another large member.
Never  opens a file, decompresses, unpickles, or believes a size: what contradicts itself is bytes like any.

A span is a hint.  Whatever the spans, the bytes between and in them make the file; a container that lies
costs its author's own file some room, and nothing else.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from deltackpt import dtypes
from deltackpt.storages import storages
from deltackpt.types import DTYPE_SIZES, U8

#: safetensors' dtype names (https://github.com/huggingface/safetensors) and ours.
FROM_SAFETENSORS = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
#: The safetensors library's own cap.
HEADER_SIZE_MAX = 100_000_000

#: What is smaller stays between the spans: by itself it would take as much again to be named and found.
SPAN_SIZE_MIN = 256
_GAP_SIZE_MAX = 1 << 20

_END = struct.Struct("<4s4H2IH")  # zip's end of central directory
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")  # of the central directory
_LOCAL = struct.Struct("<4s5H3I2H")
_IN_EXTRA = 0xFFFFFFFF
_NPY_MAGIC = b"\x93NUMPY"


class Span(NamedTuple):
    """Bytes of a file that are kept by themselves.

    Parameters
    ----------
    offset, size : int
    name : str
        Of the tensor or member; not unique.
    dtype : str
        A key of `DTYPE_SIZES` whose size divides `size`.
    """

    offset: int
    size: int
    name: str
    dtype: str


def spans(data: U8) -> list[Span]:
    """Return a file's spans, ascending, none touching another; none if it is no container that is known.

    Parameters
    ----------
    data : ndarray of uint8
        All of the file; may be mapped.

    Examples
    --------
    >>> file = io.BytesIO()
    >>> np.savez(file, w=np.zeros(100, np.float32), b=np.zeros(1))
    >>> [(span.name, span.dtype, span.size) for span in spans(np.frombuffer(file.getvalue(), np.uint8))]
    [('w', 'float32', 400)]
    >>> spans(np.zeros(1000, np.uint8))
    []
    """
    if data[:4].tobytes() == b"PK\x03\x04":
        found = _of_zips(data)
    elif data[8:9].tobytes() == b"{":
        found = _of_safetensors(data)
    else:
        found = []
    kept: list[Span] = []
    end = 0
    for span in sorted(span for span in found if span.size >= SPAN_SIZE_MIN):
        if span.offset < end or span.offset + span.size > data.size:
            return []  # it overlaps another, or leads out of the file
        kept += _between(end, span.offset)
        kept.append(span if span.size % DTYPE_SIZES[span.dtype] == 0 else span._replace(dtype="uint8"))
        end = span.offset + span.size
    return kept + _between(end, data.size) if kept else []


def _between(start: int, stop: int) -> list[Span]:
    """Return what lies between two spans as one, if it is large: the rest of a file is copied to be kept."""
    return [Span(start, stop - start, "between", "uint8")] if stop - start > _GAP_SIZE_MAX else []


# -- safetensors


def _of_safetensors(data: U8) -> list[Span]:
    header_size = int.from_bytes(data[:8].tobytes(), "little")
    if header_size > min(HEADER_SIZE_MAX, data.size - 8):
        return []
    start, found = 8 + header_size, []
    try:
        header = json.loads(data[8:start].tobytes())
        for name, entry in header.items():
            if name != "__metadata__":
                first, stop = entry["data_offsets"]
                if not type(first) is type(stop) is int or not 0 <= first <= stop:
                    return []
                dtype = FROM_SAFETENSORS.get(str(entry["dtype"]), "uint8")
                found.append(Span(start + first, stop - first, name, dtype))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return found


# -- zips


class _Member(NamedTuple):
    """A member's bytes as they lie in the file, and whether they are its content."""

    offset: int
    size: int
    name: str
    is_stored: bool


def _of_zips(data: U8) -> list[Span]:
    """Return the spans of archives one behind another: DCP writes one for every tensor."""
    archives: list[list[_Member]] = []
    end = data.size
    while (found := _archive(data, end)) is not None:
        end, members = found
        archives.append(members)
    archives.reverse()
    found_spans: list[Span] = []
    for i, members in enumerate(archives):
        prefix = f"{i}." if len(archives) > 1 else ""
        found_spans += [span._replace(name=prefix + span.name) for span in _of_members(data, members)]
    return found_spans


def _of_members(data: U8, members: Sequence[_Member]) -> Iterator[Span]:
    kept = {}
    for member in members:
        root, _, name = member.name.partition("/")
        if name == "data.pkl" and member.is_stored:
            kept = {f"{root}/data/{key}": of for key, of in storages(_bytes(data, member)).items()}
            break
    for member in members:
        if member.size < SPAN_SIZE_MIN:
            continue
        if member.name in kept and member.is_stored:
            yield Span(member.offset, member.size, *kept[member.name])
        elif member.name.endswith(".npy") and member.is_stored:
            yield _of_npy(data, member)
        else:
            # torch calls the directory as the file was called, with the step's number in it.
            name = member.name.partition("/")[2] if kept else member.name
            yield Span(member.offset, member.size, name, "uint8")


def _of_npy(data: U8, member: _Member) -> Span:
    head = data[member.offset : member.offset + min(member.size, 1 << 16)].tobytes()
    whole = Span(member.offset, member.size, member.name.removesuffix(".npy"), "uint8")
    if head[:6] != _NPY_MAGIC or head[6:8] not in (b"\1\0", b"\2\0"):
        return whole
    file = io.BytesIO(head[8:])
    read = np.lib.format.read_array_header_1_0 if head[6] == 1 else np.lib.format.read_array_header_2_0
    try:
        dtype = read(file)[2]
        name = dtypes.name_of(dtype)
    except Exception:  # hostile bytes raise anything; NumPy parses the header as a literal
        return whole
    n = 8 + file.tell()
    carrier = dtypes.carrier(name)[0] if name is not None else "uint8"
    return Span(member.offset + n, member.size - n, whole.name, carrier)


def _archive(data: U8, end: int) -> tuple[int, list[_Member]] | None:
    """Return where the archive that ends at a place begins, and its members; None if there is none."""
    at = end - _END.size
    if at < 0:
        return None
    magic, *_, size, offset, comment_size = _END.unpack(data[at:end])
    if magic != b"PK\x05\x06" or comment_size:
        return None
    if at >= _LOCATOR.size + _END64.size:
        place = at - _LOCATOR.size
        if data[place : place + 4].tobytes() == b"PK\x06\x07":
            at = place - _END64.size
            magic, *_, size, offset = _END64.unpack(data[at:place])
            if magic != b"PK\x06\x06":
                return None
    start = at - size - offset
    if start < 0:
        return None
    members = _members(data, start, at - size, at)
    return None if members is None else (start, members)


def _members(data: U8, start: int, first: int, stop: int) -> list[_Member] | None:
    """Read a central directory, from `first` to `stop`, of an archive that begins at `start`."""
    table, at = data[first:stop].tobytes(), 0
    members = []
    while at < len(table):
        if at + _ENTRY.size > len(table):
            return None
        entry = _ENTRY.unpack_from(table, at)
        method, size, full_size, offset = entry[4], entry[8], entry[9], entry[16]
        name_size, extra_size, comment_size = entry[10:13]
        name_at = at + _ENTRY.size
        extra_at = name_at + name_size
        at = extra_at + extra_size + comment_size
        if entry[0] != b"PK\x01\x02" or at > len(table):
            return None
        if _IN_EXTRA in (full_size, size, offset):
            found = _zip64(table[extra_at : extra_at + extra_size], full_size, size, offset)
            if found is None:
                return None
            full_size, size, offset = found
        local_at = start + offset
        if local_at + _LOCAL.size > first:
            return None
        local = _LOCAL.unpack(data[local_at : local_at + _LOCAL.size])
        content_at = local_at + _LOCAL.size + local[9] + local[10]
        if local[0] != b"PK\x03\x04" or content_at + size > first:
            return None
        name = table[name_at:extra_at].decode("utf-8", "backslashreplace")
        members.append(_Member(content_at, size, name, method == 0 and size == full_size))
    # No byte is of two members, or reading their headers takes as long as there are entries that name one.
    overlap = any(a.offset + a.size > b.offset for a, b in pairwise(sorted(members)))
    return None if overlap else members


def _zip64(extra: bytes, full_size: int, size: int, offset: int) -> tuple[int, int, int] | None:
    """Return what a 64-bit extra field says of those numbers that have no room in an entry."""
    at = 0
    while at + 4 <= len(extra):
        tag, n = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            numbers = iter(struct.unpack_from(f"<{n // 8}Q", extra[at + 4 : at + 4 + n]))
            got = [next(numbers, None) if x == _IN_EXTRA else x for x in (full_size, size, offset)]
            a, b, c = got
            return None if a is None or b is None or c is None else (a, b, c)
        at += 4 + n
    return None


def _bytes(data: U8, member: _Member) -> bytes:
    return data[member.offset : member.offset + member.size].tobytes()
