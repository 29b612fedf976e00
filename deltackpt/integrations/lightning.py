"""Lightning: checkpoints as the steps of a run, behind the paths that it knows them by.

Owns   which path is which step, saving and removing in the order that no kill can harm.
Never  decides when to save, what stays or what is resumed: ModelCheckpoint and the Trainer do.

At each path stands a marker, see `deltackpt.markers`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from typing import Any

from deltackpt.errors import InvalidInputError, NotFoundError
from deltackpt.markers import (
    Marker,
    PathLike,
    Runs,
    check_options,
    metadata_of,
    place_for,
    stand_in,
    take_away,
)
from deltackpt.pending import Pending
from deltackpt.report import SaveReport

# Lightning comes as two packages whose classes are not each other's.
if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
    from lightning_fabric.plugins import TorchCheckpointIO
else:
    try:
        from lightning.fabric.plugins import TorchCheckpointIO
    except ImportError:
        from lightning_fabric.plugins import TorchCheckpointIO

log = logging.getLogger("deltackpt")


class DeltaCheckpointIO(TorchCheckpointIO):
    """Saves and loads a Trainer's checkpoints: ``Trainer(plugins=[DeltaCheckpointIO("checkpoints")])``.

    Where Lightning would write a file stands a small marker that names the step.  `ModelCheckpoint`,
    ``ckpt_path="last"``, ``"best"`` and paths work as they do with files; a real ``.ckpt`` file still loads.

    Parameters
    ----------
    store : path-like
        Made if it is not there; on every rank the same.
    run : str
        One for each training job.  A second checkpoint of the same step, as of ``save_last=True``, goes into
        ``run-2``; what they have in common is stored once.
    background : bool
        Save in another process while training goes on.  An error is raised by the next save, or at the end
        of ``fit``; a path that is to be removed stays until the save after which it was is durable.
    allow_pickle : bool
        Pickle what has no plain form, and unpickle it, which runs code that its writer chose.
    **options
        As of `deltackpt.open_run`: ``shadow``, ``memory_max``, ``audit_every``, ``optimize``.

    Raises
    ------
    InvalidInputError
        If what a checkpoint holds has no plain form; the message says where it is.  If it holds tensors that
        are sharded over ranks: save those by `deltackpt.integrations.torch_dcp`.
    DeltackptError
        As of `deltackpt.delta.save` and `deltackpt.delta.load`.
    """

    def __init__(
        self,
        store: PathLike,
        run: str = "main",
        *,
        background: bool = False,
        allow_pickle: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        check_options("DeltaCheckpointIO", options)  # no keep: ModelCheckpoint says what stays
        self.store = os.fspath(store)
        self.run = run
        self.background = background
        self.allow_pickle = allow_pickle
        self.options = options
        self._reset()

    def _reset(self) -> None:
        self._runs = Runs(self.store, self._options_of)
        self._lock = threading.Lock()
        #: The save under way, or None.
        self._landing: _Landing | None = None
        #: Where what this training saved last is, or what it went on from; None if there is neither.
        self._landed: str | None = None
        self._error: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        ours = {"_runs", "_lock", "_landing", "_landed", "_error"}
        return {name: value for name, value in self.__dict__.items() if name not in ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    # -- what Lightning calls

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any = None
    ) -> None:
        """Save a checkpoint as a step, and put its marker at the path, in the place of what stands there."""
        if storage_options is not None:
            raise InvalidInputError(
                f"save_checkpoint: found storage_options={storage_options!r}, expected none",
                hint="leave them out: the store was named to DeltaCheckpointIO",
            )
        self._settle()
        _check_not_sharded(checkpoint)
        where, step = place_for(path), _step_of(checkpoint, path)
        run, overwrite = self._runs.free(self.run, step, where)
        options: dict[str, Any] = {
            "metadata": metadata_of(where),
            "overwrite": overwrite,
            "allow_pickle": self.allow_pickle,
        }
        # What stands there is replaced; but a link is not what it leads to.
        before = Marker.at(where, follow=False)
        self._landing = landing = _Landing(where, before)
        try:
            # A second checkpoint of a step has next to nothing new: no process and no copies for it.
            if self.background and run.name == self.run:
                # With save_last="link" last.ckpt leads to the path as soon as this returns.  After a kill
                # before the step is there it would lead nowhere, and Lightning would begin anew.
                landing.has_stand_in = self._landed is not None and stand_in(where, self._landed)
                landing.pending = run.save_async(checkpoint, step=step, **options)
            else:
                run.save(checkpoint, step=step, **options)
                self._settle()
        except BaseException:
            self._give_up()
            raise

    def load_checkpoint(
        self, path: PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the checkpoint whose marker stands at the path, or that is a file there.

        Nothing is unpickled, so `weights_only` matters for real files only.
        """
        self._settle()
        self._landed = self._landed or os.fspath(path)
        marker = Marker.at(path)
        if marker is None:
            options = {} if map_location is None else {"map_location": map_location}
            found: dict[str, Any] = super().load_checkpoint(path, weights_only=weights_only, **options)
            return found
        if callable(map_location):
            raise InvalidInputError(
                "load_checkpoint: found a function as map_location, expected a device or a dict of devices",
                hint="map_location='cpu'",
            )
        if isinstance(map_location, dict):
            map_location = {str(old): new for old, new in map_location.items()}
        run = self._runs.open(marker.run)
        marker.commit(run)
        state: dict[str, Any] = run.load(marker.step, map=map_location, allow_pickle=self.allow_pickle)
        return state

    def remove_checkpoint(self, path: PathLike) -> None:
        """Take the marker away, and forget its step; `deltackpt gc` gives the space back."""
        with self._lock:
            # The one that is to take its place may fail yet.
            if self._landing is not None:
                self._landing.removals.append(path)
                return
        self._remove(path)

    def teardown(self) -> None:
        """Wait for the save under way; raise what made it fail."""
        try:
            self._settle()
        finally:
            self._landed = None  # another training may follow
            self._runs.close()

    # -- below

    def _options_of(self, run: str) -> dict[str, Any]:
        # What a second run is given, the first has just stored: no differences to be taken.
        options = self.options if run == self.run else {"shadow": 0}
        return {**options, "on_save": self._saved}

    def _saved(self, report: SaveReport) -> None:
        """Put the marker down, now that the step is durable; in the thread that saves."""
        landing = self._landing
        assert landing is not None
        try:
            run = self._runs.open(report.run)
            _, commit = run.store.refs.slot(report.run, report.step)
            if commit is None:
                raise NotFoundError(f"run {report.run!r} step {report.step}: was forgotten as it was saved")
            marker = Marker.of(run, commit)
            marker.put(landing.path)
            landing.has_stand_in = False
            self._landed = landing.path
            if landing.before is not None and landing.before != marker:
                self._runs.forget(landing.before)
            with self._lock:
                self._landing = None
            for path in landing.removals:
                self._remove(path)
        except BaseException as e:
            self._error = e

    def _settle(self) -> None:
        """Wait for the save under way; raise what went wrong in it, or when its marker was put down."""
        landing = self._landing
        try:
            if landing is not None and landing.pending is not None:
                landing.pending.wait()
        finally:
            if self._landing is not None and self._landing.pending is not None:
                self._give_up()
        error, self._error = self._error, None
        if error is not None:
            self._give_up()
            raise error

    def _give_up(self) -> None:
        """Leave what was to be removed after a save that failed."""
        with self._lock:
            landing, self._landing = self._landing, None
        if landing is not None and landing.has_stand_in:
            take_away(landing.path)
        if landing is not None and landing.removals:
            log.warning("%s is not saved; kept all the same: %s", landing.path, landing.removals)

    def _remove(self, path: PathLike) -> None:
        marker = Marker.at(path, follow=False)
        if marker is None:
            super().remove_checkpoint(path)
        else:
            take_away(path)
            self._runs.forget(marker)


class _Landing:
    """A save under way: where its marker goes, what stood there, what is to be removed after it."""

    def __init__(self, path: str, before: Marker | None) -> None:
        self.path = path
        self.before = before
        self.removals: list[PathLike] = []
        self.has_stand_in = False
        self.pending: Pending | None = None


def _step_of(checkpoint: dict[str, Any], path: PathLike) -> int:
    """Return the step of a checkpoint: of the Trainer's its global step, else what its name ends in, or 0."""
    step = checkpoint.get("global_step")
    if type(step) is int:
        return step
    numbers = re.findall(r"[0-9]{1,18}", os.fspath(path).rpartition("/")[2])
    return int(numbers[-1]) if numbers else 0


def _check_not_sharded(checkpoint: dict[str, Any]) -> None:
    weights = checkpoint.get("state_dict")
    for name, tensor in weights.items() if isinstance(weights, dict) else ():
        if type(tensor).__name__ in ("DTensor", "ShardedTensor"):
            raise InvalidInputError(
                f"save_checkpoint: {name!r} is sharded over ranks, which a CheckpointIO saves from one rank",
                hint="save by torch.distributed.checkpoint with deltackpt.integrations.torch_dcp",
            )
