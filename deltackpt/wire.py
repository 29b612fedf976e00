"""The wire between a process that trains and its process that saves.

Owns   the messages, in which order they go, and how an error, or what is logged, gets across.
Never  goes to anybody but the two: a socket pair that only they have, so that messages may be pickled.

    trains                                  saves
    Hello                        ->
                                 <-         Ready
    What                         ->
                                 <-         Opened, or Failed
    Plan, Found..., Settle       ->
                                 <-         Settled
    Found..., End or Fail        ->
                                 <-         Done, or Failed

Each answer may come after any number of Logged.  After an error the one that saves reads on to End or Fail,
and answers only then; what comes it takes in at once, also while it waits to get a Logged across: so neither
ever waits for one that waits for it.
"""

from __future__ import annotations

import signal
import threading
import traceback
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from deltackpt.arena import Place
from deltackpt.energy import Energy
from deltackpt.errors import DeltackptError
from deltackpt.memory import Ends, Memory
from deltackpt.report import SaveReport
from deltackpt.types import Framework

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

#: Sent to a whole job: the process that trains decides, and may want a last step saved.
_NAMES = {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"}
SIGNALS = frozenset(number for number in signal.Signals if number.name in _NAMES)
#: Name, dtype, shape and framework of a tensor.
Bare: TypeAlias = tuple[str, str, tuple[int, ...], Framework]


class Hello(NamedTuple):
    """Which run's steps are to be saved, and what is remembered of its last one."""

    store: str
    run: str
    shadow_size_max: int
    memory: Memory | None
    last_step: int | None


class Ready(NamedTuple):
    """There is a process, and it can save."""


class Opened(NamedTuple):
    """The session is open.

    Parameters
    ----------
    refused : list of str
        Names of the remembered tensors that the save may not rely on.
    found_step : int or None
        As of `Saver`.
    is_new : bool
        Whether the run has no step.
    """

    refused: list[str]
    found_step: int | None
    is_new: bool


class Plan(NamedTuple):
    """A state without its bytes.

    Parameters
    ----------
    structure : Json
    tensors : list of Bare, or None
        None: those of the step before.
    likest : Memory or None
        Of a run that is new, a step of another run that its first one is like: bytes are compared for it.
    """

    structure: Any
    tensors: list[Bare] | None
    likest: Memory | None


class Found(NamedTuple):
    """A tensor that was looked at: the same as it was, if it has no place."""

    at: int
    place: Place | None
    fingerprints: list[bytes]


class Settle(NamedTuple):
    """Save what there is so far."""


class Settled(NamedTuple):
    """That is saved: how many bytes of copies are needed still, and in which pieces; None: nobody saves."""

    kept_size: int | None
    held: list[int]


class End(NamedTuple):
    """That was all; and the energy it took the process that trains."""

    energy: Energy


class Fail(NamedTuple):
    """The state could not be copied to its end."""

    why: str


class Done(NamedTuple):
    """The step is durable.

    Parameters
    ----------
    report : SaveReport
    cuts : dict of int to (Ends, list of bytes)
        Ends and fingerprints of the chunks of each tensor that is not cut as it was, by its place.
    shadow_size : int
    held : list of int
    """

    report: SaveReport
    cuts: dict[int, tuple[Ends, list[bytes]]]
    shadow_size: int
    held: list[int]


class Failed(NamedTuple):
    """The step is not saved."""

    error: BaseException
    held: list[int]


class Logged(NamedTuple):
    """What was logged."""

    level: int
    text: str


class Wire:
    """One end of it.

    Parameters
    ----------
    connection : multiprocessing.connection.Connection
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()  # what threads log goes between other messages, not into them

    def send(self, message: Any) -> None:
        """Send one message."""
        with self._lock:
            self._connection.send(message)

    def receive(self) -> Any:
        """Wait for the next one.

        Raises
        ------
        EOFError, ConnectionError
            If the other end is gone.
        """
        return self._connection.recv()

    def close(self) -> None:
        """Close this end."""
        self._connection.close()


class PromptWire(Wire):
    """An end that takes in what comes when it comes: the other never waits for what is done with it.

    Parameters
    ----------
    connection : multiprocessing.connection.Connection
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._queue: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._take_in, daemon=True).start()

    def _take_in(self) -> None:
        try:
            while True:
                self._queue.put(super().receive())
        except BaseException as e:
            self._queue.put(e)

    def receive(self) -> Any:
        """See `Wire.receive`."""
        message = self._queue.get()
        if isinstance(message, BaseException):
            self._queue.put(message)  # for whoever asks again
            raise message
        return message


def portable(error: BaseException) -> BaseException:
    """Return an error as it gets across: what is ours as it is, anything else by its class, with its trace.

    Examples
    --------
    >>> portable(KeyError("x")).args
    ('x',)
    """
    trace = "".join(traceback.format_exception(error))
    if not isinstance(error, DeltackptError) and type(error).__module__ != "builtins":
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error = error.with_traceback(None)
    error.__cause__ = error.__context__ = None
    error.add_note(f"In the process that saves:\n{trace}")
    return error
