"""A tally: which group each chunk that a save puts is of, and in the end what each group cost.

Owns   the count, and what a state of very many dtypes is folded into.
Never  asks the store, or looks into a chunk: it is told ids, and reads the rows of what was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from deltackpt.codecs import NAMES
from deltackpt.groups import Coded, GroupCost, added, group_of
from deltackpt.index import Rows
from deltackpt.manifest import TensorRow
from deltackpt.types import U8

#: Groups of one save that are told apart; 100 to 400 bytes each in its decision.
N_GROUPS_MAX = 12
MIXED = "mixed"
_N_CODECS = 1 << 16  # as a row has room for


class Tally:
    """The count of one save.

    Chunks are told apart by the first 8 bytes of their ids, hashes that are: two that are alike there, one
    save in 37 million of a million chunks, would be counted as one.

    Examples
    --------
    >>> import numpy as np
    >>> from deltackpt.format import ROW
    >>> tensor = TensorRow("w", "float32", (50,), "numpy", 200, 1, b"", b"")
    >>> ids = np.arange(64, dtype=np.uint8).reshape(2, 32)
    >>> tally = Tally()
    >>> tally.put(tensor, ids[:1], [True])
    >>> rows = np.zeros(1, ROW)
    >>> rows["id"], rows["codec"], rows["raw_size"], rows["stored_size"] = ids[0], 3, 100, 40
    >>> [cost] = tally.costs([(tensor, 2)], rows)
    >>> cost.codecs, cost.based_size, cost.same.size
    ({'delta-dense': Coded(n_chunks=1, size=100, stored_size=40)}, 100, 100)
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}
        self._keys: list[npt.NDArray[np.uint64]] = []
        self._of: list[int] = []
        self._based: list[npt.NDArray[np.bool_]] = []

    def put(self, tensor: TensorRow, ids: U8, is_based: Sequence[bool]) -> None:
        """Note which chunks are put for a tensor, and which of them have a base to be compared with."""
        if len(ids):
            self._keys.append(_keys(ids))
            self._of.append(self._number(tensor))
            self._based.append(np.array(is_based, np.bool_))

    def costs(self, tensors: Sequence[tuple[TensorRow, int]], rows: Rows) -> list[GroupCost]:
        """Return what each group cost, given all tensors with their chunks' number, and what was written."""
        n_chunks: dict[int, int] = {}
        sizes: dict[int, int] = {}
        for tensor, n in tensors:
            number = self._number(tensor)
            n_chunks[number] = n_chunks.get(number, 0) + n
            sizes[number] = sizes.get(number, 0) + tensor.size
        coded, based_sizes = self._written(rows)
        return folded(
            [
                GroupCost(
                    *names,
                    sizes.get(number, 0),
                    n_chunks.get(number, 0),
                    based_sizes.get(number, 0),
                    coded.get(number, {}),
                )
                for names, number in self._numbers.items()
            ]
        )

    def _number(self, tensor: TensorRow) -> int:
        names = (group_of(tensor.name, tensor.dtype, tensor.shape), tensor.dtype)
        return self._numbers.setdefault(names, len(self._numbers))

    def _written(self, rows: Rows) -> tuple[dict[int, dict[str, Coded]], dict[int, int]]:
        """Return of each group what was written by codec, and the bytes of it that had a base."""
        if not self._keys or not len(rows):
            return {}, {}
        keys, first = np.unique(np.concatenate(self._keys), return_index=True)  # the first tensor to put one
        of = np.repeat(self._of, [len(part) for part in self._keys])[first]
        based = np.concatenate(self._based)[first]
        wanted = _keys(rows["id"])
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        is_tensors = keys[at] == wanted  # else a list
        of, based = of[at[is_tensors]], based[at[is_tensors]]
        raw, stored, codec = (rows[name][is_tensors] for name in ("raw_size", "stored_size", "codec"))
        kinds, which = np.unique(of * _N_CODECS + codec, return_inverse=True)
        coded: dict[int, dict[str, Coded]] = {}
        figures = np.stack([np.bincount(which), _sums(which, raw), _sums(which, stored)], axis=1)
        for kind, row in zip(kinds.tolist(), figures.tolist(), strict=True):
            number, codec_number = divmod(kind, _N_CODECS)
            coded.setdefault(number, {})[NAMES[codec_number]] = Coded(*row)
        return coded, dict(enumerate(_sums(of, raw * based).tolist()))


def _sums(which: npt.NDArray[np.int64], sizes: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    return np.bincount(which, weights=sizes).astype(np.int64)  # counted in floats: exact up to 9 PB


def _keys(ids: U8) -> npt.NDArray[np.uint64]:
    keys: npt.NDArray[np.uint64] = np.ascontiguousarray(ids[:, :8]).view(np.uint64).ravel()
    return keys


def folded(costs: Sequence[GroupCost]) -> list[GroupCost]:
    """Return at most `N_GROUPS_MAX` costs: what is smaller than the largest becomes one, of other and mixed.

    Examples
    --------
    >>> many = [GroupCost("weights", f"float{n}", n, 1) for n in range(1, 21)]
    >>> found = folded(many)
    >>> len(found), found[-1]
    (12, GroupCost(group='other', dtype='mixed', logical_size=45, n_chunks=9, based_size=0, codecs={}))
    """
    if len(costs) <= N_GROUPS_MAX:
        return added(costs)
    by_size = sorted(costs, key=lambda cost: -cost.logical_size)
    rest = [replace(cost, group="other", dtype=MIXED) for cost in by_size[N_GROUPS_MAX - 1 :]]
    return added([*by_size[: N_GROUPS_MAX - 1], *rest])
