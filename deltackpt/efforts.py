"""The effort at a batch of chunks: encoded small, fast, or stored raw; and why.

Owns   the decision, a pure function of what has been measured and of how far the save is; the words for it.
Never  measures or encodes anything.

By time, a save may take what writing its whole state would, unchanged parts included.  Where most of it did
not change, or the storage is slow, that leaves time for the smallest; where all changed and the storage is
fast it does not.  docs/design/0019-effort.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

from deltackpt.energy import CPU_W, MOVED_J, WHOLE_CPU_S, WRITTEN_J
from deltackpt.errors import InvalidInputError
from deltackpt.rates import Effort, Took

#: What a save is to spare.
Optimize: TypeAlias = Literal["bytes", "time", "energy"]

#: A save of less new bytes takes milliseconds whatever is done: the smallest, and the same every time.
SMALL_SIZE = 32 << 20
#: CPU seconds of all threads for a byte that changed, beside encoding it: compare, identify, plan, copy to
#: the page cache and to the shadow; and of those the ones of the thread that saves, which it cannot share.
BESIDE_CPU_S = 0.6e-9
BESIDE_S = 0.35e-9
#: The flushes at the end: the last of a pack, index, manifest, decision.
END_S = 0.02
#: Late already, what is left must be over in this part of the time that it would take raw: rates are
#: estimates, and other work may have the cores.
_CLEARLY = 0.8
#: Threads of a save beside its encoders.
_N_BESIDE = 2
#: Times that a byte written is moved before: see `energy.moved_size`.
_N_MOVED = 3


class Progress(NamedTuple):
    """How far a save is.

    Parameters
    ----------
    state_size : int
        Bytes of the state.
    left_size : int
        Of those, neither found in the store nor put.
    new_share : float
        The part of them that is expected to have changed.
    new_size : int
        Bytes of what was found to have changed, this batch included.
    elapsed_s : float
        Since the save began.
    encoding_s : float
        CPU seconds that what is being encoded will take.
    unwritten_size : int
        Bytes that are encoded, or being encoded, and not written.
    n_cores : float
        For all that the save does; what others have of them does not count.
    """

    state_size: int
    left_size: int
    new_share: float
    new_size: int
    elapsed_s: float
    encoding_s: float
    unwritten_size: float
    n_cores: float


class Choice(NamedTuple):
    """An effort, and why.

    Examples
    --------
    >>> print(Choice("raw", "encoding would take longer than writing"))
    raw: encoding would take longer than writing
    """

    effort: Effort
    why: str

    def __str__(self) -> str:
        return f"{self.effort}: {self.why}"


def check_optimize(optimize: Any) -> Optimize:
    """Return `optimize` if it is something to optimize for."""
    if optimize not in get_args(Optimize):
        raise InvalidInputError(
            f"optimize: found {optimize!r}, expected one of {', '.join(get_args(Optimize))}",
            hint='optimize="bytes" always stores the smallest',
        )
    return cast(Optimize, optimize)


def choose(
    optimize: Optimize,
    size: int,
    took: Mapping[Effort, Took],
    write_s: float,
    progress: Progress,
    *,
    n_before: int = 2,
) -> Choice:
    """Decide how hard the encoders are to work at a batch.  Reads nothing, changes nothing.

    Parameters
    ----------
    optimize : {"bytes", "time", "energy"}
        bytes: always the smallest.  time: the smallest with which the save is over when writing the whole
        state would be; or, where the storage is what it waits for, clearly sooner than raw.  energy: the
        fewest joules.
    size : int
        Bytes of the batch.
    took : mapping of Effort to Took
        From the smallest result to raw.
    write_s : float
        Seconds a byte of writing.
    progress : Progress
    n_before : int
        Batches of the sort that this save has had: before it goes by old rates, each effort is tried once.

    Examples
    --------
    All of a state of 1 GB changed, and the storage takes 0.2, then 5 GB/s:

    >>> from deltackpt.rates import START
    >>> progress = Progress(10**9, 9 * 10**8, 1.0, 10**8, 0.04, 0.0, 0.0, n_cores=2)
    >>> print(choose("time", 1 << 20, START[True], 5e-9, progress))
    small: no slower than writing the whole state
    >>> print(choose("time", 1 << 20, START[True], 0.2e-9, progress))
    fast: small would be slower than writing the whole state
    >>> print(choose("energy", 1 << 20, START[True], 0.2e-9, progress))
    raw: 5.7 J a GB, fast 7.5, small 10.8
    """
    if optimize == "bytes":
        return Choice("small", "as small as can be")
    if optimize == "time" and progress.new_size + progress.left_size * progress.new_share <= SMALL_SIZE:
        return Choice("small", "little changes")
    found = _thriftiest(took) if optimize == "energy" else _in_time(size, took, write_s, progress)
    levels = _levels(took)
    if found.effort != "small" and n_before < len(levels):
        return Choice(levels[n_before], "to know what it takes")
    return found


def _levels(took: Mapping[Effort, Took]) -> list[Effort]:
    return [effort for effort in took if effort != "raw"]


def _in_time(size: int, took: Mapping[Effort, Took], write_s: float, progress: Progress) -> Choice:
    def end_s(effort: Effort, then: Effort) -> float:
        """When the save would be over with one effort at the batch, and another at what is left."""
        left = progress.left_size * progress.new_share
        cpu_s = progress.encoding_s + size * took[effort].cpu_s + left * (took[then].cpu_s + BESIDE_CPU_S)
        written = progress.unwritten_size + size * took[effort].share + left * took[then].share
        work_s = max(cpu_s / progress.n_cores, written * write_s, left * BESIDE_S)
        return progress.elapsed_s + work_s + END_S

    levels = _levels(took)
    whole_s = progress.state_size * (write_s + WHOLE_CPU_S)
    sooner_s = progress.elapsed_s + _CLEARLY * (end_s("raw", "raw") - progress.elapsed_s)
    for level in levels:
        if end_s(level, level) <= whole_s:
            are = "no slower than" if level == "small" else "small would be slower than"
            return Choice(level, f"{are} writing the whole state")
        if end_s(level, level) <= sooner_s:
            return Choice(level, "writing more would take longer")
    if end_s(levels[-1], "raw") <= whole_s:
        return Choice(levels[-1], "there is time for some of it")
    return Choice("raw", "encoding would be slower than writing the whole state")


def n_cores(n_threads: int, slowdown: float) -> float:
    """Return how many cores a save has, given how many there are and how slow encoders are on them.

    Beside the encoders one thread finds what changed and one writes; what is slower than that explains is
    other work.

    Examples
    --------
    >>> n_cores(2, 1.0), n_cores(2, 2.0), n_cores(2, 4.0)
    (2.0, 2.0, 1.0)
    """
    return n_threads / max(1.0, slowdown / (1 + _N_BESIDE / n_threads))


def joules(took: Took) -> float:
    """Return what a byte takes, by the constants of `energy`, to encode and to write what is left of it."""
    return CPU_W * took.cpu_s + took.share * (WRITTEN_J + _N_MOVED * MOVED_J)


def _thriftiest(took: Mapping[Effort, Took]) -> Choice:
    costs = sorted((joules(of), effort) for effort, of in took.items())
    (least, effort), *others = costs
    told = ", ".join(f"{name} {1e9 * cost:.1f}" for cost, name in others)
    return Choice(effort, f"{1e9 * least:.1f} J a GB, {told}")
