"""The index: chunk id -> pack, offset, sizes.  Derived data: every row stands in some pack's footer too.

Owns   building and parsing index files, `Index`, the look-up over all of them, and which are to be merged.
Never  opens a file or trusts a row: what stands in the pack is checked against it.

    header | Pack row table | keys: u64 a row | checks: u64 a block | xxh3_128 of all before it | Row table

The Row table is sorted by id, then depth, in blocks of `INDEX_BLOCK_ROWS`, each with a checksum.  The key
column holds the first eight bytes of each id as a big-endian number: a batch of look-ups is one
`numpy.searchsorted`, and rows are read only for ids that are there.  So of a large file what stands before
the rows is read when it is opened, 8 bytes a row of 96, and then some blocks.
"""

from __future__ import annotations

import logging
import struct
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from deltackpt.errors import CorruptError, NotFoundError
from deltackpt.format import INDEX_BLOCK_ROWS, INDEX_HEADER, PACK_ROW, ROW, VERSION, check_version
from deltackpt.pack import PackName, check_sizes
from deltackpt.types import U8

log = logging.getLogger("deltackpt")
T = TypeVar("T")
Rows = npt.NDArray[np.void]
#: Fills buffers from an offset of some file on.
Fill: TypeAlias = Callable[[int, Sequence[U8]], None]

#: Segments of fewer rows are merged in memory once there are more than about `N_SMALL_MAX` of them:
#: a look-up costs one search a segment, a store has one segment a save until gc merges them.
SMALL_ROWS = 1 << 16
N_SMALL_MAX = 4
#: A writer merges index files into its own when there are this many small ones: a listing, opening and
#: a look-up cost as much as there are files, and not every store is ever collected.
N_FILES_MAX = 16
#: Rows that a writer merges, at most: 12 MB on disk, 40 MB of memory for a moment.  Larger files are gc's.
MERGED_ROWS_MAX = 1 << 17
_CHECK_SIZE = 16
_BLOCK_SIZE = INDEX_BLOCK_ROWS * ROW.itemsize
#: Blocks that are read together: 5.8 MB.
_N_BLOCKS_READ = 1024
_PACK_ROW = struct.Struct("<16sIIQ")


def keys_of(ids: U8) -> npt.NDArray[np.uint64]:
    """Return the sort keys of `ids`, shape (n, 32): their first eight bytes as big-endian numbers."""
    return np.ascontiguousarray(ids[:, :8]).view(">u8").ravel().astype(np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class _Sorted(ABC):
    """Rows by id, of which the keys are in memory.

    Parameters
    ----------
    packs : list of PackName
        What a row's `pack` counts in.
    sizes : ndarray of int64
        Bytes of each pack.
    keys : ndarray of uint64, shape (n,)
    """

    packs: list[PackName]
    sizes: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]

    @abstractmethod
    def rows_at(self, at: npt.NDArray[np.int64]) -> Rows:
        """Return some rows, checked."""

    def find(
        self, ids: U8, keys: npt.NDArray[np.uint64], allowed: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.int64], Rows]:
        """Look ids up: the copy of least depth in an allowed pack of each.

        Returns
        -------
        at : ndarray of int64, of the length of `ids`
            Which row it is, or -1.
        rows : ndarray of ROW, of the length of `ids`
            Zeros where there is none.

        Raises
        ------
        CorruptError, NotFoundError
            If rows cannot be read, or are not as written.
        """
        found = np.full(len(ids), -1, np.int64)
        rows = np.zeros(len(ids), ROW)
        at = np.searchsorted(self.keys, keys)
        left = np.arange(len(ids))
        while left.size:
            left = left[at[left] < len(self.keys)]
            left = left[self.keys[at[left]] == keys[left]]
            if not left.size:
                break
            some = self.rows_at(at[left])
            hit = (some["id"] == ids[left]).all(axis=1) & allowed[some["pack"]]
            found[left[hit]] = at[left[hit]]
            rows[left[hit]] = some[hit]
            left = left[~hit]
            at[left] += 1
        return found, rows

    def copies(self, chunk_id: U8, key: npt.NDArray[np.uint64]) -> Rows:
        """Return every row of one chunk, of least depth first; `key` is its sort key.  Raises as `find`."""
        low, high = (int(np.searchsorted(self.keys, key, side)[0]) for side in ("left", "right"))
        rows = self.rows_at(np.arange(low, high)) if high > low else np.zeros(0, ROW)
        copies: Rows = rows[(rows["id"] == chunk_id).all(axis=1)]
        return copies


