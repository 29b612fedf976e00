"""Accelerate: what ``accelerator.save_state`` saves, as a `Training`.

Owns   what an Accelerator has prepared, as parts by name.
Never  saves or loads: `deltackpt.integrations.torch` does.

Accelerate's hooks are given the models only: the optimizers, which are most of it, it writes to files itself.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from deltackpt.errors import InvalidInputError
from deltackpt.integrations.torch import Training
from deltackpt.run import Run

#: Where a model is more than one rank's, and Accelerate leaves the files to others.
_SHARDED = {
    DistributedType.FSDP: "deltackpt.integrations.torch_dcp",
    DistributedType.DEEPSPEED: "deltackpt.integrations.deepspeed",
    DistributedType.MEGATRON_LM: "torch.distributed.checkpoint and deltackpt.integrations.torch_dcp",
}


def training_of(accelerator: Accelerator, run: Run, **others: Any) -> Training:
    """Return all that an Accelerator has prepared, to be saved and resumed by one call each.

    Its parts are what ``accelerator.save_state`` writes: ``model``, ``optimizer``, ``scheduler``, then
    ``model_1`` and so on, ``scaler``, what was registered for checkpointing as ``custom``, and each rank's
    random numbers.  How far a loader is Accelerate does not say: give it as ``Batches`` around the prepared
    loader, and loop over that.

    Parameters
    ----------
    accelerator : Accelerator
        After ``prepare`` and ``register_for_checkpointing``.
    run : Run
        As `deltackpt.open_run` gives it, on every rank.
    **others
        More parts, as of `deltackpt.integrations.torch.Training`: ``batches=Batches(loader)``.

    Raises
    ------
    InvalidInputError
        If models are sharded (FSDP, DeepSpeed, Megatron-LM), or nothing is prepared.

    Examples
    --------
    >>> import torch
    >>> from deltackpt import open_run
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> accelerator = Accelerator(cpu=True)
    >>> model = torch.nn.Linear(3, 2)
    >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    >>> with open_run(MemoryBackend()) as run:
    ...     training = training_of(accelerator, run)
    ...     _ = training.save(step=10)
    ...     training.resume(), list(run.load())
    (10, ['model', 'optimizer', 'accelerator', 'training'])
    """
    kind = accelerator.distributed_type
    if kind in _SHARDED:
        raise InvalidInputError(
            f"training_of: the models are sharded by {kind.value}", hint=f"save them by {_SHARDED[kind]}"
        )
    if not accelerator._models:
        raise InvalidInputError(
            "training_of: the Accelerator has prepared no model", hint="call it after accelerator.prepare"
        )
    prepared: dict[str, list[Any]] = {
        "model": accelerator._models,
        "optimizer": accelerator._optimizers,
        "scheduler": accelerator._schedulers,
        "custom": accelerator._custom_objects,
    }
    parts = {
        name if i == 0 else f"{name}_{i}": part
        for name, those in prepared.items()
        for i, part in enumerate(those)
    }
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    return Training(run, **parts, accelerator=_Progress(accelerator), **others)


class _Progress:
    """How far gradient accumulation is."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.accelerator.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accelerator.step = state["step"]
