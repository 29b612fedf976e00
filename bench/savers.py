"""Tools that save a state in one call, in the foreground or the background, behind one small interface.

Owns   how each is called, that its step is durable when it says so, and how it brings a step back.
Never  measures, and hides nothing: what a tool needs is in its class.
"""

from __future__ import annotations

import shutil
import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from cache import Tensors, flatten
from peers import Tool, fsync, in_memory
from safetensors.torch import load_file, save_file

from deltackpt import delta, energy, open_run
from deltackpt.run import Run

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Saving:
    """A save on its way.

    Parameters
    ----------
    done : callable
        Whether it is durable; costs nothing to ask.
    wait : callable
        Returns once it is; raises what made it fail.
    """

    done: Callable[[], bool]
    wait: Callable[[], object]


OVER = Saving(lambda: True, lambda: None)


class Saver(Tool):
    """A tool with a store of its own under `at`.

    Parameters
    ----------
    at : path
        An empty folder.
    memory_max : int
        Bytes of memory for copies, of the one tool that has such a bound.

    Attributes
    ----------
    in_background : bool
        Whether `begin` returns before the step is durable.
    """

    in_background: ClassVar[bool] = False

    def __init__(self, at: Path, memory_max: int):
        self.at = at

    @abstractmethod
    def begin(self, state: State, step: int) -> Saving:
        """Save; return once the state may be changed."""

    def moved_size(self, state_size: int) -> int:
        """Return the bytes that the last save moved, about: as `deltackpt.energy.moved_size` says of its own.

        Each byte is read, copied into the page cache and written from there to the device; of a tool that
        saves in the background copied once more.
        """
        return (6 if self.in_background else 4) * state_size

    @abstractmethod
    def restores(self, step: int, into: State) -> dict[str, Callable[[], Any]]:
        """Return the ways to bring a step back, by name; the first is the one its documents show.

        Each returns the state, nested or flat.  `into` is a state of the same shapes that may be overwritten.
        """

    def forget(self, step: int) -> None:
        """Remove a step of a tool whose steps are files of their own, so that they need not all have room."""

    def close(self) -> None:
        """Let go of threads and memory."""


class Deltackpt(Saver):
    name, install, module = "Run.save", "pip install .", "deltackpt"

    def __init__(self, at: Path, memory_max: int):
        super().__init__(at, memory_max)
        self.run = self.open(memory_max)
        self.report: Any = None

    def open(self, memory_max: int) -> Run:
        return open_run(self.at)

    def begin(self, state: State, step: int) -> Saving:
        self.report = self.run.save(state, step=step)
        return OVER

    def moved_size(self, state_size: int) -> int:
        r = self.report
        copied_size = 2 * r.new_size if self.in_background else 0
        return energy.moved_size(r.logical_size, r.new_size, r.written_size) + copied_size

    def restores(self, step: int, into: State) -> dict[str, Callable[[], Any]]:
        return {
            "load": lambda: delta.load(self.at, step=step),
            "load(into=)": lambda: delta.load(self.at, step=step, into=into),
        }

    def close(self) -> None:
        self.run.close()


class DeltackptAsync(Deltackpt):
    name, in_background = "Run.save_async", True

    def begin(self, state: State, step: int) -> Saving:
        pending = self.run.save_async(state, step=step)
        assert pending is not None

        def wait() -> None:
            self.report = pending.wait()

        return Saving(pending.done, wait)


class DeltackptBounded(DeltackptAsync):
    name = "Run.save_async, memory_max"

    def open(self, memory_max: int) -> Run:
        return open_run(self.at, memory_max=memory_max)


class DeltackptTrusting(DeltackptAsync):
    name = "Run.save_async, audit_every"

    def open(self, memory_max: int) -> Run:
        return open_run(self.at, audit_every=1000)


class Files(Saver):
    """A step is a file of its own."""

    ending: ClassVar[str]

    def path(self, step: int) -> Path:
        return self.at / f"{step}{self.ending}"

    def forget(self, step: int) -> None:
        self.path(step).unlink()


