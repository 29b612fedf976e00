"""DeepSpeed: a checkpoint engine on a store.

Owns   which file of a tag is which step, and that a tag is there for all ranks or for none.
Never  decides what a tag holds, or which is the latest: DeepSpeed writes that down, once all have committed.

At the path of each file stands a marker, see `deltackpt.markers`.  Every rank writes files of its own, so
each file is a run of its own, whose steps are the tags.  Which tags stay is decided once for all files.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from typing import Any, NamedTuple

from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo, TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from deltackpt.errors import DeltackptError, InvalidInputError
from deltackpt.integrations.torch import on_all, place
from deltackpt.markers import (
    Marker,
    PathLike,
    Runs,
    check_options,
    metadata_of,
    path_of,
    place_for,
    take_away,
    text_at,
)
from deltackpt.records import Commit
from deltackpt.retention import Rule
from deltackpt.run import Run
from deltackpt.types import State

log = logging.getLogger("deltackpt")

#: Objects that DeepSpeed puts into its states, by what they are called there.
_OBJECTS = {kind.__name__: kind for kind in (LossScaler, DynamicLossScaler)}
_TAG = "__deepspeed__"
#: What DeepSpeed calls the file that names the latest tag.
_LATEST = "latest"


class _Written(NamedTuple):
    """A step that is saved, and has no marker yet."""

    path: str
    marker: Marker
    before: Marker | None


class _Saved(NamedTuple):
    """A step that is a file of a tag, and whether a marker stands for it."""

    run: Run
    commit: Commit
    path: str
    is_there: bool


class DeltaCheckpointEngine(TorchCheckpointEngine):
    """Saves and loads an engine's checkpoints: ``engine.checkpoint_engine = DeltaCheckpointEngine("ckpts")``.

    Parameters
    ----------
    store : path-like
        Made if it is not there; on every rank the same.
    run : str
        What the runs' names begin with: ``main.mp_rank_00_model_states``.
    keep : Rule, optional
        Which tags stay.  The others go, each whole, when the next save begins; by then DeepSpeed has written
        down which is the latest.
    allow_pickle : bool
        Pickle what has no plain form, and unpickle it, and load files of DeepSpeed's own, which both run code
        that their writer chose.
    **options
        As of `deltackpt.open_run`: ``shadow``, ``memory_max``, ``audit_every``, ``optimize``.

    Raises
    ------
    InvalidInputError
        If what a file is to hold has no plain form; the message says where it is.
    DeltackptError
        As of `deltackpt.delta.save` and `deltackpt.delta.load`; of a save on every rank, by ``commit``.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        run: str = "main",
        *,
        keep: Rule | None = None,
        allow_pickle: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.zipfile_serialization = True
        check_options("DeltaCheckpointEngine", options)
        if not isinstance(keep, Rule | None):
            raise InvalidInputError(
                f"keep: found {keep!r}, expected a rule", hint="keep=last(3) | every(1000)"
            )
        self.store = os.fspath(store)
        self.run = run
        self.keep = keep
        self.allow_pickle = allow_pickle
        self._runs = Runs(self.store, lambda name: options)
        self._resumed: int | None = None
        self._step = 0
        self._directory = ""
        self._written: list[_Written] = []
        self._error: Exception | None = None

    # -- what DeepSpeed calls

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin a tag; let go of those that no rule keeps."""
        self._step = _step_of(str(info.tag))
        self._directory = f"{os.path.abspath(info.save_dir)}/{info.tag}/"  # noqa: PTH100 - links kept
        self._written, self._error = [], None
        rank, _ = place()
        # One decides for the files of all: ranks know different ones, and not yet those of a tag not loaded.
        if self.keep is not None and rank == 0:
            try:
                self._thin(self.keep, os.path.realpath(info.save_dir))
            except DeltackptError as e:
                log.warning("runs %r: not all tags that may go are forgotten: %s", self.run, e.message)

    def save(self, state_dict: State, path: PathLike) -> None:
        """Save a file of the tag; durable on return, and there from ``commit`` on.

        What is not in the tag's directory, as of ``save_16bit_model``, is for others, and saved as a file.
        What goes wrong is raised by ``commit``, on all ranks: they are to meet there.
        """
        try:
            where = place_for(path)
            if not os.path.abspath(where).startswith(self._directory):  # noqa: PTH100 - as that is
                super().save(state_dict, where)
                return
            before = Marker.at(where, follow=False)
            run, overwrite = self._runs.free(self._run_of(where), self._step, where)
            run.save(
                _plain(state_dict),
                step=self._step,
                metadata=metadata_of(where),
                overwrite=overwrite,
                allow_pickle=self.allow_pickle,
            )
            marker = Marker.of(run, run.commit(self._step))
            self._written.append(_Written(where, marker, before))
        except Exception as e:
            self._error = self._error or e

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Put the tag's markers down, once all ranks have saved; on an error there is no tag, and all raise.

        Rank 0 writes ``latest`` as soon as this returns, so it returns when the markers of all ranks stand.
        """
        written, self._written = self._written, []
        try:
            on_all(self._check)
        except Exception:
            for one in written:
                self._runs.forget(one.marker)
            raise
        on_all(lambda: self._put(written))
        for one in written:
            if one.before is not None:
                self._runs.forget(one.before)
        return True

    def load(self, path: PathLike, map_location: Any = None) -> State:
        """Load a file of a tag, onto the CPU unless a device is named."""
        marker = Marker.at(path)
        if marker is None and not self.allow_pickle:
            raise InvalidInputError(
                f"{os.fspath(path)}: is no marker of deltackpt, and a file of DeepSpeed's own may run code",
                hint="if you trust who wrote it, say allow_pickle=True",
            )
        if marker is None:
            return super().load(path, map_location)
        run = self._runs.open(marker.run)
        marker.commit(run)
        self._resumed = marker.step
        # A function is DeepSpeed's way to say the CPU: lambda storage, location: storage.
        device = None if callable(map_location) else map_location
        return _object(run.load(marker.step, map=device, allow_pickle=self.allow_pickle))

    def preserves_storage_sharing(self) -> bool:
        """Return False: of a view only its own elements are stored, so DeepSpeed need not clone it."""
        return False

    # -- below

    def _run_of(self, path: str) -> str:
        file = path.rpartition("/")[2].removesuffix(".pt")
        return f"{self.run}.{re.sub('[^A-Za-z0-9._-]', '_', file)}"

    def _check(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _put(self, written: list[_Written]) -> None:
        for one in written:
            one.marker.put(one.path)

    def _thin(self, keep: Rule, directory: str) -> None:
        """Let go of a directory's tags that no rule keeps, each whole; one that has no marker is none."""
        tags, pinned = self._tags(directory)
        # A tag is as old as its first file.
        there = sorted(
            (one.commit for tag in tags for one in tag if one.is_there), key=lambda c: -c.created_s
        )
        # Of a job that went back to an older tag the latest is not the highest.
        latest = text_at(f"{directory}/{_LATEST}")
        stays = keep.decide(
            {commit.slot.step: commit for commit in there},
            pinned=pinned,
            resumed=self._resumed,
            saved=None if latest is None else _step_of(latest),
        )
        for tag in tags:
            # Markers last: while there is one, the tag is, and what a kill leaves of it goes the next time.
            for run, commit, path, is_there in sorted(tag, key=lambda one: one.is_there):
                if commit.slot.step not in stays:
                    if is_there:
                        take_away(path)
                    self._runs.forget(Marker.of(run, commit))

    def _tags(self, directory: str) -> tuple[list[list[_Saved]], set[int]]:
        """Return the files of each tag there is, of all ranks, and the steps that are pinned in a run.

        Not of the one that is being saved: some ranks may have done so, without a marker yet.
        """
        tags: defaultdict[str, list[_Saved]] = defaultdict(list)
        pinned: set[int] = set()
        saving = _tag_of(self._directory)
        for name in self._runs.names():
            if not name.startswith(f"{self.run}."):
                continue
            run = self._runs.open(name)
            pinned.update(run.pinned())
            for commit in run.commits():
                path = path_of(commit)
                tag = _tag_of(path or "")
                if path and tag != saving and tag.rpartition("/")[0] == directory:
                    marker = Marker.at(path)
                    is_there = marker is not None and marker.names(commit)
                    tags[tag].append(_Saved(run, commit, path, is_there))
        return [tag for tag in tags.values() if any(one.is_there for one in tag)], pinned


def _tag_of(path: str) -> str:
    """Return which directory a step's file was saved into, links followed; nothing if there can be none."""
    try:
        return os.path.realpath(path.rpartition("/")[0])
    except ValueError:  # a record is anybody's
        return ""


def _step_of(tag: str) -> int:
    """Return the step that a tag is: its last number."""
    numbers = re.findall(r"[0-9]{1,18}", tag)
    return int(numbers[-1]) if numbers else 0


def _plain(x: State) -> State:
    """Return a state with DeepSpeed's own objects as dicts."""
    if type(x) is dict:
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, ZeroStageEnum):
        return {_TAG: "ZeroStageEnum", "value": int(x)}
    if type(x) in _OBJECTS.values():
        return {_TAG: type(x).__name__, "value": dict(vars(x))}
    return x


def _object(x: State) -> State:
    """Return what `_plain` was given."""
    if type(x) is not dict:
        return x
    if x.keys() != {_TAG, "value"}:
        return {key: _object(value) for key, value in x.items()}
    if x[_TAG] == "ZeroStageEnum":
        return ZeroStageEnum(x["value"])
    kind = _OBJECTS.get(x[_TAG])
    if kind is None or not isinstance(x["value"], dict):
        raise InvalidInputError(
            f"load: found an object of DeepSpeed's called {x[_TAG]!r:.80}, which is not known",
            hint="load it with the DeepSpeed and the deltackpt that saved it",
        )
    made = kind.__new__(kind)
    vars(made).update(x["value"])
    return made
