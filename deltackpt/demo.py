"""A demonstration: train a small model, kill it in the middle of a save, resume, and compare every bit.

Owns   the model, the worker process that trains it, and the scenario with its checks.
Never  reaches below the public calls: it does what a training script would do.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from deltackpt import delta, gc
from deltackpt.errors import AlreadyExistsError, DeltackptError
from deltackpt.run import open_run

RUN = "demo"

_MODULES = ("argparse", "ast", "dataclasses", "functools", "inspect", "tarfile", "typing")  # the text
_N_CHARS, _N_CONTEXT, _N_CHAR_DIMS, _N_PAIR_DIMS, _N_HIDDEN = 128, 8, 32, 48, 1024
_N_BATCH, _RATE, _BETAS, _DECAY = 32, 1e-3, (0.9, 0.99), 0.01
# One thread: how BLAS shares a product out among threads may change the order of its sums, hence bits.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class Trainer:
    """A character model: frozen embeddings of pairs, trained ones of characters, two layers, AdamW, float32.

    Everything that the next step depends on is in `state`: weights, moments, and the generator that draws
    the batches.
    """

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        n_inputs = _N_CONTEXT * _N_CHAR_DIMS + _N_PAIR_DIMS
        self.frozen = self._normal(_N_CHARS * _N_CHARS, _N_PAIR_DIMS)
        self.params = {
            "chars": self._normal(_N_CHARS, _N_CHAR_DIMS),
            "hidden": self._normal(n_inputs, _N_HIDDEN),
            "out": self._normal(_N_HIDDEN, _N_CHARS),
        }
        self.m = {name: np.zeros_like(param) for name, param in self.params.items()}
        self.v = {name: np.zeros_like(param) for name, param in self.params.items()}
        self.losses: list[float] = []
        sources = (Path(sysconfig.get_path("stdlib"), f"{name}.py").read_bytes() for name in _MODULES)
        self.text = np.minimum(np.frombuffer(b"".join(sources), np.uint8), _N_CHARS - 1).astype(np.int64)

    def _normal(self, *shape: int) -> npt.NDArray[np.float32]:
        return self.rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))

    @property
    def step(self) -> int:
        """Steps trained so far."""
        return len(self.losses)

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint must hold; the arrays are the trainer's own."""
        return {
            "step": self.step,
            "params": {"frozen": self.frozen, **self.params},
            "adamw": {"m": self.m, "v": self.v},
            "rng": self.rng.bit_generator.state,
            "losses": np.array(self.losses),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which the trainer then owns, as if nothing had happened."""
        self.frozen = state["params"]["frozen"]
        self.params = {name: state["params"][name] for name in self.params}
        self.m, self.v = state["adamw"]["m"], state["adamw"]["v"]
        self.rng.bit_generator.state = state["rng"]
        self.losses = state["losses"].tolist()

    def train_step(self) -> None:
        """Draw a batch and take one step of AdamW."""
        starts = self.rng.integers(0, self.text.size - _N_CONTEXT, _N_BATCH)
        windows = self.text[starts[:, None] + np.arange(_N_CONTEXT + 1)]
        loss, grads = self._loss_and_grads(windows[:, :-1], windows[:, -1])
        self.losses.append(loss)
        m_scale, v_scale = (1 - beta**self.step for beta in _BETAS)
        for name, grad in grads.items():
            param, m, v = self.params[name], self.m[name], self.v[name]
            m += (1 - _BETAS[0]) * (grad - m)
            v += (1 - _BETAS[1]) * (grad * grad - v)
            param -= _RATE * (m / m_scale / (np.sqrt(v / v_scale) + 1e-8) + _DECAY * param)

    def _loss_and_grads(self, context: Any, target: Any) -> tuple[float, dict[str, Any]]:
        chars, hidden, out = (self.params[name] for name in ("chars", "hidden", "out"))
        pairs = self.frozen[context[:, -2] * _N_CHARS + context[:, -1]]
        x = np.concatenate([chars[context].reshape(_N_BATCH, -1), pairs], axis=1)
        h = np.maximum(x @ hidden, 0)
        logits = h @ out
        logits -= logits.max(axis=1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        d_logits = (np.exp(log_probs) - np.eye(_N_CHARS, dtype=np.float32)[target]) / np.float32(_N_BATCH)
        d_h = (d_logits @ out.T) * (h > 0)
        d_x = (d_h @ hidden.T)[:, : _N_CONTEXT * _N_CHAR_DIMS]
        d_chars = np.zeros_like(chars)
        np.add.at(d_chars, context, d_x.reshape(_N_BATCH, _N_CONTEXT, _N_CHAR_DIMS))
        loss = -log_probs[np.arange(_N_BATCH), target].mean()
        return float(loss), {"chars": d_chars, "hidden": x.T @ d_h, "out": h.T @ d_logits}


def arrays_of(state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Walk the arrays of nested dicts, with dotted names."""
    for key, value in state.items():
        if isinstance(value, np.ndarray):
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from arrays_of(value, f"{prefix}{key}.")


def digest_of(state: dict[str, Any]) -> str:
    """Hash every bit of a trainer's state."""
    digest = hashlib.sha256(json.dumps([state["step"], state["rng"]], sort_keys=True).encode())
    for name, array in sorted(arrays_of(state), key=lambda item: item[0]):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def work(
    store: str, until: int, every: int, die_at: int | None = None, whole: str | None = None
) -> list[dict[str, Any]]:
    """Be the worker process: train from the latest step to `until`, and say what each save cost.

    Parameters
    ----------
    store : str
        Its run "demo" is gone on with.
    until, every : int
        The last step, and the steps from one save to the next.
    die_at : int, optional
        The step whose save does not survive.
    whole : str, optional
        A file to write each saved step to as a whole as well, for comparison.
    """
    trainer = Trainer()
    with open_run(store, RUN) as run:
        latest = run.latest()
    if latest is not None:
        trainer.load(delta.load(store, step=latest, run=RUN))
    saves = []
    while trainer.step < until:
        trainer.train_step()
        if trainer.step % every == 0:
            if trainer.step == die_at:
                _die_in_save(store)
            state, start_s = trainer.state(), time.perf_counter()
            report = delta.save(state, store, step=trainer.step, run=RUN)
            save = {"save_s": time.perf_counter() - start_s, "logical_size": report.logical_size}
            saves.append({"step": trainer.step, "digest": digest_of(state), **save})
            if whole:
                saves[-1] |= _save_whole(state, Path(whole))
    return saves


def _save_whole(state: dict[str, Any], path: Path) -> dict[str, Any]:
    start_s = time.perf_counter()
    with path.open("wb") as file:
        np.savez(file, **dict(arrays_of(state)))  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    result = {"whole_s": time.perf_counter() - start_s, "whole_size": path.stat().st_size}
    path.unlink()
    return result


def _die_in_save(store: str) -> None:
    """Have the next save killed when its packs are on disk and its manifest is about to be."""
    manifests = os.path.join(os.path.abspath(store), "manifests", "")  # noqa: PTH100, PTH118

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.link" and os.fspath(args[1]).startswith(manifests):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo measured, in bytes and seconds of wall clock.

    Parameters
    ----------
    n_saves, logical_size : int
        Saves of the run without a break, and what they were handed.
    stored_size, save_s
        What they made of the store's directory, and the time in `delta.save`.
    whole_size, whole_s
        The same for ``numpy.savez`` and fsync of the same states in the same process.
    killed_step, resumed_step : int
        The step whose save was killed, and the one that the next process went on from.
    before_gc_size, after_gc_size : int
        The resumed run's store with all its steps, and with `kept_steps` only.
    kept_steps : list of int
        Still there, and loaded bit for bit.
    total_s : float
        The whole demo.
    """

    n_saves: int
    logical_size: int
    stored_size: int
    save_s: float
    whole_size: int
    whole_s: float
    killed_step: int
    resumed_step: int
    before_gc_size: int
    after_gc_size: int
    kept_steps: list[int]
    total_s: float


def run_demo(
    store: Path | None, *, show: Callable[[Any], None], n_steps: int = 400, save_every: int = 20
) -> DemoResult:
    """Play the scenario in real processes, check every claim it makes, and show a table.

    Parameters
    ----------
    store : Path, optional
        Where the killed and resumed run is kept to look at; by default it goes when the demo ends.
    show : callable
        Is given lines of text and, at the end, a rich table.
    n_steps, save_every : int
        Steps to train, and steps from one save to the next.

    Raises
    ------
    AlreadyExistsError
        If `store` has a run "demo".
    DeltackptError
        If a claim does not hold.
    """
    start_s = time.perf_counter()
    killed_step = save_every * max(2, n_steps * 3 // 5 // save_every)
    with tempfile.TemporaryDirectory(prefix="deltackpt-demo-") as scratch:
        straight, store = Path(scratch, "straight"), Path(store or Path(scratch, "store"))
        plan = {"until": n_steps, "every": save_every}
        if _steps(store):
            raise AlreadyExistsError(f"{store}: has a run {RUN!r} already", hint="choose another store")

        saves = _worker(straight, plan | {"whole": f"{scratch}/whole.npz"})
        show(f"1. trained {n_steps} steps without a break, saving every {save_every}")

        _worker(store, plan | {"die_at": killed_step}, returncode=-signal.SIGKILL)
        resumed_step = killed_step - save_every
        _check(_steps(store)[-1] == resumed_step, f"the steps after the kill are {_steps(store)}")
        show(f"2. the same again, killed in the save of step {killed_step}: the latest is {resumed_step}")

        digests = {save["step"]: save["digest"] for save in saves}
        for save in _worker(store, plan):
            _check(save["digest"] == digests[save["step"]], f"step {save['step']} differs after the resume")
        show(f"3. resumed: weights, moments and all at step {n_steps} are the same, bit for bit")

        before_gc_size = _size_on_disk(store)
        with open_run(store, RUN) as run:
            run.forget(run.steps()[:-2])
        gc.collect(store)
        kept_steps, after_gc_size = _steps(store), _size_on_disk(store)
        _check(after_gc_size < before_gc_size, f"gc left {after_gc_size} of {before_gc_size} bytes")
        for step in kept_steps:
            digest = digest_of(delta.load(store, step=step, run=RUN))
            _check(digest == digests[step], f"step {step} differs after gc")
        show(f"4. forgot all steps but {kept_steps}, which still load bit for bit")

        result = DemoResult(
            n_saves=len(saves),
            stored_size=_size_on_disk(straight),
            **{key: sum(save[key] for save in saves) for key in _SUMMED},
            killed_step=killed_step,
            resumed_step=resumed_step,
            before_gc_size=before_gc_size,
            after_gc_size=after_gc_size,
            kept_steps=kept_steps,
            total_s=time.perf_counter() - start_s,
        )
    show(_table(result))
    return result


_SUMMED = ("logical_size", "save_s", "whole_size", "whole_s")


def _worker(store: Path, plan: dict[str, Any], *, returncode: int = 0) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "deltackpt.demo", "--worker", json.dumps({"store": str(store), **plan})]
    env = os.environ | dict.fromkeys(_THREADS, "1")
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    _check(ended.returncode == returncode, f"a worker ended with {ended.returncode}: {ended.stderr}")
    return list(json.loads(ended.stdout or "[]"))


def _steps(store: Path) -> list[int]:
    with open_run(store, RUN) as run:
        return run.steps()


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise DeltackptError(f"demo: {otherwise}", hint="report it: this should not happen")


def _size_on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _table(result: DemoResult) -> Table:
    table = Table("", "deltackpt", "every step whole", "ratio", title=f"{result.n_saves} steps saved")
    stored, whole = result.stored_size, result.whole_size
    table.add_row("handed in", *[f"{result.logical_size / 1e6:.1f} MB"] * 2)
    table.add_row("stored", f"{stored / 1e6:.1f} MB", f"{whole / 1e6:.1f} MB", f"{whole / stored:.2f}")
    save_s, whole_s = result.save_s, result.whole_s
    table.add_row("seconds saving", f"{save_s:.2f}", f"{whole_s:.2f}", f"{whole_s / save_s:.2f}")
    table.add_row(f"after gc to {len(result.kept_steps)} steps", f"{result.after_gc_size / 1e6:.1f} MB")
    return table


def main() -> None:
    """Run the demo, or with ``--worker`` the process that it kills."""
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(**json.loads(sys.argv[2]))))
    else:
        print(json.dumps(asdict(run_demo(None, show=Console(stderr=True).print))))


if __name__ == "__main__":
    main()
