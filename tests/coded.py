"""A chunk as the payload of a codec that is named, whichever would be chosen."""

import numpy as np

from deltackpt import codecs
from deltackpt.codecs import WHOLE, Chunk, coder, dense, lz4, planes, raw, sparse


def n_changed(data, kind, base):
    """How many whole elements differ from the base's."""
    [found] = dense.split_all([Chunk(data, kind, np.empty(0, np.uint8), base)], share_few=1.0)
    return found


def split(codec, data, kind, base=None, mode=WHOLE):
    """The planes of a payload."""
    chunk = Chunk(data, kind, np.empty(codecs.room(2 * data.size + 8), np.uint8), base, mode)
    if codec == planes.NUMBER:
        return planes.split_all([chunk])[0]
    if codec == sparse.NUMBER:
        return sparse.split(chunk, n_changed(data, kind, base))
    [found] = dense.split_all([chunk])
    return found.split


def payload_of(codec, data, kind, base=None, mode=WHOLE):
    """The payload; sparse deltas of at most half of the elements only."""
    if codec == raw.NUMBER:
        return data.copy()
    if codec == lz4.NUMBER:
        return np.frombuffer(lz4.encode(data), np.uint8)
    return coder.encode_all([split(codec, data, kind, base, mode)])[0]
