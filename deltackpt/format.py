"""The bytes on disk: every magic, layout, name and version, and nothing else.

Owns   the structs below; docs/format.md is their prose twin, same order, same names, held equal by a test.
Never  opens a file, compresses a chunk, or knows what a tensor is.

All integers are little-endian.  `Layout` is a fixed struct whose last field is the xxh3_64 of the bytes
before it, so that a header is either whole or refused.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from deltackpt.errors import CorruptError, FormatError, UnsupportedVersionError

#: Version of every file written; readers refuse a newer one.
VERSION = 1
#: Features this build can read; any other named in a file is refused (format.md, "Versions and features").
FEATURES: frozenset[str] = frozenset()

#: A chunk's decoded bytes, at most: caps every allocation made for a record.
CHUNK_SIZE_MAX = 1 << 26
#: A manifest's JSON, at most.
MANIFEST_SIZE_MAX = 1 << 30
#: Rows of one list chunk; a tensor with more has lists of lists.
LIST_ROWS_MAX = 1024
#: Levels of lists: 1024 ** 4 chunks of 256 KiB are 256 PiB.
LIST_LEVEL_MAX = 4
#: Rows of an index file that share a checksum: 5.6 kB, which is what a look-up reads for one row.
INDEX_BLOCK_ROWS = 64

CHUNK_ID_SIZE = 32
NO_BASE = bytes(CHUNK_ID_SIZE)


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a `Layout`: its name, struct code and meaning."""

    name: str
    code: str
    meaning: str


class Layout:
    """A fixed struct that starts with a magic and ends with the xxh3_64 of what precedes it.

    Parameters
    ----------
    title : str
        As headed in docs/format.md.
    magic : bytes, length 4
    fields : list of Field
        Between the magic and the checksum.

    Examples
    --------
    >>> head = PACK_HEADER.pack(VERSION, 0, bytes(16), bytes(16), 0, 0, 0)
    >>> PACK_HEADER.unpack(head, "here")[0]
    1
    """

    def __init__(self, title: str, magic: bytes, fields: list[Field]) -> None:
        self.title = title
        self.magic = magic
        self.fields = [Field("magic", "4s", repr(magic.decode())), *fields, Field("check", "Q", "xxh3_64")]
        self._body = struct.Struct("<" + "".join(f.code for f in self.fields[:-1]))
        self._check = struct.Struct("<Q")
        self.size = self._body.size + self._check.size

    def pack(self, *values: Any) -> bytes:
        """Return the struct's bytes: magic, `values`, checksum."""
        body = self._body.pack(self.magic, *values)
        return body + self._check.pack(xxhash.xxh3_64_intdigest(body))

    def unpack(self, data: bytes | bytearray | memoryview, where: str) -> tuple[Any, ...]:
        """Return the values between magic and checksum.

        Raises
        ------
        CorruptError
            If `data` is short, has another magic, or fails its checksum.
        """
        if len(data) < self.size:
            raise CorruptError(f"{where}: {self.title} has {len(data)} bytes, needs {self.size}")
        body = bytes(data[: self._body.size])
        if body[:4] != self.magic:
            raise CorruptError(f"{where}: {self.title} magic is {body[:4]!r}, expected {self.magic!r}")
        (check,) = self._check.unpack_from(data, self._body.size)
        if check != xxhash.xxh3_64_intdigest(body):
            raise CorruptError(f"{where}: {self.title} fails its checksum")
        return self._body.unpack(body)[1:]


PACK_HEADER = Layout(
    "Pack header",
    b"DCPK",
    [
        Field("version", "H", "format version"),
        Field("flags", "H", "0; others are refused"),
        Field("store", "16s", "the store's uuid"),
        Field("sid", "16s", "the session that wrote it"),
        Field("rank", "I", "the session's writer"),
        Field("seq", "I", "the writer's pack, from 0"),
        Field("reserved", "Q", "0"),
    ],
)

RECORD_HEADER = Layout(
    "Record header",
    b"DCRC",
    [
        Field("codec", "H", "codec number"),
        Field("depth", "B", "deltas to undo, 0 = whole"),
        Field("itemsize", "B", "element size the codec worked with"),
        Field("raw_size", "I", "decoded bytes"),
        Field("stored_size", "I", "payload bytes"),
        Field("id", "32s", "BLAKE3-256 of the decoded bytes"),
        Field("base", "32s", "id of the base, zeros when whole"),
        Field("payload_check", "Q", "xxh3_64 of the payload"),
    ],
)

