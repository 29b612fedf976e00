"""A report: what one save cost, for people and for programs.

Owns   its fields, its words and its table, and how figures and names read in a line.
Never  measures.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from deltackpt.energy import Energy, by_kind
from deltackpt.groups import TITLES, Coded, GroupCost


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
        By phase of the thread that saves: flatten, compare, chunk, identify, plan, write, publish, commit,
        and, where the run has rules of what to keep, retain; of `Run.save_async` stage, waiting for copies,
        instead of flatten and most of compare.
    total_s : float
        From the call until it was durable, and what the run's rules let go was forgotten.
    stall_s : float
        Of that, until the state might be changed again: all of it, but for `Run.save_async`.
    forgotten : list of int
        Steps that the run's rules let go after this save.
    groups : list of GroupCost
        What the save paid for weights, optimizer moments and the rest, by dtype; `table` shows it.
    energy : Energy
        Joules, and by what they are known: measured, estimated, or some of them each.
    efforts : str
        Which part of what changed was not encoded as small as it can be, and why; empty if all was.

    Examples
    --------
    >>> took = Energy.of({"cpu seconds": 0.02, "bytes moved": 0.001})
    >>> print(SaveReport("main", 7, 2_000_000, 10_000, 9_000, 3, 9, 1, {}, 0.004, energy=took))
    main step 7: 2.0 MB in, 10.0 kB new, 9.0 kB written (0.45 %), 4 ms, ~21 mJ
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
    stall_s: float = 0.0
    forgotten: list[int] = field(default_factory=list)
    groups: list[GroupCost] = field(default_factory=list)
    energy: Energy = field(default_factory=Energy)
    efforts: str = ""

    @property
    def ratio(self) -> float:
        """Bytes written per byte in; 0 for a state without bytes."""
        return self.written_size / self.logical_size if self.logical_size else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {**asdict(self), "groups": [group.to_json() for group in self.groups]}

    def table(self) -> str:
        """Return what the save paid for each group as a table, one line a group and dtype; and the energy.

        Examples
        --------
        >>> cost = GroupCost("weights", "float32", 1000, 4, 500, {"delta-dense": Coded(2, 500, 300)})
        >>> took = Energy.of({"cpu seconds": 0.02, "bytes moved": 0.001})
        >>> report = SaveReport("main", 7, 1000, 500, 400, 1, 4, 2, {}, 0.004, groups=[cost], energy=took)
        >>> print(report.table())
        group    dtype        in  changed  stored       same     delta-dense
        weights  float32  1.0 kB    500 B   300 B  500 B (2)  500 B (2) 0.60
        energy: 21 mJ; estimated: cpu seconds 20 mJ, bytes moved 1 mJ
        """
        efforts = [f"effort: {self.efforts}"] if self.efforts else []
        return "\n".join([table(*cost_lines(self.groups)), *energy_lines(self.energy), *efforts])

    def __str__(self) -> str:
        forgot = f", forgot {', '.join(map(str, self.forgotten))}" if self.forgotten else ""
        efforts = f"; {self.efforts}" if self.efforts else ""
        energy = f", ~{human_energy(self.energy.joules)}" if self.energy.method else ""
        return (
            f"{self.run} step {self.step}: {human_size(self.logical_size)} in, "
            f"{human_size(self.new_size)} new, {human_size(self.written_size)} written "
            f"({100 * self.ratio:.2f} %), {human_time(self.total_s)}{energy}{forgot}{efforts}"
        )


def cost_lines(costs: Sequence[GroupCost]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of a `table`: for each codec used, bytes, chunks, and what they were stored in.

    The last is a part of the bytes: 0.60 is 40 % less than raw.
    """
    used = [name for cost in costs for name in cost.codecs]
    names = sorted(set(used), key=lambda name: (name.startswith("delta"), name))  # whole, then deltas
    rows = [
        [
            TITLES.get(cost.group, cost.group),
            cost.dtype,
            human_size(cost.logical_size),
            human_size(cost.changed_size),
            human_size(cost.stored_size),
            _coded(cost.same, is_stored=False),
            *(_coded(cost.codecs.get(name, Coded())) for name in names),
        ]
        for cost in costs
    ]
    return ["group", "dtype", ">in", ">changed", ">stored", ">same", *(f">{name}" for name in names)], rows


def _coded(coded: Coded, *, is_stored: bool = True) -> str:
    if not coded.n_chunks:
        return ""
    share = f" {coded.stored_size / coded.size:.2f}" if is_stored and coded.size else ""
    return f"{human_size(coded.size)} ({coded.n_chunks}){share}"


def energy_lines(energy: Energy | None) -> list[str]:
    """Return in a line, or in none, what is known of the energy: joules, and each part with its source."""
    if energy is None or not energy.method:
        return []
    told = [
        f"{kind}: {', '.join(f'{name} {human_energy(joules)}' for name, joules in parts.items())}"
        for kind, parts in by_kind(energy.parts).items()
    ]
    return ["; ".join([f"energy: {human_energy(energy.joules)}", *told])]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Return a table as lines; a column whose name starts with ``>`` is aligned right.

    Examples
    --------
    >>> print(table(("name", ">size"), [("w", "1.0 MB"), ("bias", "4 B")]))
    name    size
    w     1.0 MB
    bias     4 B
    """
    right = [column.startswith(">") for column in columns]
    cells = [[one_line(cell) for cell in row] for row in rows]
    header = [column.removeprefix(">") for column in columns]
    widths = [max(map(_width, column)) for column in zip(header, *cells, strict=True)]
    return "\n".join(
        "  ".join(
            " " * (width - _width(cell)) + cell if is_right else cell + " " * (width - _width(cell))
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in ([header] if any(header) else []) + cells
    )


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


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


def human_energy(joules: float) -> str:
    """Return joules as people read them.

    Examples
    --------
    >>> human_energy(0.00042), human_energy(0.25), human_energy(31.4), human_energy(12_000)
    ('420 uJ', '250 mJ', '31.4 J', '12.0 kJ')
    """
    if joules < 1:
        return f"{1e6 * joules:.0f} uJ" if joules < 1e-3 else f"{1e3 * joules:.0f} mJ"
    return f"{joules:.1f} J" if joules < 1000 else f"{joules / 1000:.1f} kJ"
