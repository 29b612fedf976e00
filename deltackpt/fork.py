"""A fork: what one snapshot holds, relied on by a session of another run.

Owns   the walk over a snapshot's chunks and lists, and storing again those of them that no new save may use.
Never  copies what the session may rely on where it is, or decides anything.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deltackpt.chains import as_ids
from deltackpt.codecs import Kind
from deltackpt.manifest import Manifest, list_from_bytes
from deltackpt.session import Session
from deltackpt.store import Store

#: Chunks looked up together; a look-up costs as much for one as for a thousand.
_N_GROUP = 4096


def take_over(session: Session, manifest: Manifest) -> None:
    """Make every chunk and list of a snapshot one that the session may rely on.

    The session holds off gc as it does for a save.  What is in a condemned pack only, or in quarantine, is
    read and put again.

    Raises
    ------
    CorruptError
        If a list, or a chunk that must be read, is missing or damaged.
    """
    for level, nodes in _levels(session.store, manifest):
        for start in range(0, len(nodes), _N_GROUP):
            group = nodes[start : start + _N_GROUP]
            ids = as_ids(chunk_id for chunk_id, _ in group)
            held = session.look_up(ids)
            for (chunk_id, is_float), copy in zip(group, held, strict=True):
                if copy is None:
                    _put_again(session, chunk_id, is_float=is_float and not level)


def _put_again(session: Session, chunk_id: bytes, *, is_float: bool) -> None:
    row = session.store.find(as_ids([chunk_id]))[0]
    data = np.empty(int(row["raw_size"]), np.uint8)
    session.store.read_into(chunk_id, row, data)
    itemsize = int(row["itemsize"])
    session.put(chunk_id, data, Kind(itemsize, is_float and itemsize > 1))


def _levels(store: Store, manifest: Manifest) -> Iterator[tuple[int, list[tuple[bytes, bool]]]]:
    """Yield the snapshot's nodes from the highest level of lists down to the chunks, each node once.

    A node is an id and whether it belongs to a tensor of floats.
    """
    todo = {
        (row.level, row.root, row.size): "float" in row.dtype or "complex" in row.dtype
        for row in manifest.tensors
        if row.size
    }
    while todo:
        level = max(node[0] for node in todo)
        nodes = {node: is_float for node, is_float in todo.items() if node[0] == level}
        todo = {node: is_float for node, is_float in todo.items() if node[0] < level}
        yield level, [(chunk_id, is_float) for (_, chunk_id, _), is_float in nodes.items()]
        if not level:
            continue
        found = store.find(as_ids(chunk_id for _, chunk_id, _ in nodes))
        for ((_, chunk_id, size), is_float), row in zip(nodes.items(), found, strict=True):
            data = np.empty(int(row["raw_size"]), np.uint8)
            store.read_into(chunk_id, row, data)
            for entry in list_from_bytes(data, level, size, f"list {chunk_id.hex()[:16]}"):
                todo.setdefault((level - 1, entry["id"].tobytes(), int(entry["size"])), is_float)
