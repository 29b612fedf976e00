"""Directories as checkpoints are: made of a dict, and told by all that is to come back of them."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np


def facts(root: Path) -> dict[str, tuple[object, ...]]:
    """All that is to come back of a file or a directory, by path."""
    found = {}
    for path in [root, *sorted(root.rglob("*"))] if root.is_dir() else [root]:
        of = path.lstat()
        what: object = None
        if stat.S_ISLNK(of.st_mode):
            found[os.path.relpath(path, root)] = ("link", os.readlink(path))  # noqa: PTH115
            continue
        if path.is_file():
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        found[os.path.relpath(path, root)] = (stat.filemode(of.st_mode), of.st_mtime_ns, what)
    return found


def made(root: Path, tree: dict[str, Any]) -> Path:
    """Make a directory: bytes are files, dicts directories, strings links."""
    root.mkdir()
    for name, what in tree.items():
        if isinstance(what, dict):
            made(root / name, what)
        elif isinstance(what, str):
            (root / name).symlink_to(what)
        else:
            (root / name).write_bytes(what)
            os.utime(root / name, ns=(0, 1_600_000_000_123_456_789))
    return root


def npz(seed: int = 0, save: Any = np.savez) -> bytes:
    rng = np.random.default_rng(seed)
    save(file := io.BytesIO(), w=rng.standard_normal((50, 40)).astype(np.float32), n=rng.integers(0, 9, 99))
    return file.getvalue()


TREE: dict[str, Any] = {
    "config.json": b'{"a": 1}',
    "empty": b"",
    "large.bin": bytes(range(256)) * 6000,
    "w.npz": npz(),
    "packed.npz": npz(save=np.savez_compressed),
    "no_tensors.pt": b"PK\x03\x04 not",
    "deep": {"er": {"w.npz": npz(1), "up": "../../config.json", "here": "w.npz"}, "none": {}},
    "link": "deep/er",
    "dangling": "nowhere",
    "ünï cödé\n": b"x",
}
