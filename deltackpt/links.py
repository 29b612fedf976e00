"""Links: the records of delta chains, read from packs and decoded from the root of each chain up.

Owns   reading many at a time, checking that each is what its row says, the memory of what nobody keeps.
Never  looks for a chunk, or for another copy of one.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from blake3 import blake3

from deltackpt.backends import Backend, Buffer
from deltackpt.chains import Bases
from deltackpt.codecs import Job, Packed, join_all, raw, unpack
from deltackpt.errors import CorruptError
from deltackpt.format import RECORD_HEADER
from deltackpt.pack import PackName, Record
from deltackpt.scratch import Scratch
from deltackpt.types import U8

#: Bytes, stored and decoded, that a thread works on together; a larger record is worked on alone.  Threads
#: that let go of the lock of the interpreter for every little thing wait for each other: with 1 MiB a chain
#: of four takes 1.3 times as long as with 8 on two cores.
_GROUP_SIZE = 8 << 20
#: What a link itself takes, about: plain values, views, a header.
_LINK_SIZE = 1 << 10
_HEADER_SIZE = RECORD_HEADER.size
#: format.ROW
_ROW = struct.Struct("<32s32sQIIIHBB")


class Wanted(NamedTuple):
    """A chunk to read.

    Parameters
    ----------
    id : bytes
    row : void of ROW
        Where it is.
    out : ndarray of uint8
        Where to; of the chunk's size.
    base : ndarray of uint8, optional
        The decoded bytes of its base, checked already, where the caller has them.
    """

    id: bytes
    row: np.void
    out: U8
    base: U8 | None = None


class Row(NamedTuple):
    """A row of an index as plain values: each costs 20 ns, and 150 as the field of an array's row."""

    id: bytes
    base: bytes
    offset: int
    raw_size: int
    stored_size: int
    pack: int
    codec: int
    depth: int
    itemsize: int

    @classmethod
    def of(cls, row: np.void) -> Row:
        """Return a row of an array."""
        return cls._make(_ROW.unpack(row.tobytes()))


class _Link(NamedTuple):
    """A record to decode: into `out`, or for the next link alone; its base is the one before, or `base`."""

    row: Row
    where: str
    out: U8 | None = None
    base: U8 | None = None

    @property
    def is_direct(self) -> bool:
        """Whether the payload is what is wanted, as it is."""
        row = self.row
        is_raw = row.codec == raw.NUMBER and row.stored_size == row.raw_size and not row.depth
        return is_raw and self.out is not None


_Group: TypeAlias = list[_Link]


