"""Stats: what the steps of a store were handed in as, what they take, and where the difference comes from.

Owns   the sums, by run, step, group of tensors and source of saving; the words for them.
Never  reads a tensor: commits, manifests, lists and the rows of the index know all of it.

Every byte handed in is counted once, at the first of these that holds for its chunk:

    repeated    the same chunk came before in this step
    unchanged   it was in an earlier step of this run
    shared      it is in another run, counted before this one
    new         none of these; encoded, it takes `stored_size`, and the rest of it the encoding saved

A base that no step has itself is counted with the first delta that needs it: no byte handed in, but stored.

Runs are counted by name, steps by number.  A store's sums are those of its visible steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deltackpt import energy, payoff
from deltackpt.energy import Energy
from deltackpt.format import CHUNK_ID_SIZE, RECORD_HEADER, ROW
from deltackpt.groups import GROUPS, TITLES, Group, GroupCost, added, group_of
from deltackpt.manifest import TensorRow
from deltackpt.overview import commits, step_line, totals
from deltackpt.records import Commit
from deltackpt.report import human_energy, human_size
from deltackpt.restore import resolve
from deltackpt.run import Run
from deltackpt.store import Store

Ints = npt.NDArray[np.int64]
_PAYS_FROM = 1.5  # times smaller; less is worth a word on why
_MATTERS_FROM = 0.05  # of all that was handed in
_CHANGES_FROM = 0.8  # of what came after a run's first step


@dataclass(frozen=True, slots=True)
class Sums:
    """What some tensors of some steps were handed in as, and what they take.

    Parameters
    ----------
    logical_size : int
        Bytes handed in.
    repeated_size, unchanged_size, shared_size, new_size : int
        Of them, by where the chunk was before; together `logical_size`.
    stored_size : int
        Bytes that the new chunks take in packs: payload, record header and footer row.
    """

    logical_size: int
    repeated_size: int
    unchanged_size: int
    shared_size: int
    new_size: int
    stored_size: int

    @property
    def encoded_size(self) -> int:
        """Bytes that encoding saved; negative where records take more than it saves."""
        return self.new_size - self.stored_size

    @property
    def factor(self) -> float | None:
        """How many times smaller; None if nothing had to be stored."""
        return self.logical_size / self.stored_size if self.stored_size else None

    def to_json(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {**asdict(self), "encoded_size": self.encoded_size, "factor": self.factor}


@dataclass(frozen=True, slots=True)
class RunSums:
    """A run's sums, as if no other run were there; and how it lies beside the others.

    Parameters
    ----------
    run : str
    n_steps : int
    sums : Sums
        `shared_size` is 0: alone, a run shares nothing.
    only_size : int
        Of its `stored_size`, the bytes that no other run needs: what forgetting it would free.
    """

    run: str
    n_steps: int
    sums: Sums
    only_size: int

    def to_json(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {
            "run": self.run,
            "n_steps": self.n_steps,
            **self.sums.to_json(),
            "only_size": self.only_size,
        }


@dataclass(frozen=True, slots=True)
class EnergySums:
    """What saves took, and about what saves of the same states whole would have.

    Parameters
    ----------
    n_saves, n_steps : int
        Saves that have it on record, of all looked at.
    took : Energy
        The sum.
    whole_joules : float
        `energy.whole` of what those saves were handed in: an estimate by bytes alone, also where the sum is
        measured, and has whatever else the machine did in it.

    Examples
    --------
    >>> print(EnergySums(3, 4, Energy.of({"cpu seconds": 0.5, "bytes written": 0.1}), 2.4))
    energy: 3 of 4 saves took 600 mJ; estimated: cpu seconds, bytes written; saved whole, by bytes: 2.4 J
    """

    n_saves: int
    n_steps: int
    took: Energy
    whole_joules: float

    @classmethod
    def of(cls, commits: Sequence[Commit]) -> EnergySums:
        """Add up what is on record."""
        known = [(c.figures.energy, c.figures.logical_size) for c in commits if c.figures.energy]
        whole_joules = sum(energy.whole(logical_size) for _, logical_size in known)
        return cls(len(known), len(commits), Energy.total(took for took, _ in known), whole_joules)

    def to_json(self) -> dict[str, Any]:
        """Return them as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        saves = f"{self.n_saves} of {_count(self.n_steps, 'save')}"
        whole = f"saved whole, by bytes: {human_energy(self.whole_joules)}"
        return f"energy: {saves} took {human_energy(self.took.joules)}; {self.took.method}; {whole}"


