"""Pickles: objects of no plain form, for those who ask for them twice, at save and at load.

Owns   the only call that executes what a store holds.
Never  makes it without ``allow_pickle=True``: whoever can write to the store can run code in the reader.
"""

from __future__ import annotations

import pickle
from typing import Any

from deltackpt.errors import FormatError, InvalidInputError

#: Protocol 5 is Python 3.8's: every Python that runs this reads it.
_PROTOCOL = 5


def to_bytes(x: object, where: str) -> bytes:
    """Pickle an object; `InvalidInputError` naming `where` if that cannot be done."""
    try:
        return pickle.dumps(x, _PROTOCOL)
    except Exception as error:  # what an object's own __reduce__ raises is anything
        raise InvalidInputError(
            f"{where}: cannot be pickled: {type(error).__name__}: {error}", hint="leave it out"
        ) from error


def from_bytes(data: bytes, where: str) -> Any:
    """Unpickle an object: **this runs code that `data` chooses**; `FormatError` if that raises."""
    try:
        return pickle.loads(data)
    except Exception as error:  # as above, and hostile bytes raise anything
        raise FormatError(
            f"{where}: cannot be unpickled: {type(error).__name__}: {error}",
            hint="import what it needs, or leave it out with keys=",
        ) from error
