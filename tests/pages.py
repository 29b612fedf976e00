"""A page as a session: its files, its Python and its commands, in order, in an empty directory.

A block ```` ```python NAME ```` is the file NAME; any other ```` ```python ```` runs here, all of a page in
one module, and what follows ``>>>`` is compared.  The commands of a ```` ```console ```` run in one bash, in
which ``deltackpt`` and ``python`` are processes; their output is compared word by word, numbers aside.
"""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from commands import environment

_BLOCK = re.compile(r"^```(python|console)(?: (\S+))?\n(.*?)^```$", re.M | re.S)
_COMMAND = re.compile(r"^\$ (.+\n(?:> .*\n)*)((?:(?!\$ ).*\n)*)", re.M)
_NUMBER = re.compile(r"\d[\d.]*(e-\d+)?( ([kMG]?B|m?s|[umkM]?J)\b)?")
#: By what joules are known depends on the machine: its counters, and who may read them.
_ENERGY = re.compile(r'^energy: .*|(?<="energy": )\{"joules.*?\}\}')
#: What the commands of a page may call that is not in the PATH.
_FUNCTIONS = {"python": "", "deltackpt": "-m deltackpt"}
_MARK = "----- end of a command"


class Block(NamedTuple):
    """A part of a page that does something."""

    kind: str
    file: str | None
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    """Return what is to be done of a page."""
    text = path.read_text()
    assert not re.search(r"^ +```(python|console)", text, re.M), (
        f"{path.name}: an indented block would not run"
    )
    return [Block(m[1], m[2], m[3], text.count("\n", 0, m.start()) + 1) for m in _BLOCK.finditer(text)]


def perform(path: Path, directory: Path, module: ModuleType) -> None:
    """Do what a page says, in the current directory; its Python runs in `module`, which can be imported."""
    for block in blocks(path):
        if block.kind == "console":
            _check_commands(block, directory, f"{path.name}:{block.line}")
        elif block.file:
            (directory / block.file).write_text(block.text)
        else:
            _run(block, path, module)


def _run(block: Block, path: Path, module: ModuleType) -> None:
    space = vars(module)
    if ">>>" not in block.text:
        exec(compile("\n" * block.line + block.text, str(path), "exec"), space)
        return
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    example = doctest.DocTestParser().get_doctest(block.text, space, path.name, str(path), block.line)
    assert runner.run(example, clear_globs=False).failed == 0, f"{path.name}:{block.line}"
    space.update(example.globs)


def _check_commands(block: Block, directory: Path, where: str) -> None:
    told = [(re.sub(r"^> ", "", m[1], flags=re.M).strip(), m[2]) for m in _COMMAND.finditer(block.text)]
    assert "".join(m[0] for m in _COMMAND.finditer(block.text)) == block.text != "", where
    for (command, expected), printed in zip(told, _outputs([c for c, _ in told], directory), strict=True):
        if command == "echo $?":
            assert int(expected) == int(printed), where
        else:
            assert words(printed) == words(expected), f"{where}: {command}\n{printed}"


def _outputs(commands: list[str], directory: Path) -> list[str]:
    """Return what each command of one bash prints, to stdout and stderr."""
    script = "".join(f'{name}() {{ "{sys.executable}" {args} "$@"; }}\n' for name, args in _FUNCTIONS.items())
    for command in commands:
        script += f"{command}\ncode=$?; printf '\\n%s\\n' '{_MARK}'; (exit $code)\n"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=directory,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout.split(f"\n{_MARK}\n")[:-1]


def words(output: str) -> list[list[str]]:
    """What was printed, word by word; numbers and units as they come out differ from run to run."""
    return [_NUMBER.sub("0", _ENERGY.sub("energy", line)).split() for line in output.rstrip().splitlines()]
