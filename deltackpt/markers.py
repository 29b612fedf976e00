"""Markers: a small file that stands where a framework expects its checkpoint, for a step of a run.

Owns   the bytes of it, putting it there, the runs that markers name, which step a path may take.
Never  saves or loads a step.

A marker is put down once its step is durable, and taken away before the step is forgotten, so that no kill
leaves one without its step.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from deltackpt import targets
from deltackpt.errors import DeltackptError, InvalidInputError, NotFoundError
from deltackpt.records import Commit
from deltackpt.run import Run, open_run
from deltackpt.store import Store, open_store

log = logging.getLogger("deltackpt")

_KIND = "deltackpt-marker-1"
_SIZE_MAX = 16 << 10

PathLike: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Marker:
    """What stands at a path.

    Parameters
    ----------
    store : str
        Where the store was, for people.
    run, step : str, int
    sid : str
        The session that saved the step: a step saved over it is another.

    Examples
    --------
    >>> Marker("/data/ckpts", "main", 20, "00ff").to_bytes()
    b'{"kind": "deltackpt-marker-1", "store": "/data/ckpts", "run": "main", "step": 20, "sid": "00ff"}\\n'
    """

    store: str
    run: str
    step: int
    sid: str

    @classmethod
    def of(cls, run: Run, commit: Commit) -> Marker:
        """Return the marker of a step."""
        return cls(run.store.url, commit.slot.run, commit.slot.step, commit.sid.hex())

    @classmethod
    def at(cls, path: PathLike, *, follow: bool = True) -> Marker | None:
        """Return the marker at a path; None if there is none, or something else.

        Parameters
        ----------
        path : path-like
        follow : bool
            Whether a link stands for what it leads to.
        """
        where = Path(path)
        if _is_url(path) or (not follow and os.path.islink(where)):  # noqa: PTH114 - False of what is no path
            return None
        try:
            content: Any = json.loads(_read(where) or b"")
        except (ValueError, RecursionError):
            return None
        if not isinstance(content, dict) or content.pop("kind", None) != _KIND:
            return None
        texts = [content.get(name) for name in ("store", "run", "sid")]
        step = content.get("step")
        if not all(isinstance(text, str) for text in texts) or type(step) is not int or len(content) != 4:
            return None
        return cls(**content)

    def to_bytes(self) -> bytes:
        """Return the file's bytes."""
        return json.dumps({"kind": _KIND, **asdict(self)}).encode() + b"\n"

    def put(self, path: PathLike) -> None:
        """Stand at a path, durably, in the place of what is there.

        Raises
        ------
        StorageError
            If the file cannot be written; what was there is as it was.
        """
        where = Path(path)
        with targets.replacing(where) as file, targets.storage_errors(where):
            file.write(self.to_bytes())

    def names(self, commit: Commit) -> bool:
        """Return whether it stands for this very step."""
        return self.sid == commit.sid.hex()

    def commit(self, run: Run) -> Commit:
        """Return the record of the step, in an open run of its name.

        Raises
        ------
        NotFoundError
            If it was forgotten, or saved over.
        """
        try:
            commit = run.commit(self.step)
        except NotFoundError as e:
            raise NotFoundError(f"{e.message}; the marker is of the store {self.store}", hint=e.hint) from e
        if not self.names(commit):
            raise NotFoundError(
                f"run {self.run!r} step {self.step}: is not the one that was meant, but saved over it since",
                hint="load another",
            )
        return commit


