"""A pack: many records in one file.

Owns   building a pack's bytes piece by piece, and reading its header, records and footer back.
Never  opens a file or decodes a payload.

    header | record header, payload | record header, payload | ... | footer: Row table | trailer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from deltackpt.errors import CorruptError
from deltackpt.format import (
    CHUNK_SIZE_MAX,
    NO_BASE,
    PACK_HEADER,
    PACK_TRAILER,
    RECORD_HEADER,
    ROW,
    VERSION,
    check_version,
)
from deltackpt.types import U8

Payload: TypeAlias = bytes | memoryview | U8
#: Reads `size` bytes at `offset` of some pack.
ReadAt = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True, order=True)
class PackName:
    """Who wrote a pack: session, rank and sequence number; its file name follows from them."""

    sid: bytes
    rank: int
    seq: int

    @property
    def key(self) -> str:
        """Name in the store, e.g. ``packs/<32 hex>-0-0.pack``."""
        return f"packs/{self.sid.hex()}-{self.rank}-{self.seq}.pack"

    @classmethod
    def from_key(cls, key: str) -> PackName | None:
        """Parse a name in the store; None if it is not a pack's."""
        stem = key.removeprefix("packs/")
        if not stem.endswith(".pack"):
            return None
        parts = stem.removesuffix(".pack").split("-")
        try:
            name = cls(bytes.fromhex(parts[0]), int(parts[1]), int(parts[2]))
        except (ValueError, IndexError):
            return None
        fits = len(name.sid) == 16 and max(name.rank, name.seq) < 1 << 32
        return name if fits and name.key == key else None


class Record(NamedTuple):
    """A record's header."""

    codec: int
    depth: int
    itemsize: int
    raw_size: int
    stored_size: int
    id: bytes
    base: bytes
    payload_check: int

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, where: str) -> Record:
        """Parse and check a header.

        Raises
        ------
        CorruptError
            If it is short, fails its checksum, or is impossible.
        """
        record = cls(*RECORD_HEADER.unpack(data, where))
        if record.raw_size > CHUNK_SIZE_MAX or record.stored_size > CHUNK_SIZE_MAX:
            raise CorruptError(
                f"{where}: record of {record.raw_size} bytes, at most {CHUNK_SIZE_MAX} allowed"
            )
        if (record.depth > 0) != (record.base != NO_BASE):
            raise CorruptError(f"{where}: depth {record.depth} does not fit base {record.base.hex()}")
        return record

    @classmethod
    def of(
        cls,
        payload: Payload,
        *,
        codec: int,
        itemsize: int,
        raw_size: int,
        chunk_id: bytes,
        depth: int = 0,
        base: bytes = NO_BASE,
    ) -> Record:
        """Return a payload's header: of a chunk stored whole, or, with `depth` and `base`, of a delta."""
        check = xxhash.xxh3_64_intdigest(payload)
        return cls(codec, depth, itemsize, raw_size, len(payload), chunk_id, base, check)

    def to_bytes(self) -> bytes:
        """Return the header's bytes."""
        return RECORD_HEADER.pack(*self)


class PackBuilder:
    """Bytes of a pack in the order they are written; remembers the rows for footer and index.

    Examples
    --------
    >>> builder = PackBuilder(bytes(16), PackName(bytes(16), 0, 0))
    >>> record = Record.of(b"abc", codec=0, itemsize=1, raw_size=3, chunk_id=b"x" * 32)
    >>> builder.add(record)
    >>> data = builder.header() + record.to_bytes() + b"abc" + builder.footer()
    >>> [r["raw_size"] for r in read_footer(lambda o, n: data[o:o + n], len(data), "here")]
    [np.uint32(3)]
    """

    def __init__(self, store: bytes, name: PackName) -> None:
        self.store = store
        self.name = name
        self.size = PACK_HEADER.size
        self._rows: list[tuple[bytes, bytes, int, int, int, int, int, int]] = []

    def header(self) -> bytes:
        """Return what the file starts with."""
        return PACK_HEADER.pack(VERSION, 0, self.store, self.name.sid, self.name.rank, self.name.seq, 0)

    def add(self, record: Record) -> None:
        """Note a record; the caller writes its header and its payload where the pack ends now."""
        self._rows.append(
            (
                record.id,
                record.base,
                self.size,
                record.raw_size,
                record.stored_size,
                record.codec,
                record.depth,
                record.itemsize,
            )
        )
        self.size += RECORD_HEADER.size + record.stored_size

    @property
    def n_records(self) -> int:
        """Records so far."""
        return len(self._rows)

    def rows(self) -> npt.NDArray[np.void]:
        """Return the records' rows in the order they were added, `pack` = 0."""
        rows = np.zeros(len(self._rows), ROW)
        if self._rows:
            ids, bases, offsets, raws, storeds, codecs, depths, itemsizes = zip(*self._rows, strict=True)
            rows["id"] = np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 32)
            rows["base"] = np.frombuffer(b"".join(bases), np.uint8).reshape(-1, 32)
            rows["offset"], rows["raw_size"], rows["stored_size"] = offsets, raws, storeds
            rows["codec"], rows["depth"], rows["itemsize"] = codecs, depths, itemsizes
        return rows

    @property
    def total_size(self) -> int:
        """Bytes of the whole file once the footer is written."""
        return self.size + self.n_records * ROW.itemsize + PACK_TRAILER.size

    def footer(self) -> bytes:
        """Return what the file ends with: the rows and the trailer."""
        table = self.rows().tobytes()
        trailer = PACK_TRAILER.pack(self.n_records, self.size, xxhash.xxh3_64_intdigest(table))
        return table + trailer


