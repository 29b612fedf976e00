"""Incremental training checkpoints: store only what changed, restore any step bit for bit.

>>> from deltackpt import delta
>>> from deltackpt.backends.memory import MemoryBackend
>>> store = MemoryBackend()                       # or a directory: "checkpoints"
>>> report = delta.save({"w": [0.5], "step": 1}, store, step=1)
>>> delta.load(store, step="latest")
{'w': [0.5], 'step': 1}
"""

from deltackpt import delta
from deltackpt.delta import load, read, save
from deltackpt.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptError,
    DeltackptError,
    FormatError,
    InvalidInputError,
    MissingDependencyError,
    NotFoundError,
    StorageError,
    UnsupportedVersionError,
)
from deltackpt.folders import save_files
from deltackpt.loader import LazyArray
from deltackpt.originals import load_files
from deltackpt.pending import Pending
from deltackpt.report import SaveReport
from deltackpt.retention import best, every, every_seconds, last, these
from deltackpt.run import Run, open_run
from deltackpt.store import Store, open_store

__version__ = "0.1.0"

__all__ = [
    "AlreadyExistsError",
    "ConflictError",
    "CorruptError",
    "DeltackptError",
    "FormatError",
    "InvalidInputError",
    "LazyArray",
    "MissingDependencyError",
    "NotFoundError",
    "Pending",
    "Run",
    "SaveReport",
    "StorageError",
    "Store",
    "UnsupportedVersionError",
    "best",
    "delta",
    "every",
    "every_seconds",
    "last",
    "load",
    "load_files",
    "open_run",
    "open_store",
    "read",
    "save",
    "save_files",
    "these",
]
