"""Bytes made hostile: as bytes, and as the JSON that they are."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

#: What a field of somebody else's file may well be.
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    255,
    2**31,
    2**53,
    2**62,
    2**63,
    2**64,
    10**400,
    -(10**400),
    0.5,
    float("inf"),
    float("nan"),
    "",
    ".",
    "../../etc/passwd",
    "a\0b",
    "\x1b[2J",
    "\ud800",
    "00" * 16,
    "ff" * 32,
    "zz" * 16,
    "x" * 5000,
    [],
    {},
    [[]] * 100,
    {"tensor": 0},
    {"tensor": 10**9},
    {"view": {"tensor": 0, "dtype": "<U5", "shape": [2**40], "strides": [0], "offset": 0}},
    {"dict": [[{"tuple": [1]}, 2]]},
    {"dataclass": ["os:system", {}]},
    {"pickle": 0},
]
NUMBERS = [0, 1, 2, 7, 127, 128, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


def as_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, overwrite, cut, repeat and insert, a few times."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        # Heads say what the rest is; tails say where things are.
        reach = rng.choice([len(out), min(len(out), 64)])
        at = rng.randrange(reach) if reach else 0
        at = len(out) - 1 - at if reach and rng.random() < 0.2 else at
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at : at + rng.choice([1, 4, 8, 40, len(out)])]
        elif kind == 3:
            out[at:at] = out[at : at + rng.randint(1, 100)]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.randint(1, 40))
        else:
            size = rng.choice([1, 2, 4, 8])
            out[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
    return bytes(out)


def as_json(rng: random.Random, data: bytes) -> bytes:
    """Put other values into a document, or take some away; as bytes if it is none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return as_bytes(rng, data)
    root = [document]
    places = _places(root)
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(places)
        try:
            old = holder[key]
        except (IndexError, KeyError):  # it went with what held it
            continue
        kind = rng.randrange(6)
        if kind == 0 and holder is not root:
            del holder[key]
        elif kind == 1:
            holder[key] = [old]
        elif kind == 2 and isinstance(old, int):
            holder[key] = old + rng.choice([-1, 1, 2**32])
        elif kind == 3:
            other, at = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[at])) if _is_there(other, at) else None
        elif kind == 4 and isinstance(old, str):
            holder[key] = as_bytes(rng, old.encode("utf-8", "replace")).decode("latin-1")
        else:
            holder[key] = rng.choice(VALUES)
    return json.dumps(root[0]).encode()


def _places(node: Any) -> list[tuple[Any, Any]]:
    found, todo = [], [node]
    while todo:
        holder = todo.pop()
        for key in range(len(holder)) if isinstance(holder, list) else list(holder):
            found.append((holder, key))
            if isinstance(holder[key], list | dict):
                todo.append(holder[key])
    return found


def _is_there(holder: Any, key: Any) -> bool:
    return key < len(holder) if isinstance(holder, list) else key in holder


def spliced(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Return the beginning of one and the end of another."""
    one, other = rng.choice(seeds), rng.choice(seeds)
    return one[: rng.randint(0, len(one))] + other[rng.randint(0, len(other)) :]
