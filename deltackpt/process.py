"""Which process wrote this, and is it dead?  For gc, which waits for writers that live.

Owns   a process's identity, as a plain dict and as a part of a name, and the judgement of one.
Never  decides what follows: a writer wrongly thought dead is fenced and saves again, nothing is lost.
"""

from __future__ import annotations

import os
import re
import socket
from functools import lru_cache
from pathlib import Path
from typing import Any

from blake3 import blake3

_PLACE = ("host", "boot", "pid_ns")
_TAG = re.compile(r"([0-9a-f]{8}|)-([0-9a-f]{8}|)-([0-9a-f]{8}|)-([0-9]{1,10})-([0-9]{1,20})")


def identity() -> dict[str, Any]:
    """Return who this process is: host, boot, pid namespace, pid, and start time in ticks since boot."""
    pid = os.getpid()
    return {**_here(), "pid": pid, "start": _start(pid)}


@lru_cache(maxsize=1)
def _here() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "pid_ns": _link("/proc/self/ns/pid"),
    }


def is_dead(who: dict[str, Any]) -> bool:
    """Return whether a process is known to be dead; False when that cannot be told from here.

    Pids mean something only in the same pid namespace of the same boot of the same host, and a pid that
    was given to another process since has another start time.
    """
    return _is_dead(who, _here())


def _is_dead(who: dict[str, Any], here: dict[str, Any]) -> bool:
    if not here["boot"] or not here["pid_ns"] or who.get("host") != here["host"]:
        return False
    if who.get("boot") != here["boot"]:
        return bool(who.get("boot"))  # the host was started anew since
    pid = who.get("pid")
    if who.get("pid_ns") != here["pid_ns"] or type(pid) is not int:
        return False
    return _start(pid) != who.get("start")


def tag() -> str:
    """Return who this process is in some 40 characters, to be a part of the name of what it writes.

    Examples
    --------
    >>> is_dead_by(tag())
    False
    """
    who = identity()
    return "-".join([*(_short(who[name]) for name in _PLACE), str(who["pid"]), str(who["start"] or 0)])


def is_dead_by(tag: str) -> bool:
    """Return whether the process of a tag is known to be dead, as `is_dead`; False for any other text."""
    found = _TAG.fullmatch(tag)
    if found is None:
        return False
    who = {**dict(zip(_PLACE, found.groups(), strict=False)), "pid": int(found[4]), "start": int(found[5])}
    return _is_dead(who, {name: _short(text) for name, text in _here().items()})


def _short(text: str) -> str:
    return blake3(text.encode("utf-8", "surrogateescape")).hexdigest(length=4) if text else ""


def _start(pid: int) -> int | None:
    """Return a process's start time; None if there is no such process, or only its zombie."""
    stat = _text(f"/proc/{pid}/stat")
    # The command's name may hold spaces and parentheses: fields count from the last one.
    fields = stat.rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[0] not in "ZX" else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()  # a command may be called anything
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)  # noqa: PTH115 - the link's text is no path
    except OSError:
        return ""
