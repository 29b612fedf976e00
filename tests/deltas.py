"""Saves whose chunks become deltas where there is anything to take them against, whatever is planned."""

import numpy as np

from deltackpt.chains import as_ids
from deltackpt.format import ROW
from deltackpt.records import GC_RUN
from deltackpt.session import Parent, Session

_put = Session.put


def parent_of(session, size):
    """The deepest chunk of this size that a new save may build on, so that chains grow long."""
    rows = [s.rows[s.rows["raw_size"] == size] for s in session.store.refresh().segments]
    ids = sorted({row["id"].tobytes() for part in rows for row in part})
    copies = session.look_up(as_ids(ids)) if ids else []
    usable = [
        (c.depth, i, c) for i, c in zip(ids, copies, strict=True) if c and c.depth < session.store.depth_max
    ]
    if not usable:
        return None
    depth, chunk_id, copy = max(usable, key=lambda found: found[:2])
    return Parent(chunk_id, depth, None, copy.raw_size, packs=copy.packs)


def put(self, chunk_id, data, kind, base=None, *planned):
    # What a save has planned gives way, what a test says itself does not; gc means whole when it says so.
    if (base is None or planned) and self.slot.run != GC_RUN:
        base = parent_of(self, data.size)
    _put(self, chunk_id, data, kind, base)


def taken(monkeypatch):
    """Have every put of the test look for a base."""
    monkeypatch.setattr(Session, "put", put)


def nearly(array, seed):
    """An array of which every element moved a little, as weights do in a step."""
    new = array.copy()
    words = new.reshape(-1).view(f"<i{new.itemsize}")
    words += np.random.default_rng(seed).integers(-3, 4, words.size).astype(words.dtype)
    return new


def rows_of(store):
    """Every row of a store's packs."""
    return np.concatenate([np.zeros(0, ROW), *(s.rows for s in store.refresh(complete=True).segments)])
