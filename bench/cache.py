"""A series of saves on disk: safetensors files of flat names, and series.json, which says what they are.

Owns   the way from nested states to files and back, and where the cache lies.
Never  trains, and never trusts a half-written series: a folder gets its name when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

#: A path of keys into a nested state, and the plain value there, for all that is no tensor.
Plain = list[tuple[list[str | int], Any]]


@dataclass(frozen=True, slots=True)
class Save:
    """One save as the training hands it over."""

    run: str
    step: int
    state: dict[str, Any]
    loss_start: float
    loss_now: float


@dataclass(frozen=True, slots=True)
class SavedState:
    """One save in the cache.

    Parameters
    ----------
    run, step : str, int
    path : str
        The safetensors file.
    state_size : int
        Bytes of its tensors.
    changed : float
        Share of these bytes in elements that differ from the save before, or were not in it.
    sha256 : str
        Of the file.
    loss : float
        Mean of the last ten training steps.
    keys, plain : list
        The path of keys of each tensor by its flat name, and what else the state holds.
    """

    run: str
    step: int
    path: str
    state_size: int
    changed: float
    sha256: str
    loss: float
    keys: dict[str, list[str | int]]
    plain: Plain

    def tensors(self) -> Tensors:
        """The flat tensors, in memory of their own: no map of the file is left."""
        return {name: tensor.clone() for name, tensor in load_file(self.path).items()}

    def fill(self, tensors: Tensors) -> None:
        """Make these the flat tensors, in the memory they have, as an optimizer's step does."""
        found = load_file(self.path)
        for name in tensors.keys() - found.keys():
            del tensors[name]
        for name, tensor in found.items():
            old = tensors.get(name)
            if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
                old.copy_(tensor)
            else:
                tensors[name] = tensor.clone()

    def nested(self, tensors: Tensors) -> dict[str, Any]:
        """The nested state of these flat tensors, as the training had it."""
        state: dict[str, Any] = {}
        for keys, value in [*((self.keys[name], tensors[name]) for name in self.keys), *self.plain]:
            at = state
            for key in keys[:-1]:
                at = at.setdefault(key, {})
            at[keys[-1]] = value
        return state


@dataclass(frozen=True, slots=True)
class Series:
    """All saves of one regime, in order, and the training's loss before and after."""

    regime: str
    title: str
    loss_start: float
    loss_end: float
    saves: list[SavedState]

    def to_json(self) -> dict[str, Any]:
        """What the series is, without the states' insides."""
        hidden = {"keys", "plain", "path"}
        saves = [{k: v for k, v in asdict(save).items() if k not in hidden} for save in self.saves]
        return {**asdict(self), "saves": saves}


def flatten(
    state: Any, keys: tuple[str | int, ...] = ()
) -> tuple[Tensors, dict[str, list[str | int]], Plain]:
    """Take a nested state apart: tensors by flat name, the keys that lead to each, and the rest."""
    if isinstance(state, torch.Tensor):
        name = "/".join(map(str, keys))
        return {name: state.detach().contiguous()}, {name: list(keys)}, []
    if not isinstance(state, dict):
        return {}, {}, [(list(keys), state)]
    tensors: Tensors = {}
    paths: dict[str, list[str | int]] = {}
    plain: Plain = []
    for key, value in state.items():
        some, where, rest = flatten(value, (*keys, key))
        tensors |= some
        paths |= where
        plain += rest
    return tensors, paths, plain


def changed_share(now: Tensors, before: Tensors) -> float:
    """Share of the bytes of `now` in elements that are new or not bit for bit what they were."""
    total = changed = 0
    for name, tensor in now.items():
        old = before.get(name)
        total += tensor.nbytes
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            changed += tensor.nbytes
        elif tensor.nbytes:
            a, b = (t.reshape(-1).view(torch.uint8).view(-1, t.element_size()) for t in (tensor, old))
            changed += int((a != b).any(1).sum()) * tensor.element_size()
    return changed / total


def default_cache() -> Path:
    """Where series are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltackpt-bench"


#: The modules that say what is trained.
SOURCES = ("models.py", "states.py")


def cached(
    at: Path,
    regime: str,
    title: str,
    variant: str,
    train: Callable[[], Iterable[Save]],
    modules: tuple[str, ...] = SOURCES,
) -> Series:
    """Return the series from the cache, which is filled by `train` if it is not there.

    The folder's name holds what the bytes depend on: regime, variant, Python, torch and the bench's own
    modules.
    """
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in modules)
    made_by = f"{sys.version}{torch.__version__}".encode() + sources
    folder = at / f"{regime}-{variant}-{hashlib.sha256(made_by).hexdigest()[:12]}"
    if not folder.exists():
        at.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=at, prefix=".new-"))
        try:
            write(fresh, regime, title, train())
            fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return read(folder)


def write(folder: Path, regime: str, title: str, saves: Iterable[Save]) -> None:
    rows, before = [], {}
    for i, save in enumerate(saves):
        tensors, keys, plain = flatten(save.state)
        path = folder / f"{i}-{save.run}-{save.step}.safetensors"
        save_file(tensors, path)
        rows.append(
            SavedState(
                save.run,
                save.step,
                path.name,
                sum(t.nbytes for t in tensors.values()),
                changed_share(tensors, before),
                hashlib.sha256(path.read_bytes()).hexdigest(),
                save.loss_now,
                keys,
                plain,
            )
        )
        before = {name: tensor.clone() for name, tensor in tensors.items()}
    series = Series(regime, title, save.loss_start, save.loss_now, rows)
    (folder / "series.json").write_text(json.dumps(asdict(series)))


def read(folder: Path) -> Series:
    fields = json.loads((folder / "series.json").read_text())
    saves = [SavedState(**{**row, "path": str(folder / row["path"])}) for row in fields["saves"]]
    return Series(**{**fields, "saves": saves})
