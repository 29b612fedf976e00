"""The command line: each command parses, calls, prints.

Owns   the commands, as people and scripts meet them.
Never  decides anything, or computes what the library does not.

What only one command needs is imported where it is used: ``deltackpt --help`` must not wait for it.
"""

from deltackpt.cli import files, steps, stores
from deltackpt.cli.group import EXIT_INTERRUPTED, EXIT_PIPE_CLOSED, cli, main

__all__ = ["EXIT_INTERRUPTED", "EXIT_PIPE_CLOSED", "cli", "files", "main", "steps", "stores"]