class Reader:
    """Reads chains of a store.

    Parameters
    ----------
    backend : Backend
    pack_name : callable
        Returns the pack that a row's `pack` counts.
    depth_max : int
        No chain is deeper.
    """

    def __init__(self, backend: Backend, pack_name: Callable[[int], PackName], depth_max: int) -> None:
        self._backend = backend
        self._pack_name = pack_name
        self._depth_max = depth_max
        self._keys: dict[int, str] = {}

    def read(self, wanted: Sequence[Wanted], bases: Bases) -> None:
        """Fill each `out`, checked against the chunk's id; from these copies alone.

        Of a chain the last link is checked: if it is right, so are those below.

        Raises
        ------
        CorruptError, NotFoundError
            If a record is damaged, is another's, has no base, or is not there.
        """
        before: U8 | None = None
        links = (link for one in wanted for link in self._chain(one, bases))
        n = 0
        for group in _groups(links):
            fetched = self._fetch(group)
            jobs = []
            for link, packed, planes in zip(group, fetched, unpack(fetched), strict=True):
                # Two by turns, since a link reads the one before it.
                data = _local.links[n % 2].of(packed.size) if link.out is None else link.out
                if not link.is_direct:
                    base = link.base if link.base is not None or not link.row.depth else before
                    jobs.append(Job(packed, planes, data, base))
                before = data
                n += 1
            join_all(jobs)
            for link in group:
                # What is decoded for the next link alone is right if that one is.
                if link.out is not None and blake3(link.out).digest() != link.row.id:
                    raise CorruptError(f"{link.where}: decoded bytes do not give its id")

    def where(self, row: Row) -> str:
        """Say which record it is, for messages."""
        return f"{self._backend.url}/{self._key(row.pack)} @ {row.offset}: chunk {row.id.hex()[:16]}"

    def _key(self, number: int) -> str:
        key = self._keys.get(number)
        if key is None:
            key = self._keys[number] = self._pack_name(number).key
        return key

    def _chain(self, wanted: Wanted, bases: Bases) -> _Group:
        """Return what is to be decoded for a chunk, from its root up."""
        row = Row.of(wanted.row)
        links = [_Link(row, self.where(row), wanted.out, wanted.base)]
        if row.id != wanted.id:
            raise CorruptError(f"{links[0].where}: its row is found for chunk {wanted.id.hex()[:16]}")
        if row.raw_size != wanted.out.size:
            raise CorruptError(f"{links[0].where}: has {row.raw_size} bytes, expected {wanted.out.size}")
        while row.depth and wanted.base is None:
            base = bases.get(row.base)
            below = None if base is None else Row.of(base)
            if below is None or below.depth >= row.depth or row.depth > self._depth_max:
                found = "is not found" if below is None else f"is of depth {below.depth}"
                raise CorruptError(
                    f"{links[-1].where}: depth {row.depth} of at most {self._depth_max}, "
                    f"and its base {row.base.hex()[:16]} {found}"
                )
            row = below
            links.append(_Link(row, self.where(row)))
        return links[::-1]

    def _fetch(self, group: _Group) -> list[Packed]:
        """Return the payloads, read where they lie side by side in one go."""
        sizes = [_HEADER_SIZE + (0 if link.is_direct else link.row.stored_size) for link in group]
        memory = _local.payloads.of(sum(sizes))
        payloads: list[U8] = [memory] * len(group)
        heads: list[tuple[_Link, U8]] = []
        reads: list[tuple[int, int, list[Buffer]]] = []
        start, end = 0, (-1, 0)
        for n in sorted(range(len(group)), key=lambda n: (group[n].row.pack, group[n].row.offset)):
            link, record = group[n], memory[start : start + sizes[n]]
            row, parts = link.row, [record]
            heads.append((link, record))
            payloads[n] = record[_HEADER_SIZE:]
            if link.is_direct and link.out is not None:
                payloads[n] = link.out
                parts.append(link.out)
            if end == (row.pack, row.offset):
                reads[-1][2].extend(parts)
            else:
                reads.append((row.pack, row.offset, [*parts]))
            start, end = start + sizes[n], (row.pack, row.offset + _HEADER_SIZE + row.stored_size)
        for number, offset, buffers in reads:
            self._backend.read_into(self._key(number), offset, buffers)
        for link, record in heads:
            _check_is(link, Record.from_bytes(record.data[:_HEADER_SIZE], link.where))
        return [
            Packed(link.row.codec, payload, link.row.itemsize, link.row.raw_size, link.where)
            for link, payload in zip(group, payloads, strict=True)
        ]


def _check_is(link: _Link, record: Record) -> None:
    """Refuse a record that is not what its row says stands there."""
    row = link.row
    if record[:-1] != (
        row.codec,
        row.depth,
        row.itemsize,
        row.raw_size,
        row.stored_size,
        row.id,
        row.base,
    ):
        raise CorruptError(f"{link.where}: record of chunk {record.id.hex()[:16]} differs from its row")


def _groups(links: Iterable[_Link]) -> Iterator[_Group]:
    """Split links into runs whose payloads and bytes fit into memory together."""
    group: _Group = []
    group_size = 0
    for link in links:
        size = link.row.stored_size + link.row.raw_size + _LINK_SIZE
        if group and group_size + size > _GROUP_SIZE:
            yield group
            group, group_size = [], 0
        group.append(link)
        group_size += size
    if group:
        yield group


class _Local(threading.local):
    """What each thread reads records into, and decodes the links of a chain into by turns."""

    def __init__(self) -> None:
        self.payloads = Scratch()
        self.links = Scratch(), Scratch()


_local = _Local()