def read_header(
    data: bytes, where: str, *, store: bytes | None = None, name: PackName | None = None
) -> PackName:
    """Return the name a pack's header claims; `CorruptError` if it belongs to another store or file."""
    version, flags, found_store, sid, rank, seq, reserved = PACK_HEADER.unpack(data, where)
    check_version(version, flags, where)
    found = PackName(sid, rank, seq)
    if store is not None and found_store != store:
        raise CorruptError(f"{where}: pack of store {found_store.hex()}, expected {store.hex()}")
    if (name is not None and found != name) or reserved:
        raise CorruptError(f"{where}: header says {found.key}")
    return found


def read_footer(read_at: ReadAt, size: int, where: str) -> npt.NDArray[np.void]:
    """Return a pack's rows.

    Parameters
    ----------
    read_at : callable (offset, size) -> bytes
    size : int
        Bytes of the whole pack.

    Raises
    ------
    CorruptError
        If trailer or footer are damaged, or a row points outside the records.
    """
    if size < PACK_HEADER.size + PACK_TRAILER.size:
        raise CorruptError(
            f"{where}: {size} bytes, a pack has at least {PACK_HEADER.size + PACK_TRAILER.size}"
        )
    trailer_offset = size - PACK_TRAILER.size
    n_records, footer_offset, check = PACK_TRAILER.unpack(read_at(trailer_offset, PACK_TRAILER.size), where)
    if footer_offset + n_records * ROW.itemsize != trailer_offset:
        raise CorruptError(f"{where}: {n_records} rows at {footer_offset} do not end at {trailer_offset}")
    table = read_at(footer_offset, trailer_offset - footer_offset)
    if len(table) != n_records * ROW.itemsize or xxhash.xxh3_64_intdigest(table) != check:
        raise CorruptError(f"{where}: footer fails its checksum")
    rows = np.frombuffer(table, ROW)
    sizes = RECORD_HEADER.size + rows["stored_size"].astype(np.int64)
    ends = PACK_HEADER.size + np.cumsum(sizes)
    if (
        not np.array_equal(rows["offset"].astype(np.int64), ends - sizes)
        or (int(ends[-1]) if n_records else PACK_HEADER.size) != footer_offset
    ):
        raise CorruptError(f"{where}: records do not fill the pack from header to footer")
    check_sizes(rows, where)
    return rows


def check_sizes(rows: npt.NDArray[np.void], where: str) -> None:
    """Refuse rows that promise more than a chunk may have, before anybody allocates it."""
    size = max(int(rows[name].max(initial=0)) for name in ("raw_size", "stored_size"))
    if size > CHUNK_SIZE_MAX:
        raise CorruptError(f"{where}: a row of {size} bytes, at most {CHUNK_SIZE_MAX} allowed")


def scan(read_at: ReadAt, size: int, rows: npt.NDArray[np.void], where: str) -> Iterator[tuple[int, str]]:
    """Check every stored byte of every record against its header, its checksum and its footer row.

    Yields
    ------
    (int, str)
        Row number and what is wrong with that record.
    """
    for i, row in enumerate(rows):
        offset, stored_size = int(row["offset"]), int(row["stored_size"])
        try:
            data = memoryview(read_at(offset, RECORD_HEADER.size + stored_size))
            record = Record.from_bytes(data, f"{where} @ {offset}")
            check_row(record, row, f"{where} @ {offset}")
            check_payload(record, data[RECORD_HEADER.size :], f"{where} @ {offset}")
        except CorruptError as e:
            yield i, e.message


def salvage(data: bytes, where: str) -> Iterator[tuple[int, Record]]:
    """Find the records that are as they were written, in a pack of which nothing else is to be trusted.

    Yields
    ------
    (int, Record)
        Where its header starts, and the record.
    """
    at, view = 0, memoryview(data)
    while (at := data.find(RECORD_HEADER.magic, at)) >= 0:
        start = at + RECORD_HEADER.size
        try:
            record = Record.from_bytes(view[at:start], where)
            check_payload(record, view[start : start + record.stored_size], where)
        except CorruptError:
            at += 1
        else:
            yield at, record
            at = start + record.stored_size


def check_row(record: Record, row: np.void, where: str) -> None:
    """Refuse a record that is not what the index or the footer says stands there."""
    if (
        record.id != row["id"].tobytes()
        or record.stored_size != row["stored_size"]
        or record.raw_size != row["raw_size"]
        or record.codec != row["codec"]
        or record.depth != row["depth"]
        or record.itemsize != row["itemsize"]
        or record.base != row["base"].tobytes()
    ):
        raise CorruptError(f"{where}: record of chunk {record.id.hex()[:16]} differs from its row")


def check_payload(record: Record, payload: Payload, where: str) -> None:
    """Refuse a payload that is not as it was written."""
    if len(payload) != record.stored_size or xxhash.xxh3_64_intdigest(payload) != record.payload_check:
        raise CorruptError(f"{where}: payload of chunk {record.id.hex()[:16]} fails its checksum")