class Runs:
    """The runs of a store that markers name, opened when they are asked for.

    Parameters
    ----------
    store : path-like
    options_of : callable
        Given a run's name, the options of `deltackpt.open_run` for it.
    """

    def __init__(self, store: PathLike, options_of: Callable[[str], dict[str, Any]]) -> None:
        self.store = os.fspath(store)
        self._options_of = options_of
        self._opened: dict[str, Run] = {}

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._opened.values()))

    def open(self, name: str, *, create: bool = False) -> Run:
        """Return a run.

        Raises
        ------
        NotFoundError
            If there is no store, and `create` is false.
        """
        if name not in self._opened:
            self._opened[name] = open_run(self._store(create), name, **self._options_of(name))
        return self._opened[name]

    def names(self) -> list[str]:
        """Return the names of all runs that the store has, sorted; none if there is no store."""
        try:
            return self._store(create=False).refs.runs()
        except NotFoundError:
            return []

    def free(self, name: str, step: int, path: str) -> tuple[Run, bool]:
        """Return the run in which a path may save a step, and whether it is to say `overwrite`.

        That is the run `name`, or, if it has the step already, ``name-2``, ``name-3`` and so on: a framework
        may save several checkpoints of one step, and each is a state of its own.  A step that was saved for
        this path and that no marker there names was left by a kill, and is saved over.  Nothing else is: of
        two jobs that come to a step of one run at once the second is to be told.

        Parameters
        ----------
        name : str
        step : int
        path : str
            As `metadata_of` writes it down.
        """
        standing = Marker.at(path, follow=False)
        for i in itertools.count(1):
            run = self.open(name if i == 1 else f"{name}-{i}", create=True)
            _, commit = run.store.refs.slot(run.name, step)
            if commit is None:
                return run, False
            if path_of(commit) == path and not (standing and standing.names(commit)):
                return run, True
        raise AssertionError

    def forget(self, marker: Marker) -> None:
        """Forget the step of a marker that is gone, unless it was saved over; what fails is a warning."""
        try:
            run = self.open(marker.run)
            marker.commit(run)
            run.forget([marker.step])
        except NotFoundError:
            pass  # others were first
        except DeltackptError as e:
            log.warning("run %r step %d is not forgotten: %s", marker.run, marker.step, e.message)

    def _store(self, create: bool) -> Store:
        one = next(iter(self), None)
        return one.store if one else open_store(self.store, create=create)

    def close(self) -> None:
        """Close all of them; they are opened anew when they are asked for."""
        opened, self._opened = self._opened, {}
        for run in opened.values():
            run.close()


def check_options(who: str, options: Mapping[str, Any]) -> None:
    """Refuse options of `deltackpt.open_run` that are not about how a step is saved."""
    unknown = options.keys() - {"shadow", "memory_max", "audit_every", "optimize"}
    if unknown:
        raise InvalidInputError(
            f"{who}: found {', '.join(sorted(unknown))}, expected options of saves",
            hint="shadow, memory_max, audit_every, optimize",
        )


def metadata_of(path: str) -> dict[str, Any]:
    """Return what a step's record says of the path that it is saved for."""
    return {"path": path}


def path_of(commit: Commit) -> str | None:
    """Return the path that a step was saved for; None if for none."""
    path = commit.metadata.get("path")
    return path if isinstance(path, str) else None


def place_for(path: PathLike) -> str:
    """Return an absolute path, links kept, whose directory is there.

    Raises
    ------
    InvalidInputError
        If it is a URL.
    StorageError
        If the directory cannot be made.
    """
    if _is_url(path):
        raise InvalidInputError(
            f"{os.fspath(path)}: a marker stands in a local directory only",
            hint="give a path of this machine",
        )
    where = Path(path).absolute()
    targets.make_directory(where.parent)
    return str(where)


def stand_in(path: PathLike, other: PathLike) -> bool:
    """Have a link to another path stand at one where nothing does; return whether it does.

    It does not where the other is not there, or on a system without links.
    """
    where, target = Path(path), Path(other)
    if _is_url(other) or not target.exists() or os.path.lexists(where):
        return False
    try:
        where.symlink_to(os.path.relpath(target.resolve(), where.parent.resolve()))
    except OSError:
        return False
    return True


def take_away(path: PathLike) -> None:
    """Remove a marker; durable on return."""
    where = Path(path)
    with targets.storage_errors(where):
        where.unlink(missing_ok=True)
    targets.flush_names(where.parent)


def text_at(path: PathLike) -> str | None:
    """Return the small text that a framework keeps beside its markers; None if there is none.

    Raises
    ------
    StorageError
        If it cannot be read.
    """
    data = _read(Path(path))
    return None if data is None else data.decode(errors="replace")


def _read(path: Path) -> bytes | None:
    """Return what a file holds; None if it is not there, is no file, or is too large to be one of ours."""
    with targets.storage_errors(path):
        if not path.is_file():
            return None
        with path.open("rb") as file:
            data = file.read(_SIZE_MAX + 1)
    return data if len(data) <= _SIZE_MAX else None


def _is_url(path: PathLike) -> bool:
    return "://" in os.fspath(path)