@dataclass(frozen=True, slots=True)
class Stats:
    """What the steps of a store, or of one run, take.

    Parameters
    ----------
    store : str
    run : str or None
        The only run that was looked at; None: all.
    sums : Sums
        Of all steps looked at.
    groups : dict of str to Sums
        The same, by kind of tensor.
    runs : list of RunSums
    steps : list of dict
        What each save cost, as `overview.step_line` says it.
    changed : dict of str to (float or None)
        Of each group, the new part of what was handed in after the first step of each run.
    store_size : int
        Bytes of all files of the store, whatever they are for.
    costs : list of GroupCost
        What the saves said they paid, by group and dtype; what a save found in another run it did not pay.
    payoff : list of str
        What deltas save of it, and why not more, in words.
    energy : EnergySums
        What the saves said they took, against saves of the same states whole.
    """

    store: str
    run: str | None
    sums: Sums
    groups: dict[Group, Sums]
    runs: list[RunSums]
    steps: list[dict[str, Any]]
    changed: dict[Group, float | None]
    store_size: int
    costs: list[GroupCost]
    payoff: list[str]
    energy: EnergySums

    @property
    def kept_size(self) -> int:
        """Bytes that the steps take: the whole store, or of one run its chunks."""
        return self.store_size if self.run is None else self.sums.stored_size

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "store": self.store,
            "run": self.run,
            "n_steps": len(self.steps),
            "store_size": self.store_size,
            "kept_size": self.kept_size,
            "factor": self.sums.logical_size / self.kept_size if self.kept_size else None,
            "sums": self.sums.to_json(),
            "groups": {
                name: {**sums.to_json(), "changed": self.changed[name]} for name, sums in self.groups.items()
            },
            "runs": [run.to_json() for run in self.runs],
            "steps": self.steps,
            "costs": [cost.to_json() for cost in self.costs],
            "payoff": self.payoff,
            "energy": self.energy.to_json(),
            "summary": str(self),
        }

    def __str__(self) -> str:
        energy = [str(self.energy)] if self.energy.n_saves else []
        return "\n".join([self._headline(), *self._sources(), *self._doubts(), *self.payoff, *energy])

    def _headline(self) -> str:
        of = f"run {self.run}" if self.run else _count(len(self.runs), "run")
        kept = "in the store" if self.run is None else "in chunks"
        return (
            f"{_count(len(self.steps), 'step')} of {of}: {human_size(self.sums.logical_size)} handed in, "
            f"{human_size(self.kept_size)} {kept}: {_times(self.sums.logical_size, self.kept_size)}"
        )

    def _sources(self) -> list[str]:
        """Say where the difference comes from, down to what is left."""
        s = self.sums
        lines = [
            (s.unchanged_size, "unchanged since an earlier step of the run"),
            (s.shared_size, "shared with another run"),
            (s.repeated_size, "repeated within a step"),
            (s.encoded_size, "saved by encoding what was new"),
        ]
        told = [
            f"  - {human_size(size)} ({_share(size, s.logical_size)}) {why}"
            for size, why in lines
            if size > 0
        ]
        rest = self.store_size - s.stored_size
        if self.run is None and rest > 0:
            told.append(
                f"  + {human_size(rest)} for lists, manifests and index, and what gc has yet to give back"
            )
        return told

    def _doubts(self) -> list[str]:
        """Say where it does not pay, and why."""
        told = []
        for name, sums in self.groups.items():
            factor = sums.factor
            matters = sums.logical_size >= _MATTERS_FROM * self.sums.logical_size
            if factor is None or factor >= _PAYS_FROM or not matters:
                continue
            changed = self.changed[name]
            if changed is None:
                why = "each run has them in one step only, so there is nothing yet that could be unchanged"
            elif changed >= _CHANGES_FROM:
                why = f"{100 * changed:.0f} % of their bytes change from step to step"
            else:
                why = f"few steps yet; {100 * changed:.0f} % of their bytes change from one to the next"
            coded = _share(sums.encoded_size, sums.new_size) if sums.encoded_size > 0 else "nothing"
            told.append(
                f"does not pay much: {TITLES[name]}, {_times(sums.logical_size, sums.stored_size)}: {why}; "
                f"encoding saves {coded} of what is new"
            )
        return told


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _times(size: int, kept_size: int) -> str:
    if not size or not kept_size:
        return "nothing to compare"
    return (
        f"{size / kept_size:.1f} times smaller"
        if kept_size <= size
        else f"{kept_size / size:.1f} times larger"
    )


