"""Keras: training with ``model.fit`` as the steps of a run, and its resume.

Owns   a model, its optimizers and the random states that training draws from, as a state and back.
Never  keeps what is no variable: the model's code makes the model, as it made the one that was saved.
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from deltackpt import arrays
from deltackpt.errors import AlreadyExistsError, CorruptError, InvalidInputError
from deltackpt.loader import LazyArray
from deltackpt.retention import Rule
from deltackpt.run import open_run
from deltackpt.store import Where
from deltackpt.types import State

_KEYS = {"model", "optimizers", "epoch", "n_batches", "random"}
_N_PROBLEMS_MAX = 50


class DeltaCheckpoint(keras.callbacks.Callback):  # type: ignore[misc]
    """Saves training as the steps of a run: weights, optimizer, seeds, epoch and random states.

    A step's number is how many batches it has trained on; the metrics of the logs are the step's.

    Parameters
    ----------
    store : path, Backend or Store
        Made if it is not there.
    run : str
    save_freq : "epoch" or int
        When to save: after each epoch, or after so many batches.
    keep : Rule, optional
        Which steps stay once a new one is durable, as of `deltackpt.open_run`; by default all.
    background : bool
        Save while training goes on, as `Run.save_async` does: what makes a save fail is raised by the next
        one, or at the end of training.

    Attributes
    ----------
    run : Run
    n_batches : int
        Batches trained on so far; the number of the next step.

    Raises
    ------
    InvalidInputError
        If `save_freq`, the run or the rule is none.
    DeltackptError
        In a save, as of `deltackpt.delta.save`: it ends the training.

    Examples
    --------
    >>> import tempfile
    >>> store = tempfile.mkdtemp()
    >>> x, y = np.ones((8, 3)), np.ones((8, 1))
    >>> def trained(epochs):
    ...     model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    ...     model.compile("adam", "mse")
    ...     checkpoint = DeltaCheckpoint(store)
    ...     first = checkpoint.restore(model)
    ...     _ = model.fit(x, y, 4, epochs, verbose=0, initial_epoch=first, callbacks=[checkpoint])
    ...     return first, checkpoint.run.steps()
    >>> trained(epochs=2)
    (0, [2, 4])
    >>> trained(epochs=3)
    (2, [2, 4, 6])
    """

    def __init__(
        self,
        store: Where,
        run: str = "main",
        *,
        save_freq: str | int = "epoch",
        keep: Rule | None = None,
        background: bool = False,
    ) -> None:
        super().__init__()
        is_number = isinstance(save_freq, int) and not isinstance(save_freq, bool) and save_freq >= 1
        if not is_number and save_freq != "epoch":
            raise InvalidInputError(
                f"save_freq: found {save_freq!r}, expected 'epoch' or a number of batches",
                hint="save_freq=1000",
            )
        self.save_freq = save_freq
        self.background = background
        self.run = open_run(store, run, keep=keep)
        self.n_batches = 0
        self._n_unsaved = 0
        self._epoch = 0
        self._batch = -1
        self._random: State = None  # to go on from, once training begins

    def restore(self, model: keras.Model, step: int | str = "latest") -> int:
        """Load a step into a model, and return the epoch to go on with: `initial_epoch` of ``fit``.

        Of a step in the middle of an epoch that is this epoch, from its beginning.

        Parameters
        ----------
        model : keras.Model
            Built as the one that was saved.  If it is not compiled, it is given the weights only.
        step : int, "latest" or "latest-good"
            Of a run without steps the latest is the start: nothing is loaded, and 0 returned.

        Raises
        ------
        NotFoundError
            If there is no such step.
        InvalidInputError
            If the model or an optimizer is not built, or has other variables; lists everything that is wrong,
            and nothing is changed.
        CorruptError
            If something of the step cannot be given back.
        DeltackptError
            What made a save in the background fail, if nobody was told yet.
        """
        self.run.close()  # of training that was interrupted a save may be under way: it is the latest
        if step == "latest" and self.run.latest() is None:
            return 0
        commit = self.run.commit(step)
        state = self.run.load(commit.slot.step, lazy=True)
        if not isinstance(state, dict) or state.keys() != _KEYS:
            raise InvalidInputError(
                f"run {self.run.name!r} step {commit.slot.step}: was not saved by a DeltaCheckpoint",
                hint="load it by deltackpt.load",
            )
        epoch, n_batches = state["epoch"], state["n_batches"]
        if type(epoch) is not int or type(n_batches) is not int or min(epoch, n_batches) < 0:
            raise CorruptError(f"step {commit.slot.step}: found epoch {epoch!r} and {n_batches!r} batches")
        if not isinstance(state["random"], dict):
            raise CorruptError(f"step {commit.slot.step}: has no random states")
        problems: list[str] = []
        pairs = _paired("model", _variables(model), state["model"], problems)
        optimizers = _optimizers(model) if model.compiled else {}
        saved = state["optimizers"] if isinstance(state["optimizers"], dict) else {}
        for name, optimizer in optimizers.items():
            pairs += _paired(f"optimizers[{name!r}]", _variables(optimizer), saved.get(name, {}), problems)
        if problems:
            more = [f"and {len(problems) - _N_PROBLEMS_MAX} more"] if len(problems) > _N_PROBLEMS_MAX else []
            raise InvalidInputError(
                "\n  ".join(["the model does not match the step", *problems[:_N_PROBLEMS_MAX], *more]),
                hint="build and compile the model as the one that was saved",
            )
        for variable, found in pairs:
            value = found.load()
            variable.assign(value if keras.backend.backend() == "torch" else arrays.as_numpy(value))
        self.n_batches, self._random = n_batches, state["random"]
        return epoch

    # -- what Keras calls

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Go on with the random states of the step that was restored.

        Raises
        ------
        AlreadyExistsError
            If the run has steps of more batches: those of this training would stand among them.
        """
        refs = self.run.store.refs
        there = refs.visible(refs.listing(self.run.name))  # what is damaged, too
        if there and there[-1].step > self.n_batches:
            raise AlreadyExistsError(
                f"run {self.run.name!r} has step {there[-1].step} already, "
                f"and this training goes on from {self.n_batches} batches",
                hint="restore the latest step; or train into another run; or forget the steps after this one",
            )
        if self._random is not None:
            _set_random(self._random)
        self._random = None
        self._n_unsaved = 0

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Note which epoch it is."""
        self._epoch, self._batch = epoch, -1

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save, if there were as many batches as it takes."""
        n_batches = batch - self._batch  # several at once, with steps_per_execution
        self._batch = batch
        self.n_batches += n_batches
        self._n_unsaved += n_batches
        if isinstance(self.save_freq, int) and self._n_unsaved >= self.save_freq:
            self._save(self._epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save, if it is to be after each epoch."""
        if self.save_freq == "epoch":
            self._save(epoch + 1, logs)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Wait for the save under way."""
        self.run.close()

    def _save(self, epoch: int, logs: Mapping[str, Any] | None) -> None:
        model = self.model  # has JAX's variables come back from the step that it compiled
        state = {
            "model": _values(_variables(model)),
            "optimizers": {name: _values(_variables(o)) for name, o in _optimizers(model).items()},
            "epoch": epoch,
            "n_batches": self.n_batches,
            "random": _get_random(),
        }
        save = self.run.save_async if self.background else self.run.save
        save(state, step=self.n_batches, metrics=_metrics(logs or {}))
        self._n_unsaved = 0


# --- variables ---


def _variables(of: Any) -> dict[str, Any]:
    """Return a model's or an optimizer's variables by their paths, which need not differ."""
    if not of.built:
        raise InvalidInputError(
            f"{of.name!r} is not built, so it has no variables yet",
            hint="call the model on a batch; optimizer.build(model.trainable_variables)",
        )
    named: dict[str, Any] = {}
    for variable in of.variables:
        path, n = variable.path, 1
        while path in named:
            n += 1
            path = f"{variable.path}#{n}"
        named[path] = variable
    return named


def _optimizers(model: keras.Model) -> dict[str, Any]:
    """Return a model's optimizers by the attributes that they are; its own built, as fit would build it."""
    found = {name: x for name, x in vars(model).items() if isinstance(x, keras.optimizers.Optimizer)}
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return found


def _values(variables: Mapping[str, Any]) -> State:
    """Return what variables have, by name, as a state can hold it."""
    if keras.backend.backend() == "torch":
        return {name: variable.value.detach() for name, variable in variables.items()}
    if keras.backend.backend() == "jax":
        from deltackpt.integrations.jax import as_state

        values = as_state([variable.value for variable in variables.values()])  # in this order, by number
        return {name: values[i] for i, name in enumerate(variables)}
    return {name: variable.numpy() for name, variable in variables.items()}


def _paired(
    what: str, variables: Mapping[str, Any], saved: Any, problems: list[str]
) -> list[tuple[Any, LazyArray]]:
    """Match variables with what was saved of them; say what does not match."""
    if not isinstance(saved, dict) or not all(isinstance(x, LazyArray) for x in saved.values()):
        raise CorruptError(f"{what}: found something else than arrays by name")
    names = _matched(list(saved), list(variables))
    if names is None:
        problems += [f"{what}: {name} is not in the step" for name in variables if name not in saved]
        problems += [f"{what}: {name} is in the step only" for name in saved if name not in variables]
        return []
    pairs = []
    for name, variable in zip(names, variables.values(), strict=True):
        found, dtype = saved[name], keras.backend.standardize_dtype(variable.dtype)
        if (found.dtype, found.shape) != (dtype, tuple(variable.shape)):
            expected = f"{dtype} {tuple(variable.shape)}"
            problems.append(
                f"{what}: {variable.path}: found {found.dtype} {found.shape}, expected {expected}"
            )
        pairs.append((variable, found))
    return pairs


def _matched(saved: Sequence[str], wanted: Sequence[str]) -> list[str] | None:
    """Return which of the saved names each wanted one stands for; None if they are not of the same model.

    Keras numbers what has no name by what the process has made before: a model that is made again has the
    same names but for the numbers, in the same order.

    Examples
    --------
    >>> _matched(["dense/bias", "dense_1/bias"], ["dense_1/bias", "dense/bias"])
    ['dense_1/bias', 'dense/bias']
    >>> _matched(["dense/bias", "dense_1/bias"], ["dense_2/bias", "dense_3/bias"])
    ['dense/bias', 'dense_1/bias']
    >>> _matched(["dense/bias"], ["dense/kernel"])
    """
    if sorted(saved) == sorted(wanted):
        return list(wanted)
    unnumbered = [[re.sub(r"_\d+(?=[/_#]|$)", "", name) for name in names] for names in (saved, wanted)]
    return list(saved) if unnumbered[0] == unnumbered[1] else None


# --- what else a step has ---


def _metrics(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the logs that are finite numbers: no other metric can be compared."""
    found = {}
    for name, value in logs.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number):
            found[name] = number
    return found


def _get_random() -> State:
    """Return the states of the generators that Keras shuffles and seeds by."""
    version, words, gauss = random.getstate()
    found = {"python": (version, np.array(words, np.uint32), gauss), "numpy": np.random.get_state()}
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch"] = torch.get_rng_state()
    return found


def _set_random(state: Any) -> None:
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(arrays.as_numpy(words.load()).tolist()), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, arrays.as_numpy(keys.load()), *rest))
        torch = sys.modules.get("torch")
        if torch is not None and "torch" in state:
            torch.set_rng_state(torch.from_numpy(arrays.as_numpy(state["torch"].load()).copy()))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise CorruptError(f"the random states of the step are none: {error}") from error