class TorchSave(Files):
    name, install, module, ending = "torch.save + fsync", "pip install torch", "torch", ".pt"

    def begin(self, state: State, step: int) -> Saving:
        torch.save(state, self.path(step))
        fsync(self.path(step))
        return OVER

    def restores(self, step: int, into: State) -> dict[str, Callable[[], Any]]:
        return {"torch.load": lambda: torch.load(self.path(step), weights_only=True)}


class Safetensors(Files):
    name, install, module = "save_file + fsync", "pip install safetensors", "safetensors"
    ending = ".safetensors"

    def begin(self, state: State, step: int) -> Saving:
        save_file(flatten(state)[0], self.path(step))
        fsync(self.path(step))
        return OVER

    def restores(self, step: int, into: State) -> dict[str, Callable[[], Any]]:
        return {
            "load_file and a copy": lambda: in_memory(self.path(step)),
            "load_file, which maps": lambda: load_file(self.path(step)),
        }


class Dcp(Saver):
    """torch's, one process, no process group; flushes its files itself (`sync_files`)."""

    name, install, module = "dcp.save", "pip install torch", "torch"

    def begin(self, state: State, step: int) -> Saving:
        from torch.distributed import checkpoint as dcp

        dcp.save(flatten(state)[0], checkpoint_id=self.at / str(step), no_dist=True)
        return OVER

    def restores(self, step: int, into: State) -> dict[str, Callable[[], Any]]:
        from torch.distributed import checkpoint as dcp

        flat = flatten(into)[0]

        def load() -> Tensors:
            dcp.load(flat, checkpoint_id=self.at / str(step), no_dist=True)
            return flat

        return {"dcp.load, which is into": load}

    def forget(self, step: int) -> None:
        shutil.rmtree(self.at / str(step))


class DcpAsync(Dcp):
    name, in_background = "dcp.async_save", True

    def begin(self, state: State, step: int) -> Saving:
        from torch.distributed import checkpoint as dcp

        future = dcp.async_save(flatten(state)[0], checkpoint_id=self.at / str(step), no_dist=True)
        return Saving(future.done, future.result)


class Orbax(Saver):
    """`StandardCheckpointer` of NumPy's arrays, which saves in the background; tensorstore flushes files."""

    name, install, module = "Orbax", "pip install orbax-checkpoint", "orbax.checkpoint"
    in_background = True

    @classmethod
    def is_installed(cls) -> bool:
        try:
            import orbax.checkpoint  # noqa: F401
        except ImportError:
            return False
        return True

    @classmethod
    def version(cls) -> str:
        import orbax.checkpoint

        return str(orbax.checkpoint.__version__)

    def __init__(self, at: Path, memory_max: int):
        import orbax.checkpoint

        super().__init__(at, memory_max)
        self.checkpointer = orbax.checkpoint.StandardCheckpointer()

    def begin(self, state: State, step: int) -> Saving:
        arrays = {name: tensor.numpy() for name, tensor in flatten(state)[0].items()}
        self.checkpointer.save((self.at / str(step)).absolute(), arrays)
        waiter = threading.Thread(target=self.checkpointer.wait_until_finished)
        waiter.start()  # there is no way to ask whether it is done but to wait

        def wait() -> None:
            waiter.join()
            self.checkpointer.wait_until_finished()

        return Saving(lambda: not waiter.is_alive(), wait)

    def restores(self, step: int, into: State) -> dict[str, Callable[[], Any]]:
        def load() -> Tensors:
            found = self.checkpointer.restore((self.at / str(step)).absolute())
            return {name: torch.from_numpy(array) for name, array in found.items()}

        return {"restore": load}

    def forget(self, step: int) -> None:
        shutil.rmtree(self.at / str(step))

    def close(self) -> None:
        self.checkpointer.close()


SAVERS: dict[str, type[Saver]] = {
    kind.name: kind
    for kind in (
        Deltackpt,
        DeltackptAsync,
        DeltackptBounded,
        DeltackptTrusting,
        TorchSave,
        Safetensors,
        Dcp,
        DcpAsync,
        Orbax,
    )
}