def look(store: Store, run: str | None = None) -> Stats:
    """Add up what the steps of a store, or of one of its runs, take.

    Raises
    ------
    NotFoundError
        If the run has no steps, or one is forgotten while this looks.
    CorruptError
        If a manifest, a list or a chunk that a step needs is missing or damaged.

    Examples
    --------
    >>> import numpy as np
    >>> from deltackpt import delta, open_store
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> store = open_store(MemoryBackend(), create=True)
    >>> for step in range(3):
    ...     _ = delta.save({"w": np.arange(100_000), "n": np.array(step)}, store, step=step)
    >>> found = look(store)
    >>> found.sums.logical_size, found.groups["other"].unchanged_size
    (2400024, 1600000)
    """
    shown = commits(store, run)
    every = commits(store)
    chunks = _Chunks(store, every)
    count = _Count(chunks, every)
    looked_at = sorted({commit.slot.run for commit in shown})
    alone = {
        name: RunSums(
            name,
            sum(commit.slot.run == name for commit in shown),
            _sums(count.alone(name)),
            int(chunks.stored_sizes[count.only(name)].sum()),
        )
        for name in looked_at
    }
    table = count.together() if run is None else count.alone(run)
    groups_of = [(c.slot.run, c.figures.groups) for c in shown if c.figures.groups]  # none in old ones
    return Stats(
        store.url,
        run,
        _sums(table),
        {name: _sums(table[i : i + 1]) for i, name in enumerate(GROUPS)},
        list(alone.values()),
        [step_line(commit) for commit in shown],
        dict(zip(GROUPS, count.changed(looked_at), strict=True)),
        totals(store)["size"],
        added([cost for _, groups in groups_of for cost in groups]),
        payoff.words([[g for name, g in groups_of if name == run] for run in looked_at]),
        EnergySums.of(shown),
    )


#: Columns of a table of sums, one row a group; the last is what the new bytes take.
_REPEATED, _UNCHANGED, _SHARED, _NEW, _STORED = range(5)


def _sums(table: Ints) -> Sums:
    by_column = table.sum(axis=0)
    return Sums(int(by_column[:_STORED].sum()), *map(int, by_column))


class _Chunks:
    """Every chunk that some steps need, once, and where it stands in them.

    Tensors of the same root have the same chunks, so each root's lists are read once, however many steps
    have it.
    """

    def __init__(self, store: Store, commits: Sequence[Commit]) -> None:
        self._depth_max = store.depth_max
        self._of_commit: list[list[TensorRow]] = []
        for commit in commits:
            with Run(store, commit.slot.run).reading(commit):
                self._of_commit.append(store.read_manifest(commit).tensors)
        rows = {
            (row.root, row.level, row.size): row for tensors in self._of_commit for row in tensors if row.size
        }
        tables = resolve(store, list(rows.values()))
        ids = np.concatenate([np.zeros((0, CHUNK_ID_SIZE), np.uint8), *(t["id"] for t in tables)])
        # Compared as one value of 32 bytes each: np.unique by axis takes ten times as long.
        whole = np.ascontiguousarray(ids).view(f"V{CHUNK_ID_SIZE}").ravel()
        unique, first, numbers = np.unique(whole, return_index=True, return_inverse=True)
        ends = np.cumsum([len(table) for table in tables], dtype=np.int64)
        self._numbers = {
            root: numbers[end - len(table) : end]
            for root, table, end in zip(rows, tables, ends.tolist(), strict=True)
        }
        found = store.find(np.ascontiguousarray(ids[first]))
        bases = store.bases(found)
        number_of = {i.tobytes(): n for n, i in enumerate(ids[first])} if bases else {}
        others = [(i, row) for i, row in bases.items() if row is not None and i not in number_of]
        number_of |= {i: len(unique) + n for n, (i, _) in enumerate(others)}
        found = np.concatenate([found, *(np.array([row]) for _, row in others)])
        self.n = len(found)
        self.sizes: Ints = found["raw_size"].astype(np.int64)
        self.stored_sizes: Ints = found["stored_size"].astype(np.int64) + RECORD_HEADER.size + ROW.itemsize
        self._base = np.full(self.n, -1, np.int64)
        deltas = np.flatnonzero(found["depth"])
        self._base[deltas] = [number_of.get(base.tobytes(), -1) for base in found["base"][deltas]]

    def of_commit(self, i: int) -> tuple[Ints, Ints, Ints]:
        """Return the numbers of a step's chunks, in order, the groups that they are in, and their bytes.

        Behind them come the bases that they need, in the group of the first that does: they take what they
        take in packs, and are no bytes of this step.
        """
        rows = [row for row in self._of_commit[i] if row.size]
        parts = [self._numbers[row.root, row.level, row.size] for row in rows]
        numbers = np.concatenate([np.zeros(0, np.int64), *parts])
        group_numbers = np.array([GROUPS.index(group_of(r.name, r.dtype, r.shape)) for r in rows], np.int64)
        groups = np.repeat(group_numbers, [len(part) for part in parts])
        sizes = self.sizes[numbers]
        upper, upper_groups = numbers, groups
        for _ in range(self._depth_max):
            is_delta = self._base[upper] >= 0
            upper, first = np.unique(self._base[upper[is_delta]], return_index=True)
            upper_groups = upper_groups[is_delta][first]
            if not len(upper):
                break
            numbers, groups = np.concatenate([numbers, upper]), np.concatenate([groups, upper_groups])
        return numbers, groups, np.concatenate([sizes, np.zeros(len(numbers) - len(sizes), np.int64)])


