"""A report: what one save cost, for people and for programs.

Owns   its fields and its words.
Never  measures.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What one save cost.

    Parameters
    ----------
    run, step : str, int
    logical_size : int
        Bytes of the state's tensors ("bytes in").
    new_size : int
        Of those, bytes in chunks the store did not have; lists of chunks included.
    written_size : int
        Bytes of all files this save left in the store.
    n_tensors, n_chunks, n_new_chunks : int
    seconds : dict of str to float
        By phase of the calling thread: flatten, compare, chunk, identify, write, publish, commit, and, where
        the run has rules of what to keep, retain.
    total_s : float
        From the call to its return.
    forgotten : list of int
        Steps that the run's rules let go after this save.

    Examples
    --------
    >>> print(SaveReport("main", 7, 2_000_000, 10_000, 9_000, 3, 9, 1, {}, 0.004))
    main step 7: 2.0 MB in, 10.0 kB new, 9.0 kB written (0.45 %), 4 ms
    """

    run: str
    step: int
    logical_size: int
    new_size: int
    written_size: int
    n_tensors: int
    n_chunks: int
    n_new_chunks: int
    seconds: dict[str, float]
    total_s: float
    forgotten: list[int] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Bytes written per byte in; 0 for a state without bytes."""
        return self.written_size / self.logical_size if self.logical_size else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        forgot = f", forgot {', '.join(map(str, self.forgotten))}" if self.forgotten else ""
        return (
            f"{self.run} step {self.step}: {human_size(self.logical_size)} in, "
            f"{human_size(self.new_size)} new, {human_size(self.written_size)} written "
            f"({100 * self.ratio:.2f} %), {human_time(self.total_s)}{forgot}"
        )


def human_size(size: int) -> str:
    """Return bytes in decimal units, three digits or so.

    Examples
    --------
    >>> human_size(999), human_size(1_500_000)
    ('999 B', '1.5 MB')
    """
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} PB"


def one_line(text: str) -> str:
    """Return a name as it can stand in a line: without what ends it, or what a terminal obeys.

    Examples
    --------
    >>> one_line("w" + chr(10) + "changed  x")
    'w\\\\nchanged  x'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def human_time(seconds: float) -> str:
    """Return seconds as people read them.

    Examples
    --------
    >>> human_time(0.0042), human_time(3.14159)
    ('4 ms', '3.1 s')
    """
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
