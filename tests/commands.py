"""The command as a real process."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import deltackpt


class Done(NamedTuple):
    """How a process ended."""

    returncode: int
    stdout: str
    stderr: str


def environment(**env: str) -> dict[str, str]:
    """This process's, in which the package is found, without what would change its output."""
    ours = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "DELTACKPT_STORE", "COLUMNS"}}
    return {**ours, "PYTHONPATH": str(Path(deltackpt.__file__).parents[1]), **env}


def start(*args: object, stdout: int, stderr: int, **env: str) -> subprocess.Popen[bytes]:
    """Start the command."""
    command = [sys.executable, "-m", "deltackpt", *map(str, args)]
    return subprocess.Popen(command, env=environment(**env), stdout=stdout, stderr=stderr)


def process(*args: object, **env: str) -> Done:
    """Run the command, its output to pipes."""
    with start(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **env) as running:
        stdout, stderr = running.communicate()
    return Done(running.returncode, stdout.decode(), stderr.decode())


def on_terminal(*args: object, **env: str) -> Done:
    """Run the command, its output to two terminals."""
    (out, their_out), (err, their_err) = pty.openpty(), pty.openpty()
    running = start(*args, stdout=their_out, stderr=their_err, **{"TERM": "xterm-256color", **env})
    os.close(their_out)
    os.close(their_err)
    stdout, stderr = _read_all(out), _read_all(err)
    return Done(running.wait(), stdout.replace("\r\n", "\n"), stderr.replace("\r\n", "\n"))


def on_one_terminal(*args: object, **env: str) -> tuple[int, list[str]]:
    """Run the command, all its output to one terminal; return the exit code and the lines left there."""
    ours, theirs = pty.openpty()
    running = start(*args, stdout=theirs, stderr=theirs, **{"TERM": "xterm-256color", **env})
    os.close(theirs)
    shown = _read_all(ours).replace("\r\n", "\n")
    return running.wait(), [_overwritten(line) for line in shown.split("\n")]


def _overwritten(line: str) -> str:
    """What a terminal shows of a line that goes back to its start and writes over itself."""
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


def _read_all(fd: int) -> str:
    parts = []
    while True:
        try:
            part = os.read(fd, 1 << 16)
        except OSError:  # EIO: the last of the other side is closed
            part = b""
        if not part:
            os.close(fd)
            return b"".join(parts).decode()
        parts.append(part)
