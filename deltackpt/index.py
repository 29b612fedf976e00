"""The index: chunk id -> pack, offset, sizes.  Derived data: every row stands in some pack's footer too.

Owns   building and parsing index files, and `Index`: the look-up over all of them.
Never  opens a file or trusts a row: what stands in the pack is checked against it.

    header | Pack row table | keys: u64 | Row table, sorted by id, depth | xxh3_128 of all before it

The key column holds the first eight bytes of each id as a big-endian number, so that a batch of
look-ups is one `numpy.searchsorted` over mapped memory: 1.5-1.9 M a second a core, no heap.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from deltackpt.errors import CorruptError
from deltackpt.format import INDEX_HEADER, PACK_ROW, ROW, VERSION, check_version
from deltackpt.pack import PackName, check_sizes
from deltackpt.types import U8

Rows = npt.NDArray[np.void]

#: Segments of fewer rows are merged in memory once there are more than about `N_SMALL_MAX` of them:
#: a look-up costs one search a segment, a store has one segment a save until gc merges them.
SMALL_ROWS = 1 << 16
N_SMALL_MAX = 4
_CHECK_SIZE = 16


def keys_of(ids: U8) -> npt.NDArray[np.uint64]:
    """Return the sort keys of `ids`, shape (n, 32): their first eight bytes as big-endian numbers."""
    return np.ascontiguousarray(ids[:, :8]).view(">u8").ravel().astype(np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One index file's content.

    Parameters
    ----------
    packs : list of PackName
        What a row's `pack` counts in.
    sizes : ndarray of int64
        Bytes of each pack.
    keys : ndarray of uint64, shape (n,)
    rows : ndarray of ROW, shape (n,)
        Sorted by id, then depth.
    """

    packs: list[PackName]
    sizes: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    rows: Rows

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
        header = INDEX_HEADER.pack(VERSION, 0, store, sid, len(self.packs), 0, len(self.rows))
        body = b"".join([header, packs.tobytes(), self.keys.tobytes(), self.rows.tobytes()])
        return body + xxhash.xxh3_128_digest(body)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, store: bytes, where: str) -> Segment:
        """Parse an index file; the arrays alias `data`.

        Raises
        ------
        CorruptError
            If any byte is not as written, or it is of another store.
        """
        version, flags, found_store, _, n_packs, _, n_rows = INDEX_HEADER.unpack(data, where)
        check_version(version, flags, where)
        if found_store != store:
            raise CorruptError(f"{where}: index of store {found_store.hex()}, expected {store.hex()}")
        packs_offset = INDEX_HEADER.size
        keys_offset = packs_offset + n_packs * PACK_ROW.itemsize
        rows_offset = keys_offset + n_rows * 8
        end = rows_offset + n_rows * ROW.itemsize
        if end + _CHECK_SIZE != len(data):
            raise CorruptError(
                f"{where}: {len(data)} bytes, {n_packs} packs and {n_rows} rows need {end + _CHECK_SIZE}"
            )
        if xxhash.xxh3_128_digest(data[:end]) != bytes(data[end:]):
            raise CorruptError(f"{where}: index fails its checksum")
        table = np.frombuffer(data, PACK_ROW, n_packs, packs_offset)
        packs = [PackName(r["sid"].tobytes(), int(r["rank"]), int(r["seq"])) for r in table]
        keys = np.frombuffer(data, "<u8", n_rows, keys_offset)
        rows = np.frombuffer(data, ROW, n_rows, rows_offset)
        if n_rows and int(rows["pack"].max()) >= n_packs:
            raise CorruptError(f"{where}: a row names pack {int(rows['pack'].max())} of {n_packs}")
        check_sizes(rows, where)
        return cls(packs, table["size"].astype(np.int64), keys, rows)

    def find(
        self, ids: U8, keys: npt.NDArray[np.uint64], allowed: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        """Return for each id the row of its copy of least depth in an allowed pack, or -1."""
        found = np.full(len(ids), -1, np.int64)
        at = np.searchsorted(self.keys, keys)
        left = np.arange(len(ids))
        while left.size:
            left = left[at[left] < len(self.keys)]
            left = left[self.keys[at[left]] == keys[left]]
            rows = self.rows[at[left]]
            hit = (rows["id"] == ids[left]).all(axis=1) & allowed[rows["pack"]]
            found[left[hit]] = at[left[hit]]
            left = left[~hit]
            at[left] += 1
        return found


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
        self._listed: set[PackName] = set()
        self._large: list[tuple[Segment, npt.NDArray[np.int64]]] = []
        self._small: list[tuple[Segment, npt.NDArray[np.int64]]] = []

    def add(self, segment: Segment) -> None:
        """Take an index file in."""
        self._listed.update(segment.packs)
        self.unlisted.difference_update(segment.packs)
        self._add(segment)

    def add_unlisted(self, segment: Segment) -> None:
        """Take in what packs say of themselves."""
        self.unlisted.update(set(segment.packs) - self._listed)
        self._add(segment)

    def _add(self, segment: Segment) -> None:
        if len(segment.rows) >= SMALL_ROWS:
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

    def _numbered(self, segment: Segment) -> npt.NDArray[np.int64]:
        """Return what a segment's packs count as here."""
        numbers = np.empty(len(segment.packs), np.int64)
        for i, name in enumerate(segment.packs):
            numbers[i] = number = self._numbers.setdefault(name, len(self.packs))
            if number == len(self.packs):
                self.packs.append(name)
        return numbers

    @property
    def segments(self) -> list[Segment]:
        """All segments; together they hold every row."""
        return [s for s, _ in self._large + self._small]

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
        banned = {self._numbers[name] for name in without if name in self._numbers}
        for segment, numbers in self._large + self._small:
            allowed = np.array([int(n) not in banned for n in numbers], np.bool_)
            at = segment.find(ids, keys, allowed)
            hit = at >= 0
            hit[hit] = ~found[hit] | (segment.rows["depth"][at[hit]] < rows["depth"][hit])
            new = segment.rows[at[hit]]
            new["pack"] = numbers[new["pack"]]
            rows[hit] = new
            found |= hit
        return found, rows

    def copies(self, chunk_id: bytes) -> Rows:
        """Return every row of one chunk, `pack` counting in `self.packs`, of least depth first."""
        wanted = np.frombuffer(chunk_id, np.uint8)
        key = keys_of(wanted.reshape(1, 32))
        parts = [np.zeros(0, ROW)]
        for segment, numbers in self._large + self._small:
            low, high = (
                np.searchsorted(segment.keys, key, "left")[0],
                np.searchsorted(segment.keys, key, "right")[0],
            )
            part = segment.rows[low:high]
            part = part[(part["id"] == wanted).all(axis=1)].copy()
            part["pack"] = numbers[part["pack"]]
            parts.append(part)
        rows = np.concatenate(parts)
        return rows[np.argsort(rows["depth"], kind="stable")]


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
