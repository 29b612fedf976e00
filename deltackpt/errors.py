"""What can go wrong, grouped by what the catcher does next.

Owns   every exception the package raises on purpose, its hint and its exit code for the command line.
Never  decides when to raise one.
"""

from __future__ import annotations

from errno import EDQUOT, ENOSPC
from functools import partial
from typing import Any


class DeltackptError(Exception):
    """Anything deltackpt raises on purpose.

    Parameters
    ----------
    message : str
        Where: what was found, what was expected, with the values.
    hint : str, optional
        What to try next, as an imperative.

    Examples
    --------
    >>> raise_hint = NotFoundError("run 'main' has no step 7", hint="deltackpt ls --run main")
    >>> raise_hint.hint
    'deltackpt ls --run main'
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class InvalidInputError(DeltackptError, ValueError):
    """The call is wrong: fix the call."""

    exit_code = 2


class NotFoundError(DeltackptError, LookupError):
    """There is no such thing here: ask for something else."""

    exit_code = 3


class AlreadyExistsError(DeltackptError, FileExistsError):
    """The step is taken: choose another, or overwrite."""


class ConflictError(DeltackptError):
    """Another writer won, or gc gave this one up for dead: save again."""

    exit_code = 4


class FormatError(DeltackptError):
    """These bytes cannot be read."""

    exit_code = 5


class UnsupportedVersionError(FormatError):
    """Written by a newer deltackpt: upgrade."""


class CorruptError(FormatError):
    """Bytes are missing or changed: run verify, try another copy."""


class StorageError(DeltackptError, OSError):
    """The disk or the network failed.

    Parameters
    ----------
    message : str
        Where it failed and how.
    errno : int, optional
        The operating system's error number, where there is one.
    """

    exit_code = 6

    def __init__(self, message: str, *, hint: str | None = None, errno: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno

    @property
    def is_full(self) -> bool:
        """Whether there was no room left, on the disk or in a quota."""
        return self.errno in (ENOSPC, EDQUOT)

    def __reduce__(self) -> tuple[Any, ...]:
        """What an `OSError` says of itself when it is pickled leaves the number out."""
        return partial(type(self), hint=self.hint, errno=self.errno), (self.message,), self.__dict__


class MissingDependencyError(DeltackptError, ImportError):
    """An optional package is needed: install it."""