PACK_TRAILER = Layout(
    "Pack trailer",
    b"DCPE",
    [
        Field("n_records", "I", "rows in the footer"),
        Field("footer_offset", "Q", "where the footer starts"),
        Field("footer_check", "Q", "xxh3_64 of the footer"),
    ],
)

INDEX_HEADER = Layout(
    "Index header",
    b"DCIX",
    [
        Field("version", "H", "format version"),
        Field("flags", "H", "0; others are refused"),
        Field("store", "16s", "the store's uuid"),
        Field("sid", "16s", "the session that wrote it"),
        Field("n_packs", "I", "rows in the pack table"),
        Field("reserved", "I", "0"),
        Field("n_rows", "Q", "rows in the key column and in the row table"),
    ],
)

MANIFEST_HEADER = Layout(
    "Manifest header",
    b"DCMF",
    [
        Field("version", "H", "format version"),
        Field("flags", "H", "0; others are refused"),
        Field("raw_size", "Q", "bytes of the JSON"),
        Field("stored_size", "Q", "bytes of the zstd frame that follows"),
        Field("payload_check", "Q", "xxh3_64 of the zstd frame"),
    ],
)

#: A chunk inside a pack: a row of a pack's footer (where `pack` is 0) and of an index.
ROW = np.dtype(
    [
        ("id", "u1", 32),
        ("base", "u1", 32),
        ("offset", "<u8"),
        ("raw_size", "<u4"),
        ("stored_size", "<u4"),
        ("pack", "<u4"),
        ("codec", "<u2"),
        ("depth", "u1"),
        ("itemsize", "u1"),
    ]
)

#: A pack as an index names it.
PACK_ROW = np.dtype([("sid", "u1", 16), ("rank", "<u4"), ("seq", "<u4"), ("size", "<u8")])

#: Starts a list chunk.  No checksum of its own: the chunk id covers it.
LIST_HEADER = struct.Struct("<4sHHIIQ")
LIST_MAGIC = b"DCLS"
#: A row of a list chunk: a chunk (level 1) or another list (level > 1), and the tensor bytes below it.
LIST_ROW = np.dtype([("id", "u1", 32), ("size", "<u8")])

TABLES = {"Row": ROW, "Pack row": PACK_ROW, "List row": LIST_ROW}
LAYOUTS = [PACK_HEADER, RECORD_HEADER, PACK_TRAILER, INDEX_HEADER, MANIFEST_HEADER]


def check_version(version: int, flags: int, where: str) -> None:
    """Refuse what a newer deltackpt wrote."""
    if version > VERSION or flags:
        raise UnsupportedVersionError(
            f"{where}: format version {version} with flags {flags:#x}, this build reads up to {VERSION}",
            hint="upgrade deltackpt",
        )


def check_features(features: Any, where: str) -> None:
    """Refuse a file that names a feature this build does not know."""
    if not isinstance(features, list):
        raise CorruptError(f"{where}: features is {features!r}, expected a list")
    unknown = [f for f in features if not isinstance(f, str) or f not in FEATURES]
    if unknown:
        raise UnsupportedVersionError(f"{where}: needs features {unknown}", hint="upgrade deltackpt")


def seal(body: dict[str, Any]) -> bytes:
    """Return a small record's bytes: one line of JSON, one line with its xxh3_128.

    Examples
    --------
    >>> unseal(seal({"kind": "fence"}), "here")
    {'kind': 'fence'}
    """
    line = dump_json(body)
    return line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode() + b"\n"


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """Return the record in `data`; `CorruptError` unless every byte is as sealed."""
    line, newline, rest = data.partition(b"\n")
    if not newline or rest != xxhash.xxh3_128_hexdigest(line).encode() + b"\n":
        raise CorruptError(f"{where}: {len(data)} bytes fail their checksum")
    body = load_json(line, where)
    if not isinstance(body, dict):
        raise CorruptError(f"{where}: record is {type(body).__name__}, expected an object")
    return body


def dump_json(value: Any) -> bytes:
    """Return canonical JSON: ASCII, no spaces, keys in the order given, no NaN."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def load_json(data: bytes, where: str) -> Any:
    """Parse untrusted JSON; `FormatError` for anything else, however deep or long its numbers."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{where}: not JSON: {e}") from e