@dataclass(frozen=True, slots=True, eq=False)
class Segment(_Sorted):
    """One index file's content, in memory.

    Parameters
    ----------
    packs, sizes, keys
        See `_Sorted`.
    rows : ndarray of ROW, shape (n,)
        Sorted by id, then depth.
    """

    rows: Rows

    def rows_at(self, at: npt.NDArray[np.int64]) -> Rows:
        """Return some rows."""
        return self.rows[at]

    @classmethod
    def build(cls, packs: Iterable[tuple[PackName, int, Rows]]) -> Segment:
        """Sort the rows of some packs, given with their sizes, into a segment."""
        items = list(packs)
        parts = []
        for number, (_, _, rows) in enumerate(items):
            part = rows.copy()
            part["pack"] = number
            parts.append(part)
        return cls._sorted(
            [name for name, _, _ in items],
            np.array([size for _, size, _ in items], np.int64),
            np.concatenate(parts) if parts else np.zeros(0, ROW),
        )

    @classmethod
    def _sorted(cls, packs: list[PackName], sizes: npt.NDArray[np.int64], rows: Rows) -> Segment:
        words = np.ascontiguousarray(rows["id"]).view(">u8")
        order = np.lexsort(
            (rows["depth"], words[:, 3], words[:, 2], words[:, 1], words[:, 0]) if len(rows) else ([],)
        )
        rows = rows[order]
        return cls(packs, sizes, keys_of(rows["id"]), rows)

    @classmethod
    def merge(cls, segments: Sequence[Segment], without: Collection[PackName] = ()) -> Segment:
        """Return one segment with the rows of all, each pack once, none of the packs in `without`."""
        numbers: dict[PackName, int] = {}
        sizes: list[int] = []
        parts: list[Rows] = []
        for segment in segments:
            local = np.full(len(segment.packs), -1, np.int64)
            for i, name in enumerate(segment.packs):
                if name not in without and name not in numbers:
                    local[i] = numbers[name] = len(numbers)
                    sizes.append(int(segment.sizes[i]))
            number = local[segment.rows["pack"]]
            part = segment.rows[number >= 0]
            part["pack"] = number[number >= 0]
            parts.append(part)
        rows = np.concatenate(parts) if parts else np.zeros(0, ROW)
        return cls._sorted(list(numbers), np.array(sizes, np.int64), rows)

    def to_bytes(self, store: bytes, sid: bytes) -> bytes:
        """Return the index file's bytes."""
        packs = np.zeros(len(self.packs), PACK_ROW)
        for row, name, size in zip(packs, self.packs, self.sizes, strict=True):
            row["sid"], row["rank"], row["seq"], row["size"] = (
                np.frombuffer(name.sid, np.uint8),
                name.rank,
                name.seq,
                size,
            )
        table = self.rows.tobytes()
        checks = [xxhash.xxh3_64_intdigest(block) for block in _blocks(memoryview(table))]
        head = b"".join(
            [
                INDEX_HEADER.pack(VERSION, 0, store, sid, len(self.packs), 0, len(self.rows)),
                packs.tobytes(),
                self.keys.astype("<u8").tobytes(),
                np.array(checks, "<u8").tobytes(),
            ]
        )
        return b"".join([head, xxhash.xxh3_128_digest(head), table])

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, store: bytes, where: str) -> Segment:
        """Parse an index file; the rows alias `data`.

        Raises
        ------
        CorruptError
            If any byte is not as written, or it is of another store.
        """

        def fill(offset: int, buffers: Sequence[U8]) -> None:
            for buffer in buffers:
                buffer[:] = np.frombuffer(data, np.uint8, buffer.size, offset)
                offset += buffer.size

        file = StoredSegment.open(fill, len(data), store, where)
        rows = np.frombuffer(data, ROW, len(file.keys), len(data) - len(file.keys) * ROW.itemsize)
        file.check(memoryview(data)[len(data) - rows.nbytes :], rows, np.arange(len(file.checks)))
        return cls(file.packs, file.sizes, file.keys, rows)