class _Count:
    """The bytes of some steps, by run, group, and where each chunk was before."""

    def __init__(self, chunks: _Chunks, commits: Sequence[Commit]) -> None:
        self._together: dict[str, Ints] = {}
        self._alone: dict[str, Ints] = {}
        self._later: dict[str, Ints] = {}  # of the steps after the first: what was new, and all
        self._seen: dict[str, npt.NDArray[np.bool_]] = {}
        seen = np.zeros(chunks.n, np.bool_)
        for i, commit in enumerate(commits):
            run = commit.slot.run
            is_first_step = run not in self._seen
            if is_first_step:
                self._together[run], self._alone[run] = (
                    np.zeros((len(GROUPS), 5), np.int64) for _ in range(2)
                )
                self._later[run] = np.zeros((len(GROUPS), 2), np.int64)
                self._seen[run] = np.zeros(chunks.n, np.bool_)
            numbers, groups, sizes = chunks.of_commit(i)
            in_run = self._seen[run]
            is_first = np.zeros(len(numbers), np.bool_)
            is_first[np.unique(numbers, return_index=True)[1]] = True
            alone = np.where(is_first, np.where(in_run[numbers], _UNCHANGED, _NEW), _REPEATED)
            together = np.where((alone == _NEW) & seen[numbers], _SHARED, alone)
            stored_sizes = chunks.stored_sizes[numbers]
            for column, table in ((alone, self._alone[run]), (together, self._together[run])):
                np.add.at(table, (groups, column), sizes)
                new = column == _NEW
                np.add.at(table[:, _STORED], groups[new], stored_sizes[new])
            if not is_first_step:
                np.add.at(self._later[run][:, 0], groups[alone == _NEW], sizes[alone == _NEW])
                np.add.at(self._later[run][:, 1], groups, sizes)
            in_run[numbers] = True
            seen[numbers] = True

    def together(self) -> Ints:
        """Return the sums of all runs, by group and column."""
        return sum(self._together.values(), np.zeros((len(GROUPS), 5), np.int64))

    def alone(self, run: str) -> Ints:
        """Return the sums of one run, as if it were the only one."""
        return self._alone[run]

    def only(self, run: str) -> npt.NDArray[np.bool_]:
        """Return which chunks are in this run and in no other."""
        only = self._seen[run].copy()
        for name, seen in self._seen.items():
            if name != run:
                only &= ~seen
        return only

    def changed(self, runs: Sequence[str]) -> list[float | None]:
        """Return of each group how much of what came after the first steps of runs was new to its run."""
        later = sum((self._later[run] for run in runs), np.zeros((len(GROUPS), 2), np.int64))
        return [float(new / size) if size else None for new, size in later]
