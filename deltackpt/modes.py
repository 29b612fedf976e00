"""Modes: how the chunks of a tensor were best taken, tried in one save and kept for the next ones.

Owns   what is remembered of a trial, and when it is out of date.
Never  tries anything, or knows what a mode does.

Trying a mode costs about five encodings of what it is tried on, and from save to save the answer hardly
changes: tried in every save, it took a third of the time of saving a dense state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from deltackpt.codecs import Mode
from deltackpt.index import Rows, keys_of
from deltackpt.types import U8

#: After this many saves a mode is tried anew, whatever it gives.
N_SAVES_MAX = 8
#: So it is once the share of bytes stored is this much off: a save after 10 steps, the next after 100.
DRIFT_MAX = 0.03
#: A trial costs about a millisecond, whatever the size.  Of fewer bytes it is made the more seldom: an
#: adapter of 128 small tensors took half of its save for trials.
_FULL_SIZE = 1 << 20
#: Saves after which a mode is tried anew in any case, and bytes a save that are worth a trial.
_N_SAVES_END, _DRIFT_SIZE = 64, 4096


class Tried(NamedTuple):
    """The mode that was best for some chunks.

    Parameters
    ----------
    mode : Mode
    share : float
        Bytes stored by bytes of the chunks, in the save that tried; 0.0 until that is known.
    n_saves : int
        How often it was used.

    Examples
    --------
    >>> tried = Tried(Mode(1)).after(0.50, 10**6)
    >>> tried.n_saves, tried.after(0.51, 10**6).n_saves, tried.after(0.60, 10**6)
    (1, 2, None)
    """

    mode: Mode
    share: float = 0.0
    n_saves: int = 0

    def after(self, share: float, size: int) -> Tried | None:
        """Return what is known once a save has used it; None: try anew.

        Parameters
        ----------
        share : float
            Bytes stored by bytes of the chunks; 0.0 if that tells nothing.
        size : int
            Bytes of the chunks.
        """
        drift = abs(share / self.share - 1) if self.share and share else 0.0
        n_saves_max = min(_N_SAVES_END, N_SAVES_MAX * max(1, _FULL_SIZE // max(1, size)))
        if self.n_saves + 1 >= n_saves_max or (drift > DRIFT_MAX and drift * size >= _DRIFT_SIZE):
            return None
        return self._replace(share=self.share or share, n_saves=self.n_saves + 1)


#: Of one tensor, by the relation that the chunks have to their bases.
Modes: TypeAlias = Mapping[str, Tried]


class Taken(NamedTuple):
    """Chunks of a tensor that were put in one mode.

    Parameters
    ----------
    tensor : str
    why : str
        The relation to their bases.
    tried : Tried
    ids : ndarray of uint8, shape (n, 32)
    """

    tensor: str
    why: str
    tried: Tried
    ids: U8


def kept(before: Modes, now: Mapping[str, Tried | None]) -> Modes:
    """Return what is known after a save that took some relations, given what was known before.

    Examples
    --------
    >>> one, other = Tried(Mode(1)), Tried(Mode(2))
    >>> sorted(kept({"previous": one, "cast": other}, {"root": other, "cast": None}))
    ['previous', 'root']
    """
    return {why: tried for why, tried in {**before, **now}.items() if tried is not None}


def learned(
    taken: Sequence[Taken], rows: Rows, *, is_small: bool = True
) -> dict[str, dict[str, Tried | None]]:
    """Return what a save tells of each tensor, given the rows of what it wrote; None: try anew.

    Chunks that were put for another tensor too count for both.  Where some were not encoded as small as they
    can be, `is_small` being false, sizes do not tell whether another mode would do better now.

    Examples
    --------
    >>> from deltackpt.format import ROW
    >>> rows = np.zeros(1, ROW)
    >>> rows["raw_size"], rows["stored_size"] = 100, 50
    >>> learned([Taken("w", "previous", Tried(Mode(1)), rows["id"])], rows)
    {'w': {'previous': Tried(mode=Mode(map=1, scale=1.0), share=0.5, n_saves=1)}}
    """
    if not taken or not len(rows):
        return {}
    keys, first = np.unique(keys_of(rows["id"]), return_index=True)
    wanted = keys_of(np.concatenate([t.ids for t in taken]))
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    is_there = keys[at] == wanted
    of = np.repeat(np.arange(len(taken)), [len(t.ids) for t in taken])[is_there]
    found = rows[first[at[is_there]]]
    raw, stored = (np.bincount(of, found[name], len(taken)) for name in ("raw_size", "stored_size"))
    shares = (is_small * stored / np.maximum(raw, 1)).tolist()
    modes: dict[str, dict[str, Tried | None]] = {}
    for t, share, size in zip(taken, shares, raw.tolist(), strict=True):
        modes.setdefault(t.tensor, {})[t.why] = t.tried.after(share, int(size))
    return modes
