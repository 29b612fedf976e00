"""The group of all commands: how it starts, which store it is about, how it ends.

Owns   the root's options, exit codes, and what becomes of errors.
Never  does a command's work.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import click

import deltackpt
from deltackpt.cli.options import quiet_option, store_path
from deltackpt.cli.printing import Notes, note
from deltackpt.errors import DeltackptError, StorageError

# 128 and the signal's number, as shells say it.
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE_CLOSED = 128 + signal.SIGPIPE


class Failure(click.ClickException):
    """A `DeltackptError` as click reports it."""

    def __init__(self, error: DeltackptError, exit_code: int | None = None) -> None:
        super().__init__(error.message)
        self.hint = error.hint
        self.exit_code = error.exit_code if exit_code is None else exit_code  # type: ignore[misc]

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it on stderr."""
        note(f"error: {self.message}")
        if self.hint:
            note(f"hint: {self.hint}")


class Group(click.Group):
    """The group of all commands: gives our errors their exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except DeltackptError as e:
            raise Failure(e) from e
        except BrokenPipeError:  # whoever read us has seen enough
            _drop_output()
            raise click.exceptions.Exit(EXIT_PIPE_CLOSED) from None
        except OSError as e:
            _drop_output()
            raise Failure(StorageError(f"output: {e.strerror or e}", errno=e.errno)) from e
        except KeyboardInterrupt:
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands as they were added: in the order in which people meet them."""
        return list(self.commands)


def _drop_output() -> None:
    """Let what stdout still holds go nowhere, so that the interpreter can close it without an error."""
    if sys.stdout is not None:
        with suppress(io.UnsupportedOperation):  # a buffer in memory, as in tests
            stdout, null = sys.stdout.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stdout)
            os.close(null)


def _whole(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Return a stream that writes all it is given or raises, and can write every name."""
    binary, encoding = stream.buffer, stream.encoding
    if isinstance(binary, io.RawIOBase):
        # PYTHONUNBUFFERED: a full disk or a closed pipe may take half of a text, and nobody would know.
        stream.detach()
        stream = io.TextIOWrapper(io.BufferedWriter(binary), encoding, line_buffering=True)
    stream.reconfigure(errors="backslashreplace")  # a name must not be too exotic to be listed
    return stream


def main() -> None:
    """Run the command, as ``deltackpt`` and as ``python -m deltackpt``."""
    logging.basicConfig(handlers=[Notes()])
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _whole(stream))
    try:
        cli(prog_name="deltackpt")
    except KeyboardInterrupt:  # while arguments were parsed
        sys.exit(EXIT_INTERRUPTED)


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(deltackpt.__version__, "-V", "--version", message="%(prog)s %(version)s")
@click.option(
    "-s",
    "--store",
    type=click.Path(path_type=Path),
    envvar="DELTACKPT_STORE",
    show_envvar=True,
    callback=store_path,
    help="The store's directory. Default: the current directory if it is a store, else ./checkpoints.",
)
@quiet_option
@click.pass_context
def cli(ctx: click.Context, store: Path) -> None:
    """Incremental training checkpoints: store only what changed, restore any step bit for bit.

    What a command found or did goes to stdout, errors and progress to stderr. Every command has its own
    --help, and every one but completion --json.

    \b
    Exit codes:
      0    done
      1    it is there already, or a package is missing
      2    wrong usage or input
      3    no such store, run, step, metric or file
      4    another writer won: save again
      5    unreadable bytes
      6    the storage failed
      130  interrupted
      141  whoever read the output closed it
    Of verify and repair, 1 means that the store is damaged, 2 that they failed.

    \b
    Examples:
      deltackpt save 'ckpt/step_*.pt'
      deltackpt ls
      deltackpt restore --step latest -o model.safetensors
    """
    ctx.obj = store