@dataclass(frozen=True, slots=True, eq=False)
class StoredSegment(_Sorted):
    """An index file of which a row is read when it is looked up.

    Parameters
    ----------
    packs, sizes, keys
        See `_Sorted`.
    checks : ndarray of uint64
        The xxh3_64 of each block of rows.
    fill : callable
        Fills buffers with the bytes of the file from an offset on.
    rows_offset : int
        Where the rows begin.
    where : str
    """

    checks: npt.NDArray[np.uint64]
    fill: Fill
    rows_offset: int
    where: str

    @classmethod
    def open(cls, fill: Fill, size: int, store: bytes, where: str) -> StoredSegment:
        """Read and check all of an index file of `size` bytes but its rows.

        Raises
        ------
        CorruptError
            If any byte of it is not as written, or it is of another store.
        """
        if size < INDEX_HEADER.size:
            raise CorruptError(f"{where}: {size} bytes, an index has at least {INDEX_HEADER.size}")
        header = np.empty(INDEX_HEADER.size, np.uint8)
        fill(0, [header])
        version, flags, found_store, _, n_packs, _, n_rows = INDEX_HEADER.unpack(header.tobytes(), where)
        check_version(version, flags, where)
        if found_store != store:
            raise CorruptError(f"{where}: index of store {found_store.hex()}, expected {store.hex()}")
        n_blocks = -(-n_rows // INDEX_BLOCK_ROWS)
        rows_offset = INDEX_HEADER.size + n_packs * PACK_ROW.itemsize + (n_rows + n_blocks) * 8 + _CHECK_SIZE
        needed = rows_offset + n_rows * ROW.itemsize
        if needed != size:
            raise CorruptError(f"{where}: {size} bytes, {n_packs} packs and {n_rows} rows need {needed}")
        table, check = np.empty(n_packs * PACK_ROW.itemsize, np.uint8), np.empty(_CHECK_SIZE, np.uint8)
        keys, checks = np.empty(n_rows, "<u8"), np.empty(n_blocks, "<u8")
        parts = [table, keys.view(np.uint8), checks.view(np.uint8)]
        fill(header.size, [*parts, check])
        digest = xxhash.xxh3_128(header)
        for part in parts:
            digest.update(part)
        if digest.digest() != check.tobytes():
            raise CorruptError(f"{where}: index fails its checksum")
        packs, sizes = [], np.empty(n_packs, np.uint64)
        for i, (sid, rank, seq, pack_size) in enumerate(_PACK_ROW.iter_unpack(table)):
            packs.append(PackName(sid, rank, seq))
            sizes[i] = pack_size
        if int(sizes.max(initial=0)) >= 1 << 63:
            raise CorruptError(f"{where}: a pack of {sizes.max()} bytes")
        return cls(packs, sizes.astype(np.int64), keys, checks, fill, rows_offset, where)

    def rows_at(self, at: npt.NDArray[np.int64]) -> Rows:
        """Read some rows, and check the blocks that they stand in: 10 us for one, 1 us for one of many."""
        rows = np.empty(len(at), ROW)
        block_of = at // INDEX_BLOCK_ROWS
        blocks = np.unique(block_of)
        for some in np.split(blocks, range(_N_BLOCKS_READ, len(blocks), _N_BLOCKS_READ)):
            found = self._read(some)
            here = np.flatnonzero((block_of >= some[0]) & (block_of <= some[-1]))
            place = np.searchsorted(some, block_of[here])
            rows[here] = found[place * INDEX_BLOCK_ROWS + at[here] % INDEX_BLOCK_ROWS]
        return rows

    def _read(self, blocks: npt.NDArray[np.int64]) -> Rows:
        """Return the rows of some blocks, in order; those that stand side by side are read in one go."""
        starts = blocks * INDEX_BLOCK_ROWS
        n_rows = np.minimum(starts + INDEX_BLOCK_ROWS, len(self.keys)) - starts
        rows = np.empty(int(n_rows.sum()), ROW)
        data, end = rows.view(np.uint8), 0
        for run in np.split(np.arange(len(blocks)), np.flatnonzero(np.diff(blocks) > 1) + 1):
            start, end = end, end + int(n_rows[run].sum()) * ROW.itemsize
            self.fill(self.rows_offset + int(starts[run[0]]) * ROW.itemsize, [data[start:end]])
        self.check(data.data, rows, blocks)
        return rows

    def check(self, data: memoryview, rows: Rows, blocks: npt.NDArray[np.int64]) -> None:
        """Refuse blocks of rows, given as bytes and as rows, that are not as written or not possible."""
        checks = self.checks[blocks].tolist()
        for block, found, check in zip(blocks.tolist(), _blocks(data), checks, strict=True):
            if xxhash.xxh3_64_intdigest(found) != check:
                raise CorruptError(f"{self.where}: block {block} of rows fails its checksum")
        if len(rows) and int(rows["pack"].max()) >= len(self.packs):
            raise CorruptError(
                f"{self.where}: a row names pack {int(rows['pack'].max())} of {len(self.packs)}"
            )
        check_sizes(rows, self.where)

    def load(self) -> Segment:
        """Read and check all rows; raises as `find`."""
        rows = np.concatenate([np.zeros(0, ROW), *self._all()])
        return Segment(self.packs, self.sizes, self.keys, rows)

    def check_all(self) -> None:
        """Read and check all rows, and keep none; raises as `find`."""
        for _ in self._all():
            pass

    def _all(self) -> Iterator[Rows]:
        n = len(self.checks)
        return (self._read(np.arange(at, min(at + _N_BLOCKS_READ, n))) for at in range(0, n, _N_BLOCKS_READ))


def _blocks(table: memoryview) -> Iterator[memoryview]:
    return (table[at : at + _BLOCK_SIZE] for at in range(0, len(table), _BLOCK_SIZE))


#: What a segment's packs count as in an `Index`.
Numbers: TypeAlias = npt.NDArray[np.int64]
_Pair: TypeAlias = tuple[Segment | StoredSegment, Numbers]
_SmallPair: TypeAlias = tuple[Segment, Numbers]


class Index:
    """Look-up over the segments of a store.

    Packs are numbered in the order they were first seen; a found row's `pack` counts in `packs`.

    Parameters
    ----------
    before : Index, optional
        What this one replaces: packs keep their numbers, so rows found in either count alike.

    Attributes
    ----------
    unlisted : set of PackName
        Packs that no index file names: their writer may be at work or have died before they were durable,
        so they are good for reading, and nothing is to be built on them.
    """

    def __init__(self, before: Index | None = None) -> None:
        self.packs: list[PackName] = before.packs if before else []
        self.unlisted: set[PackName] = set()
        self._numbers: dict[PackName, int] = before._numbers if before else {}
        self._listed: Counter[PackName] = Counter()
        self._checked: set[StoredSegment] = set()
        self._large: list[_Pair] = []
        self._small: list[_SmallPair] = []

    def add(self, segment: Segment | StoredSegment) -> None:
        """Take an index file in."""
        self._listed.update(segment.packs)
        self.unlisted.difference_update(segment.packs)
        self._add(segment)

    def add_unlisted(self, segment: Segment) -> None:
        """Take in what packs say of themselves."""
        self.unlisted.update(set(segment.packs) - self._listed.keys())
        self._add(segment)

    def _add(self, segment: Segment | StoredSegment) -> None:
        if isinstance(segment, StoredSegment) or len(segment.rows) >= SMALL_ROWS:
            self._large.append((segment, self._numbered(segment)))
            return
        small = [*self._small, (segment, self._numbered(segment))]
        first = _first_to_merge([len(s.rows) for s, _ in small])
        if len(small) <= N_SMALL_MAX or first >= len(small) - 1:
            self._small = small
            return
        merged = Segment.merge([s for s, _ in small[first:]])
        # Rows seen twice for a moment do no harm to a look-up beside this, rows not seen would.
        if len(merged.rows) >= SMALL_ROWS:
            self._large.append((merged, self._numbered(merged)))
            self._small = small[:first]
        else:
            self._small = [*small[:first], (merged, self._numbered(merged))]

    def _numbered(self, segment: _Sorted) -> Numbers:
        """Return what a segment's packs count as here."""
        numbers = np.empty(len(segment.packs), np.int64)
        for i, name in enumerate(segment.packs):
            numbers[i] = number = self._numbers.setdefault(name, len(self.packs))
            if number == len(self.packs):
                self.packs.append(name)
        return numbers

    def stored(self) -> set[str]:
        """Return the `where` of each file whose rows are not in memory: who deletes it has them added."""
        return {segment.where for segment, _ in self._large if isinstance(segment, StoredSegment)}

    def rows_of(self, name: PackName) -> Rows:
        """Return what index files say stands in a pack, in the order of the pack."""
        pairs = [(segment, numbers) for segment, numbers in self._pairs() if name in segment.packs]
        for segment, _ in self._each(pairs, lambda segment, _: _loaded(segment)):
            rows: Rows = segment.rows[segment.rows["pack"] == segment.packs.index(name)]
            return rows[np.argsort(rows["offset"])]
        return np.zeros(0, ROW)

    @property
    def segments(self) -> list[Segment]:
        """All segments, read and checked as a whole; together they hold every row."""
        return [segment for segment, _ in self._each(self._pairs(), lambda segment, _: _loaded(segment))]

    def check(self) -> None:
        """Read every row, once, so that what is damaged covers nothing any more."""
        stored = [p for p in self._large if isinstance(p[0], StoredSegment) and p[0] not in self._checked]
        for _ in self._each(stored, lambda segment, _: segment.check_all()):  # type: ignore[union-attr]
            pass
        self._checked.update(segment for segment, _ in stored)  # type: ignore[misc]

    def _pairs(self) -> list[_Pair]:
        """Return all segments as they are now, while other threads may add some."""
        return self._large + self._small

    def _each(
        self, pairs: Iterable[_Pair], use: Callable[[Segment | StoredSegment, Numbers], T]
    ) -> Iterator[tuple[T, Numbers]]:
        """Yield what `use` returns of each segment; a file that it finds damaged, or gone, is one no more.

        Its packs are covered by nothing then.  If a chunk is missed for it, `Store.refresh` reads their
        footers, or the file that it was merged into.
        """
        for pair in pairs:
            segment, numbers = pair
            try:
                used = use(segment, numbers)
            except (CorruptError, NotFoundError) as e:
                if isinstance(e, CorruptError):
                    log.warning("%s; its packs are read instead; deltackpt gc replaces it", e.message)
                with suppress(ValueError):  # another thread was first
                    self._large.remove(pair)
                    self._listed -= Counter(segment.packs)
            else:
                yield used, numbers

    def __contains__(self, name: object) -> bool:
        """Whether some segment covers this pack."""
        return name in self._listed or name in self.unlisted

    def find(self, ids: U8, without: Collection[PackName] = ()) -> tuple[npt.NDArray[np.bool_], Rows]:
        """Look a batch of chunk ids up.

        Parameters
        ----------
        ids : ndarray of uint8, shape (n, 32)
        without : collection of PackName
            Packs whose copies do not count.

        Returns
        -------
        found : ndarray of bool, shape (n,)
        rows : ndarray of ROW, shape (n,)
            The copy of least depth, `pack` counting in `self.packs`; zeros where not found.
        """
        keys = keys_of(ids)
        found = np.zeros(len(ids), np.bool_)
        rows = np.zeros(len(ids), ROW)
        pairs = self._pairs()
        allowed = np.ones(len(self.packs), np.bool_)
        allowed[[self._numbers[name] for name in without if name in self._numbers]] = False
        each = self._each(pairs, lambda segment, numbers: segment.find(ids, keys, allowed[numbers]))
        for (at, new), numbers in each:
            hit = np.flatnonzero((at >= 0) & (~found | (new["depth"] < rows["depth"])))
            new = new[hit]
            new["pack"] = numbers[new["pack"]]
            rows[hit] = new
            found[hit] = True
        return found, rows

    def copies(self, chunk_id: bytes) -> Rows:
        """Return every row of one chunk, `pack` counting in `self.packs`, of least depth first."""
        wanted = np.frombuffer(chunk_id, np.uint8)
        key = keys_of(wanted.reshape(1, 32))
        parts = [np.zeros(0, ROW)]
        for part, numbers in self._each(self._pairs(), lambda segment, _: segment.copies(wanted, key)):
            part["pack"] = numbers[part["pack"]]
            parts.append(part)
        rows = np.concatenate(parts)
        return rows[np.argsort(rows["depth"], kind="stable")]


def _loaded(segment: Segment | StoredSegment) -> Segment:
    return segment.load() if isinstance(segment, StoredSegment) else segment


def to_merge(n_rows: Mapping[str, int]) -> list[str]:
    """Choose the index files that a writer merges into its own, by their rows; none while they are few.

    Examples
    --------
    >>> to_merge({"index/a": 900, **{f"index/{n}": 2 for n in range(20)}})[-1]
    'index/19'
    >>> to_merge({f"index/{n}": 2 for n in range(10)})
    []
    """
    small: list[str] = []
    n = 0
    for name in sorted(n_rows, key=n_rows.__getitem__):
        n += n_rows[name]
        if n > MERGED_ROWS_MAX:
            break
        small.append(name)
    if len(small) < N_FILES_MAX:
        return []
    n_left = _first_to_merge([n_rows[name] for name in reversed(small)])
    return small[: len(small) - n_left]


def _first_to_merge(n_rows: Sequence[int]) -> int:
    """Return the first segment that has at most twice the rows of all after it; their count if none has.

    Whatever is merged grows by half, so a row is copied some ten times while a store grows to `SMALL_ROWS`,
    and not once for every fourth save; and those left alone shrink threefold each, so they are few.
    """
    left = sum(n_rows)
    for i, n in enumerate(n_rows):
        left -= n
        if n <= 2 * left:
            return i
    return len(n_rows)
